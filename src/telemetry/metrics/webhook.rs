//! Metrics of `weir webhook`, which has none of a proxy's.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::add;
use super::durations::Durations;
use super::tls::CertificateMetrics;

/// All metrics of a webhook.
#[derive(Debug)]
pub struct WebhookMetrics {
    registry: Registry,
    pub injected: Counter,
    pub skipped: Counter,
    /// weir could not be put in as the pod asks for it.
    pub unfit: Counter,
    /// No review could be made: what came is none, or came too slowly.
    pub error: Counter,
    durations: Durations,
    /// Certificates read anew, and refused.
    pub reloaded: Counter,
    pub refused: Counter,
    pub certificates: CertificateMetrics,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

impl Default for WebhookMetrics {
    fn default() -> WebhookMetrics {
        let mut registry = Registry::with_prefix("weir");
        let requests = add::<Family<OutcomeLabels, Counter>>(
            &mut registry,
            "webhook_requests",
            "Reviews of pods, by what became of them",
        );
        let outcome = |outcome| requests.get_or_create_owned(&OutcomeLabels { outcome });
        let reloads = add::<Family<ResultLabels, Counter>>(
            &mut registry,
            "webhook_certificate_reloads",
            "Changes of the certificate's files, by result",
        );
        let result = |result| reloads.get_or_create_owned(&ResultLabels { result });
        let durations = add::<Durations>(
            &mut registry,
            "webhook_duration_seconds",
            "Time from a review's head to its answer",
        );
        let [injected, skipped, unfit, error] =
            ["injected", "skipped", "unfit", "error"].map(outcome);
        let [reloaded, refused] = ["loaded", "refused"].map(result);
        let certificates = CertificateMetrics::register(&mut registry);
        registry.register(
            "build",
            "The version of weir",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        WebhookMetrics {
            registry,
            injected,
            skipped,
            unfit,
            error,
            durations,
            reloaded,
            refused,
            certificates,
        }
    }
}

impl WebhookMetrics {
    /// Counts a review that was answered after so long.
    pub fn took(&self, duration: Duration) {
        self.durations.observe(duration);
    }

    /// The metrics in the OpenMetrics text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }
}
