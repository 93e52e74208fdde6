//! What endpoints and breakers are told of exchanges that fail where HTTP/2 is at a side.

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use h2::Reason;

use super::harness::frames::{self, DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM};
use super::harness::versions::{Asked, Call, Client, Length, Origin, Version, run};
use super::harness::{Lane, PATIENCE, at_once, eventually};
use super::upstreams::{answer, answer_all, lane, next_request, numbered};

const GRPC: [(&str, &str); 2] = [("content-type", "application/grpc"), ("te", "trailers")];

/// Two endpoints behind a lane that ejects one of them, once it fails three times in a row.
struct World {
    lane: Lane,
    client: Client,
    one: Origin,
    two: Origin,
}

impl World {
    async fn new(asks: Version) -> World {
        let one = Origin::start(Version::Two).await;
        let two = Origin::start(Version::Two).await;
        let lane = Lane::start(&format!(
            "listen: '127.0.0.1:0'\n\
             upstreams: {{app: {{endpoints: ['http://{}', 'http://{}'], connect_timeout: 60s, protocol: http2, load_balancing: round_robin, \
             outlier_detection: {{consecutive_5xx: 3, base_ejection_time: 1h, max_ejection_percent: 50}}}}}}\n",
            one.address, two.address
        ));
        let client = Client::connect(asks, lane.address).await;
        World {
            lane,
            client,
            one,
            two,
        }
    }

    async fn asked(&mut self) -> Asked {
        tokio::select! {
            asked = self.one.asked() => asked,
            asked = self.two.asked() => asked,
        }
    }

    async fn call(&mut self, length: Length) -> (Call, Asked) {
        let call = self.client.call("POST", "/", &GRPC, length).await;
        (call, self.asked().await)
    }

    fn ejected(&self) -> usize {
        self.lane.plan.borrow().upstreams[0].live.counts().ejected
    }
}

#[test]
fn an_endpoint_that_breaks_off_its_bodies_is_ejected() {
    for asks in [Version::One, Version::Two] {
        run(async {
            let mut world = World::new(asks).await;
            for _ in 0..6 {
                let call = world.client.get("/").await;
                let mut asked = world.asked().await;
                let mut out = asked.reply(200, &[], Length::Unknown).await;
                out.send(b"part").await.unwrap();
                let mut answer = call.answer().await;
                answer.body.expect(b"part").await;
                asked.reset(Reason::INTERNAL_ERROR);
                out.reset();
                assert!(answer.body.rest().await.is_err());
            }
            eventually(|| world.ejected() == 1);
        });
    }
}

#[test]
fn an_endpoint_that_says_that_it_is_unwell_is_ejected() {
    let said = [("content-type", "application/grpc"), ("grpc-status", "14")];
    run(async {
        let mut world = World::new(Version::Two).await;
        for _ in 0..6 {
            let (call, mut asked) = world.call(Length::None).await;
            asked.reply(200, &said, Length::None).await;
            assert_eq!(call.answer().await.status, 200);
        }
        eventually(|| world.ejected() == 1);
        // Behind a body likewise, and with what Envoy takes for a 500; what is wrong with a call says nothing of the endpoint.
        let faults = [("14", 1), ("2", 1), ("13", 1), ("15", 1)];
        let calls = [("3", 0), ("4", 0), ("12", 0)];
        for (status, ejected) in faults.into_iter().chain(calls) {
            let mut world = World::new(Version::Two).await;
            for _ in 0..6 {
                let (call, mut asked) = world.call(Length::None).await;
                let mut out = asked.reply(200, &said[..1], Length::Unknown).await;
                out.send(b"part").await.unwrap();
                out.end(&[("grpc-status", status)]).await.unwrap();
                assert_eq!(call.whole().await.0, 200);
            }
            eventually(|| world.ejected() == ejected);
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!(world.ejected(), ejected, "{status}");
        }
    });
}

/// A call of gRPC streams for as long as it likes: that it is not whole yet excuses no reset.
#[test]
fn calls_that_are_open_count_where_they_are_reset() {
    run(async {
        let mut world = World::new(Version::Two).await;
        for _ in 0..6 {
            let (call, mut asked) = world.call(Length::Unknown).await;
            asked.reset(Reason::INTERNAL_ERROR);
            assert_eq!(call.answer().await.status, 200);
        }
        eventually(|| world.ejected() == 1);

        let mut origin = Origin::start(Version::Two).await;
        let lane = Lane::start(&format!(
            "listen: '127.0.0.1:0'\n\
             upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: http2, circuit_breaker: b}}}}\n\
             circuit_breakers: {{b: {{consecutive_failures: 3, open_for: 1h}}}}\n",
            origin.address
        ));
        let mut client = Client::connect(Version::Two, lane.address).await;
        for _ in 0..3 {
            let call = client.call("POST", "/", &GRPC, Length::Unknown).await;
            origin.asked().await.reset(Reason::INTERNAL_ERROR);
            assert_eq!(call.answer().await.status, 200);
        }
        eventually(|| lane.state() == "open");
    });
}

/// Only the client's part of the time is not the upstream's.
#[test]
fn a_probe_whose_body_is_not_read_fails_by_its_time() {
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let lane = Lane::start(&format!(
            "listen: '127.0.0.1:0'\n\
             upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: http2, timeout: 10m, circuit_breaker: b}}}}\n\
             circuit_breakers: {{b: {{consecutive_failures: 1, open_for: 1s, jitter: 0%, half_open: {{probes: 1, probe_timeout: 1s}}}}}}\n",
            origin.address
        ));
        let mut client = Client::connect(Version::Two, lane.address).await;
        let call = client.get("/").await;
        origin.asked().await.reply(500, &[], Length::None).await;
        assert_eq!(call.answer().await.status, 500);
        eventually(|| lane.state() == "half_open");
        let mut call = client.call("POST", "/", &[], Length::Unknown).await;
        let _asked = origin.asked().await;
        call.body.pour().await;
        eventually(|| lane.state() == "open");
    });
}

/// Others' requests end with it, and so would those on the next connection.
#[test]
fn what_is_answered_by_nonsense_is_not_asked_for_again() {
    let (upstream, opened) = numbered(&[], |number, mut raw| {
        if number > 1 {
            return answer_all(raw);
        }
        let first = next_request(&mut raw).unwrap();
        answer(&mut raw, first);
        let second = next_request(&mut raw).unwrap();
        // A field that `h2` takes for an error of the connection.
        let head = frames::block(&[(":status", "200"), ("x-echo", "a\u{1}b")]);
        let flags = END_HEADERS | END_STREAM;
        raw.send(&frames::frame(HEADERS, flags, second, &head));
        while raw.next().is_ok() {}
    });
    let lane = lane(upstream);
    assert_eq!(lane.connect().get("/").status, 200);
    assert_eq!(lane.connect().get("/").status, 502);
    assert_eq!(opened.load(Ordering::Relaxed), 1);
    assert_eq!(lane.connect().get("/").status, 200);
}

/// An upload that its upstream left unread may have filled the room that a connection has for all bodies: Tomcat gives that back to none
/// where weir took the upload back just as it was answered.
#[test]
fn a_connection_that_takes_no_more_of_bodies_gets_no_others() {
    at_once([true, false], |times_out| {
        let (told, events) = mpsc::channel();
        let (upstream, opened) = numbered(&[], move |number, mut raw| {
            let mut held = None;
            while let Ok(frame) = raw.next() {
                match (number, frame.kind) {
                    (1, HEADERS) if frame.ends_stream() => {
                        held = Some(frame.stream);
                        told.send("held").unwrap();
                    }
                    (1, RST_STREAM) => {
                        answer(&mut raw, held.take().unwrap());
                        told.send("taken back").unwrap();
                    }
                    (2, DATA) if frame.ends_stream() => answer(&mut raw, frame.stream),
                    _ => {}
                }
            }
        });
        let timeout = if times_out { "2s" } else { "60s" };
        let lane = Lane::start(&format!(
            "listen: '127.0.0.1:0'\n\
             upstreams: {{app: {{endpoints: ['http://{upstream}'], protocol: http2, timeout: 60s, connect_timeout: 60s}}}}\n\
             routes: [{{match: {{path: /held}}, upstream: app}}, {{upstream: app, timeout: {timeout}}}]\n"
        ));
        let mut waits = lane.connect();
        waits.begin("GET", "/held", &[], "");
        assert_eq!(events.recv_timeout(PATIENCE), Ok("held"));
        run(async {
            let mut client = Client::connect(Version::Two, lane.address).await;
            let mut stuck = client.call("POST", "/", &[], Length::Unknown).await;
            stuck.body.pour().await;
            match times_out {
                true => assert_eq!(stuck.answer().await.status, 504),
                false => {
                    // A second that nothing of it is taken in, and some.
                    tokio::time::sleep(Duration::from_millis(1500)).await;
                    stuck.body.reset();
                }
            }
        });
        assert_eq!(events.recv_timeout(PATIENCE), Ok("taken back"));
        assert_eq!(waits.finish().status, 200);
        assert_eq!(lane.connect().send("POST", "/", &[], "abc").status, 200);
        assert_eq!(opened.load(Ordering::Relaxed), 2);
    });
}
