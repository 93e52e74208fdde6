//! The calls that count, and their sums.

use std::collections::VecDeque;
use std::time::Duration;

use super::{CallOutcome, Settings, Window};

#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub failed: bool,
    pub slow: bool,
}

impl Call {
    pub(super) fn new(settings: &Settings, outcome: CallOutcome, elapsed: Duration) -> Call {
        let slow = settings.slow_call;
        Call {
            failed: outcome == CallOutcome::Failure,
            slow: slow.is_some_and(|slow| elapsed > slow.duration),
        }
    }

    pub(super) fn is_well(self) -> bool {
        !self.failed && !self.slow
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub calls: u64,
    pub failures: u64,
    pub slow: u64,
}

impl Counts {
    pub(super) fn add(&mut self, call: Call) {
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
pub(super) enum Calls {
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
    pub(super) fn new(window: Window) -> Self {
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

    pub(super) fn push(&mut self, call: Call, now: Duration) {
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

    pub(super) fn counts(&mut self, now: Duration) -> Counts {
        self.forget(now);
        self.sums()
    }

    pub(super) fn sums(&self) -> Counts {
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
pub(super) fn reaches(part: u64, whole: u64, rate: f64) -> bool {
    part > 0 && part as f64 / whole as f64 >= rate
}
