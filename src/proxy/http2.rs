//! A client's connection that speaks HTTP/2: its streams are requests, each with a task of its own. What floods is stopped by
//! `h2`, but for resets, which it does not count. It tells of what ends a connection, and of no stream that it resets by itself.

mod heard;

use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use h2::ext::Protocol;
use h2::server::{self, SendResponse};
use h2::{Ping, PingPong, Reason, RecvStream};
use http::request::Parts;
use http::{Request, Response};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::debug;

use super::admit::{self, Way};
use super::answer::Answer;
use super::any_version::{self, Client, Http2Client};
use super::draft;
use super::exchange::{Conn, Failure, Peer, answer_on_record, on_record};
use super::following::LaneView;
use super::lane::{Lane, note};
use super::outgoing::prepare;
use super::record::{Ongoing, Record};
use super::reply::{Asker, Rejection};
use crate::clock;
use crate::config::Listener;
use crate::http1::head::RequestHead;
use crate::http1::websocket::{self, WEBSOCKET};
use crate::http2::errors;
use crate::http2::grpc::{self, GrpcStatus};
use crate::http2::head::{downgrade_request, upgrade_response, websocket_request};
use crate::net::gather::{Gathered, Sender, gather};
use crate::net::stream::{Ahead, Stream};
use crate::net::window::{self, Window};
use crate::plan::Phase;
use crate::policy::limit::Now;
use heard::{Heard, hear};

/// What a client may send of one body before it is taken, in bytes, until its [`Window`] grows.
const STREAM_WINDOW: u32 = 64 * 1024;
/// The largest window there is (RFC 9113 section 6.9.1).
const LARGEST_WINDOW: u32 = (1 << 31) - 1;
/// What its small frames may cost before they are taken, in bytes as `h2` counts them: up to 256 for each, and together as much as the
/// bodies of 128 requests. Beyond that the connection ends.
const SMALL_FRAMES: usize = 8 * 1024 * 1024;
/// What waits to be sent of one body; capacity is asked for first, so that it is no more than a frame or two.
const SEND_BUFFER: usize = 64 * 1024;
/// Requests that a client may take back soon after it has sent them, whatever else it does.
const RESETS: usize = 100;
/// "Soon", for a request that is taken back.
const SOON: Duration = Duration::from_secs(1);
/// What is read away of a body behind its answer, in bytes, and for how long: frames of a stream that weir has closed already are counted
/// against their connection by `h2`.
const REST: usize = STREAM_WINDOW as usize;
const REST_WITHIN: Duration = Duration::from_secs(5);
/// For a client to hear that its connection ends, and to end it.
const FAREWELL: Duration = Duration::from_secs(5);

/// Serves the requests of `stream`, whose first bytes were read ahead, until it closes, breaks or stays idle too long.
pub(super) async fn connection(
    lane: &Rc<Lane>,
    listener_index: usize,
    stream: Ahead<Stream>,
    peer: Peer,
) {
    let view = lane.following.current();
    let listener = view.plan.config.listeners[listener_index].clone();
    let metrics = view.plan.metrics.clone();
    drop(view);
    let mut old = pin!(sleep(peer.old_at.saturating_sub(clock::mono())));
    let peer = Rc::new(peer);
    let ended_by = |code: Reason| {
        let code = errors::name(code.into());
        metrics.http2_errors.count(&listener.name, code);
        let (listener, peer) = (&*listener.name, &*peer.text);
        debug!(listener, peer, code, "ends a connection by HTTP/2");
    };
    let (stream, mut patience) = hear(stream, listener.header_read);
    let (stream, mut sender) = gather(stream);
    let handshake = bounds(&listener).handshake(stream);
    let mut connection = match timeout(listener.header_read, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return found(&error).map_or((), ended_by),
        // Nor with what every connection begins with.
        Err(_) => return ended_by(Reason::ENHANCE_YOUR_CALM),
    };
    let mut requests = JoinSet::new();
    sender.hold(true);
    let mut phases = lane.phases.clone();
    let mut ending = false;
    let mut resets = Resets::default();
    let mut idle_since = Instant::now();
    let window = Rc::new(Window::new(STREAM_WINDOW));
    let mut measured = pin!(measure(connection.ping_pong(), &window));
    loop {
        let span = match ending {
            true => FAREWELL,
            false => listener.keep_alive,
        };
        let idle = sleep_until(idle_since.max(patience.took()) + span);
        // One that was told before its first request might never get to it: clients try to connect anew until they may ask.
        let (told_from, end) = match resets.opened {
            0 => (Phase::Draining, &lane.drain),
            _ => (Phase::Leaving, &lane.leave),
        };
        let many = requests.len() > 1;
        let heard = poll_fn(
            |cx| match sender.poll_by(cx, many, |cx| connection.poll_accept(cx)) {
                Poll::Ready(accepted) => Poll::Ready(Some(accepted)),
                Poll::Pending => patience.poll_over(cx).map(|()| None),
            },
        );
        let leaves = tokio::select! {
            heard = heard => match heard {
                Some(Some(Ok((request, respond)))) => {
                    resets.opened += 1;
                    let (lane, peer) = (lane.clone(), peer.clone());
                    let admission = lane.following.current().plan.listeners[listener_index].admission;
                    let are_others_let_in = admission != peer.admission;
                    let window = window.clone();
                    requests.spawn_local(serve(lane, listener_index, peer, request, respond, window));
                    !ending && are_others_let_in
                }
                Some(Some(Err(error))) => {
                    if let Some(code) = found(&error) {
                        ended_by(code);
                    }
                    break;
                }
                // The client closed.
                Some(None) => break,
                // It does not go on with a head or a frame that it has begun.
                None => {
                    ended_by(Reason::ENHANCE_YOUR_CALM);
                    part(&mut connection, &sender).await;
                    break;
                }
            },
            Some(ended) = requests.join_next() => {
                idle_since = Instant::now();
                match ended {
                    Ok(Served::TakenBack) if resets.too_many() => {
                        ended_by(Reason::ENHANCE_YOUR_CALM);
                        part(&mut connection, &sender).await;
                        break;
                    }
                    Ok(Served::TakenBack | Served::BrokenOff | Served::Answered) => {}
                    ended @ Err(_) => note(ended, &metrics),
                }
                false
            }
            () = idle, if requests.is_empty() => {
                // The client may still take in what it was answered.
                let is_idle = patience.took() + span <= Instant::now();
                if is_idle && ending {
                    // It has been told, and does not go.
                    break;
                }
                is_idle
            }
            _ = phases.wait_for(|now| *now >= told_from), if !ending => true,
            () = &mut old, if !ending => true,
            never = &mut measured => match never {},
            () = window.filled() => {
                window.grow(|size| connection.set_initial_window_size(size).is_ok());
                false
            }
            // There is room for no more.
            () = end.last_call(listener_index), if !ending && requests.is_empty() => true,
        };
        if leaves {
            connection.graceful_shutdown();
            (ending, idle_since) = (true, Instant::now());
        }
    }
    // Those that go on are cut off from their client, and end by that.
    drop(connection);
    while let Some(ended) = requests.join_next().await {
        note(ended, &metrics);
    }
}

/// Measures how long a round trip takes, whenever that is to be known.
async fn measure(pings: Option<PingPong>, window: &Window) -> Infallible {
    let Some(mut pings) = pings else {
        return pending().await;
    };
    loop {
        window.unmeasured().await;
        let asked = clock::now();
        if pings.ping(Ping::opaque()).await.is_err() {
            // The connection is over.
            return pending().await;
        }
        window.measured(asked.elapsed());
    }
}

/// What a client may take of a connection.
fn bounds(listener: &Listener) -> server::Builder {
    let streams = listener.max_concurrent_streams;
    // Room for all, as windows are at first: a body that its upstream does not read must not take the others'.
    let all = STREAM_WINDOW.saturating_mul(streams);
    let all = all.clamp(2 * window::MOST, LARGEST_WINDOW);
    let at_once = usize::try_from(streams).unwrap_or(usize::MAX);
    let mut bounds = server::Builder::new();
    bounds
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(all)
        .data_frame_budget(SMALL_FRAMES)
        .max_concurrent_streams(streams)
        .max_concurrent_reset_streams(at_once)
        // Those that are taken back before they are looked at; `Resets` counts them, too.
        .max_pending_accept_reset_streams(at_once.max(RESETS + 1))
        .max_header_list_size(u32::try_from(listener.head_limits.max_bytes).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER)
        .enable_connect_protocol();
    bounds
}

/// What `h2` ended a connection for, where that is not that the client left or ended it itself.
fn found(error: &h2::Error) -> Option<Reason> {
    let found = error.is_library() && error.is_go_away();
    error.reason().filter(|_| found)
}

/// Tells a client that misbehaves that its connection is over, as far as it listens.
async fn part(
    connection: &mut server::Connection<Gathered<Heard<Ahead<Stream>>>, Bytes>,
    sender: &Sender<Heard<Ahead<Stream>>>,
) {
    sender.hold(false);
    connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
    let _ = timeout(FAREWELL, poll_fn(|cx| connection.poll_closed(cx))).await;
}

/// Requests taken back: to send and take back without end costs a client nothing and the upstream much (CVE-2023-44487).
#[derive(Debug, Default)]
struct Resets {
    opened: usize,
    soon: usize,
}

impl Resets {
    /// Counts one that was taken back soon. Too many are more than half of all, and more than a browser ever does.
    fn too_many(&mut self) -> bool {
        self.soon += 1;
        self.soon > RESETS && self.soon * 2 > self.opened
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Served {
    /// With the end of its stream.
    Answered,
    /// Its stream is to be reset, where it is still open.
    BrokenOff,
    /// Its client took it back soon after it had come.
    TakenBack,
}

/// Serves one request.
async fn serve(
    lane: Rc<Lane>,
    listener_index: usize,
    peer: Rc<Peer>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    window: Rc<Window>,
) -> Served {
    let (head, mut body) = request.into_parts();
    let client = Http2Client {
        body: &mut body,
        respond: &mut respond,
        window: &window,
    };
    let served = answer(&lane, listener_index, &peer, head, client).await;
    if served == Served::Answered && !body.is_end_stream() {
        Box::pin(read_away(&mut body)).await;
    }
    served
}

/// Whether `h2` itself has reset the request's stream, for a body that is not as long as its head says or breaks another rule: else that looks as
/// though the client had.
fn is_malformed(body: &mut RecvStream) -> bool {
    loop {
        match body.data().now_or_never() {
            Some(Some(Ok(_))) => {}
            Some(Some(Err(error))) => return error.is_library() && error.is_reset(),
            Some(None) | None => return false,
        }
    }
}

/// Reads away what still comes behind an answer.
async fn read_away(body: &mut RecvStream) {
    let rest = async {
        let mut left = REST;
        // What came before the answer and was not taken has its room still: without it nothing more would come.
        let mut flow = body.flow_control().clone();
        let _ = flow.release_capacity(flow.used_capacity());
        while left > 0
            && let Some(Ok(bytes)) = body.data().await
        {
            left = left.saturating_sub(bytes.len());
            let _ = body.flow_control().release_capacity(bytes.len());
        }
    };
    let _ = timeout(REST_WITHIN, rest).await;
}

async fn answer(
    lane: &Lane,
    listener_index: usize,
    peer: &Peer,
    head: Parts,
    client: Http2Client<'_>,
) -> Served {
    let Http2Client {
        body,
        respond,
        window,
    } = client;
    let view = lane.following.current();
    let now = clock::moment();
    let mut ongoing = Ongoing::begin(&view.plan, &lane.outbox, now.mono);
    let conn = Conn {
        lane,
        listener: &view.plan.config.listeners[listener_index],
        peer,
        is_http2: true,
        // It hears by a farewell, which no answer has to carry.
        is_outdated: false,
    };
    let content_type = head.headers.get(http::header::CONTENT_TYPE);
    let is_grpc = content_type.is_some_and(|value| grpc::is_grpc(value.as_bytes()));
    let to = asker(is_grpc || head.method == http::Method::HEAD);
    let is_tunnel = head.method == http::Method::CONNECT;
    let record = &mut ongoing.record;
    // Apart, since what a task is made of is moved several times until it runs.
    let client = Http2Client {
        body: &mut *body,
        respond: &mut *respond,
        window,
    };
    let served = Box::pin(one(&conn, &view, head, client, now, record)).await;
    let outcome = match served {
        Ok(()) if is_tunnel => Served::BrokenOff,
        Ok(()) => Served::Answered,
        Err(Failure::Reply(rejection, _)) => {
            let rejection = on_record(&conn, &view, rejection, !to.without_body, record).await;
            record.grpc = is_grpc.then(|| rejection.grpc());
            refuse(&conn, respond, &rejection, to, record.grpc);
            Served::Answered
        }
        Err(failure) => {
            match failure {
                Failure::ClientGone if is_malformed(body) => record.note_malformed(),
                _ => record.note_aborted(failure.reason()),
            }
            match failure {
                Failure::ClientGone if record.elapsed() < SOON => Served::TakenBack,
                _ => Served::BrokenOff,
            }
        }
    };
    ongoing.ended = true;
    outcome
}

async fn one(
    conn: &Conn<'_>,
    view: &LaneView,
    parts: Parts,
    client: Http2Client<'_>,
    now: Now,
    record: &mut Record,
) -> Result<(), Failure> {
    let mut buffer = conn.lane.buffers.take();
    let read = read_head(conn, &mut buffer, parts, client.body.is_end_stream());
    let (head, websocket_key) = read.map_err(|(rejection, head)| {
        draft::begin_unrouted(&view.plan, conn, &buffer, head.as_ref(), record);
        rejection
    })?;
    let way = admit::admit(&view.plan, conn, &buffer, &head, now, record).await?;
    let admitted = match way {
        Way::Upstream(admitted) => admitted,
        // The client would take it for the WebSocket.
        Way::Answer(answer) if websocket_key.is_some() && answer.status < 300 => {
            return Err(Rejection::NotSwitched.into());
        }
        Way::Answer(answer) => {
            let by_head = buffer[head.method.clone()] == *b"HEAD";
            return by_itself(conn, view, &answer, client.respond, by_head, record).await;
        }
    };
    let mut outgoing = prepare(conn, admitted, &mut buffer, &head, true, record);
    outgoing.websocket_key = websocket_key;
    drop(buffer);
    let client = Client::Http2(client);
    any_version::send(conn, view, &mut outgoing, client, record).await?;
    Ok(())
}

/// Writes the request's head into `buffer` as one of HTTP/1.1; with the key of the WebSocket that it asks for, if it does. One that asks for another
/// protocol is refused, with its head where that is in order.
fn read_head(
    conn: &Conn<'_>,
    buffer: &mut Vec<u8>,
    mut parts: Parts,
    ended: bool,
) -> Result<(RequestHead, Option<String>), (Rejection, Option<RequestHead>)> {
    let protocol = parts.extensions.remove::<Protocol>();
    // What follows the head of a CONNECT is no body.
    let has_body = protocol.is_none() && !ended;
    let (websocket_key, is_refused) = match protocol {
        None => (None, false),
        Some(protocol) if protocol.as_str().as_bytes().eq_ignore_ascii_case(WEBSOCKET) => {
            (Some(websocket::key(fastrand::u128(..))), false)
        }
        Some(_) => (None, true),
    };
    if let Some(key) = &websocket_key {
        websocket_request(&mut parts, key);
    }
    if is_refused {
        // It is told as a WebSocket is.
        parts.method = http::Method::GET;
    }
    match downgrade_request(buffer, &parts, has_body, conn.listener.head_limits) {
        head if is_refused => Err((Rejection::OtherProtocol, head.ok())),
        Ok(head) => Ok((head, websocket_key)),
        Err(error) => Err((Rejection::BadHead(error), None)),
    }
}

/// Gives the answer that the route has by itself.
async fn by_itself(
    conn: &Conn<'_>,
    view: &LaneView,
    answer: &Answer<'_>,
    respond: &mut SendResponse<Bytes>,
    by_head: bool,
    record: &mut Record,
) -> Result<(), Failure> {
    answer_on_record(conn, view, answer, !by_head, record).await?;
    let mut out = conn.lane.buffers.take();
    answer.put(&mut out, asker(by_head), &conn.lane.date);
    reply(respond, &out, |_| {});
    Ok(())
}

/// Replies with a refusal, which ends a call of gRPC with this status.
fn refuse(
    conn: &Conn<'_>,
    respond: &mut SendResponse<Bytes>,
    rejection: &Rejection,
    to: Asker,
    grpc: Option<GrpcStatus>,
) {
    let (mut out, mut body) = (conn.lane.buffers.take(), conn.lane.buffers.take());
    rejection.put(&mut out, &mut body, to, &conn.lane.date);
    reply(respond, &out, |response| {
        let Some(status) = grpc else {
            return;
        };
        // A response of trailers alone; what HTTP says of the refusal stays beside gRPC's word.
        let fields = response.headers_mut();
        fields.remove(http::header::CONTENT_LENGTH);
        let content_type = http::HeaderValue::from_static("application/grpc");
        fields.insert(http::header::CONTENT_TYPE, content_type);
        fields.extend(status.trailers(&rejection.detail()));
        *response.status_mut() = http::StatusCode::OK;
    });
}

fn asker(without_body: bool) -> Asker {
    Asker {
        keep_alive: true,
        without_body,
        old: false,
    }
}

/// Sends a whole reply, written as HTTP/1.1, once `change` has seen its head; a client that does not read it loses it with its
/// connection.
fn reply(respond: &mut SendResponse<Bytes>, bytes: &[u8], change: impl FnOnce(&mut Response<()>)) {
    let Ok((mut response, head)) = upgrade_response(bytes) else {
        respond.send_reset(Reason::INTERNAL_ERROR);
        return;
    };
    change(&mut response);
    let body = Bytes::copy_from_slice(&bytes[head..]);
    // Errors of the stream are the client's leaving.
    if let Ok(mut stream) = respond.send_response(response, body.is_empty())
        && !body.is_empty()
    {
        let _ = stream.send_data(body, true);
    }
}
