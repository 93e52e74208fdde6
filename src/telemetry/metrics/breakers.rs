//! Metrics of circuit breakers.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;

/// Of all upstreams that have one.
#[derive(Debug, Clone)]
pub struct BreakerFamilies {
    decisions: Family<DecisionLabels, Counter>,
    state: Family<StateLabels, Gauge>,
    shared: Family<UpstreamLabels, Gauge>,
    enforced: Family<UpstreamLabels, Gauge>,
}

/// The handles of one upstream's breaker.
#[derive(Debug, Clone)]
pub struct BreakerMetrics {
    pub admitted: Counter,
    pub refused: Counter,
    /// Would have been refused by a breaker in shadow mode.
    pub shadow_refused: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    upstream: String,
    decision: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    upstream: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    upstream: String,
}

impl BreakerFamilies {
    pub(super) fn register(registry: &mut Registry) -> BreakerFamilies {
        BreakerFamilies {
            decisions: add(
                registry,
                "breaker_decisions",
                "Decisions of circuit breakers",
            ),
            state: add(
                registry,
                "breaker_state",
                "1 for the state that a breaker is in",
            ),
            shared: add(
                registry,
                "breaker_shared",
                "1 where a breaker goes by the state in Redis, 0 where it goes on by itself",
            ),
            enforced: add(
                registry,
                "breaker_enforced",
                "1 where a breaker refuses requests, 0 where its mode is shadow",
            ),
        }
    }

    /// The handles of an upstream's.
    pub fn of(&self, upstream: &str) -> BreakerMetrics {
        let decision = |decision| {
            let labels = DecisionLabels {
                upstream: upstream.to_owned(),
                decision,
            };
            self.decisions.get_or_create_owned(&labels)
        };
        BreakerMetrics {
            admitted: decision("admitted"),
            refused: decision("refused"),
            shadow_refused: decision("shadow_refused"),
        }
    }

    /// None has a state until it is told again: a reload may have taken one away, its sharing, or its mode.
    pub fn forget_states(&self) {
        self.state.clear();
        self.shared.clear();
        self.enforced.clear();
    }

    /// Notes the state that an upstream's is in, one of the closed set `states`.
    pub fn set_state(&self, upstream: &str, state: &'static str, states: &[&'static str]) {
        for other in states {
            let labels = StateLabels {
                upstream: upstream.to_owned(),
                state: other,
            };
            let gauge = self.state.get_or_create(&labels);
            gauge.set(i64::from(*other == state));
        }
    }

    /// Notes whether one that is to be shared goes by the shared state.
    pub fn set_shared(&self, upstream: &str, shared: bool) {
        let labels = UpstreamLabels {
            upstream: upstream.to_owned(),
        };
        let gauge = self.shared.get_or_create(&labels);
        gauge.set(i64::from(shared));
    }

    /// Notes whether an upstream's refuses requests.
    pub fn set_enforced(&self, upstream: &str, enforced: bool) {
        let labels = UpstreamLabels {
            upstream: upstream.to_owned(),
        };
        let gauge = self.enforced.get_or_create(&labels);
        gauge.set(i64::from(enforced));
    }
}
