//! Whether a lane drains, and the last call of its idle connections. A lane's own: what all lanes share would be asked about by each
//! request of each of them.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;
use tokio::sync::watch;

/// How long an idle connection lives on in a drain, or a quarter of its time where that is less.
const LAST_CALL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Drain {
    begun: Cell<bool>,
    called: Cell<bool>,
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
}

impl Drain {
    /// Whether connections are to close behind their next reply.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.get()
    }

    pub(super) fn last_call(&self) -> LastCall<'_> {
        LastCall {
            drain: self,
            at: None,
        }
    }

    /// Drains once `draining` turns true, for `time` together.
    pub(super) async fn when(
        &self,
        mut draining: watch::Receiver<bool>,
        time: impl Fn() -> Duration,
    ) {
        if draining.wait_for(|draining| *draining).await.is_err() {
            return;
        }
        self.begun.set(true);
        tokio::time::sleep(LAST_CALL.min(time() / 4)).await;
        self.called.set(true);
        for waker in self.idle.borrow_mut().drain() {
            waker.wake();
        }
    }
}

impl Future for LastCall<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.drain.called.get() {
            // All were taken out.
            self.at = None;
            return Poll::Ready(());
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
