//! Listeners as the file spells them.

use super::redis::certificate;
use super::shown::{Keys, texts};
use crate::config::listeners::{Address, Listener};
use crate::config::raw;
use crate::config::tls::{ClientAuth, ListenerTls};
use crate::config::units::{ByteSize, FileMode};

pub(super) fn listener(listener: &Listener) -> Keys {
    let head = &listener.head_limits;
    let is_file = matches!(listener.address, Address::Unix(_));
    let from = listener.proxy_protocol_from.as_deref();
    Keys::new()
        .key("name", &listener.name)
        .key("address", listener.address.to_string())
        .key(
            "socket_mode",
            is_file.then_some(FileMode(listener.socket_mode)),
        )
        .key("protocol", listener.protocol)
        .key("proxy_protocol", listener.proxy_protocol)
        .key("proxy_protocol_from", from.map(texts))
        .key("transparent", listener.transparent)
        .key("tls", listener.tls.as_ref().map(tls))
        .key(
            "client_ip",
            Keys::new()
                .key("trusted_proxies", texts(&listener.trusted_proxies))
                .key("ipv6_prefix", listener.ipv6_prefix)
                .key("trust_client_cert", listener.trust_client_cert),
        )
        .key(
            "limits",
            Keys::new()
                .key("max_connections", listener.max_connections)
                .key(
                    "max_connections_per_client",
                    listener.max_connections_per_client,
                )
                .key("max_header_bytes", ByteSize(head.max_bytes as u64))
                .key("max_headers", head.max_fields)
                .key("max_body", ByteSize(listener.max_body))
                .key("max_concurrent_streams", listener.max_concurrent_streams)
                .key("max_handshakes", listener.max_handshakes),
        )
        .key(
            "timeouts",
            Keys::new()
                .key("header_read", listener.header_read)
                .key("request_read", listener.request_read)
                .key("keep_alive", listener.keep_alive)
                .key("max_age", listener.max_age)
                .key("stream_idle", listener.stream_idle)
                .key("tls_handshake", listener.tls_handshake),
        )
}

fn tls(tls: &ListenerTls) -> Keys {
    let (client_auth, client_ca) = match &tls.client_auth {
        ClientAuth::None => (raw::ClientAuth::None, None),
        ClientAuth::Optional(ca) => (raw::ClientAuth::Optional, Some(ca.as_path())),
        ClientAuth::Required(ca) => (raw::ClientAuth::Required, Some(ca.as_path())),
    };
    Keys::new()
        .key("certificates", super::each(&tls.certificates, certificate))
        .key("client_ca", client_ca)
        .key("client_auth", client_auth)
        .key("min_version", tls.min_version)
}
