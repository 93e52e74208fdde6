//! Tracks weir's outbound sockets, so that a transparent listener notices a connection that loops back: it would go round until there
//! are no more sockets.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;

use parking_lot::Mutex;

/// The near ends of connections that may come back, and of how many each is: Linux gives one to several whose far ends differ. Of the process,
/// as its sockets are.
static OPEN: Mutex<BTreeMap<SocketAddr, usize>> = Mutex::new(BTreeMap::new());

/// A connection of weir's own, as long as this lives.
#[derive(Debug)]
pub struct Ours(SocketAddr);

impl Ours {
    /// Notes the connection whose near end is `near`.
    pub(super) fn note(near: SocketAddr) -> Ours {
        *OPEN.lock().entry(near).or_default() += 1;
        Ours(near)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        if let Entry::Occupied(mut noted) = OPEN.lock().entry(self.0) {
            *noted.get_mut() -= 1;
            if *noted.get() == 0 {
                noted.remove();
            }
        }
    }
}

/// Whether the connection whose far end is `far` is one of weir's own.
pub fn is_ours(far: SocketAddr) -> bool {
    OPEN.lock().contains_key(&far)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_two_share_is_ours_until_both_are_gone() {
        let shared = SocketAddr::from(([192, 0, 2, 1], 7));
        let [first, second] = [Ours::note(shared), Ours::note(shared)];
        drop(first);
        assert!(is_ours(shared));
        drop(second);
        assert!(!is_ours(shared));
    }
}
