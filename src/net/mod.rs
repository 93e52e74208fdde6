//! Connections as bytes: what carries them is no matter to those who speak HTTP over them. Owns what opens, carries and ends
//! them; must not know what is said.

pub mod any;
pub mod body;
pub mod clients;
pub mod descriptors;
pub mod gather;
pub mod listen;
pub mod names;
pub mod places;
pub mod resolve;
pub mod stream;
pub mod tls;
pub mod tunnel;
pub mod turn;
pub mod window;
pub mod write_deadline;

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;

/// Takes connections for ever, each of which has a place and a task of its own while `served` serves it.
pub async fn serve<S: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    places: Arc<Semaphore>,
    served: impl Fn(TcpStream, SocketAddr) -> S,
) -> Infallible {
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return pending().await;
        };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let served = served(stream, peer);
                tokio::spawn(async move {
                    served.await;
                    drop(place);
                });
            }
            // Out of descriptors, or the caller is gone already.
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Places for whoever comes.
pub fn unbounded() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(Semaphore::MAX_PERMITS))
}
