//! When a request is tried again. Owns the wait and the budget; must not know what went wrong.

use std::time::Duration;

/// A wait with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"): by chance from nothing to `base`, doubled for each
/// retry before it, and at most to `max`. `draw` is from 0 to 1.
pub fn backoff(base: Duration, max: Duration, before: u32, draw: f64) -> Duration {
    let most = base.saturating_mul(1 << before.min(30)).min(max);
    most.mul_f64(draw.clamp(0.0, 1.0))
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
        let check = |before, draw, expected| {
            assert_eq!(backoff(ms(25), ms(250), before, draw), expected, "{before}");
        };
        check(0, 1.0, ms(25));
        check(0, 0.0, ms(0));
        check(1, 0.5, ms(25));
        check(3, 1.0, ms(200));
        check(4, 1.0, ms(250));
        check(u32::MAX, 1.0, ms(250));
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
            prop_assert!(backoff(ms(base), ms(max), before, draw) <= ms(max));
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
