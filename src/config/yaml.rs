//! YAML to our types with every mistake told at once: path, line, column and mend. Owns places and suggestions; must not
//! know any key of the file.
//!
//! The text becomes a tree of nodes with places (`tree`); a serde deserializer over it (`cursor`) notes what is wrong and goes on. A
//! field wrapped in [`At`] never fails: its mistake is noted and its value left out, so that the rest can be judged, too.

mod brought_in;
mod cursor;
mod one_or_many;
mod tree;
mod words;

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;

use cursor::Cursor;
use tree::{Node, expand, places, tree};

pub use brought_in::BroughtIn;
pub use one_or_many::OneOrMany;
pub use tree::named_files;
use words::{NO_BREAK_SPACE, in_our_words};
pub use words::{did_you_mean, did_you_mean_own, without_value};

/// Where a value stands in a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Position {
    /// For example `routes[2].match.path`; empty for the file as a whole.
    pub path: String,
    /// From 1; 0 where it is not known.
    pub line: u64,
    /// From 1, in characters.
    pub column: u64,
}

impl Position {
    /// Of a key of the file itself that is not there.
    pub fn top(key: &str) -> Position {
        Position {
            path: key.to_owned(),
            line: 1,
            column: 1,
        }
    }

    /// Of a key that is not there, or stands for the whole of what it is in.
    pub fn child(&self, key: &str) -> Position {
        self.named(format!("{}.{key}", self.path))
    }

    /// Of the key `key` beside this one, which stands for both.
    pub fn sibling(&self, key: &str) -> Position {
        let parent = self.path.rsplit_once('.').map_or("", |(parent, _)| parent);
        self.named(format!("{parent}.{key}"))
    }

    /// The same line and column, told as `path`.
    pub fn named(&self, path: impl Into<String>) -> Position {
        Position {
            path: path.into(),
            ..*self
        }
    }
}

/// One mistake in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    pub place: Position,
    /// What is wrong, and the mend.
    pub message: String,
}

impl Mistake {
    /// As they stand in the file.
    pub fn sort(mistakes: &mut [Mistake]) {
        mistakes.sort_by_key(|mistake| (mistake.place.line, mistake.place.column));
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Position { path, line, column } = &self.place;
        write!(f, "line {line}, column {column}: ")?;
        if !path.is_empty() {
            write!(f, "{path}: ")?;
        }
        f.write_str(&self.message)?;
        match self.message.contains(NO_BREAK_SPACE) {
            true => write!(f, "; in it is a no-break space (U+00A0): write a plain one"),
            false => Ok(()),
        }
    }
}

/// A value and where it stands; `None` when it was wrong, and then a mistake is noted.
#[derive(Debug, Clone)]
pub struct At<T> {
    pub value: Option<T>,
    pub place: Position,
}

impl<T> At<T> {
    /// The value, where it is right, with its place.
    pub fn told(self) -> Option<(T, Position)> {
        Some((self.value?, self.place))
    }
}

/// What a key says, where it is there and right.
pub fn told<T>(at: Option<At<T>>) -> Option<T> {
    at?.value
}

impl<T: JsonSchema> JsonSchema for At<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

/// What was brought into values, by line and column.
#[derive(Debug, Default)]
pub struct Places(BTreeMap<(u64, u64), BroughtIn>);

impl Places {
    pub fn has(&self, place: &Position) -> bool {
        self.0.contains_key(&(place.line, place.column))
    }

    /// The message, which is about what stands there, without what was brought in.
    pub fn told(&self, place: &Position, message: String) -> String {
        match self.0.get(&(place.line, place.column)) {
            Some(brought_in) => brought_in.told(&message),
            None => message,
        }
    }
}

/// An environment variable's value.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads `text` as a `T`, and says every mistake in it, in their order. With mistakes, the `T` lacks what is wrong: there is
/// none at all where that is neither within an [`At`] nor a list or a map, of which what is none is read as empty.
///
/// In values, `${NAME}` and `${NAME:-default}` become what `lookup` gives and `${file:/path}` becomes that file's text
/// without its last line end; what comes in so is never read as YAML. `$${` is `${` itself.
///
/// A message about a value shows of what came in so, which may be secret, no more than a quantity, an address or three bytes in a row. Beside
/// them the places of it, by which whoever goes on with the `T` can tell its mistakes so, too.
pub fn parse<T: DeserializeOwned>(
    text: &str,
    lookup: Lookup<'_>,
) -> (Option<T>, Vec<Mistake>, Places) {
    let mut node: Node = match tree(text) {
        Ok(node) => node,
        Err(error) => {
            let (line, column) = error
                .location()
                .map_or((0, 0), |at| (at.line(), at.column()));
            let path = String::new();
            let hint = no_break_space(text, line).unwrap_or_default();
            let at_line = text.lines().nth((line.max(1) - 1) as usize);
            let before = at_line.unwrap_or_default().chars();
            let mut before = before.take(column.max(1) as usize - 1);
            let begins_line = before.all(char::is_whitespace);
            let mistake = Mistake {
                place: Position { path, line, column },
                message: in_our_words(&error.to_string(), begins_line) + &hint,
            };
            return (None, vec![mistake], Places::default());
        }
    };
    let mistakes = RefCell::new(Vec::new());
    expand(&mut node, &Path::Root, lookup, &mistakes);
    let cursor = Cursor {
        node: &node,
        path: &Path::Root,
        mistakes: &mistakes,
    };
    let value = T::deserialize(cursor).map_err(|error| cursor.note(error));
    let mut mistakes = mistakes.into_inner();
    Mistake::sort(&mut mistakes);
    let places = Places(places(node));
    for mistake in &mut mistakes {
        let message = std::mem::take(&mut mistake.message);
        mistake.message = places.told(&mistake.place, message);
    }
    (value.ok(), mistakes, places)
}

/// What may be behind it that the parser stops in `line`.
fn no_break_space(text: &str, line: u64) -> Option<String> {
    let lines = (1..).zip(text.lines()).take_while(|(at, _)| *at <= line);
    let near = lines.skip_while(|(at, _)| at + 1 < line);
    let (line, column) = near
        .filter_map(|(at, text)| Some((at, text.chars().position(|c| c == NO_BREAK_SPACE)?)))
        .next()?;
    let column = column + 1;
    Some(format!(
        "; line {line}, column {column} has a no-break space (U+00A0), which YAML takes for a letter: write a plain one"
    ))
}

enum Path<'a> {
    Root,
    Key(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            Path::Key(Path::Root, key) => f.write_str(key),
            Path::Key(parent, key) => write!(f, "{parent}.{key}"),
            Path::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

#[cfg(test)]
mod tests;
