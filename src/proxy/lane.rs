//! A lane: a thread with its own runtime, listener and upstream pool, so that no request crosses threads or takes a lock.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::runtime;
use tokio::task::LocalSet;

use super::handle;
use crate::http1::head::HeadLimits;
use crate::upstream::Pool;

/// What a lane serves.
#[derive(Debug, Clone)]
pub struct Settings {
    pub upstream: SocketAddr,
    pub limits: HeadLimits,
    /// For a head to be whole once its first byte is here.
    pub header_read: Duration,
    /// For a client's connection without a request.
    pub keep_alive: Duration,
    pub connect_timeout: Duration,
    /// From the request to the end of the upstream's response head, and for each stall in a body.
    pub timeout: Duration,
    /// Upstream connections that a lane keeps between requests.
    pub max_idle: usize,
}

/// What the connections of one lane share.
#[derive(Debug)]
pub struct Lane {
    pub settings: Settings,
    pub pool: Pool,
}

/// A listener on `address` that other lanes can share (SO_REUSEPORT).
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// Starts a lane on `listener`; the thread ends only if its runtime cannot be made or its listener breaks.
pub fn spawn(
    listener: std::net::TcpListener,
    settings: Settings,
) -> io::Result<JoinHandle<io::Result<()>>> {
    std::thread::Builder::new()
        .name("lane".to_owned())
        .spawn(move || {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            LocalSet::new().block_on(&runtime, serve(listener, settings))
        })
}

async fn serve(listener: std::net::TcpListener, settings: Settings) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let pool = Pool::new(
        settings.upstream,
        settings.connect_timeout,
        settings.max_idle,
    );
    let lane = Rc::new(Lane { settings, pool });
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let lane = lane.clone();
                tokio::task::spawn_local(
                    async move { handle::connection(&lane, stream, peer).await },
                );
            }
            // Out of descriptors, or the client is gone already: others must still be served.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
