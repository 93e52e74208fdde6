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

use harness::frames::{HEADERS, Raw, get};
use harness::process::{Running, file};
use harness::{Client, Lane, Upstream, eventually, eventually_within, ok};

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
    lane.plan.borrow().upstreams[0].bound().unwrap() as usize
}

/// A lane in front of `upstream` whose bound is learnt, with these further settings of `concurrency`.
fn lane(upstream: &Upstream, more: &str) -> Lane {
    Lane::start(&format!(
        "listen: 127.0.0.1:0\n\
         upstreams: {{app: {{endpoints: ['{}'], concurrency: {{adaptive: gradient, {more}}}}}}}\n",
        upstream.url()
    ))
}

/// Has `clients` of them ask, each anew once it is answered, until `watch` is over.
fn under_load(lane: &Lane, clients: usize, watch: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut client = lane.connect();
                while !stop.load(Ordering::Relaxed) {
                    if client.try_get("/").is_none() {
                        client = lane.connect();
                    }
                }
            });
        }
        let watched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(watch));
        stop.store(true, Ordering::Relaxed);
        watched.unwrap();
    });
}

#[test]
fn an_upstream_is_given_about_what_it_serves_at_a_time_and_the_rest_is_refused() {
    let upstream = upstream();
    let lane = lane(&upstream, "min: 2, max: 1000, pending: 0");
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

#[test]
fn the_bound_shrinks_while_requests_wait() {
    // Served at a time: all, and then no more than that.
    let capacity = Arc::new(AtomicUsize::new(usize::MAX));
    let under_way = Arc::new(AtomicUsize::new(0));
    let upstream = Upstream::replying({
        let (capacity, under_way) = (capacity.clone(), under_way.clone());
        move |_| {
            let now = under_way.fetch_add(1, Ordering::Relaxed) + 1;
            let turns = now.div_ceil(capacity.load(Ordering::Relaxed));
            thread::sleep(Duration::from_millis(50) * u32::try_from(turns).unwrap());
            under_way.fetch_sub(1, Ordering::Relaxed);
            ok("served")
        }
    });
    let lane = lane(&upstream, "min: 2, max: 1000, pending: 1000");
    under_load(&lane, CLIENTS, || {
        let minute = Duration::from_secs(60);
        let under_way = || under_way.load(Ordering::Relaxed);
        eventually_within(minute, || under_way() > 4 * CAPACITY);
        capacity.store(CAPACITY, Ordering::Relaxed);
        let mut in_a_row = 0;
        eventually_within(minute, || {
            in_a_row = match under_way() <= 3 * CAPACITY {
                true => in_a_row + 1,
                false => 0,
            };
            in_a_row > 50
        });
    });
}

/// Answers at once; under `/stream` with a body that does not end.
fn streaming() -> Upstream {
    Upstream::replying(|head| match head.starts_with("GET /stream ") {
        true => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
        false => ok("served"),
    })
}

/// A response whose body does not end.
fn stream(lane: &Lane) -> (Client, u16) {
    let mut client = lane.connect();
    client.begin("GET", "/stream", &[], "");
    let status = client.finish_head().status;
    (client, status)
}

#[test]
fn responses_that_do_not_end_leave_what_is_learnt_to_others() {
    let upstream = streaming();
    let lane = lane(&upstream, "max: 1000, pending: 0");
    let streams: Vec<_> = (0..40).map(|_| stream(&lane)).collect();
    assert!(streams.iter().all(|(_, status)| *status == 200));
    assert_eq!(lane.connect().get("/").status, 200);
    let mut raw = Raw::client(lane.address, &[]);
    for id in (1..80).step_by(2) {
        raw.send(&get(id, "/stream"));
        let head = raw.until(|frame| frame.stream == id && frame.kind == HEADERS);
        assert_eq!(head.status(), Some(200));
    }
    assert_eq!(lane.connect().get("/").status, 200);
    assert!(bound(&lane) < 40);
}

#[test]
fn responses_that_do_not_end_are_bounded_by_max() {
    let upstream = streaming();
    let lane = lane(&upstream, "max: 2, pending: 0");
    let streams: Vec<_> = (0..2).map(|_| stream(&lane)).collect();
    assert!(streams.iter().all(|(_, status)| *status == 200));
    assert_eq!(lane.connect().get("/").status, 503);
}

#[test]
fn the_metric_goes_with_what_is_learnt() {
    let upstream = streaming();
    let text = |upstream_settings: &str| {
        format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
             upstreams: {{app: {{endpoints: ['{}'], {upstream_settings}}}}}\n",
            upstream.url()
        )
    };
    let config = file(&text("concurrency: {adaptive: gradient}"));
    let running = Running::start(config.path());
    let says = |bound| {
        let line = format!("weir_upstream_concurrency_limit{{upstream=\"app\"}} {bound}\n");
        running.admin().get("/metrics").body.contains(&line)
    };
    assert!(says(20));
    std::fs::write(config.path(), text("timeout: 9s")).unwrap();
    running.signal("HUP");
    eventually(|| says(0));
}
