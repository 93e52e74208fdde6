//! Limits that processes have in common on a real Redis Cluster: how exactly they keep them, and what it costs Redis.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use super::harness::calls::soon;
use super::harness::node::Node;
use super::harness::process::{Running, file};
use super::harness::redis::{Answer, Cluster, Server, key_prefix};
use super::harness::versions::run;
use super::harness::{Client, Lane, Store, Upstream, eventually, metrics, runtime};
use futures_util::FutureExt as _;
use futures_util::future::{join, join_all};
use socket2::{Domain, Socket, Type};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use weir::clock;
use weir::config::limits::{Period, Rule, Window};
use weir::keys::Keys;
use weir::plan::SharedAsk;
use weir::store::limits::leases::Decision;

/// Processes that share a limit.
const NODES: usize = 8;
/// Requests that a process has under way at a time.
const AT_A_TIME: usize = 8;

/// Asks the first limit, whose key is constant, on and on: [`AT_A_TIME`] requests at once, with a rest after `burst` of each.
async fn flood_from(node: &Node, until: Duration, burst: usize) -> Flood {
    let floods = join_all((0..AT_A_TIME).map(|_| ask_on(node, until, burst))).await;
    let mut all = floods.into_iter().fold(Flood::default(), Flood::and);
    all.calls = node.calls();
    all
}

async fn ask_on(node: &Node, until: Duration, burst: usize) -> Flood {
    let mut flood = Flood::default();
    while clock::wall() < until {
        for _ in 0..burst {
            let began = clock::wall();
            let decision = node.ask(&[], clock::mono()).await;
            flood.asked += 1;
            match decision {
                Decision::Admitted(_) => flood.admitted.push((began, clock::wall())),
                Decision::Refused { .. } => {}
                Decision::Lost => flood.lost += 1,
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    flood
}

/// What became of many requests.
#[derive(Debug, Default)]
struct Flood {
    asked: u64,
    /// Each with when it was asked, and when it was answered, since the Unix epoch.
    admitted: Vec<(Duration, Duration)>,
    lost: u64,
    calls: u64,
}

impl Flood {
    fn and(mut self, other: Flood) -> Flood {
        self.asked += other.asked;
        self.admitted.extend(other.admitted);
        self.lost += other.lost;
        self.calls += other.calls;
        self
    }
}

/// Floods the limit from `nodes` processes at a time, for `time`.
fn flood(limit: &str, nodes: usize, time: Duration, burst: usize) -> Flood {
    let file = format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nrate_limits: {{a: {limit}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        Store::Redis.block()
    );
    let together = Arc::new(Barrier::new(nodes));
    let node = |_| {
        let (file, together) = (file.clone(), together.clone());
        thread::spawn(move || {
            runtime().block_on(async {
                let node = Node::start(&file).await;
                // Until each knows of all the others.
                let fleet = node.plan.fleet.as_ref().unwrap();
                while fleet.alive() < nodes {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                together.wait();
                flood_from(&node, clock::wall() + time, burst).await
            })
        })
    };
    let nodes: Vec<_> = (0..nodes).map(node).collect();
    let floods = nodes.into_iter().map(|node| node.join().unwrap());
    floods.fold(Flood::default(), Flood::and)
}

/// Rounds of a flood, of which one is to use up what it may: a machine that is busy just then asks for less.
const ROUNDS: usize = 3;

#[test]
fn a_fixed_window_is_never_exceeded() {
    const WINDOW: Duration = Duration::from_millis(100);
    const LIMIT: u64 = 40;
    let used_up = |accuracy: &str| {
        let limit = format!(
            "{{limit: {LIMIT}/100ms, algorithm: fixed_window, by: constant, accuracy: {accuracy}}}"
        );
        let flood = flood(&limit, NODES, WINDOW * 105, 10);
        let number = |time: Duration| time.as_nanos() / WINDOW.as_nanos();
        let (mut sums, mut between) = (BTreeMap::new(), 0);
        for (asked, answered) in &flood.admitted {
            // One that was answered in another window than it was asked in may be of either.
            match number(*asked) == number(*answered) {
                true => *sums.entry(number(*asked)).or_insert(0u64) += 1,
                false => between += 1,
            }
        }
        let over = sums.values().filter(|sum| **sum > LIMIT).count();
        let whole = sums.len().saturating_sub(2) as u64;
        let total = flood.admitted.len() as u64;
        println!(
            "{accuracy}: {over} of {} windows over; {total} admitted of {} asked, {between} of them between two windows; \
             {} allowed in whole windows; {} calls, {} lost",
            sums.len(),
            flood.asked,
            whole * LIMIT,
            flood.calls,
            flood.lost
        );
        assert_eq!(over, 0, "{sums:?}");
        total * 100 >= whole * LIMIT * 98 && flood.asked > 50 * total
    };
    for accuracy in ["lease", "strict"] {
        assert!((0..ROUNDS).any(|_| used_up(accuracy)), "{accuracy}");
    }
}

#[test]
fn a_bucket_is_never_exceeded_and_used_up() {
    const TIME: Duration = Duration::from_secs(5);
    let used_up = |accuracy: &str, ttl: f64| {
        let limit = format!("{{limit: 200/s, burst: 100, by: constant, accuracy: {accuracy}}}");
        let flood = flood(&limit, NODES, TIME, 10);
        let first = flood
            .admitted
            .iter()
            .map(|(asked, _)| *asked)
            .min()
            .unwrap();
        let last = flood
            .admitted
            .iter()
            .map(|(_, answered)| *answered)
            .max()
            .unwrap();
        let span = (last - first).as_secs_f64();
        let total = flood.admitted.len() as f64;
        let most = 100.0 + 200.0 * (span + ttl);
        println!(
            "{accuracy}: {total} admitted of {} asked in {span:.3} s, at most {most:.0} allowed; {} calls, {} lost",
            flood.asked, flood.calls, flood.lost
        );
        assert!(total <= most);
        total >= 0.98 * (100.0 + 200.0 * TIME.as_secs_f64())
            && flood.asked > 20 * flood.admitted.len() as u64
    };
    for (accuracy, ttl) in [("lease", 0.05), ("strict", 0.0)] {
        assert!((0..ROUNDS).any(|_| used_up(accuracy, ttl)), "{accuracy}");
    }
}

#[test]
fn a_hot_key_costs_less_than_a_call_in_a_hundred_requests() {
    for limit in ["10000000/s", "1000/s"] {
        let limit = format!("{{limit: {limit}, by: constant}}");
        let flood = flood(&limit, 1, Duration::from_secs(3), 20);
        println!(
            "{limit}: {} admitted of {} asked, for {} calls",
            flood.admitted.len(),
            flood.asked,
            flood.calls
        );
        assert!(flood.calls * 100 < flood.asked, "{} calls", flood.calls);
    }
}

#[test]
fn those_who_ask_strictly_of_a_hot_key_share_calls() {
    let limit = "{limit: 10000000/s, by: constant, accuracy: strict}";
    let flood = flood(limit, 1, Duration::from_secs(2), 20);
    println!("{} asked, for {} calls", flood.asked, flood.calls);
    assert!(flood.calls * 4 < flood.asked, "of {AT_A_TIME} at a time");
}

/// A lane whose only limit is `limit`, on a server of its own.
fn on_one_server(server: &Server, limit: &str) -> Lane {
    Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nrate_limits: {{a: {limit}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        Upstream::answering("ok").url(),
        server
            .yaml(&key_prefix())
            .replace("{urls", "{timeout: 5s, urls")
    ))
}

#[test]
fn a_limit_does_what_it_says_while_redis_is_away_and_is_shared_again() {
    let server = Server::single();
    let limit = |on_loss: &str| {
        on_one_server(
            &server,
            &format!("{{limit: 3/h, by: constant, accuracy: strict, on_redis_loss: {on_loss}}}"),
        )
    };
    let lanes = ["local", "allow", "deny"].map(limit);
    let ask = |lane: &Lane| lane.connect().get("/");
    assert_eq!([0, 1, 2].map(|n| ask(&lanes[n]).status), [200; 3]);
    server.kill();
    let five = |lane: &Lane| [(); 5].map(|()| ask(lane).status);
    // In memory the process begins anew: it knows only what it was asked alone.
    assert_eq!(five(&lanes[0]), [200, 200, 200, 429, 429]);
    assert_eq!(five(&lanes[1]), [200; 5]);
    let refused = ask(&lanes[2]);
    assert_eq!(refused.status, 503);
    assert_eq!(refused.field("retry-after"), Some("1"));
    let label = "weir; error=proxy_internal_error; details=\"limit_unknown\"";
    assert_eq!(refused.field("proxy-status"), Some(label));
    let alone = |lane: &Lane| {
        let plan = lane.plan.borrow().clone();
        plan.tell_sharing(clock::mono());
        lane.told("weir_limit_alone{limit=\"a\"}") == Some(1.0)
    };
    assert!(lanes.iter().all(alone));
    server.restart();
    // Redis has lost what it had, so the quota is whole, and used up by those who ask on.
    for lane in &lanes {
        eventually(|| ask(lane).status == 429 && !alone(lane));
    }
}

#[test]
fn what_another_policy_refuses_costs_no_quota_while_redis_is_away() {
    let server = Server::single();
    server.kill();
    let upstream = Upstream::answering("ok");
    // Kept, so that no other test gets its port.
    let closed = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    closed.bind(&loopback.into()).unwrap();
    let gone = closed.local_addr().unwrap().as_socket().unwrap();
    for accuracy in ["lease", "strict"] {
        let limit = |limit: &str, by: &str| {
            format!("{{limit: {limit}, by: {by}, accuracy: {accuracy}, on_redis_loss: local}}")
        };
        let lane = Lane::start(&format!(
            "listen: 127.0.0.1:0\nsessions: {{web: {{}}}}\n\
             upstreams: {{app: {{endpoints: ['{}']}}, gone: {{endpoints: ['http://{gone}'], circuit_breaker: b}}}}\n\
             circuit_breakers: {{b: {{scope: local, window: {{type: count, size: 2}}, minimum_calls: 2, open_for: 1h}}}}\n\
             rate_limits: {{broken: {}, all: {}, each: {}}}\nroutes:\n\
             - {{match: {{path: /gone}}, upstream: gone, rate_limits: [broken]}}\n\
             - {{match: {{path: /broken}}, upstream: app, rate_limits: [broken]}}\n\
             - {{match: {{path: /in}}, upstream: app, rate_limits: [all, each], session: {{use: web}}}}\n\
             - {{match: {{path: /all}}, upstream: app, rate_limits: [all]}}\n{}",
            upstream.url(),
            limit("8/h", "client.ip"),
            limit("3/h", "constant"),
            limit("3/h", "client.ip"),
            server
                .yaml(&key_prefix())
                .replace("{urls", "{timeout: 5s, urls")
        ));
        let status = |path: &str| lane.connect().get(path).status;
        let statuses =
            |path: &str, count: usize| -> Vec<_> { (0..count).map(|_| status(path)).collect() };
        // By a breaker: the two that tripped it were tried, and no other was.
        assert_eq!(statuses("/gone", 12)[..3], [502, 502, 503], "{accuracy}");
        assert_eq!(statuses("/gone", 10), [503; 10], "{accuracy}");
        let left = [200, 200, 200, 200, 200, 200, 429];
        assert_eq!(statuses("/broken", 7), left, "{accuracy}");
        // By the want of a session: a limit that tells clients apart bounds how often one can try.
        assert_eq!(statuses("/in", 4), [401, 401, 401, 429], "{accuracy}");
        assert_eq!(statuses("/all", 4), [200, 200, 200, 429], "{accuracy}");
    }
}

#[test]
fn a_limit_is_told_as_alone_for_a_minute_and_not_past_a_reload() {
    let server = Server::single();
    let (redis, upstream) = (server.yaml(&key_prefix()), Upstream::answering("ok").url());
    let file = |limits: &str| {
        let on = if limits.is_empty() { "" } else { "a" };
        format!(
            "listen: 127.0.0.1:0\nupstream: {upstream}\nrate_limits: {{{limits}}}\n\
             routes: [{{upstream: upstream, rate_limits: [{on}]}}]\n{redis}"
        )
    };
    let limit = |accuracy: &str| format!("a: {{limit: 3/h, by: constant, accuracy: {accuracy}}}");
    let lane = Lane::start(&file(&limit("strict")));
    let told = |later: u64| {
        let plan = lane.plan.borrow().clone();
        plan.tell_sharing(clock::mono() + Duration::from_secs(later));
        lane.told("weir_limit_alone{limit=\"a\"}")
    };
    server.kill();
    let lose = || {
        assert_eq!(lane.connect().get("/").status, 200);
        assert_eq!(told(0), Some(1.0));
    };
    lose();
    assert_eq!(told(61), Some(0.0), "no one has asked since");
    lane.reload(&file(&limit("local")));
    assert_eq!(told(0), Some(0.0));
    lane.reload(&file(&limit("strict")));
    lose();
    lane.reload(&file(""));
    assert_eq!(told(0), None);
}

#[test]
fn processes_alone_keep_to_their_part() {
    let server = Server::single();
    let file = format!(
        "listen: 127.0.0.1:0\nupstream: {}\nrate_limits: {{a: {{limit: 8/h, by: constant}}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        Upstream::answering("ok").url(),
        server.yaml(&key_prefix())
    );
    let lanes = [(); 4].map(|()| Lane::start(&file));
    let alive = |lane: &Lane| lane.plan.borrow().fleet.as_ref().unwrap().alive();
    eventually(|| lanes.iter().all(|lane| alive(lane) == 4));
    server.kill();
    let admitted = |lane: &Lane| {
        let statuses = (0..8).map(|_| lane.connect().get("/").status);
        statuses.filter(|status| *status == 200).count()
    };
    assert_eq!(lanes.each_ref().map(admitted), [2; 4]);
}

/// It hears them one after the other.
#[test]
fn who_lives_is_known_though_redis_comes_back_without_its_data() {
    let (server, prefix) = (Server::single(), key_prefix());
    let file = format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nrate_limits: {{a: {{limit: 8/h, by: constant}}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        server.yaml(&prefix)
    );
    let lanes = [(); 4].map(|()| Lane::start(&file));
    let alive = |lane: &Lane| lane.plan.borrow().fleet.as_ref().unwrap().alive();
    eventually(|| lanes.iter().all(|lane| alive(lane) == 4));
    server.kill();
    server.restart();
    eventually(|| {
        assert_eq!(lanes.each_ref().map(alive), [4; 4]);
        let heard = server.try_cli(&["ZCARD", &Keys::new(&prefix).processes()]);
        heard.is_ok_and(|heard| heard.int() == 4)
    });
    assert_eq!(lanes.each_ref().map(alive), [4; 4]);
}

/// In this process's memory and in Redis.
#[test]
fn a_window_goes_on_whatever_others_come_and_go_beside_it() {
    let (server, upstream) = (Server::single(), Upstream::answering("ok"));
    let year = |limit| Window::Fixed {
        limit,
        period: Period::Year,
    };
    let day = |count| Window::Bucket {
        count,
        per: Duration::from_secs(86_400),
        burst: count,
    };
    let kinds: [(_, _, &dyn Fn(u64) -> Window); 2] =
        [("fixed_window", "year", &year), ("token_bucket", "d", &day)];
    for (algorithm, period, window) in kinds {
        for accuracy in ["local", "strict", "lease"] {
            let redis = server.yaml(&key_prefix());
            let file = |windows: &str| {
                format!(
                    "listen: 127.0.0.1:0\nupstream: {}\n\
                     rate_limits: {{a: {{limit: {windows}, algorithm: {algorithm}, by: 'header:t', accuracy: {accuracy}}}}}\n\
                     routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
                    upstream.url(),
                    redis.replace("{urls", "{timeout: 5s, urls")
                )
            };
            let what = format!("{algorithm} {accuracy}");
            let lane = Lane::start(&file(&format!("[1000/s, 5/{period}]")));
            let status = |lane: &Lane| lane.connect().send("GET", "/", &["t: k"], "").status;
            let statuses = [(); 6].map(|()| status(&lane));
            assert_eq!(statuses, [200, 200, 200, 200, 200, 429], "{what}");
            lane.reload(&file(&format!("5/{period}")));
            assert_eq!(status(&lane), 429, "{what}: one window less");
            lane.reload(&file(&format!("[5/{period}, 1000/m]")));
            assert_eq!(status(&lane), 429, "{what}: another one");
            let counters = lane.plan.borrow().counters.clone();
            // A refusal is believed for a second; and what Redis has of overrides, none, may just be read.
            eventually(|| {
                let says = format!("6/{period}");
                let rules = Rule::Window(window(6)).into();
                counters.set_override("a", "k", Some((&says, Some(rules))));
                status(&lane) == 200
            });
            assert_eq!(status(&lane), 429, "{what}: an override");
        }
    }
}

#[test]
fn a_dear_request_passes_a_process_that_is_alone() {
    let server = Server::single();
    let costing = |cost: &str, algorithm: &str| {
        let file = format!(
            "listen: 127.0.0.1:0\nupstream: {}\n\
             rate_limits: {{a: {{limit: {algorithm}, by: constant, cost: {cost}}}}}\n\
             routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
            Upstream::answering("ok").url(),
            server.yaml(&key_prefix())
        );
        let lanes = [(); 3].map(|()| Lane::start(&file));
        let alive = |lane: &Lane| lane.plan.borrow().fleet.as_ref().unwrap().alive();
        eventually(|| lanes.iter().all(|lane| alive(lane) == 3));
        lanes
    };
    let kinds = [
        "12/h",
        "12/year, algorithm: fixed_window",
        "12/h, algorithm: sliding_window",
    ];
    // More than a third.
    let lanes = kinds.map(|kind| costing("{default: 6}", kind));
    let by_header = kinds.map(|kind| costing("{header: cost}", kind));
    server.kill();
    let each = |lanes: &[[Lane; 3]; 3], ask: &dyn Fn(&Lane, &str)| {
        for (lanes, kind) in lanes.iter().zip(kinds) {
            lanes.iter().for_each(|lane| ask(lane, kind));
        }
    };
    each(&lanes, &|lane, kind| {
        let [first, second] = [(); 2].map(|()| lane.connect().get("/"));
        assert_eq!([first.status, second.status], [200, 429], "{kind}");
        assert!(second.field("retry-after").is_some(), "{kind}");
    });
    // What one request makes room for, another would forget the use of.
    each(&by_header, &|lane, kind| {
        let ask = |cost: u64| {
            lane.connect()
                .send("GET", "/", &[&format!("cost: {cost}")], "")
        };
        let [dear, cheap] = [6, 4].map(ask);
        assert_eq!([dear.status, cheap.status], [429, 200], "{kind}");
        assert!(dear.field("retry-after").is_some(), "{kind}");
    });
}

#[test]
fn a_key_that_was_refused_costs_redis_nothing_until_its_time() {
    let lane = on_one_server(
        &Server::single(),
        "{limit: 1/h, by: constant, accuracy: strict}",
    );
    let mut client = lane.connect();
    assert_eq!([client.get("/").status, client.get("/").status], [200, 429]);
    let calls = || {
        let series = "weir_redis_calls_total{client=\"main\",result=\"answered\"}";
        lane.told(series).unwrap() as u64
    };
    let (before, began) = (calls(), clock::now());
    for _ in 0..1_000 {
        assert_eq!(client.get("/").status, 429);
    }
    let beats = calls() - before;
    eventually(|| {
        let text = lane.plan.borrow().metrics.text();
        let took = "weir_redis_call_duration_seconds_count{client=\"main\"}";
        let made = metrics::sum(&text, "weir_redis_calls_total");
        made > 0.0 && metrics::value(&text, took) == Some(made)
    });
    println!("1,000 refusals, {beats} calls, which are signs of life");
    let most = 10 + 3 * began.elapsed().as_secs();
    assert!(beats < most, "{beats} of {most}");
}

#[test]
fn a_flood_of_a_refused_key_costs_no_calls_by_another_key() {
    let server = Server::single();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nrate_limits:\n  a: {{limit: 1/h, by: constant}}\n  b: {{limit: 9/h, by: 'header:t'}}\n\
         routes: [{{upstream: upstream, rate_limits: [a, b]}}]\n{}",
        Upstream::answering("ok").url(),
        server
            .yaml(&key_prefix())
            .replace("{urls", "{timeout: 5s, urls")
    ));
    let mut client = lane.connect();
    let mut ask = |n: usize| client.send("GET", "/", &[&format!("t: {n}")], "").status;
    assert_eq!([ask(0), ask(1)], [200, 429]);
    for n in 2..300 {
        assert_eq!(ask(n), 429);
    }
    let keys = server.cli(&["KEYS", "*:l:*"]);
    println!(
        "300 keys asked about in a flood, {} known to redis",
        keys.list().len()
    );
    // Those of the two requests before it was known that the first limit refuses.
    // A refusal is believed for a second.
    assert!(keys.list().len() <= 6);
}

/// Limits of one request, each in the order of the file.
fn beside_each_other(server: &Server, limits: &str) -> Lane {
    Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nrate_limits: {{{limits}}}\n\
         routes: [{{upstream: upstream, rate_limits: [shared, here]}}]\n{}",
        Upstream::answering("ok").url(),
        server
            .yaml(&key_prefix())
            .replace("{urls", "{timeout: 5s, urls")
    ))
}

#[test]
fn what_this_process_refuses_costs_no_calls_and_no_shared_quota() {
    let server = Server::single();
    for shared in ["limit: 9/h", "limit: 9, algorithm: concurrency"] {
        let shared = format!("{{{shared}, by: 'header:t', accuracy: strict}}");
        let here = "{limit: 1/h, by: constant, accuracy: local}";
        server.cli(&["FLUSHALL"]);
        let lane = beside_each_other(&server, &format!("shared: {shared}, here: {here}"));
        let mut client = lane.connect();
        let mut ask = |n: usize| client.send("GET", "/", &[&format!("t: {n}")], "").status;
        assert_eq!(ask(0), 200);
        let known = || {
            let keys = ["*:l:*", "*:c:*"].map(|keys| server.cli(&["KEYS", keys]));
            keys.iter().map(|keys| keys.list().len()).sum::<usize>()
        };
        let before = known();
        for n in 1..100 {
            assert_eq!(ask(n), 429, "{shared}");
        }
        assert!(known() <= before, "{shared}");
    }
}

#[test]
fn what_redis_refuses_costs_this_process_no_quota() {
    let limits = "shared: {limit: 1/h, by: 'header:t', accuracy: strict}, here: {limit: 3/h, by: constant, accuracy: local}";
    let lane = beside_each_other(&Server::single(), limits);
    let status = |tenant: &&str| {
        let field = format!("t: {tenant}");
        lane.connect().send("GET", "/", &[&field], "").status
    };
    let statuses = ["a", "a", "b", "b", "c", "d"].each_ref().map(status);
    assert_eq!(statuses, [200, 429, 200, 429, 200, 429]);
}

#[test]
fn slots_are_never_more_than_the_limit_and_come_back() {
    let upstream = Upstream::held();
    let file = |prefix: &str| {
        format!(
            "listen: 127.0.0.1:0\nupstream: {}\n\
             rate_limits: {{a: {{limit: 2, by: constant, algorithm: concurrency, hold_ttl: 5s}}}}\n\
             routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
            upstream.url(),
            Cluster::shared()
                .yaml(prefix)
                .replace("{urls", "{timeout: 5s, urls")
        )
    };
    let prefix = key_prefix();
    let lanes = [(); 3].map(|()| Lane::start(&file(&prefix)));
    let begin = |lane: &Lane| {
        let mut client = lane.connect();
        client.begin("GET", "/", &[], "");
        upstream.wait_for_request();
        client
    };
    let (mut first, mut second) = (begin(&lanes[0]), begin(&lanes[1]));
    for lane in &lanes {
        assert_eq!(lane.connect().get("/").status, 429);
    }
    // Longer than an unheard process would keep its slots.
    thread::sleep(Duration::from_secs(7));
    assert_eq!(
        lanes[2].connect().get("/").status,
        429,
        "slots in use are kept"
    );
    upstream.answer("done");
    assert_eq!(first.finish().body, "done");
    let mut third: Option<Client> = None;
    eventually(|| {
        let mut client = lanes[2].connect();
        client.begin("GET", "/", &[], "");
        let (mut is_held, mut refused) = (false, None);
        eventually(|| {
            is_held = upstream.requests.try_recv().is_ok();
            refused = client.status_within(10);
            is_held || refused.is_some()
        });
        if is_held {
            third = Some(client);
        }
        third.is_some()
    });
    upstream.answer("done");
    assert_eq!(second.finish().body, "done");
    drop(third);
}

#[test]
fn a_weir_that_is_stopped_leaves_its_slots_to_others() {
    let (upstream, server) = (Upstream::held(), Server::single());
    let text = format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: {}\nshutdown: {{drain: 50ms}}\n\
         rate_limits: {{a: {{limit: 2, by: constant, algorithm: concurrency, hold_ttl: 1m}}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        upstream.url(),
        server.yaml("t").replace("{urls", "{timeout: 5s, urls")
    );
    // Whether a round is due just then is chance.
    for _ in 0..5 {
        let mut weir = Running::start(file(&text).path());
        let mut client = weir.client();
        client.begin("GET", "/", &[], "");
        upstream.wait_for_request();
        weir.signal("TERM");
        assert!(weir.child.wait().unwrap().success());
        let keys = server.cli(&["KEYS", "t:c:*"]);
        for key in keys.list() {
            let slots = server.cli(&["HVALS", key.text()]);
            let taken = slots
                .list()
                .iter()
                .filter(|it| !it.text().starts_with("0:"));
            assert_eq!(taken.count(), 0, "{slots:?}");
        }
    }
}

#[test]
fn keys_of_shared_limits_are_counted() {
    let (upstream, server) = (Upstream::answering("ok"), Server::single());
    let text = format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: {}\n\
         rate_limits: {{a: {{limit: 10/h, by: path}}}}\nroutes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        upstream.url(),
        server.yaml("t")
    );
    let weir = Running::start(file(&text).path());
    let mut client = weir.client();
    for path in 0..50 {
        assert_eq!(client.get(&format!("/{path}")).status, 200);
    }
    assert_eq!(weir.metric("weir_limit_keys"), 50);
    let local = ["Host: 127.0.0.1"];
    let shown = weir.admin().send("GET", "/v1/limits", &local, "").body;
    assert!(shown.contains("\"keys\":50"), "{shown}");
}

#[test]
fn keys_that_make_room_for_others_are_counted() {
    let (upstream, server) = (Upstream::answering("ok"), Server::single());
    // No call is given up, whose key might be let go of twice.
    let patient = server.yaml("t").replace("{urls", "{timeout: 5s, urls");
    for redis in [String::new(), patient] {
        let text = format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: {}\n\
             rate_limit_defaults: {{max_keys: 64}}\nrate_limits: {{a: {{limit: 10/h, by: path}}}}\n\
             routes: [{{upstream: upstream, rate_limits: [a]}}]\n{redis}",
            upstream.url()
        );
        let weir = Running::start(file(&text).path());
        let mut client = weir.client();
        for path in 0..500 {
            assert_eq!(client.get(&format!("/{path}")).status, 200);
        }
        let held = weir.metric("weir_limit_keys");
        assert!((1..=64).contains(&held), "{held}: {redis}");
        let evicted = weir.metric("weir_limit_keys_evicted_total");
        assert_eq!(held + evicted, 500, "{redis}");
    }
}

#[test]
fn strict_takes_no_more_than_is_spent() {
    let server = Server::single();
    let limit = "{limit: 1000000/year, algorithm: fixed_window, by: constant, accuracy: strict}";
    let file = one_limit(&server, limit, 1_000);
    let admitted = run(async {
        let node = Node::start(&file).await;
        let mut admitted = 0;
        for _ in 0..50 {
            let decisions = join_all((0..16).map(|_| ask(&node))).await;
            let is_admitted = |decision: &&Decision| matches!(decision, Decision::Admitted(_));
            admitted += decisions.iter().filter(is_admitted).count();
            // Some wait for the answer to another, and their clients leave.
            let mut asks = std::pin::pin!(ask(&node));
            assert_eq!((&mut asks).now_or_never(), None);
            let leave = join_all((0..15).map(|_| ask(&node)));
            assert_eq!(leave.now_or_never(), None);
            for decision in [asks.await, ask(&node).await] {
                assert!(is_admitted(&&decision));
                admitted += 1;
            }
        }
        admitted
    });
    let keys = server.cli(&["KEYS", "*:l:*"]);
    let counter = server.cli(&["GET", keys.list()[0].text()]);
    let (_, used) = counter.text().split_once(':').unwrap();
    println!("{admitted} admitted, {used} taken of the limit");
    assert_eq!(used, admitted.to_string());
}

/// The file of a process with this limit alone, on a server of its own.
fn one_limit(server: &Server, limit: &str, max_keys: usize) -> String {
    format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nrate_limits: {{a: {limit}}}\n\
         rate_limit_defaults: {{max_keys: {max_keys}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        server
            .yaml(&key_prefix())
            .replace("{urls", "{timeout: 5s, urls")
    )
}

/// A request to a limit whose key is constant.
async fn ask(node: &Node) -> Decision {
    node.ask(&[], clock::mono()).await
}

#[test]
fn keys_without_a_slot_in_use_are_held_in_bounded_memory() {
    const KEYS: usize = 2_000;
    const MOST: usize = 64;
    let server = Server::single();
    let limit = "{limit: 3, algorithm: concurrency, by: 'header:t', hold_ttl: 5s}";
    let file = one_limit(&server, limit, MOST);
    let names: Vec<_> = (0..KEYS).map(|n| n.to_string()).collect();
    run(async {
        let node = Node::start(&file).await;
        let all = async |cost| join_all(names.iter().map(|key| node.take_slot(key, cost))).await;
        let never = Decision::Refused { retry_after: None };
        assert!(all(4).await.iter().all(|decision| *decision == never));
        let refused = node.keys_of_slots();

        let admitted = |decision: &Decision| matches!(decision, Decision::Admitted(_));
        assert!(all(1).await.iter().all(admitted));
        let in_use = node.keys_of_slots();
        names.iter().for_each(|key| node.release_slot(key));
        soon(|| node.keys_of_slots() == 0).await;

        server.kill();
        let lost = all(1).await;
        assert!(lost.iter().all(|decision| *decision == Decision::Lost));
        for n in 0..1_000 {
            let lost = node.take_slot(&format!("other {n}"), 1).await;
            assert_eq!(lost, Decision::Lost);
        }
        let away = node.keys_of_slots();
        println!("{KEYS} keys: {refused} held when refused, {in_use} in use, {away} without redis");
        assert_eq!(in_use, KEYS);
        assert!(refused <= MOST && away <= MOST);
        server.restart();
        soon(|| node.keys_of_slots() == 0).await;
    });
}

#[test]
fn a_dear_request_that_is_refused_leaves_the_free_slots_to_others() {
    let server = Server::single();
    let limit = "{limit: 10, algorithm: concurrency, by: 'header:t', hold_ttl: 1m}";
    let file = one_limit(&server, limit, 1_000);
    run(async {
        let [one, two, three] = [
            Node::start(&file).await,
            Node::start(&file).await,
            Node::start(&file).await,
        ];
        let admitted = |decision: Decision| matches!(decision, Decision::Admitted(_));
        assert!(admitted(one.take_slot("k", 6).await));
        assert!(!admitted(two.take_slot("k", 5).await));
        assert!(admitted(three.take_slot("k", 3).await));
        // The refusal is of dear ones alone, and of those who ask at one time each gets what there is.
        let asks = [5, 5, 1].map(|cost| two.take_slot("k", cost));
        let decided = join_all(asks).await.into_iter().map(admitted);
        assert_eq!(decided.collect::<Vec<_>>(), [false, false, true]);
    });
}

/// It asks about each of its limits at one time.
#[test]
fn a_slot_of_a_request_that_is_gone_before_all_answers_comes_free() {
    let server = Server::single();
    let limit = "{limit: 1, algorithm: concurrency, by: 'header:t', hold_ttl: 1m}";
    let file = one_limit(&server, limit, 1_000);
    run(async {
        let node = Node::start(&file).await;
        let parts = [Cow::Borrowed(&b"k"[..])];
        let rules = node.plan.config.limits[0].rules.as_ref().unwrap();
        let Some(SharedAsk::Slots(ask)) = node.plan.shared_ask(0, &parts, rules, 1) else {
            panic!("no concurrency limit")
        };
        let slots = &node.plan.shared_limits.as_ref().unwrap().slots;
        let asking = join(slots.take(&node.redis.rate_limit, &ask), pending::<()>());
        tokio::select! {
            _ = asking => unreachable!("one is never answered"),
            () = soon(|| slots.verdict(&ask, Decision::Lost).remaining == 0) => {}
        }
        soon(|| node.keys_of_slots() == 0).await;
    });
}

/// A way to a server, until its task is ended.
async fn way_to(server: SocketAddr) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut ways = JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            let mut there = TcpStream::connect(server).await.unwrap();
            ways.spawn(async move { copy_bidirectional(&mut near, &mut there).await });
        }
    });
    (address, task)
}

/// Its next sign of life would be due in 20 minutes.
#[test]
fn slots_in_use_are_told_to_a_redis_that_comes_back_without_its_data() {
    let (upstream, server) = (Upstream::held(), Server::single());
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\n\
         rate_limits: {{a: {{limit: 2, by: constant, algorithm: concurrency, hold_ttl: 1h}}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        upstream.url(),
        server.yaml("t").replace("{urls", "{timeout: 5s, urls")
    ));
    let clients = [(); 2].map(|()| {
        let mut client = lane.connect();
        client.begin("GET", "/", &[], "");
        upstream.wait_for_request();
        client
    });
    let told = || {
        let keys = server.try_cli(&["KEYS", "t:c:*"]).ok()?;
        let slots = server.try_cli(&["HVALS", keys.list().first()?.text()]);
        Some(slots.ok()?.list().first()?.text().starts_with("2:"))
    };
    eventually(|| told() == Some(true));
    // All is told: nothing is left to be said by chance.
    thread::sleep(Duration::from_millis(200));
    server.kill();
    server.restart();
    eventually(|| told() == Some(true));
    for mut client in clients {
        upstream.answer("done");
        assert_eq!(client.finish().status, 200);
    }
}

/// Messages are heard of one of them.
#[test]
fn slots_in_use_are_told_to_any_master_that_comes_back_without_its_data() {
    let (upstream, cluster) = (Upstream::held(), Cluster::start());
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], timeout: 5m}}}}\n\
         rate_limits: {{a: {{limit: 1, by: 'header:t', algorithm: concurrency, hold_ttl: 1h}}}}\n\
         routes: [{{upstream: app, rate_limits: [a]}}]\n{}",
        upstream.url(),
        cluster.yaml("t").replace("{urls", "{timeout: 5s, urls")
    ));
    let clients: Vec<_> = (0..12)
        .map(|n| {
            let mut client = lane.connect();
            client.begin("GET", "/", &[&format!("t: {n}")], "");
            upstream.wait_for_request();
            client
        })
        .collect();
    let told = |node: usize| {
        let node = &cluster.nodes[node];
        let keys = node.try_cli(&["KEYS", "t:c:*"]);
        let in_use = |key: &&Answer| {
            let slots = node.try_cli(&["HVALS", key.text()]);
            slots.is_ok_and(|it| it.list().iter().any(|it| it.text().starts_with("1:")))
        };
        keys.map_or(0, |keys| keys.list().iter().filter(in_use).count())
    };
    eventually(|| (0..3).map(told).sum::<usize>() == clients.len());
    // All is told: nothing is left to be said by chance.
    thread::sleep(Duration::from_millis(200));
    let is_heard = |node: &usize| {
        let channels = cluster.cli(*node, &["PUBSUB", "CHANNELS", "t:limits*"]);
        !channels.list().is_empty()
    };
    eventually(|| (0..3).any(|node| is_heard(&node)));
    let unheard = (0..3).find(|node| !is_heard(node)).unwrap();
    let held = told(unheard);
    assert!(held > 0);
    // Else it would take over.
    cluster.kill(cluster.replica_of(unheard));
    cluster.kill(unheard);
    cluster.restart(unheard);
    eventually(|| told(unheard) == held);
    for mut client in clients {
        upstream.answer("done");
        assert_eq!(client.finish().status, 200);
    }
}

/// Cut off from Redis, its requests go on for longer than that keeps slots for it.
#[test]
fn slots_that_others_may_have_by_now_admit_no_one() {
    let server = Server::single();
    let limit = "{limit: 2, algorithm: concurrency, by: 'header:t', hold_ttl: 1s}";
    let file = one_limit(&server, limit, 1_000);
    run(async {
        let admitted = |decision: &Decision| matches!(decision, Decision::Admitted(_));
        for attempt in 0.. {
            let (way, task) = way_to(server.address()).await;
            let by_way = file.replace(&server.address().to_string(), &way.to_string());
            let (cut_off, other) = (Node::start(&by_way).await, Node::start(&file).await);
            let key = attempt.to_string();
            let began = clock::mono();
            for _ in 0..2 {
                let taken = cut_off.take_slot(&key, 1).await;
                assert!(admitted(&taken), "{taken:?}");
            }
            task.abort();
            // Nobody else is given them meanwhile.
            cut_off.release_slot(&key);
            let taken = cut_off.take_slot(&key, 1).await;
            let took = clock::mono() - began;
            if took >= Duration::from_secs(1) {
                println!("others may have had them after {took:?}: begun anew");
                continue;
            }
            assert!(admitted(&taken), "{taken:?} after {took:?}");
            let mut taken = 0;
            while taken < 2 {
                taken += usize::from(admitted(&other.take_slot(&key, 1).await));
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            cut_off.release_slot(&key);
            assert_eq!(cut_off.take_slot(&key, 1).await, Decision::Lost);
            break;
        }
    });
}

#[test]
fn slots_that_come_and_go_and_come_are_told_to_redis() {
    const KEYS: usize = 500;
    let server = Server::single();
    // Longer than a busy machine keeps the process from saying that it holds them.
    let limit = "{limit: 3, algorithm: concurrency, by: 'header:t', hold_ttl: 5s}";
    let file = one_limit(&server, limit, 10_000);
    let names: Vec<_> = (0..KEYS).map(|n| n.to_string()).collect();
    let known = || server.cli(&["KEYS", "*:c:*"]).list().len();
    run(async {
        let node = Node::start(&file).await;
        let (node, names) = (&node, &names);
        let until = clock::mono() + Duration::from_secs(2);
        let churn = async |_| {
            while clock::mono() < until {
                let key = &names[fastrand::usize(..KEYS)];
                let taken = node.take_slot(key, 1).await;
                tokio::time::sleep(Duration::from_micros(fastrand::u64(..2_000))).await;
                if matches!(taken, Decision::Admitted(_)) {
                    node.release_slot(key);
                }
            }
        };
        join_all((0..32).map(churn)).await;
        for key in names {
            let taken = node.take_slot(key, 1).await;
            assert!(matches!(taken, Decision::Admitted(_)), "{taken:?}");
        }
        // Longer than slots last of which Redis hears nothing.
        tokio::time::sleep(Duration::from_millis(7_500)).await;
        let held = known();
        println!("{held} of {KEYS} slots in use are known to redis");
        assert_eq!(held, KEYS);
        names.iter().for_each(|key| node.release_slot(key));
        soon(|| known() == 0 && node.keys_of_slots() == 0).await;
    });
}
