//! The TLS of a whole configuration, as its files were when they were read. Must not watch them: `cli::watched_files` does.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tracing::error;

use super::client::ClientTls;
use super::pem::not_now;
use super::public::PublicOnce;
use super::server::ServerTls;
use super::{StoreTls, TlsError};
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
    /// `old` began are resumed, and what is of an upstream or a store whose files say the same is taken over. The system's authorities are no
    /// file of it: where they cannot be read those of `old` stay, which the log is told.
    pub fn read(config: &Config, old: &Secured) -> Result<Secured, String> {
        let public = old.public_again();
        let listener = |(index, listener): (usize, &Listener)| {
            let Some(settings) = &listener.tls else {
                return Ok(None);
            };
            let old = old.listeners.get(index).and_then(Option::as_deref);
            ServerTls::read(settings, listener.protocol, old)
                .map(|tls| Some(Arc::new(tls)))
                .map_err(|error| of_listener(listener, &error))
        };
        let upstream = |upstream: &Upstream| {
            let Some(settings) = &upstream.tls else {
                return Ok(None);
            };
            let mut old = old.upstreams.iter().flatten();
            let old = old.find(|old| old.is_of(settings, upstream.protocol));
            ClientTls::read(settings, upstream.protocol, &public, old)
                .map(Some)
                .map_err(|error| of_upstream(upstream, &error))
        };
        let store = |store: &Arc<StoreTls>| {
            let again = store.again(&public);
            again.map_err(|error| of_store(store, &error))
        };
        let listeners = config.listeners.iter().enumerate().map(listener);
        let upstreams = config.upstreams.iter().map(upstream);
        let read = Secured {
            listeners: listeners.collect::<Result<_, _>>()?,
            upstreams: upstreams.collect::<Result<_, _>>()?,
            stores: old.stores.iter().map(store).collect::<Result<_, _>>()?,
        };
        if let Some(error) = public.error() {
            let error = of_public(error);
            error!(%error, "certificates not reloaded, those before stay");
        }
        Ok(read)
    }

    /// Whether upstreams and stores are believed by the same authorities as by `other`, and shown the same.
    pub fn believes_as(&self, other: &Secured) -> bool {
        fn at(tls: &Option<Arc<ClientTls>>) -> Option<*const ClientTls> {
            tls.as_ref().map(Arc::as_ptr)
        }
        let upstreams = self.upstreams.iter().map(at);
        let stores = self.stores.iter().map(Arc::as_ptr);
        upstreams.eq(other.upstreams.iter().map(at))
            && stores.eq(other.stores.iter().map(Arc::as_ptr))
    }

    /// What the files of `config` hold now, which it was read by; and what of them cannot be used. That leaves what was read before, each by
    /// itself: a certificate of a listener, or whose clients it lets in; an upstream; a store; the system's authorities.
    pub fn renewed(&self, config: &Config) -> (Secured, Vec<String>) {
        let mut wrong = Vec::new();
        let public = self.public_again();
        let listeners = config.listeners.iter().zip(&self.listeners);
        let listeners = listeners.map(|(listener, before)| {
            let (Some(settings), Some(before)) = (&listener.tls, before) else {
                return None;
            };
            let (renewed, errors) = before.renewed(settings, listener.protocol);
            wrong.extend(errors.iter().map(|error| of_listener(listener, error)));
            Some(renewed.map_or_else(|| before.clone(), Arc::new))
        });
        let listeners = listeners.collect();
        let upstreams = config.upstreams.iter().zip(&self.upstreams);
        let upstreams = upstreams.map(|(upstream, before)| {
            let (Some(settings), Some(before)) = (&upstream.tls, before) else {
                return None;
            };
            let renewed = ClientTls::read(settings, upstream.protocol, &public, Some(before));
            Some(renewed.unwrap_or_else(|error| {
                wrong.push(of_upstream(upstream, &error));
                before.clone()
            }))
        });
        let upstreams = upstreams.collect();
        let stores = self.stores.iter().map(|before| {
            before.again(&public).unwrap_or_else(|error| {
                wrong.push(of_store(before, &error));
                before.clone()
            })
        });
        let renewed = Secured {
            listeners,
            upstreams,
            stores: stores.collect(),
        };
        wrong.extend(public.error().map(of_public));
        (renewed, wrong)
    }

    /// The system's authorities as they are now, for all that believe them.
    fn public_again(&self) -> PublicOnce {
        let upstreams = self.upstreams.iter().flatten().map(|tls| &tls.public);
        let stores = self.stores.iter().map(|tls| &tls.public);
        PublicOnce::after(upstreams.chain(stores).flatten().next().cloned())
    }

    /// From now on connections to stores are made by it; those of listeners and upstreams are by whoever has it.
    pub fn take_effect(&self) {
        for store in &self.stores {
            store.take_effect();
        }
    }

    /// The files of the certificates that weir shows, and from when till when each holds, since the epoch.
    pub fn certificates(&self) -> impl Iterator<Item = (String, Range<Duration>)> {
        let listeners = self.listeners.iter().flatten();
        let upstreams = self.upstreams.iter().flatten();
        listeners
            .flat_map(|tls| tls.certificates())
            .chain(upstreams.filter_map(|tls| tls.holds()))
            .chain(self.stores.iter().filter_map(|tls| tls.holds()))
    }

    /// What is to be said of those that do not hold `now`, since the epoch, each with its file.
    pub fn out_of_date(&self, now: Duration) -> impl Iterator<Item = (String, String)> {
        let said = move |(file, holds)| Some((file, not_now(&holds, now)?));
        self.certificates().filter_map(said)
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

fn of_listener(listener: &Listener, error: &TlsError) -> String {
    format!("listener \"{}\": tls: {error}", listener.name)
}

fn of_upstream(upstream: &Upstream, error: &TlsError) -> String {
    format!("upstream \"{}\": tls: {error}", upstream.name)
}

fn of_store(store: &StoreTls, error: &TlsError) -> String {
    format!("{}: {error}", store.place)
}

fn of_public(error: &str) -> String {
    format!("public authorities: {error}; send a SIGHUP once they can be read")
}
