//! Whether lanes and tasks go on: when each last said so. Must not know who asks, or what follows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock;

/// When a lane or a task last said that it goes on, in milliseconds of the process's clock.
#[derive(Debug, Clone, Default)]
pub struct Heartbeat(Arc<AtomicU64>);

impl Heartbeat {
    /// It goes on, now.
    pub fn beat(&self) {
        self.0.store(millis(), Ordering::Relaxed);
    }

    /// Beats for a task of several parts, unless one of them was silent for longer than `bound`.
    pub fn beat_for<'a>(&self, parts: impl IntoIterator<Item = &'a Heartbeat>, bound: Duration) {
        if parts.into_iter().all(|part| part.age() <= bound) {
            self.beat();
        }
    }

    /// No beat is expected before the next one.
    pub fn rest(&self) {
        self.0.store(u64::MAX, Ordering::Relaxed);
    }

    /// Since the last beat; nothing while it rests.
    pub fn age(&self) -> Duration {
        Duration::from_millis(millis().saturating_sub(self.0.load(Ordering::Relaxed)))
    }
}

/// A supervised task by whose silence it is told whether it is stuck.
#[derive(Debug, Clone)]
pub struct Watched {
    pub name: &'static str,
    pub heartbeat: Heartbeat,
    /// The longest that it may be silent.
    pub bound: Duration,
}

impl Watched {
    /// Whether it has been silent for longer than it may.
    pub fn is_stuck(&self) -> bool {
        self.heartbeat.age() > self.bound
    }
}

fn millis() -> u64 {
    clock::millis(clock::mono())
}
