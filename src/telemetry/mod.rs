//! What weir tells of itself.

pub mod log;
pub mod metrics;
