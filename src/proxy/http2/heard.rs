//! A client's connection of HTTP/2, with when it began what it has not ended, since `h2` waits for ever for the rest of a frame or a head; and
//! with when it last took some of a body, which it may still do once its requests are over for weir.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::http2::frames::Frames;

/// A stream whose bytes are followed as they are read and written.
pub(super) struct Heard<S> {
    stream: S,
    due: Rc<RefCell<Due>>,
}

struct Due {
    frames: Frames,
    /// What is due, and since when.
    since: Option<(u64, Instant)>,
    answers: Frames,
    /// When some of a body was taken last.
    took: Instant,
}

/// How long a client may take for what it has begun.
pub(super) struct Patience {
    due: Rc<RefCell<Due>>,
    span: Duration,
    timer: Pin<Box<Sleep>>,
}

/// `stream`, with the patience of `span` that there is for it.
pub(super) fn hear<S>(stream: S, span: Duration) -> (Heard<S>, Patience) {
    let due = Rc::new(RefCell::new(Due {
        frames: Frames::default(),
        since: Some((0, Instant::now())),
        answers: Frames::of_server(),
        took: Instant::now(),
    }));
    let heard = Heard {
        stream,
        due: due.clone(),
    };
    let timer = Box::pin(sleep(span));
    (heard, Patience { due, span, timer })
}

impl Patience {
    /// When the client took some of a body last.
    pub(super) fn took(&self) -> Instant {
        self.due.borrow().took
    }

    /// Ready once something has been due for too long. Asked behind each read: it sees no other.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some((_, since)) = self.due.borrow().since else {
            return Poll::Pending;
        };
        let deadline = since + self.span;
        if self.timer.deadline() != deadline {
            self.timer.as_mut().reset(deadline);
        }
        self.timer.as_mut().poll(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let mut due = self.due.borrow_mut();
        due.frames.read(&buffer.filled()[before..]);
        due.since = match (due.frames.due(), due.since) {
            (None, _) => None,
            (Some(now), Some((then, since))) if now == then => Some((then, since)),
            (Some(now), _) => Some((now, Instant::now())),
        };
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heard<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, parts))?;
        let mut due = self.due.borrow_mut();
        let before = due.answers.bodies();
        let mut left = count;
        for part in parts {
            let taken = &part[..left.min(part.len())];
            due.answers.read(taken);
            left -= taken.len();
        }
        if due.answers.bodies() > before {
            due.took = Instant::now();
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
