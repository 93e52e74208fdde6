//! How much of an upstream a process uses at a time: requests, connections, and requests that wait for either.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{interval, timeout};

use super::adaptive::Learnt;
use crate::clock;
use crate::config::upstreams::Concurrency;
use crate::policy::gradient::Range;
use crate::telemetry::upstream_metrics::UpstreamMetrics;

/// How often lanes are asked to close an idle connection while a request waits for a new one.
const ASK_EVERY: Duration = Duration::from_millis(10);

/// The caps of one upstream, for all lanes together.
#[derive(Debug)]
pub struct Caps {
    requests: Arc<Semaphore>,
    learnt: Option<Learnt>,
    /// Requests that may be under way, places that are still to be taken back included.
    size: Mutex<u32>,
    connections: Arc<Semaphore>,
    pending: u32,
    /// Requests that wait, and those of them that do for a connection.
    waiting: AtomicU32,
    waiting_to_connect: AtomicU32,
    /// Told while a request waits for a connection: lanes may have idle ones.
    pub(super) short: Notify,
    metrics: UpstreamMetrics,
}

/// A place below a cap, until it is dropped.
pub type Place = OwnedSemaphorePermit;

/// There is no place, and was none for as long as one may be waited for; or as many wait as may.
#[derive(Debug)]
pub struct Full;

impl Caps {
    pub(super) fn new(settings: Concurrency, metrics: UpstreamMetrics) -> Caps {
        let places = |count: u32| {
            let count = (count as usize).min(Semaphore::MAX_PERMITS);
            Arc::new(Semaphore::new(count))
        };
        let range = settings.adaptive_min.map(|min| Range {
            min,
            max: settings.max,
        });
        let learnt = range.map(Learnt::new);
        let size = learnt.as_ref().map_or(settings.max, Learnt::bound);
        if learnt.is_some() {
            metrics.bound.set(size.into());
        }
        Caps {
            requests: places(size),
            learnt,
            size: Mutex::new(size),
            connections: places(settings.max_connections),
            pending: settings.pending,
            waiting: AtomicU32::new(0),
            waiting_to_connect: AtomicU32::new(0),
            short: Notify::new(),
            metrics,
        }
    }

    /// The place of a request.
    pub(super) async fn request(&self, within: Duration) -> Result<Place, Full> {
        if let Ok(place) = self.requests.clone().try_acquire_owned() {
            return Ok(place);
        }
        let _waits = self.wait(&self.metrics.over_requests)?;
        let place = timeout(within, self.requests.clone().acquire_owned()).await;
        place.ok().and_then(Result::ok).ok_or_else(|| {
            self.metrics.over_requests.inc();
            Full
        })
    }

    /// A request was answered after `took`; how many may be under way is learnt from it, where it is to be.
    pub(super) fn answered(&self, took: Duration) {
        let Some(learnt) = &self.learnt else {
            return;
        };
        let mut size = self.size.lock();
        let free = u32::try_from(self.requests.available_permits()).unwrap_or(u32::MAX);
        let under_way = size.saturating_sub(free);
        if let Some(bound) = learnt.answered(took, under_way, clock::mono()) {
            self.resize(&mut size, bound);
        }
    }

    /// Gives or takes back places. Those that are in use are taken back later.
    fn resize(&self, size: &mut u32, bound: u32) {
        self.metrics.bound.set(bound.into());
        if bound >= *size {
            self.requests.add_permits((bound - *size) as usize);
            *size = bound;
        } else {
            let taken = self.requests.forget_permits((*size - bound) as usize);
            *size -= u32::try_from(taken).unwrap_or(u32::MAX);
        }
    }

    /// The place of a connection.
    pub(super) async fn connection(&self, within: Duration) -> Result<Place, Full> {
        if let Ok(place) = self.connections.clone().try_acquire_owned() {
            return Ok(place);
        }
        let _waits = self.wait(&self.metrics.over_connections)?;
        let _waits_to_connect = One::more(&self.waiting_to_connect);
        let closing = async {
            let mut ask = interval(ASK_EVERY);
            loop {
                ask.tick().await;
                self.short.notify_waiters();
            }
        };
        let place = tokio::select! {
            place = timeout(within, self.connections.clone().acquire_owned()) => place,
            () = closing => return Err(Full),
        };
        place.ok().and_then(Result::ok).ok_or_else(|| {
            self.metrics.over_connections.inc();
            Full
        })
    }

    /// Whether a request waits for a connection.
    pub(super) fn is_short(&self) -> bool {
        self.waiting_to_connect.load(Ordering::Relaxed) > 0
    }

    /// One that waits, unless as many do as may; `over` is the cap that it waits for.
    fn wait(&self, over: &Counter) -> Result<One<'_>, Full> {
        let one = One::more(&self.waiting);
        if one.number > self.pending {
            // With no queue at all it is the cap itself that refuses.
            let refused_by = if self.pending == 0 {
                over
            } else {
                &self.metrics.over_pending
            };
            refused_by.inc();
            return Err(Full);
        }
        Ok(one)
    }
}

/// One more, until it is dropped.
struct One<'c> {
    of: &'c AtomicU32,
    number: u32,
}

impl One<'_> {
    fn more(of: &AtomicU32) -> One<'_> {
        let number = of.fetch_add(1, Ordering::Relaxed) + 1;
        One { of, number }
    }
}

impl Drop for One<'_> {
    fn drop(&mut self) {
        self.of.fetch_sub(1, Ordering::Relaxed);
    }
}
