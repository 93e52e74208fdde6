//! The spool: the folder on disk where batches wait that are not stored yet. Owns its files. Does not know what a record is.
//!
//! `PATH/BOOT/` is the folder of one boot of a process, which holds the lock on `PATH/BOOT/lock` for as long as it lives. The
//! kernel lets go of that however a process ends; the next one takes the folder over. Records lie in segments of about 8 MiB,
//! `00000001.seg` and on ([`segment`] says how); a segment is deleted once all its records are released and a later one has a
//! record that is synced, so that the last record of a boot is there for as long as its folder is. Nothing is ever written to
//! the folder of another boot.
//!
//! What is synced survives the end of the process and a power cut. What is only appended survives the end of the process, by
//! `SIGKILL` too. A release survives neither: a record may be found again, never lost.
//!
//! Measured by `cargo bench --bench spool` on 2 cores of a virtual machine and its disk, ext4: records a second that
//! are appended, synced in groups, and released, and the time that a sync takes in the middle:
//!
//! | bytes of a record | groups of 1 | of 10 | of 100 | of 1,000 |
//! |---|---|---|---|---|
//! | 64 | 8,200, 108 µs | 69,000, 116 µs | 339,000, 173 µs | 760,000, 254 µs |
//! | 1,000 | 8,000, 116 µs | 57,000, 143 µs | 225,000, 214 µs | 343,000, 889 µs |
//! | 20,000 | 5,500, 152 µs | 22,000, 242 µs | 31,000, 1.4 ms | 32,000, 2.8 ms |
//!
//! No crate does this. `yaque` (last released in 2023) takes records in order alone and writes its state when it is dropped;
//! `okaywal` (2023, "do not use in any production projects") gives up space in order, by checkpoints; `segment-buffer` writes a
//! file a batch, releases in order, and loses a damaged file whole; `queue-file` is one file, first in first out;
//! `disk_backed_queue` is SQLite. None releases in any order, searches on behind damage, and takes over what another left.

mod abandoned;
mod folder;
mod segment;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use thiserror::Error;
use tracing::warn;
use uuid::Uuid;

pub use self::abandoned::{Abandoned, Damage};
use self::folder::Folder;
use self::segment::{HEAD, LONGEST, RECORD_HEAD};
use crate::clock;

/// Bytes of a segment, unless a single record takes more.
const SEGMENT: u64 = 8 << 20;
/// The newest segment stays even when nothing in it is needed: it may be this part of a small spool, at most.
const SHARE: u64 = 8;

/// Where a boot's records wait. One thread's: nothing in it is shared.
pub struct Spool {
    root: PathBuf,
    folder: Folder,
    max: u64,
    /// Bytes of all folders that the process holds.
    used: Arc<AtomicU64>,
    /// The segment that is written to; `None` before the first record, and where one is full and the next has failed to come.
    newest: Option<Newest>,
    /// Of the segment after the newest.
    next: u32,
    /// When each record came that is not released, by its serial number.
    times: BTreeMap<u64, Duration>,
    /// Serial number of the next record.
    serial: u64,
    buffer: Vec<u8>,
}

/// Where a record is, until it is released.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    segment: u32,
    offset: u64,
    /// Of the payload.
    length: u32,
    /// Counts the records of a spool.
    serial: u64,
}

/// Why a spool takes or gives back nothing.
#[derive(Debug, Error)]
pub enum SpoolError {
    #[error(
        "spool is full: its {0} bytes are taken; raise audit.spool.max, or see why events are not stored"
    )]
    Full(u64),
    #[error("record of {0} bytes is too long for the spool, which takes {LONGEST}")]
    TooLong(usize),
    #[error("{0} has version {1}, which another weir wrote; it waits for that")]
    Version(PathBuf, u8),
    #[error("record at byte {1} of {0} is damaged")]
    Damaged(PathBuf, u64),
    #[error("{0} was removed while it was written to; restart weir")]
    Removed(PathBuf),
    #[error("{0} was moved or removed; bring it back, and restart weir if it is a copy")]
    Away(PathBuf),
    #[error("cannot {doing} {path}: {error}; look at the disk and at who owns audit.spool.path")]
    Io {
        doing: &'static str,
        path: PathBuf,
        error: io::Error,
    },
}

/// The segment that records are appended to.
struct Newest {
    number: u32,
    file: File,
    /// To the end of the last record.
    length: u64,
    /// What a power cut leaves.
    synced: u64,
    /// Whether bytes of a record that failed are behind the last one.
    is_torn: bool,
    /// Whether the last sync failed. The kernel then takes what was not written for clean (see "PostgreSQL's fsync() surprise",
    /// lwn.net/Articles/752063), and would report success the next time.
    is_unsure: bool,
}

impl Spool {
    /// A folder for this boot, and what boots left that ended before all of theirs was stored, the oldest first. No other
    /// process takes that over as long as this one has it. `max` is a number of bytes over all of it.
    pub fn open(root: &Path, max: u64, boot: Uuid) -> Result<(Spool, Vec<Abandoned>), SpoolError> {
        let used = Arc::new(AtomicU64::new(0));
        let folder = {
            folder::make(root)?;
            let _gate = folder::gate(root)?;
            Folder::create(root, boot, used.clone())?
        };
        let spool = Spool {
            root: root.to_owned(),
            folder,
            max,
            used,
            newest: None,
            next: 1,
            times: BTreeMap::new(),
            serial: 0,
            buffer: Vec::new(),
        };
        let abandoned = spool.adopt()?;
        Ok((spool, abandoned))
    }

    /// What boots have left since. A folder that cannot be read is left alone, and logged.
    pub fn adopt(&self) -> Result<Vec<Abandoned>, SpoolError> {
        let _gate = folder::gate(&self.root)?;
        let mut abandoned = Vec::new();
        let boots = folder::boots(&self.root)?;
        for boot in boots.into_iter().filter(|boot| *boot != self.folder.boot) {
            match Folder::take_over(&self.root, boot, self.used.clone()) {
                Ok(folder) => abandoned.extend(folder.map(Abandoned::of)),
                Err(error) => warn!(%boot, "spool of a boot that ended is left alone: {error}"),
            }
        }
        Ok(abandoned)
    }

    /// One write. After an error all is as it was, and the same record can be tried again.
    pub fn append(&mut self, payload: &[u8]) -> Result<Place, SpoolError> {
        if payload.len() > LONGEST {
            return Err(SpoolError::TooLong(payload.len()));
        }
        let record = (RECORD_HEAD + payload.len()) as u64;
        if self.room() < record + HEAD.len() as u64 {
            return Err(SpoolError::Full(self.max));
        }
        let size = SEGMENT.min(self.max / SHARE);
        if let Some(newest) = &self.newest
            && newest.length + record > size
        {
            // Synced before another is begun: after a power cut, only the newest can be torn.
            self.sync()?;
            self.newest = None;
        }
        self.buffer.clear();
        let (number, offset) = match &mut self.newest {
            Some(newest) => {
                newest.mend(&self.folder)?;
                (newest.number, newest.length)
            }
            None => {
                self.buffer.extend_from_slice(HEAD);
                (self.next, HEAD.len() as u64)
            }
        };
        segment::put(&mut self.buffer, self.folder.marker(number), payload);
        match &mut self.newest {
            Some(newest) => newest.write(&self.buffer, &self.folder)?,
            None => {
                self.newest = Some(Newest::begin(number, &self.buffer, &self.folder)?);
                self.next += 1;
            }
        }
        self.folder.add(number, self.buffer.len() as u64, 1);
        // A payload may be large once.
        self.buffer.shrink_to(SEGMENT as usize);
        let serial = self.serial;
        self.serial += 1;
        self.times.insert(serial, clock::mono());
        Ok(Place {
            segment: number,
            offset,
            length: payload.len() as u32,
            serial,
        })
    }

    /// What is appended survives a power cut. After an error it may not; the next call writes it anew. After
    /// [`SpoolError::Damaged`] and [`SpoolError::Removed`] it cannot: what was appended since the last sync is to be appended again.
    pub fn sync(&mut self) -> Result<(), SpoolError> {
        let Some(newest) = &mut self.newest else {
            return Ok(());
        };
        let number = newest.number;
        match newest.sync(&self.folder) {
            Ok(()) => {}
            Err(error @ (SpoolError::Damaged(..) | SpoolError::Removed(_))) => {
                self.newest = None;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        self.folder.anchor = number;
        // What cannot be deleted now is tried again by the next release, which says so.
        let _ = self.folder.tidy();
        Ok(())
    }

    /// From here on all that the boot makes is put here: who takes the folder over is told so.
    pub fn vouch(&mut self) -> Result<(), SpoolError> {
        self.folder.vouch()
    }

    /// Something is to go past the spool. Works on a disk that is full, too.
    pub fn unvouch(&mut self) -> Result<(), SpoolError> {
        self.folder.unvouch()
    }

    /// The payload of a record.
    pub fn read(&self, place: &Place) -> Result<Vec<u8>, SpoolError> {
        self.folder.read(place)
    }

    /// Tells of which places the segment is gone.
    pub fn gone(&self) -> impl Fn(&Place) -> bool + use<> {
        let all = self.folder.segments.keys().copied();
        let gone: BTreeSet<_> = all
            .filter(|number| !self.folder.file(*number).exists())
            .collect();
        move |place| gone.contains(&place.segment)
    }

    /// Whether its folder is where it was made: the next process finds there what was synced.
    pub fn is_there(&self) -> bool {
        self.folder.is_ours()
    }

    /// A record is done with, in whatever order. An error says that a segment could not be deleted; it is tried again with the
    /// next release.
    pub fn release(&mut self, place: Place) -> Result<(), SpoolError> {
        self.times.remove(&place.serial);
        self.folder.release(place.segment)
    }

    /// On disk, of all folders that the process holds.
    pub fn bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes until it is full.
    pub fn room(&self) -> u64 {
        self.max.saturating_sub(self.bytes())
    }

    /// Of this boot, not released.
    pub fn records(&self) -> usize {
        self.times.len()
    }

    /// How long the oldest record of this boot has waited.
    pub fn oldest_age(&self) -> Option<Duration> {
        let (_, came) = self.times.first_key_value()?;
        Some(clock::mono().saturating_sub(*came))
    }

    /// All is stored, and nothing follows: deletes the boot's folder.
    pub fn remove(self) -> Result<(), SpoolError> {
        self.folder.remove()
    }
}

impl Newest {
    /// A new segment, which begins with these bytes. After an error there is none, or one without a whole record.
    fn begin(number: u32, bytes: &[u8], folder: &Folder) -> Result<Newest, SpoolError> {
        let path = folder.file(number);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.mode(0o600).open(&path);
        let file = file.map_err(SpoolError::io("create", &path))?;
        if !folder.is_ours() {
            // Without the lock that is held another process may take it over.
            let _ = fs::remove_file(&path);
            return Err(SpoolError::Away(folder.path.clone()));
        }
        let mut newest = Newest {
            number,
            file,
            length: 0,
            synced: 0,
            is_torn: false,
            is_unsure: false,
        };
        newest.write(bytes, folder).inspect_err(|_| {
            // Without a whole record it would only be in the way.
            let _ = fs::remove_file(&path);
        })?;
        Ok(newest)
    }

    fn write(&mut self, bytes: &[u8], folder: &Folder) -> Result<(), SpoolError> {
        match self.file.write_all_at(bytes, self.length) {
            Ok(()) => {
                self.length += bytes.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.is_torn = true;
                // Where this fails too, the next append tries again.
                let _ = self.mend(folder);
                Err(SpoolError::io("write", &folder.file(self.number))(error))
            }
        }
    }

    /// Cuts off what a write that failed has left.
    fn mend(&mut self, folder: &Folder) -> Result<(), SpoolError> {
        if self.is_torn {
            let cut = self.file.set_len(self.length);
            cut.map_err(SpoolError::io("cut", &folder.file(self.number)))?;
            self.is_torn = false;
        }
        Ok(())
    }

    fn sync(&mut self, folder: &Folder) -> Result<(), SpoolError> {
        if self.synced == self.length {
            return Ok(());
        }
        if self.is_unsure {
            self.rewrite(folder)?;
        }
        self.is_unsure = true;
        let path = folder.file(self.number);
        self.file
            .sync_data()
            .map_err(SpoolError::io("sync", &path))?;
        // The kernel syncs what someone has removed, too, and no one finds it again.
        let metadata = self.file.metadata();
        let links = metadata.map_err(SpoolError::io("look at", &path))?.nlink();
        if links == 0 && !folder::is_at(&self.file, &path) {
            return Err(SpoolError::Removed(path));
        }
        if self.synced == 0 {
            folder::sync_folder(&folder.path)?;
        }
        self.is_unsure = false;
        self.synced = self.length;
        Ok(())
    }

    /// Writes anew what is not known to be synced, so that the kernel knows that it is to be written.
    fn rewrite(&mut self, folder: &Folder) -> Result<(), SpoolError> {
        let path = folder.file(self.number);
        let mut bytes = vec![0; (self.length - self.synced) as usize];
        let read = self.file.read_exact_at(&mut bytes, self.synced);
        read.map_err(SpoolError::io("read", &path))?;
        // The kernel may have dropped what it could not write, and have read the disk.
        let start = if self.synced == 0 { HEAD.len() } else { 0 };
        let records = bytes.get(start..).unwrap_or_default();
        if !segment::is_whole(records, folder.marker(self.number)) {
            return Err(SpoolError::Damaged(path, self.synced));
        }
        let written = self.file.write_all_at(&bytes, self.synced);
        written.map_err(SpoolError::io("write", &path))
    }
}

impl SpoolError {
    /// Whether what was to be read is gone, rather than out of reach for now.
    pub fn is_lost(&self) -> bool {
        match self {
            SpoolError::Damaged(..) | SpoolError::Removed(_) => true,
            SpoolError::Io { error, .. } => abandoned::is_lost(error),
            SpoolError::Full(_)
            | SpoolError::TooLong(_)
            | SpoolError::Version(..)
            | SpoolError::Away(_) => false,
        }
    }

    /// For `map_err`.
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
        move |error| SpoolError::Io {
            doing,
            path: path.to_owned(),
            error,
        }
    }
}

#[cfg(test)]
mod tests;
