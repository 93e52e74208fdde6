//! Connections to an upstream of HTTP/2: how many, how full, and what becomes of requests when one of them ends.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use h2::Reason;

use super::harness::frames::{
    self, CANCEL, DATA, END_HEADERS, END_STREAM, Ended, HEADERS, NO_ERROR, PING, PROTOCOL_ERROR,
    RST_STREAM, Raw,
};
use super::harness::process::{Running, file};
use super::harness::raw::{scripted, send};
use super::harness::servers::NameServer;
use super::harness::versions::{Client, Length, Origin, Outgoing, Version, run};
use super::harness::{Lane, PATIENCE, eventually};
use super::{World, on_each_pairing};

/// A lane in front of an upstream of HTTP/2, for which it has all the time of a test.
pub(super) fn lane(upstream: SocketAddr) -> Lane {
    lane_within(upstream, "60s", "60s")
}

/// With these times for a response, and for a connection, which it also gives up where it hears nothing of it for as long.
fn lane_within(upstream: SocketAddr, timeout: &str, connect_timeout: &str) -> Lane {
    Lane::start(&format!(
        "listen: '127.0.0.1:0'\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}'], protocol: http2, timeout: {timeout}, connect_timeout: {connect_timeout}}}}}\n"
    ))
}

/// An upstream that gives each connection, by its number from 1, to `script`; how many came.
pub(super) fn numbered(
    its: &'static [(u16, u32)],
    script: impl Fn(usize, Raw) + Send + Sync + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::<AtomicUsize>::default();
    let opened = count.clone();
    let address = scripted(move |stream: TcpStream| {
        let number = count.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(raw) = Raw::server(stream, its) {
            script(number, raw);
        }
    });
    (address, opened)
}

/// The next request's stream.
pub(super) fn next_request(raw: &mut Raw) -> Option<u32> {
    loop {
        let frame = raw.next().ok()?;
        if frame.kind == HEADERS {
            return Some(frame.stream);
        }
    }
}

/// Answers with a 200 without a body.
pub(super) fn answer(raw: &mut Raw, stream: u32) {
    let head = frames::block(&[(":status", "200")]);
    raw.send(&frames::frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        stream,
        &head,
    ));
}

/// Begins to answer with a 200, whose body follows.
fn begin(raw: &mut Raw, stream: u32) {
    let head = frames::block(&[(":status", "200")]);
    raw.send(&frames::frame(HEADERS, END_HEADERS, stream, &head));
}

pub(super) fn answer_all(mut raw: Raw) {
    while let Some(stream) = next_request(&mut raw) {
        answer(&mut raw, stream);
    }
}

#[test]
fn one_connection_carries_requests_one_after_the_other_and_at_once() {
    run(async {
        let mut world = World::new(Version::One, Version::Two).await;
        for _ in 0..3 {
            let call = world.client.get("/").await;
            world.origin.asked().await.ok("done").await;
            assert_eq!(call.whole().await.0, 200);
        }
        let mut calls = Vec::new();
        for _ in 0..20 {
            calls.push(world.client.get("/").await);
        }
        let mut asked = Vec::new();
        for _ in 0..20 {
            asked.push(world.origin.asked().await);
        }
        for asked in &mut asked {
            asked.ok("done").await;
        }
        for call in calls {
            assert_eq!(call.whole().await.0, 200);
        }
        assert_eq!(world.origin.opened(), 1);
    });
}

/// There are clients that take a response without one for none, such as `h2load --h1`.
#[test]
fn clients_of_http1_are_told_a_reason_where_the_upstream_has_none() {
    let (upstream, _) = numbered(&[], |_, mut raw| {
        while let Some(stream) = next_request(&mut raw) {
            answer(&mut raw, stream);
        }
    });
    let lane = Lane::start(&format!(
        "listen: '127.0.0.1:0'\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}'], protocol: http2}}}}\n\
         routes: [{{match: {{path: /old}}, redirect: {{path: /new}}}}, {{upstream: app}}]\n"
    ));
    for (path, line) in [
        ("/", "HTTP/1.1 200 OK\r\n"),
        ("/old", "HTTP/1.1 302 Found\r\n"),
    ] {
        let asked = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let told = send(lane.address, asked.as_bytes()).text;
        assert!(told.starts_with(line), "{told}");
    }
}

#[test]
fn a_full_connection_has_another_beside_it() {
    for asks in [Version::One, Version::Two] {
        run(async {
            let mut settings = h2::server::Builder::new();
            settings.max_concurrent_streams(2);
            let origin = Origin::with(Version::Two, &settings).await;
            let mut world = World::before(asks, Version::Two, origin, "timeout: 5s").await;
            let mut calls = Vec::new();
            for _ in 0..5 {
                calls.push(world.client.get("/").await);
            }
            let mut asked = Vec::new();
            for _ in 0..5 {
                asked.push(world.origin.asked().await);
            }
            assert_eq!(world.origin.opened(), 3);
            for connection in 1..=3 {
                let of_it = asked.iter().filter(|asked| asked.connection == connection);
                assert!(of_it.count() <= 2);
            }
            for asked in &mut asked {
                asked.ok("done").await;
            }
            for call in calls {
                assert_eq!(call.whole().await.0, 200);
            }
            // There is room again.
            let call = world.client.get("/").await;
            world.origin.asked().await.ok("done").await;
            assert_eq!(call.whole().await.0, 200);
            assert_eq!(world.origin.opened(), 3);
        });
    }
}

/// RFC 9113 section 8.7: it was not looked at, so that sending it again does no harm.
#[test]
fn a_refused_request_is_sent_again() {
    on_each_pairing(async |mut world| {
        if world.serves == Version::One {
            return;
        }
        for method in ["GET", "POST"] {
            let call = world.client.call(method, "/", &[], Length::None).await;
            world.origin.asked().await.reset(Reason::REFUSED_STREAM);
            let mut again = world.origin.asked().await;
            assert_eq!(again.method, method);
            again.ok("done").await;
            assert_eq!(call.whole().await, (200, "done".to_owned()));
        }
        // Once, not for ever.
        let call = world.client.get("/").await;
        world.origin.asked().await.reset(Reason::REFUSED_STREAM);
        world.origin.asked().await.reset(Reason::REFUSED_STREAM);
        assert_eq!(call.answer().await.status, 502);
        // A short body is kept for that.
        let (mut call, mut asked) = world.upload(b"abc").await;
        asked.reset(Reason::REFUSED_STREAM);
        let mut again = world.origin.asked().await;
        call.body.finish(b"def").await.unwrap();
        assert_eq!(again.body.rest().await.unwrap().0, b"abcdef");
        again.ok("done").await;
        assert_eq!(call.whole().await, (200, "done".to_owned()));
        // What is gone of a body cannot be sent again.
        let long = [b'x'; 16 * 1024 + 1];
        let (call, mut asked) = world.upload(&long).await;
        asked.reset(Reason::REFUSED_STREAM);
        assert_eq!(call.answer().await.status, 502);
        assert!(world.origin.is_quiet().await);
        // But one of which nothing came yet can.
        let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
        world.origin.asked().await.reset(Reason::REFUSED_STREAM);
        let mut again = world.origin.asked().await;
        call.body.finish(b"abc").await.unwrap();
        assert_eq!(again.body.rest().await.unwrap().0, b"abc");
        again.ok("done").await;
        assert_eq!(call.whole().await, (200, "done".to_owned()));
    });
}

/// What a farewell leaves out was not looked at (RFC 9113 section 6.8).
#[test]
fn a_request_behind_a_farewell_is_sent_again_elsewhere() {
    for code in [NO_ERROR, PROTOCOL_ERROR] {
        let (upstream, opened) = numbered(&[], move |number, mut raw| {
            if number == 1 && next_request(&mut raw).is_some() {
                raw.send(&frames::goaway(0, code));
                let _ = raw.farewell();
            } else {
                answer_all(raw);
            }
        });
        let lane = lane(upstream);
        let reply = lane.connect().send("POST", "/", &[], "");
        assert_eq!(reply.status, 200, "{code}");
        assert_eq!(opened.load(Ordering::Relaxed), 2);
    }
}

#[test]
fn a_request_before_a_farewell_is_answered() {
    let (upstream, opened) = numbered(&[], |number, mut raw| {
        if number == 1 {
            let first = next_request(&mut raw).unwrap();
            raw.send(&frames::goaway(first, NO_ERROR));
            thread::sleep(Duration::from_millis(100));
            answer(&mut raw, first);
        }
        answer_all(raw);
    });
    let lane = lane(upstream);
    let (mut first, mut second) = (lane.connect(), lane.connect());
    first.begin("GET", "/", &[], "");
    eventually(|| opened.load(Ordering::Relaxed) == 1);
    thread::sleep(Duration::from_millis(50));
    // It goes elsewhere, since the first connection takes no more.
    assert_eq!(second.get("/").status, 200);
    assert_eq!(first.finish().status, 200);
    assert_eq!(opened.load(Ordering::Relaxed), 2);
}

#[test]
fn a_request_that_the_upstream_may_have_seen_is_not_sent_again() {
    let (upstream, opened) = numbered(&[], |number, mut raw| {
        if number > 1 {
            return answer_all(raw);
        }
        let first = next_request(&mut raw).unwrap();
        answer(&mut raw, first);
        let _ = next_request(&mut raw);
        raw.send(&frames::goaway(3, PROTOCOL_ERROR));
    });
    let lane = lane(upstream);
    assert_eq!(lane.connect().send("POST", "/", &[], "").status, 200);
    assert_eq!(lane.connect().send("POST", "/", &[], "").status, 502);
    assert_eq!(opened.load(Ordering::Relaxed), 1);
    assert_eq!(lane.connect().send("POST", "/", &[], "").status, 200);
    assert_eq!(opened.load(Ordering::Relaxed), 2);
}

#[test]
fn a_connection_closed_between_requests_costs_none() {
    let (told, closed) = mpsc::channel();
    let (upstream, opened) = numbered(&[], move |_, mut raw| {
        let first = next_request(&mut raw).unwrap();
        answer(&mut raw, first);
        raw.stream.shutdown(Shutdown::Write).unwrap();
        told.send(raw.farewell().1).unwrap();
    });
    let lane = lane(upstream);
    for round in 1..=5 {
        assert_eq!(lane.connect().send("POST", "/", &[], "").status, 200);
        assert_eq!(opened.load(Ordering::Relaxed), round);
        // By then weir has seen its end.
        assert_eq!(closed.recv_timeout(PATIENCE), Ok(Ended::Closed));
    }
}

/// A GET meets the close of its connection on its way, and is sent again; a POST may have been seen.
#[test]
fn a_connection_closed_under_a_request_costs_only_what_does_harm() {
    let (upstream, _) = numbered(&[], |_, mut raw| {
        let first = next_request(&mut raw).unwrap();
        answer(&mut raw, first);
        let _ = next_request(&mut raw);
    });
    let lane = lane(upstream);
    assert_eq!(lane.connect().get("/").status, 200);
    assert_eq!(lane.connect().get("/").status, 200);
    assert_eq!(lane.connect().send("POST", "/", &[], "").status, 502);
}

/// RFC 9113 section 5.1: what was under way when weir took a stream back is no error.
#[test]
fn late_frames_of_what_was_taken_back_end_no_other() {
    const CLIENTS: usize = 14;
    let (upstream, opened) = numbered(&[], |_, mut raw| {
        let held = next_request(&mut raw).unwrap();
        begin(&mut raw, held);
        let mut taken_back = 0;
        while taken_back < CLIENTS * 100 {
            let Ok(frame) = raw.next() else {
                return;
            };
            match frame.kind {
                HEADERS => begin(&mut raw, frame.stream),
                RST_STREAM => {
                    taken_back += 1;
                    raw.send(&frames::frame(DATA, 0, frame.stream, b"late"));
                }
                _ => {}
            }
        }
        raw.send(&frames::frame(DATA, END_STREAM, held, b"whole"));
        let _ = raw.farewell();
    });
    let lane = lane(upstream);
    let mut held = Raw::client(lane.address, &[]);
    held.send(&frames::get(1, "/held"));
    held.until(|frame| frame.kind == HEADERS);
    let streams = || (0..100).map(|n| n * 2 + 1);
    let gets: Vec<u8> = streams()
        .flat_map(|stream| frames::get(stream, "/"))
        .collect();
    let resets: Vec<u8> = streams()
        .flat_map(|stream| frames::reset(stream, CANCEL))
        .collect();
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = Raw::client(lane.address, &[]);
            client.send(&gets);
            for _ in streams() {
                client.until(|frame| frame.kind == HEADERS);
            }
            client
        })
        .collect();
    for client in &mut clients {
        client.send(&resets);
    }
    let answer = held.answer(1);
    assert!(answer.whole, "{answer:?}");
    assert_eq!(answer.body, b"whole");
    assert_eq!(opened.load(Ordering::Relaxed), 1);
}

/// The network took it away without a word: no request is to wait for what never answers, again and again.
#[test]
fn a_silent_connection_is_given_up() {
    let (upstream, opened) = numbered(&[], |number, mut raw| {
        if number > 1 {
            return answer_all(raw);
        }
        let first = next_request(&mut raw).unwrap();
        answer(&mut raw, first);
        // Open, and never read again.
        thread::sleep(Duration::from_secs(60));
    });
    let lane = lane_within(upstream, "2s", "2s");
    assert_eq!(lane.connect().get("/").status, 200);
    assert_eq!(lane.connect().get("/").status, 504);
    eventually(|| lane.connect().get("/").status == 200);
    assert_eq!(opened.load(Ordering::Relaxed), 2);
}

/// As [`a_silent_connection_is_given_up`], where no request waits for as long as weir would: those who ask leave, or have a deadline.
#[test]
fn a_silent_connection_is_given_up_whoever_ends_its_requests() {
    for ends in [Ends::Leaving, Ends::LeavingByHttp2, Ends::Deadline] {
        let (upstream, opened) = numbered(&[], |number, mut raw| {
            if number > 1 {
                return answer_all(raw);
            }
            let first = next_request(&mut raw).unwrap();
            answer(&mut raw, first);
            thread::sleep(Duration::from_secs(60));
        });
        let lane = lane_within(upstream, "60s", "2s");
        assert_eq!(lane.connect().get("/").status, 200);
        eventually(|| {
            match ends {
                Ends::Leaving => {
                    let mut client = lane.connect();
                    client.begin("GET", "/", &[], "");
                    assert_ne!(client.status_within(100), Some(504));
                }
                Ends::LeavingByHttp2 => {
                    let mut client = Raw::client(lane.address, &[]);
                    client.send(&frames::get(1, "/"));
                    thread::sleep(Duration::from_millis(100));
                    client.send(&frames::reset(1, CANCEL));
                }
                Ends::Deadline => {
                    let mut client = Raw::client(lane.address, &[]);
                    let fields = [
                        ("content-type", "application/grpc"),
                        ("grpc-timeout", "100m"),
                    ];
                    client.send(&frames::request(1, END_STREAM, "POST", "/", &fields));
                    assert!(client.answer(1).whole);
                }
            }
            opened.load(Ordering::Relaxed) == 2
        });
        assert_eq!(lane.connect().get("/").status, 200, "{ends:?}");
    }
}

/// Who ends a request.
#[derive(Debug, Clone, Copy)]
enum Ends {
    Leaving,
    LeavingByHttp2,
    Deadline,
}

/// Servers of gRPC end a connection by which they are pinged for nothing.
#[test]
fn a_connection_that_is_heard_of_is_not_pinged() {
    let (told, pings) = mpsc::channel();
    let (upstream, _) = numbered(&[], move |_, mut raw| {
        // One request has no answer, and each that is behind it has.
        next_request(&mut raw).unwrap();
        told.send("request").unwrap();
        while let Ok(frame) = raw.next() {
            match frame.kind {
                HEADERS => answer(&mut raw, frame.stream),
                RST_STREAM => told.send("reset").unwrap(),
                PING => told.send("ping").unwrap(),
                _ => {}
            }
        }
    });
    let lane = lane(upstream);
    let mut left = lane.connect();
    left.begin("GET", "/", &[], "");
    assert_eq!(pings.recv_timeout(PATIENCE), Ok("request"));
    assert_eq!(lane.connect().get("/").status, 200);
    drop(left);
    assert_eq!(pings.recv_timeout(PATIENCE), Ok("reset"));
    let more = pings.recv_timeout(Duration::from_millis(300));
    assert!(more.is_err(), "{more:?}");
}

/// A pause of the collector, say: who leaves meanwhile costs no one else their answer, and who comes does not wait for the end of it.
#[test]
fn a_stall_costs_no_other_request_and_is_passed_by() {
    let (goes_on, stall) = mpsc::channel();
    let stall = Mutex::new(stall);
    let came = Arc::<AtomicUsize>::default();
    let count = came.clone();
    let (upstream, opened) = numbered(&[], move |number, mut raw| {
        if number > 1 {
            return answer_all(raw);
        }
        let slow = next_request(&mut raw).unwrap();
        count.fetch_add(1, Ordering::Relaxed);
        let () = stall.lock().unwrap().recv().unwrap();
        answer(&mut raw, slow);
        answer_all(raw);
    });
    let lane = lane_within(upstream, "60s", "2s");
    let mut slow = lane.connect();
    slow.begin("POST", "/", &[], "");
    eventually(|| came.load(Ordering::Relaxed) == 1);
    eventually(|| {
        let mut client = lane.connect();
        client.begin("GET", "/", &[], "");
        client.status_within(100) == Some(200)
    });
    assert_eq!(opened.load(Ordering::Relaxed), 2);
    goes_on.send(()).unwrap();
    assert_eq!(slow.finish().status, 200);
}

/// grpc-go ends a connection with the fourth ping between two answers.
#[test]
fn a_connection_is_pinged_twice_between_two_answers() {
    // How many of the requests are answered: none, and every other one.
    for answers in [false, true] {
        let pings = Arc::<Mutex<Vec<usize>>>::default();
        let told = pings.clone();
        let (upstream, opened) = numbered(&[], move |_, mut raw| {
            let mine = told.lock().unwrap().len();
            told.lock().unwrap().push(0);
            let mut requests = 0;
            while let Ok(frame) = raw.next() {
                match frame.kind {
                    HEADERS => {
                        requests += 1;
                        if answers && requests % 2 == 0 {
                            answer(&mut raw, frame.stream);
                        }
                    }
                    PING => told.lock().unwrap()[mine] += 1,
                    _ => {}
                }
            }
        });
        let lane = lane_within(upstream, "900ms", "5s");
        for round in 0..8 {
            let status = lane.connect().get("/").status;
            assert_eq!(status == 200, answers && round % 2 == 1, "{status}");
        }
        let (pings, opened) = (pings.lock().unwrap(), opened.load(Ordering::Relaxed));
        match answers {
            true => assert!(opened == 1 && pings[0] > 2, "{opened} {pings:?}"),
            // One of which nothing but that is heard is left alone.
            false => assert!(
                opened > 1 && pings.iter().all(|pings| *pings <= 2),
                "{pings:?}"
            ),
        }
    }
}

/// One request that takes too long says nothing of the others on its connection.
#[test]
fn a_slow_answer_leaves_its_connection() {
    run(async {
        let origin = Origin::start(Version::Two).await;
        let mut world = World::before(
            Version::Two,
            Version::Two,
            origin,
            "timeout: 1s, connect_timeout: 1s",
        )
        .await;
        let call = world.client.get("/slow").await;
        let mut slow = world.origin.asked().await;
        assert_eq!(call.answer().await.status, 504);
        slow.taken_back(&mut Outgoing::Ended).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let call = world.client.get("/").await;
        world.origin.asked().await.ok("done").await;
        assert_eq!(call.whole().await.0, 200);
        assert_eq!(world.origin.opened(), 1);
    });
}

#[test]
fn an_idle_connection_is_closed() {
    run(async {
        let origin = Origin::start(Version::Two).await;
        let mut world = World::before(Version::One, Version::Two, origin, "idle_timeout: 1s").await;
        for round in 1..=2 {
            let call = world.client.get("/").await;
            let mut asked = world.origin.asked().await;
            assert_eq!(asked.connection, round);
            asked.ok("done").await;
            assert_eq!(call.whole().await.0, 200);
            tokio::time::sleep(Duration::from_millis(2500)).await;
        }
    });
}

#[test]
fn an_old_connection_takes_no_new_requests() {
    run(async {
        let origin = Origin::start(Version::Two).await;
        let mut world = World::before(Version::Two, Version::Two, origin, "max_age: 1s").await;
        let held = world.client.get("/held").await;
        let mut asked = world.origin.asked().await;
        assert_eq!(asked.connection, 1);
        loop {
            let call = world.client.get("/").await;
            let mut other = world.origin.asked().await;
            other.ok("").await;
            assert_eq!(call.whole().await.0, 200);
            if other.connection == 2 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        asked.ok("held").await;
        assert_eq!(held.whole().await.1, "held");
    });
}

#[test]
fn an_old_connection_ends_with_its_last_request() {
    let (ended, ends) = mpsc::channel();
    let (upstream, opened) = numbered(&[], move |number, raw| {
        answer_all(raw);
        let _ = ended.send(number);
    });
    let lane = Lane::start(&format!(
        "listen: '127.0.0.1:0'\nupstreams: {{app: {{endpoints: ['http://{upstream}'], protocol: http2, connect_timeout: 60s, max_age: 1s}}}}\n"
    ));
    let mut client = lane.connect();
    eventually(|| {
        assert_eq!(client.get("/").status, 200);
        ends.try_recv() == Ok(1)
    });
    // It may have ended between two requests.
    assert_eq!(client.get("/").status, 200);
    assert!(opened.load(Ordering::Relaxed) >= 2);
}

/// Where there may be no other, it is better than none.
#[test]
fn an_old_connection_in_use_stays_where_no_other_may_be() {
    run(async {
        let origin = Origin::start(Version::Two).await;
        let keys = "max_age: 1s, concurrency: {max_connections: 1}";
        let mut world = World::before(Version::Two, Version::Two, origin, keys).await;
        let held = world.client.get("/held").await;
        let mut asked = world.origin.asked().await;
        let began = weir::clock::now();
        let ask = async |world: &mut World| {
            let call = world.client.get("/").await;
            let mut other = world.origin.asked().await;
            other.ok("").await;
            assert_eq!(call.whole().await.0, 200);
            tokio::time::sleep(Duration::from_millis(20)).await;
            other.connection
        };
        while began.elapsed() < Duration::from_millis(1500) {
            assert_eq!(ask(&mut world).await, 1);
        }
        asked.ok("held").await;
        assert_eq!(held.whole().await.1, "held");
        assert_eq!(ask(&mut world).await, 2);
    });
}

/// A stream on it may be long, and all that come meanwhile would be refused.
#[test]
fn a_connection_that_a_reload_leaves_keeps_no_other_out() {
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let file = |keys: &str| {
            format!(
                "listen: '127.0.0.1:0'\nupstreams: {{app: {{endpoints: 'http://{}', protocol: http2, concurrency: {{max_connections: 1}}, {keys}}}}}\n",
                origin.address
            )
        };
        let (before, after) = (file("max_age: 1h"), file("max_age: 2h"));
        let lane = Lane::start(&before);
        let mut client = Client::connect(Version::Two, lane.address).await;
        let held = client.get("/held").await;
        let mut asked = origin.asked().await;
        lane.reload(&after);
        let call = client.get("/").await;
        let mut other = origin.asked().await;
        other.ok("").await;
        assert_eq!((call.whole().await.0, other.connection), (200, 2));
        asked.ok("held").await;
        assert_eq!(held.whole().await.1, "held");
    });
}

/// Nor does one to an address that a name has lost.
#[test]
fn a_connection_to_an_endpoint_that_is_gone_keeps_no_other_out() {
    run(async {
        let (mut gone, mut stays) = (
            Origin::start(Version::Two).await,
            Origin::start(Version::Two).await,
        );
        let names = NameServer::start();
        let source = |name: &str, origin: &Origin| {
            let port = origin.address.port();
            format!(
                "{{dns: '{name}:{port}', refresh: 20ms, servers: ['{}']}}",
                names.address
            )
        };
        names.says("gone.test", &[gone.address.ip()], 0);
        let lane = Lane::start(&format!(
            "listen: '127.0.0.1:0'\n\
             upstreams: {{app: {{endpoints: [{}, {}], protocol: http2, connect_timeout: 300ms, concurrency: {{max_connections: 1}}}}}}\n",
            source("gone.test", &gone),
            source("stays.test", &stays),
        ));
        let mut client = Client::connect(Version::Two, lane.address).await;
        let up = || lane.plan.borrow().upstreams[0].live.list().len();
        while up() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let held = client.get("/held").await;
        let mut asked = gone.asked().await;
        names.says("stays.test", &[stays.address.ip()], 0);
        names.forgets("gone.test");
        let place = stays.address.to_string();
        let moved = || {
            let list = lane.plan.borrow().upstreams[0].live.list();
            list.len() == 1 && list[0].place == place
        };
        while !moved() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let call = client.get("/").await;
        tokio::select! {
            other = stays.asked() => {
                let mut other = other;
                other.ok("").await;
            }
            whole = call.whole() => panic!("{whole:?}"),
        }
        asked.ok("held").await;
        assert_eq!(held.whole().await.1, "held");
    });
}

/// As those of HTTP/1.1: a lane has no use for the connections of another.
#[test]
fn connections_without_requests_make_room_for_other_lanes() {
    let (upstream, opened) = numbered(&[], |_, raw| answer_all(raw));
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 4}}\n\
         upstreams: {{app: {{endpoints: 'http://{upstream}', protocol: http2, connect_timeout: 5s, concurrency: {{max_connections: 1}}}}}}\n"
    ));
    let running = Running::start(config.path());
    // The kernel deals connections out to lanes.
    let mut clients: Vec<_> = (0..16).map(|_| running.client()).collect();
    for _ in 0..3 {
        for client in &mut clients {
            assert_eq!(client.get("/").status, 200);
        }
    }
    assert!(opened.load(Ordering::Relaxed) > 1, "one lane had them all");
}

/// Only those are closed that no request is on.
#[test]
fn a_connection_with_a_request_makes_no_room() {
    run(async {
        let (mut one, mut other) = (
            Origin::start(Version::Two).await,
            Origin::start(Version::Two).await,
        );
        let lane = Lane::start(&format!(
            "listen: '127.0.0.1:0'\n\
             upstreams: {{app: {{endpoints: ['http://{}', 'http://{}'], load_balancing: round_robin, protocol: http2, \
             connect_timeout: 500ms, concurrency: {{max_connections: 1}}}}}}\n",
            one.address, other.address
        ));
        let mut client = Client::connect(Version::Two, lane.address).await;
        let first = client.get("/first").await;
        let (mut asked, busy) = tokio::select! {
            asked = one.asked() => (asked, &mut one),
            asked = other.asked() => (asked, &mut other),
        };
        let mut others = Vec::new();
        for _ in 0..6 {
            others.push(client.get("/").await);
        }
        for _ in 0..3 {
            busy.asked().await.ok("").await;
        }
        // Of those for the other endpoint, too, that wait for the connection of the first of them.
        let mut statuses = Vec::new();
        for call in others {
            statuses.push(call.whole().await.0);
        }
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 200, 200, 503, 503, 503]);
        asked.ok("first").await;
        assert_eq!(first.whole().await.1, "first");
    });
}

#[test]
fn an_upstream_that_speaks_no_http2_is_a_502() {
    let upstream = scripted(|mut stream| {
        let _ = std::io::Read::read(&mut stream, &mut [0; 1000]);
        let _ = std::io::Write::write_all(
            &mut stream,
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        );
    });
    assert_eq!(lane(upstream).connect().get("/").status, 502);
    let silent = scripted(|_stream| thread::sleep(Duration::from_secs(60)));
    let lane_of_silent = lane_within(silent, "60s", "500ms");
    assert_eq!(lane_of_silent.connect().get("/").status, 504);
    let closing = scripted(drop);
    assert_eq!(lane(closing).connect().get("/").status, 502);
}

/// What is refused before it was looked at is tried on another connection; the client of HTTP/2 notices nothing.
#[test]
fn a_refusal_of_one_stream_leaves_the_others() {
    run(async {
        let mut world = World::new(Version::Two, Version::Two).await;
        let first = world.client.get("/first").await;
        let mut asked = world.origin.asked().await;
        let second = world.client.get("/second").await;
        world.origin.asked().await.reset(Reason::REFUSED_STREAM);
        world.origin.asked().await.ok("second").await;
        assert_eq!(second.whole().await.1, "second");
        asked.ok("first").await;
        assert_eq!(first.whole().await.1, "first");
    });
}

/// Each waits for the connection of the first, but not one after the other.
#[test]
#[expect(clippy::disallowed_methods, reason = "what is measured")]
fn an_upstream_that_cannot_be_reached_is_told_to_all_at_once() {
    let silent = scripted(|_stream| thread::sleep(Duration::from_secs(60)));
    let lane = lane_within(silent, "60s", "500ms");
    let began = Instant::now();
    let mut clients: Vec<_> = (0..20).map(|_| lane.connect()).collect();
    for client in &mut clients {
        client.begin("GET", "/", &[], "");
    }
    for client in &mut clients {
        assert_eq!(client.finish().status, 504);
    }
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
}
