//! Rate limits as the file spells them.

use std::collections::BTreeMap;

use serde::Serialize;

use super::texts;
use crate::config::LimitDefaults;
use crate::config::limits::{Accuracy, Cost, KeyPart, Limit, Mode, OnLoss, Rule};
use crate::config::raw::Algorithm;
use crate::config::units::{Percent, Span};

#[derive(Serialize)]
pub(super) struct RateLimit<'c> {
    limit: OneOrMany,
    #[serde(skip_serializing_if = "Option::is_none")]
    burst: Option<u64>,
    by: OneOrMany,
    algorithm: Algorithm,
    accuracy: Accuracy,
    on_redis_loss: OnLoss,
    #[serde(skip_serializing_if = "Option::is_none")]
    hold_ttl: Option<Span>,
    mode: Mode,
    if_missing: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    overrides: BTreeMap<&'c str, OneOrMany>,
    cost: CostOf<'c>,
    near_limit: Percent,
    enforced: Percent,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Serialize)]
struct CostOf<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    header: Option<&'c str>,
    default: u64,
}

impl<'c> RateLimit<'c> {
    pub(super) fn new(limit: &'c Limit) -> RateLimit<'c> {
        let (header, default) = match &limit.cost {
            Cost::Constant(cost) => (None, *cost),
            Cost::Header { name, default } => (Some(name.as_str()), *default),
        };
        RateLimit {
            limit: rules(&limit.rules),
            burst: burst(limit.rules.as_deref().unwrap_or_default()),
            by: by(&limit.by),
            algorithm: limit.algorithm,
            accuracy: limit.accuracy,
            on_redis_loss: limit.on_redis_loss,
            hold_ttl: (limit.algorithm == Algorithm::Concurrency).then_some(Span(limit.hold_ttl)),
            mode: limit.mode,
            if_missing: if limit.deny_missing { "deny" } else { "skip" },
            overrides: limit
                .overrides
                .iter()
                .map(|(key, its)| (key.as_str(), rules(its)))
                .collect(),
            cost: CostOf { header, default },
            near_limit: Percent(limit.near_limit),
            enforced: Percent(limit.enforced),
        }
    }
}

fn rules(rules: &Option<Vec<Rule>>) -> OneOrMany {
    match rules {
        None => OneOrMany::One("unlimited".to_owned()),
        Some(rules) => one_or_many(texts(rules)),
    }
}

/// What a key is made of, as the file spells it.
pub(super) fn by(parts: &[KeyPart]) -> OneOrMany {
    match parts {
        [] => OneOrMany::One("constant".to_owned()),
        parts => one_or_many(texts(parts)),
    }
}

/// That of the one window; of several each has its number.
fn burst(rules: &[Rule]) -> Option<u64> {
    match rules {
        [Rule::TokenBucket { burst, .. }] => Some(*burst),
        _ => None,
    }
}

fn one_or_many(mut texts: Vec<String>) -> OneOrMany {
    match texts.pop() {
        Some(only) if texts.is_empty() => OneOrMany::One(only),
        last => {
            texts.extend(last);
            OneOrMany::Many(texts)
        }
    }
}

#[derive(Serialize)]
struct Lease {
    ttl: Span,
    max_share: Percent,
}

#[derive(Serialize)]
struct RetryAfter {
    jitter: Percent,
}

#[derive(Serialize)]
#[serde(untagged)]
enum MaxKeys {
    Auto(&'static str),
    Count(usize),
}

#[derive(Serialize)]
pub(super) struct RateLimitDefaults {
    on_redis_loss: OnLoss,
    lease: Lease,
    max_keys: MaxKeys,
    retry_after: RetryAfter,
    headers: Vec<&'static str>,
}

impl RateLimitDefaults {
    pub(super) fn new(defaults: &LimitDefaults) -> RateLimitDefaults {
        let headers = [
            ("standard", defaults.standard_headers),
            ("legacy", defaults.legacy_headers),
        ];
        RateLimitDefaults {
            on_redis_loss: defaults.on_redis_loss,
            lease: Lease {
                ttl: Span(defaults.lease.ttl),
                max_share: Percent(defaults.lease.max_share),
            },
            max_keys: defaults
                .max_keys
                .map_or(MaxKeys::Auto("auto"), MaxKeys::Count),
            retry_after: RetryAfter {
                jitter: Percent(defaults.retry_jitter),
            },
            headers: headers
                .into_iter()
                .filter(|(_, told)| *told)
                .map(|(name, _)| name)
                .collect(),
        }
    }
}
