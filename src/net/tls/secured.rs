//! The TLS of a whole configuration, as its files were when they were read.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::StoreTls;
use super::client::ClientTls;
use super::server::ServerTls;
use crate::config::tls::Tls;
use crate::config::{Config, Listener, Upstream};

/// One for each listener and for each upstream, in the configuration's order; `None` for those without TLS.
#[derive(Debug, Clone, Default)]
pub struct Secured {
    pub listeners: Vec<Option<Arc<ServerTls>>>,
    pub upstreams: Vec<Option<Arc<ClientTls>>>,
    /// Of Redis and Postgres, where they are spoken to by TLS: whoever opens them says so.
    pub stores: Vec<Arc<StoreTls>>,
}

impl Secured {
    /// Reads every file that `config` names for TLS, those of the stores of `old` among them; all or none. Sessions that listeners of
    /// `old` began are resumed, and what is of an upstream or a store whose files say the same is taken over.
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
            stores: old.stores_again()?,
        })
    }

    /// What the files of the stores hold now; all or none.
    pub fn stores_again(&self) -> Result<Vec<Arc<StoreTls>>, String> {
        let again = |store: &Arc<StoreTls>| {
            let again = store.again();
            again.map_err(|error| format!("{}: {error}", store.place))
        };
        self.stores.iter().map(again).collect()
    }

    /// From now on connections to stores are made by it; those of listeners and upstreams are by whoever has it.
    pub fn take_effect(&self) {
        for store in &self.stores {
            store.take_effect();
        }
    }

    /// The files of the certificates that weir shows, and when each ends, since the epoch.
    pub fn expiries(&self) -> impl Iterator<Item = (String, Duration)> {
        let listeners = self.listeners.iter().flatten();
        let upstreams = self.upstreams.iter().flatten();
        listeners
            .flat_map(|tls| tls.expiries())
            .chain(upstreams.filter_map(|tls| tls.expiry()))
            .chain(self.stores.iter().filter_map(|tls| tls.expiry()))
    }

    /// Those that it reads, of stores too.
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
        let own = listeners.chain(upstreams);
        own.cloned()
            .chain(Secured::files_of_stores(config))
            .collect()
    }

    /// Those of Redis and Postgres alone.
    pub fn files_of_stores(config: &Config) -> Vec<PathBuf> {
        let redis = config.redis.as_ref().map(|redis| &redis.tls);
        let postgres = config.postgres.as_ref().map(|postgres| &postgres.tls);
        let both = redis.into_iter().chain(postgres);
        both.flat_map(Tls::files).cloned().collect()
    }
}
