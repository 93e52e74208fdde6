//! Requests through `weir run` with limits on a real Redis Cluster, while its nodes are killed, paused, moved and full: none
//! fails, none waits longer than a call may, and limits of other shards stay shared.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test measures is printed"
)]

mod harness;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use harness::calls::{waited_by, waited_for_cpu};
use harness::process::{Echo, Running, file};
use harness::redis::{Cluster, Server, key_prefix};
use harness::{Client, Lane, Upstream, eventually, eventually_within};
use weir::clock::now;
use weir::keys::{self, KeyTag, Keys};

/// Of a call: longer than the default, since servers that a busy machine lets wait are to answer in time.
const BUDGET: Duration = Duration::from_secs(1);
/// Longer than the budget that a request may last, for timers and weir's own work.
const GRACE: Duration = Duration::from_millis(5);
/// What a request takes at most that waits for nothing.
const AT_ONCE: Duration = Duration::from_millis(25);
/// Keep-alive connections that ask for limited routes; one more asks for a free one.
const CONNECTIONS: usize = 5;
const PAUSE: Duration = Duration::from_millis(4);
/// A limit counts as shared once no request has been decided without Redis for as long, in which one that waits for it is.
const SETTLED: Duration = Duration::from_millis(1_500);
/// For an election, on a busy machine.
const LONG: Duration = Duration::from_secs(30);
const SHARDS: usize = 3;
const KEYS_OF_A_LIMIT: usize = 8;

/// A limit whose keys all lie in one shard, by the number of the master that it begins with.
#[derive(Debug, Clone)]
struct Limit {
    name: String,
    shard: usize,
    keys: Vec<String>,
}

/// Where the counter of a key is.
fn slot(prefix: &str, limit: &str, key: &str) -> u16 {
    let tag = KeyTag::new(limit, [key.as_bytes()]);
    keys::slot(Keys::new(prefix).counter(tag, 0, "b").as_bytes())
}

/// A strict limit and a leased one for each shard.
fn limits(prefix: &str) -> Vec<Limit> {
    let limit = |(accuracy, shard): (&str, usize)| {
        let name = format!("{accuracy}{shard}");
        let lies_there = |key: &String| {
            let slot = usize::from(slot(prefix, &name, key));
            // As `Cluster::start` gives out slots.
            let first = |shard| usize::from(keys::SLOTS) * shard / SHARDS;
            (first(shard)..first(shard + 1)).contains(&slot)
        };
        let keys = (0..).map(|n| format!("k{n}")).filter(lies_there);
        Limit {
            keys: keys.take(KEYS_OF_A_LIMIT).collect(),
            shard,
            name,
        }
    };
    let all = ["strict", "lease"].into_iter();
    all.flat_map(|accuracy| (0..SHARDS).map(move |shard| (accuracy, shard)))
        .map(limit)
        .collect()
}

fn config(echo: &Echo, cluster: &Cluster, prefix: &str, limits: &[(&str, &str)]) -> String {
    let redis = cluster.yaml(prefix);
    let redis = redis.replace(
        "{urls",
        &format!("{{timeout: {}ms, urls", BUDGET.as_millis()),
    );
    let mut text = format!(
        "version: 1\nlisteners: [{{name: in, address: '127.0.0.1:0'}}]\nadmin: {{address: '127.0.0.1:0'}}\n\
         upstreams: {{app: {{endpoints: ['http://{}']}}}}\nruntime: {{lanes: 1}}\n{redis}rate_limits:\n",
        echo.address,
    );
    for (name, says) in limits {
        text += &format!("  {name}: {{{says}, by: 'header:t', on_redis_loss: local}}\n");
    }
    text += "routes:\n";
    for (name, _) in limits {
        text += &format!("- {{match: {{path: /{name}}}, upstream: app, rate_limits: [{name}]}}\n");
    }
    text + "- {upstream: app}\n"
}

/// A request that was answered.
#[derive(Debug, Clone)]
struct Asked {
    /// By its number; `None`: it met none.
    limit: Option<usize>,
    began: Instant,
    ended: Instant,
    /// Without what the client waited for a CPU.
    took: Duration,
    status: u16,
}

/// How long the nodes of a cluster have waited for a CPU, looked at again and again: one that hangs does not wait for it.
struct Waits {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Look>>>,
    thread: Option<JoinHandle<()>>,
}

/// When, and how long each had waited by then.
type Look = (Instant, Vec<Duration>);

impl Waits {
    fn of(cluster: &Arc<Cluster>) -> Waits {
        let (stop, seen) = (
            Arc::<AtomicBool>::default(),
            Arc::<Mutex<Vec<Look>>>::default(),
        );
        let (cluster, over, told) = (cluster.clone(), stop.clone(), seen.clone());
        let thread = thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let all = cluster.nodes.iter().map(|node| waited_by(node.pid()));
                let all = all.collect();
                told.lock().unwrap().push((now(), all));
                thread::sleep(PAUSE / 2);
            }
        });
        Waits {
            stop,
            seen,
            thread: Some(thread),
        }
    }

    /// The longest that one of them waited within that time.
    fn within(&self, began: Instant, ended: Instant) -> Duration {
        let seen = self.seen.lock().unwrap();
        let ahead = seen.partition_point(|(at, _)| *at <= began);
        let behind = seen.partition_point(|(at, _)| *at < ended);
        // A look is as old as the one before it.
        let (ahead, behind) = (ahead.saturating_sub(1), (behind + 1).min(seen.len() - 1));
        let both = seen[ahead].1.iter().zip(&seen[behind].1);
        let waits = both.map(|(before, then)| then.saturating_sub(*before));
        waits.max().unwrap_or_default()
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Requests without end, until the test has seen enough.
struct Load {
    stop: Arc<AtomicBool>,
    asked: Mutex<Made>,
    threads: Vec<JoinHandle<()>>,
}

/// The requests so far. Clients send them and wait for no lock, or the free route would not be asked while the test looks at them.
struct Made {
    comes: Receiver<Asked>,
    all: Vec<Asked>,
}

impl Load {
    fn start(address: &str, limits: &[Limit]) -> Load {
        let (asked, comes) = mpsc::channel();
        let mut load = Load {
            stop: Arc::default(),
            asked: Mutex::new(Made {
                comes,
                all: Vec::new(),
            }),
            threads: Vec::new(),
        };
        for connection in 0..=CONNECTIONS {
            let (address, stop, asked) = (address.to_owned(), load.stop.clone(), asked.clone());
            let limits = if connection == 0 {
                Vec::new()
            } else {
                limits.to_vec()
            };
            load.threads.push(thread::spawn(move || {
                let mut client = Client::to(&address);
                while !stop.load(Ordering::Relaxed) {
                    let limit = (!limits.is_empty()).then(|| fastrand::usize(..limits.len()));
                    let (path, field) = match limit.map(|limit| &limits[limit]) {
                        Some(limit) => {
                            let key = &limit.keys[fastrand::usize(..limit.keys.len())];
                            (format!("/{}", limit.name), format!("t: {key}"))
                        }
                        None => ("/".to_owned(), "t: free".to_owned()),
                    };
                    // In this order: what it waits for between the two is no part of either.
                    let (waited, began) = (waited_for_cpu(), now());
                    let status = client.send("GET", &path, &[&field], "").status;
                    let ended = now();
                    let took = (ended - began).saturating_sub(waited_for_cpu() - waited);
                    let _ = asked.send(Asked {
                        limit,
                        began,
                        ended,
                        took,
                        status,
                    });
                    // The free route is asked without a rest, so that it sees each moment in which weir does not get on.
                    thread::sleep(if limit.is_none() { PAUSE / 8 } else { PAUSE });
                }
            }));
        }
        load
    }

    fn since(&self, then: Instant) -> Vec<Asked> {
        let mut made = self.asked.lock().unwrap();
        let Made { comes, all } = &mut *made;
        all.extend(comes.try_iter());
        let mut asked: Vec<_> = all
            .iter()
            .filter(|asked| asked.began >= then)
            .cloned()
            .collect();
        asked.sort_by_key(|asked| asked.began);
        asked
    }

    /// Waits for so many requests from now on.
    fn goes_on(&self, requests: usize) {
        let then = now();
        eventually(|| self.since(then).len() >= requests);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(
                ended.is_ok() || thread::panicking(),
                "a request had no reply"
            );
        }
    }
}

/// What a request took, less what one that met no limit took in the same moments, and what a node of Redis waited for a CPU: what is left
/// is due to Redis.
fn due_to_redis(asked: &[Asked], waits: &Waits) -> Vec<(Asked, Duration)> {
    let (limited, free): (Vec<_>, Vec<_>) = asked.iter().partition(|asked| asked.limit.is_some());
    let began: Vec<_> = free.iter().map(|free| free.began).collect();
    let due = |asked: &Asked| {
        let end = asked.began + asked.took;
        let before = began.partition_point(|began| *began < end);
        let beside = free[..before].iter().rev().take(2_000);
        let beside = beside.filter(|free| free.began + free.took > asked.began);
        let noise = beside.map(|free| free.took).max().unwrap_or_default();
        let busy = waits.within(asked.began, asked.ended);
        (asked.clone(), asked.took.saturating_sub(noise + busy))
    };
    limited.into_iter().map(due).collect()
}

/// What became of the requests of some limits.
#[derive(Debug, Default)]
struct Tally {
    by_status: BTreeMap<u16, usize>,
    worst: Duration,
    p99: Duration,
    /// Less what the machine let them wait.
    worst_of_ours: Duration,
    /// That waited for Redis, and how many longer than they may.
    waited: usize,
    late: usize,
}

impl Tally {
    fn of<'a>(due: impl IntoIterator<Item = &'a (Asked, Duration)>) -> Tally {
        let mut tally = Tally::default();
        let mut took = Vec::new();
        for (asked, due) in due {
            *tally.by_status.entry(asked.status).or_default() += 1;
            took.push(asked.took);
            tally.worst_of_ours = tally.worst_of_ours.max(*due);
            tally.waited += usize::from(*due > AT_ONCE);
            tally.late += usize::from(*due > BUDGET + GRACE);
        }
        took.sort_unstable();
        tally.worst = took.last().copied().unwrap_or_default();
        tally.p99 = took.get(took.len() * 99 / 100).copied().unwrap_or_default();
        tally
    }

    fn all(&self) -> usize {
        self.by_status.values().sum()
    }
}

/// weir in front of a cluster, with limits of each shard, under load.
struct Scene {
    cluster: Arc<Cluster>,
    waits: Waits,
    limits: Vec<Limit>,
    prefix: String,
    load: Load,
    weir: Running,
    _echo: Echo,
}

impl Scene {
    fn start() -> Scene {
        let (cluster, echo, prefix) = (Arc::new(Cluster::start()), Echo::start(), key_prefix());
        let limits = limits(&prefix);
        let says = |limit: &Limit| match limit.name.starts_with("strict") {
            true => "limit: 100/m, burst: 1000000, accuracy: strict",
            false => "limit: 100/m, burst: 1000000, accuracy: lease",
        };
        let said: Vec<_> = limits
            .iter()
            .map(|limit| (&*limit.name, says(limit)))
            .collect();
        let config = file(&config(&echo, &cluster, &prefix, &said));
        let weir = Running::start(config.path());
        let waits = Waits::of(&cluster);
        let load = Load::start(&weir.address, &limits);
        let scene = Scene {
            cluster,
            waits,
            limits,
            prefix,
            load,
            weir,
            _echo: echo,
        };
        scene.load.goes_on(500);
        scene
    }

    /// By limit, how many requests were decided without Redis so far.
    fn lost(&self) -> Vec<u64> {
        lost(&self.weir, &self.limits)
    }

    /// Waits until no limit has been decided without Redis for a while; when the last one was.
    fn until_shared(&self) -> Instant {
        let (mut last, mut changed) = (self.lost(), now());
        eventually_within(LONG, || {
            let lost = self.lost();
            if lost != last {
                (last, changed) = (lost, now());
            }
            changed.elapsed() > SETTLED
        });
        changed
    }

    /// Prints and checks what holds in every fault: no request fails, and none waits for longer than a call may.
    #[track_caller]
    fn check(&self, what: &str, since: Instant, lost_before: &[u64]) -> Report {
        let asked = self.load.since(since);
        let due = due_to_redis(&asked, &self.waits);
        let free = asked.len() - due.len();
        let all = Tally::of(&due);
        let lost: Vec<_> = self
            .lost()
            .iter()
            .zip(lost_before)
            .map(|(now, before)| now - before)
            .collect();
        println!(
            "{what}: {} requests beside {free} free ones: {all:?}",
            due.len()
        );
        let mut by_shard = Vec::new();
        for shard in 0..SHARDS {
            let of_shard = |limit: usize| self.limits[limit].shard == shard;
            let tally = Tally::of(
                due.iter()
                    .filter(|(asked, _)| asked.limit.is_some_and(of_shard)),
            );
            let lost = (0..lost.len())
                .filter(|limit| of_shard(*limit))
                .map(|limit| lost[limit]);
            let lost: u64 = lost.sum();
            println!("  shard {shard}: {lost} decided without redis, {tally:?}");
            by_shard.push((lost, tally));
        }
        assert!(all.all() > 100, "{what}: a load");
        assert_eq!(
            all.by_status.keys().copied().collect::<Vec<_>>(),
            [200],
            "{what}"
        );
        // One in a thousand, for moments in which no free request was there to tell that the machine was busy.
        assert!(all.late * 1_000 <= all.all(), "{what}: {} late", all.late);
        Report { by_shard }
    }
}

/// By shard: decided without Redis, and what became of all.
struct Report {
    by_shard: Vec<(u64, Tally)>,
}

impl Report {
    /// Every request was decided by Redis, and next to none waited.
    #[track_caller]
    fn went_on(&self, shards: impl IntoIterator<Item = usize>) {
        for shard in shards {
            let (lost, tally) = &self.by_shard[shard];
            assert_eq!(*lost, 0, "shard {shard}");
            assert!(tally.waited * 20 <= tally.all(), "shard {shard}: {tally:?}");
        }
    }
}

fn lost(weir: &Running, limits: &[Limit]) -> Vec<u64> {
    let of = |limit: &Limit| {
        weir.metric(&format!(
            "weir_limit_decisions_total{{limit=\"{}\",decision=\"redis_lost\"}}",
            limit.name
        ))
    };
    limits.iter().map(of).collect()
}

#[test]
fn a_killed_master_takes_its_own_limits_alone() {
    let scene = Scene::start();
    let (before, killed) = (scene.lost(), now());
    scene.cluster.kill(0);
    let slot = slot(
        &scene.prefix,
        &scene.limits[0].name,
        &scene.limits[0].keys[0],
    );
    let mut elected = 0;
    eventually_within(LONG, || {
        elected = scene.cluster.master_of(slot);
        elected != 0
    });
    let elected_at = now();
    let back = scene.until_shared();
    let report = scene.check("master killed", killed, &before);
    report.went_on([1, 2]);
    let (lost, tally) = &report.by_shard[0];
    let behind = back.saturating_duration_since(elected_at);
    println!(
        "  shared again after {:?}, {behind:?} behind the election",
        back - killed
    );
    assert!(*lost > 20, "{lost}");
    assert!(tally.waited * 10 <= tally.all(), "at once: {tally:?}");
    assert!(behind < Duration::from_secs(2), "{behind:?}");
    scene.cluster.wait_until_whole();

    let (before, ended) = (scene.lost(), now());
    for node in 1..scene.cluster.nodes.len() {
        scene.cluster.kill(node);
    }
    scene.load.goes_on(1_000);
    let report = scene.check("all nodes killed", ended, &before);
    assert!(report.by_shard.iter().all(|(lost, _)| *lost > 20));
    let (before, restarted) = (scene.lost(), now());
    for node in 0..scene.cluster.nodes.len() {
        scene.cluster.restart(node);
    }
    scene.cluster.wait_until_whole();
    let whole = now();
    let back = scene.until_shared();
    scene.check("all nodes back", restarted, &before);
    let behind = back.saturating_duration_since(whole);
    println!(
        "  shared again after {:?}, {behind:?} behind the cluster",
        back - restarted
    );
    assert!(behind < Duration::from_secs(3), "{behind:?}");
    let (before, then) = (scene.lost(), now());
    scene.load.goes_on(500);
    scene.check("afterwards", then, &before).went_on(0..SHARDS);
}

#[test]
fn moves_and_forgotten_scripts_are_not_noticed() {
    let scene = Scene::start();
    let (before, began) = (scene.lost(), now());
    let mut moved = 0;
    for limit in scene.limits.iter().filter(|limit| limit.shard == 0) {
        let slot = slot(&scene.prefix, &limit.name, &limit.keys[0]);
        for to in [1, 0] {
            // The new master has no script yet, and no keys.
            scene.cluster.cli(to, &["SCRIPT", "FLUSH"]);
            scene.cluster.open_slot(slot, to);
            scene.load.goes_on(60);
            while scene.cluster.move_keys(slot, to, 1) > 0 {
                moved += 1;
            }
            scene.load.goes_on(60);
            scene.cluster.close_slot(slot, to);
            scene.load.goes_on(60);
        }
    }
    println!("4 slots moved, {moved} keys");
    scene
        .check("slots moved", began, &before)
        .went_on(0..SHARDS);

    let (before, began) = (scene.lost(), now());
    for _ in 0..20 {
        scene.cluster.script_flush();
        scene.load.goes_on(30);
    }
    scene
        .check("20 SCRIPT FLUSH", began, &before)
        .went_on(0..SHARDS);
}

#[test]
fn a_paused_master_is_waited_for_by_few() {
    let scene = Scene::start();
    let (before, paused) = (scene.lost(), now());
    scene.cluster.pause(0);
    eventually(|| paused.elapsed() > Duration::from_secs(5));
    let report = scene.check("master paused", paused, &before);
    report.went_on([1, 2]);
    let (lost, tally) = &report.by_shard[0];
    assert!(*lost > 20, "{lost}");
    // Those in flight when it hung, and those that began before the first of them had waited out its budget.
    assert!(tally.waited <= 8 * CONNECTIONS, "{tally:?}");
    scene.cluster.resume(0);
    let back = scene.until_shared();
    println!("  shared again after {:?}", back - paused);
    scene.cluster.wait_until_whole();
    let (before, then) = (scene.lost(), now());
    scene.load.goes_on(500);
    scene.check("afterwards", then, &before).went_on(0..SHARDS);
}

#[test]
fn full_servers_refuse_at_once_until_they_have_room() {
    let scene = Scene::start();
    let (before, full) = (scene.lost(), now());
    scene.cluster.set_maxmemory(1);
    scene.load.goes_on(1_000);
    let report = scene.check("memory full", full, &before);
    for (lost, tally) in &report.by_shard {
        assert!(*lost > 20, "{lost}");
        assert!(tally.waited * 20 <= tally.all(), "at once: {tally:?}");
    }
    let room = now();
    scene.cluster.set_maxmemory(0);
    let back = scene.until_shared();
    println!(
        "  shared again after {:?}",
        back.saturating_duration_since(room)
    );
    assert!(back.saturating_duration_since(room) < Duration::from_secs(2));
    let (before, then) = (scene.lost(), now());
    scene.load.goes_on(500);
    scene.check("afterwards", then, &before).went_on(0..SHARDS);
}

/// Two processes flood one key of a fixed window whose master dies.
#[test]
fn a_failover_gives_out_again_what_the_replica_lacks_and_no_more() {
    const LIMIT: usize = 3_000;
    let (cluster, echo) = (Cluster::start(), Echo::start());
    for accuracy in ["strict", "lease"] {
        let prefix = key_prefix();
        let says = format!("limit: {LIMIT}/year, algorithm: fixed_window, accuracy: {accuracy}");
        let config = file(&config(&echo, &cluster, &prefix, &[("a", &says)]));
        let limit = Limit {
            name: "a".to_owned(),
            shard: 0,
            keys: vec!["key".to_owned()],
        };
        let slot = slot(&prefix, "a", "key");
        let victim = cluster.master_of(slot);
        let weirs = [(); 2].map(|()| Running::start(config.path()));
        let began = now();
        let limits = [limit];
        // By then each has given two signs of life, and knows that there are two.
        eventually(|| began.elapsed() > Duration::from_millis(2_500));
        let loads = weirs
            .each_ref()
            .map(|weir| Load::start(&weir.address, &limits));
        let admitted = || -> Vec<Instant> {
            let asked = loads.iter().flat_map(|load| load.since(began));
            let limited = asked.filter(|asked| asked.limit.is_some() && asked.status == 200);
            limited.map(|asked| asked.began).collect()
        };
        eventually(|| admitted().len() > LIMIT / 5);
        // The replica is cut off, and hears no more of what its master admits.
        let behind = now();
        let replica = cluster.replica_of(victim);
        cluster.cli(replica, &["CONFIG", "SET", "masterauth", "wrong"]);
        cluster.cli(replica, &["CLIENT", "KILL", "TYPE", "master"]);
        eventually(|| admitted().iter().filter(|began| **began > behind).count() > LIMIT / 20);
        let killed = now();
        cluster.kill(victim);
        eventually_within(LONG, || cluster.master_of(slot) != victim);
        let used_up = |load: &Load, then: Instant| {
            let asked = load.since(then);
            let asked: Vec<_> = asked.iter().filter(|asked| asked.limit.is_some()).collect();
            asked.len() > 50 && asked.iter().all(|asked| asked.status == 429)
        };
        eventually_within(LONG, || {
            let lately = now() - Duration::from_millis(700);
            let shared = weirs
                .iter()
                .all(|weir| weir.metric("weir_limit_alone{limit=\"a\"}") == 0);
            shared && loads.iter().all(|load| used_up(load, lately))
        });
        let all = admitted();
        // Each spends its half by itself, as far as it was asked.
        let alone = weirs.each_ref().map(|weir| {
            let lost = lost(weir, &limits)[0];
            usize::try_from(lost).unwrap().min(LIMIT / 2)
        });
        let shared = all.len() - alone.iter().sum::<usize>();
        // What was admitted while the replica was behind, and some that had begun before.
        let lacks = behind - BUDGET..killed;
        let lately = all.iter().filter(|began| lacks.contains(began)).count();
        let unheard = all
            .iter()
            .filter(|began| (behind..killed).contains(began))
            .count();
        let twice = shared.saturating_sub(LIMIT);
        println!(
            "{accuracy}: {} admitted of {LIMIT}: {shared} by redis, {twice} of them a second time, {alone:?} by each alone; \
             {unheard} while the replica was cut off",
            all.len()
        );
        let statuses: Vec<_> = loads
            .iter()
            .flat_map(|load| load.since(began))
            .map(|asked| asked.status)
            .collect();
        assert!(statuses.iter().all(|status| matches!(status, 200 | 429)));
        assert!(
            all.len() <= 2 * LIMIT + lately,
            "a quota by redis, one by all alone, and what was lost"
        );
        assert!(twice <= lately, "{twice} of {lately}");
        assert!(
            twice > 0 || accuracy == "lease",
            "the replica lacked something"
        );
        assert!(shared * 100 >= LIMIT * 90, "{shared}");
        drop(loads);
        cluster.restart(victim);
        cluster.wait_until_whole();
    }
}

/// Limits by the address and by the session are asked one after the other, and both hang.
#[test]
fn a_request_that_waits_twice_has_one_budget() {
    // Below what a ping may take, which would tell before that the server hangs.
    const BUDGET: Duration = Duration::from_secs(3);
    let server = Server::single();
    let app = Upstream::replying(|head| {
        let start = match head.starts_with("GET /login ") {
            true => "X-Weir-Session-Start: {\"user\": \"ann\"}\r\n",
            false => "",
        };
        format!("HTTP/1.1 200 OK\r\n{start}Content-Length: 2\r\n\r\nok")
    });
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\nsessions: {{web: {{}}}}\n\
         rate_limits:\n  a: {{limit: 1000/h, by: client.ip, accuracy: strict}}\n  b: {{limit: 1000/h, by: session.user, accuracy: strict}}\n\
         routes: [{{upstream: app, rate_limits: [a, b], session: {{use: web, require: false}}}}]\n{}",
        app.url(),
        server
            .yaml(&key_prefix())
            .replace("{urls", "{timeout: 3s, connect_timeout: 10s, urls")
    ));
    let mut client = lane.connect();
    let login = client.get("/login");
    let cookie = login
        .field("set-cookie")
        .unwrap()
        .split(';')
        .next()
        .unwrap();
    let cookie = format!("Cookie: {cookie}");
    let mut ask = || client.send("GET", "/", &[&cookie], "").status;
    assert_eq!(ask(), 200);
    server.pause();
    let began = now();
    assert_eq!(ask(), 200, "by itself");
    let took = began.elapsed();
    println!("waited {took:?} for two limits of a budget of {BUDGET:?}");
    assert!(took >= BUDGET && took < BUDGET * 3 / 2, "{took:?}");
    // One whose session is not known here, and one that starts a session: neither has a budget more for that.
    let other = format!("{}A", &cookie[..cookie.len() - 1]);
    let other = if other == cookie {
        cookie.replace('A', "B")
    } else {
        other
    };
    for (path, fields) in [("/", &[other.as_str()][..]), ("/login", &[])] {
        let began = now();
        assert_eq!(lane.connect().send("GET", path, fields, "").status, 503);
        let took = began.elapsed();
        println!("waited {took:?} for a limit and a session");
        assert!(took < BUDGET * 3 / 2, "{took:?}");
    }
    server.resume();
    let shared = || {
        let plan = lane.plan.borrow().clone();
        plan.tell_sharing(weir::clock::mono());
        let alone = |limit| lane.told(&format!("weir_limit_alone{{limit=\"{limit}\"}}"));
        [alone("a"), alone("b")] == [Some(0.0); 2]
    };
    eventually(|| ask() == 200 && shared());
}
