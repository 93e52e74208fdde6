//! The spool between processes: what one that is killed leaves is there for the next, and what one holds no other takes.
//!
//! The processes are this test binary again, told by [`FOLDER`] to be one.

use std::env;
use std::io::{BufRead, BufReader, Lines, Write as _, stdout};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use tempfile::TempDir;
use weir::clock;
use weir::store::spool::{Abandoned, Damage, Spool, SpoolError};

/// Where a process is to keep its spool.
const FOLDER: &str = "WEIR_TEST_SPOOL";
/// Records between two syncs; 0: never synced.
const GROUP: &str = "WEIR_TEST_GROUP";
const MAX: u64 = 64 << 20;
const SIGKILL: i32 = 9;

/// The `n`th record of a process: of 8 bytes to 20,000.
fn record(n: u64) -> Vec<u8> {
    let length = n.wrapping_mul(2_654_435_761) % 20_000;
    let mut record = vec![n as u8; 8 + usize::try_from(length).unwrap()];
    record[..8].copy_from_slice(&n.to_le_bytes());
    record
}

/// Appends, and says on standard output how many records are safe, until it is killed or can write no more. A part of the tests
/// below.
#[test]
fn a_process_that_appends() {
    let Some(folder) = env::var_os(FOLDER) else {
        return;
    };
    let group: u64 = env::var(GROUP).unwrap().parse().unwrap();
    let (mut spool, _) = Spool::open(folder.as_ref(), MAX, clock::uuid(clock::wall())).unwrap();
    say("0");
    let mut places = Vec::new();
    for n in 1.. {
        match spool.append(&record(n)) {
            Ok(place) => places.push(place),
            Err(SpoolError::Full(_)) => {
                // All but the newest, every second one first.
                let newest = places.pop();
                let numbered = places.drain(..).enumerate();
                let (even, odd): (Vec<_>, Vec<_>) = numbered.partition(|(at, _)| at % 2 == 0);
                for (_, place) in odd.into_iter().rev().chain(even) {
                    spool.release(place).unwrap();
                }
                places.extend(newest);
                places.push(spool.append(&record(n)).unwrap());
            }
            Err(error) => {
                // Less may fit.
                spool.append(b"less").unwrap();
                say(&format!("stopped: {error}"));
                return;
            }
        }
        if group > 0 && n.is_multiple_of(group) {
            spool.sync().unwrap();
        }
        if group == 0 || n.is_multiple_of(group) {
            say(&n.to_string());
        }
    }
}

fn say(line: &str) {
    let mut out = stdout().lock();
    writeln!(out, "\n> {line}").unwrap();
    out.flush().unwrap();
}

/// That process, ended when the test lets go of it.
struct Writer {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Writer {
    fn start(folder: &Path, group: u64) -> Writer {
        Writer::run(Command::new(env::current_exe().unwrap()), folder, group)
    }

    fn run(mut command: Command, folder: &Path, group: u64) -> Writer {
        let mut child = command
            .args(["--exact", "spool::a_process_that_appends", "--nocapture"])
            .env(FOLDER, folder)
            .env(GROUP, group.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut writer = Writer { child, lines };
        assert_eq!(writer.said().as_deref(), Some("0"));
        writer
    }

    /// What it says next; `None` at the end.
    fn said(&mut self) -> Option<String> {
        loop {
            let line = self.lines.next()?.unwrap();
            if let Some(said) = line.strip_prefix("> ") {
                return Some(said.to_owned());
            }
        }
    }

    /// Kills it at once, and gives the number of records that it said were safe.
    fn kill(mut self) -> u64 {
        self.child.kill().unwrap();
        let mut last = None;
        while let Some(said) = self.said() {
            last = Some(said);
        }
        assert_eq!(self.child.wait().unwrap().signal(), Some(SIGKILL));
        last.map_or(0, |last| last.parse().unwrap())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn heir(folder: &Path) -> (Spool, Vec<Abandoned>) {
    Spool::open(folder, MAX, clock::uuid(clock::wall())).unwrap()
}

/// Checks that the records are those of a writer, without a hole up to the last. Gives that one's number.
fn last(abandoned: &mut Abandoned) -> u64 {
    let mut last = None;
    while let Some((_, found)) = abandoned.next_record().unwrap() {
        let n = u64::from_le_bytes(found[..8].try_into().unwrap());
        assert!(last.is_none_or(|last| last + 1 == n), "{n} after {last:?}");
        assert_eq!(found, record(n));
        last = Some(n);
    }
    assert_eq!(abandoned.damage.stretches, 0);
    last.unwrap()
}

#[test]
fn what_a_killed_process_said_is_safe_is_there() {
    let root = TempDir::new().unwrap();
    // The last ones fill the spool and release most of it, more than once.
    for (group, until) in [(1, 3), (1, 300), (7, 500), (0, 1), (0, 2_000), (0, 20_000)] {
        let mut writer = Writer::start(root.path(), group);
        while let Some(said) = writer.said() {
            if said.parse::<u64>().unwrap() >= until {
                break;
            }
        }
        let safe = writer.kill().max(until);
        let (spool, mut abandoned) = heir(root.path());
        assert_eq!(abandoned.len(), 1);
        let mut left = abandoned.remove(0);
        let last = last(&mut left);
        assert!(last >= safe, "{last} of {safe} are left");
        left.remove().unwrap();
        spool.remove().unwrap();
    }
}

#[test]
fn no_process_adopts_what_a_live_one_holds() {
    let root = TempDir::new().unwrap();
    let mut one = Writer::start(root.path(), 1);
    let mut two = Writer::start(root.path(), 1);
    one.said().unwrap();
    two.said().unwrap();
    let (spool, abandoned) = heir(root.path());
    assert!(abandoned.is_empty());
    one.kill();
    let left = spool.adopt().unwrap();
    assert_eq!(left.len(), 1);
    two.kill();
    // What this process holds no other takes, but what it lets go of.
    let (_, theirs) = heir(root.path());
    assert_eq!(theirs.len(), 1);
    assert_ne!(theirs[0].boot, left[0].boot);
    drop(left);
    assert_eq!(spool.adopt().unwrap().len(), 1);
}

#[test]
fn processes_that_start_and_end_at_once_leave_nothing_behind() {
    let root = TempDir::new().unwrap();
    let adopted: usize = std::thread::scope(|scope| {
        let threads = (0..4).map(|_| {
            scope.spawn(|| {
                let adopted = (0..50).map(|n| {
                    let boot = clock::uuid(clock::wall());
                    let (mut spool, abandoned) = Spool::open(root.path(), MAX, boot).unwrap();
                    spool.append(b"one").unwrap();
                    if n % 2 == 0 {
                        spool.remove().unwrap();
                    }
                    let left = abandoned.into_iter().map(|mut left| {
                        assert_eq!(left.next_record().unwrap().unwrap().1, b"one");
                        left.remove().unwrap();
                    });
                    left.count()
                });
                adopted.sum::<usize>()
            })
        });
        let threads: Vec<_> = threads.collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    let (_, rest) = heir(root.path());
    assert_eq!(adopted + rest.len(), 100);
}

#[test]
fn a_file_that_may_not_grow_is_left_with_whole_records() {
    let root = TempDir::new().unwrap();
    let mut shell = Command::new("sh");
    // Half a record is written before the limit is met, as on a full disk.
    let script = r#"trap "" XFSZ; ulimit -f 128; exec "$0" "$@""#;
    shell.args(["-c", script]).arg(env::current_exe().unwrap());
    let mut writer = Writer::run(shell, root.path(), 0);
    let mut safe = 0;
    let stopped = loop {
        let said = writer.said().unwrap();
        match said.parse::<u64>() {
            Ok(n) => safe = n,
            Err(_) => break said,
        }
    };
    assert!(stopped.starts_with("stopped: cannot write "), "{stopped}");
    writer.child.wait().unwrap();
    let (_, mut abandoned) = heir(root.path());
    for n in 1..=safe {
        assert_eq!(abandoned[0].next_record().unwrap().unwrap().1, record(n));
    }
    assert_eq!(abandoned[0].next_record().unwrap().unwrap().1, b"less");
    assert!(abandoned[0].next_record().unwrap().is_none());
    assert_eq!(abandoned[0].damage, Damage::default());
}
