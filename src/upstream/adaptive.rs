//! How many requests an upstream takes at a time, learnt from those that were answered. Owns the places of requests that have no answer
//! yet, and the windows that [`policy::gradient`](crate::policy::gradient) learns from.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{AcquireError, Semaphore};

use crate::policy::gradient::{Gradient, Range, Window};

/// How long a window is, at least; it ends with an answer.
const WINDOW: Duration = Duration::from_millis(100);
/// Answers of a window, at least: fewer say little of an average.
const FEWEST: u32 = 10;

/// What is learnt of one upstream, by all lanes together.
#[derive(Debug)]
pub(super) struct Learnt {
    places: Semaphore,
    /// Held for tens of nanoseconds, twice a request.
    learning: Mutex<Learning>,
}

#[derive(Debug)]
struct Learning {
    gradient: Gradient,
    since: Duration,
    window: Window,
    /// Answers until the window begins: in a dip, those of requests that began before it and may have queued.
    skip: u32,
    /// By how many those that taught nothing were more than those that did, of late: no dip is held through them.
    untaught: u32,
    /// Places that there are: more than the bound while some of those in use are still to be taken back.
    size: u32,
}

/// The place of a request whose response's head has not come, until it is dropped.
#[derive(Debug)]
pub(super) struct Unanswered<'l>(&'l Learnt);

impl Learnt {
    pub(super) fn new(range: Range) -> Learnt {
        let gradient = Gradient::new(range);
        let size = gradient.bound();
        Learnt {
            places: Semaphore::new(size as usize),
            learning: Mutex::new(Learning {
                gradient,
                since: Duration::ZERO,
                window: Window::default(),
                skip: 0,
                untaught: 0,
                size,
            }),
        }
    }

    /// How many may wait for their answer.
    pub(super) fn bound(&self) -> u32 {
        self.learning.lock().gradient.bound()
    }

    /// A place, where one is free.
    pub(super) fn try_enter(&self) -> Option<Unanswered<'_>> {
        self.places.try_acquire().ok()?.forget();
        Some(Unanswered(self))
    }

    /// A place, once one is free.
    pub(super) async fn enter(&self) -> Result<Unanswered<'_>, AcquireError> {
        self.places.acquire().await?.forget();
        Ok(Unanswered(self))
    }

    /// One was answered after `took`, and has its place still.
    pub(super) fn learn(&self, took: Duration, now: Duration) {
        let mut learning = self.learning.lock();
        // One for itself, which is counted as its place goes.
        learning.untaught = learning.untaught.saturating_sub(2);
        if learning.skip > 0 {
            learning.skip -= 1;
            learning.since = now;
            return;
        }
        let free = u32::try_from(self.places.available_permits()).unwrap_or(u32::MAX);
        let under_way = learning.size.saturating_sub(free);
        let window = &mut learning.window;
        window.calls += 1;
        window.took += took;
        window.under_way = window.under_way.max(under_way);
        let window = *window;
        if window.calls < FEWEST || now.saturating_sub(learning.since) < WINDOW {
            return;
        }
        learning.since = now;
        learning.window = Window::default();
        learning.gradient.update(window);
        learning.skip = match learning.gradient.dips() {
            true => under_way,
            false => 0,
        };
        self.resize(&mut learning);
    }

    /// Gives or takes back places. Those that are in use are taken back as they come free.
    fn resize(&self, learning: &mut Learning) {
        let bound = learning.gradient.bound();
        if bound >= learning.size {
            self.places.add_permits((bound - learning.size) as usize);
            learning.size = bound;
        } else {
            let taken = (learning.size - bound) as usize;
            let taken = self.places.forget_permits(taken);
            learning.size -= u32::try_from(taken).unwrap_or(u32::MAX);
        }
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let Unanswered(learnt) = self;
        let mut learning = learnt.learning.lock();
        learning.untaught = learning.untaught.saturating_add(1);
        if learning.untaught >= FEWEST && learning.gradient.dips() {
            learning.gradient.end_dip();
            learning.skip = 0;
            learnt.resize(&mut learning);
        }
        // One that is to be taken back is for none of those that wait: while any did, the bound would not shrink.
        if learning.size > learning.gradient.bound() {
            learning.size -= 1;
        } else {
            learnt.places.add_permits(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_dip_learns_nothing_of_what_queued_before_it() {
        let learnt = Learnt::new(Range { min: 2, max: 1000 });
        let mut under_way = VecDeque::new();
        let mut now = Duration::ZERO;
        // One that takes requests in turn, 8 at a time for 10 ms each, and is slow at the start. 64 ask, each anew once it is answered.
        for _ in 0..50_000 {
            while under_way.len() < 64
                && let Some(place) = learnt.try_enter()
            {
                under_way.push_back((now, place));
            }
            let (began, place) = under_way.pop_front().unwrap();
            let each = if now < 5000 * MS {
                12 * MS
            } else {
                10 * MS / 8
            };
            now = (now + each).max(began + 10 * MS);
            learnt.learn(now - began, now);
            drop(place);
        }
        let bound = learnt.bound();
        assert!((8..=24).contains(&bound), "{bound}");
    }

    #[test]
    fn a_dip_is_not_held_through_answers_that_teach_nothing() {
        let learnt = Learnt::new(Range { min: 2, max: 20 });
        let mut now = Duration::ZERO;
        let mut answer = |teaches: bool| {
            let places: Vec<_> = std::iter::from_fn(|| learnt.try_enter()).collect();
            for place in places {
                now += MS * 10;
                if teaches {
                    learnt.learn(100 * MS, now);
                }
                drop(place);
            }
        };
        answer(true);
        assert!(learnt.bound() < 20);
        answer(false);
        assert_eq!(learnt.bound(), 20);
    }

    #[test]
    fn places_that_are_to_be_taken_back_are_for_none_of_those_that_wait() {
        let learnt = Learnt::new(Range { min: 5, max: 100 });
        let mut places: Vec<_> = std::iter::from_fn(|| learnt.try_enter()).collect();
        assert_eq!(places.len(), 20);
        let mut waiter = pin!(learnt.enter());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(waiter.as_mut().poll(&mut cx).is_pending());
        // It takes ten times as long from one window to the next.
        let mut now = Duration::ZERO;
        for window in 0..30 {
            now += WINDOW;
            for _ in 0..FEWEST {
                learnt.learn(if window == 0 { 10 * MS } else { 100 * MS }, now);
            }
        }
        let bound = learnt.bound() as usize;
        assert!((5..10).contains(&bound), "{bound}");
        while places.len() > bound {
            assert!(waiter.as_mut().poll(&mut cx).is_pending());
            places.pop();
        }
        assert!(waiter.as_mut().poll(&mut cx).is_pending());
        places.pop();
        assert!(waiter.as_mut().poll(&mut cx).is_ready());
        // What they took back is not given twice.
        places.clear();
        let free: Vec<_> = std::iter::from_fn(|| learnt.try_enter()).collect();
        assert_eq!(free.len(), bound);
    }
}
