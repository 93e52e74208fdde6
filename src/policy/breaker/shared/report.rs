//! What a process and the script of a shared breaker tell each other.

use std::time::Duration;

use super::super::State;
use super::super::window::Call;

/// The shared state as it is told, in a reply or a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    pub generation: u64,
    pub state: State,
    /// Until an opening or a ramp ends; else zero. Not a time, since clocks differ.
    pub left: Duration,
}

/// Results that are new since the last report, all of one generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Delta {
    pub calls: u64,
    pub failures: u64,
    pub slow: u64,
    /// Failures since the last success, or since the delta began.
    pub trailing: u64,
    pub succeeded: bool,
}

/// What the process tells the script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The state last heard of; the delta and the probes are of its generation.
    pub known: Word,
    pub delta: Delta,
    /// The failures or slow calls of its own for which this process doubts the upstream: it counts for the quorum. 0: it does not.
    pub doubts: u64,
    /// Slots for probes.
    pub want: u32,
    /// Whether requests ask for them, rather than might.
    pub demanded: bool,
    /// Slots in use or held ready. Those that the process has and that are not here are free again.
    pub held: Vec<u64>,
    /// The last slot that it has heard of: later ones may be on the way to it.
    pub last_slot: u64,
    /// Probes that have ended, and whether well.
    pub results: Vec<(u64, bool)>,
    /// Processes that it takes for alive, those among them that Redis has not heard yet since it was away.
    pub peers: u64,
}

/// What the script answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub word: Word,
    /// Of the fleet's window.
    pub calls: u64,
    pub failures: u64,
    pub slow: u64,
    /// Processes that share the breaker, and those of them that doubt the upstream.
    pub processes: u64,
    pub doubters: u64,
    /// Whether another process wants slots and there are none.
    pub recall: bool,
    /// Whether this one has got fewer than requests ask for.
    pub starved: bool,
    /// The last slot that was given, to whomever.
    pub last_slot: u64,
    /// New slots.
    pub probes: Vec<u64>,
}

/// That the process began or ceased to go by the shared state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Joined,
    Lost,
}

impl Delta {
    pub(super) fn add(&mut self, call: Call) {
        self.calls += 1;
        self.failures += u64::from(call.failed);
        self.slow += u64::from(call.slow);
        if call.failed {
            self.trailing += 1;
        } else {
            (self.trailing, self.succeeded) = (0, true);
        }
    }

    /// Both, where `later` came after.
    pub(super) fn then(self, later: Delta) -> Delta {
        Delta {
            calls: self.calls + later.calls,
            failures: self.failures + later.failures,
            slow: self.slow + later.slow,
            trailing: match later.succeeded {
                true => later.trailing,
                false => self.trailing + later.trailing,
            },
            succeeded: self.succeeded || later.succeeded,
        }
    }
}
