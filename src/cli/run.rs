//! `weir run`: the lanes, the admin port and the reload, until a signal ends them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

use super::load;
use crate::admin::health::{Health, Heartbeat};
use crate::admin::{self, Admin};
use crate::audit::ship::Shipping;
use crate::audit::{self, Recorder};
use crate::clock;
use crate::config::Config;
use crate::config::audit::{Audit, Delivery};
use crate::config::redis::Redis;
use crate::plan::Plan;
use crate::proxy::reload::Fingerprint;
use crate::proxy::{lane, reload};
use crate::store::batch::Boot;
use crate::store::chain::Hasher;
use crate::store::fleet::{Fleet, FleetConnections};
use crate::store::spool::Spool;
use crate::store::sqlite::Writer;
use crate::telemetry::log;
use crate::telemetry::metrics::Metrics;
use crate::worker;

/// Events that wait in memory to be written, at most; some 600 bytes each.
const AUDIT_QUEUE: usize = 50_000;
/// For the last events to be written, once no request is in flight.
const AUDIT_WITHIN: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT; then drains.
pub fn run(file: PathBuf) -> anyhow::Result<()> {
    let seen = reload::fingerprint(&file);
    let config = load(&file)?;
    log::init(config.log);
    // The control thread: signals, reloads and the admin port, apart from the lanes.
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    control.block_on(supervise(config, file, seen))
}

async fn supervise(config: Config, file: PathBuf, seen: Option<Fingerprint>) -> anyhow::Result<()> {
    // Listening to the signal begins before the line that says weir is up, so that none is missed.
    let terminate = signal(SignalKind::terminate())?;
    let admin = bind(config.admin.address).await?;
    let metrics = match config.metrics_address {
        Some(address) => Some(bind(address).await?),
        None => None,
    };
    let lanes = config.lanes.or(thread::available_parallelism().ok());
    let mut addresses: Vec<_> = config
        .listeners
        .iter()
        .map(|listener| listener.address)
        .collect();
    let metrics_of_all = Arc::<Metrics>::default();
    let (fleet, redis) = match &config.redis {
        Some(redis) => {
            let (fleet, redis) = join_fleet(redis, &metrics_of_all).await?;
            (Some(fleet), Some(redis))
        }
        None => (None, None),
    };
    let ships = config.postgres.is_some();
    let (recorder, audit) = match &config.audit {
        Some(audit) => {
            let (recorder, worker) = begin_audit(audit, ships, fleet.as_ref())?;
            (Some(recorder), Some(worker))
        }
        None => (None, None),
    };
    let connect_timeout = config.redis.as_ref().map(|redis| redis.connect_timeout);
    let first = Plan::new(config, metrics_of_all, recorder, fleet);
    let (plan, following) = watch::channel(first.clone());
    if let (Some(redis), Some(within)) = (&redis, connect_timeout) {
        worker::join(&following, redis);
        worker::breakers::asked(&first, within).await;
    }
    drop(first);
    let (drain, draining) = watch::channel(false);
    let (unready, is_unready) = watch::channel(false);
    addresses.iter().try_for_each(|address| is_free(*address))?;
    let heartbeats: Vec<_> = (0..lanes.map_or(1, usize::from))
        .map(|_| Heartbeat::default())
        .collect();
    let threads = heartbeats
        .iter()
        .map(|heartbeat| {
            let sockets = sockets(&mut addresses)?;
            Ok(lane::spawn(
                sockets,
                following.clone(),
                draining.clone(),
                heartbeat.clone(),
            )?)
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let addresses = addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let metrics_at = metrics.as_ref().map(TcpListener::local_addr).transpose()?;
    info!(%addresses, admin = %admin.local_addr()?, metrics = metrics_at.map(tracing::field::display), lanes = threads.len(), "listening");

    let health = Health {
        started: clock::now(),
        lanes: heartbeats,
        draining: is_unready,
    };
    let sessions = redis.as_ref().map(|redis| redis.sessions.clone());
    let state = Arc::new(Admin {
        plan: following,
        redis,
        health,
    });
    tokio::spawn(worker::sessions::sweep(state.plan.clone()));
    let last_plan = state.plan.clone();
    tokio::spawn(admin::serve(admin, state.clone()));
    if let Some(metrics) = metrics {
        tokio::spawn(admin::serve_metrics(metrics, state));
    }
    tokio::select! {
        stopped = stopped(terminate) => stopped?,
        broken = reload::follow(file, seen, load, plan) => broken?,
    }
    info!("draining");
    // Unready first, so that others stop sending before weir stops taking.
    unready.send_replace(true);
    let delay = last_plan.borrow().config.propagation_delay;
    tokio::time::sleep(delay).await;
    drain.send_replace(true);
    let ended = tokio::task::spawn_blocking(|| {
        let ended = join(threads);
        // Behind the lanes, whose last events are still to be written.
        if let Some(audit) = audit {
            audit.stop(AUDIT_WITHIN);
        }
        ended
    })
    .await?;
    if let Some(redis) = &sessions {
        let plan = last_plan.borrow().clone();
        worker::sessions::write_last_uses(&plan, redis).await;
    }
    ended
}

/// Begins what the process does among others. Waits for their state, but not for ever: without it each limit does what it is to
/// do then.
async fn join_fleet(
    config: &Redis,
    metrics: &Metrics,
) -> anyhow::Result<(Arc<Fleet>, FleetConnections)> {
    let fleet = Fleet::new(config, metrics)?;
    let redis = fleet.join();
    if !redis.ready(config.connect_timeout).await {
        warn!("redis is not there yet; going on without");
    }
    Ok((fleet, redis))
}

/// Into SQLite, unless there is a worker to ship to.
fn begin_audit(
    config: &Audit,
    ship: bool,
    fleet: Option<&Arc<Fleet>>,
) -> anyhow::Result<(Recorder, audit::Worker)> {
    match fleet.filter(|_| ship) {
        Some(fleet) => ship_audit(config, fleet),
        None => write_audit(config),
    }
}

fn write_audit(config: &Audit) -> anyhow::Result<(Recorder, audit::Worker)> {
    let path = &config.sqlite;
    let key = config.key.as_ref().map(|key| key.0.as_bytes());
    let cannot = || format!("cannot write the audit to {}", path.display());
    let mut writer = Writer::open(path, &instance(), key, clock::wall()).with_context(cannot)?;
    if config.delivery == Delivery::Guaranteed {
        writer = writer.sync_each().with_context(cannot)?;
    }
    let (delivery, retention) = (config.delivery, config.retention);
    Ok(audit::sqlite::start(
        writer,
        AUDIT_QUEUE,
        delivery,
        retention,
    )?)
}

fn ship_audit(config: &Audit, fleet: &Arc<Fleet>) -> anyhow::Result<(Recorder, audit::Worker)> {
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
        spool,
        abandoned,
        fleet: fleet.clone(),
    };
    Ok(audit::ship::start(shipping, AUDIT_QUEUE)?)
}

/// The host's name, which in Kubernetes is the pod's.
fn instance() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))
}

/// Fails when another process listens there: lanes share their port, and would share it with another weir unnoticed.
fn is_free(address: SocketAddr) -> anyhow::Result<()> {
    std::net::TcpListener::bind(address)
        .map(drop)
        .with_context(|| format!("cannot listen on {address}"))
}

/// One lane's listeners. All lanes share the ports that the first one was given, which matters when the file asks for
/// port 0.
fn sockets(addresses: &mut [SocketAddr]) -> anyhow::Result<Vec<std::net::TcpListener>> {
    let mut sockets = Vec::new();
    for address in addresses {
        let socket =
            lane::listen(*address).with_context(|| format!("cannot listen on {address}"))?;
        *address = socket.local_addr()?;
        sockets.push(socket);
    }
    Ok(sockets)
}

fn join(threads: Vec<JoinHandle<std::io::Result<()>>>) -> anyhow::Result<()> {
    for thread in threads {
        match thread.join() {
            Ok(ended) => ended?,
            Err(_) => bail!("a lane panicked"),
        }
    }
    Ok(())
}

/// Waits for SIGTERM or SIGINT.
pub(super) async fn stopped(mut terminate: Signal) -> anyhow::Result<()> {
    tokio::select! {
        received = terminate.recv() => received.ok_or_else(|| anyhow!("signals cannot be received")),
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}
