//! What a million keys and a million sessions take: bytes of each in Redis, and in a process that remembers more of them, or
//! fewer.
//!
//! Each process is a child of this one, so that its memory is its own; it asks as connections of a lane do.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a bench ends it; what it measures is printed"
)]

#[path = "../tests/harness/mod.rs"]
mod harness;
mod measure;

use std::borrow::Cow;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use harness::node::Node;
use harness::redis::{Answer, Cluster, key_prefix};
use measure::{Options, grouped};
use serde_json::Value;
use tokio::task::JoinSet;
use weir::clock;
use weir::store::limits::leases::Decision;
use weir::store::sessions::{Known, Reach};

/// Under way at a time.
const CALLERS: u32 = 256;

struct Case {
    name: &'static str,
    what: What,
    /// Of those that there are, how many the process remembers at most, in percent.
    remembered: u32,
}

#[derive(Clone, Copy)]
enum What {
    /// Keys of a limit, counted so that each lives on in Redis until it is measured.
    Keys(&'static str),
    /// Sessions of a user each, each started and then found by its token.
    Sessions,
}

const BUCKET: What = What::Keys("{limit: 1/h, burst: 5, by: client.ip}");
const SLIDING: What = What::Keys("{limit: 5/h, algorithm: sliding_window, by: client.ip}");
const FIXED: What = What::Keys("{limit: 5/day, algorithm: fixed_window, by: client.ip}");

const CASES: [Case; 5] = [
    Case::new("keys of a token bucket", BUCKET, 200),
    Case::new("keys of a token bucket", BUCKET, 10),
    Case::new("keys of a sliding window", SLIDING, 10),
    Case::new("keys of a fixed window", FIXED, 10),
    Case::new("sessions", What::Sessions, 10),
];

impl Case {
    const fn new(name: &'static str, what: What, remembered: u32) -> Case {
        Case {
            name,
            what,
            remembered,
        }
    }

    /// `remembered`: a number.
    fn file(&self, remembered: u32) -> String {
        let redis = Cluster::shared()
            .yaml(&key_prefix())
            .replace("{urls", "{timeout: 5s, urls");
        let short = "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1";
        match self.what {
            What::Keys(limit) => format!(
                "{short}\nrate_limits: {{a: {limit}}}\nroutes: [{{upstream: upstream, rate_limits: [a]}}]\n\
                 rate_limit_defaults: {{max_keys: {remembered}}}\n{redis}"
            ),
            What::Sessions => format!(
                "{short}\nsessions: {{web: {{cache: {{max_entries: {remembered}}}}}}}\n\
                 routes: [{{upstream: upstream, session: {{use: web}}}}]\n{redis}"
            ),
        }
    }
}

fn main() {
    let options = Options::read();
    if let [file, keys] = &options.rest[..] {
        return process(file, keys.parse().unwrap());
    }
    let keys = match options.whole {
        true => 1_000_000,
        false => 1_000,
    };
    let what = format!(
        "{} keys of a limit, each asked once, or as many sessions, each started and found once, by one process of one lane. In \
         Redis: `used_memory` of the masters, by which it grew; replicas hold as much again. In the process: resident memory, by \
         which it grew from its first request on, and how many it may remember and does.",
        grouped(f64::from(keys))
    );
    let mut page = measure::opening("What keys and sessions take", "bench-scale", &what);
    page.push_str(
        "|  | entries in Redis | bytes each in Redis | remembered at most | remembered | MiB of the process | bytes each of those | a second |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    let cases = CASES.iter().filter(|case| options.takes(case.name));
    for case in cases {
        let row = row(case, keys);
        println!("{row}");
        page.push_str(&row);
        page.push('\n');
    }
    options.publish(&page);
}

fn row(case: &Case, keys: u32) -> String {
    let cluster = Cluster::shared();
    for master in 0..3 {
        cluster.cli(master, &["FLUSHALL", "SYNC"]);
    }
    let remembered = keys / 100 * case.remembered;
    let file = case.file(remembered);
    // What scripts and connections take is there before the keys are.
    child(&file, 100);
    let before = used(cluster);
    let said = child(&file, keys);
    let [held, grown, seconds] = said[..] else {
        panic!("{said:?}")
    };
    format!(
        "| {} | {} | {:.0} | {} | {} | {:.1} | {:.0} | {} |",
        case.name,
        grouped(entries(cluster) as f64),
        (used(cluster) - before) as f64 / f64::from(keys),
        grouped(f64::from(remembered)),
        grouped(held),
        grown / (1024.0 * 1024.0),
        grown / held,
        grouped(f64::from(keys) / seconds),
    )
}

/// Of the masters.
fn used(cluster: &Cluster) -> i64 {
    let of = |master| {
        let info = cluster.cli(master, &["INFO", "memory"]);
        let mut lines = info.text().lines();
        let used = lines.find_map(|line| line.strip_prefix("used_memory:"));
        used.unwrap().parse::<i64>().unwrap()
    };
    (0..3).map(of).sum()
}

/// Keys in all.
fn entries(cluster: &Cluster) -> i64 {
    let of = |master| Answer::int(&cluster.cli(master, &["DBSIZE"]));
    (0..3).map(of).sum()
}

/// Runs a process that asks; the numbers that it says.
fn child(file: &str, keys: u32) -> Vec<f64> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([file, &keys.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let numbers = text.split_whitespace();
    numbers.map(|number| number.parse().unwrap()).collect()
}

/// Says how many keys it holds in the end, by how many bytes it grew, and for how many seconds it asked.
fn process(file: &str, keys: u32) {
    harness::runtime().block_on(async {
        let node = Arc::new(Node::start(file).await);
        let (before, began) = (measure::resident(), clock::now());
        let next = Arc::new(AtomicU32::new(0));
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (node, next) = (node.clone(), next.clone());
            callers.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= keys {
                        return;
                    }
                    ask(&node, number).await;
                }
            });
        }
        callers.join_all().await;
        let seconds: Duration = began.elapsed();
        let leases = &node.plan.shared_limits.as_ref().unwrap().leases;
        let sessions = node.plan.sessions.first();
        let held = sessions.map_or_else(|| leases.held_keys(), |sessions| sessions.held());
        let grown = measure::resident().saturating_sub(before);
        println!("{held} {grown} {}", seconds.as_secs_f64());
    });
}

/// The only request of a client's, or its log-in and the next request.
async fn ask(node: &Node, number: u32) {
    let [_, a, b, c] = number.to_be_bytes();
    let Some(sessions) = node.plan.sessions.first() else {
        let address = format!("10.{a}.{b}.{c}");
        let parts = [Cow::Borrowed(address.as_bytes())];
        let decision = node.ask(&parts, clock::mono()).await;
        assert!(matches!(decision, Decision::Admitted(_)), "{address}");
        return;
    };
    let reach = Reach {
        redis: Some(&node.redis.sessions),
        within: None,
    };
    let claims = [("role".to_owned(), Value::from("customer"))];
    let user = format!("user-{number}");
    let created = sessions.create(user, claims.into(), reach).await.unwrap();
    let found = match sessions.recall(created.token.as_str(), clock::mono()) {
        Known::Session(session) => Some(session),
        Known::Nobody => None,
        Known::Ask(id) => sessions.ask(id, reach).await.unwrap(),
    };
    assert!(found.is_some(), "{number}");
}
