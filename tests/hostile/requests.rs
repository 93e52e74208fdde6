//! Hostile requests over raw sockets against a real lane: what two servers could read in two ways (RFC 9112, and the
//! literature of request smuggling) is refused, and the upstream sees nothing of it.

use std::net::{Shutdown, TcpStream};

use super::harness::Lane;
use super::harness::raw::{self, End, Recorder, Wire};

/// Stands behind every hostile request: served only where the request before it was misread.
const SMUGGLED: &[u8] = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";

fn lane(upstream: &Recorder) -> Lane {
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{header_read: 500ms}}, \
         limits: {{max_header_bytes: 4KiB, max_headers: 20, max_body: 1KiB}}}}]\n\
         upstream: http://{}\n",
        upstream.address
    ))
}

fn send(lane: &Lane, request: &[u8]) -> Wire {
    raw::send(lane.address, &[request, SMUGGLED].concat())
}

/// One problem reply with this status, and then the end.
fn assert_refused(name: &str, reply: &Wire, status: u16) {
    assert_eq!(reply.status(), Some(status), "{name}: {reply:?}");
    assert_eq!(reply.end, End::Closed, "{name}: {reply:?}");
    assert_eq!(reply.replies(), 1, "{name}: {reply:?}");
    let (head, body) = reply.parts();
    assert!(
        head.contains("\r\nContent-Type: application/problem+json\r\n"),
        "{name}: {reply:?}"
    );
    assert!(head.contains("\r\nConnection: close\r\n"), "{name}: {head}");
    assert!(
        head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())),
        "{name}: {reply:?}"
    );
}

/// Refuses each of `rows`, a name, a request and its status, and forwards nothing of them.
fn nothing_is_forwarded(rows: &[(&str, Vec<u8>, u16)]) {
    let upstream = Recorder::start();
    let lane = lane(&upstream);
    for (name, request, status) in rows {
        assert_refused(name, &send(&lane, request), *status);
        assert_eq!(upstream.bytes(), "", "{name}");
    }
    // Whatever had slipped through would have come before this.
    assert_eq!(lane.connect().get("/fine").status, 200);
    assert_eq!(upstream.whole().len(), 1, "{:?}", upstream.whole());
    assert!(upstream.bytes().starts_with("GET /fine HTTP/1.1\r\n"));
}

/// A POST with these field lines and what stands behind its head.
fn post(fields: &str, body: &str) -> Vec<u8> {
    format!("POST /p HTTP/1.1\r\nHost: x\r\n{fields}\r\n{body}").into_bytes()
}

/// A request with this first line, without its end.
fn line(line: &str) -> Vec<u8> {
    format!("{line}\r\nHost: x\r\n\r\n").into_bytes()
}

/// A GET with exactly these field lines.
fn head(fields: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\n{fields}\r\n").into_bytes()
}

#[test]
fn an_ambiguous_length_is_refused() {
    let length = |value: &str| post(&format!("Content-Length: {value}\r\n"), "abcde");
    let coding = |value: &str| post(&format!("Transfer-Encoding: {value}\r\n"), "0\r\n\r\n");
    let both = |first: &str, then: &str| post(&format!("{first}\r\n{then}\r\n"), "0\r\n\r\n");
    let (five, chunked) = ("Content-Length: 5", "Transfer-Encoding: chunked");
    nothing_is_forwarded(&[
        ("two lengths", both(five, "Content-Length: 6"), 400),
        ("one length twice", both(five, five), 400),
        ("length twice, cases", both(five, "content-LENGTH: 5"), 400),
        ("length list", length("5, 5"), 400),
        ("length list of two", length("5, 6"), 400),
        ("length with plus", length("+5"), 400),
        ("length with minus", length("-5"), 400),
        ("length in hex", length("0x5"), 400),
        ("length empty", length(""), 400),
        ("length with a point", length("5.0"), 400),
        ("length with an exponent", length("5e0"), 400),
        ("length in quotes", length("\"5\""), 400),
        ("length with a space inside", length("5 5"), 400),
        ("length of 2^64", length("18446744073709551616"), 400),
        ("length of 2^63", length("9223372036854775808"), 413),
        ("length in other digits", length("٥"), 400),
        ("length, then coding", both(five, chunked), 400),
        ("coding, then length", both(chunked, five), 400),
        (
            "coding and a length of 0",
            both(chunked, "Content-Length: 0"),
            400,
        ),
        ("coding identity", coding("identity"), 501),
        ("coding gzip", coding("gzip"), 501),
        ("coding chunked twice", coding("chunked, chunked"), 501),
        ("coding chunked under gzip", coding("chunked, gzip"), 501),
        ("coding gzip under chunked", coding("gzip, chunked"), 501),
        ("coding chunked, empty", coding("chunked,"), 501),
        ("coding empty, chunked", coding(", chunked"), 501),
        ("coding xchunked", coding("xchunked"), 501),
        ("coding chunkedx", coding("chunkedx"), 501),
        ("coding in quotes", coding("\"chunked\""), 501),
        ("coding with a parameter", coding("chunked;q=1"), 501),
        ("coding empty", coding(""), 501),
        ("coding behind a VT", coding("\u{b}chunked"), 400),
        (
            "coding behind a no-break space",
            coding("\u{a0}chunked"),
            501,
        ),
        ("two codings", both(chunked, chunked), 501),
        (
            "coding, then identity",
            both(chunked, "Transfer-Encoding: identity"),
            501,
        ),
        (
            "identity, then coding",
            both("Transfer-Encoding: identity", chunked),
            501,
        ),
        (
            "coding on a folded line",
            post("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"),
            400,
        ),
        (
            "coding in HTTP/1.0",
            b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
            400,
        ),
        (
            "coding with a space before its colon",
            post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"),
            400,
        ),
        (
            "length with a tab before its colon",
            post("Content-Length\t: 5\r\n", "abcde"),
            400,
        ),
        (
            "body over the limit",
            post("Content-Length: 1025\r\n", ""),
            413,
        ),
    ]);
}

#[test]
fn a_malformed_field_is_refused() {
    let field = |field: &str| head(&format!("Host: x\r\n{field}\r\n"));
    let many: String = (0..20).map(|n| format!("A-{n}: 1\r\n")).collect();
    nothing_is_forwarded(&[
        ("folded line", field("A: 1\r\n 2"), 400),
        ("folded line by a tab", field("A: 1\r\n\t2"), 400),
        ("bare CR in a value", field("A: 1\rB: 2"), 400),
        ("bare CR before the end", field("A: 1\r"), 400),
        ("bare CR in a name", field("A\rB: 1"), 400),
        ("NUL in a value", field("A: 1\0"), 400),
        ("NUL in a name", field("A\0: 1"), 400),
        ("NUL before a name", field("\0A: 1"), 400),
        ("DEL in a value", field("A: \x7f"), 400),
        ("BEL in a value", field("A: \x07"), 400),
        ("non-ASCII name", field("Ä: 1"), 400),
        ("bare LF", b"GET / HTTP/1.1\nHost: x\n\n".to_vec(), 400),
        (
            "bare LF behind a field",
            b"GET / HTTP/1.1\r\nHost: x\nA: 1\r\n\r\n".to_vec(),
            400,
        ),
        (
            "bare LF as the head's end",
            b"GET / HTTP/1.1\r\nHost: x\r\n\n".to_vec(),
            400,
        ),
        (
            "bare LF before the head",
            b"\nGET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            400,
        ),
        (
            "CR CR LF",
            b"GET / HTTP/1.1\r\nHost: x\r\r\n\r\n".to_vec(),
            400,
        ),
        ("space before the colon", field("A : 1"), 400),
        ("tab before the colon", field("A\t: 1"), 400),
        ("space before the first field", head(" Host: x\r\n"), 400),
        ("tab before the first field", head("\tHost: x\r\n"), 400),
        ("space inside a name", field("A B: 1"), 400),
        ("empty name", field(": 1"), 400),
        ("no colon", field("A"), 400),
        ("name with brackets", field("A[]: 1"), 400),
        ("too many fields", head(&format!("Host: x\r\n{many}")), 431),
        (
            "oversize field",
            field(&format!("A: {}", "a".repeat(5000))),
            431,
        ),
        (
            "oversize name",
            field(&format!("{}: 1", "a".repeat(5000))),
            431,
        ),
        (
            "oversize head in many fields",
            field(&format!("A: {}\r\n", "a".repeat(500)).repeat(10)),
            431,
        ),
        ("unknown expectation", field("Expect: 200-ok"), 417),
    ]);
}

#[test]
fn a_host_is_one_and_well_formed() {
    let host = |host: &str| head(&format!("Host: {host}\r\n"));
    nothing_is_forwarded(&[
        ("no host", head(""), 400),
        ("no host but others", head("X-Host: x\r\nHostx: y\r\n"), 400),
        ("two hosts", head("Host: x\r\nHost: y\r\n"), 400),
        ("one host twice", head("Host: x\r\nhost: x\r\n"), 400),
        ("space inside", host("x y"), 400),
        ("tab inside", host("x\ty"), 400),
        ("list", host("x, y"), 400),
        ("user part", host("user@x"), 400),
        ("slash", host("x/y"), 400),
        ("backslash", host("x\\y"), 400),
        ("query", host("x?y"), 400),
        ("fragment", host("x#y"), 400),
        ("scheme", host("http://x"), 400),
        ("port that is no number", host("x:80a"), 400),
        ("two ports", host("x:80:80"), 400),
        ("open bracket", host("[::1"), 400),
        ("bytes behind a bracket", host("[::1]x"), 400),
        ("bracket inside", host("x[::1]"), 400),
        ("no IP address in brackets", host("[x]"), 400),
        ("bad escape", host("x%zz"), 400),
        ("quotes", host("\"x\""), 400),
        ("port without a host", host(":80"), 400),
        ("port over 65535", host("x:65536"), 400),
        ("escape", host("%78"), 400),
        ("non-ASCII", host("ä.example"), 400),
        (
            "absolute target with another host",
            b"GET http://other/ HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            400,
        ),
    ]);
}

#[test]
fn a_malformed_request_line_is_refused() {
    nothing_is_forwarded(&[
        ("two spaces behind the method", line("GET  / HTTP/1.1"), 400),
        ("two spaces behind the target", line("GET /  HTTP/1.1"), 505),
        ("space in the target", line("GET /a b HTTP/1.1"), 400),
        ("spaces in the query", line("GET /?q=a b c HTTP/1.1"), 400),
        ("tab behind the method", line("GET\t/ HTTP/1.1"), 400),
        ("tab behind the target", line("GET /\tHTTP/1.1"), 400),
        ("space before the method", line(" GET / HTTP/1.1"), 400),
        ("space behind the version", line("GET / HTTP/1.1 "), 400),
        ("no version", line("GET /"), 400),
        ("no target", line("GET HTTP/1.1"), 400),
        ("no method", line("/ HTTP/1.1"), 400),
        ("HTTP/0.9", line("GET / HTTP/0.9"), 505),
        ("HTTP/2.0", line("GET / HTTP/2.0"), 505),
        ("HTTP/1.2", line("GET / HTTP/1.2"), 505),
        ("HTTP/1.10", line("GET / HTTP/1.10"), 400),
        ("HTTP/1,1", line("GET / HTTP/1,1"), 505),
        ("HTTP/01.1", line("GET / HTTP/01.1"), 505),
        ("HTTP/1", line("GET / HTTP/1"), 505),
        ("lower-case version", line("GET / http/1.1"), 505),
        ("other protocol", line("GET / ICAP/1.1"), 505),
        ("two versions", line("GET / HTTP/1.1 HTTP/1.1"), 400),
        (
            "control byte in the target",
            line("GET /\x01 HTTP/1.1"),
            400,
        ),
        ("NUL in the target", line("GET /\0 HTTP/1.1"), 400),
        ("DEL in the target", line("GET /\x7f HTTP/1.1"), 400),
        ("bare CR in the target", line("GET /\rx HTTP/1.1"), 400),
        ("non-ASCII authority", line("GET http://ä/ HTTP/1.1"), 400),
        ("CONNECT beyond ASCII", line("CONNECT ä:443 HTTP/1.1"), 400),
        ("letter without its path", line("GET ä HTTP/1.1"), 400),
        (
            "UTF-8 cut short in the path",
            b"GET /\xc3 HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            400,
        ),
        (
            "overlong UTF-8 in the path",
            b"GET /a\xc0\xaf HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            400,
        ),
        (
            "bytes that are not UTF-8 in the query",
            b"GET /?\xff HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            400,
        ),
        (
            "bytes that are not UTF-8",
            b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            400,
        ),
        ("fragment behind a path", line("GET /a#b HTTP/1.1"), 400),
        ("fragment behind a query", line("GET /a?b#c HTTP/1.1"), 400),
        ("lower-case method", line("get / HTTP/1.1"), 400),
        ("method in two cases", line("DELEte / HTTP/1.1"), 400),
        (
            "control byte in the method",
            line("GE\x01T / HTTP/1.1"),
            400,
        ),
        ("brackets in the method", line("GE(T) / HTTP/1.1"), 400),
        ("CONNECT", line("CONNECT x:443 HTTP/1.1"), 400),
        ("CONNECT with a path", line("CONNECT / HTTP/1.1"), 400),
        ("target *", line("OPTIONS * HTTP/1.1"), 400),
        ("target without its slash", line("GET a HTTP/1.1"), 400),
        (
            "target of another scheme",
            line("GET file:///etc/passwd HTTP/1.1"),
            400,
        ),
        ("target of an authority", line("GET x:80 HTTP/1.1"), 400),
        (
            "oversize target",
            line(&format!("GET /{} HTTP/1.1", "a".repeat(5000))),
            414,
        ),
        (
            "oversize query",
            line(&format!("GET /?{} HTTP/1.1", "a".repeat(5000))),
            414,
        ),
        (
            "oversize method",
            line(&format!("{} / HTTP/1.1", "A".repeat(5000))),
            431,
        ),
        (
            "empty lines without end",
            "\r\n".repeat(2500).into_bytes(),
            431,
        ),
        (
            "TLS",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(),
            400,
        ),
    ]);
}

#[test]
fn a_path_that_servers_read_differently_is_refused() {
    let rows = [
        "/..",
        "/../x",
        "/a/../../x",
        "/./../x",
        "//../x",
        "/%2e%2e/x",
        "/%2E./x",
        "/.%2e/x",
        "/a/%2e%2e/%2e%2e/x",
        "/..%2fx",
        "/a%2F..%5c..%2Fx",
        "/a%2f..;x/b",
        "/a\\b",
        "/a/..\\b",
        "/a%00",
        "/a%00.png",
        "/a%",
        "/a%2",
        "/a%zz",
        "/a%u002f",
        "/..;/x",
        "/a/..;x=1/b",
        "/a/.;/b",
        "/a/%2e%2e;/b",
        "/a/..%3b/b",
        "/a<b",
    ];
    let rows: Vec<_> = rows
        .iter()
        .map(|path| (*path, line(&format!("GET {path} HTTP/1.1")), 400))
        .collect();
    nothing_is_forwarded(&rows);
}

#[test]
fn bad_chunks_never_make_a_whole_request() {
    let upstream = Recorder::start();
    let lane = lane(&upstream);
    let chunk = format!("100\r\n{}\r\n", "a".repeat(256));
    let trailers = "A: 1\r\n".repeat(2000);
    let extension = format!("1;{}\r\na\r\n0\r\n\r\n", "a".repeat(9000));
    let rows: [(&str, &str, u16); 34] = [
        ("empty size", "\r\nabc\r\n0\r\n\r\n", 400),
        ("negative size", "-1\r\na\r\n0\r\n\r\n", 400),
        ("signed size", "+1\r\na\r\n0\r\n\r\n", 400),
        ("0x", "0x1\r\na\r\n0\r\n\r\n", 400),
        ("underscore", "1_0\r\n0123456789abcdef\r\n0\r\n\r\n", 400),
        (
            "size over 64 bits",
            "10000000000000001\r\na\r\n0\r\n\r\n",
            400,
        ),
        (
            "size of zeros over 16 digits",
            "00000000000000001\r\na\r\n0\r\n\r\n",
            400,
        ),
        ("space before the size", " 1\r\na\r\n0\r\n\r\n", 400),
        ("space behind the size", "1 \r\na\r\n0\r\n\r\n", 400),
        ("space before an extension", "1 ;a\r\na\r\n0\r\n\r\n", 400),
        ("tab behind the size", "1\t\r\na\r\n0\r\n\r\n", 400),
        ("no hex digit", "g\r\na\r\n0\r\n\r\n", 400),
        ("junk behind the size", "1g\r\na\r\n0\r\n\r\n", 400),
        ("comma", "1,1\r\na\r\n0\r\n\r\n", 400),
        ("NUL behind the size", "1\0\r\na\r\n0\r\n\r\n", 400),
        ("size ended by LF", "1\na\r\n0\r\n\r\n", 400),
        ("size ended by CR", "1\ra\r\n0\r\n\r\n", 400),
        ("size ended by CR CR LF", "1\r\r\na\r\n0\r\n\r\n", 400),
        ("extension ended by LF", "1;a\na\r\n0\r\n\r\n", 400),
        ("extension with CR", "1;a\rb\r\na\r\n0\r\n\r\n", 400),
        ("extension with NUL", "1;a\0\r\na\r\n0\r\n\r\n", 400),
        ("extension without end", &extension, 400),
        ("data without CR LF", "1\r\na0\r\n\r\n", 400),
        ("data ended by LF", "1\r\na\n0\r\n\r\n", 400),
        ("data longer than its size", "1\r\nabc\r\n0\r\n\r\n", 400),
        ("data shorter than its size", "5\r\nabc\r\n0\r\n\r\n", 400),
        ("last chunk ended by LF", "1\r\na\r\n0\n\n", 400),
        ("end by LF", "1\r\na\r\n0\r\n\n", 400),
        ("end by CR alone", "1\r\na\r\n0\r\n\r", 400),
        ("trailer ended by LF", "1\r\na\r\n0\r\nA: 1\n\r\n", 400),
        ("trailers without end", &format!("0\r\n{trailers}\r\n"), 400),
        ("no chunks at all", "abc", 400),
        (
            "body over the limit in one",
            &format!("401\r\n{}\r\n0\r\n\r\n", "a".repeat(1025)),
            413,
        ),
        (
            "body over the limit in many",
            &format!("{}0\r\n\r\n", chunk.repeat(5)),
            413,
        ),
    ];
    for (name, body, status) in rows {
        let request = post("Transfer-Encoding: chunked\r\n", body);
        let reply = send(&lane, &request);
        assert_refused(name, &reply, status);
        assert!(
            upstream.whole().is_empty(),
            "{name}: {:?}",
            upstream.whole()
        );
    }
    assert_eq!(lane.connect().get("/fine").status, 200);
    assert_eq!(upstream.whole().len(), 1, "{:?}", upstream.whole());
}

#[test]
fn a_body_cut_short_never_makes_a_whole_request() {
    let upstream = Recorder::start();
    let lane = lane(&upstream);
    for (fields, body) in [
        ("Content-Length: 5\r\n", "abc"),
        ("Transfer-Encoding: chunked\r\n", "3\r\nabc\r\n"),
        ("Transfer-Encoding: chunked\r\n", "3\r\nab"),
        ("Transfer-Encoding: chunked\r\n", "FFFFFFFFFFFFFFFE\r\nab"),
        ("Transfer-Encoding: chunked\r\n", "0\r\n"),
        ("Transfer-Encoding: chunked\r\n", ""),
    ] {
        let mut stream = TcpStream::connect(lane.address).unwrap();
        std::io::Write::write_all(&mut stream, &post(fields, body)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_refused(body, &raw::read_to_end(&mut stream), 400);
        assert!(
            upstream.whole().is_empty(),
            "{body}: {:?}",
            upstream.whole()
        );
    }
}

#[test]
fn chunk_extensions_and_trailers_stay_on_their_hop() {
    let upstream = Recorder::start();
    let lane = lane(&upstream);
    let mut request = post(
        "Transfer-Encoding: chunked\r\nConnection: close\r\n",
        "1;secret=1\r\na\r\n0;secret\r\nContent-Length: 99\r\nHost: secret\r\nTransfer-Encoding: secret\r\n\r\n",
    );
    request.extend_from_slice(SMUGGLED);
    let reply = raw::send(lane.address, &request);
    assert_eq!(
        (reply.status(), reply.replies()),
        (Some(200), 1),
        "{reply:?}"
    );
    let seen = upstream.bytes();
    assert!(seen.ends_with("\r\n\r\n1\r\na\r\n0\r\n\r\n"), "{seen}");
    assert!(!seen.contains("secret"), "{seen}");
}

/// Each field would be compared with each option.
#[test]
fn a_connection_field_names_a_few_options_at_most() {
    let naming = |options: usize| format!("Connection: {}close\r\n", "a,".repeat(options - 1));
    let with = |fields: String| head(&format!("Host: x\r\n{fields}"));
    let others = "x: y\r\n".repeat(15);
    nothing_is_forwarded(&[
        ("33 options", with(naming(33)), 400),
        ("34 in 17 fields", with(naming(2).repeat(17)), 400),
        ("1,500, and fields", with(others + &naming(1_500)), 400),
    ]);
}

#[test]
fn no_spelling_of_a_path_walks_around_its_route() {
    let upstream = Recorder::start();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{}']}}}}\n\
         rate_limits: {{none: {{limit: 1/h, by: constant}}}}\n\
         routes:\n  - {{match: {{path: /admin/*}}, upstream: app, rate_limits: [none]}}\n  - {{upstream: app}}\n",
        upstream.address
    ));
    let status = |path: &str| lane.connect().get(path).status;
    assert_eq!(status("/admin/the-one-of-this-hour"), 200);
    for path in [
        "/admin/x",
        "/admin/",
        "//admin/x",
        "///admin//x",
        "/./admin/x",
        "/x/../admin/y",
        "/x/%2e%2e/admin/y",
        "/x/.%2E/admin/y",
        "/%61dmin/x",
        "/%61%64%6d%69%6e/x",
        "/admin/%78",
        "/admin/x/..",
        "/admin/../admin/x",
        "/admin/./x",
        "/admin//x",
        "/admin/x?q",
        "/admin/?/../../x",
        "/admin/;x",
    ] {
        assert_eq!(status(path), 429, "{path}");
    }
    for path in [
        "/admin%2fx",
        "/admin%5cx",
        "/x/..;/admin/x",
        "/..%2fadmin/x",
        "/x/..%2fadmin%5Cx",
        "/x%2f..%2f;y%2Fadmin/x",
        "/admin\\x",
    ] {
        assert_eq!(status(path), 400, "{path}");
    }
    assert_eq!(upstream.whole().len(), 1, "{:?}", upstream.whole());
    assert_eq!(status("/open"), 200);
}

/// As many apps serve them alike.
#[test]
fn neither_case_nor_a_slash_walks_around_a_route_that_says_so() {
    let upstream = Recorder::start();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{}']}}}}\n\
         rate_limits: {{none: {{limit: 1/h, by: route}}, each: {{limit: 1/h, by: [client.ip, path]}}}}\n\
         routes:\n  - {{match: {{path: /login/**, ignore_case: true}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /Each/*, ignore_case: true}}, upstream: app, rate_limits: [each]}}\n  - {{upstream: app}}\n",
        upstream.address
    ));
    let status = |path: &str| lane.connect().get(path).status;
    assert_eq!(status("/login"), 200);
    for path in [
        "/login",
        "/login/",
        "/LOGIN",
        "/Login//",
        "/lOGIN/x",
        "/%4Cogin",
        "/login/;x",
        "/LOGIN?q",
    ] {
        assert_eq!(status(path), 429, "{path}");
    }
    assert_eq!(status("/LOGIN;a=b"), 400);
    assert_eq!([status("/loginn"), status("/log"), status("/")], [200; 3]);
    let of_each = ["/each/A", "/EACH/a", "/each/b"].map(status);
    assert_eq!(of_each, [200, 429, 200]);
    // The app decides what a path means, so that it gets the one that was asked for.
    assert!(upstream.bytes().contains("GET /each/A HTTP/1.1"));
}

#[test]
fn parameters_of_a_path_walk_around_no_route() {
    let upstream = Recorder::start();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{}']}}}}\n\
         rate_limits: {{none: {{limit: 1/h, by: constant}}, each: {{limit: 1/h, by: path}}}}\n\
         routes:\n  - {{match: {{path: /admin/*}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: '/matrix;v=1'}}, upstream: app}}\n\
         \x20 - {{match: {{path: '/v1/x:delete'}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /each/*}}, upstream: app, rate_limits: [each]}}\n  - {{upstream: app}}\n",
        upstream.address
    ));
    let status = |path: &str| lane.connect().get(path).status;
    assert_eq!(status("/admin/the-one-of-this-hour"), 200);
    for path in [
        "/admin;a=b/x",
        "/admin%3Ba=b/x",
        "/;a/admin/x",
        "/%3b/admin/x",
    ] {
        let reply = lane.connect().get(path);
        assert_eq!(reply.status, 400, "{path}");
        assert!(reply.body.contains("parameters"), "{reply:?}");
    }
    for path in ["/admin/x;a=b", "/v1/x%3Adelete", "/v1/x%3adelete"] {
        assert_eq!(status(path), 429, "{path}");
    }
    assert_eq!(status("/open;a=b/x"), 200);
    assert_eq!(status("/matrix;v=1"), 200);
    assert_eq!([status("/each/a;x=1"), status("/each/a;x=2")], [200, 429]);
    let seen = upstream.bytes();
    assert!(seen.contains("GET /open;a=b/x HTTP/1.1"), "{seen}");
}

#[test]
fn escaped_slashes_walk_around_no_route() {
    let upstream = Recorder::start();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{}']}}}}\n\
         rate_limits: {{none: {{limit: 1/h, by: constant}}, each: {{limit: 1/h, by: path}}}}\n\
         routes:\n  - {{match: {{path: /admin/*}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /named%2Fx}}, upstream: app}}\n\
         \x20 - {{match: {{path: /each/*}}, upstream: app, rate_limits: [each]}}\n  - {{upstream: app}}\n",
        upstream.address
    ));
    let status = |path: &str| lane.connect().get(path).status;
    assert_eq!(status("/admin/the-one-of-this-hour"), 200);
    for path in [
        "/admin%2Fx",
        "/x/..%2fadmin/x",
        "/admin%5cx",
        "/x%2F..%5cadmin%2fx",
        "/x%5Cy%2F..%2Fadmin/x",
        "/open//..%2Fadmin/x",
        "/open/;%2F..%2Fadmin/x",
        "/each/..%2Feach/x",
        "/each/x%2F..%2Fa/b",
    ] {
        let reply = lane.connect().get(path);
        assert_eq!(reply.status, 400, "{path}");
        assert!(
            reply.body.contains("where that parts segments"),
            "{reply:?}"
        );
    }
    assert_eq!(status("/admin;x%2Fy"), 400);
    assert_eq!(status("/admin/a%2Fb"), 429);
    assert_eq!(status("/open%2fx"), 200);
    assert_eq!(status("/named%2fx"), 200);
    assert_eq!(status("/each/a%2Fb"), 200);
    for path in ["/each/a/b", "/each/a%5Cb", "/each/a%2Fb;x"] {
        assert_eq!(status(path), 429, "{path}");
    }
    let seen = upstream.bytes();
    for path in ["/open%2Fx", "/named%2Fx", "/each/a%2Fb"] {
        assert!(seen.contains(&format!("GET {path} HTTP/1.1")), "{seen}");
    }
}

/// Frameworks serve a POST as the method that such a field names: Rails and Symfony do unless told otherwise.
#[test]
fn no_field_names_a_method_that_has_another_route() {
    let upstream = Recorder::start();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{}']}}}}\n\
         rate_limits: {{none: {{limit: 0/s, by: constant}}}}\n\
         routes:\n  - {{match: {{path: /a/*, methods: [DELETE, PUT]}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /b/*, methods: [POST]}}, upstream: app}}\n  - {{upstream: app}}\n",
        upstream.address
    ));
    let ask =
        |method: &str, path: &str, fields: &[&str]| lane.connect().send(method, path, fields, "");
    assert_eq!(ask("DELETE", "/a/x", &[]).status, 429);
    for (method, path, fields) in [
        ("POST", "/a/x", &["X-HTTP-Method-Override: DELETE"][..]),
        ("POST", "/a/x", &["x_http_method_override: delete"]),
        ("POST", "/a/x", &["X-HTTP-Method: PUT"]),
        ("POST", "/a/x", &["X-Method-Override: PUT"]),
        ("GET", "/a/x", &["X-HTTP-Method-Override: DELETE"]),
        (
            "POST",
            "/a/x",
            &[
                "X-HTTP-Method-Override: PATCH",
                "X-HTTP-Method-Override: DELETE",
            ],
        ),
        ("POST", "/a/x", &["X-HTTP-Method-Override: PATCH , PUT"]),
        ("POST", "/a;v/x", &["X-HTTP-Method-Override: PUT"]),
        ("POST", "/b/x", &["X-HTTP-Method-Override: PUT"]),
        ("POST", "/c", &["X-HTTP-Method: A,B,C,D,E,F,G,H,I"]),
        ("POST", "/a/x?_method=DELETE", &[]),
        ("POST", "/a/x?x=1&%5Fm%65thod=put", &[]),
        ("POST", "/a/x?_method=PATCH&.method=%20delete", &[]),
        ("POST", "/a;v/x?_method=PUT", &[]),
        ("GET", "/a/x?_method=DELETE", &[]),
        ("POST", "/b/x?_method=GET", &[]),
        (
            "POST",
            "/a/x?_method=DELETE",
            &["X-HTTP-Method-Override: PATCH"],
        ),
    ] {
        let reply = ask(method, path, fields);
        assert_eq!(reply.status, 400, "{method} {path} {fields:?}");
        assert!(reply.body.contains("names another method"), "{reply:?}");
    }
    assert_eq!(upstream.whole().len(), 0, "{:?}", upstream.whole());
    for (method, path, field) in [
        ("POST", "/a/x", "X-HTTP-Method-Override: PATCH"),
        ("POST", "/a/x", "X-HTTP-Method-Override:"),
        ("POST", "/b/x", "X-HTTP-Method-Override: post"),
        ("POST", "/c", "X-HTTP-Method-Override: DELETE"),
        ("POST", "/c", "X-HTTP-Method: A,B,C,D,E,F,G,H"),
        ("POST", "/c?_method=DELETE", "X: y"),
        ("POST", "/a/x?_method=patch&_method=", "X: y"),
        (
            "POST",
            "/a/x?method=DELETE&x_method=PUT&_methods=PUT",
            "X: y",
        ),
        ("DELETE", "/c?_method=DELETE", "X: y"),
    ] {
        assert_eq!(
            ask(method, path, &[field]).status,
            200,
            "{method} {path} {field}"
        );
    }
    let seen = upstream.bytes();
    assert!(seen.contains("X-HTTP-Method-Override: PATCH\r\n"), "{seen}");
}

#[test]
fn a_file_that_routes_by_the_method_that_is_said_is_heeded() {
    let upstream = Recorder::start();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{}']}}}}\n\
         rate_limits: {{none: {{limit: 0/s, by: constant}}}}\n\
         routes:\n  - {{match: {{path: /a/*, methods: [DELETE, PUT]}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /a/*, headers: {{x-http-method-override: DELETE}}}}, upstream: app}}\n\
         \x20 - {{match: {{path: /b/*, methods: [DELETE]}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /b/*}}, upstream: app, request_headers: {{remove: [x-http-method-override], set: {{x-http-method: POST}}}}}}\n\
         \x20 - {{upstream: app}}\n",
        upstream.address
    ));
    let status = |path: &str, fields: &[&str]| lane.connect().send("POST", path, fields, "").status;
    assert_eq!(status("/a/x", &["X-HTTP-Method-Override: DELETE"]), 200);
    for more in ["X-HTTP-Method-Override: PUT", "X-Method-Override: put"] {
        let both = ["X-HTTP-Method-Override: DELETE", more];
        assert_eq!(status("/a/x", &both), 400, "{more}");
        assert_eq!(status("/a/x", &[more]), 400, "{more}");
    }
    for spelt in [
        "X_HTTP_Method_Override: DELETE",
        "X-HTTP-Method-Override: delete",
    ] {
        assert_eq!(status("/a/x", &[spelt]), 400, "{spelt}");
    }
    // What the upstream is not told of says nothing.
    for field in [
        "X-HTTP-Method-Override: DELETE",
        "X_HTTP_Method_Override: DELETE",
        "X-HTTP-Method: DELETE",
    ] {
        assert_eq!(status("/b/x", &[field]), 200, "{field}");
    }
    assert_eq!(status("/b/x", &["X-Method-Override: DELETE"]), 400);
    assert_eq!(status("/b/x?_method=DELETE", &[]), 400);
    let seen = upstream.bytes();
    assert_eq!(seen.matches("DELETE").count(), 1, "{seen}");
}

/// Two servers could take such bytes for other letters; escapes they cannot.
#[test]
fn a_target_beyond_ascii_goes_on_in_escapes() {
    let upstream = Recorder::start();
    let lane = lane(&upstream);
    for target in [
        "/\u{e4}/../%c3%A4/p\u{20ac}?q=\u{e4}&r=%C3%A4&s=\u{20ac}",
        "http://x//\u{e4}/p%e2%82%ac?q=\u{e4}&r=%C3%A4&s=%E2%82%AC",
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let reply = raw::send(lane.address, request.as_bytes());
        assert_eq!(reply.status(), Some(200), "{reply:?}");
    }
    let sent = upstream.bytes();
    let expected = "GET /%C3%A4/p%E2%82%AC?q=%C3%A4&r=%C3%A4&s=%E2%82%AC HTTP/1.1\r\n";
    assert_eq!(sent.matches(expected).count(), 2, "{sent}");
}

#[test]
fn no_spelling_of_a_letter_walks_around_a_route() {
    let upstream = Recorder::start();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{}']}}}}\n\
         rate_limits: {{each: {{limit: 1/h, by: path}}}}\n\
         routes:\n  - {{match: {{path: /%C3%A4/*}}, upstream: app, rate_limits: [each]}}\n  - {{upstream: app}}\n",
        upstream.address
    ));
    let status = |path: &str| lane.connect().get(path).status;
    assert_eq!(status("/\u{e4}/\u{e9}"), 200);
    for path in ["/%c3%a4/\u{e9}", "/\u{e4}/%C3%A9", "/%C3%A4//%C3%A9"] {
        assert_eq!(status(path), 429, "{path}");
    }
    // Composed in another way it is another letter, as its escapes are.
    let others = ["/\u{e4}/e\u{301}", "/%C3%A4/e%CC%81"].map(status);
    assert_eq!(others, [200, 429]);
}
