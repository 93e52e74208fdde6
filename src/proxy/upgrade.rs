//! A connection that has switched protocols (WebSocket and others): bytes both ways until both sides end, one breaks, or
//! nothing moves for too long, or its session is over. Knows nothing of the protocol.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::time::sleep;

use super::wire::{read_some, write};
use crate::clock;
use crate::net::stream::{BothWays, Reading, Stream, Writing};

/// Relays until the end, which `over` may be the first to tell. What was read with the heads goes first: each end stands with
/// what is to go to it.
pub(super) async fn relay(
    (client, to_client): (&mut Stream, Vec<u8>),
    (upstream, to_upstream): (&mut Stream, Vec<u8>),
    idle: Duration,
    over: impl Future<Output = ()>,
) {
    let moved = Cell::new(clock::now());
    let (mut client, mut upstream) = (BothWays::of(client), BothWays::of(upstream));
    let (client_reads, client_writes) = client.split();
    let (upstream_reads, upstream_writes) = upstream.split();
    let both = async {
        tokio::join!(
            pipe(client_reads, upstream_writes, to_upstream, &moved),
            pipe(upstream_reads, client_writes, to_client, &moved)
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
        () = over => {}
    }
}

/// One way, to the end of `from`; then `to` is told that there is no more. A break ends the other way too.
async fn pipe(
    mut from: Reading<'_, '_>,
    mut to: Writing<'_, '_>,
    first: Vec<u8>,
    moved: &Cell<Instant>,
) {
    let copied: io::Result<()> = async {
        let mut buffer = first;
        loop {
            write(&mut to, &buffer).await?;
            moved.set(clock::now());
            buffer.clear();
            if read_some(&mut from, &mut buffer).await? == 0 {
                return Ok(());
            }
        }
    }
    .await;
    match copied {
        Ok(()) => drop(to.shutdown().await),
        Err(_) => {
            from.cut();
            to.cut();
        }
    }
}
