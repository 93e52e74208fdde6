//! Rate limits as the file spells them.

use std::collections::BTreeMap;

use super::shown::{Keys, Shown, texts};
use crate::config::LimitDefaults;
use crate::config::limits::{Cost, KeyPart, Limit, Rules, Window};
use crate::config::raw::Algorithm;
use crate::config::units::Percent;

pub(super) fn limit(limit: &Limit) -> Keys {
    let (header, default) = match &limit.cost {
        Cost::Constant(cost) => (None, *cost),
        Cost::Header { name, default } => (Some(name), *default),
    };
    let overrides = limit.overrides.iter();
    let overrides: BTreeMap<_, _> = overrides.map(|(key, its)| (&**key, rules(its))).collect();
    let holds = limit.algorithm == Algorithm::Concurrency;
    Keys::new()
        .key("limit", rules(&limit.rules))
        .key("burst", burst(limit.rules.as_ref()))
        .key("by", by(&limit.by))
        .key("algorithm", limit.algorithm)
        .key("accuracy", limit.accuracy)
        .key("on_redis_loss", limit.on_redis_loss)
        .key("hold_ttl", holds.then_some(limit.hold_ttl))
        .key("mode", limit.mode)
        .key(
            "if_missing",
            if limit.deny_missing { "deny" } else { "skip" },
        )
        .key("overrides", (!overrides.is_empty()).then_some(overrides))
        .key(
            "cost",
            Keys::new().key("header", header).key("default", default),
        )
        .key("near_limit", Percent(limit.near_limit))
        .key("enforced", Percent(limit.enforced))
}

fn rules(rules: &Option<Rules>) -> Shown {
    match rules {
        None => "unlimited".into(),
        Some(rules) => one_or_many(rules.iter().map(|rule| rule.to_string()).collect()),
    }
}

/// What a key is made of, as the file spells it.
pub(super) fn by(parts: &[KeyPart]) -> Shown {
    match parts {
        [] => "constant".into(),
        parts => one_or_many(texts(parts)),
    }
}

/// That of the one window; of several each has its number.
fn burst(rules: Option<&Rules>) -> Option<u64> {
    match rules?.only_window()? {
        Window::Bucket { burst, .. } => Some(*burst),
        Window::Sliding { .. } | Window::Fixed { .. } => None,
    }
}

fn one_or_many(texts: Vec<String>) -> Shown {
    match texts.as_slice() {
        [only] => only.into(),
        _ => texts.into(),
    }
}

pub(super) fn defaults(defaults: &LimitDefaults) -> Keys {
    let standard = defaults.standard_headers.then_some("standard");
    let legacy = defaults.legacy_headers.then_some("legacy");
    let max_keys = defaults.max_keys.map(Shown::from);
    Keys::new()
        .key("on_redis_loss", defaults.on_redis_loss)
        .key(
            "lease",
            Keys::new()
                .key("ttl", defaults.lease.ttl)
                .key("max_share", Percent(defaults.lease.max_share)),
        )
        .key("max_keys", max_keys.unwrap_or("auto".into()))
        .key(
            "retry_after",
            Keys::new().key("jitter", Percent(defaults.retry_jitter)),
        )
        .key(
            "headers",
            standard.into_iter().chain(legacy).collect::<Vec<_>>(),
        )
}
