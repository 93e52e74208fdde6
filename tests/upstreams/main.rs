//! Upstreams: which endpoint takes a request, how it is reached, and what becomes of a request that fails there.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod agreed;
mod breaking_off;
mod endpoints;
mod exchanges;
mod names;
mod retries;
mod unreached;
