//! Whether a phase of a lane's end has begun, and who is to close: those that are idle then, after a last call, and before that whoever
//! has been idle for longest where there is room for no more. Per lane: every request on every lane would read a shared flag.
//! Must not know why the process drains.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;
use tokio::sync::watch;
use tokio::time::{Sleep, sleep};

use crate::plan::Phase;

/// How long an idle connection lives on, or a quarter of the drain's time where that is less.
const LAST_CALL: Duration = Duration::from_secs(1);

/// How many [ticks](IdleClosing::tick) a connection has been idle before it makes room: clients that ask without pause keep theirs.
const IDLE_TICKS: u32 = 2;

#[derive(Debug, Default)]
pub(super) struct IdleClosing {
    begun: Cell<bool>,
    /// How long the last call lasts, once it is over.
    called: Cell<Option<Duration>>,
    /// Who waits for the last call.
    idle: RefCell<Slab<Idle>>,
    ticks: Cell<u32>,
    long_idle: RefCell<LongIdle>,
}

/// A connection that waits for its client.
#[derive(Debug)]
struct Idle {
    waker: Waker,
    listener: usize,
    since: u32,
    makes_room: bool,
}

/// Those that could make room at a tick: looked for once in each, however many come.
#[derive(Debug, Default)]
struct LongIdle {
    tick: u32,
    /// By listener: for how many ticks, and where; who has been idle for longest is last.
    found: BTreeMap<usize, Vec<(u32, usize)>>,
}

/// Until a connection that is idle is to close. A client that sends its next request just as the drain begins would lose it, and one that
/// asks without pause has been told in time by a reply.
#[derive(Debug)]
pub(super) struct LastCall<'d> {
    closing: &'d IdleClosing,
    listener: usize,
    /// Where it is among the idle, once it has waited.
    at: Option<usize>,
    /// Of one that is idle only since the lane's last call, such as behind a long reply: its own.
    own: Option<Pin<Box<Sleep>>>,
}

impl IdleClosing {
    pub(super) fn has_begun(&self) -> bool {
        self.begun.get()
    }

    /// For a connection of the listener with this number.
    pub(super) fn last_call(&self, listener: usize) -> LastCall<'_> {
        LastCall {
            closing: self,
            listener,
            at: None,
            own: None,
        }
    }

    /// To be called each second or so.
    pub(super) fn tick(&self) {
        self.ticks.set(self.ticks.get().wrapping_add(1));
    }

    /// Calls the connection of `listener` that has been idle for longest; whether there is one that has been for long.
    pub(super) fn make_room(&self, listener: usize) -> bool {
        let now = self.ticks.get();
        let mut idle = self.idle.borrow_mut();
        let mut long = self.long_idle.borrow_mut();
        if long.tick != now {
            long.tick = now;
            long.found.clear();
            for (at, idle) in idle.iter() {
                let ticks = now.wrapping_sub(idle.since);
                if ticks >= IDLE_TICKS && !idle.makes_room {
                    long.found
                        .entry(idle.listener)
                        .or_default()
                        .push((ticks, at));
                }
            }
            long.found
                .values_mut()
                .for_each(|found| found.sort_unstable());
        }
        let Some(found) = long.found.get_mut(&listener) else {
            return false;
        };
        while let Some((ticks, at)) = found.pop() {
            // Who is there now may be another, that came since.
            if let Some(idle) = idle.get_mut(at)
                && idle.listener == listener
                && !idle.makes_room
                && now.wrapping_sub(idle.since) == ticks
            {
                idle.makes_room = true;
                idle.waker.wake_by_ref();
                return true;
            }
        }
        false
    }

    /// Begins with `phase`, or with the drain, which has `time` together.
    pub(super) async fn when(
        &self,
        mut phases: watch::Receiver<Phase>,
        phase: Phase,
        time: impl Fn() -> Duration,
    ) {
        let lasts = match phases.wait_for(|now| *now >= phase).await.as_deref() {
            Ok(Phase::Draining | Phase::Over) => LAST_CALL.min(time() / 4),
            Ok(Phase::Serving | Phase::Leaving) => LAST_CALL,
            Err(_) => return,
        };
        self.begun.set(true);
        sleep(lasts).await;
        self.called.set(Some(lasts));
        for idle in self.idle.borrow_mut().drain() {
            idle.waker.wake();
        }
    }
}

impl Future for LastCall<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(lasts) = self.closing.called.get() {
            // All who waited were taken out, and called.
            return match self.at.take() {
                Some(_) => Poll::Ready(()),
                None => {
                    let own = self.own.get_or_insert_with(|| Box::pin(sleep(lasts)));
                    own.as_mut().poll(cx)
                }
            };
        }
        let mut idle = self.closing.idle.borrow_mut();
        match self.at {
            Some(at) if idle[at].makes_room => return Poll::Ready(()),
            Some(at) => idle[at].waker.clone_from(cx.waker()),
            None => {
                let at = idle.insert(Idle {
                    waker: cx.waker().clone(),
                    listener: self.listener,
                    since: self.closing.ticks.get(),
                    makes_room: false,
                });
                drop(idle);
                self.at = Some(at);
            }
        }
        Poll::Pending
    }
}

impl Drop for LastCall<'_> {
    fn drop(&mut self) {
        if let Some(at) = self.at {
            self.closing.idle.borrow_mut().try_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::runtime::Builder;
    use tokio::time::Instant;

    use super::*;

    #[test]
    fn who_is_idle_only_since_the_last_call_has_one_of_its_own() {
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let closing = IdleClosing::default();
            let (tell, phases) = watch::channel(Phase::Serving);
            let began = Instant::now();
            let waiting = async {
                closing.last_call(0).await;
                (began.elapsed(), closing.has_begun())
            };
            let draining = async {
                sleep(Duration::from_secs(60)).await;
                tell.send_replace(Phase::Draining);
                let time = || Duration::from_secs(2);
                closing.when(phases, Phase::Leaving, time).await;
            };
            let (called, ()) = tokio::join!(waiting, draining);
            // A quarter of the drain's time.
            assert_eq!(called, (Duration::from_millis(60_500), true));
            assert!(closing.idle.borrow().is_empty());
            let idle_since = Instant::now();
            closing.last_call(0).await;
            assert_eq!(idle_since.elapsed(), Duration::from_millis(500));
        });
    }

    #[test]
    fn who_has_been_idle_for_longest_makes_room() {
        let closing = IdleClosing::default();
        let polled = |call: &mut LastCall<'_>| call.now_or_never().is_some();
        let [mut first, mut other, mut second] =
            [0, 1, 0].map(|listener| closing.last_call(listener));
        assert!(!polled(&mut first));
        assert!(!polled(&mut other));
        closing.tick();
        assert!(!polled(&mut second));
        assert!(!closing.make_room(0));
        closing.tick();
        assert!(closing.make_room(0));
        assert!(
            !closing.make_room(0),
            "the other one has not been idle for long"
        );
        assert!(polled(&mut first));
        closing.tick();
        assert!(closing.make_room(0));
        assert!(polled(&mut second));
        assert!(!polled(&mut other));
        drop((first, second));
        assert!(!closing.make_room(0));
        assert!(closing.make_room(1));
    }

    #[test]
    fn who_comes_into_the_place_of_one_that_went_makes_no_room() {
        let closing = IdleClosing::default();
        let mut gone = closing.last_call(0);
        let mut stays = closing.last_call(0);
        assert!((&mut gone).now_or_never().is_none());
        assert!((&mut stays).now_or_never().is_none());
        closing.tick();
        closing.tick();
        assert!(closing.make_room(0));
        assert!((&mut stays).now_or_never().is_none() || (&mut gone).now_or_never().is_none());
        drop(gone);
        drop(stays);
        let mut new = closing.last_call(0);
        assert!((&mut new).now_or_never().is_none());
        assert!(!closing.make_room(0));
    }
}
