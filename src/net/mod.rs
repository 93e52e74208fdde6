//! Connections as bytes: what carries them is no matter to those who speak HTTP over them.

pub mod any;
pub mod gather;
pub mod listen;
pub mod stream;
pub mod tls;
pub mod tunnel;
mod turn;
