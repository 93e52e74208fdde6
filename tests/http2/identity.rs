//! Who a client is may be said for a whole connection (NTLM, and Negotiate as RFC 4559 has it): no other client's request may go by that.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::harness::raw::{self, scripted};
use super::harness::versions::{Client, Length, Version, run};
use super::harness::{self, Lane, at_once, eventually, ok};

fn lane(endpoints: &[SocketAddr], keys: &str) -> Lane {
    Lane::start(&configuration(endpoints, keys))
}

fn configuration(endpoints: &[SocketAddr], keys: &str) -> String {
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|it| format!("'http://{it}'"))
        .collect();
    let endpoints = endpoints.join(", ");
    format!(
        "listeners: [{{address: '127.0.0.1:0'}}]\n\
         upstreams: {{app: {{endpoints: [{endpoints}], timeout: 5s, {keys}}}}}\n"
    )
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

/// A server of NTLM: whoever has answered its challenge on a connection is known on that. It says who, and by which of its connections.
fn ntlm() -> (SocketAddr, Arc<AtomicUsize>) {
    ntlm_while(Arc::new(AtomicBool::new(true)))
}

/// One that says of its health whether it `is_well`.
fn ntlm_while(is_well: Arc<AtomicBool>) -> (SocketAddr, Arc<AtomicUsize>) {
    let open = Arc::<AtomicUsize>::default();
    let counted = open.clone();
    let server = scripted(move |mut stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        let (mut challenged, mut user) = (false, None);
        while let Some(head) = raw::read_head(&mut stream) {
            if head.starts_with("GET /healthz ") {
                let status = if is_well.load(Ordering::Relaxed) {
                    200
                } else {
                    503
                };
                let reply = format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n");
                let _ = stream.write_all(reply.as_bytes());
                continue;
            }
            let said = head
                .lines()
                .find_map(|it| it.strip_prefix("Authorization: NTLM "));
            match said {
                Some("hello") => challenged = true,
                Some(name) if challenged => user = Some(name.to_owned()),
                Some(_) | None => {}
            }
            let _ = match &user {
                Some(user) => stream.write_all(ok(user).as_bytes()),
                None => {
                    let more = if challenged { " challenge" } else { "" };
                    let fields = format!("WWW-Authenticate: NTLM{more}\r\nContent-Length: 0\r\n");
                    stream.write_all(format!("HTTP/1.1 401 Who\r\n{fields}\r\n").as_bytes())
                }
            };
            if head.starts_with("GET /last ") {
                break;
            }
        }
        counted.fetch_sub(1, Ordering::Relaxed);
    });
    (server, open)
}

/// The three steps of NTLM.
fn sign_in(client: &mut harness::Client, name: &str) {
    let said = |said: &str| format!("Authorization: NTLM {said}");
    assert_eq!(client.get("/").status, 401);
    let challenged = client.send("GET", "/", &[&said("hello")], "");
    assert_eq!(challenged.field("www-authenticate"), Some("NTLM challenge"));
    assert_eq!(client.send("GET", "/", &[&said(name)], "").body, name);
}

#[test]
fn a_client_of_http1_keeps_the_connection_on_which_it_said_who_it_is() {
    for keys in ["", "retries: {attempts: 2, retry_on: [reset]}"] {
        let servers = [ntlm(), ntlm()];
        let lane = lane(&servers.each_ref().map(|it| it.0), keys);
        let open = || {
            servers
                .iter()
                .map(|it| it.1.load(Ordering::Relaxed))
                .sum::<usize>()
        };
        let (mut alice, mut bob) = (lane.connect(), lane.connect());
        sign_in(&mut alice, "alice");
        assert_eq!(bob.get("/").status, 401, "{keys}");
        sign_in(&mut bob, "bob");
        for _ in 0..4 {
            assert_eq!(lane.connect().get("/").status, 401, "{keys}");
            assert_eq!(alice.get("/").body, "alice", "{keys}");
            assert_eq!(bob.get("/").body, "bob", "{keys}");
        }
        drop(bob);
        eventually(|| open() == 1);
        // The server's end of it is the end of what it knew.
        assert_eq!(alice.get("/last").body, "alice");
        eventually(|| open() == 0);
        assert_eq!(alice.get("/").status, 401);
        sign_in(&mut alice, "alice");
    }
}

/// Elsewhere it has another.
#[test]
fn what_a_client_said_of_itself_is_for_one_upstream() {
    let (secret, _) = ntlm();
    let lane = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0'}}]\n\
         upstreams: {{app: {{endpoints: ['http://{secret}']}}, other: {{endpoints: ['http://{}']}}}}\n\
         routes: [{{match: {{path: /other}}, upstream: other}}, {{upstream: app}}]\n",
        counting()
    ));
    let mut alice = lane.connect();
    sign_in(&mut alice, "alice");
    for count in ["1", "2"] {
        assert_eq!(alice.get("/other").body, count);
        assert_eq!(alice.get("/").body, "alice");
    }
}

/// By a header alone a client would hold as many as may be open, and what a proxy's connection says may be of another of its clients.
#[test]
fn no_connection_is_kept_that_its_upstream_did_not_ask_for_or_several_may_use() {
    let (secret, open) = ntlm();
    let lane = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [127.0.0.1/32]}}}}]\n\
         upstreams: {{app: {{endpoints: ['http://{secret}']}}, other: {{endpoints: ['http://{}']}}}}\n\
         routes: [{{match: {{path: /other}}, upstream: other}}, {{upstream: app}}]\n",
        counting()
    ));
    let mut proxy = lane.connect();
    for _ in 0..2 {
        let said = ["Authorization: Negotiate YII"];
        assert_eq!(proxy.send("GET", "/other", &said, "").body, "1");
    }
    let from = "X-Forwarded-For: 10.0.0.1";
    for said in ["NTLM hello", "NTLM alice"] {
        let fields = [from, &format!("Authorization: {said}")];
        assert_eq!(proxy.send("GET", "/", &fields, "").status, 401);
    }
    eventually(|| open.load(Ordering::Relaxed) == 0);
}

/// What it holds of an upstream others have a use for.
#[test]
fn a_connection_of_a_client_s_own_ends_once_it_is_of_no_use() {
    let ends = |keys: &str, then: &dyn Fn(&Lane, SocketAddr)| {
        let (secret, open) = ntlm();
        let lane = lane(&[secret], keys);
        let mut alice = lane.connect();
        sign_in(&mut alice, "alice");
        assert_eq!(alice.get("/").body, "alice");
        then(&lane, secret);
        eventually(|| open.load(Ordering::Relaxed) == 0);
        (lane, alice)
    };
    // Not used for so long.
    let (_lane, mut alice) = ends("idle_timeout: 1s", &|_, _| {});
    assert_eq!(alice.get("/").status, 401);
    sign_in(&mut alice, "alice");
    // Of an endpoint that is one no more, whose upstream has its place for another.
    let one = "connect_timeout: 3s, concurrency: {max_connections: 1}";
    let (_lane, mut alice) = ends(one, &|lane, _| {
        lane.reload(&configuration(&[counting()], one));
        assert_eq!(lane.connect().get("/").body, "1");
    });
    assert_eq!(alice.get("/").body, "2");
    // Of an upstream that is gone.
    ends("", &|lane, _| {
        lane.reload("listeners: [{address: '127.0.0.1:0'}]\nupstreams: {other: {endpoints: ['http://127.0.0.1:1']}}\n");
        assert_eq!(lane.connect().get("/").status, 502);
    });
}

#[test]
fn a_connection_of_a_client_s_own_makes_room_for_who_waits_for_its_place() {
    let (secret, _) = ntlm();
    let lane = lane(
        &[secret],
        "connect_timeout: 3s, concurrency: {max_connections: 1}",
    );
    let (mut alice, mut bob) = (lane.connect(), lane.connect());
    sign_in(&mut alice, "alice");
    assert_eq!(bob.get("/").status, 401);
    sign_in(&mut bob, "bob");
    assert_eq!(alice.get("/").status, 401);
}

#[test]
fn a_client_s_own_connection_is_not_used_while_its_endpoint_is_not() {
    let is_well = Arc::new(AtomicBool::new(true));
    let servers = [(); 2].map(|()| ntlm_while(is_well.clone()).0);
    let lane = lane(
        &servers,
        "panic_threshold: 0%, health: {path: /healthz, interval: 20ms, unhealthy_after: 1, healthy_after: 1}",
    );
    let up = |count| eventually(|| lane.plan.borrow().upstreams[0].live.counts().up == count);
    let mut alice = lane.connect();
    sign_in(&mut alice, "alice");
    is_well.store(false, Ordering::Relaxed);
    up(0);
    assert_eq!(alice.get("/").status, 503);
    is_well.store(true, Ordering::Relaxed);
    up(2);
    assert_eq!(alice.get("/").body, "alice");
}
