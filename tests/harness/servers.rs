//! Endpoints that come and go, and a name server that says which there are.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::iter;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use socket2::{Domain, Socket, Type};
use uuid::Uuid;

use super::raw::read_head;

/// A port of the loopback that is kept while nobody listens there: one that is only free would be the next one's who asks for any.
pub struct Kept {
    pub address: SocketAddr,
    _socket: Socket,
}

impl Kept {
    pub fn new() -> Kept {
        Kept::at((Ipv4Addr::LOCALHOST, 0).into()).unwrap()
    }

    fn at(address: SocketAddr) -> io::Result<Kept> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // So that one of the test's own may listen beside it.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        let address = socket.local_addr()?.as_socket().expect("an address of IP");
        Ok(Kept {
            address,
            _socket: socket,
        })
    }

    fn listen(&self) -> io::Result<TcpListener> {
        TcpListener::bind(self.address)
    }
}

/// A server that answers each request with its own address, until it is killed.
pub struct Server {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    address: SocketAddr,
    kept: Kept,
    /// What requests are answered with; those for `/healthz` by `health`.
    status: AtomicU16,
    health: AtomicU16,
    requests: AtomicUsize,
    checks: AtomicUsize,
    connections: AtomicUsize,
    dead: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
    listening: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    pub fn start() -> Server {
        Server::on(Kept::new()).unwrap()
    }

    /// So many, each on an address of its own of 127.0.0.0/8, and all on one port.
    pub fn on_one_port<const N: usize>() -> [Server; N] {
        loop {
            let bind = |last, port| Kept::at((Ipv4Addr::new(127, 0, 0, last), port).into());
            let first = bind(2, 0).unwrap();
            let port = first.address.port();
            let others = (3u8..).take(N - 1).map(|last| bind(last, port));
            let all = iter::once(Ok(first)).chain(others);
            // Another program may have the port on one of them.
            let all = all.map(|kept| kept.and_then(Server::on));
            if let Ok(all) = all.collect::<io::Result<Vec<_>>>() {
                return all.try_into().ok().unwrap();
            }
        }
    }

    fn on(kept: Kept) -> io::Result<Server> {
        let (listener, address) = (kept.listen()?, kept.address);
        let shared = Arc::new(Shared {
            address,
            kept,
            status: AtomicU16::new(200),
            health: AtomicU16::new(200),
            requests: AtomicUsize::new(0),
            checks: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            dead: AtomicBool::new(false),
            open: Mutex::default(),
            listening: Mutex::default(),
        });
        shared.clone().listen(listener);
        Ok(Server { address, shared })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn ip(&self) -> IpAddr {
        self.address.ip()
    }

    pub fn answers(&self, status: u16) {
        self.shared.status.store(status, Ordering::Relaxed);
    }

    pub fn says_of_its_health(&self, status: u16) {
        self.shared.health.store(status, Ordering::Relaxed);
    }

    /// Requests that came, but for checks.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::Relaxed)
    }

    pub fn checks(&self) -> usize {
        self.shared.checks.load(Ordering::Relaxed)
    }

    /// Connections that were ever opened.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Refuses connections from now on, and resets those that are open.
    pub fn kill(&self) {
        self.shared.dead.store(true, Ordering::SeqCst);
        if let Some(listening) = self.shared.listening.lock().unwrap().take() {
            // Wakes it, and it goes.
            let _ = TcpStream::connect(self.address);
            listening.join().unwrap();
        }
        for stream in self.shared.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Serves again, on its address.
    pub fn revive(&self) {
        self.shared.dead.store(false, Ordering::SeqCst);
        let listener = self.shared.kept.listen().unwrap();
        self.shared.clone().listen(listener);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Shared {
    fn listen(self: Arc<Self>, listener: TcpListener) {
        let shared = self.clone();
        let listening = thread::spawn(move || {
            for stream in listener.incoming() {
                if self.dead.load(Ordering::SeqCst) {
                    return;
                }
                let (stream, shared) = (stream.unwrap(), self.clone());
                let kept = stream.try_clone().unwrap();
                self.open.lock().unwrap().push(kept);
                thread::spawn(move || shared.serve(stream));
            }
        });
        *shared.listening.lock().unwrap() = Some(listening);
    }

    fn serve(&self, mut stream: TcpStream) {
        self.connections.fetch_add(1, Ordering::Relaxed);
        while let Some(head) = read_head(&mut stream) {
            let (count, status) = match head.starts_with("GET /healthz ") {
                true => (&self.checks, &self.health),
                false => (&self.requests, &self.status),
            };
            count.fetch_add(1, Ordering::Relaxed);
            let (status, body) = (status.load(Ordering::Relaxed), self.address.to_string());
            let length = body.len();
            let reply = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n{body}");
            if stream.write_all(reply.as_bytes()).is_err() {
                return;
            }
        }
    }
}

/// A name server for A and AAAA records, over UDP.
pub struct NameServer {
    pub address: SocketAddr,
    names: Arc<Mutex<BTreeMap<String, Answer>>>,
    pub asked: Arc<AtomicUsize>,
}

#[derive(Clone)]
enum Answer {
    Addresses(Vec<IpAddr>, u32),
    ServerFailure,
    /// Of IPv4 alone.
    HalfFailure(Vec<IpAddr>),
    Silence,
}

impl NameServer {
    pub fn start() -> NameServer {
        NameServer::on(UdpSocket::bind("127.0.0.1:0").unwrap())
    }

    /// One that a resolv.conf can name: at the port of DNS, on an address of its own.
    pub fn on_port_53() -> NameServer {
        loop {
            let [a, b, c, _] = Uuid::new_v4().into_bytes()[..4] else {
                unreachable!("as many as were taken")
            };
            let address = Ipv4Addr::new(127, a, b, c.clamp(1, 254));
            match UdpSocket::bind((address, 53)) {
                Ok(socket) => return NameServer::on(socket),
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                Err(error) => panic!("{address}:53: {error}; these tests must run as root"),
            }
        }
    }

    fn on(socket: UdpSocket) -> NameServer {
        let server = NameServer {
            address: socket.local_addr().unwrap(),
            names: Arc::default(),
            asked: Arc::default(),
        };
        let (names, asked) = (server.names.clone(), server.asked.clone());
        thread::spawn(move || {
            let mut query = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut query) {
                let reply = reply(&query[..length], &names.lock().unwrap());
                asked.fetch_add(1, Ordering::Relaxed);
                if let Some(reply) = reply {
                    socket.send_to(&reply, from).unwrap();
                }
            }
        });
        server
    }

    /// The name has these addresses, for so many seconds.
    pub fn says(&self, name: &str, addresses: &[IpAddr], ttl: u32) {
        let answer = Answer::Addresses(addresses.to_vec(), ttl);
        self.names.lock().unwrap().insert(name.to_owned(), answer);
    }

    /// NXDOMAIN from here on.
    pub fn forgets(&self, name: &str) {
        self.names.lock().unwrap().remove(name);
    }

    pub fn fails(&self, name: &str) {
        let mut names = self.names.lock().unwrap();
        names.insert(name.to_owned(), Answer::ServerFailure);
    }

    /// For IPv4, where these are its other addresses.
    pub fn fails_for_ipv4(&self, name: &str, addresses: &[IpAddr]) {
        let answer = Answer::HalfFailure(addresses.to_vec());
        self.names.lock().unwrap().insert(name.to_owned(), answer);
    }

    /// Who asks for the name waits in vain.
    pub fn hangs(&self, name: &str) {
        let mut names = self.names.lock().unwrap();
        names.insert(name.to_owned(), Answer::Silence);
    }

    /// Commands by which a process in mounts of its own asks this one alone.
    pub fn mounted(&self) -> String {
        let line = format!("nameserver {}", self.address.ip());
        mounted("/etc/resolv.conf", &[&line])
    }
}

/// Commands by which a process in mounts of its own finds these lines in this file.
pub fn mounted(path: &str, lines: &[&str]) -> String {
    let lines: Vec<_> = lines.iter().map(|line| format!("'{line}'")).collect();
    let lines = lines.join(" ");
    format!("f=$(mktemp); printf '%s\\n' {lines} > $f; touch {path}; mount --bind $f {path}; rm $f")
}

/// RFC 1035, section 4; `None` for silence.
fn reply(query: &[u8], names: &BTreeMap<String, Answer>) -> Option<Vec<u8>> {
    let mut name = Vec::new();
    let mut at = 12;
    while query[at] > 0 {
        let label = &query[at + 1..=at + query[at] as usize];
        name.push(String::from_utf8_lossy(label).to_lowercase());
        at += label.len() + 1;
    }
    let question = &query[12..at + 5];
    let kind = query[at + 2];
    let of_kind = |address: &&IpAddr| kind == if address.is_ipv4() { 1 } else { 28 };
    let (code, addresses, ttl) = match names.get(&name.join(".")) {
        None => (3, &[][..], 0),
        Some(Answer::ServerFailure) => (2, &[][..], 0),
        Some(Answer::HalfFailure(_)) if kind == 1 => (2, &[][..], 0),
        Some(Answer::HalfFailure(addresses)) => (0, addresses.as_slice(), 0),
        Some(Answer::Silence) => return None,
        Some(Answer::Addresses(addresses, ttl)) => (0, addresses.as_slice(), *ttl),
    };
    let addresses: Vec<_> = addresses.iter().filter(of_kind).collect();
    let mut reply = query[..2].to_vec();
    // An answer, to a question that may be asked of others, by one that would.
    reply.extend([
        0x81,
        0x80 | code,
        0,
        1,
        0,
        addresses.len() as u8,
        0,
        0,
        0,
        0,
    ]);
    reply.extend(question);
    for address in addresses {
        // The name of the question, its kind, IN.
        reply.extend([0xc0, 12, 0, kind, 0, 1]);
        reply.extend(ttl.to_be_bytes());
        match address {
            IpAddr::V4(address) => reply.extend([&[0, 4], &address.octets()[..]].concat()),
            IpAddr::V6(address) => reply.extend([&[0, 16], &address.octets()[..]].concat()),
        }
    }
    Some(reply)
}
