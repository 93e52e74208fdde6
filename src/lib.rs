//! weir: a sidecar reverse proxy with rate limits, circuit breakers, sessions and audit.
//!
//! `ARCHITECTURE.md` says in which order to read the modules, and how they hang together.
//!
//! All of them are `pub` for the tests, the benches and the fuzz targets, which are crates of their own. So the compiler's `dead_code` does not see what
//! is used by no one: keep `mod` and `pub(super)` wherever those crates do without.

pub mod admin;
pub mod audit;
pub mod background;
pub mod blocking;
pub mod cli;
pub mod clock;
pub mod config;
pub mod event;
pub mod heartbeat;
pub mod http1;
pub mod http2;
pub mod inject;
pub mod intern;
pub mod keys;
pub mod memory;
pub mod net;
pub mod plan;
pub mod policy;
pub mod proxy;
pub mod redirect;
pub mod store;
pub mod telemetry;
pub mod upstream;
