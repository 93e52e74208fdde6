//! What a request waits for whose event must be safe before it is answered. Must not know why.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::Notify;

const OPEN: u8 = 0;
const SAFE: u8 = 1;
const LOST: u8 = 2;

/// Of the events that one lane hands on together.
#[derive(Debug, Clone, Default)]
pub struct Receipt(Arc<Slip>);

#[derive(Debug, Default)]
struct Slip {
    state: AtomicU8,
    settled: Notify,
}

/// The duty to settle a receipt. Dropped without that, the events count as lost.
#[derive(Debug, Default)]
pub(super) struct Duty(Receipt);

impl Receipt {
    /// Waits until it is known whether the events are safe, and says so.
    pub async fn settled(&self) -> bool {
        let settled = self.0.settled.notified();
        tokio::pin!(settled);
        // Listens before it looks, so that nothing is missed between.
        settled.as_mut().enable();
        if self.0.state.load(Ordering::Acquire) == OPEN {
            settled.await;
        }
        self.0.state.load(Ordering::Acquire) == SAFE
    }

    fn settle(&self, state: u8) {
        let open = self
            .0
            .state
            .compare_exchange(OPEN, state, Ordering::AcqRel, Ordering::Acquire);
        if open.is_ok() {
            self.0.settled.notify_waiters();
        }
    }
}

impl Duty {
    /// For those who wait.
    pub(super) fn receipt(&self) -> Receipt {
        self.0.clone()
    }

    /// The events survive the end of the process.
    pub(super) fn safe(self) {
        self.0.settle(SAFE);
    }
}

impl Drop for Duty {
    fn drop(&mut self) {
        self.0.settle(LOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn those_who_wait_learn_what_became_of_it() {
        let (kept, lost) = (Duty::default(), Duty::default());
        let (is_kept, is_lost) = (kept.receipt(), lost.receipt());
        let waiting =
            tokio::spawn(async move { (is_kept.settled().await, is_lost.settled().await) });
        tokio::task::yield_now().await;
        drop(lost);
        kept.safe();
        assert_eq!(waiting.await.unwrap(), (true, false));
    }

    #[tokio::test]
    async fn who_asks_late_is_told_too() {
        let duty = Duty::default();
        let receipt = duty.receipt();
        duty.safe();
        assert!(receipt.settled().await);
    }
}
