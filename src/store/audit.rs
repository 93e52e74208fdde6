//! Where audit events are kept: what can be asked of a store, and what it answers. Must not name a database.

use std::error::Error;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;

use thiserror::Error;

use super::days::Day;
use crate::event::{AuditEvent, Micros, Traits};

#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process holds the lock for longer than the store waits.
    #[error("audit database is locked by another process")]
    Locked,
    #[error("audit database cannot grow: the disk is full")]
    Full,
    #[error("not an audit database of this weir (its version is {0}, not {expected})", expected = super::sqlite::VERSION)]
    Version(i64),
    /// A file stands at the path itself, where version 1 kept all days.
    #[error(
        "a file without a day in its name is from an earlier weir: move it away, and read it with that weir"
    )]
    Undated,
    #[error("there is no audit database")]
    Absent,
    #[error("audit database was begun with another key; use that key, or another path")]
    Key,
    /// The instance's end mark is not as this writer left it.
    #[error("end mark was changed by another hand; run `weir audit verify`")]
    Changed,
    #[error("audit database: {0}")]
    Folder(#[from] io::Error),
    #[error("audit database: {0}")]
    Other(Box<dyn Error + Send + Sync>),
}

/// A place in the order in which events arrived in a store. Only comparable within one store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// Of the file.
    pub day: Day,
    /// Within it, from 1.
    pub arrival: i64,
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
    /// At most as many.
    pub limit: Option<u32>,
    /// Which ones when there are more than the limit.
    pub order: Order,
}

impl Filter {
    /// Whether an event passes by its route, method, path and status.
    pub fn passes(&self, event: &Traits<'_>) -> bool {
        let is = |wanted: &Option<String>, value| wanted.is_none() || wanted.as_deref() == value;
        let prefix = self.path_prefix.as_ref();
        let status = self.status.as_ref();
        is(&self.route, event.route)
            && is(&self.method, Some(event.method))
            && prefix.is_none_or(|prefix| event.path.starts_with(prefix))
            && status.is_none_or(|range| range.contains(&event.status))
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

/// What `verify` found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows read.
    pub events: u64,
    /// Boots of instances known.
    pub instances: u64,
    /// Files read.
    pub files: u64,
    /// Empty if all that was written is there, unchanged.
    pub faults: Vec<Fault>,
}

/// One piece of damage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file or files concerned.
    pub days: RangeInclusive<Day>,
    /// The instance as `name/boot`; `#3` for one that the database does not know; empty if none is concerned.
    pub instance: String,
    /// The events concerned; `0..=0` where it is not about events.
    pub seqs: RangeInclusive<u64>,
    pub kind: FaultKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// The row is not what was written.
    Changed,
    /// Rows between others are gone.
    Missing,
    /// The row holds the event of another place, or a place is taken twice.
    OutOfPlace,
    /// The last rows are gone.
    TailMissing,
    /// What says where the instance's events end was changed.
    EndMark,
    /// What describes the instance was changed.
    Instance,
    /// An instance is gone as a whole.
    InstanceMissing,
    /// The instance's events do not go on from what the file before ends with.
    Link,
    /// What describes the file was changed.
    File,
    /// A file is gone as a whole, and not by retention.
    FileMissing,
    /// Written under another key than the one given, or with a key and none was given, or the reverse: not checked.
    Key,
}

impl Fault {
    /// A fault of the instance as a whole, in one file.
    pub fn of_instance(day: Day, instance: String, kind: FaultKind) -> Fault {
        Fault {
            days: day..=day,
            instance,
            seqs: 0..=0,
            kind,
        }
    }

    /// A fault of the file as a whole.
    pub fn of_file(day: Day) -> Fault {
        Fault::of_instance(day, String::new(), FaultKind::File)
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FaultKind::Changed => "changed",
            FaultKind::Missing => "missing",
            FaultKind::OutOfPlace => "out of place",
            FaultKind::TailMissing => "missing at the end",
            FaultKind::EndMark => "end mark changed",
            FaultKind::Instance => "instance changed",
            FaultKind::InstanceMissing => "instance missing",
            FaultKind::Link => "does not go on from the file before",
            FaultKind::File => "what describes the file was changed",
            FaultKind::FileMissing => "missing",
            FaultKind::Key => "not checked: written under another key",
        })
    }
}

/// `2026-11-25: a/0198… event 7: changed`, or `file of 2026-11-24 missing: events 3 to 9 of a/0198…`.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let events = match (self.seqs.start(), self.seqs.end()) {
            (0, 0) => String::new(),
            (first, last) if first == last => format!("event {first}"),
            (first, last) => format!("events {first} to {last}"),
        };
        let (first, last) = (self.days.start(), self.days.end());
        if self.kind == FaultKind::FileMissing {
            match first == last {
                true => write!(f, "file of {first} missing")?,
                false => write!(f, "files of {first} to {last} missing")?,
            }
            return match events.is_empty() {
                true => Ok(()),
                false => write!(f, ": {events} of {}", self.instance),
            };
        }
        write!(f, "{first}:")?;
        for part in [&self.instance, &events] {
            if !part.is_empty() {
                write!(f, " {part}")?;
            }
        }
        match self.instance.is_empty() {
            true => write!(f, " {}", self.kind),
            false => write!(f, ": {}", self.kind),
        }
    }
}
