//! Places for what comes from outside, so many at a time. Where all are taken, the one that has been silent for longest makes room: who says
//! nothing must not keep others out. Must not know what comes.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, oneshot};

/// Of one kind.
#[derive(Debug)]
pub struct Places {
    free: Arc<Semaphore>,
    silent: Arc<Mutex<Silent>>,
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
        }
    }

    /// A place once there is one, and what resolves to `Ok` if it has to be left. Whoever takes it is silent at first.
    pub async fn take(&self) -> Result<(Place, oneshot::Receiver<()>), AcquireError> {
        if self.free.available_permits() == 0
            && let Some((_, oldest)) = self.silent.lock().leave.pop_first()
        {
            // It may be gone already.
            let _ = oldest.send(());
        }
        let permit = self.free.clone().acquire_owned().await?;
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
