//! The data plane: a request is served start to finish on one lane's thread.

mod forward;
pub mod handle;
pub mod lane;
pub mod reply;
