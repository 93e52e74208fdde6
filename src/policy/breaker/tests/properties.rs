//! What holds of a breaker whatever happens to it.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Op {
    Enter,
    Record(prop::sample::Index, bool, Duration),
    Release(prop::sample::Index),
    Wait(Duration),
    ForceOpen,
    ForceClosed,
    Reset,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        12 => Just(Op::Enter),
        10 => (any::<prop::sample::Index>(), prop::bool::weighted(0.4), 0..3_000u64)
            .prop_map(|(i, good, ms)| Op::Record(i, good, Duration::from_millis(ms))),
        2 => any::<prop::sample::Index>().prop_map(Op::Release),
        6 => (0..8_000u64).prop_map(|ms| Op::Wait(Duration::from_millis(ms))),
    ];
    prop::collection::vec(op, 0..200)
}

fn forced_ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        10 => ops(),
        1 => Just(vec![Op::ForceOpen]),
        1 => Just(vec![Op::ForceClosed]),
        1 => Just(vec![Op::Reset]),
    ];
    prop::collection::vec(op, 0..4).prop_map(|parts| parts.concat())
}

fn any_settings() -> impl Strategy<Value = Settings> {
    let window = prop_oneof![
        (1..30u32).prop_map(Window::Count),
        (1..30u64).prop_map(|s| Window::Time(secs(s))),
    ];
    (
        (window, 1..6u32, 0.05..=1.0f64, 0..4u32),
        prop::option::of((0..3_000u64, 0.05..=1.0f64)),
        (0..10u64, 0..60u64, 0.0..1.0f64),
        (1..5u32, 0.0..=1.0f64, 1..10u64, 0..20u64),
    )
        .prop_map(|(trip, slow, open, half)| Settings {
            window: trip.0,
            minimum_calls: trip.1,
            failure_rate: trip.2,
            consecutive_failures: trip.3,
            slow_call: slow.map(|(ms, rate)| SlowCall {
                duration: Duration::from_millis(ms),
                rate,
            }),
            open_for: secs(open.0),
            max_open_for: secs(open.1),
            jitter: open.2,
            half_open: HalfOpen {
                probes: half.0,
                success_rate: half.1,
                probe_timeout: secs(half.2),
            },
            recover_over: secs(half.3),
        })
}

/// A breaker under random use, with the permits handed out and when.
struct Rig {
    breaker: Breaker,
    now: Duration,
    held: Vec<(Permit, Duration)>,
    spent: Vec<Permit>,
}

impl Rig {
    fn new(settings: Settings) -> Self {
        Rig {
            breaker: Breaker::new(settings),
            now: Duration::ZERO,
            held: Vec::new(),
            spent: Vec::new(),
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Enter => {
                if let Ok(permit) = self.breaker.try_enter(self.now, 0.5) {
                    self.held.push((permit, self.now));
                }
            }
            Op::Record(index, good, elapsed) => {
                if let Some(permit) = self.take(index) {
                    let outcome = if *good { Success } else { Failure };
                    self.breaker
                        .record(permit, outcome, *elapsed, self.now, 0.5);
                }
            }
            Op::Release(index) => {
                if let Some(permit) = self.take(index) {
                    self.breaker.release(permit);
                }
            }
            Op::Wait(time) => self.now = self.now.saturating_add(*time),
            Op::ForceOpen => self.breaker.force_open(),
            Op::ForceClosed => self.breaker.force_closed(),
            Op::Reset => self.breaker.reset(),
        }
    }

    fn take(&mut self, index: &prop::sample::Index) -> Option<Permit> {
        if self.held.is_empty() {
            return None;
        }
        let (permit, _) = self.held.swap_remove(index.index(self.held.len()));
        self.spent.push(permit);
        Some(permit)
    }

    /// Everything there is to see, inner state included.
    fn view(&mut self) -> String {
        self.breaker.snapshot(self.now);
        format!("{:?}", self.breaker)
    }
}

proptest! {
    #[test]
    fn half_open_never_has_more_probes_outstanding_than_allowed(
        settings in any_settings(), ops in forced_ops()
    ) {
        let limits = settings.half_open;
        let mut rig = Rig::new(settings);
        for op in &ops {
            rig.run(op);
            let snapshot = rig.breaker.snapshot(rig.now);
            let outstanding = rig.held.iter().filter(|(permit, since)| {
                permit.generation == snapshot.generation
                    && permit.is_probe()
                    && rig.now - *since < limits.probe_timeout
            }).count();
            prop_assert!(outstanding <= limits.probes as usize);
            if snapshot.state != State::HalfOpen {
                prop_assert_eq!(outstanding, 0);
            }
        }
    }

    #[test]
    fn open_admits_none_before_its_end(settings in any_settings(), ops in forced_ops()) {
        let mut rig = Rig::new(settings);
        for op in &ops {
            rig.run(op);
            if let Some(until) = rig.breaker.snapshot(rig.now).open_until {
                prop_assert!(rig.now < until);
                let last = until - Duration::from_nanos(1);
                for now in [rig.now, rig.now + (until - rig.now) / 2, last] {
                    let refused = rig.breaker.try_enter(now, 0.0);
                    prop_assert_eq!(refused, Err(Refused { retry_after: until - now, is_forced: false }));
                }
            }
        }
    }

    #[test]
    fn window_sums_equal_a_naive_model(
        window in prop_oneof![
            (1..30u32).prop_map(Window::Count),
            (10..30_000u64).prop_map(|ms| Window::Time(Duration::from_millis(ms))),
        ],
        pushes in prop::collection::vec((0..5_000u64, any::<bool>(), any::<bool>(), 0..4u8), 0..200),
    ) {
        let mut calls = Calls::new(window);
        let mut all: Vec<(Duration, Call)> = Vec::new();
        let mut now = Duration::ZERO;
        for (wait, failed, slow, same) in pushes {
            if same == 0 {
                now += Duration::from_millis(wait);
            }
            let call = Call { failed, slow };
            calls.push(call, now);
            all.push((now, call));
            let mut expected = Counts::default();
            match window {
                Window::Count(size) => {
                    let size = size as usize;
                    all.iter().rev().take(size).for_each(|(_, call)| expected.add(*call));
                }
                Window::Time(length) => {
                    let width = length.as_nanos() / 10;
                    let step = now.as_nanos() / width;
                    all.iter()
                        .filter(|(at, _)| at.as_nanos() / width + 10 > step)
                        .for_each(|(_, call)| expected.add(*call));
                }
            }
            prop_assert_eq!(calls.counts(now), expected);
        }
    }

    #[test]
    fn enough_time_and_successes_close_it(settings in any_settings(), ops in ops()) {
        let probes = settings.half_open.probes;
        let mut rig = Rig::new(settings);
        for op in &ops {
            rig.run(op);
        }
        // Steps longer than any opening, probe, window or ramp; what is held stays held. More successes than a window
        // holds, since failures already in it may trip once more as soon as `minimum_calls` are there.
        for _ in 0..40 {
            rig.now += secs(1_000);
            for _ in 0..probes {
                if let Ok(permit) = rig.breaker.try_enter(rig.now, 0.0) {
                    rig.breaker.record(permit, Success, Duration::ZERO, rig.now, 0.0);
                }
            }
        }
        rig.now += secs(1_000);
        prop_assert_eq!(rig.breaker.snapshot(rig.now).state, State::Closed);
        prop_assert!(rig.breaker.try_enter(rig.now, 0.0).is_ok());
    }

    #[test]
    fn late_results_change_nothing(settings in any_settings(), ops in forced_ops()) {
        let timeout = settings.half_open.probe_timeout;
        let mut rig = Rig::new(settings);
        for op in &ops {
            rig.run(op);
            let before = rig.view();
            let generation = rig.breaker.snapshot(rig.now).generation;
            let old = |permit: &Permit| permit.generation != generation;
            let late: Vec<Permit> = rig.held.iter()
                .filter(|(permit, since)| {
                    old(permit) || permit.is_probe() && rig.now - *since >= timeout
                })
                .map(|(permit, _)| *permit)
                .chain(rig.spent.iter().filter(|p| old(p) || p.is_probe()).copied())
                .collect();
            for permit in late {
                rig.breaker.record(permit, Failure, secs(9), rig.now, 0.0);
                rig.breaker.record(permit, Success, secs(0), rig.now, 0.0);
                rig.breaker.release(permit);
            }
            prop_assert_eq!(rig.view(), before);
        }
    }

    #[test]
    fn extreme_values_never_panic(
        durations in prop::collection::vec(extreme_duration(), 7),
        rates in prop::collection::vec(extreme_float(), 5),
        sizes in prop::collection::vec(prop::sample::select(vec![0, 1, 2, u32::MAX]), 4),
        by_count in any::<bool>(),
        steps in prop::collection::vec(
            (extreme_duration(), extreme_duration(), any::<bool>(), extreme_float()), 0..60),
    ) {
        let mut breaker = Breaker::new(Settings {
            window: if by_count { Window::Count(sizes[0]) } else { Window::Time(durations[0]) },
            minimum_calls: sizes[1],
            failure_rate: rates[0],
            consecutive_failures: sizes[2],
            slow_call: Some(SlowCall { duration: durations[1], rate: rates[1] }),
            open_for: durations[2],
            max_open_for: durations[3],
            jitter: rates[2],
            half_open: HalfOpen {
                probes: sizes[3],
                success_rate: rates[3],
                probe_timeout: durations[4],
            },
            recover_over: durations[5],
        });
        // `now` also runs backwards.
        for (now, elapsed, good, draw) in steps {
            if let Ok(permit) = breaker.try_enter(now, draw) {
                let outcome = if good { Success } else { Failure };
                breaker.record(permit, outcome, elapsed, now, draw);
            }
            breaker.snapshot(elapsed);
        }
    }
}

fn extreme_duration() -> impl Strategy<Value = Duration> {
    prop_oneof![
        Just(Duration::ZERO),
        Just(Duration::from_nanos(1)),
        Just(secs(1)),
        Just(Duration::MAX - Duration::from_nanos(1)),
        Just(Duration::MAX),
        (any::<u64>(), 0..1_000_000_000u32).prop_map(|(s, n)| Duration::new(s, n)),
    ]
}

fn extreme_float() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(0.0),
        Just(0.5),
        Just(1.0),
        Just(-1.0),
        Just(f64::MAX),
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(f64::NEG_INFINITY),
    ]
}
