//! Connections to an upstream: idle ones kept by the lane that made them, so that no lock is needed.

pub mod http2;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::clock;
use crate::net::stream::Stream;
use http2::{Multiplexed, Place};

/// One lane's connections to one endpoint.
#[derive(Debug)]
pub struct Pool {
    /// `HOST:PORT`; a name is resolved at each connect.
    endpoint: String,
    connect_timeout: Duration,
    idle_timeout: Duration,
    max_idle: usize,
    /// With when each was given back, the oldest first.
    idle: RefCell<VecDeque<(Instant, Stream)>>,
    multiplexed: Multiplexed,
}

/// A connection, and whether it served a request before: then the upstream may have closed it unseen.
#[derive(Debug)]
pub struct Connected {
    pub stream: Stream,
    pub reused: bool,
}

impl Pool {
    /// A pool that keeps at most `max_idle` connections open between requests, each for `idle_timeout`.
    pub fn new(
        endpoint: String,
        connect_timeout: Duration,
        idle_timeout: Duration,
        max_idle: usize,
    ) -> Pool {
        Pool {
            endpoint,
            connect_timeout,
            idle_timeout,
            max_idle,
            idle: RefCell::default(),
            multiplexed: Multiplexed::default(),
        }
    }

    /// The connection given back last that is still open, or a new one. Unless the request `can_repeat`, the kernel is asked
    /// whether it is open; otherwise it is enough that nothing was heard of its end.
    pub async fn take(&self, can_repeat: bool) -> io::Result<Connected> {
        loop {
            let Some((since, mut stream)) = self.idle.borrow_mut().pop_back() else {
                break;
            };
            // Its own idle time must end before the upstream's, or a request could meet the upstream's close on its way.
            if since.elapsed() < self.idle_timeout && stream.is_silent(can_repeat) {
                return Ok(Connected {
                    stream,
                    reused: true,
                });
            }
        }
        self.connect().await
    }

    /// As requests name it that name no host.
    pub fn authority(&self) -> &str {
        &self.endpoint
    }

    /// A place for a request by HTTP/2.
    pub async fn place(&self) -> io::Result<Place> {
        let connect = async || Ok(self.connect().await?.stream);
        self.multiplexed
            .place(connect, self.connect_timeout, self.idle_timeout)
            .await
    }

    /// A new connection.
    pub async fn connect(&self) -> io::Result<Connected> {
        let stream = timeout(self.connect_timeout, TcpStream::connect(&self.endpoint)).await??;
        stream.set_nodelay(true)?;
        Ok(Connected {
            stream: stream.into(),
            reused: false,
        })
    }

    /// Keeps `stream` for the next request; only one whose last response was read to its end.
    pub fn give_back(&self, stream: Stream) {
        let mut idle = self.idle.borrow_mut();
        let now = clock::now();
        while let Some((since, _)) = idle.front()
            && now.saturating_duration_since(*since) >= self.idle_timeout
        {
            idle.pop_front();
        }
        if idle.len() < self.max_idle {
            idle.push_back((now, stream));
        }
    }
}
