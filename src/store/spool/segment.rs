//! The bytes of a segment: how records lie in one, and how they are found whatever became of it. Does no I/O.
//!
//! A segment is [`HEAD`] and records, one behind the other. A record is the segment's [`Marker`], the length of its payload
//! (`u32`, little-endian), the CRC-32 of marker, length and payload (little-endian), and the payload.
//!
//! The marker is there for the search behind damage: by length and checksum alone, a client whose text is in a payload could
//! put a record there to be found, and each byte that looks like a length would cost a checksum over megabytes.

use std::ops::Range;

use uuid::Uuid;

/// What a segment begins with; the last byte is the version.
pub(super) const HEAD: &[u8; 8] = b"weirspl\x01";
/// Of [`HEAD`], before the version.
const NAME: usize = 7;
/// Of what stands before a payload.
pub(super) const RECORD_HEAD: usize = 12;
/// Bytes of a payload, at most.
pub(super) const LONGEST: usize = 256 << 20;

/// What each record of one segment begins with, and no other segment's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marker([u8; 4]);

/// What a segment was found to hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    /// Of the payloads of whole records, in order.
    pub payloads: Vec<Range<usize>>,
    /// What belongs to no whole record, in order.
    pub gaps: Vec<Range<usize>>,
}

impl Marker {
    pub(super) fn of(boot: Uuid, segment: u32) -> Marker {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(boot.as_bytes());
        hasher.update(&segment.to_le_bytes());
        Marker(hasher.finalize().to_le_bytes())
    }
}

/// Puts a record behind others. `payload` is no longer than [`LONGEST`].
pub(super) fn put(bytes: &mut Vec<u8>, marker: Marker, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("a payload is bounded");
    bytes.extend_from_slice(&marker.0);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&checksum(marker, length, payload));
    bytes.extend_from_slice(payload);
}

/// The payload of the record that begins there, if it is whole.
pub(super) fn payload_at(bytes: &[u8], at: usize, marker: Marker) -> Option<Range<usize>> {
    let record = bytes.get(at..)?;
    let (found, rest) = record.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length);
    let payload = rest.get(..length as usize)?;
    let is_whole = *found == marker.0 && *sum == checksum(marker, length, payload);
    let start = at + RECORD_HEAD;
    is_whole.then(|| start..start + payload.len())
}

/// Whether this is whole records and no more.
pub(super) fn is_whole(mut bytes: &[u8], marker: Marker) -> bool {
    while let Some(payload) = payload_at(bytes, 0, marker) {
        bytes = &bytes[payload.end..];
    }
    bytes.is_empty()
}

/// Every whole record of a segment, and what else is in it. Never panics.
pub(super) fn scan(bytes: &[u8], marker: Marker) -> Contents {
    let mut contents = Contents::default();
    // To the end of the last whole record.
    let mut known = match bytes.starts_with(HEAD) {
        true => HEAD.len(),
        false => 0,
    };
    let mut at = known;
    while at < bytes.len() {
        let Some(payload) = payload_at(bytes, at, marker) else {
            at = search(bytes, at + 1, marker);
            continue;
        };
        if known < at {
            contents.gaps.push(known..at);
        }
        known = payload.end;
        at = payload.end;
        contents.payloads.push(payload);
    }
    if known < bytes.len() {
        contents.gaps.push(known..bytes.len());
    }
    contents
}

/// The version of a segment that only another weir can read. Asked of one without a whole record: where there is one, the version
/// itself is what is damaged.
pub(super) fn other_version(bytes: &[u8]) -> Option<u8> {
    let head = bytes.get(..HEAD.len())?;
    (head != HEAD && head[..NAME] == HEAD[..NAME]).then_some(head[NAME])
}

/// Where the next marker is; the end without one.
fn search(bytes: &[u8], from: usize, marker: Marker) -> usize {
    let rest = bytes.get(from..).unwrap_or_default();
    let found = rest.windows(4).position(|window| window == marker.0);
    found.map_or(bytes.len(), |found| from + found)
}

fn checksum(marker: Marker, length: u32, payload: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&marker.0);
    hasher.update(&length.to_le_bytes());
    hasher.update(payload);
    hasher.finalize().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    const BOOT: Uuid = Uuid::from_bytes([7; 16]);

    /// A segment of these payloads, and where each record is.
    fn segment(marker: Marker, payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
        let mut bytes = HEAD.to_vec();
        let records = payloads.iter().map(|payload| {
            let start = bytes.len();
            put(&mut bytes, marker, payload);
            start..bytes.len()
        });
        let records = records.collect();
        (bytes, records)
    }

    fn found(bytes: &[u8], contents: &Contents) -> Vec<Vec<u8>> {
        let payloads = contents.payloads.iter().cloned();
        payloads.map(|payload| bytes[payload].to_vec()).collect()
    }

    #[test]
    fn a_segment_tells_its_records_from_those_of_others() {
        let marker = Marker::of(BOOT, 1);
        let mut inner = Vec::new();
        put(&mut inner, Marker::of(BOOT, 2), b"of another segment");
        let (mut bytes, _) = segment(marker, &[b"one".to_vec(), inner, Vec::new()]);
        assert_eq!(scan(&bytes, marker).payloads.len(), 3);
        assert!(scan(&bytes, marker).gaps.is_empty());
        // With the second record's length damaged, what a client has put into it is not taken for a record.
        bytes[HEAD.len() + RECORD_HEAD + 3 + 4] ^= 1;
        assert_eq!(
            found(&bytes, &scan(&bytes, marker)),
            [b"one".to_vec(), vec![]]
        );
        assert_eq!(scan(&bytes, marker).gaps.len(), 1);
    }

    #[test]
    fn what_a_power_cut_leaves_of_a_tail_is_no_record() {
        let marker = Marker::of(BOOT, 1);
        let (bytes, records) = segment(marker, &[vec![1; 99], vec![2; 99]]);
        for cut in records[1].start + 1..records[1].end {
            let contents = scan(&bytes[..cut], marker);
            assert_eq!(contents.payloads.len(), 1);
            assert_eq!(
                (contents.gaps.len(), &contents.gaps[0]),
                (1, &(records[1].start..cut))
            );
            // The length is written before the blocks are.
            let mut zeros = bytes.clone();
            zeros[cut..].fill(0);
            assert_eq!(scan(&zeros, marker).gaps, records[1..]);
        }
        for cut in 0..HEAD.len() {
            assert!(scan(&bytes[..cut], marker).payloads.is_empty());
        }
    }

    proptest! {
        #[test]
        fn every_record_that_is_not_damaged_is_found_in_order(
            payloads in vec(vec(any::<u8>(), 0..200), 1..20),
            flips in vec((any::<Index>(), 1u8..), 0..6),
            removed in (any::<Index>(), 0usize..300),
            length in any::<Index>(),
        ) {
            let marker = Marker::of(BOOT, 3);
            let (mut bytes, records) = segment(marker, &payloads);
            let mut damaged = vec![false; bytes.len()];
            for (at, flip) in flips {
                let at = at.index(bytes.len());
                bytes[at] ^= flip;
                damaged[at] = true;
            }
            let removed = {
                let start = removed.0.index(bytes.len());
                start..(start + removed.1).min(bytes.len())
            };
            damaged[removed.clone()].fill(true);
            // Some of the time, little is left.
            let end = length.index(2 * bytes.len()).max(HEAD.len()).min(bytes.len());
            damaged[end..].fill(true);
            bytes.truncate(end);
            bytes.drain(removed.start.min(end)..removed.end.min(end));
            let whole = records.iter().zip(&payloads);
            let whole = whole.filter(|(record, _)| !damaged[(*record).clone()].contains(&true));
            let whole: Vec<_> = whole.map(|(_, payload)| payload.clone()).collect();
            let contents = scan(&bytes, marker);
            let found = found(&bytes, &contents);
            // Flips of one byte can undo each other: more may be whole than is known here.
            let mut rest = found.iter();
            prop_assert!(whole.iter().all(|payload| rest.any(|found| found == payload)));
            prop_assert!(found.iter().all(|payload| payloads.contains(payload)));
            let covered: usize = contents.gaps.iter().map(Range::len).sum();
            let held: usize = contents.payloads.iter().map(|payload| payload.len() + RECORD_HEAD).sum();
            prop_assert!([bytes.len(), bytes.len().saturating_sub(HEAD.len())].contains(&(covered + held)));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..300), at in any::<Index>()) {
            let marker = Marker::of(BOOT, 3);
            let mut noise = bytes.clone();
            noise.splice(at.index(bytes.len() + 1)..at.index(bytes.len() + 1), marker.0);
            scan(&bytes, marker);
            scan(&noise, marker);
        }
    }
}
