//! The audit, checked: of which requests how much is kept, and where.

use std::path::PathBuf;
use std::time::Duration;

use super::Secret;
use crate::event::Redaction;

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
    /// The database: its files have a day before the extension.
    pub sqlite: PathBuf,
    /// How long a day's file is kept; whole days, one at least.
    pub retention: Duration,
    /// The hash chain's key.
    pub key: Option<Secret>,
}

/// How much of a request is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    None,
    Metadata,
    /// And the headers that are to be captured.
    Headers,
}
