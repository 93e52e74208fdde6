//! HTTP/2 at either side: each pairing of a client's and an upstream's version carries messages and streams as the others do.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test measures is printed"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod beside;
mod connections;
mod crowds;
mod deadlines;
mod failures;
mod identity;
mod messages;
mod records;
mod streams;
mod tries;
mod upstreams;

use harness::versions::{
    Answer, Asked, Call, Client, Length, Origin, Outgoing, PAIRINGS, Version, run,
};
use harness::{Lane, at_once};

/// A lane between a client and an upstream that the test plays.
struct World {
    lane: Lane,
    client: Client,
    origin: Origin,
    /// Of the client.
    asks: Version,
    /// Of the upstream.
    serves: Version,
}

/// A request and its response, under way.
struct BothWays {
    asked: Asked,
    out: Outgoing,
    answer: Answer,
}

impl World {
    async fn new(asks: Version, serves: Version) -> World {
        let origin = Origin::start(serves).await;
        World::before(asks, serves, origin, "timeout: 5s").await
    }

    /// In front of this upstream, with these keys in its configuration.
    async fn before(asks: Version, serves: Version, origin: Origin, keys: &str) -> World {
        World::behind("timeouts: {stream_idle: 2s}", asks, serves, origin, keys).await
    }

    /// The same, behind a listener of these keys.
    async fn behind(
        listener: &str,
        asks: Version,
        serves: Version,
        origin: Origin,
        keys: &str,
    ) -> World {
        // Unless it is what is tested, a busy machine may take its time.
        let time = match keys.contains("connect_timeout") {
            true => "",
            false => "connect_timeout: 60s, ",
        };
        let lane = Lane::start(&format!(
            "listeners: [{{address: '127.0.0.1:0', {listener}}}]\n\
             upstreams: {{app: {{endpoints: ['http://{}'], protocol: {}, {time}{keys}}}}}\nsessions: {{web: {{}}}}\n",
            origin.address,
            serves.name()
        ));
        World::of(lane, asks, serves, origin).await
    }

    /// By a lane that is in front of this upstream.
    async fn of(lane: Lane, asks: Version, serves: Version, origin: Origin) -> World {
        World {
            client: Client::connect(asks, lane.address).await,
            lane,
            origin,
            asks,
            serves,
        }
    }

    /// A request with a body of no known length, of which this has come to the upstream.
    async fn upload(&mut self, first: &[u8]) -> (Call, Asked) {
        let mut call = self.client.call("POST", "/", &[], Length::Unknown).await;
        call.body.send(first).await.unwrap();
        let mut asked = self.origin.asked().await;
        asked.body.expect(first).await;
        (call, asked)
    }

    /// An upload, and of its response as much: both may go on.
    async fn both_ways(&mut self, first: &[u8]) -> BothWays {
        let (call, mut asked) = self.upload(first).await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        out.send(first).await.unwrap();
        let mut answer = call.answer().await;
        answer.body.expect(first).await;
        BothWays { asked, out, answer }
    }

    /// How many requests ended for this reason.
    fn ended(&self, reason: &'static str) -> u64 {
        self.lane
            .plan
            .borrow()
            .metrics
            .requests
            .rejection(reason)
            .get()
    }
}

/// Runs a test for each pairing of versions.
fn on_each_pairing(test: impl AsyncFn(World) + Sync) {
    at_once(PAIRINGS, |(asks, serves)| {
        run(async { test(World::new(asks, serves).await).await });
    });
}
