//! A connection's bytes, whatever carries them: TCP or a Unix socket, plain or under TLS. Must not know what is said.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;

/// How the kernel asks the other end of a connection whether it is there: once it has been silent for a minute, before any middlebox of note has
/// forgotten it (Azure's load balancers do after 4 minutes, AWS's after 350 s), and so that it is known after two when it is not. By itself Linux
/// would begin after two hours. It does not ask while anything is unacknowledged, which it sends again, for some 15 minutes: the deadlines of who writes
/// and of who waits for an answer are for that.
pub fn keepalive() -> TcpKeepalive {
    let minute = Duration::from_secs(60);
    TcpKeepalive::new()
        .with_time(minute)
        .with_interval(minute / 4)
        .with_retries(4)
}

/// What the kernel carries.
#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    Plain(Socket),
    /// Boxed: the state of TLS is a kilobyte, and most connections have none.
    Tls(Box<TlsStream<Socket>>),
}

impl Socket {
    /// Sends what is written at once (TCP_NODELAY), where the kernel would wait for more.
    pub fn set_nodelay(&self) -> io::Result<()> {
        match self {
            Socket::Tcp(tcp) => tcp.set_nodelay(true),
            Socket::Unix(_) => Ok(()),
        }
    }

    /// Says to the other end at once that what came is here (TCP_QUICKACK). The kernel would put that off for 40 ms, and a sender that does
    /// not set TCP_NODELAY writes no further until then.
    fn acknowledge(&self) {
        if let Socket::Tcp(tcp) = self {
            let _ = tcp.set_quickack(true);
        }
    }

    /// Has the kernel ask its other end whether it is there ([`keepalive`]).
    pub fn keep_alive(&self) -> io::Result<()> {
        match self {
            Socket::Tcp(tcp) => SockRef::from(tcp).set_tcp_keepalive(&keepalive()),
            Socket::Unix(_) => Ok(()),
        }
    }

    /// Ready once the kernel may have something to read, be it an end or an error.
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Socket::Tcp(tcp) => tcp.poll_read_ready(cx),
            Socket::Unix(unix) => unix.poll_read_ready(cx),
        }
    }

    /// Reads `bytes` that were peeked at.
    pub fn take(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut taken = 0;
        while taken < bytes.len() {
            let some = match self {
                Socket::Tcp(tcp) => tcp.try_read(&mut bytes[taken..])?,
                Socket::Unix(unix) => unix.try_read(&mut bytes[taken..])?,
            };
            if some == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            taken += some;
        }
        Ok(())
    }

    /// Where it was to go before it was redirected to this socket, as the kernel's connection tracking knows; `None` where it knows
    /// nothing.
    pub fn original_destination(&self) -> Option<SocketAddr> {
        let socket = SockRef::from(self);
        let is_v4 = self.local_address()?.is_ipv4();
        let address = match is_v4 {
            true => socket.original_dst_v4(),
            false => socket.original_dst_v6(),
        };
        address.ok()?.as_socket()
    }

    /// Its near end; IPv4 as such, also where it is mapped to IPv6.
    pub fn local_address(&self) -> Option<SocketAddr> {
        let address = SockRef::from(self).local_addr().ok()?.as_socket()?;
        Some(canonical(address))
    }

    /// Ready with what waits to be read, and stays there; nothing at the end.
    pub fn poll_peek(&self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Socket::Tcp(tcp) => tcp.poll_peek(cx, &mut ReadBuf::new(into)),
            Socket::Unix(unix) => loop {
                ready!(unix.poll_read_ready(cx))?;
                let peek = || Ok(recv(unix, &mut *into, RecvFlags::PEEK)?.0);
                match unix.try_io(Interest::READABLE, peek) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    done => return Poll::Ready(done),
                }
            },
        }
    }

    /// Whether nothing waits to be read. As far as is known already, where `as_heard`; else the kernel is asked.
    fn is_silent(&self, as_heard: bool) -> bool {
        let mut byte = [0];
        let read = match self {
            // tokio asks the kernel only where it has told of something.
            Socket::Tcp(tcp) if as_heard => tcp.try_read(&mut byte),
            Socket::Unix(unix) if as_heard => unix.try_read(&mut byte),
            socket => {
                let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
                let peeked = recv(socket, &mut byte, flags);
                peeked.map(|(_, bytes)| bytes).map_err(io::Error::from)
            }
        };
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl From<TcpStream> for Socket {
    fn from(tcp: TcpStream) -> Socket {
        Socket::Tcp(tcp)
    }
}

impl From<UnixStream> for Socket {
    fn from(unix: UnixStream) -> Socket {
        Socket::Unix(unix)
    }
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Stream {
        Stream::Plain(Socket::Tcp(tcp))
    }
}

impl Stream {
    /// What carries it.
    pub fn socket(&self) -> &Socket {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(tls) => tls.get_ref().0,
        }
    }

    /// Whether its ends have agreed on HTTP/2, as they do under TLS alone.
    pub fn is_http2(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(tls) => tls.get_ref().1.alpn_protocol() == Some(b"h2"),
        }
    }

    /// Ready once a read may give something; for TLS always, since it may hold what was read ahead.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Plain(socket) => socket.poll_read_ready(cx),
            Stream::Tls(_) => Poll::Ready(Ok(())),
        }
    }

    /// Ready with whether the other end still sends, once there is something of it: an end, or bytes. Of TLS bytes are read into
    /// `ahead`, since only TLS can tell an end from others; plain ones stay where they are.
    pub fn poll_heard(&mut self, cx: &mut Context<'_>, ahead: &mut Vec<u8>) -> Poll<bool> {
        match self {
            Stream::Plain(socket) => {
                let peeked = ready!(socket.poll_peek(cx, &mut [0]));
                Poll::Ready(matches!(peeked, Ok(1..)))
            }
            Stream::Tls(tls) => {
                let mut bytes = [0; 1024];
                let mut read = ReadBuf::new(&mut bytes);
                let done = ready!(Pin::new(tls).poll_read(cx, &mut read));
                ahead.extend_from_slice(read.filled());
                Poll::Ready(done.is_ok() && !read.filled().is_empty())
            }
        }
    }

    /// Whether nothing has come, so that it is fit for a next request. As far as is known already, where `as_heard`; else the
    /// kernel is asked. Bytes that have come are lost.
    pub fn is_silent(&mut self, as_heard: bool) -> bool {
        match self {
            Stream::Plain(socket) => socket.is_silent(as_heard),
            // Session tickets come when they like, and are read away here.
            Stream::Tls(tls) => {
                let mut cx = Context::from_waker(Waker::noop());
                let mut byte = [0];
                let mut read = ReadBuf::new(&mut byte);
                let as_heard_of = Pin::new(&mut *tls)
                    .poll_read(&mut cx, &mut read)
                    .is_pending();
                as_heard_of && (as_heard || tls.get_ref().0.is_silent(false))
            }
        }
    }

    /// Tells the other end that all was said, where TLS has a word for it; as far as that can be done at once.
    pub fn say_all_was_said(&mut self) {
        if let Stream::Tls(tls) = self {
            let mut cx = Context::from_waker(Waker::noop());
            let _ = Pin::new(tls).poll_shutdown(&mut cx);
        }
    }

    /// Its end is to be a reset: the other side must not take it for a regular one.
    pub fn reset_on_close(&self) {
        let _ = SockRef::from(self).set_linger(Some(Duration::ZERO));
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(tcp) => tcp.as_fd(),
            Socket::Unix(unix) => unix.as_fd(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

/// The address alone, IPv4 as such also where it is mapped to IPv6: two names of one end are then equal.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A stream of which some bytes were read already: they come first.
#[derive(Debug)]
pub struct Ahead<S> {
    pub bytes: Vec<u8>,
    pub stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Ahead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.bytes.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let some = self.bytes.len().min(buffer.remaining());
        buffer.put_slice(&self.bytes[..some]);
        self.bytes.drain(..some);
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Ahead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
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

/// Passes the calls of [`AsyncRead`] and [`AsyncWrite`] on to whichever variant it is.
macro_rules! pass_on {
    ($type:ident { $($variant:path),+ }) => {
        impl AsyncRead for $type {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $($variant(inner) => Pin::new(inner).poll_read(cx, buffer),)+
                }
            }
        }

        impl AsyncWrite for $type {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $($variant(inner) => Pin::new(inner).poll_write(cx, bytes),)+
                }
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                parts: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $($variant(inner) => Pin::new(inner).poll_write_vectored(cx, parts),)+
                }
            }

            fn is_write_vectored(&self) -> bool {
                match self {
                    $($variant(inner) => inner.is_write_vectored(),)+
                }
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $($variant(inner) => Pin::new(inner).poll_flush(cx),)+
                }
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $($variant(inner) => Pin::new(inner).poll_shutdown(cx),)+
                }
            }
        }
    };
}

pass_on!(Socket { Socket::Tcp, Socket::Unix });
pass_on!(Stream { Stream::Plain, Stream::Tls });

/// A stream read and written in one task, by turns: [`Reading`] and [`Writing`] are its two ends.
#[derive(Debug)]
pub struct BothWays<'s>(RefCell<&'s mut Stream>);

/// The end that reads.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'b, 's>(&'b BothWays<'s>);

/// The end that writes.
#[derive(Debug)]
pub struct Writing<'b, 's>(&'b BothWays<'s>);

impl<'s> BothWays<'s> {
    pub fn of(stream: &'s mut Stream) -> BothWays<'s> {
        BothWays(RefCell::new(stream))
    }

    pub fn split(&mut self) -> (Reading<'_, 's>, Writing<'_, 's>) {
        (Reading(self), Writing(self))
    }
}

impl Reading<'_, '_> {
    /// Says at once that what came is here, to a sender whose next bytes are waited for: it may write no further until then.
    pub fn acknowledge(self) {
        self.0.0.borrow().socket().acknowledge();
    }

    /// As [`Stream::poll_heard`].
    pub fn poll_heard(&self, cx: &mut Context<'_>, ahead: &mut Vec<u8>) -> Poll<bool> {
        self.0.0.borrow_mut().poll_heard(cx, ahead)
    }
}

impl AsyncRead for Reading<'_, '_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.0.borrow_mut()).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Writing<'_, '_> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut **self.0.0.borrow_mut()).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut **self.0.0.borrow_mut()).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// The runtime has not turned since, so that nothing can have been heard.
    #[tokio::test]
    async fn the_kernel_knows_of_an_end_that_was_not_heard() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut stream, far) = (Stream::from(near.unwrap()), far.unwrap().0);
        assert!(stream.is_silent(true) && stream.is_silent(false));
        drop(far);
        assert!(!stream.is_silent(false));
    }
}
