//! What weir tells of itself.

pub mod drain_metrics;
pub mod log;
pub mod metrics;
