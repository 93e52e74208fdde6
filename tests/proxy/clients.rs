//! Clients' connections as such, of any version: how old they get, and how many of them one client has open.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::harness::frames::{self, Ended, GOAWAY, NO_ERROR, Raw, SETTINGS};
use super::harness::front::Weir;
use super::harness::process::{Running, file};
use super::harness::raw::{read_head, scripted};
use super::harness::tls::Authority;
use super::harness::{DEADLINE, Lane, Upstream, eventually};

/// The shortest and the longest that a connection of `max_age: 1s` is told in time for.
const YOUNG: Duration = Duration::from_millis(900);
const OLD: Duration = Duration::from_secs(1);

fn until_old(since: Instant) {
    eventually(|| since.elapsed() > OLD);
}

#[test]
fn a_connection_ends_behind_the_first_answer_past_its_age() {
    let weir = Weir::start(
        "timeouts: {max_age: 1s}",
        "rate_limits: {none: {limit: 0/h, by: constant}}\n\
         routes:\n- {match: {path: /reply}, reply: {status: 200, body: ok}}\n\
         - {match: {path: /limited}, upstream: upstream, rate_limits: [none]}\n- {match: {path: /}, upstream: upstream}\n",
    );
    for (path, status) in [
        ("/", 200),
        ("/reply", 200),
        ("/limited", 429),
        ("/none", 404),
    ] {
        let begun = weir::clock::now();
        let mut client = weir.running.client();
        let mut idle = weir.running.client();
        assert_eq!(idle.get(path).field("connection"), None, "{path}");
        let heard = weir::clock::now();
        eventually(|| {
            let reply = client.get(path);
            assert_eq!(reply.status, status, "{path}");
            match reply.field("connection") {
                None => false,
                Some(said) => {
                    assert_eq!(said, "close", "{path}");
                    true
                }
            }
        });
        assert!(begun.elapsed() >= YOUNG, "{path}: {:?}", begun.elapsed());
        assert!(client.closes(), "{path}");
        // Who asks for nothing is told by its next answer, and is no worse served.
        until_old(heard);
        let last = idle.send("POST", path, &[], "abc");
        assert_eq!(
            (last.status, last.field("connection")),
            (status, Some("close")),
            "{path}"
        );
        assert!(idle.closes(), "{path}");
    }
}

#[test]
fn a_request_that_is_under_way_is_not_cut_off_by_its_connections_age() {
    let upstream = Upstream::held();
    let config = file(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{max_age: 1s}}}}]\nupstream: {}\nadmin: {{address: '127.0.0.1:0'}}\n",
        upstream.url()
    ));
    let weir = Running::start(config.path());
    let mut client = weir.client();
    client.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    until_old(weir::clock::now());
    upstream.answer("whole");
    assert_eq!(client.finish().body, "whole");
    // By the next one, at the latest.
    upstream.answer("last");
    if let Some(reply) = client.try_get("/") {
        assert_eq!(
            (&*reply.body, reply.field("connection")),
            ("last", Some("close"))
        );
        assert!(client.closes());
    }
}

#[test]
fn an_old_connection_of_http2_is_told_farewell_and_its_streams_go_on() {
    let upstream = Upstream::held();
    let config = file(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{max_age: 1s}}}}]\nupstream: {}\nadmin: {{address: '127.0.0.1:0'}}\n",
        upstream.url()
    ));
    let weir = Running::start(config.path());
    let begun = weir::clock::now();
    let mut raw = Raw::client(weir.address.parse().unwrap(), &[]);
    let mut idle = Raw::client(weir.address.parse().unwrap(), &[]);
    raw.until(|frame| frame.kind == SETTINGS);
    raw.send(&frames::get(1, "/"));
    upstream.wait_for_request();
    let farewell = raw.until(|frame| frame.kind == GOAWAY);
    assert_eq!(farewell.code(), Some(NO_ERROR));
    assert!(begun.elapsed() >= YOUNG, "{:?}", begun.elapsed());
    upstream.answer("whole");
    let answer = raw.answer(1);
    assert_eq!(
        (answer.status, &*answer.body, answer.whole),
        (Some(200), &b"whole"[..], true)
    );
    assert_eq!(raw.farewell().1, Ended::Closed);
    assert_eq!(idle.farewell(), (Some(NO_ERROR), Ended::Closed));
}

#[test]
fn a_websocket_outlives_its_connections_age() {
    let upstream = scripted(|mut stream| {
        read_head(&mut stream).unwrap();
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
            .unwrap();
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() {
            stream.write_all(&byte).unwrap();
        }
    });
    let config = file(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{max_age: 1s}}}}]\nupstream: http://{upstream}\nadmin: {{address: '127.0.0.1:0'}}\n"
    ));
    let weir = Running::start(config.path());
    let mut client = TcpStream::connect(&weir.address).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client
        .write_all(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        )
        .unwrap();
    let head = read_head(&mut client).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    until_old(weir::clock::now());
    for byte in [b"a", b"b"] {
        client.write_all(byte).unwrap();
        let mut echo = [0];
        client.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, byte);
    }
}

/// Whether a connection from this address of the loopback is served.
fn served(weir: &Weir, from: &str) -> Option<TcpStream> {
    let mut stream = connect(&weir.running.address, from);
    ask(&mut stream, b"").then_some(stream)
}

fn connect(to: &str, from: &str) -> TcpStream {
    let (to, from): (SocketAddr, IpAddr) = (to.parse().unwrap(), from.parse().unwrap());
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.into()
}

/// Whether a request behind these bytes is answered.
fn ask(stream: &mut TcpStream, ahead: &[u8]) -> bool {
    let _ = stream.write_all(&[ahead, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"].concat());
    match read_head(stream) {
        None => false,
        Some(head) => {
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            // Its body.
            stream.read_exact(&mut [0; 2]).unwrap();
            true
        }
    }
}

const OVER: &str = "weir_connections_refused_total{reason=\"max_connections_per_client\"}";
const FULL: &str = "weir_connections_refused_total{reason=\"max_connections\"}";

#[test]
fn a_client_has_as_many_connections_as_it_may_in_all_lanes_together() {
    // Two lanes, among which the kernel deals connections out.
    let weir = Weir::start("limits: {max_connections_per_client: 3}", "");
    assert_eq!(
        (weir.running.told(OVER), weir.running.told(FULL)),
        (Some(0.0), Some(0.0))
    );
    let mut open: Vec<_> = (0..3)
        .map(|_| served(&weir, "127.0.0.1").unwrap())
        .collect();
    for _ in 0..8 {
        assert!(served(&weir, "127.0.0.1").is_none());
    }
    assert_eq!(
        (weir.running.metric(OVER), weir.running.metric(FULL)),
        (8, 0)
    );
    // Another one is not held up, and those that are open are none the worse.
    assert!(served(&weir, "127.0.0.2").is_some());
    assert!(open.iter_mut().all(|stream| ask(stream, b"")));
    // A place is given back.
    open.pop();
    eventually(|| {
        open.extend(served(&weir, "127.0.0.1"));
        open.len() == 3
    });
    assert!(served(&weir, "127.0.0.1").is_none());
}

/// A listener that is full has others make room for who is let in, not for who is refused anyhow.
#[test]
fn a_client_that_has_too_many_throws_out_nobody() {
    let lane = Lane::start(
        "listeners: [{address: '127.0.0.1:0', limits: {max_connections: 4, max_connections_per_client: 2}}]\nroutes: [{reply: {status: 200, body: ok}}]\n",
    );
    let address = lane.address.to_string();
    let served = |from: &str| {
        let mut stream = connect(&address, from);
        ask(&mut stream, b"").then_some(stream)
    };
    let [mut others, mut own] =
        ["127.0.0.2", "127.0.0.1"].map(|from| [(); 2].map(|()| served(from).unwrap()));
    // All of them could make room from then on.
    let idle_since = weir::clock::now();
    eventually(|| idle_since.elapsed() > Duration::from_secs(3));
    for _ in 0..4 {
        assert!(served("127.0.0.1").is_none());
    }
    assert_eq!((lane.told(OVER), lane.told(FULL)), (Some(4.0), Some(0.0)));
    assert_eq!(lane.told("weir_connections_total"), Some(8.0));
    assert!(others.iter_mut().all(|stream| ask(stream, b"")));
    // As they do for another client.
    assert!(served("127.0.0.3").is_some());
    let stay = own
        .iter_mut()
        .filter_map(|stream| ask(stream, b"").then_some(()));
    assert_eq!(stay.count(), 1);
}

#[test]
fn connections_of_http2_and_silent_ones_count_as_others_do() {
    let weir = Weir::start("limits: {max_connections_per_client: 2}", "");
    let mut silent = connect(&weir.running.address, "127.0.0.1");
    let address = weir.running.address.parse().unwrap();
    eventually(|| weir.running.metric("weir_connections_open") == 1);
    let mut raw = Raw::client(address, &[]);
    raw.until(|frame| frame.kind == SETTINGS);
    let mut beyond = Raw::client(address, &[]);
    assert_eq!(beyond.next(), Err(Ended::Closed));
    assert_eq!(weir.running.metric(OVER), 1);
    assert!(ask(&mut silent, b""));
    drop(raw);
    eventually(|| served(&weir, "127.0.0.1").is_some());
    drop(silent);
    eventually(|| weir.running.told("weir_connections_open") == Some(0.0));
}

#[test]
fn a_handshake_is_not_begun_with_a_client_that_has_too_many() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let weir = Weir::start(
        &format!(
            "limits: {{max_connections_per_client: 1}}, tls: {{certificates: [{}]}}",
            authority.pair("a")
        ),
        "",
    );
    let mut client = authority.client().connect(weir.address(), "a.test");
    assert_eq!(client.get("/").status, 200);
    assert!(
        authority
            .client()
            .try_connect(weir.address(), "a.test")
            .is_err()
    );
    assert_eq!(weir.running.metric(OVER), 1);
    let gone = "weir_tls_handshake_failures_total{listener=\"in\",reason=\"gone\"}";
    assert_eq!(weir.running.metric(gone), 0);
    drop(client);
    eventually(|| {
        authority
            .client()
            .try_connect(weir.address(), "a.test")
            .is_ok()
    });
}

#[test]
fn a_load_balancer_that_is_trusted_has_as_many_connections_as_it_likes() {
    let weir = Weir::start(
        "limits: {max_connections_per_client: 1}, client_ip: {trusted_proxies: [127.0.0.2]}",
        "",
    );
    let _balancers: Vec<_> = (0..5)
        .map(|_| served(&weir, "127.0.0.2").unwrap())
        .collect();
    let _open = served(&weir, "127.0.0.1").unwrap();
    assert!(served(&weir, "127.0.0.1").is_none());
}

#[test]
fn who_is_counted_is_the_client_of_the_proxy_header() {
    let weir = Weir::start(
        "limits: {max_connections_per_client: 2}, proxy_protocol: require, client_ip: {ipv6_prefix: 48}",
        "",
    );
    let address = &weir.running.address;
    let mut open = Vec::new();
    let mut served = |client: &str| {
        let kind = if client.contains(':') { "TCP6" } else { "TCP4" };
        let header = format!("PROXY {kind} {client} {client} 1 2\r\n");
        let mut stream = connect(address, "127.0.0.1");
        let served = ask(&mut stream, header.as_bytes());
        open.push(stream);
        served
    };
    for clients in [
        ["192.0.2.1", "192.0.2.1", "192.0.2.1"],
        // All of one network, of the listener's bits.
        ["2001:db8:1::1", "2001:db8:1:2::1", "2001:db8:1:3::9"],
        // The client above that has an IPv4 address, in other words.
        ["::ffff:192.0.2.2", "192.0.2.2", "::ffff:192.0.2.2"],
        ["2001:db8:2::1", "2001:db8:2::2", "2001:db8:2::1"],
    ] {
        assert_eq!(clients.map(&mut served), [true, true, false], "{clients:?}");
    }
    assert_eq!(weir.running.metric(OVER), 4);
}

/// Those on a Unix socket have no address.
#[test]
fn a_client_without_an_address_is_not_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.sock");
    let weir = Weir::start(
        &format!(
            "address: 'unix:{}', limits: {{max_connections_per_client: 1}}, proxy_protocol: accept",
            path.display()
        ),
        "",
    );
    let mut open = Vec::new();
    let mut served = |header: &str| {
        let mut stream = UnixStream::connect(&path).unwrap();
        let request = format!("{header}GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        let _ = stream.write_all(request.as_bytes());
        let answered = stream.read(&mut [0; 1024]).is_ok_and(|read| read > 0);
        open.push(stream);
        answered
    };
    let header = "PROXY TCP4 192.0.2.1 192.0.2.1 1 2\r\n";
    let asked = [
        "",
        "",
        "PROXY UNKNOWN\r\n",
        "PROXY UNKNOWN\r\n",
        header,
        header,
    ];
    assert_eq!(
        asked.map(&mut served),
        [true, true, true, true, true, false]
    );
    drop(weir);
}

#[test]
fn a_reload_moves_the_bound_and_ends_no_connection() {
    let of = |bound: &str| {
        format!(
            "listeners: [{{address: '127.0.0.1:0'{bound}}}]\nroutes: [{{reply: {{status: 200, body: ok}}}}]\n"
        )
    };
    let bound = |max: u32| of(&format!(", limits: {{max_connections_per_client: {max}}}"));
    let lane = Lane::start(&bound(2));
    let served = || {
        let mut client = lane.connect();
        client.try_get("/").map(|_| client)
    };
    let mut open: Vec<_> = (0..2).map(|_| served().unwrap()).collect();
    assert!(served().is_none());
    lane.reload(&bound(3));
    open.push(served().unwrap());
    assert!(served().is_none());
    lane.reload(&bound(1));
    assert!(served().is_none());
    assert!(open.iter_mut().all(|client| client.get("/").status == 200));
    lane.reload(&of(""));
    open.push(served().unwrap());
}
