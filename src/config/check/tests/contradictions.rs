//! What two keys say that cannot both be meant, as tests: warned of where it does no harm, refused where it can only be a mistake.

use super::fixture;

fn warned(text: &str) -> String {
    fixture::warned(&format!("listen: 127.0.0.1:1\n{text}")).join("\n")
}

fn with_upstream(keys: &str) -> String {
    warned(&format!(
        "upstreams: {{a: {{endpoints: 'http://x:1', {keys}}}}}\n"
    ))
}

fn says(said: &str, part: &str) {
    assert!(
        said.lines().count() == 1 && said.contains(part),
        "{part}: {said}"
    );
}

#[test]
fn a_burst_of_another_algorithm_is_warned_of() {
    let limited = |limit: &str| {
        warned(&format!(
            "upstream: http://x:1\nrate_limits: {{a: {{by: path, burst: 5, {limit}}}}}\nroutes: [{{upstream: upstream, rate_limits: [a]}}]\n"
        ))
    };
    for limit in [
        "limit: 1/s, algorithm: fixed_window",
        "limit: 1/s, algorithm: sliding_window",
        "limit: 1, algorithm: concurrency",
    ] {
        says(
            &limited(limit),
            "rate_limits.a.burst: only token_bucket has a burst",
        );
    }
    assert_eq!(limited("limit: 1/s"), "");
}

/// In nginx 0 is no limit; here it would refuse everything, or nothing.
#[test]
fn zero_is_no_way_to_say_unlimited() {
    let check = |file: &str, path: &str, mend: &str| {
        let said = fixture::read(file).err().unwrap_or_default();
        assert!(
            said.len() == 1 && said[0].contains(&format!("{path}: ")) && said[0].contains(mend),
            "{said:?}"
        );
    };
    for (key, mend) in [
        ("max_header_bytes: 0B", "for example, 64KiB"),
        ("max_body: 0B", "for example, 10MiB"),
        ("max_headers: 0", "use 1 to 65535, for example 100"),
        ("max_connections: 0", "for example 10000"),
    ] {
        let file = format!(
            "upstream: http://x\nlisteners: [{{name: a, address: '127.0.0.1:1', limits: {{{key}}}}}]\n"
        );
        let name = key.split(':').next().unwrap();
        check(&file, &format!("listeners[0].limits.{name}"), mend);
    }
    let short = "listen: 127.0.0.1:1\nupstream: http://x\n";
    check(
        &format!("{short}sessions: {{web: {{max_sessions: 0}}}}\n"),
        "sessions.web.max_sessions",
        "for example 1000000",
    );
    check(
        &format!("{short}rate_limit_defaults: {{max_keys: 0}}\n"),
        "rate_limit_defaults.max_keys",
        "use auto or a whole number from 1",
    );
    check(
        &format!("{short}rate_limits: {{a: {{limit: 1/s, by: path, cost: {{default: 0}}}}}}\n"),
        "rate_limits.a.cost.default",
        "use 1 or more",
    );
}

#[test]
fn times_that_undo_each_other_are_warned_of() {
    let tried = |per_try: &str| {
        with_upstream(&format!(
            "timeout: 2s, retries: {{per_try_timeout: {per_try}}}"
        ))
    };
    says(
        &tried("3s"),
        "upstreams.a.retries.per_try_timeout: 3s is longer than the upstream's timeout, 2s",
    );
    assert_eq!(tried("2s"), "");
    says(
        &with_upstream("health: {path: /, interval: 1s, timeout: 2s}"),
        "upstreams.a.health.timeout: 2s is longer than interval, 1s",
    );
    assert_eq!(with_upstream("health: {path: /, interval: 1s}"), "");
    let broken = |breaker: &str| {
        warned(&format!(
            "upstreams: {{a: {{endpoints: 'http://x:1', circuit_breaker: b}}}}\ncircuit_breakers: {{b: {{{breaker}}}}}\n"
        ))
    };
    says(
        &broken("open_for: 2m, max_open_for: 1m"),
        "circuit_breakers.b.open_for: 2m is longer than max_open_for, 1m",
    );
    says(
        &broken("open_for: 6m"),
        "circuit_breakers.b.open_for: 6m is longer than max_open_for, 5m",
    );
    assert_eq!(broken("open_for: 5m"), "");
    let kept = |sessions: &str| {
        warned(&format!(
            "upstream: http://x:1\nsessions: {{web: {{{sessions}}}}}\nroutes: [{{upstream: upstream, session: {{use: web}}}}]\n"
        ))
    };
    says(
        &kept("idle_timeout: 2h, absolute_timeout: 1h"),
        "sessions.web.idle_timeout: 2h is longer than absolute_timeout, 1h",
    );
    assert_eq!(kept("idle_timeout: 1h, absolute_timeout: 1h"), "");
}

#[test]
fn a_database_beside_postgres_is_warned_of() {
    let kept = |audit: &str| {
        warned(&format!(
            "upstream: http://x:1\nredis: {{urls: redis://h}}\naudit: {{{audit}}}\npostgres: {{write: 'host=h'}}\n"
        ))
    };
    says(
        &kept("sqlite: {path: a.db}"),
        "audit.sqlite: the audit goes to postgres, so that this does nothing",
    );
    assert_eq!(kept(""), "");
}

#[test]
fn a_name_that_no_header_has_is_refused() {
    let said = |text: &str| {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{text}\n");
        let said = fixture::read(&text).err().unwrap_or_default();
        said.join("\n")
    };
    for (text, path) in [
        (
            "routes: [{match: {headers: {x a: b}}, upstream: upstream}]",
            "routes[0].match.headers: ",
        ),
        (
            "rate_limits: {a: {limit: 1/s, by: 'header:x a'}}",
            "rate_limits.a.by: ",
        ),
        (
            "rate_limits: {a: {limit: 1/s, by: path, cost: {header: x a}}}",
            "rate_limits.a.cost.header: ",
        ),
    ] {
        says(
            &said(text),
            &format!("{path}\"x a\" is not a header's name: use letters, digits and -"),
        );
    }
}

#[test]
fn what_is_named_twice_is_refused() {
    let says = |file: &str, expected: &str| {
        let said = fixture::read(&format!(
            "listen: 127.0.0.1:1\nupstream: http://x:1\n{file}"
        ));
        assert_eq!(said.unwrap_err(), [expected]);
    };
    // The key's own would get no request.
    says(
        "upstreams: {upstream: {endpoints: 'http://x:2'}}\nroutes: [{upstream: upstream}]\n",
        "line 3, column 23: upstreams.upstream: \"upstream\" is the name of the upstream that the key upstream makes: take another name, or leave that key out",
    );
    // A field has one value there.
    says(
        "routes:\n  - {match: {headers: {X-A: '1', x-a: '2'}}, upstream: upstream}\n",
        "line 4, column 39: routes[0].match.headers: \"x-a\" is named twice: keep one of them",
    );
}
