//! A lane on port 0 between raw sockets: a scripted upstream, and a client that sends what it likes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::harness::servers::Kept;
use super::harness::{Lane, raw};

/// Answers the n-th connection with the n-th reply once it has read a head that ends in `until`; sends on what it read.
fn upstream(
    replies: Vec<&'static str>,
    until: &'static str,
) -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, seen) = mpsc::channel();
    thread::spawn(move || {
        for reply in replies {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            let mut piece = [0; 1024];
            while !String::from_utf8_lossy(&bytes).contains(until) {
                match stream.read(&mut piece) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => bytes.extend_from_slice(&piece[..n]),
                }
            }
            // A test that does not look has let go of its end.
            let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
            stream.write_all(reply.as_bytes()).unwrap();
        }
    });
    (address, seen)
}

fn weir(upstream: SocketAddr) -> Lane {
    weir_within("60s", upstream)
}

/// With this time for the upstream.
fn weir_within(timeout: &str, upstream: SocketAddr) -> Lane {
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{header_read: 500ms, keep_alive: 5s}}, limits: {{max_body: 1KiB}}}}]\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}'], timeout: {timeout}}}}}\n"
    ))
}

/// Sends `request` and reads until the connection closes.
fn ask(weir: &Lane, request: &str) -> String {
    let mut stream = TcpStream::connect(weir.address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    String::from_utf8(reply).unwrap()
}

#[test]
fn a_request_goes_up_clean_and_its_response_comes_back() {
    let (up, seen) = upstream(
        vec!["HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 2\r\nX-A: 1\r\n\r\nhi"],
        "\r\n\r\n",
    );
    let request = "GET /a/../b//c?q=/../ HTTP/1.1\r\nHost: x\r\nConnection: close, x-hop\r\nX-Hop: 1\r\n\
                   X-Forwarded-For: 6.6.6.6\r\nX-End: 2\r\n\r\n";
    let reply = ask(&weir(up), request);
    assert_eq!(
        reply,
        "HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 2\r\nX-A: 1\r\nConnection: close\r\n\r\nhi"
    );
    let head = seen.recv().unwrap();
    let (known, id) = head.split_once("X-Request-Id: ").unwrap();
    let expected = "GET /b/c?q=/../ HTTP/1.1\r\nHost: x\r\nX-End: 2\r\nX-Forwarded-For: 127.0.0.1\r\n\
                    X-Forwarded-Proto: http\r\n";
    assert_eq!(known, expected);
    assert_eq!(id.len(), 36 + 4, "a UUID and the head's end: {id}");
}

#[test]
fn chunked_bodies_pass_both_ways() {
    let (up, seen) = upstream(
        vec![
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=1\r\nhi\r\n0\r\nT: 1\r\n\r\n",
        ],
        // With its line's start: a head may end in a request id whose last digit is 0.
        "\r\n0\r\n\r\n",
    );
    let request = "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
                   3\r\nabc\r\n0\r\n\r\n";
    let reply = ask(&weir(up), request);
    assert!(
        reply.ends_with(
            "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\nhi\r\n0\r\nT: 1\r\n\r\n"
        ),
        "{reply}"
    );
    assert!(
        seen.recv()
            .unwrap()
            .ends_with("\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    );
}

#[test]
fn a_connection_serves_one_request_after_another_over_one_upstream_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let weir = weir(listener.local_addr().unwrap());
    let (sender, counts) = mpsc::channel();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut piece = [0; 1024];
        for _ in 0..3 {
            let n = stream.read(&mut piece).unwrap();
            assert!(piece[..n].ends_with(b"\r\n\r\n"));
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                .unwrap();
            sender.send(()).unwrap();
        }
    });
    let last = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let reply = ask(
        &weir,
        &format!("{}{last}", "GET / HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2)),
    );
    assert_eq!(reply.matches("HTTP/1.1 200 OK").count(), 3);
    assert_eq!(counts.iter().take(3).count(), 3);
}

#[test]
fn bad_input_gets_a_problem_and_nothing_is_forwarded() {
    let (up, seen) = upstream(vec![], "");
    let weir = weir(up);
    for (request, status) in [
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
            501,
        ),
        ("GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        ("GET /%2e%2e/x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /a%00b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nExpect: x\r\n\r\n", 417),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1025\r\n\r\n",
            413,
        ),
        ("GET / HTTP/1.1\r\nHo", 408),
    ] {
        let reply = ask(&weir, request);
        assert!(
            reply.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request:?}: {reply}"
        );
        assert!(reply.contains("application/problem+json"), "{reply}");
    }
    assert!(seen.try_recv().is_err());
}

#[test]
fn a_body_may_be_as_long_as_the_limit() {
    let reply = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    let (up, seen) = upstream(vec![reply], "end");
    let body = "x".repeat(1024 - 3) + "end";
    let head = "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1024\r\n\r\n";
    let answer = ask(&weir(up), &format!("{head}{body}"));
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(seen.recv().unwrap().ends_with(&body));
}

#[test]
fn an_old_client_is_told_no_100() {
    let reply = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    let (up, _) = upstream(vec![reply], "abc");
    let lane = weir(up);
    let mut client = lane.connect();
    client.write(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n");
    assert_eq!(client.status_within(100), None);
    client.write(b"abc");
    assert_eq!(client.status_within(5_000), Some(200));
}

#[test]
fn upstream_trouble_is_a_502_a_504_or_an_abort() {
    let get = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let status = |reply: &'static str| ask(&weir(upstream(vec![reply], "\r\n\r\n").0), get);
    assert!(status("nonsense\r\n\r\n").starts_with("HTTP/1.1 502 "));
    assert!(status("").starts_with("HTTP/1.1 502 "));
    assert!(status("HTTP/1.1 101 Switching Protocols\r\n\r\n").starts_with("HTTP/1.1 502 "));
    let cut = status("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc");
    assert!(cut.ends_with("\r\n\r\nabc"), "{cut}");
    let closed = Kept::new();
    assert!(ask(&weir(closed.address), get).starts_with("HTTP/1.1 502 "));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let weir = weir_within("500ms", silent.local_addr().unwrap());
    assert!(ask(&weir, get).starts_with("HTTP/1.1 504 "));
}

#[test]
fn a_response_that_comes_before_the_body_is_whole_is_passed_on() {
    let (up, _seen) = upstream(
        vec!["HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"],
        "\r\n\r\n",
    );
    let reply = ask(
        &weir(up),
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc",
    );
    assert!(reply.starts_with("HTTP/1.1 413 Too Large\r\n"), "{reply}");
    assert!(reply.ends_with("Connection: close\r\n\r\nno"), "{reply}");
}

#[test]
fn a_request_goes_to_the_upstream_of_its_route_whatever_the_spelling_of_its_path() {
    let admin = || {
        upstream(
            vec!["HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nadmin"; 4],
            "\r\n\r\n",
        )
        .0
    };
    let open = || {
        upstream(
            vec!["HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nopen"; 4],
            "\r\n\r\n",
        )
        .0
    };
    let weir = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{admin: {{endpoints: ['http://{}']}}, open: {{endpoints: ['http://{}']}}}}\n\
         routes:\n  - {{match: {{path: /admin/*}}, upstream: admin}}\n  - {{match: {{host: x, path: /*}}, upstream: open}}\n",
        admin(),
        open()
    ));
    let get = |host: &str, path: &str| {
        ask(
            &weir,
            &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"),
        )
    };
    for path in [
        "/admin/a",
        "//admin/a",
        "/open/../admin/a",
        "/%61dmin/%2e/a",
    ] {
        assert!(get("x", path).ends_with("\r\nadmin"), "{path}");
    }
    assert!(get("x:80", "/other").ends_with("\r\nopen"));
    assert!(get("y", "/other").starts_with("HTTP/1.1 404 "));
}

#[test]
fn forwarding_fields_are_kept_from_a_trusted_proxy() {
    let (up, seen) = upstream(
        vec!["HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"],
        "\r\n\r\n",
    );
    let weir = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [127.0.0.1]}}}}]\nupstream: http://{up}\n"
    ));
    let fields = "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: https\r\nX-Request-Id: abc\r\n";
    ask(
        &weir,
        &format!("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}\r\n"),
    );
    let head = seen.recv().unwrap();
    assert!(
        head.contains("X-Forwarded-For: 6.6.6.6, 127.0.0.1\r\n"),
        "{head}"
    );
    assert_eq!(
        head.matches("X-Forwarded-Proto: https\r\n").count(),
        1,
        "{head}"
    );
    assert_eq!(head.matches("X-Request-Id: abc\r\n").count(), 1, "{head}");
}

#[test]
fn an_upgraded_connection_passes_bytes_both_ways_until_both_sides_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let weir = weir(listener.local_addr().unwrap());
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut piece = [0; 1024];
        let n = stream.read(&mut piece).unwrap();
        let head = String::from_utf8_lossy(&piece[..n]).into_owned();
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello")
            .unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        stream.write_all(&rest).unwrap();
        head
    });
    let mut client = TcpStream::connect(weir.address).unwrap();
    client
        .write_all(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x/1, websocket\r\n\r\n",
        )
        .unwrap();
    let mut reply = [0; 1024];
    let mut seen = String::new();
    while !seen.ends_with("hello") {
        let n = client.read(&mut reply).unwrap();
        assert_ne!(n, 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&reply[..n]));
    }
    assert!(seen.starts_with(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    ));
    client.write_all(b"ping").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "ping");
    assert!(
        echo.join()
            .unwrap()
            .contains("Connection: upgrade\r\nUpgrade: x/1, websocket\r\n")
    );
}

#[test]
fn trace_goes_no_further_and_options_as_far_as_it_may() {
    let ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    let (up, seen) = upstream(vec![ok; 4], "\r\n\r\n");
    let weir = weir(up);
    let ask = |method: &str, fields: &str| {
        let head = format!("{method} / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}\r\n");
        ask(&weir, &head)
    };
    let refused = ask("TRACE", "");
    assert!(
        refused.starts_with("HTTP/1.1 405 Method Not Allowed\r\n")
            && refused.contains("details=\"trace\"\r\n")
            && refused.contains("\r\nAllow: GET, HEAD, "),
        "{refused}"
    );
    let answered = ask("OPTIONS", "Max-Forwards: 0\r\n");
    assert!(answered.starts_with("HTTP/1.1 204 "), "{answered}");
    for (method, sent, passed) in [
        ("OPTIONS", "Max-Forwards: 1", "Max-Forwards: 0"),
        ("OPTIONS", "max-forwards: 070", "Max-Forwards: 69"),
        ("OPTIONS", "Max-Forwards: +1", "Max-Forwards: +1"),
        ("GET", "Max-Forwards: 0", "Max-Forwards: 0"),
    ] {
        let answered = ask(method, &format!("{sent}\r\n"));
        assert!(answered.starts_with("HTTP/1.1 200 "), "{sent}: {answered}");
        let seen = seen.recv().unwrap();
        let told: Vec<_> = seen
            .lines()
            .filter(|line| line.to_ascii_lowercase().starts_with("max-forwards:"))
            .collect();
        assert_eq!(told, [passed], "{method} {sent}: {seen}");
    }
}

/// RFC 9110 section 6.6.1.
#[test]
fn a_response_without_a_date_gets_one() {
    let dated = "HTTP/1.1 200 OK\r\nDate: then\r\nContent-Length: 0\r\n\r\n";
    let bare = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let dates = |response| {
        let (up, _seen) = upstream(vec![response], "\r\n\r\n");
        let reply = ask(&weir(up), request);
        let dates = reply
            .split("\r\n")
            .filter_map(|line| line.strip_prefix("Date: "));
        dates.map(str::to_owned).collect::<Vec<_>>()
    };
    let added = dates(bare);
    assert!(added.len() == 1 && added[0].ends_with(" GMT"), "{added:?}");
    assert_eq!(dates(dated), ["then"]);
}

/// RFC 9110 section 15.5.22.
#[test]
fn a_426_says_which_protocol_is_wanted() {
    let (up, _seen) = upstream(
        vec![
            "HTTP/1.1 426 Upgrade Required\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n",
        ],
        "\r\n\r\n",
    );
    let reply = ask(
        &weir(up),
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    );
    assert!(
        reply.contains("\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"),
        "{reply}"
    );
}

/// Some servers fill the size's line up; clients get weir's own framing.
#[test]
fn a_chunks_size_may_have_spaces_behind_it_in_a_response() {
    let (up, _seen) = upstream(
        vec![
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2  \r\nhi\r\n1\t ;x=1\r\n!\r\n0 \r\n\r\n",
        ],
        "\r\n\r\n",
    );
    let reply = ask(
        &weir(up),
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    );
    let (_, body) = reply.split_once("\r\n\r\n").unwrap();
    assert_eq!(raw::unchunk(body), ("hi!".to_owned(), ""), "{reply}");
}
