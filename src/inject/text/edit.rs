//! From a node and its new value to edits of its text.

use std::collections::BTreeSet;
use std::ops::Range;

use serde_json::{Map, Value};

use super::emit;
use super::tree::{Entry, Kind, Node};

/// A part of the text and what stands there instead.
#[derive(Debug)]
pub(super) struct Edit {
    range: Range<usize>,
    text: String,
}

/// The text with all edits made; `None` where two of them meet.
pub(super) fn apply(text: &str, mut edits: Vec<Edit>) -> Option<String> {
    // Of those at one place the first that was noted is the innermost; what goes is behind what comes.
    edits.sort_by_key(|edit| (edit.range.start, edit.range.end));
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let mut made = String::with_capacity(text.len() + 4096);
    let mut done = 0;
    for edit in edits {
        made += text.get(done..edit.range.start)?;
        if newline == "\n" {
            made += &edit.text;
        } else {
            made += &edit.text.replace('\n', newline);
        }
        done = edit.range.end;
    }
    made += text.get(done..)?;
    Some(made)
}

/// A document written anew.
pub(super) fn whole(text: &str, node: &Node, new: &Value) -> Edit {
    let (start, anew) = (line_start(text, node.span.start), emit::document(node, new));
    let end = line_end(text, node.end(text));
    // `--- {a: b}` keeps its separator.
    match text[start..node.span.start].starts_with("---") {
        true => Edit {
            range: node.span.start..end,
            text: format!("\n{anew}"),
        },
        false => Edit {
            range: start..end,
            text: anew,
        },
    }
}

/// What makes `new` of a document.
pub(super) fn edits(text: &str, node: &Node, new: &Value) -> Vec<Edit> {
    let mut editor = Editor {
        text,
        json: text[node.span.clone()].starts_with(['{', '[']),
        edits: Vec::new(),
    };
    editor.node(node, node.span.start, 0, new);
    editor.edits
}

struct Editor<'a> {
    text: &'a str,
    /// The document is JSON, so that what is new in it has to be, too.
    json: bool,
    edits: Vec<Edit>,
}

impl Editor<'_> {
    fn push(&mut self, range: Range<usize>, text: String) {
        self.edits.push(Edit { range, text });
    }

    /// `from`: behind the key or dash of the node; `indent`: where that stands.
    fn node(&mut self, node: &Node, from: usize, indent: usize, new: &Value) {
        if node.value() == *new {
            return;
        }
        match (&node.kind, new) {
            (Kind::Mapping { entries, flow }, Value::Object(map))
                if !entries.is_empty() && !map.is_empty() =>
            {
                self.mapping(node, entries, *flow, map);
            }
            (Kind::Sequence { items, flow }, Value::Array(values))
                if !items.is_empty() && !values.is_empty() =>
            {
                self.sequence(node, (items, *flow), from, values);
            }
            _ => self.replace(node, from, indent, new),
        }
    }

    fn replace(&mut self, node: &Node, from: usize, indent: usize, new: &Value) {
        let in_flow = self.json || self.text[..from].trim_end().ends_with([',', '{', '[']);
        let is_collection = |value: &Value| value.is_object() || value.is_array();
        if in_flow || !is_collection(new) && !matches!(node.kind, Kind::Scalar { block: true, .. })
        {
            let space = if node.span.is_empty() { " " } else { "" };
            let text = match new {
                Value::String(text) if !self.json => emit::flow_text(text, false),
                new => emit::flow(new, self.json),
            };
            return self.push(
                node.span.start..node.end(self.text),
                format!("{space}{text}"),
            );
        }
        // An anchor or a header that stood there goes, too; a comment behind it stays.
        let end = node.end(self.text);
        let mut text = String::new();
        emit::after_key(&mut text, new, indent, Some(node));
        match text.split_once('\n') {
            Some(("", lines)) => {
                self.push(from..end, String::new());
                self.insert_below(end, lines.to_owned());
            }
            Some(_) | None => {
                text.truncate(text.trim_end_matches('\n').len());
                self.push(from..end, text);
            }
        }
    }

    fn mapping(&mut self, node: &Node, entries: &[Entry], flow: bool, new: &Map<String, Value>) {
        let indent = column(self.text, node.span.start);
        let stays = |entry: &Entry| entry.is_merge || new.contains_key(&entry.key);
        if flow && !entries.iter().all(stays) {
            let parts = entries.iter().map(|entry| {
                let part = entry.key_span.start..entry.value.end(self.text);
                (part, stays(entry))
            });
            let parts: Vec<_> = parts.collect();
            if !self.delete_in_line(&parts) {
                return self.push(node.span.clone(), self.flow(new));
            }
        }
        for entry in entries.iter().filter(|entry| !entry.is_merge) {
            let after = self.text[entry.key_span.end..]
                .find(':')
                .unwrap_or_default();
            let from = entry.key_span.end + after + 1;
            match new.get(&entry.key) {
                Some(value) => self.node(&entry.value, from, indent, value),
                None if flow => (),
                None => self.delete(entry.key_span.start, &entry.value),
            }
        }
        let had = |key: &String| entries.iter().any(|entry| entry.key == *key);
        let merged = node.value();
        let added: Map<_, _> = new
            .iter()
            .filter(|(key, value)| !had(key) && merged.get(key) != Some(value))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        // In a line, what stays is what commas are put behind.
        let last = entries.iter().rfind(|entry| !flow || stays(entry));
        let Some(last) = last.filter(|_| !added.is_empty()) else {
            return;
        };
        let end = last.value.end(self.text);
        let text = match flow {
            true => {
                let braced = self.flow(&added);
                format!(", {}", &braced[1..braced.len() - 1])
            }
            false => {
                let mut text = String::new();
                emit::block(&mut text, &Value::Object(added), indent, None);
                text
            }
        };
        match flow {
            true => self.push(end..end, text),
            false => self.insert_below(end, text),
        }
    }

    fn flow(&self, map: &Map<String, Value>) -> String {
        emit::flow(&Value::Object(map.clone()), self.json)
    }

    fn sequence(
        &mut self,
        node: &Node,
        (items, flow): (&[Node], bool),
        from: usize,
        new: &[Value],
    ) {
        let stays = paired(items, new);
        let staying: BTreeSet<_> = stays.iter().map(|(old, _)| *old).collect();
        let gone = |at: &usize| !staying.contains(at);
        if flow && (0..items.len()).any(|at| gone(&at)) {
            let parts = items.iter().enumerate();
            let parts: Vec<_> = parts
                .map(|(at, item)| (item.span.start..item.end(self.text), !gone(&at)))
                .collect();
            if !self.delete_in_line(&parts) {
                let text = emit::flow(&Value::Array(new.to_vec()), self.json);
                return self.push(node.span.clone(), text);
            }
        }
        let dashes = match flow {
            true => Vec::new(),
            false => self.dashes(items, from),
        };
        for (old, now) in &stays {
            let (from, indent) = match dashes.get(*old) {
                Some(dash) => (dash + 1, column(self.text, *dash)),
                None => (items[*old].span.start, 0),
            };
            self.node(&items[*old], from, indent, &new[*now]);
        }
        for at in (0..items.len()).filter(|at| !flow && gone(at)) {
            self.delete(dashes[at], &items[at]);
        }
        // What comes in between those that stay.
        let mut behind = None;
        let mut begin = 0;
        let ends = stays.iter().map(|(old, now)| (Some(*old), *now));
        for (old, end) in ends.chain([(None, new.len())]) {
            if begin < end {
                let come = &new[begin..end];
                match flow {
                    true => self.flow_items(items, behind, come),
                    false => self.block_items(items, &dashes, (from, behind), come),
                }
            }
            begin = end + 1;
            behind = old;
        }
    }

    fn flow_items(&mut self, items: &[Node], behind: Option<usize>, come: &[Value]) {
        let come: Vec<_> = come.iter().map(|new| emit::flow(new, self.json)).collect();
        let come = come.join(", ");
        let (at, text) = match behind {
            Some(behind) => (items[behind].end(self.text), format!(", {come}")),
            None => (items[0].span.start, come + ", "),
        };
        self.push(at..at, text);
    }

    fn block_items(
        &mut self,
        items: &[Node],
        dashes: &[usize],
        (from, behind): (usize, Option<usize>),
        come: &[Value],
    ) {
        let indent = column(self.text, dashes[0]);
        let mut text = String::new();
        for new in come {
            emit::list_item(&mut text, new, indent, None);
        }
        match behind {
            Some(behind) => self.insert_below(items[behind].end(self.text), text),
            None => {
                let at = self.above_comments(line_start(self.text, dashes[0]), from);
                self.push(at..at, text);
            }
        }
    }

    /// Where the dash of each item stands.
    fn dashes(&self, items: &[Node], from: usize) -> Vec<usize> {
        let mut from = from;
        let mut found = Vec::new();
        for item in items {
            let between = &self.text[from..item.span.start.max(from)];
            let mut line = from;
            let mut dash = from;
            for piece in between.split_inclusive('\n') {
                let begin = piece.len() - piece.trim_start_matches(' ').len();
                if piece[begin..].starts_with('-') {
                    dash = line + begin;
                    break;
                }
                line += piece.len();
            }
            found.push(dash);
            from = item.end(self.text).max(dash + 1);
        }
        found
    }

    /// Lines of their own, under the one that `end` is in.
    fn insert_below(&mut self, end: usize, text: String) {
        let at = line_end(self.text, end);
        match self.text[..at].ends_with('\n') {
            true => self.push(at..at, text),
            false => self.push(at..at, format!("\n{}", text.trim_end_matches('\n'))),
        }
    }

    /// The lines of an entry or an item.
    fn delete(&mut self, start: usize, value: &Node) {
        let start = line_start(self.text, start);
        self.push(
            start..line_end(self.text, value.end(self.text)),
            String::new(),
        );
    }

    /// Cuts out of `{…}` or `[…]` what does not stay, each with a comma; false where nothing stays.
    fn delete_in_line(&mut self, parts: &[(Range<usize>, bool)]) -> bool {
        let Some(last) = parts.iter().rposition(|(_, stays)| *stays) else {
            return false;
        };
        for (at, (part, stays)) in parts.iter().enumerate().take(last) {
            if !stays {
                self.push(part.start..parts[at + 1].0.start, String::new());
            }
        }
        if let [.., (end, false)] = parts {
            self.push(parts[last].0.end..end.end, String::new());
        }
        true
    }

    /// The start of the comments that stand right above a line, but not before `from`.
    fn above_comments(&self, line: usize, from: usize) -> usize {
        let mut line = line;
        while line > from {
            let above = line_start(self.text, line - 1);
            if above < from || !self.text[above..line].trim_start().starts_with('#') {
                break;
            }
            line = above;
        }
        line
    }
}

/// Which item goes on as which, by their indexes, in order: those that are the same, and between them those that stand in each other's place.
fn paired(items: &[Node], new: &[Value]) -> Vec<(usize, usize)> {
    let old: Vec<_> = items.iter().map(Node::value).collect();
    let mut same_ones = Vec::new();
    let mut begin = 0;
    for (at, old) in old.iter().enumerate() {
        if let Some(further) = new[begin..].iter().position(|new| same(old, new)) {
            same_ones.push((at, begin + further));
            begin += further + 1;
        }
    }
    let mut pairs = Vec::new();
    let mut begin = (0, 0);
    for end in same_ones.into_iter().chain([(old.len(), new.len())]) {
        let between = (begin.0..end.0).zip(begin.1..end.1);
        pairs.extend(between.filter(|(at, now)| old[*at].get("name") == new[*now].get("name")));
        pairs.push(end);
        begin = (end.0 + 1, end.1 + 1);
    }
    pairs.pop();
    pairs
}

/// Whether an item of a list went on as another: most lists of Kubernetes are merged by name, and objects have theirs in `metadata`.
fn same(old: &Value, new: &Value) -> bool {
    let named = |key: &str| old.get(key).is_some_and(|name| new.get(key) == Some(name));
    let is_object = old["metadata"]["name"].is_string();
    named("name") || is_object && object(old) == object(new) || old == new
}

/// What Kubernetes knows an object by.
fn object(value: &Value) -> [&Value; 3] {
    let metadata = &value["metadata"];
    [&value["kind"], &metadata["namespace"], &metadata["name"]]
}

fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |newline| newline + 1)
}

/// Behind the line that `at` is in.
fn line_end(text: &str, at: usize) -> usize {
    text[at..]
        .find('\n')
        .map_or(text.len(), |newline| at + newline + 1)
}

/// In characters.
fn column(text: &str, at: usize) -> usize {
    text[line_start(text, at)..at].chars().count()
}
