//! Metrics of reloads of the configuration.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;

/// Of all reloads, and whether the last one was taken.
#[derive(Debug)]
pub struct ReloadMetrics {
    all: Family<ResultLabels, Counter>,
    last_loaded: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

impl ReloadMetrics {
    pub(super) fn register(registry: &mut Registry) -> ReloadMetrics {
        let reloads = ReloadMetrics {
            all: add(
                registry,
                "config_reloads",
                "Reloads of the configuration, by result",
            ),
            last_loaded: add(
                registry,
                "config_last_reload_successful",
                "1, or 0 where the last reload of the configuration was refused and the one before it stays",
            ),
        };
        reloads.last_loaded.set(1);
        reloads
    }

    /// Notes what became of a reload.
    pub fn note(&self, loaded: bool) {
        let result = match loaded {
            true => "loaded",
            false => "refused",
        };
        self.all.get_or_create_owned(&ResultLabels { result }).inc();
        self.last_loaded.set(i64::from(loaded));
    }
}
