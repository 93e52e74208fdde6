//! A boot's folder: its lock, its segments, and which of them are no longer needed. Does not know what is being written.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use uuid::Uuid;

use super::segment::{self, Marker, RECORD_HEAD};
use super::{Place, SpoolError};
use crate::clock;

const LOCK: &str = "lock";
const ENDING: &str = "seg";
/// Is there while all that the boot has made is in the folder.
const VOUCHER: &str = "complete";
/// How long a copy of a folder that was removed is waited for.
const PATIENCE: Duration = Duration::from_secs(600);

/// A boot's folder, locked until this is dropped.
pub(super) struct Folder {
    pub(super) boot: Uuid,
    pub(super) path: PathBuf,
    /// By number, which is the order of their records.
    pub(super) segments: BTreeMap<u32, Segment>,
    /// The latest segment known to have a record that a power cut leaves. Those before it may go, it may not.
    pub(super) anchor: u32,
    /// Bytes of the segments of all folders of the process.
    used: Arc<AtomicU64>,
    lock: File,
    /// Of the process's clock: when what is missing counts as lost, where the folder was removed, be it behind a copy.
    pub(super) lost_at: Cell<Option<Duration>>,
}

/// A segment's file.
#[derive(Debug, Default)]
pub(super) struct Segment {
    pub(super) bytes: u64,
    /// Records that are not released.
    pub(super) live: usize,
    /// Whether its file is to be kept for people to look at.
    pub(super) is_damaged: bool,
}

impl Folder {
    /// A folder for a boot that begins. The [`gate`] is held.
    pub(super) fn create(
        root: &Path,
        boot: Uuid,
        used: Arc<AtomicU64>,
    ) -> Result<Folder, SpoolError> {
        let path = root.join(boot.to_string());
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(SpoolError::io("create", &path))?;
        let Some(lock) = lock(&path)? else {
            let error = io::Error::from(io::ErrorKind::WouldBlock);
            return Err(SpoolError::io("lock", &path)(error));
        };
        sync_folder(root)?;
        Ok(Folder::of(boot, path, used, lock))
    }

    /// The folder of another boot, if its process is gone. One without segments is removed. The [`gate`] is held.
    pub(super) fn take_over(
        root: &Path,
        boot: Uuid,
        used: Arc<AtomicU64>,
    ) -> Result<Option<Folder>, SpoolError> {
        let path = root.join(boot.to_string());
        let Some(lock) = lock(&path)? else {
            return Ok(None);
        };
        let mut folder = Folder::of(boot, path, used, lock);
        let listed = fs::read_dir(&folder.path).map_err(SpoolError::io("read", &folder.path))?;
        for entry in listed {
            let entry = entry.map_err(SpoolError::io("read", &folder.path))?;
            let Some(number) = number(&entry.path()) else {
                continue;
            };
            let metadata = entry.metadata();
            let metadata = metadata.map_err(SpoolError::io("read", &entry.path()))?;
            folder.add(number, metadata.len(), 0);
        }
        if folder.segments.is_empty() {
            folder.remove_rest()?;
            return Ok(None);
        }
        Ok(Some(folder))
    }

    fn of(boot: Uuid, path: PathBuf, used: Arc<AtomicU64>, lock: File) -> Folder {
        Folder {
            boot,
            path,
            segments: BTreeMap::new(),
            anchor: 0,
            used,
            lock,
            lost_at: Cell::new(None),
        }
    }

    pub(super) fn file(&self, segment: u32) -> PathBuf {
        self.path.join(format!("{segment:08}.{ENDING}"))
    }

    pub(super) fn marker(&self, segment: u32) -> Marker {
        Marker::of(self.boot, segment)
    }

    /// Of the segments.
    pub(super) fn bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.bytes).sum()
    }

    /// So many bytes and records more in a segment, which may be new.
    pub(super) fn add(&mut self, segment: u32, bytes: u64, records: usize) {
        let segment = self.segments.entry(segment).or_default();
        segment.bytes += bytes;
        segment.live += records;
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether the folder is where it was made, and no copy of it: the lock there is the one that is held.
    pub(super) fn is_ours(&self) -> bool {
        is_at(&self.lock, &self.path.join(LOCK))
    }

    /// Whether the folder was moved as it is, or its volume is away: it may come back.
    fn is_moved(&self) -> bool {
        let is_removed = self.lock.metadata().is_ok_and(|lock| lock.nlink() == 0);
        !is_removed && !self.is_ours()
    }

    /// What is missing or damaged is lost in our folder alone: one that was moved may come back, and so may a copy of one that was
    /// removed, file by file, for a while.
    pub(super) fn read_here<T>(
        &self,
        read: impl Fn() -> Result<T, SpoolError>,
    ) -> Result<T, SpoolError> {
        let is_lost = |read: &Result<T, SpoolError>| read.as_ref().is_err_and(SpoolError::is_lost);
        let mut found = read();
        if is_lost(&found) && self.is_ours() {
            // The folder may have come back in between.
            found = read();
        }
        if is_lost(&found) && !self.is_ours() && !self.is_given_up() {
            return Err(SpoolError::Away(self.path.clone()));
        }
        found
    }

    fn is_given_up(&self) -> bool {
        if self.is_moved() {
            return false;
        }
        let now = clock::mono();
        let lost_at = self.lost_at.get().unwrap_or(now + PATIENCE);
        self.lost_at.set(Some(lost_at));
        now >= lost_at
    }

    /// The payload of a record that was put there.
    pub(super) fn read(&self, place: &Place) -> Result<Vec<u8>, SpoolError> {
        self.read_here(|| self.read_there(place))
    }

    fn read_there(&self, place: &Place) -> Result<Vec<u8>, SpoolError> {
        let path = self.file(place.segment);
        let file = File::open(&path).map_err(SpoolError::io("open", &path))?;
        let mut record = vec![0; RECORD_HEAD + place.length as usize];
        match file.read_exact_at(&mut record, place.offset) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(SpoolError::Damaged(path, place.offset));
            }
            Err(error) => return Err(SpoolError::io("read", &path)(error)),
        }
        let payload = segment::payload_at(&record, 0, self.marker(place.segment));
        if payload.is_none_or(|payload| payload.end != record.len()) {
            return Err(SpoolError::Damaged(path, place.offset));
        }
        record.drain(..RECORD_HEAD);
        Ok(record)
    }

    /// A record of this segment is done with. Says whether a file could not be deleted; the next call tries again.
    pub(super) fn release(&mut self, segment: u32) -> Result<(), SpoolError> {
        if let Some(segment) = self.segments.get_mut(&segment) {
            segment.live = segment.live.saturating_sub(1);
        }
        self.tidy()
    }

    /// Deletes the segments that nothing is needed of.
    pub(super) fn tidy(&mut self) -> Result<(), SpoolError> {
        let before = self.segments.range(..self.anchor);
        let done = before.filter(|(_, segment)| segment.live == 0);
        let done: Vec<_> = done.map(|(number, _)| *number).collect();
        for number in done {
            match self.delete(number) {
                // The next call tries again, too, and need not be told of.
                Err(SpoolError::Away(_)) => break,
                deleted => deleted?,
            }
        }
        Ok(())
    }

    /// See [`super::Spool::vouch`].
    pub(super) fn vouch(&self) -> Result<(), SpoolError> {
        let path = self.path.join(VOUCHER);
        let mut options = OpenOptions::new();
        let made = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path);
        made.map_err(SpoolError::io("create", &path))?;
        sync_folder(&self.path)
    }

    pub(super) fn unvouch(&self) -> Result<(), SpoolError> {
        let path = self.path.join(VOUCHER);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(SpoolError::io("remove", &path)(error))
            }
            // It may come back.
            Ok(()) | Err(_) if !self.is_ours() => Err(SpoolError::Away(self.path.clone())),
            Ok(()) | Err(_) => sync_folder(&self.path),
        }
    }

    pub(super) fn is_vouched(&self) -> bool {
        self.path.join(VOUCHER).exists()
    }

    /// Deletes the folder, whatever is in it.
    pub(super) fn remove(mut self) -> Result<(), SpoolError> {
        // In order: the last record stays to the end.
        let all: Vec<_> = self.segments.keys().copied().collect();
        all.into_iter().try_for_each(|number| self.delete(number))?;
        let root = self.path.parent().unwrap_or(&self.path);
        let _gate = gate(root)?;
        self.remove_rest()
    }

    /// The [`gate`] is held.
    fn remove_rest(&self) -> Result<(), SpoolError> {
        fs::remove_dir_all(&self.path).map_err(SpoolError::io("remove", &self.path))
    }

    fn delete(&mut self, number: u32) -> Result<(), SpoolError> {
        let path = self.file(number);
        let Some(segment) = self.segments.get(&number) else {
            return Ok(());
        };
        let gone = match segment.is_damaged {
            true => fs::rename(
                &path,
                self.path.with_extension(format!("{number:08}.corrupt")),
            ),
            false => fs::remove_file(&path),
        };
        match gone {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(SpoolError::io("remove", &path)(error));
            }
            Err(_) if self.is_moved() => return Err(SpoolError::Away(self.path.clone())),
            Ok(()) | Err(_) => {}
        }
        self.used.fetch_sub(segment.bytes, Ordering::Relaxed);
        self.segments.remove(&number);
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes(), Ordering::Relaxed);
    }
}

/// Makes the spool's folder where there is none. Only as a process begins: one that is away could not be moved back.
pub(super) fn make(root: &Path) -> Result<(), SpoolError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(root);
    made.map_err(SpoolError::io("create", root))
}

/// Holds others off while a folder in the spool's is made or taken over: one that is made and not yet locked would be taken for
/// one that is left.
pub(super) fn gate(root: &Path) -> Result<File, SpoolError> {
    let gate = open_lock(root)?;
    gate.lock().map_err(SpoolError::io("lock", root))?;
    Ok(gate)
}

/// The boots that have a folder, the oldest first.
pub(super) fn boots(root: &Path) -> Result<Vec<Uuid>, SpoolError> {
    let mut boots = Vec::new();
    for entry in fs::read_dir(root).map_err(SpoolError::io("read", root))? {
        let entry = entry.map_err(SpoolError::io("read", root))?;
        let name = entry.file_name();
        let boot = name.to_str().and_then(|name| Uuid::try_parse(name).ok());
        // As we write it, not in another of its forms.
        boots.extend(boot.filter(|boot| name == *boot.to_string() && entry.path().is_dir()));
    }
    boots.sort_unstable();
    Ok(boots)
}

/// What was created in a folder, or deleted from it, is so after a power cut too.
pub(super) fn sync_folder(path: &Path) -> Result<(), SpoolError> {
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    synced.map_err(SpoolError::io("sync", path))
}

/// `None` while another holds it.
fn lock(folder: &Path) -> Result<Option<File>, SpoolError> {
    let lock = open_lock(folder)?;
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(SpoolError::io("lock", folder)(error)),
    }
}

fn open_lock(folder: &Path) -> Result<File, SpoolError> {
    let path = folder.join(LOCK);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(&path).map_err(SpoolError::io("open", &path))
}

/// Whether this file is the one of that path.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    let of = |metadata: io::Result<fs::Metadata>| {
        let metadata = metadata.ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    of(file.metadata()).is_some_and(|held| of(fs::metadata(path)) == Some(held))
}

/// Of a segment's file.
fn number(path: &Path) -> Option<u32> {
    let is_segment = path.extension().is_some_and(|ending| ending == ENDING);
    let stem = path.file_stem()?.to_str()?;
    let number: u32 = stem.parse().ok()?;
    (is_segment && format!("{number:08}") == stem).then_some(number)
}
