//! What sessions need beside the lanes, so that no request ever waits for it. In memory those that are over are let go, a few
//! at a time. In Redis they go by themselves; uses are written down, and what is pushed is heard.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::clock;
use crate::plan::Plan;
use crate::store::redis::{Connections, Heard};
use crate::store::sessions::{LiveSessions, SharedSessions, Store};

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

/// Sweeps for ever.
pub async fn sweep(plan: watch::Receiver<Arc<Plan>>) {
    loop {
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
pub async fn write_uses(plan: watch::Receiver<Arc<Plan>>, redis: Arc<Connections>) {
    loop {
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
pub async fn hear(plan: watch::Receiver<Arc<Plan>>) -> Infallible {
    let Some(fleet) = plan.borrow().fleet.clone() else {
        return pending().await;
    };
    let channels = vec![fleet.keys.sessions_ended()];
    let heard = move |heard: Heard| {
        let plan = plan.borrow().clone();
        let each = |what: &dyn Fn(&LiveSessions, &SharedSessions)| {
            for live in &plan.sessions {
                if let Store::Redis(store) = &live.store {
                    what(live, store);
                }
            }
        };
        match heard {
            Heard::Listening => each(&|_, store| store.doubt()),
            Heard::Message { payload, .. } => {
                if let Ok(message) = std::str::from_utf8(&payload) {
                    each(&|live, store| store.heard(message, &live.watchers));
                }
            }
        }
    };
    fleet.sessions.clone().listen(channels, heard).await
}
