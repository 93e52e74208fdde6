//! A connection of HTTP/2 that writes once for all that its streams have to say: `h2` writes each frame with a body by itself, and is woken
//! behind each task that sends. What is written is held, and sent at the end of a lane's turn.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::turn::Turn;

/// What is held at most, in bytes. What is as long as this goes out by itself, without a copy.
const ROOM: usize = 16 * 1024;
/// What answers pings and the like is no longer, in bytes: it says nothing of whether the other end takes what it asked for.
const NO_BODY: usize = 64;

/// A stream whose writes are held once its [`Sender`] sends them.
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
    sends: Cell<bool>,
    /// When the other end took some of a body last.
    took: Cell<Instant>,
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
        sends: Cell::new(false),
        took: Cell::new(Instant::now()),
    });
    let sender = Sender {
        shared: shared.clone(),
        turn: Turn::default(),
    };
    (Gathered(shared), sender)
}

impl<S: AsyncWrite + Unpin> Sender<S> {
    /// Whether what is written is held from here on, until [`Sender::poll_by`] sends it.
    pub fn holds(&self, holds: bool) {
        self.shared.sends.set(holds);
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
        if let Poll::Ready(Err(error)) = inner.poll_send(cx, &self.shared.took) {
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

    /// When the other end took some of a body last.
    pub fn took(&self) -> Instant {
        self.shared.took.get()
    }
}

impl<S: AsyncWrite + Unpin> Inner<S> {
    /// Sends what is held.
    fn poll_send(&mut self, cx: &mut Context<'_>, took: &Cell<Instant>) -> Poll<io::Result<()>> {
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
            if count > NO_BODY {
                took.set(Instant::now());
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
        if inner.held.len() + length > ROOM {
            ready!(inner.poll_send(cx, &self.0.took))?;
        }
        if length > ROOM || !self.0.sends.get() {
            ready!(inner.poll_send(cx, &self.0.took))?;
            let count = ready!(Pin::new(&mut inner.stream).poll_write_vectored(cx, parts))?;
            if count > NO_BODY {
                self.0.took.set(Instant::now());
            }
            return Poll::Ready(Ok(count));
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
        match (self.0.sends.get(), inner.failed.take()) {
            (_, Some(error)) => Poll::Ready(Err(error)),
            // The sender does.
            (true, None) => Poll::Ready(Ok(())),
            (false, None) => {
                ready!(inner.poll_send(cx, &self.0.took))?;
                Pin::new(&mut inner.stream).poll_flush(cx)
            }
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.inner.borrow_mut();
        ready!(inner.poll_send(cx, &self.0.took))?;
        Pin::new(&mut inner.stream).poll_shutdown(cx)
    }
}
