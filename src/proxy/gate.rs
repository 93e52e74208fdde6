//! What requests of one lane wait for together. It never leaves the lane's thread, so it has neither locks nor atomics.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Closed at first. Whoever waits learns whether it was opened or given up.
#[derive(Debug, Clone, Default)]
pub(super) struct Gate(Rc<State>);

/// The duty to open a gate. Dropped without that, it gives the gate up.
#[derive(Debug, Default)]
pub(super) struct Opener(Gate);

#[derive(Debug, Default)]
struct State {
    opened: Cell<Option<bool>>,
    waiting: RefCell<Vec<Waker>>,
}

impl Gate {
    /// One that was given up.
    pub(super) fn given_up() -> Gate {
        Opener::default().gate()
    }

    /// Waits until it is opened or given up, and says whether it was opened.
    pub(super) fn settled(&self) -> impl Future<Output = bool> {
        let mut place = None;
        poll_fn(move |context| self.poll(&mut place, context))
    }

    fn poll(&self, place: &mut Option<usize>, context: &Context<'_>) -> Poll<bool> {
        if let Some(opened) = self.0.opened.get() {
            return Poll::Ready(opened);
        }
        let mut waiting = self.0.waiting.borrow_mut();
        match place.and_then(|place| waiting.get_mut(place)) {
            Some(waker) => waker.clone_from(context.waker()),
            None => {
                *place = Some(waiting.len());
                waiting.push(context.waker().clone());
            }
        }
        Poll::Pending
    }

    fn settle(&self, opened: bool) {
        if self.0.opened.get().is_none() {
            self.0.opened.set(Some(opened));
            self.0.waiting.take().into_iter().for_each(Waker::wake);
        }
    }
}

impl Opener {
    /// For those who wait.
    pub(super) fn gate(&self) -> Gate {
        self.0.clone()
    }

    pub(super) fn open(self) {
        self.0.settle(true);
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.settle(false);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use futures_util::future::join3;

    use super::*;

    #[tokio::test]
    async fn those_who_wait_learn_whether_it_was_opened() {
        let (opened, given_up) = (Opener::default(), Opener::default());
        let (first, second, never) = (opened.gate(), opened.gate(), given_up.gate());
        let waiting = join3(first.settled(), second.settled(), never.settled());
        tokio::pin!(waiting);
        assert_eq!(waiting.as_mut().now_or_never(), None);
        opened.open();
        drop(given_up);
        assert_eq!(waiting.await, (true, true, false));
    }

    #[test]
    fn who_asks_late_is_told_too() {
        let opener = Opener::default();
        let gate = opener.gate();
        opener.open();
        assert_eq!(gate.settled().now_or_never(), Some(true));
        assert_eq!(Gate::given_up().settled().now_or_never(), Some(false));
    }
}
