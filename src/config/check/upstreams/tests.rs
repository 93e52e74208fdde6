//! The rules of upstreams, as tests.

use std::time::Duration;

use super::super::tests::fixture;
use super::*;
use crate::config::limits::KeyPart;
use crate::config::upstreams::RetryOn;

fn read(upstream: &str) -> Result<Upstream, String> {
    let text = format!("listen: 127.0.0.1:1\nupstreams:\n  a: {upstream}\n");
    fixture::read(&text)
        .map(|config| config.upstreams[0].clone())
        .map_err(|said| said.join("\n"))
}

#[test]
fn endpoints_are_one_or_a_list_of_addresses_and_names() {
    let fixed = |place: &str| Source::Fixed(place.to_owned());
    let dns = |name: &str, port, seconds, servers: &[&str]| {
        Source::Dns(DnsName {
            name: name.to_owned(),
            port,
            refresh: Duration::from_secs(seconds),
            servers: servers.iter().map(|at| at.parse().unwrap()).collect(),
        })
    };
    let check = |endpoints: &str, expected: &[Source]| {
        let upstream = read(&format!("{{endpoints: {endpoints}}}")).unwrap();
        assert_eq!(upstream.endpoints, expected, "{endpoints}");
    };
    check("http://a:1", &[fixed("a:1")]);
    check(
        "['http://a', 'http://[::1]:2/']",
        &[fixed("a:80"), fixed("[::1]:2")],
    );
    check("{dns: 'app.svc:443'}", &[dns("app.svc", 443, 10, &[])]);
    check(
        "['http://a:1', {dns: 'b_c.svc.:2', refresh: 3s, servers: [10.0.0.1, '[::1]:5']}]",
        &[
            fixed("a:1"),
            dns("b_c.svc.", 2, 3, &["10.0.0.1:53", "[::1]:5"]),
        ],
    );
}

#[test]
fn sections_have_defaults_and_are_absent_without_them() {
    let none = read("{endpoints: http://a:1}").unwrap();
    assert_eq!(none.load_balancing, Balancing::LeastRequest);
    assert_eq!(none.panic_threshold, 0.5);
    assert!(none.concurrency.is_none() && none.retries.is_none() && none.health.is_none());
    assert!(none.outlier_detection.is_none() && none.slow_start.is_none());
    let all = read(
        "{endpoints: http://a:1, load_balancing: {ring_hash: {by: [client.ip, 'header:X-A']}}, concurrency: {}, retries: {}, \
         health: {path: /healthz}, outlier_detection: {}, slow_start: {window: 30s}, panic_threshold: 0%}",
    )
    .unwrap();
    let key = vec![KeyPart::ClientIp, KeyPart::Header("x-a".to_owned())];
    assert_eq!(all.load_balancing, Balancing::RingHash(key));
    let Concurrency {
        max,
        adaptive_min,
        pending,
        max_connections,
    } = all.concurrency.unwrap();
    assert_eq!(
        (max, adaptive_min, pending, max_connections),
        (1024, None, 128, 1024)
    );
    let health = all.health.unwrap();
    assert_eq!((health.interval, health.timeout), (10 * SECOND, SECOND));
    assert_eq!((health.unhealthy_after, health.healthy_after), (3, 2));
    let outlier = all.outlier_detection.unwrap();
    assert_eq!(
        (outlier.consecutive_5xx, outlier.max_ejection_percent),
        (5, 10)
    );
    assert_eq!(
        (outlier.interval, outlier.base_ejection_time),
        (10 * SECOND, 30 * SECOND)
    );
    assert_eq!(all.slow_start.unwrap().min_weight, 0.1);
    assert_eq!(all.panic_threshold, 0.0);
    let retries = all.retries.unwrap();
    let on = RetryOn {
        connect_failure: true,
        reset_before_request: true,
        statuses: vec![503],
        ..RetryOn::default()
    };
    assert_eq!(
        (retries.attempts, retries.retry_on, retries.buffer),
        (1, on, 0)
    );
    assert_eq!(retries.methods, ["GET", "HEAD", "OPTIONS"]);
    assert_eq!(
        (retries.budget.percent, retries.budget.min_concurrent),
        (20, 3)
    );
    assert_eq!(retries.per_try_timeout, None);
}

#[test]
fn a_wrong_upstream_says_the_mend() {
    for (rest, part) in [
        (
            "endpoints: 'http://x:1', timeout: 0s",
            "upstreams.a.timeout: 0s is over at once, and stands for no \"never\": use 1ms or more, for example 15s",
        ),
        (
            "endpoints: 'http://x:1', connect_timeout: 0s",
            "upstreams.a.connect_timeout: 0s is over at once",
        ),
        (
            "endpoints: {dns: app}",
            "line 3, column 24: upstreams.a.endpoints.dns: \"app\" is not a name with a port: use NAME:PORT",
        ),
        (
            "endpoints: [{dns: 'a b:1'}]",
            "upstreams.a.endpoints[0].dns: \"a b:1\" is not a name",
        ),
        (
            "endpoints: [{dns: 'a:1', refrsh: 1s}]",
            "did you mean \"refresh\"?",
        ),
        (
            "endpoints: {dns: 'a:1', refrsh: 1s}",
            "did you mean \"refresh\"?",
        ),
        (
            "endpoints: {dns: 'a:1', servers: [ns.example]}",
            "is not a name server: use IP",
        ),
        ("endpoints: {dns: 'a:1', refresh: 0s}", "use 1ms to 1d"),
        ("endpoints: [{refresh: 1s}]", "\"dns\" is missing: add it"),
        (
            "endpoints: 'ftp://a:1'",
            "line 3, column 18: upstreams.a.endpoints: \"ftp://a:1\" is not an endpoint",
        ),
        ("endpoints: ['http://a:0']", "is not an endpoint"),
        (
            "endpoints: http://a:1/api/",
            "it has a path: use http://a:1, and \"rewrite: {path_prefix: /api}\" of a route",
        ),
        (
            "endpoints: http://::1:3000",
            "stands in [], as in http://[::1]:3000",
        ),
        (
            "endpoints: http://u:secret@a:1",
            "upstreams.a.endpoints: an endpoint has no user and no password",
        ),
        (
            "endpoints: http://a, timeout: -5",
            "\"-5\" is not a duration",
        ),
        (
            "endpoints: ['https://a', 'http://b']",
            "upstreams.a.endpoints: some endpoints use TLS and some do not",
        ),
        (
            "endpoints: http://a, tls: {sni: b}",
            "upstreams.a.tls: no endpoint uses TLS: write https://",
        ),
        (
            "endpoints: https://a, tls: {sni: 'b c'}",
            "upstreams.a.tls.sni: \"b c\" is not a name",
        ),
        (
            "endpoints: https://a, tls: {certificate: {cert: /a}}",
            "\"key\" is missing",
        ),
        (
            "endpoints: 'unix:app.sock'",
            "use unix:/PATH, for example unix:/run/app.sock",
        ),
        (
            "endpoints: ['http://a', 'http://a:80']",
            "upstreams.a.endpoints[1]: this endpoint is in the list already",
        ),
        ("endpoints: []", "no endpoint: add one"),
        (
            "endpoints: http://a, load_balancing: least_requests",
            "did you mean \"least_request\"?",
        ),
        (
            "endpoints: http://a, load_balancing: ring_hash",
            "ring_hash needs a key: use, for example, {ring_hash: {by: client.ip}}",
        ),
        (
            "endpoints: http://a, load_balancing: {ring_hash: {by: client}}",
            "unknown key \"client\"",
        ),
        (
            "endpoints: http://a, load_balancing: {ring_hash: {by: constant}}",
            "a key of nothing",
        ),
        (
            "endpoints: http://a, load_balancing: {ring: {by: path}}",
            "unknown key \"ring\"",
        ),
        (
            "endpoints: http://a, concurrency: {max: 0}",
            "upstreams.a.concurrency.max: 0 is out of bounds: use 1 to",
        ),
        (
            "endpoints: http://a, health: {path: healthz}",
            "\"healthz\" is not a path",
        ),
        (
            "endpoints: http://a, health: {interval: 1s}",
            "\"path\" is missing",
        ),
        (
            "endpoints: http://a, protocol: http2, health: {path: /, grpc: a.B}",
            "keep one",
        ),
        (
            "endpoints: http://a, health: {grpc: a.B}",
            "upstreams.a.health.grpc: gRPC is spoken by HTTP/2",
        ),
        (
            "endpoints: http://a, health: {path: /, host: 'a/b'}",
            "\"a/b\" is not a host",
        ),
        ("endpoints: http://a, max_age: 0s", "0s is over at once"),
        (
            "endpoints: http://a, health: {path: /, unhealthy_after: 0}",
            "use 1 to 1000",
        ),
        (
            "endpoints: http://a, outlier_detection: {max_ejection_percent: 101}",
            "use 0 to 100",
        ),
        (
            "endpoints: http://a, slow_start: {window: 1s, min_weight: 0%}",
            "would never begin",
        ),
        (
            "endpoints: http://a, retries: {attempts: 11}",
            "use 0 to 10",
        ),
        (
            "endpoints: http://a, retries: {retry_on: [conect_failure]}",
            "upstreams.a.retries.retry_on[0]: \"conect_failure\" is no reason to try again; did you mean \"connect_failure\"?",
        ),
        (
            "endpoints: http://a, retries: {retry_on: ['200']}",
            "a status from 400 on",
        ),
        (
            "endpoints: http://a, retries: {methods: [POST]}",
            "upstreams.a.retries.methods[0]: \"POST\" is not idempotent",
        ),
        (
            "endpoints: http://a, retries: {buffer: 1GiB}",
            "use up to 16MiB",
        ),
    ] {
        let said = read(&format!("{{{rest}}}")).unwrap_err();
        assert!(said.contains(part), "{rest}: {said}");
    }
}

#[test]
fn endpoints_say_whether_they_speak_tls() {
    let tls = |rest: &str| read(&format!("{{{rest}}}")).unwrap().tls;
    assert_eq!(tls("endpoints: http://a"), None);
    assert_eq!(tls("endpoints: ['unix:/a', {dns: 'a:1'}]"), None);
    assert_eq!(tls("endpoints: https://a"), Some(UpstreamTls::default()));
    let names = "endpoints: ['unix:/a', {dns: 'a:1'}], tls: {}";
    assert_eq!(tls(names), Some(UpstreamTls::default()));
    let all =
        read("{endpoints: ['https://a', 'https://[::1]:9', 'unix:/a', {dns: 'a:1'}]}").unwrap();
    let places = ["a:443", "[::1]:9", "unix:/a"].map(|place| Source::Fixed(place.to_owned()));
    assert_eq!(all.endpoints[..3], places);
    assert!(all.tls.is_some());
}
