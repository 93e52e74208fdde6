//! The rules of limits in a file, as tests.

use super::super::tests::fixture;
use super::*;
use crate::config::Config;

fn read(limits: &str) -> Result<Config, Vec<String>> {
    let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{limits}");
    fixture::read(&text)
}

fn rules(limit: &str) -> Option<Rules> {
    let config = read(&format!("rate_limits: {{a: {limit}}}\n")).unwrap();
    config.limits[0].rules.clone()
}

fn one(window: Window) -> Option<Rules> {
    Some(Rule::Window(window).into())
}

#[test]
fn the_short_form_limits_every_route() {
    let config = read("rate_limit: 100/s by client.ip, header:X-Tenant\n").unwrap();
    assert_eq!(
        config.limits[0].rules,
        one(Window::Bucket {
            count: 100,
            per: SECOND,
            burst: 100
        })
    );
    assert_eq!(
        config.limits[0].by,
        [KeyPart::ClientIp, KeyPart::Header("x-tenant".to_owned())]
    );
    assert_eq!(config.routes[0].limits, [0]);
    let shared = read("rate_limit: 100/s\n").unwrap();
    let constant = read("rate_limits: {a: {limit: 100/s, by: constant}}\n").unwrap();
    assert_eq!(shared.limits[0].by, constant.limits[0].by);
    assert_eq!(shared.limits[0].by, []);
}

#[test]
fn an_override_has_a_part_of_the_burst_as_large_as_its_rate() {
    let check = |limit: &str, over: &str, burst: u64| {
        let config = read(&format!(
            "rate_limits: {{a: {{{limit}, by: path, overrides: {{'/b': {over}}}}}}}\n"
        ));
        let limit = &config.unwrap().limits[0];
        let of_file = limit.overrides["/b"].clone();
        assert_eq!(override_rules(limit, over), Ok(of_file.clone()));
        let rules = of_file.unwrap();
        let Some(Window::Bucket { burst: found, .. }) = rules.only_window() else {
            panic!("{rules:?}");
        };
        assert_eq!(*found, burst, "{limit:?} {over}");
    };
    check("limit: 10/s, burst: 100", "20/s", 100);
    check("limit: 10/s, burst: 100", "500/s", 500);
    check("limit: 10/s, burst: 100", "5/s", 50);
    check("limit: 10/s, burst: 100", "300/m", 300);
    check("limit: 10/s, burst: 100", "1/h", 1);
    check("limit: 10/s, burst: 100", "0/s", 0);
    check("limit: 10/s, burst: 5", "20/s", 20);
    check("limit: 10/s", "2/200ms", 2);
    check("limit: [10/s, 1000/h]", "20/s", 20);
    check("limit: unlimited", "20/s", 20);
}

#[test]
fn every_algorithm_is_read() {
    let bucket = |count, per, burst| one(Window::Bucket { count, per, burst });
    assert_eq!(
        rules("{limit: 10/30s, burst: 7, by: path}"),
        bucket(10, 30 * SECOND, 7)
    );
    assert_eq!(rules("{limit: 0/s, by: constant}"), bucket(0, SECOND, 0));
    assert_eq!(rules("{limit: unlimited, by: []}"), None);
    assert_eq!(
        rules("{limit: [5/m, 20/h], by: [client.ip], algorithm: sliding_window}"),
        Some(Rules::Windows(Windows {
            first: Window::Sliding {
                limit: 5,
                window: 60 * SECOND
            },
            more: vec![Window::Sliding {
                limit: 20,
                window: 3600 * SECOND
            }]
        }))
    );
    assert_eq!(
        rules("{limit: 1000000/month, by: 'header:x', algorithm: fixed_window}"),
        one(Window::Fixed {
            limit: 1_000_000,
            period: Period::Month
        })
    );
    assert_eq!(
        rules("{limit: 10, by: path, algorithm: concurrency}"),
        Some(Rules::Slots(10))
    );
}

#[test]
fn limits_are_shared_where_there_is_a_redis() {
    let check = |limit: &str, shared: Accuracy| {
        let limit = format!("rate_limits: {{a: {limit}}}\n");
        let alone = read(&limit).unwrap().limits[0].accuracy;
        assert_eq!(alone, Accuracy::Local, "{limit}");
        let config = read(&format!("redis: {{urls: redis://h}}\n{limit}")).unwrap();
        assert_eq!(config.limits[0].accuracy, shared, "{limit}");
    };
    check("{limit: 1/s, by: path}", Accuracy::Lease);
    check("{limit: 1/s, by: path, accuracy: lease}", Accuracy::Lease);
    check("{limit: 1/s, by: path, accuracy: strict}", Accuracy::Strict);
    check("{limit: 1/s, by: path, accuracy: local}", Accuracy::Local);
    let slots = |accuracy: &str| {
        format!("{{limit: 1, by: path, algorithm: concurrency, accuracy: {accuracy}}}")
    };
    check(&slots("strict"), Accuracy::Strict);
    check(&slots("local"), Accuracy::Local);
    check(
        "{limit: 1, by: path, algorithm: concurrency}",
        Accuracy::Strict,
    );
    let short = read("redis: {urls: redis://h}\nrate_limit: 1/s\n").unwrap();
    assert_eq!(short.limits[0].accuracy, Accuracy::Lease);
}

#[test]
fn a_limit_without_its_own_loss_has_the_default() {
    let check = |text: &str, expected: [OnLoss; 2]| {
        let limits = "rate_limit: 1/s\nrate_limits: {b: {limit: 1/s, by: path LOSS}}\n";
        let (default, own) = text.split_once('|').unwrap();
        let config = read(&format!("{}{default}\n", limits.replace(" LOSS", own))).unwrap();
        let losses: Vec<_> = config.limits.iter().map(|l| l.on_redis_loss).collect();
        assert_eq!(losses, expected, "{text}");
    };
    let (local, allow, deny) = (OnLoss::Local, OnLoss::Allow, OnLoss::Deny);
    check("|", [local, local]);
    check("|, on_redis_loss: allow", [local, allow]);
    let default = "rate_limit_defaults: {on_redis_loss: deny}|";
    check(default, [deny, deny]);
    check(&format!("{default}, on_redis_loss: local"), [deny, local]);
}

#[test]
fn leases_and_slots_have_their_defaults() {
    let lease = |text: &str| read(text).unwrap().limit_defaults.lease;
    let of = |millis, max_share| Lease {
        ttl: Duration::from_millis(millis),
        max_share,
    };
    assert_eq!(lease(""), of(50, 0.1));
    assert_eq!(
        lease("rate_limit_defaults: {lease: {ttl: 1ms, max_share: 100%}}\n"),
        of(1, 1.0)
    );
    let hold = |more: &str| {
        let slots = format!("{{limit: 1, by: path, algorithm: concurrency{more}}}");
        read(&format!("rate_limits: {{a: {slots}}}\n"))
            .unwrap()
            .limits[0]
            .hold_ttl
    };
    assert_eq!(hold(""), 60 * SECOND);
    assert_eq!(hold(", hold_ttl: 1s"), SECOND);
}

#[test]
fn overrides_are_for_keys_as_requests_have_them() {
    let overrides = |by: &str, overrides: &str, more: &str| {
        let limit = format!("{{limit: 1/s, by: {by}, overrides: {{{overrides}}}}}");
        let config = read(&format!("rate_limits: {{a: {limit}}}\n{more}"))?;
        let keys = config.limits[0].overrides.keys();
        Ok::<_, Vec<String>>(keys.cloned().collect::<Vec<_>>().join(" "))
    };
    let is = |by: &str, written: &str, keys: &str| {
        assert_eq!(overrides(by, written, ""), Ok(keys.to_owned()));
    };
    is(
        "client.ip",
        "'::1': 2/s, 10.1.2.3: unlimited",
        "10.1.2.3 ::",
    );
    is(
        "[client.ip, path]",
        "'2001:db8::7:/a': 2/s",
        "2001:db8:::/a",
    );
    let other = "listeners: [{address: 127.0.0.1:2, client_ip: {ipv6_prefix: 48}}]\n";
    let both = overrides("client.ip", "'2001:db8:1:2::7': 2/s", other);
    assert_eq!(both, Ok("2001:db8:1:2:: 2001:db8:1::".to_owned()));
    is("client.ip", "'::1': 2/s, '::2': 2/s", "::");
    for (by, key, part) in [
        ("client.ip", "10.0.0.0/8", "the address of one client"),
        ("client.ip", "localhost", "the address of one client"),
        ("[client.ip, path]", "10.1.2.3", "which has 2 parts"),
        ("constant", "acme", "one key for all"),
    ] {
        let said = overrides(by, &format!("'{key}': 2/s"), "").unwrap_err();
        let place = format!("rate_limits.a.overrides.{key}: \"{key}\" is not a key");
        assert!(
            said.len() == 1 && said[0].contains(&place) && said[0].contains(part),
            "{said:?}"
        );
    }
    let said = overrides("client.ip", "'::1': 2/s, '::2': 3/s", "").unwrap_err();
    assert!(
        said[0].contains("overrides.::2: another override is for the same clients, ::"),
        "{said:?}"
    );
}

#[test]
fn a_wrong_limit_says_the_mend() {
    let says = |limits: &str, part: &str| {
        let said = read(limits).unwrap_err().join("\n");
        assert!(said.contains(part), "{said}");
    };
    says(
        "rate_limit: 100\n",
        "line 3, column 13: rate_limit: \"100\" is not a rate",
    );
    says(
        "rate_limit: '100/s by '\n",
        "rate_limit: \"100/s by \" says no key: write one, for example client.ip",
    );
    says(
        "rate_limits: {a: {limit: 5/month, by: path}}\n",
        "use algorithm fixed_window",
    );
    says(
        "rate_limit: 1/s\nrate_limits: {rate_limit: {limit: 5/s, by: path}}\n",
        "rate_limits.rate_limit: \"rate_limit\" is the name of the limit that the key rate_limit makes",
    );
    assert!(read("rate_limits: {rate_limit: {limit: 5/s, by: path}}\n").is_ok());
    says(
        "rate_limits: {a: {limit: 100/min, by: path}}\n",
        "a time (ms, s, m, h, d, day, week, month or year), for example 100/s",
    );
    says(
        "routes: [{upstream: upstream, rate_limits: [a]}]\n",
        "unknown limit \"a\"; none is in the file: add it",
    );
    says(
        "routes: [{upstream: upstream, rate_limits: [100/s by client.ip]}]\n",
        "a route names limits: define one under rate_limits",
    );
    says(
        "circuit_breakers: {a: {failure_rate: 0.5}}\n",
        "\"0.5\" is not a percentage: use 50%",
    );
    says(
        "rate_limits: {a: {limit: 5/0s, by: path}}\n",
        "is not a rate",
    );
    says(
        "rate_limits: {a: {limit: 5/s, by: pth}}\n",
        "unknown key \"pth\"; known here: client.ip",
    );
    says(
        "rate_limits: {a: {limit: 5/s, by: path, algorithm: concurrency}}\n",
        "is not a number",
    );
    says(
        "rate_limits: {a: {limit: [20, 10], by: path, algorithm: concurrency}}\n",
        "rate_limits.a.limit: concurrency has one number: keep the smallest",
    );
    says(
        "rate_limits: {a: {limit: 5/s, by: path}}\nroutes: [{upstream: upstream, rate_limits: [b]}]\n",
        "did you mean \"a\"?",
    );
    says(
        "rate_limits: {a: {limit: 5, by: path, algorithm: concurrency, accuracy: lease}}\n",
        "rate_limits.a.accuracy: concurrency has no lease: use strict or local",
    );
    says(
        "rate_limits: {a: {limit: 5/s, by: path, accuracy: exact}}\n",
        "unknown name \"exact\"",
    );
    says(
        "rate_limits: {a: {limit: 5/s, by: path, hold_ttl: 60s}}\n",
        "line 3, column 51: rate_limits.a.hold_ttl: hold_ttl is for algorithm concurrency",
    );
    says(
        "rate_limits: {a: {limit: 5, by: path, algorithm: concurrency, hold_ttl: 999ms}}\n",
        "rate_limits.a.hold_ttl: 999ms is too short: use 1s or more",
    );
    says(
        "rate_limits: {a: {limit: 5/s, by: path, burst: 0}}\n",
        "line 3, column 48: rate_limits.a.burst: a bucket of nothing admits nothing: use 1 or more",
    );
    assert!(read("rate_limits: {a: {limit: 0/s, by: path, burst: 0}}\n").is_ok());
    says(
        "rate_limits: {a: {limit: [10/s, 1000/h], by: path, burst: 20}}\n",
        "line 3, column 59: rate_limits.a.burst: one burst for several windows would be the most that each admits at once: put them into two limits, or leave it out",
    );
    says(
        "rate_limit_defaults: {on_redis_loss: freeze}\n",
        "unknown name \"freeze\"",
    );
    for ttl in ["0s", "10001ms"] {
        says(
            &format!("rate_limit_defaults: {{lease: {{ttl: {ttl}}}}}\n"),
            &format!("rate_limit_defaults.lease.ttl: {ttl} is out of bounds: use 1ms to 10s"),
        );
    }
    says(
        "rate_limit_defaults: {lease: {max_share: 0%}}\n",
        "rate_limit_defaults.lease.max_share: a lease of nothing admits nothing",
    );
    says(
        "rate_limits: {a: {limit: 5/s, by: path}}\nroutes: [{upstream: upstream, rate_limits: [a, a]}]\n",
        "named twice",
    );
}

#[test]
fn the_schema_names_each_part_of_a_key() {
    let said = read("rate_limits: {a: {limit: 1/s, by: nonsense}}\n").unwrap_err();
    let (_, known) = said[0].split_once("known here: ").unwrap();
    let schema = crate::config::schema();
    let by = &schema["$defs"]["RateLimit"]["properties"]["by"]["description"];
    let described: Vec<_> = by.as_str().unwrap().split([',', ';', ' ', '\n']).collect();
    let missing: Vec<_> = known
        .split(' ')
        .filter(|part| !described.contains(part))
        .collect();
    assert!(missing.is_empty() && known.len() > 100, "{missing:?}: {by}");
}
