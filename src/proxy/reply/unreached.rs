//! What Proxy-Status says of an upstream that cannot be reached: error types of RFC 9209 section 2.3.

use crate::upstream::{Cause, Stage};

pub(super) fn failed(cause: Cause) -> &'static str {
    match cause {
        Cause::Refused => "connection_refused",
        Cause::NoAddress => "dns_error",
        Cause::NoRoute => "destination_ip_unroutable",
        Cause::Unavailable => "destination_unavailable",
        Cause::BrokenOff => "connection_terminated",
        Cause::OtherProtocol => "http_protocol_error",
        Cause::Own => "proxy_internal_error",
    }
}

pub(super) fn timed_out(stage: Stage) -> &'static str {
    match stage {
        Stage::Name => "dns_timeout",
        Stage::Connection => "connection_timeout",
    }
}
