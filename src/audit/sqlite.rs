//! Writes events to SQLite: a thread that writes them in batches, and begins the upkeep of the files with each day.
//! Must not close or remove a day.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use tracing::{error, info, warn};

use super::receipt::Duty;
use super::upkeep::{Daily, mend};
use super::{Queue, Recorder, Shared, Taken, Writers};
use crate::clock;
use crate::config::audit::Delivery;
use crate::event::Encoded;
use crate::policy::retry::Pauses;
use crate::store::audit::StoreError;
use crate::store::sqlite::{Files, Writer};

/// Once so many events wait, they are written in one transaction, the senders' batches whole.
const BATCH: usize = 1_000;
/// How long the first event of a transaction waits for others: without it transactions shrink and cost more an event.
const LINGER: Duration = Duration::from_millis(20);
/// Between looks at whether it still turns, while nothing comes: without them, what comes first would find it stuck.
const IDLE: Duration = Duration::from_millis(500);
/// Between tries of a store that fails.
const PAUSES: Pauses = Pauses {
    first: Duration::from_millis(10),
    longest: Duration::from_secs(1),
};
/// Where delivery is guaranteed, requests are refused once the pauses are so long; a lock that others hold for a moment is no
/// reason.
const REFUSE_AT: Duration = Duration::from_millis(100);

/// Begins to write to `writer`, on a thread of its own; up to `capacity` events wait in memory. Days that ended longer ago
/// than `retention` are removed, when the writing begins and with each new day. Where delivery is guaranteed, requests wait until
/// their events are committed: see [`Writer::sync_each`].
pub fn start(
    writer: Writer,
    capacity: usize,
    delivery: Delivery,
    retention: Duration,
) -> io::Result<(Recorder, Writers)> {
    let files = writer.files().clone();
    begin(files, |_, _| Some(writer), capacity, delivery, retention)
}

/// As [`start`], where the disk is full, or a file damaged or another version's: events wait in memory, and what does not fit there is dropped, until `open` succeeds.
/// Days that are to be removed may be what makes room. Delivery is best effort.
pub fn start_once_mended(
    files: Files,
    open: impl Fn() -> Result<Writer, StoreError> + Send + 'static,
    capacity: usize,
    retention: Duration,
) -> io::Result<(Recorder, Writers)> {
    let wait = move |shared: &Shared, upkeep: &mut Daily| wait_for_mend(open, shared, upkeep);
    begin(files, wait, capacity, Delivery::BestEffort, retention)
}

fn begin(
    files: Files,
    writer: impl FnOnce(&Shared, &mut Daily) -> Option<Writer> + Send + 'static,
    capacity: usize,
    delivery: Delivery,
    retention: Duration,
) -> io::Result<(Recorder, Writers)> {
    let (recorder, queue) = Queue::new(capacity, delivery);
    let shared = queue.shared.clone();
    let linger = match delivery {
        Delivery::BestEffort => LINGER,
        // Others come while the ones before are written.
        Delivery::Guaranteed => Duration::ZERO,
    };
    let mut upkeep = Daily::new(files, retention, &shared);
    let work = move || match writer(&queue.shared, &mut upkeep) {
        Some(writer) => Work {
            writer,
            queue,
            linger,
            delivery,
            trouble: None,
            told_dropped: 0,
            upkeep,
        }
        .run(),
        None => end(queue, 0),
    };
    let thread = super::begin("audit", &shared, work)?;
    let writers = Writers {
        threads: vec![thread],
        at_the_end: None,
        sender: recorder.sender.clone(),
        shared,
    };
    Ok((recorder, writers))
}

/// The state of the thread.
struct Work {
    writer: Writer,
    queue: Queue,
    linger: Duration,
    delivery: Delivery,
    /// The error that was logged last, until a write succeeds.
    trouble: Option<String>,
    told_dropped: u64,
    upkeep: Daily,
}

impl Work {
    fn run(mut self) {
        let mut taken = Taken::default();
        loop {
            self.upkeep.look(Some(self.writer.day()));
            self.shared().note_move();
            let more = self.queue.fill(&mut taken, BATCH, self.linger, IDLE);
            let written = taken.batches.is_empty() || self.write(&mut taken.batches);
            if !written || !more {
                taken.clear();
                end(self.queue, self.told_dropped);
                return;
            }
            taken.duties.drain(..).flatten().for_each(Duty::safe);
            taken.clear();
        }
    }

    /// Tries until the events are written; false if the deadline came first.
    fn write(&mut self, batches: &mut [Encoded]) -> bool {
        let mut pause = PAUSES.first;
        loop {
            match self.writer.append(batches, clock::wall()) {
                Ok(()) => {
                    let count = batches.iter().map(Encoded::len).sum::<usize>();
                    let count = u64::try_from(count).unwrap_or(u64::MAX);
                    self.shared().left.fetch_add(count, Ordering::AcqRel);
                    self.shared().written.fetch_add(count, Ordering::AcqRel);
                    self.recovered();
                    return true;
                }
                Err(error) => {
                    self.failed(&error, pause);
                    // What retention removes may be what a full disk lacks.
                    self.upkeep.look(Some(self.writer.day()));
                }
            }
            if !rest(self.shared(), pause) {
                return false;
            }
            pause = PAUSES.after(pause);
        }
    }

    /// Counts each error; logs it unless it is the same as before. `pause` is the one before the next try.
    fn failed(&mut self, error: &StoreError, pause: Duration) {
        self.shared().errors.fetch_add(1, Ordering::Relaxed);
        let refuses = self.delivery == Delivery::Guaranteed && pause >= REFUSE_AT;
        self.shared().refuses.store(refuses, Ordering::Relaxed);
        let said = error.to_string();
        if self.trouble.as_ref() != Some(&said) {
            error!(
                error = said,
                "audit events cannot be written; they wait in memory"
            );
            self.trouble = Some(said);
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.queue.shared
    }

    fn recovered(&mut self) {
        // In guaranteed delivery requests are refused while this store fails.
        self.shared().refuses.store(false, Ordering::Relaxed);
        if self.trouble.take().is_some() {
            info!("audit events are written again");
        }
        let dropped = self.shared().dropped.load(Ordering::Relaxed);
        if dropped > self.told_dropped {
            warn!(
                dropped = dropped - self.told_dropped,
                "audit events were dropped: the queue was full"
            );
            self.told_dropped = dropped;
        }
    }
}

fn end(mut queue: Queue, told_dropped: u64) {
    queue.close();
    let lost = queue.shared.counts().dropped - told_dropped;
    if lost > 0 {
        error!(lost, "audit events were lost at the end");
    }
}

/// Pauses between two tries; false if the time to end is over.
fn rest(shared: &Shared, pause: Duration) -> bool {
    let left = match shared.deadline.get() {
        Some(deadline) => deadline.saturating_duration_since(clock::now()),
        None => Duration::MAX,
    };
    if left.is_zero() {
        return false;
    }
    thread::park_timeout(pause.min(left));
    true
}

/// Tries until the writer is there; `None` if the process ends before.
fn wait_for_mend(
    open: impl Fn() -> Result<Writer, StoreError>,
    shared: &Shared,
    upkeep: &mut Daily,
) -> Option<Writer> {
    let mut trouble = String::new();
    loop {
        upkeep.look(None);
        shared.note_move();
        match open() {
            Ok(writer) => {
                shared.troubles.lock().unwritten = None;
                info!("audit events are written");
                return Some(writer);
            }
            Err(error) => {
                shared.errors.fetch_add(1, Ordering::Relaxed);
                let said = error.to_string();
                if said != trouble {
                    let mend = mend(&error);
                    shared.troubles.lock().unwritten = Some(format!("{said}; {mend}"));
                    error!(
                        error = said,
                        mend, "audit events cannot be written; they wait in memory"
                    );
                    trouble = said;
                }
            }
        }
        if !rest(shared, PAUSES.longest) {
            return None;
        }
    }
}
