//! This process among those that share state through Redis: its clients, its name, how many live, and whether it hears
//! them.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use prometheus_client::metrics::counter::Counter;
use tokio::time::sleep;

use super::redis::{Arg, CallError, Connections, OpenError, Redis, Script, Telling, read};
use crate::clock;
use crate::config::redis::{self, Client};
use crate::keys::Keys;
use crate::net::tls::{Spoken, StoreTls};
use crate::policy::peers::Peers;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::panics::begin_again;

/// Between signs of life.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// For Redis to be there when a process or a lane begins, at most: it serves without, too.
const READY_WITHIN: Duration = Duration::from_millis(500);
/// A process that has given none for this long counts as dead.
const DEAD_AFTER: Duration = Duration::from_secs(5);

/// What the process shares with others.
#[derive(Debug)]
pub struct Fleet {
    pub keys: Keys,
    /// This process's name among the others: a UUID, a new one at each start.
    pub process: String,
    pub main: Arc<Redis>,
    /// `main`, unless the file tells it apart.
    pub rate_limit: Arc<Redis>,
    /// `main`, unless the file tells it apart.
    pub sessions: Arc<Redis>,
    /// Of all three, where one of them is spoken to by TLS.
    pub tls: Option<Arc<StoreTls>>,
    /// Of sessions that end elsewhere.
    pub hears_sessions: Arc<Hearing>,
    alive: AtomicUsize,
    beat: Script,
    panics: Counter,
}

/// Whether a process hears what others say, and since when: what it learnt before may have changed unheard.
#[derive(Debug, Default)]
pub struct Hearing(AtomicU64);

/// One thread's connections of each client; the same one where the clients are.
#[derive(Debug, Clone)]
pub struct FleetConnections {
    pub main: Arc<Connections>,
    pub rate_limit: Arc<Connections>,
    pub sessions: Arc<Connections>,
}

impl Fleet {
    /// Connects to nothing yet; reads the files of `redis.tls` where a client uses TLS.
    pub fn new(config: &redis::Redis, metrics: &Metrics) -> Result<Arc<Fleet>, OpenError> {
        let clients = [&config.rate_limit, &config.sessions];
        let mut clients = clients.into_iter().flatten().chain([&config.main]);
        let read = || StoreTls::read("redis.tls", &config.tls, Spoken::Always);
        let tls = clients.any(|client| client.tls).then(read).transpose()?;
        let client = |name: &'static str, settings: &Client| {
            let (timeout, connect_timeout) = (config.timeout, config.connect_timeout);
            let panics = metrics.tasks.panics.clone();
            let metrics = metrics.redis.of(name);
            let settings = settings.clone();
            let tls = tls.as_ref().map(|tls| tls.latest());
            Redis::new(
                name,
                settings,
                tls,
                timeout,
                connect_timeout,
                metrics,
                panics,
            )
        };
        let main = client("main", &config.main);
        let or_main = |name, settings: &Option<Client>| match settings {
            Some(settings) => client(name, settings),
            None => main.clone(),
        };
        Ok(Arc::new(Fleet {
            keys: Keys::of(config),
            process: clock::uuid(clock::wall()).to_string(),
            rate_limit: or_main("rate_limit", &config.rate_limit),
            sessions: or_main("sessions", &config.sessions),
            tls,
            hears_sessions: Arc::default(),
            alive: AtomicUsize::new(1),
            beat: Script::new(include_str!("../../lua/process_beat.lua")),
            panics: metrics.tasks.panics.clone(),
            main,
        }))
    }

    /// Begins to connect, on the runtime of this thread, which is not the one that [watches](Fleet::watch) and logs what becomes of nodes.
    pub fn connect(&self) -> FleetConnections {
        self.begin(Telling::Silent)
    }

    fn begin(&self, telling: Telling) -> FleetConnections {
        let main = Arc::new(Connections::start(self.main.clone(), telling));
        let or_main = |client: &Arc<Redis>| match Arc::ptr_eq(client, &self.main) {
            true => main.clone(),
            false => Arc::new(Connections::start(client.clone(), telling)),
        };
        FleetConnections {
            rate_limit: or_main(&self.rate_limit),
            sessions: or_main(&self.sessions),
            main,
        }
    }

    /// Begins what the process does among others, on the runtime of this thread, which is to be the control thread's: it keeps the
    /// maps of slots, and gives signs of life.
    pub fn join(self: &Arc<Self>) -> FleetConnections {
        let redis = self.watch();
        let (fleet, rate_limit) = (self.clone(), redis.rate_limit.clone());
        let beat = move || fleet.clone().beat(rate_limit.clone());
        tokio::spawn(begin_again(self.panics.clone(), beat));
        redis
    }

    /// As [`Fleet::join`], for a process that serves no requests: it gives no signs of life, since limits are shared among those
    /// that do.
    pub fn watch(&self) -> FleetConnections {
        for client in self.clients() {
            let client = client.clone();
            let keep = move || client.clone().keep_topology();
            tokio::spawn(begin_again(self.panics.clone(), keep));
        }
        self.begin(Telling::Logged)
    }

    /// The clients, each once.
    fn clients(&self) -> impl Iterator<Item = &Arc<Redis>> {
        once([&self.main, &self.rate_limit, &self.sessions])
    }

    /// How long a process, or a lane, that begins is to wait for Redis.
    pub fn ready_within(&self) -> Duration {
        self.main.connect_timeout.min(READY_WITHIN)
    }

    /// How many processes share the state, this one among them: as it was last known.
    pub fn alive(&self) -> usize {
        self.alive.load(Ordering::Relaxed)
    }

    /// Gives signs of life and counts those of others, for ever.
    async fn beat(self: Arc<Self>, redis: Arc<Connections>) -> Infallible {
        let mut peers = Peers::default();
        loop {
            // Unanswered, the last count stays: dead processes take no requests, and live ones are as many as before.
            match self.beat_once(&redis).await {
                Ok(alive) => peers.told(alive, clock::mono()),
                Err(_) => peers.untold(),
            }
            let alive = usize::try_from(peers.count()).unwrap_or(usize::MAX);
            self.alive.store(alive.max(1), Ordering::Relaxed);
            sleep(BEAT_EVERY).await;
        }
    }

    async fn beat_once(&self, redis: &Connections) -> Result<u64, CallError> {
        let key = self.keys.processes();
        let age = Arg::Int(clock::millis(DEAD_AFTER));
        let args = [Arg::Text(&self.process), age];
        let keys = [&*key];
        let alive = redis.run_within(BEAT_EVERY, &self.beat, &keys, &args);
        read::number(&alive.await?)
    }
}

impl Hearing {
    /// It hears from now on; what was said before is unknown.
    pub fn begin(&self) {
        self.turn(true);
    }

    /// It hears no more.
    pub fn end(&self) {
        self.turn(false);
    }

    /// Odd while it hears: to the next such number, whatever it was.
    fn turn(&self, hears: bool) {
        let next = |now: u64| Some(now + if (now % 2 == 1) == hears { 2 } else { 1 });
        let turned = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        turned.expect("there is always a next");
    }

    /// Differs after each beginning and each end.
    pub fn era(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Whether it has heard all that was said since this era.
    pub fn hears_since(&self, era: u64) -> bool {
        era % 2 == 1 && era == self.era()
    }
}

/// The first, and those of the others that are not the first again.
fn once<T>([main, others @ ..]: [&Arc<T>; 3]) -> impl Iterator<Item = &Arc<T>> {
    let own = others.into_iter().filter(|own| !Arc::ptr_eq(own, main));
    [main].into_iter().chain(own)
}

impl FleetConnections {
    /// Those of each client, once.
    pub fn each(&self) -> impl Iterator<Item = &Arc<Connections>> {
        once([&self.main, &self.rate_limit, &self.sessions])
    }

    /// Waits until every node is connected; false if `within` is over first.
    pub async fn ready(&self, within: Duration) -> bool {
        let ready = join_all(self.each().map(|redis| redis.ready(within))).await;
        ready.into_iter().all(|ready| ready)
    }
}
