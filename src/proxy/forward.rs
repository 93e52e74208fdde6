//! One exchange with the upstream: the checked request goes out, the response comes back, both streamed.

use std::future::poll_fn;
use std::io::{self, Write as _};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::admit::Admitted;
use super::audit;
use super::following::LanePlan;
use super::handle::{Conn, Ends, Failure, Next, close};
use super::headers;
use super::record::Record;
use super::reply::Rejection;
use super::sessions;
use super::upgrade;
use super::wire::{Elapsed, read_some};
use crate::clock;
use crate::http1::body::{BodyReader, Piece};
use crate::http1::head::{BodyLength, HeadLimits, RequestHead};
use crate::http1::response::{ResponseBody, ResponseHead, parse_response};
use crate::store::breakers::{End, Entry};
use crate::upstream::Pool;

/// Interim responses taken before the final one; more is a flood.
const MAX_INTERIM: usize = 16;

/// Sends the request whose head stands at the front of the client's buffer and streams the response back. On return the
/// buffer holds what the client sent behind the request.
pub(super) async fn send(
    conn: &Conn<'_>,
    plan: &LanePlan,
    admitted: Admitted<'_>,
    ends: &mut Ends<'_>,
    head: &RequestHead,
    record: &mut Record,
) -> Result<Next, Failure> {
    let buffer = &mut *ends.buffer;
    let switch_to = headers::upgrade(buffer, head);
    let asks = admitted.route.session.as_ref();
    let identity = admitted.session.as_deref().zip(asks);
    let passed = headers::Passed {
        target: &admitted.target,
        client: &admitted.client,
        request_id: &admitted.request_id,
        identity_fields: &admitted.plan.identity_fields,
        identity: identity
            .map(|(session, asks)| (&admitted.plan.sessions[asks.sessions].settings, session)),
    };
    // What goes out: the request's head first, later the response's.
    let mut out = conn.lane.buffers.take();
    headers::put_request_head(
        &mut out,
        buffer,
        head,
        &passed,
        conn.peer,
        switch_to.as_deref(),
    );
    let Admitted {
        plan: shared,
        route,
        expects,
        session,
        quota,
        entry,
        ..
    } = admitted;
    let pool = &plan.pools[route.upstream];
    let method = &buffer[head.method.clone()];
    let is_safe = [&b"GET"[..], b"HEAD", b"OPTIONS"].contains(&method);
    let request = Request {
        body: head.body,
        to_head: method == b"HEAD",
        can_repeat: is_safe && head.body == BodyLength::None,
        upgrade: switch_to.is_some(),
        old_client: head.minor_version == 0,
        max_body: conn.listener.max_body,
        within: route
            .timeout
            .unwrap_or(shared.config.upstreams[route.upstream].timeout),
        read_within: conn.listener.request_read,
        idle: conn.listener.stream_idle,
    };
    buffer.drain(..head.len);
    if expects && buffer.is_empty() {
        ends.write(b"HTTP/1.1 100 Continue\r\n\r\n", request.idle)
            .await?;
    }

    let mut answer = conn.lane.buffers.take();
    let exchanged = exchange(&request, pool, ends, &out, &mut answer, record).await;
    let (mut upstream, answered) = match exchanged {
        Ok(exchanged) => exchanged,
        Err(failure) => {
            if let Failure::Reply(rejection, _) = &failure
                && let Some(end) = end_of(rejection)
            {
                finish(entry, end, record);
            }
            return Err(failure);
        }
    };
    let status = answered.head.status;
    let current = session.as_deref();
    let told = sessions::follow(shared, route, current, &answer, &answered.head);
    let told = match told {
        Ok(told) => told,
        Err(rejection) => {
            finish(entry, End::Status(status), record);
            return Err(rejection.into());
        }
    };
    record.status = status;
    audit::responded(shared, route.audit, record, &answer, &answered.head);
    // What is left of a body cut off by an early response cannot be told from a next request.
    let draining = *conn.lane.draining.borrow();
    let next = match head.keep_alive && answered.uploaded && status != 101 && !draining {
        true => Next::KeepAlive,
        false => Next::Close,
    };
    let back = headers::Back {
        chunked: answered.chunked(),
        old_client: request.old_client,
        next,
        switched: switch_to.as_deref().filter(|_| status == 101),
    };
    out.clear();
    let next = headers::put_response_head(&mut out, &answer, &answered.head, &back, |out| {
        quota.tell(out);
        out.extend_from_slice(&told);
    });
    answer.drain(..answered.head.len);
    if status == 101 {
        finish(entry, End::Status(101), record);
        ends.write(&out, request.idle).await?;
        let draining = conn.lane.draining.clone();
        let (to_client, to_upstream) = (std::mem::take(&mut *answer), std::mem::take(ends.buffer));
        upgrade::relay(
            (ends.client, to_client),
            (&mut upstream, to_upstream),
            request.idle,
            draining,
        )
        .await;
        return Ok(Next::Close);
    }
    let streamed = stream_back(
        &request,
        &answered,
        &mut out,
        &mut answer,
        &mut upstream,
        ends,
        record,
    )
    .await;
    match &streamed {
        Ok(_) => finish(entry, End::Status(status), record),
        Err(Failure::UpstreamGone | Failure::Reply(..)) => finish(entry, End::Reset, record),
        // The client's fault: the entry is dropped, which counts for nothing.
        Err(Failure::ClientGone) => record.upstream = Some(record.elapsed()),
    }
    if request.old_client && matches!(streamed, Err(Failure::UpstreamGone)) {
        // Without chunks a plain close would say that the body is whole; a reset does not.
        let _ = SockRef::from(&*ends.client).set_linger(Some(Duration::ZERO));
    }
    let reusable = streamed?;
    if reusable {
        pool.give_back(upstream);
    }
    if !answered.uploaded {
        close(ends.client).await;
    }
    Ok(next)
}

/// The upstream's part is over.
fn finish(entry: Option<Entry>, end: End, record: &mut Record) {
    let now = clock::mono();
    let took = now.saturating_sub(record.began);
    record.upstream = Some(took);
    if let Some(entry) = entry {
        entry.end(end, took, now, fastrand::f64());
    }
}

/// What a failed exchange says of the upstream; `None` when it was not its fault.
fn end_of(rejection: &Rejection) -> Option<End> {
    match rejection {
        Rejection::ConnectFailed | Rejection::ConnectTimeout => Some(End::ConnectFailed),
        Rejection::UpstreamTimeout => Some(End::TimedOut),
        Rejection::UpstreamBroken => Some(End::Reset),
        Rejection::BadHead(_)
        | Rejection::BadPath(_)
        | Rejection::BadTarget
        | Rejection::HeadTimeout
        | Rejection::BadBody
        | Rejection::BodyTimeout
        | Rejection::NoRoute
        | Rejection::QuotaExceeded(_)
        | Rejection::CircuitOpen(_)
        | Rejection::Unauthenticated(_)
        | Rejection::Forbidden(_)
        | Rejection::TooManySessions
        | Rejection::SessionsFull
        | Rejection::BodyTooLarge
        | Rejection::Expectation => None,
    }
}

/// A checked request as it goes out.
struct Request {
    /// How the client frames the body, and so does weir.
    body: BodyLength,
    /// Whether the method is HEAD.
    to_head: bool,
    /// Whether it does no harm to send it twice.
    can_repeat: bool,
    /// Whether a switch of protocols was asked for.
    upgrade: bool,
    /// Whether the client speaks HTTP/1.0, which has no chunks.
    old_client: bool,
    max_body: u64,
    /// For the response's head once the request is sent, and for each stall of an upstream that does not read.
    within: Duration,
    /// For the body to be whole, from the head on.
    read_within: Duration,
    /// For each stall of the client's, and of the upstream's within a body.
    idle: Duration,
}

/// A response's head, and whether the whole request was sent before it came.
struct Answered {
    head: ResponseHead,
    uploaded: bool,
}

impl Answered {
    /// Whether the body goes out in chunks, to a client that knows them.
    fn chunked(&self) -> bool {
        match self.head.body {
            ResponseBody::Length(BodyLength::Chunked) | ResponseBody::UntilClose => true,
            ResponseBody::Length(BodyLength::None | BodyLength::Fixed(_)) => false,
        }
    }
}

/// Sends the request, whose head is `head`, over a connection of the pool's. The response's head comes to stand at the front
/// of `answer`.
async fn exchange(
    request: &Request,
    pool: &Pool,
    ends: &mut Ends<'_>,
    head: &[u8],
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<(TcpStream, Answered), Failure> {
    let taken = pool.take(request.can_repeat).await;
    let mut connected = taken.map_err(unreached)?;
    loop {
        let upstream = &mut connected.stream;
        match both_ways(request, ends, head, upstream, answer, record).await {
            Ok(answered) => return Ok((connected.stream, answered)),
            // The upstream may have closed the idle connection just as the request came; it is sent again only where that
            // can do no harm, since the upstream may have seen it.
            Err(Failure::Reply(Rejection::UpstreamBroken, _))
                if connected.reused && request.can_repeat && answer.is_empty() =>
            {
                connected = pool.connect().await.map_err(unreached)?;
            }
            Err(failure) => return Err(failure),
        }
    }
}

fn unreached(error: io::Error) -> Rejection {
    match error.kind() {
        io::ErrorKind::TimedOut => Rejection::ConnectTimeout,
        _ => Rejection::ConnectFailed,
    }
}

/// Uploads the request while it waits for the response's head. A response that comes early ends the upload.
async fn both_ways(
    request: &Request,
    ends: &mut Ends<'_>,
    head: &[u8],
    upstream: &mut TcpStream,
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<Answered, Failure> {
    let (reading, mut writing) = upstream.split();
    let mut response = pin!(read_response(request, reading, answer));
    let uploaded = if request.body == BodyLength::None {
        put(request, ends, &mut writing, head).await
    } else {
        tokio::select! {
            biased;
            head = &mut response => return Ok(Answered { head: head?, uploaded: false }),
            sent = upload(request, ends, head, &mut writing, record) => sent,
        }
    };
    let uploaded = match uploaded {
        Ok(()) => true,
        // The upstream may have answered before it stopped reading: its answer is worth more than a 502.
        Err(Rejection::UpstreamBroken) => false,
        Err(rejection) => return Err(rejection.into()),
    };
    // Its time begins here: how long the client takes to send says nothing of the upstream.
    let unless_gone = unless_gone(ends.client, response);
    let head = ends.deadlines.within(request.within, unless_gone).await;
    let head = head.map_err(|Elapsed| Rejection::UpstreamTimeout)?;
    let head = head.ok_or(Failure::ClientGone)??;
    Ok(Answered { head, uploaded })
}

/// What `waited` gives; `None` once the client has left. A client that sends on is there, and is not looked at again.
async fn unless_gone<F: Future>(client: &TcpStream, waited: F) -> Option<F::Output> {
    let mut waited = pin!(waited);
    let mut looking = true;
    poll_fn(|cx| {
        if let Poll::Ready(output) = waited.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        let mut byte = [0];
        let mut byte = ReadBuf::new(&mut byte);
        match looking.then(|| client.poll_peek(cx, &mut byte)) {
            None | Some(Poll::Pending) => Poll::Pending,
            Some(Poll::Ready(Ok(1..))) => {
                looking = false;
                Poll::Pending
            }
            Some(Poll::Ready(Ok(0) | Err(_))) => Poll::Ready(None),
        }
    })
    .await
}

async fn put(
    request: &Request,
    ends: &mut Ends<'_>,
    upstream: &mut WriteHalf<'_>,
    bytes: &[u8],
) -> Result<(), Rejection> {
    let written = ends
        .deadlines
        .within(request.within, upstream.write_all(bytes))
        .await;
    match written {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Rejection::UpstreamBroken),
        Err(Elapsed) => Err(Rejection::UpstreamTimeout),
    }
}

async fn upload(
    request: &Request,
    ends: &mut Ends<'_>,
    head: &[u8],
    upstream: &mut WriteHalf<'_>,
    record: &mut Record,
) -> Result<(), Rejection> {
    put(request, ends, upstream, head).await?;
    let mut reader = BodyReader::new(request.body);
    let mut left = request.max_body;
    let mut chunk = Vec::new();
    while !reader.is_done() {
        chunk.clear();
        let consumed = match reader.next(ends.buffer).map_err(|_| Rejection::BadBody)? {
            Piece::Data { data, consumed } => {
                record.bytes_in += data.len() as u64;
                left = left
                    .checked_sub(data.len() as u64)
                    .ok_or(Rejection::BodyTooLarge)?;
                put_piece(
                    &mut chunk,
                    &ends.buffer[data],
                    request.body == BodyLength::Chunked,
                );
                consumed
            }
            Piece::NeedMore { consumed } | Piece::End { consumed } => consumed,
        };
        ends.buffer.drain(..consumed);
        put(request, ends, upstream, &chunk).await?;
        if ends.buffer.is_empty() && !reader.is_done() {
            let read = read_some(ends.client, ends.buffer);
            let left = request.read_within.saturating_sub(record.elapsed());
            match ends.deadlines.within(request.idle.min(left), read).await {
                Ok(Ok(1..)) => {}
                Ok(Ok(0) | Err(_)) => return Err(Rejection::BadBody),
                Err(Elapsed) => return Err(Rejection::BodyTimeout),
            }
        }
    }
    if request.body == BodyLength::Chunked {
        put(request, ends, upstream, b"0\r\n\r\n").await?;
    }
    Ok(())
}

async fn read_response(
    request: &Request,
    mut upstream: ReadHalf<'_>,
    answer: &mut Vec<u8>,
) -> Result<ResponseHead, Rejection> {
    for _ in 0..=MAX_INTERIM {
        let head = loop {
            let parsed = match answer.is_empty() {
                true => None,
                false => parse_response(answer, request.to_head, HeadLimits::default())
                    .map_err(|_| Rejection::UpstreamBroken)?,
            };
            if let Some(head) = parsed {
                break head;
            }
            if read_some(&mut upstream, answer).await.unwrap_or(0) == 0 {
                return Err(Rejection::UpstreamBroken);
            }
        };
        match head.status {
            101 if request.upgrade => return Ok(head),
            // A switch that no one asked for is nonsense.
            101 => break,
            100..=199 => drop(answer.drain(..head.len)),
            _ => return Ok(head),
        }
    }
    Err(Rejection::UpstreamBroken)
}

/// Streams the body that begins at the front of `answer` behind the head in `out`; says whether the upstream's connection can
/// serve another request.
async fn stream_back(
    request: &Request,
    answered: &Answered,
    out: &mut Vec<u8>,
    answer: &mut Vec<u8>,
    upstream: &mut TcpStream,
    ends: &mut Ends<'_>,
    record: &mut Record,
) -> Result<bool, Failure> {
    let (mut reader, until_close) = match answered.head.body {
        ResponseBody::Length(length) => (BodyReader::new(length), false),
        ResponseBody::UntilClose => (BodyReader::new(BodyLength::Fixed(u64::MAX)), true),
    };
    let chunked = answered.chunked() && !request.old_client;
    let mut told = false;
    loop {
        let piece = reader.next(answer).map_err(|_| match told {
            true => Failure::UpstreamGone,
            false => Failure::from(Rejection::UpstreamBroken),
        })?;
        let (consumed, done) = match piece {
            Piece::Data { data, consumed } => {
                record.bytes_out += data.len() as u64;
                put_piece(out, &answer[data], chunked);
                (consumed, false)
            }
            Piece::NeedMore { consumed } => (consumed, false),
            Piece::End { consumed } => (consumed, true),
        };
        answer.drain(..consumed);
        let done = done || reader.is_done();
        if !done && !answer.is_empty() {
            continue;
        }
        if done && chunked {
            out.extend_from_slice(b"0\r\n\r\n");
        }
        ends.write(out, request.idle).await?;
        told = true;
        out.clear();
        if done {
            break;
        }
        let read = read_some(upstream, answer);
        match ends.deadlines.within(request.idle, read).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0)) if until_close => {
                if chunked {
                    ends.write(b"0\r\n\r\n", request.idle).await?;
                }
                return Ok(false);
            }
            // Cut short: only an abort tells the client, since the head is out.
            Ok(Ok(0) | Err(_)) | Err(Elapsed) => return Err(Failure::UpstreamGone),
        }
    }
    Ok(answered.head.keep_alive && answered.uploaded && answer.is_empty())
}

fn put_piece(out: &mut Vec<u8>, data: &[u8], chunked: bool) {
    if chunked {
        let _ = write!(out, "{:x}\r\n", data.len());
    }
    out.extend_from_slice(data);
    if chunked {
        out.extend_from_slice(b"\r\n");
    }
}
