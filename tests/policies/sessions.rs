//! Sessions over the wire: who is let through, what upstreams are told, and what starts and ends a session. Each case runs
//! with sessions in memory, and in a Redis Cluster.

use super::harness;
use std::io::Read;
use std::time::Duration;

use super::harness::process::{Echo, Running, file};
use super::harness::redis::{Cluster, key_prefix};
use super::harness::{Client, Reply, Upstream};
use serde_json::{Value, json};

/// Where sessions are kept.
#[derive(Clone, Copy)]
enum Store {
    Memory,
    Redis,
}

macro_rules! on_both_stores {
    ($($case:ident,)*) => {
        mod in_memory {
            $(#[test] fn $case() { super::$case(super::Store::Memory) })*
        }
        mod in_redis {
            $(#[test] fn $case() { super::$case(super::Store::Redis) })*
        }
    };
}

on_both_stores! {
    a_log_in_gives_a_cookie_that_opens_and_a_log_out_ends_it,
    all_sessions_of_a_user_end_at_the_admin_port_however_the_name_is_written,
    the_audit_says_who_had_the_most_sessions_already,
    the_audit_names_whoever_logs_in_and_whoever_is_refused,
    what_starts_or_ends_a_session_is_kept_by_no_cache,
    identity_headers_of_clients_never_reach_the_upstream,
    a_new_log_in_ends_the_session_before_it,
    a_cookie_of_someone_elses_keeps_no_session_alive,
    a_log_out_ends_every_session_that_the_request_names,
    a_log_out_with_a_crowd_of_tokens_is_refused,
    tokens_are_taken_as_bearer_and_header_too,
    a_user_at_the_maximum_is_refused_or_loses_the_oldest,
    what_becomes_of_sessions_is_counted,
    an_idle_session_is_over,
    shorter_timeouts_hold_for_sessions_that_live,
    a_session_in_use_is_over_in_the_end,
    a_start_that_cannot_be_read_is_a_502_and_starts_nothing,
    an_upstream_that_is_not_trusted_starts_nothing,
    a_session_header_that_is_ignored_leaves_caches_alone,
    limits_count_by_the_user_and_its_claims,
    a_switched_connection_ends_with_its_session,
}

/// The Host by which the admin port is called that has no token.
const LOCAL: &str = "Host: 127.0.0.1";

const CACHED: &str = "Cache-Control: public, max-age=60\r\nCDN-Cache-Control: max-age=60\r\nSurrogate-Control: max-age=60";

/// An upstream that starts a session at `/login/USER`, ends it at `/logout`, and answers all else with `ok`.
fn app() -> Upstream {
    Upstream::replying(|head| {
        let path = head.split(' ').nth(1).unwrap();
        let field = match path.strip_prefix("/login/") {
            Some(user) => format!(
                "X-Weir-Session-Start: {{\"user\": \"{user}\", \"claims\": {{\"role\": \"customer\"}}}}\r\n"
            ),
            None if path == "/logout" => "X-Weir-Session-End: true\r\n".to_owned(),
            None if path == "/nonsense" => "X-Weir-Session-Start: ann\r\n".to_owned(),
            None => String::new(),
        };
        format!("HTTP/1.1 200 OK\r\n{CACHED}\r\n{field}Content-Length: 2\r\n\r\nok")
    })
}

/// A weir with these sessions before the app.
fn weir(store: Store, app: &Upstream, web: &str) -> Running {
    start(store, &sessions_of(app, web))
}

fn sessions_of(app: &Upstream, web: &str) -> String {
    format!(
        "upstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\nsessions: {{web: {web}}}\n\
         routes:\n  - {{match: {{path: /admin}}, upstream: app, session: {{use: web, claims: {{role: admin}}}}}}\n\
         \x20 - {{match: {{path: /me}}, upstream: app, session: {{use: web}}}}\n\
         \x20 - {{match: {{path: /socket}}, upstream: app, session: {{use: web}}, revalidate_every: 50ms}}\n\
         \x20 - {{match: {{path: /open}}, upstream: app}}\n\
         \x20 - {{upstream: app, session: {{use: web, require: false}}}}\n",
        app.url()
    )
}

fn start(store: Store, text: &str) -> Running {
    Running::start(file(&whole(&redis(store), text)).path())
}

fn redis(store: Store) -> String {
    match store {
        Store::Memory => String::new(),
        // A budget for calls that a busy machine meets.
        Store::Redis => {
            let redis = Cluster::shared().yaml(&key_prefix());
            redis.replacen('{', "{timeout: 2s, ", 1)
        }
    }
}

fn whole(redis: &str, text: &str) -> String {
    let own = "listen: 127.0.0.1:0\nadmin: {address: 127.0.0.1:0}\nruntime: {lanes: 1}\n";
    format!("{own}{text}{redis}")
}

fn get(client: &mut Client, path: &str, fields: &[&str]) -> Reply {
    client.send("GET", path, fields, "")
}

/// What caches are told.
fn of_caches(reply: &Reply) -> Vec<String> {
    let names = ["cache-control", "surrogate-control"];
    let fields = reply.fields.iter();
    let fields = fields.filter(|(name, _)| names.iter().any(|of| name.ends_with(of)));
    fields
        .map(|(name, value)| format!("{name}: {value}"))
        .collect()
}

/// The `Cookie` field that a browser would send after `reply`.
fn cookie_of(reply: &Reply) -> String {
    let set = reply.field("set-cookie").unwrap();
    format!("Cookie: {}", set.split(';').next().unwrap())
}

fn a_log_in_gives_a_cookie_that_opens_and_a_log_out_ends_it(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{}");
    let mut client = weir.client();
    let refused = client.get("/me");
    assert_eq!(refused.status, 401);
    assert_eq!(
        refused.field("www-authenticate"),
        Some("Session realm=\"web\"")
    );
    let login = client.get("/login/ann");
    assert_eq!(login.status, 200);
    assert_eq!(login.field("x-weir-session-start"), None);
    let set = login.field("set-cookie").unwrap();
    assert!(
        set.starts_with("sid=")
            && set.ends_with("; Path=/; Max-Age=43200; SameSite=Lax; Secure; HttpOnly"),
        "{set}"
    );
    let cookie = cookie_of(&login);
    while app.requests.try_recv().is_ok() {}
    assert_eq!(get(&mut client, "/me", &[&cookie]).status, 200);
    let seen = app.wait_for_request();
    assert!(seen.contains("\r\nX-Auth-User: ann\r\n"), "{seen}");
    assert!(
        seen.contains("\r\nX-Auth-Claims: {\"role\":\"customer\"}\r\n"),
        "{seen}"
    );
    assert_eq!(get(&mut client, "/admin", &[&cookie]).status, 403);
    let logout = get(&mut client, "/logout", &[&cookie]);
    assert!(logout.field("set-cookie").unwrap().starts_with("sid=; "));
    assert_eq!(get(&mut client, "/me", &[&cookie]).status, 401);
}

fn what_starts_or_ends_a_session_is_kept_by_no_cache(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{}");
    let mut client = weir.client();
    let mut cached = |path: &str| of_caches(&client.get(path));
    for path in ["/login/ann", "/logout"] {
        assert_eq!(cached(path), ["cache-control: no-store"], "{path}");
    }
    assert_eq!(cached("/open").join("\r\n"), CACHED.to_ascii_lowercase());
}

fn identity_headers_of_clients_never_reach_the_upstream(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{}");
    let mut client = weir.client();
    for path in ["/open", "/other"] {
        let forged = [
            "X-Auth-User: root",
            "x_auth_user: root",
            "X-Auth-Claims: {}",
            "X-Weir-Session-Start: {\"user\": \"root\"}",
        ];
        assert_eq!(get(&mut client, path, &forged).status, 200);
        let seen = app.wait_for_request().to_ascii_lowercase();
        assert!(!seen.contains("auth") && !seen.contains("weir"), "{seen}");
    }
}

fn a_new_log_in_ends_the_session_before_it(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{}");
    let mut client = weir.client();
    let first = cookie_of(&client.get("/login/ann"));
    let second = cookie_of(&get(&mut client, "/login/ann", &[&first]));
    assert_eq!(get(&mut client, "/me", &[&first]).status, 401);
    assert_eq!(get(&mut client, "/me", &[&second]).status, 200);
}

fn a_cookie_of_someone_elses_keeps_no_session_alive(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{}");
    let mut client = weir.client();
    for path in ["/logout", "/login/ann"] {
        let own = cookie_of(&client.get("/login/ann"));
        assert_eq!(get(&mut client, "/me", &[&own]).status, 200);
        // A sibling domain can plant it, before or behind.
        for both in [
            format!("{own}; sid=x"),
            own.replacen("sid", "sid=x; sid", 1),
        ] {
            assert_eq!(get(&mut client, "/me", &[&both]).status, 401);
        }
        let reply = get(&mut client, path, &[&format!("{own}; sid=x")]);
        assert_eq!(reply.status, 200, "{path}");
        assert_eq!(get(&mut client, "/me", &[&own]).status, 401, "{path}");
    }
}

fn a_log_out_ends_every_session_that_the_request_names(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{token: [{cookie: sid}, {bearer: true}]}");
    let mut client = weir.client();
    let cookies =
        ["ann", "bob", "eve"].map(|user| cookie_of(&client.get(&format!("/login/{user}"))));
    let [ann, bob, eve] = &cookies;
    let bearer = format!(
        "Authorization: Bearer {}",
        eve.trim_start_matches("Cookie: sid=")
    );
    assert_eq!(
        get(&mut client, "/logout", &[ann, bob, &bearer]).status,
        200
    );
    for cookie in &cookies {
        assert_eq!(get(&mut client, "/me", &[cookie]).status, 401);
    }
}

fn a_log_out_with_a_crowd_of_tokens_is_refused(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{}");
    let mut client = weir.client();
    let own = cookie_of(&client.get("/login/ann"));
    let token = own.trim_start_matches("Cookie: sid=");
    let crowd: Vec<_> = (10..30)
        .map(|n| format!("sid={}{n}", &token[..token.len() - 2]))
        .collect();
    let planted = format!("Cookie: {}", crowd.join("; "));
    // Success would say that the session is over.
    assert_eq!(get(&mut client, "/logout", &[&planted, &own]).status, 431);
}

fn tokens_are_taken_as_bearer_and_header_too(store: Store) {
    let app = app();
    let weir = weir(
        store,
        &app,
        "{token: [{bearer: true}, {header: X-Session}]}",
    );
    let mut client = weir.client();
    let login = client.get("/login/ann");
    assert_eq!(login.field("set-cookie"), None);
    let token = login.field("x-session").unwrap();
    let me = |client: &mut Client, field: String| get(client, "/me", &[&field]);
    assert_eq!(me(&mut client, format!("X-Session: {token}")).status, 200);
    assert_eq!(
        me(&mut client, format!("Authorization: Bearer {token}")).status,
        200
    );
    let refused = me(&mut client, "Authorization: Bearer no".to_owned());
    assert_eq!(refused.status, 401);
    assert_eq!(
        refused.field("www-authenticate"),
        Some("Bearer realm=\"web\", error=\"invalid_token\"")
    );
}

fn a_user_at_the_maximum_is_refused_or_loses_the_oldest(store: Store) {
    let app = app();
    let refusing = weir(store, &app, "{max_per_user: 1, on_max: reject_new}");
    let mut client = refusing.client();
    let first = cookie_of(&client.get("/login/ann"));
    assert_eq!(client.get("/login/ann").status, 403);
    let mut client = refusing.client();
    assert_eq!(client.get("/login/bob").status, 200);
    assert_eq!(get(&mut client, "/me", &[&first]).status, 200);

    let evicting = weir(store, &app, "{max_per_user: 1}");
    let mut client = evicting.client();
    let first = cookie_of(&client.get("/login/ann"));
    let second = cookie_of(&client.get("/login/ann"));
    assert_eq!(get(&mut client, "/me", &[&first]).status, 401);
    assert_eq!(get(&mut client, "/me", &[&second]).status, 200);
}

fn what_becomes_of_sessions_is_counted(store: Store) {
    let app = app();
    let check = |weir: &Running, expected: &[(&str, f64)]| {
        for (label, count) in expected {
            let series = match label.starts_with("event") {
                true => format!("weir_session_events_total{{sessions=\"web\",{label}}}"),
                false => format!("weir_session_checks_total{{sessions=\"web\",{label}}}"),
            };
            assert_eq!(weir.told(&series), Some(*count), "{series}");
        }
    };
    let evicting = weir(store, &app, "{max_per_user: 1}");
    let mut client = evicting.client();
    let first = cookie_of(&client.get("/login/ann"));
    let second = cookie_of(&client.get("/login/ann"));
    let mut ask = |path: &str, fields: &[&str]| get(&mut client, path, fields).status;
    assert_eq!(ask("/me", &[]), 401);
    assert_eq!([(); 2].map(|()| ask("/me", &[&first])), [401; 2]);
    assert_eq!(ask("/admin", &[&second]), 403);
    let seen = [(); 3].map(|()| ask("/me", &[&second]));
    assert_eq!((seen, ask("/logout", &[&second])), ([200; 3], 200));
    check(
        &evicting,
        &[
            ("outcome=\"missing\"", 3.0),
            ("outcome=\"unknown\"", 2.0),
            ("outcome=\"forbidden\"", 1.0),
            ("outcome=\"valid\"", 4.0),
            ("event=\"created\"", 2.0),
            ("event=\"evicted\"", 1.0),
            ("event=\"ended\"", 1.0),
            ("event=\"refused\"", 0.0),
        ],
    );
    let settings = "{max_per_user: 1, on_max: reject_new, idle_timeout: 2s}";
    let refusing = weir(store, &app, settings);
    let mut client = refusing.client();
    let statuses = [(); 2].map(|()| client.get("/login/ann").status);
    assert_eq!(statuses, [200, 403]);
    let created = [
        ("event=\"created\"", 1.0),
        ("event=\"refused\"", 1.0),
        ("event=\"evicted\"", 0.0),
    ];
    check(&refusing, &created);
    // In Redis they go by themselves.
    if let Store::Memory = store {
        let expired = "weir_session_events_total{sessions=\"web\",event=\"expired\"}";
        harness::eventually(|| refusing.metric(expired) == 1);
    }
}

fn all_sessions_of_a_user_end_at_the_admin_port_however_the_name_is_written(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{}");
    let mut admin = weir.admin();
    for user in ["ann+lee", "ann%20lee", "ann%2Blee"] {
        let name = if user == "ann%2Blee" {
            "ann+lee"
        } else {
            "ann lee"
        };
        let new = json!({ "user": name }).to_string();
        let json = "Content-Type: application/json";
        let started = admin.send("POST", "/v1/sessions", &[LOCAL, json], &new);
        assert_eq!(started.status, 201, "{started:?}");
        let path = format!("/v1/sessions?user={user}");
        let ended = admin.send("DELETE", &path, &[LOCAL], "").body;
        assert_eq!(ended, r#"{"ended":1}"#, "{user}");
    }
}

fn the_audit_says_who_had_the_most_sessions_already(store: Store) {
    let (app, folder) = (app(), tempfile::tempdir().unwrap());
    let text = format!(
        "upstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\n\
         sessions: {{web: {{max_per_user: 1, on_max: reject_new}}}}\n\
         routes: [{{upstream: app, session: {{use: web, require: false}}}}]\n\
         audit: {{sqlite: {{path: '{}'}}}}\n",
        app.url(),
        folder.path().join("audit.db").display()
    );
    let weir = start(store, &text);
    assert_eq!(weir.client().get("/login/ann").status, 200);
    assert_eq!(weir.client().get("/login/ann").status, 403);
    let mut admin = weir.admin();
    harness::eventually(|| {
        let path = "/v1/audit?label=too_many_sessions";
        let found = admin.send("GET", path, &[LOCAL], "").body;
        let found: Value = serde_json::from_str(&found).unwrap();
        found["events"][0]["user"] == "ann"
    });
}

fn the_audit_names_whoever_logs_in_and_whoever_is_refused(store: Store) {
    let (app, folder) = (app(), tempfile::tempdir().unwrap());
    let text = format!(
        "upstreams:\n  app: {{endpoints: ['{}'], trust_session_headers: true}}\n\
         \x20 gone: {{endpoints: ['http://127.0.0.1:1'], circuit_breaker: b}}\n\
         circuit_breakers: {{b: {{scope: local, consecutive_failures: 1, open_for: 1h}}}}\nsessions: {{web: {{}}}}\n\
         routes:\n  - {{match: {{path: /admin}}, upstream: app, session: {{use: web, claims: {{role: admin}}}}}}\n\
         \x20 - {{match: {{path: /gone}}, upstream: gone, session: {{use: web}}}}\n\
         \x20 - {{upstream: app, session: {{use: web, require: false}}}}\naudit: {{sqlite: {{path: '{}'}}}}\n",
        app.url(),
        folder.path().join("audit.db").display()
    );
    let weir = start(store, &text);
    let mut client = weir.client();
    let cookie = cookie_of(&client.get("/login/ann"));
    let mut status = |path| get(&mut client, path, &[&cookie]).status;
    assert_eq!(
        ["/admin", "/gone", "/gone"].map(&mut status),
        [403, 502, 503]
    );
    let mut admin = weir.admin();
    let mut asked = |query: &str| {
        let path = format!("/v1/audit?{query}");
        let found = admin.send("GET", &path, &[LOCAL], "").body;
        let found: Value = serde_json::from_str(&found).unwrap();
        let events = found["events"].as_array().unwrap().iter();
        let mut told: Vec<_> = events
            .map(|event| (event["status"].to_string(), event["label"].to_string()))
            .collect();
        told.sort();
        told
    };
    harness::eventually(|| asked("").len() == 4);
    let expected = [
        ("200", "null"),
        ("403", "\"forbidden\""),
        ("502", "\"connect_failed\""),
        ("503", "\"circuit_open\""),
    ];
    let expected = expected.map(|(status, label)| (status.to_owned(), label.to_owned()));
    assert_eq!(asked("user=ann"), expected);
}

fn an_idle_session_is_over(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{idle_timeout: 50ms}");
    let mut client = weir.client();
    let cookie = cookie_of(&client.get("/login/ann"));
    harness::eventually(|| {
        // Each look is a use, so the looks must be further apart than the timeout.
        std::thread::sleep(Duration::from_millis(60));
        get(&mut client, "/me", &[&cookie]).status == 401
    });
}

fn shorter_timeouts_hold_for_sessions_that_live(store: Store) {
    let (app, redis) = (app(), redis(store));
    for timeout in ["idle_timeout", "absolute_timeout"] {
        let text = |time: &str| {
            let web = format!("{{{timeout}: {time}, cache: {{ttl: 100ms}}}}");
            whole(&redis, &sessions_of(&app, &web))
        };
        let config = file(&text("1h"));
        let weir = Running::start(config.path());
        let mut client = weir.client();
        let cookie = cookie_of(&client.get("/login/ann"));
        let mut after_a_pause = || {
            std::thread::sleep(Duration::from_millis(200));
            get(&mut client, "/me", &[&cookie]).status
        };
        assert_eq!(after_a_pause(), 200);
        std::fs::write(config.path(), text("100ms")).unwrap();
        weir.signal("HUP");
        weir.log_until("configuration reloaded");
        harness::eventually(|| after_a_pause() == 401);
        let listed = weir.admin().send("GET", "/v1/sessions", &[LOCAL], "");
        let listed: Value = serde_json::from_str(&listed.body).unwrap();
        assert_eq!(listed["sessions"], json!([]), "{timeout}");
    }
}

fn a_session_in_use_is_over_in_the_end(store: Store) {
    let app = app();
    let times = "idle_timeout: 900ms, touch_every: 50ms, absolute_timeout: 1s";
    let weir = weir(store, &app, &format!("{{{times}, cache: {{ttl: 10ms}}}}"));
    let mut client = weir.client();
    let began = weir::clock::now();
    let cookie = cookie_of(&client.get("/login/ann"));
    assert_eq!(get(&mut client, "/me", &[&cookie]).status, 200);
    harness::eventually(|| get(&mut client, "/me", &[&cookie]).status == 401);
    assert!(began.elapsed() >= Duration::from_secs(1));
    let kept = weir
        .admin()
        .send("GET", "/v1/sessions?user=ann", &[LOCAL], "")
        .body;
    let kept: Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(kept["sessions"].as_array().map(Vec::len), Some(0), "{kept}");
}

fn a_start_that_cannot_be_read_is_a_502_and_starts_nothing(store: Store) {
    let app = app();
    let weir = weir(store, &app, "{}");
    let reply = weir.client().get("/nonsense");
    assert_eq!((reply.status, reply.field("set-cookie")), (502, None));
}

fn an_upstream_that_is_not_trusted_starts_nothing(store: Store) {
    let app = app();
    let weir = start(
        store,
        &format!(
            "upstreams: {{app: {{endpoints: ['{}']}}}}\nsessions: {{web: {{}}}}\n\
         routes: [{{upstream: app, session: {{use: web, require: false}}}}]\n",
            app.url()
        ),
    );
    let reply = weir.client().get("/login/ann");
    assert_eq!((reply.status, reply.field("set-cookie")), (200, None));
    assert_eq!(reply.field("x-weir-session-start"), None);
    // Not a line for each response.
    for _ in 0..5 {
        assert_eq!(weir.client().get("/login/ann").status, 200);
    }
    weir.log_until("a session header was ignored");
    let unknown = weir.admin().send("POST", "/v1/nothing", &[LOCAL], "");
    assert_eq!(unknown.status, 404);
    let next = weir.log_until("weir::");
    assert!(next.contains("admin call"), "{next}");
}

fn a_session_header_that_is_ignored_leaves_caches_alone(store: Store) {
    let app = app();
    let weir = start(
        store,
        &format!(
            "upstreams: {{app: {{endpoints: ['{}']}}, trusted: {{endpoints: ['{}'], trust_session_headers: true}}}}\n\
             sessions: {{web: {{}}}}\nroutes:\n  - {{match: {{path: /login/bare}}, upstream: trusted}}\n\
             \x20 - {{upstream: app, session: {{use: web, require: false}}}}\n",
            app.url(),
            app.url()
        ),
    );
    let mut client = weir.client();
    for path in ["/login/ann", "/logout", "/login/bare"] {
        let reply = client.get(path);
        assert_eq!((reply.status, reply.field("set-cookie")), (200, None));
        let cached = of_caches(&reply);
        assert_eq!(cached.join("\r\n"), CACHED.to_ascii_lowercase(), "{path}");
    }
}

fn limits_count_by_the_user_and_its_claims(store: Store) {
    let app = app();
    let weir = start(
        store,
        &format!(
            "upstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\nsessions: {{web: {{}}}}\n\
         rate_limits: {{per_user: {{limit: 1/h, by: [session.user, session.claims.role]}}}}\n\
         routes:\n  - {{match: {{path: /me}}, upstream: app, session: {{use: web}}, rate_limits: [per_user]}}\n\
         \x20 - {{upstream: app, session: {{use: web, require: false}}, rate_limits: [per_user]}}\n",
            app.url()
        ),
    );
    let mut client = weir.client();
    let (ann, bob) = (
        cookie_of(&client.get("/login/ann")),
        cookie_of(&client.get("/login/bob")),
    );
    let statuses = [&ann, &ann, &bob].map(|who| get(&mut client, "/me", &[who]).status);
    assert_eq!(statuses, [200, 429, 200]);
}

/// Each sample's upstreams, limits, sessions and routes as they are, with an app, a Redis and ports of this machine.
#[test]
fn the_samples_for_production_log_users_in() {
    let manifest: Value =
        serde_saphyr::from_str(include_str!("../../deploy/k8s/03-configmap.yaml")).unwrap();
    let chart = manifest["data"]["weir.yaml"].as_str().unwrap();
    for sample in [include_str!("../../config/production.yaml"), chart] {
        let echo = Echo::start();
        let mut sample: Value = serde_saphyr::from_str(sample).unwrap();
        let own = sample.as_object_mut().unwrap();
        own.retain(|key, _| {
            let kept = "upstreams circuit_breakers rate_limits sessions routes";
            kept.split(' ').any(|kept| kept == key)
        });
        own["upstreams"]["app"]["endpoints"] = json!([format!("http://{}", echo.address)]);
        own.insert("listeners".into(), json!([{"address": "127.0.0.1:0"}]));
        own.insert("admin".into(), json!({"address": "127.0.0.1:0"}));
        own.insert(
            "redis".into(),
            json!({"urls": Cluster::shared().urls(), "mode": "cluster", "key_prefix": key_prefix(), "timeout": "2s"}),
        );
        let weir = Running::start(file(&sample.to_string()).path());
        let mut client = weir.client();
        let login = client.send("POST", "/login?user=ann", &[], "");
        assert_eq!(login.status, 200, "{login:?}");
        let reply = get(&mut client, "/api/me", &[&cookie_of(&login)]);
        let seen: Value = serde_json::from_str(&reply.body).unwrap();
        assert_eq!(seen["headers"]["x-auth-user"], "ann", "{seen}");
    }
}

fn a_switched_connection_ends_with_its_session(store: Store) {
    let socket = || {
        Upstream::replying(|head| {
            match head.contains("/login") {
            true => "HTTP/1.1 200 OK\r\nX-Weir-Session-Start: {\"user\": \"ann\"}\r\nContent-Length: 0\r\n\r\n".to_owned(),
            false => "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".to_owned(),
        }
        })
    };
    let app = socket();
    let check = |web: &str, end: &dyn Fn(&Running)| {
        let weir = weir(store, &app, web);
        let cookie = cookie_of(&weir.client().get("/login"));
        let mut stream = weir.connect();
        let open = format!(
            "GET /socket HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\nConnection: upgrade\r\n{cookie}\r\n\r\n"
        );
        std::io::Write::write_all(&mut stream, open.as_bytes()).unwrap();
        stream.set_read_timeout(Some(harness::DEADLINE)).unwrap();
        let head = harness::raw::read_head(&mut stream).unwrap();
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        end(&weir);
        // A reset is an end, too.
        let ended = stream.read_to_end(&mut Vec::new());
        let timed_out = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
        assert!(!ended.is_err_and(|error| timed_out(&error)), "{web}");
    };
    check("{}", &|weir| {
        let ended = weir
            .admin()
            .send("DELETE", "/v1/sessions?user=ann", &["Host: localhost"], "");
        assert_eq!(ended.body, "{\"ended\":1}");
    });
    check("{idle_timeout: 200ms}", &|_| {});
}
