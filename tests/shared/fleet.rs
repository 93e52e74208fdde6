//! Several `weir run` that share state through Redis: what an operator does at one, and what their clocks have to do with it.

use super::harness::calls::{Ear, on_a_lane, soon};
use super::harness::process::{Echo, Running, faketime, file};
use super::harness::redis::{Answer, Cluster, Server, key_prefix};
use super::harness::sqlite::today;
use super::harness::{DEADLINE, Reply, eventually};
use serde_json::Value;
use weir::clock::now;
use weir::keys::Keys;
use weir::store::redis::{Arg, Script};

/// The configuration of a process whose limit `a`, by the header `t`, is shared by way of `redis`.
fn config(echo: &Echo, limit: &str, redis: &str) -> tempfile::NamedTempFile {
    file(&format!(
        "version: 1\nlisteners: [{{name: in, address: '127.0.0.1:0'}}]\nadmin: {{address: '127.0.0.1:0'}}\n\
         upstreams: {{app: {{endpoints: ['http://{}']}}}}\nrate_limits: {{a: {limit}}}\n\
         routes: [{{upstream: app, rate_limits: [a]}}]\nruntime: {{lanes: 1}}\nworker: {{health: {{cache: 0s}}}}\n{}",
        echo.address,
        redis.replace("{urls", "{timeout: 5s, urls")
    ))
}

fn ask(weir: &Running, tenant: &str) -> u16 {
    let mut client = weir.client();
    client
        .send("GET", "/", &[&format!("t: {tenant}")], "")
        .status
}

fn admitted(weir: &Running, tenant: &str, times: usize) -> usize {
    (0..times).filter(|_| ask(weir, tenant) == 200).count()
}

fn admin(weir: &Running, method: &str, path: &str, body: &str) -> Reply {
    let fields = ["Host: localhost", "Content-Type: application/json"];
    let fields = &fields[..1 + usize::from(!body.is_empty())];
    weir.admin().send(method, path, fields, body)
}

fn json(reply: &Reply) -> Value {
    serde_json::from_str(&reply.body).unwrap()
}

#[test]
fn what_an_operator_does_to_a_limit_is_so_at_every_process() {
    let echo = Echo::start();
    let redis = Cluster::shared().yaml(&key_prefix());
    let limit = "{limit: 3/h, by: 'header:t'}";
    let config = config(&echo, limit, &redis);
    let (one, other) = (Running::start(config.path()), Running::start(config.path()));
    assert_eq!(admitted(&one, "acme", 2) + admitted(&other, "acme", 3), 3);

    let shown = json(&admin(&other, "GET", "/v1/limits/a?key=acme", ""));
    assert_eq!(shown["windows"][0]["remaining"], 0);
    assert_eq!(
        admin(&one, "DELETE", "/v1/limits/a?key=acme", "").status,
        204
    );
    // The other refuses by what Redis told it, until it is told to forget that.
    eventually(|| ask(&other, "acme") == 200);
    assert_eq!(
        admin(&one, "DELETE", "/v1/limits/a?key=none", "").status,
        404
    );

    let start = now();
    let path = "/v1/limits/a/overrides/big";
    assert_eq!(admin(&one, "PUT", path, r#"{"limit": "50/h"}"#).status, 200);
    let windows = |weir: &Running| {
        let shown = json(&admin(weir, "GET", "/v1/limits/a?key=big", ""));
        shown["windows"][0]["rule"]["limit"].clone()
    };
    eventually(|| windows(&other) == "50/h");
    println!(
        "an override is known everywhere after {:?}",
        start.elapsed()
    );
    assert_eq!(admitted(&other, "big", 60), 50);
    // One that starts later knows it, too.
    let third = Running::start(config.path());
    eventually(|| windows(&third) == "50/h");
    assert_eq!(admin(&third, "DELETE", path, "").status, 204);
    eventually(|| windows(&one) == "3/h" && windows(&other) == "3/h");
}

#[test]
fn what_one_that_is_alone_has_counted_stays_whoever_else_lives() {
    let echo = Echo::start();
    let server = Server::single();
    let config = config(&echo, "{limit: 5/d, by: 'header:t'}", &server.yaml("t"));
    let one = Running::start(config.path());
    // Who lives is told still, and nothing of limits.
    let processes = format!("~{}", Keys::new("t").processes());
    server.cli(&["ACL", "SETUSER", "default", "resetkeys", &processes]);
    assert_eq!(admitted(&one, "a", 7), 5);
    // Each has a part of the limit from now on.
    let _other = Running::start(config.path());
    let mut keys = 0..;
    eventually(|| admitted(&one, &format!("k{}", keys.next().unwrap()), 5) == 2);
    assert_eq!(ask(&one, "a"), 429);

    // Redis cannot be told, but what was asked for is done here.
    let reset = admin(&one, "DELETE", "/v1/limits/a?key=a", "");
    assert_eq!(reset.status, 503, "{reset:?}");
    assert_eq!(admitted(&one, "a", 5), 2);
    assert_eq!(admin(&one, "DELETE", "/v1/limits/a?key=a", "").status, 503);
    assert_eq!(admitted(&one, "a", 5), 2);
}

#[test]
fn an_override_that_is_stored_as_older_weirs_spelled_it_can_be_deleted() {
    let echo = Echo::start();
    let server = Server::single();
    let limit = "{limit: 3/h, by: ['header:t', 'header:u']}";
    let config = config(&echo, limit, &server.yaml("t"));
    let weir = Running::start(config.path());
    let overrides = Keys::new("t").overrides();
    let older = r#"["a","CORP\\ann:b"]"#;
    server.cli(&["HSET", &overrides, older, "50/h"]);
    let at = r"/v1/limits/a/overrides/CORP%5Cann:b";
    let newer = admin(&weir, "PUT", at, r#"{"limit": "60/h"}"#);
    assert_eq!(
        json(&newer)["overrides"][r"CORP\\ann:b"][0]["limit"],
        "60/h"
    );
    assert_eq!(admin(&weir, "DELETE", at, "").status, 204);
    assert_eq!(server.cli(&["HEXISTS", &overrides, older]).int(), 0);
    assert_eq!(admin(&weir, "DELETE", at, "").status, 404);
    server.cli(&["HSET", &overrides, older, "50/h"]);
    assert_eq!(admin(&weir, "DELETE", at, "").status, 204, "it alone");
}

/// Else a reload would have a key go by rules of a kind that its limit is not of any more.
#[test]
fn an_override_goes_by_its_limit_s_new_rules_while_redis_is_away() {
    let echo = Echo::start();
    let server = Server::single();
    let text = |limit: &str| {
        let config = config(&echo, limit, &server.yaml("t"));
        std::fs::read_to_string(config.path()).unwrap()
    };
    let config = file(&text(
        "{limit: 3/h, by: 'header:t', algorithm: fixed_window}",
    ));
    let weir = Running::start(config.path());
    let path = "/v1/limits/a/overrides/big";
    assert_eq!(admin(&weir, "PUT", path, r#"{"limit": "5/h"}"#).status, 200);
    let algorithm = || {
        let shown = json(&admin(&weir, "GET", "/v1/limits", ""));
        shown["limits"][0]["overrides"]["big"][0]["algorithm"].clone()
    };
    eventually(|| algorithm() == "fixed_window");
    server.kill();
    std::fs::write(
        config.path(),
        text("{limit: 3/h, by: 'header:t', algorithm: sliding_window}"),
    )
    .unwrap();
    weir.signal("HUP");
    weir.log_until("configuration reloaded");
    eventually(|| algorithm() == "sliding_window");
}

#[test]
fn a_redis_that_comes_back_empty_is_told_the_overrides() {
    let echo = Echo::start();
    let server = Server::single();
    let config = config(&echo, "{limit: 3/h, by: 'header:t'}", &server.yaml("t"));
    let (one, other) = (Running::start(config.path()), Running::start(config.path()));
    let at = |key: &str| format!("/v1/limits/a/overrides/{key}");
    let put = |key: &str| admin(&one, "PUT", &at(key), r#"{"limit": "50/h"}"#).status;
    let is = |weir: &Running, key: &str, limit: &str| {
        let shown = json(&admin(weir, "GET", &format!("/v1/limits/a?key={key}"), ""));
        shown["windows"][0]["rule"]["limit"] == limit
    };
    assert_eq!([put("gone"), put("big")], [200, 200]);
    assert_eq!(admin(&one, "DELETE", &at("gone"), "").status, 204);
    eventually(|| is(&other, "big", "50/h") && is(&other, "gone", "3/h"));

    let overrides = Keys::new("t").overrides();
    let big = ["HGET", &overrides, r#"["a","big"]"#];
    server.kill();
    server.restart();
    let told = Ok(Answer::Text("50/h".to_owned()));
    eventually(|| server.try_cli(&big) == told);
    eventually(|| is(&one, "big", "50/h") && is(&other, "big", "50/h"));

    // That none is left is known as well.
    assert_eq!(admin(&one, "DELETE", &at("big"), "").status, 204);
    eventually(|| is(&other, "big", "3/h"));
    drop(one);
    server.kill();
    server.restart();
    let names = || server.try_cli(&["HLEN", &overrides]);
    eventually(|| names() == Ok(Answer::Int(1)));
    assert!(is(&other, "big", "3/h"));
}

#[test]
fn a_process_whose_clock_is_ahead_keeps_the_same_windows() {
    let library = faketime();
    let echo = Echo::start();
    let redis = Cluster::shared().yaml(&key_prefix());
    // So that no window ends within the test.
    today();
    for limit in [
        "{limit: 4/d, algorithm: fixed_window, by: 'header:t'}",
        "{limit: 4/month, algorithm: fixed_window, by: 'header:t'}",
        "{limit: 4/h, algorithm: sliding_window, by: 'header:t'}",
        "{limit: 4/h, by: 'header:t'}",
    ] {
        let config = config(&echo, limit, &redis);
        let right = Running::start(config.path());
        let ahead = Running::start_in(
            config.path(),
            &[
                ("LD_PRELOAD", &library),
                ("FAKETIME", "+40d"),
                ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
                ("DONT_FAKE_MONOTONIC", "1"),
            ],
        );
        let counts = [&right, &ahead, &right, &ahead].map(|weir| admitted(weir, limit, 2));
        println!("{limit}: {counts:?} of 2 each admitted in turn");
        assert_eq!(counts, [2, 2, 0, 0], "{limit}");
    }
}

#[test]
fn a_process_starts_without_redis_and_joins_it() {
    let echo = Echo::start();
    let server = Server::single();
    server.kill();
    let config = config(
        &echo,
        "{limit: 3/h, by: 'header:t'}",
        &server.yaml(&key_prefix()),
    );
    let weir = Running::start(config.path());
    assert_eq!(admitted(&weir, "a", 5), 3, "by itself");
    assert_eq!(admin(&weir, "GET", "/ready", "").status, 200);
    let health = || json(&admin(&weir, "GET", "/health", ""));
    assert_eq!(health()["status"], "degraded");
    let put = admin(
        &weir,
        "PUT",
        "/v1/limits/a/overrides/b",
        r#"{"limit": "5/h"}"#,
    );
    assert_eq!(put.status, 503, "{put:?}");
    server.restart();
    eventually(|| health()["status"] == "ok");
    let check = health()["checks"]["redis_main"].clone();
    assert_eq!(check["nodes"][0]["address"], server.address().to_string());
    eventually(|| {
        ask(&weir, "a");
        let keys = server.cli(&["DBSIZE"]);
        keys.int() >= 2
    });
}

#[test]
fn a_process_does_not_wait_long_for_a_redis_that_is_away() {
    let echo = Echo::start();
    let server = Server::single();
    server.kill();
    let redis = server.yaml(&key_prefix());
    let redis = redis.replace("{urls", "{connect_timeout: 1m, urls");
    let config = config(&echo, "{limit: 3/h, by: 'header:t'}", &redis);
    let weir = Running::start(config.path());
    assert_eq!(admin(&weir, "GET", "/live", "").status, 200);
    assert_eq!(admitted(&weir, "a", 5), 3, "by itself");
}

#[test]
fn a_redis_that_lost_overrides_keeps_what_was_set_since() {
    let server = Server::single();
    let yaml = server.yaml("t").replace("{urls", "{timeout: 5s, urls");
    on_a_lane(&yaml, async |redis| {
        assert!(redis.ready(DEADLINE).await);
        let ear = Ear::on(&redis, "channel");
        soon(|| ear.begins() == 1).await;
        server.cli(&["HSET", "o", "n", "1", "a", "set since"]);
        let back = Script::new(include_str!("../../lua/override_back.lua"));
        let args = [
            Arg::Int(60_000),
            Arg::Text("n"),
            Arg::Int(5),
            Arg::Text("channel"),
            Arg::Text("a"),
            Arg::Text("lost"),
            Arg::Text("b"),
            Arg::Text("lost"),
        ];
        // The second process has nothing to tell.
        for _ in 0..2 {
            redis.run(&back, &["o"], &args).await.unwrap();
        }
        let kept = server.cli(&["HMGET", "o", "n", "a", "b"]);
        let kept: Vec<_> = kept.list().iter().map(|it| it.text()).collect();
        assert_eq!(kept, ["5", "set since", "lost"]);
        soon(|| ear.heard("changed") == 1).await;
        // They live for as long as someone looks.
        let all = Script::new(include_str!("../../lua/override_all.lua"));
        let args = [Arg::Int(3_600_000), Arg::Text("n")];
        redis.run(&all, &["o"], &args).await.unwrap();
        assert!(server.cli(&["PTTL", "o"]).int() > 60_000);
    });
}
