//! What mistakes in YAML say: what stands there, and what could.

use serde::de::{Expected, Unexpected};

use super::tree::Value;
use crate::config::elsewhere;

/// What the parser says, without the place, which is told before it, and without its options, which are not the user's. `begins_line`: whether
/// nothing stands in the line ahead of the place.
pub(super) fn in_our_words(message: &str, begins_line: bool) -> String {
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
    if !begins_line && said.starts_with("while parsing a block ") {
        return "a value goes on behind its ] or }: put a text that begins with [ or { in quotes, as in \"[::]:8080\"".to_owned();
    }
    let mends = [
        (
            "block sequence entries are not allowed in this context",
            "a list cannot begin in the line of its key: put \"- \" into the next line, or write the list in []",
        ),
        (
            "unclosed quote",
            "a quote is opened here and never closed: close it",
        ),
        (
            "invalid trailing content after",
            "a text goes on behind its closing quote: a quote above it is perhaps never closed",
        ),
        (
            "multiple YAML documents",
            "the file has several documents, parted by \"---\": keep one",
        ),
        (
            "alias references unknown anchor",
            "\"*\" begins an alias in YAML: put the text in quotes, as in \"*.example.com\"",
        ),
        (
            "tabs disallowed",
            "a tab stands in the indentation, which YAML makes of spaces alone: use spaces",
        ),
        (
            "while parsing a block collection",
            "the line is indented neither as an entry of the list above it nor as what is outside: align it with one of them",
        ),
        (
            "while parsing a block mapping",
            "the line is indented neither as a key of the map above it nor as what is outside: align it with one of them",
        ),
        (
            "simple key expected ':'",
            "a key has no \":\" behind it: write KEY: VALUE",
        ),
        (
            "mapping values are not allowed in this context",
            "a key stands where none can: indent the line as the keys beside it, and see that the line above has a \":\" and a space behind its key; a text with \": \" in it wants quotes",
        ),
        (
            "while parsing a quoted scalar, found unknown escape character",
            ESCAPE,
        ),
        (
            "while parsing a quoted scalar, did not find expected hexadecimal number",
            ESCAPE,
        ),
        (
            "while scanning a plain scalar, found a tab",
            "a tab stands within this text, or in the indentation of its next line: use spaces, or put it in quotes",
        ),
        (
            "while scanning a block scalar, did not find expected comment or line break",
            "a text cannot begin with | or > in YAML: put it in quotes, or let its lines begin below",
        ),
        (
            "did not find expected <document start>",
            "the file goes on behind what is whole already: does a line above it begin with [, { or a quote, which YAML takes for all of the file?",
        ),
        (
            "expected string scalar",
            "a list or a map stands where a key is needed: put a text that begins with [ or { in quotes, and fill in a template's {{ }} first",
        ),
        (
            "unclosed bracket",
            "a [ or { is opened here and never closed: close it",
        ),
        (
            "illegal placement of ':'",
            "a \":\" stands where no key ends: close what is open above, or put a text with \":\" in quotes",
        ),
        (
            "while parsing a flow mapping",
            "the map in {} goes on without \",\" or \"}\": close it, or put a value with \": \", \"{\" or \"}\" in it in quotes",
        ),
        (
            "while parsing a flow sequence",
            "the list in [] goes on without \",\" or \"]\": close it, or put a value with \"[\" or \"]\" in it in quotes",
        ),
        (
            "budget breached: Depth",
            "lists and maps stand more than 32 deep in each other, which nothing in the file needs",
        ),
        ("budget breached", MULTIPLIED),
        ("alias replay limit exceeded", MULTIPLIED),
    ];
    if let Some((_, mend)) = mends.iter().find(|(start, _)| said.starts_with(start)) {
        return (*mend).to_owned();
    }
    let character = said.strip_prefix("unexpected character: `");
    match character.and_then(|rest| rest.strip_suffix('\'')) {
        Some(character) if character.starts_with("\\u{") => {
            format!("a control character stands here, {character}: take it out")
        }
        Some(character) => {
            format!("a text cannot begin with {character} in YAML: put it in quotes")
        }
        None => said.to_owned(),
    }
}

/// What is said of a value where another kind of value is needed. A text is not shown where it may hold a password: where a
/// list or a map is needed, it may be an address.
pub(super) fn unexpected(found: Unexpected<'_>, needed: &dyn Expected) -> String {
    let needed = needed.to_string();
    let is_of_several = matches!(&*needed, "a sequence" | "a map");
    let quoted = match (found, &*needed) {
        (Unexpected::Str(text), "a boolean") => text.parse::<bool>().is_ok(),
        (Unexpected::Str(text), "u8" | "u16" | "u32" | "a nonzero u32" | "u64" | "usize") => {
            text.parse::<u64>().is_ok()
        }
        (Unexpected::Str(text), "f64") => text.parse::<f64>().is_ok(),
        (_, _) => false,
    };
    let (found, is_unquoted) = match found {
        Unexpected::Bool(truth) => (format!("the boolean {truth}"), true),
        Unexpected::Unsigned(number) => (format!("the number {number}"), true),
        Unexpected::Signed(number) => (format!("the number {number}"), true),
        Unexpected::Float(number) => (format!("the number {number:?}"), true),
        Unexpected::Str(_) if is_of_several => ("a text".to_owned(), false),
        Unexpected::Str(text) => (format!("\"{text}\""), false),
        Unexpected::Unit | Unexpected::Option => ("nothing".to_owned(), false),
        Unexpected::Seq => ("a list".to_owned(), false),
        Unexpected::Map => ("a map".to_owned(), false),
        other => (other.to_string(), false),
    };
    match &*needed {
        // It may be a password, and is shown in another way than it was written.
        "a string" if found.starts_with("the number ") => {
            "a number stands where a text is needed: put it in quotes".to_owned()
        }
        "a string" if is_unquoted => {
            format!("{found} stands where a text is needed: put it in quotes if it is one")
        }
        "a string" if ["a list", "a map"].contains(&&*found) => format!(
            "{found} stands where a text is needed: write one value, or the name of what stands elsewhere in the file"
        ),
        _ => match quoted {
            true => misplaced(&found, &needed) + ", without quotes",
            false => misplaced(&found, &needed),
        },
    }
}

/// `found` in words, and `needed` as serde has it.
pub(super) fn misplaced(found: &str, needed: &str) -> String {
    let needed = match needed {
        "a sequence" => "a list is needed: put \"- \" before each entry, or all of them in []",
        "a map" => "a map is needed, of names with what they stand for",
        "a string" => "a text is needed",
        "a boolean" => "true or false is needed",
        "u8" => "a whole number up to 255 is needed",
        "u16" => "a whole number up to 65535 is needed",
        "u32" => "a whole number up to 4294967295 is needed",
        "a nonzero u32" => "a whole number from 1 to 4294967295 is needed",
        "u64" | "usize" => "a whole number is needed",
        "f64" => "a number is needed",
        other => return format!("{found} stands where {other} is needed"),
    };
    format!("{found} stands where {needed}")
}

const ESCAPE: &str = "a \"\\\" begins an escape between double quotes: write \"\\\\\" for one, or put the text in single quotes";

const MULTIPLIED: &str =
    "aliases (\"*\") make more of the file than its size allows: write out what they stand for";

/// What is said of a key without a value.
pub(super) const NOTHING: &str =
    "nothing stands behind the key: write a value, indent what belongs to it, or leave the key out";

pub(super) fn missing(field: &str) -> String {
    format!("\"{field}\" is missing: add it")
}

/// What a value is, in words; never what an expanded one was expanded to.
pub(super) fn told(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Unknown => "what is not known".to_owned(),
        Value::Bool(truth) => format!("the boolean {truth}"),
        Value::Unsigned(number) => format!("the number {number}"),
        Value::Signed(number) => format!("the number {number}"),
        Value::Float(number) => format!("the number {number:?}"),
        Value::Text(text) => format!("\"{text}\""),
        Value::Expanded(brought_in) => format!("\"{}\"", brought_in.written),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "a map".to_owned(),
    }
}

/// As [`told`], but for what a text says: where keys are needed it may be an address with a password, or a key.
pub(super) fn told_apart(value: &Value) -> String {
    if let Value::Text(_) = value {
        return "a text".to_owned();
    }
    told(value)
}

/// The mend where a name is needed.
pub(super) fn no_name(value: &Value, names: &[&str]) -> String {
    let unquoted = match value {
        Value::Unsigned(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Null
        | Value::Unknown
        | Value::Bool(_)
        | Value::Signed(_)
        | Value::Text(_)
        | Value::Expanded(_)
        | Value::List(_)
        | Value::Map(_) => None,
    };
    let name = unquoted.filter(|text| names.contains(&text.as_str()));
    let mend = match name {
        Some(name) => format!("write it in quotes, \"{name}\""),
        None => format!("known here: {}", names.join(", ")),
    };
    format!("{} stands where a name is needed; {mend}", told(value))
}

pub(super) fn unknown_key(key: &str, fields: &[&str]) -> String {
    format!("unknown key \"{key}\"; {}", did_you_mean(key, fields))
}

/// The key of one that has its value in it, as `token:abc` and `token=abc` have: YAML parts them at a colon with a space behind it.
pub fn without_value(key: &str) -> Option<&str> {
    let (name, _) = key.split_once([':', '='])?;
    Some(name.trim_end())
}

/// What is said of such a key. The value may be a password.
pub(super) fn no_colon(name: &str, fields: &[&str]) -> String {
    let mend = "write KEY: VALUE, with a space behind the colon";
    match fields.contains(&name) {
        true => format!("key \"{name}\" and its value are one text: {mend}"),
        false => format!("{}; {mend}", unknown_key(name, fields)),
    }
}

/// As [`unknown_key`], where a name is needed. Other programs' names are often longer: `warning`.
pub(super) fn unknown_name(name: &str, names: &[&str]) -> String {
    let beginning = names.iter().find(|known| name.starts_with(**known));
    match (nearest(name, names), beginning) {
        (None, Some(known)) => format!("unknown name \"{name}\"; did you mean \"{known}\"?"),
        (_, _) => format!("unknown name \"{name}\"; {}", did_you_mean(name, names)),
    }
}

/// YAML takes it for a letter, and editors show it as a space.
pub(super) const NO_BREAK_SPACE: char = '\u{a0}';

/// Bytes of words that are compared: the time that takes grows by the square.
const COMPARED: usize = 64;

/// The word of `known` that may have been meant: by who knows another proxy's words, or by a slip.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    elsewhere::meant(word, known).or_else(|| slip(word, known))
}

fn slip<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known
        .iter()
        .filter(|other| word.len().max(other.len()) <= COMPARED)
        .map(|other| (strsim::damerau_levenshtein(word, other), *other))
        .filter(|(distance, _)| *distance <= 1 + word.len() / 4);
    near.min().map(|(_, other)| other)
}

/// `did you mean "…"?` when one of `known` is near, else all of them.
pub fn did_you_mean(word: &str, known: &[&str]) -> String {
    meant(nearest(word, known), known)
}

/// Likewise of names that the file itself gives, where no other proxy's words are meant.
pub fn did_you_mean_own(word: &str, known: &[&str]) -> String {
    meant(slip(word, known), known)
}

fn meant(nearest: Option<&str>, known: &[&str]) -> String {
    match nearest {
        Some(other) => format!("did you mean \"{other}\"?"),
        None if known.is_empty() => "none is in the file: add it".to_owned(),
        None => format!("known here: {}", known.join(", ")),
    }
}
