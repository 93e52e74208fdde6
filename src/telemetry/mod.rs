//! What weir tells of itself.

pub mod access_log;
pub mod log;
pub mod metrics;
pub mod spans;
pub mod traces;
