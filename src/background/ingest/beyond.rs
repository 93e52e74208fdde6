//! Streams beyond those of this worker's `audit.stream.shards`: weirs whose file says more put batches there, as while a change of it is
//! rolled out, and what is there must not stay for want of a reader. Looks which of them have some; does not read them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::gather::Unread;
use crate::store::streams::consume::{Lag, Streams};

/// Between looks, each of which asks some 250 streams.
const EVERY: Duration = Duration::from_secs(15);

/// What those that had something said at the last look, and when.
#[derive(Default)]
pub(super) struct Beyond(Mutex<BTreeMap<u16, (Lag, Instant)>>);

impl Beyond {
    /// Those with batches that are the `n`th's of so many loops.
    pub(super) fn of(&self, n: usize, loops: usize) -> Vec<u16> {
        let known = self.0.lock();
        let have = known.iter().filter(|(_, (lag, _))| lag.waiting > 0);
        let shards = have.map(|(shard, _)| *shard);
        shards
            .filter(|shard| usize::from(*shard) % loops == n)
            .collect()
    }

    /// How far their storing is behind: what waited then has got older.
    pub(super) fn lag(&self, now: Instant) -> Lag {
        let known = self.0.lock();
        let aged = known.values().map(|(lag, at)| match lag.waiting {
            0 => *lag,
            _ => lag.aged(now.saturating_duration_since(*at)),
        });
        aged.sum()
    }

    /// One that did not answer stays as it was. Those that have nothing any more.
    fn note(&self, said: &[(u16, Lag)], now: Instant) -> Vec<u16> {
        let mut known = self.0.lock();
        let mut gone = Vec::new();
        for (shard, lag) in said {
            if *lag != Lag::default() {
                known.insert(*shard, (*lag, now));
            } else if known.remove(shard).is_some() {
                gone.push(*shard);
            }
        }
        gone
    }
}

/// Looks for ever.
pub(super) async fn watch(streams: Arc<Streams>, beyond: Arc<Beyond>, unread: Arc<Mutex<Unread>>) {
    let mut told = BTreeSet::new();
    loop {
        let said = streams.lags_beyond().await;
        for shard in beyond.note(&said, Instant::now()) {
            // No one asks it again, who would note it.
            unread.lock().answers(shard);
        }
        let shards = beyond.of(0, 1).into_iter();
        let new: Vec<_> = shards.filter(|shard| told.insert(*shard)).collect();
        if !new.is_empty() {
            warn!(
                shards = ?new,
                "streams of the audit beyond audit.stream.shards have batches; they are stored, too"
            );
        }
        sleep(EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_read_and_gets_older_and_dead_letters_are_counted_alone() {
        let lag = |waiting, dead_letters| Lag {
            oldest: Duration::from_secs(waiting),
            waiting,
            pending: 0,
            dead_letters,
        };
        let (beyond, began) = (Beyond::default(), Instant::now());
        let later = began + Duration::from_secs(9);
        let said = [(8, lag(2, 0)), (9, lag(0, 1)), (11, lag(0, 0))];
        assert!(beyond.note(&said, began).is_empty());
        assert_eq!((beyond.of(0, 2), beyond.of(1, 2)), (vec![8], vec![]));
        assert_eq!(beyond.lag(later).oldest, Duration::from_secs(11));
        assert_eq!(beyond.lag(later).dead_letters, 1);
        assert_eq!(beyond.note(&[(8, lag(0, 0))], later), [8]);
        assert_eq!(beyond.lag(later), lag(0, 1));
    }
}
