//! The client of Redis on real servers, and what becomes of calls while these are killed, paused, moved and full.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test measures is printed"
)]

mod harness;

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use harness::calls::{Call, Ear, Load, Tally, add, on_a_lane, soon};
use harness::process::{Running, file};
use harness::raw::{SlowNetwork, scripted};
use harness::redis::{Answer, Certificates, Cluster, Sentinels, Server, key_prefix, sentinel};
use harness::{DEADLINE, eventually};
use weir::clock::now;
use weir::keys;
use weir::store::redis::{CallError, Script};

/// Longer than the budget that a call may last, for timers and the call's own work.
const GRACE: Duration = Duration::from_millis(5);
/// What a call takes at most that waits for nothing.
const AT_ONCE: Duration = Duration::from_millis(10);

fn with(yaml: &str, more: &str) -> String {
    yaml.replace('}', &format!(", {more}}}"))
}

/// A budget of 250 ms in place of 20: where no call may fail, servers that a busy machine lets wait are to answer in time.
fn patient(yaml: &str) -> String {
    with(yaml, "timeout: 250ms")
}

/// Keys that lie in all shards.
fn some_keys() -> Vec<String> {
    let prefix = key_prefix();
    (0..60).map(|n| format!("{prefix}:{n}")).collect()
}

#[track_caller]
fn within_budget(what: &str, load: &Load, calls: &[Call]) {
    let tally = Tally::of(calls);
    println!("{what}: {tally:?}");
    assert!(
        tally.worst_of_ours <= load.timeout + GRACE,
        "{what}: {tally:?}"
    );
}

/// Each key counts what was answered: no call was lost, and none was carried out twice.
#[track_caller]
fn counted_exactly(keys: usize, calls: &[Call]) {
    for key in 0..keys {
        let mut sums: Vec<_> = calls
            .iter()
            .filter(|call| call.key == key)
            .map(|call| *call.answer.as_ref().unwrap())
            .collect();
        sums.sort_unstable();
        let expected: Vec<_> = (1..).take(sums.len()).collect();
        assert_eq!(sums, expected, "key {key}");
    }
}

#[test]
fn every_slot_is_reached() {
    let mut missing = vec![true; usize::from(keys::SLOTS)];
    let prefix = key_prefix();
    let names = (0..).map(|n| format!("{prefix}:{n}"));
    let names: Vec<_> = names
        .filter(|name| std::mem::take(&mut missing[usize::from(keys::slot(name.as_bytes()))]))
        .take(usize::from(keys::SLOTS))
        .collect();
    on_a_lane(&patient(&Cluster::shared().yaml("t")), async |redis| {
        assert!(redis.ready(DEADLINE).await);
        let mut reached = 0;
        for names in names.chunks(64) {
            let answers = join_all(names.iter().map(|name| add(&redis, name))).await;
            reached += answers.iter().filter(|answer| **answer == Ok(1)).count();
        }
        println!("{reached} slots reached");
        assert_eq!(reached, usize::from(keys::SLOTS));
    });
}

#[test]
fn forgotten_scripts_fail_no_call() {
    let cluster = Cluster::shared();
    let load = Load::start(&patient(&cluster.yaml("t")), some_keys());
    for _ in 0..20 {
        cluster.script_flush();
        load.until(|calls| calls.len() > 30);
    }
    let keys = load.keys.len();
    let calls = load.stop();
    let tally = Tally::of(&calls);
    println!("20 SCRIPT FLUSH: {tally:?}");
    assert_eq!(tally.failed(), 0, "{tally:?}");
    counted_exactly(keys, &calls);
}

#[test]
fn a_slot_on_the_move_fails_no_call() {
    let cluster = Cluster::shared();
    // All in one slot, and some that stay, which share connections with them.
    let prefix = key_prefix();
    let mut keys: Vec<_> = (0..60).map(|n| format!("{prefix}:{{moves}}:{n}")).collect();
    keys.extend(some_keys());
    let slot = keys::slot(b"moves");
    let load = Load::start(&patient(&cluster.yaml("t")), keys);
    let (from, to) = {
        let from = cluster.master_of(slot);
        let others = ["{a}", "{b}", "{c}", "{d}", "{e}"];
        let mut others = others
            .iter()
            .map(|key| cluster.master_of(keys::slot(key.as_bytes())));
        (from, others.find(|other| *other != from).unwrap())
    };
    let mut asked = 0;
    for to in [to, from, to] {
        // The new master has no script yet, and no keys.
        cluster.cli(to, &["SCRIPT", "FLUSH"]);
        cluster.open_slot(slot, to);
        let mut moved = 0;
        loop {
            let n = cluster.move_keys(slot, to, 7);
            load.until(|calls| calls.iter().filter(|call| call.key < 60).count() > 60);
            moved += n;
            if n == 0 {
                break;
            }
        }
        asked += moved;
        cluster.close_slot(slot, to);
        load.until(|calls| calls.iter().filter(|call| call.key < 60).count() > 60);
    }
    let keys = load.keys.len();
    let calls = load.stop();
    let tally = Tally::of(&calls);
    println!("3 migrations of a slot, {asked} keys moved: {tally:?}");
    assert_eq!(tally.failed(), 0, "{tally:?}");
    counted_exactly(keys, &calls);
}

/// Each key's shard, by the number of its master.
fn shards(cluster: &Cluster, keys: &[String]) -> Vec<usize> {
    let shard = |key: &String| cluster.master_of(keys::slot(key.as_bytes()));
    keys.iter().map(shard).collect()
}

/// None fails, and next to none is slow.
#[track_caller]
fn go_on(what: &str, calls: &[&Call]) {
    let tally = Tally::of(calls.iter().copied());
    let is_slow = |call: &&&Call| call.took.saturating_sub(call.held_up) > AT_ONCE;
    let slow = calls.iter().filter(is_slow).count();
    println!("{what}: {tally:?}, {slow} over {AT_ONCE:?}");
    assert_eq!(tally.failed(), 0, "{tally:?}");
    assert!(slow * 10 <= calls.len(), "{slow} of {}", calls.len());
}

/// When the last call began that failed.
fn last_failure(calls: &[&Call]) -> Instant {
    let failed = calls.iter().filter(|call| call.answer.is_err());
    failed.map(|call| call.began).max().unwrap()
}

#[test]
fn a_killed_master_fails_its_own_calls_alone() {
    let cluster = Cluster::start();
    let load = Load::start(&patient(&cluster.yaml("t")), some_keys());
    let shards = shards(&cluster, &load.keys);
    let victim = shards[0];
    let of_victim = |call: &&Call| shards[call.key] == victim;

    let killed = now();
    cluster.kill(victim);
    let slot = keys::slot(load.keys[0].as_bytes());
    eventually(|| cluster.master_of(slot) != victim);
    let elected = now();
    load.until(|calls| {
        calls
            .iter()
            .any(|call| of_victim(&call) && call.answer.is_ok())
    });
    let calls = load.since(killed);
    within_budget("master killed", &load, &calls);
    let (dead, alive): (Vec<_>, Vec<_>) = calls.iter().partition(of_victim);
    go_on("other shards", &alive);
    let failed = dead.iter().filter(|call| call.answer.is_err());
    let tally = Tally::of(failed.copied());
    let back = last_failure(&dead);
    let behind = back.saturating_duration_since(elected);
    println!(
        "its own: {tally:?}, back after {:?}, {behind:?} behind the election",
        back - killed
    );
    assert!(behind < Duration::from_secs(1), "{behind:?}");
    // The kernel says at once that the connection is gone.
    assert_eq!(tally.timed_out, 0, "{tally:?}");
    assert!(tally.down > 100, "{tally:?}");
    assert!(tally.worst_of_ours < AT_ONCE, "{tally:?}");
    // The cluster itself needs its node timeout of 1.5 s, and up to a second and a half for the election.
    cluster.wait_until_whole();

    let ended = now();
    for node in 0..cluster.nodes.len() {
        if node != victim {
            cluster.kill(node);
        }
    }
    load.until(|calls| calls.len() > 500);
    let calls = load.since(ended);
    within_budget("all nodes killed", &load, &calls);
    let last = Tally::of(&calls[calls.len() - 400..]);
    assert_eq!(last.down, 400, "{last:?}");
    let restarted = now();
    for node in 0..cluster.nodes.len() {
        cluster.restart(node);
    }
    cluster.wait_until_whole();
    load.until(|calls| calls.len() > 300 && Tally::of(&calls[calls.len() - 300..]).failed() == 0);
    println!(
        "all nodes back: {:?} after their start",
        restarted.elapsed()
    );
    assert!(load.health().iter().all(|node| node.up));
    within_budget("all nodes back", &load, &load.since(restarted));
}

#[test]
fn a_paused_master_is_waited_for_by_few() {
    let cluster = Cluster::start();
    let load = Load::start(&patient(&cluster.yaml("t")), some_keys());
    let shards = shards(&cluster, &load.keys);
    let victim = shards[0];
    let of_victim = |call: &&Call| shards[call.key] == victim;

    let paused = now();
    cluster.pause(victim);
    load.until(|calls| {
        let failed_over = calls
            .iter()
            .any(|call| of_victim(&call) && call.answer.is_ok());
        failed_over && paused.elapsed() > Duration::from_secs(5)
    });
    let calls = load.since(paused);
    within_budget("master paused", &load, &calls);
    let (hung, alive): (Vec<_>, Vec<_>) = calls.iter().partition(of_victim);
    go_on("other shards", &alive);
    let tally = Tally::of(hung.iter().copied());
    let back = last_failure(&hung) - paused;
    println!("its own: {tally:?}, back after {back:?}");
    assert!(tally.down > 100, "{tally:?}");
    // Those in flight when it hung, and those that began before the first of them had waited out its budget.
    assert!(tally.timed_out <= 40, "{tally:?}");
    let waits = hung
        .iter()
        .filter(|call| call.answer == Err(CallError::Down));
    let at_once = Tally::of(waits.copied());
    assert!(at_once.worst_of_ours < AT_ONCE, "{at_once:?}");

    // It comes back, and is told that it is a replica now.
    let resumed = now();
    cluster.resume(victim);
    cluster.wait_until_whole();
    load.until(|calls| calls.len() > 300);
    let calls = load.since(resumed);
    within_budget("master resumed", &load, &calls);
    let tally = Tally::of(&calls);
    assert_eq!(tally.failed(), 0, "{tally:?}");
    // The lane's, and this one that asks; those that were given up are closed.
    for node in &cluster.nodes {
        let clients = || node.cli(&["CLIENT", "LIST", "TYPE", "normal"]);
        eventually(|| clients().text().lines().count() <= 2);
    }
}

#[test]
fn messages_are_heard_from_every_node_whichever_dies() {
    let cluster = Cluster::start();
    on_a_lane(&patient(&cluster.yaml("t")), async |redis| {
        let ear = Ear::on(&redis, "c");
        let told_by_all = async |round: &str| {
            for (n, node) in cluster.nodes.iter().enumerate() {
                let message = format!("{round}, said by {n}");
                if node.runs() {
                    node.cli(&["PUBLISH", "c", &message]);
                    soon(|| ear.heard(&message) == 1).await;
                }
            }
        };
        let listens = |node: &Server| node.cli(&["PUBSUB", "NUMSUB", "c"]).list()[1].int() > 0;
        let listened_to = || cluster.nodes.iter().position(listens).unwrap();
        soon(|| ear.begins() == 1).await;
        told_by_all("at first").await;

        // A master that becomes a replica still hears, and one that leaves the cluster does not. Both have no slots.
        let (deposed, keys, began) = (listened_to(), some_keys(), now());
        cluster.cli(
            cluster.replica_of(deposed),
            &["CLUSTER", "FAILOVER", "TAKEOVER"],
        );
        while ear.begins() == 1 {
            // Calls find out.
            join_all(keys.iter().map(|key| add(&redis, key))).await;
            assert!(began.elapsed() < DEADLINE);
        }
        println!("deposed: another is heard after {:?}", began.elapsed());
        told_by_all("deposed").await;
        cluster.wait_until_whole();

        let (dead, began) = (listened_to(), now());
        cluster.kill(dead);
        soon(|| ear.begins() == 3).await;
        println!("killed: another is heard after {:?}", began.elapsed());
        told_by_all("killed").await;
        cluster.restart(dead);
        cluster.wait_until_whole();

        let (hung, began) = (listened_to(), now());
        cluster.pause(hung);
        soon(|| ear.begins() == 4).await;
        println!("paused: another is heard after {:?}", began.elapsed());
        cluster.cli(cluster.replica_of(hung), &["PUBLISH", "c", "paused"]);
        soon(|| ear.heard("paused") == 1).await;
    });
}

#[test]
fn a_node_is_pinged_however_much_it_says() {
    let server = Server::single();
    on_a_lane(&patient(&server.yaml("t")), async |redis| {
        let ear = Ear::on(&redis, "c");
        soon(|| ear.begins() == 1).await;
        soon(|| {
            server.cli(&["PUBLISH", "c", "more"]);
            let listeners = server.cli(&["CLIENT", "LIST", "TYPE", "pubsub"]);
            listeners.text().contains("cmd=ping")
        })
        .await;
        assert!(ear.heard("more") > 1);
    });
}

/// As one that is cut off from its peers, and not from weir: it knows slots, and answers that the cluster fails.
#[test]
fn a_node_for_which_the_cluster_fails_is_believed_last() {
    let cut_off =
        Server::with(|_, _| "cluster-enabled yes\ncluster-config-file nodes.conf\n".to_owned());
    cut_off.cli(&["CLUSTER", "ADDSLOTS", "0", "1", "2"]);
    eventually(|| cut_off.says(&["CLUSTER", "INFO"], "cluster_state", "fail"));
    let cluster = Cluster::shared();
    let yaml = |urls: &[String]| {
        let urls = urls.join("', '");
        format!("redis: {{urls: ['{urls}'], mode: cluster, key_prefix: t}}\n")
    };
    for _ in 0..12 {
        let both = yaml(&[cut_off.url(), cluster.nodes[0].url()]);
        on_a_lane(&patient(&both), async |redis| {
            soon(|| !redis.health().is_empty()).await;
            assert!(redis.knows_all_slots(), "{:?}", redis.health());
        });
    }
    // Where there is no other, its slots are better than none.
    on_a_lane(&patient(&yaml(&[cut_off.url()])), async |redis| {
        soon(|| redis.health().iter().any(|node| node.up)).await;
        let mut names = (0..).map(|n| n.to_string());
        let known = names.find(|name| keys::slot(name.as_bytes()) < 3).unwrap();
        let answer = add(&redis, &known).await;
        assert!(
            matches!(&answer, Err(CallError::Refused(why)) if why.contains("CLUSTERDOWN") || why.contains("cluster")),
            "{answer:?}"
        );
    });
}

#[test]
fn a_script_that_fails_is_no_reason_to_look_at_the_cluster() {
    let cluster = Cluster::start();
    on_a_lane(&patient(&cluster.yaml("t")), async |redis| {
        assert!(redis.ready(DEADLINE).await);
        let looks = || {
            let stats = cluster.nodes.iter().map(|node| {
                let stats = node.cli(&["INFO", "commandstats"]);
                let line = stats
                    .text()
                    .lines()
                    .find(|line| line.contains("cluster|slots:"));
                let calls = line.and_then(|line| line.split("calls=").nth(1)?.split(',').next());
                calls.map_or(0, |calls| calls.parse::<usize>().unwrap())
            });
            stats.sum::<usize>()
        };
        let before = looks();
        let script = Script::new("return redis.error_reply('ERR no')");
        let mut refused = 0;
        let began = now();
        while began.elapsed() < Duration::from_secs(1) {
            let answer = redis.run(&script, &["any"], &[]).await;
            assert!(matches!(answer, Err(CallError::Refused(_))), "{answer:?}");
            refused += 1;
        }
        let looks = looks() - before;
        println!("{refused} scripts failed, {looks} looks at the cluster");
        assert!(looks <= 2);
    });
}

#[test]
fn a_slot_on_its_way_to_a_dead_node_is_not_waited_for() {
    let cluster = Cluster::start();
    let slot = keys::slot(b"gone");
    let from = cluster.master_of(slot);
    let to = (0..3).find(|other| *other != from).unwrap();
    cluster.open_slot(slot, to);
    cluster.kill(to);
    on_a_lane(&patient(&cluster.yaml("t")), async |redis| {
        redis.ready(Duration::from_millis(300)).await;
        let mut answers = Vec::new();
        for n in 0..50 {
            let began = now();
            answers.push((add(&redis, &format!("{{gone}}{n}")).await, began.elapsed()));
        }
        // The first one may wait for the connection, as it is new.
        let waited = answers
            .iter()
            .filter(|(answer, _)| *answer == Err(CallError::Timeout));
        let waited = waited.count();
        println!("50 calls asked of a dead node: {waited} waited");
        assert!(waited <= 1, "{answers:?}");
        let down = answers
            .iter()
            .filter(|(answer, _)| *answer == Err(CallError::Down));
        assert_eq!(down.count() + waited, 50, "{answers:?}");
    });
}

#[test]
fn a_server_that_is_too_slow_is_not_waited_for() {
    let server = Server::single();
    let network = SlowNetwork::to(server.address());
    let yaml = server.yaml("t").replace(
        &server.port.to_string(),
        &network.address.port().to_string(),
    );
    let load = Load::start(&yaml, some_keys());
    let slow = now();
    network.late.store(60, Ordering::Relaxed);
    load.until(|calls| calls.len() > 1500);
    let calls = load.since(slow);
    within_budget("answers 60 ms late", &load, &calls);
    let tally = Tally::of(&calls);
    assert!(tally.timed_out <= 32, "{tally:?}");
    network.late.store(0, Ordering::Relaxed);
    load.until(|calls| calls.len() > 100 && Tally::of(&calls[calls.len() - 100..]).failed() == 0);
}

#[test]
fn a_paused_server_is_waited_for_by_few() {
    let server = Server::single();
    let load = Load::start(&server.yaml("t"), some_keys());
    let paused = now();
    server.pause();
    load.until(|calls| calls.len() > 2000);
    let calls = load.since(paused);
    within_budget("server paused", &load, &calls);
    let tally = Tally::of(&calls);
    assert!(tally.timed_out <= 40, "{tally:?}");
    let last = &calls[calls.len() - 1000..];
    let at_once = Tally::of(last);
    assert_eq!(at_once.down, 1000, "{at_once:?}");
    assert!(at_once.worst_of_ours < AT_ONCE, "{at_once:?}");
    let resumed = now();
    server.resume();
    load.until(|calls| calls.len() > 100 && Tally::of(&calls[calls.len() - 100..]).failed() == 0);
    println!("server resumed: {:?}", resumed.elapsed());
}

#[test]
fn a_full_server_refuses_at_once_until_it_has_room() {
    let server = Server::single();
    let load = Load::on(&server, &patient(&server.yaml("t")), some_keys());
    let full = now();
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    load.until(|calls| calls.len() > 300);
    let calls = load.since(full);
    within_budget("full", &load, &calls);
    let last = &calls[calls.len() - 200..];
    let refused = |call: &Call| matches!(&call.answer, Err(CallError::Refused(why)) if why.contains("maxmemory"));
    assert!(last.iter().all(refused), "{:?}", last[0]);
    assert!(Tally::of(last).worst_of_ours < AT_ONCE);
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    load.until(|calls| calls.len() > 100 && Tally::of(&calls[calls.len() - 100..]).failed() == 0);
}

#[test]
fn a_single_server_that_was_restarted_is_found_again() {
    let server = Server::single();
    let load = Load::start(&server.yaml("t"), some_keys());
    for _ in 0..3 {
        let killed = now();
        server.kill();
        load.until(|calls| calls.len() > 100 && Tally::of(&calls[calls.len() - 100..]).down == 100);
        let restarted = now();
        server.restart();
        load.until(|calls| calls.iter().any(|call| call.answer.is_ok()));
        println!("found again after {:?}", restarted.elapsed());
        within_budget("server restarted", &load, &load.since(killed));
    }
}

/// Whether a call is answered in the end.
fn works(yaml: &str) -> bool {
    let patient = yaml.replacen('{', "{timeout: 2s, ", 1);
    on_a_lane(&patient, async |redis| {
        redis.ready(Duration::from_secs(30)).await && add(&redis, &key_prefix()).await.is_ok()
    })
}

/// What a call that cannot be made is told.
fn refused(yaml: &str) -> CallError {
    on_a_lane(yaml, async |redis| {
        assert!(!redis.ready(Duration::from_millis(300)).await);
        add(&redis, "any").await.unwrap_err()
    })
}

#[test]
fn passwords_and_users_are_shown() {
    let server = Server::with(|_, _| {
        "user default on >secret ~* &* +@all\nuser weir on >other ~* &* +@all\n".to_owned()
    });
    let yaml = server.yaml("t");
    assert!(works(&with(&yaml, "password: secret")));
    assert!(works(&with(&yaml, "username: weir, password: other")));
    assert_eq!(refused(&with(&yaml, "password: wrong")), CallError::Down);
    let wrong_user = with(&yaml, "username: weir, password: secret");
    assert_eq!(refused(&wrong_user), CallError::Down);
    assert_eq!(refused(&yaml), CallError::Down);
}

#[test]
fn a_node_that_answers_pings_with_an_error_is_not_pestered() {
    // As one that loads its data, it takes connections, and no commands.
    let server = Server::with(|_, _| "user default on >secret ~* &* +@all\n".to_owned());
    let connections = || {
        let mut asking = std::net::TcpStream::connect(server.address()).unwrap();
        let auth = "*2\r\n$4\r\nAUTH\r\n$6\r\nsecret\r\n*2\r\n$4\r\nINFO\r\n$5\r\nstats\r\n";
        asking.write_all(auth.as_bytes()).unwrap();
        let mut lines = BufReader::new(asking).lines().map(Result::unwrap);
        let line = lines.find_map(|line| {
            Some(
                line.strip_prefix("total_connections_received:")?
                    .parse::<u64>()
                    .unwrap(),
            )
        });
        line.unwrap()
    };
    on_a_lane(&server.yaml("t"), async |redis| {
        let before = connections();
        let until = now() + Duration::from_secs(2);
        while now() < until {
            assert_eq!(add(&redis, "k").await, Err(CallError::Down));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let made = connections() - before;
        println!("{made} connections in two seconds, one of them to ask");
        assert!(made < 20, "{made}");
    });
}

#[test]
fn tls_believes_the_authority_it_is_told() {
    let (ours, other) = (Certificates::make(), Certificates::make());
    let server = ours.server(false);
    let yaml = |server: &Server, authority: &Certificates, more: &str| {
        let (port, ca) = (server.second_port, authority.path("ca.pem"));
        format!("redis: {{urls: 'rediss://127.0.0.1:{port}', tls: {{ca: '{ca}'{more}}}}}\n")
    };
    assert!(works(&yaml(&server, &ours, "")));
    assert_eq!(refused(&yaml(&server, &other, "")), CallError::Down);

    let asks = ours.server(true);
    let shown = |by: &Certificates| {
        let (cert, key) = (by.path("server.pem"), by.path("server.key"));
        format!(", certificate: {{cert: '{cert}', key: '{key}'}}")
    };
    assert!(works(&yaml(&asks, &ours, &shown(&ours))));
    assert_eq!(refused(&yaml(&asks, &ours, "")), CallError::Down);
    let stranger = yaml(&asks, &ours, &shown(&other));
    assert_eq!(refused(&stranger), CallError::Down);

    // As in an image that has no public authorities.
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {{address: 127.0.0.1:0}}\nworker: {{health: {{cache: 0s}}}}\n{}",
        yaml(&server, &ours, "")
    ));
    let running = Running::start_in(config.path(), &[("SSL_CERT_FILE", "/none")]);
    eventually(|| {
        let health = running.admin().get("/health").body;
        let health: serde_json::Value = serde_json::from_str(&health).unwrap();
        health["checks"]["redis_main"]["status"] == "ok"
    });
}

#[test]
fn a_master_under_sentinels_is_followed() {
    let sentinels = Sentinels::start();
    let load = Load::start(&patient(&sentinels.yaml("t")), some_keys());
    let killed = now();
    sentinels.servers[0].kill();
    load.until(|calls| calls.iter().any(|call| call.answer.is_ok()));
    let calls = load.since(killed);
    within_budget("master under sentinels killed", &load, &calls);
    let tally = Tally::of(&calls);
    assert_eq!(tally.timed_out, 0, "{tally:?}");
    let new = format!("127.0.0.1:{}", sentinels.servers[1].port);
    eventually(|| {
        let nodes = load.health();
        nodes.len() == 1 && nodes[0].up && nodes[0].address == new
    });
    println!("new master after {:?}", killed.elapsed());
}

/// The master of before lives on: what it took meanwhile it would lose.
#[test]
fn a_failover_that_sentinels_are_asked_for_is_followed_at_once() {
    let sentinels = Sentinels::start();
    let load = Load::start(&patient(&sentinels.yaml("t")), some_keys());
    load.until(|calls| calls.iter().any(|call| call.answer.is_ok()));
    sentinels.sentinels[0].cli(&["SENTINEL", "FAILOVER", "mymaster"]);
    let new = &sentinels.servers[1];
    let of = |sentinel: &Server| sentinel.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"]);
    let named = Answer::List(vec![
        Answer::Text("127.0.0.1".to_owned()),
        Answer::Text(new.port.to_string()),
    ]);
    eventually(|| {
        sentinels
            .sentinels
            .iter()
            .all(|sentinel| of(sentinel) == named)
    });
    let told = now();
    let address = format!("127.0.0.1:{}", new.port);
    eventually(|| load.health().iter().all(|node| node.address == address));
    let took = told.elapsed();
    println!("followed {took:?} after all sentinels had told");
    // Its connection is closed by force once the old one is a replica, some ten seconds later.
    assert!(took < Duration::from_secs(5), "{took:?}");
}

/// As while the master of before and a sentinel of its are cut off from the others, and not from weir.
#[test]
fn a_master_of_an_older_epoch_is_not_gone_back_to() {
    let (old, new) = (Server::single(), Server::single());
    let cut_off = sentinel(old.port, 0);
    let others = [sentinel(new.port, 3), sentinel(new.port, 3)];
    let sentinels = [&cut_off, &others[0], &others[1]];
    let urls = sentinels.map(Server::url).join("', '");
    let yaml = format!("redis: {{urls: ['{urls}'], mode: sentinel, key_prefix: t}}\n");
    let address = |server: &Server| server.address().to_string();
    let is_at = |load: &Load, server: &Server| {
        let nodes = load.health();
        nodes.len() == 1 && nodes[0].address == address(server)
    };
    // Whichever is asked first.
    for _ in 0..8 {
        let load = Load::start(&patient(&yaml), some_keys());
        assert!(is_at(&load, &new), "{:?}", load.health());
    }
    let load = Load::start(&patient(&yaml), some_keys());
    // The one that hears of a failover may be any of them.
    for sentinel in sentinels {
        eventually(|| {
            let listeners = sentinel.cli(&["CLIENT", "LIST", "TYPE", "pubsub"]);
            listeners.text().contains("sub=1")
        });
    }

    // No one else is there to say that the old one is old, and weir looks for another as the new one goes.
    others.iter().for_each(Server::pause);
    new.kill();
    let killed = now();
    load.until(|_| killed.elapsed() > Duration::from_secs(3));
    let calls = load.since(killed);
    let answered = calls.iter().filter(|call| call.answer.is_ok()).count();
    assert_eq!(answered, 0, "of {}", calls.len());
    assert!(is_at(&load, &new), "{:?}", load.health());

    // Set up anew, sentinels begin to count from nothing, and most of them name it.
    let port = old.port.to_string();
    for sentinel in &others {
        sentinel.resume();
        sentinel.cli(&["SENTINEL", "REMOVE", "mymaster"]);
        sentinel.cli(&["SENTINEL", "MONITOR", "mymaster", "127.0.0.1", &port, "2"]);
    }
    load.until(|calls| calls.iter().any(|call| call.answer.is_ok()));
    eventually(|| is_at(&load, &old));
}

/// The bytes of a client to a server of this port, and back.
fn relay(client: TcpStream, port: u16) {
    let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut from, mut up) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut up);
        let _ = up.shutdown(Shutdown::Both);
    });
    let (mut server, mut client) = (server, client);
    let _ = std::io::copy(&mut server, &mut client);
    let _ = client.shutdown(Shutdown::Both);
}

/// An address behind which another server becomes the master, while the connection to the one of before stays.
#[test]
fn a_master_that_becomes_a_replica_is_left() {
    let servers = [Server::single(), Server::single()];
    let leads_to = Arc::new(AtomicU16::new(servers[0].port));
    let now_to = leads_to.clone();
    let address = scripted(move |client| relay(client, now_to.load(Ordering::Relaxed)));
    let yaml = format!("redis: {{urls: 'redis://{address}', mode: single, key_prefix: t}}\n");
    let load = Load::start(&patient(&yaml), some_keys());
    load.until(|calls| calls.iter().any(|call| call.answer.is_ok()));
    leads_to.store(servers[1].port, Ordering::Relaxed);
    let port = servers[1].port.to_string();
    servers[0].cli(&["REPLICAOF", "127.0.0.1", &port]);
    let demoted = now();
    load.until(|calls| calls.last().is_some_and(|call| call.answer.is_ok()));
    let refused = load.since(demoted);
    let refused = refused.iter().filter(|call| call.answer.is_err()).count();
    println!(
        "another master after {:?}, {refused} calls refused",
        demoted.elapsed()
    );
    assert!(refused > 0);
}
