//! Sessions end with the certificate of a client.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::sync::{Arc, Mutex};

use rustls::client::{ResolvesClientCert, Resumption, Tls12Resumption};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{SignatureScheme, SupportedProtocolVersion};

use harness::eventually;
use harness::process::{Running, file};
use harness::tls::{Authority, Tls};

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
