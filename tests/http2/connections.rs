//! A client's connection of HTTP/2: what it is refused, and how it ends.

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::harness::frames::{
    self, CANCEL, DATA, END_STREAM, Ended, NO_ERROR, PING, RST_STREAM, Raw,
};
use super::harness::versions::{Answer, Client, Length, Origin, Outgoing, Version, field, run};
use super::harness::{Lane, Upstream, eventually};
use super::{World, on_each_pairing};

/// A lane that refuses for several reasons, for clients of either version.
fn refusing(origin: &Origin) -> Lane {
    Lane::start(&format!(
        "listen: '127.0.0.1:0'\n\
         upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: http2, circuit_breaker: b}}}}\n\
         circuit_breakers: {{b: {{minimum_calls: 1, open_for: 60s}}}}\n\
         rate_limits: {{none: {{limit: 0/h, by: constant}}}}\n\
         sessions: {{web: {{}}}}\n\
         routes:\n  - {{match: {{path: /limited}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /mine}}, upstream: app, session: {{use: web}}}}\n\
         \x20 - {{match: {{path: /app}}, upstream: app}}\n",
        origin.address
    ))
}

#[test]
fn a_refusal_says_by_http2_what_it_says_by_http1() {
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let lane = refusing(&origin);
        let mut client = Client::connect(Version::Two, lane.address).await;
        // Opens the breaker.
        let call = client.get("/app").await;
        origin.asked().await.reply(500, &[], Length::None).await;
        assert_eq!(call.answer().await.status, 500);
        for (path, status, challenge) in [
            ("/limited", 429, None),
            ("/mine", 401, Some("www-authenticate")),
            ("/nowhere", 404, None),
            ("/app", 503, Some("retry-after")),
        ] {
            let mut two = client.get(path).await.answer().await;
            let mut old = Client::connect(Version::One, lane.address).await;
            let mut one = old.get(path).await.answer().await;
            assert_eq!((one.status, two.status), (status, status), "{path}");
            assert_eq!(names(&one), names(&two), "{path}");
            for name in [
                "content-type",
                "content-length",
                "proxy-status",
                "www-authenticate",
            ] {
                assert_eq!(
                    field(&one.fields, name),
                    field(&two.fields, name),
                    "{path} {name}"
                );
            }
            if let Some(name) = challenge {
                assert!(field(&two.fields, name).is_some(), "{path}");
            }
            let (one, two) = (
                one.body.rest().await.unwrap(),
                two.body.rest().await.unwrap(),
            );
            assert_eq!(one, two, "{path}");
            assert!(!one.0.is_empty());
            let head = client.call("HEAD", path, &[], Length::None).await;
            let mut head = head.answer().await;
            assert_eq!(
                (head.status, head.body.rest().await.unwrap().0.len()),
                (status, 0)
            );
        }
        // A body that no one wants is no one's trouble, however much of it is on its way.
        for _ in 0..20 {
            let mut call = client.call("POST", "/limited", &[], Length::Unknown).await;
            let _ = call.body.send(&[b'x'; 60_000]).await;
            assert_eq!(call.answer().await.status, 429);
        }
        let call = client
            .call("POST", "/limited", &[], Length::Known(1 << 40))
            .await;
        assert_eq!(call.answer().await.status, 413);
        assert!(origin.is_quiet().await);
    });
}

/// In order of the alphabet, but for what says how a connection of HTTP/1.1 goes on.
fn names(answer: &Answer) -> Vec<&str> {
    let names = answer.fields.iter().map(|(name, _)| name.as_str());
    let mut names: Vec<_> = names.filter(|name| *name != "connection").collect();
    names.sort_unstable();
    names
}

/// Those that a proxy's clients are refused must not cost all of them its connection.
#[test]
fn bodies_behind_refusals_end_no_connection() {
    let lane = Lane::start(
        "listen: '127.0.0.1:0'\nupstreams: {app: {endpoints: 'http://127.0.0.1:1'}}\n\
         rate_limits: {none: {limit: 0/h, by: constant}}\n\
         routes: [{upstream: app, rate_limits: [none]}]\n",
    );
    let mut raw = Raw::client(lane.address, &[]);
    raw.send(&frames::window_update(0, 1 << 30));
    let mut next = (0..).map(|n| n * 2 + 1);
    for _ in 0..15 {
        let streams: Vec<u32> = next.by_ref().take(100).collect();
        let heads = streams
            .iter()
            .flat_map(|stream| frames::request(*stream, 0, "POST", "/", &[]));
        assert!(raw.send(&heads.collect::<Vec<_>>()));
        for _ in &streams {
            raw.until(frames::Frame::ends_stream);
        }
        let bodies = streams
            .iter()
            .flat_map(|stream| frames::frame(DATA, END_STREAM, *stream, b"abc"));
        assert!(raw.send(&bodies.collect::<Vec<_>>()));
    }
    let last = next.next().unwrap();
    raw.send(&frames::request(last, 0, "POST", "/", &[]));
    let answer = raw.answer(last);
    assert_eq!(answer.status, Some(429), "{answer:?}");
    // One that does not come is not waited for for ever.
    let reset = raw.until(|frame| frame.kind == RST_STREAM);
    assert_eq!((reset.stream, reset.code()), (last, Some(NO_ERROR)));
}

/// A page that a browser leaves.
#[test]
fn many_requests_may_be_taken_back_at_once() {
    let lane = Lane::start("listen: '127.0.0.1:0'\nupstream: http://127.0.0.1:1\n");
    let mut raw = Raw::client(lane.address, &[]);
    let streams = || (0..90).map(|n| n * 2 + 1);
    let all = streams().map(|stream| frames::get(stream, "/"));
    let all = all.chain(streams().map(|stream| frames::reset(stream, CANCEL)));
    raw.send(&all.flatten().collect::<Vec<_>>());
    raw.send(&frames::get(1001, "/"));
    let answer = raw.answer(1001);
    assert_eq!(answer.status, Some(502), "{answer:?}");
}

#[test]
fn a_body_over_the_limit_is_a_413() {
    on_each_pairing(async |mut world| {
        let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
        let mut body = std::mem::replace(&mut call.body, Outgoing::Ended);
        let mut asked = world.origin.asked().await;
        let send = async {
            let _ = body.send(&vec![b'x'; 11 << 20]).await;
            body
        };
        let take = async {
            let mut taken = 0;
            while let Ok(Some(data)) = asked.body.data().await {
                taken += data.len();
            }
            taken
        };
        let (_body, taken, answer) = tokio::join!(send, take, call.answer());
        assert!(taken <= 10 << 20, "{taken}");
        assert_eq!(answer.status, 413);
    });
}

#[test]
fn a_fallback_is_no_success_of_grpc() {
    let lane = Lane::start(
        "listen: '127.0.0.1:0'\n\
         upstreams: {app: {endpoints: 'http://127.0.0.1:1', circuit_breaker: b}}\n\
         circuit_breakers: {b: {consecutive_failures: 1, open_for: 1h, fallback: {status: 200, body: '[]'}}}\n",
    );
    assert_eq!(lane.connect().get("/").status, 502);
    assert_eq!(lane.connect().get("/").status, 200);
    run(async {
        let mut client = Client::connect(Version::Two, lane.address).await;
        let fields = [("content-type", "application/grpc"), ("te", "trailers")];
        let call = client.call("POST", "/", &fields, Length::None).await;
        let answer = call.answer().await;
        assert_eq!(field(&answer.fields, "grpc-status"), Some("14"));
    });
}

#[test]
fn a_drain_ends_what_has_begun_and_begins_nothing() {
    on_each_pairing(async |mut world| {
        let (mut call, mut asked) = world.upload(b"abc").await;
        world.lane.drain();
        eventually(|| TcpStream::connect(world.lane.address).is_err());
        call.body.finish(b"def").await.unwrap();
        assert_eq!(asked.body.rest().await.unwrap().0, b"def");
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        out.send(b"ghi").await.unwrap();
        let mut answer = call.answer().await;
        answer.body.expect(b"ghi").await;
        out.end(&[("x-sum", "1")]).await.unwrap();
        assert_eq!(answer.body.rest().await.unwrap().1.len(), 1);
    });
}

#[test]
fn a_drain_is_said_by_a_farewell() {
    let world = run(async { World::new(Version::Two, Version::One).await });
    let mut idle = Raw::client(world.lane.address, &[]);
    idle.until(|frame| frame.kind == frames::SETTINGS);
    world.lane.drain();
    assert_eq!(idle.farewell(), (Some(NO_ERROR), Ended::Closed));
}

#[test]
fn who_is_told_to_leave_has_asked_and_is_answered() {
    let lane = Lane::start("listen: '127.0.0.1:0'\nupstream: http://127.0.0.1:1\n");
    let client = || {
        let mut raw = Raw::client(lane.address, &[]);
        raw.until(|frame| frame.kind == frames::SETTINGS);
        raw
    };
    let ask = |raw: &mut Raw| {
        raw.send(&frames::get(1, "/"));
        assert_eq!(raw.answer(1).status, Some(502));
    };
    let (mut idle, silent) = (client(), client());
    ask(&mut idle);
    lane.leave();
    assert_eq!(idle.farewell(), (Some(NO_ERROR), Ended::Closed));
    for mut raw in [client(), silent] {
        ask(&mut raw);
        assert_eq!(raw.farewell().1, Ended::Closed);
    }
}

/// Its requests have ended once their last bytes wait to be sent, which takes as long as the client likes.
#[test]
fn a_client_that_reads_slowly_gets_all_of_its_responses_though_the_connection_is_to_end() {
    const BODY: usize = 60_000;
    let upstream = Upstream::replying(|_| {
        format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {BODY}\r\n\r\n{}",
            "x".repeat(BODY)
        )
    });
    let lane = Lane::start(&format!(
        "listen: '127.0.0.1:0'\nupstream: {}\n",
        upstream.url()
    ));
    let mut raw = Raw::client(lane.address, &[(4, 1 << 20)]);
    let socket = socket2::SockRef::from(&raw.stream);
    socket.set_recv_buffer_size(32 * 1024).unwrap();
    raw.send(&frames::window_update(0, 1 << 30));
    let streams = 100;
    (0..streams).for_each(|stream| {
        raw.send(&frames::get(2 * stream + 1, "/"));
    });
    let (mut came, mut ended) = (0, 0);
    let mut begun = None;
    while ended < streams {
        let frame = raw.until(|frame| frame.kind == frames::DATA);
        came += frame.payload.len();
        ended += u32::from(frame.ends_stream());
        let begun = begun.get_or_insert_with(|| {
            lane.drain();
            weir::clock::now()
        });
        // For longer than a farewell lasts, at 400 kB a second.
        let due = Duration::from_micros(came as u64 * 10 / 4);
        if due < Duration::from_millis(6_500) {
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }
    assert_eq!(came, BODY * streams as usize);
    assert_eq!(raw.farewell().1, Ended::Closed);
}

#[test]
fn a_connection_without_requests_ends_with_its_time() {
    let lane = |keep_alive: &str| {
        Lane::start(&format!(
            "listeners: [{{address: '127.0.0.1:0', timeouts: {{keep_alive: {keep_alive}, header_read: 500ms}}}}]\n\
             upstream: http://127.0.0.1:1\n"
        ))
    };
    let short = lane("500ms");
    let mut raw = Raw::client(short.address, &[]);
    raw.until(|frame| frame.kind == frames::SETTINGS);
    assert_eq!(raw.farewell(), (Some(NO_ERROR), Ended::Closed));

    // One that does as if it had not heard: no answer to the last ping, and no close.
    let mut raw = Raw::client(short.address, &[]);
    assert_eq!(deaf(&mut raw), Ended::Closed);

    // Requests begin the time anew.
    let long = lane("4s");
    let mut raw = Raw::client(long.address, &[]);
    for stream in [1, 3, 5] {
        std::thread::sleep(Duration::from_millis(2_400));
        raw.send(&frames::get(stream, "/"));
        assert_eq!(raw.answer(stream).status, Some(502), "{stream}");
    }
    assert_eq!(raw.farewell(), (Some(NO_ERROR), Ended::Closed));
}

/// Answers to pings are no bodies that a client takes.
#[test]
fn pings_do_not_keep_a_connection() {
    let lane = Lane::start(
        "listeners: [{address: '127.0.0.1:0', timeouts: {keep_alive: 1s}}]\nupstream: http://127.0.0.1:1\n",
    );
    let mut raw = Raw::client(lane.address, &[]);
    raw.patience(Duration::from_millis(300));
    let pings = frames::frame(PING, 0, 0, b"are you?").repeat(20);
    let ends = (0..15).any(|_| {
        raw.send(&pings);
        raw.farewell().1 == Ended::Closed
    });
    assert!(ends);
}

/// Reads without a word until the connection ends.
fn deaf(raw: &mut Raw) -> Ended {
    let mut bytes = [0; 1024];
    loop {
        match std::io::Read::read(&mut raw.stream, &mut bytes) {
            Ok(0) => return Ended::Closed,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return Ended::Hung,
        }
    }
}

#[test]
fn as_many_requests_at_once_as_the_listener_says() {
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let lane = Lane::start(&format!(
            "listeners: [{{address: '127.0.0.1:0', limits: {{max_concurrent_streams: 3}}}}]\n\
             upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: http2}}}}\n",
            origin.address
        ));
        let address = lane.address;
        let raw = tokio::task::spawn_blocking(move || {
            let mut raw = Raw::client(address, &[]);
            let said = raw.until(|frame| frame.kind == frames::SETTINGS && frame.flags == 0);
            // SETTINGS_MAX_CONCURRENT_STREAMS.
            assert!(
                said.payload
                    .chunks(6)
                    .any(|setting| setting == [0, 3, 0, 0, 0, 3])
            );
            for stream in [1, 3, 5, 7] {
                raw.send(&frames::get(stream, "/"));
            }
            assert_eq!(raw.answer(7).reset, Some(frames::REFUSED_STREAM));
            raw
        });
        let mut asked = Vec::new();
        for _ in 0..3 {
            asked.push(origin.asked().await);
        }
        let mut raw = raw.await.unwrap();
        assert!(origin.is_quiet().await);
        for asked in &mut asked {
            asked.ok("done").await;
        }
        let answered = tokio::task::spawn_blocking(move || {
            assert!(raw.answer(5).whole);
            raw.send(&frames::get(9, "/"));
            raw.answer(9)
        });
        origin.asked().await.ok("done").await;
        assert_eq!(answered.await.unwrap().status, Some(200));
    });
}

#[test]
#[expect(clippy::disallowed_methods, reason = "what is measured")]
fn a_preface_and_a_head_have_their_time() {
    let lane = Lane::start(
        "listeners: [{address: '127.0.0.1:0', timeouts: {header_read: 500ms, keep_alive: 30s}}]\nupstream: http://127.0.0.1:1\n",
    );
    let headers = frames::frame(
        frames::HEADERS,
        frames::END_STREAM,
        1,
        &frames::block(&[(":method", "GET")]),
    );
    let whole = [frames::PREFACE, &frames::settings(&[])].concat();
    for (name, begin) in [
        ("part of the preface", frames::PREFACE[..10].to_vec()),
        ("the preface", frames::PREFACE.to_vec()),
        ("part of the settings", whole[..whole.len() - 2].to_vec()),
        (
            "part of a frame's head",
            [&whole[..], &headers[..5]].concat(),
        ),
        (
            "part of a head",
            [&whole[..], &headers[..headers.len() - 3]].concat(),
        ),
        ("a head that goes on", [&whole[..], &headers].concat()),
        (
            "a head that goes on, in part",
            [&whole[..], &headers, &[0, 0, 100, 9, 0, 0, 0, 0, 1, 0]].concat(),
        ),
    ] {
        let began = Instant::now();
        let mut raw = Raw::of(TcpStream::connect(lane.address).unwrap());
        raw.send(&begin);
        assert_eq!(deaf(&mut raw), Ended::Closed, "{name}");
        assert!(began.elapsed() > Duration::from_millis(400), "{name}");
        assert!(
            began.elapsed() < Duration::from_secs(4),
            "{name}: {:?}",
            began.elapsed()
        );
    }
}

/// A lane with a route that answers at once, and one to an upstream that never does.
fn quick_and_held() -> (Lane, TcpListener) {
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let lane = Lane::start(&format!(
        "listen: '127.0.0.1:0'\nupstreams: {{held: {{endpoints: ['http://{}']}}}}\n\
         routes: [{{match: {{path: /held}}, upstream: held}}, {{reply: {{status: 200, body: quick}}}}]\n",
        held.local_addr().unwrap()
    ));
    (lane, held)
}

/// More than are too many of those that are taken back soon.
const MANY: u32 = 120;

/// A page that was waited for in vain.
#[test]
fn requests_that_were_waited_for_may_be_taken_back_however_many() {
    let (lane, _held) = quick_and_held();
    let mut raw = Raw::client(lane.address, &[]);
    let streams = || (0..MANY).map(|n| n * 2 + 1);
    let all: Vec<_> = streams().flat_map(|it| frames::get(it, "/held")).collect();
    raw.send(&all);
    raw.send(&frames::get(1001, "/"));
    assert_eq!(raw.answer(1001).status, Some(200));
    // It is the time since they came that counts: before the one behind them was answered.
    let came = weir::clock::now();
    eventually(|| came.elapsed() > Duration::from_millis(1_200));
    let all: Vec<_> = streams().flat_map(|it| frames::reset(it, CANCEL)).collect();
    raw.send(&all);
    raw.send(&frames::get(1003, "/"));
    let answer = raw.answer(1003);
    assert_eq!(answer.status, Some(200), "{answer:?}");
}

#[test]
fn who_is_answered_more_often_than_it_takes_back_goes_on() {
    let (lane, _held) = quick_and_held();
    let mut raw = Raw::client(lane.address, &[]);
    let mut streams = (0..).map(|n| n * 2 + 1);
    for stream in streams.by_ref().take(MANY as usize + 50) {
        raw.send(&frames::get(stream, "/"));
        assert_eq!(raw.answer(stream).status, Some(200));
    }
    let taken_back: Vec<u32> = streams.by_ref().take(MANY as usize).collect();
    let all = taken_back.iter().map(|it| frames::get(*it, "/held"));
    let all = all.chain(taken_back.iter().map(|it| frames::reset(*it, CANCEL)));
    raw.send(&all.flatten().collect::<Vec<_>>());
    let last = streams.next().unwrap();
    raw.send(&frames::get(last, "/"));
    let answer = raw.answer(last);
    assert_eq!(answer.status, Some(200), "{answer:?}");
}
