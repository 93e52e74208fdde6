//! What a boot left in the spool whose process is gone: its records, in order. Writes nothing into its segments, so that whoever
//! reads them next finds the same.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::{fs, vec};

use uuid::Uuid;

use super::folder::Folder;
use super::segment::{self, RECORD_HEAD};
use super::{Place, SpoolError};

/// `EIO`: what a disk says of a block that it cannot read.
const UNREADABLE: i32 = 5;

/// The records of a boot whose process is gone. While it lives no other process takes them over; dropped without
/// [`Abandoned::remove`], the next one does, and finds all that is not in a deleted segment.
pub struct Abandoned {
    pub boot: Uuid,
    /// What was found so far.
    pub damage: Damage,
    folder: Folder,
    unread: VecDeque<u32>,
    open: Option<Open>,
    /// Whether there is, or was, something behind the last record that was found.
    has_lost_tail: bool,
}

/// What is lost of a folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Damage {
    /// Last records that are not whole: they were being written when the process or the machine stopped, and never synced. What
    /// the disk has damaged since looks the same.
    pub torn: u64,
    /// Stretches that were damaged otherwise, each of a record or more. Their segments stay beside the folder as
    /// `BOOT.NUMBER.corrupt`, for people to look at and delete.
    pub stretches: u64,
}

/// A segment that is being read.
struct Open {
    number: u32,
    bytes: Vec<u8>,
    payloads: vec::IntoIter<Range<usize>>,
}

impl Abandoned {
    pub(super) fn of(folder: Folder) -> Abandoned {
        Abandoned {
            boot: folder.boot,
            damage: Damage::default(),
            unread: folder.segments.keys().copied().collect(),
            open: None,
            has_lost_tail: false,
            folder,
        }
    }

    /// The next record; `None` behind the last. The last record of the boot is always there, unless damaged. Holds one segment in
    /// memory.
    ///
    /// After an error it tries the same segment again, unless the disk cannot read it: that one counts as damaged. A segment of
    /// another version stays an error, and so does a copy of the folder in its place.
    pub fn next_record(&mut self) -> Result<Option<(Place, Vec<u8>)>, SpoolError> {
        loop {
            if let Some(open) = &mut self.open {
                if let Some(payload) = open.payloads.next() {
                    return Ok(Some((open.place(&payload), open.bytes[payload].to_vec())));
                }
                self.open = None;
            }
            let Some(number) = self.unread.front().copied() else {
                return Ok(None);
            };
            self.open = self.open(number)?;
            self.unread.pop_front();
        }
    }

    fn open(&mut self, number: u32) -> Result<Option<Open>, SpoolError> {
        let path = self.folder.file(number);
        let read = || fs::read(&path).map_err(SpoolError::io("read", &path));
        let read = self.folder.read_here(read);
        if !self.folder.is_ours() {
            // What is there may be half a copy. Who takes it over once it is whole reads it.
            return Err(SpoolError::Away(self.folder.path.clone()));
        }
        let bytes = match read {
            Ok(bytes) => Some(bytes),
            Err(error) if error.is_lost() => None,
            Err(error) => return Err(error),
        };
        // A segment is synced before another is begun: only the newest can have been torn.
        let is_newest = self.unread.len() == 1;
        let marker = self.folder.marker(number);
        let segment = self.folder.segments.entry(number).or_default();
        let Some(bytes) = bytes else {
            segment.is_damaged = true;
            self.damage.stretches += 1;
            self.has_lost_tail = is_newest;
            return Ok(None);
        };
        let contents = segment::scan(&bytes, marker);
        if contents.payloads.is_empty()
            && let Some(version) = segment::other_version(&bytes)
        {
            return Err(SpoolError::Version(path, version));
        }
        let torn = |gap: &&Range<usize>| is_newest && gap.end == bytes.len();
        let torn = contents.gaps.iter().filter(torn).count();
        let damaged = contents.gaps.len() - torn;
        self.has_lost_tail = torn > 0;
        self.damage.torn += torn as u64;
        self.damage.stretches += damaged as u64;
        segment.is_damaged = damaged > 0;
        segment.live = contents.payloads.len();
        if segment.live > 0 {
            self.folder.anchor = number;
        }
        Ok(Some(Open {
            number,
            bytes,
            payloads: contents.payloads.into_iter(),
        }))
    }

    /// A record that was given, again.
    pub fn read(&self, place: &Place) -> Result<Vec<u8>, SpoolError> {
        self.folder.read(place)
    }

    /// A record that was given is done with. As [`Spool::release`](super::Spool::release).
    pub fn release(&mut self, place: Place) -> Result<(), SpoolError> {
        self.folder.release(place.segment)
    }

    /// Whether the boot put all of its records here, and nothing was found behind the last one: then that is its last. To be asked once
    /// all are read.
    pub fn is_complete(&self) -> bool {
        self.folder.is_vouched() && !self.has_lost_tail
    }

    /// Of its segments.
    pub fn bytes(&self) -> u64 {
        self.folder.bytes()
    }

    /// All is done with: deletes the folder.
    pub fn remove(self) -> Result<(), SpoolError> {
        self.folder.remove()
    }
}

impl Open {
    fn place(&self, payload: &Range<usize>) -> Place {
        Place {
            segment: self.number,
            offset: (payload.start - RECORD_HEAD) as u64,
            length: payload.len() as u32,
            serial: 0,
        }
    }
}

/// Whether reading again would say the same.
pub(super) fn is_lost(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(UNREADABLE)
}
