//! A client's connection of HTTP/2, with when it began what it has not ended: `h2` waits for ever for the rest of a frame or a head.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::http2::frames::Frames;
use crate::net::stream::pass_writes_on;

/// A stream whose bytes are followed as they are read.
pub(super) struct Heard<S> {
    stream: S,
    due: Rc<RefCell<Due>>,
}

struct Due {
    frames: Frames,
    /// What is due, and since when.
    since: Option<(u64, Instant)>,
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
    }));
    let heard = Heard {
        stream,
        due: due.clone(),
    };
    let timer = Box::pin(sleep(span));
    (heard, Patience { due, span, timer })
}

impl Patience {
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

pass_writes_on!(Heard);
