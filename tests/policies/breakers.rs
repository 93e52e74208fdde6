//! Circuit breakers over the wire, on one lane: in memory, and shared through Redis by a process that is alone.

use super::harness;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::harness::process::{Running, file};
use super::harness::redis::{Cluster, key_prefix};
use super::harness::servers::Kept;
use super::harness::{Lane, Store, Upstream, eventually, ok};
use weir::store::breakers::shared::Forced;

/// The same rules hold on each store, which is a block of the file.
fn on_each_store(test: impl Fn(&str)) {
    test("");
    test(&Store::Redis.block());
}

/// An upstream that fails while `failing` says so, behind a breaker of these settings.
fn guarded(store: &str, breaker: &str, failing: Arc<AtomicBool>) -> (Lane, Upstream) {
    let upstream = Upstream::replying(move |_| {
        if failing.load(Ordering::Relaxed) {
            "HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n".to_owned()
        } else {
            ok("well")
        }
    });
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{a: {{endpoints: ['{}'], circuit_breaker: b}}}}\n\
         circuit_breakers: {{b: {breaker}}}\nrate_limits: {{held: {{limit: 1, by: constant, algorithm: concurrency}}}}\n\
         routes: [{{upstream: a, rate_limits: [held]}}]\n{store}",
        upstream.url()
    ));
    (lane, upstream)
}

#[test]
fn a_failing_upstream_is_left_alone_and_tried_again() {
    on_each_store(|store| {
        let failing = Arc::new(AtomicBool::new(true));
        let settings = "{minimum_calls: 3, open_for: 3s, jitter: 0%, half_open: {probes: 1}, recover_over: 0s}";
        let (lane, upstream) = guarded(store, settings, failing.clone());
        let mut client = lane.connect();
        let begun = weir::clock::now();
        for _ in 0..3 {
            assert_eq!(client.get("/").status, 500);
        }
        eventually(|| lane.state() == "open");
        let refused = client.get("/");
        assert_eq!(refused.status, 503);
        // What is left of the 3 s, in whole seconds that are not too short.
        let wait = refused.field("retry-after").unwrap().parse().unwrap();
        assert!(wait <= 3, "{wait}");
        assert!(Duration::from_secs(wait) + begun.elapsed() >= Duration::from_secs(3));
        assert_eq!(
            refused.field("proxy-status"),
            Some("weir; error=destination_unavailable; details=\"circuit_open\"")
        );
        assert_eq!(
            client.get("/").status,
            503,
            "a refusal gives its concurrency slot back"
        );
        assert_eq!(
            upstream.requests.try_iter().count(),
            3,
            "what is refused is not sent"
        );
        failing.store(false, Ordering::Relaxed);
        eventually(|| client.get("/").status == 200);
        eventually(|| lane.state() == "closed");
        for _ in 0..5 {
            assert_eq!(client.get("/").body, "well");
        }
        let text = lane.plan.borrow().metrics.text();
        assert!(
            text.contains(r#"weir_breaker_decisions_total{upstream="a",decision="refused"}"#),
            "{text}"
        );
        assert!(
            text.contains(r#"weir_rejections_total{reason="circuit_open"}"#),
            "{text}"
        );
    });
}

#[test]
fn the_log_tells_each_state_that_a_breaker_comes_to() {
    on_each_store(|store| {
        let failing = Arc::new(AtomicBool::new(true));
        let fails = failing.clone();
        let upstream = Upstream::replying(move |_| match fails.load(Ordering::Relaxed) {
            true => "HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n".to_owned(),
            false => ok("well"),
        });
        let settings = "{minimum_calls: 3, open_for: 1s, jitter: 0%, half_open: {probes: 1}, recover_over: 200ms}";
        let config = file(&format!(
            "listeners: [{{address: 127.0.0.1:0}}]\nadmin: {{address: 127.0.0.1:0}}\n\
             upstreams: {{a: {{endpoints: ['{}'], circuit_breaker: b}}}}\n\
             circuit_breakers: {{b: {settings}}}\nroutes: [{{upstream: a}}]\n{store}",
            upstream.url()
        ));
        let weir = Running::start(config.path());
        let said = |level: &str, state: &str| {
            let line = weir.log_until(": breaker is ");
            let said = format!("{level} weir::store::breakers::telling: breaker is {state}");
            assert!(line.contains(&said), "{line}");
        };
        let mut client = weir.client();
        for _ in 0..3 {
            assert_eq!(client.get("/").status, 500);
        }
        said(
            "WARN",
            "open upstream=\"a\" calls=3 failures=3 slow=0 open_for=",
        );
        failing.store(false, Ordering::Relaxed);
        eventually(|| client.get("/").status == 200);
        said("INFO", "half open upstream=\"a\"");
        said("INFO", "recovering upstream=\"a\"");
        eventually(|| {
            let path = "/v1/breakers/a";
            let shown = weir.admin().send("GET", path, &["Host: 127.0.0.1"], "");
            shown.body.contains("\"state\":\"closed\"")
        });
        said("INFO", "closed upstream=\"a\"");
    });
}

#[test]
fn a_fallback_is_told_in_place_of_the_503() {
    on_each_store(|store| {
        let (lane, _upstream) = guarded(
            store,
            "{consecutive_failures: 1, open_for: 1h, fallback: {status: 200, body: '[]', content_type: text/x}}",
            Arc::new(AtomicBool::new(true)),
        );
        let mut client = lane.connect();
        assert_eq!(client.get("/").status, 500);
        eventually(|| lane.state() == "open");
        let fallback = client.get("/");
        assert_eq!(
            (
                fallback.status,
                &*fallback.body,
                fallback.field("content-type")
            ),
            (200, "[]", Some("text/x"))
        );
    });
}

#[test]
fn a_fallback_without_a_body_leaves_the_connection_in_order() {
    for status in [204, 205, 304] {
        let (lane, _upstream) = guarded(
            "",
            &format!(
                "{{consecutive_failures: 1, open_for: 1h, fallback: {{status: {status}, body: ''}}}}"
            ),
            Arc::new(AtomicBool::new(true)),
        );
        assert_eq!(lane.connect().get("/").status, 500);
        let asked = "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let told = harness::raw::send(lane.address, asked.as_bytes()).text;
        let heads: Vec<_> = told.split_terminator("\r\n\r\n").collect();
        assert_eq!(heads.len(), 2, "{told}");
        for head in heads {
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{told}");
            let length = head
                .lines()
                .find(|line| line.starts_with("Content-Length:"));
            // A reader takes a 205 for as long as it says (RFC 9110 section 15.3.6).
            assert_eq!(
                length,
                (status == 205).then_some("Content-Length: 0"),
                "{told}"
            );
            assert!(!head.contains("Content-Type"), "{told}");
        }
    }
}

#[test]
fn a_shadow_breaker_refuses_no_one() {
    on_each_store(|store| {
        let failing = Arc::new(AtomicBool::new(true));
        let (lane, upstream) = guarded(
            store,
            "{consecutive_failures: 1, open_for: 1h, mode: shadow}",
            failing,
        );
        let mut client = lane.connect();
        assert_eq!(client.get("/").status, 500);
        eventually(|| lane.state() == "open");
        for _ in 0..3 {
            assert_eq!(client.get("/").status, 500);
        }
        assert_eq!(upstream.requests.try_iter().count(), 4);
        let refused = r#"weir_breaker_decisions_total{upstream="a",decision="shadow_refused"}"#;
        assert_eq!(lane.told(refused), Some(3.0));
    });
}

#[test]
fn an_upstream_that_cannot_be_reached_trips_its_breaker() {
    on_each_store(|store| {
        let nobody = Kept::new();
        let closed = nobody.address;
        let lane = Lane::start(&format!(
            "listen: 127.0.0.1:0\nupstreams: {{a: {{endpoints: ['http://{closed}'], circuit_breaker: b}}}}\n\
         circuit_breakers: {{b: {{consecutive_failures: 2, open_for: 1h}}}}\n{store}"
        ));
        let two = || [0; 2].map(|_| lane.connect().get("/").status);
        assert_eq!(two(), [502, 502]);
        eventually(|| lane.state() == "open");
        assert_eq!(two(), [503, 503]);
    });
}

/// A lane in front of `upstream` whose breaker has these settings, and a client of it.
fn behind(store: &str, upstream: std::net::SocketAddr, timeout: &str, breaker: &str) -> Lane {
    Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{upstream}'], timeout: {timeout}, circuit_breaker: b}}}}\n\
         circuit_breakers: {{b: {breaker}}}\n{store}"
    ))
}

#[test]
fn an_upstream_that_hangs_opens_the_breaker_again_and_again() {
    on_each_store(|store| {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let lane = behind(
            store,
            silent.local_addr().unwrap(),
            "2s",
            "{minimum_calls: 1, open_for: 4s, half_open: {probes: 1, probe_timeout: 100ms}}",
        );
        assert_eq!(lane.connect().get("/").status, 504);
        eventually(|| lane.state() == "half_open");
        // One that is not refused.
        let mut probe = lane.connect();
        eventually(|| {
            probe = lane.connect();
            probe.begin("GET", "/", &[], "");
            probe.status_within(1_000).is_none()
        });
        // Long before its 504, the probe has had its time.
        eventually(|| lane.state() == "open");
        eventually(|| lane.connect().get("/").status == 503);
    });
}

/// A breaker that one failure opens, for 50 ms, and one probe closes.
const ONE_PROBE: &str = "{consecutive_failures: 1, open_for: 50ms, jitter: 0%, half_open: {probes: 1, probe_timeout: 3s}, recover_over: 0s}";

/// How often a breaker has gone from one state to another: from closed by open and half-open to closed, that is 4 times.
fn generation(lane: &Lane) -> u64 {
    lane.breaker().generation
}

/// An upstream that fails once, and then answers with `answer`, for as long as that takes.
fn fails_once(answer: fn(&mut std::net::TcpStream)) -> std::net::SocketAddr {
    let failing = Arc::new(AtomicBool::new(true));
    harness::raw::scripted(move |mut stream| {
        use std::io::{Read as _, Write as _};
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(b"\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => seen.push(byte[0]),
                _ => return,
            }
        }
        let is_whole = !seen.starts_with(b"POST") || stream.read_exact(&mut [0; 4]).is_ok();
        if !is_whole {
            return;
        }
        if failing.swap(false, Ordering::Relaxed) {
            let broken = "HTTP/1.1 500 Broken\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
            stream.write_all(broken.as_bytes()).unwrap();
        } else {
            answer(&mut stream);
        }
    })
}

/// A client of a request that its breaker, half-open, has let pass.
fn probing(lane: &Lane, method: &str, fields: &[&str]) -> harness::Client {
    assert_eq!(lane.connect().get("/").status, 500);
    eventually(|| lane.state() == "half_open");
    let mut client = lane.connect();
    eventually(|| {
        client = lane.connect();
        client.begin(method, "/", fields, "");
        client.status_within(1_000) != Some(503)
    });
    client
}

#[test]
fn a_probe_whose_response_goes_on_closes_the_breaker() {
    use std::io::{Read as _, Write as _};
    on_each_store(|store| {
        let upstream = fails_once(|stream| {
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nevent\r\n";
            stream.write_all(head.as_bytes()).unwrap();
            // Until weir has gone.
            let _ = stream.read(&mut [0]);
        });
        let lane = behind(store, upstream, "5s", ONE_PROBE);
        let _stream = probing(&lane, "GET", &[]);
        eventually(|| lane.state() == "closed");
        assert!(generation(&lane) <= 4, "it did not open again");
    });
}

#[test]
fn a_probe_whose_client_leaves_makes_room_for_another() {
    use std::io::Write as _;
    on_each_store(|store| {
        let upstream = fails_once(|stream| {
            let well = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
            let _ = stream.write_all(well.as_bytes());
        });
        // Longer than the test takes.
        let breaker = ONE_PROBE.replace("probe_timeout: 3s", "probe_timeout: 1h");
        let lane = behind(store, upstream, "5s", &breaker);
        drop(probing(&lane, "POST", &["Content-Length: 4"]));
        eventually(|| lane.connect().get("/").status == 200);
        eventually(|| lane.state() == "closed");
    });
}

#[test]
fn a_probe_whose_client_sends_slowly_neither_fails_nor_keeps_others_out() {
    use std::io::Write as _;
    on_each_store(|store| {
        let upstream = fails_once(|stream| {
            let well = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
            let _ = stream.write_all(well.as_bytes());
        });
        let lane = behind(store, upstream, "5s", ONE_PROBE);
        let _slow = probing(&lane, "POST", &["Content-Length: 4"]);
        eventually(|| lane.connect().get("/").status == 200);
        eventually(|| lane.state() == "closed");
        assert!(generation(&lane) <= 4, "it did not open again");
    });
}

#[test]
fn a_probe_whose_body_is_not_read_fails_by_its_time() {
    on_each_store(|store| {
        let upstream = fails_once(|_| std::thread::sleep(Duration::from_secs(60)));
        let lane = behind(store, upstream, "10m", ONE_PROBE);
        let mut client = probing(&lane, "POST", &["Content-Length: 10000000"]);
        // More than the kernel takes by itself.
        std::thread::spawn(move || client.write(&vec![b'x'; 10_000_000]));
        // From half-open to open again.
        eventually(|| generation(&lane) > 2);
    });
}

#[test]
fn slow_clients_do_not_make_an_upstream_slow() {
    on_each_store(|store| {
        let upstream = harness::raw::scripted(|mut stream| {
            use std::io::{Read as _, Write as _};
            let mut seen = Vec::new();
            let mut byte = [0];
            while !seen.ends_with(b"abcd") {
                match stream.read(&mut byte) {
                    Ok(1) => seen.push(byte[0]),
                    _ => return,
                }
            }
            stream.write_all(harness::ok("ok").as_bytes()).unwrap();
        });
        let lane = behind(
            store,
            upstream,
            "5s",
            "{minimum_calls: 1, slow_call: {duration: 2s, rate: 50%}}",
        );
        let mut client = lane.connect();
        client.begin("POST", "/", &["Content-Length: 4"], "");
        for byte in [b"a", b"b", b"c", b"d"] {
            client.write(byte);
            std::thread::sleep(Duration::from_millis(700));
        }
        assert_eq!(client.finish().status, 200);
        eventually(|| {
            let breaker = lane.breaker();
            (lane.state(), breaker.failures, breaker.slow) == ("closed", 0, 0)
        });
    });
}

#[test]
fn impatient_clients_do_not_hide_a_dead_upstream() {
    on_each_store(|store| {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let lane = behind(
            store,
            silent.local_addr().unwrap(),
            "30s",
            "{minimum_calls: 2, slow_call: {duration: 50ms, rate: 50%}}",
        );
        let mut asked = Vec::new();
        for _ in 0..2 {
            let mut client = lane.connect();
            client.begin("GET", "/", &[], "");
            // From when weir has asked.
            asked.push(silent.accept().unwrap());
            assert_eq!(client.status_within(100), None);
        }
        eventually(|| lane.state() == "open");
    });
}

#[test]
fn a_reload_with_other_settings_leaves_a_breaker_as_it_is() {
    let upstream = Upstream::answering("well");
    let file = |rate: u32| {
        format!(
            "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], circuit_breaker: b}}}}\n\
             circuit_breakers: {{b: {{failure_rate: {rate}%}}}}\n",
            upstream.url()
        )
    };
    let lane = Lane::start(&file(50));
    let force = |forced| {
        let plan = lane.plan.borrow();
        plan.breakers().for_each(|breaker| breaker.force(forced));
    };
    let mut client = lane.connect();
    for (forced, state_is, status, rate) in [
        (Forced::Open, "forced_open", 503, 60),
        (Forced::Closed, "forced_closed", 200, 70),
        (Forced::Reset, "closed", 200, 80),
    ] {
        force(forced);
        lane.reload(&file(rate));
        assert_eq!(lane.state(), state_is);
        eventually(|| client.get("/").status == status);
        assert_eq!(lane.state(), state_is);
        // The upstream may be well.
        let says = "requests to the upstream are held back by an operator";
        let told = client.get("/");
        assert_eq!(told.body.contains(says), status == 503, "{}", told.body);
    }
}

#[test]
fn a_breaker_that_is_open_stays_so_where_a_reload_makes_it_local() {
    let shared = Cluster::shared().yaml(&key_prefix());
    let upstream =
        Upstream::replying(|_| "HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n".to_owned());
    let file = |breaker: &str| {
        format!(
            "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], circuit_breaker: b}}}}\n\
             circuit_breakers: {{b: {{minimum_calls: 3, open_for: 1h, {breaker}}}}}\n{shared}",
            upstream.url()
        )
    };
    let lane = Lane::start(&file("scope: shared, quorum: 1"));
    let mut client = lane.connect();
    for _ in 0..3 {
        assert_eq!(client.get("/").status, 500);
    }
    eventually(|| lane.state() == "open");
    lane.reload(&file("scope: local"));
    assert_eq!(lane.state(), "open");
    lane.reload(&file("scope: local, failure_rate: 60%"));
    assert_eq!(lane.state(), "open");
    assert_eq!(client.get("/").status, 503);
}

/// RFC 9110 section 7.6.2: weir answers it itself, and so it neither needs the upstream nor says anything of it.
#[test]
fn what_ends_at_weir_is_answered_whatever_the_breaker_says() {
    on_each_store(|store| {
        let failing = Arc::new(AtomicBool::new(true));
        let settings = "{consecutive_failures: 1, open_for: 3s, jitter: 0%, half_open: {probes: 1}, recover_over: 0s}";
        let (lane, upstream) = guarded(store, settings, failing.clone());
        let mut client = lane.connect();
        assert_eq!(client.get("/").status, 500);
        eventually(|| lane.state() == "open");
        let mut options = || client.send("OPTIONS", "/", &["Max-Forwards: 0"], "").status;
        assert_eq!(options(), 204);
        eventually(|| lane.state() == "half_open");
        assert_eq!(options(), 204);
        assert_eq!(lane.state(), "half_open");
        assert_eq!(upstream.requests.try_iter().count(), 1);
        // No slot of a probe is held by it, either.
        failing.store(false, Ordering::Relaxed);
        eventually(|| lane.connect().get("/").status == 200);
    });
}
