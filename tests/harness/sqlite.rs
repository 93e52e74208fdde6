//! The audit's files of a test's own, and events for them.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;
use weir::clock;
use weir::event::{AuditEvent, Encoded, Micros};
use weir::store::audit::FaultKind;
use weir::store::audit::chain::Keys;
use weir::store::audit::days::{self, Day};
use weir::store::sqlite::{Files, Reader, Writer};

use super::eventually_within;

pub const KEY: &[u8] = b"a key";
/// On 2023-11-15, later than any of the tests' events.
pub const NOW: Duration = Duration::from_secs(1_700_020_000);
pub const RETENTION: Duration = Duration::from_secs(3 * 86_400);
pub const DAY: Duration = Duration::from_secs(86_400);

/// Now, with minutes to go on the same day in UTC: for tests that name the file that weir writes to by its clock.
pub fn today() -> Duration {
    let is_near_midnight = || clock::wall().as_secs() % 86_400 > 86_400 - 120;
    eventually_within(Duration::from_secs(180), || !is_near_midnight());
    clock::wall()
}

/// The `n`th of the tests' events.
pub fn event(n: u64) -> AuditEvent {
    numbered(Micros(1_700_000_000_000_000), n)
}

/// The `n`th event from `start` on, one a second: every tenth by bob, every hundredth refused.
pub fn numbered(start: Micros, n: u64) -> AuditEvent {
    let refused = n.is_multiple_of(100);
    AuditEvent {
        time: Micros(start.0 + n * 1_000_000),
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
pub fn events(range: RangeInclusive<u64>) -> [Encoded; 1] {
    [batch(range)]
}

pub fn batch(range: RangeInclusive<u64>) -> Encoded {
    let mut batch = Encoded::default();
    range.for_each(|n| batch.push(&event(n)));
    batch
}

pub fn seqs(batches: &[Encoded]) -> Vec<u64> {
    let encodings = batches.iter().flat_map(Encoded::iter);
    let events = encodings.map(|encoding| <AuditEvent>::decode(encoding).unwrap());
    events.map(|event| event.seq).collect()
}

/// A database with `count` events of one instance, in the file of one day.
pub struct Audit {
    pub directory: TempDir,
    /// As the configuration has it.
    pub path: PathBuf,
}

impl Audit {
    pub fn empty() -> Audit {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.db");
        Audit { directory, path }
    }

    pub fn with(count: u64) -> Audit {
        let audit = Audit::empty();
        let mut writer = audit.writer();
        for first in (1..=count).step_by(500) {
            let last = count.min(first + 499);
            writer.append(&mut events(first..=last), NOW).unwrap();
        }
        audit
    }

    pub fn writer(&self) -> Writer {
        self.writer_at(NOW)
    }

    pub fn writer_at(&self, now: Duration) -> Writer {
        Writer::open(&self.path, "a", Some(KEY), now).unwrap()
    }

    pub fn reader(&self) -> Reader {
        Reader::open(&self.path).unwrap()
    }

    /// The file of the day that `now` is in.
    pub fn file(&self, now: Duration) -> PathBuf {
        days::file(&self.path, Day::of(now))
    }

    pub fn sql(&self, sql: &str) {
        self.sql_at(NOW, sql);
    }

    pub fn sql_at(&self, now: Duration, sql: &str) {
        let file = Connection::open(self.file(now)).unwrap();
        file.execute_batch(sql).unwrap();
    }

    pub fn faults(&self) -> Vec<(RangeInclusive<u64>, FaultKind)> {
        let report = self.reader().verify(&Keys::new(&[KEY])).unwrap();
        let faults = report.faults.into_iter();
        faults.map(|fault| (fault.seqs, fault.kind)).collect()
    }
}

pub fn close(files: &Files) -> Vec<Day> {
    let mut closed = Vec::new();
    files.close_days(|day| closed.push(day)).unwrap();
    closed
}

pub fn remove_old(files: &Files, now: Duration) -> Vec<Day> {
    let mut removed = Vec::new();
    files
        .remove_old(RETENTION, now, |day| removed.push(day))
        .unwrap();
    removed
}

pub fn lock(file: &Path) -> Connection {
    let other = Connection::open(file).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    other
}
