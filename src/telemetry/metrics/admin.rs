//! Metrics of the admin port.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Of calls to `/v1/` that nobody may make: without the token, or from a web page.
#[derive(Debug)]
pub struct AdminMetrics {
    refused: Family<StatusLabels, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabels {
    status: u16,
}

impl AdminMetrics {
    pub(super) fn register(registry: &mut Registry) -> AdminMetrics {
        let refused = Family::<StatusLabels, Counter>::default();
        registry.register(
            "admin_refused",
            "Calls of the admin port that were refused: 401 without the token, 403 from a web page",
            refused.clone(),
        );
        // From the start: who asks for increases sees none in a series that begins with 1.
        for status in [401, 403] {
            drop(refused.get_or_create(&StatusLabels { status }));
        }
        AdminMetrics { refused }
    }

    pub fn refused(&self, status: u16) {
        let labels = StatusLabels { status };
        self.refused.get_or_create_owned(&labels).inc();
    }
}
