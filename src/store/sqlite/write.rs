//! Appends events to the file of the day.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use rusqlite::{CachedStatement, Connection, OptionalExtension, TransactionBehavior, params};
use uuid::Uuid;

use super::turns::{PATIENCE, Turns};
use super::{
    BUSY, Files, Ledger, PAGE_SIZE, SCHEMA, blob, check_version, integer, is_empty, open_if_made,
    signed, unsigned,
};
use crate::clock;
use crate::event::{Columns, Encoded, Micros};
use crate::store::audit::StoreError;
use crate::store::audit::chain::{End, FileId, Hash, Hasher, InstancePart};
use crate::store::audit::days::{self, Day};
use crate::store::audit::links::{Ended, Previous};

/// How long a lock of another process is waited for by one that begins, and has no queue yet: a process that it is to replace may write
/// without a pause.
const FIRST: Duration = Duration::from_secs(10);

const INSERT: &str = "
INSERT INTO events (instance_id, seq, time, user, client, label, body, hash) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";

/// Appends the events of one boot of one instance, to a file a day. Several may share the files.
pub struct Writer {
    files: Files,
    instance: Instance,
    file: File,
    end: End,
    syncs: bool,
    /// Where each transaction is waited for.
    turns: Option<Turns>,
}

/// A boot, as every file of it says.
struct Instance {
    name: String,
    boot: Uuid,
    /// Microseconds since the Unix epoch.
    started: u64,
}

/// The file that is written to.
struct File {
    connection: Connection,
    day: Day,
    instance_id: i64,
    seal: Hash,
    /// What its ledger says of the earliest event.
    earliest: Option<u64>,
}

impl Writer {
    /// Begins a new boot of `instance` in the file of the day that `now`, the time since the Unix epoch, is in. With a
    /// key the chain is HMAC under it; a path stays with the key that it began with.
    pub fn open(
        path: &Path,
        instance: &str,
        key: Option<&[u8]>,
        now: Duration,
    ) -> Result<Writer, StoreError> {
        if path.is_file() {
            return Err(StoreError::Undated);
        }
        let instance = Instance {
            name: instance.to_owned(),
            boot: clock::uuid(now),
            started: Micros::from(now).0,
        };
        let files = Files {
            path: path.to_owned(),
            hasher: Hasher::new(key),
        };
        // A clock that was set back must not part the files from their order.
        let newest = days::list(path)?.last().map(|(day, _)| *day);
        let day = newest.map_or(Day::of(now), |newest| newest.max(Day::of(now)));
        let previous = || previous(&files, day, None);
        let end = End::default();
        let file = join(&files, day, previous, &instance, None, end, FIRST)
            .map_err(|error| error.of_day(day))?;
        Ok(Writer {
            files,
            instance,
            end: End {
                last: 0,
                hash: file.seal,
            },
            file,
            syncs: false,
            turns: None,
        })
    }

    /// From here on each transaction survives a power cut, too.
    pub fn sync_each(mut self) -> Result<Writer, StoreError> {
        self.syncs = true;
        self.file.sync_each()?;
        self.turns = Turns::at(&self.files.path);
        Ok(self)
    }

    /// All files of the path.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The day whose file is written to.
    pub fn day(&self) -> Day {
        self.file.day
    }

    /// Writes all of the events in one transaction and numbers them; first goes on to the next file if `now`, the time
    /// since the Unix epoch, is in a new day. On an error none is written and no number is used: the same events can
    /// be given again.
    pub fn append(&mut self, batches: &mut [Encoded], now: Duration) -> Result<(), StoreError> {
        // No event is later than the day of its file, even if the clock was set back meanwhile: queries build on it.
        let latest = batches.iter().filter_map(Encoded::latest).max();
        let day = Day::of(now.max(latest.unwrap_or_default().into()));
        if day > self.file.day {
            self.go_on(day)?;
        }
        let End { mut last, mut hash } = self.end;
        let mut earliest = self.file.earliest;
        let file = &mut self.file;
        let turn = self.turns.as_ref().and_then(Turns::next);
        let transaction = file
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        drop(turn);
        {
            let mut rows = Rows::new(transaction.prepare_cached(INSERT)?, file.instance_id)?;
            for batch in batches {
                batch.number(last + 1);
                for body in batch.iter() {
                    let columns = Columns::of(body).expect("an encoding begins with its columns");
                    last = columns.seq;
                    hash = self.files.hasher.row(&hash, last, body);
                    earliest = Some(earliest.unwrap_or(u64::MAX).min(columns.time.0));
                    rows.insert(&columns, body, &hash)?;
                }
            }
        }
        if earliest != file.earliest {
            transaction.execute(
                "UPDATE ledger SET earliest = min(coalesce(earliest, ?1), ?1)",
                [earliest.map(signed)],
            )?;
        }
        let moved = transaction
            .prepare_cached(
                "UPDATE instances SET last_seq = ?1, last_hash = ?2, end_mark = ?3
                 WHERE id = ?4 AND last_seq = ?5 AND last_hash = ?6",
            )?
            .execute(params![
                signed(last),
                hash,
                self.files.hasher.end_mark(&file.seal, last, &hash),
                file.instance_id,
                signed(self.end.last),
                self.end.hash
            ])?;
        if moved != 1 {
            return Err(StoreError::Changed);
        }
        transaction.commit()?;
        file.earliest = earliest;
        self.end = End { last, hash };
        Ok(())
    }

    /// Lets the file of the day grow to so many pages and no further, as a full disk would.
    pub fn limit_pages(&self, pages: u32) -> Result<(), StoreError> {
        self.file
            .connection
            .query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
        Ok(())
    }

    /// Leaves the file for that of `day`.
    fn go_on(&mut self, day: Day) -> Result<(), StoreError> {
        let previous = || previous(&self.files, day, Some(&self.file));
        let from = Some(self.file.day);
        let file = join(
            &self.files,
            day,
            previous,
            &self.instance,
            from,
            self.end,
            BUSY,
        )
        .map_err(|error| error.of_day(day))?;
        if self.syncs {
            file.sync_each()?;
        }
        self.end.hash = file.seal;
        self.file = file;
        Ok(())
    }
}

impl File {
    fn sync_each(&self) -> Result<(), StoreError> {
        self.connection.busy_timeout(PATIENCE)?;
        Ok(self.connection.pragma_update(None, "synchronous", "FULL")?)
    }
}

/// The insertion of rows, which binds what differs from the row before: events of one client often stand together.
struct Rows<'t> {
    statement: CachedStatement<'t>,
    client: Option<IpAddr>,
    user: Option<String>,
    label: Option<String>,
}

impl<'t> Rows<'t> {
    fn new(mut statement: CachedStatement<'t>, instance_id: i64) -> Result<Rows<'t>, StoreError> {
        // What an earlier batch has bound may still be there.
        statement.clear_bindings();
        statement.raw_bind_parameter(1, instance_id)?;
        Ok(Rows {
            statement,
            client: None,
            user: None,
            label: None,
        })
    }

    fn insert(
        &mut self,
        columns: &Columns<'_>,
        body: &[u8],
        hash: &Hash,
    ) -> Result<(), StoreError> {
        let statement = &mut self.statement;
        statement.raw_bind_parameter(2, signed(columns.seq))?;
        statement.raw_bind_parameter(3, signed(columns.time.0))?;
        for (index, bound, value) in [
            (4, &mut self.user, columns.user),
            (6, &mut self.label, columns.label),
        ] {
            if bound.as_deref() != value {
                statement.raw_bind_parameter(index, value)?;
                *bound = value.map(str::to_owned);
            }
        }
        if self.client != Some(columns.client) {
            statement.raw_bind_parameter(5, columns.client.to_string())?;
            self.client = Some(columns.client);
        }
        statement.raw_bind_parameter(7, body)?;
        statement.raw_bind_parameter(8, hash)?;
        statement.raw_execute()?;
        Ok(())
    }
}

/// What a new file of `day` will say of the newest file before it.
fn previous(
    files: &Files,
    day: Day,
    current: Option<&File>,
) -> Result<Option<Previous>, StoreError> {
    // Others that share the files may be ahead of the current one. That is asked by the connection at hand, which tells
    // of the file even if another hand has removed it.
    let behind = |other: Day| current.is_none_or(|current| other > current.day);
    for (other, file) in days::list(&files.path)?.iter().rev() {
        if *other >= day || !behind(*other) {
            continue;
        }
        let described = open_if_made(file).and_then(|opened| match opened {
            Some(connection) => describe(&connection, &files.hasher).map(Some),
            None => Ok(None),
        });
        if let Some(previous) = described.map_err(|error| error.of_day(*other))? {
            return Ok(Some(previous));
        }
    }
    current
        .map(|current| describe(&current.connection, &files.hasher))
        .transpose()
}

fn describe(connection: &Connection, hasher: &Hasher) -> Result<Previous, StoreError> {
    let ledger = Ledger::read(connection)?;
    check_key(connection, hasher)?;
    let mut ends = Vec::new();
    let mut statement = connection
        .prepare("SELECT name, boot, before_seq, last_seq, last_hash FROM instances ORDER BY id")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let before = integer(row, 2).map_or(0, unsigned);
        let end = End {
            last: integer(row, 3).map_or(0, unsigned),
            hash: blob(row, 4).unwrap_or_default(),
        };
        if end.last > before {
            ends.push(Ended {
                name: row.get(0)?,
                boot: row.get(1)?,
                first: before + 1,
                end,
            });
        }
    }
    Ok(Previous {
        day: ledger.day,
        file: ledger.file,
        place: ledger.place,
        ends,
    })
}

/// Opens or creates the file of `day`, and begins the part of `instance` in it: what goes on from `before` in the file
/// of the day `from`. A new file says what `previous` tells. Locks of others are waited for with `patience`.
fn join(
    files: &Files,
    day: Day,
    previous: impl FnOnce() -> Result<Option<Previous>, StoreError>,
    instance: &Instance,
    from: Option<Day>,
    before: End,
    patience: Duration,
) -> Result<File, StoreError> {
    let hasher = &files.hasher;
    let path = days::file(&files.path, day);
    make_private(&path)?;
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(patience)?;
    // Only a new file heeds it.
    connection.pragma_update(None, "page_size", PAGE_SIZE)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if is_empty(&transaction)? {
        let previous = previous()?;
        transaction.execute_batch(SCHEMA)?;
        let mut file = FileId::default();
        fastrand::fill(&mut file);
        let place = previous.as_ref().map_or(0, |previous| previous.place) + 1;
        let encoded =
            postcard::to_stdvec(&previous).map_err(|error| StoreError::Other(error.into()))?;
        transaction.execute(
            "INSERT INTO ledger (id, file, day, place, previous, instances, seal) VALUES (0, ?1, ?2, ?3, ?4, 0, ?5)",
            params![
                file,
                day.0,
                signed(place),
                encoded,
                hasher.ledger(&file, day, place, 0, &encoded)
            ],
        )?;
    }
    check_version(&transaction)?;
    check_key(&transaction, hasher)?;
    let ledger = Ledger::read(&transaction)?;
    let id = ledger.instances + 1;
    let part = InstancePart {
        id,
        name: &instance.name,
        boot: instance.boot.as_bytes(),
        started: instance.started,
        from,
        before,
    };
    let seal = hasher.seal(&ledger.file, &part);
    transaction.execute(
        "INSERT INTO instances VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        params![
            signed(id),
            part.name,
            part.boot,
            signed(part.started),
            hasher.key_check(),
            from.map(|day| day.0),
            signed(before.last),
            before.hash,
            signed(before.last),
            seal,
            hasher.end_mark(&seal, before.last, &seal)
        ],
    )?;
    transaction.execute(
        "UPDATE ledger SET instances = ?1, seal = ?2",
        params![
            signed(id),
            hasher.ledger(&ledger.file, ledger.day, ledger.place, id, &ledger.previous)
        ],
    )?;
    transaction.commit()?;
    connection.busy_timeout(BUSY)?;
    Ok(File {
        connection,
        day,
        instance_id: signed(id),
        seal,
        earliest: ledger.earliest,
    })
}

/// Who did what is for the owner alone to read; what SQLite puts beside the file has the file's mode.
fn make_private(path: &Path) -> Result<(), StoreError> {
    let mut options = OpenOptions::new();
    options.create_new(true).write(true).mode(0o600);
    match options.open(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error.into()),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn check_key(connection: &Connection, hasher: &Hasher) -> Result<(), StoreError> {
    let begun: Option<Option<Hash>> = connection
        .query_row(
            "SELECT key_check FROM instances ORDER BY id DESC LIMIT 1",
            [],
            |row| row.get(0),
        )
        .optional()?;
    match begun.is_some_and(|check| check != hasher.key_check()) {
        true => Err(StoreError::Key),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_day_is_synced_where_that_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        let now = Duration::from_secs(1_728_000_000);
        let level = |writer: &Writer| -> i64 {
            let file = &writer.file.connection;
            file.query_row("PRAGMA synchronous", [], |row| row.get(0))
                .unwrap()
        };
        let writer = Writer::open(&path, "a", None, now).unwrap();
        assert_eq!(level(&writer), 1, "NORMAL");
        let mut writer = writer.sync_each().unwrap();
        for day in 0..3 {
            writer
                .append(&mut [], now + day * Duration::from_secs(86_400))
                .unwrap();
            assert_eq!(level(&writer), 2, "FULL");
        }
        assert_eq!(days::list(&path).unwrap().len(), 3);
    }
}
