//! When an endpoint is taken out and when it comes back: by what it makes of requests (Envoy's outlier detection), and by what it says
//! when it is asked (active checks). Owns the judgement; must not know how it is asked.

use std::time::Duration;

/// The longest ejection, unless the first is longer; Envoy's.
const MAX_EJECTION: Duration = Duration::from_secs(300);

/// One endpoint's ejections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ejections {
    /// How many times as long as the first the next one lasts, less one.
    in_a_row: u32,
    since: Option<Duration>,
}

impl Ejections {
    /// Whether it takes no requests.
    pub fn is_ejected(&self) -> bool {
        self.since.is_some()
    }

    /// Takes it out from `now` on, for longer than the last time.
    pub fn eject(&mut self, now: Duration) {
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.since = Some(now);
    }

    /// What is to be done each interval; true where an ejection ends by it. One that is not ejected is forgiven one of its ejections.
    pub fn look(&mut self, now: Duration, base: Duration) -> bool {
        let Some(remaining) = self.remaining(now, base) else {
            self.in_a_row = self.in_a_row.saturating_sub(1);
            return false;
        };
        let over = remaining.is_zero();
        if over {
            self.since = None;
        }
        over
    }

    /// How long it is still out, of which `base` is the first time; zero where the next [`Self::look`] takes it back.
    pub fn remaining(&self, now: Duration, base: Duration) -> Option<Duration> {
        let since = self.since?;
        let lasts = base
            .saturating_mul(self.in_a_row)
            .min(base.max(MAX_EJECTION));
        Some(lasts.saturating_sub(now.saturating_sub(since)))
    }
}

/// Whether another may be ejected where so many of all are already.
pub fn may_eject(ejected: usize, all: usize, max_percent: u32) -> bool {
    ejected == 0 || (ejected + 1) * 100 <= all * max_percent as usize
}

/// What active checks have made of an endpoint: taken for healthy until the first has ended, which decides alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checks {
    unhealthy: bool,
    asked: bool,
    /// Results in a row that say otherwise.
    against: u32,
}

impl Checks {
    /// By the last verdict.
    pub fn is_healthy(&self) -> bool {
        !self.unhealthy
    }

    /// Notes a result; true where it changes the verdict.
    pub fn note(&mut self, passed: bool, unhealthy_after: u32, healthy_after: u32) -> bool {
        let first = !std::mem::replace(&mut self.asked, true);
        if passed != self.unhealthy {
            self.against = 0;
            return false;
        }
        self.against += 1;
        let needed = match passed {
            true => healthy_after,
            false => unhealthy_after,
        };
        let changes = first || self.against >= needed;
        if changes {
            self.unhealthy = !passed;
            self.against = 0;
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: Duration = Duration::from_secs(30);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn each_ejection_in_a_row_lasts_longer() {
        let mut it = Ejections::default();
        it.eject(s(0));
        assert!(!it.look(s(29), BASE) && it.is_ejected());
        assert!(it.look(s(30), BASE) && !it.is_ejected());
        it.eject(s(31));
        assert!(!it.look(s(31 + 59), BASE));
        assert!(it.look(s(31 + 60), BASE));
    }

    #[test]
    fn quiet_intervals_forgive() {
        let mut it = Ejections::default();
        it.eject(s(0));
        it.look(s(30), BASE);
        it.eject(s(40));
        assert!(it.look(s(100), BASE));
        it.look(s(110), BASE);
        it.look(s(120), BASE);
        it.eject(s(130));
        assert!(it.look(s(160), BASE), "as long as the first");
    }

    #[test]
    fn no_ejection_lasts_longer_than_five_minutes_or_the_base() {
        let mut it = Ejections {
            in_a_row: 100,
            since: None,
        };
        it.eject(s(0));
        assert!(!it.look(s(299), BASE) && it.look(s(300), BASE));
        it.eject(s(0));
        assert!(!it.look(s(599), s(600)) && it.look(s(600), s(600)));
    }

    #[test]
    fn one_may_always_be_ejected_and_then_so_many_percent() {
        let check = |all, percent, most: usize| {
            let ejected = (0..all).find(|ejected| !may_eject(*ejected, all, percent));
            assert_eq!(ejected.unwrap_or(all), most, "{percent} % of {all}");
        };
        check(1, 10, 1);
        check(3, 10, 1);
        check(20, 10, 2);
        check(29, 10, 2);
        check(4, 50, 2);
        check(4, 100, 4);
        check(4, 0, 1);
    }

    #[test]
    fn the_first_check_decides_alone_and_then_so_many_in_a_row() {
        let mut it = Checks::default();
        assert!(it.is_healthy());
        assert!(it.note(false, 3, 2) && !it.is_healthy());
        assert!(!it.note(true, 3, 2) && !it.note(false, 3, 2) && !it.note(true, 3, 2));
        assert!(it.note(true, 3, 2) && it.is_healthy());
        assert!(!it.note(false, 3, 2) && !it.note(false, 3, 2) && it.is_healthy());
        assert!(it.note(false, 3, 2) && !it.is_healthy());
        let mut it = Checks::default();
        assert!(!it.note(true, 3, 2) && it.is_healthy());
        assert!(!it.note(false, 3, 2) && it.is_healthy());
    }

    proptest! {
        /// Against a model that remembers every result.
        #[test]
        fn a_verdict_changes_by_a_whole_row_alone(results in proptest::collection::vec(any::<bool>(), 1..60), unhealthy_after in 1u32..5, healthy_after in 1u32..5) {
            let mut it = Checks::default();
            let mut healthy = results[0];
            for (end, passed) in results.iter().enumerate() {
                it.note(*passed, unhealthy_after, healthy_after);
                let needed = if *passed { healthy_after } else { unhealthy_after } as usize;
                let row = results[..=end].iter().rev().take_while(|other| *other == passed).count();
                if row >= needed {
                    healthy = *passed;
                }
                prop_assert_eq!(it.is_healthy(), healthy);
            }
        }

        #[test]
        fn every_ejection_ends(times in proptest::collection::vec(0u64..1_000, 1..20)) {
            let mut it = Ejections::default();
            let mut now = Duration::ZERO;
            for wait in times {
                it.eject(now);
                now += s(wait);
                it.look(now, BASE);
                now += MAX_EJECTION;
                it.look(now, BASE);
                prop_assert!(!it.is_ejected());
            }
        }
    }
}
