//! Certificates by which weir speaks to Redis and Postgres, replaced while it runs: real servers, which take no others from then on.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::harness::eventually;
use super::harness::postgres::{self, query};
use super::harness::process::{Log, Running, file, signal};
use super::harness::redis::{Certificates, Server, key_prefix, tls_server};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tempfile::{NamedTempFile, TempDir, tempdir};
use weir::clock;

const REFUSED: &str = "weir_config_reloads_total{result=\"refused\"}";
const TAKEN: &str = "weir_config_last_reload_successful";
const ENDS: &str = "weir_tls_certificate_not_after_timestamp_seconds";

/// The stores of a weir, each of which asks for its certificate.
struct Stores {
    /// The files of the servers of Redis.
    theirs: TempDir,
    /// For `main`, `rate_limit` and `sessions`.
    redis: [Server; 3],
    postgres: postgres::Server,
    spool: TempDir,
}

impl Stores {
    fn start(certificates: &Certificates) -> Stores {
        let theirs = tempdir().unwrap();
        certificates.replace(theirs.path());
        Stores {
            redis: [(); 3].map(|()| tls_server(theirs.path(), true)),
            postgres: postgres::Server::with_tls(certificates, true),
            theirs,
            spool: tempdir().unwrap(),
        }
    }

    /// Of a weir with its own files in this folder.
    fn config(&self, ours: &Path) -> NamedTempFile {
        let ours = ours.display();
        let [main, rate_limit, sessions] = self.redis.each_ref().map(|redis| redis.second_port);
        file(&format!(
            "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
             redis:\n  urls: 'rediss://127.0.0.1:{main}'\n  rate_limit: {{urls: 'rediss://127.0.0.1:{rate_limit}'}}\n  \
             sessions: {{urls: 'rediss://127.0.0.1:{sessions}'}}\n  key_prefix: '{}'\n  timeout: 500ms\n  tls: &tls\n    \
             ca: '{ours}/ca.pem'\n    certificate: {{cert: '{ours}/server.pem', key: '{ours}/server.key'}}\n\
             postgres: {{write: 'postgres://postgres@127.0.0.1:{}/postgres?sslmode=require', tls: *tls}}\n\
             audit: {{spool: {{path: '{}'}}}}\nworker: {{health: {{cache: 0s}}}}\n",
            key_prefix(),
            self.postgres.port,
            self.spool.path().display(),
        ))
    }

    /// They take these alone from now on, and their connections are cut.
    fn take(&self, new: &Certificates) {
        new.replace(self.theirs.path());
        for redis in &self.redis {
            redis.kill();
            redis.restart();
        }
        self.postgres.stop();
        self.postgres.restart_with(new);
    }

    /// The connections under TLS to each, by the numbers that the servers give them.
    fn connections(&self) -> [BTreeSet<String>; 4] {
        let [main, rate_limit, sessions] = self.redis.each_ref().map(|redis| {
            let listed = redis.cli(&["CLIENT", "LIST"]);
            let by_tls = format!(" laddr=127.0.0.1:{} ", redis.second_port);
            let lines = listed.text().lines().filter(|line| line.contains(&by_tls));
            let ids = lines.map(|line| line.split(' ').next().unwrap().to_owned());
            ids.collect()
        });
        let sql = "SELECT pid FROM pg_stat_ssl WHERE ssl";
        let backends = query(&self.postgres.socket_url(), sql);
        let postgres = backends.into_iter().flatten().collect();
        [main, rate_limit, sessions, postgres]
    }
}

/// Whether it reaches its stores.
fn works(weir: &Running) -> bool {
    let health: Value = serde_json::from_str(&weir.admin().get("/health").body).unwrap();
    let stores = [
        "redis_main",
        "redis_rate_limit",
        "redis_sessions",
        "postgres_write",
    ];
    let is_well = |name: &&str| match &health["checks"][*name] {
        // A proxy does not look at Postgres until it is asked for the audit.
        Value::Null => *name == "postgres_write",
        check => check["status"] == "ok",
    };
    stores.iter().all(is_well) && audit(weir) == 200
}

/// The status of a query, which goes to Postgres.
fn audit(weir: &Running) -> u16 {
    let mut admin = weir.admin();
    let reply = admin.send("GET", "/v1/audit?limit=1", &["Host: localhost"], "");
    reply.status
}

/// Killed when the test lets go of it.
struct Waiting(Child);

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// When the certificate of this folder ends, that weir shows.
fn ends(weir: &Running, folder: &TempDir) -> u64 {
    let file = folder.path().join("server.pem");
    weir.metric(&format!("{ENDS}{{certificate=\"{}\"}}", file.display()))
}

/// In how many days the certificate ends that it shows, rounded.
fn days_left(weir: &Running, ours: &TempDir) -> u64 {
    const DAY: u64 = 86_400;
    let left = ends(weir, ours).saturating_sub(clock::wall().as_secs());
    (left + DAY / 2) / DAY
}

#[test]
fn stores_that_take_new_certificates_alone_are_met_with_them() {
    let (old, new) = (Certificates::lasting(2), Certificates::lasting(3));
    let ours = tempdir().unwrap();
    old.replace(ours.path());
    let stores = Stores::start(&old);
    let config = stores.config(ours.path());
    let weirs = ["run", "proxy", "worker"].map(|it| Running::start_as(it, config.path(), &[]));
    for weir in &weirs {
        eventually(|| works(weir));
        assert_eq!(days_left(weir, &ours), 2);
    }
    let before = stores.connections();
    assert!(before.iter().all(|each| !each.is_empty()), "{before:?}");

    new.replace(ours.path());
    for weir in &weirs {
        eventually(|| days_left(weir, &ours) == 3 && weir.metric(TAKEN) == 1);
        assert!(works(weir));
    }
    let now = stores.connections();
    let stay = before
        .iter()
        .zip(&now)
        .all(|(before, now)| before.is_subset(now));
    assert!(stay, "{before:?} {now:?}");

    stores.take(&new);
    for weir in &weirs {
        eventually(|| works(weir));
    }
    let after = stores.connections();
    assert!(after.iter().all(|each| !each.is_empty()), "{after:?}");

    // They do look at what they are shown.
    let stale = tempdir().unwrap();
    old.replace(stale.path());
    fs::copy(new.path("ca.pem"), stale.path().join("ca.pem")).unwrap();
    let stale = Running::start_as("proxy", stores.config(stale.path()).path(), &[]);
    let health: Value = serde_json::from_str(&stale.admin().get("/health").body).unwrap();
    assert_ne!(health["checks"]["redis_main"]["status"], "ok");
    assert_ne!(audit(&stale), 200);
}

#[test]
fn a_file_of_a_store_that_is_gone_or_wrong_leaves_what_was_read_before() {
    let certificates = Certificates::make();
    let ours = tempdir().unwrap();
    certificates.replace(ours.path());
    let stores = Stores::start(&certificates);
    let config = stores.config(ours.path());
    let weirs = ["run", "proxy", "worker"].map(|it| Running::start_as(it, config.path(), &[]));
    let (cert, aside) = (ours.path().join("server.pem"), ours.path().join("aside"));
    for wrong in [None, Some("no certificate")] {
        let refused = weirs.each_ref().map(|weir| weir.metric(REFUSED));
        fs::rename(&cert, &aside).unwrap();
        if let Some(wrong) = wrong {
            fs::write(&cert, wrong).unwrap();
        }
        for (weir, before) in weirs.iter().zip(refused) {
            eventually(|| weir.metric(REFUSED) > before && weir.metric(TAKEN) == 0);
            for store in ["redis.tls", "postgres.tls"] {
                let said = weir.log_until(store);
                assert!(
                    said.contains("not reloaded") && said.contains("server.pem"),
                    "{said}"
                );
            }
        }
        // New connections are made by what was read.
        for redis in &stores.redis {
            redis.cli(&["CLIENT", "KILL", "TYPE", "normal"]);
        }
        for weir in &weirs {
            eventually(|| works(weir));
            assert_eq!(days_left(weir, &ours), 2);
        }
        fs::rename(&aside, &cert).unwrap();
        for weir in &weirs {
            eventually(|| weir.metric(TAKEN) == 1);
        }
    }
}

#[test]
fn a_worker_that_waits_for_its_stores_takes_a_new_certificate_up() {
    let (theirs, other) = (Certificates::make(), Certificates::make());
    let ours = tempdir().unwrap();
    other.replace(ours.path());
    let stores = Stores::start(&theirs);
    let config = stores.config(ours.path());
    let worker = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["worker", "--wait-for-deps=60s", "-c"])
        .arg(config.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut worker = Waiting(worker);
    let log = Log::of(&mut worker.0);
    log.until("waiting for");
    theirs.replace(ours.path());
    log.until("working");
    signal(&worker.0, "TERM");
    assert!(worker.0.wait().unwrap().success());
}

#[test]
fn a_store_whose_file_is_wrong_holds_up_no_other() {
    let (old, new) = (Certificates::lasting(2), Certificates::lasting(3));
    let folders = [tempdir().unwrap(), tempdir().unwrap()];
    // Nobody is there, and nobody takes the port.
    let nobody = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    nobody
        .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .unwrap();
    let port = nobody.local_addr().unwrap().as_socket().unwrap().port();
    let tls = |folder: &TempDir| {
        let path = folder.path().display();
        format!(
            "{{ca: '{path}/ca.pem', certificate: {{cert: '{path}/server.pem', key: '{path}/server.key'}}}}"
        )
    };
    let [redis, postgres] = folders.each_ref();
    let spool = tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:{port}\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         redis: {{urls: 'rediss://127.0.0.1:{port}', tls: {}}}\n\
         postgres: {{write: 'postgres://postgres@127.0.0.1:{port}/postgres', tls: {}}}\naudit: {{spool: {{path: '{}'}}}}\n",
        tls(redis),
        tls(postgres),
        spool.path().display(),
    ));
    for (broken, other) in [(redis, postgres), (postgres, redis)] {
        for folder in &folders {
            old.replace(folder.path());
        }
        let weirs = ["run", "proxy", "worker"].map(|it| Running::start_as(it, config.path(), &[]));
        let before = ends(&weirs[0], broken);
        fs::remove_file(broken.path().join("ca.pem")).unwrap();
        for weir in &weirs {
            eventually(|| weir.metric(TAKEN) == 0);
        }
        new.replace(other.path());
        for weir in &weirs {
            eventually(|| ends(weir, other) > before);
            assert_eq!((ends(weir, broken), weir.metric(TAKEN)), (before, 0));
        }
        new.replace(broken.path());
        for weir in &weirs {
            eventually(|| ends(weir, broken) > before && weir.metric(TAKEN) == 1);
        }
    }
}
