//! One exchange with the upstream: the checked request goes out, the response comes back, both streamed.

use std::future::poll_fn;
use std::io;
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
use super::outbox::Outbox;
use super::record::Record;
use super::reply::Rejection;
use super::sessions;
use super::upgrade;
use super::upload::{Rest, Upload, beside, put_piece};
use super::wire::{Deadlines, Elapsed, read_some};
use crate::clock;
use crate::http1::body::{BodyReader, Piece};
use crate::http1::head::{BodyLength, HeadLimits, RequestHead};
use crate::http1::response::{ResponseBody, ResponseHead, parse_response};
use crate::plan::Plan;
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
        route: admitted.route,
        client: &admitted.client,
        request_id: &admitted.request_id,
        trace: record.trace.as_ref(),
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
        upstream: upstream_index,
        expects,
        session,
        quota,
        entry,
        ..
    } = admitted;
    let pool = &plan.pools[upstream_index];
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
            .unwrap_or(shared.config.upstreams[upstream_index].timeout),
        read_within: conn.listener.request_read,
        idle: conn.listener.stream_idle,
    };
    buffer.drain(..head.len);
    if expects && buffer.is_empty() {
        ends.write(b"HTTP/1.1 100 Continue\r\n\r\n", request.idle)
            .await?;
    }

    let mut answer = conn.lane.buffers.take();
    let mut upload = Upload::new(&request, &out);
    let exchanged = exchange(&request, pool, ends, &mut upload, &out, &mut answer, record).await;
    record.bytes_in = upload.bytes;
    let (mut upstream, answered) = match exchanged {
        Ok(exchanged) => exchanged,
        Err(failure) => {
            match (end_of(&failure, record), entry) {
                (Some(end), entry) => finish(entry, end, record),
                (None, Some(entry)) => {
                    let waited = record.waited().unwrap_or_default();
                    entry.abandon(waited, clock::mono(), fastrand::f64());
                }
                (None, None) => {}
            }
            return Err(failure);
        }
    };
    let status = answered.head.status;
    let current = session.as_deref();
    let (lane, mut waited) = (conn.lane, quota.waited);
    let told = sessions::follow(
        shared,
        lane,
        route,
        current,
        &answer,
        &answered.head,
        &mut waited,
    );
    let told = match told.await {
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
        changes: &route.response_headers,
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
        let safe = audit::secure(shared, &conn.lane.outbox, record).await;
        safe.map_err(|audit::NotSafe| Rejection::AuditUnavailable)?;
        ends.write(&out, request.idle).await?;
        let (to_client, to_upstream) = (std::mem::take(&mut *answer), std::mem::take(ends.buffer));
        let session_over = sessions::over(shared, conn.lane, route, session.as_deref());
        upgrade::relay(
            (ends.client, to_client),
            (&mut upstream, to_upstream),
            request.idle,
            session_over,
        )
        .await;
        return Ok(Next::Close);
    }
    let streamed = stream_back(
        (shared, &conn.lane.outbox),
        &request,
        &answered,
        &mut upload,
        &mut out,
        &mut answer,
        &mut upstream,
        ends,
        record,
    )
    .await;
    record.bytes_in = upload.bytes;
    match &streamed {
        Ok(_) => finish(entry, End::Status(status), record),
        // The upstream has answered, and the rest is the client's or weir's own.
        Err(
            Failure::ClientGone | Failure::NotSafe | Failure::Reply(Rejection::AuditUnavailable, _),
        ) => finish(entry, End::Status(status), record),
        Err(Failure::UpstreamGone | Failure::Reply(..)) => finish(entry, End::Reset, record),
    }
    let cut_short = matches!(streamed, Err(Failure::UpstreamGone | Failure::NotSafe));
    if request.old_client && cut_short {
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
fn finish(entry: Option<Entry>, end: End, record: &Record) {
    if let Some(entry) = entry {
        let waited = record.waited().unwrap_or_default();
        entry.end(end, waited, clock::mono(), fastrand::f64());
    }
}

/// What a failed exchange says of the upstream; `None` when it says nothing.
fn end_of(failure: &Failure, record: &Record) -> Option<End> {
    let Failure::Reply(rejection, _) = failure else {
        return None;
    };
    match rejection {
        Rejection::ConnectFailed | Rejection::ConnectTimeout => Some(End::ConnectFailed),
        Rejection::UpstreamTimeout => Some(End::TimedOut),
        // One that gives up on a body may have had its reason in the client's pace.
        Rejection::UpstreamBroken => record.sent.map(|_| End::Reset),
        Rejection::BadHead(_)
        | Rejection::BadPath(_)
        | Rejection::BadTarget
        | Rejection::HeadTimeout
        | Rejection::BadBody
        | Rejection::BodyTimeout
        | Rejection::NoRoute
        | Rejection::QuotaExceeded(_)
        | Rejection::LimitUnknown
        | Rejection::CircuitOpen(_)
        | Rejection::Unauthenticated(_)
        | Rejection::Forbidden(_)
        | Rejection::TooManySessions
        | Rejection::SessionsFull
        | Rejection::SessionStoreDown
        | Rejection::AuditUnavailable
        | Rejection::BodyTooLarge
        | Rejection::Expectation => None,
    }
}

/// A checked request as it goes out.
pub(super) struct Request {
    /// How the client frames the body, and so does weir.
    pub body: BodyLength,
    /// Whether the method is HEAD.
    pub to_head: bool,
    /// Whether it does no harm to send it twice.
    pub can_repeat: bool,
    /// Whether a switch of protocols was asked for.
    pub upgrade: bool,
    /// Whether the client speaks HTTP/1.0, which has no chunks.
    pub old_client: bool,
    pub max_body: u64,
    /// For the response's head once the request is sent, and for each stall of an upstream that does not read.
    pub within: Duration,
    /// For the body to be whole, from the head on.
    pub read_within: Duration,
    /// For each stall of the client's, and of the upstream's within a body.
    pub idle: Duration,
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
    upload: &mut Upload,
    head: &[u8],
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<(TcpStream, Answered), Failure> {
    let taken = pool.take(request.can_repeat).await;
    let mut connected = taken.map_err(unreached)?;
    loop {
        let upstream = &mut connected.stream;
        match both_ways(request, ends, upload, head, upstream, answer, record).await {
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

/// Uploads the request while it waits for the response's head. When that comes early, what is left of the upload goes on beside
/// the response.
async fn both_ways(
    request: &Request,
    ends: &mut Ends<'_>,
    upload: &mut Upload,
    head: &[u8],
    upstream: &mut TcpStream,
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<Answered, Failure> {
    record.reached = true;
    record.sent = None;
    let (mut reading, mut writing) = upstream.split();
    let sent = if request.body == BodyLength::None {
        put(request, ends, &mut writing, head)
            .await
            .map_err(Failure::from)
    } else {
        let (mut from_client, _) = ends.client.split();
        tokio::select! {
            biased;
            head = read_final(request, &mut reading, answer) => {
                return Ok(Answered { head: head?, uploaded: false });
            }
            sent = upload.go_on(
                request,
                &mut from_client,
                ends.buffer,
                ends.deadlines,
                &mut writing,
            ) => sent,
        }
    };
    let uploaded = match sent {
        Ok(()) => true,
        // The upstream may have answered before it stopped reading: its answer is worth more than a 502.
        Err(Failure::Reply(Rejection::UpstreamBroken, _)) => false,
        Err(failure) => return Err(failure),
    };
    // Its time begins here: how long the client takes to send says nothing of the upstream.
    let pace_is_ours = request.body == BodyLength::None;
    record.sent = (uploaded || pace_is_ours).then(clock::mono);
    for _ in 0..=MAX_INTERIM {
        let response = unless_gone(ends.client, read_head(request, &mut reading, answer));
        let head = ends.deadlines.within(request.within, response).await;
        let head = head.map_err(|Elapsed| Rejection::UpstreamTimeout)?;
        let head = head.ok_or(Failure::ClientGone)??;
        if !is_interim(&head) {
            record.answered = Some(clock::mono());
            return Ok(Answered { head, uploaded });
        }
        // RFC 9110 section 15.2: all but the answer to an expectation, which was weir's own, and not to HTTP/1.0.
        if head.status != 100 && !request.old_client {
            let mut interim = Vec::new();
            headers::put_interim_head(&mut interim, answer, &head);
            ends.write(&interim, request.idle).await?;
        }
        answer.drain(..head.len);
    }
    Err(Rejection::UpstreamBroken.into())
}

fn is_interim(head: &ResponseHead) -> bool {
    head.status < 200 && head.status != 101
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

/// The final head; interim ones before it are read over.
async fn read_final(
    request: &Request,
    upstream: &mut ReadHalf<'_>,
    answer: &mut Vec<u8>,
) -> Result<ResponseHead, Rejection> {
    for _ in 0..=MAX_INTERIM {
        let head = read_head(request, upstream, answer).await?;
        if !is_interim(&head) {
            return Ok(head);
        }
        answer.drain(..head.len);
    }
    Err(Rejection::UpstreamBroken)
}

/// The next head, interim or final. What was read of it stays in `answer`, so that it can be called again.
async fn read_head(
    request: &Request,
    upstream: &mut ReadHalf<'_>,
    answer: &mut Vec<u8>,
) -> Result<ResponseHead, Rejection> {
    loop {
        let parsed = match answer.is_empty() {
            true => None,
            false => parse_response(answer, request.to_head, HeadLimits::default())
                .map_err(|_| Rejection::UpstreamBroken)?,
        };
        match parsed {
            // A switch that no one asked for is nonsense.
            Some(head) if head.status == 101 && !request.upgrade => {
                return Err(Rejection::UpstreamBroken);
            }
            Some(head) => return Ok(head),
            None => {}
        }
        if read_some(upstream, answer).await.unwrap_or(0) == 0 {
            return Err(Rejection::UpstreamBroken);
        }
    }
}

/// Streams the body that begins at the front of `answer` behind the head in `out`; says whether the upstream's connection can
/// serve another request.
#[expect(
    clippy::too_many_arguments,
    reason = "the request and the response, and both ends of each"
)]
async fn stream_back(
    audited: (&Plan, &Outbox),
    request: &Request,
    answered: &Answered,
    upload: &mut Upload,
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
    let Ends {
        client,
        buffer,
        deadlines,
    } = ends;
    let (from_client, mut to_client) = client.split();
    let (mut from_upstream, to_upstream) = upstream.split();
    let mut rest = (!answered.uploaded).then(|| Rest {
        upload,
        request,
        from_client,
        buffer,
        deadlines: Deadlines::new(),
        to_upstream,
    });
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
        if done {
            if chunked {
                out.extend_from_slice(b"0\r\n\r\n");
            }
            secure(audited, record, told).await?;
        }
        let write = deadlines.within(request.idle, to_client.write_all(out));
        let Ok(Ok(())) = beside(&mut rest, write).await else {
            return Err(Failure::ClientGone);
        };
        told = true;
        out.clear();
        if done {
            break;
        }
        let read = deadlines.within(request.idle, read_some(&mut from_upstream, answer));
        match beside(&mut rest, read).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0)) if until_close => {
                secure(audited, record, told).await?;
                if chunked {
                    let end = to_client.write_all(b"0\r\n\r\n");
                    let Ok(Ok(())) = deadlines.within(request.idle, end).await else {
                        return Err(Failure::ClientGone);
                    };
                }
                return Ok(false);
            }
            // Cut short: only an abort tells the client, since the head is out.
            Ok(Ok(0) | Err(_)) | Err(Elapsed) => return Err(Failure::UpstreamGone),
        }
    }
    Ok(answered.head.keep_alive && answered.uploaded && answer.is_empty())
}

/// Before the end of the response goes out; `told` once its head has.
async fn secure(
    (plan, outbox): (&Plan, &Outbox),
    record: &mut Record,
    told: bool,
) -> Result<(), Failure> {
    let safe = audit::secure(plan, outbox, record).await;
    safe.map_err(|audit::NotSafe| match told {
        true => Failure::NotSafe,
        false => Rejection::AuditUnavailable.into(),
    })
}
