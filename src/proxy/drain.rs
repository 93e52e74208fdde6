//! Whether a phase of a lane's end has begun, and the last call of those that are idle then. A lane's own: what all lanes share would be
//! asked about by each request of each of them.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;
use tokio::sync::watch;
use tokio::time::{Sleep, sleep};

use crate::plan::Phase;

/// How long an idle connection lives on, or a quarter of the drain's time where that is less.
const LAST_CALL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Drain {
    begun: Cell<bool>,
    /// How long the last call lasts, once it is over.
    called: Cell<Option<Duration>>,
    /// Who waits for the last call.
    idle: RefCell<Slab<Waker>>,
}

/// Until a connection that is idle is to close. A client that sends its next request just as the drain begins would lose it, and one that
/// asks without pause has been told in time by a reply.
#[derive(Debug)]
pub(super) struct LastCall<'d> {
    drain: &'d Drain,
    /// Where its waker is, once it has waited.
    at: Option<usize>,
    /// Of one that is idle only since the lane's last call, such as behind a long reply: its own.
    own: Option<Pin<Box<Sleep>>>,
}

impl Drain {
    pub(super) fn has_begun(&self) -> bool {
        self.begun.get()
    }

    pub(super) fn last_call(&self) -> LastCall<'_> {
        LastCall {
            drain: self,
            at: None,
            own: None,
        }
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
        for waker in self.idle.borrow_mut().drain() {
            waker.wake();
        }
    }
}

impl Future for LastCall<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(lasts) = self.drain.called.get() {
            // All who waited were taken out, and called.
            return match self.at.take() {
                Some(_) => Poll::Ready(()),
                None => {
                    let own = self.own.get_or_insert_with(|| Box::pin(sleep(lasts)));
                    own.as_mut().poll(cx)
                }
            };
        }
        let mut idle = self.drain.idle.borrow_mut();
        match self.at {
            Some(at) => idle[at].clone_from(cx.waker()),
            None => {
                let at = idle.insert(cx.waker().clone());
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
            self.drain.idle.borrow_mut().try_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
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
            let drain = Drain::default();
            let (tell, phases) = watch::channel(Phase::Serving);
            let began = Instant::now();
            let waiting = async {
                drain.last_call().await;
                (began.elapsed(), drain.has_begun())
            };
            let draining = async {
                sleep(Duration::from_secs(60)).await;
                tell.send_replace(Phase::Draining);
                let time = || Duration::from_secs(2);
                drain.when(phases, Phase::Leaving, time).await;
            };
            let (called, ()) = tokio::join!(waiting, draining);
            // A quarter of the drain's time.
            assert_eq!(called, (Duration::from_millis(60_500), true));
            assert!(drain.idle.borrow().is_empty());
            let idle_since = Instant::now();
            drain.last_call().await;
            assert_eq!(idle_since.elapsed(), Duration::from_millis(500));
        });
    }
}
