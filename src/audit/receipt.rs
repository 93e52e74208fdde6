//! What a request waits for whose event must be safe before it is answered. Must not know why.

use tokio::sync::watch;

/// Of the events that one lane hands on together.
#[derive(Debug, Clone)]
pub struct Receipt(watch::Receiver<bool>);

/// The duty to settle a receipt. Dropped without that, the events count as lost.
#[derive(Debug, Default)]
pub(super) struct Duty(watch::Sender<bool>);

impl Receipt {
    /// Waits until it is known whether the events are safe, and says so.
    pub async fn settled(&self) -> bool {
        let mut is_safe = self.0.clone();
        is_safe.wait_for(|is_safe| *is_safe).await.is_ok()
    }
}

impl Duty {
    /// For those who wait.
    pub(super) fn receipt(&self) -> Receipt {
        Receipt(self.0.subscribe())
    }

    /// The events survive the end of the process.
    pub(super) fn safe(self) {
        self.0.send_replace(true);
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
