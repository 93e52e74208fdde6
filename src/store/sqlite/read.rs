//! Reads the audit's files, which others may be writing to.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::types::ToSql;

use super::{Ledger, open_if_made, open_to_read, signed, text, verify};
use crate::event::{AuditEvent, Traits};
use crate::store::audit::chain::Keys;
use crate::store::audit::days::{self, Day};
use crate::store::audit::links;
use crate::store::audit::{
    Cursor, Fault, FaultKind, Filter, Found, Order, Report, StoreError, Stored,
};

/// Instructions of SQLite between questions whether a search goes on: of some 1,000 rows, which is less than a millisecond.
const ASK_EVERY: i32 = 10_000;

/// Events of a time that are sorted into the order in which they arrived, at most. Each page of more would sort all that are left: an export
/// of a day of a million, by its time, took 83 s so, where one of all days took 4.4.
const SORTED: i64 = 20_000;

/// Reads all files of a path, or one file. Files that come and go meanwhile are heeded.
pub struct Reader {
    path: PathBuf,
    /// The day of the one file that is read alone.
    alone: Option<Day>,
}

impl Reader {
    /// `path` is the one of the configuration, without a day, or one file. Nothing is ever written to them.
    pub fn open(path: &Path) -> Result<Reader, StoreError> {
        let path = path.to_owned();
        if path.is_file() {
            let alone = Some(Ledger::read(&open_to_read(&path)?)?.day);
            return Ok(Reader { path, alone });
        }
        let reader = Reader { path, alone: None };
        for (day, file) in reader.files()?.iter().rev() {
            match open_if_made(file) {
                // Whoever reads it is told of its damage, and of the other days first.
                Ok(Some(_)) | Err(StoreError::Damaged(_)) => return Ok(reader),
                Ok(None) => {}
                Err(error) => return Err(error.of_day(*day)),
            }
        }
        Err(StoreError::Absent)
    }

    /// The events that pass the filter. A row that is no longer an event is logged and left out; `verify` names it.
    /// To follow what arrives, ask again after the last cursor: a day's file is done with once the next has an event.
    pub fn query(&self, filter: &Filter) -> Result<Vec<Stored>, StoreError> {
        self.search(filter, || true).map(|found| found.events)
    }

    /// Likewise, for as long as `goes_on`; then what was found by then and where to go on, or an error if it came nowhere.
    pub fn search(
        &self,
        filter: &Filter,
        goes_on: impl Fn() -> bool + Clone + Send + 'static,
    ) -> Result<Found, StoreError> {
        let mut files = self.files()?;
        if filter.order == Order::NewestFirst {
            files.reverse();
        }
        let mut search = Search {
            filter,
            stored: Vec::new(),
            place: None,
            removed: match filter.order {
                Order::OldestFirst => filter.after.map(|after| after.day),
                Order::NewestFirst => None,
            },
        };
        for (day, path) in files {
            if search.is_full() {
                break;
            }
            // No event is later than the day of its file.
            let too_old = filter.since.is_some_and(|since| day.end() <= since);
            let passed = filter.after.is_some_and(|after| day < after.day)
                || filter.before.is_some_and(|before| day > before.day);
            if too_old || passed {
                continue;
            }
            match search.file(&path, day, goes_on.clone()) {
                Ok(()) => {}
                Err(StoreError::OutOfTime) => return search.stopped(),
                // Whoever reads on from there meets it again; of the newest, fewer would look like all there are.
                Err(_) if filter.order == Order::OldestFirst && !search.stored.is_empty() => {
                    return search.stopped();
                }
                Err(error) => return Err(error.of_day(day)),
            }
        }
        Ok(Found {
            events: search.stored,
            removed: search.removed.is_some(),
            ..Found::default()
        })
    }

    /// Checks everything that was written, as of now. One of the keys must be that which the files were written with.
    pub fn verify(&self, keys: &Keys) -> Result<Report, StoreError> {
        let mut report = Report::default();
        let mut seen = Vec::new();
        let mut unreadable = BTreeSet::new();
        for (day, path) in self.files()? {
            let checked = open_if_made(&path).and_then(|opened| match opened {
                Some(connection) => verify::file(&connection, day, keys, &mut report).map(Some),
                None => Ok(None),
            });
            match checked.map_err(|error| error.of_day(day)) {
                Ok(file) => seen.extend(file),
                Err(StoreError::OfDay(_, error)) => {
                    tracing::warn!(%day, %error, "not checked");
                    unreadable.insert(day);
                }
                Err(error) => return Err(error),
            }
        }
        if self.alone.is_none() {
            let mut faults = links::check(&seen);
            // What others say that a file held, which is there and says nothing.
            for fault in &mut faults {
                let mut days = fault.days.start().0..=fault.days.end().0;
                if fault.kind == FaultKind::FileMissing
                    && days.all(|day| unreadable.contains(&Day(day)))
                {
                    fault.kind = FaultKind::Unreadable;
                }
            }
            report.faults.extend(faults);
        }
        for day in unreadable {
            let is_told =
                |fault: &Fault| fault.kind == FaultKind::Unreadable && fault.days.contains(&day);
            if !report.faults.iter().any(is_told) {
                let fault = Fault::of_file(day, FaultKind::Unreadable);
                report.faults.push(fault);
            }
        }
        Ok(report)
    }

    /// In the order of their days.
    fn files(&self) -> Result<Vec<(Day, PathBuf)>, StoreError> {
        match self.alone {
            Some(day) => Ok(vec![(day, self.path.clone())]),
            None => Ok(days::list(&self.path)?),
        }
    }
}

/// A search under way.
struct Search<'a> {
    filter: &'a Filter,
    stored: Vec<Stored>,
    /// Up to where all was looked at, as far as that is known.
    place: Option<Cursor>,
    /// The day to go on from, until its file was found.
    removed: Option<Day>,
}

impl Search<'_> {
    fn is_full(&self) -> bool {
        let limit = self.filter.limit;
        limit.is_some_and(|limit| self.stored.len() >= limit as usize)
    }

    /// Adds the events of a day's file that pass, unless all are too new.
    fn file(
        &mut self,
        path: &Path,
        day: Day,
        goes_on: impl Fn() -> bool + Send + 'static,
    ) -> Result<(), StoreError> {
        let filter = self.filter;
        let Some(mut connection) = open_if_made(path)? else {
            return Ok(());
        };
        self.removed = self.removed.filter(|removed| *removed != day);
        let earliest = Ledger::read(&connection)?.earliest;
        let too_new = |until| earliest.is_some_and(|earliest| earliest >= until);
        if filter.until.is_some_and(|until| too_new(until.0)) {
            return Ok(());
        }
        let end = end(&connection, filter.order)?;
        connection.progress_handler(ASK_EVERY, Some(move || !goes_on()))?;
        let part = part(&connection, filter, day, earliest)?;
        self.rows(&connection, day, &part)?;
        let end = end.map(|arrival| place(day, arrival));
        self.place = match filter.order {
            // More may have arrived, and been read.
            Order::OldestFirst => self.place.max(end),
            Order::NewestFirst => end.or(self.place),
        };
        Ok(())
    }

    fn rows(&mut self, connection: &Connection, day: Day, part: &Part) -> Result<(), StoreError> {
        let filter = self.filter;
        let (sql, values) = select(filter, part);
        let mut statement = connection.prepare(&sql)?;
        let mut rows = statement.query(rusqlite::params_from_iter(values))?;
        // Counted here and not by SQL, so that rows left out do not end an answer early.
        while !self.is_full()
            && let Some(row) = rows.next()?
        {
            let cursor = place(day, row.get(0)?);
            self.place = Some(cursor);
            let body = row.get_ref(3)?.as_blob().unwrap_or_default();
            if Traits::of(body).is_some_and(|event| !filter.admits_traits(&event)) {
                continue;
            }
            match AuditEvent::decode(body) {
                Ok(event) => self.stored.push(Stored {
                    cursor,
                    instance: text(row, 1).unwrap_or("?").to_owned(),
                    boot: row.get(2).unwrap_or_default(),
                    event,
                }),
                Err(_) => {
                    tracing::warn!(%day, cursor.arrival, "not an event: run `weir audit verify`");
                }
            }
        }
        Ok(())
    }

    /// What there is of it once it does not go on.
    fn stopped(self) -> Result<Found, StoreError> {
        let began = match self.filter.order {
            Order::OldestFirst => self.filter.after,
            Order::NewestFirst => self.filter.before,
        };
        match self.place {
            place @ Some(_) if place != began => Ok(Found {
                events: self.stored,
                stopped_at: place,
                removed: self.removed.is_some(),
                ..Found::default()
            }),
            Some(_) | None => Err(StoreError::OutOfTime),
        }
    }
}

/// Where in the file of a day the events of a filter are, as far as that is to be told with less work than to read them. `earliest` is what
/// the file says that none of them is ahead of.
pub(super) fn part(
    connection: &Connection,
    filter: &Filter,
    day: Day,
    earliest: Option<u64>,
) -> Result<Part, StoreError> {
    let within = |place: Option<Cursor>| place.filter(|place| place.day == day);
    let mut part = Part {
        after: within(filter.after).map(|after| after.arrival),
        before: within(filter.before).map(|before| before.arrival),
        sorts: true,
    };
    let is_timed = filter.since.is_some() || filter.until.is_some();
    if !is_timed || !has_times(connection)? {
        return Ok(part);
    }
    let since = filter.since.map_or(i64::MIN, |since| signed(since.0));
    let until = filter.until.map_or(i64::MAX, |until| signed(until.0));
    let times = [since, until.saturating_sub(1)];
    let found = "FROM events INDEXED BY events_time WHERE time BETWEEN ?1 AND ?2";
    let sql = format!("SELECT count(*) FROM (SELECT 1 {found} LIMIT {SORTED} + 1)");
    let count: i64 = connection.query_row(&sql, times, |row| row.get(0))?;
    part.sorts = count <= SORTED;
    // To ask where they are costs as much as to read them all: once, of the first page.
    let is_first = match filter.order {
        Order::OldestFirst => part.after.is_none(),
        Order::NewestFirst => part.before.is_none(),
    };
    let is_part =
        earliest.is_none_or(|earliest| signed(earliest) < since) || until < signed(day.end().0);
    if is_first && is_part && !part.sorts {
        let sql = format!("SELECT min(arrival) - 1, max(arrival) + 1 {found}");
        let (after, before): (i64, i64) =
            connection.query_row(&sql, times, |row| Ok((row.get(0)?, row.get(1)?)))?;
        part.after = part.after.max(Some(after));
        part.before = Some(part.before.map_or(before, |told| told.min(before)));
    }
    Ok(part)
}

/// Whether the day is closed, and has an index of times.
fn has_times(connection: &Connection) -> Result<bool, StoreError> {
    let sql = "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND name = 'events_time'";
    Ok(connection.query_row(sql, [], |row| row.get::<_, i64>(0))? > 0)
}

/// Where a file that was read from one end stands at the other, as of now: a writer may go on behind it. `None` for one without events.
fn end(connection: &Connection, order: Order) -> Result<Option<i64>, StoreError> {
    let sql = match order {
        Order::OldestFirst => "SELECT max(arrival) FROM events",
        Order::NewestFirst => "SELECT min(arrival) FROM events",
    };
    Ok(connection.query_row(sql, [], |row| row.get(0))?)
}

fn place(day: Day, arrival: i64) -> Cursor {
    Cursor {
        day,
        arrival,
        ..Cursor::default()
    }
}

/// Where in a file to look, and how.
#[derive(Debug)]
pub(super) struct Part {
    /// Behind this arrival.
    pub(super) after: Option<i64>,
    /// Ahead of this one.
    pub(super) before: Option<i64>,
    /// Whether the events of the filter's time may be found by the index of times, which has them in another order.
    pub(super) sorts: bool,
}

/// The events of this part of a file that pass by what has a column; [`Filter::admits_traits`] asks for the rest.
pub(super) fn select(filter: &Filter, part: &Part) -> (String, Vec<Box<dyn ToSql>>) {
    let mut sql = String::from(
        "SELECT arrival, name, boot, body FROM events LEFT JOIN instances ON id = instance_id WHERE 1",
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
    ask("arrival > ?", part.after.map(number));
    ask("arrival < ?", part.before.map(number));
    // With a plus, SQLite uses no index for it.
    let (from, to) = match part.sorts {
        true => ("time >= ?", "time < ?"),
        false => ("+time >= ?", "+time < ?"),
    };
    ask(from, filter.since.map(|since| number(signed(since.0))));
    ask(to, filter.until.map(|until| number(signed(until.0))));
    ask("user = ?", text(&filter.user));
    ask("client = ?", text(&filter.client));
    ask("label = ?", text(&filter.label));
    sql.push_str(match filter.order {
        Order::OldestFirst => " ORDER BY arrival",
        Order::NewestFirst => " ORDER BY arrival DESC",
    });
    (sql, values)
}
