//! `weir run` and `weir proxy`: the lanes, the admin port and the reload, until a signal ends them; `run` with the worker's tasks
//! beside them, where the file has what they need.

mod ports;
mod stores;

use std::convert::Infallible;
use std::fs;
use std::future::pending;
use std::io;
use std::iter;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::companion::Runs;
use super::control::{self, Tasks};
use super::files;
use super::reload;
use super::service_manager::{self, State};
use super::signals::Signals;
use super::take_over::{self, Offer};
use super::watched_files::{ConfigFiles, TlsFiles};
use super::{begin_to_log, named_files, read};
use crate::admin::app_health::AppProbes;
use crate::admin::drain::Leave;
use crate::admin::health::machine::Disk;
use crate::admin::{Admin, Refusals};
use crate::audit;
use crate::background;
use crate::background::supervise::{GaveUp, Supervisor};
use crate::blocking;
use crate::config::Config;
use crate::config::check::Checked;
use crate::config::yaml::Mistake;
use crate::heartbeat::Heartbeat;
use crate::memory;
use crate::net::listen::{Bound, SocketFiles};
use crate::net::tls::Secured;
use crate::plan::{Phase, Plan, Process};
use crate::proxy::lane;
use crate::store::fleet::FleetConnections;
use crate::telemetry::metrics::Metrics;
use crate::upstream::names::first_look;
pub(super) use ports::bind;
use ports::{LanePorts, Ports};
use stores::Stores;

/// For the last events to be written, once no request is in flight.
const AUDIT_WITHIN: Duration = Duration::from_secs(5);

/// For the last lines of the access log, and then for the last spans.
const TELLING_WITHIN: Duration = Duration::from_secs(1);

/// Before a thread that could not be begun is tried again.
const AGAIN: Duration = Duration::from_millis(10);

/// For the last answers of the admin port, where another process takes it over.
const ANSWERS_WITHIN: Duration = Duration::from_millis(250);

/// What of weir runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
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

/// Runs until SIGTERM, SIGQUIT or SIGINT, or until another process has taken over; then drains. An error too once a task cannot be kept up.
pub fn run(file: PathBuf, role: Role, takes_over: TakesOver) -> anyhow::Result<()> {
    // Signals, reloads and the admin port, apart from the lanes.
    control::serve(|| {
        let files = ConfigFiles::of(file.clone());
        let Checked {
            config, warnings, ..
        } = read(&file)?;
        begin_to_log(config.log);
        warn_of(&warnings, &file);
        Ok(supervise(config, files, role, takes_over))
    })
}

/// As a file is read again.
fn load_and_warn(file: &Path) -> anyhow::Result<Config> {
    // To open a named pipe is to wait for a writer, with all that this thread does.
    let is_pipe = |path: &PathBuf| fs::metadata(path).is_ok_and(|it| !it.is_file() && !it.is_dir());
    let mut all = iter::once(file.to_owned()).chain(named_files(file));
    if let Some(pipe) = all.find(is_pipe) {
        bail!(
            "{} can be read once, which was at the start: put a file in its place, or start weir again",
            pipe.display()
        );
    }
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

/// Begins what there is to run, and ends it the other way round. A signal ends it at any time: the process that is to be replaced goes on,
/// unless it has heard that this one serves.
async fn supervise(
    config: Config,
    files: ConfigFiles,
    role: Role,
    takes_over: TakesOver,
) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let hangup = signal(SignalKind::hangup())?;
    let tls_files = TlsFiles::of(&config);
    let begun = tokio::select! {
        begun = begin(config, role, takes_over) => begun?,
        stopped = signals.stopped() => {
            info!("told to end before it served");
            return stopped;
        }
    };
    let Begun {
        mut running,
        ports,
        accepting,
        offered,
        plan,
    } = begun;
    let why = tokio::select! {
        // At once, where no process is replaced.
        biased;
        served = ports.serve(accepting) => {
            let accepting = served?;
            service_manager::tell(State::Ready);
            let offer = offered.and_then(|(admin, sockets)| {
                let offer = Offer::new(admin, sockets);
                let warned = offer.inspect_err(|error| {
                    warn!(error = format!("{error:#}"), "nobody can take over");
                });
                warned.ok()
            });
            let reloads = reload::on_change(files, tls_files, load_and_warn, plan, hangup);
            until_the_end(&mut signals, reloads, &mut running.tasks, offer, accepting).await?
        }
        stopped = signals.stopped() => {
            stopped?;
            // Else clients would wait there for nobody.
            drop(offered);
            Why::Aborted
        }
    };
    running.end(&why, &mut signals).await?;
    match why {
        Why::GaveUp(gave_up) => Err(gave_up.into()),
        Why::NoLane => bail!("a lane ended before its time"),
        Why::Asked | Why::Replaced | Why::Aborted => Ok(()),
    }
}

/// A start, but for what other processes hear of it.
struct Begun {
    running: Running,
    ports: LanePorts,
    /// One for each lane, told once it accepts connections.
    accepting: Vec<oneshot::Receiver<()>>,
    /// For the process that is to replace this one: the admin port's address, and all sockets.
    offered: Option<(SocketAddr, Vec<OwnedFd>)>,
    plan: watch::Sender<Arc<Plan>>,
}

/// Begins each part before those that need it.
async fn begin(config: Config, role: Role, takes_over: TakesOver) -> anyhow::Result<Begun> {
    files::warn_of_few(&config);
    let mut secured = Secured::read(&config, &Secured::default()).map_err(anyhow::Error::msg)?;
    let app_probes = AppProbes::of_environment().map_err(anyhow::Error::msg)?;
    let mut ports = Ports::open(&config, takes_over).await?;

    let metrics = Arc::<Metrics>::default();
    let mut tasks = Tasks::new(&metrics);
    let stores = Stores::begin(&config, role, &metrics).await?;
    secured.stores = stores.tls();
    reload::warn_of_dates(&secured);
    if let Some(postgres) = &stores.postgres {
        tasks.look_at_replicas(postgres);
    }
    if let (Some(fleet), Some(postgres), Role::All) = (&stores.fleet, &stores.postgres, role) {
        let begin = tasks.begin_companion(&config, postgres, fleet, Runs::BesideLanes);
        begin.await?;
    }
    let checks = stores.checks(&config);
    let (lane_count, bounds) = (lane_count(&config), config.worker.health);
    let Stores {
        fleet,
        redis,
        postgres,
        audit,
    } = stores;
    let (recorder, audit) = audit.unzip();

    let process = Process {
        memory: memory::limit_bytes(),
        metrics,
        audit: recorder,
        fleet,
    };
    let (plan, following) = watch::channel(Plan::first(config, secured, process));
    tend(&mut tasks.control, &following, redis.as_ref(), role).await;

    let sockets = ports.lanes.bind(lane_count)?;
    let socket_files = SocketFiles::of(sockets.iter().take(1).flatten());
    let offered = match takes_over {
        TakesOver::Yes => Some(ports.copies(&sockets)?),
        TakesOver::No => None,
    };
    let lanes = Lanes::begin(sockets, &following)?;
    let (admin_at, metrics_at) = ports.control.addresses()?;
    let metrics_at = metrics_at.map(tracing::field::display);
    info!(addresses = %ports.lanes.addresses(), admin = %admin_at, metrics = metrics_at, lanes = lanes.threads.len(), "listening");

    let disk = stores::written(&following.borrow().config).map(Disk::new);
    let board = tasks.board(checks, bounds);
    let (health, unready) = tasks.health(board, lanes.heartbeats);
    let admin_ports = ports.control.serve(Admin {
        plan: following.clone(),
        redis: redis.clone(),
        postgres,
        writes: tasks.writes(),
        disk,
        health,
        app_probes,
        leave: Some(Leave {
            unready: unready.clone(),
            phases: lanes.phases.clone(),
        }),
        refusals: Refusals::default(),
    });

    let running = Running {
        admin_ports,
        unready,
        phases: lanes.phases,
        lanes: lanes.threads,
        audit,
        redis,
        tasks,
        socket_files,
        plans: following,
    };
    Ok(Begun {
        running,
        ports: ports.lanes,
        accepting: lanes.accepting,
        offered: offered.map(|sockets| (admin_at, sockets)),
        plan,
    })
}

/// How many lanes there are.
fn lane_count(config: &Config) -> usize {
    let lanes = config.lanes.or(thread::available_parallelism().ok());
    lanes.map_or(1, usize::from)
}

/// Begins what goes on beside the lanes. Returns once no request would find names that were never looked up, or shared breakers that were
/// never asked for; but it does not wait for ever.
async fn tend(
    control: &mut Supervisor,
    following: &watch::Receiver<Arc<Plan>>,
    redis: Option<&FleetConnections>,
    role: Role,
) {
    let first = following.borrow().clone();
    if let (Some(redis), Role::All) = (redis, role) {
        background::sweep_shared_sessions(control, following, redis);
    }
    first_look(first.live_upstreams(), reload::NAMES_WITHIN).await;
    background::tend_endpoints(control, following.clone());
    if let (Some(redis), Some(fleet)) = (redis, &first.fleet) {
        background::tend_shared_state(control, following, redis);
        background::breakers::first_look(&first, fleet.ready_within()).await;
    }
    background::sweep_sessions(control, following.clone());
}

/// The lanes, as they begin.
struct Lanes {
    threads: Vec<JoinHandle<io::Result<()>>>,
    heartbeats: Vec<Heartbeat>,
    /// One for each, told once it accepts connections.
    accepting: Vec<oneshot::Receiver<()>>,
    /// What they all go by.
    phases: watch::Sender<Phase>,
}

impl Lanes {
    /// One lane for each of `sockets`.
    fn begin(
        sockets: Vec<Vec<Bound>>,
        following: &watch::Receiver<Arc<Plan>>,
    ) -> io::Result<Lanes> {
        let (phases, following_phases) = watch::channel(Phase::default());
        let mut lanes = Lanes {
            threads: Vec::new(),
            heartbeats: Vec::new(),
            accepting: Vec::new(),
            phases,
        };
        for (number, sockets) in sockets.into_iter().enumerate() {
            let heartbeat = Heartbeat::default();
            let (accepts, is_accepting) = oneshot::channel();
            lanes.threads.push(lane::spawn(
                number,
                sockets,
                following.clone(),
                following_phases.clone(),
                heartbeat.clone(),
                accepts,
            )?);
            lanes.heartbeats.push(heartbeat);
            lanes.accepting.push(is_accepting);
        }
        Ok(lanes)
    }
}

/// Why a process ends.
enum Why {
    /// By a signal.
    Asked,
    /// Another process has taken over.
    Replaced,
    /// By a signal, before the process that was to be replaced heard that this one serves: that one goes on.
    Aborted,
    GaveUp(GaveUp),
    /// A lane could not begin: clients that the kernel gives to its sockets would wait for nobody.
    NoLane,
}

/// Whichever comes first. All that is passed by value ends with it: the file is not read again, and the sockets that are offered are
/// closed, else clients would wait at them for nobody.
async fn until_the_end(
    signals: &mut Signals,
    reloads: impl Future<Output = Infallible>,
    tasks: &mut Tasks,
    offer: Option<Offer>,
    accepting: Vec<oneshot::Receiver<()>>,
) -> anyhow::Result<Why> {
    tokio::select! {
        stopped = signals.stopped() => stopped.map(|()| Why::Asked),
        never = reloads => match never {},
        gave_up = tasks.gave_up() => Ok(Why::GaveUp(gave_up)),
        () = take_over::taken(offer) => Ok(Why::Replaced),
        () = no_lane(accepting) => Ok(Why::NoLane),
    }
}

/// Waits until one of the lanes has ended before it accepts connections; for ever where all do.
async fn no_lane(accepting: Vec<oneshot::Receiver<()>>) {
    for lane in accepting {
        if lane.await.is_err() {
            error!("a lane cannot begin: weir ends");
            return;
        }
    }
    pending().await
}

/// What is to be ended, in this order.
struct Running {
    admin_ports: JoinSet<io::Result<()>>,
    /// True has `/ready` say so.
    unready: watch::Sender<bool>,
    /// What the lanes go by.
    phases: watch::Sender<Phase>,
    lanes: Vec<JoinHandle<io::Result<()>>>,
    audit: Option<audit::Writers>,
    redis: Option<FleetConnections>,
    tasks: Tasks,
    socket_files: SocketFiles,
    plans: watch::Receiver<Arc<Plan>>,
}

impl Running {
    /// Ends all of it, at once where a signal comes that is not the one that it ends by; an error is that of a lane.
    async fn end(self, why: &Why, signals: &mut Signals) -> anyhow::Result<()> {
        let phases = self.phases.clone();
        let hurry = async {
            let asked = matches!(why, Why::Asked | Why::Aborted);
            signals.once_more(asked).await;
            phases.send_replace(Phase::Over);
            pending().await
        };
        tokio::select! {
            ended = self.drain(why) => ended,
            never = hurry => never,
        }
    }

    async fn drain(mut self, why: &Why) -> anyhow::Result<()> {
        info!("draining");
        service_manager::tell(State::Stopping);
        let mut over = self.phases.subscribe();
        let is_over = |phase: &Phase| *phase == Phase::Over;
        // No other comes: what would bring one has ended.
        let plan = self.plans.borrow().clone();
        if let Why::Replaced | Why::Aborted = why {
            // The other process is ready at the same ports, and is to be heard there alone; who has been let in is answered.
            self.admin_ports.abort_all();
            tokio::time::sleep(ANSWERS_WITHIN).await;
        } else {
            // Unready first, so that others stop sending before weir stops taking.
            self.unready.send_replace(true);
            let _ = timeout(plan.config.propagation_delay, over.wait_for(is_over)).await;
        }
        let begin = |phase: &mut Phase| *phase = Phase::Draining.max(*phase);
        self.phases.send_modify(begin);
        let ended = wait_for_threads((self.lanes, self.audit, plan.clone())).await;
        if let Some(redis) = &self.redis {
            tokio::join!(
                background::sessions::write_last_uses(&plan, &redis.sessions),
                background::limits::give_back_slots(&plan, &redis.rate_limit),
            );
        }
        // Behind the audit, whose last events are on their way to it.
        if let Some(companion) = self.tasks.companion {
            tokio::select! {
                () = companion.stop(plan.config.drain) => {}
                _ = over.wait_for(is_over) => {}
            }
        }
        // Those at which no other process listens.
        drop(self.socket_files);
        ended
    }
}

/// What is waited for at the end: lanes, what writes the audit, and the plan that has the rest.
type Last = (
    Vec<JoinHandle<io::Result<()>>>,
    Option<audit::Writers>,
    Arc<Plan>,
);

/// As [`end_threads`], on a thread of its own. Where none can be begun there may be one once the lanes' have ended.
async fn wait_for_threads(last: Last) -> anyhow::Result<()> {
    let last = Arc::new(Mutex::new(Some(last)));
    loop {
        let handed = last.clone();
        if let Ok(ended) = blocking::hand_on(move || end_taken(&handed)) {
            return ended.await.context("what waits for the lanes panicked")?;
        }
        let have_ended = |(lanes, ..): &Last| lanes.iter().all(JoinHandle::is_finished);
        if last.lock().as_ref().is_some_and(have_ended) {
            // Here, for what is still to be written alone: AUDIT_WITHIN and twice TELLING_WITHIN at most.
            return end_taken(&last);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn end_taken(last: &Mutex<Option<Last>>) -> anyhow::Result<()> {
    let taken = last.lock().take();
    taken.map_or(Ok(()), |(lanes, audit, plan)| {
        end_threads(lanes, audit, &plan)
    })
}

/// Waits for the lanes, and then for what is still to be written of their requests; the error is that of a lane.
fn end_threads(
    lanes: Vec<JoinHandle<io::Result<()>>>,
    audit: Option<audit::Writers>,
    plan: &Plan,
) -> anyhow::Result<()> {
    let ended = join(lanes);
    if let Some(audit) = audit {
        audit.stop(AUDIT_WITHIN);
    }
    plan.access_log.stop(TELLING_WITHIN);
    if let Some(traces) = &plan.traces {
        traces.stop(TELLING_WITHIN);
    }
    ended
}

fn join(threads: Vec<JoinHandle<std::io::Result<()>>>) -> anyhow::Result<()> {
    let mut all = Ok(());
    for thread in threads {
        let ended = match thread.join() {
            Ok(ended) => ended.context("a lane cannot serve"),
            Err(_) => Err(anyhow!("a lane panicked")),
        };
        // The others may still serve: what they write is waited for, too.
        all = all.and(ended);
    }
    all
}
