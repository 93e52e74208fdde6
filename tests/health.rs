//! What `/live`, `/ready` and `/health` say of a process while its stores come and go.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use harness::process::{Running, file};
use harness::redis::{Server, key_prefix};
use harness::{Reply, eventually};
use serde_json::Value;

/// A proxy whose checks are made anew for each call.
fn proxy(more: &str) -> Running {
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n{more}"
    ));
    Running::start(config.path())
}

fn get(weir: &Running, path: &str) -> (u16, Value) {
    let Reply { status, body, .. } = weir.admin().get(path);
    (status, serde_json::from_str(&body).unwrap())
}

#[test]
fn every_check_tells_its_status_and_what_it_took() {
    let folder = tempfile::tempdir().unwrap();
    let weir = proxy(&format!(
        "audit: {{sqlite: {{path: {}}}}}\n",
        folder.path().join("a.db").display()
    ));
    let (_, health) = get(&weir, "/health");
    for check in ["memory", "audit", "disk"] {
        let check = &health["checks"][check];
        assert!(check["status"].is_string(), "{health}");
        assert!(check["latency_seconds"].as_f64() < Some(5.0), "{health}");
    }
    assert_eq!(health["checks"]["lanes"]["status"], "ok");
    assert_eq!(health["checks"]["tasks"]["status"], "ok");
    assert!(health["checks"]["disk"]["disks"][0]["free_bytes"].is_u64());
    assert!(health["checks"]["memory"]["resident_bytes"].as_u64() > Some(1 << 20));
    assert_eq!(health["stale"], false);
}

#[test]
fn an_answer_serves_for_the_time_of_the_cache() {
    let weir = proxy("worker: {health: {cache: 1h}}\n");
    let age = || get(&weir, "/health").1["age_seconds"].as_f64().unwrap();
    age();
    eventually(|| age() > 0.2);
}

#[test]
fn a_proxy_whose_redis_is_gone_is_degraded_and_ready() {
    let server = Server::single();
    let weir = proxy(&format!(
        "worker: {{health: {{cache: 0s}}}}\nrate_limits: {{a: {{limit: 1/s, by: path, on_redis_loss: deny}}}}\n{}",
        server.yaml(&key_prefix())
    ));
    let redis = || get(&weir, "/health").1["checks"]["redis_main"]["status"].clone();
    let degraded_and_ready = || {
        eventually(|| redis() == "degraded");
        let (status, health) = get(&weir, "/health");
        assert_eq!((status, &health["status"]), (200, &"degraded".into()));
        assert_eq!(get(&weir, "/ready").0, 200);
        assert_eq!(get(&weir, "/live").0, 200);
    };
    eventually(|| redis() == "ok");
    server.kill();
    degraded_and_ready();
    server.restart();
    eventually(|| redis() == "ok");
    // One that takes connections and says nothing.
    server.pause();
    degraded_and_ready();
    server.resume();
    eventually(|| redis() == "ok");
}
