//! Requests through weir: how they come in, what becomes of them, and what is told of them.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod access_log;
mod clients;
mod connections;
mod grpc;
mod lane;
mod redirect;
mod rewrite;
mod routes;
mod standalone;
mod traces;
mod transparent;
mod turns;
mod ways_in;
