//! An adaptive bound on calls under way: how many an upstream takes before they queue there, learnt from how long they take.
//! The algorithm is the gradient of Netflix's concurrency-limits and of Envoy's adaptive concurrency, but for how it learns what calls
//! take without a queue. Envoy pulls the bound down to 3 for that; Netflix's Gradient2 averages over a long time, and so takes a queue
//! that stays for the usual, up to the highest bound. Here the bound dips by 30 % for one window of fifty: enough to empty a queue
//! that it has caused itself, and little to those who ask; for that the room that it gives to grow is left out of it. At the start,
//! and while dips find a queue in what is known, they follow sooner. A window's time is the median of its calls, as by Envoy's default:
//! where some are quick by nature and others slow, the mean of a few is now low and now high without a queue, and the high ones would be
//! taken for one. Owns the arithmetic; must not count calls.

use std::time::Duration;

/// The share of a new estimate that is taken at each update.
const SMOOTHING: f64 = 0.2;
/// Calls may take this much longer than without a queue before the bound shrinks. Times [`DIP`] it is below 1, so that a dip
/// sees less of a queue than the bound allows for: what is learnt in dips cannot creep up with the bound.
const TOLERANCE: f64 = 1.25;
/// The least that an update shrinks the bound to, as a share of it.
const STEEPEST: f64 = 0.5;
/// Windows from one dip to the next, where dips find what is known; twice as many each time up to here.
const DIP_EVERY: u32 = 50;
/// The same after a dip whose calls took less than [`MUCH`] of what is known: there is a queue in that, and may be more of it.
const DIP_AGAIN: u32 = 4;
/// The share of what is known that is not much less than it.
const MUCH: f64 = 0.9;
/// The share that holds in a dip of what was under way, or of the bound where that is less; without the room that it gives to grow.
const DIP: f64 = 0.7;
/// How much of a dip's time is taken for the time without a queue; of a longer one that came early, as much less.
const DIP_WEIGHT: f64 = 0.5;
/// The same of a window outside of a dip whose calls were quicker still.
const QUICKER_WEIGHT: f64 = 0.1;

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
    /// What calls take without a queue, in seconds; `None` before the first update.
    alone: Option<f64>,
    /// Windows from the last dip to the next, and those of them that are left.
    every: u32,
    left: u32,
    /// The bound until the next update, where that is a dip.
    dip: Option<f64>,
}

/// What was seen of calls since the last update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The median of what those took that have ended.
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
            alone: None,
            // The first windows are of connections that are opened and of caches that are cold, and may be of a queue from the start.
            every: 1,
            left: 1,
            dip: None,
        }
    }

    /// Calls that may be under way until the next update.
    pub fn bound(&self) -> u32 {
        // Between two u32s, so that it is one.
        self.dip.unwrap_or(self.bound) as u32
    }

    /// Whether that is a dip's. The next window is to be without the calls that began before it: they may have queued.
    pub fn dips(&self) -> bool {
        self.dip.is_some()
    }

    /// Ends a dip from which nothing can be learnt; the next comes in as many windows as this one did.
    pub fn end_dip(&mut self) {
        self.dip = None;
        self.left = self.every;
    }

    /// Learns from a window.
    pub fn update(&mut self, window: Window) {
        let now = window.took.as_secs_f64().max(1e-6);
        let dipped = self.dip.take().is_some();
        let alone = match self.alone {
            None => now,
            Some(alone) if dipped => {
                // A dip that came early is to find a queue. Were as much learnt from each of these, an upstream that gets slow were soon the
                // usual; were nothing, a few that are quick by chance would hold the bound down.
                let weight = match now > alone {
                    true => DIP_WEIGHT * f64::from(self.every) / f64::from(DIP_EVERY),
                    false => DIP_WEIGHT,
                };
                self.every = match now < alone * MUCH {
                    true => DIP_AGAIN,
                    false => (self.every * 2).min(DIP_EVERY),
                };
                self.left = self.every;
                alone + (now - alone) * weight
            }
            Some(alone) if now < alone => alone + (now - alone) * QUICKER_WEIGHT,
            Some(alone) => alone,
        };
        self.alone = Some(alone);
        // With few calls under way nothing is learnt of how many would be too many.
        if f64::from(window.under_way) * 2.0 < self.bound {
            return;
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            // Demand may be below the bound and still queue: a dip of the bound alone would not reach that queue.
            let full = self.bound.min(f64::from(window.under_way));
            // For a small bound the room is a large part: with it a queue would outlast the dip, and be taken for what calls need.
            let dip = (full - full.sqrt()) * DIP;
            self.dip = Some(dip.max(f64::from(self.range.min)));
        }
        if dipped {
            return;
        }
        let gradient = (TOLERANCE * alone / now).clamp(STEEPEST, 1.0);
        let room = self.bound.sqrt();
        let next = self.bound * gradient + room;
        let smoothed = self.bound * (1.0 - SMOOTHING) + next * SMOOTHING;
        // Beyond that nothing would be learnt any more.
        let smoothed = smoothed.min(f64::from(window.under_way) * 2.0);
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
        // One more, so that it does not end in a dip.
        for _ in 0..=updates {
            let under_way = gradient.bound().min(demand);
            let took = 0.010 * (f64::from(under_way) / capacity).max(1.0);
            gradient.update(Window {
                took: Duration::from_secs_f64(took),
                under_way,
            });
        }
        gradient.bound()
    }

    #[test]
    fn the_bound_settles_near_what_the_upstream_takes() {
        let mut gradient = Gradient::new(WIDE);
        let mut check = |capacity: u32, updates| {
            let bound = settle(&mut gradient, f64::from(capacity), 10_000, updates);
            assert!(
                (capacity..capacity * 2).contains(&bound),
                "{bound} at {capacity}"
            );
        };
        check(100, 300);
        // Half of it goes, for example with a replica.
        check(50, 600);
        check(200, 600);
        // However long it is full, what waits is not taken for what calls need.
        check(200, 10_000);
        check(100, 600);
    }

    #[test]
    fn a_small_upstream_is_not_taken_for_a_large_one_in_time() {
        for capacity in [4, 8, 20] {
            let range = Range { min: 1, max: 1000 };
            let mut gradient = Gradient::new(range);
            let bound = settle(&mut gradient, f64::from(capacity), 10_000, 10_000);
            assert!(
                (capacity..=capacity * 2).contains(&bound),
                "{bound} at {capacity}"
            );
        }
    }

    #[test]
    fn a_slow_start_with_demand_below_the_bound_is_not_taken_for_the_usual() {
        for slow in [1, 5, 50] {
            let mut gradient = Gradient::new(Range { min: 2, max: 1000 });
            for _ in 0..slow {
                gradient.update(Window {
                    took: Duration::from_millis(100),
                    under_way: gradient.bound().min(64),
                });
            }
            let bound = settle(&mut gradient, 8.0, 64, 500);
            assert!((8..=16).contains(&bound), "{bound} after {slow}");
        }
    }

    #[test]
    fn an_idle_upstream_teaches_nothing() {
        let mut gradient = Gradient::new(WIDE);
        assert_eq!(settle(&mut gradient, 100.0, 3, 1000), 20);
    }

    #[test]
    fn an_upstream_that_is_slow_by_nature_is_not_held_down() {
        let mut gradient = Gradient::new(WIDE);
        for _ in 0..501 {
            let under_way = gradient.bound();
            gradient.update(Window {
                took: Duration::from_secs(2),
                under_way,
            });
        }
        assert_eq!(gradient.bound(), 1000);
    }

    proptest! {
        #[test]
        fn the_bound_stays_in_its_range(
            (min, max) in (0u32..100, 0u32..2000),
            windows in prop::collection::vec((0u64..100_000_000, 0u32..3000), 0..100),
        ) {
            let mut gradient = Gradient::new(Range { min, max });
            for (micros, under_way) in windows {
                gradient.update(Window { took: Duration::from_micros(micros), under_way });
                prop_assert!(gradient.bound() >= min.max(1));
                prop_assert!(gradient.bound() <= max.max(min.max(1)));
            }
        }
    }
}
