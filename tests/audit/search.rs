//! A search of the audit whose time is over answers what it found, and where to go on; one that no one waits for ends.

use std::time::Duration;

use super::harness::kept::{DAY, Kept, Kind, noon, seqs};
use super::harness::process::Running;
use super::harness::{Client, Reply, runtime};
use serde_json::Value;
use tokio::time::timeout;
use weir::clock;
use weir::store::audit::events::Events;
use weir::store::audit::{Cursor, Filter, Order, StoreError};

const ORDERS: [Order; 2] = [Order::OldestFirst, Order::NewestFirst];

/// Goes on from the place, as it travels through the hands of others.
fn go_on(filter: &mut Filter, place: Cursor) {
    let place = Some(place.to_string().parse().unwrap());
    match filter.order {
        Order::OldestFirst => filter.after = place,
        Order::NewestFirst => filter.before = place,
    }
}

fn proxy(kept: &Kept) -> Running {
    let config = kept
        .config("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {address: 127.0.0.1:0}\nruntime: {lanes: 1}\n");
    Running::start_as("proxy", config.path(), &[])
}

fn page(admin: &mut Client, query: &str) -> (Reply, Vec<u64>, Option<String>) {
    let path = format!("/v1/audit?{query}");
    let reply = admin.send("GET", &path, &["Host: localhost"], "");
    let page: Value = serde_json::from_str(&reply.body).unwrap();
    let events = page["events"].as_array().into_iter().flatten();
    let found = events.map(|event| event["seq"].as_u64().unwrap()).collect();
    let next = page["next"].as_str().map(str::to_owned);
    (reply, found, next)
}

/// Files are looked at for some rows at a time, so that one whose time is over from the start still comes somewhere.
#[test]
fn files_are_searched_in_parts_that_join_without_a_gap() {
    let (kept, mut process) = Kept::with(Kind::Sqlite, 6_000);
    for first in (6_001..=7_000).step_by(200) {
        kept.append(&mut process, first..=first + 199, noon() + DAY);
    }
    let events = kept.events();
    for prefix in ["/items/", "/items/99", "/nowhere"] {
        for order in ORDERS {
            let mut filter = Filter {
                path_prefix: Some(prefix.to_owned()),
                order,
                ..Filter::default()
            };
            let whole = kept.query(&filter);
            let mut found = Vec::new();
            let mut parts = 0;
            loop {
                let part = kept.block(events.search(&filter, Some(clock::now())));
                let part = part.unwrap();
                found.extend(part.events);
                parts += 1;
                match part.stopped_at {
                    Some(place) => go_on(&mut filter, place),
                    None => break,
                }
            }
            assert_eq!(found, whole, "{prefix}, {order:?}");
            assert!((4..100).contains(&parts), "{parts} parts");
        }
    }

    // What SQLite itself looks for tells nothing of the rows that do not pass; then it goes on behind whole files.
    let mut filter = Filter {
        user: Some("nobody".to_owned()),
        order: Order::NewestFirst,
        ..Filter::default()
    };
    let newest = kept.block(events.search(&filter, Some(clock::now())));
    let newest = newest.unwrap();
    assert_eq!(newest.events, []);
    go_on(&mut filter, newest.stopped_at.unwrap());
    let rest = kept.block(events.search(&filter, Some(clock::now())));
    assert!(matches!(rest, Err(StoreError::OutOfTime)), "{rest:?}");

    // Likewise by HTTP, where more than a millisecond is needed.
    let weir = proxy(&kept);
    let mut admin = weir.admin();
    let (mut all, mut parts, mut after) = (Vec::new(), 0, String::new());
    loop {
        let query = format!("path=/items/99&limit=1000&timeout=1ms{after}");
        let (reply, found, next) = page(&mut admin, &query);
        assert_eq!(reply.status, 200, "{reply:?}");
        all.extend(found);
        parts += 1;
        match next {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    let newest = Filter {
        path_prefix: Some("/items/99".to_owned()),
        order: Order::NewestFirst,
        ..Filter::default()
    };
    assert_eq!(all, seqs(&kept.query(&newest)));
    assert!(parts > 1, "{parts} parts");
    let (reply, _, _) = page(&mut admin, "timeout=1h");
    assert_eq!(reply.status, 400, "{reply:?}");
}

/// A table that another transaction holds is as slow as can be.
#[test]
fn postgres_answers_what_it_found_before_its_time_was_over() {
    let kept = Kept::new(Kind::Postgres);
    let mut process = kept.process("a");
    for (range, day) in [(1..=150, noon()), (151..=300, noon() + DAY)] {
        for first in range.step_by(10) {
            kept.append(&mut process, first..=first + 9, day);
        }
    }
    kept.settle();
    let events = kept.events();
    let holding = |seq: u64| {
        let table = format!("SELECT tableoid::regclass FROM weir.audit_events WHERE seq = {seq}");
        kept.database.as_ref().unwrap().one(&table)
    };
    let tables = [holding(1), holding(300)];
    let weir = proxy(&kept);
    let mut admin = weir.admin();
    for order in ORDERS {
        let mut filter = Filter {
            order,
            settled: order == Order::OldestFirst,
            limit: Some(400),
            ..Filter::default()
        };
        let whole = kept.query(&filter);
        assert_eq!(whole.len(), 300);
        // The day that comes last.
        let (table, order_of) = match order {
            Order::OldestFirst => (&tables[1], "oldest"),
            Order::NewestFirst => (&tables[0], "newest"),
        };
        let all = format!("order={order_of}&limit=400");
        let (part, nowhere, by_http) = kept.block(async {
            let mut connection = kept.pools().write().await.unwrap();
            let open = connection.transaction().await.unwrap();
            let lock = format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
            open.batch_execute(&lock).await.unwrap();
            let search = async |filter: &Filter| {
                let deadline = clock::now() + Duration::from_secs(2);
                events.search(filter, Some(deadline)).await
            };
            let part = search(&filter).await.unwrap();
            let mut rest = filter.clone();
            go_on(&mut rest, part.stopped_at.unwrap());
            let nowhere = search(&rest).await;
            let by_http = page(&mut admin, &format!("{all}&timeout=2s"));
            open.rollback().await.unwrap();
            (part, nowhere, by_http)
        });
        let count = part.events.len();
        assert!((1..=150).contains(&count), "{count} before the held day");
        assert!(matches!(nowhere, Err(StoreError::OutOfTime)), "{nowhere:?}");
        let mut found = part.events;
        go_on(&mut filter, part.stopped_at.unwrap());
        found.extend(kept.query(&filter));
        assert_eq!(found, whole);

        let (reply, mut found, next) = by_http;
        assert_eq!((reply.status, found.len()), (200, count), "{reply:?}");
        let next = next.unwrap();
        let (_, rest, next) = page(&mut admin, &format!("{all}&after={next}"));
        assert_eq!(next.is_some(), order == Order::OldestFirst);
        found.extend(rest);
        assert_eq!(found, seqs(&whole));
    }
}

/// A client that has left keeps no thread busy.
#[test]
fn a_search_of_files_that_no_one_waits_for_ends() {
    let (kept, _process) = Kept::with(Kind::Sqlite, 20_000);
    let all = Filter::default();
    let took = |work: &dyn Fn() -> bool| {
        let began = clock::now();
        work().then(|| began.elapsed())
    };
    let whole = || took(&|| kept.query(&all).len() == 20_000).unwrap();
    // The shortest, so that no other load makes less than all of it look like a part.
    let whole = (0..5).map(|_| whole()).min().unwrap();
    let leave = || {
        let runtime = runtime();
        let answer = runtime.block_on(async {
            let events = Events::sqlite(&kept.path).await.unwrap();
            timeout(whole / 10, events.query(&all)).await
        });
        // It waits for threads that are at work.
        drop(runtime);
        answer.is_err()
    };
    // Most of them, as one whose thread has not begun by then ends in any case, and another load may hold one up.
    let short = (0..9).filter(|_| took(&leave).is_some_and(|took| took < whole / 2));
    let short = short.count();
    assert!(short >= 5, "{short} of 9 ended soon; all takes {whole:?}");
}
