//! Packs events into batches and ships them to the worker through Redis; keeps each batch until it is known to be committed.
//!
//! One thread packs, and writes to the spool what must be safe; another sends ([`super::send`]). With guaranteed delivery every batch
//! is synced in the spool before its requests are answered, and stays there until a worker says that it is committed. With best
//! effort batches are held in memory, and go to the spool when that is full. Where the disk fails, a batch counts as safe once
//! Redis has taken it. Must not talk to Redis itself.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tracing::{error, info, warn};

use super::receipt::Duty;
use super::uncommitted::{Released, Uncommitted};
use super::{Queue, Recorder, Shared, SpoolCounts, Taken, Writers, send};
use crate::clock;
use crate::config::audit::{Delivery, Stream};
use crate::store::audit::batch::Boot;
use crate::store::audit::chain::Hasher;
use crate::store::fleet::Fleet;
use crate::store::spool::{Abandoned, Place, Spool, SpoolError};

/// Bytes of batches in memory, at most, as a process has it: what is beyond goes to the spool, or stays in the queue.
pub const MEMORY: usize = 32 << 20;
/// Bytes of events in a batch, before they are compressed, at most.
const BATCH_BYTES: usize = 1 << 20;
/// Events taken from the queue at once, about.
const TAKE: usize = 4_096;
/// Between looks at what is at risk, while nothing comes: where something is, and where nothing was. What only Redis had and lost is
/// at risk again.
const TICK: Duration = Duration::from_millis(50);
const IDLE: Duration = Duration::from_millis(500);
/// With guaranteed delivery, the least time from one sync to the next, where at least so many events were safe by the one: each costs
/// the machine more than packing what comes meanwhile. As `commit_delay` and `commit_siblings` of PostgreSQL. Measured at 12,000 requests
/// a second: a wait of 0.4 ms more, for a fifth less CPU of this thread, and of the lane 1.5 µs a request.
const PAUSE: Duration = Duration::from_millis(1);
const SIBLINGS: usize = 3;
/// How long a failing disk may leave an event at risk before requests are refused.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is shipped, and how.
pub struct Shipping {
    pub boot: Boot,
    pub hasher: Hasher,
    pub stream: Stream,
    pub delivery: Delivery,
    /// Whether this process stores what it ships, too: its end is not to come ahead of that.
    pub is_stored_here: bool,
    /// Never `None` where delivery is guaranteed.
    pub spool: Option<Spool>,
    /// What processes have left in the spool that are gone.
    pub abandoned: Vec<Abandoned>,
    pub fleet: Arc<Fleet>,
    /// Bytes of batches in memory, at most; see [`MEMORY`].
    pub memory: usize,
}

/// What the two threads share. Where both are locked, the spool is first.
pub(super) struct Common {
    pub delivery: Delivery,
    pub is_stored_here: bool,
    memory: usize,
    pub uncommitted: Mutex<Uncommitted>,
    /// Gone once all is stored.
    pub spool: Mutex<Option<Spool>>,
    /// Batches that are in the spool, while whether they are on the disk is not known.
    unsynced: Mutex<Vec<(u64, Place)>>,
    /// Told when there is something to send, or the end has come.
    pub work: Notify,
    /// Whether all that there will ever be is packed.
    pub packed_all: AtomicBool,
    pub shared: Arc<Shared>,
}

/// The state of the packing thread.
struct Packing {
    common: Arc<Common>,
    queue: Queue,
    boot: Boot,
    stream: Stream,
    trouble: Trouble,
    /// Whether some batch has gone past the spool that was to go there first.
    has_passed: bool,
    /// Whether who takes the spool over may think it complete.
    is_vouched: bool,
    told_dropped: u64,
}

/// Why batches cannot go to the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// It has as many bytes as it may.
    Full,
    /// The disk fails.
    Disk,
}

/// Begins to pack and to send; up to `capacity` events wait in memory to be packed.
pub fn start(shipping: Shipping, capacity: usize) -> io::Result<(Recorder, Writers)> {
    let (recorder, queue) = Queue::new(capacity, shipping.delivery);
    let common = Arc::new(Common {
        delivery: shipping.delivery,
        is_stored_here: shipping.is_stored_here,
        memory: shipping.memory,
        uncommitted: Mutex::default(),
        spool: Mutex::new(shipping.spool),
        unsynced: Mutex::default(),
        work: Notify::new(),
        packed_all: AtomicBool::new(false),
        shared: queue.shared.clone(),
    });
    common.tell_spool(Trouble::None);
    let spools = shipping.delivery == Delivery::Guaranteed;
    common.uncommitted.lock().spool_first = spools;
    if let (true, Some(spool)) = (spools, &mut *common.spool.lock()) {
        spool.vouch().map_err(io::Error::other)?;
    }
    let packing = Packing {
        common: common.clone(),
        queue,
        boot: shipping.boot,
        stream: shipping.stream.clone(),
        trouble: Trouble::None,
        has_passed: false,
        is_vouched: spools,
        told_dropped: 0,
    };
    let shared = common.shared.clone();
    let sending = send::Sending {
        boot: packing.boot.id.to_string(),
        hasher: shipping.hasher,
        stream: shipping.stream,
        abandoned: shipping.abandoned,
        fleet: shipping.fleet,
        common: common.clone(),
    };
    let threads = vec![
        super::begin("audit", &shared, move || packing.run())?,
        super::begin("audit-send", &shared, move || send::run(sending))?,
    ];
    let writers = Writers {
        threads,
        at_the_end: Some(Box::new(move || send::end(&common))),
        sender: recorder.sender.clone(),
        shared,
    };
    Ok((recorder, writers))
}

impl Common {
    /// Lets go of the bytes that the spool has of these batches, and counts them as written.
    pub(super) fn release(&self, released: Released) {
        self.shared
            .written
            .fetch_add(released.events, Ordering::Relaxed);
        if released.places.is_empty() {
            return;
        }
        if let Some(spool) = &mut *self.spool.lock() {
            for place in released.places {
                if let Err(error) = spool.release(place) {
                    warn!(%error, "a segment of the audit's spool cannot be removed");
                }
            }
        }
    }

    /// Brings the numbers of what is under way up to date.
    pub(super) fn tell(&self) {
        let underway = self.uncommitted.lock().events();
        self.shared.underway.store(underway, Ordering::Relaxed);
    }

    fn tell_spool(&self, trouble: Trouble) {
        let Some(spool) = &*self.spool.lock() else {
            return;
        };
        let bytes = spool.bytes();
        let age = spool.oldest_age().unwrap_or_default();
        let counts = SpoolCounts {
            bytes,
            max: bytes.saturating_add(spool.room()),
            batches: spool.records() as u64,
            age: Duration::from_secs(age.as_secs()),
            corrupt: 0,
            takes: trouble == Trouble::None,
        };
        *self.shared.spool.lock() = Some(counts);
    }

    /// Puts what is at risk into the spool, syncs it, and settles what waits for that. `until` so few bytes are in memory, or all
    /// of it where that is `None`. Whether there was something to do.
    pub(super) fn persist(&self, until: Option<usize>) -> Result<bool, SpoolError> {
        let mut spool = self.spool.lock();
        let at_risk = self.uncommitted.lock().at_risk();
        let mut placed = std::mem::take(&mut *self.unsynced.lock());
        let is_idle = at_risk.is_empty() && placed.is_empty();
        let Some(spool) = spool.as_mut().filter(|_| !is_idle) else {
            return Ok(false);
        };
        let known: BTreeSet<_> = placed.iter().map(|(first, _)| *first).collect();
        let mut done = Ok(true);
        let mut memory = self.uncommitted.lock().memory();
        for (first, bytes) in at_risk.iter().filter(|(first, _)| !known.contains(first)) {
            if until.is_some_and(|until| memory <= until) {
                break;
            }
            match spool.append(bytes) {
                Ok(place) => placed.push((*first, place)),
                Err(error) => {
                    done = Err(error);
                    break;
                }
            }
            memory = memory.saturating_sub(bytes.len());
        }
        // To begin a segment is to sync the one before.
        let synced = match &done {
            Err(SpoolError::Damaged(..) | SpoolError::Removed(_)) => {
                std::mem::replace(&mut done, Ok(true)).map(drop)
            }
            _ => spool.sync(),
        };
        match synced {
            Ok(()) => {}
            // The kernel has lost what was not synced, or someone has removed it: it is appended again.
            Err(error @ (SpoolError::Damaged(..) | SpoolError::Removed(_))) => {
                let mut gone: Vec<_> = placed.into_iter().map(|(_, place)| place).collect();
                if matches!(error, SpoolError::Removed(_)) {
                    // So is what was synced there and memory still has.
                    let mut uncommitted = self.uncommitted.lock();
                    gone.append(&mut uncommitted.unspooled(spool.gone(), clock::now()));
                }
                for place in gone {
                    let _ = spool.release(place);
                }
                return Err(error);
            }
            Err(error) => {
                *self.unsynced.lock() = placed;
                return Err(error);
            }
        }
        let mut uncommitted = self.uncommitted.lock();
        for (first, place) in placed {
            match uncommitted.spooled(first, place, until.unwrap_or(self.memory)) {
                Some(place) => drop(spool.release(place)),
                None => uncommitted.settle(first),
            }
        }
        done
    }
}

impl Packing {
    fn run(mut self) {
        let mut taken = Taken::default();
        let linger = match self.common.delivery {
            Delivery::BestEffort => self.stream.batch_wait,
            // Others come while the ones before are synced.
            Delivery::Guaranteed => Duration::ZERO,
        };
        let mut more = true;
        let mut not_before = clock::now();
        while more && self.wait_for_room() {
            let pause = not_before.saturating_duration_since(clock::now());
            if !pause.is_zero() && !self.queue.shared.is_stopping() {
                thread::park_timeout(pause);
            }
            let waits =
                self.trouble != Trouble::None || self.common.uncommitted.lock().is_at_risk();
            let patience = if waits { TICK } else { IDLE };
            let enough = match linger.is_zero() {
                true => TAKE,
                false => self.stream.batch_events,
            };
            self.queue.shared.note_move();
            more = self.queue.fill(&mut taken, enough, linger, patience);
            self.queue.take_there(&mut taken, TAKE);
            not_before = clock::now();
            if self.common.delivery == Delivery::Guaranteed && taken.count >= SIBLINGS {
                not_before += PAUSE;
            }
            self.pack(&mut taken);
            self.keep_safe();
        }
        // Whatever comes from here on is lost, and the end mark counts it.
        self.queue.close();
        let dropped = self.queue.shared.counts().dropped;
        let (header, bytes) = self.boot.end(clock::wall().into(), dropped);
        let numbers = (header.first, header.last());
        self.push(numbers, bytes, Vec::new());
        self.keep_safe();
        self.common.packed_all.store(true, Ordering::Release);
        self.common.work.notify_one();
    }

    /// Waits while memory is full of what can be neither let go nor spooled; false once the time to end is over.
    fn wait_for_room(&mut self) -> bool {
        let is_full = |common: &Common| common.uncommitted.lock().memory() > common.memory;
        while is_full(&self.common) {
            self.keep_safe();
            if !is_full(&self.common) {
                break;
            }
            if self.queue.shared.is_late() {
                return false;
            }
            thread::park_timeout(TICK);
        }
        true
    }

    fn pack(&mut self, taken: &mut Taken) {
        let dropped = self.queue.shared.counts().dropped;
        let now = clock::wall().into();
        let mut start = 0;
        while start < taken.batches.len() {
            let mut end = start + 1;
            let (mut count, mut size) = (taken.batches[start].len(), taken.batches[start].size());
            while let Some(next) = taken.batches.get(end) {
                (count, size) = (count + next.len(), size + next.size());
                if count > self.stream.batch_events || size > BATCH_BYTES {
                    break;
                }
                end += 1;
            }
            let (header, bytes) = self.boot.pack(&mut taken.batches[start..end], now, dropped);
            let duties = taken.duties[start..end].iter_mut();
            let duties = duties.filter_map(Option::take).collect();
            self.push((header.first, header.last()), bytes, duties);
            start = end;
        }
        let count = u64::try_from(taken.count).unwrap_or(u64::MAX);
        self.queue.shared.left.fetch_add(count, Ordering::AcqRel);
        taken.clear();
        if dropped > self.told_dropped {
            let dropped = dropped - self.told_dropped;
            warn!(dropped, "audit events were dropped: the queue was full");
            self.told_dropped += dropped;
        }
    }

    fn push(&mut self, numbers: (u64, u64), bytes: Vec<u8>, duties: Vec<Duty>) {
        let mut uncommitted = self.common.uncommitted.lock();
        uncommitted.push(numbers, bytes.into(), None, duties, clock::now());
    }

    /// Spools what is to be, and decides whether requests are to be refused.
    fn keep_safe(&mut self) {
        let persisted = self.persist();
        if persisted.is_err() {
            self.queue.shared.errors.fetch_add(1, Ordering::Relaxed);
        }
        let before = self.trouble;
        self.trouble = self.trouble_after(persisted);
        if self.common.delivery == Delivery::Guaranteed {
            self.pass_by_spool(self.trouble != Trouble::None);
        }
        self.common.work.notify_one();
        match (before, self.trouble) {
            (Trouble::None | Trouble::Disk, Trouble::Full) => {
                error!("the audit's spool is full: is a worker running, and Postgres?");
            }
            (Trouble::Full | Trouble::Disk, Trouble::None) => {
                info!("the audit's spool takes events again");
            }
            _ => {}
        }
        let refuses = self.refuses();
        self.queue.shared.refuses.store(refuses, Ordering::Relaxed);
        self.common.tell();
        self.common.tell_spool(self.trouble);
    }

    /// Whether there was something to spool. What memory has no room for is let go where it may be.
    fn persist(&self) -> Result<bool, SpoolError> {
        let common = &*self.common;
        let shed = || {
            let shed = common.uncommitted.lock().shed(common.memory);
            common.release(shed);
        };
        match common.delivery {
            Delivery::Guaranteed => {
                if self.trouble == Trouble::Disk {
                    // Safe is what Redis has taken then.
                    shed();
                }
                common.persist(None)
            }
            Delivery::BestEffort => {
                shed();
                let over = common.uncommitted.lock().memory() > common.memory;
                let persisted = match over {
                    true => common.persist(Some(common.memory / 2)),
                    false => Ok(false),
                };
                if matches!(persisted, Err(SpoolError::Full(_))) {
                    let shed = common.uncommitted.lock().shed_spooled();
                    common.release(shed);
                }
                persisted
            }
        }
    }

    /// What is wrong with the spool by that; of a disk that fails the log is told once.
    fn trouble_after(&self, persisted: Result<bool, SpoolError>) -> Trouble {
        match persisted {
            Ok(_) if self.is_full() => Trouble::Full,
            // It is not known to work again until something was written.
            Ok(false) if self.trouble == Trouble::Disk => Trouble::Disk,
            Ok(_) => Trouble::None,
            Err(SpoolError::Full(_)) => Trouble::Full,
            Err(error) => {
                if self.trouble != Trouble::Disk {
                    error!(%error, "the audit's spool cannot be written; redis has to take the events");
                }
                Trouble::Disk
            }
        }
    }

    /// Has Redis take events that are not in the spool, or no longer. Once it did, the spool is not complete.
    fn pass_by_spool(&mut self, passes: bool) {
        let common = &*self.common;
        let is_first = passes && !self.has_passed;
        self.has_passed |= passes;
        if self.has_passed && self.is_vouched {
            let unvouched = common.spool.lock().as_mut().map_or(Ok(()), Spool::unvouch);
            self.is_vouched = unvouched.is_err();
            if let (true, Err(error)) = (is_first, unvouched) {
                warn!(%error, "who takes the audit's spool over will think it complete; tried again");
            }
        }
        // Better in Redis alone than nowhere.
        common.uncommitted.lock().spool_first = !passes;
    }

    /// Whether requests are to be refused.
    fn refuses(&self) -> bool {
        match (self.common.delivery, self.trouble) {
            (Delivery::BestEffort, _) | (_, Trouble::None) => false,
            (Delivery::Guaranteed, Trouble::Full) => true,
            (Delivery::Guaranteed, Trouble::Disk) => {
                let since = self.common.uncommitted.lock().at_risk_since();
                since.is_some_and(|since| since.elapsed() > PATIENCE)
            }
        }
    }

    /// Whether the spool was full, and has no room yet for some batches.
    fn is_full(&self) -> bool {
        let has_room = |spool: &Spool| {
            let max = spool.bytes().saturating_add(spool.room());
            spool.room() >= (2 * BATCH_BYTES as u64).min(max / 8)
        };
        self.trouble == Trouble::Full && !self.common.spool.lock().as_ref().is_some_and(has_room)
    }
}
