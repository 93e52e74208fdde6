//! Tasks that go on for ever beside what they serve: what panics is counted and begun again. Must not know what tasks do.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use prometheus_client::metrics::counter::Counter;
use tokio::time::sleep;

/// Before what panicked is begun again.
const AGAIN: Duration = Duration::from_millis(500);

/// Does what `begin` makes, anew after each panic.
pub async fn begin_again<T: Future>(panics: Counter, mut begin: impl FnMut() -> T) -> T::Output {
    loop {
        // It begins with new variables; what tasks have in common is behind locks, or of one thread and whole between two awaits.
        match AssertUnwindSafe(begin()).catch_unwind().await {
            Ok(ended) => return ended,
            Err(_) => {
                panics.inc();
                sleep(AGAIN).await;
            }
        }
    }
}

/// Does `task` once; a panic is counted, and ends it alone.
pub async fn counted(panics: Counter, task: impl Future<Output = ()>) {
    if AssertUnwindSafe(task).catch_unwind().await.is_err() {
        panics.inc();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test]
    async fn what_panics_once_is_counted() {
        let panics = Counter::default();
        counted(panics.clone(), async {}).await;
        counted(panics.clone(), async { panic!("a panic that is meant") }).await;
        assert_eq!(panics.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_panics_is_counted_and_begun_again() {
        let (panics, mut begun) = (Counter::default(), 0);
        let ended = begin_again(panics.clone(), || {
            begun += 1;
            let nth = begun;
            async move {
                assert!(nth > 2, "a panic that is meant");
                nth
            }
        });
        assert_eq!(ended.await, 3);
        assert_eq!(panics.get(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_panics_each_time_does_not_spin() {
        let (began, mut begun) = (Instant::now(), 0);
        let ended = begin_again(Counter::default(), || {
            begun += 1;
            let nth = begun;
            async move { assert!(nth > 10, "a panic that is meant") }
        });
        ended.await;
        assert!(began.elapsed() >= Duration::from_secs(1));
    }
}
