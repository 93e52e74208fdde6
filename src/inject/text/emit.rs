//! Values as YAML and JSON: keys in the order of what was there before, then in the one that people write Kubernetes' objects in.

use serde_json::{Map, Value};

use super::tree::{Kind, Node};

/// Keys that lead, in this order; all others follow by name.
const LEADING: [&str; 38] = [
    "apiVersion",
    "kind",
    "name",
    "generateName",
    "namespace",
    "metadata",
    "labels",
    "annotations",
    "spec",
    "image",
    "imagePullPolicy",
    "restartPolicy",
    "command",
    "args",
    "env",
    "value",
    "ports",
    "containerPort",
    "protocol",
    "lifecycle",
    "startupProbe",
    "readinessProbe",
    "livenessProbe",
    "exec",
    "httpGet",
    "path",
    "port",
    "periodSeconds",
    "failureThreshold",
    "timeoutSeconds",
    "resources",
    "requests",
    "limits",
    "cpu",
    "securityContext",
    "volumeMounts",
    "mountPath",
    "readOnly",
];

/// Lists of scalars up to here stand in one line.
const SHORT: usize = 100;

fn ordered<'a>(map: &'a Map<String, Value>, like: Option<&Node>) -> Vec<(&'a String, &'a Value)> {
    let before = like.and_then(entries);
    let mut all: Vec<_> = map.iter().collect();
    all.sort_by_key(|(key, _)| {
        let known = before.and_then(|before| before.iter().position(|entry| entry.key == **key));
        let leading = LEADING.iter().position(|leading| leading == key);
        (
            known.unwrap_or(usize::MAX),
            leading.unwrap_or(usize::MAX),
            *key,
        )
    });
    all
}

fn entries(node: &Node) -> Option<&[super::tree::Entry]> {
    match &node.kind {
        Kind::Mapping { entries, .. } => Some(entries),
        Kind::Alias(node) => entries(node),
        Kind::Scalar { .. } | Kind::Sequence { .. } => None,
    }
}

fn under<'a>(node: Option<&'a Node>, key: &str) -> Option<&'a Node> {
    let entry = entries(node?)?.iter().find(|entry| entry.key == key)?;
    Some(&entry.value)
}

fn item<'a>(node: Option<&'a Node>, value: &Value, at: usize) -> Option<&'a Node> {
    let items = match &node?.kind {
        Kind::Sequence { items, .. } => items,
        Kind::Alias(node) => return item(Some(node), value, at),
        Kind::Scalar { .. } | Kind::Mapping { .. } => return None,
    };
    let name = value.get("name");
    let named = items
        .iter()
        .find(|item| name.is_some() && item.value().get("name") == name);
    named.or_else(|| items.get(at))
}

/// All documents, one behind the other.
pub(super) fn documents(nodes: &[Node], values: &[Value]) -> String {
    let mut text = String::new();
    for (node, value) in nodes.iter().zip(values) {
        text += "---\n";
        text += &document(node, value);
    }
    text
}

pub(super) fn document(like: &Node, value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => block(&mut text, value, 0, Some(like)),
        _ => text += &flow(value, false),
    }
    text.truncate(text.trim_end_matches('\n').len());
    text + "\n"
}

/// As JSON, its keys in the order of `like`.
pub(in crate::inject) fn json(like: &Node, value: &Value) -> String {
    let mut text = String::new();
    pretty(&mut text, value, 0, Some(like));
    text + "\n"
}

fn pretty(text: &mut String, value: &Value, indent: usize, like: Option<&Node>) {
    let spaces = " ".repeat(indent + 4);
    match value {
        Value::Object(map) if !map.is_empty() => {
            let mut between = "{\n";
            for (key, value) in ordered(map, like) {
                *text += between;
                *text += &format!("{spaces}{}: ", escaped(key));
                pretty(text, value, indent + 4, under(like, key));
                between = ",\n";
            }
            *text += &format!("\n{}}}", " ".repeat(indent));
        }
        Value::Array(items) if !items.is_empty() => {
            let mut between = "[\n";
            for (at, value) in items.iter().enumerate() {
                *text += between;
                *text += &spaces;
                pretty(text, value, indent + 4, item(like, value, at));
                between = ",\n";
            }
            *text += &format!("\n{}]", " ".repeat(indent));
        }
        Value::String(string) => *text += &escaped(string),
        scalar => *text += &scalar.to_string(),
    }
}

/// In one line; as JSON, or as YAML without quotes where they can be spared.
pub(super) fn flow(value: &Value, json: bool) -> String {
    match value {
        Value::Object(map) => {
            let entries = ordered(map, None);
            let entries: Vec<_> = entries
                .iter()
                .map(|(key, value)| format!("{}: {}", flow_text(key, json), flow(value, json)))
                .collect();
            format!("{{{}}}", entries.join(", "))
        }
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| flow(item, json)).collect();
            format!("[{}]", items.join(", "))
        }
        Value::String(string) => flow_text(string, json),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

pub(super) fn flow_text(string: &str, json: bool) -> String {
    if json {
        return escaped(string);
    }
    if string.contains([',', '[', ']', '{', '}']) {
        return quoted(string);
    }
    text_in_line(string)
}

/// The lines of a mapping or a list, each at `indent`.
pub(super) fn block(text: &mut String, value: &Value, indent: usize, like: Option<&Node>) {
    match value {
        Value::Object(map) => {
            for (key, value) in ordered(map, like) {
                entry(text, key, value, indent, under(like, key));
            }
        }
        Value::Array(items) => {
            for (at, value) in items.iter().enumerate() {
                list_item(text, value, indent, item(like, value, at));
            }
        }
        Value::String(_) | Value::Null | Value::Bool(_) | Value::Number(_) => {
            *text += &format!("{}{}\n", " ".repeat(indent), flow(value, false));
        }
    }
}

/// `key: value` in lines of their own.
pub(super) fn entry(
    text: &mut String,
    key: &str,
    value: &Value,
    indent: usize,
    like: Option<&Node>,
) {
    *text += &" ".repeat(indent);
    *text += &text_in_line(key);
    *text += ":";
    after_key(text, value, indent, like);
}

/// What follows a key that stands at `indent`, and the line's end.
pub(super) fn after_key(text: &mut String, value: &Value, indent: usize, like: Option<&Node>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            text.push('\n');
            block(text, value, indent + 2, like);
        }
        Value::Array(items) if !items.is_empty() => {
            let line = flow(value, false);
            let scalars = items
                .iter()
                .all(|item| !item.is_object() && !item.is_array());
            if scalars && line.len() <= SHORT {
                *text += &format!(" {line}\n");
            } else {
                text.push('\n');
                block(text, value, indent + 2, like);
            }
        }
        Value::String(string) if is_literal(string) => literal(text, string, indent + 2),
        Value::String(string) => *text += &format!(" {}\n", text_in_line(string)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) | Value::Array(_) => {
            *text += &format!(" {}\n", flow(value, false));
        }
    }
}

/// `- value`, its dash at `indent`.
pub(super) fn list_item(text: &mut String, value: &Value, indent: usize, like: Option<&Node>) {
    let dash = format!("{}- ", " ".repeat(indent));
    match value {
        Value::Object(map) if !map.is_empty() => {
            let mut lines = String::new();
            block(&mut lines, value, indent + 2, like);
            *text += &dash;
            *text += &lines[indent + 2..];
        }
        Value::String(string) if is_literal(string) => {
            *text += dash.trim_end();
            literal(text, string, indent + 2);
        }
        Value::String(string) => *text += &format!("{dash}{}\n", text_in_line(string)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) | Value::Array(_) => {
            *text += &format!("{dash}{}\n", flow(value, false));
        }
    }
}

/// Whether a text is written as lines of its own.
fn is_literal(string: &str) -> bool {
    let printable = |c: char| c == '\n' || !c.is_control();
    string.trim_end().contains('\n')
        && string.chars().all(|c| printable(c) && c != '\u{feff}')
        && !string.starts_with([' ', '\n'])
        && !string.ends_with("\n\n")
        && !string.ends_with(' ')
}

fn literal(text: &mut String, string: &str, indent: usize) {
    *text += if string.ends_with('\n') {
        " |\n"
    } else {
        " |-\n"
    };
    for line in string.lines() {
        if !line.is_empty() {
            *text += &" ".repeat(indent);
            *text += line;
        }
        text.push('\n');
    }
}

fn text_in_line(string: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=()[],{}\\\"' ".contains(c);
    let first = string
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphanumeric() || "/._".contains(c));
    let option = string.starts_with('-') && !string.starts_with("- ") && !string.starts_with("---");
    let plain = (first || option)
        && string.chars().all(safe)
        && !string.contains(": ")
        && !string.ends_with([':', ' '])
        && string.chars().any(|c| c.is_ascii_alphabetic() || c == '/')
        && super::tree::plain_text(string);
    if plain {
        string.to_owned()
    } else {
        quoted(string)
    }
}

fn quoted(string: &str) -> String {
    let simple = |c: char| !c.is_control() && c.is_ascii();
    if string.contains('"') && !string.contains('\'') && string.chars().all(simple) {
        return format!("'{string}'");
    }
    escaped(string)
}

/// As JSON has it, which is YAML too once what that does not print is escaped.
fn escaped(string: &str) -> String {
    let hidden = |c: char| {
        matches!(
            c,
            '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}'
        )
    };
    let mut text = String::new();
    for c in Value::from(string).to_string().chars() {
        match hidden(c) {
            true => text += &format!("\\u{:04x}", u32::from(c)),
            false => text.push(c),
        }
    }
    text
}
