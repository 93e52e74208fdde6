//! The audit in SQLite: its files and days, a disk that is full, and events that must be safe.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test measures is printed"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod days;
mod files;
mod full;
mod guaranteed;
mod trouble;
