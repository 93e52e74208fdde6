//! What sessions need beside the lanes, so that no request ever waits for it. In memory those that are over are let go, a few
//! at a time. In Redis users go by themselves, and one process of all sweeps what is over of those that stay; uses are written
//! down, and what is pushed is heard.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use crate::clock;
use crate::heartbeat::Heartbeat;
use crate::plan::Plan;
use crate::store::fleet::FleetConnections;
use crate::store::redis::{CallError, Connections, Heard};
use crate::store::sessions::{Store, Sweeper, Swept};
use crate::telemetry::metrics::sessions::SweepMetrics;
use crate::telemetry::metrics::{Metrics, whole};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// Looks for all sessions to be seen once.
const LOOKS: usize = 60;
/// Sessions looked at each time, at least.
const LEAST: usize = 1_000;
/// For the last uses to be written down.
const LAST_WITHIN: Duration = Duration::from_secs(1);
/// Between two looks for uses to write down, at least.
const WRITE_AGAIN: Duration = Duration::from_millis(5);
/// Likewise, at most.
const WRITE_EVERY: Duration = Duration::from_millis(500);

/// Between two steps over sessions in Redis, and at least as long as the step took: half of a node's time at most.
const STEP_APART: Duration = Duration::from_millis(1);
/// Beside two sweeps, before another process sweeps in place of one that is gone.
const LEASE_MORE: Duration = Duration::from_secs(5);
/// Between beats while a sweep is not due.
const BEAT_EVERY: Duration = Duration::from_secs(5);

/// What is swept of sessions in Redis.
pub(super) struct SharedSweep {
    /// Of `redis.sessions`, on the runtime of the task.
    redis: Arc<Connections>,
    sweeper: Sweeper,
    /// Has the entries of `sessions`, as a sweep begins: a reload may bring others.
    plan: watch::Receiver<Arc<Plan>>,
    metrics: Arc<Metrics>,
    /// Between two sweeps.
    every: Duration,
}

/// What is known from one sweep to the next.
#[derive(Default)]
struct Sweeping {
    /// Each entry of the last sweep, and what is told of it.
    told: BTreeMap<String, SweepMetrics>,
    /// From then on another process may sweep, unless this one is heard of before.
    mine_until: Option<Instant>,
}

impl SharedSweep {
    /// `None` where the plan has no fleet.
    pub(super) fn new(
        plan: watch::Receiver<Arc<Plan>>,
        redis: &FleetConnections,
    ) -> Option<SharedSweep> {
        let first = plan.borrow().clone();
        Some(SharedSweep {
            redis: redis.sessions.clone(),
            sweeper: Sweeper::new(first.fleet.as_ref()?),
            plan,
            metrics: first.metrics.clone(),
            every: first.config.worker.session_sweep,
        })
    }

    /// Sweeps for ever, while no other process does.
    pub(super) async fn run(self: Arc<Self>, heartbeat: Heartbeat) -> Infallible {
        let mut trouble = false;
        let mut sweeping = Sweeping::default();
        loop {
            let swept = self.sweep(&mut sweeping, &heartbeat).await;
            if let (Err(error), false) = (&swept, trouble) {
                warn!(%error, "sessions in redis cannot be swept");
            }
            trouble = swept.is_err();
            let due = Instant::now() + self.every;
            while let Some(wait) = due.checked_duration_since(Instant::now())
                && !wait.is_zero()
            {
                heartbeat.beat();
                sleep(wait.min(BEAT_EVERY)).await;
            }
        }
    }

    /// Of all nodes that answer; an error is the last one's that does not.
    async fn sweep(&self, sweeping: &mut Sweeping, heartbeat: &Heartbeat) -> Result<(), CallError> {
        let plan = self.plan.borrow().clone();
        let names: Vec<_> = plan.sessions.iter().map(|it| it.name.clone()).collect();
        drop(plan);
        for name in &names {
            if !sweeping.told.contains_key(name) {
                let metrics = self.metrics.sessions.sweep(name);
                sweeping.told.insert(name.clone(), metrics);
            }
        }
        sweeping.told.retain(|name, _| {
            let stays = names.contains(name);
            if !stays {
                self.metrics.sessions.forget_swept(name);
            }
            stays
        });
        let mut asked = Instant::now();
        if !self.claim(sweeping).await? {
            return Ok(());
        }
        let mut trouble = Ok(());
        for name in &names {
            let (mut all, mut place, mut whole) = (Swept::default(), None, true);
            loop {
                heartbeat.beat();
                let began = Instant::now();
                let step = self.sweeper.step(&self.redis, name, place.as_ref()).await;
                let metrics = &sweeping.told[name];
                place = match step {
                    Ok((swept, next)) => {
                        metrics.swept.inc_by(swept.removed);
                        all.live += swept.live;
                        all.users += swept.users;
                        next
                    }
                    // The other nodes have sessions, too.
                    Err(error) => {
                        (trouble, whole) = (Err(error), false);
                        self.redis.scan_past(place.as_ref())
                    }
                };
                if place.is_none() {
                    break;
                }
                sleep(began.elapsed().max(STEP_APART)).await;
                // A long sweep stays this process's.
                if asked.elapsed() > self.holds() / 4 {
                    asked = Instant::now();
                    if !self.claim(sweeping).await? {
                        // Another has begun one of its own meanwhile.
                        return Ok(());
                    }
                }
            }
            if whole {
                tell(&sweeping.told[name], all);
            }
        }
        trouble
    }

    fn holds(&self) -> Duration {
        2 * self.every + LEASE_MORE
    }

    /// Asks to be the process that sweeps; whether it is. Where another does, or may, what that one tells counts, and no sum counts twice.
    async fn claim(&self, sweeping: &mut Sweeping) -> Result<bool, CallError> {
        let asked = Instant::now();
        let mine = self.sweeper.claim(&self.redis, self.holds()).await;
        if mine == Ok(true) {
            sweeping.mine_until = Some(asked + self.holds());
        } else if mine.is_ok() || sweeping.mine_until.is_none_or(|until| asked >= until) {
            let told = sweeping.told.values();
            told.for_each(|metrics| tell(metrics, Swept::default()));
        }
        mine
    }
}

fn tell(metrics: &SweepMetrics, swept: Swept) {
    metrics.live.set(whole(swept.live));
    metrics.users.set(whole(swept.users));
}

/// Sweeps sessions in memory for ever.
pub async fn sweep(plan: watch::Receiver<Arc<Plan>>, heartbeat: Heartbeat) -> Infallible {
    loop {
        heartbeat.beat();
        sleep(EVERY).await;
        let plan = plan.borrow().clone();
        for live in &plan.sessions {
            let Store::Memory(store) = &live.store else {
                continue;
            };
            let budget = (store.count() / LOOKS).max(LEAST);
            let expired = store.sweep(clock::moment().mono, budget);
            live.metrics.expired.inc_by(expired as u64);
        }
    }
}

/// Writes down uses of sessions in Redis for ever, each before the session would be over without.
pub async fn write_uses(
    plan: watch::Receiver<Arc<Plan>>,
    redis: Arc<Connections>,
    heartbeat: Heartbeat,
) -> Infallible {
    loop {
        heartbeat.beat();
        let plan = plan.borrow().clone();
        let every = plan.sessions.iter().map(|live| {
            let wait = live.shared.touch_every.min(live.settings.idle_timeout / 2);
            wait / 4
        });
        let every = every.min().unwrap_or(WRITE_EVERY);
        sleep(every.clamp(WRITE_AGAIN, WRITE_EVERY)).await;
        write_uses_until(&plan, &redis, clock::mono()).await;
    }
}

/// Writes down all uses that are still to be, at the end of the process.
pub async fn write_last_uses(plan: &Plan, redis: &Arc<Connections>) {
    // What is not done by then is as lost as by a crash.
    let _ = timeout(LAST_WITHIN, write_uses_until(plan, redis, Duration::MAX)).await;
}

async fn write_uses_until(plan: &Plan, redis: &Arc<Connections>, until: Duration) {
    for live in &plan.sessions {
        if let Store::Redis(store) = &live.store {
            store.write_uses(&live.shared, redis, until).await;
        }
    }
}

/// Hears for ever which sessions in Redis have ended, and lets go of them in this process.
pub async fn hear(plan: watch::Receiver<Arc<Plan>>, heartbeat: Heartbeat) -> Infallible {
    let Some(fleet) = plan.borrow().fleet.clone() else {
        return pending().await;
    };
    let channels = vec![fleet.keys.sessions_ended()];
    let hearing = fleet.hears_sessions.clone();
    // Not yet, if the task was begun anew.
    hearing.end();
    let heard = move |heard: Heard| match heard {
        Heard::Listening => hearing.begin(),
        Heard::Message(payload) => {
            let Ok(message) = std::str::from_utf8(&payload) else {
                return;
            };
            let plan = plan.borrow().clone();
            for live in &plan.sessions {
                if let Store::Redis(store) = &live.store {
                    store.heard(message, &live.watchers);
                }
            }
        }
        Heard::Lost => hearing.end(),
    };
    let beat = move || heartbeat.beat();
    fleet.sessions.clone().listen(channels, heard, beat).await
}
