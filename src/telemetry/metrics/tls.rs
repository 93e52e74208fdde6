//! Metrics of TLS with clients, and of the certificates that weir shows.

use std::ops::Range;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;
use super::durations::Durations;

/// Of all listeners, and of all certificates that are shown.
#[derive(Debug)]
pub struct TlsMetrics {
    handshakes: Family<HandshakeLabels, Counter>,
    failures: Family<FailureLabels, Counter>,
    durations: Family<ListenerLabels, Durations>,
    pub certificates: CertificateMetrics,
}

/// Of the certificates that weir shows: to clients, the API server among them, and to upstreams and stores.
#[derive(Debug)]
pub struct CertificateMetrics {
    not_before: Family<CertificateLabels, Gauge>,
    not_after: Family<CertificateLabels, Gauge>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandshakeLabels {
    listener: String,
    version: &'static str,
    session: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    listener: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerLabels {
    listener: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CertificateLabels {
    certificate: String,
}

/// The handles of one listener.
#[derive(Debug, Clone)]
pub struct HandshakeMetrics {
    tls12: BySession,
    tls13: BySession,
    /// By reason, in the order in which they were named.
    pub failures: Box<[Counter]>,
    durations: Durations,
}

#[derive(Debug, Clone)]
struct BySession {
    full: Counter,
    resumed: Counter,
}

impl TlsMetrics {
    pub(super) fn register(registry: &mut Registry) -> TlsMetrics {
        TlsMetrics {
            certificates: CertificateMetrics::register(registry),
            handshakes: add(
                registry,
                "tls_handshakes",
                "TLS handshakes with clients, by version, and by whether a session was resumed",
            ),
            failures: add(
                registry,
                "tls_handshake_failures",
                "TLS handshakes with clients that failed, by reason",
            ),
            durations: add(
                registry,
                "tls_handshake_duration_seconds",
                "Time from a connection's start to the end of its handshake",
            ),
        }
    }

    /// `reasons` are one of a closed set.
    pub fn listener(&self, listener: &str, reasons: &[&'static str]) -> HandshakeMetrics {
        let handshakes = |version, session| {
            self.handshakes.get_or_create_owned(&HandshakeLabels {
                listener: listener.to_owned(),
                version,
                session,
            })
        };
        let by_session = |version| BySession {
            full: handshakes(version, "full"),
            resumed: handshakes(version, "resumed"),
        };
        let failures = reasons.iter().map(|reason| {
            self.failures.get_or_create_owned(&FailureLabels {
                listener: listener.to_owned(),
                reason,
            })
        });
        HandshakeMetrics {
            tls12: by_session("1.2"),
            tls13: by_session("1.3"),
            failures: failures.collect(),
            durations: self.durations.get_or_create_owned(&ListenerLabels {
                listener: listener.to_owned(),
            }),
        }
    }
}

impl CertificateMetrics {
    pub(super) fn register(registry: &mut Registry) -> CertificateMetrics {
        CertificateMetrics {
            not_before: add(
                registry,
                "tls_certificate_not_before_timestamp_seconds",
                "When a certificate that weir shows begins to hold, by its file",
            ),
            not_after: add(
                registry,
                "tls_certificate_not_after_timestamp_seconds",
                "When a certificate that weir shows ends, by its file",
            ),
        }
    }

    /// The files of certificates and from when till when each holds, since the epoch; others than these are forgotten.
    pub fn note_lifetimes(&self, certificates: impl Iterator<Item = (String, Range<Duration>)>) {
        self.not_before.clear();
        self.not_after.clear();
        for (certificate, holds) in certificates {
            let labels = CertificateLabels { certificate };
            for (gauges, time) in [
                (&self.not_before, holds.start),
                (&self.not_after, holds.end),
            ] {
                let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
                gauges.get_or_create_owned(&labels).set(seconds);
            }
        }
    }
}

impl HandshakeMetrics {
    /// Counts one that succeeded after `took`.
    pub fn succeeded(&self, is_tls13: bool, resumed: bool, took: Duration) {
        let by_session = if is_tls13 { &self.tls13 } else { &self.tls12 };
        match resumed {
            true => by_session.resumed.inc(),
            false => by_session.full.inc(),
        };
        self.durations.observe(took);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::telemetry::metrics::Metrics;

    #[test]
    fn a_certificate_is_told_from_its_begin_to_its_end_and_then_no_more() {
        let metrics = Metrics::default();
        let told = |file: &str, begin, end| {
            let holds = Duration::from_secs(begin)..Duration::from_secs(end);
            let all = [(file.to_owned(), holds)].into_iter();
            metrics.tls.certificates.note_lifetimes(all);
            let text = metrics.text();
            let lines = text
                .lines()
                .filter_map(|line| line.strip_prefix("weir_tls_certificate_"));
            let mut lines: Vec<_> = lines.map(str::to_owned).collect();
            lines.sort_unstable();
            lines
        };
        for (file, begin, end) in [("a.crt", 7, 9), ("b.crt", 8, 10)] {
            let lines = [("not_after", end), ("not_before", begin)];
            let line = |(which, seconds)| {
                format!("{which}_timestamp_seconds{{certificate=\"{file}\"}} {seconds}")
            };
            assert_eq!(told(file, begin, end), lines.map(line));
        }
    }
}
