//! Streams beyond those of this worker's `audit.stream.shards`: weirs whose file says more put batches there, as while a change of it is
//! rolled out, and what is there must not stay for want of a reader. Looks which of them have some; does not read them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::sleep;
use tracing::warn;

use super::gather::Unread;
use crate::store::streams::consume::{Lag, Streams};

/// Between looks, each of which asks some 250 streams.
const EVERY: Duration = Duration::from_secs(15);

/// Those that had something at the last look, and how far their storing was behind.
#[derive(Default)]
pub(super) struct Beyond(Mutex<BTreeMap<u16, Lag>>);

impl Beyond {
    /// Those that are the `n`th's of so many loops.
    pub(super) fn of(&self, n: usize, loops: usize) -> Vec<u16> {
        let known = self.0.lock();
        let shards = known.keys().copied();
        shards
            .filter(|shard| usize::from(*shard) % loops == n)
            .collect()
    }

    pub(super) fn lag(&self) -> Lag {
        self.0.lock().values().copied().sum()
    }

    /// One that did not answer stays as it was. Those that have nothing any more.
    fn note(&self, said: &[(u16, Lag)]) -> Vec<u16> {
        let mut known = self.0.lock();
        let mut gone = Vec::new();
        for (shard, lag) in said {
            if *lag != Lag::default() {
                known.insert(*shard, *lag);
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
        for shard in beyond.note(&streams.lags_beyond().await) {
            // No one asks it again, who would note it.
            unread.lock().answers(shard);
        }
        for shard in beyond.of(0, 1) {
            if told.insert(shard) {
                warn!(
                    shard,
                    "a stream of the audit beyond audit.stream.shards has batches; they are stored, too"
                );
            }
        }
        sleep(EVERY).await;
    }
}
