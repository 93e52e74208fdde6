//! What is kept of the audit is read alike from SQLite's files and from Postgres.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::collections::BTreeSet;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use harness::postgres::{Database, Server};
use harness::process::{Running, file};
use harness::{DEADLINE, Upstream, eventually};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use weir::clock;
use weir::config::postgres::Postgres as Config;
use weir::config::{Secret, redis::Tls};
use weir::event::{AuditEvent, Encoded, Micros};
use weir::store::audit::{Cursor, FaultKind, Filter, Order, Report};
use weir::store::batch::{Batch, Boot};
use weir::store::chain::Hasher;
use weir::store::days::Day;
use weir::store::events::Events;
use weir::store::postgres::{Postgres, Reader, migrate, partitions, write};
use weir::store::sqlite;

const KEY: &[u8] = b"a key";
const DAY: Duration = Duration::from_secs(86_400);
/// Longer ago than any of the tests' events.
const RETENTION: Duration = Duration::from_secs(30 * 86_400);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sqlite,
    Postgres,
}

/// Runs each of these functions of a [`Kind`] as a test of each store.
macro_rules! on_each_store {
    ($($name:ident),+ $(,)?) => {
        mod in_sqlite {
            $(#[test] fn $name() { super::$name(super::Kind::Sqlite) })+
        }
        mod in_postgres {
            $(#[test] fn $name() { super::$name(super::Kind::Postgres) })+
        }
    };
}

on_each_store!(
    each_filter_finds_what_it_names_and_nothing_else,
    pages_of_either_order_join_without_a_gap,
    what_two_writers_commit_is_followed_without_a_gap,
    the_command_and_the_admin_port_show_the_same_events,
    a_tail_shows_what_arrives,
    an_untouched_store_has_no_faults,
    another_key_is_told_apart_from_damage,
    a_changed_and_a_removed_row_are_named,
    days_that_retention_removed_are_not_missed,
);

/// When the tests' first events were: yesterday at 12:00, so that all of a test is on one day unless it says otherwise.
fn noon() -> Duration {
    static NOON: LazyLock<Duration> = LazyLock::new(|| {
        let today = clock::wall().as_secs() / 86_400;
        Duration::from_secs((today - 1) * 86_400 + 43_200)
    });
    *NOON
}

/// The `n`th of the tests' events: every tenth by bob, every hundredth refused.
fn event(n: u64) -> AuditEvent {
    let refused = n.is_multiple_of(100);
    AuditEvent {
        time: Micros(Micros::from(noon()).0 + n * 1_000_000),
        route: Some(if n.is_multiple_of(2) { "pay" } else { "web" }.into()),
        client: IpAddr::V4(Ipv4Addr::new(10, 0, 0, (n % 7) as u8)),
        user: match n {
            5 => Some("nul\0".into()),
            6 => Some("nul\u{fffd}".into()),
            _ => Some(if n.is_multiple_of(10) { "bob" } else { "ann" }.into()),
        },
        method: if refused { "POST" } else { "GET" }.into(),
        path: format!("/items/{n}"),
        status: if refused { 429 } else { 200 },
        label: refused.then(|| "rate_limited".into()),
        bytes_out: n,
        request_id: Some(n.to_string()),
        headers: vec![("accept".to_owned(), "*/*".to_owned())],
        ..AuditEvent::sample()
    }
}

fn encoded(range: RangeInclusive<u64>) -> Encoded {
    let mut batch = Encoded::default();
    range.for_each(|n| batch.push(&event(n)));
    batch
}

/// A store of a test's own.
struct Kept {
    kind: Kind,
    runtime: Runtime,
    folder: TempDir,
    /// SQLite's.
    path: PathBuf,
    database: Option<Database>,
    pools: Option<Arc<Postgres>>,
}

/// One process's part in writing.
enum Process {
    Sqlite(Box<sqlite::Writer>),
    Postgres(Box<Boot>, Box<write::Writer>),
}

impl Kept {
    fn new(kind: Kind) -> Kept {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let database = (kind == Kind::Postgres).then(Database::new);
        let pools = database.as_ref().map(|database| pools(&database.url()));
        let kept = Kept {
            kind,
            runtime,
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
    fn with(kind: Kind, count: u64) -> (Kept, Process) {
        let kept = Kept::new(kind);
        let mut process = kept.process("a");
        for first in (1..=count).step_by(200) {
            kept.append(&mut process, first..=count.min(first + 199), noon());
        }
        (kept, process)
    }

    fn pools(&self) -> &Arc<Postgres> {
        self.pools.as_ref().unwrap()
    }

    fn process(&self, instance: &str) -> Process {
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
    fn append(&self, process: &mut Process, range: RangeInclusive<u64>, now: Duration) {
        match process {
            Process::Sqlite(writer) => writer.append(&mut [encoded(range)], now).unwrap(),
            Process::Postgres(boot, writer) => {
                let (_, bytes) = boot.pack(&mut [encoded(range)], now.into(), 3);
                self.store(writer, &[&bytes]);
            }
        }
    }

    fn end(&self, process: Process) {
        match process {
            Process::Sqlite(_) => {}
            Process::Postgres(mut boot, mut writer) => {
                let (_, bytes) = boot.end(noon().into(), 3);
                self.store(&mut writer, &[&bytes]);
            }
        }
    }

    /// In one transaction.
    fn store(&self, writer: &mut write::Writer, packed: &[&[u8]]) {
        let batches = packed.iter().map(|bytes| Batch::open(bytes).unwrap());
        let batches: Vec<_> = batches.collect();
        let batches: Vec<_> = batches.iter().collect();
        let outcomes = self.runtime.block_on(writer.store(&batches)).unwrap();
        let stored = |outcome: &write::Outcome| *outcome == write::Outcome::Stored;
        assert!(outcomes.iter().all(stored), "{outcomes:?}");
    }

    /// Waits until nothing can come to stand ahead of what is there: transactions of other tests' databases count too.
    fn settle(&self) {
        let events = self.events();
        let newest = Filter {
            limit: Some(1),
            order: Order::NewestFirst,
            ..Filter::default()
        };
        let newest = self.query(&newest)[0].cursor;
        eventually(|| self.block(events.end()).unwrap() >= newest);
    }

    fn events(&self) -> Events {
        match self.kind {
            Kind::Sqlite => self.block(Events::sqlite(&self.path)).unwrap(),
            Kind::Postgres => Events::Postgres(Reader::new(self.pools().clone())),
        }
    }

    fn block<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    fn query(&self, filter: &Filter) -> Vec<weir::store::audit::Stored> {
        self.block(self.events().query(filter)).unwrap()
    }

    fn verify(&self, key: &[u8]) -> Report {
        self.block(self.events().verify(Some(key))).unwrap()
    }

    fn faults(&self) -> Vec<(RangeInclusive<u64>, FaultKind)> {
        let faults = self.verify(KEY).faults.into_iter();
        faults.map(|fault| (fault.seqs, fault.kind)).collect()
    }

    /// By another hand.
    fn sql(&self, sqlite: &str, postgres: &str) {
        match self.kind {
            Kind::Sqlite => {
                let day = weir::store::days::file(&self.path, Day::of(noon()));
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
    fn config(&self, more: &str) -> tempfile::NamedTempFile {
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

    fn weir(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let config = self.config("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .arg("audit")
            .args(arguments)
            .arg("-c")
            .arg(config.path())
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).unwrap())
    }
}

fn seqs(stored: &[weir::store::audit::Stored]) -> Vec<u64> {
    stored.iter().map(|stored| stored.event.seq).collect()
}

fn each_filter_finds_what_it_names_and_nothing_else(kind: Kind) {
    let (kept, mut process) = Kept::with(kind, 1_000);
    // The next day's has another partition, and another file.
    kept.append(&mut process, 1_001..=2_000, noon() + DAY);
    let check = |filter: Filter, expected: &dyn Fn(&AuditEvent) -> bool| {
        let all = (1..=2_000).map(|n| AuditEvent { seq: n, ..event(n) });
        let expected: Vec<_> = all.filter(expected).collect();
        let found = kept.query(&filter);
        assert!(found.iter().all(|stored| stored.instance == "a"));
        let found: Vec<_> = found.into_iter().map(|stored| stored.event).collect();
        assert_eq!(found.len(), expected.len(), "{filter:?}");
        assert_eq!(found, expected, "{filter:?}");
        let newest = Filter {
            order: Order::NewestFirst,
            limit: Some(7),
            ..filter
        };
        let found: Vec<_> = kept.query(&newest).into_iter().map(|it| it.event).collect();
        let expected: Vec<_> = expected.into_iter().rev().take(7).collect();
        assert_eq!(found, expected, "{newest:?}");
    };
    let any = Filter::default;
    let text = |text: &str| Some(text.to_owned());
    check(any(), &|_| true);
    for user in ["bob", "nobody", "nul\0", "nul\u{fffd}", "' OR 1=1 --"] {
        let filter = Filter {
            user: text(user),
            ..any()
        };
        check(filter, &|event| event.user.as_deref() == Some(user));
    }
    let route = Filter {
        route: text("pay"),
        ..any()
    };
    check(route, &|event| event.route.as_deref() == Some("pay"));
    let client = Filter {
        client: text("10.0.0.1"),
        ..any()
    };
    check(client, &|event| event.client.to_string() == "10.0.0.1");
    for statuses in [400..=499, 201..=428, 429..=429, 0..=u16::MAX] {
        let filter = Filter {
            status: Some(statuses.clone()),
            ..any()
        };
        check(filter, &|event| statuses.contains(&event.status));
    }
    let label = Filter {
        label: text("rate_limited"),
        ..any()
    };
    check(label, &|event| event.label.is_some());
    let method = Filter {
        method: text("POST"),
        ..any()
    };
    check(method, &|event| event.method == "POST");
    for prefix in ["/items/99", "/items/%", "/items/_9", "", "/items/1000"] {
        let filter = Filter {
            path_prefix: text(prefix),
            ..any()
        };
        check(filter, &|event| event.path.starts_with(prefix));
    }
    let since = event(1_500).time;
    let filter = Filter {
        since: Some(since),
        ..any()
    };
    check(filter, &|event| event.time >= since);
    let until = event(11).time;
    let filter = Filter {
        until: Some(until),
        ..any()
    };
    check(filter, &|event| event.time < until);
    let filter = Filter {
        since: Some(event(5).time),
        until: Some(event(9).time),
        route: text("web"),
        ..any()
    };
    check(filter, &|event| {
        (5..9).contains(&event.seq) && event.seq % 2 == 1
    });
    let end_of_time = Filter {
        since: Some(Micros(u64::MAX)),
        ..any()
    };
    check(end_of_time, &|_| false);
}

fn pages_of_either_order_join_without_a_gap(kind: Kind) {
    let (kept, mut process) = Kept::with(kind, 900);
    kept.append(&mut process, 901..=1_000, noon() + DAY);
    for limit in [1, 7, 200, 999, 1_000, 5_000] {
        let pages = |order: Order| {
            let mut filter = Filter {
                limit: Some(limit),
                order,
                ..Filter::default()
            };
            if limit == 1 {
                // Each is a query of its own; a few will do.
                filter.since = Some(event(980).time);
            }
            let mut all = Vec::new();
            loop {
                let page = kept.query(&filter);
                let Some(last) = page.last() else {
                    return all;
                };
                // As it travels through the hands of others.
                let place: Cursor = last.cursor.to_string().parse().unwrap();
                match order {
                    Order::OldestFirst => filter.after = Some(place),
                    Order::NewestFirst => filter.before = Some(place),
                }
                all.extend(seqs(&page));
            }
        };
        let first = if limit == 1 { 980 } else { 1 };
        let expected: Vec<u64> = (first..=1_000).collect();
        assert_eq!(pages(Order::OldestFirst), expected, "{limit}");
        let mut newest = pages(Order::NewestFirst);
        newest.reverse();
        assert_eq!(newest, expected, "{limit}");
    }
}

/// Each by a thread of its own; those of Postgres leave transactions open for a while, so that they commit out of order.
fn what_two_writers_commit_is_followed_without_a_gap(kind: Kind) {
    const EACH: u64 = 40;
    let kept = Kept::new(kind);
    let mut first = kept.process("z");
    kept.append(&mut first, 1..=1, noon());
    kept.settle();
    let events = kept.events();
    let mut filter = Filter {
        after: Some(kept.block(events.end()).unwrap()),
        settled: true,
        limit: Some(7),
        ..Filter::default()
    };
    std::thread::scope(|scope| {
        for instance in ["a", "b"] {
            let kept = &kept;
            scope.spawn(move || {
                let other = Kept {
                    kind: kept.kind,
                    runtime: tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap(),
                    folder: tempfile::tempdir().unwrap(),
                    path: kept.path.clone(),
                    database: None,
                    pools: kept
                        .database
                        .as_ref()
                        .map(|database| pools(&database.url())),
                };
                let mut process = other.process(instance);
                for n in 1..=EACH {
                    other.append(&mut process, n..=n, noon());
                }
            });
        }
        let mut seen = BTreeSet::new();
        eventually(|| {
            let found = kept.block(events.query(&filter)).unwrap();
            filter.after = found.last().map_or(filter.after, |last| Some(last.cursor));
            for stored in found {
                assert!(
                    seen.insert((stored.instance, stored.event.seq)),
                    "shown twice"
                );
            }
            seen.len() as u64 == 2 * EACH
        });
    });
}

/// What is stored while an earlier transaction is open is shown once nothing can come before it any more.
#[test]
fn a_transaction_that_is_open_holds_back_what_would_stand_behind_it() {
    let (kept, mut process) = Kept::with(Kind::Postgres, 10);
    kept.settle();
    let end = kept.block(kept.events().end()).unwrap();
    let after = Filter {
        after: Some(end),
        settled: true,
        ..Filter::default()
    };
    kept.block(async {
        let mut connection = kept.pools().write().await.unwrap();
        let open = connection.transaction().await.unwrap();
        open.batch_execute("SELECT pg_current_xact_id()")
            .await
            .unwrap();
        let Process::Postgres(boot, writer) = &mut process else {
            unreachable!()
        };
        let (_, bytes) = boot.pack(&mut [encoded(11..=12)], noon().into(), 0);
        writer
            .store(&[&Batch::open(&bytes).unwrap()])
            .await
            .unwrap();
        let events = kept.events();
        assert_eq!(seqs(&events.query(&after).await.unwrap()), [0; 0]);
        // Who only looks sees it.
        let newest = Filter {
            limit: Some(1),
            order: Order::NewestFirst,
            ..Filter::default()
        };
        assert_eq!(seqs(&events.query(&newest).await.unwrap()), [12]);
        // So does who reads once and does not follow.
        let all = Filter {
            settled: false,
            ..after.clone()
        };
        assert_eq!(seqs(&events.query(&all).await.unwrap()), [11, 12]);
        open.rollback().await.unwrap();
    });
    eventually(|| seqs(&kept.query(&after)) == [11, 12]);
}

/// Out of the spool of a process that could not send for a day.
#[test]
fn what_comes_late_is_followed_though_it_is_kept_with_an_earlier_day() {
    let kept = Kept::new(Kind::Postgres);
    let (mut late, mut other) = (kept.process("late"), kept.process("other"));
    kept.append(&mut other, 1..=3, noon() + DAY);
    kept.settle();
    let end = kept.block(kept.events().end()).unwrap();
    kept.append(&mut late, 1..=2, noon());
    let after = Filter {
        after: Some(end),
        settled: true,
        ..Filter::default()
    };
    let mut found = Vec::new();
    eventually(|| {
        found = kept.query(&after);
        seqs(&found) == [1, 2]
    });
    assert!(found.iter().all(|stored| stored.instance == "late"));
}

#[test]
fn an_audit_of_another_cluster_is_refused_rather_than_shown_in_part() {
    let (kept, _process) = Kept::with(Kind::Postgres, 10);
    kept.sql("", "UPDATE weir.audit_batches SET arrival = arrival + 1e12; UPDATE weir.audit_events SET arrival = arrival + 1e12");
    let error = kept.block(kept.events().query(&Filter::default()));
    assert!(error.unwrap_err().to_string().contains("docs/audit.md"));
    assert_eq!(kept.faults(), []);
}

fn pools(url: &str) -> Arc<Postgres> {
    pools_with(url, Vec::new())
}

fn pools_with(url: &str, replicas: Vec<Secret>) -> Arc<Postgres> {
    let config = Config {
        write: Secret(url.to_owned()),
        read: replicas,
        write_pool: 4,
        read_pool: 4,
        timeout: DEADLINE,
        migrate: true,
        tls: Tls::default(),
    };
    Postgres::new(&config).unwrap()
}

fn the_command_and_the_admin_port_show_the_same_events(kind: Kind) {
    let (kept, process) = Kept::with(kind, 2_500);
    kept.end(process);
    let (code, said) = kept.weir(&["export", "--format", "jsonl"]);
    let lines: Vec<Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!((code, lines.len()), (Some(0), 2_500), "{said}");
    let numbers: Vec<_> = lines
        .iter()
        .map(|line| line["seq"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (1..=2_500).collect::<Vec<_>>());
    let (code, table) = kept.weir(&["query", "--status", "4xx", "--user", "bob", "-n", "2"]);
    assert_eq!((code, table.lines().count()), (Some(0), 3), "{table}");
    assert!(
        table.contains("/items/2500") && table.contains("rate_limited"),
        "{table}"
    );
    assert_eq!(kept.weir(&["query", "--client", "10.0.0.300"]).0, Some(2));
    let (code, said) = kept.weir(&["verify"]);
    let expected = match kind {
        Kind::Sqlite => "2500 events, 1 boots, 1 files: nothing is missing or changed\n",
        Kind::Postgres => {
            "3 events were dropped before they could be numbered, as their processes say\n\
             2500 events, 1 boots, 1 days: nothing is missing or changed\n"
        }
    };
    assert_eq!((code, said.as_str()), (Some(0), expected));

    let upstream = Upstream::answering("hi");
    kept.settle();
    let config = kept.config(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0, token: secret}}\n",
        upstream.url()
    ));
    let running = Running::start(config.path());
    let mut admin = running.admin();
    assert_eq!(admin.send("GET", "/v1/audit", &[], "").status, 401);
    let mut page = |query: &str| {
        let path = format!("/v1/audit?{query}");
        let reply = admin.send("GET", &path, &["Authorization: Bearer secret"], "");
        let value: Value = serde_json::from_str(&reply.body).unwrap();
        (reply, value)
    };
    let mut found = Vec::new();
    let mut after = String::new();
    loop {
        let (reply, value) = page(&format!("order=oldest&limit=1000{after}"));
        assert_eq!(reply.status, 200, "{reply:?}");
        let events = value["events"].as_array().unwrap().clone();
        after = format!("&after={}", value["next"].as_str().unwrap());
        if events.is_empty() {
            break;
        }
        found.extend(events);
    }
    assert_eq!(found, lines);
    let (reply, newest) = page("user=bob&status=4xx&limit=2");
    assert_eq!(
        newest["events"],
        serde_json::json!([lines[2_499], lines[2_399]])
    );
    // The same text, not only the same values.
    let line = said_line(&kept, 2_500);
    assert!(
        reply.body.starts_with(&format!("{{\"events\":[{line},")),
        "{reply:?}"
    );
    let next = newest["next"].as_str().unwrap();
    let (_, older) = page(&format!("user=bob&status=4xx&limit=2&after={next}"));
    assert_eq!(older["events"][0], lines[2_299]);
    let (_, last) = page("path=/items/7&until=2001-01-01T00:00:00Z");
    assert_eq!(last, serde_json::json!({"events": [], "next": null}));
    let (bad, problem) = page("usr=bob");
    assert_eq!(bad.status, 400);
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .starts_with("usr: unknown parameter")
    );
    let posted = admin.send("POST", "/v1/audit", &["Authorization: Bearer secret"], "");
    assert_eq!((posted.status, posted.field("allow")), (405, Some("GET")));
}

/// The line of the event of this number.
fn said_line(kept: &Kept, seq: u64) -> String {
    let path = format!("/items/{seq}");
    let (_, said) = kept.weir(&["export", "--path", &path]);
    said.trim_end().to_owned()
}

/// A child that is ended when the test lets go of it.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn a_tail_shows_what_arrives(kind: Kind) {
    let (kept, mut process) = Kept::with(kind, 20);
    kept.settle();
    let config = kept.config("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
    let child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["audit", "tail", "-n", "2", "--format", "jsonl", "-c"])
        .arg(config.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Ended(child);
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let mut next = || {
        let line = lines.next().unwrap().unwrap();
        let line: Value = serde_json::from_str(&line).unwrap();
        line["seq"].as_u64().unwrap()
    };
    assert_eq!((next(), next()), (19, 20));
    kept.append(&mut process, 21..=22, noon());
    assert_eq!((next(), next()), (21, 22));
    kept.append(&mut process, 23..=24, noon() + DAY);
    assert_eq!((next(), next()), (23, 24));
    drop(lines);
    kept.append(&mut process, 25..=25, noon() + DAY);
    let mut status = None;
    eventually(|| {
        status = child.0.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success());
}

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
    for key in [Some(&b"another"[..]), None] {
        let report = kept.block(kept.events().verify(key)).unwrap();
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
    // A partition of another kind hides from queries what is in it.
    check(
        "CREATE TABLE weir.odd PARTITION OF weir.audit_events DEFAULT",
        &[(0..=0, FaultKind::File)],
    );
}

#[test]
fn a_replica_answers_as_its_primary_does() {
    let primary = Server::start();
    let replica = primary.replica();
    let mut kept = Kept::new(Kind::Sqlite);
    kept.kind = Kind::Postgres;
    kept.pools = Some(pools_with(&primary.url(), vec![Secret(replica.url())]));
    kept.block(async {
        let connection = kept.pools().write().await.unwrap();
        migrate::migrate(connection).await.unwrap();
    });
    let mut process = kept.process("a");
    kept.append(&mut process, 1..=300, noon());
    kept.end(process);
    let followed = Filter {
        settled: true,
        ..Filter::default()
    };
    let events = kept.events();
    // It has the tables once it has caught up.
    eventually(|| {
        let found = kept.block(events.query(&followed));
        found.is_ok_and(|found| seqs(&found) == (1..=300).collect::<Vec<_>>())
    });
    // Nothing is left of the primary to ask.
    primary.stop();
    let report = kept.verify(KEY);
    assert_eq!((report.events, report.faults), (300, vec![]));
    assert!(kept.block(events.end()).unwrap() > kept.query(&followed)[299].cursor);
}

/// One of a killed process by its heir, while what the killed one had sent last was still on its way.
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
        let mut connection = kept.pools().write().await.unwrap();
        let day = Day::of(noon());
        partitions::remove(&mut connection, day, &hasher())
            .await
            .unwrap();
    });
    assert_eq!(kept.faults(), []);
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
        Kind::Postgres => kept.block(async {
            let mut connection = kept.pools().write().await.unwrap();
            let day = Day::of(noon());
            partitions::remove(&mut connection, day, &Hasher::new(Some(KEY)))
                .await
                .unwrap();
        }),
    }
    let report = kept.verify(KEY);
    assert_eq!((report.events, report.faults), (300, vec![]));
    assert_eq!(
        seqs(&kept.query(&Filter::default())),
        (101..=400).collect::<Vec<_>>()
    );
}
