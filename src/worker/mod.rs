//! What runs beside the lanes, on the control thread. Meets the proxy in the plan alone.

pub mod breakers;
pub mod drain;
pub mod limits;
pub mod partitions;
pub mod sessions;
pub mod supervise;

use std::sync::Arc;

use tokio::sync::watch;

use crate::plan::Plan;
use crate::store::fleet::FleetConnections;

/// Begins what a process does for the state that it shares with others, on the runtime of this thread, which is to be the control
/// thread's.
pub fn join(plan: &watch::Receiver<Arc<Plan>>, redis: &FleetConnections) {
    let now = plan.borrow();
    if let Some(fleet) = &now.fleet {
        let breakers = breakers::follow(plan.clone(), fleet.clone(), redis.main.clone());
        tokio::spawn(breakers);
        tokio::spawn(limits::follow(plan.clone(), fleet.clone(), redis.clone()));
        tokio::spawn(sessions::write_uses(plan.clone(), redis.sessions.clone()));
        tokio::spawn(sessions::hear(plan.clone()));
    }
    if let Some(shared) = &now.shared_limits {
        tokio::spawn(shared.slots.clone().keep(redis.rate_limit.clone()));
    }
}
