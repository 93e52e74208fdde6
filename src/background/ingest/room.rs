//! Room for one batch that is larger than what a loop reads ahead, shared by all loops: each alone fits into a worker's memory, as
//! many as there are loops do not. Must not be waited for by who has it.

use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// Between looks at whether to wait on: who has the room may have it for as long as Postgres is away.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(super) struct Room(Semaphore);

/// Given back by its end.
pub(super) type Taken<'a> = SemaphorePermit<'a>;

impl Default for Room {
    fn default() -> Room {
        Room(Semaphore::new(1))
    }
}

impl Room {
    /// Waits while `wait_on`, which is asked at the start and again and again.
    pub(super) async fn take(&self, mut wait_on: impl FnMut() -> bool) -> Option<Taken<'_>> {
        let mut asked = std::pin::pin!(self.0.acquire());
        while wait_on() {
            if let Ok(taken) = timeout(LOOK_AGAIN, &mut asked).await {
                return taken.ok();
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_has_the_room_and_the_next_waits_for_its_end_or_ones_own() {
        let room = Room::default();
        let first = room.take(|| true).await.unwrap();
        let asked = Cell::new(0);
        let second = room.take(|| {
            asked.set(asked.get() + 1);
            true
        });
        let mut second = std::pin::pin!(second);
        assert!(timeout(LOOK_AGAIN * 10, &mut second).await.is_err());
        assert!(asked.get() >= 10, "it beats meanwhile: {}", asked.get());
        // Who is told to end goes without.
        let mut looks = 3;
        let third = room.take(|| {
            looks -= 1;
            looks > 0
        });
        assert!(third.await.is_none());
        drop(first);
        let second = second.await.unwrap();
        drop(second);
        assert!(room.take(|| true).await.is_some());
    }
}
