//! Metrics of what takes batches from the audit's streams into Postgres.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;

/// The handles. Clones count together.
#[derive(Debug, Clone)]
pub struct IngestMetrics {
    /// Events whose rows were committed.
    pub events: Counter,
    /// Batches whose rows were committed,
    pub stored: Counter,
    /// that were stored before,
    pub known: Counter,
    /// that went to the dead letters.
    pub buried: Counter,
    pub transactions: Counter,
    /// Transactions that are tried again.
    pub failed: Counter,
    /// Entries taken over from workers that did not store them.
    pub claimed: Counter,
    /// The age of the oldest entry that is not stored.
    pub lag_seconds: Gauge<f64, AtomicU64>,
    /// Entries that are not stored.
    pub waiting: Gauge,
    pub dead_letters: Gauge,
    /// 1 while nothing can be stored, since Postgres has not the schema, or refuses to say.
    pub schema_missing: Gauge,
    /// Days that retention removed.
    pub days_removed: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

impl IngestMetrics {
    pub(super) fn register(registry: &mut Registry) -> IngestMetrics {
        let batches = add::<Family<ResultLabels, Counter>>(
            registry,
            "ingest_batches",
            "Batches of audit events read from redis, by what became of them",
        );
        let transactions = add::<Family<ResultLabels, Counter>>(
            registry,
            "ingest_transactions",
            "Transactions that store audit events; those that failed are tried again",
        );
        let of = |family: &Family<ResultLabels, Counter>, result| {
            family.get_or_create_owned(&ResultLabels { result })
        };
        IngestMetrics {
            stored: of(&batches, "stored"),
            known: of(&batches, "known"),
            buried: of(&batches, "buried"),
            transactions: of(&transactions, "committed"),
            failed: of(&transactions, "failed"),
            events: add(registry, "ingest_events", "Audit events stored in postgres"),
            claimed: add(
                registry,
                "ingest_claimed",
                "Entries taken over from workers that did not store them",
            ),
            lag_seconds: add(
                registry,
                "ingest_lag_seconds",
                "Age of the oldest audit event in redis that is not stored",
            ),
            waiting: add(
                registry,
                "ingest_waiting",
                "Batches of audit events in redis that are not stored",
            ),
            dead_letters: add(
                registry,
                "ingest_dead_letters",
                "Batches that could not be stored, and wait for an operator",
            ),
            schema_missing: add(
                registry,
                "ingest_schema_missing",
                "1 while audit events are not stored since postgres has not the schema, or refuses to say",
            ),
            days_removed: add(
                registry,
                "ingest_days_removed",
                "Days of the audit that retention removed from postgres",
            ),
        }
    }
}
