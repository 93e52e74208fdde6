//! From the lanes to the audit store: a bounded queue that never makes a sender wait, and a thread that writes it away in
//! batches; and a thread beside it, once a day, that closes the days that are over and removes old ones. Must not know what an event means.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use crate::clock;
use crate::event::Encoded;
use crate::store::audit::StoreError;
use crate::store::days::Day;
use crate::store::sqlite::{Files, Writer};

/// Once so many events wait, they are written in one transaction, the senders' batches whole.
const BATCH: usize = 1_000;
/// How long the first event of a transaction waits for others: without it transactions shrink and cost more an event.
const LINGER: Duration = Duration::from_millis(20);
/// Between tries of a store that fails: from the first to the last, doubled each time.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Between tries of a day's upkeep that fails, doubled each time; and how many there are before the next day's.
const UPKEEP: (Duration, u32) = (Duration::from_secs(1), 10);

/// The sending side; clones share one queue.
#[derive(Debug, Clone)]
pub struct Recorder {
    sender: Sender<Message>,
    shared: Arc<Shared>,
}

/// The writing side: a thread, until it is stopped.
pub struct Worker {
    thread: JoinHandle<()>,
    sender: Sender<Message>,
    shared: Arc<Shared>,
}

/// What became of the events so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Stored.
    pub written: u64,
    /// In the queue, or in the batch being written.
    pub queued: u64,
    /// Lost: the queue was full, or the worker had stopped.
    pub dropped: u64,
    /// Tries to write that failed. No event is lost by them.
    pub errors: u64,
    /// Files of days that were removed after the retention.
    pub removed_files: u64,
}

#[derive(Debug)]
enum Message {
    Events(Encoded),
    Stop,
}

#[derive(Debug)]
struct Shared {
    capacity: u64,
    /// Let into the queue; what of these is not written is queued, or lost once the worker has ended.
    accepted: AtomicU64,
    written: AtomicU64,
    /// Not let into the queue.
    refused: AtomicU64,
    errors: AtomicU64,
    removed_files: AtomicU64,
    /// Set by `stop`: when to give up.
    deadline: OnceLock<Instant>,
    ended: AtomicBool,
}

/// Begins to write to `writer`, on a thread of its own; up to `capacity` events wait in memory. Days that ended longer ago
/// than `retention` are removed, when the writing begins and with each new day.
pub fn start(
    writer: Writer,
    capacity: usize,
    retention: Duration,
) -> io::Result<(Recorder, Worker)> {
    let (sender, receiver) = mpsc::channel();
    let shared = Arc::new(Shared {
        capacity: u64::try_from(capacity).unwrap_or(u64::MAX),
        accepted: AtomicU64::new(0),
        written: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        errors: AtomicU64::new(0),
        removed_files: AtomicU64::new(0),
        deadline: OnceLock::new(),
        ended: AtomicBool::new(false),
    });
    let work = Work {
        writer,
        receiver,
        shared: shared.clone(),
        trouble: None,
        told_dropped: 0,
        retention,
        upkeep: None,
    };
    let thread = thread::Builder::new()
        .name("audit".to_owned())
        .spawn(move || work.run())?;
    let recorder = Recorder {
        sender: sender.clone(),
        shared: shared.clone(),
    };
    let worker = Worker {
        thread,
        sender,
        shared,
    };
    Ok((recorder, worker))
}

impl Recorder {
    /// Takes the events; those of the last ones that do not fit into the queue are counted as dropped. Never waits.
    pub fn record(&self, mut events: Encoded) {
        events.truncate(self.shared.reserve(events.len()));
        if !events.is_empty() {
            // A worker that is gone counts as lost what it did not write.
            let _ = self.sender.send(Message::Events(events));
        }
    }

    pub fn counts(&self) -> Counts {
        self.shared.counts()
    }

    /// Events that can wait.
    pub fn capacity(&self) -> u64 {
        self.shared.capacity
    }
}

impl Worker {
    /// Writes what is queued and ends; gives up after `within` (and the time of one try). What comes later is dropped.
    /// Returns the final counts.
    pub fn stop(self, within: Duration) -> Counts {
        let _ = self.shared.deadline.set(clock::now() + within);
        // Wakes it from the queue, or from its back-off.
        let _ = self.sender.send(Message::Stop);
        self.thread.thread().unpark();
        if self.thread.join().is_err() {
            error!("the audit thread panicked");
            self.shared.ended.store(true, Ordering::Release);
        }
        self.shared.counts()
    }
}

impl Shared {
    /// Makes room for up to `wanted` events; how many it is.
    fn reserve(&self, wanted: usize) -> usize {
        let wanted_count = u64::try_from(wanted).unwrap_or(u64::MAX);
        if self.deadline.get().is_some() {
            self.refused.fetch_add(wanted_count, Ordering::Relaxed);
            return 0;
        }
        let mut fits = 0;
        let _ = self
            .accepted
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |accepted| {
                let queued = accepted.saturating_sub(self.written.load(Ordering::Acquire));
                fits = wanted_count.min(self.capacity.saturating_sub(queued));
                Some(accepted + fits)
            });
        if fits < wanted_count {
            self.refused
                .fetch_add(wanted_count - fits, Ordering::Relaxed);
        }
        usize::try_from(fits).unwrap_or(wanted)
    }

    fn counts(&self) -> Counts {
        let ended = self.ended.load(Ordering::Acquire);
        let written = self.written.load(Ordering::Acquire);
        let waiting = self
            .accepted
            .load(Ordering::Acquire)
            .saturating_sub(written);
        let (queued, lost) = if ended { (0, waiting) } else { (waiting, 0) };
        Counts {
            written,
            queued,
            dropped: self.refused.load(Ordering::Relaxed) + lost,
            errors: self.errors.load(Ordering::Relaxed),
            removed_files: self.removed_files.load(Ordering::Relaxed),
        }
    }
}

/// The state of the thread.
struct Work {
    writer: Writer,
    receiver: Receiver<Message>,
    shared: Arc<Shared>,
    /// The error that was logged last, until a write succeeds.
    trouble: Option<String>,
    told_dropped: u64,
    retention: Duration,
    /// The thread that does the upkeep, and the day that it does it for.
    upkeep: Option<(Day, JoinHandle<()>)>,
}

impl Work {
    fn run(mut self) {
        self.keep_up();
        let mut batches = Vec::new();
        loop {
            let more = self.fill(&mut batches);
            let written = batches.is_empty() || self.write(&mut batches);
            if !written || !more {
                self.end();
                return;
            }
            batches.clear();
        }
    }

    /// Waits until there are enough events, or the first has waited long enough; whether more can come.
    fn fill(&mut self, batches: &mut Vec<Encoded>) -> bool {
        let stopping = || self.shared.deadline.get().is_some();
        let mut count = 0;
        if !stopping() {
            let Ok(message) = self.receiver.recv() else {
                return false;
            };
            count += take(message, batches);
            // Asleep to what comes meanwhile, since each wake would cost as much as writing some events.
            if count < BATCH && !stopping() {
                thread::park_timeout(LINGER);
            }
        }
        while count < BATCH {
            match self.receiver.try_recv() {
                Ok(message) => count += take(message, batches),
                Err(TryRecvError::Empty) => return !stopping(),
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    /// Tries until the events are written; false if the deadline came first.
    fn write(&mut self, batches: &mut [Encoded]) -> bool {
        let (mut pause, longest) = BACK_OFF;
        loop {
            match self.writer.append(batches, clock::wall()) {
                Ok(()) => {
                    let count = batches.iter().map(Encoded::len).sum::<usize>();
                    let count = u64::try_from(count).unwrap_or(u64::MAX);
                    self.shared.written.fetch_add(count, Ordering::AcqRel);
                    self.recovered();
                    self.keep_up();
                    return true;
                }
                Err(error) => self.failed(&error),
            }
            match self.shared.deadline.get() {
                Some(deadline) if clock::now() >= *deadline => return false,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(clock::now());
                    thread::park_timeout(pause.min(left));
                }
                None => thread::park_timeout(pause),
            }
            pause = (pause * 2).min(longest);
        }
    }

    /// Counts each error; logs it unless it is the same as before.
    fn failed(&mut self, error: &StoreError) {
        self.shared.errors.fetch_add(1, Ordering::Relaxed);
        let said = error.to_string();
        if self.trouble.as_ref() != Some(&said) {
            error!(
                error = said,
                "audit events cannot be written; they wait in memory"
            );
            self.trouble = Some(said);
        }
    }

    fn recovered(&mut self) {
        if self.trouble.take().is_some() {
            info!("audit events are written again");
        }
        let dropped = self.shared.refused.load(Ordering::Relaxed);
        if dropped > self.told_dropped {
            warn!(
                dropped = dropped - self.told_dropped,
                "audit events were dropped: the queue was full"
            );
            self.told_dropped = dropped;
        }
    }

    /// Begins the upkeep of the files if the day is new. On another thread, since the index of a day of many events takes
    /// seconds, and those of the new day must be written meanwhile. It need not end: the next one goes on from there.
    fn keep_up(&mut self) {
        let day = self.writer.day();
        let busy = self
            .upkeep
            .as_ref()
            .is_some_and(|(done, thread)| *done == day || !thread.is_finished());
        if busy {
            return;
        }
        let (files, shared) = (self.writer.files().clone(), self.shared.clone());
        let retention = self.retention;
        let thread = thread::Builder::new()
            .name("audit-upkeep".to_owned())
            .spawn(move || keep_up(&files, retention, &shared));
        match thread {
            Ok(thread) => self.upkeep = Some((day, thread)),
            Err(error) => error!(%error, "no thread to close days of the audit: tried again"),
        }
    }

    fn end(self) {
        // The receiver goes first, so that whatever is sent from here on is known as lost.
        drop(self.receiver);
        self.shared.ended.store(true, Ordering::Release);
        let lost = self.shared.counts().dropped - self.told_dropped;
        if lost > 0 {
            error!(lost, "audit events were lost at the end");
        }
    }
}

/// How many events the message brings.
fn take(message: Message, batches: &mut Vec<Encoded>) -> usize {
    match message {
        Message::Events(events) => {
            let count = events.len();
            batches.push(events);
            count
        }
        Message::Stop => 0,
    }
}

/// Tries until it is done, or too often.
fn keep_up(files: &Files, retention: Duration, shared: &Shared) {
    let (mut pause, tries) = UPKEEP;
    for left in (0..tries).rev() {
        // Neither waits for the other to succeed. What is removed leaves room for the indexes.
        let removed = remove_old(files, retention, shared);
        let closed = close_days(files);
        match removed.and(closed) {
            Ok(()) => return,
            Err(error) if left == 0 => {
                error!(%error, "days of the audit cannot be closed or removed; tried again on the next day");
            }
            Err(_) => thread::sleep(pause),
        }
        if shared.ended.load(Ordering::Acquire) {
            return;
        }
        pause *= 2;
    }
}

fn remove_old(files: &Files, retention: Duration, shared: &Shared) -> Result<(), StoreError> {
    files.remove_old(retention, clock::wall(), |day| {
        shared.removed_files.fetch_add(1, Ordering::Relaxed);
        info!(%day, "day of the audit removed: it is older than the retention");
    })
}

fn close_days(files: &Files) -> Result<(), StoreError> {
    let start = clock::now();
    files.close_days(|day| info!(%day, took = ?start.elapsed(), "day of the audit closed"))
}
