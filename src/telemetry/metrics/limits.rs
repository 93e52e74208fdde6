//! Metrics of rate limits.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;

/// Of all limits.
#[derive(Debug)]
pub struct LimitFamilies {
    decisions: Family<DecisionLabels, Counter>,
    alone: Family<LimitLabels, Gauge>,
    /// Keys in memory.
    pub keys: Gauge,
    pub keys_max: Gauge,
    pub keys_evicted: Counter,
}

/// The handles of one limit.
#[derive(Debug, Clone)]
pub struct LimitMetrics {
    pub admitted: Counter,
    pub refused: Counter,
    /// Would have been refused by a limit in shadow mode.
    pub shadow_refused: Counter,
    /// Admitted, with little left: among those admitted too.
    pub near: Counter,
    /// Lacked a part of the key.
    pub missing: Counter,
    /// Not decided by all processes together: Redis did not answer.
    pub lost: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    limit: String,
    decision: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabels {
    limit: String,
}

impl LimitFamilies {
    pub(super) fn register(registry: &mut Registry) -> LimitFamilies {
        LimitFamilies {
            decisions: add(registry, "limit_decisions", "Decisions of rate limits"),
            alone: add(
                registry,
                "limit_alone",
                "1 while a shared limit is kept by this process alone: Redis does not answer",
            ),
            keys: add(
                registry,
                "limit_keys",
                "Keys that rate limits hold in memory",
            ),
            keys_max: add(
                registry,
                "limit_keys_max",
                "The most keys that rate limits hold in memory: the least used is let go of",
            ),
            keys_evicted: add(
                registry,
                "limit_keys_evicted",
                "Keys of rate limits that were let go of for others, with what they had used",
            ),
        }
    }

    /// The handles of the limit of this name.
    pub fn of(&self, limit: &str) -> LimitMetrics {
        let decision = |decision| {
            self.decisions.get_or_create_owned(&DecisionLabels {
                limit: limit.to_owned(),
                decision,
            })
        };
        LimitMetrics {
            admitted: decision("admitted"),
            refused: decision("refused"),
            shadow_refused: decision("shadow_refused"),
            near: decision("near_limit"),
            missing: decision("missing_key"),
            lost: decision("redis_lost"),
        }
    }

    /// Notes of each limit whether it is not shared though it is to be, since Redis does not answer; others are forgotten.
    pub fn note_alone<'a>(&self, limits: impl Iterator<Item = (&'a str, bool)>) {
        self.alone.clear();
        for (limit, alone) in limits {
            let limit = limit.to_owned();
            let gauge = self.alone.get_or_create_owned(&LimitLabels { limit });
            gauge.set(i64::from(alone));
        }
    }
}
