//! Metrics of clients' connections, and of how late the lanes are that they wait for.

use prometheus_client::metrics::counter::Counter;
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
    pub accept_failures: Counter,
    pub open: Gauge,
    /// How late lanes were, where that is measured.
    pub lane_delays: Durations,
}

impl ConnectionMetrics {
    pub(super) fn register(registry: &mut Registry) -> ConnectionMetrics {
        ConnectionMetrics {
            accepted: add(registry, "connections", "Connections accepted"),
            refused: add(
                registry,
                "connections_refused",
                "Connections closed at once, over max_connections",
            ),
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
