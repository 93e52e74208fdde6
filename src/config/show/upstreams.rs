//! Upstreams as the file spells them.

use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::limits::{OneOrMany, by};
use super::redis::Certificate;
use super::texts;
use crate::config::raw::Adaptive;
use crate::config::tls;
use crate::config::units::{ByteSize, Percent, Span};
use crate::config::upstreams::{self, Asks, Balancing, RetryOn, Source};

#[derive(Serialize)]
pub(super) struct Upstream<'c> {
    endpoints: Vec<Value>,
    protocol: upstreams::Protocol,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<UpstreamTls<'c>>,
    load_balancing: LoadBalancing,
    connect_timeout: Span,
    timeout: Span,
    idle_timeout: Span,
    max_age: Span,
    #[serde(skip_serializing_if = "Option::is_none")]
    concurrency: Option<Concurrency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retries: Option<Retries<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    health: Option<HealthCheck<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    outlier_detection: Option<OutlierDetection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slow_start: Option<SlowStart>,
    panic_threshold: Percent,
    #[serde(skip_serializing_if = "Option::is_none")]
    circuit_breaker: Option<&'c str>,
    trust_session_headers: bool,
}

#[derive(Serialize)]
struct UpstreamTls<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    sni: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<&'c Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<Certificate<'c>>,
}

impl<'c> UpstreamTls<'c> {
    fn new(tls: &'c tls::UpstreamTls) -> UpstreamTls<'c> {
        UpstreamTls {
            sni: tls.sni.as_deref(),
            ca: tls.tls.ca.as_deref(),
            certificate: tls.tls.certificate.as_ref().map(Certificate::new),
        }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum LoadBalancing {
    Named(&'static str),
    Ring { ring_hash: RingKey },
}

#[derive(Serialize)]
struct RingKey {
    by: OneOrMany,
}

#[derive(Serialize)]
struct Concurrency {
    max: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    adaptive: Option<Adaptive>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<u32>,
    pending: u32,
    max_connections: u32,
}

#[derive(Serialize)]
struct Retries<'c> {
    attempts: u32,
    retry_on: Vec<String>,
    methods: &'c [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    per_try_timeout: Option<Span>,
    backoff: Backoff,
    budget: Budget,
    buffer: ByteSize,
}

#[derive(Serialize)]
struct Backoff {
    base: Span,
    max: Span,
}

#[derive(Serialize)]
struct Budget {
    percent: u32,
    min_concurrent: u32,
}

#[derive(Serialize)]
struct HealthCheck<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grpc: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'c str>,
    interval: Span,
    timeout: Span,
    unhealthy_after: u32,
    healthy_after: u32,
}

#[derive(Serialize)]
struct OutlierDetection {
    consecutive_5xx: u32,
    interval: Span,
    base_ejection_time: Span,
    max_ejection_percent: u32,
}

#[derive(Serialize)]
struct SlowStart {
    window: Span,
    min_weight: Percent,
}

impl<'c> Upstream<'c> {
    pub(super) fn new(upstream: &'c upstreams::Upstream) -> Upstream<'c> {
        let breaker = upstream.circuit_breaker.as_ref();
        let concurrency = |it: upstreams::Concurrency| Concurrency {
            max: it.max,
            adaptive: it.adaptive_min.map(|_| Adaptive::Gradient),
            min: it.adaptive_min,
            pending: it.pending,
            max_connections: it.max_connections,
        };
        let outlier_detection = |it: upstreams::OutlierDetection| OutlierDetection {
            consecutive_5xx: it.consecutive_5xx,
            interval: Span(it.interval),
            base_ejection_time: Span(it.base_ejection_time),
            max_ejection_percent: it.max_ejection_percent,
        };
        Upstream {
            endpoints: upstream
                .endpoints
                .iter()
                .map(|source| endpoint(source, upstream.tls.is_some()))
                .collect(),
            protocol: upstream.protocol,
            tls: upstream.tls.as_ref().map(UpstreamTls::new),
            load_balancing: match &upstream.load_balancing {
                Balancing::RoundRobin => LoadBalancing::Named("round_robin"),
                Balancing::LeastRequest => LoadBalancing::Named("least_request"),
                Balancing::RingHash(parts) => LoadBalancing::Ring {
                    ring_hash: RingKey { by: by(parts) },
                },
            },
            connect_timeout: Span(upstream.connect_timeout),
            timeout: Span(upstream.timeout),
            idle_timeout: Span(upstream.idle_timeout),
            max_age: Span(upstream.max_age),
            concurrency: upstream.concurrency.map(concurrency),
            retries: upstream.retries.as_ref().map(Retries::new),
            health: upstream.health.as_ref().map(|it| HealthCheck {
                path: match &it.asks {
                    Asks::Get(path) => Some(path),
                    Asks::Grpc(_) => None,
                },
                grpc: match &it.asks {
                    Asks::Get(_) => None,
                    Asks::Grpc(service) => Some(service),
                },
                host: it.host.as_deref(),
                interval: Span(it.interval),
                timeout: Span(it.timeout),
                unhealthy_after: it.unhealthy_after,
                healthy_after: it.healthy_after,
            }),
            outlier_detection: upstream.outlier_detection.map(outlier_detection),
            slow_start: upstream.slow_start.map(|it| SlowStart {
                window: Span(it.window),
                min_weight: Percent(it.min_weight),
            }),
            panic_threshold: Percent(upstream.panic_threshold),
            circuit_breaker: breaker.map(|breaker| breaker.name.as_str()),
            trust_session_headers: upstream.trust_session_headers,
        }
    }
}

impl<'c> Retries<'c> {
    fn new(retries: &'c upstreams::Retries) -> Retries<'c> {
        Retries {
            attempts: retries.attempts,
            retry_on: retry_on(&retries.retry_on),
            methods: &retries.methods,
            per_try_timeout: retries.per_try_timeout.map(Span),
            backoff: Backoff {
                base: Span(retries.backoff.base),
                max: Span(retries.backoff.max),
            },
            budget: Budget {
                percent: retries.budget.percent,
                min_concurrent: retries.budget.min_concurrent,
            },
            buffer: ByteSize(retries.buffer as u64),
        }
    }
}

fn endpoint(source: &Source, tls: bool) -> Value {
    let scheme = if tls { "https" } else { "http" };
    match source {
        Source::Fixed(place) if place.starts_with("unix:") => json!(place),
        Source::Fixed(place) => json!(format!("{scheme}://{place}")),
        Source::Dns(it) => {
            let mut shown = json!({
                "dns": format!("{}:{}", it.name, it.port),
                "refresh": Span(it.refresh).to_string(),
            });
            if !it.servers.is_empty() {
                shown["servers"] = json!(texts(&it.servers));
            }
            shown
        }
    }
}

fn retry_on(on: &RetryOn) -> Vec<String> {
    let kinds = [
        ("connect_failure", on.connect_failure),
        ("reset_before_request", on.reset_before_request),
        ("reset", on.reset),
        ("timeout", on.timeout),
        ("5xx", on.server_error),
    ];
    let named = kinds.into_iter().filter(|(_, is_reason)| *is_reason);
    let named = named.map(|(name, _)| name.to_owned());
    named.chain(texts(&on.statuses)).collect()
}
