//! The proxy's end of the audit as a process has it, and the worker's part as a test plays it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use uuid::Uuid;
use weir::audit::receipt::Receipt;
use weir::audit::ship::{self, Shipping};
use weir::audit::tray::{Laid, Tray};
use weir::audit::{Recorder, Writers};
use weir::clock;
use weir::config::audit::{Delivery, Stream};
use weir::event::{AuditEvent, Columns, Encoded, Micros};
use weir::keys::Keys;
use weir::store::audit::batch::{Batch, Boot, Header};
use weir::store::audit::chain::Hasher;
use weir::store::fleet::Fleet;
use weir::store::spool::Spool;

use super::redis::Server;
use super::{fleet, runtime};

pub const SHARDS: u16 = 4;
/// For a stop; nothing here waits so long unless it is to.
pub const WITHIN: Duration = Duration::from_secs(5);

/// A process, as far as its audit goes.
pub struct Process {
    pub recorder: Recorder,
    tray: Tray,
    pub worker: Option<Writers>,
    pub boot: Uuid,
    pub keys: Keys,
    pub prefix: String,
    /// Ends the control thread.
    _control: oneshot::Sender<()>,
}

/// What a process is to differ in.
pub struct With<'a> {
    pub prefix: &'a str,
    pub delivery: Delivery,
    pub spool: Option<(&'a Path, u64)>,
    pub max_length: u64,
    pub memory: usize,
}

impl With<'_> {
    pub fn best_effort(prefix: &str) -> With<'_> {
        With {
            prefix,
            delivery: Delivery::BestEffort,
            spool: None,
            max_length: 1_000,
            memory: ship::MEMORY,
        }
    }

    /// With a spool of so many bytes.
    pub fn guaranteed<'a>(prefix: &'a str, spool: &'a Path, max: u64) -> With<'a> {
        With {
            delivery: Delivery::Guaranteed,
            spool: Some((spool, max)),
            ..With::best_effort(prefix)
        }
    }
}

impl Process {
    pub fn start(server: &Server, with: &With<'_>) -> Process {
        Process::begin(&server.yaml(with.prefix), with)
    }

    pub fn begin(redis: &str, with: &With<'_>) -> Process {
        let fleet = fleet(redis);
        let control = control(fleet.clone());
        let boot = clock::uuid(clock::wall());
        let opened = with.spool.map(|(path, max)| Spool::open(path, max, boot));
        let (spool, abandoned) = opened.transpose().unwrap().unzip();
        let shipping = Shipping {
            boot: Boot::new("a".to_owned(), boot, Micros(7), Hasher::new(Some(b"k"))),
            hasher: Hasher::new(Some(b"k")),
            stream: Stream {
                shards: SHARDS,
                max_length: with.max_length,
                batch_events: 10,
                ..Stream::default()
            },
            delivery: with.delivery,
            is_stored_here: false,
            spool,
            abandoned: abandoned.unwrap_or_default(),
            fleet,
            memory: with.memory,
        };
        let (recorder, writers) = ship::start(shipping, 1_000).unwrap();
        Process {
            tray: recorder.tray(),
            recorder,
            worker: Some(writers),
            boot,
            keys: Keys::new(with.prefix),
            prefix: with.prefix.to_owned(),
            _control: control,
        }
    }

    pub fn record(&self, count: usize) {
        self.recorder.record(events(count));
    }

    /// As a lane lays events that requests wait for; the receipt of each group.
    pub fn record_awaited(&self, count: usize) -> Vec<Receipt> {
        let laid = (0..count).map(|_| self.tray.lay(&event("/")));
        laid.filter_map(|laid| match laid {
            Laid::First(receipt) => Some(receipt),
            Laid::Along => None,
            Laid::Refused => panic!("there is no room for an event"),
        })
        .collect()
    }

    /// The batches in the streams, by boot and number of the first event, with their streams.
    pub fn batches(&self, server: &Server) -> BTreeMap<(Uuid, u64), (Batch, u16)> {
        batches(server, &self.prefix)
    }

    /// The numbers of the events in the streams that this process has sent, with repetitions.
    pub fn seqs(&self, server: &Server) -> Vec<u64> {
        let batches = self.batches(server);
        let own = batches.iter().filter(|((boot, _), _)| *boot == self.boot);
        own.flat_map(|(_, (batch, _))| seqs(batch)).collect()
    }

    /// What the worker does once batches are stored; the numbers of their events.
    pub fn commit(&self, server: &Server) -> Vec<u64> {
        commit(server, &self.prefix, &self.keys)
    }

    pub fn stop(&mut self) -> weir::audit::Counts {
        self.worker.take().unwrap().stop(WITHIN)
    }
}

pub fn commit(server: &Server, prefix: &str, keys: &Keys) -> Vec<u64> {
    let stored = say_committed(server, prefix, keys, |_| true);
    // What came meanwhile is lost, and sent again.
    for shard in 0..SHARDS {
        server.cli(&["DEL", &keys.audit_stream("audit", shard)]);
    }
    stored
}

/// Of these of the batches in the streams; the numbers of their events.
pub fn say_committed(
    server: &Server,
    prefix: &str,
    keys: &Keys,
    these: impl Fn(&Header) -> bool,
) -> Vec<u64> {
    let mut stored = Vec::new();
    for ((boot, first), (batch, _)) in batches(server, prefix) {
        if these(&batch.header) {
            let done = keys.audit_done(&boot.to_string());
            let last = batch.header.last();
            server.cli(&["HSET", &done, &first.to_string(), &last.to_string()]);
            stored.extend(seqs(&batch));
        }
    }
    stored
}

/// The thread that a weir talks to Redis on, by the name `control`; it ends when what it returns is dropped.
pub fn control(fleet: Arc<Fleet>) -> oneshot::Sender<()> {
    let (end, ended) = oneshot::channel();
    let (joined, joins) = mpsc::channel();
    let run = move || {
        runtime().block_on(async {
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

pub fn events(count: usize) -> Encoded {
    let mut encoded = Encoded::default();
    for _ in 0..count {
        encoded.push(&event("/"));
    }
    encoded
}

pub fn event(path: &str) -> AuditEvent<&str> {
    AuditEvent {
        time: clock::wall().into(),
        path,
        ..AuditEvent::sample()
    }
}

pub fn batches(server: &Server, prefix: &str) -> BTreeMap<(Uuid, u64), (Batch, u16)> {
    let keys = Keys::new(prefix);
    let mut batches = BTreeMap::new();
    for shard in 0..SHARDS {
        let entries = server.cli(&["XRANGE", &keys.audit_stream("audit", shard), "-", "+"]);
        for entry in entries.list() {
            let batch = Batch::open(entry.list()[1].list()[1].bytes()).unwrap();
            let id = (Uuid::from_bytes(batch.header.boot), batch.header.first);
            batches.insert(id, (batch, shard));
        }
    }
    batches
}

pub fn seqs(batch: &Batch) -> Vec<u64> {
    let seq = |event| Columns::of(event).unwrap().seq;
    batch.events().map(seq).collect()
}

pub fn numbers(last: u64) -> Vec<u64> {
    (1..=last).collect()
}

/// Whether all are.
pub fn is_safe(receipts: &[Receipt]) -> bool {
    let runtime = runtime();
    let mut receipts = receipts.iter();
    receipts.all(|receipt| runtime.block_on(receipt.settled()))
}

/// Whether it is known what became of its events.
pub fn is_settled(receipt: &Receipt) -> bool {
    runtime().block_on(async {
        let settled = tokio::time::timeout(Duration::ZERO, receipt.settled());
        settled.await.is_ok()
    })
}
