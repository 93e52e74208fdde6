//! A connection to one node, kept up by a task of its own. Calls never wait for it: while it is down they fail at once.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, RedisError, Value};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

use super::topology::Address;
use super::{CallError, Driver, Redis, Telling};
use crate::clock;
use crate::policy::retry::{Pauses, equal_jitter};
use crate::telemetry::panics::begin_again;

/// Calls without an answer, one behind the other, after which no call waits for the node until it answers a ping.
const SUSPECT_AFTER: u32 = 4;
/// Between pings of a node that works.
const PING_EVERY: Duration = Duration::from_secs(1);
/// Between pings of one that answers, but later than a call's budget.
const PING_AGAIN: Duration = Duration::from_millis(50);
/// Between tries to connect.
const PAUSES: Pauses = Pauses {
    first: Duration::from_millis(15),
    longest: Duration::from_millis(1_500),
};

/// How a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeHealth {
    pub address: String,
    pub up: bool,
    /// Of the last ping.
    pub latency: Duration,
}

/// A node and the task that keeps its connection.
pub(super) struct Node {
    pub address: Address,
    /// What a call has at least that says something of the node when it is not answered.
    fair: Duration,
    state: Arc<State>,
    task: JoinHandle<()>,
}

struct State {
    /// `None` while calls are not to wait for it.
    connection: Mutex<Option<MultiplexedConnection>>,
    unanswered: AtomicU32,
    /// Whether its connection is to be left for one that may lead to another server.
    leaves: AtomicBool,
    /// Whether it is known by now if the node can be used.
    tried: AtomicBool,
    /// Told when the connection is lost, or calls get no answers.
    doubted: Notify,
    /// Told when it is up again, or was tried in vain.
    settled: Notify,
    latency_nanos: AtomicU64,
    /// Told of each connection once calls may use it.
    connected: Arc<Notify>,
}

impl Node {
    /// Begins to connect. `connected` is told of each connection.
    pub(super) fn start(
        redis: Arc<Redis>,
        address: Address,
        telling: Telling,
        connected: Arc<Notify>,
    ) -> Node {
        let state = Arc::new(State {
            connection: Mutex::new(None),
            unanswered: AtomicU32::new(0),
            leaves: AtomicBool::new(false),
            tried: AtomicBool::new(false),
            doubted: Notify::new(),
            settled: Notify::new(),
            latency_nanos: AtomicU64::new(0),
            connected,
        });
        let fair = redis.timeout / 2;
        let panics = redis.panics.clone();
        let of_task = (redis, address.clone(), state.clone());
        let task = tokio::spawn(begin_again(panics, move || {
            let (redis, address, state) = of_task.clone();
            keep(redis, address, state, telling)
        }));
        Node {
            address,
            fair,
            state,
            task,
        }
    }

    /// Sends a command: its answer, or what the server has against it. With `asking` it is for a slot that is on its way
    /// to this node.
    pub(super) async fn send(
        &self,
        command: &Cmd,
        asking: bool,
        deadline: Instant,
    ) -> Result<Result<Value, RedisError>, CallError> {
        let connection = self.state.connection.lock().clone();
        let mut connection = connection.ok_or(CallError::Down)?;
        let budget = deadline.saturating_duration_since(Instant::now());
        if budget.is_zero() {
            // It would be carried out, and its answer thrown away.
            return Err(CallError::Timeout);
        }
        let exchange = async {
            if asking {
                let mut pair = redis::pipe();
                pair.cmd("ASKING").ignore().add_command(command.clone());
                let (value,) = pair.query_async::<(Value,)>(&mut connection).await?;
                return Ok(value);
            }
            command.query_async::<Value>(&mut connection).await
        };
        let Ok(answer) = timeout_at(deadline, exchange).await else {
            // Others have used up the budget of most calls that had less.
            if budget >= self.fair {
                self.state.note_unanswered();
            }
            return Err(CallError::Timeout);
        };
        // A server's error is an answer, too.
        self.state.unanswered.store(0, Ordering::Relaxed);
        match answer {
            Err(error) if error.is_unrecoverable_error() || error.is_io_error() => {
                self.state.note_lost();
                Err(CallError::Down)
            }
            answer => Ok(answer),
        }
    }

    /// Waits for a node that is new to be connected; for one that is known to be down it does not.
    pub(super) async fn connected(&self, deadline: Instant) -> Result<(), CallError> {
        let waiting = async {
            loop {
                let settled = self.state.settled.notified();
                if self.is_up() {
                    return Ok(());
                }
                if self.state.tried.load(Ordering::Relaxed) {
                    return Err(CallError::Down);
                }
                settled.await;
            }
        };
        let waited = timeout_at(deadline, waiting).await;
        waited.unwrap_or(Err(CallError::Timeout))
    }

    /// Leaves a server that takes no writes any more: its address, of a proxy or a service, may lead to another by now.
    pub(super) fn leave(&self) {
        self.state.leaves.store(true, Ordering::Relaxed);
        self.state.note_lost();
    }

    pub(super) fn is_up(&self) -> bool {
        self.state.connection.lock().is_some()
    }

    pub(super) fn health(&self) -> NodeHealth {
        NodeHealth {
            address: self.address.to_string(),
            up: self.is_up(),
            latency: Duration::from_nanos(self.state.latency_nanos.load(Ordering::Relaxed)),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({})", self.address)
    }
}

impl State {
    fn note_unanswered(&self) {
        if self.unanswered.fetch_add(1, Ordering::Relaxed) + 1 == SUSPECT_AFTER {
            self.note_lost();
        }
    }

    fn note_lost(&self) {
        if self.connection.lock().take().is_some() {
            self.doubted.notify_one();
        }
    }

    fn note_found(&self, connection: &MultiplexedConnection) {
        self.unanswered.store(0, Ordering::Relaxed);
        *self.connection.lock() = Some(connection.clone());
        self.settle();
    }

    /// It is up, or was tried in vain.
    fn settle(&self) {
        self.tried.store(true, Ordering::Relaxed);
        self.settled.notify_waiters();
    }
}

/// Connects for ever anew.
async fn keep(redis: Arc<Redis>, address: Address, state: Arc<State>, telling: Telling) {
    let logs = telling == Telling::Logged;
    let mut pause = PAUSES.first;
    let (mut told_down, mut was_replica) = (false, false);
    loop {
        match connect(&redis, &address).await {
            Ok((mut connection, _driver)) => {
                let told = || {
                    if logs {
                        info!(client = redis.name, node = %address, "redis node is connected");
                    }
                };
                let ended = hold(&redis, &mut connection, &state, was_replica, told).await;
                state.note_lost();
                was_replica = ended == Ended::Replica;
                let worked = matches!(ended, Ended::Lost(_));
                if worked {
                    (pause, told_down) = (PAUSES.first, false);
                }
                if logs && !told_down {
                    told_down = !worked;
                    warn!(client = redis.name, node = %address, error = %ended, "redis node is lost");
                }
            }
            Err(error) if logs && !told_down => {
                told_down = true;
                warn!(client = redis.name, node = %address, error, "redis node cannot be reached; tried again");
            }
            Err(_) => {}
        }
        state.settle();
        redis.suspect_topology();
        sleep(equal_jitter(pause, fastrand::f64())).await;
        pause = PAUSES.after(pause);
    }
}

async fn connect(
    redis: &Redis,
    address: &Address,
) -> Result<(MultiplexedConnection, Driver), String> {
    let who = redis.who();
    match timeout(redis.connect_timeout, redis.connect(address, &who)).await {
        Ok(connected) => connected.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {:?}", redis.connect_timeout)),
    }
}

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ended {
    /// It never answered a ping but with an error, since it loads or wants a password: it is as good as down.
    Mute(String),
    Lost(String),
    /// The server takes no writes. As good as down, too: its address may lead to it again and again.
    Replica,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::Mute(why) | Ended::Lost(why) => f.write_str(why),
            Ended::Replica => f.write_str("it takes no writes: it is a replica now"),
        }
    }
}

/// Pings the connection, now and then and whenever it is doubted, and lets calls use it while it answers. Where it was doubted,
/// it must answer within a call's budget: a node that is slower would make calls wait in vain, again and again. Tells of the
/// first answer; where the one before led to a replica, of the second, as calls find out first whether this one does.
async fn hold(
    redis: &Redis,
    connection: &mut MultiplexedConnection,
    state: &State,
    was_replica: bool,
    tell: impl Fn(),
) -> Ended {
    let ping = redis::cmd("PING");
    let (mut answers, told_at) = (0_u32, 1 + u32::from(was_replica));
    let mut is_new = true;
    let ended = |answers, why| match answers {
        0 => Ended::Mute(why),
        _ => Ended::Lost(why),
    };
    loop {
        let began = clock::now();
        match timeout(redis.connect_timeout, ping.query_async::<Value>(connection)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return ended(answers, error.to_string()),
            Err(_) => {
                let error = format!("no answer within {:?}", redis.connect_timeout);
                return ended(answers, error);
            }
        }
        answers = answers.saturating_add(1);
        // Before it is told: calls that came behind the first answer may have found a replica again.
        if state.leaves.swap(false, Ordering::Relaxed) {
            return Ended::Replica;
        }
        if answers == told_at {
            tell();
        }
        let latency = began.elapsed();
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        state.latency_nanos.store(nanos, Ordering::Relaxed);
        if latency > redis.timeout && state.connection.lock().is_none() {
            state.settle();
            sleep(PING_AGAIN).await;
            continue;
        }
        state.note_found(connection);
        if std::mem::take(&mut is_new) {
            state.connected.notify_one();
        }
        let _ = timeout(PING_EVERY, state.doubted.notified()).await;
    }
}
