//! Upstreams: their endpoints as all lanes see them, and each lane's connections to them.
//!
//! [`Endpoints`] is what lanes share: which there are, how they are, how much goes on. Lanes read it without a lock. A [`Cluster`] is
//! one lane's view of it: it picks an endpoint for a request and has a [`Pool`] of idle connections for each.

mod adaptive;
pub mod caps;
mod cluster;
pub mod connect;
mod endpoints;
pub mod http2;
pub mod names;
pub mod ours;
mod pool;
pub mod probe;
mod resolve;

pub use cluster::{Aim, Cluster, NoEndpoint, Outcome, Picked, Slot};
pub use endpoints::{Counts, Endpoint, Endpoints, Retrying};
pub use pool::{Connected, Pool, Reached, Unreached, Until};
