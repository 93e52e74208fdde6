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
    loaded: Counter,
    refused: Counter,
    last_loaded: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

impl ReloadMetrics {
    pub(super) fn register(registry: &mut Registry) -> ReloadMetrics {
        let all: Family<ResultLabels, Counter> = add(
            registry,
            "config_reloads",
            "Reloads of the configuration, by result",
        );
        // From the start: who asks for increases sees none in a series that begins with 1.
        let result = |result| all.get_or_create_owned(&ResultLabels { result });
        let reloads = ReloadMetrics {
            loaded: result("loaded"),
            refused: result("refused"),
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
        let all = if loaded { &self.loaded } else { &self.refused };
        all.inc();
        self.last_loaded.set(i64::from(loaded));
    }
}

#[cfg(test)]
mod tests {
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn what_seldom_happens_is_told_before_it_has() {
        let text = Metrics::default().text();
        for series in [
            "weir_config_reloads_total{result=\"loaded\"} 0\n",
            "weir_config_reloads_total{result=\"refused\"} 0\n",
            "weir_admin_refused_total{status=\"401\"} 0\n",
            "weir_admin_refused_total{status=\"403\"} 0\n",
        ] {
            assert!(text.contains(series), "{series}{text}");
        }
    }
}
