//! The data plane: a request is served start to finish on one lane's thread.

mod admit;
mod answer;
mod audit;
mod draft;
mod following;
mod forward;
mod greet;
pub mod handle;
mod headers;
mod http2;
mod interim;
pub mod lane;
mod mixed;
mod outbox;
mod outgoing;
mod quota;
mod record;
pub mod reload;
pub mod reply;
mod sessions;
mod shares;
mod shed;
mod trace;
mod tries;
mod upgrade;
mod upload;
mod wire;
