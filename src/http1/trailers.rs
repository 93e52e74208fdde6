//! The fields behind a body (RFC 9110 section 6.5). Owns which may be there at all; does no I/O.

use std::ops::Range;

use super::body::BodyError;
use super::fields::places;
use super::hygiene::is_hop_by_hop;

/// Fields of a trailer section, at most; its bytes are bounded by [`super::body::MAX_FRAMING_BYTES`].
const MAX_FIELDS: usize = 100;

/// Fields that a recipient reads before the body, or that say how to read it (RFC 9110 section 6.5.1). One that came behind
/// the body and was merged into the head would change what was decided by the head.
const IN_HEADS_ALONE: [&str; 25] = [
    "age",
    "authorization",
    "cache-control",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "cookie",
    "date",
    "expect",
    "expires",
    "host",
    "if-match",
    "if-none-match",
    "location",
    "max-forwards",
    "range",
    "retry-after",
    "set-cookie",
    "traceparent",
    "tracestate",
    "trailer",
    "vary",
    "warning",
    "www-authenticate",
];

/// Names and values, as places in a section.
pub type Fields = Vec<(Range<usize>, Range<usize>)>;

/// The fields of the section that [`super::body::BodyReader::trailers`] gives.
pub fn parse(section: &[u8]) -> Result<Fields, BodyError> {
    let mut room = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let whole = [section, b"\r\n"].concat();
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(&whole, &mut room)
    else {
        return Err(BodyError::Trailer);
    };
    Ok(places(&whole, fields))
}

/// Whether a field may come behind the messages of a call of gRPC, and go on to the next hop there: what an application says at the end is
/// read as such, whatever it is named.
pub fn may_end_a_call(name: &[u8]) -> bool {
    let of_framing = [&b"content-length"[..], b"trailer"];
    !is_hop_by_hop(name)
        && !of_framing
            .iter()
            .any(|other| name.eq_ignore_ascii_case(other))
}

/// Whether a field may come behind a body, and go on to the next hop there.
pub fn may_follow_a_body(name: &[u8]) -> bool {
    !is_hop_by_hop(name)
        && !IN_HEADS_ALONE
            .iter()
            .any(|other| name.eq_ignore_ascii_case(other.as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_section_is_read_field_by_field() {
        let section = b"grpc-status: 0\r\nX-Sum:abc \r\n";
        let fields: Vec<_> = parse(section)
            .unwrap()
            .into_iter()
            .map(|(name, value)| (&section[name], &section[value]))
            .collect();
        assert_eq!(
            fields,
            [
                (&b"grpc-status"[..], &b"0"[..]),
                (&b"X-Sum"[..], &b"abc"[..])
            ]
        );
        assert_eq!(parse(b""), Ok(Vec::new()));
        for bad in [
            "x y: 1\r\n",
            "x : 1\r\n",
            "x\r\n",
            " x: 1\r\n",
            "x: a\x01\r\n",
        ] {
            assert_eq!(parse(bad.as_bytes()), Err(BodyError::Trailer), "{bad:?}");
        }
    }

    #[test]
    fn what_heads_decide_by_does_not_follow_a_body() {
        for name in [
            "Content-Length",
            "transfer-encoding",
            "Host",
            "Authorization",
            "Set-Cookie",
            "te",
        ] {
            assert!(!may_follow_a_body(name.as_bytes()), "{name}");
        }
        for name in ["grpc-status", "Server-Timing", "X-Checksum"] {
            assert!(may_follow_a_body(name.as_bytes()), "{name}");
        }
    }

    proptest! {
        #[test]
        fn fields_are_lines_of_the_section(
            random in prop::collection::vec(any::<u8>(), 0..64),
            likely in "([ab]{1,3}:[ -~\t]{0,5}\r\n){0,4}(\r\n)?",
        ) {
            for section in [&random[..], likely.as_bytes()] {
                for (name, value) in parse(section).unwrap_or_default() {
                    prop_assert!(!section[name].is_empty());
                    prop_assert!(!section[value].iter().any(|byte| b"\r\n\0".contains(byte)));
                }
            }
        }
    }
}
