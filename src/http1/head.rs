//! The head of an HTTP/1.x request (RFC 9112), parsed strictly: what two servers could read in two ways is refused, so
//! that nothing ambiguous goes upstream. Owns which heads are well formed and how a body is framed; does no I/O.

use std::net::Ipv6Addr;
use std::ops::Range;

use thiserror::Error;

use super::fields::{FieldRoom, place, places};
use super::hygiene::{Connection, MAX_CONNECTION_OPTIONS};

/// Bounds on a request's head. A head over a bound is answered with 431.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadLimits {
    /// The request line, all fields and the empty line, in bytes.
    pub max_bytes: usize,
    /// The number of fields.
    pub max_fields: usize,
}

impl Default for HeadLimits {
    fn default() -> HeadLimits {
        HeadLimits {
            max_bytes: 64 * 1024,
            max_fields: 100,
        }
    }
}

/// A well-formed request head: places in the buffer it was read from, so that nothing is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    /// The head's length in bytes; the body begins there.
    pub len: usize,
    /// The method, for example `GET`.
    pub method: Range<usize>,
    /// The request target as sent.
    pub target: Range<usize>,
    /// The last digit of `HTTP/1.0` or `HTTP/1.1`.
    pub minor_version: u8,
    /// Each field's name and value, without the white space around the value, in the order sent; none that `Connection` names, but for
    /// those that have a meaning on this hop.
    pub fields: Vec<(Range<usize>, Range<usize>)>,
    /// How the body ends.
    pub body: BodyLength,
    /// Whether the client lets the connection live after the reply (RFC 9112 section 9.3).
    pub keep_alive: bool,
}

impl RequestHead {
    /// The value of the first field of this name, in any case. The head stands in `buffer`.
    pub fn field<'b>(&self, buffer: &'b [u8], name: &str) -> Option<&'b [u8]> {
        self.values(buffer, name).next()
    }

    /// The values of all fields of this name.
    pub fn values<'b>(
        &self,
        buffer: &'b [u8],
        name: &str,
    ) -> impl DoubleEndedIterator<Item = &'b [u8]> {
        values(buffer, &self.fields, name)
    }

    /// The names and values of all fields.
    pub fn lines<'b>(
        &self,
        buffer: &'b [u8],
    ) -> impl Iterator<Item = (&'b [u8], &'b [u8])> + Clone {
        let fields = self.fields.iter();
        fields.map(|(name, value)| (&buffer[name.clone()], &buffer[value.clone()]))
    }
}

/// Names and values, as places in a buffer.
pub type Fields = [(Range<usize>, Range<usize>)];

/// The values of those `fields` that have this name in any case, as sent.
pub fn values<'b>(
    buffer: &'b [u8],
    fields: &Fields,
    name: &str,
) -> impl DoubleEndedIterator<Item = &'b [u8]> {
    let is_named =
        |place: &Range<usize>| buffer[place.clone()].eq_ignore_ascii_case(name.as_bytes());
    let named = fields.iter().filter(move |(place, _)| is_named(place));
    named.map(|(_, value)| &buffer[value.clone()])
}

/// The path of a target, and its query with the `?`, or empty.
pub fn path_and_query(target: &[u8]) -> (&[u8], &[u8]) {
    let end = target.iter().position(|byte| *byte == b'?');
    target.split_at(end.unwrap_or(target.len()))
}

/// How a message's body is framed (RFC 9112 section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyLength {
    /// No body.
    None,
    /// `Content-Length`, in bytes.
    Fixed(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

/// Why a head is refused; [`HeadError::status`] says with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeadError {
    #[error("request line is malformed")]
    RequestLine,
    #[error("method is not in upper case, and methods are told apart by case")]
    MethodCase,
    #[error("version is not HTTP/1.0 or HTTP/1.1")]
    Version,
    #[error("a field name is malformed, or white space stands before its colon")]
    FieldName,
    #[error(
        "a field value has a bare CR, a NUL or another control character, or in HTTP/2 white space at an end"
    )]
    FieldValue,
    #[error("a line does not end in CR LF")]
    LineEnd,
    #[error("head is larger than the limit")]
    TooLarge,
    #[error("request line is longer than the limit of heads")]
    LineTooLong,
    #[error("head has more fields than the limit")]
    TooManyFields,
    #[error("Host is missing")]
    HostMissing,
    #[error("Host is given more than once")]
    HostRepeated,
    #[error("Host is not a name or an IP address with at most a port")]
    HostMalformed,
    #[error("request target has a \"#\", or is no authority for CONNECT")]
    Target,
    #[error("scheme is neither \"http\" nor \"https\"")]
    Scheme,
    #[error("Content-Length is not a decimal number")]
    ContentLength,
    #[error("Content-Length is given more than once")]
    ContentLengthRepeated,
    #[error("both Content-Length and Transfer-Encoding are given")]
    LengthAndCoding,
    #[error("Transfer-Encoding is not exactly \"chunked\"")]
    TransferCoding,
    #[error("Transfer-Encoding is sent with HTTP/1.0")]
    CodingInHttp10,
    #[error("Connection names more than {MAX_CONNECTION_OPTIONS} options")]
    ConnectionOptions,
}

impl HeadError {
    /// The status code of the refusal.
    pub fn status(self) -> u16 {
        match self {
            HeadError::LineTooLong => 414,
            HeadError::TooLarge | HeadError::TooManyFields => 431,
            HeadError::TransferCoding => 501,
            HeadError::Version => 505,
            HeadError::RequestLine
            | HeadError::MethodCase
            | HeadError::FieldName
            | HeadError::FieldValue
            | HeadError::LineEnd
            | HeadError::HostMissing
            | HeadError::HostRepeated
            | HeadError::HostMalformed
            | HeadError::Target
            | HeadError::Scheme
            | HeadError::ContentLength
            | HeadError::ContentLengthRepeated
            | HeadError::LengthAndCoding
            | HeadError::CodingInHttp10
            | HeadError::ConnectionOptions => 400,
        }
    }
}

/// Parses the head at the start of `bytes`: `Ok(None)` until it is whole.
pub fn parse_request(bytes: &[u8], limits: HeadLimits) -> Result<Option<RequestHead>, HeadError> {
    let mut room = FieldRoom::new(limits.max_fields);
    let mut request = httparse::Request::new(&mut []);
    let len = match request.parse_with_uninit_headers(bytes, room.fields()) {
        Ok(httparse::Status::Complete(len)) if len <= limits.max_bytes => len,
        Ok(httparse::Status::Partial) if bytes.len() < limits.max_bytes => return Ok(None),
        Ok(_) => return Err(too_large(bytes, limits)),
        // What is wrong with the line shows at its end.
        Err(httparse::Error::Version) if !bytes.contains(&b'\n') => {
            return match bytes.len() < limits.max_bytes {
                true => Ok(None),
                false => Err(too_large(bytes, limits)),
            };
        }
        Err(httparse::Error::Version) if has_space_in_target(bytes) => {
            return Err(HeadError::RequestLine);
        }
        Err(error) => return Err(from_httparse(error)),
    };
    // httparse takes a bare LF for a line's end; RFC 9112 section 2.2 allows that, but peers differ, so it is refused.
    if has_bare_line_feed(&bytes[..len]) {
        return Err(HeadError::LineEnd);
    }
    let (Some(method), Some(target), Some(minor_version)) =
        (request.method, request.path, request.version)
    else {
        return Err(HeadError::RequestLine);
    };
    if is_misspelt(method) {
        return Err(HeadError::MethodCase);
    }
    // A fragment is never sent (RFC 9112 section 3.2), and servers cut it off or do not. A path for CONNECT could become
    // a tunnel past every policy.
    if target.bytes().any(|byte| byte == b'#') || (method == "CONNECT" && target.contains('/')) {
        return Err(HeadError::Target);
    }
    let (body, connection) = framing(request.headers, minor_version)?;
    let mut fields = places(bytes, request.headers);
    connection.take_named(bytes, &mut fields);
    Ok(Some(RequestHead {
        len,
        method: place(bytes, method.as_bytes()),
        target: place(bytes, target.as_bytes()),
        minor_version,
        fields,
        body,
        keep_alive: (minor_version == 1 || connection.keep_alive) && !connection.close,
    }))
}

/// Looks at all bytes whatever it has found, and so at many at a time.
fn has_bare_line_feed(head: &[u8]) -> bool {
    let Some((first, rest)) = head.split_first() else {
        return false;
    };
    let pairs = head.iter().zip(rest);
    pairs.fold(*first == b'\n', |bare, (before, byte)| {
        bare | ((*byte == b'\n') & (*before != b'\r'))
    })
}

/// Whether what stands where the version is looked for is more of the target, since the line ends in another (RFC 9112 section 3.2). Only
/// of a line that is whole.
fn has_space_in_target(head: &[u8]) -> bool {
    let Some(end) = head.iter().position(|byte| *byte == b'\n') else {
        return false;
    };
    let mut words = head[..end].split(|byte| *byte == b' ').skip(2);
    let is_version = |word: &[u8]| word.starts_with(b"HTTP/");
    let looked_at = words.next().unwrap_or_default();
    !looked_at.is_empty() && !is_version(looked_at) && words.last().is_some_and(is_version)
}

/// Of a request whose head is over its limit: where the line is, its target is what is too long (RFC 9112 section 3).
fn too_large(bytes: &[u8], limits: HeadLimits) -> HeadError {
    let start = &bytes[..limits.max_bytes.min(bytes.len())];
    match start.contains(&b' ') && !start.contains(&b'\n') {
        true => HeadError::LineTooLong,
        false => HeadError::TooLarge,
    }
}

/// Whether it is a standard method (RFC 9110 section 9.1) in all but case. Servers that do not heed case would serve it as
/// that one, past a route that names its methods.
fn is_misspelt(method: &str) -> bool {
    const STANDARD: [&str; 9] = [
        "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
    ];
    method.bytes().any(|byte| byte.is_ascii_lowercase())
        && STANDARD
            .iter()
            .any(|name| name.eq_ignore_ascii_case(method))
}

fn from_httparse(error: httparse::Error) -> HeadError {
    match error {
        httparse::Error::HeaderName => HeadError::FieldName,
        httparse::Error::HeaderValue => HeadError::FieldValue,
        httparse::Error::NewLine => HeadError::LineEnd,
        httparse::Error::TooManyHeaders => HeadError::TooManyFields,
        httparse::Error::Version => HeadError::Version,
        httparse::Error::Token | httparse::Error::Status => HeadError::RequestLine,
    }
}

fn framing(
    fields: &[httparse::Header<'_>],
    minor_version: u8,
) -> Result<(BodyLength, Connection), HeadError> {
    let mut host = false;
    let mut length = None;
    let mut chunked = false;
    let mut connection = Connection::default();
    for field in fields {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("host") {
            if host {
                return Err(HeadError::HostRepeated);
            }
            if !is_host(field.value) {
                return Err(HeadError::HostMalformed);
            }
            host = true;
        } else if is("content-length") {
            if length.is_some() {
                return Err(HeadError::ContentLengthRepeated);
            }
            length = Some(decimal(field.value).ok_or(HeadError::ContentLength)?);
        } else if is("transfer-encoding") {
            if minor_version == 0 {
                return Err(HeadError::CodingInHttp10);
            }
            if chunked || !field.value.eq_ignore_ascii_case(b"chunked") {
                return Err(HeadError::TransferCoding);
            }
            chunked = true;
        } else if is("connection") {
            let heard = connection.hear(field.value);
            heard.map_err(|_| HeadError::ConnectionOptions)?;
        }
    }
    if !host && minor_version == 1 {
        return Err(HeadError::HostMissing);
    }
    let body = match (chunked, length) {
        (true, Some(_)) => return Err(HeadError::LengthAndCoding),
        (true, None) => BodyLength::Chunked,
        (false, Some(0)) | (false, None) => BodyLength::None,
        (false, Some(bytes)) => BodyLength::Fixed(bytes),
    };
    Ok((body, connection))
}

/// `uri-host [ ":" port ]` of RFC 9110 section 7.2, without what no name in DNS has: escapes could spell a name in
/// another way, and a comma could be two fields made one; nor with a label that is empty, but behind the last dot: to servers that take all
/// dots off its end it would be another name. Empty where the target has no authority.
pub fn is_host(value: &[u8]) -> bool {
    let (is_name, port) = match value.strip_prefix(b"[") {
        Some(rest) => {
            let Some(end) = rest.iter().position(|byte| *byte == b']') else {
                return false;
            };
            let ip = str::from_utf8(&rest[..end]).ok();
            let is_ip = ip.is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok());
            (is_ip, &rest[end + 1..])
        }
        None => {
            let end = value.iter().position(|byte| *byte == b':');
            let (name, port) = value.split_at(end.unwrap_or(value.len()));
            let is_usual = |byte: &u8| {
                byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
            };
            let has_empty = name.starts_with(b".") || name.windows(2).any(|two| two == b"..");
            let is_name = name.iter().all(is_usual) && !has_empty;
            (is_name && (port.is_empty() || !name.is_empty()), port)
        }
    };
    let is_port = |port: &[u8]| {
        port.is_empty() || decimal(port).is_some_and(|port| u16::try_from(port).is_ok())
    };
    is_name && (port.is_empty() || port.strip_prefix(b":").is_some_and(is_port))
}

/// A host as [`is_host`] has it, without its port.
pub fn without_port(host: &str) -> &str {
    let behind_literal = host.rfind(']').map_or(0, |bracket| bracket + 1);
    let end = host[behind_literal..].find(':');
    end.map_or(host, |end| &host[..behind_literal + end])
}

/// Digits alone: no sign, no space, no list, and within a `u64`.
pub fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    value.iter().try_fold(0u64, |sum, byte| match byte {
        b'0'..=b'9' => sum.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(head: &str, expected: Result<(BodyLength, bool), HeadError>) {
        let got = parse_request(head.as_bytes(), HeadLimits::default())
            .map(|head| head.expect("the head is whole"))
            .map(|head| (head.body, head.keep_alive));
        assert_eq!(got, expected, "{head:?}");
    }

    #[test]
    fn a_plain_head_is_read_in_place() {
        let bytes = b"POST /a?b=1 HTTP/1.1\r\nHost: x\r\nContent-Length:  3 \r\n\r\nabc";
        let head = parse_request(bytes, HeadLimits::default())
            .unwrap()
            .unwrap();
        assert_eq!(&bytes[head.method.clone()], b"POST");
        assert_eq!(&bytes[head.target.clone()], b"/a?b=1");
        assert_eq!(&bytes[head.fields[1].1.clone()], b"3");
        assert_eq!(&bytes[head.len..], b"abc");
        assert_eq!(head.body, BodyLength::Fixed(3));
        assert_eq!(head.field(bytes, "content-length"), Some(&b"3"[..]));
        assert_eq!(head.field(bytes, "content"), None);
    }

    #[test]
    fn keep_alive_follows_the_version_and_the_connection_field() {
        check(
            "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            Ok((BodyLength::None, true)),
        );
        check(
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            Ok((BodyLength::None, false)),
        );
        check("GET / HTTP/1.0\r\n\r\n", Ok((BodyLength::None, false)));
        check(
            "GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
            Ok((BodyLength::None, true)),
        );
    }

    /// RFC 9112 sections 3.2, 5.1, 6.1, 6.3 and 11.2.
    #[test]
    fn what_two_servers_could_read_in_two_ways_is_refused() {
        let with = |fields: &str| format!("POST / HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
        let refused = |fields: &str, error| check(&with(fields), Err(error));
        refused(
            "Content-Length: 1\r\nContent-Length: 2\r\n",
            HeadError::ContentLengthRepeated,
        );
        refused(
            "Content-Length: 1\r\nContent-Length: 1\r\n",
            HeadError::ContentLengthRepeated,
        );
        refused("Content-Length: 1, 1\r\n", HeadError::ContentLength);
        refused("Content-Length: +1\r\n", HeadError::ContentLength);
        refused("Content-Length: 0x1\r\n", HeadError::ContentLength);
        refused(
            "Content-Length: 99999999999999999999\r\n",
            HeadError::ContentLength,
        );
        refused("Content-Length:\r\n", HeadError::ContentLength);
        refused(
            "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
            HeadError::LengthAndCoding,
        );
        refused(
            "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
            HeadError::LengthAndCoding,
        );
        refused(
            "Transfer-Encoding: gzip, chunked\r\n",
            HeadError::TransferCoding,
        );
        refused("Transfer-Encoding: xchunked\r\n", HeadError::TransferCoding);
        refused(
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            HeadError::TransferCoding,
        );
        refused("Host: y\r\n", HeadError::HostRepeated);
        refused("X-A : 1\r\n", HeadError::FieldName);
        refused(" folded\r\n", HeadError::FieldName);
        refused("X-A: a\rb\r\n", HeadError::FieldValue);
        refused("X-A: a\0b\r\n", HeadError::FieldValue);
        refused("X-A: a\n", HeadError::LineEnd);
        check("GET / HTTP/1.1\r\n\r\n", Err(HeadError::HostMissing));
        check("GET / HTTP/2.0\r\nHost: x\r\n\r\n", Err(HeadError::Version));
        check(
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            Err(HeadError::CodingInHttp10),
        );
    }

    #[test]
    fn connection_names_a_few_options_at_most() {
        let head = |fields: &str| format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
        let field = |options: usize| format!("Connection: {}close\r\n", "x,".repeat(options - 1));
        check(&head(&field(32)), Ok((BodyLength::None, false)));
        for many in [field(33), field(16).repeat(2) + &field(1), field(32_000)] {
            check(&head(&many), Err(HeadError::ConnectionOptions));
        }
    }

    /// RFC 9110 section 7.6.1.
    #[test]
    fn what_connection_names_is_not_there() {
        let bytes = b"GET / HTTP/1.1\r\nHost: x\r\nX-A: 1\r\nConnection: close, x-a\r\nConnection: host, te\r\n\
            TE: trailers\r\nx-a: 2\r\nX-AB: 3\r\n\r\n";
        let head = parse_request(bytes, HeadLimits::default())
            .unwrap()
            .unwrap();
        let names: Vec<_> = head.lines(bytes).map(|(name, _)| name).collect();
        let kept: [&[u8]; 5] = [b"Host", b"Connection", b"Connection", b"TE", b"X-AB"];
        assert_eq!(names, kept);
        assert!(!head.keep_alive);
    }

    /// RFC 9110 section 7.2.
    #[test]
    fn a_host_is_a_name_or_an_address_with_at_most_a_port() {
        let host = |host: &str| is_host(host.as_bytes());
        for good in [
            "",
            "x",
            "X.y.",
            "localhost.",
            "a_b-c~d",
            "1.2.3.4:80",
            "x:",
            "x:65535",
            "[::1]",
            "[::1]:80",
        ] {
            assert!(host(good), "{good}");
        }
        for bad in [
            " ",
            "x y",
            "u@x",
            "x/",
            "x,y",
            "x%61",
            "x..",
            "x..y:80",
            ".",
            ".x",
            ".x:80",
            ".:80",
            ":80",
            "x:65536",
            "x:+1",
            "x:1:2",
            "[x]",
            "[::1",
            "[::1]80",
            "[::1%25eth0]",
            "::1",
            "[1.2.3.4]",
            "\u{e4}",
        ] {
            assert!(!host(bad), "{bad}");
        }
    }

    #[test]
    fn an_oversize_head_is_431_before_it_is_whole() {
        let limits = HeadLimits {
            max_bytes: 64,
            max_fields: 2,
        };
        let long = format!("GET / HTTP/1.1\r\nA: {}\r\n", "a".repeat(100));
        assert_eq!(
            parse_request(long.as_bytes(), limits),
            Err(HeadError::TooLarge)
        );
        let many = b"GET / HTTP/1.1\r\nHost: x\r\nA: 1\r\nB: 2\r\n\r\n";
        assert_eq!(parse_request(many, limits), Err(HeadError::TooManyFields));
        assert_eq!(HeadError::TooManyFields.status(), 431);
        let most = format!("GET / HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n", "a".repeat(32));
        for (length, is_taken) in [(64, true), (63, false)] {
            let limits = HeadLimits {
                max_bytes: length,
                ..limits
            };
            assert_eq!(most.len(), 64);
            assert_eq!(parse_request(most.as_bytes(), limits).is_ok(), is_taken);
        }
    }

    /// RFC 9112 section 3.
    #[test]
    fn an_oversize_request_line_is_414() {
        let limits = HeadLimits {
            max_bytes: 64,
            max_fields: 9,
        };
        let status = |head: &str| {
            let parsed = parse_request(head.as_bytes(), limits);
            parsed.map(|_| ()).map_err(HeadError::status)
        };
        let line = format!("GET /{}", "a".repeat(100));
        assert_eq!(status(&line), Err(414));
        assert_eq!(
            status(&format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n")),
            Err(414)
        );
        let fields = format!("GET / HTTP/1.1\r\nHost: x\r\nA: {}", "a".repeat(100));
        assert_eq!(status(&fields), Err(431));
        assert_eq!(status(&format!("{fields}\r\n\r\n")), Err(431));
    }

    /// However it comes in pieces.
    #[test]
    fn what_stands_for_the_version_is_judged_once_the_line_is_whole() {
        for (line, refused) in [
            ("GET /a b HTTP/1.1", HeadError::RequestLine),
            ("GET /a HTTP/2.0", HeadError::Version),
        ] {
            let head = format!("{line}\r\nHost: x\r\n\r\n");
            let parsed = |end: usize, limits: HeadLimits| {
                parse_request(&head.as_bytes()[..end], limits).map(|_| ())
            };
            let whole = line.len() + "\r\n".len();
            for end in 1..head.len() {
                let expected = if end < whole { Ok(()) } else { Err(refused) };
                assert_eq!(parsed(end, HeadLimits::default()), expected, "{line} {end}");
            }
            let limits = HeadLimits {
                max_bytes: line.len(),
                ..HeadLimits::default()
            };
            assert_eq!(parsed(line.len(), limits), Err(HeadError::LineTooLong));
        }
    }

    #[test]
    fn a_target_may_be_beyond_ascii_and_has_no_fragment() {
        let line = |target: &[u8]| [b"GET ", target, b" HTTP/1.1\r\nHost: x\r\n\r\n"].concat();
        let parsed = |target: &[u8]| parse_request(&line(target), HeadLimits::default());
        for target in ["/?q=\u{e4}", "/\u{e4}", "/\u{e4}?q"] {
            assert!(parsed(target.as_bytes()).is_ok(), "{target}");
        }
        for target in ["/\u{e4}#", "/?\u{e4}#"] {
            let refused = parsed(target.as_bytes()).map(drop);
            assert_eq!(refused, Err(HeadError::Target), "{target}");
        }
        for target in [&b"/\xff"[..], b"/\xc3", b"/?\xc0\xaf"] {
            let refused = parsed(target).map(drop);
            assert_eq!(refused, Err(HeadError::RequestLine), "{target:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_request(&bytes, HeadLimits::default());
        }

        #[test]
        fn a_cut_head_is_never_taken_for_whole(cut in 0usize..45) {
            let whole = b"GET /a HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n";
            let cut = cut.min(whole.len() - 1);
            prop_assert_eq!(parse_request(&whole[..cut], HeadLimits::default()), Ok(None));
        }
    }
}
