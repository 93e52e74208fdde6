//! What `lua/slots.lua` does, for simulations; `tests/shared/simulation.rs` compares the two.

use std::collections::BTreeMap;
use std::time::Duration;

/// For how long the turn of a process is kept that has no slots.
const LATE: Duration = Duration::from_secs(2);

/// The slots of one key.
#[derive(Debug, Default)]
pub(super) struct Script {
    entries: BTreeMap<usize, Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    count: u64,
    turn: u64,
    until: Duration,
}

/// What a process says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub process: usize,
    pub turn: u64,
    pub held: u64,
    pub want: u64,
    pub needs: u64,
}

impl Script {
    /// The slots that the process has from now on, and those of others.
    pub(super) fn call(
        &mut self,
        call: &Call,
        limit: u64,
        hold_ttl: Duration,
        now: Duration,
    ) -> (u64, u64) {
        let Call {
            process,
            turn,
            held,
            want,
            needs,
        } = *call;
        self.entries
            .retain(|owner, entry| *owner == process || entry.until > now);
        let others = self.entries.iter().filter(|(owner, _)| **owner != process);
        let others = others.map(|(_, entry)| entry.count).sum::<u64>();
        let mine = self.entries.get(&process);
        let (mine, last) = mine.map_or((0, 0), |mine| (mine.count, mine.turn));
        if turn <= last {
            return (mine, others);
        }
        let free = limit.saturating_sub(others);
        let mut count = held.max(want.min(free));
        if count < needs {
            count = held.max(mine.min(free));
        }
        let lasts = match count {
            0 => hold_ttl.min(LATE),
            _ => hold_ttl,
        };
        let until = now + lasts;
        self.entries.insert(process, Entry { count, turn, until });
        (count, others)
    }

    /// What a process has, for as long as nobody else is given it.
    pub(super) fn has(&self, process: usize, now: Duration) -> u64 {
        let entry = self.entries.get(&process);
        entry
            .filter(|entry| entry.until > now)
            .map_or(0, |entry| entry.count)
    }

    /// What all processes have.
    pub(super) fn taken(&self, now: Duration) -> u64 {
        self.entries.keys().map(|owner| self.has(*owner, now)).sum()
    }
}
