//! The one place where connections to upstreams are opened.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::net::stream::Stream;

/// Where an endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `HOST:PORT`, resolved by the system at each connect, which tries all addresses.
    Name(String),
    Address(SocketAddr),
}

impl Target {
    /// Of `HOST:PORT` or `IP:PORT`.
    pub fn new(place: &str) -> Target {
        match place.parse() {
            Ok(address) => Target::Address(address),
            Err(_) => Target::Name(place.to_owned()),
        }
    }
}

/// A new connection; an error of kind `TimedOut` where there is none in time.
pub async fn connect(target: &Target, within: Duration) -> io::Result<Stream> {
    let connecting = async {
        match target {
            Target::Name(name) => TcpStream::connect(name).await,
            Target::Address(address) => TcpStream::connect(address).await,
        }
    };
    let stream = timeout(within, connecting).await??;
    stream.set_nodelay(true)?;
    Ok(stream.into())
}
