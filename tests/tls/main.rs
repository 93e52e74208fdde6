//! TLS with clients, upstreams and stores, and certificates that change.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod clients;
mod renewal;
mod stores;
mod upstreams;
