//! One lane's connections to one endpoint: idle ones kept by the lane that made them, so that no lock is needed. Must not know
//! requests.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::MutexGuard;
use tokio::time::timeout;
use tracing::{info, warn};

use super::caps::{Caps, ConnectionPermit, Full};
use super::connect::{Purpose, Way, connect};
use super::endpoint::Endpoint;
use super::http2::{self, Multiplexed};
use super::ours::Ours;
use super::reach::{Stage, Unreached};
use crate::clock;
use crate::config::{Protocol, Upstream};
use crate::net::stream::Stream;
use crate::net::tls::client::{ClientTls, Offer};

/// Connections to one endpoint that a lane keeps between requests.
const MAX_IDLE: usize = 1024;

/// How much sooner than an upstream says that it closes an idle connection that is used no more: what it said was under way, and so would the next
/// request be. Of a short time it is half.
const SOONER: Duration = Duration::from_secs(1);

/// One lane's connections to one endpoint.
#[derive(Debug)]
pub struct Pool {
    pub endpoint: Arc<Endpoint>,
    /// The upstream's name.
    upstream: String,
    /// Whether its connections are under TLS.
    pub is_secure: bool,
    /// Whether its endpoint is where connections of clients were to go, so that weir's own might come back.
    pub(super) is_original: bool,
    protocol: Protocol,
    /// Whether the last connection on which it was agreed what is spoken speaks HTTP/1.1: then others are not waited for.
    agreed_on_http1: Cell<bool>,
    tls: Option<Arc<ClientTls>>,
    connect_timeout: Duration,
    idle_timeout: Duration,
    max_age: Duration,
    caps: Option<Arc<Caps>>,
    /// With when each was given back, by [`clock::coarse`], the oldest first.
    idle: RefCell<VecDeque<(Duration, Connected)>>,
    /// The same of those that are clients' own, each by its number.
    bound: RefCell<BTreeMap<u64, (Duration, Connected)>>,
    next_bound: Cell<u64>,
    multiplexed: Multiplexed,
}

/// A bound connection of a client's between its requests, closed with this. Its pool has it, and closes it before where it is of no use: one that
/// only its client knew would have its place for as long as that lives.
#[derive(Debug)]
pub struct Bound {
    pool: Weak<Pool>,
    number: u64,
}

impl Bound {
    /// `after_head` as for [`Pool::give_back`]; none where others wait for its place.
    pub fn keep(pool: &Rc<Pool>, connected: Connected, after_head: bool) -> Option<Bound> {
        if pool.is_short() {
            return None;
        }
        let connected = Connected {
            reused: true,
            after_head,
            ..connected
        };
        let number = pool.next_bound.get();
        pool.next_bound.set(number + 1);
        let kept = (clock::coarse(), connected);
        pool.bound.borrow_mut().insert(number, kept);
        let pool = Rc::downgrade(pool);
        Some(Bound { pool, number })
    }

    pub(super) fn is_of(&self, pool: &Rc<Pool>) -> bool {
        std::ptr::eq(self.pool.as_ptr(), Rc::as_ptr(pool))
    }

    /// The connection, where it may serve another request; `is_safe` as for [`Pool::idle`].
    pub fn take(self, is_safe: bool) -> Option<Connected> {
        let pool = self.pool.upgrade()?;
        let (since, connected) = pool.bound.borrow_mut().remove(&self.number)?;
        pool.if_fit(since, connected, is_safe)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.bound.borrow_mut().remove(&self.number);
        }
    }
}

/// A connection, and whether it served a request before: then the upstream may have closed it unseen.
#[derive(Debug)]
pub struct Connected {
    pub stream: Stream,
    pub reused: bool,
    /// Whether the upstream may go by who its client is: then it serves no other.
    pub is_bound: bool,
    /// Whether the upstream has asked who its client is, for as long as it lives: then a client that says so goes on by it.
    pub is_challenged: bool,
    /// Whether its last request was a HEAD: then a body may come that is no response's.
    after_head: bool,
    /// How long it may be idle, by what the upstream said last.
    kept_for: Duration,
    /// Since when it takes no new requests.
    pub(super) old_at: Duration,
    /// Where connections are capped.
    pub(super) place: Option<ConnectionPermit>,
    /// Where it might come back.
    pub(super) ours: Option<Ours>,
}

impl Connected {
    fn is_old(&self, now: Duration) -> bool {
        now >= self.old_at
    }

    /// The upstream says that it keeps it for so long without a request, if it says anything.
    pub fn note_kept_for(&mut self, said: Option<Duration>) {
        self.kept_for = said.map_or(Duration::MAX, |said| said - SOONER.min(said / 2));
    }

    /// Whether nothing has come since its last response; `is_safe` as for [`Pool::idle`].
    fn is_silent(&mut self, is_safe: bool) -> bool {
        self.stream.is_silent(is_safe && !self.after_head)
    }
}

/// A way to ask an upstream.
#[derive(Debug)]
pub enum Reached {
    /// By HTTP/1.1, over a connection of the request's own.
    Http1(Connected),
    /// By HTTP/2, over one that it shares with others.
    Http2(http2::StreamPermit),
}

/// When a request is given up that may be tried again; by [`clock::mono`].
#[derive(Debug, Clone, Copy)]
pub struct Until {
    /// This try. It has its whole time from when there is a place for its connection: the wait for that is for weir's own cap, and says
    /// nothing of the endpoint.
    this: Duration,
    /// All of its tries.
    all: Duration,
}

impl Until {
    /// Of a try that begins `now` and may take `most`, but no longer than until `all` are over.
    pub fn new(now: Duration, most: Option<Duration>, all: Duration) -> Until {
        let this = most.map_or(all, |most| all.min(now + most));
        Until { this, all }
    }

    /// What is left of this try.
    pub fn left(&self) -> Duration {
        self.this.saturating_sub(clock::mono())
    }
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
            upstream: settings.name.clone(),
            is_secure: settings.tls.is_some(),
            is_original: false,
            protocol: settings.protocol,
            agreed_on_http1: Cell::new(false),
            tls,
            connect_timeout: settings.connect_timeout,
            idle_timeout: settings.idle_timeout,
            max_age: settings.max_age,
            caps,
            idle: RefCell::default(),
            bound: RefCell::default(),
            next_bound: Cell::default(),
            multiplexed: Multiplexed::default(),
        }
    }

    /// A way to ask by what the upstream speaks, or has agreed on, where one is open. `is_safe` as for [`Pool::idle`].
    pub fn at_hand(&self, is_safe: bool) -> Option<Reached> {
        match self.shared() {
            Some(place) => Some(Reached::Http2(place)),
            None => self.idle(is_safe).map(Reached::Http1),
        }
    }

    /// A way to ask by what the upstream speaks, or agrees on; none of the idle connections for HTTP/1.1.
    pub async fn reach(&self, until: &mut Option<Until>) -> Result<Reached, Unreached> {
        if self.protocol == Protocol::Http1 {
            return self.connect(until).await.map(Reached::Http1);
        }
        if let Some(place) = self.shared() {
            return Ok(Reached::Http2(place));
        }
        // Who connects first is waited for, since others may share the connection, or hear that there is none.
        let mut alone = None;
        if !self.agreed_on_http1.get() {
            let began = clock::now();
            alone = Some(self.alone(until).await?);
            if let Some(place) = self.shared() {
                return Ok(Reached::Http2(place));
            }
            if let Some(unreached) = self.multiplexed.failed_since(began) {
                return Err(unreached);
            }
            if self.agreed_on_http1.get() {
                alone = None;
            }
        }
        let begun = self.begin(until).await;
        if let Err(unreached @ (Unreached::Failed(_) | Unreached::TimedOut(_) | Unreached::Insecure(_))) = begun
            // Others may have more time.
            && until.is_none_or(|until| !until.left().is_zero())
        {
            self.multiplexed.note_failed(unreached);
        }
        drop(alone);
        begun
    }

    /// A new connection, by what the upstream speaks or agrees on.
    async fn begin(&self, until: &mut Option<Until>) -> Result<Reached, Unreached> {
        let connected = self.open(Offer::All, until).await?;
        let is_http2 = self.protocol == Protocol::Http2 || connected.stream.is_http2();
        self.agreed_on_http1.set(!is_http2);
        if !is_http2 {
            self.note_reached();
            return Ok(Reached::Http1(connected));
        }
        let times = http2::Times {
            handshake: self.within(until),
            answer: self.connect_timeout,
            idle: self.idle_timeout,
        };
        let begun = self.multiplexed.begin(connected, times).await;
        let place = begun.map_err(|(unreached, error)| self.note_unreached(unreached, &error))?;
        self.note_reached();
        Ok(Reached::Http2(place))
    }

    /// A place on an open connection of HTTP/2.
    fn shared(&self) -> Option<http2::StreamPermit> {
        // One that is old is better than none.
        let is_full = self.caps.as_ref().is_some_and(|caps| caps.is_full());
        self.multiplexed.free(is_full)
    }

    /// A new connection for HTTP/1.1.
    pub async fn connect(&self, until: &mut Option<Until>) -> Result<Connected, Unreached> {
        let connected = self.open(Offer::Http1, until).await?;
        self.note_reached();
        Ok(connected)
    }

    /// An idle connection for HTTP/1.1: the one given back last that is still open. Unless the request `is_safe`, or behind a HEAD,
    /// the kernel is asked whether it is open; otherwise it is enough that nothing was heard of its end.
    pub fn idle(&self, is_safe: bool) -> Option<Connected> {
        loop {
            let (since, connected) = self.idle.borrow_mut().pop_back()?;
            if let Some(connected) = self.if_fit(since, connected, is_safe) {
                return Some(connected);
            }
        }
    }

    fn if_fit(
        &self,
        since: Duration,
        mut connected: Connected,
        is_safe: bool,
    ) -> Option<Connected> {
        let is_over = self.is_over(since, &connected, clock::coarse());
        (!is_over && connected.is_silent(is_safe)).then_some(connected)
    }

    /// Whether a connection that is idle `since` then takes no more requests. That must be before the upstream closes it, or one could meet the close
    /// on its way.
    fn is_over(&self, since: Duration, connected: &Connected, now: Duration) -> bool {
        let most = self.idle_timeout.min(connected.kept_for);
        now.saturating_sub(since) >= most || connected.is_old(now)
    }

    /// Whether others wait for the place of a connection.
    fn is_short(&self) -> bool {
        self.caps.as_ref().is_some_and(|caps| caps.is_short())
    }

    async fn open(&self, offer: Offer, until: &mut Option<Until>) -> Result<Connected, Unreached> {
        let place = match &self.caps {
            None => None,
            Some(caps) => Some(self.place(caps, until).await?),
        };
        let Endpoint { target, name, .. } = &*self.endpoint;
        let way = Way::new(self.is_secure, self.tls.as_deref(), name, offer);
        let stream = connect(target, way, Purpose::Requests, self.within(until)).await;
        let stream =
            stream.map_err(|error| self.note_unreached(Unreached::from(&error), &error))?;
        let near = self
            .is_original
            .then(|| stream.socket().local_address())
            .flatten();
        Ok(Connected {
            stream,
            reused: false,
            is_bound: false,
            is_challenged: false,
            after_head: false,
            kept_for: Duration::MAX,
            old_at: clock::old_at(self.max_age),
            place,
            ours: near.map(Ours::note),
        })
    }

    /// Tells of it in the log, where that is news; `unreached` again.
    fn note_unreached(&self, unreached: Unreached, error: &dyn Display) -> Unreached {
        let Endpoint { place, reach, .. } = &*self.endpoint;
        if reach.note_lost(clock::mono()) {
            let upstream = &self.upstream;
            warn!(%upstream, endpoint = place, %error, "endpoint cannot be reached");
            if self.is_original {
                // The next that is reached may be another one.
                reach.note_reached();
            }
        }
        unreached
    }

    /// Tells of it in the log, where that is news.
    fn note_reached(&self) {
        let Endpoint { place, reach, .. } = &*self.endpoint;
        if reach.note_reached() {
            let upstream = &self.upstream;
            info!(%upstream, endpoint = place, "endpoint is reached again");
        }
    }

    /// The turn to connect.
    async fn alone(&self, until: &Option<Until>) -> Result<MutexGuard<'_, ()>, Unreached> {
        // No longer than who connects may take: one that cannot be reached is not waited for by one after the other.
        let most = 2 * self.connect_timeout;
        let within = until.map_or(most, |until| most.min(until.left()));
        match timeout(within, self.multiplexed.alone()).await {
            Ok(alone) => Ok(alone),
            Err(_) => {
                // Who connects may itself wait for a place.
                if let Some(caps) = self.caps.as_ref().filter(|caps| caps.is_short()) {
                    let _place = caps.connection(Duration::ZERO).await?;
                }
                Err(Unreached::TimedOut(Stage::Connection))
            }
        }
    }

    /// The place of a connection below the cap.
    async fn place(
        &self,
        caps: &Caps,
        until: &mut Option<Until>,
    ) -> Result<ConnectionPermit, Full> {
        let Some(until) = until else {
            return caps.connection(self.connect_timeout).await;
        };
        let began = clock::mono();
        let within = until.all.saturating_sub(began).min(self.connect_timeout);
        let place = caps.connection(within).await?;
        let waited = clock::mono().saturating_sub(began);
        until.this = until.all.min(until.this + waited);
        Ok(place)
    }

    /// How long a connection may take to come about.
    fn within(&self, until: &Option<Until>) -> Duration {
        let most = self.connect_timeout;
        until.map_or(most, |until| most.min(until.left()))
    }

    /// Keeps a connection for the next request, unless it is bound; only one whose last response was read to its end. `after_head`: that
    /// was one to a HEAD.
    pub fn give_back(&self, connected: Connected, after_head: bool) {
        // One that is kept is of no use to those who wait for a new one.
        if connected.is_bound || self.is_short() {
            return;
        }
        let mut idle = self.idle.borrow_mut();
        let now = clock::coarse();
        self.drop_old(&mut idle, now);
        if idle.len() < MAX_IDLE && !connected.is_old(now) {
            let connected = Connected {
                reused: true,
                after_head,
                ..connected
            };
            idle.push_back((now, connected));
        }
    }

    /// Closes what has been idle for too long, is old, or was closed by the upstream, which may wait for weir's own end; whether anything is open
    /// still.
    pub(super) fn close_old(&self) -> bool {
        let mut idle = self.idle.borrow_mut();
        let now = clock::coarse();
        let lives = |since: Duration, connected: &mut Connected| {
            !self.is_over(since, connected, now) && connected.is_silent(true)
        };
        idle.retain_mut(|(since, connected)| lives(*since, connected));
        let mut bound = self.bound.borrow_mut();
        bound.retain(|_, (since, connected)| lives(*since, connected));
        !idle.is_empty() || !bound.is_empty() || self.multiplexed.is_open()
    }

    fn drop_old(&self, idle: &mut VecDeque<(Duration, Connected)>, now: Duration) {
        while let Some((since, _)) = idle.front()
            && now.saturating_sub(*since) >= self.idle_timeout
        {
            idle.pop_front();
        }
    }

    /// Closes the idle connection that was not used for longest, or one by HTTP/2 that no request is on; whether there was one.
    pub(super) fn close_one(&self) -> bool {
        let idle = self.idle.borrow_mut().pop_front();
        idle.is_some() || self.multiplexed.close_one()
    }

    /// Closes the bound connection between two requests that was not used for longest; whether there was one.
    pub(super) fn close_bound(&self) -> bool {
        self.bound.borrow_mut().pop_first().is_some()
    }

    /// Since when that has not been used; none where there is none.
    pub(super) fn bound_since(&self) -> Option<Duration> {
        let bound = self.bound.borrow();
        bound.first_key_value().map(|(_, (since, _))| *since)
    }

    /// No other request is to come: connections of HTTP/2 that still have some keep no place below the cap. One of HTTP/1.1 has it until its
    /// request ends.
    pub(super) fn leave(&self) {
        self.multiplexed.leave();
    }

    /// Whether a client has one.
    pub(super) fn has_bound(&self) -> bool {
        !self.bound.borrow().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use super::super::live::LiveUpstream;
    use super::*;
    use crate::config::check;
    use crate::telemetry::metrics::Metrics;

    /// The runtime has not turned since, so that nothing can have been heard.
    #[tokio::test]
    async fn a_body_behind_the_response_to_a_head_is_seen_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let near = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        near.set_nonblocking(true).expect("it may be");
        let near = tokio::net::TcpStream::from_std(near).expect("it does not block");
        let (mut far, _) = listener.accept().expect("it came");
        let mut connected = Connected {
            stream: Stream::from(near),
            reused: true,
            is_bound: false,
            is_challenged: false,
            after_head: true,
            kept_for: Duration::MAX,
            old_at: Duration::MAX,
            place: None,
            ours: None,
        };
        assert!(connected.is_silent(true));
        far.write_all(b"HTTP/1.1 200 OK\r\n\r\n")
            .expect("it is open");
        assert!(!connected.is_silent(true));
        connected.after_head = false;
        assert!(!connected.is_silent(false));
    }

    /// Of an upstream whose one endpoint is there.
    fn pool(at: SocketAddr) -> Rc<Pool> {
        let text = format!("listen: 127.0.0.1:0\nupstream: http://{at}\n");
        let config = check::parse(&text, &|_| None).expect("it has no mistakes");
        let metrics = Metrics::default().upstreams.of("app");
        let live = LiveUpstream::new(config.upstreams[0].clone(), None, None, metrics);
        Rc::new(live.pool(live.list().remove(0)))
    }

    /// It may come at any time: what matters is that a HEAD was before it.
    #[tokio::test]
    async fn a_connection_is_kept_with_what_its_last_request_was() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let pool = pool(listener.local_addr().expect("bound"));
        for is_bound in [false, true] {
            let connected = pool.connect(&mut None).await.expect("it listens");
            let (mut far, _) = listener.accept().expect("it came");
            let mut put = || far.write_all(b"a body").expect("it is open");
            let again = if is_bound {
                let bound = Bound::keep(&pool, connected, true);
                put();
                bound.and_then(|bound| bound.take(true))
            } else {
                pool.give_back(connected, true);
                put();
                pool.idle(true)
            };
            assert!(again.is_none(), "{is_bound}");
        }
    }
}
