//! What a process refuses while it has more to do than it can, and what becomes of the rest.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use harness::metrics::value;
use harness::process::{Running, file};
use harness::{Client, Lane, Reply, Upstream, eventually, eventually_within, runtime};
use http::Request;
use serde_json::Value;

/// With so little memory everything is refused.
const ALL: &str = "runtime: {lanes: 1, shed: {memory: 1MiB}}\n";

/// Keeps the tests apart that measure how late a lane is.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rejections(metrics: &str, reason: &str) -> f64 {
    let series = format!("weir_rejections_total{{reason=\"{reason}\"}}");
    value(metrics, &series).unwrap_or_default()
}

fn is_shed(reply: &Reply, reason: &str) -> bool {
    let status = format!("weir; error=proxy_internal_error; details=\"{reason}\"");
    reply.status == 503
        && reply.field("retry-after") == Some("1")
        && reply.field("proxy-status") == Some(&*status)
}

#[test]
fn what_is_shed_spends_no_quota_and_reaches_no_upstream() {
    let upstream = Upstream::answering("served");
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}']}}}}\n\
         rate_limits: {{few: {{limit: 3/h, by: client.ip}}}}\n\
         routes:\n  - {{match: {{path: /healthz}}, upstream: app, shed: false}}\n  - {{match: {{path: /free}}, upstream: app}}\n  - {{upstream: app, rate_limits: [few]}}\n{ALL}",
        upstream.url()
    ));
    let mut client = lane.connect();
    eventually(|| client.get("/free").status == 503);
    while upstream.requests.try_recv().is_ok() {}
    for _ in 0..10 {
        // On one connection, which stays open.
        let reply = client.get("/a");
        assert!(is_shed(&reply, "shed_memory"), "{reply:?}");
        assert_eq!(reply.field("connection"), None);
    }
    let reply = client.send("POST", "/a", &[], "a body that no one wants");
    assert!(is_shed(&reply, "shed_memory"), "{reply:?}");
    assert_eq!(reply.field("connection"), None);
    let reply = client.send("POST", "/a", &["Content-Length: 100000"], "");
    assert!(is_shed(&reply, "shed_memory"), "{reply:?}");
    assert_eq!(reply.field("connection"), Some("close"));
    assert!(upstream.requests.try_recv().is_err());
    // What must be answered is, for example checks that restart a pod.
    assert_eq!(lane.connect().get("/healthz").status, 200);
    let metrics = lane.plan.borrow().metrics.text();
    assert!(rejections(&metrics, "shed_memory") >= 11.0, "{metrics}");
    assert_eq!(rejections(&metrics, "quota_exceeded"), 0.0);
}

#[test]
fn calls_by_http2_are_told_unavailable() {
    let upstream = Upstream::answering("served");
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\n{ALL}",
        upstream.url()
    ));
    eventually(|| lane.connect().get("/").status == 503);
    runtime().block_on(async {
        let stream = tokio::net::TcpStream::connect(lane.address).await.unwrap();
        let (mut requests, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        for (content_type, status, grpc) in
            [("application/grpc", 200, Some("14")), ("a/b", 503, None)]
        {
            let request = Request::post("http://weir/test.Peer/Any")
                .header("content-type", content_type)
                .body(())
                .unwrap();
            let (response, _body) = requests.send_request(request, true).unwrap();
            let head = response.await.unwrap().into_parts().0;
            assert_eq!(head.status, status);
            let field = |name: &str| Some(head.headers.get(name)?.to_str().unwrap());
            assert_eq!(field("grpc-status"), grpc);
            assert_eq!(field("retry-after"), Some("1"));
        }
    });
}

#[test]
fn memory_that_grows_to_its_bound_sheds_and_is_on_record() {
    let upstream = Upstream::answering("served");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.yaml");
    let write = |shed: &str| {
        let text = format!(
            "listeners: [{{address: '127.0.0.1:0', timeouts: {{header_read: 10m}}}}]\nupstream: {}\n\
             admin: {{address: '127.0.0.1:0'}}\naudit: {{sqlite: {{path: '{}'}}}}\nruntime: {{lanes: 1{shed}}}\n",
            upstream.url(),
            folder.path().join("audit.db").display()
        );
        let fresh = folder.path().join("fresh");
        fs::write(&fresh, text).unwrap();
        fs::rename(&fresh, &path).unwrap();
    };
    write("");
    let running = Running::start(&path);
    assert_eq!(running.client().get("/").status, 200);
    let bound = running.memory("VmRSS") * 1024 + 16 * 1024 * 1024;
    write(&format!(", shed: {{memory: {bound}B}}"));
    running.signal("HUP");
    running.log_until("configuration reloaded");
    assert_eq!(running.client().get("/").status, 200);

    // Heads that are begun and not ended, 60 KiB each: weir must hold them.
    let begun = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX-A: {}",
        "a".repeat(60 * 1024)
    );
    let clients: Vec<TcpStream> = (0..500)
        .map(|_| {
            let mut client = running.connect();
            client.write_all(begun.as_bytes()).unwrap();
            client
        })
        .collect();
    eventually(|| is_shed(&running.client().get("/"), "shed_memory"));
    assert!(running.memory("VmRSS") * 1024 > bound);
    let host = ["Host: 127.0.0.1"];
    let admin = |path: &str| running.admin().send("GET", path, &host, "");
    assert_eq!(admin("/ready").status, 200);
    // It is counted once it has gone out.
    eventually(|| rejections(&admin("/metrics").body, "shed_memory") > 0.0);
    eventually(|| {
        let page: Value = serde_json::from_str(&admin("/v1/audit?status=503").body).unwrap();
        page["events"].as_array().is_some_and(|events| {
            !events.is_empty() && events.iter().all(|event| event["label"] == "shed_memory")
        })
    });
    drop(clients);
    write("");
    running.signal("HUP");
    eventually(|| running.client().get("/").status == 200);
}

/// Stops and continues a process so that it has a small part of a CPU, as a container over its quota does, until it is dropped.
struct Starved<'p>(Child, &'p Running);

impl Starved<'_> {
    fn begin(running: &Running) -> Starved<'_> {
        let by_turns = "while :; do kill -STOP $0; sleep 0.15; kill -CONT $0; sleep 0.005; done";
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", by_turns, &running.child.id().to_string()]);
        Starved(shell.spawn().unwrap(), running)
    }
}

impl Drop for Starved<'_> {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        self.1.signal("CONT");
    }
}

#[test]
fn a_lane_that_is_late_all_the_time_sheds_and_one_pause_is_no_reason() {
    let _alone = alone();
    let upstream = Upstream::answering("served");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1, shed: {{loop_delay: 50ms}}}}\n",
        upstream.url()
    ));
    let running = Running::start(config.path());
    let shed = || rejections(&running.admin().get("/metrics").body, "shed_loop_delay");
    let mut client = running.client();
    assert_eq!(client.get("/").status, 200);
    // As a virtual machine is that is moved.
    running.signal("STOP");
    thread::sleep(Duration::from_secs(2));
    running.signal("CONT");
    for _ in 0..200 {
        assert_eq!(client.get("/").status, 200);
    }
    assert_eq!(shed(), 0.0);

    let starved = Starved::begin(&running);
    eventually_within(Duration::from_secs(60), || {
        is_shed(&client.get("/"), "shed_loop_delay")
    });
    drop(starved);
    assert!(shed() > 0.0);
    let in_a_row = AtomicU64::new(0);
    eventually_within(Duration::from_secs(60), || {
        match client.get("/").status {
            200 => in_a_row.fetch_add(1, Ordering::Relaxed),
            _ => in_a_row.swap(0, Ordering::Relaxed),
        };
        in_a_row.load(Ordering::Relaxed) > 50
    });
    let metrics = running.admin().get("/metrics").body;
    assert!(
        metrics.contains("weir_lane_delay_seconds_count"),
        "{metrics}"
    );
}

/// Clients that ask more than a lane can do, and when they are refused ask again after a moment.
const CLIENTS: usize = 240;

/// What clients saw.
struct Seen {
    /// How long answers took, shortest first.
    answered: Vec<Duration>,
    refused: Vec<Duration>,
}

impl Seen {
    fn at(of: &[Duration], share: f64) -> Duration {
        of[(of.len() as f64 * share) as usize]
    }
}

#[expect(clippy::disallowed_methods, reason = "times as clients see them")]
fn overload(upstream: &Upstream, shed: &str) -> Seen {
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], connect_timeout: 10s}}}}\n\
         admin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1{shed}}}\n",
        upstream.url()
    ));
    let running = Running::start(config.path());
    let (stop, measures) = (AtomicBool::new(false), AtomicBool::new(false));
    let (answered, refused) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let begin = Barrier::new(CLIENTS + 1);
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut client = Client::to(&running.address);
                begin.wait();
                while !stop.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    let status = client.get("/").status;
                    let took = asked.elapsed();
                    let seen = if status == 200 { &answered } else { &refused };
                    if measures.load(Ordering::Relaxed) {
                        seen.lock().unwrap().push(took);
                    }
                    if status != 200 {
                        assert_eq!(status, 503);
                        thread::sleep(Duration::from_millis(300));
                    }
                }
            });
        }
        begin.wait();
        // For the share to settle, and then to measure.
        thread::sleep(Duration::from_secs(4));
        measures.store(true, Ordering::Relaxed);
        thread::sleep(Duration::from_secs(6));
        stop.store(true, Ordering::Relaxed);
    });
    let sorted = |times: Mutex<Vec<Duration>>| {
        let mut times = times.into_inner().unwrap();
        times.sort();
        times
    };
    Seen {
        answered: sorted(answered),
        refused: sorted(refused),
    }
}

#[test]
fn under_overload_what_is_admitted_is_quick_and_not_less() {
    let _alone = alone();
    let upstream = Upstream::answering(&"x".repeat(512 * 1024));
    let without = overload(&upstream, "");
    // Each answer lets others go first four times, so that it waits for its turn more often than once.
    let with = overload(&upstream, ", shed: {loop_delay: 4ms}");
    let told = |seen: &Seen| {
        format!(
            "{} answered, half within {:?}, 99% within {:?}; {} refused",
            seen.answered.len(),
            Seen::at(&seen.answered, 0.5),
            Seen::at(&seen.answered, 0.99),
            seen.refused.len()
        )
    };
    let told = format!("without: {}\nwith: {}", told(&without), told(&with));
    assert!(
        without.refused.is_empty() && !with.refused.is_empty(),
        "{told}"
    );
    assert!(with.answered.len() * 2 > without.answered.len(), "{told}");
    let (before, after) = (
        Seen::at(&without.answered, 0.5),
        Seen::at(&with.answered, 0.5),
    );
    assert!(after * 3 < before * 2, "{told}");
    assert!(Seen::at(&with.refused, 0.5) <= after, "{told}");
}
