//! The audit's files of several days: each event in its day's, in order over all, and what retention removed told from what others
//! did.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::harness::sqlite::{
    Audit, DAY, KEY, NOW, RETENTION, batch, close, event, events, lock, numbered, remove_old, seqs,
    today,
};
use super::harness::{PATIENCE, eventually};
use rusqlite::Connection;
use weir::config::audit::Delivery;
use weir::event::{Encoded, Micros};
use weir::store::audit::chain::Keys;
use weir::store::audit::days::{self, Day};
use weir::store::audit::{FaultKind, Filter, Order, StoreError};
use weir::store::sqlite::{Files, Reader, Writer};

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
    // Nor is an event of a day in the file of one before.
    let mut late = Encoded::default();
    late.push(&numbered(Micros::from(midnight + DAY), 1));
    writer.append(&mut [late], midnight).unwrap();
    assert_eq!(counts(midnight + DAY), [6]);
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
    let report = audit.reader().verify(&Keys::new(&[KEY])).unwrap();
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
    let report = audit.reader().verify(&Keys::new(&[KEY])).unwrap();
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

/// What is of many events is not sorted for each page, but looked for where it may be.
#[test]
fn pages_of_a_part_of_a_closed_day_join_without_a_gap() {
    let audit = Audit::empty();
    let mut writer = audit.writer();
    for first in (1..=24_000).step_by(1_000) {
        writer
            .append(&mut events(first..=first + 999), NOW)
            .unwrap();
    }
    // As of a connection that was open for long: behind events that are later than it.
    writer.append(&mut events(1_000..=1_000), NOW).unwrap();
    writer.append(&mut events(1..=1), NOW + DAY).unwrap();
    assert_eq!(close(writer.files()).len(), 1);
    let check = |first: Option<u64>, last: Option<u64>| {
        for order in [Order::OldestFirst, Order::NewestFirst] {
            let mut filter = Filter {
                since: first.map(|n| event(n).time),
                until: last.map(|n| event(n + 1).time),
                limit: Some(3_000),
                order,
                ..Filter::default()
            };
            let mut found = Vec::new();
            loop {
                let page = audit.reader().query(&filter).unwrap();
                let Some(place) = page.last().map(|last| Some(last.cursor)) else {
                    break;
                };
                found.extend(page.iter().map(|stored| stored.event.bytes_out));
                match order {
                    Order::OldestFirst => filter.after = place,
                    Order::NewestFirst => filter.before = place,
                }
            }
            if order == Order::NewestFirst {
                found.reverse();
            }
            let (first, last) = (first.unwrap_or(1), last.unwrap_or(24_000));
            let has = |n: &u64| (first..=last).contains(n);
            let all = (1..=24_000).chain([1_000, 1]).filter(has);
            assert_eq!(found, all.collect::<Vec<_>>(), "{first} to {last}");
        }
    };
    check(None, None);
    check(Some(500), None);
    check(None, Some(21_000));
    check(Some(500), Some(21_000));
    check(Some(2_000), Some(23_000));
    check(Some(5_000), Some(5_100));
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

/// Who can write to a file can have queries pass over events that are there.
#[test]
fn what_hides_events_from_queries_is_named() {
    let check = |sql: &str, found: usize| {
        let audit = three_days();
        assert_eq!(close(&Files::new(&audit.path, Some(KEY))).len(), 2);
        assert_eq!(audit.faults(), []);
        let of_bob = Filter {
            user: Some("bob".to_owned()),
            ..Filter::default()
        };
        audit.sql_at(NOW + DAY, sql);
        assert_eq!(audit.reader().query(&of_bob).unwrap().len(), found, "{sql}");
        assert_eq!(audit.faults(), [(0..=0, FaultKind::File)], "{sql}");
    };
    check(
        "DROP INDEX events_user;
         CREATE INDEX events_user ON events (user) WHERE user IS NOT NULL AND user <> 'bob';
         PRAGMA writable_schema = ON;
         UPDATE sqlite_schema SET sql = 'CREATE INDEX events_user ON events (user) WHERE user IS NOT NULL'
         WHERE name = 'events_user'",
        200,
    );
    // What a view shows may depend on much.
    check(
        "DROP INDEX events_user; ALTER TABLE events RENAME TO kept;
         CREATE VIEW events AS SELECT arrival, instance_id, seq, time, user, client, label, body, hash FROM kept",
        300,
    );
}

#[test]
fn a_removed_file_is_named_with_its_events() {
    let check = |day: u32, expected: &str| {
        let audit = three_days();
        std::fs::remove_file(audit.file(NOW + day * DAY)).unwrap();
        let faults = audit.reader().verify(&Keys::new(&[KEY])).unwrap().faults;
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
    let report = audit.reader().verify(&Keys::new(&[KEY])).unwrap();
    assert_eq!(
        (report.events, report.files, report.faults),
        (37, 4, vec![])
    );
    std::fs::remove_file(audit.file(NOW + 2 * DAY)).unwrap();
    assert_eq!(audit.faults(), [(21..=30, FaultKind::FileMissing)]);
    std::fs::remove_file(audit.file(NOW)).unwrap();
    let faults = audit.reader().verify(&Keys::new(&[KEY])).unwrap().faults;
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
    let report = reader.verify(&Keys::new(&[KEY])).unwrap();
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
    let said = audit.reader().verify(&Keys::new(&[KEY])).unwrap().faults[0].to_string();
    assert_eq!(said, "file of 2023-11-17 missing");
}

#[test]
fn days_that_are_over_are_closed_beside_the_writing() {
    let audit = Audit::empty();
    let today = today();
    let mut writer = audit.writer_at(today - DAY);
    writer.append(&mut events(1..=5), today - DAY).unwrap();
    let (recorder, worker) =
        weir::audit::sqlite::start(writer, 2_000, Delivery::BestEffort, RETENTION).unwrap();
    recorder.record(batch(6..=6));
    let indexes = || {
        let file = Connection::open(audit.file(today - DAY)).unwrap();
        let sql = "SELECT count(*) FROM sqlite_schema WHERE type = 'index'";
        file.query_row(sql, [], |row| row.get::<_, u32>(0)).unwrap()
    };
    eventually(|| indexes() > 0);
    worker.stop(PATIENCE);
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
    let report = audit.reader().verify(&Keys::new(&[KEY])).unwrap();
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
    let today = today();
    let mut writer = audit.writer_at(today - 9 * DAY);
    for ago in [9, 4, 3] {
        let now = today - ago * DAY;
        writer.append(&mut events(1..=5), now).unwrap();
    }
    let (recorder, worker) =
        weir::audit::sqlite::start(writer, 2_000, Delivery::BestEffort, RETENTION).unwrap();
    eventually(|| recorder.counts().removed_files == 2);
    recorder.record(batch(6..=6));
    eventually(|| recorder.counts().written == 1);
    worker.stop(PATIENCE);
    assert_eq!(days::list(&audit.path).unwrap().len(), 2);
    assert_eq!(audit.faults(), []);
}
