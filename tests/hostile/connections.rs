//! What stands around a request of HTTP/1.1: others on its connection, the time that it takes, who its client claims to be; and answers
//! of upstreams that could be read in two ways. The lane serves on.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::harness::raw::{self, End, Recorder, scripted};
use super::harness::versions::{Client, Fields, Length, Version, run};
use super::harness::{Lane, ok};

const GOOD: &str = "POST /good HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc";
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";

fn lane(upstream: SocketAddr) -> Lane {
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{header_read: 500ms, stream_idle: 500ms, request_read: 1s}}, \
         limits: {{max_header_bytes: 4KiB, max_headers: 20}}}}]\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}'], timeout: 2s}}}}\n\
         routes:\n- {{match: {{path: /refused}}, reply: {{status: 404}}}}\n- {{upstream: app}}\n"
    ))
}

/// RFC 9112 section 9.3.2: what was in order is answered, in its place; behind what is refused nothing is a request, since it cannot be
/// told where that ends (section 6.3).
#[test]
fn a_refusal_is_the_last_answer_of_a_pipeline() {
    for (name, bad, status) in [
        (
            "two lengths (RFC 9112 section 6.3)",
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n",
            400,
        ),
        (
            "length and coding (section 6.1)",
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (
            "another coding (section 6.1)",
            "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
            501,
        ),
        (
            "another version (RFC 9110 section 2.5)",
            "GET / HTTP/2.0\r\nHost: x\r\n\r\n",
            505,
        ),
        ("no version, as in HTTP/0.9", "GET /\r\n", 400),
        (
            "no host (RFC 9112 section 3.2)",
            "GET / HTTP/1.1\r\n\r\n",
            400,
        ),
        ("bare LF (section 2.2)", "GET / HTTP/1.1\nHost: x\n\n", 400),
        (
            "path above the root",
            "GET /../x HTTP/1.1\r\nHost: x\r\n\r\n",
            400,
        ),
        (
            "unknown expectation (RFC 9110 section 10.1.1)",
            "POST / HTTP/1.1\r\nHost: x\r\nExpect: x\r\nContent-Length: 36\r\n\r\n",
            417,
        ),
        (
            "bad chunk (RFC 9112 section 7.1)",
            "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            400,
        ),
        (
            "preface of HTTP/2, late (RFC 9113 section 3.4)",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            505,
        ),
    ] {
        let upstream = Recorder::start();
        let lane = lane(upstream.address);
        let reply = raw::send(
            lane.address,
            [GOOD, GOOD, bad, SMUGGLED].concat().as_bytes(),
        );
        assert_eq!(
            (reply.replies(), reply.end),
            (3, End::Closed),
            "{name}: {reply:?}"
        );
        let mut answers = reply.text.split("HTTP/1.1 ").skip(1);
        let mut next = || answers.next().unwrap();
        assert!(
            next().starts_with("200 ") && next().starts_with("200 "),
            "{name}"
        );
        let refused = next();
        assert!(
            refused.starts_with(&status.to_string()),
            "{name}: {refused}"
        );
        assert!(
            refused.contains("\r\nConnection: close\r\n"),
            "{name}: {refused}"
        );
        assert!(!upstream.bytes().contains("smuggled"), "{name}");
        let whole = upstream.whole();
        assert!(
            whole.len() == 2 && whole.iter().all(|it| it.starts_with("POST /good ")),
            "{name}: {whole:?}"
        );
        assert_eq!(lane.connect().get("/fine").status, 200, "{name}");
    }
}

/// What is read away of a refused request is its body, to the byte (RFC 9112 section 6.3): nothing in it is a request, and all
/// behind it is.
#[test]
fn a_body_that_no_one_wants_is_no_request() {
    let body = SMUGGLED.repeat(3);
    let length = body.len();
    let pieces = |size: usize| -> String {
        let chunks = body.as_bytes().chunks(size);
        let chunks =
            chunks.map(|it| format!("{:x}\r\n{}\r\n", it.len(), String::from_utf8_lossy(it)));
        chunks.collect::<String>() + "0\r\n\r\n"
    };
    let by_length = format!("Content-Length: {length}\r\n\r\n{body}");
    let chunked = |body: &str| format!("Transfer-Encoding: chunked\r\n\r\n{body}");
    for (name, framed, served) in [
        ("by length", by_length.clone(), true),
        ("no body", format!("Content-Length: 0\r\n\r\n{GOOD}"), true),
        ("one chunk", chunked(&pieces(length)), true),
        ("many chunks", chunked(&pieces(7)), true),
        (
            "a bad size",
            chunked(&format!("{length}h\r\n{body}\r\n0\r\n\r\n")),
            false,
        ),
        (
            "a bad end",
            chunked(&format!("{length:x}\r\n{body}0\r\n\r\n")),
            false,
        ),
        (
            "bad trailers",
            chunked(&format!("0\r\nT\n{SMUGGLED}")),
            false,
        ),
        (
            "bare line feeds",
            chunked(&format!("{length:x}\n{body}\n0\n\n")),
            false,
        ),
    ] {
        // All at once, and so that it breaks wherever it may.
        for step in [usize::MAX, 1, 29] {
            let upstream = Recorder::start();
            let lane = lane(upstream.address);
            let end = "GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            let wire = format!("POST /refused HTTP/1.1\r\nHost: x\r\n{framed}{GOOD}{end}");
            let mut stream = TcpStream::connect(lane.address).unwrap();
            stream.set_nodelay(true).unwrap();
            for piece in wire.as_bytes().chunks(step) {
                // It may be closed already.
                let _ = stream.write_all(piece);
            }
            let reply = raw::read_to_end(&mut stream);
            let case = format!("{name} by {step}: {reply:?}");
            assert_eq!(reply.status(), Some(404), "{case}");
            let whole = upstream.whole();
            let smuggled = whole.iter().any(|it| it.contains("smuggled"));
            assert!(!smuggled, "{case}: {whole:?}");
            // Chunks that are not here yet are not waited for.
            if served && (step == usize::MAX || !framed.starts_with("Transfer")) {
                assert_eq!(reply.end, End::Closed, "{case}");
                assert!(whole.last().unwrap().starts_with("GET /last "), "{case}");
            } else if !served {
                assert_eq!((reply.replies(), whole.len()), (1, 0), "{case}: {whole:?}");
            }
            assert_eq!(lane.connect().get("/fine").status, 200, "{case}");
        }
    }
}

/// It has its answer, and would hold a place for as long as it likes.
#[test]
fn who_drips_a_body_that_no_one_wants_is_left() {
    let upstream = Recorder::start();
    let lane = lane(upstream.address);
    let head = "POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n";
    let (wire, took) = drip(&lane, head, "a");
    assert_eq!((wire.status(), wire.replies()), (Some(404), 1), "{wire:?}");
    // A second for the body, and one until it closes.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

/// Sends `first` at once and `more` again and again, a pause between, until the other side closes.
fn drip(lane: &Lane, first: &str, more: &str) -> (raw::Wire, Duration) {
    let mut stream = TcpStream::connect(lane.address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(first.as_bytes()).unwrap();
    let (mut dripping, more) = (stream.try_clone().unwrap(), more.to_owned());
    let (stop, stopped) = mpsc::channel::<()>();
    let sending = thread::spawn(move || {
        for byte in more.bytes().cycle() {
            let pause = stopped.recv_timeout(Duration::from_millis(40));
            if pause != Err(mpsc::RecvTimeoutError::Timeout) || dripping.write_all(&[byte]).is_err()
            {
                return;
            }
        }
    });
    let began = Instant::now();
    let wire = raw::read_to_end(&mut stream);
    let took = began.elapsed();
    drop(stop);
    sending.join().unwrap();
    (wire, took)
}

/// A head and a body have their time as a whole, however their bytes come (RFC 9110 section 15.5.9).
#[test]
fn who_drips_is_refused() {
    let head = "GET / HTTP/1.1\r\nHost: x\r\n";
    let chunked = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (name, first, more, answers) in [
        (
            "request line",
            "",
            "GET /aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            1,
        ),
        ("empty lines", "", "\r\n", 1),
        ("fields", head, "a: b\r\n", 1),
        ("a field", &format!("{head}a: "), "b", 1),
        (
            "head of a second request",
            &format!("{GOOD}{head}"),
            "a: b\r\n",
            2,
        ),
        (
            "body",
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n",
            "a",
            1,
        ),
        ("chunks", chunked, "1\r\na\r\n", 1),
        ("size of a chunk", chunked, "0", 1),
        ("extension of a chunk", &format!("{chunked}1;"), "a", 1),
        ("trailers", &format!("{chunked}0\r\n"), "a: b\r\n", 1),
        ("a stall in a head", &format!("{head}a"), "", 1),
        ("a stall in a body", &format!("{chunked}5\r\nab"), "", 1),
    ] {
        let upstream = Recorder::start();
        let lane = lane(upstream.address);
        let (wire, took) = drip(&lane, first, more);
        let last = wire.text.split("HTTP/1.1 ").last().unwrap();
        // A size of so many zeros is none.
        let is_refused =
            last.starts_with("408 ") || (name == "size of a chunk" && last.starts_with("400 "));
        assert!(is_refused, "{name}: {wire:?}");
        assert_eq!(wire.replies(), answers, "{name}: {wire:?}");
        assert!(took < Duration::from_secs(4), "{name}: {took:?}");
        let whole = upstream.whole();
        assert_eq!(whole.len(), answers - 1, "{name}: {whole:?}");
        assert_eq!(lane.connect().get("/fine").status, 200, "{name}");
    }
}

/// Who a client says that it is does not count, and goes no further, unless its proxy is trusted (RFC 7239 section 8.1); nor is a field of
/// weir's own dropped, since the client names it a hop's (RFC 9110 section 7.6.1).
#[test]
fn a_client_is_who_its_connection_says() {
    const FORGED: &str = "6.6.6.6";
    let rows: &[&[(&str, &str)]] = &[
        &[("x-forwarded-for", FORGED)],
        &[
            ("x-forwarded-for", "127.0.0.1"),
            ("x-forwarded-for", FORGED),
        ],
        &[("x-forwarded-for", "6.6.6.6, 127.0.0.1")],
        &[("x_forwarded_for", FORGED)],
        &[("x-forwarded_for", FORGED)],
        &[("x.forwarded.for", FORGED)],
        &[("forwarded", "for=6.6.6.6;proto=https")],
        &[
            ("x-real-ip", FORGED),
            ("true-client-ip", FORGED),
            ("cf-connecting-ip", FORGED),
            ("fastly-client-ip", FORGED),
            ("x_client_ip", FORGED),
            ("x-cluster-client-ip", FORGED),
            ("client-ip", FORGED),
            ("proxy-client-ip", FORGED),
            ("wl-proxy-client-ip", FORGED),
            ("x-envoy-external-address", FORGED),
            ("cf-connecting-ipv6", FORGED),
            ("fly-client-ip", FORGED),
            ("x-azure-clientip", FORGED),
        ],
        &[("x-forwarded-host", FORGED), ("x-forwarded-proto", FORGED)],
        &[("connection", "x-forwarded-for")],
        &[
            ("connection", "close, X-Forwarded-For, X-Request-Id, Host"),
            ("x-forwarded-for", FORGED),
        ],
    ];
    for asks in [Version::One, Version::Two] {
        let upstream = Recorder::start();
        let lane = Lane::start(&format!(
            "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [10.0.0.0/8]}}}}]\n\
             upstreams: {{app: {{endpoints: ['http://{}']}}}}\nrate_limits: {{few: {{limit: 11/h, by: client.ip}}}}\nroutes: [{{upstream: app, rate_limits: [few]}}]\n",
            upstream.address
        ));
        run(async {
            let mut sent = 0;
            for fields in rows.iter().chain(rows) {
                // HTTP/2 knows no such field (RFC 9113 section 8.2.2).
                if asks == Version::Two && fields[0].0 == "connection" {
                    continue;
                }
                let mut client = Client::connect(asks, lane.address).await;
                let call = client.call("GET", "/", fields, Length::None).await;
                sent += 1;
                // All are one client's.
                let expected = if sent <= 11 { 200 } else { 429 };
                assert_eq!(call.answer().await.status, expected, "{asks:?} {fields:?}");
            }
            assert!(sent > 11);
        });
        let whole = upstream.whole();
        assert_eq!(whole.len(), 11);
        for head in whole {
            let fields: Fields = head
                .lines()
                .filter_map(|line| line.split_once(": "))
                .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
                .collect();
            let of = |name: &str| fields.iter().filter(|(it, _)| it == name).count();
            assert!(!head.contains(FORGED), "{head}");
            assert!(
                head.contains("\r\nX-Forwarded-For: 127.0.0.1\r\n"),
                "{head}"
            );
            let ours = [of("x-forwarded-for"), of("host"), of("x-request-id")];
            assert_eq!(ours, [1, 1, 1], "{head}");
        }
    }
}

/// A response's framing is as strict as a request's (RFC 9112 sections 6.1 to 6.3): clients of weir would read it in two ways.
#[test]
fn a_doubtful_response_goes_to_no_one() {
    let with = |fields: &str, body: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n{body}");
    let hints = |count: usize| "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n".repeat(count);
    for (name, bytes) in [
        (
            "coding identity",
            with("Transfer-Encoding: identity\r\n", "secret"),
        ),
        (
            "coding chunked, empty",
            with("Transfer-Encoding: chunked,\r\n", "secret"),
        ),
        (
            "coding gzip under chunked",
            with(
                "Transfer-Encoding: gzip, chunked\r\n",
                "6\r\nsecret\r\n0\r\n\r\n",
            ),
        ),
        (
            "coding behind a VT",
            with(
                "Transfer-Encoding: \u{b}chunked\r\n",
                "6\r\nsecret\r\n0\r\n\r\n",
            ),
        ),
        (
            "two codings",
            with(
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                "6\r\nsecret\r\n0\r\n\r\n",
            ),
        ),
        (
            "coding, then length",
            with(
                "Transfer-Encoding: chunked\r\nContent-Length: 6\r\n",
                "6\r\nsecret\r\n0\r\n\r\n",
            ),
        ),
        (
            "folded coding",
            with(
                "Transfer-Encoding:\r\n chunked\r\n",
                "6\r\nsecret\r\n0\r\n\r\n",
            ),
        ),
        ("length with plus", with("Content-Length: +6\r\n", "secret")),
        (
            "length with a space inside",
            with("Content-Length: 6 6\r\n", "secret"),
        ),
        (
            "length list of two",
            with("Content-Length: 6, 7\r\n", "secret"),
        ),
        (
            "status of four digits (section 4)",
            "HTTP/1.1 2000 OK\r\nContent-Length: 6\r\n\r\nsecret".to_owned(),
        ),
        (
            "status of two digits",
            "HTTP/1.1 20 OK\r\nContent-Length: 6\r\n\r\nsecret".to_owned(),
        ),
        (
            "name with a space (section 5.1)",
            with("A B: 1\r\nContent-Length: 6\r\n", "secret"),
        ),
        (
            "line without a colon",
            with("A\r\nContent-Length: 6\r\n", "secret"),
        ),
        (
            "interim response with a body (RFC 9110 section 15.2)",
            "HTTP/1.1 100 Continue\r\nContent-Length: 6\r\n\r\nsecret".to_owned()
                + &with("Content-Length: 6\r\n", "secret"),
        ),
        (
            "a flood of early hints (RFC 8297)",
            hints(1000) + &with("Content-Length: 6\r\n", "secret"),
        ),
    ] {
        let upstream = scripted(move |mut stream| {
            while let Some(head) = raw::read_head(&mut stream) {
                let reply = match head.starts_with("GET /fine ") {
                    true => ok("fine"),
                    false => bytes.clone(),
                };
                let _ = stream.write_all(reply.as_bytes());
            }
        });
        let lane = lane(upstream);
        let get = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let reply = raw::send(lane.address, get.as_bytes());
        let hints = reply.text.matches("HTTP/1.1 103 ").count();
        assert!(hints <= 17, "{name}: {hints}");
        let last = reply.text.split("HTTP/1.1 ").last().unwrap();
        assert!(last.starts_with("502 "), "{name}: {reply:?}");
        assert_eq!(
            (reply.end, reply.replies()),
            (End::Closed, hints + 1),
            "{name}: {reply:?}"
        );
        assert!(!reply.text.contains("secret"), "{name}: {reply:?}");
        assert_eq!(lane.connect().get("/fine").body, "fine", "{name}");
    }
}

/// An upstream speaks when it is asked (RFC 9112 section 9.3): what comes while its connection is idle answers no one's request.
#[test]
fn a_response_that_no_one_asked_for_goes_to_no_one() {
    for stray in [
        ok("stray"),
        "HTTP/1.1 408 Request Timeout\r\nContent-Length: 5\r\n\r\nstray".to_owned(),
        "stray".to_owned(),
        "\r\n".to_owned(),
    ] {
        let (idle, told) = mpsc::channel();
        let upstream = scripted(move |mut stream| {
            let mut strays = true;
            while raw::read_head(&mut stream).is_some() {
                let _ = stream.write_all(ok("fine").as_bytes());
                let mut byte = [0];
                if std::mem::take(&mut strays) {
                    stream
                        .set_read_timeout(Some(Duration::from_millis(50)))
                        .unwrap();
                    // The client has its answer by then.
                    let _ = stream.peek(&mut byte);
                    let _ = stream.write_all(stray.as_bytes());
                    stream.set_read_timeout(None).unwrap();
                    let _ = idle.send(());
                }
            }
            let _ = stream.read(&mut [0]);
        });
        let lane = lane(upstream);
        let mut client = lane.connect();
        for method in ["GET", "POST", "GET", "POST"] {
            let reply = client.send(method, "/", &[], "");
            assert_eq!((reply.status, &*reply.body), (200, "fine"), "{method}");
            let _ = told.recv_timeout(Duration::from_secs(2));
        }
    }
}
