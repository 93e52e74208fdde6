//! Bodies as they come: both ways at once, cut off by either side, and no faster than they are read.

use std::fs;
use std::pin::pin;
use std::time::Duration;

use h2::Reason;
use tokio::time::timeout;

use super::harness::far::far;
use super::harness::process::{Running, file};
use super::harness::versions::{
    Broken, Client, Length, Origin, Outgoing, PAIRINGS, Version, field, run,
};
use super::harness::{Lane, at_once};
use super::{BothWays, World, on_each_pairing};

/// What a sender may be ahead of its receiver, in bytes: weir's windows, its buffers, and the kernel's.
const AHEAD: usize = 3 << 19;

/// As [`AHEAD`], where weir speaks this version to the receiver. The kernel takes what it likes of HTTP/1.1, which has no windows.
pub(super) fn ahead_of(receiver: Version) -> usize {
    let most = |name: &str| {
        let sizes = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap();
        let most = sizes.split_whitespace().last().unwrap();
        most.parse::<usize>().unwrap()
    };
    match receiver {
        Version::One => AHEAD + most("tcp_wmem") + most("tcp_rmem"),
        Version::Two => AHEAD,
    }
}

/// Within which the other side hears of an end.
pub(super) const SOON: Duration = Duration::from_secs(20);

/// Once a `stream_idle` is over, before another is.
const NO_SECOND_TIME: Duration = Duration::from_secs(1);

/// As [`on_each_pairing`], where no time is over within [`SOON`].
fn on_each_patient_pairing(test: impl AsyncFn(World) + Sync) {
    at_once(PAIRINGS, |(asks, serves)| {
        run(async {
            let origin = Origin::start(serves).await;
            test(World::behind(PATIENT, asks, serves, origin, "timeout: 60s").await).await;
        });
    });
}

const PATIENT: &str = "timeouts: {stream_idle: 60s, request_read: 60s}";

impl World {
    /// The lane serves on, on the client's connection too.
    pub(super) async fn is_fine(&mut self) {
        let call = self.client.get("/fine").await;
        let mut asked = self.origin.asked().await;
        assert_eq!(asked.path, "/fine");
        asked.ok("fine").await;
        assert_eq!(call.whole().await, (200, "fine".to_owned()));
    }

    /// Waits until requests ended so often for this reason.
    pub(super) async fn ends(&self, reason: &'static str, times: u64) {
        let deadline = tokio::time::Instant::now() + SOON;
        while self.ended(reason) != times {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{reason}: {}",
                self.ended(reason)
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[test]
fn both_ways_go_on_at_once() {
    on_each_pairing(async |mut world| {
        let (call, mut asked) = world.upload(b"1").await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        // Answered, though the request is not whole yet.
        let mut answer = call.answer().await;
        for round in ["2", "3", "4"] {
            out.send(round.as_bytes()).await.unwrap();
            answer.body.expect(round.as_bytes()).await;
            answer.sent.send(round.as_bytes()).await.unwrap();
            asked.body.expect(round.as_bytes()).await;
        }
        answer.sent.end(&[]).await.unwrap();
        assert_eq!(asked.body.rest().await.unwrap().0, b"");
        // The response outlives the request.
        out.send(b"last").await.unwrap();
        answer.body.expect(b"last").await;
        out.end(&[]).await.unwrap();
        assert_eq!(answer.body.rest().await.unwrap().0, b"");
        world.is_fine().await;
    });
}

#[test]
fn one_way_may_be_silent_while_the_other_moves() {
    on_each_pairing(async |mut world| {
        let (call, mut asked) = world.upload(b"1").await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        let mut answer = call.answer().await;
        // Longer than `stream_idle`, each way.
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            out.send(b"down").await.unwrap();
            answer.body.expect(b"down").await;
        }
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            answer.sent.send(b"up").await.unwrap();
            asked.body.expect(b"up").await;
        }
        answer.sent.end(&[]).await.unwrap();
        assert_eq!(asked.body.rest().await.unwrap().0, b"");
        out.end(&[]).await.unwrap();
        assert_eq!(answer.body.rest().await.unwrap().0, b"");
    });
}

/// Once the response has begun, neither the upstream's time for it nor the client's for its body is over: only what moves nothing ends.
#[test]
fn an_upload_goes_on_beside_its_response_however_slow_either_side_is() {
    const LONG: usize = 400_000;
    at_once(PAIRINGS, |(asks, serves)| {
        run(async {
            let origin = Origin::start(serves).await;
            let timeouts = "timeouts: {stream_idle: 2s, request_read: 2s}";
            let mut world = World::behind(timeouts, asks, serves, origin, "timeout: 2s").await;
            let (call, mut asked) = world.upload(b"1").await;
            let mut out = asked.reply(200, &[], Length::Unknown).await;
            let mut answer = call.answer().await;
            // The upstream speaks, and does not read; then the client is silent, both for longer than their times.
            let long = vec![b'x'; LONG];
            let slowly = async {
                for _ in 0..5 {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    out.send(b"down").await.unwrap();
                }
                asked.body.expect(&long).await;
            };
            let (sent, ()) = tokio::join!(answer.sent.send(&long), slowly);
            sent.unwrap();
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(500)).await;
                out.send(b"down").await.unwrap();
            }
            answer.sent.send(b"last").await.unwrap();
            asked.body.expect(b"last").await;
            answer.sent.end(&[]).await.unwrap();
            assert_eq!(asked.body.rest().await.unwrap().0, b"");
            out.end(&[]).await.unwrap();
            let (down, _) = answer.body.rest().await.unwrap();
            assert_eq!(down.len(), 10 * b"down".len(), "{asks:?} to {serves:?}");
        });
    });
}

/// `stream_idle` begins with the response's head, however late that is.
#[test]
fn a_late_head_leaves_its_body_time() {
    at_once(PAIRINGS, |(asks, serves)| {
        run(async {
            let origin = Origin::start(serves).await;
            let keys = "timeout: 20s";
            let mut world =
                World::behind("timeouts: {stream_idle: 4s}", asks, serves, origin, keys).await;
            let call = world.client.get("/").await;
            let mut asked = world.origin.asked().await;
            tokio::time::sleep(Duration::from_millis(4_500)).await;
            let mut out = asked.reply(200, &[], Length::Unknown).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            out.finish(b"late").await.unwrap();
            assert_eq!(call.whole().await, (200, "late".to_owned()));
        });
    });
}

/// The response is silent meanwhile.
#[test]
fn what_is_left_of_an_upload_takes_its_time() {
    at_once(PAIRINGS, |(asks, serves)| {
        run(async {
            let origin = Origin::start(serves).await;
            // Longer than what the kernel may keep of it on its way.
            let listener =
                "timeouts: {stream_idle: 9s, request_read: 2s}, limits: {max_body: 1GiB}";
            let mut world = World::behind(listener, asks, serves, origin, "timeout: 2s").await;
            let length = Length::Known(1 << 30);
            let mut call = world.client.call("POST", "/", &[], length).await;
            call.body.send(b"1").await.unwrap();
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"1").await;
            let _out = asked.reply(200, &[], Length::Unknown).await;
            let mut answer = call.answer().await;
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_millis(600)).await;
                answer.sent.send(b"up").await.unwrap();
                asked.body.expect(b"up").await;
            }
            // Until the upstream, which reads nothing, had more than its time.
            let taken = answer.sent.pour().await;
            tokio::time::sleep(Duration::from_millis(2_500)).await;
            let mut came = 0;
            while came < taken {
                let more = asked.body.data().await.unwrap();
                came += more.expect("what was taken arrives").len();
            }
        });
    });
}

#[test]
fn an_early_response_is_whole_whatever_becomes_of_the_request() {
    on_each_pairing(async |mut world| {
        for body in ["", "too large"] {
            let mut call = world
                .client
                .call("POST", "/", &[], Length::Known(1 << 20))
                .await;
            call.body.send(&[b'x'; 10_000]).await.unwrap();
            let mut asked = world.origin.asked().await;
            asked.body.expect(&[b'x'; 10_000]).await;
            let mut out = asked.reply(413, &[], Length::Known(body.len())).await;
            out.finish(body.as_bytes()).await.unwrap();
            // As servers do that want no more of it (RFC 9113 section 8.1).
            drop((out, asked));
            let mut answer = call.answer().await;
            assert_eq!(answer.status, 413);
            assert_eq!(answer.body.rest().await.unwrap().0, body.as_bytes());
            drop(answer);
            world.is_fine().await;
        }
        assert_eq!(
            world.ended("client_left") + world.ended("upstream_aborted"),
            0
        );
    });
}

/// What is sent and not taken gives its room back, so that others are not starved of it in the end.
#[test]
fn early_responses_leave_room_for_others() {
    on_each_pairing(async |mut world| {
        for _ in 0..30 {
            let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
            call.body.send(&[b'x'; 60_000]).await.unwrap();
            let mut asked = world.origin.asked().await;
            if world.serves == Version::One {
                // A close on unread bytes is a reset, which may overtake the answer.
                asked.body.expect(&[b'x'; 60_000]).await;
            }
            let mut out = asked.reply(413, &[], Length::Known(0)).await;
            out.end(&[]).await.unwrap();
            drop((out, asked));
            assert_eq!(call.answer().await.status, 413);
        }
        for _ in 0..30 {
            let call = world.client.get("/").await;
            let mut asked = world.origin.asked().await;
            let mut out = asked.reply(200, &[], Length::Unknown).await;
            out.send(&[b'x'; 60_000]).await.unwrap();
            let mut answer = call.answer().await;
            answer.body.expect(b"").await;
            answer.sent.reset();
            drop(answer);
            asked.taken_back(&mut out).await;
        }
        let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
        let mut asked = world.origin.asked().await;
        let mut body = std::mem::replace(&mut call.body, Outgoing::Ended);
        let up = async {
            body.finish(&vec![b'x'; 2_000_000]).await.unwrap();
            body
        };
        let (_body, came) = tokio::join!(up, asked.body.rest());
        assert_eq!(came.unwrap().0.len(), 2_000_000);
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        let down = async { out.finish(&vec![b'x'; 2_000_000]).await.unwrap() };
        let ((), (status, body)) = tokio::join!(down, call.whole());
        assert_eq!((status, body.len()), (200, 2_000_000));
    });
}

/// Whatever of it was not taken before the answer gives its room back. The upstream reads none of it.
#[test]
fn an_upload_behind_its_answer_is_over_soon() {
    on_each_pairing(async |mut world| {
        if world.asks == Version::One {
            return;
        }
        let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
        let mut body = std::mem::replace(&mut call.body, Outgoing::Ended);
        let mut up = pin!(async {
            let _ = body.finish(&vec![b'x'; 32 << 20]).await;
        });
        // By then there is no more room on the way.
        let filling = timeout(Duration::from_secs(1), &mut up);
        let (mut asked, filled) = tokio::join!(world.origin.asked(), filling);
        assert!(filled.is_err());
        let mut out = asked.reply(413, &[], Length::Known(0)).await;
        out.end(&[]).await.unwrap();
        assert_eq!(call.answer().await.status, 413);
        let since = weir::clock::now();
        up.await;
        assert!(since.elapsed() < Duration::from_secs(4));
    });
}

#[test]
fn a_client_that_leaves_before_the_answer_is_told_upstream() {
    on_each_patient_pairing(async |mut world| {
        for length in [Length::None, Length::Known(9), Length::Unknown] {
            let before = world.ended("client_left");
            let mut call = world.client.call("POST", "/", &[], length).await;
            if length != Length::None {
                call.body.send(b"abc").await.unwrap();
            }
            let mut asked = world.origin.asked().await;
            if length != Length::None {
                asked.body.expect(b"abc").await;
            }
            call.body.reset();
            drop(call);
            let told = timeout(SOON, asked.taken_back(&mut Outgoing::Ended)).await;
            assert!(told.is_ok(), "{length:?}");
            if world.asks == Version::Two || length == Length::None {
                world.ends("client_left", before + 1).await;
            }
        }
        world.is_fine().await;
    });
}

#[test]
fn a_client_that_leaves_while_it_waits_for_its_turn_is_noticed() {
    // For a request's place, and for a connection's.
    for caps in ["max: 1", "max_connections: 1"] {
        for (asks, serves) in PAIRINGS {
            if caps != "max: 1" && serves == Version::Two {
                continue; // One connection is enough.
            }
            eprintln!("{caps}, from {asks:?} to {serves:?}");
            run(async {
                let origin = Origin::start(serves).await;
                let keys = format!("connect_timeout: 60s, concurrency: {{{caps}, pending: 1}}");
                let mut world = World::behind(PATIENT, asks, serves, origin, &keys).await;
                let first = world.client.get("/").await;
                let mut asked = world.origin.asked().await;
                for left in 1..=2 {
                    let mut waits = world.client.get("/").await;
                    assert!(world.origin.is_quiet().await);
                    // One more is too many as long as it waits.
                    assert_eq!(world.client.get("/").await.whole().await.0, 503);
                    waits.body.reset();
                    drop(waits);
                    world.ends("client_left", left).await;
                }
                asked.ok("").await;
                assert_eq!(first.whole().await.0, 200);
                world.is_fine().await;
            });
        }
    }
}

#[test]
fn a_client_that_leaves_within_the_answer_is_told_upstream() {
    on_each_patient_pairing(async |mut world| {
        // Between two parts of a response only HTTP/2 tells that the client has left: `http1_to_http1` hears it as it writes.
        let silent = (world.asks, world.serves) != (Version::One, Version::One);
        let call = world.client.get("/").await;
        let mut asked = world.origin.asked().await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        out.send(b"abc").await.unwrap();
        let mut answer = call.answer().await;
        answer.body.expect(b"abc").await;
        answer.sent.reset();
        drop(answer);
        if !silent {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let _ = out.send(b"def").await;
            }
        }
        let told = timeout(SOON, asked.taken_back(&mut out)).await;
        assert!(told.is_ok());
        world.ends("client_left", 1).await;
        world.is_fine().await;
    });
}

/// The response is begun, and nothing of it is due.
#[test]
fn a_client_that_leaves_between_both_bodies_is_told_upstream() {
    on_each_patient_pairing(async |mut world| {
        let BothWays {
            mut asked,
            mut out,
            mut answer,
        } = world.both_ways(b"abc").await;
        match std::mem::replace(&mut answer.sent, Outgoing::Ended) {
            // Without an end ahead of it, behind which it might still read.
            Outgoing::One { stream, .. } => {
                let socket = socket2::SockRef::from(stream.as_ref());
                socket.set_linger(Some(Duration::ZERO)).unwrap();
                stream.forget();
            }
            mut sent @ (Outgoing::Two(_) | Outgoing::Ended) => sent.reset(),
        }
        drop(answer);
        let told = timeout(SOON, asked.taken_back(&mut out)).await;
        assert!(told.is_ok());
        world.ends("client_left", 1).await;
        world.is_fine().await;
    });
}

/// An upload that waits for the upstream, too, hears that its client has left.
#[test]
fn a_client_that_leaves_a_stalled_upload_is_told_upstream() {
    on_each_patient_pairing(async |mut world| {
        if world.asks == Version::One {
            return; // What it has sent stands between it and its end.
        }
        let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
        let mut asked = world.origin.asked().await;
        let taken = call.body.pour().await;
        assert!(taken > 0);
        call.body.reset();
        drop(call);
        world.ends("client_left", 1).await;
        timeout(SOON, asked.taken_back(&mut Outgoing::Ended))
            .await
            .unwrap();
        world.is_fine().await;
    });
}

#[test]
fn an_upstream_that_breaks_off_before_its_answer_is_a_502() {
    on_each_pairing(async |mut world| {
        for length in [Length::None, Length::Known(9), Length::Unknown] {
            for reason in [Reason::INTERNAL_ERROR, Reason::CANCEL, Reason::NO_ERROR] {
                let mut call = world.client.call("POST", "/", &[], length).await;
                if length != Length::None {
                    call.body.send(b"abc").await.unwrap();
                }
                let mut asked = world.origin.asked().await;
                if length != Length::None {
                    asked.body.expect(b"abc").await;
                }
                asked.reset(reason);
                drop(asked);
                let answer = call.answer().await;
                assert_eq!(answer.status, 502, "{length:?} {reason:?}");
                let cause = field(&answer.fields, "proxy-status");
                assert!(cause.unwrap().contains("upstream_broken"), "{cause:?}");
            }
        }
        assert!(world.origin.is_quiet().await, "none of them is sent again");
        world.is_fine().await;
    });
}

#[test]
fn an_upstream_that_breaks_off_within_its_answer_cuts_it_off() {
    on_each_patient_pairing(async |mut world| {
        for length in [Length::Known(9), Length::Unknown] {
            let before = world.ended("upstream_aborted");
            let call = world.client.get("/").await;
            let mut asked = world.origin.asked().await;
            let mut out = asked.reply(200, &[], length).await;
            out.send(b"abc").await.unwrap();
            let mut answer = call.answer().await;
            answer.body.expect(b"abc").await;
            out.reset();
            drop((out, asked));
            assert_eq!(answer.body.rest().await, Err(Broken), "{length:?}");
            world.ends("upstream_aborted", before + 1).await;
        }
        world.is_fine().await;
    });
}

#[test]
fn a_response_that_stalls_is_cut_off() {
    on_each_pairing(async |mut world| {
        let call = world.client.get("/").await;
        let mut asked = world.origin.asked().await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        out.send(b"abc").await.unwrap();
        let mut answer = call.answer().await;
        assert_eq!(answer.body.rest().await, Err(Broken));
        world.ends("upstream_aborted", 1).await;
        timeout(NO_SECOND_TIME, asked.taken_back(&mut out))
            .await
            .unwrap();
        world.is_fine().await;
    });
}

#[test]
fn a_request_that_stalls_is_refused() {
    on_each_pairing(async |mut world| {
        let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
        call.body.send(b"abc").await.unwrap();
        let mut asked = world.origin.asked().await;
        assert_eq!(call.answer().await.status, 408);
        timeout(NO_SECOND_TIME, asked.taken_back(&mut Outgoing::Ended))
            .await
            .unwrap();
        world.is_fine().await;
    });
}

#[test]
fn an_upstream_that_reads_nothing_stops_the_client() {
    on_each_pairing(async |mut world| {
        let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
        let mut asked = world.origin.asked().await;
        let taken = call.body.pour().await;
        println!("up {:?} to {:?}: {taken}", world.asks, world.serves);
        assert!(taken < ahead_of(world.serves), "{taken}");
        let mut body = std::mem::replace(&mut call.body, Outgoing::Ended);
        let (_, came) = tokio::join!(body.end(&[]), asked.body.rest());
        // What was under way when the test gave up is lost, and breaks the chunks of HTTP/1.1.
        if world.asks == Version::Two {
            assert!(came.unwrap().0.len() >= taken);
        }
    });
}

#[test]
fn a_client_that_reads_nothing_stops_the_upstream() {
    on_each_pairing(async |mut world| {
        let call = world.client.get("/").await;
        let mut asked = world.origin.asked().await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        let mut answer = call.answer().await;
        let taken = out.pour().await;
        println!("down {:?} to {:?}: {taken}", world.asks, world.serves);
        assert!(taken < ahead_of(world.asks), "{taken}");
        let (_, came) = tokio::join!(out.end(&[]), answer.body.rest());
        if world.serves == Version::Two {
            assert!(came.unwrap().0.len() >= taken);
        }
    });
}

/// One that does not read is not to take the others' room.
#[test]
fn a_stream_that_is_not_read_holds_no_other_up() {
    on_each_pairing(async |mut world| {
        let call = world.client.get("/stalled").await;
        let mut asked = world.origin.asked().await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        let stalled = call.answer().await;
        out.pour().await;
        world.is_fine().await;
        drop(stalled);
    });
}

/// A body by a window of 256 KiB would take 64 round trips, and by one of 64 KiB 256.
#[test]
fn no_window_holds_up_a_body_from_afar() {
    const BODY: usize = 16 << 20;
    const ONE_WAY: Duration = Duration::from_millis(100);
    let check = |asks, serves| {
        run(async {
            let mut origin = Origin::start(serves).await;
            let upstream = match serves {
                Version::One => origin.address,
                Version::Two => far(origin.address, ONE_WAY).await,
            };
            let lane = Lane::start(&format!(
                "listeners: [{{address: '127.0.0.1:0', limits: {{max_body: 64MiB}}}}]\n\
                 upstreams: {{app: {{endpoints: ['http://{upstream}'], connect_timeout: 60s, protocol: {}}}}}\n",
                serves.name()
            ));
            let client = match asks {
                Version::One => lane.address,
                Version::Two => far(lane.address, ONE_WAY).await,
            };
            let mut client = Client::connect(asks, client).await;
            let mut call = client.call("POST", "/", &[], Length::Unknown).await;
            let mut asked = origin.asked().await;
            let data = vec![b'x'; BODY];
            let began = tokio::time::Instant::now();
            match asks {
                Version::Two => {
                    let (sent, came) = tokio::join!(call.body.finish(&data), asked.body.rest());
                    assert!(sent.is_ok() && came.unwrap().0.len() == BODY);
                }
                Version::One => {
                    call.body.end(&[]).await.unwrap();
                    let mut out = asked.reply(200, &[], Length::Unknown).await;
                    let mut answer = call.answer().await;
                    let (sent, came) = tokio::join!(out.finish(&data), answer.body.rest());
                    assert!(sent.is_ok() && came.unwrap().0.len() == BODY);
                }
            }
            let took = began.elapsed();
            println!("{asks:?} to {serves:?}: {took:?}");
            assert!(
                took < Duration::from_secs(10),
                "{asks:?} to {serves:?}: {took:?}"
            );
        });
    };
    check(Version::Two, Version::One);
    check(Version::One, Version::Two);
}

/// What weir itself keeps of bodies that no one reads, whatever the kernel does.
#[test]
fn what_no_one_reads_takes_no_memory() {
    for (asks, serves) in PAIRINGS {
        run(async {
            let mut origin = Origin::start(serves).await;
            let config = file(&format!(
                "{{listeners: [{{address: '127.0.0.1:0'}}], admin: {{address: '127.0.0.1:0'}}, runtime: {{lanes: 1}}, \
                 upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: {}}}}}}}",
                origin.address,
                serves.name()
            ));
            let weir = Running::start(config.path());
            let mut client = Client::connect(asks, weir.address.parse().unwrap()).await;
            let call = client.get("/").await;
            origin.asked().await.ok("done").await;
            call.whole().await;
            let before = weir.memory("VmRSS");
            let mut call = client.call("POST", "/", &[], Length::Unknown).await;
            let mut asked = origin.asked().await;
            call.body.pour().await;
            let up = weir.memory("VmRSS").saturating_sub(before);
            let mut out = asked.reply(200, &[], Length::Unknown).await;
            let _answer = call.answer().await;
            out.pour().await;
            let both = weir.memory("VmRSS").saturating_sub(before);
            println!("{asks:?} to {serves:?}: {up} KiB up, {both} KiB both ways");
            assert!(both < 1536, "{asks:?} to {serves:?}: {both} KiB");
        });
    }
}
