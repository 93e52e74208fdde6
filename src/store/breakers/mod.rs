//! A live breaker of one upstream, shared by all lanes. Owns the lock and what an exchange's end means to the breaker; the
//! states are `policy::breaker`'s, and `store::breakers::shared` speaks with Redis.

pub mod shared;
mod telling;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::clock;
use crate::config::breakers::{CircuitBreaker, FailureOn, Scope};
use crate::config::limits::Mode;
use crate::http2::grpc::GrpcStatus;
use crate::keys::{BreakerKeys, Keys};
use crate::policy::breaker::shared::{Member, Permit};
use crate::policy::breaker::{self as policy, Breaker, CallOutcome, Refused, Snapshot, Stage};
use shared::Forced;
use telling::Telling;

/// How an exchange with an upstream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallEnd {
    /// A whole response of this status.
    Status(u16),
    /// A whole response of gRPC's, of this status.
    Grpc(GrpcStatus),
    /// By the client's own deadline, before a whole response.
    Deadline,
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
    state: State,
    telling: Telling,
}

// A lock, since an outcome can change the state, the window and the probes together. It is held for tens of nanoseconds,
// twice a request; and no longer for a shared breaker, whose calls of Redis are made without it.
#[expect(
    clippy::large_enum_variant,
    reason = "a breaker is behind an `Arc` already, and a process has few"
)]
enum State {
    Local(Mutex<Breaker>),
    Shared(Mutex<Member>, Sharing),
}

/// How a shared breaker's state is kept in Redis.
#[derive(Debug)]
pub struct Sharing {
    pub(super) keys: BreakerKeys,
    /// Where transitions are said.
    pub(super) channel: String,
    /// Told when a report is due at once.
    pub wake: Notify,
    /// Whether Redis was asked for the state, with or without success.
    pub(super) tried: AtomicBool,
}

impl LiveBreaker {
    /// Closed, with nothing seen yet; shared by `keys`, where there is a fleet and the settings say so.
    pub fn new(upstream: String, settings: CircuitBreaker, keys: Option<&Keys>) -> LiveBreaker {
        let rules = settings.settings.clone();
        let state = match keys.filter(|_| settings.scope == Scope::Shared) {
            None => State::Local(Mutex::new(Breaker::new(rules))),
            Some(keys) => {
                let sharing = Sharing {
                    keys: keys.breaker(&upstream, rules.window),
                    channel: keys.breakers_changed(),
                    wake: Notify::new(),
                    tried: AtomicBool::new(false),
                };
                let member = Member::new(rules, settings.on_redis_loss);
                State::Shared(Mutex::new(member), sharing)
            }
        };
        LiveBreaker {
            upstream,
            settings,
            state,
            telling: Telling::from(policy::State::Closed),
        }
    }

    /// Goes on in the state that `old` is in, in whose place it is. One that is shared from now on does until it hears the shared state.
    pub fn go_on_from(&self, old: &LiveBreaker) {
        self.telling.go_on_from(&old.telling);
        match (&old.state, &self.state) {
            (State::Local(old), State::Local(new)) => new.lock().succeed(&old.lock()),
            (State::Local(old), State::Shared(new, _)) => new.lock().succeed_local(&old.lock()),
            (State::Shared(old, _), State::Local(new)) => old.lock().hand_to_local(&mut new.lock()),
            (State::Shared(old, _), State::Shared(new, _)) => new.lock().succeed(&old.lock()),
        }
    }

    /// Asks for one call. In shadow mode a refusal is in the second part, and the call may go on all the same.
    pub fn try_enter(
        self: &Arc<Self>,
        now: Duration,
    ) -> Result<(CallPermit, Option<Refused>), Refused> {
        let draw = fastrand::f64();
        let asked = match &self.state {
            State::Local(breaker) => self
                .act(breaker, now, |it| it.try_enter(now, draw))
                .map(Permit::Local),
            State::Shared(member, sharing) => {
                let (asked, wake) = member.lock().try_enter(now, draw);
                sharing.wake_if(wake);
                asked
            }
        };
        let call = |permit| CallPermit {
            breaker: self.clone(),
            permit,
        };
        match asked {
            Ok(permit) => Ok((call(Some(permit)), None)),
            Err(refused) if self.settings.mode == Mode::Enforce => Err(refused),
            Err(refused) => Ok((call(None), Some(refused))),
        }
    }

    pub fn snapshot(&self, now: Duration) -> Snapshot {
        match &self.state {
            State::Local(breaker) => self.act(breaker, now, |it| it.snapshot(now)),
            State::Shared(member, _) => member.lock().snapshot(now),
        }
    }

    /// What a call does to one that is this process's, of which the log is told.
    fn act<T>(
        &self,
        breaker: &Mutex<Breaker>,
        now: Duration,
        does: impl FnOnce(&mut Breaker) -> T,
    ) -> T {
        let (done, state) = {
            let mut breaker = breaker.lock();
            (does(&mut breaker), breaker.state())
        };
        if self.telling.is_news(state) {
            self.say(now, || breaker.lock().snapshot(now));
        }
        done
    }

    #[cold]
    fn say(&self, now: Duration, look: impl FnOnce() -> Snapshot) {
        let mode = self.settings.mode;
        self.telling.tell(&self.upstream, mode, now, look);
    }

    /// Tells the log of one that is shared. Its tasks do: what lanes go by comes to them first.
    fn say_shared(&self, now: Duration) {
        let look = || self.with_member(|member| member.snapshot(now));
        if let Some(shown) = look().filter(|shown| self.telling.is_news(shown.state)) {
            self.say(now, || look().unwrap_or(shown));
        }
    }

    /// Where it is to be shared.
    pub fn sharing(&self) -> Option<&Sharing> {
        match &self.state {
            State::Local(_) => None,
            State::Shared(_, sharing) => Some(sharing),
        }
    }

    /// Looks at what this process has of a shared breaker, under its lock.
    pub fn with_member<T>(&self, look: impl FnOnce(&mut Member) -> T) -> Option<T> {
        match &self.state {
            State::Local(_) => None,
            State::Shared(member, _) => Some(look(&mut member.lock())),
        }
    }

    /// Makes it so, unless it is shared; then [`LiveBreaker::force_all`] does.
    pub fn force(&self, forced: Forced) {
        if let State::Local(breaker) = &self.state {
            self.act(breaker, clock::mono(), |breaker| match forced {
                Forced::Open => breaker.force_open(),
                Forced::Closed => breaker.force_closed(),
                Forced::Reset => breaker.reset(),
            });
        }
    }

    fn record(&self, permit: Permit, outcome: CallOutcome, elapsed: Duration, now: Duration) {
        let draw = fastrand::f64();
        match (&self.state, permit) {
            (State::Local(breaker), Permit::Local(permit)) => self.act(breaker, now, |it| {
                it.record(permit, outcome, elapsed, now, draw);
            }),
            (State::Shared(member, sharing), permit) => {
                let wake = member.lock().record(permit, outcome, elapsed, now, draw);
                sharing.wake_if(wake);
            }
            // A breaker gives no permits of the other kind.
            (State::Local(_), Permit::Shared { .. }) => {}
        }
    }

    fn come(&self, permit: Permit, stage: Stage, now: Duration) {
        let draw = fastrand::f64();
        match (&self.state, permit) {
            (State::Local(breaker), Permit::Local(permit)) => {
                self.act(breaker, now, |it| it.come(permit, stage, now, draw))
            }
            (State::Shared(member, _), permit) => member.lock().come(permit, stage, now, draw),
            (State::Local(_), Permit::Shared { .. }) => {}
        }
    }

    fn release(&self, permit: Permit) {
        match (&self.state, permit) {
            (State::Local(breaker), Permit::Local(permit)) => breaker.lock().release(permit),
            (State::Shared(member, sharing), permit) => {
                let wake = member.lock().release(permit);
                sharing.wake_if(wake);
            }
            (State::Local(_), Permit::Shared { .. }) => {}
        }
    }
}

impl Sharing {
    /// What messages about it are told apart by.
    pub fn tag(&self) -> &str {
        &self.keys.tag
    }

    /// Whether Redis was asked for the state, with or without success.
    pub fn was_tried(&self) -> bool {
        self.tried.load(Ordering::Acquire)
    }

    pub(super) fn wake_if(&self, wake: bool) {
        if wake {
            self.wake.notify_one();
        }
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

/// The right to one call; dropped without [`CallPermit::end`], it frees its probe's slot and counts for nothing.
#[derive(Debug)]
pub struct CallPermit {
    breaker: Arc<LiveBreaker>,
    /// `None` in shadow mode, where the breaker would have refused.
    permit: Option<Permit>,
}

/// A call that is a probe, on its way.
#[derive(Debug)]
pub struct Probe {
    breaker: Arc<LiveBreaker>,
    permit: Permit,
}

impl Probe {
    /// It waits for its turn, or for its client.
    pub fn waits(&self, now: Duration) {
        self.breaker.come(self.permit, Stage::Waiting, now);
    }

    /// It is the upstream's from here on.
    pub fn works(&self, now: Duration) {
        self.breaker.come(self.permit, Stage::Working, now);
    }

    /// The head of a response of this status has come, `elapsed` after the request was sent.
    pub fn answered(&self, status: u16, elapsed: Duration, now: Duration) {
        if let Some(outcome) = outcome(&self.breaker.settings.failure_on, CallEnd::Status(status)) {
            let stage = Stage::Answered(outcome, elapsed);
            self.breaker.come(self.permit, stage, now);
        }
    }
}

impl CallPermit {
    /// The call, where it is a probe.
    pub fn probe(&self) -> Option<Probe> {
        let permit = self.permit.filter(Permit::is_probe)?;
        let breaker = self.breaker.clone();
        Some(Probe { breaker, permit })
    }

    /// Tells how the call that took `elapsed` ended.
    pub fn end(mut self, end: CallEnd, elapsed: Duration, now: Duration) {
        let Some(outcome) = outcome(&self.breaker.settings.failure_on, end) else {
            return self.abandon(elapsed, now);
        };
        if let Some(permit) = self.permit.take() {
            self.breaker.record(permit, outcome, elapsed, now);
        }
    }

    /// The client left, or gave up, after the upstream had the request for `waited`. That says nothing of the upstream, unless it was slow
    /// by then: impatient clients must not hide a dead upstream.
    pub fn abandon(self, waited: Duration, now: Duration) {
        let slow = self.breaker.settings.settings.slow_call;
        if slow.is_some_and(|slow| waited > slow.duration) {
            self.end(CallEnd::TimedOut, waited, now);
        }
    }
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            self.breaker.release(permit);
        }
    }
}

/// `None` where it is as if the client had left.
fn outcome(failure_on: &FailureOn, end: CallEnd) -> Option<CallOutcome> {
    let failed = match end {
        CallEnd::ConnectFailed => failure_on.connect_failure,
        CallEnd::TimedOut => failure_on.timeout,
        CallEnd::Reset => failure_on.reset,
        CallEnd::Grpc(status) => failure_on.grpc.contains(&status),
        // A short one must not tell against the upstream unless the file says so, nor any for it.
        CallEnd::Deadline if !failure_on.grpc.contains(&GrpcStatus::DEADLINE_EXCEEDED) => {
            return None;
        }
        CallEnd::Deadline => true,
        CallEnd::Status(status) => {
            failure_on.statuses.contains(&status)
                || (failure_on.server_error && (500..600).contains(&status))
        }
    };
    Some(if failed {
        CallOutcome::Failure
    } else {
        CallOutcome::Success
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_file_names_is_a_failure_and_nothing_else() {
        let none = FailureOn {
            connect_failure: false,
            timeout: false,
            reset: false,
            server_error: false,
            statuses: vec![429],
            grpc: Vec::new(),
        };
        let check = |failure_on: &FailureOn, ends: &[CallEnd], expected: CallOutcome| {
            for end in ends {
                assert_eq!(outcome(failure_on, *end), Some(expected), "{end:?}");
            }
        };
        let broken = [CallEnd::ConnectFailed, CallEnd::TimedOut, CallEnd::Reset];
        check(&none, &broken, CallOutcome::Success);
        check(
            &none,
            &[500, 599].map(CallEnd::Status),
            CallOutcome::Success,
        );
        check(&none, &[CallEnd::Status(429)], CallOutcome::Failure);
        let all = FailureOn {
            connect_failure: true,
            timeout: true,
            reset: true,
            server_error: true,
            ..none
        };
        check(&all, &broken, CallOutcome::Failure);
        check(
            &all,
            &[500, 511, 599, 429].map(CallEnd::Status),
            CallOutcome::Failure,
        );
        check(
            &all,
            &[200, 404, 499, 600].map(CallEnd::Status),
            CallOutcome::Success,
        );
        assert_eq!(outcome(&all, CallEnd::Deadline), None);
    }
}
