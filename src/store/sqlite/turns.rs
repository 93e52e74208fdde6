//! Whose turn it is to write, where several processes write to the same files without a pause, as for a moment when one replaces another.
//! SQLite's own lock goes to who asks in the moment that it is free, and that is mostly who has just let go of it. Owns no safety: without
//! a turn, SQLite's lock still decides.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::store::audit::days;

/// How long SQLite's lock is waited for by one whose turn it is: longer than a transaction and its syncs take, or it would be for nothing.
pub(super) const PATIENCE: Duration = Duration::from_millis(250);
/// Between two looks at whether it is our turn.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Whoever has it is done with waiting by then.
const LOOKS: u32 = 250;

/// A lock on the folder (flock(2)), which leaves nothing behind and is free once its holder is gone. It is held while SQLite's lock is waited
/// for, so that who has written must let the one behind go first.
#[derive(Debug)]
pub(super) struct Turns(File);

/// Until it is dropped.
pub(super) struct Turn<'t>(&'t File);

impl Turns {
    /// Of the files at `path`; `None` where the folder cannot be opened.
    pub(super) fn at(path: &Path) -> Option<Turns> {
        File::open(days::folder(path)).ok().map(Turns)
    }

    /// Waits for the next turn; `None` where it does not come soon, or the file system has no such locks.
    pub(super) fn next(&self) -> Option<Turn<'_>> {
        for _ in 0..LOOKS {
            if self.0.try_lock().is_ok() {
                return Some(Turn(&self.0));
            }
            thread::sleep(LOOK_EVERY);
        }
        None
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // It is given back with the file at the latest.
        let _ = self.0.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_has_a_turn_and_who_has_none_does_not_wait_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = [(); 2].map(|()| Turns::at(&folder.path().join("audit.db")).unwrap());
        let turn = a.next().unwrap();
        assert!(b.next().is_none());
        drop(turn);
        assert!(b.next().is_some());
        assert!(Turns::at(Path::new("audit.db")).is_some());
    }
}
