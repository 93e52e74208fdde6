//! The signals that end weir, and those that people send to other servers and that must not end it. Ends nothing by itself.

use std::future::pending;
use std::io;

use anyhow::{Context, anyhow};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::warn;

/// From the time that it is made, none of them ends the process at once.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// nginx's graceful stop.
    quit: Signal,
    /// nginx's new log files, and its new binary.
    user: [Signal; 2],
}

impl Signals {
    pub(super) fn listen() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            user: [
                signal(SignalKind::user_defined1())?,
                signal(SignalKind::user_defined2())?,
            ],
        })
    }

    /// Waits for SIGTERM, SIGQUIT or SIGINT. Says of those that do nothing what there is in their place.
    pub(super) async fn stopped(&mut self) -> anyhow::Result<()> {
        let gone = || anyhow!("signals cannot be received");
        let [first, second] = &mut self.user;
        loop {
            let ignored = tokio::select! {
                received = self.terminate.recv() => return received.with_context(gone),
                received = self.quit.recv() => return received.with_context(gone),
                received = self.interrupt.recv() => return received.with_context(gone),
                received = first.recv() => received.map(|()| "SIGUSR1"),
                received = second.recv() => received.map(|()| "SIGUSR2"),
            };
            let signal = ignored.with_context(gone)?;
            warn!(
                signal,
                "ignored: weir logs to stderr and has no file to open anew; a new binary takes over by weir run --take-over"
            );
        }
    }

    /// Waits for the signal that ends an end at once: the second one, or the first behind the one that the process was `asked` to end by.
    pub(super) async fn once_more(&mut self, asked: bool) {
        // The first asks one that ends by itself for no more than that.
        for _ in usize::from(asked)..2 {
            if self.stopped().await.is_err() {
                return pending().await;
            }
        }
        warn!("told to end once more: what is under way is cut off");
    }
}
