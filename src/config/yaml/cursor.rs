//! The deserializer over a tree of nodes, which notes what is wrong and goes on. Must not know any key of the file.

use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{StrDeserializer, U64Deserializer};
use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, Expected, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, Visitor,
};
use serde_saphyr::Spanned;

use super::one_or_many::ONE_OR_MANY;
use super::tree::{Node, Value};
use super::words::{
    NOTHING, misplaced, missing, nearest, no_colon, no_name, told_apart, unexpected, unknown_key,
    unknown_name, without_value,
};
use super::{At, BroughtIn, Mistake, Path, Position};

/// An error on its way to the nearest [`At`]; it takes the place of the innermost node that it passes.
#[derive(Debug)]
pub(super) struct Error {
    message: String,
    place: Option<Position>,
    /// Whether a mistake that is noted already says why.
    told: bool,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Error {
        Error {
            message: message.to_string(),
            place: None,
            told: false,
        }
    }

    fn invalid_type(found: Unexpected<'_>, needed: &dyn Expected) -> Error {
        de::Error::custom(unexpected(found, needed))
    }

    fn invalid_value(found: Unexpected<'_>, needed: &dyn Expected) -> Error {
        de::Error::custom(unexpected(found, needed))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Error {
        de::Error::custom(unknown_name(variant, expected))
    }

    fn missing_field(field: &'static str) -> Error {
        de::Error::custom(missing(field))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Cursor<'a> {
    pub(super) node: &'a Node,
    pub(super) path: &'a Path<'a>,
    pub(super) mistakes: &'a RefCell<Vec<Mistake>>,
}

impl<'a> Cursor<'a> {
    /// Notes the error unless it is told already.
    pub(super) fn note(&self, error: Error) {
        if error.told {
            return;
        }
        self.mistakes.borrow_mut().push(Mistake {
            place: error.place.unwrap_or_else(|| self.place()),
            message: error.message,
        });
    }

    fn place(&self) -> Position {
        self.node.place(self.path)
    }

    /// Notes that `needed` does not stand here.
    fn note_misplaced(&self, needed: &str) {
        let message = match &self.node.value {
            Value::Unknown => return,
            Value::Null => NOTHING.to_owned(),
            found => misplaced(&told_apart(found), needed),
        };
        self.note(de::Error::custom(message));
    }

    fn placed(&self, error: Error) -> Error {
        Error {
            place: Some(error.place.unwrap_or_else(|| self.place())),
            ..error
        }
    }

    /// What stands where a list of such may stand, too; a mistake in its kind says so.
    fn alone<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let before = self.mistakes.borrow().len();
        let value = visitor.visit_newtype_struct(self);
        let here = self.path.to_string();
        for mistake in &mut self.mistakes.borrow_mut()[before..] {
            if mistake.place.path == here {
                let needed = " or a list of them is needed";
                mistake.message = mistake.message.replace(" is needed", needed);
            }
        }
        value
    }

    fn list<'de, V: Visitor<'de>>(self, items: &'a [Node], visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Items {
            cursor: self,
            items: items.iter().enumerate(),
        })
    }
}

/// The name by which [`At`] asks our deserializer for a value's place.
const AT: &str = "$weir::At";

impl<'de, T: Deserialize<'de>> Deserialize<'de> for At<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<At<T>, D::Error> {
        struct AtVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for AtVisitor<T> {
            type Value = At<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value with its place")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<At<T>, A::Error> {
                let place = Position {
                    path: parts.next_element()?.unwrap_or_default(),
                    line: parts.next_element()?.unwrap_or(0),
                    column: parts.next_element()?.unwrap_or(0),
                };
                let value = parts.next_element()?;
                Ok(At { value, place })
            }
        }

        deserializer.deserialize_newtype_struct(AT, AtVisitor(PhantomData))
    }
}

/// The parts of an [`At`]: path, line, column, and the value or, when it is wrong, nothing.
struct AtParts<'a> {
    cursor: Cursor<'a>,
    next: u8,
}

impl<'de> SeqAccess<'de> for AtParts<'_> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        self.next += 1;
        let node = self.cursor.node;
        match self.next {
            1 => seed
                .deserialize(self.cursor.path.to_string().into_deserializer())
                .map(Some),
            2 => seed.deserialize(U64Deserializer::new(node.line)).map(Some),
            3 => seed
                .deserialize(U64Deserializer::new(node.column))
                .map(Some),
            _ => Ok(seed
                .deserialize(self.cursor)
                .map_err(|error| self.cursor.note(error))
                .ok()),
        }
    }
}

/// Where a number or a boolean is asked for, an expanded text that is one is read as one.
macro_rules! expanded_number {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            let Value::Expanded(BroughtIn { value, .. }) = &self.node.value else {
                return self.deserialize_any(visitor);
            };
            if let Ok(number) = value.parse() {
                visitor.visit_u64(number)
            } else if let Ok(number) = value.parse() {
                visitor.visit_i64(number)
            } else if let Ok(number) = value.parse() {
                visitor.visit_f64(number)
            } else if let Ok(truth) = value.parse() {
                visitor.visit_bool(truth)
            } else {
                return self.deserialize_any(visitor);
            }
            .map_err(|error| self.placed(error))
        }
    )*};
}

impl<'de> Deserializer<'de> for Cursor<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Unknown => Err(Error {
                told: true,
                ..de::Error::custom("not known")
            }),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_str(value),
            Value::Expanded(brought_in) => visitor.visit_str(&brought_in.value),
            Value::List(items) => self.list(items, visitor),
            Value::Map(entries) => visitor.visit_map(Entries::all(self, entries)),
        }
        .map_err(|error| self.placed(error))
    }

    /// A number where a text is asked for is that text, so that `limit: 10` and `limit: 10/s` are read alike.
    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node.value {
            Value::Unsigned(value) => visitor.visit_string(value.to_string()),
            Value::Signed(value) => visitor.visit_string(value.to_string()),
            _ => return self.deserialize_any(visitor),
        }
        .map_err(|error| self.placed(error))
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    expanded_number! {
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_i32 deserialize_i64 deserialize_f64 deserialize_bool
    }

    /// What is no list is a mistake, and read as one without entries: what stands beside it is read, too.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if !matches!(self.node.value, Value::List(_)) {
            self.note_misplaced("a sequence");
            return self.list(&[], visitor);
        }
        self.deserialize_any(visitor)
    }

    /// Likewise, a map.
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if !matches!(self.node.value, Value::Map(_)) {
            self.note_misplaced("a map");
            return visitor.visit_map(Entries::all(self, &[]));
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node.value {
            // Left out by who meant to write it, it would be as though it was never meant: no client's certificate asked for, no session.
            Value::Null => {
                self.note(de::Error::custom(NOTHING));
                visitor.visit_none()
            }
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        match name {
            AT => visitor.visit_seq(AtParts {
                cursor: self,
                next: 0,
            }),
            ONE_OR_MANY => match &self.node.value {
                Value::List(items) => self.list(items, visitor),
                _ => self.alone(visitor),
            },
            _ => visitor.visit_newtype_struct(self),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::Text(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            Value::Expanded(brought_in) => {
                visitor.visit_enum(brought_in.value.as_str().into_deserializer())
            }
            Value::Unknown => return self.deserialize_any(visitor),
            other => Err(de::Error::custom(no_name(other, variants))),
        }
        .map_err(|error: Error| self.placed(error))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Value::Map(entries) = &self.node.value else {
            // Some read a text or a list, too. A derived one names itself, and would take a list for its fields in their order.
            let takes = <dyn Expected>::to_string(&visitor);
            if takes != format!("struct {name}") {
                return self.deserialize_any(visitor);
            }
            let error = match &self.node.value {
                Value::Unknown => return self.deserialize_any(visitor),
                other => de::Error::custom(format_args!(
                    "{} stands where keys are needed{}; known here: {}",
                    told_apart(other),
                    match other {
                        Value::Text(_) => ", each as KEY: VALUE, with a space behind the colon",
                        Value::Null => ", indented below it",
                        _ => "",
                    },
                    fields.join(", ")
                )),
            };
            return Err(self.placed(error));
        };
        let mut meant = Vec::new();
        let known = |(key, _): &&(Spanned<String>, Node)| {
            let known = fields.contains(&key.value.as_str());
            if !known {
                let (name, message) = match without_value(&key.value) {
                    Some(name) => (name, no_colon(name, fields)),
                    None => (key.value.as_str(), unknown_key(&key.value, fields)),
                };
                meant.extend(nearest(name, fields));
                let place = Position {
                    path: Path::Key(self.path, name).to_string(),
                    line: key.referenced.line(),
                    column: key.referenced.column(),
                };
                let mistake = Mistake { place, message };
                self.mistakes.borrow_mut().push(mistake);
            }
            known
        };
        let entries = entries.iter().filter(known).collect::<Vec<_>>();
        visitor
            .visit_map(Entries {
                cursor: self,
                entries: entries.into_iter(),
                value: None,
            })
            .map_err(|error| {
                let misspelt = meant.iter().any(|field| error.message == missing(field));
                self.placed(Error {
                    told: error.told || misspelt,
                    ..error
                })
            })
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i128 u128 f32 char bytes byte_buf unit unit_struct tuple tuple_struct
        identifier ignored_any
    }
}

struct Items<'a> {
    cursor: Cursor<'a>,
    items: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        let Some((index, node)) = self.items.next() else {
            return Ok(None);
        };
        let path = Path::Index(self.cursor.path, index);
        seed.deserialize(Cursor {
            node,
            path: &path,
            mistakes: self.cursor.mistakes,
        })
        .map(Some)
    }
}

struct Entries<'a> {
    cursor: Cursor<'a>,
    entries: std::vec::IntoIter<&'a (Spanned<String>, Node)>,
    value: Option<&'a (Spanned<String>, Node)>,
}

impl<'a> Entries<'a> {
    fn all(cursor: Cursor<'a>, entries: &'a [(Spanned<String>, Node)]) -> Entries<'a> {
        Entries {
            cursor,
            entries: entries.iter().collect::<Vec<_>>().into_iter(),
            value: None,
        }
    }
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        self.value = self.entries.next();
        let Some((key, _)) = self.value else {
            return Ok(None);
        };
        seed.deserialize(StrDeserializer::new(&key.value)).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let (key, node) = self
            .value
            .ok_or_else(|| de::Error::custom("a value was read before its key"))?;
        // What would be its value is not shown.
        let name = without_value(&key.value).filter(|_| matches!(node.value, Value::Null));
        let path = Path::Key(self.cursor.path, name.unwrap_or(&key.value));
        seed.deserialize(Cursor {
            node,
            path: &path,
            mistakes: self.cursor.mistakes,
        })
    }
}
