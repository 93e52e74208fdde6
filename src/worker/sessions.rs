//! Lets go of sessions that are over, a few at a time, so that no lane ever waits for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::clock;
use crate::plan::Plan;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// Looks for all sessions to be seen once.
const LOOKS: usize = 60;
/// Sessions looked at each time, at least.
const LEAST: usize = 1_000;

/// Sweeps for ever.
pub async fn sweep(plan: watch::Receiver<Arc<Plan>>) {
    loop {
        sleep(EVERY).await;
        let plan = plan.borrow().clone();
        for live in &plan.sessions {
            let budget = (live.store.count() / LOOKS).max(LEAST);
            let expired = live.store.sweep(clock::moment().mono, budget);
            live.metrics.expired.inc_by(expired as u64);
        }
    }
}
