//! Requests whose events must be safe before they are answered, and a store of the audit that is locked.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{self, Sender};

use rusqlite::Connection;
use weir::store::audit::{Filter, days};
use weir::store::sqlite::Reader;

use super::eventually;
use super::process::{Running, file};
use super::raw::{read_head, scripted};
use super::sqlite::{self, today};

/// The paths on record.
pub fn on_record(database: &Path) -> Vec<String> {
    let events = Reader::open(database).unwrap().query(&Filter::default());
    let paths = events.unwrap().into_iter().map(|stored| stored.event.path);
    paths.collect()
}

/// Starts weir with minutes to go until it writes to another file.
pub fn start(config: &Path) -> Running {
    today();
    Running::start(config)
}

/// Keeps everyone else from writing to the newest file while it lives.
pub fn lock(database: &Path) -> Connection {
    let (_, newest) = days::list(database).unwrap().pop().unwrap();
    sqlite::lock(&newest)
}

/// weir whose store is locked, in front of an upstream of HTTP/1.1 that sends what the test gives it, piece by piece.
pub struct Locked {
    pub weir: Running,
    pub database: PathBuf,
    lock: Connection,
    next: Option<Sender<&'static str>>,
    _folder: tempfile::TempDir,
}

impl Locked {
    /// `/held` goes to the upstream, and `/limited` over its limit.
    pub fn start() -> Locked {
        let (next, given) = mpsc::channel::<&str>();
        let given = Mutex::new(given);
        let upstream = scripted(move |mut stream| {
            if read_head(&mut stream).is_some() {
                for piece in given.lock().unwrap().iter() {
                    let _ = stream.write_all(piece.as_bytes());
                }
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let database = folder.path().join("audit.db");
        let config = file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstreams: {{app: {{endpoints: ['http://{upstream}'], circuit_breaker: b}}}}\n\
             circuit_breakers: {{b: {{consecutive_failures: 1, open_for: 1h}}}}\n\
             routes: [{{match: {{path: /held}}, upstream: app}}, {{match: {{path: /limited}}, upstream: app, rate_limits: [none]}}]\n\
             rate_limits: {{none: {{limit: 0/s, by: client.ip}}}}\naudit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
            database.display()
        ));
        let weir = start(config.path());
        Locked {
            weir,
            lock: lock(&database),
            database,
            next: Some(next),
            _folder: folder,
        }
    }

    /// The upstream sends this.
    pub fn send(&self, piece: &'static str) {
        self.next.as_ref().unwrap().send(piece).unwrap();
    }

    /// The upstream closes its connection. From here on it is the store that holds the answer back.
    pub fn close(&mut self) {
        self.next = None;
        eventually(|| self.weir.metric("weir_audit_queued") > 0);
    }

    pub fn on_record(&self) -> Vec<String> {
        on_record(&self.database)
    }

    /// Lets go of the store.
    pub fn unlock(&self) {
        self.lock.execute_batch("ROLLBACK").unwrap();
    }
}
