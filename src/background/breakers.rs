//! Keeps this process's shared breakers in step with Redis: a task for each, so that none waits for another's node; and one
//! that hears of transitions.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinError;
use tokio::time::{interval, sleep, timeout};
use tracing::{info, warn};

use super::SILENCE;
use super::tasks_of::TasksOf;
use crate::clock;
use crate::heartbeat::Heartbeat;
use crate::plan::Plan;
use crate::policy::breaker::shared::Change;
use crate::store::breakers::LiveBreaker;
use crate::store::breakers::shared;
use crate::store::fleet::Fleet;
use crate::store::redis::{Connections, Heard};

/// Between two reports of one breaker, however urgent: what comes meanwhile goes together.
const APART: Duration = Duration::from_millis(5);

/// Between looks at the tasks' hearts.
const HEARTS_EVERY: Duration = Duration::from_secs(1);

/// Keeps the breakers of each plan in step, as long as there are plans. An error is the panic of one of its tasks. Beats while none
/// of them is silent.
pub async fn follow(
    mut plans: watch::Receiver<Arc<Plan>>,
    fleet: Arc<Fleet>,
    redis: Arc<Connections>,
    heartbeat: Heartbeat,
) -> Result<(), JoinError> {
    let channel = fleet.keys.breakers_changed();
    let mut tasks = TasksOf::new();
    let listens = Heartbeat::default();
    listens.beat();
    tasks.spawn(listen(
        fleet.clone(),
        channel,
        plans.clone(),
        listens.clone(),
    ));
    let mut look = interval(HEARTS_EVERY);
    loop {
        let plan = plans.borrow_and_update().clone();
        let wanted: Vec<_> = shared(&plan).cloned().collect();
        tasks.follow(&wanted, |breaker, tasks| {
            let heart = Heartbeat::default();
            heart.beat();
            let (breaker, fleet, redis) = (breaker.clone(), fleet.clone(), redis.clone());
            tasks.spawn(keep(breaker, fleet, redis, heart.clone()));
            heart
        });
        loop {
            tokio::select! {
                _ = look.tick() => {
                    heartbeat.beat_for(tasks.notes().chain([&listens]), SILENCE);
                }
                changed = plans.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return Ok(()),
                },
                error = tasks.panicked() => return Err(error),
            }
        }
    }
}

/// Waits until the state of every shared breaker was asked for, so that a process does not begin with all closed; but not for
/// ever.
pub async fn first_look(plan: &Plan, within: Duration) {
    let all = async {
        let untried =
            |breaker: &Arc<LiveBreaker>| breaker.sharing().is_some_and(|it| !it.was_tried());
        while shared(plan).any(untried) {
            sleep(Duration::from_millis(2)).await;
        }
    };
    // Not in time, each goes on by itself, as when Redis is lost.
    let _ = timeout(within, all).await;
}

fn shared(plan: &Plan) -> impl Iterator<Item = &Arc<LiveBreaker>> {
    plan.breakers()
        .filter(|breaker| breaker.sharing().is_some())
}

async fn keep(
    breaker: Arc<LiveBreaker>,
    fleet: Arc<Fleet>,
    redis: Arc<Connections>,
    heart: Heartbeat,
) -> Infallible {
    let upstream = &breaker.upstream;
    loop {
        heart.beat();
        let Some(sharing) = breaker.sharing() else {
            return std::future::pending().await;
        };
        match breaker.sync(sharing, &redis, &fleet.process).await {
            Some(Change::Joined) => info!(%upstream, "breaker goes by the shared state"),
            Some(Change::Lost) => {
                warn!(%upstream, "breaker goes on by itself: redis does not answer, or refuses");
            }
            None => {}
        }
        sleep(APART).await;
        let due = breaker.with_member(|member| member.report_in(clock::mono()));
        // The wait ends by time or by a wake.
        let _ = timeout(due.unwrap_or_default(), sharing.wake.notified()).await;
    }
}

async fn listen(
    fleet: Arc<Fleet>,
    channel: String,
    plans: watch::Receiver<Arc<Plan>>,
    heart: Heartbeat,
) -> Infallible {
    let redis = fleet.main.clone();
    let hear = move |heard| {
        let plan = plans.borrow().clone();
        match heard {
            // What was said before is asked for.
            Heard::Listening => shared(&plan).filter_map(|it| it.sharing()).for_each(|it| {
                it.wake.notify_one();
            }),
            Heard::Message(payload) => {
                let Some((tag, word)) = shared::message(&payload) else {
                    return;
                };
                let same = |it: &&Arc<LiveBreaker>| it.sharing().is_some_and(|it| it.tag() == tag);
                shared(&plan).filter(same).for_each(|it| it.heard(word));
            }
            // Reports are answered all the same.
            Heard::Lost => {}
        }
    };
    let beat = move || heart.beat();
    redis.listen(vec![channel], hear, beat).await
}
