//! State that processes share through Redis: its scripts, limits, breakers and sessions, and several processes at once.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test measures is printed"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod breaker_model;
mod breaker_script;
mod breakers;
mod fleet;
mod joined;
mod limits;
mod scripts;
mod sessions;
mod simulation;
mod sweep;
