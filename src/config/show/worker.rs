//! The worker as the file spells it.

use serde::Serialize;

use crate::config::raw::Partition;
use crate::config::units::Span;
use crate::config::worker;

#[derive(Serialize)]
pub(super) struct Worker<'c> {
    group: &'c str,
    batch: Batch,
    claim_after: Span,
    max_deliveries: u32,
    partition: Partition,
    retention: Span,
    session_sweep: Span,
    health: Health,
}

#[derive(Serialize)]
struct Batch {
    max: usize,
    wait: Span,
}

#[derive(Serialize)]
struct Health {
    interval: Span,
    timeout: Span,
    cache: Span,
    checks: Checks,
}

#[derive(Serialize)]
struct Checks {
    audit_lag: Lag,
}

#[derive(Serialize)]
struct Lag {
    degraded: Span,
    critical: Span,
}

impl<'c> Worker<'c> {
    pub(super) fn new(worker: &'c worker::Worker) -> Worker<'c> {
        let health = &worker.health;
        Worker {
            group: &worker.group,
            batch: Batch {
                max: worker.batch_max,
                wait: Span(worker.batch_wait),
            },
            claim_after: Span(worker.claim_after),
            max_deliveries: worker.max_deliveries,
            partition: Partition::Day,
            retention: Span(worker.retention),
            session_sweep: Span(worker.session_sweep),
            health: Health {
                interval: Span(health.interval),
                timeout: Span(health.timeout),
                cache: Span(health.cache),
                checks: Checks {
                    audit_lag: Lag {
                        degraded: Span(health.lag_degraded),
                        critical: Span(health.lag_critical),
                    },
                },
            },
        }
    }
}
