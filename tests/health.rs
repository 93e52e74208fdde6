//! What `/live`, `/ready` and `/health` say of a process while its stores come and go.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use harness::postgres;
use harness::process::{Running, file};
use harness::redis::{Server, key_prefix};
use harness::sqlite::DAY;
use harness::{Client, Reply, eventually, eventually_within};
use serde_json::Value;
use weir::clock;
use weir::store::sqlite::Writer;

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
        let latency = check["latency_seconds"].as_f64().unwrap();
        assert!((0.0..5.0).contains(&latency), "{health}");
    }
    assert_eq!(health["checks"]["lanes"]["status"], "ok");
    assert_eq!(health["checks"]["tasks"]["status"], "ok");
    assert!(health["checks"]["disk"]["disks"][0]["free_bytes"].is_u64());
    assert!(health["checks"]["memory"]["resident_bytes"].as_u64() > Some(1 << 20));
    assert_eq!(health["stale"], false);
    // The alert goes by metrics.
    eventually(|| weir.metric("weir_audit_disk_bytes") > 0);
    let all = health["checks"]["disk"]["disks"][0]["total_bytes"].as_u64();
    assert_eq!(Some(weir.metric("weir_audit_disk_bytes")), all);
    assert!((1..=all.unwrap()).contains(&weir.metric("weir_audit_disk_free_bytes")));
}

#[test]
fn files_of_the_audit_that_need_a_human_are_told_with_the_mend() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    drop(Writer::open(&path, "a", None, clock::wall() + DAY * 9).unwrap());
    let weir = proxy(&format!(
        "worker: {{health: {{cache: 0s}}}}\naudit: {{sqlite: {{path: {}}}}}\n",
        path.display()
    ));
    eventually(|| {
        let (_, health) = get(&weir, "/health");
        let audit = &health["checks"]["audit"];
        let said = audit["ahead"].as_str().unwrap_or_default();
        audit["status"] == "degraded"
            && said.contains("move all files of the audit to another folder")
    });
}

#[test]
fn a_spool_that_could_not_be_used_is_told_with_the_mend() {
    let in_the_way = tempfile::NamedTempFile::new().unwrap();
    let weir = proxy(&format!(
        "redis: {{urls: 'redis://127.0.0.1:1'}}\naudit: {{spool: {{path: '{}'}}}}\n\
         postgres: {{write: 'postgres://weir@127.0.0.1:1/weir?sslmode=disable'}}\n",
        in_the_way.path().display()
    ));
    let (_, health) = get(&weir, "/health");
    let spool = &health["checks"]["spool"];
    assert_eq!(spool["status"], "degraded", "{health}");
    let said = spool["error"].as_str().unwrap();
    assert!(said.contains("could not be used at the start"), "{said}");
    assert!(said.contains("restart weir"), "{said}");
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

#[test]
fn a_redis_that_refuses_calls_is_told_with_what_it_says() {
    let server = Server::single();
    let weir = proxy(&format!(
        "worker: {{health: {{cache: 0s}}}}\nrate_limit: 9/s by path\n{}",
        server.yaml(&key_prefix())
    ));
    let redis = || get(&weir, "/health").1["checks"]["redis_main"].clone();
    eventually(|| redis()["status"] == "ok");
    // It answers each ping.
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    eventually(|| {
        weir.client().get("/");
        let redis = redis();
        let said = redis["error"].as_str().unwrap_or_default();
        redis["status"] == "degraded" && redis["nodes"][0]["up"] == true && said.contains("OOM")
    });
    assert!(weir.log_until("redis refuses calls").contains("OOM"));
    // Another reason, soon after.
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    server.cli(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
    eventually(|| {
        weir.client().get("/");
        let said = redis()["error"].clone();
        said.as_str()
            .is_some_and(|said| said.contains("NOREPLICAS"))
    });
    assert!(weir.log_until("redis refuses calls").contains("NOREPLICAS"));
}

/// A worker that looks often, with these keys of `health`.
fn worker(redis: &Server, postgres: &postgres::Server, health: &str) -> Running {
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {{address: 127.0.0.1:0}}\naudit: {{}}\n\
         postgres: {{write: '{}', pool: {{timeout: 500ms}}}}\nworker: {{health: {{{health}}}}}\n{}",
        postgres.url(),
        redis.yaml(&key_prefix())
    ));
    Running::start_as("worker", config.path(), &[])
}

#[test]
fn a_worker_is_ready_while_its_stores_answer() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    let worker = worker(
        &redis,
        &postgres,
        "interval: 50ms, timeout: 300ms, cache: 0s",
    );
    let ready = || eventually(|| get(&worker, "/ready").0 == 200);
    let waits_for = |store: &str| {
        eventually(|| {
            let (status, said) = get(&worker, "/ready");
            status == 503 && said["waits_for"] == serde_json::json!([store])
        });
        let (status, health) = get(&worker, "/health");
        assert_eq!((status, &health["status"]), (503, &"critical".into()));
        assert_eq!(health["checks"][store]["status"], "critical", "{health}");
        // It waits for the store, and a restart would mend nothing.
        assert_eq!(get(&worker, "/live").0, 200);
    };
    ready();
    eventually(|| get(&worker, "/health").1["checks"]["audit_lag"]["status"] == "ok");
    postgres.pause();
    waits_for("postgres_write");
    postgres.resume();
    ready();
    postgres.stop();
    waits_for("postgres_write");
    postgres.restart();
    ready();
    redis.pause();
    waits_for("redis_main");
    redis.resume();
    ready();
    redis.kill();
    waits_for("redis_main");
    redis.restart();
    ready();
}

/// Servers that hold a part of the state each: what goes without one is worse, and nothing else is.
#[test]
fn a_store_that_is_away_is_told_by_its_own_check_alone() {
    let [main, limits, sessions] = [Server::single(), Server::single(), Server::single()];
    let primary = postgres::Server::start();
    let replica = primary.replica();
    let spool = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         redis: {{urls: '{}', rate_limit: {{urls: '{}'}}, sessions: {{urls: '{}'}}}}\n\
         audit: {{spool: {{path: {}}}}}\n\
         postgres: {{write: '{}', read: ['{}'], pool: {{timeout: 500ms}}}}\n\
         worker: {{health: {{interval: 1s, cache: 0s}}}}\n",
        main.url(),
        limits.url(),
        sessions.url(),
        spool.path().display(),
        primary.url(),
        replica.url(),
    ));
    let weir = Running::start(config.path());
    let worse = || -> BTreeMap<String, Value> {
        let (_, health) = get(&weir, "/health");
        let checks = health["checks"].as_object().unwrap().clone().into_iter();
        checks
            .map(|(name, check)| (name, check["status"].clone()))
            // The machine's own.
            .filter(|(name, status)| status != "ok" && !["disk", "memory"].contains(&&**name))
            .collect()
    };
    let all_well = || eventually(|| worse().is_empty());
    let is_alone = |check: &str| {
        let expected = BTreeMap::from([(check.to_owned(), "degraded".into())]);
        eventually(|| worse() == expected);
        assert_eq!(get(&weir, "/health").0, 200);
    };
    all_well();
    for (server, check) in [(&limits, "redis_rate_limit"), (&sessions, "redis_sessions")] {
        server.kill();
        is_alone(check);
        server.restart();
        all_well();
    }
    replica.kill();
    is_alone("postgres_read");
    replica.restart();
    all_well();
}

#[test]
fn while_one_look_is_under_way_others_get_the_stale_answer() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    let worker = worker(&redis, &postgres, "interval: 1h, timeout: 2s, cache: 300ms");
    let admin = worker.admin.clone();
    let health = || -> Value {
        let said = Client::to(&admin).get("/health").body;
        serde_json::from_str(&said).unwrap()
    };
    eventually(|| health()["checks"]["postgres_write"]["status"] == "ok");
    postgres.pause();
    // Whoever comes first waits for the servers that hang.
    let looked = std::thread::scope(|scope| {
        let asks: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut answers = Vec::new();
                    eventually(|| {
                        answers.push(health());
                        answers.last().unwrap()["checks"]["postgres_write"]["status"] == "critical"
                    });
                    answers
                })
            })
            .collect();
        asks.into_iter()
            .flat_map(|ask| ask.join().unwrap())
            .collect::<Vec<_>>()
    });
    let stale = looked.iter().filter(|answer| answer["stale"] == true);
    let age = |answer: &Value| answer["age_seconds"].as_f64().unwrap();
    assert!(stale.clone().count() > 8, "{looked:#?}");
    assert!(stale.clone().all(|answer| age(answer) >= 0.3));
    assert!(stale.clone().any(|answer| age(answer) >= 1.0));
    // What is stale is what was there before.
    assert!(
        stale
            .clone()
            .any(|answer| answer["checks"]["postgres_write"]["status"] == "ok")
    );
}

/// A process with every task: those of a proxy with shared state, of a worker, or of both.
fn with_every_task(command: &str, redis: &Server, postgres: &postgres::Server) -> Running {
    let spool = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "version: 1\nlisteners: [{{name: inbound, address: '127.0.0.1:0'}}]\n\
         upstreams: {{app: {{endpoints: ['http://127.0.0.1:1'], circuit_breaker: standard}}}}\n\
         circuit_breakers: {{standard: {{window: {{type: time, size: 10s}}, minimum_calls: 20, failure_rate: 50%}}}}\n\
         rate_limits: {{few: {{limit: 3, algorithm: concurrency, by: path, accuracy: strict}}}}\nsessions: {{web: {{}}}}\n\
         routes: [{{upstream: app, rate_limits: [few]}}]\n\
         admin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         audit: {{spool: {{path: {}}}}}\n\
         postgres: {{write: '{url}', read: ['{url}'], pool: {{timeout: 500ms}}}}\n\
         worker: {{session_sweep: 1s, health: {{interval: 1s, cache: 0s}}}}\n{}",
        spool.path().display(),
        redis.yaml(&key_prefix()),
        url = postgres.url(),
    ));
    Running::start_as(command, config.path(), &[])
}

/// Each task with its silence and its bound, in seconds.
fn tasks(weir: &Running) -> Vec<(String, f64, f64)> {
    let (_, health) = get(weir, "/health");
    let each = health["checks"]["tasks"]["each"].as_object().unwrap();
    let seconds = |task: &Value, key: &str| task[key].as_f64().unwrap();
    each.iter()
        .map(|(name, task)| {
            let silent = seconds(task, "silent_seconds");
            (name.clone(), silent, seconds(task, "bound_seconds"))
        })
        .collect()
}

const PAGE: &str = include_str!("../docs/health.md");

/// What runs in `weir proxy`, and what in `weir worker`; in `weir run` runs all of it but a worker's look at its stores.
const OF_PROXY: [&str; 8] = [
    "breakers",
    "endpoints",
    "overrides",
    "query_replicas",
    "session_ends",
    "session_sweep",
    "session_uses",
    "slots",
];
const OF_WORKER: [&str; 6] = [
    "ingest",
    "partitions",
    "query_replicas",
    "readiness",
    "replicas",
    "shared_session_sweep",
];

#[test]
fn every_task_has_a_bound_on_its_silence() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    let all: BTreeSet<_> = OF_PROXY.into_iter().chain(OF_WORKER).collect();
    let of_run = all.into_iter().filter(|name| *name != "readiness");
    let expected = [
        ("proxy", OF_PROXY.to_vec()),
        ("worker", OF_WORKER.to_vec()),
        ("run", of_run.collect()),
    ];
    for (command, names) in expected {
        let weir = with_every_task(command, &redis, &postgres);
        let tasks = tasks(&weir);
        let found: Vec<_> = tasks.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(found, names, "{command}");
        for (name, _, bound) in &tasks {
            let bounds = if name == "partitions" {
                180.0..=300.0
            } else {
                1.0..=120.0
            };
            assert!(bounds.contains(bound), "{name}: {bound}");
            let told = PAGE
                .lines()
                .find_map(|line| line.strip_prefix(&format!("| `{name}` |")))
                .and_then(|row| row.trim_end_matches(" |").rsplit(" | ").next());
            // By the file of `with_every_task`.
            let told = match told.unwrap_or_else(|| panic!("{name} is not on the page")) {
                "183 s and 8 times `postgres.pool.timeout`" => "187 s",
                "2 × (`worker.health.interval` + `worker.health.timeout`)" => "4 s",
                told => told,
            };
            let is_bound = |part: &str| part.split(" for ").next() == Some(&format!("{bound} s"));
            assert!(told.split("; ").any(is_bound), "{name}: {bound}, {told}");
        }
    }
}

/// How a task goes on is the same however long its stores are away, so it is enough that each beats anew meanwhile. Two look once in
/// half a minute and more; tests/audit/postgres.rs has that of the days look more often.
#[test]
#[expect(clippy::disallowed_methods, reason = "what is measured")]
fn every_task_goes_on_while_redis_and_postgres_hang_or_are_gone() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    let weir = ["proxy", "worker"].map(|command| with_every_task(command, &redis, &postgres));
    let beats_anew = |since: Instant| {
        eventually_within(Duration::from_secs(60), || {
            let all = weir.each_ref().map(|weir| {
                assert_eq!(get(weir, "/live").0, 200);
                // What was under way when they left is over.
                let away = since.elapsed().as_secs_f64() - 3.0;
                let mut tasks = tasks(weir).into_iter();
                tasks.all(|(name, silent, _)| {
                    silent < away || ["partitions", "overrides"].contains(&&*name)
                })
            });
            all == [true, true]
        });
    };
    redis.pause();
    postgres.pause();
    beats_anew(Instant::now());
    redis.resume();
    postgres.resume();
    redis.kill();
    postgres.stop();
    beats_anew(Instant::now());
}
