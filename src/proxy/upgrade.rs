//! A connection that has switched protocols (WebSocket and others): bytes both ways until both sides end, one breaks, or
//! nothing moves for too long. Knows nothing of the protocol.

use std::cell::Cell;
use std::io;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::sleep;

use super::handle::{read_some, write_all};
use crate::clock;

/// Relays until the end. `to_client` and `to_upstream` were read with the heads and go first.
pub(super) async fn relay(
    client: &TcpStream,
    upstream: &TcpStream,
    to_client: Vec<u8>,
    to_upstream: Vec<u8>,
    idle: Duration,
    mut draining: watch::Receiver<bool>,
) {
    let moved = Cell::new(clock::now());
    let both = async {
        tokio::join!(
            pipe(client, upstream, to_upstream, &moved),
            pipe(upstream, client, to_client, &moved)
        );
    };
    let stalled = async {
        while moved.get().elapsed() < idle {
            sleep(idle - moved.get().elapsed().min(idle)).await;
        }
    };
    tokio::select! {
        () = both => {}
        () = stalled => {}
        _ = draining.wait_for(|draining| *draining) => {}
    }
}

/// One way, to the end of `from`; then `to` is told that there is no more. A break ends the other way too.
async fn pipe(from: &TcpStream, to: &TcpStream, first: Vec<u8>, moved: &Cell<Instant>) {
    let copied: io::Result<()> = async {
        let mut buffer = first;
        loop {
            write_all(to, &buffer).await?;
            moved.set(clock::now());
            buffer.clear();
            if read_some(from, &mut buffer).await? == 0 {
                return Ok(());
            }
        }
    }
    .await;
    match copied {
        Ok(()) => drop(SockRef::from(to).shutdown(Shutdown::Write)),
        Err(_) => {
            let _ = SockRef::from(from).shutdown(Shutdown::Both);
            let _ = SockRef::from(to).shutdown(Shutdown::Both);
        }
    }
}
