//! Certificates that are replaced while weir runs or starts, whatever else lies in its files; and sessions, which end with the certificate of a client.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::fs;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::client::{ResolvesClientCert, Resumption, Tls12Resumption};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{SignatureScheme, SupportedProtocolVersion};

use harness::eventually;
use harness::process::{Running, file};
use harness::tls::{Authority, Tls, der};

const REFUSED: &str = "weir_config_reloads_total{result=\"refused\"}";
const TAKEN: &str = "weir_config_last_reload_successful";

/// A file whose listener has these keys for TLS.
fn text(tls: &str, more: &str) -> String {
    format!(
        "listeners: [{{name: in, address: '127.0.0.1:0', tls: {{{tls}}}}}]\nroutes: [{{reply: {{status: 200, body: ok}}}}]\n\
         admin: {{address: '127.0.0.1:0'}}\n{more}"
    )
}

/// The value of the series that begins with this.
fn metric(weir: &Running, series: &str) -> u64 {
    let text = weir.admin().get("/metrics").body;
    let line = text.lines().find(|line| line.starts_with(series));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

fn shown(authority: &Authority, weir: &Running) -> Vec<u8> {
    authority.client().connect(&weir.address, "a.test").shown()
}

#[test]
fn a_renewed_certificate_does_not_wait_for_a_refused_file() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    authority.issue("other", "DNS:a.test");
    let tls = format!("certificates: [{}]", authority.pair("a"));
    let good = text(&tls, "runtime: {lanes: 1}\n");
    let config = file(&good);
    let weir = Running::start(config.path());
    let write = |text: &str| {
        let new = config.path().with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, config.path()).unwrap();
    };
    // A mistake; what a running weir does not take; and likewise with another certificate.
    let other = format!("certificates: [{}]", authority.pair("other"));
    for refused in [
        format!("{good}nonsense: 1\n"),
        text(&tls, "runtime: {lanes: 2}\n"),
        text(&other, "runtime: {lanes: 2}\n"),
    ] {
        write(&refused);
        eventually(|| metric(&weir, TAKEN) == 0);
        let new = der(authority.issue("a", "DNS:a.test"));
        eventually(|| shown(&authority, &weir) == new);
        // The file is as bad as it was.
        assert_eq!(metric(&weir, TAKEN), 0);
        write(&good);
        eventually(|| metric(&weir, TAKEN) == 1);
        assert!(shown(&authority, &weir) == new);
    }
}

#[test]
fn a_certificate_that_is_gone_is_told_of() {
    let authority = Authority::new();
    for name in ["a", "b"] {
        authority.issue(name, &format!("DNS:{name}.test"));
    }
    let pairs = ["a", "b"].map(|name| authority.pair(name)).join(", ");
    let config = file(&text(&format!("certificates: [{pairs}]"), ""));
    let weir = Running::start(config.path());
    let (gone, aside) = (authority.path("b.crt"), authority.path("b.aside"));
    fs::rename(&gone, &aside).unwrap();
    eventually(|| metric(&weir, REFUSED) == 1);
    let said = weir.log_until("certificates not reloaded");
    assert!(said.contains("b.crt"), "{said}");
    // Whoever renews another one is told, too, and gets it once all are there.
    let new = der(authority.issue("a", "DNS:a.test"));
    eventually(|| metric(&weir, REFUSED) >= 2);
    fs::rename(&aside, &gone).unwrap();
    eventually(|| shown(&authority, &weir) == new);
    assert_eq!(metric(&weir, TAKEN), 1);
}

#[test]
fn a_certificate_that_changes_while_weir_starts_is_shown() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    // Weir waits for it when it has read its certificates already.
    let redis = TcpListener::bind("127.0.0.1:0").unwrap();
    let more = format!(
        "redis: {{urls: 'redis://{}', connect_timeout: 2s}}\n",
        redis.local_addr().unwrap()
    );
    let tls = format!("certificates: [{}]", authority.pair("a"));
    let config = file(&text(&tls, &more));
    let path = config.path().to_owned();
    let starting = thread::spawn(move || Running::start(&path));
    let _silent = redis.accept().unwrap();
    let new = der(authority.issue("a", "DNS:a.test"));
    let weir = starting.join().unwrap();
    eventually(|| shown(&authority, &weir) == new);
}

/// Shows what it holds by then.
#[derive(Debug)]
struct Shows(Mutex<Arc<CertifiedKey>>);

impl ResolvesClientCert for Shows {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.lock().unwrap().clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[test]
fn a_session_ends_with_the_certificate_of_its_client() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let config = file(&text(
        &format!(
            "certificates: [{}], client_ca: '{}'",
            authority.pair("a"),
            authority.path("ca.crt").display()
        ),
        "",
    ));
    let weir = Running::start(config.path());
    authority.issue_for("web", "DNS:web.test", 8);
    let shows = Arc::new(Shows(Mutex::new(authority.key("web"))));
    let client = |version: &'static SupportedProtocolVersion| {
        let mut client = authority.client_of(version);
        client.config.client_auth_cert_resolver = shows.clone();
        client
    };
    let mut without_tickets = client(&TLS12);
    without_tickets.config.resumption =
        Resumption::in_memory_sessions(8).tls12_resumption(Tls12Resumption::SessionIdOnly);
    let clients = [client(&TLS13), client(&TLS12), without_tickets];
    // Whether the session of one that is let in was resumed.
    let ask = |client: &Tls| {
        let mut client = client.try_connect(&weir.address, "a.test").ok()?;
        let reply = client.try_get("/", &[]).ok()?;
        assert_eq!(reply.status, 200);
        Some(client.resumed())
    };
    for client in &clients {
        assert_eq!([ask(client), ask(client)], [Some(false), Some(true)]);
    }
    for client in &clients {
        eventually(|| ask(client).is_none());
    }
    let expired =
        "weir_tls_handshake_failures_total{listener=\"in\",reason=\"expired_certificate\"}";
    eventually(|| metric(&weir, expired) == 3);
    // Who has a new one by then is let in, with what is left of the old session.
    authority.issue("web", "DNS:web.test");
    *shows.0.lock().unwrap() = authority.key("web");
    for client in &clients {
        assert_eq!([ask(client), ask(client)], [Some(false), Some(true)]);
    }
}
