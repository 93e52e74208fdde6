//! Connections over their life: how many there may be, how long they may take, and what becomes of requests that are cut off.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::harness::process::{Running, audited, file};
use super::harness::raw;
use super::harness::tls::Authority;
use super::harness::{Client, DEADLINE, Lane, Upstream, eventually, eventually_within};

fn lane(upstream: &Upstream, listener: &str) -> Lane {
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', {listener}}}]\nupstream: {}\n",
        upstream.url()
    ))
}

#[test]
fn connections_over_the_maximum_are_closed_and_a_place_is_given_back() {
    let lane = lane(&Upstream::answering("ok"), "limits: {max_connections: 1}");
    let mut first = lane.connect();
    assert_eq!(first.get("/").status, 200);
    assert!(lane.connect().try_get("/").is_none());
    drop(first);
    eventually(|| {
        lane.connect()
            .try_get("/")
            .is_some_and(|reply| reply.status == 200)
    });
}

#[test]
fn who_says_nothing_makes_room_once_there_is_none() {
    for ahead in [
        "",
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    ] {
        let lane = lane(&Upstream::answering("ok"), "limits: {max_connections: 3}");
        let mut silent: Vec<_> = (0..3)
            .map(|_| {
                let mut client = lane.connect();
                client.write(ahead.as_bytes());
                client
            })
            .collect();
        let served = |lane: &Lane| {
            let mut client = lane.connect();
            let reply = client.try_get("/")?;
            (reply.status == 200).then_some(client)
        };
        // None has been silent for long.
        assert!(served(&lane).is_none(), "{ahead:?}");
        // Each of these is idle from then on, but not for as long.
        let mut clients = Vec::new();
        eventually(|| {
            clients.extend(served(&lane));
            clients.len() == 3
        });
        for client in &mut clients {
            assert_eq!(client.get("/").status, 200, "{ahead:?}");
        }
        for client in &mut silent {
            match ahead.split_once(' ') {
                None => assert!(client.closes()),
                Some(("GET", _)) => assert!(client.finish().status == 200 && client.closes()),
                // HTTP/2 says so before.
                Some(_) => {}
            }
        }
    }
}

#[test]
fn a_body_that_is_not_whole_in_time_is_a_408() {
    // One that answers at the head would end the upload.
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let lane = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{request_read: 300ms, stream_idle: 200ms}}}}]\nupstream: http://{}\n",
        upstream.local_addr().unwrap()
    ));
    let mut client = lane.connect();
    client.begin("POST", "/", &["Content-Length: 100"], "");
    // A byte now and then never lets the body stall, and never makes it whole.
    eventually(|| {
        client.write(b"x");
        client.status_within(100) == Some(408)
    });
}

#[test]
fn a_target_in_absolute_form_is_served_when_it_names_the_host() {
    let upstream = Upstream::answering("ok");
    let lane = lane(&upstream, "");
    let mut client = lane.connect();
    let get = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: a.example\r\n\r\n");
    for (target, sent) in [
        ("http://a.example/x?y=1", "/x?y=1"),
        ("HTTP://A.example", "/"),
    ] {
        client.write(get(target).as_bytes());
        assert_eq!(client.finish().status, 200, "{target}");
        let seen = upstream.wait_for_request();
        assert!(
            seen.starts_with(&format!("GET {sent} HTTP/1.1\r\n")),
            "{seen}"
        );
    }
    client.write(get("http://b.example/x").as_bytes());
    assert_eq!(client.finish().status, 400);
}

/// Its client may still send what nobody wants, for up to a second.
#[test]
fn a_request_is_over_with_its_answer_and_holds_nothing_while_its_connection_closes() {
    let upstream = Upstream::replying(|_| {
        "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno".to_owned()
    });
    let by_http2 = Lane::start("listen: 127.0.0.1:0\nroutes: [{reply: {status: 413}}]\n");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstreams:\n\
         \x20 one: {{endpoints: ['{}'], concurrency: {{max: 1, pending: 0}}}}\n\
         \x20 two: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: http2, concurrency: {{max: 1, pending: 0}}}}\n\
         rate_limits: {{slot: {{limit: 1, by: constant, algorithm: concurrency}}, none: {{limit: 0/s, by: constant}}}}\n\
         routes:\n- {{match: {{path: /one}}, upstream: one, rate_limits: [slot]}}\n\
         - {{match: {{path: /two}}, upstream: two, rate_limits: [slot]}}\n\
         - {{match: {{path: /none}}, upstream: one, rate_limits: [none]}}\n",
        upstream.url(),
        by_http2.address
    ));
    let weir = Running::start(config.path());
    for (path, status) in [("/one", 413), ("/two", 413), ("/none", 429)] {
        let count = format!("weir_request_duration_seconds_count{{route=\"{path}\"}}");
        let sum = count.replace("_count", "_sum");
        let told = |series: &str| weir.told(series).unwrap_or_default();
        let mut requests = 0.0;
        // How long the next one waits, and what all requests take, in seconds.
        let mut times = || {
            let before = told(&sum);
            let mut client = weir.client();
            client.begin("POST", path, &["Content-Length: 100000"], "");
            client.write(b"abc");
            let reply = client.finish();
            assert_eq!(
                (reply.status, reply.field("connection")),
                (status, Some("close")),
                "{path}"
            );
            requests += 1.0;
            let begun = weir::clock::now();
            eventually(|| {
                requests += 1.0;
                weir.client().get(path).status == status
            });
            let waited = begun.elapsed().as_secs_f64();
            eventually(|| told(&count) >= requests);
            (waited, told(&sum) - before)
        };
        // Not the second in which that client may go on: each time, where weir waits for it.
        let quick = (0..5).any(|_| {
            let (waited, took) = times();
            waited < 0.7 && took < 0.7
        });
        assert!(quick, "{path}: {}", told(&sum));
    }
}

/// Whose requests weir answers itself, by path, the status of that, and whether it is known before the upstream's turn. The
/// upstream is busy.
const REFUSED: [(&str, u16, bool); 6] = [
    ("/reply", 418, true),
    ("/redirect", 302, true),
    ("/limited", 429, true),
    ("/session", 401, true),
    ("/none", 404, true),
    ("/busy", 503, false),
];

/// With the client whose request keeps the upstream busy.
fn refusing(upstream: &Upstream, timeouts: &str) -> (Lane, Client) {
    let lane = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', {timeouts}}}]\nupstreams: {{app: {{endpoints: ['{}'], concurrency: {{max: 1, pending: 0}}}}}}\n\
         sessions: {{web: {{}}}}\nrate_limits: {{none: {{limit: 0/s, by: constant}}}}\nroutes:\n\
         - {{match: {{path: /reply}}, reply: {{status: 418, body: short}}}}\n\
         - {{match: {{path: /redirect}}, redirect: {{path: /x}}}}\n\
         - {{match: {{path: /limited}}, upstream: app, rate_limits: [none]}}\n\
         - {{match: {{path: /session}}, upstream: app, session: {{use: web}}}}\n\
         - {{match: {{path: /busy}}, upstream: app}}\n",
        upstream.url(),
    ));
    let mut busy = lane.connect();
    busy.begin("GET", "/busy", &[], "");
    upstream.wait_for_request();
    (lane, busy)
}

#[test]
fn a_short_body_that_weir_answers_without_is_read_away() {
    const TEN: &str = "Content-Length: 10";
    const CHUNKED: &str = "Transfer-Encoding: chunked";
    let upstream = Upstream::held();
    let (lane, _busy) = refusing(&upstream, "");
    let most = format!("Content-Length: {}", 64 * 1024);
    let rest = "x".repeat(64 * 1024 - 4);
    for (path, status, at_once) in REFUSED {
        // What comes with the head, and what comes once there is an answer.
        for (fields, with_head, then) in [
            (&[TEN][..], "0123456789", ""),
            (&[TEN, "Expect: 100-continue"], "0123456789", ""),
            (&[TEN], "", "0123456789"),
            (&[TEN], "012", "3456789"),
            (&[&most], "0123", &rest),
            (&[CHUNKED], "5;a=b\r\n01234\r\n0\r\nT: u\r\n\r\n", ""),
        ] {
            if fields == [CHUNKED] && !at_once {
                continue;
            }
            let case = format!("{path} {fields:?} {with_head:?}");
            let mut client = lane.connect();
            let lines = fields.join("\r\n");
            let request = format!("POST {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n{with_head}");
            client.write(request.as_bytes());
            let first = client.finish();
            // The next request comes in one piece with the end of the body.
            let next = format!("{then}GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
            client.write(next.as_bytes());
            for reply in [first, client.finish()] {
                assert_eq!(reply.status, status, "{case}: {reply:?}");
                assert_eq!(reply.field("connection"), None, "{case}: {reply:?}");
            }
        }
    }
    assert!(upstream.requests.try_recv().is_err());
}

#[test]
fn a_body_that_is_long_or_may_never_come_ends_the_connection_that_weir_answers() {
    let upstream = Upstream::held();
    let (lane, _busy) = refusing(&upstream, "");
    for (path, status, at_once) in REFUSED {
        for (fields, is_known_later) in [
            ("Content-Length: 65537\r\n", true),
            ("Content-Length: 10\r\nConnection: close\r\n", true),
            // A client that waits for 100 has got it once the upstream's turn has come.
            ("Content-Length: 10\r\nExpect: 100-continue\r\n", false),
            ("Transfer-Encoding: chunked\r\n", true),
            ("Transfer-Encoding: chunked\r\n\r\n5\r\n0123\r\n0\r\n", true),
        ] {
            if !at_once && !is_known_later {
                continue;
            }
            let request = format!("POST {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
            let reply = raw::send(lane.address, request.as_bytes());
            assert_eq!(reply.status(), Some(status), "{path} {fields}: {reply:?}");
            assert_eq!(
                (reply.replies(), reply.end),
                (1, raw::End::Closed),
                "{reply:?}"
            );
            let head = reply.parts().0;
            assert!(
                head.contains("\r\nConnection: close\r\n"),
                "{path} {fields}: {head}"
            );
        }
    }
}

/// By then it has its answer, which did not say that the connection closes.
#[test]
fn a_short_body_that_does_not_come_in_time_ends_the_connection() {
    let upstream = Upstream::held();
    let (lane, _busy) = refusing(&upstream, "timeouts: {request_read: 200ms}");
    for (path, status, _) in REFUSED {
        let request = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n012");
        let reply = raw::send(lane.address, request.as_bytes());
        assert_eq!(reply.status(), Some(status), "{path}: {reply:?}");
        assert_eq!(
            (reply.replies(), reply.end),
            (1, raw::End::Closed),
            "{reply:?}"
        );
        assert!(
            !reply.text.contains("Connection: close"),
            "{path}: {reply:?}"
        );
    }
}

/// A real process in front of an upstream that accepts and is silent, with an audit.
fn silent() -> (
    TcpListener,
    tempfile::TempDir,
    tempfile::NamedTempFile,
    Running,
) {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{}'], timeout: 60s, connect_timeout: 60s}}}}\n\
         admin: {{address: 127.0.0.1:0}}\nshutdown: {{drain: 200ms}}\naudit: {{sqlite: {{path: '{}'}}}}\n",
        upstream.local_addr().unwrap(),
        folder.path().join("audit.db").display()
    ));
    let running = Running::start(config.path());
    (upstream, folder, config, running)
}

#[test]
fn a_client_that_leaves_is_noticed_and_recorded_as_499() {
    let (upstream, _folder, config, running) = silent();
    let mut client = running.client();
    client.begin("GET", "/left", &[], "");
    let (stream, _) = upstream.accept().unwrap();
    drop(client);
    eventually(|| audited(config.path(), &[]).len() == 1);
    let event = &audited(config.path(), &[])[0];
    assert_eq!(event["path"], "/left");
    assert_eq!(
        (&event["status"], &event["label"]),
        (&499.into(), &"client_left".into())
    );
    drop(stream);
}

/// It sends no more, and yet may read.
#[test]
fn a_body_cut_short_while_its_request_waits_for_a_place_is_a_400() {
    let upstream = Upstream::held();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], concurrency: {{max: 1, pending: 1}}}}}}\n\
         routes: [{{match: {{path: /}}, upstream: app}}]\n",
        upstream.url()
    ));
    let mut first = lane.connect();
    first.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    for body in [
        "Content-Length: 5\r\n\r\nabc",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
    ] {
        let mut stream = TcpStream::connect(lane.address).unwrap();
        let request = format!("POST / HTTP/1.1\r\nHost: x\r\n{body}");
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let reply = raw::read_to_end(&mut stream);
        assert_eq!(reply.status(), Some(400), "{body}: {reply:?}");
    }
    upstream.answer("ok");
    assert_eq!(first.finish().status, 200);
}

#[test]
fn an_old_client_is_told_that_its_connection_stays_open() {
    let upstream = Upstream::answering("ok");
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}']}}}}\nroutes: [{{match: {{path: /}}, upstream: app}}]\n",
        upstream.url()
    ));
    let mut client = lane.connect();
    for (path, status) in [("/", 200), ("/none", 404), ("/", 200)] {
        client.write(format!("GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").as_bytes());
        let reply = client.finish();
        assert_eq!(
            (reply.status, reply.field("connection")),
            (status, Some("keep-alive"))
        );
    }
    client.write(b"GET / HTTP/1.0\r\n\r\n");
    assert_eq!(client.finish().field("connection"), Some("close"));
    assert_eq!(lane.connect().get("/").field("connection"), None);
}

#[test]
fn a_request_that_the_drain_cuts_off_is_audited() {
    let (upstream, _folder, config, mut running) = silent();
    let mut client = running.client();
    client.begin("GET", "/cut", &[], "");
    let (stream, _) = upstream.accept().unwrap();
    running.signal("TERM");
    assert!(running.child.wait().unwrap().success());
    let events = audited(config.path(), &[]);
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(
        (&events[0]["path"], &events[0]["label"]),
        (&"/cut".into(), &"cut_off".into())
    );
    drop(stream);
}

#[test]
fn a_reply_during_the_drain_says_that_the_connection_closes() {
    let upstream = Upstream::held();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\n",
        upstream.url()
    ));
    let mut running = Running::start(config.path());
    let mut client = running.client();
    client.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    running.signal("TERM");
    running.log_until("draining");
    eventually(|| std::net::TcpStream::connect(&running.address).is_err());
    upstream.answer("ok");
    assert_eq!(client.finish().field("connection"), Some("close"));
    assert!(running.child.wait().unwrap().success());
}

#[test]
fn clients_are_told_to_leave_and_served_until_the_drain() {
    let lane = lane(&Upstream::answering("ok"), "");
    let (mut idle, mut busy, mut silent) = (lane.connect(), lane.connect(), lane.connect());
    assert_eq!(idle.get("/").field("connection"), None);
    assert_eq!(busy.get("/").field("connection"), None);
    lane.leave();
    let mut told = busy.get("/");
    eventually(|| {
        if told.field("connection").is_none() {
            told = busy.get("/");
        }
        told.field("connection") == Some("close")
    });
    assert!(busy.try_get("/").is_none());
    let mut newcomer = lane.connect();
    assert!(idle.closes());
    // Who has not asked yet is served, whenever that is.
    for client in [&mut silent, &mut newcomer] {
        let reply = client.get("/");
        assert_eq!(
            (reply.status, reply.field("connection")),
            (200, Some("close"))
        );
    }
    let mut silent = lane.connect();
    assert_eq!(lane.connect().get("/").status, 200);
    lane.drain();
    assert!(silent.closes());
    eventually(|| TcpStream::connect(lane.address).is_err());
}

#[test]
fn who_has_begun_nothing_does_not_hold_the_drain_up() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let tls = format!("tls: {{certificates: [{}]}}", authority.pair("a"));
    let upstream = Upstream::answering("ok");
    for listener in [&*tls, "proxy_protocol: require"] {
        let config = file(&format!(
            "listeners: [{{address: '127.0.0.1:0', {listener}}}]\nupstream: {}\nadmin: {{address: '127.0.0.1:0'}}\n",
            upstream.url()
        ));
        let mut running = Running::start(config.path());
        let silent = running.connect();
        eventually(|| running.metric("weir_connections_open") == 1);
        let began = weir::clock::now();
        running.signal("TERM");
        assert!(running.child.wait().unwrap().success());
        // A handshake may take 5 s, and a PROXY header 10.
        let took = began.elapsed();
        assert!(took < Duration::from_secs(4), "{listener}: {took:?}");
        drop(silent);
    }
}

/// How many files a process may have open from here on.
fn may_open(running: &Running, count: usize) {
    let limit = format!("--nofile={count}:4096");
    let pid = format!("--pid={}", running.child.id());
    let set = Command::new("prlimit").args([pid, limit]).status();
    assert!(set.unwrap().success());
}

#[test]
fn a_connection_that_finds_no_descriptor_waits_and_is_counted() {
    let config = file(
        "listeners: [{address: '127.0.0.1:0'}]\nroutes: [{reply: {status: 200}}]\n\
         admin: {address: '127.0.0.1:0'}\nruntime: {lanes: 1}\n",
    );
    let running = Running::start(config.path());
    let failures = || running.told("weir_accept_failures_total");
    assert_eq!(failures(), Some(0.0));
    // It has more open already, and keeps them.
    may_open(&running, 3);
    let mut client = running.client();
    client.begin("GET", "/", &[], "");
    running.log_until("cannot be accepted");
    may_open(&running, 4_096);
    assert_eq!(client.finish().status, 200);
    assert!(failures() > Some(0.0));
}

#[test]
fn connections_leave_descriptors_to_the_admin_port() {
    let config = file(
        "listeners: [{address: '127.0.0.1:0'}]\nroutes: [{reply: {status: 200}}]\n\
         admin: {address: '127.0.0.1:0'}\nruntime: {lanes: 1}\n",
    );
    let running = Running::start_after("ulimit -n 80", config.path(), &[]);
    let held: Vec<_> = (0..160).map(|_| running.connect()).collect();
    running.log_until("cannot be accepted");
    // Each over a connection of its own, while clients take whatever they get.
    for _ in 0..5 {
        assert_eq!(running.admin().get("/live").status, 200);
        assert!(running.told("weir_accept_failures_total") > Some(0.0));
        let (open, most) = (
            running.told("process_open_fds"),
            running.told("process_max_fds"),
        );
        assert_eq!(most, Some(80.0));
        assert!(open > Some(72.0), "nine tenths raise the alarm: {open:?}");
    }
    drop(held);
    eventually(|| running.metric("weir_connections_open") == 0);
    assert_eq!(running.client().get("/").status, 200);
}

/// How often endpoints of `app` were asked how they are with this result.
fn checks(running: &Running, result: &str) -> u64 {
    let of = format!("{{upstream=\"app\",result=\"{result}\"}}");
    running.metric(&format!("weir_upstream_health_checks_total{of}"))
}

#[test]
fn connects_that_wait_leave_descriptors_to_the_admin_port_and_to_checks() {
    let silent = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    silent.bind(&any.into()).unwrap();
    silent.listen(0).unwrap();
    let address = silent.local_addr().unwrap().as_socket().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        queued.push(stream);
    }
    let upstream = Upstream::answering("ok");
    for endpoint in [address.to_string(), format!("localhost:{}", address.port())] {
        let config = file(&format!(
            "listeners: [{{address: '127.0.0.1:0'}}]\nadmin: {{address: '127.0.0.1:0'}}\nruntime: {{lanes: 1}}\n\
             upstreams:\n  app: {{endpoints: ['{}'], health: {{path: /, interval: 20ms, unhealthy_after: 1}}}}\n  \
             silent: {{endpoints: ['http://{endpoint}'], connect_timeout: 60s}}\n\
             routes: [{{match: {{path: /app}}, upstream: app}}, {{upstream: silent}}]\n",
            upstream.url()
        ));
        let running = Running::start_after("ulimit -n 80", config.path(), &[]);
        let mut clients = Vec::new();
        while running.told("process_open_fds") < Some(68.0) {
            let seen = clients.len() as u64 + 1;
            clients.push(running.client());
            eventually(|| running.metric("weir_connections_open") == seen);
        }
        for client in &mut clients {
            client.begin("GET", "/", &[], "");
        }
        running.log_until("endpoint cannot be reached");
        for _ in 0..5 {
            assert_eq!(running.admin().get("/live").status, 200);
        }
        let passed = checks(&running, "passed");
        eventually(|| checks(&running, "passed") > passed + 1);
        assert_eq!(checks(&running, "failed"), 0);
    }
}

#[test]
fn what_weir_lacks_makes_no_endpoint_unhealthy() {
    let upstream = Upstream::answering("ok");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         upstreams: {{app: {{endpoints: ['{}'], health: {{path: /, interval: 20ms, unhealthy_after: 1}}}}}}\n\
         routes: [{{match: {{path: /here}}, reply: {{status: 200}}}}, {{upstream: app}}]\n",
        upstream.url()
    ));
    let running = Running::start(config.path());
    eventually(|| checks(&running, "passed") > 0);
    let mut client = running.client();
    assert_eq!(client.get("/here").status, 200);
    // It has more open already, and keeps them; some ten checks find none.
    may_open(&running, 3);
    let began = weir::clock::now();
    while began.elapsed() < Duration::from_millis(200) {
        assert_eq!(client.get("/").status, 502);
    }
    may_open(&running, 4_096);
    let passed = checks(&running, "passed");
    eventually(|| checks(&running, "passed") > passed);
    assert_eq!(checks(&running, "failed"), 0);
}

#[test]
fn what_weir_lacks_opens_no_breaker_and_ejects_no_endpoint() {
    let upstream = Upstream::answering("ok");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         circuit_breakers: {{b: {{consecutive_failures: 1, open_for: 1h}}}}\n\
         upstreams: {{app: {{endpoints: ['{}'], circuit_breaker: b, panic_threshold: 0%,\n  \
         outlier_detection: {{consecutive_5xx: 1, max_ejection_percent: 100, base_ejection_time: 1h}}}}}}\n\
         routes: [{{match: {{path: /here}}, reply: {{status: 200}}}}, {{upstream: app}}]\n",
        upstream.url()
    ));
    let running = Running::start(config.path());
    let mut client = running.client();
    assert_eq!(client.get("/here").status, 200);
    // It has more open already, and keeps them.
    may_open(&running, 3);
    for _ in 0..3 {
        assert_eq!(client.get("/").status, 502);
    }
    may_open(&running, 4_096);
    assert_eq!(client.get("/").status, 200);
}

#[test]
fn a_second_weir_on_the_same_port_says_that_it_is_taken() {
    let upstream = Upstream::answering("ok");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\n",
        upstream.url()
    ));
    let running = Running::start(config.path());
    let second = file(&format!(
        "listen: {}\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\n",
        running.address,
        upstream.url()
    ));
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(second.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains(&format!("cannot listen on {}", running.address)),
        "{said}"
    );
}

#[test]
fn a_second_signal_ends_the_drain_at_once() {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    for (delay, drain) in [("0s", "2m"), ("2m", "0s")] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("in.sock");
        let config = file(&format!(
            "listeners: [{{address: '127.0.0.1:0'}}, {{address: 'unix:{}'}}]\nupstream: http://{}\nadmin: {{address: 127.0.0.1:0}}\n\
             shutdown: {{propagation_delay: {delay}, drain: {drain}}}\naudit: {{sqlite: {{path: '{}'}}}}\n",
            socket.display(),
            upstream.local_addr().unwrap(),
            folder.path().join("audit.db").display()
        ));
        let mut running = Running::start(config.path());
        let mut client = Client::to(running.address.trim_end_matches(','));
        client.begin("GET", "/cut", &[], "");
        let _held = upstream.accept().unwrap();
        running.signal("TERM");
        running.log_until("draining");
        let told_again = weir::clock::now();
        running.signal("INT");
        assert!(running.child.wait().unwrap().success());
        let took = told_again.elapsed();
        assert!(took < Duration::from_secs(10), "{delay} {drain}: {took:?}");
        assert!(!socket.exists());
        let events = audited(config.path(), &[]);
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!(events[0]["label"], "cut_off");
    }
}

#[test]
fn everything_that_the_drain_cuts_off_is_audited() {
    let (upstream, _folder, config, mut running) = silent();
    let many = 300;
    // Accepted as they come: more than a backlog holds would never be here.
    let accepting = thread::spawn(move || -> Vec<_> {
        (0..many).map(|_| upstream.accept().unwrap()).collect()
    });
    let clients: Vec<_> = (0..many)
        .map(|_| {
            let mut client = running.client();
            client.begin("GET", "/cut", &[], "");
            client
        })
        .collect();
    let streams = accepting.join().unwrap();
    running.signal("TERM");
    assert!(running.child.wait().unwrap().success());
    let output = audited(config.path(), &["--limit", "1000"]);
    assert_eq!(output.len(), many);
    assert!(output.iter().all(|event| event["status"] == 503));
    drop((clients, streams));
}

/// The answer is no use to a client whose upload is cut: it sees a reset (RFC 9112 section 9.6).
#[test]
fn who_still_sends_behind_an_answer_is_heard_out() {
    let upstream = Upstream::held();
    let (lane, _busy) = refusing(&upstream, "");
    let begin = || {
        let mut stream = TcpStream::connect(lane.address).unwrap();
        let head = "POST /reply HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream
    };
    let mut stream = begin();
    for piece in 0..50 {
        thread::sleep(Duration::from_millis(50));
        let sent = stream.write_all(&[b'x'; 200_000]);
        assert!(sent.is_ok(), "{piece}: {sent:?}");
    }
    let reply = raw::read_to_end(&mut stream);
    assert_eq!(reply.status(), Some(418), "{reply:?}");
    assert_eq!(reply.end, raw::End::Closed, "{reply:?}");
    // A drain does not wait for that.
    let mut stream = begin();
    assert_eq!(raw::read_to_end(&mut stream).status(), Some(418));
    lane.drain();
    eventually_within(Duration::from_secs(4), || stream.write_all(b"x").is_err());
}

/// Old clients put one behind a body, and servers are to ignore it (RFC 9112 section 2.2).
#[test]
fn an_empty_line_behind_a_body_begins_no_request() {
    let upstream = Upstream::answering("ok");
    let lane = lane(&upstream, "timeouts: {header_read: 200ms, keep_alive: 5s}");
    let mut client = lane.connect();
    let post = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na\r\n";
    for _ in 0..2 {
        client.write(post.as_bytes());
        assert_eq!(client.finish().status, 200);
        assert_eq!(client.status_within(500), None);
    }
    assert_eq!(client.try_get("/").map(|reply| reply.status), Some(200));
    // A second one is a request that does not come.
    client.write(b"\r\n\r\n");
    assert_eq!(client.status_within(5_000), Some(408));
}

/// To close on bytes that were not read is to reset, and that takes the rest of the answer with it (RFC 9112 section 9.6). nginx and
/// Envoy read them away.
#[test]
fn what_stands_behind_the_last_request_cuts_off_no_answer() {
    const MUCH: usize = 1 << 20;
    let (close, post) = ("Connection: close\r\n", "Content-Length: 1\r\n\r\na");
    for (request, behind) in [
        (
            format!("POST / HTTP/1.1\r\nHost: x\r\n{close}{post}"),
            "\r\n",
        ),
        (format!("POST / HTTP/1.0\r\n{post}"), "\r\n"),
        (
            format!("GET / HTTP/1.1\r\nHost: x\r\n{close}\r\n"),
            "GET /next HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
    ] {
        let (came, asked) = mpsc::channel();
        let (sent, all_sent) = mpsc::channel::<()>();
        let ways = Mutex::new((came, all_sent));
        let address = raw::scripted(move |mut stream| {
            raw::read_head(&mut stream);
            let ways = ways.lock().unwrap();
            ways.0.send(()).unwrap();
            ways.1.recv_timeout(DEADLINE).unwrap();
            let _ = stream.write_all(super::harness::ok(&"x".repeat(MUCH)).as_bytes());
            let _ = stream.read(&mut [0]);
        });
        let lane = Lane::start(&format!(
            "listen: 127.0.0.1:0\nupstream: http://{address}\n"
        ));
        let mut stream = TcpStream::connect(lane.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        asked.recv_timeout(DEADLINE).unwrap();
        stream.write_all(behind.as_bytes()).unwrap();
        sent.send(()).unwrap();
        let reply = raw::read_to_end(&mut stream);
        assert_eq!(reply.end, raw::End::Closed, "{request}");
        assert_eq!(reply.parts().1.len(), MUCH, "{request}");
    }
}

/// It may still be sending, and has not read its answer.
#[test]
fn who_has_asked_ahead_is_heard_out_behind_the_last_answer() {
    let upstream = Upstream::answering("ok");
    let lane = lane(&upstream, "");
    let next = "GET /next HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let mut stream = TcpStream::connect(lane.address).unwrap();
    stream
        .write_all((last.to_owned() + next).as_bytes())
        .unwrap();
    let reply = raw::read_to_end(&mut stream);
    assert_eq!((reply.end, reply.replies()), (raw::End::Closed, 1));
    // The first would be answered by a reset, and the second fail.
    for _ in 0..2 {
        assert!(stream.write_all(next.as_bytes()).is_ok());
    }
}

/// The answer has failed: there is nothing of it that a reset could take away.
#[test]
fn who_asks_ahead_and_never_reads_is_closed_on_at_once() {
    let body = "x".repeat(8 << 20);
    let lane = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: 300ms}}}}]\n\
         routes: [{{match: {{path: /long}}, reply: {{body: {body}}}}}]\n"
    ));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&lane.address.into()).unwrap();
    let mut deaf = TcpStream::from(socket);
    let asked = "GET /long HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
    deaf.write_all(asked.as_bytes()).unwrap();
    // One that is heard out may go on writing for as long.
    eventually_within(Duration::from_secs(3), || deaf.write_all(b"x").is_err());
}

/// As Tomcat answers. Some clients take a line without one for malformed.
#[test]
fn a_status_without_a_reason_gets_its_usual_one() {
    for (line, told) in [
        ("404 ", "404 Not Found"),
        ("404", "404 Not Found"),
        ("404 Gone Fishing", "404 Gone Fishing"),
        ("599 ", "599 "),
    ] {
        let upstream =
            Upstream::replying(move |_| format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n"));
        let lane = lane(&upstream, "");
        let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let reply = raw::send(lane.address, request);
        let expected = format!("HTTP/1.1 {told}\r\n");
        assert!(reply.text.starts_with(&expected), "{line:?}: {reply:?}");
    }
}

/// nginx refuses an empty Host.
#[test]
fn a_request_without_a_host_is_for_its_endpoint() {
    let upstream = Upstream::answering("ok");
    let lane = lane(&upstream, "");
    let host = upstream.url().replace("http://", "\r\nHost: ") + "\r\n";
    for request in [
        "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "GET / HTTP/1.1\r\nHost:\r\n\r\n",
    ] {
        let mut client = lane.connect();
        client.write(request.as_bytes());
        assert_eq!(client.finish().status, 200);
        let sent = upstream.wait_for_request();
        assert!(sent.contains(&host), "{sent}");
        assert_eq!(sent.matches("\r\nHost:").count(), 1, "{sent}");
        assert!(!sent.contains("X-Forwarded-Host"), "{sent}");
    }
}

/// RFC 9110 section 9.2.2. The upstream closes as the request comes, which nobody can know ahead.
#[test]
fn what_is_idempotent_and_has_no_body_is_asked_again_where_an_idle_connection_was_stale() {
    for (method, body, status) in [
        ("GET", "", 200),
        ("DELETE", "", 200),
        ("PUT", "", 200),
        ("POST", "", 502),
        ("PUT", "a", 502),
        ("PATCH", "", 502),
    ] {
        let address = raw::scripted(|mut stream| {
            if raw::read_head(&mut stream).is_some() {
                let _ = stream.write_all(super::harness::ok("first").as_bytes());
                raw::read_head(&mut stream);
            }
        });
        let lane = Lane::start(&format!(
            "listen: 127.0.0.1:0\nupstream: http://{address}\n"
        ));
        let mut client = lane.connect();
        assert_eq!(client.get("/").status, 200);
        let reply = client.send(method, "/", &[], body);
        assert_eq!(reply.status, status, "{method} {body:?}");
    }
}

/// Of the connection from `local` to `remote`, which is open, where each is a port or any: which timer of the kernel's runs, and for how
/// many hundredths of a second yet (`Documentation/networking/proc_net_tcp.rst`).
fn timer(local: Option<u16>, remote: Option<u16>) -> Option<(u8, u64)> {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().skip(1).find_map(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let port =
            |column: &str| u16::from_str_radix(column.split_once(':').unwrap().1, 16).unwrap();
        let is = |wanted: Option<u16>, column| wanted.is_none_or(|wanted| wanted == port(column));
        let (timer, left) = columns[5].split_once(':').unwrap();
        let is_it = columns[3] == "01" && is(local, columns[1]) && is(remote, columns[2]);
        is_it.then(|| {
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            (number(timer) as u8, number(left))
        })
    })
}

/// Else one that is gone without a word would be kept for as long as a stream may be silent, and middleboxes would forget it.
#[test]
fn the_kernel_asks_silent_ends_whether_they_are_there() {
    const KEEPALIVE: u8 = 2;
    let upstream = Upstream::answering("ok");
    let lane = lane(&upstream, "");
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    let port = |url: &str| url.rsplit(':').next().unwrap().parse().unwrap();
    let upstream = port(&upstream.url());
    for (local, remote) in [(Some(lane.address.port()), None), (None, Some(upstream))] {
        // While a segment is not acknowledged yet, it is the timer of that.
        eventually(|| matches!(timer(local, remote), Some((KEEPALIVE, 1..=6_000))));
    }
}
