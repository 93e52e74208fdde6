//! Postgres as weir reaches it: pools, replicas that fall sick, TLS, and the schema; and how it goes about weir's queries.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::harness::ingest::{boot, eventually, on_a_runtime, pack};
use super::harness::kept::{DAY, KEY, Kept, Kind, RETENTION, pools};
use super::harness::metrics;
use super::harness::pooler::Pooler;
use super::harness::postgres::{Database, Server};
use super::harness::raw::Silent;
use super::harness::redis::Certificates;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio_postgres::IsolationLevel;
use weir::background::partitions as keeping;
use weir::background::partitions::{Undone, keep_once};
use weir::background::supervise::{AtStop, Supervisor};
use weir::clock;
use weir::config::redis::{Certificate, Tls};
use weir::config::{Secret, postgres};
use weir::heartbeat::Heartbeat;
use weir::store::audit::batch::Batch;
use weir::store::audit::chain::Hasher;
use weir::store::audit::days::Day;
use weir::store::audit::{Filter, Order};
use weir::store::postgres::partitions::{Admission, list as days_of};
use weir::store::postgres::write::{Outcome, Writer};
use weir::store::postgres::{Postgres, PostgresError, Reader, migrate, partitions};
use weir::telemetry::metrics::Metrics;

const WITHIN: Duration = Duration::from_secs(5);

fn config(write: &str, read: &[String]) -> postgres::Postgres {
    postgres::Postgres {
        write: Secret(write.to_owned()),
        read: read.iter().cloned().map(Secret).collect(),
        write_pool: 4,
        read_pool: 4,
        timeout: WITHIN,
        migrate: true,
        tls: Tls::default(),
    }
}

/// The port that a read goes to.
async fn reads_from(postgres: &Postgres) -> u16 {
    let connection = postgres.read().await.unwrap();
    let port = connection.query_one("SELECT inet_server_port()", &[]).await;
    u16::try_from(port.unwrap().get::<_, i32>(0)).unwrap()
}

#[test]
fn reads_are_bounded_and_change_nothing() {
    let database = Database::new();
    bounds_reads(&database.url());
}

/// One refuses the startup options that weir would set by.
#[test]
fn reads_through_a_pooler_are_bounded_and_change_nothing() {
    let database = Database::new();
    let pooler = Pooler::to(database.server);
    let url = pooler.url_of(&database.name);
    let by_options = format!("{url}&options=-c%20statement_timeout%3D9");
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&by_options, &[])).unwrap();
        let refused = postgres.read().await.map(drop).unwrap_err().to_string();
        assert!(refused.contains("startup parameter"), "{refused}");
    });
    bounds_reads(&url);
}

#[test]
fn a_pooler_that_shares_connections_is_seen() {
    let database = Database::new();
    let server = database.server;
    let [session, transaction] = ["session", "transaction"].map(|mode| Pooler::by(mode, server));
    let by = |pooler: &Pooler| pooler.url_of(&database.name);
    on_a_runtime(async {
        for (url, expected) in [
            (database.url(), false),
            (by(&session), false),
            (by(&transaction), true),
        ] {
            let postgres = Postgres::new(&config(&url, &[])).unwrap();
            assert_eq!(postgres.shares_connections().await, Ok(expected), "{url}");
        }
    });
}

/// What it has written and no one acknowledges, as while rows are copied, is not seen by keepalives.
#[test]
fn writers_alone_have_a_tcp_user_timeout_unless_the_url_gives_one() {
    let database = Database::new();
    let given = format!("{}&options=-c%20tcp_user_timeout%3D7000", database.url());
    on_a_runtime(async {
        for (url, expected) in [
            (&database.url(), ["20000", "0"]),
            (&given, ["7000", "7000"]),
        ] {
            let postgres = Postgres::new(&config(url, &[])).unwrap();
            let (write, read) = (postgres.write().await, postgres.read().await);
            for (pool, expected) in [write, read].into_iter().zip(expected) {
                let shown = pool.unwrap().query_one("SHOW tcp_user_timeout", &[]).await;
                assert_eq!(shown.unwrap().get::<_, String>(0), expected, "{url}");
            }
        }
    });
}

#[track_caller]
fn bounds_reads(url: &str) {
    on_a_runtime(async {
        let mut config = config(url, &[]);
        config.timeout = Duration::from_secs(2);
        let postgres = Postgres::new(&config).unwrap();
        let read = postgres.read().await.unwrap();
        let slow = read.batch_execute("SELECT pg_sleep(60)").await.unwrap_err();
        assert_eq!(slow.code().unwrap().code(), "57014");
        let change = read.batch_execute("CREATE TABLE a ()").await.unwrap_err();
        assert_eq!(change.code().unwrap().code(), "25006");
        let write = postgres.write().await.unwrap();
        write
            .batch_execute("CREATE TABLE a (); SELECT pg_sleep(3)")
            .await
            .unwrap();
    });
}

#[test]
fn a_server_that_is_to_be_written_to_is_read_as_well() {
    let database = Database::new();
    on_a_runtime(async {
        let url = format!("{}&target_session_attrs=read-write", database.url());
        let postgres = Postgres::new(&config(&url, &[])).unwrap();
        let write = postgres.write().await.unwrap();
        write.batch_execute("CREATE TABLE a ()").await.unwrap();
        let read = postgres.read().await.unwrap();
        read.batch_execute("TABLE a").await.unwrap();
        let change = read.batch_execute("CREATE TABLE b ()").await.unwrap_err();
        assert_eq!(change.code().unwrap().code(), "25006");
    });
}

#[test]
fn a_host_that_is_silent_leaves_time_for_the_next() {
    let database = Database::new();
    let silent = Silent::new();
    on_a_runtime(async {
        let both = format!("@{},", silent.address);
        let url = database.url().replacen('@', &both, 1);
        let postgres = Postgres::new(&config(&url, &[])).unwrap();
        let read = postgres.read().await.unwrap();
        read.batch_execute("SELECT 1").await.unwrap();
    });
}

/// Its kernel accepts connections.
#[test]
fn a_host_that_hangs_leaves_time_for_the_next() {
    let (hung, database) = (Server::start(), Database::new());
    hung.pause();
    on_a_runtime(async {
        let both = format!("@127.0.0.1:{},", hung.port);
        let url = database.url().replacen('@', &both, 1);
        let postgres = Postgres::new(&config(&url, &[])).unwrap();
        let read = postgres.read().await.unwrap();
        read.batch_execute("SELECT 1").await.unwrap();
    });
    hung.resume();
}

#[test]
fn who_finds_no_connection_free_is_told_so_in_time() {
    let database = Database::new();
    on_a_runtime(async {
        let mut config = config(&database.url(), &[]);
        (config.write_pool, config.timeout) = (1, Duration::from_secs(2));
        let postgres = Postgres::new(&config).unwrap();
        let held = postgres.write().await.unwrap();
        let told_while_it_waits = async {
            let told = Metrics::default();
            told.process.note_pool("write", postgres.write_use());
            told.text()
        };
        let (refused, text) = tokio::join!(postgres.write(), told_while_it_waits);
        let error = refused.map(drop).unwrap_err();
        assert!(matches!(error, PostgresError::Busy { .. }), "{error}");
        for (series, value) in [
            ("waiting{pool=\"write\"}", 1.0),
            ("connections{pool=\"write\",state=\"in_use\"}", 1.0),
            ("connections{pool=\"write\",state=\"idle\"}", 0.0),
            ("connections_max{pool=\"write\"}", 1.0),
        ] {
            let told = metrics::value(&text, &format!("weir_postgres_{series}"));
            assert_eq!(told, Some(value), "{series}");
        }
        drop(held);
        drop(postgres.write().await.unwrap());
        // The check has a connection of its own.
        let _held = postgres.write().await.unwrap();
        let health = postgres.health(WITHIN).await;
        assert!(
            health.write.answered.is_ok() && health.read.len() == 1,
            "{health:?}"
        );
    });
}

#[test]
fn a_sick_replica_is_left_out_and_taken_back() {
    let primary = Server::start();
    let replicas = [primary.replica(), primary.replica()];
    let urls = replicas.each_ref().map(Server::url);
    on_a_runtime(async {
        let mut config = config(&primary.url(), &urls);
        config.timeout = Duration::from_secs(3);
        let postgres = Postgres::new(&config).unwrap();
        tokio::spawn(postgres.clone().watch_replicas(|| {}));
        let ports = replicas.each_ref().map(|replica| replica.port);
        let mut read = [reads_from(&postgres).await, reads_from(&postgres).await];
        read.sort_unstable();
        let mut both = ports;
        both.sort_unstable();
        assert_eq!(read, both);

        // One hangs: its connections stay.
        replicas[0].pause();
        eventually(async || !postgres.is_in_turn(0)).await;
        for _ in 0..4 {
            assert_eq!(reads_from(&postgres).await, ports[1]);
        }
        let health = postgres.health(Duration::from_secs(2)).await;
        let answered = |n: usize| health.read[n].answered.is_ok();
        assert!(!answered(0) && answered(1) && health.write.answered.is_ok());

        // The other is gone, and found so by the reader that needs it.
        replicas[1].stop();
        for _ in 0..4 {
            assert_eq!(reads_from(&postgres).await, primary.port);
        }
        replicas[0].resume();
        replicas[1].restart();
        eventually(async || postgres.is_in_turn(0) && postgres.is_in_turn(1)).await;
        let read = [reads_from(&postgres).await, reads_from(&postgres).await];
        assert!(!read.contains(&primary.port));
    });
}

#[test]
fn connections_to_a_server_that_was_restarted_are_made_anew() {
    let server = Server::start();
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&server.url(), &[])).unwrap();
        drop(postgres.write().await.unwrap());
        server.stop();
        let error = postgres.write().await.map(drop).unwrap_err();
        let PostgresError::Lost(said) = &error else {
            panic!("{error}")
        };
        assert!(
            said.contains(&format!("127.0.0.1:{}/postgres", server.port)),
            "{said}"
        );
        assert!(postgres.health(WITHIN).await.write.answered.is_err());
        server.restart();
        let connection = postgres.write().await.unwrap();
        connection.batch_execute("SELECT 1").await.unwrap();
    });
}

#[test]
fn a_write_target_that_takes_no_writes_is_not_well() {
    let server = Server::start();
    let replica = server.replica();
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&server.url(), &[])).unwrap();
        let answered = async |postgres: &Postgres| postgres.health(WITHIN).await.write.answered;
        assert!(answered(&postgres).await.is_ok());
        server.set_read_only(true);
        eventually(async || answered(&postgres).await.is_err()).await;
        let health = postgres.health(WITHIN).await;
        let error = health.write.answered.unwrap_err();
        assert!(matches!(error, PostgresError::ReadOnly(_)), "{error}");
        // Reads need no more than that.
        assert!(health.read[0].answered.is_ok());
        server.set_read_only(false);
        eventually(async || answered(&postgres).await.is_ok()).await;

        let of_a_replica = Postgres::new(&config(&replica.url(), &[])).unwrap();
        let error = answered(&of_a_replica).await.unwrap_err();
        assert!(matches!(error, PostgresError::ReadOnly(_)), "{error}");
    });
}

#[test]
fn by_tls_only_a_server_with_the_right_certificate_is_believed() {
    let certificates = Certificates::make();
    let path = |name: &str| PathBuf::from(certificates.path(name));
    let server = Server::with_tls(&certificates, true);
    let url = |host: &str, mode: &str| {
        format!(
            "postgres://postgres@{host}:{}/postgres?sslmode={mode}",
            server.port
        )
    };
    let tls = Tls {
        ca: Some(path("ca.pem")),
        certificate: Some(Certificate {
            cert: path("server.pem"),
            key: path("server.key"),
        }),
    };
    on_a_runtime(async {
        let open = async |host: &str, mode: &str, tls: &Tls| {
            let mut config = config(&url(host, mode), &[]);
            config.tls = tls.clone();
            let postgres = Postgres::new(&config).unwrap();
            let connection = postgres.write().await?;
            let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
            Ok::<bool, PostgresError>(connection.query_one(query, &[]).await?.get(0))
        };
        for mode in ["require", "prefer", "verify-full"] {
            assert_eq!(open("127.0.0.1", mode, &tls).await, Ok(true), "{mode}");
        }
        // Its certificate has no such name.
        let error = open("localhost", "require", &tls).await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
        let of_another = Certificates::make();
        let other = Tls {
            ca: Some(of_another.path("ca.pem").into()),
            ..tls.clone()
        };
        for mode in ["require", "prefer"] {
            let error = open("127.0.0.1", mode, &other).await.unwrap_err();
            assert!(error.to_string().contains("certificate"), "{error}");
        }
        let shows_none = Tls {
            certificate: None,
            ..tls
        };
        assert!(open("127.0.0.1", "require", &shows_none).await.is_err());
        assert!(open("127.0.0.1", "disable", &shows_none).await.is_err());
    });
}

#[test]
fn a_server_without_tls_is_refused_where_it_is_required() {
    let database = Database::new();
    on_a_runtime(async {
        let certificates = Certificates::make();
        let mut config = config(&database.url().replace("disable", "require"), &[]);
        config.tls.ca = Some(certificates.path("ca.pem").into());
        let postgres = Postgres::new(&config).unwrap();
        let error = postgres.write().await.map(drop).unwrap_err();
        assert!(
            error.to_string().contains("does not support TLS"),
            "{error}"
        );
        config.write = Secret(database.url().replace("disable", "prefer"));
        drop(Postgres::new(&config).unwrap().write().await.unwrap());
    });
}

#[test]
fn the_schema_is_made_once_however_many_make_it() {
    let database = Database::new();
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&database.url(), &[])).unwrap();
        let checked = async |postgres: &Arc<Postgres>| {
            let connection = postgres.write().await.unwrap();
            migrate::check_version(&connection).await
        };
        let error = checked(&postgres).await.unwrap_err();
        assert!(error.to_string().ends_with("run `weir migrate`"), "{error}");
        let at_once = (0..4).map(|_| async {
            let connection = postgres.write().await.unwrap();
            migrate::migrate(connection).await
        });
        let all = futures_util::future::try_join_all(at_once).await.unwrap();
        let made = all.iter().filter(|it| it.from == 0).count();
        assert_eq!((made, all[0].to), (1, migrate::VERSION), "{all:?}");
        assert_eq!(checked(&postgres).await, Ok(()));
        assert_eq!(
            database.one("SELECT count(*) FROM weir.schema_version"),
            migrate::VERSION.to_string()
        );
    });
}

#[test]
fn steps_take_as_long_as_they_take_whatever_bound_the_role_has() {
    let database = Database::new();
    let (bound, name) = ("250ms", &database.name);
    for setting in ["statement_timeout", "lock_timeout"] {
        database.query(&format!("ALTER DATABASE {name} SET {setting} = '{bound}'"));
    }
    database.query("CREATE SCHEMA weir");
    database.query("CREATE TABLE weir.schema_version (version integer PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now())");
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&database.url(), &[])).unwrap();
        let (held, connection) = (
            postgres.write().await.unwrap(),
            postgres.write().await.unwrap(),
        );
        let lock = "BEGIN; SET LOCAL statement_timeout = 0; LOCK TABLE weir.schema_version";
        held.batch_execute(lock).await.unwrap();
        let release = async {
            // What the migration waits for, longer than the bound is.
            let waits = "SET LOCAL statement_timeout = 0; SELECT pg_sleep(1)";
            held.batch_execute(waits).await.unwrap();
            held.batch_execute("COMMIT").await.unwrap();
        };
        let (migrated, ()) = tokio::join!(migrate::migrate(connection), release);
        assert_eq!(migrated.unwrap().to, migrate::VERSION);
        // The pool's connections have the role's bound again.
        drop(held);
        for setting in ["statement_timeout", "lock_timeout"] {
            let connection = postgres.write().await.unwrap();
            let shown = connection.query_one(&format!("SHOW {setting}"), &[]).await;
            assert_eq!(shown.unwrap().get::<_, String>(0), bound);
        }
    });
}

#[test]
fn who_owns_the_schema_needs_no_right_to_create_one() {
    let database = Database::new();
    let role = format!("owner_of_{}", database.name);
    database.query(&format!("CREATE ROLE {role} LOGIN"));
    let url = database.url().replace("postgres@", &format!("{role}@"));
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&url, &[])).unwrap();
        let migrated = migrate::migrate(postgres.write().await.unwrap()).await;
        let refused = migrated.unwrap_err();
        assert!(refused.mend().is_some(), "{refused}");
        database.query(&format!("CREATE SCHEMA weir AUTHORIZATION {role}"));
        let migrated = migrate::migrate(postgres.write().await.unwrap()).await;
        assert_eq!(migrated.unwrap().to, migrate::VERSION);
        let now = clock::wall();
        let batch = Batch::open(&pack(&mut boot(1, now), 1, now).1).unwrap();
        let mut writer = Writer::new(postgres.clone(), RETENTION);
        let stored = writer.store(&[&batch]).await;
        assert_eq!(stored, Ok(vec![Outcome::Stored]));
    });
}

/// Of transactions Postgres has one since 17.
#[test]
fn a_transaction_takes_as_long_as_it_takes_whatever_bound_the_role_has() {
    let database = Database::new();
    let knows = "SELECT count(*) FROM pg_settings WHERE name = 'transaction_timeout'";
    if database.one(knows) == "1" {
        database.query(&format!(
            "ALTER DATABASE {} SET transaction_timeout = '250ms'",
            database.name
        ));
    }
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&database.url(), &[])).unwrap();
        for connection in [postgres.write().await, postgres.read().await] {
            let slow = "BEGIN; SELECT pg_sleep(1); COMMIT";
            assert!(connection.unwrap().batch_execute(slow).await.is_ok());
        }
    });
}

#[test]
fn a_schema_of_a_later_weir_is_left_alone() {
    let database = Database::new();
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&database.url(), &[])).unwrap();
        migrate::migrate(postgres.write().await.unwrap())
            .await
            .unwrap();
        database.query("INSERT INTO weir.schema_version VALUES (99, now())");
        let refused = migrate::migrate(postgres.write().await.unwrap()).await;
        let known = migrate::VERSION;
        assert_eq!(refused, Err(PostgresError::SchemaNew { found: 99, known }));
        let checked = migrate::check_version(&postgres.write().await.unwrap()).await;
        assert_eq!(checked.unwrap_err(), refused.unwrap_err());
    });
}

#[test]
fn a_database_of_another_encoding_is_refused() {
    let database = Database::new();
    let name = format!("{}_latin", database.name);
    database.query(&format!(
        "CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0"
    ));
    on_a_runtime(async {
        let postgres = Postgres::new(&config(&database.server.url_of(&name), &[])).unwrap();
        let refused = migrate::migrate(postgres.write().await.unwrap()).await;
        assert_eq!(refused, Err(PostgresError::Encoding("LATIN1".to_owned())));
    });
}

/// Days of the audit before today that have events; today has some, too.
const CLOSED: u32 = 3;

/// Puts ten transactions a day of 4,000 events each into the days from the first on, an event every second, after the one that is there.
const FILL: &str = "DO $$
    DECLARE number bigint := 2;
    BEGIN
        FOR ago IN REVERSE 3..0 LOOP
            FOR n IN 0..9 LOOP
                INSERT INTO weir.audit_batches
                        (day, boot_id, first, last, sealed, arrival, dropped, is_end, before, hash)
                    SELECT date 'TODAY' - ago, boot_id, number + i, number + i + 199, sealed,
                        pg_current_xact_id()::text::bigint, 0, false, before, hash
                    FROM weir.audit_batches, generate_series(0, 3999, 200) i WHERE first = 1;
                INSERT INTO weir.audit_events
                        (day, boot_id, seq, time, client, username, method, path, status, arrival, detail)
                    SELECT date 'TODAY' - ago, boot_id, number + i,
                        (date 'TODAY' - ago + (4000 * n + i) * interval '1 second') AT TIME ZONE 'UTC',
                        client, 'user-' || i * 7919 % 5000, method, path, status,
                        pg_current_xact_id()::text::bigint, detail
                    FROM weir.audit_events, generate_series(0, 3999) i WHERE seq = 1;
                number := number + 4000;
                COMMIT;
            END LOOP;
        END LOOP;
    END $$";

/// Brings the schema to where `weir` 0.1.0's first step had it.
const FIRST_STEP: &str = "DROP TRIGGER note_spans ON weir.audit_batches;
    DROP FUNCTION weir.note_spans;
    DROP TABLE weir.audit_spans;
    DELETE FROM weir.schema_version WHERE version > 1";

#[test]
fn a_schema_of_an_earlier_weir_is_brought_up_to_date_with_what_it_has() {
    let (kept, _process) = Kept::with(Kind::Postgres, 500);
    let database = kept.database.as_ref().unwrap();
    database.query(FIRST_STEP);
    kept.block(async {
        let connection = kept.pools().write().await.unwrap();
        let migrated = migrate::migrate(connection).await.unwrap();
        assert_eq!((migrated.from, migrated.to), (1, migrate::VERSION));
    });
    assert_eq!(kept.query(&Filter::default()).len(), 500);
    assert_eq!(kept.faults(), []);
}

/// Puts a batch and its event into each of 400 days, which came 5,000,000 transactions apart.
const YEARS: &str = "DO $$
    DECLARE past date;
    BEGIN
        FOR ago IN 1..400 LOOP
            past := date 'TODAY' - ago;
            EXECUTE format('CREATE TABLE weir.%I PARTITION OF weir.audit_batches FOR VALUES FROM (%L) TO (%L)',
                'audit_batches_' || to_char(past, 'YYYY_MM_DD'), past, past + 1);
            EXECUTE format('CREATE TABLE weir.%I PARTITION OF weir.audit_events FOR VALUES FROM (%L) TO (%L)',
                'audit_events_' || to_char(past, 'YYYY_MM_DD'), past, past + 1);
            INSERT INTO weir.audit_batches (day, boot_id, first, last, sealed, arrival, dropped, is_end, before, hash)
                SELECT past, boot_id, 1000 - ago, 1000 - ago, sealed, arrival - ago * 5000000::bigint, 0, false, before, hash
                FROM weir.audit_batches b WHERE b.first = 1 AND b.day = date 'TODAY';
            INSERT INTO weir.audit_events (day, boot_id, seq, time, client, method, path, status, arrival, detail)
                SELECT past, boot_id, 1000 - ago, time, client, method, path, status, arrival - ago * 5000000::bigint, detail
                FROM weir.audit_events e WHERE e.seq = 1 AND e.day = date 'TODAY';
        END LOOP;
    END $$";

#[test]
fn a_query_locks_the_days_that_it_reads_and_not_those_of_all_retention() {
    let kept = Kept::new(Kind::Postgres);
    let mut process = kept.process("a");
    kept.append(&mut process, 1..=1, clock::wall());
    let database = kept.database.as_ref().unwrap();
    let today = kept.block(async {
        let connection = kept.pools().write().await.unwrap();
        partitions::today(&connection).await.unwrap()
    });
    // In parts, each with locks of its own.
    database.query(&YEARS.replace("TODAY", &today.to_string()));
    let newest = Filter {
        order: Order::NewestFirst,
        limit: Some(3),
        ..Filter::default()
    };
    assert_eq!(kept.query(&newest).len(), 3);
    assert_eq!(kept.query(&Filter::default()).len(), 401);

    // Stopped at a partition that it needs, it has the locks of all that are planned together.
    let day = Day(today.0 - 2).to_string().replace('-', "_");
    let lock = format!("LOCK TABLE weir.audit_batches_{day} IN ACCESS EXCLUSIVE MODE");
    let held = "SELECT count(*) FROM pg_locks WHERE locktype = 'relation'
        AND pid = (SELECT pid FROM pg_locks WHERE locktype = 'relation' AND NOT granted)";
    let reader = Reader::new(pools(&database.url()));
    let (found, held) = kept.block(async {
        let mut holder = kept.pools().write().await.unwrap();
        let holding = holder.transaction().await.unwrap();
        holding.batch_execute(&lock).await.unwrap();
        let count = async {
            let mut count = 0;
            eventually(async || {
                count = database.one(held).parse().unwrap();
                count > 0
            })
            .await;
            holding.rollback().await.unwrap();
            count
        };
        tokio::join!(reader.query(&newest), count)
    });
    assert!(held < 50, "{held} locks of one statement");
    assert_eq!(found.unwrap().len(), 3);
}

/// A transaction that puts events waits for the lock 7, for longer than weir has it wait for any.
const STOP: &str = "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN PERFORM set_config('lock_timeout', '0', true), pg_advisory_xact_lock(7); RETURN NULL; END $$;
     CREATE TRIGGER stop AFTER INSERT ON weir.audit_events EXECUTE FUNCTION stop()";

#[test]
fn a_worker_that_is_sent_a_batch_again_locks_its_day_and_not_those_of_all_retention() {
    let kept = Kept::new(Kind::Postgres);
    let database = kept.database.as_ref().unwrap();
    kept.block(async {
        let mut writer = Writer::new(kept.pools().clone(), RETENTION);
        let now = clock::wall();
        let mut boot = boot(1, now);
        let [known, new] = [(); 2].map(|()| Batch::open(&pack(&mut boot, 1, now).1).unwrap());
        let stored = writer.store(&[&known]).await;
        assert_eq!(stored, Ok(vec![Outcome::Stored]));
        let today = partitions::today(&kept.pools().write().await.unwrap()).await;
        database.query(&YEARS.replace("TODAY", &today.unwrap().to_string()));
        database.query(STOP);
        let holder = kept.pools().write().await.unwrap();
        holder.batch_execute("SELECT pg_advisory_lock(7)").await.unwrap();
        let held = "SELECT count(*) FROM pg_locks WHERE locktype = 'relation'
            AND pid = (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND NOT granted)";
        let count = async {
            let mut count = 0;
            eventually(async || {
                count = database.one(held).parse().unwrap();
                count > 0
            })
            .await;
            let unlocked = holder.batch_execute("SELECT pg_advisory_unlock(7)").await;
            unlocked.unwrap();
            count
        };
        let both = [&known, &new];
        let (stored, held) = tokio::join!(writer.store(&both), count);
        assert_eq!(stored, Ok(vec![Outcome::Known, Outcome::Stored]));
        assert!(held < 50, "{held} locks of one transaction");
    });
}

#[test]
fn days_are_kept_whatever_bounds_the_role_has() {
    let kept = Kept::new(Kind::Postgres);
    let database = kept.database.as_ref().unwrap();
    for setting in ["statement_timeout", "lock_timeout"] {
        database.query(&format!(
            "ALTER DATABASE {} SET {setting} = '250ms'",
            database.name
        ));
    }
    // What weir bounds by itself is not asked here, and the machine may be slower.
    database.query(
        "CREATE FUNCTION wait() RETURNS event_trigger LANGUAGE plpgsql AS
             $$ BEGIN IF current_setting('lock_timeout') = '2s' THEN PERFORM set_config('lock_timeout', '0', true); END IF; END $$;
         CREATE EVENT TRIGGER wait ON ddl_command_start WHEN TAG IN ('DROP TABLE') EXECUTE FUNCTION wait()",
    );
    // For longer than the role's bounds are.
    let waits = "SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE datname = current_database() AND waitstart < clock_timestamp() - interval '500 ms'";
    let postgres = pools(&database.url());
    kept.block(async {
        let watch = kept.pools().write().await.unwrap();
        let unbounded = "SET statement_timeout = 0; SET lock_timeout = 0";
        watch.batch_execute(unbounded).await.unwrap();
        let today = partitions::today(&postgres.write().await.unwrap()).await;
        let today = today.unwrap();
        let mut reader = kept.pools().write().await.unwrap();
        let oldest = Day(today.0 - 1);
        partitions::admit(&mut reader, oldest, RETENTION)
            .await
            .unwrap();
        let name = oldest.to_string().replace('-', "_");
        // As long as these are under way, the index of a day that is over is not done, and the day does not go.
        let looks = [
            "SELECT 1".to_owned(),
            format!("SELECT FROM weir.audit_events_{name}"),
        ];
        for (look, retention) in looks.iter().zip([DAY, Duration::ZERO]) {
            let transaction = reader.build_transaction();
            let transaction = transaction.isolation_level(IsolationLevel::RepeatableRead);
            let transaction = transaction.start().await.unwrap();
            transaction.query(look, &[]).await.unwrap();
            let (hasher, metrics) = (Hasher::new(None), Metrics::default());
            let mut undone = Undone::new();
            let heart = Heartbeat::default();
            let keeps = keep_once(
                &postgres,
                retention,
                &hasher,
                &metrics.ingest,
                &mut undone,
                &heart,
            );
            let ends = async {
                eventually(async || !watch.query(waits, &[]).await.unwrap().is_empty()).await;
                transaction.rollback().await.unwrap();
            };
            let (kept, ()) = tokio::join!(keeps, ends);
            assert_eq!(kept, Ok(()), "{retention:?}");
        }
        let left = days_of(&reader).await.unwrap();
        assert!(!left.contains(&oldest), "{left:?}");
    });
}

/// Each would wait as long, and days are neither made nor removed meanwhile.
#[test]
fn behind_a_transaction_that_does_not_end_one_index_waits_and_not_that_of_each_day() {
    let kept = Kept::new(Kind::Postgres);
    let database = kept.database.as_ref().unwrap();
    // For less than an hour.
    database.query(
        "CREATE FUNCTION hurry() RETURNS event_trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM set_config('lock_timeout', '100ms', false); END $$;
         CREATE EVENT TRIGGER hurry ON ddl_command_start WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION hurry()",
    );
    kept.block(async {
        let mut reader = kept.pools().write().await.unwrap();
        let today = partitions::today(&reader).await.unwrap();
        for ago in 1..=3 {
            let admitted = partitions::admit(&mut reader, Day(today.0 - ago), RETENTION).await;
            assert_eq!(admitted, Ok(Admission::Ready));
        }
        let transaction = reader.build_transaction();
        let transaction = transaction.isolation_level(IsolationLevel::RepeatableRead);
        let transaction = transaction.start().await.unwrap();
        transaction.query("SELECT 1", &[]).await.unwrap();
        let (hasher, metrics) = (Hasher::new(None), Metrics::default());
        let (mut undone, heart) = (Undone::new(), Heartbeat::default());
        let mut keep = async || {
            let (pools, ingest) = (kept.pools(), &metrics.ingest);
            keep_once(pools, RETENTION, &hasher, ingest, &mut undone, &heart).await
        };
        let first = keep().await;
        assert!(
            first.as_ref().is_err_and(PostgresError::is_held),
            "{first:?}"
        );
        assert_eq!(keep().await, Ok(()));
        let begun = "SELECT count(*) FROM pg_class WHERE relname LIKE 'audit_events_%_by_user'";
        assert_eq!(database.one(begun), "1");
        transaction.rollback().await.unwrap();
    });
}

/// Of several hosts the one that is asked may be another than the one that a transaction is at, and have its number for a process of its own:
/// one that sends to a standby is at work for as long as that is there.
#[test]
fn a_process_that_is_another_s_is_not_taken_for_a_transaction_at_work() {
    let server = Server::start();
    let _standby = server.replica();
    on_a_runtime(async {
        let sends = "SELECT coalesce(min(pid), 0) FROM pg_stat_replication";
        eventually(async || server.one(sends) != "0").await;
        let sends: i32 = server.one(sends).parse().unwrap();
        let pools = pools(&server.url());
        let own = pools.write().await.unwrap();
        let row = own.query_one("SELECT pg_backend_pid()", &[]).await.unwrap();
        let sleeps = tokio::spawn(async move { own.batch_execute("SELECT pg_sleep(60)").await });
        eventually(async || pools.is_at_work(row.get(0)).await == Ok(true)).await;
        assert_eq!(pools.is_at_work(sends).await, Ok(false));
        sleeps.abort();
    });
}

/// Whoever stores or queries would wait behind each.
#[test]
fn behind_a_reader_of_a_day_one_removal_waits_and_the_next_look_begins_with_others() {
    let kept = Kept::new(Kind::Postgres);
    kept.block(async {
        let mut reader = kept.pools().write().await.unwrap();
        let today = partitions::today(&reader).await.unwrap();
        for ago in 2..=4 {
            let admitted = partitions::admit(&mut reader, Day(today.0 - ago), RETENTION).await;
            assert_eq!(admitted, Ok(Admission::Ready));
        }
        let oldest = Day(today.0 - 4).to_string().replace('-', "_");
        let transaction = reader.transaction().await.unwrap();
        let reads = format!("LOCK TABLE weir.audit_events_{oldest} IN ACCESS SHARE MODE");
        transaction.batch_execute(&reads).await.unwrap();
        let (hasher, metrics) = (Hasher::new(None), Metrics::default());
        let (mut undone, heart) = (Undone::new(), Heartbeat::default());
        for left in [4, 2] {
            let (pools, ingest) = (kept.pools(), &metrics.ingest);
            let kept_once = keep_once(pools, DAY, &hasher, ingest, &mut undone, &heart).await;
            assert!(
                kept_once.as_ref().is_err_and(PostgresError::is_held),
                "{kept_once:?}"
            );
            let days = partitions::list(&kept.pools().write().await.unwrap()).await;
            let past = days.unwrap().into_iter().filter(|day| *day < today);
            assert_eq!(past.count(), left);
        }
        transaction.rollback().await.unwrap();
    });
}

/// Who would wait for that ends a vacuum that goes by itself.
#[test]
fn days_are_kept_while_today_is_vacuumed() {
    let (kept, _process) = Kept::with(Kind::Postgres, 1);
    kept.block(async {
        let (hasher, metrics) = (Hasher::new(None), Metrics::default());
        let (mut undone, heart) = (Undone::new(), Heartbeat::default());
        let mut keep = async || {
            let keeps = keep_once(
                kept.pools(),
                RETENTION,
                &hasher,
                &metrics.ingest,
                &mut undone,
                &heart,
            );
            tokio::time::timeout(WITHIN, keeps).await
        };
        assert_eq!(keep().await, Ok(Ok(())));
        let mut vacuum = kept.pools().write().await.unwrap();
        let today = partitions::today(&vacuum).await.unwrap();
        let today = today.to_string().replace('-', "_");
        let vacuum = vacuum.transaction().await.unwrap();
        let lock = format!("LOCK TABLE weir.audit_events_{today} IN SHARE UPDATE EXCLUSIVE MODE");
        vacuum.batch_execute(&lock).await.unwrap();
        assert_eq!(keep().await, Ok(Ok(())));
    });
}

#[test]
fn a_replica_is_read_though_it_knows_no_serializable_transactions() {
    let primary = Server::start();
    let replica = primary.replica();
    primary.query("CREATE DATABASE strict");
    primary.query("ALTER DATABASE strict SET default_transaction_isolation = 'serializable'");
    on_a_runtime(async {
        let [write, read] = [&primary, &replica].map(|server| server.url_of("strict"));
        eventually(async || {
            let postgres = Postgres::new(&config(&write, std::slice::from_ref(&read))).unwrap();
            let connection = postgres.read().await.unwrap();
            let port = connection.query_one("SELECT inet_server_port()", &[]).await;
            port.is_ok_and(|port| port.get::<_, i32>(0) == i32::from(replica.port))
        })
        .await;
    });
}

/// The tables of a plan that are partitions, each with the index that it is read by; without one where it is read through.
fn reads(plan: &Value, found: &mut BTreeSet<(String, Option<String>)>) {
    let text = |key: &str| plan[key].as_str().map(str::to_owned);
    let parts = plan["Plans"].as_array().into_iter().flatten();
    match text("Relation Name").filter(|table| table.contains("_20")) {
        Some(table) if plan["Node Type"] == "Bitmap Heap Scan" => {
            let indexes = parts.map(|part| part["Index Name"].as_str().map(str::to_owned));
            found.extend(indexes.map(|index| (table.clone(), index)));
        }
        Some(table) => drop(found.insert((table, text("Index Name")))),
        None => parts.for_each(|part| reads(part, found)),
    }
}

/// It waited for the lock that days are made under. By default a transaction may see what was there when it began.
#[test]
fn a_day_that_another_worker_has_made_meanwhile_is_ready() {
    for (isolation, ago) in [
        ("read committed", 3),
        ("repeatable read", 4),
        ("serializable", 5),
    ] {
        is_made_once(isolation, ago);
    }
}

fn is_made_once(isolation: &str, ago: u32) {
    const MAKING: i64 = 0x7765_6972_0000_0002;
    let waits = "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
        WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted";
    let kept = Kept::new(Kind::Postgres);
    let database = kept.database.as_ref().unwrap();
    database.query(&format!(
        "ALTER DATABASE {} SET default_transaction_isolation = '{isolation}'",
        database.name
    ));
    // Found ahead of the server's own, and waits for longer than weir has it wait.
    database.query(
        "CREATE FUNCTION public.pg_advisory_xact_lock(bigint) RETURNS void LANGUAGE plpgsql AS
             $$ BEGIN PERFORM set_config('lock_timeout', '0', true), pg_catalog.pg_advisory_xact_lock($1); END $$",
    );
    database.query(&format!(
        "ALTER DATABASE {} SET search_path = public, pg_catalog",
        database.name
    ));
    let pools = pools(&database.url());
    kept.block(async {
        let mut other = pools.write().await.unwrap();
        let lock = |call: &str| format!("SELECT {call}({MAKING})");
        let locked = other.batch_execute(&lock("pg_advisory_lock")).await;
        locked.unwrap();
        let mut connection = pools.write().await.unwrap();
        let day = Day(partitions::today(&other).await.unwrap().0 - ago);
        let make = async {
            eventually(async || database.one(waits) == "1").await;
            let made = partitions::admit(&mut other, day, RETENTION).await;
            let unlocked = other.batch_execute(&lock("pg_advisory_unlock")).await;
            unlocked.unwrap();
            made
        };
        let admit = partitions::admit(&mut connection, day, RETENTION);
        let (admitted, made) = tokio::join!(admit, make);
        assert_eq!(admitted, Ok(Admission::Ready), "{isolation}");
        assert_eq!(made.unwrap(), Admission::Ready);
    });
}

#[test]
fn queries_read_the_days_they_ask_for_by_their_indexes() {
    let (kept, _process) = Kept::with(Kind::Postgres, 1);
    let database = kept.database.as_ref().unwrap();
    let today = kept.block(async {
        let mut connection = kept.pools().write().await.unwrap();
        let today = partitions::today(&connection).await.unwrap();
        for ago in 0..=CLOSED {
            let day = Day(today.0 - ago);
            let admitted = partitions::admit(&mut connection, day, RETENTION).await;
            admitted.unwrap();
        }
        today
    });
    database.query(&FILL.replace("TODAY", &today.to_string()));
    kept.block(async {
        let (hasher, metrics) = (Hasher::new(Some(KEY)), Metrics::default());
        let mut undone = Undone::new();
        keep_once(
            kept.pools(),
            RETENTION,
            &hasher,
            &metrics.ingest,
            &mut undone,
            &Heartbeat::default(),
        )
        .await
        .unwrap();
    });
    // As autovacuum does in a while.
    database.query("ANALYZE");
    // The server logs the plan of each statement that comes by a new connection.
    for setting in [
        "session_preload_libraries = auto_explain",
        "auto_explain.log_min_duration = 0",
        "auto_explain.log_format = json",
    ] {
        database.query(&format!("ALTER DATABASE {} SET {setting}", database.name));
    }
    let reader = Reader::new(pools(&database.url()));
    let log = "pg_read_file(current_setting('data_directory') || '/../log')";
    // Of which days' events, so many days ago, and by which index.
    let check = |filter: &Filter| {
        let before = database.server.one(&format!("SELECT length({log})"));
        kept.block(reader.query(filter)).unwrap();
        let said = database
            .server
            .one(&format!("SELECT substr({log}, {before} + 1)"));
        let mut found = BTreeSet::new();
        for plan in said.split("plan:\n").skip(1) {
            let lines = plan.lines().take_while(|line| line.starts_with('\t'));
            let plan: Value = serde_json::from_str(&lines.collect::<String>()).unwrap();
            // How far the transactions are is asked of the days of the last span, by a look at the end of each one's index.
            let query = plan["Query Text"].to_string();
            if !query.contains("max(arrival) >=") {
                reads(&plan["Plan"], &mut found);
            }
        }
        let mut events = BTreeSet::new();
        for (table, index) in found {
            let day = table[table.len() - 10..].replace('_', "-");
            let ago = (0..=CLOSED).find(|ago| Day(today.0 - ago).to_string() == day);
            // The days ahead of today have no rows.
            let Some(ago) = ago else { continue };
            let since = filter.since.map_or(Day(0), |since| Day::of(since.into()));
            assert!(today.0 - ago >= since.0, "{table} by {index:?}: {filter:?}");
            if table.starts_with("audit_events") {
                let index = index.map(|index| index.replace(&table, ""));
                events.insert((ago, index.unwrap_or_else(|| "-".to_owned())));
            }
        }
        events
    };
    let named = |index: &'static str| move |ago: u32| (ago, index.to_owned());
    let brin = named("_time_arrival_username_idx");
    let by_user = named("_by_user");
    let newest = Filter {
        order: Order::NewestFirst,
        limit: Some(100),
        ..Filter::default()
    };
    assert_eq!(check(&newest), BTreeSet::from([brin(0)]));

    // A batch may be of a later day than its events, so those days are looked at: by their times.
    let at = |ago: u32, hours: u32| Some((DAY * (today.0 - ago) + DAY / 24 * hours).into());
    for order in [Order::OldestFirst, Order::NewestFirst] {
        let range = Filter {
            since: at(2, 3),
            until: at(2, 4),
            order,
            ..Filter::default()
        };
        assert_eq!(check(&range), (0..=2).map(brin).collect(), "{order:?}");
    }

    let of_nobody = Filter {
        user: Some("nobody".to_owned()),
        ..newest
    };
    let found = check(&of_nobody);
    let (closed, open): (BTreeSet<_>, _) = found.into_iter().partition(|(ago, _)| *ago > 0);
    assert_eq!(open, BTreeSet::from([brin(0)]));
    // By the BRIN index only where little of a day is in a window.
    assert!(
        closed.is_superset(&(1..=CLOSED).map(by_user).collect()),
        "{closed:?}"
    );
    assert!(
        closed
            .iter()
            .all(|it| *it == brin(it.0) || *it == by_user(it.0)),
        "{closed:?}"
    );
    let of_late = Filter {
        since: at(1, 3),
        ..of_nobody
    };
    let found = check(&of_late);
    assert!(
        found.is_superset(&BTreeSet::from([brin(0), by_user(1)])),
        "{found:?}"
    );
    assert!(found.iter().all(|(_, index)| index != "-"), "{found:?}");
}

/// The longest silence of a heart within that time, looked at often.
async fn silence(heart: &Heartbeat, within: Duration) -> Duration {
    let mut longest = Duration::ZERO;
    let over = tokio::time::sleep(within);
    tokio::pin!(over);
    loop {
        tokio::select! {
            () = &mut over => return longest,
            () = tokio::time::sleep(Duration::from_millis(20)) => longest = longest.max(heart.age()),
        }
    }
}

#[test]
fn the_task_of_the_days_is_not_stuck_however_long_postgres_is_away() {
    let server = Server::start();
    on_a_runtime(async {
        let mut config = config(&server.url(), &[]);
        let patient = Postgres::new(&config).unwrap();
        migrate::migrate(patient.write().await.unwrap())
            .await
            .unwrap();
        config.timeout = Duration::from_millis(100);
        let postgres = Postgres::new(&config).unwrap();
        let days = keeping::Settings {
            retention: Duration::from_secs(86_400),
            key: None,
            every: Duration::from_millis(20),
        };
        let bound = days.silence(config.timeout);
        let metrics = Arc::<Metrics>::default();
        let mut supervisor = Supervisor::new(Handle::current(), metrics.clone());
        let stopping = supervisor.stopping();
        let begin = {
            let postgres = postgres.clone();
            move |heart: Heartbeat| {
                let metrics = metrics.ingest.clone();
                keeping::run(
                    days.clone(),
                    postgres.clone(),
                    metrics,
                    heart,
                    stopping.clone(),
                )
            }
        };
        supervisor.keep("partitions", bound, AtStop::Drop, begin);
        let watched = supervisor.watched().remove(0);
        let made = async || {
            let connection = postgres.write().await;
            let days = match &connection {
                Ok(connection) => days_of(connection).await,
                Err(_) => return false,
            };
            days.is_ok_and(|days| days.len() == 4)
        };
        eventually(made).await;
        let longer = bound + Duration::from_secs(1);
        type Step = fn(&Server);
        let ways: [(Step, Step); 2] = [
            (Server::pause, Server::resume),
            (Server::stop, Server::restart),
        ];
        for (leave, come_back) in ways {
            leave(&server);
            let silent = silence(&watched.heartbeat, longer).await;
            assert!(silent <= bound, "{silent:?}, where {bound:?} are allowed");
            come_back(&server);
            eventually(made).await;
        }
    });
}

#[test]
fn what_takes_long_beats_while_the_server_is_at_it() {
    const LONG: Duration = Duration::from_millis(2_500);
    let database = Database::new();
    on_a_runtime(async {
        let mut config = config(&database.url(), &[]);
        config.write_pool = 1;
        let postgres = Postgres::new(&config).unwrap();
        let connection = postgres.write().await.unwrap();
        let backend = connection.query_one("SELECT pg_backend_pid()", &[]).await;
        let backend = backend.unwrap().get(0);
        let (at_work, hangs) = (Heartbeat::default(), Heartbeat::default());
        at_work.beat();
        hangs.beat();
        let sleeps = connection.batch_execute("SELECT pg_sleep(6)");
        let working = keeping::beating(&postgres, backend, &at_work, sleeps);
        let (slept, silent) = tokio::join!(working, silence(&at_work, 2 * LONG));
        slept.unwrap();
        assert!(silent < LONG, "{silent:?}");
        // It waits, and the server for it.
        let hanging = keeping::beating(&postgres, backend, &hangs, std::future::pending::<()>());
        assert!(tokio::time::timeout(LONG, hanging).await.is_err());
        assert!(hangs.age() >= LONG);
    });
}
