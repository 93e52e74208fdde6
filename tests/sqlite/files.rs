//! The audit in SQLite's files as a whole: what is written is found and shown, and what is tampered with is named.

use std::io::{BufRead, BufReader};
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::harness::sqlite::{
    Audit, DAY, KEY, NOW, RETENTION, batch, event, events, lock, seqs, today,
};
use super::harness::{DEADLINE, PATIENCE, eventually, process};
use rusqlite::Connection;
use weir::clock;
use weir::config::audit::Delivery;
use weir::event::AuditEvent;
use weir::store::audit::chain::Keys;
use weir::store::audit::days::Day;
use weir::store::audit::{FaultKind, Filter, Order, StoreError};
use weir::store::sqlite::{Files, Reader, Writer};

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
    let report = audit.reader().verify(&Keys::new(&[KEY])).unwrap();
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
    // It would come last of all.
    check(
        "UPDATE events SET arrival = 9999 WHERE seq = 7",
        &[(7..=8, OutOfPlace)],
    );
    check(
        "UPDATE events SET arrival = -1 WHERE seq = 7",
        &[(6..=7, OutOfPlace)],
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
        let keys = Keys::new(key.as_slice());
        let faults = audit.reader().verify(&keys).unwrap().faults;
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
    let report = audit.reader().verify(&Keys::new(&[KEY])).unwrap();
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
    let is_refused = |error: StoreError| match error {
        StoreError::OfDay(day, error) => {
            assert_eq!(day, Day::of(NOW));
            matches!(*error, StoreError::Version { found: 0, .. })
        }
        _ => false,
    };
    let opened = Writer::open(&audit.path, "a", None, NOW);
    assert!(opened.is_err_and(is_refused));
    let opened = Reader::open(&audit.path);
    assert!(opened.is_err_and(is_refused));
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

#[test]
fn requests_are_refused_while_the_disk_is_full_and_no_longer() {
    let (audit, now) = (Audit::empty(), today());
    let mut writer = audit.writer_at(now).sync_each().unwrap();
    writer.append(&mut events(1..=2_000), now).unwrap();
    writer.limit_pages(1).unwrap();
    let (recorder, worker) =
        weir::audit::sqlite::start(writer, 5_000, Delivery::Guaranteed, RETENTION).unwrap();
    recorder.record(batch(2_001..=2_500));
    eventually(|| recorder.refuses());
    // Room for as many.
    audit.sql_at(now, "DELETE FROM events WHERE seq <= 1000");
    eventually(|| recorder.counts().written == 500);
    eventually(|| !recorder.refuses());
    assert_eq!(worker.stop(PATIENCE).dropped, 0);
}

#[test]
fn recorded_events_are_written_soon_and_in_order() {
    let audit = Audit::empty();
    let (recorder, worker) = weir::audit::sqlite::start(
        audit.writer_at(today()),
        5_000,
        Delivery::BestEffort,
        RETENTION,
    )
    .unwrap();
    recorder.record(batch(1..=1));
    eventually(|| recorder.counts().written == 1);
    recorder.record(batch(2..=1_200));
    recorder.record(batch(1_201..=1_201));
    let counts = worker.stop(PATIENCE);
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
    recorder.record(batch(1..=1));
    assert_eq!(recorder.counts().dropped, 1);
    assert_eq!(audit.faults(), []);
}

#[test]
fn a_locked_database_blocks_no_sender_and_is_caught_up_with() {
    let audit = Audit::empty();
    let today = today();
    let (recorder, worker) = weir::audit::sqlite::start(
        audit.writer_at(today),
        2_000,
        Delivery::BestEffort,
        RETENTION,
    )
    .unwrap();
    let other = lock(&audit.file(today));
    let start = clock::now();
    for n in 1..=1_990 {
        recorder.record(batch(n..=n));
    }
    recorder.record(batch(1_991..=2_005));
    recorder.record(batch(2_006..=2_006));
    // One that waited for the lock would have waited for two thousand.
    assert!(start.elapsed() < DEADLINE);
    eventually(|| recorder.counts().errors >= 2);
    let counts = recorder.counts();
    assert_eq!(
        (counts.written, counts.queued, counts.dropped),
        (0, 2_000, 6)
    );
    drop(other);
    eventually(|| recorder.counts().written == 2_000);
    recorder.record(batch(2_001..=2_001));
    let counts = worker.stop(PATIENCE);
    assert_eq!((counts.written, counts.dropped), (2_001, 6));
    assert_eq!(audit.faults(), []);
}

#[test]
fn stopping_gives_up_at_its_deadline_and_counts_what_is_lost() {
    let audit = Audit::empty();
    let writer = audit.writer_at(today());
    writer.limit_pages(1).unwrap();
    let (recorder, worker) =
        weir::audit::sqlite::start(writer, 2_000, Delivery::BestEffort, RETENTION).unwrap();
    recorder.record(batch(1..=1_000));
    eventually(|| recorder.counts().errors > 0);
    let start = clock::now();
    let counts = worker.stop(Duration::from_millis(100));
    assert!(start.elapsed() < DEADLINE);
    assert_eq!(
        (counts.written, counts.queued, counts.dropped),
        (0, 0, 1_000)
    );
}

#[test]
fn events_wait_for_a_disk_that_is_full_at_the_start() {
    let audit = Audit::empty();
    let files = Files::new(&audit.path, Some(KEY));
    let (path, has_room) = (audit.path.clone(), Arc::new(AtomicBool::new(false)));
    let open = {
        let has_room = has_room.clone();
        move || match has_room.load(Ordering::Relaxed) {
            true => Writer::open(&path, "a", Some(KEY), clock::wall()),
            false => Err(StoreError::Full),
        }
    };
    let (recorder, writers) =
        weir::audit::sqlite::start_once_mended(files, open, 2_000, RETENTION).unwrap();
    recorder.record(batch(1..=2_005));
    eventually(|| recorder.counts().errors > 1);
    has_room.store(true, Ordering::Relaxed);
    eventually(|| recorder.counts().written == 2_000);
    let counts = writers.stop(PATIENCE);
    assert_eq!((counts.written, counts.dropped), (2_000, 5));
    assert_eq!(audit.faults(), []);

    // One that never finds room ends in time, and counts what is lost.
    let files = Files::new(&audit.path, Some(KEY));
    let full = || Err(StoreError::Full);
    let (recorder, writers) =
        weir::audit::sqlite::start_once_mended(files, full, 2_000, RETENTION).unwrap();
    recorder.record(batch(1..=10));
    let counts = writers.stop(Duration::ZERO);
    assert_eq!((counts.written, counts.dropped), (0, 10));
}

fn weir(audit: &Audit, arguments: &[&str]) -> (Option<i32>, String) {
    process::weir(
        &[&["audit"], arguments, &["--database"]].concat(),
        &audit.path,
    )
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
    assert_eq!(weir(&audit, &["query", "--status", "abc"]).0, Some(2));
    let missing = Audit::empty();
    let (code, said) = weir(&missing, &["query"]);
    assert!(code == Some(1) && said.contains("cannot open"), "{said}");
    assert_eq!(missing.directory.path().read_dir().unwrap().count(), 0);
}

/// Scripts read what is on standard output alone.
#[test]
fn a_query_that_finds_nothing_says_so_beside_its_output() {
    let audit = Audit::with(10);
    for (format, begins) in [("table", ""), ("jsonl", ""), ("csv", "time,")] {
        let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
        weir.args(["audit", "query", "--since", "1h", "--format", format]);
        let output = weir.arg("--database").arg(&audit.path).output().unwrap();
        let said = |bytes| String::from_utf8(bytes).unwrap();
        let (out, err) = (said(output.stdout), said(output.stderr));
        assert_eq!(output.status.code(), Some(0), "{format}");
        assert_eq!(err, "no events match\n", "{format}");
        let head = usize::from(!begins.is_empty());
        assert_eq!(out.lines().count(), head, "{format}: {out}");
        assert!(out.starts_with(begins), "{format}: {out}");
    }
    assert_eq!(
        weir(&audit, &["query", "-n", "0"]),
        (Some(0), String::new())
    );
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
    let clean = "files do not tell how many events were dropped before they could be numbered: weir_audit_events_total does\n\
                 100 events, 1 boots, 1 files: nothing is missing or changed\n";
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

/// As `${file:…}` reads it, by which events are written.
#[test]
fn a_key_is_all_of_its_file_but_one_line_end() {
    let audit = Audit::empty();
    let file = audit.path.with_extension("key");
    for (key, line_end) in [("a key \n", "\n"), ("a key\t", "\r\n"), ("  a key ", "")] {
        let path = audit.path.with_file_name(format!("{}.db", key.len()));
        let mut writer = Writer::open(&path, "a", Some(key.as_bytes()), NOW).unwrap();
        writer.append(&mut events(1..=5), NOW).unwrap();
        std::fs::write(&file, format!("{key}{line_end}")).unwrap();
        let of_key = Audit {
            directory: tempfile::tempdir().unwrap(),
            path,
        };
        let verify = ["verify", "--key-file", file.to_str().unwrap()];
        let (code, said) = weir(&of_key, &verify);
        assert_eq!(code, Some(0), "{key:?}: {said}");
        assert!(said.contains("5 events"), "{said}");
    }
}

#[test]
fn a_tail_shows_what_arrives_on_this_day_and_the_next_and_ends_well_when_its_reader_leaves() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    writer.append(&mut events(1..=20), NOW).unwrap();
    let mut child = tail(&audit);
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
    eventually(|| {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success());
}

/// As a terminal that is closed has it, while nothing arrives that the tail could not write.
#[test]
fn a_tail_ends_by_a_hang_up() {
    let audit = Audit::empty();
    audit.writer().append(&mut events(1..=2), NOW).unwrap();
    let mut child = tail(&audit);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().is_some());
    process::signal(&child, "HUP");
    let mut status = None;
    eventually(|| {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().signal(), Some(1));
}

/// `weir audit tail` from the last two events on.
fn tail(audit: &Audit) -> Child {
    Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["audit", "tail", "-n", "2", "--format", "jsonl"])
        .arg("--database")
        .arg(&audit.path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}
