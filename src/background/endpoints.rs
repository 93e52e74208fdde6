//! What is done for endpoints beside the lanes: names are looked up again, endpoints asked how they are, and ejected ones taken back.
//! Must not judge: `policy::outlier` does.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::sleep;

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
    // They end with the set.
    let mut tasks = JoinSet::new();
    let mut kept: Vec<(Arc<LiveUpstream>, Vec<AbortHandle>)> = Vec::new();
    loop {
        let plan = plans.borrow_and_update().clone();
        kept.retain(|(live, tasks)| {
            let stays = plan.live_upstreams().any(|it| Arc::ptr_eq(it, live));
            if !stays {
                tasks.iter().for_each(AbortHandle::abort);
            }
            stays
        });
        for live in plan.live_upstreams().filter(|it| it.wants_care()) {
            if !kept.iter().any(|(kept, _)| Arc::ptr_eq(kept, live)) {
                kept.push((live.clone(), tend(live, &mut tasks)));
            }
        }
        drop(plan);
        loop {
            heartbeat.beat();
            tokio::select! {
                changed = plans.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return Ok(()),
                },
                Some(Err(error)) = tasks.join_next() => if error.is_panic() {
                    return Err(error);
                },
                () = sleep(BEAT_EVERY) => {}
            }
        }
    }
}

fn tend(live: &Arc<LiveUpstream>, tasks: &mut JoinSet<Infallible>) -> Vec<AbortHandle> {
    let mut mine = Vec::new();
    for (index, name) in names::names(live) {
        mine.push(tasks.spawn(look_up(live.clone(), index, name.clone())));
    }
    if let Some(check) = &live.settings.health {
        mine.push(tasks.spawn(check_all(live.clone(), check.clone())));
    }
    if let (true, Some(settings)) = (live.ejects(), live.settings.outlier_detection) {
        mine.push(tasks.spawn(take_back(live.clone(), settings.interval)));
    }
    mine
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
    let mut tasks = JoinSet::new();
    let mut kept: Vec<(Arc<Endpoint>, AbortHandle)> = Vec::new();
    loop {
        changes.borrow_and_update();
        let list = live.list();
        kept.retain(|(endpoint, task)| {
            let stays = list.iter().any(|it| Arc::ptr_eq(it, endpoint));
            if !stays {
                task.abort();
            }
            stays
        });
        for endpoint in list {
            if !kept.iter().any(|(kept, _)| Arc::ptr_eq(kept, &endpoint)) {
                let task = check_on(live.clone(), endpoint.clone(), check.clone());
                kept.push((endpoint, tasks.spawn(task)));
            }
        }
        loop {
            tokio::select! {
                changed = changes.changed() => match changed {
                    Ok(()) => break,
                    // Its sender is held by `live`.
                    Err(_) => std::future::pending().await,
                },
                Some(Err(error)) = tasks.join_next() => if error.is_panic() {
                    std::panic::resume_unwind(error.into_panic());
                },
            }
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
