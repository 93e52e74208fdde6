//! When something is tried again. Owns the wait, and the budget of requests; must not know what went wrong.

use std::time::Duration;

/// Between tries in a row: from the first to the longest, doubled each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pauses {
    pub first: Duration,
    pub longest: Duration,
}

impl Pauses {
    /// The one behind so many others.
    pub fn nth(self, before: u32) -> Duration {
        let doubled = self.first.saturating_mul(1 << before.min(30));
        doubled.min(self.longest)
    }

    /// The one behind this one.
    pub fn after(self, pause: Duration) -> Duration {
        pause.saturating_mul(2).min(self.longest)
    }
}

/// By chance from nothing to the whole of a pause: full jitter, as the AWS Architecture Blog has it in "Exponential Backoff And Jitter".
/// `draw` is from 0 to 1.
pub fn full_jitter(pause: Duration, draw: f64) -> Duration {
    pause.mul_f64(draw.clamp(0.0, 1.0))
}

/// By chance from the whole to a half of a pause, so that many processes do not come together, and none at once: equal jitter, as there.
pub fn equal_jitter(pause: Duration, draw: f64) -> Duration {
    pause.mul_f64(1.0 - draw.clamp(0.0, 1.0) / 2.0)
}

/// Whether another retry may begin beside the `retrying` that are under way: of the requests that are, so many percent at most, or
/// `least` where that is more.
pub fn within_budget(retrying: u32, under_way: u32, percent: u32, least: u32) -> bool {
    let share = u64::from(under_way) * u64::from(percent) / 100;
    u64::from(retrying) < share.max(u64::from(least))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn waits_double_up_to_the_most() {
        let pauses = Pauses {
            first: ms(25),
            longest: ms(250),
        };
        let check = |before, draw, expected| {
            let wait = full_jitter(pauses.nth(before), draw);
            assert_eq!(wait, expected, "{before}");
        };
        check(0, 1.0, ms(25));
        check(0, 0.0, ms(0));
        check(1, 0.5, ms(25));
        check(3, 1.0, ms(200));
        check(4, 1.0, ms(250));
        check(u32::MAX, 1.0, ms(250));
        let mut pause = pauses.first;
        for before in 0..10 {
            assert_eq!(pauses.nth(before), pause);
            pause = pauses.after(pause);
        }
        assert_eq!(equal_jitter(ms(250), 0.0), ms(250));
        assert_eq!(equal_jitter(ms(250), 1.0), ms(125));
    }

    #[test]
    fn the_budget_is_a_share_and_never_less_than_its_least() {
        assert!(within_budget(2, 0, 20, 3) && !within_budget(3, 0, 20, 3));
        assert!(within_budget(19, 100, 20, 3) && !within_budget(20, 100, 20, 3));
        assert!(!within_budget(0, 100, 0, 0));
    }

    proptest! {
        #[test]
        fn no_wait_is_longer_than_the_most(base in 0u64..10_000, max in 0u64..10_000, before in any::<u32>(), draw in any::<f64>()) {
            prop_assume!(!draw.is_nan());
            let pauses = Pauses { first: ms(base), longest: ms(max) };
            let wait = full_jitter(pauses.nth(before), draw);
            prop_assert!(wait <= ms(max) && equal_jitter(wait, draw) <= wait);
        }

        /// However requests come and fail: those under way multiply by the budget at most.
        #[test]
        fn retries_under_way_stay_within_the_budget(steps in proptest::collection::vec((0u32..500, any::<bool>()), 1..200), percent in 0u32..=100, least in 0u32..10) {
            let mut retrying = 0;
            for (under_way, ends) in steps {
                if ends {
                    retrying = u32::saturating_sub(retrying, 1);
                } else if within_budget(retrying, under_way, percent, least) {
                    retrying += 1;
                    prop_assert!(retrying <= least.max(under_way * percent / 100));
                }
            }
        }
    }
}
