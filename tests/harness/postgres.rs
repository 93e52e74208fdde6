//! Real Postgres servers of a test's own, on ports and in folders of their own: primaries, replicas that stream from them, and
//! servers with TLS. `WEIR_TEST_POSTGRES` is the folder of another version's programs than Debian's.
//!
//! A database cluster is made once by `initdb` and copied for each server. Postgres refuses to run as root; as root, tests run it
//! as the user `postgres`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use tokio_postgres::{NoTls, SimpleQueryMessage};

use super::keeper::Keeper;
use super::redis::{Certificates, free_port, has_ended};
use super::{eventually_within, runtime};

/// For a start, which may have to recover first.
const START: Duration = Duration::from_secs(30);
/// Debian's, which are not in PATH.
const BINARIES: &str = "/usr/lib/postgresql/15/bin";

/// The script of its [`Keeper`]. A backend that is paused would outlive its server.
const KEEPER: &str = r#"
trap '' INT TERM HUP
dir=$1
shift
while read -r _; do
    test -z "$pid" || wait "$pid"
    "$@" >>"$dir/log" 2>&1 &
    pid=$!
    echo "$pid"
done
if test -n "$pid"; then
    children=$(ps -o pid= --ppid "$pid")
    kill -9 "$pid" $children 2>/dev/null
fi
wait
umount -l "$dir/small" 2>/dev/null
rm -rf "$dir"
"#;

/// One server, ended when the test lets go of it.
#[derive(Debug)]
pub struct Server {
    pub port: u16,
    folder: PathBuf,
    keeper: Mutex<Keeper>,
}

/// A database of a server that the tests of a program share.
#[derive(Debug)]
pub struct Database {
    pub server: &'static Server,
    pub name: String,
}

impl Database {
    /// An empty one, for a test that leaves the server as it is.
    pub fn new() -> Database {
        static SHARED: OnceLock<Server> = OnceLock::new();
        static NEXT: Mutex<u32> = Mutex::new(0);
        let server = SHARED.get_or_init(Server::start);
        let name = {
            let mut next = NEXT.lock().unwrap();
            *next += 1;
            format!("t{next}")
        };
        server.query(&format!("CREATE DATABASE {name}"));
        Database { server, name }
    }

    pub fn url(&self) -> String {
        self.server.url_of(&self.name)
    }

    pub fn query(&self, sql: &str) -> Vec<Vec<String>> {
        query(&self.url(), sql)
    }

    /// The one value that it answers.
    pub fn one(&self, sql: &str) -> String {
        one(&self.url(), sql)
    }
}

impl Server {
    /// One that need not survive the machine: it does not wait for its disk.
    pub fn start() -> Server {
        Server::with(&["fsync=off"])
    }

    /// With these settings.
    pub fn with(settings: &[&str]) -> Server {
        let folder = folder();
        copy(&template().join("data"), &folder.join("data"));
        Server::launch(folder, settings)
    }

    /// With TLS by these certificates, and no way in without. `asks`: whether it asks clients for one.
    pub fn with_tls(certificates: &Certificates, asks: bool) -> Server {
        let folder = folder();
        copy(&template().join("data"), &folder.join("data"));
        put(certificates, &folder);
        let verify = if asks { "clientcert=verify-ca" } else { "" };
        let entries = format!("local all all trust\nhostssl all all 127.0.0.1/32 trust {verify}\n");
        std::fs::write(folder.join("data/pg_hba.conf"), entries).unwrap();
        own(&folder);
        let file = |setting: &str, name: &str| format!("{setting}={}", folder.join(name).display());
        let settings = [
            "fsync=off".to_owned(),
            "ssl=on".to_owned(),
            file("ssl_ca_file", "ca.pem"),
            file("ssl_cert_file", "server.pem"),
            file("ssl_key_file", "server.key"),
        ];
        let settings = settings.each_ref().map(String::as_str);
        Server::launch(folder.clone(), &settings)
    }

    /// As [`Server::restart`], with these certificates in place of its own.
    pub fn restart_with(&self, certificates: &Certificates) {
        put(certificates, &self.folder);
        self.restart();
    }

    /// Where one with TLS is asked without, from this machine.
    pub fn socket_url(&self) -> String {
        let folder = self.folder.display();
        format!("host={folder} port={} user=postgres", self.port)
    }

    /// A server that streams from this one.
    pub fn replica(&self) -> Server {
        let folder = folder();
        let data = folder.join("data");
        let mut backup = program("pg_basebackup");
        backup.args(["-R", "-X", "stream", "-c", "fast", "-U", "postgres", "-D"]);
        backup.arg(&data).arg("-h").arg(&self.folder);
        run(backup.args(["-p", &self.port.to_string()]));
        Server::launch(folder, &["fsync=off"])
    }

    /// One that has a small disk beside its own, a tmpfs of this size, where databases of the tablespace `small` are.
    pub fn with_small_disk(size: &str) -> Server {
        let folder = folder();
        copy(&template().join("data"), &folder.join("data"));
        std::fs::create_dir(folder.join("small")).unwrap();
        let owner = user().map_or(String::new(), |user| format!(",uid={user}"));
        let mount = format!("mount -t tmpfs -o size={size},mode=700{owner} tmpfs \"$1/small\"");
        let server = Server::launch_within(folder, &["fsync=off"], Some(&mount));
        let small = server.folder.join("small");
        server.query(&format!(
            "CREATE TABLESPACE small LOCATION '{}'",
            small.display()
        ));
        server
    }

    /// Of the small disk, as the server sees it.
    pub fn small_disk(&self) -> PathBuf {
        let pid = self.keeper.lock().unwrap().pid;
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let small = self.folder.join("small");
        root.join(small.strip_prefix("/").unwrap())
    }

    fn launch(folder: PathBuf, settings: &[&str]) -> Server {
        Server::launch_within(folder, settings, None)
    }

    /// `mount`: a command to begin with, in a mount namespace of its own; `$1` is the folder.
    fn launch_within(folder: PathBuf, settings: &[&str], mount: Option<&str>) -> Server {
        let port = free_port();
        let mut command = program("postgres");
        command.arg("-D").arg(folder.join("data"));
        let sockets = format!("unix_socket_directories={}", folder.display());
        let port_is = format!("port={port}");
        let common = [
            port_is.as_str(),
            &sockets,
            "listen_addresses=127.0.0.1",
            "shared_buffers=32MB",
            "logging_collector=off",
            // What goes by the server's own time of day goes wrong here.
            "timezone=Asia/Tokyo",
        ];
        for setting in common.iter().chain(settings) {
            command.args(["-c", setting]);
        }
        let mut shell = Command::new(if mount.is_some() { "unshare" } else { "sh" });
        if mount.is_some() {
            shell.args(["-m", "sh"]);
        }
        let script = format!("{}\n{KEEPER}", mount.unwrap_or_default());
        shell.args(["-c", &script, "sh"]).arg(&folder);
        shell.arg(command.get_program()).args(command.get_args());
        let keeper = Keeper::new(&mut shell);
        let server = Server {
            port,
            folder,
            keeper: Mutex::new(keeper),
        };
        server.restart();
        server
    }

    /// After [`Server::stop`] or [`Server::kill`], with what it had.
    pub fn restart(&self) {
        let url = self.url();
        let mut pid = self.begin();
        eventually_within(START, || {
            if has_ended(pid) {
                // Its last backends may still hold its memory.
                pid = self.begin();
            }
            try_query(&url, "SELECT 1").is_ok() || self.asks_for_tls()
        });
    }

    fn begin(&self) -> u32 {
        self.keeper.lock().unwrap().begin()
    }

    /// One that refuses clients without TLS is up all the same.
    fn asks_for_tls(&self) -> bool {
        let log = std::fs::read_to_string(self.folder.join("log"));
        log.is_ok_and(|log| {
            log.contains("ready to accept connections") && log.contains("no encryption")
        })
    }

    /// At once, and in order: connections to it are ended.
    pub fn stop(&self) {
        self.end("INT");
    }

    /// By SIGKILL.
    pub fn kill(&self) {
        self.end("KILL");
    }

    fn end(&self, signal: &str) {
        let pid = self.keeper.lock().unwrap().pid;
        let children = children(pid);
        send(signal, &[pid]);
        eventually_within(START, || has_ended(pid));
        eventually_within(START, || children.iter().all(|child| has_ended(*child)));
    }

    /// It hangs, with its backends; connections stay.
    pub fn pause(&self) {
        let pid = self.keeper.lock().unwrap().pid;
        send("STOP", &[pid]);
        send("STOP", &children(pid));
    }

    pub fn resume(&self) {
        let pid = self.keeper.lock().unwrap().pid;
        send("CONT", &children(pid));
        send("CONT", &[pid]);
    }

    /// Whether transactions may write.
    pub fn set_read_only(&self, read_only: bool) {
        let set = format!("ALTER SYSTEM SET default_transaction_read_only = {read_only}");
        // By a connection of its own each: the first of these is not taken in a transaction with others.
        let url = format!(
            "{}&options=-c%20default_transaction_read_only%3Doff",
            self.url()
        );
        query(&url, &set);
        query(&url, "SELECT pg_reload_conf()");
        let expected = if read_only { "on" } else { "off" };
        eventually_within(START, || {
            self.one("SHOW default_transaction_read_only") == expected
        });
    }

    /// Waits until this replica has all that its primary has by now.
    pub fn catch_up_with(&self, primary: &Server) {
        let place = primary.one("SELECT pg_current_wal_lsn()");
        let is_there = format!("SELECT pg_last_wal_replay_lsn() >= '{place}'");
        eventually_within(START, || self.one(&is_there) == "t");
    }

    /// Begins anew as one whose commits wait for its [`Server::replica`]. That catches up however long it was away.
    pub fn commit_by_its_replica(&self) {
        self.query("ALTER SYSTEM SET wal_keep_size = '1GB'");
        self.query("ALTER SYSTEM SET synchronous_standby_names = 'walreceiver'");
        self.stop();
        self.restart();
    }

    /// Commits that wait for a standby.
    pub fn waiting_commits(&self) -> Vec<Vec<String>> {
        self.query("SELECT pid::text, query_start::text, left(query, 100) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
    }

    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    pub fn url_of(&self, database: &str) -> String {
        format!(
            "postgres://postgres@127.0.0.1:{}/{database}?sslmode=disable",
            self.port
        )
    }

    pub fn query(&self, sql: &str) -> Vec<Vec<String>> {
        query(&self.url(), sql)
    }

    /// The one value that it answers.
    pub fn one(&self, sql: &str) -> String {
        one(&self.url(), sql)
    }
}

/// The rows of its last statement that has some; NULL is empty.
#[track_caller]
pub fn query(url: &str, sql: &str) -> Vec<Vec<String>> {
    try_query(url, sql).unwrap_or_else(|error| panic!("{sql}: {error:?}"))
}

#[track_caller]
fn one(url: &str, sql: &str) -> String {
    let rows = query(url, sql);
    assert_eq!((rows.len(), rows[0].len()), (1, 1), "{sql}: {rows:?}");
    rows[0][0].clone()
}

pub fn try_query(url: &str, sql: &str) -> Result<Vec<Vec<String>>, tokio_postgres::Error> {
    let ask = async {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
        let connection = tokio::spawn(connection);
        let messages = client.simple_query(sql).await;
        drop(client);
        let _ = connection.await;
        let mut rows = Vec::new();
        for message in messages? {
            match message {
                SimpleQueryMessage::RowDescription(_) => rows.clear(),
                SimpleQueryMessage::Row(row) => {
                    let columns = 0..row.len();
                    let text = |n| row.get(n).unwrap_or_default().to_owned();
                    rows.push(columns.map(text).collect());
                }
                _ => {}
            }
        }
        Ok(rows)
    };
    // Of a thread of its own, so that tests may ask from within a runtime.
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| runtime().block_on(ask));
        asked.join().unwrap()
    })
}

/// The cluster that others are copied from, made by whoever needs it first.
fn template() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let version = program("postgres").arg("--version").output();
        let version =
            version.expect("postgres, which these tests need; `make test` installs it by apt");
        let version =
            String::from_utf8_lossy(&version.stdout).replace(|c: char| !c.is_alphanumeric(), "_");
        let made = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("{version}_{}", user().unwrap_or("self")));
        if made.exists() {
            return made;
        }
        let folder = folder();
        let data = folder.join("data");
        let mut initdb = program("initdb");
        initdb.args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "-N",
            "-D",
        ]);
        run(initdb.arg(&data));
        let ours = made.with_extension(std::process::id().to_string());
        std::fs::create_dir_all(&ours).unwrap();
        copy(&data, &ours.join("data"));
        std::fs::remove_dir_all(folder).unwrap();
        // Another test program may have been faster.
        if std::fs::rename(&ours, &made).is_err() {
            let _ = std::fs::remove_dir_all(&ours);
        }
        made
    })
}

/// One of the server's programs, as the user that it runs as.
fn program(name: &str) -> Command {
    let program = match std::env::var_os("WEIR_TEST_POSTGRES") {
        Some(folder) => Path::new(&folder).join(name),
        None => {
            let debian = Path::new(BINARIES).join(name);
            if debian.exists() { debian } else { name.into() }
        }
    };
    match user() {
        Some(user) => {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", user, "--regid", user, "--clear-groups"]);
            command.arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// `None`: the one that runs the tests.
fn user() -> Option<&'static str> {
    static ROOT: OnceLock<bool> = OnceLock::new();
    let is_root = || Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    ROOT.get_or_init(is_root).then_some("postgres")
}

/// A new one, which the server may read.
fn folder() -> PathBuf {
    let folder = tempfile::tempdir().unwrap().keep();
    own(&folder);
    folder
}

/// As files of the server's, of which it reads its key if no one else may.
fn put(certificates: &Certificates, folder: &Path) {
    certificates.replace(folder);
    run(Command::new("chmod")
        .arg("600")
        .arg(folder.join("server.key")));
    own(folder);
}

fn own(folder: &Path) {
    if let Some(user) = user() {
        run(Command::new("chown").args(["-R", user]).arg(folder));
    }
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg(from).arg(to));
}

fn run(command: &mut Command) {
    // Where the server's user may be.
    let output = command.current_dir("/").output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}

fn children(pid: u32) -> Vec<u32> {
    let listed = Command::new("ps")
        .args(["-o", "pid=", "--ppid", &pid.to_string()])
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    listed
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

/// Those that have ended do not hear.
fn send(signal: &str, pids: &[u32]) {
    let _ = Command::new("kill")
        .args(["-s", signal])
        .args(pids.iter().map(ToString::to_string))
        .stderr(Stdio::null())
        .status();
}
