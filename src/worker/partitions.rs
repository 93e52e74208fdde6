//! Keeps the days of the audit in Postgres: makes them ahead, indexes those that are over, and removes old ones. Of all workers
//! one does it at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::config::Secret;
use crate::store::chain::Hasher;
use crate::store::days::Day;
use crate::store::postgres::{Client, Postgres, PostgresError, partitions};
use crate::telemetry::drain_metrics::DrainMetrics;

/// Between looks.
const EVERY: Duration = Duration::from_secs(60);
/// Before an index that could not be built is tried again: each try reads the whole day.
const INDEX_AGAIN: Duration = Duration::from_secs(3_600);

/// Days whose index could not be built, and when that was tried.
pub type Unindexed = HashMap<Day, Instant>;

/// Keeps the days until `shutdown` is true. `retention` is how long a day is kept, `key` the one of the audit's hash chain.
pub async fn run(
    postgres: Arc<Postgres>,
    retention: Duration,
    key: Option<Secret>,
    metrics: DrainMetrics,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let hasher = Hasher::new(key.as_ref().map(|key| key.0.as_bytes()));
    let mut trouble = false;
    let mut unindexed = Unindexed::new();
    loop {
        let keeping = keep_once(&postgres, retention, &hasher, &metrics, &mut unindexed);
        let kept = tokio::select! {
            kept = keeping => kept,
            // What was under way is undone, or done again later.
            _ = shutdown.wait_for(|shutdown| *shutdown) => return Ok(()),
        };
        match kept {
            Ok(()) => trouble = false,
            Err(error) => {
                if !trouble {
                    warn!(%error, "the audit's days cannot be kept; it is tried again");
                }
                trouble = true;
            }
        }
        let stopped = timeout(EVERY, shutdown.wait_for(|shutdown| *shutdown)).await;
        if stopped.is_ok() {
            return Ok(());
        }
    }
}

/// One look; nothing is done where another worker is at it.
pub async fn keep_once(
    postgres: &Postgres,
    retention: Duration,
    hasher: &Hasher,
    metrics: &DrainMetrics,
    unindexed: &mut Unindexed,
) -> Result<(), PostgresError> {
    let keep = async |connection: &mut Client| {
        partitions::make_ahead(connection).await?;
        let today = partitions::today(connection).await?;
        let oldest = partitions::oldest(today, retention);
        let days = partitions::list(connection).await?;
        let mut bad = Ok(());
        // A day that cannot be kept does not keep the others from it; the first error is told.
        for day in days.iter().filter(|day| **day < oldest) {
            bad = bad.and(remove(connection, *day, hasher, metrics).await);
        }
        if days.contains(&today) {
            bad = bad.and(partitions::summarize(connection, today).await);
        }
        // Last: an index takes as long as its day is large.
        let over = days.iter().filter(|day| (oldest..today).contains(*day));
        bad.and(index(connection, over, unindexed).await)
    };
    partitions::alone(postgres.write().await?, keep).await?;
    Ok(())
}

async fn remove(
    connection: &mut Client,
    day: Day,
    hasher: &Hasher,
    metrics: &DrainMetrics,
) -> Result<(), PostgresError> {
    partitions::remove(connection, day, hasher).await?;
    metrics.days_removed.inc();
    info!(%day, "a day of the audit was removed, as worker.retention says");
    Ok(())
}

/// Indexes those of some days that have no index, except where that failed a short while ago.
async fn index(
    connection: &Client,
    days: impl Iterator<Item = &Day>,
    unindexed: &mut Unindexed,
) -> Result<(), PostgresError> {
    unindexed.retain(|_, tried| tried.elapsed() < INDEX_AGAIN);
    let mut bad = Ok(());
    for day in days {
        if unindexed.contains_key(day) {
            continue;
        }
        match partitions::index(connection, *day).await {
            Ok(true) => info!(%day, "a day of the audit has its index by user"),
            Ok(false) => {}
            Err(error) => {
                unindexed.insert(*day, Instant::now());
                warn!(%day, %error, "a day of the audit has no index by user yet; it is tried again in an hour");
                bad = bad.and(Err(error));
                // The days behind it are not to blame.
                if connection.is_closed() {
                    break;
                }
            }
        }
    }
    bad
}
