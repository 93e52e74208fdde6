//! Clients and upstreams that break off wherever it comes to them, each of its own chance: nothing of a request stays behind, be it a place, a
//! slot of a limit, a probe of a breaker or a connection.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use super::harness::frames::{
    self, CANCEL, DATA, END_HEADERS, END_STREAM, HEADERS, NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM,
    Raw,
};
use super::harness::raw::{self, scripted};
use super::harness::{DEADLINE, Lane, PATIENCE, at_once, eventually_within, ok};
use socket2::SockRef;

/// Requests that each upstream takes at a time.
const PLACES: usize = 8;
const CLIENTS: usize = 24;
/// Connections of each client.
const ROUNDS: usize = 12;

/// By chance, of a seed that differs for each.
struct Dice(u64);

impl Dice {
    fn new() -> Dice {
        static SEED: AtomicU64 = AtomicU64::new(1);
        let nth = SEED.fetch_add(1, Ordering::Relaxed);
        Dice(nth.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % bound
    }

    fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    fn millis(&mut self, bound: usize) -> Duration {
        Duration::from_millis(1 + u64::try_from(self.below(bound)).unwrap())
    }
}

/// What upstreams do.
#[derive(Default)]
struct Mood {
    is: AtomicU8,
    /// Requests that came while they were held.
    held: AtomicUsize,
}

const BREAKS_OFF: u8 = 0;
const ANSWERS: u8 = 1;
const HOLDS: u8 = 2;

impl Mood {
    fn set(&self, mood: u8) {
        self.is.store(mood, Ordering::SeqCst);
    }

    fn is(&self) -> u8 {
        self.is.load(Ordering::SeqCst)
    }

    fn wait(&self) {
        if self.is() == HOLDS {
            self.held.fetch_add(1, Ordering::SeqCst);
        }
        while self.is() == HOLDS {
            sleep(Duration::from_millis(5));
        }
    }
}

/// Makes the close of this connection a reset.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Reads until weir gives up.
fn stall(stream: &mut TcpStream) {
    let _ = stream.set_read_timeout(Some(DEADLINE));
    let _ = stream.read_to_end(&mut Vec::new());
}

fn by_http1(mood: Arc<Mood>) -> SocketAddr {
    scripted(move |mut stream| {
        let mut dice = Dice::new();
        while let Some(head) = raw::read_head(&mut stream) {
            if mood.is() != BREAKS_OFF {
                mood.wait();
                let _ = stream.write_all(ok("fine").as_bytes());
                continue;
            }
            let has_body = head.starts_with("PUT");
            if has_body && dice.one_in(2) {
                let _ = stream.set_read_timeout(Some(Duration::from_millis(20)));
                let mut piece = vec![0; 1 << 16];
                let mut read = || matches!(stream.read(&mut piece), Ok(1..));
                for _ in 0..dice.below(40) {
                    if !read() {
                        break;
                    }
                }
            }
            if !answer_by_chance(&mut stream, &mut dice) || has_body {
                return;
            }
        }
    })
}

/// Whether the connection can go on.
fn answer_by_chance(stream: &mut TcpStream, dice: &mut Dice) -> bool {
    const HALF: &str = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of it";
    let chance = dice.below(16);
    let mut say = |text: &str| drop(stream.write_all(text.as_bytes()));
    match chance {
        0 => say("HTTP/1.1 200 OK\r\nContent-Le"),
        1 => reset(stream),
        2 => {
            say(HALF);
            sleep(dice.millis(30));
        }
        3 => {
            say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n5\r\nhe");
            reset(stream);
        }
        4 => stall(stream),
        5 => {
            say(HALF);
            stall(stream);
        }
        6 => say(&ok(&"x".repeat(400_000)).replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")),
        7 => {
            say(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello",
            );
            sleep(dice.millis(50));
        }
        8 => say("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"),
        9 => {
            say("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
            sleep(dice.millis(20));
            say(&ok("fine"));
        }
        10 => {
            say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            for _ in 0..dice.below(20) {
                say("5\r\nhello\r\n");
                sleep(dice.millis(3));
            }
            say("0\r\n\r\n");
        }
        _ => {
            sleep(dice.millis(20));
            say(&ok("fine"));
        }
    }
    chance > 7
}

fn by_http2(mood: Arc<Mood>) -> SocketAddr {
    scripted(move |stream| {
        let mut dice = Dice::new();
        let Some(mut raw) = Raw::server(stream, &[(4, window(&mut dice))]) else {
            return;
        };
        raw.patience(PATIENCE);
        while let Ok(frame) = raw.next() {
            if frame.kind == DATA && !frame.payload.is_empty() && dice.one_in(2) {
                let size = u32::try_from(frame.payload.len()).unwrap();
                raw.send(&frames::window_update(0, size));
                raw.send(&frames::window_update(frame.stream, size));
            }
            if frame.kind != HEADERS {
                continue;
            }
            if mood.is() != BREAKS_OFF {
                let (mut stream, mood) = (raw.stream.try_clone().unwrap(), mood.clone());
                thread::spawn(move || {
                    mood.wait();
                    let _ = stream.write_all(&status(frame.stream, END_STREAM, "200"));
                });
                continue;
            }
            if !stream_by_chance(&mut raw, frame.stream, &mut dice) {
                return;
            }
        }
    })
}

/// Whether the connection goes on.
fn stream_by_chance(raw: &mut Raw, id: u32, dice: &mut Dice) -> bool {
    let data = |flags: u8, size: usize| frames::frame(DATA, flags, id, &vec![b'x'; size]);
    let begun = status(id, 0, "200");
    let bytes = match dice.below(16) {
        0 => frames::reset(id, REFUSED_STREAM),
        1 => frames::reset(id, CANCEL),
        2 => [begun, data(0, 300), frames::reset(id, PROTOCOL_ERROR)].concat(),
        3 => {
            raw.send(&frames::goaway(id.saturating_sub(2), NO_ERROR));
            return dice.one_in(2);
        }
        4 => {
            reset(&raw.stream);
            return false;
        }
        // Nothing, or no more.
        5 => return true,
        6 => [begun, data(0, 300)].concat(),
        7 => [status(id, 0, "103"), status(id, END_STREAM, "200")].concat(),
        8 => status(id, END_STREAM, "503"),
        // Perhaps more than it may.
        9 => [begun, data(0, 16_000), data(0, 16_000)].concat(),
        10 => [status(id, END_STREAM, "200"), frames::reset(id, NO_ERROR)].concat(),
        11 => [begun, data(END_STREAM, 3000)].concat(),
        _ => {
            sleep(dice.millis(20));
            status(id, END_STREAM, "200")
        }
    };
    raw.send(&bytes)
}

fn status(stream: u32, flags: u8, status: &str) -> Vec<u8> {
    let block = frames::block(&[(":status", status)]);
    frames::frame(HEADERS, flags | END_HEADERS, stream, &block)
}

/// Settings of one that takes little, or as much as is usual.
fn window(dice: &mut Dice) -> u32 {
    if dice.one_in(3) { 100 } else { 65_535 }
}

fn path(dice: &mut Dice) -> &'static str {
    ["/one/x", "/two/x"][dice.below(2)]
}

fn client_of_http1(address: SocketAddr, dice: &mut Dice) {
    let mut stream = TcpStream::connect(address).unwrap();
    let patience = Some(dice.millis(400));
    stream.set_read_timeout(patience).unwrap();
    stream.set_write_timeout(patience).unwrap();
    for _ in 0..=dice.below(4) {
        let path = path(dice);
        let put = |fields: &str| format!("PUT {path} HTTP/1.1\r\nHost: x\r\n{fields}");
        let get = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        let request = match dice.below(8) {
            0 => put(&format!("Content-Length: 2000\r\n\r\n{}", "y".repeat(2000))),
            1 => put(&format!(
                "Content-Length: 200000\r\n\r\n{}",
                "y".repeat(200_000)
            )),
            2 => put("Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
            3 => put("Expect: 100-continue\r\nContent-Length: 2000\r\n\r\n"),
            4 => get.replace(
                "x\r\n\r\n",
                "x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
            ),
            5 => get.repeat(2),
            _ => get,
        };
        let sent = match dice.one_in(4) {
            true => dice.below(request.len()),
            false => request.len(),
        };
        if stream.write_all(&request.as_bytes()[..sent]).is_err() {
            break;
        }
        if dice.one_in(3) {
            sleep(dice.millis(60));
            break;
        }
        let mut piece = [0; 1 << 14];
        for _ in 0..dice.below(6) {
            if !matches!(stream.read(&mut piece), Ok(1..)) {
                break;
            }
        }
    }
    if dice.one_in(2) {
        reset(&stream);
    }
}

fn client_of_http2(address: SocketAddr, dice: &mut Dice) {
    let mut raw = Raw::client(address, &[(4, window(dice))]);
    raw.patience(dice.millis(100));
    for nth in 0..=u32::try_from(dice.below(20)).unwrap() {
        let (id, path) = (2 * nth + 1, path(dice));
        let put = |fields: &[(&str, &str)]| frames::request(id, 0, "PUT", path, fields);
        let data = |flags: u8, size: usize| frames::frame(DATA, flags, id, &vec![b'y'; size]);
        let flags = if dice.one_in(2) { END_STREAM } else { 0 };
        let request = match dice.below(4) {
            0 => put(&[("content-length", "3000")]),
            1 => [put(&[]), data(0, 3000), data(flags, 30)].concat(),
            _ => frames::get(id, path),
        };
        if !raw.send(&request) {
            break;
        }
        if dice.one_in(4) {
            let any = dice.below(usize::try_from(nth + 1).unwrap());
            raw.send(&frames::reset(2 * u32::try_from(any).unwrap() + 1, CANCEL));
        }
        for _ in 0..dice.below(5) {
            if raw.next().is_err() {
                break;
            }
        }
    }
    match dice.below(3) {
        0 => reset(&raw.stream),
        1 => {
            raw.send(&frames::goaway(0, NO_ERROR));
            sleep(dice.millis(30));
        }
        _ => {}
    }
}

/// Two upstreams before which a limit has `slots`, with `keys` among those of `concurrency`.
fn configuration(mood: &Arc<Mood>, slots: usize, keys: &str) -> String {
    let of = |start: fn(Arc<Mood>) -> SocketAddr| {
        let [a, b] = [(); 2].map(|()| start(mood.clone()));
        format!(
            "endpoints: ['http://{a}', 'http://{b}'], timeout: 1s, connect_timeout: 200ms, circuit_breaker: b, \
             retries: {{attempts: 2, retry_on: [connect_failure, reset_before_request, reset, timeout, '503'], \
             per_try_timeout: 400ms, methods: [GET, PUT], buffer: 4KiB, budget: {{percent: 100}}}}, \
             concurrency: {{max: {PLACES}, pending: 8, max_connections: 12{keys}}}"
        )
    };
    format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: 300ms, header_read: 500ms, request_read: 1s, keep_alive: 1s}}}}]\n\
         admin: {{address: '127.0.0.1:0'}}\n\
         upstreams:\n\x20 one: {{{}}}\n\x20 two: {{protocol: http2, {}}}\n\
         rate_limits: {{slots: {{limit: {slots}, by: constant, algorithm: concurrency}}}}\n\
         circuit_breakers: {{b: {{minimum_calls: 10, failure_rate: 20%, open_for: 100ms, max_open_for: 200ms, recover_over: 100ms}}}}\n\
         routes:\n\
         \x20 - {{match: {{path: /one/**}}, upstream: one, rate_limits: [slots]}}\n\
         \x20 - {{match: {{path: /two/**}}, upstream: two, rate_limits: [slots]}}\n",
        of(by_http1),
        of(by_http2)
    )
}

fn nothing_is_left(lane: &Lane) {
    const NOTHING: [&str; 4] = [
        "weir_connections_open",
        "weir_upstream_requests_in_flight{upstream=\"one\"}",
        "weir_upstream_requests_in_flight{upstream=\"two\"}",
        "weir_panics_total",
    ];
    eventually_within(PATIENCE, || {
        NOTHING.iter().all(|it| lane.told(it) == Some(0.0))
    });
}

#[test]
fn who_breaks_off_leaves_nothing_behind() {
    // The limit refuses most, or the upstreams' caps do.
    at_once(
        [(2 * PLACES, ""), (1000, ", adaptive: gradient, min: 8")],
        |(slots, keys)| {
            let mood = Arc::<Mood>::default();
            let file = configuration(&mood, slots, keys);
            let lane = Lane::start(&file);
            let is_over = AtomicBool::new(false);
            thread::scope(|scope| {
                let reloads = scope.spawn(|| {
                    for timeout in (1001..1010).cycle() {
                        lane.reload(
                            &file.replace(" timeout: 1s", &format!(" timeout: {timeout}ms")),
                        );
                        sleep(Duration::from_millis(30));
                        if is_over.load(Ordering::SeqCst) {
                            break;
                        }
                    }
                });
                let clients: Vec<_> = (0..CLIENTS)
                    .map(|nth| {
                        let address = lane.address;
                        scope.spawn(move || {
                            let mut dice = Dice::new();
                            for _ in 0..ROUNDS {
                                match nth % 3 {
                                    0 => client_of_http2(address, &mut dice),
                                    _ => client_of_http1(address, &mut dice),
                                }
                            }
                        })
                    })
                    .collect();
                for client in clients {
                    client.join().unwrap();
                }
                is_over.store(true, Ordering::SeqCst);
                reloads.join().unwrap();
            });
            nothing_is_left(&lane);

            mood.set(ANSWERS);
            // However slow the machine is.
            lane.reload(
                &file
                    .replace("timeout: 1s", "timeout: 60s")
                    .replace("400ms", "60s"),
            );
            for (index, path) in ["/one/x", "/two/x"].into_iter().enumerate() {
                eventually_within(PATIENCE, || {
                    let status = lane.connect().get(path).status;
                    let plan = lane.plan.borrow().clone();
                    let breaker = plan.upstreams[index].breaker.as_ref().unwrap();
                    let state = breaker.snapshot(weir::clock::mono()).state;
                    (status, state.as_str()) == (200, "closed")
                });
            }
            nothing_is_left(&lane);
            // As many as may are under way at once.
            mood.set(HOLDS);
            thread::scope(|scope| {
                for nth in 0..2 * PLACES {
                    let lane = &lane;
                    scope.spawn(move || {
                        let reply = lane.connect().get(["/one/x", "/two/x"][nth % 2]);
                        assert_eq!(reply.status, 200, "{reply:?}");
                    });
                }
                eventually_within(PATIENCE, || mood.held.load(Ordering::SeqCst) == 2 * PLACES);
                mood.set(ANSWERS);
            });
            nothing_is_left(&lane);
        },
    );
}
