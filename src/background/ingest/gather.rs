//! Gathers what a loop stores next: reads its streams until there is enough for a transaction, takes over what others were given
//! long ago, and leaves what it cannot read to those who can. Must not let go of an entry: what is to be buried goes to [`Ingest`].

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::Ingest;
use crate::clock;
use crate::store::audit::batch::{self, Batch, BatchError};
use crate::store::redis::CallError;
use crate::store::streams::consume::Entry;
use crate::telemetry::log::LogRateLimit;

/// Between looks at streams while a transaction fills up.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Bytes that a loop reads ahead, as they are held: an entry, and its batch unpacked. Texts that clients repeat pack 200 to 1, so
/// that packed bytes would bound nothing.
pub(super) const BYTES: usize = 8 << 20;
/// Bytes of one load in each of all loops together, at most, as they are held: what is beyond is left packed until its turn comes. Few of
/// a proxy's batches come to it in one read; what others put into Redis may say that it is as large as batches ever are, and be small.
const MOST_BYTES: usize = 5 * BYTES;
/// Entries of one read, at most: how large they are is only known of those before. A proxy makes batches of 1 MiB at most.
const ENTRIES: usize = 32;
/// A consumer that has asked for nothing for so long, and for twice `claim_after`, is gone.
const GONE: Duration = Duration::from_secs(600);

/// What was read and is to be stored.
#[derive(Default)]
pub(super) struct Load {
    pub(super) work: Vec<Work>,
    /// Given to workers too often without being stored: each for itself, and opened when its turn comes.
    pub(super) suspects: Vec<Entry>,
    /// Too large to be held beside the others, with no fault: opened behind them, as many at a time as may be.
    pub(super) later: Vec<Entry>,
    events: usize,
    /// As [`held`].
    bytes: usize,
}

pub(super) struct Work {
    pub(super) entry: Entry,
    pub(super) batch: Batch,
}

/// What a loop knows of its streams.
pub(super) struct Reading {
    /// The stream that is asked first, by its place; each in turn, so that none is left behind.
    turn: usize,
    /// Events of an entry and what is [`held`] of it, as a moving mean.
    mean_events: f64,
    mean_bytes: f64,
    claim_at: Instant,
    forget_at: Instant,
}

/// Streams that were asked in vain, by whichever loop; the log has a line for all that comes of one cause.
#[derive(Default)]
pub(super) struct Unread {
    streams: HashSet<u16>,
    lines: LogRateLimit,
}

impl Ingest {
    /// Reads until there is enough for a transaction, or what there is has waited long enough. With nothing it waits as long,
    /// and comes back empty.
    pub(super) async fn gather(&self, reading: &mut Reading, well: bool) -> Load {
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
        let shards = self.shards();
        for n in 0..shards.len() {
            let shard = shards[reading.turn.wrapping_add(n) % shards.len()];
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
                        self.fails(shard, &error);
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
        reading.found(&entries);
        let entries = self.leave_others(shard, entries, |entry| entry);
        for entry in entries.await {
            let Some(entry) = load.unless_too_large(entry, self.most_bytes) else {
                continue;
            };
            if let Some(work) = self.open(entry).await {
                reading.opened(&work);
                load.take(work);
            }
        }
        if self.unread.lock().answers(shard) {
            info!("all audit streams are read again");
        }
        Ok(read)
    }

    fn fails(&self, shard: u16, error: &CallError) {
        let told = self.unread.lock().fails(shard, clock::mono());
        if let Some(left_out) = told {
            let left_out = (left_out > 0).then_some(left_out);
            warn!(shard, left_out, %error, "an audit stream, or several, cannot be read; they are asked again");
        }
    }

    /// Takes over what other workers were given long ago, lets go of those that are gone, and has what none would be given any more read
    /// again.
    async fn claim(&self, reading: &mut Reading, load: &mut Load) {
        let after = self.worker.claim_after;
        let forget = reading.forget_at <= Instant::now();
        if forget {
            reading.forget_at = Instant::now() + GONE;
        }
        for shard in self.shards() {
            self.heartbeat.beat();
            if forget {
                // Tried again in a while.
                let idle = GONE.max(after * 2);
                let _ = self.streams.forget_consumers(shard, idle).await;
            }
            // Unheard, it is tried again.
            if self.streams.rewind(shard).await == Ok(true) {
                warn!(
                    shard,
                    "batches of audit events would have been given to no worker any more, as behind XGROUP SETID or DELCONSUMER, or XACK: the stream is read from the start again"
                );
            }
            let mut from = None;
            while reading.count(load, self.worker.batch_max) > 0 {
                self.heartbeat.beat();
                let count = reading.count(load, self.worker.batch_max);
                let (from_id, counted) = (from.as_deref(), self.most_deliveries());
                let claimed =
                    self.streams
                        .claim(shard, &self.consumer, after, from_id, count, counted);
                match claimed.await {
                    Ok(claimed) => {
                        let entries = claimed.entries;
                        self.metrics.claimed.inc_by(entries.len() as u64);
                        reading.found(entries.iter().map(|(entry, _)| entry));
                        let entries = self.leave_others(shard, entries, |(entry, _)| entry);
                        for (entry, before) in entries.await {
                            self.take_over(entry, before, load).await;
                        }
                        from = claimed.next;
                    }
                    Err(error) => {
                        self.fails(shard, &error);
                        break;
                    }
                }
                if from.is_none() {
                    break;
                }
            }
        }
    }

    /// Those that this weir may read; the others are left to a worker that can.
    async fn leave_others<T>(
        &self,
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
        self.leave_to_others(shard, &ids).await;
        ours
    }

    /// Leaves batches that this weir cannot read to a worker that can: they are let go of by none, and that they were given to this
    /// one does not count. What it can read comes back.
    pub(super) async fn leave_to_others(&self, shard: u16, ids: &[&str]) {
        let Some(first) = ids.first() else {
            return;
        };
        if self.of_others.lock().insert(shard) {
            warn!(
                shard,
                id = first,
                "batches of audit events of another version of weir wait for a worker that reads them"
            );
        }
        let after = self.worker.claim_after;
        // Unheard, they are taken over later, and left then.
        let _ = self.streams.leave(shard, &self.consumer, ids, after).await;
    }

    fn most_deliveries(&self) -> u64 {
        self.worker.max_deliveries.into()
    }

    async fn take_over(&self, entry: Entry, before: u64, load: &mut Load) {
        let most = self.most_deliveries();
        if before < most {
            if let Some(entry) = load.unless_too_large(entry, self.most_bytes)
                && let Some(work) = self.open(entry).await
            {
                load.take(work);
            }
        } else if before < 2 * most {
            load.bytes += entry.bytes.len();
            load.suspects.push(entry);
        } else {
            // It may be what brings workers down: not even opened.
            let reason = format!("given out or tried {before} times, and never stored");
            self.bury(&entry, &reason).await;
        }
    }
}

impl Unread {
    /// Whether the log is to be told, and how many streams it was not told of since the last line.
    fn fails(&mut self, shard: u16, now: Duration) -> Option<u64> {
        match self.streams.insert(shard) {
            true => self.lines.next(now),
            false => None,
        }
    }

    /// Whether it was the last that did not.
    pub(super) fn answers(&mut self, shard: u16) -> bool {
        self.streams.remove(&shard) && self.streams.is_empty()
    }
}

impl Work {
    pub(super) fn events(&self) -> usize {
        usize::try_from(self.batch.header.count).unwrap_or(usize::MAX)
    }
}

impl Load {
    pub(super) fn is_empty(&self) -> bool {
        self.work.is_empty() && self.suspects.is_empty() && self.later.is_empty()
    }

    /// The entry, where there is room for its batch among `most` bytes.
    fn unless_too_large(&mut self, entry: Entry, most: usize) -> Option<Entry> {
        if self.bytes + held(&entry) <= most {
            return Some(entry);
        }
        self.bytes += entry.bytes.len();
        self.later.push(entry);
        None
    }

    fn take(&mut self, work: Work) {
        self.events += work.events();
        self.bytes += held(&work.entry);
        self.work.push(work);
    }
}

/// Of each of so many loops.
pub(super) fn most_bytes(loops: usize) -> usize {
    (MOST_BYTES / loops).max(BYTES)
}

/// How many of these are `most` bytes, once they are opened; one at least.
pub(super) fn portion(entries: &[Entry], most: usize) -> usize {
    let mut bytes = 0;
    let over = entries.iter().position(|entry| {
        bytes += held(entry);
        bytes > most
    });
    over.unwrap_or(entries.len()).max(1)
}

/// Bytes of an entry and of its batch, once that is opened.
pub(super) fn held(entry: &Entry) -> usize {
    entry.bytes.len() + batch::unpacked_size(&entry.bytes)
}

impl Reading {
    pub(super) fn new() -> Reading {
        Reading {
            turn: 0,
            mean_events: 100.0,
            // As large as they come: with small ones it is soon less.
            mean_bytes: 1e6,
            claim_at: Instant::now(),
            forget_at: Instant::now(),
        }
    }

    /// How many entries fill a transaction up: none where the next one is too many, since a transaction of its own for what
    /// is left over costs more than it stores.
    fn count(&self, load: &Load, most: usize) -> usize {
        let events = most.saturating_sub(load.events) as f64 / self.mean_events;
        let bytes = BYTES.saturating_sub(load.bytes) as f64 / self.mean_bytes;
        let entries = (events.min(bytes) as usize).min(ENTRIES);
        entries.max(usize::from(load.is_empty()))
    }

    fn found<'a>(&mut self, entries: impl IntoIterator<Item = &'a Entry>) {
        for entry in entries {
            let bytes = held(entry) as f64;
            // Of a sudden long one it is told at once.
            let share = if bytes > self.mean_bytes { 0.5 } else { 0.05 };
            self.mean_bytes += share * (bytes - self.mean_bytes);
            self.mean_bytes = self.mean_bytes.max(100.0);
        }
    }

    fn opened(&mut self, work: &Work) {
        let events = work.events() as f64;
        self.mean_events += 0.05 * (events - self.mean_events);
        self.mean_events = self.mean_events.max(1.0);
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::event::{AuditEvent, Encoded, Micros};
    use crate::store::audit::batch::Boot;
    use crate::store::audit::chain::Hasher;

    /// An entry of `count` events, each with a path of so many equal letters.
    fn entry(count: usize, path: usize) -> Entry {
        let path = "a".repeat(path);
        let mut events = Encoded::default();
        for _ in 0..count {
            events.push(&AuditEvent::<&str> {
                path: &path,
                ..AuditEvent::sample()
            });
        }
        let id = Uuid::from_bytes([1; 16]);
        let mut boot = Boot::new("a".to_owned(), id, Micros(1), Hasher::new(None));
        Entry {
            shard: 0,
            id: "1-1".to_owned(),
            bytes: boot.pack(&mut [events], Micros(1), 0).1,
        }
    }

    /// Reads such entries until there is enough; how many bytes of bodies there are then.
    fn bodies(reading: &mut Reading, entry: &Entry) -> usize {
        let mut load = Load::default();
        loop {
            let count = reading.count(&load, 10_000);
            if count == 0 {
                let bodies = load.work.iter().map(|work| work.batch.size());
                return bodies.sum();
            }
            let entries = vec![entry.clone(); count];
            reading.found(&entries);
            for entry in entries {
                let batch = Batch::open(&entry.bytes).unwrap();
                load.take(Work { entry, batch });
            }
        }
    }

    /// Batches that pack 255 to 1 come from whoever can write to Redis, as many as are read at once.
    #[test]
    fn what_comes_as_a_surprise_is_bounded_unpacked() {
        let bomb = entry(1, 30 << 20);
        assert!(bomb.bytes.len() < 200_000 && held(&bomb) > 30 << 20);
        let mut load = Load::default();
        let mut opened = 0;
        for entry in vec![bomb; ENTRIES] {
            if let Some(entry) = load.unless_too_large(entry, MOST_BYTES) {
                let batch = Batch::open(&entry.bytes).unwrap();
                load.take(Work { entry, batch });
                opened += 1;
            }
        }
        assert_eq!((opened, load.later.len()), (1, ENTRIES - 1));
        assert!(load.suspects.is_empty(), "it is no fault to be large");
        // Behind the others each is opened for itself, though it be larger than all may be together.
        assert_eq!(
            [MOST_BYTES, BYTES].map(|most| portion(&load.later, most)),
            [1; 2]
        );
        let small = vec![entry(1, 10); 5];
        assert_eq!(portion(&small, 3 * held(&small[0])), 3);
        assert_eq!(portion(&small, BYTES), 5);
        // One that says to be larger than any is is none, and takes no memory for it.
        let mut bytes = entry(1, 10).bytes;
        let at = bytes.len() - batch_body(&bytes).len();
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes((64 << 20) + 1));
        let checksum = crc32fast::hash(&bytes[5..]).to_le_bytes();
        bytes[1..5].copy_from_slice(&checksum);
        assert_eq!(Batch::open(&bytes), Err(BatchError::Damaged));
        assert_eq!(batch::unpacked_size(&bytes), 0);
    }

    #[test]
    fn streams_that_fail_together_are_told_of_once() {
        let mut unread = Unread::default();
        let at = Duration::from_secs;
        assert!(!unread.answers(0));
        let told = [0, 1, 0, 2].map(|shard| unread.fails(shard, at(1)));
        assert_eq!(told, [Some(0), None, None, None]);
        // Of another cause, perhaps; and of those before, that there were more.
        assert_eq!(unread.fails(3, at(20)), Some(2));
        assert_eq!(
            [3, 1, 1, 2, 0].map(|shard| unread.answers(shard)),
            [false, false, false, false, true]
        );
        assert_eq!(unread.fails(1, at(40)), Some(0));
    }

    #[test]
    fn loops_share_what_may_be_held() {
        let each = [1, 2, 4, 5, 8, 64].map(|loops| most_bytes(loops) >> 20);
        assert_eq!(each, [40, 20, 10, 8, 8, 8]);
    }

    /// What is behind the header.
    fn batch_body(bytes: &[u8]) -> &[u8] {
        postcard::take_from_bytes::<batch::Header>(&bytes[5..])
            .unwrap()
            .1
    }

    #[test]
    fn what_is_read_ahead_is_bounded_unpacked() {
        let mut reading = Reading::new();
        let large = entry(128, 8_000);
        assert!(large.bytes.len() < 50_000, "it packs well");
        let is_bounded = |bytes: usize| (BYTES / 2..=BYTES).contains(&bytes);
        // The first of them, too, of which nothing is known.
        for _ in 0..3 {
            let bytes = bodies(&mut reading, &large);
            assert!(is_bounded(bytes), "{bytes}");
        }
        // With small ones it is the events that are enough.
        let small = entry(100, 10);
        for _ in 0..3 {
            let bytes = bodies(&mut reading, &small);
            let enough = 10_000 * Batch::open(&small.bytes).unwrap().size() / 100;
            assert!((enough / 10 * 9..=enough).contains(&bytes), "{bytes}");
        }
        // Large ones after them come as a surprise, of one read.
        let bytes = bodies(&mut reading, &large);
        assert!(bytes <= BYTES + ENTRIES * (1 << 20), "{bytes}");
        assert!(is_bounded(bodies(&mut reading, &large)));
    }
}
