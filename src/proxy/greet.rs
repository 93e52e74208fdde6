//! What comes before HTTP on a client's connection: who is at its other end, and what carries its bytes. Must not read HTTP.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use rustls::ProtocolVersion;
use rustls::server::Acceptor;
use rustls::{HandshakeKind, ServerConnection};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::handle::{self, Peer};
use super::lane::Lane;
use super::reply::{Asker, Rejection};
use super::wire::write;
use crate::clock;
use crate::config::Listener;
use crate::config::listeners::ListenerProtocol;
use crate::net::stream::{Socket, Stream};
use crate::net::tls::{Protocol, Trouble};
use crate::plan::Greeting;

/// What each record of a handshake begins with (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;

/// A connection that is ready for HTTP.
pub(super) struct Guest {
    pub stream: Stream,
    pub peer: Peer,
    /// What is spoken, where that is known; `None`: its first bytes tell.
    pub agreed: Option<Protocol>,
}

/// Greets whoever comes to a listener, and serves it until its connection ends.
pub(super) async fn greet(
    lane: &Rc<Lane>,
    listener_index: usize,
    client: TcpStream,
    peer: SocketAddr,
) {
    if client.set_nodelay(true).is_err() {
        return;
    }
    let plan = lane.plan.current();
    let listener = &plan.shared.config.listeners[listener_index];
    let agreed = match listener.protocol {
        ListenerProtocol::Auto => None,
        ListenerProtocol::Http1 => Some(Protocol::Http1),
        ListenerProtocol::Http2 => Some(Protocol::Http2),
    };
    let mut guest = Guest {
        stream: client.into(),
        peer: Peer::new(peer.ip()),
        agreed,
    };
    match (&listener.tls, &plan.shared.greetings[listener_index]) {
        (None, _) => {}
        (Some(_), Some(greeting)) => {
            // Apart, so that plain connections have no room for it.
            match Box::pin(secure(lane, listener, greeting, guest)).await {
                Some(secured) => guest = secured,
                None => return,
            }
        }
        // Never in plain what is to be under TLS.
        (Some(_), None) => return,
    }
    drop(plan);
    handle::connection(lane, listener_index, guest).await;
}

/// The guest under TLS; `None` where that did not come about.
async fn secure(
    lane: &Lane,
    listener: &Listener,
    greeting: &Greeting,
    guest: Guest,
) -> Option<Guest> {
    let Stream::Plain(socket) = guest.stream else {
        return None;
    };
    let began = clock::now();
    let done = timeout(listener.tls_handshake, shake_hands(lane, greeting, socket)).await;
    let done = done.unwrap_or(Err(Some(Trouble::TimedOut)));
    let stream = match done {
        Ok(stream) => stream,
        Err(trouble) => {
            if let Some(trouble) = trouble {
                greeting.metrics.failures[trouble as usize].inc();
            }
            return None;
        }
    };
    let (_, connection) = stream.get_ref();
    count(greeting, connection, began);
    let (facts, agreed) = greeting.tls.facts(connection);
    Some(Guest {
        peer: Peer {
            tls: Some(Box::new(facts)),
            ..guest.peer
        },
        agreed: guest.agreed.or(agreed),
        stream: Stream::Tls(Box::new(stream.into())),
    })
}

/// The handshake; `None` for the trouble with one who went before a byte came, as health checks by TCP do.
async fn shake_hands(
    lane: &Lane,
    greeting: &Greeting,
    socket: Socket,
) -> Result<TlsStream<Socket>, Option<Trouble>> {
    let mut first = [0];
    match poll_fn(|cx| socket.poll_peek(cx, &mut first)).await {
        Ok(1..) if first[0] == HANDSHAKE => {}
        Ok(1..) => {
            tell_of_tls(lane, socket).await;
            return Err(Some(Trouble::NotTls));
        }
        Ok(0) | Err(_) => return Err(None),
    }
    let failed = |error| Some(Trouble::of_handshake(&error));
    // Only who has said hello has a turn: others may wait for nothing.
    let hello = LazyConfigAcceptor::new(Acceptor::default(), socket);
    let hello = hello.await.map_err(failed)?;
    let _turn = greeting.turns.acquire().await;
    let config = greeting.tls.config.clone();
    hello.into_stream(config).await.map_err(failed)
}

fn count(greeting: &Greeting, connection: &ServerConnection, began: Instant) {
    let is_tls13 = connection.protocol_version() == Some(ProtocolVersion::TLSv1_3);
    let resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
    let took = began.elapsed();
    greeting.metrics.succeeded(is_tls13, resumed, took);
}

/// Tells who speaks plain HTTP that this is not the place, as most servers do; others read what they cannot read anyhow.
async fn tell_of_tls(lane: &Lane, socket: Socket) {
    let to = Asker {
        keep_alive: false,
        by_head: false,
        old: false,
    };
    let (mut out, mut body) = (lane.buffers.take(), lane.buffers.take());
    Rejection::PlainOnTls.put(&mut out, &mut body, to, &lane.date);
    let mut stream = Stream::Plain(socket);
    if write(&mut stream, &out).await.is_ok() {
        handle::close(&mut stream).await;
    }
}
