//! What a million keys take: bytes a key in Redis, and in a process that remembers more keys than those, or fewer.
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
use tokio::task::JoinSet;
use weir::clock;
use weir::store::leases::Decision;

/// Under way at a time.
const CALLERS: u32 = 256;

/// How a key is counted so that it lives on in Redis until it is measured.
struct Case {
    name: &'static str,
    limit: &'static str,
    /// Of the keys that the process remembers, at most, in percent.
    max_keys: u32,
}

const CASES: [Case; 4] = [
    Case {
        name: "token bucket",
        limit: "{limit: 1/h, burst: 5, by: client.ip}",
        max_keys: 200,
    },
    Case {
        name: "token bucket",
        limit: "{limit: 1/h, burst: 5, by: client.ip}",
        max_keys: 10,
    },
    Case {
        name: "sliding window",
        limit: "{limit: 5/h, algorithm: sliding_window, by: client.ip}",
        max_keys: 10,
    },
    Case {
        name: "fixed window",
        limit: "{limit: 5/day, algorithm: fixed_window, by: client.ip}",
        max_keys: 10,
    },
];

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
        "{} distinct keys, each asked once by one process of one lane. In Redis: `used_memory` of the masters, by which it grew; \
         replicas hold as much again. In the process: resident memory, by which it grew from its first request on.",
        grouped(f64::from(keys))
    );
    let mut page = measure::opening("What keys take", "bench-scale", &what);
    page.push_str(
        "| limit | max_keys | keys in Redis | bytes a key in Redis | keys in the process | MiB of the process | bytes a key | keys/s |\n\
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
    let max_keys = keys / 100 * case.max_keys;
    let redis = cluster
        .yaml(&key_prefix())
        .replace("{urls", "{timeout: 5s, urls");
    let file = format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nrate_limits: {{a: {}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\nrate_limit_defaults: {{max_keys: {max_keys}}}\n{redis}",
        case.limit
    );
    // What scripts and connections take is there before the keys are.
    child(&file, 100);
    let (before, others) = (used(cluster), entries(cluster));
    let said = child(&file, keys);
    let [held, grown, seconds] = said[..] else {
        panic!("{said:?}")
    };
    let (after, entries) = (used(cluster), entries(cluster) - others);
    format!(
        "| {} | {} | {} | {:.0} | {} | {:.1} | {:.0} | {} |",
        case.name,
        grouped(f64::from(max_keys)),
        grouped(entries as f64),
        (after - before) as f64 / entries as f64,
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
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
                    let [_, a, b, c] = number.to_be_bytes();
                    let address = format!("10.{a}.{b}.{c}");
                    let parts = [Cow::Borrowed(address.as_bytes())];
                    let decision = node.ask(&parts, clock::mono()).await;
                    assert!(
                        matches!(decision, Decision::Admitted(_)),
                        "{address}: {decision:?}"
                    );
                }
            });
        }
        callers.join_all().await;
        let seconds: Duration = began.elapsed();
        let held = node.plan.shared_limits.as_ref().unwrap().leases.len();
        let grown = measure::resident().saturating_sub(before);
        println!("{held} {grown} {}", seconds.as_secs_f64());
    });
}
