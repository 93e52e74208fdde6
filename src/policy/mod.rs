//! Policy as pure functions: nothing here does I/O or reads a clock; `now` is an argument.

pub mod balance;
pub mod breaker;
pub mod gradient;
pub mod lease;
pub mod limit;
pub mod outlier;
pub mod peers;
pub mod retry;
pub mod rewrite;
pub mod routes;
pub mod session;
pub mod shed;
