//! HTTP/1.1 on the wire (RFC 9112): heads and bodies, as bytes in and out. Nothing here does I/O, or knows routes.

pub mod body;
mod fields;
pub mod head;
pub mod hygiene;
pub mod path;
pub mod proxy_protocol;
pub mod response;
pub mod trace_context;
pub mod trailers;
pub mod websocket;
