//! What sessions need beside the lanes, so that no request ever waits for it. In memory those that are over are let go, a few
//! at a time. In Redis users go by themselves, and one process of all sweeps what is over of those that stay; uses are written
//! down, and what is pushed is heard.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use crate::admin::health::Heartbeat;
use crate::clock;
use crate::config::Config;
use crate::plan::Plan;
use crate::store::fleet::Fleet;
use crate::store::redis::{CallError, Connections, Heard};
use crate::store::sessions::{Store, Sweeper, Swept};
use crate::telemetry::metrics::{Metrics, SweepMetrics};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// Looks for all sessions to be seen once.
const LOOKS: usize = 60;
/// Sessions looked at each time, at least.
const LEAST: usize = 1_000;
/// For the last uses to be written down.
const LAST_WITHIN: Duration = Duration::from_secs(1);
/// Between two looks for uses to write down, at least and at most.
const WRITE_EVERY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

/// Between two steps over sessions in Redis, and at least as long as the step took: half of a node's time at most.
const STEP_APART: Duration = Duration::from_millis(1);
/// Beside two sweeps, before another process sweeps in place of one that is gone.
const LEASE_MORE: Duration = Duration::from_secs(5);
/// Between beats while a sweep is not due.
const BEAT_EVERY: Duration = Duration::from_secs(5);

/// What is swept of sessions in Redis.
#[derive(Debug)]
pub struct SharedSweep {
    /// Of `redis.sessions`, on the runtime of the task.
    pub redis: Arc<Connections>,
    pub sweeper: Sweeper,
    /// Each entry of `sessions`, and what is told of it.
    pub entries: Vec<(String, SweepMetrics)>,
    /// Between two sweeps.
    pub every: Duration,
}

impl SharedSweep {
    pub fn new(
        config: &Config,
        fleet: &Fleet,
        redis: Arc<Connections>,
        metrics: &Metrics,
    ) -> SharedSweep {
        let entries = config.sessions.iter().map(|entry| &entry.name);
        SharedSweep {
            redis,
            sweeper: Sweeper::new(fleet),
            entries: entries
                .map(|name| (name.clone(), metrics.session_sweep(name)))
                .collect(),
            every: config.worker.session_sweep,
        }
    }

    /// Sweeps for ever, while no other process does.
    pub async fn run(self: Arc<Self>, heartbeat: Heartbeat) -> Infallible {
        let mut trouble = false;
        loop {
            let swept = self.sweep(&heartbeat).await;
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

    async fn sweep(&self, heartbeat: &Heartbeat) -> Result<(), CallError> {
        let holds = 2 * self.every + LEASE_MORE;
        let mut asked = Instant::now();
        if !self.sweeper.is_mine(&self.redis, holds).await? {
            self.leave();
            return Ok(());
        }
        for (name, metrics) in &self.entries {
            let (mut all, mut place) = (Swept::default(), None);
            loop {
                heartbeat.beat();
                let began = Instant::now();
                let (swept, next) = self.sweeper.step(&self.redis, name, place.as_ref()).await?;
                metrics.swept.inc_by(swept.removed);
                all.live += swept.live;
                all.users += swept.users;
                place = next;
                if place.is_none() {
                    break;
                }
                sleep(began.elapsed().max(STEP_APART)).await;
                // A long sweep stays this process's.
                if asked.elapsed() > holds / 4 {
                    asked = Instant::now();
                    if !self.sweeper.is_mine(&self.redis, holds).await? {
                        // Another has begun one of its own meanwhile.
                        self.leave();
                        return Ok(());
                    }
                }
            }
            tell(metrics, all);
        }
        Ok(())
    }

    /// Leaves the sweep to another process: what that one tells counts, and no sum counts twice.
    fn leave(&self) {
        self.entries
            .iter()
            .for_each(|(_, metrics)| tell(metrics, Swept::default()));
    }
}

fn tell(metrics: &SweepMetrics, swept: Swept) {
    let gauge = |count| i64::try_from(count).unwrap_or(i64::MAX);
    metrics.live.set(gauge(swept.live));
    metrics.users.set(gauge(swept.users));
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
        let (least, most) = WRITE_EVERY;
        sleep(every.min().unwrap_or(most).clamp(least, most)).await;
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
    let heard = move |heard: Heard| match heard {
        Heard::Listening => hearing.begin(),
        Heard::Message { payload, .. } => {
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
