//! A call's own deadline (`grpc-timeout`): it says nothing of the upstream, neither for nor against it.

use std::io::Read;

use h2::Reason;

use super::harness::raw::scripted;
use super::harness::versions::{Asked, Call, Client, Length, Origin, Version, field, run};
use super::harness::{Lane, eventually};

/// A call whose client waits for 100 ms.
async fn call(client: &mut Client) -> Call {
    call_within(client, "100m").await
}

/// One whose client waits for so long, as gRPC has it.
async fn call_within(client: &mut Client, time: &str) -> Call {
    let fields = [
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("grpc-timeout", time),
    ];
    client.call("POST", "/", &fields, Length::None).await
}

async fn deadline_passes(client: &mut Client) {
    let answer = call(client).await.answer().await;
    assert_eq!(field(&answer.fields, "grpc-status"), Some("4"));
}

async fn fails(client: &mut Client, mut asked: impl AsyncFnMut() -> Asked) {
    let call = client.get("/").await;
    asked().await.reply(500, &[], Length::None).await;
    assert_eq!(call.answer().await.status, 500);
}

fn guarded(origin: &Origin, breaker: &str) -> Lane {
    Lane::start(&format!(
        "listen: '127.0.0.1:0'\n\
         upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: http2, circuit_breaker: b}}}}\n\
         circuit_breakers: {{b: {breaker}}}\n",
        origin.address
    ))
}

#[test]
fn a_deadline_is_no_success_to_a_breaker() {
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let breaker = "{consecutive_failures: 3, open_for: 300ms, jitter: 0%, half_open: {probes: 1}, recover_over: 0s}";
        let lane = guarded(&origin, breaker);
        let mut client = Client::connect(Version::Two, lane.address).await;
        for failed in 1..=3 {
            fails(&mut client, async || origin.asked().await).await;
            if failed == 3 {
                break;
            }
            // Before the head of its answer, and behind it.
            deadline_passes(&mut client).await;
            drop(origin.asked().await);
            let call = call_within(&mut client, "2S").await;
            let mut asked = origin.asked().await;
            let _out = asked.reply(200, &[], Length::Unknown).await;
            let (_, trailers) = call.answer().await.body.rest().await.unwrap();
            assert_eq!(field(&trailers, "grpc-status"), Some("4"));
        }
        eventually(|| lane.state() != "closed");
        // As a probe it closes nothing.
        loop {
            let answer = call(&mut client).await.answer().await;
            if field(&answer.fields, "grpc-status") == Some("4") {
                break;
            }
        }
        assert_ne!(lane.state(), "closed");
        drop(origin.asked().await);
        // The next one does.
        let served = async { while client.get("/").await.whole().await.0 != 200 {} };
        let serves = async { origin.asked().await.ok("served").await };
        tokio::join!(served, serves);
        eventually(|| lane.state() == "closed");
    });
}

#[test]
fn a_deadline_that_the_file_names_is_a_failure() {
    run(async {
        let origin = Origin::start(Version::Two).await;
        let named =
            "{consecutive_failures: 3, open_for: 1h, failure_on: ['grpc:DEADLINE_EXCEEDED']}";
        let slow = "{minimum_calls: 3, open_for: 1h, slow_call: {duration: 50ms, rate: 50%}}";
        for breaker in [named, slow] {
            let lane = guarded(&origin, breaker);
            let mut client = Client::connect(Version::Two, lane.address).await;
            for _ in 0..3 {
                assert_eq!(lane.state(), "closed");
                deadline_passes(&mut client).await;
            }
            eventually(|| lane.state() == "open");
        }
    });
}

#[test]
fn a_deadline_is_no_success_of_an_endpoint() {
    run(async {
        let mut one = Origin::start(Version::Two).await;
        let mut two = Origin::start(Version::Two).await;
        let lane = Lane::start(&format!(
            "listen: '127.0.0.1:0'\n\
             upstreams: {{app: {{endpoints: ['http://{}', 'http://{}'], connect_timeout: 60s, protocol: http2, load_balancing: round_robin, \
             outlier_detection: {{consecutive_5xx: 2, base_ejection_time: 1h, max_ejection_percent: 50}}}}}}\n",
            one.address, two.address
        ));
        let mut client = Client::connect(Version::Two, lane.address).await;
        let mut asked = async || {
            tokio::select! {
                asked = one.asked() => asked,
                asked = two.asked() => asked,
            }
        };
        for _ in 0..2 {
            // Each of the two in its turn.
            for _ in 0..2 {
                fails(&mut client, &mut asked).await;
            }
            for _ in 0..2 {
                deadline_passes(&mut client).await;
                drop(asked().await);
            }
        }
        assert_eq!(lane.plan.borrow().upstreams[0].live.counts().ejected, 1);
    });
}

/// Nor does it wait for longer than that before it reaches an endpoint: for its turn, for a connection, or between two tries.
#[test]
fn a_deadline_is_kept_on_the_way() {
    let deaf = scripted(|mut stream| {
        let _ = stream.read_to_end(&mut Vec::new());
    });
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let lane = |endpoint, keys: &str| {
            Lane::start(&format!(
                "listen: '127.0.0.1:0'\n\
                 upstreams: {{app: {{endpoints: ['http://{endpoint}'], protocol: http2, connect_timeout: 5s, timeout: 10s{keys}}}}}\n"
            ))
        };
        let full = lane(origin.address, ", concurrency: {max: 1, pending: 9}");
        let mut client = Client::connect(Version::Two, full.address).await;
        let held = client.get("/held").await;
        let mut asked = origin.asked().await;
        deadline_passes(&mut client).await;
        asked.ok("held").await;
        assert_eq!(held.whole().await.0, 200);

        let silent = lane(deaf, "");
        let mut client = Client::connect(Version::Two, silent.address).await;
        deadline_passes(&mut client).await;

        let backoff = ", retries: {attempts: 1, retry_on: [reset_before_request], backoff: {base: 1h, max: 1h}}";
        let patient = lane(origin.address, backoff);
        // It may be that the wait, which is by chance, is short.
        loop {
            let mut client = Client::connect(Version::Two, patient.address).await;
            let call = call_within(&mut client, "2S").await;
            origin.asked().await.reset(Reason::REFUSED_STREAM);
            origin.asked().await.reset(Reason::REFUSED_STREAM);
            let answer = call.answer().await;
            if field(&answer.fields, "grpc-status") == Some("4") {
                break;
            }
        }
    });
}
