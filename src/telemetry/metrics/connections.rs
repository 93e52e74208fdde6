//! Metrics of clients' connections, and of how late the lanes are that they wait for.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;
use super::durations::Durations;

/// Of all listeners and lanes.
#[derive(Debug)]
pub struct ConnectionMetrics {
    pub accepted: Counter,
    /// Closed at once, since the listener had as many as it may.
    pub refused: Counter,
    /// Likewise, since their client had.
    pub refused_per_client: Counter,
    pub accept_failures: Counter,
    pub open: Gauge,
    /// How late lanes were, where that is measured.
    pub lane_delays: Durations,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    reason: &'static str,
}

impl ConnectionMetrics {
    pub(super) fn register(registry: &mut Registry) -> ConnectionMetrics {
        let refused: Family<Labels, Counter> = add(
            registry,
            "connections_refused",
            "Connections closed at once, by the bound that they were over",
        );
        let refused_by = |reason| refused.get_or_create_owned(&Labels { reason });
        ConnectionMetrics {
            refused: refused_by("max_connections"),
            refused_per_client: refused_by("max_connections_per_client"),
            accepted: add(registry, "connections", "Connections accepted"),
            accept_failures: add(
                registry,
                "accept_failures",
                "Tries to accept a connection that failed: for want of file descriptors, as a rule",
            ),
            open: add(registry, "connections_open", "Connections open now"),
            lane_delays: add(
                registry,
                "lane_delay_seconds",
                "How long what is ready waits for its lane: the least of each tenth of a second, where runtime.shed.loop_delay is set",
            ),
        }
    }
}
