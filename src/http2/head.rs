//! Heads of HTTP/2 as heads of HTTP/1.1, and back. Whatever comes by HTTP/2 is written down as HTTP/1.1 and read by the parser
//! that reads every other head, so that nothing passes here which would be refused there (RFC 9113 section 10.3). Does no I/O.

use h2::ext::Protocol;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{Method, Request, Response, StatusCode, Uri, request, response};
use thiserror::Error;

use crate::http1::head::{HeadError, HeadLimits, RequestHead, parse_request};
use crate::http1::response::{BadResponse, ResponseBody, ResponseHead, parse_response};
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

/// The request whose head weir has written for an upstream, for one that speaks HTTP/2. Where it names no host, it is
/// `authority`. Its scheme is the one that the client used, as X-Forwarded-Proto says (RFC 9113 section 8.3.1: "from the scheme of a
/// translated request"), and https in any case where its connection is `secure`. `trailers`: whether whoever asks takes them.
pub fn upgrade_request(
    bytes: &[u8],
    authority: &str,
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
        if !hygiene::is_hop_by_hop(name, &[]) {
            append(&mut fields, name, value)?;
        }
    }
    if trailers {
        fields.insert(http::header::TE, HeaderValue::from_static("trailers"));
    }
    let host = match host {
        b"" => authority.as_bytes(),
        host => host,
    };
    let uri = Uri::builder()
        .scheme(if https { "https" } else { "http" })
        .authority(host)
        .path_and_query(&bytes[head.target.clone()])
        .build()
        .map_err(|_| NotForHttp2)?;
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_2;
    *request.headers_mut() = fields;
    Ok(request)
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
        return Err(BadResponse);
    }
    put_line(out, &[b"HTTP/1.1 ", status.as_str().as_bytes(), b" "]);
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
    let mut head = parse_response(out, how.to_head, HeadLimits::default())?.ok_or(BadResponse)?;
    if how.ended {
        head.body = ResponseBody::Length(BodyLength::None);
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
        if !hygiene::is_hop_by_hop(name, &[]) {
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
