//! What runs beside the lanes: on the control thread, or as a companion of its own, which ingests the audit. Meets the proxy in the
//! plan alone, and is on no request's way.

pub mod breakers;
pub mod endpoints;
pub mod ingest;
pub mod limits;
pub mod partitions;
pub mod sessions;
pub mod supervise;
mod tasks_of;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::plan::Plan;
use crate::store::fleet::FleetConnections;
use crate::store::postgres::Postgres;
use supervise::{AtStop, Supervisor};

/// For a task that beats at least each half a minute, and may wait for Redis or Postgres between, which the file may let last a minute.
const SILENCE: Duration = Duration::from_secs(120);
/// For a task that beats each second, and waits for nothing between.
pub const SHORT_SILENCE: Duration = Duration::from_secs(30);

/// Begins what a process does for the state that it shares with others. `supervisor` is to be of this thread's runtime, which is to
/// be the control thread's, as `redis` is.
pub fn tend_shared_state(
    supervisor: &mut Supervisor,
    plan: &watch::Receiver<Arc<Plan>>,
    redis: &FleetConnections,
) {
    let now = plan.borrow();
    if let Some(fleet) = &now.fleet {
        let (plans, fleet, redis) = (plan.clone(), fleet.clone(), redis.clone());
        supervisor.keep("breakers", SHORT_SILENCE, AtStop::Drop, {
            let (plans, fleet, redis) = (plans.clone(), fleet.clone(), redis.main.clone());
            move |heartbeat| {
                let (fleet, redis) = (fleet.clone(), redis.clone());
                let follow = breakers::follow(plans.clone(), fleet, redis, heartbeat);
                async move { Ok(follow.await?) }
            }
        });
        supervisor.keep("overrides", SILENCE, AtStop::Drop, {
            let (plans, redis) = (plans.clone(), redis.clone());
            move |heartbeat| {
                let (fleet, redis) = (fleet.clone(), redis.clone());
                let follow = limits::follow(plans.clone(), fleet, redis, heartbeat);
                async move { Ok(follow.await?) }
            }
        });
        supervisor.keep_forever("session_uses", SILENCE, {
            let plans = plans.clone();
            move |heartbeat| sessions::write_uses(plans.clone(), redis.sessions.clone(), heartbeat)
        });
        supervisor.keep_forever("session_ends", SILENCE, move |heartbeat| {
            sessions::hear(plans.clone(), heartbeat)
        });
    }
    if let Some(shared) = &now.shared_limits {
        let (slots, redis) = (shared.slots.clone(), redis.rate_limit.clone());
        supervisor.keep_forever("slots", SILENCE, move |heartbeat| {
            let beat = move || heartbeat.beat();
            slots.clone().keep(redis.clone(), beat)
        });
    }
}

/// Keeps it known which replicas of Postgres are well.
pub fn look_at_replicas(supervisor: &mut Supervisor, name: &'static str, postgres: Arc<Postgres>) {
    supervisor.keep_forever(name, SILENCE, move |heartbeat| {
        postgres.clone().watch_replicas(move || heartbeat.beat())
    });
}

/// Keeps endpoints looked up, checked and taken back.
pub fn tend_endpoints(supervisor: &mut Supervisor, plan: watch::Receiver<Arc<Plan>>) {
    supervisor.keep("endpoints", SILENCE, AtStop::Drop, move |heartbeat| {
        let follow = endpoints::follow(plan.clone(), heartbeat);
        async move { Ok(follow.await?) }
    });
}

/// Keeps sessions in memory swept.
pub fn sweep_sessions(supervisor: &mut Supervisor, plan: watch::Receiver<Arc<Plan>>) {
    supervisor.keep_forever("session_sweep", SILENCE, move |heartbeat| {
        sessions::sweep(plan.clone(), heartbeat)
    });
}

/// Keeps sessions in Redis swept, where the plan has a fleet. `redis` is to be of the supervisor's runtime.
pub fn sweep_shared_sessions(
    supervisor: &mut Supervisor,
    plan: &watch::Receiver<Arc<Plan>>,
    redis: &FleetConnections,
) {
    let Some(sweep) = sessions::SharedSweep::new(plan.clone(), redis) else {
        return;
    };
    let sweep = Arc::new(sweep);
    supervisor.keep_forever("shared_session_sweep", SILENCE, move |heartbeat| {
        sweep.clone().run(heartbeat)
    });
}
