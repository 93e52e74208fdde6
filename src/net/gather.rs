//! A connection of HTTP/2 that writes once for all that its streams have to say: `h2` writes each frame with a body by itself, and is woken
//! behind each task that sends. What is written is held, and sent at the end of a lane's turn (`turn`). Must not know what is said.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::turn::Turn;

/// What is held at most, in bytes. What is longer goes out by itself, without a copy.
const ROOM: usize = 16 * 1024;

/// A stream whose writes are held, once its [`Sender`] says so, until that sends them.
#[derive(Debug)]
pub struct Gathered<S>(Rc<Shared<S>>);

/// Drives a connection over a [`Gathered`] stream.
#[derive(Debug)]
pub struct Sender<S> {
    shared: Rc<Shared<S>>,
    turn: Turn,
}

#[derive(Debug)]
struct Shared<S> {
    inner: RefCell<Inner<S>>,
    holds: Cell<bool>,
}

#[derive(Debug)]
struct Inner<S> {
    stream: S,
    held: Vec<u8>,
    /// How much of it is sent.
    sent: usize,
    /// Of a write that nobody waited for.
    failed: Option<io::Error>,
}

/// The stream, which holds nothing back yet, and what is to send it.
pub fn gather<S>(stream: S) -> (Gathered<S>, Sender<S>) {
    let inner = RefCell::new(Inner {
        stream,
        held: Vec::new(),
        sent: 0,
        failed: None,
    });
    let shared = Rc::new(Shared {
        inner,
        holds: Cell::new(false),
    });
    let sender = Sender {
        shared: shared.clone(),
        turn: Turn::default(),
    };
    (Gathered(shared), sender)
}

impl<S: AsyncWrite + Unpin> Sender<S> {
    /// Whether what is written is held from here on, until [`Sender::poll_by`] sends it.
    pub fn hold(&self, holds: bool) {
        self.shared.holds.set(holds);
    }

    /// Polls the connection by `poll`, and sends what it has written: at once where few send by it, and at the end of the turn where `many`
    /// do.
    pub fn poll_by<T>(
        &mut self,
        cx: &mut Context<'_>,
        many: bool,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let polled = self.turn.poll_by(cx, many, poll);
        let mut inner = self.shared.inner.borrow_mut();
        if let Poll::Ready(Err(error)) = inner.poll_send(cx) {
            inner.failed = Some(error);
            // The connection hears of it when it is polled next.
            cx.waker().wake_by_ref();
        }
        if !many && inner.held.is_empty() {
            // One at rest has no memory for it.
            inner.held = Vec::new();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> Inner<S> {
    /// Sends what is held.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        if self.held.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while let rest @ [_, ..] = &self.held[self.sent..] {
            let count = ready!(Pin::new(&mut self.stream).poll_write(cx, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += count;
        }
        // By TLS, what is written is sent only then.
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.held.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.0.inner.borrow_mut();
        Pin::new(&mut inner.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.0.inner.borrow_mut();
        let inner = &mut *inner;
        let length = parts.iter().map(|part| part.len()).sum::<usize>();
        let holds = self.0.holds.get();
        if !holds || inner.held.len() + length > ROOM {
            ready!(inner.poll_send(cx))?;
        }
        if !holds || length > ROOM {
            return Pin::new(&mut inner.stream).poll_write_vectored(cx, parts);
        }
        parts
            .iter()
            .for_each(|part| inner.held.extend_from_slice(part));
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.inner.borrow().stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.inner.borrow_mut();
        if self.0.holds.get() {
            // The sender does.
            return Poll::Ready(inner.failed.take().map_or(Ok(()), Err));
        }
        ready!(inner.poll_send(cx))?;
        Pin::new(&mut inner.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.inner.borrow_mut();
        ready!(inner.poll_send(cx))?;
        Pin::new(&mut inner.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;

    /// Lets `sender` send, by a connection that has nothing to do.
    async fn send(sender: &mut Sender<DuplexStream>) {
        poll_fn(|cx| sender.poll_by(cx, false, |_| Poll::Ready(()))).await;
    }

    async fn read(other: &mut DuplexStream, most: usize) -> usize {
        let mut bytes = vec![0; most];
        let read = timeout(Duration::ZERO, other.read(&mut bytes)).await;
        read.map_or(0, Result::unwrap)
    }

    #[tokio::test]
    async fn what_is_held_goes_out_when_it_is_sent() {
        let (stream, mut other) = duplex(1 << 20);
        let (mut stream, mut sender) = gather(stream);
        stream.write_all(b"settings").await.unwrap();
        assert_eq!(read(&mut other, 100).await, 8);
        sender.hold(true);
        for _ in 0..3 {
            stream.write_all(b"frame").await.unwrap();
            stream.flush().await.unwrap();
        }
        assert_eq!(read(&mut other, 100).await, 0);
        send(&mut sender).await;
        assert_eq!(read(&mut other, 100).await, 15);
        stream.write_all(b"last").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        other.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"last");
    }

    #[tokio::test]
    async fn what_is_longer_than_is_held_keeps_its_place() {
        let (stream, mut other) = duplex(1 << 20);
        let (mut stream, sender) = gather(stream);
        sender.hold(true);
        stream.write_all(b"ab").await.unwrap();
        stream.write_all(&[b'c'; ROOM + 1]).await.unwrap();
        let mut bytes = vec![0; ROOM + 3];
        other.read_exact(&mut bytes).await.unwrap();
        assert!(bytes.starts_with(b"abc"));
    }

    #[tokio::test]
    async fn one_that_takes_little_is_sent_the_rest_later_and_holds_the_writer_up() {
        let (stream, mut other) = duplex(10);
        let (mut stream, mut sender) = gather(stream);
        sender.hold(true);
        stream.write_all(&[b'x'; ROOM]).await.unwrap();
        let more = stream.write(b"y");
        let more = timeout(Duration::ZERO, more).await;
        assert!(more.is_err(), "no more is held");
        let mut came = 0;
        while came < ROOM {
            send(&mut sender).await;
            came += read(&mut other, 10).await;
        }
        assert_eq!(came, ROOM);
    }

    #[tokio::test]
    async fn the_connection_hears_of_a_write_that_failed() {
        let (stream, other) = duplex(10);
        let (mut stream, mut sender) = gather(stream);
        sender.hold(true);
        stream.write_all(b"frame").await.unwrap();
        drop(other);
        send(&mut sender).await;
        assert!(stream.flush().await.is_err());
    }
}
