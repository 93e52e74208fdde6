//! The model by which fleets that share a breaker are simulated (`policy::breaker::shared`), against `lua/breaker_sync.lua` on a real server whose
//! time is the test's: random reports, of which some are late, and what both answer.

#[path = "../../src/policy/breaker/shared/tests/model.rs"]
mod model;

use std::time::Duration;

use super::harness::DEADLINE;
use super::harness::calls::on_a_lane;
use super::harness::redis::{Server, key_prefix};
use super::simulation::with_time_of_the_test;
use fastrand::Rng;
use model::{PROBES, settings};
use weir::policy::breaker::shared::{Delta, HOLD, Reply, Report, SLOT_GRACE, Word};
use weir::policy::breaker::{HalfOpen, Settings, SlowCall, State, Window};
use weir::store::redis::{Arg, Connections, Script, Value};

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
const BREAKERS: usize = 60;
const REPORTS: usize = 80;

fn reaches(part: u64, whole: u64, rate: f64) -> bool {
    part > 0 && part as f64 / whole as f64 >= rate
}

/// What a process goes by.
#[derive(Clone)]
struct Process {
    known: Word,
    held: Vec<u64>,
    last_slot: u64,
}

fn report(random: &mut Rng, process: &mut Process) -> Report {
    let calls = random.u64(..6);
    let failures = random.u64(..=calls);
    let mut known = process.known;
    // It knows what Redis has lost.
    let tells = random.u8(..40) == 0;
    if tells {
        known.generation += random.u64(1..4);
        known.state = State::ALL[random.usize(..State::ALL.len())];
        known.left = match known.state {
            State::Open => random.u32(..8_000) * MS,
            State::Recovering => random.u32(..1_000) * MS,
            State::Closed | State::HalfOpen | State::ForcedOpen | State::ForcedClosed => {
                Duration::ZERO
            }
        };
    }
    let ends = |held: &mut Vec<u64>, random: &mut Rng| {
        let count = random.usize(..=held.len());
        held.drain(..count).collect::<Vec<_>>()
    };
    let ended = ends(&mut process.held, random);
    let results = ended.into_iter().map(|id| (id, random.u8(..3) > 0));
    let results = results.collect();
    // Given back unused.
    if random.u8(..4) == 0 {
        ends(&mut process.held, random);
    }
    Report {
        known,
        delta: Delta {
            calls,
            failures,
            slow: random.u64(..=calls) / 2,
            trailing: random.u64(..=failures),
            succeeded: failures < calls,
        },
        // What it trips as it tells a lost state is counted otherwise, which nobody goes by.
        doubts: if tells { 0 } else { random.u64(..3) },
        want: random.u32(..4),
        demanded: random.bool(),
        held: process.held.clone(),
        last_slot: process.last_slot,
        results,
        peers: random.u64(..5),
    }
}

async fn ask(
    redis: &Connections,
    script: &Script,
    prefix: &str,
    (process, report): (usize, &Report),
    quorum: usize,
    now: Duration,
) -> Reply {
    let keys = ["s", "w", "m", "d", "p"].map(|of| format!("{{{prefix}}}:{of}"));
    let keys = keys.each_ref().map(String::as_str);
    let millis = |time: Duration| Arg::Int(u64::try_from(time.as_millis()).unwrap());
    let settings = settings();
    let held: Vec<_> = report.held.iter().map(ToString::to_string).collect();
    let mark = |well: bool| if well { '+' } else { '-' };
    let results = report.results.iter();
    let results: Vec<_> = results
        .map(|(id, well)| format!("{id}{}", mark(*well)))
        .collect();
    let (process, held, results) = (process.to_string(), held.join(","), results.join(","));
    let args = [
        Arg::Text(&process),
        Arg::Int(report.known.generation),
        Arg::Text(report.known.state.as_str()),
        millis(report.known.left),
        Arg::Int(report.delta.calls),
        Arg::Int(report.delta.failures),
        Arg::Int(report.delta.slow),
        Arg::Int(u64::from(report.delta.succeeded)),
        Arg::Int(report.delta.trailing),
        Arg::Int(report.doubts),
        Arg::Int(report.want.into()),
        Arg::Int(u64::from(report.demanded)),
        Arg::Text(&held),
        Arg::Text(&results),
        Arg::Text("t"),
        // It forgets nothing.
        Arg::Int(1_000_000_000_000),
        Arg::Int(settings.minimum_calls.into()),
        Arg::Float(settings.failure_rate),
        Arg::Int(0),
        Arg::Float(0.5),
        Arg::Int(quorum as u64),
        millis(settings.open_for),
        millis(settings.max_open_for),
        Arg::Int(0),
        Arg::Int(PROBES.into()),
        Arg::Float(settings.half_open.success_rate),
        millis(HOLD + settings.half_open.probe_timeout + SLOT_GRACE),
        millis(settings.recover_over),
        Arg::Int(report.last_slot),
        Arg::Text("channel"),
        Arg::Text("tag"),
        Arg::Int(0),
        Arg::Int(report.peers),
        Arg::Int(now.as_secs()),
        Arg::Int(u64::from(now.subsec_micros())),
    ];
    let answer = redis.run(script, &keys, &args).await.unwrap();
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
    Reply {
        word: Word {
            generation: number(0),
            state: State::named(std::str::from_utf8(state).unwrap()).unwrap(),
            left: Duration::from_millis(number(2)),
        },
        calls: number(3),
        failures: number(4),
        slow: number(5),
        processes: number(6),
        doubters: number(7),
        recall: number(8) == 1,
        starved: number(9) == 1,
        last_slot: number(10),
        probes: (11..answer.len()).map(number).collect(),
    }
}

#[test]
fn the_model_of_a_shared_breaker_answers_as_the_script() {
    let server = Server::single();
    let code = include_str!("../../lua/breaker_sync.lua");
    // Keys go by the server's own time.
    let script = with_time_of_the_test(&code.replace("'PEXPIRE', ", "'EXISTS', "));
    let mut states = std::collections::BTreeMap::new();
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            for _ in 0..BREAKERS {
                let seed = fastrand::u64(..);
                let mut random = Rng::with_seed(seed);
                let (prefix, quorum) = (key_prefix(), random.usize(1..4));
                let mut model = model::Script::new(quorum);
                model.forgets = true;
                let mut now = 1_800_000_000 * SECOND;
                let begins = Process {
                    known: Word {
                        generation: 0,
                        state: State::Closed,
                        left: Duration::ZERO,
                    },
                    held: Vec::new(),
                    last_slot: 0,
                };
                let mut processes = vec![begins; random.usize(1..5)];
                for _ in 0..REPORTS {
                    let most = if random.u8(..10) == 0 { 9_000 } else { 300 };
                    now += random.u32(1..most) * MS;
                    let n = random.usize(..processes.len());
                    let told = report(&mut random, &mut processes[n]);
                    let expected = model.sync(n, &told, now);
                    let reply = ask(&redis, &script, &prefix, (n, &told), quorum, now).await;
                    assert_eq!(reply, expected, "seed {seed}: {told:?}");
                    *states.entry(reply.word.state.as_str()).or_insert(0) += 1;
                    // Some answers are lost.
                    if random.u8(..6) > 0 {
                        let process = &mut processes[n];
                        if process.known.generation != reply.word.generation {
                            process.held.clear();
                        }
                        process.held.extend(&reply.probes);
                        (process.known, process.last_slot) = (reply.word, reply.last_slot);
                    }
                }
            }
        },
    );
    println!("{states:?}");
    assert_eq!(states.len(), State::ALL.len(), "{states:?}");
}
