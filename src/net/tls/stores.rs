//! TLS towards Redis and Postgres, whose settings stay while the process runs and whose files may not: what is read of them anew holds
//! for connections from then on. Must not open any.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ClientConfig;

use super::TlsError;
use super::client::{Client, digest};
use super::public::{Public, PublicOnce};
use crate::config::tls::Tls;

/// When a store is spoken to by TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoken {
    Always,
    /// If the server can: it may have no authority to believe.
    IfOffered,
}

/// What connections to a store are made by at a time. Clones are one.
#[derive(Clone)]
pub struct Latest(Arc<ArcSwap<ClientConfig>>);

impl Latest {
    /// For the next connection.
    pub fn get(&self) -> Arc<ClientConfig> {
        self.0.load_full()
    }
}

impl fmt::Debug for Latest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Latest")
    }
}

/// TLS towards a store, as its files were when they were read.
#[derive(Debug)]
pub struct StoreTls {
    /// Where the configuration has it: `redis.tls` or `postgres.tls`.
    pub place: &'static str,
    settings: Tls,
    spoken: Spoken,
    files: [u8; 32],
    config: Arc<ClientConfig>,
    holds: Option<(String, Range<Duration>)>,
    /// Where they are believed.
    pub(super) public: Option<Arc<Public>>,
    latest: Latest,
}

impl StoreTls {
    /// Reads the files of `settings`; connections are made by them until others take effect.
    pub fn read(
        place: &'static str,
        settings: &Tls,
        spoken: Spoken,
    ) -> Result<Arc<StoreTls>, TlsError> {
        let public = PublicOnce::after(None);
        let files = digest(settings, &public)?;
        let Client {
            config,
            holds,
            public,
        } = parse(settings, spoken, &public)?;
        let config = Arc::new(config);
        Ok(Arc::new(StoreTls {
            place,
            settings: settings.clone(),
            spoken,
            files,
            latest: Latest(Arc::new(ArcSwap::new(config.clone()))),
            config,
            holds,
            public,
        }))
    }

    /// What the files hold now, for the same connections once it [takes effect](StoreTls::take_effect); itself, if they say the same.
    pub(super) fn again(self: &Arc<Self>, public: &PublicOnce) -> Result<Arc<StoreTls>, TlsError> {
        let files = digest(&self.settings, public)?;
        if files == self.files {
            return Ok(self.clone());
        }
        let Client {
            config,
            holds,
            public,
        } = parse(&self.settings, self.spoken, public)?;
        Ok(Arc::new(StoreTls {
            place: self.place,
            settings: self.settings.clone(),
            spoken: self.spoken,
            files,
            config: Arc::new(config),
            holds,
            public,
            latest: self.latest.clone(),
        }))
    }

    /// From now on connections are made by it.
    pub fn take_effect(&self) {
        self.latest.0.store(self.config.clone());
    }

    /// To be asked at each connection: it follows what takes effect.
    pub fn latest(&self) -> Latest {
        self.latest.clone()
    }

    /// The file of the certificate that the store is shown, and when that ends, since the epoch.
    pub fn holds(&self) -> Option<(String, Range<Duration>)> {
        self.holds.clone()
    }
}

fn parse(settings: &Tls, spoken: Spoken, public: &PublicOnce) -> Result<Client, TlsError> {
    match spoken {
        Spoken::Always => Client::read(settings, public),
        Spoken::IfOffered => Client::read_if_needed(settings, public),
    }
}
