//! A lane: a thread with its own runtime, listener and upstream pool, so that no request crosses threads or takes a lock.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::runtime;
use tokio::sync::watch;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

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
    /// For requests in flight to end once the process drains.
    pub drain: Duration,
}

/// What the connections of one lane share.
#[derive(Debug)]
pub struct Lane {
    pub settings: Settings,
    pub pool: Pool,
    /// Turns true when the process drains: no new request is taken then.
    pub draining: watch::Receiver<bool>,
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

/// Starts a lane on `listener`. Once `draining` turns true it stops accepting, closes idle connections, lets requests in
/// flight end for at most `drain`, and its thread ends.
pub fn spawn(
    listener: std::net::TcpListener,
    settings: Settings,
    draining: watch::Receiver<bool>,
) -> io::Result<JoinHandle<io::Result<()>>> {
    std::thread::Builder::new()
        .name("lane".to_owned())
        .spawn(move || {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            LocalSet::new().block_on(&runtime, serve(listener, settings, draining))
        })
}

async fn serve(
    listener: std::net::TcpListener,
    settings: Settings,
    mut draining: watch::Receiver<bool>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let pool = Pool::new(
        settings.upstream,
        settings.connect_timeout,
        settings.max_idle,
    );
    let drain = settings.drain;
    let lane = Rc::new(Lane {
        settings,
        pool,
        draining: draining.clone(),
    });
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = draining.wait_for(|draining| *draining) => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let lane = lane.clone();
                    connections.spawn_local(async move { handle::connection(&lane, stream, peer).await });
                }
                // Out of descriptors, or the client is gone already: others must still be served.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    let _ = timeout(drain, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
    Ok(())
}
