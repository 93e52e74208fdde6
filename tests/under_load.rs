//! Reloads and the drain of a real process, while clients ask without a pause.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::fs;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use harness::process::{Running, file};
use harness::{Client, Upstream, eventually, ok};

const CLIENTS: usize = 4;

/// Ends the clients' loops, a failed step of the test's notwithstanding.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn config(upstream: &Upstream) -> String {
    format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\nshutdown: {{propagation_delay: 1s}}\n",
        upstream.url()
    )
}

#[test]
fn reloads_drop_no_connection_and_fail_no_request() {
    let upstreams = ["one", "two"].map(Upstream::answering);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.yaml");
    let place = |round: usize| {
        let fresh = folder.path().join("fresh");
        let limit = format!("rate_limit: {}/s by client.ip\n", 1_000_000 + round);
        fs::write(&fresh, config(&upstreams[round % 2]) + &limit).unwrap();
        fs::rename(&fresh, &path).unwrap();
    };
    place(0);
    let running = Running::start(&path);
    let (address, over) = (running.address.clone(), AtomicBool::new(false));
    let bodies = thread::scope(|scope| {
        let ask = || {
            let mut client = Client::to(&address);
            let mut bodies = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let reply = client.get("/");
                assert_eq!(reply.status, 200, "{reply:?}");
                bodies.push(reply.body);
            }
            bodies
        };
        let clients = [(); CLIENTS].map(|()| scope.spawn(ask));
        let stop = Stop(&over);
        // Once by the change alone, then many times by the signal.
        place(1);
        running.log_until("configuration reloaded");
        for round in 2..20 {
            place(round);
            running.signal("HUP");
            running.log_until("configuration reloaded");
        }
        drop(stop);
        clients.map(|client| client.join().unwrap())
    });
    for bodies in bodies {
        for upstream in ["one", "two"] {
            let served = bodies.iter().any(|body| body == upstream);
            assert!(served, "{upstream} served none of {}", bodies.len());
        }
    }
    let metrics = running.admin().get("/metrics").body;
    let connections = format!("weir_connections_total {CLIENTS}\n");
    assert!(metrics.contains(&connections), "{metrics}");
}

#[test]
fn the_drain_answers_whole_what_was_begun_and_takes_nothing_more() {
    let body = "x".repeat(64 * 1024);
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let whole = ok(&body);
    let upstream = Upstream::replying(move |head| {
        if head.starts_with("GET /held ") {
            let _ = released.lock().unwrap().recv();
        } else {
            // The time that an app takes, so that most requests are in flight when the drain begins.
            thread::sleep(Duration::from_millis(5));
        }
        whole.clone()
    });
    let config = file(&config(&upstream));
    let mut running = Running::start(config.path());
    let (address, over) = (running.address.clone(), AtomicBool::new(false));
    let (answered, mut begun) = (AtomicUsize::new(0), 0);
    assert_eq!(running.admin().get("/ready").status, 200);

    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut client = Client::to(&address);
                while !over.load(Ordering::Relaxed)
                    && let Some(reply) = client.try_get("/")
                {
                    assert_eq!((reply.status, reply.body.len()), (200, body.len()));
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _stop = Stop(&over);
        eventually(|| answered.load(Ordering::Relaxed) > 10 * CLIENTS);
        running.signal("TERM");
        eventually(|| running.admin().get("/ready").status == 503);
        // Others learn with a delay that it is unready, and until then still come.
        let mut late = running.client();
        assert_eq!(late.get("/").body, body);
        late.begin("GET", "/held", &[], "");
        begun += 1;
        while !upstream.wait_for_request().starts_with("GET /held ") {
            begun += 1;
        }
        eventually(|| TcpStream::connect(&address).is_err());
        assert_eq!(running.child.try_wait().unwrap(), None, "one is in flight");
        assert_eq!(running.admin().get("/ready").status, 503);
        release.send(()).unwrap();
        assert_eq!(late.finish().body, body);
    });
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    begun += upstream.requests.try_iter().count();
    // The two that came late beside those of the clients.
    assert_eq!(answered.load(Ordering::Relaxed) + 2, begun);
}
