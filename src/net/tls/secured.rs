//! The TLS of a whole configuration, as its files were when they were read.

use std::path::PathBuf;
use std::sync::Arc;

use super::client::ClientTls;
use super::server::ServerTls;
use crate::config::{Config, Listener, Upstream};

/// One for each listener and for each upstream, in the configuration's order; `None` for those without TLS.
#[derive(Debug, Clone, Default)]
pub struct Secured {
    pub listeners: Vec<Option<Arc<ServerTls>>>,
    pub upstreams: Vec<Option<Arc<ClientTls>>>,
}

impl Secured {
    /// Reads every file that `config` names for TLS; all or none. Sessions that listeners of `old` began are resumed, and what is of
    /// an upstream whose files say the same is taken over.
    pub fn read(config: &Config, old: &Secured) -> Result<Secured, String> {
        let listener = |(index, listener): (usize, &Listener)| {
            let Some(settings) = &listener.tls else {
                return Ok(None);
            };
            let old = old.listeners.get(index).and_then(Option::as_deref);
            ServerTls::read(settings, listener.protocol, old)
                .map(|tls| Some(Arc::new(tls)))
                .map_err(|error| format!("listener \"{}\": tls: {error}", listener.name))
        };
        let upstream = |upstream: &Upstream| {
            let Some(settings) = &upstream.tls else {
                return Ok(None);
            };
            let mut old = old.upstreams.iter().flatten();
            let old = old.find(|old| old.is_of(settings, upstream.protocol));
            ClientTls::read(settings, upstream.protocol, old)
                .map(Some)
                .map_err(|error| format!("upstream \"{}\": tls: {error}", upstream.name))
        };
        let listeners = config.listeners.iter().enumerate().map(listener);
        let upstreams = config.upstreams.iter().map(upstream);
        Ok(Secured {
            listeners: listeners.collect::<Result<_, _>>()?,
            upstreams: upstreams.collect::<Result<_, _>>()?,
        })
    }

    /// Those that it reads.
    pub fn files(config: &Config) -> Vec<PathBuf> {
        let listeners = config
            .listeners
            .iter()
            .filter_map(|listener| listener.tls.as_ref());
        let listeners = listeners.flat_map(|tls| tls.files());
        let upstreams = config
            .upstreams
            .iter()
            .filter_map(|upstream| upstream.tls.as_ref());
        let upstreams = upstreams.flat_map(|tls| tls.tls.files());
        listeners.chain(upstreams).cloned().collect()
    }
}
