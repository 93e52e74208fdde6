//! What weir tells of itself.

pub mod log;
