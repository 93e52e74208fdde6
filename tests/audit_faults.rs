//! The audit from the proxy to Postgres under load, while what it goes through dies, hangs, forgets or fills up: at the end each
//! request that was answered is on record once, no number is missing, and `weir audit verify` says so.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test counts is printed"
)]

mod harness;

use std::thread;
use std::time::Duration;

use harness::load::Load;
use harness::postgres::{Database, Server, try_query};
use harness::stack::{
    BEST_EFFORT, CLAIMED, FAILED, GUARANTEED, KNOWN, RESENT, Redis, STORED, STORED_EVENTS, Stack,
    WRITTEN, With, fill,
};
use harness::{eventually, eventually_within};
use serde_json::Value;
use weir::clock;

/// Transactions take so long that most kills hit one.
const SLOWLY: &str = "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN PERFORM pg_sleep(0.04); RETURN NULL; END $$;
     CREATE TRIGGER dawdle AFTER INSERT ON weir.audit_batches EXECUTE FUNCTION dawdle();
     CREATE TRIGGER dawdle AFTER INSERT ON weir.audit_events EXECUTE FUNCTION dawdle()";
/// The first look after the days is over.
const DAYS_ARE_KEPT: &str = "SELECT NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory')
     AND 4 <= (SELECT count(*) FROM pg_class WHERE relname ~ '^audit_events_[0-9_]+$')";
/// How long an outage is.
const MINUTE: Duration = Duration::from_secs(60);
/// Between two requests of a client: as much load as a busy machine takes beside the servers,
const PAUSE: Duration = Duration::from_millis(3);
/// and for a minute.
const CALM: Duration = Duration::from_millis(15);

/// Waits for as long as an outage is, and until some thousand requests were answered in it; none may be refused.
fn sit_out(load: &Load) {
    let before = load.answered();
    thread::sleep(MINUTE);
    eventually_within(STORED, || load.answered() > before + 1_000);
    assert_eq!(load.refused(), 0);
}

#[test]
fn a_minute_without_postgres_loses_nothing() {
    let server = Server::start();
    let mut stack = Stack::new(Redis::single(), server.url(), GUARANTEED);
    let (proxy, worker) = (stack.proxy(), stack.worker());
    let load = Load::start(&proxy, "c", 2, CALM);
    load.until_answered(100);
    server.stop();
    sit_out(&load);
    server.restart();
    // Once more, by force, and in the middle of catching up.
    eventually_within(STORED, || worker.metric(FAILED) > 0);
    server.kill();
    server.restart();
    load.until_answered(100);
    stack.note(load);
    stack.finish(proxy, worker);
    assert!(stack.counted(FAILED) > 0);
}

/// Nor does it leave more at the server than there are loops: each waits for its own commit.
#[test]
fn a_minute_without_its_standby_loses_nothing() {
    let server = Server::start();
    let standby = server.replica();
    server.commit_by_its_replica();
    let mut stack = Stack::new(Redis::single(), server.url(), GUARANTEED);
    let (proxy, worker, other) = (stack.proxy(), stack.worker(), stack.worker());
    let load = Load::start(&proxy, "c", 2, CALM);
    load.until_answered(100);
    eventually(|| worker.metric(STORED_EVENTS) + other.metric(STORED_EVENTS) > 0);
    eventually(|| server.one(DAYS_ARE_KEPT) == "t");
    standby.stop();
    sit_out(&load);
    let loops = 2 * thread::available_parallelism().unwrap().get();
    let waiting = server.waiting_commits();
    assert!((1..=loops).contains(&waiting.len()), "{waiting:?}");
    standby.restart();
    load.until_answered(100);
    stack.note(load);
    stack.count(&other);
    drop(other);
    stack.finish(proxy, worker);
}

#[test]
fn a_minute_without_redis_loses_nothing() {
    let mut stack = Stack::new(Redis::single(), Database::new().url(), GUARANTEED);
    let (proxy, worker) = (stack.proxy(), stack.worker());
    let load = Load::start(&proxy, "c", 2, CALM);
    load.until_answered(100);
    stack.redis.server().kill();
    sit_out(&load);
    stack.redis.server().restart();
    load.until_answered(100);
    stack.note(load);
    stack.finish(proxy, worker);
}

#[test]
fn a_worker_killed_twenty_times_stores_each_event_once() {
    for with in [GUARANTEED, BEST_EFFORT] {
        let mut stack = Stack::new(Redis::single(), Database::new().url(), with);
        let (proxy, mut worker) = (stack.proxy(), stack.worker());
        stack.query(SLOWLY);
        let load = Load::start(&proxy, "c", 4, PAUSE);
        for round in 0..20 {
            // It is at work by then, however long its start takes.
            let rows = stack.rows();
            eventually_within(STORED, || stack.rows() > rows);
            thread::sleep(Duration::from_millis(fastrand::u64(50..300)));
            // Every other time Redis does not hear any more what is committed: what the worker has in hand, unless that is nothing.
            let deaf = round % 2 == 1;
            if deaf {
                stack.redis.server().pause();
                let (start, rows) = (clock::now(), stack.rows());
                while stack.rows() == rows && start.elapsed() < Duration::from_secs(1) {
                    thread::sleep(Duration::from_millis(fastrand::u64(5..15)));
                }
            }
            stack.count(&worker);
            worker.kill();
            if deaf {
                stack.redis.server().resume();
            }
            worker = stack.worker();
        }
        // It may meet a worker's locks in another order.
        eventually(|| try_query(&stack.database, "DROP FUNCTION dawdle() CASCADE").is_ok());
        load.until_answered(100);
        stack.note(load);
        stack.finish(proxy, worker);
        assert_eq!(stack.counted(WRITTEN), stack.rows());
        assert!(stack.counted(CLAIMED) > 0 && stack.counted(KNOWN) > 0);
    }
}

#[test]
fn a_read_only_postgres_is_waited_for() {
    let server = Server::start();
    let mut stack = Stack::new(Redis::single(), server.url(), GUARANTEED);
    let (proxy, worker) = (stack.proxy(), stack.worker());
    let load = Load::start(&proxy, "c", 3, PAUSE);
    load.until_answered(100);
    server.set_read_only(true);
    let failed = worker.metric(FAILED);
    eventually_within(STORED, || worker.metric(FAILED) > failed + 2);
    // New connections too.
    server.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
    );
    let (failed, rows) = (worker.metric(FAILED), stack.rows());
    eventually_within(STORED, || worker.metric(FAILED) > failed + 2);
    load.until_answered(100);
    assert_eq!(stack.rows(), rows);
    assert_eq!(load.refused(), 0);
    server.set_read_only(false);
    load.until_answered(100);
    stack.note(load);
    stack.finish(proxy, worker);
}

#[test]
fn a_failover_of_a_stream_loses_nothing() {
    for with in [GUARANTEED, BEST_EFFORT] {
        let mut stack = Stack::new(Redis::cluster(), Database::new().url(), with);
        let (proxy, worker) = (stack.proxy(), stack.worker());
        let load = Load::start(&proxy, "c", 3, PAUSE);
        load.until_answered(200);
        let master = stack.master_of(0);
        stack.redis.nodes().kill(master);
        stack.redis.nodes().wait_until_whole();
        load.until_answered(200);
        assert_eq!(load.refused(), 0);
        stack.note(load);
        stack.finish(proxy, worker);
        assert_eq!(stack.counted(WRITTEN), stack.rows());
    }
}

#[test]
fn what_a_stale_replica_lacks_is_sent_again() {
    let mut stack = Stack::new(Redis::cluster(), Database::new().url(), GUARANTEED);
    let (proxy, mut worker) = (stack.proxy(), stack.worker());
    let load = Load::start(&proxy, "c", 3, PAUSE);
    load.until_answered(100);
    let nodes = stack.redis.nodes();
    let master = stack.master_of(0);
    let replica = nodes.replica_of(master);
    // From here on it learns nothing: neither what is stored and gone,
    nodes.pause(replica);
    nodes.cli(master, &["CLIENT", "KILL", "TYPE", "replica"]);
    load.until_answered(300);
    stack.count(&worker);
    assert!(worker.end().success());
    // nor what is added and acknowledged.
    load.until_answered(300);
    nodes.kill(master);
    nodes.resume(replica);
    eventually_within(STORED, || {
        let taken = nodes.nodes[replica].try_cli(&["CLUSTER", "FAILOVER", "TAKEOVER"]);
        taken.is_ok() || stack.master_of(0) == replica
    });
    nodes.wait_until_whole();
    assert_eq!(stack.master_of(0), replica);
    let worker = stack.worker();
    load.until_answered(200);
    assert_eq!(load.refused(), 0);
    stack.note(load);
    stack.finish(proxy, worker);
    assert!(stack.counted(RESENT) > 0);
}

#[test]
fn a_redis_that_begins_empty_is_sent_all_again() {
    for with in [GUARANTEED, BEST_EFFORT] {
        let mut stack = Stack::new(Redis::single(), Database::new().url(), with);
        let (proxy, worker) = (stack.proxy(), stack.worker());
        let load = Load::start(&proxy, "c", 3, PAUSE);
        for _ in 0..3 {
            load.until_answered(200);
            stack.redis.server().kill();
            load.until_answered(50);
            stack.redis.server().restart();
        }
        load.until_answered(200);
        // Once more, with what no worker has read.
        stack.count(&worker);
        drop(worker);
        load.until_answered(200);
        eventually_within(STORED, || {
            stack.waiting().is_some_and(|waiting| waiting > 0)
        });
        stack.redis.server().kill();
        stack.redis.server().restart();
        let worker = stack.worker();
        load.until_answered(100);
        assert_eq!(load.refused(), 0);
        stack.note(load);
        stack.finish(proxy, worker);
        assert!(stack.counted(RESENT) > 0);
        assert_eq!(stack.counted(WRITTEN), stack.rows());
    }
}

#[test]
fn a_killed_proxy_loses_only_what_was_not_answered() {
    let mut stack = Stack::new(Redis::single(), Database::new().url(), GUARANTEED);
    let (mut proxy, worker) = (stack.proxy(), stack.worker());
    let load = Load::start(&proxy, "c", 4, PAUSE);
    for round in 0..5 {
        load.until_answered(100);
        if round % 2 == 1 {
            // So that there is something to adopt.
            stack.redis.server().pause();
            load.until_answered(50);
        }
        stack.count(&proxy);
        proxy.kill();
        stack.redis.server().resume();
        proxy = stack.proxy();
        load.turn_to(&proxy);
    }
    load.until_answered(100);
    stack.note(load);
    stack.finish(proxy, worker);
}

#[test]
fn a_full_disk_leaves_events_to_redis_and_else_refuses() {
    let with = With {
        mount: Some("mount -t tmpfs -o size=2m tmpfs \"$SPOOL\""),
        ..GUARANTEED
    };
    let mut stack = Stack::new(Redis::single(), Database::new().url(), with);
    let (proxy, mut worker) = (stack.proxy(), stack.worker());
    let load = Load::start(&proxy, "c", 3, PAUSE);
    load.until_answered(100);
    let filler = proxy.sees(&stack.spool()).join("filler");
    // Segments that are done with make room.
    let full_until = |yes: &dyn Fn() -> bool| {
        eventually_within(STORED, || {
            fill(&filler);
            yes()
        });
    };
    let answered = || {
        let enough = load.answered() + 100;
        let load = &load;
        move || load.answered() >= enough
    };
    let refused = || {
        let enough = load.refused() + 20;
        let load = &load;
        move || load.refused() >= enough
    };
    fill(&filler);
    full_until(&|| proxy.metric("weir_audit_events_total{result=\"failed_write\"}") > 0);
    // For seconds: Redis takes what the disk does not.
    (0..5).for_each(|_| full_until(&answered()));
    let health: Value = serde_json::from_str(&proxy.admin().get("/health").body).unwrap();
    let spool = &health["checks"]["spool"];
    assert_eq!(spool["refuses"], false, "{health}");
    assert_ne!(spool["status"], "critical", "{health}");
    assert_eq!(load.refused(), 0);
    stack.redis.server().kill();
    full_until(&refused());
    full_until(&|| proxy.metric("weir_audit_refuses") == 1);
    stack.redis.server().restart();
    full_until(&answered());
    full_until(&|| proxy.metric("weir_audit_refuses") == 0);
    stack.redis.server().kill();
    full_until(&refused());
    std::fs::remove_file(&filler).unwrap();
    load.until_answered(100);
    stack.redis.server().restart();
    load.until_answered(100);
    // What Redis alone has it loses when nobody asks any more.
    stack.count(&worker);
    assert!(worker.end().success());
    full_until(&answered());
    stack.note(load);
    std::fs::remove_file(&filler).unwrap();
    stack.redis.server().kill();
    stack.redis.server().restart();
    let worker = stack.worker();
    stack.finish(proxy, worker);
    assert!(stack.counted(RESENT) > 0);
}

#[test]
fn a_full_disk_of_postgres_is_waited_for() {
    let server = Server::with_small_disk("48m");
    server.query("CREATE DATABASE audit TABLESPACE small");
    let mut stack = Stack::new(Redis::single(), server.url_of("audit"), GUARANTEED);
    let (proxy, worker) = (stack.proxy(), stack.worker());
    let load = Load::start(&proxy, "c", 3, PAUSE);
    load.until_answered(100);
    let filler = server.small_disk().join("filler");
    fill(&filler);
    eventually_within(STORED, || worker.metric(FAILED) > 3);
    load.until_answered(100);
    assert_eq!(load.refused(), 0);
    std::fs::remove_file(&filler).unwrap();
    load.until_answered(100);
    stack.note(load);
    stack.finish(proxy, worker);
}

#[test]
fn two_workers_share_the_streams_and_outlive_each_other() {
    let mut stack = Stack::new(Redis::single(), Database::new().url(), GUARANTEED);
    let proxy = stack.proxy();
    let mut workers = [stack.worker(), stack.worker()];
    let load = Load::start(&proxy, "a", 3, PAUSE);
    load.until_answered(1_000);
    stack.note(load);
    proxy.until_stored();
    let stored = workers
        .each_ref()
        .map(|worker| worker.metric(STORED_EVENTS));
    assert_eq!(stored[0] + stored[1], stack.rows());
    assert!(stored[0] > 0 && stored[1] > 0, "{stored:?}");
    println!("{stored:?} stored by each");
    let load = Load::start(&proxy, "b", 3, PAUSE);
    load.until_answered(200);
    workers[0].kill();
    load.until_answered(200);
    stack.note(load);
    let [_, worker] = workers;
    stack.finish(proxy, worker);
}

#[test]
fn all_end_in_order_under_load() {
    for with in [GUARANTEED, BEST_EFFORT] {
        let mut stack = Stack::new(Redis::single(), Database::new().url(), with);
        let (mut proxy, mut worker) = (stack.proxy(), stack.worker());
        let load = Load::start(&proxy, "c", 3, PAUSE);
        for worker_first in [true, false] {
            load.until_answered(200);
            stack.count(&worker);
            if worker_first {
                // What no worker takes waits for the next proxy.
                assert!(worker.end().success());
                load.until_answered(100);
            }
            stack.count(&proxy);
            assert!(proxy.end().success());
            if !worker_first {
                assert!(worker.end().success());
            }
            (proxy, worker) = (stack.proxy(), stack.worker());
            load.turn_to(&proxy);
        }
        load.until_answered(100);
        stack.note(load);
        stack.finish(proxy, worker);
    }
}

#[test]
fn all_killed_at_once_lose_nothing() {
    let server = Server::start();
    let mut stack = Stack::new(Redis::single(), server.url(), GUARANTEED);
    let (mut proxy, mut worker) = (stack.proxy(), stack.worker());
    let load = Load::start(&proxy, "c", 3, PAUSE);
    for _ in 0..3 {
        load.until_answered(150);
        stack.count(&proxy);
        stack.count(&worker);
        stack.redis.server().kill();
        worker.kill();
        proxy.kill();
        server.kill();
        server.restart();
        stack.redis.server().restart();
        (proxy, worker) = (stack.proxy(), stack.worker());
        load.turn_to(&proxy);
    }
    load.until_answered(100);
    stack.note(load);
    stack.finish(proxy, worker);
}

/// What may happen at any time.
#[derive(Debug)]
enum Mishap {
    ProxyKilled,
    ProxyEnded,
    WorkerKilled,
    WorkerEnded,
    PostgresKilled,
    PostgresHangs,
    RedisKilled,
    RedisHangs,
}

#[test]
fn two_proxies_and_two_workers_lose_nothing_whatever_happens() {
    let server = Server::start();
    let mut stack = Stack::new(Redis::single(), server.url(), GUARANTEED);
    // The proxies share a spool too: what one leaves the other takes over.
    let mut proxies = [stack.proxy(), stack.proxy()];
    let mut workers = [stack.worker(), stack.worker()];
    let loads = [("a", &proxies[0]), ("b", &proxies[1])]
        .map(|(names, proxy)| Load::start(proxy, names, 2, PAUSE));
    let redis = stack.redis.server();
    let mut mishaps = [
        Mishap::ProxyKilled,
        Mishap::ProxyEnded,
        Mishap::WorkerKilled,
        Mishap::WorkerEnded,
        Mishap::PostgresKilled,
        Mishap::PostgresHangs,
        Mishap::RedisKilled,
        Mishap::RedisHangs,
    ];
    fastrand::shuffle(&mut mishaps);
    println!("{mishaps:?}");
    for mishap in &mishaps {
        thread::sleep(Duration::from_millis(fastrand::u64(0..300)));
        let n = fastrand::usize(..2);
        let a_while = Duration::from_millis(fastrand::u64(0..1_500));
        match mishap {
            Mishap::ProxyKilled => {
                stack.count(&proxies[n]);
                proxies[n].kill();
                proxies[n] = stack.proxy();
                loads[n].turn_to(&proxies[n]);
            }
            Mishap::ProxyEnded => {
                stack.count(&proxies[n]);
                assert!(proxies[n].end().success());
                proxies[n] = stack.proxy();
                loads[n].turn_to(&proxies[n]);
            }
            Mishap::WorkerKilled => {
                stack.count(&workers[n]);
                workers[n].kill();
                workers[n] = stack.worker();
            }
            Mishap::WorkerEnded => {
                stack.count(&workers[n]);
                assert!(workers[n].end().success());
                workers[n] = stack.worker();
            }
            Mishap::PostgresKilled => {
                server.kill();
                thread::sleep(a_while);
                server.restart();
            }
            Mishap::PostgresHangs => {
                server.pause();
                thread::sleep(a_while);
                server.resume();
            }
            Mishap::RedisKilled => {
                redis.kill();
                thread::sleep(a_while);
                redis.restart();
            }
            Mishap::RedisHangs => {
                redis.pause();
                thread::sleep(a_while);
                redis.resume();
            }
        }
    }
    for load in loads {
        stack.note(load);
    }
    let ([proxy, other], [worker, mut second]) = (proxies, workers);
    stack.end_proxy(other);
    stack.count(&second);
    assert!(second.end().success());
    stack.finish(proxy, worker);
}
