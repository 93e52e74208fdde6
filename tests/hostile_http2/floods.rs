//! Floods: much work for little, of the attacks that have a name. weir's memory stays within a few MiB, others are served meanwhile,
//! and the upstream sees few.

use std::io::{Read, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::harness::frames::{
    self as h2, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Ended, HEADERS,
    PING, PRIORITY, Raw, SETTINGS, WINDOW_UPDATE,
};
use super::harness::process::{Running, file};
use super::harness::raw::{read_head, scripted};
use super::harness::{DEADLINE, eventually};

/// weir as a process, in front of an upstream that answers `/fine` and `/large` and nothing else, and opens WebSockets at
/// `/socket` of which it reads nothing, and one at `/silent` that answers nothing and is asked once at a time.
struct World {
    weir: Running,
    /// Requests that reached the upstream, but for those that it answers.
    reached: Arc<AtomicUsize>,
    /// weir's memory at the start, in KiB.
    at_first: u64,
    _config: tempfile::NamedTempFile,
}

/// What a flood may take, in KiB.
const A_FEW_MIB: u64 = 6 << 10;
/// The body at `/large`, in bytes.
const LARGE: usize = 1 << 20;

impl World {
    fn new() -> World {
        World::patient(Duration::from_secs(1))
    }

    /// With this `stream_idle`.
    fn patient(idle: Duration) -> World {
        let reached = Arc::<AtomicUsize>::default();
        let count = reached.clone();
        let unread = Mutex::new(Vec::new());
        let upstream = scripted(move |mut stream| {
            while let Some(head) = read_head(&mut stream) {
                let answer = match head.split(' ').nth(1) {
                    Some("/socket") => {
                        let _ = stream.write_all(opened(&head).as_bytes());
                        unread.lock().unwrap().push(stream);
                        return;
                    }
                    Some("/fine") => super::harness::ok("fine"),
                    Some("/large") => super::harness::ok(&"a".repeat(LARGE)),
                    _ => {
                        count.fetch_add(1, Ordering::Relaxed);
                        let _ = stream.read(&mut [0; 1000]);
                        return;
                    }
                };
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        let count = reached.clone();
        let silent = scripted(move |mut stream| {
            count.fetch_add(1, Ordering::Relaxed);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let config = file(&format!(
            "{{listeners: [{{address: '127.0.0.1:0', timeouts: {{header_read: 1s, stream_idle: {}s}}}}], \
             upstreams: {{app: {{endpoints: ['http://{upstream}']}}, \
             silent: {{endpoints: ['http://{silent}'], connect_timeout: 30s, concurrency: {{max: 1, pending: 200}}}}}}, \
             routes: [{{match: {{path: /silent}}, upstream: silent}}, {{upstream: app}}], \
             admin: {{address: '127.0.0.1:0'}}, runtime: {{lanes: 1}}}}",
            idle.as_secs()
        ));
        let mut world = World {
            weir: Running::start(config.path()),
            reached,
            at_first: 0,
            _config: config,
        };
        // What is built once is no flood's.
        for _ in 0..20 {
            world.is_fine("at first");
        }
        world.at_first = world.weir.memory("VmRSS");
        world
    }

    fn address(&self) -> SocketAddr {
        self.weir.address.parse().unwrap()
    }

    fn connect(&self, settings: &[(u16, u32)]) -> Raw {
        let mut raw = Raw::client(self.address(), settings);
        raw.until(|frame| frame.kind == SETTINGS && frame.flags == h2::ACK);
        raw
    }

    /// Others are served, on connections of their own.
    #[track_caller]
    fn is_fine(&self, name: &str) {
        assert_eq!(self.weir.client().get("/fine").status, 200, "{name}");
        let mut raw = self.connect(&[]);
        raw.send(&h2::get(1, "/fine"));
        assert_eq!(raw.answer(1).status, Some(200), "{name}");
    }

    /// Behind a flood: at no time did it take much, and others are served.
    #[track_caller]
    fn bore(&self, name: &str) {
        self.bore_within(name, A_FEW_MIB);
    }

    /// As [`World::bore`], for what takes so many KiB.
    #[track_caller]
    fn bore_within(&self, name: &str, room: u64) {
        self.is_fine(name);
        let took = self.weir.memory("VmHWM").saturating_sub(self.at_first);
        println!(
            "{name}: {took} KiB, {} requests",
            self.reached.load(Ordering::Relaxed)
        );
        assert!(took < room, "{name}: {took} KiB");
        assert_eq!(self.weir.told("weir_panics_total"), Some(0.0), "{name}");
    }
}

/// The answer to a request for a WebSocket.
fn opened(head: &str) -> String {
    let mut lines = head.lines();
    let key = lines.find_map(|line| {
        line.to_ascii_lowercase()
            .starts_with("sec-websocket-key:")
            .then(|| line[18..].trim())
    });
    let accept = weir::http1::websocket::accept(key.unwrap());
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    )
}

/// Sends `piece` again and again, as long as it is taken, while answers are read away; how often, and how the connection ended.
fn flood(
    raw: &mut Raw,
    times: usize,
    piece: impl Fn(usize) -> Vec<u8> + Send + 'static,
) -> (usize, Option<u32>, Ended) {
    let mut other = Raw::of(raw.stream.try_clone().unwrap());
    let sending = thread::spawn(move || {
        let mut sent = 0;
        while sent < times && other.send(&piece(sent)) {
            sent += 1;
        }
        sent
    });
    raw.patience(Duration::from_secs(3));
    let (code, ended) = raw.farewell();
    (sending.join().unwrap(), code, ended)
}

/// The stream of the number `n`, from 0.
fn stream(n: usize) -> u32 {
    u32::try_from(n).unwrap() * 2 + 1
}

/// CVE-2023-44487: requests taken back as soon as they are sent.
#[test]
fn rapid_reset() {
    let world = World::new();
    let pair = |n| [h2::get(stream(n), "/p"), h2::reset(stream(n), 8)].concat();
    // All at once.
    let mut raw = world.connect(&[]);
    let all: Vec<u8> = (0..10_000).flat_map(pair).collect();
    let (_, code, ended) = flood(&mut raw, 1, move |_| all.clone());
    assert_eq!(ended, Ended::Closed);
    assert!(
        code.is_none_or(|code| code == ENHANCE_YOUR_CALM),
        "{code:?}"
    );
    let reached = world.reached.swap(0, Ordering::Relaxed);
    assert!(reached < 300, "{reached}");
    // One by one.
    let mut raw = world.connect(&[]);
    let (sent, code, ended) = flood(&mut raw, 10_000, pair);
    assert_eq!(ended, Ended::Closed, "after {sent}");
    assert!(
        code.is_none_or(|code| code == ENHANCE_YOUR_CALM),
        "{code:?}"
    );
    let reached = world.reached.swap(0, Ordering::Relaxed);
    assert!(reached < 300, "{reached}");
    world.bore("rapid reset");
}

/// As [`rapid_reset`], but each is taken back only once it has reached the upstream.
#[test]
fn patient_reset() {
    let world = World::new();
    let mut raw = world.connect(&[]);
    let mut ended = 0;
    for n in 0..10_000 {
        let before = world.reached.load(Ordering::Relaxed);
        if !raw.send(&h2::get(stream(n), "/p")) {
            break;
        }
        ended = n;
        let began = Instant::now();
        while world.reached.load(Ordering::Relaxed) == before
            && began.elapsed() < Duration::from_millis(200)
        {
            thread::yield_now();
        }
        raw.send(&h2::reset(stream(n), 8));
    }
    assert!(ended < 300, "{ended}");
    world.bore("patient reset");
}

/// CVE-2025-8671, "MadeYouReset": what the client does wrong makes the server take its own requests back.
#[test]
fn made_you_reset() {
    let world = World::new();
    type Made = fn(u32) -> Vec<u8>;
    let wrong: [(&str, Made); 5] = [
        ("window over its bound", |stream| {
            h2::window_update(stream, i32::MAX.unsigned_abs())
        }),
        ("window by 0", |stream| h2::window_update(stream, 0)),
        ("DATA behind the end", |stream| {
            h2::frame(DATA, 0, stream, b"abc")
        }),
        ("HEADERS behind the end", |stream| {
            h2::frame(HEADERS, END_HEADERS, stream, &h2::block(&[("a", "1")]))
        }),
        ("PRIORITY of itself", |stream| {
            h2::frame(
                PRIORITY,
                0,
                stream,
                &[stream.to_be_bytes().as_slice(), &[0]].concat(),
            )
        }),
    ];
    for (name, wrong) in wrong {
        let mut raw = world.connect(&[]);
        let pair = move |n| [h2::get(stream(n), "/p"), wrong(stream(n))].concat();
        let (sent, code, ended) = flood(&mut raw, 10_000, pair);
        let reached = world.reached.swap(0, Ordering::Relaxed);
        println!("{name}: {sent} sent, {reached} reached, {code:?} {ended:?}");
        assert!(reached < 1500, "{name}: {reached}");
        drop(raw);
        world.bore(name);
    }
}

/// CVE-2024-27316: a head that goes on and on.
#[test]
fn continuation() {
    let world = World::new();
    let begin = |flags| h2::frame(HEADERS, flags, 1, &h2::block(&[(":method", "GET")]));
    let go_on: [(&str, Vec<u8>); 3] = [
        ("empty", Vec::new()),
        ("small", h2::literal(b"a", b"1")),
        ("large", h2::literal(b"a", &[b'a'; 16_000])),
    ];
    for (name, block) in go_on {
        for ended in [0, END_STREAM] {
            let mut raw = world.connect(&[]);
            raw.send(&begin(ended));
            let more = h2::frame(CONTINUATION, 0, 1, &block);
            let (sent, _, ended) = flood(&mut raw, 20_000, move |_| more.clone());
            assert_eq!(ended, Ended::Closed, "{name}");
            println!("CONTINUATION, {name}: {sent} sent");
            world.bore(name);
        }
    }
}

/// CVE-2019-9512 (PING), 9515 (SETTINGS), 9513 and 11 (PRIORITY), 9514 (RST_STREAM), 9518 (empty frames), and others that ask for an
/// answer or none; read and not read.
#[test]
fn control_frames() {
    let world = World::new();
    let zeros = [0; 8];
    let open = h2::request(1, 0, "POST", "/p", &[]);
    let floods: [(&str, Vec<u8>, Vec<u8>); 9] = [
        ("PING", Vec::new(), h2::frame(PING, 0, 0, &zeros)),
        (
            "PING that answers",
            Vec::new(),
            h2::frame(PING, h2::ACK, 0, &zeros),
        ),
        (
            "SETTINGS",
            Vec::new(),
            h2::settings(&[(4, 65_535), (1, 4096)]),
        ),
        ("SETTINGS, empty", Vec::new(), h2::settings(&[])),
        (
            "PRIORITY",
            Vec::new(),
            h2::frame(PRIORITY, 0, 5, &zeros[..5]),
        ),
        ("unknown", Vec::new(), h2::frame(200, 0, 0, &zeros)),
        ("empty DATA", open.clone(), h2::frame(DATA, 0, 1, &[])),
        (
            "DATA of padding",
            open.clone(),
            h2::frame(DATA, h2::PADDED, 1, &[3, 0, 0, 0]),
        ),
        ("WINDOW_UPDATE", open, h2::window_update(1, 1)),
    ];
    for (name, first, frame) in floods {
        let frames = frame.repeat(1000);
        for is_read in [true, false] {
            let mut raw = world.connect(&[]);
            raw.send(&first);
            if is_read {
                let frames = frames.clone();
                let (sent, code, ended) = flood(&mut raw, 100, move |_| frames.clone());
                println!("{name}: {sent}000 sent, {code:?} {ended:?}");
            } else {
                raw.stream
                    .set_write_timeout(Some(Duration::from_millis(500)))
                    .unwrap();
                let sent = (0..100).take_while(|_| raw.send(&frames)).count();
                println!("{name}, not read: {sent}000 sent");
            }
            world.bore(name);
        }
    }
}

/// GHSA-q83h-524g-xf6h: bodies in frames of a byte, of which each costs many times that. A bound on that ends the connection, though no
/// window is full: that of a request that waits for its turn, and so of a body that no one takes.
#[test]
fn small_data() {
    let world = World::new();
    let mut first = world.connect(&[]);
    first.send(&h2::get(1, "/silent"));
    eventually(|| world.reached.load(Ordering::Relaxed) == 1);
    let mut raw = world.connect(&[]);
    let begin = |n| h2::request(stream(n), 0, "POST", "/silent", &[]);
    raw.send(&(0..100).flat_map(begin).collect::<Vec<_>>());
    let (sent, code, ended) = flood(&mut raw, 100, |n| {
        h2::frame(DATA, 0, stream(n), b"a").repeat(60_000)
    });
    println!("small DATA: {sent} times 60,000 sent, {code:?} {ended:?}");
    assert_eq!(ended, Ended::Closed);
    assert!(
        code.is_none_or(|code| code == ENHANCE_YOUR_CALM),
        "{code:?}"
    );
    world.bore_within("small DATA", 24 << 10);
}

/// A byte of a WebSocket's that its upstream does not read holds on to all that it was read with: frames of any size may stand beside it, of a
/// kind that nobody knows, and no window bounds those.
#[test]
fn small_data_of_a_websocket() {
    const LARGE: usize = 16 * 1024;
    let world = World::patient(Duration::from_secs(60));
    let mut raw = world.connect(&[]);
    let websocket = [(":protocol", "websocket")];
    raw.send(&h2::request(1, 0, "CONNECT", "/socket", &websocket));
    raw.until(|frame| frame.kind == HEADERS);
    // As much as goes to the upstream unread, which leaves some of the window.
    raw.patience(Duration::from_millis(500));
    let mut room = 64 * 1024;
    loop {
        while room >= 2 * LARGE {
            raw.send(&h2::frame(DATA, 0, 1, &[b'a'; LARGE]));
            room -= LARGE;
        }
        match raw.next() {
            Ok(frame) if frame.kind == WINDOW_UPDATE && frame.stream == 1 => {
                let more = frame.payload.try_into().unwrap();
                room += usize::try_from(u32::from_be_bytes(more)).unwrap();
            }
            Ok(_) => {}
            Err(ended) => {
                assert_eq!(ended, Ended::Hung);
                break;
            }
        }
    }
    let small = h2::frame(DATA, 0, 1, b"a");
    let beside = h2::frame(u8::MAX, 0, 0, &[0; LARGE]);
    raw.send(&[small, beside].concat().repeat(2_000));
    raw.patience(DEADLINE);
    raw.send(&h2::frame(PING, 0, 0, &[0; 8]));
    raw.until(|frame| frame.kind == PING);
    world.bore("small DATA of a WebSocket");
}

/// RFC 7541 section 7.3: a large field in the table, and a block of references to it.
#[test]
fn hpack_bomb() {
    let world = World::new();
    let usual = h2::block(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "x"),
        (":path", "/p"),
    ]);
    let large = h2::kept(b"a", &[b'a'; 4000]);
    let again = vec![0xbe; 16_000];
    for stream in [1, 3, 5] {
        let mut raw = world.connect(&[]);
        raw.send(&h2::frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            1,
            &[&*usual, &large].concat(),
        ));
        let block = [&*usual, &again[..12_000]].concat();
        let mut bomb = h2::frame(HEADERS, END_STREAM, stream + 2, &block);
        for _ in 0..3 {
            bomb.extend(h2::frame(CONTINUATION, 0, stream + 2, &again));
        }
        bomb.extend(h2::frame(CONTINUATION, END_HEADERS, stream + 2, &[]));
        raw.send(&bomb);
        let answer = raw.answer(stream + 2);
        assert!(
            answer.status == Some(431) || answer.farewell.is_some() || answer.reset.is_some(),
            "{answer:?}"
        );
        world.bore("HPACK bomb");
    }
    assert!(world.reached.load(Ordering::Relaxed) <= 3);
}

/// Many connections that begin and do not go on.
#[test]
fn slow_openings() {
    let world = World::new();
    let began = Instant::now();
    let raws: Vec<_> = (0..200)
        .map(|n| {
            let mut raw = Raw::of(std::net::TcpStream::connect(world.address()).unwrap());
            match n % 4 {
                0 => raw.send(&h2::PREFACE[..20]),
                1 => raw.send(h2::PREFACE),
                2 => raw.send(&[h2::PREFACE, &h2::settings(&[]), &[0, 0, 200, 1, 4]].concat()),
                _ => raw.send(&[h2::PREFACE, &h2::settings(&[]), &h2::get(1, "/p")[..20]].concat()),
            };
            raw
        })
        .collect();
    world.bore("slow openings");
    for mut raw in raws {
        assert_eq!(raw.farewell().1, Ended::Closed);
    }
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(world.reached.load(Ordering::Relaxed), 0);
}

/// RFC 9113 section 10.5, CVE-2019-9517: answers for a client that gives no window for them, or one of a byte at a time. Some KiB are
/// held of each, whatever its length, and not for longer than `stream_idle`.
#[test]
fn answers_without_a_window() {
    const INITIAL_WINDOW_SIZE: u16 = 4;
    let world = World::new();
    let mut others = 0;
    let windows = [
        ("none of the stream", 0),
        ("none of the connection", 1 << 30),
    ];
    for (name, window) in windows.into_iter().chain([("of a byte", 1)]) {
        let mut raws: Vec<_> = (0..5)
            .map(|_| world.connect(&[(INITIAL_WINDOW_SIZE, window)]))
            .collect();
        for raw in &mut raws {
            let requests: Vec<u8> = (0..100)
                .flat_map(|n| h2::get(stream(n), "/large"))
                .collect();
            raw.send(&requests);
            // One after the other: all at once their connections would be more than the test's upstream has a queue for.
            for _ in 0..100 {
                let head = raw.until(|frame| frame.kind == HEADERS);
                assert_eq!(head.status(), Some(200), "{name}");
            }
        }
        others += 500;
        let all = format!("weir_rejections_total{{reason=\"client_left\"}} {others}\n");
        eventually(|| {
            if window == 1 {
                let more: Vec<u8> = (0..100)
                    .flat_map(|n| h2::window_update(stream(n), 1))
                    .collect();
                for raw in &mut raws {
                    raw.send(&more);
                }
            }
            world.weir.admin().get("/metrics").body.contains(&all)
        });
        world.bore_within(name, 500 * 40);
    }
}
