//! What the machine leaves to the process: memory and disk. Owns how they are judged, and how disks are read.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::sync::Semaphore;

use super::check::{Check, Finding, Status};
use crate::blocking;
use crate::clock;
use crate::memory;
use crate::telemetry::metrics::process::Used;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Degraded from 90 % of what the control group allows on; the kernel ends the process at all of it.
pub fn memory() -> Check {
    on_a_thread("memory", || {
        memory_found(memory::resident_bytes(), memory::limit_bytes())
    })
}

/// Of the file system that holds these files, which are to be written: `paths` are named as the process has them.
pub fn disk(paths: Vec<PathBuf>) -> Check {
    on_a_thread("disk", move || disks_found(&paths))
}

/// A check whose look may block: a mount whose server is gone keeps its callers, and their threads, of which there are so many. So one look
/// is under way at a time, be it given up or not.
fn on_a_thread(name: &str, look: impl Fn() -> Finding + Send + Sync + 'static) -> Check {
    let (look, turn) = (Arc::new(look), Arc::new(Semaphore::new(1)));
    Check::new(name, Status::Degraded, move || {
        let (look, turn) = (look.clone(), turn.clone().try_acquire_owned());
        async move {
            let Ok(turn) = turn else {
                return Finding::error(Status::Degraded, "the last look hangs still");
            };
            let looked = blocking::done(move || {
                let _turn = turn;
                look()
            });
            let looked = looked.await;
            looked.unwrap_or_else(|error| Finding::error(Status::Degraded, error))
        }
    })
}

/// How much the file system has left that holds this path. Who asks is told what was seen last, and has it looked at anew meanwhile: a mount
/// whose server is gone keeps its callers.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    seen: Arc<Seen>,
    /// Of looks, of which one is under way at a time.
    turn: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Seen {
    free: AtomicU64,
    total: AtomicU64,
}

impl Disk {
    pub fn new(path: PathBuf) -> Disk {
        let (seen, turn) = (Arc::default(), Arc::new(Semaphore::new(1)));
        Disk { path, seen, turn }
    }

    /// Bytes that are free, and all; none before the first look has ended.
    pub(in crate::admin) fn space(&self) -> (u64, u64) {
        let (seen, relaxed) = (self.seen.clone(), Ordering::Relaxed);
        let told = (seen.free.load(relaxed), seen.total.load(relaxed));
        if let Ok(turn) = self.turn.clone().try_acquire_owned() {
            let path = self.path.clone();
            // Where there is no thread for it, the next scrape tries again.
            let _ = blocking::hand_on(move || {
                let _turn = turn;
                if let Ok((free, total)) = space(&path) {
                    seen.free.store(free, relaxed);
                    seen.total.store(total, relaxed);
                }
            });
        }
        told
    }
}

fn memory_found(resident: Option<u64>, limit: Option<u64>) -> Finding {
    let tight = |(resident, limit): (u64, u64)| resident >= limit / 10 * 9;
    let is_tight = resident.zip(limit).is_some_and(tight);
    Finding::new(
        Status::Degraded.when(is_tight),
        json!({ "resident_bytes": resident, "limit_bytes": limit }),
    )
}

fn disks_found(paths: &[PathBuf]) -> Finding {
    let mut worst = Status::Ok;
    let mut disks = Vec::new();
    for path in paths {
        let (status, details) = match space(path) {
            Ok((free, total)) => (
                judged(free, total),
                json!({ "path": path, "free_bytes": free, "total_bytes": total }),
            ),
            Err(error) => (
                Status::Degraded,
                json!({ "path": path, "error": error.to_string() }),
            ),
        };
        worst = worst.max(status);
        disks.push(details);
    }
    Finding::new(worst, json!({ "disks": disks }))
}

/// Shares alone say little of a large disk, and bytes alone of a small one.
fn judged(free: u64, total: u64) -> Status {
    let share = |percent: u64| total / 100 * percent;
    if free < share(2) && free < GIB || free < 16 * MIB {
        Status::Critical
    } else if free < share(10) && free < 10 * GIB || free < GIB.min(total / 2) {
        Status::Degraded
    } else {
        Status::Ok
    }
}

/// Bytes that the process may still write where the path leads, and all that there are. What is not made yet is looked at where it
/// will be.
fn space(path: &Path) -> rustix::io::Result<(u64, u64)> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = path.ancestors().find(|path| path.exists());
    let disk = rustix::fs::statvfs(there.unwrap_or(Path::new("/")))?;
    Ok((
        disk.f_bavail.saturating_mul(disk.f_frsize),
        disk.f_blocks.saturating_mul(disk.f_frsize),
    ))
}

/// What the kernel tells of the process; what it does not tell is nothing.
pub(in crate::admin) fn used(uptime: Duration) -> Used {
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    Used {
        cpu: clock::process_cpu(),
        resident_bytes: memory::resident_bytes().unwrap_or_default(),
        memory_limit_bytes: memory::limit_bytes(),
        open_files: open as u64,
        // Without a bound there is as much as the kernel can count.
        max_files: most.unwrap_or(u64::MAX),
        started: clock::wall().saturating_sub(uptime),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use parking_lot::Mutex;
    use tokio::time::{sleep, timeout};

    use super::*;

    /// Else a mount that hangs would take one thread after another, until there is none for what else blocks.
    #[tokio::test]
    async fn a_look_that_hangs_keeps_one_thread() {
        let (free, hangs) = mpsc::channel::<()>();
        let (hangs, begun) = (Mutex::new(hangs), Arc::new(AtomicUsize::new(0)));
        let noted = begun.clone();
        let check = on_a_thread("disk", move || {
            noted.fetch_add(1, Ordering::Relaxed);
            // Until it is free.
            let _ = hangs.lock().recv();
            Finding::new(Status::Ok, json!({}))
        });
        for _ in 0..3 {
            let look = tokio::spawn((check.look)());
            let abort = look.abort_handle();
            while begun.load(Ordering::Relaxed) == 0 {
                sleep(Duration::from_millis(1)).await;
            }
            let within = Duration::from_millis(50);
            let found = timeout(within, look).await.map(Result::unwrap);
            assert!(found.is_err() || found.unwrap()[0].status == Status::Degraded);
            abort.abort();
        }
        assert_eq!(begun.load(Ordering::Relaxed), 1);
        drop(free);
        while (check.look)().await[0].status != Status::Ok {
            sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn memory_is_tight_near_its_limit() {
        for (resident, limit, expected) in [
            (Some(89), Some(100), Status::Ok),
            (Some(90), Some(100), Status::Degraded),
            (Some(90), None, Status::Ok),
            (None, Some(100), Status::Ok),
        ] {
            assert_eq!(memory_found(resident, limit).status, expected);
        }
    }

    #[test]
    fn a_disk_is_judged_by_share_and_by_bytes() {
        for (free, total, expected) in [
            (26 * GIB, 252 * GIB, Status::Ok),
            (11 * GIB, 252 * GIB, Status::Ok),
            (3 * GIB, 252 * GIB, Status::Degraded),
            (GIB - 1, 252 * GIB, Status::Critical),
            (GIB - 1, 4 * GIB, Status::Degraded),
            (15 * MIB, 20 * MIB, Status::Critical),
            (60 * MIB, 100 * MIB, Status::Ok),
            (9 * MIB * 100, 100 * GIB, Status::Critical),
        ] {
            assert_eq!(judged(free, total), expected, "{free} of {total}");
        }
    }

    #[test]
    fn a_path_that_is_not_there_yet_is_looked_at_where_it_will_be() {
        let folder = tempfile::tempdir().unwrap();
        let (_, total) = space(folder.path()).unwrap();
        let (_, same) = space(&folder.path().join("not/there.db")).unwrap();
        assert!(total > 0 && total == same);
        assert!(space(Path::new("weir-audit.db")).unwrap().1 > 0);
    }
}
