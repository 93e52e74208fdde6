//! How many requests an upstream takes at a time, learnt from those that were answered. Owns the windows that
//! [`policy::gradient`](crate::policy::gradient) learns from.

use std::time::Duration;

use parking_lot::Mutex;

use crate::policy::gradient::{Gradient, Range, Window};

/// How long a window is, at least; it ends with an answer.
const WINDOW: Duration = Duration::from_millis(100);
/// Answers of a window, at least: fewer say little of an average.
const FEWEST: u32 = 10;

/// What is learnt of one upstream, by all lanes together. The lock is held for tens of nanoseconds, once a request.
#[derive(Debug)]
pub(super) struct Learnt(Mutex<Learning>);

#[derive(Debug)]
struct Learning {
    gradient: Gradient,
    since: Duration,
    window: Window,
}

impl Learnt {
    pub(super) fn new(range: Range) -> Learnt {
        Learnt(Mutex::new(Learning {
            gradient: Gradient::new(range),
            since: Duration::ZERO,
            window: Window::default(),
        }))
    }

    /// How many may be under way.
    pub(super) fn bound(&self) -> u32 {
        self.0.lock().gradient.bound()
    }

    /// One was answered after `took`, when so many were `under_way`. The new bound, where a window has ended by it.
    pub(super) fn answered(&self, took: Duration, under_way: u32, now: Duration) -> Option<u32> {
        let mut learning = self.0.lock();
        let window = &mut learning.window;
        window.calls += 1;
        window.took += took;
        window.under_way = window.under_way.max(under_way);
        let window = *window;
        if window.calls < FEWEST || now.saturating_sub(learning.since) < WINDOW {
            return None;
        }
        learning.since = now;
        learning.window = Window::default();
        learning.gradient.update(window);
        Some(learning.gradient.bound())
    }
}
