//! What comes before HTTP on a client's connection: who is at its other end, and what carries its bytes. Must not read HTTP.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustls::ProtocolVersion;
use rustls::server::Acceptor;
use rustls::{HandshakeKind, ServerConnection};
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::exchange::{Peer, Redirected};
use super::headers;
use super::http1;
use super::lane::Lane;
use super::reply::{Asker, Rejection};
use super::wire::write;
use crate::clock;
use crate::config::Listener;
use crate::config::limit_keys::one_client;
use crate::config::listeners::{ListenerProtocol, ProxyProtocol};
use crate::http1::proxy_protocol::{self, ProxyError};
use crate::net::clients::Counted;
use crate::net::stream::{Socket, Stream, canonical};
use crate::net::tls::{Protocol, Trouble, with_ends};
use crate::plan::{Greeting, Plan};

/// What each record of a handshake begins with (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;

/// How long a handshake has its turn, at most. What is costly is done by then; what is waited for is the client, and one that says nothing
/// must not keep others out.
const TURN: Duration = Duration::from_secs(1);

/// A connection that is ready for HTTP.
pub(super) struct Guest {
    pub stream: Stream,
    /// What was read of it already, and is HTTP.
    pub ahead: Vec<u8>,
    pub peer: Peer,
    /// What is spoken, where that is known; `None`: its first bytes tell.
    pub agreed: Option<Protocol>,
}

/// A client that has as many connections as it may.
pub(super) struct TooMany;

/// Counts whoever comes to a listener, from `peer` where that is known, unless a PROXY header may say that it is another; `None` where it is
/// not counted.
pub(super) fn count_peer(
    lane: &Lane,
    listener_index: usize,
    peer: Option<SocketAddr>,
) -> Result<Option<Box<Counted>>, TooMany> {
    let plan = &lane.following.current().plan;
    let is_known = plan.config.listeners[listener_index].proxy_protocol == ProxyProtocol::None;
    match peer.filter(|_| is_known) {
        Some(peer) => count_client(plan, listener_index, peer.ip()),
        None => Ok(None),
    }
}

fn count_client(
    plan: &Plan,
    listener_index: usize,
    ip: IpAddr,
) -> Result<Option<Box<Counted>>, TooMany> {
    let listener = &plan.config.listeners[listener_index];
    let ip = ip.to_canonical();
    let max = match listener.max_connections_per_client {
        // Load balancers that say of whom their requests are have connections for many.
        Some(max) if !headers::is_trusted(listener, ip) => max,
        Some(_) | None => return Ok(None),
    };
    let clients = &plan.listeners[listener_index].clients;
    match clients.count(one_client(ip, listener.ipv6_prefix), max) {
        Some(counted) => Ok(Some(Box::new(counted))),
        None => {
            debug!(listener = listener.name, peer = %ip, max, "a client has too many connections");
            plan.metrics.connections.refused_per_client.inc();
            Err(TooMany)
        }
    }
}

/// Greets whoever comes to a listener, from `peer` where that is known, as it was counted by it, and serves it until its connection ends.
pub(super) async fn greet(
    lane: &Rc<Lane>,
    listener_index: usize,
    socket: Socket,
    peer: Option<SocketAddr>,
    counted: Option<Box<Counted>>,
) {
    // Boxed, to keep the common future small.
    let meeting = Box::pin(meet(lane, listener_index, socket, peer, counted));
    let Some(guest) = meeting.await else {
        return;
    };
    http1::connection(lane, listener_index, guest).await;
}

/// What the connection is, and whose; `None` where it is not to be served.
async fn meet(
    lane: &Lane,
    listener_index: usize,
    socket: Socket,
    peer: Option<SocketAddr>,
    mut counted: Option<Box<Counted>>,
) -> Option<Guest> {
    socket.set_nodelay().ok()?;
    let view = lane.following.current();
    let listener = &view.plan.config.listeners[listener_index];
    let redirected = listener.transparent.then(|| redirected(&socket, peer));
    // Whoever reaches a Unix socket is of this machine.
    let here = IpAddr::from(Ipv4Addr::LOCALHOST);
    let mut client = peer.map(|peer| peer.ip());
    let near = client.unwrap_or(here);
    let mut ahead = Vec::new();
    let from = listener.proxy_protocol_from.as_ref();
    let is_believed = || {
        let contains = |network: &IpNet| network.contains(&near.to_canonical());
        from.is_none_or(|networks| networks.iter().any(contains))
    };
    let failed = |reason| {
        debug!(listener = listener.name, peer = %near, reason, "no PROXY header");
        let failures = &view.plan.metrics.proxy_failures;
        failures.count(&listener.name, reason);
        None
    };
    let is_required = match listener.proxy_protocol {
        ProxyProtocol::None => None,
        // What others begin with is their own.
        ProxyProtocol::Accept => is_believed().then_some(false),
        ProxyProtocol::Require if is_believed() => Some(true),
        ProxyProtocol::Require => return failed("untrusted"),
    };
    if let Some(is_required) = is_required {
        let read = read_proxy_header(lane, listener_index, &socket, is_required);
        match timeout(listener.header_read, read).await {
            Ok(Ok(announced)) => {
                client = announced.client.map(|client| client.ip()).or(client);
                ahead = announced.rest;
            }
            Ok(Err(failure)) => return failure.reason().and_then(failed),
            Err(_) if is_required => return failed("timed_out"),
            // Who need not say anything of the kind may have been about to ask.
            Err(_) => return None,
        }
    }
    if listener.proxy_protocol != ProxyProtocol::None
        && let Some(ip) = client
    {
        counted = count_client(&view.plan, listener_index, ip).ok()?;
    }
    let agreed = match listener.protocol {
        ListenerProtocol::Auto => None,
        ListenerProtocol::Http1 => Some(Protocol::Http1),
        ListenerProtocol::Http2 => Some(Protocol::Http2),
    };
    let live = &view.plan.listeners[listener_index];
    let ip = client.unwrap_or(here);
    let mut peer = Peer::new(ip, clock::old_at(listener.max_age), live.admission);
    peer.redirected = redirected.map(Box::new);
    peer.counted = counted;
    let mut guest = Guest {
        stream: Stream::Plain(socket),
        ahead,
        peer,
        agreed,
    };
    match (&listener.tls, &live.greeting) {
        (None, _) => {}
        (Some(_), Some(greeting)) => {
            // Boxed, to keep the common future small.
            guest = Box::pin(secure(lane, listener_index, greeting, guest)).await?;
        }
        // Never in plain what is to be under TLS.
        (Some(_), None) => return None,
    }
    Some(guest)
}

/// What a connection says of itself before its own bytes.
struct Announced {
    /// Whose it is, if it says so.
    client: Option<SocketAddr>,
    /// What was read and turned out to be its own already.
    rest: Vec<u8>,
}

/// Why a PROXY header was not read.
enum NoHeader {
    Bad(ProxyError),
    /// The connection was closed within it.
    Gone,
    /// Before it: health checks by TCP do that.
    Unused,
}

impl NoHeader {
    /// As metrics name it; `None` for what is no fault.
    fn reason(&self) -> Option<&'static str> {
        match self {
            NoHeader::Bad(ProxyError::Absent) => Some("absent"),
            NoHeader::Bad(ProxyError::Malformed) => Some("malformed"),
            NoHeader::Bad(ProxyError::TooLong) => Some("too_long"),
            NoHeader::Gone => Some("gone"),
            NoHeader::Unused => None,
        }
    }
}

/// Reads a PROXY header and not a byte more, so that what comes next finds its own.
async fn read_proxy_header(
    lane: &Lane,
    listener_index: usize,
    socket: &Socket,
    is_required: bool,
) -> Result<Announced, NoHeader> {
    let mut read = Vec::new();
    loop {
        let mut room = [0; 512];
        let peeked = match read.is_empty() {
            true => first_bytes(lane, listener_index, socket, &mut room).await,
            false => poll_fn(|cx| socket.poll_peek(cx, &mut room)).await,
        };
        let some = match peeked {
            Ok(some @ 1..) => some,
            Ok(0) | Err(_) if read.is_empty() => return Err(NoHeader::Unused),
            Ok(_) | Err(_) => return Err(NoHeader::Gone),
        };
        let before = read.len();
        read.extend_from_slice(&room[..some]);
        let (of_header, client) = match proxy_protocol::parse(&read) {
            Ok(Some(header)) => (header.len - before, Some(header.client)),
            Ok(None) => (some, None),
            Err(ProxyError::Absent) if !is_required => {
                // It began like one and is none.
                read.truncate(before);
                return Ok(Announced {
                    client: None,
                    rest: read,
                });
            }
            Err(error) => return Err(NoHeader::Bad(error)),
        };
        socket
            .take(&mut room[..of_header])
            .map_err(|_| NoHeader::Gone)?;
        if let Some(client) = client {
            return Ok(Announced {
                client,
                rest: Vec::new(),
            });
        }
    }
}

/// A look at what a connection begins with; nothing where it closes, or where a drain's last call is over before it has begun.
async fn first_bytes(
    lane: &Lane,
    listener_index: usize,
    socket: &Socket,
    room: &mut [u8],
) -> io::Result<usize> {
    tokio::select! {
        biased;
        peeked = poll_fn(|cx| socket.poll_peek(cx, room)) => peeked,
        () = lane.drain.last_call(listener_index) => Ok(0),
    }
}

/// Where the connection was to go.
fn redirected(socket: &Socket, peer: Option<SocketAddr>) -> Redirected {
    Redirected {
        to: socket.original_destination(),
        here: socket.local_address(),
        from: peer.map(canonical),
    }
}

/// The guest under TLS; `None` where that did not come about.
async fn secure(
    lane: &Lane,
    listener_index: usize,
    greeting: &Greeting,
    guest: Guest,
) -> Option<Guest> {
    let Stream::Plain(socket) = guest.stream else {
        return None;
    };
    let view = lane.following.current();
    let listener = &view.plan.config.listeners[listener_index];
    if !guest.ahead.is_empty() {
        // It began as a PROXY header does, and so not as TLS.
        not_secured(listener, greeting, &guest.peer, Trouble::NotTls);
        tell_of_tls(lane, listener_index, socket).await;
        return None;
    }
    let began = clock::now();
    let done = timeout(
        listener.tls_handshake,
        shake_hands(lane, listener_index, greeting, socket),
    )
    .await;
    let done = done.unwrap_or(Err(Failed::Tls(Trouble::TimedOut)));
    let stream = match done {
        Ok(stream) => stream,
        Err(Failed::Unused) => return None,
        Err(Failed::Plain(socket)) => {
            not_secured(listener, greeting, &guest.peer, Trouble::NotTls);
            tell_of_tls(lane, listener_index, socket).await;
            return None;
        }
        Err(Failed::Tls(trouble)) => {
            not_secured(listener, greeting, &guest.peer, trouble);
            return None;
        }
    };
    let (_, connection) = stream.get_ref();
    count(greeting, connection, began);
    let (facts, agreed) = greeting.tls.facts(connection);
    let mut old_at = guest.peer.old_at;
    if let Some(end) = facts.certificate.as_ref().and_then(|it| it.end) {
        // Behind the last second of it the client is to show another one, or none.
        let now = clock::moment();
        let left = (end + Duration::from_secs(1)).saturating_sub(now.wall);
        old_at = old_at.min(now.mono.saturating_add(left));
    }
    Some(Guest {
        ahead: guest.ahead,
        peer: Peer {
            tls: Some(Box::new(facts)),
            old_at,
            ..guest.peer
        },
        agreed: guest.agreed.or(agreed),
        stream: Stream::Tls(Box::new(stream.into())),
    })
}

/// Why there is no TLS with a client.
enum Failed {
    /// It went before a byte came, as health checks by TCP do.
    Unused,
    /// What it speaks is not TLS, and may be HTTP.
    Plain(Socket),
    Tls(Trouble),
}

async fn shake_hands(
    lane: &Lane,
    listener_index: usize,
    greeting: &Greeting,
    socket: Socket,
) -> Result<TlsStream<Socket>, Failed> {
    let mut first = [0];
    match first_bytes(lane, listener_index, &socket, &mut first).await {
        Ok(1..) if first[0] == HANDSHAKE => {}
        Ok(1..) => {
            return Err(Failed::Plain(socket));
        }
        Ok(0) | Err(_) => return Err(Failed::Unused),
    }
    let failed = |error| Failed::Tls(Trouble::of_handshake(&error));
    // Only who has said hello has a turn: others may wait for nothing.
    let hello = LazyConfigAcceptor::new(Acceptor::default(), socket);
    let hello = hello.await.map_err(failed)?;
    let turn = greeting.turns.acquire().await;
    let config = greeting.tls.config.clone();
    // The hello is looked at before the future is polled.
    let mut shaking = pin!(with_ends(async { hello.into_stream(config).await }));
    // weir's signature, and the most of its work. What is behind it can be dear as well: what a client's certificate proves, and all of it where a
    // client has to say hello again (HelloRetryRequest).
    if let Poll::Ready(shaken) = lane.handshakes.poll(shaking.as_mut()).await {
        return shaken.map_err(failed);
    }
    let mut shaking = pin!(lane.handshakes_begun.go_on(shaking));
    let shaken = match timeout(TURN, shaking.as_mut()).await {
        Ok(shaken) => shaken,
        Err(_) => {
            drop(turn);
            shaking.await
        }
    };
    shaken.map_err(failed)
}

fn not_secured(listener: &Listener, greeting: &Greeting, peer: &Peer, trouble: Trouble) {
    greeting.metrics.failures[trouble as usize].inc();
    debug!(listener = listener.name, peer = %peer.ip, reason = trouble.name(), "no TLS with a client");
}

fn count(greeting: &Greeting, connection: &ServerConnection, began: Instant) {
    let is_tls13 = connection.protocol_version() == Some(ProtocolVersion::TLSv1_3);
    let resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
    let took = began.elapsed();
    greeting.metrics.succeeded(is_tls13, resumed, took);
}

/// Tells who speaks plain HTTP that this is not the place, as most servers do; others read what they cannot read anyhow.
async fn tell_of_tls(lane: &Lane, listener_index: usize, socket: Socket) {
    let to = Asker {
        keep_alive: false,
        without_body: false,
        old: false,
    };
    let (mut out, mut body) = (lane.buffers.take(), lane.buffers.take());
    Rejection::PlainOnTls.put(&mut out, &mut body, to, &lane.date);
    let mut stream = Stream::Plain(socket);
    if write(&mut stream, &out).await.is_ok() {
        http1::close(lane, listener_index, &mut stream).await;
    }
}
