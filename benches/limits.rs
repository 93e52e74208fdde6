//! Decisions of rate limits in a second of a core: in memory, by a lease, and by asking Redis each time.
//!
//! A decision is what a request pays for one limit, from the parts of its key to what its client is told; HTTP is left out, and
//! so are the clocks, which a request reads anyway. What is measured is the CPU time of the thread that decides, as a lane does:
//! its calls of Redis, their answers and its timers are on that thread and count.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a bench ends it; what it measures is printed"
)]

#[path = "../tests/harness/mod.rs"]
mod harness;
mod measure;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use harness::node::Node;
use harness::redis::{Cluster, key_prefix};
use measure::{Options, grouped, median};
use tokio::task::JoinSet;
use weir::clock;
use weir::net::tls::Secured;
use weir::plan::{Plan, Process};
use weir::policy::limit::Verdict;
use weir::store::limits::Ask;
use weir::store::limits::leases::Decision;

/// Decisions between two looks at the clock, and at what else the thread has to do.
const BATCH: usize = 256;
const ROUNDS: usize = 3;

/// A client's address as text, as it stands in a connection's own memory.
type Address = [u8; 14];

#[derive(Clone, Copy)]
enum Keys {
    /// That many, in turn.
    Even(u32),
    /// Of that many, the nth as often as 1/n (Zipf's law).
    Zipf(u32),
}

struct Case {
    name: &'static str,
    limit: &'static str,
    keys: Keys,
    /// Requests under way at a time; 0: asked in memory.
    callers: usize,
    /// Decisions in a second of a core.
    aim: Option<f64>,
}

/// Never refuses within a run.
const FAR: &str = "{limit: 100000000/s, by: client.ip}";
const FAR_STRICT: &str = "{limit: 100000000/s, by: client.ip, accuracy: strict}";
const LEASE_AIM: Option<f64> = Some(5e6);
const STRICT_AIM: Option<f64> = Some(6e4);

const CASES: [Case; 12] = [
    Case::new("local, 1 key", FAR, Keys::Even(1), 0, None),
    Case::new("local, 1,000 keys", FAR, Keys::Even(1_000), 0, None),
    Case::new("local, 1,000,000 keys", FAR, Keys::Even(1_000_000), 0, None),
    Case::new("lease, 1 key", FAR, Keys::Even(1), 64, LEASE_AIM),
    Case::new(
        "lease, 1 key, refused",
        "{limit: 1/h, by: client.ip}",
        Keys::Even(1),
        64,
        LEASE_AIM,
    ),
    Case::new("lease, 1,000 keys", FAR, Keys::Even(1_000), 64, None),
    Case::new(
        "lease, 1,000 keys by Zipf",
        FAR,
        Keys::Zipf(1_000),
        64,
        None,
    ),
    Case::new(
        "lease, 1,000,000 keys by Zipf",
        FAR,
        Keys::Zipf(1_000_000),
        64,
        None,
    ),
    Case::new(
        "strict, 1 key, 64 callers",
        FAR_STRICT,
        Keys::Even(1),
        64,
        STRICT_AIM,
    ),
    Case::new(
        "strict, 1 key, 8 callers",
        FAR_STRICT,
        Keys::Even(1),
        8,
        STRICT_AIM,
    ),
    Case::new(
        "strict, 10,000 keys, 64 callers",
        FAR_STRICT,
        Keys::Even(10_000),
        64,
        STRICT_AIM,
    ),
    Case::new(
        "strict, 10,000 keys, 8 callers",
        FAR_STRICT,
        Keys::Even(10_000),
        8,
        STRICT_AIM,
    ),
];

impl Case {
    const fn new(
        name: &'static str,
        limit: &'static str,
        keys: Keys,
        callers: usize,
        aim: Option<f64>,
    ) -> Case {
        Case {
            name,
            limit,
            keys,
            callers,
            aim,
        }
    }

    fn file(&self) -> String {
        let redis = match self.callers {
            0 => String::new(),
            _ => Cluster::shared()
                .yaml(&key_prefix())
                .replace("{urls", "{timeout: 5s, urls"),
        };
        format!(
            "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nrate_limits: {{a: {}}}\n\
             routes: [{{upstream: upstream, rate_limits: [a]}}]\nrate_limit_defaults: {{max_keys: 2000000}}\n{redis}",
            self.limit
        )
    }
}

/// One round of a case.
#[derive(Clone, Copy)]
struct Round {
    decisions: f64,
    wall: Duration,
    /// Of the thread that decides.
    cpu: Duration,
    redis_cpu: Duration,
    calls: f64,
}

impl Round {
    fn per_core(&self) -> f64 {
        self.decisions / self.cpu.as_secs_f64()
    }
}

fn main() {
    let options = Options::read();
    let time = match options.whole {
        true => Duration::from_millis(1_500),
        false => Duration::from_millis(20),
    };
    let what = format!(
        "Decisions of one thread, by its CPU time: medians of {ROUNDS} rounds of {time:?}, and the best in brackets. One limit, \
         a token bucket by client address that refuses no one unless it says so; lease.ttl is 50 ms. Keys are met in turn, or \
         the nth as often as 1/n (Zipf)."
    );
    let mut page = measure::opening("Decisions of rate limits", "bench-limits", &what);
    page.push_str(
        "|  | decisions/s a core | ns a decision | decisions/s by the wall | calls of Redis per 100 | Redis CPU µs a decision | aim |\n\
         |---|---:|---:|---:|---:|---:|---:|\n",
    );
    for case in CASES.iter().filter(|case| options.takes(case.name)) {
        let rounds = match case.callers {
            0 => in_memory(case, time),
            _ => shared(case, time),
        };
        page.push_str(&row(case, &rounds));
    }
    options.publish(&page);
}

fn row(case: &Case, rounds: &[Round]) -> String {
    let of = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure));
    let best = rounds.iter().map(Round::per_core).fold(0.0, f64::max);
    let per_core = of(Round::per_core);
    let mut row = format!(
        "| {} | {} ({}) | {} | {} |",
        case.name,
        grouped(per_core),
        grouped(best),
        grouped(1e9 / per_core),
        grouped(of(|round| round.decisions / round.wall.as_secs_f64())),
    );
    if case.callers == 0 {
        row.push_str(" – | – |");
    } else {
        let calls = of(|round| round.calls / round.decisions * 100.0);
        let redis = of(|round| round.redis_cpu.as_secs_f64() * 1e6 / round.decisions);
        write!(row, " {calls:.3} | {redis:.2} |").unwrap();
    }
    match case.aim {
        Some(aim) if per_core >= aim => writeln!(row, " {}: met |", grouped(aim)).unwrap(),
        Some(aim) => writeln!(row, " {}: {:.2} of it |", grouped(aim), per_core / aim).unwrap(),
        None => row.push_str(" – |\n"),
    }
    println!("{}", row.trim_end());
    row
}

fn in_memory(case: &Case, time: Duration) -> Vec<Round> {
    let plan = Plan::first(
        harness::parse(&case.file()),
        Secured::default(),
        Process::default(),
    );
    let visits = visits(case.keys);
    for address in &visits {
        decide(&plan, address);
    }
    let round = |_| {
        let (began, cpu) = (clock::now(), measure::thread_cpu());
        let mut decisions = 0;
        let mut visits = visits.iter().cycle();
        while began.elapsed() < time {
            for address in visits.by_ref().take(BATCH) {
                decide(&plan, address);
            }
            decisions += BATCH;
        }
        Round {
            decisions: decisions as f64,
            wall: began.elapsed(),
            cpu: measure::thread_cpu() - cpu,
            redis_cpu: Duration::ZERO,
            calls: 0.0,
        }
    };
    (0..ROUNDS).map(round).collect()
}

/// As a request does.
fn decide(plan: &Plan, address: &Address) {
    let rules = plan.config.limits[0].rules.as_ref().unwrap();
    let (number, rule) = rules.numbered().next().unwrap();
    let mut key = plan.limits[0].keys.of_rule((number, rule));
    key.part(address);
    let ask = Ask {
        key: key.finish(),
        rule,
        cost: 1,
        enforced: true,
    };
    let mut verdicts = [Verdict {
        admitted: false,
        remaining: 0,
        reset: Duration::ZERO,
        retry_after: None,
    }];
    black_box(
        plan.counters
            .ask(&[ask], NOW.with(|now| *now), &mut verdicts),
    );
    black_box(verdicts);
}

thread_local! {
    /// A request has read the clocks already.
    static NOW: weir::policy::limit::Now = clock::moment();
}

fn shared(case: &Case, time: Duration) -> Vec<Round> {
    let cluster = Cluster::shared();
    let visits: Arc<[Address]> = visits(case.keys).into();
    // Who waits for Redis is late for the next request, which looks at the clock again.
    let stride = match case.limit {
        FAR_STRICT => 1,
        _ => BATCH,
    };
    harness::runtime().block_on(async {
        let node = Arc::new(Node::start(&case.file()).await);
        let run = async |time| {
            let (began, cpu) = (clock::now(), measure::thread_cpu());
            let (redis_cpu, calls) = (measure::servers_cpu(cluster), node.calls());
            let mut callers = JoinSet::new();
            for n in 0..case.callers {
                let from = visits.len() * n / case.callers;
                let until = clock::mono() + time;
                callers.spawn(call(node.clone(), visits.clone(), from, stride, until));
            }
            let decisions: usize = callers.join_all().await.into_iter().sum();
            Round {
                decisions: decisions as f64,
                wall: began.elapsed(),
                cpu: measure::thread_cpu() - cpu,
                redis_cpu: measure::servers_cpu(cluster) - redis_cpu,
                calls: (node.calls() - calls) as f64,
            }
        };
        run(time / 2).await; // leases find their size
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(run(time).await);
        }
        rounds
    })
}

/// Decides as connections of a lane do, beside others: how often it did.
async fn call(
    node: Arc<Node>,
    visits: Arc<[Address]>,
    from: usize,
    stride: usize,
    until: Duration,
) -> usize {
    let mut decisions = 0;
    let mut visits = visits.iter().cycle().skip(from);
    loop {
        let now = clock::mono();
        if now >= until {
            return decisions;
        }
        for address in visits.by_ref().take(stride) {
            let parts = [Cow::Borrowed(&address[..])];
            assert_ne!(node.ask(&parts, now).await, Decision::Lost);
        }
        decisions += stride;
        if decisions.is_multiple_of(BATCH) {
            tokio::task::yield_now().await;
        }
    }
}

/// Addresses in the order in which they ask.
fn visits(keys: Keys) -> Vec<Address> {
    fastrand::seed(7);
    match keys {
        Keys::Even(keys) => {
            let mut visits: Vec<_> = (0..keys).map(address).collect();
            fastrand::shuffle(&mut visits);
            visits
        }
        Keys::Zipf(keys) => (0..1 << 22)
            .map(|_| address(f64::from(keys).powf(fastrand::f64()) as u32))
            .collect(),
    }
}

fn address(number: u32) -> Address {
    let [_, a, b, c] = number.to_be_bytes();
    let text = format!("10.{a:03}.{b:03}.{c:03}");
    text.as_bytes().try_into().unwrap()
}
