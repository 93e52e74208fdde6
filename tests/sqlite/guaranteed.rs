//! `audit.delivery: guaranteed`: whoever has a whole answer is on record, however the process ends.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::iter;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::harness::frames::{self, HEADERS, Raw, SETTINGS};
use super::harness::held::{Locked, lock, on_record, start};
use super::harness::process::{Running, file};
use super::harness::raw::{End, Wire, read_to_end};
use super::harness::{Client, DEADLINE, PATIENCE, Upstream, eventually, ok};
use weir::store::audit::Filter;
use weir::store::audit::chain::Keys;
use weir::store::sqlite::Reader;

const CLIENTS: usize = 8;

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
    let report = Reader::open(&database)
        .unwrap()
        .verify(&Keys::new(&[]))
        .unwrap();
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
    let refused = client.get("/limited");
    assert_eq!(refused.status, 429);
    assert_eq!(on_record(&database), ["/limited"]);
    let events = Reader::open(&database).unwrap().query(&Filter::default());
    let told = events.unwrap().into_iter().map(|it| it.event.bytes_out);
    assert_eq!(told.collect::<Vec<_>>(), [refused.body.len() as u64]);
    assert_eq!(client.get("/nowhere").status, 404);
    assert_eq!(on_record(&database), ["/limited", "/nowhere"]);
    client.begin("HEAD", "/limited", &[], "");
    assert_eq!(client.status_within(5_000), Some(429));
    let events = Reader::open(&database).unwrap().query(&Filter::default());
    let head = events.unwrap().pop().unwrap().event;
    assert_eq!((head.method.as_str(), head.bytes_out), ("HEAD", 0));
    let mut client = running.client();
    client.write(b"GET / HTTP/7\r\n\r\n");
    assert_eq!(client.finish().status, 505);
    assert_eq!(on_record(&database).len(), 4);
    running.child.kill().unwrap();
    running.child.wait().unwrap();
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
        "listen: 127.0.0.1:0\nupstream: {}\nadmin: {{address: 127.0.0.1:0}}\ntelemetry: {{access_log: {{format: json}}}}\n\
         routes: [{{match: {{path: /quiet}}, upstream: upstream, audit: none}}, {{upstream: upstream}}]\n\
         audit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
        upstream.url(),
        database.display()
    ));
    let mut running = start(config.path());
    let log = running.output();
    let locked = lock(&database);
    let mut client = running.client();
    client.begin("GET", "/held", &[], "");
    assert_eq!(
        client.status_within(60_000),
        Some(200),
        "what comes before the end is sent"
    );
    assert_eq!(on_record(&database), [""; 0]);
    drop(locked);
    let body = client.finish_body();
    assert_eq!(body.len(), long.len());
    assert_eq!(on_record(&database), ["/held"]);

    // Apart, since no answer is held for longer than five seconds: one that has failed for a while is not to be asked for more.
    let locked = lock(&database);
    eventually(|| {
        let mut refused = running.client();
        refused.begin("GET", "/refused", &[], "");
        refused.status_within(300) == Some(503)
    });
    let refused = running.client().get("/refused");
    let why = refused.field("proxy-status").unwrap();
    assert!(why.contains("audit_unavailable"), "{why}");
    assert!(refused.field("retry-after").is_some());
    // What is not to be on record waits for nothing.
    assert_eq!(running.client().get("/quiet").status, 200);
    let is_told = |line: String| line.contains("audit_unavailable") && line.contains("/refused");
    let mut lines = iter::from_fn(|| log.recv_timeout(DEADLINE).ok());
    assert!(lines.any(is_told));
    assert_eq!(on_record(&database), ["/held"]);
    drop(locked);
    eventually(|| running.client().get("/again").status == 200);
}

#[test]
fn a_store_that_had_nothing_to_do_is_not_taken_for_a_stuck_one() {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("audit.db");
    let config = file(&format!(
        "listen: 127.0.0.1:0\nroutes: [{{reply: {{status: 200}}}}]\nadmin: {{address: 127.0.0.1:0}}\n\
         audit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
        database.display()
    ));
    let running = start(config.path());
    assert_eq!(running.client().get("/before").status, 200);
    let mut raw = Raw::client(running.address.parse().unwrap(), &[]);
    raw.until(|frame| frame.kind == SETTINGS && frame.flags == frames::ACK);
    // For longer than events may wait for a thread that does nothing.
    thread::sleep(Duration::from_millis(1_500));
    let locked = lock(&database);
    // Both in one turn of the lane: a store that has failed for a while refuses.
    raw.send(&[frames::get(1, "/one"), frames::get(3, "/two")].concat());
    raw.patience(Duration::from_millis(100));
    while let Ok(frame) = raw.next() {
        assert_ne!(frame.kind, HEADERS, "it waits for the store");
    }
    drop(locked);
    raw.patience(PATIENCE);
    for _ in 0..2 {
        let head = raw.until(|frame| frame.kind == HEADERS);
        assert_eq!(head.status(), Some(200));
    }
}

/// How long a client is watched for what it must not get.
const QUIET: Duration = Duration::from_millis(300);

const GET: &str = "GET /held HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
const HEAD: &str = "HEAD /held HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
const OLD_GET: &str = "GET /held HTTP/1.0\r\n\r\n";
const SWITCH: &str =
    "GET /held HTTP/1.1\r\nHost: test\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
const LIMITED: &str = "GET /limited HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
const NOWHERE: &str = "GET /nowhere HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";

/// What the upstream sends, piece by piece, and what the client has behind each while the store is locked: see [`outline`].
type Pieces = &'static [(&'static str, &'static str)];

const LENGTH: &str = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n";
const CHUNKS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n";
const BEGUN: &str = "200 5\r\nfirst\r\n";
const WHOLE: &str = "200 5\r\nfirst\r\n0\r\n\r\n";
const LAST: &str = "0\r\n\r\n";

const AT_ONCE: Pieces = &[("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst", "")];
const IN_PIECES: Pieces = &[
    (LENGTH, "200 "),
    ("first", "200 first"),
    ("other", "200 first"),
];
const EMPTY: Pieces = &[("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "")];
const CHUNKED: Pieces = &[(CHUNKS, BEGUN), (LAST, BEGUN)];
const CHUNKED_OLD: Pieces = &[(CHUNKS, "200 first"), (LAST, "200 first")];
const UNTIL_CLOSE: Pieces = &[("HTTP/1.1 200 OK\r\n\r\nfirst", BEGUN)];
const UNTIL_CLOSE_OLD: Pieces = &[("HTTP/1.1 200 OK\r\n\r\nfirst", "200 first")];
const TO_HEAD: Pieces = &[(LENGTH, "")];
const NO_CONTENT: Pieces = &[("HTTP/1.1 204 No Content\r\n\r\n", "")];
const NOT_MODIFIED: Pieces = &[("HTTP/1.1 304 Not Modified\r\n\r\n", "")];
const SWITCHED: Pieces = &[
    (
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        "",
    ),
    ("hello", ""),
];

/// A request whose event waits for the store, which is locked.
struct Held {
    locked: Locked,
    client: TcpStream,
    /// What the client has so far.
    seen: String,
}

impl Held {
    /// Sends `request`. The upstream sends each piece of its answer once the client has what it is to see of the one before, then
    /// it closes.
    fn begin(name: &str, pieces: Pieces, request: &str) -> Held {
        let locked = Locked::start();
        let mut client = locked.weir.connect();
        client.write_all(request.as_bytes()).unwrap();
        let mut held = Held {
            locked,
            client,
            seen: String::new(),
        };
        for (piece, seen) in pieces {
            held.locked.send(piece);
            held.client.set_read_timeout(Some(DEADLINE)).unwrap();
            while outline(&held.seen) != *seen {
                let read = held.read();
                assert!(read, "{name}: {:?} came, not {seen:?}", held.seen);
            }
        }
        held.locked.close();
        held
    }

    /// Whether something came in time.
    fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.client.read(&mut bytes) {
            Ok(read) => {
                self.seen.push_str(str::from_utf8(&bytes[..read]).unwrap());
                read > 0
            }
            Err(error) => {
                let late = [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind());
                assert!(late, "{error}");
                false
            }
        }
    }

    /// Neither a byte nor an end comes, and nothing is on record.
    fn is_quiet(&mut self, name: &str) {
        self.client.set_read_timeout(Some(QUIET)).unwrap();
        let peeked = loop {
            match self.client.peek(&mut [0]).map_err(|error| error.kind()) {
                // Its process was stopped, and goes on.
                Err(ErrorKind::Interrupted) => {}
                peeked => break peeked,
            }
        };
        let late = [Err(ErrorKind::WouldBlock), Err(ErrorKind::TimedOut)];
        assert!(
            late.contains(&peeked),
            "{name}: {peeked:?} behind {:?}",
            self.seen
        );
        assert_eq!(self.locked.on_record(), [""; 0], "{name}");
    }

    /// Everything that the client got in the end.
    fn finish(&mut self) -> Wire {
        let mut wire = read_to_end(&mut self.client);
        wire.text.insert_str(0, &self.seen);
        wire
    }
}

/// The status, and the body as it came; but that of a problem is only named.
fn outline(text: &str) -> String {
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return text.to_owned();
    };
    let status = head.split(' ').nth(1).unwrap_or_default();
    match body.starts_with('{') && body.ends_with('}') {
        true => format!("{status} problem"),
        false => format!("{status} {body}"),
    }
}

#[test]
fn on_no_path_does_an_answer_end_before_its_event_is_safe() {
    let check = |name: &str, request: &str, pieces: Pieces, whole: &str| {
        let mut held = Held::begin(name, pieces, request);
        held.is_quiet(name);
        held.locked.unlock();
        let wire = held.finish();
        assert_eq!(outline(&wire.text), whole, "{name}");
        assert_eq!(wire.end, End::Closed, "{name}");
        assert_eq!(held.locked.on_record().len(), 1, "{name}");
    };
    check("at once", GET, AT_ONCE, "200 first");
    check("in pieces", GET, IN_PIECES, "200 firstother");
    check("in pieces, 1.0", OLD_GET, IN_PIECES, "200 firstother");
    check("empty", GET, EMPTY, "200 ");
    check("chunked", GET, CHUNKED, WHOLE);
    check("chunked, 1.0", OLD_GET, CHUNKED_OLD, "200 first");
    check("until close", GET, UNTIL_CLOSE, WHOLE);
    check("until close, 1.0", OLD_GET, UNTIL_CLOSE_OLD, "200 first");
    check("HEAD", HEAD, TO_HEAD, "200 ");
    check("204", GET, NO_CONTENT, "204 ");
    check("304", GET, NOT_MODIFIED, "304 ");
    check("101", SWITCH, SWITCHED, "101 hello");
    check("429", LIMITED, &[], "429 problem");
    check("404", NOWHERE, &[], "404 problem");
}

#[test]
fn an_answer_whose_event_stays_unsafe_is_cut_off_or_a_503() {
    fn lost(name: &str, request: &str, pieces: Pieces, whole: &str, end: End) {
        let mut held = Held::begin(name, pieces, request);
        held.is_quiet(name);
        let wire = held.finish();
        assert_eq!(outline(&wire.text), whole, "{name}");
        assert_eq!(wire.end, end, "{name}");
        let is_told = wire.parts().0.contains("audit_unavailable");
        assert_eq!(is_told, whole.starts_with("503"), "{name}: {}", wire.text);
        // The upstream has answered well.
        let closed = "weir_breaker_state{upstream=\"app\",state=\"closed\"}";
        assert_eq!(held.locked.weir.metric(closed), 1, "{name}");
        assert_eq!(held.locked.on_record(), [""; 0], "{name}");
    }
    // Beside one another: each of them waits for five seconds.
    thread::scope(|scope| {
        let check = |name, request, pieces, whole, end| {
            scope.spawn(move || lost(name, request, pieces, whole, end));
        };
        check("in pieces", GET, IN_PIECES, "200 first", End::Closed);
        check("chunked", GET, CHUNKED, BEGUN, End::Closed);
        check("until close", GET, UNTIL_CLOSE, BEGUN, End::Closed);
        let old = "200 first";
        check("chunked, 1.0", OLD_GET, CHUNKED_OLD, old, End::Reset);
        check("close, 1.0", OLD_GET, UNTIL_CLOSE_OLD, old, End::Reset);
        let refused = "503 problem";
        check("at once", GET, AT_ONCE, refused, End::Closed);
        check("HEAD", HEAD, TO_HEAD, "503 ", End::Closed);
        check("204", GET, NO_CONTENT, refused, End::Closed);
        check("304", GET, NOT_MODIFIED, refused, End::Closed);
        check("101", SWITCH, SWITCHED, refused, End::Closed);
        check("429", LIMITED, &[], refused, End::Closed);
        check("404", NOWHERE, &[], refused, End::Closed);
    });
}

#[test]
fn a_drain_waits_for_an_event_that_waits() {
    let keep_alive = "GET /held HTTP/1.1\r\nHost: test\r\n\r\n";
    let mut held = Held::begin("drain", CHUNKED, keep_alive);
    held.locked.weir.signal("TERM");
    held.locked.weir.log_until("draining");
    held.is_quiet("drain");
    held.locked.unlock();
    let wire = held.finish();
    assert_eq!(outline(&wire.text), WHOLE);
    assert_eq!(wire.end, End::Closed);
    assert_eq!(held.locked.weir.child.wait().unwrap().code(), Some(0));
    assert_eq!(held.locked.on_record(), ["/held"]);
}
