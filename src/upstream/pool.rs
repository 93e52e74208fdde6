//! One lane's connections to one endpoint: idle ones kept by the lane that made them, so that no lock is needed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::caps::{Caps, Full, Place};
use super::connect::{Way, connect};
use super::endpoints::Endpoint;
use super::http2::{self, Multiplexed};
use super::ours::Ours;
use crate::clock;
use crate::config::Upstream;
use crate::net::stream::Stream;
use crate::net::tls::Trouble;
use crate::net::tls::client::ClientTls;

/// Connections to one endpoint that a lane keeps between requests.
const MAX_IDLE: usize = 1024;

/// One lane's connections to one endpoint.
#[derive(Debug)]
pub struct Pool {
    pub endpoint: Arc<Endpoint>,
    /// Whether its connections are under TLS.
    pub is_secure: bool,
    /// Whether its endpoint is where connections of clients were to go, so that weir's own might come back.
    pub(super) is_original: bool,
    tls: Option<Arc<ClientTls>>,
    connect_timeout: Duration,
    idle_timeout: Duration,
    caps: Option<Arc<Caps>>,
    /// With when each was given back, the oldest first.
    idle: RefCell<VecDeque<(Instant, Connected)>>,
    multiplexed: Multiplexed,
}

/// A connection, and whether it served a request before: then the upstream may have closed it unseen.
#[derive(Debug)]
pub struct Connected {
    pub stream: Stream,
    pub reused: bool,
    /// Where connections are capped.
    pub(super) place: Option<Place>,
    /// Where it might come back.
    pub(super) ours: Option<Ours>,
}

/// Why there is no connection.
#[derive(Debug)]
pub enum Unreached {
    Failed,
    TimedOut,
    /// There is no TLS with it.
    Insecure(Trouble),
    /// As many are open as may be.
    Full,
}

impl Pool {
    pub(super) fn new(
        endpoint: Arc<Endpoint>,
        settings: &Upstream,
        tls: Option<Arc<ClientTls>>,
        caps: Option<Arc<Caps>>,
    ) -> Pool {
        Pool {
            endpoint,
            is_secure: settings.tls.is_some(),
            is_original: false,
            tls,
            connect_timeout: settings.connect_timeout,
            idle_timeout: settings.idle_timeout,
            caps,
            idle: RefCell::default(),
            multiplexed: Multiplexed::default(),
        }
    }

    /// The connection given back last that is still open, or a new one. Unless the request `can_repeat`, the kernel is asked
    /// whether it is open; otherwise it is enough that nothing was heard of its end.
    pub async fn take(&self, can_repeat: bool) -> Result<Connected, Unreached> {
        loop {
            let Some((since, mut connected)) = self.idle.borrow_mut().pop_back() else {
                break;
            };
            // Its own idle time must end before the upstream's, or a request could meet the upstream's close on its way.
            if since.elapsed() < self.idle_timeout && connected.stream.is_silent(can_repeat) {
                return Ok(connected);
            }
        }
        self.connect().await
    }

    /// A place for a request by HTTP/2.
    pub async fn place(&self) -> Result<http2::Place, Unreached> {
        self.multiplexed
            .place(
                async || self.connect().await,
                self.connect_timeout,
                self.idle_timeout,
            )
            .await
    }

    /// A new connection.
    pub async fn connect(&self) -> Result<Connected, Unreached> {
        let place = match &self.caps {
            None => None,
            Some(caps) => Some(caps.connection(self.connect_timeout).await?),
        };
        let Endpoint { target, name, .. } = &*self.endpoint;
        let way = Way::new(self.is_secure, self.tls.as_deref(), name);
        let stream = connect(target, way, self.connect_timeout).await?;
        let near = self
            .is_original
            .then(|| stream.socket().local_address())
            .flatten();
        Ok(Connected {
            stream,
            reused: false,
            place,
            ours: near.map(Ours::note),
        })
    }

    /// Keeps a connection for the next request; only one whose last response was read to its end.
    pub fn give_back(&self, connected: Connected) {
        // One that is kept is of no use to those who wait for a new one.
        if self.caps.as_ref().is_some_and(|caps| caps.is_short()) {
            return;
        }
        let mut idle = self.idle.borrow_mut();
        let now = clock::now();
        while let Some((since, _)) = idle.front()
            && now.saturating_duration_since(*since) >= self.idle_timeout
        {
            idle.pop_front();
        }
        if idle.len() < MAX_IDLE {
            let connected = Connected {
                reused: true,
                ..connected
            };
            idle.push_back((now, connected));
        }
    }

    /// Closes the idle connection that was not used for longest; whether there was one.
    pub(super) fn close_one(&self) -> bool {
        self.idle.borrow_mut().pop_front().is_some()
    }
}

impl From<io::Error> for Unreached {
    fn from(error: io::Error) -> Unreached {
        match (Trouble::within(&error), error.kind()) {
            (Some(trouble), _) => Unreached::Insecure(trouble),
            (None, io::ErrorKind::TimedOut) => Unreached::TimedOut,
            (None, _) => Unreached::Failed,
        }
    }
}

impl From<Full> for Unreached {
    fn from(Full: Full) -> Unreached {
        Unreached::Full
    }
}
