//! The audit store as a whole: what is written is found, and what is tampered with is named.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;
use weir::clock;
use weir::config::audit::Delivery;
use weir::event::{AuditEvent, Encoded, Micros};
use weir::store::audit::{FaultKind, Filter, Order, StoreError};
use weir::store::days::{self, Day};
use weir::store::sqlite::{Files, Reader, Writer};

const KEY: &[u8] = b"a key";
/// On 2023-11-15, later than any of the tests' events.
const NOW: Duration = Duration::from_secs(1_700_020_000);
const RETENTION: Duration = Duration::from_secs(3 * 86_400);
const DAY: Duration = Duration::from_secs(86_400);

/// The `n`th of the tests' events: every tenth by bob, every hundredth refused.
fn event(n: u64) -> AuditEvent {
    let refused = n.is_multiple_of(100);
    AuditEvent {
        time: Micros(1_700_000_000_000_000 + n * 1_000_000),
        route: Some(if n.is_multiple_of(2) { "pay" } else { "web" }.into()),
        client: IpAddr::V4(Ipv4Addr::new(10, 0, 0, (n % 7) as u8)),
        user: Some(if n.is_multiple_of(10) { "bob" } else { "ann" }.into()),
        method: if refused { "POST" } else { "GET" }.into(),
        path: format!("/items/{n}"),
        status: if refused { 429 } else { 200 },
        label: refused.then(|| "rate_limited".into()),
        bytes_out: n,
        request_id: Some(n.to_string()),
        ..AuditEvent::sample()
    }
}

/// As one batch.
fn events(range: RangeInclusive<u64>) -> [Encoded; 1] {
    [batch(range)]
}

fn batch(range: RangeInclusive<u64>) -> Encoded {
    let mut batch = Encoded::default();
    range.for_each(|n| batch.push(&event(n)));
    batch
}

fn seqs(batches: &[Encoded]) -> Vec<u64> {
    let encodings = batches.iter().flat_map(Encoded::iter);
    let events = encodings.map(|encoding| <AuditEvent>::decode(encoding).unwrap());
    events.map(|event| event.seq).collect()
}

/// A database with `count` events of one instance, in the file of one day.
struct Audit {
    directory: TempDir,
    /// As the configuration has it.
    path: PathBuf,
}

impl Audit {
    fn empty() -> Audit {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.db");
        Audit { directory, path }
    }

    fn with(count: u64) -> Audit {
        let audit = Audit::empty();
        let mut writer = audit.writer();
        for first in (1..=count).step_by(500) {
            let last = count.min(first + 499);
            writer.append(&mut events(first..=last), NOW).unwrap();
        }
        audit
    }

    fn writer(&self) -> Writer {
        self.writer_at(NOW)
    }

    fn writer_at(&self, now: Duration) -> Writer {
        Writer::open(&self.path, "a", Some(KEY), now).unwrap()
    }

    fn reader(&self) -> Reader {
        Reader::open(&self.path).unwrap()
    }

    /// The file of the day that `now` is in.
    fn file(&self, now: Duration) -> PathBuf {
        days::file(&self.path, Day::of(now))
    }

    fn sql(&self, sql: &str) {
        self.sql_at(NOW, sql);
    }

    fn sql_at(&self, now: Duration, sql: &str) {
        let file = Connection::open(self.file(now)).unwrap();
        file.execute_batch(sql).unwrap();
    }

    fn faults(&self) -> Vec<(RangeInclusive<u64>, FaultKind)> {
        let report = self.reader().verify(Some(KEY)).unwrap();
        let faults = report.faults.into_iter();
        faults.map(|fault| (fault.seqs, fault.kind)).collect()
    }
}

fn close(files: &Files) -> Vec<Day> {
    let mut closed = Vec::new();
    files.close_days(|day| closed.push(day)).unwrap();
    closed
}

fn remove_old(files: &Files, now: Duration) -> Vec<Day> {
    let mut removed = Vec::new();
    files
        .remove_old(RETENTION, now, |day| removed.push(day))
        .unwrap();
    removed
}

fn lock(file: &Path) -> Connection {
    let other = Connection::open(file).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    other
}

#[test]
fn what_is_written_is_found_by_each_filter() {
    let audit = Audit::with(10_000);
    let reader = audit.reader();
    let check = |filter: Filter, count: usize| {
        assert_eq!(reader.query(&filter).unwrap().len(), count, "{filter:?}");
    };
    let any = Filter::default;
    let text = |text: &str| Some(text.to_owned());
    let time = |n: u64| Some(event(n).time);
    check(any(), 10_000);
    check(
        Filter {
            user: text("bob"),
            ..any()
        },
        1_000,
    );
    check(
        Filter {
            route: text("pay"),
            ..any()
        },
        5_000,
    );
    check(
        Filter {
            client: text("10.0.0.1"),
            ..any()
        },
        1_429,
    );
    check(
        Filter {
            status: Some(400..=499),
            ..any()
        },
        100,
    );
    check(
        Filter {
            status: Some(201..=428),
            ..any()
        },
        0,
    );
    check(
        Filter {
            label: text("rate_limited"),
            ..any()
        },
        100,
    );
    check(
        Filter {
            method: text("POST"),
            ..any()
        },
        100,
    );
    check(
        Filter {
            path_prefix: text("/items/99"),
            ..any()
        },
        111,
    );
    check(
        Filter {
            path_prefix: text("/items/%"),
            ..any()
        },
        0,
    );
    check(
        Filter {
            since: time(9_001),
            ..any()
        },
        1_000,
    );
    check(
        Filter {
            until: time(11),
            ..any()
        },
        10,
    );
    check(
        Filter {
            since: time(5),
            until: time(7),
            route: text("web"),
            ..any()
        },
        1,
    );
    check(
        Filter {
            limit: Some(7),
            ..any()
        },
        7,
    );

    let newest = Filter {
        limit: Some(2),
        order: Order::NewestFirst,
        ..any()
    };
    let newest = reader.query(&newest).unwrap();
    assert_eq!(
        newest[0].event,
        AuditEvent {
            seq: 10_000,
            ..event(10_000)
        }
    );
    assert_eq!(
        (newest[0].instance.as_str(), newest[1].event.seq),
        ("a", 9_999)
    );
    check(
        Filter {
            after: Some(newest[1].cursor),
            ..any()
        },
        1,
    );
    check(
        Filter {
            after: Some(newest[0].cursor),
            ..any()
        },
        0,
    );
}

#[test]
fn its_files_are_for_their_owner_alone() {
    let audit = Audit::with(10);
    // While it is written there are the day's file, its log and the index of that.
    let _writer = audit.writer();
    let folder = audit.path.parent().unwrap();
    let files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(files.len(), 3, "{files:?}");
    for file in files {
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file:?}");
    }
}

#[test]
fn an_untouched_database_has_no_faults() {
    let audit = Audit::with(10_000);
    let mut other = Writer::open(&audit.path, "b", Some(KEY), NOW).unwrap();
    let mut more = events(1..=3);
    other.append(&mut more, NOW).unwrap();
    assert_eq!(seqs(&more), [1, 2, 3]);
    let report = audit.reader().verify(Some(KEY)).unwrap();
    assert_eq!(
        (report.events, report.instances, report.faults),
        (10_003, 2, vec![])
    );
}

#[test]
fn each_tampering_is_named_with_its_rows() {
    let one = |seq, kind| (seq..=seq, kind);
    let check = |sql: &str, expected: &[(RangeInclusive<u64>, FaultKind)]| {
        let audit = Audit::with(1_000);
        audit.sql(sql);
        assert_eq!(audit.faults(), expected, "{sql}");
    };
    use FaultKind::*;
    check(
        "UPDATE events SET user = 'eve' WHERE seq = 7",
        &[one(7, Changed)],
    );
    check(
        "UPDATE events SET time = time + 1 WHERE seq = 7",
        &[one(7, Changed)],
    );
    check(
        "UPDATE events SET label = 'x' WHERE seq = 7",
        &[one(7, Changed)],
    );
    check(
        "UPDATE events SET client = 'x' WHERE seq = 7",
        &[one(7, Changed)],
    );
    check(
        "UPDATE events SET body = x'00' WHERE seq = 1000",
        &[one(1000, Changed)],
    );
    check(
        "UPDATE events SET hash = zeroblob(32) WHERE seq = 1000",
        &[one(1000, Changed)],
    );
    check(
        "UPDATE events SET hash = 'x' WHERE seq = 1",
        &[one(1, Changed)],
    );
    check(
        "UPDATE events SET body = CAST(replace(CAST(body AS TEXT), 'example', 'hexample') AS BLOB) WHERE seq = 8",
        &[one(8, Changed)],
    );
    check("DELETE FROM events WHERE seq = 7", &[one(7, Missing)]);
    check(
        "DELETE FROM events WHERE seq BETWEEN 1 AND 9",
        &[(1..=9, Missing)],
    );
    check(
        "DELETE FROM events WHERE seq > 990",
        &[(991..=1000, TailMissing)],
    );
    check("DELETE FROM events", &[(1..=1000, TailMissing)]);
    check(
        "UPDATE events SET seq = 1010 - seq WHERE seq IN (10, 1000)",
        &[one(10, OutOfPlace), one(1000, OutOfPlace)],
    );
    check(
        "CREATE TEMP TABLE o AS SELECT seq, body, hash FROM events;
         UPDATE events SET (body, hash) = (SELECT body, hash FROM o WHERE o.seq = 7 - events.seq) WHERE seq IN (3, 4)",
        &[one(3, OutOfPlace), one(4, OutOfPlace)],
    );
    check(
        "UPDATE events SET (body, hash) = (SELECT body, hash FROM events o WHERE o.seq = 4) WHERE seq = 3",
        &[one(3, OutOfPlace)],
    );
    check(
        "INSERT INTO events SELECT NULL, instance_id, 1001, time, user, client, label, body, hash
         FROM events WHERE seq = 5",
        &[one(1001, OutOfPlace)],
    );
    check(
        "DELETE FROM events WHERE seq = 1000; UPDATE instances SET last_seq = 999",
        &[one(0, EndMark), one(999, Changed)],
    );
    check("UPDATE instances SET end_mark = 'x'", &[one(0, EndMark)]);
    check(
        "UPDATE events SET instance_id = 9 WHERE seq = 1000",
        &[one(1000, TailMissing), one(1000, OutOfPlace)],
    );
    check(
        "DELETE FROM instances; DELETE FROM events",
        &[one(0, InstanceMissing)],
    );
    check(
        "DELETE FROM instances; DELETE FROM events; UPDATE ledger SET instances = 0",
        &[one(0, Instance)],
    );
}

#[test]
fn another_key_is_told_apart_from_damage() {
    let audit = Audit::with(10);
    for key in [None, Some(b"other".as_slice())] {
        let faults = audit.reader().verify(key).unwrap().faults;
        assert_eq!(faults.len(), 1);
        assert_eq!(faults[0].kind, FaultKind::Key);
        assert!(matches!(
            Writer::open(&audit.path, "a", key, NOW),
            Err(StoreError::Key)
        ));
    }
    assert_eq!(audit.faults(), []);
}

#[test]
fn a_failed_append_uses_no_numbers_and_can_be_tried_again() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    writer.append(&mut events(1..=5), NOW).unwrap();
    let mut batch = events(6..=9);
    let other = lock(&audit.file(NOW));
    for _ in 0..2 {
        assert!(matches!(
            writer.append(&mut batch, NOW),
            Err(StoreError::Locked)
        ));
    }
    drop(other);
    writer.append(&mut batch, NOW).unwrap();
    assert_eq!(seqs(&batch), [6, 7, 8, 9]);

    writer.limit_pages(1).unwrap();
    let mut large = events(10..=1_000);
    assert!(matches!(
        writer.append(&mut large, NOW),
        Err(StoreError::Full)
    ));
    assert_eq!(audit.reader().query(&Filter::default()).unwrap().len(), 9);
    writer.limit_pages(1_000_000).unwrap();
    writer.append(&mut large, NOW).unwrap();
    let report = audit.reader().verify(Some(KEY)).unwrap();
    assert_eq!((report.events, report.faults), (1_000, vec![]));
}

#[test]
fn a_writer_stops_when_another_hand_moved_its_end_mark() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    audit.sql("UPDATE instances SET last_seq = 5");
    assert!(matches!(
        writer.append(&mut events(1..=2), NOW),
        Err(StoreError::Changed)
    ));
}

#[test]
fn a_file_of_something_else_is_refused_and_left_alone() {
    let audit = Audit::empty();
    audit.sql("CREATE TABLE precious (a)");
    assert!(matches!(
        Writer::open(&audit.path, "a", None, NOW),
        Err(StoreError::Version(0))
    ));
    assert!(matches!(
        Reader::open(&audit.path),
        Err(StoreError::Version(0))
    ));
    let other = audit.path.with_extension("none");
    assert!(matches!(Reader::open(&other), Err(StoreError::Absent)));
}

#[test]
fn a_file_of_all_days_from_before_is_refused_and_left_alone() {
    let audit = Audit::empty();
    let old = Connection::open(&audit.path).unwrap();
    old.execute_batch("CREATE TABLE events (a); PRAGMA user_version = 1")
        .unwrap();
    let opened = Writer::open(&audit.path, "a", None, NOW);
    assert!(matches!(opened, Err(StoreError::Undated)));
    let opened = Reader::open(&audit.path);
    assert!(matches!(opened, Err(StoreError::Undated)));
}

/// Waits until it is so, and fails after ten seconds.
fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let start = clock::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        thread::yield_now();
    }
}

#[test]
fn recorded_events_are_written_soon_and_in_order() {
    let audit = Audit::empty();
    let (recorder, worker) = weir::audit::sqlite::start(
        audit.writer_at(clock::wall()),
        5_000,
        Delivery::BestEffort,
        RETENTION,
    )
    .unwrap();
    recorder.record(batch(1..=1), None);
    eventually("written", || recorder.counts().written == 1);
    recorder.record(batch(2..=1_200), None);
    recorder.record(batch(1_201..=1_201), None);
    let counts = worker.stop(Duration::from_secs(5));
    assert_eq!(
        (counts.written, counts.queued, counts.dropped),
        (1_201, 0, 0)
    );
    let stored = audit.reader().query(&Filter::default()).unwrap();
    assert!(
        stored
            .iter()
            .zip(1..)
            .all(|(stored, n)| stored.event == AuditEvent { seq: n, ..event(n) })
    );
    recorder.record(batch(1..=1), None);
    assert_eq!(recorder.counts().dropped, 1);
    assert_eq!(audit.faults(), []);
}

#[test]
fn a_locked_database_blocks_no_sender_and_is_caught_up_with() {
    let audit = Audit::empty();
    let (recorder, worker) = weir::audit::sqlite::start(
        audit.writer_at(clock::wall()),
        2_000,
        Delivery::BestEffort,
        RETENTION,
    )
    .unwrap();
    let other = lock(&audit.file(clock::wall()));
    let start = clock::now();
    for n in 1..=1_990 {
        recorder.record(batch(n..=n), None);
    }
    recorder.record(batch(1_991..=2_005), None);
    recorder.record(batch(2_006..=2_006), None);
    assert!(start.elapsed() < Duration::from_secs(1));
    eventually("two failed tries", || recorder.counts().errors >= 2);
    let counts = recorder.counts();
    assert_eq!(
        (counts.written, counts.queued, counts.dropped),
        (0, 2_000, 6)
    );
    drop(other);
    eventually("caught up", || recorder.counts().written == 2_000);
    recorder.record(batch(2_001..=2_001), None);
    let counts = worker.stop(Duration::from_secs(5));
    assert_eq!((counts.written, counts.dropped), (2_001, 6));
    assert_eq!(audit.faults(), []);
}

#[test]
fn stopping_gives_up_at_its_deadline_and_counts_what_is_lost() {
    let audit = Audit::empty();
    let writer = audit.writer_at(clock::wall());
    writer.limit_pages(1).unwrap();
    let (recorder, worker) =
        weir::audit::sqlite::start(writer, 2_000, Delivery::BestEffort, RETENTION).unwrap();
    recorder.record(batch(1..=1_000), None);
    eventually("a failed try", || recorder.counts().errors > 0);
    let start = clock::now();
    let counts = worker.stop(Duration::from_millis(100));
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(
        (counts.written, counts.queued, counts.dropped),
        (0, 0, 1_000)
    );
}

fn weir(audit: &Audit, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .arg("audit")
        .args(arguments)
        .arg("--database")
        .arg(&audit.path)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn the_command_shows_the_newest_events_that_pass() {
    let audit = Audit::with(1_000);
    let (code, said) = weir(
        &audit,
        &["query", "--status", "4xx", "--user", "bob", "-n", "2"],
    );
    let rows = said
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect::<Vec<Vec<_>>>();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(rows.len(), 3, "{said}");
    assert_eq!(rows[0][0], "TIME");
    assert_eq!((rows[1][5], rows[2][5]), ("/items/900", "/items/1000"));
    assert_eq!(rows[2][6..], ["429", "rate_limited", "0.9"]);
    assert_eq!(
        weir(&audit, &["query", "--since", "1h"]),
        (Some(0), String::new())
    );
    assert_eq!(weir(&audit, &["query", "--status", "abc"]).0, Some(2));
    let missing = Audit::empty();
    let (code, said) = weir(&missing, &["query"]);
    assert!(code == Some(1) && said.contains("cannot open"), "{said}");
    assert_eq!(missing.directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn an_export_has_every_event_with_every_field() {
    let audit = Audit::with(2_500);
    let (code, said) = weir(&audit, &["export"]);
    let lines = said.lines().map(|line| serde_json::from_str(line).unwrap());
    let lines = lines.collect::<Vec<serde_json::Value>>();
    assert_eq!((code, lines.len()), (Some(0), 2_500));
    assert_eq!(lines[99]["time"], "2023-11-14T22:15:00.000000Z");
    assert_eq!(lines[99]["label"], "rate_limited");
    assert_eq!(lines[99]["seq"], 100);

    let (code, said) = weir(&audit, &["export", "--format", "csv"]);
    let mut csv = csv::Reader::from_reader(said.as_bytes());
    let head = csv.headers().unwrap().clone();
    assert_eq!(head.len(), lines[0].as_object().unwrap().len());
    assert!(
        head.iter().all(|name| lines[0].get(name).is_some()),
        "{head:?}"
    );
    let rows = csv.records().collect::<Result<Vec<_>, _>>().unwrap();
    assert_eq!((code, rows.len()), (Some(0), 2_500));
    assert_eq!(
        rows[99][head.iter().position(|name| name == "status").unwrap()],
        *"429"
    );
}

#[test]
fn the_verdict_is_the_exit_code_and_names_the_rows() {
    let audit = Audit::with(100);
    let key = audit.path.with_extension("key");
    std::fs::write(&key, [KEY, b"\n"].concat()).unwrap();
    let verify = || weir(&audit, &["verify", "--key-file", key.to_str().unwrap()]);
    let clean = "100 events, 1 boots, 1 files: nothing is missing or changed\n";
    assert_eq!(verify(), (Some(0), clean.to_owned()));
    audit.sql("DELETE FROM events WHERE seq = 7 OR seq > 98; UPDATE events SET user = 'eve' WHERE seq = 50");
    let (code, said) = verify();
    assert_eq!(code, Some(1));
    for fault in [
        " event 7: missing",
        " event 50: changed",
        " events 99 to 100: missing at the end",
        ": 3 faults",
    ] {
        assert!(said.contains(&format!("{fault}\n")), "{said}");
    }
    assert_eq!(weir(&audit, &["verify"]).0, Some(1));
}

#[test]
fn a_tail_shows_what_arrives_on_this_day_and_the_next_and_ends_well_when_its_reader_leaves() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    writer.append(&mut events(1..=20), NOW).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args([
            "audit",
            "tail",
            "-n",
            "2",
            "--format",
            "jsonl",
            "--database",
        ])
        .arg(&audit.path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || {
        let line: serde_json::Value =
            serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        line["seq"].as_u64().unwrap()
    };
    assert_eq!((next(), next()), (19, 20));
    writer.append(&mut events(21..=22), NOW).unwrap();
    assert_eq!((next(), next()), (21, 22));
    writer.append(&mut events(23..=23), NOW + DAY).unwrap();
    writer.append(&mut events(24..=24), NOW + DAY).unwrap();
    assert_eq!((next(), next()), (23, 24));
    drop(lines);
    writer.append(&mut events(25..=25), NOW + DAY).unwrap();
    let mut status = None;
    eventually("the tail has ended", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success());
}

/// A database of three days: events 1 to 1,000, to 2,000 and to 3,000, by one boot.
fn three_days() -> Audit {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    for day in 0..3 {
        let first = u64::from(day) * 1_000 + 1;
        let mut batches = [batch(first..=first + 499), batch(first + 500..=first + 999)];
        writer.append(&mut batches, NOW + day * DAY).unwrap();
    }
    audit
}

#[test]
fn the_first_batch_of_a_new_day_in_utc_goes_to_its_file() {
    let audit = Audit::empty();
    let midnight = Duration::from_secs(1_700_092_800);
    let mut writer = audit.writer();
    let before = midnight - Duration::from_micros(1);
    writer.append(&mut events(1..=2), before).unwrap();
    writer.append(&mut events(3..=4), midnight).unwrap();
    // A clock that is set back parts nothing from its order.
    writer.append(&mut events(5..=5), before).unwrap();
    let counts = |now| {
        let reader = Reader::open(&audit.file(now)).unwrap();
        let events = reader.query(&Filter::default()).unwrap();
        let seqs = events.iter().map(|stored| stored.event.seq);
        seqs.collect::<Vec<_>>()
    };
    assert_eq!(counts(before), [1, 2]);
    assert_eq!(counts(midnight), [3, 4, 5]);
    assert_eq!(days::list(&audit.path).unwrap().len(), 2);
    assert_eq!(audit.faults(), []);
}

#[test]
fn a_restart_goes_on_in_the_file_of_the_day_with_a_boot_of_its_own() {
    let audit = Audit::empty();
    let mut crashed = audit.writer();
    crashed.append(&mut events(1..=5), NOW).unwrap();
    let mut writer = audit.writer();
    let mut more = events(6..=7);
    writer.append(&mut more, NOW).unwrap();
    assert_eq!(seqs(&more), [1, 2]);
    // And after days without one.
    let mut writer = audit.writer_at(NOW + 3 * DAY);
    writer.append(&mut more, NOW + 3 * DAY).unwrap();
    // With a clock that was set back.
    audit.writer().append(&mut more, NOW).unwrap();
    assert_eq!(days::list(&audit.path).unwrap().len(), 2);
    let report = audit.reader().verify(Some(KEY)).unwrap();
    assert_eq!(
        (report.events, report.instances, report.files, report.faults),
        (11, 4, 2, vec![])
    );
}

#[test]
fn a_failed_step_into_a_new_day_is_tried_again() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    writer.append(&mut events(1..=5), NOW).unwrap();
    let tomorrow = NOW + DAY;
    let other = lock(&audit.file(tomorrow));
    let mut batch = events(6..=9);
    for _ in 0..2 {
        let refused = writer.append(&mut batch, tomorrow);
        assert!(matches!(refused, Err(StoreError::Locked)));
    }
    drop(other);
    writer.append(&mut batch, tomorrow).unwrap();
    assert_eq!(seqs(&batch), [6, 7, 8, 9]);
    assert_eq!(audit.faults(), []);
    // The new file names the one before it, although it stood there already.
    std::fs::remove_file(audit.file(NOW)).unwrap();
    assert_eq!(audit.faults(), [(1..=5, FaultKind::FileMissing)]);
}

#[test]
fn a_file_that_a_crash_left_empty_is_passed_over() {
    let audit = Audit::empty();
    let empty = |day: u32| std::fs::write(audit.file(NOW + day * DAY), "").unwrap();
    empty(0);
    assert!(matches!(Reader::open(&audit.path), Err(StoreError::Absent)));
    let mut writer = audit.writer_at(NOW + DAY);
    writer.append(&mut events(1..=5), NOW + DAY).unwrap();
    empty(2);
    writer.append(&mut events(6..=7), NOW + 3 * DAY).unwrap();
    let files = Files::new(&audit.path, Some(KEY));
    assert_eq!(close(&files), [Day::of(NOW + DAY)]);
    let report = audit.reader().verify(Some(KEY)).unwrap();
    assert_eq!((report.files, report.faults), (2, vec![]));
    assert_eq!(audit.reader().query(&Filter::default()).unwrap().len(), 7);
}

#[test]
fn a_query_over_several_days_keeps_the_order_of_arrival() {
    let audit = three_days();
    let reader = audit.reader();
    let seqs = |filter: Filter| -> Vec<u64> {
        let events = reader.query(&filter).unwrap();
        events.iter().map(|stored| stored.event.seq).collect()
    };
    let any = Filter::default;
    assert_eq!(seqs(any()), (1..=3_000).collect::<Vec<_>>());
    let newest = Filter {
        order: Order::NewestFirst,
        limit: Some(1_500),
        ..any()
    };
    assert_eq!(seqs(newest), (1_501..=3_000).rev().collect::<Vec<_>>());
    let mut paged = Vec::new();
    let mut page = Filter {
        limit: Some(700),
        user: Some("bob".to_owned()),
        ..any()
    };
    loop {
        let events = reader.query(&page).unwrap();
        let Some(last) = events.last() else { break };
        page.after = Some(last.cursor);
        page.limit = Some(70);
        paged.extend(events.iter().map(|stored| stored.event.seq));
    }
    assert_eq!(paged, (10..=3_000).step_by(10).collect::<Vec<_>>());
    let within = Filter {
        since: Some(event(900).time),
        until: Some(event(1_100).time),
        ..any()
    };
    assert_eq!(seqs(within), (900..1_100).collect::<Vec<_>>());
}

#[test]
fn files_that_a_time_rules_out_are_not_read() {
    let audit = three_days();
    let now = |day: u32| NOW + day * DAY;
    let count = |filter: Filter| audit.reader().query(&filter).unwrap().len();
    let late = Filter {
        since: Some(Day::of(now(0)).end()),
        ..Filter::default()
    };
    let early = Filter {
        until: Some(event(1_001).time),
        ..Filter::default()
    };
    assert_eq!((count(late.clone()), count(early.clone())), (0, 1_000));
    for day in [1, 2] {
        audit.sql_at(now(day), "DROP TABLE events");
    }
    assert_eq!(count(early), 1_000);
    audit.sql_at(now(0), "DROP TABLE events");
    assert!(audit.reader().query(&late).is_err());
    for day in [1, 2] {
        std::fs::remove_file(audit.file(now(day))).unwrap();
    }
    assert_eq!(count(late), 0);
}

#[test]
fn tampering_is_named_in_the_files_of_all_days() {
    let one = |seq, kind| (seq..=seq, kind);
    let check = |sql: &str, expected: &[(RangeInclusive<u64>, FaultKind)]| {
        let audit = three_days();
        audit.sql_at(NOW + DAY, sql);
        assert_eq!(audit.faults(), expected, "{sql}");
    };
    use FaultKind::*;
    check("", &[]);
    check(
        "UPDATE events SET user = 'eve' WHERE seq = 1001",
        &[one(1001, Changed)],
    );
    check("DELETE FROM events WHERE seq = 1001", &[one(1001, Missing)]);
    check(
        "DELETE FROM events WHERE seq > 1500",
        &[(1501..=2000, TailMissing)],
    );
    check(
        "UPDATE instances SET before_seq = 1001; DELETE FROM events WHERE seq = 1001",
        &[one(0, EndMark), one(1002, Changed), one(1001, TailMissing)],
    );
    check(
        "UPDATE ledger SET day = 1",
        &[one(0, Instance), one(0, File)],
    );
    check("UPDATE ledger SET place = 1", &[one(0, Instance)]);
    check(
        "UPDATE ledger SET earliest = 1700000000000000000",
        &[one(0, File)],
    );
}

#[test]
fn a_removed_file_is_named_with_its_events() {
    let check = |day: u32, expected: &str| {
        let audit = three_days();
        std::fs::remove_file(audit.file(NOW + day * DAY)).unwrap();
        let faults = audit.reader().verify(Some(KEY)).unwrap().faults;
        assert_eq!(faults.len(), 1, "{faults:?}");
        let said = faults[0].to_string();
        assert!(said.starts_with(expected), "{said}");
    };
    check(0, "file of 2023-11-15 missing: events 1 to 1000 of a/");
    check(1, "file of 2023-11-16 missing: events 1001 to 2000 of a/");
}

#[test]
fn a_removed_newest_file_is_named_once_its_writer_goes_on() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    writer.append(&mut events(1..=5), NOW).unwrap();
    writer.append(&mut events(6..=9), NOW + DAY).unwrap();
    std::fs::remove_file(audit.file(NOW + DAY)).unwrap();
    writer.append(&mut events(10..=10), NOW + DAY).unwrap();
    writer.append(&mut events(11..=11), NOW + 2 * DAY).unwrap();
    assert_eq!(audit.faults(), [(6..=10, FaultKind::FileMissing)]);
}

#[test]
fn a_file_put_back_to_an_older_state_lacks_its_tail() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    writer.append(&mut events(1..=5), NOW).unwrap();
    audit.sql("PRAGMA wal_checkpoint(TRUNCATE)");
    let older = std::fs::read(audit.file(NOW)).unwrap();
    writer.append(&mut events(6..=9), NOW).unwrap();
    writer.append(&mut events(10..=11), NOW + DAY).unwrap();
    drop(writer);
    std::fs::write(audit.file(NOW), older).unwrap();
    assert_eq!(audit.faults(), [(6..=9, FaultKind::TailMissing)]);
}

#[test]
fn writers_that_share_the_files_go_on_each_at_its_own_pace() {
    let audit = Audit::empty();
    let mut slow = Writer::open(&audit.path, "slow", Some(KEY), NOW).unwrap();
    let mut busy = audit.writer();
    slow.append(&mut events(1..=3), NOW).unwrap();
    for day in 0..3 {
        busy.append(&mut events(1..=10), NOW + day * DAY).unwrap();
    }
    close(&Files::new(&audit.path, Some(KEY)));
    // Late, into a closed file; then past the files that the other one has made.
    slow.append(&mut events(4..=4), NOW).unwrap();
    slow.append(&mut events(5..=6), NOW + 4 * DAY).unwrap();
    busy.append(&mut events(11..=11), NOW + 4 * DAY).unwrap();
    let report = audit.reader().verify(Some(KEY)).unwrap();
    assert_eq!(
        (report.events, report.files, report.faults),
        (37, 4, vec![])
    );
    std::fs::remove_file(audit.file(NOW + 2 * DAY)).unwrap();
    assert_eq!(audit.faults(), [(21..=30, FaultKind::FileMissing)]);
    std::fs::remove_file(audit.file(NOW)).unwrap();
    let faults = audit.reader().verify(Some(KEY)).unwrap().faults;
    let said: Vec<_> = faults.iter().map(ToString::to_string).collect();
    let begins = [
        "file of 2023-11-15 missing: events 1 to 10 of a/",
        "file of 2023-11-15 missing: events 1 to 4 of slow/",
        "file of 2023-11-17 missing: events 21 to 30 of a/",
    ];
    assert_eq!(said.len(), begins.len(), "{said:?}");
    for (said, begin) in said.iter().zip(begins) {
        assert!(said.starts_with(begin), "{said}");
    }
}

#[test]
fn one_file_is_verified_by_itself() {
    let audit = three_days();
    let reader = Reader::open(&audit.file(NOW + DAY)).unwrap();
    let report = reader.verify(Some(KEY)).unwrap();
    assert_eq!((report.events, report.faults), (1_000, vec![]));
}

#[test]
fn a_closed_day_proves_that_the_newest_file_is_gone() {
    let audit = three_days();
    let files = Files::new(&audit.path, Some(KEY));
    assert_eq!(close(&files), [0, 1].map(|day| Day::of(NOW + day * DAY)));
    assert_eq!(audit.faults(), []);
    let forged = three_days();
    close(&Files::new(&forged.path, Some(KEY)));
    forged.sql_at(NOW + DAY, "UPDATE ledger SET next_file = zeroblob(16)");
    assert_eq!(forged.faults(), [(0..=0, FaultKind::File)]);

    let newest = audit.file(NOW + 2 * DAY);
    std::fs::remove_file(&newest).unwrap();
    let gone = (0..=0, FaultKind::FileMissing);
    assert_eq!(audit.faults(), std::slice::from_ref(&gone));
    // A new one of the same day does not stand in for it.
    let mut writer = audit.writer_at(NOW + 2 * DAY);
    writer.append(&mut events(1..=1), NOW + 2 * DAY).unwrap();
    assert_eq!(audit.faults(), std::slice::from_ref(&gone));
    let said = audit.reader().verify(Some(KEY)).unwrap().faults[0].to_string();
    assert_eq!(said, "file of 2023-11-17 missing");
}

#[test]
fn days_that_are_over_are_closed_beside_the_writing() {
    let audit = Audit::empty();
    let today = clock::wall();
    let mut writer = audit.writer_at(today - DAY);
    writer.append(&mut events(1..=5), today - DAY).unwrap();
    let (recorder, worker) =
        weir::audit::sqlite::start(writer, 2_000, Delivery::BestEffort, RETENTION).unwrap();
    recorder.record(batch(6..=6), None);
    let indexes = || {
        let file = Connection::open(audit.file(today - DAY)).unwrap();
        let sql = "SELECT count(*) FROM sqlite_schema WHERE type = 'index'";
        file.query_row(sql, [], |row| row.get::<_, u32>(0)).unwrap()
    };
    eventually("indexed", || indexes() > 0);
    worker.stop(Duration::from_secs(5));
    assert_eq!(audit.faults(), []);
    assert_eq!(audit.reader().query(&Filter::default()).unwrap().len(), 6);
}

/// A database of six days, of ten events each, by one boot; and a time in the last of them.
fn six_days() -> (Audit, Duration) {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    for day in 0..6 {
        let now = NOW + day * DAY;
        writer.append(&mut events(1..=10), now).unwrap();
    }
    (audit, NOW + 5 * DAY)
}

#[test]
fn days_beyond_the_retention_are_removed_and_not_missed() {
    let (audit, now) = six_days();
    let files = Files::new(&audit.path, Some(KEY));
    close(&files);
    let days =
        |ago: &[u32]| -> Vec<_> { ago.iter().map(|ago| Day::of(now - *ago * DAY)).collect() };
    // Three days are kept whole, and the part of today.
    assert_eq!(remove_old(&files, now), days(&[5, 4]));
    assert_eq!(remove_old(&files, now), []);
    let names = audit.directory.path().read_dir().unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let old = names.filter(|name| {
        name.starts_with("audit-2023-11-15") || name.starts_with("audit-2023-11-16")
    });
    assert_eq!(old.count(), 0);
    let report = audit.reader().verify(Some(KEY)).unwrap();
    assert_eq!((report.events, report.faults), (40, vec![]));
    // The newest is kept, whatever its age.
    assert_eq!(remove_old(&files, now + 90 * DAY), days(&[3, 2, 1]));
    assert_eq!(audit.faults(), []);
}

#[test]
fn a_file_that_another_hand_removed_is_told_from_those_of_the_retention() {
    let (audit, now) = six_days();
    let files = Files::new(&audit.path, Some(KEY));
    remove_old(&files, now);
    let oldest = now - 3 * DAY;
    let file = Connection::open(audit.file(oldest)).unwrap();
    let id = file.query_row("SELECT hex(file) FROM ledger", [], |row| row.get(0));
    let id: String = id.unwrap();
    std::fs::remove_file(audit.file(oldest)).unwrap();
    let gone = (21..=30, FaultKind::FileMissing);
    assert_eq!(audit.faults(), std::slice::from_ref(&gone));
    // Who lacks the key cannot say that it was retention.
    audit.sql_at(now, &format!(
        "INSERT INTO removed SELECT day + 1, place + 1, x'{id}', mark FROM removed ORDER BY place DESC LIMIT 1"
    ));
    assert_eq!(audit.faults(), [(0..=0, FaultKind::File), gone]);
}

#[test]
fn the_retention_is_heeded_beside_the_writing() {
    let audit = Audit::empty();
    let today = clock::wall();
    let mut writer = audit.writer_at(today - 9 * DAY);
    for ago in [9, 4, 3] {
        let now = today - ago * DAY;
        writer.append(&mut events(1..=5), now).unwrap();
    }
    let (recorder, worker) =
        weir::audit::sqlite::start(writer, 2_000, Delivery::BestEffort, RETENTION).unwrap();
    eventually("removed at the start", || {
        recorder.counts().removed_files == 2
    });
    recorder.record(batch(6..=6), None);
    eventually("written", || recorder.counts().written == 1);
    worker.stop(Duration::from_secs(5));
    assert_eq!(days::list(&audit.path).unwrap().len(), 2);
    assert_eq!(audit.faults(), []);
}
