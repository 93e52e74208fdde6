//! Circuit breakers as the file spells them.

use super::shown::{Keys, texts};
use crate::config::breakers::{CircuitBreaker, FailureOn, Fallback, SlowCall, Window};
use crate::config::units::{Percent, TimeLength};

pub(super) fn breaker(breaker: &CircuitBreaker) -> Keys {
    let settings = &breaker.settings;
    let half_open = &settings.half_open;
    let (kind, size) = match settings.window {
        Window::Time(size) => ("time", TimeLength(size).to_string()),
        Window::Count(size) => ("count", size.to_string()),
    };
    let slow_call = |slow: SlowCall| {
        Keys::new()
            .key("duration", slow.duration)
            .key("rate", Percent(slow.rate))
    };
    let fallback = |fallback: &Fallback| {
        Keys::new()
            .key("status", fallback.status)
            .key("body", &fallback.body)
            .key("content_type", &fallback.content_type)
    };
    Keys::new()
        .key("scope", breaker.scope)
        .key("quorum", breaker.quorum)
        .key("on_redis_loss", breaker.on_redis_loss)
        .key("window", Keys::new().key("type", kind).key("size", size))
        .key("minimum_calls", settings.minimum_calls)
        .key("failure_rate", Percent(settings.failure_rate))
        .key("consecutive_failures", settings.consecutive_failures)
        .key("slow_call", settings.slow_call.map(slow_call))
        .key("failure_on", failure_on(&breaker.failure_on))
        .key("open_for", settings.open_for)
        .key("max_open_for", settings.max_open_for)
        .key("jitter", Percent(settings.jitter))
        .key(
            "half_open",
            Keys::new()
                .key("probes", half_open.probes)
                .key("success_rate", Percent(half_open.success_rate))
                .key("probe_timeout", half_open.probe_timeout),
        )
        .key("recover_over", settings.recover_over)
        .key("fallback", breaker.fallback.as_ref().map(fallback))
        .key("mode", breaker.mode)
}

fn failure_on(on: &FailureOn) -> Vec<String> {
    let kinds = [
        ("connect_failure", on.connect_failure),
        ("timeout", on.timeout),
        ("reset", on.reset),
        ("5xx", on.server_error),
    ];
    let named = kinds.into_iter().filter(|(_, is_failure)| *is_failure);
    let named = named.map(|(name, _)| name.to_owned());
    let grpc = on.grpc.iter().filter_map(|status| status.name());
    let grpc = grpc.map(|name| format!("grpc:{name}"));
    named.chain(texts(&on.statuses)).chain(grpc).collect()
}
