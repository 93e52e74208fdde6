//! How much of an upstream a process uses at a time: requests, connections, and requests that wait for either.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tokio::sync::{AcquireError, Mutex, Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::{interval, timeout};

use super::adaptive::{Learnt, Unanswered};
use crate::clock;
use crate::config::upstreams::Concurrency;
use crate::policy::gradient::Range;
use crate::telemetry::metrics::upstreams::UpstreamMetrics;

/// How often lanes are asked to close an idle connection while a request waits for a new one.
const ASK_EVERY: Duration = Duration::from_millis(10);

/// The caps of one upstream, for all lanes together.
#[derive(Debug)]
pub struct Caps {
    requests: Semaphore,
    learnt: Option<Learnt>,
    connections: Arc<Semaphore>,
    pending: u32,
    /// Requests that wait, and those of them that do for a connection.
    waiting: AtomicU32,
    waiting_to_connect: AtomicU32,
    /// Told while a request waits for a connection: lanes may have idle ones.
    pub(super) short: Notify,
    /// Held by the one that tells so on, for all that wait.
    asking: Mutex<()>,
    metrics: UpstreamMetrics,
}

/// A connection's place below the cap, until it is dropped.
pub type ConnectionPermit = OwnedSemaphorePermit;

/// A request's place below the caps, until it is dropped.
#[derive(Debug)]
pub(super) struct RequestPermit<'c> {
    _place: SemaphorePermit<'c>,
    /// Until its answer begins, where it is learnt how many may be without one.
    unanswered: Option<Unanswered<'c>>,
}

/// There is no place, and was none for as long as one may be waited for; or as many wait as may.
#[derive(Debug)]
pub struct Full;

impl Caps {
    pub(super) fn new(settings: Concurrency, metrics: UpstreamMetrics) -> Caps {
        let places = |count: u32| Semaphore::new((count as usize).min(Semaphore::MAX_PERMITS));
        let range = settings.adaptive_min.map(|min| Range {
            min,
            max: settings.max,
        });
        Caps {
            requests: places(settings.max),
            learnt: range.map(Learnt::new),
            connections: Arc::new(places(settings.max_connections)),
            pending: settings.pending,
            waiting: AtomicU32::new(0),
            waiting_to_connect: AtomicU32::new(0),
            short: Notify::new(),
            asking: Mutex::default(),
            metrics,
        }
    }

    /// The place of a request.
    pub(super) async fn request(&self, within: Duration) -> Result<RequestPermit<'_>, Full> {
        if let Some(permit) = self.at_once() {
            return Ok(permit);
        }
        let _waits = self.wait(&self.metrics.over_requests)?;
        let permit = async {
            let place = self.requests.acquire().await?;
            let unanswered = match &self.learnt {
                None => None,
                Some(learnt) => Some(learnt.enter().await?),
            };
            Ok::<_, AcquireError>(RequestPermit {
                _place: place,
                unanswered,
            })
        };
        let permit = timeout(within, permit).await;
        permit.ok().and_then(Result::ok).ok_or_else(|| {
            self.metrics.over_requests.inc();
            Full
        })
    }

    fn at_once(&self) -> Option<RequestPermit<'_>> {
        let place = self.requests.try_acquire().ok()?;
        let unanswered = match &self.learnt {
            None => None,
            Some(learnt) => Some(learnt.try_enter()?),
        };
        Some(RequestPermit {
            _place: place,
            unanswered,
        })
    }

    /// How many may be without an answer, where that is learnt.
    pub(super) fn bound(&self) -> Option<u32> {
        self.learnt.as_ref().map(Learnt::bound)
    }

    /// A request that has its place still was answered after `took`; how many may be so is learnt from it, where it is to be.
    pub(super) fn learn(&self, took: Duration) {
        if let Some(learnt) = &self.learnt {
            learnt.learn(took, clock::mono());
        }
    }

    /// The place of a connection.
    pub(super) async fn connection(&self, within: Duration) -> Result<ConnectionPermit, Full> {
        if let Ok(place) = self.connections.clone().try_acquire_owned() {
            return Ok(place);
        }
        let _waits = self.wait(&self.metrics.over_connections)?;
        let _waits_to_connect = One::more(&self.waiting_to_connect);
        let place = tokio::select! {
            place = timeout(within, self.connections.clone().acquire_owned()) => place,
            never = self.ask_for_room() => match never {},
        };
        place.ok().and_then(Result::ok).ok_or_else(|| {
            self.metrics.over_connections.inc();
            Full
        })
    }

    /// Has lanes close idle connections, by one request at a time.
    async fn ask_for_room(&self) -> Infallible {
        self.short.notify_waiters();
        let _asking = self.asking.lock().await;
        let mut ask = interval(ASK_EVERY);
        loop {
            ask.tick().await;
            self.short.notify_waiters();
        }
    }

    /// Whether as many connections are open as may be.
    pub(super) fn is_full(&self) -> bool {
        self.connections.available_permits() == 0
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

impl RequestPermit<'_> {
    /// Its answer has begun: what is still to come of that takes no place but one of `max`.
    pub(super) fn answered(&mut self) {
        self.unanswered = None;
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::future::join_all;
    use tokio::time::sleep;

    use super::*;
    use crate::telemetry::metrics::Metrics;

    #[tokio::test(start_paused = true)]
    async fn all_that_wait_for_a_connection_together_ask_as_often_as_one() {
        const WAITING: u32 = 100;
        let settings = Concurrency {
            max: WAITING,
            adaptive_min: None,
            pending: WAITING,
            max_connections: 1,
        };
        let caps = Caps::new(settings, Metrics::default().upstreams.of("app"));
        let place = caps.connection(Duration::ZERO).await.unwrap();
        let asked = Cell::new(0);
        let count = async {
            loop {
                caps.short.notified().await;
                asked.set(asked.get() + 1);
            }
        };
        // One each millisecond.
        let waiting = join_all((0..WAITING).map(async |n| {
            sleep(Duration::from_millis(n.into())).await;
            caps.connection(Duration::from_secs(60)).await.map(drop)
        }));
        let later = async {
            sleep(Duration::from_millis(WAITING.into())).await;
            let before = asked.get();
            sleep(Duration::from_secs(1)).await;
            let of_a_second = asked.get() - before;
            assert!((90..=110).contains(&of_a_second), "{of_a_second}");
            // Who asked has its turn, and another goes on.
            drop(place);
        };
        tokio::select! {
            () = count => {}
            (served, ()) = async { tokio::join!(waiting, later) } => {
                assert!(served.iter().all(Result::is_ok));
            }
        }
    }
}
