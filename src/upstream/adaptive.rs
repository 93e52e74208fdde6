//! How many requests an upstream takes at a time, learnt from those that were answered. Owns the places of requests that have no answer
//! yet, and the windows that [`policy::gradient`](crate::policy::gradient) learns from.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{AcquireError, Semaphore};

use crate::policy::gradient::{Gradient, Range, Window};

/// How long a window is, at least; it ends with an answer.
const WINDOW: Duration = Duration::from_millis(100);
/// Answers of a window, at least: fewer say little of its median.
const FEWEST: u32 = 10;
/// Answers of a window whose times are kept; of more than that, those that chance picks.
const MOST: usize = 256;

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
    window: Answers,
    /// Answers until the window begins: in a dip, those of requests that began before it and may have queued.
    skip: u32,
    /// By how many those that taught nothing were more than those that did, of late: no dip is held through them.
    untaught: u32,
    /// Places that there are: more than the bound while some of those in use are still to be taken back.
    size: u32,
}

/// The answers of a window.
#[derive(Debug, Default)]
struct Answers {
    count: u32,
    /// What they took.
    times: Vec<Duration>,
    /// The most requests that were under way at a time.
    under_way: u32,
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
                window: Answers::default(),
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
        learning.window.add(took, under_way);
        if learning.window.count < FEWEST || now.saturating_sub(learning.since) < WINDOW {
            return;
        }
        learning.since = now;
        let window = learning.window.end();
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

impl Answers {
    fn add(&mut self, took: Duration, under_way: u32) {
        self.count += 1;
        self.under_way = self.under_way.max(under_way);
        if self.times.len() < MOST {
            self.times.push(took);
        } else if let Some(time) = self.times.get_mut(fastrand::usize(..self.count as usize)) {
            *time = took;
        }
    }

    /// What they come to; the next are of another window.
    fn end(&mut self) -> Window {
        self.times.sort_unstable();
        let median = self.times.get(self.times.len() / 2);
        let window = Window {
            took: median.copied().unwrap_or_default(),
            under_way: self.under_way,
        };
        self.times.clear();
        (self.count, self.under_way) = (0, 0);
        window
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
    use std::cmp::Reverse;
    use std::collections::{BinaryHeap, VecDeque};
    use std::pin::pin;
    use std::task::{Context, Waker};

    use fastrand::Rng;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Answers a second of a minute, and the median of the bounds of its second half, where so many `clients` ask a server, each anew once
    /// it is answered. That serves as many at a time as `serves` says, each for what `takes` says, and queues the rest.
    fn under_load(
        clients: usize,
        serves: usize,
        mut takes: impl FnMut() -> Duration,
    ) -> (f64, u32) {
        const MINUTE: Duration = Duration::from_secs(60);
        let learnt = Learnt::new(Range { min: 2, max: 1000 });
        let mut free: BinaryHeap<_> = (0..serves).map(|_| Reverse(Duration::ZERO)).collect();
        let mut ends = BinaryHeap::new();
        let mut places: Vec<_> = (0..clients).map(|_| None).collect();
        let mut waiting: Vec<_> = (0..clients).collect();
        let (mut now, mut answers, mut bounds) = (Duration::ZERO, 0, Vec::new());
        while now < MINUTE {
            while let Some(client) = waiting.pop() {
                let Some(place) = learnt.try_enter() else {
                    waiting.push(client);
                    break;
                };
                places[client] = Some(place);
                let Reverse(begins) = free.pop().unwrap();
                let end = now.max(begins) + takes();
                free.push(Reverse(end));
                ends.push(Reverse((end, client, now)));
            }
            let Reverse((end, client, began)) = ends.pop().unwrap();
            now = end;
            learnt.learn(now - began, now);
            places[client] = None;
            waiting.push(client);
            answers += 1;
            if now > MINUTE / 2 {
                bounds.push(learnt.bound());
            }
        }
        bounds.sort_unstable();
        let bound = bounds[bounds.len() / 2];
        (f64::from(answers) / now.as_secs_f64(), bound)
    }

    /// Nine of ten in 5 ms, the others in `slow`.
    fn mixed(random: &mut Rng, slow: Duration) -> Duration {
        match random.u8(0..10) {
            0 => slow,
            _ => 5 * MS,
        }
    }

    /// Half of them in 20 ms at most, with so wide a spread.
    fn lognormal(random: &mut Rng, sigma: f64) -> Duration {
        let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
        let normal = radius * (random.f64() * std::f64::consts::TAU).cos();
        (20 * MS).mul_f64((sigma * normal).exp())
    }

    /// What one call takes on average.
    fn mean(takes: fn(&mut Rng) -> Duration, random: &mut Rng) -> f64 {
        const CALLS: u32 = 100_000;
        let all: Duration = (0..CALLS).map(|_| takes(random)).sum();
        all.as_secs_f64() / f64::from(CALLS)
    }

    #[test]
    fn what_some_calls_take_by_nature_is_no_queue() {
        let check = |clients: usize, takes: fn(&mut Rng) -> Duration| {
            let mut random = Rng::with_seed(7);
            let most = clients as f64 / mean(takes, &mut random);
            let (rate, bound) = under_load(clients, clients, || takes(&mut random));
            assert!(rate > most * 0.7, "{rate} of {most}, bound {bound}");
        };
        check(50, |_| 20 * MS);
        check(50, |random| mixed(random, 500 * MS));
        check(200, |random| mixed(random, 500 * MS));
        check(50, |random| lognormal(random, 1.0));
        check(50, |random| lognormal(random, 1.5));
    }

    #[test]
    fn a_queue_of_calls_that_differ_is_seen_all_the_same() {
        let check = |serves: usize, takes: fn(&mut Rng) -> Duration| {
            let mut random = Rng::with_seed(7);
            let most = serves as f64 / mean(takes, &mut random);
            let (rate, bound) = under_load(200, serves, || takes(&mut random));
            let range = serves as u32 / 2..=serves as u32 * 3;
            assert!(range.contains(&bound), "{bound} at {serves}");
            assert!(rate > most * 0.7, "{rate} of {most}, bound {bound}");
        };
        check(8, |_| 20 * MS);
        check(8, |random| mixed(random, 50 * MS));
        check(8, |random| mixed(random, 500 * MS));
        check(8, |random| lognormal(random, 1.5));
        check(40, |random| mixed(random, 50 * MS));
        check(40, |random| lognormal(random, 1.5));
    }

    #[test]
    fn the_times_of_a_window_are_bounded() {
        let mut answers = Answers::default();
        for millis in 0..100_000 {
            answers.add(millis * MS, 3);
        }
        assert_eq!(answers.times.len(), MOST);
        let Window { took, under_way } = answers.end();
        assert!((30..70).contains(&took.as_secs()), "{took:?}");
        answers.add(MS, 1);
        let next = answers.end();
        assert_eq!((under_way, next.under_way, next.took), (3, 1, MS));
    }

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
