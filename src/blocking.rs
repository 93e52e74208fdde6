//! Work that holds the thread that does it, each on one of its own. Must not know what work is.
//!
//! Not tokio's `spawn_blocking`: that panics, in whoever calls it, where the process may have no more threads.

use std::io;
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot::{self, Receiver};

/// Begins a thread. An error says what bounds threads.
pub fn begin(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name(name.to_owned());
    thread.spawn(work).map_err(none)
}

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
    // Whoever asked may be gone.
    begin("blocking", move || drop(done.send(work())))?;
    Ok(result)
}

/// What `work` gives; an error where no thread can be begun, and where it panics.
pub async fn done<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let result = hand_on(work)?.await;
    result.map_err(|_| io::Error::other("the thread for it panicked"))
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
