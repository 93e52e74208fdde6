//! Places for what comes from outside, so many at a time. Where all are taken, the one that has been silent for longest makes room: who says
//! nothing must not keep others out. Must not know what comes.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

/// Of one kind.
#[derive(Debug)]
pub struct Places {
    free: Arc<Semaphore>,
    silent: Arc<Mutex<Silent>>,
    patience: Duration,
}

/// Who is waited for, the one that has been for longest first.
#[derive(Debug, Default)]
struct Silent {
    leave: BTreeMap<u64, oneshot::Sender<()>>,
    last: u64,
}

/// Given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    silent: Arc<Mutex<Silent>>,
    own: Mutex<Own>,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Own {
    /// By this number.
    Silent(u64),
    Heard(Option<oneshot::Sender<()>>),
}

impl Silent {
    fn put(&mut self, leave: oneshot::Sender<()>) -> u64 {
        self.last += 1;
        self.leave.insert(self.last, leave);
        self.last
    }
}

impl Places {
    pub fn new(count: usize) -> Places {
        Places {
            free: Arc::new(Semaphore::new(count)),
            silent: Arc::default(),
            patience: Duration::ZERO,
        }
    }

    /// Where all are taken, whoever comes waits so long for one before another has to leave: many that come at once are slow to be heard, too.
    pub fn patient(self, patience: Duration) -> Places {
        Places { patience, ..self }
    }

    /// A place once there is one, and what resolves to `Ok` if it has to be left. Whoever takes it is silent at first.
    pub async fn take(&self) -> Result<(Place, oneshot::Receiver<()>), AcquireError> {
        let mut permit = pin!(self.free.clone().acquire_owned());
        let permit = match timeout(self.patience, permit.as_mut()).await {
            Ok(permit) => permit?,
            Err(_) => {
                if let Some((_, oldest)) = self.silent.lock().leave.pop_first() {
                    // It may be gone already.
                    let _ = oldest.send(());
                }
                permit.await?
            }
        };
        let (leave, left) = oneshot::channel();
        let number = self.silent.lock().put(leave);
        let place = Place {
            silent: self.silent.clone(),
            own: Mutex::new(Own::Silent(number)),
            _permit: permit,
        };
        Ok((place, left))
    }
}

impl Place {
    /// All that was waited for has come: it is not to be left while that is seen to.
    pub fn heard(&self) {
        let mut own = self.own.lock();
        if let Own::Silent(number) = *own {
            *own = Own::Heard(self.silent.lock().leave.remove(&number));
        }
    }

    /// More is waited for.
    pub fn silent(&self) {
        let mut own = self.own.lock();
        if let Own::Heard(leave) = &mut *own
            && let Some(leave) = leave.take()
        {
            *own = Own::Silent(self.silent.lock().put(leave));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.heard();
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_that_is_soon_heard_need_not_leave() {
        let places = Places::new(1).patient(Duration::from_secs(1));
        let (first, mut told) = places.take().await.unwrap();
        let mut second = pin!(places.take());
        let waiting = timeout(Duration::from_millis(900), second.as_mut());
        assert!(waiting.await.is_err());
        assert!(told.try_recv().is_err());
        // Heard, it is not to leave, however long the next one waits.
        first.heard();
        let waiting = timeout(Duration::from_secs(9), second.as_mut());
        assert!(waiting.await.is_err());
        assert!(told.try_recv().is_err());
        drop(first);
        assert!(second.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_stays_silent_has_to_leave() {
        for patience in [Duration::ZERO, Duration::from_secs(1)] {
            let places = Places::new(1).patient(patience);
            let (first, told) = places.take().await.unwrap();
            let began = tokio::time::Instant::now();
            let mut second = pin!(places.take());
            let mut told = pin!(told);
            poll_fn(|context| {
                assert!(second.as_mut().poll(context).is_pending());
                told.as_mut().poll(context)
            })
            .await
            .unwrap();
            assert!(began.elapsed() <= patience + Duration::from_millis(2));
            drop(first);
            assert!(second.await.is_ok());
        }
    }
}
