//! Upstreams as the file spells them.

use super::limits::by;
use super::redis;
use super::shown::{Keys, Shown, texts};
use crate::config::raw::Adaptive;
use crate::config::tls::UpstreamTls;
use crate::config::units::{ByteSize, Percent};
use crate::config::upstreams::{
    Asks, Balancing, Concurrency, HealthCheck, OutlierDetection, Retries, RetryOn, SlowStart,
    Source, Upstream,
};

pub(super) fn upstream(upstream: &Upstream) -> Keys {
    let endpoints = upstream.endpoints.iter();
    let endpoints = endpoints.map(|source| endpoint(source, upstream.tls.is_some()));
    let balancing: Shown = match &upstream.load_balancing {
        Balancing::RoundRobin => "round_robin".into(),
        Balancing::LeastRequest => "least_request".into(),
        Balancing::RingHash(parts) => {
            let by = Keys::new().key("by", by(parts));
            Keys::new().key("ring_hash", by).into()
        }
    };
    let breaker = upstream.circuit_breaker.as_ref();
    let outlier_detection = upstream.outlier_detection.map(outlier_detection);
    Keys::new()
        .key("endpoints", endpoints.collect::<Vec<_>>())
        .key("protocol", upstream.protocol)
        .key("tls", upstream.tls.as_ref().map(tls))
        .key("load_balancing", balancing)
        .key("connect_timeout", upstream.connect_timeout)
        .key("timeout", upstream.timeout)
        .key("idle_timeout", upstream.idle_timeout)
        .key("max_age", upstream.max_age)
        .key("concurrency", upstream.concurrency.map(concurrency))
        .key("retries", upstream.retries.as_ref().map(retries))
        .key("health", upstream.health.as_ref().map(health))
        .key("outlier_detection", outlier_detection)
        .key("slow_start", upstream.slow_start.map(slow_start))
        .key("panic_threshold", Percent(upstream.panic_threshold))
        .key("circuit_breaker", breaker.map(|breaker| &breaker.name))
        .key("trust_session_headers", upstream.trust_session_headers)
}

fn endpoint(source: &Source, tls: bool) -> Shown {
    let scheme = if tls { "https" } else { "http" };
    match source {
        Source::Fixed(place) if place.starts_with("unix:") => place.into(),
        Source::Fixed(place) => format!("{scheme}://{place}").into(),
        Source::Dns(it) => Keys::new()
            .key("dns", format!("{}:{}", it.name, it.port))
            .key("refresh", it.refresh)
            .key(
                "servers",
                (!it.servers.is_empty()).then(|| texts(&it.servers)),
            )
            .into(),
    }
}

fn tls(it: &UpstreamTls) -> Keys {
    let certificate = it.tls.certificate.as_ref();
    Keys::new()
        .key("sni", it.sni.as_ref())
        .key("ca", it.tls.ca.as_deref())
        .key("certificate", certificate.map(redis::certificate))
}

fn concurrency(it: Concurrency) -> Keys {
    Keys::new()
        .key("max", it.max)
        .key("adaptive", it.adaptive_min.map(|_| Adaptive::Gradient))
        .key("min", it.adaptive_min)
        .key("pending", it.pending)
        .key("max_connections", it.max_connections)
}

fn retries(it: &Retries) -> Keys {
    Keys::new()
        .key("attempts", it.attempts)
        .key("retry_on", retry_on(&it.retry_on))
        .key("methods", it.methods.clone())
        .key("per_try_timeout", it.per_try_timeout)
        .key(
            "backoff",
            Keys::new()
                .key("base", it.backoff.base)
                .key("max", it.backoff.max),
        )
        .key(
            "budget",
            Keys::new()
                .key("percent", it.budget.percent)
                .key("min_concurrent", it.budget.min_concurrent),
        )
        .key("buffer", ByteSize(it.buffer as u64))
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

fn health(it: &HealthCheck) -> Keys {
    let (by, asks) = match &it.asks {
        Asks::Get(path) => ("path", path),
        Asks::Grpc(service) => ("grpc", service),
    };
    Keys::new()
        .key(by, asks)
        .key("host", it.host.as_ref())
        .key("interval", it.interval)
        .key("timeout", it.timeout)
        .key("unhealthy_after", it.unhealthy_after)
        .key("healthy_after", it.healthy_after)
}

fn outlier_detection(it: OutlierDetection) -> Keys {
    Keys::new()
        .key("consecutive_5xx", it.consecutive_5xx)
        .key("interval", it.interval)
        .key("base_ejection_time", it.base_ejection_time)
        .key("max_ejection_percent", it.max_ejection_percent)
}

fn slow_start(it: SlowStart) -> Keys {
    Keys::new()
        .key("window", it.window)
        .key("min_weight", Percent(it.min_weight))
}
