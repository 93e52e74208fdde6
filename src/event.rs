//! One audited request and its compact encoding. No I/O, no clock.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};
use smallvec::SmallVec;
use thiserror::Error;
use uuid::Uuid;

mod encoded;
mod redaction;

pub use self::encoded::{Columns, Encoded, Parts, Traits};
pub use self::redaction::{REDACTED, Redaction, without_userinfo};

/// The first byte of every encoding. A new field is a new version.
pub const VERSION: u8 = 2;

/// No weir will ever have a later one, of an event or of a batch: what begins with another byte is neither.
pub const NEWEST: u8 = 31;

/// Whether these bytes are, by their first one, an event that another weir has encoded, and this one cannot read.
pub fn is_of_another_version(encoding: &[u8]) -> bool {
    let version = encoding.first();
    version.is_some_and(|version| *version != VERSION && *version <= NEWEST)
}

/// Bytes of one text of a request that are kept, at most: what waits to be written is bounded by the number of events.
pub const LONGEST: usize = 4 * 1024;

/// As many characters as fit into `most` bytes.
pub fn start_of(text: &str, most: usize) -> &str {
    let mut ends = (0..=most.min(text.len())).rev();
    let end = ends.find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

/// A whole number of microseconds: a length of time, or a time since the Unix epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Micros(pub u64);

/// A time since the Unix epoch, as it is shown.
#[derive(Debug)]
pub struct Rfc3339(pub Micros);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = i64::try_from(self.0.0).unwrap_or(i64::MAX);
        match Timestamp::from_microsecond(micros) {
            Ok(time) => write!(f, "{time:.6}"),
            Err(_) => write!(f, "{micros}us"),
        }
    }
}

impl Serialize for Rfc3339 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What is kept of one request. Texts are as the client sent them, but for what a [`Redaction`] took out. They are owned, or
/// borrowed with `&str` for `T`. The encoding has the fields in this order, those of [`Columns`] and
/// [`Traits`] first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEvent<T = String> {
    /// Its place among the events of an instance's boot, from 1 without holes. The store assigns it.
    #[serde(with = "postcard::fixint::le")]
    pub seq: u64,
    /// When the request head was read, since the Unix epoch.
    pub time: Micros,
    pub client: IpAddr,
    pub user: Option<T>,
    /// Why weir answered in the upstream's place, if it did.
    pub label: Option<T>,
    pub route: Option<T>,
    pub method: T,
    pub path: T,
    /// The status that the client was sent.
    pub status: u16,
    /// A UUIDv7.
    #[serde(with = "whole")]
    pub id: [u8; 16],
    pub upstream: Option<T>,
    pub endpoint: Option<T>,
    pub host: T,
    /// Redacted, without its `?`.
    pub query: Option<T>,
    /// What each limit said, in the order asked.
    pub limits: SmallVec<[T; 4]>,
    pub breaker: Option<T>,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the response's body.
    pub bytes_out: u64,
    /// From the request's head to the response's last byte.
    pub duration: Micros,
    /// The part of it that was the upstream's.
    pub upstream_duration: Option<Micros>,
    /// A trusted proxy's; `None` where weir made one, which is the [`id`](Self::id).
    pub request_id: Option<T>,
    /// As in W3C Trace Context.
    pub trace_id: Option<[u8; 16]>,
    /// The headers that the route captures: lower-case name and value.
    pub headers: Vec<(T, T)>,
}

/// Bytes as one piece, where serde would take each for itself.
mod whole {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(id: &[u8; 16], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(id)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<[u8; 16], D::Error> {
        let bytes = <&[u8]>::deserialize(from)?;
        let expected = &"16 bytes";
        let wrong = |_| D::Error::invalid_length(bytes.len(), expected);
        bytes.try_into().map_err(wrong)
    }
}

/// Why bytes are no event.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    #[error("audit event is empty")]
    Empty,
    #[error("audit event has version {0}; this weir reads version {VERSION} alone")]
    Version(u8),
    #[error("audit event is cut short or damaged")]
    Damaged,
}

impl<T> AuditEvent<T> {
    /// Appends the encoding to `buffer`: a version byte, then postcard (<https://postcard.jamesmunns.com/wire-format>).
    pub fn encode_into(&self, mut buffer: Vec<u8>) -> Vec<u8>
    where
        T: Serialize,
    {
        buffer.push(VERSION);
        postcard::to_extend(self, buffer)
            .expect("a Vec takes every byte, and every part of an event knows its length")
    }

    /// The event of an encoding. Never panics; bytes behind the event are an error.
    pub fn decode<'a>(bytes: &'a [u8]) -> Result<AuditEvent<T>, DecodeError>
    where
        T: Deserialize<'a>,
    {
        match bytes.split_first() {
            None => Err(DecodeError::Empty),
            Some((&VERSION, body)) => match postcard::take_from_bytes(body) {
                Ok((event, [])) => Ok(event),
                Ok(_) | Err(_) => Err(DecodeError::Damaged),
            },
            Some((&version, _)) => Err(DecodeError::Version(version)),
        }
    }
}

impl<T> AuditEvent<T> {
    /// One with nothing out of the ordinary, for tests to vary.
    #[doc(hidden)]
    pub fn sample<'a>() -> AuditEvent<T>
    where
        T: From<&'a str>,
    {
        AuditEvent {
            seq: 0,
            time: Micros(0),
            client: [10, 0, 0, 1].into(),
            user: Some("ann".into()),
            label: None,
            route: Some("/*".into()),
            method: "GET".into(),
            path: "/".into(),
            status: 200,
            id: [7; 16],
            upstream: Some("app".into()),
            endpoint: None,
            host: "example.com".into(),
            query: None,
            limits: SmallVec::new(),
            breaker: None,
            bytes_in: 0,
            bytes_out: 17,
            duration: Micros(900),
            upstream_duration: None,
            request_id: None,
            trace_id: None,
            headers: Vec::new(),
        }
    }
}

impl AuditEvent<&str> {
    /// The event with texts of its own.
    pub fn into_owned(self) -> AuditEvent {
        let own = |text: Option<&str>| text.map(str::to_owned);
        AuditEvent {
            seq: self.seq,
            time: self.time,
            client: self.client,
            user: own(self.user),
            label: own(self.label),
            route: own(self.route),
            method: self.method.to_owned(),
            path: self.path.to_owned(),
            status: self.status,
            id: self.id,
            upstream: own(self.upstream),
            endpoint: own(self.endpoint),
            host: self.host.to_owned(),
            query: own(self.query),
            limits: self.limits.into_iter().map(str::to_owned).collect(),
            breaker: own(self.breaker),
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            duration: self.duration,
            upstream_duration: self.upstream_duration,
            request_id: own(self.request_id),
            trace_id: self.trace_id,
            headers: self
                .headers
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        }
    }
}

impl<T: AsRef<str>> AuditEvent<T> {
    /// The id that the upstream was told.
    pub fn request_id(&self) -> Cow<'_, str> {
        match &self.request_id {
            Some(given) => Cow::Borrowed(given.as_ref()),
            None => Cow::Owned(Uuid::from_bytes(self.id).to_string()),
        }
    }
}

impl From<Duration> for Micros {
    fn from(duration: Duration) -> Micros {
        Micros(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
    }
}

impl From<Micros> for Duration {
    fn from(micros: Micros) -> Duration {
        Duration::from_micros(micros.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event() -> impl Strategy<Value = AuditEvent> {
        let text = || proptest::option::of(any::<String>());
        let short = any::<String>;
        let texts = (
            text(),
            text(),
            text(),
            text(),
            text(),
            any::<([String; 2], Option<String>)>(),
        );
        let verdicts = (
            proptest::option::of(short()),
            proptest::collection::vec(short(), 0..4),
            proptest::option::of(short()),
            short(),
            proptest::collection::vec((short(), any::<String>()), 0..4),
        );
        let numbers = (any::<[u64; 5]>(), any::<u16>(), any::<Option<u64>>());
        let ids = (
            any::<[u8; 16]>(),
            any::<IpAddr>(),
            any::<Option<[u8; 16]>>(),
        );
        (texts, verdicts, numbers, ids).prop_map(|(texts, verdicts, numbers, ids)| {
            let (route, upstream, endpoint, user, query, ([host, path], request_id)) = texts;
            let (label, limits, breaker, method, headers) = verdicts;
            let ([time, seq, bytes_in, bytes_out, duration], status, upstream_duration) = numbers;
            let (id, client, trace_id) = ids;
            AuditEvent {
                time: Micros(time),
                id,
                seq,
                route,
                upstream,
                endpoint,
                client,
                user,
                method,
                host,
                path,
                query,
                status,
                label,
                limits: limits.into(),
                breaker,
                bytes_in,
                bytes_out,
                duration: Micros(duration),
                upstream_duration: upstream_duration.map(Micros),
                request_id,
                trace_id,
                headers,
            }
        })
    }

    proptest! {
        #[test]
        fn encoded_events_are_numbered_in_place(events in proptest::collection::vec(event(), 1..4), first in 0..u64::MAX - 4, kept in 0usize..4) {
            let mut encoded = Encoded::default();
            events.iter().for_each(|event| encoded.push(event));
            prop_assert_eq!(encoded.latest(), events.iter().map(|event| event.time).max());
            encoded.number(first);
            encoded.truncate(kept);
            let numbered = events.into_iter().zip(first..).take(kept);
            let expected: Vec<_> = numbered.map(|(event, seq)| AuditEvent { seq, ..event }).collect();
            prop_assert_eq!(encoded.len(), expected.len());
            let mut encodings = encoded.iter();
            for event in expected {
                let encoding = encodings.next().unwrap();
                let columns = Columns {
                    seq: event.seq,
                    time: event.time,
                    client: event.client,
                    user: event.user.as_deref(),
                    label: event.label.as_deref(),
                };
                let traits = Traits {
                    route: event.route.as_deref(),
                    method: &event.method,
                    path: &event.path,
                    status: event.status,
                };
                prop_assert_eq!(Columns::of(encoding), Some(columns));
                prop_assert_eq!(Traits::of(encoding), Some(traits));
                let parts = Parts::of(encoding).unwrap();
                prop_assert_eq!((parts.columns, parts.traits), (columns, traits));
                prop_assert_eq!(parts.encoded_len(), encoding.len());
                let mut again = vec![7];
                prop_assert!(parts.encode_into(&mut again));
                prop_assert_eq!(&again[1..], encoding);
                prop_assert_eq!(AuditEvent::decode(encoding), Ok(event));
            }
            prop_assert_eq!(encodings.next(), None);
        }
    }

    #[test]
    fn an_unknown_version_is_told_apart_from_damage() {
        assert_eq!(<AuditEvent>::decode(&[]), Err(DecodeError::Empty));
        assert_eq!(<AuditEvent>::decode(&[9, 1]), Err(DecodeError::Version(9)));
        assert_eq!(<AuditEvent>::decode(&[VERSION]), Err(DecodeError::Damaged));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_and_nothing_may_follow(event in event()) {
            let mut bytes = event.encode_into(Vec::new());
            prop_assert_eq!(<AuditEvent>::decode(&bytes), Ok(event));
            prop_assert_eq!(<AuditEvent>::decode(&bytes[..bytes.len() - 1]), Err(DecodeError::Damaged));
            bytes.push(0);
            prop_assert_eq!(<AuditEvent>::decode(&bytes), Err(DecodeError::Damaged));
        }

        #[test]
        fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = <AuditEvent>::decode(&bytes);
            bytes.insert(0, VERSION);
            let _ = <AuditEvent>::decode(&bytes);
        }

        #[test]
        fn damaged_events_never_panic(event in event(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = event.encode_into(Vec::new());
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = <AuditEvent>::decode(&bytes);
        }
    }
}
