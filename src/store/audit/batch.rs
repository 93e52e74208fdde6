//! A batch of events as it travels from a process to the audit's database: one record of the spool, one entry of a stream.
//! Owns its bytes and its place in the process's chain of hashes. Does no I/O.
//!
//! The bytes are a version, a CRC-32 (little-endian) of all behind it, the [`Header`] in postcard, and the body as an LZ4
//! block behind its length. The body is each event's encoding behind its length, a `u32` (little-endian).
//!
//! Measured by `cargo bench --bench formats` on 2 cores of a virtual machine, with Redis 7.0; what an event costs: bytes, CPU
//! nanoseconds to make and to read an entry from what is encoded already (270 and 300 for postcard), Redis's to take it in and to
//! give it out and delete it, and bytes of its memory:
//!
//! | entries | bytes | make, read | Redis in, out | memory |
//! |---|---|---|---|---|
//! | JSON, an event each | 460 | 1640, 2040 | 1760, 2840 | 519 |
//! | postcard, 200 events each | 209 | 20, 0 | 236, 84 | 246 |
//! | and LZ4 | 96 | 275, 80 | 134, 65 | 103 |
//! | and zstd 1 | 74 | 410, 160 | 94, 53 | 83 |
//! | and zstd 3 | 73 | 520, 180 | 94, 50 | 82 |
//! | a batch of 1: LZ4, header, checksum and hashes | 347 | 1560, 300 | 1700, 2900 | 379 |
//! | a batch of 10 | 129 | 700, 160 | 306, 312 | 139 |
//! | a batch of 50 | 101 | 460, 130 | 144, 92 | 112 |
//! | a batch of 100 | 97 | 440, 140 | 147, 85 | 103 |
//! | a batch of 200 | 95 | 420, 120 | 116, 52 | 103 |
//! | a batch of 500 | 93 | 440, 120 | 103, 40 | 99 |
//!
//! So 200 events, whose next step to 500 would save Redis half a hundredth of what JSON costs it: a batch is also what a crash
//! sends again. And LZ4, though zstd takes a quarter less room: it would cost 200 ns more of an event, where Redis saves 50.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::chain::{BatchPart, Hash, Hasher};
use super::days::Day;
use crate::event::{self, Encoded, Micros, NEWEST, Parts};

/// The first byte. A new field is a new version.
const VERSION: u8 = 1;
/// Of the version and the checksum.
const PREFIX: usize = 5;
/// How far a clock is set back, in microseconds, where it was wrong before and not merely off.
const LEAP: u64 = 86_400_000_000;
/// What a body may be; a length beyond is damage. A proxy packs 1 MiB, or what a lane has gathered, which is little more.
const LONGEST: usize = 64 << 20;

/// What a batch says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The name of the instance.
    pub instance: String,
    /// A UUIDv7, a new one at each start of the process; `first` counts within it.
    pub boot: [u8; 16],
    /// When the boot began.
    pub started: Micros,
    /// The number of its first event. In an end mark, which has none, the one that would have come next.
    pub first: u64,
    pub count: u64,
    /// When it was made. Not before any of its events, nor before the batch before it, unless that was made by a clock that has since been
    /// set right: its day is that of all its rows.
    pub sealed: Micros,
    /// Events of this boot so far that were dropped before they had a number.
    pub dropped: u64,
    /// Whether no batch of this boot follows.
    pub is_end: bool,
    /// Tells the chain's key from others; `None` without one.
    pub key_check: Option<Hash>,
    /// The hash of the batch before; [`Hasher::boot`] for the first.
    pub before: Hash,
    /// Of this batch.
    pub hash: Hash,
}

/// A batch, unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub header: Header,
    body: Vec<u8>,
}

/// Why bytes are no batch.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BatchError {
    /// Of it or of one of its events.
    #[error("batch of audit events, or an event of it, has version {0}; this weir reads batches of {VERSION} and events of {EVENT}", EVENT = event::VERSION)]
    Version(u8),
    #[error("batch of audit events is cut short or damaged")]
    Damaged,
}

/// One boot of an instance, which makes batches.
pub struct Boot {
    pub instance: String,
    pub id: Uuid,
    pub started: Micros,
    hasher: Hasher,
    /// The last number given.
    pub last: u64,
    /// Of the last batch.
    pub hash: Hash,
    sealed: Micros,
}

impl Header {
    /// The number of the last event; `first - 1` in an end mark.
    pub fn last(&self) -> u64 {
        self.first.saturating_add(self.count).saturating_sub(1)
    }

    /// The day of the partition that its rows go to.
    pub fn day(&self) -> Day {
        Day::of(self.sealed.into())
    }

    /// What the hash covers, with the events' encodings in order.
    pub fn part<'a>(&'a self, body: &'a [u8]) -> BatchPart<'a> {
        BatchPart {
            boot: &self.boot,
            first: self.first,
            count: self.count,
            sealed: self.sealed.0,
            dropped: self.dropped,
            is_end: self.is_end,
            body,
        }
    }
}

impl Boot {
    /// A new boot of `instance`.
    pub fn new(instance: String, id: Uuid, started: Micros, hasher: Hasher) -> Boot {
        let hash = hasher.boot(&instance, id.as_bytes(), started.0);
        Boot {
            instance,
            id,
            started,
            hasher,
            last: 0,
            hash,
            sealed: started,
        }
    }

    /// The boot whose last batch had this header, to be ended by another process. `None` if it has ended, or was under another
    /// key.
    pub fn resume(last: &Header, hasher: Hasher) -> Option<Boot> {
        let fits = !last.is_end && last.key_check == hasher.key_check();
        fits.then(|| Boot {
            instance: last.instance.clone(),
            id: Uuid::from_bytes(last.boot),
            started: last.started,
            hasher,
            last: last.last(),
            hash: last.hash,
            sealed: last.sealed,
        })
    }

    /// Numbers the events and packs them. `now` is the time since the Unix epoch; `dropped` counts since the boot began.
    pub fn pack(&mut self, events: &mut [Encoded], now: Micros, dropped: u64) -> (Header, Vec<u8>) {
        let mut body = Vec::with_capacity(events.iter().map(|events| 4 * events.len()).sum());
        let first = self.last + 1;
        let mut next = first;
        let mut latest = self.not_before(now);
        for events in events {
            events.number(next);
            next += events.len() as u64;
            latest = latest.max(events.latest().unwrap_or_default());
            for encoding in events.iter() {
                put(&mut body, encoding);
            }
        }
        self.sealed = latest;
        self.seal(first, next - first, dropped, false, &body)
    }

    /// The batch that says that the boot has no more events.
    pub fn end(&mut self, now: Micros, dropped: u64) -> (Header, Vec<u8>) {
        self.sealed = self.not_before(now);
        self.seal(self.last + 1, 0, dropped, true, &[])
    }

    /// By a clock that was more than a day ahead, batches would go to days to come until these are there.
    fn not_before(&self, now: Micros) -> Micros {
        match now.0.saturating_add(LEAP) < self.sealed.0 {
            true => now,
            false => now.max(self.sealed),
        }
    }

    fn seal(
        &mut self,
        first: u64,
        count: u64,
        dropped: u64,
        is_end: bool,
        body: &[u8],
    ) -> (Header, Vec<u8>) {
        let mut header = Header {
            instance: self.instance.clone(),
            boot: self.id.into_bytes(),
            started: self.started,
            first,
            count,
            sealed: self.sealed,
            dropped,
            is_end,
            key_check: self.hasher.key_check(),
            before: self.hash,
            hash: Hash::default(),
        };
        header.hash = self.hasher.batch(&self.hash, &header.part(body));
        self.hash = header.hash;
        self.last = header.last();
        let packed = pack(&header, body);
        (header, packed)
    }
}

impl Batch {
    /// The batch of these bytes. Never panics.
    pub fn open(bytes: &[u8]) -> Result<Batch, BatchError> {
        let (header, packed) = header(bytes)?;
        size(packed)?;
        let body = lz4_flex::decompress_size_prepended(packed).map_err(|_| BatchError::Damaged)?;
        let batch = Batch { header, body };
        let other = batch
            .events()
            .filter_map(|event| event.first().copied())
            .find(|version| *version != event::VERSION);
        match other {
            Some(other) if other <= NEWEST => Err(BatchError::Version(other)),
            None if batch.is_whole() => Ok(batch),
            Some(_) | None => Err(BatchError::Damaged),
        }
    }

    /// Bytes of the body.
    pub fn size(&self) -> usize {
        self.body.len()
    }

    /// Whether the body is the events that the header says, and no more.
    fn is_whole(&self) -> bool {
        let Header { first, count, .. } = self.header;
        // By all that a row is made of: one bad event would hold up whatever is stored with it.
        let number = |encoding| Parts::of(encoding).map(|parts| parts.columns.seq);
        let expected = first..first.saturating_add(count);
        let length: usize = self.events().map(|it| size_of::<u32>() + it.len()).sum();
        length == self.body.len() && self.events().map(number).eq(expected.map(Some))
    }

    /// The encoding of each event, in the order of their numbers.
    pub fn events(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &self.body[..];
        std::iter::from_fn(move || {
            let (length, behind) = rest.split_first_chunk()?;
            let encoding = behind.get(..u32::from_le_bytes(*length) as usize)?;
            rest = &behind[encoding.len()..];
            Some(encoding)
        })
    }
}

/// The header of a batch's bytes, once their checksum is found right, and what is behind it.
fn header(bytes: &[u8]) -> Result<(Header, &[u8]), BatchError> {
    match bytes.first() {
        Some(&VERSION) => {}
        Some(&other) if other <= NEWEST => return Err(BatchError::Version(other)),
        Some(_) | None => return Err(BatchError::Damaged),
    }
    let (prefix, rest) = bytes
        .split_first_chunk::<PREFIX>()
        .ok_or(BatchError::Damaged)?;
    if prefix[1..] != crc32fast::hash(rest).to_le_bytes() {
        return Err(BatchError::Damaged);
    }
    postcard::take_from_bytes(rest).map_err(|_| BatchError::Damaged)
}

/// What the bytes of a batch say of it, once their checksum is found right.
pub fn peek(bytes: &[u8]) -> Result<Header, BatchError> {
    header(bytes).map(|(header, _)| header)
}

/// What [`Batch::size`] will be once these bytes are opened; 0 where they cannot be.
pub fn unpacked_size(bytes: &[u8]) -> usize {
    let size = header(bytes).and_then(|(_, packed)| size(packed));
    size.unwrap_or(0)
}

/// The size of a body, as it says where it is packed.
fn size(packed: &[u8]) -> Result<usize, BatchError> {
    let (length, _) = packed.split_first_chunk().ok_or(BatchError::Damaged)?;
    let length = u32::from_le_bytes(*length) as usize;
    match length <= LONGEST {
        true => Ok(length),
        false => Err(BatchError::Damaged),
    }
}

fn pack(header: &Header, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![VERSION, 0, 0, 0, 0];
    bytes = postcard::to_extend(header, bytes)
        .expect("a Vec takes every byte, and every part of a header knows its length");
    bytes.extend(lz4_flex::compress_prepend_size(body));
    let checksum = crc32fast::hash(&bytes[PREFIX..]);
    bytes[1..PREFIX].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Puts an event's encoding behind others, as a body has them.
pub fn put(body: &mut Vec<u8>, encoding: &[u8]) {
    let length = u32::try_from(encoding.len()).expect("an event's texts are bounded");
    body.extend_from_slice(&length.to_le_bytes());
    body.extend_from_slice(encoding);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::{AuditEvent, Columns};

    fn events(times: &[u64]) -> Encoded {
        let mut encoded = Encoded::default();
        for time in times {
            encoded.push(&AuditEvent::<&str> {
                time: Micros(*time),
                ..AuditEvent::sample()
            });
        }
        encoded
    }

    fn boot() -> Boot {
        Boot::new(
            "a".to_owned(),
            Uuid::from_bytes([9; 16]),
            Micros(50),
            Hasher::new(Some(b"k")),
        )
    }

    #[test]
    fn batches_are_numbered_on_and_chained() {
        let mut boot = boot();
        let start = boot.hash;
        let (one, bytes) = boot.pack(&mut [events(&[60, 70]), events(&[65])], Micros(66), 0);
        assert_eq!((one.first, one.last(), one.sealed), (1, 3, Micros(70)));
        assert_eq!((one.before, one.key_check.is_some()), (start, true));
        let batch = Batch::open(&bytes).unwrap();
        assert_eq!(batch.header, one);
        assert_eq!(unpacked_size(&bytes), batch.size());
        let seqs: Vec<_> = batch
            .events()
            .map(|event| Columns::of(event).unwrap().seq)
            .collect();
        assert_eq!(seqs, [1, 2, 3]);
        // A clock that is set back takes no batch to the day before.
        let (two, _) = boot.pack(&mut [events(&[61])], Micros(1), 4);
        assert_eq!((two.first, two.last(), two.sealed), (4, 4, Micros(70)));
        assert_eq!((two.before, two.dropped), (one.hash, 4));
        let mut heir = Boot::resume(&two, Hasher::new(Some(b"k"))).unwrap();
        let (end, bytes) = heir.end(Micros(99), 4);
        assert_eq!((end.first, end.count, end.is_end), (5, 0, true));
        assert_eq!((end.before, end.instance.as_str()), (two.hash, "a"));
        assert_eq!(Batch::open(&bytes).unwrap().events().count(), 0);
        assert!(Boot::resume(&end, Hasher::new(Some(b"k"))).is_none());
        assert!(Boot::resume(&two, Hasher::new(None)).is_none());
    }

    #[test]
    fn batches_follow_a_clock_that_is_set_right() {
        let mut boot = boot();
        let mut sealed = |now| boot.pack(&mut [events(&[60])], Micros(now), 0).0.sealed;
        let wrong = 9 * LEAP;
        assert_eq!(sealed(wrong), Micros(wrong));
        // One that is off is no reason to go back,
        assert_eq!(sealed(wrong - LEAP), Micros(wrong));
        // nor is an event of before.
        assert_eq!(sealed(LEAP), Micros(LEAP));
        let (late, _) = boot.pack(&mut [events(&[wrong])], Micros(LEAP), 0);
        assert_eq!(late.sealed, Micros(wrong));
        assert_eq!(boot.end(Micros(LEAP), 0).0.sealed, Micros(LEAP));
    }

    #[test]
    fn only_events_that_make_rows_make_a_whole_batch() {
        let (header, bytes) = boot().pack(&mut [events(&[60])], Micros(66), 0);
        let body = Batch::open(&bytes).unwrap().body;
        let check = |body: &[u8]| Batch::open(&pack(&header, body)).map(drop);
        assert_eq!(check(&body), Ok(()));
        let encoding = &body[4..];
        let cut_short = |length: usize| {
            let mut cut = Vec::new();
            put(&mut cut, &encoding[..length]);
            check(&cut)
        };
        // The parts that a row is made of end before what it keeps as it is.
        let Parts { tail, .. } = Parts::of(encoding).unwrap();
        let parts = encoding.len() - tail.len();
        assert!((0..parts).all(|length| cut_short(length) == Err(BatchError::Damaged)));
        assert_eq!(cut_short(parts), Ok(()));
        let behind = [&body[..], &[0]].concat();
        assert_eq!(check(&behind), Err(BatchError::Damaged));
        // A later weir reads it.
        let mut newer = body.clone();
        newer[4] += 1;
        assert_eq!(check(&newer), Err(BatchError::Version(newer[4])));
        newer[4] = u8::MAX;
        assert_eq!(check(&newer), Err(BatchError::Damaged));
    }

    proptest! {
        #[test]
        fn damage_is_found_and_never_panics(at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<prop::sample::Index>(), noise in proptest::collection::vec(any::<u8>(), 0..99)) {
            let (_, bytes) = boot().pack(&mut [events(&[60, 70])], Micros(66), 0);
            let mut damaged = bytes.clone();
            damaged[at.index(bytes.len())] ^= flip;
            prop_assert!(Batch::open(&damaged).is_err());
            prop_assert!(Batch::open(&bytes[..cut.index(bytes.len())]).is_err());
            prop_assert!(Batch::open(&noise).is_err());
        }
    }
}
