//! The outside world: where state is kept.

pub mod breakers;
pub mod limits;
