//! Rate limits over the wire, on one lane.

use super::harness;
use std::net::SocketAddr;

use super::harness::versions::{self, Version, field, run};
use super::harness::{Client, DEADLINE, Lane, Store, Upstream, eventually_within};
use socket2::{Domain, Socket, Type};

crate::on_each_store!(
    a_limit_admits_its_number_and_tells_clients_by_the_draft,
    every_kind_of_key_tells_clients_apart,
    addresses_of_one_ipv6_client_share_a_key,
    a_client_by_ipv6_is_counted_by_its_prefix,
    a_share_of_the_keys_is_refused_and_the_rest_counted,
    every_window_of_a_limit_must_admit_and_is_told,
    overrides_cost_shadow_and_missing_keys_do_as_they_say,
    a_concurrency_slot_is_held_until_the_response_ends,
    a_refused_head_has_no_body_that_the_next_reply_could_be_taken_for,
    requests_near_the_limit_are_counted,
    clients_are_told_by_the_headers_that_the_file_names,
    a_value_that_is_not_utf_8_makes_a_key_as_any_other,
    no_one_chooses_under_which_of_several_values_it_is_counted,
    no_client_asks_for_nothing,
    a_cost_beyond_reason_is_refused_and_breaks_nothing,
    a_request_of_no_cost_is_never_refused,
    a_limit_beyond_reason_admits_all,
    a_limit_of_any_name_makes_a_problem_that_can_be_read,
    a_limit_of_a_reload_makes_nobody_wait_longer_than_it_ever_does,
    a_route_is_counted_by_what_it_matches_wherever_it_stands,
    what_connection_takes_from_the_upstream_is_no_key_and_no_cost,
    what_another_policy_refuses_costs_no_quota,
    what_never_set_out_costs_no_quota,
    a_limit_has_admitted_what_no_other_refuses,
    a_refusal_tells_what_is_left_of_limits_that_did_not_refuse,
);

/// A lane whose every route has `limit`, a YAML map.
fn limited(store: Store, limit: &str) -> Lane {
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

fn every_kind_of_key_tells_clients_apart(store: Store) {
    let check = |by: &str, one: &[&str], other: &[&str], missing: Option<&[&str]>| {
        let lane = limited(store, &format!("{{limit: 1/h, by: {by}}}"));
        let ask = |request: &[&str]| {
            let (path, fields) = request.split_first().unwrap();
            lane.connect().send("GET", path, fields, "").status
        };
        assert_eq!([ask(one), ask(one), ask(other)], [200, 429, 200], "{by}");
        if let Some(missing) = missing {
            assert_eq!(
                [ask(missing), ask(missing)],
                [200, 200],
                "{by}: a request without the key is not seen"
            );
        }
    };
    let forwarded = |ip: &'static str| ["/", ip];
    check(
        "client.ip",
        &forwarded("X-Forwarded-For: 1.1.1.1"),
        &forwarded("X-Forwarded-For: 1.1.1.2"),
        None,
    );
    check(
        "'header:X-Key'",
        &["/", "x-key: a"],
        &["/", "X-Key: b"],
        Some(&["/"]),
    );
    check(
        "'cookie:k'",
        &["/", "Cookie: a=1; k=a"],
        &["/", "Cookie: k=b"],
        Some(&["/", "Cookie: kk=a"]),
    );
    check("'query:k'", &["/?x=1&k=a"], &["/?k=b"], Some(&["/?kk=a"]));
    check("path", &["/a"], &["/b"], None);
    check("host", &["/", "Host: one"], &["/", "Host: other"], None);
    check(
        "[path, 'header:x']",
        &["/a", "x: 1"],
        &["/a", "x: 2"],
        Some(&["/a"]),
    );
}

/// The upstream sees none of it (RFC 9110 section 7.6.1), so that each of its values would be a client's own.
fn what_connection_takes_from_the_upstream_is_no_key_and_no_cost(store: Store) {
    let missing = |limit: &str, field: &str, name: &str| {
        let lane = limited(store, limit);
        let ask = |fields: &[&str]| lane.connect().send("GET", "/", fields, "").status;
        let connection = format!("Connection: close, {name}");
        [ask(&[&connection, field]), ask(&[field])]
    };
    for (by, name, field) in [
        ("'header:x-key'", "x-key", "X-Key: a"),
        (
            "'header:authorization'",
            "AUTHORIZATION",
            "Authorization: Bearer a",
        ),
        ("'cookie:k'", "cookie", "Cookie: k=a"),
    ] {
        let limit = format!("{{limit: 1/h, by: {by}, if_missing: deny}}");
        assert_eq!(missing(&limit, field, name), [429, 200], "{by}");
    }
    let limit = "{limit: 9/h, by: constant, cost: {header: x-cost, default: 9}}";
    assert_eq!(missing(limit, "X-Cost: 1", "x-cost"), [200, 429]);
}

fn addresses_of_one_ipv6_client_share_a_key(store: Store) {
    let lane = limited(store, "{limit: 1/h, by: client.ip}");
    let ask = |ip: &str| {
        lane.connect()
            .send("GET", "/", &[&format!("X-Forwarded-For: {ip}")], "")
            .status
    };
    assert_eq!(
        [
            ask("2001:db8::1"),
            ask("2001:db8::2"),
            ask("2001:db8:0:1::1")
        ],
        [200, 429, 200]
    );
    let one = [
        "2001:db8::1",
        "2001:db8:0:1::1",
        "2001:db8:0:ff::1",
        "2001:db8:0:100::1",
        "2001:db8:0:100::2",
    ];
    for (prefix, statuses) in [
        (56, [200, 429, 429, 200, 429]),
        (128, [200; 5]),
        (1, [200, 429, 429, 429, 429]),
    ] {
        let lane = Lane::start(&format!(
            "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [127.0.0.1], ipv6_prefix: {prefix}}}}}]\nupstream: {}\n\
             rate_limits: {{a: {{limit: 1/h, by: client.ip}}}}\nroutes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
            Upstream::answering("ok").url(),
            store.block()
        ));
        let ask = |ip: &str| {
            let mut client = lane.connect();
            client
                .send("GET", "/", &[&format!("X-Forwarded-For: {ip}")], "")
                .status
        };
        assert_eq!(one.map(ask), statuses, "{prefix}");
    }
}

fn a_client_by_ipv6_is_counted_by_its_prefix(store: Store) {
    let lane = Lane::start(&format!(
        "listen: '[::1]:0'\nupstream: {}\n\
         rate_limits: {{a: {{limit: 1/h, by: client.ip, overrides: {{'::9': 2/h}}}}}}\n\
         routes: [{{upstream: upstream, rate_limits: [a]}}]\n{}",
        Upstream::answering("ok").url(),
        store.block()
    ));
    // The override is for all of `::/64`.
    let statuses = [(); 3].map(|()| lane.connect().get("/").status);
    assert_eq!(statuses, [200, 200, 429]);
}

fn a_share_of_the_keys_is_refused_and_the_rest_counted(store: Store) {
    let limit = |enforced: &str| {
        format!("{{limit: 1/h, by: header:x-key, enforced: {enforced}, if_missing: deny}}")
    };
    let refused = |enforced: &str| -> Vec<usize> {
        let lane = limited(store, &limit(enforced));
        let mut client = lane.connect();
        let keys = (0..200).filter(|key| {
            let mut ask = || {
                client
                    .send("GET", "/", &[&format!("X-Key: {key}")], "")
                    .status
            };
            assert_eq!(ask(), 200, "{key}");
            ask() == 429
        });
        let keys: Vec<_> = keys.collect();
        for (decision, count) in [
            ("admitted", 200),
            ("refused", keys.len()),
            ("shadow_refused", 200 - keys.len()),
        ] {
            let series =
                format!("weir_limit_decisions_total{{limit=\"a\",decision=\"{decision}\"}}");
            assert_eq!(lane.told(&series), Some(count as f64), "{decision}");
        }
        keys
    };
    let (few, half) = (refused("10%"), refused("50%"));
    // Three standard deviations: 20 give or take 4.2, and 100 give or take 7.1.
    assert!((8..=32).contains(&few.len()), "{}", few.len());
    assert!((79..=121).contains(&half.len()), "{}", half.len());
    // Who is refused stays so as the share grows.
    assert!(few.iter().all(|key| half.contains(key)));
    assert_eq!(refused("50%"), half);
    assert_eq!((refused("0%").len(), refused("100%").len()), (0, 200));
    let missing = |enforced: &str| {
        let lane = limited(store, &limit(enforced));
        let mut client = lane.connect();
        (0..50).filter(|_| client.get("/").status == 429).count()
    };
    assert_eq!((missing("0%"), missing("100%")), (0, 50));
    assert!((5..=45).contains(&missing("50%")));
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

fn a_value_that_is_not_utf_8_makes_a_key_as_any_other(store: Store) {
    let status = |lane: &Lane, fields: &[u8]| {
        let request = [
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n",
            fields,
            b"\r\n\r\n",
        ];
        harness::raw::send(lane.address, &request.concat()).status()
    };
    // Neither an odd byte of its own nor one beside it takes a client out of the limit.
    for (by, twice) in [
        ("header:t", [&b"T: \xff"[..], b"T: \xff"]),
        ("cookie:t", [b"Cookie: t=\xff", b"Cookie: a=b; t=\xff"]),
        ("cookie:t", [b"Cookie: t=1", b"Cookie: a=\xff; t=1"]),
    ] {
        let lane = limited(store, &format!("{{limit: 1/h, by: '{by}'}}"));
        assert_eq!(
            twice.map(|fields| status(&lane, fields) == Some(429)),
            [false, true],
            "{by}"
        );
    }
}

/// Whichever of several values the application takes, and however it is spelt.
fn no_one_chooses_under_which_of_several_values_it_is_counted(store: Store) {
    let several: [(&str, &[&[&str]]); 4] = [
        (
            "header:x-key",
            &[
                &["/", "X-Key: 1", "X-Key: 2"],
                &["/", "X-Key: 1", "x_key: 2"],
            ],
        ),
        (
            "cookie:k",
            &[
                &["/", "Cookie: k=1; k=2"],
                &["/", "Cookie: k=1", "Cookie: k=2"],
            ],
        ),
        ("query:k", &[&["/?k=1&k=2"]]),
        ("[path, 'query:k']", &[&["/?k=1&k=2"]]),
    ];
    for (by, requests) in several {
        let lane = limited(store, &format!("{{limit: 9/h, by: {by}}}"));
        for request in requests {
            let status = lane
                .connect()
                .send("GET", request[0], &request[1..], "")
                .status;
            assert_eq!(status, 429, "{by}: {request:?}");
        }
    }
    let same: [(&str, &[&[&str]]); 4] = [
        (
            "header:x-key",
            &[&["/", "X-Key: 1", "X-Key: 1"], &["/", "x_key: 1"]],
        ),
        (
            "cookie:k",
            &[&["/", "Cookie: k=1; k=1"], &["/", "Cookie: k=1"]],
        ),
        ("query:k", &[&["/?k=1&k=%31"], &["/?k=1"]]),
        (
            "header:authorization",
            &[
                &["/", "Authorization: Bearer t"],
                &["/", "authorization: bearer   t"],
            ],
        ),
    ];
    for (by, requests) in same {
        let lane = limited(store, &format!("{{limit: 1/h, by: {by}}}"));
        let statuses = requests.iter().map(|request| {
            lane.connect()
                .send("GET", request[0], &request[1..], "")
                .status
        });
        assert_eq!(statuses.collect::<Vec<_>>(), [200, 429], "{by}");
    }
    // A route for `/login/**` has `/login` and `/login/` for one, and with `ignore_case` all spellings.
    let upstream = Upstream::answering("hi");
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{a: {{endpoints: ['{}']}}}}\nrate_limits: {{one: {{limit: 1/h, by: path}}}}\n\
         routes: [{{match: {{path: /login/**, ignore_case: true}}, upstream: a, rate_limits: [one]}}]\n{}",
        upstream.url(),
        store.block()
    ));
    let paths = [
        "/login",
        "/login/",
        "/LOGIN",
        "/Login/",
        "/login/x",
        "/login/x/",
    ];
    let statuses = paths.map(|path| lane.connect().get(path).status);
    assert_eq!(statuses, [200, 429, 429, 429, 200, 429]);
    // Where it only counts, nobody is refused.
    let lane = limited(store, "{limit: 1/h, by: 'query:k', mode: shadow}");
    assert_eq!(lane.connect().get("/?k=1&k=2").status, 200);
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

fn a_route_is_counted_by_what_it_matches_wherever_it_stands(store: Store) {
    let upstream = Upstream::answering("ok");
    let block = store.block();
    let route = |matches: &str| {
        format!("- {{match: {{{matches}}}, upstream: upstream, rate_limits: [a]}}\n")
    };
    let file = |routes: &[String]| {
        format!(
            "listen: 127.0.0.1:0\nupstream: {}\nrate_limits: {{a: {{limit: 1/h, by: route, accuracy: strict, overrides: {{\
             /pay/*: 2/h, 'GET,HEAD shop.example/* x-a=1 x-b=\"1 2\"': 3/h}}}}}}\nroutes:\n{}{block}",
            upstream.url(),
            routes.concat()
        )
    };
    let (pay, rest) = (route("path: /pay/*"), route(""));
    let shop = route("host: Shop.example, methods: [HEAD, GET], headers: {X-B: '1 2', x-a: '1'}");
    let lane = Lane::start(&file(&[pay.clone(), rest.clone()]));
    let status = |fields: &[&str], path: &str| lane.connect().send("GET", path, fields, "").status;
    assert_eq!((status(&[], "/pay/1"), status(&[], "/")), (200, 200));
    lane.reload(&file(&[shop, pay.clone(), pay, rest]));
    let of_pay = [0; 2].map(|_| status(&[], "/pay/1"));
    assert_eq!(of_pay, [200, 429], "two in all");
    assert_eq!(status(&[], "/"), 429);
    let fields = ["Host: shop.example", "X-A: 1", "X-B: 1 2"];
    let of_shop = [0; 4].map(|_| status(&fields, "/pay/1"));
    assert_eq!(of_shop, [200, 200, 200, 429]);
}

fn what_another_policy_refuses_costs_no_quota(store: Store) {
    let upstream = Upstream::replying(|head| {
        let user = head.split(' ').nth(1).unwrap().strip_prefix("/in/");
        let field = user.map(|user| format!("X-Weir-Session-Start: {{\"user\": \"{user}\"}}\r\n"));
        let field = field.unwrap_or_default();
        format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 0\r\n\r\n")
    });
    // Kept, so that no other test gets its port.
    let closed = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    closed.bind(&loopback.into()).unwrap();
    let gone = closed.local_addr().unwrap().as_socket().unwrap();
    for algorithm in ["token_bucket", "sliding_window", "fixed_window"] {
        let lane = Lane::start(&format!(
            "listeners: [{{address: '127.0.0.1:0'}}]\n\
             upstreams:\n  app: {{endpoints: ['{}'], trust_session_headers: true}}\n  gone: {{endpoints: ['http://{gone}'], circuit_breaker: b}}\n\
             circuit_breakers: {{b: {{scope: local, window: {{type: count, size: 2}}, minimum_calls: 2}}}}\n\
             sessions: {{web: {{cookie: {{secure: false}}}}}}\n\
             rate_limits:\n  all: {{limit: 8/h, algorithm: {algorithm}, by: constant}}\n  each: {{limit: 1/h, algorithm: {algorithm}, by: session.user}}\n  \
             broken: {{limit: 8/h, algorithm: {algorithm}, by: constant}}\n  seen: {{limit: 8/h, algorithm: {algorithm}, by: constant, mode: shadow}}\n  tries: {{limit: 3/h, algorithm: {algorithm}, by: client.ip}}\n\
             routes:\n- {{match: {{path: /in/*}}, upstream: app, session: {{use: web, require: false}}}}\n\
             - {{match: {{path: /gone}}, upstream: gone, rate_limits: [broken, seen]}}\n\
             - {{match: {{path: /broken}}, upstream: app, rate_limits: [broken]}}\n\
             - {{match: {{path: /tried}}, upstream: app, session: {{use: web}}, rate_limits: [tries]}}\n\
             - {{upstream: app, session: {{use: web}}, rate_limits: [all, each]}}\n{}",
            upstream.url(),
            store.block()
        ));
        let asks = |path: &str, cookie: &str| lane.connect().send("GET", path, &[cookie], "");
        let session = |user: &str| {
            let set = asks(&format!("/in/{user}"), "X-A: b");
            let cookie = set.field("set-cookie").unwrap();
            format!("Cookie: {}", cookie.split(';').next().unwrap())
        };
        let sessions = ["ann", "bob", "cy", "dee"].map(session);
        let status = |path: &str, cookie: &str| asks(path, cookie).status;
        // By a limit of the session's, by the want of a session,
        assert_eq!(status("/", &sessions[0]), 200, "{algorithm}");
        for _ in 0..10 {
            assert_eq!(status("/", &sessions[0]), 429, "{algorithm}");
            assert_eq!(status("/", "X-A: b"), 401, "{algorithm}");
        }
        for cookie in &sessions[1..] {
            assert_eq!(status("/", cookie), 200, "{algorithm}");
        }
        // by a breaker. The two that tripped it were sent, or tried.
        assert_eq!([(); 2].map(|()| status("/gone", "X-A: b")), [502; 2]);
        for _ in 0..10 {
            assert_eq!(status("/gone", "X-A: b"), 503, "{algorithm}");
        }
        // One that only counts decides as it would.
        let shadow = "weir_limit_decisions_total{limit=\"seen\",decision=\"shadow_refused\"}";
        assert_eq!(lane.told(shadow), Some(0.0), "{algorithm}");
        for _ in 0..6 {
            assert_eq!(status("/broken", "X-A: b"), 200, "{algorithm}");
        }
        assert_eq!(status("/broken", "X-A: b"), 429, "{algorithm}");
        // A limit that tells clients apart bounds how often one can try.
        let tried = [(); 4].map(|()| status("/tried", "X-A: b"));
        assert_eq!(tried, [401, 401, 401, 429], "{algorithm}");
    }
}

fn what_never_set_out_costs_no_quota(store: Store) {
    for algorithm in ["token_bucket", "sliding_window", "fixed_window"] {
        for version in [Version::One, Version::Two] {
            let (held, app) = (Upstream::held(), Upstream::answering(""));
            let lane = Lane::start(&format!(
                "listen: 127.0.0.1:0\nupstreams:\n  app: {{endpoints: ['{}']}}\n\
                 \x20 held: {{endpoints: ['{}'], concurrency: {{max: 1, pending: 0}}}}\n\
                 \x20 down: {{endpoints: ['http://127.0.0.1:1', 'http://127.0.0.2:1'], panic_threshold: 0%, \
                 health: {{path: /, interval: 20ms, unhealthy_after: 1}}}}\n\
                 rate_limits: {{all: {{limit: 4/h, algorithm: {algorithm}, by: constant}}}}\n\
                 routes:\n- {{match: {{path: /held}}, upstream: held, rate_limits: [all]}}\n\
                 - {{match: {{path: /down}}, upstream: down, rate_limits: [all]}}\n- {{upstream: app, rate_limits: [all]}}\n{}",
                app.url(),
                held.url(),
                store.block()
            ));
            eventually_within(DEADLINE, || {
                let plan = lane.plan.borrow();
                let mut upstreams = plan.upstreams.iter();
                let down = upstreams.find(|it| it.name == "down").unwrap();
                down.live.counts().up == 0
            });
            let mut first = lane.connect();
            first.begin("GET", "/held", &[], "");
            held.wait_for_request();
            let asked = format!("{algorithm}, {version:?}");
            let check = |path: &str, reason: &str| {
                let answer = run(async {
                    let mut client = versions::Client::connect(version, lane.address).await;
                    client.get(path).await.answer().await
                });
                let told = field(&answer.fields, "proxy-status").unwrap_or_default();
                assert!(told.contains(reason), "{asked}: {:?}", answer.fields);
            };
            for _ in 0..6 {
                check("/held", "overloaded");
                check("/down", "no_endpoint");
            }
            held.answer("");
            assert_eq!(first.finish().status, 200);
            let left = [(); 4].map(|()| lane.connect().get("/").status);
            assert_eq!(left, [200, 200, 200, 429], "{asked}");
        }
    }
}

fn a_limit_has_admitted_what_no_other_refuses(store: Store) {
    let upstream = Upstream::replying(|head| {
        let begins = head.starts_with("GET /in ");
        let field = "X-Weir-Session-Start: {\"user\": \"ann\"}\r\n";
        let field = if begins { field } else { "" };
        format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 0\r\n\r\n")
    });
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\n\
         sessions: {{web: {{cookie: {{secure: false}}}}}}\n\
         rate_limits:\n  wide: {{limit: 90/h, by: constant, near_limit: 1%}}\n  slots: {{limit: 9, by: constant, algorithm: concurrency}}\n  \
         here: {{limit: 1/h, by: constant, accuracy: local}}\n  each: {{limit: 1/h, by: session.user}}\n  tries: {{limit: 9/h, by: client.ip}}\n\
         routes:\n- {{match: {{path: /in}}, upstream: app, session: {{use: web, require: false}}}}\n\
         - {{match: {{path: /here}}, upstream: app, rate_limits: [wide, slots, here]}}\n\
         - {{upstream: app, session: {{use: web}}, rate_limits: [wide, tries, each]}}\n{}",
        upstream.url(),
        store.block()
    ));
    let set = lane.connect().get("/in");
    let cookie = set.field("set-cookie").unwrap().split(';').next().unwrap();
    let cookie = format!("Cookie: {cookie}");
    let told = |limit: &str, decision: &str| {
        let of = format!("limit=\"{limit}\",decision=\"{decision}\"");
        lane.told(&format!("weir_limit_decisions_total{{{of}}}"))
    };
    let check = |limit: &str, admitted, refused| {
        let counts = (told(limit, "admitted"), told(limit, "refused"));
        assert_eq!(counts, (Some(admitted), Some(refused)), "{limit}");
    };
    let status = |path: &str, cookie: &str| lane.connect().send("GET", path, &[cookie], "").status;
    assert_eq!([(); 3].map(|()| status("/here", &cookie)), [200, 429, 429]);
    check("wide", 1.0, 0.0);
    check("slots", 1.0, 0.0);
    check("here", 1.0, 2.0);
    assert_eq!([(); 3].map(|()| status("/", &cookie)), [200, 429, 429]);
    check("wide", 2.0, 0.0);
    check("tries", 1.0, 0.0);
    check("each", 1.0, 2.0);
    // Without a session it has counted all the same.
    assert_eq!(status("/", "X-A: b"), 401);
    check("wide", 2.0, 0.0);
    check("tries", 2.0, 0.0);
    assert_eq!(told("wide", "near_limit"), Some(2.0));
}

fn a_refusal_tells_what_is_left_of_limits_that_did_not_refuse(store: Store) {
    let upstream = Upstream::replying(|head| {
        let begins = head.starts_with("GET /in ");
        let field = "X-Weir-Session-Start: {\"user\": \"ann\"}\r\n";
        let field = if begins { field } else { "" };
        format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 0\r\n\r\n")
    });
    let accuracies: &[&str] = match store {
        Store::Memory => &["local"],
        Store::Redis => &["lease", "strict", "local"],
    };
    // What a refusal puts back is told of while it can be spent, which is to be for longer than the test takes.
    let leases = match store {
        Store::Memory => "",
        Store::Redis => "rate_limit_defaults: {lease: {ttl: 10s}}\n",
    };
    for accuracy in accuracies {
        // What is asked first, or last, is on its own ground where one limit alone is shared.
        for other in [accuracy, "local"] {
            let limit = |settings: &str, accuracy: &str| match store {
                Store::Memory => format!("{{{settings}}}"),
                Store::Redis => format!("{{{settings}, accuracy: {accuracy}}}"),
            };
            // Slots have no lease.
            let of_slots = if *accuracy == "local" {
                "local"
            } else {
                "strict"
            };
            let lane = Lane::start(&format!(
                "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['{}'], trust_session_headers: true}}}}\n\
                 sessions: {{web: {{cookie: {{secure: false}}}}}}\n\
                 rate_limits:\n  a: {}\n  b: {}\n  c: {}\n  d: {}\n  e: {}\nroutes:\n\
                 - {{match: {{path: /in}}, upstream: app, session: {{use: web, require: false}}}}\n\
                 - {{match: {{path: /mine}}, upstream: app, session: {{use: web}}, rate_limits: [a, d, e]}}\n\
                 - {{upstream: app, rate_limits: [a, b, c]}}\n{leases}{}",
                upstream.url(),
                limit(
                    "limit: 100/h, by: constant, cost: {header: x-cost}",
                    accuracy
                ),
                limit("limit: 1/h, by: constant", other),
                limit("limit: 5, by: constant, algorithm: concurrency", of_slots),
                limit("limit: 9/h, by: constant, algorithm: fixed_window", other),
                limit("limit: 1/h, by: session.user", other),
                store.block()
            ));
            let set = lane.connect().get("/in");
            let cookie = set.field("set-cookie").unwrap().split(';').next().unwrap();
            let cookie = format!("Cookie: {cookie}");
            let ask = |path: &str| {
                let reply = lane
                    .connect()
                    .send("GET", path, &["X-Cost: 30", &cookie], "");
                let told = reply.field("ratelimit").unwrap().split(", ");
                let left = |told: &str| {
                    let (name, rest) = told.split_once(";r=").unwrap();
                    format!("{name} {}", rest.split(';').next().unwrap())
                };
                (reply.status, told.map(left).collect::<Vec<_>>().join(", "))
            };
            let check = |path: &str, status: u16, left: &str| {
                let told = (status, left.to_owned());
                assert_eq!(ask(path), told, "{path}, {accuracy} beside {other}");
            };
            let shared = |of: &str| store == Store::Redis && of != "local";
            let order = |names: &[(&str, &str, u64)]| {
                // Shared ones are asked first.
                let mut names = names.to_vec();
                names.sort_by_key(|(_, of, _)| !shared(of));
                let told = names
                    .iter()
                    .map(|(name, _, left)| format!("\"{name}\" {left}"));
                told.collect::<Vec<_>>().join(", ")
            };
            let of_all = |a, b, c: Option<u64>| {
                let c = c.map(|c| ("c", of_slots, c));
                let all = [("a", *accuracy, a), ("b", other, b)];
                order(&all.into_iter().chain(c).collect::<Vec<_>>())
            };
            check("/", 200, &of_all(70, 0, Some(4)));
            check("/", 429, &of_all(70, 0, Some(5)));
            // Redis is not asked for a slot once a lease is known to refuse, which it is for a second at least.
            let free = (!shared(other)).then_some(5);
            let [known, forgotten] = [free, Some(5)].map(|c| (429, of_all(70, 0, c)));
            harness::eventually(|| {
                let told = ask("/");
                let either = told == known || told == forgotten;
                assert!(either, "{told:?}, {accuracy} beside {other}");
                told == known
            });
            let of_mine = |a, d, e| {
                format!(
                    "{}, \"e\" {e}",
                    order(&[("a", *accuracy, a), ("d", other, d)])
                )
            };
            check("/mine", 200, &of_mine(40, 8, 0));
            check("/mine", 429, &of_mine(40, 8, 0));
            check("/mine", 429, &of_mine(40, 8, 0));
        }
    }
}
