//! How traffic comes back: the probes of half-open, and the ramp after them.

use std::time::Duration;

use super::window::{Call, reaches};
use super::{HalfOpen, Settings};

/// Half-open: probes under way and what the others said. Slots and results together never exceed `probes`, so that the
/// upstream sees no more calls than the verdict needs.
#[derive(Debug, Default)]
pub(super) struct Trial {
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
pub(super) enum Verdict {
    Passed,
    Failed,
    Undecided,
}

impl Trial {
    /// The id of the slot taken, or how long until the oldest probe times out.
    pub(super) fn enter(&mut self, limits: &HalfOpen, now: Duration) -> Result<u64, Duration> {
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
    pub(super) fn free(&mut self, id: u64) -> bool {
        let found = self.slots.iter().position(|slot| slot.id == id);
        if let Some(index) = found {
            self.slots.swap_remove(index);
        }
        found.is_some()
    }

    /// Counts probes that have timed out by `now` as failed, in the order of time; when that decided the trial.
    pub(super) fn fails_by_time(&mut self, limits: &HalfOpen, now: Duration) -> Option<Duration> {
        let ends = |slot: &Slot| slot.since.saturating_add(limits.probe_timeout);
        while let Some(index) = (0..self.slots.len()).min_by_key(|index| ends(&self.slots[*index]))
            && ends(&self.slots[index]) <= now
        {
            let at = ends(&self.slots.swap_remove(index));
            self.failed += 1;
            if self.verdict(limits) == Verdict::Failed {
                return Some(at);
            }
        }
        None
    }

    pub(super) fn count(&mut self, call: Call) {
        if call.failed || call.slow {
            self.failed += 1;
        } else {
            self.succeeded += 1;
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
