//! Large bodies, handshakes and requests sent ahead on a lane, and small requests beside them.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::harness::process::{Running, file};
use super::harness::raw::{read_head, scripted};
use super::harness::tls::{Authority, Tls};
use super::harness::{Lane, eventually};

const LARGE: usize = 16;
const PIECE: usize = 64 * 1024;
/// Bytes of all large bodies together within a turn of the lane, and more in the time that a client takes to see its answer.
const FEW: usize = 3 * 1024 * 1024;

#[derive(Debug, Clone, Copy)]
enum Large {
    Download,
    Upload,
    /// What is sent down once both sides speak another protocol.
    Relayed,
}

/// Sends for ever.
fn pour(stream: &mut TcpStream) {
    while stream.write_all(&[b'a'; PIECE]).is_ok() {}
}

/// Reads for ever.
fn drain(stream: &mut TcpStream, moved: &AtomicUsize) {
    let mut piece = vec![0; PIECE];
    while let Ok(read @ 1..) = stream.read(&mut piece) {
        moved.fetch_add(read, Ordering::Relaxed);
    }
}

fn upstream(moved: Arc<AtomicUsize>) -> SocketAddr {
    scripted(move |mut stream| {
        let Some(head) = read_head(&mut stream) else {
            return;
        };
        let reply = match head.split(' ').next() {
            Some("POST") => return drain(&mut stream, &moved),
            _ if head.contains("pgrade: x") => {
                "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
            }
            _ => "HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n",
        };
        let _ = stream.write_all(reply.as_bytes());
        pour(&mut stream);
    })
}

#[test]
fn small_requests_have_their_turn_beside_downloads() {
    small_beside(Large::Download);
}

#[test]
fn small_requests_have_their_turn_beside_uploads() {
    small_beside(Large::Upload);
}

#[test]
fn small_requests_have_their_turn_beside_what_is_relayed() {
    small_beside(Large::Relayed);
}

fn small_beside(large: Large) {
    let moved = Arc::<AtomicUsize>::default();
    let lane = Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', limits: {{max_body: 1000GB}}}}]\n\
             upstreams: {{app: {{endpoints: ['http://{}']}}}}\n\
             routes:\n  - {{match: {{path: /small}}, reply: {{status: 200, body: ok}}}}\n  - {{upstream: app}}\n",
        upstream(moved.clone())
    ));
    let clients: Vec<TcpStream> = (0..LARGE)
        .map(|_| {
            let mut stream = TcpStream::connect(lane.address).unwrap();
            let head = match large {
                Large::Download => "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
                Large::Upload => {
                    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n"
                }
                Large::Relayed => {
                    "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
                }
            };
            stream.write_all(head.as_bytes()).unwrap();
            let (mut ours, moved) = (stream.try_clone().unwrap(), moved.clone());
            thread::spawn(move || match large {
                Large::Upload => pour(&mut ours),
                Large::Download | Large::Relayed => drain(&mut ours, &moved),
            });
            stream
        })
        .collect();
    eventually(|| moved.load(Ordering::Relaxed) > LARGE * 4 * FEW);
    let meanwhile = moved_beside_small_requests(&lane, &moved);
    for client in clients {
        let _ = client.shutdown(Shutdown::Both);
    }
    let quarter = meanwhile[meanwhile.len() / 4];
    assert!(quarter < FEW, "{large:?}: {meanwhile:?}");
}

/// What others have moved while each of 50 small requests was answered, the least first.
fn moved_beside_small_requests(lane: &Lane, moved: &AtomicUsize) -> Vec<usize> {
    let mut client = lane.connect();
    let mut meanwhile: Vec<usize> = (0..50)
        .map(|_| {
            let before = moved.load(Ordering::Relaxed);
            assert_eq!(client.get("/small").status, 200);
            moved.load(Ordering::Relaxed) - before
        })
        .collect();
    meanwhile.sort_unstable();
    meanwhile
}

/// Clients that say hello at once.
const GREETED: usize = 256;

/// Each costs the lane as much as dozens of small requests.
#[test]
fn small_requests_have_their_turn_beside_handshakes() {
    small_beside_greetings(false);
}

/// A client's certificate comes behind that.
#[test]
fn small_requests_have_their_turn_beside_certificates() {
    small_beside_greetings(true);
}

/// What a client says once it was answered, with its certificate.
fn proof(tls: &Tls, stream: &mut TcpStream) -> Vec<u8> {
    let mut connection = tls.begin("a.test");
    while !connection.wants_write() || connection.is_handshaking() {
        let mut hello = Vec::new();
        if connection.wants_write() {
            connection.write_tls(&mut hello).unwrap();
            stream.write_all(&hello).unwrap();
        }
        connection.read_tls(stream).unwrap();
        connection.process_new_packets().unwrap();
    }
    let mut proof = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut proof).unwrap();
    }
    proof
}

/// Beside clients that say hello at once, or else prove at once who they are.
fn small_beside_greetings(prove: bool) {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    let config = file(&format!(
        "listeners: [{{address: '127.0.0.1:0', tls: {{certificates: [{}], client_ca: '{}', client_auth: optional}}}}]\n\
         admin: {{address: '127.0.0.1:0'}}\nruntime: {{lanes: 1}}\n\
         upstreams: {{app: {{endpoints: ['http://127.0.0.1:1']}}}}\n\
         routes:\n  - {{match: {{path: /small}}, reply: {{status: 200, body: ok}}}}\n  - {{upstream: app}}\n",
        authority.pair("a"),
        authority.path("ca.crt").display()
    ));
    let weir = Running::start_as("proxy", config.path(), &[]);
    let tls = authority.client();
    let showing = authority.client_showing(&authority, "a");
    let mut client = tls.connect(&weir.address, "a.test");
    assert_eq!(client.get("/small").status, 200);
    let mut meanwhile: Vec<usize> = (0..8)
        .map(|_| {
            eventually(|| weir.metric("weir_connections_open") == 1);
            let connect = |_| TcpStream::connect(&weir.address).unwrap();
            let mut greeted: Vec<_> = (0..GREETED).map(connect).collect();
            eventually(|| weir.metric("weir_connections_open") == 1 + GREETED as u64);
            let hello = tls.hello("a.test");
            let say = |stream: &mut TcpStream| match prove {
                true => proof(&showing, stream),
                false => hello.clone(),
            };
            let said: Vec<_> = greeted.iter_mut().map(say).collect();
            for (mut stream, said) in greeted.iter().zip(&said) {
                stream.write_all(said).unwrap();
            }
            assert_eq!(client.get("/small").status, 200);
            let is_answered = |stream: &&TcpStream| {
                stream.set_nonblocking(true).unwrap();
                stream.peek(&mut [0]).is_ok()
            };
            greeted.iter().filter(is_answered).count()
        })
        .collect();
    meanwhile.sort_unstable();
    let quarter = meanwhile[meanwhile.len() / 4];
    assert!(quarter < GREETED / 4, "{meanwhile:?}");
}

/// Clients that ask ahead.
const AHEAD: usize = 64;
/// Bytes of answers to all of them, within two turns of the lane, and more in the time that a client takes to see its answer.
const FEW_ANSWERS: usize = AHEAD * 4 * 1024;

#[test]
fn small_requests_have_their_turn_beside_those_that_are_sent_ahead() {
    let lane = Lane::start(
        "listeners: [{address: '127.0.0.1:0'}]\nupstreams: {app: {endpoints: ['http://127.0.0.1:1']}}\n\
         routes:\n  - {match: {path: /small}, reply: {status: 200, body: ok}}\n  - {upstream: app}\n",
    );
    let moved = Arc::<AtomicUsize>::default();
    let clients: Vec<TcpStream> = (0..AHEAD)
        .map(|_| {
            let stream = TcpStream::connect(lane.address).unwrap();
            let (mut asks, mut hears) = (stream.try_clone().unwrap(), stream.try_clone().unwrap());
            let moved = moved.clone();
            thread::spawn(move || drain(&mut hears, &moved));
            thread::spawn(move || {
                let ahead = b"GET /small HTTP/1.1\r\nHost: a\r\n\r\n".repeat(1_000);
                while asks.write_all(&ahead).is_ok() {}
            });
            stream
        })
        .collect();
    eventually(|| moved.load(Ordering::Relaxed) > 16 * FEW_ANSWERS);
    let meanwhile = moved_beside_small_requests(&lane, &moved);
    for client in clients {
        let _ = client.shutdown(Shutdown::Both);
    }
    let quarter = meanwhile[meanwhile.len() / 4];
    assert!(quarter < FEW_ANSWERS, "{meanwhile:?}");
}
