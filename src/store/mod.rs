//! The outside world: where state is kept.

pub mod audit;
pub mod batch;
pub mod breakers;
pub mod chain;
pub mod days;
pub mod events;
pub mod fleet;
pub mod grants;
pub mod leases;
pub mod limits;
pub mod links;
pub mod overrides;
pub mod postgres;
pub mod redis;
pub mod sessions;
pub mod shared_breakers;
pub mod slots;
pub mod spool;
pub mod sqlite;
pub mod streams;
mod table;
