//! How many requests an upstream is given at a time, where that is learnt.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use super::harness::frames::{HEADERS, Raw, get};
use super::harness::process::{Running, file};
use super::harness::{Client, Lane, Upstream, eventually, eventually_within, ok};

/// How long a client that was refused waits.
const PAUSE: Duration = Duration::from_millis(50);
/// What the upstream serves at a time.
const CAPACITY: usize = 8;
const CLIENTS: usize = 64;

/// An upstream that takes any number of requests, and serves `capacity` at a time, each in 25 ms.
fn upstream(capacity: usize) -> Upstream {
    let served = Arc::new((Mutex::new(0), Condvar::new()));
    Upstream::replying(move |_| {
        let (count, changed) = &*served;
        let mut now = changed
            .wait_while(count.lock().unwrap(), |now| *now >= capacity)
            .unwrap();
        *now += 1;
        drop(now);
        thread::sleep(Duration::from_millis(25));
        *count.lock().unwrap() -= 1;
        changed.notify_one();
        ok("served")
    })
}

fn bound(lane: &Lane) -> usize {
    lane.plan.borrow().upstreams[0].live.bound().unwrap() as usize
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
                    match client.try_get("/") {
                        // Refused by weir, not by the upstream.
                        Some(reply) if reply.field("retry-after").is_some() => thread::sleep(PAUSE),
                        Some(_) => {}
                        None => client = lane.connect(),
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
    // The bound begins at 20, which is none of those that it settles at.
    let capacity = CAPACITY / 2;
    let upstream = upstream(capacity);
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
                            thread::sleep(PAUSE);
                            refused.fetch_add(1, Ordering::Relaxed)
                        }
                        other => panic!("{other}"),
                    };
                }
            });
        }
        let settled = || (capacity..=3 * capacity).contains(&bound(&lane));
        let watched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // It may go up before the time without a queue is known, and chance has its part.
            let mut in_a_row = 0;
            eventually_within(Duration::from_secs(120), || {
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
            thread::sleep(Duration::from_millis(300) * u32::try_from(turns).unwrap());
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

/// Answers at once; under `/stream` with a body that does not end, and under `/switch` with another protocol.
fn streaming() -> Upstream {
    Upstream::replying(|head| match head.split(' ').nth(1) {
        Some("/stream") => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
        Some("/switch") => {
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
                .to_owned()
        }
        Some(_) | None => ok("served"),
    })
}

/// So many responses that do not end.
fn open(lane: &Lane, count: usize, path: &str, fields: &[&str], status: u16) -> Vec<Client> {
    let open = |_| {
        let mut client = lane.connect();
        client.begin("GET", path, fields, "");
        assert_eq!(client.finish_head().status, status);
        client
    };
    (0..count).map(open).collect()
}

#[test]
fn responses_that_do_not_end_leave_what_is_learnt_to_others() {
    let upstream = streaming();
    let lane = lane(&upstream, "max: 1000, pending: 0");
    let _streams = open(&lane, 40, "/stream", &[], 200);
    assert_eq!(lane.connect().get("/").status, 200);
    let fields = ["Connection: Upgrade", "Upgrade: websocket"];
    let _switched = open(&lane, 40, "/switch", &fields, 101);
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
    let _streams = open(&lane, 2, "/stream", &[], 200);
    assert_eq!(lane.connect().get("/").status, 503);
}

/// Has an upstream that answers in 100 ms fail at once for a while, with these bytes. There is room throughout, but for dips of 100 ms, for
/// the requests under way, which are more than half of what may be: with fewer, nothing is learnt.
fn fails_at_once(with: &'static str) {
    const FEW: usize = 12;
    let (well, failed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let fails = Arc::new(AtomicBool::new(false));
    let upstream = Upstream::replying({
        let (well, failed, fails) = (well.clone(), failed.clone(), fails.clone());
        move |_| {
            let (after, count, answer) = match fails.load(Ordering::Relaxed) {
                true => (10, &failed, with.to_owned()),
                false => (100, &well, ok("served")),
            };
            thread::sleep(Duration::from_millis(after));
            count.fetch_add(1, Ordering::Relaxed);
            answer
        }
    });
    let lane = lane(&upstream, "min: 2, max: 20");
    under_load(&lane, FEW, || {
        let more = |count: &AtomicUsize, than: usize| {
            let then = count.load(Ordering::Relaxed);
            let mut low = 0;
            eventually_within(Duration::from_secs(60), || {
                let bound = bound(&lane);
                low = if bound < FEW { low + 1 } else { 0 };
                // For a second, of which a machine that stalls sees nothing.
                assert!(low < 100, "{bound}");
                count.load(Ordering::Relaxed) > then + than
            });
        };
        more(&well, 100);
        fails.store(true, Ordering::Relaxed);
        more(&failed, 2000);
        fails.store(false, Ordering::Relaxed);
        more(&well, 400);
    });
}

#[test]
fn errors_that_come_at_once_are_no_quick_answers() {
    fails_at_once("HTTP/1.1 503 Broken\r\nContent-Length: 0\r\n\r\n");
}

#[test]
fn what_breaks_off_is_no_quick_answer() {
    fails_at_once("nonsense\r\n\r\n");
}

#[test]
fn an_upstream_that_does_not_answer_in_time_is_given_less() {
    let hangs = Arc::new(AtomicBool::new(false));
    let upstream = Upstream::replying({
        let hangs = hangs.clone();
        move |_| {
            let after = if hangs.load(Ordering::Relaxed) {
                5000
            } else {
                100
            };
            thread::sleep(Duration::from_millis(after));
            ok("served")
        }
    });
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\n\
         upstreams: {{app: {{endpoints: ['{}'], timeout: 1s, concurrency: {{adaptive: gradient, min: 2, max: 20}}}}}}\n",
        upstream.url()
    ));
    under_load(&lane, CLIENTS, || {
        for _ in 0..500 {
            upstream.wait_for_request();
        }
        eventually(|| bound(&lane) >= 8);
        hangs.store(true, Ordering::Relaxed);
        eventually_within(Duration::from_secs(60), || bound(&lane) < 8);
    });
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
    let bound = || running.told("weir_upstream_concurrency_limit{upstream=\"app\"}");
    assert_eq!(bound(), Some(20.0));
    std::fs::write(config.path(), text("timeout: 9s")).unwrap();
    running.signal("HUP");
    eventually(|| bound() == Some(0.0));
}
