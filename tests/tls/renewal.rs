//! Certificates that are replaced while weir runs or starts, whatever else lies in its files; and sessions, which end with the certificate of a client.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::client::{ResolvesClientCert, Resumption, Tls12Resumption};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{SignatureScheme, SupportedProtocolVersion};
use socket2::{Domain, Socket, Type};

use super::harness::eventually;
use super::harness::process::{Running, file};
use super::harness::tls::{Authority, Tls, TlsClient, der};

const REFUSED: &str = "weir_config_reloads_total{result=\"refused\"}";
const TAKEN: &str = "weir_config_last_reload_successful";

/// A file whose listener has these keys for TLS.
fn text(tls: &str, more: &str) -> String {
    format!(
        "listeners: [{{name: in, address: '127.0.0.1:0', tls: {{{tls}}}}}]\nroutes: [{{reply: {{status: 200, body: ok}}}}]\n\
         admin: {{address: '127.0.0.1:0'}}\n{more}"
    )
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
        eventually(|| weir.metric(TAKEN) == 0);
        let new = der(authority.issue("a", "DNS:a.test"));
        eventually(|| shown(&authority, &weir) == new);
        // The file is as bad as it was.
        assert_eq!(weir.metric(TAKEN), 0);
        write(&good);
        eventually(|| weir.metric(TAKEN) == 1);
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
    eventually(|| weir.metric(REFUSED) == 1);
    let said = weir.log_until("certificates not reloaded");
    assert!(said.contains("b.crt"), "{said}");
    // Whoever renews another one is told, too.
    let new = der(authority.issue("a", "DNS:a.test"));
    eventually(|| weir.metric(REFUSED) >= 2 && shown(&authority, &weir) == new);
    assert_eq!(weir.metric(TAKEN), 0);
    fs::rename(&aside, &gone).unwrap();
    eventually(|| weir.metric(TAKEN) == 1);
}

/// What comes of a hello for this name by who shows this certificate.
fn greeted(authority: &Authority, of: &Authority, address: &str, name: &str) -> Option<Vec<u8>> {
    let client = authority.client_showing(of, "client");
    let mut client = client.try_connect(address, name).ok()?;
    let reply = client.try_get("/", &[]).ok()?;
    assert_eq!(reply.status, 200);
    Some(client.shown())
}

/// Each kind of file that weir holds while it serves, and one that breaks: all others are renewed.
#[test]
fn a_certificate_that_cannot_be_used_holds_up_no_other() {
    let authority = Authority::new();
    let [before, after] = [Authority::new(), Authority::new()];
    for clients in [&before, &after] {
        clients.issue("client", "DNS:client.test");
    }
    let renewed = ["a", "b", "up", "redis", "clients"];
    let issue = |name: &str, options: &str, clients: &Authority| match name {
        "clients" => {
            fs::copy(clients.path("ca.crt"), authority.path("clients.new")).unwrap();
            fs::rename(authority.path("clients.new"), authority.path("clients.crt")).unwrap();
        }
        name => drop(authority.issue_with(name, &format!("DNS:{name}.test"), options)),
    };
    let pair = |name| authority.pair(name);
    let path = |name: &str| authority.path(name).display().to_string();
    // Nobody is there, and nobody takes the port.
    let nobody = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    nobody
        .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .unwrap();
    let port = nobody.local_addr().unwrap().as_socket().unwrap().port();
    let text = format!(
        "listeners: [{{name: in, address: '127.0.0.1:0', tls: {{certificates: [{}, {}], client_ca: '{}'}}}}]\n\
         upstreams: {{app: {{endpoints: ['https://127.0.0.1:{port}'], tls: {{ca: '{ca}', certificate: {}}}}}}}\n\
         routes: [{{match: {{path: /up}}, upstream: app}}, {{reply: {{status: 200, body: ok}}}}]\n\
         redis: {{urls: 'rediss://127.0.0.1:{port}', tls: {{ca: '{ca}', certificate: {}}}}}\n\
         admin: {{address: '127.0.0.1:0'}}\n",
        pair("a"),
        pair("b"),
        path("clients.crt"),
        pair("up"),
        pair("redis"),
        ca = path("ca.crt"),
    );
    for broken in renewed {
        for name in renewed {
            issue(name, "-days 2", &before);
        }
        let config = file(&text);
        let weir = Running::start(config.path());
        let ends = |name: &str| {
            let file = path(&format!("{name}.crt"));
            let series = format!(
                "weir_tls_certificate_not_after_timestamp_seconds{{certificate=\"{file}\"}}"
            );
            weir.metric(&series)
        };
        let greeted = |of: &Authority, name: &str| greeted(&authority, of, &weir.address, name);
        let shown = ["a", "b"].map(|name| greeted(&before, &format!("{name}.test")).unwrap());
        let ended = renewed.map(ends);

        fs::write(authority.path("new"), "nothing of use").unwrap();
        fs::rename(
            authority.path("new"),
            authority.path(&format!("{broken}.crt")),
        )
        .unwrap();
        eventually(|| weir.metric(TAKEN) == 0);
        let said = weir.log_until("certificates not reloaded");
        assert!(said.contains(&format!("{broken}.crt")), "{said}");
        for name in renewed.into_iter().filter(|name| *name != broken) {
            issue(name, "-days 3", &after);
        }
        let (still, come) = match broken {
            "clients" => (&before, &after),
            _ => (&after, &before),
        };
        eventually(|| {
            let as_it_is_to = |(name, before): (&str, u64)| match name {
                "clients" => greeted(still, "a.test").is_some(),
                name => (ends(name) > before) == (name != broken),
            };
            renewed.into_iter().zip(ended).all(as_it_is_to)
        });
        for (name, before) in ["a", "b"].into_iter().zip(shown) {
            let now = greeted(still, &format!("{name}.test")).unwrap();
            assert_eq!(now == before, name == broken, "{broken}: {name}");
        }
        assert_eq!(greeted(come, "a.test"), None, "{broken}");
        assert_eq!(weir.metric(TAKEN), 0);
        issue(broken, "-days 3", &after);
        eventually(|| weir.metric(TAKEN) == 1);
        assert!(greeted(&after, "a.test").is_some());
    }
}

#[test]
fn a_file_that_names_a_certificate_that_cannot_be_used_is_refused_whole() {
    let authority = Authority::new();
    for name in ["a", "b"] {
        authority.issue(name, &format!("DNS:{name}.test"));
    }
    let tls = |names: &[&str]| {
        let pairs: Vec<_> = names.iter().map(|name| authority.pair(name)).collect();
        format!("certificates: [{}]", pairs.join(", "))
    };
    let config = file(&text(&tls(&["a"]), ""));
    let weir = Running::start(config.path());
    let body = || {
        authority
            .client()
            .connect(&weir.address, "a.test")
            .get("/")
            .body
    };
    let (gone, aside) = (authority.path("b.crt"), authority.path("b.aside"));
    fs::rename(&gone, &aside).unwrap();
    let new = text(&tls(&["a", "b"]), "").replace("body: ok", "body: new");
    fs::write(config.path().with_extension("new"), new).unwrap();
    fs::rename(config.path().with_extension("new"), config.path()).unwrap();
    eventually(|| weir.metric(TAKEN) == 0);
    weir.log_until("configuration not reloaded");
    assert_eq!(body(), "ok");
    // What runs is renewed, and the file taken once that is there which it names.
    let renewed = der(authority.issue("a", "DNS:a.test"));
    eventually(|| shown(&authority, &weir) == renewed);
    assert_eq!((body().as_str(), weir.metric(TAKEN)), ("ok", 0));
    fs::rename(&aside, &gone).unwrap();
    eventually(|| weir.metric(TAKEN) == 1 && body() == "new");
    weir.log_until("configuration reloaded");
    // Asked to, it reads all, and takes nothing where one is gone.
    fs::rename(&gone, &aside).unwrap();
    weir.signal("HUP");
    weir.log_until("configuration not reloaded");
    assert_eq!((body().as_str(), weir.metric(TAKEN)), ("new", 0));
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
    eventually(|| weir.metric(expired) == 3);
    // Who has a new one by then is let in, with what is left of the old session.
    authority.issue("web", "DNS:web.test");
    *shows.0.lock().unwrap() = authority.key("web");
    for client in &clients {
        assert_eq!([ask(client), ask(client)], [Some(false), Some(true)]);
    }
}

/// Of whomever: who is let in now comes anew.
#[test]
fn a_connection_ends_behind_its_next_answer_once_others_are_let_in() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let with = |more: &str| {
        text(
            &format!("certificates: [{}]{more}", authority.pair("a")),
            "",
        )
    };
    let config = file(&with(""));
    let weir = Running::start(config.path());
    let connect = |client: &Tls| client.connect(&weir.address, "a.test");
    let mut client = connect(&authority.client());
    let mut by_http2 = connect(&authority.client().offering(&["h2"]));
    by_http2
        .write("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .unwrap();
    let said = |client: &mut TlsClient| {
        let reply = client.get("/");
        assert_eq!(reply.status, 200);
        reply.field("connection").map(str::to_owned)
    };
    let new = der(authority.issue("a", "DNS:a.test"));
    eventually(|| shown(&authority, &weir) == new);
    assert_eq!(said(&mut client), None, "a certificate is another");
    let required = format!(
        ", client_ca: '{}', client_auth: required",
        authority.path("ca.crt").display()
    );
    let anew = config.path().with_extension("new");
    fs::write(&anew, with(&required)).unwrap();
    fs::rename(anew, config.path()).unwrap();
    eventually(|| said(&mut client).as_deref() == Some("close"));
    assert!(client.try_get("/", &[]).is_err());
    by_http2
        .write("\0\0\x17\x01\x05\0\0\0\x01\x02\x03GET\x06\x05https\x04\x01/\x01\x06a.test")
        .unwrap();
    let last = by_http2.rest();
    assert!(
        last.windows(7).any(|at| at == b"\x08\x07\0\0\0\0\0"),
        "{last:?}"
    );
}

/// In the same way as an old one: behind its next answer.
#[test]
fn a_connection_ends_with_the_certificate_of_its_client() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let config = file(&text(
        &format!(
            "certificates: [{}], client_ca: '{}', client_auth: optional",
            authority.pair("a"),
            authority.path("ca.crt").display()
        ),
        "",
    ));
    let weir = Running::start(config.path());
    let ends = weir::clock::wall().as_secs() + 6;
    authority.issue_for("web", "DNS:web.test", 6);
    authority.issue("long", "DNS:web.test");
    let connect = |client: &Tls| client.connect(&weir.address, "a.test");
    let said = |client: &mut TlsClient| {
        let reply = client.get("/");
        assert_eq!(reply.status, 200);
        reply.field("connection").map(str::to_owned)
    };
    let shows = authority.client_showing(&authority, "web");
    let mut client = connect(&shows);
    let mut others = [
        connect(&authority.client_showing(&authority, "long")),
        connect(&authority.client()),
    ];
    let mut by_http2 = connect(&shows.clone().offering(&["h2"]));
    assert_eq!(by_http2.agreed().as_deref(), Some("h2"));
    by_http2
        .write("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .unwrap();
    assert_eq!(said(&mut client), None);
    eventually(|| said(&mut client).as_deref() == Some("close"));
    assert!(weir::clock::wall().as_secs() > ends);
    assert!(client.try_get("/", &[]).is_err());
    for other in &mut others {
        assert_eq!(said(other), None);
    }
    // It is asked for a certificate anew, and has none that holds.
    let anew = shows.try_connect(&weir.address, "a.test");
    assert!(
        anew.and_then(|mut client| client.try_get("/", &[]))
            .is_err()
    );
    // One of HTTP/2 is told farewell: until then it lives, for a minute without a request.
    let last = by_http2.rest();
    assert!(
        last.windows(7).any(|at| at == b"\x08\x07\0\0\0\0\0"),
        "{last:?}"
    );
}
