//! One exchange with the upstream: the checked request goes out, the response comes back, both streamed.

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::admit::Admitted;
use super::handle::{Failure, Next, read_some, write_all};
use super::headers;
use super::lane::Lane;
use super::plan::LanePlan;
use super::reply::Rejection;
use super::upgrade;
use crate::config::Listener;
use crate::http1::body::{BodyReader, Piece};
use crate::http1::head::{BodyLength, HeadLimits, RequestHead};
use crate::http1::response::{ResponseBody, ResponseHead, parse_response};

/// Interim responses taken before the final one; more is a flood.
const MAX_INTERIM: usize = 16;

/// Sends the request whose head stands at the front of `buffer` and streams the response back. On return `buffer` holds
/// what the client sent behind the request.
#[expect(
    clippy::too_many_arguments,
    reason = "the request, and both ends of it"
)]
pub(super) async fn send(
    lane: &Lane,
    plan: &LanePlan,
    listener: &Listener,
    admitted: Admitted<'_>,
    peer: SocketAddr,
    client: &mut TcpStream,
    buffer: &mut Vec<u8>,
    head: &RequestHead,
) -> Result<Next, Failure> {
    let Admitted {
        route,
        target,
        client: client_is,
        expects,
        quota,
    } = admitted;
    let max_body = listener.max_body;
    let pool = &plan.pools[route.upstream];
    let within = route
        .timeout
        .unwrap_or(plan.shared.config.upstreams[route.upstream].timeout);
    let switch_to = headers::upgrade(buffer, head);
    let out = headers::request_head(
        buffer,
        head,
        &target,
        &client_is,
        peer,
        switch_to.as_deref(),
    );
    let to_head = &buffer[head.method.clone()] == b"HEAD";
    let is_safe = [&b"GET"[..], b"HEAD", b"OPTIONS"].contains(&&buffer[head.method.clone()]);
    let can_repeat = is_safe && head.body == BodyLength::None;
    let next = if head.keep_alive {
        Next::KeepAlive
    } else {
        Next::Close
    };
    let old_client = head.minor_version == 0;
    buffer.drain(..head.len);

    let mut connected = pool.take().await.map_err(|_| Rejection::ConnectFailed)?;
    if expects && buffer.is_empty() {
        client
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
            .await
            .map_err(|_| Failure::Abort)?;
    }
    let request = Request {
        head: out,
        body: head.body,
        to_head,
        upgrade: switch_to.is_some(),
        max_body,
        within,
    };
    let mut answer = Vec::new();
    let answered = match exchange(&request, client, buffer, &connected.stream, &mut answer).await {
        // The upstream may have closed the idle connection just as the request came; it is sent again only where that
        // can do no harm, since the upstream may have seen it.
        Err(Rejection::UpstreamBroken) if connected.reused && can_repeat && answer.is_empty() => {
            connected = pool.connect().await.map_err(|_| Rejection::ConnectFailed)?;
            exchange(&request, client, buffer, &connected.stream, &mut answer).await?
        }
        done => done?,
    };
    // What is left of a body cut off by an early response cannot be told from a next request.
    let next = if answered.uploaded { next } else { Next::Close };
    let upstream = &connected.stream;
    if answered.head.status == 101 {
        let switched = headers::response_head(
            &answer,
            &answered.head,
            false,
            Next::Close,
            switch_to.as_deref(),
            &quota.fields,
        );
        write_within(client, within, &switched).await?;
        answer.drain(..answered.head.len);
        let early = std::mem::take(buffer);
        upgrade::relay(
            client,
            upstream,
            answer,
            early,
            listener.stream_idle,
            lane.draining.clone(),
        )
        .await;
        return Ok(Next::Close);
    }
    let (next, reusable) = stream_back(
        &answered,
        &quota.fields,
        answer,
        upstream,
        client,
        within,
        old_client,
        next,
    )
    .await?;
    if reusable {
        pool.give_back(connected.stream);
    }
    Ok(next)
}

/// A checked request as it goes out.
struct Request {
    /// The head, ready for the wire.
    head: Vec<u8>,
    /// How the client frames the body, and so does weir.
    body: BodyLength,
    /// Whether the method is HEAD.
    to_head: bool,
    /// Whether a switch of protocols was asked for.
    upgrade: bool,
    max_body: u64,
    /// From the request to the end of the response's head, and for each stall in a body.
    within: Duration,
}

/// A response's head, and whether the whole request was sent before it came.
struct Answered {
    head: ResponseHead,
    uploaded: bool,
}

/// Uploads the request while it waits for the response's head, which comes to stand at the front of `answer`. A response
/// that comes early ends the upload.
async fn exchange(
    request: &Request,
    client: &TcpStream,
    buffer: &mut Vec<u8>,
    upstream: &TcpStream,
    answer: &mut Vec<u8>,
) -> Result<Answered, Rejection> {
    let both = async {
        let mut response = pin!(read_response(request, upstream, answer));
        tokio::select! {
            biased;
            head = &mut response => head.map(|head| Answered { head, uploaded: false }),
            sent = upload(request, client, buffer, upstream) => match sent {
                Ok(()) => response.await.map(|head| Answered { head, uploaded: true }),
                // The upstream may have answered before it stopped reading: its answer is worth more than a 502.
                Err(Rejection::UpstreamBroken) => response.await.map(|head| Answered { head, uploaded: false }),
                Err(rejection) => Err(rejection),
            },
        }
    };
    timeout(request.within, both)
        .await
        .unwrap_or(Err(Rejection::UpstreamTimeout))
}

async fn upload(
    request: &Request,
    client: &TcpStream,
    buffer: &mut Vec<u8>,
    upstream: &TcpStream,
) -> Result<(), Rejection> {
    let put = async |bytes: &[u8]| {
        write_all(upstream, bytes)
            .await
            .map_err(|_| Rejection::UpstreamBroken)
    };
    put(&request.head).await?;
    let mut reader = BodyReader::new(request.body);
    let mut left = request.max_body;
    let mut chunk = Vec::new();
    while !reader.is_done() {
        chunk.clear();
        let consumed = match reader.next(buffer).map_err(|_| Rejection::BadBody)? {
            Piece::Data { data, consumed } => {
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
        if buffer.is_empty()
            && !reader.is_done()
            && read_some(client, buffer).await.unwrap_or(0) == 0
        {
            return Err(Rejection::BadBody);
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

/// Streams the response whose head stands at the front of `answer`, with the fields `told`; says what becomes of the client's connection, and
/// whether the upstream's can serve another request.
#[expect(
    clippy::too_many_arguments,
    reason = "the response, and both ends of it"
)]
async fn stream_back(
    answered: &Answered,
    told: &[u8],
    mut answer: Vec<u8>,
    upstream: &TcpStream,
    client: &mut TcpStream,
    within: Duration,
    old_client: bool,
    next: Next,
) -> Result<(Next, bool), Failure> {
    let response = &answered.head;
    let (mut reader, until_close) = match response.body {
        ResponseBody::Length(length) => (BodyReader::new(length), false),
        ResponseBody::UntilClose => (BodyReader::new(BodyLength::Fixed(u64::MAX)), true),
    };
    let chunked = response.body == ResponseBody::Length(BodyLength::Chunked) || until_close;
    // HTTP/1.0 has no chunks: the end of the connection ends the body.
    let next = if chunked && old_client {
        Next::Close
    } else {
        next
    };
    let chunked = chunked && !old_client;
    let mut out = headers::response_head(&answer, response, chunked, next, None, told);
    answer.drain(..response.len);
    loop {
        let piece = reader.next(&answer).map_err(|_| Failure::Abort)?;
        let (consumed, done) = match piece {
            Piece::Data { data, consumed } => {
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
        write_within(client, within, &out).await?;
        out.clear();
        if done {
            break;
        }
        match timeout(within, read_some(upstream, &mut answer)).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0)) if until_close => {
                if chunked {
                    write_within(client, within, b"0\r\n\r\n").await?;
                }
                return Ok((next, false));
            }
            // Cut short: only an abort tells the client, since the head is out.
            Ok(Ok(0) | Err(_)) | Err(_) => return Err(Failure::Abort),
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
        Ok(Err(_)) | Err(_) => Err(Failure::Abort),
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
