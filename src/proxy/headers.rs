//! Who the client is, and which fields the next hop sees: hop-by-hop ones stay here, forwarding ones are believed only
//! from trusted proxies. Does no I/O.

use std::io::Write as _;
use std::net::IpAddr;
use std::ops::Range;

use super::handle::{Next, Peer};
use super::reply::Rejection;
use crate::config::sessions::Settings;
use crate::http1::body::BodyError;
use crate::http1::head::{BodyLength, RequestHead};
use crate::http1::hygiene::is_hop_by_hop;
use crate::http1::response::ResponseHead;
use crate::http1::trailers::{self, may_follow_a_body};
use crate::policy::session::{self, END_HEADER, START_HEADER, Session};
use ipnet::IpNet;
use uuid::Uuid;
use uuid::fmt::Hyphenated;

/// Names and values as places in the buffer they were read from.
type Fields = [(Range<usize>, Range<usize>)];

/// What forwarding fields say of the client, as far as the peer is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Client {
    /// The client itself: the peer, or what trusted proxies say of it.
    pub ip: IpAddr,
    /// Whether the peer is a trusted proxy, so that its forwarding fields are kept.
    pub behind_trusted: bool,
}

/// Walks X-Forwarded-For from the right, past trusted proxies, to the first address that none of them is.
pub(super) fn client(buffer: &[u8], head: &RequestHead, peer: IpAddr, trusted: &[IpNet]) -> Client {
    let is_trusted = |ip: &IpAddr| trusted.iter().any(|net| net.contains(ip));
    let mut ip = peer;
    if trusted.is_empty() || !is_trusted(&ip) {
        return Client {
            ip,
            behind_trusted: false,
        };
    }
    let values = head
        .fields
        .iter()
        .filter(|(name, _)| is(buffer, name, "x-forwarded-for"));
    let hops = values
        .rev()
        .flat_map(|(_, value)| buffer[value.clone()].rsplit(|byte| *byte == b','));
    for hop in hops {
        let Some(hop) = std::str::from_utf8(hop)
            .ok()
            .and_then(|hop| hop.trim().parse::<IpAddr>().ok())
        else {
            break;
        };
        ip = hop.to_canonical();
        if !is_trusted(&ip) {
            break;
        }
    }
    Client {
        ip,
        behind_trusted: true,
    }
}

/// Whether the client waits for `100 Continue` before it sends the body.
pub(super) fn expects_continue(buffer: &[u8], head: &RequestHead) -> Result<bool, Rejection> {
    let mut expects = false;
    for (_, value) in head
        .fields
        .iter()
        .filter(|(name, _)| is(buffer, name, "expect"))
    {
        if !buffer[value.clone()].eq_ignore_ascii_case(b"100-continue") {
            return Err(Rejection::Expectation);
        }
        expects = head.body != BodyLength::None && head.minor_version == 1;
    }
    Ok(expects)
}

/// The protocol that the client wants to switch to (RFC 9110 section 7.8), for example `websocket`. HTTP in another form
/// is none of them: requests within a tunnel would pass no policy.
pub(super) fn upgrade(buffer: &[u8], head: &RequestHead) -> Option<Vec<u8>> {
    let asked = head.minor_version == 1
        && head.body == BodyLength::None
        && head
            .fields
            .iter()
            .filter(|(name, _)| is(buffer, name, "connection"))
            .flat_map(|(_, value)| buffer[value.clone()].split(|byte| *byte == b','))
            .any(|option| option.trim_ascii().eq_ignore_ascii_case(b"upgrade"));
    let (_, protocol) = head
        .fields
        .iter()
        .find(|(name, _)| asked && is(buffer, name, "upgrade"))?;
    let protocols = &buffer[protocol.clone()];
    protocols
        .split(|byte| *byte == b',')
        .all(is_other_than_http)
        .then(|| protocols.to_vec())
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

    pub(super) fn as_str(&self) -> &str {
        match self {
            RequestId::Given(text) => text,
            RequestId::New(text) => {
                str::from_utf8(text).expect("a UUID is written in hexadecimal digits")
            }
        }
    }
}

/// What the upstream is told beside what the client sent.
pub(super) struct Passed<'a> {
    /// The normalised path and the query.
    pub target: &'a [u8],
    pub client: &'a Client,
    pub request_id: &'a RequestId,
    /// What clients must not send, as [`session::folded`].
    pub identity_fields: &'a [Vec<u8>],
    pub identity: Option<(&'a Settings, &'a Session)>,
}

/// weir answers an expectation itself; and applications that speak CGI's way take `Proxy` for the proxy that they shall use
/// ("httpoxy").
const NEVER_PASSED: [&[u8]; 2] = [b"expect", b"proxy"];
/// What trusted proxies say goes on with this hop behind it.
const CHAINS: [&[u8]; 3] = [b"x-forwarded-for", b"x-forwarded-client-cert", b"forwarded"];
/// What a peer says of itself is not believed.
const PEERS_CLAIMS: [&[u8]; 7] = [
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"x-forwarded-host",
    b"x-forwarded-client-cert",
    b"x-real-ip",
    b"forwarded",
    b"x-request-id",
];

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
        client,
        request_id,
        identity_fields,
        identity,
    } = passed;
    out.extend_from_slice(&buffer[head.method.clone()]);
    out.push(b' ');
    out.extend_from_slice(target);
    out.extend_from_slice(b" HTTP/1.1\r\n");
    let without = match client.behind_trusted {
        true => &CHAINS[..],
        false => &PEERS_CLAIMS,
    };
    let dropped = |name: &[u8]| {
        NEVER_PASSED
            .iter()
            .chain(without)
            .any(|other| session::is_folded(name, other))
            || identity_fields
                .iter()
                .any(|other| session::is_folded(name, other))
            || is_misspelt(name)
    };
    put_fields(out, buffer, &head.fields, dropped);
    let has = |wanted: &str| head.fields.iter().any(|(name, _)| is(buffer, name, wanted));
    if !has("host") {
        out.extend_from_slice(b"Host: \r\n");
    }
    if head.body == BodyLength::Chunked {
        out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
    }
    if let Some(protocol) = upgrade {
        put(out, b"Connection", b"upgrade");
        put(out, b"Upgrade", protocol);
    }
    let put_chain = |out: &mut Vec<u8>, wanted: &str| {
        let trusted = |name: &Range<usize>| client.behind_trusted && is(buffer, name, wanted);
        for (_, value) in head.fields.iter().filter(|(name, _)| trusted(name)) {
            out.extend_from_slice(&buffer[value.clone()]);
            out.extend_from_slice(b", ");
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
    let certificate = peer.tls.as_ref().and_then(|tls| tls.certificate.as_ref());
    if let Some(certificate) = certificate {
        out.extend_from_slice(b"X-Forwarded-Client-Cert: ");
        put_chain(out, "x-forwarded-client-cert");
        out.extend_from_slice(certificate.element.as_bytes());
        out.extend_from_slice(b"\r\n");
    } else if client.behind_trusted {
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
    if !client.behind_trusted || !has("x-request-id") {
        put(out, b"X-Request-Id", request_id.as_str().as_bytes());
    }
    if let Some((settings, session)) = identity {
        for (name, value) in session::identity_headers(settings, session) {
            put(out, name.as_bytes(), value.as_bytes());
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Whether a field may come behind a request's body: one that an upstream merges into the head must not say what weir alone does.
pub(super) fn may_trail_up(name: &[u8], identity_fields: &[Vec<u8>]) -> bool {
    let answered_for = PEERS_CLAIMS.iter().chain(&NEVER_PASSED);
    may_follow_a_body(name)
        && !answered_for
            .copied()
            .chain(identity_fields.iter().map(Vec::as_slice))
            .any(|other| session::is_folded(name, other))
        && !is_misspelt(name)
}

/// Whether a field may come behind a response's body.
pub(super) fn may_trail_down(name: &[u8]) -> bool {
    may_follow_a_body(name) && !is_session_header(name)
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

/// Whether an application could take it for a field that weir answers for, though it is spelt in another way: whoever sent
/// it, no proxy looked at it.
fn is_misspelt(name: &[u8]) -> bool {
    const BELIEVED: [&[u8]; 8] = [
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"x-forwarded-client-cert",
        b"x-real-ip",
        b"x-request-id",
        b"content-length",
        b"transfer-encoding",
    ];
    let is_usual = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    !name.iter().all(is_usual) && BELIEVED.iter().any(|other| session::is_folded(name, other))
}

/// How a response goes back to the client.
pub(super) struct Back<'a> {
    /// Whether its length is not known ahead.
    pub chunked: bool,
    /// Whether the client speaks HTTP/1.0, which has no chunks.
    pub old_client: bool,
    pub next: Next,
    /// The protocols of which the client offered a choice, for a 101.
    pub switched: Option<&'a [u8]>,
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
    let next = match back.chunked && back.old_client {
        true => Next::Close,
        false => back.next,
    };
    put_status_line(out, answer, response);
    // RFC 9110 section 8.6: neither has a length, and a client that believes one waits for a body that never comes.
    let bodiless = matches!(response.status, 101 | 204);
    // A cache that kept the token would give one client's session to another.
    let mut fields = response.fields.iter();
    let of_session = fields.any(|(name, _)| is_session_header(&answer[name.clone()]));
    put_fields(out, answer, &response.fields, |name| {
        is_session_header(name)
            || (bodiless && name.eq_ignore_ascii_case(b"content-length"))
            || (of_session && is_cache_control(name))
    });
    tell(out);
    if of_session {
        out.extend_from_slice(b"Cache-Control: no-store\r\n");
    }
    if back.chunked && !back.old_client {
        out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
    }
    if let Some(offered) = back.switched {
        let mut fields = response.fields.iter();
        let chosen = fields.find(|(name, _)| is(answer, name, "upgrade"));
        put(out, b"Connection", b"upgrade");
        // An upstream that does not say what it chose took what it was offered.
        let protocol = chosen.map_or(offered, |(_, value)| &answer[value.clone()]);
        put(out, b"Upgrade", protocol);
    } else if next == Next::Close {
        out.extend_from_slice(b"Connection: close\r\n");
    } else if back.old_client {
        // HTTP/1.0 closes unless told (RFC 9112 section 9.3).
        out.extend_from_slice(b"Connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
    next
}

/// Appends the head of an interim response for the client.
pub(super) fn put_interim_head(out: &mut Vec<u8>, answer: &[u8], interim: &ResponseHead) {
    put_status_line(out, answer, interim);
    put_fields(out, answer, &interim.fields, is_session_header);
    out.extend_from_slice(b"\r\n");
}

fn put_status_line(out: &mut Vec<u8>, answer: &[u8], response: &ResponseHead) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(itoa::Buffer::new().format(response.status).as_bytes());
    out.push(b' ');
    out.extend_from_slice(&answer[response.reason.clone()]);
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
    let connection: Vec<&[u8]> = fields
        .iter()
        .filter(|(name, _)| is(bytes, name, "connection"))
        .map(|(_, value)| &bytes[value.clone()])
        .collect();
    for (name, value) in fields {
        let name_bytes = &bytes[name.clone()];
        if !is_hop_by_hop(name_bytes, &connection) && !dropped(name_bytes) {
            put(out, &bytes[name.clone()], &bytes[value.clone()]);
        }
    }
}

fn put(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

pub(super) fn is(buffer: &[u8], name: &Range<usize>, wanted: &str) -> bool {
    buffer[name.clone()].eq_ignore_ascii_case(wanted.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::http1::head::{HeadLimits, parse_request};

    fn who(fields: &str, peer: &str, trusted: &[&str]) -> (String, bool) {
        let bytes = format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n").into_bytes();
        let head = parse_request(&bytes, HeadLimits::default())
            .unwrap()
            .unwrap();
        let trusted: Vec<IpNet> = trusted.iter().map(|net| net.parse().unwrap()).collect();
        let peer: SocketAddr = peer.parse().unwrap();
        let client = client(&bytes, &head, peer.ip().to_canonical(), &trusted);
        (client.ip.to_string(), client.behind_trusted)
    }

    fn sent_up(fields: &str, trusted: bool) -> String {
        let bytes = format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n").into_bytes();
        let head = parse_request(&bytes, HeadLimits::default())
            .unwrap()
            .unwrap();
        let client = Client {
            ip: IpAddr::from([1, 2, 3, 4]),
            behind_trusted: trusted,
        };
        let peer = Peer::new(IpAddr::from([1, 2, 3, 4]));
        let protocol = upgrade(&bytes, &head);
        let passed = Passed {
            target: b"/",
            client: &client,
            request_id: &RequestId::Given("id".to_owned()),
            identity_fields: &[],
            identity: None,
        };
        let mut out = Vec::new();
        put_request_head(&mut out, &bytes, &head, &passed, &peer, protocol.as_deref());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn no_other_spelling_smuggles_a_field_that_is_believed() {
        for name in [
            "X_Forwarded_For",
            "x-forwarded_FOR",
            "X.Forwarded.For",
            "X_Forwarded_Proto",
            "X~Forwarded-Host",
            "X_Real-IP",
            "X_Request_Id",
            "Content_Length",
            "content.length",
            "Transfer_Encoding",
            "Transfer!Encoding",
            "Proxy",
            "proxy",
        ] {
            for trusted in [true, false] {
                let sent = sent_up(&format!("{name}: 6.6.6.6\r\n"), trusted);
                assert!(!sent.contains("6.6.6.6"), "{name} {trusted}: {sent}");
            }
        }
        for name in ["X_Other", "X-Forwarded-Fort", "Proxy-X", "Hos_t"] {
            let field = format!("{name}: 6.6.6.6\r\n");
            assert!(sent_up(&field, false).contains(&field), "{name}");
        }
        assert!(sent_up("X-Real-IP: 6.6.6.6\r\n", true).contains("X-Real-IP: 6.6.6.6\r\n"));
    }

    #[test]
    fn a_chain_of_trusted_proxies_goes_on_and_others_begin_anew() {
        let chain = "X-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6;proto=https\r\n";
        let sent = sent_up(chain, true);
        assert!(
            sent.contains("X-Forwarded-For: 6.6.6.6, 1.2.3.4\r\n"),
            "{sent}"
        );
        assert!(
            sent.contains("Forwarded: for=6.6.6.6;proto=https, for=1.2.3.4\r\n"),
            "{sent}"
        );
        let sent = sent_up(chain, false);
        assert!(!sent.contains("6.6.6.6") && sent.contains("X-Forwarded-For: 1.2.3.4\r\n"));
    }

    #[test]
    fn a_switch_to_another_http_is_not_passed_on() {
        let asks = |protocol: &str| {
            let fields = format!("Connection: Upgrade\r\nUpgrade: {protocol}\r\n");
            sent_up(&fields, false).contains("\r\nUpgrade: ")
        };
        assert!(asks("websocket"));
        assert!(asks("x, y/1"));
        for protocol in [
            "h2c",
            "H2C",
            "websocket, h2c",
            "h2",
            "h2c/1",
            "HTTP/2.0",
            "TLS/1.2",
            "",
        ] {
            assert!(!asks(protocol), "{protocol}");
        }
    }

    #[test]
    fn a_client_is_what_trusted_proxies_say_and_no_one_else() {
        let proxies = ["10.0.0.0/8", "fd00::/8"];
        let check = |fields: &str, peer: &str, ip: &str, behind| {
            assert_eq!(
                who(fields, peer, &proxies),
                (ip.to_owned(), behind),
                "{fields:?} from {peer}"
            );
        };
        check("", "1.2.3.4:5", "1.2.3.4", false);
        check(
            "X-Forwarded-For: 6.6.6.6\r\n",
            "1.2.3.4:5",
            "1.2.3.4",
            false,
        );
        check(
            "X-Forwarded-For: 6.6.6.6\r\n",
            "10.0.0.1:5",
            "6.6.6.6",
            true,
        );
        check(
            "X-Forwarded-For: 9.9.9.9, 6.6.6.6, 10.0.0.2\r\n",
            "10.0.0.1:5",
            "6.6.6.6",
            true,
        );
        check(
            "X-Forwarded-For: 9.9.9.9\r\nX-Forwarded-For: 6.6.6.6\r\n",
            "[fd00::1]:5",
            "6.6.6.6",
            true,
        );
        check(
            "X-Forwarded-For: 6.6.6.6, nonsense\r\n",
            "10.0.0.1:5",
            "10.0.0.1",
            true,
        );
        check(
            "X-Forwarded-For: ::ffff:6.6.6.6\r\n",
            "[::ffff:10.0.0.1]:5",
            "6.6.6.6",
            true,
        );
        check("", "10.0.0.1:5", "10.0.0.1", true);
    }

    /// Names and values that mean something to a proxy, and others.
    fn field() -> impl Strategy<Value = String> {
        let name = "(Connection|connection|X-Forwarded-For|X_FORWARDED_FOR|Upgrade|TE|Forwarded|X-Request-Id|Expect|X-A|Keep-Alive|[a-zA-Z!#_-]{1,8})";
        let value = "(close|x-a, host|upgrade|websocket|h2c|keep-alive|content-length|[ -~]{0,12})";
        (name, value).prop_map(|(name, value)| format!("{name}: {value}\r\n"))
    }

    proptest! {
        #[test]
        fn what_goes_up_is_one_head_that_names_its_client_once(fields in prop::collection::vec(field(), 0..8), trusted: bool) {
            let sent = sent_up(&fields.concat(), trusted).into_bytes();
            let head = parse_request(&sent, HeadLimits::default()).unwrap().unwrap();
            prop_assert_eq!(head.len, sent.len());
            let count = |wanted: &str| head.fields.iter().filter(|(name, _)| is(&sent, name, wanted)).count();
            prop_assert_eq!((count("x-forwarded-for"), count("host")), (1, 1));
            prop_assert_eq!(count("connection"), count("upgrade"));
            for hop in ["te", "keep-alive", "transfer-encoding", "expect"] {
                prop_assert_eq!(count(hop), 0, "{}", hop);
            }
            if !trusted {
                prop_assert_eq!((count("x-request-id"), count("forwarded")), (1, 0));
            }
        }
    }
}
