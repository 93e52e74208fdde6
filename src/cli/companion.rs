//! The worker's tasks, as `weir worker` and `weir run` run them: on a runtime of their own, so that neither lanes nor the admin port wait
//! for a transaction. Must not know what is beside them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use serde_json::json;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::admin::health::check::{Check, Finding, Status};
use crate::admin::health::stores;
use crate::background::supervise::{AtStop, Supervisor};
use crate::background::{self, ingest, partitions};
use crate::config::Config;
use crate::heartbeat::Heartbeat;
use crate::policy::retry::Pauses;
use crate::store::fleet::Fleet;
use crate::store::postgres::migrate::{check_version, migrate};
use crate::store::postgres::{Postgres, PostgresError};
use crate::store::redis::Connections;
use crate::store::streams::consume::Streams;
use crate::telemetry::metrics::Metrics;

/// Between tries to reach Postgres, and to find its schema; the first alone, unless it refuses: each of those leaves a line in its log.
const PAUSES: Pauses = Pauses {
    first: Duration::from_secs(1),
    longest: Duration::from_secs(10),
};
/// For Postgres to be there when the process starts; it goes on without. Lanes need it for nothing, and begin once it had time to answer.
const START: Duration = Duration::from_secs(10);
const START_BESIDE_LANES: Duration = Duration::from_secs(1);

/// In what company the tasks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Runs {
    /// Lanes go on without Postgres.
    BesideLanes,
    Alone,
}

/// The tasks, and what there is to say of them.
pub(super) struct Companion {
    pub supervisor: Supervisor,
    /// Its own, of its runtime.
    pub postgres: Arc<Postgres>,
    pub checks: Vec<Check>,
    runtime: Background,
}

impl Companion {
    /// Begins. `config` is to have `postgres`, as those are opened already for this thread's runtime, and `audit`. An error
    /// where a human must act first, such as a schema that is newer than this weir; lanes do not wait for that, nor does it end them.
    pub(super) async fn begin(
        config: &Config,
        postgres: &Postgres,
        fleet: &Arc<Fleet>,
        metrics: &Arc<Metrics>,
        runs: Runs,
    ) -> anyhow::Result<Companion> {
        let settings = config.postgres.as_ref().context("no \"postgres\"")?;
        let audit = config.audit.as_ref().context("no \"audit\"")?;
        let runtime = Background::new()?;
        let handle = runtime.handle();
        let schema = Schema {
            postgres: postgres.for_other_runtime(settings)?,
            migrates: settings.migrate,
            runs,
            state: Arc::default(),
            missing: metrics.ingest.schema_missing.clone(),
        };
        schema.begin(handle).await?;
        let mut supervisor = Supervisor::new(handle.clone(), metrics.clone());
        let redis = {
            let _within = handle.enter();
            fleet.connect()
        };
        let settings = ingest::Settings {
            stream: audit.stream.clone(),
            worker: config.worker.clone(),
        };
        let connections = redis.main.clone();
        keep_ingested(
            &mut supervisor,
            schema.clone(),
            settings,
            fleet.clone(),
            connections,
            metrics,
        );
        let days = partitions::Settings {
            retention: config.worker.retention,
            key: audit.key.clone(),
            every: partitions::EVERY,
        };
        keep_days(&mut supervisor, schema.clone(), days, metrics);
        background::look_at_replicas(&mut supervisor, "replicas", schema.postgres.clone());
        let health = config.worker.health;
        let group = &config.worker.group;
        let streams = Streams::new(redis.main, &fleet.keys, &audit.stream, group);
        let lag = stores::audit_lag(Arc::new(streams), health);
        Ok(Companion {
            supervisor,
            checks: vec![schema.servers_check(health.timeout), schema.check(), lag],
            postgres: schema.postgres,
            runtime,
        })
    }

    /// Where the tasks run, and the checks are to.
    pub(super) fn runtime(&self) -> &Handle {
        self.runtime.handle()
    }

    /// Ends the tasks; a transaction that is under way has so long.
    pub(super) async fn stop(self, within: Duration) {
        self.supervisor.stop(within).await;
    }
}

/// Brings batches from the streams into Postgres.
fn keep_ingested(
    supervisor: &mut Supervisor,
    schema: Schema,
    settings: ingest::Settings,
    fleet: Arc<Fleet>,
    redis: Arc<Connections>,
    metrics: &Metrics,
) {
    let (metrics, stopping) = (metrics.ingest.clone(), supervisor.stopping());
    let begin = move |heartbeat: Heartbeat| {
        let run = ingest::run(
            settings.clone(),
            fleet.clone(),
            redis.clone(),
            schema.postgres.clone(),
            metrics.clone(),
            heartbeat.clone(),
            stopping.clone(),
        );
        schema.clone().then(run, heartbeat, stopping.clone())
    };
    supervisor.keep("ingest", background::SHORT_SILENCE, AtStop::Finish, begin);
}

/// Makes the tables of days ahead, and removes old ones.
fn keep_days(
    supervisor: &mut Supervisor,
    schema: Schema,
    settings: partitions::Settings,
    metrics: &Metrics,
) {
    let silence = settings.silence(schema.postgres.timeout);
    let (metrics, stopping) = (metrics.ingest.clone(), supervisor.stopping());
    let begin = move |heartbeat: Heartbeat| {
        let run = partitions::run(
            settings.clone(),
            schema.postgres.clone(),
            metrics.clone(),
            heartbeat.clone(),
            stopping.clone(),
        );
        schema.clone().then(run, heartbeat, stopping.clone())
    };
    supervisor.keep("partitions", silence, AtStop::Finish, begin);
}

/// The schema that the tasks work with.
#[derive(Clone)]
struct Schema {
    postgres: Arc<Postgres>,
    /// Whether it is brought up to date, or is to be.
    migrates: bool,
    runs: Runs,
    state: Arc<Mutex<State>>,
    /// 1 unless it is there.
    missing: Gauge,
}

/// Whether the schema is there.
#[derive(Debug, Default)]
enum State {
    #[default]
    Unknown,
    There,
    Missing(PostgresError),
}

impl Schema {
    /// Brings the schema, on the runtime that the pools belong to. Goes on without a Postgres that is not there yet, and beside lanes
    /// without one that refuses.
    async fn begin(&self, runtime: &Handle) -> anyhow::Result<()> {
        self.missing.set(1);
        let schema = self.clone();
        // A task of its own, which goes on: a connection that is let go of in the middle would keep its lock.
        let bring = runtime.spawn(async move { schema.bring().await });
        let within = match self.runs {
            Runs::BesideLanes => START_BESIDE_LANES,
            Runs::Alone => START,
        };
        match timeout(within, bring).await {
            Ok(brought) => match (brought?, self.runs) {
                (Ok(()), _) => {}
                (Err(error), _) if may_pass(&error) => {
                    warn!(%error, "postgres is not there yet; going on without");
                }
                (Err(_), Runs::BesideLanes) => {}
                (Err(error), Runs::Alone) => return Err(told(error)),
            },
            Err(_) => warn!("postgres does not answer yet; going on without"),
        }
        Ok(())
    }

    /// Does `run` once the schema is there, unless the process stops before. An error where Postgres refuses, unless there are lanes:
    /// they are not to end because the audit waits.
    async fn then(
        self,
        run: impl Future<Output = anyhow::Result<()>>,
        heartbeat: Heartbeat,
        mut stopping: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let mut pause = PAUSES.first;
        loop {
            // A schema may take its time, and another worker may be at it.
            heartbeat.rest();
            match (self.bring().await, self.runs) {
                (Ok(()), _) => {
                    heartbeat.beat();
                    return run.await;
                }
                (Err(error), _) if may_pass(&error) => pause = PAUSES.first,
                (Err(_), Runs::BesideLanes) => pause = PAUSES.after(pause),
                (Err(error), Runs::Alone) => return Err(told(error)),
            }
            tokio::select! {
                () = sleep(pause) => {}
                _ = stopping.wait_for(|stop| *stop) => return Ok(()),
            }
        }
    }

    /// For `/health`: what is stored waits for it.
    fn check(&self) -> Check {
        let missing = match self.runs {
            Runs::BesideLanes => Status::Degraded,
            Runs::Alone => Status::Critical,
        };
        let state = self.state.clone();
        Check::new("postgres_schema", missing, move || {
            let found = match &*state.lock() {
                State::There => Finding::new(Status::Ok, json!({})),
                State::Missing(error) => Finding::error(missing, error),
                State::Unknown => Finding::error(missing, "postgres did not answer yet"),
            };
            async move { found }
        })
    }

    /// Likewise, of the servers; without lanes the process is ready only with the primary.
    fn servers_check(&self, within: Duration) -> Check {
        let check = |down| stores::postgres(self.postgres.clone(), within, down);
        match self.runs {
            Runs::BesideLanes => check(Status::Degraded),
            Runs::Alone => check(Status::Critical).gating(),
        }
    }

    async fn bring(&self) -> Result<(), PostgresError> {
        let brought = self.try_to_bring().await;
        let is_new = !matches!(*self.state.lock(), State::There);
        self.note(&brought);
        if is_new && brought.is_ok() {
            self.look_for_a_pooler().await;
        }
        brought
    }

    async fn look_for_a_pooler(&self) {
        if matches!(self.postgres.shares_connections().await, Ok(true)) {
            warn!(
                "a pooler in front of postgres.write gives one connection's statements to several of the server's: what weir prepares, sets and locks is lost between them; have it keep a connection for one client (PgBouncer: pool_mode = session)"
            );
        }
    }

    /// Tells what is new of it. That the tasks of a worker fail is told by who keeps them.
    fn note(&self, brought: &Result<(), PostgresError>) {
        let mut state = self.state.lock();
        match (brought, &*state) {
            (Ok(()), State::Missing(_)) => info!("the schema is there: the audit is stored"),
            (Err(error), State::Missing(same)) if error == same => {}
            (Err(error), _) if self.runs == Runs::BesideLanes && !may_pass(error) => {
                let mend = error.mend();
                warn!(%error, mend, "the audit is not stored until this is mended; weir serves on without");
            }
            (Ok(()) | Err(_), _) => {}
        }
        self.missing.set(i64::from(brought.is_err()));
        *state = match brought {
            Ok(()) => State::There,
            Err(error) => State::Missing(error.clone()),
        };
    }

    async fn try_to_bring(&self) -> Result<(), PostgresError> {
        let connection = self.postgres.write().await?;
        if !self.migrates {
            return check_version(&connection).await;
        }
        let migrated = migrate(connection).await?;
        if migrated.from != migrated.to {
            info!(
                from = migrated.from,
                to = migrated.to,
                "schema brought up to date"
            );
        }
        Ok(())
    }
}

/// With what a human is to do.
fn told(error: PostgresError) -> anyhow::Error {
    match error.mend() {
        Some(mend) => anyhow!("{error}; {mend}"),
        None => error.into(),
    }
}

/// Whether the same may go well later, without anyone's doing.
fn may_pass(error: &PostgresError) -> bool {
    match error {
        PostgresError::Busy { .. }
        | PostgresError::Lost(_)
        | PostgresError::Late(_)
        | PostgresError::ReadOnly(_)
        | PostgresError::Alone(_) => true,
        // Connections, resources, an operator's intervention such as a start; and a primary that is a replica for now.
        PostgresError::Refused { code, .. } => {
            ["08", "53", "57"]
                .iter()
                .any(|class| code.starts_with(class))
                || code == "25006"
        }
        PostgresError::Beside { .. }
        | PostgresError::NoRows { .. }
        | PostgresError::Nonsense(_)
        | PostgresError::SchemaOld { .. }
        | PostgresError::SchemaNew { .. }
        | PostgresError::Encoding(_) => false,
    }
}

/// A runtime that ends in the background, since its end may not be waited for where others run.
struct Background(Option<Runtime>);

impl Background {
    fn new() -> std::io::Result<Background> {
        let mut runtime = Builder::new_multi_thread();
        let runtime = runtime.thread_name("weir-worker").enable_all();
        Ok(Background(Some(runtime.build()?)))
    }

    fn handle(&self) -> &Handle {
        let runtime = self.0.as_ref();
        runtime.expect("it is taken at its end").handle()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
