//! A stream of HTTP/2 as a connection's bytes, both ways (RFC 8441 section 5). Must not know what is said.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What the other side sends. It may send on as what has come is read.
#[derive(Debug)]
pub struct TunnelReading<'s> {
    stream: &'s mut RecvStream,
    /// What has come and is not read yet, out of its frames.
    ahead: BytesMut,
}

impl<'s> TunnelReading<'s> {
    pub fn of(stream: &'s mut RecvStream) -> TunnelReading<'s> {
        TunnelReading {
            stream,
            ahead: BytesMut::new(),
        }
    }

    /// Takes what has come out of its frames, while nobody reads it: a small one costs many times its bytes, and holds on to all that was read
    /// with it. The window bounds how much that is. Why there is no more is told to whoever reads next.
    pub fn gather(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(Ok(bytes))) = self.stream.poll_data(cx) {
            self.ahead.extend_from_slice(&bytes);
        }
    }
}

impl AsyncRead for TunnelReading<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let room = buffer.remaining();
        let some = match self.ahead.is_empty() {
            false => {
                let some = room.min(self.ahead.len());
                buffer.put_slice(&self.ahead.split_to(some));
                if self.ahead.is_empty() {
                    // An idle one holds on to nothing.
                    self.ahead = BytesMut::new();
                }
                some
            }
            true => loop {
                match ready!(self.stream.poll_data(cx)) {
                    Some(Ok(bytes)) if bytes.is_empty() => {}
                    Some(Ok(mut bytes)) => {
                        let some = room.min(bytes.len());
                        buffer.put_slice(&bytes.split_to(some));
                        self.ahead.extend_from_slice(&bytes);
                        break some;
                    }
                    Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                    None => return Poll::Ready(Ok(())),
                }
            },
        };
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
