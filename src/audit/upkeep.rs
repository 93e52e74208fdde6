//! What becomes of SQLite's days beside the writing: those that are over are closed, and old ones removed, on a thread that tries until it
//! is done. Must not write events.

use std::mem::replace;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing::{error, info};

use super::{Shared, Troubles};
use crate::blocking;
use crate::clock;
use crate::policy::retry::Pauses;
use crate::store::audit::StoreError;
use crate::store::audit::days::Day;
use crate::store::sqlite::Files;

/// Between tries. What is in the way is told once the longest is reached: locks of others pass by then.
const PAUSES: Pauses = Pauses {
    first: Duration::from_secs(1),
    longest: Duration::from_secs(60),
};
/// How long a clock that leapt has to be set right before days are removed by it.
const DOUBT: Duration = Duration::from_secs(600);
/// Between looks at whether the process ends.
const LOOK: Duration = Duration::from_millis(500);

/// The upkeep that begins with each day.
pub(super) struct Daily {
    upkeep: Upkeep,
    /// The thread that does it, and what for.
    begun: Option<(Days, JoinHandle<()>)>,
    /// Whether the last try to begin it failed, which is told once: one comes with each batch.
    lacks_thread: bool,
}

/// The day of the file that is written to, and that of the clock.
type Days = (Option<Day>, Day);

/// The days of a path, and for how long they are kept.
#[derive(Clone)]
struct Upkeep {
    files: Files,
    retention: Duration,
    shared: Arc<Shared>,
}

impl Daily {
    pub(super) fn new(files: Files, retention: Duration, shared: &Arc<Shared>) -> Daily {
        let upkeep = Upkeep {
            files,
            retention,
            shared: shared.clone(),
        };
        Daily {
            upkeep,
            begun: None,
            lacks_thread: false,
        }
    }

    /// Begins the upkeep if the day is new, unless that of another day is still at it. On a thread of its own, since the index of a day of
    /// many events takes seconds, and those of the new day must be written meanwhile. `writing`: the day whose file is written to.
    pub(super) fn look(&mut self, writing: Option<Day>) {
        // A file of a day to come must not keep others from being closed and removed until then.
        let days = (writing, Day::of(clock::wall()));
        let is_begun = |(of, thread): &(Days, JoinHandle<()>)| *of == days || !thread.is_finished();
        if self.begun.as_ref().is_some_and(is_begun) {
            return;
        }
        let upkeep = self.upkeep.clone();
        // It need not end: the next one goes on from there.
        let thread = thread::Builder::new()
            .name("audit-upkeep".to_owned())
            .spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| upkeep.run(PAUSES))).is_err() {
                    upkeep.shared.note_panic();
                    let said = "days of the audit are neither closed nor removed: the thread for it has panicked; it is tried again with the next day";
                    upkeep.tell(|troubles| &mut troubles.upkeep, said.to_owned());
                }
            });
        let lacked = replace(&mut self.lacks_thread, thread.is_err());
        match thread.map_err(blocking::none) {
            Ok(thread) => self.begun = Some((days, thread)),
            Err(_) if lacked => {}
            Err(error) => {
                error!(%error, "days of the audit are not closed or removed; it is tried again");
            }
        }
    }
}

impl Upkeep {
    /// Tries until it is done, or the process ends.
    fn run(&self, pauses: Pauses) {
        let mut pause = pauses.first;
        let mut believed = None;
        loop {
            self.look_ahead();
            match self.keep_up(&mut believed) {
                Ok(false) => return,
                Ok(true) => {
                    if self.note(|troubles| &mut troubles.upkeep, None) {
                        info!("days of the audit are closed and removed again");
                    }
                    return;
                }
                Err(error) if pause == pauses.longest => {
                    let said = format!(
                        "days of the audit are neither closed nor removed: {error}; {}; it is tried again until then",
                        mend(&error)
                    );
                    self.tell(|troubles| &mut troubles.upkeep, said);
                }
                Err(_) => {}
            }
            if !self.wait(pause) {
                return;
            }
            pause = pauses.after(pause);
        }
    }

    /// One try; false if the process ends. `believed`: the day of a clock that is doubted no more.
    fn keep_up(&self, believed: &mut Option<Day>) -> Result<bool, StoreError> {
        // Neither waits for the other to succeed. What is removed leaves room for the indexes.
        let removed = match self.believe(believed) {
            Ok(false) => return Ok(false),
            Ok(true) => self.remove_old(),
            Err(error) => Err(error),
        };
        let closed = self.close_days();
        self.files.keep_reserve();
        removed.and(closed).map(|()| true)
    }

    /// Gives a clock that leapt some time to be set right, as NTP does after a start. Who was merely off for long waits in vain. False
    /// if the process ends meanwhile.
    fn believe(&self, believed: &mut Option<Day>) -> Result<bool, StoreError> {
        let today = Day::of(clock::wall());
        if *believed != Some(today)
            && let Some(newest) = self.files.leap(self.retention, clock::wall())?
        {
            self.tell(|troubles| &mut troubles.upkeep, format!(
                "days of the audit are to be removed, and by the clock, which says {today}, there was none since {newest}: if it is wrong, \
                 set it right or stop weir before {DOUBT:?} are over"
            ));
            if !self.wait(DOUBT) {
                return Ok(false);
            }
            self.note(|troubles| &mut troubles.upkeep, None);
        }
        *believed = Some(today);
        Ok(true)
    }

    fn remove_old(&self) -> Result<(), StoreError> {
        self.files.remove_old(self.retention, clock::wall(), |day| {
            self.shared.removed_files.fetch_add(1, Ordering::Relaxed);
            info!(%day, "day of the audit removed: it is older than the retention");
        })
    }

    fn close_days(&self) -> Result<(), StoreError> {
        let start = clock::now();
        self.files
            .close_days(|day| info!(%day, took = ?start.elapsed(), "day of the audit closed"))
    }

    /// Tells of a file that keeps others from being begun until its day comes.
    fn look_ahead(&self) {
        match self.files.ahead(clock::wall()) {
            Ok(None) => drop(self.note(|troubles| &mut troubles.ahead, None)),
            Ok(Some((day, file))) => self.tell(|troubles| &mut troubles.ahead, format!(
                "the audit's newest file, {}, is of a day to come, {day}, and has all events until then: a clock was wrong. Set it right; \
                 then stop every weir that writes here, move all files of the audit to another folder, and start again",
                file.display()
            )),
            // The upkeep meets it, too.
            Err(_) => {}
        }
    }

    /// Logs what is new, and keeps it for `/health`.
    fn tell(&self, of: impl Fn(&mut Troubles) -> &mut Option<String>, said: String) {
        if self.note(of, Some(said.clone())) {
            error!("{said}");
        }
    }

    /// Whether it is another word than before.
    fn note(
        &self,
        of: impl Fn(&mut Troubles) -> &mut Option<String>,
        said: Option<String>,
    ) -> bool {
        let mut troubles = self.shared.troubles.lock();
        let before = std::mem::replace(of(&mut troubles), said);
        before != *of(&mut troubles)
    }

    /// False if the process ends meanwhile.
    fn wait(&self, pause: Duration) -> bool {
        let start = clock::now();
        loop {
            if self.shared.ended.load(Ordering::Acquire) {
                return false;
            }
            let left = pause.saturating_sub(start.elapsed());
            if left.is_zero() {
                return true;
            }
            thread::sleep(left.min(LOOK));
        }
    }
}

/// What a human is to do.
pub(super) fn mend(error: &StoreError) -> &'static str {
    match error {
        StoreError::OfDay(_, error) => mend(error),
        StoreError::Full => "make room on the disk",
        StoreError::Locked => "end what holds the lock",
        StoreError::Version { .. }
        | StoreError::Undated
        | StoreError::Absent
        | StoreError::Key
        | StoreError::Changed
        | StoreError::Moved
        | StoreError::Elsewhere
        | StoreError::OutOfTime
        | StoreError::Folder(_)
        | StoreError::Damaged(_)
        | StoreError::Other(_) => {
            "let weir write to the folder and its files, and move a file away that is damaged"
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Queue;
    use super::*;
    use crate::config::audit::Delivery;
    use crate::store::audit::days;
    use crate::store::sqlite::Writer;

    const DAY: Duration = Duration::from_secs(86_400);
    const SOON: Duration = Duration::from_millis(1);

    fn up_to(longest: Duration) -> Pauses {
        let first = SOON;
        Pauses { first, longest }
    }

    /// With files of days so long ago.
    fn upkeep(ago: &[u32], retention: u32) -> (tempfile::TempDir, Upkeep, Queue) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        let now = clock::wall();
        for ago in ago {
            Writer::open(&path, "a", None, now - DAY * *ago).unwrap();
        }
        let (_, queue) = Queue::new(10, Delivery::BestEffort);
        let upkeep = Upkeep {
            files: Files::new(&path, None),
            retention: DAY * retention,
            shared: queue.shared.clone(),
        };
        (folder, upkeep, queue)
    }

    #[test]
    fn a_clock_that_leapt_removes_nothing_at_once() {
        let (_folder, upkeep, queue) = upkeep(&[800, 799, 0], 400);
        // What waits for the clock sees it first.
        queue.shared.ended.store(true, Ordering::Release);
        upkeep.run(PAUSES);
        assert_eq!(queue.shared.removed_files.load(Ordering::Relaxed), 0);
        let said = queue.shared.troubles.lock().upkeep.clone().unwrap();
        assert!(said.contains("set it right or stop weir"), "{said}");
    }

    #[test]
    fn what_fails_is_tried_again_until_it_is_mended() {
        let (folder, upkeep, queue) = upkeep(&[3, 2, 1, 0], 2);
        let path = folder.path().join("a.db");
        let today = clock::wall();
        let oldest = days::file(&path, Day::of(today - DAY * 3));
        let whole = fs::read(&oldest).unwrap();
        // At once, or it would be gone for a moment.
        let put = |bytes: &[u8]| {
            let aside = folder.path().join("aside");
            fs::write(&aside, bytes).unwrap();
            fs::rename(&aside, &oldest).unwrap();
        };
        // Of a later weir, by SQLite's `user_version`.
        let put_version = |version: u8| {
            let mut bytes = whole.clone();
            bytes[60..64].copy_from_slice(&[0, 0, 0, version]);
            put(&bytes);
        };
        let shared = queue.shared.clone();
        let trouble = || shared.troubles.lock().upkeep.clone();
        let told = |part: &str| {
            let start = clock::now();
            while !trouble().is_some_and(|said| said.contains(part)) {
                if start.elapsed() > Duration::from_secs(60) {
                    shared.ended.store(true, Ordering::Release);
                    panic!("{part:?} is not in {:?}", trouble());
                }
                thread::sleep(SOON);
            }
        };
        put_version(100);
        thread::scope(|scope| {
            scope.spawn(|| upkeep.run(up_to(SOON * 8)));
            // Each is told of by another try.
            for version in 100..112 {
                put_version(version);
                told(&format!("its version is {version}"));
            }
            told(&Day::of(today - DAY * 3).to_string());
            told("move a file away that is damaged");
            put(&whole);
        });
        assert_eq!(trouble(), None);
        assert_eq!(shared.removed_files.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn what_may_pass_by_itself_is_not_told() {
        let (folder, upkeep, queue) = upkeep(&[3, 0], 2);
        let day = Day::of(clock::wall() - DAY * 3);
        let oldest = days::file(&folder.path().join("a.db"), day);
        fs::write(&oldest, "damaged").unwrap();
        // It ends behind its first try.
        queue.shared.ended.store(true, Ordering::Release);
        let told = || queue.shared.troubles.lock().upkeep.is_some();
        upkeep.run(PAUSES);
        assert!(!told());
        upkeep.run(up_to(SOON));
        assert!(told());
    }

    #[test]
    fn a_file_of_a_day_to_come_is_told_until_that_is_over() {
        let (folder, upkeep, queue) = upkeep(&[1, 0], 400);
        let path = folder.path().join("a.db");
        let later = clock::wall() + DAY * 9;
        Writer::open(&path, "a", None, later).unwrap();
        upkeep.run(up_to(SOON));
        let said = queue.shared.troubles.lock().ahead.clone().unwrap();
        let file = days::file(&path, Day::of(later));
        assert!(said.contains(&file.display().to_string()), "{said}");
        fs::remove_file(file).unwrap();
        upkeep.run(up_to(SOON));
        assert_eq!(*queue.shared.troubles.lock(), Troubles::default());
    }
}
