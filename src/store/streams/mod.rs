//! The audit's streams in Redis, which carry batches of events from proxies to workers.

pub mod consume;
pub mod dead;
