//! A user of Redis with the rights that docs/shared-state.md names, and no others, is all that weir needs.

use std::process::{Command, Stdio};

use super::harness::eventually;
use super::harness::postgres::Database;
use super::harness::process::{Echo, Log, Running, file, signal};
use super::harness::redis::{Answer, Cluster, Server, key_prefix};
use weir::keys::{SLOTS, slot};

const PAGE: &str = include_str!("../../docs/shared-state.md");

fn section() -> &'static str {
    let (_, section) = PAGE.split_once("\n### Its rights\n").unwrap();
    section.split("\n### ").next().unwrap()
}

/// The rights of the page's row that begins so.
fn rights(row: &str) -> Vec<&'static str> {
    let row = format!("| {row} |");
    let rights = section().lines().find_map(|line| line.strip_prefix(&row));
    let rights = rights.unwrap().trim_matches(['|', ' ', '`']);
    rights.split(' ').collect()
}

/// What was refused to this user: a command, a key or a channel. The name of a client's library, weir says without waiting for an answer.
fn refused(log: &Answer, user: &str) -> Vec<String> {
    let said = log.list().iter().map(|entry| format!("{entry:?}"));
    // CLIENT SETINFO; Redis 6.2 knows no such command of it, and names CLIENT.
    let names_client = |entry: &str| ["setinfo", r#"Text("client")"#].map(|it| entry.contains(it));
    said.filter(|entry| entry.contains(user) && names_client(entry) == [false; 2])
        .collect()
}

#[test]
fn a_user_of_redis_needs_no_rights_but_those_that_the_page_names() {
    let (redis, database, echo) = (Server::single(), Database::new(), Echo::start());
    let user = ["ACL", "SETUSER", "weir", "on", ">secret"];
    let rights = [rights("every weir"), rights("with `audit` and `postgres`")];
    redis.cli(&[&user[..], &rights.concat()].concat());
    let spool = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         redis: {{urls: '{}', username: weir, password: secret}}\n\
         upstreams: {{app: {{endpoints: 'http://{}', circuit_breaker: one, trust_session_headers: true}}}}\n\
         circuit_breakers: {{one: {{}}}}\nsessions: {{web: {{token: [{{bearer: true}}], max_per_user: 1}}}}\n\
         rate_limits:\n  bucket: {{limit: 100/s, by: path}}\n  sliding: {{limit: 100/s, by: path, algorithm: sliding_window, accuracy: strict}}\n\
         \x20 fixed: {{limit: [100/s, 1000/h], by: path, algorithm: fixed_window, accuracy: strict}}\n\
         \x20 slots: {{limit: 10, by: path, algorithm: concurrency, accuracy: strict}}\n\
         routes: [{{upstream: app, rate_limits: [bucket, sliding, fixed, slots], session: {{use: web, require: false}}}}]\n\
         audit: {{spool: {{path: {}}}}}\npostgres: {{write: '{}'}}\n\
         worker: {{claim_after: 1s, session_sweep: 1s, health: {{interval: 50ms, cache: 0s}}}}\n",
        redis.url(),
        echo.address,
        spool.path().display(),
        database.url(),
    ));
    let mut weir = Running::start(config.path());
    let mut admin = weir.admin();
    let json = ["Host: localhost", "Content-Type: application/json"];
    let mut ask = |method: &str, path: &str, body: &str, status: u16| {
        let reply = admin.send(method, path, &json, body);
        assert_eq!(reply.status, status, "{method} {path}: {reply:?}");
        serde_json::from_str::<serde_json::Value>(&reply.body).unwrap_or_default()
    };
    let mut client = weir.client();
    // The second ends the first.
    for _ in 0..2 {
        let session = ask("POST", "/v1/sessions", r#"{"user": "ann"}"#, 201);
        let token = session["token"].as_str().unwrap();
        let bearer = format!("Authorization: Bearer {token}");
        assert_eq!(client.send("GET", "/a", &[&bearer], "").status, 200);
    }
    assert_eq!(client.get("/login?user=bob").status, 200);
    let listed = ask("GET", "/v1/sessions", "", 200);
    assert_eq!(listed["sessions"].as_array().unwrap().len(), 2);
    ask("GET", "/v1/sessions?user=ann", "", 200);
    ask("DELETE", "/v1/sessions?user=ann", "", 200);
    for name in ["bucket", "sliding", "fixed", "slots"] {
        let limit = if name == "slots" { "5" } else { "50/s" };
        let one = format!("/v1/limits/{name}/overrides/%2Fa");
        ask("PUT", &one, &format!(r#"{{"limit": "{limit}"}}"#), 200);
        ask("GET", &format!("/v1/limits/{name}?key=%2Fa"), "", 200);
        ask("DELETE", &one, "", 204);
    }
    ask("DELETE", "/v1/limits/fixed?key=%2Fa", "", 204);
    for what in ["force-open", "force-closed", "reset"] {
        ask("POST", &format!("/v1/breakers/app/{what}"), "", 200);
    }
    eventually(|| database.one("SELECT count(*) FROM weir.audit_events") == "3");
    // What is no batch goes to the dead letters, where the commands look.
    redis.cli(&["XADD", "weir:a:{audit.0}", "*", "b", "damaged"]);
    let dead = ["XLEN", "weir:a:{audit.0}:dead"];
    eventually(|| redis.cli(&dead) == Answer::Int(1));
    let run = |words: &[&str]| {
        let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
        let output = weir.args(words).arg("-c").arg(config.path()).output();
        assert!(output.as_ref().unwrap().status.success(), "{output:?}");
    };
    run(&["audit", "dead-letters", "list"]);
    run(&["audit", "dead-letters", "replay", "--all"]);
    eventually(|| redis.cli(&dead) == Answer::Int(1));
    run(&["audit", "dead-letters", "drop", "--all"]);
    // By a sweep.
    eventually(|| weir.told("weir_session_users{sessions=\"web\"}") == Some(1.0));
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());

    let mut waits = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["worker", "--wait-for-deps", "-c"])
        .arg(config.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Log::of(&mut waits).until("working");
    signal(&waits, "TERM");
    assert!(waits.wait().unwrap().success());
    assert_eq!(refused(&redis.cli(&["ACL", "LOG"]), "weir"), [""; 0]);
}

#[test]
fn nor_does_a_user_of_a_cluster() {
    let [every, cluster] = ["every weir", "with a cluster"].map(rights);
    let both = [&every[..], &cluster].concat().join(" ");
    let shown = section().split("```").nth(1).unwrap();
    assert_eq!(
        shown.trim(),
        format!("text\nACL SETUSER weir on >PASSWORD {both}")
    );

    let (redis, echo) = (Cluster::shared(), Echo::start());
    let prefix = key_prefix();
    let both = both.replace("weir:", &format!("{prefix}:"));
    let rights: Vec<_> = both.split(' ').collect();
    for node in 0..6 {
        let user = ["ACL", "SETUSER", &prefix, "on", ">secret"];
        redis.cli(node, &[&user[..], &rights].concat());
    }
    let shares = redis.yaml(&prefix).replace(
        "redis: {",
        &format!("redis: {{timeout: 5s, username: '{prefix}', password: secret, "),
    );
    let weir = Running::start(
        file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstreams: {{app: {{endpoints: 'http://{}', circuit_breaker: one}}}}\n\
             circuit_breakers: {{one: {{}}}}\nsessions: {{web: {{token: [{{bearer: true}}]}}}}\nrate_limits: {{few: {{limit: 3/h, by: path, accuracy: strict}}}}\n\
             routes: [{{upstream: app, rate_limits: [few], session: {{use: web, require: false}}}}]\n{shares}",
            echo.address
        ))
        .path(),
    );
    let mut client = weir.client();
    for path in ["/a", "/b", "/c", "/d", "/e", "/f"] {
        let statuses = [(); 4].map(|()| client.get(path).status);
        assert_eq!(statuses, [200, 200, 200, 429], "{path}");
    }
    let alone = weir.told("weir_limit_alone{limit=\"few\"}");
    assert_eq!(alone, Some(0.0));
    let json = ["Host: localhost", "Content-Type: application/json"];
    let mut admin = weir.admin();
    for (method, path, body, status) in [
        ("POST", "/v1/sessions", r#"{"user": "ann"}"#, 201),
        ("GET", "/v1/sessions", "", 200),
        ("POST", "/v1/breakers/app/force-open", "", 200),
    ] {
        let reply = admin.send(method, path, &json, body);
        assert_eq!(reply.status, status, "{reply:?}");
    }
    // A slot on its way: what has moved is asked for by ASKING.
    let of_web = format!("{prefix}:s:web:*");
    let on_node = |node| redis.cli(node, &["KEYS", &of_web]).list().to_vec();
    let found: Vec<_> = (0..6).flat_map(on_node).collect();
    let slot = slot(found[0].text().as_bytes());
    let from = redis.master_of(slot);
    let mut slots = (0..SLOTS).step_by(1_000);
    let to = slots.find_map(|slot| Some(redis.master_of(slot)).filter(|to| *to != from));
    let to = to.unwrap();
    redis.open_slot(slot, to);
    redis.move_keys(slot, to, usize::MAX);
    let mut of_ann = || admin.send("GET", "/v1/sessions?user=ann", &json, "");
    let reply = of_ann();
    assert!(
        reply.status == 200 && reply.body.contains("ann"),
        "{reply:?}"
    );
    for node in 0..6 {
        let log = redis.cli(node, &["ACL", "LOG"]);
        assert_eq!(refused(&log, &prefix), [""; 0]);
    }
    redis.cli(to, &["ACL", "SETUSER", &prefix, "-asking"]);
    assert_ne!(of_ann().status, 200);
    let log = redis.cli(to, &["ACL", "LOG"]);
    assert!(refused(&log, &prefix)[0].contains("asking"), "{log:?}");
    redis.close_slot(slot, to);
}

#[test]
fn nor_does_a_user_of_another_database() {
    let (redis, echo) = (Server::single(), Echo::start());
    let user = ["ACL", "SETUSER", "weir", "on", ">secret"];
    let rights = [
        rights("every weir"),
        rights("with a database that is not 0"),
    ];
    redis.cli(&[&user[..], &rights.concat()].concat());
    let weir = Running::start(
        file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: http://{}\nsessions: {{web: {{token: [{{bearer: true}}]}}}}\n\
             redis: {{urls: '{}/1', username: weir, password: secret}}\n",
            echo.address,
            redis.url(),
        ))
        .path(),
    );
    let json = ["Host: localhost", "Content-Type: application/json"];
    let mut admin = weir.admin();
    let mut begin = || admin.send("POST", "/v1/sessions", &json, r#"{"user": "ann"}"#);
    eventually(|| begin().status == 201);
    let log = || refused(&redis.cli(&["ACL", "LOG"]), "weir");
    assert_eq!(log(), [""; 0]);
    // Without the right a new connection is good for nothing.
    redis.cli(&["ACL", "SETUSER", "weir", "-select"]);
    redis.cli(&["CLIENT", "KILL", "USER", "weir"]);
    eventually(|| log().iter().any(|entry| entry.contains("select")));
}
