//! Upstreams: their endpoints as all lanes see them, and each lane's connections to them.
//!
//! A [`LiveUpstream`] is what lanes share of one: which endpoints there are, how they are, how much goes on. Lanes read it without a
//! lock. A [`LaneUpstream`] is one lane's view of it: it picks an endpoint for a request and has a [`Pool`] of idle connections for each.

mod adaptive;
pub mod caps;
pub mod connect;
mod endpoint;
pub mod grpc_health;
pub mod http2;
mod lane;
mod live;
mod members;
pub mod names;
pub mod ours;
mod pool;
pub mod probe;
mod reach;

pub use endpoint::{Endpoint, EndpointOutcome, Fault, authority_of};
pub use lane::{Aim, LaneUpstream, NoEndpoint, Picked, Slot};
pub use live::{EndpointState, LiveUpstream, ResponseLines, RetryPermit};
pub use members::Counts;
pub use pool::{Bound, Connected, Pool, Reached, Until};
pub use reach::{Cause, Stage, Unreached};
