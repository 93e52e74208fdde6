//! What gRPC says over HTTP/2 (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md and statuscodes.md): whose requests are its own,
//! their deadline, and its status codes. Does no I/O.

use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

/// A status code of gRPC, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GrpcStatus(pub u8);

/// In the order of their numbers.
const NAMES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

impl GrpcStatus {
    const UNKNOWN: GrpcStatus = GrpcStatus(2);
    pub const DEADLINE_EXCEEDED: GrpcStatus = GrpcStatus(4);
    const INTERNAL: GrpcStatus = GrpcStatus(13);
    pub const UNAVAILABLE: GrpcStatus = GrpcStatus(14);
    const DATA_LOSS: GrpcStatus = GrpcStatus(15);

    /// Whether it says that the server is unwell, as a 500 or 503 does. UNIMPLEMENTED is not among them, which says that the method is not there, and
    /// DEADLINE_EXCEEDED tells of the client's patience.
    pub fn is_servers_fault(self) -> bool {
        let faults = [
            GrpcStatus::UNKNOWN,
            GrpcStatus::INTERNAL,
            GrpcStatus::UNAVAILABLE,
            GrpcStatus::DATA_LOSS,
        ];
        faults.contains(&self)
    }

    /// The fields that end a response with this status and a message.
    pub fn trailers(self, text: &str) -> HeaderMap {
        let mut fields = HeaderMap::with_capacity(2);
        fields.insert("grpc-status", HeaderValue::from(u16::from(self.0)));
        let text = HeaderValue::try_from(message(text));
        fields.insert("grpc-message", text.expect("it is printable ASCII"));
        fields
    }

    /// By its name, for example `UNAVAILABLE`.
    pub fn named(name: &str) -> Option<GrpcStatus> {
        let number = NAMES.iter().position(|known| *known == name)?;
        Some(GrpcStatus(u8::try_from(number).expect("there are 17")))
    }

    /// Of all statuses, by their numbers.
    pub fn names() -> &'static [&'static str] {
        &NAMES
    }

    /// `None` for a number that gRPC does not know.
    pub fn name(self) -> Option<&'static str> {
        NAMES.get(usize::from(self.0)).copied()
    }

    /// The value of a `grpc-status` field; a number that gRPC does not know is UNKNOWN.
    pub fn parse(value: &[u8]) -> GrpcStatus {
        let number = str::from_utf8(value)
            .ok()
            .and_then(|text| text.parse().ok());
        let known = number
            .map(GrpcStatus)
            .filter(|status| status.name().is_some());
        known.unwrap_or(GrpcStatus::UNKNOWN)
    }

    /// What a refusal with this status of HTTP is to a gRPC client. As grpc's http-grpc-status-mapping.md, but for what weir
    /// knows better: a limit is RESOURCE_EXHAUSTED, and a time that is over is DEADLINE_EXCEEDED, since such a call may have had
    /// its effect while UNAVAILABLE asks to be sent again.
    pub fn of_refusal(http: u16) -> GrpcStatus {
        GrpcStatus(match http {
            400 | 431 => 13,
            401 => 16,
            403 => 7,
            404 | 405 => 12,
            408 | 504 => 4,
            413 | 429 => 8,
            502 | 503 => 14,
            _ => 2,
        })
    }
}

/// Whether a request of this content type is gRPC's own: `application/grpc`, with `+proto` or the like behind it. gRPC-Web is
/// not: it is answered as other requests are.
pub fn is_grpc(content_type: &[u8]) -> bool {
    let name = b"application/grpc";
    let start = content_type.get(..name.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(name))
        && matches!(
            content_type.get(name.len()),
            None | Some(b'+' | b';' | b' ')
        )
}

/// The value of a `grpc-timeout` field: at most eight digits and a unit. `None` where it is none.
pub fn timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count: u64 = str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// A `grpc-message` field's value: percent-encoded but for printable ASCII.
pub fn message(text: &str) -> String {
    const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');
    utf8_percent_encode(text, ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_at_most_eight_digits_and_a_unit() {
        let check =
            |value: &str, expected| assert_eq!(timeout(value.as_bytes()), expected, "{value}");
        check("1S", Some(Duration::from_secs(1)));
        check("99999999H", Some(Duration::from_secs(99_999_999 * 3600)));
        check("250m", Some(Duration::from_millis(250)));
        check("7u", Some(Duration::from_micros(7)));
        check("0n", Some(Duration::ZERO));
        check("2M", Some(Duration::from_secs(120)));
        for none in ["", "S", "123456789S", "-1S", "1.5S", "1s", "1 S", "+1S"] {
            check(none, None);
        }
    }

    #[test]
    fn grpc_is_told_by_its_content_type() {
        for yes in [
            "application/grpc",
            "application/grpc+proto",
            "Application/gRPC; charset=x",
        ] {
            assert!(is_grpc(yes.as_bytes()), "{yes}");
        }
        for no in [
            "application/grpc-web",
            "application/grpcx",
            "application/json",
            "",
        ] {
            assert!(!is_grpc(no.as_bytes()), "{no}");
        }
    }

    #[test]
    fn statuses_have_names_and_numbers() {
        assert_eq!(GrpcStatus::named("UNAVAILABLE"), Some(GrpcStatus(14)));
        assert_eq!(GrpcStatus(16).name(), Some("UNAUTHENTICATED"));
        assert_eq!(GrpcStatus::parse(b"8"), GrpcStatus(8));
        for unknown in [&b"17"[..], b"", b"-1", b"x"] {
            assert_eq!(GrpcStatus::parse(unknown), GrpcStatus(2));
        }
    }

    #[test]
    fn a_message_is_printable_ascii() {
        assert_eq!(message("50% \"ü\"\n"), "50%25 \"%C3%BC\"%0A");
    }
}
