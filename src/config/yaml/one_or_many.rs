//! A value that may stand alone where a list is meant.

use std::fmt;
use std::marker::PhantomData;

use schemars::JsonSchema;
use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};

use super::At;

/// One, or a list of them.
#[derive(Debug, JsonSchema)]
#[schemars(untagged, rename = "OneOrMany_{T}")]
pub enum OneOrMany<T> {
    One(At<T>),
    Many(Vec<At<T>>),
}

impl<T> OneOrMany<T> {
    pub fn list(self) -> Vec<At<T>> {
        match self {
            OneOrMany::One(alone) => vec![alone],
            OneOrMany::Many(list) => list,
        }
    }

    pub fn is_empty(&self) -> bool {
        match self {
            OneOrMany::One(_) => false,
            OneOrMany::Many(list) => list.is_empty(),
        }
    }
}

/// The name by which [`OneOrMany`] asks our deserializer whether a list stands there.
pub(super) const ONE_OR_MANY: &str = "$weir::OneOrMany";

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OneOrMany<T>, D::Error> {
        struct Either<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value or a list of them")
            }

            fn visit_newtype_struct<D: Deserializer<'de>>(
                self,
                alone: D,
            ) -> Result<OneOrMany<T>, D::Error> {
                At::deserialize(alone).map(OneOrMany::One)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMany<T>, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element()? {
                    values.push(value);
                }
                Ok(OneOrMany::Many(values))
            }
        }

        deserializer.deserialize_newtype_struct(ONE_OR_MANY, Either(PhantomData))
    }
}
