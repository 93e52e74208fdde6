//! The audit on its way from the proxy by Redis and the worker to Postgres, and what is read of it there and in SQLite.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod dead_letters;
mod ingest;
mod postgres;
mod query;
mod rights;
mod search;
mod shipping;
mod spool;
mod verify;
mod worker;
