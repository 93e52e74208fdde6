//! Bytes in and out of connections: buffers that a lane lends, reads that end when the kernel has no more, and deadlines
//! that cost nothing while they are met. Must not know HTTP.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::ops::{Deref, DerefMut};
use std::pin::{Pin, pin};
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep};

use crate::net::stream::{Reading, Stream};

/// Room for one read, in bytes.
const READ: usize = 8 * 1024;
/// The same where much comes: each call of the kernel costs as much as copying some KiB.
const LARGE_READ: usize = 32 * 1024;
/// Bytes that a body moves before the lane's other requests have their turn.
const SHARE: usize = 128 * 1024;
/// A buffer that grew beyond this is not kept.
const MAX_KEPT: usize = 64 * 1024;
/// Buffers that a lane keeps while no one needs them: a request in flight holds up to three.
const MAX_SPARE: usize = 256;

/// A lane's spare buffers: a connection holds one only while it has bytes, so that an idle one costs none.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    spare: RefCell<Vec<Vec<u8>>>,
}

/// A buffer on loan; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Buffer<'l> {
    bytes: Vec<u8>,
    home: &'l Buffers,
}

impl Buffers {
    /// An empty one with room for a read, which also fits most heads: so it grows at once, not in steps.
    pub(super) fn take(&self) -> Buffer<'_> {
        Buffer {
            bytes: self.memory(),
            home: self,
        }
    }

    fn memory(&self) -> Vec<u8> {
        let spare = self.spare.borrow_mut().pop();
        spare.unwrap_or_else(|| Vec::with_capacity(READ))
    }
}

impl Buffer<'_> {
    /// Gives the memory back while there is nothing in it.
    pub(super) fn rest(&mut self) {
        if self.bytes.is_empty() {
            self.home.keep(std::mem::take(&mut self.bytes));
        }
    }

    /// Takes spare memory, where it has none.
    fn wake(&mut self) {
        if self.bytes.capacity() == 0 {
            self.bytes = self.home.memory();
        }
    }
}

impl Buffers {
    fn keep(&self, mut bytes: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if (1..=MAX_KEPT).contains(&bytes.capacity()) && spare.len() < MAX_SPARE {
            bytes.clear();
            spare.push(bytes);
        }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        self.home.keep(std::mem::take(&mut self.bytes));
    }
}

impl Deref for Buffer<'_> {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

/// Appends what can be read at once to `buffer`; 0 at the stream's end.
///
/// By `poll_read`, not `try_read`: a read that does not fill the buffer tells tokio that there is no more, which spares the
/// next one a call that only finds nothing.
pub(super) async fn read_some(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> io::Result<usize> {
    buffer.reserve(READ);
    stream.read_buf(buffer).await
}

/// As [`read_some`], within a message that has begun. A sender that is waited for is told that its bytes are here: many servers
/// and clients write a head and its body one after the other without TCP_NODELAY, and each would come 40 ms late.
pub(super) async fn read_rest(
    stream: &mut Reading<'_, '_>,
    buffer: &mut Vec<u8>,
) -> io::Result<usize> {
    let sender = *stream;
    let mut waits = false;
    let mut read = pin!(read_some(stream, buffer));
    poll_fn(|cx| {
        let read = read.as_mut().poll(cx);
        if read.is_pending() && !std::mem::replace(&mut waits, true) {
            sender.acknowledge();
        }
        read
    })
    .await
}

/// Whether the other end has closed; under TLS perhaps without saying so, as many servers do.
pub(super) fn is_end(read: &io::Result<usize>) -> bool {
    match read {
        Ok(read) => *read == 0,
        Err(error) => error.kind() == io::ErrorKind::UnexpectedEof,
    }
}

/// How much room the next read of a body has, in bytes: more once a read has filled its buffer.
#[derive(Debug)]
pub(super) struct Room(usize);

impl Room {
    pub(super) fn new() -> Room {
        Room(READ)
    }

    /// As [`read_rest`].
    pub(super) async fn read(
        &mut self,
        stream: &mut Reading<'_, '_>,
        buffer: &mut Vec<u8>,
    ) -> io::Result<usize> {
        buffer.reserve(self.0);
        let read = read_rest(stream, buffer).await?;
        if buffer.len() == buffer.capacity() {
            self.0 = LARGE_READ.min(2 * self.0);
        }
        Ok(read)
    }
}

/// The share of the lane that a body has, or what a client has sent ahead, by the bytes that were moved of it.
#[derive(Debug, Default)]
pub(super) struct Share(usize);

impl Share {
    /// It has moved so many more, and lets others go first once it has had its share. Without that it would go on for as long as neither side
    /// makes it wait, up to the 128 reads and writes that tokio allows a task.
    pub(super) async fn take(&mut self, bytes: usize) {
        self.0 += bytes;
        if self.0 >= SHARE {
            self.0 = 0;
            yield_now().await;
        }
    }
}

/// Writes all of `bytes`, down to the kernel: TLS may hold some back until told.
pub(super) async fn write(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

/// As [`write`]; says that something `moved` behind each part that is taken.
pub(super) async fn write_in_parts(
    stream: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    moved: impl Fn(),
) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = stream.write(bytes).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
        moved();
    }
    stream.flush().await
}

/// As [`read_some`], for a stream that may be silent for long: `buffer` has memory only once there is something to read.
pub(super) async fn read_first(stream: &mut Stream, buffer: &mut Buffer<'_>) -> io::Result<usize> {
    poll_fn(|cx| {
        ready!(stream.poll_read_ready(cx))?;
        buffer.wake();
        let read = pin!(read_some(stream, buffer)).poll(cx);
        // tokio may say that a stream can be read when it cannot.
        if read.is_pending() {
            buffer.rest();
        }
        read
    })
    .await
}

/// The deadlines of one connection, which come one after the other.
///
/// A timer of its own for each would be set and taken back several times a request, and hardly ever be needed. Here one
/// timer stays set for a time that was once a deadline; only when it fires is it asked whether that still is one.
#[derive(Debug)]
pub(super) struct Deadlines {
    timer: Pin<Box<Sleep>>,
}

/// The time was over.
#[derive(Debug)]
pub(super) struct Elapsed;

impl Deadlines {
    pub(super) fn new() -> Deadlines {
        // So far off that the first deadline comes before it.
        let year = Duration::from_secs(365 * 24 * 3600);
        Deadlines {
            timer: Box::pin(sleep(year)),
        }
    }

    /// What `future` gives, if it does so within `span` from its first wait.
    pub(super) async fn within<F: Future>(
        &mut self,
        span: Duration,
        future: F,
    ) -> Result<F::Output, Elapsed> {
        let mut future = pin!(future);
        let mut deadline = None;
        let timer = &mut self.timer;
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + span);
            if timer.deadline() > deadline {
                timer.as_mut().reset(deadline);
            }
            while timer.as_mut().poll(cx).is_ready() {
                if timer.deadline() >= deadline {
                    return Poll::Ready(Err(Elapsed));
                }
                timer.as_mut().reset(deadline);
            }
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;

    use tokio::io::AsyncReadExt as _;
    use tokio::time::{advance, timeout};

    use super::*;

    fn run(test: impl Future) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(test);
    }

    #[test]
    fn each_part_that_is_taken_moves_and_none_that_is_not() {
        run(async {
            let moved = Cell::new(0);
            let count = || moved.set(moved.get() + 1);
            let (mut stream, mut peer) = tokio::io::duplex(4);
            let taking = async {
                let mut taken = [0; 6];
                let _ = peer.read_exact(&mut taken).await;
                drop(peer);
            };
            let written = write_in_parts(&mut stream, b"abcdef", count);
            assert!(tokio::join!(written, taking).0.is_ok());
            assert_eq!(moved.get(), 2);
            assert!(write_in_parts(&mut stream, b"a", count).await.is_err());
            assert_eq!(moved.get(), 2);
        });
    }

    #[test]
    fn a_deadline_is_its_own_whatever_came_before_it() {
        const fn s(seconds: u64) -> Duration {
            Duration::from_secs(seconds)
        }
        run(async {
            let mut deadlines = Deadlines::new();
            // Met in time, and what it set stays set.
            assert!(deadlines.within(s(5), sleep(s(1))).await.is_ok());
            // Longer than what is set, shorter, and longer again.
            for span in [60, 2, 30] {
                let began = Instant::now();
                assert!(deadlines.within(s(span), pending::<()>()).await.is_err());
                assert_eq!(began.elapsed().as_secs(), span);
            }
            advance(s(100)).await;
            // What was set has long passed.
            let began = Instant::now();
            let waited = timeout(s(9), deadlines.within(s(3), pending::<()>())).await;
            assert!(waited.is_ok_and(|waited| waited.is_err()));
            assert_eq!(began.elapsed().as_secs(), 3);
        });
    }

    #[test]
    fn a_buffer_at_rest_lends_its_memory_to_others() {
        let home = Buffers::default();
        let mut first = home.take();
        first.extend_from_slice(b"abc");
        first.rest();
        assert_eq!(**first, *b"abc", "not at rest while it holds something");
        first.clear();
        let memory = first.as_ptr();
        first.rest();
        assert_eq!(first.capacity(), 0);
        let second = home.take();
        assert!(second.as_ptr() == memory && second.is_empty());
    }
}
