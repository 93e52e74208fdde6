//! Clients that ask without pause, each request for a path of its own, and note what they were answered.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::eventually_within;
use super::stack::{Process, STORED};

/// No answer takes longer than this; the proxy itself gives up before.
const ANSWER: Duration = Duration::from_secs(30);

/// Clients that ask without end, each by turns for paths of its own.
pub struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Noted>>,
}

#[derive(Default)]
struct Shared {
    address: Mutex<String>,
    over: AtomicBool,
    answered: AtomicU64,
    refused: AtomicU64,
}

/// Paths, by what came back.
#[derive(Default)]
pub struct Noted {
    /// Their events are to be stored.
    pub answered: Vec<String>,
    /// For want of a place for their events.
    pub refused: Vec<String>,
    /// Whether there is an event is not known.
    pub broken: Vec<String>,
}

impl Load {
    /// So many clients that wait for `pause` between requests; of `names` that no other load has.
    pub fn start(proxy: &Process, names: &str, clients: usize, pause: Duration) -> Load {
        let shared = Arc::<Shared>::default();
        let load = Load {
            clients: (0..clients)
                .map(|client| {
                    let (shared, name) = (shared.clone(), format!("{names}{client}"));
                    thread::spawn(move || ask(&shared, &name, pause))
                })
                .collect(),
            shared,
        };
        load.turn_to(proxy);
        load
    }

    /// From now on by this proxy.
    pub fn turn_to(&self, proxy: &Process) {
        *self.shared.address.lock().unwrap() = proxy.address.clone();
    }

    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Waits until so many more are answered.
    #[track_caller]
    pub fn until_answered(&self, more: u64) {
        let enough = self.answered() + more;
        eventually_within(STORED, || self.answered() >= enough);
    }

    pub fn stop(mut self) -> Noted {
        self.shared.over.store(true, Ordering::Relaxed);
        let mut all = Noted::default();
        for client in self.clients.drain(..) {
            all.add(client.join().unwrap());
        }
        all
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
    }
}

impl Noted {
    pub fn add(&mut self, other: Noted) {
        self.answered.extend(other.answered);
        self.refused.extend(other.refused);
        self.broken.extend(other.broken);
    }

    pub fn all(&self) -> impl Iterator<Item = &String> {
        self.answered
            .iter()
            .chain(&self.refused)
            .chain(&self.broken)
    }
}

/// One client, until the load is over.
fn ask(shared: &Shared, name: &str, pause: Duration) -> Noted {
    let mut noted = Noted::default();
    let mut connection = None;
    for number in 0.. {
        thread::sleep(pause);
        if shared.over.load(Ordering::Relaxed) {
            break;
        }
        let mut stream = match connection.take() {
            Some(stream) => stream,
            None => {
                let address = shared.address.lock().unwrap().clone();
                let Ok(stream) = TcpStream::connect(address) else {
                    continue;
                };
                stream.set_read_timeout(Some(ANSWER)).unwrap();
                BufReader::new(stream)
            }
        };
        let path = format!("/{name}/{number}");
        match answer(&mut stream, &path) {
            Some((200, head)) => {
                noted.answered.push(path);
                shared.answered.fetch_add(1, Ordering::Relaxed);
                if !head.contains("connection: close") {
                    connection = Some(stream);
                }
            }
            Some((503, head)) if head.contains("audit_unavailable") => {
                noted.refused.push(path);
                shared.refused.fetch_add(1, Ordering::Relaxed);
            }
            Some(other) => panic!("{path}: {other:?}"),
            None => noted.broken.push(path),
        }
    }
    noted
}

/// The status and the head in lower case of an answer that came whole.
fn answer(stream: &mut BufReader<TcpStream>, path: &str) -> Option<(u16, String)> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes()).ok()?;
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    head.make_ascii_lowercase();
    let length = head.split("content-length: ").nth(1)?.lines().next()?;
    let mut body = vec![0; length.parse().ok()?];
    stream.read_exact(&mut body).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, head))
}
