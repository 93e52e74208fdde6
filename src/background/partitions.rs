//! Keeps the days of the audit in Postgres: makes them ahead, indexes those that are over, and removes old ones. Of all workers
//! one does it at a time.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::config::Secret;
use crate::heartbeat::Heartbeat;
use crate::store::audit::chain::Hasher;
use crate::store::audit::days::Day;
use crate::store::postgres::{Client, Postgres, PostgresError, partitions};
use crate::telemetry::metrics::ingest::IngestMetrics;

/// Between looks of a worker.
pub const EVERY: Duration = Duration::from_secs(60);
/// Between asking whether the server is still at what takes long.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Before an index that could not be built is tried again: each try reads the whole day.
const INDEX_AGAIN: Duration = Duration::from_secs(3_600);

/// Days that could not be indexed or removed, and when that was tried, or given up for all.
pub type Undone = HashMap<Day, Instant>;

/// How days are kept.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a day is kept.
    pub retention: Duration,
    /// Of the audit's hash chain.
    pub key: Option<Secret>,
    /// Between looks.
    pub every: Duration,
}

impl Settings {
    /// For how long the task may be silent: several looks apart, and as long as a connection, the lock and the question whether the
    /// server is at work may take, each of which ends by `timeout`, the one of the pool.
    pub fn silence(&self, timeout: Duration) -> Duration {
        3 * (self.every + ASK_EVERY) + 8 * timeout
    }
}

/// Keeps the days until `shutdown` is true. Beats at each look, and while the server is at work or away.
pub async fn run(
    settings: Settings,
    postgres: Arc<Postgres>,
    metrics: IngestMetrics,
    heartbeat: Heartbeat,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let Settings {
        retention,
        key,
        every,
    } = settings;
    let hasher = Hasher::new(key.as_ref().map(|key| key.0.as_bytes()));
    let mut trouble = false;
    let mut undone = Undone::new();
    loop {
        heartbeat.beat();
        let keeping = keep_once(
            &postgres,
            retention,
            &hasher,
            &metrics,
            &mut undone,
            &heartbeat,
        );
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
        let stopped = timeout(every, shutdown.wait_for(|shutdown| *shutdown)).await;
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
    metrics: &IngestMetrics,
    undone: &mut Undone,
    heartbeat: &Heartbeat,
) -> Result<(), PostgresError> {
    let mut keep = async |connection: &mut Client| {
        // A day that cannot be made or kept does not keep the others from it: on a full volume, old ones must go. The first error is
        // told.
        let mut bad = partitions::make_ahead(connection).await;
        let today = partitions::today(connection).await?;
        let oldest = partitions::oldest(today, retention);
        let days = partitions::list(connection).await?;
        let mut old: Vec<_> = days.iter().filter(|day| **day < oldest).collect();
        // Behind the others those that someone held the last time.
        old.sort_by_key(|day| undone.get(day).copied());
        for day in old {
            let removed = remove(connection, *day, hasher, metrics).await;
            let is_held = removed.as_ref().is_err_and(PostgresError::is_held);
            bad = bad.and(removed);
            // All that store and query wait meanwhile behind who waits to remove a day: once a look is enough.
            if is_held {
                undone.insert(*day, Instant::now());
                break;
            }
        }
        if days.contains(&today) {
            bad = bad.and(partitions::summarize(connection, today).await);
        }
        // Last: an index takes as long as its day is large.
        let over = days.iter().filter(|day| (oldest..today).contains(*day));
        bad.and(index(connection, over, undone).await)
    };
    let within = postgres.timeout;
    let keep = async |connection: &mut Client, backend| {
        beating(postgres, backend, heartbeat, keep(connection)).await
    };
    partitions::alone(postgres.write().await?, within, keep).await?;
    Ok(())
}

/// Does `work` by the connection that has this process at the server, however long that takes: an index takes as long as its day is
/// large. Beats while the server is at it, or cannot be asked; not where it waits for `work` and `work` for nothing that will come.
pub async fn beating<T>(
    postgres: &Postgres,
    backend: i32,
    heartbeat: &Heartbeat,
    work: impl Future<Output = T>,
) -> T {
    tokio::select! {
        done = work => done,
        never = ask(postgres, backend, heartbeat) => match never {},
    }
}

async fn ask(postgres: &Postgres, backend: i32, heartbeat: &Heartbeat) -> Infallible {
    loop {
        sleep(ASK_EVERY).await;
        if !matches!(postgres.is_at_work(backend).await, Ok(false)) {
            heartbeat.beat();
        }
    }
}

async fn remove(
    connection: &mut Client,
    day: Day,
    hasher: &Hasher,
    metrics: &IngestMetrics,
) -> Result<(), PostgresError> {
    partitions::remove(connection, day, hasher).await?;
    metrics.days_removed.inc();
    info!(%day, "a day of the audit was removed, as worker.retention says");
    Ok(())
}

/// Indexes those of some days that have no index, except where that failed a short while ago. Behind one that waits in vain for
/// another's transaction no more is tried meanwhile: each would wait for it as long, and days are neither made nor removed until then.
async fn index(
    connection: &Client,
    mut days: impl Iterator<Item = &Day>,
    undone: &mut Undone,
) -> Result<(), PostgresError> {
    undone.retain(|_, tried| tried.elapsed() < INDEX_AGAIN);
    let mut bad = Ok(());
    while let Some(day) = days.next() {
        if undone.contains_key(day) {
            continue;
        }
        match partitions::index(connection, *day).await {
            Ok(true) => info!(%day, "a day of the audit has its index by user"),
            Ok(false) => {}
            Err(error) => {
                undone.insert(*day, Instant::now());
                warn!(%day, %error, "a day of the audit has no index by user yet; it is tried again in an hour");
                let is_held = error.is_held();
                bad = bad.and(Err(error));
                if is_held {
                    undone.extend(days.by_ref().map(|day| (*day, Instant::now())));
                }
                // The days behind it are not to blame.
                if connection.is_closed() {
                    break;
                }
            }
        }
    }
    bad
}
