//! The slots for probes that a process has of a shared breaker: held ready, in use, and over. Must not ask for any.

use std::time::Duration;

use super::super::Settings;
use super::super::half_open::Slot;

/// Slots of the current generation.
#[derive(Debug, Default)]
pub(super) struct Probes {
    pub(super) ready: Vec<Ready>,
    pub(super) running: Vec<Slot>,
    pub(super) results: Vec<(u64, bool)>,
    /// Of calls whose results go to the member before this one.
    pub(super) orphans: Vec<Slot>,
}

#[derive(Debug)]
pub(super) struct Ready {
    pub(super) id: u64,
    pub(super) since: Duration,
    pub(super) usable_until: Duration,
}

impl Probes {
    pub(super) fn start(&mut self, now: Duration) -> Option<u64> {
        self.ready.retain(|ready| now < ready.usable_until);
        let Ready { id, .. } = self.ready.pop()?;
        self.running.push(Slot::new(id, now));
        Some(id)
    }

    /// Whether the probe held a slot until now.
    pub(super) fn end(&mut self, id: u64) -> bool {
        let found = self.running.iter().position(|running| running.id == id);
        if let Some(index) = found {
            self.running.swap_remove(index);
        }
        found.is_some()
    }

    /// Ends probes that have had their time.
    pub(super) fn expire(&mut self, settings: &Settings, now: Duration) {
        let lives = |slot: &Slot| now < slot.ends(&settings.half_open);
        self.ready.retain(|ready| now < ready.usable_until);
        let over = self.running.iter().filter(|running| !lives(running));
        let results = over.filter_map(|running| Some((running.id, running.says()?.is_well())));
        self.results.extend(results);
        self.running.retain(lives);
        self.orphans.retain(lives);
    }

    pub(super) fn held(&self) -> Vec<u64> {
        let ready = self.ready.iter().map(|ready| ready.id);
        let running = self.running.iter().chain(&self.orphans);
        ready.chain(running.map(|running| running.id)).collect()
    }
}
