//! What is done for endpoints beside the lanes: names are looked up again, endpoints asked how they are, and ejected ones taken back.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::admin::health::Heartbeat;
use crate::clock;
use crate::config::upstreams::{DnsName, HealthCheck, Source};
use crate::plan::Plan;
use crate::upstream::resolve::resolve;
use crate::upstream::{Endpoint, Endpoints, probe};

/// Between beats.
const BEAT_EVERY: Duration = Duration::from_secs(10);
/// The shortest wait that the TTL of an answer makes, and the first one behind a failure.
const SOONEST: Duration = Duration::from_secs(1);
/// By so much more or less a check is put off, as a share, so that those of many processes do not come together.
const JITTER: f64 = 0.1;

/// Tends the endpoints of each plan, as long as there are plans. An error is the panic of one of its tasks.
pub async fn follow(
    mut plans: watch::Receiver<Arc<Plan>>,
    heartbeat: Heartbeat,
) -> Result<(), JoinError> {
    // They end with the set.
    let mut tasks = JoinSet::new();
    let mut kept: Vec<(Arc<Endpoints>, Vec<AbortHandle>)> = Vec::new();
    loop {
        let plan = plans.borrow_and_update().clone();
        kept.retain(|(endpoints, tasks)| {
            let stays = plan.upstreams.iter().any(|it| Arc::ptr_eq(it, endpoints));
            if !stays {
                tasks.iter().for_each(AbortHandle::abort);
            }
            stays
        });
        for endpoints in plan.upstreams.iter().filter(|it| it.wants_care()) {
            if !kept.iter().any(|(kept, _)| Arc::ptr_eq(kept, endpoints)) {
                kept.push((endpoints.clone(), tend(endpoints, &mut tasks)));
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

/// Waits until every name was looked up, so that a process does not begin by refusing; but not for ever.
pub async fn known(plan: &Plan, within: Duration) {
    let all = async {
        while !plan.upstreams.iter().all(|it| it.was_tried()) {
            sleep(Duration::from_millis(2)).await;
        }
    };
    // Not in time, requests get 503 until it is.
    let _ = timeout(within, all).await;
}

fn tend(endpoints: &Arc<Endpoints>, tasks: &mut JoinSet<Infallible>) -> Vec<AbortHandle> {
    let mut mine = Vec::new();
    for (index, source) in endpoints.settings.endpoints.iter().enumerate() {
        match source {
            Source::Fixed(_) => {}
            Source::Dns(name) => {
                mine.push(tasks.spawn(look_up(endpoints.clone(), index, name.clone())));
            }
        }
    }
    if let Some(check) = &endpoints.settings.health {
        mine.push(tasks.spawn(check_all(endpoints.clone(), check.clone())));
    }
    if let (true, Some(settings)) = (endpoints.judges(), endpoints.settings.outlier_detection) {
        mine.push(tasks.spawn(take_back(endpoints.clone(), settings.interval)));
    }
    mine
}

/// Looks a name up again and again; while that fails, its last addresses stay.
async fn look_up(endpoints: Arc<Endpoints>, source: usize, name: DnsName) -> Infallible {
    let (upstream, refresh) = (&endpoints.settings.name, name.refresh);
    let mut failures = 0u32;
    loop {
        let wait = match resolve(&name).await {
            Ok(found) => {
                endpoints.metrics.resolved.inc();
                if failures > 0 {
                    info!(%upstream, name = name.name, "name is found again");
                }
                failures = 0;
                let count = found.addresses.len();
                if endpoints.found(source, Some(found.addresses)) {
                    info!(%upstream, name = name.name, addresses = count, "endpoints have changed");
                }
                found.holds_for.max(SOONEST).min(refresh)
            }
            Err(error) => {
                endpoints.metrics.unresolved.inc();
                endpoints.found(source, None);
                // The first of a row alone: the rest is in the metric.
                if failures == 0 {
                    warn!(%upstream, name = name.name, %error, "name cannot be looked up; its last addresses stay");
                }
                failures = failures.saturating_add(1);
                let longer = 1 << (failures - 1).min(16);
                SOONEST.saturating_mul(longer).min(refresh)
            }
        };
        sleep(wait).await;
    }
}

/// Checks each endpoint there is, each by a task of its own, so that none waits for another.
async fn check_all(endpoints: Arc<Endpoints>, check: HealthCheck) -> Infallible {
    let mut changes = endpoints.changes();
    let mut tasks = JoinSet::new();
    let mut kept: Vec<(Arc<Endpoint>, AbortHandle)> = Vec::new();
    loop {
        changes.borrow_and_update();
        let list = endpoints.list();
        kept.retain(|(endpoint, task)| {
            let stays = list.iter().any(|it| Arc::ptr_eq(it, endpoint));
            if !stays {
                task.abort();
            }
            stays
        });
        for endpoint in list {
            if !kept.iter().any(|(kept, _)| Arc::ptr_eq(kept, &endpoint)) {
                let task = check_on(endpoints.clone(), endpoint.clone(), check.clone());
                kept.push((endpoint, tasks.spawn(task)));
            }
        }
        loop {
            tokio::select! {
                changed = changes.changed() => match changed {
                    Ok(()) => break,
                    // Its sender is held by `endpoints`.
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
    endpoints: Arc<Endpoints>,
    endpoint: Arc<Endpoint>,
    check: HealthCheck,
) -> Infallible {
    loop {
        let passed = probe::passes(&endpoint, &check).await;
        endpoints.checked(&endpoint, passed);
        let share = 1.0 + JITTER * (2.0 * fastrand::f64() - 1.0);
        sleep(check.interval.mul_f64(share)).await;
    }
}

async fn take_back(endpoints: Arc<Endpoints>, interval: Duration) -> Infallible {
    loop {
        sleep(interval).await;
        endpoints.look(clock::mono());
    }
}
