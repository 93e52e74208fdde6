//! What limits tell clients apart by, over the wire.

use super::harness;
use super::harness::{Lane, Store, Upstream};
use super::limits::limited;

crate::on_each_store!(
    every_kind_of_key_tells_clients_apart,
    what_connection_takes_from_the_upstream_is_no_key_and_no_cost,
    addresses_of_one_ipv6_client_share_a_key,
    a_client_by_ipv6_is_counted_by_its_prefix,
    a_share_of_the_keys_is_refused_and_the_rest_counted,
    a_value_that_is_not_utf_8_makes_a_key_as_any_other,
    no_one_chooses_under_which_of_several_values_it_is_counted,
    a_route_is_counted_by_what_it_matches_wherever_it_stands,
    an_override_is_for_the_parts_that_it_names,
    a_value_that_is_not_utf_8_has_no_override,
);

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

/// The status of a request with these fields, byte by byte.
fn status(lane: &Lane, fields: &[u8]) -> Option<u16> {
    let request = [
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n",
        fields,
        b"\r\n\r\n",
    ];
    harness::raw::send(lane.address, &request.concat()).status()
}

fn a_value_that_is_not_utf_8_makes_a_key_as_any_other(store: Store) {
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
        ("query:k", &[&["/?k=1&k=2"], &["/?k=1;k=2"], &["/?k=1&K=2"]]),
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
    let same: [(&str, &[&[&str]]); 8] = [
        (
            "header:x-key",
            &[&["/", "X-Key: 1", "X-Key: 1"], &["/", "x_key: 1"]],
        ),
        (
            "cookie:k",
            &[&["/", "Cookie: k=1; k=1"], &["/", "Cookie: k=1"]],
        ),
        ("query:k", &[&["/?k=1&k=%31"], &["/?k=1"]]),
        // As Rack and Perl's CGI part it, ASP.NET reads names, and PHP.
        ("query:k", &[&["/?k=1"], &["/?a=b;k=1"]]),
        ("query:k", &[&["/?k=1"], &["/?k=1;2"]]),
        ("query:k", &[&["/?k=1"], &["/?K=1"]]),
        ("query:api_key", &[&["/?api_key=1"], &["/?api.key=1"]]),
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

/// Who chooses one part is not given what is another key's.
fn an_override_is_for_the_parts_that_it_names(store: Store) {
    let by = "by: ['header:t', 'header:u']";
    let lane = limited(
        store,
        &format!(r"{{limit: 1/h, {by}, overrides: {{'a\:b:c': 0/h}}}}"),
    );
    let status = |t: &str, u: &str| {
        let fields = [format!("t: {t}"), format!("u: {u}")];
        let fields = fields.each_ref().map(String::as_str);
        lane.connect().send("GET", "/", &fields, "").status
    };
    assert_eq!([status("a:b", "c"), status("a", "b:c")], [429, 200]);
}

/// Nor that of the character which stands for what cannot be read.
fn a_value_that_is_not_utf_8_has_no_override(store: Store) {
    let overrides = "overrides: {\u{fffd}: 0/h}";
    let lane = limited(
        store,
        &format!("{{limit: 9/h, by: 'header:t', {overrides}}}"),
    );
    let fields = [&b"T: \xef\xbf\xbd"[..], b"T: \xff"];
    assert_eq!(
        fields.map(|fields| status(&lane, fields) == Some(429)),
        [true, false]
    );
}
