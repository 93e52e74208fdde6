//! `audit.delivery: guaranteed`: whoever has a whole answer is on record, however the process ends.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test measures is printed"
)]

mod harness;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use harness::process::{Running, file};
use harness::{Client, Upstream, eventually, ok};
use rusqlite::Connection;
use weir::clock;
use weir::store::audit::Filter;
use weir::store::days::{self, Day};
use weir::store::sqlite::Reader;

const CLIENTS: usize = 8;

/// The paths on record.
fn on_record(database: &Path) -> Vec<String> {
    let events = Reader::open(database).unwrap().query(&Filter::default());
    let paths = events.unwrap().into_iter().map(|stored| stored.event.path);
    paths.collect()
}

/// Clients that ask for one path after the other until the process is gone; the paths that were answered with `status`.
fn ask(address: &str, over: &AtomicBool, answered: &Mutex<Vec<String>>, client: usize) {
    let mut connection = Client::to(address);
    for number in 0.. {
        let path = format!("/{client}/{number}");
        match connection.try_get(&path) {
            Some(reply) if reply.status == 200 => answered.lock().unwrap().push(path),
            Some(reply) => panic!("{reply:?}"),
            None => return,
        }
        if over.load(Ordering::Relaxed) {
            return;
        }
    }
}

#[test]
fn who_was_answered_is_on_record_after_a_kill() {
    let upstream = Upstream::replying(|_| ok("answer"));
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("audit.db");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\naudit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
        upstream.url(),
        database.display()
    ));
    let mut running = Running::start(config.path());
    let (over, answered) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (address, over, answered) = (&running.address, &over, &answered);
            scope.spawn(move || ask(address, over, answered, client));
        }
        eventually(|| answered.lock().unwrap().len() > 300);
        running.child.kill().unwrap();
        running.child.wait().unwrap();
        over.store(true, Ordering::Relaxed);
    });
    let answered = answered.into_inner().unwrap();
    let recorded = on_record(&database);
    let unique: BTreeSet<_> = recorded.iter().collect();
    println!("{} answered, {} on record", answered.len(), recorded.len());
    assert_eq!(unique.len(), recorded.len(), "no event is there twice");
    assert!(answered.iter().all(|path| unique.contains(path)));
    let surplus = recorded.len() - answered.len();
    assert!(surplus <= CLIENTS, "{surplus} more than were under way");
    let report = Reader::open(&database).unwrap().verify(None).unwrap();
    assert_eq!(report.faults, []);
}

#[test]
fn refusals_are_on_record_once_they_are_told() {
    let upstream = Upstream::answering("never asked");
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("audit.db");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: [\"{}\"]}}}}\nroutes: [{{match: {{path: /limited}}, upstream: app, rate_limits: [none]}}]\nrate_limits: {{none: {{limit: 0/s, by: client.ip}}}}\nadmin: {{address: 127.0.0.1:0}}\naudit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
        upstream.url(),
        database.display()
    ));
    let mut running = Running::start(config.path());
    let mut client = running.client();
    assert_eq!(client.get("/limited").status, 429);
    assert_eq!(on_record(&database), ["/limited"]);
    assert_eq!(client.get("/nowhere").status, 404);
    assert_eq!(on_record(&database), ["/limited", "/nowhere"]);
    client.write(b"GET / HTTP/7\r\n\r\n");
    assert_eq!(client.finish().status, 505);
    assert_eq!(on_record(&database).len(), 3);
    running.child.kill().unwrap();
    running.child.wait().unwrap();
}

/// Keeps everyone else from writing to the database while it lives.
fn lock(database: &Path) -> Connection {
    let today = days::file(database, Day::of(clock::wall()));
    let connection = Connection::open(today).unwrap();
    connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    connection
}

#[test]
fn no_answer_ends_before_its_event_is_safe() {
    let long = "x".repeat(1 << 20);
    let held = ok(&long);
    let upstream = Upstream::replying(move |head| match head.contains("/held") {
        true => held.clone(),
        false => ok(""),
    });
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("audit.db");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\naudit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
        upstream.url(),
        database.display()
    ));
    let running = Running::start(config.path());
    let locked = lock(&database);
    let mut client = running.client();
    client.begin("GET", "/held", &[], "");
    assert_eq!(
        client.status_within(5_000),
        Some(200),
        "what comes before the end is sent"
    );
    // The store has failed for a while: it is not to be asked for more.
    eventually(|| {
        let mut refused = running.client();
        refused.begin("GET", "/refused", &[], "");
        refused.status_within(300) == Some(503)
    });
    let refused = running.client().get("/refused");
    let why = refused.field("proxy-status").unwrap();
    assert!(why.contains("audit_unavailable"), "{why}");
    assert!(refused.field("retry-after").is_some());
    assert_eq!(on_record(&database), [""; 0]);
    drop(locked);
    let body = client.finish_body();
    assert_eq!(body.len(), long.len());
    assert!(on_record(&database).contains(&"/held".to_owned()));
    eventually(|| running.client().get("/again").status == 200);
}
