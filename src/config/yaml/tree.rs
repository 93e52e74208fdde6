//! A file's text as a tree of nodes with places, and what `${…}` in it stands for. Must not know what a value is for.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::iter;
use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Budget, Spanned};

use super::{BroughtIn, Lookup, Mistake, Path, Position};

/// YAML 1.2, in which `no` and `on` are texts: a country or a state, and no boolean.
pub(super) fn tree(text: &str) -> Result<Node, serde_saphyr::Error> {
    // Without aliases no text has more of these than bytes; with them it may be made no larger either, but for small ones.
    let bound = |usual: usize| usual.max(text.len());
    let usual = Budget::default();
    let options = serde_saphyr::options! {
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            max_nodes: bound(usual.max_nodes),
            max_events: bound(usual.max_events / 2) * 2,
            max_aliases: bound(usual.max_aliases),
            max_merge_keys: bound(usual.max_merge_keys),
            max_depth: 32,
            // It refuses a hundred aliases of one anchor, however little they make.
            enforce_alias_anchor_ratio: false,
        },
    };
    serde_saphyr::from_str_with_options(text, options)
}

/// The files that values of the text name (`${file:…}`), however YAML spells that; none of a text that is no YAML.
pub fn named_files(text: &str) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    for node in tree(text).into_iter().flat_map(scalars) {
        if let Value::Text(text) = node.value {
            let text = text.replace("$${", "");
            let named = text.split("${file:").skip(1);
            let named = named.filter_map(|rest| Some(rest.split_once('}')?.0));
            files.extend(named.map(PathBuf::from));
        }
    }
    files
}

/// What a tree holds besides lists and maps, in no order.
fn scalars(root: Node) -> impl Iterator<Item = Node> {
    let mut nodes = vec![root];
    iter::from_fn(move || {
        loop {
            let mut node = nodes.pop()?;
            match &mut node.value {
                Value::List(items) => nodes.append(items),
                Value::Map(entries) => nodes.extend(entries.drain(..).map(|(_, item)| item)),
                Value::Text(_)
                | Value::Expanded(_)
                | Value::Unknown
                | Value::Null
                | Value::Bool(_)
                | Value::Unsigned(_)
                | Value::Signed(_)
                | Value::Float(_) => return Some(node),
            }
        }
    })
}

#[derive(Debug)]
pub(super) struct Node {
    pub line: u64,
    pub column: u64,
    pub value: Value,
}

impl Node {
    pub(super) fn place(&self, path: &Path<'_>) -> Position {
        Position {
            path: path.to_string(),
            line: self.line,
            column: self.column,
        }
    }
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
    /// A text with what `${…}` stood for; its mistakes are told without it, since it may be a secret.
    Expanded(BroughtIn),
    /// A text of which a `${…}` stands for nothing, as a mistake says already.
    Unknown,
    List(Vec<Node>),
    Map(Vec<(Spanned<String>, Node)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Node {
            line: spanned.referenced.line(),
            column: spanned.referenced.column(),
            value: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(u64::try_from(value).map_or(Value::Signed(value), Value::Unsigned))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}

/// Puts in what variables and files say; one that says nothing is a mistake, and its value [`Value::Unknown`].
pub(super) fn expand(
    node: &mut Node,
    path: &Path<'_>,
    lookup: Lookup<'_>,
    mistakes: &RefCell<Vec<Mistake>>,
) {
    match &mut node.value {
        Value::Text(text) if text.contains("${") => match expanded(text, lookup) {
            Ok(brought_in) => node.value = Value::Expanded(brought_in),
            Err(message) => {
                node.value = Value::Unknown;
                let place = node.place(path);
                mistakes.borrow_mut().push(Mistake { place, message });
            }
        },
        Value::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                expand(item, &Path::Index(path, index), lookup, mistakes);
            }
        }
        Value::Map(entries) => {
            for (key, item) in entries {
                expand(item, &Path::Key(path, &key.value), lookup, mistakes);
            }
        }
        Value::Text(_)
        | Value::Expanded(_)
        | Value::Unknown
        | Value::Null
        | Value::Bool(_)
        | Value::Unsigned(_)
        | Value::Signed(_)
        | Value::Float(_) => {}
    }
}

/// Where values stand that [`expand`] made of variables and files, by line and column.
pub(super) fn places(node: Node) -> BTreeMap<(u64, u64), BroughtIn> {
    let mut places = BTreeMap::new();
    for node in scalars(node) {
        // `$${` alone brings nothing in.
        if let Value::Expanded(brought_in) = node.value
            && brought_in.written.replace("$${", "").contains("${")
        {
            places.insert((node.line, node.column), brought_in);
        }
    }
    places
}

fn expanded(text: &str, lookup: Lookup<'_>) -> Result<BroughtIn, String> {
    let mut out = String::new();
    let mut texts = Vec::new();
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once("${") {
        // As Docker Compose has it.
        if let Some(before) = before.strip_suffix('$') {
            out.push_str(before);
            out.push_str("${");
            rest = behind;
            continue;
        }
        let Some((name, after)) = behind.split_once('}') else {
            return Err(
                "\"${\" has no \"}\": close it, or write $${ for the two characters".to_owned(),
            );
        };
        // It would stand for itself: a password that is `${B}`, or one with a `}` too many.
        if name.contains("${") {
            return Err(
                "a \"${\" within another is not expanded: write out what it stands for".to_owned(),
            );
        }
        out.push_str(before);
        if let Some(path) = name.strip_prefix("file:") {
            let read = std::fs::read_to_string(path)
                .map_err(|error| format!("cannot read {path}: {error}"))?;
            let read = read
                .strip_suffix('\n')
                .map_or(&*read, |line| line.strip_suffix('\r').unwrap_or(line));
            out.push_str(read);
            texts.push(read.to_owned());
        } else {
            let (name, default) = match name.split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (name, None),
            };
            if let Some(end) = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
                return Err(match name[..end].is_empty() {
                    true => format!(
                        "\"${{{name}}}\" names no variable: write ${{NAME}}, or ${{NAME:-default}}"
                    ),
                    false => format!(
                        "\"${{{name}}}\" is not known: write ${{{0}}}, or with a default ${{{0}:-default}}",
                        &name[..end]
                    ),
                });
            }
            match (lookup(name).filter(|value| !value.is_empty()), default) {
                (Some(value), _) => {
                    out.push_str(&value);
                    texts.push(value);
                }
                (None, Some(default)) => out.push_str(default),
                (None, None) => {
                    return Err(format!(
                        "{name} is not set, or empty: set it, or give a default as ${{{name}:-default}}"
                    ));
                }
            }
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(BroughtIn {
        written: text.to_owned(),
        value: out,
        texts,
    })
}
