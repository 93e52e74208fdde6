//! The end of a lane's turn, when all that the kernel's last news woke has run. A connection that many tasks send by is driven then: so it
//! writes once for all of them, where it would else be woken, and write, behind each. And what is dear is done once a turn.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use tokio::sync::Mutex;
use tokio::task::yield_now;

use crate::clock;

/// As long behind a dear piece the next one waits for no turn of its own: those that wait would have next to nothing of a lane that is never done
/// with what is ready.
const PAUSE: Duration = Duration::from_millis(2);

/// Of one connection.
#[derive(Debug)]
pub(super) struct Turn {
    end: Arc<End>,
    /// Wakes by `end`.
    waker: Waker,
    awaited: bool,
    /// The connection waited when it was polled last: something has woken it since.
    rested: bool,
}

#[derive(Debug, Default)]
struct End {
    came: AtomicBool,
    task: AtomicWaker,
}

impl Default for Turn {
    fn default() -> Turn {
        let end = Arc::<End>::default();
        Turn {
            waker: Waker::from(end.clone()),
            end,
            awaited: false,
            rested: false,
        }
    }
}

impl Turn {
    /// Polls the connection by `poll`: at once where few send by it, and at the end of the turn where `many` do.
    pub(super) fn poll_by<T>(
        &mut self,
        cx: &mut Context<'_>,
        many: bool,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if many && self.rested {
            ready!(self.poll_end(cx));
        }
        let polled = poll(cx);
        self.rested = polled.is_pending();
        polled
    }

    /// However often the task is woken meanwhile.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.end.task.register(cx.waker());
        if !self.awaited {
            self.awaited = true;
            self.end.came.store(false, Ordering::Relaxed);
            // The runtime takes the waker, and wakes it once it has asked the kernel for news again.
            let _ = pin!(yield_now()).poll(&mut Context::from_waker(&self.waker));
        }
        match self.end.came.swap(false, Ordering::Acquire) {
            true => {
                self.awaited = false;
                Poll::Ready(())
            }
            false => Poll::Pending,
        }
    }
}

/// Work that is dear to a lane, each piece of it in a turn of its own: what is ready by then goes first, where many pieces that come at once
/// would else hold it up together; without, where the last was a while ago ([`PAUSE`]). In the order in which they come.
#[derive(Debug, Default)]
pub struct OnceATurn {
    turn: Mutex<()>,
    /// When the last piece was done.
    last: Cell<Option<Instant>>,
}

impl OnceATurn {
    /// Goes on with `dear`, which this task has polled, until it is done: each time that it has the task woken, in its turn.
    pub async fn go_on<T>(&self, mut dear: Pin<&mut impl Future<Output = T>>) -> T {
        loop {
            let mut woken = false;
            poll_fn(|_| match std::mem::replace(&mut woken, true) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            })
            .await;
            if let Poll::Ready(done) = self.poll(dear.as_mut()).await {
                return done;
            }
        }
    }

    /// Polls `dear` once, in its turn.
    pub async fn poll<T>(&self, mut dear: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        let _turn = self.turn.lock().await;
        let last = self.last.get();
        if last.is_some_and(|last| last.elapsed() < PAUSE) {
            yield_now().await;
        }
        let polled = poll_fn(|cx| Poll::Ready(dear.as_mut().poll(cx))).await;
        self.last.set(Some(clock::now()));
        polled
    }
}

impl Wake for End {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.came.store(true, Ordering::Release);
        self.task.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;
    use std::future::poll_fn;
    use std::rc::Rc;

    use tokio::sync::Notify;

    use super::*;

    /// How often a connection is driven by which eight tasks send that are woken at once.
    async fn driven(many: bool) -> usize {
        let (sent, times) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let waker = Rc::<RefCell<Option<Waker>>>::default();
        let connection = tokio::task::spawn_local({
            let (sent, times, waker) = (sent.clone(), times.clone(), waker.clone());
            async move {
                let mut turn = Turn::default();
                let drive = |cx: &mut Context<'_>| {
                    times.set(times.get() + 1);
                    *waker.borrow_mut() = Some(cx.waker().clone());
                    match sent.get() {
                        8 => Poll::Ready(()),
                        _ => Poll::Pending,
                    }
                };
                poll_fn(|cx| turn.poll_by(cx, many, drive)).await;
            }
        });
        let news = Rc::new(Notify::new());
        let senders: VecDeque<_> = (0..8)
            .map(|_| {
                let (sent, waker, news) = (sent.clone(), waker.clone(), news.clone());
                tokio::task::spawn_local(async move {
                    news.notified().await;
                    sent.set(sent.get() + 1);
                    waker.borrow().as_ref().unwrap().wake_by_ref();
                    // As of a body that comes in parts.
                    tokio::task::yield_now().await;
                })
            })
            .collect();
        tokio::task::yield_now().await;
        news.notify_waiters();
        for sender in senders {
            sender.await.unwrap();
        }
        connection.await.unwrap();
        times.get()
    }

    #[tokio::test(flavor = "local")]
    async fn a_connection_is_driven_once_for_all_that_send() {
        // Before anyone sends, and behind all.
        assert_eq!(driven(true).await, 2);
    }

    #[tokio::test(flavor = "local")]
    async fn what_is_dear_has_a_share_of_a_lane_that_is_never_done() {
        const PIECES: usize = 16;
        let (turns, left) = (Rc::new(OnceATurn::default()), Rc::new(Cell::new(PIECES)));
        let pieces = (0..PIECES).map(|_| {
            let (turns, left) = (turns.clone(), left.clone());
            async move {
                let _ = turns.poll(pin!(async {})).await;
                left.set(left.get() - 1);
            }
        });
        for piece in pieces {
            tokio::task::spawn_local(piece);
        }
        let mut polled = 0;
        let busy = poll_fn(move |cx| {
            if left.get() == 0 {
                return Poll::Ready(polled);
            }
            polled += 1;
            let began = clock::now();
            while began.elapsed() < PAUSE {}
            // Unlike one that yields, it is ready again before the kernel is asked for news.
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        let polled = tokio::task::spawn_local(busy).await.unwrap();
        // The second waits until the kernel is asked: behind 61 others at most (tokio's `event_interval`).
        assert!((PIECES..61 + 2 * PIECES).contains(&polled), "{polled}");
    }

    #[tokio::test(flavor = "local")]
    async fn what_is_dear_takes_a_turn_each_time_that_it_goes_on() {
        const PIECES: usize = 16;
        let (turns, news) = (Rc::new(OnceATurn::default()), Rc::new(Notify::new()));
        let (begun, steps) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let pieces: Vec<_> = (0..PIECES)
            .map(|_| {
                let (turns, news) = (turns.clone(), news.clone());
                let (begun, steps) = (begun.clone(), steps.clone());
                tokio::task::spawn_local(async move {
                    let mut dear = pin!(async {
                        begun.set(begun.get() + 1);
                        news.notified().await;
                        steps.set(steps.get() + 1);
                    });
                    assert!(turns.poll(dear.as_mut()).await.is_pending());
                    turns.go_on(dear).await;
                })
            })
            .collect();
        while begun.get() < PIECES {
            tokio::task::yield_now().await;
        }
        news.notify_waiters();
        let (mut passed, began) = (0, clock::now());
        while steps.get() < PIECES {
            passed += 1;
            tokio::task::yield_now().await;
        }
        // Each but the first has waited for a turn, or came so late that it had to wait for none.
        let late = began.elapsed().as_micros() / PAUSE.as_micros();
        assert!(passed + late + 2 >= PIECES as u128, "{passed}");
        for piece in pieces {
            piece.await.unwrap();
        }
    }

    #[tokio::test(flavor = "local")]
    async fn one_that_few_send_by_is_driven_at_once() {
        assert!(driven(false).await >= 2);
    }
}
