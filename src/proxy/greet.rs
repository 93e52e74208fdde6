//! What comes before HTTP on a client's connection: who is at its other end, and what carries its bytes. Must not read HTTP.

use std::net::SocketAddr;
use std::rc::Rc;

use tokio::net::TcpStream;

use super::handle::{self, Peer};
use super::lane::Lane;
use crate::net::stream::Stream;
use crate::net::tls::Protocol;

/// A connection that is ready for HTTP.
pub(super) struct Guest {
    pub stream: Stream,
    pub peer: Peer,
    /// What both ends agreed on by ALPN; `None`: its first bytes tell.
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
    let guest = Guest {
        stream: client.into(),
        peer: Peer::new(peer.ip()),
        agreed: None,
    };
    handle::connection(lane, listener_index, guest).await;
}
