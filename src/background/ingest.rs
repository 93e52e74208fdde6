//! The worker's main task: takes batches from the audit's streams into Postgres. Some loops share the streams; each reads its next batches
//! while its last ones are stored. Owns what is let go of, tried again and buried; must not let go of a batch that is neither
//! stored nor with the dead letters.
//!
//! Memory is bounded: a loop holds what it stores and what it has read ahead, of which the loops share a bound, and one of them at a
//! time has a batch that is larger. While Postgres is away it holds on to both and tries again, and takes over nothing from others,
//! so that no delivery is counted for what is no batch's fault.

mod beyond;
mod gather;
mod lag;
mod room;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use self::beyond::Beyond;
use self::gather::{Load, Reading, Unread, Work};
use self::room::Room;
use crate::config::audit::Stream;
use crate::config::worker::Worker;
use crate::heartbeat::Heartbeat;
use crate::policy::retry::{Pauses, equal_jitter};
use crate::store::audit::batch::{self, Batch, BatchError};
use crate::store::fleet::Fleet;
use crate::store::postgres::write::{Outcome, Writer};
use crate::store::postgres::{Postgres, PostgresError};
use crate::store::redis::Connections;
use crate::store::streams::consume::{Done, Entry, Streams};
use crate::telemetry::metrics::ingest::IngestMetrics;

/// Between tries to store.
const PAUSES: Pauses = Pauses {
    first: Duration::from_millis(75),
    longest: Duration::from_secs(5),
};
/// Tries of a transaction that Postgres refuses for a reason of its own, before each batch is tried alone.
const TRIES: u32 = 3;
/// The longest that a loop goes without a beat: a transaction has 45 s.
const SILENCE: Duration = Duration::from_secs(120);
/// Between looks at the loops' hearts.
const HEARTS_EVERY: Duration = Duration::from_secs(1);

/// Which streams are ingested, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    pub stream: Stream,
    pub worker: Worker,
}

/// Ingests the streams until `shutdown` is true, and then ends what is under way. `redis` are this runtime's connections of
/// `fleet.main`. While Redis or Postgres is away it waits; an error is one that a new start may mend. Beats while every loop goes on.
pub async fn run(
    settings: Settings,
    fleet: Arc<Fleet>,
    redis: Arc<Connections>,
    postgres: Arc<Postgres>,
    metrics: IngestMetrics,
    heartbeat: Heartbeat,
    shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let group = &settings.worker.group;
    let streams = Streams::new(redis, &fleet.keys, &settings.stream, group);
    let streams = Arc::new(streams);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let loops = cores.min(usize::from(streams.count())).max(1);
    let hearts: Vec<_> = (0..loops).map(|_| Heartbeat::default()).collect();
    let room = Arc::new(Room::default());
    let beyond = Arc::new(Beyond::default());
    let unread = Arc::<Mutex<Unread>>::default();
    let mut tasks = JoinSet::new();
    for (n, heart) in hearts.iter().enumerate() {
        heart.beat();
        let shards = (0..streams.count()).skip(n).step_by(loops);
        let ingest = Ingest {
            streams: streams.clone(),
            consumer: format!("{}.{n}", fleet.process),
            shards: shards.collect(),
            beyond: beyond.clone(),
            place: (n, loops),
            worker: settings.worker.clone(),
            most_bytes: gather::most_bytes(loops),
            room: room.clone(),
            unread: unread.clone(),
            of_others: Mutex::default(),
            metrics: metrics.clone(),
            heartbeat: heart.clone(),
            shutdown: shutdown.clone(),
        };
        let heart = heart.clone();
        let writer =
            Writer::new(postgres.clone(), settings.worker.retention).beating(move || heart.beat());
        tasks.spawn(ingest.run(writer));
    }
    // They end with the set.
    let mut watching = JoinSet::new();
    watching.spawn(beyond::watch(streams.clone(), beyond.clone(), unread));
    watching.spawn(lag::watch(streams, beyond, metrics));
    watching.spawn(watch_hearts(hearts, heartbeat));
    let mut ended = Ok(());
    loop {
        let task = tokio::select! {
            task = tasks.join_next() => task,
            // By a panic: they do not end by themselves.
            Some(watch) = watching.join_next() => Some(watch),
        };
        let Some(task) = task else {
            break;
        };
        if let Err(error) = task {
            // The others go with it: whoever keeps this task begins them all anew.
            tasks.abort_all();
            ended = ended.and(Err(error.into()));
        }
    }
    ended
}

/// Beats for all, while none of them is silent.
async fn watch_hearts(hearts: Vec<Heartbeat>, all: Heartbeat) {
    loop {
        all.beat_for(&hearts, SILENCE);
        sleep(HEARTS_EVERY).await;
    }
}

/// One loop.
struct Ingest {
    streams: Arc<Streams>,
    consumer: String,
    /// Its share of the file's streams.
    shards: Vec<u16>,
    /// Others, of which it has a share, too.
    beyond: Arc<Beyond>,
    /// Its own among the loops, of which there are so many.
    place: (usize, usize),
    worker: Worker,
    /// Bytes that it holds of one load, at most.
    most_bytes: usize,
    room: Arc<Room>,
    unread: Arc<Mutex<Unread>>,
    /// Those that have, or had, batches of another weir's version: each is told of once.
    of_others: Mutex<HashSet<u16>>,
    metrics: IngestMetrics,
    heartbeat: Heartbeat,
    shutdown: watch::Receiver<bool>,
}

impl Ingest {
    async fn run(self, mut writer: Writer) {
        let mut reading = Reading::new();
        // Whether the last transaction was committed: who cannot store takes over nothing.
        let mut well = writer.takes_rows().await;
        let mut ask_at = Instant::now() + PAUSES.longest;
        let mut load = self.gather(&mut reading, well).await;
        loop {
            let stopping = self.stopping();
            if load.is_empty() && stopping {
                return;
            }
            if load.is_empty() {
                // Nothing is at hand that would tell.
                if !well && ask_at <= Instant::now() {
                    well = writer.takes_rows().await;
                    ask_at = Instant::now() + PAUSES.longest;
                }
                load = self.gather(&mut reading, well).await;
                continue;
            }
            let (stored, next) = tokio::join!(
                self.store(&mut writer, load),
                self.gather(&mut reading, well)
            );
            well = stored;
            load = next;
            if !well && self.stopping() {
                // What is held is given to another worker once it has been idle for `claim_after`.
                return;
            }
        }
    }

    /// The streams that it reads now.
    fn shards(&self) -> Vec<u16> {
        let (n, loops) = self.place;
        let mut shards = self.beyond.of(n, loops);
        shards.extend(&self.shards);
        shards
    }

    fn stopping(&self) -> bool {
        *self.shutdown.borrow()
    }

    /// Sleeps, but no longer than until the end.
    async fn pause(&self, length: Duration) {
        let mut shutdown = self.shutdown.clone();
        // Over by time, or by the end.
        let _ = timeout(length, shutdown.wait_for(|shutdown| *shutdown)).await;
    }

    /// Unpacks an entry; one that cannot be is buried, unless another weir's worker can.
    async fn open(&self, entry: Entry) -> Option<Work> {
        match Batch::open(&entry.bytes) {
            Ok(batch) => Some(Work { entry, batch }),
            Err(BatchError::Version(_)) => {
                self.leave_to_others(entry.shard, &[&entry.id]).await;
                None
            }
            Err(error) => {
                self.bury(&entry, &error.to_string()).await;
                None
            }
        }
    }

    /// Moves an entry to the dead letters. Unanswered, it stays where it is, and is taken over again later.
    async fn bury(&self, entry: &Entry, reason: &str) {
        self.heartbeat.beat();
        let Entry { shard, id, bytes } = entry;
        match self.streams.bury(*shard, id, reason).await {
            // Whoever has stored or buried it has said so; if no one has, it is lost, and sent again.
            Ok(false) => warn!(shard, id, reason, "a batch that was to be buried is gone"),
            Ok(true) => {
                self.metrics.buried.inc();
                error!(
                    shard,
                    id, reason, "a batch of audit events went to the dead letters"
                );
                if let Ok(header) = batch::peek(bytes) {
                    let done = Done {
                        boot: header.boot,
                        first: header.first,
                        last: header.last(),
                    };
                    // Unsaid, it is sent again, and buried again.
                    let _ = self.streams.done(&[done]).await;
                }
            }
            Err(error) => warn!(shard, id, reason, %error, "a batch cannot be buried yet"),
        }
    }

    /// Stores a load and lets go of it. False if it could not be, though not for its own sake: then the end has come, or what
    /// Postgres would not take is left for later.
    async fn store(&self, writer: &mut Writer, load: Load) -> bool {
        let mut well = true;
        for entry in load.suspects {
            if self.stopping() || !well {
                break;
            }
            let Some(_room) = self.room_for(&[&entry], gather::BYTES).await else {
                break;
            };
            let Entry { shard, id, .. } = &entry;
            match self.streams.count_try(*shard, &self.consumer, id).await {
                Ok(true) => {}
                Ok(false) => continue,
                // What is not counted could be tried for ever.
                Err(error) => {
                    warn!(shard, id, %error, "batches of audit events that were given out too often are not tried now");
                    break;
                }
            }
            if let Some(work) = self.open(entry).await {
                // Where it is this one that the server fails by, those behind it have their turn.
                well = self.store_alone(writer, work).await || writer.takes_rows().await;
            }
        }
        if !load.work.is_empty() {
            well = self.store_together(writer, &load.work).await;
            if !well {
                return false;
            }
        }
        // Its memory is for what was too much beside it.
        drop(load.work);
        let mut later = load.later;
        while !later.is_empty() {
            let rest = later.split_off(gather::portion(&later, self.most_bytes));
            let entries = std::mem::replace(&mut later, rest);
            let each: Vec<_> = entries.iter().collect();
            let Some(_room) = self.room_for(&each, self.most_bytes).await else {
                return false;
            };
            let mut work = Vec::new();
            for entry in entries {
                work.extend(self.open(entry).await);
            }
            well = self.store_together(writer, &work).await;
            if !well {
                return false;
            }
        }
        well
    }

    /// Room for what these are once they are opened, if that is more than `most`; none if the end comes first.
    async fn room_for(&self, entries: &[&Entry], most: usize) -> Option<Option<room::Taken<'_>>> {
        if entries
            .iter()
            .map(|entry| gather::held(entry))
            .sum::<usize>()
            <= most
        {
            return Some(None);
        }
        let taken = self.room.take(|| {
            self.heartbeat.beat();
            !self.stopping()
        });
        taken.await.map(Some)
    }

    /// Stores these by as many transactions as it takes, and tries again while Postgres is away. False if the end comes first.
    async fn store_together(&self, writer: &mut Writer, work: &[Work]) -> bool {
        // Halved where a transaction takes too long.
        let mut most = self.worker.batch_max;
        let mut rest = work;
        let mut tries = 0;
        let mut wait = PAUSES.first;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(fitting(rest, most));
            match self.store_once(writer, now).await {
                Ok(()) => {
                    if tries > 0 {
                        info!("audit events are stored again");
                    }
                    (tries, wait) = (0, PAUSES.first);
                    rest = later;
                    continue;
                }
                Err(error) => {
                    self.metrics.failed.inc();
                    tries += 1;
                    if tries == 1 {
                        warn!(%error, "audit events cannot be stored; they are held and tried again");
                    }
                    if error.is_slow() {
                        most = (most / 2).max(1);
                    }
                    if tries > TRIES
                        && (!error.is_of_the_server() || error.is_beside())
                        && self.store_each(writer, now).await
                    {
                        rest = later;
                        tries = 0;
                        continue;
                    }
                }
            }
            if self.stopping() {
                return false;
            }
            self.pause(equal_jitter(wait, fastrand::f64())).await;
            wait = PAUSES.after(wait);
        }
        true
    }

    /// Each batch for itself, of some that were refused together. Those that are refused again are left, to be taken over
    /// later and counted; unless the database takes nothing at all: then it is false, and not for their own sake.
    async fn store_each(&self, writer: &mut Writer, work: &[Work]) -> bool {
        let mut any = false;
        for work in work.chunks(1) {
            match self.store_once(writer, work).await {
                Ok(()) => any = true,
                Err(error) => self.leave(&work[0].entry, &error).await,
            }
        }
        any || writer.takes_rows().await
    }

    async fn store_alone(&self, writer: &mut Writer, work: Work) -> bool {
        match self.store_once(writer, std::slice::from_ref(&work)).await {
            Ok(()) => true,
            Err(error) => {
                self.leave(&work.entry, &error).await;
                !error.is_of_the_server() || error.is_beside()
            }
        }
    }

    /// Leaves an entry to be taken over later. That counts, but for one that another's transaction holds, or that lacks what is none of its own.
    async fn leave(&self, entry: &Entry, error: &PostgresError) {
        self.metrics.failed.inc();
        let Entry { shard, id, .. } = entry;
        warn!(shard, id, %error, "a batch of audit events is left for later");
        if error.is_held() || error.is_beside() {
            let (streams, ids) = (&self.streams, [id.as_str()]);
            let left = streams.leave(*shard, &self.consumer, &ids, Duration::ZERO);
            // Unheard, it counts this once.
            let _ = left.await;
        }
    }

    /// In one transaction; lets go of what is stored, and buries what never can be.
    async fn store_once(&self, writer: &mut Writer, work: &[Work]) -> Result<(), PostgresError> {
        self.heartbeat.beat();
        let batches: Vec<_> = work.iter().map(|work| &work.batch).collect();
        let outcomes = writer.store(&batches).await?;
        self.metrics.transactions.inc();
        let mut settled = Vec::with_capacity(work.len());
        let mut refused = Vec::new();
        for (work, outcome) in work.iter().zip(outcomes) {
            match outcome {
                Outcome::Stored => {
                    self.metrics.stored.inc();
                    self.metrics.events.inc_by(work.batch.header.count);
                }
                Outcome::Known => drop(self.metrics.known.inc()),
                Outcome::Refused(reason) => {
                    refused.push((&work.entry, reason));
                    continue;
                }
            }
            settled.push(work);
        }
        // What is stored does not wait for burials, each of which is a call of its own.
        self.let_go(&settled).await;
        for (entry, reason) in refused {
            self.bury(entry, &reason).await;
        }
        Ok(())
    }

    /// Of what is committed. What Redis does not hear is taken over later, and found stored.
    async fn let_go(&self, settled: &[&Work]) {
        let done: Vec<_> = settled
            .iter()
            .map(|work| Done {
                boot: work.batch.header.boot,
                first: work.batch.header.first,
                last: work.batch.header.last(),
            })
            .collect();
        let said = self.streams.done(&done).await;
        let mut ids = BTreeMap::<u16, Vec<&str>>::new();
        for Entry { shard, id, .. } in settled.iter().map(|work| &work.entry) {
            ids.entry(*shard).or_default().push(id);
        }
        let each = ids
            .iter()
            .map(|(shard, ids)| self.streams.let_go(*shard, ids));
        let gone = futures_util::future::join_all(each).await;
        if let Err(error) = gone.into_iter().fold(said, Result::and) {
            warn!(%error, "redis was not told of audit events that are stored");
        }
    }
}

/// How many of these make a transaction of `most` events; one at least.
fn fitting(work: &[Work], most: usize) -> usize {
    let mut events = 0;
    let over = work.iter().position(|work| {
        events += work.events();
        events > most
    });
    over.unwrap_or(work.len()).max(1)
}
