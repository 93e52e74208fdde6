//! Upstreams of several endpoints: which of them takes a request, what becomes of those that are down, names that change, and caps.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::harness::peers::Peer;
use super::harness::process::{Running, file};
use super::harness::raw::Recorder;
use super::harness::servers::{NameServer, Server};
use super::harness::versions::{Length, Origin, Version, run, soon};
use super::harness::{Client, DEADLINE, Lane, Upstream, eventually, ok, raw};

/// A lane before these endpoints, with `settings` of the upstream.
fn lane(servers: &[Server], settings: &str) -> Lane {
    Lane::start(&config(servers, settings))
}

fn config(servers: &[Server], settings: &str) -> String {
    let urls: Vec<_> = servers.iter().map(Server::url).collect();
    of_endpoints(&format!("{urls:?}"), settings)
}

fn of_endpoints(endpoints: &str, settings: &str) -> String {
    let settings = match settings {
        "" => String::new(),
        settings => format!(", {settings}"),
    };
    format!("listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: {endpoints}{settings}}}}}\n")
}

fn servers<const N: usize>() -> [Server; N] {
    std::array::from_fn(|_| Server::start())
}

/// How many of `count` requests each endpoint answered; all must be.
fn spread(client: &mut Client, count: usize) -> BTreeMap<String, usize> {
    let mut answered = BTreeMap::new();
    for _ in 0..count {
        let reply = client.get("/");
        assert_eq!(reply.status, 200, "{reply:?}");
        *answered.entry(reply.body).or_default() += 1;
    }
    answered
}

/// Waits until so many endpoints are up.
fn until_up(lane: &Lane, up: usize) {
    eventually(|| lane.plan.borrow().upstreams[0].live.counts().up == up);
}

#[test]
fn round_robin_goes_round() {
    let servers = servers::<3>();
    let lane = lane(&servers, "load_balancing: round_robin");
    let answered = spread(&mut lane.connect(), 30);
    assert_eq!(answered.into_values().collect::<Vec<_>>(), [10, 10, 10]);
    assert!(servers.iter().all(|server| server.connections() == 1));
}

#[test]
fn least_request_leaves_busy_endpoints_alone() {
    let (busy, free) = (Upstream::held(), Server::start());
    let endpoints = format!("['{}', '{}']", busy.url(), free.url());
    let lane = Lane::start(&of_endpoints(&endpoints, ""));
    // Holds one request at the busy one.
    let mut waiting = loop {
        let mut client = lane.connect();
        client.begin("GET", "/", &[], "");
        let mut is_held = false;
        eventually(|| {
            is_held = busy.requests.try_recv().is_ok();
            is_held || client.status_within(10).is_some()
        });
        if is_held {
            break client;
        }
    };
    let answered = spread(&mut lane.connect(), 20);
    assert_eq!(
        answered.into_keys().collect::<Vec<_>>(),
        [free.address.to_string()]
    );
    busy.answer("late");
    assert_eq!(waiting.finish().body, "late");
}

#[test]
fn a_key_stays_at_its_endpoint_until_that_is_down() {
    let servers = servers::<4>();
    let settings =
        "load_balancing: {ring_hash: {by: header:x-key}}, health: {path: /healthz, interval: 20ms}";
    let lane = lane(&servers, settings);
    let mut client = lane.connect();
    let ask = |client: &mut Client, key: u32| {
        client
            .send("GET", "/", &[&format!("X-Key: {key}")], "")
            .body
    };
    let all = |client: &mut Client| (0..40).map(|key| ask(client, key)).collect::<Vec<_>>();
    let before = all(&mut client);
    assert_eq!(before.iter().collect::<BTreeSet<_>>().len(), 4);
    assert_eq!(all(&mut client), before, "each key stays");
    // The same in another process.
    let other = Lane::start(&config(&servers, settings));
    assert_eq!(all(&mut other.connect()), before);
    servers[0].says_of_its_health(503);
    until_up(&lane, 3);
    let gone = servers[0].address.to_string();
    for (was, now) in before.iter().zip(all(&mut client)) {
        assert!(
            if *was == gone {
                now != gone
            } else {
                now == *was
            },
            "{was} {now}"
        );
    }
    servers[0].says_of_its_health(200);
    until_up(&lane, 4);
    assert_eq!(all(&mut client), before);
    // The first of several is taken, and without a key a request goes anywhere.
    let key = "X-Key: 7";
    let one = client.send("GET", "/", &[key], "").body;
    for other in 0..20 {
        let two = [key, &format!("X-Key: {other}")];
        assert_eq!(client.send("GET", "/", &two, "").body, one);
    }
    assert_eq!(spread(&mut client, 60).len(), 4);
}

#[test]
fn an_unhealthy_endpoint_gets_no_requests_until_it_is_well() {
    let servers = servers::<3>();
    let lane = lane(
        &servers,
        "load_balancing: round_robin, health: {path: /healthz, interval: 20ms, timeout: 5s, unhealthy_after: 2, healthy_after: 2}",
    );
    eventually(|| servers.iter().all(|server| server.checks() > 0));
    let mut client = lane.connect();
    assert_eq!(spread(&mut client, 9).len(), 3);
    servers[1].says_of_its_health(404);
    until_up(&lane, 2);
    let answered = spread(&mut client, 9);
    assert!(
        !answered.contains_key(&servers[1].address.to_string()),
        "{answered:?}"
    );
    servers[1].says_of_its_health(302);
    until_up(&lane, 3);
    assert_eq!(spread(&mut client, 9).len(), 3);
    // One that is gone fails its checks, too.
    servers[2].kill();
    until_up(&lane, 2);
    let failed = r#"weir_upstream_health_checks_total{upstream="app",result="failed"}"#;
    assert!(lane.told(failed).unwrap() >= 4.0);
}

#[test]
fn operators_are_told_why_an_endpoint_is_out() {
    let shown = |weir: &Running| -> Value {
        let host = ["Host: localhost"];
        let reply = weir.admin().send("GET", "/v1/upstreams/app", &host, "");
        assert_eq!(reply.status, 200, "{reply:?}");
        serde_json::from_str(&reply.body).unwrap()
    };
    let at = |shown: &Value, address: SocketAddr| {
        let mut all = shown["endpoints"].as_array().unwrap().iter();
        let found = all.find(|it| it["endpoint"] == address.to_string());
        found.unwrap_or_else(|| panic!("{shown}")).clone()
    };
    let [missing, gone, slow] = servers::<3>();
    missing.says_of_its_health(404);
    gone.kill();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().map(|address| (silent, address));
    let (_silent, silent) = silent.unwrap();
    let other = raw::scripted(|mut stream| drop(stream.write_all(b"220 mail.example ESMTP\r\n")));
    let endpoints = [missing.address, gone.address, silent, other, slow.address];
    let endpoints = endpoints.map(|address| format!("http://{address}"));
    let config = |endpoints: &str, settings: &str| {
        let text = of_endpoints(endpoints, settings);
        file(&format!("{text}admin: {{address: 127.0.0.1:0}}\n"))
    };
    let checked = "health: {path: /healthz, interval: 20ms, timeout: 900ms, unhealthy_after: 1}";
    let weir = Running::start(config(&format!("{endpoints:?}"), checked).path());
    let lines: Vec<_> = (0..4)
        .map(|_| weir.log_until("endpoint is unhealthy, by its checks"))
        .collect();
    for (endpoint, why) in [
        (missing.address, "status 404"),
        (gone.address, "Connection refused (os error 111)"),
        (silent, "no answer within 900ms"),
        (other, "an answer that is not HTTP"),
    ] {
        let of_it = |line: &&String| line.contains(&endpoint.to_string());
        let line = lines.iter().find(of_it);
        let line = line.unwrap_or_else(|| panic!("{endpoint}: {lines:?}"));
        assert!(line.contains(&format!("why={why:?}")), "{line}");
        let expected = json!({
            "endpoint": endpoint.to_string(), "state": "unhealthy", "why": why, "ejected_for_seconds": null, "requests": 0,
        });
        assert_eq!(at(&shown(&weir), endpoint), expected);
    }
    let up = at(&shown(&weir), slow.address);
    assert_eq!((&up["state"], &up["why"]), (&json!("up"), &Value::Null));

    slow.answers(503);
    let judged = "outlier_detection: {consecutive_5xx: 3, base_ejection_time: 1h}";
    let both = [slow.url(), missing.url()];
    let weir = Running::start(config(&format!("{both:?}"), judged).path());
    let mut client = weir.client();
    eventually(|| {
        client.get("/");
        weir.metric("weir_upstream_ejections_total{upstream=\"app\"}") == 1
    });
    let line = weir.log_until("endpoint is ejected for a while");
    for part in [
        &slow.address.to_string(),
        "failures=3",
        "last=\"status 503\"",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let out = at(&shown(&weir), slow.address);
    assert_eq!(
        (&out["state"], &out["why"]),
        (&json!("ejected"), &json!("status 503"))
    );
    let left = out["ejected_for_seconds"].as_f64().unwrap();
    assert!((3500.0..=3600.0).contains(&left), "{out}");
}

#[test]
fn an_endpoint_that_fails_requests_is_ejected_and_taken_back() {
    let servers = servers::<3>();
    let lane = lane(
        &servers,
        "load_balancing: round_robin, outlier_detection: {consecutive_5xx: 3, interval: 20ms, base_ejection_time: 9s}",
    );
    let mut client = lane.connect();
    servers[0].answers(500);
    servers[1].answers(500);
    let failures = (0..60).filter(|_| client.get("/").status == 500).count();
    // Of three endpoints one may be ejected: 10 % allow none, and one always is.
    let counts = lane.plan.borrow().upstreams[0].live.counts();
    assert_eq!((counts.ejected, counts.up), (1, 2));
    assert!(failures >= 3 + 20, "{failures}");
    assert_eq!(
        lane.told(r#"weir_upstream_ejections_total{upstream="app"}"#),
        Some(1.0)
    );
    servers[0].answers(200);
    servers[1].answers(200);
    until_up(&lane, 3);
    assert_eq!(spread(&mut client, 9).len(), 3);
}

#[test]
fn connections_that_fail_eject_too() {
    let servers = servers::<2>();
    let lane = lane(
        &servers,
        "load_balancing: round_robin, outlier_detection: {consecutive_5xx: 2, base_ejection_time: 1h, max_ejection_percent: 50}",
    );
    let mut client = lane.connect();
    servers[0].kill();
    let failures = (0..20)
        .filter(|_| lane.connect().get("/").status == 502)
        .count();
    assert_eq!(failures, 2);
    assert_eq!(spread(&mut client, 10).len(), 1);
}

#[test]
fn all_endpoints_are_used_when_too_few_are_up() {
    let servers = servers::<3>();
    let health = "health: {path: /healthz, interval: 20ms, unhealthy_after: 1}";
    let steady = lane(&servers, health);
    let never = lane(&servers, &format!("{health}, panic_threshold: 0%"));
    servers[0].says_of_its_health(500);
    until_up(&steady, 2);
    assert!(!steady.plan.borrow().upstreams[0].live.counts().panic);
    servers[1].says_of_its_health(500);
    until_up(&steady, 1);
    assert!(steady.plan.borrow().upstreams[0].live.counts().panic);
    assert_eq!(spread(&mut steady.connect(), 60).len(), 3);
    servers[2].says_of_its_health(500);
    until_up(&steady, 0);
    until_up(&never, 0);
    assert_eq!(spread(&mut steady.connect(), 60).len(), 3);
    let mut client = never.connect();
    for _ in 0..2 {
        let reply = client.get("/");
        assert_eq!((reply.status, reply.field("retry-after")), (503, Some("1")));
        let status = reply.field("proxy-status").unwrap();
        assert_eq!(
            status,
            "weir; error=destination_unavailable; details=\"no_endpoint\""
        );
    }
}

#[test]
fn an_endpoint_that_comes_back_begins_slowly() {
    let servers = servers::<2>();
    let lane = lane(
        &servers,
        "health: {path: /healthz, interval: 20ms, unhealthy_after: 1, healthy_after: 1}, slow_start: {window: 1h, min_weight: 2%}",
    );
    let mut client = lane.connect();
    assert_eq!(spread(&mut client, 60).len(), 2);
    servers[0].says_of_its_health(500);
    until_up(&lane, 1);
    servers[0].says_of_its_health(200);
    until_up(&lane, 2);
    let answered = spread(&mut client, 500);
    let part = answered
        .get(&servers[0].address.to_string())
        .copied()
        .unwrap_or(0);
    // 2 % of 102 %, which is 10 of 500.
    assert!(part < 50, "{part}");
}

#[test]
fn an_endpoint_that_is_taken_back_begins_slowly() {
    let servers = servers::<2>();
    let lane = lane(
        &servers,
        "outlier_detection: {consecutive_5xx: 1, interval: 20ms, base_ejection_time: 500ms}, slow_start: {window: 1h, min_weight: 2%}",
    );
    let mut client = lane.connect();
    assert_eq!(spread(&mut client, 60).len(), 2);
    servers[0].answers(500);
    eventually(|| {
        client.get("/");
        lane.plan.borrow().upstreams[0].live.counts().ejected == 1
    });
    servers[0].answers(200);
    until_up(&lane, 2);
    let answered = spread(&mut client, 500);
    let part = answered.get(&servers[0].address.to_string());
    // 2 % of 102 %, which is 10 of 500.
    assert!(part.is_none_or(|part| *part < 50), "{part:?}");
}

#[test]
fn a_success_between_failures_ejects_no_one() {
    let servers = servers::<2>();
    let lane = lane(
        &servers,
        "load_balancing: round_robin, outlier_detection: {consecutive_5xx: 3, base_ejection_time: 1h}",
    );
    let mut client = lane.connect();
    for status in [500, 500, 200].repeat(4) {
        servers[0].answers(status);
        // One each.
        let statuses = [(); 2].map(|()| client.get("/").status);
        assert!(statuses.contains(&status), "{statuses:?}");
    }
    let counts = lane.plan.borrow().upstreams[0].live.counts();
    assert_eq!((counts.ejected, counts.up), (0, 2));
}

#[test]
fn requests_over_the_cap_wait_and_then_are_refused() {
    let upstream = Upstream::held();
    let settings = "connect_timeout: 3s, concurrency: {max: 1, pending: 1}";
    let lane = Lane::start(&of_endpoints(&format!("'{}'", upstream.url()), settings));
    let mut first = lane.connect();
    first.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    // One may wait, and gets its turn.
    let mut second = lane.connect();
    second.begin("GET", "/", &[], "");
    eventually(|| lane.plan.borrow().upstreams[0].live.under_way() == 2);
    assert_eq!(second.status_within(100), None);
    // A third would be one too many.
    let mut third = lane.connect();
    for _ in 0..2 {
        let reply = third.get("/");
        assert_eq!((reply.status, reply.field("retry-after")), (503, Some("1")));
        let status = reply.field("proxy-status").unwrap();
        assert_eq!(
            status,
            "weir; error=connection_limit_reached; details=\"overloaded\""
        );
    }
    assert_eq!(lane.plan.borrow().upstreams[0].live.under_way(), 2);
    upstream.answer("first");
    assert_eq!(first.finish().body, "first");
    upstream.wait_for_request();
    upstream.answer("second");
    assert_eq!(second.status_within(5_000), Some(200));
    assert_eq!(second.finish_body(), "second");
    // No turn comes in time.
    first.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    second.begin("GET", "/", &[], "");
    assert_eq!(second.status_within(10_000), Some(503));
    upstream.answer("third");
    assert_eq!(first.finish().body, "third");
    let over = |cap| {
        lane.told(&format!(
            r#"weir_upstream_overloads_total{{upstream="app",cap="{cap}"}}"#
        ))
    };
    assert_eq!((over("pending"), over("requests")), (Some(2.0), Some(1.0)));
    eventually(|| lane.plan.borrow().upstreams[0].live.under_way() == 0);
}

#[test]
fn idle_connections_make_room_for_new_ones() {
    let servers = servers::<2>();
    let lane = lane(
        &servers,
        "load_balancing: round_robin, concurrency: {max_connections: 1}",
    );
    assert_eq!(spread(&mut lane.connect(), 6).len(), 2);
    assert_eq!(servers.iter().map(Server::connections).sum::<usize>(), 6);
}

/// A lane has no use for the connections of another, and must get their places all the same.
#[test]
fn idle_connections_of_one_lane_make_room_for_another() {
    let server = Server::start();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 4}}\n\
         upstreams: {{app: {{endpoints: '{}', connect_timeout: 5s, concurrency: {{max_connections: 1}}}}}}\n",
        server.url()
    ));
    let running = Running::start(config.path());
    // The kernel deals connections out to lanes.
    let mut clients: Vec<_> = (0..16).map(|_| Client::to(&*running.address)).collect();
    for _ in 0..3 {
        for client in &mut clients {
            assert_eq!(client.get("/").status, 200);
        }
    }
    assert!(server.connections() > 1, "one lane had them all");
}

#[test]
fn a_connection_that_was_closed_leaves_its_place_to_the_next() {
    // It answers once, and closes as the next request comes.
    let upstream = raw::scripted(|mut stream| {
        if raw::read_head(&mut stream).is_some() {
            let _ = stream.write_all(ok("served").as_bytes());
            let _ = raw::read_head(&mut stream);
        }
    });
    let endpoints = format!("'http://{upstream}'");
    let lane = Lane::start(&of_endpoints(
        &endpoints,
        "concurrency: {max_connections: 1}",
    ));
    spread(&mut lane.connect(), 4);
}

#[test]
fn connections_over_the_cap_are_refused() {
    let upstream = Upstream::held();
    let settings = "connect_timeout: 3s, concurrency: {max_connections: 1}";
    let lane = Lane::start(&of_endpoints(&format!("'{}'", upstream.url()), settings));
    let mut first = lane.connect();
    first.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    assert_eq!(lane.connect().get("/").status, 503);
    let over = r#"weir_upstream_overloads_total{upstream="app",cap="connections"}"#;
    assert_eq!(lane.told(over), Some(1.0));
    let mut second = lane.connect();
    second.begin("GET", "/", &[], "");
    assert_eq!(second.status_within(50), None);
    upstream.answer("first");
    assert_eq!(first.finish().body, "first");
    upstream.wait_for_request();
    upstream.answer("second");
    assert_eq!(second.status_within(5_000), Some(200));
}

#[test]
fn a_name_that_changes_is_followed() {
    let servers = Server::on_one_port::<3>();
    let names = NameServer::start();
    let port = servers[0].address.port();
    names.says("app.test", &[servers[0].ip(), servers[1].ip()], 60);
    let endpoints = format!(
        "{{dns: 'app.test:{port}', refresh: 50ms, servers: ['{}']}}",
        names.address
    );
    let lane = Lane::start(&of_endpoints(&endpoints, "load_balancing: round_robin"));
    let mut client = lane.connect();
    assert_eq!(spread(&mut client, 10).len(), 2);
    names.says("app.test", &[servers[1].ip(), servers[2].ip()], 60);
    until_gone(&mut client, &servers[0]);
    let answered = spread(&mut client, 10);
    assert_eq!(
        answered.values().collect::<Vec<_>>(),
        [&5, &5],
        "{answered:?}"
    );
    assert_eq!(
        servers[1].connections(),
        1,
        "what stays keeps its connections"
    );
    // What cannot be looked up stays as it was.
    names.fails("app.test");
    let failed = r#"weir_upstream_dns_lookups_total{upstream="app",result="failed"}"#;
    eventually(|| lane.told(failed).unwrap() >= 2.0);
    assert_eq!(spread(&mut client, 10), answered);
    names.says("app.test", &[servers[0].ip()], 60);
    until_gone(&mut client, &servers[2]);
    assert_eq!(spread(&mut client, 10).len(), 1);
}

#[test]
fn a_name_whose_ipv4_addresses_are_not_told_has_them_still() {
    let server = Server::start();
    let names = NameServer::start();
    let port = server.address.port();
    let ipv6 = "::1".parse().unwrap();
    names.says("app.test", &[server.ip(), ipv6], 60);
    let endpoints = format!(
        "{{dns: 'app.test:{port}', refresh: 20ms, servers: ['{}']}}",
        names.address
    );
    let lane = Lane::start(&of_endpoints(&endpoints, ""));
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    names.fails_for_ipv4("app.test", &[ipv6]);
    let failed = r#"weir_upstream_dns_lookups_total{upstream="app",result="failed"}"#;
    eventually(|| lane.told(failed).unwrap() >= 3.0);
    assert_eq!(client.get("/").status, 200);
    // It has none, by its name server's own word.
    names.says("app.test", &[ipv6], 60);
    eventually(|| client.get("/").status == 502);
}

#[test]
fn a_check_names_what_the_file_names() {
    let upstream = Recorder::start();
    let names = NameServer::start();
    names.says("app.test", &[upstream.address.ip()], 60);
    let port = upstream.address.port();
    let endpoints = format!("{{dns: 'app.test:{port}', servers: ['{}']}}", names.address);
    let _lane = Lane::start(&of_endpoints(&endpoints, "health: {path: /healthz}"));
    eventually(|| !upstream.whole().is_empty());
    let asked = upstream.whole().swap_remove(0);
    let host = format!("\r\nHost: app.test:{port}\r\n");
    assert!(asked.contains(&host), "{asked}");
}

/// Applications with virtual hosts, or a list of those that are allowed, answer no other.
#[test]
fn a_check_names_the_host_that_it_is_told() {
    let upstream = Recorder::start();
    let endpoints = format!("http://{}", upstream.address);
    let settings = "health: {path: /healthz, host: 'shop.test:8080'}";
    let _lane = Lane::start(&of_endpoints(&endpoints, settings));
    eventually(|| !upstream.whole().is_empty());
    let asked = upstream.whole().swap_remove(0);
    assert!(asked.contains("\r\nHost: shop.test:8080\r\n"), "{asked}");
}

#[test]
fn a_server_of_grpc_is_asked_by_its_own_checks() {
    let mut app = Peer::start("grpc_health_server.py", &[]);
    let endpoints = format!("http://127.0.0.1:{}", app.line());
    for (service, up) in [
        ("shop.v1.Cart", 1),
        ("''", 1),
        ("shop.v1.Orders", 0),
        ("shop.v1.None", 0),
    ] {
        let settings = format!(
            "protocol: http2, panic_threshold: 0%, health: {{grpc: {service}, interval: 20ms}}"
        );
        let lane = Lane::start(&of_endpoints(&endpoints, &settings));
        let result = if up == 1 { "passed" } else { "failed" };
        let series =
            format!(r#"weir_upstream_health_checks_total{{upstream="app",result="{result}"}}"#);
        eventually(|| lane.told(&series).unwrap_or_default() >= 2.0);
        until_up(&lane, up);
    }
}

/// What one name server does not know, another may, which does not answer now.
#[test]
fn a_name_is_gone_once_no_name_server_has_it() {
    let server = Server::start();
    let (knows, other) = (NameServer::start(), NameServer::start());
    let port = server.address.port();
    knows.says("app.test", &[server.ip()], 60);
    other.fails("app.test");
    let endpoints = format!(
        "[{{dns: 'app.test:{port}', refresh: 20ms, servers: ['{}', '{}']}}]",
        other.address, knows.address
    );
    let lane = Lane::start(&of_endpoints(&endpoints, ""));
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    knows.fails("app.test");
    other.forgets("app.test");
    let failed = r#"weir_upstream_dns_lookups_total{upstream="app",result="failed"}"#;
    let before = lane.told(failed).unwrap_or_default();
    eventually(|| lane.told(failed).unwrap() >= before + 6.0);
    assert_eq!(client.get("/").status, 200);
    knows.forgets("app.test");
    eventually(|| client.get("/").status == 503);
}

#[test]
fn a_name_that_cannot_be_looked_up_is_asked_about_less_and_less() {
    let names = NameServer::start();
    names.fails("app.test");
    let endpoints = format!(
        "[{{dns: 'app.test:80', refresh: 1h, servers: ['{}']}}]",
        names.address
    );
    // Before the second, whatever this thread waits for: at the last look that did not show it yet.
    let mut second = weir::clock::now();
    let lane = Lane::start(&of_endpoints(&endpoints, ""));
    let failed = r#"weir_upstream_dns_lookups_total{upstream="app",result="failed"}"#;
    let failed = || lane.told(failed).unwrap_or_default();
    eventually(|| {
        let looked = weir::clock::now();
        let is_told = failed() >= 2.0;
        if !is_told {
            second = looked;
        }
        is_told
    });
    eventually(|| failed() >= 3.0);
    // Two seconds behind the second, as one behind the first.
    let took = second.elapsed();
    assert!(took >= Duration::from_millis(1_500), "{took:?}");
}

#[test]
fn a_name_that_is_gone_takes_its_endpoints_with_it() {
    let server = Server::start();
    let names = NameServer::start();
    let port = server.address.port();
    names.says("app.test", &[server.ip()], 60);
    let endpoints = format!(
        "[{{dns: 'app.test:{port}', refresh: 20ms, servers: ['{}']}}]",
        names.address
    );
    let lane = Lane::start(&of_endpoints(&endpoints, ""));
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    // It is there, and has nothing.
    names.says("app.test", &[], 0);
    eventually(|| client.get("/").status == 503);
    names.says("app.test", &[server.ip()], 60);
    eventually(|| client.get("/").status == 200);
    names.forgets("app.test");
    eventually(|| client.get("/").status == 503);
}

/// Until the last answers are others'.
fn until_gone(client: &mut Client, server: &Server) {
    let place = server.address.to_string();
    eventually(|| !spread(client, 6).contains_key(&place));
}

#[test]
fn a_name_without_an_address_is_a_503_until_it_has_one() {
    let server = Server::start();
    let names = NameServer::start();
    let port = server.address.port();
    let endpoints = format!(
        "[{{dns: 'app.test:{port}', refresh: 20ms, servers: ['{}']}}]",
        names.address
    );
    let lane = Lane::start(&of_endpoints(&endpoints, ""));
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 503);
    names.says("app.test", &[server.ip()], 0);
    eventually(|| client.get("/").status == 200);
}

#[test]
fn an_answer_is_held_no_longer_than_its_time() {
    let server = Server::start();
    let names = NameServer::start();
    names.says("short.test", &[server.ip()], 1);
    names.says("long.test", &[server.ip()], 3_600);
    let port = server.address.port();
    let at = names.address;
    let endpoints = format!(
        "[{{dns: 'short.test:{port}', refresh: 1h, servers: ['{at}']}}, {{dns: 'long.test:{port}', refresh: 1h, servers: ['{at}']}}]"
    );
    let lane = Lane::start(&of_endpoints(&endpoints, ""));
    assert_eq!(
        lane.plan.borrow().upstreams[0].live.counts().all,
        1,
        "one address is one endpoint"
    );
    eventually(|| names.asked.load(Ordering::Relaxed) >= 4);
    let found = r#"weir_upstream_dns_lookups_total{upstream="app",result="found"}"#;
    eventually(|| lane.told(found).unwrap() >= 3.0);
}

#[test]
fn a_reload_keeps_what_is_known_of_endpoints_that_stay() {
    let servers = servers::<3>();
    let outlier = "load_balancing: round_robin, outlier_detection: {consecutive_5xx: 1, base_ejection_time: 1h}";
    let lane = lane(&servers[..2], outlier);
    let mut client = lane.connect();
    servers[0].answers(500);
    while lane.plan.borrow().upstreams[0].live.counts().ejected == 0 {
        client.get("/");
    }
    servers[0].answers(200);
    let before = lane.plan.borrow().upstreams[0].live.clone();
    let same = |lane: &Lane| std::sync::Arc::ptr_eq(&lane.plan.borrow().upstreams[0].live, &before);
    // Nothing of the endpoints changes.
    lane.reload(&config(&servers[..2], &format!("{outlier}, timeout: 3s")));
    assert!(same(&lane));
    // One more, and the others are what they were.
    lane.reload(&config(&servers, outlier));
    assert!(!same(&lane));
    let counts = lane.plan.borrow().upstreams[0].live.counts();
    assert_eq!((counts.all, counts.ejected), (3, 1));
    let answered = spread(&mut client, 10);
    assert_eq!(answered.len(), 2, "{answered:?}");
    assert!(!answered.contains_key(&servers[0].address.to_string()));
    assert_eq!(servers[1].connections(), 1);
    // Without a detection nothing is ejected.
    lane.reload(&config(&servers, "load_balancing: round_robin"));
    assert_eq!(spread(&mut client, 9).len(), 3);
    assert_eq!(servers[1].connections(), 1);
}

#[test]
fn without_checks_no_endpoint_is_unhealthy() {
    let servers = servers::<2>();
    let balancing = "load_balancing: round_robin";
    let checked =
        format!("{balancing}, health: {{path: /healthz, interval: 20ms, unhealthy_after: 1}}");
    let lane = lane(&servers, &checked);
    servers[0].says_of_its_health(500);
    until_up(&lane, 1);
    lane.reload(&config(&servers, balancing));
    assert_eq!(spread(&mut lane.connect(), 10).len(), 2);
}

#[test]
fn a_reload_keeps_the_addresses_of_a_name_that_stays() {
    let servers = Server::on_one_port::<2>();
    let names = NameServer::start();
    names.says("app.test", &[servers[0].ip(), servers[1].ip()], 60);
    let port = servers[0].address.port();
    let config = |refresh: &str| {
        let endpoints = format!(
            "{{dns: 'app.test:{port}', refresh: {refresh}, servers: ['{}']}}",
            names.address
        );
        of_endpoints(&endpoints, "load_balancing: round_robin")
    };
    let lane = Lane::start(&config("1h"));
    let mut client = lane.connect();
    assert_eq!(spread(&mut client, 4).len(), 2);
    let asked = names.asked.load(Ordering::Relaxed);
    lane.reload(&config("2h"));
    assert_eq!(spread(&mut client, 4).len(), 2);
    assert_eq!(names.asked.load(Ordering::Relaxed), asked);
    assert!(servers.iter().all(|server| server.connections() == 1));
}

/// Else a shorter `refresh`, or another server, would be heeded once the last answer's time is over alone.
#[test]
fn a_name_is_looked_up_when_and_where_a_reload_says() {
    let server = Server::start();
    let names = [(); 2].map(|()| NameServer::start());
    let port = server.address.port();
    for names in &names {
        names.says("app.test", &[server.ip()], 3_600);
    }
    let asked = |index: usize| names[index].asked.load(Ordering::Relaxed);
    let config = |refresh: &str, index: usize| {
        let at = names[index].address;
        let endpoints =
            format!("{{dns: 'app.test:{port}', refresh: {refresh}, servers: ['{at}']}}");
        of_endpoints(&endpoints, "")
    };
    let lane = Lane::start(&config("1h", 0));
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    let before = asked(0);
    lane.reload(&config("100ms", 0));
    eventually(|| asked(0) > before);
    lane.reload(&config("2h", 1));
    eventually(|| asked(1) > 0);
    assert_eq!(client.get("/").status, 200);
    assert_eq!(server.connections(), 1);
}

/// An upstream whose connections tell when they end.
fn telling_of_ends() -> (SocketAddr, Receiver<()>) {
    let (ended, ends) = mpsc::channel();
    let address = raw::scripted(move |mut stream| {
        while raw::read_head(&mut stream).is_some() {
            let _ = stream.write_all(super::harness::ok("ok").as_bytes());
        }
        let _ = ended.send(());
    });
    (address, ends)
}

#[test]
fn connections_end_by_their_idle_time_without_a_request() {
    let (address, ends) = telling_of_ends();
    let lane = Lane::start(&of_endpoints(
        &format!("['http://{address}']"),
        "idle_timeout: 1s",
    ));
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    ends.recv_timeout(DEADLINE).unwrap();
    assert_eq!(client.get("/").status, 200, "by another connection");
}

#[test]
fn old_connections_end_in_use_and_out_of_use() {
    for is_used in [true, false] {
        let (address, ends) = telling_of_ends();
        let endpoints = format!("['http://{address}']");
        let lane = Lane::start(&of_endpoints(&endpoints, "max_age: 1s"));
        let mut client = lane.connect();
        assert_eq!(client.get("/").status, 200);
        eventually(|| {
            if is_used {
                assert_eq!(client.get("/").status, 200);
            }
            ends.try_recv().is_ok()
        });
        assert_eq!(client.get("/").status, 200, "by another connection");
    }
}

#[test]
fn connections_to_endpoints_that_are_gone_end_without_a_request() {
    let names = NameServer::start();
    let (address, ends) = telling_of_ends();
    names.says("app.test", &[address.ip()], 0);
    let endpoints = format!(
        "{{dns: 'app.test:{}', refresh: 100ms, servers: ['{}']}}",
        address.port(),
        names.address
    );
    let lane = Lane::start(&of_endpoints(&endpoints, "idle_timeout: 1h"));
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    names.says("app.test", &[Ipv4Addr::new(127, 0, 0, 9).into()], 0);
    ends.recv_timeout(DEADLINE).unwrap();

    let (address, ends) = telling_of_ends();
    let of = |address| of_endpoints(&format!("['http://{address}']"), "");
    let lane = Lane::start(&of(address));
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    let (other, _ends) = telling_of_ends();
    lane.reload(&of(other));
    ends.recv_timeout(DEADLINE).unwrap();
}

#[test]
fn no_request_fails_where_a_reload_brings_a_name() {
    let servers = Server::on_one_port::<2>();
    let names = NameServer::start();
    names.says("app.test", &[servers[1].ip()], 60);
    let port = servers[0].address.port();
    let text = |endpoints: &str| {
        format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstreams: {{app: {{endpoints: {endpoints}}}}}\n"
        )
    };
    let config = file(&text(&format!("'{}'", servers[0].url())));
    let running = Running::start(config.path());
    let mut client = Client::to(&*running.address);
    assert_eq!(client.get("/").body, servers[0].address.to_string());
    let name = format!("{{dns: 'app.test:{port}', servers: ['{}']}}", names.address);
    std::fs::write(config.path(), text(&name)).unwrap();
    eventually(|| {
        let reply = client.get("/");
        assert_eq!(reply.status, 200);
        reply.body == servers[1].address.to_string()
    });
}

/// It looks up a name that hangs, and has made all that is new by then.
#[test]
fn a_reload_that_waits_undoes_nothing_of_what_happens_meanwhile() {
    let servers = servers::<2>();
    let names = NameServer::start();
    names.hangs("slow.test");
    let text = |settings: &str, rate: u32, more: &str| {
        format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\ncircuit_breakers: {{b: {{failure_rate: {rate}%, minimum_calls: 1000}}}}\n\
             upstreams:\n  app: {{endpoints: ['{}', '{}'], load_balancing: round_robin, circuit_breaker: b, \
             outlier_detection: {{consecutive_5xx: 1, base_ejection_time: 1h}}{settings}}}\n{more}",
            servers[0].url(),
            servers[1].url()
        )
    };
    let config = file(&text("", 50, ""));
    let running = Running::start(config.path());
    let mut client = Client::to(&*running.address);
    let late = format!(
        "  late: {{endpoints: {{dns: 'slow.test:80', servers: ['{}']}}}}\n\
         routes: [{{match: {{path: /late}}, upstream: late}}, {{upstream: app}}]\n",
        names.address
    );
    std::fs::write(config.path(), text(", panic_threshold: 10%", 60, &late)).unwrap();
    eventually(|| names.asked.load(Ordering::Relaxed) > 0);
    let ejected = r#"weir_upstream_endpoints{upstream="app",state="ejected"}"#;
    servers[0].answers(500);
    while running.metric(ejected) == 0 {
        client.get("/");
    }
    let breaker = |method, does: &str| {
        let path = format!("/v1/breakers/app{does}");
        running
            .admin()
            .send(method, &path, &["Host: localhost"], "")
    };
    let forced = breaker("POST", "/force-open");
    assert_eq!(forced.status, 200, "{forced:?}");
    running.log_until("configuration reloaded");
    assert_eq!(running.metric(ejected), 1);
    assert_eq!(client.get("/").status, 503);
    let state = breaker("GET", "").body;
    assert!(state.contains("forced_open"), "{state}");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn a_process_looks_names_up_before_it_serves_and_tells_of_its_endpoints() {
    let servers = Server::on_one_port::<2>();
    let names = NameServer::start();
    names.says("app.test", &[servers[0].ip(), servers[1].ip()], 60);
    let port = servers[0].address.port();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 2}}\nupstreams:\n  app:\n    \
         endpoints: {{dns: 'app.test:{port}', servers: ['{}']}}\n    health: {{path: /healthz, interval: 50ms}}\n",
        names.address
    ));
    let running = Running::start(config.path());
    let mut client = Client::to(&*running.address);
    assert_eq!(spread(&mut client, 20).len(), 2);
    servers[0].kill();
    let began = Instant::now();
    let unhealthy = r#"weir_upstream_endpoints{upstream="app",state="unhealthy"}"#;
    eventually(|| running.metric(unhealthy) == 1);
    // By the first row of failures, not by an ejection or a look at the name.
    assert!(began.elapsed() < Duration::from_secs(8));
    assert_eq!(spread(&mut client, 20).len(), 1);
    for (series, value) in [
        (r#"weir_upstream_endpoints{upstream="app",state="up"}"#, 1.0),
        (r#"weir_upstream_panic{upstream="app"}"#, 0.0),
        (r#"weir_upstream_requests_in_flight{upstream="app"}"#, 0.0),
    ] {
        // A request's end is counted behind its answer.
        eventually(|| running.told(series) == Some(value));
    }
}

/// It is no time of its own that it is out for longer.
#[test]
fn what_fails_together_ejects_once() {
    let both = Arc::new(Barrier::new(2));
    let failing = raw::scripted(move |mut stream| {
        while raw::read_head(&mut stream).is_some() {
            both.wait();
            let _ = stream.write_all(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let well = Server::start();
    let endpoints = format!("['http://{failing}', '{}']", well.url());
    let lane = Lane::start(&of_endpoints(
        &endpoints,
        "load_balancing: round_robin, outlier_detection: {consecutive_5xx: 1, base_ejection_time: 1h, max_ejection_percent: 100}",
    ));
    // Two of them each.
    let mut clients = [(); 4].map(|()| lane.connect());
    for client in &mut clients {
        client.begin("GET", "/", &[], "");
    }
    let statuses = clients.each_mut().map(|client| client.finish().status);
    let failed = statuses.iter().filter(|status| **status == 500);
    assert_eq!(failed.count(), 2, "{statuses:?}");
    let ejections = r#"weir_upstream_ejections_total{upstream="app"}"#;
    assert_eq!(lane.told(ejections), Some(1.0));
}

#[test]
fn an_unhealthy_endpoint_is_left_alone_though_it_is_the_only_one() {
    let servers = servers::<1>();
    let lane = lane(
        &servers,
        "panic_threshold: 0%, health: {path: /healthz, interval: 20ms, unhealthy_after: 1, healthy_after: 1}",
    );
    let mut client = lane.connect();
    assert_eq!(client.get("/").status, 200);
    servers[0].says_of_its_health(500);
    until_up(&lane, 0);
    assert_eq!(client.get("/").status, 503);
    servers[0].says_of_its_health(200);
    until_up(&lane, 1);
    assert_eq!(client.get("/").status, 200);
}

#[test]
fn what_is_under_way_counts_for_a_cap_that_a_reload_keeps() {
    let upstream = Upstream::held();
    let text = |settings: &str| {
        let settings = format!("concurrency: {{max: 1, pending: 0}}{settings}");
        of_endpoints(&format!("'{}'", upstream.url()), &settings)
    };
    let lane = Lane::start(&text(""));
    let mut first = lane.connect();
    first.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    let live = lane.plan.borrow().upstreams[0].live.clone();
    lane.reload(&text(", slow_start: {window: 1s}"));
    assert!(!Arc::ptr_eq(&lane.plan.borrow().upstreams[0].live, &live));
    let mut second = lane.connect();
    assert_eq!(second.get("/").status, 503);
    upstream.answer("first");
    assert_eq!(first.finish().body, "first");
    second.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    upstream.answer("second");
    assert_eq!(second.finish().body, "second");
}

#[test]
fn where_none_may_wait_it_is_the_cap_that_refuses() {
    for (cap, key) in [("requests", "max"), ("connections", "max_connections")] {
        let upstream = Upstream::held();
        let settings = format!("concurrency: {{{key}: 1, pending: 0}}");
        let lane = Lane::start(&of_endpoints(&format!("'{}'", upstream.url()), &settings));
        let mut first = lane.connect();
        first.begin("GET", "/", &[], "");
        upstream.wait_for_request();
        assert_eq!(lane.connect().get("/").status, 503);
        let over = |cap: &str| {
            let series = format!(r#"weir_upstream_overloads_total{{upstream="app",cap="{cap}"}}"#);
            lane.told(&series).unwrap_or_default()
        };
        assert_eq!((over(cap), over("pending")), (1.0, 0.0), "{cap}");
        upstream.answer("first");
        assert_eq!(first.finish().body, "first");
    }
}

#[test]
fn an_address_that_is_found_later_begins_slowly() {
    let servers = Server::on_one_port::<2>();
    let names = NameServer::start();
    let port = servers[0].address.port();
    names.says("app.test", &[servers[0].ip()], 0);
    let endpoints = format!(
        "{{dns: 'app.test:{port}', refresh: 50ms, servers: ['{}']}}",
        names.address
    );
    let settings = "slow_start: {window: 1h, min_weight: 2%}";
    let lane = Lane::start(&of_endpoints(&endpoints, settings));
    let mut client = lane.connect();
    assert_eq!(spread(&mut client, 10).len(), 1);
    names.says("app.test", &[servers[0].ip(), servers[1].ip()], 0);
    until_up(&lane, 2);
    let answered = spread(&mut client, 500);
    let part = answered.get(&servers[1].address.to_string());
    // 2 % of 102 %, which is 10 of 500.
    assert!(part.is_none_or(|part| *part < 50), "{part:?}");
}

#[test]
fn an_answer_that_holds_for_no_time_is_asked_for_once_a_second() {
    let (server, names) = (Server::start(), NameServer::start());
    names.says("app.test", &[server.ip()], 0);
    let port = server.address.port();
    let endpoints = format!(
        "{{dns: 'app.test:{port}', refresh: 1h, servers: ['{}']}}",
        names.address
    );
    let began = weir::clock::now();
    let lane = Lane::start(&of_endpoints(&endpoints, ""));
    let found = r#"weir_upstream_dns_lookups_total{upstream="app",result="found"}"#;
    eventually(|| lane.told(found).unwrap_or_default() >= 2.0);
    assert!(began.elapsed() >= Duration::from_millis(900));
}

#[test]
fn what_comes_before_the_answer_to_a_check_is_none() {
    let hints = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
    let upstream = raw::scripted(move |mut stream| {
        if raw::read_head(&mut stream).is_some() {
            let _ = stream.write_all(format!("{hints}{hints}{}", ok("well")).as_bytes());
        }
    });
    let endpoints = format!("['http://{upstream}']");
    let lane = Lane::start(&of_endpoints(
        &endpoints,
        "health: {path: /healthz, interval: 20ms}",
    ));
    let passed = r#"weir_upstream_health_checks_total{upstream="app",result="passed"}"#;
    eventually(|| lane.told(passed).unwrap_or_default() >= 2.0);
    assert_eq!(lane.plan.borrow().upstreams[0].live.counts().up, 1);
}

#[test]
fn a_check_by_grpc_goes_by_the_status_of_its_call_and_names_its_service_whole() {
    const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
    // Longer than one byte tells.
    let service = "s".repeat(300);
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let endpoints = format!("'http://{}'", origin.address);
        let settings = format!(
            "protocol: http2, health: {{grpc: {service}, interval: 20ms, unhealthy_after: 1, healthy_after: 1}}"
        );
        let lane = Lane::start(&of_endpoints(&endpoints, &settings));
        let (well, unwell) = ([("grpc-status", "0")], [("grpc-status", "13")]);
        for (head, trailers, why) in [
            (&[][..], &well[..], None),
            (&[], &unwell, Some("grpc-status 13")),
            (&well, &[], None),
            (&unwell, &[], Some("grpc-status 13")),
        ] {
            let mut asked = origin.asked().await;
            let message = asked.body.rest().await.unwrap().0;
            let field = [&[0, 0, 0, 1, 47, 0x0a, 0xac, 2], service.as_bytes()].concat();
            assert_eq!(message, field);
            let mut out = asked.reply(200, head, Length::Unknown).await;
            out.send(SERVING).await.unwrap();
            out.end(trailers).await.unwrap();
            let now = || {
                let live = lane.plan.borrow().upstreams[0].live.clone();
                let mut states = live.endpoint_states(weir::clock::mono());
                states.swap_remove(0).why
            };
            soon(async {
                while now().as_deref() != why {
                    tokio::task::yield_now().await;
                }
            })
            .await;
        }
    });
}

#[test]
fn an_endpoint_that_is_gone_is_not_asked_how_it_is() {
    let servers = servers::<2>();
    let health = "health: {path: /healthz, interval: 20ms}";
    let is_left = |servers: &[Server]| {
        // One may be under way.
        let before = servers[1].checks() + 1;
        let other = servers[0].checks();
        eventually(|| servers[0].checks() > other + 20);
        servers[1].checks() <= before
    };
    let by_reload = lane(&servers, health);
    eventually(|| servers.iter().all(|server| server.checks() > 0));
    by_reload.reload(&config(&servers[..1], health));
    eventually(|| is_left(&servers));
    drop(by_reload);

    let servers = Server::on_one_port::<2>();
    let names = NameServer::start();
    names.says("app.test", &[servers[0].ip(), servers[1].ip()], 0);
    let endpoints = format!(
        "{{dns: 'app.test:{}', refresh: 50ms, servers: ['{}']}}",
        servers[0].address.port(),
        names.address
    );
    let lane = Lane::start(&of_endpoints(&endpoints, health));
    eventually(|| servers.iter().all(|server| server.checks() > 0));
    names.says("app.test", &[servers[0].ip()], 0);
    until_up(&lane, 1);
    eventually(|| is_left(&servers));
}
