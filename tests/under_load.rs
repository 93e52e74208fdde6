//! Reloads, the drain and the replacement of a real process, while clients ask without a pause.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use h2::Reason;
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
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\nshutdown: {{propagation_delay: 5s}}\n",
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
    let connections = running.metric("weir_connections_total");
    assert_eq!(connections, CLIENTS as u64);
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

/// What takes over: at the ports of `before`, with so many lanes and the audit of all, delivered so. A SIGTERM would have it wait for `delay`.
fn successor(
    folder: &Path,
    upstream: &Upstream,
    before: Option<&Running>,
    lanes: usize,
    delay: &str,
    delivery: &str,
) -> Running {
    let any = || "127.0.0.1:0".to_owned();
    let [address, admin, metrics] = match before {
        Some(before) => [
            before.address.clone(),
            before.admin.clone(),
            before.metrics.clone().unwrap(),
        ],
        None => [any(), any(), any()],
    };
    let text = format!(
        "listen: {address}\nupstream: {}\nadmin: {{address: '{admin}'}}\nmetrics: {{address: '{metrics}'}}\n\
         audit: {{delivery: {delivery}, sqlite: {{path: '{}'}}}}\nruntime: {{lanes: {lanes}}}\nshutdown: {{propagation_delay: {delay}}}\n",
        upstream.url(),
        folder.join("audit.db").display()
    );
    // Each has a file of its own, as a new version has: the old one is not to read it.
    let path = folder.join(format!(
        "{lanes}-{}.yaml",
        before.map_or(0, |before| before.child.id())
    ));
    fs::write(&path, text).unwrap();
    Running::taking_over(&path)
}

/// One request on a connection of its own; an error where anything about it fails.
fn once(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(harness::DEADLINE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    Ok(reply)
}

/// Asks by HTTP/2, and connects anew once it has been told farewell; a request that weir has taken is not sent again.
fn by_http2(address: &str, over: &AtomicBool, answered: &AtomicUsize) {
    harness::runtime().block_on(async {
        while !over.load(Ordering::Relaxed) {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let (requests, connection) = h2::client::handshake(stream).await.unwrap();
            let connection = tokio::spawn(connection);
            while !over.load(Ordering::Relaxed)
                && let Ok(mut requests) = requests.clone().ready().await
            {
                let request = http::Request::get("http://weir/").body(()).unwrap();
                let Ok((response, _)) = requests.send_request(request, true) else {
                    break;
                };
                let response = match response.await {
                    Ok(response) => response,
                    // It had not left this process when the farewell came, and the client knows: RFC 9113 section 6.8.
                    Err(error)
                        if error.is_go_away() && error.reason() == Some(Reason::NO_ERROR) =>
                    {
                        break;
                    }
                    Err(error) => panic!("{error}"),
                };
                assert_eq!(response.status(), 200);
                let mut body = response.into_body();
                assert_eq!(&*body.data().await.unwrap().unwrap(), b"served");
                answered.fetch_add(1, Ordering::Relaxed);
            }
            drop(requests);
            let _ = connection.await;
        }
    });
}

#[test]
fn ten_processes_take_over_one_after_the_other_and_no_client_notices() {
    take_over("best_effort");
}

#[test]
fn so_they_do_where_each_event_must_be_safe() {
    take_over("guaranteed");
}

fn take_over(delivery: &str) {
    let upstream = Upstream::answering("served");
    let folder = tempfile::tempdir().unwrap();
    let mut running = successor(folder.path(), &upstream, None, 2, "1m", delivery);
    let (address, admin, over) = (
        running.address.clone(),
        running.admin.clone(),
        AtomicBool::new(false),
    );
    let (once_each, kept) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (told, looks, streams) = (
        AtomicUsize::new(0),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let reply = once(&address).unwrap();
                    assert!(
                        reply.starts_with("HTTP/1.1 200 ") && reply.ends_with("served"),
                        "{reply:?}"
                    );
                    once_each.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut client = Client::to(&address);
                while !over.load(Ordering::Relaxed) {
                    // Nothing is sent again: a connection that closes unannounced fails the test.
                    let reply = client.get("/");
                    assert_eq!((reply.status, &*reply.body), (200, "served"), "{reply:?}");
                    kept.fetch_add(1, Ordering::Relaxed);
                    if reply.field("connection") == Some("close") {
                        told.fetch_add(1, Ordering::Relaxed);
                        client = Client::to(&address);
                    }
                }
            });
        }
        scope.spawn(|| by_http2(&address, &over, &streams));
        // Who looks at health sees one that is ready, at any time.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let mut look = Client::to(&admin);
                assert_eq!(
                    look.send("GET", "/ready", &["Connection: close"], "")
                        .status,
                    200
                );
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _stop = Stop(&over);
        for round in 0..10 {
            let enough = [&once_each, &kept].map(|count| count.load(Ordering::Relaxed) + 50);
            eventually(|| [&once_each, &kept].map(|count| count.load(Ordering::Relaxed)) >= enough);
            let delay = if round < 9 { "1m" } else { "0s" };
            // More lanes than sockets, as many, and fewer.
            let next = successor(
                folder.path(),
                &upstream,
                Some(&running),
                1 + round % 3,
                delay,
                delivery,
            );
            assert_eq!((&next.address, &next.admin), (&address, &admin));
            assert_eq!(running.child.wait().unwrap().code(), Some(0));
            running = next;
        }
    });
    let [once_each, kept, told, looks, streams] =
        [once_each, kept, told, looks, streams].map(AtomicUsize::into_inner);
    assert!(
        told >= 10 && looks > 10 && streams > 10,
        "{told} told to close, {looks} looks, {streams} streams"
    );
    running.signal("TERM");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    let requests = upstream.requests.try_iter().count();
    assert_eq!(requests, once_each + kept + streams);
    let file = folder.path().join("2-0.yaml");
    let audit = |command: &str| {
        let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
        let weir = weir.args(["audit", "-c", file.to_str().unwrap(), command]);
        let output = weir.output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{said}");
        said
    };
    let events = format!("{requests} events");
    let said = audit("verify");
    assert!(said.contains(&events), "{said}, and not {events}");
}

#[test]
fn who_cannot_take_over_leaves_the_one_that_runs_as_it_is() {
    let upstream = Upstream::answering("served");
    let folder = tempfile::tempdir().unwrap();
    let mut running = successor(folder.path(), &upstream, None, 2, "1m", "best_effort");
    let text = format!(
        "listeners: [{{address: '{}'}}, {{address: '192.0.2.1:1'}}]\nupstream: {}\nadmin: {{address: '{}'}}\n",
        running.address,
        upstream.url(),
        running.admin
    );
    let config = file(&text);
    let weir = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        let output = command.args(arguments).arg(config.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    // It ends once it has the sockets: the address of its own is nobody's here.
    let said = weir(&["run", "--take-over", "-c"]);
    assert!(said.contains("cannot listen on 192.0.2.1:1"), "{said}");
    running.log_until("going on");
    // Started twice by mistake.
    let said = weir(&["run", "-c"]);
    assert!(
        said.contains("cannot listen on") && said.contains("--take-over"),
        "{said}"
    );
    assert_eq!(running.client().get("/").body, "served");
    assert_eq!(running.child.try_wait().unwrap(), None);
    let next = successor(
        folder.path(),
        &upstream,
        Some(&running),
        2,
        "1m",
        "best_effort",
    );
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    assert_eq!(next.client().get("/").body, "served");
}
