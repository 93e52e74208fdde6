//! A circuit breaker as a state machine: whether a call may go upstream, and what its result means. Owns the window of
//! results, the probes and the ramp. Must not do I/O, read a clock or draw a random number: `now` is time since one
//! origin of the process, and `draw` a random number from 0 to 1.
//!
//! ```text
//! closed --trip--> open --until--> half-open --probes pass--> recovering --recover_over--> closed
//!                   ^                  |                          |
//!                   +--- probes fail --+--------- trip -----------+
//! ```
//!
//! The states are those of Nygard, "Release It!"; the ramp after them is the slow start of load balancers.

mod half_open;
pub mod shared;
mod window;

use std::time::Duration;

pub use crate::config::breakers::{HalfOpen, Settings, SlowCall, Window};
use half_open::{HalfOpenProbes, Leg, Ramp, Verdict};
use window::{Call, Calls, Counts, reaches};

/// The right to one call. Give it back once, to [`Breaker::record`] or [`Breaker::release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permit {
    /// Which span of the breaker's life admitted the call; only results of the current one count.
    generation: u64,
    probe: Option<u64>,
}

impl Permit {
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
    /// Whether it was forced open: it ends when an operator says so.
    pub is_forced: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOutcome {
    Success,
    Failure,
}

/// How far a probe has come. Each stage may last `probe_timeout`, counted anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It waits for its turn, or for what its client sends: once its time is over its slot is free, and it says nothing.
    Waiting,
    /// The upstream works on it: once its time is over it has failed.
    Working,
    /// It would end so, were it over with the response's head, after this time: once its own is over it has. How long a response
    /// is, and how fast it is read, says nothing of the upstream.
    Answered(CallOutcome, Duration),
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
    pub const ALL: [State; 6] = [
        State::Closed,
        State::Open,
        State::HalfOpen,
        State::Recovering,
        State::ForcedOpen,
        State::ForcedClosed,
    ];

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

    /// That of this name.
    pub fn named(name: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.as_str() == name)
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
    /// Whether no result opens it, but for those of probes.
    frozen: bool,
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
            frozen: false,
            settings,
        }
    }

    /// Goes on in the state of `old`, which has other settings, with an empty window. What `old` has admitted is told to `old`.
    pub fn succeed(&mut self, old: &Breaker) {
        self.phase = match &old.phase {
            Phase::Closed => Phase::Closed,
            Phase::Open { until } => Phase::Open { until: *until },
            // It hears nothing of the probes under way.
            Phase::HalfOpen(_) => Phase::HalfOpen(HalfOpenProbes::default()),
            Phase::Recovering(ramp) => Phase::Recovering(Ramp::until(ramp.until)),
            Phase::ForcedOpen => Phase::ForcedOpen,
            Phase::ForcedClosed => Phase::ForcedClosed,
        };
        if old.next_open_for > old.settings.open_for {
            let (least, most) = (self.settings.open_for, self.settings.max_open_for);
            self.next_open_for = old.next_open_for.clamp(least, most);
        }
        self.generation = old.generation.wrapping_add(1);
    }

    /// Asks for one call. An admitted call must end in [`record`](Self::record) or [`release`](Self::release).
    pub fn try_enter(&mut self, now: Duration, draw: f64) -> Result<Permit, Refused> {
        self.advance(now, draw);
        let mut probe = None;
        let wait = match &mut self.phase {
            Phase::Closed | Phase::ForcedClosed => None,
            Phase::Open { until } => Some(until.saturating_sub(now)),
            Phase::ForcedOpen => Some(self.settings.max_open_for),
            Phase::HalfOpen(probes) => match probes.enter(&self.settings.half_open, now) {
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
                retry_after: self.jittered(wait, draw),
                is_forced: matches!(self.phase, Phase::ForcedOpen),
            }),
        }
    }

    /// Tells the result of an admitted call that took `elapsed`. One of an older generation, or of a probe that lost its
    /// slot, changes nothing.
    pub fn record(
        &mut self,
        permit: Permit,
        outcome: CallOutcome,
        elapsed: Duration,
        now: Duration,
        draw: f64,
    ) {
        self.advance(now, draw);
        if permit.generation != self.generation {
            return;
        }
        let call = Call::new(&self.settings, outcome, elapsed);
        match &mut self.phase {
            // No permit bears the generation of an opening.
            Phase::Open { .. } | Phase::ForcedOpen => {}
            Phase::ForcedClosed => self.calls.push(call, now),
            Phase::Closed | Phase::Recovering(_) => {
                self.count(call, now);
                if self.trips() && !self.frozen {
                    self.open(now, draw);
                }
            }
            Phase::HalfOpen(probes) => {
                if !permit.probe.is_some_and(|id| probes.free(id)) {
                    return;
                }
                probes.count(call);
                let verdict = probes.verdict(&self.settings.half_open);
                self.calls.push(call, now);
                match verdict {
                    Verdict::Undecided => {}
                    Verdict::Failed => self.open(now, draw),
                    Verdict::Passed => {
                        self.recover(now);
                        // Without a ramp it is closed at once.
                        self.advance(now, draw);
                    }
                }
            }
        }
    }

    /// Tells how far a probe has come, which is [`Stage::Working`] when it is admitted.
    pub fn come(&mut self, permit: Permit, stage: Stage, now: Duration, draw: f64) {
        self.advance(now, draw);
        let leg = Leg::of(stage, &self.settings);
        if permit.generation == self.generation
            && let (Phase::HalfOpen(probes), Some(id)) = (&mut self.phase, permit.probe)
        {
            probes.come(id, leg, now);
        }
    }

    /// Gives a permit back without a result, for a call that was abandoned through no fault of the upstream. A probe's
    /// slot is free again.
    pub fn release(&mut self, permit: Permit) {
        if permit.generation == self.generation
            && let (Phase::HalfOpen(probes), Some(id)) = (&mut self.phase, permit.probe)
        {
            probes.free(id);
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

    /// As of the last call of another method.
    pub fn state(&self) -> State {
        match &self.phase {
            Phase::Closed => State::Closed,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen(_) => State::HalfOpen,
            Phase::Recovering(_) => State::Recovering,
            Phase::ForcedOpen => State::ForcedOpen,
            Phase::ForcedClosed => State::ForcedClosed,
        }
    }

    /// What is so at `now`: an opening that has ended is half-open, even when no call has come since.
    pub fn snapshot(&mut self, now: Duration) -> Snapshot {
        self.advance(now, 0.0);
        let counts = self.calls.counts(now);
        let open_until = if let Phase::Open { until } = &self.phase {
            Some(*until)
        } else {
            None
        };
        Snapshot {
            state: self.state(),
            calls: counts.calls,
            failures: counts.failures,
            slow: counts.slow,
            generation: self.generation,
            open_until,
        }
    }

    fn count(&mut self, call: Call, now: Duration) {
        self.calls.push(call, now);
        self.consecutive_failures = match call.failed {
            false => 0,
            true => self.consecutive_failures.saturating_add(1),
        };
    }

    /// The steps that time alone takes, each at its own time, so that it does not matter when anyone looks.
    fn advance(&mut self, now: Duration, draw: f64) {
        loop {
            match &mut self.phase {
                Phase::Closed | Phase::ForcedOpen | Phase::ForcedClosed => return,
                Phase::Open { until } if now < *until => return,
                Phase::Open { .. } => self.restart(Phase::HalfOpen(HalfOpenProbes::default())),
                Phase::HalfOpen(probes) => {
                    // A probe without an end has one: an upstream that hangs must open the breaker again.
                    match probes.pass_time(&self.settings.half_open, now) {
                        (Verdict::Undecided, _) => return,
                        (Verdict::Failed, at) => self.open(at, draw),
                        (Verdict::Passed, at) => self.recover(at),
                    }
                }
                Phase::Recovering(ramp) => {
                    if now >= ramp.until {
                        // Same generation: a call that the ramp admitted says as much about the upstream now.
                        self.phase = Phase::Closed;
                        self.next_open_for = self.settings.open_for;
                    }
                    return;
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

    fn open(&mut self, now: Duration, draw: f64) {
        let open_for = self.next_open_for;
        let until = now.saturating_add(self.jittered(open_for, draw));
        self.next_open_for = open_for.saturating_mul(2).min(self.settings.max_open_for);
        // The window stays, to show what tripped it.
        self.phase = Phase::Open { until };
        self.generation = self.generation.wrapping_add(1);
    }

    fn recover(&mut self, now: Duration) {
        let until = now.saturating_add(self.settings.recover_over);
        self.restart(Phase::Recovering(Ramp::until(until)));
    }

    /// Enters `phase` with nothing remembered.
    fn restart(&mut self, phase: Phase) {
        self.phase = phase;
        self.generation = self.generation.wrapping_add(1);
        self.calls = Calls::new(self.settings.window);
        self.consecutive_failures = 0;
    }

    fn jittered(&self, wait: Duration, draw: f64) -> Duration {
        let share = self.settings.jitter * unit(draw, 0.0);
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
    HalfOpen(HalfOpenProbes),
    Recovering(Ramp),
    ForcedOpen,
    ForcedClosed,
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
mod tests;
