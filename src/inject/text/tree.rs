//! A YAML text as nodes that know where they stand, and as the values that Kubernetes takes them for.

use std::collections::HashMap;
use std::ops::Range;

use granit_parser::{Event, Parser, ScalarStyle, Span, StructureStyle};
use serde_json::{Map, Number, Value};

/// Aliases included, each as often as it stands.
const MAX_NODES: usize = 1_000_000;
const MAX_DEPTH: usize = 200;

/// Why a text is no YAML.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {problem}")]
pub struct Malformed {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    pub problem: String,
}

#[derive(Debug, Clone)]
pub(in crate::inject) struct Node {
    /// In bytes, without an anchor or a tag; of a block scalar, without its header.
    pub(super) span: Range<usize>,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Scalar {
        value: Value,
        /// Literal or folded.
        block: bool,
    },
    Sequence {
        items: Vec<Node>,
        flow: bool,
    },
    Mapping {
        entries: Vec<Entry>,
        flow: bool,
    },
    /// What its anchor stands at.
    Alias(Box<Node>),
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_span: Range<usize>,
    pub(super) value: Node,
    /// `<<: *other`, which Kubernetes' YAML knows.
    pub(super) is_merge: bool,
}

/// The documents of a text.
pub(in crate::inject) fn parse(text: &str) -> Result<Vec<Node>, Malformed> {
    let mut builder = Builder {
        text,
        events: Parser::new_from_str(text),
        anchors: HashMap::new(),
        nodes: 0,
    };
    let mut documents = Vec::new();
    while let Some((event, span)) = builder.next()? {
        match event {
            Event::DocumentStart(..) => {
                builder.anchors.clear();
                let (event, span) = builder.needed(&span)?;
                documents.push(builder.node(event, &span, 0)?);
            }
            _ => continue,
        }
    }
    Ok(documents)
}

/// The comments of a text, in order, without their `#`; none of one that is no YAML.
pub(super) fn comments(text: &str) -> Vec<String> {
    let events = Parser::new_from_str(text).map_while(Result::ok);
    events
        .filter_map(|(event, _)| match event {
            Event::Comment(said, _) => Some(said.trim().to_owned()),
            _ => None,
        })
        .collect()
}

impl Node {
    pub(super) fn scalar(&self) -> Option<&Value> {
        match &self.kind {
            Kind::Scalar { value, .. } => Some(value),
            Kind::Sequence { .. } | Kind::Mapping { .. } | Kind::Alias(_) => None,
        }
    }

    /// The nodes of the list under a key.
    pub(in crate::inject) fn items(&self, key: &str) -> Vec<&Node> {
        let entries = match &self.kind {
            Kind::Mapping { entries, .. } => entries,
            Kind::Alias(node) => return node.items(key),
            Kind::Scalar { .. } | Kind::Sequence { .. } => return Vec::new(),
        };
        let entry = entries.iter().find(|entry| entry.key == key);
        match entry.map(|entry| &entry.value.kind) {
            Some(Kind::Sequence { items, .. }) => items.iter().collect(),
            Some(Kind::Alias(_) | Kind::Scalar { .. } | Kind::Mapping { .. }) | None => Vec::new(),
        }
    }

    pub(in crate::inject) fn value(&self) -> Value {
        match &self.kind {
            Kind::Scalar { value, .. } => value.clone(),
            Kind::Sequence { items, .. } => items.iter().map(Node::value).collect(),
            Kind::Alias(node) => node.value(),
            Kind::Mapping { entries, .. } => {
                let mut map = Map::new();
                for merged in entries.iter().filter(|entry| entry.is_merge) {
                    // Of several the first goes before the others.
                    let sources = match merged.value.value() {
                        Value::Array(sources) => sources,
                        source => vec![source],
                    };
                    for source in sources {
                        for (key, value) in source.as_object().into_iter().flatten() {
                            map.entry(key).or_insert_with(|| value.clone());
                        }
                    }
                }
                for entry in entries.iter().filter(|entry| !entry.is_merge) {
                    map.insert(entry.key.clone(), entry.value.value());
                }
                Value::Object(map)
            }
        }
    }

    /// Its end in the text, comments behind it left out.
    pub(super) fn end(&self, text: &str) -> usize {
        let last = match &self.kind {
            Kind::Scalar { block: true, .. } => {
                return self.span.start + text[self.span.clone()].trim_end().len();
            }
            Kind::Sequence { items, flow: false } => items.last(),
            Kind::Mapping {
                entries,
                flow: false,
            } => entries.last().map(|entry| &entry.value),
            Kind::Scalar { .. } | Kind::Sequence { .. } | Kind::Mapping { .. } | Kind::Alias(_) => {
                None
            }
        };
        last.map_or(self.span.end, |last| last.end(text))
    }
}

struct Builder<'a> {
    text: &'a str,
    events: Parser<'a, granit_parser::StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl<'a> Builder<'a> {
    fn next(&mut self) -> Result<Option<(Event<'a>, Span)>, Malformed> {
        loop {
            match self.events.next_event() {
                None => return Ok(None),
                Some(Ok((Event::Comment(..), _))) => (),
                Some(Ok(next)) => return Ok(Some(next)),
                Some(Err(error)) => {
                    let place = error.marker();
                    return Err(Malformed {
                        line: place.line(),
                        column: place.col() + 1,
                        problem: error.info(),
                    });
                }
            }
        }
    }

    fn needed(&mut self, before: &Span) -> Result<(Event<'a>, Span), Malformed> {
        match self.next()? {
            Some(next) => Ok(next),
            None => Err(malformed(before, "the text ends here")),
        }
    }

    fn node(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Result<Node, Malformed> {
        self.nodes += 1;
        if depth > MAX_DEPTH {
            return Err(malformed(span, "nested too deep"));
        }
        if self.nodes > MAX_NODES {
            return Err(malformed(span, "too many values"));
        }
        let begin = bytes(span);
        let anchor = event.anchor_id();
        let (range, kind) = match event {
            Event::Scalar(value, style, _, tag) => {
                let is_text = tag.is_some_and(|tag| tag.is_yaml_core_schema_tag("str"));
                let value = match style {
                    ScalarStyle::Plain if !is_text => plain(&value),
                    ScalarStyle::Plain
                    | ScalarStyle::SingleQuoted
                    | ScalarStyle::DoubleQuoted
                    | ScalarStyle::Literal
                    | ScalarStyle::Folded => Value::String(value.into_owned()),
                };
                let block = matches!(style, ScalarStyle::Literal | ScalarStyle::Folded);
                (begin, Kind::Scalar { value, block })
            }
            Event::Alias(id) => {
                let node = self.anchors.get(&id).cloned();
                let node = node.ok_or_else(|| malformed(span, "an alias within its own anchor"))?;
                self.nodes += count(&node);
                (begin, Kind::Alias(Box::new(node)))
            }
            Event::SequenceStart(style, ..) => {
                let mut items = Vec::new();
                let end = loop {
                    match self.needed(span)? {
                        (Event::SequenceEnd, end) => break bytes(&end).end,
                        (event, span) => items.push(self.node(event, &span, depth + 1)?),
                    }
                };
                let flow = style == StructureStyle::Flow;
                (begin.start..end, Kind::Sequence { items, flow })
            }
            Event::MappingStart(style, ..) => {
                let mut entries = Vec::new();
                let end = loop {
                    match self.needed(span)? {
                        (Event::MappingEnd, end) => break bytes(&end).end,
                        (event, span) => entries.push(self.entry(event, &span, depth + 1)?),
                    }
                };
                let flow = style == StructureStyle::Flow;
                (begin.start..end, Kind::Mapping { entries, flow })
            }
            _ => return Err(malformed(span, "no value stands here")),
        };
        let node = Node { span: range, kind };
        if let Some(anchor) = anchor {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn entry(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Result<Entry, Malformed> {
        let key_span = bytes(span);
        let is_plain = matches!(event, Event::Scalar(_, ScalarStyle::Plain, ..));
        let key = match self.node(event, span, depth)?.value() {
            Value::String(key) => key,
            Value::Null | Value::Bool(_) | Value::Number(_) => {
                self.text[key_span.clone()].to_owned()
            }
            Value::Array(_) | Value::Object(_) => {
                return Err(malformed(span, "a key must be a text"));
            }
        };
        let (event, span) = self.needed(span)?;
        let mut value = self.node(event, &span, depth)?;
        if value.span.is_empty() && value.scalar() == Some(&Value::Null) {
            let colon = self.text[key_span.end..].find(':').unwrap_or_default();
            let after = key_span.end + colon + 1;
            value.span = after..after;
        }
        let merges = matches!(
            value.kind,
            Kind::Alias(_) | Kind::Mapping { .. } | Kind::Sequence { .. }
        );
        Ok(Entry {
            is_merge: is_plain && key == "<<" && merges,
            key,
            key_span,
            value,
        })
    }
}

fn count(node: &Node) -> usize {
    1 + match &node.kind {
        Kind::Scalar { .. } => 0,
        Kind::Sequence { items, .. } => items.iter().map(count).sum(),
        Kind::Mapping { entries, .. } => entries.iter().map(|entry| 1 + count(&entry.value)).sum(),
        Kind::Alias(node) => count(node),
    }
}

fn bytes(span: &Span) -> Range<usize> {
    span.byte_range().expect("a text has byte offsets")
}

fn malformed(span: &Span, problem: &str) -> Malformed {
    Malformed {
        line: span.start.line(),
        column: span.start.col() + 1,
        problem: problem.to_owned(),
    }
}

/// A scalar without quotes, as Kubernetes' YAML reads it: that of 1.1.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => {
            return Value::Bool(true);
        }
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => (),
    }
    number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

fn number(text: &str) -> Option<Number> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let whole = match digits {
        _ if digits.starts_with(|c: char| !c.is_ascii_digit() && c != '.') => return None,
        _ if digits.starts_with("0x") => i64::from_str_radix(&digits[2..], 16).ok(),
        _ if digits.starts_with("0o") => i64::from_str_radix(&digits[2..], 8).ok(),
        _ if digits.len() > 1 && digits.starts_with('0') && !digits.contains(['.', 'e']) => {
            i64::from_str_radix(digits, 8).ok()
        }
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(if negative { -whole } else { whole }.into());
    }
    let decimal = text.strip_prefix('+').unwrap_or(text);
    if let Ok(whole) = decimal.parse::<i64>() {
        return Some(whole.into());
    }
    if let Ok(whole) = decimal.parse::<u64>() {
        return Some(whole.into());
    }
    let fits = |c: char| c.is_ascii_digit() || ".eE+-".contains(c);
    if !digits.chars().all(fits) {
        return None;
    }
    Number::from_f64(text.parse().ok()?)
}

/// Whether a text without quotes is read as a text, by whatever version of YAML.
pub(super) fn plain_text(text: &str) -> bool {
    let unsigned = text.trim_start_matches(['+', '-']);
    plain(text).is_string()
        && !matches!(text, "y" | "Y" | "n" | "N")
        && !matches!(&*unsigned.to_ascii_lowercase(), ".inf" | ".nan")
        && !unsigned
            .starts_with(|c: char| (c.is_ascii_digit() || c == '.') && number_like(unsigned))
}

/// Numbers, times and versions that some reader may take for a number.
fn number_like(text: &str) -> bool {
    text.chars()
        .all(|c| c.is_ascii_hexdigit() || "xo_.:+-eETZ".contains(c))
}
