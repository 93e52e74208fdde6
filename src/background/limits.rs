//! What operators do to shared limits, kept the same at all processes: overrides set at run time, and keys that are reset.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::SILENCE;
use crate::heartbeat::Heartbeat;
use crate::plan::{Plan, SharedAsk};
use crate::store::fleet::{Fleet, FleetConnections};
use crate::store::limits;
use crate::store::limits::overrides::{self, CHANGED, Kept, Reset};
use crate::store::redis::{CallError, Connections, Heard};

/// Between looks at the overrides when no one says that they have changed: what is said may get lost.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Between looks while Redis does not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// For slots to be given back at the end.
const LAST_WITHIN: Duration = Duration::from_secs(1);

/// Follows what operators do, for as long as there is a plan. An error is the panic of its task.
pub async fn follow(
    mut plan: watch::Receiver<Arc<Plan>>,
    fleet: Arc<Fleet>,
    redis: FleetConnections,
    heartbeat: Heartbeat,
) -> Result<(), JoinError> {
    let (changed, mut is_changed) = mpsc::channel(1);
    let channels = vec![fleet.keys.limits_channel()];
    let told = plan.clone();
    let hear = move |heard| match heard {
        Heard::Message(payload) if payload != CHANGED => {
            if let Ok(reset) = serde_json::from_slice(&payload) {
                forget(&told.borrow(), &reset);
            }
        }
        // A look that is due anyway sees it.
        Heard::Message(_) => drop(changed.try_send(())),
        Heard::Listening => {
            // A reset may have gone unheard.
            doubt_slots(&told.borrow());
            let _ = changed.try_send(());
        }
        // They are looked at now and then all the same.
        Heard::Lost => {}
    };
    // It ends with the set.
    let mut listening = JoinSet::new();
    let listens = Heartbeat::default();
    listens.beat();
    listening.spawn({
        let listens = listens.clone();
        let beat = move || listens.beat();
        fleet.rate_limit.clone().listen(channels, hear, beat)
    });
    let mut known = Kept::default();
    let mut trouble = false;
    loop {
        heartbeat.beat_for([&listens], SILENCE);
        let wait = match look(&redis.rate_limit, &fleet, &known).await {
            Ok(kept) => {
                known = kept;
                let plan = plan.borrow_and_update();
                let words = known.words.iter();
                let words = words.map(|it| (&*it.limit, &*it.key, &*it.says));
                plan.counters.replace_overrides(&plan.config.limits, words);
                trouble = false;
                LOOK_EVERY
            }
            Err(error) => {
                if !trouble {
                    warn!(%error, "overrides of limits cannot be read; those known stay");
                    trouble = true;
                }
                LOOK_AGAIN
            }
        };
        tokio::select! {
            () = sleep(wait) => {}
            _ = is_changed.recv() => {}
            // Messages are heard of one node, and each may have lost what it had.
            () = redis.rate_limit.next_connected() => doubt_slots(&plan.borrow()),
            // Words may be of a limit that is new.
            changed = plan.changed() => if changed.is_err() {
                return Ok(());
            },
            Some(Err(error)) = listening.join_next() => return Err(error),
        }
    }
}

/// What is set. A Redis that came back without its data, or without its last writes, is told what is known: else a crash of it would
/// lift what an operator has set.
async fn look(redis: &Connections, fleet: &Fleet, known: &Kept) -> Result<Kept, CallError> {
    let kept = overrides::all(redis, fleet).await?;
    if kept.number >= known.number {
        return Ok(kept);
    }
    let count = known.words.len();
    warn!(
        count,
        "redis has lost overrides of limits; it is told those that are known"
    );
    overrides::put_back(redis, fleet, known).await
}

/// Gives slots of concurrency limits back, at the end of the process: else others have to do without for `hold_ttl`.
pub async fn give_back_slots(plan: &Plan, redis: &Connections) {
    if let Some(shared) = &plan.shared_limits {
        // What is not done by then comes back as after a crash.
        let _ = timeout(LAST_WITHIN, shared.slots.give_back(redis)).await;
    }
}

/// Redis may have lost what it was told of slots in use.
fn doubt_slots(plan: &Plan) {
    if let Some(shared) = &plan.shared_limits {
        shared.slots.doubt_all();
    }
}

/// What is held of a key that an operator has reset.
fn forget(plan: &Plan, reset: &Reset) {
    let mut limits = plan.config.limits.iter();
    let index = limits.position(|limit| limit.name == reset.limit);
    let (Some(index), Some(shared)) = (index, &plan.shared_limits) else {
        return;
    };
    let parts: Vec<_> = reset
        .parts
        .iter()
        .map(|part| Cow::Borrowed(part.as_bytes()))
        .collect();
    let limit = &plan.config.limits[index];
    let set = plan.counters.overrides();
    // An override with another window is another lease.
    let rules = limits::rules(limit, &reset.parts, &set);
    let ask = rules.and_then(|rules| plan.shared_ask(index, &parts, rules, 0));
    match ask {
        Some(SharedAsk::Tokens(ask)) => shared.leases.forget(ask.key),
        Some(SharedAsk::Slots(ask)) => shared.slots.doubt(ask.key),
        None => {}
    }
}
