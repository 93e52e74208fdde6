//! What routes change on the way and what they answer by themselves, over sockets.

use super::harness::process::{Running, audited, file};
use super::harness::versions::{Client, Fields, Length, Origin, PAIRINGS, Version, field, run};
use super::harness::{Lane, Reply, Upstream, eventually, raw};

fn lane(rest: &str) -> Lane {
    Lane::start(&format!("listen: 127.0.0.1:0\n{rest}"))
}

/// The request line and fields that the upstream got.
fn sent_on(lane: &Lane, upstream: &Upstream, path: &str, fields: &[&str]) -> String {
    let reply = lane.connect().send("GET", path, fields, "");
    assert_eq!(reply.status, 200, "{reply:?}");
    upstream.wait_for_request()
}

#[test]
fn a_prefix_is_replaced_and_nothing_beside_it() {
    let upstream = Upstream::answering("ok");
    let lane = lane(&format!(
        "upstreams: {{app: {{endpoints: ['{}']}}}}\nroutes:\n\
         - {{match: {{path: /pay/*}}, upstream: app, rewrite: {{path_prefix: /v2}}}}\n\
         - {{match: {{path: /pay}}, upstream: app, rewrite: {{path_prefix: /v2}}}}\n\
         - {{match: {{path: /strip/*}}, upstream: app, rewrite: {{path_prefix: /}}}}\n\
         - {{upstream: app}}\n",
        upstream.url()
    ));
    for (path, expected) in [
        ("/pay/x?a=/pay/&b=1", "/v2/x?a=/pay/&b=1"),
        ("/pay", "/v2"),
        ("/pay?q", "/v2?q"),
        ("/pay/", "/v2/"),
        ("/pay//x/../%79", "/v2/y"),
        ("/payments/x", "/payments/x"),
        ("/other", "/other"),
        ("/strip/", "/"),
        ("/strip/a%20b", "/a%20b"),
        ("//strip//a", "/a"),
        ("/pay/a%2Bb/%40%3b%2c?%2B", "/v2/a%2Bb/%40%3B%2C?%2B"),
        ("/p%61y/group%2fproject/%7Ex", "/v2/group%2Fproject/~x"),
        ("/@scope%2fname", "/@scope%2Fname"),
        ("/a%2Bb+c%5C", "/a%2Bb+c%5C"),
        ("/bucket//a//", "/bucket//a//"),
        ("//strip//http://x", "/http://x"),
    ] {
        let head = sent_on(&lane, &upstream, path, &[]);
        assert!(
            head.starts_with(&format!("GET {expected} HTTP/1.1\r\n")),
            "{path}: {head}"
        );
    }
}

#[test]
fn the_upstream_gets_the_host_and_fields_that_the_route_says() {
    let upstream = Upstream::answering("ok");
    let lane = lane(&format!(
        "upstreams: {{app: {{endpoints: ['{}']}}}}\nroutes:\n\
         - upstream: app\n  rewrite: {{host: app.internal}}\n  request_headers: {{set: {{X-Env: prod}}, add: {{accept: text/x}}, remove: [x-debug]}}\n",
        upstream.url()
    ));
    let fields = [
        "Host: shop.example.com",
        "X_ENV: forged",
        "x-debug: 1",
        "Accept: */*",
    ];
    let head = sent_on(&lane, &upstream, "/", &fields);
    for part in [
        "\r\nHost: app.internal\r\n",
        "\r\nX-Forwarded-Host: shop.example.com\r\n",
        "\r\nX-Env: prod\r\n",
        "\r\nAccept: */*\r\n",
        "\r\naccept: text/x\r\n",
    ] {
        assert!(head.contains(part), "{part}: {head}");
    }
    assert_eq!(head.matches("Host: ").count(), 2, "{head}");
    assert!(
        !head.contains("forged") && !head.contains("x-debug"),
        "{head}"
    );
}

#[test]
fn what_a_route_sets_cannot_be_forged_behind_a_body() {
    let upstream = raw::Recorder::start();
    let lane = lane(&format!(
        "upstreams: {{app: {{endpoints: ['http://{}']}}}}\nroutes:\n\
         - upstream: app\n  request_headers: {{set: {{X-Env: prod}}, remove: [x-debug]}}\n",
        upstream.address
    ));
    let request = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n\
                   1\r\nx\r\n0\r\nx-env: forged\r\nX_Debug: forged\r\ntraceparent: forged\r\nX-Sum: kept\r\n\r\n";
    raw::send(lane.address, request.as_bytes());
    eventually(|| upstream.bytes().contains("kept"));
    let sent = upstream.bytes();
    assert!(
        !sent.contains("forged") && sent.contains("X-Env: prod"),
        "{sent}"
    );
}

#[test]
fn clients_get_the_fields_that_the_route_says() {
    let upstream = Upstream::replying(|_| {
        "HTTP/1.1 200 OK\r\nServer: app\r\nCache-Control: private\r\nVary: a\r\nContent-Length: 2\r\n\r\nok"
            .to_owned()
    });
    let lane = lane(&format!(
        "upstreams: {{app: {{endpoints: ['{}']}}}}\nroutes:\n\
         - upstream: app\n  response_headers: {{set: {{Cache-Control: no-cache}}, add: {{Vary: b}}, remove: [server]}}\n",
        upstream.url()
    ));
    let reply = lane.connect().get("/");
    assert_eq!(reply.field("server"), None);
    assert_eq!(values(&reply, "cache-control"), ["no-cache"]);
    assert_eq!(values(&reply, "vary"), ["a", "b"]);
}

fn values<'r>(reply: &'r Reply, name: &str) -> Vec<&'r str> {
    let fields = reply.fields.iter().filter(|(other, _)| other == name);
    fields.map(|(_, value)| value.as_str()).collect()
}

#[test]
fn a_response_that_starts_a_session_is_stored_nowhere_whatever_the_route_sets() {
    let upstream = Upstream::replying(|_| {
        "HTTP/1.1 200 OK\r\nX-Weir-Session-Start: {\"user\": \"ann\"}\r\nContent-Length: 0\r\n\r\n"
            .to_owned()
    });
    let lane = lane(&format!(
        "upstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\nsessions: {{web: {{}}}}\nroutes:\n\
         - upstream: app\n  session: {{use: web, require: false}}\n  response_headers: {{set: {{cache-control: max-age=60}}, remove: [set-cookie]}}\n",
        upstream.url()
    ));
    let reply = lane.connect().get("/");
    assert_eq!(values(&reply, "cache-control"), ["no-store"]);
    assert!(reply.field("set-cookie").unwrap().starts_with("sid="));
}

#[test]
fn a_redirect_says_where_and_the_connection_lives_on() {
    let lane = lane(
        "routes:\n\
         - {match: {path: /old/*}, redirect: {status: 308, path_prefix: /new}}\n\
         - {match: {path: /gone}, redirect: {status: 301, host: www.example.org, path: /here, strip_query: true}}\n\
         - {match: {path: /see}, redirect: {status: 303, path: /seen}}\n\
         - {match: {path: /tmp}, redirect: {status: 307, host: '[::1]', port: 81}}\n\
         - redirect: {scheme: https}\n  response_headers: {set: {strict-transport-security: max-age=9}}\n",
    );
    let mut client = lane.connect();
    let mut check = |path: &str, status: u16, location: &str| {
        let reply = client.send("GET", path, &["Host: a.org:8080"], "");
        let got = (reply.status, reply.field("location"));
        assert_eq!(got, (status, Some(location)), "{path}");
        assert_eq!(reply.field("content-length"), Some("0"));
        assert!(reply.field("date").is_some() && reply.field("connection").is_none());
        reply
    };
    check("/old/x?q=1", 308, "/new/x?q=1");
    check("/old//..//old/%2e/x", 308, "/new/x");
    check("/gone?q=1", 301, "//www.example.org/here");
    check("/see", 303, "/seen");
    check("/tmp", 307, "//[::1]:81/tmp");
    let reply = check("/a?b=//c", 302, "https://a.org/a?b=//c");
    assert_eq!(reply.field("strict-transport-security"), Some("max-age=9"));
}

#[test]
fn no_path_of_a_request_sends_clients_to_another_host() {
    let lane = lane("routes: [{match: {path: /a/*}, redirect: {path_prefix: /}}]\n");
    for path in ["/a//evil.org", "/a/%2e/evil.org", "/a/.//evil.org/"] {
        let reply = lane.connect().get(path);
        let location = reply.field("location").unwrap_or_default();
        assert!(location.starts_with("/evil.org"), "{path}: {location}");
    }
    for (path, expected) in [
        ("/a/%2fevil.org", "/%2Fevil.org"),
        ("/a/%5cevil.org", "/%5Cevil.org"),
    ] {
        let reply = lane.connect().get(path);
        assert_eq!(reply.field("location"), Some(expected), "{path}");
    }
    assert_eq!(lane.connect().get("/a/\\evil.org").status, 400);
}

#[test]
fn a_fixed_reply_is_whole_to_every_kind_of_client() {
    let lane = lane(
        "routes:\n\
         - {match: {path: /robots.txt}, reply: {body: \"User-agent: *\\n\", headers: {Cache-Control: max-age=60}}}\n\
         - {match: {path: /none}, reply: {status: 204}}\n\
         - {match: {path: /teapot}, reply: {status: 418, body: '{}', content_type: application/json}}\n",
    );
    let mut client = lane.connect();
    let reply = client.get("/robots.txt");
    assert_eq!((reply.status, &*reply.body), (200, "User-agent: *\n"));
    assert_eq!(
        reply.field("content-type"),
        Some("text/plain; charset=utf-8")
    );
    assert_eq!(reply.field("cache-control"), Some("max-age=60"));
    client.begin("HEAD", "/robots.txt", &[], "");
    let reply = client.finish_head();
    assert_eq!(reply.field("content-length"), Some("14"));
    let reply = client.get("/none");
    assert_eq!((reply.status, reply.field("content-length")), (204, None));
    assert_eq!(reply.field("content-type"), None);
    let reply = client.get("/teapot");
    assert_eq!((reply.status, &*reply.body), (418, "{}"));
    // A short body that no one wants leaves the connection open, and a long one ends it.
    let reply = client.send("POST", "/teapot", &[], "some body");
    assert_eq!((reply.status, reply.field("connection")), (418, None));
    let reply = client.send("POST", "/teapot", &["Content-Length: 100000"], "");
    assert_eq!(
        (reply.status, reply.field("connection")),
        (418, Some("close"))
    );
    let old = raw::send(lane.address, b"GET /teapot HTTP/1.0\r\n\r\n");
    assert!(old.text.contains("Connection: close\r\n") && old.text.ends_with("\r\n{}"));
}

#[test]
fn what_weir_answers_passes_limits_and_sessions_and_is_counted() {
    let lane = lane(
        "sessions: {web: {}}\nrate_limits: {few: {limit: 2/h, by: constant}, up: {limit: 1/h, by: upstream}}\nroutes:\n\
         - {match: {path: /in}, reply: {body: x}, session: {use: web}}\n\
         - {match: {path: /few}, redirect: {path: /}, rate_limits: [few, up]}\n",
    );
    let mut client = lane.connect();
    assert_eq!(client.get("/in").status, 401);
    for _ in 0..2 {
        let reply = client.get("/few");
        assert_eq!(reply.status, 302);
        assert!(reply.field("ratelimit").unwrap().starts_with("\"few\";r="));
    }
    let reply = client.get("/few");
    assert_eq!((reply.status, reply.field("location")), (429, None));
    let counted = [
        "weir_requests_total{route=\"/few\",upstream=\"\",class=\"3xx\"} 2",
        "weir_requests_total{route=\"/few\",upstream=\"\",class=\"4xx\"} 1",
        "weir_rejections_total{reason=\"unauthenticated\"} 1",
    ];
    eventually(|| {
        let text = lane.plan.borrow().metrics.text();
        counted.iter().all(|line| text.contains(line))
    });
}

#[test]
fn what_weir_answers_is_on_record_before_it_is_out() {
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
         audit: {{delivery: guaranteed, sqlite: {{path: '{}'}}}}\n\
         routes: [{{match: {{path: /a}}, reply: {{body: four}}}}, {{redirect: {{path: /a}}}}]\n",
        folder.path().join("audit.db").display()
    ));
    let weir = Running::start(config.path());
    for path in ["/a", "/b"] {
        weir.client().get(path);
    }
    let mut events = audited(config.path(), &[]);
    events.sort_by_key(|event| event["path"].as_str().unwrap().to_owned());
    assert_eq!(events.len(), 2, "{events:?}");
    assert_eq!(
        (&events[0]["status"], &events[0]["bytes_out"]),
        (&200.into(), &4.into())
    );
    assert_eq!(
        (&events[1]["status"], &events[1]["path"]),
        (&302.into(), &"/b".into())
    );
    for event in events {
        assert!(
            event["upstream"].is_null() && event["label"].is_null(),
            "{event}"
        );
    }
}

/// All values of the fields of this name.
fn all<'f>(fields: &'f Fields, name: &str) -> Vec<&'f str> {
    let fields = fields.iter().filter(|(other, _)| other == name);
    fields.map(|(_, value)| value.as_str()).collect()
}

#[test]
fn messages_of_each_version_are_changed_alike() {
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(changed(asks, serves));
    }
}

async fn changed(asks: Version, serves: Version) {
    let mut origin = Origin::start(serves).await;
    let lane = lane(&format!(
        "upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: {}}}}}\nroutes:\n\
         - match: {{path: /pay/*}}\n  upstream: app\n  rewrite: {{path_prefix: /v2, host: app.internal}}\n\
         \x20 request_headers: {{set: {{X-Env: prod}}, add: {{accept: text/x}}, remove: [x-debug]}}\n\
         \x20 response_headers: {{set: {{Cache-Control: no-cache}}, add: {{Vary: b}}, remove: [server]}}\n",
        origin.address,
        serves.name()
    ));
    let mut client = Client::connect(asks, lane.address).await;
    let fields = [
        ("x_env", "forged"),
        ("x-debug", "1"),
        ("accept", "*/*"),
        ("te", "trailers"),
    ];
    let call = client.call("POST", "/pay/x?q=/pay/", &fields, Length::Unknown);
    let mut call = call.await;
    call.body.send(b"abc").await.unwrap();
    let forged = [("x-env", "forged"), ("x-debug", "1"), ("x-sum", "kept")];
    call.body.end(&forged).await.unwrap();
    let mut asked = origin.asked().await;
    assert_eq!(
        (&*asked.path, &*asked.host),
        ("/v2/x?q=/pay/", "app.internal")
    );
    let came = &asked.fields;
    assert_eq!(field(came, "x-forwarded-host"), Some("test"));
    assert_eq!(all(came, "x-env"), ["prod"]);
    assert_eq!(all(came, "accept"), ["*/*", "text/x"]);
    assert_eq!((field(came, "x_env"), field(came, "x-debug")), (None, None));
    let (body, trailers) = asked.body.rest().await.unwrap();
    assert_eq!(body, b"abc");
    assert_eq!(trailers, [("x-sum".to_owned(), "kept".to_owned())]);

    let theirs = [
        ("server", "app"),
        ("cache-control", "private"),
        ("vary", "a"),
    ];
    // Of interim ones no more is passed on, and nothing is put in.
    let hints = [&theirs[..], &[("link", "</a>; rel=preload")]].concat();
    asked.interim(103, &hints).await;
    let (status, fields) = call.interim().await;
    assert_eq!((status, all(&fields, "vary")), (103, vec!["a"]));
    assert_eq!(all(&fields, "link"), ["</a>; rel=preload"]);
    for gone in ["server", "cache-control"] {
        assert_eq!(field(&fields, gone), None, "{gone}");
    }
    let mut out = asked.reply(200, &theirs, Length::Unknown).await;
    out.send(b"ok").await.unwrap();
    let forged = [
        ("server", "app"),
        ("cache_control", "private"),
        ("x-sum", "1"),
    ];
    out.end(&forged).await.unwrap();
    let mut answer = call.answer().await;
    assert_eq!(answer.status, 200);
    assert_eq!(field(&answer.fields, "server"), None);
    assert_eq!(all(&answer.fields, "cache-control"), ["no-cache"]);
    assert_eq!(all(&answer.fields, "vary"), ["a", "b"]);
    let (body, trailers) = answer.body.rest().await.unwrap();
    assert_eq!(body, b"ok");
    assert_eq!(trailers, [("x-sum".to_owned(), "1".to_owned())]);
}

#[test]
fn what_weir_answers_is_the_same_by_http2() {
    let lane = lane(
        "routes:\n\
         - {match: {path: /old/*}, redirect: {status: 308, path_prefix: /new}}\n\
         - {match: {path: /see}, redirect: {scheme: https, status: 303}, response_headers: {set: {x-a: b}}}\n\
         - {match: {path: /robots.txt}, reply: {body: \"User-agent: *\\n\", headers: {Cache-Control: max-age=60}}}\n\
         - {match: {path: /none}, reply: {status: 204}}\n",
    );
    run(async {
        let mut one = Client::connect(Version::One, lane.address).await;
        let mut two = Client::connect(Version::Two, lane.address).await;
        for (method, path) in [
            ("GET", "/old//..//old/x?q=1"),
            ("GET", "/see"),
            ("GET", "/robots.txt"),
            ("HEAD", "/robots.txt"),
            ("GET", "/none"),
        ] {
            let mut answers = Vec::new();
            for client in [&mut one, &mut two] {
                let call = client.call(method, path, &[], Length::None).await;
                let mut answer = call.answer().await;
                let mut fields = std::mem::take(&mut answer.fields);
                fields.retain(|(name, _)| name != "date");
                fields.sort();
                let body = match method {
                    "HEAD" => Vec::new(),
                    _ => answer.body.rest().await.unwrap().0,
                };
                answers.push((answer.status, fields, body));
            }
            assert_eq!(answers[0], answers[1], "{method} {path}");
        }
    });
}
