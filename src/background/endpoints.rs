//! What is done for endpoints beside the lanes: names are looked up again, endpoints asked how they are, and ejected ones taken back.
//! Must not judge: `policy::outlier` does.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinError;
use tokio::time::sleep;

use super::tasks_of::{Begin, TasksOf};
use crate::clock;
use crate::config::upstreams::{DnsName, HealthCheck};
use crate::heartbeat::Heartbeat;
use crate::plan::Plan;
use crate::upstream::{Endpoint, LiveUpstream, names, probe};

/// Between beats.
const BEAT_EVERY: Duration = Duration::from_secs(10);
/// By so much more or less a check is put off, as a share, so that those of many processes do not come together.
const JITTER: f64 = 0.1;

/// Tends the endpoints of each plan, as long as there are plans. An error is the panic of one of its tasks.
pub async fn follow(
    mut plans: watch::Receiver<Arc<Plan>>,
    heartbeat: Heartbeat,
) -> Result<(), JoinError> {
    let mut tasks = TasksOf::new();
    loop {
        let plan = plans.borrow_and_update().clone();
        let wanting = plan.live_upstreams().filter(|it| it.wants_care());
        let wanting: Vec<_> = wanting.cloned().collect();
        drop(plan);
        tasks.follow(&wanting, tend);
        loop {
            heartbeat.beat();
            tokio::select! {
                changed = plans.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return Ok(()),
                },
                error = tasks.panicked() => return Err(error),
                () = sleep(BEAT_EVERY) => {}
            }
        }
    }
}

fn tend(live: &Arc<LiveUpstream>, tasks: &mut Begin<'_>) {
    for (index, name) in names::names(live) {
        tasks.spawn(look_up(live.clone(), index, name.clone()));
    }
    if let Some(check) = &live.settings.health {
        tasks.spawn(check_all(live.clone(), check.clone()));
    }
    if let (true, Some(settings)) = (live.ejects(), live.settings.outlier_detection) {
        tasks.spawn(take_back(live.clone(), settings.interval));
    }
}

/// Looks a name up again and again.
async fn look_up(live: Arc<LiveUpstream>, source: usize, name: DnsName) -> Infallible {
    loop {
        sleep(names::due_in(&live, source)).await;
        names::look_up(&live, source, &name).await;
    }
}

/// Checks each endpoint there is, each by a task of its own, so that none waits for another.
async fn check_all(live: Arc<LiveUpstream>, check: HealthCheck) -> Infallible {
    let mut changes = live.changes();
    let mut tasks = TasksOf::new();
    loop {
        changes.borrow_and_update();
        tasks.follow(&live.list(), |endpoint, tasks| {
            tasks.spawn(check_on(live.clone(), endpoint.clone(), check.clone()));
        });
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                // Its sender is held by `live`.
                return std::future::pending().await;
            },
            error = tasks.panicked() => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

async fn check_on(
    live: Arc<LiveUpstream>,
    endpoint: Arc<Endpoint>,
    check: HealthCheck,
) -> Infallible {
    loop {
        if let Some(result) = probe::passes(&live, &endpoint, &check).await {
            live.note_check(&endpoint, result);
        }
        let share = 1.0 + JITTER * (2.0 * fastrand::f64() - 1.0);
        sleep(check.interval.mul_f64(share)).await;
    }
}

async fn take_back(live: Arc<LiveUpstream>, interval: Duration) -> Infallible {
    loop {
        sleep(interval).await;
        live.readmit(clock::mono());
    }
}
