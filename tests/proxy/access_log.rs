//! The access log on standard output, over sockets and a real process.

use std::io::{BufRead, BufReader, Read, Write as _};
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use super::harness::process::{Running, audited, file, signal};
use super::harness::raw::{read_head, scripted};
use super::harness::{Client, DEADLINE, Upstream, eventually, metrics};
use serde_json::Value;

/// weir with this `telemetry`, a limit on /limited and no upstream behind /broken.
fn weir(telemetry: &str, upstream: &Upstream) -> Running {
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\ntelemetry: {{{telemetry}}}\n\
         upstreams: {{app: {{endpoints: ['{}']}}, gone: {{endpoints: ['http://127.0.0.1:1']}},\n\
         \x20 guarded: {{endpoints: ['http://127.0.0.1:1'], circuit_breaker: one}}}}\n\
         circuit_breakers: {{one: {{consecutive_failures: 1, open_for: 1h, fallback: {{body: busy}}}}}}\n\
         rate_limits: {{none: {{limit: 0/s, by: constant}}}}\n\
         routes:\n  - {{match: {{path: /limited}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /broken}}, upstream: gone}}\n\
         \x20 - {{match: {{path: /guarded}}, upstream: guarded}}\n  - {{upstream: app}}\n",
        upstream.url()
    ));
    Running::start(config.path())
}

/// The next line, as JSON.
fn next(lines: &Receiver<String>) -> Value {
    serde_json::from_str(&lines.recv_timeout(DEADLINE).unwrap()).unwrap()
}

#[test]
fn each_request_is_a_line_that_says_what_became_of_it() {
    let upstream = Upstream::answering("hello");
    let mut weir = weir("access_log: {format: json}", &upstream);
    let lines = weir.output();
    let mut client = weir.client();
    let fields = ["User-Agent: test/1", "Host: shop.example.com"];
    client.send("GET", "/a//b?x=1&token=secret", &fields, "");
    let line = next(&lines);
    for (key, value) in [
        ("method", "GET"),
        ("host", "shop.example.com"),
        ("path", "/a/b"),
        ("query", "x=1&token=***"),
        ("client", "127.0.0.1"),
        ("route", "/*"),
        ("upstream", "app"),
        ("user_agent", "test/1"),
    ] {
        assert_eq!(line[key], value, "{line}");
    }
    assert_eq!(
        (&line["status"], &line["bytes_out"]),
        (&200.into(), &5.into())
    );
    assert!(line.get("label").is_none(), "{line}");
    let refused = client.get("/limited");
    let line = next(&lines);
    assert_eq!(
        (&line["status"], &line["label"], &line["bytes_out"]),
        (
            &429.into(),
            &"quota_exceeded".into(),
            &refused.body.len().into()
        )
    );
    let refused = client.get("/broken");
    let line = next(&lines);
    assert_eq!(
        (&line["label"], &line["bytes_out"]),
        (&"connect_failed".into(), &refused.body.len().into())
    );
    client.begin("HEAD", "/limited", &[], "");
    assert_eq!(client.finish_head().status, 429);
    assert_eq!(next(&lines)["bytes_out"], 0);
    // The second is refused by the breaker, which has words of its own.
    for (status, body) in [(502, None), (503, Some("busy"))] {
        let reply = client.get("/guarded");
        assert_eq!(reply.status, status);
        assert!(body.is_none_or(|body| reply.body == body), "{reply:?}");
        assert_eq!(next(&lines)["bytes_out"], reply.body.len());
    }
    weir.client().write(b"nonsense\r\n\r\n");
    let line = next(&lines);
    assert_eq!(
        (&line["status"], &line["label"]),
        (&400.into(), &"bad_head".into())
    );
    eventually(|| weir.metric("weir_access_log_lines_total{result=\"written\"}") == 7);
}

/// Else nobody could tell which of a route's limits it was.
#[test]
fn a_line_names_the_limit_that_refuses_unasked() {
    let check = |redis: &str, path: &str, label: &str, said: &[&str]| {
        let upstream = Upstream::answering("");
        let config = file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\ntelemetry: {{access_log: {{format: json}}}}\n{redis}\
             upstreams: {{app: {{endpoints: ['{}']}}}}\nrate_limits:\n  keyed: {{limit: 9/h, by: 'header:t', if_missing: deny}}\n\
             \x20 shared: {{limit: 9/h, by: constant, accuracy: strict, on_redis_loss: deny}}\n\
             routes:\n  - {{match: {{path: /keyed}}, upstream: app, rate_limits: [keyed, shared]}}\n\
             \x20 - {{upstream: app, rate_limits: [shared]}}\n",
            upstream.url()
        ));
        let mut weir = Running::start_as("proxy", config.path(), &[]);
        let lines = weir.output();
        weir.client().get(path);
        let line = next(&lines);
        assert_eq!(
            (&line["label"], &line["limits"]),
            (&label.into(), &said.into()),
            "{line}"
        );
    };
    let gone = "redis: {urls: ['redis://127.0.0.1:1']}\n";
    for redis in ["", gone] {
        check(redis, "/keyed", "quota_exceeded", &["keyed: missing_key"]);
    }
    check(gone, "/", "limit_unknown", &["shared: redis_lost"]);
}

#[test]
fn what_sampling_leaves_out_has_no_line_but_errors_and_refusals_have() {
    let upstream = Upstream::answering("hello");
    let mut weir = weir("access_log: {format: json, sample: 0%}", &upstream);
    let lines = weir.output();
    for path in ["/a", "/limited", "/b", "/broken", "/c"] {
        weir.client().get(path);
    }
    // Each lane hands on its own lines, and who takes which connection is chance.
    let mut paths = [(); 2].map(|()| next(&lines)["path"].to_string());
    paths.sort();
    assert_eq!(paths, ["\"/broken\"", "\"/limited\""]);
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());
    // Nothing else came until the end.
    assert!(lines.recv_timeout(DEADLINE).is_err());
}

#[test]
fn a_share_of_requests_is_a_share_of_lines() {
    let upstream = Upstream::answering("x");
    let mut weir = weir(
        "access_log: {format: pretty, sample: 10%, always: []}",
        &upstream,
    );
    let lines = weir.output();
    let mut client = weir.client();
    for _ in 0..2_000 {
        client.get("/a");
    }
    client.get("/limited");
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());
    let found = lines.iter().count();
    // Within ten standard deviations, some 13 each.
    assert!((66..=334).contains(&found), "{found}");
}

#[test]
fn the_last_lines_are_out_before_the_process_ends() {
    let upstream = Upstream::answering("x");
    let mut weir = weir("access_log: {}", &upstream);
    let mut stdout = weir.child.stdout.take().unwrap();
    let mut client = weir.client();
    for _ in 0..50 {
        client.get("/a");
    }
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().count(), 50, "{text}");
    assert!(text.contains("\"GET test/a\" 200 - 1B "), "{text}");
}

#[test]
fn standard_output_that_no_one_reads_costs_lines_and_no_request() {
    let upstream = Upstream::answering("x");
    let mut weir = weir("access_log: {format: json}", &upstream);
    // A pipe holds 64 KiB, and the queue 4 MiB.
    let unread = weir.child.stdout.take().unwrap();
    let mut client = weir.client();
    let agent = format!("User-Agent: {}", "x".repeat(4_000));
    let dropped = "weir_access_log_lines_total{result=\"dropped\"}";
    eventually(|| {
        for _ in 0..200 {
            assert_eq!(client.send("GET", "/a", &[&agent], "").status, 200);
        }
        weir.metric(dropped) > 0
    });
    // Read again, it goes on.
    weir.child.stdout = Some(unread);
    let lines = weir.output();
    lines.recv_timeout(DEADLINE).unwrap();
    eventually(|| {
        let _ = client.get("/last");
        lines.try_iter().any(|line| line.contains("\"/last\""))
    });
}

#[test]
fn one_pipe_for_all_that_no_one_reads_stops_nothing() {
    let upstream = Upstream::answering("x");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\ntelemetry: {{access_log: {{}}}}\n\
         upstreams: {{app: {{endpoints: ['{}']}}, gone: {{endpoints: ['http://127.0.0.1:1']}}}}\n\
         routes: [{{match: {{path: /gone}}, upstream: gone}}, {{upstream: app}}]\n",
        upstream.url()
    ));
    let (said, out) = std::io::pipe().unwrap();
    let mut weir = Killed(
        Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["run", "-c"])
            .arg(config.path())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap(),
    );
    let mut said = BufReader::new(said);
    let mut line = String::new();
    while !line.contains("listening") {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0);
    }
    let field = |name: &str| line.split(name).nth(1)?.split_whitespace().next();
    let mut client = Client::to(field("addresses=").unwrap());
    let mut admin = Client::to(field("admin=").unwrap());
    // The pipe holds 64 KiB.
    let agent = format!("User-Agent: {}", "x".repeat(2_000));
    for _ in 0..100 {
        assert_eq!(client.send("GET", "/a", &[&agent], "").status, 200);
    }
    for _ in 0..20 {
        signal(&weir.0, "USR1");
        assert_eq!(client.get("/gone").status, 502);
        assert_eq!(admin.get("/live").status, 200);
        assert_eq!(client.get("/a").status, 200);
    }
    // The log's queue holds 1 MiB, and so does what is being written.
    let long = format!("/v1/{}", "x".repeat(60_000));
    eventually(|| {
        let called = admin.send("POST", &long, &["Host: 127.0.0.1"], "");
        assert_eq!(called.status, 404);
        let text = admin.get("/metrics").body;
        let dropped = "weir_log_lines_total{result=\"dropped\"}";
        metrics::value(&text, dropped).unwrap() > 0.0
    });
    signal(&weir.0, "TERM");
    let mut ended = None;
    eventually(|| {
        ended = weir.0.try_wait().unwrap();
        ended.is_some()
    });
    assert!(ended.unwrap().success());
}

/// A child that ends with its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_reload_begins_changes_and_ends_it() {
    let upstream = Upstream::answering("x");
    let config = |telemetry: &str| {
        format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: {}\ntelemetry: {{{telemetry}}}\n",
            upstream.url()
        )
    };
    let file = file(&config(""));
    let mut weir = Running::start(file.path());
    let lines = weir.output();
    let mut client = weir.client();
    client.get("/before");
    std::fs::write(file.path(), config("access_log: {format: json}")).unwrap();
    weir.signal("HUP");
    eventually(|| {
        client.get("/after");
        lines.try_iter().any(|line| line.contains("\"/after\""))
    });
    std::fs::write(file.path(), config("")).unwrap();
    weir.signal("HUP");
    eventually(|| weir.metric("weir_config_reloads_total{result=\"loaded\"}") >= 2);
    // A lane takes the new configuration a little later.
    eventually(|| {
        client.get("/quiet");
        lines.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout)
    });
    for _ in 0..10 {
        assert_eq!(client.get("/over").status, 200);
    }
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());
    let mut rest = lines.iter();
    assert_eq!(rest.find(|line| line.contains("/over")), None);
}

#[test]
fn a_password_in_a_target_is_not_written_down() {
    let upstream = Upstream::answering("x");
    let mut weir = weir("access_log: {format: json}", &upstream);
    let lines = weir.output();
    for (line, path) in [
        ("GET http://ann:hunter2@x/a@b?c=1", "http://x/a@b"),
        ("GET ann:hunter2@x/a", "x/a"),
        ("CONNECT ann:hunter2@x:443", "x:443"),
    ] {
        let request = format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n");
        weir.client().write(request.as_bytes());
        let told = next(&lines);
        assert_eq!(told["status"], 400, "{told}");
        assert!(!told.to_string().contains("hunter2"), "{told}");
        assert!(told["path"] == path || told["path"] == "", "{told}");
    }
}

#[test]
fn a_hidden_path_is_not_written_down_however_it_is_spelt() {
    let upstream = Upstream::answering("x");
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: {}\n\
         telemetry: {{access_log: {{format: json}}}}\n\
         audit: {{sqlite: {{path: '{}'}}, redact: {{paths: [/reset/*, /users/*/keys]}}}}\n",
        upstream.url(),
        folder.path().join("audit.db").display()
    ));
    let mut weir = Running::start(config.path());
    let lines = weir.output();
    let long = format!("/users/hunter2{}/keys", "x".repeat(5000));
    for (target, status, path) in [
        ("/Reset/hunter2", 200, "/Reset/***"),
        ("/reset%3Bx/hunter2", 200, "/reset%3Bx/***"),
        ("/reset%2Fhunter2", 200, "/reset/***"),
        ("http://x/reset%2Fhunter2", 200, "/reset/***"),
        (&long, 200, "/users/***/keys"),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
        let mut client = weir.client();
        client.write(request.as_bytes());
        let told = next(&lines);
        assert_eq!(told["status"], status, "{told}");
        assert_eq!(told["path"], path, "{told}");
    }
}

/// Of its status alone it would be none: that was sent before.
#[test]
fn a_response_that_breaks_off_is_an_error() {
    let broken = scripted(|mut stream| {
        if read_head(&mut stream).is_some() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf");
        }
    });
    let held = scripted(|mut stream| {
        if read_head(&mut stream).is_some() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf");
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nshutdown: {{drain: 500ms}}\n\
         telemetry: {{access_log: {{format: json, sample: 0%, always: [errors]}}}}\n\
         upstreams: {{broken: {{endpoints: ['http://{broken}']}}, held: {{endpoints: ['http://{held}']}}}}\n\
         routes: [{{match: {{path: /held}}, upstream: held}}, {{upstream: broken}}]\n"
    ));
    let mut weir = Running::start(config.path());
    let lines = weir.output();
    let told = |line: Value| (line["status"].clone(), line["label"].clone());
    let mut client = weir.client();
    client.begin("GET", "/broken", &[], "");
    assert_eq!(told(next(&lines)), (200.into(), "upstream_aborted".into()));
    // By the end of a drain.
    let mut stays = weir.client();
    stays.begin("GET", "/held", &[], "");
    assert_eq!(stays.status_within(10_000), Some(200));
    weir.signal("TERM");
    assert_eq!(told(next(&lines)), (200.into(), "cut_off".into()));
    assert!(weir.child.wait().unwrap().success());
}

/// So is one that weir breaks off, since the rest of the request is at fault.
#[test]
fn a_response_that_weir_breaks_off_is_an_error() {
    let upstream = scripted(|mut stream| {
        if read_head(&mut stream).is_some() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf");
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: http://{upstream}\n\
         telemetry: {{access_log: {{format: json, sample: 0%, always: [errors]}}}}\n"
    ));
    let mut weir = Running::start(config.path());
    let lines = weir.output();
    let mut client = weir.connect();
    let head = "POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n";
    client.write_all(head.as_bytes()).unwrap();
    read_head(&mut client).unwrap();
    client.write_all(b"zz\r\n").unwrap();
    let line = next(&lines);
    assert_eq!(
        (&line["status"], &line["label"]),
        (&200.into(), &"bad_body".into())
    );
}

/// How long the upstream took is known once it has failed: what it takes to put that on record is no part of it.
#[test]
fn a_line_and_an_event_say_the_same_of_an_upstream_that_failed() {
    let upstream = scripted(|mut stream| drop(read_head(&mut stream)));
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: http://{upstream}\n\
         telemetry: {{access_log: {{format: json}}}}\n\
         audit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
        folder.path().join("audit.db").display()
    ));
    let mut weir = Running::start(config.path());
    let lines = weir.output();
    assert_eq!(weir.client().get("/x").status, 502);
    let line = next(&lines);
    let events = audited(config.path(), &[]);
    let took = "upstream_duration_us";
    assert!(line[took].is_u64(), "{line}");
    assert_eq!(line[took], events[0][took], "{line} {events:?}");
}

/// What waits to be written is bounded by the number of its lines.
#[test]
fn a_text_is_told_up_to_4_kib_of_it() {
    let upstream = Upstream::answering("x");
    let mut weir = weir("access_log: {format: json}", &upstream);
    let lines = weir.output();
    // Its 4096th byte is the first of a letter.
    let text = format!("{}ä{}", "x".repeat(4_095), "x".repeat(1_000));
    let target = format!("/{}", "p".repeat(5_000));
    let (host, agent) = (
        format!("Host: {}", "h".repeat(5_000)),
        format!("User-Agent: {text}"),
    );
    let client = &mut weir.client();
    client.send("GET", &target, &[&host, &agent], "");
    let line = next(&lines);
    let told = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
    assert_eq!(told("path"), format!("{}…", &target[..4_096]));
    assert_eq!(told("host"), format!("{}…", "h".repeat(4_096)));
    assert_eq!(told("user_agent"), format!("{}…", "x".repeat(4_095)));
    // As long as it may be.
    let (whole, letters) = (&target[..4_096], "x".repeat(4_096));
    client.send("GET", whole, &[&format!("User-Agent: {letters}")], "");
    let line = next(&lines);
    assert_eq!(line["path"], whole);
    assert_eq!(line["user_agent"], letters);
}
