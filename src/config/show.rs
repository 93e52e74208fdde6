//! A checked [`Config`] as a file again: every default filled in, secrets masked, and readable by `weir check`. Owns how
//! values look when they are shown; must not decide any of them. The one text that does not survive being read again is a
//! `${` in a key, such as one of `overrides`, where it stands for itself.
//!
//! Each struct mirrors one of [`super::raw`], with its keys in the order in which people read them.

mod audit;
mod limits;
mod listeners;
mod postgres;
mod redis;
mod rewrite;
mod runtime;
mod telemetry;
mod upstreams;
mod worker;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;

use serde::Serialize;
use serde_json::{Value, json};

use super::limits::Mode;
use super::rewrite::To;
use super::sessions::{OnMax, SameSite, TokenSource};
use super::units::{Percent, Span};
use super::{Config, breakers, sessions};
use crate::event::Redaction;
use audit::{Audit, RouteAudit};
use limits::{RateLimit, RateLimitDefaults};
use listeners::Listener;
use postgres::Postgres;
use redis::Redis;
use rewrite::{Changes, Redirect, Reply, Rewrite, fields};
use runtime::Runtime;
use telemetry::Telemetry;
use upstreams::Upstream;
use worker::Worker;

/// The configuration as YAML.
pub fn yaml(config: &Config) -> String {
    let text = serde_saphyr::to_string(&File::new(config))
        .expect("texts, numbers, lists and maps of them are YAML");
    text.replace("${", "$${")
}

/// The configuration as JSON, with the keys of the YAML.
pub fn json(config: &Config) -> serde_json::Value {
    serde_json::to_value(File::new(config)).expect("the keys of all maps are texts")
}

#[derive(Serialize)]
struct File<'c> {
    version: u32,
    listeners: Vec<Listener<'c>>,
    upstreams: BTreeMap<&'c str, Upstream<'c>>,
    routes: Vec<Route<'c>>,
    rate_limits: BTreeMap<&'c str, RateLimit<'c>>,
    rate_limit_defaults: RateLimitDefaults,
    /// Those that an upstream names.
    circuit_breakers: BTreeMap<&'c str, CircuitBreaker<'c>>,
    sessions: BTreeMap<&'c str, Sessions<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    redis: Option<Redis<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<Audit<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    postgres: Option<Postgres<'c>>,
    worker: Worker<'c>,
    admin: Admin,
    metrics: Metrics,
    telemetry: Telemetry<'c>,
    runtime: Runtime,
    shutdown: Shutdown,
}

impl<'c> File<'c> {
    fn new(config: &'c Config) -> File<'c> {
        let breakers = config
            .upstreams
            .iter()
            .filter_map(|upstream| upstream.circuit_breaker.as_ref());
        File {
            version: 1,
            listeners: config.listeners.iter().map(Listener::new).collect(),
            upstreams: config
                .upstreams
                .iter()
                .map(|upstream| (upstream.name.as_str(), Upstream::new(upstream)))
                .collect(),
            routes: config
                .routes
                .iter()
                .map(|route| Route::new(route, config))
                .collect(),
            rate_limits: config
                .limits
                .iter()
                .map(|limit| (limit.name.as_str(), RateLimit::new(limit)))
                .collect(),
            rate_limit_defaults: RateLimitDefaults::new(&config.limit_defaults),
            circuit_breakers: breakers
                .map(|breaker| (breaker.name.as_str(), CircuitBreaker::new(breaker)))
                .collect(),
            sessions: config
                .sessions
                .iter()
                .map(|sessions| (sessions.name.as_str(), Sessions::new(sessions)))
                .collect(),
            redis: config.redis.as_ref().map(Redis::new),
            audit: config
                .audit
                .as_ref()
                .map(|audit| Audit::new(audit, config.postgres.is_some())),
            postgres: config.postgres.as_ref().map(Postgres::new),
            worker: Worker::new(&config.worker),
            admin: Admin {
                address: config.admin.address,
                token: config
                    .admin
                    .token
                    .as_ref()
                    .map(|token| format!("{token:?}")),
            },
            metrics: Metrics {
                address: config.metrics_address,
                max_series: config.max_series,
            },
            telemetry: Telemetry::new(config),
            runtime: Runtime::new(config),
            shutdown: Shutdown {
                propagation_delay: Span(config.propagation_delay),
                drain: Span(config.drain),
            },
        }
    }
}

#[derive(Serialize)]
struct Route<'c> {
    #[serde(rename = "match", skip_serializing_if = "Match::is_all")]
    matches: Match<'c>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    redirect: Option<Redirect<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply: Option<Reply<'c>>,
    rate_limits: Vec<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<RouteSession<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revalidate_every: Option<Span>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<RouteAudit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<Span>,
    shed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    rewrite: Option<Rewrite<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_headers: Option<Changes<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_headers: Option<Changes<'c>>,
}

#[derive(Serialize)]
struct Match<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ignore_case: Option<bool>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    methods: &'c [String],
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    headers: BTreeMap<&'c str, &'c str>,
}

impl Match<'_> {
    fn is_all(&self) -> bool {
        self.host.is_none()
            && self.path.is_none()
            && self.methods.is_empty()
            && self.headers.is_empty()
    }
}

impl<'c> Route<'c> {
    fn new(route: &'c super::Route, config: &'c Config) -> Route<'c> {
        let matches = &route.matches;
        let usual = Redaction::default();
        let audit = config.audit.as_ref();
        let redaction = audit.map_or(&usual, |audit| &audit.redaction);
        // What the audit would redact may hold a secret, too.
        let hides =
            |name: &str| redaction.hides(name) || route.hidden.contains(&name.to_ascii_lowercase());
        let (upstream, redirect, reply) = match &route.to {
            To::Upstream(index) => (Some(&*config.upstreams[*index].name), None, None),
            To::Redirect(redirect) => (None, Some(Redirect::new(redirect)), None),
            To::Reply(reply) => (None, None, Some(Reply::new(reply, hides))),
        };
        Route {
            matches: Match {
                host: matches.host.as_ref().map(ToString::to_string),
                path: matches.path.as_ref().map(ToString::to_string),
                ignore_case: matches.path.as_ref().map(|_| matches.ignore_case),
                methods: &matches.methods,
                headers: fields(&matches.headers, hides),
            },
            upstream,
            redirect,
            reply,
            rate_limits: route
                .limits
                .iter()
                .chain(&route.session_limits)
                .map(|index| config.limits[*index].name.as_str())
                .collect(),
            session: route.session.as_ref().map(|session| RouteSession {
                uses: &config.sessions[session.sessions].name,
                require: session.require,
                claims: &session.claims,
            }),
            revalidate_every: route
                .session
                .as_ref()
                .map(|session| Span(session.revalidate_every)),
            // Where the file has no audit, a route cannot ask for one.
            audit: audit.map(|_| RouteAudit::new(route)),
            timeout: route.timeout.map(Span),
            shed: route.shed,
            rewrite: Rewrite::new(&route.rewrite),
            request_headers: Changes::new(&route.request_headers, hides),
            response_headers: Changes::new(&route.response_headers, hides),
        }
    }
}

fn texts(items: &[impl ToString]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

#[derive(Serialize)]
struct CircuitBreaker<'c> {
    scope: breakers::Scope,
    quorum: NonZeroU32,
    on_redis_loss: breakers::OnLoss,
    window: Window,
    minimum_calls: u32,
    failure_rate: Percent,
    consecutive_failures: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    slow_call: Option<SlowCall>,
    failure_on: Vec<String>,
    open_for: Span,
    max_open_for: Span,
    jitter: Percent,
    half_open: HalfOpen,
    recover_over: Span,
    #[serde(skip_serializing_if = "Option::is_none")]
    fallback: Option<Fallback<'c>>,
    mode: Mode,
}

#[derive(Serialize)]
struct Window {
    #[serde(rename = "type")]
    kind: &'static str,
    size: String,
}

#[derive(Serialize)]
struct SlowCall {
    duration: Span,
    rate: Percent,
}

#[derive(Serialize)]
struct HalfOpen {
    probes: u32,
    success_rate: Percent,
    probe_timeout: Span,
}

#[derive(Serialize)]
struct Fallback<'c> {
    status: u16,
    body: &'c str,
    content_type: &'c str,
}

impl<'c> CircuitBreaker<'c> {
    fn new(breaker: &'c breakers::CircuitBreaker) -> CircuitBreaker<'c> {
        let (settings, on) = (&breaker.settings, &breaker.failure_on);
        let (kind, size) = match settings.window {
            breakers::Window::Time(size) => ("time", Span(size).to_string()),
            breakers::Window::Count(size) => ("count", size.to_string()),
        };
        let kinds = [
            ("connect_failure", on.connect_failure),
            ("timeout", on.timeout),
            ("reset", on.reset),
            ("5xx", on.server_error),
        ];
        let named = kinds
            .into_iter()
            .filter(|(_, is_failure)| *is_failure)
            .map(|(name, _)| name.to_owned());
        let grpc = on.grpc.iter().filter_map(|status| status.name());
        let grpc = grpc.map(|name| format!("grpc:{name}"));
        CircuitBreaker {
            scope: breaker.scope,
            quorum: breaker.quorum,
            on_redis_loss: breaker.on_redis_loss,
            window: Window { kind, size },
            minimum_calls: settings.minimum_calls,
            failure_rate: Percent(settings.failure_rate),
            consecutive_failures: settings.consecutive_failures,
            slow_call: settings.slow_call.map(|slow| SlowCall {
                duration: Span(slow.duration),
                rate: Percent(slow.rate),
            }),
            failure_on: named.chain(texts(&on.statuses)).chain(grpc).collect(),
            open_for: Span(settings.open_for),
            max_open_for: Span(settings.max_open_for),
            jitter: Percent(settings.jitter),
            half_open: HalfOpen {
                probes: settings.half_open.probes,
                success_rate: Percent(settings.half_open.success_rate),
                probe_timeout: Span(settings.half_open.probe_timeout),
            },
            recover_over: Span(settings.recover_over),
            fallback: breaker.fallback.as_ref().map(|fallback| Fallback {
                status: fallback.status,
                body: &fallback.body,
                content_type: &fallback.content_type,
            }),
            mode: breaker.mode,
        }
    }
}

#[derive(Serialize)]
struct RouteSession<'c> {
    #[serde(rename = "use")]
    uses: &'c str,
    require: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    claims: &'c sessions::Claims,
}

#[derive(Serialize)]
struct Sessions<'c> {
    token: Vec<BTreeMap<&'static str, Value>>,
    idle_timeout: Span,
    absolute_timeout: Span,
    touch_every: Span,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_per_user: Option<NonZeroU32>,
    on_max: OnMax,
    max_sessions: usize,
    cache: SessionCache,
    forward: Forward<'c>,
    cookie: Cookie<'c>,
    on_redis_loss: SessionLoss,
}

#[derive(Serialize)]
struct SessionCache {
    ttl: Span,
    negative_ttl: Span,
    max_entries: usize,
}

#[derive(Serialize)]
struct SessionLoss {
    action: &'static str,
    grace: Span,
}

#[derive(Serialize)]
struct Forward<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    claims: Option<&'c str>,
}

#[derive(Serialize)]
struct Cookie<'c> {
    secure: bool,
    http_only: bool,
    same_site: SameSite,
    path: &'c str,
}

impl<'c> Sessions<'c> {
    fn new(sessions: &'c sessions::Sessions) -> Sessions<'c> {
        let (settings, shared) = (&sessions.settings, &sessions.shared);
        let source = |source: &TokenSource| match source {
            TokenSource::Cookie(name) => BTreeMap::from([("cookie", json!(name))]),
            TokenSource::Bearer => BTreeMap::from([("bearer", json!(true))]),
            TokenSource::Header(name) => BTreeMap::from([("header", json!(name))]),
        };
        Sessions {
            token: settings.sources.iter().map(source).collect(),
            idle_timeout: Span(settings.idle_timeout),
            absolute_timeout: Span(settings.absolute_timeout),
            touch_every: Span(shared.touch_every),
            max_per_user: settings.max_per_user,
            on_max: settings.on_max,
            max_sessions: sessions.max_sessions,
            cache: SessionCache {
                ttl: Span(shared.cache.ttl),
                negative_ttl: Span(shared.cache.negative_ttl),
                max_entries: shared.cache.max_entries,
            },
            forward: Forward {
                user: settings.forward.user.as_deref(),
                session: settings.forward.session.as_deref(),
                claims: settings.forward.claims.as_deref(),
            },
            cookie: Cookie {
                secure: settings.cookie.secure,
                http_only: settings.cookie.http_only,
                same_site: settings.cookie.same_site,
                path: &settings.cookie.path,
            },
            on_redis_loss: SessionLoss {
                action: "deny",
                grace: Span(shared.grace),
            },
        }
    }
}

#[derive(Serialize)]
struct Admin {
    address: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

#[derive(Serialize)]
struct Metrics {
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<SocketAddr>,
    max_series: usize,
}

#[derive(Serialize)]
struct Shutdown {
    propagation_delay: Span,
    drain: Span,
}

#[cfg(test)]
mod tests;
