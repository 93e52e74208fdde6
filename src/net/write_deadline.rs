//! A connection that ends where the other side does not take what is sent in time. Must not know what is said.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// From the first byte that is written to when all that was written is flushed it has so long.
#[derive(Debug)]
pub struct WriteDeadline<S> {
    stream: S,
    within: Duration,
    late: Option<Pin<Box<Sleep>>>,
}

impl<S> WriteDeadline<S> {
    pub fn within(within: Duration, stream: S) -> WriteDeadline<S> {
        WriteDeadline {
            stream,
            within,
            late: None,
        }
    }

    fn or_late<T>(
        &mut self,
        done: Poll<io::Result<T>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        let within = self.within;
        let late = self.late.get_or_insert_with(|| Box::pin(sleep(within)));
        if done.is_ready() || late.as_mut().poll(cx).is_pending() {
            return done;
        }
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn or_taken(
        &mut self,
        flushed: Poll<io::Result<()>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if flushed.is_ready() {
            self.late = None;
            return flushed;
        }
        self.or_late(flushed, cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteDeadline<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteDeadline<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.or_late(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.or_late(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.or_taken(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.or_taken(shut, cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    const WITHIN: Duration = Duration::from_secs(8);

    /// Whether an answer of 100 bytes is sent well, of which the other side takes 10 at a time, `every` so often.
    async fn is_taken(every: Duration) -> bool {
        let (mut theirs, ours) = duplex(10);
        let mut ours = WriteDeadline::within(WITHIN, ours);
        let read = async {
            let mut part = [0; 10];
            loop {
                sleep(every).await;
                theirs.read_exact(&mut part).await.expect("it is open");
            }
        };
        let send = async {
            ours.write_all(&[0; 100]).await?;
            ours.flush().await
        };
        tokio::select! {
            sent = send => sent.is_ok(),
            () = read => unreachable!("it reads for ever"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_an_answer_too_slowly_is_given_up() {
        assert!(is_taken(WITHIN / 20).await);
        assert!(!is_taken(WITHIN / 5).await);
        assert!(!is_taken(2 * WITHIN).await);
    }

    #[tokio::test(start_paused = true)]
    async fn each_answer_has_its_own_time() {
        let (mut theirs, ours) = duplex(10);
        let mut ours = WriteDeadline::within(WITHIN, ours);
        for _ in 0..3 {
            ours.write_all(&[0; 10]).await.expect("there is room");
            ours.flush().await.expect("it is out");
            sleep(2 * WITHIN).await;
            let mut part = [0; 10];
            theirs.read_exact(&mut part).await.expect("it is here");
        }
    }
}
