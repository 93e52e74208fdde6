//! Who the client is, and which fields the next hop sees: hop-by-hop ones stay here, forwarding ones are believed only
//! from trusted proxies. Does no I/O.

use std::borrow::Cow;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use super::exchange::{Next, Peer};
use super::reply::{Date, Rejection};
use super::trace::Trace;
use super::upgrade::Spoken;
use crate::config::rewrite::HeaderChanges;
use crate::config::sessions::Settings;
use crate::config::{Listener, Route};
use crate::http1::body::BodyError;
use crate::http1::head::{BodyLength, Fields, RequestHead, decimal, values};
use crate::http1::hygiene::{
    FORWARDED, OF_CLIENTS, begins_folded, connection_options, is_folded, is_hop_by_hop,
};
use crate::http1::response::{ResponseHead, reason};
use crate::http1::trailers::{self, may_follow_a_body};
use crate::http1::websocket::WEBSOCKET;
use crate::plan::Plan;
use crate::policy::session::{self, END_HEADER, START_HEADER, Session};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

/// What forwarding fields say of the client, as far as the peer is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Client {
    /// The client itself: the peer, or what trusted proxies say of it.
    pub ip: IpAddr,
    /// Whether the peer is a trusted proxy, so that its forwarding fields are kept.
    pub behind_trusted: bool,
    /// Whether it is also believed about its clients' certificates.
    pub certificate_trusted: bool,
}

/// Walks X-Forwarded-For from the right, past trusted proxies, to the first address that none of them is.
pub(super) fn client(
    buffer: &[u8],
    head: &RequestHead,
    peer: IpAddr,
    listener: &Listener,
) -> Client {
    let mut ip = peer;
    if !is_trusted(listener, ip) {
        return Client {
            ip,
            behind_trusted: false,
            certificate_trusted: false,
        };
    }
    let values = head.values(buffer, "x-forwarded-for").rev();
    let hops = values.flat_map(|value| value.rsplit(|byte| *byte == b','));
    for hop in hops {
        let Some(hop) = std::str::from_utf8(hop).ok().and_then(hop_address) else {
            break;
        };
        ip = hop.to_canonical();
        if !is_trusted(listener, ip) {
            break;
        }
    }
    Client {
        ip,
        behind_trusted: true,
        certificate_trusted: listener.trust_client_cert,
    }
}

/// Whether it is believed about whom its requests are of.
pub(super) fn is_trusted(listener: &Listener, ip: IpAddr) -> bool {
    listener.trusted_proxies.iter().any(|net| net.contains(&ip))
}

/// Of one hop. Some proxies add its port, as nginx takes it, too: `203.0.113.7:4711`, `[2001:db8::7]:4711`.
fn hop_address(hop: &str) -> Option<IpAddr> {
    let hop = hop.trim();
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']'));
    if let Ok(address) = bare.unwrap_or(hop).parse() {
        return Some(address);
    }
    hop.parse::<SocketAddr>().ok().map(|place| place.ip())
}

/// Whether the client waits for `100 Continue` before it sends the body.
pub(super) fn expects_continue(buffer: &[u8], head: &RequestHead) -> Result<bool, Rejection> {
    let mut expects = false;
    for value in head.values(buffer, "expect") {
        // A list, of which empty members say nothing (RFC 9110 sections 5.6.1 and 10.1.1).
        let members = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        for member in members.filter(|member| !member.is_empty()) {
            if !member.eq_ignore_ascii_case(b"100-continue") {
                return Err(Rejection::Expectation);
            }
            expects = head.body != BodyLength::None && head.minor_version == 1;
        }
    }
    Ok(expects)
}

/// How many proxies an OPTIONS may go on to, where it says so (RFC 9110 section 7.6.2).
pub(super) fn max_forwards(buffer: &[u8], head: &RequestHead) -> Option<u64> {
    if buffer[head.method.clone()] != *b"OPTIONS" {
        return None;
    }
    decimal(head.field(buffer, MAX_FORWARDS)?)
}

const MAX_FORWARDS: &str = "max-forwards";

/// The protocol that the client wants to switch to (RFC 9110 section 7.8), for example `websocket`. HTTP in another form
/// is none of them: requests within a tunnel would pass no policy.
pub(super) fn upgrade(buffer: &[u8], head: &RequestHead) -> Option<Vec<u8>> {
    let asked = head.minor_version == 1
        && head.body != BodyLength::Chunked
        && head
            .values(buffer, "connection")
            .flat_map(connection_options)
            .any(|option| option.eq_ignore_ascii_case(b"upgrade"));
    if !asked {
        return None;
    }
    let mut offered = head.values(buffer, "upgrade");
    let mut protocols = offered.next()?.to_vec();
    for more in offered {
        protocols.extend_from_slice(b", ");
        protocols.extend_from_slice(more);
    }
    let mut each = protocols.split(|byte| *byte == b',');
    each.all(is_other_than_http).then_some(protocols)
}

/// Whether one of these values of `Authorization` or `WWW-Authenticate` has a part in saying who the client is for as long as a connection
/// lives, and not for one request: NTLM, and Negotiate (RFC 4559 section 6).
pub(super) fn bind<'v>(mut values: impl Iterator<Item = &'v [u8]>) -> bool {
    let binds = |challenge: &[u8]| {
        let scheme = challenge
            .trim_ascii_start()
            .split(u8::is_ascii_whitespace)
            .next();
        let is = |name: &[u8]| scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(name));
        is(b"ntlm") || is(b"negotiate")
    };
    values.any(|value| value.split(|byte| *byte == b',').any(binds))
}

/// Neither h2c nor TLS, which would hide HTTP (RFC 2817).
fn is_other_than_http(protocol: &[u8]) -> bool {
    let protocol = protocol.trim_ascii().to_ascii_lowercase();
    let hides_http = [&b"h2"[..], b"h3", b"http", b"tls"];
    !protocol.is_empty() && !hides_http.iter().any(|name| protocol.starts_with(name))
}

/// A request's id as text: the client's, from a trusted proxy, or a new one, which costs no allocation.
pub(super) enum RequestId {
    Given(String),
    New([u8; Hyphenated::LENGTH]),
}

impl RequestId {
    pub(super) fn new(id: Uuid) -> RequestId {
        let mut text = [0; Hyphenated::LENGTH];
        id.hyphenated().encode_lower(&mut text);
        RequestId::New(text)
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            RequestId::Given(text) => text.as_bytes(),
            RequestId::New(text) => text,
        }
    }
}

/// What the upstream is told beside what the client sent.
pub(super) struct Passed<'a> {
    /// What the upstream is asked for: a path and the query.
    pub target: &'a [u8],
    /// What it changes on the way.
    pub route: &'a Route,
    /// The host that is asked, where the client names none.
    pub authority: &'a dyn Fn() -> String,
    pub client: &'a Client,
    pub request_id: &'a RequestId,
    /// Where weir takes part in traces; otherwise the client's word on them goes on.
    pub trace: Option<&'a Trace>,
    /// What clients must not send, as [`crate::http1::hygiene::folded`].
    pub identity_fields: &'a [Vec<u8>],
    pub identity: Option<(&'a Settings, &'a Session)>,
}

/// weir answers an expectation itself; applications that speak CGI's way take `Proxy` for the proxy that they shall use
/// ("httpoxy"); and by the last two, proxies that rewrite paths say what was asked for: frameworks route by them in the path's place,
/// and a proxy that is trusted for the client's address passes on a client's own.
const NEVER_PASSED: [&[u8]; 4] = [b"expect", b"proxy", b"x-original-url", b"x-rewrite-url"];
/// What trusted proxies say goes on with this hop behind it.
const CHAINS: [&[u8]; 3] = [b"x-forwarded-for", b"x-forwarded-client-cert", b"forwarded"];
/// What a peer says of itself is not believed: all that begins as [`FORWARDED`], these, and what names [clients](OF_CLIENTS).
const PEERS_CLAIMS: [&[u8]; 2] = [b"forwarded", b"x-request-id"];

/// Appends the request's head for the upstream.
pub(super) fn put_request_head(
    out: &mut Vec<u8>,
    buffer: &[u8],
    head: &RequestHead,
    passed: &Passed<'_>,
    peer: &Peer,
    upgrade: Option<&[u8]>,
) {
    let Passed {
        target,
        route,
        authority,
        client,
        request_id,
        trace,
        identity_fields,
        identity,
    } = passed;
    out.extend_from_slice(&buffer[head.method.clone()]);
    out.push(b' ');
    out.extend_from_slice(target);
    out.extend_from_slice(b" HTTP/1.1\r\n");
    let is_replaced = |name: &[u8]| match client.behind_trusted {
        true => CHAINS.iter().any(|other| is_folded(name, other)),
        false => is_peers_claim(name),
    };
    let left = max_forwards(buffer, head).map(|may| may.saturating_sub(1));
    let host = head.field(buffer, "host").unwrap_or_default();
    let new_host = match (&route.rewrite.host, host) {
        (Some(host), _) => Some(Cow::Borrowed(&**host)),
        (None, b"") => Some(Cow::Owned(authority())),
        (None, _) => None,
    };
    let changes = &route.request_headers;
    let dropped = |name: &[u8]| {
        NEVER_PASSED.iter().any(|other| is_folded(name, other))
            || is_replaced(name)
            || identity_fields.iter().any(|other| is_folded(name, other))
            || is_misspelt(name)
            || trace.is_some_and(|trace| is_of_trace(name, trace))
            || changes.drops(name)
            || (left.is_some() && name.eq_ignore_ascii_case(MAX_FORWARDS.as_bytes()))
            || (new_host.is_some() && name.eq_ignore_ascii_case(b"host"))
    };
    put_fields(out, buffer, &head.fields, dropped);
    for (name, value) in changes.put_in() {
        put(out, name.as_bytes(), value.as_bytes());
    }
    if let Some(left) = left {
        let mut text = itoa::Buffer::new();
        put(out, b"Max-Forwards", text.format(left).as_bytes());
    }
    if let Some(host) = &new_host {
        put(out, b"Host", host.as_bytes());
    }
    if head.body == BodyLength::Chunked {
        out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
    }
    if let Some(protocol) = upgrade {
        put(out, b"Connection", b"upgrade");
        put(out, b"Upgrade", protocol);
    }
    let asked = Some(host).filter(|host| new_host.is_some() && !host.is_empty());
    put_forwarded(out, buffer, head, client, peer, asked);
    if !client.behind_trusted || head.field(buffer, "x-request-id").is_none() {
        put(out, b"X-Request-Id", request_id.as_bytes());
    }
    if let Some(trace) = trace {
        put(out, b"Traceparent", &trace.told.value());
    }
    if let Some((settings, session)) = identity {
        for (name, value) in session::identity_headers(settings, session) {
            put(out, name.as_bytes(), value.as_bytes());
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends what the upstream is told of the client's hop: behind what trusted proxies say of those before it, where there are some.
/// `asked`: the host that the client asked for, where the upstream is told another.
fn put_forwarded(
    out: &mut Vec<u8>,
    buffer: &[u8],
    head: &RequestHead,
    client: &Client,
    peer: &Peer,
    asked: Option<&[u8]>,
) {
    let has = |wanted: &str| head.field(buffer, wanted).is_some();
    let put_chain = |out: &mut Vec<u8>, wanted: &str| {
        if client.behind_trusted {
            for value in head.values(buffer, wanted) {
                out.extend_from_slice(value);
                out.extend_from_slice(b", ");
            }
        }
    };
    out.extend_from_slice(b"X-Forwarded-For: ");
    put_chain(out, "x-forwarded-for");
    out.extend_from_slice(peer.text.as_bytes());
    out.extend_from_slice(b"\r\n");
    // A chain that trusted proxies began in the standard form (RFC 7239) goes on; weir begins none, since few upstreams
    // read it.
    if client.behind_trusted && has("forwarded") {
        out.extend_from_slice(b"Forwarded: ");
        put_chain(out, "forwarded");
        let _ = match peer.ip {
            IpAddr::V4(peer) => write!(out, "for={peer}\r\n"),
            IpAddr::V6(peer) => write!(out, "for=\"[{peer}]\"\r\n"),
        };
    }
    if let Some(host) = asked
        && !(client.behind_trusted && has("x-forwarded-host"))
    {
        put(out, b"X-Forwarded-Host", host);
    }
    let certificate = peer.tls.as_ref().and_then(|tls| tls.certificate.as_ref());
    if let Some(certificate) = certificate {
        out.extend_from_slice(b"X-Forwarded-Client-Cert: ");
        if client.certificate_trusted {
            put_chain(out, "x-forwarded-client-cert");
        }
        out.extend_from_slice(certificate.element.as_bytes());
        out.extend_from_slice(b"\r\n");
    } else if client.certificate_trusted {
        let fields = head.fields.iter();
        for (name, value) in fields.filter(|(name, _)| is(buffer, name, "x-forwarded-client-cert"))
        {
            put(out, &buffer[name.clone()], &buffer[value.clone()]);
        }
    }
    if !client.behind_trusted || !has("x-forwarded-proto") {
        let scheme = peer.tls.as_ref().map_or(&b"http"[..], |_| b"https");
        put(out, b"X-Forwarded-Proto", scheme);
    }
}

/// Whether a field may come behind a request's body: one that an upstream merges into the head must not say what weir alone does.
pub(super) fn may_trail_up(name: &[u8], plan: &Plan, route: &Route) -> bool {
    may_follow_a_body(name)
        && !is_peers_claim(name)
        && !NEVER_PASSED
            .into_iter()
            .chain(plan.identity_fields.iter().map(|name| &name[..]))
            .any(|other| is_folded(name, other))
        && !is_misspelt(name)
        && !route.request_headers.drops(name)
}

/// Whether a field may come behind a response's body, which the route makes these `changes` to the head of.
pub(super) fn may_trail_down(name: &[u8], changes: &HeaderChanges) -> bool {
    may_follow_a_body(name) && !is_session_header(name) && !changes.drops(name)
}

/// The same of a call of gRPC.
pub(super) fn may_end_a_call(name: &[u8], changes: &HeaderChanges) -> bool {
    trailers::may_end_a_call(name) && !is_session_header(name) && !changes.drops(name)
}

/// Appends the end of a body in chunks (RFC 9112 section 7.1), with those fields of a trailer `section` that `may` follow it.
pub(super) fn put_last_chunk(
    out: &mut Vec<u8>,
    section: &[u8],
    may: impl Fn(&[u8]) -> bool,
) -> Result<(), BodyError> {
    out.extend_from_slice(b"0\r\n");
    if !section.is_empty() {
        for (name, value) in trailers::parse(section)? {
            if may(&section[name.clone()]) {
                put(out, &section[name], &section[value]);
            }
        }
    }
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// Whether weir says it anew, or it belongs to a trace that ended here.
fn is_of_trace(name: &[u8], trace: &Trace) -> bool {
    name.eq_ignore_ascii_case(b"traceparent")
        || (!trace.keeps_state && name.eq_ignore_ascii_case(b"tracestate"))
}

/// Whether only a trusted proxy may say it, however it is spelt.
fn is_peers_claim(name: &[u8]) -> bool {
    let mut known = PEERS_CLAIMS.iter().chain(&OF_CLIENTS);
    begins_folded(name, FORWARDED) || known.any(|other| is_folded(name, other))
}

/// Whether an application could take it for a field that weir answers for, though it is spelt in another way: whoever sent
/// it, no proxy looked at it.
fn is_misspelt(name: &[u8]) -> bool {
    const OF_FRAMING: [&[u8]; 2] = [b"content-length", b"transfer-encoding"];
    let is_usual = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    !name.iter().all(is_usual)
        && (is_peers_claim(name) || OF_FRAMING.iter().any(|other| is_folded(name, other)))
}

/// How a response goes back to the client.
pub(super) struct Back<'a> {
    /// Whether its length is not known ahead.
    pub chunked: bool,
    /// Whether the client speaks HTTP/1.0, which has no chunks.
    pub is_http10: bool,
    pub next: Next,
    /// Of the route.
    pub changes: &'a HeaderChanges,
    /// The protocols of which the client offered a choice, for a 101.
    pub switched: Option<&'a [u8]>,
    /// Whether it starts or ends a session: a cache that kept the token would give one client's session to another.
    pub of_session: bool,
    /// For a response that says none (RFC 9110 section 6.6.1).
    pub date: &'a Date,
}

/// What both sides speak behind a 101, of what the client offered.
pub(super) fn switched_to(
    answer: &[u8],
    response: &ResponseHead,
    offered: Option<&[u8]>,
) -> Spoken {
    let chosen = offered.map(|offered| chosen(answer, response, offered));
    match chosen.is_some_and(|chosen| chosen.eq_ignore_ascii_case(WEBSOCKET)) {
        true => Spoken::WebSocket,
        false => Spoken::Other,
    }
}

/// An upstream that does not say what it chose took what it was offered.
fn chosen<'b>(answer: &'b [u8], response: &ResponseHead, offered: &'b [u8]) -> &'b [u8] {
    let mut chosen = values(answer, &response.fields, "upgrade");
    chosen.next().unwrap_or(offered)
}

/// Appends the response's head for the client, with the fields that `tell` puts; what then becomes of its connection.
pub(super) fn put_response_head(
    out: &mut Vec<u8>,
    answer: &[u8],
    response: &ResponseHead,
    back: &Back<'_>,
    tell: impl FnOnce(&mut Vec<u8>),
) -> Next {
    // HTTP/1.0 has no chunks: the end of the connection ends the body.
    let next = match back.chunked && back.is_http10 {
        true => Next::Close,
        false => back.next,
    };
    put_status_line(out, answer, response);
    // RFC 9110 section 8.6: neither has a length, and a client that believes one waits for a body that never comes.
    let bodiless = matches!(response.status, 101 | 204);
    put_fields(out, answer, &response.fields, |name| {
        is_session_header(name)
            || (bodiless && name.eq_ignore_ascii_case(b"content-length"))
            || (back.of_session && is_cache_control(name))
            || back.changes.drops(name)
    });
    for (name, value) in back.changes.put_in() {
        if !(back.of_session && is_cache_control(name.as_bytes())) {
            put(out, name.as_bytes(), value.as_bytes());
        }
    }
    if response.status != 101 && values(answer, &response.fields, "date").next().is_none() {
        out.extend_from_slice(&back.date.field());
    }
    tell(out);
    if back.of_session {
        out.extend_from_slice(b"Cache-Control: no-store\r\n");
    }
    if back.chunked && !back.is_http10 {
        out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
    }
    if response.status == 426 {
        // It is there to say so (RFC 9110 section 15.5.22).
        for wanted in values(answer, &response.fields, "upgrade") {
            put(out, b"Connection", b"upgrade");
            put(out, b"Upgrade", wanted);
        }
    }
    if let Some(offered) = back.switched {
        put(out, b"Connection", b"upgrade");
        put(out, b"Upgrade", chosen(answer, response, offered));
    } else if next == Next::Close {
        out.extend_from_slice(b"Connection: close\r\n");
    } else if back.is_http10 {
        // HTTP/1.0 closes unless told (RFC 9112 section 9.3).
        out.extend_from_slice(b"Connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
    next
}

/// Appends the head of an interim response for the client.
pub(super) fn put_interim_head(
    out: &mut Vec<u8>,
    answer: &[u8],
    interim: &ResponseHead,
    changes: &HeaderChanges,
) {
    put_status_line(out, answer, interim);
    put_fields(out, answer, &interim.fields, |name| {
        // RFC 9110 section 8.6: there is no body.
        is_session_header(name)
            || name.eq_ignore_ascii_case(b"content-length")
            || changes.drops(name)
    });
    out.extend_from_slice(b"\r\n");
}

fn put_status_line(out: &mut Vec<u8>, answer: &[u8], response: &ResponseHead) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(itoa::Buffer::new().format(response.status).as_bytes());
    out.push(b' ');
    // Some clients take a line without one for malformed.
    let reason = match response.reason.is_empty() {
        true => reason(response.status).as_bytes(),
        false => &answer[response.reason.clone()],
    };
    out.extend_from_slice(reason);
    out.extend_from_slice(b"\r\n");
}

/// What upstreams tell weir by, and no one else.
fn is_session_header(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(START_HEADER.as_bytes())
        || name.eq_ignore_ascii_case(END_HEADER.as_bytes())
}

/// For every cache, or for those of one kind, such as `CDN-Cache-Control` (RFC 9213).
fn is_cache_control(name: &[u8]) -> bool {
    let end = name.len().saturating_sub(b"cache-control".len());
    name[end..].eq_ignore_ascii_case(b"cache-control")
        || name.eq_ignore_ascii_case(b"surrogate-control")
}

/// Copies the end-to-end fields but for those `dropped`.
fn put_fields(out: &mut Vec<u8>, bytes: &[u8], fields: &Fields, dropped: impl Fn(&[u8]) -> bool) {
    for (name, value) in fields {
        let name_bytes = &bytes[name.clone()];
        if !is_hop_by_hop(name_bytes) && !dropped(name_bytes) {
            put_line(out, bytes, name, value);
        }
    }
}

/// The field that stands in `bytes`; in one piece where it was sent as [`put`] puts it, as nearly all are.
fn put_line(out: &mut Vec<u8>, bytes: &[u8], name: &Range<usize>, value: &Range<usize>) {
    let end = value.end + b"\r\n".len();
    let is_usual = bytes.get(value.end..end) == Some(b"\r\n")
        && bytes.get(name.end..value.start) == Some(b": ");
    match is_usual {
        true => out.extend_from_slice(&bytes[name.start..end]),
        false => put(out, &bytes[name.clone()], &bytes[value.clone()]),
    }
}

/// Appends a field line.
pub(super) fn put(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

pub(super) fn is(buffer: &[u8], name: &Range<usize>, wanted: &str) -> bool {
    buffer[name.clone()].eq_ignore_ascii_case(wanted.as_bytes())
}

#[cfg(test)]
mod tests;
