//! Checks the audit's files: each by itself, then what they say of each other.

use std::collections::HashSet;

use rusqlite::fallible_streaming_iterator::FallibleStreamingIterator as _;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row, Rows};

use super::upkeep::CLOSE;
use super::{Ledger, SCHEMA, blob, check_version, day, integer, signed, text, unsigned};
use crate::event::{AuditEvent, is_of_another_version};
use crate::store::audit::chain::{Check, End, Found, Hasher, InstancePart, Keys};
use crate::store::audit::days::Day;
use crate::store::audit::links::{Removed, Seen, SeenPart, shown};
use crate::store::audit::{Fault, FaultKind, Report, StoreError};

/// How many rows a fault may cause to be looked up: each costs a pass over the table.
const LOOKUPS: u32 = 16;

/// Columns in the order that they are read here; those that queries look at are 4 to 7. All rows in one pass: there is no index by
/// instance, and a process that is started again and again makes many instances in a day.
const ROWS: &str = "
SELECT instance_id, seq, body, hash, time, user, client, label, arrival
FROM events ORDER BY instance_id, seq, arrival";

/// Checks the file of a day, adds to the report, and returns what it says of other files.
pub(super) fn file(
    connection: &Connection,
    named: Day,
    keys: &Keys,
    report: &mut Report,
) -> Result<Seen, StoreError> {
    // One transaction: writers may go on, and what they add is not seen.
    let snapshot = connection.unchecked_transaction()?;
    check_version(&snapshot)?;
    let ledger = Ledger::read(&snapshot)?;
    let hasher = written_under(&snapshot, keys)?;
    let mut events = snapshot.prepare(ROWS)?;
    let mut events = events.query([])?;
    events.advance()?;
    let mut look = Look {
        connection: &snapshot,
        hasher,
        ledger: &ledger,
        day: named,
        report,
        events,
        strays: Vec::new(),
        parts: Vec::new(),
        earliest: u64::MAX,
    };
    let mut expected = 1;
    let mut keys_fit = true;
    let mut instances = snapshot.prepare(
        "SELECT id, name, boot, started, key_check, from_day, before_seq, before_hash, last_seq, last_hash, end_mark
         FROM instances ORDER BY id",
    )?;
    let mut rows = instances.query([])?;
    while let Some(row) = rows.next()? {
        let id = integer(row, 0).map_or(0, unsigned);
        (expected..id).for_each(|gone| look.instance_missing(gone));
        expected = id.saturating_add(1);
        look.report.instances += 1;
        keys_fit &= look.instance(row, id)?;
    }
    (expected..=ledger.instances).for_each(|gone| look.instance_missing(gone));
    look.strays(None)?;
    let Look {
        strays,
        parts,
        earliest,
        ..
    } = look;
    report.faults.extend(strays);

    let mut removed = Vec::new();
    let mut marks = true;
    let mut statement = snapshot.prepare("SELECT day, place, file, mark FROM removed")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let other = Removed {
            day: day(row, 0).unwrap_or_default(),
            place: integer(row, 1).map_or(0, unsigned),
            file: blob(row, 2).unwrap_or_default(),
        };
        let mark = hasher.removed(&ledger.file, other.day, other.place, &other.file);
        let fits = !keys_fit || blob(row, 3) == Some(mark);
        marks &= fits;
        // What another hand says was removed by retention is missing.
        removed.extend(fits.then_some(other));
    }
    let next = ledger.next.filter(|(day, next)| {
        let mark = hasher.followed(&ledger.file, *day, next);
        !keys_fit || ledger.next_mark == Some(mark)
    });
    marks &= next == ledger.next;
    let seal = hasher.ledger(
        &ledger.file,
        ledger.day,
        ledger.place,
        ledger.instances,
        &ledger.previous,
    );
    if keys_fit && ledger.seal != Some(seal) {
        let fault = Fault::of_instance(named, "all".to_owned(), FaultKind::Instance);
        report.faults.push(fault);
    }
    // Queries leave out a file whose events are said to be later than what they ask for.
    let hidden = ledger.earliest.is_some_and(|said| said > earliest);
    if !marks || ledger.day != named || hidden || !finds_all(&snapshot)? {
        report.faults.push(Fault::of_file(named, FaultKind::File));
    }
    report.files += 1;
    Ok(Seen {
        day: named,
        file: ledger.file,
        place: ledger.place,
        previous: ledger.previous(),
        next,
        removed,
        parts,
    })
}

/// Whether queries find what is there: its tables and indexes are as weir makes them, and an index leads to each row. Rows are read here
/// without one.
fn finds_all(connection: &Connection) -> Result<bool, StoreError> {
    const MADE: &str =
        "SELECT type, name, sql FROM sqlite_schema WHERE substr(name, 1, 7) <> 'sqlite_'";
    let usual = Connection::open_in_memory()?;
    usual.execute_batch(SCHEMA)?;
    usual.execute_batch(CLOSE)?;
    let made = |connection: &Connection| -> Result<HashSet<_>, StoreError> {
        let mut statement = connection.prepare(MADE)?;
        let made = statement.query_map([], |row| {
            let text = |index| row.get::<_, Option<String>>(index);
            Ok((text(0)?, text(1)?, text(2)?))
        })?;
        Ok(made.collect::<Result<_, _>>()?)
    };
    if !made(connection)?.is_subset(&made(&usual)?) {
        return Ok(false);
    }
    let said: String =
        connection.query_row("PRAGMA integrity_check(events)", [], |row| row.get(0))?;
    Ok(said == "ok")
}

/// The key of the file: that of its first instance, if it is known.
fn written_under<'a>(connection: &Connection, keys: &'a Keys) -> Result<&'a Hasher, StoreError> {
    let first = "SELECT key_check FROM instances ORDER BY id LIMIT 1";
    let check = connection
        .query_row(first, [], |row| Ok(blob(row, 0)))
        .optional()?;
    let known = check.and_then(|check| keys.of(check));
    Ok(known
        .or_else(|| keys.all().next())
        .expect("a set of keys is never empty"))
}

/// A file that is being checked.
struct Look<'a, 'r> {
    connection: &'a Connection,
    hasher: &'a Hasher,
    ledger: &'a Ledger,
    day: Day,
    report: &'r mut Report,
    /// At the first row that is not checked.
    events: Rows<'a>,
    /// The events of no instance.
    strays: Vec<Fault>,
    parts: Vec<SeenPart>,
    /// The earliest time of an event.
    earliest: u64,
}

impl Look<'_, '_> {
    fn instance_missing(&mut self, id: u64) {
        let fault = Fault::of_instance(self.day, format!("#{id}"), FaultKind::InstanceMissing);
        self.report.faults.push(fault);
    }

    /// Checks an instance and all of its events; whether it was written under the same key.
    fn instance(&mut self, row: &Row<'_>, id: u64) -> Result<bool, StoreError> {
        let (connection, hasher) = (self.connection, self.hasher);
        let name = text(row, 1).unwrap_or_default();
        let boot = row.get_ref(2)?.as_blob().unwrap_or_default();
        let known = <[u8; 16]>::try_from(boot).ok();
        let instance = known.map_or_else(|| format!("{name}/?"), |boot| shown(name, &boot));
        let end = |seq, hash| End {
            last: integer(row, seq).map_or(0, unsigned),
            hash: blob(row, hash).unwrap_or_default(),
        };
        let (before, end) = (end(6, 7), end(8, 9));
        let from = day(row, 5);
        self.strays(Some(signed(id)))?;
        self.parts.extend(known.map(|boot| SeenPart {
            name: name.to_owned(),
            boot,
            from,
            before,
            end,
        }));
        if blob(row, 4) != hasher.key_check() {
            let fault = Fault::of_instance(self.day, instance, FaultKind::Key);
            self.report.faults.push(fault);
            while self.is_at(id) {
                self.events.advance()?;
            }
            return Ok(false);
        }
        let part = InstancePart {
            id,
            name,
            boot,
            started: integer(row, 3).map_or(0, unsigned),
            from,
            before,
        };
        let seal = hasher.seal(&self.ledger.file, &part);
        if blob(row, 10) != Some(hasher.end_mark(&seal, end.last, &end.hash)) {
            let fault = Fault::of_instance(self.day, instance.clone(), FaultKind::EndMark);
            self.report.faults.push(fault);
        }
        let mut lookups = 0;
        let mut other = connection
            .prepare("SELECT hash, body FROM events WHERE instance_id = ?1 AND seq = ?2 LIMIT 1")?;
        let mut partner = |at, within| {
            lookups += 1;
            if lookups > LOOKUPS {
                return None;
            }
            let found = other.query_row([signed(id), signed(at)], |row| {
                let event = row.get_ref(1)?.as_blob().map(AuditEvent::<&str>::decode);
                let swapped = matches!(event, Ok(Ok(event)) if event.seq == within);
                Ok(blob(row, 0).filter(|_| swapped))
            });
            found.ok().flatten()
        };
        let mut check = Check::new(hasher, seal, before.last, end);
        let mut last = None;
        let mut out_of_order = Vec::new();
        while let Some(row) = self.events.get().filter(|row| is_of(row, id)) {
            self.report.events += 1;
            let body = row.get_ref(2)?.as_blob().unwrap_or_default();
            let event = AuditEvent::<&str>::decode(body).ok();
            if let Some(event) = &event {
                self.earliest = self.earliest.min(event.time.0);
            }
            let found = Found {
                seq: integer(row, 1).map_or(0, unsigned),
                body,
                hash: blob(row, 3),
                body_seq: event.as_ref().map(|event| event.seq),
                columns_fit: event.is_some_and(|event| columns_fit(row, &event)),
                is_of_another_version: is_of_another_version(body),
            };
            check.row(&found, &mut partner);
            // What was written is in the order of its numbers.
            let place = (integer(row, 8), found.seq);
            if let Some((arrival, seq)) = last.replace(place)
                && arrival >= place.0
            {
                out_of_order.push((seq..=found.seq, FaultKind::OutOfPlace));
            }
            self.events.advance()?;
        }
        let mut faults = check.finish();
        // Else it follows from another fault.
        if faults.is_empty() {
            faults = out_of_order;
        }
        let faults = faults.into_iter().map(|(seqs, kind)| Fault {
            days: self.day..=self.day,
            instance: instance.clone(),
            seqs,
            kind,
        });
        self.report.faults.extend(faults);
        Ok(true)
    }

    /// Names the events that are of no instance, up to those of this one.
    fn strays(&mut self, until: Option<i64>) -> Result<(), StoreError> {
        while let Some(row) = self.events.get() {
            // What is no number at all is of no instance, wherever it stands.
            let of = integer(row, 0);
            if let (Some(of), Some(until)) = (of, until)
                && of >= until
            {
                break;
            }
            self.report.events += 1;
            let seq = integer(row, 1).map_or(0, unsigned);
            self.strays.push(Fault {
                days: self.day..=self.day,
                instance: format!("#{}", of.unwrap_or(0)),
                seqs: seq..=seq,
                kind: FaultKind::OutOfPlace,
            });
            self.events.advance()?;
        }
        Ok(())
    }

    /// Whether the next row is of this instance.
    fn is_at(&self, id: u64) -> bool {
        self.events.get().is_some_and(|row| is_of(row, id))
    }
}

fn is_of(row: &Row<'_>, id: u64) -> bool {
    integer(row, 0) == Some(signed(id))
}

/// Whether the columns that queries look at say what the event says.
fn columns_fit(row: &Row<'_>, event: &AuditEvent<&str>) -> bool {
    let is_null = |index| matches!(row.get_ref(index), Ok(ValueRef::Null));
    let optional = |index, value: Option<&str>| match value {
        Some(value) => text(row, index) == Some(value),
        None => is_null(index),
    };
    integer(row, 4) == Some(signed(event.time.0))
        && optional(5, event.user)
        && text(row, 6) == Some(event.client.to_string().as_str())
        && optional(7, event.label)
}
