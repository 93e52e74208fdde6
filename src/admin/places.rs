//! The places of a port: so many connections at a time. Where all are taken, the oldest whose caller has not sent a whole head yet
//! makes room: who says nothing must not keep a probe out.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, oneshot};

/// Of one port.
#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    silent: Arc<Mutex<BTreeMap<u64, oneshot::Sender<()>>>>,
    last: u64,
}

/// Given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    silent: Arc<Mutex<BTreeMap<u64, oneshot::Sender<()>>>>,
    _permit: OwnedSemaphorePermit,
}

impl Places {
    pub(super) fn new(count: usize) -> Places {
        Places {
            free: Arc::new(Semaphore::new(count)),
            silent: Arc::default(),
            last: 0,
        }
    }

    /// A place once there is one, and what resolves to `Ok` if it has to be left.
    pub(super) async fn take(&mut self) -> Result<(Place, oneshot::Receiver<()>), AcquireError> {
        if self.free.available_permits() == 0
            && let Some((_, oldest)) = self.silent.lock().pop_first()
        {
            // It may be gone already.
            let _ = oldest.send(());
        }
        let permit = self.free.clone().acquire_owned().await?;
        let (leave, left) = oneshot::channel();
        self.last += 1;
        self.silent.lock().insert(self.last, leave);
        let place = Place {
            number: self.last,
            silent: self.silent.clone(),
            _permit: permit,
        };
        Ok((place, left))
    }
}

impl Place {
    /// The caller has sent a whole head, and stays.
    pub(super) fn heard(&self) {
        self.silent.lock().remove(&self.number);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.heard();
    }
}
