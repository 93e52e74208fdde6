//! `/metrics`: the counters, and the gauges that are only known when asked.

use hyper::HeaderMap;

use super::health::machine;
use super::{Admin, Reply};
use crate::audit::Counts;
use crate::clock;
use crate::config::limits::Mode;
use crate::plan::Plan;
use crate::policy::breaker::State;
use crate::telemetry::metrics::audit::AuditMetrics;
use crate::telemetry::metrics::format;

/// The metrics, in the format that these fields ask for.
pub(super) fn answer(admin: &Admin, plan: &Plan, fields: &HeaderMap) -> Reply {
    let (kind, text) = format::as_asked(fields, scrape(admin, plan));
    Reply::Text(kind, text)
}

/// With the gauges that are only known when asked.
fn scrape(admin: &Admin, plan: &Plan) -> String {
    let process = &plan.metrics.process;
    process.used(machine::used(admin.health.started.elapsed()));
    process.ready.set(i64::from(admin.health.is_ready()));
    if let Some(writes) = &admin.writes {
        process.pool("write", writes.write_use());
    }
    if let Some(reads) = &admin.postgres {
        process.pool("read", reads.replicas_use());
        process.pool("read_primary", reads.read_primary_use());
    }
    let now = clock::moment().mono;
    let breakers = &plan.metrics.breakers;
    breakers.forget_states();
    for breaker in plan.breakers.iter().flatten() {
        let state = breaker.snapshot(now).state.as_str();
        breakers.is(&breaker.upstream, state, &State::ALL.map(State::as_str));
        let enforced = breaker.settings.mode == Mode::Enforce;
        breakers.is_enforced(&breaker.upstream, enforced);
        if let Some(shared) = breaker.with_member(|member| member.is_together()) {
            breakers.is_shared(&breaker.upstream, shared);
        }
    }
    plan.tell_sharing(now);
    for upstream in &plan.upstreams {
        let (counts, metrics) = (upstream.counts(), &upstream.metrics);
        let whole = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        metrics.up.set(whole(counts.up));
        metrics.unhealthy.set(whole(counts.unhealthy));
        metrics.ejected.set(whole(counts.ejected));
        metrics.panic.set(i64::from(counts.panic));
        metrics.under_way.set(i64::from(upstream.under_way()));
        metrics.bound.set(upstream.bound().unwrap_or(0).into());
    }
    for live in &plan.sessions {
        let held = i64::try_from(live.held()).unwrap_or(i64::MAX);
        live.metrics.held.set(held);
    }
    if let Some(audit) = &plan.audit {
        bring(&plan.metrics.audit, &audit.counts(), audit.refuses());
    }
    let keys = plan.held_keys();
    let evicted = plan
        .shared_limits
        .as_ref()
        .map_or(0, |shared| shared.leases.evicted() + shared.slots.evicted());
    let counted = &plan.metrics.limit_keys_evicted;
    counted.inc_by((plan.limits.evicted() + evicted).saturating_sub(counted.get()));
    plan.metrics
        .limit_keys
        .set(i64::try_from(keys).unwrap_or(i64::MAX));
    plan.metrics
        .limit_keys_max
        .set(i64::try_from(plan.limits.max_keys).unwrap_or(i64::MAX));
    plan.metrics.text()
}

/// Brings the audit's metrics up to what has become of its events.
fn bring(metrics: &AuditMetrics, counts: &Counts, refuses: bool) {
    let whole = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    metrics.events_total("written", counts.written);
    metrics.events_total("dropped", counts.dropped);
    metrics.events_total("failed_write", counts.errors);
    metrics.files_removed_total(counts.removed_files);
    metrics.resent_total(counts.resent);
    metrics.queued.set(whole(counts.queued));
    metrics.underway.set(whole(counts.underway));
    metrics.refuses.set(i64::from(refuses));
    let spool = counts.spool.unwrap_or_default();
    metrics.spool_bytes.set(whole(spool.bytes));
    metrics.spool_max_bytes.set(whole(spool.max));
    metrics.spool_batches.set(whole(spool.batches));
    metrics.spool_oldest_seconds.set(whole(spool.age.as_secs()));
    metrics.spool_corrupt_total(spool.corrupt);
}
