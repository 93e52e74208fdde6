//! What weir tells of itself.

pub mod access_log;
mod lines;
pub mod log;
pub mod metrics;
pub mod panics;
pub mod spans;
pub mod traces;
