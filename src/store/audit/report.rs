//! What `verify` found, and how that is told.

use std::fmt;
use std::ops::RangeInclusive;

use crate::store::audit::days::Day;

/// What `verify` found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows read.
    pub events: u64,
    /// Boots of instances known.
    pub instances: u64,
    /// Files read; days of Postgres.
    pub files: u64,
    /// Boots that have not said that they ended, as `name/boot`: they still run, or were killed and nobody has sent what they left.
    /// Their newest events could be gone unnoticed. SQLite's have end marks from the first event on.
    pub open: Vec<String>,
    /// Events that have not arrived, while newer ones of the same boot have, minutes ago at most: no fault yet.
    pub pending: u64,
    /// Events that were dropped before they could be numbered, as the boots that are kept say.
    pub dropped: u64,
    /// Empty if all that was written is there, unchanged.
    pub faults: Vec<Fault>,
}

/// One piece of damage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file or files concerned; days of Postgres.
    pub days: RangeInclusive<Day>,
    /// The instance as `name/boot`; `#3` for one that the database does not know; empty if none is concerned.
    pub instance: String,
    /// The events concerned; `0..=0` where it is not about events.
    pub seqs: RangeInclusive<u64>,
    pub kind: FaultKind,
}

/// What is wrong with events, or with what is said of them.
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
    /// The batch does not go on from the one before, which is itself as it was written.
    Chain,
    /// What describes the file was changed.
    File,
    /// Postgres shows this user less than there is, or something else.
    Veiled,
    /// A file is gone as a whole, and not by retention.
    FileMissing,
    /// The file is there, and is damaged, of another weir, or shut to the reader: not checked.
    Unreadable,
    /// Written under another key than the one given, or with a key and none was given, or the reverse: not checked.
    Key,
    /// Made by a weir of another version, whose events this one cannot read: not checked.
    Version,
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
    pub fn of_file(day: Day, kind: FaultKind) -> Fault {
        Fault::of_instance(day, String::new(), kind)
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
            FaultKind::Chain => "does not go on from the batch before",
            FaultKind::File => "what describes the file was changed",
            FaultKind::Veiled => {
                "a view, or row security for this user, stands between queries and what is stored: verify as the tables' owner"
            }
            FaultKind::FileMissing => "missing",
            FaultKind::Unreadable => "cannot be read",
            FaultKind::Key => "not checked: written under another key",
            FaultKind::Version => "not checked: made by a weir of another version",
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
        if self.kind == FaultKind::Veiled {
            return self.kind.fmt(f);
        }
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
