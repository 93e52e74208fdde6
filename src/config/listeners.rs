//! Listeners, checked: where clients come in, by what protocol, whom they are believed to be, and how much and how long.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

pub use super::raw::{ListenerProtocol, ProxyProtocol};
use super::tls::ListenerTls;
use crate::http1::head::HeadLimits;

/// Where a listener is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    /// A Unix socket at this path.
    Unix(PathBuf),
}

/// `IP:PORT` or `unix:PATH`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(f, "{address}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Where clients connect, and what they may send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    pub name: String,
    pub address: Address,
    /// Of the file, where the address is one.
    pub socket_mode: u32,
    pub proxy_protocol: ProxyProtocol,
    /// Whose PROXY headers are believed; `None`: everyone's.
    pub proxy_protocol_from: Option<Vec<IpNet>>,
    /// Whether requests go where their connections were to go before they were redirected here.
    pub transparent: bool,
    pub protocol: ListenerProtocol,
    /// `None`: connections are plain.
    pub tls: Option<ListenerTls>,
    pub head_limits: HeadLimits,
    /// Connections open at a time; those beyond are closed at once.
    pub max_connections: usize,
    /// Likewise, of one client's address; `None`: no other bound.
    pub max_connections_per_client: Option<usize>,
    /// A request body's size in bytes.
    pub max_body: u64,
    /// Requests under way on one connection of HTTP/2.
    pub max_concurrent_streams: u32,
    /// TLS handshakes under way at a time; those beyond wait.
    pub max_handshakes: usize,
    /// For a head to be whole once its first byte is here.
    pub header_read: Duration,
    /// For a body to be whole once its head is here.
    pub request_read: Duration,
    /// For a connection without a request.
    pub keep_alive: Duration,
    /// Of a connection: an older one ends behind its next answer.
    pub max_age: Duration,
    /// For a body, or a switched connection, on which nothing moves.
    pub stream_idle: Duration,
    /// For a TLS handshake, from the connection on.
    pub tls_handshake: Duration,
    /// Whose X-Forwarded-For is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether their X-Forwarded-Client-Cert goes on.
    pub trust_client_cert: bool,
    /// Bits by which limits and `max_connections_per_client` tell clients with IPv6 addresses apart.
    pub ipv6_prefix: u8,
}
