//! The life of a client's connection that speaks HTTP/1.1: heads are read, checked and handed to `http1_to_http1`; what is refused is answered by
//! `reply`. Each exchange says by `Next` whether the connection lives on.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::admit::{self, Way};
use super::answer::Answer;
use super::draft;
use super::exchange::{Conn, Ends, Failure, Next, Peer, answer_on_record, on_record};
use super::following::LaneView;
use super::greet::Guest;
use super::headers;
use super::http1_to_http1;
use super::http2;
use super::idle_closing::IdleClosing;
use super::lane::Lane;
use super::record::{Ongoing, Record};
use super::reply::{Asker, Rejection};
use super::wire::{Buffer, Deadlines, Elapsed, Share, read_first, read_some};
use crate::clock;
use crate::config::Listener;
use crate::http1::body::{BodyReader, Piece};
use crate::http1::head::{self, BodyLength, RequestHead};
use crate::net::stream::{Ahead, Stream};
use crate::net::tls::Protocol;
use crate::policy::limit::Now;

/// How long a client that may still be sending is read from before its connection closes, and how long it may pause; as nginx's
/// `lingering_time` and `lingering_timeout`.
const LINGER: Duration = Duration::from_secs(30);
const LINGER_PAUSE: Duration = Duration::from_secs(5);
/// How long it may take to come, where bodies may take no less.
const SKIPPED_WITHIN: Duration = Duration::from_secs(5);

/// What a request counts for that was sent ahead, before the answer to the one before it, in bytes of a body that cost the lane as much.
const AHEAD: usize = 8 * 1024;

/// Serves a client until it closes, breaks, is refused or stays idle too long. One that begins as HTTP/2 does is served as
/// that (RFC 9113 section 3.3), unless HTTP/1.1 was agreed on.
#[expect(
    clippy::manual_async_fn,
    reason = "an async function has room for its arguments twice, and idle connections are many"
)]
pub(super) fn connection(
    lane: &Rc<Lane>,
    listener_index: usize,
    mut guest: Guest,
) -> impl Future<Output = ()> {
    async move {
        let mut may_switch = guest.agreed.is_none();
        // Who has asked for nothing yet was told nothing, and may be about to ask.
        let mut last_call = &lane.drain;
        if guest.agreed == Some(Protocol::Http2) {
            // Boxed, to keep the common future small.
            return Box::pin(http2_from(lane, listener_index, guest)).await;
        }
        let mut buffer = lane.buffers.take();
        buffer.extend_from_slice(&guest.ahead);
        guest.ahead = Vec::new();
        let mut deadlines = Deadlines::new();
        let mut share = Share::default();
        loop {
            let view = lane.following.current();
            let opening = read_head(
                &view.plan.config.listeners[listener_index],
                &mut guest.stream,
                &mut buffer,
                &mut deadlines,
                std::mem::take(&mut may_switch),
                std::mem::replace(&mut last_call, &lane.leave),
                listener_index,
            );
            let head = match opening.await {
                Ok(Opening::Head(head)) => Ok(head),
                Ok(Opening::Http2) => {
                    guest.ahead = std::mem::take(&mut *buffer);
                    drop((buffer, deadlines));
                    return Box::pin(http2_from(lane, listener_index, guest)).await;
                }
                Ok(Opening::Closed) => return guest.stream.say_all_was_said(),
                Err(rejection) => Err(rejection),
            };
            let ends = Ends {
                client: &mut guest.stream,
                buffer: &mut buffer,
                deadlines: &mut deadlines,
            };
            // Boxed, to keep an idle connection's future small; and made there, where `Box::pin` would move all of it.
            let served = Box::write(
                Box::new_uninit(),
                serve(lane, listener_index, &guest.peer, ends, head),
            );
            let next = Box::into_pin(served).await;
            // What is left to do is done here, where the request is over and holds nothing any more.
            let lives = match next {
                Next::KeepAlive => true,
                Next::Skip(unread) => {
                    let within = view.plan.config.listeners[listener_index].request_read;
                    let ends = Ends {
                        client: &mut guest.stream,
                        buffer: &mut buffer,
                        deadlines: &mut deadlines,
                    };
                    let within = within.min(SKIPPED_WITHIN);
                    Box::pin(skip(lane, listener_index, ends, unread, within)).await
                }
                Next::Close | Next::Cut => return,
                Next::Linger => false,
            };
            if !lives {
                return Box::pin(close(lane, listener_index, &mut guest.stream)).await;
            }
            if !buffer.is_empty() {
                share.take(AHEAD).await;
            }
        }
    }
}

async fn http2_from(lane: &Rc<Lane>, listener_index: usize, guest: Guest) {
    let client = Ahead {
        bytes: guest.ahead,
        stream: guest.stream,
    };
    http2::connection(lane, listener_index, client, guest.peer).await
}

/// Serves the request of this head, or tells why there is none; on record, whatever ends it.
async fn serve(
    lane: &Rc<Lane>,
    listener_index: usize,
    peer: &Peer,
    mut ends: Ends<'_>,
    head: Result<RequestHead, Rejection>,
) -> Next {
    // The plan may be another than when the connection was idle.
    let view = lane.following.current();
    let now = clock::moment();
    let mut ongoing = Ongoing::begin(&view.plan, &lane.outbox, now.mono);
    let record = &mut ongoing.record;
    let conn = Conn {
        lane,
        listener: &view.plan.config.listeners[listener_index],
        peer,
        is_http2: false,
        is_outdated: now.mono >= peer.old_at
            || view.plan.listeners[listener_index].admission != peer.admission,
    };
    let (by_head, old) = head.as_ref().map_or((false, false), |head| {
        let by_head = ends.buffer[head.method.clone()] == *b"HEAD";
        (by_head, head.minor_version == 0)
    });
    let served = match head {
        Ok(head) => one(&conn, &view, &mut ends, &head, now, record).await,
        Err(rejection) => {
            draft::begin_unrouted(&view.plan, &conn, ends.buffer, None, record);
            Err(rejection.into())
        }
    };
    let next = match served {
        Ok(next) => next,
        Err(
            failure @ (Failure::ClientGone
            | Failure::UpstreamGone
            | Failure::NotPersisted
            | Failure::CutShort(_)),
        ) => {
            record.note_aborted(failure.reason());
            Next::Cut
        }
        Err(Failure::Reply(rejection, next)) => {
            let rejection = on_record(&conn, &view, rejection, !by_head, record).await;
            let to = Asker {
                keep_alive: next.lives(),
                without_body: by_head,
                old,
            };
            refuse(&conn, &mut ends, &rejection, to, next).await
        }
    };
    // What is spoken behind a switch of protocols has ended by itself.
    let is_over = next == Next::Close && ongoing.record.status != 101;
    ongoing.ended = true;
    drop(ongoing);
    // Old clients put an empty line behind a body, and others have sent their next request ahead: to close on that would reset the
    // connection, which takes with it what the client has not read of the answer.
    if is_over && !(ends.buffer.is_empty() && ends.client.is_silent(false)) {
        return Next::Linger;
    }
    if next == Next::Close {
        ends.client.say_all_was_said();
    }
    next
}

/// Replies, for a bounded time: a client that asks on and on without reading must not keep its connection.
async fn refuse(
    conn: &Conn<'_>,
    ends: &mut Ends<'_>,
    rejection: &Rejection,
    to: Asker,
    next: Next,
) -> Next {
    let (mut out, mut body) = (conn.lane.buffers.take(), conn.lane.buffers.take());
    rejection.put(&mut out, &mut body, to, &conn.lane.date);
    drop(body);
    give(conn, ends, &out, next).await
}

/// Gives an answer of weir's own that tells so of the connection.
async fn give(conn: &Conn<'_>, ends: &mut Ends<'_>, out: &[u8], next: Next) -> Next {
    match ends.write(out, conn.listener.stream_idle).await {
        Ok(()) if next.lives() => next,
        Ok(()) => Next::Linger,
        Err(_) => Next::Cut,
    }
}

/// Closes a connection on which the client may still be sending: closing on unread bytes would reset it and could take
/// the reply with it (RFC 9112 section 9.6). So that is read away, for a bounded time, which a drain does not wait for.
pub(super) async fn close(lane: &Lane, listener_index: usize, client: &mut Stream) {
    let mut rest = Vec::new();
    let parting = async {
        client.shutdown().await?;
        while timeout(LINGER_PAUSE, read_some(client, &mut rest)).await?? > 0 {
            rest.clear();
        }
        io::Result::Ok(())
    };
    tokio::select! {
        biased;
        _ = timeout(LINGER, parting) => {}
        () = lane.drain.last_call(listener_index) => {}
    }
}

async fn one(
    conn: &Conn<'_>,
    view: &LaneView,
    ends: &mut Ends<'_>,
    head: &RequestHead,
    now: Now,
    record: &mut Record,
) -> Result<Next, Failure> {
    match admit::admit(&view.plan, conn, ends.buffer, head, now, record).await {
        Ok(Way::Upstream(admitted)) => {
            http1_to_http1::send(conn, view, admitted, ends, head, record).await
        }
        Ok(Way::Answer(answer)) => by_itself(conn, view, answer, ends, head, record).await,
        Err(rejection) => {
            let next = match rejection.is_policy() {
                true => next_of(conn, ends, head),
                false => Next::Close,
            };
            Err(Failure::Reply(rejection, next))
        }
    }
}

/// Of a connection on which the request that weir answers was in order: another may follow behind its body, unless that is too
/// long, or may never come. Then the head is taken off, and the body where it is whole.
fn next_of(conn: &Conn<'_>, ends: &mut Ends<'_>, head: &RequestHead) -> Next {
    if !head.keep_alive || conn.is_to_end() {
        return Next::Close;
    }
    let here = &ends.buffer[head.len..];
    let (taken, unread) = match (end_of_body(head.body, here), head.body) {
        (Some(end), _) => (end, 0),
        (None, BodyLength::Fixed(bytes)) => (0, bytes),
        // How long it will be is not known.
        (None, BodyLength::None | BodyLength::Chunked) => return Next::Close,
    };
    // A client that waits to be asked for its body sends none behind an answer.
    if unread > 0 && headers::expects_continue(ends.buffer, head) != Ok(false) {
        return Next::Close;
    }
    let next = Next::behind(unread);
    if next.lives() {
        ends.buffer.drain(..head.len + taken);
    }
    next
}

/// Where the body that begins at the front of `bytes` ends, if it is whole and in order.
fn end_of_body(length: BodyLength, bytes: &[u8]) -> Option<usize> {
    let mut reader = BodyReader::new(length);
    let mut end = 0;
    loop {
        match reader.next(&bytes[end..]).ok()? {
            Piece::Data { consumed, .. } => end += consumed,
            Piece::End { consumed } => return Some(end + consumed),
            Piece::NeedMore { .. } => return None,
        }
    }
}

/// Gives the answer that the route has by itself.
async fn by_itself(
    conn: &Conn<'_>,
    view: &LaneView,
    answer: Answer<'_>,
    ends: &mut Ends<'_>,
    head: &RequestHead,
    record: &mut Record,
) -> Result<Next, Failure> {
    let by_head = ends.buffer[head.method.clone()] == *b"HEAD";
    let next = next_of(conn, ends, head);
    let safe = answer_on_record(conn, view, &answer, !by_head, record).await;
    safe.map_err(|rejection| Failure::Reply(rejection, next))?;
    let to = Asker {
        keep_alive: next.lives(),
        without_body: by_head,
        old: head.minor_version == 0,
    };
    let mut out = conn.lane.buffers.take();
    answer.put(&mut out, to, &conn.lane.date);
    Ok(give(conn, ends, &out, next).await)
}

/// Reads away so many bytes of a body, and none behind them; whether they came in time, and before a drain's last call was over.
async fn skip(
    lane: &Lane,
    listener_index: usize,
    ends: Ends<'_>,
    unread: u32,
    within: Duration,
) -> bool {
    let Ends {
        client,
        buffer,
        deadlines,
    } = ends;
    let mut unread = unread as usize;
    let skipped = async {
        loop {
            let here = buffer.len().min(unread);
            buffer.drain(..here);
            unread -= here;
            if unread == 0 {
                return true;
            }
            match read_some(client, buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return false,
            }
        }
    };
    tokio::select! {
        biased;
        skipped = deadlines.within(within, skipped) => skipped.unwrap_or(false),
        () = lane.drain.last_call(listener_index) => false,
    }
}

/// What a client begins with.
enum Opening {
    Head(RequestHead),
    /// The preface of HTTP/2, or a part of it that is nothing else.
    Http2,
    /// It closed or stayed idle, which is no fault.
    Closed,
}

/// What every connection of HTTP/2 begins with (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Reads until a head is whole, or it is clear that the client speaks HTTP/2, where it still `may_switch`.
async fn read_head(
    listener: &Listener,
    client: &mut Stream,
    buffer: &mut Buffer<'_>,
    deadlines: &mut Deadlines,
    may_switch: bool,
    end: &IdleClosing,
    listener_index: usize,
) -> Result<Opening, Rejection> {
    // An empty line ahead of a request is some clients' end of the body before it (RFC 9112 section 2.2).
    let mut may_skip = true;
    loop {
        if buffer.is_empty() {
            buffer.rest();
            // A request that is here already is served, even at the end of the last call.
            tokio::select! {
                biased;
                read = deadlines.within(listener.keep_alive, read_first(client, buffer)) => match read {
                    Ok(Ok(1..)) => {}
                    Ok(Ok(0) | Err(_)) | Err(Elapsed) => return Ok(Opening::Closed),
                },
                () = end.last_call(listener_index) => return Ok(Opening::Closed),
            }
        }
        if !(may_skip && buffer.starts_with(b"\r\n")) {
            break;
        }
        buffer.drain(..b"\r\n".len());
        may_skip = false;
    }
    let whole = async {
        loop {
            // No method is "PRI", so that nothing else begins like it.
            let is_preface =
                may_switch && PREFACE.starts_with(&buffer[..buffer.len().min(PREFACE.len())]);
            if is_preface && buffer.len() >= "PRI ".len() {
                return Ok(Opening::Http2);
            }
            if !is_preface
                && let Some(head) =
                    head::parse_request(buffer, listener.head_limits).map_err(Rejection::BadHead)?
            {
                return Ok(Opening::Head(head));
            }
            match read_some(client, buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return Ok(Opening::Closed),
            }
        }
    };
    let read = deadlines.within(listener.header_read, whole).await;
    read.unwrap_or(Err(Rejection::HeadTimeout))
}

#[cfg(test)]
mod tests {
    use super::super::greet::greet;
    use std::net::SocketAddr;

    use super::*;
    use crate::net::clients::Counted;
    use crate::net::stream::Socket;

    /// What is moved with each request, and what each idle connection has room for, in bytes.
    #[test]
    fn futures_stay_small() {
        fn greeted<'a, F>(
            _: impl FnOnce(&'a Rc<Lane>, usize, Socket, Option<SocketAddr>, Option<Box<Counted>>) -> F,
        ) -> usize {
            size_of::<F>()
        }
        fn served<'a, F>(
            _: impl FnOnce(&'a Rc<Lane>, usize, &'a Peer, Ends<'a>, Result<RequestHead, Rejection>) -> F,
        ) -> usize {
            size_of::<F>()
        }
        assert!(greeted(greet) <= 896, "{}", greeted(greet));
        assert!(served(serve) <= 5_120, "{}", served(serve));
    }
}
