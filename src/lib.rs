//! weir: a sidecar reverse proxy with rate limits, circuit breakers, sessions and audit.
//!
//! `ARCHITECTURE.md` says in which order to read the modules, and how they hang together.

pub mod admin;
pub mod audit;
pub mod background;
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
