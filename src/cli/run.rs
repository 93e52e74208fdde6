//! `weir run` and `weir proxy`: the lanes, the admin port and the reload, until a signal ends them; `run` with the worker's tasks
//! beside them, where the file has what they need.

use std::fmt::Display;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::companion::{Beside, Companion};
use super::read;
use super::take_over::{self, Offer, Taken};
use crate::admin::app_health::AppProbes;
use crate::admin::health::check::{Check, Status};
use crate::admin::health::{Board, Health, Heartbeat, machine, stores};
use crate::admin::{self, Admin};
use crate::audit::ship::{MEMORY, Shipping};
use crate::audit::{self, Recorder};
use crate::clock;
use crate::config::Config;
use crate::config::audit::{Audit, Delivery};
use crate::config::check::Checked;
use crate::config::listeners::Address;
use crate::config::redis::Redis;
use crate::config::yaml::Mistake;
use crate::net::listen::{self, Bound, SocketFiles};
use crate::net::tls::Secured;
use crate::plan::Plan;
use crate::proxy::reload::Fingerprint;
use crate::proxy::{lane, reload};
use crate::store::audit::batch::Boot;
use crate::store::audit::chain::Hasher;
use crate::store::fleet::{Fleet, FleetConnections};
use crate::store::postgres::Postgres;
use crate::store::sessions::Sweeper;
use crate::store::spool::Spool;
use crate::store::sqlite::Writer;
use crate::telemetry::log;
use crate::telemetry::metrics::Metrics;
use crate::upstream::names::first_look;
use crate::worker;
use crate::worker::sessions::SharedSweep;
use crate::worker::supervise::{GaveUp, Supervisor};

/// Events that wait in memory to be written, at most. Some 600 bytes each as a rule; no bytes are counted, so that clients whose path and
/// query are as long as is kept (4 KiB each) make them 400 MB.
const AUDIT_QUEUE: usize = 50_000;
/// For the last events to be written, once no request is in flight.
const AUDIT_WITHIN: Duration = Duration::from_secs(5);

/// For the last lines of the access log, and then for the last spans.
const TELLING_WITHIN: Duration = Duration::from_secs(1);

/// For the last answers of the admin port, where another process takes it over.
const ANSWERS_WITHIN: Duration = Duration::from_millis(250);

/// What of weir runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parts {
    /// `weir run`.
    All,
    /// `weir proxy`: what a worker elsewhere does is left to it.
    Proxy,
}

/// Whether a process takes over the ports of one that runs, and lets itself be replaced so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakesOver {
    Yes,
    No,
}

/// Runs until SIGTERM or SIGINT, or until another process has taken over; then drains. An error too once a task cannot be kept up.
pub fn run(file: PathBuf, parts: Parts, takes_over: TakesOver) -> anyhow::Result<()> {
    let seen = reload::fingerprint(&file);
    let Checked {
        config, warnings, ..
    } = read(&file)?;
    log::init(config.log);
    warn_of(&warnings, &file);
    // The control thread: signals, reloads and the admin port, apart from the lanes.
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    control.block_on(supervise(config, file, seen, parts, takes_over))
}

/// As a file is read again.
fn load_and_warn(file: &Path) -> anyhow::Result<Config> {
    let Checked {
        config, warnings, ..
    } = read(file)?;
    warn_of(&warnings, file);
    Ok(config)
}

fn warn_of(warnings: &[Mistake], file: &Path) {
    for warning in warnings {
        warn!(file = %file.display(), "{warning}");
    }
}

async fn supervise(
    config: Config,
    file: PathBuf,
    seen: Option<Fingerprint>,
    parts: Parts,
    takes_over: TakesOver,
) -> anyhow::Result<()> {
    let beside = reload::Beside::of(&config);
    let mut secured = Secured::read(&config, &Secured::default()).map_err(anyhow::Error::msg)?;
    let app_probes = AppProbes::of_environment().map_err(anyhow::Error::msg)?;
    // Listening to the signals begins before the line that says weir is up, so that none is missed, or ends the process.
    let terminate = signal(SignalKind::terminate())?;
    let hangup = signal(SignalKind::hangup())?;
    let mut taken = match takes_over {
        // By the address that it is offered at.
        TakesOver::Yes => Taken::from(listen::here(config.admin.address)).await?,
        TakesOver::No => Taken::default(),
    };
    if taken.is_some() && config.redis.is_none() && !config.sessions.is_empty() {
        warn!(
            "sessions are in memory, and end with the process that is replaced; with redis they would not"
        );
    }
    let admin = take_or_bind(&mut taken, config.admin.address)?;
    let metrics = match config.metrics_address {
        Some(address) => Some(take_or_bind(&mut taken, address)?),
        None => None,
    };
    let lanes = config.lanes.or(thread::available_parallelism().ok());
    let mut listeners: Vec<_> = config
        .listeners
        .iter()
        .map(|listener| {
            let address = match &listener.address {
                Address::Tcp(address) => Address::Tcp(listen::here(*address)),
                Address::Unix(path) => Address::Unix(path.clone()),
            };
            (address, listener.socket_mode)
        })
        .collect();
    let metrics_of_all = Arc::<Metrics>::default();
    let (fleet, redis) = match &config.redis {
        Some(redis) => {
            let (fleet, redis) = join_fleet(redis, &metrics_of_all).await?;
            (Some(fleet), Some(redis))
        }
        None => (None, None),
    };
    let postgres = config.postgres.as_ref().map(Postgres::new).transpose()?;
    let of_stores = [
        fleet.as_ref().and_then(|fleet| fleet.tls.clone()),
        postgres.as_ref().and_then(|postgres| postgres.tls.clone()),
    ];
    secured.stores = of_stores.into_iter().flatten().collect();
    let ships = config.postgres.is_some();
    let (recorder, audit) = match &config.audit {
        Some(audit) => {
            let (recorder, worker) = begin_audit(audit, ships, fleet.as_ref())?;
            (Some(recorder), Some(worker))
        }
        None => (None, None),
    };
    let connect_timeout = config.redis.as_ref().map(|redis| redis.connect_timeout);
    let mut control = Supervisor::new(Handle::current(), metrics_of_all.clone());
    if let Some(postgres) = &postgres {
        // Apart from the worker's own view, which has connections of another runtime.
        worker::look_at_replicas(&mut control, "query_replicas", postgres.clone());
    }
    let mut companion = None;
    if let (Some(fleet), Some(postgres), Parts::All) = (&fleet, &postgres, parts) {
        let begin = Companion::begin(&config, postgres, fleet, &metrics_of_all, Beside::Lanes);
        companion = Some(begin.await?);
    }
    let mut checks = checks(&config, recorder.as_ref(), redis.as_ref());
    let health = config.worker.health;
    let first = Plan::secured(
        config,
        secured,
        machine::limit_bytes(),
        metrics_of_all,
        recorder,
        fleet,
    );
    let (plan, following) = watch::channel(first.clone());
    if let (Some(fleet), Some(redis), Parts::All) = (&first.fleet, &redis, parts) {
        let following = following.clone();
        let names = move || {
            let plan = following.borrow().clone();
            plan.sessions.iter().map(|it| it.name.clone()).collect()
        };
        let sweep = SharedSweep {
            redis: redis.sessions.clone(),
            sweeper: Sweeper::new(fleet),
            names: Box::new(names),
            metrics: first.metrics.clone(),
            every: first.config.worker.session_sweep,
        };
        worker::sweep_shared_sessions(&mut control, sweep);
    }
    first_look(&first.upstreams, reload::NAMES_WITHIN).await;
    worker::tend_endpoints(&mut control, following.clone());
    if let (Some(redis), Some(within)) = (&redis, connect_timeout) {
        worker::join(&mut control, &following, redis);
        worker::breakers::asked(&first, within).await;
    }
    drop(first);
    let (drain, draining) = watch::channel(false);
    let (unready, is_unready) = watch::channel(false);
    let heartbeats: Vec<_> = (0..lanes.map_or(1, usize::from))
        .map(|_| Heartbeat::default())
        .collect();
    let sockets = sockets(&mut listeners, heartbeats.len(), &mut taken)?;
    let socket_files = SocketFiles::of(sockets.iter().take(1).flatten());
    let offered = match takes_over {
        TakesOver::Yes => copies(&admin, metrics.as_ref(), &sockets)?,
        TakesOver::No => Vec::new(),
    };
    let mut accepting = Vec::new();
    let threads = heartbeats
        .iter()
        .zip(sockets)
        .enumerate()
        .map(|(number, (heartbeat, sockets))| {
            let (accepts, is_accepting) = oneshot::channel();
            accepting.push(is_accepting);
            lane::spawn(
                number,
                sockets,
                following.clone(),
                draining.clone(),
                heartbeat.clone(),
                accepts,
            )
        })
        .collect::<std::io::Result<Vec<_>>>()?;
    let addresses = listeners
        .iter()
        .map(|(address, _)| address.to_string())
        .collect::<Vec<_>>()
        .join(", ");
    let metrics_at = metrics.as_ref().map(TcpListener::local_addr).transpose()?;
    let admin_at = admin.local_addr()?;
    info!(%addresses, admin = %admin_at, metrics = metrics_at.map(tracing::field::display), lanes = threads.len(), "listening");

    worker::sweep_sessions(&mut control, following.clone());
    let mut tasks = control.watched();
    let mut runtime = Handle::current();
    let writes = companion
        .as_ref()
        .map(|companion| companion.postgres.clone());
    if let Some(companion) = &mut companion {
        tasks.extend(companion.supervisor.watched());
        checks.append(&mut companion.checks);
        runtime = companion.runtime().clone();
    }
    let health = Health {
        started: clock::now(),
        lanes: heartbeats,
        tasks,
        draining: is_unready,
        board: Board::new(checks, health.timeout, health.cache, runtime),
    };
    let shared = redis.clone();
    let state = Arc::new(Admin {
        plan: following,
        redis,
        postgres,
        writes,
        health,
        app_probes,
    });
    let last_plan = state.plan.clone();
    let mut admin_ports = JoinSet::new();
    admin_ports.spawn(admin::serve(admin, state.clone()));
    if let Some(metrics) = metrics {
        admin_ports.spawn(admin::serve_metrics(metrics, state));
    }
    if taken.is_some() {
        // A lane waits for Redis before it accepts: until then the old process is to serve.
        for lane in accepting {
            lane.await.context("a lane cannot accept connections")?;
        }
        for (address, mode) in &listeners {
            let set = listen::set_mode(address, *mode);
            let _ = set.inspect_err(|error| warn!(%address, %error, "socket_mode is not set"));
        }
    }
    taken.serves().await;
    let offer = match takes_over {
        TakesOver::Yes => Offer::new(admin_at, offered)
            .inspect_err(|error| warn!(error = format!("{error:#}"), "nobody can take over"))
            .ok(),
        TakesOver::No => None,
    };
    let mut is_replaced = false;
    let gave_up = tokio::select! {
        stopped = stopped(terminate) => {
            stopped?;
            None
        }
        never = reload::follow(file, seen, beside, load_and_warn, plan, hangup) => match never {},
        gave_up = control.gave_up() => Some(gave_up),
        gave_up = companion_gave_up(companion.as_mut()) => Some(gave_up),
        // Whichever comes first, the sockets that are offered are closed by it: else clients would wait at them for nobody.
        () = take_over::taken(offer) => {
            is_replaced = true;
            None
        }
    };
    info!("draining");
    if is_replaced {
        // The other process is ready at the same ports, and is to be heard there alone; who has been let in is answered.
        admin_ports.abort_all();
        tokio::time::sleep(ANSWERS_WITHIN).await;
    } else {
        // Unready first, so that others stop sending before weir stops taking.
        unready.send_replace(true);
        let delay = last_plan.borrow().config.propagation_delay;
        tokio::time::sleep(delay).await;
    }
    drain.send_replace(true);
    let plan = last_plan.borrow().clone();
    let ended = tokio::task::spawn_blocking(move || {
        let ended = join(threads);
        // Behind the lanes, whose last events are still to be written.
        if let Some(audit) = audit {
            audit.stop(AUDIT_WITHIN);
        }
        plan.access_log.stop(TELLING_WITHIN);
        if let Some(traces) = &plan.traces {
            traces.stop(TELLING_WITHIN);
        }
        ended
    })
    .await?;
    if let Some(redis) = &shared {
        let plan = last_plan.borrow().clone();
        tokio::join!(
            worker::sessions::write_last_uses(&plan, &redis.sessions),
            worker::limits::give_back_slots(&plan, &redis.rate_limit),
        );
    }
    // Behind the audit, whose last events are on their way to it.
    if let Some(companion) = companion {
        let within = last_plan.borrow().config.drain;
        companion.stop(within).await;
    }
    match is_replaced {
        // They are the other process's.
        true => socket_files.leave(),
        false => drop(socket_files),
    }
    ended?;
    match gave_up {
        Some(gave_up) => Err(gave_up.into()),
        None => Ok(()),
    }
}

async fn companion_gave_up(companion: Option<&mut Companion>) -> GaveUp {
    match companion {
        Some(companion) => companion.supervisor.gave_up().await,
        None => std::future::pending().await,
    }
}

/// What `/health` looks at in a process with lanes. Without Redis limits, breakers and sessions do what the file says: that is worse, and
/// no reason to be unready.
fn checks(
    config: &Config,
    recorder: Option<&Recorder>,
    redis: Option<&FleetConnections>,
) -> Vec<Check> {
    let mut checks = vec![machine::memory()];
    if let Some(redis) = redis {
        checks.extend(stores::redis(redis, Status::Degraded));
    }
    if let Some(recorder) = recorder {
        let recorder = recorder.clone();
        checks.push(Check::new("audit", Status::Degraded, move || {
            let found = stores::queue(recorder.counts(), recorder.capacity());
            async move { found }
        }));
    }
    if let (Some(recorder), Some(audit)) = (recorder, &config.audit)
        && recorder.counts().spool.is_some()
    {
        let (recorder, delivery) = (recorder.clone(), audit.delivery);
        checks.push(Check::new("spool", Status::Degraded, move || {
            let found = stores::spool(recorder.counts().spool.unwrap_or_default(), delivery);
            async move { found }
        }));
    }
    if let Some(audit) = &config.audit {
        let written = match config.postgres {
            Some(_) => &audit.spool.path,
            None => &audit.sqlite,
        };
        checks.push(machine::disk(vec![written.clone()]));
    }
    checks
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
        memory: MEMORY,
    };
    Ok(audit::ship::start(shipping, AUDIT_QUEUE)?)
}

/// The host's name, which in Kubernetes is the pod's.
fn instance() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

pub(super) fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = listen::alone(address).and_then(TcpListener::from_std);
    bound.with_context(|| cannot_listen(address))
}

fn cannot_listen(address: impl Display) -> String {
    format!(
        "cannot listen on {address} (a weir replaces another where both are started with --take-over and one admin.address)"
    )
}

fn take_or_bind(taken: &mut Taken, address: SocketAddr) -> anyhow::Result<TcpListener> {
    match taken.port(listen::here(address)) {
        Some(listener) => Ok(TcpListener::from_std(listener)?),
        None => bind(address),
    }
}

/// Fails when another process listens there: lanes share their port, and would share it with another weir unnoticed.
fn is_free(address: &Address) -> anyhow::Result<()> {
    match address {
        Address::Tcp(tcp) => listen::alone(*tcp)
            .map(drop)
            .with_context(|| cannot_listen(address)),
        // Told when it is made: there is one for all lanes.
        Address::Unix(_) => Ok(()),
    }
}

/// The sockets of each lane, in rows of one for each listener: all that were taken over, since clients wait at each, and new ones where
/// there are too few. All lanes share the ports that the first one was given, which matters when the file asks for port 0.
fn sockets(
    listeners: &mut [(Address, u32)],
    lanes: usize,
    taken: &mut Taken,
) -> anyhow::Result<Vec<Vec<Bound>>> {
    for (address, _) in &*listeners {
        if !taken.has(address) {
            is_free(address)?;
        }
    }
    let mut of_lanes: Vec<_> = (0..lanes).map(|_| Vec::<Bound>::new()).collect();
    let mut row = 0;
    while row < lanes || listeners.iter().any(|(address, _)| taken.has(address)) {
        for (index, (address, mode)) in listeners.iter_mut().enumerate() {
            let made = match (taken.listener(address), of_lanes[0].get(index)) {
                (Some(socket), _) => Ok(socket),
                (None, Some(first)) => first.again(),
                (None, None) => Bound::new(address, *mode),
            };
            let socket = made.with_context(|| cannot_listen(&*address))?;
            *address = socket.address()?;
            of_lanes[row % lanes].push(socket);
        }
        row += 1;
    }
    Ok(of_lanes)
}

/// All sockets that the process listens on, once more.
fn copies(
    admin: &TcpListener,
    metrics: Option<&TcpListener>,
    of_lanes: &[Vec<Bound>],
) -> std::io::Result<Vec<OwnedFd>> {
    let of_control = [admin].into_iter().chain(metrics);
    let of_control = of_control.map(|socket| socket.as_fd().try_clone_to_owned());
    let of_lanes = of_lanes.iter().flatten();
    let of_lanes = of_lanes.map(|socket| socket.as_fd().try_clone_to_owned());
    of_control.chain(of_lanes).collect()
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
