//! The rules of `breaker`, as tests.

mod properties;

use super::CallOutcome::{Failure, Success};
use super::*;

const FAST: Duration = Duration::from_millis(1);

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn settings() -> Settings {
    Settings {
        window: Window::Count(10),
        minimum_calls: 4,
        failure_rate: 0.5,
        consecutive_failures: 0,
        slow_call: None,
        open_for: secs(10),
        max_open_for: secs(60),
        jitter: 0.0,
        half_open: HalfOpen {
            probes: 2,
            success_rate: 1.0,
            probe_timeout: secs(5),
        },
        recover_over: secs(20),
    }
}

fn call(breaker: &mut Breaker, outcome: CallOutcome, elapsed: Duration, now: Duration) {
    let permit = breaker.try_enter(now, 0.0).expect("admitted");
    breaker.record(permit, outcome, elapsed, now, 0.0);
}

fn calls(breaker: &mut Breaker, outcomes: &[CallOutcome], now: Duration) {
    for outcome in outcomes {
        call(breaker, *outcome, FAST, now);
    }
}

fn state(breaker: &mut Breaker, now: Duration) -> State {
    breaker.snapshot(now).state
}

/// A breaker that opened at zero.
fn opened(settings: Settings) -> Breaker {
    let mut breaker = Breaker::new(settings);
    while state(&mut breaker, Duration::ZERO) == State::Closed {
        call(&mut breaker, Failure, FAST, Duration::ZERO);
    }
    breaker
}

#[test]
fn a_successor_goes_on_in_the_same_state_by_its_own_settings() {
    let shorter = Settings {
        open_for: secs(3),
        max_open_for: secs(15),
        ..settings()
    };
    let succeed = |old: &Breaker| {
        let mut new = Breaker::new(shorter.clone());
        new.succeed(old);
        new
    };
    // Open until the time that it was to be; each next opening is as long as the new settings allow.
    let mut old = opened(settings());
    let until = |breaker: &mut Breaker, now| breaker.snapshot(now).open_until;
    let mut new = succeed(&old);
    assert_eq!(until(&mut new, secs(0)), Some(secs(10)));
    assert_eq!(new.snapshot(secs(0)).calls, 0);
    call(&mut new, Failure, FAST, secs(10));
    assert_eq!(until(&mut new, secs(10)), Some(secs(25)));
    // Half-open, it begins anew with its probes; a late result of an old one says nothing.
    let late = old.try_enter(secs(10), 0.0).expect("a probe");
    let mut new = succeed(&old);
    new.record(late, Failure, FAST, secs(10), 0.0);
    calls(&mut new, &[Success; 2], secs(10));
    assert_eq!(state(&mut new, secs(10)), State::Recovering);
    let mut next = succeed(&new);
    assert_eq!(state(&mut next, secs(29)), State::Recovering);
    assert_eq!(state(&mut next, secs(30)), State::Closed);
    // What was its base gives way to the new one.
    calls(&mut next, &[Failure; 4], secs(30));
    assert_eq!(until(&mut next, secs(30)), Some(secs(33)));
    old.force_open();
    assert_eq!(state(&mut succeed(&old), secs(99)), State::ForcedOpen);
    old.force_closed();
    assert_eq!(state(&mut succeed(&old), secs(99)), State::ForcedClosed);
}

#[test]
fn failure_rate_trips_once_minimum_calls_are_in_the_window() {
    let check = |outcomes: &[CallOutcome], expected| {
        let mut breaker = Breaker::new(settings());
        calls(&mut breaker, outcomes, secs(0));
        assert_eq!(state(&mut breaker, secs(0)), expected, "{outcomes:?}");
    };
    check(&[Failure, Failure, Failure], State::Closed);
    check(&[Failure, Failure, Success, Success], State::Open);
    check(&[Failure, Success, Success, Success], State::Closed);
    check(
        &[Failure, Success, Success, Success, Failure],
        State::Closed,
    );
    check(&[Success, Success, Success, Success], State::Closed);
}

#[test]
fn rate_that_is_met_exactly_trips_despite_floating_point() {
    let mut breaker = Breaker::new(Settings {
        window: Window::Count(100),
        minimum_calls: 100,
        failure_rate: 0.07,
        ..settings()
    });
    calls(&mut breaker, &[Success; 93], secs(0));
    calls(&mut breaker, &[Failure; 7], secs(0));
    assert_eq!(state(&mut breaker, secs(0)), State::Open);
}

#[test]
fn minimum_calls_beyond_a_count_window_means_a_full_window() {
    let mut breaker = Breaker::new(Settings {
        minimum_calls: 1000,
        ..settings()
    });
    calls(&mut breaker, &[Failure; 10], secs(0));
    assert_eq!(state(&mut breaker, secs(0)), State::Open);
}

#[test]
fn consecutive_failures_trip_below_minimum_calls() {
    let mut breaker = Breaker::new(Settings {
        consecutive_failures: 3,
        minimum_calls: 10,
        ..settings()
    });
    calls(
        &mut breaker,
        &[Failure, Failure, Success, Failure, Failure],
        secs(0),
    );
    assert_eq!(state(&mut breaker, secs(0)), State::Closed);
    calls(&mut breaker, &[Failure], secs(0));
    assert_eq!(state(&mut breaker, secs(0)), State::Open);
}

#[test]
fn slow_calls_trip_even_when_they_succeed() {
    let mut breaker = Breaker::new(Settings {
        slow_call: Some(SlowCall {
            duration: secs(1),
            rate: 0.5,
        }),
        ..settings()
    });
    // As long as the limit is not yet longer.
    for elapsed in [FAST, secs(1), secs(2)] {
        call(&mut breaker, Success, elapsed, secs(0));
    }
    assert_eq!(state(&mut breaker, secs(0)), State::Closed);
    call(&mut breaker, Success, secs(2), secs(0));
    let snapshot = breaker.snapshot(secs(0));
    assert_eq!(
        (snapshot.state, snapshot.slow, snapshot.failures),
        (State::Open, 2, 0)
    );
}

#[test]
fn slow_probe_did_not_succeed() {
    let mut breaker = opened(Settings {
        slow_call: Some(SlowCall {
            duration: secs(1),
            rate: 1.0,
        }),
        ..settings()
    });
    call(&mut breaker, Success, secs(2), secs(10));
    assert_eq!(state(&mut breaker, secs(10)), State::Open);
}

#[test]
fn time_window_forgets_in_tenths() {
    let mut breaker = Breaker::new(Settings {
        window: Window::Time(secs(10)),
        minimum_calls: 4,
        ..settings()
    });
    calls(&mut breaker, &[Failure, Failure, Failure], secs(0));
    assert_eq!(breaker.snapshot(Duration::from_millis(9_999)).calls, 3);
    assert_eq!(breaker.snapshot(secs(10)).calls, 0);
    calls(&mut breaker, &[Failure], secs(10));
    assert_eq!(state(&mut breaker, secs(10)), State::Closed);
}

#[test]
fn open_refuses_until_its_end_and_says_when() {
    let mut breaker = opened(settings());
    assert_eq!(breaker.snapshot(secs(3)).open_until, Some(secs(10)));
    assert_eq!(
        breaker.try_enter(secs(3), 0.0),
        Err(Refused {
            retry_after: secs(7),
            is_forced: false
        })
    );
    assert!(breaker.try_enter(secs(10), 0.0).is_ok_and(|p| p.is_probe()));
}

#[test]
fn open_keeps_the_numbers_that_tripped_it() {
    let snapshot = opened(settings()).snapshot(secs(1));
    assert_eq!((snapshot.calls, snapshot.failures), (4, 4));
}

#[test]
fn jitter_lengthens_the_opening_and_the_retry() {
    let mut breaker = Breaker::new(Settings {
        jitter: 0.5,
        consecutive_failures: 1,
        ..settings()
    });
    let permit = breaker.try_enter(secs(0), 0.0).expect("closed");
    breaker.record(permit, Failure, FAST, secs(0), 0.5);
    assert_eq!(
        breaker.snapshot(secs(0)).open_until,
        Some(Duration::from_millis(12_500))
    );
    let retry_after = breaker.try_enter(Duration::from_millis(2_500), 1.0);
    assert_eq!(
        retry_after,
        Err(Refused {
            retry_after: secs(15),
            is_forced: false
        })
    );
}

#[test]
fn reopening_doubles_up_to_the_maximum_and_recovery_resets_it() {
    let mut breaker = opened(settings());
    let mut now = secs(0);
    for expected in [10, 20, 40, 60, 60] {
        let until = breaker.snapshot(now).open_until.expect("open");
        assert_eq!(until - now, secs(expected));
        now = until;
        call(&mut breaker, Failure, FAST, now);
    }
    now = breaker.snapshot(now).open_until.expect("open");
    calls(&mut breaker, &[Success, Success], now);
    now += secs(20);
    assert_eq!(state(&mut breaker, now), State::Closed);
    calls(&mut breaker, &[Failure; 4], now);
    assert_eq!(breaker.snapshot(now).open_until, Some(now + secs(10)));
}

#[test]
fn trip_while_recovering_doubles_too() {
    let mut breaker = opened(Settings {
        consecutive_failures: 1,
        ..settings()
    });
    calls(&mut breaker, &[Success, Success], secs(10));
    let now = secs(29);
    while state(&mut breaker, now) == State::Recovering {
        if let Ok(permit) = breaker.try_enter(now, 0.0) {
            breaker.record(permit, Failure, FAST, now, 0.0);
        }
    }
    assert_eq!(breaker.snapshot(now).open_until, Some(now + secs(20)));
}

#[test]
fn probes_are_judged_as_soon_as_the_rest_cannot_matter() {
    let check = |outcomes: &[CallOutcome], expected| {
        let mut breaker = opened(Settings {
            half_open: HalfOpen {
                probes: 4,
                success_rate: 0.5,
                probe_timeout: secs(5),
            },
            ..settings()
        });
        calls(&mut breaker, outcomes, secs(10));
        assert_eq!(state(&mut breaker, secs(10)), expected, "{outcomes:?}");
    };
    check(&[Success], State::HalfOpen);
    check(&[Success, Success], State::Recovering);
    check(&[Failure, Failure], State::HalfOpen);
    check(&[Failure, Failure, Failure], State::Open);
    check(&[Failure, Failure, Success, Success], State::Recovering);
    check(&[Failure, Failure, Success, Failure], State::Open);
}

#[test]
fn success_rate_of_zero_still_needs_one_success() {
    let mut breaker = opened(Settings {
        half_open: HalfOpen {
            probes: 2,
            success_rate: 0.0,
            probe_timeout: secs(5),
        },
        ..settings()
    });
    calls(&mut breaker, &[Failure, Failure], secs(10));
    assert_eq!(state(&mut breaker, secs(10)), State::Open);
}

#[test]
fn probe_slots_are_freed_by_release_and_a_probe_that_times_out_has_failed() {
    let mut breaker = opened(settings());
    let first = breaker.try_enter(secs(10), 0.0).expect("a slot");
    let second = breaker.try_enter(secs(12), 0.0).expect("a slot");
    assert_eq!(
        breaker.try_enter(secs(13), 0.0),
        Err(Refused {
            retry_after: secs(2),
            is_forced: false
        })
    );
    breaker.release(second);
    breaker.release(second);
    assert!(breaker.try_enter(secs(13), 0.0).is_ok());
    assert!(breaker.try_enter(secs(13), 0.0).is_err());
    // The first has had its time, and one failure of two decides: open again, for twice as long.
    let refused = breaker.try_enter(secs(15), 0.0);
    assert_eq!(
        refused,
        Err(Refused {
            retry_after: secs(20),
            is_forced: false
        })
    );
    breaker.record(first, Success, secs(6), secs(16), 0.0);
    assert_eq!(state(&mut breaker, secs(34)), State::Open);
    assert_eq!(state(&mut breaker, secs(35)), State::HalfOpen);
}

#[test]
fn probe_counts_once() {
    let mut breaker = opened(settings());
    let permit = breaker.try_enter(secs(10), 0.0).expect("a slot");
    breaker.record(permit, Success, FAST, secs(10), 0.0);
    breaker.record(permit, Success, FAST, secs(10), 0.0);
    assert_eq!(state(&mut breaker, secs(10)), State::HalfOpen);
}

#[test]
fn ramp_admits_a_growing_share() {
    let mut breaker = opened(settings());
    calls(&mut breaker, &[Success, Success], secs(10));
    let mut admitted = |now| {
        (0..300)
            .filter(|_| breaker.try_enter(now, 0.0).is_ok())
            .count()
    };
    for (now, expected) in [(secs(10), 100), (secs(15), 150), (secs(20), 200)] {
        assert!(admitted(now).abs_diff(expected) <= 1, "at {now:?}");
    }
    assert_eq!(admitted(secs(30)), 300);
}

#[test]
fn no_ramp_closes_at_once() {
    let mut breaker = opened(Settings {
        recover_over: Duration::ZERO,
        ..settings()
    });
    calls(&mut breaker, &[Success, Success], secs(10));
    assert_eq!(state(&mut breaker, secs(10)), State::Closed);
}

#[test]
fn result_of_a_call_the_ramp_admitted_counts_after_it_closed() {
    let mut breaker = opened(settings());
    calls(&mut breaker, &[Success, Success], secs(10));
    let permit = breaker.try_enter(secs(29), 0.0).expect("most are admitted");
    breaker.record(permit, Failure, FAST, secs(31), 0.0);
    let snapshot = breaker.snapshot(secs(31));
    assert_eq!((snapshot.state, snapshot.failures), (State::Closed, 1));
}

#[test]
fn forced_states_hold_until_reset() {
    let mut breaker = Breaker::new(settings());
    breaker.force_open();
    let refused = breaker.try_enter(secs(1_000_000), 0.0);
    assert!(refused.is_err_and(|refused| refused.is_forced));
    assert_eq!(state(&mut breaker, secs(1_000_000)), State::ForcedOpen);
    breaker.force_closed();
    calls(&mut breaker, &[Failure; 50], secs(0));
    let snapshot = breaker.snapshot(secs(0));
    assert_eq!(
        (snapshot.state, snapshot.failures),
        (State::ForcedClosed, 10)
    );
    breaker.reset();
    let snapshot = breaker.snapshot(secs(0));
    assert_eq!((snapshot.state, snapshot.calls), (State::Closed, 0));
}

#[test]
fn states_have_the_names_of_the_metrics() {
    let names = [
        (State::Closed, "closed"),
        (State::Open, "open"),
        (State::HalfOpen, "half_open"),
        (State::Recovering, "recovering"),
        (State::ForcedOpen, "forced_open"),
        (State::ForcedClosed, "forced_closed"),
    ];
    for (state, name) in names {
        assert_eq!(state.as_str(), name);
    }
}

#[test]
fn each_stage_of_a_probe_has_its_own_time() {
    let half = |stages: &[(Stage, u64)], at, expected| {
        let mut breaker = opened(Settings {
            half_open: HalfOpen {
                probes: 1,
                success_rate: 1.0,
                probe_timeout: secs(5),
            },
            ..settings()
        });
        let permit = breaker.try_enter(secs(10), 0.0).expect("a slot");
        for (stage, at) in stages {
            breaker.come(permit, *stage, secs(*at), 0.0);
        }
        assert_eq!(state(&mut breaker, secs(at)), expected, "{stages:?}");
        (breaker, permit)
    };
    let well = Stage::Answered(Success, FAST);
    half(
        &[(Stage::Waiting, 10), (Stage::Working, 14)],
        18,
        State::HalfOpen,
    );
    half(
        &[(Stage::Waiting, 10), (Stage::Working, 14)],
        19,
        State::Open,
    );
    half(&[(Stage::Working, 14), (well, 18)], 22, State::HalfOpen);
    half(&[(Stage::Working, 14), (well, 18)], 23, State::Recovering);
    half(&[(Stage::Answered(Failure, FAST), 12)], 17, State::Open);
    // Another try works anew.
    half(&[(well, 12), (Stage::Working, 13)], 18, State::Open);
    // One that breaks off within its time has failed, as any other call.
    let (mut breaker, permit) = half(&[(well, 12)], 16, State::HalfOpen);
    breaker.record(permit, Failure, FAST, secs(16), 0.0);
    assert_eq!(state(&mut breaker, secs(16)), State::Open);
    // The ramp began when the time was over, not when someone looked.
    half(&[(well, 10)], 34, State::Recovering);
    half(&[(well, 10)], 35, State::Closed);
}

#[test]
fn a_probe_that_waits_long_gives_its_slot_up_and_says_nothing() {
    let mut breaker = opened(settings());
    let waiting = [10, 10].map(|now| breaker.try_enter(secs(now), 0.0).expect("a slot"));
    for permit in waiting {
        breaker.come(permit, Stage::Waiting, secs(11), 0.0);
    }
    assert_eq!(
        breaker.try_enter(secs(15), 0.0),
        Err(Refused {
            retry_after: secs(1),
            is_forced: false
        })
    );
    calls(&mut breaker, &[Success], secs(16));
    for permit in waiting {
        breaker.come(permit, Stage::Working, secs(16), 0.0);
        breaker.record(permit, Failure, FAST, secs(17), 0.0);
    }
    assert_eq!(state(&mut breaker, secs(30)), State::HalfOpen);
    calls(&mut breaker, &[Success], secs(30));
    assert_eq!(state(&mut breaker, secs(30)), State::Recovering);
}
