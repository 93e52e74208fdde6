//! What the log is told of a breaker: each state that it comes to, whoever sees it first.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tracing::{info, warn};

use crate::config::limits::Mode;
use crate::policy::breaker::{Snapshot, State};
use crate::telemetry::log::LogRateLimit;

/// Of one breaker, in ten seconds: the states of two ways round, and of one that flaps no more.
const AT_MOST: u32 = 8;

/// In place of a state, while one is left out.
const BEHIND: u8 = u8::MAX;

/// What was told. Shared by all lanes.
#[derive(Debug)]
pub(super) struct Telling {
    /// The state that was told last, so that no call takes a lock while it is the same.
    last: AtomicU8,
    lines: Mutex<Lines>,
}

#[derive(Debug)]
struct Lines {
    seen: State,
    /// Changes since a state was told.
    changes: u64,
    rate: LogRateLimit,
}

impl Telling {
    /// Nothing is to be said of `state`.
    pub(super) fn from(state: State) -> Telling {
        Telling {
            last: AtomicU8::new(state as u8),
            lines: Mutex::new(Lines {
                seen: state,
                changes: 0,
                rate: LogRateLimit::new(AT_MOST),
            }),
        }
    }

    /// Nothing is to be said of the state that `old` saw last.
    pub(super) fn go_on_from(&self, old: &Telling) {
        let seen = old.lines.lock().seen;
        self.lines.lock().seen = seen;
        self.last.store(seen as u8, Ordering::Relaxed);
    }

    /// Whether a breaker in `state` is to be [told](Self::tell).
    pub(super) fn is_news(&self, state: State) -> bool {
        self.last.load(Ordering::Relaxed) != state as u8
    }

    /// Tells what a look at the breaker shows, if that is news still.
    pub(super) fn tell(
        &self,
        upstream: &str,
        mode: Mode,
        now: Duration,
        look: impl FnOnce() -> Snapshot,
    ) {
        // Whoever has it tells.
        let Some(mut lines) = self.lines.try_lock() else {
            return;
        };
        let shown = look();
        if shown.state != lines.seen {
            lines.seen = shown.state;
            lines.changes += 1;
        }
        let due = lines.changes > 0;
        if due && lines.rate.next(now).is_none() {
            self.last.store(BEHIND, Ordering::Relaxed);
            return;
        }
        let changes = std::mem::take(&mut lines.changes);
        self.last.store(shown.state as u8, Ordering::Relaxed);
        drop(lines);
        if due {
            write(upstream, mode, &shown, changes - 1, now);
        }
    }
}

fn write(upstream: &str, mode: Mode, shown: &Snapshot, left_out: u64, now: Duration) {
    let left_out = (left_out > 0).then_some(left_out);
    let shadow = (mode == Mode::Shadow).then_some(true);
    match shown.state {
        State::Open => {
            let left = shown.open_until.unwrap_or_default().saturating_sub(now);
            let Snapshot {
                calls,
                failures,
                slow,
                ..
            } = shown;
            warn!(upstream, calls, failures, slow, open_for = ?left, shadow, left_out, "breaker is open");
        }
        State::HalfOpen => info!(upstream, shadow, left_out, "breaker is half open"),
        State::Recovering => info!(upstream, shadow, left_out, "breaker is recovering"),
        State::Closed => info!(upstream, shadow, left_out, "breaker is closed"),
        State::ForcedOpen => warn!(upstream, shadow, left_out, "breaker is forced open"),
        State::ForcedClosed => warn!(upstream, shadow, left_out, "breaker is forced closed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_breaker_that_flaps_is_told_of_at_times_and_in_its_last_state_at_the_end() {
        let telling = Telling::from(State::Closed);
        let tell = |state, seconds| {
            let shown = Snapshot {
                state,
                calls: 0,
                failures: 0,
                slow: 0,
                generation: 0,
                open_until: None,
            };
            if telling.is_news(state) {
                telling.tell("a", Mode::Enforce, Duration::from_secs(seconds), || shown);
            }
            (
                telling.last.load(Ordering::Relaxed),
                telling.lines.lock().changes,
            )
        };
        assert_eq!(tell(State::Closed, 1), (State::Closed as u8, 0));
        for _ in 0..AT_MOST / 2 {
            assert_eq!(tell(State::Open, 1), (State::Open as u8, 0));
            assert_eq!(tell(State::HalfOpen, 1), (State::HalfOpen as u8, 0));
        }
        assert_eq!(tell(State::Open, 1), (BEHIND, 1));
        assert_eq!(tell(State::HalfOpen, 2), (BEHIND, 2));
        assert_eq!(tell(State::HalfOpen, 3), (BEHIND, 2));
        // Though no more changes.
        assert_eq!(tell(State::HalfOpen, 11), (State::HalfOpen as u8, 0));
    }
}
