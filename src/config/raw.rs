//! The file as it is written: a serde mirror of its YAML, and the source of its JSON Schema. Owns the keys; must not
//! know what is right for them beyond their shape.

mod audit;
mod limits;
mod listeners;
mod postgres;
mod redis;
mod rewrite;
mod telemetry;
mod upstreams;
mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;

use schemars::JsonSchema;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::units::{Percent, TimeLength};
use super::yaml::At;
pub use audit::{
    Audit, AuditLevel, AuditStream, Capture, Delivery, Integrity, Redact, RouteAudit, Spool,
    Sqlite, StreamBatch,
};
pub use limits::{
    Accuracy, Algorithm, Cost, IfMissing, Lease, LimitHeaders, MaxKeys, OnLoss, RateLimit,
    RateLimitDefaults, RetryAfter,
};
pub use listeners::{
    ClientAuth, ClientIp, Limits, Listener, ListenerProtocol, ListenerTls, ProxyProtocol, Timeouts,
    TlsVersion,
};
pub use postgres::{Pool, Postgres};
pub use redis::{Certificate, Redis, RedisClient, RedisMode, Tls};
pub use rewrite::{HeaderChanges, Redirect, Reply, Rewrite, Scheme};
pub use telemetry::{AccessLog, Always, Log, LogFormat, LogLevel, Telemetry, Traces};
pub use upstreams::{
    Adaptive, Backoff, Budget, Concurrency, DnsEndpoint, Endpoint, HealthCheck, LoadBalancing,
    OutlierDetection, Retries, RingHash, RingKey, SlowStart, Upstream, UpstreamProtocol,
    UpstreamTls,
};
pub use worker::{AuditLag, HealthChecks, Partition, Worker, WorkerBatch, WorkerHealth};

/// The whole file. The short form is `listen` and `upstream`; the long form `listeners`, `upstreams` and `routes`.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct File {
    /// The version of this format: 1.
    pub version: Option<At<u32>>,
    /// Short form: the address to listen on, for example `0.0.0.0:8080`.
    pub listen: Option<At<String>>,
    /// Short form: where every request goes, for example `http://127.0.0.1:3000`.
    pub upstream: Option<At<String>>,
    /// Where clients connect.
    pub listeners: Option<At<Vec<At<Listener>>>>,
    /// Where requests go, by name.
    #[serde(default)]
    pub upstreams: BTreeMap<String, At<Upstream>>,
    /// Which upstream serves a request; the first match wins.
    pub routes: Option<At<Vec<At<Route>>>>,
    /// Short form: a limit on every route, for example `100/s by client.ip`; without `by` all clients share it.
    pub rate_limit: Option<At<String>>,
    /// Rate limits, by name.
    #[serde(default)]
    pub rate_limits: BTreeMap<String, At<RateLimit>>,
    pub rate_limit_defaults: Option<At<RateLimitDefaults>>,
    /// Circuit breakers, by name; upstreams name them.
    #[serde(default)]
    pub circuit_breakers: BTreeMap<String, At<CircuitBreaker>>,
    /// Sessions, by name; routes name them.
    #[serde(default)]
    pub sessions: BTreeMap<String, At<Sessions>>,
    /// What processes share their state through; absent: each has its own.
    pub redis: Option<At<Redis>>,
    /// What is kept of requests; absent: nothing.
    pub audit: Option<At<Audit>>,
    /// Where the audit is stored in place of the SQLite file, by `weir worker`; needs `redis` and `audit`.
    pub postgres: Option<At<Postgres>>,
    /// How the audit is ingested into `postgres`, and how health is told.
    pub worker: Option<At<Worker>>,
    pub admin: Option<At<Admin>>,
    pub metrics: Option<At<MetricsAt>>,
    pub telemetry: Option<At<Telemetry>>,
    pub runtime: Option<At<Runtime>>,
    pub shutdown: Option<At<Shutdown>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Route {
    /// Absent: every request.
    #[serde(rename = "match")]
    pub matches: Option<At<Match>>,
    /// A name under `upstreams`. A route has exactly one of `upstream`, `redirect` and `reply`.
    pub upstream: Option<At<String>>,
    /// Sends clients elsewhere.
    pub redirect: Option<At<Redirect>>,
    /// Answers in place of an upstream.
    pub reply: Option<At<Reply>>,
    /// Names under `rate_limits`; every one must admit.
    #[serde(default)]
    pub rate_limits: Vec<At<String>>,
    pub session: Option<At<RouteSession>>,
    /// How often the session of a switched connection (WebSocket) is looked at again [default: 30s].
    pub revalidate_every: Option<At<TimeLength>>,
    /// How much is kept of its requests: a level, or {level, sample} [default: that of `audit`].
    pub audit: Option<At<RouteAudit>>,
    /// In place of the upstream's.
    pub timeout: Option<At<TimeLength>>,
    /// Whether its requests may be refused as `runtime.shed` says [default: true].
    pub shed: Option<At<bool>>,
    pub rewrite: Option<At<Rewrite>>,
    /// Of requests on their way to the upstream.
    pub request_headers: Option<At<HeaderChanges>>,
    /// Of final responses, the route's own among them; weir's refusals are left as they are.
    pub response_headers: Option<At<HeaderChanges>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RouteSession {
    /// A name under `sessions`.
    #[serde(rename = "use")]
    pub uses: At<String>,
    /// Whether a request without a session is refused with 401 [default: true].
    pub require: Option<At<bool>>,
    /// What the session must have, or the request is refused with 403: an equal value, or a list that holds it.
    #[serde(default)]
    pub claims: BTreeMap<String, At<serde_json::Value>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Sessions {
    /// Where a token is looked for, in this order [default: the cookie `sid`].
    pub token: Option<At<Vec<At<TokenSource>>>>,
    /// Unused for this long, a session is over [default: 30m].
    pub idle_timeout: Option<At<TimeLength>>,
    /// This old, a session is over, however busy [default: 12h].
    pub absolute_timeout: Option<At<TimeLength>>,
    /// With `redis`: a use is written down this long after the last one that was; below `idle_timeout` [default: 60s, or
    /// half of `idle_timeout` where that is less].
    pub touch_every: Option<At<TimeLength>>,
    /// 1 or more [default: any number].
    pub max_per_user: Option<At<u32>>,
    /// [default: evict_oldest]
    pub on_max: Option<At<OnMax>>,
    /// Held in memory at most; at this bound new ones are refused [default: 1000000].
    pub max_sessions: Option<At<u32>>,
    pub cache: Option<At<SessionCache>>,
    pub on_redis_loss: Option<At<SessionLoss>>,
    /// Request headers that tell the upstream who asks.
    pub forward: Option<At<Forward>>,
    pub cookie: Option<At<Cookie>>,
}

/// With `redis`: what a process remembers of its answers.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SessionCache {
    /// For a session [default: 2s].
    pub ttl: Option<At<TimeLength>>,
    /// For a token without a session [default: 1s].
    pub negative_ttl: Option<At<TimeLength>>,
    /// [default: 100000]
    pub max_entries: Option<At<u32>>,
}

/// While `redis` does not answer.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SessionLoss {
    /// [default: deny, the only one]
    pub action: Option<At<SessionLossAction>>,
    /// Sessions that are remembered hold for this long first [default: 30s].
    pub grace: Option<At<TimeLength>>,
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SessionLossAction {
    /// 503, and the client keeps its cookie.
    Deny,
}

/// One of these.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct TokenSource {
    pub cookie: Option<At<String>>,
    /// `Authorization: Bearer`; true.
    pub bearer: Option<At<bool>>,
    pub header: Option<At<String>>,
}

/// What happens to a user at the maximum who starts one more session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnMax {
    /// The session that was created first goes.
    #[default]
    EvictOldest,
    /// The new one is refused.
    RejectNew,
}

/// A key that is left out has its default, unless `forward` is written: then only what it names is sent.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Forward {
    /// [default: X-Auth-User]
    pub user: Option<At<String>>,
    /// The session's id, which is not its token [default: X-Auth-Session].
    pub session: Option<At<String>>,
    /// As JSON [default: X-Auth-Claims].
    pub claims: Option<At<String>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Cookie {
    /// [default: true]
    pub secure: Option<At<bool>>,
    /// [default: true]
    pub http_only: Option<At<bool>>,
    /// [default: lax]
    pub same_site: Option<At<SameSite>>,
    /// [default: /]
    pub path: Option<At<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SameSite {
    #[default]
    Lax,
    Strict,
    None,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Match {
    /// `api.example.com`, or `*.example.com` for any name below it.
    pub host: Option<At<String>>,
    /// `/pay`; `/pay/*` for `/pay/` and all below it; `/pay/**` for `/pay`, too.
    pub path: Option<At<String>>,
    /// Whether `/PAY` is `/pay`, as to many apps [default: false].
    pub ignore_case: Option<At<bool>>,
    /// Any of these; empty: every method.
    #[serde(default)]
    pub methods: Vec<At<String>>,
    /// All of these, each with its exact value.
    #[serde(default)]
    pub headers: BTreeMap<String, At<String>>,
}

/// What becomes of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    #[default]
    Enforce,
    /// Decides and counts, and admits all the same.
    Shadow,
    Disabled,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct CircuitBreaker {
    /// [default: shared with `redis`; always local without]
    pub scope: Option<At<Scope>>,
    /// Processes that must see failures before a shared breaker trips; where fewer live, all of them [default: 2].
    pub quorum: Option<At<u32>>,
    /// While `redis` does not answer [default: local].
    pub on_redis_loss: Option<At<BreakerOnLoss>>,
    /// [default: time, 10s]
    pub window: Option<At<Window>>,
    /// Rates say nothing before the window holds this many calls [default: 20].
    pub minimum_calls: Option<At<u32>>,
    /// The share of failures that trips [default: 50%].
    pub failure_rate: Option<At<Percent>>,
    /// Failures in a row that trip [default: 0, not used].
    pub consecutive_failures: Option<At<u32>>,
    /// [default: not used]
    pub slow_call: Option<At<SlowCall>>,
    /// connect_failure, timeout, reset, 5xx, a status such as "503", or one of gRPC such as "grpc:UNAVAILABLE"
    /// [default: the first four].
    pub failure_on: Option<At<Vec<At<String>>>>,
    /// How long it stays open; doubles at each re-opening [default: 10s].
    pub open_for: Option<At<TimeLength>>,
    /// [default: 5m]
    pub max_open_for: Option<At<TimeLength>>,
    /// The most that is added to an opening [default: 10%].
    pub jitter: Option<At<Percent>>,
    pub half_open: Option<At<HalfOpen>>,
    /// The time of the ramp back to full traffic [default: 30s].
    pub recover_over: Option<At<TimeLength>>,
    /// What clients get while it is open, in place of weir's own 503.
    pub fallback: Option<At<Fallback>>,
    /// [default: enforce]
    pub mode: Option<At<Mode>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// All processes that have one `redis` open and close together.
    Shared,
    /// Each process has its own.
    Local,
}

/// What a shared breaker does while `redis` does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BreakerOnLoss {
    /// Each process goes on with what it sees.
    Local,
    /// It stays as it is.
    Freeze,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Window {
    #[serde(rename = "type")]
    pub kind: At<WindowKind>,
    /// A duration for `time`, a number of calls for `count`.
    pub size: At<String>,
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WindowKind {
    Time,
    Count,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SlowCall {
    /// A call that takes longer is slow.
    pub duration: At<TimeLength>,
    /// The share of slow calls that trips.
    pub rate: At<Percent>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HalfOpen {
    /// Results that decide, and the most that are outstanding [default: 5].
    pub probes: Option<At<u32>>,
    /// [default: 80%]
    pub success_rate: Option<At<Percent>>,
    /// [default: 5s]
    pub probe_timeout: Option<At<TimeLength>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Fallback {
    /// [default: 503]
    pub status: Option<At<u16>>,
    pub body: At<String>,
    /// [default: application/json]
    pub content_type: Option<At<String>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Admin {
    /// [default: 127.0.0.1:9901]
    pub address: Option<At<String>>,
    /// Asked of every call under /v1, as a bearer token; needed where the address is not of the loopback.
    pub token: Option<At<String>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct MetricsAt {
    /// Where /metrics is served beside the admin port.
    pub address: Option<At<String>>,
    /// How many series routes may make, some 26 for each and its upstream; those beyond are counted together, as route and upstream "other" [default: 2000].
    pub max_series: Option<At<u32>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Runtime {
    /// Threads that serve requests [default: auto, one a core].
    pub lanes: Option<At<Lanes>>,
    /// When requests are refused with 503 for the process's own sake; absent: never.
    pub shed: Option<At<Shed>>,
}

/// What is left out is not looked at.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Shed {
    /// How long what is ready may wait for its lane, for example `100ms`.
    pub loop_delay: Option<At<TimeLength>>,
    /// What the process may use: `90%` of what its control group allows, or a size such as `512MiB`.
    pub memory: Option<At<String>>,
}

/// `auto`, or how many.
#[derive(Debug, JsonSchema)]
#[schemars(untagged)]
pub enum Lanes {
    Auto(Auto),
    Count(#[schemars(range(max = 4096))] NonZeroUsize),
}

#[derive(Debug, JsonSchema)]
#[schemars(rename_all = "snake_case")]
pub enum Auto {
    Auto,
}

impl<'de> Deserialize<'de> for Lanes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Lanes, D::Error> {
        let count = |count| NonZeroUsize::new(usize::try_from(count).ok()?);
        let lanes = auto_or(deserializer, "lanes: use auto or a number from 1", count)?;
        Ok(lanes.map_or(Lanes::Auto(Auto::Auto), Lanes::Count))
    }
}

/// `auto`, which is `None`, or a number, as the schema has both: in quotes it is none. `needed` is said behind what is neither.
fn auto_or<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    needed: &'static str,
    count: impl Fn(u64) -> Option<T>,
) -> Result<Option<T>, D::Error> {
    struct Reads<F>(&'static str, F);

    impl<T, F: Fn(u64) -> Option<T>> Visitor<'_> for Reads<F> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("auto or a number")
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<Option<T>, E> {
            let Reads(needed, count) = self;
            let wrong = || E::custom(format_args!("\"{number}\" {needed}"));
            count(number).ok_or_else(wrong).map(Some)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Option<T>, E> {
            let needed = self.0;
            match text {
                "auto" => Ok(None),
                text if text.parse::<u64>().is_ok() => Err(E::custom(format_args!(
                    "\"{text}\" {needed}, without quotes"
                ))),
                text => Err(E::custom(format_args!("\"{text}\" {needed}"))),
            }
        }
    }

    deserializer.deserialize_u64(Reads(needed, count))
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Shutdown {
    /// Between saying unready and taking no more requests; for load balancers to notice [default: 0s].
    pub propagation_delay: Option<At<TimeLength>>,
    /// For requests in flight to end [default: 25s].
    pub drain: Option<At<TimeLength>>,
}
