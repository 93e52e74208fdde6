//! HTTP/2 (RFC 9113) and gRPC as texts and numbers: heads to and from those of HTTP/1.1, which all of weir reads. The frames
//! are the `h2` crate's; weir knows but where they begin and end.

pub mod errors;
pub mod frames;
pub mod grpc;
pub mod head;
