//! Redis: one pipelined connection a node behind a map of slots, so that a dead node fails its own slots at once and stalls
//! no other. Owns the budget of a call, what is done about each error, and the scripts' transport. The only module that
//! names the Redis crate; must not know what is kept.
//!
//! What one named client knows is a [`Redis`], shared by the process; what a thread holds of it is a [`Connections`], so
//! that a call crosses no thread.

mod dial;
mod joined;
mod node;
mod push;
pub mod read;
mod refusals;
mod scan;
mod script;
mod topology;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use redis::aio::{MultiplexedConnection, PubSub};
use redis::{
    AsyncConnectionConfig, Cmd, ErrorKind, RedisConnectionInfo, RedisError, ServerErrorKind,
};
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::warn;

pub use node::NodeHealth;
pub use push::Heard;
pub use redis::Value;
pub use scan::ScanCursor;
pub use script::{Arg, Doubles, Script};
pub use topology::Address;

use crate::clock;
use crate::config::redis::{Client, Mode};
use crate::keys;
use crate::net::tls::{Latest, TlsError};
use crate::telemetry::metrics::redis_calls::RedisMetrics;
use node::Node;
use refusals::Refusals;
use topology::Topology;

/// Calls that wait for one connection's turn to be written; those beyond wait within their own budget.
const QUEUE: usize = 1024;
/// How often one call is sent, at most: over redirections and repeats.
const ATTEMPTS: usize = 5;
/// Before a call is sent again that met a slot on the move.
const TRY_AGAIN: Duration = Duration::from_millis(1);

/// Why a call has no answer. It may have been carried out all the same.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CallError {
    #[error("redis did not answer within the budget of the call")]
    Timeout,
    #[error("there is no connection to the redis node of the key")]
    Down,
    /// What the server said.
    #[error("redis refused the call: {0}")]
    Refused(String),
    #[error("the keys of the call lie in several slots")]
    CrossSlot,
    #[error("redis answered in another shape than its script promises")]
    Nonsense,
}

/// Why a client cannot be made.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("redis.tls: {0}")]
    Tls(#[from] TlsError),
}

/// One named client, as the process shares it.
pub struct Redis {
    /// `main`, `rate_limit` or `sessions`.
    pub name: &'static str,
    /// A call's budget on the request path.
    pub timeout: Duration,
    pub connect_timeout: Duration,
    settings: Client,
    tls: Option<Latest>,
    topology: watch::Sender<Arc<Topology>>,
    /// Told when the map of slots does not fit what nodes say.
    stale: Notify,
    metrics: RedisMetrics,
    /// The calls that its servers refused lately.
    refusals: Mutex<Refusals>,
    /// Whether a server alone has keys in slots all the same, as a proxy in front of a cluster does.
    parts_keys: AtomicBool,
    /// Of its tasks.
    panics: Counter,
}

impl Redis {
    /// Connects to nothing yet. `tls`: by which its servers are spoken to, if `settings` say so.
    pub fn new(
        name: &'static str,
        settings: Client,
        tls: Option<Latest>,
        timeout: Duration,
        connect_timeout: Duration,
        metrics: RedisMetrics,
        panics: Counter,
    ) -> Arc<Redis> {
        Arc::new(Redis {
            name,
            timeout,
            connect_timeout,
            topology: watch::Sender::new(Arc::new(Topology::before_asking(&settings))),
            tls: tls.filter(|_| settings.tls),
            settings,
            stale: Notify::new(),
            metrics,
            refusals: Mutex::default(),
            parts_keys: AtomicBool::new(false),
            panics,
        })
    }

    /// Who weir is to the servers that hold the state.
    fn who(&self) -> RedisConnectionInfo {
        let mut who = RedisConnectionInfo::default();
        if let Mode::Single { database } = self.settings.mode {
            who = who.set_db(i64::from(database));
        }
        if let Some(username) = &self.settings.username {
            who = who.set_username(username);
        }
        if let Some(password) = &self.settings.password {
            who = who.set_password(&password.0);
        }
        who
    }

    /// A new connection, for as long as its driver is kept. Waits for ever: each caller has its own patience.
    async fn connect(
        &self,
        address: &Address,
        who: &RedisConnectionInfo,
    ) -> Result<(MultiplexedConnection, Driver), RedisError> {
        let config = AsyncConnectionConfig::new()
            // Each call has its own.
            .set_response_timeout(None)
            .set_pipeline_buffer_size(QUEUE);
        let stream = dial::dial(address, self.tls.as_ref()).await?;
        let (connection, driver) =
            MultiplexedConnection::new_with_config(who, stream, config).await?;
        Ok((connection, Driver(tokio::spawn(driver))))
    }

    async fn connect_to_hear(
        &self,
        address: &Address,
        who: &RedisConnectionInfo,
    ) -> Result<PubSub, RedisError> {
        let stream = dial::dial(address, self.tls.as_ref()).await?;
        PubSub::new(who, stream).await
    }

    fn count(&self, answer: &Result<Value, CallError>, took: Duration) {
        let result = match answer {
            Ok(_) => &self.metrics.answered,
            Err(CallError::Timeout) => &self.metrics.timed_out,
            Err(CallError::Down) => &self.metrics.down,
            Err(CallError::Refused(_) | CallError::CrossSlot | CallError::Nonsense) => {
                &self.metrics.refused
            }
        };
        result.inc();
        self.metrics.observe(took);
    }

    /// What a server has said that refuses calls, within the last ten seconds.
    pub fn refuses(&self) -> Option<String> {
        let refusals = self.refusals.lock();
        refusals.lately(clock::mono()).map(str::to_owned)
    }

    /// Notes it, and tells the log of the first of a row for each reason: it is full, lacks a right, or loads.
    fn note_refused(&self, node: &Address, reason: &str, said: &str) {
        let now = clock::mono();
        let is_news = self.refusals.lock().note(reason, said.to_owned(), now);
        if is_news {
            warn!(client = self.name, %node, error = said, "redis refuses calls");
        }
    }

    /// Asks for a new look at who has which slot.
    fn suspect_topology(&self) {
        self.stale.notify_one();
    }
}

/// What moves the bytes of a connection. Dropped, it closes the connection, whatever still waits for it.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// One thread's connections of a client.
#[derive(Debug)]
pub struct Connections {
    redis: Arc<Redis>,
    routing: Arc<Mutex<Routing>>,
    connected: Arc<Notify>,
    following: tokio::task::JoinHandle<()>,
    /// Calls that are to go as one.
    waiting: Mutex<Vec<joined::Call>>,
}

/// Whether connections log what becomes of their nodes: those of one thread of a process do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Telling {
    Logged,
    Silent,
}

/// Who has which slot, as connections.
#[derive(Debug)]
struct Routing {
    topology: Arc<Topology>,
    nodes: BTreeMap<Address, Arc<Node>>,
    /// Told of each connection of a node.
    connected: Arc<Notify>,
}

impl Connections {
    /// Begins to connect to every node that has slots, on the runtime of this thread.
    pub fn start(redis: Arc<Redis>, telling: Telling) -> Connections {
        let mut topologies = redis.topology.subscribe();
        let connected = Arc::new(Notify::new());
        let routing = Arc::new(Mutex::new(Routing {
            topology: Arc::new(Topology::default()),
            nodes: BTreeMap::new(),
            connected: connected.clone(),
        }));
        let follow = {
            let (redis, routing) = (redis.clone(), routing.clone());
            async move {
                loop {
                    let topology = topologies.borrow_and_update().clone();
                    routing.lock().follow(topology, &redis, telling);
                    if topologies.changed().await.is_err() {
                        return;
                    }
                }
            }
        };
        Connections {
            redis,
            routing,
            connected,
            following: tokio::spawn(follow),
            waiting: Mutex::default(),
        }
    }

    pub fn client(&self) -> &Arc<Redis> {
        &self.redis
    }

    /// Runs a script in the slot of its first key, within the client's budget.
    ///
    /// # Panics
    /// Without a key.
    pub async fn run(
        &self,
        script: &Script,
        keys: &[&str],
        args: &[Arg<'_>],
    ) -> Result<Value, CallError> {
        self.run_within(self.redis.timeout, script, keys, args)
            .await
    }

    /// As [`Connections::run`], with a budget of its own, for what no request waits for.
    pub async fn run_within(
        &self,
        budget: Duration,
        script: &Script,
        keys: &[&str],
        args: &[Arg<'_>],
    ) -> Result<Value, CallError> {
        let first = script.by_hash(keys, args);
        self.send(budget, keys, first, || script.whole(keys, args))
            .await
    }

    /// Sends a command whose words are `words`, to the node of `key`, which is to be among them. With a budget of its own.
    pub async fn command(
        &self,
        budget: Duration,
        key: &str,
        words: &[Arg<'_>],
    ) -> Result<Value, CallError> {
        let mut command = Cmd::new();
        script::put(&mut command, words);
        self.send_plain(budget, &[key], command).await
    }

    /// Deletes keys of one slot; how many there were.
    ///
    /// # Panics
    /// Without a key.
    pub async fn delete(&self, keys: &[&str]) -> Result<u64, CallError> {
        let mut command = redis::cmd("DEL");
        command.arg(keys);
        let deleted = self.send_plain(self.redis.timeout, keys, command);
        read::number(&deleted.await?)
    }

    /// Says something on a channel.
    pub async fn publish(&self, channel: &str, payload: &str) -> Result<(), CallError> {
        let mut command = redis::cmd("PUBLISH");
        command.arg(channel).arg(payload);
        self.send_plain(self.redis.timeout, &[channel], command)
            .await
            .map(drop)
    }

    /// A command that is no script.
    async fn send_plain(
        &self,
        budget: Duration,
        keys: &[&str],
        command: Cmd,
    ) -> Result<Value, CallError> {
        self.send(budget, keys, command.clone(), || command.clone())
            .await
    }

    async fn send(
        &self,
        budget: Duration,
        keys: &[&str],
        command: Cmd,
        whole: impl Fn() -> Cmd,
    ) -> Result<Value, CallError> {
        let began = clock::now();
        let slot = keys::slot(keys[0].as_bytes());
        let answer = self
            .attempts(slot, keys, command, whole, Instant::now() + budget)
            .await;
        if answer == Err(CallError::Down) {
            // Another node may have taken over.
            self.redis.suspect_topology();
        }
        self.redis.count(&answer, began.elapsed());
        answer
    }

    /// `whole` is what is sent to a node that does not know the script of `command`.
    async fn attempts(
        &self,
        slot: u16,
        keys: &[&str],
        mut command: Cmd,
        whole: impl Fn() -> Cmd,
        deadline: Instant,
    ) -> Result<Value, CallError> {
        let mut redirected: Option<(Arc<Node>, bool)> = None;
        for _ in 0..ATTEMPTS {
            let (node, asking) = match redirected.take() {
                Some(redirected) => redirected,
                None => (self.owner(slot).ok_or(CallError::Down)?, false),
            };
            let error = match node.send(&command, asking, deadline).await? {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match error.kind() {
                ErrorKind::Server(ServerErrorKind::NoScript) => {
                    command = whole();
                    // A slot on the move is still where it was asked for.
                    redirected = Some((node, asking));
                }
                ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::Ask) => {
                    let moved = error.kind() == ErrorKind::Server(ServerErrorKind::Moved);
                    let to = error
                        .redirect_node()
                        .and_then(|(to, _)| Address::parse(to, &node.address.host))
                        .ok_or(CallError::Nonsense)?;
                    if moved {
                        self.redis.moved(slot, &to);
                    }
                    let to = self.routing.lock().node(&to, &self.redis);
                    to.connected(deadline).await?;
                    redirected = Some((to, !moved));
                }
                ErrorKind::Server(ServerErrorKind::TryAgain) => sleep(TRY_AGAIN).await,
                ErrorKind::Server(ServerErrorKind::CrossSlot)
                    if keys.iter().any(|key| keys::slot(key.as_bytes()) != slot) =>
                {
                    return Err(CallError::CrossSlot);
                }
                _ => {
                    let is_replica = is_read_only(&error);
                    if is_replica {
                        node.leave();
                    }
                    if is_replica || is_about_topology(&error) {
                        self.redis.suspect_topology();
                    }
                    let said = error.to_string();
                    // Of a stream that is new, or lost: who asks knows what to do.
                    let is_absent = |text: &str| said.contains(text);
                    if !["NOGROUP", "no such key"].into_iter().any(is_absent) {
                        self.redis
                            .note_refused(&node.address, reason(&error), &said);
                    }
                    return Err(CallError::Refused(said));
                }
            }
        }
        Err(CallError::Refused(
            "it was sent from node to node too often".to_owned(),
        ))
    }

    fn owner(&self, slot: u16) -> Option<Arc<Node>> {
        let routing = self.routing.lock();
        let address = routing.topology.owner(slot)?;
        routing.nodes.get(address).cloned()
    }

    /// Of every node that has slots.
    pub fn health(&self) -> Vec<NodeHealth> {
        let routing = self.routing.lock();
        routing.nodes.values().map(|node| node.health()).collect()
    }

    /// Whether every slot has a node.
    pub fn knows_all_slots(&self) -> bool {
        self.routing.lock().topology.is_whole()
    }

    /// Waits until a node is connected that was not, or was by another connection: it may have been started anew, without its data, or
    /// have taken over from one whose last writes it lacks. What came since the last wait is not missed. For one who waits at a time.
    pub async fn next_connected(&self) {
        self.connected.notified().await;
    }

    /// Waits until every node that has slots is connected; false if `within` is over first.
    pub async fn ready(&self, within: Duration) -> bool {
        let all_up = async {
            loop {
                let up = {
                    let routing = self.routing.lock();
                    routing.topology.is_whole() && routing.nodes.values().all(|node| node.is_up())
                };
                if up {
                    return;
                }
                sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(within, all_up).await.is_ok()
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.following.abort();
    }
}

impl Routing {
    /// Goes over to `topology`; connections to nodes that stay, stay.
    fn follow(&mut self, topology: Arc<Topology>, redis: &Arc<Redis>, telling: Telling) {
        let kept = |address: &Address| self.nodes.get(address).cloned();
        self.nodes = topology
            .nodes()
            .map(|address| {
                let node =
                    kept(address).unwrap_or_else(|| Arc::new(self.start(address, redis, telling)));
                (address.clone(), node)
            })
            .collect();
        self.topology = topology;
    }

    /// The node of an address that may be new.
    fn node(&mut self, address: &Address, redis: &Arc<Redis>) -> Arc<Node> {
        if let Some(node) = self.nodes.get(address) {
            return node.clone();
        }
        let node = Arc::new(self.start(address, redis, Telling::Silent));
        self.nodes.insert(address.clone(), node.clone());
        node
    }

    fn start(&self, address: &Address, redis: &Arc<Redis>, telling: Telling) -> Node {
        let connected = self.connected.clone();
        Node::start(redis.clone(), address.clone(), telling, connected)
    }
}

/// Whether a node that says so may not be the one to ask.
fn is_about_topology(error: &RedisError) -> bool {
    let kind = matches!(
        error.kind(),
        ErrorKind::Server(
            ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
                | ServerErrorKind::BusyLoading
        )
    );
    // A master that its replicas have left may be one of before.
    kind || error.code() == Some("NOREPLICAS")
}

/// Why a server refuses: the code of its error, such as `OOM`.
fn reason(error: &RedisError) -> &str {
    let is_code = |word: &&str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_uppercase());
    let mut words = error.detail().unwrap_or_default().split(' ');
    // As in `is_read_only`.
    let within = words.find_map(|word| word.strip_prefix('-').filter(is_code));
    within.or(error.code()).unwrap_or_default()
}

/// Whether the node has become a replica.
fn is_read_only(error: &RedisError) -> bool {
    // Redis 6.2 puts what a script's command was refused for into a text of its own.
    let says = |text: &str| text.contains("-READONLY ");
    error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly) || error.detail().is_some_and(says)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn a_call_is_counted_by_what_became_of_it() {
        let text = "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nredis: {urls: redis://127.0.0.1:1}\n";
        let settings = check::parse(text, &|_| None).unwrap().redis.unwrap().main;
        let metrics = Metrics::default();
        let (counts, time) = (metrics.redis.of("main"), Duration::from_millis(1));
        let redis = Redis::new(
            "main",
            settings,
            None,
            time,
            time,
            counts,
            Counter::default(),
        );
        let refused = || Err(CallError::Refused("OOM".to_owned()));
        let became: [(&str, Vec<Result<Value, CallError>>); 4] = [
            ("answered", vec![Ok(Value::Nil)]),
            (
                "timed_out",
                vec![Err(CallError::Timeout), Err(CallError::Timeout)],
            ),
            ("down", vec![Err(CallError::Down); 3]),
            (
                "refused",
                vec![refused(), refused(), refused(), Err(CallError::Nonsense)],
            ),
        ];
        for answer in became.iter().flat_map(|(_, answers)| answers) {
            redis.count(answer, time);
        }
        let text = metrics.text();
        for (result, answers) in &became {
            let calls = answers.len();
            let line =
                format!("weir_redis_calls_total{{client=\"main\",result=\"{result}\"}} {calls}");
            assert!(text.lines().any(|other| other == line), "{line}: {text}");
        }
        let observed = "weir_redis_call_duration_seconds_count{client=\"main\"} 10";
        assert!(text.contains(observed), "{text}");
    }
}
