//! How much of what comes a process refuses, while it has more to do than it can. Owns the arithmetic; must not measure.
//!
//! By how late a lane is: the share that is refused is steered so that what waits, waits about as long as the target, by a proportional-
//! integral controller as in PIE (RFC 8033). An on-off switch would refuse everything and then nothing by turns, and many clients would
//! come back at once. What is steered by is the least delay of a window, the standing queue of CoDel (RFC 8289 section 2): a pause of
//! the machine or the container's CPU quota makes one tick late, and the next ones are not.
//!
//! By memory: a share that grows with what is used, Envoy's scaled trigger.

use std::time::Duration;

/// A window lasts this long, at least.
const WINDOW: Duration = Duration::from_millis(100);
/// Ticks of a window, at least: one that is late says nothing of a queue that stands.
const FEWEST: u32 = 3;
/// What the share grows by in a second, for as long as the delay is twice the target or more. With twice as much of both, a lane that is
/// asked for three times what it can do swings between too much and too little.
const INTEGRAL: f64 = 0.25;
/// What it grows by at once when the delay goes up by the target.
const PROPORTIONAL: f64 = 0.1;
/// A lane whose ticks are slow must not learn in leaps, in seconds.
const LONGEST: f64 = 1.0;
/// The most that is refused for being late: where refusing does not help, for example since refusing is what takes the time, some must
/// be served all the same.
const MOST: f64 = 0.9;
/// From the bound of memory to where all is refused, as a share of the bound.
const MEMORY_RAMP: f64 = 0.05;

/// Why requests are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strain {
    /// The lane is late: more is to be done than it can do.
    LoopDelay,
    Memory,
}

impl Strain {
    /// As the file names what it is measured by.
    pub fn name(self) -> &'static str {
        match self {
            Strain::LoopDelay => "loop_delay",
            Strain::Memory => "memory",
        }
    }
}

/// The controller of one lane.
#[derive(Debug, Clone, Default)]
pub struct Lateness {
    share: f64,
    /// How far the last window was from the target, in targets; from -1 to 1.
    error: f64,
    window: Option<Window>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    since: Duration,
    ticks: u32,
    least: Duration,
}

impl Lateness {
    /// Learns that the lane was `late` for something that was due; `target` is longer than nothing. The least of a window that has ended
    /// by it.
    pub fn tick(&mut self, late: Duration, target: Duration, now: Duration) -> Option<Duration> {
        let window = self.window.get_or_insert(Window {
            since: now.saturating_sub(late),
            ticks: 0,
            least: late,
        });
        window.ticks += 1;
        window.least = window.least.min(late);
        let Window {
            since,
            ticks,
            least,
        } = *window;
        let lasted = now.saturating_sub(since);
        if ticks < FEWEST || lasted < WINDOW {
            return None;
        }
        self.window = None;
        let error = least.as_secs_f64() / target.as_secs_f64().max(1e-3) - 1.0;
        let error = error.clamp(-1.0, 1.0);
        let steps = INTEGRAL * error * lasted.as_secs_f64().min(LONGEST)
            + PROPORTIONAL * (error - self.error);
        self.share = (self.share + steps).clamp(0.0, MOST);
        self.error = error;
        Some(least)
    }

    /// The share of requests that is to be refused, from 0 to below 1.
    pub fn share(&self) -> f64 {
        self.share
    }
}

/// The share of requests that is to be refused with so many bytes in use: none up to `bound`, all from a twentieth beyond it on.
pub fn of_memory(used: u64, bound: u64) -> f64 {
    let over = used.saturating_sub(bound) as f64;
    (over / (bound.max(1) as f64 * MEMORY_RAMP)).min(1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TARGET: Duration = Duration::from_millis(100);
    /// From the end of a tick to when the next one is due.
    const EVERY: f64 = 0.02;

    /// A lane that is asked for `demand` times what it can do, where a refusal costs `refusal` of an answer. The share that it refuses
    /// and the delay after so many seconds; what waits is bounded, as a backlog is.
    fn settle(demand: f64, refusal: f64, seconds: f64) -> (f64, f64) {
        let mut lane = Lateness::default();
        let (mut time, mut delay) = (0.0, 0.0_f64);
        while time < seconds {
            let turn = EVERY + delay;
            time += turn;
            let share = lane.share();
            let load = demand * (1.0 - share + share * refusal);
            delay = (delay + (load - 1.0) * turn).clamp(0.0, 3.0);
            let (late, now) = (
                Duration::from_secs_f64(delay),
                Duration::from_secs_f64(time),
            );
            lane.tick(late, TARGET, now);
        }
        (lane.share(), delay)
    }

    #[test]
    fn the_share_settles_where_what_is_left_can_be_done() {
        for (demand, refusal) in [(1.1, 0.3), (1.5, 0.5), (2.0, 0.2), (2.0, 0.4), (4.0, 0.1)] {
            let (share, delay) = settle(demand, refusal, 60.0);
            let needed = (demand - 1.0) / (demand * (1.0 - refusal));
            assert!(
                (share - needed).abs() < 0.05 && (0.05..0.2).contains(&delay),
                "{share} for {needed}, {delay} s, at {demand}"
            );
        }
    }

    #[test]
    fn a_lane_that_can_do_all_refuses_nothing() {
        assert_eq!(settle(0.99, 0.5, 60.0), (0.0, 0.0));
    }

    #[test]
    fn some_are_served_where_refusing_does_not_help() {
        let (share, _) = settle(5.0, 0.9, 60.0);
        assert!((share - MOST).abs() < 1e-9, "{share}");
    }

    #[test]
    fn a_pause_is_no_queue_however_long_it_was() {
        let mut lane = Lateness::default();
        let mut now = Duration::ZERO;
        for tick in 0..1000 {
            // Each fifth tick is late: a quota of CPU time that is used up again and again.
            let late = Duration::from_millis(if tick % 5 == 0 { 80_000 } else { 1 });
            now += Duration::from_millis(20) + late;
            lane.tick(late, TARGET, now);
            assert_eq!(lane.share(), 0.0);
        }
    }

    #[test]
    fn it_is_over_soon_after_the_queue_is_gone() {
        let mut lane = Lateness::default();
        let mut now = Duration::ZERO;
        let mut run = |millis: u64, until: u64| {
            let end = now + Duration::from_millis(until);
            while now < end {
                now += Duration::from_millis(20 + millis);
                lane.tick(Duration::from_millis(millis), TARGET, now);
            }
            lane.share()
        };
        assert!(run(300, 10_000) > 0.8);
        assert_eq!(run(0, 5_000), 0.0);
    }

    #[test]
    fn memory_refuses_by_how_far_it_is_over_its_bound() {
        for (used, share) in [
            (0, 0.0),
            (100, 0.0),
            (102, 0.4),
            (105, 1.0),
            (u64::MAX, 1.0),
        ] {
            assert!((of_memory(used, 100) - share).abs() < 1e-9, "{used}");
        }
        assert_eq!(of_memory(0, 0), 0.0);
    }

    proptest! {
        #[test]
        fn the_share_is_one(
            target in 1u64..10_000,
            ticks in prop::collection::vec((0u64..100_000, 0u64..1000), 0..200),
        ) {
            let (mut lane, mut now) = (Lateness::default(), Duration::ZERO);
            for (late, pause) in ticks {
                let late = Duration::from_millis(late);
                now += late + Duration::from_millis(pause);
                lane.tick(late, Duration::from_millis(target), now);
                prop_assert!((0.0..=MOST).contains(&lane.share()));
            }
        }
    }
}
