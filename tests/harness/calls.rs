//! Calls of Redis as a lane makes them: one thread with its own runtime and connections, many calls at a time, each noted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use weir::store::redis::{
    Arg, CallError, Connections, Heard, NodeHealth, Redis, Script, Telling, Value,
};

use super::redis::Server;
use super::{DEADLINE, PATIENCE, eventually, fleet, runtime};

/// Adds one; answers the sum.
const SCRIPT: &str = "return redis.call('INCR', KEYS[1])";
/// Calls at a time.
const TASKS: usize = 16;
/// Between two calls of a task.
const PAUSE: Duration = Duration::from_millis(3);

/// The client of a `redis:` block, with nothing that keeps its topology yet.
pub fn client(yaml: &str) -> Arc<Redis> {
    fleet(yaml).main.clone()
}

/// Runs what a test asks on a runtime like a lane's, with connections that need not be up.
pub fn on_a_lane<T>(yaml: &str, test: impl AsyncFnOnce(Arc<Connections>) -> T) -> T {
    runtime().block_on(async {
        let redis = client(yaml);
        tokio::spawn(redis.clone().keep_topology());
        test(Arc::new(Connections::start(redis, Telling::Logged))).await
    })
}

/// One more at this key.
pub async fn add(redis: &Connections, key: &str) -> Result<i64, CallError> {
    let script = Script::new(SCRIPT);
    match redis.run(&script, &[key], &[Arg::Int(1)]).await? {
        Value::Int(sum) => Ok(sum),
        other => panic!("{other:?}"),
    }
}

/// All that one listener was told.
#[derive(Clone, Default)]
pub struct Ear(Arc<Mutex<Vec<Heard>>>);

impl Ear {
    /// Listens to a channel until the runtime ends.
    pub fn on(redis: &Connections, channel: &str) -> Ear {
        let ear = Ear::default();
        let told = ear.0.clone();
        let hear = move |heard| told.lock().unwrap().push(heard);
        let listener = redis
            .client()
            .clone()
            .listen(vec![channel.to_owned()], hear, || {});
        tokio::spawn(listener);
        ear
    }

    /// How often it began to listen.
    pub fn begins(&self) -> usize {
        let heard = self.0.lock().unwrap();
        heard
            .iter()
            .filter(|heard| **heard == Heard::Listening)
            .count()
    }

    /// How often it heard this.
    pub fn heard(&self, text: &str) -> usize {
        let is =
            |heard: &&Heard| matches!(heard, Heard::Message(payload) if payload == text.as_bytes());
        self.0.lock().unwrap().iter().filter(is).count()
    }
}

/// Waits for it beside what else the lane does.
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
pub async fn soon(mut yes: impl FnMut() -> bool) {
    let began = Instant::now();
    while !yes() {
        assert!(began.elapsed() < PATIENCE, "it did not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A call that was made.
#[derive(Debug, Clone)]
pub struct Call {
    pub key: usize,
    pub began: Instant,
    pub took: Duration,
    /// Of that time, how long the thread waited for a CPU, and the server where there is one.
    pub held_up: Duration,
    pub answer: Result<i64, CallError>,
}

/// Calls without end, until the test has seen enough.
pub struct Load {
    pub keys: Vec<String>,
    /// A call's budget.
    pub timeout: Duration,
    shared: Arc<Shared>,
    made: Mutex<Made>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    health: Mutex<Vec<NodeHealth>>,
}

/// The calls so far. The lane sends them and waits for no lock, which a test that looks at them may hold for as long as a busy machine
/// keeps it from going on.
struct Made {
    comes: Receiver<Call>,
    all: Vec<Call>,
}

impl Made {
    fn all(&mut self) -> &mut Vec<Call> {
        self.all.extend(self.comes.try_iter());
        &mut self.all
    }
}

impl Load {
    /// Calls for these keys, one after the other, once all nodes are connected.
    pub fn start(yaml: &str, keys: Vec<String>) -> Load {
        Load::begin(yaml, keys, None)
    }

    /// Those of one server: what that waits for a CPU is not the calls' either.
    pub fn on(server: &Server, yaml: &str, keys: Vec<String>) -> Load {
        Load::begin(yaml, keys, Some(server.pid()))
    }

    fn begin(yaml: &str, keys: Vec<String>, server: Option<u32>) -> Load {
        let redis = client(yaml);
        let shared = Arc::<Shared>::default();
        let timeout = redis.timeout;
        let (made, comes) = mpsc::channel();
        let thread = {
            let (shared, keys) = (shared.clone(), keys.clone());
            let waited = move || waited_for_cpu() + server.map_or(Duration::ZERO, waited_by);
            thread::spawn(move || runtime().block_on(call_on(redis, keys, shared, made, waited)))
        };
        let load = Load {
            keys,
            timeout,
            shared,
            made: Mutex::new(Made {
                comes,
                all: Vec::new(),
            }),
            thread: Some(thread),
        };
        load.until(|calls| calls.len() > 10);
        load
    }

    /// Waits until this holds for the calls that began from now on.
    #[track_caller]
    #[expect(clippy::disallowed_methods, reason = "a bound on time")]
    pub fn until(&self, holds: impl Fn(&[Call]) -> bool) {
        let now = Instant::now();
        eventually(|| holds(&self.since(now)));
    }

    /// The calls that began after `then`.
    pub fn since(&self, then: Instant) -> Vec<Call> {
        let mut made = self.made.lock().unwrap();
        let calls = made.all().iter().filter(|call| call.began >= then);
        calls.cloned().collect()
    }

    pub fn health(&self) -> Vec<NodeHealth> {
        self.shared.health.lock().unwrap().clone()
    }

    /// All calls, in the order of their ends; none is in flight any more.
    pub fn stop(mut self) -> Vec<Call> {
        self.end();
        std::mem::take(self.made.lock().unwrap().all())
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking());
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

#[expect(clippy::disallowed_methods, reason = "what is measured")]
async fn call_on(
    redis: Arc<Redis>,
    keys: Vec<String>,
    shared: Arc<Shared>,
    made: Sender<Call>,
    waited: impl Fn() -> Duration + Copy + Send + 'static,
) {
    tokio::spawn(redis.clone().keep_topology());
    let connections = Arc::new(Connections::start(redis, Telling::Logged));
    assert!(connections.ready(DEADLINE).await);
    let script = Arc::new(Script::new(SCRIPT));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let (connections, script) = (connections.clone(), script.clone());
        let (keys, shared, made) = (keys.clone(), shared.clone(), made.clone());
        tasks.spawn(async move {
            for n in (task..).step_by(TASKS) {
                if shared.stop.load(Ordering::Relaxed) {
                    return;
                }
                let key = n % keys.len();
                // In this order, and the other way round behind it: a wait between the two is of neither the call nor weir.
                let (before, began) = (waited(), Instant::now());
                let answer = connections.run(&script, &[&keys[key]], &[]).await;
                let took = began.elapsed();
                let call = Call {
                    key,
                    began,
                    took,
                    held_up: waited().saturating_sub(before),
                    answer: answer.map(|value| match value {
                        Value::Int(sum) => sum,
                        other => panic!("{other:?}"),
                    }),
                };
                let _ = made.send(call);
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
    while !tasks.is_empty() {
        if let Ok(mut health) = shared.health.try_lock() {
            *health = connections.health();
        }
        let ended = tokio::time::timeout(Duration::from_millis(10), tasks.join_next()).await;
        if let Ok(Some(ended)) = ended {
            ended.unwrap();
        }
    }
}

/// How long this thread has waited for a CPU, ever, while it could have run: the second number of `schedstat`.
pub fn waited_for_cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    waited(&text)
}

/// As [`waited_for_cpu`], of a process's first thread; nothing where it has ended.
pub fn waited_by(process: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{process}/schedstat"));
    text.map_or(Duration::ZERO, |text| waited(&text))
}

fn waited(schedstat: &str) -> Duration {
    let nanos = schedstat.split(' ').nth(1).unwrap().parse().unwrap();
    Duration::from_nanos(nanos)
}

/// What became of calls.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub answered: usize,
    pub timed_out: usize,
    pub down: usize,
    pub refused: usize,
    /// The longest.
    pub worst: Duration,
    /// The longest, without what the machine let it wait.
    pub worst_of_ours: Duration,
}

impl Tally {
    pub fn of<'a>(calls: impl IntoIterator<Item = &'a Call>) -> Tally {
        let mut tally = Tally::default();
        for call in calls {
            *match call.answer {
                Ok(_) => &mut tally.answered,
                Err(CallError::Timeout) => &mut tally.timed_out,
                Err(CallError::Down) => &mut tally.down,
                Err(CallError::Refused(_) | CallError::CrossSlot | CallError::Nonsense) => {
                    &mut tally.refused
                }
            } += 1;
            tally.worst = tally.worst.max(call.took);
            let ours = call.took.saturating_sub(call.held_up);
            tally.worst_of_ours = tally.worst_of_ours.max(ours);
        }
        tally
    }

    pub fn all(&self) -> usize {
        self.answered + self.failed()
    }

    pub fn failed(&self) -> usize {
        self.timed_out + self.down + self.refused
    }
}
