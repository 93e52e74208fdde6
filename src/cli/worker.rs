//! `weir worker`: the companion of the proxies. Drains the audit into Postgres and sweeps sessions, until a signal ends it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

use super::companion::{Companion, Runs};
use super::run::bind;
use super::signals::Signals;
use super::{dependencies, load};
use crate::admin::app_health::AppProbes;
use crate::admin::health::check::Status;
use crate::admin::health::{Board, Health, machine, stores};
use crate::admin::{self, Admin};
use crate::clock;
use crate::config::Config;
use crate::config::redis::Redis;
use crate::net::tls::Secured;
use crate::plan::{Plan, Process};
use crate::proxy::reload;
use crate::store::fleet::Fleet;
use crate::store::postgres::Postgres;
use crate::store::sessions::Sweeper;
use crate::telemetry::log;
use crate::telemetry::metrics::Metrics;
use crate::worker;
use crate::worker::sessions::SharedSweep;
use crate::worker::supervise::{AtStop, Supervisor};

/// Runs until SIGTERM, SIGQUIT or SIGINT, and then ends what is under way. `migrate`: brings the schema up to date whatever the file says.
/// `wait_for_deps`: how long Redis and Postgres are waited for; without, it begins before they are there. An error too once a task
/// cannot be kept up.
pub fn run(file: PathBuf, migrate: bool, wait_for_deps: Option<Duration>) -> anyhow::Result<()> {
    let mut config = load(&file)?;
    log::init(config.log);
    let Some(redis) = config.redis.clone() else {
        bail!(missing(&file, "redis"));
    };
    match &mut config.postgres {
        Some(postgres) => postgres.migrate |= migrate,
        None => bail!(missing(&file, "postgres")),
    }
    // Breakers are of those that serve requests: a worker has no view of them, and no vote.
    for upstream in &mut config.upstreams {
        upstream.circuit_breaker = None;
    }
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    control.block_on(supervise(config, redis, wait_for_deps))
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
    let admin = bind(config.admin.address)?;
    let metrics_at = match config.metrics_address {
        Some(address) => Some(bind(address)?),
        None => None,
    };
    let metrics = Arc::<Metrics>::default();
    let tls_files = reload::TlsFiles::of_stores(&config);
    let fleet = Fleet::new(&redis, &metrics)?;
    let postgres = Postgres::new(config.postgres.as_ref().context("no \"postgres\"")?)?;
    let secured = Secured {
        stores: [&fleet.tls, &postgres.tls]
            .into_iter()
            .flatten()
            .cloned()
            .collect(),
        ..Secured::default()
    };
    let process = Process {
        metrics: metrics.clone(),
        fleet: Some(fleet.clone()),
        ..Process::default()
    };
    let plan = Plan::first(config, secured, process);
    let config = &plan.config;
    // From here on: what is waited for may be kept away by a certificate that has ended.
    let mut following = tokio::spawn(reload::stores_on_change(plan.clone(), tls_files));
    let redis_is_there = redis.connect_timeout;
    let redis = fleet.watch();
    if let Some(within) = wait_for_deps {
        tokio::select! {
            there = dependencies::wait(config, &fleet, &redis, &postgres, within) => there?,
            stopped = signals.stopped() => return stopped,
        }
    } else if !redis.ready(redis_is_there).await {
        warn!("redis is not there yet; going on without");
    }
    let begin = Companion::begin(config, &postgres, &fleet, &metrics, Runs::Alone);
    let mut companion = begin.await?;
    let mut control = Supervisor::new(Handle::current(), metrics.clone());
    let names: Vec<_> = config.sessions.iter().map(|it| it.name.clone()).collect();
    let sweep = SharedSweep {
        redis: redis.sessions.clone(),
        sweeper: Sweeper::new(&fleet),
        names: Box::new(move || names.clone()),
        metrics: metrics.clone(),
        every: config.worker.session_sweep,
    };
    worker::sweep_shared_sessions(&mut control, sweep);

    let mut checks = vec![machine::memory()];
    checks.extend(stores::redis(&redis, Status::Critical));
    checks.append(&mut companion.checks);
    let (bounds, drain) = (config.worker.health, config.drain);
    let board = Board::new(
        checks,
        bounds.timeout,
        bounds.cache,
        companion.runtime().clone(),
    );
    control.keep(
        "readiness",
        2 * bounds.interval + 2 * bounds.timeout,
        AtStop::Drop,
        {
            let board = board.clone();
            move |heartbeat| {
                let keep = board.clone().keep_ready(bounds.interval, heartbeat);
                async move { match keep.await {} }
            }
        },
    );
    // Apart from the companion's own view, which has connections of another runtime.
    worker::look_at_replicas(&mut control, "query_replicas", postgres.clone());
    let (unready, draining) = watch::channel(false);
    let mut tasks = control.watched();
    tasks.extend(companion.supervisor.watched());
    let health = Health {
        started: clock::now(),
        lanes: Vec::new(),
        tasks,
        draining,
        board,
    };
    let state = Arc::new(Admin {
        plan: watch::Sender::new(plan.clone()).subscribe(),
        redis: Some(redis),
        postgres: Some(postgres),
        writes: Some(companion.postgres.clone()),
        health,
        app_probes: AppProbes::default(),
    });
    let metrics_address = metrics_at
        .as_ref()
        .map(TcpListener::local_addr)
        .transpose()?;
    info!(admin = %admin.local_addr()?, metrics = metrics_address.map(tracing::field::display), "working");
    tokio::spawn(admin::serve(admin, state.clone()));
    if let Some(metrics) = metrics_at {
        tokio::spawn(admin::serve_metrics(metrics, state));
    }
    tokio::spawn(say_why_not_reload(hangup));
    let gave_up = tokio::select! {
        stopped = signals.stopped() => {
            stopped?;
            None
        }
        gave_up = control.gave_up() => Some(gave_up.into()),
        gave_up = companion.supervisor.gave_up() => Some(gave_up.into()),
        ended = &mut following => match ended {
            Ok(never) => match never {},
            Err(error) => Some(anyhow::Error::from(error)),
        },
    };
    info!("stopping");
    unready.send_replace(true);
    companion.stop(drain).await;
    match gave_up {
        Some(gave_up) => Err(gave_up),
        None => Ok(()),
    }
}

/// Nothing that a worker goes by can change while it runs, but for the files of its stores' TLS.
async fn say_why_not_reload(mut hangup: tokio::signal::unix::Signal) {
    while hangup.recv().await.is_some() {
        warn!("a worker reads its file at its start alone: restart it");
    }
}
