//! Clients and upstreams of HTTP/1.1 and of HTTP/2 under one face, so that one test holds for each pairing. The test plays both
//! ends in one task; whatever waits here is bounded, and fails the test when it is over.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::timeout;

use super::{DEADLINE, runtime};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    One,
    Two,
}

/// Of the client, and of the upstream.
pub const PAIRINGS: [(Version, Version); 4] = [
    (Version::One, Version::One),
    (Version::One, Version::Two),
    (Version::Two, Version::One),
    (Version::Two, Version::Two),
];

impl Version {
    /// As a configuration names it.
    pub fn name(self) -> &'static str {
        match self {
            Version::One => "http1",
            Version::Two => "http2",
        }
    }
}

/// Names in lower case.
pub type Fields = Vec<(String, String)>;

/// The value of the first field of this name.
pub fn field<'f>(fields: &'f Fields, name: &str) -> Option<&'f str> {
    let mut fields = fields.iter();
    let (_, value) = fields.find(|(other, _)| other == name)?;
    Some(value)
}

/// How long a body is said to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// There is none.
    None,
    Known(usize),
    Unknown,
}

/// A body that ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

/// Runs a test's task.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    runtime().block_on(test)
}

/// What is due.
#[track_caller]
pub fn soon<T>(due: impl Future<Output = T>) -> impl Future<Output = T> {
    let at = std::panic::Location::caller();
    async move {
        let waited = timeout(DEADLINE, due).await;
        waited.unwrap_or_else(|_| panic!("nothing came, at {at}"))
    }
}

/// Whether it does not come, for as long as a test watches for what must not.
pub async fn is_quiet<T>(not_due: impl Future<Output = T>) -> bool {
    timeout(Duration::from_millis(300), not_due).await.is_err()
}

/// A body on its way out.
pub enum Outgoing {
    One {
        stream: OwnedWriteHalf,
        chunked: bool,
    },
    Two(SendStream<Bytes>),
    /// The head was its end.
    Ended,
}

impl Outgoing {
    /// Sends data, once there is room for it.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), Broken> {
        match self {
            Outgoing::One { stream, chunked } => {
                let framed = match *chunked {
                    true => [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat(),
                    false => data.to_vec(),
                };
                stream.write_all(&framed).await.map_err(|_| Broken)
            }
            Outgoing::Two(stream) => {
                let mut data = Bytes::copy_from_slice(data);
                while !data.is_empty() {
                    stream.reserve_capacity(data.len());
                    let room = poll_fn(|cx| stream.poll_capacity(cx)).await;
                    let room = room.ok_or(Broken)?.map_err(|_| Broken)?;
                    let part = data.split_to(room.min(data.len()));
                    stream.send_data(part, false).map_err(|_| Broken)?;
                }
                Ok(())
            }
            Outgoing::Ended => panic!("there is no body"),
        }
    }

    /// The end, with these fields behind it. An upstream of HTTP/1.1 closes then; a client does not.
    pub async fn end(&mut self, trailers: &[(&str, &str)]) -> Result<(), Broken> {
        match self {
            Outgoing::One { stream, chunked } => {
                let mut end = String::new();
                if *chunked {
                    end.push_str("0\r\n");
                    for (name, value) in trailers {
                        end.push_str(&format!("{name}: {value}\r\n"));
                    }
                    end.push_str("\r\n");
                }
                stream.write_all(end.as_bytes()).await.map_err(|_| Broken)
            }
            Outgoing::Two(stream) if trailers.is_empty() => {
                stream.send_data(Bytes::new(), true).map_err(|_| Broken)
            }
            Outgoing::Two(stream) => stream.send_trailers(map(trailers)).map_err(|_| Broken),
            Outgoing::Ended => Ok(()),
        }
    }

    /// Data and the end.
    pub async fn finish(&mut self, data: &[u8]) -> Result<(), Broken> {
        if !data.is_empty() {
            self.send(data).await?;
        }
        self.end(&[]).await
    }

    /// Sends until nothing more is taken for a while, or it breaks; how many bytes were taken.
    pub async fn pour(&mut self) -> usize {
        let data = vec![b'x'; 8 * 1024];
        let mut taken = 0;
        while let Ok(Ok(())) = timeout(Duration::from_millis(500), self.send(&data)).await {
            taken += data.len();
        }
        taken
    }

    /// Takes back what was begun.
    pub fn reset(&mut self) {
        match self {
            Outgoing::One { stream, .. } => at_once(stream.as_ref()),
            Outgoing::Two(stream) => stream.send_reset(Reason::CANCEL),
            Outgoing::Ended => {}
        }
    }
}

/// A body on its way in.
pub enum Incoming {
    One {
        stream: Wire,
        framing: Framing,
        trailers: Fields,
    },
    Two(RecvStream),
}

/// What is left of a body of HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Left(usize),
    Chunked,
    UntilClose,
}

impl Incoming {
    /// The next data; `None` at the end.
    pub async fn data(&mut self) -> Result<Option<Bytes>, Broken> {
        soon(self.next()).await
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        match self {
            Incoming::One {
                stream,
                framing,
                trailers,
            } => match framing {
                Framing::Left(0) => Ok(None),
                Framing::Left(left) => {
                    let data = stream.some(*left).await.ok_or(Broken)?;
                    *left -= data.len();
                    Ok(Some(data))
                }
                Framing::UntilClose => Ok(stream.some(usize::MAX).await),
                Framing::Chunked => {
                    let size = stream.line().await.ok_or(Broken)?;
                    let size = usize::from_str_radix(&size, 16).unwrap();
                    if size > 0 {
                        let data = stream.exactly(size + 2).await.ok_or(Broken)?;
                        return Ok(Some(data.slice(..size)));
                    }
                    *trailers = stream.fields().await.ok_or(Broken)?;
                    *framing = Framing::Left(0);
                    Ok(None)
                }
            },
            Incoming::Two(stream) => match stream.data().await {
                Some(Ok(data)) => {
                    stream.flow_control().release_capacity(data.len()).unwrap();
                    Ok(Some(data))
                }
                Some(Err(_)) => Err(Broken),
                None => Ok(None),
            },
        }
    }

    /// All that is left, and the fields behind it.
    pub async fn rest(&mut self) -> Result<(Vec<u8>, Fields), Broken> {
        let mut whole = Vec::new();
        while let Some(data) = self.data().await? {
            whole.extend_from_slice(&data);
        }
        let trailers = match self {
            Incoming::One { trailers, .. } => std::mem::take(trailers),
            Incoming::Two(stream) => {
                let trailers = soon(stream.trailers()).await.map_err(|_| Broken)?;
                list(&trailers.unwrap_or_default())
            }
        };
        Ok((whole, trailers))
    }

    /// The next data, which must be this.
    #[track_caller]
    pub fn expect(&mut self, data: &[u8]) -> impl Future<Output = ()> {
        let at = std::panic::Location::caller();
        async move {
            let mut came = Vec::new();
            while came.len() < data.len() {
                match self.data().await {
                    Ok(Some(more)) => came.extend_from_slice(&more),
                    other => panic!("{other:?} behind {came:?}, at {at}"),
                }
            }
            assert_eq!(came, data, "at {at}");
        }
    }
}

/// A connection of HTTP/1.1, as it is read.
pub struct Wire {
    stream: OwnedReadHalf,
    ahead: Vec<u8>,
}

impl Wire {
    fn new(stream: OwnedReadHalf) -> Wire {
        let ahead = Vec::new();
        Wire { stream, ahead }
    }

    async fn more(&mut self) -> Option<()> {
        let read = self.stream.read_buf(&mut self.ahead).await;
        matches!(read, Ok(1..)).then_some(())
    }

    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.ahead.windows(2).position(|pair| pair == b"\r\n") {
                let line = String::from_utf8_lossy(&self.ahead[..end]).into_owned();
                self.ahead.drain(..end + 2);
                return Some(line);
            }
            self.more().await?;
        }
    }

    async fn fields(&mut self) -> Option<Fields> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(':') else {
                return Some(fields);
            };
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    async fn some(&mut self, at_most: usize) -> Option<Bytes> {
        if self.ahead.is_empty() {
            self.more().await?;
        }
        let end = self.ahead.len().min(at_most);
        Some(self.ahead.drain(..end).collect())
    }

    async fn exactly(&mut self, length: usize) -> Option<Bytes> {
        while self.ahead.len() < length {
            self.more().await?;
        }
        Some(self.ahead.drain(..length).collect())
    }
}

/// One client: its requests share a connection by HTTP/2, and have one each by HTTP/1.1.
pub enum Client {
    One(SocketAddr),
    Two(SendRequest<Bytes>),
}

impl Client {
    pub async fn connect(version: Version, address: SocketAddr) -> Client {
        match version {
            Version::One => Client::One(address),
            Version::Two => {
                let mut settings = h2::client::Builder::new();
                Client::with(settings.initial_connection_window_size(WIDE), address).await
            }
        }
    }

    /// One of HTTP/2, with these settings.
    pub async fn with(settings: &h2::client::Builder, address: SocketAddr) -> Client {
        let stream = soon(narrow(address)).await;
        let (requests, connection) = soon(settings.handshake(stream)).await.unwrap();
        tokio::spawn(connection);
        Client::Two(requests)
    }

    /// Sends the head of a request to the host `test`.
    pub async fn call(
        &mut self,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        length: Length,
    ) -> Call {
        match self {
            Client::One(address) => {
                let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n");
                for (name, value) in fields {
                    head.push_str(&format!("{name}: {value}\r\n"));
                }
                head.push_str(&framing_field(length));
                head.push_str("\r\n");
                let (reading, mut writing) = soon(narrow(*address)).await.into_split();
                soon(writing.write_all(head.as_bytes())).await.unwrap();
                Call {
                    body: Outgoing::One {
                        stream: writing,
                        chunked: length == Length::Unknown,
                    },
                    answers: Answers::One(Wire::new(reading)),
                    by_head: method == "HEAD",
                }
            }
            Client::Two(requests) => {
                let mut request = Request::builder()
                    .method(method)
                    .uri(format!("http://test{path}"));
                for (name, value) in fields {
                    request = request.header(*name, *value);
                }
                if let Length::Known(length) = length {
                    request = request.header("content-length", length);
                }
                let request = request.body(()).unwrap();
                let mut ready = soon(requests.clone().ready()).await.unwrap();
                let ended = length == Length::None;
                let (answer, body) = ready.send_request(request, ended).unwrap();
                Call {
                    body: Outgoing::Two(body),
                    answers: Answers::Two(Box::new(answer)),
                    by_head: method == "HEAD",
                }
            }
        }
    }

    pub async fn get(&mut self, path: &str) -> Call {
        self.call("GET", path, &[], Length::None).await
    }
}

/// A request under way.
pub struct Call {
    pub body: Outgoing,
    answers: Answers,
    by_head: bool,
}

enum Answers {
    One(Wire),
    Two(Box<ResponseFuture>),
}

/// A response.
pub struct Answer {
    pub status: u16,
    pub fields: Fields,
    pub body: Incoming,
    /// Of the request: a client that lets go of it before its end takes it back.
    pub sent: Outgoing,
}

impl Call {
    /// An interim response, which must be the next.
    pub async fn interim(&mut self) -> (u16, Fields) {
        match &mut self.answers {
            Answers::One(stream) => soon(head(stream)).await.unwrap(),
            Answers::Two(response) => {
                let interim = soon(poll_fn(|cx| response.poll_informational(cx))).await;
                let interim = interim.expect("an interim response").unwrap();
                (interim.status().as_u16(), list(interim.headers()))
            }
        }
    }

    /// The response's head.
    pub async fn answer(self) -> Answer {
        self.try_answer().await.expect("a response")
    }

    pub async fn try_answer(self) -> Result<Answer, Broken> {
        match self.answers {
            Answers::One(mut stream) => {
                let (status, fields) = soon(head(&mut stream)).await.ok_or(Broken)?;
                let bodiless = self.by_head || matches!(status, 204 | 304);
                let framing = match framing(&fields) {
                    _ if bodiless => Framing::Left(0),
                    Some(framing) => framing,
                    None => Framing::UntilClose,
                };
                let body = Incoming::One {
                    stream,
                    framing,
                    trailers: Fields::new(),
                };
                Ok(Answer {
                    status,
                    fields,
                    body,
                    sent: self.body,
                })
            }
            Answers::Two(response) => {
                let response = soon(response).await.map_err(|_| Broken)?;
                let (parts, body) = response.into_parts();
                Ok(Answer {
                    status: parts.status.as_u16(),
                    fields: list(&parts.headers),
                    body: Incoming::Two(body),
                    sent: self.body,
                })
            }
        }
    }

    /// The response whole: status and body.
    pub async fn whole(self) -> (u16, String) {
        let mut answer = self.answer().await;
        let (body, _) = answer.body.rest().await.expect("a whole response");
        (answer.status, String::from_utf8(body).unwrap())
    }
}

/// An upstream; the test answers what it is asked.
pub struct Origin {
    pub address: SocketAddr,
    calls: UnboundedReceiver<Asked>,
    opened: Arc<AtomicUsize>,
}

/// A request that came.
pub struct Asked {
    pub method: String,
    pub path: String,
    /// By `Host`, or `:authority`.
    pub host: String,
    pub fields: Fields,
    pub body: Incoming,
    answering: Answering,
    /// The number of the connection that it came by, from 1.
    pub connection: usize,
}

enum Answering {
    One(Option<OwnedWriteHalf>),
    Two(SendResponse<Bytes>),
}

impl Origin {
    pub async fn start(version: Version) -> Origin {
        let mut settings = h2::server::Builder::new();
        Origin::with(version, settings.initial_connection_window_size(WIDE)).await
    }

    /// With what `settings` say of HTTP/2.
    pub async fn with(version: Version, settings: &h2::server::Builder) -> Origin {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        socket2::SockRef::from(&listener)
            .set_recv_buffer_size(NARROW)
            .unwrap();
        let (calls, received) = mpsc::unbounded_channel();
        let opened = Arc::<AtomicUsize>::default();
        let (counted, settings) = (opened.clone(), settings.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let connection = counted.fetch_add(1, Ordering::Relaxed) + 1;
                socket2::SockRef::from(&stream)
                    .set_send_buffer_size(NARROW)
                    .unwrap();
                stream.set_nodelay(true).unwrap();
                let (calls, settings) = (calls.clone(), settings.clone());
                tokio::spawn(async move {
                    match version {
                        Version::One => one(stream, calls, connection).await,
                        Version::Two => two(stream, &settings, calls, connection).await,
                    }
                });
            }
        });
        Origin {
            address,
            calls: received,
            opened,
        }
    }

    /// The next request.
    #[track_caller]
    pub fn asked(&mut self) -> impl Future<Output = Asked> {
        let due = soon(self.calls.recv());
        async { due.await.unwrap() }
    }

    /// Whether no request comes.
    pub async fn is_quiet(&mut self) -> bool {
        is_quiet(self.calls.recv()).await
    }

    /// Connections that came, ever.
    pub fn opened(&self) -> usize {
        self.opened.load(Ordering::Relaxed)
    }
}

async fn one(stream: TcpStream, calls: UnboundedSender<Asked>, connection: usize) {
    let (reading, writing) = stream.into_split();
    let mut stream = Wire::new(reading);
    let Some(line) = stream.line().await else {
        return;
    };
    let Some(fields) = stream.fields().await else {
        return;
    };
    let mut parts = line.split(' ');
    let mut part = || parts.next().unwrap().to_owned();
    let (method, path) = (part(), part());
    let framing = framing(&fields).unwrap_or(Framing::Left(0));
    let asked = Asked {
        method,
        path,
        host: field(&fields, "host").unwrap_or_default().to_owned(),
        fields,
        body: Incoming::One {
            stream,
            framing,
            trailers: Fields::new(),
        },
        answering: Answering::One(Some(writing)),
        connection,
    };
    let _ = calls.send(asked);
}

async fn two(
    stream: TcpStream,
    settings: &h2::server::Builder,
    calls: UnboundedSender<Asked>,
    connection: usize,
) {
    let Ok(mut accepting) = settings.handshake(stream).await else {
        return;
    };
    while let Some(Ok((request, respond))) = accepting.accept().await {
        let (parts, body) = request.into_parts();
        let asked = Asked {
            method: parts.method.to_string(),
            path: parts.uri.path_and_query().unwrap().to_string(),
            host: parts.uri.authority().unwrap().to_string(),
            fields: list(&parts.headers),
            body: Incoming::Two(body),
            answering: Answering::Two(respond),
            connection,
        };
        let _ = calls.send(asked);
    }
}

impl Asked {
    pub async fn interim(&mut self, status: u16, fields: &[(&str, &str)]) {
        match &mut self.answering {
            Answering::One(stream) => {
                let head = response_head(status, fields, "");
                let stream = stream.as_mut().unwrap();
                soon(stream.write_all(head.as_bytes())).await.unwrap();
            }
            Answering::Two(respond) => {
                respond
                    .send_informational(response(status, fields))
                    .unwrap();
            }
        }
    }

    /// Sends the head of the response. The request lives for as long as this does.
    pub async fn reply(
        &mut self,
        status: u16,
        fields: &[(&str, &str)],
        length: Length,
    ) -> Outgoing {
        match &mut self.answering {
            Answering::One(stream) => {
                let said = match length {
                    Length::None if matches!(status, 204 | 304) || self.method == "HEAD" => {
                        String::new()
                    }
                    Length::None => "Content-Length: 0\r\n".to_owned(),
                    Length::Known(_) | Length::Unknown => framing_field(length),
                };
                let head = response_head(status, fields, &format!("{said}Connection: close\r\n"));
                let mut stream = stream.take().unwrap();
                soon(stream.write_all(head.as_bytes())).await.unwrap();
                Outgoing::One {
                    stream,
                    chunked: length == Length::Unknown,
                }
            }
            Answering::Two(respond) => {
                let mut response = response(status, fields);
                if let Length::Known(length) = length {
                    let fields = response.headers_mut();
                    fields.insert("content-length", HeaderValue::from(length));
                }
                let stream = respond.send_response(response, length == Length::None);
                Outgoing::Two(stream.unwrap())
            }
        }
    }

    /// A 200 with this body.
    pub async fn ok(&mut self, body: &str) {
        let mut out = self.reply(200, &[], Length::Known(body.len())).await;
        out.finish(body.as_bytes()).await.unwrap();
    }

    /// Breaks off without an answer, for this reason where it is HTTP/2.
    pub fn reset(&mut self, reason: Reason) {
        match &mut self.answering {
            Answering::One(stream) => at_once(stream.take().unwrap().as_ref()),
            Answering::Two(respond) => respond.send_reset(reason),
        }
    }

    /// Comes back once weir has taken the request back, whose response is `out` where there is one; what still comes of the
    /// request is read away.
    #[track_caller]
    pub fn taken_back(&mut self, out: &mut Outgoing) -> impl Future<Output = ()> {
        let body = &mut self.body;
        let answering = &mut self.answering;
        soon(async move {
            while let Ok(Some(_)) = body.next().await {}
            match (body, answering, out) {
                (Incoming::One { stream, .. }, ..) => while stream.more().await.is_some() {},
                (Incoming::Two(_), _, Outgoing::Two(out)) => {
                    let _ = poll_fn(|cx| out.poll_reset(cx)).await;
                }
                (Incoming::Two(_), Answering::Two(respond), _) => {
                    let _ = poll_fn(|cx| respond.poll_reset(cx)).await;
                }
                (Incoming::Two(_), Answering::One(_), _) => {}
            }
        })
    }
}

/// What a peer takes of all bodies together, so that one that it does not read is no other's trouble.
const WIDE: u32 = 16 * 1024 * 1024;

/// The kernel's room for a socket of a test, in bytes: what waits there is seen by no one.
const NARROW: usize = 32 * 1024;

async fn narrow(address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(NARROW as u32).unwrap();
    socket.set_recv_buffer_size(NARROW as u32).unwrap();
    let stream = socket.connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Makes the close of this connection a reset.
fn at_once(stream: &TcpStream) {
    let stream = socket2::SockRef::from(stream);
    stream.set_linger(Some(Duration::ZERO)).unwrap();
    let _: io::Result<()> = stream.shutdown(std::net::Shutdown::Both);
}

async fn head(stream: &mut Wire) -> Option<(u16, Fields)> {
    let line = stream.line().await?;
    let status = line.split(' ').nth(1)?.parse().ok()?;
    Some((status, stream.fields().await?))
}

fn framing_field(length: Length) -> String {
    match length {
        Length::None => String::new(),
        Length::Known(length) => format!("Content-Length: {length}\r\n"),
        Length::Unknown => "Transfer-Encoding: chunked\r\n".to_owned(),
    }
}

fn framing(fields: &Fields) -> Option<Framing> {
    if field(fields, "transfer-encoding").is_some() {
        return Some(Framing::Chunked);
    }
    let length = field(fields, "content-length")?;
    Some(Framing::Left(length.parse().unwrap()))
}

fn response_head(status: u16, fields: &[(&str, &str)], ours: &str) -> String {
    let mut head = format!("HTTP/1.1 {status} X\r\n");
    for (name, value) in fields {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head + if status < 200 { "" } else { ours } + "\r\n"
}

fn response(status: u16, fields: &[(&str, &str)]) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status.try_into().unwrap();
    *response.headers_mut() = map(fields);
    response
}

fn map(fields: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in fields {
        let name: HeaderName = name.parse().unwrap();
        map.append(name, value.parse().unwrap());
    }
    map
}

fn list(fields: &HeaderMap) -> Fields {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let fields = fields.iter();
    fields
        .map(|(name, value)| (name.as_str().to_owned(), text(value)))
        .collect()
}
