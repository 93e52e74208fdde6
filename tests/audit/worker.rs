//! `weir worker`, `weir proxy` and `weir migrate` as processes: what they refuse, and how they end.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::harness::postgres::{self, Database};
use super::harness::process::{Log, Running, faketime, file, signal};
use super::harness::redis::{Server, key_prefix};
use super::harness::{eventually, eventually_within, metrics};
use tempfile::NamedTempFile;
use weir::clock;

const BESIDE: &str = "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {address: 127.0.0.1:0}\nruntime: {lanes: 1}\n";

/// `weir COMMAND -c FILE` to its end.
fn weir(command: &str, more: &str) -> (Output, String) {
    let config = file(&format!("{BESIDE}{more}"));
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args([command, "-c"])
        .arg(config.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

#[test]
fn a_worker_needs_redis_and_postgres() {
    let redis = "redis: {urls: redis://127.0.0.1:1}\n";
    for (more, missing) in [("", "redis"), (redis, "postgres")] {
        let (output, said) = weir("worker", more);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let part =
            format!("has no \"{missing}\": a worker brings the audit from redis into postgres");
        assert!(said.contains(&part), "{said}");
    }
}

/// By one, batches would be of days that retention has removed.
#[test]
fn a_clock_that_is_years_behind_is_told_at_the_start() {
    let library = faketime();
    let config = file(BESIDE);
    for (clock, is_told) in [("@1970-01-02 00:00:00", true), ("+0", false)] {
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["worker", "-c"])
            .arg(config.path())
            .envs([("LD_PRELOAD", library.as_str()), ("FAKETIME", clock)])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            said.contains("the clock is years behind"),
            is_told,
            "{said}"
        );
    }
}

#[test]
fn there_is_nothing_to_migrate_without_postgres() {
    let (output, said) = weir("migrate", "");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("has no \"postgres\""), "{said}");
}

#[test]
fn an_address_of_postgres_that_cannot_be_used_is_told_without_its_words() {
    let more =
        "redis: {urls: redis://127.0.0.1:1}\naudit: {}\npostgres: {write: 'host=a hunter2=b'}\n";
    for command in ["worker", "migrate"] {
        let (output, said) = weir(command, more);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("postgres.write") && !said.contains("hunter2"),
            "{said}"
        );
    }
}

#[test]
fn a_proxy_ends_well_on_sigterm() {
    let config = file(BESIDE);
    let mut proxy = Running::start_as("proxy", config.path(), &[]);
    proxy.signal("TERM");
    assert_eq!(proxy.child.wait().unwrap().code(), Some(0));
}

/// What people send to nginx.
#[test]
fn sigquit_drains_and_the_user_s_signals_end_nothing() {
    let config = file(BESIDE);
    for command in ["run", "proxy"] {
        let mut weir = Running::start_as(command, config.path(), &[]);
        for name in ["USR1", "USR2"] {
            weir.signal(name);
            weir.log_until(&format!("signal=\"SIG{name}\""));
        }
        assert_eq!(weir.client().get("/").status, 502, "{command}");
        weir.signal("QUIT");
        weir.log_until("draining");
        assert_eq!(weir.child.wait().unwrap().code(), Some(0), "{command}");
    }
}

/// A file of a worker, with these keys of `postgres` behind its address.
fn ingesting(redis: &Server, url: &str, keys: &str, spool: &Path) -> NamedTempFile {
    file(&format!(
        "{BESIDE}audit: {{spool: {{path: {}}}}}\npostgres: {{write: '{url}', pool: {{timeout: 500ms}}{keys}}}\n\
         worker: {{health: {{interval: 50ms, cache: 0s}}}}\n{}",
        spool.display(),
        redis.yaml(&key_prefix())
    ))
}

fn migrate(config: &NamedTempFile) -> Output {
    let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
    weir.args(["migrate", "-c"]).arg(config.path());
    weir.output().unwrap()
}

#[test]
fn a_schema_is_brought_up_to_date_once_and_a_newer_one_is_refused() {
    let (redis, database) = (Server::single(), Database::new());
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &database.url(), "", folder.path());
    let said = |output: Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(said(migrate(&config)).starts_with("the schema was at version 0 and is at "));
    assert!(said(migrate(&config)).ends_with(" already\n"));
    database.query("INSERT INTO weir.schema_version VALUES (999)");
    for command in ["migrate", "worker"] {
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args([command, "-c"])
            .arg(config.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command}: {said}");
        assert!(said.contains("is version 999"), "{command}: {said}");
    }
}

/// Each begins while Postgres is away, and then finds a schema that it cannot work with, now or later. What the worker waits for comes to
/// one or two minutes, by clocks that run twenty times as fast; whoever has lanes serves on beyond that.
#[test]
fn a_worker_that_cannot_keep_its_work_up_exits_1_and_lanes_serve_on() {
    let library = faketime();
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &postgres.url(), "", folder.path());
    // Long enough for a connection by the fast clocks, too.
    let text = std::fs::read_to_string(config.path()).unwrap();
    let config = file(&text.replace("timeout: 500ms", "timeout: 30s"));
    assert!(migrate(&config).status.success());
    postgres.query("INSERT INTO weir.schema_version VALUES (999)");
    postgres.kill();
    let fast = [("LD_PRELOAD", library.as_str()), ("FAKETIME", "+0 x20")];
    let start = |command| Running::start_as(command, config.path(), &fast);
    let [mut worker, mut run] = ["worker", "run"].map(start);
    postgres.restart();
    let mut code = None;
    eventually_within(Duration::from_secs(60), || {
        let ended = worker.child.try_wait().unwrap();
        code = ended.map(|ended| ended.code());
        code.is_some()
    });
    assert_eq!(code, Some(Some(1)));
    // The log, and then what the process says as it ends.
    worker.log_until("task failed, it is begun again");
    for line in ["weir ends", "error: the task \""] {
        let line = worker.log_until(line);
        for part in ["cannot be kept up", "is version 999"] {
            assert!(line.contains(part), "{line}");
        }
    }
    run.log_until("weir serves on without");
    assert_eq!(run.client().get("/").status, 502);
    assert_eq!(restarts(&run), 0);
    run.signal("TERM");
    assert_eq!(run.child.wait().unwrap().code(), Some(0));
}

/// How often the tasks that wait for the schema were begun again.
fn restarts(weir: &Running) -> u64 {
    let of = |task| weir.metric(&format!("weir_task_restarts_total{{task=\"{task}\"}}"));
    of("ingest") + of("partitions")
}

/// What Postgres may refuse at the start, and how it is mended.
#[test]
fn lanes_begin_and_serve_whatever_postgres_refuses_and_the_audit_follows() {
    let redis = Server::single();
    let url_as = |database: &Database, user: &str| {
        let user = format!("postgres://{user}@");
        database.url().replace("postgres://postgres@", &user)
    };
    // Keys of the file, what is done before, what is told of it, and how it is mended.
    type Case = (
        &'static str,
        fn(&Database) -> String,
        &'static str,
        fn(&Database, &NamedTempFile),
    );
    let cases: [Case; 5] = [
        (
            ", migrate: false",
            |_| String::new(),
            "is version 0",
            |_, config| assert!(migrate(config).status.success()),
        ),
        (
            "",
            |_| {
                "CREATE SCHEMA weir; CREATE TABLE weir.schema_version (version integer PRIMARY KEY, \
                 applied timestamptz NOT NULL DEFAULT now()); INSERT INTO weir.schema_version VALUES (999)"
                    .to_owned()
            },
            "is version 999",
            |database, _| drop(database.query("DROP SCHEMA weir CASCADE")),
        ),
        (
            "",
            |_| String::new(),
            "SQLSTATE 28000",
            |database, _| {
                drop(database.query(&format!(
                    "CREATE ROLE {}_user LOGIN SUPERUSER",
                    database.name
                )))
            },
        ),
        (
            "",
            |database| format!("CREATE ROLE {}_user LOGIN", database.name),
            "SQLSTATE 42501",
            |database, _| {
                let name = &database.name;
                database.query(&format!("GRANT CREATE ON DATABASE {name} TO {name}_user"));
            },
        ),
        (
            "",
            |database| format!("ALTER DATABASE {0} RENAME TO {0}_away", database.name),
            "SQLSTATE 3D000",
            |database, _| {
                let name = &database.name;
                database
                    .server
                    .query(&format!("ALTER DATABASE {name}_away RENAME TO {name}"));
            },
        ),
    ];
    for (keys, before, told, mend) in cases {
        let database = Database::new();
        let folder = tempfile::tempdir().unwrap();
        let before = before(&database);
        if before.contains("RENAME") {
            database.server.query(&before);
        } else if !before.is_empty() {
            database.query(&before);
        }
        let url = match told {
            "SQLSTATE 28000" | "SQLSTATE 42501" => {
                url_as(&database, &format!("{}_user", database.name))
            }
            _ => database.url(),
        };
        let config = ingesting(&redis, &url, keys, folder.path());
        let mut weir = Running::start(config.path());
        assert_eq!(weir.client().get("/").status, 502, "{told}");
        assert_eq!(weir.admin().get("/ready").status, 200, "{told}");
        let health = weir.admin().get("/health");
        assert_eq!(health.status, 200, "{told}: {}", health.body);
        let body: serde_json::Value = serde_json::from_str(&health.body).unwrap();
        assert_eq!(body["status"], "degraded", "{body}");
        let schema = &body["checks"]["postgres_schema"];
        assert!(schema["error"].as_str().unwrap().contains(told), "{body}");
        let missing = |weir: &Running| weir.metric("weir_ingest_schema_missing") == 1;
        assert!(missing(&weir), "{told}");
        mend(&database, &config);
        eventually_within(Duration::from_secs(30), || !missing(&weir));
        eventually(|| database.one("SELECT count(*) FROM weir.audit_events") == "1");
        assert_eq!(restarts(&weir), 0, "{told}");
        weir.signal("TERM");
        assert_eq!(weir.child.wait().unwrap().code(), Some(0), "{told}");
    }
}

/// One that takes connections and says nothing holds nobody up for the time that it has.
#[test]
fn lanes_begin_though_postgres_hangs_and_the_audit_follows() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &postgres.url(), "", folder.path());
    let text = std::fs::read_to_string(config.path()).unwrap();
    let config = file(&text.replace("timeout: 500ms", "timeout: 30s"));
    postgres.pause();
    let start = clock::now();
    let mut weir = Running::start(config.path());
    assert!(start.elapsed() < Duration::from_secs(9));
    assert_eq!(weir.client().get("/").status, 502);
    assert_eq!(weir.admin().get("/ready").status, 200);
    let health = weir.admin().get("/health").body;
    let health: serde_json::Value = serde_json::from_str(&health).unwrap();
    let schema = &health["checks"]["postgres_schema"];
    assert_eq!(schema["status"], "degraded", "{health}");
    assert_eq!(schema["error"], "postgres did not answer yet", "{health}");
    postgres.resume();
    eventually_within(Duration::from_secs(60), || {
        weir.told("weir_ingest_schema_missing") == Some(0.0)
    });
    eventually(|| postgres.one("SELECT count(*) FROM weir.audit_events") == "1");
    weir.signal("TERM");
    assert_eq!(weir.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_worker_that_does_not_migrate_says_what_to_do() {
    let (redis, database) = (Server::single(), Database::new());
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &database.url(), ", migrate: false", folder.path());
    let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
    let output = weir.args(["worker", "-c"]).arg(config.path()).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("weir migrate"), "{said}");
    assert!(migrate(&config).status.success());
    let mut worker = Running::start_as("worker", config.path(), &[]);
    eventually(|| worker.admin().get("/ready").status == 200);
    worker.signal("HUP");
    worker.log_until("restart it");
    for name in ["USR1", "USR2"] {
        worker.signal(name);
        worker.log_until(&format!("signal=\"SIG{name}\""));
    }
    worker.signal("QUIT");
    assert_eq!(worker.child.wait().unwrap().code(), Some(0));
}

/// As it ends a proxy.
#[test]
fn a_second_sigterm_ends_a_worker_in_the_midst_of_a_transaction() {
    let (redis, database) = (Server::single(), Database::new());
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &database.url(), "", folder.path());
    assert!(migrate(&config).status.success());
    database.query(
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM pg_sleep(25); RETURN NEW; END $$;
         CREATE TRIGGER late BEFORE INSERT ON weir.audit_batches FOR EACH ROW EXECUTE FUNCTION late()",
    );
    let proxy = Running::start_as("proxy", config.path(), &[]);
    let mut worker = Running::start_as("worker", config.path(), &[]);
    assert_eq!(proxy.client().get("/").status, 502);
    let late = "SELECT count(*) FROM pg_stat_activity
        WHERE wait_event = 'PgSleep' AND datname = current_database()";
    eventually(|| database.one(late) == "1");
    worker.signal("TERM");
    worker.log_until("stopping");
    let asked = clock::now();
    worker.signal("TERM");
    assert_eq!(worker.child.wait().unwrap().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(12));
}

#[test]
fn a_worker_that_begins_heeds_sigterm_while_postgres_hangs() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    redis.kill();
    postgres.pause();
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &postgres.url(), "", folder.path());
    let text = std::fs::read_to_string(config.path()).unwrap();
    let text = text.replace("timeout: 500ms", "timeout: 30s");
    // However long that is, Redis is not waited for longer than half a second.
    let text = text.replace("{urls", "{connect_timeout: 1m, urls");
    assert!(text.contains("connect_timeout: 1m"));
    let config = file(&text);
    let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
    weir.args(["worker", "-c"]).arg(config.path());
    let mut child = weir.stderr(Stdio::piped()).spawn().unwrap();
    Log::of(&mut child).until("redis is not there yet; going on without");
    let asked = clock::now();
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_worker_starts_without_its_stores_and_joins_them() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    redis.kill();
    postgres.kill();
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &postgres.url(), "", folder.path());
    let mut worker = Running::start_as("worker", config.path(), &[]);
    assert_eq!(worker.admin().get("/ready").status, 503);
    assert_eq!(worker.admin().get("/live").status, 200);
    redis.restart();
    postgres.restart();
    eventually(|| worker.admin().get("/ready").status == 200);
    let has_schema = "SELECT count(*) FROM pg_namespace WHERE nspname = 'weir'";
    eventually(|| postgres.one(has_schema) == "1");
    worker.signal("TERM");
    assert_eq!(worker.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_worker_tells_once_of_all_streams_that_it_cannot_read() {
    let (redis, database) = (Server::single(), Database::new());
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &database.url(), "", folder.path());
    let worker = Running::start_as("worker", config.path(), &[]);
    // Each has its group by then.
    eventually(|| redis.cli(&["KEYS", "*:a:*"]).list().len() == 8);
    redis.kill();
    let part = "cannot be read; they are asked again";
    worker.log_until(part);
    redis.restart();
    let lines = worker.log_to("all audit streams are read again");
    let more = lines.iter().filter(|line| line.contains(part));
    assert_eq!(more.count(), 0, "{lines:?}");
}

#[test]
fn a_worker_tells_nothing_of_upstreams_that_it_never_sees() {
    let config = file(
        "listen: 127.0.0.1:0\nadmin: {address: 127.0.0.1:0}\naudit: {}\n\
         upstreams: {app: {endpoints: [{dns: 'app.test:1'}], circuit_breaker: one}}\n\
         circuit_breakers: {one: {}}\nroutes: [{upstream: app}]\n\
         redis: {urls: redis://127.0.0.1:1}\npostgres: {write: 'postgres://weir@127.0.0.1:1/weir'}\n",
    );
    let worker = Running::start_as("worker", config.path(), &[]);
    let told = worker.admin().get("/metrics").body;
    let of_requests = |line: &&str| line.contains("upstream=") || line.contains("route=");
    assert_eq!(told.lines().find(of_requests), None);
    assert!(told.contains("weir_ingest_events_total"), "{told}");
}

#[test]
fn a_worker_that_waits_begins_once_its_stores_are_there() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    redis.kill();
    postgres.kill();
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &postgres.url(), ", migrate: false", folder.path());
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["worker", "--wait-for-deps", "--migrate", "-c"])
        .arg(config.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = Log::of(&mut child);
    log.until("waiting for postgres.write (127.0.0.1:");
    redis.restart();
    log.until(&format!("redis (127.0.0.1:{}) is there", redis.port));
    postgres.restart();
    log.until(" is there");
    log.until("working");
    let has_schema = "SELECT count(*) FROM pg_namespace WHERE nspname = 'weir'";
    eventually(|| postgres.one(has_schema) == "1");
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Long enough for what is there to be found, on a slow machine too.
const IN_VAIN: &str = "5s";

/// A worker that waits for its stores for so long.
fn waiting(config: &Path, within: &str) -> Child {
    let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
    weir.arg("worker").arg(format!("--wait-for-deps={within}"));
    weir.arg("-c").arg(config).stderr(Stdio::piped());
    weir.spawn().unwrap()
}

#[test]
fn a_worker_that_waits_in_vain_says_what_is_missing() {
    let redis = Server::single();
    let folder = tempfile::tempdir().unwrap();
    let url = "postgres://weir:hunter2@127.0.0.1:1/weir?sslmode=disable";
    let config = ingesting(&redis, url, "", folder.path());
    let waiting = |within: &str| waiting(config.path(), within);
    let output = waiting(IN_VAIN).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let error = said.split("error: ").last().unwrap();
    let missing = format!("after {IN_VAIN} this is still missing:");
    assert!(error.starts_with(&missing), "{said}");
    assert!(
        error.contains("postgres.write (127.0.0.1:1/weir): "),
        "{said}"
    );
    assert!(error.contains("Connection refused"), "{said}");
    assert!(error.contains("mend its address"), "{said}");
    assert!(
        !error.contains("redis") && !said.contains("hunter2"),
        "{said}"
    );
    // Each state is told once, however often it is found.
    assert_eq!(
        said.matches("waiting for postgres.write").count(),
        1,
        "{said}"
    );

    redis.kill();
    let mut ended = waiting("1h");
    Log::of(&mut ended).until("waiting for redis (");
    signal(&ended, "TERM");
    assert_eq!(ended.wait().unwrap().code(), Some(0));
}

#[test]
fn a_worker_that_waits_waits_for_the_schema_but_not_for_an_older_one() {
    let (redis, database) = (Server::single(), Database::new());
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &database.url(), ", migrate: false", folder.path());
    let output = waiting(config.path(), IN_VAIN).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let error = said.split("error: ").last().unwrap();
    let missing = format!("after {IN_VAIN} this is still missing:");
    for part in [
        missing.as_str(),
        "the schema in postgres: ",
        "run `weir migrate`",
    ] {
        assert!(error.contains(part), "{said}");
    }

    let mut worker = waiting(config.path(), "1m");
    let log = Log::of(&mut worker);
    log.until("waiting for the schema in postgres");
    assert!(migrate(&config).status.success());
    log.until("the schema in postgres is there");
    log.until("working");
    signal(&worker, "TERM");
    assert_eq!(worker.wait().unwrap().code(), Some(0));

    database.query("INSERT INTO weir.schema_version VALUES (999)");
    let output = waiting(config.path(), "1h").wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("is version 999"), "{said}");
}

#[test]
fn a_cluster_that_is_not_formed_is_waited_for() {
    let (redis, database) = (
        Server::with(|_, _| "cluster-enabled yes\n".to_owned()),
        Database::new(),
    );
    let config = file(&format!(
        "{BESIDE}audit: {{}}\npostgres: {{write: '{}'}}\nredis: {{mode: cluster, urls: ['redis://127.0.0.1:{}']}}\n",
        database.url(),
        redis.port
    ));
    let waiting = |within: &str| waiting(config.path(), within);
    let output = waiting(IN_VAIN).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let why = "not all slots have a server yet";
    assert!(said.contains(why), "{said}");

    // As while it is being formed, a node has its slots before others are given away.
    let give = |slots: std::ops::Range<u16>| {
        let slots: Vec<_> = slots.map(|slot| slot.to_string()).collect();
        let words = ["CLUSTER", "ADDSLOTS"].into_iter();
        redis.cli(
            &words
                .chain(slots.iter().map(String::as_str))
                .collect::<Vec<_>>(),
        );
    };
    give(0..10_000);
    let mut worker = waiting("1m");
    let log = Log::of(&mut worker);
    log.until(why);
    give(10_000..16_384);
    log.until(" is there");
    log.until("working");
    signal(&worker, "TERM");
    assert_eq!(worker.wait().unwrap().code(), Some(0));
}

#[test]
fn await_ends_once_weir_is_ready() {
    let (redis, postgres) = (Server::single(), postgres::Server::start());
    postgres.kill();
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &postgres.url(), "", folder.path());
    let worker = Running::start_as("worker", config.path(), &[]);
    let waiting = |within: &str| {
        let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
        weir.args(["await", "--address", &worker.admin, "--timeout", within]);
        weir.stderr(Stdio::piped()).spawn().unwrap()
    };
    let output = waiting("3s").wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("was not 200 within 3s: it says 503: {"),
        "{said}"
    );
    let mut waiting = waiting("1m");
    postgres.restart();
    assert_eq!(waiting.wait().unwrap().code(), Some(0));
    assert_eq!(worker.admin().get("/ready").status, 200);
}

#[test]
fn await_asks_the_admin_port_of_the_file() {
    let config =
        file("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {address: 127.0.0.1:1}\n");
    let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
    let output = weir
        .args(["await", "--timeout", "150ms", "-c"])
        .arg(config.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("127.0.0.1:1/ready was not 200 within 150ms"),
        "{said}"
    );
    assert!(said.contains("is weir running?"), "{said}");
}

#[test]
fn run_does_the_worker_s_work_beside_its_lanes() {
    let (redis, database) = (Server::single(), Database::new());
    let folder = tempfile::tempdir().unwrap();
    let config = ingesting(&redis, &database.url(), "", folder.path());
    let mut weir = Running::start(config.path());
    // Nothing listens at the upstream; a refusal is audited like another.
    assert_eq!(weir.client().get("/").status, 502);
    eventually(|| database.one("SELECT count(*) FROM weir.audit_events") == "1");
    let health = weir.admin().get("/health").body;
    for check in ["postgres_write", "audit_lag", "spool", "lanes"] {
        assert!(health.contains(&format!("\"{check}\"")), "{health}");
    }
    // Of one time, since a connection goes from one state to the other.
    let told = weir.admin().get("/metrics").body;
    let open = |state| {
        let of = format!("pool=\"write\",state=\"{state}\"");
        metrics::value(&told, &format!("weir_postgres_connections{{{of}}}"))
    };
    assert!(open("idle") > Some(0.0) || open("in_use") > Some(0.0));
    let waiting = weir.told("weir_postgres_waiting{pool=\"write\"}");
    assert_eq!(waiting, Some(0.0));
    // There may be no other worker: all is stored when it has ended, to the end mark.
    assert_eq!(weir.client().get("/").status, 502);
    weir.signal("TERM");
    assert_eq!(weir.child.wait().unwrap().code(), Some(0));
    let stored =
        "SELECT string_agg(concat(first, is_end), ' ' ORDER BY first) FROM weir.audit_batches";
    assert_eq!(database.one(stored), "1f 2f 3t");
}
