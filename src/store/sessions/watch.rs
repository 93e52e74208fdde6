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
    ended: watch::Receiver<bool>,
    of: Arc<Watchers>,
}

impl Watchers {
    /// Begins to look out; a session that has ended already is never told.
    pub fn watch(self: &Arc<Self>, id: SessionId) -> Watch {
        let mut watched = self.0.lock();
        let sender = watched.entry(id).or_default();
        Watch {
            id,
            ended: sender.subscribe(),
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
        // An error means that nobody is left to tell, which is so once it has ended.
        let _ = self.ended.wait_for(|ended| *ended).await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.of.0.lock();
        let last = |sender: &watch::Sender<bool>| sender.receiver_count() <= 1;
        if watched.get(&self.id).is_some_and(last) {
            watched.remove(&self.id);
        }
    }
}
