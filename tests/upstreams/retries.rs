//! Requests that are tried again: which, how often, and that none is done twice that must not be.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::harness::process::{Running, file};
use super::harness::raw::{Recorder, read_head, scripted, unchunk};
use super::harness::servers::Server;
use super::harness::tls::Authority;
use super::harness::versions::{Client, Length, Origin, PAIRINGS, Version, field, run, soon};
use super::harness::{DEADLINE, Lane, Upstream, eventually, ok};
use h2::Reason;
use socket2::{Domain, Socket, Type};

/// A lane before these endpoints in turn, with `settings` of the upstream.
fn lane(endpoints: &[SocketAddr], settings: &str) -> Lane {
    let urls: Vec<_> = endpoints.iter().map(|at| format!("http://{at}")).collect();
    Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: {urls:?}, load_balancing: round_robin, {settings}}}}}\n\
         circuit_breakers: {{one: {{consecutive_failures: 1}}}}\n"
    ))
}

/// The value of `weir_upstream_retries_total` for this result.
fn retries(lane: &Lane, result: &str) -> usize {
    let series = format!("weir_upstream_retries_total{{upstream=\"app\",result=\"{result}\"}}");
    lane.told(&series).unwrap() as usize
}

/// An upstream that reads the head of each request and goes.
fn breaking(count: &Arc<AtomicUsize>) -> SocketAddr {
    let count = count.clone();
    scripted(move |mut stream| {
        if read_head(&mut stream).is_some() {
            count.fetch_add(1, Ordering::SeqCst);
        }
    })
}

#[test]
fn a_connection_that_fails_is_made_elsewhere_whatever_the_method() {
    let (dead, recorder) = (Server::start(), Recorder::start());
    dead.kill();
    let lane = lane(&[dead.address, recorder.address], "retries: {}");
    let mut client = lane.connect();
    for _ in 0..4 {
        assert_eq!(client.get("/").body, "served");
        let reply = client.send("POST", "/", &[], "a body");
        assert_eq!((reply.status, reply.body.as_str()), (200, "served"));
    }
    let whole = recorder.whole();
    assert_eq!(whole.len(), 8);
    assert_eq!(
        whole
            .iter()
            .filter(|it| it.ends_with("\r\n\r\na body"))
            .count(),
        4
    );
    assert_eq!((retries(&lane, "sent"), retries(&lane, "rescued")), (4, 4));
}

#[test]
fn requests_by_http2_are_tried_elsewhere_too() {
    let (dead, recorder) = (Server::start(), Recorder::start());
    dead.kill();
    let count = Arc::new(AtomicUsize::new(0));
    let endpoints = [dead.address, breaking(&count), recorder.address];
    let settings = "retries: {attempts: 2, retry_on: [connect_failure, reset]}";
    let lane = lane(&endpoints, settings);
    run(async {
        let mut client = Client::connect(Version::Two, lane.address).await;
        for _ in 0..6 {
            let call = client.get("/").await;
            assert_eq!(call.whole().await, (200, "served".to_owned()));
        }
        let taken = count.load(Ordering::SeqCst);
        assert!(taken > 0);
        // What went to the one that takes and breaks may have had its effect, and goes nowhere else.
        let mut posts = Vec::new();
        for _ in 0..6 {
            let mut call = client.call("POST", "/", &[], Length::Known(6)).await;
            // The answer may be quicker.
            let _ = call.body.finish(b"a body").await;
            posts.push(call.answer().await.status);
        }
        let broken = posts.iter().filter(|status| **status == 502).count();
        assert_eq!(count.load(Ordering::SeqCst) - taken, broken, "{posts:?}");
        assert!(broken > 0, "{posts:?}");
        assert!(posts.contains(&200), "{posts:?}");
    });
}

/// Under TLS weir hears of a client's end by reading, and what it reads while it waits may be the body.
#[test]
fn a_body_that_comes_between_two_tries_is_whole() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let config = file(&format!(
            "listeners: [{{address: '127.0.0.1:0', tls: {{certificates: [{}]}}}}]\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
             upstreams: {{app: {{endpoints: ['http://127.0.0.1:1', 'http://{}'], protocol: http2, load_balancing: round_robin, \
             retries: {{attempts: 1, retry_on: [connect_failure], backoff: {{base: 500ms, max: 500ms}}}}}}}}\n",
            authority.pair("a"),
            origin.address
        ));
        let weir = Running::start(config.path());
        let url = format!("https://{}/", weir.address);
        for _ in 0..6 {
            let mut asking = Command::new("curl");
            asking
                .args([
                    "-sSk",
                    "-m",
                    "10",
                    "--http1.1",
                    "-d",
                    "abc",
                    "-w",
                    "%{http_code}",
                ])
                // So that it comes once weir has the head.
                .args(["-H", "Expect: 100-continue", &url]);
            let asking = tokio::task::spawn_blocking(move || asking.output().unwrap());
            let mut asked = origin.asked().await;
            assert_eq!(asked.body.rest().await.unwrap().0, b"abc");
            asked.ok("served").await;
            assert_eq!(asking.await.unwrap().stdout, b"served200");
        }
    });
}

#[test]
fn without_retries_a_failure_is_told_at_once() {
    let (dead, live) = (Server::start(), Server::start());
    dead.kill();
    let lane = lane(&[dead.address, live.address], "timeout: 5s");
    let statuses: Vec<_> = (0..4).map(|_| lane.connect().get("/").status).collect();
    assert_eq!(
        statuses.iter().filter(|status| **status == 502).count(),
        2,
        "{statuses:?}"
    );
}

/// The others that are idle may have met the same end.
#[test]
fn behind_an_idle_connection_that_was_closed_comes_a_new_one() {
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        let (count, both) = (AtomicUsize::new(0), Barrier::new(2));
        // Two connections at once; each is closed as its second request comes.
        let upstream = scripted(move |mut stream| {
            if read_head(&mut stream).is_none() {
                return;
            }
            if count.fetch_add(1, Ordering::SeqCst) < 2 {
                both.wait();
            }
            let _ = stream.write_all(ok("served").as_bytes());
            let _ = read_head(&mut stream);
        });
        run(async {
            let lane = lane(&[upstream], "timeout: 5s");
            let mut client = Client::connect(asks, lane.address).await;
            for call in [client.get("/").await, client.get("/").await] {
                assert_eq!(call.whole().await.0, 200);
            }
            for _ in 0..3 {
                assert_eq!(client.get("/").await.whole().await.0, 200);
            }
        });
    }
}

#[test]
fn no_request_fails_while_an_endpoint_dies_and_comes_back() {
    let servers: Vec<_> = (0..3).map(|_| Server::start()).collect();
    let at: Vec<_> = servers.iter().map(|server| server.address).collect();
    let lane = Arc::new(lane(
        &at,
        "outlier_detection: {consecutive_5xx: 3, interval: 20ms, base_ejection_time: 100ms}, \
         retries: {attempts: 3, retry_on: [connect_failure, reset_before_request, reset, '503'], budget: {min_concurrent: 100}}",
    ));
    let (stop, served) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (lane, stop, served) = (lane.clone(), stop.clone(), served.clone());
            thread::spawn(move || {
                let mut client = lane.connect();
                while !stop.load(Ordering::Relaxed) {
                    let reply = client.get("/");
                    assert_eq!(reply.status, 200, "{reply:?}");
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let served_more = |more: usize| {
        let from = served.load(Ordering::Relaxed);
        eventually(|| served.load(Ordering::Relaxed) > from + more);
    };
    let counts = || lane.plan.borrow().upstreams[0].live.counts();
    served_more(200);
    for _ in 0..3 {
        servers[1].kill();
        eventually(|| counts().ejected == 1);
        served_more(200);
        servers[1].revive();
        eventually(|| counts().up == 3);
        let before = servers[1].requests();
        eventually(|| servers[1].requests() > before + 20);
    }
    servers[2].answers(503);
    eventually(|| counts().ejected == 1);
    served_more(200);
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    assert!(retries(&lane, "rescued") > 0);
    assert_eq!(
        retries(&lane, "over_budget") + retries(&lane, "exhausted"),
        0
    );
}

#[test]
fn a_503_is_tried_elsewhere_and_told_once_all_tries_are_used() {
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        let servers: Vec<_> = (0..3).map(|_| Server::start()).collect();
        let at: Vec<_> = servers.iter().map(|server| server.address).collect();
        let lane = lane(&at, "retries: {attempts: 2, backoff: {base: 1ms}}");
        let requests = || servers.iter().map(Server::requests).sum::<usize>();
        run(async {
            let mut client = Client::connect(asks, lane.address).await;
            servers[0].answers(503);
            servers[1].answers(503);
            for _ in 0..6 {
                let whole = client.get("/").await.whole().await;
                assert_eq!(whole, (200, servers[2].address.to_string()));
            }
            // The 503s were read whole, and their connections used again.
            let connections: Vec<_> = servers.iter().map(Server::connections).collect();
            assert_eq!(connections, [1, 1, 1]);
            let rescued = retries(&lane, "rescued");
            servers[2].answers(503);
            let before = requests();
            let answer = client.get("/").await.answer().await;
            assert_eq!(answer.status, 503);
            assert_eq!(field(&answer.fields, "proxy-status"), None);
            assert_eq!(requests() - before, 3, "each endpoint once");
            assert_eq!(retries(&lane, "exhausted"), 1);
            drop(answer);
            // Other statuses are the upstream's word.
            servers[0].answers(500);
            servers[1].answers(500);
            servers[2].answers(500);
            assert_eq!(client.get("/").await.whole().await.0, 500);
            assert_eq!(requests(), before + 4);
            assert_eq!(retries(&lane, "rescued"), rescued);
        });
    }
}

/// What is no other try leaves the last one's answer as it is.
#[test]
fn where_no_endpoint_is_left_the_last_answer_stands() {
    let broken = Arc::<AtomicUsize>::default();
    for (asks, is_broken) in [
        (Version::One, false),
        (Version::Two, false),
        (Version::One, true),
        (Version::Two, true),
    ] {
        eprintln!("from {asks:?}, {is_broken}");
        let servers = [Server::start(), Server::start()];
        let (at, details) = match is_broken {
            true => (
                [breaking(&broken), breaking(&broken)],
                Some("upstream_broken"),
            ),
            false => (servers.each_ref().map(|it| it.address), None),
        };
        for server in &servers {
            server.answers(503);
        }
        let lane = lane(
            &at,
            "outlier_detection: {consecutive_5xx: 1, max_ejection_percent: 100}, panic_threshold: 0%, \
             retries: {attempts: 3, retry_on: [reset, '503'], backoff: {base: 1ms}}",
        );
        run(async {
            let mut client = Client::connect(asks, lane.address).await;
            let answer = client.get("/").await.answer().await;
            let status = field(&answer.fields, "proxy-status");
            let of = status.and_then(|it| it.split("details=").nth(1));
            let of = of.map(|it| it.trim_matches('"'));
            assert_eq!(
                (answer.status, of),
                (if is_broken { 502 } else { 503 }, details)
            );
            assert_eq!(
                (retries(&lane, "sent"), retries(&lane, "exhausted")),
                (1, 0)
            );
        });
    }
}

/// What has begun to answer may have done what it was asked, and the answer is not to be asked for again and again.
#[test]
fn a_response_that_breaks_off_within_its_head_is_not_asked_for_again() {
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        let seen = Arc::<AtomicUsize>::default();
        let count = seen.clone();
        let half = scripted(move |mut stream| {
            if read_head(&mut stream).is_some() {
                count.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Le");
            }
        });
        let lane = lane(
            &[half],
            "retries: {attempts: 2, retry_on: [reset, reset_before_request], backoff: {base: 1ms}}",
        );
        run(async {
            let mut client = Client::connect(asks, lane.address).await;
            assert_eq!(client.get("/").await.whole().await.0, 502);
            assert_eq!(seen.load(Ordering::SeqCst), 1);
            assert_eq!(retries(&lane, "sent") + retries(&lane, "exhausted"), 0);
        });
    }
}

/// As the one above, by HTTP/2: a head that is none is an answer, a stream that is reset without one is not.
#[test]
fn a_stream_that_is_reset_is_asked_for_again_and_nonsense_is_not() {
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        run(async {
            let mut origin = Origin::start(Version::Two).await;
            let lane = lane(
                &[origin.address],
                "protocol: http2, retries: {attempts: 2, retry_on: [reset], backoff: {base: 1ms}}",
            );
            let mut client = Client::connect(asks, lane.address).await;
            let call = client.get("/").await;
            origin.asked().await.reset(Reason::INTERNAL_ERROR);
            origin.asked().await.ok("served").await;
            assert_eq!(call.whole().await, (200, "served".to_owned()));
            let call = client.call("POST", "/", &[], Length::Known(0)).await;
            origin.asked().await.reset(Reason::INTERNAL_ERROR);
            assert_eq!(call.whole().await.0, 502);
            let call = client.get("/").await;
            let mut asked = origin.asked().await;
            let nonsense = [("content-length", "x")];
            let _out = asked.reply(200, &nonsense, Length::Unknown).await;
            assert_eq!(call.whole().await.0, 502);
            assert!(origin.is_quiet().await);
            assert_eq!((retries(&lane, "sent"), retries(&lane, "rescued")), (1, 1));
        });
    }
}

/// A stream stays open for hours, and no request that fails meanwhile is the poorer for it.
#[test]
fn a_stream_that_was_tried_again_holds_no_budget_once_it_is_answered() {
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        let dead = Server::start();
        dead.kill();
        let upstream = scripted(|mut stream| {
            while let Some(head) = read_head(&mut stream) {
                let answer = match head.starts_with("GET /stream ") {
                    true => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
                    false => ok("served"),
                };
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        let lane = lane(
            &[dead.address, upstream],
            "retries: {attempts: 1, retry_on: [connect_failure], backoff: {base: 1ms}, budget: {percent: 0, min_concurrent: 1}}",
        );
        run(async {
            let mut client = Client::connect(asks, lane.address).await;
            let mut streams = Vec::new();
            while retries(&lane, "sent") == 0 {
                let mut streaming = Client::connect(asks, lane.address).await;
                let answer = streaming.get("/stream").await.answer().await;
                assert_eq!(answer.status, 200);
                streams.push((streaming, answer));
            }
            for _ in 0..4 {
                assert_eq!(client.get("/").await.whole().await.0, 200);
            }
        });
        assert_eq!(retries(&lane, "over_budget"), 0);
        assert_eq!((retries(&lane, "sent"), retries(&lane, "rescued")), (3, 3));
    }
}

#[test]
fn what_may_not_be_done_twice_is_sent_once() {
    let all = "retries: {attempts: 5, retry_on: [connect_failure, reset_before_request, reset, timeout, 5xx], methods: [GET, PUT], buffer: 64KiB, backoff: {base: 1ms}}";
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        let seen = Arc::<AtomicUsize>::default();
        let at = [breaking(&seen), breaking(&seen)];
        let server = Server::start();
        server.answers(503);
        let (lane, unavailable) = (lane(&at, all), lane(&[server.address], all));
        run(async {
            for (method, body, times) in [
                ("POST", "pay", 1),
                ("POST", "", 1),
                ("PATCH", "x", 1),
                ("DELETE", "", 1),
                ("GET", "", 6),
                ("PUT", "x", 6),
            ] {
                let before = seen.load(Ordering::SeqCst);
                assert_eq!(status(asks, &lane, method, body).await, 502, "{method}");
                let sent = seen.load(Ordering::SeqCst) - before;
                assert_eq!(sent, times, "{method} {body:?}");
            }
            assert_eq!(status(asks, &unavailable, "POST", "pay").await, 503);
            assert_eq!(server.requests(), 1);
        });
    }
}

/// What a request with this body is told.
async fn status(asks: Version, lane: &Lane, method: &str, body: &str) -> u16 {
    let length = match body.len() {
        0 => Length::None,
        length => Length::Known(length),
    };
    let mut client = Client::connect(asks, lane.address).await;
    let mut call = client.call(method, "/", &[], length).await;
    if length != Length::None {
        // The answer may be quicker.
        let _ = call.body.finish(body.as_bytes()).await;
    }
    call.whole().await.0
}

#[test]
fn a_body_is_sent_again_only_where_it_was_kept_whole() {
    let check = |buffer: &str, body: &str, chunked: bool, expected: u16| {
        let seen = Arc::<AtomicUsize>::default();
        // Breaks off once it has all of the body, or of the small chunks as many as make most of it.
        let length = if chunked {
            body.len() * 3 / 2
        } else {
            body.len()
        };
        let count = seen.clone();
        let broken = scripted(move |mut stream| {
            if read_head(&mut stream).is_some() {
                stream.read_exact(&mut vec![0; length]).unwrap();
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        let recorder = Recorder::start();
        let settings = format!(
            "retries: {{retry_on: [reset], methods: [PUT], backoff: {{base: 1ms}}, buffer: {buffer}}}"
        );
        let lane = lane(&[broken, recorder.address], &settings);
        // The first in turn is a matter of chance.
        let mut statuses = Vec::new();
        while seen.load(Ordering::SeqCst) == 0 {
            let mut client = lane.connect();
            let reply = match chunked {
                false => client.send("PUT", "/", &[], body),
                true => {
                    client.begin("PUT", "/", &["Transfer-Encoding: chunked"], "");
                    for piece in body.as_bytes().chunks(7) {
                        let piece = std::str::from_utf8(piece).unwrap();
                        client.write(format!("{:x}\r\n{piece}\r\n", piece.len()).as_bytes());
                    }
                    client.write(b"0\r\n\r\n");
                    client.finish()
                }
            };
            statuses.push(reply.status);
        }
        let last = statuses.pop().unwrap();
        assert_eq!(last, expected, "{buffer} {chunked} {}", body.len());
        if last == 200 {
            let whole = recorder.whole().pop().unwrap();
            let sent = whole.split_once("\r\n\r\n").unwrap().1;
            match chunked {
                false => assert_eq!(sent, body),
                true => assert_eq!(unchunk(sent), (body.to_owned(), "")),
            }
        }
    };
    let long = "0123456789".repeat(500);
    check("0B", "short", false, 502);
    check("5B", "short", false, 200);
    check("4B", "short", false, 502);
    check("64KiB", &long, false, 200);
    check("64KiB", &long, true, 200);
    check("4KiB", &long, true, 502);
    check("0B", "short", true, 502);
}

#[test]
fn a_full_outage_is_met_with_few_retries() {
    const CLIENTS: usize = 20;
    const EACH: usize = 15;
    // Slow enough that they are under way together.
    let requests = Arc::<AtomicUsize>::default();
    let count = requests.clone();
    let upstream = Upstream::replying(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(20));
        ok("").replace("200 OK", "503 X")
    });
    let at = upstream.url().replace("http://", "").parse().unwrap();
    let lane = Arc::new(lane(
        &[at],
        "retries: {attempts: 3, backoff: {base: 1ms, max: 1ms}, budget: {percent: 20, min_concurrent: 1}}",
    ));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let lane = lane.clone();
            thread::spawn(move || {
                let mut client = lane.connect();
                for _ in 0..EACH {
                    assert_eq!(client.get("/").status, 503);
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    let (all, sent) = (CLIENTS * EACH, retries(&lane, "sent"));
    assert_eq!(requests.load(Ordering::Relaxed), all + sent);
    // Four of twenty under way may be retries, which is one for each four first tries; all would be three for each.
    assert!(sent > 0 && sent <= all * 2 / 5, "{sent}");
    assert!(retries(&lane, "over_budget") >= all / 2);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn all_tries_together_take_no_longer_than_the_timeout() {
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(async {
            let mut origin = Origin::start(serves).await;
            let settings = format!(
                "protocol: {}, timeout: 2500ms, retries: {{attempts: 10, retry_on: [timeout], per_try_timeout: 600ms, backoff: {{base: 1ms, max: 1ms}}}}",
                serves.name()
            );
            let lane = lane(&[origin.address], &settings);
            let mut client = Client::connect(asks, lane.address).await;
            let began = Instant::now();
            assert_eq!(client.get("/").await.whole().await.0, 504);
            let took = began.elapsed();
            assert!(took < Duration::from_millis(4_500), "{took:?}");
            let mut tries = Vec::new();
            while tries.len() <= retries(&lane, "sent") {
                tries.push(origin.asked().await);
            }
            assert!(origin.is_quiet().await);
            assert!((3..=5).contains(&tries.len()), "{}", tries.len());
            assert_eq!(
                retries(&lane, "out_of_time") + retries(&lane, "exhausted"),
                1
            );
        });
    }
}

/// Nor where there is no connection, whatever is spoken at either side.
#[test]
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn tries_without_a_connection_take_no_longer_either() {
    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        waiting.push(stream);
    }
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(async {
            let protocol = serves.name();
            let settings = format!(
                "protocol: {protocol}, timeout: 3s, connect_timeout: 6s, \
                 retries: {{attempts: 1, retry_on: [connect_failure], per_try_timeout: 200ms, backoff: {{base: 1ms}}}}"
            );
            let lane = lane(&[address], &settings);
            let began = Instant::now();
            let mut client = Client::connect(asks, lane.address).await;
            assert_eq!(client.get("/").await.whole().await.0, 504);
            let took = began.elapsed();
            assert!(took < Duration::from_secs(3), "{took:?}");
            let told = (retries(&lane, "sent"), retries(&lane, "exhausted"));
            assert_eq!(told, (1, 1));
        });
    }
}

/// It is weir's own cap that holds the request up.
#[test]
fn a_wait_for_the_place_of_a_connection_is_no_failure_of_the_upstream() {
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        run(async {
            let mut origin = Origin::start(Version::One).await;
            let lane = lane(
                &[origin.address],
                "timeout: 60s, connect_timeout: 4s, concurrency: {max_connections: 1}, circuit_breaker: one, \
                 retries: {retry_on: [connect_failure, timeout], per_try_timeout: 1s}",
            );
            let mut client = Client::connect(asks, lane.address).await;
            let first = client.get("/").await;
            let mut asked = origin.asked().await;
            let mut body = asked.reply(200, &[], Length::Known(2)).await;
            assert_eq!(client.get("/").await.whole().await.0, 503);
            let over = r#"weir_upstream_overloads_total{upstream="app",cap="connections"}"#;
            assert_eq!(lane.told(over), Some(1.0));
            // Longer than a try may take.
            let third = client.get("/").await;
            for _ in 0..4 {
                assert!(origin.is_quiet().await);
            }
            body.finish(b"ok").await.unwrap();
            assert_eq!(first.whole().await, (200, "ok".to_owned()));
            let mut asked = origin.asked().await;
            // It has all of its try's time, however long it has waited.
            tokio::time::sleep(Duration::from_millis(100)).await;
            asked.ok("served").await;
            assert_eq!(third.whole().await, (200, "served".to_owned()));
            assert_eq!(retries(&lane, "sent"), 0);
        });
    }
}

#[test]
fn a_slow_endpoint_is_left_for_another() {
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        let silent = scripted(|mut stream| while read_head(&mut stream).is_some() {});
        let live = Server::start();
        let lane = lane(
            &[silent, live.address],
            "timeout: 60s, retries: {retry_on: [timeout], per_try_timeout: 1500ms}",
        );
        run(async {
            let mut client = Client::connect(asks, lane.address).await;
            for _ in 0..4 {
                let whole = client.get("/").await.whole().await;
                assert_eq!(whole, (200, live.address.to_string()));
            }
        });
        assert_eq!(retries(&lane, "rescued"), 2);
    }
}

#[test]
fn a_breaker_hears_of_a_request_once() {
    for asks in [Version::One, Version::Two] {
        eprintln!("from {asks:?}");
        let (failing, live) = (Server::start(), Server::start());
        failing.answers(503);
        let settings = "circuit_breaker: one, retries: {attempts: 1, backoff: {base: 1ms}}";
        let lane = lane(&[failing.address, live.address], settings);
        let requests = || failing.requests() + live.requests();
        run(async {
            let mut client = Client::connect(asks, lane.address).await;
            // Rescued: a single failure would have opened it.
            for _ in 0..6 {
                assert_eq!(client.get("/").await.whole().await.0, 200);
            }
            live.answers(503);
            let before = requests();
            assert_eq!(client.get("/").await.whole().await.0, 503);
            assert_eq!(
                requests(),
                before + 2,
                "an open breaker ends no tries that were begun"
            );
            let refused = client.get("/").await.answer().await;
            assert_eq!(
                field(&refused.fields, "proxy-status"),
                Some("weir; error=destination_unavailable; details=\"circuit_open\"")
            );
            assert_eq!(requests(), before + 2);
        });
    }
}

#[test]
fn a_client_that_leaves_is_not_tried_for() {
    let server = Server::start();
    server.answers(503);
    let seen = Arc::<AtomicUsize>::default();
    for asks in [Version::One, Version::Two] {
        for at in [breaking(&seen), server.address] {
            eprintln!("from {asks:?}");
            let lane = lane(
                &[at],
                "timeout: 1h, retries: {attempts: 10, retry_on: [reset, '503'], backoff: {base: 1h, max: 1h}}",
            );
            let before = seen.load(Ordering::SeqCst) + server.requests();
            run(async {
                let mut client = Client::connect(asks, lane.address).await;
                let call = client.get("/").await;
                let until = async |due: &dyn Fn() -> bool| {
                    soon(async {
                        while !due() {
                            tokio::task::yield_now().await;
                        }
                    })
                    .await;
                };
                until(&|| seen.load(Ordering::SeqCst) + server.requests() > before).await;
                drop((call, client));
                until(&|| lane.plan.borrow().upstreams[0].live.under_way() == 0).await;
            });
            assert_eq!(retries(&lane, "sent"), 0);
        }
    }
}

#[test]
fn the_rest_of_an_upload_follows_a_retry() {
    // Answers with a 503 as soon as it has the head.
    let (left, has_left) = mpsc::channel();
    let early = scripted(move |mut stream| {
        while read_head(&mut stream).is_some() {
            let _ = stream.write_all(ok("").replace("200 OK", "503 X").as_bytes());
            // Its end of the connection stays open until weir goes.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
            let _ = left.send(());
        }
    });
    let recorder = Recorder::start();
    let lane = lane(
        &[early, recorder.address],
        "retries: {methods: [PUT], buffer: 1KiB, backoff: {base: 1ms}}",
    );
    for _ in 0..2 {
        let mut client = lane.connect();
        client.begin("PUT", "/", &["Content-Length: 10"], "");
        client.write(b"01234");
        assert_eq!(client.status_within(100), None);
        client.write(b"56789");
        assert_eq!(client.status_within(5_000), Some(200));
    }
    assert!(
        recorder
            .whole()
            .iter()
            .all(|it| it.ends_with("\r\n\r\n0123456789"))
    );
    assert_eq!(recorder.whole().len(), 2);
    // Where half a request was sent no other may follow.
    assert_eq!(has_left.recv_timeout(DEADLINE), Ok(()));
}

/// By chance from nothing to the whole of each. Of the same length, six together could not take more than 120 ms.
#[test]
fn each_wait_between_tries_may_be_longer_than_the_one_before() {
    let failing = Server::start();
    failing.answers(503);
    let lane = lane(
        &[failing.address],
        "retries: {attempts: 6, backoff: {base: 20ms, max: 10s}, budget: {min_concurrent: 100}}",
    );
    let began = weir::clock::now();
    let mut clients: Vec<_> = (0..20).map(|_| lane.connect()).collect();
    for client in &mut clients {
        client.begin("GET", "/", &[], "");
    }
    for client in &mut clients {
        assert_eq!(client.finish().status, 503);
    }
    assert_eq!(failing.requests(), 20 * 7);
    // From 20 ms to 640, they take more than twice as long in two of three requests.
    let took = began.elapsed();
    assert!(took > Duration::from_millis(500), "{took:?}");
}

/// Or those behind one that fails would get more than their part, and others less.
#[test]
fn another_try_takes_no_turn() {
    let servers: Vec<_> = (0..3).map(|_| Server::start()).collect();
    servers[0].answers(503);
    let at: Vec<_> = servers.iter().map(|server| server.address).collect();
    let lane = lane(
        &at,
        "retries: {attempts: 1, backoff: {base: 1ms, max: 1ms}}",
    );
    let mut client = lane.connect();
    for _ in 0..30 {
        assert_eq!(client.get("/").status, 200);
    }
    let requests: Vec<_> = servers.iter().map(Server::requests).collect();
    assert_eq!(requests[0], 10, "{requests:?}");
    assert_eq!(requests.iter().sum::<usize>(), 40);
}
