//! What is shown: values under keys, which stand in an order. Must not know a key of the file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::config::units::{ByteSize, FileMode, Percent, TimeLength};
use crate::config::{Secret, raw};
use crate::event::REDACTED;

/// A value as it is shown.
pub(super) enum Shown {
    /// The key is left out.
    Nothing,
    Plain(Value),
    List(Vec<Shown>),
    Keys(Keys),
}

/// Keys and their values.
#[derive(Default)]
pub(super) struct Keys(Vec<(String, Shown)>);

impl Keys {
    pub(super) fn new() -> Keys {
        Keys::default()
    }

    pub(super) fn key(mut self, key: &str, value: impl Into<Shown>) -> Keys {
        match value.into() {
            Shown::Nothing => {}
            value => self.0.push((key.to_owned(), value)),
        }
        self
    }

    /// `None` where all of them are left out.
    pub(super) fn any(self) -> Option<Keys> {
        (!self.0.is_empty()).then_some(self)
    }
}

impl Serialize for Shown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Shown::Nothing => serializer.serialize_unit(),
            Shown::Plain(value) => value.serialize(serializer),
            Shown::List(items) => items.serialize(serializer),
            Shown::Keys(Keys(keys)) => {
                serializer.collect_map(keys.iter().map(|(key, value)| (key, value)))
            }
        }
    }
}

/// Types that serde shows as they are.
macro_rules! plain {
    ($($of:ty)*) => {$(
        impl From<$of> for Shown {
            fn from(value: $of) -> Shown {
                Shown::Plain(json!(value))
            }
        }
    )*};
}

plain! {
    bool u8 u16 u32 u64 usize NonZeroU32 &str String &String &Path SocketAddr Value
    ByteSize FileMode Percent TimeLength
    raw::Accuracy raw::Adaptive raw::Algorithm raw::Always raw::AuditLevel raw::BreakerOnLoss raw::ClientAuth raw::Delivery
    raw::ListenerProtocol raw::LogFormat raw::LogLevel raw::Mode raw::OnLoss raw::OnMax raw::Partition raw::ProxyProtocol
    raw::RedisMode raw::SameSite raw::Scheme raw::Scope raw::TlsVersion raw::UpstreamProtocol
}

impl From<Duration> for Shown {
    fn from(value: Duration) -> Shown {
        TimeLength(value).into()
    }
}

impl From<&Secret> for Shown {
    fn from(_: &Secret) -> Shown {
        REDACTED.into()
    }
}

impl From<Keys> for Shown {
    fn from(keys: Keys) -> Shown {
        Shown::Keys(keys)
    }
}

impl<T: Into<Shown>> From<Option<T>> for Shown {
    fn from(value: Option<T>) -> Shown {
        value.map_or(Shown::Nothing, T::into)
    }
}

impl<T: Into<Shown>> From<Vec<T>> for Shown {
    fn from(list: Vec<T>) -> Shown {
        Shown::List(list.into_iter().map(T::into).collect())
    }
}

impl<T: Into<Shown>> From<BTreeMap<&str, T>> for Shown {
    fn from(named: BTreeMap<&str, T>) -> Shown {
        let named = named.into_iter();
        named
            .fold(Keys::new(), |keys, (name, value)| keys.key(name, value))
            .into()
    }
}

/// Each of a list, as the file spells it.
pub(super) fn texts(items: &[impl ToString]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}
