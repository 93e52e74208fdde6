//! The data plane: a request is served start to finish on one lane's thread.

mod admit;
mod answer;
mod audit;
mod draft;
mod following;
mod forward;
pub mod handle;
mod headers;
pub mod lane;
mod outbox;
mod quota;
mod record;
pub mod reload;
pub mod reply;
mod sessions;
mod shares;
mod trace;
mod upgrade;
mod upload;
mod wire;
