//! A connection that has switched protocols (WebSocket and others), by HTTP/1.1 or HTTP/2: bytes both ways until both sides end, one breaks,
//! nothing moves for too long, its session is over, or weir drains. Of WebSocket alone weir knows enough to close it in order. Must not
//! know why a session is over.

use std::cell::Cell;
use std::future::{pending, poll_fn};
use std::pin::pin;
use std::task::Context;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::StatusCode;
use http::header::{CONTENT_LENGTH, SEC_WEBSOCKET_ACCEPT};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::exchange::{Conn, Ends, Failure, persist};
use super::outgoing::Outgoing;
use super::record::Record;
use super::reply::Rejection;
use super::sessions;
use super::wire::{Share, read_some, write};
use crate::clock;
use crate::http1::websocket::{self, Frames, GOING_AWAY, POLICY_VIOLATION};
use crate::http2::head::upgrade_response;
use crate::net::stream::{BothWays, Stream};
use crate::net::tunnel::{TunnelReading, TunnelWriting};
use crate::plan::Phase;

/// How long a WebSocket may take to close in order.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// What both sides speak once they have switched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spoken {
    WebSocket,
    /// Ends without a word.
    Other,
}

/// Tells the client of the switch and relays until the end. `answer` came behind the upstream's head.
pub(super) async fn switched(
    conn: &Conn<'_>,
    outgoing: &Outgoing<'_>,
    ends: &mut Ends<'_>,
    upstream: &mut Stream,
    answer: Vec<u8>,
    spoken: Spoken,
    record: &mut Record,
) -> Result<(), Failure> {
    persist(outgoing.plan, &conn.lane.outbox, record, false).await?;
    ends.write(&outgoing.out, outgoing.request.idle).await?;
    let to_upstream = std::mem::take(ends.buffer);
    let (mut client, mut upstream) = (BothWays::of(ends.client), BothWays::of(upstream));
    let client = Side::of(client.split(), answer);
    let upstream = Side::of(upstream.split(), to_upstream);
    live(conn, outgoing, client, upstream, spoken, record).await;
    Ok(())
}

/// As [`switched`], for a client that asked for a WebSocket by HTTP/2 (RFC 8441 section 5), with an upstream of either version.
pub(super) async fn switched_http2(
    conn: &Conn<'_>,
    outgoing: &Outgoing<'_>,
    body: &mut RecvStream,
    respond: &mut SendResponse<Bytes>,
    upstream: Side<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
    answer: Vec<u8>,
    record: &mut Record,
) -> Result<(), Failure> {
    let head = upgrade_response(&outgoing.out).map_err(|_| Rejection::UpstreamBroken)?;
    let (mut head, _) = head;
    *head.status_mut() = StatusCode::OK;
    // It answers a key that was weir's; and a tunnel has no length (RFC 9110 section 9.3.6).
    for gone in [SEC_WEBSOCKET_ACCEPT, CONTENT_LENGTH] {
        head.headers_mut().remove(gone);
    }
    record.status = head.status().as_u16();
    persist(outgoing.plan, &conn.lane.outbox, record, false).await?;
    let writes = respond.send_response(head, false);
    let writes = TunnelWriting(writes.map_err(|_| Failure::ClientGone)?);
    let client = Side::of_tunnel((TunnelReading::of(body), writes), answer);
    let spoken = Spoken::WebSocket;
    live(conn, outgoing, client, upstream, spoken, record).await;
    Ok(())
}

/// Relays until the end, of which weir's part is told here.
async fn live(
    conn: &Conn<'_>,
    outgoing: &Outgoing<'_>,
    client: Side<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
    upstream: Side<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
    spoken: Spoken,
    record: &mut Record,
) {
    let session = outgoing.session.as_deref();
    let session_over = sessions::over(outgoing.plan, conn.lane, outgoing.route, session);
    let mut phases = conn.lane.phases.clone();
    let going_away = async {
        match spoken {
            Spoken::WebSocket => drop(phases.wait_for(|phase| *phase >= Phase::Draining).await),
            // It lives on during the drain, until its end.
            Spoken::Other => pending().await,
        }
    };
    let ending = async {
        tokio::select! {
            () = session_over => POLICY_VIOLATION,
            () = going_away => GOING_AWAY,
        }
    };
    // Counted in place: a connection that is cut off is told of too.
    let passed = Passed {
        up: Cell::from_mut(&mut record.bytes_in),
        down: Cell::from_mut(&mut record.bytes_out),
    };
    let idle = outgoing.request.idle;
    relay(client, upstream, passed, idle, spoken, ending).await;
}

/// One side of the connection.
pub(super) struct Side<R, W> {
    reads: R,
    writes: W,
    /// What goes out first: it came with the heads.
    first: Vec<u8>,
    gather: Gather<R>,
}

/// What is done with what comes while the other side takes nothing.
type Gather<R> = fn(&mut R, &mut Context<'_>);

impl<R, W> Side<R, W> {
    /// What comes waits in the kernel.
    pub(super) fn of((reads, writes): (R, W), first: Vec<u8>) -> Side<R, W> {
        Side {
            reads,
            writes,
            first,
            gather: |_, _| {},
        }
    }
}

impl<'s, W> Side<TunnelReading<'s>, W> {
    /// What comes is taken out of its frames.
    pub(super) fn of_tunnel(
        both: (TunnelReading<'s>, W),
        first: Vec<u8>,
    ) -> Side<TunnelReading<'s>, W> {
        Side {
            gather: TunnelReading::gather,
            ..Side::of(both, first)
        }
    }
}

/// How many bytes have gone each way, heads aside.
struct Passed<'r> {
    up: &'r Cell<u64>,
    down: &'r Cell<u64>,
}

/// Relays until the end, of which `ending` may be the first to tell, with the code for it.
async fn relay(
    client: Side<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
    upstream: Side<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
    passed: Passed<'_>,
    idle: Duration,
    spoken: Spoken,
    ending: impl Future<Output = u16>,
) {
    let moved = Cell::new(clock::now());
    let (close, closing) = watch::channel(None);
    let up = Way {
        from: client.reads,
        gather: client.gather,
        to: upstream.writes,
        first: upstream.first,
        passed: passed.up,
        moved: &moved,
        closing: closing.clone(),
        is_up: true,
    };
    let down = Way {
        from: upstream.reads,
        gather: upstream.gather,
        to: client.writes,
        first: client.first,
        passed: passed.down,
        moved: &moved,
        closing,
        is_up: false,
    };
    let mut both = pin!(async {
        let (mut up, mut down) = (pin!(up.pass()), pin!(down.pass()));
        tokio::select! {
            passed = &mut up => finish(passed, down).await,
            passed = &mut down => finish(passed, up).await,
        }
    });
    let stalled = async {
        while moved.get().elapsed() < idle {
            sleep(idle - moved.get().elapsed().min(idle)).await;
        }
    };
    let code = tokio::select! {
        _ = &mut both => return,
        () = stalled => GOING_AWAY,
        code = ending => code,
    };
    if spoken == Spoken::WebSocket {
        close.send_replace(Some(code));
        let _ = timeout(CLOSE_WITHIN, both).await;
    }
}

/// Why a way ends before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// Who sends is gone.
    Reading,
    /// Who is sent to takes no more.
    Writing,
}

/// Ends the other way once one has `passed`. Who takes no more may have said something before, as a server that closes without having
/// read all: that gets a moment.
async fn finish(passed: Result<(), Broken>, other: impl Future<Output = Result<(), Broken>>) {
    match passed {
        Ok(()) => drop(other.await),
        Err(Broken::Writing) => drop(timeout(CLOSE_WITHIN, other).await),
        Err(Broken::Reading) => {}
    }
}

/// One way of the relay.
struct Way<'r, R, W> {
    from: R,
    gather: Gather<R>,
    to: W,
    /// What is there already.
    first: Vec<u8>,
    /// How many bytes went on.
    passed: &'r Cell<u64>,
    /// When something last moved, either way.
    moved: &'r Cell<Instant>,
    /// The code with which weir closes the connection, once it does.
    closing: watch::Receiver<Option<u16>>,
    is_up: bool,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Way<'_, R, W> {
    /// Passes bytes on to the end of `from`; then `to` is told that there is no more.
    async fn pass(mut self) -> Result<(), Broken> {
        let mut frames = Frames::default();
        let mut buffer = std::mem::take(&mut self.first);
        let mut share = Share::default();
        loop {
            let code = *self.closing.borrow();
            // At the close no more goes on than ends the frame that is under way.
            let some = match code {
                None => buffer.len(),
                Some(_) => frames.rest(&buffer),
            };
            self.write(&buffer[..some]).await?;
            frames.follow(&buffer[..some]);
            self.moved.set(clock::now());
            if let Some(code) = code
                && frames.is_between()
            {
                buffer.drain(..some);
                return self.close(code, frames, buffer).await;
            }
            buffer.clear();
            let read = tokio::select! {
                read = read_some(&mut self.from, &mut buffer) => read,
                _ = self.closing.wait_for(Option::is_some), if code.is_none() => continue,
            };
            match read.map_err(|_| Broken::Reading)? {
                0 => return self.end().await,
                read => share.take(read).await,
            }
        }
    }

    /// Sends a Close frame, unless one has passed, and reads away what comes until there is one; `buffer` is what has come and does not pass.
    async fn close(
        mut self,
        code: u16,
        mut frames: Frames,
        mut buffer: Vec<u8>,
    ) -> Result<(), Broken> {
        if !frames.has_closed() {
            // What goes to a server has a mask (RFC 6455 section 5.3).
            let mask = self.is_up.then(|| fastrand::u32(..).to_ne_bytes());
            let passed = self.passed.get();
            self.write(&websocket::close(code, mask)).await?;
            // The client has this one, and has not sent that one.
            if self.is_up {
                self.passed.set(passed);
            }
        }
        loop {
            frames.follow(&buffer);
            buffer.clear();
            if frames.has_closed() {
                break;
            }
            let read = read_some(&mut self.from, &mut buffer).await;
            if read.map_err(|_| Broken::Reading)? == 0 {
                break;
            }
        }
        self.end().await
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        let mut writing = pin!(write(&mut self.to, bytes));
        let written = poll_fn(|cx| {
            let written = writing.as_mut().poll(cx);
            if written.is_pending() {
                (self.gather)(&mut self.from, cx);
            }
            written
        });
        written.await.map_err(|_| Broken::Writing)?;
        self.passed.set(self.passed.get() + bytes.len() as u64);
        Ok(())
    }

    /// Says that there is no more.
    async fn end(&mut self) -> Result<(), Broken> {
        let ended = self.to.shutdown().await;
        ended.map_err(|_| Broken::Writing)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::pin::Pin;
    use std::task::Poll;

    use tokio::io::{AsyncReadExt as _, duplex};

    use super::*;

    /// Takes nothing more.
    struct Gone;

    impl AsyncWrite for Gone {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_upstream_said_before_it_broke_off_still_arrives() {
        let (mut client, ours) = duplex(1024);
        client.write_all(b"more").await.unwrap();
        let (mut upstream, theirs) = duplex(1024);
        let speaks = async {
            sleep(CLOSE_WITHIN / 2).await;
            upstream.write_all(b"answer").await.unwrap();
            drop(upstream);
        };
        let relays = async {
            let (reads, writes) = tokio::io::split(ours);
            let client = Side::of((reads, writes), Vec::new());
            let upstream = Side::of((theirs, Gone), Vec::new());
            let (up, down) = (Cell::new(0), Cell::new(0));
            let passed = Passed {
                up: &up,
                down: &down,
            };
            let idle = Duration::from_secs(60);
            relay(client, upstream, passed, idle, Spoken::Other, pending()).await;
            assert_eq!((up.get(), down.get()), (0, 6));
        };
        tokio::join!(relays, speaks);
        let mut heard = String::new();
        client.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "answer");
    }

    #[tokio::test]
    async fn what_weir_closes_with_is_sent_to_the_client_and_not_by_it() {
        for is_up in [true, false] {
            let (other, from) = duplex(1024);
            let (to, _upstream) = duplex(1024);
            let (passed, moved) = (Cell::new(0), Cell::new(clock::now()));
            let (_closes, closing) = watch::channel(Some(GOING_AWAY));
            let way = Way {
                from,
                gather: |_, _| {},
                to,
                first: b"\x81\x01a".to_vec(),
                passed: &passed,
                moved: &moved,
                closing,
                is_up,
            };
            // The other end says nothing more.
            drop(other);
            assert_eq!(way.pass().await, Ok(()));
            let own = websocket::close(GOING_AWAY, None).len() as u64;
            assert_eq!(passed.get(), if is_up { 0 } else { own }, "{is_up}");
        }
    }

    /// One that is read with the end of the frame that is under way does not go on, and so closes nothing at the other end.
    #[tokio::test]
    async fn a_close_that_comes_as_weir_closes_leaves_the_other_end_its_own() {
        let (mut client, from) = duplex(1024);
        let (to, mut upstream) = duplex(1024);
        let begun = b"\x81\x03a".to_vec();
        let (passed, moved) = (Cell::new(0), Cell::new(clock::now()));
        let (closes, closing) = watch::channel(None);
        let way = Way {
            from,
            gather: |_, _| {},
            to,
            first: begun.clone(),
            passed: &passed,
            moved: &moved,
            closing,
            is_up: false,
        };
        let speaks = async {
            let mut heard = vec![0; begun.len()];
            upstream.read_exact(&mut heard).await.unwrap();
            closes.send_replace(Some(GOING_AWAY));
            client.write_all(b"bc\x88\x00").await.unwrap();
            upstream.read_to_end(&mut heard).await.unwrap();
            heard
        };
        let (ended, heard) = tokio::join!(way.pass(), speaks);
        assert_eq!(ended, Ok(()));
        let expected = [&b"\x81\x03abc"[..], &websocket::close(GOING_AWAY, None)].concat();
        assert_eq!(heard, expected);
    }
}
