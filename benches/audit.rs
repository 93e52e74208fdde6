//! What an audited event costs on its way from a lane to where it is kept: CPU time of each process that has a part in it.
//!
//! Events come at a steady rate, from a lane's thread into the threads that a weir ships by, through a Redis of this bench's own, to a
//! worker that stores them in a Postgres of this bench's own, which waits for its disk as it does by itself. Producer and worker are
//! threads of this process.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a bench ends it; what it measures is printed"
)]

#[path = "../tests/harness/mod.rs"]
mod harness;
mod measure;

use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use harness::redis::{Server, key_prefix};
use harness::shipping::control;
use harness::{eventually_within, fleet, postgres};
use measure::events::event;
use measure::{Options, family_cpu, process_cpu, thread_cpu, threads_cpu};
use tokio::sync::{oneshot, watch};
use weir::audit::ship::{self, Shipping};
use weir::audit::{self, Recorder};
use weir::background::ingest::{self, Settings};
use weir::clock;
use weir::config::audit::{Delivery, Stream};
use weir::config::redis::Tls;
use weir::config::worker::Worker;
use weir::config::{self, Secret};
use weir::event::{AuditEvent, Encoded, Micros};
use weir::heartbeat::Heartbeat;
use weir::store::audit::batch::Boot;
use weir::store::audit::chain::Hasher;
use weir::store::postgres::{Postgres, migrate};
use weir::store::spool::Spool;
use weir::telemetry::metrics::Metrics;

/// Events that a lane hands on at once, where no request waits for them.
const LANE_BATCH: usize = 64;
/// Between two bursts of a steady rate, about: so many events as come in this time are handed on together.
const BURST: Duration = Duration::from_millis(20);
/// The same where requests wait, whose events a lane lays down one by one as it answers.
const AWAITED_BURST: Duration = Duration::from_millis(1);
const SPOOL: u64 = 256 << 20;
/// For what is under way at the end.
const SETTLED: Duration = Duration::from_secs(60);
/// Different events, of which each comes again and again.
const DIFFERENT: usize = 10_000;

struct Case {
    name: &'static str,
    delivery: Delivery,
    pace: Pace,
}

#[derive(Clone, Copy)]
enum Pace {
    /// Events a second.
    Steady(u32),
    /// As fast as they are stored: no more than [`UNDERWAY`] wait for that.
    FlatOut,
}

const CASES: [Case; 6] = [
    Case {
        name: "best effort, flat out",
        delivery: Delivery::BestEffort,
        pace: Pace::FlatOut,
    },
    Case {
        name: "best effort, 150,000/s",
        delivery: Delivery::BestEffort,
        pace: Pace::Steady(150_000),
    },
    Case {
        name: "best effort, 20,000/s",
        delivery: Delivery::BestEffort,
        pace: Pace::Steady(20_000),
    },
    Case {
        name: "guaranteed, 20,000/s",
        delivery: Delivery::Guaranteed,
        pace: Pace::Steady(20_000),
    },
    // As much as `make bench-lane` asks for at its pace, which runs this beside a lane.
    Case {
        name: "guaranteed, 12,000/s",
        delivery: Delivery::Guaranteed,
        pace: Pace::Steady(12_000),
    },
    Case {
        name: "guaranteed, 1,000/s",
        delivery: Delivery::Guaranteed,
        pace: Pace::Steady(1_000),
    },
];

/// Events that wait to be packed, and those that are not stored yet, at most, when they come as fast as they are stored.
const QUEUED: u64 = 50_000;
const UNDERWAY: u64 = 250_000;
/// How often it is looked how many are not stored yet.
const LOOKS: u32 = 6;

/// A weir, as far as its audit goes.
struct Producer {
    recorder: Recorder,
    worker: audit::Writers,
    /// Ends the control thread.
    _control: oneshot::Sender<()>,
}

/// CPU time of the parts that an event's way has, and what went that way.
struct Spent {
    lane: Duration,
    shipping: Duration,
    redis: Duration,
    worker: Duration,
    postgres: Duration,
    events: f64,
    batches: f64,
    transactions: f64,
    /// What each takes in Postgres once its day is over: its row and its part of its batch's, with all indexes.
    bytes: f64,
    /// Events that were not stored yet, in the course of the time.
    behind: Vec<u64>,
    /// From the first event until all were stored.
    took: Duration,
}

fn main() {
    let options = Options::read();
    let time = match (options.seconds, options.whole) {
        (Some(seconds), _) => Duration::from_secs(seconds),
        (None, true) => Duration::from_secs(60),
        (None, false) => Duration::from_secs(1),
    };
    let what = format!(
        "CPU microseconds an event over {time:?}: of the lane that encodes it and hands it on, {LANE_BATCH} together \
         or, where delivery is guaranteed, laid down for the thread that packs as a proxy's lane does; of the threads that pack, hash, spool and send; of Redis; of the worker; \
         and of Postgres with all its processes. \
         Bytes in Postgres are of events and batches with all indexes, that by user too, which a day gets once it is over."
    );
    let postgres = measure::said("postgres", &["--version"]);
    let servers = format!(
        "Redis {} and {postgres}, a server each on this machine",
        measure::redis()
    );
    let mut page = measure::opening_with(
        "The audit, from a lane to Postgres",
        "bench-audit",
        &what,
        &servers,
    );
    page.push_str(
        "|  | events/s | behind, in the course | events a batch | a transaction | B in Postgres | lane | shipping | Redis | worker | Postgres | together |\n\
         |---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for mut case in CASES.into_iter().filter(|case| options.takes(case.name)) {
        if let (false, Pace::Steady(rate)) = (options.whole, &mut case.pace) {
            // A build for tests keeps up with no more.
            *rate /= 20;
        }
        let row = row(&case, &measure(&case, time));
        println!("{}", row.trim_end());
        page.push_str(&row);
    }
    options.publish(&page);
}

fn row(case: &Case, spent: &Spent) -> String {
    let parts = [
        spent.lane,
        spent.shipping,
        spent.redis,
        spent.worker,
        spent.postgres,
    ];
    let behind = spent
        .behind
        .iter()
        .map(|count| measure::grouped(*count as f64));
    let behind: Vec<_> = behind.collect();
    let together: Duration = parts.iter().sum();
    let parts = parts.into_iter().chain([together]);
    let parts = parts.map(|part| format!("{:.2}", part.as_secs_f64() * 1e6 / spent.events));
    format!(
        "| {} | {} | {} | {:.0} | {:.0} | {:.0} | {} |\n",
        case.name,
        measure::grouped(spent.events / spent.took.as_secs_f64()),
        behind.join(", "),
        spent.events / spent.batches,
        spent.events / spent.transactions,
        spent.bytes,
        parts.collect::<Vec<_>>().join(" | "),
    )
}

fn measure(case: &Case, time: Duration) -> Spent {
    let server = Server::single();
    let database = postgres::Server::with(&["shared_buffers=256MB"]);
    let folder = tempfile::tempdir().unwrap();
    let prefix = key_prefix();
    let shutdown = work(&server, &prefix, &database.url());
    let producer = Producer::start(&server, &prefix, case.delivery, folder.path());
    let events: Vec<_> = (0..DIFFERENT).map(event).collect();
    // What a start costs is not an event's.
    produce(&producer.recorder, &events, case, time / 10);
    settle(&producer.recorder);
    let postmaster = database.one(r"SELECT split_part(pg_read_file('postmaster.pid'), E'\n', 1)");
    let postmaster = postmaster.parse().unwrap();
    let number = |sql: &str| database.one(sql).parse::<f64>().unwrap();
    let stored = || {
        [
            number("SELECT count(*) FROM weir.audit_events"),
            number("SELECT count(*) FROM weir.audit_batches"),
            number("SELECT count(DISTINCT arrival) FROM weir.audit_batches"),
        ]
    };
    let spent = || {
        [
            threads_cpu(&["audit", "audit-send", "control"]),
            process_cpu(server.pid()),
            threads_cpu(&["worker"]),
            family_cpu(postmaster),
        ]
    };
    let (stored_before, spent_before) = (stored(), spent());
    println!("begins");
    let start = clock::now();
    let (lane, (recorded, behind)) = thread::scope(|scope| {
        let lane = scope.spawn(|| {
            let start = thread_cpu();
            let events = produce(&producer.recorder, &events, case, time);
            (thread_cpu() - start, events)
        });
        lane.join().unwrap()
    });
    settle(&producer.recorder);
    let took = start.elapsed();
    let (spent, stored) = (spent(), stored());
    let [shipping, redis, worker, postgres] = std::array::from_fn(|n| spent[n] - spent_before[n]);
    let all_events = stored[0];
    let [events, batches, transactions] = std::array::from_fn(|n| stored[n] - stored_before[n]);
    assert_eq!(events, recorded as f64);
    // As the worker makes it of a day that is over.
    database.query("CREATE INDEX ON weir.audit_events (username, time)");
    let bytes = number(
        "SELECT sum(pg_total_relation_size(relid))
         FROM (VALUES ('weir.audit_events'::regclass), ('weir.audit_batches')) AS tables (parent),
             pg_partition_tree(parent) WHERE isleaf",
    ) / all_events;
    let counts = producer.worker.stop(SETTLED);
    assert_eq!((counts.dropped, counts.underway), (0, 0), "{counts:?}");
    shutdown.send(true).unwrap();
    Spent {
        lane,
        shipping,
        redis,
        worker,
        postgres,
        events,
        batches,
        transactions,
        bytes,
        behind,
        took,
    }
}

/// A worker, until it is told to end.
fn work(server: &Server, prefix: &str, url: &str) -> watch::Sender<bool> {
    let (shutdown, is_shut) = watch::channel(false);
    let (ready, is_ready) = mpsc::channel();
    let fleet = fleet(&server.yaml(prefix));
    let config = config::postgres::Postgres {
        write: Secret(url.to_owned()),
        read: Vec::new(),
        write_pool: 8,
        read_pool: 1,
        timeout: SETTLED,
        migrate: true,
        tls: Tls::default(),
    };
    let settings = Settings {
        stream: Stream::default(),
        worker: Worker::default(),
    };
    let run = move || {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.enable_all().thread_name("worker").build().unwrap();
        runtime.block_on(async {
            let postgres = Postgres::new(&config).unwrap();
            let connection = postgres.write().await.unwrap();
            migrate::migrate(connection).await.unwrap();
            let redis = fleet.join().main.clone();
            ready.send(()).unwrap();
            let metrics = Metrics::default().ingest.clone();
            let heart = Heartbeat::default();
            ingest::run(settings, fleet, redis, postgres, metrics, heart, is_shut)
                .await
                .unwrap();
        });
    };
    let named = thread::Builder::new().name("worker".to_owned());
    named.spawn(run).unwrap();
    is_ready.recv().unwrap();
    shutdown
}

/// Records events at the case's pace for this long; how many, and how many of them were not stored at each look.
fn produce(
    recorder: &Recorder,
    events: &[AuditEvent],
    case: &Case,
    time: Duration,
) -> (u64, Vec<u64>) {
    let mut events = events.iter().cycle();
    let (mut recorded, mut behind) = (0, Vec::new());
    let start = clock::now();
    let batch = match (case.pace, case.delivery) {
        (Pace::Steady(rate), Delivery::BestEffort) => LANE_BATCH.min(in_time(rate, BURST)),
        (Pace::Steady(rate), Delivery::Guaranteed) => in_time(rate, AWAITED_BURST),
        (Pace::FlatOut, _) => LANE_BATCH,
    };
    let tray = recorder.tray();
    let waiting = || {
        let counts = recorder.counts();
        counts.queued + counts.underway
    };
    let is_full = || {
        let counts = recorder.counts();
        counts.queued > QUEUED || counts.underway > UNDERWAY
    };
    while start.elapsed() < time {
        let burst = events.by_ref().take(batch);
        match case.delivery {
            Delivery::BestEffort => {
                let mut encoded = Encoded::default();
                burst.for_each(|event| encoded.push(event));
                recorder.record(encoded);
            }
            Delivery::Guaranteed => burst.for_each(|event| drop(tray.lay(event))),
        }
        recorded += batch as u64;
        let look = time / LOOKS * u32::try_from(behind.len() + 1).unwrap();
        if start.elapsed() >= look {
            behind.push(waiting());
        }
        match case.pace {
            Pace::Steady(rate) => {
                let next = Duration::from_secs(1) * u32::try_from(recorded).unwrap() / rate;
                thread::sleep(next.saturating_sub(start.elapsed()));
            }
            Pace::FlatOut => {
                while is_full() {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
    behind.push(waiting());
    (recorded, behind)
}

/// How many events of a rate come in this time; one at least.
fn in_time(rate: u32, time: Duration) -> usize {
    ((f64::from(rate) * time.as_secs_f64()) as usize).max(1)
}

/// Until nothing is under way.
fn settle(recorder: &Recorder) {
    eventually_within(SETTLED, || {
        let counts = recorder.counts();
        (counts.queued, counts.underway) == (0, 0)
    });
}

impl Producer {
    fn start(server: &Server, prefix: &str, delivery: Delivery, spool: &Path) -> Producer {
        let fleet = fleet(&server.yaml(prefix));
        let control = control(fleet.clone());
        let boot = clock::uuid(clock::wall());
        let hasher = || Hasher::new(Some(b"a key of thirty-two bytes, or so"));
        let (spool, abandoned) = Spool::open(spool, SPOOL, boot).unwrap();
        let shipping = Shipping {
            boot: Boot::new("a".to_owned(), boot, Micros(7), hasher()),
            hasher: hasher(),
            stream: Stream::default(),
            delivery,
            is_stored_here: false,
            spool: Some(spool),
            abandoned,
            fleet,
            memory: ship::MEMORY,
        };
        let (recorder, worker) = ship::start(shipping, 100_000).unwrap();
        Producer {
            recorder,
            worker,
            _control: control,
        }
    }
}
