//! Connections to an upstream that speaks HTTP/2: each carries many requests at once, so a lane needs few. Must not know what is
//! asked.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt as _;
use h2::client::{self, Connection, SendRequest};
use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Mutex, MutexGuard, Notify};
use tokio::time::timeout;

use super::caps::ConnectionPermit;
use super::pool::Connected;
use super::reach::{Stage, Unreached, too_late};
use crate::clock;
use crate::net::gather::{Gathered, gather};
use crate::net::stream::Stream;
use crate::net::tls::Trouble;
use crate::net::window::Window;

/// What an upstream may send of one body before it is taken, in bytes, until its [`Window`] grows.
const STREAM_WINDOW: u32 = 256 * 1024;
/// What it may send of all bodies together: as much as there is (RFC 9113 section 6.9.1). The requests of many clients share a
/// connection, and those that do not read must not take the others' room.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// What its small frames may cost before they are taken, in bytes as `h2` counts them: up to 256 for each. Beyond that the connection ends,
/// for all of its requests; but bodies are taken out of their frames though their clients do not read, so that only a burst comes near to it.
const SMALL_FRAMES: usize = 32 * 1024 * 1024;
/// What waits to be sent of one body, in bytes; capacity is asked for first, so that it is no more than a frame or two.
const SEND_BUFFER: usize = 64 * 1024;

/// Streams that weir has reset and whose late frames are passed over, for a second each: clients may leave in crowds.
const REMEMBERED: usize = 10_000;
/// Frames of streams that were forgotten, over a connection's life, until that ends: each holds up to half a KiB until it is answered.
const FORGOTTEN: usize = 100_000;

/// How many requests a connection takes whose settings are not here.
const UNSETTLED: usize = 0;

/// One lane's connections to one endpoint.
#[derive(Debug, Default)]
pub struct Multiplexed {
    open: RefCell<Vec<Open>>,
    /// Held by who connects, so that others wait for the same connection.
    connecting: Mutex<()>,
    /// When one last failed to come about, and why.
    failed: Cell<Option<(Instant, Unreached)>>,
    /// Whether no other request is to come, but of those that have this one already.
    left: Cell<bool>,
}

/// A connection, as those see it who send requests.
#[derive(Debug)]
struct Open {
    requests: SendRequest<Bytes>,
    usage: Rc<Usage>,
}

impl Open {
    /// Its task has its usage, too.
    fn lives(&self) -> bool {
        Rc::strong_count(&self.usage) > 1
    }
}

/// How a connection is used.
#[derive(Debug)]
struct Usage {
    /// Requests on it.
    requests: Cell<usize>,
    /// When the last one began or ended.
    at: Cell<Instant>,
    /// As [`Connected::old_at`].
    old_at: Duration,
    /// Told when the last request of an old connection has ended.
    unused: Notify,
    /// When something last came of the upstream.
    heard: Rc<Cell<Instant>>,
    /// Told when one of them waited in vain.
    doubted: Notify,
    /// How often it was asked for a sign of life since one of them was answered.
    pings: Cell<u8>,
    /// Whether it gives none, so that no other is to go by it.
    silent: Cell<bool>,
    /// Whether it is to end as if it were old.
    left: Cell<bool>,
    window: Rc<Window>,
    /// Below the cap, where it has one.
    place: RefCell<Option<ConnectionPermit>>,
}

/// How long a connection may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// To begin.
    pub handshake: Duration,
    /// To give a sign of life, once there is a doubt.
    pub answer: Duration,
    /// Without a request, until it is closed.
    pub idle: Duration,
}

/// For how long what was heard of a connection is a sign of life.
const LATELY: Duration = Duration::from_secs(1);
/// How often it is asked for one between two answers: servers of gRPC end a connection for the fourth time.
const PINGS: u8 = 2;

/// A place for one request, until it is dropped.
#[derive(Debug)]
pub struct StreamPermit {
    pub requests: SendRequest<Bytes>,
    /// Whether the connection served a request before: then the upstream may have closed it unseen.
    pub reused: bool,
    begun: Instant,
    usage: Rc<Usage>,
}

impl StreamPermit {
    fn new(requests: SendRequest<Bytes>, reused: bool, usage: &Rc<Usage>) -> StreamPermit {
        let now = clock::now();
        usage.requests.set(usage.requests.get() + 1);
        usage.at.set(now);
        StreamPermit {
            requests,
            reused,
            begun: now,
            usage: usage.clone(),
        }
    }

    /// What of its response may come before it is taken.
    pub fn window(&self) -> Rc<Window> {
        self.usage.window.clone()
    }

    /// The request was answered.
    pub fn answered(&self) {
        self.usage.pings.set(0);
        self.usage.silent.set(false);
    }

    /// The request's body waited in vain to be taken. It may be the connection's room for all of them that is gone, which some servers
    /// never give back where bodies were left unread: others are to go elsewhere.
    pub fn leave(&self) {
        self.usage.left.set(true);
    }

    /// The request waited in vain. Its connection may have gone without a word: it is asked for a sign of life, and left alone where
    /// there is none, or all later requests would wait for it, too. Where it has just given one it is not asked.
    pub fn doubt(&self) {
        let heard = self.usage.heard.get();
        if heard <= self.begun || heard.elapsed() >= LATELY {
            self.usage.doubted.notify_one();
        }
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.usage.requests.set(self.usage.requests.get() - 1);
        self.usage.at.set(clock::now());
        if self.usage.requests.get() == 0 && self.usage.is_old() {
            self.usage.unused.notify_one();
        }
    }
}

impl Usage {
    fn is_old(&self) -> bool {
        self.left.get() || clock::mono() >= self.old_at
    }
}

impl Multiplexed {
    /// The turn to connect.
    pub(super) async fn alone(&self) -> MutexGuard<'_, ()> {
        self.connecting.lock().await
    }

    /// Tells all who wait for a connection that there will be none.
    pub(super) fn note_failed(&self, why: Unreached) {
        self.failed.set(Some((clock::now(), why)));
    }

    /// Why there was none, for who has waited since then.
    pub(super) fn failed_since(&self, began: Instant) -> Option<Unreached> {
        let (_, why) = self.failed.get().filter(|(at, _)| *at >= began)?;
        Some(why)
    }

    /// A place on a connection that was just opened; or why there is none, and in words.
    pub(super) async fn begin(
        &self,
        connected: Connected,
        times: Times,
    ) -> Result<StreamPermit, (Unreached, String)> {
        let Connected {
            stream,
            old_at,
            place: counted,
            ours,
            ..
        } = connected;
        let trouble = Rc::<Cell<Option<Trouble>>>::default();
        let heard = Rc::new(Cell::new(clock::now()));
        let stream = Noting {
            stream,
            trouble: trouble.clone(),
            heard: heard.clone(),
        };
        let (stream, mut sender) = gather(stream);
        let begun = timeout(times.handshake, shake_hands(stream)).await;
        let late = |_| {
            let error = too_late(Stage::Connection, times.handshake);
            (Unreached::from(&error), error.to_string())
        };
        let (requests, mut connection) = begun.map_err(late)?.map_err(|error| {
            let unreached = match trouble.get() {
                Some(trouble) => Unreached::Insecure(trouble),
                None => Unreached::from(&error),
            };
            (unreached, error.to_string())
        })?;
        let usage = Rc::new(Usage {
            requests: Cell::new(0),
            at: Cell::new(clock::now()),
            old_at,
            unused: Notify::new(),
            heard,
            doubted: Notify::new(),
            pings: Cell::new(0),
            silent: Cell::new(false),
            left: Cell::new(false),
            window: Rc::new(Window::new(STREAM_WINDOW)),
            place: RefCell::new(counted.filter(|_| !self.left.get())),
        });
        let place = StreamPermit::new(requests.clone(), false, &usage);
        self.open.borrow_mut().push(Open {
            requests,
            usage: usage.clone(),
        });
        tokio::task::spawn_local(async move {
            let pings = connection.ping_pong();
            let _ours = ours;
            sender.hold(true);
            let mut unused = pin!(unused(&usage, times.idle));
            let mut watched = pin!(watch(&usage, pings, times.answer));
            loop {
                let sends = poll_fn(|cx| {
                    let many = usage.requests.get() > 1;
                    sender.poll_by(cx, many, |cx| Pin::new(&mut connection).poll(cx))
                });
                // Its end, be it good or bad, is seen by the next request that asks for a place.
                tokio::select! {
                    _ = sends => break,
                    () = &mut unused => break,
                    never = &mut watched => match never {},
                    () = usage.window.filled() => {}
                }
                let set = |size| connection.set_initial_window_size(size).is_ok();
                usage.window.grow(set);
            }
            usage.place.take();
        });
        Ok(place)
    }

    /// Its connections end with their requests and take no place any more: others are to be made, and a stream may be long.
    pub(super) fn leave(&self) {
        self.left.set(true);
        for open in &*self.open.borrow() {
            open.usage.place.take();
        }
    }

    /// Closes a connection without requests; whether there was one.
    pub(super) fn close_one(&self) -> bool {
        let mut open = self.open.borrow_mut();
        open.retain(Open::lives);
        let unused = open.iter().position(|open| open.usage.requests.get() == 0);
        // Its task says farewell once no one can send by it.
        unused.map(|at| open.remove(at)).is_some()
    }

    /// Whether a connection is open.
    pub(super) fn is_open(&self) -> bool {
        self.open.borrow().iter().any(Open::lives)
    }

    /// A place on an open connection; those that take no more requests are forgotten, and end with their last one. `takes_old`: old ones
    /// that have some take others, too.
    pub(super) fn free(&self, takes_old: bool) -> Option<StreamPermit> {
        let mut found = None;
        let mut all = self.open.borrow_mut();
        if takes_old {
            // One that takes no bodies is asked last.
            all.sort_by_key(|open| open.usage.left.get());
        }
        all.retain(|open| {
            if found.is_some() {
                return true;
            }
            if open.usage.is_old() && !takes_old {
                return false;
            }
            if open.usage.silent.get() {
                // It may only be slow, which is for those to see who still wait for it.
                return open.usage.requests.get() > 0;
            }
            let mut requests = open.requests.clone();
            match requests.poll_ready(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Err(_)) => false,
                Poll::Ready(Ok(())) => {
                    if open.usage.requests.get() < requests.current_max_send_streams() {
                        found = Some(StreamPermit::new(requests, true, &open.usage));
                    }
                    true
                }
                Poll::Pending => true,
            }
        });
        found
    }
}

/// Notes when the other end was heard, and what TLS has against it, of which h2 keeps no more than words: an upstream by TLS 1.3 that does
/// not like weir's certificate says so behind the handshake.
#[derive(Debug)]
struct Noting<S> {
    stream: S,
    trouble: Rc<Cell<Option<Trouble>>>,
    heard: Rc<Cell<Instant>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Noting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        self.note(&read);
        if buffer.filled().len() > before {
            self.heard.set(clock::now());
        }
        Poll::Ready(read)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Noting<S> {
    fn note<T>(&self, done: &io::Result<T>) {
        if let Some(trouble) = done.as_ref().err().and_then(Trouble::within) {
            self.trouble.set(Some(trouble));
        }
    }

    /// What was said before the other end took no more is still to be read, once the runtime knows of it.
    fn after_write<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(_)) = &written {
            let mut room = [0; 1024];
            loop {
                let mut room = ReadBuf::new(&mut room);
                let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut room));
                self.note(&read);
                if read.is_err() || room.filled().is_empty() {
                    break;
                }
            }
        }
        written
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Noting<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.after_write(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.after_write(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.after_write(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.after_write(cx, shut)
    }
}

/// The connection as requests see it, and as what drives it does, once the upstream has said what it takes.
async fn shake_hands(
    stream: Gathered<Noting<Stream>>,
) -> Result<(SendRequest<Bytes>, Connection<Gathered<Noting<Stream>>>), h2::Error> {
    let mut builder = client::Builder::new();
    let handshake = builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .data_frame_budget(SMALL_FRAMES)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(64 * 1024)
        .max_concurrent_reset_streams(REMEMBERED)
        .max_local_error_reset_streams(Some(FORGOTTEN))
        .enable_push(false)
        .initial_max_send_streams(UNSETTLED)
        .handshake(stream);
    let (requests, mut connection) = handshake.await?;
    settled(&mut connection).await?;
    Ok((requests, connection))
}

/// Waits for the upstream's settings: only they say how many requests it takes at once, and that it speaks HTTP/2 at all.
async fn settled(connection: &mut Connection<Gathered<Noting<Stream>>>) -> Result<(), h2::Error> {
    poll_fn(|cx| {
        let ended = Pin::new(&mut *connection).poll(cx);
        match (connection.max_concurrent_send_streams(), ended) {
            (_, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
            (_, Poll::Ready(Ok(()))) => Poll::Ready(Err(h2::Reason::NO_ERROR.into())),
            (UNSETTLED, Poll::Pending) => Poll::Pending,
            (_, Poll::Pending) => Poll::Ready(Ok(())),
        }
    })
    .await
}

/// Comes back once the connection has had no request for as long as it may be `idle`, or has none and is old.
async fn unused(usage: &Usage, idle: Duration) {
    loop {
        let left = idle.saturating_sub(usage.at.get().elapsed());
        if (left.is_zero() || usage.is_old()) && usage.requests.get() == 0 {
            return;
        }
        let left = left.max(Duration::from_secs(1));
        let _ = timeout(left, usage.unused.notified()).await;
    }
}

/// Asks for a sign of life where there is a doubt, or where it is to be known how long one takes, and notes while there is none
/// `within` this time. Requests under way are left to their own times: an upstream that pauses may answer them yet.
async fn watch(usage: &Usage, pings: Option<PingPong>, within: Duration) -> Infallible {
    let Some(mut pings) = pings else {
        return pending().await;
    };
    loop {
        let doubted = tokio::select! {
            () = usage.doubted.notified() => true,
            () = usage.window.unmeasured() => false,
        };
        let asked = usage.pings.get();
        match doubted {
            true if asked == PINGS => {
                usage.silent.set(true);
                continue;
            }
            true => usage.pings.set(asked + 1),
            false => {}
        }
        let began = clock::now();
        let mut pong = pin!(pings.ping(Ping::opaque()));
        let heard = match timeout(within, pong.as_mut()).await {
            Ok(heard) => heard,
            Err(_) => {
                let doubts = async {
                    if !doubted {
                        usage.doubted.notified().await;
                    }
                    usage.silent.set(true);
                    pending::<Infallible>().await
                };
                tokio::select! {
                    heard = pong.as_mut() => heard,
                    never = doubts => match never {},
                }
            }
        };
        if heard.is_err() {
            // It is over, as its task sees.
            return pending().await;
        }
        usage.silent.set(false);
        usage.window.measured(began.elapsed());
        // Whatever was doubted meanwhile.
        let _ = usage.doubted.notified().now_or_never();
    }
}
