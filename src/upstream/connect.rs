//! The one place where connections to upstreams are opened.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::time::timeout;

use super::reach::{Stage, no_address, too_late};
use crate::net::stream::{Socket, Stream};
use crate::net::tls::client::{ClientTls, Offer};
use crate::net::{descriptors, names};

/// Where an endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// All of whose addresses are tried.
    Name(String, u16),
    Address(SocketAddr),
    Unix(PathBuf),
}

impl Target {
    /// Of `HOST:PORT`, `IP:PORT` or `unix:PATH`.
    pub fn new(place: &str) -> Target {
        match (place.strip_prefix("unix:"), place.parse()) {
            (Some(path), _) => Target::Unix(path.into()),
            (None, Ok(address)) => Target::Address(address),
            (None, Err(_)) => {
                let (host, port) = place.rsplit_once(':').unwrap_or((place, ""));
                Target::Name(host.to_owned(), port.parse().unwrap_or_default())
            }
        }
    }
}

/// How an endpoint is spoken to.
#[derive(Debug, Clone, Copy)]
pub enum Way<'t> {
    Plain,
    /// Under TLS, with an endpoint of this name.
    Tls(&'t ClientTls, &'t str, Offer),
    /// Under TLS, of which no files were read: never in plain, then.
    Nowhere,
}

impl<'t> Way<'t> {
    /// `is_tls`: whether the file wants TLS.
    pub fn new(is_tls: bool, tls: Option<&'t ClientTls>, name: &'t str, offer: Offer) -> Way<'t> {
        match (is_tls, tls) {
            (false, _) => Way::Plain,
            (true, Some(tls)) => Way::Tls(tls, name, offer),
            (true, None) => Way::Nowhere,
        }
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy)]
pub enum Purpose {
    /// Of which there may be many: the last [descriptors] are left to others.
    Requests,
    Check,
}

impl Purpose {
    /// Whether it may have this descriptor.
    fn permits(self, socket: impl AsFd) -> io::Result<()> {
        match self {
            Purpose::Requests => descriptors::spare(socket),
            Purpose::Check => Ok(()),
        }
    }
}

/// A new connection, after its handshake where there is one; an error of kind `TimedOut` where there is none in time.
pub async fn connect(
    target: &Target,
    way: Way<'_>,
    purpose: Purpose,
    within: Duration,
) -> io::Result<Stream> {
    let open = |address| open(address, purpose);
    let mut stage = Stage::Connection;
    let connecting = async {
        let socket = match target {
            Target::Name(host, port) => {
                stage = Stage::Name;
                let found = names::find(host).await;
                let found = found.map_err(|error| no_address(&error))?;
                stage = Stage::Connection;
                Socket::from(found.connect(*port, open).await?)
            }
            Target::Address(address) => Socket::from(open(*address).await?),
            Target::Unix(path) => {
                // The kernel says at once what comes of it.
                let socket = UnixStream::connect(path).await?;
                purpose.permits(&socket)?;
                Socket::from(socket)
            }
        };
        socket.set_nodelay()?;
        socket.keep_alive()?;
        match way {
            Way::Plain => Ok(Stream::Plain(socket)),
            // Boxed, to keep the common future small.
            Way::Tls(tls, name, offer) => Box::pin(tls.shake_hands(socket, name, offer)).await,
            Way::Nowhere => Err(io::ErrorKind::Unsupported.into()),
        }
    };
    let connected = timeout(within, connecting).await;
    connected.unwrap_or_else(|_| Err(too_late(stage, within)))
}

async fn open(address: SocketAddr, purpose: Purpose) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // Before it waits: where nobody answers it has its descriptor until it is given up.
    purpose.permits(&socket)?;
    socket.connect(address).await
}
