//! Configurations of ten thousand routes.

use std::fmt::Write as _;
use std::time::Duration;

use super::harness::parse;
use weir::clock::thread_cpu;
use weir::net::tls::Secured;
use weir::plan::{Plan, Process};
use weir::policy::routes::Request;

const MANY: usize = 10_000;

/// Ten thousand routes over a hundred hosts, a thousand upstreams with breakers, and a limit with ten thousand overrides.
fn large() -> String {
    let mut text = "listen: 0.0.0.0:1\ncircuit_breakers: {b: {}}\nupstreams:\n".to_owned();
    for index in 0..MANY / 10 {
        writeln!(
            text,
            "  u{index}: {{endpoints: ['http://x:1'], circuit_breaker: b}}"
        )
        .unwrap();
    }
    text.push_str("rate_limits:\n  a:\n    limit: 5/s\n    by: path\n    overrides:\n");
    for index in 0..MANY {
        writeln!(text, "      k{index}: 9/s").unwrap();
    }
    text.push_str("routes:\n");
    for index in 0..MANY {
        let (host, upstream) = (index % 100, index % 1_000);
        writeln!(
            text,
            "  - {{match: {{host: h{host}.example.com, path: /r{index}/*}}, upstream: u{upstream}, rate_limits: [a]}}"
        )
        .unwrap();
    }
    text
}

/// Of the CPU: what runs beside a test takes none of its time.
fn takes_less_than(seconds: u64, work: impl FnOnce()) {
    let before = thread_cpu();
    work();
    let took = thread_cpu() - before;
    assert!(took < Duration::from_secs(seconds), "{took:?}");
}

/// A release build must take less than a second. Tests are not optimised, and take some two seconds; work that grows with the square
/// of the routes takes minutes.
#[test]
fn ten_thousand_routes_are_loaded_in_seconds_even_unoptimised() {
    let text = large();
    takes_less_than(15, || {
        let config = parse(&text);
        let plan = Plan::first(config.clone(), Secured::default(), Process::default());
        let plan = plan.replaced_by(config, Secured::default()).unwrap();
        assert_eq!(plan.routes.len(), MANY);
    });
}

#[test]
fn ten_thousand_routes_are_checked_in_seconds_even_unoptimised() {
    let mut text =
        "listen: 0.0.0.0:1\nupstreams: {app: {endpoints: ['http://x:1']}}\nroutes:\n".to_owned();
    for index in 0..MANY {
        writeln!(text, "  - {{match: {{path: /r{index}/*}}, upstream: app}}").unwrap();
    }
    takes_less_than(10, || {
        let config = parse(&text);
        assert_eq!(config.routes.len(), MANY);
    });
}

/// One after the other, the routes of these requests would be some fifty million.
#[test]
fn the_route_of_a_request_is_found_without_asking_every_route() {
    let plan = Plan::first(parse(&large()), Secured::default(), Process::default());
    takes_less_than(2, || {
        for index in 0..MANY {
            let (host, path) = (
                format!("H{}.example.com:80", index % 100),
                format!("/r{index}/a/b"),
            );
            let request = Request {
                host: &host,
                path: &path,
                method: "GET",
                fields: &[],
                buffer: b"",
            };
            assert_eq!(plan.index.find(&request), Some(index));
        }
    });
}
