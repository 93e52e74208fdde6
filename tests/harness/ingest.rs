//! A worker between a Redis and a Postgres of a test's own, and batches for it to carry.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;
use weir::background::ingest::{self, Settings};
use weir::config::redis::Tls;
use weir::config::worker::Worker;
use weir::config::{Secret, audit, postgres};
use weir::event::{AuditEvent, Encoded, Micros};
use weir::heartbeat::Heartbeat;
use weir::store::audit::batch::{Boot, Header};
use weir::store::audit::chain::Hasher;
use weir::store::fleet::Fleet;
use weir::store::postgres::{Postgres, migrate};
use weir::store::redis::{Arg, Connections};
use weir::store::streams::consume::Streams;
use weir::telemetry::metrics::Metrics;

use super::postgres::query;
use super::redis::{self, Answer};
use super::{DEADLINE, fleet, metrics};

pub const DAY: Duration = Duration::from_secs(86_400);
pub const BUDGET: Duration = Duration::from_secs(5);

/// Servers, and what a worker needs to know of them.
pub struct World {
    pub redis: redis::Server,
    pub url: String,
    pub postgres: Arc<Postgres>,
    pub settings: Settings,
    /// What adds batches, and looks.
    pub fleet: Arc<Fleet>,
    pub connections: Arc<Connections>,
    pub streams: Streams,
}

/// A worker's loops.
pub struct Running {
    pub metrics: Metrics,
    pub shutdown: watch::Sender<bool>,
    pub task: JoinHandle<anyhow::Result<()>>,
}

impl World {
    pub async fn new(url: String) -> World {
        let config = postgres::Postgres {
            write: Secret(url.clone()),
            read: Vec::new(),
            write_pool: 8,
            read_pool: 2,
            timeout: BUDGET,
            migrate: true,
            tls: Tls::default(),
        };
        let postgres = Postgres::new(&config).unwrap();
        migrate::migrate(postgres.write().await.unwrap())
            .await
            .unwrap();
        let settings = Settings {
            stream: audit::Stream {
                shards: 3,
                ..audit::Stream::default()
            },
            worker: Worker {
                batch_wait: Duration::from_millis(50),
                claim_after: Duration::from_secs(2),
                max_deliveries: 2,
                ..Worker::default()
            },
        };
        let redis = redis::Server::single();
        let fleet = fleet(&redis.yaml("t"));
        let connections = fleet.join().main.clone();
        assert!(connections.ready(DEADLINE).await);
        let group = &settings.worker.group;
        let streams = Streams::new(connections.clone(), &fleet.keys, &settings.stream, group);
        World {
            redis,
            url,
            postgres,
            settings,
            fleet,
            connections,
            streams,
        }
    }

    pub fn work(&self) -> Running {
        let metrics = Metrics::default();
        let (shutdown, is_shut) = watch::channel(false);
        let fleet = fleet(&self.redis.yaml("t"));
        let redis = fleet.join().main.clone();
        let task = ingest::run(
            self.settings.clone(),
            fleet,
            redis,
            self.postgres.clone(),
            metrics.ingest.clone(),
            Heartbeat::default(),
            is_shut,
        );
        Running {
            metrics,
            shutdown,
            task: tokio::spawn(task),
        }
    }

    pub async fn add(&self, shard: u16, batch: &[u8]) {
        let key = self.fleet.keys.audit_stream("audit", shard);
        let words = [
            Arg::Text("XADD"),
            Arg::Text(&key),
            Arg::Text("*"),
            Arg::Text("b"),
            Arg::Bytes(batch),
        ];
        // What was added and not answered is added again, as a proxy does.
        eventually(async || self.connections.command(BUDGET, &key, &words).await.is_ok()).await;
    }

    pub fn cli(&self, args: &[&str]) -> Answer {
        self.redis.cli(args)
    }

    /// What is new in the first shard was given to a worker so often, a minute ago, and not stored.
    pub async fn given_out(&self, deliveries: &str) {
        let read = self.streams.read(0, "dead", 10).await.unwrap();
        let key = self.key(0);
        let mut claim = vec!["XCLAIM", &key, "weir", "dead", "0"];
        claim.extend(read.iter().map(|entry| entry.id.as_str()));
        claim.extend(["IDLE", "60000", "RETRYCOUNT", deliveries]);
        self.cli(&claim);
    }

    /// Of one shard, as Redis has it.
    pub fn key(&self, shard: u16) -> String {
        self.fleet.keys.audit_stream("audit", shard)
    }

    /// Of the entries of one shard.
    pub fn ids(&self, shard: u16) -> Vec<String> {
        let entries = self.cli(&["XRANGE", &self.key(shard), "-", "+"]);
        let id = |entry: &Answer| match &entry.list()[0] {
            Answer::Text(id) => id.clone(),
            other => panic!("{other:?}"),
        };
        entries.list().iter().map(id).collect()
    }

    pub fn done(&self, header: &Header) -> bool {
        let boot = Uuid::from_bytes(header.boot).to_string();
        let key = self.fleet.keys.audit_done(&boot);
        let first = header.first.to_string();
        match self.cli(&["HGET", &key, &first]) {
            Answer::Text(last) => last == header.last().to_string(),
            _ => false,
        }
    }

    pub fn one(&self, sql: &str) -> String {
        query(&self.url, sql)[0][0].clone()
    }

    pub fn rows(&self) -> u64 {
        self.one("SELECT count(*) FROM weir.audit_events")
            .parse()
            .unwrap()
    }

    /// Until no stream has an entry.
    pub async fn ingested(&self) {
        eventually(async || self.streams.lag().await.is_ok_and(|lag| lag.waiting == 0)).await;
    }

    pub async fn dead_letters(&self) -> u64 {
        self.streams.lag().await.unwrap().dead_letters
    }

    /// That each boot has its events from the first to the last, each once, and its batches likewise.
    pub fn is_whole(&self, events: u64) {
        assert_eq!(self.rows(), events);
        let holes = "SELECT boot_id FROM weir.audit_events GROUP BY boot_id
            HAVING count(*) <> max(seq) OR count(DISTINCT seq) <> max(seq) OR min(seq) <> 1";
        assert_eq!(query(&self.url, holes), Vec::<Vec<String>>::new());
        let batches = "SELECT coalesce(sum(last - first + 1), 0) FROM weir.audit_batches";
        assert_eq!(self.one(batches), events.to_string());
    }
}

impl Running {
    pub fn counted(&self, metric: &str) -> u64 {
        let text = self.metrics.text();
        let value = metrics::value(&text, metric);
        value.unwrap_or_else(|| panic!("{metric} in {text}")) as u64
    }

    pub async fn stop(self) {
        self.shutdown.send(true).unwrap();
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    /// As by SIGKILL: nothing is ended in order.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

pub fn on_a_runtime<T>(test: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test)
}

/// Waits for what other tasks bring about.
pub async fn eventually(mut yes: impl AsyncFnMut() -> bool) {
    let all = async {
        while !yes().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE * 6, all)
        .await
        .expect("it did not happen");
}

pub fn boot(n: u8, started: Duration) -> Boot {
    let (id, hasher) = (Uuid::from_bytes([n; 16]), Hasher::new(Some(b"key")));
    Boot::new(format!("instance-{n}"), id, started.into(), hasher)
}

pub fn event(time: Micros, path: &str) -> AuditEvent<&str> {
    AuditEvent {
        time,
        path,
        ..AuditEvent::sample()
    }
}

/// A batch of `count` events of this moment.
pub fn pack(boot: &mut Boot, count: usize, now: Duration) -> (Header, Vec<u8>) {
    let mut encoded = Encoded::default();
    for n in 0..count {
        // What a column of text cannot hold is among them.
        let path = if n % 7 == 3 { "/\0" } else { "/a/b" };
        encoded.push(&event(now.into(), path));
    }
    boot.pack(&mut [encoded], now.into(), 0)
}
