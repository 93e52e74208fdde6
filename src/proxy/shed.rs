//! What a lane refuses while the process has more to do than it can: how late the lane is and what memory is used, measured each tick.
//! Owns when it is measured, and what share is refused then; must not know requests.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::lane::Lane;
use crate::clock;
use crate::config::runtime::{MemoryBound, Shed};
use crate::memory;
use crate::policy::shed::{Lateness, Strain, of_memory};

/// Between two looks at how late the lane is. What waits for the loop waits behind all that is ready, as the tick does.
const TICK: Duration = Duration::from_millis(20);
/// Between looks at memory, which costs some tens of microseconds; Envoy's overload manager looks as often.
const MEMORY_EVERY: Duration = Duration::from_millis(250);
/// Between looks at what the control group allows, which seldom changes.
const LIMIT_EVERY: Duration = Duration::from_secs(10);
/// Between looks at whether there is something to measure.
const IDLE: Duration = Duration::from_secs(1);
/// Nothing was refused for so long: it is over.
const OVER_AFTER: Duration = Duration::from_secs(10);

/// What a lane's requests are refused by; all they read.
#[derive(Debug, Default)]
pub(super) struct Shedding {
    share: Cell<f64>,
    strain: Cell<Option<Strain>>,
}

impl Shedding {
    /// Why the next request is to be refused, where it is. Each one has the same chance.
    pub(super) fn refuses(&self) -> Option<Strain> {
        let strain = self.strain.get()?;
        (fastrand::f64() < self.share.get()).then_some(strain)
    }

    /// By the larger of two shares.
    fn set(&self, late: f64, memory: f64) {
        let (share, strain) = match late >= memory {
            true => (late, Strain::LoopDelay),
            false => (memory, Strain::Memory),
        };
        self.share.set(share);
        self.strain.set((share > 0.0).then_some(strain));
    }
}

/// Measures for ever what the plan asks for.
pub(super) async fn watch(lane: Rc<Lane>) {
    let mut lateness = Lateness::default();
    let mut memory = Memory::default();
    let mut told = Told::default();
    loop {
        let shed = lane.following.current().plan.config.shed;
        let Shed { loop_delay, .. } = shed;
        let pause = match (loop_delay, shed.memory) {
            (Some(_), _) => TICK,
            (None, Some(_)) => MEMORY_EVERY,
            (None, None) => IDLE,
        };
        let due = Instant::now() + pause;
        sleep_until(due).await;
        let (late, now) = (due.elapsed(), clock::mono());
        match loop_delay {
            Some(target) => {
                if let Some(least) = lateness.tick(late, target, now) {
                    let metrics = &lane.following.current().plan.metrics;
                    metrics.connections.lane_delays.observe(least);
                }
            }
            None => lateness = Lateness::default(),
        }
        let of_memory = memory.look(shed.memory, now);
        lane.shed.set(lateness.share(), of_memory);
        told.tell(&lane.shed, now);
    }
}

/// What memory was at the last look.
#[derive(Debug, Default)]
struct Memory {
    share: f64,
    looked: Option<Duration>,
    limit: Option<u64>,
    limit_looked: Option<Duration>,
}

impl Memory {
    /// The share to refuse, as of now or a moment ago.
    fn look(&mut self, bound: Option<MemoryBound>, now: Duration) -> f64 {
        let Some(bound) = bound else {
            *self = Memory::default();
            return 0.0;
        };
        if is_due(&mut self.looked, MEMORY_EVERY, now) {
            let bound = match bound {
                MemoryBound::Bytes(bytes) => Some(bytes),
                MemoryBound::Share(share) => {
                    if is_due(&mut self.limit_looked, LIMIT_EVERY, now) {
                        self.limit = memory::limit_bytes();
                    }
                    self.limit.map(|limit| (limit as f64 * share) as u64)
                }
            };
            let used = memory::resident_bytes().zip(bound);
            self.share = used.map_or(0.0, |(used, bound)| of_memory(used, bound));
        }
        self.share
    }
}

fn is_due(last: &mut Option<Duration>, every: Duration, now: Duration) -> bool {
    let due = last.is_none_or(|last| now.saturating_sub(last) >= every);
    if due {
        *last = Some(now);
    }
    due
}

/// What the log was told: the beginning and the end of a lane's trouble, not each turn of it.
#[derive(Debug, Default)]
struct Told {
    /// When requests were to be refused last, once that was told.
    refused: Option<Duration>,
}

impl Told {
    fn tell(&mut self, shed: &Shedding, now: Duration) {
        match (shed.strain.get(), self.refused) {
            (Some(strain), before) => {
                if before.is_none() {
                    warn!(
                        by = strain.name(),
                        "overloaded: this lane refuses a part of its requests"
                    );
                }
                self.refused = Some(now);
            }
            (None, Some(last)) if now.saturating_sub(last) >= OVER_AFTER => {
                info!("no longer overloaded");
                self.refused = None;
            }
            (None, _) => {}
        }
    }
}
