//! Work that holds the thread that does it, each on one of its own. Must not know what work is.
//!
//! Not tokio's `spawn_blocking`: that panics, in whoever calls it, where the process may have no more threads.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::sync::oneshot::{self, Receiver};

/// Threads at a time, more are refused: a mount whose server is gone keeps them all.
const MOST: usize = 512;

static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// Why there is no thread, and the mend.
pub fn none(error: io::Error) -> io::Error {
    let said = format!(
        "no thread can be begun: {error}; raise what bounds threads (ulimit -u, TasksMax, the pod's pids limit) or memory"
    );
    io::Error::new(error.kind(), said)
}

/// Begins `work`; what it gives comes to the receiver, and nothing does where it panics.
pub fn hand_on<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Receiver<T>> {
    let (done, result) = oneshot::channel();
    let counted = Counted::one_more().ok_or_else(|| {
        let said = format!("{MOST} threads are at work already: a disk or a mount may not answer");
        io::Error::new(ErrorKind::WouldBlock, said)
    })?;
    let thread = thread::Builder::new().name("blocking".to_owned());
    let begun = thread.spawn(move || {
        let _counted = counted;
        // Whoever asked may be gone.
        let _ = done.send(work());
    });
    begun.map(|_| result).map_err(none)
}

/// What `work` gives; an error where no thread can be begun, and where it panics.
pub async fn done<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let result = hand_on(work)?.await;
    result.map_err(|_| io::Error::other("the thread for it panicked"))
}

/// One of [`MOST`].
struct Counted;

impl Counted {
    fn one_more() -> Option<Counted> {
        let more = |under_way| (under_way < MOST).then_some(under_way + 1);
        let counted = UNDER_WAY.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        counted.is_ok().then_some(Counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_done_is_given_and_a_panic_is_an_error() {
        assert_eq!(done(|| 7).await.unwrap(), 7);
        let error = done::<()>(|| panic!("a panic that is meant"));
        let error = error.await.unwrap_err();
        assert_eq!(error.to_string(), "the thread for it panicked");
    }
}
