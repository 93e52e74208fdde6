//! A circuit breaker as a state machine: whether a call may go upstream, and what its result means. Owns the window of
//! results, the probes and the ramp. Must not do I/O, read a clock or draw a random number: `now` is time since one
//! origin of the process, and `jitter_unit` a draw from 0 to 1.
//!
//! ```text
//! closed --trip--> open --until--> half-open --probes pass--> recovering --recover_over--> closed
//!                   ^                  |                          |
//!                   +--- probes fail --+--------- trip -----------+
//! ```
//!
//! The states are those of Nygard, "Release It!"; the ramp after them is the slow start of load balancers.

use std::collections::VecDeque;
use std::time::Duration;

pub use crate::config::breakers::{HalfOpen, Settings, SlowCall, Window};

/// The right to one call. Give it back once, to [`Breaker::record`] or [`Breaker::release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permit {
    generation: u64,
    probe: Option<u64>,
}

impl Permit {
    /// Which span of the breaker's life admitted the call; only results of the current one count.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether the call holds one of the slots of half-open.
    pub fn is_probe(&self) -> bool {
        self.probe.is_some()
    }
}

/// The call may not go upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// When to try again: not before the opening ends, a probe's slot frees by timeout or the ramp ends. Jittered, so
    /// that callers refused together do not come back together. A forced opening has no end; it says `max_open_for`.
    pub retry_after: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure,
}

/// The states as operators see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Closed,
    Open,
    HalfOpen,
    Recovering,
    ForcedOpen,
    ForcedClosed,
}

impl State {
    /// The name in metrics and in the admin API.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::Open => "open",
            State::HalfOpen => "half_open",
            State::Recovering => "recovering",
            State::ForcedOpen => "forced_open",
            State::ForcedClosed => "forced_closed",
        }
    }
}

/// A breaker at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    pub state: State,
    /// Calls in the window. While open: those that tripped it, as far as they are still in the window.
    pub calls: u64,
    /// Of these, failures.
    pub failures: u64,
    /// Of these, slow ones, failed or not; 0 without `slow_call`.
    pub slow: u64,
    pub generation: u64,
    /// When the opening ends; only in [`State::Open`].
    pub open_until: Option<Duration>,
}

/// One breaker. Not shared: the owner serialises access. Steps of time happen inside calls, so that an idle breaker costs
/// nothing; a `now` that runs backwards is harmless.
#[derive(Debug)]
pub struct Breaker {
    settings: Settings,
    phase: Phase,
    generation: u64,
    calls: Calls,
    consecutive_failures: u32,
    /// How long the next opening lasts, before jitter.
    next_open_for: Duration,
}

impl Breaker {
    /// Closed, with an empty window.
    pub fn new(settings: Settings) -> Self {
        let settings = sane(settings);
        Breaker {
            phase: Phase::Closed,
            generation: 0,
            calls: Calls::new(settings.window),
            consecutive_failures: 0,
            next_open_for: settings.open_for,
            settings,
        }
    }

    /// Asks for one call. An admitted call must end in [`record`](Self::record) or [`release`](Self::release).
    pub fn try_enter(&mut self, now: Duration, jitter_unit: f64) -> Result<Permit, Refused> {
        self.advance(now);
        let mut probe = None;
        let wait = match &mut self.phase {
            Phase::Closed | Phase::ForcedClosed => None,
            Phase::Open { until } => Some(until.saturating_sub(now)),
            Phase::ForcedOpen => Some(self.settings.max_open_for),
            Phase::HalfOpen(trial) => match trial.enter(&self.settings.half_open, now) {
                Ok(id) => {
                    probe = Some(id);
                    None
                }
                Err(wait) => Some(wait),
            },
            Phase::Recovering(ramp) => ramp.enter(&self.settings, now),
        };
        match wait {
            None => Ok(Permit {
                generation: self.generation,
                probe,
            }),
            Some(wait) => Err(Refused {
                retry_after: self.jittered(wait, jitter_unit),
            }),
        }
    }

    /// Tells the result of an admitted call that took `elapsed`. One of an older generation, or of a probe that lost its
    /// slot, changes nothing.
    pub fn record(
        &mut self,
        permit: Permit,
        outcome: Outcome,
        elapsed: Duration,
        now: Duration,
        jitter_unit: f64,
    ) {
        self.advance(now);
        if permit.generation != self.generation {
            return;
        }
        let call = Call {
            failed: outcome == Outcome::Failure,
            slow: self
                .settings
                .slow_call
                .is_some_and(|slow| elapsed > slow.duration),
        };
        match &mut self.phase {
            // No permit bears the generation of an opening.
            Phase::Open { .. } | Phase::ForcedOpen => {}
            Phase::ForcedClosed => self.calls.push(call, now),
            Phase::Closed | Phase::Recovering(_) => {
                self.calls.push(call, now);
                self.consecutive_failures = match outcome {
                    Outcome::Success => 0,
                    Outcome::Failure => self.consecutive_failures.saturating_add(1),
                };
                if self.trips() {
                    self.open(now, jitter_unit);
                }
            }
            Phase::HalfOpen(trial) => {
                if !permit.probe.is_some_and(|id| trial.free(id)) {
                    return;
                }
                trial.count(call);
                let verdict = trial.verdict(&self.settings.half_open);
                self.calls.push(call, now);
                match verdict {
                    Verdict::Undecided => {}
                    Verdict::Failed => self.open(now, jitter_unit),
                    Verdict::Passed => {
                        self.restart(Phase::Recovering(Ramp {
                            since: now,
                            credit: 0.5,
                        }));
                        // Without a ramp it is closed at once.
                        self.advance(now);
                    }
                }
            }
        }
    }

    /// Gives a permit back without a result, for a call that was abandoned through no fault of the upstream. A probe's
    /// slot is free again.
    pub fn release(&mut self, permit: Permit) {
        if permit.generation != self.generation {
            return;
        }
        match (&mut self.phase, permit.probe) {
            (Phase::HalfOpen(trial), Some(id)) => {
                trial.free(id);
            }
            (
                Phase::Closed
                | Phase::Open { .. }
                | Phase::HalfOpen(_)
                | Phase::Recovering(_)
                | Phase::ForcedOpen
                | Phase::ForcedClosed,
                _,
            ) => {}
        }
    }

    /// Refuses every call until [`force_closed`](Self::force_closed) or [`reset`](Self::reset).
    pub fn force_open(&mut self) {
        self.next_open_for = self.settings.open_for;
        self.restart(Phase::ForcedOpen);
    }

    /// Admits every call and never trips, until [`force_open`](Self::force_open) or [`reset`](Self::reset). Results are
    /// still counted, for whoever watches.
    pub fn force_closed(&mut self) {
        self.next_open_for = self.settings.open_for;
        self.restart(Phase::ForcedClosed);
    }

    /// Closed, with an empty window and `open_for` at its base. Calls under way count for nothing.
    pub fn reset(&mut self) {
        self.next_open_for = self.settings.open_for;
        self.restart(Phase::Closed);
    }

    /// What is so at `now`: an opening that has ended is half-open, even when no call has come since.
    pub fn snapshot(&mut self, now: Duration) -> Snapshot {
        self.advance(now);
        let counts = self.calls.counts(now);
        let (state, open_until) = match &self.phase {
            Phase::Closed => (State::Closed, None),
            Phase::Open { until } => (State::Open, Some(*until)),
            Phase::HalfOpen(_) => (State::HalfOpen, None),
            Phase::Recovering(_) => (State::Recovering, None),
            Phase::ForcedOpen => (State::ForcedOpen, None),
            Phase::ForcedClosed => (State::ForcedClosed, None),
        };
        Snapshot {
            state,
            calls: counts.calls,
            failures: counts.failures,
            slow: counts.slow,
            generation: self.generation,
            open_until,
        }
    }

    /// The steps that time alone takes.
    fn advance(&mut self, now: Duration) {
        match &mut self.phase {
            Phase::Closed | Phase::ForcedOpen | Phase::ForcedClosed => {}
            Phase::Open { until } => {
                if now >= *until {
                    self.restart(Phase::HalfOpen(Trial::default()));
                }
            }
            Phase::HalfOpen(trial) => {
                let timeout = self.settings.half_open.probe_timeout;
                trial
                    .slots
                    .retain(|slot| now.saturating_sub(slot.since) < timeout);
            }
            Phase::Recovering(ramp) => {
                if now.saturating_sub(ramp.since) >= self.settings.recover_over {
                    // Same generation: a call that the ramp admitted says as much about the upstream now.
                    self.phase = Phase::Closed;
                    self.next_open_for = self.settings.open_for;
                }
            }
        }
    }

    /// Whether what was recorded last is reason to open. Reads the window as of the last push.
    fn trips(&self) -> bool {
        let limit = self.settings.consecutive_failures;
        if limit > 0 && self.consecutive_failures >= limit {
            return true;
        }
        let Counts {
            calls,
            failures,
            slow,
        } = self.calls.sums();
        calls >= u64::from(self.settings.minimum_calls)
            && (reaches(failures, calls, self.settings.failure_rate)
                || self
                    .settings
                    .slow_call
                    .is_some_and(|limit| reaches(slow, calls, limit.rate)))
    }

    fn open(&mut self, now: Duration, jitter_unit: f64) {
        let open_for = self.next_open_for;
        let until = now.saturating_add(self.jittered(open_for, jitter_unit));
        self.next_open_for = open_for.saturating_mul(2).min(self.settings.max_open_for);
        // The window stays, to show what tripped it.
        self.phase = Phase::Open { until };
        self.generation = self.generation.wrapping_add(1);
    }

    /// Enters `phase` with nothing remembered.
    fn restart(&mut self, phase: Phase) {
        self.phase = phase;
        self.generation = self.generation.wrapping_add(1);
        self.calls = Calls::new(self.settings.window);
        self.consecutive_failures = 0;
    }

    fn jittered(&self, wait: Duration, jitter_unit: f64) -> Duration {
        let share = self.settings.jitter * unit(jitter_unit, 0.0);
        // What no Duration holds is longer than any process lives.
        let extra =
            Duration::try_from_secs_f64(wait.as_secs_f64() * share).unwrap_or(Duration::MAX);
        wait.saturating_add(extra)
    }
}

#[derive(Debug)]
enum Phase {
    Closed,
    Open { until: Duration },
    HalfOpen(Trial),
    Recovering(Ramp),
    ForcedOpen,
    ForcedClosed,
}

/// Half-open: probes under way and what the others said. Slots and results together never exceed `probes`, so that the
/// upstream sees no more calls than the verdict needs.
#[derive(Debug, Default)]
struct Trial {
    slots: Vec<Slot>,
    next_id: u64,
    succeeded: u32,
    failed: u32,
}

#[derive(Debug)]
struct Slot {
    id: u64,
    since: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Undecided,
}

impl Trial {
    /// The id of the slot taken, or how long until the oldest probe times out.
    fn enter(&mut self, limits: &HalfOpen, now: Duration) -> Result<u64, Duration> {
        let taken = self.slots.len() as u64 + u64::from(self.succeeded) + u64::from(self.failed);
        if taken >= u64::from(limits.probes) {
            let oldest = self.slots.iter().map(|slot| slot.since).min();
            return Err(oldest.map_or(Duration::ZERO, |since| {
                since
                    .saturating_add(limits.probe_timeout)
                    .saturating_sub(now)
            }));
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.slots.push(Slot { id, since: now });
        Ok(id)
    }

    /// Whether the probe held a slot until now.
    fn free(&mut self, id: u64) -> bool {
        let found = self.slots.iter().position(|slot| slot.id == id);
        if let Some(index) = found {
            self.slots.swap_remove(index);
        }
        found.is_some()
    }

    fn count(&mut self, call: Call) {
        if call.failed || call.slow {
            self.failed += 1;
        } else {
            self.succeeded += 1;
        }
    }

    /// Decided as soon as the probes still to come cannot change it, hence always after `probes` results.
    fn verdict(&self, limits: &HalfOpen) -> Verdict {
        let passes = |good: u32| {
            reaches(
                u64::from(good),
                u64::from(limits.probes),
                limits.success_rate,
            )
        };
        let best = limits.probes.saturating_sub(self.failed);
        if passes(self.succeeded) {
            Verdict::Passed
        } else if passes(best) {
            Verdict::Undecided
        } else {
            Verdict::Failed
        }
    }
}

/// Recovering: admits a share that grows in a straight line from 1/(probes + 1) to 1. Error diffusion, as in dithering:
/// each call adds the share to the credit, and a call that makes it whole spends 1.
#[derive(Debug)]
struct Ramp {
    since: Duration,
    credit: f64,
}

impl Ramp {
    /// None when admitted, else how long until all are.
    fn enter(&mut self, settings: &Settings, now: Duration) -> Option<Duration> {
        let elapsed = now.saturating_sub(self.since);
        // Not zero by zero: a ramp of no length has ended before anyone enters.
        let done = elapsed.as_secs_f64() / settings.recover_over.as_secs_f64();
        let first = 1.0 / (f64::from(settings.half_open.probes) + 1.0);
        self.credit += first + (1.0 - first) * done;
        if self.credit >= 1.0 {
            self.credit -= 1.0;
            None
        } else {
            Some(settings.recover_over.saturating_sub(elapsed))
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Call {
    failed: bool,
    slow: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    calls: u64,
    failures: u64,
    slow: u64,
}

impl Counts {
    fn add(&mut self, call: Call) {
        self.calls += 1;
        self.failures += u64::from(call.failed);
        self.slow += u64::from(call.slow);
    }

    fn subtract(&mut self, gone: Counts) {
        self.calls -= gone.calls;
        self.failures -= gone.failures;
        self.slow -= gone.slow;
    }
}

const BUCKETS: usize = 10;

/// The calls of the window, with their sums kept as they come and go.
#[derive(Debug)]
enum Calls {
    Time {
        /// Nanoseconds per bucket, at least 1.
        width: u128,
        /// The newest step seen, in widths since the origin; step `n` lives in bucket `n % BUCKETS`.
        newest: u128,
        buckets: Box<[Counts; BUCKETS]>,
        sums: Counts,
    },
    Count {
        size: usize,
        ring: VecDeque<Call>,
        sums: Counts,
    },
}

impl Calls {
    fn new(window: Window) -> Self {
        match window {
            Window::Time(length) => Calls::Time {
                width: (length.as_nanos() / BUCKETS as u128).max(1),
                newest: 0,
                buckets: Box::new([Counts::default(); BUCKETS]),
                sums: Counts::default(),
            },
            Window::Count(size) => Calls::Count {
                size: size as usize,
                ring: VecDeque::new(),
                sums: Counts::default(),
            },
        }
    }

    fn push(&mut self, call: Call, now: Duration) {
        self.forget(now);
        match self {
            Calls::Time {
                newest,
                buckets,
                sums,
                ..
            } => {
                buckets[bucket(*newest)].add(call);
                sums.add(call);
            }
            Calls::Count { size, ring, sums } => {
                if ring.len() >= *size
                    && let Some(oldest) = ring.pop_front()
                {
                    let mut gone = Counts::default();
                    gone.add(oldest);
                    sums.subtract(gone);
                }
                ring.push_back(call);
                sums.add(call);
            }
        }
    }

    fn counts(&mut self, now: Duration) -> Counts {
        self.forget(now);
        self.sums()
    }

    fn sums(&self) -> Counts {
        match self {
            Calls::Time { sums, .. } | Calls::Count { sums, .. } => *sums,
        }
    }

    /// Empties the buckets that have left the window at `now`.
    fn forget(&mut self, now: Duration) {
        match self {
            Calls::Time {
                width,
                newest,
                buckets,
                sums,
            } => {
                let step = now.as_nanos() / *width;
                // A `now` of the past counts as the newest step.
                let passed = step.saturating_sub(*newest).min(BUCKETS as u128);
                for back in 0..passed {
                    let gone = std::mem::take(&mut buckets[bucket(step - back)]);
                    sums.subtract(gone);
                }
                *newest = step.max(*newest);
            }
            Calls::Count { .. } => {}
        }
    }
}

fn bucket(step: u128) -> usize {
    (step % BUCKETS as u128) as usize
}

/// Whether `part` of `whole` is a share of at least `rate`, and not nothing. Divides, since 0.07 * 100 is more than 7.
fn reaches(part: u64, whole: u64, rate: f64) -> bool {
    part > 0 && part as f64 / whole as f64 >= rate
}

fn unit(value: f64, if_nan: f64) -> f64 {
    if value.is_nan() {
        if_nan
    } else {
        value.clamp(0.0, 1.0)
    }
}

fn sane(settings: Settings) -> Settings {
    let (window, most_calls) = match settings.window {
        Window::Time(length) => (Window::Time(length), u32::MAX),
        Window::Count(size) => (Window::Count(size.max(1)), size.max(1)),
    };
    Settings {
        window,
        minimum_calls: settings.minimum_calls.clamp(1, most_calls),
        failure_rate: unit(settings.failure_rate, 1.0),
        consecutive_failures: settings.consecutive_failures,
        slow_call: settings.slow_call.map(|slow| SlowCall {
            rate: unit(slow.rate, 1.0),
            ..slow
        }),
        open_for: settings.open_for,
        max_open_for: settings.max_open_for.max(settings.open_for),
        jitter: if settings.jitter.is_finite() {
            settings.jitter.max(0.0)
        } else {
            0.0
        },
        half_open: HalfOpen {
            probes: settings.half_open.probes.max(1),
            success_rate: unit(settings.half_open.success_rate, 1.0),
            // Zero would free every slot at once, and so admit any number of probes.
            probe_timeout: settings
                .half_open
                .probe_timeout
                .max(Duration::from_nanos(1)),
        },
        recover_over: settings.recover_over,
    }
}

#[cfg(test)]
mod tests {
    use super::Outcome::{Failure, Success};
    use super::*;
    use proptest::prelude::*;

    const FAST: Duration = Duration::from_millis(1);

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn settings() -> Settings {
        Settings {
            window: Window::Count(10),
            minimum_calls: 4,
            failure_rate: 0.5,
            consecutive_failures: 0,
            slow_call: None,
            open_for: secs(10),
            max_open_for: secs(60),
            jitter: 0.0,
            half_open: HalfOpen {
                probes: 2,
                success_rate: 1.0,
                probe_timeout: secs(5),
            },
            recover_over: secs(20),
        }
    }

    fn call(breaker: &mut Breaker, outcome: Outcome, elapsed: Duration, now: Duration) {
        let permit = breaker.try_enter(now, 0.0).expect("admitted");
        breaker.record(permit, outcome, elapsed, now, 0.0);
    }

    fn calls(breaker: &mut Breaker, outcomes: &[Outcome], now: Duration) {
        for outcome in outcomes {
            call(breaker, *outcome, FAST, now);
        }
    }

    fn state(breaker: &mut Breaker, now: Duration) -> State {
        breaker.snapshot(now).state
    }

    /// A breaker that opened at zero.
    fn opened(settings: Settings) -> Breaker {
        let mut breaker = Breaker::new(settings);
        while state(&mut breaker, Duration::ZERO) == State::Closed {
            call(&mut breaker, Failure, FAST, Duration::ZERO);
        }
        breaker
    }

    #[test]
    fn failure_rate_trips_once_minimum_calls_are_in_the_window() {
        let check = |outcomes: &[Outcome], expected| {
            let mut breaker = Breaker::new(settings());
            calls(&mut breaker, outcomes, secs(0));
            assert_eq!(state(&mut breaker, secs(0)), expected, "{outcomes:?}");
        };
        check(&[Failure, Failure, Failure], State::Closed);
        check(&[Failure, Failure, Success, Success], State::Open);
        check(&[Failure, Success, Success, Success], State::Closed);
        check(
            &[Failure, Success, Success, Success, Failure],
            State::Closed,
        );
        check(&[Success, Success, Success, Success], State::Closed);
    }

    #[test]
    fn rate_that_is_met_exactly_trips_despite_floating_point() {
        let mut breaker = Breaker::new(Settings {
            window: Window::Count(100),
            minimum_calls: 100,
            failure_rate: 0.07,
            ..settings()
        });
        calls(&mut breaker, &[Success; 93], secs(0));
        calls(&mut breaker, &[Failure; 7], secs(0));
        assert_eq!(state(&mut breaker, secs(0)), State::Open);
    }

    #[test]
    fn minimum_calls_beyond_a_count_window_means_a_full_window() {
        let mut breaker = Breaker::new(Settings {
            minimum_calls: 1000,
            ..settings()
        });
        calls(&mut breaker, &[Failure; 10], secs(0));
        assert_eq!(state(&mut breaker, secs(0)), State::Open);
    }

    #[test]
    fn consecutive_failures_trip_below_minimum_calls() {
        let mut breaker = Breaker::new(Settings {
            consecutive_failures: 3,
            minimum_calls: 10,
            ..settings()
        });
        calls(
            &mut breaker,
            &[Failure, Failure, Success, Failure, Failure],
            secs(0),
        );
        assert_eq!(state(&mut breaker, secs(0)), State::Closed);
        calls(&mut breaker, &[Failure], secs(0));
        assert_eq!(state(&mut breaker, secs(0)), State::Open);
    }

    #[test]
    fn slow_calls_trip_even_when_they_succeed() {
        let mut breaker = Breaker::new(Settings {
            slow_call: Some(SlowCall {
                duration: secs(1),
                rate: 0.5,
            }),
            ..settings()
        });
        // As long as the limit is not yet longer.
        for elapsed in [FAST, secs(1), secs(2)] {
            call(&mut breaker, Success, elapsed, secs(0));
        }
        assert_eq!(state(&mut breaker, secs(0)), State::Closed);
        call(&mut breaker, Success, secs(2), secs(0));
        let snapshot = breaker.snapshot(secs(0));
        assert_eq!(
            (snapshot.state, snapshot.slow, snapshot.failures),
            (State::Open, 2, 0)
        );
    }

    #[test]
    fn slow_probe_did_not_succeed() {
        let mut breaker = opened(Settings {
            slow_call: Some(SlowCall {
                duration: secs(1),
                rate: 1.0,
            }),
            ..settings()
        });
        call(&mut breaker, Success, secs(2), secs(10));
        assert_eq!(state(&mut breaker, secs(10)), State::Open);
    }

    #[test]
    fn time_window_forgets_in_tenths() {
        let mut breaker = Breaker::new(Settings {
            window: Window::Time(secs(10)),
            minimum_calls: 4,
            ..settings()
        });
        calls(&mut breaker, &[Failure, Failure, Failure], secs(0));
        assert_eq!(breaker.snapshot(Duration::from_millis(9_999)).calls, 3);
        assert_eq!(breaker.snapshot(secs(10)).calls, 0);
        calls(&mut breaker, &[Failure], secs(10));
        assert_eq!(state(&mut breaker, secs(10)), State::Closed);
    }

    #[test]
    fn open_refuses_until_its_end_and_says_when() {
        let mut breaker = opened(settings());
        assert_eq!(breaker.snapshot(secs(3)).open_until, Some(secs(10)));
        assert_eq!(
            breaker.try_enter(secs(3), 0.0),
            Err(Refused {
                retry_after: secs(7)
            })
        );
        assert!(breaker.try_enter(secs(10), 0.0).is_ok_and(|p| p.is_probe()));
    }

    #[test]
    fn open_keeps_the_numbers_that_tripped_it() {
        let snapshot = opened(settings()).snapshot(secs(1));
        assert_eq!((snapshot.calls, snapshot.failures), (4, 4));
    }

    #[test]
    fn jitter_lengthens_the_opening_and_the_retry() {
        let mut breaker = Breaker::new(Settings {
            jitter: 0.5,
            consecutive_failures: 1,
            ..settings()
        });
        let permit = breaker.try_enter(secs(0), 0.0).expect("closed");
        breaker.record(permit, Failure, FAST, secs(0), 0.5);
        assert_eq!(
            breaker.snapshot(secs(0)).open_until,
            Some(Duration::from_millis(12_500))
        );
        let retry_after = breaker.try_enter(Duration::from_millis(2_500), 1.0);
        assert_eq!(
            retry_after,
            Err(Refused {
                retry_after: secs(15)
            })
        );
    }

    #[test]
    fn reopening_doubles_up_to_the_maximum_and_recovery_resets_it() {
        let mut breaker = opened(settings());
        let mut now = secs(0);
        for expected in [10, 20, 40, 60, 60] {
            let until = breaker.snapshot(now).open_until.expect("open");
            assert_eq!(until - now, secs(expected));
            now = until;
            call(&mut breaker, Failure, FAST, now);
        }
        now = breaker.snapshot(now).open_until.expect("open");
        calls(&mut breaker, &[Success, Success], now);
        now += secs(20);
        assert_eq!(state(&mut breaker, now), State::Closed);
        calls(&mut breaker, &[Failure; 4], now);
        assert_eq!(breaker.snapshot(now).open_until, Some(now + secs(10)));
    }

    #[test]
    fn trip_while_recovering_doubles_too() {
        let mut breaker = opened(Settings {
            consecutive_failures: 1,
            ..settings()
        });
        calls(&mut breaker, &[Success, Success], secs(10));
        let now = secs(29);
        while state(&mut breaker, now) == State::Recovering {
            if let Ok(permit) = breaker.try_enter(now, 0.0) {
                breaker.record(permit, Failure, FAST, now, 0.0);
            }
        }
        assert_eq!(breaker.snapshot(now).open_until, Some(now + secs(20)));
    }

    #[test]
    fn probes_are_judged_as_soon_as_the_rest_cannot_matter() {
        let check = |outcomes: &[Outcome], expected| {
            let mut breaker = opened(Settings {
                half_open: HalfOpen {
                    probes: 4,
                    success_rate: 0.5,
                    probe_timeout: secs(5),
                },
                ..settings()
            });
            calls(&mut breaker, outcomes, secs(10));
            assert_eq!(state(&mut breaker, secs(10)), expected, "{outcomes:?}");
        };
        check(&[Success], State::HalfOpen);
        check(&[Success, Success], State::Recovering);
        check(&[Failure, Failure], State::HalfOpen);
        check(&[Failure, Failure, Failure], State::Open);
        check(&[Failure, Failure, Success, Success], State::Recovering);
        check(&[Failure, Failure, Success, Failure], State::Open);
    }

    #[test]
    fn success_rate_of_zero_still_needs_one_success() {
        let mut breaker = opened(Settings {
            half_open: HalfOpen {
                probes: 2,
                success_rate: 0.0,
                probe_timeout: secs(5),
            },
            ..settings()
        });
        calls(&mut breaker, &[Failure, Failure], secs(10));
        assert_eq!(state(&mut breaker, secs(10)), State::Open);
    }

    #[test]
    fn probe_slots_are_freed_by_release_and_by_timeout() {
        let mut breaker = opened(settings());
        let first = breaker.try_enter(secs(10), 0.0).expect("a slot");
        let second = breaker.try_enter(secs(12), 0.0).expect("a slot");
        assert_eq!(
            breaker.try_enter(secs(13), 0.0),
            Err(Refused {
                retry_after: secs(2)
            })
        );
        breaker.release(second);
        breaker.release(second);
        assert!(breaker.try_enter(secs(13), 0.0).is_ok());
        assert!(breaker.try_enter(secs(13), 0.0).is_err());
        assert!(breaker.try_enter(secs(15), 0.0).is_ok());
        // The first has lost its slot: its failure says nothing any more.
        breaker.record(first, Failure, secs(5), secs(15), 0.0);
        assert_eq!(state(&mut breaker, secs(15)), State::HalfOpen);
    }

    #[test]
    fn probe_counts_once() {
        let mut breaker = opened(settings());
        let permit = breaker.try_enter(secs(10), 0.0).expect("a slot");
        breaker.record(permit, Success, FAST, secs(10), 0.0);
        breaker.record(permit, Success, FAST, secs(10), 0.0);
        assert_eq!(state(&mut breaker, secs(10)), State::HalfOpen);
    }

    #[test]
    fn ramp_admits_a_growing_share() {
        let mut breaker = opened(settings());
        calls(&mut breaker, &[Success, Success], secs(10));
        let mut admitted = |now| {
            (0..300)
                .filter(|_| breaker.try_enter(now, 0.0).is_ok())
                .count()
        };
        for (now, expected) in [(secs(10), 100), (secs(15), 150), (secs(20), 200)] {
            assert!(admitted(now).abs_diff(expected) <= 1, "at {now:?}");
        }
        assert_eq!(admitted(secs(30)), 300);
    }

    #[test]
    fn no_ramp_closes_at_once() {
        let mut breaker = opened(Settings {
            recover_over: Duration::ZERO,
            ..settings()
        });
        calls(&mut breaker, &[Success, Success], secs(10));
        assert_eq!(state(&mut breaker, secs(10)), State::Closed);
    }

    #[test]
    fn result_of_a_call_the_ramp_admitted_counts_after_it_closed() {
        let mut breaker = opened(settings());
        calls(&mut breaker, &[Success, Success], secs(10));
        let permit = breaker.try_enter(secs(29), 0.0).expect("most are admitted");
        breaker.record(permit, Failure, FAST, secs(31), 0.0);
        let snapshot = breaker.snapshot(secs(31));
        assert_eq!((snapshot.state, snapshot.failures), (State::Closed, 1));
    }

    #[test]
    fn forced_states_hold_until_reset() {
        let mut breaker = Breaker::new(settings());
        breaker.force_open();
        assert!(breaker.try_enter(secs(1_000_000), 0.0).is_err());
        assert_eq!(state(&mut breaker, secs(1_000_000)), State::ForcedOpen);
        breaker.force_closed();
        calls(&mut breaker, &[Failure; 50], secs(0));
        let snapshot = breaker.snapshot(secs(0));
        assert_eq!(
            (snapshot.state, snapshot.failures),
            (State::ForcedClosed, 10)
        );
        breaker.reset();
        let snapshot = breaker.snapshot(secs(0));
        assert_eq!((snapshot.state, snapshot.calls), (State::Closed, 0));
    }

    #[test]
    fn states_have_the_names_of_the_metrics() {
        let names = [
            (State::Closed, "closed"),
            (State::Open, "open"),
            (State::HalfOpen, "half_open"),
            (State::Recovering, "recovering"),
            (State::ForcedOpen, "forced_open"),
            (State::ForcedClosed, "forced_closed"),
        ];
        for (state, name) in names {
            assert_eq!(state.as_str(), name);
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Enter,
        Record(prop::sample::Index, bool, Duration),
        Release(prop::sample::Index),
        Wait(Duration),
        ForceOpen,
        ForceClosed,
        Reset,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            12 => Just(Op::Enter),
            10 => (any::<prop::sample::Index>(), prop::bool::weighted(0.4), 0..3_000u64)
                .prop_map(|(i, good, ms)| Op::Record(i, good, Duration::from_millis(ms))),
            2 => any::<prop::sample::Index>().prop_map(Op::Release),
            6 => (0..8_000u64).prop_map(|ms| Op::Wait(Duration::from_millis(ms))),
        ];
        prop::collection::vec(op, 0..200)
    }

    fn forced_ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            10 => ops(),
            1 => Just(vec![Op::ForceOpen]),
            1 => Just(vec![Op::ForceClosed]),
            1 => Just(vec![Op::Reset]),
        ];
        prop::collection::vec(op, 0..4).prop_map(|parts| parts.concat())
    }

    fn any_settings() -> impl Strategy<Value = Settings> {
        let window = prop_oneof![
            (1..30u32).prop_map(Window::Count),
            (1..30u64).prop_map(|s| Window::Time(secs(s))),
        ];
        (
            (window, 1..6u32, 0.05..=1.0f64, 0..4u32),
            prop::option::of((0..3_000u64, 0.05..=1.0f64)),
            (0..10u64, 0..60u64, 0.0..1.0f64),
            (1..5u32, 0.0..=1.0f64, 1..10u64, 0..20u64),
        )
            .prop_map(|(trip, slow, open, half)| Settings {
                window: trip.0,
                minimum_calls: trip.1,
                failure_rate: trip.2,
                consecutive_failures: trip.3,
                slow_call: slow.map(|(ms, rate)| SlowCall {
                    duration: Duration::from_millis(ms),
                    rate,
                }),
                open_for: secs(open.0),
                max_open_for: secs(open.1),
                jitter: open.2,
                half_open: HalfOpen {
                    probes: half.0,
                    success_rate: half.1,
                    probe_timeout: secs(half.2),
                },
                recover_over: secs(half.3),
            })
    }

    /// A breaker under random use, with the permits handed out and when.
    struct Rig {
        breaker: Breaker,
        now: Duration,
        held: Vec<(Permit, Duration)>,
        spent: Vec<Permit>,
    }

    impl Rig {
        fn new(settings: Settings) -> Self {
            Rig {
                breaker: Breaker::new(settings),
                now: Duration::ZERO,
                held: Vec::new(),
                spent: Vec::new(),
            }
        }

        fn run(&mut self, op: &Op) {
            match op {
                Op::Enter => {
                    if let Ok(permit) = self.breaker.try_enter(self.now, 0.5) {
                        self.held.push((permit, self.now));
                    }
                }
                Op::Record(index, good, elapsed) => {
                    if let Some(permit) = self.take(index) {
                        let outcome = if *good { Success } else { Failure };
                        self.breaker
                            .record(permit, outcome, *elapsed, self.now, 0.5);
                    }
                }
                Op::Release(index) => {
                    if let Some(permit) = self.take(index) {
                        self.breaker.release(permit);
                    }
                }
                Op::Wait(time) => self.now = self.now.saturating_add(*time),
                Op::ForceOpen => self.breaker.force_open(),
                Op::ForceClosed => self.breaker.force_closed(),
                Op::Reset => self.breaker.reset(),
            }
        }

        fn take(&mut self, index: &prop::sample::Index) -> Option<Permit> {
            if self.held.is_empty() {
                return None;
            }
            let (permit, _) = self.held.swap_remove(index.index(self.held.len()));
            self.spent.push(permit);
            Some(permit)
        }

        /// Everything there is to see, inner state included.
        fn view(&mut self) -> String {
            self.breaker.snapshot(self.now);
            format!("{:?}", self.breaker)
        }
    }

    proptest! {
        #[test]
        fn half_open_never_has_more_probes_outstanding_than_allowed(
            settings in any_settings(), ops in forced_ops()
        ) {
            let limits = settings.half_open;
            let mut rig = Rig::new(settings);
            for op in &ops {
                rig.run(op);
                let snapshot = rig.breaker.snapshot(rig.now);
                let outstanding = rig.held.iter().filter(|(permit, since)| {
                    permit.generation() == snapshot.generation
                        && permit.is_probe()
                        && rig.now - *since < limits.probe_timeout
                }).count();
                prop_assert!(outstanding <= limits.probes as usize);
                if snapshot.state != State::HalfOpen {
                    prop_assert_eq!(outstanding, 0);
                }
            }
        }

        #[test]
        fn open_admits_none_before_its_end(settings in any_settings(), ops in forced_ops()) {
            let mut rig = Rig::new(settings);
            for op in &ops {
                rig.run(op);
                if let Some(until) = rig.breaker.snapshot(rig.now).open_until {
                    prop_assert!(rig.now < until);
                    let last = until - Duration::from_nanos(1);
                    for now in [rig.now, rig.now + (until - rig.now) / 2, last] {
                        let refused = rig.breaker.try_enter(now, 0.0);
                        prop_assert_eq!(refused, Err(Refused { retry_after: until - now }));
                    }
                }
            }
        }

        #[test]
        fn window_sums_equal_a_naive_model(
            window in prop_oneof![
                (1..30u32).prop_map(Window::Count),
                (10..30_000u64).prop_map(|ms| Window::Time(Duration::from_millis(ms))),
            ],
            pushes in prop::collection::vec((0..5_000u64, any::<bool>(), any::<bool>(), 0..4u8), 0..200),
        ) {
            let mut calls = Calls::new(window);
            let mut all: Vec<(Duration, Call)> = Vec::new();
            let mut now = Duration::ZERO;
            for (wait, failed, slow, same) in pushes {
                if same == 0 {
                    now += Duration::from_millis(wait);
                }
                let call = Call { failed, slow };
                calls.push(call, now);
                all.push((now, call));
                let mut expected = Counts::default();
                match window {
                    Window::Count(size) => {
                        let size = size as usize;
                        all.iter().rev().take(size).for_each(|(_, call)| expected.add(*call));
                    }
                    Window::Time(length) => {
                        let width = length.as_nanos() / 10;
                        let step = now.as_nanos() / width;
                        all.iter()
                            .filter(|(at, _)| at.as_nanos() / width + 10 > step)
                            .for_each(|(_, call)| expected.add(*call));
                    }
                }
                prop_assert_eq!(calls.counts(now), expected);
            }
        }

        #[test]
        fn enough_time_and_successes_close_it(settings in any_settings(), ops in ops()) {
            let probes = settings.half_open.probes;
            let mut rig = Rig::new(settings);
            for op in &ops {
                rig.run(op);
            }
            // Steps longer than any opening, probe, window or ramp; what is held stays held. More successes than a window
            // holds, since failures already in it may trip once more as soon as `minimum_calls` are there.
            for _ in 0..40 {
                rig.now += secs(1_000);
                for _ in 0..probes {
                    if let Ok(permit) = rig.breaker.try_enter(rig.now, 0.0) {
                        rig.breaker.record(permit, Success, Duration::ZERO, rig.now, 0.0);
                    }
                }
            }
            rig.now += secs(1_000);
            prop_assert_eq!(rig.breaker.snapshot(rig.now).state, State::Closed);
            prop_assert!(rig.breaker.try_enter(rig.now, 0.0).is_ok());
        }

        #[test]
        fn late_results_change_nothing(settings in any_settings(), ops in forced_ops()) {
            let timeout = settings.half_open.probe_timeout;
            let mut rig = Rig::new(settings);
            for op in &ops {
                rig.run(op);
                let before = rig.view();
                let generation = rig.breaker.snapshot(rig.now).generation;
                let old = |permit: &Permit| permit.generation() != generation;
                let late: Vec<Permit> = rig.held.iter()
                    .filter(|(permit, since)| {
                        old(permit) || permit.is_probe() && rig.now - *since >= timeout
                    })
                    .map(|(permit, _)| *permit)
                    .chain(rig.spent.iter().filter(|p| old(p) || p.is_probe()).copied())
                    .collect();
                for permit in late {
                    rig.breaker.record(permit, Failure, secs(9), rig.now, 0.0);
                    rig.breaker.record(permit, Success, secs(0), rig.now, 0.0);
                    rig.breaker.release(permit);
                }
                prop_assert_eq!(rig.view(), before);
            }
        }

        #[test]
        fn extreme_values_never_panic(
            durations in prop::collection::vec(extreme_duration(), 7),
            rates in prop::collection::vec(extreme_float(), 5),
            sizes in prop::collection::vec(prop::sample::select(vec![0, 1, 2, u32::MAX]), 4),
            by_count in any::<bool>(),
            steps in prop::collection::vec(
                (extreme_duration(), extreme_duration(), any::<bool>(), extreme_float()), 0..60),
        ) {
            let mut breaker = Breaker::new(Settings {
                window: if by_count { Window::Count(sizes[0]) } else { Window::Time(durations[0]) },
                minimum_calls: sizes[1],
                failure_rate: rates[0],
                consecutive_failures: sizes[2],
                slow_call: Some(SlowCall { duration: durations[1], rate: rates[1] }),
                open_for: durations[2],
                max_open_for: durations[3],
                jitter: rates[2],
                half_open: HalfOpen {
                    probes: sizes[3],
                    success_rate: rates[3],
                    probe_timeout: durations[4],
                },
                recover_over: durations[5],
            });
            // `now` also runs backwards.
            for (now, elapsed, good, jitter_unit) in steps {
                if let Ok(permit) = breaker.try_enter(now, jitter_unit) {
                    let outcome = if good { Success } else { Failure };
                    breaker.record(permit, outcome, elapsed, now, jitter_unit);
                }
                breaker.snapshot(elapsed);
            }
        }
    }

    fn extreme_duration() -> impl Strategy<Value = Duration> {
        prop_oneof![
            Just(Duration::ZERO),
            Just(Duration::from_nanos(1)),
            Just(secs(1)),
            Just(Duration::MAX - Duration::from_nanos(1)),
            Just(Duration::MAX),
            (any::<u64>(), 0..1_000_000_000u32).prop_map(|(s, n)| Duration::new(s, n)),
        ]
    }

    fn extreme_float() -> impl Strategy<Value = f64> {
        prop_oneof![
            Just(0.0),
            Just(0.5),
            Just(1.0),
            Just(-1.0),
            Just(f64::MAX),
            Just(f64::NAN),
            Just(f64::INFINITY),
            Just(f64::NEG_INFINITY),
        ]
    }
}
