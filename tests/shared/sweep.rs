//! The sweep of sessions in Redis: what is over goes, what lives is counted, and one process of all does it.

use std::time::{SystemTime, UNIX_EPOCH};

use super::harness::eventually;
use super::harness::process::{Running, file};
use super::harness::redis::{Cluster, Server, key_prefix};
use weir::keys::slot;

fn start(command: &str, redis: &str) -> Running {
    let config = file(&format!(
        "version: 1\nlisteners: [{{name: in, address: '127.0.0.1:0'}}]\nadmin: {{address: '127.0.0.1:0'}}\n\
         upstreams: {{app: {{endpoints: ['http://127.0.0.1:1']}}}}\nroutes: [{{upstream: app}}]\nruntime: {{lanes: 1}}\n\
         sessions: {{web: {{}}, 'a*b': {{}}}}\nworker: {{session_sweep: 50ms}}\n{redis}"
    ));
    Running::start_as(command, config.path(), &[])
}

fn live(weir: &Running, sessions: &str) -> Option<f64> {
    weir.told(&format!("weir_sessions_live{{sessions=\"{sessions}\"}}"))
}

/// A record as session_create.lua has it, of a session that began so long ago.
#[expect(clippy::disallowed_methods, reason = "Redis has the same clock")]
fn record(seconds_ago: u64, lives_seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let lives = lives_seconds * 1_000;
    format!(
        "{} {lives} 0 {lives}",
        now.as_millis() - u128::from(seconds_ago) * 1_000
    )
}

#[test]
fn sessions_that_are_over_go_and_those_that_live_are_counted() {
    let server = Server::single();
    let prefix = key_prefix();
    let (over, lives) = (record(100, 50), record(100, 5_000));
    let key = |name: &str, tag: &str| format!("{prefix}:s:{name}:{{{tag}}}");
    let (mixed, gone) = (
        key("web", "AAAAAAAAAAAAAAAA"),
        key("web", "BBBBBBBBBBBBBBBB"),
    );
    let other = key("a%2Ab", "AAAAAAAAAAAAAAAA");
    server.cli(&[
        "HSET", &mixed, "u", "ann", "one", &over, "two", &lives, "three", &over,
    ]);
    server.cli(&["HSET", &gone, "u", "bob", "one", &over]);
    server.cli(&["HSET", &other, "u", "ann", "one", &lives]);
    // More than one step goes over, of one user and of many.
    let many = key("web", "CCCCCCCCCCCCCCCC");
    for n in 0..1_000 {
        let record = if n % 2 == 0 { &over } else { &lives };
        server.cli(&["HSET", &many, "u", "eve", &n.to_string(), record]);
    }
    let weir = start("run", &server.yaml(&prefix));
    eventually(|| live(&weir, "web") == Some(501.0));
    assert_eq!(live(&weir, "a*b"), Some(1.0));
    assert_eq!(weir.told("weir_session_users{sessions=\"web\"}"), Some(2.0));
    assert_eq!(
        weir.told("weir_sessions_swept_total{sessions=\"web\"}"),
        Some(503.0)
    );
    assert_eq!(server.cli(&["HLEN", &mixed]).int(), 2);
    assert_eq!(server.cli(&["HLEN", &many]).int(), 501);
    assert_eq!(server.cli(&["EXISTS", &gone]).int(), 0);
}

#[test]
fn one_process_of_all_sweeps_and_another_takes_over() {
    let server = Server::single();
    let prefix = key_prefix();
    let key = format!("{prefix}:s:web:{{AAAAAAAAAAAAAAAA}}");
    server.cli(&["HSET", &key, "u", "ann", "one", &record(0, 5_000)]);
    let first = start("run", &server.yaml(&prefix));
    eventually(|| live(&first, "web") == Some(1.0));
    let second = start("run", &server.yaml(&prefix));
    let proxy = start("proxy", &server.yaml(&prefix));
    let lease = format!("{prefix}:s:{{sweep}}");
    let holder = server.cli(&["GET", &lease]);
    eventually(|| live(&second, "web") == Some(0.0));
    drop(first);
    eventually(|| live(&second, "web") == Some(1.0));
    assert_ne!(server.cli(&["GET", &lease]).text(), holder.text());
    assert_eq!(live(&proxy, "web"), None, "a proxy leaves it to others");
}

#[test]
fn a_sweep_goes_over_all_nodes() {
    let cluster = Cluster::start();
    let prefix = key_prefix();
    let weir = start("run", &cluster.yaml(&prefix));
    for n in 0..30 {
        let body = format!("{{\"sessions\": \"web\", \"user\": \"user{n}\"}}");
        let fields = ["Host: localhost", "Content-Type: application/json"];
        let created = weir.admin().send("POST", "/v1/sessions", &fields, &body);
        assert_eq!(created.status, 201, "{created:?}");
    }
    eventually(|| live(&weir, "web") == Some(30.0));
    assert_eq!(
        weir.told("weir_session_users{sessions=\"web\"}"),
        Some(30.0)
    );
    assert_eq!(weir.admin().get("/live").status, 200);
}

#[test]
fn a_node_that_is_down_keeps_no_other_from_being_swept() {
    let cluster = Cluster::start();
    let prefix = key_prefix();
    let weir = start("run", &cluster.yaml(&prefix));
    eventually(|| live(&weir, "web") == Some(0.0));
    // The sweep's own key is elsewhere.
    let sweeper = cluster.master_of(slot(b"sweep"));
    let mut nodes: Vec<_> = (0..3).filter(|node| *node != sweeper).collect();
    nodes.sort_by_key(|node| cluster.nodes[*node].url());
    let (dead, left) = (nodes[0], nodes[1]);
    // With what would take its place.
    let replica = cluster.replica_of(dead);
    cluster.kill(dead);
    cluster.kill(replica);
    let tag = |n: &u32| cluster.master_of(slot(format!("{n:016}").as_bytes())) == left;
    let tag = (0..).find(tag).unwrap();
    let key = format!("{prefix}:s:web:{{{tag:016}}}");
    let (over, lives) = (record(100, 50), record(100, 5_000));
    let left = &cluster.nodes[left];
    left.cli(&["HSET", &key, "u", "ann", "one", &over, "two", &lives]);
    eventually(|| left.cli(&["HLEN", &key]).int() == 2);
}

#[test]
fn an_entry_that_a_reload_brings_is_swept() {
    let server = Server::single();
    let prefix = key_prefix();
    let text = |sessions: &str| {
        format!(
            "version: 1\nlisteners: [{{name: in, address: '127.0.0.1:0'}}]\nadmin: {{address: '127.0.0.1:0'}}\n\
             upstreams: {{app: {{endpoints: ['http://127.0.0.1:1']}}}}\nroutes: [{{upstream: app}}]\n\
             sessions: {{{sessions}: {{}}}}\nworker: {{session_sweep: 50ms}}\n{}",
            server.yaml(&prefix)
        )
    };
    for name in ["web", "shop"] {
        let key = format!("{prefix}:s:{name}:{{AAAAAAAAAAAAAAAA}}");
        server.cli(&["HSET", &key, "u", "ann", "one", &record(0, 5_000)]);
    }
    let config = file(&text("web"));
    let weir = Running::start(config.path());
    eventually(|| live(&weir, "web") == Some(1.0));
    std::fs::write(config.path(), text("shop")).unwrap();
    weir.signal("HUP");
    eventually(|| live(&weir, "shop") == Some(1.0) && live(&weir, "web").is_none());
}

#[test]
fn an_entry_that_a_reload_removes_is_told_of_no_more() {
    let server = Server::single();
    let prefix = key_prefix();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.yaml");
    let write = |sessions: &str| {
        let text = format!(
            "listen: 127.0.0.1:0\nadmin: {{address: '127.0.0.1:0'}}\nupstream: http://127.0.0.1:1\nruntime: {{lanes: 1}}\n\
             sessions: {sessions}\nworker: {{session_sweep: 50ms}}\n{}",
            server.yaml(&prefix)
        );
        std::fs::write(&path, text).unwrap();
    };
    write("{web: {}, old: {}}");
    let weir = Running::start(&path);
    let users =
        |sessions: &str| weir.told(&format!("weir_session_users{{sessions=\"{sessions}\"}}"));
    eventually(|| live(&weir, "web").is_some() && live(&weir, "old").is_some());
    write("{web: {}}");
    weir.signal("HUP");
    eventually(|| live(&weir, "old").is_none() && users("old").is_none());
    assert_eq!((live(&weir, "web"), users("web")), (Some(0.0), Some(0.0)));
    // It may come back.
    write("{web: {}, old: {}}");
    weir.signal("HUP");
    eventually(|| live(&weir, "old").is_some());
}
