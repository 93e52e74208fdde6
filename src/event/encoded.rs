//! Events encoded one behind the other, as they travel from a lane to the store: nothing of them is allocated or freed singly.
//! Owns what of one can be read without the rest: what columns hold, and what queries pick by.

use std::mem::size_of;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{AuditEvent, Micros, VERSION};

/// Encoded events. The number of each can still be set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    bytes: Vec<u8>,
    places: Vec<Place>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Where the encoding ends.
    end: usize,
    time: Micros,
}

/// The parts of an event that a store keeps beside it: what its encoding begins with, so that the rest need not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns<'a> {
    #[serde(with = "postcard::fixint::le")]
    pub seq: u64,
    pub time: Micros,
    pub client: IpAddr,
    pub user: Option<&'a str>,
    pub label: Option<&'a str>,
}

/// The other parts that queries pick by, which come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traits<'a> {
    pub route: Option<&'a str>,
    pub method: &'a str,
    pub path: &'a str,
    pub status: u16,
}

/// An encoded event in its parts, for a store that keeps the first ones apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts<'a> {
    pub version: u8,
    pub columns: Columns<'a>,
    pub traits: Traits<'a>,
    /// What is behind them.
    pub tail: &'a [u8],
}

impl Encoded {
    /// Without events, and with memory for as many and as long ones as `other` has.
    pub fn like(other: &Encoded) -> Encoded {
        Encoded::with_room(other.len(), other.size())
    }

    /// Without events, and with memory for so many, of so many bytes.
    pub fn with_room(events: usize, bytes: usize) -> Encoded {
        Encoded {
            bytes: Vec::with_capacity(bytes),
            places: Vec::with_capacity(events),
        }
    }

    /// Encodes one more event behind the others.
    pub fn push<T: Serialize>(&mut self, event: &AuditEvent<T>) {
        self.bytes = event.encode_into(std::mem::take(&mut self.bytes));
        self.places.push(Place {
            end: self.bytes.len(),
            time: event.time,
        });
    }

    /// How many events there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Bytes of the encodings.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Keeps the first `count` events.
    pub fn truncate(&mut self, count: usize) {
        self.places.truncate(count);
        self.bytes
            .truncate(self.places.last().map_or(0, |place| place.end));
    }

    /// The latest time of an event.
    pub fn latest(&self) -> Option<Micros> {
        self.places.iter().map(|place| place.time).max()
    }

    /// Sets the numbers of the events: `first`, and on from there.
    pub fn number(&mut self, first: u64) {
        let mut start = 0;
        for (place, seq) in self.places.iter().zip(first..) {
            // Behind the version; at a fixed place and of a fixed length.
            let number = start + 1..start + 1 + size_of::<u64>();
            self.bytes[number].copy_from_slice(&seq.to_le_bytes());
            start = place.end;
        }
    }

    /// The encoding of each event.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.places.iter().map(move |place| {
            let encoding = &self.bytes[start..place.end];
            start = place.end;
            encoding
        })
    }
}

impl<'a> Columns<'a> {
    /// Of an encoded event; `None` if it is none, which only [`AuditEvent::decode`] finds out for sure.
    pub fn of(encoding: &'a [u8]) -> Option<Columns<'a>> {
        beginning(encoding)
    }
}

impl<'a> Traits<'a> {
    /// As [`Columns::of`].
    pub fn of(encoding: &'a [u8]) -> Option<Traits<'a>> {
        let (_, traits): (Columns<'a>, Traits<'a>) = beginning(encoding)?;
        Some(traits)
    }
}

impl<'a> Parts<'a> {
    /// As [`Columns::of`].
    pub fn of(encoding: &'a [u8]) -> Option<Parts<'a>> {
        let (&version, body) = encoding.split_first()?;
        if version != VERSION {
            return None;
        }
        let ((columns, traits), tail) = postcard::take_from_bytes(body).ok()?;
        Some(Parts {
            version,
            columns,
            traits,
            tail,
        })
    }

    /// Appends the encoding to `buffer`. False, with `buffer` as it was, for a version that has other parts.
    pub fn encode_into(&self, buffer: &mut Vec<u8>) -> bool {
        if self.version != VERSION {
            return false;
        }
        let mut bytes = std::mem::take(buffer);
        bytes.push(self.version);
        *buffer = postcard::to_extend(&(self.columns, self.traits), bytes)
            .expect("a Vec takes every byte, and every part of an event knows its length");
        buffer.extend_from_slice(self.tail);
        true
    }

    /// The length of what [`Parts::encode_into`] appends. Of the encodings that have these parts it is the shortest, and the
    /// only one of its length: numbers can be written longer than they need.
    pub fn encoded_len(&self) -> usize {
        let Parts {
            columns, traits, ..
        } = self;
        let address = 1 + match columns.client {
            IpAddr::V4(_) => 4,
            IpAddr::V6(_) => 16,
        };
        let texts = [traits.method, traits.path].map(text_len);
        let options = [columns.user, columns.label, traits.route];
        let options = options.map(|text| 1 + text.map_or(0, text_len));
        let numbers = number_len(columns.time.0) + number_len(u64::from(traits.status));
        let seq = size_of::<u64>();
        let lengths = texts.iter().chain(&options).sum::<usize>();
        1 + seq + address + numbers + lengths + self.tail.len()
    }
}

fn text_len(text: &str) -> usize {
    number_len(text.len() as u64) + text.len()
}

/// Seven bits a byte.
fn number_len(number: u64) -> usize {
    let bits = (u64::BITS - (number | 1).leading_zeros()) as usize;
    bits.div_ceil(7)
}

fn beginning<'a, T: Deserialize<'a>>(encoding: &'a [u8]) -> Option<T> {
    let (&VERSION, body) = encoding.split_first()? else {
        return None;
    };
    let (beginning, _) = postcard::take_from_bytes(body).ok()?;
    Some(beginning)
}
