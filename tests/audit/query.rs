//! What is kept of the audit is found and followed alike in SQLite's files and in Postgres.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read as _};
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::{Command, Stdio};

use super::harness::kept::{
    DAY, KEY, Kept, Kind, Process, RETENTION, encoded, event, noon, pools, pools_with, seqs,
    servers,
};
use super::harness::postgres::{Server, try_query};
use super::harness::process::{Ended, Running, file};
use super::harness::{Upstream, eventually, runtime};
use serde_json::Value;
use uuid::Uuid;
use weir::config::Secret;
use weir::event::{AuditEvent, Micros};
use weir::store::audit::batch::{Batch, Boot};
use weir::store::audit::chain::Hasher;
use weir::store::audit::days::Day;
use weir::store::audit::events::Events;
use weir::store::audit::{Cursor, Filter, Order, StoreError};
use weir::store::postgres::write::Writer;
use weir::store::postgres::{Reader, migrate};

crate::in_each_store!(
    each_filter_finds_what_it_names_and_nothing_else,
    pages_of_either_order_join_without_a_gap,
    what_two_writers_commit_is_followed_without_a_gap,
    what_does_not_pass_is_not_looked_at_again,
    the_command_and_the_admin_port_show_the_same_events,
    a_tail_shows_what_arrives,
    a_place_of_another_store_is_refused,
);

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
                    runtime: runtime(),
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
            let (found, next) = kept.block(events.follow(&filter, None)).unwrap();
            filter.after = Some(next);
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

fn what_does_not_pass_is_not_looked_at_again(kind: Kind) {
    let (kept, mut process) = Kept::with(kind, 600);
    kept.settle();
    let events = kept.events();
    let mut filter = Filter {
        path_prefix: Some("/nowhere".to_owned()),
        settled: true,
        limit: Some(5),
        ..Filter::default()
    };
    let newest = Filter {
        limit: Some(1),
        order: Order::NewestFirst,
        ..Filter::default()
    };
    let newest = kept.query(&newest)[0].cursor;
    let (found, next) = kept.block(events.follow(&filter, None)).unwrap();
    assert_eq!(found.len(), 0);
    assert!(next >= newest, "{next:?} is ahead of {newest:?}");
    // What comes later is found from there on, and where a page is full it goes on behind its last.
    kept.append(&mut process, 601..=607, noon());
    filter.path_prefix = None;
    filter.after = Some(next);
    let mut seen = Vec::new();
    eventually(|| {
        let (found, next) = kept.block(events.follow(&filter, None)).unwrap();
        filter.after = Some(next);
        seen.extend(seqs(&found));
        seen.len() == 7
    });
    assert_eq!(seen, [601, 602, 603, 604, 605, 606, 607]);
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
    kept.sql("", "UPDATE weir.audit_batches SET arrival = arrival + 1e12; UPDATE weir.audit_events SET arrival = arrival + 1e12;
        UPDATE weir.audit_spans SET span = (1e12::bigint >> 17)");
    let error = kept.block(kept.events().query(&Filter::default()));
    assert!(error.unwrap_err().to_string().contains("docs/audit.md"));
    assert_eq!(kept.faults(), []);
    // What is said there mends it.
    let (_, moving) = include_str!("../../docs/audit.md")
        .split_once("```sql\nBEGIN;")
        .unwrap();
    let (moving, _) = moving.split_once("```").unwrap();
    kept.sql("", &format!("BEGIN;{moving}"));
    assert_eq!(kept.query(&Filter::default()).len(), 10);
    assert_eq!(kept.faults(), []);
}

#[test]
fn queries_of_the_page_are_answered() {
    let (kept, _process) = Kept::with(Kind::Postgres, 10);
    let (_, page) = include_str!("../../docs/audit.md")
        .split_once("\n### SQL\n")
        .unwrap();
    let (shown, _) = page.split_once("\n## ").unwrap();
    let (_, shown) = shown.split_once("```sql\n").unwrap();
    let (shown, _) = shown.split_once("```").unwrap();
    let mut asked = 0;
    for query in shown.split_inclusive(";\n") {
        kept.sql("", query);
        asked += 1;
    }
    assert_eq!(asked, 3);
    // And that of the runbook, which says who holds a worker up.
    let (_, runbook) = include_str!("../../docs/runbook.md")
        .split_once("```sql\n")
        .unwrap();
    kept.sql("", runbook.split_once("```").unwrap().0);
    // What the page names the columns.
    let (_, columns) = page.split_once("Columns of `weir.audit_events`: ").unwrap();
    let (columns, _) = columns.split_once("which only weir reads").unwrap();
    let columns: Vec<_> = columns.split('`').skip(1).step_by(2).collect();
    kept.sql(
        "",
        &format!("SELECT {} FROM weir.audit_events", columns.join(", ")),
    );
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
        Kind::Sqlite => {
            "files do not tell how many events were dropped before they could be numbered: weir_audit_events_total does\n\
             2500 events, 1 boots, 1 files: nothing is missing or changed\n"
        }
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
    assert_eq!(
        (posted.status, posted.field("allow")),
        (405, Some("GET, HEAD"))
    );
}

/// The line of the event of this number.
fn said_line(kept: &Kept, seq: u64) -> String {
    let path = format!("/items/{seq}");
    let (_, said) = kept.weir(&["export", "--path", &path]);
    said.trim_end().to_owned()
}

/// `weir audit tail` from the last `count` events on, and the number of the next one that it shows.
fn tail(config: &Path, count: &str) -> (Ended, impl FnMut() -> u64 + use<>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["audit", "tail", "-n", count, "--format", "jsonl", "-c"])
        .arg(config)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let next = move || {
        let line = lines.next().unwrap().unwrap();
        let line: Value = serde_json::from_str(&line).unwrap();
        line["seq"].as_u64().unwrap()
    };
    (Ended(child), next)
}

fn a_tail_shows_what_arrives(kind: Kind) {
    let (kept, mut process) = Kept::with(kind, 20);
    kept.settle();
    let config = kept.config("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
    let (mut child, mut next) = tail(config.path(), "2");
    assert_eq!((next(), next()), (19, 20));
    kept.append(&mut process, 21..=22, noon());
    assert_eq!((next(), next()), (21, 22));
    kept.append(&mut process, 23..=24, noon() + DAY);
    assert_eq!((next(), next()), (23, 24));
    drop(next);
    kept.append(&mut process, 25..=25, noon() + DAY);
    let mut status = None;
    eventually(|| {
        status = child.0.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success());
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
    assert_eq!(
        kept.block(events.end()).unwrap(),
        kept.query(&followed)[299].cursor
    );
}

#[test]
fn replicas_of_uneven_lag_leave_nothing_out_of_a_listing() {
    let primary = Server::start();
    let (ahead, lagging) = (primary.replica(), primary.replica());
    let urls = |servers: [&Server; 2]| servers.map(|server| Secret(server.url())).to_vec();
    let mut kept = Kept::new(Kind::Sqlite);
    kept.kind = Kind::Postgres;
    kept.pools = Some(pools_with(&primary.url(), urls([&ahead, &lagging])));
    kept.block(async {
        let connection = kept.pools().write().await.unwrap();
        migrate::migrate(connection).await.unwrap();
    });
    let has = |server: &Server, count: usize| {
        let events = Events::Postgres(Reader::new(pools(&server.url())));
        let settled = Filter {
            settled: true,
            ..Filter::default()
        };
        let found = kept.block(events.query(&settled));
        found.is_ok_and(|found| found.len() == count)
    };
    let mut process = kept.process("a");
    kept.append(&mut process, 1..=100, noon());
    eventually(|| has(&lagging, 100));
    lagging.query("SELECT pg_wal_replay_pause()");
    kept.append(&mut process, 101..=1_000, noon());
    eventually(|| has(&ahead, 1_000));

    let pages = |events: &Events, order: Order| {
        let mut filter = Filter {
            order,
            limit: Some(50),
            ..Filter::default()
        };
        let mut found = Vec::new();
        loop {
            let page = kept.block(events.query(&filter)).unwrap();
            let Some(last) = page.last() else {
                return found;
            };
            match order {
                Order::OldestFirst => filter.after = Some(last.cursor),
                Order::NewestFirst => filter.before = Some(last.cursor),
            }
            found.extend(seqs(&page));
        }
    };
    // As the admin port reads: the first page is of either replica.
    let mut lengths = BTreeSet::new();
    for _ in 0..2 {
        let found = pages(&kept.events(), Order::NewestFirst);
        let newest = found.len() as u64;
        assert_eq!(found, (1..=newest).rev().collect::<Vec<_>>());
        lengths.insert(newest);
        let found = pages(&kept.events(), Order::OldestFirst);
        assert_eq!(found, (1..=1_000).collect::<Vec<_>>());
        // The next listing begins at the other one.
        drop(kept.block(kept.pools().read()).unwrap());
    }
    assert_eq!(lengths, BTreeSet::from([100, 1_000]));
    // As a command reads: all of one server, and of the primary once that is gone.
    let alone = |replicas| {
        let reader = Reader::open(&servers(&primary.url(), urls(replicas)));
        Events::Postgres(reader.unwrap())
    };
    for (replicas, count) in [([&ahead, &lagging], 1_000), ([&lagging, &ahead], 100)] {
        for order in [Order::OldestFirst, Order::NewestFirst] {
            let found = pages(&alone(replicas), order);
            assert_eq!(found.len(), count);
        }
    }
    let command = alone([&ahead, &lagging]);
    let first = Filter {
        limit: Some(50),
        ..Filter::default()
    };
    let first = kept.block(command.query(&first)).unwrap();
    ahead.stop();
    let rest = Filter {
        after: Some(first[49].cursor),
        ..Filter::default()
    };
    // A connection that was open is found broken by the first who uses it.
    let mut found = Vec::new();
    eventually(|| {
        let answer = kept.block(command.query(&rest));
        answer.is_ok_and(|rest| {
            found = seqs(&rest);
            true
        })
    });
    assert_eq!(found, (51..=1_000).collect::<Vec<_>>());
}

/// Makes the batches of one boot, in their order.
fn batches() -> impl FnMut(RangeInclusive<u64>) -> Batch {
    let id = Uuid::from_bytes([1; 16]);
    let mut boot = Boot::new("a".to_owned(), id, noon().into(), Hasher::new(None));
    move |range| {
        let (_, bytes) = boot.pack(&mut [encoded(range)], noon().into(), 0);
        Batch::open(&bytes).unwrap()
    }
}

/// A commit that waits for one standby is seen at another that has it, and at the primary once it is over.
#[test]
fn a_replica_that_is_ahead_of_its_primary_hides_nothing_from_who_follows() {
    let primary = Server::start();
    let (replica, behind) = (primary.replica(), primary.replica());
    let count = "SELECT count(*) FROM weir.audit_events";
    let wait_for = |standby: &str| {
        primary.query(&format!(
            "ALTER SYSTEM SET synchronous_standby_names = '{standby}'"
        ));
        primary.query("SELECT pg_reload_conf()");
        eventually(|| primary.one("SHOW synchronous_standby_names") == standby);
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let of_primary = pools(&primary.url());
        let connection = of_primary.write().await.unwrap();
        migrate::migrate(connection).await.unwrap();
        let mut batch = batches();
        let mut writer = Writer::new(of_primary, RETENTION);
        writer.store(&[&batch(1..=10)]).await.unwrap();
        eventually(|| {
            let found = try_query(&replica.url(), count);
            found.is_ok_and(|rows| rows[0][0] == "10")
        });
        behind.catch_up_with(&primary);
        behind.query("SELECT pg_wal_replay_pause()");
        // As the admin port reads.
        let with = |replicas| Events::Postgres(Reader::new(pools_with(&primary.url(), replicas)));
        let events = with(vec![Secret(replica.url())]);
        let of_three = with([&behind, &replica].map(|it| Secret(it.url())).to_vec());
        let follow_by = async |events: &Events, after: Option<Cursor>| {
            let filter = Filter {
                after,
                settled: true,
                limit: Some(100),
                ..Filter::default()
            };
            let (found, next) = events.follow(&filter, None).await?;
            Ok::<_, StoreError>((seqs(&found), Some(next)))
        };
        let follow = async |after| follow_by(&events, after).await;
        let (found, mut place) = follow(None).await.unwrap();
        assert_eq!(found, (1..=10).collect::<Vec<_>>());

        wait_for("away");
        let late = batch(11..=15);
        let batches = [&late];
        let followed = async {
            let shown = async || replica.one(count) == "15";
            super::harness::ingest::eventually(shown).await;
            assert_eq!(primary.one(count), "10");
            let (found, ahead) = follow(None).await.unwrap();
            assert_eq!(found, (1..=15).collect::<Vec<_>>());
            let beyond = follow(ahead).await;
            // The one that is behind has its turn first at every other time.
            let by_turns = [
                follow_by(&of_three, ahead).await,
                follow_by(&of_three, ahead).await,
            ];
            let mut found = Vec::new();
            let mut next = async || {
                let (more, next) = follow(place).await.unwrap();
                place = next;
                found.extend(more);
                found.len() == 5
            };
            assert!(!next().await);
            wait_for("");
            super::harness::ingest::eventually(next).await;
            for beyond in by_turns.into_iter().chain([beyond]) {
                assert_eq!(beyond.unwrap().0, [0; 0]);
            }
            found
        };
        let (stored, found) = tokio::join!(writer.store(&batches), followed);
        stored.unwrap();
        assert_eq!(found, (11..=15).collect::<Vec<_>>());
    });
}

#[test]
fn a_tail_goes_on_once_its_server_is_back() {
    let server = Server::start();
    let mut kept = Kept::new(Kind::Sqlite);
    kept.kind = Kind::Postgres;
    kept.pools = Some(pools(&server.url()));
    kept.block(async {
        let connection = kept.pools().write().await.unwrap();
        migrate::migrate(connection).await.unwrap();
    });
    let mut process = kept.process("a");
    kept.append(&mut process, 1..=10, noon());
    kept.settle();
    let config = file(&format!(
        "audit: {{}}\nredis: {{urls: 'redis://127.0.0.1:1'}}\npostgres: {{write: '{}'}}\nlisten: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n",
        server.url()
    ));
    let (mut child, mut next) = tail(config.path(), "1");
    let mut said = BufReader::new(child.0.stderr.take().unwrap()).lines();
    assert_eq!(next(), 10);
    server.stop();
    // Others have a word to say of it too.
    assert!(said.any(|line| line.unwrap().contains("cannot be read now")));
    server.restart();
    kept.pools = Some(pools(&server.url()));
    let mut process = kept.process("b");
    kept.append(&mut process, 1..=3, noon());
    assert_eq!([next(), next(), next()], [1, 2, 3]);
    kept.append(&mut process, 4..=4, noon());
    assert_eq!(next(), 4);
}

#[test]
fn an_export_goes_on_though_its_connection_ends() {
    let (kept, _process) = Kept::with(Kind::Postgres, 6_000);
    let database = kept.database.as_ref().unwrap();
    let config = kept.config("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.args(["audit", "export", "-c"]).arg(config.path());
    let mut child = Ended(command.stdout(Stdio::piped()).spawn().unwrap());
    // It has a page, and waits for who reads that.
    let waits = "FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle'
        AND query LIKE 'SELECT FROM weir.audit_batches%' AND state_change < now() - interval '1 s'";
    eventually(|| database.one(&format!("SELECT count(*) {waits}")) == "1");
    database.query(&format!("SELECT pg_terminate_backend(pid) {waits}"));
    let said = BufReader::new(child.0.stdout.take().unwrap()).lines();
    assert_eq!(said.map_while(Result::ok).count(), 6_000);
    assert!(child.0.wait().unwrap().success());
}

/// It has a page, and waits for who reads that.
#[test]
fn an_export_tells_of_a_day_that_retention_removes_while_it_is_read() {
    let (kept, mut process) = Kept::with(Kind::Postgres, 6_000);
    kept.append(&mut process, 6_001..=6_100, noon() + DAY);
    let config = kept.config("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
    for (removes, count) in [(false, 6_100), (true, 5_100)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.args(["audit", "export", "-c"]).arg(config.path());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Ended(command.spawn().unwrap());
        let mut said = BufReader::new(child.0.stdout.take().unwrap()).lines();
        said.next().unwrap().unwrap();
        let yesterday = Day::of(noon());
        if removes {
            kept.block(kept.remove(yesterday));
        }
        assert_eq!(said.map_while(Result::ok).count() + 1, count);
        let mut error = String::new();
        let mut stderr = child.0.stderr.take().unwrap();
        stderr.read_to_string(&mut error).unwrap();
        let told = error.contains(&format!("day {yesterday} was removed while it was read"));
        assert_eq!(told, removes, "{error}");
        assert_eq!(child.0.wait().unwrap().success(), !removes);
    }
}

/// As a follower's place is once the server was restored to an earlier time, or a standby promoted that was behind.
#[test]
fn a_place_ahead_of_all_transactions_is_told() {
    let (kept, _process) = Kept::with(Kind::Postgres, 10);
    kept.settle();
    let end = kept.block(kept.events().end()).unwrap();
    let follow = |further: i64| {
        let filter = Filter {
            after: Some(Cursor {
                arrival: end.arrival + further,
                ..end
            }),
            settled: true,
            ..Filter::default()
        };
        kept.block(kept.events().query(&filter))
    };
    assert_eq!(seqs(&follow(0).unwrap()), [0; 0]);
    let ahead = follow(1_000_000);
    assert!(matches!(ahead, Err(StoreError::Moved)), "{ahead:?}");
}

/// Which gives the numbers of the transactions that it lacks to others: who goes on from one of those would not be shown these.
#[test]
fn who_follows_is_told_that_a_promoted_standby_lacks_what_was_shown() {
    let primary = Server::start();
    let standby = primary.replica();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let of_primary = pools(&primary.url());
        let connection = of_primary.write().await.unwrap();
        migrate::migrate(connection).await.unwrap();
        let mut batch = batches();
        let mut writer = Writer::new(of_primary.clone(), RETENTION);
        writer.store(&[&batch(1..=10)]).await.unwrap();
        standby.catch_up_with(&primary);
        let follow = async |pools, after| {
            let filter = Filter {
                after,
                settled: true,
                ..Filter::default()
            };
            let (found, next) = Events::Postgres(Reader::new(pools))
                .follow(&filter, None)
                .await?;
            Ok::<_, StoreError>((seqs(&found), Some(next)))
        };
        let (found, had) = follow(of_primary.clone(), None).await.unwrap();
        assert_eq!(found, (1..=10).collect::<Vec<_>>());

        standby.query("ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port=1'");
        standby.query("SELECT pg_reload_conf()");
        let streams = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'";
        super::harness::ingest::eventually(async || standby.one(streams) == "0").await;
        writer.store(&[&batch(11..=15)]).await.unwrap();
        let (found, place) = follow(of_primary, had).await.unwrap();
        assert_eq!(found, (11..=15).collect::<Vec<_>>());
        primary.kill();
        standby.query("SELECT pg_promote()");

        // Beyond where the other had come.
        let pools = pools(&standby.url());
        let mut writer = Writer::new(pools.clone(), RETENTION);
        for first in [16, 18, 20] {
            writer.store(&[&batch(first..=first + 1)]).await.unwrap();
        }
        let lacks = follow(pools.clone(), place).await;
        assert!(matches!(lacks, Err(StoreError::Moved)), "{lacks:?}");
        // What both have is a place of both.
        let (found, _) = follow(pools, had).await.unwrap();
        assert_eq!(found, (16..=21).collect::<Vec<_>>());
    });
}

/// Nor is who waits on a day that retention has removed since, though something of the next day came ahead of its last.
#[test]
fn a_place_on_a_day_that_was_removed_is_gone_on_from() {
    let (kept, mut process) = Kept::with(Kind::Postgres, 7);
    kept.append(&mut process, 8..=9, noon() + DAY);
    kept.append(&mut process, 10..=10, noon());
    kept.settle();
    let after = Filter {
        after: Some(kept.block(kept.events().end()).unwrap()),
        settled: true,
        ..Filter::default()
    };
    kept.block(kept.remove(Day::of(noon())));
    assert_eq!(seqs(&kept.query(&after)), [0; 0]);
    kept.append(&mut process, 11..=12, noon() + DAY);
    eventually(|| seqs(&kept.query(&after)) == [11, 12]);
}

/// That is behind is not put back.
#[test]
fn a_place_ahead_of_a_replica_is_one_of_the_primary() {
    let primary = Server::start();
    let replica = primary.replica();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let of_primary = pools(&primary.url());
        let connection = of_primary.write().await.unwrap();
        migrate::migrate(connection).await.unwrap();
        // The whole schema: each of its steps is a transaction.
        replica.catch_up_with(&primary);
        replica.query("SELECT pg_wal_replay_pause()");
        let boot = Uuid::from_bytes([1; 16]);
        let mut boot = Boot::new("a".to_owned(), boot, noon().into(), Hasher::new(None));
        let mut writer = Writer::new(of_primary.clone(), RETENTION);
        let mut append = async |range| {
            let (_, bytes) = boot.pack(&mut [encoded(range)], noon().into(), 0);
            let batch = Batch::open(&bytes).unwrap();
            writer.store(&[&batch]).await.unwrap();
        };
        append(1..=2).await;
        let all = Reader::new(of_primary).query(&Filter::default()).await;
        let after = Filter {
            after: Some(all.unwrap()[1].cursor),
            ..Filter::default()
        };
        append(3..=4).await;
        let url = Secret(replica.url());
        let reader = Reader::open(&servers(&primary.url(), vec![url])).unwrap();
        assert_eq!(seqs(&reader.query(&after).await.unwrap()), [3, 4]);
    });
}

/// Who followed SQLite's files may go on asking once the configuration has Postgres.
fn a_place_of_another_store_is_refused(kind: Kind) {
    let (kept, _process) = Kept::with(kind, 10);
    let place: Cursor = match kind {
        Kind::Sqlite => "0.81234.3.77",
        Kind::Postgres => "20782.5.0.0",
    }
    .parse()
    .unwrap();
    for order in [Order::OldestFirst, Order::NewestFirst] {
        let mut filter = Filter {
            order,
            ..Filter::default()
        };
        match order {
            Order::OldestFirst => filter.after = Some(place),
            Order::NewestFirst => filter.before = Some(place),
        }
        let found = kept.block(kept.events().query(&filter));
        assert!(matches!(found, Err(StoreError::Elsewhere)), "{found:?}");
    }
}
