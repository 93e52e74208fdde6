//! A way that takes its time: what passes comes as it was sent, later.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Where `to` is reached with so much delay each way, however much is under way.
pub async fn far(to: SocketAddr, one_way: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let there = TcpStream::connect(to).await.unwrap();
            near.set_nodelay(true).unwrap();
            there.set_nodelay(true).unwrap();
            let (near, there) = (near.into_split(), there.into_split());
            pass(near.0, there.1, one_way);
            pass(there.0, near.1, one_way);
        }
    });
    address
}

fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, one_way: Duration) {
    let (way, mut end) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut room = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from.read(&mut room).await {
            let _ = way.send((Instant::now() + one_way, room[..count].to_vec()));
        }
    });
    tokio::spawn(async move {
        while let Some((due, bytes)) = end.recv().await {
            sleep_until(due).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
}
