//! A stream of HTTP/2 as a connection's bytes, both ways (RFC 8441 section 5). Must not know what is said.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What the other side sends. It may send on as what has come is read.
#[derive(Debug)]
pub struct TunnelReading<'s> {
    stream: &'s mut RecvStream,
    /// What has come and is not read yet.
    ahead: Bytes,
}

impl<'s> TunnelReading<'s> {
    pub fn of(stream: &'s mut RecvStream) -> TunnelReading<'s> {
        TunnelReading {
            stream,
            ahead: Bytes::new(),
        }
    }
}

impl AsyncRead for TunnelReading<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.ahead.is_empty() {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(bytes)) => self.ahead = bytes,
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let some = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead.split_to(some));
        // Fails for a stream that has ended alone, which needs no more.
        let _ = self.stream.flow_control().release_capacity(some);
        Poll::Ready(Ok(()))
    }
}

/// What goes to the other side, as fast as it takes it.
#[derive(Debug)]
pub struct TunnelWriting(pub SendStream<Bytes>);

impl AsyncWrite for TunnelWriting {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.0.reserve_capacity(bytes.len());
        let mut room = self.0.capacity();
        while room == 0 {
            room = match ready!(self.0.poll_capacity(cx)) {
                Some(room) => room.map_err(io_error)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        let some = room.min(bytes.len());
        let part = Bytes::copy_from_slice(&bytes[..some]);
        self.0.send_data(part, false).map_err(io_error)?;
        Poll::Ready(Ok(some))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.send_data(Bytes::new(), true).map_err(io_error))
    }
}

fn io_error(error: h2::Error) -> io::Error {
    match error.reason() {
        Some(Reason::CANCEL) => io::ErrorKind::ConnectionReset.into(),
        _ => io::Error::other(error),
    }
}
