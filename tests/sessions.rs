//! Sessions over the wire, on one lane: who is let through, what upstreams are told, and what starts and ends a session.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use harness::{Client, Lane, Reply, Upstream};

const CACHED: &str = "Cache-Control: public, max-age=60\r\nCDN-Cache-Control: max-age=60";

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

fn lane(app: &Upstream, web: &str, more: &str) -> Lane {
    Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\nsessions: {{web: {web}}}\n\
         routes:\n  - {{match: {{path: /admin}}, upstream: app, session: {{use: web, claims: {{role: admin}}}}}}\n\
         \x20 - {{match: {{path: /me}}, upstream: app, session: {{use: web}}}}\n\
         \x20 - {{match: {{path: /open}}, upstream: app}}\n\
         \x20 - {{upstream: app, session: {{use: web, require: false}}}}\n{more}",
        app.url()
    ))
}

fn get(client: &mut Client, path: &str, fields: &[&str]) -> Reply {
    client.send("GET", path, fields, "")
}

/// The `Cookie` field that a browser would send after `reply`.
fn cookie_of(reply: &Reply) -> String {
    let set = reply.field("set-cookie").unwrap();
    format!("Cookie: {}", set.split(';').next().unwrap())
}

#[test]
fn a_log_in_gives_a_cookie_that_opens_and_a_log_out_ends_it() {
    let app = app();
    let lane = lane(&app, "{}", "");
    let mut client = lane.connect();
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

#[test]
fn what_starts_or_ends_a_session_is_kept_by_no_cache() {
    let app = app();
    let lane = lane(&app, "{}", "");
    let mut client = lane.connect();
    let mut cached = |path: &str| {
        let fields = client.get(path).fields.into_iter();
        let cached = fields.filter(|(name, _)| name.ends_with("cache-control"));
        cached
            .map(|(name, value)| format!("{name}: {value}"))
            .collect::<Vec<_>>()
    };
    for path in ["/login/ann", "/logout"] {
        assert_eq!(cached(path), ["cache-control: no-store"], "{path}");
    }
    assert_eq!(cached("/open").join("\r\n"), CACHED.to_ascii_lowercase());
}

#[test]
fn identity_headers_of_clients_never_reach_the_upstream() {
    let app = app();
    let lane = lane(&app, "{}", "");
    let mut client = lane.connect();
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

#[test]
fn a_new_log_in_ends_the_session_before_it() {
    let app = app();
    let lane = lane(&app, "{}", "");
    let mut client = lane.connect();
    let first = cookie_of(&client.get("/login/ann"));
    let second = cookie_of(&get(&mut client, "/login/ann", &[&first]));
    assert_eq!(get(&mut client, "/me", &[&first]).status, 401);
    assert_eq!(get(&mut client, "/me", &[&second]).status, 200);
}

#[test]
fn tokens_are_taken_as_bearer_and_header_too() {
    let app = app();
    let lane = lane(&app, "{token: [{bearer: true}, {header: X-Session}]}", "");
    let mut client = lane.connect();
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

#[test]
fn a_user_at_the_maximum_is_refused_or_loses_the_oldest() {
    let app = app();
    let refusing = lane(&app, "{max_per_user: 1, on_max: reject_new}", "");
    let mut client = refusing.connect();
    let first = cookie_of(&client.get("/login/ann"));
    assert_eq!(client.get("/login/ann").status, 403);
    let mut client = refusing.connect();
    assert_eq!(client.get("/login/bob").status, 200);
    assert_eq!(get(&mut client, "/me", &[&first]).status, 200);

    let evicting = lane(&app, "{max_per_user: 1}", "");
    let mut client = evicting.connect();
    let first = cookie_of(&client.get("/login/ann"));
    let second = cookie_of(&client.get("/login/ann"));
    assert_eq!(get(&mut client, "/me", &[&first]).status, 401);
    assert_eq!(get(&mut client, "/me", &[&second]).status, 200);
}

#[test]
fn an_idle_session_is_over() {
    let app = app();
    let lane = lane(&app, "{idle_timeout: 50ms}", "");
    let mut client = lane.connect();
    let cookie = cookie_of(&client.get("/login/ann"));
    harness::eventually(|| {
        // Each look is a use, so the looks must be further apart than the timeout.
        std::thread::sleep(std::time::Duration::from_millis(60));
        get(&mut client, "/me", &[&cookie]).status == 401
    });
}

#[test]
fn a_start_that_cannot_be_read_is_a_502_and_starts_nothing() {
    let app = app();
    let lane = lane(&app, "{}", "");
    let reply = lane.connect().get("/nonsense");
    assert_eq!((reply.status, reply.field("set-cookie")), (502, None));
}

#[test]
fn an_upstream_that_is_not_trusted_starts_nothing() {
    let app = app();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}']}}}}\nsessions: {{web: {{}}}}\n\
         routes: [{{upstream: app, session: {{use: web, require: false}}}}]\n",
        app.url()
    ));
    let reply = lane.connect().get("/login/ann");
    assert_eq!((reply.status, reply.field("set-cookie")), (200, None));
    assert_eq!(reply.field("x-weir-session-start"), None);
}

#[test]
fn limits_count_by_the_user_and_its_claims() {
    let app = app();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\nsessions: {{web: {{}}}}\n\
         rate_limits: {{per_user: {{limit: 1/h, by: [session.user, session.claims.role]}}}}\n\
         routes:\n  - {{match: {{path: /me}}, upstream: app, session: {{use: web}}, rate_limits: [per_user]}}\n\
         \x20 - {{upstream: app, session: {{use: web, require: false}}, rate_limits: [per_user]}}\n",
        app.url()
    ));
    let mut client = lane.connect();
    let (ann, bob) = (
        cookie_of(&client.get("/login/ann")),
        cookie_of(&client.get("/login/bob")),
    );
    let statuses = [&ann, &ann, &bob].map(|who| get(&mut client, "/me", &[who]).status);
    assert_eq!(statuses, [200, 429, 200]);
}
