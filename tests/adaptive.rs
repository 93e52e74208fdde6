//! How many requests an upstream is given at a time, where that is learnt.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use harness::{Lane, Upstream, eventually_within, ok};

/// What the upstream serves at a time.
const CAPACITY: usize = 8;
const CLIENTS: usize = 64;

/// An upstream that takes any number of requests, and serves [`CAPACITY`] at a time, each in 10 ms.
fn upstream() -> Upstream {
    let served = Arc::new((Mutex::new(0), Condvar::new()));
    Upstream::replying(move |_| {
        let (count, changed) = &*served;
        let mut now = changed
            .wait_while(count.lock().unwrap(), |now| *now >= CAPACITY)
            .unwrap();
        *now += 1;
        drop(now);
        thread::sleep(Duration::from_millis(10));
        *count.lock().unwrap() -= 1;
        changed.notify_one();
        ok("served")
    })
}

fn bound(lane: &Lane) -> usize {
    let text = lane.plan.borrow().metrics.text();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("weir_upstream_concurrency_limit{upstream=\"app\"} "));
    line.unwrap().parse().unwrap()
}

#[test]
fn an_upstream_is_given_about_what_it_serves_at_a_time_and_the_rest_is_refused() {
    let upstream = upstream();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\n\
         upstreams: {{app: {{endpoints: ['{}'], concurrency: {{adaptive: gradient, min: 2, max: 1000, pending: 0}}}}}}\n",
        upstream.url()
    ));
    let (stop, served, refused) = (
        AtomicBool::new(false),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut client = lane.connect();
                while !stop.load(Ordering::Relaxed) {
                    match client.get("/").status {
                        200 => served.fetch_add(1, Ordering::Relaxed),
                        503 => {
                            thread::sleep(Duration::from_millis(5));
                            refused.fetch_add(1, Ordering::Relaxed)
                        }
                        other => panic!("{other}"),
                    };
                }
            });
        }
        let settled = || (CAPACITY..=3 * CAPACITY).contains(&bound(&lane));
        let watched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // It begins at 20, and may go up before the time without a queue is known.
            let mut in_a_row = 0;
            eventually_within(Duration::from_secs(60), || {
                in_a_row = if settled() { in_a_row + 1 } else { 0 };
                in_a_row > 100
            });
        }));
        stop.store(true, Ordering::Relaxed);
        watched.unwrap();
    });
    assert!(refused.load(Ordering::Relaxed) > 0);
    assert!(served.load(Ordering::Relaxed) > 0);
    let text = lane.plan.borrow().metrics.text();
    assert!(text.contains("reason=\"overloaded\""), "{text}");
}
