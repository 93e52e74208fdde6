//! The least and the most that a number, a time or a size may be: each is right, and what is a little beyond is told by its key.

use super::fixture::read;

/// Where a key stands: a file with `KEY` for it.
const UPSTREAM: &str = "listen: 127.0.0.1:1\nupstreams: {a: {endpoints: ['http://x:1'], KEY}}\n";
const ENDPOINT: &str = "listen: 127.0.0.1:1\nupstreams: {a: {endpoints: [{dns: 'x:1', KEY}]}}\n";
const LISTENER: &str = "upstream: http://x:1\nlisteners: [{address: '127.0.0.1:1', KEY}]\n";
const ROUTE: &str = "listen: 127.0.0.1:1\nupstream: http://x:1\nroutes: [{KEY}]\n";
const BREAKER: &str = "listen: 127.0.0.1:1\ncircuit_breakers: {b: {KEY}}\n\
     upstreams: {a: {endpoints: ['http://x:1'], circuit_breaker: b}}\n";
const LIMIT: &str = "listen: 127.0.0.1:1\nupstream: http://x:1\nrate_limits: {l: {by: client.ip, KEY}}\n\
     routes: [{upstream: upstream, rate_limits: [l]}]\n";
const SESSIONS: &str = "listen: 127.0.0.1:1\nupstream: http://x:1\nsessions: {web: {KEY}}\n\
     routes: [{upstream: upstream, session: {use: web}}]\n";
const POSTGRES: &str = "listen: 127.0.0.1:1\nupstream: http://x:1\naudit: {}\nredis: {urls: 'redis://r'}\n\
     postgres: {write: 'host=p', KEY}\n";
const TOP: &str = "listen: 127.0.0.1:1\nupstream: http://x:1\nKEY\n";

/// `key` has `#` for its value. What is wrong is told by the last name of it.
#[track_caller]
fn check(around: &str, key: &str, right: &[&str], wrong: &[&str]) {
    let name = key.split(": #").next().unwrap_or_default();
    let name = name.rsplit([' ', '{']).next().unwrap_or_default();
    let read = |value: &str| read(&around.replace("KEY", &key.replace('#', value)));
    for value in right {
        let told = read(value).err();
        assert_eq!(told, None, "{key} {value}");
    }
    for value in wrong {
        let told = read(value).expect_err(value);
        let is_told = told.iter().any(|said| said.contains(name));
        assert!(is_told, "{key} {value}: {told:#?}");
    }
}

#[test]
fn numbers_are_right_up_to_their_bounds_and_no_further() {
    let u32s = (["1", "4294967295"], ["0", "4294967296"]);
    for key in [
        "max",
        "max_connections",
        "adaptive: gradient, max: 4294967295, min",
    ] {
        check(
            UPSTREAM,
            &format!("concurrency: {{{key}: #}}"),
            &u32s.0,
            &u32s.1,
        );
    }
    let (right, wrong) = (["0", "4294967295"], ["-1", "4294967296"]);
    check(UPSTREAM, "concurrency: {pending: #}", &right, &wrong);
    for key in ["unhealthy_after", "healthy_after"] {
        let key = format!("health: {{path: /h, {key}: #}}");
        check(UPSTREAM, &key, &["1", "1000"], &["0", "1001"]);
    }
    let key = "outlier_detection: {consecutive_5xx: #}";
    check(UPSTREAM, key, &["1", "1000000"], &["0", "1000001"]);
    for key in [
        "outlier_detection: {max_ejection_percent: #}",
        "retries: {budget: {percent: #}}",
    ] {
        check(UPSTREAM, key, &["0", "100"], &["-1", "101"]);
    }
    check(
        UPSTREAM,
        "retries: {attempts: #}",
        &["0", "10"],
        &["-1", "11"],
    );
    let key = "retries: {budget: {min_concurrent: #}}";
    check(UPSTREAM, key, &["0", "1000000"], &["-1", "1000001"]);
    check(SESSIONS, "max_sessions: #", &u32s.0, &u32s.1);
    check(SESSIONS, "max_per_user: #", &u32s.0, &u32s.1);
    check(SESSIONS, "cache: {max_entries: #}", &["1"], &["0"]);
    check(
        ROUTE,
        "redirect: {port: #}",
        &["1", "65535"],
        &["0", "65536"],
    );
    for key in ["write", "read"] {
        let key = format!("pool: {{{key}: #}}");
        check(POSTGRES, &key, &["1", "10000"], &["0", "10001"]);
    }
    check(LISTENER, "limits: {max_connections: #}", &u32s.0, &u32s.1);
    check(
        LISTENER,
        "limits: {max_headers: #}",
        &["1", "65535"],
        &["0", "65536"],
    );
    for (key, most, beyond) in [
        ("audit: {stream: {shards: #}}", "256", "257"),
        ("audit: {stream: {batch: {events: #}}}", "10000", "10001"),
        ("worker: {batch: {max: #}}", "1000000", "1000001"),
        ("worker: {max_deliveries: #}", "1000", "1001"),
    ] {
        check(TOP, key, &["1", most], &["0", beyond]);
    }
    check(TOP, "audit: {stream: {max_length: #}}", &["1"], &["0"]);
    check(LIMIT, "limit: 5/s, cost: {default: #}", &["1"], &["0"]);
    check(BREAKER, "quorum: #", &["1"], &["0"]);
    for key in [
        "window: {type: count, size: #}",
        "window: {type: time, size: #ms}",
    ] {
        check(BREAKER, key, &["1"], &["0"]);
    }
}

#[test]
fn times_are_right_up_to_their_bounds_and_no_further() {
    let (day, minute) = (["1d", "86400001ms"], ["1m", "60001ms"]);
    let ten = ["10s", "10001ms"];
    for (around, key, [most, beyond]) in [
        (UPSTREAM, "health: {path: /h, interval: #}", day),
        (
            UPSTREAM,
            "health: {path: /h, interval: 1d, timeout: #}",
            day,
        ),
        (UPSTREAM, "outlier_detection: {interval: #}", day),
        (UPSTREAM, "outlier_detection: {base_ejection_time: #}", day),
        (UPSTREAM, "slow_start: {window: #}", day),
        (UPSTREAM, "retries: {per_try_timeout: #}", day),
        (UPSTREAM, "retries: {backoff: {base: #}}", day),
        (UPSTREAM, "retries: {backoff: {max: #}}", day),
        (ENDPOINT, "refresh: #", day),
        (LISTENER, "timeouts: {tls_handshake: #}", minute),
        (POSTGRES, "pool: {timeout: #}", minute),
        (TOP, "redis: {urls: 'redis://r', timeout: #}", ten),
        (
            TOP,
            "redis: {urls: 'redis://r', connect_timeout: #}",
            minute,
        ),
        (TOP, "audit: {stream: {batch: {wait: #}}}", ten),
        (TOP, "rate_limit_defaults: {lease: {ttl: #}}", ten),
        (TOP, "runtime: {shed: {loop_delay: #}}", minute),
        (TOP, "worker: {batch: {wait: #}}", minute),
        (TOP, "worker: {claim_after: #}", day),
        (TOP, "worker: {session_sweep: #}", day),
        (TOP, "worker: {health: {interval: #}}", ["1h", "3600001ms"]),
        (TOP, "worker: {health: {timeout: #}}", minute),
        (
            TOP,
            "worker: {health: {checks: {audit_lag: {critical: 1d, degraded: #}}}}",
            day,
        ),
        (
            TOP,
            "worker: {health: {checks: {audit_lag: {degraded: 1ms, critical: #}}}}",
            day,
        ),
    ] {
        check(around, key, &["1ms", most], &["0s", beyond]);
    }
    for (around, key) in [
        (UPSTREAM, "connect_timeout: #"),
        (UPSTREAM, "timeout: #"),
        (UPSTREAM, "max_age: #"),
        (LISTENER, "timeouts: {header_read: #}"),
        (LISTENER, "timeouts: {request_read: #}"),
        (LISTENER, "timeouts: {keep_alive: #}"),
        (LISTENER, "timeouts: {max_age: #}"),
        (LISTENER, "timeouts: {stream_idle: #}"),
        (BREAKER, "half_open: {probe_timeout: #}"),
        (ROUTE, "upstream: upstream, timeout: #"),
        (SESSIONS, "idle_timeout: #"),
        (SESSIONS, "absolute_timeout: #"),
    ] {
        check(around, key, &["1ms"], &["0s"]);
    }
    let key = "limit: 5, algorithm: concurrency, hold_ttl: #";
    check(LIMIT, key, &["1s"], &["999ms"]);
    check(
        SESSIONS,
        "idle_timeout: 10s, touch_every: #",
        &["9999ms"],
        &["10s"],
    );
    for key in ["audit: {sqlite: {retention: #}}", "worker: {retention: #}"] {
        check(TOP, key, &["1d"], &["23h", "25h"]);
    }
}

#[test]
fn sizes_and_shares_are_right_up_to_their_bounds_and_no_further() {
    for key in ["limits: {max_header_bytes: #}", "limits: {max_body: #}"] {
        check(LISTENER, key, &["1B"], &["0B"]);
    }
    check(
        UPSTREAM,
        "retries: {buffer: #}",
        &["0B", "16MiB"],
        &["16777217B"],
    );
    check(TOP, "audit: {spool: {max: #}}", &["16MiB"], &["16777215B"]);
    check(
        TOP,
        "runtime: {shed: {memory: #}}",
        &["1%", "95%", "1B"],
        &["0%", "96%", "0B"],
    );
    for (around, key) in [
        (UPSTREAM, "slow_start: {window: 1s, min_weight: #}"),
        (TOP, "rate_limit_defaults: {lease: {max_share: #}}"),
    ] {
        check(around, key, &["1%", "100%"], &["0%", "101%"]);
    }
}
