//! What mistakes in YAML say: what stands there, and what could.

use super::Value;

/// What the parser says, without the place, which is told before it, and without its options, which are not the user's.
pub(super) fn in_our_words(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    let line = line.trim_start_matches("error: ");
    let is_place = |text: &str| {
        let numbers = text.strip_prefix("line ")?.split_once(" column ")?;
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        (is_number(numbers.0) && is_number(numbers.1)).then_some(())
    };
    let said = match line.split_once(": ") {
        Some((place, said)) if is_place(place).is_some() => said,
        Some(_) | None => line,
    };
    if let Some((key, _)) = said
        .strip_prefix("duplicate mapping key: ")
        .and_then(|rest| rest.rsplit_once(", set "))
    {
        return format!("key \"{key}\" is there already: keep one");
    }
    match said.starts_with("multiple YAML documents") {
        true => "the file has several documents, parted by \"---\": keep one".to_owned(),
        false => said.to_owned(),
    }
}

/// What a value is, in words; never what an expanded one was expanded to.
pub(super) fn told(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(truth) => format!("the boolean {truth}"),
        Value::Unsigned(number) => format!("the number {number}"),
        Value::Signed(number) => format!("the number {number}"),
        Value::Float(number) => format!("the number {number}"),
        Value::Text(text) => format!("\"{text}\""),
        Value::Expanded { written, .. } => format!("\"{written}\""),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "a map".to_owned(),
    }
}

/// As [`told`], but for what a text says: where keys are needed it may be an address with a password, or a key.
pub(super) fn told_apart(value: &Value) -> String {
    match value {
        Value::Text(_) => "a text".to_owned(),
        Value::Null
        | Value::Bool(_)
        | Value::Unsigned(_)
        | Value::Signed(_)
        | Value::Float(_)
        | Value::Expanded { .. }
        | Value::List(_)
        | Value::Map(_) => told(value),
    }
}

/// The mend where a name is needed.
pub(super) fn no_name(value: &Value, names: &[&str]) -> String {
    let unquoted = match value {
        Value::Unsigned(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Null
        | Value::Bool(_)
        | Value::Signed(_)
        | Value::Text(_)
        | Value::Expanded { .. }
        | Value::List(_)
        | Value::Map(_) => None,
    };
    let name = unquoted.filter(|text| names.contains(&text.as_str()));
    let mend = match name {
        Some(name) => format!("write it in quotes, \"{name}\""),
        None => format!("known here: {}", names.join(", ")),
    };
    let too = match matches!(value, Value::Bool(_)) {
        true => " (on, off, yes and no are booleans, too)",
        false => "",
    };
    format!("{}{too} stands where a name is needed; {mend}", told(value))
}

pub(super) fn unknown_key(key: &str, fields: &[&str]) -> String {
    format!("unknown key \"{key}\"; {}", did_you_mean(key, fields))
}

/// Bytes of words that are compared: the time that takes grows by the square.
const COMPARED: usize = 64;

/// `did you mean "…"?` when one of `known` is near, else all of them.
pub fn did_you_mean(word: &str, known: &[&str]) -> String {
    let nearest = known
        .iter()
        .filter(|other| word.len().max(other.len()) <= COMPARED)
        .map(|other| (strsim::damerau_levenshtein(word, other), other))
        .filter(|(distance, _)| *distance <= 1 + word.len() / 4)
        .min();
    match nearest {
        Some((_, other)) => format!("did you mean \"{other}\"?"),
        None if known.is_empty() => "none is in the file: add it".to_owned(),
        None => format!("known here: {}", known.join(", ")),
    }
}
