//! A connection to one of several addresses: that which answers first, of those that stand first. Must not know
//! whose they are.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::net::TcpStream;
use tokio::time::sleep;

/// How long an address is waited for before the next one is tried beside it (RFC 8305, section 5).
const BESIDE_AFTER: Duration = Duration::from_millis(250);

/// Connects to one of `addresses`, each by `open`. The next is tried as soon as one has failed, or none has answered for a while. The error is that
/// of the last address that failed; `None` for no address.
pub async fn connect_to_any<O: Future<Output = io::Result<TcpStream>>>(
    addresses: impl Iterator<Item = SocketAddr>,
    open: impl Fn(SocketAddr) -> O,
) -> Result<TcpStream, Option<io::Error>> {
    let mut addresses = addresses.peekable();
    let mut trying = FuturesUnordered::new();
    let mut failed = None;
    loop {
        trying.extend(addresses.next().map(&open));
        tokio::select! {
            tried = trying.next() => match tried {
                Some(Ok(stream)) => return Ok(stream),
                Some(Err(error)) => failed = Some(error),
                None => return Err(failed),
            },
            () = sleep(BESIDE_AFTER), if addresses.peek().is_some() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Socket, Type};

    use super::*;

    fn bound() -> (Socket, SocketAddr) {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        socket.bind(&any.into()).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        (socket, address)
    }

    #[tokio::test]
    async fn one_that_is_silent_is_not_waited_for() {
        let (full, silent) = bound();
        full.listen(0).unwrap();
        // Linux queues one more than it is told to; what comes after is on its way for ever.
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.set_nonblocking(true).unwrap();
                let _ = socket.connect(&silent.into());
                socket
            })
            .collect();
        let (listening, open) = bound();
        listening.listen(1).unwrap();
        let addresses = [silent, open].into_iter();
        let stream = connect_to_any(addresses, TcpStream::connect).await;
        let stream = stream.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open);
        drop(waiting);
    }

    #[tokio::test]
    async fn the_first_that_answers_is_taken() {
        let (listening, open) = bound();
        listening.listen(1).unwrap();
        let (_closed, refuses) = bound();
        let connect = |addresses: Vec<_>| connect_to_any(addresses.into_iter(), TcpStream::connect);
        let stream = connect(vec![refuses, open]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open);
        let refused = connect(vec![refuses; 2]).await.unwrap_err();
        assert_eq!(refused.unwrap().kind(), io::ErrorKind::ConnectionRefused);
        assert!(connect(Vec::new()).await.unwrap_err().is_none());
    }
}
