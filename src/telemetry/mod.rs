//! What weir tells of itself, and of requests beside the audit: log, access log, metrics, traces.

pub mod access_log;
mod lines;
pub mod log;
pub mod metrics;
pub mod panics;
pub mod spans;
pub mod traces;
