//! One process's part in a breaker that many share: what it lets pass by what it was told, what it reports, and what it does
//! while it is told nothing. The state is kept, and changed, by `lua/breaker_sync.lua` alone. As pure as [`Breaker`].
//!
//! A result counts for the generation that admitted its call, in a report to the same generation, and for nothing else.
//! Probes are slots that the script has given: held ahead of requests, since no request waits for Redis.

mod probes;
mod report;

use std::time::Duration;

use super::half_open::{self, Leg, Ramp};
use super::window::{Call, Calls, reaches};
use super::{
    Breaker, CallOutcome, HalfOpenProbes, Permit as LocalPermit, Phase, Refused, Settings,
    Snapshot, Stage, State,
};
pub use crate::config::breakers::OnLoss;
use crate::policy::peers::Peers;
use probes::{Probes, Ready};
pub use report::{Change, Delta, Reply, Report, Word};

/// Between two reports of a breaker in use, and how late a change is seen that no message told.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// Between two of one that is not.
const IDLE_REPORT_EVERY: Duration = Duration::from_secs(1);
/// After its last call, a breaker is not in use.
const IDLE_AFTER: Duration = Duration::from_secs(2);
/// Without an answer for this long, the process goes on by itself.
const LOST_AFTER: Duration = Duration::from_secs(1);
/// For how long after a report that named it a probe's slot may be used.
pub const HOLD: Duration = Duration::from_secs(3);
/// A probe's slot that its process names no more comes back after [`HOLD`], the probe's time and this: what its process
/// says of it may be on the way.
pub const SLOT_GRACE: Duration = Duration::from_secs(1);
/// A slot that other processes want is kept for a request at least this long.
const KEEP: Duration = Duration::from_millis(200);
/// For callers that come while a probe is asked for.
const SOON: Duration = Duration::from_millis(100);

/// The right to one call; as [`LocalPermit`], for both kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// By the process itself: of a local breaker, or while nothing is heard of a shared one.
    Local(LocalPermit),
    Shared {
        generation: u64,
        probe: Option<u64>,
    },
}

impl Permit {
    /// Whether the call holds one of the slots of half-open.
    pub fn is_probe(&self) -> bool {
        match self {
            Permit::Local(permit) => permit.is_probe(),
            Permit::Shared { probe, .. } => probe.is_some(),
        }
    }
}

/// A process's part in a shared breaker. Not shared by itself: the owner serialises access. Methods that return a `bool` say
/// whether a report is due at once.
#[derive(Debug)]
pub struct Member {
    settings: Settings,
    /// This process's own results; and the state, while nothing is heard of the shared one.
    own: Breaker,
    together: bool,
    view: View,
    ramp: Ramp,
    peers: Peers,
    delta: Delta,
    probes: Probes,
    last_slot: u64,
    /// Requests refused for want of a probe, or while open.
    demand: u32,
    starved: bool,
    /// Whether the next report is due at once.
    urgent: bool,
    /// Whether a report was urgent since this process by itself would open.
    told_trip: bool,
    flight: Option<Flight>,
    failing_since: Option<Duration>,
    last_report: Option<Duration>,
    last_call: Option<Duration>,
}

#[derive(Debug, Clone, Copy)]
struct View {
    generation: u64,
    state: State,
    /// When an opening or a ramp ends.
    until: Duration,
    calls: u64,
    failures: u64,
    slow: u64,
    processes: u64,
    doubters: u64,
}

/// A report without an answer yet.
#[derive(Debug)]
struct Flight {
    generation: u64,
    sent_at: Duration,
    delta: Delta,
    results: usize,
    held: Vec<u64>,
    demand: u32,
}

impl Member {
    /// Alone, and closed, until it is told the shared state.
    pub fn new(settings: Settings, on_loss: OnLoss) -> Member {
        let mut own = Breaker::new(settings);
        own.frozen = on_loss == OnLoss::Freeze;
        Member {
            settings: own.settings.clone(),
            own,
            together: false,
            view: View {
                generation: 0,
                state: State::Closed,
                until: Duration::ZERO,
                calls: 0,
                failures: 0,
                slow: 0,
                processes: 0,
                doubters: 0,
            },
            ramp: Ramp::until(Duration::ZERO),
            peers: Peers::default(),
            delta: Delta::default(),
            probes: Probes::default(),
            last_slot: 0,
            demand: 0,
            starved: false,
            urgent: true,
            told_trip: false,
            flight: None,
            failing_since: None,
            last_report: None,
            last_call: None,
        }
    }

    /// Goes on from what `old`, of other settings, has heard.
    pub fn succeed(&mut self, old: &Member) {
        self.together = old.together;
        self.view = old.view;
        self.ramp = Ramp::until(old.ramp.until);
        self.peers = old.peers;
        self.failing_since = old.failing_since;
        self.last_slot = old.last_slot;
        let running = old.probes.running.iter().chain(&old.probes.orphans);
        self.probes.orphans = running.copied().collect();
        if !old.together {
            self.own.succeed(&old.own);
        }
    }

    /// Goes on in the state of `old`, which was this process's alone, until it is told the shared one.
    pub fn succeed_local(&mut self, old: &Breaker) {
        self.own.succeed(old);
    }

    /// Has `new`, which is this process's alone, go on in the state that this goes by.
    pub fn hand_to_local(&self, new: &mut Breaker) {
        match self.together {
            true => new.take_over(&self.view),
            false => new.succeed(&self.own),
        }
    }

    /// Whether it goes by the shared state.
    pub fn is_together(&self) -> bool {
        self.together
    }

    /// As [`Breaker::try_enter`].
    pub fn try_enter(&mut self, now: Duration, draw: f64) -> (Result<Permit, Refused>, bool) {
        let used = self.is_used(now);
        self.last_call = Some(now);
        if !self.together {
            return (self.own.try_enter(now, draw).map(Permit::Local), false);
        }
        // In use again, it is reported more often from now on.
        let mut wake = !used && self.urge();
        let mut probe = None;
        let wait = match self.view.state {
            State::Closed | State::ForcedClosed => None,
            State::ForcedOpen => Some(self.settings.max_open_for),
            State::Recovering => self.ramp.enter(&self.settings, now),
            State::Open => {
                self.demand = self.demand.saturating_add(1);
                let left = self.view.until.saturating_sub(now);
                wake |= left.is_zero() && self.urge();
                Some(left.max(SOON))
            }
            State::HalfOpen => match self.probes.start(now) {
                Some(id) => {
                    probe = Some(id);
                    None
                }
                None => {
                    self.demand = self.demand.saturating_add(1);
                    // Where there are no slots, to ask at once is to ask in vain.
                    wake |= !self.starved && self.urge();
                    Some(SOON)
                }
            },
        };
        let answer = match wait {
            None => Ok(Permit::Shared {
                generation: self.view.generation,
                probe,
            }),
            Some(wait) => Err(Refused {
                retry_after: self.own.jittered(wait, draw),
                is_forced: self.view.state == State::ForcedOpen,
            }),
        };
        (answer, wake)
    }

    /// As [`Breaker::record`].
    pub fn record(
        &mut self,
        permit: Permit,
        outcome: CallOutcome,
        elapsed: Duration,
        now: Duration,
        draw: f64,
    ) -> bool {
        let (generation, probe) = match permit {
            Permit::Local(permit) if !self.together => {
                self.own.record(permit, outcome, elapsed, now, draw);
                return false;
            }
            Permit::Shared { generation, probe } if self.together => (generation, probe),
            // It still has its slot, and is told when there is someone to tell.
            Permit::Shared {
                generation,
                probe: Some(id),
            } => (generation, Some(id)),
            // Admitted by another authority than the present one.
            Permit::Local(_) | Permit::Shared { probe: None, .. } => return false,
        };
        if generation != self.view.generation {
            return false;
        }
        let call = Call::new(&self.settings, outcome, elapsed);
        if let Some(id) = probe {
            if !self.probes.end(id) {
                return false;
            }
            self.probes.results.push((id, call.is_well()));
            if self.together {
                self.delta.add(call);
            }
            return self.together && self.urge();
        }
        self.delta.add(call);
        self.own.count(call, now);
        let trips = self.own.trips() && self.view.state != State::ForcedClosed;
        let tells = trips && !self.told_trip;
        self.told_trip = trips;
        tells && self.urge()
    }

    /// As [`Breaker::come`].
    pub fn come(&mut self, permit: Permit, stage: Stage, now: Duration, draw: f64) {
        match permit {
            Permit::Local(permit) => self.own.come(permit, stage, now, draw),
            Permit::Shared {
                generation,
                probe: Some(id),
            } if generation == self.view.generation => {
                let leg = Leg::of(stage, &self.settings);
                half_open::come(&mut self.probes.running, id, leg, now);
            }
            Permit::Shared { .. } => {}
        }
    }

    /// As [`Breaker::release`].
    pub fn release(&mut self, permit: Permit) -> bool {
        match permit {
            Permit::Local(permit) => self.own.release(permit),
            Permit::Shared {
                generation,
                probe: Some(id),
            } if generation == self.view.generation => {
                return self.probes.end(id) && self.together && self.urge();
            }
            Permit::Shared { .. } => {}
        }
        false
    }

    /// What is so at `now`, for whoever watches; the numbers are the fleet's while it goes by the shared state.
    pub fn snapshot(&mut self, now: Duration) -> Snapshot {
        if !self.together {
            return self.own.snapshot(now);
        }
        let View {
            generation,
            state,
            until,
            calls,
            failures,
            slow,
            ..
        } = self.view;
        Snapshot {
            state,
            calls,
            failures,
            slow,
            generation,
            open_until: (state == State::Open).then_some(until),
        }
    }

    /// Of the shared state as last heard.
    pub fn generation(&self) -> u64 {
        self.view.generation
    }

    /// Processes that share the breaker, and those that doubt the upstream, as last heard.
    pub fn processes(&self) -> (u64, u64) {
        (self.view.processes, self.view.doubters)
    }

    /// Until the next report is due.
    pub fn report_in(&self, now: Duration) -> Duration {
        let Some(last) = self.last_report.filter(|_| !self.urgent) else {
            return Duration::ZERO;
        };
        let busy = match self.view.state {
            State::HalfOpen => true,
            State::Open => self.demand > 0,
            State::Closed | State::Recovering | State::ForcedOpen | State::ForcedClosed => {
                self.is_used(now)
            }
        };
        let every = match busy || !self.together || self.failing_since.is_some() {
            true => REPORT_EVERY,
            false => IDLE_REPORT_EVERY,
        };
        let mut due = last + every;
        if self.together && self.view.state == State::Open {
            due = due.min(self.view.until.max(last + SOON / 10));
        }
        due.saturating_sub(now)
    }

    /// What to report. It must be followed by [`Member::answered`] or [`Member::unanswered`] before the next.
    pub fn report(&mut self, now: Duration) -> Report {
        self.urgent = false;
        self.last_report = Some(now);
        self.probes.expire(&self.settings, now);
        // Who may hear no answer would have slots that nobody uses.
        let may_probe = self.together && matches!(self.view.state, State::HalfOpen | State::Open);
        let spare = self.probes.ready.is_empty() && self.probes.running.is_empty();
        let demand = self.demand.min(self.settings.half_open.probes);
        let report = Report {
            known: Word {
                generation: self.view.generation,
                state: self.view.state,
                left: self.view.until.saturating_sub(now),
            },
            delta: std::mem::take(&mut self.delta),
            doubts: self.doubts(now),
            want: match may_probe {
                true => demand.max(u32::from(spare)),
                false => 0,
            },
            demanded: may_probe && demand > 0,
            held: self.probes.held(),
            last_slot: self.last_slot,
            results: self.probes.results.clone(),
            peers: self.peers.count(),
        };
        self.flight = Some(Flight {
            generation: self.view.generation,
            sent_at: now,
            delta: report.delta,
            results: report.results.len(),
            held: report.held.clone(),
            demand: self.demand,
        });
        report
    }

    /// The script has answered the report.
    pub fn answered(&mut self, reply: &Reply, now: Duration) -> Option<Change> {
        let flight = self.flight.take()?;
        self.failing_since = None;
        self.peers.told(reply.processes, now);
        let change = (!self.together).then_some(Change::Joined);
        self.last_slot = self.last_slot.max(reply.last_slot);
        if flight.generation == self.view.generation {
            self.probes.results.drain(..flight.results);
        }
        let (told, known) = (&reply.word, &self.view);
        // Two masters, one of them cut off, can give one number to two states; the one that answers now is right.
        let differs = told.generation == known.generation && told.state != known.state;
        if change.is_some() || differs || told.generation > known.generation {
            self.together = true;
            self.adopt(reply.word, now);
        }
        if reply.word.generation != self.view.generation {
            // A message was faster, and tells of later things.
            return change;
        }
        let (view, word) = (&mut self.view, reply.word);
        (view.calls, view.failures, view.slow) = (reply.calls, reply.failures, reply.slow);
        (view.processes, view.doubters) = (reply.processes, reply.doubters);
        if word.state == State::HalfOpen {
            let usable_until = flight.sent_at + HOLD;
            for ready in &mut self.probes.ready {
                if flight.held.contains(&ready.id) {
                    ready.usable_until = usable_until;
                }
            }
            self.probes
                .ready
                .extend(reply.probes.iter().map(|id| Ready {
                    id: *id,
                    since: now,
                    usable_until,
                }));
            let before = self.probes.ready.len();
            if reply.recall {
                self.probes.ready.retain(|ready| now < ready.since + KEEP);
            }
            self.starved = reply.starved;
            if !reply.starved {
                self.demand = self.demand.saturating_sub(flight.demand);
            }
            self.urgent |= self.probes.ready.len() < before;
        }
        change
    }

    /// The report has no answer. `sent`: whether it may have been carried out; then its delta counts no second time.
    pub fn unanswered(&mut self, sent: bool, now: Duration) -> Option<Change> {
        let flight = self.flight.take()?;
        self.peers.untold();
        if !sent && flight.generation == self.view.generation {
            self.delta = flight.delta.then(self.delta);
        }
        let since = *self.failing_since.get_or_insert(flight.sent_at);
        if !self.together || now.saturating_sub(since) < LOST_AFTER {
            return None;
        }
        self.together = false;
        // Probes under way keep their slots: they run on.
        self.probes.ready.clear();
        self.delta = Delta::default();
        self.own.take_over(&self.view);
        Some(Change::Lost)
    }

    /// A message told of a transition.
    pub fn heard(&mut self, word: Word, now: Duration) -> bool {
        // Who is apart joins by a report's answer: a message may be old.
        if !self.together || word.generation <= self.view.generation {
            return false;
        }
        self.adopt(word, now);
        self.demand > 0 && word.state == State::HalfOpen && self.urge()
    }

    /// The next report is due at once.
    fn urge(&mut self) -> bool {
        !std::mem::replace(&mut self.urgent, true)
    }

    fn is_used(&self, now: Duration) -> bool {
        self.last_call.is_some_and(|at| now < at + IDLE_AFTER)
    }

    fn adopt(&mut self, word: Word, now: Duration) {
        if (word.generation, word.state) != (self.view.generation, self.view.state) {
            self.forget_results();
            let ramp_ended = self.view.state == State::Recovering && word.state == State::Closed;
            if word.state != State::Open && !ramp_ended {
                self.own.calls = Calls::new(self.settings.window);
                self.own.consecutive_failures = 0;
            }
        }
        if !matches!(word.state, State::Open | State::HalfOpen) {
            self.demand = 0;
        }
        self.view.generation = word.generation;
        self.view.state = word.state;
        self.view.until = now.saturating_add(word.left);
        if word.state == State::Recovering {
            self.ramp = Ramp::until(self.view.until);
        }
    }

    fn forget_results(&mut self) {
        self.delta = Delta::default();
        self.probes = Probes::default();
        self.starved = false;
        self.told_trip = false;
    }

    /// Half of what trips is enough: processes do not see the same, and one with a failure now and then has no reason.
    fn doubts(&mut self, now: Duration) -> u64 {
        let counts = self.own.calls.counts(now);
        let of_rate = |part, rate: f64| match reaches(part, counts.calls, rate / 2.0) {
            true => part,
            false => 0,
        };
        let slow = self.settings.slow_call;
        let limit = self.settings.consecutive_failures;
        let in_a_row = match self.own.consecutive_failures {
            failures if limit > 0 && failures >= limit.div_ceil(2) => failures,
            _ => 0,
        };
        of_rate(counts.failures, self.settings.failure_rate)
            .max(slow.map_or(0, |slow| of_rate(counts.slow, slow.rate)))
            .max(u64::from(in_a_row))
    }
}

impl Breaker {
    /// Goes on by itself from the shared state, with the results that it has.
    fn take_over(&mut self, view: &View) {
        self.next_open_for = self.settings.open_for;
        self.phase = match view.state {
            State::Closed => Phase::Closed,
            State::Open => {
                let next = self.settings.open_for.saturating_mul(2);
                self.next_open_for = next.min(self.settings.max_open_for);
                Phase::Open { until: view.until }
            }
            State::HalfOpen => Phase::HalfOpen(HalfOpenProbes::default()),
            State::Recovering => Phase::Recovering(Ramp::until(view.until)),
            State::ForcedOpen => Phase::ForcedOpen,
            State::ForcedClosed => Phase::ForcedClosed,
        };
        self.generation = self.generation.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests;
