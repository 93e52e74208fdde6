//! What is on record of requests by HTTP/2: events, metrics, and answers held back until their event is safe.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, mpsc};

use rusqlite::Connection;
use serde_json::{Value, json};

use super::harness::frames::{
    self, CANCEL, DATA, END_HEADERS, END_STREAM, HEADERS, PROTOCOL_ERROR, Raw,
};
use super::harness::held::{Locked, lock, on_record, start};
use super::harness::process::{Running, audited, file};
use super::harness::raw::{read_head, scripted};
use super::harness::versions::{Client, Length, Origin, Outgoing, PAIRINGS, Version, run, soon};
use super::harness::{Upstream, at_once, eventually};

#[test]
fn requests_are_on_record_as_those_of_http1() {
    for (asks, serves) in PAIRINGS {
        eprintln!("from {asks:?} to {serves:?}");
        run(record(asks, serves));
    }
}

async fn record(asks: Version, serves: Version) {
    let mut origin = Origin::start(serves).await;
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: {}}}}}\n\
         routes: [{{match: {{path: /app/*}}, upstream: app}}, {{match: {{path: /limited}}, upstream: app, rate_limits: [none]}}]\n\
         rate_limits: {{none: {{limit: 0/h, by: constant}}}}\n\
         audit: {{sqlite: {{path: {}}}}}\n",
        origin.address,
        serves.name(),
        folder.path().join("audit.db").display(),
    ));
    let weir = Running::start(config.path());
    let mut client = Client::connect(asks, weir.address.parse().unwrap()).await;

    let mut call = client
        .call("POST", "/app/whole?q=1", &[], Length::Unknown)
        .await;
    call.body.finish(b"abc").await.unwrap();
    let mut asked = origin.asked().await;
    asked.body.rest().await.unwrap();
    let mut out = asked.reply(201, &[], Length::Unknown).await;
    out.send(b"hello").await.unwrap();
    out.end(&[("x-sum", "1")]).await.unwrap();
    call.answer().await.body.rest().await.unwrap();

    let call = client.get("/app/broken").await;
    let mut asked = origin.asked().await;
    let mut out = asked.reply(200, &[], Length::Unknown).await;
    out.send(b"hel").await.unwrap();
    let mut answer = call.answer().await;
    answer.body.expect(b"hel").await;
    out.reset();
    drop((out, asked));
    answer.body.rest().await.unwrap_err();

    let mut call = client.get("/app/left").await;
    let mut asked = origin.asked().await;
    call.body.reset();
    drop(call);
    asked.taken_back(&mut Outgoing::Ended).await;

    let (status, limited) = client.get("/limited").await.whole().await;
    assert_eq!(status, 429);
    let call = client.get("/app/refused").await;
    origin.asked().await.reset(h2::Reason::INTERNAL_ERROR);
    let (status, refused) = call.whole().await;
    assert_eq!(status, 502);

    eventually(|| audited(config.path(), &[]).len() == 5);
    let mut events = audited(config.path(), &[]);
    events.sort_by_key(|event| event["path"].as_str().map(str::to_owned));
    let said: Vec<_> = events
        .iter()
        .map(|event| {
            json!([
                event["path"],
                event["method"],
                event["status"],
                event["label"],
                event["bytes_in"],
                event["bytes_out"]
            ])
        })
        .collect();
    let expected = [
        json!(["/app/broken", "GET", 200, "upstream_aborted", 0, 3]),
        json!(["/app/left", "GET", 499, "client_left", 0, 0]),
        json!([
            "/app/refused",
            "GET",
            502,
            "upstream_broken",
            0,
            refused.len()
        ]),
        json!(["/app/whole", "POST", 201, null, 3, 5]),
        json!(["/limited", "GET", 429, "quota_exceeded", 0, limited.len()]),
    ];
    assert_eq!(said, expected);
    assert_eq!(events[3]["query"], "q=1");
    assert_eq!(events[3]["host"], "test");
    let metrics = weir.admin().get("/metrics").body;
    for line in [
        "weir_requests_total{route=\"/app/*\",upstream=\"app\",class=\"2xx\"} 2",
        "weir_requests_total{route=\"/app/*\",upstream=\"app\",class=\"4xx\"} 1",
        "weir_requests_total{route=\"/app/*\",upstream=\"app\",class=\"5xx\"} 1",
        "weir_rejections_total{reason=\"client_left\"} 1",
        "weir_rejections_total{reason=\"upstream_aborted\"} 1",
        "weir_rejections_total{reason=\"quota_exceeded\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

/// Behind the end of the response weir still has the event of a request whose body went on beside it; and it has one of each that the
/// end of a drain cuts off.
#[test]
fn what_came_of_a_body_is_on_record_whenever_that_is_told() {
    for (asks, serves) in PAIRINGS {
        for delivery in ["best_effort", "guaranteed"] {
            eprintln!("from {asks:?} to {serves:?}, {delivery}");
            run(count(asks, serves, delivery));
        }
    }
}

async fn count(asks: Version, serves: Version, delivery: &str) {
    let mut origin = Origin::start(serves).await;
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\nshutdown: {{drain: 200ms}}\n\
         upstreams: {{app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: {}}}}}\n\
         audit: {{delivery: {delivery}, sqlite: {{path: {}}}}}\n",
        origin.address,
        serves.name(),
        folder.path().join("audit.db").display(),
    ));
    let mut weir = Running::start(config.path());
    let mut client = Client::connect(asks, weir.address.parse().unwrap()).await;
    let mut early = async |path| {
        let mut call = client.call("POST", path, &[], Length::Unknown).await;
        call.body.send(b"abc").await.unwrap();
        let mut asked = origin.asked().await;
        asked.body.expect(b"abc").await;
        let mut out = asked.reply(200, &[], Length::Unknown).await;
        out.send(b"first").await.unwrap();
        let mut answer = call.answer().await;
        answer.body.expect(b"first").await;
        (asked, out, answer)
    };
    let (mut asked, mut out, mut answer) = early("/beside").await;
    answer.sent.finish(b"defgh").await.unwrap();
    assert_eq!(asked.body.rest().await.unwrap().0, b"defgh");
    out.end(&[]).await.unwrap();
    assert_eq!(answer.body.rest().await.unwrap().0, b"");
    // weir looks for what such a client still sends, before all is over.
    drop((asked, out, answer));
    eventually(|| audited(config.path(), &[]).len() == 1);

    let (mut asked, _out, mut answer) = early("/cut/beside").await;
    answer.sent.send(b"de").await.unwrap();
    asked.body.expect(b"de").await;
    let mut call = client.call("POST", "/cut", &[], Length::Unknown).await;
    call.body.send(b"abcd").await.unwrap();
    let mut asked = origin.asked().await;
    asked.body.expect(b"abcd").await;
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());

    let mut events = audited(config.path(), &[]);
    events.sort_by_key(|event| event["path"].as_str().map(str::to_owned));
    let said = |event: &Value| json!([event["path"], event["label"], event["bytes_in"]]);
    let said: Vec<_> = events.iter().map(said).collect();
    let expected = [
        json!(["/beside", null, 8]),
        json!(["/cut", "cut_off", 4]),
        json!(["/cut/beside", "cut_off", 5]),
    ];
    assert_eq!(said, expected);
}

/// The stream is reset for it, and not by its client; what has been answered by then stays so.
#[test]
fn a_malformed_body_is_on_record_as_one() {
    let upstream = scripted(|mut stream| {
        if let Some(head) = read_head(&mut stream) {
            if head.starts_with("POST /early") {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf");
            }
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: http://{upstream}\n\
         audit: {{sqlite: {{path: {}}}}}\n",
        folder.path().join("audit.db").display(),
    ));
    let weir = Running::start(config.path());
    let length = [("content-length", "6")];
    let data = |flags, data: &[u8]| frames::frame(DATA, flags, 1, data);
    let mut raw = Raw::client(weir.address.parse().unwrap(), &[]);
    raw.send(&frames::request(1, 0, "POST", "/late", &length));
    raw.send(&data(END_STREAM, b"abc"));
    assert_eq!(raw.answer(1).reset, Some(PROTOCOL_ERROR));
    let mut raw = Raw::client(weir.address.parse().unwrap(), &[]);
    raw.send(&frames::request(1, 0, "POST", "/early", &length));
    raw.send(&data(0, b"abc"));
    raw.until(|frame| frame.kind == DATA);
    raw.send(&data(END_STREAM, b"d"));
    assert_eq!(raw.answer(1).reset, Some(PROTOCOL_ERROR));
    // One whose client takes it back is another matter.
    let mut raw = Raw::client(weir.address.parse().unwrap(), &[]);
    raw.send(&frames::request(1, 0, "POST", "/late", &length));
    raw.send(&frames::reset(1, CANCEL));
    let ended = |reason| weir.metric(&format!("weir_rejections_total{{reason=\"{reason}\"}}"));
    eventually(|| (ended("bad_body"), ended("client_left")) == (2, 1));
    let mut events = Vec::new();
    eventually(|| {
        events = audited(config.path(), &[]);
        events.len() == 3
    });
    let told = |event: &Value| json!([event["path"], event["status"], event["label"]]);
    let mut told: Vec<_> = events.iter().map(|event| told(event).to_string()).collect();
    told.sort();
    let expected = [
        json!(["/early", 200, "bad_body"]).to_string(),
        json!(["/late", 400, "bad_body"]).to_string(),
        json!(["/late", 499, "client_left"]).to_string(),
    ];
    assert_eq!(told, expected);
}

/// A stream's task goes behind its connection's.
#[test]
fn each_request_that_the_end_of_a_drain_cuts_off_is_on_record_of_many_connections() {
    const CONNECTIONS: usize = 50;
    let upstream = Upstream::held();
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\nshutdown: {{drain: 200ms}}\n\
         upstream: {}\ntelemetry: {{access_log: {{format: json}}}}\naudit: {{sqlite: {{path: {}}}}}\n",
        upstream.url(),
        folder.path().join("audit.db").display(),
    ));
    let mut weir = Running::start(config.path());
    let lines = weir.output();
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let mut raw = Raw::client(weir.address.parse().unwrap(), &[]);
            raw.send(&frames::get(1, "/cut"));
            upstream.wait_for_request();
            raw
        })
        .collect();
    weir.signal("TERM");
    assert!(weir.child.wait().unwrap().success());
    drop(clients);
    let lines = lines.iter().filter(|line| line.contains("cut_off")).count();
    let events = audited(config.path(), &[]);
    let events = events.iter().filter(|event| event["label"] == "cut_off");
    assert_eq!((lines, events.count()), (CONNECTIONS, CONNECTIONS));
}

/// What an upstream of HTTP/1.1 sends, piece by piece, and what the client has of the body behind each while the store is
/// locked; `None`: not even the head.
type Pieces = &'static [(&'static str, Option<&'static str>)];

/// The answer ends once its event is safe, and not before.
fn held(name: &str, method: &str, path: &str, pieces: Pieces, status: u16, whole: &str) {
    let mut locked = Locked::start();
    let mut raw = Raw::client(locked.weir.address.parse().unwrap(), &[]);
    raw.send(&frames::request(1, END_STREAM, method, path, &[]));
    let (mut seen, mut head) = (String::new(), None);
    for (piece, due) in pieces {
        locked.send(piece);
        while due.is_some_and(|due| seen != due || head.is_none()) {
            let frame = raw.until(|frame| frame.stream == 1);
            assert!(!frame.ends_stream(), "{name}: {frame:?}");
            match frame.kind {
                HEADERS => head = frame.status(),
                DATA => seen.push_str(str::from_utf8(&frame.payload).unwrap()),
                other => panic!("{name}: {other}"),
            }
        }
    }
    locked.close();
    raw.patience(std::time::Duration::from_millis(300));
    while let Ok(frame) = raw.next() {
        assert_ne!(frame.stream, 1, "{name}: {frame:?}");
    }
    assert_eq!(locked.on_record(), [""; 0], "{name}");
    raw.patience(super::harness::DEADLINE);
    locked.unlock();
    let rest = raw.answer(1);
    assert_eq!(rest.status.or(head), Some(status), "{name}");
    assert!(rest.whole, "{name}: {rest:?}");
    seen.push_str(&String::from_utf8_lossy(&rest.body));
    if !seen.starts_with('{') {
        assert_eq!(seen, whole, "{name}");
    }
    assert_eq!(locked.on_record(), [path], "{name}");
}

const CHUNKS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n";
const LENGTH: &str = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n";

#[test]
fn on_no_path_does_an_answer_by_http2_end_before_its_event_is_safe() {
    let pieces: Pieces = &[("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst", None)];
    held("at once", "GET", "/held", pieces, 200, "first");
    let pieces: Pieces = &[
        (LENGTH, Some("")),
        ("first", Some("first")),
        ("other", Some("first")),
    ];
    held("in pieces", "GET", "/held", pieces, 200, "firstother");
    let pieces: Pieces = &[(CHUNKS, Some("first")), ("0\r\n\r\n", Some("first"))];
    held("chunked", "GET", "/held", pieces, 200, "first");
    let pieces: Pieces = &[
        (CHUNKS, Some("first")),
        ("0\r\nx-sum: 1\r\n\r\n", Some("first")),
    ];
    held("trailers", "GET", "/held", pieces, 200, "first");
    let pieces: Pieces = &[(
        "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nfirst",
        Some("first"),
    )];
    held("until close", "GET", "/held", pieces, 200, "first");
    held("HEAD", "HEAD", "/held", &[(LENGTH, None)], 200, "");
    held(
        "204",
        "GET",
        "/held",
        &[("HTTP/1.1 204 No Content\r\n\r\n", None)],
        204,
        "",
    );
    held(
        "304",
        "GET",
        "/held",
        &[("HTTP/1.1 304 Not Modified\r\n\r\n", None)],
        304,
        "",
    );
    held("429", "GET", "/limited", &[], 429, "");
    held("404", "GET", "/nowhere", &[], 404, "");
}

/// From an upstream of HTTP/2, whose end may come with data, alone, or as trailers.
#[test]
fn no_answer_of_an_upstream_of_http2_ends_before_its_event_is_safe() {
    for (asks, end) in [
        (Version::One, 0),
        (Version::One, 1),
        (Version::Two, 0),
        (Version::Two, 1),
        (Version::Two, 2),
    ] {
        // The end goes out once the client has what comes before it.
        let (goes_on, first_came) = mpsc::channel::<()>();
        let first_came = Mutex::new(first_came);
        let upstream = scripted(move |stream| {
            let mut raw = Raw::server(stream, &[]).unwrap();
            raw.until(|frame| frame.kind == HEADERS);
            let head = frames::block(&[(":status", "200")]);
            let head = frames::frame(HEADERS, END_HEADERS, 1, &head);
            let data = |flags, data: &str| frames::frame(DATA, flags, 1, data.as_bytes());
            let trailers = frames::block(&[("x-sum", "1")]);
            let end = match end {
                0 => data(END_STREAM, "other"),
                1 => [data(0, "other"), data(END_STREAM, "")].concat(),
                _ => [
                    data(0, "other"),
                    frames::frame(HEADERS, END_HEADERS | END_STREAM, 1, &trailers),
                ]
                .concat(),
            };
            raw.send(&[head, data(0, "first")].concat());
            let _ = first_came.lock().unwrap().recv();
            raw.send(&end);
            let _ = raw.farewell();
        });
        let folder = tempfile::tempdir().unwrap();
        let database = folder.path().join("audit.db");
        let config = guaranteed(upstream, &database);
        let weir = start(config.path());
        let locked = lock(&database);
        run(async {
            eprintln!("{asks:?} {end}");
            let mut client = Client::connect(asks, weir.address.parse().unwrap()).await;
            is_held_until_safe(&mut client, &goes_on, &locked, &database).await;
        });
    }
}

/// Asks for what is answered by "first" and, once told to, by "other", which is not to end before its event is safe.
async fn is_held_until_safe(
    client: &mut Client,
    goes_on: &mpsc::Sender<()>,
    locked: &Connection,
    database: &Path,
) {
    let mut answer = client.get("/held").await.answer().await;
    answer.body.expect(b"first").await;
    goes_on.send(()).unwrap();
    let rest = answer.body.rest();
    tokio::pin!(rest);
    let early = tokio::time::timeout(std::time::Duration::from_millis(600), &mut rest).await;
    assert!(early.is_err(), "{early:?}");
    assert_eq!(on_record(database), [""; 0]);
    locked.execute_batch("ROLLBACK").unwrap();
    assert_eq!(soon(rest).await.unwrap().0, b"other");
    assert_eq!(on_record(database), ["/held"]);
}

/// The file of a weir before an upstream of HTTP/2 that answers nothing whose event is not safe.
fn guaranteed(upstream: SocketAddr, database: &Path) -> tempfile::NamedTempFile {
    file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}'], connect_timeout: 60s, protocol: http2}}}}\n\
         audit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
        database.display()
    ))
}

/// To a client of HTTP/1.1, and to some of HTTP/2 (curl), the last byte of a length is the end, which an upstream of HTTP/2 may say in a frame
/// of its own: its event is safe before that byte, and one of HTTP/1.1 that leaves then has all.
#[test]
fn the_last_byte_of_a_length_is_the_end_of_an_answer() {
    at_once([Version::One, Version::Two], last_byte_ends);
}

fn last_byte_ends(asks: Version) {
    let (goes_on, last) = mpsc::channel::<()>();
    let (ends, end) = mpsc::channel::<()>();
    let (last, end) = (Mutex::new(last), Mutex::new(end));
    let upstream = scripted(move |stream| {
        let mut raw = Raw::server(stream, &[]).unwrap();
        raw.until(|frame| frame.kind == HEADERS);
        let head = frames::block(&[(":status", "200"), ("content-length", "10")]);
        let head = frames::frame(HEADERS, END_HEADERS, 1, &head);
        raw.send(&[head, frames::frame(DATA, 0, 1, b"first")].concat());
        let _ = last.lock().unwrap().recv();
        raw.send(&frames::frame(DATA, 0, 1, b"other"));
        let _ = end.lock().unwrap().recv();
        raw.send(&frames::frame(DATA, END_STREAM, 1, b""));
        let _ = raw.farewell();
    });
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("audit.db");
    let config = guaranteed(upstream, &database);
    let weir = start(config.path());
    let locked = lock(&database);
    let metrics = || weir.admin().get("/metrics").body;
    run(async {
        let mut client = Client::connect(asks, weir.address.parse().unwrap()).await;
        let mut answer = client.get("/held").await.answer().await;
        answer.body.expect(b"first").await;
        goes_on.send(()).unwrap();
        let mut other = Box::pin(answer.body.expect(b"other"));
        let early = tokio::time::timeout(std::time::Duration::from_millis(600), &mut other).await;
        assert!(early.is_err(), "{early:?}");
        assert_eq!(on_record(&database), [""; 0]);
        locked.execute_batch("ROLLBACK").unwrap();
        other.await;
        assert_eq!(on_record(&database), ["/held"]);
        if asks == Version::Two {
            ends.send(()).unwrap();
            assert_eq!(answer.body.rest().await, Ok((Vec::new(), Vec::new())));
        }
    });
    if asks == Version::Two {
        return;
    }
    // The client is gone; weir has time to hear of that.
    std::thread::sleep(std::time::Duration::from_millis(300));
    ends.send(()).unwrap();
    eventually(|| metrics().contains("upstream=\"app\",class=\"2xx\"} 1"));
    let metrics = metrics();
    assert!(!metrics.contains("reason=\"client_left\"} 1"), "{metrics}");
    assert_eq!(audited(config.path(), &[])[0]["label"], Value::Null);
}
