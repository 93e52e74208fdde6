//! A live breaker of one upstream, shared by all lanes. Owns the lock and what an exchange's end means to the breaker; the
//! states are `policy::breaker`'s.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::config::breakers::{CircuitBreaker, FailureOn};
use crate::config::limits::Mode;
use crate::policy::breaker::{Breaker, Outcome, Permit, Refused, Snapshot};

/// How an exchange with an upstream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A whole response of this status.
    Status(u16),
    ConnectFailed,
    TimedOut,
    /// It broke off, before or in the response, or sent nonsense.
    Reset,
}

/// One upstream's breaker.
pub struct LiveBreaker {
    /// The upstream's name.
    pub upstream: String,
    pub settings: CircuitBreaker,
    // A lock, since an outcome can change the state, the window and the probes together. It is held for tens of
    // nanoseconds, twice a request.
    state: Mutex<Breaker>,
}

impl LiveBreaker {
    /// Closed, with nothing seen yet.
    pub fn new(upstream: String, settings: CircuitBreaker) -> LiveBreaker {
        let state = Mutex::new(Breaker::new(settings.settings.clone()));
        LiveBreaker {
            upstream,
            settings,
            state,
        }
    }

    /// Asks for one call; `jitter` is a draw from 0 to 1. In shadow mode a refusal is in the second part, and the call
    /// may go on all the same.
    pub fn try_enter(
        self: &Arc<Self>,
        now: Duration,
        jitter: f64,
    ) -> Result<(Entry, Option<Refused>), Refused> {
        match self.state.lock().try_enter(now, jitter) {
            Ok(permit) => Ok((
                Entry {
                    breaker: self.clone(),
                    permit: Some(permit),
                },
                None,
            )),
            Err(refused) if self.settings.mode == Mode::Enforce => Err(refused),
            Err(refused) => Ok((
                Entry {
                    breaker: self.clone(),
                    permit: None,
                },
                Some(refused),
            )),
        }
    }

    pub fn snapshot(&self, now: Duration) -> Snapshot {
        self.state.lock().snapshot(now)
    }

    pub fn force_open(&self) {
        self.state.lock().force_open();
    }

    pub fn force_closed(&self) {
        self.state.lock().force_closed();
    }

    /// Closed, with nothing seen yet.
    pub fn reset(&self) {
        self.state.lock().reset();
    }
}

impl fmt::Debug for LiveBreaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveBreaker")
            .field("upstream", &self.upstream)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// The right to one call; dropped without [`Entry::end`], it frees its probe's slot and counts for nothing.
#[derive(Debug)]
pub struct Entry {
    breaker: Arc<LiveBreaker>,
    /// `None` in shadow mode, where the breaker would have refused.
    permit: Option<Permit>,
}

impl Entry {
    /// Tells how the call that took `elapsed` ended.
    pub fn end(mut self, end: End, elapsed: Duration, now: Duration, jitter: f64) {
        if let Some(permit) = self.permit.take() {
            let outcome = outcome(&self.breaker.settings.failure_on, end);
            self.breaker
                .state
                .lock()
                .record(permit, outcome, elapsed, now, jitter);
        }
    }

    /// The client left after the upstream had the request for `waited`. That says nothing of the upstream, unless it was slow
    /// by then: impatient clients must not hide a dead upstream.
    pub fn abandon(self, waited: Duration, now: Duration, jitter: f64) {
        let slow = self.breaker.settings.settings.slow_call;
        if slow.is_some_and(|slow| waited > slow.duration) {
            self.end(End::TimedOut, waited, now, jitter);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            self.breaker.state.lock().release(permit);
        }
    }
}

fn outcome(failure_on: &FailureOn, end: End) -> Outcome {
    let failed = match end {
        End::ConnectFailed => failure_on.connect_failure,
        End::TimedOut => failure_on.timeout,
        End::Reset => failure_on.reset,
        End::Status(status) => {
            failure_on.statuses.contains(&status)
                || (failure_on.server_error && (500..600).contains(&status))
        }
    };
    if failed {
        Outcome::Failure
    } else {
        Outcome::Success
    }
}
