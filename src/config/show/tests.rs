//! The rules of `show`, as tests.

use super::*;
use crate::config::{check, schema};

/// Every key of the long form, with values other than the defaults.
const EVERY_KEY: &str = r##"
version: 1
listeners:
  - name: inbound
    address: "[::1]:8080"
    protocol: http1
    proxy_protocol: require
    proxy_protocol_from: [10.0.0.0/8, "fd00::/8"]
    transparent: true
    tls: {certificates: [{cert: /a/1.pem, key: /a/1.key}, {cert: /a/2.pem, key: /a/2.key}], client_ca: /a/ca.pem, client_auth: optional, min_version: "1.3"}
    client_ip: {trusted_proxies: [10.0.0.0/8, "::1"], ipv6_prefix: 56}
    limits: {max_connections: 3, max_header_bytes: 9KiB, max_headers: 7, max_body: 1000B, max_concurrent_streams: 6, max_handshakes: 5}
    timeouts: {header_read: 1500ms, request_read: 4s, keep_alive: 1h30m, stream_idle: 2d, tls_handshake: 3s}
  - {name: socket, address: "unix:/a/in.sock", socket_mode: "0600"}
upstreams:
  app: {endpoints: ["http://app.internal"], protocol: http2, connect_timeout: 2s, timeout: 3s, idle_timeout: 4s, circuit_breaker: "yes", trust_session_headers: true}
  "8080": {endpoints: ["http://[::1]:3000/"], circuit_breaker: counts}
  many:
    endpoints: ["http://a:1", {dns: "app.svc:443", refresh: 7s, servers: ["10.0.0.1", "[::1]:54"]}, {dns: "b:1"}]
    load_balancing: {ring_hash: {by: [client.ip, "cookie:c"]}}
    concurrency: {max: 3, adaptive: gradient, min: 2, pending: 0, max_connections: 4}
    retries: {attempts: 2, retry_on: [connect_failure, reset_before_request, reset, timeout, 5xx, "429"], methods: [GET, PUT], per_try_timeout: 5s,
              backoff: {base: 1ms, max: 9ms}, budget: {percent: 30, min_concurrent: 4}, buffer: 64KiB}
    health: {path: "/healthz?a=b", interval: 3s, timeout: 2s, unhealthy_after: 4, healthy_after: 5}
    outlier_detection: {consecutive_5xx: 6, interval: 3s, base_ejection_time: 7s, max_ejection_percent: 50}
    slow_start: {window: 8s, min_weight: 20%}
    panic_threshold: 40%
  secure: {endpoints: ["https://a", "unix:/a/b.sock", {dns: "b:443"}], tls: {sni: c.test, ca: /a/ca.pem, certificate: {cert: /a/c.pem, key: /a/k.pem}}}
  public: {endpoints: "https://[::1]:8443/", protocol: auto}
  keyless: {endpoints: {dns: "c:2"}, load_balancing: round_robin}
routes:
  - match: {host: "*.Example.com", path: /pay/*, methods: [POST, GET], headers: {X-Beta: "1", x-on: "true"}}
    upstream: app
    rate_limits: [windows, tenant]
    session: {use: web, require: true, claims: {role: customer, tier: 2}}
    revalidate_every: 7s
    audit: headers
    timeout: 5s
    shed: false
    rewrite: {path_prefix: /v2, host: "app.internal:80"}
    request_headers: {set: {Authorization: "Bearer hunter2", x-env: prod}, add: {X-A: "1"}, remove: [X-Debug]}
    response_headers: {set: {x-b: ""}, remove: [server]}
  - {match: {path: /old/*}, redirect: {status: 308, scheme: https, host: x.org, port: 8443, path_prefix: /new, strip_query: true}}
  - {match: {path: /older}, redirect: {path: /new}}
  - {match: {path: /robots.txt}, reply: {status: 404, body: "no\n", content_type: text/plain, headers: {X-C: d}}}
  - {match: {path: /a}, upstream: "8080", rate_limits: [slots, free, calendar, burst]}
  - {upstream: app}
rate_limits:
  windows: {limit: [5/s, 20/m], by: [client.ip, client.cert.subject, client.cert.san, "header:X-A", "cookie:c", "query:q", path, host, method, route, upstream]}
  burst: {limit: 10/30s, burst: 7, by: constant, cost: {header: X-Cost, default: 2}, near_limit: 70%, enforced: 12.5%, accuracy: strict, on_redis_loss: deny}
  tenant: {limit: 3/2h, by: "header:x-tenant", algorithm: sliding_window, mode: shadow, if_missing: deny}
  slots: {limit: 10, by: host, algorithm: concurrency, mode: disabled, hold_ttl: 7s, cost: {default: 3}, overrides: {"a:b": unlimited, "1": 5}}
  calendar: {limit: [1/d, 2/day, 3/week, 4/month, 5/year], by: path, algorithm: fixed_window, overrides: {acme: 9/month}}
  free: {limit: unlimited, by: []}
rate_limit_defaults: {on_redis_loss: allow, lease: {ttl: 9ms, max_share: 7.5%}, max_keys: 12, retry_after: {jitter: 3%}, headers: [legacy]}
circuit_breakers:
  "yes":
    scope: local
    quorum: 3
    on_redis_loss: freeze
    window: {type: time, size: 7s}
    minimum_calls: 3
    failure_rate: 33.3%
    consecutive_failures: 4
    slow_call: {duration: 2s, rate: 7%}
    failure_on: [timeout, "503", "grpc:UNAVAILABLE"]
    open_for: 1s
    max_open_for: 2m
    jitter: 0%
    half_open: {probes: 2, success_rate: 100%, probe_timeout: 9s}
    recover_over: 0s
    fallback: {status: 200, body: "{\"a\": \"b\"}\n  # two lines, the second of which is longer than the eighty characters that fit on a line\n", content_type: text/plain}
    mode: shadow
  counts:
    window: {type: count, size: 9}
    failure_on: []
    fallback: {body: " a text of one line, with a space at its ends, that is longer than eighty characters by far "}
sessions:
  web:
    token: [{cookie: s}, {bearer: true}, {header: x-s}]
    idle_timeout: 1m
    absolute_timeout: 2h
    touch_every: 5s
    cache: {ttl: 3s, negative_ttl: 0s, max_entries: 5}
    on_redis_loss: {action: deny, grace: 1m}
    max_per_user: 3
    on_max: reject_new
    max_sessions: 4
    forward: {user: X-U, session: X-S, claims: X-C}
    cookie: {secure: false, http_only: false, same_site: strict, path: /a}
  api: {forward: {user: X-V}}
redis:
  urls: ["rediss://ann:hunter2@redis-0", "rediss://[::1]:6380"]
  mode: cluster
  key_prefix: w2
  timeout: 30ms
  connect_timeout: 1s
  tls: {ca: /a/ca.pem, certificate: {cert: /a/c.pem, key: /a/k.pem}}
  rate_limit: {urls: [rediss://sentinel], mode: sentinel, master_name: limits, username: bob, password: hunter2}
  sessions: {urls: "rediss://:hunter2@h:1/3"}
audit:
  level: metadata
  sample: 5%
  capture: {request_headers: [user-agent], response_headers: [etag], query: false}
  redact: {headers: [x-pin], query: [pin]}
  delivery: guaranteed
  stream: {name: trail, shards: 3, max_length: 7, batch: {events: 9, wait: 5ms}}
  spool: {path: /a/spool, max: 48MiB}
  sqlite: {path: /a/b.db, retention: 7d}
  integrity: {key: "hunter2"}
postgres:
  write: "postgres://ann:hunter2@h/weir"
  read: ["host=a password=hunter2", "postgres://ann:hunter2@b/weir"]
  pool: {write: 4, read: 6, timeout: 3s}
  migrate: false
  tls: {ca: /a/ca.pem, certificate: {cert: /a/c.pem, key: /a/k.pem}}
worker:
  group: g
  batch: {max: 9, wait: 1s}
  claim_after: 7s
  max_deliveries: 3
  partition: day
  retention: 3d
  session_sweep: 9s
  health: {interval: 3s, timeout: 2s, cache: 0s, checks: {audit_lag: {degraded: 4s, critical: 9s}}}
admin: {address: 0.0.0.0:1, token: "hunter2"}
metrics: {address: 127.0.0.1:2, max_series: 5}
telemetry: {log: {format: json, level: warn}, access_log: {format: pretty, sample: 2%, always: [rejected]}, traces: {otlp: "http://otel:4317", sample: 3%}}
runtime: {lanes: 3, shed: {loop_delay: 30ms, memory: 87.5%}}
shutdown: {propagation_delay: 1s, drain: 2s}
"##;

fn read(text: &str) -> Config {
    check::parse(text, &|_| None).unwrap_or_else(|mistakes| panic!("{mistakes:#?}\n{text}"))
}

#[test]
fn what_is_printed_is_the_same_configuration() {
    for text in [
        EVERY_KEY,
        "listen: 127.0.0.1:1\nupstream: http://x\nrate_limit: 100/s by client.ip\n",
    ] {
        let config = read(text);
        let printed = yaml(&config);
        let mut again = read(&printed);
        // Masked, so that they cannot come back.
        if config.admin.token.is_some() {
            again.admin.token.clone_from(&config.admin.token);
            again.audit.clone_from(&config.audit);
            let set = &config.routes[0].request_headers;
            again.routes[0].request_headers.clone_from(set);
            again.redis.clone_from(&config.redis);
            let (Some(again), Some(postgres)) = (&mut again.postgres, &config.postgres) else {
                panic!("{printed}");
            };
            again.write.clone_from(&postgres.write);
            again.read.clone_from(&postgres.read);
        }
        assert_eq!(again, config, "{printed}");
        assert_eq!(yaml(&again), printed);
    }
}

#[test]
fn secrets_are_masked() {
    let config = read(EVERY_KEY);
    for shown in [yaml(&config), json(&config).to_string()] {
        assert!(
            !shown.contains("hunter2") && shown.contains("***"),
            "{shown}"
        );
    }
}

/// Fails when a key is added to the file and not here.
#[test]
fn every_key_of_the_schema_is_shown() {
    let shown = yaml(&read(EVERY_KEY));
    let schema = schema();
    let definitions = schema["$defs"].as_object().unwrap().values();
    let keys = definitions
        .chain([&schema])
        .filter_map(|definition| definition["properties"].as_object())
        .flat_map(|properties| properties.keys());
    for key in keys {
        // The short form is shown as the long one.
        if !["listen", "rate_limit", "upstream"].contains(&key.as_str()) {
            assert!(shown.contains(&format!("{key}:")), "{key}: {shown}");
        }
    }
}
