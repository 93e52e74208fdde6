//! Rate limits as they are written.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::{Auto, Mode, auto_or};
use crate::config::units::{Percent, TimeLength};
use crate::config::yaml::{At, OneOrMany};

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RateLimit {
    /// `100/s`, `10/30s`, `1000/month`, several of them, or `unlimited`; a number for concurrency.
    pub limit: At<OneOrMany<String>>,
    /// Token bucket of one window: how much can be taken at once [default: the limit's number].
    pub burst: Option<At<u64>>,
    /// client.ip, client.cert.subject, client.cert.san, header:NAME, cookie:NAME, query:NAME, path, host, method, route,
    /// upstream, session.user, session.claims.NAME, constant; several make one key together.
    pub by: At<OneOrMany<String>>,
    /// [default: token_bucket]
    pub algorithm: Option<At<Algorithm>>,
    /// How exactly processes that have one `redis` count together [default: lease; strict for concurrency, which knows no
    /// lease; always local without `redis`].
    pub accuracy: Option<At<Accuracy>>,
    /// While `redis` does not answer [default: that of `rate_limit_defaults`].
    pub on_redis_loss: Option<At<OnLoss>>,
    /// For concurrency: how long a slot that a dead process holds stays taken [default: 60s].
    pub hold_ttl: Option<At<TimeLength>>,
    /// [default: enforce]
    pub mode: Option<At<Mode>>,
    /// What to do with a request that lacks a part of the key [default: skip].
    pub if_missing: Option<At<IfMissing>>,
    /// Limits of their own for some keys; the parts of a key are joined by `:`.
    #[serde(default)]
    pub overrides: BTreeMap<String, At<String>>,
    /// [default: 1]
    pub cost: Option<At<Cost>>,
    /// The share of the limit from which on requests are counted as near it [default: 80%].
    pub near_limit: Option<At<Percent>>,
    /// With `mode: enforce`, the share of the keys that are refused; for the others it is as in shadow mode [default: 100%].
    pub enforced: Option<At<Percent>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    TokenBucket,
    SlidingWindow,
    FixedWindow,
    Concurrency,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Accuracy {
    /// A process takes many at a time, and spends them without asking again.
    Lease,
    /// Each request is asked about.
    Strict,
    /// Each process counts alone.
    Local,
}

/// What a limit does while `redis` does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// Each process admits its part of the limit.
    Local,
    /// Every request passes.
    Allow,
    /// None does.
    Deny,
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IfMissing {
    Skip,
    Deny,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Cost {
    /// A request header with a number.
    pub header: Option<At<String>>,
    /// Where there is no such header [default: 1].
    pub default: Option<At<u64>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RateLimitDefaults {
    /// Of limits that do not say [default: local].
    pub on_redis_loss: Option<At<OnLoss>>,
    pub lease: Option<At<Lease>>,
    /// Keys held in memory; the least used goes [default: auto].
    pub max_keys: Option<At<MaxKeys>>,
    pub retry_after: Option<At<RetryAfter>>,
    /// What clients are told [default: standard].
    pub headers: Option<At<Vec<At<LimitHeaders>>>>,
}

/// `auto`, 1000000 or what a quarter of the memory has room for that the process may use; or how many.
#[derive(Debug, JsonSchema)]
#[schemars(untagged)]
pub enum MaxKeys {
    Auto(Auto),
    Count(#[schemars(range(min = 1))] u32),
}

impl<'de> Deserialize<'de> for MaxKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MaxKeys, D::Error> {
        let count = |count| u32::try_from(count).ok().filter(|count| *count > 0);
        let needed = "keys: use auto or a whole number from 1";
        let keys = auto_or(deserializer, needed, count)?;
        Ok(keys.map_or(MaxKeys::Auto(Auto::Auto), MaxKeys::Count))
    }
}

/// What a process takes of a shared limit at a time.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Lease {
    /// How long it lives; so much of the limit's rate can be admitted beyond it [default: 50ms].
    pub ttl: Option<At<TimeLength>>,
    /// The most that one takes of what is left [default: 10%].
    pub max_share: Option<At<Percent>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RetryAfter {
    /// The most that is added to Retry-After, so that refused clients do not come back all at once [default: 10%].
    pub jitter: Option<At<Percent>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LimitHeaders {
    /// `RateLimit` and `RateLimit-Policy`.
    Standard,
    /// `X-RateLimit-Limit`, `-Remaining` and `-Reset`.
    Legacy,
}
