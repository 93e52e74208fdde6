//! One exchange with the upstream: the checked request goes out, the response comes back, both streamed.

use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::admit::Admitted;
use super::audit;
use super::following::LanePlan;
use super::handle::{Conn, Failure, Next, close, read_some, write_all};
use super::headers;
use super::record::Record;
use super::reply::Rejection;
use super::sessions;
use super::upgrade;
use crate::clock;
use crate::http1::body::{BodyReader, Piece};
use crate::http1::head::{BodyLength, HeadLimits, RequestHead};
use crate::http1::response::{ResponseBody, ResponseHead, parse_response};
use crate::store::breakers::{End, Entry};
use crate::upstream::Pool;

/// Interim responses taken before the final one; more is a flood.
const MAX_INTERIM: usize = 16;

/// Sends the request whose head stands at the front of `buffer` and streams the response back. On return `buffer` holds
/// what the client sent behind the request.
pub(super) async fn send(
    conn: &Conn<'_>,
    plan: &LanePlan,
    admitted: Admitted<'_>,
    client: &mut TcpStream,
    buffer: &mut Vec<u8>,
    head: &RequestHead,
    record: &mut Record,
) -> Result<Next, Failure> {
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
    let head_out = headers::request_head(buffer, head, &passed, conn.peer, switch_to.as_deref());
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
        idle: conn.listener.stream_idle,
        head: head_out,
    };
    buffer.drain(..head.len);
    if expects && buffer.is_empty() {
        client
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
            .await
            .map_err(|_| Failure::ClientGone)?;
    }

    let began = clock::now();
    let mut answer = Vec::new();
    let exchanged = exchange(&request, pool, client, buffer, &mut answer, record).await;
    let (upstream, answered) = match exchanged {
        Ok(exchanged) => exchanged,
        Err(rejection) => {
            if let Some(end) = end_of(&rejection) {
                finish(entry, end, began);
            }
            return Err(rejection.into());
        }
    };
    let mut told = Vec::new();
    quota.tell(&mut told);
    let now = clock::moment().mono;
    if let Err(rejection) = sessions::follow(
        shared,
        route,
        session.as_deref(),
        &answer,
        &answered.head,
        now,
        &mut told,
    ) {
        finish(entry, End::Status(answered.head.status), began);
        return Err(rejection.into());
    }
    record.status = answered.head.status;
    audit::responded(shared, route.audit, record, &answer, &answered.head);
    // What is left of a body cut off by an early response cannot be told from a next request.
    let next = if head.keep_alive && answered.uploaded {
        Next::KeepAlive
    } else {
        Next::Close
    };
    if answered.head.status == 101 {
        finish(entry, End::Status(101), began);
        let switched = headers::response_head(
            &answer,
            &answered.head,
            false,
            Next::Close,
            switch_to.as_deref(),
            &told,
        );
        write_within(client, request.idle, &switched).await?;
        answer.drain(..answered.head.len);
        let draining = conn.lane.draining.clone();
        upgrade::relay(
            client,
            &upstream,
            answer,
            std::mem::take(buffer),
            request.idle,
            draining,
        )
        .await;
        return Ok(Next::Close);
    }
    let streamed = stream_back(
        &request, &answered, &told, answer, &upstream, client, next, record,
    )
    .await;
    match &streamed {
        Ok(_) => finish(entry, End::Status(answered.head.status), began),
        Err(Failure::UpstreamGone | Failure::Reply(..)) => finish(entry, End::Reset, began),
        // The client's fault: the entry is dropped, which counts for nothing.
        Err(Failure::ClientGone) => {}
    }
    record.upstream = Some(began.elapsed());
    if request.old_client && matches!(streamed, Err(Failure::UpstreamGone)) {
        // Without chunks a plain close would say that the body is whole; a reset does not.
        let _ = SockRef::from(&*client).set_linger(Some(Duration::ZERO));
    }
    let (next, reusable) = streamed?;
    if reusable {
        pool.give_back(upstream);
    }
    if !answered.uploaded {
        close(client).await;
    }
    Ok(next)
}

fn finish(entry: Option<Entry>, end: End, began: Instant) {
    if let Some(entry) = entry {
        entry.end(end, began.elapsed(), clock::moment().mono, fastrand::f64());
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
    /// The head, ready for the wire.
    head: Vec<u8>,
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
    /// For each stall of the client's, and of the upstream's within a body.
    idle: Duration,
}

/// A response's head, and whether the whole request was sent before it came.
struct Answered {
    head: ResponseHead,
    uploaded: bool,
}

/// Sends the request over a connection of the pool's. The response's head comes to stand at the front of `answer`.
async fn exchange(
    request: &Request,
    pool: &Pool,
    client: &TcpStream,
    buffer: &mut Vec<u8>,
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<(TcpStream, Answered), Rejection> {
    let mut connected = pool.take().await.map_err(unreached)?;
    loop {
        let upstream = &connected.stream;
        match both_ways(request, client, buffer, upstream, answer, record).await {
            Ok(answered) => return Ok((connected.stream, answered)),
            // The upstream may have closed the idle connection just as the request came; it is sent again only where that
            // can do no harm, since the upstream may have seen it.
            Err(Rejection::UpstreamBroken)
                if connected.reused && request.can_repeat && answer.is_empty() =>
            {
                connected = pool.connect().await.map_err(unreached)?;
            }
            Err(rejection) => return Err(rejection),
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
    client: &TcpStream,
    buffer: &mut Vec<u8>,
    upstream: &TcpStream,
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<Answered, Rejection> {
    let mut response = pin!(read_response(request, upstream, answer));
    let sent = tokio::select! {
        biased;
        head = &mut response => return head.map(|head| Answered { head, uploaded: false }),
        sent = upload(request, client, buffer, upstream, record) => sent,
    };
    let uploaded = match sent {
        Ok(()) => true,
        // The upstream may have answered before it stopped reading: its answer is worth more than a 502.
        Err(Rejection::UpstreamBroken) => false,
        Err(rejection) => return Err(rejection),
    };
    // Its time begins here: how long the client takes to send says nothing of the upstream.
    let head = timeout(request.within, response).await;
    let head = head.unwrap_or(Err(Rejection::UpstreamTimeout))?;
    Ok(Answered { head, uploaded })
}

async fn upload(
    request: &Request,
    client: &TcpStream,
    buffer: &mut Vec<u8>,
    upstream: &TcpStream,
    record: &mut Record,
) -> Result<(), Rejection> {
    let put = async |bytes: &[u8]| match timeout(request.within, write_all(upstream, bytes)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Rejection::UpstreamBroken),
        Err(_) => Err(Rejection::UpstreamTimeout),
    };
    put(&request.head).await?;
    let mut reader = BodyReader::new(request.body);
    let mut left = request.max_body;
    let mut chunk = Vec::new();
    while !reader.is_done() {
        chunk.clear();
        let consumed = match reader.next(buffer).map_err(|_| Rejection::BadBody)? {
            Piece::Data { data, consumed } => {
                record.bytes_in += data.len() as u64;
                left = left
                    .checked_sub(data.len() as u64)
                    .ok_or(Rejection::BodyTooLarge)?;
                put_piece(
                    &mut chunk,
                    &buffer[data],
                    request.body == BodyLength::Chunked,
                );
                consumed
            }
            Piece::NeedMore { consumed } | Piece::End { consumed } => consumed,
        };
        buffer.drain(..consumed);
        put(&chunk).await?;
        if buffer.is_empty() && !reader.is_done() {
            match timeout(request.idle, read_some(client, buffer)).await {
                Ok(Ok(1..)) => {}
                Ok(Ok(0) | Err(_)) => return Err(Rejection::BadBody),
                Err(_) => return Err(Rejection::BodyTimeout),
            }
        }
    }
    if request.body == BodyLength::Chunked {
        put(b"0\r\n\r\n").await?;
    }
    Ok(())
}

async fn read_response(
    request: &Request,
    upstream: &TcpStream,
    answer: &mut Vec<u8>,
) -> Result<ResponseHead, Rejection> {
    for _ in 0..=MAX_INTERIM {
        let head = loop {
            let parsed = parse_response(answer, request.to_head, HeadLimits::default());
            if let Some(head) = parsed.map_err(|_| Rejection::UpstreamBroken)? {
                break head;
            }
            if read_some(upstream, answer).await.unwrap_or(0) == 0 {
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

/// Streams the response whose head stands at the front of `answer`, with the fields `told`; says what becomes of the
/// client's connection, and whether the upstream's can serve another request.
#[expect(
    clippy::too_many_arguments,
    reason = "the response, and both ends of it"
)]
async fn stream_back(
    request: &Request,
    answered: &Answered,
    told: &[u8],
    mut answer: Vec<u8>,
    upstream: &TcpStream,
    client: &mut TcpStream,
    next: Next,
    record: &mut Record,
) -> Result<(Next, bool), Failure> {
    let (response, idle) = (&answered.head, request.idle);
    let (mut reader, until_close) = match response.body {
        ResponseBody::Length(length) => (BodyReader::new(length), false),
        ResponseBody::UntilClose => (BodyReader::new(BodyLength::Fixed(u64::MAX)), true),
    };
    let chunked = response.body == ResponseBody::Length(BodyLength::Chunked) || until_close;
    // HTTP/1.0 has no chunks: the end of the connection ends the body.
    let next = if chunked && request.old_client {
        Next::Close
    } else {
        next
    };
    let chunked = chunked && !request.old_client;
    let mut out = headers::response_head(&answer, response, chunked, next, None, told);
    answer.drain(..response.len);
    let mut told = false;
    loop {
        let piece = reader.next(&answer).map_err(|_| match told {
            true => Failure::UpstreamGone,
            false => Failure::from(Rejection::UpstreamBroken),
        })?;
        let (consumed, done) = match piece {
            Piece::Data { data, consumed } => {
                record.bytes_out += data.len() as u64;
                put_piece(&mut out, &answer[data], chunked);
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
        write_within(client, idle, &out).await?;
        told = true;
        out.clear();
        if done {
            break;
        }
        match timeout(idle, read_some(upstream, &mut answer)).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0)) if until_close => {
                if chunked {
                    write_within(client, idle, b"0\r\n\r\n").await?;
                }
                return Ok((next, false));
            }
            // Cut short: only an abort tells the client, since the head is out.
            Ok(Ok(0) | Err(_)) | Err(_) => return Err(Failure::UpstreamGone),
        }
    }
    Ok((
        next,
        response.keep_alive && answered.uploaded && answer.is_empty(),
    ))
}

async fn write_within(
    client: &mut TcpStream,
    within: Duration,
    bytes: &[u8],
) -> Result<(), Failure> {
    match timeout(within, client.write_all(bytes)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Failure::ClientGone),
    }
}

fn put_piece(out: &mut Vec<u8>, data: &[u8], chunked: bool) {
    if chunked {
        out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
    }
    out.extend_from_slice(data);
    if chunked {
        out.extend_from_slice(b"\r\n");
    }
}
