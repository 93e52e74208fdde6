//! A lane: a thread with its own runtime, listener and upstream pool, so that no request crosses threads. Must not know HTTP.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{self, LocalOptions};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tracing::warn;

use super::following::Following;
use super::greet::{count_peer, greet};
use super::idle_closing::IdleClosing;
use super::outbox::Outbox;
use super::reply::Date;
use super::shed::{self, Shedding};
use super::wire::Buffers;
use crate::blocking;
use crate::clock;
use crate::heartbeat::Heartbeat;
use crate::net::listen::{Accepting, Bound};
use crate::net::turn::OnceATurn;
use crate::plan::{Phase, Plan};
use crate::store::fleet::FleetConnections;
use crate::telemetry::log::LogRateLimit;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::panics::begin_again;

/// What the connections of one lane share.
#[derive(Debug)]
pub(super) struct Lane {
    pub following: Following,
    pub outbox: Outbox,
    pub buffers: Buffers,
    pub date: Date,
    pub shed: Shedding,
    /// Handshakes with clients, behind their hellos.
    pub handshakes: OnceATurn,
    /// The rest of them: whoever has been answered is not to wait for all that say hello.
    pub handshakes_begun: OnceATurn,
    /// Where the plan has a fleet.
    pub redis: Option<FleetConnections>,
    pub phases: watch::Receiver<Phase>,
    /// Since clients are told to leave: each connection closes behind its next reply.
    pub leave: IdleClosing,
    /// Since no connection is taken any more: those that have asked for nothing yet close, too.
    pub drain: IdleClosing,
}

/// How often a lane says that it turns.
const BEAT_EVERY: Duration = Duration::from_secs(1);

/// How much longer than it should a connection to an upstream stays open without a request, at most.
const CLOSE_IDLE_EVERY: Duration = Duration::from_secs(1);

/// Starts the lane of this number on `listeners`, one for each listener of the configuration, in its order, or several rows of them. Once `phases` says
/// that it drains it stops accepting, closes idle connections, lets requests in flight end for at most the drain time, and its thread ends. It beats `heartbeat` while it turns,
/// and tells `accepts` once it does.
pub fn spawn(
    number: usize,
    listeners: Vec<Bound>,
    plans: watch::Receiver<Arc<Plan>>,
    phases: watch::Receiver<Phase>,
    heartbeat: Heartbeat,
    accepts: oneshot::Sender<()>,
) -> io::Result<JoinHandle<io::Result<()>>> {
    heartbeat.beat();
    std::thread::Builder::new()
        .name(format!("lane-{number}"))
        .spawn(move || {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build_local(LocalOptions::default())?;
            let ended =
                runtime.block_on(serve(number, listeners, plans, phases, heartbeat, accepts));
            // Not for what a thread of its own still does: the process waits for this one.
            runtime.shutdown_background();
            ended.map(|served| {
                // What was cut off is in the outbox, since all tasks are gone.
                if let Some((lane, plan)) = served {
                    lane.outbox.flush(&plan);
                }
            })
        })
        .map_err(blocking::none)
}

/// Serves until the drain is over; what it leaves to be handed on, unless it drains before it serves.
async fn serve(
    number: usize,
    listeners: Vec<Bound>,
    plans: watch::Receiver<Arc<Plan>>,
    phases: watch::Receiver<Phase>,
    heartbeat: Heartbeat,
    accepts: oneshot::Sender<()>,
) -> io::Result<Option<(Rc<Lane>, Arc<Plan>)>> {
    let following = Following::new(plans);
    let redis = match &following.current().plan.fleet {
        Some(fleet) => {
            let redis = fleet.connect();
            let mut phases = phases.clone();
            tokio::select! {
                // Whoever comes first is not to be told that Redis is away.
                _ = redis.ready(fleet.ready_within()) => {}
                _ = phases.wait_for(|phase| *phase >= Phase::Draining) => return Ok(None),
            }
            Some(redis)
        }
        None => None,
    };
    let lane = Rc::new(Lane {
        following,
        redis,
        outbox: Outbox::default(),
        buffers: Buffers::default(),
        date: Date::default(),
        shed: Shedding::default(),
        handshakes: OnceATurn::default(),
        handshakes_begun: OnceATurn::default(),
        phases,
        leave: IdleClosing::default(),
        drain: IdleClosing::default(),
    });
    let mut accepting = JoinSet::new();
    // A reload changes neither their number nor their order.
    let configured = lane.following.current().plan.config.listeners.len();
    for (index, listener) in listeners.into_iter().enumerate() {
        let index = index % configured;
        accepting.spawn_local(accept(lane.clone(), index, listener.accepting()?));
    }
    // No one may wait for it.
    let _ = accepts.send(());
    let mut beside = JoinSet::new();
    keep(&mut beside, &lane, move |lane| {
        turn(lane, number, heartbeat.clone())
    });
    keep(&mut beside, &lane, flush);
    keep(&mut beside, &lane, open_gates);
    keep(&mut beside, &lane, shed::watch);
    keep(&mut beside, &lane, close_idle);
    keep(&mut beside, &lane, end);
    let metrics = lane.following.current().plan.metrics.clone();
    while let Some(ended) = accepting.join_next().await {
        note(ended, &metrics);
    }
    drop(beside);
    let plan = lane.following.current().plan.clone();
    Ok(Some((lane, plan)))
}

/// Counts a panic, which ends its connection, its request by HTTP/2, or what accepts connections at one listener, and no other.
pub(super) fn note<T>(ended: Result<T, JoinError>, metrics: &Metrics) {
    if ended.is_err_and(|error| error.is_panic()) {
        metrics.tasks.panics.inc();
    }
}

/// Keeps up what goes on beside the connections.
fn keep<T: Future<Output = ()> + 'static>(
    beside: &mut JoinSet<()>,
    lane: &Rc<Lane>,
    begin: impl Fn(Rc<Lane>) -> T + 'static,
) {
    let panics = lane.following.current().plan.metrics.tasks.panics.clone();
    let lane = lane.clone();
    beside.spawn_local(begin_again(panics, move || begin(lane.clone())));
}

/// Says for ever that the lane turns.
async fn turn(lane: Rc<Lane>, number: usize, heartbeat: Heartbeat) {
    let metrics = lane.following.current().plan.metrics.clone();
    let cpu = metrics.process.lane_cpu(number);
    loop {
        heartbeat.beat();
        lane.leave.tick();
        lane.drain.tick();
        cpu.inc_by((clock::thread_cpu().as_secs_f64() - cpu.get()).max(0.0));
        tokio::time::sleep(BEAT_EVERY).await;
    }
}

/// Tells for ever who waits for an event that it is safe.
async fn open_gates(lane: Rc<Lane>) {
    lane.outbox.open_gates().await;
}

/// Has clients told to leave, and idle ones closed, once that is due.
async fn end(lane: Rc<Lane>) {
    let time = || lane.following.current().plan.config.drain;
    let phases = || lane.phases.clone();
    tokio::join!(
        lane.leave.when(phases(), Phase::Leaving, time),
        lane.drain.when(phases(), Phase::Draining, time),
    );
}

/// Hands on for ever what the outbox holds back.
async fn flush(lane: Rc<Lane>) {
    loop {
        lane.outbox.due().await;
        lane.outbox.flush(&lane.following.current().plan);
    }
}

/// Closes for ever the connections to upstreams that no request has used for long.
async fn close_idle(lane: Rc<Lane>) {
    loop {
        tokio::time::sleep(CLOSE_IDLE_EVERY).await;
        lane.following.close_idle();
    }
}

/// Serves one listener until the drain, and its connections until they end or the drain's time is over.
async fn accept(lane: Rc<Lane>, listener_index: usize, listener: Accepting) {
    let mut phases = lane.phases.clone();
    let metrics = lane.following.current().plan.metrics.clone();
    let mut connections = JoinSet::new();
    let mut lines = LogRateLimit::default();
    loop {
        tokio::select! {
            _ = phases.wait_for(|phase| *phase >= Phase::Draining) => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    // Nobody makes room for who is not let in.
                    let Ok(counted) = count_peer(&lane, listener_index, peer) else {
                        metrics.connections.accepted.inc();
                        continue;
                    };
                    let Some(open) = Open::new(&lane, listener_index) else {
                        metrics.connections.refused.inc();
                        continue;
                    };
                    metrics.connections.accepted.inc();
                    let lane = lane.clone();
                    connections.spawn_local(async move {
                        greet(&lane, listener_index, stream, peer, counted).await;
                        drop(open);
                    });
                }
                // Out of descriptors, or the client is gone already: others must still be served.
                Err(error) => {
                    metrics.connections.accept_failures.inc();
                    if lines.next(clock::mono()).is_some() {
                        let listener = &lane.following.current().plan.config.listeners[listener_index].name;
                        warn!(%listener, %error, "a connection cannot be accepted, and waits or is closed; has the process as many files open as it may?");
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            },
            Some(ended) = connections.join_next() => note(ended, &metrics),
        }
    }
    drop(listener);
    let time = lane.following.current().plan.config.drain;
    let all_end = async {
        while let Some(ended) = connections.join_next().await {
            note(ended, &metrics);
        }
    };
    tokio::select! {
        _ = timeout(time, all_end) => {}
        _ = phases.wait_for(|phase| *phase == Phase::Over) => {}
    }
}

/// An open connection, counted.
struct Open {
    of_listener: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
}

impl Open {
    /// `None` where the listener has as many as it may, and none of this lane has been idle for long.
    fn new(lane: &Lane, listener_index: usize) -> Option<Open> {
        let view = lane.following.current();
        let of_listener = view.plan.listeners[listener_index].open.clone();
        let max = view.plan.config.listeners[listener_index].max_connections;
        let before = of_listener.fetch_add(1, Ordering::Relaxed);
        let metrics = view.plan.metrics.clone();
        metrics.connections.open.inc();
        let open = Open {
            of_listener,
            metrics,
        };
        // Who is to make room may take its time, or ask for something just then.
        let is_near = before < max + max.div_ceil(8);
        let makes_room = |closing: &IdleClosing| closing.make_room(listener_index);
        let has_room =
            before < max || is_near && (makes_room(&lane.drain) || makes_room(&lane.leave));
        has_room.then_some(open)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.of_listener.fetch_sub(1, Ordering::Relaxed);
        self.metrics.connections.open.dec();
    }
}
