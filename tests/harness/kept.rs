//! An audit store of a test's own, SQLite's files or a Postgres, with processes that write to it.

use std::future::Future;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tempfile::TempDir;
use tokio::runtime::Runtime;
use weir::clock;
use weir::config::postgres::Postgres as Config;
use weir::config::{Secret, redis::Tls};
use weir::event::{AuditEvent, Encoded};
use weir::store::audit::batch::{Batch, Boot};
use weir::store::audit::chain::{Hasher, Keys};
use weir::store::audit::days::Day;
use weir::store::audit::events::Events;
use weir::store::audit::{FaultKind, Filter, Order, Report, Stored};
use weir::store::postgres::{Postgres, Reader, migrate, partitions, write};
use weir::store::sqlite;

use super::postgres::Database;
use super::process::{self, file};
use super::sqlite::numbered;
use super::{DEADLINE, eventually, runtime};

pub const KEY: &[u8] = b"a key";
pub const DAY: Duration = Duration::from_secs(86_400);
/// Longer ago than any of the tests' events.
pub const RETENTION: Duration = Duration::from_secs(30 * 86_400);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Sqlite,
    Postgres,
}

/// Runs each of these functions of a [`Kind`] as a test of each store.
#[macro_export]
macro_rules! in_each_store {
    ($($name:ident),+ $(,)?) => {
        mod in_sqlite {
            $(#[test] fn $name() { super::$name($crate::harness::kept::Kind::Sqlite) })+
        }
        mod in_postgres {
            $(#[test] fn $name() { super::$name($crate::harness::kept::Kind::Postgres) })+
        }
    };
}

/// When the tests' first events were: yesterday at 12:00, so that all of a test is on one day unless it says otherwise.
pub fn noon() -> Duration {
    static NOON: LazyLock<Duration> = LazyLock::new(|| {
        let today = clock::wall().as_secs() / 86_400;
        Duration::from_secs((today - 1) * 86_400 + 43_200)
    });
    *NOON
}

/// The `n`th of the tests' events, two of them by users that are hard to keep.
pub fn event(n: u64) -> AuditEvent {
    let event = numbered(noon().into(), n);
    AuditEvent {
        user: match n {
            5 => Some("nul\0".into()),
            6 => Some("nul\u{fffd}".into()),
            _ => event.user,
        },
        headers: vec![("accept".to_owned(), "*/*".to_owned())],
        ..event
    }
}

pub fn encoded(range: RangeInclusive<u64>) -> Encoded {
    let mut batch = Encoded::default();
    range.for_each(|n| batch.push(&event(n)));
    batch
}

/// A store of a test's own.
pub struct Kept {
    pub kind: Kind,
    pub runtime: Runtime,
    pub folder: TempDir,
    /// SQLite's.
    pub path: PathBuf,
    pub database: Option<Database>,
    pub pools: Option<Arc<Postgres>>,
}

/// One process's part in writing.
pub enum Process {
    Sqlite(Box<sqlite::Writer>),
    Postgres(Box<Boot>, Box<write::Writer>),
}

impl Kept {
    pub fn new(kind: Kind) -> Kept {
        let folder = tempfile::tempdir().unwrap();
        let database = (kind == Kind::Postgres).then(Database::new);
        let pools = database.as_ref().map(|database| pools(&database.url()));
        let kept = Kept {
            kind,
            runtime: runtime(),
            path: folder.path().join("audit.db"),
            folder,
            database,
            pools,
        };
        if kind == Kind::Postgres {
            kept.block(async {
                let connection = kept.pools().write().await.unwrap();
                migrate::migrate(connection).await.unwrap();
            });
        }
        kept
    }

    /// With `count` events in batches of 200 by one process.
    pub fn with(kind: Kind, count: u64) -> (Kept, Process) {
        let kept = Kept::new(kind);
        let mut process = kept.process("a");
        for first in (1..=count).step_by(200) {
            kept.append(&mut process, first..=count.min(first + 199), noon());
        }
        (kept, process)
    }

    pub fn pools(&self) -> &Arc<Postgres> {
        self.pools.as_ref().unwrap()
    }

    /// A day of Postgres, as retention does.
    pub async fn remove(&self, day: Day) {
        let mut connection = self.pools().write().await.unwrap();
        let hasher = Hasher::new(Some(KEY));
        let removed = partitions::remove(&mut connection, day, &hasher);
        removed.await.unwrap();
    }

    pub fn process(&self, instance: &str) -> Process {
        match self.kind {
            Kind::Sqlite => {
                let writer = sqlite::Writer::open(&self.path, instance, Some(KEY), noon());
                Process::Sqlite(Box::new(writer.unwrap()))
            }
            Kind::Postgres => {
                let id = clock::uuid(noon());
                let boot = Boot::new(
                    instance.to_owned(),
                    id,
                    noon().into(),
                    Hasher::new(Some(KEY)),
                );
                let writer = write::Writer::new(self.pools().clone(), RETENTION);
                Process::Postgres(Box::new(boot), Box::new(writer))
            }
        }
    }

    /// As one batch, written at this time.
    pub fn append(&self, process: &mut Process, range: RangeInclusive<u64>, now: Duration) {
        match process {
            Process::Sqlite(writer) => writer.append(&mut [encoded(range)], now).unwrap(),
            Process::Postgres(boot, writer) => {
                let (_, bytes) = boot.pack(&mut [encoded(range)], now.into(), 3);
                self.store(writer, &[&bytes]);
            }
        }
    }

    pub fn end(&self, process: Process) {
        match process {
            Process::Sqlite(_) => {}
            Process::Postgres(mut boot, mut writer) => {
                let (_, bytes) = boot.end(noon().into(), 3);
                self.store(&mut writer, &[&bytes]);
            }
        }
    }

    /// In one transaction.
    pub fn store(&self, writer: &mut write::Writer, packed: &[&[u8]]) {
        let batches = packed.iter().map(|bytes| Batch::open(bytes).unwrap());
        let batches: Vec<_> = batches.collect();
        let batches: Vec<_> = batches.iter().collect();
        let outcomes = self.runtime.block_on(writer.store(&batches)).unwrap();
        let stored = |outcome: &write::Outcome| *outcome == write::Outcome::Stored;
        assert!(outcomes.iter().all(stored), "{outcomes:?}");
    }

    /// Waits until nothing can come to stand ahead of what is there: transactions of other tests' databases count too.
    pub fn settle(&self) {
        let events = self.events();
        let newest = Filter {
            limit: Some(1),
            order: Order::NewestFirst,
            ..Filter::default()
        };
        let newest = self.query(&newest)[0].cursor;
        eventually(|| self.block(events.end()).unwrap() >= newest);
    }

    pub fn events(&self) -> Events {
        match self.kind {
            Kind::Sqlite => self.block(Events::sqlite(&self.path)).unwrap(),
            Kind::Postgres => Events::Postgres(Reader::new(self.pools().clone())),
        }
    }

    pub fn block<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub fn query(&self, filter: &Filter) -> Vec<Stored> {
        self.block(self.events().query(filter)).unwrap()
    }

    pub fn verify(&self, key: &[u8]) -> Report {
        self.block(self.events().verify(&Keys::new(&[key])))
            .unwrap()
    }

    pub fn faults(&self) -> Vec<(RangeInclusive<u64>, FaultKind)> {
        let faults = self.verify(KEY).faults.into_iter();
        faults.map(|fault| (fault.seqs, fault.kind)).collect()
    }

    /// By another hand.
    pub fn sql(&self, sqlite: &str, postgres: &str) {
        match self.kind {
            Kind::Sqlite => {
                let day = weir::store::audit::days::file(&self.path, Day::of(noon()));
                let file = rusqlite::Connection::open(day).unwrap();
                file.execute_batch(sqlite).unwrap();
            }
            Kind::Postgres => self.block(async {
                let connection = self.pools().write().await.unwrap();
                connection.batch_execute(postgres).await.unwrap();
            }),
        }
    }

    /// A configuration that has its audit here.
    pub fn config(&self, more: &str) -> tempfile::NamedTempFile {
        let postgres = self.database.as_ref().map_or_else(String::new, |database| {
            format!(
                "redis: {{urls: 'redis://127.0.0.1:1'}}\npostgres: {{write: '{}'}}\n",
                database.url()
            )
        });
        file(&format!(
            "audit: {{sqlite: {{path: '{}'}}, spool: {{path: '{}'}}, integrity: {{key: a key}}}}\n{postgres}{more}",
            self.path.display(),
            self.folder.path().join("spool").display()
        ))
    }

    pub fn weir(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let config = self.config("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
        process::weir(&[&["audit"], arguments, &["-c"]].concat(), config.path())
    }
}

pub fn seqs(stored: &[Stored]) -> Vec<u64> {
    stored.iter().map(|stored| stored.event.seq).collect()
}

pub fn pools(url: &str) -> Arc<Postgres> {
    pools_with(url, Vec::new())
}

pub fn pools_with(url: &str, replicas: Vec<Secret>) -> Arc<Postgres> {
    Postgres::new(&servers(url, replicas)).unwrap()
}

pub fn servers(url: &str, replicas: Vec<Secret>) -> Config {
    Config {
        write: Secret(url.to_owned()),
        read: replicas,
        write_pool: 4,
        read_pool: 4,
        timeout: DEADLINE,
        migrate: true,
        tls: Tls::default(),
    }
}
