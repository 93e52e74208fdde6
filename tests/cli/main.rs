//! What a user types and reads: commands, what they say where they cannot, and what the documents promise.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod commands;
mod errors;
mod figures;
mod pages;
mod readme;
mod reference;
mod reload;
mod scarce;
