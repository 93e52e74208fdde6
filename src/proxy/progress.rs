//! How far the bodies of an exchange have come, and how long its client was waited for, whichever version each side speaks. Must not move them.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use crate::clock;
use crate::store::breakers::Probe;

#[derive(Debug)]
pub(super) struct Progress {
    /// For the client to send, without the wait that goes on.
    waited: Cell<Duration>,
    /// Since when it is waited for now, by [`clock::mono`].
    waiting: Cell<Option<Duration>>,
    /// When something last moved, either way, by [`clock::mono`].
    moved: Cell<Duration>,
    /// Whether an upstream of HTTP/1.1 has a byte of the request.
    pub begun: Cell<bool>,
    /// Whether the response's head has come: what is left goes on for as long as something moves.
    pub answered: Cell<bool>,
    /// Where it is one: its time is the upstream's, but while the client is waited for.
    probe: Option<Rc<Probe>>,
}

impl Progress {
    /// With nothing moved; in tries before this one the client was waited for so long.
    pub(super) fn begin(waited: Duration, probe: Option<Rc<Probe>>) -> Progress {
        Progress {
            waited: Cell::new(waited),
            waiting: Cell::new(None),
            moved: Cell::new(Duration::ZERO),
            begun: Cell::new(false),
            answered: Cell::new(false),
            probe,
        }
    }

    /// Something moved.
    pub(super) fn made(&self) {
        self.moved.set(clock::mono());
    }

    /// Some of the request went out.
    pub(super) fn sent(&self) {
        self.begun.set(true);
        self.made();
        self.works();
    }

    /// The response's head has come.
    pub(super) fn answer(&self) {
        self.answered.set(true);
        self.made();
    }

    /// The upstream's time begins anew.
    pub(super) fn works(&self) {
        if let (Some(probe), false) = (&self.probe, self.answered.get()) {
            probe.works(clock::mono());
        }
    }

    /// For the client to send, so far.
    pub(super) fn waited(&self) -> Duration {
        let since = self.waiting.get();
        let now = since.map(|since| clock::mono().saturating_sub(since));
        self.waited.get() + now.unwrap_or_default()
    }

    /// The client is waited for, until that is dropped: who waits may be left for the upstream's answer.
    pub(super) fn wait(&self) -> Waiting<'_> {
        let now = clock::mono();
        self.waiting.set(Some(now));
        if let (Some(probe), false) = (&self.probe, self.answered.get()) {
            probe.waits(now);
        }
        Waiting(self)
    }

    /// Whether the client is waited for now.
    pub(super) fn waits(&self) -> bool {
        self.waiting.get().is_some()
    }

    /// What is left of `idle` since something moved.
    pub(super) fn left_of(&self, idle: Duration) -> Duration {
        (self.moved.get() + idle).saturating_sub(clock::mono())
    }
}

/// A wait for the client. Only this is its time, not that of an upstream which is slow to read.
pub(super) struct Waiting<'p>(&'p Progress);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Waiting(progress) = self;
        progress.waited.set(progress.waited());
        progress.waiting.set(None);
        progress.works();
    }
}
