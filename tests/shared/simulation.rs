//! Fleets of processes that hold leases, around the scripts of `lua/` on a real server, whose time is the schedule's. A seed draws the schedule: calls are
//! carried out late, in any order and after whoever made them has given up, answers are lost, processes are paused, requests
//! give back what they took, scripts are forgotten and the server's clock is set back.

use std::time::Duration;

#[path = "../../src/store/limits/slots/tests/model.rs"]
mod model;

use super::harness::DEADLINE;
use super::harness::calls::on_a_lane;
use super::harness::redis::{Server, key_prefix};
use super::scripts::whole_numbers;
use fastrand::Rng;
use smallvec::SmallVec;
use weir::config::limits::Period;
use weir::policy::lease::{Answer, Batch, Grant, Lease, Refusal, Request, Round, RuleState, Terms};
use weir::policy::limit;
use weir::store::limits::grants;
use weir::store::redis::{Arg, Connections, Doubles, Script, Value};

const MS: Duration = Duration::from_millis(1);
const TTL: Duration = Duration::from_millis(50);
/// Of each kind.
const SCHEDULES: usize = 60;
const STEPS: usize = 600;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    Bucket { count: u64, burst: u64 },
    Sliding { limit: u64, window: Duration },
    Fixed { limit: u64, window: Duration },
}

/// A script that is told the time by its last two arguments, in seconds and microseconds.
pub(super) fn with_time_of_the_test(code: &str) -> Script {
    assert!(code.contains("redis.call('TIME')"));
    let told = code.replace("redis.call('TIME')", "{ ARGV[#ARGV - 1], ARGV[#ARGV] }");
    // Keys go by the server's own time.
    let told = told.replace("'PX', ", "'PX', 3600000 + ");
    Script::new(Box::leak(told.into_boxed_str()))
}

struct Scripts {
    bucket: Script,
    sliding: Script,
    fixed: Script,
}

struct Node {
    lease: Lease,
    /// Of its clock.
    ahead: Duration,
    /// The question that it waits for.
    asking: Option<u64>,
    /// Requests that wait for the answer as well.
    waiting: Vec<(u64, Round)>,
    is_paused: bool,
}

struct Question {
    number: u64,
    node: usize,
    request: Request,
}

struct Sim<'a> {
    redis: &'a Connections,
    server: &'a Server,
    scripts: &'a Scripts,
    random: Rng,
    limit: Limit,
    key: String,
    terms: Terms,
    nodes: Vec<Node>,
    now: Duration,
    /// How far the server's clock was set back.
    behind: Duration,
    questions: Vec<Question>,
    answers: Vec<(Question, Grant, Duration)>,
    asked: u64,
    /// When, and by which clock of the server's: what requests took, and may give back.
    admitted: Vec<Admitted>,
    given_back: u64,
}

#[derive(Debug, Clone, Copy)]
struct Admitted {
    node: usize,
    /// True time, and the server's.
    at: Duration,
    by_server: Duration,
    taken: Batch,
}

impl<'a> Sim<'a> {
    fn new(
        redis: &'a Connections,
        server: &'a Server,
        scripts: &'a Scripts,
        kind: u8,
        seed: u64,
    ) -> Sim<'a> {
        let mut random = Rng::with_seed(seed);
        let limit = match kind {
            0 => Limit::Bucket {
                count: random.u64(1..400),
                burst: random.u64(1..100),
            },
            1 => Limit::Sliding {
                limit: random.u64(1..200),
                window: random.u32(100..400) * MS,
            },
            _ => Limit::Fixed {
                limit: random.u64(1..200),
                window: random.u32(100..400) * MS,
            },
        };
        let nodes = random.usize(1..6);
        let node = |_| Node {
            lease: Lease::default(),
            ahead: Duration::from_millis(random.u64(0..1_000_000)),
            asking: None,
            waiting: Vec::new(),
            is_paused: false,
        };
        Sim {
            nodes: (0..nodes).map(node).collect(),
            terms: Terms {
                ttl: TTL,
                share: 0.3,
                strict: random.u8(0..4) == 0,
                patience: 20 * MS,
            },
            limit,
            redis,
            server,
            scripts,
            key: key_prefix(),
            now: Duration::from_secs(1_800_000_000),
            behind: Duration::ZERO,
            questions: Vec::new(),
            answers: Vec::new(),
            asked: 0,
            admitted: Vec::new(),
            given_back: 0,
            random,
        }
    }

    async fn step(&mut self) {
        let n = self.random.usize(..self.nodes.len());
        let runs = !self.nodes[n].is_paused;
        match self.random.u8(..100) {
            0..25 => {
                let most = match self.random.u8(..30) {
                    0 => 400,
                    1..4 => 60,
                    _ => 8,
                };
                self.now +=
                    self.random.u32(..most) * MS + Duration::from_micros(self.random.u64(..999));
            }
            25..60 if runs => {
                let cost = self.random.u64(1..4);
                for _ in 0..self.random.usize(1..8) {
                    self.arrives(n, cost);
                }
            }
            60..78 if !self.questions.is_empty() => {
                let index = self.random.usize(..self.questions.len());
                let question = self.questions.swap_remove(index);
                self.reaches(question).await;
            }
            78..90 if !self.answers.is_empty() => {
                let index = self.random.usize(..self.answers.len());
                if !self.nodes[self.answers[index].0.node].is_paused {
                    let (question, grant, at) = self.answers.swap_remove(index);
                    self.answered(&question, &grant, at);
                }
            }
            90 | 91 if runs => self.gives_up(n),
            92..96 if runs => self.puts_back(n),
            96 if !self.questions.is_empty() => {
                let index = self.random.usize(..self.questions.len());
                self.questions.swap_remove(index);
            }
            97 | 98 => self.nodes[n].is_paused ^= true,
            99 => match (self.random.u8(..20), self.limit) {
                (0, _) => drop(self.server.cli(&["SCRIPT", "FLUSH"])),
                (1..5, Limit::Bucket { .. }) => self.behind += self.random.u32(1..800) * MS,
                _ => {}
            },
            _ => {}
        }
    }

    fn arrives(&mut self, n: usize, cost: u64) {
        let node = &mut self.nodes[n];
        let local = self.now + node.ahead;
        match node.lease.take(cost, local) {
            Answer::Admitted(taken) => {
                let asks = node.asking.is_none() && node.lease.runs_low(&self.terms, local);
                let request = asks.then(|| node.lease.ask(0, &self.terms, local));
                self.admit(n, self.now, taken);
                if let Some(request) = request {
                    self.ask(n, request);
                }
            }
            Answer::Refused { .. } => {}
            Answer::Ask => {
                let request = node.lease.ask(cost, &self.terms, local);
                self.ask(n, request);
            }
            Answer::Wait(round) => node.waiting.push((cost, round)),
        }
    }

    fn admit(&mut self, node: usize, at: Duration, taken: Batch) {
        let behind = self.behind;
        self.admitted.push(Admitted {
            node,
            at,
            by_server: at - behind,
            taken,
        });
    }

    fn ask(&mut self, node: usize, request: Request) {
        self.asked += 1;
        let number = self.asked;
        self.nodes[node].asking = Some(number);
        self.questions.push(Question {
            number,
            node,
            request,
        });
    }

    /// The server carries a question out, however late it comes.
    async fn reaches(&mut self, question: Question) {
        let server_now = self.now - self.behind;
        let grant = loop {
            let request = &question.request;
            let mut args = Doubles::default();
            args.extend([request.first, request.need, request.want].map(|it| it as f64));
            args.push(request.share);
            args.extend([request.back.tokens, request.back.taken_at].map(|it| it as f64));
            let script = match self.limit {
                Limit::Bucket { count, burst } => {
                    args.extend([1e6 / count as f64, burst as f64]);
                    &self.scripts.bucket
                }
                Limit::Sliding { limit, window } => {
                    args.extend([limit, micros(window)].map(|it| it as f64));
                    &self.scripts.sliding
                }
                Limit::Fixed { limit, window } => {
                    args.push(limit as f64);
                    // Some have another day in mind.
                    let guess = match self.random.u8(..8) {
                        0 => server_now - 86_400 * Duration::from_secs(1),
                        _ => server_now,
                    };
                    let window = limit::window_at(Period::Fixed(window), guess);
                    args.extend(window.map(|time| micros(time) as f64));
                    &self.scripts.fixed
                }
            };
            let args = [
                args.as_arg(),
                Arg::Int(server_now.as_secs()),
                Arg::Int(u64::from(server_now.subsec_micros())),
            ];
            let answer = self.redis.run(script, &[&self.key], &args).await.unwrap();
            if let Some(grant) = self.grant(&answer) {
                break grant;
            }
        };
        if self.random.u8(..16) > 0 {
            self.answers.push((question, grant, self.now));
        }
    }

    /// As `store::limits::grants` reads it.
    fn grant(&self, answer: &Value) -> Option<Grant> {
        let numbers = whole_numbers(answer);
        let tokens = u64::try_from(numbers[0]).ok()?;
        let time = |at: usize| Duration::from_micros(u64::try_from(numbers[at]).unwrap());
        let rule = RuleState {
            remaining: u64::try_from(numbers[2]).unwrap(),
            reset: time(3),
            refusal: match numbers[4] {
                -1 => Some(Refusal::Ever),
                0 => None,
                _ => Some(Refusal::For(time(4))),
            },
            void_after: matches!(self.limit, Limit::Fixed { .. }).then(|| time(5)),
        };
        Some(Grant {
            tokens,
            at: u64::try_from(numbers[1]).unwrap(),
            rules: SmallVec::from_iter([rule]),
        })
    }

    fn answered(&mut self, question: &Question, grant: &Grant, at: Duration) {
        let n = question.node;
        let node = &mut self.nodes[n];
        if node
            .asking
            .take_if(|number| *number == question.number)
            .is_none()
        {
            return;
        }
        let local = self.now + node.ahead;
        let taken = node
            .lease
            .granted(&question.request, grant, &self.terms, local);
        // Whoever asked is of the time at which the server decided.
        if let Some(taken) = taken.filter(|taken| taken.tokens > 0) {
            self.admitted.push(Admitted {
                node: n,
                at,
                by_server: Duration::from_micros(grant.at),
                taken,
            });
        }
        self.look_again(n);
    }

    fn look_again(&mut self, n: usize) {
        for (cost, round) in std::mem::take(&mut self.nodes[n].waiting) {
            self.nodes[n].lease.leave(cost, round);
            self.arrives(n, cost);
        }
    }

    fn gives_up(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        if node.asking.take().is_some() {
            node.lease.unanswered();
            let waiting = std::mem::take(&mut node.waiting);
            waiting
                .into_iter()
                .for_each(|(cost, round)| node.lease.leave(cost, round));
        }
    }

    /// A request that took something a short while ago is refused elsewhere.
    fn puts_back(&mut self, n: usize) {
        let late = |it: &Admitted| it.node == n && self.now < it.at + 40 * MS;
        let late: Vec<_> = (0..self.admitted.len())
            .filter(|it| late(&self.admitted[*it]))
            .collect();
        if let Some(index) = self.random.choice(late) {
            let Admitted { taken, .. } = self.admitted.swap_remove(index);
            let local = self.now + self.nodes[n].ahead;
            self.nodes[n].lease.put_back(taken, local);
            self.given_back += taken.tokens;
        }
    }

    /// What was promised.
    fn check(&mut self) {
        match self.limit {
            Limit::Bucket { count, burst } => {
                self.admitted.sort_unstable_by_key(|admitted| admitted.at);
                let start = self.admitted.first().map_or(self.now, |first| first.at);
                let (mut sum, mut least) = (0, f64::INFINITY);
                for Admitted { at, taken, .. } in &self.admitted {
                    let back = (*at - start).as_secs_f64() * count as f64;
                    least = least.min(sum as f64 - back);
                    sum += taken.tokens;
                    let over =
                        sum as f64 - back - least - burst as f64 - count as f64 * TTL.as_secs_f64();
                    assert!(over < 0.05, "{over} too many of {:?}", self.limit);
                }
            }
            Limit::Sliding { limit, window } | Limit::Fixed { limit, window } => {
                let is_sliding = matches!(self.limit, Limit::Sliding { .. });
                let mut sums = std::collections::BTreeMap::new();
                for Admitted {
                    by_server, taken, ..
                } in &self.admitted
                {
                    let into =
                        Duration::from_nanos((by_server.as_nanos() % window.as_nanos()) as u64);
                    // Those of the window before may be spent in it.
                    if !is_sliding || into >= TTL {
                        *sums
                            .entry(by_server.as_nanos() / window.as_nanos())
                            .or_insert(0) += taken.tokens;
                    }
                }
                assert!(
                    sums.values().all(|sum| *sum <= limit),
                    "{sums:?} of {:?}",
                    self.limit
                );
            }
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap()
}

fn no_schedule_breaks_a_promise(kind: u8) {
    let server = Server::single();
    let scripts = Scripts {
        bucket: with_time_of_the_test(grants::BUCKET),
        sliding: with_time_of_the_test(grants::SLIDING),
        fixed: with_time_of_the_test(grants::FIXED),
    };
    let (mut admitted, mut asked, mut given_back) = (0, 0, 0);
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            for _ in 0..SCHEDULES {
                let seed = fastrand::u64(..);
                let told = Seed(seed);
                let mut sim = Sim::new(&redis, &server, &scripts, kind, seed);
                for _ in 0..STEPS {
                    sim.step().await;
                }
                sim.check();
                drop(told);
                admitted += sim.admitted.len();
                asked += sim.asked;
                given_back += sim.given_back;
            }
        },
    );
    println!("{admitted} admitted, {asked} asked, {given_back} given back");
    assert!(admitted > SCHEDULES * 20 && given_back > SCHEDULES as u64 / 2);
}

/// Told where its schedule fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("by the schedule of seed {}", self.0);
        }
    }
}

#[test]
fn no_schedule_takes_more_of_a_bucket_than_was_promised() {
    no_schedule_breaks_a_promise(0);
}

#[test]
fn no_schedule_takes_more_of_a_sliding_window_than_was_promised() {
    no_schedule_breaks_a_promise(1);
}

#[test]
fn no_schedule_takes_more_of_a_fixed_window_than_its_limit() {
    no_schedule_breaks_a_promise(2);
}

/// By which `store::limits::slots` is simulated.
#[test]
fn slots_are_what_their_model_says() {
    const KEYS: usize = 150;
    const CALLS: usize = 60;
    let server = Server::single();
    let code = include_str!("../../lua/slots.lua");
    assert!(code.contains("'PEXPIRE', KEYS[1], ttl"));
    let script = with_time_of_the_test(
        &code.replace("'PEXPIRE', KEYS[1], ttl", "'PEXPIRE', KEYS[1], 3600000"),
    );
    on_a_lane(
        &server.yaml("t").replace("{urls", "{timeout: 5s, urls"),
        async |redis| {
            assert!(redis.ready(DEADLINE).await);
            for _ in 0..KEYS {
                let seed = fastrand::u64(..);
                let mut random = Rng::with_seed(seed);
                let (mut model, key) = (model::Script::default(), key_prefix());
                let hold_ttl = random.u32(100..5_000) * MS;
                let (limit, mut now) = (random.u64(0..8), Duration::from_secs(1_800_000_000));
                let mut ask = async |call: model::Call, now: Duration| {
                    let process = call.process.to_string();
                    let hold = u64::try_from(hold_ttl.as_millis()).unwrap();
                    let micros = u64::from(now.subsec_micros());
                    let numbers = [call.turn, call.held, call.want, limit, hold, call.needs];
                    let mut args = vec![Arg::Text(&process)];
                    args.extend(numbers.map(Arg::Int));
                    args.extend([now.as_secs(), micros].map(Arg::Int));
                    let answer = redis.run(&script, &[&key], &args).await.unwrap();
                    let taken = model.taken(now);
                    let (granted, others) = model.call(&call, limit, hold_ttl, now);
                    let expected = [granted, others].map(|it| Value::Int(it.try_into().unwrap()));
                    let expected = Value::Array(expected.to_vec());
                    assert_eq!(answer, expected, "seed {seed}: {call:?}");
                    (taken, others)
                };
                for _ in 0..CALLS {
                    let most = if random.u8(..10) == 0 { 6_000 } else { 100 };
                    now += random.u32(..most) * MS;
                    let [held, more] = [random.u64(..4), random.u64(..4)];
                    let call = model::Call {
                        process: random.usize(..4),
                        // Some come late.
                        turn: random.u64(1..30),
                        held,
                        want: held + more,
                        needs: held + random.u64(..=more),
                    };
                    ask(call, now).await;
                }
                // One that has none sees what all have.
                let look = model::Call {
                    process: 4,
                    turn: 1,
                    held: 0,
                    want: 0,
                    needs: 0,
                };
                let (taken, others) = ask(look, now).await;
                assert_eq!(taken, others, "seed {seed}");
            }
        },
    );
}
