//! Clients' connections as such, of any version: how old they get.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::harness::frames::{self, Ended, GOAWAY, NO_ERROR, Raw, SETTINGS};
use super::harness::front::Weir;
use super::harness::process::{Running, file};
use super::harness::raw::{read_head, scripted};
use super::harness::{DEADLINE, Upstream, eventually};

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
        until_old(begun);
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
    let begun = weir::clock::now();
    client.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    until_old(begun);
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
    let begun = weir::clock::now();
    let mut client = TcpStream::connect(&weir.address).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client
        .write_all(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        )
        .unwrap();
    let head = read_head(&mut client).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    until_old(begun);
    for byte in [b"a", b"b"] {
        client.write_all(byte).unwrap();
        let mut echo = [0];
        client.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, byte);
    }
}
