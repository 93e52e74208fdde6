//! Upstreams that stall, break off, lie or talk nonsense: the client gets a reply or an abort in a bounded time, the right
//! bytes or none, and the lane still serves afterwards.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::harness::raw::{self, End, Wire, scripted, unchunk};
use super::harness::{DEADLINE, Lane, eventually, ok};
use socket2::{Domain, SockRef, Socket, Type};

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

/// The longest that any trouble takes here: what a timeout ends ends in 700 ms.
const BOUND: Duration = Duration::from_secs(5);

/// Where only a body that stalls is over before the test is.
fn lane(upstream: SocketAddr) -> Lane {
    lane_of(upstream, "60s", "700ms")
}

fn lane_of(upstream: SocketAddr, timeout: &str, stream_idle: &str) -> Lane {
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: {stream_idle}}}}}]\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}'], timeout: {timeout}, connect_timeout: 60s}}}}\n"
    ))
}

/// A lane before an upstream that answers each request by `script`, and `/fine` with a 200.
fn before(script: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> Lane {
    lane(by(script))
}

fn by(script: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> SocketAddr {
    scripted(move |mut stream| {
        while let Some(head) = raw::read_head(&mut stream) {
            if head.starts_with("GET /fine ") {
                let _ = stream.write_all(ok("fine").as_bytes());
            } else {
                script(&head, &mut stream);
            }
        }
    })
}

#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn ask(name: &str, lane: &Lane, request: &[u8]) -> Wire {
    let start = Instant::now();
    let reply = raw::send(lane.address, request);
    assert!(start.elapsed() < BOUND, "{name}: {:?}", start.elapsed());
    assert_eq!(lane.connect().get("/fine").body, "fine", "{name}");
    reply
}

/// Makes the close of this connection a reset.
fn reset(stream: &TcpStream) {
    let at_once = Some(Duration::ZERO);
    SockRef::from(stream).set_linger(at_once).unwrap();
}

/// Reads until weir gives up.
fn stall(stream: &mut TcpStream) {
    let _ = stream.read_to_end(&mut Vec::new());
}

#[test]
fn trouble_before_the_head_is_a_502_or_a_504() {
    let many: String = (0..101).map(|n| format!("A-{n}: 1\r\n")).collect();
    let large = format!("A: {}\r\n", "a".repeat(70_000));
    let options = "a,".repeat(32);
    let interim = "HTTP/1.1 100 Continue\r\n\r\n".repeat(1000);
    let with = |fields: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\nhello");
    for (name, bytes, status) in [
        ("nonsense", "nonsense\r\n\r\n".to_owned(), 502),
        ("HTTP/0.9", "<html>hello</html>\n".to_owned(), 502),
        ("HTTP/2", "HTTP/2.0 200 OK\r\n\r\n".to_owned(), 502),
        ("nonsense without end", "x".repeat(70_000), 502),
        ("TLS alert", "\x15\x03\x01\x00\x02\x02\x46".to_owned(), 502),
        (
            "status of class 0",
            "HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n".to_owned(),
            502,
        ),
        (
            "status in words",
            "HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n".to_owned(),
            502,
        ),
        (
            "status with a sign",
            "HTTP/1.1 -20 OK\r\nContent-Length: 0\r\n\r\n".to_owned(),
            502,
        ),
        ("oversize head", with(&large), 502),
        ("too many fields", with(&many), 502),
        (
            "too many options",
            with(&format!("Connection: {options}\r\n")),
            502,
        ),
        (
            "length and coding",
            with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
            502,
        ),
        (
            "two lengths",
            with("Content-Length: 5\r\nContent-Length: 6\r\n"),
            502,
        ),
        (
            "one length twice",
            with("Content-Length: 5\r\nContent-Length: 5\r\n"),
            502,
        ),
        ("length list", with("Content-Length: 5, 5\r\n"), 502),
        ("negative length", with("Content-Length: -5\r\n"), 502),
        ("length in hex", with("Content-Length: 0x5\r\n"), 502),
        (
            "length over 64 bits",
            with("Content-Length: 18446744073709551616\r\n"),
            502,
        ),
        ("empty length", with("Content-Length:\r\n"), 502),
        ("coding gzip", with("Transfer-Encoding: gzip\r\n"), 502),
        (
            "coding chunked twice",
            with("Transfer-Encoding: chunked, chunked\r\n"),
            502,
        ),
        ("folded line", with("A: 1\r\n 2\r\n"), 502),
        ("space before a colon", with("A : 1\r\n"), 502),
        ("bare CR", with("A: 1\rB: 2\r\n"), 502),
        ("NUL", with("A: \0\r\n"), 502),
        ("a flood of interim responses", interim, 502),
        (
            "a switch that no one asked for",
            "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
                .to_owned(),
            502,
        ),
        ("nothing", String::new(), 504),
        ("half a head", "HTTP/1.1 200 OK\r\nA: ".to_owned(), 504),
        (
            "an interim response alone",
            "HTTP/1.1 100 Continue\r\n\r\n".to_owned(),
            504,
        ),
    ] {
        let upstream = by(move |_, stream| {
            let _ = stream.write_all(bytes.as_bytes());
            stall(stream);
        });
        let timeout = if status == 504 { "700ms" } else { "60s" };
        let reply = ask(name, &lane_of(upstream, timeout, "60s"), GET);
        assert_problem(name, &reply, status);
    }
}

fn assert_problem(name: &str, reply: &Wire, status: u16) {
    assert_eq!(reply.status(), Some(status), "{name}: {reply:?}");
    assert_eq!(
        (reply.end, reply.replies()),
        (End::Closed, 1),
        "{name}: {reply:?}"
    );
    assert!(
        reply
            .text
            .contains("\r\nContent-Type: application/problem+json\r\n"),
        "{name}: {reply:?}"
    );
}

#[test]
fn a_reply_says_what_is_wrong_with_the_upstream_s_head() {
    let with = |fields: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n");
    for (bytes, why) in [
        (
            "nonsense\r\n\r\n".to_owned(),
            "its version is not HTTP/1.0 or HTTP/1.1",
        ),
        (
            "HTTP/1.1 099 Low\r\n\r\n".to_owned(),
            "its status line is malformed, or its status below 100",
        ),
        (
            with("A : 1"),
            "a field name is malformed, or white space stands before its colon",
        ),
        (
            with("A: \x01"),
            "a field value has a bare CR, a NUL or another control character",
        ),
        (
            with("Content-Length: +5"),
            "Content-Length is not a decimal number",
        ),
        (
            with("Content-Length: 5\r\nContent-Length: 5"),
            "Content-Length is given more than once",
        ),
        (
            with("Content-Length: 5\r\nTransfer-Encoding: chunked"),
            "both Content-Length and Transfer-Encoding are given",
        ),
        (
            with("Transfer-Encoding: gzip"),
            "Transfer-Encoding is not exactly \\\"chunked\\\"",
        ),
        (
            with(&format!("A: {}", "a".repeat(70_000))),
            "it is larger than 65536 bytes",
        ),
        (with(&"A: 1\r\n".repeat(101)), "it has more than 100 fields"),
        (
            "HTTP/1.1 101 Switching Protocols\r\n\r\n".to_owned(),
            "it switches to a protocol that nobody asked for",
        ),
    ] {
        let lane = before(move |_, stream| {
            let _ = stream.write_all(bytes.as_bytes());
            stall(stream);
        });
        let reply = ask(why, &lane, GET);
        let detail = format!("\"detail\":\"upstream's response cannot be read: {why}\"");
        assert!(reply.text.contains(&detail), "{why}: {reply:?}");
        assert!(reply.text.contains("upstream_broken"), "{why}: {reply:?}");
    }
}

#[test]
fn a_connection_broken_before_the_head_is_a_502() {
    for (name, bytes) in [
        ("at once", ""),
        ("in the head", "HTTP/1.1 200 OK\r\nA"),
        ("after an interim response", "HTTP/1.1 100 Continue\r\n\r\n"),
    ] {
        for how in [End::Closed, End::Reset] {
            let upstream = scripted(move |mut stream| {
                if raw::read_head(&mut stream).is_some_and(|head| head.starts_with("GET /fine ")) {
                    let _ = stream.write_all(ok("fine").as_bytes());
                    return;
                }
                let _ = stream.write_all(bytes.as_bytes());
                if how == End::Reset {
                    reset(&stream);
                }
            });
            assert_problem(name, &ask(name, &lane(upstream), GET), 502);
        }
    }
}

/// What the client gets must show that it is not all.
#[test]
fn trouble_in_a_body_aborts_the_stream() {
    let chunked = "Transfer-Encoding: chunked\r\n";
    for (name, fields, body) in [
        ("short of its length", "Content-Length: 9\r\n", "abc"),
        ("short of its chunk", chunked, "9\r\nabc"),
        ("without a last chunk", chunked, "3\r\nabc\r\n"),
        ("without an end", chunked, "3\r\nabc\r\n0\r\n"),
        ("bad chunk size", chunked, "3\r\nabc\r\nx\r\n"),
        ("bad chunk end", chunked, "3\r\nabcd\r\n0\r\n\r\n"),
        ("close-delimited", "", "abc"),
    ] {
        for how in [End::Closed, End::Reset, End::Hung] {
            if fields.is_empty() && how == End::Closed {
                continue; // The one way that it may end.
            }
            let upstream = scripted(move |mut stream| {
                let head = raw::read_head(&mut stream);
                if head.is_some_and(|head| head.starts_with("GET /fine ")) {
                    let _ = stream.write_all(ok("fine").as_bytes());
                    return;
                }
                let reply = format!("HTTP/1.1 200 OK\r\n{fields}\r\n{body}");
                let _ = stream.write_all(reply.as_bytes());
                match how {
                    End::Closed => {}
                    End::Reset => reset(&stream),
                    End::Hung => stall(&mut stream),
                }
            });
            let name = format!("{name}, {how:?}");
            let reply = ask(&name, &lane(upstream), GET);
            assert_ne!(reply.end, End::Hung, "{name}: {reply:?}");
            // A reset may overtake even the head.
            if reply.status() == Some(502) {
                continue;
            }
            assert_eq!(reply.replies(), 1, "{name}: {reply:?}");
            assert!(!reply.text.ends_with("0\r\n\r\n"), "{name}: {reply:?}");
            assert!(reply.parts().1.len() < 9, "{name}: {reply:?}");
        }
    }
}

/// HTTP/1.0 has no chunks, so that a close would say that the body is whole.
#[test]
fn a_body_cut_short_is_a_reset_for_a_client_that_knows_no_chunks() {
    let lane = before(|_, stream| {
        let reply = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n";
        let _ = stream.write_all(reply.as_bytes());
        stall(stream);
    });
    let reply = ask("cut short", &lane, b"GET / HTTP/1.0\r\n\r\n");
    assert_eq!(reply.end, End::Reset, "{reply:?}");
}

#[test]
fn trouble_behind_some_chunks_is_a_reset_for_a_client_that_knows_none() {
    for (name, rest) in [
        ("short of its chunk", "9\r\nabc"),
        ("without a last chunk", ""),
        ("without an end", "0\r\n"),
        ("bad chunk size", "x\r\n"),
    ] {
        for how in [End::Closed, End::Reset] {
            let (goes_on, has_head) = mpsc::channel::<()>();
            let has_head = Mutex::new(has_head);
            let upstream = scripted(move |mut stream| {
                let _ = raw::read_head(&mut stream);
                let reply = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n";
                let _ = stream.write_all(reply.as_bytes());
                let _ = has_head.lock().unwrap().recv();
                let _ = stream.write_all(rest.as_bytes());
                if how == End::Reset {
                    reset(&stream);
                }
            });
            let lane = lane_of(upstream, "60s", "60s");
            let mut client = TcpStream::connect(lane.address).unwrap();
            client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
            let head = raw::read_head(&mut client).unwrap();
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            goes_on.send(()).unwrap();
            let rest = raw::read_to_end(&mut client);
            assert_eq!(rest.end, End::Reset, "{name}, {how:?}: {rest:?}");
        }
    }
}

#[test]
fn a_body_may_pause_for_longer_than_the_upstream_may_think() {
    let upstream = by(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc");
        // Over the upstream's second, within the stream's 10.
        thread::sleep(Duration::from_millis(1_500));
        let _ = stream.write_all(b"def");
    });
    let lane = lane_of(upstream, "1s", "10s");
    assert!(ask("pause", &lane, GET).text.ends_with("\r\n\r\nabcdef"));
}

#[test]
fn a_response_that_trickles_arrives_whole() {
    for (fields, wire, body) in [
        ("Content-Length: 5\r\n", "hello", "hello"),
        (
            "Transfer-Encoding: chunked\r\n",
            "5;x=1\r\nhello\r\n0\r\nT: 1\r\n\r\n",
            "",
        ),
        ("", "hello", ""),
    ] {
        let upstream = scripted(move |mut stream| {
            if raw::read_head(&mut stream).is_some_and(|head| head.starts_with("GET /fine ")) {
                let _ = stream.write_all(ok("fine").as_bytes());
                return;
            }
            stream.set_nodelay(true).unwrap();
            for byte in format!("HTTP/1.1 200 OK\r\nX-A:  1 \r\n{fields}\r\n{wire}").bytes() {
                stream.write_all(&[byte]).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        });
        let lane = lane_of(upstream, "30s", "10s");
        let reply = ask(fields, &lane, GET);
        assert!(
            reply.text.starts_with("HTTP/1.1 200 OK\r\nX-A: 1\r\n"),
            "{reply:?}"
        );
        match body {
            "" => {
                let trailers = if wire.contains("T: 1") {
                    "T: 1\r\n"
                } else {
                    ""
                };
                let came = unchunk(reply.parts().1);
                assert_eq!(came, ("hello".to_owned(), trailers), "{reply:?}");
            }
            body => assert_eq!(reply.parts().1, body, "{reply:?}"),
        }
    }
}

#[test]
fn bytes_behind_a_response_without_a_body_go_to_no_one() {
    let stray = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray";
    for (method, first) in [
        ("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 49\r\n\r\n"),
        (
            "HEAD",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n"),
        (
            "GET",
            "HTTP/1.1 204 No Content\r\nContent-Length: 49\r\n\r\n",
        ),
        (
            "GET",
            "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        (
            "GET",
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 49\r\n\r\n",
        ),
        ("GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        (
            "GET",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
    ] {
        let lane = before(move |_, stream| {
            let _ = stream.write_all(format!("{first}{stray}").as_bytes());
        });
        let requests = format!(
            "{method} / HTTP/1.1\r\nHost: x\r\n\r\nGET /fine HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        );
        let reply = ask(first, &lane, requests.as_bytes());
        assert_eq!(reply.replies(), 2, "{first}: {reply:?}");
        assert!(reply.text.ends_with("\r\n\r\nfine"), "{first}: {reply:?}");
        assert!(!reply.text.contains("stray"), "{first}: {reply:?}");
        // RFC 9110 section 8.6; a client that believes it waits for a body that never comes.
        let is_204 = reply.status() == Some(204);
        assert!(
            !is_204 || !reply.parts().0.contains("Content-Length"),
            "{reply:?}"
        );
    }
}

/// RFC 9110 section 15.2: all are for the client, but a 100 answers an expectation, and that was weir's.
#[test]
fn interim_responses_but_100_go_to_clients_that_know_them() {
    let lane = before(|_, stream| {
        // A length has no place there (section 8.6), and a coding belongs to its hop.
        let hints = |framing| format!("HTTP/1.1 103 Early Hints\r\n{framing}\r\nLink: a\r\n\r\n");
        let of_weir = "Content-Length: 3\r\nX-Weir-Session-End: true";
        let interim = hints(of_weir) + &hints("Transfer-Encoding: chunked");
        let interim = format!("HTTP/1.1 100 Continue\r\n\r\n{interim}{}", ok("done"));
        let _ = stream.write_all(interim.as_bytes());
    });
    let reply = ask("interim", &lane, GET);
    let hints = "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n".repeat(2) + "HTTP/1.1 200 OK\r\n";
    assert!(reply.text.starts_with(&hints), "{reply:?}");
    assert_eq!(reply.replies(), 3, "{reply:?}");
    let old = ask("interim", &lane, b"GET / HTTP/1.0\r\n\r\n");
    assert_eq!((old.status(), old.replies()), (Some(200), 1), "{old:?}");
}

#[test]
fn sixteen_interim_responses_are_passed_on_and_no_more() {
    for count in [16, 17, 200] {
        let lane = before(move |_, stream| {
            let interim = "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(count);
            let _ = stream.write_all(format!("{interim}{}", ok("done")).as_bytes());
        });
        let reply = ask("interim", &lane, GET);
        assert_eq!(reply.replies(), 17, "{reply:?}");
        assert!(reply.text.contains("HTTP/1.1 200 OK\r\n"), "{reply:?}");
    }
}

#[test]
fn a_connection_that_the_upstream_closes_is_not_used_again() {
    for fields in [
        "Connection: close",
        "connection: x, CLOSE",
        "Connection: close\r\nConnection: keep-alive",
    ] {
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        let lane = lane(scripted(move |mut stream| {
            count.fetch_add(1, Ordering::Relaxed);
            while raw::read_head(&mut stream).is_some() {
                let reply = format!("HTTP/1.1 200 OK\r\n{fields}\r\nContent-Length: 1\r\n\r\na");
                let _ = stream.write_all(reply.as_bytes());
            }
        }));
        let mut client = lane.connect();
        for _ in 0..3 {
            let reply = client.get("/");
            assert_eq!((reply.status, reply.body.as_str()), (200, "a"));
            assert_eq!(
                reply.field("connection"),
                None,
                "the client's connection lives on"
            );
        }
        assert_eq!(connections.load(Ordering::Relaxed), 3, "{fields}");
    }
}

#[test]
fn a_close_delimited_body_is_chunked_for_those_who_know_chunks() {
    let upstream = || {
        scripted(|mut stream| {
            let _ = raw::read_head(&mut stream);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello");
        })
    };
    let new = raw::send(lane(upstream()).address, GET);
    assert_eq!(unchunk(new.parts().1), ("hello".to_owned(), ""), "{new:?}");
    let old = raw::send(
        lane(upstream()).address,
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    );
    assert_eq!((old.parts().1, old.end), ("hello", End::Closed), "{old:?}");
    assert!(!old.text.contains("chunked"), "{old:?}");
}

#[test]
fn an_early_answer_reaches_a_client_that_is_still_sending() {
    let lane = before(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno");
    });
    let size = 8 << 20;
    let mut request =
        format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n").into_bytes();
    request.resize(request.len() + size, b'a');
    let mut client = TcpStream::connect(lane.address).unwrap();
    // Without a reset, which might take the answer with it.
    client.write_all(&request).unwrap();
    let reply = raw::read_to_end(&mut client);
    assert_eq!(
        (reply.status(), reply.end),
        (Some(401), End::Closed),
        "{reply:?}"
    );
    assert!(
        reply.text.ends_with("Connection: close\r\n\r\nno"),
        "{reply:?}"
    );
}

#[test]
fn an_upstream_that_cannot_be_reached_is_a_502_or_a_504() {
    let closed = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    closed.bind(&loopback().into()).unwrap();
    let refusing = lane(closed.local_addr().unwrap().as_socket().unwrap());
    assert_problem("refused", &raw::send(refusing.address, GET), 502);

    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&loopback().into()).unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        waiting.push(stream);
    }
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{address}'], connect_timeout: 200ms}}}}\n"
    ));
    let reply = raw::send(lane.address, GET);
    assert_problem("full", &reply, 504);
    assert!(
        reply.text.contains(
            "Proxy-Status: weir; error=connection_timeout; details=\"connect_timeout\"\r\n"
        ),
        "{reply:?}"
    );
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

#[test]
fn a_client_that_stalls_in_its_body_is_no_failure_of_the_upstream() {
    let upstream = scripted(|mut stream| {
        while let Some(head) = raw::read_head(&mut stream) {
            match head.starts_with("GET") {
                true => drop(stream.write_all(ok("fine").as_bytes())),
                false => stall(&mut stream),
            }
        }
    });
    let lane = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: 2s}}}}]\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}'], timeout: 1s, circuit_breaker: one}}}}\n\
         circuit_breakers: {{one: {{consecutive_failures: 1}}}}\n"
    ));
    let stalled = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc";
    assert_problem("stalled", &ask("stalled", &lane, stalled), 408);
}

#[test]
fn a_slow_upload_may_take_longer_than_the_upstream_may_think() {
    let recorder = raw::Recorder::start();
    let lane = lane_of(recorder.address, "1s", "10s");
    let mut client = TcpStream::connect(lane.address).unwrap();
    client
        .write_all(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\n")
        .unwrap();
    for byte in b"slow" {
        thread::sleep(Duration::from_millis(400));
        client.write_all(&[*byte]).unwrap();
    }
    assert_eq!(raw::read_to_end(&mut client).status(), Some(200));
}

/// Neither a response nor a refusal waits for ever for a client that does not read.
#[test]
fn a_client_that_does_not_read_is_let_go() {
    let body = ok(&"a".repeat(8 << 20));
    let upstream = scripted(move |mut stream| {
        while raw::read_head(&mut stream).is_some() {
            let _ = stream.write_all(body.as_bytes());
        }
    });
    let lane = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: 500ms}}}}]\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}']}}}}\n\
         routes: [{{match: {{host: x}}, upstream: app}}]\n"
    ));
    let metrics = lane.plan.borrow().metrics.clone();
    for request in [
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: nowhere\r\n\r\n",
    ] {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        client.set_recv_buffer_size(4096).unwrap();
        client.connect(&lane.address.into()).unwrap();
        let mut client = TcpStream::from(client);
        client.set_write_timeout(Some(BOUND)).unwrap();
        // Ends early when weir closes.
        let _ = client.write_all(request.repeat(100_000).as_bytes());
        eventually(|| metrics.connections.open.get() == 0);
    }
}

#[test]
fn an_upstream_that_answers_while_it_reads_gets_the_whole_body() {
    let echo = scripted(|mut stream| {
        if raw::read_head(&mut stream).is_none() {
            return;
        }
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        let mut piece = [0; 4096];
        while let Ok(read @ 1..) = stream.read(&mut piece) {
            if stream.write_all(&piece[..read]).is_err() {
                return;
            }
        }
    });
    let lane = lane(echo);
    let mut stream = std::net::TcpStream::connect(lane.address).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut sending = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        for _ in 0..40 {
            sending.write_all(&[b'x'; 10_000]).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    let body = got.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    assert_eq!(got.len() - body, 400_000);
}

#[test]
fn an_upstream_of_no_idle_time_keeps_no_connection() {
    let (said, ends) = mpsc::channel();
    let upstream = scripted(move |mut stream| {
        while raw::read_head(&mut stream).is_some() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            let _ = said.send("answered");
        }
        let _ = said.send("closed");
    });
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{upstream}'], idle_timeout: 0s}}}}\n"
    ));
    let mut client = lane.connect();
    for _ in 0..3 {
        assert_eq!(client.get("/").status, 200);
        for step in ["answered", "closed"] {
            assert_eq!(ends.recv_timeout(DEADLINE), Ok(step));
        }
    }
}

/// Many servers say so, Node's of 5 s: a request that meets its connection closing would be lost.
#[test]
fn a_connection_is_idle_for_no_longer_than_the_upstream_says_that_it_keeps_it() {
    let (said, ends) = mpsc::channel();
    let upstream = scripted(move |mut stream| {
        while raw::read_head(&mut stream).is_some() {
            let _ = stream.write_all(
                b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=2, max=100\r\nContent-Length: 0\r\n\r\n",
            );
            let _ = said.send("answered");
        }
        let _ = said.send("closed");
    });
    let lane = lane(upstream);
    assert_eq!(lane.connect().get("/").status, 200);
    for step in ["answered", "closed"] {
        assert_eq!(ends.recv_timeout(DEADLINE), Ok(step));
    }
}

/// It may hold its own end until weir's has come.
#[test]
fn an_idle_connection_that_the_upstream_ends_is_closed_soon() {
    let (said, ends) = mpsc::channel();
    let upstream = scripted(move |mut stream| {
        let _ = raw::read_head(&mut stream);
        let _ = stream.write_all(ok("served").as_bytes());
        let _ = stream.shutdown(Shutdown::Write);
        let _ = said.send(stream.read(&mut [0]).ok());
    });
    let lane = lane(upstream);
    assert_eq!(lane.connect().get("/").status, 200);
    assert_eq!(ends.recv_timeout(DEADLINE), Ok(Some(0)));
}

/// Without TCP_NODELAY, as Java's and Python's own servers, a sender writes no more until the kernel at the other end has said that the head
/// is there, and that puts it off for 40 ms.
#[test]
fn a_body_that_is_written_behind_its_head_comes_at_once() {
    let upstream = scripted(|mut stream| {
        while raw::read_head(&mut stream).is_some() && stream.read_exact(&mut [0; 4]).is_ok() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n");
            let _ = stream.write_all(b"body");
        }
    });
    let lane = lane(upstream);
    let mut client = lane.connect();
    let mut exchange = || {
        let began = weir::clock::now();
        client.begin("POST", "/", &["Content-Length: 4"], "");
        client.write(b"body");
        assert_eq!(client.finish().body, "body");
        began.elapsed()
    };
    // Of a new connection the kernel says so at once by itself.
    for _ in 0..20 {
        exchange();
    }
    let quickest = (0..20).map(|_| exchange()).min();
    assert!(quickest < Some(Duration::from_millis(30)), "{quickest:?}");
}
