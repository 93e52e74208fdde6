//! TLS with clients: which certificate is shown, who is let in, what the upstream is told, and what a change of files does.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use rustls::ProtocolVersion;
use rustls::version::{TLS12, TLS13};

use super::harness::front::Weir;
use super::harness::process::{Running, file};
use super::harness::tls::{Authority, der, self_signed};
use super::harness::{DEADLINE, eventually};

fn failures(weir: &Weir, reason: &str) -> u64 {
    let series =
        format!("weir_tls_handshake_failures_total{{listener=\"in\",reason=\"{reason}\"}}");
    weir.running.told(&series).unwrap() as u64
}

/// With the certificate `a` for a.test.
fn weir_of(authority: &Authority, more: &str) -> Weir {
    authority.issue("a", "DNS:a.test");
    Weir::start(
        &format!("tls: {{certificates: [{}]{more}}}", authority.pair("a")),
        "",
    )
}

#[test]
fn the_certificate_is_that_of_the_name_or_the_first() {
    let authority = Authority::new();
    authority.issue("first", "DNS:first.test");
    authority.issue("wild", "DNS:*.wild.test");
    authority.issue("exact", "DNS:one.wild.test,DNS:Upper.test");
    let pairs = ["first", "wild", "exact"].map(|name| authority.pair(name));
    let weir = Weir::start(
        &format!("tls: {{certificates: [{}]}}", pairs.join(", ")),
        "",
    );
    let check = |name: &str, expected: &str| {
        let file = authority.path(&format!("{expected}.crt"));
        // Whether it fits the name is no matter of the one that shows it.
        let mut client = authority.client();
        let any = harness_verifier::Any(client.config.crypto_provider().clone());
        let mut dangerous = client.config.dangerous();
        dangerous.set_certificate_verifier(Arc::new(any));
        let shown = client.connect(weir.address(), name).shown();
        assert_eq!(shown, der(file), "{name}");
    };
    check("first.test", "first");
    check("two.wild.test", "wild");
    check("one.wild.test", "exact");
    check("ONE.wild.TEST", "exact");
    check("upper.test", "exact");
    check("wild.test", "first");
    check("a.two.wild.test", "first");
    check("other.test", "first");
    // No name at all.
    check("127.0.0.1", "first");
}

#[test]
fn the_upstream_is_told_that_it_is_https() {
    let authority = Authority::new();
    let weir = weir_of(&authority, "");
    let mut client = authority.client().connect(weir.address(), "a.test");
    assert_eq!(client.get("/").status, 200);
    let seen = weir.upstream.wait_for_request();
    assert!(seen.contains("\r\nX-Forwarded-Proto: https\r\n"), "{seen}");
    // And the connection goes on.
    assert_eq!(client.get("/").body, "ok");
}

#[test]
fn both_versions_are_spoken_unless_the_file_says_otherwise() {
    let authority = Authority::new();
    let both = weir_of(&authority, "");
    for (version, expected) in [
        (&TLS12, ProtocolVersion::TLSv1_2),
        (&TLS13, ProtocolVersion::TLSv1_3),
    ] {
        let client = authority.client_of(version);
        let mut client = client.connect(both.address(), "a.test");
        assert_eq!((client.version(), client.get("/").status), (expected, 200));
    }
    for version in ["1.2", "1.3"] {
        let series = format!(
            "weir_tls_handshakes_total{{listener=\"in\",version=\"{version}\",session=\"full\"}}"
        );
        assert_eq!(both.running.told(&series), Some(1.0));
    }
    assert_eq!(
        both.running
            .told("weir_tls_handshake_duration_seconds_count{listener=\"in\"}"),
        Some(2.0)
    );
    let new = weir_of(&authority, ", min_version: '1.3'");
    let old = authority.client_of(&TLS12);
    let said = old.try_connect(new.address(), "a.test").err().unwrap();
    assert!(said.contains("ProtocolVersion"), "{said}");
    eventually(|| failures(&new, "nothing_in_common") == 1);
}

#[test]
fn sessions_are_resumed_by_ticket_and_from_memory() {
    let authority = Authority::new();
    let weir = weir_of(&authority, "");
    for version in [&TLS12, &TLS13] {
        let client = authority.client_of(version);
        let mut first = client.connect(weir.address(), "a.test");
        assert_eq!((first.get("/").status, first.resumed()), (200, false));
        let mut second = client.connect(weir.address(), "a.test");
        assert_eq!((second.get("/").status, second.resumed()), (200, true));
    }
    let series = "weir_tls_handshakes_total{listener=\"in\",version=\"1.3\",session=\"resumed\"}";
    assert_eq!(weir.running.told(series), Some(1.0));
    // A client that takes no tickets has its session remembered (TLS 1.2).
    let mut openssl = Command::new("openssl")
        .args([
            "s_client",
            "-tls1_2",
            "-no_ticket",
            "-reconnect",
            "-connect",
        ])
        .arg(weir.address())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut stdout = openssl.stdout.take().unwrap();
    stdout.read_to_string(&mut said).unwrap();
    openssl.wait().unwrap();
    let count = |part: &str| said.matches(part).count();
    assert_eq!(
        (count("New, TLSv1.2"), count("Reused, TLSv1.2")),
        (1, 5),
        "{said}"
    );
}

#[test]
fn what_is_spoken_is_agreed_on_as_the_listener_says() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let pair = authority.pair("a");
    let check = |protocol: &str, offered: &[&str], expected: Result<Option<&str>, ()>| {
        let tls = format!("protocol: {protocol}, tls: {{certificates: [{pair}]}}");
        let weir = Weir::start(&tls, "");
        let client = authority.client().offering(offered);
        let agreed = client.try_connect(weir.address(), "a.test");
        let agreed = agreed.map(|client| client.agreed()).map_err(drop);
        let expected = expected.map(|name| name.map(str::to_owned));
        assert_eq!(agreed, expected, "{protocol} {offered:?}");
    };
    check("auto", &["http/1.1", "h2"], Ok(Some("h2")));
    check("auto", &["http/1.1"], Ok(Some("http/1.1")));
    check("auto", &["http/1.0"], Ok(Some("http/1.0")));
    check("auto", &[], Ok(None));
    check("auto", &["spdy/3"], Err(()));
    check("http1", &["h2", "http/1.1"], Ok(Some("http/1.1")));
    check("http2", &["h2", "http/1.1"], Ok(Some("h2")));
    check("http2", &["http/1.1"], Err(()));
}

#[test]
fn http2_is_served_under_tls() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let tls = format!("tls: {{certificates: [{}]}}", authority.pair("a"));
    let weir = Weir::start(&tls, "");
    let port = weir.address().rsplit(':').next().unwrap();
    let ask = |version: &str| {
        let output = Command::new("curl")
            .args(["-sS", version, "-w", " %{http_version}", "--cacert"])
            .arg(authority.path("ca.crt"))
            .args(["--resolve", &format!("a.test:{port}:127.0.0.1")])
            .arg(format!("https://a.test:{port}/"))
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(ask("--http2"), "ok 2");
    assert_eq!(ask("--http1.1"), "ok 1.1");
    let plain = Weir::start("protocol: http1", "");
    let mut tcp = plain.running.connect();
    tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    let mut said = String::new();
    let _ = tcp.read_to_string(&mut said);
    assert!(said.starts_with("HTTP/1.1 505"), "{said}");
}

/// What a listener that asks for certificates says to clients that show these, and what it counts.
#[test]
fn only_certificates_of_the_authority_let_in() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    ours.issue("a", "DNS:a.test");
    ours.issue("good", "DNS:good.test");
    ours.issue_with("old", "DNS:old.test", "-days -1");
    theirs.issue("stranger", "DNS:good.test");
    let start = |auth: &str| {
        let certificates = format!("certificates: [{}]", ours.pair("a"));
        let ca = match auth {
            "none" => String::new(),
            _ => format!("client_ca: '{}', ", ours.path("ca.crt").display()),
        };
        Weir::start(
            &format!("tls: {{{certificates}, {ca}client_auth: {auth}}}"),
            "",
        )
    };
    // In TLS 1.3 the client learns that it is refused when it reads.
    let ask = |weir: &Weir, client: &super::harness::tls::Tls| {
        let mut client = client.try_connect(weir.address(), "a.test").ok()?;
        client.try_get("/", &[]).ok().map(|reply| reply.status)
    };
    let (required, optional) = (start("required"), start("optional"));
    for weir in [&required, &optional] {
        assert_eq!(ask(weir, &ours.client_showing(&ours, "good")), Some(200));
        assert_eq!(ask(weir, &ours.client_showing(&ours, "old")), None);
        eventually(|| failures(weir, "expired_certificate") == 1);
        assert_eq!(ask(weir, &ours.client_showing(&theirs, "stranger")), None);
        eventually(|| failures(weir, "unknown_authority") == 1);
    }
    assert_eq!(ask(&required, &ours.client()), None);
    eventually(|| failures(&required, "no_certificate") == 1);
    assert_eq!(ask(&optional, &ours.client()), Some(200));
    // A connection that a server's file does not know of is no connection of TLS.
    let none = start("none");
    assert_eq!(
        ask(&none, &ours.client_showing(&theirs, "stranger")),
        Some(200)
    );
}

#[test]
fn the_upstream_is_told_whose_certificate_it_was_and_no_client_can_say_so() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test,URI:spiffe://test/weir");
    authority.issue("web", "URI:spiffe://test/web,DNS:web.test,DNS:x.test");
    let tls = format!(
        "tls: {{certificates: [{}], client_ca: '{}', client_auth: optional}}",
        authority.pair("a"),
        authority.path("ca.crt").display()
    );
    let forged = "X-Forwarded-Client-Cert: Hash=forged";
    let ask = |weir: &Weir, client: super::harness::tls::Tls| {
        let mut client = client.connect(weir.address(), "a.test");
        assert_eq!(client.try_get("/", &[forged]).unwrap().status, 200);
        let seen = weir.upstream.wait_for_request();
        let lines = seen
            .lines()
            .filter(|line| line.starts_with("X-Forwarded-Client-Cert: "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let hash = Command::new("openssl")
        .args(["x509", "-noout", "-fingerprint", "-sha256", "-in"])
        .arg(authority.path("web.crt"))
        .output()
        .unwrap();
    let hash = String::from_utf8(hash.stdout).unwrap();
    let hash = hash
        .trim()
        .rsplit('=')
        .next()
        .unwrap()
        .replace(':', "")
        .to_lowercase();
    let element = format!(
        "By=spiffe://test/weir;Hash={hash};Subject=\"CN=web,O=weir \\\"tests\\\"\";URI=spiffe://test/web;DNS=web.test;DNS=x.test"
    );
    let weir = Weir::start(&tls, "");
    let shown = ask(&weir, authority.client_showing(&authority, "web"));
    assert_eq!(shown, [format!("X-Forwarded-Client-Cert: {element}")]);
    assert_eq!(ask(&weir, authority.client()), Vec::<String>::new());
    // Load balancers pass on what they do not know of: that they are trusted for addresses says nothing of certificates.
    let weir = Weir::start(
        &format!("{tls}, client_ip: {{trusted_proxies: [127.0.0.1]}}"),
        "",
    );
    let shown = ask(&weir, authority.client_showing(&authority, "web"));
    assert_eq!(shown, [format!("X-Forwarded-Client-Cert: {element}")]);
    assert_eq!(ask(&weir, authority.client()), Vec::<String>::new());
    let weir = Weir::start(
        &format!("{tls}, client_ip: {{trusted_proxies: [127.0.0.1], trust_client_cert: true}}"),
        "",
    );
    let shown = ask(&weir, authority.client_showing(&authority, "web"));
    assert_eq!(
        shown,
        [format!("X-Forwarded-Client-Cert: Hash=forged, {element}")]
    );
    assert_eq!(ask(&weir, authority.client()), [forged]);
}

#[test]
fn limits_count_by_certificate() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    for name in ["one", "two"] {
        authority.issue(name, &format!("DNS:{name}.test"));
    }
    let weir = Weir::start(
        &format!(
            "tls: {{certificates: [{}], client_ca: '{}', client_auth: optional}}",
            authority.pair("a"),
            authority.path("ca.crt").display()
        ),
        "rate_limits:\n  san: {limit: 1/h, by: client.cert.san}\n  \
         subject: {limit: 1/h, by: client.cert.subject, if_missing: deny}\n\
         routes:\n  - {match: {path: /san}, upstream: upstream, rate_limits: [san]}\n  \
         - {match: {path: /subject}, upstream: upstream, rate_limits: [subject]}\n",
    );
    let status = |client: &super::harness::tls::Tls, path: &str| {
        client.connect(weir.address(), "a.test").get(path).status
    };
    let (one, two) = (
        authority.client_showing(&authority, "one"),
        authority.client_showing(&authority, "two"),
    );
    for path in ["/san", "/subject"] {
        assert_eq!([status(&one, path), status(&one, path)], [200, 429]);
        assert_eq!(status(&two, path), 200);
    }
    // Resumed, a session is the same client's still.
    assert_eq!(status(&two, "/san"), 429);
    let none = authority.client();
    assert_eq!(
        [status(&none, "/san"), status(&none, "/subject")],
        [200, 429]
    );
}

#[test]
fn plain_http_is_told_that_it_is_not_tls() {
    let authority = Authority::new();
    let weir = weir_of(&authority, "");
    let mut client = weir.running.client();
    let reply = client.get("/");
    assert_eq!(reply.status, 400);
    assert!(reply.body.contains("use https"), "{}", reply.body);
    assert!(client.try_get("/").is_none());
    eventually(|| failures(&weir, "not_tls") == 1);
    let said = weir.running.log_until("not_tls");
    for part in [
        " DEBUG ",
        "no TLS with a client",
        "listener=\"in\"",
        "peer=127.0.0.1",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // A health check by TCP is no failure.
    drop(weir.running.connect());
    let mut client = authority.client().connect(weir.address(), "a.test");
    assert_eq!(client.get("/").status, 200);
    assert_eq!(failures(&weir, "gone"), 0);
}

#[test]
fn a_slow_handshake_is_ended() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let weir = Weir::start(
        &format!(
            "timeouts: {{tls_handshake: 300ms}}, tls: {{certificates: [{}]}}",
            authority.pair("a")
        ),
        "",
    );
    let ends = |bytes: &[u8]| {
        let mut tcp = weir.running.connect();
        tcp.set_read_timeout(Some(DEADLINE)).unwrap();
        tcp.write_all(bytes).unwrap();
        assert!(matches!(tcp.read(&mut [0]), Ok(0) | Err(_)));
    };
    ends(b"");
    // The beginning of a record that is never whole.
    ends(&[22, 3, 1, 2, 0, 1]);
    eventually(|| failures(&weir, "timed_out") == 2);
}

#[test]
fn handshakes_beyond_the_bound_wait_their_turn() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let weir = |handshake: &str| {
        Weir::start(
            &format!(
                "limits: {{max_handshakes: 1}}, timeouts: {{tls_handshake: {handshake}}}, tls: {{certificates: [{}]}}",
                authority.pair("a")
            ),
            "",
        )
    };
    // Once that one's time is over, or its turn.
    let ended = weir("1s");
    served_beside_one_that_says_hello_alone(&authority, &ended);
    assert!(failures(&ended, "timed_out") >= 1);
    served_beside_one_that_says_hello_alone(&authority, &weir("60s"));
}

fn served_beside_one_that_says_hello_alone(authority: &Authority, weir: &Weir) {
    let mut slow = weir.running.connect();
    let config = Arc::new(authority.client().config);
    let name = "a.test".try_into().unwrap();
    let mut hello = rustls::ClientConnection::new(config, name).unwrap();
    hello.write_tls(&mut slow).unwrap();
    slow.set_read_timeout(Some(DEADLINE)).unwrap();
    slow.read_exact(&mut [0]).unwrap();
    eventually(|| {
        let client = authority.client().try_connect(weir.address(), "a.test");
        let reply = client.and_then(|mut client| client.try_get("/", &[]));
        reply.is_ok_and(|reply| reply.status == 200)
    });
}

#[test]
fn a_client_is_let_in_by_its_own_certificate() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    ours.issue("a", "DNS:a.test");
    theirs.run(&self_signed("known"));
    theirs.run(&self_signed("other"));
    let weir = Weir::start(
        &format!(
            "tls: {{certificates: [{}], client_ca: '{}'}}",
            ours.pair("a"),
            theirs.path("known.crt").display()
        ),
        "",
    );
    let ask = |name: &str| {
        let client = ours.client_showing(&theirs, name);
        let mut client = client.try_connect(weir.address(), "a.test").ok()?;
        client.try_get("/", &[]).ok()
    };
    assert_eq!(ask("known").unwrap().status, 200);
    assert!(ask("other").is_none());
}

#[test]
fn what_is_whole_ends_with_a_word_and_what_is_cut_off_does_not() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let tls = format!("tls: {{certificates: [{}]}}", authority.pair("a"));
    let answer = |length: usize| {
        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = file(&format!(
            "listeners: [{{address: '127.0.0.1:0', {tls}}}]\nupstream: http://{}\nadmin: {{address: '127.0.0.1:0'}}\n",
            upstream.local_addr().unwrap()
        ));
        let running = Running::start(config.path());
        let mut client = authority.client().connect(&running.address, "a.test");
        client.write("GET / HTTP/1.0\r\n\r\n").unwrap();
        let (mut connection, _) = upstream.accept().unwrap();
        assert!(connection.read(&mut [0; 1024]).unwrap() > 0);
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nok");
        connection.write_all(head.as_bytes()).unwrap();
        drop(connection);
        client.read_to_end()
    };
    let whole = answer(2);
    assert!(
        whole
            .as_ref()
            .is_ok_and(|text| text.ends_with("\r\n\r\nok")),
        "{whole:?}"
    );
    let cut = answer(3);
    assert!(cut.is_err(), "{cut:?}");
}

#[test]
fn a_new_certificate_is_shown_and_no_request_fails_meanwhile() {
    let authority = Authority::new();
    let weir = weir_of(&authority, "");
    let address = weir.address().to_owned();
    let of = |name: &str| {
        let file = authority.path("a.crt");
        format!(
            "weir_tls_certificate_{name}_timestamp_seconds{{certificate=\"{}\"}}",
            file.display()
        )
    };
    let begin = weir.running.told(&of("not_before"));
    let now = weir::clock::wall().as_secs_f64();
    assert!(
        begin.is_some_and(|begin| begin > 0.0 && begin <= now),
        "{begin:?}"
    );
    let end = |weir: &Weir| weir.running.told(&of("not_after")).unwrap();
    let (over, asked) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let clients: Vec<_> = (0..4)
        .map(|index| {
            let (address, over, asked) = (address.clone(), over.clone(), asked.clone());
            let tls = authority.client();
            thread::spawn(move || {
                let mut kept = tls.connect(&address, "a.test");
                while !over.load(Ordering::Relaxed) {
                    // Some over connections that stay, some over new ones.
                    if index % 2 == 0 {
                        kept = tls.connect(&address, "a.test");
                    }
                    assert_eq!(kept.get("/").status, 200);
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let until_more = || {
        let enough = asked.load(Ordering::Relaxed) + 50;
        eventually(|| asked.load(Ordering::Relaxed) >= enough);
    };
    until_more();
    let shown = |weir: &Weir| authority.client().connect(weir.address(), "a.test").shown();
    let (first, first_end) = (shown(&weir), end(&weir));
    for round in 0..3 {
        let days = format!("-days {}", 10 + round);
        let new = der(authority.issue_with("a", "DNS:a.test", &days));
        eventually(|| shown(&weir) == new);
        until_more();
    }
    assert!(shown(&weir) != first && end(&weir) > first_end + 86_400.0);
    over.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    let reloads = "weir_config_reloads_total{result=\"loaded\"}";
    assert!(weir.running.told(reloads) >= Some(3.0));
}

#[test]
fn sessions_outlive_a_reload_that_lets_in_the_same_clients() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    ours.issue("a", "DNS:a.test");
    ours.issue("web", "DNS:web.test");
    fs::copy(ours.path("ca.crt"), ours.path("clients.crt")).unwrap();
    let weir = Weir::start(
        &format!(
            "tls: {{certificates: [{}], client_ca: '{}'}}",
            ours.pair("a"),
            ours.path("clients.crt").display()
        ),
        "",
    );
    let client = ours.client_showing(&ours, "web");
    assert_eq!(
        client.connect(weir.address(), "a.test").get("/").status,
        200
    );
    let new = der(ours.issue("a", "DNS:a.test"));
    eventually(|| {
        let fresh = ours.client_showing(&ours, "web");
        fresh.connect(weir.address(), "a.test").shown() == new
    });
    let mut resumed = client.connect(weir.address(), "a.test");
    assert_eq!((resumed.get("/").status, resumed.resumed()), (200, true));
    // Other clients are believed now: who was let in before is asked again.
    fs::copy(theirs.path("ca.crt"), ours.path("clients.crt")).unwrap();
    eventually(|| {
        let again = client.try_connect(weir.address(), "a.test");
        again.and_then(|mut again| again.try_get("/", &[])).is_err()
    });
    eventually(|| failures(&weir, "unknown_authority") >= 1);
}

#[test]
fn a_bad_certificate_changes_nothing_and_is_counted() {
    let authority = Authority::new();
    let weir = weir_of(&authority, "");
    let refused = || {
        weir.running
            .told("weir_config_reloads_total{result=\"refused\"}")
    };
    let mut client = authority.client().connect(weir.address(), "a.test");
    let good = client.shown();
    fs::write(authority.path("a.crt"), "nonsense").unwrap();
    eventually(|| refused() == Some(1.0));
    let said = weir.running.log_until("certificates not reloaded");
    assert!(
        said.contains("listener") && said.contains("a.crt"),
        "{said}"
    );
    let mut other = authority.client().connect(weir.address(), "a.test");
    assert_eq!((client.get("/").status, other.get("/").status), (200, 200));
    assert_eq!(other.shown(), good);
    // The key of another certificate.
    authority.issue("b", "DNS:a.test");
    fs::copy(authority.path("b.crt"), authority.path("a.crt")).unwrap();
    eventually(|| refused() >= Some(2.0));
    fs::copy(authority.path("b.key"), authority.path("a.key")).unwrap();
    let new = der(authority.path("b.crt"));
    eventually(|| {
        let client = authority.client().connect(weir.address(), "a.test");
        client.shown() == new
    });
}

#[test]
fn a_file_that_cannot_be_used_keeps_weir_from_starting() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let config = file(&format!(
        "listeners: [{{address: '127.0.0.1:0', tls: {{certificates: [{}], client_ca: /nowhere}}}}]\nupstream: http://127.0.0.1:1\n",
        authority.pair("a")
    ));
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(config.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("cannot read /nowhere"),
        "{said}"
    );
}

/// The bar is 40 KiB.
#[test]
fn an_idle_connection_takes_little_memory() {
    const MANY: u64 = 400;
    let authority = Authority::new();
    let weir = weir_of(&authority, "");
    let resident = || weir.running.memory("VmRSS");
    let client = authority.client();
    let open = || {
        let mut client = client.connect(weir.address(), "a.test");
        assert_eq!(client.get("/").status, 200);
        client
    };
    let mut idle: Vec<_> = (0..50).map(|_| open()).collect();
    let before = resident();
    idle.extend((0..MANY).map(|_| open()));
    let each = (resident() - before) / MANY;
    assert!(each <= 40, "{each} KiB");
    // They live.
    assert_eq!(idle[0].get("/").status, 200);
}

mod harness_verifier {
    //! Believes anyone.

    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::CryptoProvider;
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    pub(super) struct Any(pub(super) Arc<CryptoProvider>);

    impl ServerCertVerifier for Any {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}
