//! The admin port of a running weir: who may call it, and that what operators change there changes decisions.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use harness::process::{Running, file};
use harness::redis::{Server, key_prefix};
use harness::{Client, Reply, Upstream};
use serde_json::Value;

const TOKEN: &str = "Authorization: Bearer secret";

const JSON: &str = "Content-Type: application/json";

/// A limit of two an hour for each tenant, a breaker, and a token.
fn start(upstream: &Upstream) -> Running {
    with_admin(upstream, "token: secret")
}

/// The same, with these keys beside the admin port's address.
fn with_admin(upstream: &Upstream, keys: &str) -> Running {
    let config = file(&format!(
        "listeners: [{{address: 127.0.0.1:0}}]\n\
         upstreams: {{app: {{endpoints: [\"{}\"], circuit_breaker: standard}}}}\n\
         routes: [{{upstream: app, rate_limits: [per_tenant]}}]\n\
         rate_limits: {{per_tenant: {{limit: 2/h, by: header:x-tenant, overrides: {{acme: 1/h}}}}}}\n\
         circuit_breakers: {{standard: {{}}}}\n\
         admin: {{address: 127.0.0.1:0, {keys}}}\n\
         metrics: {{address: 127.0.0.1:0}}\n",
        upstream.url()
    ));
    Running::start(config.path())
}

fn call(admin: &mut Client, method: &str, path: &str, body: &str) -> Reply {
    let fields: &[&str] = match body {
        "" => &[TOKEN],
        _ => &[TOKEN, JSON],
    };
    admin.send(method, path, fields, body)
}

fn json(reply: &Reply) -> Value {
    serde_json::from_str(&reply.body).unwrap_or_else(|error| panic!("{error}: {reply:?}"))
}

/// How many of the next requests of `tenant` are admitted before one is refused, up to 10.
fn admitted(client: &mut Client, tenant: &str) -> usize {
    (0..10)
        .take_while(|_| {
            let field = format!("X-Tenant: {tenant}");
            match client.send("GET", "/", &[&field], "").status {
                200 => true,
                429 => false,
                status => panic!("{status}"),
            }
        })
        .count()
}

#[test]
fn calls_under_v1_need_the_token() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    let paths = [
        "/v1/config",
        "/v1/limits",
        "/v1/breakers",
        "/v1/upstreams",
        "/v1/nothing",
    ];
    for path in paths {
        for fields in [
            &[][..],
            &["Authorization: Bearer secre"],
            &["Authorization: Bearer secretx"],
            &["Authorization: Basic secret"],
        ] {
            let reply = admin.send("GET", path, fields, "");
            assert_eq!(reply.status, 401, "{path} {fields:?}");
            assert_eq!(reply.field("www-authenticate"), Some("Bearer"));
            assert_eq!(
                reply.field("content-type"),
                Some("application/problem+json")
            );
            assert!(!reply.body.contains("secret"), "{reply:?}");
        }
    }
    for path in &paths[..3] {
        assert_eq!(
            admin.send("GET", path, &[TOKEN], "").status,
            200,
            "{path} with the token"
        );
    }
}

#[test]
fn web_pages_cannot_call_v1() {
    let upstream = Upstream::answering("hi");
    let (open, guarded) = (with_admin(&upstream, ""), start(&upstream));
    let status = |running: &Running, fields: &[&str]| {
        let mut admin = running.admin();
        let reply = admin.send("POST", "/v1/breakers/app/reset", fields, "");
        if reply.status == 403 {
            assert_ne!(json(&reply)["detail"].as_str().unwrap(), "", "{fields:?}");
        }
        reply.status
    };
    for host in [
        "127.0.0.1",
        "127.0.0.1:9901",
        "[::1]:9901",
        "LocalHost:9901",
    ] {
        assert_eq!(status(&open, &[&format!("Host: {host}")]), 200, "{host}");
    }
    // A name may point here by now, whoever's it is.
    for host in [
        "evil.example",
        "evil.example:9901",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
    ] {
        assert_eq!(status(&open, &[&format!("Host: {host}")]), 403, "{host}");
    }
    assert_eq!(
        status(&guarded, &[TOKEN, "Host: weir.default.svc:9901"]),
        200
    );
    for field in [
        "Origin: http://127.0.0.1:9901",
        "Origin: null",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-origin",
    ] {
        assert_eq!(status(&open, &["Host: localhost", field]), 403, "{field}");
        assert_eq!(status(&guarded, &[TOKEN, field]), 403, "{field}");
    }
    // Typed into the address bar.
    assert_eq!(
        status(&open, &["Host: localhost", "Sec-Fetch-Site: none"]),
        200
    );
    assert_eq!(open.admin().get("/health").status, 200);
}

#[test]
fn a_body_must_say_that_it_is_json() {
    let running = start(&Upstream::answering("hi"));
    let put = |fields: &[&str]| {
        let acme = "/v1/limits/per_tenant/overrides/acme";
        running
            .admin()
            .send("PUT", acme, fields, r#"{"limit": "5/h"}"#)
            .status
    };
    assert_eq!(put(&[TOKEN]), 415);
    assert_eq!(put(&[TOKEN, "Content-Type: text/plain"]), 415);
    assert_eq!(put(&[TOKEN, "Content-Type: application/jsonx"]), 415);
    assert_eq!(put(&[TOKEN, JSON]), 200);
    assert_eq!(
        put(&[TOKEN, "Content-Type: Application/JSON; charset=utf-8"]),
        200
    );
}

#[test]
fn health_and_metrics_are_open_and_metrics_count_requests() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    for path in ["/live", "/ready", "/health"] {
        assert_eq!(admin.get(path).status, 200, "{path}");
    }
    let health = json(&admin.get("/health"));
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(health["checks"]["lanes"]["stuck"], 0);

    let mut client = running.client();
    assert_eq!(admitted(&mut client, "one"), 2);
    for (series, count) in [
        (
            "weir_requests_total{route=\"/*\",upstream=\"app\",class=\"2xx\"}",
            2,
        ),
        (
            "weir_limit_decisions_total{limit=\"per_tenant\",decision=\"admitted\"}",
            2,
        ),
        (
            "weir_limit_decisions_total{limit=\"per_tenant\",decision=\"refused\"}",
            1,
        ),
        ("weir_breaker_state{upstream=\"app\",state=\"closed\"}", 1),
        ("weir_limit_keys", 1),
    ] {
        // A request is counted once its response has gone, which the client may see first.
        harness::eventually(|| running.metric(series) == count);
    }
}

#[test]
fn metrics_are_in_the_format_that_is_asked_for() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    let mut scrape = |accept: &[&str]| {
        let reply = admin.send("GET", "/metrics", accept, "");
        let kind = reply.field("content-type").unwrap().to_owned();
        (kind, reply.body)
    };
    // As Prometheus does.
    let both = "Accept: application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.4,*/*;q=0.1";
    let (kind, text) = scrape(&[both]);
    assert!(
        kind.starts_with("application/openmetrics-text; version=1.0.0"),
        "{kind}"
    );
    assert!(text.contains("# TYPE weir_requests counter\n"), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    for accept in [
        &[][..],
        &["Accept: */*"],
        &["Accept: text/plain; version=0.0.4"],
        &["Accept: application/openmetrics-text;q=0, text/plain"],
    ] {
        let (kind, text) = scrape(accept);
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        for line in [
            "# HELP weir_requests_total ",
            "# TYPE weir_requests_total counter\n",
            "# TYPE weir_build_info gauge\n",
            "# TYPE weir_ready gauge\n",
            "weir_ready 1\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        for line in [
            "# EOF",
            "# UNIT",
            "# TYPE weir_requests counter",
            " info\n",
            " unknown\n",
        ] {
            assert!(!text.contains(line), "{line}: {text}");
        }
    }
}

#[test]
fn metrics_tell_how_the_process_is() {
    let running = start(&Upstream::answering("hi"));
    let version = env!("CARGO_PKG_VERSION");
    for (series, least, most) in [
        ("weir_ready", 1.0, 1.0),
        (
            &format!("weir_build_info{{version=\"{version}\"}}"),
            1.0,
            1.0,
        ),
        ("weir_limit_keys_max", 1_000_000.0, 1_000_000.0),
        ("weir_log_lines_total{result=\"dropped\"}", 0.0, 0.0),
        ("process_resident_memory_bytes", 1e6, 1e9),
        ("weir_memory_limit_bytes", 0.0, 1e15),
        ("process_open_fds", 5.0, 1000.0),
        ("process_max_fds", 64.0, f64::MAX),
        ("process_start_time_seconds", 1.7e9, f64::MAX),
        ("process_cpu_seconds_total", 0.001, 60.0),
    ] {
        let is = running.told(series).unwrap();
        assert!((least..=most).contains(&is), "{series} is {is}");
    }
    harness::eventually(|| running.metric("weir_log_lines_total{result=\"written\"}") > 0);
    // The lane tells each second.
    let mut client = running.client();
    harness::eventually(|| {
        client.get("/");
        let lane = running.told("weir_lane_cpu_seconds_total{lane=\"0\"}");
        let process = running.told("process_cpu_seconds_total");
        lane.is_some_and(|lane| lane > 0.0) && lane < process
    });
}

#[test]
fn the_metrics_address_serves_metrics_and_readiness_alone() {
    let running = start(&Upstream::answering("hi"));
    let mut metrics = Client::to(running.metrics.as_ref().unwrap());
    assert!(metrics.get("/metrics").body.contains("weir_connections"));
    assert_eq!(metrics.get("/ready").status, 200);
    for path in ["/live", "/health", "/v1/config", "/"] {
        assert_eq!(
            metrics.send("GET", path, &[TOKEN], "").status,
            404,
            "{path}"
        );
    }
}

#[test]
fn an_override_is_for_a_client_as_limits_count_it() {
    let upstream = Upstream::answering("hi");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0, token: secret}}\n\
         rate_limits: {{c: {{limit: 5/h, by: client.ip}}}}\nroutes: [{{upstream: upstream, rate_limits: [c]}}]\n",
        upstream.url()
    ));
    let running = Running::start(config.path());
    let mut admin = running.admin();
    let set = |admin: &mut Client, key: &str| {
        let path = format!("/v1/limits/c/overrides/{key}");
        call(admin, "PUT", &path, r#"{"limit": "7/h"}"#)
    };
    for key in ["localhost", "10.0.0.0%2F8"] {
        let reply = set(&mut admin, key);
        let problem = json(&reply)["detail"].to_string();
        assert!(
            reply.status == 400 && problem.contains("the address of one client"),
            "{problem}"
        );
    }
    let network = set(&mut admin, "2001:db8::7");
    assert_eq!(
        json(&network)["overrides"]["2001:db8::"][0]["limit"],
        "7/h",
        "{network:?}"
    );
    let left = call(&mut admin, "GET", "/v1/limits/c?key=2001:db8::8", "");
    assert_eq!(json(&left)["windows"][0]["remaining"], 7, "{left:?}");
    assert_eq!(
        call(&mut admin, "GET", "/v1/limits/c?key=localhost", "").status,
        400
    );
    let other = "/v1/limits/c/overrides/2001:db8::9";
    assert_eq!(call(&mut admin, "DELETE", other, "").status, 204);
    assert_eq!(call(&mut admin, "DELETE", other, "").status, 404);
}

#[test]
fn an_override_that_cannot_be_read_says_what_to_send() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    let path = "/v1/limits/per_tenant/overrides/a";
    for (body, part) in [
        ("unlimited", "it is not JSON"),
        ("\"unlimited\"", "it is not an object"),
        ("{}", "\"limit\" is missing"),
        ("{\"limit\": true}", "\"limit\" is not a text"),
        ("{\"limit\": [\"5/m\", \"20/h\"]}", "a list is for a limit"),
        ("{\"limt\": \"5/m\"}", "unknown field `limt`"),
    ] {
        let reply = call(&mut admin, "PUT", path, body);
        assert_eq!(reply.status, 400, "{body}: {reply:?}");
        let detail = json(&reply)["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(part), "{body}: {detail}");
        let mend = "body must be {\"limit\": \"500/s\"} or {\"limit\": \"unlimited\"}: ";
        assert!(detail.starts_with(mend), "{body}: {detail}");
    }
    for body in ["{\"limit\": 5}", "{\"limit\": \"often\"}"] {
        let reply = call(&mut admin, "PUT", path, body);
        assert_eq!(reply.status, 400, "{body}: {reply:?}");
    }
    let reply = call(&mut admin, "PUT", path, "{\"limit\": \"unlimited\"}");
    // Not all that the limit has: they may be thousands.
    let set = serde_json::json!({"name": "per_tenant", "overrides": {"a": "unlimited"}});
    assert_eq!(json(&reply), set, "{reply:?}");
}

#[test]
fn what_is_not_there_is_a_problem_that_says_what_is() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    for (method, path, status, allow) in [
        ("GET", "/", 404, None),
        ("GET", "/v1/nothing", 404, None),
        ("GET", "/v1/limits/nothing?key=a", 404, None),
        ("GET", "/v1/limits/per_tenant/nothing", 404, None),
        ("DELETE", "/v1/limits/per_tenant/overrides/none", 404, None),
        ("GET", "/v1/breakers/nothing", 404, None),
        ("POST", "/v1/breakers/app/nothing", 404, None),
        ("GET", "/v1/upstreams/nothing", 404, None),
        ("GET", "/v1/upstreams/app/nothing", 404, None),
        ("POST", "/metrics", 405, Some("GET, HEAD")),
        ("DELETE", "/health", 405, Some("GET, HEAD")),
        ("PUT", "/v1/config", 405, Some("GET, HEAD")),
        ("POST", "/v1/limits", 405, Some("GET, HEAD")),
        (
            "POST",
            "/v1/limits/per_tenant?key=a",
            405,
            Some("GET, HEAD, DELETE"),
        ),
        (
            "GET",
            "/v1/limits/per_tenant/overrides/a",
            405,
            Some("PUT, DELETE"),
        ),
        ("POST", "/v1/breakers", 405, Some("GET, HEAD")),
        ("POST", "/v1/upstreams", 405, Some("GET, HEAD")),
        ("DELETE", "/v1/upstreams/app", 405, Some("GET, HEAD")),
        ("GET", "/v1/breakers/app/reset", 405, Some("POST")),
    ] {
        let reply = call(&mut admin, method, path, "");
        assert_eq!(
            (reply.status, reply.field("allow")),
            (status, allow),
            "{method} {path}"
        );
        let problem = json(&reply);
        assert_eq!(problem["status"], status, "{method} {path}");
        assert_ne!(problem["detail"].as_str().unwrap(), "", "{method} {path}");
    }
}

#[test]
fn head_is_answered_as_get_is_without_the_body() {
    let running = start(&Upstream::answering("hi"));
    let head = |admin: &mut Client, path: &str| {
        admin.begin("HEAD", path, &[TOKEN], "");
        admin.finish_head()
    };
    // The next answer would be out of step if there were a body.
    let both_of = |admin: &mut Client, path: &str| {
        let (head, get) = (head(admin, path), call(admin, "GET", path, ""));
        let of = |reply: &Reply| (reply.status, reply.field("content-type").map(str::to_owned));
        assert_eq!(of(&head), of(&get), "{path}");
        assert_ne!(get.body, "", "{path}");
    };
    let mut admin = running.admin();
    for path in [
        "/live",
        "/ready",
        "/health",
        "/metrics",
        "/v1/config",
        "/v1/limits",
        "/v1/limits/per_tenant?key=a",
        "/v1/breakers",
        "/v1/upstreams",
        "/v1/nothing",
    ] {
        both_of(&mut admin, path);
    }
    assert_eq!(head(&mut admin, "/v1/breakers/app/reset").status, 405);
    let mut metrics = Client::to(running.metrics.as_ref().unwrap());
    both_of(&mut metrics, "/metrics");
    both_of(&mut metrics, "/ready");
}

#[test]
fn the_configuration_is_shown_with_its_defaults_and_without_secrets() {
    let running = start(&Upstream::answering("hi"));
    let reply = call(&mut running.admin(), "GET", "/v1/config", "");
    let config = json(&reply);
    assert_eq!(config["rate_limits"]["per_tenant"]["limit"], "2/h");
    assert_eq!(config["listeners"][0]["timeouts"]["header_read"], "10s");
    assert_eq!(config["admin"]["token"], "***");
}

#[test]
fn limits_are_listed_shown_and_reset_by_key() {
    let running = start(&Upstream::answering("hi"));
    let (mut admin, mut client) = (running.admin(), running.client());
    let list = json(&call(&mut admin, "GET", "/v1/limits", ""));
    assert_eq!(list["limits"][0]["name"], "per_tenant");
    assert_eq!(list["limits"][0]["mode"], "enforce");
    assert_eq!(list["limits"][0]["by"][0], "header:x-tenant");
    assert_eq!(list["limits"][0]["windows"][0]["limit"], "2/h");
    assert_eq!(list["keys"], 0);

    let one = "/v1/limits/per_tenant?key=one";
    let left =
        |admin: &mut Client| json(&call(admin, "GET", one, ""))["windows"][0]["remaining"].clone();
    assert_eq!(left(&mut admin), 2);
    assert_eq!(
        call(&mut admin, "DELETE", one, "").status,
        404,
        "nothing was used"
    );
    assert_eq!(admitted(&mut client, "one"), 2);
    assert_eq!(left(&mut admin), 0);
    assert_eq!(admitted(&mut client, "one"), 0);
    assert_eq!(call(&mut admin, "DELETE", one, "").status, 204);
    assert_eq!(left(&mut admin), 2);
    assert_eq!(admitted(&mut client, "one"), 2);

    call(
        &mut admin,
        "PUT",
        "/v1/limits/per_tenant/overrides/free",
        r#"{"limit": "unlimited"}"#,
    );
    let free = "/v1/limits/per_tenant?key=free";
    assert_eq!(json(&call(&mut admin, "GET", free, ""))["unlimited"], true);
    assert_eq!(call(&mut admin, "DELETE", free, "").status, 404);

    for wrong in ["", "?key=a&key=b"] {
        let reply = call(
            &mut admin,
            "GET",
            &format!("/v1/limits/per_tenant{wrong}"),
            "",
        );
        assert_eq!(reply.status, 400);
        assert!(reply.body.contains("the key has 1 parts"), "{reply:?}");
    }
}

#[test]
fn a_parameter_that_is_not_known_is_refused() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    for (method, path, known) in [
        (
            "GET",
            "/v1/sessions?usr=ann",
            "user, limit, after and sessions",
        ),
        (
            "DELETE",
            "/v1/sessions?user=ann&limit=3",
            "user and sessions",
        ),
        ("GET", "/v1/limits?name=per_tenant", "no parameters"),
        ("GET", "/v1/limits/per_tenant?k=one", "key"),
        ("GET", "/v1/breakers?upstream=app", "no parameters"),
        ("GET", "/v1/upstreams?name=app", "no parameters"),
        ("GET", "/v1/config?pretty", "no parameters"),
        ("GET", "/v1/audit?usr=ann", "since, until, user"),
    ] {
        let reply = call(&mut admin, method, path, "");
        assert_eq!(reply.status, 400, "{path}: {reply:?}");
        assert!(reply.body.contains(known), "{path}: {reply:?}");
    }
}

#[test]
fn a_parameter_that_says_two_things_or_nothing_is_refused() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    for (method, path, why) in [
        (
            "DELETE",
            "/v1/sessions?user=bob&user=ann",
            "user: given twice",
        ),
        ("DELETE", "/v1/sessions?user=", "user: is empty"),
        ("DELETE", "/v1/sessions?user", "user: is empty"),
        ("DELETE", "/v1/sessions?user=%ff", "%ff\\\" is not UTF-8"),
        ("GET", "/v1/sessions?user=", "user: is empty"),
        ("GET", "/v1/sessions?limit=1&limit=2", "limit: given twice"),
        ("GET", "/v1/audit?user=", "user: is empty"),
        ("GET", "/v1/audit?path=/a%ff", "/a%ff\\\" is not UTF-8"),
        ("GET", "/v1/limits/per_tenant?key=%ff", "is not UTF-8"),
        (
            "DELETE",
            "/v1/limits/per_tenant/overrides/%ff",
            "is not UTF-8",
        ),
    ] {
        let reply = call(&mut admin, method, path, "");
        assert_eq!(reply.status, 400, "{path}: {reply:?}");
        assert!(reply.body.contains(why), "{path}: {reply:?}");
    }
}

#[test]
fn an_override_at_run_time_goes_before_the_file_until_it_is_taken_back() {
    let running = start(&Upstream::answering("hi"));
    let (mut admin, mut client) = (running.admin(), running.client());
    let acme = "/v1/limits/per_tenant/overrides/acme";
    assert_eq!(admitted(&mut client, "acme"), 1, "the file's override");

    let reply = call(&mut admin, "PUT", acme, r#"{"limit": "5/h"}"#);
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(
        json(&reply)["overrides"]["acme"]
            .to_string()
            .contains("5/h")
    );
    assert_eq!(admitted(&mut client, "acme"), 4, "what was used stays used");
    assert_eq!(admitted(&mut client, "other"), 2, "other keys keep theirs");

    call(&mut admin, "PUT", acme, r#"{"limit": "unlimited"}"#);
    assert_eq!(admitted(&mut client, "acme"), 10);
    let shown = json(&call(
        &mut admin,
        "GET",
        "/v1/limits/per_tenant?key=acme",
        "",
    ));
    assert_eq!(shown["unlimited"], true);

    call(&mut admin, "PUT", acme, r#"{"limit": "0/h"}"#);
    assert_eq!(admitted(&mut client, "acme"), 0);
    assert_eq!(call(&mut admin, "DELETE", acme, "").status, 204);
    call(&mut admin, "DELETE", "/v1/limits/per_tenant?key=acme", "");
    assert_eq!(admitted(&mut client, "acme"), 1, "the file's again");
}

#[test]
fn a_bad_override_is_refused_with_its_mend() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    let acme = "/v1/limits/per_tenant/overrides/acme";
    for (body, mend) in [
        (r#"{"limit": "many"}"#, "for example 100/s or 10/30s"),
        (r#"{"limit": "5/month"}"#, "use algorithm fixed_window"),
        (r#"{"limits": "5/s"}"#, "unknown field `limits`"),
        ("5/s", "body must be"),
        ("", "body must be"),
    ] {
        let reply = call(&mut admin, "PUT", acme, body);
        assert_eq!(reply.status, 400, "{body}");
        assert!(reply.body.contains(mend), "{reply:?}");
    }
    let large = format!("{{\"limit\": \"{}\"}}", "5".repeat(70_000));
    let reply = call(&mut admin, "PUT", acme, &large);
    assert_eq!(reply.status, 400);
    assert!(reply.body.contains("larger than 65536 bytes"), "{reply:?}");
}

#[test]
fn a_breaker_is_forced_open_and_closed_and_set_back() {
    let running = start(&Upstream::answering("hi"));
    let (mut admin, mut client) = (running.admin(), running.client());
    let mut force = |how: &str| {
        let reply = call(&mut admin, "POST", &format!("/v1/breakers/app/{how}"), "");
        assert_eq!(reply.status, 200, "{reply:?}");
        json(&reply)["state"].as_str().unwrap().to_owned()
    };
    let mut status = || client.get("/").status;
    assert_eq!(status(), 200);
    assert_eq!(
        (force("force-open").as_str(), status()),
        ("forced_open", 503)
    );
    assert_eq!(
        (force("force-closed").as_str(), status()),
        ("forced_closed", 200)
    );
    assert_eq!(
        (force("force-open").as_str(), status()),
        ("forced_open", 503)
    );
    assert_eq!((force("reset").as_str(), status()), ("closed", 200));
    let shown = json(&call(&mut running.admin(), "GET", "/v1/breakers", ""));
    assert_eq!(shown["breakers"][0]["upstream"], "app");
    assert_eq!(shown["breakers"][0]["breaker"], "standard");
}

#[test]
fn what_operators_do_is_in_the_log() {
    let running = start(&Upstream::answering("hi"));
    let mut admin = running.admin();
    let mut check = |method: &str, path: &str, body: &str, parts: &[&str]| {
        let status = call(&mut admin, method, path, body).status;
        let path = path.split('?').next().unwrap().replace("acme", "***");
        for part in parts {
            running.log_until(part);
        }
        let said = format!("admin call method={method} path=\"{path}\" peer=127.0.0.1:");
        let line = running.log_until("admin call");
        assert!(line.contains("INFO") && line.contains(&said), "{line}");
        assert!(line.ends_with(&format!("status={status}")), "{line}");
        assert!(!line.contains("key="), "{line}");
    };
    let forced = "WARN weir::store::breakers::telling: breaker is forced open upstream=\"app\"";
    check("POST", "/v1/breakers/app/force-open", "", &[forced]);
    let back = "INFO weir::store::breakers::telling: breaker is closed upstream=\"app\"";
    check("POST", "/v1/breakers/app/reset", "", &[back]);
    let acme = "/v1/limits/per_tenant/overrides/acme";
    check("PUT", acme, r#"{"limit": "5/h"}"#, &[]);
    check("PUT", acme, "no JSON", &[]);
    // Neither who only looks nor who may not call.
    assert_eq!(
        call(&mut running.admin(), "GET", "/v1/limits", "").status,
        200
    );
    assert_eq!(running.admin().send("DELETE", acme, &[], "").status, 401);
    check("DELETE", "/v1/limits/per_tenant?key=acme", "", &[]);
}

/// Else who may call could do so unseen, and leave a call of several steps half done.
#[test]
fn what_a_caller_that_leaves_has_asked_for_is_done_and_in_the_log() {
    let redis = Server::single();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {{address: 127.0.0.1:0, token: secret}}\n\
         rate_limits: {{per_client: {{limit: 5/s, by: client.ip}}}}\n{}",
        redis.yaml(&key_prefix())
    ));
    let running = Running::start(config.path());
    let path = "/v1/limits/per_client/overrides/192.0.2.7";
    redis.pause();
    let mut leaves = running.admin();
    leaves.begin("PUT", path, &[TOKEN, JSON], r#"{"limit": "9/s"}"#);
    drop(leaves);
    // The one that left is gone by then.
    assert_eq!(running.admin().get("/live").status, 200);
    redis.resume();
    let line = running.log_until("admin call");
    assert!(line.contains("method=PUT"), "{line}");
    harness::eventually(|| {
        let limits = call(&mut running.admin(), "GET", "/v1/limits", "").body;
        limits.contains("192.0.2.7")
    });
}

#[test]
fn metrics_say_nothing_of_what_a_reload_took_away_and_whether_one_was_refused() {
    let upstream = Upstream::answering("hi");
    let config = |upstreams: &str, rest: &str| {
        format!(
            "listeners: [{{address: 127.0.0.1:0}}]\nupstreams: {{{upstreams}}}\nadmin: {{address: 127.0.0.1:0, token: secret}}\n{rest}"
        )
    };
    let app = format!("app: {{endpoints: [\"{}\"]}}", upstream.url());
    let broken = format!(
        "app: {{endpoints: [\"{0}\"], circuit_breaker: b}}, gone: {{endpoints: [\"{0}\"]}}",
        upstream.url()
    );
    let routes = "routes: [{match: {path: /gone}, upstream: gone}, {upstream: app}]\ncircuit_breakers: {b: {}}\nsessions: {web: {}}\n";
    let file = file(&config(&broken, routes));
    let running = Running::start(file.path());
    let forced = call(
        &mut running.admin(),
        "POST",
        "/v1/breakers/app/force-open",
        "",
    );
    assert_eq!(forced.status, 200, "{forced:?}");
    let metrics = || running.admin().get("/metrics").body;
    let (open, there) = (
        "weir_breaker_state{upstream=\"app\",state=\"forced_open\"} 1\n",
        "weir_upstream_endpoints{upstream=\"gone\",state=\"up\"} 1\n",
    );
    let before = metrics();
    assert!(before.contains(open) && before.contains(there), "{before}");
    let held = "weir_sessions_held{sessions=\"web\"} 0\n";
    assert!(before.contains(held), "{before}");
    let enforced = || running.told("weir_breaker_enforced{upstream=\"app\"}");
    assert_eq!(enforced(), Some(1.0));
    let in_shadow = routes.replace("{b: {}}", "{b: {mode: shadow}}");
    std::fs::write(file.path(), config(&broken, &in_shadow)).unwrap();
    running.log_until("configuration reloaded");
    assert_eq!(enforced(), Some(0.0));

    std::fs::write(file.path(), config(&app, "routes: [{upstream: app}]\n")).unwrap();
    running.log_until("configuration reloaded");
    let after = metrics();
    for series in [
        "weir_breaker_state{",
        "weir_breaker_enforced{",
        "weir_upstream_endpoints{upstream=\"gone\"",
        "weir_sessions_held{",
    ] {
        assert!(!after.contains(series), "{series}: {after}");
    }
    let loaded = || running.told("weir_config_last_reload_successful");
    assert_eq!(loaded(), Some(1.0));
    std::fs::write(file.path(), config(&app, "routes: [{upstream: ap}]\n")).unwrap();
    running.log_until("not reloaded");
    assert_eq!(loaded(), Some(0.0));
    std::fs::write(file.path(), config(&app, "")).unwrap();
    running.log_until("configuration reloaded");
    assert_eq!(loaded(), Some(1.0));
}

#[test]
fn callers_that_say_nothing_keep_no_probe_waiting() {
    let running = start(&Upstream::answering(""));
    let metrics = running.metrics.as_ref().unwrap();
    let ports = [(&running.admin, "/live"), (metrics, "/ready")];
    // Without a whole head, and with no other behind an answer.
    let saids: [&[u8]; 2] = [
        b"GET /live HTTP/1.1\r\nHost: a\r\nX: ",
        b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n",
    ];
    for ((port, path), said) in ports
        .into_iter()
        .flat_map(|port| saids.map(|said| (port, said)))
    {
        let silent: Vec<_> = (0..400)
            .map(|_| {
                let mut caller = Client::to(port);
                caller.write(said);
                caller
            })
            .collect();
        for _ in 0..4 {
            let mut probe = Client::to(port);
            probe.begin("GET", path, &[], "");
            assert_eq!(probe.status_within(5_000), Some(200), "{path}");
        }
        drop(silent);
    }
}

#[test]
fn calls_that_are_refused_are_counted_and_in_the_log() {
    let running = start(&Upstream::answering(""));
    let refused = |status| {
        let name = format!("weir_admin_refused_total{{status=\"{status}\"}}");
        running.metric(&name)
    };
    assert_eq!((refused(401), refused(403)), (0, 0));
    let mut admin = running.admin();
    for _ in 0..20 {
        assert_eq!(admin.get("/v1/config?user=ann").status, 401);
    }
    let line = running.log_until("call refused");
    for part in [
        "WARN",
        "path=\"/v1/config\"",
        "peer=127.0.0.1:",
        "status=401",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let of_page = [TOKEN, "Origin: http://evil.org"];
    assert_eq!(admin.send("GET", "/v1/config", &of_page, "").status, 403);
    assert_eq!((refused(401), refused(403)), (20, 1));
    // Some of the twenty, and then others after ten seconds.
    assert!(!running.log_until("call refused").contains("status=403"));
}

#[test]
fn the_scheme_of_the_token_is_written_in_any_case() {
    let running = start(&Upstream::answering(""));
    let mut admin = running.admin();
    let mut status = |value: &str| {
        let field = format!("Authorization: {value}");
        admin.send("GET", "/v1/config", &[&field], "").status
    };
    for value in ["bearer secret", "BEARER secret", "Bearer  secret"] {
        assert_eq!(status(value), 200, "{value}");
    }
    for value in [
        "Basic secret",
        "Bearersecret",
        "secret",
        "bearer Secret",
        "ä",
    ] {
        assert_eq!(status(value), 401, "{value}");
    }
}

#[test]
fn who_has_had_its_answer_for_longest_makes_room_at_the_metrics() {
    const PLACES: usize = 128;
    let upstream = Upstream::answering("");
    let running = start(&upstream);
    let mut callers: Vec<_> = (0..PLACES)
        .map(|_| Client::to(running.metrics.as_ref().unwrap()))
        .collect();
    for caller in &mut callers {
        assert_eq!(caller.get("/metrics").status, 200);
    }
    let mut late = Client::to(running.metrics.as_ref().unwrap());
    late.begin("GET", "/metrics", &[], "");
    assert_eq!(late.status_within(5_000), Some(200));
    assert_eq!(running.admin().get("/live").status, 200);
    assert_eq!(callers[PLACES - 1].get("/metrics").status, 200);
    assert!(callers[0].closes());
}
