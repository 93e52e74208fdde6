//! Both bodies of a request at once, of which one is slow, waits, or ends before its time.

use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use super::harness::versions::{Broken, Client, Length, Origin, Outgoing, PAIRINGS, Version, run};
use super::streams::SOON;
use super::{Lane, World};

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
                     upstreams: {{app: {{endpoints: ['http://{}'], protocol: {}, concurrency: {{max: 1, pending: 0}}}}}}\n",
                    origin.address,
                    serves.name()
                ));
                let client = Client::connect(asks, lane.address).await;
                let mut world = World {
                    lane,
                    client,
                    origin,
                    asks,
                    serves,
                };
                let mut call = world.client.call("POST", "/", &[], Length::Unknown).await;
                call.body.send(b"abc").await.unwrap();
                let mut asked = world.origin.asked().await;
                asked.body.expect(b"abc").await;
                let mut out = asked.reply(200, &[], Length::Unknown).await;
                out.send(b"abc").await.unwrap();
                let mut answer = call.answer().await;
                answer.body.expect(b"abc").await;
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
