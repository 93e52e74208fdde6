//! The worker's main task: drains the audit's streams into Postgres. Some loops share the streams; each reads its next batches
//! while its last ones are stored. Owns what is let go of, tried again and buried; must not let go of a batch that is neither
//! stored nor with the dead letters.
//!
//! Memory is bounded: a loop holds what it stores and what it has read ahead. While Postgres is away it holds on to both and
//! tries again, and takes over nothing from others, so that no delivery is counted for what is no batch's fault.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use crate::admin::health::Heartbeat;
use crate::config::audit::Stream;
use crate::config::worker::Worker;
use crate::store::batch::{self, Batch, BatchError};
use crate::store::fleet::Fleet;
use crate::store::postgres::write::{Outcome, Writer};
use crate::store::postgres::{Postgres, PostgresError};
use crate::store::redis::{CallError, Connections};
use crate::store::streams::consume::{Done, Entry, Streams};
use crate::telemetry::drain_metrics::DrainMetrics;

/// Between looks at streams while a transaction fills up.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Between tries to store: from the first to the last, doubled each time.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Tries of a transaction that Postgres refuses for a reason of its own, before each batch is tried alone.
const TRIES: u32 = 3;
/// Packed bytes that a loop reads ahead, about.
const BYTES: usize = 8 << 20;
/// Entries of one read, at most: how large they are is only known of those before.
const ENTRIES: usize = 100;
/// Between looks at how far behind the streams are.
const LAG_EVERY: Duration = Duration::from_secs(5);
/// A consumer that has asked for nothing for so long, and this many times `claim_after`, is gone.
const GONE: (Duration, u32) = (Duration::from_secs(600), 2);

/// The longest that a loop goes without a beat: a transaction has 45 s.
const SILENCE: Duration = Duration::from_secs(120);
/// Between looks at the loops' hearts.
const HEARTS_EVERY: Duration = Duration::from_secs(1);

/// Which streams are drained, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    pub stream: Stream,
    pub worker: Worker,
}

/// Drains the streams until `shutdown` is true, and then ends what is under way. `redis` are this runtime's connections of
/// `fleet.main`. While Redis or Postgres is away it waits; an error is one that a new start may mend. Beats while every loop goes on.
pub async fn run(
    settings: Settings,
    fleet: Arc<Fleet>,
    redis: Arc<Connections>,
    postgres: Arc<Postgres>,
    metrics: DrainMetrics,
    heartbeat: Heartbeat,
    shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let group = &settings.worker.group;
    let streams = Streams::new(redis, &fleet.keys, &settings.stream, group);
    let streams = Arc::new(streams);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let loops = cores.min(usize::from(streams.count())).max(1);
    let hearts: Vec<_> = (0..loops).map(|_| Heartbeat::default()).collect();
    let mut tasks = JoinSet::new();
    for (n, heart) in hearts.iter().enumerate() {
        heart.beat();
        let shards = (0..streams.count()).skip(n).step_by(loops);
        let drain = Drain {
            streams: streams.clone(),
            consumer: format!("{}.{n}", fleet.process),
            shards: shards.collect(),
            worker: settings.worker.clone(),
            metrics: metrics.clone(),
            heartbeat: heart.clone(),
            shutdown: shutdown.clone(),
        };
        let writer = Writer::new(postgres.clone(), settings.worker.retention);
        tasks.spawn(drain.run(writer));
    }
    // They end with the set.
    let mut watching = JoinSet::new();
    watching.spawn(watch_lag(streams, metrics));
    watching.spawn(watch_hearts(hearts, heartbeat));
    let mut ended = Ok(());
    while let Some(task) = tasks.join_next().await {
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

async fn watch_lag(streams: Arc<Streams>, metrics: DrainMetrics) {
    loop {
        if let Ok(lag) = streams.lag().await {
            let whole = |number| i64::try_from(number).unwrap_or(i64::MAX);
            metrics.lag_seconds.set(lag.oldest.as_secs_f64());
            metrics.waiting.set(whole(lag.waiting));
            metrics.dead_letters.set(whole(lag.dead_letters));
        }
        sleep(LAG_EVERY).await;
    }
}

/// One loop.
struct Drain {
    streams: Arc<Streams>,
    consumer: String,
    /// Its share of the streams.
    shards: Vec<u16>,
    worker: Worker,
    metrics: DrainMetrics,
    heartbeat: Heartbeat,
    shutdown: watch::Receiver<bool>,
}

/// What was read and is to be stored.
#[derive(Default)]
struct Load {
    work: Vec<Work>,
    /// Given to workers too often without being stored: each for itself, and opened when its turn comes.
    suspects: Vec<Entry>,
    /// Whether one of these was buried unopened.
    has_buried: bool,
    events: usize,
    bytes: usize,
}

struct Work {
    entry: Entry,
    batch: Batch,
}

/// What a loop knows of its streams.
struct Reading {
    /// The stream that is asked first, by its place; each in turn, so that none is left behind.
    turn: usize,
    /// Events and packed bytes of an entry, as a moving mean.
    mean_events: f64,
    mean_bytes: f64,
    claim_at: Instant,
    forget_at: Instant,
    /// Streams that were asked in vain.
    trouble: HashSet<u16>,
    /// Streams that have, or had, batches of another weir's version: each is told of once.
    of_others: HashSet<u16>,
}

impl Drain {
    async fn run(self, mut writer: Writer) {
        let mut reading = Reading {
            turn: 0,
            mean_events: 100.0,
            mean_bytes: 10_000.0,
            claim_at: Instant::now(),
            forget_at: Instant::now(),
            trouble: HashSet::new(),
            of_others: HashSet::new(),
        };
        let mut load = self.gather(&mut reading, true).await;
        // Whether the last transaction was committed: who cannot store takes over nothing.
        let mut well = true;
        let mut ask_at = Instant::now();
        loop {
            let stopping = self.stopping();
            if load.is_empty() && stopping {
                return;
            }
            if load.is_empty() {
                // Nothing is at hand that would tell.
                if !well && ask_at <= Instant::now() {
                    well = writer.takes_rows().await;
                    ask_at = Instant::now() + BACK_OFF.1;
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

    fn stopping(&self) -> bool {
        *self.shutdown.borrow()
    }

    /// Sleeps, but no longer than until the end.
    async fn pause(&self, length: Duration) {
        let mut shutdown = self.shutdown.clone();
        // Over by time, or by the end.
        let _ = timeout(length, shutdown.wait_for(|shutdown| *shutdown)).await;
    }

    /// Reads until there is enough for a transaction, or what there is has waited long enough. With nothing it waits as long,
    /// and comes back empty.
    async fn gather(&self, reading: &mut Reading, well: bool) -> Load {
        let mut load = Load::default();
        let until = Instant::now() + self.worker.batch_wait;
        while !self.stopping() {
            self.heartbeat.beat();
            if well && reading.claim_at <= Instant::now() {
                reading.claim_at = Instant::now() + self.worker.claim_after / 4;
                self.claim(reading, &mut load).await;
            }
            self.read(reading, &mut load).await;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || reading.count(&load, self.worker.batch_max) == 0 {
                break;
            }
            self.pause(left.min(LOOK_AGAIN.max(self.worker.batch_wait / 8)))
                .await;
        }
        load
    }

    /// Asks the streams in turn until there is enough.
    async fn read(&self, reading: &mut Reading, load: &mut Load) {
        reading.turn = reading.turn.wrapping_add(1);
        for n in 0..self.shards.len() {
            let shard = self.shards[reading.turn.wrapping_add(n) % self.shards.len()];
            loop {
                self.heartbeat.beat();
                let count = reading.count(load, self.worker.batch_max);
                if count == 0 || self.stopping() {
                    return;
                }
                match self.read_some(reading, load, shard, count).await {
                    Ok(read) if read == count => {}
                    Ok(_) => break,
                    Err(error) => {
                        self.unread(reading, shard, &error);
                        break;
                    }
                }
            }
        }
    }

    /// Asks one stream for so many entries; how many there were.
    async fn read_some(
        &self,
        reading: &mut Reading,
        load: &mut Load,
        shard: u16,
        count: usize,
    ) -> Result<usize, CallError> {
        let entries = self.streams.read(shard, &self.consumer, count).await?;
        let read = entries.len();
        reading.found(entries.iter().map(|entry| entry.bytes.len()));
        let entries = self.leave_others(reading, shard, entries, |entry| entry);
        for entry in entries.await {
            if let Some(work) = self.open(entry).await {
                reading.opened(&work);
                load.take(work);
            }
        }
        reading.trouble.remove(&shard);
        Ok(read)
    }

    fn unread(&self, reading: &mut Reading, shard: u16, error: &CallError) {
        if reading.trouble.insert(shard) {
            warn!(shard, %error, "an audit stream cannot be read; it is asked again");
        }
    }

    /// Takes over what other workers were given long ago, and lets go of those that are gone.
    async fn claim(&self, reading: &mut Reading, load: &mut Load) {
        let after = self.worker.claim_after;
        let forget = reading.forget_at <= Instant::now();
        if forget {
            reading.forget_at = Instant::now() + GONE.0;
        }
        for shard in &self.shards {
            if forget {
                // Tried again in a while.
                let idle = GONE.0.max(after * GONE.1);
                let _ = self.streams.forget_consumers(*shard, idle).await;
            }
            let mut from = None;
            while reading.count(load, self.worker.batch_max) > 0 {
                self.heartbeat.beat();
                let count = reading.count(load, self.worker.batch_max).min(100);
                let claimed =
                    self.streams
                        .claim(*shard, &self.consumer, after, from.as_deref(), count);
                match claimed.await {
                    Ok(claimed) => {
                        let entries = claimed.entries;
                        self.metrics.claimed.inc_by(entries.len() as u64);
                        let entries =
                            self.leave_others(reading, *shard, entries, |(entry, _)| entry);
                        for (entry, deliveries) in entries.await {
                            self.take_over(entry, deliveries, load).await;
                        }
                        from = claimed.next;
                    }
                    Err(error) => {
                        self.unread(reading, *shard, &error);
                        break;
                    }
                }
                if from.is_none() {
                    break;
                }
            }
        }
    }

    /// Leaves batches that this weir cannot read to a worker that can: they are let go of by none, and that they were given to this
    /// one does not count. What it can read comes back.
    async fn leave_others<T>(
        &self,
        reading: &mut Reading,
        shard: u16,
        entries: Vec<T>,
        entry: impl Fn(&T) -> &Entry,
    ) -> Vec<T> {
        let is_of_another = |it: &T| {
            let header = batch::peek(&entry(it).bytes);
            matches!(header, Err(BatchError::Version(_)))
        };
        let (others, ours): (Vec<_>, Vec<_>) = entries.into_iter().partition(is_of_another);
        let ids: Vec<_> = others.iter().map(|it| entry(it).id.as_str()).collect();
        let Some(first) = ids.first() else {
            return ours;
        };
        if reading.of_others.insert(shard) {
            warn!(
                shard,
                id = first,
                "batches of audit events of another version of weir wait for a worker that reads them"
            );
        }
        let after = self.worker.claim_after;
        // Unheard, they are taken over later, and left then.
        let _ = self.streams.leave(shard, &self.consumer, &ids, after).await;
        ours
    }

    async fn take_over(&self, entry: Entry, deliveries: u64, load: &mut Load) {
        let most = u64::from(self.worker.max_deliveries);
        if deliveries <= most {
            if let Some(work) = self.open(entry).await {
                load.take(work);
            }
        } else if deliveries > 2 * most && load.suspects.is_empty() && !load.has_buried {
            // It may be what brings workers down: not even opened. Those behind it were given out as often for its sake: in order,
            // what is before it is stored by now.
            load.has_buried = true;
            let reason = format!("delivered {deliveries} times and never stored");
            self.bury(&entry, &reason).await;
        } else {
            load.bytes += entry.bytes.len();
            load.suspects.push(entry);
        }
    }

    /// Unpacks an entry; one that cannot be is buried.
    async fn open(&self, entry: Entry) -> Option<Work> {
        match Batch::open(&entry.bytes) {
            Ok(batch) => Some(Work { entry, batch }),
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
            if let Some(work) = self.open(entry).await {
                well &= self.store_alone(writer, work).await;
            }
        }
        // Halved where a transaction takes too long.
        let mut most = self.worker.batch_max;
        let mut rest = &load.work[..];
        let mut tries = 0;
        let mut wait = BACK_OFF.0;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(fitting(rest, most));
            match self.store_once(writer, now).await {
                Ok(()) => {
                    if tries > 0 {
                        info!("audit events are stored again");
                    }
                    (tries, wait, well) = (0, BACK_OFF.0, true);
                    rest = later;
                    continue;
                }
                Err(error) => {
                    self.metrics.failed.inc();
                    tries += 1;
                    if tries == 1 {
                        warn!(%error, "audit events cannot be stored; they are held and tried again");
                    }
                    well = false;
                    if error.is_slow() {
                        most = (most / 2).max(1);
                    }
                    if tries > TRIES && !error.is_of_the_server() {
                        well = self.store_each(writer, now).await;
                        if well {
                            rest = later;
                            tries = 0;
                            continue;
                        }
                    }
                }
            }
            if self.stopping() {
                return false;
            }
            self.pause(wait.mul_f64(1.0 + fastrand::f64() / 2.0)).await;
            wait = (wait * 2).min(BACK_OFF.1);
        }
        well
    }

    /// Each batch for itself, of some that were refused together. Those that are refused again are left, to be taken over
    /// later and counted; unless the database takes nothing at all: then it is false, and not for their own sake.
    async fn store_each(&self, writer: &mut Writer, work: &[Work]) -> bool {
        let mut any = false;
        for work in work.chunks(1) {
            match self.store_once(writer, work).await {
                Ok(()) => any = true,
                Err(error) => {
                    self.metrics.failed.inc();
                    let Entry { shard, id, .. } = &work[0].entry;
                    warn!(shard, id, %error, "a batch of audit events is left for later");
                }
            }
        }
        any || writer.takes_rows().await
    }

    async fn store_alone(&self, writer: &mut Writer, work: Work) -> bool {
        match self.store_once(writer, std::slice::from_ref(&work)).await {
            Ok(()) => true,
            Err(error) => {
                self.metrics.failed.inc();
                let Entry { shard, id, .. } = &work.entry;
                warn!(shard, id, %error, "a batch of audit events is left for later");
                !error.is_of_the_server()
            }
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
        let each = self.shards.iter().map(|shard| async {
            let entries = settled.iter().map(|work| &work.entry);
            let of_shard = entries.filter(|entry| entry.shard == *shard);
            let ids: Vec<_> = of_shard.map(|entry| entry.id.as_str()).collect();
            match ids.is_empty() {
                true => Ok(()),
                false => self.streams.stored(*shard, &ids).await,
            }
        });
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

impl Work {
    fn events(&self) -> usize {
        usize::try_from(self.batch.header.count).unwrap_or(usize::MAX)
    }
}

impl Load {
    fn is_empty(&self) -> bool {
        self.work.is_empty() && self.suspects.is_empty()
    }

    fn take(&mut self, work: Work) {
        self.events += work.events();
        self.bytes += work.entry.bytes.len();
        self.work.push(work);
    }
}

impl Reading {
    /// How many entries fill a transaction up: none where the next one is too many, since a transaction of its own for what
    /// is left over costs more than it stores.
    fn count(&self, load: &Load, most: usize) -> usize {
        let events = most.saturating_sub(load.events) as f64 / self.mean_events;
        let bytes = BYTES.saturating_sub(load.bytes) as f64 / self.mean_bytes;
        let entries = (events.min(bytes) as usize).min(ENTRIES);
        entries.max(usize::from(load.is_empty()))
    }

    fn found(&mut self, lengths: impl Iterator<Item = usize>) {
        for length in lengths {
            // Of a sudden long one it is told at once.
            let share = if length as f64 > self.mean_bytes {
                0.5
            } else {
                0.05
            };
            self.mean_bytes += share * (length as f64 - self.mean_bytes);
            self.mean_bytes = self.mean_bytes.max(100.0);
        }
    }

    fn opened(&mut self, work: &Work) {
        let events = work.events() as f64;
        self.mean_events += 0.05 * (events - self.mean_events);
        self.mean_events = self.mean_events.max(1.0);
    }
}
