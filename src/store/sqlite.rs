//! Audit events in SQLite. The only file that names rusqlite.
//!
//! WAL with `synchronous = NORMAL`: a killed process loses nothing that was appended; a power cut may lose the last
//! transactions, and with them their end mark, but never damages the file.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use rusqlite::types::{ToSql, ValueRef};
use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Row, TransactionBehavior, params,
};
use uuid::{Builder, Uuid};

use super::audit::{Cursor, Fault, FaultKind, Filter, Order, Report, StoreError, Stored};
use super::chain::{Check, End, Found, Hash, Hasher};
use crate::clock;
use crate::event::{AuditEvent, Micros};

/// Of the tables; kept as `user_version`.
pub const VERSION: i64 = 1;

/// How long a lock of another process is waited for; who appends has a queue, and tries again.
const BUSY: Duration = Duration::from_millis(50);

/// See the figures below.
const PAGE_SIZE: u32 = 8_192;

/// How many rows a fault may cause to be looked up: each costs a pass over the table.
const LOOKUPS: u32 = 16;

// One b-tree by order of arrival and no other index. Measured by `cargo run --release --example audit_cost` on 2 cores
// of a virtual machine, 500,000 rows of 361 B in batches of 500, microseconds a row to append, plain and with a key:
//
// | layout | 4 KiB pages | 8 KiB pages | 16 KiB pages |
// |---|---|---|---|
// | arrival alone | 2.56, 2.64 | 2.25, 2.27 | 2.02, 2.19 |
// | PRIMARY KEY (instance_id, seq), rowid | 3.34, 3.19 | | |
// | PRIMARY KEY (instance_id, seq), WITHOUT ROWID | 3.18, 3.75 | | |
//
// 8 KiB: a batch of one event writes whole pages too. `verify` costs 2.3 a row: it sorts, as there is no index.
const SCHEMA: &str = "
CREATE TABLE instances (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    boot BLOB NOT NULL,
    started INTEGER NOT NULL,
    key_check BLOB,
    last_seq INTEGER NOT NULL,
    last_hash BLOB NOT NULL,
    end_mark BLOB NOT NULL
);
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY CHECK (id = 0),
    instances INTEGER NOT NULL,
    seal BLOB NOT NULL
);
CREATE TABLE events (
    arrival INTEGER PRIMARY KEY,
    instance_id INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    time INTEGER NOT NULL,
    route TEXT,
    user TEXT,
    client TEXT NOT NULL,
    method TEXT NOT NULL,
    path TEXT NOT NULL,
    status INTEGER NOT NULL,
    label TEXT,
    body BLOB NOT NULL,
    hash BLOB NOT NULL
);
PRAGMA user_version = 1;
";

const INSERT: &str = "
INSERT INTO events (instance_id, seq, time, route, user, client, method, path, status, label, body, hash)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)";

/// Columns in the order that `verify` reads them; the query columns are 3 to 10.
const VERIFY: &str = "
SELECT seq, body, hash, time, route, user, client, method, path, status, label
FROM events WHERE instance_id = ?1 ORDER BY seq, arrival";

/// Appends the events of one boot of one instance. Several may share a file.
pub struct Writer {
    connection: Connection,
    hasher: Hasher,
    instance_id: i64,
    seal: Hash,
    last: u64,
    hash: Hash,
    /// Kept between batches for their memory.
    body: Vec<u8>,
}

impl Writer {
    /// Opens or creates the file and begins a new boot of `instance`. With a key the chain is HMAC under it; a file
    /// stays with the key that it began with.
    pub fn open(path: &Path, instance: &str, key: Option<&[u8]>) -> Result<Writer, StoreError> {
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY)?;
        // Only a new file heeds it.
        connection.pragma_update(None, "page_size", PAGE_SIZE)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        let hasher = Hasher::new(key);
        let wall = clock::wall();
        let boot = new_boot(wall);
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let tables: i64 =
            transaction.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if tables == 0 {
            transaction.execute_batch(SCHEMA)?;
            transaction.execute("INSERT INTO ledger VALUES (0, 0, ?1)", [hasher.count(0)])?;
        }
        check_version(&transaction)?;
        let known: i64 =
            transaction.query_row("SELECT instances FROM ledger", [], |row| row.get(0))?;
        let key_check: Option<Option<Hash>> = transaction
            .query_row(
                "SELECT key_check FROM instances ORDER BY id DESC LIMIT 1",
                [],
                |row| row.get(0),
            )
            .optional()?;
        if key_check.is_some_and(|check| check != hasher.key_check()) {
            return Err(StoreError::Key);
        }
        let id = known + 1;
        let number = unsigned(id);
        let started = Micros::from(wall).0;
        let seal = hasher.seal(number, boot.as_bytes(), started, instance);
        transaction.execute(
            "INSERT INTO instances VALUES (?1, ?2, ?3, ?4, ?5, 0, ?6, ?7)",
            params![
                id,
                instance,
                boot.as_bytes(),
                signed(started),
                hasher.key_check(),
                seal,
                hasher.end_mark(&seal, 0, &seal)
            ],
        )?;
        transaction.execute(
            "UPDATE ledger SET instances = ?1, seal = ?2",
            params![id, hasher.count(number)],
        )?;
        transaction.commit()?;
        Ok(Writer {
            connection,
            hasher,
            instance_id: id,
            seal,
            last: 0,
            hash: seal,
            body: Vec::new(),
        })
    }

    /// Writes all of the events in one transaction and numbers them. On an error none is written and no number is
    /// used: the same events can be given again.
    pub fn append(&mut self, events: &mut [AuditEvent]) -> Result<(), StoreError> {
        let (mut last, mut hash) = (self.last, self.hash);
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut insert = transaction.prepare_cached(INSERT)?;
            let mut client = String::new();
            for event in events {
                last += 1;
                event.seq = last;
                self.body.clear();
                self.body = event.encode_into(std::mem::take(&mut self.body));
                hash = self.hasher.row(&hash, last, &self.body);
                client.clear();
                let _ = write!(client, "{}", event.client);
                insert.execute(params![
                    self.instance_id,
                    signed(last),
                    signed(event.time.0),
                    event.route,
                    event.user,
                    client,
                    event.method,
                    event.path,
                    event.status,
                    event.label,
                    self.body,
                    hash
                ])?;
            }
        }
        let moved = transaction
            .prepare_cached(
                "UPDATE instances SET last_seq = ?1, last_hash = ?2, end_mark = ?3
                 WHERE id = ?4 AND last_seq = ?5 AND last_hash = ?6",
            )?
            .execute(params![
                signed(last),
                hash,
                self.hasher.end_mark(&self.seal, last, &hash),
                self.instance_id,
                signed(self.last),
                self.hash
            ])?;
        if moved != 1 {
            return Err(StoreError::Changed);
        }
        transaction.commit()?;
        (self.last, self.hash) = (last, hash);
        Ok(())
    }

    /// Lets the file grow to so many pages and no further, as a full disk would.
    pub fn limit_pages(&self, pages: u32) -> Result<(), StoreError> {
        self.connection
            .query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
        Ok(())
    }
}

/// Reads a file that others may be writing to.
pub struct Reader {
    connection: Connection,
}

impl Reader {
    /// Opens an existing file. Nothing is ever written to it.
    pub fn open(path: &Path) -> Result<Reader, StoreError> {
        let connection = Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )?;
        // A reader waits only while a file is being recovered after a crash.
        connection.busy_timeout(Duration::from_secs(5))?;
        check_version(&connection)?;
        Ok(Reader { connection })
    }

    /// The events that pass the filter. A row that is no longer an event is logged and left out; `verify` names it.
    /// To follow what arrives, ask again after the last cursor.
    pub fn query(&self, filter: &Filter) -> Result<Vec<Stored>, StoreError> {
        let mut sql = String::from(
            "SELECT arrival, seq, name, boot, body FROM events LEFT JOIN instances ON id = instance_id WHERE 1",
        );
        let mut values: Vec<Box<dyn ToSql>> = Vec::new();
        let mut ask = |condition: &str, value: Option<Box<dyn ToSql>>| {
            if let Some(value) = value {
                values.push(value);
                let _ = write!(
                    sql,
                    " AND {}",
                    condition.replace('?', &format!("?{}", values.len()))
                );
            }
        };
        let number = |value: i64| Box::new(value) as Box<dyn ToSql>;
        let text =
            |value: &Option<String>| value.clone().map(|value| Box::new(value) as Box<dyn ToSql>);
        ask("arrival > ?", filter.after.map(|after| number(after.0)));
        ask(
            "time >= ?",
            filter.since.map(|since| number(signed(since.0))),
        );
        ask(
            "time < ?",
            filter.until.map(|until| number(signed(until.0))),
        );
        ask("user = ?", text(&filter.user));
        ask("route = ?", text(&filter.route));
        ask("client = ?", text(&filter.client));
        ask("label = ?", text(&filter.label));
        ask("method = ?", text(&filter.method));
        ask("substr(path, 1, length(?)) = ?", text(&filter.path_prefix));
        let status = filter.status.as_ref();
        ask(
            "status >= ?",
            status.map(|range| number((*range.start()).into())),
        );
        ask(
            "status <= ?",
            status.map(|range| number((*range.end()).into())),
        );
        sql.push_str(match filter.order {
            Order::OldestFirst => " ORDER BY arrival",
            Order::NewestFirst => " ORDER BY arrival DESC",
        });
        let mut statement = self.connection.prepare_cached(&sql)?;
        let mut rows = statement.query(rusqlite::params_from_iter(values))?;
        let mut stored = Vec::new();
        // Counted here and not by SQL, so that rows left out do not end an answer early.
        while filter
            .limit
            .is_none_or(|limit| stored.len() < limit as usize)
            && let Some(row) = rows.next()?
        {
            let arrival = row.get(0)?;
            match stored_event(row, arrival) {
                Some(event) => stored.push(event),
                None => tracing::warn!(arrival, "not an event: run `weir audit verify`"),
            }
        }
        Ok(stored)
    }

    /// Checks everything that was written, as of now. The key must be the one that the file was written with.
    pub fn verify(&self, key: Option<&[u8]>) -> Result<Report, StoreError> {
        let hasher = Hasher::new(key);
        // One transaction: writers may go on, and what they add is not seen.
        let snapshot = self.connection.unchecked_transaction()?;
        let mut report = Report::default();
        let (known, seal): (i64, Option<Hash>) =
            snapshot.query_row("SELECT instances, seal FROM ledger", [], |row| {
                Ok((integer(row, 0).unwrap_or(0), blob(row, 1)))
            })?;
        let mut expected = 1;
        let mut keys_fit = true;
        let mut instances = snapshot.prepare(
            "SELECT id, name, boot, started, key_check, last_seq, last_hash, end_mark FROM instances ORDER BY id",
        )?;
        let mut rows = instances.query([])?;
        while let Some(row) = rows.next()? {
            let id = integer(row, 0).unwrap_or(0);
            for gone in expected..id {
                let fault = Fault::of_instance(format!("#{gone}"), FaultKind::InstanceMissing);
                report.faults.push(fault);
            }
            expected = id + 1;
            report.instances += 1;
            keys_fit &= check_instance(&snapshot, &hasher, row, id, &mut report)?;
        }
        for gone in expected..=known {
            let fault = Fault::of_instance(format!("#{gone}"), FaultKind::InstanceMissing);
            report.faults.push(fault);
        }
        if keys_fit && seal != Some(hasher.count(unsigned(known))) {
            let fault = Fault::of_instance("all".to_owned(), FaultKind::Instance);
            report.faults.push(fault);
        }
        let mut strays = snapshot.prepare(
            "SELECT instance_id, seq FROM events WHERE instance_id NOT IN (SELECT id FROM instances)",
        )?;
        let mut rows = strays.query([])?;
        while let Some(row) = rows.next()? {
            report.events += 1;
            let seq = integer(row, 1).map_or(0, unsigned);
            report.faults.push(Fault {
                instance: format!("#{}", integer(row, 0).unwrap_or(0)),
                seqs: seq..=seq,
                kind: FaultKind::OutOfPlace,
            });
        }
        Ok(report)
    }
}

/// Checks an instance and all of its events; whether it was written under the same key.
fn check_instance(
    connection: &Connection,
    hasher: &Hasher,
    row: &Row<'_>,
    id: i64,
    report: &mut Report,
) -> Result<bool, StoreError> {
    let name = text(row, 1).unwrap_or_default();
    let boot = row.get_ref(2)?.as_blob().unwrap_or_default();
    let started = integer(row, 3).map_or(0, unsigned);
    let shown = match <[u8; 16]>::try_from(boot) {
        Ok(boot) => format!("{name}/{}", Uuid::from_bytes(boot)),
        Err(_) => format!("{name}/?"),
    };
    if blob(row, 4) != hasher.key_check() {
        let fault = Fault::of_instance(shown, FaultKind::Key);
        report.faults.push(fault);
        return Ok(false);
    }
    let seal = hasher.seal(unsigned(id), boot, started, name);
    let end = End {
        last: integer(row, 5).map_or(0, unsigned),
        hash: blob(row, 6).unwrap_or_default(),
    };
    if blob(row, 7) != Some(hasher.end_mark(&seal, end.last, &end.hash)) {
        let fault = Fault::of_instance(shown.clone(), FaultKind::EndMark);
        report.faults.push(fault);
    }
    let mut lookups = 0;
    let mut other = connection
        .prepare("SELECT hash, body FROM events WHERE instance_id = ?1 AND seq = ?2 LIMIT 1")?;
    let mut partner = |at, within| {
        lookups += 1;
        if lookups > LOOKUPS {
            return None;
        }
        let found = other.query_row(params![id, signed(at)], |row| {
            let event = row.get_ref(1)?.as_blob().map(AuditEvent::decode);
            let swapped = matches!(event, Ok(Ok(event)) if event.seq == within);
            Ok(blob(row, 0).filter(|_| swapped))
        });
        found.ok().flatten()
    };
    let mut check = Check::new(hasher, seal, end);
    let mut events = connection.prepare(VERIFY)?;
    let mut rows = events.query([id])?;
    while let Some(row) = rows.next()? {
        report.events += 1;
        let body = row.get_ref(1)?.as_blob().unwrap_or_default();
        let event = AuditEvent::decode(body).ok();
        let found = Found {
            seq: integer(row, 0).map_or(0, unsigned),
            body,
            hash: blob(row, 2),
            body_seq: event.as_ref().map(|event| event.seq),
            columns_fit: event.is_some_and(|event| columns_fit(row, &event)),
        };
        check.row(&found, &mut partner);
    }
    let faults = check.finish().into_iter().map(|(seqs, kind)| Fault {
        instance: shown.clone(),
        seqs,
        kind,
    });
    report.faults.extend(faults);
    Ok(true)
}

/// Whether the columns that queries look at say what the event says.
fn columns_fit(row: &Row<'_>, event: &AuditEvent) -> bool {
    let is_null = |index| matches!(row.get_ref(index), Ok(ValueRef::Null));
    let optional = |index, value: Option<&str>| match value {
        Some(value) => text(row, index) == Some(value),
        None => is_null(index),
    };
    integer(row, 3) == Some(signed(event.time.0))
        && optional(4, event.route.as_deref())
        && optional(5, event.user.as_deref())
        && text(row, 6) == Some(event.client.to_string().as_str())
        && text(row, 7) == Some(event.method.as_ref())
        && text(row, 8) == Some(event.path.as_str())
        && integer(row, 9) == Some(event.status.into())
        && optional(10, event.label.as_deref())
}

/// `None` if what stands there cannot be read as an event.
fn stored_event(row: &Row<'_>, arrival: i64) -> Option<Stored> {
    Some(Stored {
        cursor: Cursor(arrival),
        instance: text(row, 2).unwrap_or("?").to_owned(),
        boot: row.get(3).unwrap_or_default(),
        event: AuditEvent::decode(row.get_ref(4).ok()?.as_blob().ok()?).ok()?,
    })
}

/// A UUIDv7.
fn new_boot(wall: Duration) -> Uuid {
    let mut random = [0; 10];
    fastrand::fill(&mut random);
    let millis = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
    Builder::from_unix_timestamp_millis(millis, &random).into_uuid()
}

fn check_version(connection: &Connection) -> Result<(), StoreError> {
    match connection.query_row("PRAGMA user_version", [], |row| row.get(0))? {
        VERSION => Ok(()),
        other => Err(StoreError::Version(other)),
    }
}

// In a file that someone meddled with, any column may hold anything: what does not fit is `None`, not an error.

fn integer(row: &Row<'_>, index: usize) -> Option<i64> {
    row.get_ref(index).ok()?.as_i64().ok()
}

fn text<'a>(row: &'a Row<'_>, index: usize) -> Option<&'a str> {
    row.get_ref(index).ok()?.as_str().ok()
}

fn blob(row: &Row<'_>, index: usize) -> Option<Hash> {
    row.get_ref(index).ok()?.as_blob().ok()?.try_into().ok()
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
            _ => StoreError::Other(Box::new(error)),
        }
    }
}
