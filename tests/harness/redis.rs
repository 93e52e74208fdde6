//! Real Redis servers of a test's own, on ports of their own: single ones, clusters, and sentinels. `WEIR_TEST_REDIS` is the path of
//! another server than the installed one, of Redis 6.2 or newer or of Valkey.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Mutex, OnceLock};
use std::time::Duration;

use super::keeper::Keeper;
use super::{DEADLINE, eventually_within};

/// Long enough for a failover on a machine that has much else to do.
const FAILOVER: Duration = Duration::from_secs(30);
/// Below those that the kernel gives to whoever asks for port 0, so that a port stays free while its server is down.
const PORTS: Range<u16> = 10_000..32_000;
/// From the port of clients to that of the other nodes of a cluster.
const BUS: u16 = 10_000;
/// A start that finds its port taken is tried anew with another.
const STARTS: usize = 5;

/// The script of its [`Keeper`].
const KEEPER: &str = r#"
trap '' INT TERM HUP
while read -r _; do
    test -z "$pid" || wait "$pid"
    "$3" "$1/redis.conf" $2 >"$1/log" 2>&1 &
    pid=$!
    echo "$pid"
done
test -z "$pid" || kill -9 "$pid" 2>/dev/null
wait
rm -rf "$1"
"#;

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Nil,
    Int(i64),
    Text(String),
    /// What is no text.
    Bytes(Vec<u8>),
    List(Vec<Answer>),
}

impl Answer {
    #[track_caller]
    pub fn text(&self) -> &str {
        match self {
            Answer::Text(text) => text,
            other => panic!("not a text: {other:?}"),
        }
    }

    #[track_caller]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Answer::Text(text) => text.as_bytes(),
            Answer::Bytes(bytes) => bytes,
            other => panic!("not bytes: {other:?}"),
        }
    }

    #[track_caller]
    pub fn int(&self) -> i64 {
        match self {
            Answer::Int(number) => *number,
            other => panic!("not a number: {other:?}"),
        }
    }

    #[track_caller]
    pub fn list(&self) -> &[Answer] {
        match self {
            Answer::List(answers) => answers,
            other => panic!("not a list: {other:?}"),
        }
    }
}

/// One server, ended when the test lets go of it.
#[derive(Debug)]
pub struct Server {
    pub port: u16,
    /// Where other nodes of a cluster speak to it, or TLS.
    pub second_port: u16,
    folder: PathBuf,
    keeper: Mutex<Keeper>,
}

impl Server {
    /// One server that keeps nothing on disk.
    pub fn single() -> Server {
        Server::with(|_, _| String::new())
    }

    /// With these lines of `redis.conf`, made from its port and its second one.
    pub fn with(lines: impl Fn(u16, u16) -> String) -> Server {
        Server::start("", "Ready to accept connections", lines)
    }

    fn start(mode: &str, ready: &str, lines: impl Fn(u16, u16) -> String) -> Server {
        let program = program();
        let installed = Command::new(&program)
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        assert!(
            installed.is_ok_and(|status| status.success()),
            "{program} is not there, which these tests need; `make test` installs redis-server by apt"
        );
        let mut said = String::new();
        for _ in 0..STARTS {
            let server = Server::prepare(mode, &lines);
            match server.begin(ready) {
                Ok(()) => return server,
                Err(log) => said = log,
            }
        }
        panic!("redis-server does not start: {said}");
    }

    fn prepare(mode: &str, lines: impl Fn(u16, u16) -> String) -> Server {
        let folder = tempfile::tempdir().unwrap().keep();
        let (port, second_port) = free_ports();
        let dir = folder.display();
        let common = format!(
            "port {port}\nbind 127.0.0.1\ndir {dir}\nsave \"\"\nappendonly no\nrepl-diskless-sync-delay 0\n"
        );
        // A sentinel rewrites its file and takes fewer directives.
        let common = match mode {
            "" => common,
            _ => format!("port {port}\nbind 127.0.0.1\ndir {dir}\n"),
        };
        let text = common + &lines(port, second_port);
        std::fs::write(folder.join("redis.conf"), text).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", KEEPER, "sh"]).arg(&folder);
        let keeper = Keeper::new(shell.arg(mode).arg(program()));
        Server {
            port,
            second_port,
            folder,
            keeper: Mutex::new(keeper),
        }
    }

    /// Its log, if it ends instead of being ready.
    fn begin(&self, ready: &str) -> Result<(), String> {
        // What the last one said is not this one's.
        let _ = std::fs::remove_file(self.folder.join("log"));
        let pid = self.keeper.lock().unwrap().begin();
        let mut ended = false;
        eventually_within(DEADLINE, || {
            // Looked at first, so that what is read afterwards is all it said.
            ended = has_ended(pid);
            self.log().contains(ready) || ended
        });
        match self.log() {
            log if ended => Err(log),
            _ => Ok(()),
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// A `redis:` block for a configuration.
    pub fn yaml(&self, key_prefix: &str) -> String {
        format!(
            "redis: {{urls: '{}', key_prefix: '{key_prefix}'}}\n",
            self.url()
        )
    }

    /// What it answers to a command on a new connection, or its error.
    pub fn try_cli(&self, args: &[&str]) -> Result<Answer, String> {
        let io = |error: std::io::Error| error.to_string();
        let mut stream = TcpStream::connect(self.address()).map_err(io)?;
        stream.set_read_timeout(Some(DEADLINE)).map_err(io)?;
        let mut request = format!("*{}\r\n", args.len());
        for arg in args {
            request.push_str(&format!("${}\r\n{arg}\r\n", arg.len()));
        }
        stream.write_all(request.as_bytes()).map_err(io)?;
        read_answer(&mut BufReader::new(stream))
    }

    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> Answer {
        let answer = self.try_cli(args);
        answer.unwrap_or_else(|error| panic!("{args:?} on port {}: {error}", self.port))
    }

    /// A field of `INFO` or `CLUSTER INFO`, if it says so.
    pub fn says(&self, args: &[&str], field: &str, value: &str) -> bool {
        let line = format!("{field}:{value}");
        let answer = self.try_cli(args);
        matches!(answer, Ok(Answer::Text(text)) if text.lines().any(|other| other == line))
    }

    /// By SIGKILL; connections to it are reset.
    pub fn kill(&self) {
        let pid = self.signal("KILL");
        eventually_within(DEADLINE, || has_ended(pid));
    }

    /// After [`Server::kill`], empty, on the same port.
    pub fn restart(&self) {
        self.begin("Ready to accept connections").unwrap();
    }

    /// It hangs; its connections stay.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    pub fn resume(&self) {
        self.signal("CONT");
    }

    pub fn runs(&self) -> bool {
        !has_ended(self.pid())
    }

    /// Of the running server.
    pub fn pid(&self) -> u32 {
        self.keeper.lock().unwrap().pid
    }

    fn signal(&self, name: &str) -> u32 {
        let pid = self.pid();
        // One that has ended is not there to hear.
        let _ = Command::new("kill")
            .args(["-s", name, &pid.to_string()])
            .stderr(Stdio::null())
            .status();
        pid
    }
}

/// Whether a child of a shell is gone, or waits to be noticed.
pub(super) fn has_ended(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.contains(") Z "))
}

/// The server's.
fn program() -> String {
    std::env::var("WEIR_TEST_REDIS").unwrap_or_else(|_| "redis-server".to_owned())
}

/// One that the kernel gives to nobody, so that it is free still after a while.
pub fn free_port() -> u16 {
    loop {
        let port = fastrand::u16(PORTS);
        if take(port) {
            return port;
        }
    }
}

/// Two as far apart as a cluster has its own port from that of clients, which Redis 6.2 cannot be told.
fn free_ports() -> (u16, u16) {
    loop {
        let port = fastrand::u16(PORTS.start..PORTS.end - BUS);
        // One that is taken in vain is left out from now on.
        if take(port) && take(port + BUS) {
            return (port, port + BUS);
        }
    }
}

/// Whether a port is free, and nobody else's in this program from now on.
fn take(port: u16) -> bool {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    free && GIVEN.lock().unwrap().insert(port)
}

fn read_answer(reader: &mut impl BufRead) -> Result<Answer, String> {
    let mut line = String::new();
    let n = reader.read_line(&mut line);
    if n.map_err(|error| error.to_string())? == 0 {
        return Err("the connection ended".to_owned());
    }
    let (kind, rest) = line.trim_end().split_at(1);
    let length = || rest.parse::<i64>().unwrap();
    Ok(match kind {
        "+" => Answer::Text(rest.to_owned()),
        "-" => return Err(rest.to_owned()),
        ":" => Answer::Int(length()),
        "$" | "*" if length() < 0 => Answer::Nil,
        "$" => {
            let mut bytes = vec![0; usize::try_from(length()).unwrap() + 2];
            let read = reader.read_exact(&mut bytes);
            read.map_err(|error| error.to_string())?;
            bytes.truncate(bytes.len() - 2);
            match String::from_utf8(bytes) {
                Ok(text) => Answer::Text(text),
                Err(error) => Answer::Bytes(error.into_bytes()),
            }
        }
        "*" => Answer::List(
            (0..length())
                .map(|_| read_answer(reader))
                .collect::<Result<_, _>>()?,
        ),
        other => panic!("not RESP: {other:?}"),
    })
}

/// Three masters with a replica each: node `n + 3` begins as the replica of node `n`.
#[derive(Debug)]
pub struct Cluster {
    pub nodes: Vec<Server>,
    /// Each node's own name among the others.
    ids: Vec<String>,
}

/// Masters; as many are replicas.
const MASTERS: usize = 3;
const SLOTS: usize = 16_384;

impl Cluster {
    /// The one that all tests of this program share that leave its nodes as they are. Each takes a `key_prefix` of its own.
    pub fn shared() -> &'static Cluster {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(Cluster::start)
    }

    /// One for a test that does nodes harm; whole on return.
    pub fn start() -> Cluster {
        // A dead master is noticed after the node timeout, and its replica votes within a second of it. The timeout is short so
        // that tests are, and not shorter, so that a node that waits for a busy machine's CPU is not called dead.
        let lines = |_, _| {
            String::from(
                "cluster-enabled yes\ncluster-config-file nodes.conf\n\
                 cluster-node-timeout 1500\ncluster-require-full-coverage no\n\
                 cluster-announce-ip 127.0.0.1\ncluster-replica-validity-factor 0\n\
                 cluster-allow-replica-migration no\n",
            )
        };
        let nodes: Vec<_> = (0..2 * MASTERS).map(|_| Server::with(lines)).collect();
        let ids: Vec<_> = nodes
            .iter()
            .map(|node| node.cli(&["CLUSTER", "MYID"]).text().to_owned())
            .collect();
        let cluster = Cluster { nodes, ids };
        cluster.form();
        cluster
    }

    fn form(&self) {
        for (n, node) in self.nodes.iter().enumerate() {
            node.cli(&["CLUSTER", "SET-CONFIG-EPOCH", &(n + 1).to_string()]);
            if n < MASTERS {
                // Redis 6.2 takes no ranges.
                let slots = SLOTS * n / MASTERS..SLOTS * (n + 1) / MASTERS;
                let slots: Vec<_> = slots.map(|slot| slot.to_string()).collect();
                let mut add = vec!["CLUSTER", "ADDSLOTS"];
                add.extend(slots.iter().map(String::as_str));
                node.cli(&add);
            }
            // Each is told of each, rather than waiting for gossip.
            for other in &self.nodes[..n] {
                let (port, bus) = (other.port.to_string(), other.second_port.to_string());
                node.cli(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]);
            }
        }
        for (replica, master) in self.nodes[MASTERS..].iter().zip(&self.ids) {
            // Refused until it knows that master.
            eventually_within(DEADLINE, || {
                replica.try_cli(&["CLUSTER", "REPLICATE", master]).is_ok()
            });
        }
        self.wait_until_whole();
    }

    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Server::url).collect()
    }

    /// A `redis:` block for a configuration.
    pub fn yaml(&self, key_prefix: &str) -> String {
        let urls = self.urls().join("', '");
        format!("redis: {{urls: ['{urls}'], mode: cluster, key_prefix: '{key_prefix}'}}\n")
    }

    /// A command to one node.
    #[track_caller]
    pub fn cli(&self, node: usize, args: &[&str]) -> Answer {
        self.nodes[node].cli(args)
    }

    /// The master that has this slot, as the running nodes agree on it.
    pub fn master_of(&self, slot: u16) -> usize {
        let mut owner = None;
        eventually_within(FAILOVER, || {
            let owners: BTreeSet<_> = self
                .running()
                .map(|node| owners(node).and_then(|owners| owners[usize::from(slot)]))
                .collect();
            owner = owners.first().copied().flatten();
            owners.len() == 1 && owner.is_some()
        });
        let owner = owner.unwrap();
        let found = self.nodes.iter().position(|node| node.port == owner);
        found.unwrap()
    }

    /// The replica of a master.
    pub fn replica_of(&self, master: usize) -> usize {
        (master + MASTERS) % (2 * MASTERS)
    }

    pub fn kill(&self, node: usize) {
        self.nodes[node].kill();
    }

    pub fn restart(&self, node: usize) {
        self.nodes[node].restart();
    }

    pub fn pause(&self, node: usize) {
        self.nodes[node].pause();
    }

    pub fn resume(&self, node: usize) {
        self.nodes[node].resume();
    }

    fn running(&self) -> impl Iterator<Item = &Server> {
        self.nodes.iter().filter(|node| node.runs())
    }

    /// Moves a slot with its keys to another master.
    pub fn migrate(&self, slot: u16, to: usize) {
        self.open_slot(slot, to);
        self.move_keys(slot, to, usize::MAX);
        self.close_slot(slot, to);
    }

    /// From now on the slot is on its way: `ASK` for keys that its master lacks.
    pub fn open_slot(&self, slot: u16, to: usize) {
        let (from, number) = (self.master_of(slot), slot.to_string());
        let importing = ["CLUSTER", "SETSLOT", &number, "IMPORTING", &self.ids[from]];
        self.cli(to, &importing);
        let migrating = ["CLUSTER", "SETSLOT", &number, "MIGRATING", &self.ids[to]];
        self.cli(from, &migrating);
    }

    /// Moves the keys of a slot that is open, `most` of them; how many moved.
    pub fn move_keys(&self, slot: u16, to: usize, most: usize) -> usize {
        let (from, slot) = (self.master_of(slot), slot.to_string());
        let port = self.nodes[to].port.to_string();
        let mut moved = 0;
        while moved < most {
            let batch = most.min(moved + 100) - moved;
            let keys = self.cli(
                from,
                &["CLUSTER", "GETKEYSINSLOT", &slot, &batch.to_string()],
            );
            if keys.list().is_empty() {
                break;
            }
            let mut migrate = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
            migrate.extend(keys.list().iter().map(Answer::text));
            self.cli(from, &migrate);
            moved += keys.list().len();
        }
        moved
    }

    /// `MOVED` from now on.
    pub fn close_slot(&self, slot: u16, to: usize) {
        let (from, slot) = (self.master_of(slot), slot.to_string());
        let others = (0..self.nodes.len()).filter(|node| ![from, to].contains(node));
        for node in [to, from].into_iter().chain(others) {
            // Replicas refuse, and learn it from the masters.
            let _ = self.nodes[node].try_cli(&["CLUSTER", "SETSLOT", &slot, "NODE", &self.ids[to]]);
        }
    }

    /// Every master forgets its scripts.
    pub fn script_flush(&self) {
        for node in self.running() {
            node.cli(&["SCRIPT", "FLUSH"]);
        }
    }

    /// Of every node, in bytes; what it has is kept, and what would be more is refused. 0 is no limit.
    pub fn set_maxmemory(&self, bytes: usize) {
        for node in self.running() {
            node.cli(&["CONFIG", "SET", "maxmemory", &bytes.to_string()]);
        }
    }

    /// Waits until all running nodes agree on an owner of each slot who runs, and replicas have all their masters have.
    pub fn wait_until_whole(&self) {
        eventually_within(FAILOVER, || {
            let (alive, dead): (Vec<_>, Vec<_>) = self.nodes.iter().partition(|node| node.runs());
            let maps: BTreeSet<_> = alive.iter().map(|node| owners(node)).collect();
            let owned = maps.first().is_some_and(|owners| {
                owners.as_ref().is_some_and(|owners| {
                    let runs =
                        |port: &Option<u16>| alive.iter().any(|node| Some(node.port) == *port);
                    owners.iter().all(runs)
                })
            });
            // Those alive are known to each other as alive, masters to their replicas too.
            let settled = alive.iter().all(|node| {
                let Ok(Answer::Text(text)) = node.try_cli(&["CLUSTER", "NODES"]) else {
                    return false;
                };
                let failed = text.lines().filter(|line| line.contains("fail")).count();
                let replicas = text.lines().filter(|line| line.contains("slave")).count();
                let masters = text
                    .lines()
                    .filter(|line| line.contains("master") && !line.contains("fail"));
                text.lines().count() == self.nodes.len()
                    && !text.contains("handshake")
                    && failed <= dead.len()
                    && masters.count() == MASTERS
                    && replicas + dead.len() >= MASTERS
                    && node.says(&["CLUSTER", "INFO"], "cluster_state", "ok")
                    && (node.says(&["INFO", "replication"], "role", "master")
                        || node.says(&["INFO", "replication"], "master_link_status", "up"))
            });
            maps.len() == 1 && owned && settled
        });
    }
}

/// The port of each slot's master, as a node sees it.
fn owners(node: &Server) -> Option<Vec<Option<u16>>> {
    let slots = node.try_cli(&["CLUSTER", "SLOTS"]).ok()?;
    let mut owners = vec![None; SLOTS];
    for range in slots.list() {
        let [from, to, master, ..] = range.list() else {
            panic!("{range:?}")
        };
        let port = u16::try_from(master.list()[1].int()).unwrap();
        let [from, to] = [from, to].map(|slot| usize::try_from(slot.int()).unwrap());
        owners[from..=to].fill(Some(port));
    }
    Some(owners)
}

/// A master and its replica under three sentinels, which call the master `mymaster`.
#[derive(Debug)]
pub struct Sentinels {
    /// The first begins as the master.
    pub servers: [Server; 2],
    pub sentinels: [Server; 3],
}

impl Sentinels {
    pub fn start() -> Sentinels {
        let master = Server::single();
        let of = format!("replicaof 127.0.0.1 {}\n", master.port);
        let replica = Server::with(|_, _| of.clone());
        eventually_within(DEADLINE, || {
            replica.says(&["INFO", "replication"], "master_link_status", "up")
        });
        let sentinels = std::array::from_fn(|_| sentinel(master.port, 0));
        for sentinel in &sentinels {
            eventually_within(FAILOVER, || {
                let replicas = sentinel.try_cli(&["SENTINEL", "REPLICAS", "mymaster"]);
                let others = sentinel.try_cli(&["SENTINEL", "SENTINELS", "mymaster"]);
                matches!(replicas, Ok(Answer::List(all)) if all.len() == 1)
                    && matches!(others, Ok(Answer::List(all)) if all.len() == 2)
            });
        }
        Sentinels {
            servers: [master, replica],
            sentinels,
        }
    }

    /// A `redis:` block for a configuration.
    pub fn yaml(&self, key_prefix: &str) -> String {
        let urls = self.sentinels.each_ref().map(Server::url).join("', '");
        format!("redis: {{urls: ['{urls}'], mode: sentinel, key_prefix: '{key_prefix}'}}\n")
    }
}

/// A sentinel to which the server at this port is `mymaster`, as elected in this epoch.
pub fn sentinel(master: u16, epoch: u32) -> Server {
    Server::start("--sentinel", "+monitor master", |_, _| {
        format!(
            "sentinel monitor mymaster 127.0.0.1 {master} 2\nsentinel down-after-milliseconds mymaster 1000\n\
             sentinel failover-timeout mymaster 5000\nsentinel config-epoch mymaster {epoch}\n"
        )
    })
}

/// A private authority and a server's certificate by it for 127.0.0.1, as PEM files, made anew.
#[derive(Debug)]
pub struct Certificates {
    folder: tempfile::TempDir,
}

impl Certificates {
    pub fn make() -> Certificates {
        Certificates::lasting(2)
    }

    /// For so many days.
    pub fn lasting(days: u32) -> Certificates {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "set -e
            openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days {days} \
                -keyout ca.key -out ca.pem -subj '/CN=weir test authority'
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
                -keyout server.key -out server.csr -subj '/CN=127.0.0.1'
            printf 'subjectAltName=IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' >server.ext
            openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days {days} \
                -extfile server.ext -out server.pem"
        );
        let output = Command::new("sh")
            .args(["-c", &script])
            .current_dir(&folder)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "openssl, which these tests need and `make test` installs by apt: {output:?}"
        );
        Certificates { folder }
    }

    /// `ca.pem`, `server.pem` or `server.key`.
    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Puts them into the place of those that are in this folder, each at once.
    pub fn replace(&self, folder: &Path) {
        for name in ["ca.pem", "server.pem", "server.key"] {
            let new = folder.join("new");
            std::fs::copy(self.path(name), &new).unwrap();
            std::fs::rename(new, folder.join(name)).unwrap();
        }
    }

    /// A server whose second port speaks TLS; whether it asks clients for a certificate of this authority.
    pub fn server(&self, asks: bool) -> Server {
        tls_server(self.folder.path(), asks)
    }
}

/// Likewise, by certificates in this folder, which it reads each time that it starts.
pub fn tls_server(folder: &Path, asks: bool) -> Server {
    let asks = if asks { "yes" } else { "no" };
    let file = |name| folder.join(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("server.pem"), file("server.key"));
    Server::with(|_, tls| {
        format!(
            "tls-port {tls}\ntls-cert-file {cert}\ntls-key-file {key}\ntls-ca-cert-file {ca}\n\
                 tls-auth-clients {asks}\n"
        )
    })
}

/// A name for keys that no other test of the machine takes.
pub fn key_prefix() -> String {
    static NEXT: LazyLock<Mutex<u32>> = LazyLock::new(Mutex::default);
    let mut next = NEXT.lock().unwrap();
    *next += 1;
    format!("t{next}")
}
