//! An adaptive bound on calls under way: how many an upstream takes before they queue there, learnt from how long they take.
//! The algorithm is Gradient2 of Netflix's concurrency-limits: what calls take now is held against what they took over a long time,
//! so there is no phase in which the bound is pulled down to measure an idle upstream. Owns the arithmetic; must not count calls.

use std::time::Duration;

/// The share of a new estimate that is taken at each update.
const SMOOTHING: f64 = 0.2;
/// Calls may take this much longer than usual before the bound shrinks.
const TOLERANCE: f64 = 1.5;
/// The least that an update shrinks the bound to, as a share of it.
const STEEPEST: f64 = 0.5;
/// Updates over which the long-term time is averaged.
const LONG: f64 = 600.0;
/// How much of the long-term time is let go of at an update where calls have become far quicker, so that a load which has ended
/// does not hold the bound up for long.
const RECOVERY: f64 = 0.95;

/// Between which the bound moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// At least 1.
    pub min: u32,
    /// At least `min`.
    pub max: u32,
}

/// An upstream's bound.
#[derive(Debug, Clone)]
pub struct Gradient {
    range: Range,
    bound: f64,
    /// What calls take in the long term, in seconds; `None` before the first update.
    usual: Option<f64>,
}

/// What was seen of calls since the last update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Of those that have ended; at least 1.
    pub calls: u32,
    /// What they took together.
    pub took: Duration,
    /// The most that were under way at a time.
    pub under_way: u32,
}

impl Gradient {
    /// Begins at 20 calls, or the nearest that the range has.
    pub fn new(range: Range) -> Gradient {
        let range = Range {
            min: range.min.max(1),
            max: range.max.max(range.min.max(1)),
        };
        Gradient {
            range,
            bound: f64::from(20_u32.clamp(range.min, range.max)),
            usual: None,
        }
    }

    /// Calls that may be under way, as far as is known.
    pub fn bound(&self) -> u32 {
        // Between two u32s, so that it is one.
        self.bound as u32
    }

    /// Learns from a window.
    pub fn update(&mut self, window: Window) {
        let now = window.took.as_secs_f64() / f64::from(window.calls.max(1));
        let now = now.max(1e-6);
        let mut usual = match self.usual {
            None => now,
            Some(usual) => usual + (now - usual) / LONG,
        };
        if usual / now > 2.0 {
            usual *= RECOVERY;
        }
        self.usual = Some(usual);
        // With few calls under way nothing is learnt of how many would be too many.
        if f64::from(window.under_way) * 2.0 < self.bound {
            return;
        }
        let gradient = (TOLERANCE * usual / now).clamp(STEEPEST, 1.0);
        let room = self.bound.sqrt();
        let next = self.bound * gradient + room;
        let smoothed = self.bound * (1.0 - SMOOTHING) + next * SMOOTHING;
        self.bound = smoothed.clamp(f64::from(self.range.min), f64::from(self.range.max));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDE: Range = Range { min: 5, max: 1000 };

    /// An upstream that serves `capacity` calls at a time, each in 10 ms, and queues the rest.
    fn settle(gradient: &mut Gradient, capacity: f64, demand: u32, updates: usize) -> u32 {
        for _ in 0..updates {
            let under_way = gradient.bound().min(demand);
            let took = 0.010 * (f64::from(under_way) / capacity).max(1.0);
            gradient.update(Window {
                calls: 100,
                took: Duration::from_secs_f64(took * 100.0),
                under_way,
            });
        }
        gradient.bound()
    }

    #[test]
    fn the_bound_settles_near_what_the_upstream_takes() {
        let mut gradient = Gradient::new(WIDE);
        let bound = settle(&mut gradient, 100.0, 10_000, 200);
        assert!((100..250).contains(&bound), "{bound}");
        // Half of it goes, for example with a replica.
        let bound = settle(&mut gradient, 50.0, 10_000, 200);
        assert!((50..150).contains(&bound), "{bound}");
        let bound = settle(&mut gradient, 200.0, 10_000, 400);
        assert!((150..500).contains(&bound), "{bound}");
    }

    #[test]
    fn an_idle_upstream_teaches_nothing() {
        let mut gradient = Gradient::new(WIDE);
        assert_eq!(settle(&mut gradient, 100.0, 3, 1000), 20);
    }

    #[test]
    fn an_upstream_that_is_slow_by_nature_is_not_held_down() {
        let mut gradient = Gradient::new(WIDE);
        for _ in 0..500 {
            let under_way = gradient.bound();
            gradient.update(Window {
                calls: 10,
                took: Duration::from_secs(20),
                under_way,
            });
        }
        assert_eq!(gradient.bound(), 1000);
    }

    proptest! {
        #[test]
        fn the_bound_stays_in_its_range(
            (min, max) in (0u32..100, 0u32..2000),
            windows in prop::collection::vec((0u32..1000, 0u64..100_000_000, 0u32..3000), 0..100),
        ) {
            let mut gradient = Gradient::new(Range { min, max });
            for (calls, micros, under_way) in windows {
                gradient.update(Window { calls, took: Duration::from_micros(micros), under_way });
                prop_assert!(gradient.bound() >= min.max(1));
                prop_assert!(gradient.bound() <= max.max(min.max(1)));
            }
        }
    }
}
