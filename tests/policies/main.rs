//! The policies of a request on one lane: limits, sessions, breakers, and how much an upstream is given.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod adaptive;
mod breakers;
mod limit_keys;
mod limits;
mod limits_together;
mod sessions;
mod told;
