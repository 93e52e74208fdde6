//! Where audit events are kept: what can be asked of a store, and what it answers. `events` alone asks SQLite or Postgres.

pub mod batch;
pub mod chain;
pub mod days;
pub mod events;
pub mod links;
pub mod record;
mod report;
pub mod words;

use std::error::Error;
use std::io;
use std::ops::RangeInclusive;

use thiserror::Error;

pub use self::report::{Fault, FaultKind, Report};
use crate::event::{AuditEvent, Micros, Traits};
use days::Day;

/// Why the audit cannot be written or read.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process holds the lock for longer than the store waits.
    #[error("audit database is locked by another process")]
    Locked,
    #[error("audit database cannot grow: the disk is full")]
    Full,
    #[error(
        "not an audit database of this weir (its version is {found}, not {expected}): run the weir that made it, or move the audit's files to another folder"
    )]
    Version { found: i64, expected: i64 },
    /// A file stands at the path itself, where version 1 kept all days.
    #[error(
        "a file without a day in its name is from an earlier weir: move it away, and read it with that weir"
    )]
    Undated,
    #[error(
        "there is no audit database; weir makes it with the first event, a relative path from the folder that it was started in; -c FILE or --database FILE name another"
    )]
    Absent,
    #[error("audit database was begun with another key; use that key, or another path")]
    Key,
    /// The instance's end mark is not as this writer left it.
    #[error("end mark was changed by another hand; run `weir audit verify`")]
    Changed,
    /// The places of Postgres's events are numbers of its transactions.
    #[error(
        "audit was copied here from another Postgres, or this one was put back, as by a restore or by a standby that was behind and is promoted: the place is not there; see \"Moving\" in docs/audit.md"
    )]
    Moved,
    /// SQLite's files and Postgres have other numbers.
    #[error("the place is of another store: begin anew, by \"since\"")]
    Elsewhere,
    /// As of a search with a deadline, which [`Found::stopped_at`] would have no place for.
    #[error(
        "the search came nowhere in its time: ask for less by \"since\", or give it longer by \"timeout\""
    )]
    OutOfTime,
    /// What was to be done with the file of this day.
    #[error("day {0}: {1}")]
    OfDay(Day, Box<StoreError>),
    #[error("audit database: {0}")]
    Folder(io::Error),
    /// A file is not what SQLite wrote.
    #[error("audit database: {0}")]
    Damaged(Box<dyn Error + Send + Sync>),
    #[error("audit database: {0}")]
    Other(Box<dyn Error + Send + Sync>),
}

impl StoreError {
    /// Where it is of a day's file, not of a lock, the disk or the time.
    pub fn of_day(self, day: Day) -> StoreError {
        match self {
            StoreError::Version { .. }
            | StoreError::Undated
            | StoreError::Folder(_)
            | StoreError::Damaged(_)
            | StoreError::Other(_) => StoreError::OfDay(day, self.into()),
            StoreError::Locked
            | StoreError::Full
            | StoreError::Absent
            | StoreError::Key
            | StoreError::Changed
            | StoreError::Moved
            | StoreError::Elsewhere
            | StoreError::OutOfTime
            | StoreError::OfDay(..) => self,
        }
    }
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> StoreError {
        match error.kind() {
            io::ErrorKind::StorageFull => StoreError::Full,
            _ => StoreError::Folder(error),
        }
    }
}

/// A place in the order in which events arrived in a store. Only comparable within one store. `Display` and `FromStr` are its
/// form for others, who are to make nothing of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// Of the file. In Postgres always the first day: there what comes late is kept with the day that it is of, but has arrived
    /// behind what is of later days.
    pub day: Day,
    /// Within the file, from 1. In Postgres the transaction.
    pub arrival: i64,
    /// Of those that arrived in one transaction of Postgres, the boot's number there; else 0.
    pub boot: i32,
    /// Likewise, the number within the boot; else 0.
    pub seq: i64,
}

/// Which events to read; a field that is `None` asks for nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// This time or later.
    pub since: Option<Micros>,
    /// Before this time.
    pub until: Option<Micros>,
    pub user: Option<String>,
    pub route: Option<String>,
    /// The client's address, as `IpAddr` prints it.
    pub client: Option<String>,
    pub status: Option<RangeInclusive<u16>>,
    pub label: Option<String>,
    pub method: Option<String>,
    pub path_prefix: Option<String>,
    /// Only what arrived after this place.
    pub after: Option<Cursor>,
    /// Only what arrived before this place.
    pub before: Option<Cursor>,
    /// Only what nothing can come to stand ahead of any more: for who later asks what arrived after the last place that was found. In
    /// Postgres that holds back what arrived while a transaction that began earlier is still open.
    pub settled: bool,
    /// At most as many.
    pub limit: Option<u32>,
    /// Which ones when there are more than the limit.
    pub order: Order,
}

impl Filter {
    /// The first day that can have what passes: no event is later than the day of its batch.
    pub fn since_day(&self) -> Day {
        self.since
            .map_or(Day::default(), |since| Day::of(since.into()))
    }

    /// Whether an event passes by its route, method, path and status: what SQLite keeps no column of.
    pub fn admits_traits(&self, event: &Traits<'_>) -> bool {
        let is = |wanted: &Option<String>, value| wanted.is_none() || wanted.as_deref() == value;
        let prefix = self.path_prefix.as_ref();
        let status = self.status.as_ref();
        is(&self.route, event.route)
            && is(&self.method, Some(event.method))
            && prefix.is_none_or(|prefix| event.path.starts_with(prefix))
            && status.is_none_or(|range| range.contains(&event.status))
    }

    /// Whether an event passes by all that is asked of events, wherever they are.
    pub fn admits(&self, event: &AuditEvent) -> bool {
        let is = |wanted: &Option<String>, value: Option<&str>| {
            wanted.is_none() || wanted.as_deref() == value
        };
        let client = self.client.as_deref().map(|client| client.parse());
        let traits = Traits {
            route: event.route.as_deref(),
            method: &event.method,
            path: &event.path,
            status: event.status,
        };
        self.since.is_none_or(|since| event.time >= since)
            && self.until.is_none_or(|until| event.time < until)
            && client.is_none_or(|client| client == Ok(event.client))
            && is(&self.user, event.user.as_deref())
            && is(&self.label, event.label.as_deref())
            && self.admits_traits(&traits)
    }
}

/// The order of arrival.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    OldestFirst,
    NewestFirst,
}

/// An event as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub cursor: Cursor,
    /// The name of the instance that wrote it.
    pub instance: String,
    /// The boot of the instance, a UUID; `seq` counts within it.
    pub boot: [u8; 16],
    pub event: AuditEvent,
}

/// What a search came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// In the order asked for.
    pub events: Vec<Stored>,
    /// Where to go on, by the filter's `after` or `before`, if its time was over first: all ahead of it was looked at.
    pub stopped_at: Option<Cursor>,
    /// The place of the last event that was looked at and that nothing can come to stand ahead of any more, passed or not, by the server that
    /// answered. SQLite's files do not tell with it.
    pub settled_to: Option<Cursor>,
    /// Whether the day of the place that it went on from, or of the first event where there is none, is gone: what was behind that was not
    /// seen. Postgres tells it to who does not follow.
    pub removed: bool,
}

impl Stored {
    /// The day that it is kept with; in Postgres that of its time, which is another one around midnight alone.
    pub fn day(&self) -> Day {
        match self.cursor.day {
            day if day == Day::default() => Day::of(self.event.time.into()),
            day => day,
        }
    }
}
