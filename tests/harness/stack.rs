//! The whole way of the audit as processes: an upstream, `weir proxy`, Redis, `weir worker` and Postgres, with clients that note
//! what they were answered, and the account at the end: whoever was answered is on record, once.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use weir::clock;
use weir::keys::{Keys, slot};

use super::load::{Load, Noted};
use super::postgres;
use super::process::signal;
use super::redis::{Answer, Cluster, Server, key_prefix};
use super::{Client, Upstream, eventually_within, metrics};

/// For all that is under way to be stored, on a machine that has much else to do.
pub const STORED: Duration = Duration::from_secs(60);
/// For a process to be up.
const UP: Duration = Duration::from_secs(30);
/// Of the audit.
pub const SHARDS: u16 = 4;
/// Beyond these at the end something is wrong with the way, not with the machine.
const ROUNDS: usize = 3;

/// Where the streams are.
pub enum Redis {
    Single(Server),
    Cluster(Cluster),
}

/// What a stack is to differ in.
pub struct With {
    pub delivery: &'static str,
    /// Shell commands before the proxy's start, in a mount namespace of its own; `$SPOOL` is its folder.
    pub mount: Option<&'static str>,
}

pub const GUARANTEED: With = With {
    delivery: "guaranteed",
    mount: None,
};
pub const BEST_EFFORT: With = With {
    delivery: "best_effort",
    mount: None,
};

/// All but the processes of weir, which the test starts and ends.
pub struct Stack {
    pub redis: Redis,
    pub keys: Keys,
    with: With,
    pub database: String,
    folder: tempfile::TempDir,
    config: PathBuf,
    began: Instant,
    /// What the clients were answered.
    noted: Noted,
    /// Counters of processes that have ended.
    counted: Mutex<BTreeMap<&'static str, u64>>,
    _upstream: Upstream,
}

/// `weir proxy` or `weir worker`, ended when the test lets go of it.
pub struct Process {
    pub child: Child,
    /// Where a proxy serves requests.
    pub address: String,
    admin: String,
    log: PathBuf,
}

impl Redis {
    pub fn single() -> Redis {
        Redis::Single(Server::single())
    }

    pub fn cluster() -> Redis {
        Redis::Cluster(Cluster::start())
    }

    #[track_caller]
    pub fn server(&self) -> &Server {
        match self {
            Redis::Single(server) => server,
            Redis::Cluster(_) => panic!("not a single server"),
        }
    }

    #[track_caller]
    pub fn nodes(&self) -> &Cluster {
        match self {
            Redis::Single(_) => panic!("not a cluster"),
            Redis::Cluster(cluster) => cluster,
        }
    }

    fn yaml(&self, prefix: &str) -> String {
        let block = match self {
            Redis::Single(server) => server.yaml(prefix),
            Redis::Cluster(cluster) => cluster.yaml(prefix),
        };
        block.replace("{urls", "{timeout: 2s, urls")
    }
}

impl Stack {
    /// With this Redis, and a database by URL that is the test's own.
    pub fn new(redis: Redis, database: String, with: With) -> Stack {
        let prefix = key_prefix();
        let upstream = Upstream::answering("whole");
        let folder = tempfile::tempdir().unwrap();
        let spool = folder.path().join("spool");
        let config = folder.path().join("weir.yaml");
        let text = format!(
            "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n{}\
             audit: {{delivery: {}, stream: {{shards: {SHARDS}}}, spool: {{path: {}}}, integrity: {{key: a key of tests}}}}\n\
             postgres: {{write: '{database}', pool: {{write: 4, read: 2, timeout: 10s}}}}\n\
             worker: {{claim_after: 1s, batch: {{wait: 50ms}}}}\n",
            upstream.url(),
            redis.yaml(&prefix),
            with.delivery,
            spool.display(),
        );
        std::fs::write(&config, text).unwrap();
        std::fs::create_dir(&spool).unwrap();
        Stack {
            keys: Keys::new(&prefix),
            redis,
            with,
            database,
            folder,
            config,
            began: clock::now(),
            noted: Noted::default(),
            counted: Mutex::default(),
            _upstream: upstream,
        }
    }

    pub fn spool(&self) -> PathBuf {
        self.folder.path().join("spool")
    }

    pub fn proxy(&self) -> Process {
        let Some(mount) = self.with.mount else {
            return Process::start("proxy", &self.config, None);
        };
        let script = format!(
            "set -e; SPOOL='{}'; {mount}; exec \"$@\"",
            self.spool().display()
        );
        Process::start("proxy", &self.config, Some(&script))
    }

    pub fn worker(&self) -> Process {
        Process::start("worker", &self.config, None)
    }

    /// Notes what became of the requests.
    pub fn note(&mut self, load: Load) {
        self.noted.add(load.stop());
    }

    /// The master of the `n`th stream, in a cluster.
    pub fn master_of(&self, shard: u16) -> usize {
        let stream = self.keys.audit_stream("audit", shard);
        self.redis.nodes().master_of(slot(stream.as_bytes()))
    }

    /// Entries that no worker has stored.
    pub fn waiting(&self) -> Option<i64> {
        let streams = (0..SHARDS).map(|shard| self.keys.audit_stream("audit", shard));
        let length = |stream: String| {
            let server = match &self.redis {
                Redis::Single(server) => server,
                Redis::Cluster(cluster) => {
                    &cluster.nodes[cluster.master_of(slot(stream.as_bytes()))]
                }
            };
            match server.try_cli(&["XLEN", &stream]) {
                Ok(Answer::Int(length)) => Some(length),
                _ => None,
            }
        };
        streams.map(length).sum()
    }

    pub fn rows(&self) -> u64 {
        self.number("SELECT count(*) FROM weir.audit_events")
    }

    #[track_caller]
    fn number(&self, sql: &str) -> u64 {
        self.query(sql)[0][0].parse().unwrap()
    }

    #[track_caller]
    pub fn query(&self, sql: &str) -> Vec<Vec<String>> {
        postgres::query(&self.database, sql)
    }

    /// Adds a counter of a process that is about to end to those of others.
    pub fn count(&self, process: &Process) {
        for name in COUNTERS {
            *self.counted.lock().unwrap().entry(name).or_default() += process.metric(name);
        }
    }

    pub fn counted(&self, name: &str) -> u64 {
        self.counted.lock().unwrap().get(name).copied().unwrap_or(0)
    }

    /// Waits until all that the proxy took is stored, and ends it in order: its last event has an end mark behind it.
    pub fn end_proxy(&self, mut proxy: Process) {
        proxy.until_stored();
        self.count(&proxy);
        assert!(proxy.end().success());
    }

    /// Ends both once all is stored, and draws up the account: [`Stack::account`].
    pub fn finish(&self, proxy: Process, mut worker: Process) {
        let over = clock::now();
        self.end_proxy(proxy);
        self.adopt_rest();
        self.until_ended();
        self.count(&worker);
        assert!(worker.end().success());
        self.account(over);
    }

    /// What a proxy could not see stored within its time to end, the next one does.
    pub fn adopt_rest(&self) {
        for _ in 0..ROUNDS {
            if self.with.mount.is_some() || self.spooled() == 0 {
                return;
            }
            let heir = self.proxy();
            eventually_within(STORED, || self.spooled() <= 1);
            self.end_proxy(heir);
        }
        assert_eq!(self.spooled(), 0, "boots in the spool");
    }

    /// Boots with something in the spool.
    fn spooled(&self) -> usize {
        let is_folder = |entry: &std::fs::DirEntry| entry.path().is_dir();
        let entries = std::fs::read_dir(self.spool()).unwrap();
        entries.map(Result::unwrap).filter(is_folder).count()
    }

    /// Waits until each boot that is on record has its end mark there, and no stream has an entry.
    pub fn until_ended(&self) {
        let unended = "SELECT count(*) FROM weir.audit_boots b
            WHERE NOT EXISTS (SELECT FROM weir.audit_batches e WHERE e.boot_id = b.id AND e.is_end)";
        eventually_within(STORED, || {
            self.number(unended) == 0 && self.waiting() == Some(0)
        });
    }

    /// Asserts that every request that was answered is on record exactly once, that nothing else is but what may be, and that
    /// nothing is missing in any boot's numbers or chain. Tells the counts; `over`: when the last request was made.
    #[allow(
        clippy::print_stdout,
        reason = "what a test measures is printed, whichever test it is"
    )]
    pub fn account(&self, over: Instant) {
        let took = over.elapsed();
        let mut rows = BTreeMap::<String, usize>::new();
        for row in self.query("SELECT path FROM weir.audit_events") {
            *rows.entry(row[0].clone()).or_default() += 1;
        }
        let noted = &self.noted;
        let count: usize = rows.values().sum();
        println!(
            "{}: {} answered, {} refused, {} broken, {count} rows, {} resent, {} known, {} claimed, {} failed transactions; \
             {:.1} s, all stored {:.1} s after the last request",
            thread::current().name().unwrap_or_default(),
            noted.answered.len(),
            noted.refused.len(),
            noted.broken.len(),
            self.counted(RESENT),
            self.counted(KNOWN),
            self.counted(CLAIMED),
            self.counted(FAILED),
            self.began.elapsed().as_secs_f64(),
            took.as_secs_f64(),
        );
        let twice: Vec<_> = rows.iter().filter(|(_, count)| **count > 1).collect();
        assert!(twice.is_empty(), "more than once: {twice:?}");
        let missing = noted
            .answered
            .iter()
            .filter(|path| !rows.contains_key(*path));
        let missing: Vec<_> = missing.collect();
        assert!(missing.is_empty(), "{} missing: {missing:?}", missing.len());
        let asked: BTreeSet<_> = noted.all().collect();
        let surplus: Vec<_> = rows.keys().filter(|path| !asked.contains(path)).collect();
        assert!(surplus.is_empty(), "never asked for: {surplus:?}");
        let holes = "SELECT b.boot, count(*), count(DISTINCT e.seq), min(e.seq), max(e.seq)
            FROM weir.audit_events e JOIN weir.audit_boots b ON b.id = e.boot_id GROUP BY b.boot
            HAVING count(*) <> max(e.seq) OR count(DISTINCT e.seq) <> max(e.seq) OR min(e.seq) <> 1";
        assert_eq!(self.query(holes), Vec::<Vec<String>>::new());
        let batches =
            self.number("SELECT coalesce(sum(last - first + 1), 0) FROM weir.audit_batches");
        assert_eq!(batches, count as u64, "events of the batches on record");
        // By the end marks too.
        let ends = "SELECT coalesce(sum(last), 0) FROM weir.audit_batches WHERE is_end";
        assert_eq!(self.number(ends), count as u64, "events by the end marks");
        let dead = "SELECT coalesce(max(dropped), 0) FROM weir.audit_batches";
        assert_eq!(self.number(dead), 0, "dropped");
        self.no_dead_letters();
        self.verify(count);
    }

    fn no_dead_letters(&self) {
        for shard in 0..SHARDS {
            let dead = self.keys.audit_dead("audit", shard);
            let server = match &self.redis {
                Redis::Single(server) => server,
                Redis::Cluster(cluster) => &cluster.nodes[self.master_of(shard)],
            };
            assert_eq!(server.cli(&["XLEN", &dead]), Answer::Int(0), "{dead}");
        }
    }

    /// By weir's own proof.
    fn verify(&self, events: usize) {
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["audit", "verify", "-c"])
            .arg(&self.config)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(said.starts_with(&format!("{events} events, ")), "{said}");
        assert!(said.contains("nothing is missing or changed"), "{said}");
    }
}

/// Batches that were lost in Redis and sent again.
pub const RESENT: &str = "weir_audit_resent_batches_total";
/// Batches that a worker found stored.
pub const KNOWN: &str = "weir_ingest_batches_total{result=\"known\"}";
pub const CLAIMED: &str = "weir_ingest_claimed_total";
/// Transactions that are tried again.
pub const FAILED: &str = "weir_ingest_transactions_total{result=\"failed\"}";
/// Events whose rows a worker has committed.
pub const STORED_EVENTS: &str = "weir_ingest_events_total";
/// Events that a proxy has let go.
pub const WRITTEN: &str = "weir_audit_events_total{result=\"written\"}";
const COUNTERS: [&str; 6] = [RESENT, KNOWN, CLAIMED, FAILED, STORED_EVENTS, WRITTEN];

impl Process {
    fn start(command: &str, config: &Path, within: Option<&str>) -> Process {
        let log = tempfile::NamedTempFile::new().unwrap();
        let (file, log) = log.keep().unwrap();
        let weir = env!("CARGO_BIN_EXE_weir");
        let arguments = [weir, command, "-c"].map(OsString::from);
        let arguments = arguments.into_iter().chain([config.into()]);
        let mut command = Command::new(weir);
        if let Some(script) = within {
            command = Command::new("unshare");
            command.args(["-m", "sh", "-c", script, "sh"]);
            command.args(arguments);
        } else {
            command.args(arguments.skip(1));
        }
        let child = command.stderr(file).spawn().unwrap();
        let mut process = Process {
            child,
            address: String::new(),
            admin: String::new(),
            log,
        };
        let mut line = None;
        eventually_within(UP, || {
            let ended = process.child.try_wait().unwrap();
            assert_eq!(ended, None, "{}", process.said());
            let said = process.said();
            let mut lines = said.lines();
            line = lines
                .find(|line| line.contains("admin=") && line.ends_with(char::is_numeric))
                .map(str::to_owned);
            line.is_some()
        });
        let line = line.unwrap();
        let field = |name: &str| {
            let value = line.split(name).nth(1)?.split_whitespace().next()?;
            Some(value.to_owned())
        };
        process.address = field("addresses=").unwrap_or_default();
        process.admin = field("admin=").unwrap();
        process
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn admin(&self) -> Client {
        Client::to(&self.admin)
    }

    /// 0 where it is not told.
    pub fn metric(&self, name: &str) -> u64 {
        let text = self.admin().get("/metrics").body;
        metrics::value(&text, name).map_or(0, |value| value as u64)
    }

    /// Until nothing is known to the proxy that is not stored.
    pub fn until_stored(&self) {
        eventually_within(STORED, || {
            self.metric("weir_audit_queued") == 0 && self.metric("weir_audit_underway") == 0
        });
    }

    /// By SIGTERM.
    pub fn end(&mut self) -> ExitStatus {
        signal(&self.child, "TERM");
        self.child.wait().unwrap()
    }

    /// By SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// A file in its own mounts.
    pub fn sees(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(path.strip_prefix("/").unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("{}", self.said());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

/// Fills a disk up to the last byte by this file, which may have filled it before.
pub fn fill(file: &Path) {
    let mut file = File::options()
        .append(true)
        .create(true)
        .open(file)
        .unwrap();
    for size in [64 << 10, 4 << 10, 1] {
        while file.write_all(&vec![7; size]).is_ok() {}
    }
}
