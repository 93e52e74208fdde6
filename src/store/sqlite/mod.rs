//! Audit events in SQLite, a file a day. No other module names rusqlite.
//!
//! WAL with `synchronous = NORMAL`: a killed process loses nothing that was appended; a power cut may lose the last
//! transactions, and with them their end mark, but never damages the file.

mod read;
mod turns;
mod upkeep;
mod verify;
mod write;

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use rusqlite::ffi::{SQLITE_IOERR_SHMSIZE, SQLITE_IOERR_WRITE};
use rusqlite::{Connection, ErrorCode, OpenFlags, Row};

pub use self::read::Reader;
pub use self::upkeep::Files;
pub use self::write::Writer;
use super::audit::StoreError;
use super::audit::chain::{FileId, Hash};
use super::audit::days::{self, Day};
use super::audit::links::Previous;

/// Of the tables; kept as `user_version`.
const VERSION: i64 = 3;

/// But for a disk that is full.
const NOT_WRITTEN: &str = "the system refuses a write: past a bound on the size of files (ulimit -f), past a quota, or since the disk fails, which its log says";

/// How long a lock of another process is waited for; who appends has a queue, and tries again.
const BUSY: Duration = Duration::from_millis(50);

/// See the figures below.
const PAGE_SIZE: u32 = 8_192;

// While a day is written: one b-tree by order of arrival and no other index. Measured by `cargo bench --bench sqlite` on 2 cores
// of a virtual machine, 500,000 rows of 361 B in batches of 500, microseconds a row to append, plain and with a key:
//
// | layout | 4 KiB pages | 8 KiB pages | 16 KiB pages |
// |---|---|---|---|
// | arrival alone | 2.56, 2.64 | 2.25, 2.27 | 2.02, 2.19 |
// | PRIMARY KEY (instance_id, seq), rowid | 3.34, 3.19 | | |
// | PRIMARY KEY (instance_id, seq), WITHOUT ROWID | 3.18, 3.75 | | |
//
// Those rows had columns for all that queries pick by. Since then the body alone has what no index has: 329 B, 1.9 and 2.1 us
// where the 2.25 and 2.27 had become 2.4 and 2.5; to search the 500,000 for a path takes 0.20 s, where by a column, as for a
// user, it takes 0.08.
//
// 8 KiB: a batch of one event writes whole pages too. `verify` costs 2.3 a row: it sorts, as there is no index. Of a closed day it costs some 3
// more, by Python's sqlite3: each row is looked up in the indexes.
const SCHEMA: &str = "
CREATE TABLE instances (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    boot BLOB NOT NULL,
    started INTEGER NOT NULL,
    key_check BLOB,
    from_day INTEGER,
    before_seq INTEGER NOT NULL,
    before_hash BLOB NOT NULL,
    last_seq INTEGER NOT NULL,
    last_hash BLOB NOT NULL,
    end_mark BLOB NOT NULL
);
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY CHECK (id = 0),
    file BLOB NOT NULL,
    day INTEGER NOT NULL,
    place INTEGER NOT NULL,
    previous BLOB NOT NULL,
    instances INTEGER NOT NULL,
    seal BLOB NOT NULL,
    next_day INTEGER,
    next_file BLOB,
    next_mark BLOB,
    earliest INTEGER
);
CREATE TABLE removed (
    day INTEGER NOT NULL,
    place INTEGER NOT NULL,
    file BLOB NOT NULL,
    mark BLOB NOT NULL
);
CREATE TABLE events (
    arrival INTEGER PRIMARY KEY,
    instance_id INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    time INTEGER NOT NULL,
    user TEXT,
    client TEXT NOT NULL,
    label TEXT,
    body BLOB NOT NULL,
    hash BLOB NOT NULL
);
PRAGMA user_version = 3;
";

/// What a file says of itself.
struct Ledger {
    file: FileId,
    day: Day,
    place: u64,
    /// The file before, encoded: an `Option<Previous>`.
    previous: Vec<u8>,
    /// How many instances it has known.
    instances: u64,
    seal: Option<Hash>,
    next: Option<(Day, FileId)>,
    next_mark: Option<Hash>,
    /// No event has an earlier time.
    earliest: Option<u64>,
}

impl Ledger {
    /// What was tampered with comes out as zeros or as `None`.
    fn read(connection: &Connection) -> Result<Ledger, StoreError> {
        let sql = "SELECT file, day, place, previous, instances, seal, next_day, next_file, next_mark, earliest FROM ledger";
        let ledger = connection.query_row(sql, [], |row| {
            Ok(Ledger {
                file: blob(row, 0).unwrap_or_default(),
                day: day(row, 1).unwrap_or_default(),
                place: integer(row, 2).map_or(0, unsigned),
                previous: row.get(3).unwrap_or_default(),
                instances: integer(row, 4).map_or(0, unsigned),
                seal: blob(row, 5),
                next: day(row, 6).zip(blob(row, 7)),
                next_mark: blob(row, 8),
                earliest: integer(row, 9).map(unsigned),
            })
        })?;
        Ok(ledger)
    }

    fn previous(&self) -> Option<Previous> {
        postcard::from_bytes(&self.previous).ok().flatten()
    }
}

/// As [`open_to_read`]; `None` for a file that is gone meanwhile, or that its writer has not made into a database yet.
fn open_if_made(path: &Path) -> Result<Option<Connection>, StoreError> {
    match open_to_read(path) {
        Err(_) if matches!(path.metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound) => {
            Ok(None)
        }
        Err(StoreError::Version { found: 0, .. }) => {
            let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
            match is_empty(&connection)? {
                true => Ok(None),
                false => open_to_read(path).map(Some),
            }
        }
        opened => opened.map(Some),
    }
}

fn is_empty(connection: &Connection) -> Result<bool, StoreError> {
    let sql = "SELECT count(*) FROM sqlite_schema";
    let tables: i64 = connection.query_row(sql, [], |row| row.get(0))?;
    Ok(tables == 0)
}

/// Opens an existing file, to which nothing will be written.
fn open_to_read(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let opened = Connection::open_with_flags(path, flags).map_err(StoreError::from);
    match opened.and_then(ready_to_read) {
        Err(error @ StoreError::Other(_)) if !with_ending(path, "-wal").exists() => {
            // Even to read a day that was not closed, SQLite makes files beside it. A copy in a folder where that cannot be done is one that
            // nobody writes to.
            let flags = flags | OpenFlags::SQLITE_OPEN_URI;
            let copy = Connection::open_with_flags(immutable(path), flags);
            copy.map_err(StoreError::from)
                .and_then(ready_to_read)
                .map_err(|_| error)
        }
        opened => opened,
    }
    .inspect(|connection| sort_beside(connection, path))
}

fn ready_to_read(connection: Connection) -> Result<Connection, StoreError> {
    // A reader waits only while a file is being recovered after a crash.
    connection.busy_timeout(Duration::from_secs(5))?;
    check_version(&connection)?;
    Ok(connection)
}

/// A file as SQLite's URI of what does not change.
fn immutable(path: &Path) -> String {
    const KEPT: &AsciiSet = &NON_ALPHANUMERIC
        .remove(b'/')
        .remove(b'.')
        .remove(b'-')
        .remove(b'_');
    let name = percent_encode(path.as_os_str().as_bytes(), KEPT);
    let authority = if path.is_absolute() { "//" } else { "" };
    format!("file:{authority}{name}?immutable=1")
}

/// What does not fit into memory while rows are sorted goes to the folder of the file: no other may be there to write to. SQLite has one
/// folder for a process; where it cannot be written to, others are tried.
fn sort_beside(connection: &Connection, path: &Path) {
    if let Some(folder) = days::folder(path).to_str() {
        let _ = connection.pragma_update(None, "temp_store_directory", folder);
    }
}

/// `audit-2026-11-25.db-wal`
fn with_ending(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

fn check_version(connection: &Connection) -> Result<(), StoreError> {
    match connection.query_row("PRAGMA user_version", [], |row| row.get(0))? {
        VERSION => Ok(()),
        1 => Err(StoreError::Undated),
        found => Err(StoreError::Version {
            found,
            expected: VERSION,
        }),
    }
}

// In a file that someone meddled with, any column may hold anything: what does not fit is `None`, not an error.

fn integer(row: &Row<'_>, index: usize) -> Option<i64> {
    row.get_ref(index).ok()?.as_i64().ok()
}

fn text<'a>(row: &'a Row<'_>, index: usize) -> Option<&'a str> {
    row.get_ref(index).ok()?.as_str().ok()
}

fn blob<const LENGTH: usize>(row: &Row<'_>, index: usize) -> Option<[u8; LENGTH]> {
    row.get_ref(index).ok()?.as_blob().ok()?.try_into().ok()
}

fn day(row: &Row<'_>, index: usize) -> Option<Day> {
    integer(row, index)?.try_into().ok().map(Day)
}

/// SQLite's integers have a sign; what does not fit is a nonsense time, and stands at the end of time.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Negative numbers are never written; a forged one is no number of a row.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> StoreError {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Locked,
            Some(ErrorCode::DiskFull) => StoreError::Full,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                StoreError::Damaged(Box::new(error))
            }
            // Of the index of a log, which is a file beside it.
            _ if error
                .sqlite_error()
                .is_some_and(|it| it.extended_code == SQLITE_IOERR_SHMSIZE) =>
            {
                StoreError::Full
            }
            // SQLite says "disk I/O error", whatever the system has against it.
            _ if error
                .sqlite_error()
                .is_some_and(|it| it.extended_code == SQLITE_IOERR_WRITE) =>
            {
                StoreError::Other(NOT_WRITTEN.into())
            }
            // By the handler of a search alone.
            Some(ErrorCode::OperationInterrupted) => StoreError::OutOfTime,
            _ => StoreError::Other(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::ffi::{Error, SQLITE_IOERR_READ};

    use super::*;

    #[test]
    fn a_write_that_is_refused_says_what_may_be_the_reason() {
        let said = |code| {
            let error = rusqlite::Error::SqliteFailure(Error::new(code), None);
            StoreError::from(error).to_string()
        };
        let of_write = said(SQLITE_IOERR_WRITE);
        assert!(
            of_write.contains("ulimit -f") && of_write.contains("quota"),
            "{of_write}"
        );
        let of_read = said(SQLITE_IOERR_READ);
        assert!(of_read.contains("disk I/O error"), "{of_read}");
    }
}
