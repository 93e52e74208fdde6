//! What becomes of a day that is over: its file is closed, and in the end removed. On connections of its own, beside a
//! writer.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, TransactionBehavior, params};

use super::{Ledger, check_version, open_if_made, open_to_read, signed, sort_beside, with_ending};
use crate::store::audit::StoreError;
use crate::store::audit::chain::{FileId, Hasher};
use crate::store::audit::days::{self, Day};

/// Locks are held for long by whoever else closes the same file.
const BUSY: Duration = Duration::from_secs(5);

/// For the sorting of an index, in KiB; what does not fit goes to temporary files.
const CACHE: i64 = 16 * 1024;

const INDEXES: i64 = 4;

/// What the reserve has: room for the pages of a note, and for the 32 KiB that SQLite wants where nobody else has the file open.
const RESERVE: usize = 512 * 1024;

/// A clock that is more days beyond the newest file before is doubted.
const LEAP: u32 = 3;

// For what picks few of a day's events. The number of the row, which is the order of arrival, is the last part of every
// index of SQLite: what one user did comes out in order without sorting. Routes, methods, statuses and the beginnings of
// paths pick so many that reading in the order of arrival soon finds them.
//
// Measured by `cargo bench --bench sqlite` on 2 cores of a virtual machine that were shared, a day of
// 500,000 events, 50,000 users: closed in 0.65 to 0.98 s, 359 B a row before and 428 B after; one user's events in 58 to
// 85 ms before and 0.5 to 1.0 ms after. Kept up while writing instead, by Python's sqlite3 with the same tables and
// batches of 500: 5.5 us a row without an index, 32 with that of users alone, 45 with all four.
pub(super) const CLOSE: &str = "
CREATE INDEX IF NOT EXISTS events_time ON events (time);
CREATE INDEX IF NOT EXISTS events_user ON events (user) WHERE user IS NOT NULL;
CREATE INDEX IF NOT EXISTS events_client ON events (client);
CREATE INDEX IF NOT EXISTS events_label ON events (label) WHERE label IS NOT NULL;
PRAGMA analysis_limit = 1000;
ANALYZE;
";

/// The files of a path, all under one key.
#[derive(Clone)]
pub struct Files {
    pub(super) path: PathBuf,
    pub(super) hasher: Hasher,
}

impl Files {
    /// `path` as the configuration has it, without a day.
    pub fn new(path: &Path, key: Option<&[u8]>) -> Files {
        Files {
            path: path.to_owned(),
            hasher: Hasher::new(key),
        }
    }

    /// Closes every day before the newest that is not closed yet: says in its file which file followed it, and makes
    /// the indexes that queries want. Tells `done` of each. Can take seconds for a day of millions of events; a file
    /// that fails does not keep others from being closed.
    pub fn close_days(&self, mut done: impl FnMut(Day)) -> Result<(), StoreError> {
        let files = self.databases()?;
        let mut failed = None;
        for ((day, file), (next_day, next)) in files.iter().zip(files.iter().skip(1)) {
            let close = || -> Result<bool, StoreError> {
                if is_closed(&open_to_read(file)?)? {
                    return Ok(false);
                }
                let next = open_to_read(next).and_then(|next| Ledger::read(&next));
                let next = next.map_err(|error| error.of_day(*next_day))?.file;
                self.close(file, *next_day, &next)?;
                Ok(true)
            };
            match close() {
                Ok(true) => done(*day),
                Ok(false) => {}
                Err(error) => failed = Some(told_of(*day, error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Removes the files of days that ended longer than `retention`, of whole days, before `now`, the time since the Unix
    /// epoch; the newest is always kept. Each is noted in the newest first, so that `verify` does not miss it. Tells
    /// `done` of each. A file that fails does not keep others from being removed.
    pub fn remove_old(
        &self,
        retention: Duration,
        now: Duration,
        mut done: impl FnMut(Day),
    ) -> Result<(), StoreError> {
        let kept_from = Day::of(now.saturating_sub(retention));
        let made = self.databases()?;
        let mut failed = None;
        let Some((newest, older)) = made.split_last() else {
            return Ok(());
        };
        for (day, file) in older.iter().filter(|(day, _)| *day < kept_from) {
            match self.remove(file, newest) {
                Ok(()) => done(*day),
                Err(error) => failed = Some(told_of(*day, error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// The newest day with a file before that of `now`, where so many days lie between that the clock may be wrong, and
    /// [`Files::remove_old`] would remove something. Whoever has just begun has made the file of `now` itself.
    pub fn leap(&self, retention: Duration, now: Duration) -> Result<Option<Day>, StoreError> {
        let today = Day::of(now);
        let kept_from = Day::of(now.saturating_sub(retention));
        let made = self.databases()?;
        let due = made.first().is_some_and(|(day, _)| *day < kept_from);
        let before = made.iter().map(|(day, _)| *day).rfind(|day| *day < today);
        Ok(before.filter(|day| due && today.0 - day.0 > LEAP))
    }

    /// The newest file, if it is of a day that has not come yet by `now`, by more than a day.
    pub fn ahead(&self, now: Duration) -> Result<Option<(Day, PathBuf)>, StoreError> {
        let newest = self.databases()?.pop();
        Ok(newest.filter(|(day, _)| day.0 > Day::of(now).0.saturating_add(1)))
    }

    /// Keeps some room beside the files, which is let go where a full disk has not a page for the note of a removed day. Nothing is done
    /// about a disk that has not so much: it is looked at with each day.
    pub fn keep_reserve(&self) {
        let path = self.reserve();
        if path.exists() {
            return;
        }
        let mut bytes = vec![0; RESERVE];
        // Random: file systems that compress would keep no room for zeros.
        fastrand::fill(&mut bytes);
        let mut options = fs::OpenOptions::new();
        let file = options.create_new(true).write(true).mode(0o600).open(&path);
        if let Ok(mut file) = file
            && file.write_all(&bytes).is_err()
        {
            let _ = fs::remove_file(path);
        }
    }

    fn reserve(&self) -> PathBuf {
        with_ending(&self.path, ".reserve")
    }

    fn remove(&self, file: &Path, newest: &(Day, PathBuf)) -> Result<(), StoreError> {
        match self.try_to_remove(file, newest) {
            Err(StoreError::Full) if fs::remove_file(self.reserve()).is_ok() => {
                self.try_to_remove(file, newest)
            }
            done => done,
        }
    }

    fn try_to_remove(&self, file: &Path, (day, newest): &(Day, PathBuf)) -> Result<(), StoreError> {
        let old = Ledger::read(&open_to_read(file)?)?;
        let noted = self.note_removed(&old, newest);
        noted.map_err(|error| error.of_day(*day))?;
        // The database last: without it, nobody would find the others again.
        for ending in ["-wal", "-shm", ""] {
            match fs::remove_file(with_ending(file, ending)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        Ok(())
    }

    /// Says in the newest file that one goes.
    fn note_removed(&self, old: &Ledger, newest: &Path) -> Result<(), StoreError> {
        let mut connection = open_to_write(newest)?;
        let this = Ledger::read(&connection)?.file;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mark = self.hasher.removed(&this, old.day, old.place, &old.file);
        // Noted already if a crash kept the file from being removed.
        transaction.execute(
            "INSERT INTO removed SELECT ?1, ?2, ?3, ?4 WHERE NOT EXISTS (SELECT 1 FROM removed WHERE file = ?3)",
            params![old.day.0, signed(old.place), old.file, mark],
        )?;
        transaction.commit()?;
        Ok(())
    }

    /// The files that are databases, in the order of their days.
    fn databases(&self) -> Result<Vec<(Day, PathBuf)>, StoreError> {
        let mut made = Vec::new();
        for (day, file) in days::list(&self.path)? {
            // One that cannot be read fails when its turn comes.
            if !matches!(open_if_made(&file), Ok(None)) {
                made.push((day, file));
            }
        }
        Ok(made)
    }

    fn close(&self, file: &Path, next_day: Day, next: &FileId) -> Result<(), StoreError> {
        let mut connection = open_to_write(file)?;
        let this = Ledger::read(&connection)?.file;
        // First, since it may prove something and costs nothing.
        connection.execute(
            "UPDATE ledger SET next_day = ?1, next_file = ?2, next_mark = ?3 WHERE next_mark IS NULL",
            params![next_day.0, next, self.hasher.followed(&this, next_day, next)],
        )?;
        connection.pragma_update(None, "cache_size", -CACHE)?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(CLOSE)?;
        transaction.commit()?;
        // So that the day is one file, which can be copied away. Not possible while another has it open, and not needed.
        let _ = connection.pragma_update(None, "journal_mode", "DELETE");
        Ok(())
    }
}

fn is_closed(connection: &Connection) -> Result<bool, StoreError> {
    let indexes: i64 = connection.query_row(
        "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND name LIKE 'events\\_%' ESCAPE '\\'",
        [],
        |row| row.get(0),
    )?;
    Ok(indexes >= INDEXES && Ledger::read(connection)?.next_mark.is_some())
}

/// Opens an existing file, beside others that have it open.
fn open_to_write(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    // What is noted here must outlive a power cut: the file that it is about is unlinked next, and `verify` would miss it.
    connection.pragma_update(None, "synchronous", "FULL")?;
    check_version(&connection)?;
    sort_beside(&connection, path);
    Ok(connection)
}

/// An error that is of a day, of this one where it has none.
fn told_of(day: Day, error: StoreError) -> StoreError {
    match error {
        StoreError::OfDay(..) => error,
        error => StoreError::OfDay(day, error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Writer;
    use super::super::read::{part, select};
    use super::*;
    use crate::event::{AuditEvent, Encoded, Micros};
    use crate::store::audit::{Cursor, Filter, Order};

    /// The first microseconds of a day.
    const NOW: Duration = Duration::from_secs(20_000 * 86_400);

    fn event(n: u64) -> AuditEvent {
        AuditEvent {
            time: Micros(Micros::from(NOW).0 + n),
            client: std::net::Ipv4Addr::from_bits(u32::try_from(n % 100).unwrap()).into(),
            user: Some(format!("user-{}", n % 100)),
            label: n.is_multiple_of(100).then(|| "rate_limited".into()),
            ..AuditEvent::sample()
        }
    }

    fn events(range: std::ops::Range<u64>) -> [Encoded; 1] {
        let mut events = Encoded::default();
        range.for_each(|n| events.push(&event(n)));
        [events]
    }

    #[test]
    fn queries_of_a_closed_day_use_its_indexes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        let mut writer = Writer::open(&path, "a", None, NOW).unwrap();
        let mut events = events(0..25_000);
        writer.append(&mut events, NOW).unwrap();
        let day = days::file(&path, Day::of(NOW));
        let plan = |filter: &Filter| {
            let connection = open_to_read(&day).unwrap();
            let earliest = Ledger::read(&connection).unwrap().earliest;
            let part = part(&connection, filter, Day::of(NOW), earliest).unwrap();
            let (sql, values) = select(filter, &part);
            let mut plan = connection
                .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
                .unwrap();
            let rows = plan.query_map(rusqlite::params_from_iter(values), |row| {
                row.get::<_, String>(3)
            });
            rows.unwrap().map(Result::unwrap).collect::<Vec<_>>()
        };
        let text = |text: &str| Some(text.to_owned());
        let any = Filter {
            order: Order::NewestFirst,
            ..Filter::default()
        };
        let user = Filter {
            user: text("user-7"),
            ..any.clone()
        };
        assert_eq!(plan(&user)[0], "SCAN events");
        writer
            .append(&mut events, NOW + Duration::from_secs(86_400))
            .unwrap();
        let files = Files::new(&path, None);
        let mut closed = Vec::new();
        files.close_days(|day| closed.push(day)).unwrap();
        files.close_days(|day| closed.push(day)).unwrap();
        assert_eq!(closed, [Day(20_000)]);

        let check = |filter: Filter, expected: &str| {
            let plan = plan(&filter);
            assert_eq!(plan[0], expected);
            let sorts = plan.iter().any(|step| step.contains("TEMP B-TREE"));
            assert_eq!(sorts, expected.contains("time"), "{plan:?}");
        };
        check(
            user.clone(),
            "SEARCH events USING INDEX events_user (user=?)",
        );
        check(
            Filter {
                since: Some(event(0).time),
                ..user
            },
            "SEARCH events USING INDEX events_user (user=?)",
        );
        check(
            Filter {
                client: text("0.0.0.7"),
                ..any.clone()
            },
            "SEARCH events USING INDEX events_client (client=?)",
        );
        check(
            Filter {
                label: text("rate_limited"),
                ..any.clone()
            },
            "SEARCH events USING INDEX events_label (label=?)",
        );
        check(
            Filter {
                since: Some(event(100).time),
                until: Some(event(110).time),
                ..any.clone()
            },
            "SEARCH events USING INDEX events_time (time>? AND time<?)",
        );
        check(any.clone(), "SCAN events");
        // Too many to be sorted for each page: by their places, which the index of times tells.
        let most = |order| Filter {
            since: Some(event(100).time),
            until: Some(event(24_000).time),
            order,
            ..Filter::default()
        };
        let sorts = |filter: &Filter| plan(filter).iter().any(|it| it.contains("TEMP B-TREE"));
        for order in [Order::OldestFirst, Order::NewestFirst] {
            assert_eq!(
                plan(&most(order))[0],
                "SEARCH events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"
            );
            let place = Some(Cursor {
                day: Day::of(NOW),
                arrival: 9_000,
                ..Cursor::default()
            });
            let page = match order {
                Order::OldestFirst => Filter {
                    after: place,
                    ..most(order)
                },
                Order::NewestFirst => Filter {
                    before: place,
                    ..most(order)
                },
            };
            assert!(!sorts(&page), "{:?}", plan(&page));
            for (since, until) in [(Some(100), None), (None, Some(24_000))] {
                let time = |it: Option<u64>| it.map(|it| event(it).time);
                let open = Filter {
                    since: time(since),
                    until: time(until),
                    ..most(order)
                };
                assert_eq!(
                    plan(&open)[0],
                    "SEARCH events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"
                );
            }
        }
        let of_user = Filter {
            user: text("user-7"),
            ..most(Order::OldestFirst)
        };
        assert!(!sorts(&of_user), "{:?}", plan(&of_user));
    }

    #[test]
    fn a_closed_day_is_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        let mut writer = Writer::open(&path, "a", None, NOW).unwrap();
        writer.append(&mut events(1..2), NOW).unwrap();
        let tomorrow = NOW + Duration::from_secs(86_400);
        writer.append(&mut events(2..3), tomorrow).unwrap();
        Files::new(&path, None).close_days(|_| {}).unwrap();
        let names = folder.path().read_dir().unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let of_day = names.filter(|name| name.starts_with("a-2024-10-04"));
        assert_eq!(of_day.collect::<Vec<_>>(), ["a-2024-10-04.db"]);
    }

    #[test]
    fn what_is_noted_of_a_removed_day_is_synced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        let _writer = Writer::open(&path, "a", None, NOW).unwrap();
        let connection = open_to_write(&days::file(&path, Day::of(NOW))).unwrap();
        let level: i64 = connection
            .query_row("PRAGMA synchronous", [], |row| row.get(0))
            .unwrap();
        assert_eq!(level, 2, "FULL");
    }

    #[test]
    fn a_leap_of_the_clock_is_told_where_it_would_remove_days() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.db");
        let days = |count: u32| Duration::from_secs(86_400) * count;
        let files = Files::new(&path, None);
        let leap = |retention, now| files.leap(days(retention), now).unwrap();
        for day in 0..4 {
            Writer::open(&path, "a", None, NOW + days(day)).unwrap();
        }
        assert_eq!(leap(1, NOW + days(3)), None, "days in a row");
        assert_eq!(leap(1, NOW + days(6)), None, "a long weekend");
        assert_eq!(leap(400, NOW + days(30)), None, "nothing is due");
        let later = NOW + days(800);
        assert_eq!(leap(400, later), Some(Day(20_003)));
        assert_eq!(files.ahead(NOW + days(2)).unwrap(), None);
        Writer::open(&path, "a", None, later).unwrap();
        assert_eq!(leap(400, later), Some(Day(20_003)), "its own file");
        assert_eq!(leap(400, NOW + days(3)), None);
        let ahead = files.ahead(NOW + days(3)).unwrap();
        assert_eq!(ahead, Some((Day(20_800), days::file(&path, Day(20_800)))));
    }
}
