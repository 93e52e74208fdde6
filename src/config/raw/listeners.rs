//! Listeners as they are written.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Certificate;
use crate::config::units::{ByteSize, FileMode, TimeLength};
use crate::config::yaml::At;

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Listener {
    pub name: Option<At<String>>,
    /// For example `0.0.0.0:8080`, or `unix:/run/weir/in.sock`.
    pub address: At<String>,
    /// Of the file of a Unix socket, as chmod takes it [default: "660"].
    pub socket_mode: Option<At<FileMode>>,
    /// [default: auto]
    pub protocol: Option<At<ListenerProtocol>>,
    /// Whether connections begin with a PROXY header, of version 1 or 2, whose client is believed [default: none].
    pub proxy_protocol: Option<At<ProxyProtocol>>,
    /// Networks whose PROXY headers are believed [default: all].
    pub proxy_protocol_from: Option<At<Vec<At<String>>>>,
    /// Whether requests go where their connections were to go before iptables or nftables redirected them here [default: false].
    pub transparent: Option<At<bool>>,
    /// Absent: connections are plain.
    pub tls: Option<At<ListenerTls>>,
    pub client_ip: Option<At<ClientIp>>,
    pub limits: Option<At<Limits>>,
    pub timeouts: Option<At<Timeouts>>,
}

impl Listener {
    /// One that the file says no more of.
    pub fn at(address: At<String>) -> Listener {
        Listener {
            name: None,
            address,
            socket_mode: None,
            protocol: None,
            proxy_protocol: None,
            proxy_protocol_from: None,
            transparent: None,
            tls: None,
            client_ip: None,
            limits: None,
            timeouts: None,
        }
    }
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ClientIp {
    /// Networks whose X-Forwarded-For is believed, walked from the right [default: none].
    #[serde(default)]
    pub trusted_proxies: Vec<At<String>>,
    /// Bits by which limits and max_connections_per_client tell clients with IPv6 addresses apart, 1 to 128: one client has as many addresses of its network as it likes [default: 64].
    pub ipv6_prefix: Option<At<u8>>,
    /// Whether the X-Forwarded-Client-Cert of `trusted_proxies` goes on; it is dropped otherwise, as everyone's is [default: false].
    pub trust_client_cert: Option<At<bool>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Limits {
    /// The request line and all fields [default: 64KiB].
    pub max_header_bytes: Option<At<ByteSize>>,
    /// [default: 100]
    pub max_headers: Option<At<u16>>,
    /// Connections open at a time; one beyond takes the place of the one that has been idle for longest, or is closed [default: 10000].
    pub max_connections: Option<At<u32>>,
    /// Connections open at a time from one address, or `ipv6_prefix` of it, unless that is one of `trusted_proxies`; one beyond is closed [default: no such bound].
    pub max_connections_per_client: Option<At<u32>>,
    /// [default: 10MiB]
    pub max_body: Option<At<ByteSize>>,
    /// Requests under way on one connection of HTTP/2 [default: 128].
    pub max_concurrent_streams: Option<At<NonZeroU32>>,
    /// TLS handshakes under way at a time; those beyond wait their turn [default: 1000].
    pub max_handshakes: Option<At<NonZeroU32>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Timeouts {
    /// For a request's head to be whole once its first byte is here [default: 10s].
    pub header_read: Option<At<TimeLength>>,
    /// For a request's body to be whole once its head is here [default: 60s].
    pub request_read: Option<At<TimeLength>>,
    /// For a connection without a request [default: 75s].
    pub keep_alive: Option<At<TimeLength>>,
    /// Of a connection, less up to a tenth by chance: an older one ends behind its next answer [default: 1h].
    pub max_age: Option<At<TimeLength>>,
    /// For a body, or a switched connection (WebSocket), on which nothing moves [default: 5m].
    pub stream_idle: Option<At<TimeLength>>,
    /// For a TLS handshake, from the connection on [default: 10s].
    pub tls_handshake: Option<At<TimeLength>>,
}

/// What clients speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ListenerProtocol {
    /// Both; under TLS by what both ends agree on, otherwise by what the client begins with.
    #[default]
    Auto,
    Http1,
    Http2,
}

/// What of the PROXY protocol is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    #[default]
    None,
    /// A header, where there is one.
    Accept,
    /// A connection without one is closed.
    Require,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ListenerTls {
    /// Chosen by the name that a client asks for; the first where none has it.
    pub certificates: At<Vec<At<Certificate>>>,
    /// The authorities that clients' certificates are believed from, a PEM file.
    pub client_ca: Option<At<String>>,
    /// [default: required with client_ca, none without]
    pub client_auth: Option<At<ClientAuth>>,
    /// [default: 1.2]
    pub min_version: Option<At<TlsVersion>>,
}

/// Whether clients show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClientAuth {
    Required,
    /// They may; a wrong one ends the handshake.
    Optional,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
pub enum TlsVersion {
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    #[serde(rename = "1.3")]
    Tls13,
}
