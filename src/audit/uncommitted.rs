//! The batches of one boot that are not known to be committed: which are to be sent, which wait in a stream, which can be let go.
//! Does no I/O and reads no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::receipt::Duty;
use crate::store::spool::Place;

/// One batch.
#[derive(Debug)]
struct Batch {
    last: u64,
    events: u64,
    /// Its packed bytes; `None` where only the spool has them.
    bytes: Option<Arc<[u8]>>,
    /// Where the spool has it.
    place: Option<Place>,
    /// The entry of a stream that it is in, as far as known.
    entry: Option<Entry>,
    /// To be settled once it is safe.
    duties: Vec<Duty>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub shard: u16,
    pub id: String,
    pub added: Instant,
}

/// Batches with the ids of their entries, by stream.
pub(super) type ByStream = BTreeMap<u16, Vec<(u64, String)>>;

/// Where a batch's bytes are.
#[derive(Debug)]
pub(super) enum Source<'a> {
    Memory(&'a Arc<[u8]>),
    Spool,
}

/// What is to be done about batches that are done with.
#[derive(Debug, Default)]
pub(super) struct Released {
    pub events: u64,
    pub places: Vec<Place>,
}

/// Batches by the number of their first event.
#[derive(Debug, Default)]
pub(super) struct Uncommitted {
    batches: BTreeMap<u64, Batch>,
    /// To be sent, and not being sent; in memory.
    unsent: BTreeSet<u64>,
    /// The same, of what only the spool has.
    unread: BTreeSet<u64>,
    /// Whether the spool cannot be read now.
    is_aside: bool,
    /// Survive the end of the process neither in the spool nor in a stream, since then.
    at_risk: BTreeMap<u64, Instant>,
    /// Whether what is at risk is not to be sent: it is on its way to the spool.
    pub spool_first: bool,
    /// The first number of the newest batch that was ever here.
    pub newest: u64,
    /// Bytes in memory.
    memory: usize,
    events: u64,
}

impl Uncommitted {
    /// Takes a batch of the events `first` to `last`; there may be none. Its duties are settled once it is safe, which it is from
    /// the beginning where `place` is known.
    pub(super) fn push(
        &mut self,
        (first, last): (u64, u64),
        bytes: Arc<[u8]>,
        place: Option<Place>,
        duties: Vec<Duty>,
        now: Instant,
    ) {
        let events = (last + 1).saturating_sub(first);
        self.memory += bytes.len();
        self.events += events;
        self.unsent.insert(first);
        self.newest = self.newest.max(first);
        if place.is_none() {
            self.at_risk.insert(first, now);
        }
        let batch = Batch {
            last,
            events,
            bytes: Some(bytes),
            place,
            entry: None,
            duties,
        };
        self.batches.insert(first, batch);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.batches.len()
    }

    /// Batches that are to be sent, and can be.
    pub(super) fn unsent(&self) -> usize {
        let unread = if self.is_aside { 0 } else { self.unread.len() };
        self.unsent.len() + unread
    }

    /// Whether something is to be sent that only the spool has.
    pub(super) fn is_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Events that are not known to be committed.
    pub(super) fn events(&self) -> u64 {
        self.events
    }

    /// Bytes in memory.
    pub(super) fn memory(&self) -> usize {
        self.memory
    }

    /// Whether some batch is in no stream as far as known.
    pub(super) fn has_unadded(&self) -> bool {
        self.batches.values().any(|batch| batch.entry.is_none())
    }

    /// Whether some batch is neither in the spool nor in a stream.
    pub(super) fn is_at_risk(&self) -> bool {
        !self.at_risk.is_empty()
    }

    /// Since when the batch has been so that is longest.
    pub(super) fn at_risk_since(&self) -> Option<Instant> {
        self.at_risk.values().min().copied()
    }

    /// Whether the spool has some batch.
    pub(super) fn is_spooled(&self) -> bool {
        self.batches.values().any(|batch| batch.place.is_some())
    }

    /// The batches at risk, in order.
    pub(super) fn at_risk(&self) -> Vec<(u64, Arc<[u8]>)> {
        let bytes = |first: &u64| Some((*first, self.batches.get(first)?.bytes.clone()?));
        self.at_risk.keys().filter_map(bytes).collect()
    }

    /// The batch is in the spool now, where it is safe once that is synced. Where more than `memory` bytes are in memory, its own
    /// leave it.
    pub(super) fn spooled(&mut self, first: u64, place: Place, memory: usize) -> Option<Place> {
        self.at_risk.remove(&first);
        let Some(batch) = self.batches.get_mut(&first) else {
            // Committed meanwhile.
            return Some(place);
        };
        batch.place = Some(place);
        if self.memory > memory
            && let Some(bytes) = batch.bytes.take()
        {
            self.memory -= bytes.len();
            if self.unsent.remove(&first) {
                self.unread.insert(first);
            }
        }
        None
    }

    /// What the spool had there is gone: what memory has of it is at risk again, unless a stream has it.
    pub(super) fn unspooled(
        &mut self,
        is_gone: impl Fn(&Place) -> bool,
        now: Instant,
    ) -> Vec<Place> {
        let mut places = Vec::new();
        for (first, batch) in &mut self.batches {
            if batch.bytes.is_some()
                && let Some(place) = batch.place.take_if(|place| is_gone(place))
            {
                places.push(place);
                if batch.entry.is_none() {
                    self.at_risk.insert(*first, now);
                }
            }
        }
        places
    }

    /// The batch is safe.
    pub(super) fn settle(&mut self, first: u64) {
        if let Some(batch) = self.batches.get_mut(&first) {
            std::mem::take(&mut batch.duties)
                .into_iter()
                .for_each(Duty::safe);
        }
    }

    /// The next batch to send, which counts as being sent from here on.
    pub(super) fn next(&mut self) -> Option<(u64, Source<'_>)> {
        let waits = |first: &u64| self.spool_first && self.at_risk.contains_key(first);
        let unsent = self.unsent.iter().find(|first| !waits(first));
        let unread = self.unread.first().filter(|_| !self.is_aside);
        let first = *unsent.into_iter().chain(unread).min()?;
        self.unsent.remove(&first);
        self.unread.remove(&first);
        let batch = self.batches.get(&first)?;
        let source = match (&batch.bytes, &batch.place) {
            (Some(bytes), _) => Source::Memory(bytes),
            (None, Some(_)) => Source::Spool,
            (None, None) => return None,
        };
        Some((first, source))
    }

    /// Sets aside what is to be sent and only the spool has: that cannot be read now, and others are not to wait for it.
    pub(super) fn set_aside(&mut self) {
        self.is_aside = true;
    }

    /// What was set aside is to be sent again; whether there was something.
    pub(super) fn bring_back(&mut self) -> bool {
        std::mem::take(&mut self.is_aside) && self.is_unread()
    }

    /// Where the spool has the batch.
    pub(super) fn place(&self, first: u64) -> Option<&Place> {
        self.batches.get(&first)?.place.as_ref()
    }

    /// Sending came to nothing, or what was sent is gone: it is to be sent again.
    pub(super) fn again(&mut self, first: u64, now: Instant) {
        if let Some(batch) = self.batches.get_mut(&first) {
            batch.entry = None;
            match batch.bytes {
                Some(_) => self.unsent.insert(first),
                None => self.unread.insert(first),
            };
            if batch.place.is_none() {
                self.at_risk.entry(first).or_insert(now);
            }
        }
    }

    /// The batch is in a stream.
    pub(super) fn added(&mut self, first: u64, entry: Entry) {
        self.at_risk.remove(&first);
        if let Some(batch) = self.batches.get_mut(&first) {
            batch.entry = Some(entry);
            self.settle(first);
        }
    }

    /// The batch is gone: what waits for it waits in vain.
    pub(super) fn remove(&mut self, first: u64) -> Released {
        let mut released = Released::default();
        self.unsent.remove(&first);
        self.unread.remove(&first);
        self.at_risk.remove(&first);
        if let Some(batch) = self.batches.remove(&first) {
            self.memory -= batch.bytes.map_or(0, |bytes| bytes.len());
            self.events -= batch.events;
            released.events = batch.events;
            released.places.extend(batch.place);
        }
        released
    }

    /// Batches of these first and last numbers are committed: they are let go.
    pub(super) fn committed(&mut self, done: &[(u64, u64)]) -> Released {
        let mut released = Released::default();
        for (first, last) in done {
            let known = self
                .batches
                .get(first)
                .is_some_and(|batch| batch.last == *last);
            if known {
                self.settle(*first);
                let one = self.remove(*first);
                released.events += one.events;
                released.places.extend(one.places);
            }
        }
        released
    }

    /// Lets go of the oldest batches that are in a stream until no more than `memory` bytes are in memory. For a process that
    /// may leave it to Redis.
    pub(super) fn shed(&mut self, memory: usize) -> Released {
        if self.memory <= memory {
            return Released::default();
        }
        let mut surplus = self.memory - memory;
        let in_memory = |batch: &&Batch| batch.bytes.is_some() && batch.entry.is_some();
        let mut oldest = Vec::new();
        for (first, batch) in self.batches.iter().filter(|(_, batch)| in_memory(batch)) {
            if surplus == 0 {
                break;
            }
            surplus = surplus.saturating_sub(batch.bytes.as_ref().map_or(0, |bytes| bytes.len()));
            oldest.push((*first, batch.last));
        }
        self.committed(&oldest)
    }

    /// Lets go of all batches that both the spool and a stream have. For a process that may leave them to Redis.
    pub(super) fn shed_spooled(&mut self) -> Released {
        let both = |batch: &Batch| batch.place.is_some() && batch.entry.is_some();
        let both = self.batches.iter().filter(|(_, batch)| both(batch));
        let both: Vec<_> = both.map(|(first, batch)| (*first, batch.last)).collect();
        self.committed(&both)
    }

    /// The first `most` batches behind `after` that were added `age` ago or longer, by stream, with the ids of their entries; and
    /// where they end, if there may be more.
    pub(super) fn waiting(
        &self,
        now: Instant,
        age: Duration,
        after: u64,
        most: usize,
    ) -> (ByStream, Option<u64>) {
        let mut waiting = ByStream::new();
        let old = |entry: &&Entry| now.saturating_duration_since(entry.added) >= age;
        let behind = self.batches.range(after + 1..);
        let entries =
            behind.filter_map(|(first, batch)| Some((*first, batch.entry.as_ref().filter(old)?)));
        let mut last = None;
        for (count, (first, entry)) in entries.take(most).enumerate() {
            let of_shard = waiting.entry(entry.shard).or_default();
            of_shard.push((first, entry.id.clone()));
            last = (count + 1 == most).then_some(first);
        }
        (waiting, last)
    }

    /// Whether the batch is still in the entry of this id, as far as known.
    pub(super) fn is_in(&self, first: u64, id: &str) -> bool {
        let entry = self
            .batches
            .get(&first)
            .and_then(|batch| batch.entry.as_ref());
        entry.is_some_and(|entry| entry.id == id)
    }
}

#[cfg(test)]
mod tests;
