//! From the lanes to where events are kept: a bounded queue that never makes a sender wait, trays beside it for what requests wait for ([`tray`]), and the threads behind it, which
//! write events to SQLite ([`sqlite`]) and keep its days up ([`upkeep`]), or pack and ship them to the worker ([`ship`]). Must not know what an event means.

pub mod receipt;
mod send;
pub mod ship;
pub mod sqlite;
pub mod tray;
mod uncommitted;
mod upkeep;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tracing::error;

use self::receipt::Duty;
use self::tray::{Slot, Tray};
use crate::blocking;
use crate::clock;
use crate::config::audit::Delivery;
use crate::event::Encoded;

/// Milliseconds without a look at the queue after which it counts as stuck, while events wait.
const STUCK: u64 = 1_000;
/// Bytes of events in the queue, from which on it takes no more: as many events as may wait would take hundreds of megabytes where
/// clients have long paths and queries. They are counted as groups are sent, not as each event is laid.
pub const BYTES: u64 = 32 << 20;
/// Bytes that are taken from it at once, about.
const HANDFUL: usize = 8 << 20;

/// The sending side; clones share one queue.
#[derive(Debug, Clone)]
pub struct Recorder {
    sender: Sender<Message>,
    shared: Arc<Shared>,
    pub delivery: Delivery,
}

/// The threads behind the queue, until they are stopped.
pub struct Writers {
    threads: Vec<JoinHandle<()>>,
    /// What is to be done once they have ended.
    at_the_end: Option<Box<dyn FnOnce() + Send>>,
    sender: Sender<Message>,
    shared: Arc<Shared>,
}

/// What became of the events so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Stored, or let go to Redis.
    pub written: u64,
    /// In the queue, or in the batch being written.
    pub queued: u64,
    /// Of the queue, which is full at [`BYTES`] whatever its number of events.
    pub queued_bytes: u64,
    /// On their way to the worker and not known to be committed.
    pub underway: u64,
    /// Lost: the queue was full, or the threads had stopped.
    pub dropped: u64,
    /// Tries to write, to send or to read back that failed. No event is lost by them.
    pub errors: u64,
    /// Files of days that were removed after the retention.
    pub removed_files: u64,
    /// Batches that were lost in Redis and sent again.
    pub resent: u64,
    pub spool: Option<SpoolCounts>,
}

/// What is wrong beside the writing, each with its mend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Troubles {
    /// The newest of SQLite's files is of a day to come.
    pub ahead: Option<String>,
    /// Days are neither closed nor removed.
    pub upkeep: Option<String>,
    /// Nothing was written yet, for want of a file that can be.
    pub unwritten: Option<String>,
    /// A thread has panicked, and nothing does its work.
    pub ended: Option<String>,
}

/// How the spool is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpoolCounts {
    pub bytes: u64,
    pub max: u64,
    pub batches: u64,
    /// Since the oldest of them came, in whole seconds.
    pub age: Duration,
    /// Damage that was found in what other processes left, a stretch each.
    pub corrupt: u64,
    /// Not while it is full, or its disk is or fails.
    pub takes: bool,
}

#[derive(Debug)]
enum Message {
    Events(Encoded, Option<Duty>),
    /// There is something in a tray, or the end has come.
    Look,
}

#[derive(Debug, Default)]
struct Shared {
    capacity: u64,
    trays: Mutex<Vec<Arc<Slot>>>,
    /// Whether the thread that empties the queue waits for a message, and looks at no tray before.
    sleeps: AtomicBool,
    /// Let into the queue or a tray; what of these has not left it is queued, or lost once the threads have ended.
    accepted: AtomicU64,
    left: AtomicU64,
    /// Of the events in the queue.
    bytes: AtomicU64,
    written: AtomicU64,
    underway: AtomicU64,
    /// Not let into the queue, or lost behind it.
    dropped: AtomicU64,
    errors: AtomicU64,
    removed_files: AtomicU64,
    resent: AtomicU64,
    /// Whether events cannot be made safe now.
    refuses: AtomicBool,
    /// When the thread that empties the queue was last seen to, by [`clock::mono`] in milliseconds.
    moved: AtomicU64,
    /// As it was last told; but for what is corrupt.
    spool: Mutex<Option<SpoolCounts>>,
    spool_corrupt: AtomicU64,
    troubles: Mutex<Troubles>,
    /// Where panics of the threads are counted.
    panics: OnceLock<Counter>,
    /// Set by `stop`: when to give up.
    deadline: OnceLock<Instant>,
    ended: AtomicBool,
}

/// The receiving side.
struct Queue {
    receiver: Receiver<Message>,
    shared: Arc<Shared>,
}

/// What was taken from the queue.
#[derive(Default)]
struct Taken {
    batches: Vec<Encoded>,
    /// One for each of the batches.
    duties: Vec<Option<Duty>>,
    /// Of events.
    count: usize,
    /// Their bytes.
    size: usize,
}

impl Recorder {
    /// Takes events that no request waits for; those of the last ones that do not fit into the queue are counted as dropped. Never waits.
    pub fn record(&self, mut events: Encoded) {
        let fits = self.shared.reserve(events.len());
        events.truncate(fits);
        if !events.is_empty() {
            self.send(events, None);
        }
    }

    fn send(&self, events: Encoded, duty: Option<Duty>) {
        let size = bytes(events.size());
        self.shared.bytes.fetch_add(size, Ordering::Relaxed);
        // Threads that are gone count as lost what they did not write.
        let _ = self.sender.send(Message::Events(events, duty));
    }

    /// A tray of this lane's own.
    pub fn tray(&self) -> Tray {
        Tray::new(self)
    }

    /// Has the thread look at the trays.
    fn wake(&self) {
        if self.shared.sleeps.swap(false, Ordering::AcqRel) {
            let _ = self.sender.send(Message::Look);
        }
    }

    /// Whether requests are to be refused since their events could not be made safe. Never where delivery is best effort.
    pub fn refuses(&self) -> bool {
        self.delivery == Delivery::Guaranteed
            && (self.shared.refuses.load(Ordering::Relaxed) || self.shared.is_stuck())
    }

    pub fn counts(&self) -> Counts {
        self.shared.counts()
    }

    /// Has panics of its threads counted.
    pub fn count_panics(&self, panics: &Counter) {
        let _ = self.shared.panics.set(panics.clone());
    }

    pub fn troubles(&self) -> Troubles {
        self.shared.troubles.lock().clone()
    }

    /// Events that can wait.
    pub fn capacity(&self) -> u64 {
        self.shared.capacity
    }
}

impl Writers {
    /// Writes what is queued and ends; gives up after `within` (and the time of one try). What comes later is dropped.
    /// Returns the final counts.
    pub fn stop(self, within: Duration) -> Counts {
        let _ = self.shared.deadline.set(clock::now() + within);
        // Wakes them from the queue, or from their back-off.
        let _ = self.sender.send(Message::Look);
        for thread in self.threads {
            thread.thread().unpark();
            if thread.join().is_err() {
                error!("a thread of the audit panicked");
                self.shared.ended.store(true, Ordering::Release);
            }
        }
        if let Some(at_the_end) = self.at_the_end {
            at_the_end();
        }
        self.shared.counts()
    }
}

/// Begins a thread behind the queue; a panic of it is kept for `/health`.
fn begin(
    name: &str,
    shared: &Arc<Shared>,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let shared = shared.clone();
    let thread = thread::Builder::new().name(name.to_owned());
    let begun = thread.spawn(move || {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            let said =
                "a thread of the audit has panicked, and events are no longer kept, or no longer sent: restart weir";
            shared.troubles.lock().ended = Some(said.to_owned());
            shared.note_panic();
            resume_unwind(panic);
        }
    });
    begun.map_err(blocking::none)
}

impl Shared {
    /// Makes room for up to `wanted` events; how many it is.
    fn reserve(&self, wanted: usize) -> usize {
        let wanted_count = u64::try_from(wanted).unwrap_or(u64::MAX);
        let is_heavy = self.bytes.load(Ordering::Relaxed) >= BYTES;
        if is_heavy || self.is_stopping() {
            self.dropped.fetch_add(wanted_count, Ordering::Relaxed);
            return 0;
        }
        let mut fits = 0;
        let _ = self
            .accepted
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |accepted| {
                let queued = accepted.saturating_sub(self.left.load(Ordering::Acquire));
                fits = wanted_count.min(self.capacity.saturating_sub(queued));
                Some(accepted + fits)
            });
        if fits < wanted_count {
            self.dropped
                .fetch_add(wanted_count - fits, Ordering::Relaxed);
        }
        usize::try_from(fits).unwrap_or(wanted)
    }

    fn counts(&self) -> Counts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let left = self.left.load(Ordering::Acquire);
        let waiting = self.accepted.load(Ordering::Acquire).saturating_sub(left);
        let ended = self.ended.load(Ordering::Acquire);
        let (queued, lost) = if ended { (0, waiting) } else { (waiting, 0) };
        let spool = self.spool.lock().map(|told| SpoolCounts {
            corrupt: read(&self.spool_corrupt),
            ..told
        });
        Counts {
            written: read(&self.written),
            queued,
            queued_bytes: if ended { 0 } else { read(&self.bytes) },
            underway: read(&self.underway),
            dropped: read(&self.dropped) + lost,
            errors: read(&self.errors),
            removed_files: read(&self.removed_files),
            resent: read(&self.resent),
            spool,
        }
    }

    /// The queue is being emptied.
    fn note_move(&self) {
        self.moved.store(millis(), Ordering::Relaxed);
    }

    /// Whether events wait, and nothing empties the queue: a disk may hang as well as fail.
    fn is_stuck(&self) -> bool {
        let waits = self.accepted.load(Ordering::Relaxed) > self.left.load(Ordering::Relaxed);
        waits && millis().saturating_sub(self.moved.load(Ordering::Relaxed)) > STUCK
    }

    fn note_panic(&self) {
        if let Some(panics) = self.panics.get() {
            panics.inc();
        }
    }

    fn is_stopping(&self) -> bool {
        self.deadline.get().is_some()
    }

    /// Whether the time to end is over.
    fn is_late(&self) -> bool {
        self.deadline
            .get()
            .is_some_and(|deadline| clock::now() >= *deadline)
    }
}

impl Queue {
    /// A queue in which up to `capacity` events wait.
    fn new(capacity: usize, delivery: Delivery) -> (Recorder, Queue) {
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::new(Shared {
            capacity: u64::try_from(capacity).unwrap_or(u64::MAX),
            moved: AtomicU64::new(millis()),
            ..Shared::default()
        });
        let recorder = Recorder {
            sender,
            shared: shared.clone(),
            delivery,
        };
        (recorder, Queue { receiver, shared })
    }

    /// Waits for the first events, for at most `patience`; then until there are `enough`, or the first have waited for `linger`.
    /// Whether more can come.
    fn fill(&self, taken: &mut Taken, enough: usize, linger: Duration, patience: Duration) -> bool {
        let stopping = || self.shared.is_stopping();
        if !stopping() {
            if !self.take_there(taken, enough) && !self.take_next(taken, patience) {
                return false;
            }
            self.take_there(taken, enough);
            // Asleep to what comes meanwhile, since each wake would cost as much as writing some events.
            let some = taken.count > 0 && !taken.is_enough(enough);
            if some && !linger.is_zero() && !stopping() {
                thread::park_timeout(linger);
            }
        }
        self.take_there(taken, enough);
        !stopping() || taken.is_enough(enough)
    }

    /// Waits for the next message, for at most `patience`. Whether more can come.
    fn take_next(&self, taken: &mut Taken, patience: Duration) -> bool {
        self.shared.sleeps.store(true, Ordering::Release);
        // What a lane has laid down without a look at that.
        if self.take_there(taken, 1) {
            self.shared.sleeps.store(false, Ordering::Release);
            return true;
        }
        let received = self.receiver.recv_timeout(patience);
        self.shared.sleeps.store(false, Ordering::Release);
        match received {
            Ok(message) => self.take(taken, message),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return false,
        }
        true
    }

    /// Takes what is there until there are `enough`, and all that is in trays if there are not; whether there was something.
    fn take_there(&self, taken: &mut Taken, enough: usize) -> bool {
        let before = taken.count;
        while !taken.is_enough(enough)
            && let Ok(message) = self.receiver.try_recv()
        {
            self.take(taken, message);
        }
        if !taken.is_enough(enough) {
            let trays = self.shared.trays.lock();
            for (events, duty) in trays.iter().filter_map(|slot| slot.take()) {
                taken.add(events, Some(duty));
            }
        }
        taken.count > before
    }

    fn take(&self, taken: &mut Taken, message: Message) {
        match message {
            Message::Events(events, duty) => {
                let size = bytes(events.size());
                self.shared.bytes.fetch_sub(size, Ordering::Relaxed);
                taken.add(events, duty);
            }
            Message::Look => {}
        }
    }

    /// What is in the queue, and whatever is sent from here on, is known as lost.
    fn close(&mut self) {
        self.receiver = mpsc::channel().1;
        self.shared
            .trays
            .lock()
            .iter()
            .for_each(|slot| slot.close());
        self.shared.ended.store(true, Ordering::Release);
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.close();
    }
}

impl Taken {
    fn add(&mut self, events: Encoded, duty: Option<Duty>) {
        self.count += events.len();
        self.size += events.size();
        self.batches.push(events);
        self.duties.push(duty);
    }

    /// Whether it is so many events, or as much as there is to be in memory at once.
    fn is_enough(&self, enough: usize) -> bool {
        self.count >= enough || self.size >= HANDFUL
    }

    fn clear(&mut self) {
        self.batches.clear();
        self.duties.clear();
        (self.count, self.size) = (0, 0);
    }
}

fn bytes(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}

fn millis() -> u64 {
    clock::millis(clock::mono())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::AuditEvent;

    const GROUP: usize = 64;

    /// By path and query as long as are kept.
    #[test]
    fn few_events_fill_the_queue_where_they_are_large() {
        let long = "x".repeat(4_096);
        let event = AuditEvent {
            path: long.as_str(),
            query: Some(long.as_str()),
            ..AuditEvent::sample()
        };
        let group = || {
            let mut group = Encoded::default();
            (0..GROUP).for_each(|_| group.push(&event));
            group
        };
        let size = group().size();
        let fills = |record: &dyn Fn(&Recorder, &Tray)| {
            let (recorder, queue) = Queue::new(50_000, Delivery::Guaranteed);
            let (tray, mut taken) = (recorder.tray(), Taken::default());
            for _ in 0..2 {
                let before = recorder.counts();
                let mut sent = 0;
                while recorder.counts().dropped == before.dropped {
                    record(&recorder, &tray);
                    sent += 1;
                    assert!(sent <= 50_000, "all are let in");
                }
                let counts = recorder.counts();
                let queued = counts.queued as usize * size / GROUP;
                let most = BYTES as usize + 2 * size;
                assert!((BYTES as usize..most).contains(&queued), "{queued}");
                assert!((BYTES..most as u64).contains(&counts.queued_bytes));
                // It is emptied a handful at a time, to the last one.
                let mut left = queued;
                while left > 0 {
                    queue.fill(&mut taken, 50_000, Duration::ZERO, Duration::ZERO);
                    assert!((1..HANDFUL + size).contains(&taken.size));
                    left -= taken.size;
                    let count = taken.count as u64;
                    recorder.shared.left.fetch_add(count, Ordering::AcqRel);
                    taken.clear();
                }
                assert_eq!(recorder.counts().queued_bytes, 0);
            }
        };
        fills(&|recorder, _| recorder.record(group()));
        fills(&|_, tray| drop(tray.lay(&event)));
    }

    #[test]
    fn a_queue_that_nobody_empties_refuses_until_someone_does() {
        let [guaranteed, best_effort] =
            [Delivery::Guaranteed, Delivery::BestEffort].map(|delivery| Queue::new(10, delivery));
        for (recorder, _) in [&guaranteed, &best_effort] {
            let mut event = Encoded::default();
            event.push(&AuditEvent::<&str>::sample());
            assert!(!recorder.refuses());
            recorder.record(event);
        }
        let (recorder, queue) = &guaranteed;
        let began = clock::now();
        while !recorder.refuses() {
            assert!(began.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(10));
        }
        assert!(!best_effort.0.refuses());
        queue.shared.note_move();
        assert!(!recorder.refuses());
    }
}
