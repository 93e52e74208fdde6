//! Connections to an upstream that speaks HTTP/2: each carries many requests at once, so a lane needs few.

use std::cell::{Cell, RefCell};
use std::future::{pending, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{self, Connection, SendRequest};
use h2::{Ping, PingPong};
use tokio::sync::{Mutex, Notify};
use tokio::time::{sleep, timeout};

use super::pool::{Connected, Unreached};
use crate::clock;
use crate::net::stream::Stream;

/// What an upstream may send of one body before it is taken, in bytes.
const STREAM_WINDOW: u32 = 256 * 1024;
/// What it may send of all bodies together.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// What waits to be sent of one body, in bytes; capacity is asked for first, so that it is no more than a frame or two.
const SEND_BUFFER: usize = 64 * 1024;

/// How many requests a connection takes whose settings are not here.
const UNSETTLED: usize = 0;

/// One lane's connections to one endpoint.
#[derive(Debug, Default)]
pub struct Multiplexed {
    open: RefCell<Vec<Open>>,
    /// Held by who connects, so that others wait for the same connection.
    connecting: Mutex<()>,
}

/// A connection, as those see it who send requests.
#[derive(Debug)]
struct Open {
    requests: SendRequest<Bytes>,
    usage: Rc<Usage>,
}

/// How a connection is used.
#[derive(Debug)]
struct Usage {
    /// Requests on it.
    requests: Cell<usize>,
    /// When the last one began or ended.
    at: Cell<Instant>,
    /// Told when one of them waited in vain.
    doubted: Notify,
}

/// A place for one request, until it is dropped.
#[derive(Debug)]
pub struct Place {
    pub requests: SendRequest<Bytes>,
    /// Whether the connection served a request before: then the upstream may have closed it unseen.
    pub reused: bool,
    usage: Rc<Usage>,
}

impl Place {
    fn new(requests: SendRequest<Bytes>, reused: bool, usage: &Rc<Usage>) -> Place {
        usage.requests.set(usage.requests.get() + 1);
        usage.at.set(clock::now());
        Place {
            requests,
            reused,
            usage: usage.clone(),
        }
    }

    /// The request waited in vain. Its connection may have gone without a word: it is asked for a sign of life, and given up where
    /// there is none, or all later requests would wait for it, too.
    pub fn doubt(&self) {
        self.usage.doubted.notify_one();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.usage.requests.set(self.usage.requests.get() - 1);
        self.usage.at.set(clock::now());
    }
}

impl Multiplexed {
    /// A place on a connection that has one, or on a new one, which `connect` opens; connections that no request uses are kept for
    /// `idle_timeout`.
    pub async fn place(
        &self,
        connect: impl AsyncFn() -> Result<Connected, Unreached>,
        within: Duration,
        idle_timeout: Duration,
    ) -> Result<Place, Unreached> {
        if let Some(place) = self.free() {
            return Ok(place);
        }
        // No longer than who connects may take: one that cannot be reached is not waited for by one after the other.
        let alone = timeout(2 * within, self.connecting.lock()).await;
        let _alone = alone.map_err(io::Error::from)?;
        if let Some(place) = self.free() {
            return Ok(place);
        }
        let connected = connect().await?;
        Ok(self.begin(connected, within, idle_timeout).await?)
    }

    /// As [`Multiplexed::place`], on a connection that is open already.
    async fn begin(
        &self,
        connected: Connected,
        within: Duration,
        idle_timeout: Duration,
    ) -> io::Result<Place> {
        let Connected {
            stream,
            place: counted,
            ours,
            ..
        } = connected;
        let handshake = async {
            let mut builder = client::Builder::new();
            let handshake = builder
                .initial_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_send_buffer_size(SEND_BUFFER)
                .max_header_list_size(64 * 1024)
                .enable_push(false)
                .initial_max_send_streams(UNSETTLED)
                .handshake(stream);
            let (requests, mut connection) = handshake.await?;
            settled(&mut connection).await?;
            Ok((requests, connection))
        };
        let (requests, mut connection) = timeout(within, handshake)
            .await?
            .map_err(|error: h2::Error| io::Error::other(error))?;
        let usage = Rc::new(Usage {
            requests: Cell::new(0),
            at: Cell::new(clock::now()),
            doubted: Notify::new(),
        });
        let place = Place::new(requests.clone(), false, &usage);
        self.open.borrow_mut().push(Open {
            requests,
            usage: usage.clone(),
        });
        tokio::task::spawn_local(async move {
            let pings = connection.ping_pong();
            let unused = async {
                loop {
                    let since = usage.at.get().elapsed();
                    if since >= idle_timeout && usage.requests.get() == 0 {
                        return;
                    }
                    sleep(
                        idle_timeout
                            .saturating_sub(since)
                            .max(Duration::from_secs(1)),
                    )
                    .await;
                }
            };
            let _counted = (counted, ours);
            // Its end, be it good or bad, is seen by the next request that asks for a place.
            tokio::select! {
                _ = connection => {}
                () = unused => {}
                () = silent(&usage.doubted, pings, within) => {}
            }
        });
        Ok(place)
    }

    /// A place on an open connection; those that take no more requests are forgotten.
    fn free(&self) -> Option<Place> {
        let mut found = None;
        self.open.borrow_mut().retain(|open| {
            if found.is_some() {
                return true;
            }
            let mut requests = open.requests.clone();
            match requests.poll_ready(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Err(_)) => false,
                Poll::Ready(Ok(())) => {
                    if open.usage.requests.get() < requests.current_max_send_streams() {
                        found = Some(Place::new(requests, true, &open.usage));
                    }
                    true
                }
                Poll::Pending => true,
            }
        });
        found
    }
}

/// Waits for the upstream's settings: only they say how many requests it takes at once, and that it speaks HTTP/2 at all.
async fn settled(connection: &mut Connection<Stream>) -> Result<(), h2::Error> {
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

/// Comes back once a doubt is confirmed: no answer to a ping `within` this time.
async fn silent(doubted: &Notify, pings: Option<PingPong>, within: Duration) {
    let Some(mut pings) = pings else {
        return pending().await;
    };
    loop {
        doubted.notified().await;
        match timeout(within, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
