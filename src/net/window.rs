//! How much the other end of HTTP/2 may send of one body before it is taken (RFC 9113 section 5.2). A body has no more bytes than that in a
//! round trip, so it doubles where a body has about as many, and there alone: the bytes of a window are kept where nobody reads them.

use std::cell::Cell;
use std::time::Duration;

use tokio::sync::Notify;

/// No window grows over this: 20 MB/s at a round trip of 100 ms.
pub const MOST: u32 = 2 * 1024 * 1024;
/// Where a round trip is shorter, as in a data center, windows stay as they are.
const FAR: Duration = Duration::from_millis(5);

/// That of each stream of a connection.
#[derive(Debug)]
pub struct Window {
    size: Cell<u32>,
    round_trip: Cell<Option<Duration>>,
    unmeasured: Notify,
    filled: Notify,
}

impl Window {
    /// In bytes.
    pub fn new(size: u32) -> Window {
        Window {
            size: Cell::new(size),
            round_trip: Cell::new(None),
            unmeasured: Notify::new(),
            filled: Notify::new(),
        }
    }

    /// Comes back once it is to be known how long a round trip takes.
    pub async fn unmeasured(&self) {
        self.unmeasured.notified().await;
    }

    /// Of several the least counts: what was on its way before may have held one up.
    pub fn measured(&self, round_trip: Duration) {
        let least = self
            .round_trip
            .get()
            .map_or(round_trip, |it| it.min(round_trip));
        self.round_trip.set(Some(least));
    }

    /// Comes back once a body is held up by it.
    pub async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Doubles it, if `set` can tell the other end.
    pub fn grow(&self, set: impl FnOnce(u32) -> bool) {
        let size = self.size.get().saturating_mul(2).min(MOST);
        if size > self.size.get() && set(size) {
            self.size.set(size);
        }
    }
}

/// How a body comes.
#[derive(Debug, Default)]
pub struct Inflow {
    since: Option<Duration>,
    bytes: u64,
}

impl Inflow {
    /// `bytes` of it were taken, at `now` by a clock that does not go back.
    pub fn took(&mut self, bytes: usize, now: Duration, window: &Window) {
        let since = *self.since.get_or_insert(now);
        self.bytes += bytes as u64;
        let size = window.size.get();
        if size >= MOST || self.bytes < u64::from(size) {
            return;
        }
        match window.round_trip.get() {
            None => window.unmeasured.notify_one(),
            // What is taken is told by halves of a window, each a round trip ahead of what comes for it.
            Some(trip) if trip >= FAR && now.saturating_sub(since) <= trip * 2 => {
                window.filled.notify_one();
                window.unmeasured.notify_one();
            }
            Some(_) => {}
        }
        (self.since, self.bytes) = (Some(now), 0);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const START: u32 = 64 * 1024;
    const MS: Duration = Duration::from_millis(1);

    /// The window behind `count` parts of a body of so many bytes, each so long behind the one before.
    fn after(count: u32, bytes: u32, apart: Duration, round_trip: Duration) -> u32 {
        let window = Window::new(START);
        let mut inflow = Inflow::default();
        for n in 0..count {
            inflow.took(bytes as usize, apart * n, &window);
            if window.unmeasured().now_or_never().is_some() {
                window.measured(round_trip);
            }
            if window.filled().now_or_never().is_some() {
                window.grow(|_| true);
            }
        }
        window.size.get()
    }

    #[test]
    fn a_window_that_holds_a_body_up_doubles() {
        // The first one measures.
        assert_eq!(after(2, START, 100 * MS, 100 * MS), 2 * START);
        // However the bytes are spread over the round trip.
        assert_eq!(after(32, START / 16, 6 * MS, 100 * MS), 2 * START);
        assert_eq!(after(1000, START, MS, 100 * MS), MOST);
    }

    #[test]
    fn a_window_that_holds_nobody_up_stays() {
        assert_eq!(after(100, START / 4, 100 * MS, 100 * MS), START);
        assert_eq!(after(100, START, MS / 10, MS), START);
        assert_eq!(after(1, START, 100 * MS, 100 * MS), START);
    }

    #[test]
    fn a_window_that_cannot_be_told_stays() {
        let window = Window::new(START);
        window.grow(|_| false);
        assert_eq!(window.size.get(), START);
    }
}
