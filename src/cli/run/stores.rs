//! Where the process keeps what outlives a request: its connections to Redis and Postgres, and the audit; and what `/health` asks of them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use tracing::warn;

use super::Role;
use crate::admin::health::check::{Check, Finding, Status};
use crate::admin::health::{machine, stores};
use crate::audit::ship::{MEMORY, Shipping};
use crate::audit::{self, Recorder};
use crate::cli::control::tls_of;
use crate::clock;
use crate::config::Config;
use crate::config::audit::{Audit, Delivery};
use crate::config::redis::Redis;
use crate::net::tls::StoreTls;
use crate::store::audit::StoreError;
use crate::store::audit::batch::Boot;
use crate::store::audit::chain::Hasher;
use crate::store::audit::days;
use crate::store::fleet::{Fleet, FleetConnections};
use crate::store::postgres::Postgres;
use crate::store::spool::Spool;
use crate::store::sqlite::{Files, Writer};
use crate::telemetry::metrics::Metrics;

/// Events that wait in memory to be written, at most, where they are not so large that their bytes are bounded first. Some 600 bytes each as a rule.
const AUDIT_QUEUE: usize = 50_000;

/// What the file asks for of it; the connections are the control thread's.
pub(super) struct Stores {
    pub fleet: Option<Arc<Fleet>>,
    /// Where there is a fleet.
    pub redis: Option<FleetConnections>,
    pub postgres: Option<Arc<Postgres>>,
    /// Where the audit's events go, and what brings them on.
    pub audit: Option<(Recorder, audit::Writers)>,
}

impl Stores {
    /// Waits for Redis, but not for ever. An error where a human must act first.
    pub(super) async fn begin(
        config: &Config,
        role: Role,
        metrics: &Metrics,
    ) -> anyhow::Result<Stores> {
        let (fleet, redis) = match &config.redis {
            Some(redis) => {
                let (fleet, redis) = join_fleet(redis, metrics).await?;
                (Some(fleet), Some(redis))
            }
            None => (None, None),
        };
        let postgres = config.postgres.as_ref().map(Postgres::new).transpose()?;
        let ships = config.postgres.is_some();
        let audit = config.audit.as_ref();
        let audit = audit.map(|audit| begin_audit(audit, ships, fleet.as_ref(), role));
        let audit = audit.transpose()?;
        if let Some((recorder, _)) = &audit {
            recorder.count_panics(&metrics.tasks.panics);
        }
        Ok(Stores {
            audit,
            fleet,
            redis,
            postgres,
        })
    }

    /// What they are spoken to by, where that is TLS.
    pub(super) fn tls(&self) -> Vec<Arc<StoreTls>> {
        tls_of(self.fleet.as_deref(), self.postgres.as_deref())
    }

    /// What `/health` looks at in a process with lanes. Without Redis limits, breakers and sessions do what the file says: that is worse, and
    /// no reason to be unready.
    pub(super) fn checks(&self, config: &Config) -> Vec<Check> {
        let recorder = self.audit.as_ref().map(|(recorder, _)| recorder);
        let mut checks = vec![machine::memory()];
        if let Some(redis) = &self.redis {
            checks.extend(stores::redis(redis, Status::Degraded));
        }
        if let Some(recorder) = recorder {
            let recorder = recorder.clone();
            checks.push(Check::new("audit", Status::Degraded, move || {
                let found =
                    stores::queue(recorder.counts(), recorder.capacity(), recorder.troubles());
                async move { found }
            }));
        }
        let written = written(config);
        if let Some((recorder, path)) = recorder.zip(written.clone())
            && config.postgres.is_some()
        {
            let recorder = recorder.clone();
            checks.push(Check::new("spool", Status::Degraded, move || {
                let found = match recorder.counts().spool {
                    Some(spool) => stores::spool(spool, recorder.refuses()),
                    None => Finding::error(Status::Degraded, unused(&path)),
                };
                async move { found }
            }));
        }
        checks.extend(written.map(|path| machine::disk(vec![path])));
        checks
    }
}

/// What the audit writes to the disk: the spool, or SQLite's files.
pub(super) fn written(config: &Config) -> Option<PathBuf> {
    let audit = config.audit.as_ref()?;
    Some(match config.postgres {
        Some(_) => audit.spool.path.clone(),
        None => audit.sqlite.clone(),
    })
}

/// What becomes of events without a spool, and the mend.
fn unused(path: &Path) -> String {
    format!(
        "{} could not be used at the start, so that audit events which redis does not take wait in memory alone: mend what the log said then, and restart weir",
        path.display()
    )
}

/// Begins what the process does among others. Waits for their state, but not for ever: without it each limit does what it is to
/// do then.
async fn join_fleet(
    config: &Redis,
    metrics: &Metrics,
) -> anyhow::Result<(Arc<Fleet>, FleetConnections)> {
    let fleet = Fleet::new(config, metrics)?;
    let redis = fleet.join();
    if !redis.ready(fleet.ready_within()).await {
        warn!("redis is not there yet; going on without");
    }
    Ok((fleet, redis))
}

/// Into SQLite, unless there is a worker to ship to.
fn begin_audit(
    config: &Audit,
    ship: bool,
    fleet: Option<&Arc<Fleet>>,
    role: Role,
) -> anyhow::Result<(Recorder, audit::Writers)> {
    match fleet.filter(|_| ship) {
        Some(fleet) => ship_audit(config, fleet, role),
        None => write_audit(config),
    }
}

fn write_audit(config: &Audit) -> anyhow::Result<(Recorder, audit::Writers)> {
    let path = config.sqlite.clone();
    let key = config.key.as_ref().map(|key| key.0.as_bytes().to_vec());
    let (delivery, retention) = (config.delivery, config.retention);
    let files = Files::new(&path, key.as_deref());
    let open = move || {
        let writer = Writer::open(&path, &instance(), key.as_deref(), clock::wall())?;
        match delivery {
            Delivery::BestEffort => Ok(writer),
            Delivery::Guaranteed => writer.sync_each(),
        }
    };
    let (recorder, writers) = match (open(), delivery) {
        (Ok(writer), _) => audit::sqlite::start(writer, AUDIT_QUEUE, delivery, retention)?,
        (Err(error), Delivery::BestEffort) if may_be_mended(&error) => {
            audit::sqlite::start_once_mended(files, open, AUDIT_QUEUE, retention)?
        }
        (Err(StoreError::OfDay(day, error)), _) => {
            let file = days::file(&config.sqlite, day);
            let folder = file
                .parent()
                .filter(|folder| !folder.as_os_str().is_empty());
            let mend = match folder {
                Some(folder) if !folder.exists() => "make its folder, writable by weir's user",
                Some(_) | None if is_denied(&error) => "weir's user needs to write there",
                Some(_) | None => "if the file is damaged, move it away",
            };
            return Err(error).context(format!(
                "cannot write the audit to {}; {mend}",
                file.display()
            ));
        }
        (Err(error), _) => {
            let cannot = format!("cannot write the audit to {}", config.sqlite.display());
            return Err(error).context(cannot);
        }
    };
    Ok((recorder, writers))
}

fn is_denied(error: &StoreError) -> bool {
    matches!(error, StoreError::Folder(error) if error.kind() == ErrorKind::PermissionDenied)
}

/// While weir runs: by retention, or by whoever moves a file away.
fn may_be_mended(error: &StoreError) -> bool {
    // A weir that is put back behind a newer one must serve.
    let of_day =
        |error: &StoreError| matches!(error, StoreError::Damaged(_) | StoreError::Version { .. });
    matches!(error, StoreError::Full)
        || matches!(error, StoreError::OfDay(_, error) if of_day(error))
}

fn ship_audit(
    config: &Audit,
    fleet: &Arc<Fleet>,
    role: Role,
) -> anyhow::Result<(Recorder, audit::Writers)> {
    let hasher = Hasher::new(config.key.as_ref().map(|key| key.0.as_bytes()));
    let now = clock::wall();
    let id = clock::uuid(now);
    let (path, max) = (&config.spool.path, config.spool.max);
    let opened = Spool::open(path, max, id)
        .with_context(|| format!("cannot use {} as audit.spool.path", path.display()));
    let (spool, abandoned) = match (opened, config.delivery) {
        (Ok((spool, abandoned)), _) => (Some(spool), abandoned),
        (Err(error), Delivery::Guaranteed) => return Err(error),
        (Err(error), Delivery::BestEffort) => {
            warn!(
                error = format!("{error:#}"),
                "audit events that redis does not take wait in memory alone"
            );
            (None, Vec::new())
        }
    };
    let shipping = Shipping {
        boot: Boot::new(instance(), id, now.into(), hasher.clone()),
        hasher,
        stream: config.stream.clone(),
        delivery: config.delivery,
        is_stored_here: role == Role::All,
        spool,
        abandoned,
        fleet: fleet.clone(),
        memory: MEMORY,
    };
    Ok(audit::ship::start(shipping, AUDIT_QUEUE)?)
}

/// The host's name, which in Kubernetes is the pod's.
fn instance() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}
