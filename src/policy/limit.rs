//! Rate limit arithmetic: what one window of a limit admits, and what is left. Pure: no I/O, no clock; where counters are
//! kept and which limits a request meets is others' business.

use std::time::Duration;

use crate::config::limits::{Period, Rule};

const NANOS: u128 = 1_000_000_000;

/// The time of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Monotonic, since an origin that stays for the life of the process.
    pub mono: Duration,
    /// Since the Unix epoch; for windows that begin at a time of day.
    pub wall: Duration,
}

/// What one window has counted for one key. The default is a key never seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct State {
    /// Token bucket: when it was last drained (ns, monotonic). Sliding: the window's number. Fixed: the window's end (ns,
    /// wall).
    a: u64,
    /// Token bucket: tokens used, whole. Windows: the cost of this window. Concurrency: what is in flight.
    b: u64,
    /// Token bucket: the rest of the tokens used, in 1/`per` of a token, `per` in ns. Sliding: the last window's cost.
    c: u64,
}

/// What a window says to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub admitted: bool,
    /// What is left once the request, if admitted, is charged.
    pub remaining: u64,
    /// Until the quota is whole again.
    pub reset: Duration,
    /// Until the same request can be admitted; `None` when it is, or never can be.
    pub retry_after: Option<Duration>,
}

/// What `rule` says to a request of `cost`; charges nothing.
pub fn check(rule: &Rule, state: &State, cost: u64, now: Now) -> Verdict {
    match *rule {
        Rule::TokenBucket { count, per, burst } => bucket(count, per, burst, state, cost, now.mono),
        Rule::SlidingWindow { limit, window } => sliding(limit, window, state, cost, now.mono),
        Rule::FixedWindow { limit, period } => fixed(limit, period, state, cost, now.wall),
        Rule::Concurrency { limit } => {
            let left = limit
                .checked_sub(state.b)
                .and_then(|free| free.checked_sub(cost));
            let reset = Duration::ZERO;
            // When a slot comes free is not known; a second is the least that Retry-After can say.
            let retry_after = (left.is_none() && cost <= limit).then_some(Duration::from_secs(1));
            Verdict {
                admitted: left.is_some(),
                remaining: left.unwrap_or(limit.saturating_sub(state.b)),
                reset,
                retry_after,
            }
        }
    }
}

/// Charges an admitted request of `cost`.
pub fn take(rule: &Rule, state: &mut State, cost: u64, now: Now) {
    match *rule {
        Rule::TokenBucket { count, per, .. } => {
            let (per, level) = (nanos(per), level(count, per, state, now.mono));
            let level = level.saturating_add(u128::from(cost).saturating_mul(per));
            state.a = state.a.max(clamp(now.mono.as_nanos()));
            state.b = clamp(level / per);
            state.c = clamp(level % per);
        }
        Rule::SlidingWindow { window, .. } => {
            let (number, _, current, previous) = windows(window, state, now.mono);
            *state = State {
                a: number,
                b: current.saturating_add(cost),
                c: previous,
            };
        }
        Rule::FixedWindow { period, .. } => {
            let (end, used) = window_of(period, state, now.wall);
            *state = State {
                a: end,
                b: used.saturating_add(cost),
                c: 0,
            };
        }
        Rule::Concurrency { .. } => state.b = state.b.saturating_add(cost),
    }
}

/// Gives back what a request in flight held of a `Concurrency` rule; true when nothing is held any more.
pub fn release(state: &mut State, cost: u64) -> bool {
    state.b = state.b.saturating_sub(cost);
    state.b == 0
}

/// The rule that each of `processes` keeps to alone, so that together they keep to `rule`: a share of it, and at least one.
pub fn share(rule: &Rule, processes: usize) -> Rule {
    let processes = u64::try_from(processes).unwrap_or(u64::MAX).max(1);
    let part = |whole: u64| (whole / processes).max(whole.min(1));
    match *rule {
        Rule::TokenBucket { count, per, burst } => Rule::TokenBucket {
            count,
            per: per.saturating_mul(u32::try_from(processes).unwrap_or(u32::MAX)),
            burst: part(burst),
        },
        Rule::SlidingWindow { limit, window } => Rule::SlidingWindow {
            limit: part(limit),
            window,
        },
        Rule::FixedWindow { limit, period } => Rule::FixedWindow {
            limit: part(limit),
            period,
        },
        Rule::Concurrency { limit } => Rule::Concurrency { limit: part(limit) },
    }
}

/// The start, the end and the next end of the window of `period` that `wall`, the time since the Unix epoch, is in.
pub fn window_at(period: Period, wall: Duration) -> [Duration; 3] {
    let end_after = |time: Duration| match period {
        Period::Fixed(length) => duration((time.as_nanos() / nanos(length) + 1) * nanos(length)),
        Period::Day | Period::Week | Period::Month | Period::Year => {
            duration(calendar_end(period, time.as_secs()) * NANOS)
        }
    };
    let end = end_after(wall);
    // Within the window before, which is as long or shorter by a day or three.
    let within_last = wall.saturating_sub(period.at_most());
    let mut start = end_after(within_last);
    while end_after(start) <= wall {
        start = end_after(start);
    }
    if start > wall {
        start = Duration::ZERO;
    }
    [start, end, end_after(end)]
}

/// The continuous-state leaky bucket of the generic cell rate algorithm (ITU-T I.371, annex A), in whole arithmetic: a
/// token is `per` units, and `count` units drain each nanosecond. In any time w it admits at most burst + rate × w.
fn bucket(
    count: u64,
    per: Duration,
    burst: u64,
    state: &State,
    cost: u64,
    mono: Duration,
) -> Verdict {
    let units = nanos(per);
    let level = level(count, per, state, mono);
    let [capacity, asked] = [burst, cost].map(|tokens| u128::from(tokens).saturating_mul(units));
    let drain = |units: u128| duration((units).div_ceil(u128::from(count.max(1))));
    let wanted = level.saturating_add(asked);
    let admitted = wanted <= capacity && (count > 0 || cost == 0);
    let after = if admitted { wanted } else { level };
    Verdict {
        admitted,
        remaining: clamp(capacity.saturating_sub(after) / units),
        reset: drain(after),
        retry_after: (!admitted && count > 0 && asked <= capacity)
            .then(|| drain(wanted - capacity)),
    }
}

/// The units in the bucket at `mono`; time that went back drains nothing.
fn level(count: u64, per: Duration, state: &State, mono: Duration) -> u128 {
    let elapsed = clamp(mono.as_nanos()).saturating_sub(state.a);
    let level = u128::from(state.b).saturating_mul(nanos(per));
    let level = level.saturating_add(u128::from(state.c));
    level.saturating_sub(u128::from(elapsed) * u128::from(count))
}

/// The last window's cost counts by the share of it that the sliding window still covers, as if it had been even.
fn sliding(limit: u64, window: Duration, state: &State, cost: u64, mono: Duration) -> Verdict {
    let (_, into, current, previous) = windows(window, state, mono);
    let length = nanos(window);
    let [limit_w, current_w, cost_w] =
        [limit, current, cost].map(|count| u128::from(count).saturating_mul(length));
    let before = u128::from(previous).saturating_mul(length - into);
    let estimate = before.saturating_add(current_w);
    let wanted = estimate.saturating_add(cost_w);
    let admitted = wanted <= limit_w;
    let after = if admitted { wanted } else { estimate };
    let retry_after = if admitted || cost > limit {
        None
    } else if current_w.saturating_add(cost_w) <= limit_w {
        // Within this window, once enough of the last one is out of sight.
        Some((length - into) - (limit_w - current_w - cost_w) / u128::from(previous.max(1)))
    } else {
        // In the next, where this window is the last one.
        Some((length - into) + (length - (limit_w - cost_w) / u128::from(current.max(1))))
    };
    let busy = if current > 0 || (admitted && cost > 0) {
        2 * length - into
    } else {
        length - into
    };
    Verdict {
        admitted,
        remaining: clamp(limit_w.saturating_sub(after) / length),
        reset: if after == 0 {
            Duration::ZERO
        } else {
            duration(busy)
        },
        retry_after: retry_after.map(duration),
    }
}

/// The window's number, how far into it `mono` is (ns), its cost, and the cost of the one before.
fn windows(window: Duration, state: &State, mono: Duration) -> (u64, u128, u64, u64) {
    let (length, mono) = (nanos(window), mono.as_nanos());
    let number = clamp(mono / length);
    match number.checked_sub(state.a) {
        Some(0) => (number, mono % length, state.b, state.c),
        Some(1) => (number, mono % length, 0, state.b),
        Some(_) => (number, mono % length, 0, 0),
        // Time went back: the window goes on from its start.
        None => (state.a, 0, state.b, state.c),
    }
}

fn fixed(limit: u64, period: Period, state: &State, cost: u64, wall: Duration) -> Verdict {
    let (end, used) = window_of(period, state, wall);
    let left = limit
        .checked_sub(used)
        .and_then(|left| left.checked_sub(cost));
    let reset = duration(u128::from(end).saturating_sub(wall.as_nanos()));
    Verdict {
        admitted: left.is_some(),
        remaining: left.unwrap_or(limit.saturating_sub(used)),
        reset,
        retry_after: (left.is_none() && cost <= limit).then_some(reset),
    }
}

/// The end of the window at `wall` (ns) and its cost. A clock that is set back stays in the window it was in, so that it
/// never opens a window twice.
fn window_of(period: Period, state: &State, wall: Duration) -> (u64, u64) {
    if wall.as_nanos() < u128::from(state.a) {
        return (state.a, state.b);
    }
    let end = match period {
        Period::Fixed(length) => (wall.as_nanos() / nanos(length) + 1) * nanos(length),
        Period::Day | Period::Week | Period::Month | Period::Year => {
            calendar_end(period, wall.as_secs()) * NANOS
        }
    };
    (clamp(end), 0)
}

/// The end, in seconds since the epoch, of the UTC calendar window that `second` is in. Weeks begin on Monday (ISO 8601).
fn calendar_end(period: Period, second: u64) -> u128 {
    const DAY: u64 = 86_400;
    let day = second / DAY;
    let (year, month) = year_and_month(day);
    let end = match period {
        Period::Fixed(_) | Period::Day => day + 1,
        // 1970-01-01 was a Thursday.
        Period::Week => day + 7 - (day + 3) % 7,
        Period::Month if month == 12 => first_of(year + 1, 1),
        Period::Month => first_of(year, month + 1),
        Period::Year => first_of(year + 1, 1),
    };
    u128::from(end) * u128::from(DAY)
}

/// The civil year and month of a day since the epoch (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn year_and_month(day: u64) -> (u64, u64) {
    let shifted = day + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month)
}

/// The day since the epoch on which a month begins (the same source).
fn first_of(year: u64, month: u64) -> u64 {
    let year = year - u64::from(month <= 2);
    let (era, year_of_era) = (year / 400, year % 400);
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year - 719_468
}

fn nanos(duration: Duration) -> u128 {
    duration.as_nanos().max(1)
}

fn duration(nanos: u128) -> Duration {
    Duration::from_nanos(clamp(nanos))
}

fn clamp(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(millis: u64) -> Now {
        Now {
            mono: Duration::from_millis(millis),
            wall: Duration::from_millis(millis),
        }
    }

    /// Asks at `millis`, and is charged if admitted.
    fn ask(rule: &Rule, state: &mut State, cost: u64, millis: u64) -> Verdict {
        let verdict = check(rule, state, cost, at(millis));
        if verdict.admitted {
            take(rule, state, cost, at(millis));
        }
        verdict
    }

    #[test]
    fn a_bucket_admits_its_burst_and_then_its_rate() {
        let (rule, mut state) = (
            Rule::TokenBucket {
                count: 10,
                per: SECOND,
                burst: 3,
            },
            State::default(),
        );
        for left in [2, 1, 0] {
            let verdict = ask(&rule, &mut state, 1, 5_000);
            assert_eq!((verdict.admitted, verdict.remaining), (true, left));
        }
        let refused = ask(&rule, &mut state, 1, 5_000);
        assert_eq!(
            (refused.admitted, refused.retry_after),
            (false, Some(Duration::from_millis(100)))
        );
        assert!(!ask(&rule, &mut state, 1, 5_099).admitted);
        assert!(ask(&rule, &mut state, 1, 5_100).admitted);
        assert_eq!(
            ask(&rule, &mut state, 1, 9_000).reset,
            Duration::from_millis(100)
        );
    }

    #[test]
    fn a_cost_over_the_burst_can_never_be_admitted_and_says_no_time() {
        let (rule, mut state) = (
            Rule::TokenBucket {
                count: 10,
                per: SECOND,
                burst: 3,
            },
            State::default(),
        );
        assert_eq!(ask(&rule, &mut state, 4, 0).retry_after, None);
        assert!(
            ask(&rule, &mut state, 3, 0).admitted,
            "a refusal takes nothing"
        );
    }

    #[test]
    fn a_limit_of_zero_denies_all() {
        for rule in [
            Rule::TokenBucket {
                count: 0,
                per: SECOND,
                burst: 0,
            },
            Rule::SlidingWindow {
                limit: 0,
                window: SECOND,
            },
            Rule::FixedWindow {
                limit: 0,
                period: Period::Fixed(SECOND),
            },
            Rule::Concurrency { limit: 0 },
        ] {
            let verdict = check(&rule, &State::default(), 1, at(7));
            assert_eq!(
                (verdict.admitted, verdict.remaining, verdict.retry_after),
                (false, 0, None),
                "{rule:?}"
            );
        }
    }

    #[test]
    fn a_sliding_window_weighs_the_last_one() {
        let (rule, mut state) = (
            Rule::SlidingWindow {
                limit: 10,
                window: SECOND,
            },
            State::default(),
        );
        for _ in 0..10 {
            assert!(ask(&rule, &mut state, 1, 1_900).admitted);
        }
        let refused = ask(&rule, &mut state, 1, 1_900);
        assert_eq!(refused.retry_after, Some(Duration::from_millis(200)));
        assert!(!ask(&rule, &mut state, 1, 2_099).admitted);
        assert!(
            ask(&rule, &mut state, 1, 2_100).admitted,
            "a tenth of the last window is out of sight"
        );
        assert!(!ask(&rule, &mut state, 1, 2_100).admitted);
        assert_eq!(ask(&rule, &mut state, 1, 4_500).remaining, 9);
    }

    #[test]
    fn a_fixed_window_ends_at_its_time_and_never_opens_twice() {
        let (rule, mut state) = (
            Rule::FixedWindow {
                limit: 2,
                period: Period::Fixed(SECOND),
            },
            State::default(),
        );
        assert!(ask(&rule, &mut state, 2, 1_200).admitted);
        assert_eq!(
            ask(&rule, &mut state, 1, 1_200).retry_after,
            Some(Duration::from_millis(800))
        );
        assert!(
            !ask(&rule, &mut state, 1, 900).admitted,
            "a clock set back stays in its window"
        );
        assert!(ask(&rule, &mut state, 1, 2_000).admitted);
    }

    #[test]
    fn calendar_windows_end_by_the_calendar_in_utc() {
        let check = |period, second: u64, end: u64| {
            assert_eq!(calendar_end(period, second), u128::from(end), "{period:?}")
        };
        check(Period::Day, 0, 86_400);
        check(Period::Week, 0, 4 * 86_400);
        check(Period::Week, 4 * 86_400, 11 * 86_400);
        check(Period::Month, 0, 2_678_400);
        check(Period::Year, 0, 31_536_000);
        check(Period::Month, 1_709_164_800, 1_709_251_200); // 2024-02-29 → 2024-03-01
        check(Period::Month, 1_735_689_599, 1_735_689_600); // 2024-12-31 23:59:59 → 2025-01-01
        check(Period::Year, 1_735_689_600, 1_767_225_600); // 2025-01-01 → 2026-01-01
    }

    #[test]
    fn windows_lie_end_to_end() {
        let day = |days: u64| Duration::from_secs(days * 86_400);
        for period in [
            Period::Fixed(SECOND),
            Period::Fixed(Duration::from_millis(300)),
            Period::Day,
            Period::Week,
            Period::Month,
            Period::Year,
        ] {
            let mut at = day(19_000);
            let [mut start, ..] = window_at(period, at);
            for _ in 0..50 {
                let [from, end, next] = window_at(period, at);
                assert!(from == start && from <= at && at < end, "{period:?} {at:?}");
                assert_eq!(
                    window_at(period, end),
                    [end, next, window_at(period, next)[1]]
                );
                (start, at) = (end, end + (next - end) / 3);
            }
        }
    }

    #[test]
    fn shares_together_are_the_whole_and_no_share_is_nothing() {
        let window = |limit| Rule::FixedWindow {
            limit,
            period: Period::Day,
        };
        assert_eq!(share(&window(100), 8), window(12));
        assert_eq!(share(&window(3), 8), window(1));
        assert_eq!(share(&window(0), 8), window(0));
        assert_eq!(share(&window(100), 0), window(100));
        let bucket = Rule::TokenBucket {
            count: 100,
            per: SECOND,
            burst: 200,
        };
        let part = Rule::TokenBucket {
            count: 100,
            per: 8 * SECOND,
            burst: 25,
        };
        assert_eq!(share(&bucket, 8), part);
    }

    #[test]
    fn calendar_windows_agree_with_a_calendar_library() {
        for day in (0..60_000).step_by(13) {
            let second = i64::from(day) * 86_400;
            let utc = jiff::tz::Offset::UTC;
            let date = utc
                .to_datetime(jiff::Timestamp::from_second(second).unwrap())
                .date();
            let next = date
                .first_of_month()
                .checked_add(jiff::Span::new().months(1))
                .unwrap();
            let end = utc.to_timestamp(next.at(0, 0, 0, 0)).unwrap().as_second();
            assert_eq!(
                calendar_end(Period::Month, second as u64),
                end as u128,
                "{date}"
            );
        }
    }

    #[test]
    fn a_slot_comes_back_when_it_is_released() {
        let (rule, mut state) = (Rule::Concurrency { limit: 2 }, State::default());
        assert!(ask(&rule, &mut state, 1, 0).admitted && ask(&rule, &mut state, 1, 0).admitted);
        assert!(!ask(&rule, &mut state, 1, 0).admitted);
        assert!(!release(&mut state, 1));
        assert!(ask(&rule, &mut state, 1, 0).admitted);
        assert!(!release(&mut state, 1) && release(&mut state, 1));
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let period = prop_oneof![
            (1u64..100_000).prop_map(|millis| Period::Fixed(Duration::from_millis(millis))),
            Just(Period::Day),
            Just(Period::Month),
        ];
        prop_oneof![
            (1u64..200, 1u64..5_000, 1u64..50).prop_map(|(count, per, burst)| Rule::TokenBucket {
                count,
                per: Duration::from_millis(per),
                burst
            }),
            (1u64..50, 1u64..5_000).prop_map(|(limit, window)| Rule::SlidingWindow {
                limit,
                window: Duration::from_millis(window)
            }),
            (1u64..50, period).prop_map(|(limit, period)| Rule::FixedWindow { limit, period }),
            (1u64..50).prop_map(|limit| Rule::Concurrency { limit }),
        ]
    }

    /// Requests as (milliseconds since the one before, cost).
    fn arrivals() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec(
            (prop_oneof![Just(0), 0u64..20, 0u64..3_000], 1u64..4),
            1..200,
        )
    }

    proptest! {
        #[test]
        fn a_bucket_admits_at_most_burst_plus_rate_in_any_time(
            count in 1u64..200, per in 1u64..5_000, burst in 1u64..50, arrivals in arrivals(),
        ) {
            let rule = Rule::TokenBucket { count, per: Duration::from_millis(per), burst };
            let (mut state, mut now, mut admitted) = (State::default(), 0, Vec::new());
            for (gap, cost) in arrivals {
                now += gap;
                if ask(&rule, &mut state, cost, now).admitted {
                    admitted.push((now, cost));
                }
            }
            for (first, (from, _)) in admitted.iter().enumerate() {
                let mut sum = 0;
                for (to, cost) in &admitted[first..] {
                    sum += cost;
                    prop_assert!(sum * per <= burst * per + count * (to - from), "{sum} from {from} to {to}");
                }
            }
        }

        #[test]
        fn a_fixed_window_never_admits_more_than_its_limit(limit in 1u64..50, window in 1u64..5_000, arrivals in arrivals()) {
            let rule = Rule::FixedWindow { limit, period: Period::Fixed(Duration::from_millis(window)) };
            let (mut state, mut now) = (State::default(), 0);
            let mut sums = std::collections::BTreeMap::new();
            for (gap, cost) in arrivals {
                now += gap;
                if ask(&rule, &mut state, cost, now).admitted {
                    *sums.entry(now / window).or_insert(0) += cost;
                }
            }
            prop_assert!(sums.values().all(|sum| *sum <= limit), "{sums:?}");
        }

        #[test]
        fn a_refused_request_is_admitted_once_its_time_has_come(rule in any_rule(), arrivals in arrivals()) {
            prop_assume!(!matches!(rule, Rule::Concurrency { .. }));
            let (mut state, mut now) = (State::default(), 1_000_000);
            for (gap, cost) in arrivals {
                now += gap;
                let verdict = ask(&rule, &mut state, cost, now);
                if let Some(wait) = verdict.retry_after {
                    let later = Now { mono: at(now).mono + wait, wall: at(now).wall + wait };
                    prop_assert!(check(&rule, &state, cost, later).admitted, "{rule:?} {state:?} {wait:?}");
                    if wait > Duration::from_millis(1) {
                        let before = wait - Duration::from_millis(1);
                        let early = Now { mono: at(now).mono + before, wall: at(now).wall + before };
                        prop_assert!(!check(&rule, &state, cost, early).admitted, "{rule:?} {state:?} {wait:?}");
                    }
                }
            }
        }

        #[test]
        fn nothing_overflows(
            rule in any_rule(), a in any::<u64>(), b in any::<u64>(), c in any::<u64>(), cost in any::<u64>(),
            mono in any::<u64>(), wall in any::<u64>(),
        ) {
            let mut state = State { a, b, c };
            let now = Now { mono: Duration::from_nanos(mono), wall: Duration::from_nanos(wall) };
            let _ = check(&rule, &state, cost, now);
            take(&rule, &mut state, cost, now);
        }
    }
}
