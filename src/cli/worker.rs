//! `weir worker`: the companion of the proxies. Ingests the audit into Postgres and sweeps sessions, until a signal ends it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

use super::companion::Runs;
use super::control::{self, AdminPorts, Tasks, tls_of};
use super::run::bind;
use super::service_manager::{self, State};
use super::signals::Signals;
use super::watched_files::TlsFiles;
use super::{begin_to_log, dependencies, load, reload};
use crate::admin::app_health::AppProbes;
use crate::admin::health::check::Status;
use crate::admin::health::{Board, machine, stores};
use crate::admin::{Admin, Refusals};
use crate::background;
use crate::background::supervise::Supervisor;
use crate::config::Config;
use crate::config::redis::Redis;
use crate::config::worker::Health as Bounds;
use crate::net::tls::Secured;
use crate::plan::{Plan, Process};
use crate::store::fleet::Fleet;
use crate::store::postgres::Postgres;
use crate::telemetry::metrics::Metrics;

/// Runs until SIGTERM, SIGQUIT or SIGINT, and then ends what is under way, at once where one comes again. `migrate`: brings the schema up to date whatever the file says.
/// `wait_for_deps`: how long Redis and Postgres are waited for; without, it begins before they are there. An error too once a task
/// cannot be kept up.
pub fn run(file: PathBuf, migrate: bool, wait_for_deps: Option<Duration>) -> anyhow::Result<()> {
    control::serve(|| {
        let mut config = load(&file)?;
        begin_to_log(config.log);
        let Some(redis) = config.redis.clone() else {
            bail!(missing(&file, "redis"));
        };
        match &mut config.postgres {
            Some(postgres) => postgres.migrate |= migrate,
            None => bail!(missing(&file, "postgres")),
        }
        // Both are of those that serve requests: a worker has no view of endpoints to tell of, and no vote on breakers.
        config.routes.clear();
        config.upstreams.clear();
        Ok(supervise(config, redis, wait_for_deps))
    })
}

fn missing(file: &Path, section: &str) -> String {
    format!(
        "{} has no \"{section}\": a worker brings the audit from redis into postgres; add it, or use weir run, which needs neither",
        file.display()
    )
}

async fn supervise(
    config: Config,
    redis: Redis,
    wait_for_deps: Option<Duration>,
) -> anyhow::Result<()> {
    // Listening to signals begins before the line that says the worker is up, so that none is missed.
    let mut signals = Signals::listen()?;
    let hangup = signal(SignalKind::hangup())?;
    let ports = AdminPorts::open(&config, bind)?;
    let metrics = Arc::<Metrics>::default();
    let tls_files = TlsFiles::of_stores(&config);
    let fleet = Fleet::new(&redis, &metrics)?;
    let postgres = Postgres::new(config.postgres.as_ref().context("no \"postgres\"")?)?;
    let secured = Secured {
        stores: tls_of(Some(&fleet), Some(&postgres)),
        ..Secured::default()
    };
    reload::warn_of_dates(&secured);
    let process = Process {
        metrics: metrics.clone(),
        fleet: Some(fleet.clone()),
        ..Process::default()
    };
    let plan = Plan::first(config, secured, process);
    let config = &plan.config;
    // From here on: what is waited for may be kept away by a certificate that has ended.
    let mut renewing = tokio::spawn(reload::stores_on_change(plan.clone(), tls_files));
    let redis = fleet.watch();
    if let Some(within) = wait_for_deps {
        tokio::select! {
            there = dependencies::wait(config, &fleet, &redis, &postgres, within) => there?,
            stopped = signals.stopped() => return stopped,
        }
    } else {
        let is_there = tokio::select! {
            is_there = redis.ready(fleet.ready_within()) => is_there,
            stopped = signals.stopped() => return stopped,
        };
        if !is_there {
            warn!("redis is not there yet; going on without");
        }
    }

    // No other plan comes: nothing is reloaded.
    let plans = watch::Sender::new(plan.clone()).subscribe();
    let mut tasks = Tasks::new(&metrics);
    let begin = tasks.begin_companion(config, &postgres, &fleet, Runs::Alone);
    tokio::select! {
        begun = begin => begun?,
        stopped = signals.stopped() => return stopped,
    }
    background::sweep_shared_sessions(&mut tasks.control, &plans, &redis);
    tasks.look_at_replicas(&postgres);
    let mut checks = vec![machine::memory()];
    checks.extend(stores::redis(&redis, Status::Critical));
    let board = tasks.board(checks, config.worker.health);
    keep_ready(&mut tasks.control, &board, config.worker.health);

    let (health, unready) = tasks.health(board, Vec::new());
    let (admin_at, metrics_at) = ports.addresses()?;
    let metrics_at = metrics_at.map(tracing::field::display);
    info!(admin = %admin_at, metrics = metrics_at, "working");
    let _serving = ports.serve(Admin {
        plan: plans,
        redis: Some(redis),
        postgres: Some(postgres),
        writes: tasks.writes(),
        disk: None,
        health,
        app_probes: AppProbes::default(),
        leave: None,
        refusals: Refusals::default(),
    });
    tokio::spawn(say_why_not_reload(hangup));
    service_manager::tell(State::Ready);
    let gave_up = tokio::select! {
        stopped = signals.stopped() => {
            stopped?;
            None
        }
        gave_up = tasks.gave_up() => Some(gave_up.into()),
        ended = &mut renewing => match ended {
            Ok(never) => match never {},
            Err(error) => Some(anyhow::Error::from(error)),
        },
    };
    info!("stopping");
    service_manager::tell(State::Stopping);
    unready.send_replace(true);
    if let Some(companion) = tasks.companion {
        tokio::select! {
            () = companion.stop(config.drain) => {}
            () = signals.once_more(gave_up.is_none()) => {}
        }
    }
    match gave_up {
        Some(gave_up) => Err(gave_up),
        None => Ok(()),
    }
}

/// Keeps it known whether what the worker needs is there.
fn keep_ready(control: &mut Supervisor, board: &Arc<Board>, bounds: Bounds) {
    let silence = 2 * bounds.interval + 2 * bounds.timeout;
    let board = board.clone();
    control.keep_forever("readiness", silence, move |heartbeat| {
        board.clone().keep_ready(bounds.interval, heartbeat)
    });
}

/// Nothing that a worker goes by can change while it runs, but for the files of its stores' TLS.
async fn say_why_not_reload(mut hangup: tokio::signal::unix::Signal) {
    while hangup.recv().await.is_some() {
        warn!("a worker reads its file at its start alone: restart it");
    }
}
