//! Traces, over sockets: what weir makes of what callers say, and what collectors get.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::harness::collector::Collector;
use super::harness::process::{Running, file};
use super::harness::raw;
use super::harness::redis::free_port;
use super::harness::versions::{Asked, Client as Caller, Length, Origin, PAIRINGS, Version, run};
use super::harness::{Client, Lane, Upstream, eventually, eventually_within};
use serde_json::{Value, json};

const ID: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn lane(upstream: &Upstream, trusted: &str, traces: &str) -> Lane {
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [{trusted}]}}}}]\n\
         upstreams: {{app: {{endpoints: ['{}']}}}}\ntelemetry: {{{traces}}}\n",
        upstream.url()
    ))
}

/// The values of this field of the head that the upstream gets.
fn told(lane: &Lane, upstream: &Upstream, name: &str, fields: &[&str]) -> Vec<String> {
    assert_eq!(lane.connect().send("GET", "/", fields, "").status, 200);
    values(&upstream.wait_for_request(), name)
}

fn values(head: &str, name: &str) -> Vec<String> {
    let fields = head.lines().filter_map(|line| line.split_once(": "));
    fields
        .filter(|(other, _)| other.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.to_owned())
        .collect()
}

/// The one `traceparent` of these: its trace, parent and flags.
fn parts(mut values: Vec<String>) -> (String, String, String) {
    assert_eq!(values.len(), 1, "{values:?}");
    let value = values.remove(0);
    let parts: Vec<_> = value.split('-').collect();
    assert_eq!(
        (value.len(), parts.len(), parts[0]),
        (55, 4, "00"),
        "{value}"
    );
    (
        parts[1].to_owned(),
        parts[2].to_owned(),
        parts[3].to_owned(),
    )
}

#[test]
fn a_trusted_proxy_s_trace_goes_on_with_weir_s_call_as_the_parent() {
    let upstream = Upstream::answering("");
    let traces = "traces: {otlp: 'http://127.0.0.1:1', sample: 100%}";
    let lane = lane(&upstream, "127.0.0.1", traces);
    for flags in ["00", "01"] {
        let given = format!("TraceParent: 00-{ID}-{PARENT}-{flags}");
        let fields = [given.as_str(), "tracestate: a=1", "Tracestate: b=2,c=3"];
        lane.connect().send("GET", "/", &fields, "");
        let head = upstream.wait_for_request();
        let (trace, parent, said) = parts(values(&head, "traceparent"));
        assert_eq!((trace.as_str(), said.as_str()), (ID, flags));
        assert!(parent != PARENT && parent != "0".repeat(16), "{parent}");
        assert_eq!(values(&head, "tracestate"), ["a=1", "b=2,c=3"]);
    }
    // A later version is told in the one that weir knows.
    let given = format!("traceparent: cc-{ID}-{PARENT}-03-more");
    let (trace, _, flags) = parts(told(&lane, &upstream, "traceparent", &[&given]));
    assert_eq!((trace.as_str(), flags.as_str()), (ID, "01"));
    // A state that no one could read goes no further; the trace does.
    let given = format!("traceparent: 00-{ID}-{PARENT}-01");
    let fields = [given.as_str(), "tracestate: A=1"];
    assert_eq!(told(&lane, &upstream, "tracestate", &fields), [""; 0]);
}

/// Else the app's spans would be children of one that nobody has.
#[test]
fn without_a_collector_the_caller_s_span_stays_the_parent() {
    run(async {
        let mut origin = Origin::start(Version::One).await;
        let config = file(&format!(
            "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [127.0.0.1]}}}}]\nadmin: {{address: 127.0.0.1:0}}\n\
             telemetry: {{traces: {{sample: 100%}}}}\n\
             upstreams: {{app: {{endpoints: ['http://{}'], retries: {{attempts: 1, retry_on: ['503']}}}}}}\n",
            origin.address,
        ));
        let weir = Running::start_as("proxy", config.path(), &[]);
        let mut client = Caller::connect(Version::One, weir.address.parse().unwrap()).await;
        let given = format!("00-{ID}-{PARENT}-01");
        let fields = [("traceparent", given.as_str())];
        let call = client.call("GET", "/", &fields, Length::None).await;
        for status in [503, 200] {
            let mut asked = origin.asked().await;
            assert_eq!(named(&asked), PARENT, "{status}");
            drop(asked.reply(status, &[], Length::None).await);
        }
        assert_eq!(call.whole().await.0, 200);
    });
}

#[test]
fn every_other_request_begins_a_trace() {
    let upstream = Upstream::answering("");
    let trusting = lane(&upstream, "127.0.0.1", "traces: {sample: 100%}");
    let alone = lane(&upstream, "", "traces: {sample: 0%}");
    let valid = format!("traceparent: 00-{ID}-{PARENT}-01");
    let upper = format!("traceparent: 00-{}-{PARENT}-01", ID.to_uppercase());
    let zero = format!("traceparent: 00-{}-{PARENT}-01", "0".repeat(32));
    let mut traces = Vec::new();
    for (lane, fields, expected) in [
        (&alone, vec![valid.as_str(), "tracestate: a=1"], "00"),
        (&alone, vec![], "00"),
        (&trusting, vec![], "01"),
        (&trusting, vec!["tracestate: a=1"], "01"),
        (&trusting, vec![valid.as_str(), valid.as_str()], "01"),
        (&trusting, vec![upper.as_str(), "tracestate: a=1"], "01"),
        (&trusting, vec![zero.as_str()], "01"),
    ] {
        lane.connect().send("GET", "/", &fields, "");
        let head = upstream.wait_for_request();
        let (trace, _, flags) = parts(values(&head, "traceparent"));
        assert_eq!(flags, expected, "{fields:?}");
        assert_eq!(values(&head, "tracestate"), [""; 0], "{fields:?}");
        assert!(trace != ID && !traces.contains(&trace), "{fields:?}");
        traces.push(trace);
    }
}

#[test]
fn without_a_part_in_traces_weir_leaves_them_alone() {
    let upstream = Upstream::answering("");
    let lane = lane(&upstream, "", "log: {}");
    let given = format!("traceparent: 00-{ID}-{PARENT}-01");
    let fields = [given.as_str(), "tracestate: A"];
    lane.connect().send("GET", "/", &fields, "");
    let head = upstream.wait_for_request();
    assert!(
        head.contains(&given) && head.contains("tracestate: A\r\n"),
        "{head}"
    );
    assert_eq!(told(&lane, &upstream, "traceparent", &[]), [""; 0]);
}

#[test]
fn a_share_of_new_traces_is_kept() {
    let upstream = Upstream::answering("");
    let lane = lane(&upstream, "", "traces: {sample: 20%}");
    let mut client = lane.connect();
    let mut kept = 0;
    for _ in 0..1_000 {
        client.get("/");
        let (_, _, flags) = parts(values(&upstream.wait_for_request(), "traceparent"));
        kept += u32::from(flags == "01");
    }
    // Within ten standard deviations, some 13 each.
    assert!((70..=330).contains(&kept), "{kept}");
}

/// weir that sends the spans of all of its own traces, and trusts callers; a limit on /limited, and no upstream behind /broken.
fn weir(upstream: &Upstream, traces: &str) -> Running {
    let config = file(&format!(
        "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [127.0.0.1]}}}}]\n\
         admin: {{address: '127.0.0.1:0'}}\ntelemetry: {{traces: {{{traces}}}}}\n\
         upstreams: {{app: {{endpoints: ['{}']}}, gone: {{endpoints: ['http://127.0.0.1:1']}}}}\n\
         sessions: {{web: {{}}}}\nrate_limits: {{none: {{limit: 0/s, by: constant}}, many: {{limit: 1000/s, by: constant}}}}\n\
         routes:\n  - {{match: {{path: /limited}}, upstream: app, rate_limits: [none]}}\n\
         \x20 - {{match: {{path: /broken}}, upstream: gone}}\n\
         \x20 - {{match: {{path: /pay/*}}, upstream: app, rate_limits: [many], rewrite: {{path_prefix: /v2}}}}\n\
         \x20 - {{match: {{path: /here}}, reply: {{body: x}}}}\n\
         \x20 - {{upstream: app}}\n",
        upstream.url()
    ));
    let environment = [
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret"),
        ("OTEL_SERVICE_NAME", ""),
        ("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=weir-1"),
    ];
    Running::start_as("proxy", config.path(), &environment)
}

fn counted(weir: &Running, result: &str) -> u64 {
    let series = format!("weir_trace_spans_total{{result=\"{result}\"}}");
    weir.told(&series).unwrap() as u64
}

/// The next two spans: of the request, and of the call.
fn pair(collector: &Collector) -> (Value, Value) {
    let mut spans = [collector.span(), collector.span()];
    spans.sort_by_key(|span| span["kind"].as_u64());
    let [server, client] = spans;
    assert_eq!((&server["kind"], &client["kind"]), (&json!(2), &json!(3)));
    assert_eq!(client["parent_id"], server["span_id"]);
    assert_eq!(client["trace_id"], server["trace_id"]);
    assert!(client["start"].as_u64() >= server["start"].as_u64());
    assert!(client["end"].as_u64() <= server["end"].as_u64());
    (server, client)
}

#[test]
fn a_collector_gets_a_request_and_its_call_with_what_was_decided() {
    let (upstream, collector) = (Upstream::answering("hello"), Collector::start(None));
    let traces = format!("otlp: '{}', sample: 100%", collector.url());
    let weir = weir(&upstream, &traces);
    let given = format!("traceparent: 00-{ID}-{PARENT}-01");
    let fields = [
        given.as_str(),
        "tracestate: a=1 , b=2",
        "Tracestate: c=3",
        "Host: shop.example.com:81",
        "User-Agent: t/1",
        "X-Forwarded-Proto: https",
    ];
    weir.client().send("GET", "/pay/x?a=1&token=s", &fields, "");
    let (_, told, _) = parts(values(&upstream.wait_for_request(), "traceparent"));
    let (server, client) = pair(&collector);
    assert_eq!(
        (&server["trace_id"], &server["parent_id"]),
        (&json!(ID), &json!(PARENT))
    );
    assert_eq!(client["span_id"], told);
    assert_eq!(
        (&server["name"], &client["name"]),
        (&json!("GET /pay/*"), &json!("GET"))
    );
    assert_eq!(
        (&server["status"], &client["status"]),
        (&json!(0), &json!(0))
    );
    for (key, value) in [
        ("http.request.method", json!("GET")),
        ("http.response.status_code", json!(200)),
        ("http.route", json!("/pay/*")),
        ("http.response.body.size", json!(5)),
        ("url.scheme", json!("https")),
        ("url.path", json!("/pay/x")),
        ("url.query", json!("a=1&token=***")),
        ("server.address", json!("shop.example.com")),
        ("server.port", json!(81)),
        ("client.address", json!("127.0.0.1")),
        ("user_agent.original", json!("t/1")),
        ("weir.upstream", json!("app")),
        ("weir.session", json!(false)),
        ("weir.limits", json!(["many: admitted"])),
    ] {
        assert_eq!(server["attributes"][key], value, "{key} {server}");
    }
    for span in [&server, &client] {
        assert_eq!(span["state"], "a=1,b=2,c=3", "{span}");
    }
    let url = format!("{}/v2/x?a=1&token=***", upstream.url());
    assert_eq!(client["attributes"]["url.full"], url);
    assert_eq!(client["attributes"]["http.response.status_code"], 200);
    assert_eq!(
        (&server["resource"]["service.name"], &server["scope"]),
        (&json!("weir"), &json!("weir"))
    );
    assert_eq!(server["resource"]["k8s.pod.name"], "weir-1");
    assert_eq!(server["key"], "secret");
    assert!(server["attributes"].get("error.type").is_none(), "{server}");

    // What weir answers itself has no call.
    for (path, status, kind) in [
        ("/limited", 429, json!("quota_exceeded")),
        ("/here", 200, Value::Null),
        ("/\\", 400, json!("bad_path")),
    ] {
        weir.client().get(path);
        let span = collector.span();
        let attributes = &span["attributes"];
        assert_eq!(attributes["http.response.status_code"], status, "{span}");
        assert_eq!(attributes["weir.rejection"], kind, "{span}");
        assert_eq!(
            (&span["kind"], &span["status"]),
            (&json!(2), &json!(0)),
            "{span}"
        );
        assert_eq!(
            (&span["parent_id"], &span["state"]),
            (&json!(""), &json!(""))
        );
        assert_eq!(attributes["url.scheme"], "http", "{span}");
    }
    // A call that failed is one, and an error on both sides.
    for asks in [Version::One, Version::Two] {
        run(async {
            let mut client = Caller::connect(asks, weir.address.parse().unwrap()).await;
            assert_eq!(client.get("/broken").await.whole().await.0, 502);
        });
        let (server, client) = pair(&collector);
        assert_eq!(
            client["attributes"]["url.full"],
            "http://127.0.0.1:1/broken"
        );
        for span in [server, client] {
            assert_eq!(span["status"], 2, "{span}");
            assert_eq!(span["attributes"]["error.type"], "connect_failed", "{span}");
        }
    }
    eventually(|| counted(&weir, "exported") == 9);
    assert_eq!(counted(&weir, "dropped"), 0);
}

#[test]
fn a_span_says_whether_the_request_had_a_session() {
    let collector = Collector::start(None);
    let app = Upstream::replying(|head| {
        let begins = head.starts_with("GET /in ");
        let field = "X-Weir-Session-Start: {\"user\": \"ann\"}\r\n";
        let field = if begins { field } else { "" };
        format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 0\r\n\r\n")
    });
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         telemetry: {{traces: {{otlp: '{}', sample: 100%}}}}\n\
         upstreams:\n  app: {{endpoints: ['{}'], trust_session_headers: true}}\n\
         \x20 gone: {{endpoints: ['http://127.0.0.1:1'], circuit_breaker: b}}\n\
         circuit_breakers: {{b: {{consecutive_failures: 1, open_for: 1h}}}}\n\
         sessions: {{web: {{max_per_user: 1, on_max: reject_new, cookie: {{secure: false}}}}}}\n\
         routes:\n  - {{match: {{path: /admin}}, upstream: app, session: {{use: web, claims: {{role: admin}}}}}}\n\
         \x20 - {{match: {{path: /gone}}, upstream: gone, session: {{use: web}}}}\n\
         \x20 - {{upstream: app, session: {{use: web, require: false}}}}\n",
        collector.url(),
        app.url()
    ));
    let weir = Running::start(config.path());
    let set = weir.client().get("/in");
    let cookie = set.field("set-cookie").unwrap().split(';').next().unwrap();
    let cookie = format!("Cookie: {cookie}");
    let check = |(server, status, session): (Value, u16, bool)| {
        let told =
            ["http.response.status_code", "weir.session"].map(|key| &server["attributes"][key]);
        assert_eq!(told, [&json!(status), &json!(session)], "{server}");
    };
    check((pair(&collector).0, 200, false));
    let status = |path| weir.client().send("GET", path, &[&cookie], "").status;
    assert_eq!(weir.client().get("/in").status, 403);
    check((pair(&collector).0, 403, false));
    assert_eq!(status("/admin"), 403);
    check((collector.span(), 403, true));
    assert_eq!(status("/gone"), 502);
    check((pair(&collector).0, 502, true));
    assert_eq!(status("/gone"), 503);
    check((collector.span(), 503, true));
    assert_eq!(status("/"), 200);
    check((pair(&collector).0, 200, true));
}

/// The span that a request names as its parent.
fn named(asked: &Asked) -> String {
    let told = asked.fields.iter();
    let told = told.filter(|(name, _)| name == "traceparent");
    parts(told.map(|(_, value)| value.clone()).collect()).1
}

#[test]
fn each_try_is_a_call_which_says_how_many_came_before() {
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(tried_elsewhere(asks, serves));
    }
}

async fn tried_elsewhere(asks: Version, serves: Version) {
    let (mut origin, collector) = (Origin::start(serves).await, Collector::start(None));
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         telemetry: {{traces: {{otlp: '{}', sample: 100%}}}}\n\
         upstreams: {{app: {{endpoints: ['http://127.0.0.1:1', 'http://{}'], protocol: {}, load_balancing: round_robin, \
         retries: {{attempts: 1, retry_on: [connect_failure]}}}}}}\n",
        collector.url(),
        origin.address,
        serves.name()
    ));
    let weir = Running::start_as("proxy", config.path(), &[]);
    let mut client = Caller::connect(asks, weir.address.parse().unwrap()).await;
    // One of two endpoints in turn is dead, so one request of two is tried twice.
    let mut told = Vec::new();
    for _ in 0..2 {
        let mut call = client.call("POST", "/", &[], Length::Known(3)).await;
        call.body.finish(b"abc").await.unwrap();
        let mut asked = origin.asked().await;
        assert_eq!(asked.body.rest().await.unwrap().0, b"abc");
        asked.ok("").await;
        assert_eq!(call.whole().await.0, 200);
        told.push(named(&asked));
    }
    let mut requests = collector.requests(5);
    requests.sort_by_key(Vec::len);
    let [once, twice] = &requests[..] else {
        panic!("{requests:?}");
    };
    let again = |span: &Value| span["attributes"].get("http.request.resend_count").cloned();
    let url = |span: &Value| span["attributes"]["url.full"].clone();
    assert_eq!(again(&once[1]), None);
    let [_, dead, served] = &twice[..] else {
        panic!("{twice:?}");
    };
    assert_eq!(
        (again(dead), url(dead)),
        (None, json!("http://127.0.0.1:1/"))
    );
    assert_eq!(dead["attributes"]["error.type"], "connect_failed");
    assert_eq!(dead["status"], 2);
    assert_eq!(again(served), Some(json!(1)));
    for served in [&once[1], served] {
        assert_eq!(url(served), format!("http://{}/", origin.address));
        assert_eq!(served["attributes"]["http.response.status_code"], 200);
        assert_eq!(served["status"], 0);
        let at = told.iter().position(|told| served["span_id"] == *told);
        told.remove(at.expect("the upstream was told this call"));
    }
}

#[test]
fn an_answer_that_is_tried_again_is_a_call_of_its_own() {
    run(async {
        let (mut origin, collector) = (Origin::start(Version::One).await, Collector::start(None));
        let config = file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\ntelemetry: {{traces: {{otlp: '{}', sample: 100%}}}}\n\
             upstreams: {{app: {{endpoints: ['http://{}'], retries: {{attempts: 2, methods: [PUT], retry_on: ['503', reset], buffer: 1KiB}}}}}}\n",
            collector.url(),
            origin.address,
        ));
        let weir = Running::start_as("proxy", config.path(), &[]);
        let mut client = Caller::connect(Version::One, weir.address.parse().unwrap()).await;
        let mut call = client.call("PUT", "/", &[], Length::Known(3)).await;
        call.body.finish(b"abc").await.unwrap();
        let mut told = Vec::new();
        for outcome in [Some(503), None, Some(201)] {
            let mut asked = origin.asked().await;
            assert_eq!(asked.body.rest().await.unwrap().0, b"abc");
            told.push(json!(named(&asked)));
            match outcome {
                Some(status) => drop(asked.reply(status, &[], Length::None).await),
                None => asked.reset(h2::Reason::CANCEL),
            }
        }
        assert_eq!(call.whole().await.0, 201);
        let spans = collector.requests(4).remove(0);
        let of = |key: &str| {
            let values = spans[1..].iter().map(|call| call["attributes"].get(key));
            let values = values.map(|value| value.cloned().unwrap_or_default());
            values.collect::<Vec<_>>()
        };
        let ids = spans[1..].iter().map(|call| call["span_id"].clone());
        assert_eq!(ids.collect::<Vec<_>>(), told);
        for (key, values) in [
            ("http.request.resend_count", json!([null, 1, 2])),
            ("http.response.status_code", json!([503, null, 201])),
            ("error.type", json!(["503", "upstream_broken", null])),
        ] {
            assert_eq!(json!(of(key)), values, "{key}");
        }
        assert_eq!(spans[0]["attributes"]["http.response.status_code"], 201);
        assert!(spans[0]["attributes"].get("error.type").is_none());
    });
}

/// Whatever the client is told.
#[test]
fn a_call_has_the_status_that_the_upstream_answered() {
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(answered(asks, serves));
    }
}

async fn answered(asks: Version, serves: Version) {
    let (mut origin, collector) = (Origin::start(serves).await, Collector::start(None));
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\ntelemetry: {{traces: {{otlp: '{}', sample: 100%}}}}\n\
         sessions: {{web: {{}}}}\nroutes: [{{upstream: app, session: {{use: web, require: false}}}}]\n\
         upstreams: {{app: {{endpoints: ['http://{}'], protocol: {}, trust_session_headers: true, timeout: 1d, \
         retries: {{attempts: 1, retry_on: ['503'], methods: [GET, PUT], buffer: 1KiB, backoff: {{base: 1d, max: 1d}}}}}}}}\n",
        collector.url(),
        origin.address,
        serves.name()
    ));
    let weir = Running::start_as("proxy", config.path(), &[]);
    let mut client = Caller::connect(asks, weir.address.parse().unwrap()).await;
    let told = |spans: Vec<Vec<Value>>| {
        let of = |span: &Value| {
            let attributes = &span["attributes"];
            let of = |key: &str| attributes.get(key).cloned().unwrap_or_default();
            (of("http.response.status_code"), of("error.type"))
        };
        spans[0].iter().map(of).collect::<Vec<_>>()
    };
    // An answer that weir does not pass on.
    let call = client.get("/").await;
    let mut asked = origin.asked().await;
    let fields = [("x-weir-session-start", "{")];
    drop(asked.reply(201, &fields, Length::None).await);
    assert_eq!(call.whole().await.0, 502);
    let broken = json!("upstream_broken");
    assert_eq!(
        told(collector.requests(2)),
        [(json!(502), broken.clone()), (json!(201), broken)]
    );
    if asks == Version::One {
        return;
    }
    // One behind which another try was due, for which its client does not wait.
    let fields = [("content-type", "application/grpc"), ("grpc-timeout", "1S")];
    let call = client.call("GET", "/", &fields, Length::None).await;
    let mut asked = origin.asked().await;
    drop(asked.reply(503, &[], Length::None).await);
    assert_eq!(call.whole().await.0, 200);
    let late = json!("deadline_exceeded");
    assert_eq!(
        told(collector.requests(2)),
        [(json!(504), late.clone()), (json!(503), late)]
    );
}

#[test]
fn requests_of_each_version_are_traced_alike() {
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(traced(asks, serves));
    }
}

async fn traced(asks: Version, serves: Version) {
    let (mut origin, collector) = (Origin::start(serves).await, Collector::start(None));
    let config = file(&format!(
        "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [127.0.0.1]}}}}]\nadmin: {{address: 127.0.0.1:0}}\n\
         telemetry: {{traces: {{otlp: '{}', sample: 0%}}}}\n\
         upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: {}}}}}\n\
         routes: [{{match: {{path: /pay/*}}, upstream: app, rewrite: {{path_prefix: /v2}}}}, {{match: {{path: /none}}, reply: {{status: 204}}}}]\n",
        collector.url(),
        origin.address,
        serves.name()
    ));
    let weir = Running::start_as("proxy", config.path(), &[]);
    let mut client = Caller::connect(asks, weir.address.parse().unwrap()).await;
    let given = format!("00-{ID}-{PARENT}-01");
    let fields = [("traceparent", given.as_str()), ("tracestate", "a=1")];
    let call = client.call("POST", "/pay/x?a=1", &fields, Length::Unknown);
    let mut call = call.await;
    call.body.finish(b"abc").await.unwrap();
    let mut asked = origin.asked().await;
    assert_eq!(asked.body.rest().await.unwrap().0, b"abc");
    let states = asked.fields.iter().filter(|(name, _)| name == "tracestate");
    assert_eq!(states.map(|(_, value)| value).collect::<Vec<_>>(), ["a=1"]);
    asked.ok("hello").await;
    assert_eq!(call.whole().await, (200, "hello".to_owned()));
    let (server, call) = pair(&collector);
    assert_eq!(
        (&server["trace_id"], &server["parent_id"]),
        (&json!(ID), &json!(PARENT))
    );
    assert_eq!(call["span_id"], named(&asked));
    for (key, value) in [
        ("http.request.method", json!("POST")),
        ("http.route", json!("/pay/*")),
        ("http.request.body.size", json!(3)),
        ("http.response.body.size", json!(5)),
        ("http.response.status_code", json!(200)),
        ("url.path", json!("/pay/x")),
        ("url.query", json!("a=1")),
        ("weir.upstream", json!("app")),
    ] {
        assert_eq!(server["attributes"][key], value, "{key} {server}");
    }
    for (span, version) in [(&server, asks), (&call, serves)] {
        let spoken = match version {
            Version::One => "1.1",
            Version::Two => "2",
        };
        let attributes = &span["attributes"];
        assert_eq!(attributes["network.protocol.version"], spoken, "{span}");
        assert_eq!(attributes["network.peer.address"], "127.0.0.1", "{span}");
    }
    let port = &call["attributes"]["network.peer.port"];
    assert_eq!(*port, json!(origin.address.port()), "{call}");
    let url = format!("http://{}/v2/x?a=1", origin.address);
    assert_eq!(call["attributes"]["url.full"], url);
    assert_eq!(call["attributes"]["http.response.status_code"], 200);
    // What weir answers has no call, and what breaks off is an error of both.
    let call = client.call("GET", "/none", &fields, Length::None).await;
    assert_eq!(call.whole().await.0, 204);
    assert_eq!(
        collector.span()["attributes"]["http.response.status_code"],
        204
    );
    let call = client.call("POST", "/pay/y", &fields, Length::None).await;
    origin.asked().await.reset(h2::Reason::INTERNAL_ERROR);
    assert_eq!(call.whole().await.0, 502);
    let (server, call) = pair(&collector);
    for span in [server, call] {
        assert_eq!(span["status"], 2, "{span}");
        assert_eq!(
            span["attributes"]["error.type"], "upstream_broken",
            "{span}"
        );
    }
}

#[test]
fn what_is_sent_is_what_is_sampled() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let weir = weir(
        &upstream,
        &format!("otlp: '{}', sample: 0%", collector.url()),
    );
    let mut client = weir.client();
    let not = format!("traceparent: 00-{ID}-{PARENT}-00");
    let sampled = format!("traceparent: 00-{ID}-{PARENT}-01");
    for fields in [vec![], vec![not.as_str()], vec![sampled.as_str()], vec![]] {
        assert_eq!(client.send("GET", "/", &fields, "").status, 200);
    }
    // Its own share is none, and a caller's word goes before it.
    let (server, _) = pair(&collector);
    assert_eq!(server["trace_id"], ID);
    weir.signal("TERM");
    let mut weir = weir;
    assert!(weir.child.wait().unwrap().success());
    assert_eq!(collector.spans(), [Value::Null; 0]);
}

#[test]
fn the_last_spans_are_out_before_the_process_ends() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let mut weir = weir(
        &upstream,
        &format!("otlp: '{}', sample: 100%", collector.url()),
    );
    let mut client = weir.client();
    for _ in 0..150 {
        client.get("/");
    }
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());
    let mut found = 0;
    eventually(|| {
        found += collector.spans().len();
        found == 300
    });
}

#[test]
fn a_collector_that_is_away_costs_spans_which_are_counted_and_said_once() {
    let upstream = Upstream::answering("");
    let port = free_port();
    let weir = weir(
        &upstream,
        &format!("otlp: 'http://127.0.0.1:{port}', sample: 100%"),
    );
    let mut client = weir.client();
    client.get("/");
    weir.log_until("the collector takes no spans");
    eventually(|| counted(&weir, "dropped") == 2);
    client.get("/");
    eventually(|| counted(&weir, "dropped") == 4);
    assert_eq!(counted(&weir, "exported"), 0);
    let collector = Collector::start(Some(port));
    eventually_within(Duration::from_secs(30), || {
        client.get("/");
        !collector.spans().is_empty()
    });
    let line = weir.log_until("the collector takes");
    assert!(line.contains("spans again"), "{line}");
}

#[test]
fn spans_that_a_collector_refuses_are_said_and_not_each_time() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let traces = format!("otlp: '{}', sample: 100%", collector.url());
    let weir = weir(&upstream, &traces);
    let mut client = weir.client();
    client.get("/unwanted");
    let line = weir.log_until("PartialSuccess");
    assert!(
        line.contains("WARN") && line.contains("rejected_spans=1"),
        "{line}"
    );
    assert!(line.contains("not these"), "{line}");
    eventually(|| counted(&weir, "exported") == 2);
    client.get("/unwanted");
    eventually(|| counted(&weir, "exported") == 4);
    weir.signal("USR1");
    loop {
        let line = weir.log_until("");
        assert!(!line.contains("PartialSuccess"), "{line}");
        if line.contains("SIGUSR1") {
            break;
        }
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn a_collector_that_hangs_holds_up_no_request() {
    let upstream = Upstream::answering("");
    // It takes connections and never says a word.
    let silent = raw::scripted(|stream| {
        let mut stream = stream;
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let weir = weir(&upstream, &format!("otlp: 'http://{silent}', sample: 100%"));
    let mut client = weir.client();
    let mut longest = Duration::ZERO;
    // The queue is full after a while, long before the call of the collector is given up.
    eventually_within(Duration::from_secs(30), || {
        for _ in 0..100 {
            let start = Instant::now();
            assert_eq!(client.get("/").status, 200);
            longest = longest.max(start.elapsed());
        }
        counted(&weir, "dropped") > 0
    });
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    assert_eq!(counted(&weir, "exported"), 0);
}

/// Its machine is gone without a word, and no one says that the connection is; its address has another by then.
#[test]
fn a_collector_that_vanishes_costs_the_spans_of_one_call() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let network = raw::SlowNetwork::to(([127, 0, 0, 1], collector.port).into());
    let traces = format!("otlp: 'http://{}', sample: 100%", network.address);
    let weir = weir(&upstream, &traces);
    let mut client = weir.client();
    client.get("/");
    eventually(|| counted(&weir, "exported") == 2);
    // What it answers on that connection comes after the test.
    network.late.store(600_000, Ordering::Relaxed);
    client.get("/");
    eventually(|| counted(&weir, "dropped") == 2);
    network.late.store(0, Ordering::Relaxed);
    client.get("/");
    eventually(|| counted(&weir, "exported") + counted(&weir, "dropped") == 6);
    assert_eq!(counted(&weir, "exported"), 4);
}

#[test]
fn a_reload_sends_spans_to_another_collector() {
    let (upstream, one, other) = (
        Upstream::answering(""),
        Collector::start(None),
        Collector::start(None),
    );
    let config = |traces: &str| {
        format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: {}\ntelemetry: {{{traces}}}\n",
            upstream.url()
        )
    };
    let to =
        |collector: &Collector| format!("traces: {{otlp: '{}', sample: 100%}}", collector.url());
    let file = file(&config("log: {}"));
    let weir = Running::start(file.path());
    let mut client = weir.client();
    let reaches = |client: &mut Client, collector: &Collector| {
        std::fs::write(file.path(), config(&to(collector))).unwrap();
        weir.signal("HUP");
        eventually(|| {
            let reply = client.get("/");
            assert_eq!(reply.status, 200, "{reply:?}");
            !collector.spans().is_empty()
        });
    };
    reaches(&mut client, &one);
    reaches(&mut client, &other);
}

#[test]
fn hidden_segments_of_a_path_are_in_no_span() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
         telemetry: {{traces: {{otlp: '{}', sample: 100%}}}}\nupstreams: {{app: {{endpoints: ['{}']}}}}\n\
         routes: [{{match: {{path: /pay/*}}, upstream: app, rewrite: {{path_prefix: /v2}}}}]\n\
         audit: {{sqlite: {{path: '{}'}}, redact: {{paths: [/pay/*]}}}}\n",
        collector.url(),
        upstream.url(),
        folder.path().join("audit.db").display()
    ));
    let weir = Running::start(config.path());
    assert_eq!(weir.client().get("/pay/hunter2/x").status, 200);
    let head = upstream.wait_for_request();
    assert!(head.starts_with("GET /v2/hunter2/x "), "{head}");
    let (server, call) = pair(&collector);
    assert_eq!(server["attributes"]["url.path"], "/pay/***", "{server}");
    let url = format!("{}/v2/***", upstream.url());
    assert_eq!(call["attributes"]["url.full"], url, "{call}");
}

#[test]
fn spans_tell_the_paths_that_were_asked_for_but_not_what_dots_take_away() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
         telemetry: {{traces: {{otlp: '{}', sample: 100%}}}}\nupstreams: {{app: {{endpoints: ['{}']}}}}\n\
         audit: {{sqlite: {{path: '{}'}}, redact: {{paths: [/keys/*]}}}}\n",
        collector.url(),
        upstream.url(),
        folder.path().join("audit.db").display()
    ));
    let weir = Running::start(config.path());
    for (asked, sent, told) in [
        ("/keys/SECRET/../../public", "/public", "/keys/***"),
        ("/x/%2e./public", "/public", "/x/%2e./public"),
    ] {
        assert_eq!(weir.client().get(asked).status, 200);
        let head = upstream.wait_for_request();
        assert!(head.starts_with(&format!("GET {sent} ")), "{head}");
        let (server, call) = pair(&collector);
        assert_eq!(server["attributes"]["url.path"], told, "{server}");
        let url = format!("{}{sent}", upstream.url());
        assert_eq!(call["attributes"]["url.full"], url, "{call}");
    }
}

#[test]
fn hidden_segments_stay_hidden_behind_another_prefix() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
         telemetry: {{traces: {{otlp: '{}', sample: 100%}}}}\nupstreams: {{app: {{endpoints: ['{}']}}}}\n\
         routes: [{{match: {{path: /users/me/*}}, upstream: app, rewrite: {{path_prefix: /v2}}}}]\n\
         audit: {{sqlite: {{path: '{}'}}, redact: {{paths: [/users/*/keys/*]}}}}\n",
        collector.url(),
        upstream.url(),
        folder.path().join("audit.db").display()
    ));
    let weir = Running::start(config.path());
    assert_eq!(weir.client().get("/users/me/keys/s").status, 200);
    let (server, call) = pair(&collector);
    let asked = &server["attributes"]["url.path"];
    assert_eq!(asked, "/users/***/keys/***", "{server}");
    let url = format!("{}/v2/keys/***", upstream.url());
    assert_eq!(call["attributes"]["url.full"], url, "{call}");
}

/// What it is matched and counted by is the audit's.
#[test]
fn spans_tell_the_paths_that_were_asked_for_and_sent() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let traces = format!("otlp: '{}', sample: 100%", collector.url());
    let weir = weir(&upstream, &traces);
    for (asked, sent) in [
        ("/a%7Eb//c%2Bd", "/a~b//c%2Bd"),
        ("/a/./b", "/a/b"),
        ("/pay/x%2By//%7Ez", "/v2/x%2By//~z"),
        ("/pay/x/../../a", "/a"),
    ] {
        weir.client().get(&format!("{asked}?a=%7E"));
        let head = upstream.wait_for_request();
        assert!(head.starts_with(&format!("GET {sent}?a=%7E ")), "{head}");
        let (server, call) = pair(&collector);
        assert_eq!(server["attributes"]["url.path"], asked, "{server}");
        let url = format!("{}{sent}?a=%7E", upstream.url());
        assert_eq!(call["attributes"]["url.full"], url, "{call}");
    }
}

#[test]
fn a_span_has_a_status_where_one_was_sent() {
    let (upstream, collector) = (Upstream::held(), Collector::start(None));
    let traces = format!("otlp: '{}', sample: 100%", collector.url());
    let weir = weir(&upstream, &traces);
    let mut client = weir.client();
    client.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    drop(client);
    let (server, call) = pair(&collector);
    for span in [server, call] {
        let attributes = &span["attributes"];
        let status = attributes.get("http.response.status_code");
        assert_eq!((status, &span["status"]), (None, &json!(2)), "{span}");
        assert_eq!(attributes["error.type"], "client_left", "{span}");
    }
}

#[test]
fn a_span_names_the_host_that_a_trusted_proxy_was_asked_for() {
    let (upstream, collector) = (Upstream::answering(""), Collector::start(None));
    let traces = format!("otlp: '{}', sample: 100%", collector.url());
    let weir = weir(&upstream, &traces);
    for (fields, address, port) in [
        (vec!["Host: a.test:80"], "a.test", json!(80)),
        (vec!["Host: a.test"], "a.test", Value::Null),
        (
            vec!["Host: a.test:80", "X-Forwarded-Host: shop.test:8443, a"],
            "shop.test",
            json!(8443),
        ),
    ] {
        weir.client().send("GET", "/here", &fields, "");
        let span = collector.span();
        let attributes = &span["attributes"];
        assert_eq!(attributes["server.address"], address, "{span}");
        assert_eq!(attributes["server.port"], port, "{span}");
    }
}
