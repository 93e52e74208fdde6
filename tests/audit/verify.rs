//! What was changed or removed is named alike in SQLite's files and in Postgres, and nothing else is.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::harness::kept::{DAY, KEY, Kept, Kind, RETENTION, encoded, noon, pools, seqs};
use weir::clock;
use weir::store::audit::batch::{Batch, Boot};
use weir::store::audit::chain::{Hasher, Keys};
use weir::store::audit::days::Day;
use weir::store::audit::events::Events;
use weir::store::audit::{FaultKind, Filter};
use weir::store::postgres::{Reader, partitions, write};
use weir::store::sqlite;

crate::in_each_store!(
    an_untouched_store_has_no_faults,
    another_key_is_told_apart_from_damage,
    a_changed_and_a_removed_row_are_named,
    days_that_retention_removed_are_not_missed,
);

fn an_untouched_store_has_no_faults(kind: Kind) {
    let (kept, mut process) = Kept::with(kind, 1_000);
    kept.append(&mut process, 1_001..=1_010, noon() + DAY);
    let mut other = kept.process("b");
    kept.append(&mut other, 1..=3, noon() + DAY);
    kept.end(process);
    let report = kept.verify(KEY);
    assert_eq!(report.faults, []);
    // A boot that goes on in the next day's file is counted in each.
    let (boots, dropped) = match kind {
        Kind::Sqlite => (3, 0),
        Kind::Postgres => (2, 6),
    };
    let read = (
        report.events,
        report.instances,
        report.files,
        report.dropped,
    );
    assert_eq!(read, (1_013, boots, 2, dropped));
    // The other still runs.
    let open: Vec<_> = report.open.iter().map(|boot| &boot[..2]).collect();
    assert_eq!(
        open,
        if kind == Kind::Sqlite {
            vec![]
        } else {
            vec!["b/"]
        }
    );
}

fn another_key_is_told_apart_from_damage(kind: Kind) {
    let (kept, process) = Kept::with(kind, 300);
    kept.end(process);
    for keys in [&[&b"another"[..]][..], &[]] {
        let report = kept.block(kept.events().verify(&Keys::new(keys)));
        let report = report.unwrap();
        let kinds: BTreeSet<_> = report.faults.iter().map(|fault| fault.kind).collect();
        assert!(kinds.contains(&FaultKind::Key), "{kinds:?}");
        assert!(!kinds.contains(&FaultKind::Changed), "{kinds:?}");
    }
}

fn a_changed_and_a_removed_row_are_named(kind: Kind) {
    let check = |what: &str, expected: FaultKind, seq: u64| {
        let (kept, process) = Kept::with(kind, 600);
        kept.end(process);
        let (sqlite, postgres) = (
            what.replace("username", "user"),
            what.replace("events", "weir.audit_events"),
        );
        kept.sql(&sqlite, &postgres);
        let faults = kept.faults();
        let [(seqs, kind)] = faults.as_slice() else {
            panic!("{what}: {faults:?}");
        };
        assert_eq!(*kind, expected, "{what}");
        assert!(seqs.contains(&seq), "{what}: {seqs:?}");
    };
    check(
        "UPDATE events SET username = 'eve' WHERE seq = 250",
        FaultKind::Changed,
        250,
    );
    check(
        "UPDATE events SET time = NULL WHERE seq = 0; UPDATE events SET label = 'x' WHERE seq = 7",
        FaultKind::Changed,
        7,
    );
    check(
        "DELETE FROM events WHERE seq BETWEEN 150 AND 250",
        FaultKind::Missing,
        200,
    );
    check("DELETE FROM events WHERE seq = 1", FaultKind::Missing, 1);
}

/// As behind a way back to the version before.
#[test]
fn what_a_later_weir_has_stored_is_not_taken_for_changed() {
    let (kept, process) = Kept::with(Kind::Postgres, 600);
    kept.end(process);
    let version = |version: u8, seqs: &str| {
        let sql = format!("UPDATE weir.audit_events SET detail = set_byte(detail, 1, {version})");
        kept.sql("", &format!("{sql} WHERE seq BETWEEN {seqs}"));
        let faults = kept.verify(KEY).faults.into_iter();
        let said = faults.map(|fault| fault.to_string());
        said.collect::<Vec<_>>()
    };
    let check = |said: Vec<String>, expected: &str| {
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].ends_with(expected), "{said:?}");
    };
    check(
        version(3, "201 AND 400"),
        "events 201 to 400: not checked: made by a weir of another version",
    );
    // No process makes a batch by two versions, nor any by what is none.
    check(version(2, "250 AND 250"), "events 201 to 400: changed");
    check(version(32, "201 AND 400"), "events 201 to 400: changed");
}

#[test]
fn each_tampering_in_postgres_is_named_with_its_events() {
    use FaultKind::{
        Changed, EndMark, Instance, InstanceMissing, Missing, OutOfPlace, TailMissing,
    };
    // Batches of 200: 1 to 200, 201 to 400, 401 to 600; the end mark is behind 600.
    let check = |sql: &str, expected: &[(RangeInclusive<u64>, FaultKind)]| {
        let (kept, process) = Kept::with(Kind::Postgres, 600);
        kept.end(process);
        kept.sql("", sql);
        assert_eq!(kept.faults(), expected, "{sql}");
    };
    let whole = |first: u64, kind: FaultKind| (first..=first + 199, kind);
    check("SELECT 1", &[]);
    check(
        "UPDATE weir.audit_boots SET instance = 'other', started = '-infinity'",
        &[(0..=0, Instance)],
    );
    check(
        "INSERT INTO weir.audit_events SELECT day, boot_id, seq, time, client, username, label, route, method, path, status, -9223372036854775808, detail
         FROM weir.audit_events WHERE seq = 7",
        &[(7..=7, OutOfPlace)],
    );
    for column in [
        "username = 'eve'",
        "route = NULL",
        "status = 500",
        "time = time + '1 microsecond'",
        "client = '10.9.9.9'",
        "path = path || '/'",
        "method = 'PUT'",
        "label = 'x'",
        "detail = detail || '\\x00'",
        "detail = ''",
        "detail = '\\x02'",
        "client = '10.0.0.0/8'",
        "time = '1969-01-01'",
    ] {
        let sql = format!("UPDATE weir.audit_events SET {column} WHERE seq = 250");
        check(&sql, &[whole(201, Changed)]);
    }
    // Where a column cannot hold what was written, as of the event with NUL in its user.
    check(
        "UPDATE weir.audit_events SET username = 'nul?' WHERE seq = 5",
        &[whole(1, Changed)],
    );
    check(
        "UPDATE weir.audit_events SET seq = CASE seq WHEN 7 THEN 8 ELSE 7 END WHERE seq IN (7, 8)",
        &[whole(1, Changed)],
    );
    check(
        "UPDATE weir.audit_events SET seq = CASE seq WHEN 7 THEN 500 ELSE 7 END WHERE seq IN (7, 500)",
        &[
            (7..=7, Missing),
            (500..=500, OutOfPlace),
            (7..=7, OutOfPlace),
            (500..=500, Missing),
        ],
    );
    check(
        "DELETE FROM weir.audit_events WHERE seq IN (7, 9) OR seq BETWEEN 150 AND 450",
        &[(7..=7, Missing), (9..=9, Missing), (150..=450, Missing)],
    );
    check(
        "INSERT INTO weir.audit_events SELECT * FROM weir.audit_events WHERE seq = 7",
        &[(7..=7, OutOfPlace)],
    );
    check(
        "INSERT INTO weir.audit_events SELECT day, boot_id, seq + 1000, time, client, username, label, route, method, path, status, arrival, detail
         FROM weir.audit_events WHERE seq BETWEEN 1 AND 9",
        &[(1_001..=1_009, OutOfPlace)],
    );
    check(
        "UPDATE weir.audit_events SET boot_id = boot_id + 1 WHERE seq = 7",
        &[(7..=7, Missing), (7..=7, OutOfPlace)],
    );
    check(
        "UPDATE weir.audit_batches SET hash = '\\x00' WHERE first = 201",
        &[whole(201, Changed)],
    );
    check(
        "UPDATE weir.audit_batches SET before = '\\x00' WHERE first = 201",
        &[whole(201, Changed)],
    );
    check(
        "UPDATE weir.audit_batches SET dropped = 0 WHERE first = 201",
        &[whole(201, Changed)],
    );
    check(
        "UPDATE weir.audit_batches SET sealed = sealed - interval '1 second' WHERE first = 201",
        &[whole(201, Changed)],
    );
    check(
        "DELETE FROM weir.audit_batches WHERE first = 201; DELETE FROM weir.audit_events WHERE seq BETWEEN 201 AND 400",
        &[whole(201, Missing)],
    );
    check(
        "DELETE FROM weir.audit_batches WHERE first = 201",
        &[whole(201, OutOfPlace), whole(201, Missing)],
    );
    check(
        "DELETE FROM weir.audit_batches WHERE first = 1; DELETE FROM weir.audit_events WHERE seq <= 200",
        &[whole(1, Missing)],
    );
    check(
        "DELETE FROM weir.audit_batches WHERE first = 401; DELETE FROM weir.audit_events WHERE seq > 400",
        &[whole(401, TailMissing)],
    );
    check(
        "UPDATE weir.audit_batches SET dropped = 0 WHERE is_end",
        &[(0..=0, EndMark)],
    );
    check(
        "UPDATE weir.audit_batches SET is_end = true WHERE first = 201",
        &[(0..=0, EndMark)],
    );
    check(
        "UPDATE weir.audit_boots SET instance = 'b'",
        &[(0..=0, Instance)],
    );
    check(
        "UPDATE weir.audit_boots SET started = started - interval '1 second'",
        &[(0..=0, Instance)],
    );
    check(
        "UPDATE weir.audit_boots SET removed_to = 200, removed_hash = (SELECT hash FROM weir.audit_batches WHERE first = 1), removed_mark = '\\x00';
         DELETE FROM weir.audit_batches WHERE first = 1; DELETE FROM weir.audit_events WHERE seq <= 200",
        &[(0..=0, Instance), whole(1, Missing)],
    );
    check(
        "DELETE FROM weir.audit_boots",
        &[(1..=600, InstanceMissing)],
    );
    // Nor do queries find what no span tells of.
    check("DELETE FROM weir.audit_spans", &[(0..=0, FaultKind::File)]);
    check(
        "UPDATE weir.audit_spans SET day = day - 1",
        &[(0..=0, FaultKind::File)],
    );
    // A partition of another kind hides from queries what is in it.
    check(
        "CREATE TABLE weir.odd PARTITION OF weir.audit_events DEFAULT",
        &[(0..=0, FaultKind::File)],
    );
    // So does a view in the table's place, which tells who asks by how.
    check(
        "ALTER TABLE weir.audit_events RENAME TO kept;
         CREATE VIEW weir.audit_events AS SELECT * FROM weir.kept WHERE current_query() LIKE '%ORDER BY arrival, boot_id, seq'",
        &[(0..=0, FaultKind::Veiled)],
    );
}

/// One of a killed process by its heir, while what the killed one had sent last was still on its way.
/// End marks have no events, by whose number a worker bounds what it stores at once.
#[test]
fn more_boots_than_a_worker_remembers_are_stored_at_once() {
    let kept = Kept::new(Kind::Postgres);
    let mut writer = write::Writer::new(kept.pools().clone(), RETENTION);
    let end = |_| {
        let id = clock::uuid(noon());
        let boot = Boot::new("a".into(), id, noon().into(), Hasher::new(Some(KEY)));
        { boot }.end(noon().into(), 0).1
    };
    let ends: Vec<_> = (0..10_001).map(end).collect();
    let packed: Vec<_> = ends.iter().map(AsRef::as_ref).collect();
    kept.store(&mut writer, &packed);
    kept.append(&mut kept.process("b"), 1..=5, noon());
    assert_eq!(kept.faults(), []);
}

#[test]
fn an_end_mark_that_came_too_early_is_no_fault() {
    let kept = Kept::new(Kind::Postgres);
    let hasher = || Hasher::new(Some(KEY));
    let mut boot = Boot::new("a".into(), clock::uuid(noon()), noon().into(), hasher());
    let mut writer = write::Writer::new(kept.pools().clone(), RETENTION);
    let mut pack = |range| boot.pack(&mut [encoded(range)], noon().into(), 0);
    let (first, bytes) = pack(1..=5);
    let (_, late) = pack(6..=9);
    let (_, end) = Boot::resume(&first, hasher())
        .unwrap()
        .end(noon().into(), 0);
    kept.store(&mut writer, &[&bytes, &end]);
    assert_eq!(kept.verify(KEY).open, [""; 0]);
    kept.store(&mut writer, &[&late]);
    let report = kept.verify(KEY);
    assert_eq!((report.events, report.faults), (9, vec![]));
    // More may have followed, which nothing would miss.
    assert_eq!(report.open.len(), 1);
    // Of a day that retention removes, the chain goes on from its last events.
    kept.block(async {
        let next = boot
            .pack(&mut [encoded(10..=12)], (noon() + DAY).into(), 0)
            .1;
        writer.store(&[&Batch::open(&next).unwrap()]).await.unwrap();
        kept.remove(Day::of(noon())).await;
    });
    assert_eq!(kept.faults(), []);
}

#[test]
fn what_was_written_under_several_keys_is_checked_under_each() {
    const OLD: &[u8] = b"the key before";
    let kept = Kept::new(Kind::Postgres);
    let mut writer = write::Writer::new(kept.pools().clone(), RETENTION);
    let mut store = |key: &[u8], name: &str| {
        let hasher = Hasher::new(Some(key));
        let mut boot = Boot::new(name.into(), clock::uuid(noon()), noon().into(), hasher);
        let today = boot.pack(&mut [encoded(1..=5)], noon().into(), 0).1;
        let tomorrow = (noon() + DAY).into();
        let next = boot.pack(&mut [encoded(6..=9)], tomorrow, 0).1;
        kept.store(&mut writer, &[&today, &next, &boot.end(tomorrow, 0).1]);
    };
    store(OLD, "old");
    store(KEY, "new");
    let faults = |keys: &[&[u8]]| {
        let report = kept.block(kept.events().verify(&Keys::new(keys)));
        let faults = report.unwrap().faults.into_iter();
        Vec::from_iter(faults.map(|fault| (fault.kind, fault.instance.starts_with("old/"))))
    };
    assert_eq!(faults(&[KEY, OLD]), []);
    assert_eq!(faults(&[KEY]), [(FaultKind::Key, true)]);
    // A worker has today's key alone.
    kept.block(kept.remove(Day::of(noon())));
    assert_eq!(faults(&[KEY, OLD]), []);
    kept.sql(
        "",
        "UPDATE weir.audit_events SET username = 'eve' WHERE seq = 6",
    );
    assert_eq!(
        faults(&[KEY, OLD]),
        [(FaultKind::Changed, true), (FaultKind::Changed, false)]
    );
}

/// A boot's own end mark reached Redis, but not its spool: its heir has made another.
#[test]
fn a_second_end_mark_behind_the_same_batch_is_known() {
    let kept = Kept::new(Kind::Postgres);
    let hasher = || Hasher::new(Some(KEY));
    let mut boot = Boot::new("a".into(), clock::uuid(noon()), noon().into(), hasher());
    let mut writer = write::Writer::new(kept.pools().clone(), RETENTION);
    let (header, bytes) = boot.pack(&mut [encoded(1..=5)], noon().into(), 0);
    let end_of = |header, after: u64, dropped| {
        let mut boot = Boot::resume(header, hasher()).unwrap();
        let at = noon() + Duration::from_secs(after);
        boot.end(at.into(), dropped).1
    };
    kept.store(&mut writer, &[&bytes, &end_of(&header, 1, 0)]);
    let mut outcome = |end: &[u8]| {
        let end = Batch::open(end).unwrap();
        kept.block(writer.store(&[&end])).unwrap().remove(0)
    };
    assert_eq!(outcome(&end_of(&header, 60, 3)), write::Outcome::Known);
    // One that follows another batch is none of this boot's.
    let mut other = header.clone();
    other.hash[0] ^= 1;
    let refused = outcome(&end_of(&other, 60, 0));
    assert!(matches!(refused, write::Outcome::Refused(_)), "{refused:?}");
    let report = kept.verify(KEY);
    assert_eq!((report.faults, report.open), (vec![], vec![]));
}

/// A boot's batches travel by several streams, and are stored by several workers.
#[test]
fn what_is_missing_ahead_of_a_new_batch_is_on_its_way_and_ahead_of_an_old_one_a_fault() {
    let check = |now: Duration, pending: u64, faults: &[(RangeInclusive<u64>, FaultKind)]| {
        let kept = Kept::new(Kind::Postgres);
        let hasher = Hasher::new(Some(KEY));
        let mut boot = Boot::new("a".into(), clock::uuid(noon()), noon().into(), hasher);
        let mut writer = write::Writer::new(kept.pools().clone(), RETENTION);
        let batches = [1..=5, 6..=9, 10..=12, 13..=14]
            .map(|range| boot.pack(&mut [encoded(range)], now.into(), 0).1);
        let end = boot.end(now.into(), 0).1;
        kept.store(&mut writer, &[&batches[0], &batches[2], &end]);
        let found = kept.verify(KEY);
        let named = found.faults.iter().map(|it| (it.seqs.clone(), it.kind));
        assert_eq!(named.collect::<Vec<_>>(), faults);
        assert_eq!(found.pending, pending);
        let (code, said) = kept.weir(&["verify"]);
        assert_eq!(code, Some(i32::from(!faults.is_empty())), "{said}");
        let told = format!("{pending} events are on their way");
        assert_eq!(said.contains(&told), pending > 0, "{said}");

        kept.store(&mut writer, &[&batches[3], &batches[1]]);
        let found = kept.verify(KEY);
        assert_eq!((found.faults, found.pending), (vec![], 0));
    };
    check(clock::wall(), 6, &[]);
    let missing = [
        (6..=9, FaultKind::Missing),
        (13..=14, FaultKind::TailMissing),
    ];
    check(clock::wall() - Duration::from_secs(600), 0, &missing);
}

/// What cannot be proved is at least told.
#[test]
fn a_boot_without_an_end_mark_is_named_as_open() {
    let (kept, process) = Kept::with(Kind::Postgres, 600);
    kept.end(process);
    assert_eq!(kept.verify(KEY).open, [""; 0]);
    kept.sql("", "DELETE FROM weir.audit_batches WHERE is_end");
    let report = kept.verify(KEY);
    assert_eq!((report.faults, report.open.len()), (vec![], 1));
    let (code, said) = kept.weir(&["verify"]);
    assert_eq!(code, Some(0));
    assert!(said.contains("still runs, or was killed"), "{said}");
}

#[test]
fn a_boot_that_lost_all_it_had_is_named() {
    let (kept, process) = Kept::with(Kind::Postgres, 600);
    let idle = kept.process("idle");
    kept.end(process);
    kept.end(idle);
    let day = Day::of(noon());
    kept.block(async {
        let connection = kept.pools().write().await.unwrap();
        let today = partitions::today(&connection).await.unwrap();
        // What it had, with its day, is noted by retention; of a boot without events there is nothing left to note.
        for day in day.0..=today.0 {
            kept.remove(Day(day)).await;
        }
    });
    let report = kept.verify(KEY);
    assert_eq!(report.open, [""; 0]);
    // Nor of one that has ended, all of which retention has removed.
    assert_eq!(report.instances, 0);

    let (kept, process) = Kept::with(Kind::Postgres, 600);
    kept.end(process);
    kept.sql("", "TRUNCATE weir.audit_events, weir.audit_batches");
    let report = kept.verify(KEY);
    assert_eq!((report.faults, report.open.len()), (vec![], 1));
}

#[test]
fn batches_follow_a_clock_that_is_set_right() {
    let kept = Kept::new(Kind::Postgres);
    let mut process = kept.process("a");
    for (first, ahead) in [(1, 0), (101, 3), (201, 0), (301, 1)] {
        kept.append(&mut process, first..=first + 99, noon() + ahead * DAY);
    }
    kept.end(process);
    let database = kept.database.as_ref().unwrap();
    let day = Day::of(noon());
    let days = database.one(&format!(
        "SELECT string_agg((day - DATE '{day}')::text, ' ' ORDER BY first, is_end) FROM weir.audit_batches"
    ));
    assert_eq!(days, "0 3 0 1 1");
    let read = || {
        let report = kept.verify(KEY);
        (report.events, report.faults)
    };
    assert_eq!(read(), (400, vec![]));
    for (day, left) in [(day.0, 200), (day.0 + 1, 100), (day.0 + 3, 0)] {
        kept.block(kept.remove(Day(day)));
        assert_eq!(read(), (left, vec![]));
    }
}

#[test]
fn days_are_told_however_the_server_reads_texts() {
    let (kept, process) = Kept::with(Kind::Postgres, 10);
    kept.end(process);
    let database = kept.database.as_ref().unwrap();
    for setting in [
        "standard_conforming_strings = off",
        "DateStyle = 'SQL, DMY'",
    ] {
        database.query(&format!("ALTER DATABASE {} SET {setting}", database.name));
    }
    let events = Events::Postgres(Reader::new(pools(&database.url())));
    let report = kept.block(events.verify(&Keys::new(&[KEY]))).unwrap();
    assert_eq!((report.events, report.faults), (10, vec![]));
}

fn days_that_retention_removed_are_not_missed(kind: Kind) {
    let kept = Kept::new(kind);
    let mut process = kept.process("a");
    for day in 0..4 {
        let first = u64::from(day) * 100 + 1;
        kept.append(&mut process, first..=first + 99, noon() + day * DAY);
    }
    kept.end(process);
    match kind {
        Kind::Sqlite => {
            let files = sqlite::Files::new(&kept.path, Some(KEY));
            let mut removed = 0;
            files
                .remove_old(2 * DAY, noon() + 3 * DAY, |_| removed += 1)
                .unwrap();
            assert_eq!(removed, 1);
        }
        Kind::Postgres => kept.block(kept.remove(Day::of(noon()))),
    }
    let report = kept.verify(KEY);
    assert_eq!((report.events, report.faults), (300, vec![]));
    assert_eq!(
        seqs(&kept.query(&Filter::default())),
        (101..=400).collect::<Vec<_>>()
    );
}
