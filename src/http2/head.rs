//! Heads of HTTP/2 as heads of HTTP/1.1, and back. Whatever comes by HTTP/2 is written down as HTTP/1.1 and read by the parser
//! that reads every other head, so that nothing passes here which would be refused there (RFC 9113 section 10.3). Does no I/O.

use h2::ext::Protocol;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, request, response};
use thiserror::Error;

use crate::http1::head::{HeadError, HeadLimits, RequestHead, parse_request};
use crate::http1::response::{BadResponse, ResponseBody, ResponseHead, parse_response, reason};
use crate::http1::{head::BodyLength, hygiene};

/// For heads that weir itself has written: those it reads are bounded already, and it adds a few fields.
const OURS: HeadLimits = HeadLimits {
    max_bytes: usize::MAX,
    max_fields: 1024,
};

/// A head that HTTP/2 cannot carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("head cannot be sent by HTTP/2")]
pub struct NotForHttp2;

/// Writes a request's head to the end of `out` and reads it as one of HTTP/1.1. `has_body`: unless its stream has ended with
/// the head.
pub fn downgrade_request(
    out: &mut Vec<u8>,
    parts: &request::Parts,
    has_body: bool,
    limits: HeadLimits,
) -> Result<RequestHead, HeadError> {
    // CONNECT has an authority and no path: a tunnel past every policy.
    let target = parts.uri.path_and_query().ok_or(HeadError::Target)?;
    // Without an authority `h2` keeps no scheme.
    let scheme = (parts.uri.scheme_str(), parts.uri.authority());
    if !matches!(scheme, (Some("http" | "https"), _) | (None, None)) {
        return Err(HeadError::Scheme);
    }
    put_line(
        out,
        &[
            parts.method.as_str().as_bytes(),
            b" ",
            target.as_str().as_bytes(),
            b" HTTP/1.1",
        ],
    );
    let mut host = parts.headers.get_all(HOST).iter();
    let host = match (host.next(), host.next()) {
        (_, Some(_)) => return Err(HeadError::HostRepeated),
        (host, None) => host.map(HeaderValue::as_bytes),
    };
    let authority = parts
        .uri
        .authority()
        .map(|authority| authority.as_str().as_bytes());
    match (authority, host) {
        // Two that differ would be routed by one and served by the other (RFC 9113 section 8.3.1).
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(host) => {
            return Err(HeadError::HostMalformed);
        }
        (Some(host), _) | (None, Some(host)) => put(out, b"host", host),
        (None, None) => {}
    }
    for (name, value) in &parts.headers {
        // Malformed (RFC 9113 section 8.2.1), and it would be gone in HTTP/1.1.
        if value.as_bytes().trim_ascii().len() < value.len() {
            return Err(HeadError::FieldValue);
        }
        if *name != HOST && *name != COOKIE {
            put(out, name.as_str().as_bytes(), value.as_bytes());
        }
    }
    put_cookies(out, &parts.headers);
    if has_body && !parts.headers.contains_key(CONTENT_LENGTH) {
        put(out, b"transfer-encoding", b"chunked");
    }
    out.extend_from_slice(b"\r\n");
    let mut head = parse_request(out, limits)?.ok_or(HeadError::RequestLine)?;
    if !has_body {
        // A length of a body that is not there would have the upstream wait for it; only zero is true.
        match head.body {
            BodyLength::None | BodyLength::Fixed(0) => head.body = BodyLength::None,
            BodyLength::Fixed(_) | BodyLength::Chunked => return Err(HeadError::ContentLength),
        }
    }
    Ok(head)
}

/// Makes an extended CONNECT for a WebSocket (RFC 8441 section 5) the GET by which one is opened in HTTP/1.1, with weir's own key.
pub fn websocket_request(parts: &mut request::Parts, key: &str) {
    parts.method = Method::GET;
    let fields = &mut parts.headers;
    let own = HeaderValue::try_from(key).expect("it is base64");
    fields.insert(SEC_WEBSOCKET_KEY, own);
    if !fields.contains_key(SEC_WEBSOCKET_VERSION) {
        fields.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    }
    fields.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    fields.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// Makes the GET of [`websocket_request`], as it goes out, an extended CONNECT again.
pub fn websocket_connect(request: &mut Request<()>) {
    *request.method_mut() = Method::CONNECT;
    request.headers_mut().remove(SEC_WEBSOCKET_KEY);
    let protocol = Protocol::from_static("websocket");
    request.extensions_mut().insert(protocol);
}

/// In HTTP/2 cookies may come in several fields, which are one in HTTP/1.1 (RFC 9113 section 8.2.3). Empty ones add nothing: a separator at
/// the end would be white space that readers cut off.
fn put_cookies(out: &mut Vec<u8>, fields: &HeaderMap) {
    if !fields.contains_key(COOKIE) {
        return;
    }
    out.extend_from_slice(b"cookie: ");
    let cookies = fields.get_all(COOKIE).iter().map(HeaderValue::as_bytes);
    for (index, cookie) in cookies.filter(|cookie| !cookie.is_empty()).enumerate() {
        if index > 0 {
            out.extend_from_slice(b"; ");
        }
        out.extend_from_slice(cookie);
    }
    out.extend_from_slice(b"\r\n");
}

/// The request whose head weir has written for an upstream, for one that speaks HTTP/2. It names a host. Its scheme is the one that the client used, as X-Forwarded-Proto says (RFC 9113 section 8.3.1: "from the scheme of a
/// translated request"), and https in any case where its connection is `secure`. `trailers`: whether whoever asks takes them.
pub fn upgrade_request(
    bytes: &[u8],
    secure: bool,
    trailers: bool,
) -> Result<Request<()>, NotForHttp2> {
    let head = parse_request(bytes, OURS)
        .ok()
        .flatten()
        .ok_or(NotForHttp2)?;
    let method = Method::from_bytes(&bytes[head.method.clone()]).map_err(|_| NotForHttp2)?;
    let mut host = &b""[..];
    let mut https = secure;
    let mut fields = HeaderMap::with_capacity(head.fields.len() + 1);
    for (name, value) in &head.fields {
        let (name, value) = (&bytes[name.clone()], &bytes[value.clone()]);
        if name.eq_ignore_ascii_case(b"host") {
            host = value;
            continue;
        }
        if name.eq_ignore_ascii_case(b"x-forwarded-proto") {
            // Of several proxies the first one was asked by the client.
            let first = value.split(|byte| *byte == b',').next().unwrap_or_default();
            https |= first.trim_ascii().eq_ignore_ascii_case(b"https");
        }
        if !hygiene::is_hop_by_hop(name) {
            append(&mut fields, name, value)?;
        }
    }
    if trailers {
        fields.insert(http::header::TE, HeaderValue::from_static("trailers"));
    }
    let uri = Uri::builder()
        .scheme(if https { "https" } else { "http" })
        .authority(host)
        .path_and_query(path_and_query(&bytes[head.target.clone()])?)
        .build()
        .map_err(|_| NotForHttp2)?;
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_2;
    *request.headers_mut() = fields;
    Ok(request)
}

/// A target as HTTP/2 carries it. The three bytes that HTTP/1.1 takes in a query and `http` cannot hold are escaped, as the URL Standard
/// (section 1.3, the query percent-encode set) has browsers do.
fn path_and_query(target: &[u8]) -> Result<PathAndQuery, NotForHttp2> {
    if let Ok(target) = PathAndQuery::try_from(target) {
        return Ok(target);
    }
    let query = target.iter().position(|byte| *byte == b'?');
    let (path, query) = target.split_at(query.ok_or(NotForHttp2)?);
    let mut escaped = path.to_vec();
    for byte in query {
        match byte {
            b'"' => escaped.extend_from_slice(b"%22"),
            b'<' => escaped.extend_from_slice(b"%3C"),
            b'>' => escaped.extend_from_slice(b"%3E"),
            other => escaped.push(*other),
        }
    }
    PathAndQuery::try_from(&escaped[..]).map_err(|_| NotForHttp2)
}

/// How the head of a response by HTTP/2 is written down.
#[derive(Debug, Clone, Copy)]
pub struct Answering {
    /// Whether the request was a HEAD.
    pub to_head: bool,
    /// Whether its stream has ended with the head.
    pub ended: bool,
    /// Whether it goes to a client that must be told of a length.
    pub to_http1: bool,
}

/// Writes a response's head to the end of `out`, which is empty, and reads it as one of HTTP/1.1.
pub fn downgrade_response(
    out: &mut Vec<u8>,
    parts: &response::Parts,
    how: Answering,
) -> Result<ResponseHead, BadResponse> {
    let status = parts.status;
    // A switch of protocols is none of HTTP/2's (RFC 9113 section 8.6).
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(BadResponse::Switch);
    }
    let reason = reason(status.as_u16()).as_bytes();
    put_line(
        out,
        &[b"HTTP/1.1 ", status.as_str().as_bytes(), b" ", reason],
    );
    for (name, value) in &parts.headers {
        put(out, name.as_str().as_bytes(), value.as_bytes());
    }
    let bodiless = how.to_head || status.is_informational() || matches!(status.as_u16(), 204 | 304);
    if !parts.headers.contains_key(CONTENT_LENGTH) && !bodiless {
        match (how.ended, how.to_http1) {
            (false, _) => put(out, b"transfer-encoding", b"chunked"),
            (true, true) => put(out, b"content-length", b"0"),
            (true, false) => {}
        }
    }
    out.extend_from_slice(b"\r\n");
    let parsed = parse_response(out, how.to_head, HeadLimits::default())?;
    let mut head = parsed.ok_or(BadResponse::TooLarge(HeadLimits::default().max_bytes))?;
    if how.ended {
        head.body = ResponseBody::Length(BodyLength::None);
    } else if !bodiless && head.body == ResponseBody::Length(BodyLength::None) {
        // By HTTP/2 trailers may come behind a length of 0, too.
        head.body = ResponseBody::Length(BodyLength::Fixed(0));
    }
    Ok(head)
}

/// The response whose head weir has written for a client, for one that speaks HTTP/2; and how many bytes it has.
pub fn upgrade_response(bytes: &[u8]) -> Result<(Response<()>, usize), NotForHttp2> {
    let head = parse_response(bytes, false, OURS)
        .ok()
        .flatten()
        .ok_or(NotForHttp2)?;
    let mut fields = HeaderMap::with_capacity(head.fields.len());
    for (name, value) in &head.fields {
        let (name, value) = (&bytes[name.clone()], &bytes[value.clone()]);
        if !hygiene::is_hop_by_hop(name) {
            append(&mut fields, name, value)?;
        }
    }
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(head.status).map_err(|_| NotForHttp2)?;
    *response.headers_mut() = fields;
    Ok((response, head.len))
}

fn append(fields: &mut HeaderMap, name: &[u8], value: &[u8]) -> Result<(), NotForHttp2> {
    let name = HeaderName::from_bytes(name).map_err(|_| NotForHttp2)?;
    let value = HeaderValue::from_bytes(value).map_err(|_| NotForHttp2)?;
    fields.try_append(name, value).map_err(|_| NotForHttp2)?;
    Ok(())
}

fn put_line(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
    out.extend_from_slice(b"\r\n");
}

fn put(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    put_line(out, &[name, b": ", value]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http1::path::normalise;

    /// A head as weir writes it, once it has read it and brought its path to its normal form; `None` where it refuses it.
    fn written(head: &[u8]) -> Option<Vec<u8>> {
        let read = parse_request(head, HeadLimits::default()).ok()??;
        let target = &head[read.target.clone()];
        let path = target.iter().position(|byte| *byte == b'?');
        let (path, query) = target.split_at(path.unwrap_or(target.len()));
        let path = normalise(path).ok()?;
        let before = &head[..read.target.start];
        Some([before, &*path, query, &head[read.target.end..]].concat())
    }

    fn escaped(query: &str) -> String {
        let query = query.replace('"', "%22").replace('<', "%3C");
        query.replace('>', "%3E")
    }

    #[test]
    fn a_query_goes_on_as_it_is_but_for_three_bytes() {
        let query = "?a=<b>&\"c\"={d}|[e]\\^`'%3c%&?/;";
        let head = format!("GET /a{query} HTTP/1.1\r\nHost: x\r\n\r\n");
        let request = upgrade_request(head.as_bytes(), false, false).unwrap();
        let target = request.uri().path_and_query().unwrap().as_str();
        assert_eq!(target, "/a?a=%3Cb%3E&%22c%22={d}|[e]\\^`'%3c%&?/;");
    }

    #[test]
    fn each_byte_that_http1_takes_http2_can_carry() {
        let mut taken = 0;
        for byte in 0..=255 {
            let parts: [(&[u8], &[u8]); 6] = [
                (b"G", b"T /a HTTP/1.1\r\nHost: x\r\n\r\n"),
                (b"GET /a", b"b HTTP/1.1\r\nHost: x\r\n\r\n"),
                (b"GET /a?b", b"c HTTP/1.1\r\nHost: x\r\n\r\n"),
                (b"GET /a HTTP/1.1\r\nHost: x", b"y\r\n\r\n"),
                (b"GET /a HTTP/1.1\r\nHost: x\r\na", b"b: c\r\n\r\n"),
                (b"GET /a HTTP/1.1\r\nHost: x\r\na: b", b"c\r\n\r\n"),
            ];
            for (before, behind) in parts {
                if let Some(head) = written(&[before, &[byte], behind].concat()) {
                    taken += 1;
                    let request = upgrade_request(&head, false, false);
                    let head = String::from_utf8_lossy(&head);
                    assert!(request.is_ok(), "{byte:#x}: {head}");
                }
            }
        }
        assert!(taken > 6 * 70, "{taken}");
    }

    proptest! {
        /// But for CONNECT, which is for no upstream, and targets of more than 65,534 bytes.
        #[test]
        fn what_http1_takes_http2_can_carry(
            method in "[A-Z][A-Z0-9!#$%&'*+.^_`|~-]{0,8}",
            path in "[!-~]{0,20}",
            query in "(\\?[!-~]{0,40})?",
            host in "[a-zA-Z0-9._~-]{1,12}(:[0-9]{0,4})?|\\[([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}\\](:[0-9]{1,4})?",
            name in "[A-Za-z0-9!#$%&'*+.^_`|~-]{1,12}",
            value in prop::collection::vec(prop_oneof![8 => 32u8..=126, 1 => 128u8..=255, 1 => Just(b'\t')], 0..20),
        ) {
            let path: String = path.chars().filter(|c| !"?#<>%\\".contains(*c)).collect();
            let query = query.replace('#', "");
            let line = format!("{method} /{path}{query} HTTP/1.1\r\nHost: {host}\r\n{name}: ");
            let Some(head) = written(&[line.as_bytes(), &value, b"\r\n\r\n"].concat()) else {
                return Err(TestCaseError::reject("HTTP/1.1 refuses it"));
            };
            let request = upgrade_request(&head, false, false).unwrap();
            prop_assert_eq!(request.method().as_str(), &method);
            prop_assert_eq!(request.uri().authority().unwrap().as_str(), host);
            let target = request.uri().path_and_query().unwrap().as_str();
            let path = normalise(format!("/{path}").as_bytes()).unwrap().into_owned();
            let path = String::from_utf8(path).unwrap();
            prop_assert_eq!(target, path + &escaped(&query));
            if !hygiene::is_hop_by_hop(name.as_bytes()) {
                let sent = request.headers().get(&name).map(HeaderValue::as_bytes);
                prop_assert_eq!(sent, Some(value.trim_ascii()));
            }
        }
    }
}
