//! The head of an HTTP/1.x response from an upstream (RFC 9112), parsed strictly, but that a bare LF may end a line, as section 2.2 allows:
//! such a line is written anew for the client. What is refused here becomes a 502.

use std::ops::Range;
use std::time::Duration;

use http::StatusCode;
use thiserror::Error;

use super::fields::{FieldRoom, place, places};
use super::head::{BodyLength, HeadLimits, decimal};
use super::hygiene::{Connection, MAX_CONNECTION_OPTIONS};

/// A well-formed response head, as places in the buffer it was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead {
    /// The head's length in bytes; the body begins there.
    pub len: usize,
    /// 100 to 999.
    pub status: u16,
    /// The reason phrase; may be empty.
    pub reason: Range<usize>,
    /// Each field's name and value, in the order sent; as of a request's head.
    pub fields: Vec<(Range<usize>, Range<usize>)>,
    /// How the body ends.
    pub body: ResponseBody,
    /// Whether the upstream lets the connection live after the body.
    pub keep_alive: bool,
    /// How long it says that it keeps the connection without a request (`Keep-Alive: timeout=5`, RFC 2068 section 19.7.1.1).
    pub kept_for: Option<Duration>,
}

/// How a response's body is framed (RFC 9112 section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseBody {
    Length(BodyLength),
    /// Until the upstream closes.
    UntilClose,
}

/// Why an upstream's response is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadResponse {
    #[error("its version is not HTTP/1.0 or HTTP/1.1")]
    Version,
    #[error("its status line is malformed, or its status below 100")]
    Status,
    #[error("a field name is malformed, or white space stands before its colon")]
    FieldName,
    #[error("a field value has a bare CR, a NUL or another control character")]
    FieldValue,
    /// Nor in a bare LF.
    #[error("a line does not end in CR LF")]
    LineEnd,
    #[error("it is larger than {0} bytes")]
    TooLarge(usize),
    #[error("it has more than {0} fields")]
    TooManyFields(usize),
    #[error("Content-Length is not a decimal number")]
    ContentLength,
    #[error("Content-Length is given more than once")]
    ContentLengthRepeated,
    #[error("both Content-Length and Transfer-Encoding are given")]
    LengthAndCoding,
    #[error("Transfer-Encoding is not exactly \"chunked\"")]
    TransferCoding,
    #[error("Connection names more than {MAX_CONNECTION_OPTIONS} options")]
    ConnectionOptions,
    #[error("it switches to a protocol that nobody asked for")]
    Switch,
    #[error("more than 16 KiB of interim responses come before it")]
    Interim,
    #[error("it breaks the rules of HTTP/2")]
    Http2,
}

/// Parses the head at the start of `bytes`: `Ok(None)` until it is whole. `to_head` says whether the request was a HEAD.
pub fn parse_response(
    bytes: &[u8],
    to_head: bool,
    limits: HeadLimits,
) -> Result<Option<ResponseHead>, BadResponse> {
    let mut room = FieldRoom::new(limits.max_fields);
    let mut response = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut response,
        bytes,
        room.fields(),
    );
    let len = match parsed {
        Ok(httparse::Status::Complete(len)) if len <= limits.max_bytes => len,
        Ok(httparse::Status::Partial) if bytes.len() < limits.max_bytes => return Ok(None),
        Ok(_) => return Err(BadResponse::TooLarge(limits.max_bytes)),
        Err(error) => return Err(from_httparse(error, limits)),
    };
    let (Some(status), Some(minor)) = (response.code, response.version) else {
        return Err(BadResponse::Status);
    };
    // RFC 9110 section 15: the first digit is the class, and there is no class 0.
    if status < 100 {
        return Err(BadResponse::Status);
    }
    let (mut length, mut chunked) = (None, false);
    let mut connection = Connection::default();
    let mut kept_for = None;
    for field in response.headers.iter() {
        if field.name.eq_ignore_ascii_case("content-length") {
            if length.is_some() {
                return Err(BadResponse::ContentLengthRepeated);
            }
            length = Some(decimal(field.value).ok_or(BadResponse::ContentLength)?);
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            if chunked || !field.value.eq_ignore_ascii_case(b"chunked") {
                return Err(BadResponse::TransferCoding);
            }
            chunked = true;
        } else if field.name.eq_ignore_ascii_case("connection") {
            let heard = connection.hear(field.value);
            heard.map_err(|_| BadResponse::ConnectionOptions)?;
        } else if field.name.eq_ignore_ascii_case("keep-alive") {
            kept_for = kept_for.or(timeout(field.value));
        }
    }
    let bodiless = to_head || status < 200 || status == 204 || status == 304;
    let body = match (chunked, length) {
        (true, Some(_)) => return Err(BadResponse::LengthAndCoding),
        _ if bodiless => ResponseBody::Length(BodyLength::None),
        (true, None) => ResponseBody::Length(BodyLength::Chunked),
        (false, Some(0)) => ResponseBody::Length(BodyLength::None),
        (false, Some(bytes)) => ResponseBody::Length(BodyLength::Fixed(bytes)),
        (false, None) => ResponseBody::UntilClose,
    };
    // RFC 9112 section 6.1: what HTTP/1.0 says in chunks is read, and the connection closed behind it.
    let keep_alive = match minor {
        1 => !connection.close,
        _ => connection.keep_alive && !connection.close && !chunked,
    };
    let mut fields = places(bytes, response.headers);
    connection.take_named(bytes, &mut fields);
    Ok(Some(ResponseHead {
        len,
        status,
        // httparse gives an empty reason from outside the buffer when there is none, or one beyond ASCII.
        reason: response
            .reason
            .filter(|reason| !reason.is_empty())
            .map_or(0..0, |reason| place(bytes, reason.as_bytes())),
        fields,
        body,
        keep_alive: keep_alive && body != ResponseBody::UntilClose,
        kept_for,
    }))
}

/// The `timeout` of a `Keep-Alive` field, in whole seconds.
fn timeout(value: &[u8]) -> Option<Duration> {
    let mut parameters = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    parameters.find_map(|parameter| {
        let (name, seconds) = parameter.split_at_checked(b"timeout=".len())?;
        let seconds = decimal(seconds).filter(|_| name.eq_ignore_ascii_case(b"timeout="));
        seconds.map(Duration::from_secs)
    })
}

fn from_httparse(error: httparse::Error, limits: HeadLimits) -> BadResponse {
    match error {
        httparse::Error::HeaderName => BadResponse::FieldName,
        httparse::Error::HeaderValue => BadResponse::FieldValue,
        httparse::Error::NewLine => BadResponse::LineEnd,
        httparse::Error::TooManyHeaders => BadResponse::TooManyFields(limits.max_fields),
        httparse::Error::Version => BadResponse::Version,
        httparse::Error::Token | httparse::Error::Status => BadResponse::Status,
    }
}

/// The reason phrase of a status (RFC 9110 section 15); empty for one that has none there. It has no meaning and may be left out (RFC 9112
/// section 4), but there are clients that take a response without for none.
pub fn reason(status: u16) -> &'static str {
    match status {
        // The `http` crate has the names of RFC 7231 and RFC 4918.
        413 => "Content Too Large",
        422 => "Unprocessable Content",
        status => {
            let known = StatusCode::from_u16(status).ok();
            known.and_then(|it| it.canonical_reason()).unwrap_or("")
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(head: &str, to_head: bool, expected: Result<(ResponseBody, bool), BadResponse>) {
        let got = parse_response(head.as_bytes(), to_head, HeadLimits::default())
            .map(|head| head.expect("the head is whole"))
            .map(|head| (head.body, head.keep_alive));
        assert_eq!(got, expected, "{head:?}");
    }

    #[test]
    fn an_upstream_says_how_long_it_keeps_a_connection() {
        let check = |said: &str, expected: Option<u64>| {
            let head = format!("HTTP/1.1 200 OK\r\n{said}Content-Length: 0\r\n\r\n");
            let head = parse_response(head.as_bytes(), false, HeadLimits::default());
            let kept_for = head.map(|head| head.and_then(|head| head.kept_for));
            assert_eq!(kept_for, Ok(expected.map(Duration::from_secs)), "{said:?}");
        };
        check("", None);
        check("Keep-Alive: timeout=5\r\n", Some(5));
        check("keep-alive: max=100 , Timeout=15\r\n", Some(15));
        check("Keep-Alive: timeout=0\r\n", Some(0));
        check("Keep-Alive: 115\r\n", None);
        check("Keep-Alive: timeout=, timeout=5s\r\n", None);
    }

    #[test]
    fn a_response_is_framed_by_rfc_9112_section_6_3() {
        let length = |length| ResponseBody::Length(length);
        check(
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
            false,
            Ok((length(BodyLength::Fixed(3)), true)),
        );
        check(
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
            true,
            Ok((length(BodyLength::None), true)),
        );
        check(
            "HTTP/1.1 304 \r\nContent-Length: 3\r\n\r\n",
            false,
            Ok((length(BodyLength::None), true)),
        );
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            false,
            Ok((length(BodyLength::Chunked), true)),
        );
        check(
            "HTTP/1.1 200 OK\r\n\r\n",
            false,
            Ok((ResponseBody::UntilClose, false)),
        );
        check(
            "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n",
            false,
            Ok((length(BodyLength::Chunked), false)),
        );
        check(
            "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
            false,
            Ok((length(BodyLength::None), false)),
        );
    }

    #[test]
    fn ambiguous_framing_is_refused() {
        let refused =
            |fields: &str, why| check(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n"), false, Err(why));
        refused(
            "Content-Length: 1\r\nContent-Length: 1\r\n",
            BadResponse::ContentLengthRepeated,
        );
        refused(
            "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
            BadResponse::LengthAndCoding,
        );
        refused("Transfer-Encoding: gzip\r\n", BadResponse::TransferCoding);
        refused("Content-Length: +1\r\n", BadResponse::ContentLength);
        refused("A : b\r\n", BadResponse::FieldName);
    }

    #[test]
    fn connection_names_a_few_options_at_most() {
        let head = |options: usize| {
            let options = "x,".repeat(options - 1);
            format!("HTTP/1.1 204 \r\nConnection: {options}close\r\n\r\n")
        };
        let none = ResponseBody::Length(BodyLength::None);
        check(&head(32), false, Ok((none, false)));
        check(&head(33), false, Err(BadResponse::ConnectionOptions));
    }

    #[test]
    fn a_reason_may_be_left_out_or_foreign() {
        for (line, reason) in [
            ("HTTP/1.1 200", ""),
            ("HTTP/1.1 200 ", ""),
            ("HTTP/1.1 200 Schön", ""),
            ("HTTP/1.1 200 All Right", "All Right"),
        ] {
            let bytes = format!("{line}\r\nContent-Length: 0\r\n\r\n").into_bytes();
            let head = parse_response(&bytes, false, HeadLimits::default())
                .unwrap()
                .unwrap();
            assert_eq!(&bytes[head.reason], reason.as_bytes(), "{line}");
        }
    }

    #[test]
    fn a_reason_is_that_of_rfc_9110() {
        for (status, words) in [
            (200, "OK"),
            (413, "Content Too Large"),
            (422, "Unprocessable Content"),
            (599, ""),
        ] {
            assert_eq!(reason(status), words);
        }
    }

    #[test]
    fn a_status_has_a_class() {
        for status in ["000", "099", "20", "2000"] {
            check(
                &format!("HTTP/1.1 {status} OK\r\n\r\n"),
                false,
                Err(BadResponse::Status),
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_response(&bytes, false, HeadLimits::default());
        }
    }
}
