//! Listeners as they are shown.

use std::path::Path;

use serde::Serialize;

use super::redis::Certificate;
use super::texts;
use crate::config::listeners::{self, Address, ListenerProtocol, ProxyProtocol};
use crate::config::raw;
use crate::config::tls::{self, ClientAuth, Version};
use crate::config::units::{ByteSize, FileMode, Span};

#[derive(Serialize)]
pub(super) struct Listener<'c> {
    name: &'c str,
    address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket_mode: Option<FileMode>,
    protocol: ListenerProtocol,
    proxy_protocol: ProxyProtocol,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy_protocol_from: Option<Vec<String>>,
    transparent: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<ListenerTls<'c>>,
    client_ip: ClientIp,
    limits: HeadAndBody,
    timeouts: Timeouts,
}

#[derive(Serialize)]
struct ClientIp {
    trusted_proxies: Vec<String>,
    ipv6_prefix: u8,
    trust_client_cert: bool,
}

#[derive(Serialize)]
struct HeadAndBody {
    max_connections: usize,
    max_header_bytes: ByteSize,
    max_headers: usize,
    max_body: ByteSize,
    max_concurrent_streams: u32,
    max_handshakes: usize,
}

#[derive(Serialize)]
struct Timeouts {
    header_read: Span,
    request_read: Span,
    keep_alive: Span,
    stream_idle: Span,
    tls_handshake: Span,
}

impl<'c> Listener<'c> {
    pub(super) fn new(listener: &'c listeners::Listener) -> Listener<'c> {
        let head = &listener.head_limits;
        Listener {
            name: &listener.name,
            address: listener.address.to_string(),
            socket_mode: match &listener.address {
                Address::Tcp(_) => None,
                Address::Unix(_) => Some(FileMode(listener.socket_mode)),
            },
            protocol: listener.protocol,
            proxy_protocol: listener.proxy_protocol,
            proxy_protocol_from: listener.proxy_protocol_from.as_deref().map(texts),
            transparent: listener.transparent,
            tls: listener.tls.as_ref().map(ListenerTls::new),
            client_ip: ClientIp {
                trusted_proxies: texts(&listener.trusted_proxies),
                ipv6_prefix: listener.ipv6_prefix,
                trust_client_cert: listener.trust_client_cert,
            },
            limits: HeadAndBody {
                max_connections: listener.max_connections,
                max_header_bytes: ByteSize(head.max_bytes as u64),
                max_headers: head.max_fields,
                max_body: ByteSize(listener.max_body),
                max_concurrent_streams: listener.max_concurrent_streams,
                max_handshakes: listener.max_handshakes,
            },
            timeouts: Timeouts {
                header_read: Span(listener.header_read),
                request_read: Span(listener.request_read),
                keep_alive: Span(listener.keep_alive),
                stream_idle: Span(listener.stream_idle),
                tls_handshake: Span(listener.tls_handshake),
            },
        }
    }
}

#[derive(Serialize)]
struct ListenerTls<'c> {
    certificates: Vec<Certificate<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_ca: Option<&'c Path>,
    client_auth: raw::ClientAuth,
    min_version: Version,
}

impl<'c> ListenerTls<'c> {
    fn new(tls: &'c tls::ListenerTls) -> ListenerTls<'c> {
        let (client_auth, client_ca) = match &tls.client_auth {
            ClientAuth::None => (raw::ClientAuth::None, None),
            ClientAuth::Optional(ca) => (raw::ClientAuth::Optional, Some(ca.as_path())),
            ClientAuth::Required(ca) => (raw::ClientAuth::Required, Some(ca.as_path())),
        };
        ListenerTls {
            certificates: tls.certificates.iter().map(Certificate::new).collect(),
            client_ca,
            client_auth,
            min_version: tls.min_version,
        }
    }
}
