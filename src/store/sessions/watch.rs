//! Who is to be told at once when a session ends: connections that have switched protocols and live on.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::policy::session::SessionId;

/// The watches of one entry of `sessions`.
#[derive(Debug, Default)]
pub struct Watchers(Mutex<HashMap<SessionId, watch::Sender<bool>>>);

/// A look-out for the end of one session.
#[derive(Debug)]
pub struct Watch {
    id: SessionId,
    /// `None` once it is being dropped.
    ended: Option<watch::Receiver<bool>>,
    of: Arc<Watchers>,
}

impl Watchers {
    /// Begins to look out; a session that has ended already is never told.
    pub fn watch(self: &Arc<Self>, id: SessionId) -> Watch {
        let mut watched = self.0.lock();
        let sender = watched.entry(id).or_default();
        Watch {
            id,
            ended: Some(sender.subscribe()),
            of: self.clone(),
        }
    }

    /// Tells those who watch it.
    pub(super) fn end(&self, id: SessionId) {
        if let Some(sender) = self.0.lock().remove(&id) {
            sender.send_replace(true);
        }
    }
}

impl Watch {
    /// Waits until it is told that the session has ended; timeouts are not told.
    pub async fn ended(&mut self) {
        if let Some(told) = &mut self.ended {
            // An error means that nobody is left to tell, which is so once it has ended.
            let _ = told.wait_for(|ended| *ended).await;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.of.0.lock();
        // Below the lock, so that of several that leave at once one is the last.
        self.ended = None;
        let is_last = |sender: &watch::Sender<bool>| sender.receiver_count() == 0;
        if watched.get(&self.id).is_some_and(is_last) {
            watched.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_kept_for_as_long_as_it_is_watched() {
        let watchers = Arc::<Watchers>::default();
        let id = SessionId {
            hash: [7; 16],
            user: None,
        };
        let [first, second] = [watchers.watch(id), watchers.watch(id)];
        drop(first);
        assert_eq!(watchers.0.lock().len(), 1);
        drop(second);
        assert_eq!(watchers.0.lock().len(), 0);
    }
}
