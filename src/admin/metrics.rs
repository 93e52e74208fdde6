//! `/metrics`: the counters, and the gauges that are only known when asked, which are measured then.

use hyper::HeaderMap;

use super::health::machine;
use super::{Admin, Reply};
use crate::audit::Counts;
use crate::clock;
use crate::config::limits::Mode;
use crate::plan::Plan;
use crate::policy::breaker::State;
use crate::telemetry::log;
use crate::telemetry::metrics::audit::AuditMetrics;
use crate::telemetry::metrics::{bring, format, whole};

/// The metrics, in the format that these fields ask for.
pub(super) fn answer(admin: &Admin, plan: &Plan, fields: &HeaderMap) -> Reply {
    let (kind, text) = format::as_asked(fields, scrape(admin, plan));
    Reply::Text(kind, text)
}

/// With the gauges that are only known when asked.
fn scrape(admin: &Admin, plan: &Plan) -> String {
    let process = &plan.metrics.process;
    process.note_use(machine::used(admin.health.started.elapsed()));
    process.ready.set(i64::from(admin.health.is_ready()));
    if let Some(writes) = &admin.writes {
        process.note_pool("write", writes.write_use());
    }
    if let Some(reads) = &admin.postgres {
        process.note_pool("read", reads.replicas_use());
        process.note_pool("read_primary", reads.read_primary_use());
    }
    plan.metrics.log.bring(log::counts());
    plan.metrics.access_log.bring(plan.access_log.counts());
    let now = clock::moment().mono;
    let breakers = &plan.metrics.breakers;
    breakers.forget_states();
    for breaker in plan.breakers() {
        let state = breaker.snapshot(now).state.as_str();
        breakers.set_state(&breaker.upstream, state, &State::ALL.map(State::as_str));
        let enforced = breaker.settings.mode == Mode::Enforce;
        breakers.set_enforced(&breaker.upstream, enforced);
        if let Some(shared) = breaker.with_member(|member| member.is_together()) {
            breakers.set_shared(&breaker.upstream, shared);
        }
    }
    plan.tell_sharing(now);
    for upstream in plan.live_upstreams() {
        let (counts, metrics) = (upstream.counts(), &upstream.metrics);
        metrics.up.set(whole(counts.up));
        metrics.unhealthy.set(whole(counts.unhealthy));
        metrics.ejected.set(whole(counts.ejected));
        metrics.panic.set(i64::from(counts.panic));
        metrics.under_way.set(i64::from(upstream.under_way()));
        metrics.bound.set(upstream.bound().unwrap_or(0).into());
    }
    for live in &plan.sessions {
        live.metrics.held.set(whole(live.held()));
    }
    if let Some(audit) = &plan.audit {
        bring_audit(&plan.metrics.audit, &audit.counts(), audit.refuses());
    }
    if let Some(disk) = &admin.disk {
        let (free, total) = disk.space();
        plan.metrics.audit.disk_free_bytes.set(whole(free));
        plan.metrics.audit.disk_bytes.set(whole(total));
    }
    let evicted = plan
        .shared_limits
        .as_ref()
        .map_or(0, |shared| shared.leases.evicted() + shared.slots.evicted());
    let limits = &plan.metrics.limits;
    let evicted = plan.counters.evicted() + evicted;
    bring(&limits.keys_evicted, evicted);
    limits.keys.set(whole(plan.held_keys()));
    limits.keys_max.set(whole(plan.counters.max_keys));
    plan.metrics.text()
}

/// Brings the audit's metrics up to what has become of its events.
fn bring_audit(metrics: &AuditMetrics, counts: &Counts, refuses: bool) {
    metrics.events_total("written", counts.written);
    metrics.events_total("dropped", counts.dropped);
    metrics.events_total("failed_write", counts.errors);
    metrics.files_removed_total(counts.removed_files);
    metrics.resent_total(counts.resent);
    metrics.queued.set(whole(counts.queued));
    metrics.queued_bytes.set(whole(counts.queued_bytes));
    metrics.underway.set(whole(counts.underway));
    metrics.refuses.set(i64::from(refuses));
    let spool = counts.spool.unwrap_or_default();
    metrics.spool_bytes.set(whole(spool.bytes));
    metrics.spool_max_bytes.set(whole(spool.max));
    metrics.spool_batches.set(whole(spool.batches));
    metrics.spool_oldest_seconds.set(whole(spool.age.as_secs()));
    metrics.spool_corrupt_total(spool.corrupt);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::audit::SpoolCounts;
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn each_count_of_the_audit_is_told_by_its_own_name() {
        let spool = SpoolCounts {
            bytes: 9,
            max: 10,
            batches: 11,
            age: Duration::from_secs(12),
            corrupt: 13,
            takes: true,
        };
        let counts = Counts {
            written: 1,
            dropped: 2,
            errors: 3,
            removed_files: 4,
            resent: 5,
            queued: 6,
            queued_bytes: 7,
            underway: 8,
            spool: Some(spool),
        };
        let told = |refuses, series: &str| {
            let metrics = Metrics::default();
            bring_audit(&metrics.audit, &counts, refuses);
            let text = metrics.text();
            let line = text.lines().find_map(|line| line.strip_prefix(series));
            line.map(str::to_owned)
        };
        for (series, value) in [
            ("events_total{result=\"written\"}", 1),
            ("events_total{result=\"dropped\"}", 2),
            ("events_total{result=\"failed_write\"}", 3),
            ("files_removed_total", 4),
            ("resent_batches_total", 5),
            ("queued", 6),
            ("queued_bytes", 7),
            ("underway", 8),
            ("spool_bytes", 9),
            ("spool_max_bytes", 10),
            ("spool_batches", 11),
            ("spool_oldest_seconds", 12),
            ("spool_corrupt_total", 13),
            ("refuses", 1),
        ] {
            let found = told(true, &format!("weir_audit_{series} "));
            assert_eq!(found, Some(value.to_string()), "{series}");
        }
        assert_eq!(told(false, "weir_audit_refuses ").as_deref(), Some("0"));
    }
}
