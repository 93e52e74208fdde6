//! Postgres, checked: where the worker stores the audit, and where it is read.

use std::time::Duration;

use super::Secret;
use super::redis::Tls;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Postgres {
    /// The primary: a URL or `key=value` words, as libpq takes them.
    pub write: Secret,
    /// Replicas, asked in turn; empty: the primary is.
    pub read: Vec<Secret>,
    /// Connections to the primary, at most.
    pub write_pool: usize,
    /// Connections to read by, at most, over all replicas.
    pub read_pool: usize,
    /// For a connection from the pool, and for each statement of a query.
    pub timeout: Duration,
    /// Whether the worker brings the schema up to date when it starts.
    pub migrate: bool,
    /// For URLs whose `sslmode` asks for TLS.
    pub tls: Tls,
}
