//! Whether the process lives, is ready, and how it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Reply;
use crate::audit::Counts;
use crate::clock;
use crate::plan::Plan;
use crate::policy::breaker::State;
use crate::store::fleet::FleetConnections;
use crate::store::redis::Connections;

/// A lane that has not said so for this long is stuck.
const STUCK: Duration = Duration::from_secs(5);

/// When a lane last said that it turns, in milliseconds of the process's clock.
#[derive(Debug, Clone, Default)]
pub struct Heartbeat(Arc<AtomicU64>);

impl Heartbeat {
    pub fn beat(&self) {
        self.0.store(millis(), Ordering::Relaxed);
    }

    /// No beat is expected before the next one.
    pub fn rest(&self) {
        self.0.store(u64::MAX, Ordering::Relaxed);
    }

    fn age(&self) -> Duration {
        Duration::from_millis(millis().saturating_sub(self.0.load(Ordering::Relaxed)))
    }
}

/// A supervised task by whose silence it is told whether it is stuck.
#[derive(Debug, Clone)]
pub struct Watched {
    pub name: &'static str,
    pub heartbeat: Heartbeat,
    /// The longest that it may be silent.
    pub bound: Duration,
}

impl Watched {
    pub fn is_stuck(&self) -> bool {
        self.heartbeat.age() > self.bound
    }
}

/// What health is told by.
#[derive(Debug)]
pub struct Health {
    pub started: Instant,
    pub lanes: Vec<Heartbeat>,
    pub draining: watch::Receiver<bool>,
}

impl Health {
    /// 200 while every lane turns, else 503.
    pub(super) fn live(&self) -> Reply {
        let stuck = self.stuck();
        status(
            stuck == 0,
            json!({ "status": if stuck == 0 { "live" } else { "stuck" }, "lanes_stuck": stuck }),
        )
    }

    /// 200 while requests are taken, else 503.
    pub(super) fn ready(&self) -> Reply {
        let draining = *self.draining.borrow();
        let ready = !draining && self.stuck() == 0;
        status(
            ready,
            json!({ "status": if ready { "ready" } else { "unready" }, "draining": draining }),
        )
    }

    /// Each check with what it measured; 503 when one is critical.
    pub(super) fn health(&self, plan: &Plan, redis: Option<&FleetConnections>) -> Reply {
        let stuck = self.stuck();
        let critical = stuck > 0;
        let audit = plan
            .audit
            .as_ref()
            .map(|audit| audit_check(audit.counts(), audit.capacity()));
        let redis = redis.map_or_else(Vec::new, redis_checks);
        let not_ok = |check: &Value| check["status"] != "ok";
        // Without Redis limits, breakers and sessions do what the file says: that is worse, and no reason to be restarted.
        let degraded =
            audit.as_ref().is_some_and(not_ok) || redis.iter().any(|(_, check)| not_ok(check));
        let lanes = json!({ "status": if critical { "critical" } else { "ok" }, "lanes": self.lanes.len(), "stuck": stuck });
        let mut body = json!({
            "status": if critical { "critical" } else if degraded { "degraded" } else { "ok" },
            "uptime_seconds": self.started.elapsed().as_secs(),
            "version": env!("CARGO_PKG_VERSION"),
            "checks": { "lanes": lanes, "memory": { "status": "ok", "resident_bytes": resident_bytes() } },
        });
        if let Some(audit) = audit {
            body["checks"]["audit"] = audit;
        }
        for (client, check) in redis {
            body["checks"][format!("redis_{client}")] = check;
        }
        status(!critical, body)
    }

    fn stuck(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.age() > STUCK).count()
    }
}

/// Degraded once events wait that could be lost: the store is slow, or cannot be written.
fn audit_check(counts: Counts, capacity: u64) -> Value {
    let status = if counts.queued > capacity / 2 {
        "degraded"
    } else {
        "ok"
    };
    json!({
        "status": status,
        "written": counts.written,
        "queued": counts.queued,
        "dropped": counts.dropped,
        "failed_writes": counts.errors,
    })
}

/// One for each client, by name: ok while every node that has slots answers.
fn redis_checks(redis: &FleetConnections) -> Vec<(&'static str, Value)> {
    let check = |connections: &Arc<Connections>| {
        let nodes = connections.health();
        let up = nodes.iter().filter(|node| node.up).count();
        let ok = up == nodes.len() && connections.knows_all_slots();
        let nodes = nodes.iter().map(|node| {
            json!({ "address": node.address, "up": node.up, "latency_seconds": node.latency.as_secs_f64() })
        });
        let check = json!({
            "status": if ok { "ok" } else { "degraded" },
            "nodes": nodes.collect::<Vec<_>>(),
        });
        (connections.client().name, check)
    };
    redis.each().map(check).collect()
}

/// The metrics, with the gauges that are only known when asked.
pub(super) fn scrape(plan: &Plan) -> String {
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

fn status(good: bool, body: serde_json::Value) -> Reply {
    match good {
        true => Reply::Json(body),
        false => Reply::Status(StatusCode::SERVICE_UNAVAILABLE, body),
    }
}

fn millis() -> u64 {
    u64::try_from(clock::moment().mono.as_millis()).unwrap_or(u64::MAX)
}

/// From /proc/self/statm; `None` where there is none.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    statm
        .split(' ')
        .nth(1)?
        .parse::<u64>()
        .ok()?
        .checked_mul(4096)
}
