//! The audit, checked: of which requests how much is kept, and where.

use std::path::PathBuf;
use std::time::Duration;

use super::Secret;
pub use super::raw::{AuditLevel as Level, Delivery};
use crate::event::Redaction;

/// The database of SQLite, unless told.
pub const DATABASE: &str = "weir-audit.db";
/// How long its files are kept, unless told: 400 days.
pub const RETENTION: Duration = Duration::from_secs(400 * 86_400);

/// What is kept, and where.
#[derive(Debug, Clone, PartialEq)]
pub struct Audit {
    /// Of requests that no route serves; routes have their own.
    pub level: Level,
    /// The share of requests kept, 0 to 1; rejections and errors always are.
    pub sample: f64,
    /// Kept at [`Level::Headers`], by lower-case name.
    pub request_headers: Vec<String>,
    pub response_headers: Vec<String>,
    /// Whether the query is kept, redacted.
    pub query: bool,
    pub redaction: Redaction,
    pub delivery: Delivery,
    /// How events travel where there are Redis and Postgres.
    pub stream: Stream,
    pub spool: Spool,
    /// The database: its files have a day before the extension.
    pub sqlite: PathBuf,
    /// How long a day's file is kept; whole days, one at least.
    pub retention: Duration,
    /// The hash chain's key.
    pub key: Option<Secret>,
}

/// The most that [`Stream::shards`] can be.
pub const MOST_SHARDS: u16 = 256;

/// The streams of Redis that carry events to the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    pub name: String,
    /// Streams, spread over the cluster's nodes; at least one.
    pub shards: u16,
    /// Entries of one stream, at most; once it has as many, batches wait in the spool.
    pub max_length: u64,
    /// Events in a batch, which is an entry, at most.
    pub batch_events: usize,
    /// How long the first event of a batch waits for others; not under [`Delivery::Guaranteed`].
    pub batch_wait: Duration,
}

/// Where batches wait on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spool {
    /// A folder, for each process one within.
    pub path: PathBuf,
    /// Bytes, at most.
    pub max: u64,
}

impl Default for Stream {
    fn default() -> Stream {
        Stream {
            name: "audit".to_owned(),
            shards: 8,
            max_length: 10_000_000,
            batch_events: 200,
            batch_wait: Duration::from_millis(20),
        }
    }
}

impl Default for Spool {
    fn default() -> Spool {
        Spool {
            path: PathBuf::from("/var/lib/weir/spool"),
            max: 256 << 20,
        }
    }
}
