//! Metrics of the audit's way from the lanes to where it is kept.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{add, bring};

/// The handles.
#[derive(Debug)]
pub struct AuditMetrics {
    events: Family<ResultLabels, Counter>,
    /// Events that wait to be written, or to be packed for the worker.
    pub queued: Gauge,
    pub queued_bytes: Gauge,
    /// Events on their way to the worker.
    pub underway: Gauge,
    files_removed: Counter,
    resent: Counter,
    /// 1 while requests are refused since their events could not be made safe.
    pub refuses: Gauge,
    /// Of the file system that the spool or SQLite's files are on.
    pub disk_free_bytes: Gauge,
    pub disk_bytes: Gauge,
    pub spool_bytes: Gauge,
    pub spool_max_bytes: Gauge,
    pub spool_batches: Gauge,
    pub spool_oldest_seconds: Gauge,
    spool_corrupt: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

impl AuditMetrics {
    pub(super) fn register(registry: &mut Registry) -> AuditMetrics {
        AuditMetrics {
            events: add(
                registry,
                "audit_events",
                "Audit events written and dropped, and writes that failed and are tried again",
            ),
            files_removed: add(
                registry,
                "audit_files_removed",
                "Files of days of the audit that were removed after the retention",
            ),
            resent: add(
                registry,
                "audit_resent_batches",
                "Batches of audit events that redis has lost, and that were sent again",
            ),
            spool_corrupt: add(
                registry,
                "audit_spool_corrupt",
                "Stretches of damage found in what processes left in the spool",
            ),
            queued: add(
                registry,
                "audit_queued",
                "Audit events that wait to be written",
            ),
            queued_bytes: add(
                registry,
                "audit_queued_bytes",
                "Bytes of the audit's queue, which takes no more from 32 MiB on",
            ),
            underway: add(
                registry,
                "audit_underway",
                "Audit events on their way to the worker that are not known to be committed",
            ),
            refuses: add(
                registry,
                "audit_refuses",
                "1 while requests are refused since their audit events could not be made safe",
            ),
            disk_free_bytes: add(
                registry,
                "audit_disk_free_bytes",
                "Bytes that are free where the spool or the files of the audit are",
            ),
            disk_bytes: add(registry, "audit_disk_bytes", "Bytes that there are in all"),
            spool_bytes: add(
                registry,
                "audit_spool_bytes",
                "Bytes of the audit's spool on disk",
            ),
            spool_max_bytes: add(
                registry,
                "audit_spool_max_bytes",
                "Bytes that the spool may have: audit.spool.max",
            ),
            spool_batches: add(
                registry,
                "audit_spool_batches",
                "Batches of this process in the spool that are not known to be committed",
            ),
            spool_oldest_seconds: add(
                registry,
                "audit_spool_oldest_seconds",
                "Age of the oldest of them",
            ),
        }
    }

    /// Notes how many events came to this `result`, one of a closed set, since the process began.
    pub fn events_total(&self, result: &'static str, total: u64) {
        let counter = self.events.get_or_create(&ResultLabels { result });
        bring(&counter, total);
    }

    /// Notes how many files were removed after the retention, since the process began.
    pub fn files_removed_total(&self, total: u64) {
        bring(&self.files_removed, total);
    }

    /// Notes how many batches were sent again, since the process began.
    pub fn resent_total(&self, total: u64) {
        bring(&self.resent, total);
    }

    /// Notes how many stretches of damage were found in the spool, since the process began.
    pub fn spool_corrupt_total(&self, total: u64) {
        bring(&self.spool_corrupt, total);
    }
}
