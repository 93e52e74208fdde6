//! Who a client is may be said for a whole connection (NTLM, and Negotiate as RFC 4559 has it): no other client's request may go by that.

use std::io::Write;
use std::net::SocketAddr;

use super::harness::raw::{self, scripted};
use super::harness::versions::{Client, Length, Version, run};
use super::harness::{Lane, at_once, ok};

fn lane(endpoints: &[SocketAddr], keys: &str) -> Lane {
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|it| format!("'http://{it}'"))
        .collect();
    let endpoints = endpoints.join(", ");
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0'}}]\n\
         upstreams: {{app: {{endpoints: [{endpoints}], timeout: 5s, {keys}}}}}\n"
    ))
}

/// Says which request of its connection each is; one for `/who` is asked who it is of.
fn counting() -> SocketAddr {
    scripted(|mut stream| {
        let mut count = 0;
        while let Some(head) = raw::read_head(&mut stream) {
            count += 1;
            let mut reply = ok(&count.to_string());
            if head.starts_with("GET /who ") {
                let asks =
                    "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\", NTLM\r\n";
                reply = reply.replace("HTTP/1.1 200 OK\r\n", asks);
            }
            let _ = stream.write_all(reply.as_bytes());
        }
    })
}

#[test]
fn a_connection_on_which_it_was_said_who_asks_serves_no_other_client() {
    let cases = [
        ("/", "NTLM TlRMTVNTUAAD", false),
        ("/", "negotiate YII", false),
        ("/who", "Basic YTpi", false),
        ("/", "Basic YTpi", true),
        ("/", "Bearer NTLM", true),
    ];
    for version in [Version::One, Version::Two] {
        at_once(cases, |(path, said, shared)| {
            run(async {
                let lane = lane(&[counting()], "");
                let fields = [("authorization", said)];
                let mut alice = Client::connect(version, lane.address).await;
                let call = alice.call("GET", path, &fields, Length::None).await;
                assert_eq!(call.whole().await.1, "1", "{said}");
                let mut bob = Client::connect(version, lane.address).await;
                let got = bob.get("/").await.whole().await.1;
                let expected = if shared { "2" } else { "1" };
                assert_eq!(got, expected, "{version:?} {path} {said}");
            });
        });
    }
}
