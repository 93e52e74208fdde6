//! What tests are written in: a lane on port 0, upstreams that do as they are told, and a client that reads replies.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file is a crate and uses the part that it needs"
)]

pub mod calls;
pub mod collector;
pub mod far;
pub mod frames;
pub mod front;
pub mod held;
pub mod ingest;
pub mod keeper;
pub mod kept;
pub mod load;
pub mod metrics;
pub mod netns;
pub mod node;
pub mod origin;
pub mod peers;
pub mod pooler;
pub mod postgres;
pub mod process;
pub mod raw;
pub mod redis;
pub mod servers;
pub mod shipping;
pub mod sqlite;
pub mod stack;
pub mod tls;
pub mod versions;

use std::fmt::Debug;
use std::io::{self, BufRead, BufReader, ErrorKind, Read as _, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Runtime};
use tokio::sync::{oneshot, watch};
use weir::background;
use weir::background::supervise::Supervisor;
use weir::clock;
use weir::config::listeners::Address;
use weir::config::{Config, check};
use weir::heartbeat::Heartbeat;
use weir::net::listen::Bound;
use weir::net::tls::Secured;
use weir::plan::{Phase, Plan, Process};
use weir::policy::breaker::Snapshot;
use weir::proxy::lane;
use weir::store::fleet::Fleet;
use weir::telemetry::metrics::Metrics;
use weir::upstream::names::first_look;

/// Longer than anything that works takes.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// How long a test waits for what ends its wait, on a machine however slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the state of a test is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    Memory,
    /// A Redis Cluster, which the tests of a program share.
    Redis,
}

impl Store {
    /// What a configuration says of it: keys of their own each time, and a budget that a busy machine does not use up.
    pub fn block(self) -> String {
        match self {
            Store::Memory => String::new(),
            Store::Redis => redis::Cluster::shared()
                .yaml(&redis::key_prefix())
                .replace("{urls", "{timeout: 5s, urls"),
        }
    }
}

/// A configuration without a mistake.
#[track_caller]
pub fn parse(file: &str) -> Config {
    check::parse(file, &|_| None).unwrap_or_else(|mistakes| panic!("{mistakes:#?}\n{file}"))
}

/// Of a process with this `redis:` block, and nothing else that is its own. Connects to nothing yet.
pub fn fleet(redis: &str) -> Arc<Fleet> {
    let config = parse(&format!(
        "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n{redis}"
    ));
    Fleet::new(&config.redis.unwrap(), &Metrics::default()).unwrap()
}

/// Of one thread, as a lane's.
pub fn runtime() -> Runtime {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap()
}

/// Runs a test's cases beside each other, since most of their time they wait. The thread of each has its name.
pub fn at_once<T: Debug + Send>(cases: impl IntoIterator<Item = T>, test: impl Fn(T) + Sync) {
    thread::scope(|scope| {
        for case in cases {
            let named = thread::Builder::new().name(format!("{case:?}"));
            named.spawn_scoped(scope, || test(case)).unwrap();
        }
    });
}

/// Runs each of these functions of a [`Store`] as a test of each store.
#[macro_export]
macro_rules! on_each_store {
    ($($name:ident),+ $(,)?) => {
        mod in_memory {
            $(#[test] fn $name() { super::$name($crate::harness::Store::Memory) })+
        }
        mod on_redis {
            $(#[test] fn $name() { super::$name($crate::harness::Store::Redis) })+
        }
    };
}

/// One lane that follows a configuration, until the test lets go of it.
pub struct Lane {
    pub address: SocketAddr,
    pub plan: watch::Sender<Arc<Plan>>,
    phases: watch::Sender<Phase>,
}

impl Lane {
    #[track_caller]
    pub fn start(file: &str) -> Lane {
        let config = parse(file);
        let metrics = Arc::<Metrics>::default();
        let redis = config.redis.as_ref();
        let fleet = redis.map(|redis| Fleet::new(redis, &metrics).unwrap());
        let listener = Bound::new(&config.listeners[0].address, 0o600).unwrap();
        let Address::Tcp(address) = listener.address().unwrap() else {
            panic!("not a port");
        };
        let process = Process {
            metrics,
            fleet: fleet.clone(),
            ..Process::default()
        };
        let plan = Plan::first(config, Secured::default(), process);
        let (plan, following) = watch::channel(plan);
        let (phases, following_phases) = watch::channel(Phase::default());
        if let Some(fleet) = fleet {
            share(fleet, &following, &following_phases);
        }
        tend(&following, &following_phases);
        let (accepts, _) = oneshot::channel();
        lane::spawn(
            0,
            vec![listener],
            following,
            following_phases,
            Heartbeat::default(),
            accepts,
        )
        .unwrap();
        Lane {
            address,
            plan,
            phases,
        }
    }

    pub fn connect(&self) -> Client {
        Client::to(self.address)
    }

    /// How the breaker of its first upstream is.
    pub fn breaker(&self) -> Snapshot {
        let plan = self.plan.borrow();
        plan.upstreams[0]
            .breaker
            .as_ref()
            .unwrap()
            .snapshot(clock::mono())
    }

    /// The state of that breaker.
    pub fn state(&self) -> &'static str {
        self.breaker().state.as_str()
    }

    /// What it tells of this series.
    pub fn told(&self, series: &str) -> Option<f64> {
        metrics::value(&self.plan.borrow().metrics.text(), series)
    }

    /// Begins the drain.
    pub fn drain(&self) {
        self.phases.send_replace(Phase::Draining);
    }

    /// Has clients told to leave.
    pub fn leave(&self) {
        self.phases.send_replace(Phase::Leaving);
    }

    /// Goes on with another configuration.
    pub fn reload(&self, file: &str) {
        let plan = self.plan.borrow().clone();
        let new = plan.replaced_by(parse(file), Secured::default());
        new.unwrap().publish(&self.plan);
    }
}

/// Does what `weir run` does for a process of a fleet beside its lanes, until the lane is gone. Returns once it has joined.
fn share(fleet: Arc<Fleet>, plans: &watch::Receiver<Arc<Plan>>, phases: &watch::Receiver<Phase>) {
    let following = plans.clone();
    beside_the_lane(plans, phases, async move |plan, supervisor| {
        let redis = fleet.join();
        redis.ready(DEADLINE).await;
        background::tend_shared_state(supervisor, &following, &redis);
        background::breakers::first_look(plan, DEADLINE).await;
        redis
    });
}

/// Has endpoints looked up, checked and taken back, as `weir run` has, until the lane is gone.
fn tend(plans: &watch::Receiver<Arc<Plan>>, phases: &watch::Receiver<Phase>) {
    let following = plans.clone();
    beside_the_lane(plans, phases, async move |plan, supervisor| {
        first_look(plan.live_upstreams(), DEADLINE).await;
        background::tend_endpoints(supervisor, following);
    });
}

/// Begins this on a thread of its own, by the first plan, and returns once it has; what it began with, and what it gives, lives until the drain.
fn beside_the_lane<T>(
    plans: &watch::Receiver<Arc<Plan>>,
    phases: &watch::Receiver<Phase>,
    begin: impl AsyncFnOnce(&Plan, &mut Supervisor) -> T + Send + 'static,
) {
    let (first, mut phases) = (plans.borrow().clone(), phases.clone());
    let (begun, begins) = mpsc::channel();
    thread::spawn(move || {
        runtime().block_on(async {
            let mut supervisor = Supervisor::new(Handle::current(), first.metrics.clone());
            let _kept = begin(&first, &mut supervisor).await;
            drop(first);
            let _ = begun.send(());
            let _ = phases.wait_for(|phase| *phase >= Phase::Draining).await;
        });
    });
    begins.recv().unwrap();
}

/// A keep-alive connection.
pub struct Client {
    reader: BufReader<TcpStream>,
}

/// A response, read whole.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    /// The value of the first field with this lower-case name.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }
}

impl Client {
    pub fn to(address: impl ToSocketAddrs) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Client {
            reader: BufReader::new(stream),
        }
    }

    pub fn get(&mut self, path: &str) -> Reply {
        self.send("GET", path, &[], "")
    }

    /// Sends a request with these field lines and reads its reply.
    pub fn send(&mut self, method: &str, path: &str, fields: &[&str], body: &str) -> Reply {
        self.begin(method, path, fields, body);
        self.finish()
    }

    pub fn begin(&mut self, method: &str, path: &str, fields: &[&str], body: &str) {
        let mut request = format!("{method} {path} HTTP/1.1\r\n");
        if !fields
            .iter()
            .any(|field| field.to_ascii_lowercase().starts_with("host:"))
        {
            request.push_str("Host: test\r\n");
        }
        for field in fields {
            request.push_str(field);
            request.push_str("\r\n");
        }
        if !body.is_empty() {
            request.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        self.reader
            .get_mut()
            .write_all(format!("{request}\r\n{body}").as_bytes())
            .unwrap();
    }

    /// Sends these bytes, unless the other end is gone.
    pub fn write(&mut self, bytes: &[u8]) {
        let _ = self.reader.get_mut().write_all(bytes);
    }

    pub fn finish(&mut self) -> Reply {
        read_reply(&mut self.reader, true)
    }

    /// The reply to a HEAD, which has no body.
    pub fn finish_head(&mut self) -> Reply {
        read_reply(&mut self.reader, false)
    }

    /// As [`Client::get`]; `None` where the connection ended before a byte of the reply came.
    pub fn try_get(&mut self, path: &str) -> Option<Reply> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        self.reader.get_mut().write_all(request.as_bytes()).ok()?;
        let begun = self.more().is_ok_and(|is_more| is_more);
        begun.then(|| self.finish())
    }

    /// Whether the server closes without a word more.
    pub fn closes(&mut self) -> bool {
        self.more().is_ok_and(|is_more| !is_more)
    }

    /// Whether there is something to read, and not the end.
    fn more(&mut self) -> io::Result<bool> {
        loop {
            match self.reader.fill_buf() {
                Ok(bytes) => return Ok(!bytes.is_empty()),
                // A read that has a time ends where the process is stopped and goes on.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The status of the reply that is due, if its first line comes within `millis`.
    pub fn status_within(&mut self, millis: u64) -> Option<u16> {
        self.patience(Duration::from_millis(millis));
        let mut line = String::new();
        let read = self.reader.read_line(&mut line);
        // What is read next has the time that it always has.
        self.patience(DEADLINE);
        read.ok()?;
        line.split(' ').nth(1)?.parse().ok()
    }

    fn patience(&self, span: Duration) {
        let stream = self.reader.get_ref();
        stream.set_read_timeout(Some(span)).unwrap();
    }

    /// The body of a reply whose first line [`Client::status_within`] has read.
    pub fn finish_body(&mut self) -> String {
        // What a reply begins with is gone.
        let mut whole = std::io::Cursor::new("HTTP/1.1 200 OK\r\n").chain(&mut self.reader);
        read_reply(&mut whole, true).body
    }
}

pub fn read_reply(reader: &mut impl BufRead, has_body: bool) -> Reply {
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    let first = line();
    let status = first
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    let status = status.unwrap_or_else(|| panic!("not a reply: {first:?}"));
    let mut fields = Vec::new();
    loop {
        let field = line();
        let Some((name, value)) = field.split_once(": ") else {
            break;
        };
        fields.push((name.to_ascii_lowercase(), value.to_owned()));
    }
    let length = fields
        .iter()
        .find(|(name, _)| has_body && name == "content-length")
        .map_or(0, |(_, n)| n.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    Reply {
        status,
        fields,
        body: String::from_utf8(body).unwrap(),
    }
}

/// An upstream that serves any number of keep-alive connections.
pub struct Upstream {
    address: SocketAddr,
    /// The head of each request, as it came.
    pub requests: Receiver<String>,
    answers: Sender<String>,
}

impl Upstream {
    /// Answers every request with a 200 and `body`.
    pub fn answering(body: &str) -> Upstream {
        let reply = ok(body);
        Upstream::replying(move |_| reply.clone())
    }

    /// Answers every request with what [`Upstream::answer`] gives, one for one.
    pub fn held() -> Upstream {
        let (answers, given) = mpsc::channel::<String>();
        let given = Mutex::new(given);
        let upstream =
            Upstream::replying(move |_| ok(&given.lock().unwrap().recv().unwrap_or_default()));
        Upstream {
            answers,
            ..upstream
        }
    }

    /// Answers every request with the bytes that `reply` makes of its head.
    pub fn replying(reply: impl Fn(&str) -> String + Send + Sync + 'static) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, requests) = mpsc::channel();
        let reply = Arc::new(reply);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, seen, reply) = (stream.unwrap(), seen.clone(), reply.clone());
                thread::spawn(move || serve(stream, &seen, &*reply));
            }
        });
        Upstream {
            address,
            requests,
            answers: mpsc::channel().0,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn wait_for_request(&self) -> String {
        self.requests.recv_timeout(PATIENCE).unwrap()
    }

    pub fn answer(&self, body: &str) {
        self.answers.send(body.to_owned()).unwrap();
    }
}

/// A whole 200 response.
pub fn ok(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn serve(stream: TcpStream, seen: &Sender<String>, reply: &dyn Fn(&str) -> String) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        // A test that does not look has let go of its end.
        let _ = seen.send(head.clone());
        if reader.get_mut().write_all(reply(&head).as_bytes()).is_err() {
            return;
        }
    }
}

/// Asks until the answer is yes.
#[track_caller]
pub fn eventually(yes: impl FnMut() -> bool) {
    eventually_within(PATIENCE, yes);
}

/// As [`eventually`], for what takes longer than most.
#[track_caller]
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
pub fn eventually_within(deadline: Duration, mut yes: impl FnMut() -> bool) {
    let start = Instant::now();
    loop {
        // Taken before the look, so that there is one behind the deadline.
        let late = start.elapsed() >= deadline;
        if yes() {
            return;
        }
        assert!(!late, "it did not happen in {deadline:?}");
        thread::sleep(Duration::from_millis(10));
    }
}
