//! Tracks weir's outbound sockets, so that a transparent listener notices a connection that loops back: it would go round until there
//! are no more sockets.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use parking_lot::Mutex;

/// The near ends of connections that may come back. Of the process, as its sockets are.
static OPEN: Mutex<BTreeSet<SocketAddr>> = Mutex::new(BTreeSet::new());

/// A connection of weir's own, as long as this lives.
#[derive(Debug)]
pub struct Ours(SocketAddr);

impl Ours {
    /// Notes the connection whose near end is `near`.
    pub(super) fn note(near: SocketAddr) -> Ours {
        OPEN.lock().insert(near);
        Ours(near)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        OPEN.lock().remove(&self.0);
    }
}

/// Whether the connection whose far end is `far` is one of weir's own.
pub fn is_ours(far: SocketAddr) -> bool {
    OPEN.lock().contains(&far)
}
