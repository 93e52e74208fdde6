//! Circuit breakers that several weirs share through a real Redis Cluster.

use super::harness;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use super::harness::process::{Running, file};
use super::harness::redis::{Cluster, Server, key_prefix};
use super::harness::{Client, Lane, Upstream, eventually, eventually_within, ok};
use weir::clock::now;
use weir::config::breakers::Window;
use weir::keys::{self, Keys};

const SHARED: &str = "weir_breaker_shared{upstream=\"app\"}";

const BROKEN: &str = "HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n";

/// Fails while `failing` says so.
fn upstream(failing: &Arc<AtomicBool>) -> Upstream {
    let failing = failing.clone();
    Upstream::replying(move |_| match failing.load(Ordering::Relaxed) {
        true => BROKEN.to_owned(),
        false => ok("well"),
    })
}

/// The file of one of the weirs that share `store`.
fn guarded(store: &str, upstream: &str, breaker: &str) -> String {
    format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
         upstreams: {{app: {{endpoints: ['{upstream}'], circuit_breaker: b}}}}\n\
         circuit_breakers: {{b: {breaker}}}\n{store}"
    )
}

fn cluster() -> String {
    Cluster::shared().yaml(&key_prefix())
}

fn is_shared(lane: &Lane) -> bool {
    let plan = lane.plan.borrow();
    let breaker = plan.upstreams[0].breaker.as_ref().unwrap();
    breaker.with_member(|member| member.is_together()).unwrap()
}

/// How many processes the lane knows to share its breaker.
fn processes(lane: &Lane) -> u64 {
    let plan = lane.plan.borrow();
    let breaker = plan.upstreams[0].breaker.as_ref().unwrap();
    breaker.with_member(|member| member.processes().0).unwrap()
}

fn statuses(lane: &Lane, n: usize) -> Vec<u16> {
    // Some failures end the connection.
    (0..n).map(|_| lane.connect().get("/").status).collect()
}

#[test]
fn a_trip_seen_by_one_opens_all_within_200_ms() {
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let mut fastest = Duration::MAX;
    for _ in 0..5 {
        let breaker = "{quorum: 1, minimum_calls: 4, open_for: 1h}";
        let file = guarded(&cluster(), &upstream.url(), breaker);
        let lanes = [0; 3].map(|_| Lane::start(&file));
        let mut clients: Vec<_> = lanes.iter().map(Lane::connect).collect();
        assert_eq!(statuses(&lanes[0], 4), [500; 4]);
        let began = now();
        eventually(|| {
            clients
                .iter_mut()
                .all(|client| client.get("/").status == 503)
        });
        fastest = fastest.min(began.elapsed());
    }
    println!("all refuse {fastest:?} after the last failure");
    assert!(fastest < Duration::from_millis(200), "{fastest:?}");
}

#[test]
fn one_sick_process_trips_no_quorum_of_two_and_two_do() {
    let well = upstream(&Arc::default());
    let store = cluster();
    let breaker = "{quorum: 2, minimum_calls: 4, consecutive_failures: 4, open_for: 1h}";
    // What it cannot reach, the others can.
    let sick = || Lane::start(&guarded(&store, "http://127.0.0.1:1", breaker));
    let (one, healthy) = (sick(), Lane::start(&guarded(&store, &well.url(), breaker)));
    eventually(|| processes(&one) == 2);
    assert_eq!(statuses(&one, 40), [502; 40]);
    assert_eq!(statuses(&healthy, 3), [200; 3]);
    eventually(|| one.breaker().calls == 43 && healthy.breaker().calls == 43);
    assert_eq!((one.state(), healthy.state()), ("closed", "closed"));
    let other = sick();
    eventually(|| processes(&other) == 3);
    // By chance, as far as others can tell.
    assert_eq!(other.connect().get("/").status, 502);
    eventually(|| one.breaker().calls == 44);
    assert_eq!(statuses(&one, 4), [502; 4]);
    eventually(|| other.breaker().calls == 48);
    assert_eq!(other.state(), "closed");
    assert_eq!(other.connect().get("/").status, 502);
    for lane in [&one, &healthy, &other] {
        eventually(|| lane.state() == "open");
    }
    assert_eq!(healthy.connect().get("/").status, 503);
}

/// The sick one is the first that it hears again.
#[test]
fn one_sick_process_trips_no_quorum_of_two_where_redis_has_lost_who_lives() {
    let (well, redis) = (upstream(&Arc::default()), Server::single());
    let breaker = "{quorum: 2, minimum_calls: 4, open_for: 1h}";
    let start = |upstream: &str| Lane::start(&guarded(&redis.yaml("t"), upstream, breaker));
    let (sick, healthy) = (start("http://127.0.0.1:1"), start(&well.url()));
    let window = Keys::new("t").breaker("app", Window::Time(Duration::from_secs(10)));
    for _ in 0..5 {
        eventually(|| processes(&sick) == 2 && processes(&healthy) == 2);
        redis.cli(&["FLUSHALL"]);
        // The other has no calls, and reports each second.
        assert_eq!(statuses(&sick, 20), [502; 20]);
        eventually(|| redis.cli(&["EXISTS", &window.window]).int() == 1);
        eventually(|| redis.cli(&["ZCARD", &window.members]).int() == 2);
        assert_eq!(sick.state(), "closed");
    }
}

#[test]
fn a_late_result_of_an_older_generation_counts_for_nothing() {
    let (answer, held) = mpsc::channel::<String>();
    let held = Mutex::new(held);
    let failing = Arc::new(AtomicBool::new(true));
    let fails = failing.clone();
    let upstream = Upstream::replying(move |head| {
        if head.starts_with("GET /late") {
            return held.lock().unwrap().recv().unwrap();
        }
        match fails.load(Ordering::Relaxed) {
            true => BROKEN.to_owned(),
            false => ok("well"),
        }
    });
    let breaker = "{quorum: 1, consecutive_failures: 1, open_for: 50ms, jitter: 0%, half_open: {probes: 1}, recover_over: 0s}";
    let file = guarded(&cluster(), &upstream.url(), breaker);
    let (one, other) = (Lane::start(&file), Lane::start(&file));
    let mut late = other.connect();
    late.begin("GET", "/late", &[], "");
    upstream.wait_for_request();
    assert_eq!(statuses(&one, 1), [500]);
    eventually(|| other.state() != "closed");
    failing.store(false, Ordering::Relaxed);
    eventually(|| {
        one.connect().get("/");
        one.state() == "closed" && other.state() == "closed"
    });
    let generation = other.breaker().generation;
    answer.send(BROKEN.to_owned()).unwrap();
    assert_eq!(late.finish().status, 500);
    // What comes after it is counted, and it is not.
    assert_eq!(statuses(&other, 2), [200; 2]);
    eventually(|| other.breaker().calls >= 2);
    let after = other.breaker();
    assert_eq!((after.failures, after.generation), (0, generation));
}

#[test]
fn probes_of_all_processes_together_are_those_of_one() {
    let phase = Arc::new(AtomicUsize::new(0));
    let (probes, gate) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let upstream = Upstream::replying({
        let (phase, probes, gate) = (phase.clone(), probes.clone(), gate.clone());
        move |_| {
            if phase.load(Ordering::SeqCst) == 0 {
                return BROKEN.to_owned();
            }
            probes.fetch_add(1, Ordering::SeqCst);
            eventually(|| gate.load(Ordering::SeqCst));
            ok("well")
        }
    });
    let breaker = "{quorum: 1, minimum_calls: 4, open_for: 300ms, half_open: {probes: 3, probe_timeout: 1m}, recover_over: 1h}";
    let file = guarded(&cluster(), &upstream.url(), breaker);
    let lanes = [0; 4].map(|_| Lane::start(&file));
    assert_eq!(statuses(&lanes[0], 4), [500; 4]);
    for lane in &lanes {
        eventually(|| lane.state() != "closed");
    }
    phase.store(1, Ordering::SeqCst);
    let stop = AtomicBool::new(false);
    let refused = AtomicUsize::new(0);
    thread::scope(|scope| {
        for lane in &lanes {
            // As many clients as there are probes, should one lane get them all.
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        if lane.connect().get("/").status == 503 {
                            refused.fetch_add(1, Ordering::SeqCst);
                            thread::yield_now();
                        }
                    }
                });
            }
        }
        eventually(|| probes.load(Ordering::SeqCst) == 3);
        // A second of requests on all lanes later there are no more.
        let (seen, began) = (refused.load(Ordering::SeqCst), now());
        eventually(|| began.elapsed() > Duration::from_secs(1));
        assert!(refused.load(Ordering::SeqCst) > seen + 100);
        assert_eq!(probes.load(Ordering::SeqCst), 3);
        stop.store(true, Ordering::SeqCst);
        gate.store(true, Ordering::SeqCst);
    });
    for lane in &lanes {
        eventually(|| lane.state() == "recovering");
    }
}

#[test]
fn a_process_that_starts_joins_an_open_breaker() {
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let file = guarded(
        &cluster(),
        &upstream.url(),
        "{quorum: 1, minimum_calls: 4, open_for: 1h}",
    );
    let one = Lane::start(&file);
    assert_eq!(statuses(&one, 4), [500; 4]);
    eventually(|| one.state() == "open");
    let new = Lane::start(&file);
    assert_eq!(statuses(&new, 3), [503; 3], "from its first request on");
    assert_eq!(one.state(), "open");
    assert_eq!(new.breaker().generation, one.breaker().generation);
}

fn post(weir: &Running, what: &str) -> harness::Reply {
    let path = format!("/v1/breakers/app/{what}");
    weir.admin().send("POST", &path, &["Host: 127.0.0.1"], "")
}

#[test]
fn forced_states_are_seen_everywhere_and_outlive_who_forced_them() {
    let upstream = upstream(&Arc::default());
    let text = guarded(&cluster(), &upstream.url(), "{}");
    let config = file(&text);
    let run = || Running::start(config.path());
    let (one, other) = (run(), run());
    let opened = post(&one, "force-open");
    assert_eq!(opened.status, 200);
    assert!(
        opened.body.contains("\"state\":\"forced_open\""),
        "{}",
        opened.body
    );
    assert_eq!(one.client().get("/").status, 503);
    eventually(|| other.client().get("/").status == 503);
    let told = other.client().get("/").body;
    assert!(told.contains("held back by an operator"), "{told}");
    drop(one);
    let new = run();
    assert_eq!(new.client().get("/").status, 503);
    assert_eq!(post(&new, "reset").status, 200);
    eventually(|| other.client().get("/").status == 200);
    assert_eq!(post(&other, "force-closed").status, 200);
    eventually(|| {
        let said = new
            .admin()
            .send("GET", "/v1/breakers/app", &["Host: 127.0.0.1"], "");
        said.body.contains("\"state\":\"forced_closed\"") && said.body.contains("\"by\":\"all\"")
    });
    assert_eq!(new.metric(SHARED), 1);
}

#[test]
fn nothing_is_forced_while_redis_is_away() {
    let redis = Server::single();
    let upstream = upstream(&Arc::default());
    let text = guarded(&redis.yaml("t"), &upstream.url(), "{}");
    let config = file(&text);
    let weir = Running::start(config.path());
    redis.kill();
    let refused = post(&weir, "force-open");
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert_eq!(
        refused.field("content-type"),
        Some("application/problem+json")
    );
    weir.log_until("breaker goes on by itself");
    assert_eq!(weir.told(SHARED), Some(0.0));
    assert_eq!(weir.client().get("/").status, 200);
    redis.restart();
    weir.log_until("breaker goes by the shared state");
    eventually(|| post(&weir, "force-open").status == 200);
    assert_eq!(weir.client().get("/").status, 503);
}

#[test]
fn settings_of_a_reload_join_the_state_that_there_is() {
    let failing = Arc::new(AtomicBool::new(true));
    let (upstream, store) = (upstream(&failing), cluster());
    let text = |breaker: &str| guarded(&store, &upstream.url(), breaker);
    let lane = Lane::start(&text("{quorum: 1, minimum_calls: 4, open_for: 1h}"));
    assert_eq!(statuses(&lane, 4), [500; 4]);
    eventually(|| lane.state() == "open");
    let other = "{minimum_calls: 9, window: {type: count, size: 50}, open_for: 1h}";
    lane.reload(&text(other));
    assert_eq!(statuses(&lane, 3), [503; 3]);
    let new = Lane::start(&text(other));
    assert_eq!(statuses(&new, 3), [503; 3]);
}

/// Two lanes that share `redis`, with an upstream that fails while told.
fn pair(redis: &Server, upstream: &Upstream, on_loss: &str) -> [Lane; 2] {
    let breaker = format!(
        "{{quorum: 1, minimum_calls: 4, open_for: 1h, on_redis_loss: {on_loss}, window: {{type: time, size: 1m}}}}"
    );
    let file = guarded(&redis.yaml("t"), &upstream.url(), &breaker);
    [0; 2].map(|_| Lane::start(&file))
}

#[test]
fn without_redis_each_process_goes_on_by_what_it_has_seen() {
    let redis = Server::single();
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let [one, other] = pair(&redis, &upstream, "local");
    // One short of what trips, before.
    assert_eq!(statuses(&one, 3), [500; 3]);
    redis.kill();
    eventually(|| !is_shared(&one) && !is_shared(&other));
    assert_eq!(one.state(), "closed");
    assert_eq!(
        statuses(&one, 2),
        [500, 503],
        "what it saw before still counts"
    );
    assert_eq!(other.state(), "closed");
    redis.restart();
    eventually(|| is_shared(&one) && is_shared(&other));
    assert_eq!((one.state(), other.state()), ("closed", "closed"));
}

#[test]
fn a_frozen_breaker_stays_as_it_was_without_redis() {
    let redis = Server::single();
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let [one, other] = pair(&redis, &upstream, "freeze");
    redis.kill();
    eventually(|| !is_shared(&one) && !is_shared(&other));
    assert_eq!(statuses(&one, 10), [500; 10]);
    assert_eq!(one.state(), "closed");
}

#[test]
fn a_redis_that_forgot_everything_is_told_the_state() {
    let redis = Server::single();
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let [one, other] = pair(&redis, &upstream, "local");
    assert_eq!(statuses(&one, 4), [500; 4]);
    eventually(|| [&one, &other].map(Lane::state) == ["open"; 2]);
    let generation = one.breaker().generation;
    redis.kill();
    eventually(|| !is_shared(&one) && !is_shared(&other));
    assert_eq!(statuses(&other, 2), [503; 2], "it stays open for its time");
    // It comes back empty.
    redis.restart();
    eventually(|| is_shared(&one) && is_shared(&other));
    let after = [&one, &other].map(|lane| (lane.state(), lane.breaker().generation));
    assert_eq!(after, [("open", generation); 2]);
    let new = Lane::start(&guarded(
        &redis.yaml("t"),
        &upstream.url(),
        "{quorum: 1, minimum_calls: 4, open_for: 1h}",
    ));
    assert_eq!(statuses(&new, 2), [503; 2]);
}

#[test]
fn a_failover_closes_no_breaker() {
    let cluster = Cluster::start();
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let breaker = "{quorum: 1, minimum_calls: 4, open_for: 1h}";
    let file = guarded(&cluster.yaml("t"), &upstream.url(), breaker);
    let [one, other] = [0; 2].map(|_| Lane::start(&file));
    assert_eq!(statuses(&one, 4), [500; 4]);
    eventually(|| [&one, &other].map(Lane::state) == ["open"; 2]);
    let generation = one.breaker().generation;
    let window = Window::Time(Duration::from_secs(10));
    let key = Keys::new("t").breaker("app", window).state;
    cluster.kill(cluster.master_of(keys::slot(key.as_bytes())));
    let mut client = other.connect();
    eventually_within(Duration::from_secs(30), || {
        assert_eq!(client.get("/").status, 503);
        !is_shared(&one) && !is_shared(&other)
    });
    eventually_within(Duration::from_secs(30), || {
        assert_eq!(client.get("/").status, 503);
        is_shared(&one) && is_shared(&other)
    });
    let after = [&one, &other].map(|lane| (lane.state(), lane.breaker().generation));
    assert_eq!(after, [("open", generation); 2]);
}

#[test]
fn databases_of_one_redis_share_nothing() {
    let redis = Server::single();
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let [zero, other_zero] = pair(&redis, &upstream, "local");
    let breaker = "{quorum: 1, minimum_calls: 4, open_for: 1h}";
    let yaml = redis.yaml("t").replace(&redis.url(), &(redis.url() + "/1"));
    let [one, other_one] = [0; 2].map(|_| Lane::start(&guarded(&yaml, &upstream.url(), breaker)));
    assert_eq!(statuses(&one, 4), [500; 4]);
    eventually(|| [&one, &other_one].map(Lane::state) == ["open"; 2]);
    assert_eq!(statuses(&zero, 4), [500; 4]);
    eventually(|| [&zero, &other_zero].map(Lane::state) == ["open"; 2]);
    let generations = [&zero, &other_zero, &one, &other_one].map(|lane| lane.breaker().generation);
    assert_eq!(generations, [1; 4]);
    eventually(|| {
        let channels = redis.cli(&["PUBSUB", "CHANNELS"]);
        let mut channels: Vec<_> = channels.list().iter().map(|it| it.text()).collect();
        channels.sort_unstable();
        let names = [
            "breakers",
            "breakers@1",
            "limits",
            "limits@1",
            "sessions",
            "sessions@1",
        ];
        channels == names.map(|name| format!("t:{name}"))
    });
}

#[test]
fn no_key_lives_for_ever() {
    let redis = Server::single();
    let upstream = upstream(&Arc::new(AtomicBool::new(true)));
    let breaker = "{minimum_calls: 4, open_for: 50ms, jitter: 0%, window: {type: count, size: 8}, half_open: {probe_timeout: 1m}}";
    let lane = Lane::start(&guarded(&redis.yaml("t"), &upstream.url(), breaker));
    assert_eq!(statuses(&lane, 4), [500; 4]);
    eventually(|| lane.state() == "half_open");
    eventually(|| redis.cli(&["KEYS", "t:b:*"]).list().len() == 4);
    for key in redis.cli(&["KEYS", "*"]).list() {
        let lives = redis.cli(&["PTTL", key.text()]).int();
        assert!(lives > 0, "{key:?} lives for {lives}");
    }
}

/// When it ends lies far off then.
#[test]
fn a_server_whose_clock_is_set_back_neither_keeps_a_breaker_open_nor_its_ramp_going() {
    let redis = Server::single();
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let breaker = "{quorum: 1, minimum_calls: 4, open_for: 4s, max_open_for: 4s, half_open: {probes: 1}, recover_over: 4s}";
    let lane = Lane::start(&guarded(&redis.yaml("t"), &upstream.url(), breaker));
    assert_eq!(statuses(&lane, 4), [500; 4]);
    let window = Window::Time(Duration::from_secs(10));
    let key = Keys::new("t").breaker("app", window).state;
    let in_an_hour = |name: &str| {
        eventually(|| lane.state() == name);
        let ends: u64 = redis.cli(&["HGET", &key, "e"]).text().parse().unwrap();
        let ends = (ends + 3_600_000).to_string();
        redis.cli(&["HSET", &key, "e", &ends]);
    };
    in_an_hour("open");
    failing.store(false, Ordering::Relaxed);
    eventually(|| lane.state() == "half_open");
    eventually(|| lane.connect().get("/").status == 200);
    in_an_hour("recovering");
    eventually(|| lane.state() == "closed");
}

#[test]
fn an_opening_lasts_as_long_as_a_reload_says() {
    let failing = Arc::new(AtomicBool::new(true));
    let (upstream, store) = (upstream(&failing), cluster());
    let text = |open_for: &str| {
        let breaker = format!(
            "{{quorum: 1, minimum_calls: 4, consecutive_failures: 99, jitter: 0%, open_for: {open_for}, max_open_for: 1h}}"
        );
        guarded(&store, &upstream.url(), &breaker)
    };
    let lane = Lane::start(&text("1h"));
    assert_eq!(statuses(&lane, 2), [500; 2]);
    eventually(|| lane.breaker().failures == 2);
    lane.reload(&text("300ms"));
    eventually(|| is_shared(&lane));
    assert_eq!(statuses(&lane, 2), [500; 2]);
    eventually(|| lane.state() == "half_open");
}

/// What it wrote before lies far off then.
#[test]
fn a_server_whose_clock_is_set_back_forgets_calls_processes_and_slots_all_the_same() {
    let redis = Server::single();
    let failing = Arc::new(AtomicBool::new(false));
    let upstream = upstream(&failing);
    let breaker = "{quorum: 1, minimum_calls: 99, consecutive_failures: 2, open_for: 50ms, jitter: 0%, half_open: {probes: 1}}";
    let lane = Lane::start(&guarded(&redis.yaml("t"), &upstream.url(), breaker));
    eventually(|| is_shared(&lane));
    let later = weir::clock::wall() + Duration::from_secs(3_600);
    let keys = Keys::new("t").breaker("app", Window::Time(Duration::from_secs(10)));
    let window = format!("0 {}:50:50:0", later.as_secs());
    redis.cli(&["SET", &keys.window, &window, "PX", "60000"]);
    let later = later.as_millis().to_string();
    redis.cli(&["ZADD", &keys.members, &later, "dead"]);
    redis.cli(&["ZADD", &keys.doubters, &later, "dead"]);
    assert_eq!(statuses(&lane, 3), [200; 3]);
    eventually(|| (lane.breaker().calls, processes(&lane)) == (3, 1));
    eventually(|| redis.cli(&["ZCARD", &keys.doubters]).int() == 0);

    // A slot that a process holds which is gone by then.
    failing.store(true, Ordering::Relaxed);
    assert_eq!(statuses(&lane, 2), [500; 2]);
    eventually(|| lane.state() == "half_open");
    redis.cli(&["ZADD", &keys.probes, &later, "dead/7"]);
    eventually(|| redis.cli(&["ZSCORE", &keys.probes, "dead/7"]).text() < later.as_str());
}

#[test]
fn a_count_window_of_the_fleet_forgets_its_oldest_calls() {
    let failing = Arc::new(AtomicBool::new(true));
    let upstream = upstream(&failing);
    let breaker = "{minimum_calls: 20, failure_rate: 90%, window: {type: count, size: 20}}";
    let file = guarded(&cluster(), &upstream.url(), breaker);
    let lanes = [0; 2].map(|_| Lane::start(&file));
    assert_eq!(statuses(&lanes[0], 10), [500; 10]);
    eventually(|| lanes[0].breaker().failures == 10);
    failing.store(false, Ordering::Relaxed);
    for round in 0..6 {
        assert_eq!(statuses(&lanes[round % 2], 5), [200; 5]);
        let calls = lanes[round % 2].breaker().calls;
        eventually(|| lanes[round % 2].breaker().calls != calls || calls >= 20);
    }
    eventually(|| {
        let (one, other) = (lanes[0].breaker(), lanes[1].breaker());
        one.failures == 0 && other.failures == 0 && one.calls >= 20
    });
    let mut client: Client = lanes[0].connect();
    assert_eq!(client.get("/").status, 200);
}
