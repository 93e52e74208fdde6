//! How traffic comes back: the probes of half-open, and the ramp after them.

use std::time::Duration;

use super::window::{Call, reaches};
use super::{HalfOpen, Settings, Stage};

/// Half-open: probes under way and what the others said. Slots and results together never exceed `probes`, so that the
/// upstream sees no more calls than the verdict needs.
#[derive(Debug, Default)]
pub(super) struct HalfOpenProbes {
    slots: Vec<Slot>,
    next_id: u64,
    succeeded: u32,
    failed: u32,
}

/// A probe under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub id: u64,
    /// When its leg began.
    pub since: Duration,
    pub leg: Leg,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Leg {
    Waits,
    Works,
    /// By its head the call is so.
    Answers(Call),
}

impl Leg {
    pub(super) fn of(stage: Stage, settings: &Settings) -> Leg {
        match stage {
            Stage::Waiting => Leg::Waits,
            Stage::Working => Leg::Works,
            Stage::Answered(outcome, elapsed) => {
                Leg::Answers(Call::new(settings, outcome, elapsed))
            }
        }
    }
}

impl Slot {
    pub(super) fn new(id: u64, since: Duration) -> Slot {
        let leg = Leg::Works;
        Slot { id, since, leg }
    }

    /// When its time is over.
    pub(super) fn ends(&self, limits: &HalfOpen) -> Duration {
        self.since.saturating_add(limits.probe_timeout)
    }

    /// What it says of the upstream once its time is over; `None`: nothing.
    pub(super) fn says(&self) -> Option<Call> {
        match self.leg {
            Leg::Waits => None,
            Leg::Works => Some(Call {
                failed: true,
                slow: false,
            }),
            Leg::Answers(call) => Some(call),
        }
    }
}

/// The probe of this id has come to `leg`, if it has its slot still.
pub(super) fn come(slots: &mut [Slot], id: u64, leg: Leg, now: Duration) {
    if let Some(slot) = slots.iter_mut().find(|slot| slot.id == id) {
        (slot.since, slot.leg) = (now, leg);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    Failed,
    Undecided,
}

impl HalfOpenProbes {
    /// The id of the slot taken, or how long until the first has had its time.
    pub(super) fn enter(&mut self, limits: &HalfOpen, now: Duration) -> Result<u64, Duration> {
        let taken = self.slots.len() as u64 + u64::from(self.succeeded) + u64::from(self.failed);
        if taken >= u64::from(limits.probes) {
            let first = self.slots.iter().map(|slot| slot.ends(limits)).min();
            return Err(first.map_or(Duration::ZERO, |ends| ends.saturating_sub(now)));
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.slots.push(Slot::new(id, now));
        Ok(id)
    }

    pub(super) fn come(&mut self, id: u64, leg: Leg, now: Duration) {
        come(&mut self.slots, id, leg, now);
    }

    /// Whether the probe held a slot until now.
    pub(super) fn free(&mut self, id: u64) -> bool {
        let found = self.slots.iter().position(|slot| slot.id == id);
        if let Some(index) = found {
            self.slots.swap_remove(index);
        }
        found.is_some()
    }

    /// Ends probes that have had their time by `now`, in its order; the verdict that this led to, and when.
    pub(super) fn pass_time(&mut self, limits: &HalfOpen, now: Duration) -> (Verdict, Duration) {
        let first = |slots: &[Slot]| (0..slots.len()).min_by_key(|it| slots[*it].ends(limits));
        while let Some(index) = first(&self.slots)
            && self.slots[index].ends(limits) <= now
        {
            let slot = self.slots.swap_remove(index);
            let Some(call) = slot.says() else { continue };
            self.count(call);
            match self.verdict(limits) {
                Verdict::Undecided => {}
                verdict => return (verdict, slot.ends(limits)),
            }
        }
        (Verdict::Undecided, now)
    }

    pub(super) fn count(&mut self, call: Call) {
        match call.is_well() {
            true => self.succeeded += 1,
            false => self.failed += 1,
        }
    }

    /// Decided as soon as the probes still to come cannot change it, hence always after `probes` results.
    pub(super) fn verdict(&self, limits: &HalfOpen) -> Verdict {
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
pub(super) struct Ramp {
    /// When all are admitted.
    pub until: Duration,
    credit: f64,
}

impl Ramp {
    pub(super) fn until(until: Duration) -> Ramp {
        Ramp { until, credit: 0.5 }
    }

    /// None when admitted, else how long until all are.
    pub(super) fn enter(&mut self, settings: &Settings, now: Duration) -> Option<Duration> {
        let left = self.until.saturating_sub(now);
        // Not zero by zero: with nothing left there is nothing to divide.
        if left.is_zero() {
            return None;
        }
        let still = (left.as_secs_f64() / settings.recover_over.as_secs_f64()).min(1.0);
        let first = 1.0 / (f64::from(settings.half_open.probes) + 1.0);
        self.credit += first + (1.0 - first) * (1.0 - still);
        if self.credit >= 1.0 {
            self.credit -= 1.0;
            None
        } else {
            Some(left)
        }
    }
}
