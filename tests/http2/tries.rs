//! Other tries of a request, from each version to each.

use std::time::Duration;

use h2::Reason;

use crate::World;
use crate::harness::eventually;
use crate::harness::versions::{Length, Origin, PAIRINGS, Version, field, run};

const KEYS: &str = "retries: {attempts: 2, retry_on: [reset, 5xx], methods: [GET, PUT], buffer: 1KiB, backoff: {base: 1ms}}";

/// Runs a test for each pairing of versions, with retries.
fn on_each_pairing(test: impl AsyncFn(World)) {
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(async {
            let origin = Origin::start(serves).await;
            test(World::before(asks, serves, origin, KEYS).await).await;
        });
    }
}

fn retries(world: &World, result: &str) -> f64 {
    let series = format!("weir_upstream_retries_total{{upstream=\"app\",result=\"{result}\"}}");
    world.lane.told(&series).unwrap()
}

#[test]
fn a_response_is_thrown_away_for_its_status() {
    on_each_pairing(async |mut world| {
        let call = world.client.get("/").await;
        for _ in 0..2 {
            let mut asked = world.origin.asked().await;
            let mut body = asked
                .reply(503, &[("x-try", "bad")], Length::Known(4))
                .await;
            let _ = body.finish(b"away").await;
        }
        world.origin.asked().await.ok("served").await;
        let mut answer = call.answer().await;
        assert_eq!((answer.status, field(&answer.fields, "x-try")), (200, None));
        assert_eq!(answer.body.rest().await.unwrap().0, b"served");
        assert_eq!(retries(&world, "sent"), 2.0);
        eventually(|| retries(&world, "rescued") == 1.0);
    });
}

#[test]
fn the_last_response_is_told_once_all_tries_are_used() {
    on_each_pairing(async |mut world| {
        let call = world.client.get("/").await;
        for body in ["one", "two", "three"] {
            let mut asked = world.origin.asked().await;
            let mut reply = asked.reply(503, &[], Length::Known(body.len())).await;
            let _ = reply.finish(body.as_bytes()).await;
        }
        assert_eq!(call.whole().await, (503, "three".to_owned()));
        assert_eq!(retries(&world, "exhausted"), 1.0);
        assert!(world.origin.is_quiet().await);
    });
}

#[test]
fn a_body_that_is_kept_is_sent_again_whole() {
    on_each_pairing(async |mut world| {
        for length in [Length::Known(9), Length::Unknown] {
            let mut call = world.client.call("PUT", "/", &[], length).await;
            call.body.send(b"abc").await.unwrap();
            // Answered before the body is here, and broken off within it, and then taken.
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"abc").await;
            asked.reply(503, &[], Length::None).await;
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"abc").await;
            call.body.send(b"def").await.unwrap();
            asked.body.expect(b"def").await;
            drop(asked);
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"abcdef").await;
            call.body.finish(b"ghi").await.unwrap();
            asked.body.expect(b"ghi").await;
            assert_eq!(asked.body.rest().await.unwrap().0, b"");
            asked.ok("served").await;
            assert_eq!(call.whole().await, (200, "served".to_owned()));
        }
    });
}

/// How long a client takes to send is no part of the time for all tries, whatever ends the wait for it.
#[test]
fn a_slow_upload_leaves_time_for_another_try() {
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(async {
            let origin = Origin::start(serves).await;
            let keys = format!("timeout: 1s, {KEYS}");
            let mut world = World::before(asks, serves, origin, &keys).await;
            let mut call = world.client.call("PUT", "/", &[], Length::Known(6)).await;
            call.body.send(b"abc").await.unwrap();
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"abc").await;
            // For longer than all tries may take.
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            asked.reset(Reason::INTERNAL_ERROR);
            drop(asked);
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"abc").await;
            call.body.finish(b"def").await.unwrap();
            asked.body.expect(b"def").await;
            asked.ok("served").await;
            assert_eq!(call.whole().await, (200, "served".to_owned()));
            assert_eq!(retries(&world, "out_of_time"), 0.0);
        });
    }
}

#[test]
fn trailers_are_sent_again_with_the_body() {
    // Between two sides of HTTP/1.1, too: a chunked body has them.
    on_each_pairing(async |mut world| {
        let mut call = world.client.call("PUT", "/", &[], Length::Unknown).await;
        call.body.send(b"abc").await.unwrap();
        call.body.end(&[("x-sum", "6")]).await.unwrap();
        let mut asked = world.origin.asked().await;
        asked.body.rest().await.unwrap();
        asked.reply(503, &[], Length::None).await;
        let mut asked = world.origin.asked().await;
        let (body, trailers) = asked.body.rest().await.unwrap();
        assert_eq!(
            (body, field(&trailers, "x-sum")),
            (b"abc".to_vec(), Some("6"))
        );
        asked.ok("served").await;
        assert_eq!(call.whole().await.0, 200);
    });
}

#[test]
fn a_body_longer_than_what_is_kept_is_sent_once() {
    on_each_pairing(async |mut world| {
        for length in [Length::Known(2048), Length::Unknown] {
            let mut call = world.client.call("PUT", "/", &[], length).await;
            let long = [b'x'; 2048];
            call.body.finish(&long).await.unwrap();
            let mut asked = world.origin.asked().await;
            asked.body.expect(&long).await;
            asked.body.rest().await.unwrap();
            asked.reply(503, &[], Length::None).await;
            assert_eq!(call.whole().await.0, 503);
        }
        assert!(world.origin.is_quiet().await);
    });
}

#[test]
fn what_may_not_be_done_twice_is_sent_once() {
    on_each_pairing(async |mut world| {
        let mut call = world.client.call("POST", "/", &[], Length::Known(3)).await;
        call.body.finish(b"pay").await.unwrap();
        let mut asked = world.origin.asked().await;
        asked.body.expect(b"pay").await;
        asked.reply(503, &[], Length::None).await;
        assert_eq!(call.whole().await.0, 503);
        assert!(world.origin.is_quiet().await);
    });
}

/// By RFC 9113 section 8.7, which `reset_before_request` is for.
#[test]
fn what_an_upstream_did_not_look_at_is_sent_again_whatever_the_method() {
    for asks in [Version::One, Version::Two] {
        run(async {
            let origin = Origin::start(Version::Two).await;
            let keys =
                "retries: {retry_on: [reset_before_request], buffer: 1KiB, backoff: {base: 1ms}}";
            let mut world = World::before(asks, Version::Two, origin, keys).await;
            let mut call = world.client.call("POST", "/", &[], Length::Known(3)).await;
            call.body.finish(b"pay").await.unwrap();
            // Twice without a word in the file, and then as it says.
            for _ in 0..2 {
                world.origin.asked().await.reset(Reason::REFUSED_STREAM);
            }
            let mut asked = world.origin.asked().await;
            asked.body.expect(b"pay").await;
            asked.ok("paid").await;
            assert_eq!(call.whole().await, (200, "paid".to_owned()));
            eventually(|| retries(&world, "rescued") == 1.0);
        });
    }
}

/// Each of a byte: what is kept is the bytes.
#[test]
fn a_body_of_many_small_parts_is_sent_again_whole() {
    on_each_pairing(async |mut world| {
        let mut call = world.client.call("PUT", "/", &[], Length::Unknown).await;
        let mut asked = world.origin.asked().await;
        let text: Vec<u8> = (0..1024).map(|n| b'a' + (n % 26) as u8).collect();
        for byte in &text {
            call.body.send(&[*byte]).await.unwrap();
        }
        asked.body.expect(&text).await;
        asked.reply(503, &[], Length::None).await;
        let mut asked = world.origin.asked().await;
        asked.body.expect(&text).await;
        call.body.end(&[]).await.unwrap();
        assert_eq!(asked.body.rest().await.unwrap().0, b"");
        asked.ok("served").await;
        assert_eq!(call.whole().await, (200, "served".to_owned()));
    });
}
