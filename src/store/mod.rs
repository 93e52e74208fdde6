//! Where state is kept: in memory, on disk, in Redis and in Postgres.

pub mod audit;
pub mod breakers;
pub mod fleet;
pub mod limits;
pub mod postgres;
pub mod redis;
pub mod sessions;
pub mod spool;
pub mod sqlite;
pub mod streams;
mod table;
