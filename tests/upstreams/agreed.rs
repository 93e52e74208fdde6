//! What is spoken with an upstream: as the file says, or as each connection agrees on it under TLS (ALPN).

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::harness::origin::Origin;
use super::harness::process::{Running, file};
use super::harness::raw;
use super::harness::tls::Authority;
use super::harness::{DEADLINE, eventually};

const BOTH: &[&str] = &["h2", "http/1.1"];

fn authority() -> Authority {
    let authority = Authority::new();
    authority.issue("app", "DNS:localhost");
    authority
}

/// A weir in front of `endpoint`, with these keys of its upstream.
fn front(endpoint: &str, keys: &str) -> (Running, tempfile::NamedTempFile) {
    let config = file(&format!(
        "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [127.0.0.2]}}}}]\n\
         admin: {{address: '127.0.0.1:0'}}\nruntime: {{lanes: 1}}\n\
         upstreams: {{app: {{endpoints: ['{endpoint}'], connect_timeout: 10s, {keys}}}}}\nroutes: [{{upstream: app}}]\n"
    ));
    (Running::start(config.path()), config)
}

/// Likewise, in front of one under TLS whose certificate is of this authority.
fn secure_front(
    origin: &Origin,
    authority: &Authority,
    keys: &str,
) -> (Running, tempfile::NamedTempFile) {
    let ca = authority.path("ca.crt");
    let keys = format!("tls: {{ca: '{}'}}, {keys}", ca.display());
    front(&format!("https://localhost:{}", origin.port), &keys)
}

#[test]
fn a_connection_speaks_what_both_ends_have_agreed_on() {
    let authority = authority();
    let check = |knows: &[&str], protocol: &str, expected: Result<&str, &str>| {
        let name = format!("{protocol} with {knows:?}");
        let origin = Origin::secure(&authority, "app", knows);
        let keys = format!("protocol: {protocol}");
        let (running, _config) = secure_front(&origin, &authority, &keys);
        let mut client = running.client();
        let first = client.get("/a");
        match expected {
            Ok(version) => {
                let spoken = |body: &str| body.split(' ').next().unwrap().to_owned();
                assert_eq!(spoken(&first.body), version, "{name}: {first:?}");
                let posted = client.send("POST", "/b", &[], "abcde");
                assert_eq!(spoken(&posted.body), version, "{name}: {posted:?}");
                assert!(posted.body.ends_with(" 5"), "{name}: {posted:?}");
                // A client of HTTP/1.0 has no chunks, and reads to the end.
                let address = running.address.parse().unwrap();
                let old = raw::send(address, b"GET /c HTTP/1.0\r\n\r\n");
                assert_eq!(old.status(), Some(200), "{name}: {old:?}");
                assert!(old.parts().1.starts_with(version), "{name}: {old:?}");
                assert_eq!(origin.opened(), 1, "{name}");
            }
            Err(reason) => {
                assert_eq!(first.status, 502, "{name}: {first:?}");
                let said = first.field("proxy-status").unwrap();
                assert!(said.contains(reason), "{name}: {said}");
            }
        }
    };
    let nothing = Err("error=tls_protocol_error; details=\"upstream_nothing_in_common\"");
    let (two, one): (&[&str], &[&str]) = (&["h2"], &["http/1.1"]);
    check(BOTH, "auto", Ok("2"));
    check(two, "auto", Ok("2"));
    check(one, "auto", Ok("1"));
    check(&[], "auto", Ok("1"));
    check(BOTH, "http1", Ok("1"));
    check(one, "http1", Ok("1"));
    check(&[], "http1", Ok("1"));
    check(two, "http1", nothing);
    check(BOTH, "http2", Ok("2"));
    check(one, "http2", nothing);
    // One that says nothing of HTTP/2 is not spoken to in it.
    check(&[], "http2", nothing);
}

/// Servers of old end TLS by closing the connection. A body of no length is over then; one that says how long it is may not be.
#[test]
fn a_body_up_to_the_close_may_end_without_a_word_of_tls() {
    let authority = authority();
    let tls = Arc::new(Origin::tls(&authority, "app", &["http/1.1"]));
    let address = raw::scripted(move |mut tcp| {
        let mut session = rustls::ServerConnection::new(tls.clone()).unwrap();
        let mut stream = rustls::Stream::new(&mut session, &mut tcp);
        let mut asked = [0; 4096];
        let Ok(1..) = stream.read(&mut asked) else {
            return;
        };
        let field = if asked.starts_with(b"GET /long ") {
            "Content-Length: 9\r\n"
        } else {
            ""
        };
        let _ = write!(stream, "HTTP/1.0 200 OK\r\n{field}\r\nhello");
    });
    for protocol in ["http1", "auto"] {
        let ca = authority.path("ca.crt");
        let keys = format!("tls: {{ca: '{}'}}, protocol: {protocol}", ca.display());
        let (running, _config) = front(&format!("https://localhost:{}", address.port()), &keys);
        let got = |path| {
            let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            raw::send(running.address.parse().unwrap(), request.as_bytes())
        };
        let whole = got("/");
        assert_eq!(
            raw::unchunk(whole.parts().1).0,
            "hello",
            "{protocol}: {whole:?}"
        );
        let cut = got("/long");
        assert_eq!(cut.parts().1, "hello", "{protocol}: {cut:?}");
    }
}

#[test]
fn many_at_once_share_a_connection_where_that_is_agreed_on() {
    let authority = authority();
    for (knows, most) in [(BOTH, 1), (&["http/1.1"], 20)] {
        let origin = Origin::secure(&authority, "app", knows);
        let (running, _config) = secure_front(&origin, &authority, "protocol: auto");
        thread::scope(|scope| {
            for _ in 0..20 {
                let mut client = running.client();
                scope.spawn(move || assert_eq!(client.get("/").status, 200));
            }
        });
        assert!(origin.opened() <= most, "{}", origin.opened());
    }
}

#[test]
fn a_switch_of_protocols_is_asked_for_by_http1() {
    let authority = authority();
    let origin = Origin::secure(&authority, "app", BOTH);
    let (running, _config) = secure_front(&origin, &authority, "protocol: auto");
    let mut client = running.client();
    assert!(client.get("/").body.starts_with("2 "));
    let mut switched = running.connect();
    switched.set_read_timeout(Some(DEADLINE)).unwrap();
    let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nbytes";
    switched.write_all(request).unwrap();
    let head = raw::read_head(&mut switched).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let mut echoed = [0; 5];
    switched.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"bytes");
    // Requests go on by HTTP/2.
    assert!(client.get("/").body.starts_with("2 "));
    assert_eq!(origin.opened(), 2);
}

/// As Docker's client asks for a terminal: what it is to be stands in the body.
#[test]
fn a_switch_may_be_asked_for_with_a_body() {
    for is_early in [false, true] {
        let address = raw::scripted(move |mut stream| {
            let head = raw::read_head(&mut stream).unwrap();
            assert!(head.contains("\r\nUpgrade: tcp\r\n"), "{head}");
            assert!(head.contains("\r\nContent-Length: 5\r\n"), "{head}");
            let switched = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n";
            let mut body = [0; 5];
            if is_early {
                stream.write_all(switched).unwrap();
            }
            stream.read_exact(&mut body).unwrap();
            if !is_early {
                stream.write_all(switched).unwrap();
            }
            stream.write_all(&body).unwrap();
            let _ = std::io::copy(&mut stream.try_clone().unwrap(), &mut stream);
        });
        let (running, _config) = front(&format!("http://{address}"), "protocol: http1");
        let mut client = running.connect();
        let head = b"POST /exec HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 5\r\n\r\n";
        client.write_all(&[head, &b"{}"[..]].concat()).unwrap();
        // An early answer is held until the upstream has all that it is of.
        let soon = Duration::from_millis(100);
        client.set_read_timeout(Some(soon)).unwrap();
        assert_eq!(raw::read_head(&mut client), None);
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        client.write_all(b"{}\nls").unwrap();
        let head = raw::read_head(&mut client).unwrap();
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let mut echoed = [0; 7];
        client.read_exact(&mut echoed).unwrap();
        assert_eq!(&echoed, b"{}{}\nls");
    }
}

#[test]
fn checks_speak_what_requests_do() {
    let authority = authority();
    let health = |passes: bool, protocol: &str| {
        let after = if passes { 1000 } else { 1 };
        format!(
            "protocol: {protocol}, panic_threshold: 0%, \
             health: {{path: /healthz, interval: 50ms, timeout: 10s, unhealthy_after: {after}, healthy_after: 1}}"
        )
    };
    let passed = |running: &Running| {
        let series = "weir_upstream_health_checks_total{upstream=\"app\",result=\"passed\"}";
        eventually(|| running.metric(series) >= 2);
        assert_eq!(running.client().get("/").status, 200);
    };
    let plain = Origin::by_http2();
    let endpoint = format!("http://127.0.0.1:{}", plain.port);
    passed(&front(&endpoint, &health(true, "http2")).0);
    // It reads no HTTP/1.1.
    let (running, _config) = front(&endpoint, &health(false, "http1"));
    eventually(|| running.client().get("/").status == 503);
    for (knows, protocol) in [
        (BOTH, "auto"),
        (&["http/1.1"], "auto"),
        (&["h2"], "http2"),
        (BOTH, "http1"),
    ] {
        let origin = Origin::secure(&authority, "app", knows);
        passed(&secure_front(&origin, &authority, &health(true, protocol)).0);
    }
}

#[test]
fn the_scheme_is_the_client_s_or_the_connection_s() {
    let authority = authority();
    let (plain, secure) = (
        Origin::by_http2(),
        Origin::secure(&authority, "app", &["h2"]),
    );
    let endpoint = format!("http://127.0.0.1:{}", plain.port);
    let scheme = |body: &str| {
        let uri = body.split(' ').nth(2).unwrap();
        uri.split(':').next().unwrap().to_owned()
    };
    let (running, _config) = front(&endpoint, "protocol: http2");
    let said = "X-Forwarded-Proto: https";
    assert_eq!(scheme(&running.client().get("/").body), "http");
    // It is no trusted proxy that says so.
    let reply = running.client().send("GET", "/", &[said], "");
    assert_eq!(scheme(&reply.body), "http");
    let (running, _config) = secure_front(&secure, &authority, "protocol: http2");
    assert_eq!(scheme(&running.client().get("/").body), "https");
    // Of a client that speaks TLS, and of a trusted proxy whose client does.
    let listening = |keys: &str| {
        let config = file(&format!(
            "listeners: [{{address: '127.0.0.1:0', {keys}}}]\nadmin: {{address: '127.0.0.1:0'}}\n\
             upstreams: {{app: {{endpoints: ['{endpoint}'], connect_timeout: 10s, protocol: http2}}}}\nroutes: [{{upstream: app}}]\n"
        ));
        (Running::start(config.path()), config)
    };
    let pair = authority.pair("app");
    let (tls, _config) = listening(&format!("tls: {{certificates: [{pair}]}}"));
    let reply = authority
        .client()
        .connect(&tls.address, "localhost")
        .get("/");
    assert_eq!(scheme(&reply.body), "https");
    let (behind, _config) = listening("client_ip: {trusted_proxies: [127.0.0.1]}");
    for (said, expected) in [
        (said, "https"),
        ("X-Forwarded-Proto: HTTPS, http", "https"),
        ("X-Forwarded-Proto: http, https", "http"),
        ("X-Forwarded-Proto: ftp", "http"),
    ] {
        let reply = behind.client().send("GET", "/", &[said], "");
        assert_eq!(scheme(&reply.body), expected, "{said}");
    }
}
