//! `lua/breaker_sync.lua` on a real server: what it makes of the reports of processes by what the file says of the breaker. The other
//! tests of shared breakers go by weirs, and see no more than that they open and close.

use std::time::Duration;

use super::harness::calls::on_a_lane;
use super::harness::redis::{Server, key_prefix};
use super::harness::{DEADLINE, PATIENCE};
use weir::clock;
use weir::store::redis::{Arg, Connections, Script, Value};

/// What the file says; times in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Rules {
    window: u64,
    minimum_calls: u64,
    failure_rate: f64,
    consecutive_failures: u64,
    slow_rate: f64,
    quorum: u64,
    open_for: u64,
    max_open_for: u64,
    jitter: f64,
    probes: u64,
    success_rate: f64,
}

const RULES: Rules = Rules {
    window: 60_000,
    minimum_calls: 10,
    failure_rate: 0.5,
    consecutive_failures: 0,
    slow_rate: -1.0,
    quorum: 1,
    open_for: 60_000,
    max_open_for: 600_000,
    jitter: 0.0,
    probes: 4,
    success_rate: 1.0,
};

/// What a process tells.
#[derive(Debug, Clone, Copy, Default)]
struct Report<'r> {
    /// The generation, the state and its time that it knows, where that is not what was answered last.
    known: Option<(u64, &'r str, u64)>,
    calls: u64,
    failures: u64,
    slow: u64,
    /// Failures behind the last success; `None`: there was none.
    trailing: Option<u64>,
    want: u64,
    demanded: bool,
    held: &'r str,
    results: &'r str,
    /// Processes that it takes for alive.
    peers: u64,
}

/// What it is told.
#[derive(Debug)]
struct Told {
    generation: u64,
    state: String,
    left: u64,
    calls: u64,
    recall: bool,
    slots: usize,
}

/// One breaker.
struct Shared<'a> {
    redis: &'a Connections,
    script: Script,
    keys: [String; 5],
    rules: Rules,
    known: (u64, String),
}

impl<'a> Shared<'a> {
    fn new(redis: &'a Connections, rules: Rules) -> Shared<'a> {
        let prefix = key_prefix();
        Shared {
            redis,
            script: Script::new(include_str!("../../lua/breaker_sync.lua")),
            keys: ["s", "w", "m", "d", "p"].map(|of| format!("{{{prefix}}}:{of}")),
            rules,
            known: (0, "closed".to_owned()),
        }
    }

    async fn tell(&mut self, process: &str, report: Report<'_>) -> Told {
        let rules = &self.rules;
        let known = (self.known.0, self.known.1.as_str(), 0);
        let (generation, state, left) = report.known.unwrap_or(known);
        let args = [
            Arg::Text(process),
            Arg::Int(generation),
            Arg::Text(state),
            Arg::Int(left),
            Arg::Int(report.calls),
            Arg::Int(report.failures),
            Arg::Int(report.slow),
            Arg::Int(u64::from(report.trailing.is_some())),
            Arg::Int(report.trailing.unwrap_or(report.failures)),
            // It has its reasons.
            Arg::Int(report.failures.max(report.slow)),
            Arg::Int(report.want),
            Arg::Int(u64::from(report.demanded)),
            Arg::Text(report.held),
            Arg::Text(report.results),
            Arg::Text("t"),
            Arg::Int(rules.window),
            Arg::Int(rules.minimum_calls),
            Arg::Float(rules.failure_rate),
            Arg::Int(rules.consecutive_failures),
            Arg::Float(rules.slow_rate),
            Arg::Int(rules.quorum),
            Arg::Int(rules.open_for),
            Arg::Int(rules.max_open_for),
            Arg::Float(rules.jitter),
            Arg::Int(rules.probes),
            Arg::Float(rules.success_rate),
            Arg::Int(60_000),
            Arg::Int(60_000),
            Arg::Int(99),
            Arg::Text("channel"),
            Arg::Text("tag"),
            Arg::Float(rules.jitter),
            Arg::Int(report.peers),
        ];
        let keys = self.keys.each_ref().map(String::as_str);
        let answer = self.redis.run(&self.script, &keys, &args).await.unwrap();
        let Value::Array(answer) = answer else {
            panic!("{answer:?}");
        };
        let Value::BulkString(state) = &answer[1] else {
            panic!("{answer:?}");
        };
        let number = |at: usize| match &answer[at] {
            Value::Int(number) => u64::try_from(*number).unwrap(),
            other => panic!("{other:?}"),
        };
        let told = Told {
            generation: number(0),
            state: String::from_utf8(state.clone()).unwrap(),
            left: number(2),
            calls: number(3),
            recall: number(8) == 1,
            slots: answer.len() - 11,
        };
        self.known = (told.generation, told.state.clone());
        told
    }

    /// Has it so that the server's clock was set back by an hour.
    async fn set_back(&self) {
        let script = Script::new("return redis.call('HINCRBY', KEYS[1], 'e', 3600000)");
        let state = [self.keys[0].as_str()];
        self.redis.run(&script, &state, &[]).await.unwrap();
    }

    /// Of these calls, with so many that failed; the state behind it, and for how long.
    async fn fail(&mut self, failures: u64, calls: u64) -> (String, u64) {
        let report = Report {
            calls,
            failures,
            ..Report::default()
        };
        let told = self.tell("a", report).await;
        (told.state, told.left)
    }

    /// Reports this again and again until it `is` so.
    async fn until(&mut self, process: &str, report: Report<'_>, is: impl Fn(&Told) -> bool) {
        let began = clock::now();
        while !is(&self.tell(process, report).await) {
            assert!(began.elapsed() < PATIENCE, "{report:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Once it is half-open, a probe ends so; for how long it is open then.
    async fn probe(&mut self, result: &str) -> (String, u64) {
        self.until("a", Report::default(), |told| told.state == "half_open")
            .await;
        let asks = Report {
            want: 1,
            demanded: true,
            ..Report::default()
        };
        let slots = self.tell("a", asks).await.slots;
        assert_eq!(slots, 1);
        let results = (1..9).map(|slot| format!("{slot}{result}"));
        let results: String = results.collect();
        let ends = Report {
            results: &results,
            ..Report::default()
        };
        let told = self.tell("a", ends).await;
        (told.state, told.left)
    }
}

fn run(test: impl AsyncFnOnce(&Connections)) {
    let server = Server::single();
    let yaml = server.yaml("t").replace("{urls", "{timeout: 5s, urls");
    on_a_lane(&yaml, async |redis| {
        assert!(redis.ready(DEADLINE).await);
        test(&redis).await;
    });
}

fn state(state: &str, left: u64) -> (String, u64) {
    (state.to_owned(), left)
}

#[test]
fn it_opens_by_the_rates_and_the_row_of_the_file() {
    run(async |redis| {
        let mut failing = Shared::new(redis, RULES);
        assert_eq!(failing.fail(9, 9).await, state("closed", 0));
        let mut failing = Shared::new(redis, RULES);
        assert_eq!(failing.fail(4, 10).await, state("closed", 0));
        assert_eq!(failing.fail(2, 2).await, state("open", 60_000));

        for (slow_rate, slow, expected) in [
            (0.8, 7, "closed"),
            (0.8, 8, "open"),
            // Without `slow_call`.
            (-1.0, 10, "closed"),
        ] {
            let mut slowing = Shared::new(redis, Rules { slow_rate, ..RULES });
            let report = Report {
                calls: 10,
                slow,
                ..Report::default()
            };
            assert_eq!(slowing.tell("a", report).await.state, expected, "{slow}");
        }

        let rules = Rules {
            minimum_calls: 99,
            consecutive_failures: 3,
            ..RULES
        };
        let mut in_a_row = Shared::new(redis, rules);
        assert_eq!(in_a_row.fail(2, 2).await, state("closed", 0));
        // A success, and one more failure.
        let report = Report {
            calls: 2,
            failures: 1,
            trailing: Some(1),
            ..Report::default()
        };
        assert_eq!(in_a_row.tell("a", report).await.state, "closed");
        assert_eq!(in_a_row.fail(1, 1).await, state("closed", 0));
        assert_eq!(in_a_row.fail(1, 1).await, state("open", 60_000));
    });
}

#[test]
fn who_has_not_been_heard_yet_counts_as_one_who_does_not_doubt() {
    run(async |redis| {
        let rules = Rules { quorum: 2, ..RULES };
        let mut shared = Shared::new(redis, rules);
        let fails = |peers| Report {
            calls: 20,
            failures: 20,
            peers,
            ..Report::default()
        };
        assert_eq!(shared.tell("a", fails(2)).await.state, "closed");
        let strays = Report {
            failures: 1,
            ..fails(3)
        };
        // By one call alone, unless all that live doubt.
        assert_eq!(shared.tell("b", strays).await.state, "closed");
        assert_eq!(shared.tell("a", fails(0)).await.state, "open");
        let mut alone = Shared::new(redis, rules);
        assert_eq!(alone.tell("a", fails(1)).await.state, "open");
    });
}

#[test]
fn its_window_forgets_calls() {
    run(async |redis| {
        let rules = Rules {
            window: 1_000,
            ..RULES
        };
        let mut shared = Shared::new(redis, rules);
        shared.fail(0, 1_000_000).await;
        let began = clock::now();
        let goes_on = Report {
            calls: 1,
            trailing: Some(0),
            ..Report::default()
        };
        shared
            .until("a", goes_on, |told| told.calls < 1_000_000)
            .await;
        let lasted = began.elapsed();
        assert!((850..5_000).contains(&lasted.as_millis()), "{lasted:?}");
    });
}

#[test]
fn each_opening_in_a_row_lasts_twice_as_long_up_to_the_most() {
    run(async |redis| {
        let rules = Rules {
            open_for: 20,
            max_open_for: 60,
            jitter: 0.5,
            probes: 1,
            ..RULES
        };
        let mut shared = Shared::new(redis, rules);
        assert_eq!(shared.fail(10, 10).await, state("open", 30));
        assert_eq!(shared.probe("-").await, state("open", 60));
        assert_eq!(shared.probe("-").await, state("open", 90));
        assert_eq!(shared.probe("-").await, state("open", 90));
        assert_eq!(shared.probe("+").await, state("recovering", 60_000));

        // So it is behind one that a Redis has lost.
        let mut lost = Shared::new(redis, rules);
        let known = Some((7, "open", 10));
        lost.tell(
            "a",
            Report {
                known,
                ..Report::default()
            },
        )
        .await;
        assert_eq!(lost.probe("-").await, state("open", 60));
    });
}

#[test]
fn probes_are_shared_out_and_judged_by_the_rate_of_the_file() {
    run(async |redis| {
        let half_open = async |rules| {
            let mut shared = Shared::new(redis, rules);
            let known = Some((1, "half_open", 0));
            shared
                .tell(
                    "b",
                    Report {
                        known,
                        ..Report::default()
                    },
                )
                .await;
            shared
        };
        let rules = Rules {
            success_rate: 0.5,
            ..RULES
        };
        let asks = Report {
            want: 4,
            demanded: true,
            ..Report::default()
        };
        for (results, expected) in [
            ("1+,2+", "recovering"),
            ("1+,2-", "half_open"),
            ("1-,2-", "half_open"),
        ] {
            let mut shared = half_open(rules).await;
            // Of two processes each has a half.
            assert_eq!(shared.tell("a", asks).await.slots, 2);
            assert_eq!(shared.tell("b", asks).await.slots, 2);
            let ends = Report {
                results,
                ..Report::default()
            };
            let told = shared.tell("a", ends).await;
            assert_eq!(told.state, expected, "{results}");
        }
        let mut shared = half_open(rules).await;
        shared.tell("a", asks).await;
        shared.tell("b", asks).await;
        let ends = |results| Report {
            results,
            ..Report::default()
        };
        shared.tell("a", ends("1-,2-")).await;
        assert_eq!(shared.tell("b", ends("3-")).await.state, "open");

        let one = Rules { probes: 1, ..RULES };
        let mut shared = half_open(one).await;
        assert_eq!(shared.tell("a", asks).await.slots, 1);
        assert_eq!(shared.tell("b", asks).await.slots, 0);
        // What is held and not used is called back,
        let held = Report {
            held: "1",
            ..Report::default()
        };
        let began = clock::now();
        while !shared.tell("a", held).await.recall {
            assert!(began.elapsed() < PATIENCE);
            shared.tell("b", asks).await;
        }
        // and is for whose requests ask for it.
        let spare = Report {
            want: 1,
            ..Report::default()
        };
        shared.tell("b", asks).await;
        assert_eq!(shared.tell("a", spare).await.slots, 0);
        assert_eq!(shared.tell("b", asks).await.slots, 1);
    });
}

#[test]
fn one_sick_process_keeps_no_breaker_open_and_a_quorum_does() {
    run(async |redis| {
        let ends = |results, held| Report {
            results,
            held,
            ..Report::default()
        };
        let asks = Report {
            want: 4,
            demanded: true,
            ..Report::default()
        };
        let rules = Rules { quorum: 2, ..RULES };
        // Both have half of the probes, and all that `a` sends fail.
        let half_failed = async || {
            let mut shared = Shared::new(redis, rules);
            let known = Some((1, "half_open", 0));
            let begins = Report { known, ..asks };
            assert_eq!(shared.tell("b", begins).await.slots, 4);
            shared.tell("b", ends("", "1,2")).await;
            assert_eq!(shared.tell("a", asks).await.slots, 2);
            assert_eq!(shared.tell("a", ends("5-", "6")).await.state, "half_open");
            // One of the other's comes free, and is not for who has failed.
            shared.tell("b", ends("", "1")).await;
            let held = Report { held: "6", ..asks };
            assert_eq!(shared.tell("a", held).await.slots, 0);
            assert_eq!(shared.tell("a", ends("6-", "")).await.state, "half_open");
            let rest = Report { held: "1", ..asks };
            assert_eq!(shared.tell("b", rest).await.slots, 1);
            shared
        };
        let mut shared = half_failed().await;
        assert_eq!(shared.tell("b", ends("1+", "7")).await.state, "half_open");
        assert_eq!(shared.tell("b", ends("7+", "")).await.state, "recovering");
        let mut shared = half_failed().await;
        assert_eq!(shared.tell("b", ends("1-", "7")).await.state, "open");
        // It does not wait for ever for those who say nothing.
        let mut shared = half_failed().await;
        let is_open = |told: &Told| told.state == "open";
        shared.until("a", Report::default(), is_open).await;
        // Nor for an hour where a clock is set back by one.
        let mut shared = half_failed().await;
        shared.set_back().await;
        shared.until("a", Report::default(), is_open).await;
    });
}

/// It asks again, and may never hear an answer.
#[test]
fn who_does_not_know_of_its_slots_is_given_no_others() {
    run(async |redis| {
        let mut shared = Shared::new(redis, RULES);
        let known = Some((3, "half_open", 0));
        let is_there = Report {
            known,
            ..Report::default()
        };
        shared.tell("a", is_there).await;
        let asks = Report {
            known: Some((2, "open", 0)),
            want: 4,
            demanded: true,
            ..Report::default()
        };
        assert_eq!(shared.tell("b", asks).await.slots, 2);
        assert_eq!(shared.tell("b", asks).await.slots, 0);
        assert_eq!(shared.tell("a", Report { known, ..asks }).await.slots, 2);
    });
}

#[test]
fn what_an_operator_forces_is_later_than_all_that_is_known() {
    run(async |redis| {
        let mut shared = Shared::new(redis, RULES);
        let known = Some((7, "half_open", 0));
        let asks = Report {
            known,
            want: 2,
            demanded: true,
            ..Report::default()
        };
        assert_eq!(shared.tell("a", asks).await.slots, 2);
        let force = Script::new(include_str!("../../lua/breaker_force.lua"));
        // By the process, or by Redis where the process knows less.
        for (known, generation) in [(9, 10), (3, 11)] {
            let args = [
                Arg::Text("closed"),
                Arg::Int(known),
                Arg::Text("channel"),
                Arg::Text("tag"),
            ];
            let [state, _, _, doubters, probes] = shared.keys.each_ref().map(String::as_str);
            let forced = redis.run(&force, &[state, doubters, probes], &args).await;
            assert_eq!(forced, Ok(Value::Int(generation)));
        }
        // No number is given to two slots.
        let last = Script::new("return redis.call('HGET', KEYS[1], 'p')");
        let last = redis.run(&last, &[&shared.keys[0]], &[]).await.unwrap();
        assert_eq!(last, Value::BulkString(b"2".to_vec()));
    });
}

#[test]
fn what_an_operator_forces_outlives_a_fleet_that_is_away() {
    run(async |redis| {
        let mut shared = Shared::new(redis, RULES);
        let known = Some((3, "forced_open", 0));
        shared
            .tell(
                "a",
                Report {
                    known,
                    ..Report::default()
                },
            )
            .await;
        let lives = Script::new("return redis.call('PTTL', KEYS[1])");
        let lives = redis.run(&lives, &[&shared.keys[0]], &[]).await.unwrap();
        let day = 86_400_000;
        assert!(
            matches!(lives, Value::Int(lives) if lives > 29 * day),
            "{lives:?}"
        );
    });
}
