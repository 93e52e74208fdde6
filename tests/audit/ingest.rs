//! The audit from Redis's streams into Postgres: each event once, whatever dies, hangs or is sent again.

use super::harness;
use std::collections::BTreeMap;
use std::time::Duration;

use super::harness::ingest::{DAY, World, boot, event, eventually, on_a_runtime, pack};
use super::harness::postgres::{Database, Server};
use super::harness::redis::Answer;
use uuid::Uuid;
use weir::background::partitions::{Undone, keep_once};
use weir::clock;
use weir::config::worker::Worker;
use weir::event::Encoded;
use weir::heartbeat::Heartbeat;
use weir::store::audit::batch::{self, Batch};
use weir::store::audit::chain::Hasher;
use weir::store::audit::days::Day;
use weir::store::postgres::write::{Outcome, Writer};
use weir::store::postgres::{PostgresError, partitions, row};
use weir::telemetry::metrics::Metrics;

#[test]
fn two_workers_store_each_batch_once_however_often_it_is_sent() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let workers = [world.work(), world.work()];
        let mut encodings = BTreeMap::new();
        let mut headers = Vec::new();
        for n in 1..=4 {
            let mut boot = boot(n, clock::wall());
            let mut batches: Vec<_> = (0..50)
                .map(|_| pack(&mut boot, 20, clock::wall()))
                .collect();
            batches.push(boot.end(clock::wall().into(), 0));
            // Out of order, on several streams, and sent again.
            batches.reverse();
            for (at, (header, bytes)) in batches.into_iter().enumerate() {
                let batch = Batch::open(&bytes).unwrap();
                for (encoding, seq) in batch.events().zip(header.first..) {
                    encodings.insert((header.boot, seq), encoding.to_vec());
                }
                world.add((at % 3) as u16, &bytes).await;
                if at % 2 == 0 {
                    world.add((at % 2) as u16, &bytes).await;
                }
                headers.push(header);
            }
        }
        world.ingested().await;
        world.is_whole(4_000);
        assert!(headers.iter().all(|header| world.done(header)));
        assert_eq!(
            world.one("SELECT count(*) FROM weir.audit_batches WHERE is_end"),
            "4"
        );
        assert_eq!(world.one("SELECT count(*) FROM weir.audit_boots"), "4");
        assert_eq!(world.dead_letters().await, 0);
        let each = |metric| {
            workers
                .iter()
                .map(|worker| worker.counted(metric))
                .sum::<u64>()
        };
        assert_eq!(each("weir_ingest_events_total"), 4_000);
        assert_eq!(each(r#"weir_ingest_batches_total{result="stored"}"#), 204);
        assert_eq!(each(r#"weir_ingest_batches_total{result="known"}"#), 104);

        // What is read back is what was sent, byte for byte.
        let connection = world.postgres.read().await.unwrap();
        let select = format!(
            "SELECT a.boot, {} FROM weir.audit_events e JOIN weir.audit_boots a ON a.id = e.boot_id",
            row::COLUMNS
        );
        let found = connection.query(&select, &[]).await.unwrap();
        assert_eq!(found.len(), encodings.len());
        for found in &found {
            let fields = row::Fields::of(found, 1).unwrap();
            let mut encoding = Vec::new();
            fields.encoding_into(&mut encoding).unwrap();
            let key = (found.get::<_, Uuid>(0).into_bytes(), fields.seq as u64);
            assert_eq!(encodings.get(&key), Some(&encoding));
        }
        for worker in workers {
            worker.stop().await;
        }
    });
}

/// Only a worker can make room in it: each of its calls is to be let go on.
#[test]
fn a_worker_that_comes_when_redis_is_full_empties_it() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let mut boot = boot(1, clock::wall());
        let mut headers = Vec::new();
        for at in 0..60 {
            let (header, bytes) = pack(&mut boot, 20, clock::wall());
            world.add(at % 3, &bytes).await;
            headers.push(header);
        }
        world.add(0, b"no batch").await;
        world.cli(&["CONFIG", "SET", "maxmemory", "1"]);
        let worker = world.work();
        world.ingested().await;
        world.is_whole(1_200);
        assert!(headers.iter().all(|header| world.done(header)));
        assert_eq!(world.dead_letters().await, 1);
        worker.stop().await;
    });
}

#[test]
fn entries_of_a_killed_worker_are_taken_over() {
    let database = Database::new();
    on_a_runtime(async {
        let mut world = World::new(database.url()).await;
        world.settings.worker.max_deliveries = Worker::default().max_deliveries;
        let mut boot = boot(1, clock::wall());
        let mut sent = 0;
        for round in 0..20 {
            let worker = world.work();
            for at in 0..20 {
                let (_, bytes) = pack(&mut boot, 50, clock::wall());
                world.add(at % 3, &bytes).await;
                sent += 50;
            }
            // Somewhere in the middle of it.
            tokio::time::sleep(Duration::from_millis(5 * round)).await;
            worker.kill().await;
        }
        let last = world.work();
        world.ingested().await;
        assert_eq!(world.dead_letters().await, 0);
        world.is_whole(sent);
        eprintln!("{sent} events, {} rows", world.rows());
        last.stop().await;
        // Those who have died are forgotten, and no one who has entries.
        for shard in 0..3 {
            world
                .streams
                .forget_consumers(shard, Duration::ZERO)
                .await
                .unwrap();
            let consumers = world.cli(&["XINFO", "CONSUMERS", &world.key(shard), "weir"]);
            assert_eq!(consumers.list(), []);
        }
        let (_, bytes) = pack(&mut boot, 1, clock::wall());
        world.add(0, &bytes).await;
        let read = world.streams.read(0, "holder", 10).await.unwrap();
        assert_eq!(read.len(), 1);
        let forgotten = world.streams.forget_consumers(0, Duration::ZERO).await;
        assert_eq!(forgotten, Ok(0));
    });
}

/// By `XGROUP SETID` or `DELCONSUMER`, or `XACK`, by hand.
#[test]
fn entries_that_were_taken_from_all_workers_are_given_out_again() {
    let database = Database::new();
    on_a_runtime(async {
        let mut world = World::new(database.url()).await;
        world.settings.worker.claim_after = Duration::from_millis(300);
        let mut boot = boot(1, clock::wall());
        for shard in 0..3 {
            for _ in 0..3 {
                world.add(shard, &pack(&mut boot, 5, clock::wall()).1).await;
            }
        }
        let [set, forgotten, acknowledged] = [0, 1, 2].map(|shard| world.key(shard));
        for shard in 0..3 {
            assert_eq!(world.streams.rewind(shard).await, Ok(false));
            let read = world.streams.read(shard, "gone", 2).await.unwrap();
            assert_eq!(read.len(), 2);
            assert_eq!(world.streams.rewind(shard).await, Ok(false));
        }
        world.cli(&["XGROUP", "SETID", &set, "weir", "$"]);
        world.cli(&["XGROUP", "DELCONSUMER", &forgotten, "weir", "gone"]);
        let first = &world.ids(2)[0];
        world.cli(&["XACK", &acknowledged, "weir", first]);
        let worker = world.work();
        world.ingested().await;
        world.is_whole(45);
        assert_eq!(world.dead_letters().await, 0);
        worker.stop().await;
    });
}

/// Redis 6.2 gives out nothing in the place of each, and keeps it as given out; later ones leave it out, and forget it.
#[test]
fn entries_that_were_removed_behind_a_worker_hold_up_no_others() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        for n in 1..=3 {
            let (_, bytes) = pack(&mut boot(n, clock::wall()), 5, clock::wall());
            world.add(0, &bytes).await;
        }
        world.given_out("1").await;
        let key = world.key(0);
        let entries = world.cli(&["XRANGE", &key, "-", "+"]);
        let middle = entries.list()[1].list()[0].text();
        world.cli(&["XDEL", &key, middle]);
        let worker = world.work();
        world.ingested().await;
        assert_eq!(world.rows(), 10);
        // What comes behind them is stored, too.
        let (_, bytes) = pack(&mut boot(4, clock::wall()), 5, clock::wall());
        world.add(0, &bytes).await;
        world.ingested().await;
        assert_eq!(world.rows(), 15);
        worker.stop().await;
    });
}

#[test]
fn what_boots_are_told_is_kept_for_an_hour_and_batches_for_ever() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let mut boot = boot(1, now);
        let told = world.fleet.keys.audit_done(&boot.id.to_string());
        let lives = |key: &str| match world.cli(&["TTL", key]) {
            Answer::Int(seconds) => seconds,
            other => panic!("{other:?}"),
        };
        let worker = world.work();
        for _ in 0..2 {
            let (_, bytes) = pack(&mut boot, 5, now);
            world.add(0, &bytes).await;
            // Said before the entry is let go of.
            world.ingested().await;
            assert!((3_500..=3_600).contains(&lives(&told)), "{}", lives(&told));
            // From the last word on.
            world.cli(&["EXPIRE", &told, "60"]);
        }
        worker.stop().await;
        world.add(0, b"noise").await;
        world.given_out("1").await;
        world
            .streams
            .bury(0, &world.ids(0)[0], "no good")
            .await
            .unwrap();
        world.add(0, b"noise").await;
        let dead = world.fleet.keys.audit_dead("audit", 0);
        assert_eq!((lives(&world.key(0)), lives(&dead)), (-1, -1));
    });
}

#[test]
fn a_batch_that_postgres_will_not_take_holds_up_no_other() {
    let database = Database::new();
    on_a_runtime(async {
        let mut world = World::new(database.url()).await;
        world.settings.worker.claim_after = Duration::from_millis(300);
        database.query(
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN IF NEW.first = 11 THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER no BEFORE INSERT ON weir.audit_batches FOR EACH ROW EXECUTE FUNCTION no()",
        );
        let now = clock::wall();
        let mut boot = boot(1, now);
        for at in 0..9 {
            let (_, bytes) = pack(&mut boot, 5, now);
            world.add(at % 3, &bytes).await;
        }
        let worker = world.work();
        world.ingested().await;
        assert_eq!(world.rows(), 40);
        assert_eq!(world.dead_letters().await, 1);
        worker.stop().await;
    });
}

/// It refuses whatever comes.
#[test]
fn what_was_added_to_the_tables_by_hand_buries_no_batch() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let worker = world.work();
        let mut boot = boot(1, clock::wall());
        let failed = || worker.counted(r#"weir_ingest_transactions_total{result="failed"}"#);
        let mut sent = 0;
        let mut add = async || {
            for shard in 0..3 {
                world.add(shard, &pack(&mut boot, 5, clock::wall()).1).await;
                sent += 5;
            }
            sent
        };
        add().await;
        world.ingested().await;
        let added = [
            (
                "audit_events ADD COLUMN new integer NOT NULL DEFAULT 1",
                "audit_events ALTER COLUMN new DROP DEFAULT",
                "audit_events DROP COLUMN new",
            ),
            (
                "audit_batches ADD CONSTRAINT none CHECK (false) NOT VALID",
                "audit_batches ALTER COLUMN stored SET DEFAULT now()",
                "audit_batches DROP CONSTRAINT none",
            ),
        ];
        for (first, second, back) in added {
            let before = failed();
            database.query(&format!(
                "ALTER TABLE weir.{first}; ALTER TABLE weir.{second}"
            ));
            let sent = add().await;
            eventually(async || {
                let dead = world.dead_letters().await;
                failed() >= before + 2 || dead > 0
            })
            .await;
            database.query(&format!("ALTER TABLE weir.{back}"));
            world.ingested().await;
            assert_eq!(world.dead_letters().await, 0, "{first}");
            world.is_whole(sent);
        }
        // Beside what holds of all rows that batches have, one that is refused for its own sake is buried.
        database.query(
            "ALTER TABLE weir.audit_events ADD CONSTRAINT usual CHECK (status >= 100 AND boot_id > 0 AND seq > 0 AND path <> '');
             CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN IF NEW.first = 46 THEN RAISE 'not this one' USING ERRCODE = 'check_violation'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER no BEFORE INSERT ON weir.audit_batches FOR EACH ROW EXECUTE FUNCTION no()",
        );
        assert_eq!(add().await, 60);
        world.ingested().await;
        assert_eq!((world.rows(), world.dead_letters().await), (55, 1));
        worker.stop().await;
    });
}

#[test]
fn a_day_is_made_and_found_whatever_was_done_to_the_tables() {
    let database = Database::new();
    let write_days = format!(
        "ALTER DATABASE {} SET DateStyle = 'SQL, DMY'",
        database.name
    );
    database.query(&write_days);
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let mut boot = boot(1, clock::wall());
        world.add(0, &pack(&mut boot, 5, clock::wall()).1).await;
        let worker = world.work();
        world.ingested().await;
        worker.stop().await;
        database.query(
            "ALTER TABLE weir.audit_events ADD CONSTRAINT status CHECK (status >= 0),
                 ADD COLUMN class integer GENERATED ALWAYS AS (status / 100) STORED;
             ALTER TABLE weir.audit_batches ADD COLUMN note text",
        );
        let mut connection = world.postgres.write().await.unwrap();
        let today = partitions::today(&connection).await.unwrap();
        let later = Day(today.0 + 9);
        let made = partitions::admit(&mut connection, later, DAY).await;
        assert_eq!(made, Ok(partitions::Admission::Ready));
        // One that is there by another name is no reason to store nothing more, however sessions write days.
        let events = format!("audit_events_{}", today.to_string().replace('-', "_"));
        database.query(&format!("ALTER TABLE weir.{events} RENAME TO renamed"));
        world.add(0, &pack(&mut boot, 5, clock::wall()).1).await;
        let worker = world.work();
        eventually(async || world.rows() == 10).await;
        world.ingested().await;
        world.is_whole(10);
        worker.stop().await;
    });
}

#[test]
fn a_batch_that_another_transaction_holds_waits_for_it_alone() {
    let database = Database::new();
    on_a_runtime(async {
        let mut world = World::new(database.url()).await;
        world.settings.worker.max_deliveries = 20;
        let worker = world.work();
        let now = clock::wall();
        let mut boot = boot(1, now);
        let (_, bytes) = pack(&mut boot, 5, now);
        world.add(0, &bytes).await;
        world.ingested().await;
        // As a worker that hangs has it, or one that is about to commit.
        let mut other = world.postgres.write().await.unwrap();
        let held = other.transaction().await.unwrap();
        let claim = "INSERT INTO weir.audit_batches SELECT day, boot_id, 6, 10, sealed, stored, arrival, dropped, is_end, before, hash
            FROM weir.audit_batches";
        assert_eq!(held.execute(claim, &[]).await.unwrap(), 1);
        for _ in 0..5 {
            let (_, bytes) = pack(&mut boot, 5, now);
            world.add(0, &bytes).await;
        }
        eventually(async || world.rows() == 25).await;
        held.rollback().await.unwrap();
        world.ingested().await;
        world.is_whole(30);
        assert_eq!(world.dead_letters().await, 0);
        worker.stop().await;
    });
}

#[test]
fn a_redis_that_comes_back_empty_is_used_again() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let worker = world.work();
        let mut boot = boot(1, clock::wall());
        let (_, bytes) = pack(&mut boot, 5, clock::wall());
        world.add(0, &bytes).await;
        world.ingested().await;
        world.cli(&["FLUSHALL"]);
        let (_, bytes) = pack(&mut boot, 5, clock::wall());
        world.add(0, &bytes).await;
        world.ingested().await;
        world.redis.kill();
        world.redis.restart();
        assert!(world.connections.ready(harness::DEADLINE).await);
        let (header, bytes) = pack(&mut boot, 5, clock::wall());
        world.add(2, &bytes).await;
        world.ingested().await;
        world.is_whole(15);
        assert!(world.done(&header));
        worker.stop().await;
    });
}

#[test]
fn whatever_becomes_of_postgres_each_event_is_stored_once() {
    let server = Server::with(&["fsync=on"]);
    on_a_runtime(async {
        let world = World::new(server.url()).await;
        let workers = [world.work(), world.work()];
        let mut boot = boot(1, clock::wall());
        let mut sent = 0;
        for (round, harm) in ["stop", "kill", "read only", "pause", "drop"]
            .iter()
            .enumerate()
        {
            for at in 0..60 {
                let (_, bytes) = pack(&mut boot, 20, clock::wall());
                world.add((at % 3) as u16, &bytes).await;
                sent += 20;
                if at == 10 + round {
                    match *harm {
                        "stop" => server.stop(),
                        "kill" => server.kill(),
                        "read only" => server.set_read_only(true),
                        "pause" => server.pause(),
                        _ => drop(server.query(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                             WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
                        )),
                    }
                }
            }
            // For as long as it takes to be taken over, were it counted.
            tokio::time::sleep(world.settings.worker.claim_after * 3 / 2).await;
            match *harm {
                "stop" | "kill" => server.restart(),
                "read only" => server.set_read_only(false),
                "pause" => server.resume(),
                _ => {}
            }
            world.ingested().await;
            world.is_whole(sent);
            eprintln!("{harm}: {sent} events, {} rows", world.rows());
        }
        assert_eq!(world.dead_letters().await, 0);
        for worker in workers {
            worker.stop().await;
        }
    });
}

#[test]
fn a_worker_that_is_told_to_end_leaves_nothing_unsettled() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let worker = world.work();
        let mut boot = boot(1, clock::wall());
        for at in 0..150 {
            let (_, bytes) = pack(&mut boot, 50, clock::wall());
            world.add(at % 3, &bytes).await;
        }
        worker.stop().await;
        let lag = world.streams.lag().await.unwrap();
        assert_eq!(lag.pending, 0);
        // What is not stored was not read.
        assert_eq!(world.rows() + 50 * lag.waiting, 7_500);
        let next = world.work();
        world.ingested().await;
        world.is_whole(7_500);
        next.stop().await;
    });
}

#[test]
fn days_are_made_ahead_indexed_once_over_and_removed_with_a_mark() {
    let database = Database::new();
    on_a_runtime(async {
        let mut world = World::new(database.url()).await;
        world.settings.worker.retention = DAY * 9;
        let now = clock::wall();
        let today = Day::of(now);
        let mut boot = boot(1, now - DAY * 9);
        for days in [9, 8, 0] {
            for _ in 0..2 {
                let (_, bytes) = pack(&mut boot, 5, now - DAY * days);
                world.add(0, &bytes).await;
            }
        }
        let worker = world.work();
        world.ingested().await;
        world.is_whole(30);
        let hasher = Hasher::new(Some(b"key"));
        let metrics = Metrics::default();
        let keep = async |days: u32| {
            let mut undone = Undone::new();
            keep_once(
                &world.postgres,
                DAY * days,
                &hasher,
                &metrics.ingest,
                &mut undone,
                &Heartbeat::default(),
            )
            .await
            .unwrap();
            let connection = world.postgres.write().await.unwrap();
            let listed = partitions::list(&connection).await.unwrap();
            listed
                .iter()
                .map(|day| i64::from(day.0) - i64::from(today.0))
                .collect::<Vec<_>>()
        };
        // One whose making was cut short.
        let name = (today.0 - 9..)
            .map(|day| Day(day).to_string().replace('-', "_"))
            .next()
            .unwrap();
        let broken = format!("audit_events_{name}_by_user");
        database.query(&format!(
            "CREATE INDEX {broken} ON weir.audit_events_{name} (username, time)"
        ));
        database.query(&format!(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'weir.{broken}'::regclass"
        ));
        // Whoever had its turn before may only be leaving it.
        eventually(async || keep(9).await == [-9, -8, -1, 0, 1, 2]).await;
        let indexed = "SELECT count(*) FROM pg_index JOIN pg_class ON oid = indexrelid
            WHERE relname LIKE 'audit\\_events\\_%\\_by\\_user' AND indisvalid";
        assert_eq!(database.one(indexed), "3");
        let ordered_by_libraries = "SELECT count(*) FROM pg_index, unnest(indcollation) AS used
            JOIN pg_collation c ON c.oid = used
            WHERE indrelid::regclass::text LIKE 'weir.%' AND collname <> 'C'";
        assert_eq!(database.one(ordered_by_libraries), "0");

        eventually(async || keep(8).await == [-8, -1, 0, 1, 2]).await;
        assert_eq!(world.rows(), 20);
        let removed = "weir_ingest_days_removed_total";
        let told = harness::metrics::value(&metrics.text(), removed);
        assert_eq!(told, Some(1.0));
        let connection = world.postgres.write().await.unwrap();
        let boots = "SELECT boot, removed_to, removed_hash, removed_mark FROM weir.audit_boots";
        let removed = connection.query_one(boots, &[]).await.unwrap();
        let (id, last): (Uuid, i64) = (removed.get(0), removed.get(1));
        let hash: Vec<u8> = removed.get(2);
        assert_eq!(last, 10);
        let mark = hasher.removed_to(id.as_bytes(), 10, &hash.clone().try_into().unwrap());
        assert_eq!(removed.get::<_, Vec<u8>>(3), mark);
        let next = "SELECT before FROM weir.audit_batches WHERE first = 11";
        assert_eq!(
            connection
                .query_one(next, &[])
                .await
                .unwrap()
                .get::<_, Vec<u8>>(0),
            hash
        );
        // A day that was removed comes back only if retention is longer again: the worker remembers that it was there.
        let (_, bytes) = pack(&mut boot, 1, now);
        world.add(0, &bytes).await;
        world.ingested().await;
        assert_eq!(world.rows(), 21);
        worker.stop().await;
    });
}

#[test]
fn a_boot_goes_with_the_last_day_of_what_it_left() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let now = clock::wall();
        let today = Day::of(now);
        let worker = world.work();
        // The clock of the second was set back by a day; the third has not ended.
        for (n, first) in [(1, now), (2, now + DAY), (3, now)] {
            let mut boot = boot(n, now);
            let batches = [pack(&mut boot, 5, first), pack(&mut boot, 5, now)];
            for (_, bytes) in batches {
                world.add(0, &bytes).await;
            }
            if n < 3 {
                world.add(0, &boot.end(now.into(), 0).1).await;
            }
        }
        world.ingested().await;
        worker.stop().await;
        let mut connection = world.postgres.write().await.unwrap();
        partitions::remove(&mut connection, today, &Hasher::new(Some(b"key")))
            .await
            .unwrap();
        let left = "SELECT string_agg(instance, ' ' ORDER BY instance) FROM weir.audit_boots";
        assert_eq!(world.one(left), "instance-2 instance-3");
    });
}

#[test]
fn old_days_go_though_no_new_one_can_be_made() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let keep = async |days: u32| {
            keep_once(
                &world.postgres,
                DAY * days,
                &Hasher::new(None),
                &Metrics::default().ingest,
                &mut Undone::new(),
                &Heartbeat::default(),
            )
            .await
        };
        keep(9).await.unwrap();
        let today = Day::of(clock::wall());
        let name = |day: u32| Day(day).to_string().replace('-', "_");
        // As on a full volume, the last of the days made ahead cannot be made anew.
        let last = today.0 + 2;
        for table in ["audit_events", "audit_batches"] {
            database.query(&format!("DROP TABLE weir.{table}_{}", name(last)));
        }
        database.query(&format!(
            "CREATE TABLE weir.in_its_way PARTITION OF weir.audit_batches FOR VALUES FROM ('{}') TO ('{}')",
            Day(last),
            Day(last + 2)
        ));
        eventually(async || keep(0).await.is_err()).await;
        let connection = world.postgres.write().await.unwrap();
        let listed = partitions::list(&connection).await.unwrap();
        assert_eq!(listed, [Day(today.0), Day(today.0 + 1)]);
    });
}

#[test]
fn a_worker_that_begins_takes_over_nothing_that_it_cannot_store() {
    let server = Server::with(&[]);
    on_a_runtime(async {
        let world = World::new(server.url()).await;
        let mut boot = boot(1, clock::wall());
        let (_, bytes) = pack(&mut boot, 5, clock::wall());
        world.add(0, &bytes).await;
        world.given_out("1").await;
        server.set_read_only(true);
        let worker = world.work();
        // It has seen what is new, and could not store that.
        let (_, bytes) = pack(&mut boot, 5, clock::wall());
        world.add(0, &bytes).await;
        eventually(async || {
            worker.counted("weir_ingest_transactions_total{result=\"failed\"}") > 0
        })
        .await;
        assert_eq!(worker.counted("weir_ingest_claimed_total"), 0);
        server.set_read_only(false);
        world.ingested().await;
        world.is_whole(10);
        worker.stop().await;
    });
}

#[test]
fn a_stream_that_cannot_be_asked_hides_no_other() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let (_, mut other) = pack(&mut boot(1, clock::wall()), 3, clock::wall());
        // Of a version that is left alone.
        other[0] = 9;
        world.add(0, &other).await;
        world.cli(&["SET", &world.key(2), "no stream"]);
        let dead = world.fleet.keys.audit_dead("audit", 1);
        for _ in 0..2 {
            world.cli(&["XADD", &dead, "*", "b", ""]);
        }
        let worker = world.work();
        eventually(async || worker.counted("weir_ingest_waiting") == 1).await;
        eventually(async || worker.counted("weir_ingest_dead_letters") == 2).await;
        // By the next look it is older.
        eventually(async || worker.counted("weir_ingest_lag_seconds") > 0).await;
        worker.stop().await;
    });
}

#[test]
fn what_another_weir_has_made_is_left_to_its_worker() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let mut boot = boot(1, clock::wall());
        let (_, mut other) = pack(&mut boot, 3, clock::wall());
        // The version.
        other[0] = 9;
        world.add(0, &other).await;
        // Given out more often than any other batch may be.
        world.given_out("9").await;
        let (ours, bytes) = pack(&mut boot, 5, clock::wall());
        world.add(0, &bytes).await;
        let worker = world.work();
        eventually(async || world.done(&ours)).await;
        eventually(async || worker.counted("weir_ingest_claimed_total") > 0).await;
        eventually(async || world.cli(&["XLEN", &world.key(0)]).int() == 1).await;
        // Likewise one that it could read but for an event.
        let (header, bytes) = pack(&mut boot, 2, clock::wall());
        let mut body = Vec::new();
        for (n, event) in Batch::open(&bytes).unwrap().events().enumerate() {
            let mut event = event.to_vec();
            event[0] += n as u8;
            batch::put(&mut body, &event);
        }
        let mut newer = vec![1, 0, 0, 0, 0];
        newer.extend(postcard::to_allocvec(&header).unwrap());
        newer.extend(lz4_flex::compress_prepend_size(&body));
        let checksum = crc32fast::hash(&newer[5..]);
        newer[1..5].copy_from_slice(&checksum.to_le_bytes());
        world.add(0, &newer).await;
        let (ours, bytes) = pack(&mut boot, 5, clock::wall());
        world.add(0, &bytes).await;
        eventually(async || world.done(&ours)).await;
        assert_eq!(world.dead_letters().await, 0);
        assert_eq!(world.cli(&["XLEN", &world.key(0)]).int(), 2);
        // A worker that reads it gets it though this one runs, and does not take it for what brings workers down.
        let after = world.settings.worker.claim_after;
        eventually(async || {
            let claimed = world.streams.claim(0, "newer", after, None, 10, 2).await;
            let mut entries = claimed.unwrap().entries.into_iter();
            entries.any(|(entry, before)| entry.bytes == other && before == 0)
        })
        .await;
        assert_eq!(world.dead_letters().await, 0);
    });
}

/// While a change of `audit.stream.shards` is rolled out, and for what was there before.
#[test]
fn streams_beyond_those_of_the_file_are_emptied_too() {
    let database = Database::new();
    on_a_runtime(async {
        let world = World::new(database.url()).await;
        let mut boot = boot(1, clock::wall());
        let mut headers = Vec::new();
        for shard in [0, 2, 3, 100, 255] {
            let (header, bytes) = pack(&mut boot, 20, clock::wall());
            world.add(shard, &bytes).await;
            headers.push(header);
        }
        let dead = world.fleet.keys.audit_dead("audit", 9);
        world.cli(&["XADD", &dead, "*", "b", ""]);
        let worker = world.work();
        eventually(async || headers.iter().all(|header| world.done(header))).await;
        world.is_whole(100);
        let left = |shard| world.cli(&["XLEN", &world.key(shard)]).int();
        eventually(async || [3, 100, 255].map(left) == [0; 3]).await;
        eventually(async || worker.counted("weir_ingest_dead_letters") == 1).await;
        // As /health has it; and none was given out until it was one.
        assert_eq!(world.dead_letters().await, 1);
        // Once it works, too; of a version that is left alone.
        let (header, bytes) = pack(&mut boot, 20, clock::wall());
        let (_, mut other) = pack(&mut boot, 3, clock::wall());
        other[0] = 9;
        world.add(7, &bytes).await;
        world.add(8, &other).await;
        eventually(async || world.done(&header)).await;
        eventually(async || worker.counted("weir_ingest_waiting") == 1).await;
        worker.stop().await;
    });
}

/// The commit of a server that was killed while it waited is there after its start, and no standby has it yet.
#[test]
fn a_batch_that_is_found_is_known_only_once_the_standby_has_it() {
    let server = Server::start();
    let standby = server.replica();
    on_a_runtime(async {
        let world = World::new(server.url()).await;
        let mut writer = Writer::new(world.postgres.clone(), 30 * DAY);
        let mut boot = boot(1, clock::wall());
        let mut batch = || Batch::open(&pack(&mut boot, 5, clock::wall()).1).unwrap();
        // Boot and day are there.
        let stored = writer.store(&[&batch()]).await;
        assert_eq!(stored, Ok(vec![Outcome::Stored]));
        standby.stop();
        server.commit_by_its_replica();
        let batch = batch();
        let batches = [&batch];
        let killed = async {
            eventually(async || server.waiting_commits().len() == 1).await;
            server.kill();
            server.restart();
        };
        let (stored, ()) = tokio::join!(writer.store(&batches), killed);
        assert!(stored.is_err(), "{stored:?}");
        assert_eq!(world.rows(), 10);
        let come_back = async {
            eventually(async || server.waiting_commits().len() == 1).await;
            let alone = async || {
                let health = world.postgres.health(harness::DEADLINE).await;
                matches!(health.write.answered, Err(PostgresError::Alone(_)))
            };
            eventually(alone).await;
            standby.restart();
        };
        let (stored, ()) = tokio::join!(writer.store(&batches), come_back);
        assert_eq!(stored, Ok(vec![Outcome::Known]));
        let health = world.postgres.health(harness::DEADLINE).await;
        assert!(health.write.answered.is_ok());
        server.kill();
        standby.query("SELECT pg_promote()");
        let rows = standby.one("SELECT count(*) FROM weir.audit_events");
        assert_eq!(rows, "10");
    });
}

#[test]
fn a_database_that_commits_nothing_takes_no_rows() {
    let server = Server::start();
    on_a_runtime(async {
        let world = World::new(server.url()).await;
        let writer = Writer::new(world.postgres.clone(), 30 * DAY);
        assert!(writer.takes_rows().await);
        server.commit_by_its_replica();
        let waits = async {
            eventually(async || server.waiting_commits().len() == 1).await;
            server.stop();
        };
        let (takes, ()) = tokio::join!(writer.takes_rows(), waits);
        assert!(!takes);
        server.restart();
        assert_eq!(world.rows(), 0);
    });
}

/// That it is given out again is no fault of its own.
#[test]
fn a_batch_that_another_transaction_holds_is_not_buried_however_long_that_lasts() {
    let database = Database::new();
    on_a_runtime(async {
        let mut world = World::new(database.url()).await;
        world.settings.worker.claim_after = Duration::from_millis(100);
        world.settings.worker.max_deliveries = 1;
        let worker = world.work();
        let now = clock::wall();
        let mut boot = boot(1, now);
        world.add(0, &pack(&mut boot, 5, now).1).await;
        world.ingested().await;
        let mut other = world.postgres.write().await.unwrap();
        let held = other.transaction().await.unwrap();
        let claim = "INSERT INTO weir.audit_batches SELECT day, boot_id, 6, 10, sealed, stored, arrival, dropped, is_end, before, hash
            FROM weir.audit_batches";
        assert_eq!(held.execute(claim, &[]).await.unwrap(), 1);
        world.add(0, &pack(&mut boot, 5, now).1).await;
        // More often than it takes to be buried.
        eventually(async || worker.counted("weir_ingest_claimed_total") >= 4).await;
        held.rollback().await.unwrap();
        world.ingested().await;
        world.is_whole(10);
        assert_eq!(world.dead_letters().await, 0);
        worker.stop().await;
    });
}

/// As many as a read brings where only small ones came before it: what they are held as is more than a loop may hold.
#[test]
fn batches_that_are_too_large_together_wait_for_postgres_as_the_others_do() {
    const SMALL: u64 = 107;
    const LARGE: u64 = 32;
    let server = Server::with(&[]);
    on_a_runtime(async {
        let mut world = World::new(server.url()).await;
        // What is given up meanwhile does not come back within the test.
        world.settings.worker.claim_after = Duration::from_secs(600);
        let now = clock::wall();
        let mut boot = boot(1, now);
        for _ in 0..SMALL {
            world.add(0, &pack(&mut boot, 1, now).1).await;
        }
        // They do not pack.
        let path = || (0..256 << 10).map(|_| fastrand::alphanumeric()).collect();
        let paths: [String; 4] = std::array::from_fn(|_| path());
        for _ in 0..LARGE {
            let mut encoded = Encoded::default();
            for path in &paths {
                encoded.push(&event(now.into(), path));
            }
            let (_, bytes) = boot.pack(&mut [encoded], now.into(), 0);
            assert!(bytes.len() > 1 << 20);
            world.add(0, &bytes).await;
        }
        server.set_read_only(true);
        let worker = world.work();
        let failed = "weir_ingest_transactions_total{result=\"failed\"}";
        eventually(async || worker.counted(failed) > 3).await;
        server.set_read_only(false);
        world.ingested().await;
        world.is_whole(SMALL + LARGE * 4);
        // None was given up, and so counted, for an outage.
        assert_eq!(worker.counted("weir_ingest_claimed_total"), 0);
        assert_eq!(world.dead_letters().await, 0);
        worker.stop().await;
    });
}
