//! Metrics of the clients of Redis.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::add;
use super::durations::Durations;

/// Of all clients.
#[derive(Debug)]
pub struct RedisFamilies {
    calls: Family<CallLabels, Counter>,
    durations: Family<ClientLabels, Durations>,
    unheard: Family<ClientLabels, Counter>,
}

/// The handles of one client.
#[derive(Debug, Clone)]
pub struct RedisMetrics {
    pub answered: Counter,
    /// Not within the budget.
    pub timed_out: Counter,
    /// There was no connection.
    pub down: Counter,
    /// The server said why not, or nonsense.
    pub refused: Counter,
    durations: Durations,
    /// Subscriptions that failed.
    pub unheard: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    client: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClientLabels {
    client: &'static str,
}

impl RedisFamilies {
    pub(super) fn register(registry: &mut Registry) -> RedisFamilies {
        RedisFamilies {
            calls: add(
                registry,
                "redis_calls",
                "Calls of Redis, by client and result",
            ),
            durations: add(
                registry,
                "redis_call_duration_seconds",
                "Time that calls of Redis took, answered or not",
            ),
            unheard: add(
                registry,
                "redis_subscribe_failures",
                "Tries to subscribe to channels of Redis that failed; messages are not heard until one succeeds",
            ),
        }
    }

    /// The handles of a client; `client` is one of a closed set.
    pub fn of(&self, client: &'static str) -> RedisMetrics {
        let result = |result| {
            self.calls
                .get_or_create_owned(&CallLabels { client, result })
        };
        let labels = ClientLabels { client };
        RedisMetrics {
            answered: result("answered"),
            timed_out: result("timed_out"),
            down: result("down"),
            refused: result("refused"),
            durations: self.durations.get_or_create_owned(&labels),
            unheard: self.unheard.get_or_create_owned(&labels),
        }
    }
}

impl RedisMetrics {
    /// How long a call took, answered or not.
    pub fn observe(&self, took: Duration) {
        self.durations.observe(took);
    }
}
