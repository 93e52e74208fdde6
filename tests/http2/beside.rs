//! Both bodies of a request at once, of which one is slow, waits, or ends before its time.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use super::harness::at_once;
use super::harness::versions::{
    Broken, Client, Incoming, Length, Origin, Outgoing, PAIRINGS, Version, run,
};
use super::streams::{SOON, ahead_of};
use super::{BothWays, Lane, World, on_each_pairing};

/// The client does not read yet.
#[test]
fn a_response_waits_to_be_read_while_its_request_moves() {
    on_each_pairing(async |mut world| {
        // More than the kernel keeps.
        let length = ahead_of(world.asks) + (1 << 20);
        let (call, mut asked) = world.upload(b"1").await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        let sending =
            tokio::spawn(async move { out.finish(&vec![b'x'; length]).await.map(|()| out) });
        let mut answer = call.answer().await;
        // Longer than `stream_idle`.
        for _ in 0..7 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            answer.sent.send(b"up").await.unwrap();
            asked.body.expect(b"up").await;
        }
        answer.sent.end(&[]).await.unwrap();
        assert_eq!(asked.body.rest().await.unwrap().0, b"");
        let (down, _) = answer.body.rest().await.unwrap();
        assert_eq!(down.len(), length);
        sending.await.unwrap().unwrap();
    });
}

/// A body goes on though little of a part is taken at a time, but for an attacker's little: see `answers_without_a_window`.
#[test]
fn a_slow_reader_gets_what_it_reads() {
    const WINDOW: u32 = 1200;
    let body = [b'x'; 8 * WINDOW as usize];
    // Longer than any time that is for one part.
    async fn read(incoming: &mut Incoming) -> usize {
        let mut came = 0;
        while let Some(data) = incoming.data().await.unwrap() {
            came += data.len();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        came
    }
    at_once([Version::One, Version::Two], |other| {
        eprintln!("to a client, from {other:?}");
        run(async {
            let mut world = World::new(Version::Two, other).await;
            let mut settings = h2::client::Builder::new();
            settings.initial_window_size(WINDOW);
            world.client = Client::with(&settings, world.lane.address).await;
            let call = world.client.get("/").await;
            let mut asked = world.origin.asked().await;
            let mut out = asked.reply(200, &[], Length::Known(body.len())).await;
            out.finish(&body).await.unwrap();
            let mut answer = call.answer().await;
            assert_eq!(read(&mut answer.body).await, body.len());
        });
        at_once([false, true], |early| {
            eprintln!("to an upstream, from {other:?}, early: {early}");
            run(async {
                let mut settings = h2::server::Builder::new();
                settings.initial_window_size(WINDOW);
                let origin = Origin::with(Version::Two, &settings).await;
                let mut world = World::before(other, Version::Two, origin, "timeout: 2s").await;
                let length = Length::Known(body.len());
                let mut call = world.client.call("POST", "/", &[], length).await;
                call.body.finish(&body).await.unwrap();
                let mut asked = world.origin.asked().await;
                let mut out = None;
                if early {
                    out = Some(asked.reply(200, &[], Length::Unknown).await);
                }
                assert_eq!(read(&mut asked.body).await, body.len());
                match &mut out {
                    Some(out) => out.end(&[]).await.unwrap(),
                    None => asked.ok("").await,
                }
                assert_eq!(call.whole().await.0, 200);
            });
        });
    });
}

/// Whom both bodies of a request wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Staller {
    /// It sends no more of its body, for which the upstream may wait.
    Client,
    /// It reads no more.
    Upstream,
}

/// Idle streams of clients must not trip the breaker of an upstream that listens.
#[test]
fn where_nothing_moves_whoever_is_waited_for_is_to_blame() {
    let cases = PAIRINGS.map(|pairing| [(pairing, Staller::Client), (pairing, Staller::Upstream)]);
    at_once(cases.into_iter().flatten(), |((asks, serves), staller)| {
        run(async {
            let origin = Origin::start(serves).await;
            let lane = Lane::start(&format!(
                "listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: 2s}}}}]\n\
                 upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: {}, circuit_breaker: b}}}}\n\
                 circuit_breakers: {{b: {{consecutive_failures: 1, open_for: 1h}}}}\n",
                origin.address,
                serves.name()
            ));
            let mut world = World::of(lane, asks, serves, origin).await;
            let BothWays {
                asked: _asked,
                out: _out,
                mut answer,
            } = world.both_ways(b"abc").await;
            let (reason, state) = match staller {
                Staller::Client => ("body_timeout", "closed"),
                Staller::Upstream => {
                    answer.sent.pour().await;
                    ("upstream_aborted", "open")
                }
            };
            let broken = timeout(SOON, answer.body.rest()).await;
            assert_eq!(
                broken,
                Ok(Err(Broken)),
                "{asks:?} to {serves:?}, {staller:?}"
            );
            world.ends(reason, 1).await;
            assert_eq!(
                world.lane.state(),
                state,
                "{asks:?} to {serves:?}, {staller:?}"
            );
        });
    });
}

/// Why a body that is sent beside its response is one no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    TooLarge,
    Malformed,
    /// The client sends no more, and yet may read.
    CutShort,
}

/// What is left of the response is not waited for: its upstream may be waiting for the rest of the request.
#[test]
fn an_upload_that_ends_in_fault_ends_its_exchange() {
    for (asks, serves) in PAIRINGS {
        for fault in [Fault::TooLarge, Fault::Malformed, Fault::CutShort] {
            if asks == Version::Two && fault != Fault::TooLarge {
                continue; // There are no chunks, and an end is one.
            }
            eprintln!("from {asks:?} to {serves:?}, {fault:?}");
            run(async {
                let origin = Origin::start(serves).await;
                let lane = Lane::start(&format!(
                    "listeners: [{{address: '127.0.0.1:0', limits: {{max_body: 1KiB}}}}]\n\
                     upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: {}, concurrency: {{max: 1, pending: 0}}}}}}\n",
                    origin.address,
                    serves.name()
                ));
                let mut world = World::of(lane, asks, serves, origin).await;
                let BothWays {
                    mut asked,
                    mut out,
                    mut answer,
                } = world.both_ways(b"abc").await;
                match (fault, &mut answer.sent) {
                    (Fault::TooLarge, sent) => sent.send(&[b'x'; 2000]).await.unwrap(),
                    (Fault::Malformed, Outgoing::One { stream, .. }) => {
                        stream.write_all(b"zz\r\n").await.unwrap();
                    }
                    (_, sent) => *sent = Outgoing::Ended,
                }
                let told = timeout(SOON, asked.taken_back(&mut out)).await;
                assert!(told.is_ok(), "the upstream is told");
                let broken = timeout(SOON, answer.body.rest()).await;
                assert_eq!(broken, Ok(Err(Broken)));
                let reason = match fault {
                    Fault::TooLarge => "body_too_large",
                    Fault::Malformed | Fault::CutShort => "bad_body",
                };
                world.ends(reason, 1).await;
                world.is_fine().await;
            });
        }
    }
}
