//! Hostile clients and upstreams of HTTP/1.1, and PROXY headers, over raw sockets.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a broken step of a test is a failed test; bounds on time"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod connections;
mod proxy_protocol;
mod requests;
