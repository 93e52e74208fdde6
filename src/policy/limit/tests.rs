//! The rules of `limit`, as tests.

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
        Rule::Window(Window::Bucket {
            count: 10,
            per: SECOND,
            burst: 3,
        }),
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
fn a_bucket_made_smaller_is_full_at_most() {
    let bucket = |count, per, burst| Rule::Window(Window::Bucket { count, per, burst });
    let mut state = State::default();
    assert!(ask(&bucket(100, SECOND, 120), &mut state, 120, 5_000).admitted);
    let smaller = bucket(5, 60 * SECOND, 5);
    let verdict = ask(&smaller, &mut state, 1, 5_000);
    let (wait, reset) = (verdict.retry_after, verdict.reset);
    assert_eq!((wait, reset), (Some(12 * SECOND), 60 * SECOND));
    // A refusal that is not waited out puts nothing off.
    assert!(!ask(&smaller, &mut state, 1, 16_999).admitted);
    assert!(ask(&smaller, &mut state, 1, 17_000).admitted);
    let hourly = bucket(1, 3_600 * SECOND, 1);
    let verdict = ask(&hourly, &mut state, 1, 17_000);
    assert_eq!(verdict.retry_after, Some(3_600 * SECOND));
}

#[test]
fn a_cost_over_the_burst_can_never_be_admitted_and_says_no_time() {
    let (rule, mut state) = (
        Rule::Window(Window::Bucket {
            count: 10,
            per: SECOND,
            burst: 3,
        }),
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
        Rule::Window(Window::Bucket {
            count: 0,
            per: SECOND,
            burst: 0,
        }),
        Rule::Window(Window::Bucket {
            count: 0,
            per: SECOND,
            burst: 5,
        }),
        Rule::Window(Window::Sliding {
            limit: 0,
            window: SECOND,
        }),
        Rule::Window(Window::Fixed {
            limit: 0,
            period: Period::Fixed(SECOND),
        }),
        Rule::Slots(0),
    ] {
        let verdict = check(&rule, &State::default(), 1, at(7));
        assert_eq!(
            (verdict.admitted, verdict.remaining, verdict.retry_after),
            (false, 0, None),
            "{rule:?}"
        );
    }
}

const TEN_SLIDING: Rule = Rule::Window(Window::Sliding {
    limit: 10,
    window: SECOND,
});

#[test]
fn a_sliding_window_weighs_the_last_one() {
    let (rule, mut state) = (TEN_SLIDING, State::default());
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

/// What docs/limits.md says of it: all of a window's come at its end, and the next one's as soon as they may.
#[test]
fn a_sliding_window_admits_nearly_twice_its_limit_at_worst() {
    let (rule, mut state) = (TEN_SLIDING, State::default());
    let asked = [1_999; 20].into_iter().chain(2_000..2_999);
    let admitted = asked.filter(|at| ask(&rule, &mut state, 1, *at).admitted);
    assert_eq!(admitted.count(), 19);
}

#[test]
fn a_fixed_window_ends_at_its_time_and_never_opens_twice() {
    let (rule, mut state) = (
        Rule::Window(Window::Fixed {
            limit: 2,
            period: Period::Fixed(SECOND),
        }),
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
        let got = end_of(period, Duration::from_secs(second));
        assert_eq!(got, u128::from(end) * NANOS, "{period:?}")
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
    let window = |limit| {
        Rules::from(Rule::Window(Window::Fixed {
            limit,
            period: Period::Day,
        }))
    };
    assert_eq!(share(&window(100), 8, 1), window(12));
    assert_eq!(share(&window(3), 8, 1), window(1));
    assert_eq!(share(&window(0), 8, 1), window(0));
    assert_eq!(share(&window(100), 0, 1), window(100));
    assert_eq!(share(&window(100), 8, 20), window(20));
    assert_eq!(share(&window(100), 8, 101), window(12));
    let bucket = Rules::from(Rule::Window(Window::Bucket {
        count: 100,
        per: SECOND,
        burst: 200,
    }));
    let part = Rules::from(Rule::Window(Window::Bucket {
        count: 100,
        per: 8 * SECOND,
        burst: 25,
    }));
    assert_eq!(share(&bucket, 8, 1), part);
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
            end_of(Period::Month, Duration::from_secs(second as u64)),
            end as u128 * NANOS,
            "{date}"
        );
    }
}

#[test]
fn a_slot_comes_back_when_it_is_released() {
    let (rule, mut state) = (Rule::Slots(2), State::default());
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
        (1u64..200, 1u64..5_000, 1u64..50).prop_map(|(count, per, burst)| Rule::Window(
            Window::Bucket {
                count,
                per: Duration::from_millis(per),
                burst
            }
        )),
        (1u64..50, 1u64..5_000).prop_map(|(limit, window)| Rule::Window(Window::Sliding {
            limit,
            window: Duration::from_millis(window)
        })),
        (1u64..50, period)
            .prop_map(|(limit, period)| Rule::Window(Window::Fixed { limit, period })),
        (1u64..50).prop_map(Rule::Slots),
    ]
}

/// Two rules that share a counter, as before and after a reload: of one kind, with one window.
fn two_of_a_kind() -> impl Strategy<Value = (Rule, Rule)> {
    let numbers = (1u64..200, 1u64..5_000, 1u64..50);
    (any_rule(), numbers).prop_map(|(before, (count, per, limit))| {
        let after = match before {
            Rule::Window(Window::Bucket { .. }) => Rule::Window(Window::Bucket {
                count,
                per: Duration::from_millis(per),
                burst: limit,
            }),
            Rule::Window(Window::Sliding { window, .. }) => {
                Rule::Window(Window::Sliding { limit, window })
            }
            Rule::Window(Window::Fixed { period, .. }) => {
                Rule::Window(Window::Fixed { limit, period })
            }
            Rule::Slots(_) => Rule::Slots(limit),
        };
        (before, after)
    })
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
        let rule = Rule::Window(Window::Bucket { count, per: Duration::from_millis(per), burst });
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
    fn a_sliding_window_never_admits_twice_its_limit_in_its_time(limit in 1u64..50, window in 1u64..5_000, arrivals in arrivals()) {
        let rule = Rule::Window(Window::Sliding { limit, window: Duration::from_millis(window) });
        let (mut state, mut now, mut admitted) = (State::default(), 0, Vec::new());
        for (gap, cost) in arrivals {
            now += gap;
            if ask(&rule, &mut state, cost, now).admitted {
                admitted.push((now, cost));
            }
        }
        for (first, (from, _)) in admitted.iter().enumerate() {
            let within = admitted[first..].iter().take_while(|(to, _)| to - from < window);
            let sum: u64 = within.map(|(_, cost)| cost).sum();
            prop_assert!(sum < 2 * limit, "{sum} from {from} on");
        }
    }

    #[test]
    fn a_fixed_window_never_admits_more_than_its_limit(limit in 1u64..50, window in 1u64..5_000, arrivals in arrivals()) {
        let rule = Rule::Window(Window::Fixed { limit, period: Period::Fixed(Duration::from_millis(window)) });
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
        prop_assume!(!matches!(rule, Rule::Slots(_)));
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
    fn another_rule_of_the_kind_makes_nobody_wait_longer_than_it_ever_does(
        (before, after) in two_of_a_kind(), arrivals in arrivals(),
    ) {
        let longest = match after {
            Rule::Window(Window::Bucket { count, per, burst }) => duration((per.as_nanos() * u128::from(burst)).div_ceil(u128::from(count))),
            Rule::Window(Window::Sliding { window, .. }) => 2 * window,
            Rule::Window(Window::Fixed { period, .. }) => period.at_most(),
            Rule::Slots(_) => SECOND,
        };
        let (mut state, mut now) = (State::default(), 1_000_000);
        for (gap, cost) in arrivals {
            now += gap;
            ask(&before, &mut state, cost, now);
        }
        let verdict = check(&after, &state, 1, at(now));
        prop_assert!(verdict.retry_after.is_none_or(|wait| wait <= longest), "{verdict:?} {state:?}");
        if let Some(wait) = verdict.retry_after.filter(|_| !matches!(after, Rule::Slots(_))) {
            let later = Now { mono: at(now).mono + wait, wall: at(now).wall + wait };
            prop_assert!(check(&after, &state, 1, later).admitted, "{state:?} {wait:?}");
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

#[test]
fn what_is_given_back_can_be_had_again_and_no_more() {
    let (limit, window) = (10, 60 * SECOND);
    let rules = [
        Rule::Window(Window::Bucket {
            count: limit,
            per: window,
            burst: limit,
        }),
        Rule::Window(Window::Sliding { limit, window }),
        Rule::Window(Window::Fixed {
            limit,
            period: Period::Fixed(window),
        }),
    ];
    for rule in rules {
        let mut state = State::default();
        ask(&rule, &mut state, 4, 1_000);
        let before = check(&rule, &state, 0, at(1_000));
        let said = ask(&rule, &mut state, 6, 1_000);
        assert_eq!(said.remaining, 0, "{rule:?}");
        give_back(&rule, &mut state, charged(6, 1_000, said), at(1_000));
        assert_eq!(check(&rule, &state, 0, at(1_000)), before, "{rule:?}");
        // What time has given back already is not given twice.
        let said = ask(&rule, &mut state, 6, 1_000);
        assert_eq!(said.remaining, 0, "{rule:?}");
        give_back(&rule, &mut state, charged(100, 1_000, said), at(180_000));
        let after = check(&rule, &state, 0, at(180_000));
        assert_eq!(after.remaining, limit, "{rule:?}");
    }
}

#[test]
fn what_a_clock_that_was_set_back_charged_comes_back() {
    let rule = Rule::Window(Window::Fixed {
        limit: 10,
        period: Period::Fixed(60 * SECOND),
    });
    let mut state = State::default();
    ask(&rule, &mut state, 4, 130_000);
    let said = ask(&rule, &mut state, 3, 30_000);
    assert_eq!(said.remaining, 3);
    give_back(&rule, &mut state, charged(3, 30_000, said), at(31_000));
    assert_eq!(check(&rule, &state, 0, at(31_000)).remaining, 6);
    // By one that went ahead, opened a window and came back in between, nothing of that window comes back.
    let said = ask(&rule, &mut state, 3, 30_000);
    ask(&rule, &mut state, 5, 200_000);
    give_back(&rule, &mut state, charged(3, 30_000, said), at(31_000));
    assert_eq!(check(&rule, &state, 0, at(31_000)).remaining, 5);
}

#[test]
fn a_bucket_of_another_period_keeps_what_was_used() {
    let bucket = |count, per| {
        Rule::Window(Window::Bucket {
            count,
            per,
            burst: 100,
        })
    };
    let mut state = State::default();
    let hour = bucket(3_600, 3_600 * SECOND);
    // The second finds the first in part drained.
    ask(&hour, &mut state, 1, 1_000);
    ask(&hour, &mut state, 1, 1_001);
    let minute = ask(&bucket(60, 60 * SECOND), &mut state, 1, 1_001);
    assert_eq!(minute.remaining, 97);
}

fn charged(cost: u64, then: u64, said: Verdict) -> Charged {
    Charged {
        cost,
        at: at(then),
        remaining: said.remaining,
        reset: said.reset,
    }
}

#[test]
fn what_a_busy_bucket_was_charged_comes_back_whole() {
    let rule = Rule::Window(Window::Bucket {
        count: 10,
        per: SECOND,
        burst: 100,
    });
    let mut state = State::default();
    ask(&rule, &mut state, 50, 1_000);
    // A flood of requests that wait for half a second and are then refused elsewhere takes nothing.
    for round in 0..20 {
        let then = 1_000 + 10 * round;
        let said = ask(&rule, &mut state, 1, then);
        give_back(&rule, &mut state, charged(1, then, said), at(then + 5));
    }
    assert_eq!(check(&rule, &state, 0, at(2_000)).remaining, 60);
}

#[test]
fn what_comes_back_late_is_not_taken_from_what_others_used_since() {
    let (limit, window) = (10, SECOND);
    let period = Period::Fixed(window);
    let check = |rule, late: u64, left: u64| {
        let mut state = State::default();
        let said = ask(&rule, &mut state, 4, 1_900);
        assert_eq!(said.remaining, 6, "{rule:?}");
        ask(&rule, &mut state, 3, late);
        give_back(&rule, &mut state, charged(4, 1_900, said), at(late));
        let after = super::check(&rule, &state, 0, at(late)).remaining;
        assert_eq!(after, left, "{rule:?} {late}");
        if matches!(rule, Rule::Window(Window::Bucket { .. })) {
            return;
        }
        // By a clock that was read before the others came.
        ask(&rule, &mut state, 4, late);
        give_back(&rule, &mut state, charged(4, 1_900, said), at(1_900));
        let after = super::check(&rule, &state, 0, at(late)).remaining;
        assert!(after <= left - 4, "{rule:?} {late}");
    };
    check(Rule::Window(Window::Fixed { limit, period }), 2_100, 7);
    check(Rule::Window(Window::Fixed { limit, period }), 3_100, 7);
    check(Rule::Window(Window::Sliding { limit, window }), 2_100, 7);
    check(Rule::Window(Window::Sliding { limit, window }), 3_100, 7);
    let bucket = Rule::Window(Window::Bucket {
        count: 10,
        per: window,
        burst: limit,
    });
    // Of which time has made good a part.
    check(bucket, 2_100, 7);
    check(bucket, 3_100, 7);
}
