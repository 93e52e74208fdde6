//! Metrics of what comes before HTTP, but for TLS.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::add;

/// PROXY headers that did not come, or were none.
#[derive(Debug)]
pub struct ProxyFailures(Family<Labels, Counter>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    listener: String,
    reason: &'static str,
}

impl ProxyFailures {
    pub(super) fn register(registry: &mut Registry) -> ProxyFailures {
        ProxyFailures(add(
            registry,
            "proxy_protocol_failures",
            "Connections closed for want of a PROXY header that can be read, by reason",
        ))
    }

    /// `reason` is one of a closed set. For a connection that is closed, so rarely that it is looked up each time.
    pub fn count(&self, listener: &str, reason: &'static str) {
        let listener = listener.to_owned();
        self.0.get_or_create(&Labels { listener, reason }).inc();
    }
}
