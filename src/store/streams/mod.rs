//! The audit's streams in Redis, which carry batches of events: they go in at the proxy's end and come out at the worker's.
//! Must not know what is in a batch.

pub mod consume;
pub mod dead;
pub mod produce;
