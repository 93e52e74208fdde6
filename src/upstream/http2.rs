//! Connections to an upstream that speaks HTTP/2: each carries many requests at once, so a lane needs few.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{self, SendRequest};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::pool::{Connected, Unreached};
use crate::clock;

/// What an upstream may send of one body before it is taken, in bytes.
const STREAM_WINDOW: u32 = 256 * 1024;
/// What it may send of all bodies together.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// What waits to be sent of one body, in bytes; capacity is asked for first, so that it is no more than a frame or two.
const SEND_BUFFER: usize = 64 * 1024;

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
    use_: Rc<Use>,
}

/// How a connection is used.
#[derive(Debug)]
struct Use {
    /// Requests on it.
    requests: Cell<usize>,
    /// When the last one began or ended.
    at: Cell<Instant>,
}

/// A place for one request, until it is dropped.
#[derive(Debug)]
pub struct Place {
    pub requests: SendRequest<Bytes>,
    /// Whether the connection served a request before: then the upstream may have closed it unseen.
    pub reused: bool,
    use_: Rc<Use>,
}

impl Place {
    fn new(requests: SendRequest<Bytes>, reused: bool, use_: &Rc<Use>) -> Place {
        use_.requests.set(use_.requests.get() + 1);
        use_.at.set(clock::now());
        Place {
            requests,
            reused,
            use_: use_.clone(),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.use_.requests.set(self.use_.requests.get() - 1);
        self.use_.at.set(clock::now());
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
        let _alone = self.connecting.lock().await;
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
            ..
        } = connected;
        let handshake = client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buffer_size(SEND_BUFFER)
            .max_header_list_size(64 * 1024)
            .enable_push(false)
            .handshake(stream);
        let (requests, connection) = timeout(within, handshake)
            .await?
            .map_err(io::Error::other)?;
        let use_ = Rc::new(Use {
            requests: Cell::new(0),
            at: Cell::new(clock::now()),
        });
        let place = Place::new(requests.clone(), false, &use_);
        self.open.borrow_mut().push(Open {
            requests,
            use_: use_.clone(),
        });
        tokio::task::spawn_local(async move {
            let unused = async {
                loop {
                    let since = use_.at.get().elapsed();
                    if since >= idle_timeout && use_.requests.get() == 0 {
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
            let _counted = counted;
            // Its end, be it good or bad, is seen by the next request that asks for a place.
            tokio::select! {
                _ = connection => {}
                () = unused => {}
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
                    if open.use_.requests.get() < requests.current_max_send_streams() {
                        found = Some(Place::new(requests, true, &open.use_));
                    }
                    true
                }
                Poll::Pending => true,
            }
        });
        found
    }
}
