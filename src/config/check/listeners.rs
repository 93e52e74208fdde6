//! Listeners, from the file as written to [`Listener`]s.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use ipnet::IpNet;

use super::{Checker, SECOND, span};
use crate::config::Listener;
use crate::config::raw;
use crate::config::units::ByteSize;
use crate::config::yaml::At;
use crate::http1::head::HeadLimits;

impl Checker {
    pub(super) fn listeners(
        &mut self,
        short: Option<At<String>>,
        long: Option<At<Vec<At<raw::Listener>>>>,
    ) -> Vec<Listener> {
        let mut listeners = Vec::new();
        if let Some(at) = short {
            let address = self.address("listen", at);
            listeners.push(listener(
                "inbound".to_owned(),
                address,
                Vec::new(),
                None,
                None,
            ));
        }
        for (index, at) in long
            .and_then(|at| at.value)
            .unwrap_or_default()
            .into_iter()
            .enumerate()
        {
            let Some(raw) = at.value else { continue };
            let address = self.address(&format!("listeners[{index}].address"), raw.address);
            let name = raw
                .name
                .and_then(|at| at.value)
                .unwrap_or_else(|| format!("listener-{index}"));
            if listeners.iter().any(|other: &Listener| other.name == name) {
                let message =
                    format!("name \"{name}\" is taken by an earlier listener: use another");
                self.say(
                    &format!("listeners[{index}].name"),
                    at.line,
                    at.column,
                    message,
                );
            }
            let (limits, timeouts) = (
                raw.limits.and_then(|at| at.value),
                raw.timeouts.and_then(|at| at.value),
            );
            let path = format!("listeners[{index}].client_ip.trusted_proxies");
            let trusted = raw
                .client_ip
                .and_then(|at| at.value)
                .map(|raw| self.networks(&path, raw.trusted_proxies));
            listeners.push(listener(
                name,
                address,
                trusted.unwrap_or_default(),
                limits,
                timeouts,
            ));
        }
        if listeners.is_empty() {
            self.say(
                "listen",
                1,
                1,
                "no listener: add \"listen: 0.0.0.0:8080\"".to_owned(),
            );
        }
        listeners
    }
}

fn listener(
    name: String,
    address: SocketAddr,
    trusted_proxies: Vec<IpNet>,
    limits: Option<raw::Limits>,
    timeouts: Option<raw::Timeouts>,
) -> Listener {
    let (max_connections, max_header_bytes, max_headers, max_body, max_streams) =
        limits.map_or((None, None, None, None, None), |raw| {
            (
                raw.max_connections,
                raw.max_header_bytes,
                raw.max_headers,
                raw.max_body,
                raw.max_concurrent_streams,
            )
        });
    let (header_read, request_read, keep_alive, stream_idle) =
        timeouts.map_or((None, None, None, None), |raw| {
            (
                raw.header_read,
                raw.request_read,
                raw.keep_alive,
                raw.stream_idle,
            )
        });
    let size = |at: Option<At<ByteSize>>, default: u64| {
        at.and_then(|at| at.value).map_or(default, |size| size.0)
    };
    let defaults = HeadLimits::default();
    Listener {
        name,
        address,
        head_limits: HeadLimits {
            max_bytes: usize::try_from(size(max_header_bytes, defaults.max_bytes as u64))
                .unwrap_or(usize::MAX),
            max_fields: max_headers
                .and_then(|at| at.value)
                .map_or(defaults.max_fields, usize::from),
        },
        max_connections: max_connections
            .and_then(|at| at.value)
            .map_or(10_000, |max| max as usize),
        max_body: size(max_body, 10 << 20),
        max_concurrent_streams: max_streams
            .and_then(|at| at.value)
            .map_or(128, NonZeroU32::get),
        header_read: span(header_read, 10 * SECOND),
        request_read: span(request_read, 60 * SECOND),
        keep_alive: span(keep_alive, 60 * SECOND),
        stream_idle: span(stream_idle, 300 * SECOND),
        trusted_proxies,
    }
}
