//! Sessions that several weirs share through Redis: what one does the others see, what Redis holds, and what becomes of
//! requests while it is away.

use super::harness;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use super::harness::process::{Running, file};
use super::harness::redis::{Answer, Cluster, Server, key_prefix};
use super::harness::{Client, DEADLINE, Reply, Upstream, eventually};
use serde_json::Value;
use weir::clock::now;
use weir::keys::{self, Keys, UserTag};

/// How soon a session that has ended is refused everywhere.
const REVOKED_WITHIN: Duration = Duration::from_millis(100);

/// Starts a session at `/login/USER`, ends it at `/logout`, switches protocols at `/socket`.
fn app() -> Upstream {
    Upstream::replying(|head| {
        let path = head.split(' ').nth(1).unwrap();
        if path.starts_with("/socket") {
            return "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
                .to_owned();
        }
        let field = match path.strip_prefix("/login/") {
            Some(user) => {
                format!(
                    "X-Weir-Session-Start: {{\"user\": \"{user}\", \"claims\": {{\"role\": \"customer\"}}}}\r\n"
                )
            }
            None if path == "/logout" => "X-Weir-Session-End: true\r\n".to_owned(),
            None => String::new(),
        };
        format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 2\r\n\r\nok")
    })
}

fn weir(app: &Upstream, web: &str, redis: &str) -> Running {
    let text = format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 2}}\n\
         upstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\nsessions: {{web: {web}}}\n\
         routes:\n  - {{match: {{path: /me}}, upstream: app, session: {{use: web}}}}\n\
         \x20 - {{match: {{path: /socket}}, upstream: app, session: {{use: web}}}}\n\
         \x20 - {{match: {{path: /socket/often}}, upstream: app, session: {{use: web}}, revalidate_every: 50ms}}\n\
         \x20 - {{match: {{path: /socket/seldom}}, upstream: app, session: {{use: web}}, revalidate_every: 6s}}\n\
         \x20 - {{upstream: app, session: {{use: web, require: false}}}}\n{redis}",
        app.url()
    );
    Running::start(file(&text).path())
}

/// Weirs that share one cluster and no key with other tests.
fn weirs<const N: usize>(app: &Upstream, web: &str) -> ([Running; N], String) {
    let prefix = key_prefix();
    let redis = patient(&Cluster::shared().yaml(&prefix));
    (std::array::from_fn(|_| weir(app, web, &redis)), prefix)
}

/// With a budget for calls that a busy machine meets.
fn patient(redis: &str) -> String {
    within(redis, "2s")
}

fn within(redis: &str, timeout: &str) -> String {
    redis.replacen('{', &format!("{{timeout: {timeout}, "), 1)
}

fn log_in(weir: &Running, user: &str) -> String {
    let reply = weir.client().get(&format!("/login/{user}"));
    assert_eq!(reply.status, 200, "{reply:?}");
    cookie_of(&reply)
}

fn cookie_of(reply: &Reply) -> String {
    let set = reply.field("set-cookie").unwrap();
    format!("Cookie: {}", set.split(';').next().unwrap())
}

fn me(client: &mut Client, cookie: &str) -> u16 {
    client.send("GET", "/me", &[cookie], "").status
}

fn ask(weir: &Running, method: &str, path: &str, body: &str) -> Value {
    let fields = ["Host: localhost", "Content-Type: application/json"];
    let reply = weir.admin().send(method, path, &fields, body);
    assert!((200..300).contains(&reply.status), "{reply:?}");
    serde_json::from_str(&reply.body).unwrap_or(Value::Null)
}

/// What a counter of looks at sessions says.
fn looks(weir: &Running, outcome: &str) -> u64 {
    let series = format!("weir_session_lookups_total{{sessions=\"web\",outcome=\"{outcome}\"}}");
    weir.told(&series).unwrap() as u64
}

/// Waits until it knows the session by itself, which it does once it hears of ended ones.
fn remembers(weir: &Running, client: &mut Client, cookie: &str) {
    let before = looks(weir, "remembered");
    eventually(|| me(client, cookie) == 200 && looks(weir, "remembered") > before);
}

/// All keys of the prefix, with the node that has each.
fn keys_of(prefix: &str) -> Vec<(usize, String)> {
    let cluster = Cluster::shared();
    let mut found = Vec::new();
    for node in 0..3 {
        let keys = cluster.cli(node, &["KEYS", &format!("{prefix}:*")]);
        found.extend(keys.list().iter().map(|key| (node, key.text().to_owned())));
    }
    found
}

fn key_of(prefix: &str, user: &str) -> (usize, String) {
    let key = Keys::new(prefix).sessions("web", UserTag::new(user));
    (Cluster::shared().master_of(keys::slot(key.as_bytes())), key)
}

#[test]
fn a_session_of_one_weir_is_known_to_another_until_it_is_revoked() {
    let app = app();
    let ([one, other], _) = weirs(&app, "{cache: {ttl: 1m}}");
    let first = log_in(&one, "first");
    remembers(&other, &mut other.client(), &first);
    let mut all = Vec::new();
    for round in 0..30 {
        let user = format!("user{round}");
        let cookie = log_in(&one, &user);
        let mut client = other.client();
        for _ in 0..3 {
            assert_eq!(me(&mut client, &cookie), 200);
        }
        match round % 2 {
            0 => assert_eq!(
                ask(&one, "DELETE", &format!("/v1/sessions?user={user}"), "")["ended"],
                1
            ),
            _ => assert_eq!(
                one.client().send("GET", "/logout", &[&cookie], "").status,
                200
            ),
        }
        let revoked = now();
        eventually(|| me(&mut client, &cookie) == 401);
        all.push(revoked.elapsed());
    }
    all.sort_unstable();
    let (median, worst) = (all[15], all[29]);
    eprintln!(
        "a revoked session is refused by another weir within {median:?}, {worst:?} at worst of 30 rounds"
    );
    // A busy machine holds up one or another.
    assert!(median < REVOKED_WITHIN && worst < DEADLINE, "{all:?}");
    assert!(looks(&other, "remembered") >= 60, "its own memory answered");
}

#[test]
fn a_session_that_has_to_go_for_another_is_refused_everywhere() {
    let app = app();
    // Longer than the test waits.
    let ([one, other], _) = weirs(&app, "{max_per_user: 1, cache: {ttl: 10m}}");
    let first = log_in(&one, "ann");
    let mut client = one.client();
    assert_eq!(me(&mut client, &first), 200);
    let second = log_in(&other, "ann");
    eventually(|| me(&mut client, &first) == 401);
    assert_eq!(me(&mut client, &second), 200);
}

#[test]
fn the_maximum_of_a_user_holds_over_all_weirs() {
    let app = app();
    let (weirs, prefix) = weirs::<3>(&app, "{max_per_user: 3}");
    let (node, key) = key_of(&prefix, "ann");
    let cookies: Vec<_> = thread::scope(|scope| {
        let runs: Vec<_> = (0..9)
            .map(|n| {
                let address = &weirs[n % 3].address;
                let log_in = move || Client::to(address).get("/login/ann");
                scope.spawn(move || (0..20).map(|_| cookie_of(&log_in())).collect::<Vec<_>>())
            })
            .collect();
        while !runs.iter().all(thread::ScopedJoinHandle::is_finished) {
            // One field is the user's name.
            let fields = Cluster::shared().cli(node, &["HLEN", &key]).int();
            assert!(fields <= 4, "{fields} fields");
        }
        runs.into_iter()
            .flat_map(|run| run.join().unwrap())
            .collect()
    });
    assert_eq!(cookies.len(), 180);
    for weir in &weirs {
        eventually(|| {
            let mut client = weir.client();
            let live = cookies
                .iter()
                .filter(|cookie| me(&mut client, cookie) == 200);
            live.count() == 3
        });
    }
}

#[test]
fn a_full_user_is_refused_by_every_weir() {
    let app = app();
    let ([one, other], _) = weirs(&app, "{max_per_user: 2, on_max: reject_new}");
    log_in(&one, "ann");
    log_in(&other, "ann");
    for weir in [&one, &other] {
        assert_eq!(weir.client().get("/login/ann").status, 403);
    }
}

#[test]
fn a_flood_of_one_unknown_token_is_a_few_calls() {
    let app = app();
    let ([weir], _) = weirs(&app, "{cache: {negative_ttl: 1m}}");
    let unknown = format!("Cookie: sid={}", "a".repeat(59));
    thread::scope(|scope| {
        for _ in 0..4 {
            let (mut client, unknown) = (weir.client(), &unknown);
            scope.spawn(move || {
                for _ in 0..100 {
                    assert_eq!(me(&mut client, unknown), 401);
                }
            });
        }
    });
    assert_eq!(looks(&weir, "asked"), 1);
    let mut client = weir.client();
    for malformed in ["a", &"a".repeat(58), &"a".repeat(60), &"*".repeat(59)] {
        assert_eq!(me(&mut client, &format!("Cookie: sid={malformed}")), 401);
    }
    assert_eq!(looks(&weir, "asked"), 1);
}

#[test]
fn no_token_is_kept_in_clear_and_every_key_has_an_end() {
    let app = app();
    let ([weir], prefix) = weirs(&app, "{}");
    let cookies: Vec<_> = (0..20).map(|n| log_in(&weir, &format!("u{n}"))).collect();
    let mut client = weir.client();
    assert!(cookies.iter().all(|cookie| me(&mut client, cookie) == 200));
    let keys = keys_of(&prefix);
    let sessions = keys.iter().filter(|(_, key)| key.contains(":s:web:"));
    assert_eq!(sessions.count(), 20);
    let mut all = String::new();
    for (node, key) in &keys {
        let cluster = Cluster::shared();
        let life = cluster.cli(*node, &["PTTL", key]).int();
        assert!(life > 0, "{key} lives for {life}");
        all.push_str(&format!("{key} {:?}\n", cluster.cli(*node, &["DUMP", key])));
        if key.contains(":s:web:") {
            all.push_str(&format!("{:?}\n", cluster.cli(*node, &["HGETALL", key])));
        }
    }
    assert!(all.contains("u19"), "{all}");
    for cookie in &cookies {
        let token = cookie.rsplit('=').next().unwrap();
        let (_, secret) = token.split_at(16);
        assert!(secret.len() == 43 && !all.contains(secret), "{all}");
    }
}

#[test]
fn a_session_costs_redis_few_bytes() {
    let app = app();
    let ([weir], prefix) = weirs(&app, "{}");
    let mut client = weir.client();
    for n in 0..1_000 {
        let login = client.get(&format!("/login/user-{n:06}@mail.example"));
        assert_eq!(login.status, 200);
    }
    let mut bytes = 0;
    for (node, key) in keys_of(&prefix)
        .iter()
        .filter(|(_, key)| key.contains(":s:web:"))
    {
        bytes += Cluster::shared()
            .cli(*node, &["MEMORY", "USAGE", key])
            .int();
    }
    eprintln!(
        "1000 sessions of as many users with a claim: {} bytes each in Redis",
        bytes / 1_000
    );
    assert!(bytes / 1_000 < 300, "{bytes}");
}

#[test]
fn a_session_in_use_is_never_idle_and_an_unused_one_goes() {
    let app = app();
    let web = "{idle_timeout: 4s, touch_every: 1s, cache: {ttl: 1m}}";
    let ([one, other], prefix) = weirs(&app, web);
    let cookie = log_in(&one, "ann");
    let mut client = one.client();
    remembers(&one, &mut client, &cookie);
    let (asked, began) = (looks(&one, "asked"), now());
    eventually(|| {
        assert_eq!(me(&mut client, &cookie), 200);
        began.elapsed() > Duration::from_secs(9)
    });
    // The other asks Redis, where the session would be over for long without the uses written down.
    assert_eq!(me(&mut other.client(), &cookie), 200);
    assert_eq!(looks(&one, "asked"), asked);
    let (node, key) = key_of(&prefix, "ann");
    eventually(|| Cluster::shared().cli(node, &["EXISTS", &key]) == Answer::Int(0));
    assert_eq!(me(&mut client, &cookie), 401);
}

#[test]
fn each_session_of_a_user_ends_by_its_own_time() {
    let (app, prefix) = (app(), key_prefix());
    let redis = patient(&Cluster::shared().yaml(&prefix));
    let [long, short] =
        ["1h", "100ms"].map(|idle| weir(&app, &format!("{{idle_timeout: {idle}}}"), &redis));
    let kept = log_in(&long, "ann");
    let idle = log_in(&short, "ann");
    let (node, key) = key_of(&prefix, "ann");
    let lives = Cluster::shared().cli(node, &["PTTL", &key]).int();
    assert!(lives > 1_800_000, "{lives}");
    let mut client = short.client();
    eventually(|| {
        // Each look is a use, and no use takes a session back that was over by then.
        thread::sleep(Duration::from_millis(150));
        me(&mut client, &idle) == 401
    });
    assert_eq!(me(&mut long.client(), &kept), 200);
    // With the last one goes the user's name.
    let out = long.client().send("GET", "/logout", &[&kept], "");
    assert_eq!(out.status, 200);
    let left = Cluster::shared().cli(node, &["EXISTS", &key]);
    assert_eq!(left, Answer::Int(0));
}

/// As the script finds them for a process that remembers nothing.
#[test]
fn an_idle_session_is_over_though_another_of_its_user_lives() {
    const FIND: &str = include_str!("../../lua/session_find.lua");
    let server = Server::single();
    let began = weir::clock::wall().as_millis() - 100_000;
    let used_at = |seconds: u64| format!("{began} 3600000 {} 30000", seconds * 1_000);
    let (idle, lives) = (used_at(60), used_at(90));
    server.cli(&["HSET", "k", "u", "ann", "idle", &idle, "lives", &lives]);
    let timeouts = ["3600000", "3600000"];
    let find = |name: &str, touch: &str| {
        let call = ["EVAL", FIND, "1", "k", name, touch, "0"];
        server.cli(&[&call[..], &timeouts].concat()).list().len()
    };
    // Neither a look nor a use brings it back.
    for touch in ["-1", "0"] {
        server.cli(&["HSET", "k", "idle", &idle]);
        assert_eq!(find("idle", touch), 0, "{touch}");
        assert_eq!(server.cli(&["HEXISTS", "k", "idle"]).int(), 0, "{touch}");
        assert_eq!(find("lives", touch), 6, "{touch}");
    }
}

#[test]
fn a_server_that_is_full_tells_whose_session_it_is() {
    let (app, server) = (app(), Server::single());
    let redis = patient(&server.yaml(&key_prefix()));
    let weir = weir(&app, "{touch_every: 1ms, cache: {ttl: 1ms}}", &redis);
    let cookie = log_in(&weir, "ann");
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    let mut client = weir.client();
    eventually(|| {
        assert_eq!(me(&mut client, &cookie), 200);
        looks(&weir, "asked") > 3
    });
    assert_eq!(looks(&weir, "grace"), 0);
}

#[test]
fn a_weir_that_is_stopped_writes_down_its_last_uses() {
    let app = app();
    let ([mut weir], prefix) = weirs(&app, "{}");
    let cookie = log_in(&weir, "ann");
    let (node, key) = key_of(&prefix, "ann");
    // `CREATED ABSOLUTE SEEN IDLE CLAIMS`, beside the user's name.
    let seen = || {
        let values = Cluster::shared().cli(node, &["HVALS", &key]);
        let record = values.list().iter().map(Answer::text);
        let record = record.max_by_key(|value| value.len()).unwrap().to_owned();
        record.split(' ').nth(2).unwrap().parse::<u64>().unwrap()
    };
    let (mut client, began) = (weir.client(), now());
    eventually(|| {
        assert_eq!(me(&mut client, &cookie), 200);
        began.elapsed() > Duration::from_millis(100)
    });
    assert_eq!(seen(), 0, "it is not due yet");
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());
    assert!(seen() >= 50, "{}", seen());
}

#[test]
fn a_weir_that_is_stopped_while_redis_is_away_ends_all_the_same() {
    let (app, server) = (app(), Server::single());
    let redis = within(&server.yaml(&key_prefix()), "250ms");
    let mut weir = weir(&app, "{}", &redis);
    let mut client = weir.client();
    // More than are written at a time, each with a use that is not written down.
    for user in 0..100 {
        let cookie = log_in(&weir, &format!("u{user}"));
        assert_eq!(me(&mut client, &cookie), 200);
    }
    server.kill();
    let began = now();
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn expired_sessions_of_a_user_do_not_pile_up() {
    let app = app();
    let ([weir], prefix) = weirs(&app, "{idle_timeout: 3s, touch_every: 500ms}");
    let mut client = weir.client();
    let kept = log_in(&weir, "ann");
    let (node, key) = key_of(&prefix, "ann");
    for _ in 0..200 {
        assert_eq!(client.get("/login/ann").status, 200);
        assert_eq!(me(&mut client, &kept), 200);
    }
    // The one in use keeps the key; the others go, a few at each start and use.
    eventually(|| {
        assert_eq!(me(&mut client, &kept), 200);
        Cluster::shared().cli(node, &["HLEN", &key]).int() <= 20
    });
}

#[test]
fn sessions_are_listed_page_by_page_over_all_nodes() {
    let app = app();
    let ([one, other], _) = weirs(&app, "{}");
    let mut made = BTreeSet::new();
    for n in 0..300 {
        let body = format!("{{\"user\": \"user{}\"}}", n % 250);
        let created = ask(&one, "POST", "/v1/sessions", &body);
        made.insert(created["id"].as_str().unwrap().to_owned());
    }
    let list = |query: &str| {
        let (mut found, mut after) = (BTreeSet::new(), String::new());
        loop {
            let page = ask(
                &other,
                "GET",
                &format!("/v1/sessions?limit=40{query}{after}"),
                "",
            );
            let sessions = page["sessions"].as_array().unwrap();
            found.extend(
                sessions
                    .iter()
                    .map(|one| one["id"].as_str().unwrap().to_owned()),
            );
            match page["next"].as_str() {
                Some(next) => after = format!("&after={next}"),
                None => return found,
            }
        }
    };
    assert_eq!(list(""), made);
    let of_user = list("&user=user7");
    assert_eq!(of_user.len(), 2);
    for id in &of_user {
        let shown = ask(&other, "GET", &format!("/v1/sessions/{id}"), "");
        assert_eq!(shown["user"], "user7");
        ask(&other, "DELETE", &format!("/v1/sessions/{id}"), "");
    }
    assert!(list("&user=user7").is_empty());
}

#[test]
fn a_switched_connection_ends_when_another_weir_ends_its_session() {
    let app = app();
    let ([one, other], _) = weirs(&app, "{}");
    let took = (0..5).map(|n| {
        let user = format!("user{n}");
        let cookie = log_in(&one, &user);
        let mut stream = one.connect();
        switch(&mut stream, "/socket", &cookie);
        // It lives until then.
        stream.write_all(b"more").unwrap();
        let end = format!("/v1/sessions?user={user}");
        assert_eq!(ask(&other, "DELETE", &end, "")["ended"], 1);
        let revoked = now();
        wait_for_end(&mut stream);
        revoked.elapsed()
    });
    // A busy machine holds up one or another.
    let took = took.min().unwrap();
    eprintln!("a switched connection ends {took:?} after its session, which another weir ended");
    assert!(took < REVOKED_WITHIN, "{took:?}");
}

fn switch(stream: &mut TcpStream, path: &str, cookie: &str) {
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\nConnection: upgrade\r\n{cookie}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let head = harness::raw::read_head(stream).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
}

fn wait_for_end(stream: &mut TcpStream) {
    // A reset is an end, too.
    if let Err(error) = stream.read_to_end(&mut Vec::new()) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
}

#[test]
fn requests_with_one_token_share_a_call() {
    let (app, server) = (app(), Server::single());
    let redis = format!("redis: {{urls: '{}', timeout: 5s}}\n", server.url());
    let weir = weir(&app, "{cache: {ttl: 0s}}", &redis);
    let cookie = log_in(&weir, "ann");
    server.pause();
    let mut clients: Vec<_> = (0..16).map(|_| weir.client()).collect();
    for client in &mut clients {
        client.begin("GET", "/me", &[&cookie], "");
    }
    eventually(|| looks(&weir, "asked") + looks(&weir, "waited") == 16);
    server.resume();
    assert!(
        clients
            .iter_mut()
            .all(|client| client.finish().status == 200)
    );
    assert_eq!(looks(&weir, "asked"), 1);
}

#[test]
fn what_is_known_holds_for_the_grace_while_redis_is_away() {
    let (app, server) = (app(), Server::single());
    let web = "{cache: {ttl: 100ms}, on_redis_loss: {action: deny, grace: 4s}}";
    let weir = weir(&app, web, &within(&server.yaml("weir"), "500ms"));
    let (ann, bob) = (log_in(&weir, "ann"), log_in(&weir, "bob"));
    let mut client = weir.client();
    let mut stream = weir.connect();
    switch(&mut stream, "/socket/often", &bob);
    let away = |client: &mut Client| {
        let mut seen = Vec::new();
        eventually(|| {
            let reply = client.send("GET", "/me", &[&ann], "");
            seen.push(reply.status);
            let down = reply.status == 503;
            if down {
                assert_eq!(reply.field("retry-after"), Some("1"));
                assert_eq!(reply.field("set-cookie"), None, "the cookie stays");
                assert!(
                    reply
                        .field("proxy-status")
                        .unwrap()
                        .contains("session_store_down")
                );
            }
            down
        });
        let served = seen.iter().filter(|status| **status == 200).count();
        assert_eq!(served, seen.len() - 1, "{seen:?}");
        assert!(served > 10, "{seen:?}");
        // A connection of its own, since a refused log-in closes it.
        let reply = weir.client().get("/login/eve");
        assert_eq!((reply.status, reply.field("set-cookie")), (503, None));
    };
    server.pause();
    away(&mut client);
    wait_for_end(&mut stream);
    assert!(looks(&weir, "grace") > 0 && looks(&weir, "unanswered") > 0);
    // That is for users, or for a memory, that have as many as they may.
    let refused = "weir_session_events_total{sessions=\"web\",event=\"refused\"}";
    assert_eq!(weir.told(refused), Some(0.0));
    server.resume();
    eventually(|| me(&mut client, &ann) == 200);
    // A server that comes back empty has no sessions: now they are over.
    server.kill();
    away(&mut client);
    server.restart();
    eventually(|| me(&mut client, &ann) == 401);
}

#[test]
fn a_log_out_that_redis_does_not_hear_is_refused() {
    let (app, server) = (app(), Server::single());
    let weir = weir(&app, "{}", &patient(&server.yaml("weir")));
    let cookie = log_in(&weir, "ann");
    server.pause();
    let reply = weir.client().send("GET", "/logout", &[&cookie], "");
    assert_eq!((reply.status, reply.field("set-cookie")), (503, None));
    server.resume();
    eventually(|| weir.client().send("GET", "/logout", &[&cookie], "").status == 200);
    assert_eq!(me(&mut weir.client(), &cookie), 401);
}

#[test]
fn ended_sessions_that_were_not_heard_of_are_asked_about_anew() {
    let (app, server) = (app(), Server::single());
    let weir = weir(&app, "{cache: {ttl: 1m}}", &patient(&server.yaml("weir")));
    let cookie = log_in(&weir, "ann");
    let mut client = weir.client();
    remembers(&weir, &mut client, &cookie);
    // Ended behind its back, as by a message that is lost.
    server.cli(&["FLUSHALL"]);
    assert_eq!(me(&mut client, &cookie), 200);
    server.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    eventually(|| me(&mut client, &cookie) == 401);
}

#[test]
fn a_weir_that_cannot_hear_of_ended_sessions_asks_about_each() {
    let app = app();
    let server = Server::with(|_, _| "user default on nopass ~* &* +@all -subscribe\n".to_owned());
    let redis = patient(&server.yaml("weir"));
    let [one, other] = [0; 2].map(|_| weir(&app, "{cache: {ttl: 1m}}", &redis));
    let failed = "weir_redis_subscribe_failures_total{client=\"main\"}";
    let failures = || one.told(failed).unwrap() as u64;
    let cookie = log_in(&one, "ann");
    let mut client = one.client();
    for _ in 0..3 {
        assert_eq!(me(&mut client, &cookie), 200);
    }
    ask(&other, "DELETE", "/v1/sessions?user=ann", "");
    assert_eq!(me(&mut client, &cookie), 401);
    // Three channels, each tried again more and more rarely.
    let (begun, began) = (failures(), now());
    thread::sleep(Duration::from_secs(2));
    let tries = failures() - begun;
    let bound = 15.0 * began.elapsed().as_secs_f64();
    assert!(tries > 0 && (tries as f64) < bound, "{tries} of {bound}");

    server.cli(&["ACL", "SETUSER", "default", "+subscribe"]);
    let cookie = log_in(&one, "bob");
    remembers(&one, &mut client, &cookie);
    ask(&other, "DELETE", "/v1/sessions?user=bob", "");
    eventually(|| me(&mut client, &cookie) == 401);
}

#[test]
fn a_switched_connection_outlives_a_look_that_nobody_answers() {
    let (app, server) = (app(), Server::single());
    let web = "{cache: {ttl: 0s}, on_redis_loss: {action: deny, grace: 5s}}";
    let weir = weir(&app, web, &within(&server.yaml("weir"), "1s"));
    let cookie = log_in(&weir, "ann");
    let mut stream = weir.connect();
    switch(&mut stream, "/socket/seldom", &cookie);
    // Its session is looked at when it begins, and then while nobody answers, when the last answer is older than the grace.
    thread::sleep(Duration::from_millis(200));
    server.pause();
    thread::sleep(Duration::from_secs(8));
    server.resume();
    stream
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let lives = stream.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(lives, Err(std::io::ErrorKind::WouldBlock));
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    ask(&weir, "DELETE", "/v1/sessions?user=ann", "");
    wait_for_end(&mut stream);
}

#[test]
fn a_session_that_redis_has_lost_is_over_once_it_is_ended() {
    let (app, server) = (app(), Server::single());
    let weir = weir(&app, "{cache: {ttl: 1m}}", &patient(&server.yaml("weir")));
    let cookie = log_in(&weir, "ann");
    let mut client = weir.client();
    remembers(&weir, &mut client, &cookie);
    // As in a failover.
    server.cli(&["FLUSHALL"]);
    assert_eq!(me(&mut client, &cookie), 200);
    assert_eq!(
        weir.client().send("GET", "/logout", &[&cookie], "").status,
        200
    );
    assert_eq!(me(&mut client, &cookie), 401);
}
