//! Postgres as it is written.

use schemars::JsonSchema;
use serde::Deserialize;

use super::Tls;
use crate::config::units::TimeLength;
use crate::config::yaml::{At, OneOrMany};

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Postgres {
    /// The primary: `postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=require`, or libpq's `host=HOST dbname=DATABASE`.
    pub write: At<String>,
    /// Replicas, asked in turn [default: none, the primary is asked].
    pub read: Option<At<OneOrMany<String>>>,
    pub pool: Option<At<Pool>>,
    /// Whether a worker brings the schema up to date when it starts, as `weir migrate` does [default: true].
    pub migrate: Option<At<bool>>,
    /// For a `sslmode` that asks for it [default: the public authorities, no certificate of ours].
    pub tls: Option<At<Tls>>,
}

/// Connections are made when they are needed, and kept.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Pool {
    /// Connections to the primary, at most [default: 40].
    pub write: Option<At<u32>>,
    /// Connections to read by, at most [default: 60].
    pub read: Option<At<u32>>,
    /// For a connection, and for each statement of a query [default: 2s].
    pub timeout: Option<At<TimeLength>>,
}
