//! What an audited event costs on its way from a lane to where it is kept: CPU time of each process that has a part in it.
//!
//! Events come at a steady rate, from a lane's thread into the threads that a weir ships by, through a Redis of this bench's own. The
//! worker's part is played by a thread that reads, says that all is committed, and deletes.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a bench ends it; what it measures is printed"
)]

#[path = "../tests/harness/mod.rs"]
mod harness;
mod measure;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use harness::eventually_within;
use harness::redis::{Server, key_prefix};
use measure::events::event;
use measure::link::{Link, Reply};
use measure::{Options, process_cpu, thread_cpu, threads_cpu};
use tokio::sync::oneshot;
use uuid::Uuid;
use weir::audit::receipt::Duty;
use weir::audit::ship::{self, Shipping};
use weir::audit::{Recorder, Worker};
use weir::clock;
use weir::config::audit::{Delivery, Stream};
use weir::config::check;
use weir::event::{AuditEvent, Encoded, Micros};
use weir::keys::Keys;
use weir::store::batch::{self, Boot};
use weir::store::chain::Hasher;
use weir::store::fleet::Fleet;
use weir::store::spool::Spool;
use weir::telemetry::metrics::Metrics;

/// Events that a lane hands on at once.
const LANE_BATCH: usize = 64;
const SPOOL: u64 = 256 << 20;
const GROUP: &str = "weir";
/// Entries that the worker's part reads at once.
const READ: &str = "64";
/// For what is under way at the end.
const SETTLED: Duration = Duration::from_secs(60);
/// Different events, of which each comes again and again.
const DIFFERENT: usize = 10_000;

struct Case {
    name: &'static str,
    delivery: Delivery,
    /// Events a second.
    rate: u32,
}

const CASES: [Case; 3] = [
    Case {
        name: "best effort",
        delivery: Delivery::BestEffort,
        rate: 20_000,
    },
    Case {
        name: "guaranteed",
        delivery: Delivery::Guaranteed,
        rate: 20_000,
    },
    Case {
        name: "guaranteed, few",
        delivery: Delivery::Guaranteed,
        rate: 1_000,
    },
];

/// A weir, as far as its audit goes.
struct Producer {
    recorder: Recorder,
    worker: Worker,
    /// Ends the control thread.
    _control: oneshot::Sender<()>,
}

/// CPU time of the parts that an event's way has, and what went that way.
#[derive(Clone, Copy, Default)]
struct Spent {
    lane: Duration,
    shipping: Duration,
    redis: Duration,
    events: u64,
    batches: u64,
    /// Of the batches' entries.
    bytes: u64,
}

/// What the worker's part has seen.
#[derive(Default)]
struct Drained {
    batches: AtomicU64,
    bytes: AtomicU64,
    ends: AtomicBool,
}

fn main() {
    let options = Options::read();
    let time = match options.whole {
        true => Duration::from_secs(60),
        false => Duration::from_secs(1),
    };
    let what = format!(
        "CPU microseconds an event over {time:?} at a steady rate: of the lane that encodes it and hands it on in batches of {LANE_BATCH} \
         (guaranteed: singly), of the threads that pack, hash, spool and send, and of Redis, whose part includes giving batches to \
         a worker and deleting them."
    );
    let servers = format!("Redis {}, one server on this machine", measure::redis());
    let mut page = measure::opening_with(
        "The audit, from a lane to where it is kept",
        "bench-audit",
        &what,
        &servers,
    );
    page.push_str(
        "|  | events/s | events a batch | B an event in Redis | lane | shipping | Redis | together |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for case in CASES.iter().filter(|case| options.takes(case.name)) {
        let row = row(case, time, &measure(case, time));
        println!("{}", row.trim_end());
        page.push_str(&row);
    }
    options.publish(&page);
}

fn row(case: &Case, time: Duration, spent: &Spent) -> String {
    let events = spent.events as f64;
    let micros = |part: Duration| part.as_secs_f64() * 1e6 / events;
    format!(
        "| {} | {} | {:.0} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} |\n",
        case.name,
        measure::grouped(events / time.as_secs_f64()),
        events / spent.batches as f64,
        spent.bytes as f64 / events,
        micros(spent.lane),
        micros(spent.shipping),
        micros(spent.redis),
        micros(spent.lane + spent.shipping + spent.redis),
    )
}

fn measure(case: &Case, time: Duration) -> Spent {
    let server = Server::single();
    let folder = tempfile::tempdir().unwrap();
    let prefix = key_prefix();
    let producer = Producer::start(&server, &prefix, case.delivery, folder.path());
    let drained = Drained::default();
    let events: Vec<_> = (0..DIFFERENT).map(event).collect();
    thread::scope(|scope| {
        scope.spawn(|| drain(&server, &prefix, &drained));
        // What a start costs is not an event's.
        produce(&producer.recorder, &events, case, time / 10);
        settle(&producer.recorder);
        let shipping = || threads_cpu(&["audit", "audit-send", "control"]);
        let before = (
            shipping(),
            process_cpu(server.pid()),
            drained.batches.load(Ordering::Relaxed),
            drained.bytes.load(Ordering::Relaxed),
        );
        let lane = scope.spawn(|| {
            let start = thread_cpu();
            let events = produce(&producer.recorder, &events, case, time);
            (thread_cpu() - start, events)
        });
        let (lane, events) = lane.join().unwrap();
        settle(&producer.recorder);
        let spent = Spent {
            lane,
            shipping: shipping() - before.0,
            redis: process_cpu(server.pid()) - before.1,
            events,
            batches: drained.batches.load(Ordering::Relaxed) - before.2,
            bytes: drained.bytes.load(Ordering::Relaxed) - before.3,
        };
        let counts = producer.worker.stop(SETTLED);
        assert_eq!((counts.dropped, counts.underway), (0, 0), "{counts:?}");
        drained.ends.store(true, Ordering::Relaxed);
        spent
    })
}

/// Records events at the case's rate for this long; how many.
fn produce(recorder: &Recorder, events: &[AuditEvent], case: &Case, time: Duration) -> u64 {
    let mut events = events.iter().cycle();
    let mut recorded = 0;
    let start = clock::now();
    let batch = LANE_BATCH.min(case.rate as usize / 50);
    while start.elapsed() < time {
        let mut encoded = Encoded::default();
        for event in events.by_ref().take(batch) {
            encoded.push(event);
            if case.delivery == Delivery::Guaranteed {
                recorder.record(std::mem::take(&mut encoded), Some(Duty::default()));
            }
        }
        if !encoded.is_empty() {
            recorder.record(encoded, None);
        }
        recorded += batch as u64;
        let next = Duration::from_secs(1) * u32::try_from(recorded).unwrap() / case.rate;
        thread::sleep(next.saturating_sub(start.elapsed()));
    }
    recorded
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
        let file = format!(
            "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n{}",
            server.yaml(prefix)
        );
        let config = check::parse(&file, &|_| None).unwrap();
        let fleet = Fleet::new(config.redis.as_ref().unwrap(), &Metrics::default()).unwrap();
        let control = control(fleet.clone());
        let boot = clock::uuid(clock::wall());
        let hasher = || Hasher::new(Some(b"a key of thirty-two bytes, or so"));
        let (spool, abandoned) = Spool::open(spool, SPOOL, boot).unwrap();
        let shipping = Shipping {
            boot: Boot::new("a".to_owned(), boot, Micros(7), hasher()),
            hasher: hasher(),
            stream: Stream::default(),
            delivery,
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

/// The thread that a weir talks to Redis on.
fn control(fleet: Arc<Fleet>) -> oneshot::Sender<()> {
    let (end, ended) = oneshot::channel();
    let (joined, joins) = mpsc::channel();
    let run = move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().build().unwrap().block_on(async {
            let _redis = fleet.join();
            joined.send(()).unwrap();
            let _ = ended.await;
        });
    };
    let named = thread::Builder::new().name("control".to_owned());
    named.spawn(run).unwrap();
    joins.recv().unwrap();
    end
}

/// Plays the worker's part in Redis.
fn drain(server: &Server, prefix: &str, drained: &Drained) {
    let keys = Keys::new(prefix);
    let stream = Stream::default();
    let streams = (0..stream.shards).map(|shard| keys.audit_stream(&stream.name, shard));
    let streams: Vec<_> = streams.collect();
    let mut link = Link::to(server);
    for stream in &streams {
        let create = ["XGROUP", "CREATE", stream, GROUP, "0", "MKSTREAM"].map(str::as_bytes);
        link.send(&[&create]);
    }
    let mut read = vec!["XREADGROUP", "GROUP", GROUP, "a", "COUNT", READ];
    read.extend(["BLOCK", "100", "STREAMS"]);
    read.extend(streams.iter().map(String::as_str));
    read.extend(streams.iter().map(|_| ">"));
    let read: Vec<_> = read.into_iter().map(str::as_bytes).collect();
    while !drained.ends.load(Ordering::Relaxed) {
        for of_stream in link.send(&[&read]).remove(0).list() {
            commit(&mut link, &keys, of_stream, drained);
        }
    }
}

/// Says that the batches of a stream are stored, and deletes them.
fn commit(link: &mut Link, keys: &Keys, of_stream: Reply, drained: &Drained) {
    let mut parts = of_stream.list().into_iter();
    let stream = parts.next().unwrap().bytes();
    let mut ack = vec![b"XACK".to_vec(), stream.clone(), GROUP.as_bytes().to_vec()];
    let mut delete = vec![b"XDEL".to_vec(), stream];
    let mut commands = Vec::new();
    for entry in parts.next().unwrap().list() {
        let mut entry = entry.list();
        let packed = entry.remove(1).list().remove(1).bytes();
        let header = batch::peek(&packed).unwrap();
        let done = keys.audit_done(&Uuid::from_bytes(header.boot).to_string());
        let (first, last) = (header.first.to_string(), header.last().to_string());
        let told = ["HSET", &done, &first, &last].map(|part| part.as_bytes().to_vec());
        commands.push(told.to_vec());
        let id = entry.remove(0).bytes();
        ack.push(id.clone());
        delete.push(id);
        drained.batches.fetch_add(1, Ordering::Relaxed);
        let bytes = u64::try_from(packed.len()).unwrap();
        drained.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    commands.extend([ack, delete]);
    let commands = commands.iter();
    let commands: Vec<Vec<&[u8]>> = commands
        .map(|command| command.iter().map(Vec::as_slice).collect())
        .collect();
    let commands: Vec<_> = commands.iter().map(Vec::as_slice).collect();
    link.send(&commands);
}
