//! The outside world: where state is kept.

pub mod limits;
