//! The scripts of `lua/` on a real server against the arithmetic of `policy::limit`, with random rules and requests: what they
//! grant, when they say that a request can come again, and what a give-back is worth.

use super::harness;
use std::collections::BTreeMap;
use std::time::Duration;

use super::harness::DEADLINE;
use super::harness::calls::on_a_lane;
use super::harness::redis::{Server, key_prefix};
use fastrand::Rng;
use weir::config::limits::{Period, Rule, Window};
use weir::policy::limit::{self, Now, State};
use weir::store::limits::grants;
use weir::store::redis::{Arg, Connections, Doubles, Script, Value};

/// Limits of each kind.
const LIMITS: usize = 120;
/// Requests of each.
const REQUESTS: usize = 40;
/// What the scripts round against the client over all requests: to a hundredth of a microsecond each time, and the clock to one.
const ROUNDING: Duration = Duration::from_micros(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bucket,
    Sliding,
    Fixed,
}

impl Kind {
    fn script(self) -> Script {
        Script::new(match self {
            Kind::Bucket => grants::BUCKET,
            Kind::Sliding => grants::SLIDING,
            Kind::Fixed => grants::FIXED,
        })
    }

    /// Short enough that time passes while a test runs.
    fn rule(self, random: &mut Rng) -> Rule {
        let number = match random.u8(0..10) {
            0 => 0,
            1 => 1,
            _ => random.u64(2..400),
        };
        let length = Duration::from_micros(random.u64(500..20_000));
        match self {
            Kind::Bucket => Rule::Window(Window::Bucket {
                count: number.max(1),
                per: length,
                burst: number,
            }),
            Kind::Sliding => Rule::Window(Window::Sliding {
                limit: number,
                window: length,
            }),
            Kind::Fixed => Rule::Window(Window::Fixed {
                limit: number,
                period: Period::Fixed(length),
            }),
        }
    }
}

/// What a script is asked.
#[derive(Debug, Clone, Copy, Default)]
struct Request {
    first: u64,
    need: u64,
    want: u64,
    share: f64,
    back: u64,
    taken_at: u64,
}

/// What it answers.
#[derive(Debug)]
struct Reply {
    granted: u64,
    now: Duration,
    /// By rule: remaining, and the microseconds until it is whole, until the request can be granted, and until it is void.
    rules: Vec<[i64; 4]>,
}

/// One key of a limit on the server.
struct Counter<'a> {
    redis: &'a Connections,
    script: Script,
    rules: Vec<Rule>,
    keys: Vec<String>,
}

impl<'a> Counter<'a> {
    fn new(redis: &'a Connections, kind: Kind, rules: Vec<Rule>) -> Counter<'a> {
        let prefix = key_prefix();
        Counter {
            redis,
            script: kind.script(),
            keys: (0..rules.len())
                .map(|n| format!("{{{prefix}}}:{n}"))
                .collect(),
            rules,
        }
    }

    /// As `store::limits::grants` asks.
    fn args(&self, request: Request) -> Doubles {
        let mut args = Doubles::default();
        args.extend([request.first, request.need, request.want].map(|it| it as f64));
        args.push(request.share);
        args.extend([request.back, request.taken_at].map(|it| it as f64));
        for rule in &self.rules {
            match *rule {
                Rule::Window(Window::Bucket { count: 0, .. }) => args.extend([1.0, 0.0]),
                Rule::Window(Window::Bucket { count, per, burst }) => {
                    args.extend([per.as_nanos() as f64 / 1000.0 / count as f64, burst as f64])
                }
                Rule::Window(Window::Sliding { limit, window }) => {
                    args.extend([limit, micros(window)].map(|it| it as f64));
                }
                Rule::Window(Window::Fixed { limit, period }) => {
                    args.push(limit as f64);
                    let window = limit::window_at(period, weir::clock::wall());
                    args.extend(window.map(|time| micros(time) as f64));
                }
                Rule::Slots(_) => unreachable!("no such kind"),
            }
        }
        args
    }

    async fn ask(&self, request: Request) -> Reply {
        loop {
            let keys: Vec<_> = self.keys.iter().map(String::as_str).collect();
            let args = self.args(request);
            let args = [args.as_arg()];
            let reply = self.redis.run(&self.script, &keys, &args).await.unwrap();
            let numbers = whole_numbers(&reply);
            // It came in another window than it was sent for.
            let Ok(granted) = u64::try_from(numbers[0]) else {
                continue;
            };
            return Reply {
                granted,
                now: Duration::from_micros(numbers[1].try_into().unwrap()),
                rules: numbers[2..]
                    .chunks(4)
                    .map(|rule| rule.try_into().unwrap())
                    .collect(),
            };
        }
    }
}

/// The doubles of the one part of a reply, of which none has a fraction.
pub(super) fn whole_numbers(reply: &Value) -> Vec<i64> {
    let parts = parts(reply);
    assert_eq!(parts.len(), 1, "{parts:?}");
    numbers_of(&parts[0])
}

fn parts(reply: &Value) -> &[Value] {
    match reply {
        Value::Array(parts) => parts,
        other => panic!("{other:?}"),
    }
}

fn numbers_of(reply: &Value) -> Vec<i64> {
    let numbers = Doubles::of(reply).unwrap_or_else(|| panic!("{reply:?}"));
    let whole = |number: f64| {
        assert_eq!(number.fract(), 0.0, "{reply:?}");
        number as i64
    };
    numbers.map(whole).collect()
}

fn int(value: &Value) -> i64 {
    match value {
        Value::Int(number) => *number,
        _ => 0,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap()
}

fn at(time: Duration) -> Now {
    Now {
        mono: time,
        wall: time,
    }
}

/// What was granted, and how much of it has gone back.
#[derive(Debug, Clone, Copy)]
struct Taken {
    at: Duration,
    tokens: u64,
    back: u64,
}

/// The states of the rules once all of this is taken.
fn states(rules: &[Rule], taken: impl Iterator<Item = (Duration, u64)> + Clone) -> Vec<State> {
    let state = |rule| {
        let mut state = State::default();
        for (time, tokens) in taken.clone().filter(|(_, tokens)| *tokens > 0) {
            limit::take(rule, &mut state, tokens, at(time));
        }
        state
    };
    rules.iter().map(state).collect()
}

/// What all rules have left.
fn free(rules: &[Rule], states: &[State], now: Duration) -> u64 {
    let left = |(rule, state)| limit::check(rule, state, 0, at(now)).remaining;
    rules.iter().zip(states).map(left).min().unwrap()
}

/// What is granted where so much is free.
fn grant(request: &Request, free: u64) -> u64 {
    let ahead = request.want.min((free as f64 * request.share) as u64);
    match free >= request.first {
        true => free.min(request.need.max(ahead)),
        false => 0,
    }
}

/// What may come too early, since rounding is to cost nobody a token: a microsecond, and a hundredth of a token at most.
fn favour(rule: &Rule) -> Duration {
    match rule {
        Rule::Window(Window::Bucket { count, per, .. }) => {
            let hundredth = *per / 100 / u32::try_from(*count).unwrap();
            hundredth.min(Duration::from_micros(1))
        }
        Rule::Window(Window::Sliding { .. })
        | Rule::Window(Window::Fixed { .. })
        | Rule::Slots(_) => Duration::ZERO,
    }
}

#[derive(Debug, Default)]
struct Counts {
    requests: usize,
    granted: u64,
    refused: usize,
    /// Refused, waited, and asked again.
    came_again: usize,
    given_back: u64,
}

/// Random requests of one limit, each compared.
async fn compare(redis: &Connections, kind: Kind, seed: u64, counts: &mut Counts) {
    let mut random = Rng::with_seed(seed);
    let rules: Vec<_> = (0..random.usize(1..4))
        .map(|_| kind.rule(&mut random))
        .collect();
    let counter = Counter::new(redis, kind, rules.clone());
    let favour = rules.iter().map(favour).max().unwrap();
    let mut log: Vec<Taken> = Vec::new();
    for _ in 0..REQUESTS {
        if random.u8(0..4) == 0 {
            tokio::time::sleep(Duration::from_micros(random.u64(0..3_000))).await;
        }
        let first = match random.u8(0..8) {
            0 => 0,
            1 => random.u64(0..500),
            _ => random.u64(1..5),
        };
        let need = first + if random.bool() { random.u64(0..10) } else { 0 };
        let mut request = Request {
            first,
            need,
            want: need + random.u64(0..100),
            share: random.f64(),
            ..Request::default()
        };
        if random.u8(0..4) == 0 {
            // Of one lease or of two, as if both were as old as the older one.
            for _ in 0..random.usize(1..3) {
                let open = log.iter_mut().filter(|taken| taken.tokens > taken.back);
                let open: Vec<_> = open.collect();
                let count = open.len();
                let Some(taken) = open.into_iter().nth(random.usize(..count.max(1))) else {
                    continue;
                };
                let back = random.u64(1..=taken.tokens - taken.back);
                taken.back += back;
                let older = micros(taken.at);
                request.taken_at = match request.back {
                    0 => older,
                    _ => request.taken_at.min(older),
                };
                request.back += back;
            }
        }
        let reply = counter.ask(request).await;
        let told = format!("seed {seed}: {rules:?}\n{request:?}\n{reply:?}\n{log:?}");
        // At most as if what went back had never been taken, at least as if it had not gone back.
        let never = states(
            &rules,
            log.iter()
                .map(|taken| (taken.at, taken.tokens - taken.back)),
        );
        let kept = states(&rules, log.iter().map(|taken| (taken.at, taken.tokens)));
        let most = free(&rules, &never, reply.now + favour);
        let least = free(&rules, &kept, reply.now.saturating_sub(ROUNDING));
        let granted = reply.granted;
        // A window may be another one a microsecond later.
        assert!(
            granted <= grant(&request, most),
            "{most} free at most: {told}"
        );
        assert!(
            granted >= grant(&request, least),
            "{least} free at least: {told}"
        );
        if granted > 0 {
            log.push(Taken {
                at: reply.now,
                tokens: granted,
                back: 0,
            });
        }
        let untouched = log.iter().all(|taken| taken.back == 0);
        let after = states(&rules, log.iter().map(|taken| (taken.at, taken.tokens)));
        for ((rule, state), told_of) in rules.iter().zip(&after).zip(&reply.rules) {
            let [remaining, reset, wait, void] = *told_of;
            let ask = |cost, now| limit::check(rule, state, cost, at(now));
            if untouched {
                let [early, late] = [reply.now.saturating_sub(ROUNDING), reply.now + favour];
                let left = u64::try_from(remaining).unwrap();
                let range = ask(0, early).remaining..=ask(0, late).remaining;
                assert!(range.contains(&left), "{left} left, not {range:?}: {told}");
                let whole = ask(0, reply.now).reset;
                let off = whole.as_micros().abs_diff(u128::try_from(reset).unwrap());
                assert!(
                    off <= ROUNDING.as_micros() + 1,
                    "whole in {whole:?}: {told}"
                );
            }
            if granted == 0 && first > 0 {
                let verdict = ask(first, reply.now);
                match verdict.retry_after {
                    Some(time) if untouched && wait > 0 => {
                        let off = time.as_micros().abs_diff(u128::try_from(wait).unwrap());
                        let most = (ROUNDING + favour).as_micros() + 1;
                        assert!(off <= most, "again in {time:?}: {told}");
                    }
                    Some(_) => assert!(wait >= 0, "{told}"),
                    None => assert!(wait == -1 || wait == 0, "{told}"),
                }
            }
            match rule {
                Rule::Window(Window::Fixed { period, .. }) => {
                    let most = i64::try_from(period.at_most().as_micros()).unwrap();
                    assert!((1..=most).contains(&void), "{told}");
                }
                _ => assert_eq!(void, 0, "{told}"),
            }
        }
        counts.requests += 1;
        counts.granted += granted;
        counts.given_back += request.back;
        counts.refused += usize::from(granted == 0 && first > 0);
        let waits = reply.rules.iter().map(|rule| rule[2]);
        let longest = waits.clone().max().unwrap();
        let refused = granted == 0 && first > 0 && waits.clone().all(|wait| wait >= 0);
        if refused && longest <= 5_000 && random.bool() {
            let time = reply.now + Duration::from_micros(u64::try_from(longest).unwrap());
            // To the microsecond, which timers do not keep.
            while weir::clock::wall() < time {
                tokio::task::yield_now().await;
            }
            let again = Request {
                first,
                need: first,
                want: first,
                ..Request::default()
            };
            let reply = counter.ask(again).await;
            let granted = reply.granted;
            assert_eq!(granted, first, "its time has come: {reply:?} {told}");
            log.push(Taken {
                at: reply.now,
                tokens: granted,
                back: 0,
            });
            counts.came_again += 1;
        }
    }
}

/// No key is left that does not go by itself.
#[track_caller]
fn all_expire(server: &Server) {
    let keys = server.cli(&["KEYS", "*"]);
    let left: Vec<_> = keys.list().iter().map(|key| key.text()).collect();
    for key in &left {
        let expires = server.cli(&["PTTL", key]).int();
        assert!(expires != -1, "{key} has no TTL");
        assert!(expires < 60_000, "{key} lives {expires} ms");
    }
    println!("{} keys left, each with a TTL", left.len());
}

fn grants_are_those_of_the_arithmetic(kind: Kind) {
    let server = Server::single();
    let patient = server.yaml("t").replace("{urls", "{timeout: 5s, urls");
    let counts = on_a_lane(&patient, async |redis| {
        assert!(redis.ready(DEADLINE).await);
        let mut counts = Counts::default();
        for _ in 0..LIMITS {
            compare(&redis, kind, fastrand::u64(..), &mut counts).await;
        }
        counts
    });
    println!("{kind:?}: {LIMITS} limits, {counts:?}");
    all_expire(&server);
    assert!(counts.refused > 100 && counts.came_again > 20 && counts.given_back > 100);
}

#[test]
fn a_bucket_grants_what_the_arithmetic_does() {
    grants_are_those_of_the_arithmetic(Kind::Bucket);
}

#[test]
fn a_sliding_window_grants_what_the_arithmetic_does() {
    grants_are_those_of_the_arithmetic(Kind::Sliding);
}

#[test]
fn a_fixed_window_grants_what_the_arithmetic_does() {
    grants_are_those_of_the_arithmetic(Kind::Fixed);
}

/// Each by its own keys, and whatever becomes of the others.
#[test]
fn several_keys_of_a_call_are_as_if_each_was_asked_alone() {
    let server = Server::single();
    let hour = Duration::from_secs(3_600);
    let rule = |kind, limit| {
        Rule::Window(match kind {
            Kind::Bucket => Window::Bucket {
                count: 1,
                per: hour,
                burst: limit,
            },
            Kind::Sliding => Window::Sliding {
                limit,
                window: hour,
            },
            Kind::Fixed => Window::Fixed {
                limit,
                period: Period::Year,
            },
        })
    };
    let take = |tokens| Request {
        first: tokens,
        need: tokens,
        want: tokens,
        ..Request::default()
    };
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            for kind in [Kind::Bucket, Kind::Sliding, Kind::Fixed] {
                let limits = [&[10, 20][..], &[5], &[30], &[7, 8, 9], &[3]];
                let of = |limits: &[u64]| {
                    let rules = limits.iter().map(|limit| rule(kind, *limit));
                    Counter::new(&redis, kind, rules.collect())
                };
                let counters = limits.map(of);
                // One cannot be read, and one asks for more than there is.
                server.cli(&["LPUSH", &counters[2].keys[0], "x"]);
                let asked = [2, 1, 1, 4, 4].map(take);
                let args: Vec<_> = counters
                    .iter()
                    .zip(asked)
                    .map(|(it, take)| it.args(take))
                    .collect();
                let args: Vec<_> = args.iter().map(Doubles::as_arg).collect();
                let keys = counters.iter().flat_map(|it| &it.keys);
                let keys: Vec<_> = keys.map(String::as_str).collect();
                let script = kind.script();
                let reply = redis.run(&script, &keys, &args).await.unwrap();
                let parts = parts(&reply);
                assert_eq!(parts.len(), 5, "{reply:?}");
                for (n, granted) in [(0, 2), (1, 1), (3, 4), (4, 0)] {
                    let told = numbers_of(&parts[n]);
                    let left = limits[n].iter().map(|limit| *limit as i64 - granted);
                    let left: Vec<_> = left.collect();
                    let remaining = told[2..].iter().step_by(4).copied();
                    assert_eq!(
                        (told[0], remaining.collect()),
                        (granted, left.clone()),
                        "{kind:?} {n}"
                    );
                    // So it is kept, too.
                    let alone = counters[n].ask(take(0)).await;
                    let remaining: Vec<_> = alone.rules.iter().map(|rule| rule[0]).collect();
                    assert_eq!(remaining, left, "{kind:?} {n}");
                }
                let Value::Array(why) = &parts[2] else {
                    panic!("{parts:?}");
                };
                assert!(format!("{why:?}").contains("WRONGTYPE"), "{why:?}");
            }
        },
    );
}

/// A reload and an override change the burst and the rate of a bucket that is in use.
#[test]
fn a_bucket_of_another_rule_is_full_again_in_its_own_time() {
    let server = Server::single();
    let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3_600));
    let bucket = |count, per, burst| Rule::Window(Window::Bucket { count, per, burst });
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            let one = Request {
                first: 1,
                need: 1,
                want: 1,
                ..Request::default()
            };
            let mut counter = Counter::new(&redis, Kind::Bucket, vec![bucket(1, hour, 24)]);
            let all = Request {
                need: 24,
                want: 24,
                ..one
            };
            assert_eq!(counter.ask(all).await.granted, 24);
            counter.rules = vec![bucket(0, second, 0)];
            assert_eq!(counter.ask(one).await.granted, 0);
            counter.rules = vec![bucket(1, hour, 24)];
            let [_, reset, _, _] = counter.ask(one).await.rules[0];
            assert!(reset > 23 * 3_600_000_000, "a limit of 0 forgave {reset}");
            // Twice, since time that passes while it is refused must count.
            counter.rules = vec![bucket(10, second, 2)];
            let first = counter.ask(one).await;
            let again = counter.ask(one).await;
            for reply in [&first, &again] {
                let gone = i64::try_from(micros(reply.now - first.now)).unwrap();
                let [remaining, reset, wait, _] = reply.rules[0];
                assert_eq!((reply.granted, remaining), (0, 0), "{reply:?}");
                assert!((reset - (200_000 - gone)).abs() <= 2, "{reply:?}");
                assert!((wait - (100_000 - gone)).abs() <= 2, "{reply:?}");
            }
        },
    );
}

/// Of the one before: a time alone.
#[test]
fn a_bucket_of_another_rate_keeps_what_was_used() {
    let server = Server::single();
    let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
    let bucket = |count, per, burst| Rule::Window(Window::Bucket { count, per, burst });
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            for (before, used, after, left, left_before) in [
                (bucket(60, minute, 100), 12, bucket(10, second, 100), 88, 88),
                (bucket(1, second, 20), 20, bucket(1, minute, 20), 0, 0),
                (bucket(1, second, 20), 5, bucket(1, minute, 20), 15, 15),
                (bucket(1, minute, 50), 10, bucket(7, minute, 20), 10, 40),
                (bucket(1, minute, 50), 50, bucket(7, minute, 20), 0, 0),
                (bucket(1, minute, 50), 30, bucket(7, minute, 20), 0, 20),
            ] {
                let mut counter = Counter::new(&redis, Kind::Bucket, vec![before]);
                let request = |tokens| Request {
                    first: tokens,
                    need: tokens,
                    want: tokens,
                    ..Request::default()
                };
                assert_eq!(counter.ask(request(used)).await.granted, used);
                counter.rules = vec![after];
                // Twice, since it is the new rate that counts from then on.
                for _ in 0..2 {
                    let reply = counter.ask(request(0)).await;
                    assert_eq!(reply.rules[0][0], left, "{before:?} {after:?}");
                }
                counter.rules = vec![before];
                let reply = counter.ask(request(0)).await;
                assert_eq!(reply.rules[0][0], left_before, "{after:?} {before:?}");
            }
        },
    );
}

/// While a reload goes from process to process, or for good where files differ: a client asks them all.
#[test]
fn buckets_of_several_bursts_admit_no_more_together_than_the_largest() {
    let server = Server::single();
    let hour = Duration::from_secs(3_600);
    let bucket = |count, per, burst| Rule::Window(Window::Bucket { count, per, burst });
    let sets = [
        vec![bucket(200, hour, 200), bucket(100, hour, 100)],
        vec![bucket(200, hour, 200), bucket(200, hour, 100)],
        // Of three rates: whoever asks last says how fast it fills.
        vec![
            bucket(300, hour, 300),
            bucket(50, hour, 100),
            bucket(100, hour, 150),
        ],
        vec![
            bucket(0, hour, 0),
            bucket(40, hour, 200),
            bucket(400, hour, 1),
        ],
    ];
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            let seed = fastrand::u64(..);
            let mut random = Rng::with_seed(seed);
            for rules in &sets {
                let mut counter = Counter::new(&redis, Kind::Bucket, vec![]);
                counter.keys = vec![format!("{{{}}}:0", key_prefix())];
                let began = weir::clock::mono();
                let mut admitted = 0;
                for call in 0..600 {
                    counter.rules = vec![rules[random.usize(..rules.len())]];
                    let need = random.u64(1..4);
                    let request = Request {
                        first: need,
                        need,
                        want: need,
                        ..Request::default()
                    };
                    admitted += counter.ask(request).await.granted;
                    if call % 20 == 19 {
                        let key = counter.keys[0].as_str();
                        let words = ["GET", key].map(Arg::Text);
                        let value = redis.command(DEADLINE, key, &words).await.unwrap();
                        let numbers: Vec<_> = Doubles::of(&value).unwrap().collect();
                        assert!(numbers.iter().all(|number| *number > 0.0), "{numbers:?}");
                    }
                }
                let rate = |rule: &Rule| match rule {
                    Rule::Window(Window::Bucket { count, burst, .. }) => (*burst, *count),
                    _ => unreachable!(),
                };
                let burst = rules.iter().map(|rule| rate(rule).0).max().unwrap();
                let fastest = rules.iter().map(|rule| rate(rule).1).max().unwrap() as f64;
                let fills = fastest * (weir::clock::mono() - began).as_secs_f64() / 3_600.0;
                let most = burst + fills.ceil() as u64;
                assert!(
                    (burst..=most).contains(&admitted),
                    "seed {seed}: {admitted} of {most}: {rules:?}"
                );
                assert!(server.cli(&["PTTL", &counter.keys[0]]).int() > 0);
            }
        },
    );
}

#[test]
fn a_server_whose_clock_is_years_behind_has_full_buckets() {
    let server = Server::single();
    let bucket = Rule::Window(Window::Bucket {
        count: 1,
        per: Duration::from_secs(1),
        burst: 20,
    });
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            let mut counter = Counter::new(&redis, Kind::Bucket, vec![bucket]);
            let behind = grants::BUCKET.replace("1735689600", "7e9");
            assert!(behind.contains("7e9"));
            counter.script = Script::new(behind.leak());
            for left in [19, 18] {
                let one = Request {
                    first: 1,
                    need: 1,
                    want: 1,
                    ..Request::default()
                };
                let reply = counter.ask(one).await;
                assert_eq!((reply.granted, reply.rules[0][0]), (1, left), "{reply:?}");
            }
        },
    );
}

/// They are refused the rest, and told when one more is there.
#[test]
fn those_who_wait_behind_the_last_tokens_are_told_how_long() {
    let server = Server::single();
    let hour = Duration::from_secs(3_600);
    let rules = [
        Rule::Window(Window::Bucket {
            count: 1,
            per: hour,
            burst: 2,
        }),
        Rule::Window(Window::Sliding {
            limit: 2,
            window: hour,
        }),
        Rule::Window(Window::Fixed {
            limit: 2,
            period: Period::Year,
        }),
    ];
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            for (kind, rule) in [Kind::Bucket, Kind::Sliding, Kind::Fixed]
                .into_iter()
                .zip(rules)
            {
                let counter = Counter::new(&redis, kind, vec![rule]);
                let all = Request {
                    first: 1,
                    need: 3,
                    want: 3,
                    ..Request::default()
                };
                let reply = counter.ask(all).await;
                let states = states(&[rule], [(reply.now, 2)].into_iter());
                let again = limit::check(&rule, &states[0], 1, at(reply.now)).retry_after;
                let off = again
                    .unwrap()
                    .as_micros()
                    .abs_diff(reply.rules[0][2] as u128);
                assert!(reply.granted == 2 && off <= 4, "{again:?}: {reply:?}");
                // With nobody first, as a lease is renewed.
                let reply = counter.ask(Request { first: 0, ..all }).await;
                assert!(reply.granted == 0 && reply.rules[0][2] > 0, "{reply:?}");
            }
        },
    );
}

/// As it is once the server's clock has been set back.
#[test]
fn a_process_that_was_heard_in_a_time_to_come_is_given_up() {
    let server = Server::single();
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            let beat = Script::new(include_str!("../../lua/process_beat.lua"));
            let now = micros(weir::clock::wall()) / 1_000;
            // So is one whose sign holds no more.
            for until in [now + 3_600_000, now - 1] {
                server.cli(&["ZADD", "live", &until.to_string(), "dead"]);
                let args = [Arg::Text("alive"), Arg::Int(5_000)];
                let living = redis.run(&beat, &["live"], &args).await.unwrap();
                assert_eq!(int(&living), 1);
            }
            let lives = server.cli(&["PTTL", "live"]).int();
            assert!((1..=60_000).contains(&lives), "{lives}");
        },
    );
}

/// The stored value is of a time to come, as it is once the server's clock has been set back.
#[test]
fn a_server_whose_clock_is_set_back_stays_in_its_window() {
    let server = Server::single();
    let hour = Duration::from_secs(3_600);
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            let now = weir::clock::wall();
            for ahead in [hour, 24 * hour, 240 * hour] {
                let later = now + ahead;
                let probe = Request {
                    first: 1,
                    need: 100,
                    want: 100,
                    ..Request::default()
                };

                let fixed = Rule::Window(Window::Fixed {
                    limit: 10,
                    period: Period::Fixed(hour),
                });
                let counter = Counter::new(&redis, Kind::Fixed, vec![fixed]);
                let [_, end, _] = limit::window_at(Period::Fixed(hour), later);
                let value = format!("{}:4", micros(end));
                server.cli(&["SET", &counter.keys[0], &value, "PX", "50000"]);
                let back = Request {
                    back: 4,
                    taken_at: micros(now),
                    ..probe
                };
                let reply = counter.ask(back).await;
                assert_eq!(reply.granted, 6, "none of it was of that window: {reply:?}");
                let reply = counter.ask(probe).await;
                let wait = Duration::from_micros(u64::try_from(reply.rules[0][2]).unwrap());
                assert_eq!((reply.granted, wait), (0, end - reply.now), "{reply:?}");
                let states = states(&[fixed], [(later, 10)].into_iter());
                assert_eq!(free(&[fixed], &states, reply.now), 0, "as in memory");
                assert!(server.cli(&["PTTL", &counter.keys[0]]).int() > 0);

                let sliding = Rule::Window(Window::Sliding {
                    limit: 10,
                    window: hour,
                });
                let counter = Counter::new(&redis, Kind::Sliding, vec![sliding]);
                let number = later.as_micros() / hour.as_micros();
                let value = format!("{number}:3:2");
                server.cli(&["SET", &counter.keys[0], &value, "PX", "50000"]);
                // At the start of that window, all of the last one counts.
                assert_eq!(counter.ask(probe).await.granted, 5);
                assert_eq!(counter.ask(probe).await.granted, 0);

                // A bucket fills by the clock alone: until it has caught up, none comes back.
                let bucket = Rule::Window(Window::Bucket {
                    count: 10,
                    per: hour,
                    burst: 10,
                });
                let counter = Counter::new(&redis, Kind::Bucket, vec![bucket]);
                let full = (later - Duration::from_secs(1_735_689_600)).as_micros();
                let mut value = Doubles::default();
                value.extend([full as f64, micros(hour / 10) as f64]);
                let key = counter.keys[0].as_str();
                let [set, key_word, px, lives] = ["SET", key, "PX", "50000"].map(Arg::Text);
                let words = [set, key_word, value.as_arg(), px, lives];
                redis.command(DEADLINE, key, &words).await.unwrap();
                let reply = counter.ask(probe).await;
                assert!(reply.granted == 0 && reply.rules[0][2] >= 0, "{reply:?}");

                // What goes back was taken at a time to come: it frees no more than it took.
                let counter = Counter::new(&redis, Kind::Bucket, vec![bucket]);
                assert_eq!(counter.ask(Request { need: 10, ..probe }).await.granted, 10);
                let back = Request {
                    back: 2,
                    taken_at: micros(later),
                    ..probe
                };
                let reply = counter.ask(back).await;
                assert_eq!(reply.granted, 2, "{reply:?}");
            }
        },
    );
}

/// It is not to be waited for: that may take hours.
#[test]
fn a_sliding_window_goes_on_where_the_clock_is_set_back_further() {
    let server = Server::single();
    let window = Duration::from_secs(1);
    let rule = Rule::Window(Window::Sliding { limit: 10, window });
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            let counter = Counter::new(&redis, Kind::Sliding, vec![rule]);
            let later = weir::clock::wall() + Duration::from_secs(3_600);
            let value = format!("{}:10:4", later.as_secs());
            server.cli(&["SET", &counter.keys[0], &value, "PX", "3600000"]);
            let all = Request {
                first: 10,
                need: 10,
                want: 10,
                ..Request::default()
            };
            let began = counter.ask(all).await;
            assert_eq!(began.granted, 0, "{began:?}");
            loop {
                let reply = counter.ask(all).await;
                if reply.granted == 10 {
                    break;
                }
                assert!(reply.now < began.now + 4 * window, "{reply:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        },
    );
}

/// A process as `store::limits::slots` has it: it asks for one key by one call at a time, and takes no answer for a lost one.
#[derive(Debug, Clone, Default)]
struct Process {
    turn: u64,
    used: u64,
    granted: u64,
}

#[derive(Debug, Clone, Copy)]
struct Call {
    process: usize,
    turn: u64,
    held: u64,
    want: u64,
}

/// What a call is answered: its slots, and those of others.
async fn tell(redis: &Connections, key: &str, call: Call, limit: u64, ttl: u64) -> (u64, u64) {
    tell_needing(redis, key, call, limit, ttl, 0).await
}

/// As [`tell`], for a request for which fewer slots are none.
async fn tell_needing(
    redis: &Connections,
    key: &str,
    call: Call,
    limit: u64,
    ttl: u64,
    needs: u64,
) -> (u64, u64) {
    let script = Script::new(include_str!("../../lua/slots.lua"));
    let name = format!("p{}", call.process);
    let numbers = [call.turn, call.held, call.want, limit, ttl, needs].map(Arg::Int);
    let mut args = vec![Arg::Text(&name)];
    args.extend(numbers);
    let reply = redis.run(&script, &[key], &args).await.unwrap();
    let Value::Array(reply) = reply else {
        panic!("{reply:?}")
    };
    let number = |value| u64::try_from(int(value)).unwrap();
    (number(&reply[0]), number(&reply[1]))
}

/// What the server has of a key, by process.
fn counts(server: &Server, key: &str) -> BTreeMap<String, u64> {
    let all = server.cli(&["HGETALL", key]);
    let pairs = all.list().chunks(2);
    let count = |text: &str| text.split(':').next().unwrap().parse().unwrap();
    pairs
        .map(|pair| (pair[0].text().to_owned(), count(pair[1].text())))
        .collect()
}

#[test]
fn slots_are_never_more_than_the_limit_whatever_comes_late() {
    // As many as it takes to meet what is to be tried, which on a busy machine comes more rarely.
    const KEYS: std::ops::RangeInclusive<usize> = 60..=600;
    let server = Server::single();
    let mut keys = 0;
    let (mut late_calls, mut lost_calls, mut fullest) = (0, 0, 0);
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            while keys < *KEYS.start() || (keys < *KEYS.end() && !(late_calls > 50 && fullest > 3))
            {
                keys += 1;
                let seed = fastrand::u64(..);
                let mut random = Rng::with_seed(seed);
                let key = key_prefix();
                let limit = random.u64(0..8);
                let mut processes = vec![Process::default(); random.usize(1..5)];
                let mut late: Vec<Call> = Vec::new();
                let mut arrived = vec![0; processes.len()];
                let began = weir::clock::mono();
                for _ in 0..60 {
                    let n = random.usize(..processes.len());
                    let process = &mut processes[n];
                    match random.u8(0..4) {
                        // A request comes or goes, with what the process has.
                        0 => {
                            process.used = (process.used + 1).min(process.granted.max(process.used))
                        }
                        1 => process.used = process.used.saturating_sub(1),
                        _ => {}
                    }
                    if random.bool() {
                        process.turn += 1;
                        let want = match random.bool() {
                            true => (process.used + random.u64(1..4)).max(process.granted),
                            false => {
                                process.granted = process.used;
                                process.used
                            }
                        };
                        let call = Call {
                            process: n,
                            turn: process.turn,
                            held: process.used,
                            want,
                        };
                        if random.u8(0..5) == 0 {
                            late.push(call);
                            lost_calls += 1;
                        } else {
                            let (granted, _) = tell(&redis, &key, call, limit, 30_000).await;
                            assert!(granted >= call.held, "seed {seed}: {call:?} {granted}");
                            process.granted = granted;
                            arrived[n] = call.turn;
                        }
                    }
                    // A turn is remembered for two seconds.
                    if weir::clock::mono() - began > Duration::from_secs(1) {
                        late.clear();
                    }
                    if !late.is_empty() && random.u8(0..3) == 0 {
                        let call = late.swap_remove(random.usize(..late.len()));
                        let before = counts(&server, &key);
                        tell(&redis, &key, call, limit, 30_000).await;
                        if call.turn < arrived[call.process] {
                            late_calls += 1;
                            let after = counts(&server, &key);
                            assert_eq!(before, after, "seed {seed}: {call:?} came late");
                        }
                        let last = &mut arrived[call.process];
                        *last = call.turn.max(*last);
                    }
                    let used: u64 = processes.iter().map(|process| process.used).sum();
                    let granted: u64 = processes.iter().map(|process| process.granted).sum();
                    let told: u64 = counts(&server, &key).values().sum();
                    assert!(used <= limit, "seed {seed}: {processes:?} of {limit}");
                    assert!(granted <= limit, "seed {seed}: {processes:?} of {limit}");
                    assert!(told <= limit, "seed {seed}: {told} of {limit}");
                    fullest = fullest.max(used * u64::from(used == limit));
                }
            }
        },
    );
    println!(
        "{keys} keys, {lost_calls} calls unanswered, {late_calls} of them came after a later one, {fullest} slots used at most"
    );
    assert!(late_calls > 50 && fullest > 3);
    all_expire(&server);
}

#[test]
fn slots_of_a_process_that_is_silent_come_back() {
    let server = Server::single();
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            let call = |process, turn, held, want| Call {
                process,
                turn,
                held,
                want,
            };
            let key = key_prefix();
            assert_eq!(tell(&redis, &key, call(0, 1, 0, 3), 4, 3_000).await, (3, 0));
            // Another's shorter time does not shorten it.
            assert_eq!(tell(&redis, &key, call(1, 1, 0, 3), 4, 1).await, (1, 3));
            let expires = server.cli(&["PTTL", &key]).int();
            assert!(expires > 0, "{expires}");
            harness::calls::soon(|| server.cli(&["PTTL", &key]).int() < 0).await;
            assert_eq!(tell(&redis, &key, call(1, 2, 1, 4), 4, 3_000).await, (4, 0));
            // It lives, after all: what its requests hold it keeps, and no more.
            assert_eq!(tell(&redis, &key, call(0, 2, 1, 4), 4, 3_000).await, (1, 4));
        },
    );
    all_expire(&server);
}

#[test]
fn a_request_that_finds_too_few_slots_takes_none() {
    let server = Server::single();
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            let key = key_prefix();
            let needing = async |process, turn, held, want, needs| {
                let call = Call {
                    process,
                    turn,
                    held,
                    want,
                };
                tell_needing(&redis, &key, call, 10, 3_000, needs).await
            };
            assert_eq!(needing(0, 1, 0, 6, 6).await, (6, 0));
            assert_eq!(needing(1, 1, 0, 8, 5).await, (0, 6), "of 4 it needs 5");
            assert_eq!(needing(2, 1, 0, 4, 4).await, (4, 6));
            assert_eq!(needing(0, 2, 5, 6, 5).await, (6, 4));
            // It had 6, and requests may use them by now.
            assert_eq!(needing(0, 3, 5, 10, 7).await, (6, 4));
            assert_eq!(needing(2, 2, 0, 0, 0).await, (0, 6));
            assert_eq!(needing(0, 4, 6, 30, 7).await, (10, 0), "for those who wait");
        },
    );
    all_expire(&server);
}
