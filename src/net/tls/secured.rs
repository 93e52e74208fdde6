//! The TLS of a whole configuration, as its files were when they were read.

use std::path::PathBuf;
use std::sync::Arc;

use super::server::ServerTls;
use crate::config::{Config, Listener};

/// One for each listener, in the configuration's order; `None` for those without TLS.
#[derive(Debug, Clone, Default)]
pub struct Secured {
    pub listeners: Vec<Option<Arc<ServerTls>>>,
}

impl Secured {
    /// Reads every file that `config` names for TLS; all or none. Sessions that listeners of `old` began are resumed.
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
        let listeners = config.listeners.iter().enumerate().map(listener);
        Ok(Secured {
            listeners: listeners.collect::<Result<_, _>>()?,
        })
    }

    /// Those that it reads.
    pub fn files(config: &Config) -> Vec<PathBuf> {
        let listeners = config
            .listeners
            .iter()
            .filter_map(|listener| listener.tls.as_ref());
        listeners.flat_map(|tls| tls.files()).cloned().collect()
    }
}
