//! Writes events to SQLite: a thread that writes them in batches; and one beside it, once a day, that closes the days that are
//! over and removes old ones.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing::{error, info, warn};

use super::receipt::Duty;
use super::{Queue, Recorder, Shared, Taken, Writers};
use crate::clock;
use crate::config::audit::Delivery;
use crate::event::Encoded;
use crate::store::audit::StoreError;
use crate::store::audit::days::Day;
use crate::store::sqlite::{Files, Writer};

/// Once so many events wait, they are written in one transaction, the senders' batches whole.
const BATCH: usize = 1_000;
/// How long the first event of a transaction waits for others: without it transactions shrink and cost more an event.
const LINGER: Duration = Duration::from_millis(20);
/// Between looks at whether it still turns, while nothing comes: without them, what comes first would find it stuck.
const IDLE: Duration = Duration::from_millis(500);
/// Between tries of a store that fails: from the first to the last, doubled each time.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Where delivery is guaranteed, requests are refused once the pauses are so long; a lock that others hold for a moment is no
/// reason.
const REFUSE_AT: Duration = Duration::from_millis(100);
/// Between tries of a day's upkeep that fails, doubled each time; and how many there are before the next day's.
const UPKEEP: (Duration, u32) = (Duration::from_secs(1), 10);
/// How long a clock that leapt has to be set right before days are removed by it.
const DOUBT: Duration = Duration::from_secs(600);

/// Begins to write to `writer`, on a thread of its own; up to `capacity` events wait in memory. Days that ended longer ago
/// than `retention` are removed, when the writing begins and with each new day. Where delivery is guaranteed, requests wait until
/// their events are committed: see [`Writer::sync_each`].
pub fn start(
    writer: Writer,
    capacity: usize,
    delivery: Delivery,
    retention: Duration,
) -> io::Result<(Recorder, Writers)> {
    begin(|_| Some(writer), capacity, delivery, retention)
}

/// As [`start`], where the disk is full: events wait in memory, and what does not fit there is dropped, until `open` finds room. Days that
/// are to be removed may be what makes it. Delivery is best effort.
pub fn start_once_there_is_room(
    files: Files,
    open: impl Fn() -> Result<Writer, StoreError> + Send + 'static,
    capacity: usize,
    retention: Duration,
) -> io::Result<(Recorder, Writers)> {
    let wait = move |shared: &Arc<Shared>| wait_for_room(&files, open, retention, shared);
    begin(wait, capacity, Delivery::BestEffort, retention)
}

fn begin(
    writer: impl FnOnce(&Arc<Shared>) -> Option<Writer> + Send + 'static,
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
    let work = move || match writer(&queue.shared) {
        Some(writer) => Work {
            writer,
            queue,
            linger,
            delivery,
            trouble: None,
            told_dropped: 0,
            retention,
            upkeep: None,
        }
        .run(),
        None => end(queue, 0),
    };
    let thread = thread::Builder::new()
        .name("audit".to_owned())
        .spawn(work)?;
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
    retention: Duration,
    /// The thread that does the upkeep, and what it does it for: the day of the newest file, and that of the clock.
    upkeep: Option<((Day, Day), JoinHandle<()>)>,
}

impl Work {
    fn run(mut self) {
        self.keep_up();
        let mut taken = Taken::default();
        loop {
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
        let (mut pause, longest) = BACK_OFF;
        loop {
            match self.writer.append(batches, clock::wall()) {
                Ok(()) => {
                    let count = batches.iter().map(Encoded::len).sum::<usize>();
                    let count = u64::try_from(count).unwrap_or(u64::MAX);
                    self.shared().left.fetch_add(count, Ordering::AcqRel);
                    self.shared().written.fetch_add(count, Ordering::AcqRel);
                    self.recovered();
                    self.keep_up();
                    return true;
                }
                Err(error) => {
                    self.failed(&error, pause);
                    // What retention removes may be what a full disk lacks.
                    self.keep_up();
                }
            }
            if !rest(self.shared(), pause) {
                return false;
            }
            pause = (pause * 2).min(longest);
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

    /// Begins the upkeep of the files if the day is new. On another thread, since the index of a day of many events takes
    /// seconds, and those of the new day must be written meanwhile. It need not end: the next one goes on from there.
    fn keep_up(&mut self) {
        // A file of a day to come must not keep others from being closed and removed until then.
        let day = (self.writer.day(), Day::of(clock::wall()));
        let busy = self
            .upkeep
            .as_ref()
            .is_some_and(|(done, thread)| *done == day || !thread.is_finished());
        if busy {
            return;
        }
        let (files, shared) = (self.writer.files().clone(), self.shared().clone());
        let retention = self.retention;
        let thread = thread::Builder::new()
            .name("audit-upkeep".to_owned())
            .spawn(move || keep_up(&files, retention, &shared));
        match thread {
            Ok(thread) => self.upkeep = Some((day, thread)),
            Err(error) => error!(%error, "no thread to close days of the audit: tried again"),
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
    match shared.deadline.get() {
        Some(deadline) if clock::now() >= *deadline => return false,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(clock::now());
            thread::park_timeout(pause.min(left));
        }
        None => thread::park_timeout(pause),
    }
    true
}

/// Tries until the writer is there; `None` if the process ends before.
fn wait_for_room(
    files: &Files,
    open: impl Fn() -> Result<Writer, StoreError>,
    retention: Duration,
    shared: &Arc<Shared>,
) -> Option<Writer> {
    // It has its own tries, and need not end.
    let (old, told) = (files.clone(), shared.clone());
    let upkeep = thread::Builder::new()
        .name("audit-upkeep".to_owned())
        .spawn(move || keep_up(&old, retention, &told));
    if let Err(error) = upkeep {
        error!(%error, "no thread to remove days of the audit");
    }
    let (_, pause) = BACK_OFF;
    let mut trouble = StoreError::Full.to_string();
    while rest(shared, pause) {
        shared.note_move();
        match open() {
            Ok(writer) => {
                info!("audit events are written: there is room again");
                return Some(writer);
            }
            Err(error) => {
                shared.errors.fetch_add(1, Ordering::Relaxed);
                let said = error.to_string();
                if said != trouble {
                    error!(
                        error = said,
                        "audit events cannot be written; they wait in memory"
                    );
                    trouble = said;
                }
            }
        }
    }
    None
}

/// Tries until it is done, or too often.
fn keep_up(files: &Files, retention: Duration, shared: &Shared) {
    let (mut pause, tries) = UPKEEP;
    let mut believed = false;
    if let Ok(Some((day, file))) = files.ahead(clock::wall()) {
        error!(
            %day,
            file = %file.display(),
            "the audit's newest file is of a day to come, and has all events until then: a clock was wrong. Set it right; then stop \
             every weir that writes here, move all files of the audit to another folder, and start again"
        );
    }
    for left in (0..tries).rev() {
        // Neither waits for the other to succeed. What is removed leaves room for the indexes.
        let removed = match believed {
            true => Ok(true),
            false => believe(files, retention, shared),
        };
        let removed = match removed {
            Ok(false) => return,
            Ok(true) => {
                believed = true;
                remove_old(files, retention, shared)
            }
            Err(error) => Err(error),
        };
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

/// Gives a clock that leapt some time to be set right, as NTP does after a start. Who was merely off for long waits in vain. False
/// if the process ends meanwhile.
fn believe(files: &Files, retention: Duration, shared: &Shared) -> Result<bool, StoreError> {
    let today = clock::wall();
    let Some(newest) = files.leap(retention, today)? else {
        return Ok(true);
    };
    error!(
        today = %Day::of(today),
        %newest,
        wait = ?DOUBT,
        "days of the audit are to be removed, and by the clock there was none for long: if it is wrong, set it right or stop weir \
         before the wait is over"
    );
    let start = clock::now();
    while start.elapsed() < DOUBT {
        if shared.ended.load(Ordering::Acquire) {
            return Ok(false);
        }
        thread::sleep(IDLE);
    }
    Ok(true)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_leapt_removes_nothing_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        let day = Duration::from_secs(86_400);
        let now = clock::wall();
        for ago in [800, 799, 0] {
            Writer::open(&path, "a", None, now - day * ago).unwrap();
        }
        let (_recorder, queue) = Queue::new(10, Delivery::BestEffort);
        // What waits for the clock sees it first.
        queue.shared.ended.store(true, Ordering::Release);
        keep_up(&Files::new(&path, None), day * 400, &queue.shared);
        assert_eq!(queue.shared.removed_files.load(Ordering::Relaxed), 0);
    }
}
