//! Where audit events are kept: what can be asked of a store, and what it answers. Must not name a database.

use std::error::Error;
use std::fmt;
use std::ops::RangeInclusive;

use thiserror::Error;

use crate::event::{AuditEvent, Micros};

#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process holds the lock for longer than the store waits.
    #[error("audit database is locked by another process")]
    Locked,
    #[error("audit database cannot grow: the disk is full")]
    Full,
    #[error("not an audit database of this weir (its version is {0}, not {expected})", expected = super::sqlite::VERSION)]
    Version(i64),
    #[error("audit database was begun with another key; use that key, or begin a new file")]
    Key,
    /// The instance's end mark is not as this writer left it.
    #[error("end mark was changed by another hand; run `weir audit verify`")]
    Changed,
    #[error("audit database: {0}")]
    Other(Box<dyn Error + Send + Sync>),
}

/// A place in the order in which events arrived in a store. Only comparable within one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(pub i64);

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
    /// Empty if all that was written is there, unchanged.
    pub faults: Vec<Fault>,
}

/// One piece of damage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The instance as `name/boot`; `#3` for one that the database does not know.
    pub instance: String,
    /// The events concerned; `0..=0` where it is about the instance as a whole.
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
    /// Written under another key than the one given, or with a key and none was given, or the reverse: not checked.
    Key,
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
            FaultKind::Key => "not checked: written under another key",
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.seqs.start(), self.seqs.end());
        write!(f, "{}", self.instance)?;
        match (first, last) {
            (0, 0) => {}
            (first, last) if first == last => write!(f, " event {first}")?,
            (first, last) => write!(f, " events {first} to {last}")?,
        }
        write!(f, ": {}", self.kind)
    }
}
