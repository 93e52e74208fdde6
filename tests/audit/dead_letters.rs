//! What cannot be stored: which batches go to the dead letters and why, and `weir audit dead-letters` as an operator uses it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::harness::ingest::{DAY, World, boot, eventually, on_a_runtime, pack};
use super::harness::postgres::Database;
use super::harness::process::{self, file};
use super::harness::redis::{Answer, Server};
use uuid::Uuid;
use weir::clock;
use weir::store::audit::batch::{Batch, Boot};
use weir::store::audit::chain::{Hasher, Keys};
use weir::store::audit::days::Day;
use weir::store::postgres::Reader;
use weir::store::postgres::write::{Outcome, Writer};
use weir::store::streams::consume::Entry;

fn weir(config: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    process::weir(
        &[&["audit", "dead-letters"], arguments, &["-c"]].concat(),
        config,
    )
}

#[test]
fn dead_letters_are_listed_replayed_and_dropped() {
    let redis = Server::single();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\naudit: {{stream: {{shards: 3}}}}\n{}",
        redis.yaml("w")
    ));
    let weir = |arguments: &[&str]| weir(config.path(), arguments);
    assert_eq!(weir(&[]), (Some(0), String::new()));
    let stream = |shard: u16| format!("w:a:{{audit.{shard}}}");
    let bury = |shard: u16, id: &str| {
        let dead = stream(shard) + ":dead";
        let fields = [
            "reason",
            "no\u{1b}good",
            "id",
            "1-1",
            // By the clock of a server that is ahead of this one's.
            "at",
            "9999999999999",
            "b",
            "damaged",
        ];
        let words = [&["XADD", &dead, id][..], &fields].concat();
        redis.cli(&words);
    };
    bury(0, "5-0");
    bury(2, "6-0");
    bury(2, "7-1");
    let (code, said) = weir(&["list"]);
    let lines: Vec<Vec<_>> = said
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!((code, lines.len()), (Some(0), 4), "{said}");
    assert_eq!(
        lines[0],
        ["ID", "AGE", "INSTANCE", "BOOT", "EVENTS", "REASON"]
    );
    assert_eq!(
        (lines[1][0], lines[2][0], lines[3][0]),
        ("0/5-0", "2/6-0", "2/7-1")
    );
    // Nothing in it drives the terminal.
    assert_eq!(lines[1][2..], ["?", "?", "?", "no\u{fffd}good"]);

    let count = |key: &str| redis.cli(&["XLEN", key]);
    assert_eq!(
        weir(&["replay", "2/6-0"]),
        (Some(0), "replayed 1\n".to_owned())
    );
    assert_eq!(count(&stream(2)), Answer::Int(1));
    let (code, said) = weir(&["drop", "2/6-0", "2/7-1", "9/1-1"]);
    let expected = "2/6-0: not there\n9/1-1: not there\ndropped 1\n";
    assert_eq!((code, said.as_str()), (Some(1), expected));
    assert_eq!(count(&(stream(2) + ":dead")), Answer::Int(0));
    assert_eq!(count(&stream(2)), Answer::Int(1));
    bury(1, "8-0");
    assert_eq!(
        weir(&["replay", "--all"]),
        (Some(0), "replayed 2\n".to_owned())
    );
    assert_eq!(
        (count(&stream(0)), count(&stream(1))),
        (Answer::Int(1), Answer::Int(1))
    );
    assert_eq!(
        weir(&["drop", "--all"]),
        (Some(0), "dropped 0\n".to_owned())
    );
    for bad in [
        &["drop"][..],
        &["replay", "7-1"],
        &["drop", "--all", "2/7-1"],
    ] {
        assert_eq!(weir(bad).0, Some(2), "{bad:?}");
    }
    let alone = file("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
    let (code, said) = self::weir(alone.path(), &["list"]);
    assert!(code == Some(1) && said.contains("no redis"), "{said}");
}

/// Of weirs whose file says more shards than this one, or said so.
#[test]
fn dead_letters_beyond_the_streams_of_the_file_are_shown_too() {
    let redis = Server::single();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\naudit: {{stream: {{shards: 3}}}}\n{}",
        redis.yaml("w")
    ));
    let bury = |id| redis.cli(&["XADD", "w:a:{audit.255}:dead", id, "b", "damaged"]);
    bury("5-0");
    let (code, said) = weir(config.path(), &["list"]);
    assert_eq!((code, said.lines().count()), (Some(0), 2), "{said}");
    assert!(said.contains("255/5-0"), "{said}");
    let replayed = (Some(0), "replayed 1\n".to_owned());
    assert_eq!(weir(config.path(), &["replay", "255/5-0"]), replayed);
    bury("6-0");
    assert_eq!(weir(config.path(), &["replay", "--all"]), replayed);
    assert_eq!(redis.cli(&["XLEN", "w:a:{audit.255}"]), Answer::Int(2));
    let (code, said) = weir(config.path(), &["drop", "256/1-0"]);
    assert_eq!(
        (code, said.as_str()),
        (Some(1), "256/1-0: not there\ndropped 0\n")
    );
}

#[test]
fn what_can_never_be_stored_goes_to_the_dead_letters_with_its_reason() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let mut good = boot(1, now);
        let (first, bytes) = pack(&mut good, 5, now);
        world.add(0, &bytes).await;
        let worker = world.work();
        world.ingested().await;
        assert!(world.done(&first));
        // Another first batch of the same boot.
        let (other, bytes) = pack(&mut boot(1, now), 6, now);
        world.add(0, &bytes).await;
        let (old, bytes) = pack(&mut boot(2, Duration::ZERO), 1, now - DAY * 500);
        world.add(0, &bytes).await;
        let (ahead, bytes) = pack(&mut boot(3, now), 1, now + DAY * 90);
        world.add(0, &bytes).await;
        // An instance's name that a column cannot hold.
        let mut nameless = Boot::new(
            "a\0b".to_owned(),
            Uuid::from_bytes([4; 16]),
            now.into(),
            Hasher::Plain,
        );
        let (nul, bytes) = pack(&mut nameless, 1, now);
        world.add(0, &bytes).await;
        world.add(0, b"no batch").await;
        world.cli(&["XADD", &world.key(0), "*", "other", "field"]);
        let (second, bytes) = pack(&mut good, 5, now);
        world.add(0, &bytes).await;
        world.ingested().await;
        world.is_whole(10);
        assert!(
            [&second, &other, &old, &ahead, &nul]
                .iter()
                .all(|it| world.done(it))
        );

        let letters = world.streams.dead_letters(0, None, None, 10).await.unwrap();
        let mut reasons: Vec<_> = letters
            .iter()
            .map(|letter| letter.reason.as_str())
            .collect();
        reasons.sort_unstable();
        let expected = [
            "another batch with its number",
            "batch of audit events is cut short or damaged",
            "batch of audit events is cut short",
            "its day, ",
            "its day, ",
            "postgres refused: ",
        ];
        assert_eq!(reasons.len(), expected.len(), "{reasons:?}");
        for (reason, expected) in reasons.iter().zip(expected) {
            assert!(reason.starts_with(expected), "{reason}: {expected}");
        }
        assert!(letters.iter().any(|letter| letter.bytes == b"no batch"));
        assert!(
            letters
                .iter()
                .all(|letter| letter.at > now.into() && !letter.entry.is_empty())
        );
        let buried = r#"weir_ingest_batches_total{result="buried"}"#;
        assert_eq!(worker.counted(buried), 6);

        // Whose events are with the dead letters alone is named, should they be dropped; not a boot whose name cannot be kept.
        let reader = Reader::new(world.postgres.clone());
        let report = reader.verify(&Keys::new(&[b"key"])).await.unwrap();
        assert_eq!(report.faults, []);
        let open: Vec<_> = report.open.iter().map(|name| &name[..11]).collect();
        assert_eq!(open, ["instance-1/", "instance-2/", "instance-3/"]);

        // In pages.
        let page = world
            .streams
            .dead_letters(0, Some(&letters[3].id), None, 1)
            .await
            .unwrap();
        assert_eq!(page, letters[4..5]);
        assert_eq!(
            world.streams.dead_letters(1, None, None, 10).await.unwrap(),
            []
        );
        worker.stop().await;
    });
}

/// As by an archive that takes a day away: what comes late for it holds up nothing, and says where it belongs.
#[test]
fn a_batch_of_a_day_that_is_detached_waits_with_the_dead_letters() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let day = Day::of(now - DAY * 3).to_string();
        let name = day.replace('-', "_");
        let mut boot = boot(1, now - DAY * 3);
        let mut add = async |time| {
            let (_, bytes) = pack(&mut boot, 5, time);
            world.add(0, &bytes).await;
        };
        add(now - DAY * 3).await;
        let worker = world.work();
        world.ingested().await;
        database.query(&format!(
            "ALTER TABLE weir.audit_events DETACH PARTITION weir.audit_events_{name}"
        ));
        add(now - DAY * 3).await;
        add(now).await;
        world.ingested().await;
        assert_eq!(world.rows(), 5);
        let letters = world.streams.dead_letters(0, None, None, 10).await.unwrap();
        let [letter] = &letters[..] else {
            panic!("{letters:?}");
        };
        let said = format!("its day, {day}, is detached");
        assert!(letter.reason.starts_with(&said), "{}", letter.reason);
        let told = || worker.counted("weir_ingest_dead_letters");
        eventually(async || told() == 1).await;

        database.query(&format!(
            "ALTER TABLE weir.audit_events ATTACH PARTITION weir.audit_events_{name}
                 FOR VALUES FROM ('{day}') TO (date '{day}' + 1)"
        ));
        assert_eq!(world.streams.replay(0, &letter.id).await, Ok(true));
        world.ingested().await;
        world.is_whole(15);
        eventually(async || told() == 0).await;
        worker.stop().await;
    });
}

#[test]
fn dead_letters_are_tried_anew_or_dropped() {
    let database = Database::new();
    on_a_runtime(async {
        let mut world = World::new(database.url()).await;
        let now = clock::wall();
        let (header, bytes) = pack(&mut boot(1, now - DAY * 9), 5, now - DAY * 9);
        world.add(1, &bytes).await;
        world.add(1, b"noise").await;
        world.settings.worker.retention = DAY * 5;
        let worker = world.work();
        world.ingested().await;
        worker.stop().await;
        let letters = world.streams.dead_letters(1, None, None, 10).await.unwrap();
        assert_eq!((letters.len(), world.rows()), (2, 0));
        // With a longer retention it is not too old.
        world.settings.worker.retention = DAY * 50;
        let worker = world.work();
        let of = |bytes: &[u8]| {
            let mut letters = letters.iter();
            letters
                .find(|letter| letter.bytes == bytes)
                .unwrap()
                .id
                .as_str()
        };
        let (old, noise) = (of(&bytes), of(b"noise"));
        assert_eq!(world.streams.replay(1, old).await, Ok(true));
        assert_eq!(world.streams.replay(1, old).await, Ok(false));
        assert_eq!(world.streams.drop_dead_letter(1, noise).await, Ok(true));
        assert_eq!(world.streams.drop_dead_letter(1, noise).await, Ok(false));
        world.ingested().await;
        world.is_whole(5);
        assert!(world.done(&header));
        assert_eq!(world.dead_letters().await, 0);
        worker.stop().await;
    });
}

#[test]
fn what_is_gone_from_its_stream_is_not_buried() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        world.add(0, b"noise").await;
        world.given_out("1").await;
        let ids = world.ids(0);
        let streams = &world.streams;
        assert_eq!(streams.bury(0, &ids[0], "no good").await, Ok(true));
        assert_eq!(streams.bury(0, &ids[0], "no good").await, Ok(false));
        assert_eq!(world.dead_letters().await, 1);
        // Deleted by another hand, it is owed to no one any more.
        world.add(0, b"noise").await;
        world.given_out("1").await;
        let ids = world.ids(0);
        world.cli(&["XDEL", &world.key(0), &ids[0]]);
        assert_eq!(streams.bury(0, &ids[0], "no good").await, Ok(false));
        let pending = world.cli(&["XPENDING", &world.key(0), "weir"]);
        assert_eq!(pending.list()[0], Answer::Int(0));
        assert_eq!(world.dead_letters().await, 1);
    });
}

#[test]
fn a_batch_that_vanishes_before_it_is_buried_is_not_said_to_be_done() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let mut known = boot(1, now);
        let (first, bytes) = pack(&mut known, 5, now);
        world.add(0, &bytes).await;
        let worker = world.work();
        world.ingested().await;
        // Refused once it is claimed, which waits for this transaction.
        let mut holder = world.postgres.write().await.unwrap();
        let holding = holder.transaction().await.unwrap();
        let lock = "LOCK TABLE weir.audit_batches IN SHARE MODE";
        holding.batch_execute(lock).await.unwrap();
        let (other, bytes) = pack(&mut boot(1, now), 6, now);
        world.add(0, &bytes).await;
        let (second, bytes) = pack(&mut known, 5, now);
        world.add(0, &bytes).await;
        let waiting = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
            WHERE NOT granted AND relname ~ '^audit_batches'";
        eventually(async || world.one(waiting) != "0" && world.ids(0).len() == 2).await;
        world.cli(&["XDEL", &world.key(0), &world.ids(0)[0]]);
        holding.commit().await.unwrap();
        eventually(async || world.done(&second)).await;
        world.ingested().await;
        world.is_whole(10);
        assert!(world.done(&first) && !world.done(&other));
        assert_eq!(world.dead_letters().await, 0);
        let buried = r#"weir_ingest_batches_total{result="buried"}"#;
        assert_eq!(worker.counted(buried), 0);
        worker.stop().await;
    });
}

#[test]
fn a_batch_that_is_delivered_too_often_is_tried_alone_and_then_buried() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let mut boot = boot(1, now);
        for deliveries in ["9", "3"] {
            let (_, bytes) = pack(&mut boot, 5, now);
            world.add(0, &bytes).await;
            world.given_out(deliveries).await;
        }
        let worker = world.work();
        world.ingested().await;
        assert_eq!(world.rows(), 5);
        let letters = world.streams.dead_letters(0, None, None, 10).await.unwrap();
        let reasons: Vec<_> = letters
            .iter()
            .map(|letter| letter.reason.as_str())
            .collect();
        assert_eq!(reasons, ["given out or tried 9 times, and never stored"]);
        worker.stop().await;
    });
}

/// Of what is to be tried alone: whose worker was ended before that is not to blame for it.
#[test]
fn only_a_try_counts_where_a_batch_was_given_out_often() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let mut boot = boot(1, now);
        for _ in 0..10 {
            let (_, bytes) = pack(&mut boot, 5, now);
            world.add(0, &bytes).await;
        }
        world.given_out("1").await;
        let claim = async |consumer: &str| {
            let streams = &world.streams;
            let claimed = streams.claim(0, consumer, Duration::ZERO, None, 100, 2);
            claimed.await.unwrap().entries
        };
        let before = |entries: &[(Entry, u64)]| -> Vec<_> {
            entries.iter().map(|(_, before)| *before).collect()
        };
        assert_eq!(before(&claim("killed").await), [1; 10]);
        for _ in 0..10 {
            assert_eq!(before(&claim("killed, too").await), [2; 10]);
        }
        let entries = claim("killed in a try").await;
        let tried = &entries[3].0.id;
        let count = world.streams.count_try(0, "killed in a try", tried);
        assert!(count.await.unwrap());
        let mut counts = [2; 10];
        counts[3] = 3;
        let entries = claim("last").await;
        assert_eq!(before(&entries), counts);
        let worker = world.work();
        world.ingested().await;
        world.is_whole(50);
        assert_eq!(world.dead_letters().await, 0);
        let count = world.streams.count_try(0, "too late", tried);
        assert!(!count.await.unwrap());
        worker.stop().await;
    });
}

/// What Postgres lacks for all of them alike: a sequence that logical replication has not moved, or a day's tables.
#[test]
fn what_is_refused_beside_the_rows_is_no_batch_s_fault() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let worker = world.work();
        world.add(0, &pack(&mut boot(1, now), 5, now).1).await;
        world.ingested().await;
        let failed = r#"weir_ingest_transactions_total{result="failed"}"#;
        let is_held = async || {
            let before = worker.counted(failed);
            eventually(async || {
                worker.counted(failed) > before + 5 || world.dead_letters().await > 0
            })
            .await;
            assert_eq!(world.dead_letters().await, 0);
        };
        database.query(
            "INSERT INTO weir.audit_boots (id, boot, instance, started) OVERRIDING SYSTEM VALUE
                 SELECT n, gen_random_uuid(), 'a', now() FROM generate_series(2, 5000) n;
             ALTER TABLE weir.audit_boots ALTER id RESTART",
        );
        world.add(0, &pack(&mut boot(2, now), 5, now).1).await;
        is_held().await;
        database.query(
            "SELECT setval(pg_get_serial_sequence('weir.audit_boots', 'id'), max(id)) FROM weir.audit_boots",
        );
        world.ingested().await;
        assert_eq!(world.rows(), 10);

        database.query(
            "CREATE TABLE weir.rest PARTITION OF weir.audit_batches DEFAULT;
             INSERT INTO weir.audit_batches (day, boot_id, first, last, sealed, arrival, dropped, is_end, before, hash)
                 VALUES ((now() AT TIME ZONE 'UTC')::date - 5, -1, 1, 1, now(), 1, 0, false, '', '')",
        );
        world
            .add(0, &pack(&mut boot(3, now), 5, now - 5 * DAY).1)
            .await;
        is_held().await;
        // Others are stored meanwhile.
        world.add(0, &pack(&mut boot(4, now), 5, now).1).await;
        eventually(async || world.rows() == 15).await;
        database.query("ALTER TABLE weir.audit_batches DETACH PARTITION weir.rest");
        world.ingested().await;
        assert_eq!(world.rows(), 20);
        assert_eq!(world.dead_letters().await, 0);
        worker.stop().await;
    });
}

/// Each row that is tried takes a number, and an `integer` has no more of them than two thousand million.
#[test]
fn boots_that_are_known_take_no_numbers() {
    const LAST: &str = "SELECT last_value FROM weir.audit_boots_id_seq";
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let mut known = boot(1, now);
        for _ in 0..5 {
            // It has learnt of none yet.
            let mut writer = Writer::new(world.postgres.clone(), 30 * DAY);
            let batch = Batch::open(&pack(&mut known, 1, now).1).unwrap();
            let stored = writer.store(&[&batch]).await;
            assert_eq!(stored, Ok(vec![Outcome::Stored]));
        }
        assert_eq!(database.one(LAST), "1");
        database.query("SELECT setval('weir.audit_boots_id_seq', 2147483647)");
        let mut writer = Writer::new(world.postgres.clone(), 30 * DAY);
        let mut store = async |boot: &mut Boot| {
            let batch = Batch::open(&pack(boot, 1, now).1).unwrap();
            writer.store(&[&batch]).await
        };
        assert_eq!(store(&mut known).await, Ok(vec![Outcome::Stored]));
        let held = store(&mut boot(2, now)).await.unwrap_err();
        assert!(held.is_beside(), "{held}");
    });
}

/// However many they are, the loop that tries them is not taken for stuck.
#[test]
fn batches_that_are_tried_alone_beat_each() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let beats = Arc::new(AtomicU32::new(0));
        let counted = beats.clone();
        let mut writer = Writer::new(world.postgres.clone(), 30 * DAY).beating(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        let now = clock::wall();
        let mut good = boot(1, now);
        let id = Uuid::from_bytes([4; 16]);
        let mut nameless = Boot::new("a\0b".to_owned(), id, now.into(), Hasher::Plain);
        let batches =
            [&mut good, &mut nameless].map(|boot| Batch::open(&pack(boot, 1, now).1).unwrap());
        let batches: Vec<_> = batches.iter().collect();
        let outcomes = writer.store(&batches).await.unwrap();
        assert!(
            matches!(outcomes[..], [Outcome::Stored, Outcome::Refused(_)]),
            "{outcomes:?}"
        );
        // The one that is refused is tried once more.
        assert_eq!(beats.load(Ordering::Relaxed), 3);
    });
}
