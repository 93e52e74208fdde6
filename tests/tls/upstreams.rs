//! TLS to upstreams: whom weir believes, what it shows, and what clients are told where there is none.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use rustls::ServerConnection;

use super::harness::process::{Running, file};
use super::harness::raw::scripted;
use super::harness::tls::{Authority, self_signed};
use super::harness::{DEADLINE, Reply, Upstream, eventually};

/// Certificates of upstreams and of those who ask them.
struct Authorities {
    ours: Authority,
    theirs: Authority,
}

impl Authorities {
    fn new() -> Authorities {
        let all = Authorities {
            ours: Authority::new(),
            theirs: Authority::new(),
        };
        all.ours
            .issue("app", "DNS:app.test,DNS:localhost,IP:127.0.0.1");
        all.ours.issue("other", "DNS:other.test");
        all.ours.issue_with("old", "DNS:localhost", "-days -1");
        all.ours.issue("web", "URI:spiffe://test/web");
        all
    }
}

/// A weir that speaks TLS, in front of an upstream that does not: what is told of TLS is seen by that one.
struct Behind {
    running: Running,
    upstream: Upstream,
    _config: tempfile::NamedTempFile,
}

impl Behind {
    fn start(authority: &Authority, certificate: &str, more: &str) -> Behind {
        let upstream = Upstream::answering("ok");
        let config = file(&format!(
            "listeners: [{{name: in, address: '127.0.0.1:0', tls: {{certificates: [{}]{more}}}}}]\nupstream: {}\nadmin: {{address: '127.0.0.1:0'}}\n",
            authority.pair(certificate),
            upstream.url()
        ));
        Behind {
            running: Running::start(config.path()),
            upstream,
            _config: config,
        }
    }

    fn port(&self) -> &str {
        self.running.address.rsplit(':').next().unwrap()
    }
}

/// A weir in front of `endpoint`, with these keys of its upstream. Unless they say otherwise, a handshake has all the time of a test.
fn front(endpoint: &str, more: &str) -> (Running, tempfile::NamedTempFile) {
    let time = match more.contains("connect_timeout") {
        true => "",
        false => "connect_timeout: 60s, ",
    };
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: '127.0.0.1:0'}}\nupstreams: {{app: {{endpoints: ['{endpoint}'], {time}{more}}}}}\n\
         routes: [{{upstream: app}}]\n"
    ));
    (Running::start(config.path()), config)
}

fn ca(authority: &Authority) -> String {
    format!("ca: '{}'", authority.path("ca.crt").display())
}

/// The reason that a refusal names.
#[track_caller]
fn reason(reply: &Reply) -> &str {
    assert_eq!(reply.status, 502, "{reply:?}");
    let status = reply.field("proxy-status").unwrap();
    status.split("details=").nth(1).unwrap().trim_matches('"')
}

#[test]
fn an_upstream_is_believed_by_its_authority_and_name() {
    let all = Authorities::new();
    let (good, other, old) = (
        Behind::start(&all.ours, "app", ""),
        Behind::start(&all.ours, "other", ""),
        Behind::start(&all.ours, "old", ""),
    );
    let ask = |behind: &Behind, host: &str, tls: &str| {
        let (running, _config) = front(&format!("https://{host}:{}", behind.port()), tls);
        let reply = running.client().get("/");
        if reply.status == 502 {
            let rejections = format!("weir_rejections_total{{reason=\"{}\"}}", reason(&reply));
            // Counted once the reply is out.
            eventually(|| running.metric(&rejections) == 1);
        }
        reply
    };
    let ours = format!("tls: {{{}}}", ca(&all.ours));
    for host in ["localhost", "127.0.0.1"] {
        let reply = ask(&good, host, &ours);
        assert_eq!((reply.status, &*reply.body), (200, "ok"), "{host}");
        good.upstream.wait_for_request();
    }
    let said = |reply: Reply| reason(&reply).to_owned();
    let theirs = format!("tls: {{{}}}", ca(&all.theirs));
    assert_eq!(
        said(ask(&good, "localhost", &theirs)),
        "upstream_unknown_authority"
    );
    // No public authority has signed it either.
    let refused = said(ask(&good, "localhost", "trust_session_headers: false"));
    assert_eq!(refused, "upstream_unknown_authority");
    assert_eq!(
        said(ask(&old, "localhost", &ours)),
        "upstream_expired_certificate"
    );
    assert_eq!(said(ask(&other, "localhost", &ours)), "upstream_wrong_name");
    let named = format!("tls: {{sni: other.test, {}}}", ca(&all.ours));
    assert_eq!(ask(&other, "localhost", &named).status, 200);
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("https://{}", plain.local_addr().unwrap());
    thread::spawn(move || {
        let (mut client, _) = plain.accept().unwrap();
        let _ = client.read(&mut [0; 4096]);
        let _ = client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    let (running, _config) = front(&place, &ours);
    assert_eq!(reason(&running.client().get("/")), "upstream_not_tls");
}

/// As old services have it: there is no authority to name but the certificate itself.
#[test]
fn an_upstream_is_believed_by_its_own_certificate() {
    let files = Authority::new();
    files.run(&self_signed("itself"));
    files.run(&self_signed("other"));
    files.issue_with("old", "DNS:localhost", "-days -1");
    files.issue("leaf", "DNS:localhost");
    let ask = |shown: &str, believed: &str, more: &str| {
        let behind = Behind::start(&files, shown, "");
        let ca = files.path(&format!("{believed}.crt"));
        let tls = format!("tls: {{ca: '{}'{more}}}", ca.display());
        let (running, _config) = front(&format!("https://localhost:{}", behind.port()), &tls);
        let reply = running.client().get("/");
        match reply.status {
            200 => "believed".to_owned(),
            _ => reason(&reply).to_owned(),
        }
    };
    assert_eq!(ask("itself", "itself", ""), "believed");
    assert_eq!(ask("leaf", "leaf", ""), "believed");
    let of_another = ask("itself", "other", "");
    assert!(of_another.starts_with("upstream_"), "{of_another}");
    assert_eq!(ask("old", "old", ""), "upstream_expired_certificate");
    assert_eq!(
        ask("itself", "itself", ", sni: other.test"),
        "upstream_wrong_name"
    );
}

#[test]
fn weir_shows_the_upstream_its_certificate_and_a_new_one_when_its_file_changes() {
    let all = Authorities::new();
    let asks = format!(", client_ca: '{}'", all.ours.path("ca.crt").display());
    let behind = Behind::start(&all.ours, "app", &asks);
    let place = format!("https://localhost:{}", behind.port());
    let shows = |certificate: &str| {
        format!(
            "tls: {{{}, certificate: {}}}",
            ca(&all.ours),
            all.ours.pair(certificate)
        )
    };
    let (running, _config) = front(&place, &shows("web"));
    let seen = || {
        assert_eq!(running.client().get("/").status, 200);
        let seen = behind.upstream.wait_for_request();
        let lines = seen.lines();
        let mut lines = lines.filter_map(|line| line.strip_prefix("X-Forwarded-Client-Cert: "));
        lines.next().unwrap().to_owned()
    };
    let file = all.ours.path("web.crt");
    let series = format!(
        "weir_tls_certificate_not_after_timestamp_seconds{{certificate=\"{}\"}}",
        file.display()
    );
    let ends = || running.told(&series).unwrap() as u64;
    let (first, end) = (seen(), ends());
    assert!(first.ends_with(";URI=spiffe://test/web"), "{first}");
    all.ours
        .issue_with("web", "URI:spiffe://test/new", "-days 3");
    eventually(|| seen().ends_with(";URI=spiffe://test/new"));
    assert!((86_000..88_000).contains(&(ends() - end)));
    // Without one, and with one that is over, by either version of HTTP.
    let without = format!("tls: {{{}}}", ca(&all.ours));
    for tls in [&without, &shows("old")] {
        for protocol in ["http1", "http2", "auto"] {
            let (running, _config) = front(&place, &format!("protocol: {protocol}, {tls}"));
            let reply = running.client().get("/");
            assert_eq!(reason(&reply), "upstream_distrusts", "{protocol}");
        }
    }
}

#[test]
fn another_endpoint_is_tried_where_one_is_not_believed() {
    let all = Authorities::new();
    let good = Behind::start(&all.ours, "app", "");
    let other = Behind::start(&all.ours, "other", "");
    let endpoints = format!(
        "https://localhost:{}', 'https://localhost:{}",
        good.port(),
        other.port()
    );
    for protocol in ["http1", "auto"] {
        let keys = format!(
            "protocol: {protocol}, load_balancing: round_robin, retries: {{attempts: 1}}, tls: {{{}}}",
            ca(&all.ours)
        );
        let (running, _config) = front(&endpoints, &keys);
        // Each lane has turns of its own, so that one connection sees every other one.
        let mut client = running.client();
        for _ in 0..6 {
            assert_eq!(client.get("/").status, 200);
            good.upstream.wait_for_request();
        }
        let rescued = "weir_upstream_retries_total{upstream=\"app\",result=\"rescued\"}";
        // Counted once the response is out.
        eventually(|| running.metric(rescued) == 3);
    }
}

#[test]
fn what_is_believed_changes_with_its_file() {
    let all = Authorities::new();
    let behind = Behind::start(&all.ours, "app", "");
    let file = all.theirs.path("believed.crt");
    std::fs::copy(all.ours.path("ca.crt"), &file).unwrap();
    let place = format!("https://localhost:{}", behind.port());
    let (running, _config) = front(&place, &format!("tls: {{ca: '{}'}}", file.display()));
    let mut client = running.client();
    assert_eq!(client.get("/").status, 200);
    // A file that cannot be used changes nothing.
    std::fs::write(&file, "nonsense").unwrap();
    eventually(|| running.metric("weir_config_reloads_total{result=\"refused\"}") == 1);
    assert_eq!(client.get("/").status, 200);
    // Connections that were made by the old authority serve no more requests.
    std::fs::copy(all.theirs.path("ca.crt"), &file).unwrap();
    eventually(|| running.client().get("/").status == 502);
    std::fs::copy(all.ours.path("ca.crt"), &file).unwrap();
    eventually(|| running.client().get("/").status == 200);
}

#[test]
fn the_systems_authorities_are_read_again_when_asked() {
    let all = Authorities::new();
    let behind = Behind::start(&all.ours, "app", "");
    let bundle = all.theirs.path("bundle.crt");
    std::fs::copy(all.theirs.path("ca.crt"), &bundle).unwrap();
    let place = format!("https://localhost:{}", behind.port());
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: '127.0.0.1:0'}}\nupstreams: {{app: {{endpoints: '{place}', connect_timeout: 60s}}}}\n"
    ));
    let bundle_path = bundle.display().to_string();
    let running = Running::start_in(config.path(), &[("SSL_CERT_FILE", &bundle_path)]);
    assert_eq!(running.client().get("/").status, 502);
    std::fs::copy(all.ours.path("ca.crt"), &bundle).unwrap();
    running.signal("HUP");
    let said = running.log_until("configuration re");
    assert!(said.contains("configuration reloaded"), "{said}");
    eventually(|| running.client().get("/").status == 200);
}

#[test]
fn a_bundle_that_is_being_written_leaves_the_systems_authorities_as_they_were() {
    let all = Authorities::new();
    let behind = Behind::start(&all.ours, "app", "");
    let [bundle, config, other] =
        ["bundle.crt", "weir.yaml", "other.crt"].map(|name| all.theirs.path(name));
    let whole =
        [&all.theirs, &all.ours].map(|it| std::fs::read_to_string(it.path("ca.crt")).unwrap());
    let whole = whole.concat();
    let write = |extra: &str| {
        let text = format!(
            "listen: 127.0.0.1:0\nadmin: {{address: '127.0.0.1:0'}}\nroutes: [{{upstream: app}}]\n\
             upstreams: {{app: {{endpoints: 'https://localhost:{}', connect_timeout: 60s}}, other: {{endpoints: 'https://localhost:9', tls: {{ca: '{}'}}}}}}\n{extra}",
            behind.port(),
            other.display(),
        );
        std::fs::write(&config, text).unwrap();
    };
    std::fs::copy(all.ours.path("ca.crt"), &other).unwrap();
    std::fs::write(&bundle, &whole).unwrap();
    write("");
    let bundle_path = bundle.display().to_string();
    let variables = [("SSL_CERT_FILE", &*bundle_path), ("SSL_CERT_DIR", "")];
    let running = Running::start_in(&config, &variables);
    assert_eq!(running.client().get("/").status, 200);
    let reloads = || running.metric("weir_config_reloads_total{result=\"loaded\"}");
    // Cut off within the one that counts; and between being emptied and written.
    for (nth, now) in [&whole[..whole.len() - 100], ""].into_iter().enumerate() {
        std::fs::write(&bundle, now).unwrap();
        running.signal("HUP");
        eventually(|| reloads() == nth as u64 + 1);
        assert_eq!(running.client().get("/").status, 200, "{nth}");
    }
    // Nor does it hold up what else the file says.
    write("shutdown: {drain: 7s}\n");
    eventually(|| reloads() == 3);
    assert_eq!(running.client().get("/").status, 200);
    // What is renewed meanwhile tells of it as of any other.
    std::fs::copy(all.theirs.path("ca.crt"), &other).unwrap();
    eventually(|| running.metric("weir_config_reloads_total{result=\"refused\"}") == 1);
    assert_eq!(running.client().get("/").status, 200);
    // Once it is whole it counts.
    std::fs::copy(all.theirs.path("ca.crt"), &bundle).unwrap();
    running.signal("HUP");
    eventually(|| running.client().get("/").status == 502);
}

#[test]
fn http2_is_spoken_to_an_upstream_under_tls() {
    let all = Authorities::new();
    let behind = Behind::start(
        &all.ours,
        "app",
        "}, protocol: http2, limits: {max_headers: 100",
    );
    let tls = format!("protocol: http2, tls: {{{}}}", ca(&all.ours));
    let (running, _config) = front(&format!("https://localhost:{}", behind.port()), &tls);
    let mut client = running.client();
    for _ in 0..3 {
        assert_eq!(client.get("/").body, "ok");
        let seen = behind.upstream.wait_for_request();
        assert!(seen.contains("X-Forwarded-Proto: https\r\n"), "{seen}");
    }
}

#[test]
fn an_upstream_that_never_answers_the_handshake_is_a_504() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("https://{}", silent.local_addr().unwrap());
    let (running, _config) = front(&place, "connect_timeout: 200ms");
    let reply = running.client().get("/");
    assert_eq!(reply.status, 504);
    // And one that closes is a 502.
    let closing = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("https://{}", closing.local_addr().unwrap());
    thread::spawn(move || closing.incoming().for_each(drop));
    let (running, _config) = front(&place, "trust_session_headers: false");
    assert_eq!(reason(&running.client().get("/")), "connect_failed");
}

#[test]
fn health_checks_go_by_tls_too() {
    let all = Authorities::new();
    let behind = Behind::start(&all.ours, "app", "");
    let up = format!("https://localhost:{}", behind.port());
    let health = |authority: &Authority, after: u16| {
        format!(
            "tls: {{{}}}, health: {{path: /healthz, interval: 100ms, timeout: 10s, unhealthy_after: {after}, healthy_after: 1}}, panic_threshold: 0%",
            ca(authority)
        )
    };
    let (running, _config) = front(&up, &health(&all.ours, 1000));
    eventually(|| {
        behind
            .upstream
            .wait_for_request()
            .starts_with("GET /healthz ")
    });
    assert_eq!(running.client().get("/").status, 200);
    let (running, _config) = front(&up, &health(&all.theirs, 1));
    eventually(|| running.client().get("/").status == 503);
}

/// What is left of a body that one upstream broke off is the next one's, and not what is looked at to see whether the client is there.
#[test]
fn a_body_that_an_upstream_breaks_off_within_is_sent_again_whole() {
    let all = Authorities::new();
    let server = Arc::new(all.ours.server("app"));
    // Each place of it is told from the others.
    let body: String = (0..100_000).map(|n| format!("{n:08}")).collect();
    let length = body.len();
    let breaks = Arc::new(AtomicBool::new(false));
    let (told, bodies) = mpsc::channel();
    let upstream = scripted(move |mut tcp| {
        let mut tls = ServerConnection::new(server.clone()).unwrap();
        let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
        if !breaks.fetch_not(Ordering::Relaxed) {
            let _ = stream.read(&mut [0; 16_384]);
            // What was not read makes the close a reset.
            return;
        }
        let mut text = Vec::new();
        let mut piece = [0; 16_384];
        while text.len() < length || !text.ends_with(b"00099999") {
            match stream.read(&mut piece) {
                Ok(read @ 1..) => text.extend_from_slice(&piece[..read]),
                Ok(0) | Err(_) => break,
            }
        }
        let _ = told.send(String::from_utf8(text).unwrap());
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        let _ = stream.write_all(answer.as_bytes());
    });
    let config = file(&format!(
        "listeners: [{{name: in, address: '127.0.0.1:0', tls: {{certificates: [{}]}}}}]\n\
         upstreams: {{app: {{endpoints: ['https://localhost:{}'], protocol: auto, tls: {{{}}}, timeout: 60s, connect_timeout: 60s, \
         retries: {{attempts: 1, retry_on: [reset], methods: [PUT], buffer: 1MiB, budget: {{min_concurrent: 9}}, backoff: {{base: 1ms}}}}}}}}\n",
        all.ours.pair("app"),
        upstream.port(),
        ca(&all.ours)
    ));
    let running = Running::start(config.path());
    let request = format!("PUT / HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n{body}");
    for round in 0..50 {
        let mut client = all.ours.client().connect(&running.address, "localhost");
        let reply = client.try_ask(&request).unwrap();
        assert_eq!(reply.status, 200, "{round}: {reply:?}");
        let came = bodies.recv_timeout(DEADLINE).unwrap();
        assert!(came.ends_with(&body), "{round}: {}", came.len());
    }
}
