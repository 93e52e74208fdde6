//! Rate limits over the wire, on one lane: what they admit, and what clients are told. What they tell clients apart by is `limit_keys`',
//! and what a request is charged that another policy refuses `limits_together`'s.

use super::harness;
use super::harness::{Client, DEADLINE, Lane, Store, Upstream, eventually_within};

crate::on_each_store!(
    a_limit_admits_its_number_and_tells_clients_by_the_draft,
    every_window_of_a_limit_must_admit_and_is_told,
    overrides_cost_shadow_and_missing_keys_do_as_they_say,
    a_concurrency_slot_is_held_until_the_response_ends,
    a_refused_head_has_no_body_that_the_next_reply_could_be_taken_for,
    requests_near_the_limit_are_counted,
    clients_are_told_by_the_headers_that_the_file_names,
    no_client_asks_for_nothing,
    a_cost_beyond_reason_is_refused_and_breaks_nothing,
    a_request_of_no_cost_is_never_refused,
    a_limit_beyond_reason_admits_all,
    a_limit_of_any_name_makes_a_problem_that_can_be_read,
    a_limit_of_a_reload_makes_nobody_wait_longer_than_it_ever_does,
);

/// A lane whose every route has `limit`, a YAML map.
pub(super) fn limited(store: Store, limit: &str) -> Lane {
    Lane::start(&file(
        &Upstream::answering("ok").url(),
        &store.block(),
        limit,
    ))
}

fn file(upstream: &str, store: &str, limit: &str) -> String {
    format!(
        "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [127.0.0.1]}}}}]\nupstream: {upstream}\n\
         rate_limits: {{a: {limit}}}\nroutes: [{{upstream: upstream, rate_limits: [a]}}]\n{store}"
    )
}

fn a_limit_of_a_reload_makes_nobody_wait_longer_than_it_ever_does(store: Store) {
    let (upstream, block) = (Upstream::answering("ok"), store.block());
    let file = |limit| file(&upstream.url(), &block, limit);
    let lane = Lane::start(&file("{limit: 120/h, by: constant}"));
    let mut client = lane.connect();
    // The first refusal, and so all that there was is used.
    let mut refused = || {
        let replies = std::iter::repeat_with(|| client.get("/")).take(200);
        let reply = { replies }.find(|reply| reply.status == 429);
        let wait = reply.unwrap().field("retry-after").unwrap().parse::<u32>();
        wait.unwrap()
    };
    // Up to a tenth more is told; and a process believes what Redis refused for a second.
    // Not for longer: what is told too long grows shorter by itself.
    let mut waits = |most| eventually_within(DEADLINE, || (1..=most).contains(&refused()));
    waits(33);
    lane.reload(&file("{limit: 5/m, by: constant}"));
    waits(14);
    lane.reload(&file("{limit: 1/h, by: constant}"));
    waits(3_960);
    lane.reload(&file("{limit: 5/m, by: constant}"));
    waits(14);
}

fn a_limit_admits_its_number_and_tells_clients_by_the_draft(store: Store) {
    let lane = limited(store, "{limit: 2/h, by: client.ip}");
    let mut client = lane.connect();
    let began = weir::clock::now();
    let first = client.get("/");
    assert_eq!(first.status, 200);
    assert_eq!(first.field("ratelimit-policy"), Some("\"a\";q=2;w=3600"));
    assert_eq!(first.field("ratelimit"), Some("\"a\";r=1;t=1800"));
    assert_eq!(client.get("/").status, 200);
    let refused = client.get("/");
    assert_eq!(refused.status, 429);
    assert_eq!(
        refused.field("content-type"),
        Some("application/problem+json")
    );
    let passed = u32::try_from(began.elapsed().as_secs()).unwrap();
    let left = refused.field("ratelimit").unwrap();
    let until: u32 = left.strip_prefix("\"a\";r=0;t=").unwrap().parse().unwrap();
    assert!((3_600 - passed..=3_600).contains(&until), "{left}");
    // Up to a tenth more, so that clients do not come back all at once.
    let wait: u32 = refused.field("retry-after").unwrap().parse().unwrap();
    assert!((1_800 - passed..=1_980).contains(&wait), "{wait}");
    assert_eq!(
        refused.field("proxy-status"),
        Some("weir; error=http_request_denied; details=\"quota_exceeded\"")
    );
    let problem: serde_json::Value = serde_json::from_str(&refused.body).unwrap();
    assert_eq!(
        problem["type"],
        "https://iana.org/assignments/http-problem-types#quota-exceeded"
    );
    assert_eq!(problem["violated-policies"][0], "a");
    assert_eq!(client.get("/").status, 429, "the connection lives on");
}

fn every_window_of_a_limit_must_admit_and_is_told(store: Store) {
    let lane = limited(
        store,
        "{limit: [2/h, 3/d], by: constant, algorithm: sliding_window}",
    );
    let mut client = lane.connect();
    let told = client.get("/");
    assert_eq!(
        told.field("ratelimit-policy"),
        Some("\"a\";q=2;w=3600, \"a.2\";q=3;w=86400")
    );
    assert_eq!([client.get("/").status, client.get("/").status], [200, 429]);

    let lane = limited(store, "{limit: [1/h, 1/d], by: constant}");
    let replies = [(); 2].map(|()| lane.connect().get("/"));
    assert!(replies[1].body.contains("[\"a\"]"), "{replies:?}");
    // The longer wait of both.
    let wait: u32 = replies[1].field("retry-after").unwrap().parse().unwrap();
    assert!(wait > 80_000, "{wait}");
}

fn overrides_cost_shadow_and_missing_keys_do_as_they_say(store: Store) {
    let lane = limited(
        store,
        "{limit: 1/h, by: 'header:t', overrides: {big: 3/h, free: unlimited, none: 0/h}, if_missing: deny}",
    );
    let count = |tenant: &str| {
        (0..5)
            .filter(|_| {
                lane.connect()
                    .send("GET", "/", &[&format!("t: {tenant}")], "")
                    .status
                    == 200
            })
            .count()
    };
    assert_eq!(
        [count("a"), count("big"), count("free"), count("none")],
        [1, 3, 5, 0]
    );
    assert_eq!(
        lane.connect().get("/").status,
        429,
        "a request without the key is refused"
    );
    let missing = "weir_limit_decisions_total{limit=\"a\",decision=\"missing_key\"}";
    assert_eq!(lane.told(missing), Some(1.0));

    let lane = limited(
        store,
        "{limit: 10/h, by: constant, cost: {header: x-cost, default: 2}}",
    );
    let ask = |fields: &[&str]| lane.connect().send("GET", "/", fields, "").status;
    assert_eq!(
        [
            ask(&["x-cost: 7"]),
            ask(&[]),
            ask(&[]),
            ask(&["x-cost: 1"]),
            ask(&["x-cost: 1"])
        ],
        [200, 200, 429, 200, 429]
    );

    let lane = limited(store, "{limit: 1/h, by: constant, mode: shadow}");
    let replies: Vec<_> = (0..3).map(|_| lane.connect().get("/")).collect();
    assert!(
        replies
            .iter()
            .all(|reply| reply.status == 200 && reply.field("ratelimit").is_none())
    );
}

fn a_concurrency_slot_is_held_until_the_response_ends(store: Store) {
    let upstream = Upstream::held();
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nrate_limits: {{a: {{limit: 1, by: constant, algorithm: concurrency}}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        upstream.url(),
        store.block()
    ));
    let mut first: Client = lane.connect();
    first.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    let refused = lane.connect().get("/");
    assert_eq!(
        (refused.status, refused.field("ratelimit-policy")),
        (429, Some("\"a\";q=1"))
    );
    assert_eq!(refused.field("ratelimit"), Some("\"a\";r=0"));
    upstream.answer("done");
    assert_eq!(first.finish().body, "done");
    lane.connect().begin("GET", "/", &[], "");
    upstream.wait_for_request();
    // That client is gone without its answer: the slot comes back once the upstream has spoken.
    upstream.answer("unheard");
    harness::eventually(|| {
        let mut client = lane.connect();
        client.begin("GET", "/", &[], "");
        client.status_within(100) != Some(429)
    });
}

fn a_refused_head_has_no_body_that_the_next_reply_could_be_taken_for(store: Store) {
    let lane = limited(store, "{limit: 0/s, by: client.ip}");
    let mut client = lane.connect();
    client.begin("HEAD", "/", &[], "");
    let refused = client.finish_head();
    assert_eq!(refused.status, 429);
    assert_ne!(refused.field("content-length"), Some("0"));
    assert_eq!(client.get("/").status, 429);
}

fn requests_near_the_limit_are_counted(store: Store) {
    for limit in ["4/h", "40/h, burst: 4"] {
        let limit = format!("{{limit: {limit}, by: client.ip, near_limit: 75%}}");
        let lane = limited(store, &limit);
        let mut client = lane.connect();
        let statuses = [(); 5].map(|()| client.get("/").status);
        assert_eq!(statuses, [200, 200, 200, 200, 429], "{limit}");
        let near = r#"weir_limit_decisions_total{limit="a",decision="near_limit"}"#;
        assert_eq!(lane.told(near), Some(2.0), "{limit}");
    }
}

/// The older ones have one limit alone, that with the least left.
fn clients_are_told_by_the_headers_that_the_file_names(store: Store) {
    let upstream = Upstream::answering("ok");
    let told = |headers: &str| {
        let lane = Lane::start(&format!(
            "listen: 127.0.0.1:0\nupstream: {}\nrate_limit_defaults: {{headers: [{headers}]}}\n\
             rate_limits:\n  wide: {{limit: 9/h, by: constant}}\n  tight: {{limit: 60/h, burst: 3, by: constant}}\n\
             routes: [{{upstream: upstream, rate_limits: [wide, tight]}}]\n{}",
            upstream.url(),
            store.block()
        ));
        let mut client = lane.connect();
        let replies = [(); 4].map(|()| client.get("/"));
        let statuses = replies.each_ref().map(|reply| reply.status);
        assert_eq!(statuses, [200, 200, 200, 429], "{headers}");
        let [admitted, .., refused] = replies.map(|reply| {
            let names = [
                "ratelimit-policy",
                "ratelimit",
                "x-ratelimit-limit",
                "x-ratelimit-remaining",
                "x-ratelimit-reset",
            ];
            names.map(|name| reply.field(name).unwrap_or_default().to_owned())
        });
        let empty = [&admitted, &refused].map(|of| of.each_ref().map(String::is_empty));
        assert_eq!(empty[0], empty[1], "{headers}: {refused:?}");
        let [.., limit, left, reset] = &refused;
        if !reset.is_empty() {
            assert_eq!([limit, left], ["3", "0"], "{headers}");
            assert!((100..=180).contains(&reset.parse().unwrap()), "{reset}");
        }
        admitted
    };
    let policy = "\"wide\";q=9;w=3600, \"tight\";q=60;w=3600";
    let left = "\"wide\";r=8;t=400, \"tight\";r=2;t=60";
    assert_eq!(told("standard"), [policy, left, "", "", ""]);
    assert_eq!(told("legacy"), ["", "", "3", "2", "60"]);
    assert_eq!(told("legacy, standard"), [policy, left, "3", "2", "60"]);
}

fn no_client_asks_for_nothing(store: Store) {
    let lane = limited(store, "{limit: 2/h, by: constant, cost: {header: x-cost}}");
    let ask = || lane.connect().send("GET", "/", &["x-cost: 0"], "").status;
    assert_eq!([ask(), ask(), ask()], [200, 200, 429]);
}

fn a_cost_beyond_reason_is_refused_and_breaks_nothing(store: Store) {
    let lane = limited(
        store,
        "{limit: 1/year, algorithm: fixed_window, by: client.ip, cost: {header: x-cost}}",
    );
    let mut client = lane.connect();
    for cost in ["18446744073709551615", "9223372036854775807", "-1", "x"] {
        let status = client
            .send("GET", "/", &[&format!("x-cost: {cost}")], "")
            .status;
        assert!(matches!(status, 200 | 429), "{cost}: {status}");
    }
    assert_eq!(client.get("/").status, 429);
}

fn a_request_of_no_cost_is_never_refused(store: Store) {
    let lane = limited(
        store,
        "{limit: 1/h, by: constant, cost: {header: x-cost, default: 0}}",
    );
    let ask = |fields: &[&str]| lane.connect().send("GET", "/", fields, "").status;
    let one = ["x-cost: 1"];
    let statuses = [ask(&[]), ask(&one), ask(&[]), ask(&one), ask(&[])];
    assert_eq!(statuses, [200, 200, 200, 429, 200]);
}

fn a_limit_beyond_reason_admits_all(store: Store) {
    for algorithm in ["token_bucket", "sliding_window", "fixed_window"] {
        for limit in [
            "18446744073709551615/s",
            "18446744073709551615/18446744073709551615ms",
        ] {
            let by = "by: constant, cost: {header: x-cost}";
            let lane = limited(
                store,
                &format!("{{limit: {limit}, algorithm: {algorithm}, {by}}}"),
            );
            let mut client = lane.connect();
            for cost in ["1", "4294967296", "1"] {
                let status = client
                    .send("GET", "/", &[&format!("x-cost: {cost}")], "")
                    .status;
                assert_eq!(status, 200, "{limit} {algorithm}, cost {cost}");
            }
            let metrics = lane.plan.borrow().metrics.text();
            let lost = metrics.lines().find(|line| line.contains("redis_lost"));
            assert!(
                lost.is_none_or(|line| line.ends_with(" 0")),
                "{limit} {algorithm}: {lost:?}"
            );
        }
    }
}

fn a_limit_of_any_name_makes_a_problem_that_can_be_read(store: Store) {
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nrate_limits: {{'a\"\\ü': {{limit: 0/s, by: constant}}, b: {{limit: 0/s, by: path}}}}\n\
         routes: [{{upstream: upstream, rate_limits: ['a\"\\ü', b]}}]\n{}",
        Upstream::answering("ok").url(),
        store.block()
    ));
    let refused = lane.connect().get("/");
    let problem: serde_json::Value = serde_json::from_str(&refused.body).unwrap();
    assert_eq!(problem["status"], 429);
    assert_eq!(
        problem["violated-policies"],
        serde_json::json!(["a\"\\ü", "b"])
    );
    let fields = refused.field("ratelimit").unwrap();
    assert!(fields.starts_with("\"a___\";r=0"), "{fields}");
}
