//! Keeps the days of the audit in Postgres: makes them ahead, indexes those that are over, and removes old ones. Of all workers
//! one does it at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::Secret;
use crate::store::chain::Hasher;
use crate::store::days::Day;
use crate::store::postgres::{Client, Postgres, PostgresError, partitions};
use crate::telemetry::drain_metrics::DrainMetrics;

/// Between looks.
const EVERY: Duration = Duration::from_secs(60);

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
    loop {
        let keeping = keep_once(&postgres, retention, &hasher, &metrics);
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
) -> Result<(), PostgresError> {
    let keep = async |connection: &mut Client| {
        partitions::make_ahead(connection).await?;
        let today = partitions::today(connection).await?;
        let oldest = partitions::oldest(today, retention);
        let days = partitions::list(connection).await?;
        let mut bad = Ok(());
        // A day that cannot be kept does not keep the others from it; the first error is told.
        for day in &days {
            let kept = keep_day(connection, *day, today, oldest, hasher, metrics).await;
            bad = bad.and(kept);
        }
        bad
    };
    partitions::alone(postgres.write().await?, keep).await?;
    Ok(())
}

async fn keep_day(
    connection: &mut Client,
    day: Day,
    today: Day,
    oldest: Day,
    hasher: &Hasher,
    metrics: &DrainMetrics,
) -> Result<(), PostgresError> {
    if day < oldest {
        partitions::remove(connection, day, hasher).await?;
        metrics.days_removed.inc();
        info!(%day, "a day of the audit was removed, as worker.retention says");
    } else if day < today {
        if partitions::index(connection, day).await? {
            info!(%day, "a day of the audit has its index by user");
        }
    } else if day == today {
        partitions::summarize(connection, day).await?;
    }
    Ok(())
}
