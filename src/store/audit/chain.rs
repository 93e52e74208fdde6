//! The chain of hashes over an instance's events, and the search for what breaks it. Pure: knows rows, not databases.
//!
//! Each row's hash is SHA-256, or with a key HMAC-SHA-256 (RFC 2104), over the hash of the row before, the sequence
//! number and the encoded event; the first row follows the instance's seal. The end mark authenticates the last number
//! and hash. A boot that goes on in the next day's file has a seal there that holds its last number and hash of the day
//! before, so that its chain runs through all files. Without a key this finds accidents and clumsy hands only: who knows the scheme can compute every hash
//! anew. With a key, one who lacks it can only put back an older state of the newest file.

use std::ops::RangeInclusive;

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::FaultKind;
use super::days::Day;

pub type Hash = [u8; 32];

/// Tells a file from another of the same name.
pub type FileId = [u8; 16];

/// How many hashes are kept as the possible predecessor of a row once the chain is damaged.
const CANDIDATES: usize = 8;

/// What hashes a chain: plain, or under a key.
#[derive(Clone)]
pub enum Hasher {
    Plain,
    Keyed(Box<Hmac<Sha256>>),
}

impl Hasher {
    pub fn new(key: Option<&[u8]>) -> Hasher {
        key.map_or(Hasher::Plain, |key| {
            let mac = Hmac::new_from_slice(key).expect("HMAC takes keys of every length");
            Hasher::Keyed(Box::new(mac))
        })
    }

    /// Tells this key from others without telling the key; `None` without one.
    pub fn key_check(&self) -> Option<Hash> {
        match self {
            Hasher::Plain => None,
            Hasher::Keyed(_) => Some(self.hash(b"k", &[])),
        }
    }

    /// The link of the event of this number behind `before`; `body` is its encoding.
    pub fn row(&self, before: &Hash, seq: u64, body: &[u8]) -> Hash {
        self.hash(b"r", &[before, &seq.to_be_bytes(), body])
    }

    /// Says that the chain that begins with `seal` ends with event `last`, and with `hash`.
    pub fn end_mark(&self, seal: &Hash, last: u64, hash: &Hash) -> Hash {
        self.hash(b"e", &[seal, &last.to_be_bytes(), hash])
    }

    /// What the instance's chain begins with in a file.
    pub fn seal(&self, file: &FileId, part: &InstancePart<'_>) -> Hash {
        let length = u64::try_from(part.boot.len()).unwrap_or(u64::MAX);
        // Days begin at 1 here, so that 0 is none.
        let from = part.from.map_or(0, |day| u64::from(day.0) + 1);
        let numbers = [part.id, part.started, from, part.before.last, length];
        let numbers = numbers.map(u64::to_be_bytes);
        let name = part.name.as_bytes();
        self.hash(
            b"i",
            &[
                file,
                numbers.as_flattened(),
                &part.before.hash,
                part.boot,
                name,
            ],
        )
    }

    /// Authenticates what a file says of itself: its day, its place among the files, how many instances it has known,
    /// and the file before it, encoded.
    pub fn ledger(&self, file: &FileId, day: Day, place: u64, known: u64, before: &[u8]) -> Hash {
        let numbers = [u64::from(day.0), place, known].map(u64::to_be_bytes);
        self.hash(b"c", &[file, numbers.as_flattened(), before])
    }

    /// Says in `file` that `other` followed it.
    pub fn followed(&self, file: &FileId, day: Day, other: &FileId) -> Hash {
        self.hash(b"n", &[file, &day.0.to_be_bytes(), other])
    }

    /// Says in `file` that retention removed `other`.
    pub fn removed(&self, file: &FileId, day: Day, place: u64, other: &FileId) -> Hash {
        let numbers = [u64::from(day.0), place].map(u64::to_be_bytes);
        self.hash(b"x", &[file, numbers.as_flattened(), other])
    }

    /// What the chain of a boot's batches begins with: `instance`, `boot` and when it began.
    pub fn boot(&self, instance: &str, boot: &[u8; 16], started: u64) -> Hash {
        self.hash(b"b", &[boot, &started.to_be_bytes(), instance.as_bytes()])
    }

    /// Of a batch of events behind the one that has the hash `before`.
    pub fn batch(&self, before: &Hash, of: &BatchPart<'_>) -> Hash {
        let numbers = [
            of.first,
            of.count,
            of.sealed,
            of.dropped,
            u64::from(of.is_end),
        ];
        let numbers = numbers.map(u64::to_be_bytes);
        self.hash(b"p", &[before, of.boot, numbers.as_flattened(), of.body])
    }

    /// Says that retention removed the events of a boot up to the number `last`, whose batch has this hash.
    pub fn removed_to(&self, boot: &[u8; 16], last: u64, hash: &Hash) -> Hash {
        self.hash(b"t", &[boot, &last.to_be_bytes(), hash])
    }

    /// The tag keeps what is hashed for one purpose from standing in for another.
    fn hash(&self, tag: &[u8; 1], parts: &[&[u8]]) -> Hash {
        match self {
            Hasher::Plain => {
                let mut digest = Sha256::new_with_prefix(tag);
                for part in parts {
                    digest.update(part);
                }
                digest.finalize().into()
            }
            Hasher::Keyed(mac) => {
                let mut mac = mac.clone();
                mac.update(tag);
                for part in parts {
                    mac.update(part);
                }
                mac.finalize().into_bytes().into()
            }
        }
    }
}

/// The keys under which an audit may have been written; each boot says which was its.
#[derive(Clone)]
pub struct Keys(Vec<Hasher>);

impl Keys {
    /// Without any, what was written without a key is checked.
    pub fn new(keys: &[&[u8]]) -> Keys {
        match keys.is_empty() {
            true => Keys(vec![Hasher::Plain]),
            false => Keys(keys.iter().map(|key| Hasher::new(Some(key))).collect()),
        }
    }

    /// That of this [`Hasher::key_check`].
    pub fn of(&self, check: Option<Hash>) -> Option<&Hasher> {
        self.all().find(|hasher| hasher.key_check() == check)
    }

    /// Each key that may have been used.
    pub fn all(&self) -> impl Iterator<Item = &Hasher> {
        self.0.iter()
    }
}

/// A row as it was found.
pub struct Found<'a> {
    pub seq: u64,
    pub body: &'a [u8],
    /// `None` if what stands there is not a hash.
    pub hash: Option<Hash>,
    /// The number within the body; `None` if the body is not an event.
    pub body_seq: Option<u64>,
    /// Whether what stands beside the body says the same as the body.
    pub columns_fit: bool,
    /// Whether the body is an event of a version that this weir cannot read.
    pub is_of_another_version: bool,
}

/// What an instance's seal covers: who it is, and where its chain goes on from.
pub struct InstancePart<'a> {
    /// Its number in the file.
    pub id: u64,
    pub name: &'a str,
    pub boot: &'a [u8],
    /// Microseconds since the Unix epoch.
    pub started: u64,
    /// The day of the file that holds what is before; `None` for a boot that began in this file.
    pub from: Option<Day>,
    pub before: End,
}

/// What the hash of a batch covers beside the one before.
pub struct BatchPart<'a> {
    pub boot: &'a [u8; 16],
    /// The number of its first event.
    pub first: u64,
    pub count: u64,
    /// Microseconds since the Unix epoch.
    pub sealed: u64,
    pub dropped: u64,
    pub is_end: bool,
    /// The encoded events, as [`super::batch`] puts them one behind the other.
    pub body: &'a [u8],
}

/// Where an instance's events end, as its end mark says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    pub last: u64,
    pub hash: Hash,
}

/// Walks the rows of one instance in the order of their numbers.
pub struct Check<'a> {
    hasher: &'a Hasher,
    /// The last number in the files before.
    before: u64,
    end: End,
    next: u64,
    /// What may be the hash before the next row; more than one after damage.
    candidates: Vec<Hash>,
    /// Whether one of the candidates must be it. Not so behind a gap: then the next row's link cannot be checked.
    linkable: bool,
    faults: Vec<(RangeInclusive<u64>, FaultKind)>,
}

impl<'a> Check<'a> {
    /// `before` is the last number in the files before.
    pub fn new(hasher: &'a Hasher, seal: Hash, before: u64, end: End) -> Check<'a> {
        Check {
            hasher,
            before,
            end,
            next: before.saturating_add(1),
            candidates: vec![seal],
            linkable: true,
            faults: Vec::new(),
        }
    }

    /// Takes the next row. `partner` is asked only for a row out of place: `partner(a, b)` is the hash that stands at
    /// number `a` if the body there has number `b`, so that of two swapped rows just those two are named.
    pub fn row(&mut self, row: &Found<'_>, partner: &mut dyn FnMut(u64, u64) -> Option<Hash>) {
        if row.seq < self.next || row.seq > self.end.last {
            self.fault(row.seq..=row.seq, FaultKind::OutOfPlace);
            self.candidates.extend(row.hash);
            return;
        }
        if row.seq > self.next {
            self.fault(self.next..=row.seq - 1, FaultKind::Missing);
            self.linkable = false;
        }
        self.next = row.seq.saturating_add(1);
        if row.body_seq.is_some_and(|within| within != row.seq) {
            self.fault(row.seq..=row.seq, FaultKind::OutOfPlace);
            let swapped = row.body_seq.and_then(|within| partner(within, row.seq));
            self.linkable = swapped.is_some();
            self.candidates.extend(row.hash);
            self.candidates.extend(swapped);
            self.bound_candidates();
            return;
        }
        let links = self
            .candidates
            .iter()
            .map(|before| self.hasher.row(before, row.seq, row.body));
        let links = links.collect::<Vec<_>>();
        let linked = row.hash.is_some_and(|hash| links.contains(&hash));
        if row.body_seq.is_some()
            && row.columns_fit
            && row.hash.is_some()
            && (linked || !self.linkable)
        {
            self.candidates.clear();
        } else {
            let kind = match row.is_of_another_version && linked {
                true => FaultKind::Version,
                false => FaultKind::Changed,
            };
            self.fault(row.seq..=row.seq, kind);
            // Either the hash is still the right one, or all but the hash is.
            self.candidates = links;
        }
        self.candidates.extend(row.hash);
        self.linkable = true;
        self.bound_candidates();
    }

    /// All rows were seen.
    pub fn finish(mut self) -> Vec<(RangeInclusive<u64>, FaultKind)> {
        let last = self.end.last;
        if self.next <= last {
            self.fault(self.next..=last, FaultKind::TailMissing);
        } else if self.linkable && !self.candidates.contains(&self.end.hash) {
            let kind = if last == self.before {
                FaultKind::EndMark
            } else {
                FaultKind::Changed
            };
            self.fault(last..=last, kind);
        }
        self.faults
    }

    fn fault(&mut self, seqs: RangeInclusive<u64>, kind: FaultKind) {
        let fault = (seqs, kind);
        if self.faults.last() != Some(&fault) {
            self.faults.push(fault);
        }
    }

    fn bound_candidates(&mut self) {
        let surplus = self.candidates.len().saturating_sub(CANDIDATES);
        self.candidates.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone)]
    struct Row {
        seq: u64,
        body: Vec<u8>,
        hash: Hash,
    }

    fn seal(hasher: &Hasher) -> Hash {
        let part = InstancePart {
            id: 1,
            name: "a",
            boot: b"boot",
            started: 0,
            from: None,
            before: End::default(),
        };
        hasher.seal(&[3; 16], &part)
    }

    /// A body is its number as a byte, then whatever.
    fn chain(hasher: &Hasher, length: u64) -> (Vec<Row>, End) {
        let mut hash = seal(hasher);
        let mut rows = Vec::new();
        for seq in 1..=length {
            let body = vec![u8::try_from(seq).unwrap(), 7, 7];
            hash = hasher.row(&hash, seq, &body);
            rows.push(Row { seq, body, hash });
        }
        (rows, End { last: length, hash })
    }

    fn verify(hasher: &Hasher, rows: &[Row], end: End) -> Vec<(RangeInclusive<u64>, FaultKind)> {
        let mut check = Check::new(hasher, seal(hasher), 0, end);
        for row in rows {
            let found = Found {
                seq: row.seq,
                body: &row.body,
                hash: Some(row.hash),
                body_seq: row.body.first().copied().map(u64::from),
                columns_fit: true,
                is_of_another_version: false,
            };
            check.row(&found, &mut |at, within| {
                let row = rows.iter().find(|row| row.seq == at)?;
                (u64::from(row.body[0]) == within).then_some(row.hash)
            });
        }
        check.finish()
    }

    fn one(seq: u64, kind: FaultKind) -> (RangeInclusive<u64>, FaultKind) {
        (seq..=seq, kind)
    }

    #[test]
    fn a_row_of_another_version_is_not_checked_and_none_is_hidden_by_it() {
        let hasher = Hasher::new(Some(b"k"));
        let check = |is_changed: bool| {
            let (mut rows, end) = chain(&hasher, 3);
            rows[1].body[2] ^= u8::from(is_changed);
            let mut check = Check::new(&hasher, seal(&hasher), 0, end);
            for row in &rows {
                let other = row.seq == 2;
                let found = Found {
                    seq: row.seq,
                    body: &row.body,
                    hash: Some(row.hash),
                    body_seq: (!other).then_some(row.seq),
                    columns_fit: !other,
                    is_of_another_version: other,
                };
                check.row(&found, &mut |_, _| None);
            }
            check.finish()
        };
        assert_eq!(check(false), [one(2, FaultKind::Version)]);
        assert_eq!(check(true), [one(2, FaultKind::Changed)]);
    }

    proptest! {
        #[test]
        fn just_the_damaged_rows_are_named(at in 1u64..40, other in 1u64..40, key in any::<Option<[u8; 4]>>()) {
            let hasher = Hasher::new(key.as_ref().map(<[u8; 4]>::as_slice));
            let (rows, _) = chain(&hasher, 40);
            let end = || chain(&hasher, 40).1;
            let (index, partner) = (at as usize - 1, other as usize - 1);
            prop_assert_eq!(verify(&hasher, &rows, end()), vec![]);

            let mut changed = rows.clone();
            changed[index].body[2] = 8;
            prop_assert_eq!(verify(&hasher, &changed, end()), vec![one(at, FaultKind::Changed)]);

            let mut rehashed = rows.clone();
            rehashed[index].hash[0] ^= 1;
            prop_assert_eq!(verify(&hasher, &rehashed, end()), vec![one(at, FaultKind::Changed)]);

            let mut gone = rows.clone();
            gone.remove(index);
            prop_assert_eq!(verify(&hasher, &gone, end()), vec![one(at, FaultKind::Missing)]);

            let cut = &rows[..index];
            prop_assert_eq!(verify(&hasher, cut, end()), vec![(at..=40, FaultKind::TailMissing)]);

            if at != other {
                let swap = [one(at.min(other), FaultKind::OutOfPlace), one(at.max(other), FaultKind::OutOfPlace)];
                let mut numbers = rows.clone();
                numbers.swap(index, partner);
                numbers[index].seq = at;
                numbers[partner].seq = other;
                prop_assert_eq!(verify(&hasher, &numbers, end()), swap.to_vec());
                let mut bodies = rows.clone();
                bodies[index].body = rows[partner].body.clone();
                bodies[partner].body = rows[index].body.clone();
                prop_assert_eq!(verify(&hasher, &bodies, end()), swap.to_vec());
            }
        }
    }

    #[test]
    fn each_of_many_changed_rows_is_named() {
        let hasher = Hasher::new(None);
        let (mut rows, end) = chain(&hasher, 9);
        for index in [3, 4, 5, 8] {
            rows[index].body[2] = 8;
        }
        let expected = [4, 5, 6, 9].map(|seq| one(seq, FaultKind::Changed));
        assert_eq!(verify(&hasher, &rows, end), expected);
    }

    #[test]
    fn an_event_behind_the_end_is_out_of_place() {
        let hasher = Hasher::new(Some(b"key"));
        let (mut rows, end) = chain(&hasher, 3);
        rows.push(Row {
            seq: 9,
            body: vec![9],
            hash: [0; 32],
        });
        assert_eq!(verify(&hasher, &rows, end), [one(9, FaultKind::OutOfPlace)]);
    }

    #[test]
    fn without_the_key_no_row_can_be_forged() {
        let (rows, _) = chain(&Hasher::Plain, 1);
        let hasher = Hasher::new(Some(b"key"));
        let (_, end) = chain(&hasher, 1);
        assert_eq!(verify(&hasher, &rows, end), [one(1, FaultKind::Changed)]);
    }
}
