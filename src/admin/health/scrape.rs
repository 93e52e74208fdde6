//! `/metrics`: the counters, and the gauges that are only known when asked.

use crate::clock;
use crate::plan::Plan;
use crate::policy::breaker::State;

/// The metrics, with the gauges that are only known when asked.
pub(in crate::admin) fn scrape(plan: &Plan) -> String {
    let now = clock::moment().mono;
    for breaker in plan.breakers.iter().flatten() {
        let state = breaker.snapshot(now).state.as_str();
        plan.metrics
            .breaker_is(&breaker.upstream, state, &State::ALL.map(State::as_str));
        if let Some(shared) = breaker.with_member(|member| member.is_together()) {
            plan.metrics.breaker_is_shared(&breaker.upstream, shared);
        }
    }
    for live in &plan.sessions {
        let held = i64::try_from(live.held()).unwrap_or(i64::MAX);
        live.metrics.held.set(held);
    }
    if let Some(audit) = &plan.audit {
        let counts = audit.counts();
        plan.metrics.audit_total("written", counts.written);
        plan.metrics.audit_total("dropped", counts.dropped);
        plan.metrics.audit_total("failed_write", counts.errors);
        plan.metrics.audit_files_removed_total(counts.removed_files);
        let queued = i64::try_from(counts.queued).unwrap_or(i64::MAX);
        plan.metrics.audit_queued.set(queued);
    }
    plan.metrics
        .limit_keys
        .set(i64::try_from(plan.limits.len()).unwrap_or(i64::MAX));
    plan.metrics.text()
}
