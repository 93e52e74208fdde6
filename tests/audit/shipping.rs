//! The proxy's end of the audit, on a real Redis: batches reach the streams and are held until they are committed, whatever happens
//! to Redis and the spool meanwhile. The worker's part is played by the test: it says what is committed.
//!
//! Where a process is to be starved it is this test binary again, told by [`REDIS`] to be one.

use super::harness;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Lines, Write as _, stdin, stdout};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;
use std::{env, fs};

use super::harness::redis::{Server, key_prefix};
use super::harness::shipping::{
    Process, SHARDS, WITHIN, With, batches, commit, event, is_safe, is_settled, numbers,
    say_committed, seqs,
};
use super::harness::{eventually, eventually_within};
use uuid::Uuid;
use weir::clock;
use weir::event::{Encoded, Micros};
use weir::keys::Keys;
use weir::store::audit::batch::{Boot, Header};
use weir::store::audit::chain::Hasher;
use weir::store::spool::{Spool, SpoolError};

/// Entries that a stream may hold where it is to be full.
const STREAM: u64 = 100;
/// What a process of its own is to say in its configuration of Redis, and where it is to keep its spool.
const REDIS: &str = "WEIR_TEST_SHIPS_TO";
const PREFIX: &str = "WEIR_TEST_PREFIX";
const FOLDER: &str = "WEIR_TEST_SPOOL";

#[test]
fn batches_are_spread_over_the_streams_and_let_go_once_committed() {
    let (server, prefix) = (Server::single(), key_prefix());
    let mut process = Process::start(&server, &With::best_effort(&prefix));
    for _ in 0..20 {
        process.record(10);
    }
    eventually(|| process.seqs(&server) == numbers(200));
    let streams = process
        .batches(&server)
        .into_values()
        .map(|(_, shard)| shard);
    let streams = streams.collect::<BTreeSet<_>>();
    assert_eq!(streams.len(), usize::from(SHARDS), "{streams:?}");
    let counts = process.recorder.counts();
    assert_eq!(
        (counts.written, counts.queued, counts.underway),
        (0, 0, 200)
    );
    process.commit(&server);
    eventually(|| process.recorder.counts().written == 200);
    let counts = process.stop();
    assert_eq!((counts.dropped, counts.underway, counts.resent), (0, 0, 0));
    // The end mark says that no event is missing behind the last.
    let left = process
        .batches(&server)
        .into_values()
        .map(|(batch, _)| batch.header);
    let left: Vec<_> = left.map(|end| (end.first, end.count, end.is_end)).collect();
    assert_eq!(left, [(201, 0, true)]);
}

#[test]
fn the_end_mark_says_how_many_events_were_dropped() {
    let (server, prefix) = (Server::single(), key_prefix());
    let mut process = Process::start(&server, &With::best_effort(&prefix));
    // The queue takes a thousand.
    process.record(1_007);
    eventually(|| process.seqs(&server) == numbers(1_000));
    process.commit(&server);
    eventually(|| process.recorder.counts().written == 1_000);
    assert_eq!(process.stop().dropped, 7);
    let left = process.batches(&server).into_values();
    let left = left.map(|(batch, _)| (batch.header.is_end, batch.header.dropped));
    assert_eq!(left.collect::<Vec<_>>(), [(true, 7)]);
}

/// Whatever the number of their events.
#[test]
fn batches_of_large_events_are_bounded_by_their_bytes() {
    let (server, prefix) = (Server::single(), key_prefix());
    let process = Process::start(&server, &With::best_effort(&prefix));
    let events: Vec<_> = (0..20).map(|_| large()).collect();
    for event in events {
        process.recorder.record(event);
    }
    eventually(|| process.seqs(&server) == numbers(20));
    let batches = process.batches(&server);
    let each = batches.values().map(|(batch, _)| batch);
    assert!(each.clone().all(|batch| batch.size() <= 1 << 20));
    // Three of a quarter of it, and no fourth with what stands beside its path.
    let most = each.map(|batch| batch.header.count).max();
    assert_eq!(most, Some(3));
}

#[test]
fn what_redis_loses_is_sent_again() {
    let (server, prefix) = (Server::single(), key_prefix());
    let process = Process::start(&server, &With::best_effort(&prefix));
    process.record(30);
    eventually(|| process.seqs(&server) == numbers(30));
    server.cli(&["FLUSHALL"]);
    eventually(|| process.seqs(&server) == numbers(30));
    assert!(process.recorder.counts().resent > 0);
    // As a worker that stored it, and was killed before it could say so.
    server.kill();
    server.restart();
    process.record(5);
    eventually_within(4 * harness::DEADLINE, || {
        process.seqs(&server) == numbers(35)
    });
}

#[test]
fn while_redis_is_away_events_wait_and_none_is_lost() {
    let (server, prefix) = (Server::single(), key_prefix());
    let mut process = Process::start(&server, &With::best_effort(&prefix));
    process.record(1);
    eventually(|| process.seqs(&server) == numbers(1));
    server.kill();
    for _ in 0..90 {
        process.record(10);
    }
    eventually(|| process.recorder.counts().underway == 901);
    server.restart();
    eventually_within(4 * harness::DEADLINE, || {
        process.seqs(&server) == numbers(901)
    });
    assert_eq!(process.stop().dropped, 0);
}

#[test]
fn a_stream_that_is_full_is_given_no_more() {
    let (server, prefix) = (Server::single(), key_prefix());
    let with = With {
        max_length: 2,
        ..With::best_effort(&prefix)
    };
    let process = Process::start(&server, &with);
    for _ in 0..20 {
        process.record(10);
    }
    eventually(|| process.batches(&server).len() == 8);
    eventually(|| process.recorder.counts().errors > 4);
    assert_eq!(process.batches(&server).len(), 8);
    let mut stored = Vec::new();
    eventually_within(4 * harness::DEADLINE, || {
        stored.extend(process.commit(&server));
        process.recorder.counts().written == 200
    });
    stored.sort_unstable();
    stored.dedup();
    assert_eq!(stored, numbers(200));
}

#[test]
fn with_best_effort_the_end_spools_what_redis_does_not_take() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let with = With {
        spool: Some((folder.path(), 1 << 24)),
        ..With::best_effort(&prefix)
    };
    let mut process = Process::start(&server, &with);
    server.kill();
    process.record(25);
    let counts = process.stop();
    assert_eq!((counts.dropped, counts.underway), (0, 25));
    server.restart();
    let next = Process::start(&server, &with);
    eventually(|| process.seqs(&server) == numbers(25));
    eventually(|| {
        let batches = next.batches(&server).into_values();
        batches
            .map(|(batch, _)| batch)
            .any(|batch| batch.header.is_end)
    });
}

#[test]
fn with_best_effort_what_memory_has_no_room_for_goes_to_the_spool() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let with = With {
        spool: Some((folder.path(), 1 << 24)),
        memory: 4_000,
        ..With::best_effort(&prefix)
    };
    let process = Process::start(&server, &with);
    server.kill();
    for _ in 0..100 {
        process.record(10);
    }
    eventually(|| process.recorder.counts().underway == 1_000);
    eventually(|| process.recorder.counts().spool.unwrap().batches > 80);
    server.restart();
    eventually_within(4 * harness::DEADLINE, || {
        process.seqs(&server) == numbers(1_000)
    });
    process.commit(&server);
    eventually(|| process.recorder.counts().written == 1_000);
    process.record(1);
    eventually(|| process.recorder.counts().spool.unwrap().batches == 0);
    assert_eq!(process.recorder.counts().dropped, 0);
}

#[test]
fn guaranteed_events_are_safe_without_redis_and_are_adopted() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let with = With::guaranteed(&prefix, folder.path(), 1 << 24);
    let mut process = Process::start(&server, &with);
    server.kill();
    let receipts = process.record_awaited(25);
    assert!(is_safe(&receipts));
    let batches = 1..=receipts.len() as u64;
    eventually(|| batches.contains(&process.recorder.counts().spool.unwrap().batches));
    // It gives up sending at the end of its time.
    process.worker.take().unwrap().stop(Duration::ZERO);
    server.restart();
    let mut heir = Process::start(&server, &with);
    eventually(|| process.seqs(&server) == numbers(25));
    eventually(|| {
        process
            .batches(&server)
            .values()
            .any(|(batch, _)| batch.header.is_end)
    });
    assert!(is_safe(&heir.record_awaited(1)));
    // What is committed leaves the disk.
    let boots = || {
        let entries = fs::read_dir(folder.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| Uuid::parse_str(name).is_ok()).count()
    };
    assert_eq!(boots(), 2);
    eventually(|| {
        heir.commit(&server);
        boots() == 1
    });
    let stopping = heir.worker.take().unwrap();
    thread::scope(|scope| {
        let stop = scope.spawn(|| stopping.stop(WITHIN));
        eventually(|| {
            commit(&server, &prefix, &heir.keys);
            stop.is_finished()
        });
    });
    assert_eq!(boots(), 0);
}

/// Moved as it is, or copied, as `mv` from disk to disk does.
#[test]
fn what_a_spool_has_that_is_away_is_sent_once_it_is_back_and_holds_up_no_other() {
    for is_copied in [false, true] {
        let (server, prefix) = (Server::single(), key_prefix());
        let folder = tempfile::tempdir().unwrap();
        let with = With {
            memory: 4_000,
            ..With::guaranteed(&prefix, folder.path(), 1 << 24)
        };
        let process = Process::start(&server, &with);
        server.kill();
        for _ in 0..100 {
            process.record(10);
        }
        let counts = || process.recorder.counts();
        eventually(|| counts().spool.unwrap().batches == 100);
        let [spool, elsewhere] =
            [process.boot.to_string(), "away".to_owned()].map(|name| folder.path().join(name));
        let segment = spool.join("00000001.seg");
        let bytes = fs::read(&segment).unwrap();
        fs::rename(&spool, &elsewhere).unwrap();
        if is_copied {
            fs::remove_dir_all(&elsewhere).unwrap();
            fs::create_dir(&spool).unwrap();
            fs::write(spool.join("lock"), b"").unwrap();
            fs::write(&segment, &bytes[..bytes.len() / 4]).unwrap();
        }
        server.restart();
        // What memory has gets there.
        eventually_within(4 * harness::DEADLINE, || !process.seqs(&server).is_empty());
        // Redis takes all now: it is the spool that is tried again.
        let before = counts().errors;
        eventually(|| counts().errors > before);
        assert!(process.seqs(&server).len() < 1_000);
        assert_eq!((counts().dropped, counts().underway), (0, 1_000));
        match is_copied {
            true => fs::write(&segment, &bytes).unwrap(),
            false => fs::rename(&elsewhere, &spool).unwrap(),
        }
        eventually_within(4 * harness::DEADLINE, || {
            process.seqs(&server) == numbers(1_000)
        });
        assert_eq!(counts().dropped, 0);
    }
}

#[test]
fn what_a_removed_segment_had_is_written_again_while_memory_has_it() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let with = With::guaranteed(&prefix, folder.path(), 1 << 24);
    let mut process = Process::start(&server, &with);
    server.kill();
    assert!(is_safe(&process.record_awaited(1)));
    let spool = folder.path().join(process.boot.to_string());
    fs::remove_file(spool.join("00000001.seg")).unwrap();
    assert!(is_safe(&process.record_awaited(1)));
    process.stop();
    let (_, mut left) = Spool::open(folder.path(), 1 << 24, Uuid::nil()).unwrap();
    let left = std::iter::from_fn(|| left[0].next_record().unwrap());
    // And the end mark.
    assert_eq!(left.count(), 3);
}

#[test]
fn who_takes_over_a_spool_that_was_away_is_not_told_that_it_is_complete() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let with = With::guaranteed(&prefix, folder.path(), 1 << 24);
    let process = Process::start(&server, &with);
    let [spool, elsewhere] =
        [process.boot.to_string(), "away".to_owned()].map(|name| folder.path().join(name));
    assert!(spool.join("complete").exists());
    fs::rename(&spool, &elsewhere).unwrap();
    // Redis has it.
    assert!(is_safe(&process.record_awaited(1)));
    eventually(|| !process.recorder.counts().spool.unwrap().takes);
    fs::rename(&elsewhere, &spool).unwrap();
    eventually(|| !spool.join("complete").exists());
    process.record(1);
    eventually(|| process.recorder.counts().spool.unwrap().takes);
}

#[test]
fn what_is_written_where_a_spool_was_removed_is_not_safe_but_by_redis() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let with = With::guaranteed(&prefix, folder.path(), 1 << 24);
    let process = Process::start(&server, &with);
    assert!(is_safe(&process.record_awaited(1)));
    server.kill();
    assert!(is_safe(&process.record_awaited(1)));
    fs::remove_dir_all(folder.path().join(process.boot.to_string())).unwrap();
    let receipts = process.record_awaited(1);
    eventually(|| process.recorder.refuses());
    assert!(!process.recorder.counts().spool.unwrap().takes);
    assert!(!receipts.iter().any(is_settled));
    server.restart();
    assert!(is_safe(&receipts));
    eventually(|| process.seqs(&server) == numbers(3));
}

#[test]
fn what_the_disk_does_not_sync_is_safe_once_redis_has_it() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let with = With::guaranteed(&prefix, folder.path(), 1 << 24);
    let process = Process::start(&server, &with);
    server.kill();
    // It takes whatever is written, and syncs nothing.
    let spool = folder.path().join(process.boot.to_string());
    symlink("/dev/null", spool.join("00000001.seg")).unwrap();
    let is_complete = || spool.join("complete").exists();
    assert!(is_complete());
    let receipts = process.record_awaited(25);
    eventually(|| process.recorder.refuses());
    assert!(!receipts.iter().any(is_settled));
    let counts = process.recorder.counts().spool.unwrap();
    assert!(!counts.takes, "{counts:?}");
    // Who takes it over must not end the boot by it.
    assert!(!is_complete());
    server.restart();
    assert!(is_safe(&receipts));
    assert_eq!(process.seqs(&server), numbers(25));
    eventually(|| !process.recorder.refuses());
}

#[test]
fn a_full_spool_refuses_until_events_are_committed() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let with = With {
        max_length: 1_000_000,
        ..With::guaranteed(&prefix, folder.path(), 4 << 20)
    };
    let process = Process::start(&server, &with);
    let mut sent = 0;
    eventually_within(6 * harness::DEADLINE, || {
        sent += 900;
        assert!(is_safe(&process.record_awaited(900)), "after {sent}");
        process.recorder.refuses()
    });
    let spool = process.recorder.counts().spool.unwrap();
    assert!(!spool.takes && spool.bytes <= spool.max, "{spool:?}");
    // Nothing is written, so no write fails.
    let mut steady = (0, clock::now());
    eventually(|| {
        let errors = process.recorder.counts().errors;
        if errors != steady.0 {
            steady = (errors, clock::now());
        }
        steady.1.elapsed() > Duration::from_millis(500)
    });
    assert!(process.recorder.refuses());
    eventually(|| !process.recorder.counts().spool.unwrap().age.is_zero());
    eventually_within(6 * harness::DEADLINE, || {
        process.commit(&server);
        !process.recorder.refuses()
    });
    assert!(is_safe(&process.record_awaited(1)));
    assert_eq!(process.recorder.counts().dropped, 0);
}

#[test]
fn what_a_killed_process_left_is_in_redis_at_the_end_though_no_worker_stores_it() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    let max = 24 << 20;
    let (dead, last) = left_behind(folder.path(), max);
    let with = With::guaranteed(&prefix, folder.path(), max);
    let mut process = Process::start(&server, &with);
    process.stop();
    let sent = process.batches(&server);
    assert!((1..=last).all(|first| sent.contains_key(&(dead, first))));
    // For the next start, unless a worker is known to have stored it.
    assert!(folder.path().join(dead.to_string()).exists());
}

/// An event of 256 KiB that does not compress.
fn large() -> Encoded {
    let path: String = (0..256 << 10).map(|_| fastrand::alphanumeric()).collect();
    let mut encoded = Encoded::default();
    encoded.push(&event(&path));
    encoded
}

/// Fills a spool with large events as a process that is killed then, a batch each; its boot, and how many they are.
fn left_behind(folder: &Path, max: u64) -> (Uuid, u64) {
    let (id, hasher) = (clock::uuid(clock::wall()), Hasher::new(Some(b"k")));
    let mut boot = Boot::new("dead".to_owned(), id, Micros(7), hasher);
    let (mut spool, _) = Spool::open(folder, max, id).unwrap();
    spool.vouch().unwrap();
    for count in 0.. {
        let (_, bytes) = boot.pack(&mut [large()], Micros(9), 0);
        match spool.append(&bytes) {
            Ok(_) => {}
            Err(SpoolError::Full(_)) => {
                spool.sync().unwrap();
                return (id, count);
            }
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!("every spool is full at some time");
}

#[test]
fn what_a_killed_process_left_makes_room_as_it_is_stored() {
    let (server, prefix) = (Server::single(), key_prefix());
    let folder = tempfile::tempdir().unwrap();
    // Three times what is sent of it at once.
    let max = 24 << 20;
    let (dead, last) = left_behind(folder.path(), max);
    let with = With::guaranteed(&prefix, folder.path(), max);
    let process = Process::start(&server, &with);
    process.recorder.record(large());
    eventually(|| process.recorder.refuses());
    let commit_to = |number: u64| {
        let these = |header: &Header| header.boot == dead.into_bytes() && header.first <= number;
        say_committed(&server, &prefix, &process.keys, these);
    };
    let segments = || {
        let files = fs::read_dir(folder.path().join(dead.to_string())).unwrap();
        let sizes = files.map(|file| file.unwrap().metadata().unwrap().len());
        sizes.filter(|size| *size > 0).count()
    };
    let before = segments();
    // While there is more to read of it.
    eventually_within(2 * harness::DEADLINE, || {
        commit_to(last / 4);
        !process.recorder.refuses()
    });
    assert!(segments() < before && is_safe(&process.record_awaited(1)));
    // And once the rest is under way.
    eventually_within(6 * harness::DEADLINE, || {
        commit_to(last - 25);
        process.batches(&server).contains_key(&(dead, last))
    });
    assert!(segments() > 2);
    eventually(|| {
        commit_to(last - 1);
        segments() == 1
    });
    eventually(|| {
        commit_to(last + 1);
        !folder.path().join(dead.to_string()).exists()
    });
    assert_eq!(process.recorder.counts().dropped, 0);
}

#[test]
fn a_boot_whose_last_record_is_damaged_stays_without_an_end_mark() {
    #[derive(PartialEq)]
    enum Damaged {
        Nothing,
        First,
        Last,
    }
    let (server, prefix) = (Server::single(), key_prefix());
    for damaged in [Damaged::Nothing, Damaged::First, Damaged::Last] {
        let folder = tempfile::tempdir().unwrap();
        let (dead, last) = left_behind(folder.path(), 4 << 20);
        let boot = folder.path().join(dead.to_string());
        let files = fs::read_dir(&boot)
            .unwrap()
            .map(|file| file.unwrap().path());
        let segments = files.filter(|it| it.extension().is_some_and(|it| it == "seg"));
        let segments: BTreeSet<_> = segments.collect();
        let flip = |segment: Option<&PathBuf>, at: fn(usize) -> usize| {
            let mut bytes = fs::read(segment.unwrap()).unwrap();
            let at = at(bytes.len());
            bytes[at] ^= 1;
            fs::write(segment.unwrap(), bytes).unwrap();
        };
        match damaged {
            Damaged::Nothing => {}
            Damaged::First => flip(segments.first(), |_| 1_000),
            Damaged::Last => flip(segments.last(), |length| length - 1),
        }
        let with = With {
            spool: Some((folder.path(), 16 << 20)),
            ..With::best_effort(&prefix)
        };
        let process = Process::start(&server, &with);
        let mut seen = Vec::new();
        eventually_within(2 * harness::DEADLINE, || {
            let all = batches(&server, &prefix).into_values();
            let headers = all.map(|(batch, _)| batch.header);
            let of_dead = headers.filter(|header| header.boot == dead.into_bytes());
            seen.extend(of_dead.map(|header| (header.first, header.is_end)));
            let these = |header: &Header| header.boot == dead.into_bytes();
            say_committed(&server, &prefix, &process.keys, these);
            !boot.exists()
        });
        let has = |batch| seen.contains(&batch);
        let is_whole = damaged != Damaged::Last;
        assert_eq!(
            (has((last, false)), has((last + 1, true))),
            (is_whole, is_whole)
        );
        assert!(!seen.iter().any(|(_, is_end)| !is_whole && *is_end));
        assert!(has((last - 1, false)));
        // The last may only be cut short, as by a machine that stopped.
        let is_there = damaged != Damaged::First;
        let spool = process.recorder.counts().spool.unwrap();
        assert_eq!(
            (has((1, false)), spool.corrupt),
            (is_there, u64::from(!is_there))
        );
    }
}

/// Ships as many events as it is told to on standard input, and says what became of all. A part of the test below.
#[test]
fn a_process_that_ships() {
    let Ok(redis) = env::var(REDIS) else {
        return;
    };
    let (prefix, folder) = (env::var(PREFIX).unwrap(), env::var_os(FOLDER).unwrap());
    let with = With {
        max_length: STREAM,
        memory: 4_000,
        ..With::guaranteed(&prefix, folder.as_ref(), 1 << 24)
    };
    let process = Process::begin(&redis, &with);
    for line in stdin().lines() {
        for _ in 0..line.unwrap().parse().unwrap() {
            process.record(10);
        }
        let counts = process.recorder.counts();
        let spooled = counts.spool.unwrap().batches;
        let numbers = [counts.underway, spooled, counts.errors, counts.dropped];
        let mut out = stdout().lock();
        writeln!(out, "\n> {} {numbers:?}", process.boot).unwrap();
        out.flush().unwrap();
    }
}

/// That process, ended when the test lets go of it.
struct Shipper {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

/// What it says of itself.
struct Said {
    boot: Uuid,
    underway: u64,
    spooled: u64,
    errors: u64,
    dropped: u64,
}

impl Shipper {
    fn start(server: &Server, prefix: &str, folder: &Path) -> Shipper {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "shipping::a_process_that_ships", "--nocapture"])
            .env(REDIS, server.yaml(prefix))
            .env(PREFIX, prefix)
            .env(FOLDER, folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Shipper { child, lines }
    }

    /// Has it make so many batches.
    fn ship(&mut self, batches: u32) -> Said {
        writeln!(self.child.stdin.as_mut().unwrap(), "{batches}").unwrap();
        loop {
            let line = self.lines.next().unwrap().unwrap();
            let Some((boot, numbers)) = line.strip_prefix("> ").and_then(|it| it.split_once(' '))
            else {
                continue;
            };
            let [underway, spooled, errors, dropped] = serde_json::from_str(numbers).unwrap();
            return Said {
                boot: boot.parse().unwrap(),
                underway,
                spooled,
                errors,
                dropped,
            };
        }
    }

    fn said(&mut self) -> Said {
        self.ship(0)
    }

    /// How many descriptors it may have; those that it has stay.
    fn may_open(&self, descriptors: &str) {
        let status = Command::new("prlimit")
            .arg(format!("--pid={}", self.child.id()))
            .arg(format!("--nofile={descriptors}:"))
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Shipper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_cannot_be_read_back_for_want_of_descriptors_is_read_later() {
    let (server, prefix) = (Server::single(), key_prefix());
    let keys = Keys::new(&prefix);
    let streams = (0..SHARDS).map(|shard| keys.audit_stream("audit", shard));
    let streams: Vec<_> = streams.collect();
    // Full: nothing is taken.
    let fill = format!("for _ = 1, {STREAM} do redis.call('XADD', KEYS[1], '*', 'b', '') end");
    for stream in &streams {
        server.cli(&["EVAL", &fill, "1", stream]);
    }
    let folder = tempfile::tempdir().unwrap();
    let mut shipper = Shipper::start(&server, &prefix, folder.path());
    let boot = shipper.ship(100).boot;
    // All of it is on the disk, and little in memory.
    eventually(|| {
        let said = shipper.said();
        (said.underway, said.spooled) == (1_000, 100)
    });
    shipper.may_open("0");
    streams.iter().for_each(|stream| {
        server.cli(&["DEL", stream]);
    });
    let sent = || {
        let batches = batches(&server, &prefix).into_iter();
        let own = batches.filter(|((of, _), _)| *of == boot);
        own.flat_map(|(_, (batch, _))| seqs(&batch))
            .collect::<Vec<_>>()
    };
    // They are tried, more often than streams that were full can still be heard of.
    let before = shipper.said().errors;
    eventually(|| shipper.said().errors > before + u64::from(SHARDS));
    let said = shipper.said();
    assert!(sent().len() < 1_000);
    assert_eq!((said.dropped, said.underway), (0, 1_000));
    shipper.may_open("1024");
    eventually(|| sent() == numbers(1_000));
    assert_eq!(shipper.said().dropped, 0);
}
