//! Raw sockets: upstreams that follow a script or keep every byte, and a client that sends what it likes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::DEADLINE;

/// An upstream that keeps every byte it is sent and answers a request with a 200 once it is whole.
pub struct Recorder {
    pub address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    whole: Vec<String>,
}

impl Recorder {
    pub fn start() -> Recorder {
        let seen = Arc::<Mutex<Seen>>::default();
        let kept = seen.clone();
        let address = scripted(move |mut stream| {
            let mut request = Vec::new();
            while read_more(&mut stream, &mut request, &kept) {
                if is_whole(&request) {
                    let text = String::from_utf8_lossy(&request).into_owned();
                    kept.lock().unwrap().whole.push(text);
                    request.clear();
                    let _ = stream.write_all(super::ok("served").as_bytes());
                }
            }
        });
        Recorder { address, seen }
    }

    /// Everything that came, over all connections.
    pub fn bytes(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap().bytes).into_owned()
    }

    /// The requests that came whole.
    pub fn whole(&self) -> Vec<String> {
        self.seen.lock().unwrap().whole.clone()
    }
}

fn read_more(stream: &mut TcpStream, request: &mut Vec<u8>, kept: &Mutex<Seen>) -> bool {
    let mut piece = [0; 4096];
    match stream.read(&mut piece) {
        Ok(0) | Err(_) => false,
        Ok(n) => {
            request.extend_from_slice(&piece[..n]);
            kept.lock().unwrap().bytes.extend_from_slice(&piece[..n]);
            true
        }
    }
}

/// Whether weir's own framing says that the request ends here.
fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).into_owned();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let head = head.to_ascii_lowercase();
    match head.split_once("\r\ncontent-length: ") {
        Some((_, rest)) => {
            let length = rest.lines().next().unwrap().parse::<usize>();
            body.len() >= length.unwrap()
        }
        None if head.contains("\r\ntransfer-encoding: chunked") => {
            body == "0\r\n\r\n" || body.ends_with("\r\n0\r\n\r\n")
        }
        None => true,
    }
}

/// An upstream that gives each of its connections to `script`.
pub fn scripted(script: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let script = Arc::new(script);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, script) = (stream.unwrap(), script.clone());
            thread::spawn(move || script(stream));
        }
    });
    address
}

/// An address that answers no attempt to connect, neither with yes nor with no: its queue is full.
pub struct Silent {
    pub address: SocketAddr,
    _listener: Socket,
    _waiting: Vec<Socket>,
}

impl Silent {
    pub fn new() -> Silent {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        listener.bind(&any.into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        // Linux queues one more than it is told to; what comes after is on its way for ever.
        let waiting = (0..3).map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&address);
            socket
        });
        Silent {
            _waiting: waiting.collect(),
            address: address.as_socket().unwrap(),
            _listener: listener,
        }
    }
}

/// A network between a client and a server whose answers come late.
pub struct SlowNetwork {
    pub address: SocketAddr,
    /// How late, in milliseconds.
    pub late: Arc<AtomicU64>,
}

impl SlowNetwork {
    pub fn to(server: SocketAddr) -> SlowNetwork {
        let late = Arc::<AtomicU64>::default();
        let by = late.clone();
        let address = scripted(move |mut client| {
            let Ok(mut server) = TcpStream::connect(server) else {
                return;
            };
            let (mut up, mut requests) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut requests, &mut up);
                let _ = up.shutdown(Shutdown::Write);
            });
            let mut piece = [0; 16 * 1024];
            while let Ok(n @ 1..) = server.read(&mut piece) {
                thread::sleep(Duration::from_millis(by.load(Ordering::Relaxed)));
                if client.write_all(&piece[..n]).is_err() {
                    return;
                }
            }
        });
        SlowNetwork { address, late }
    }
}

/// Reads a head to its end; `None` when there is none.
pub fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1..) => head.push(byte[0]),
            Ok(0) | Err(_) => return None,
        }
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

/// What came back until the connection ended.
#[derive(Debug)]
pub struct Wire {
    pub text: String,
    pub end: End,
}

/// How a connection ended, as the client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Closed,
    Reset,
    /// Nothing came for as long as a test waits.
    Hung,
}

impl Wire {
    pub fn status(&self) -> Option<u16> {
        let rest = self.text.strip_prefix("HTTP/1.1 ")?;
        rest.get(..3)?.parse().ok()
    }

    /// The head with its empty line, and what follows.
    pub fn parts(&self) -> (&str, &str) {
        let end = self.text.find("\r\n\r\n").map_or(0, |at| at + 4);
        self.text.split_at(end)
    }

    /// The number of replies in it.
    pub fn replies(&self) -> usize {
        self.text.matches("HTTP/1.1 ").count()
    }
}

/// Sends `bytes` and reads until the connection ends.
pub fn send(address: SocketAddr, bytes: &[u8]) -> Wire {
    let mut stream = TcpStream::connect(address).unwrap();
    // The other side may refuse before it has read everything.
    let _ = stream.write_all(bytes);
    read_to_end(&mut stream)
}

pub fn read_to_end(stream: &mut TcpStream) -> Wire {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut bytes = Vec::new();
    let end = match stream.read_to_end(&mut bytes) {
        Ok(_) => End::Closed,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            End::Hung
        }
        Err(_) => End::Reset,
    };
    Wire {
        text: String::from_utf8_lossy(&bytes).into_owned(),
        end,
    }
}

/// The data of chunks that weir wrote, with their last, and the trailers behind it.
pub fn unchunk(mut wire: &str) -> (String, &str) {
    let mut data = String::new();
    loop {
        let (size, rest) = wire.split_once("\r\n").unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        data.push_str(&rest[..size]);
        if size == 0 {
            return (data, rest.strip_suffix("\r\n").unwrap());
        }
        wire = rest[size..].strip_prefix("\r\n").unwrap();
    }
}
