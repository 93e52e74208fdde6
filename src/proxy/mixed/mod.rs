//! An exchange of which at least one side speaks HTTP/2, or may agree on it: the checked request goes out, the response comes back,
//! both streamed, trailers included. Between two sides of HTTP/1.1 it is `forward`, which does the same with fewer steps.

mod again;
mod answers;
mod down;
mod kept;
mod parts;
mod up;

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::sleep;

use super::following::LanePlan;
use super::forward::{Answered, MAX_INTERIM, is_interim};
use super::handle::{Conn, Ends, Failure, Next, close};
use super::headers;
use super::outgoing::{Outgoing, Request};
use super::record::Record;
use super::reply::Rejection;
use super::tries::{is_over, outcome, unreached};
use super::upgrade::{self, End as Side};
use super::wire::{Deadlines, Elapsed};
use crate::clock;
use crate::config::Protocol;
use crate::config::rewrite::HeaderChanges;
use crate::http1::body::BodyReader;
use crate::http1::head::BodyLength;
use crate::http1::response::{ResponseBody, ResponseHead};
use crate::http1::websocket;
use crate::http2::head::{upgrade_request, websocket_connect};
use crate::net::stream::BothWays;
use crate::net::tunnel::{TunnelReading, TunnelWriting};
use crate::store::breakers::End;
use crate::upstream::http2::Place;
use crate::upstream::{Connected, Pool, Reached};
use again::{TryAgain, Why};
use answers::{Answers, Fate};
use down::{Back, Down, grpc_status};
use kept::Body;
use parts::{Sink, Source};
use up::{Progress, Uploading, upload};

/// Whoever asks.
pub(super) enum Client<'a, 'b> {
    Http1(&'a mut Ends<'b>),
    Http2 {
        body: RecvStream,
        respond: &'a mut SendResponse<Bytes>,
    },
}

/// Sends the request and streams the response back.
pub(super) async fn send(
    conn: &Conn<'_>,
    plan: &LanePlan,
    outgoing: &mut Outgoing<'_, '_>,
    client: Client<'_, '_>,
    record: &mut Record,
) -> Result<Next, Failure> {
    let old_client = outgoing.request.old_client;
    match client {
        Client::Http2 { body, respond } => {
            if outgoing.expects {
                let mut go_on = Response::new(());
                *go_on.status_mut() = StatusCode::CONTINUE;
                let _ = respond.send_informational(go_on);
            }
            let mut source = Source::http2(body);
            let mut back = Back::Http2(respond);
            exchange(conn, plan, outgoing, &mut source, &mut back, record).await
        }
        Client::Http1(ends) => {
            // gRPC is of HTTP/2 alone: how its calls end cannot be said in HTTP/1.1.
            (outgoing.request.grpc, outgoing.request.deadline) = (false, None);
            if outgoing.expects && ends.buffer.is_empty() {
                ends.write(b"HTTP/1.1 100 Continue\r\n\r\n", outgoing.request.idle)
                    .await?;
            }
            let mut ahead = Vec::new();
            let mut both = BothWays::of(ends.client);
            let (reading, writing) = both.split();
            let mut source = Source::Http1 {
                stream: reading,
                buffer: ends.buffer,
                reader: BodyReader::new(outgoing.request.body),
                until_close: false,
            };
            let mut back = Back::Http1 {
                reading,
                writing: Some(writing),
                ahead: &mut ahead,
            };
            let sent = exchange(conn, plan, outgoing, &mut source, &mut back, record).await;
            let whole = source.is_over();
            ends.buffer.extend_from_slice(&ahead);
            if old_client && matches!(sent, Err(Failure::UpstreamGone | Failure::NotSafe)) {
                // Without chunks a plain close would say that the body is whole; a reset does not.
                ends.client.reset_on_close();
            }
            let next = sent?;
            if !whole {
                close(ends.client).await;
                return Ok(Next::Close);
            }
            Ok(next)
        }
    }
}

/// The upstream's side of an exchange.
struct Upstream<'a, 'r> {
    /// None for a tunnel, which begins behind the answer.
    sink: Option<Sink<'a>>,
    answers: Answers<'a>,
    again: &'a mut TryAgain<'r>,
}

/// What one try came to.
enum Ended {
    /// The response went to the client.
    Whole(Next),
    /// The response had this status, for which another try is due once this long has passed.
    Over(u16, Duration),
    /// As [`Tried::Stale`], twice.
    Stale,
}

/// What one connection came to.
enum Tried {
    Ended(Ended),
    /// The request is to be sent again: its connection had been idle and was closed as it came, or the upstream says that it did
    /// not look at it. Nothing of it can have been seen, or seeing it twice does no harm.
    Stale,
}

async fn exchange(
    conn: &Conn<'_>,
    plan: &LanePlan,
    outgoing: &mut Outgoing<'_, '_>,
    source: &mut Source<'_, '_>,
    back: &mut Back<'_, '_>,
    record: &mut Record,
) -> Result<Next, Failure> {
    let cluster = &plan.clusters[outgoing.upstream];
    let sent = async {
        let entered = back.unless_gone(&outgoing.request, cluster.enter()).await?;
        let slot = entered.map_err(|_| Rejection::Overloaded)?;
        let is_lost = Cell::new(false);
        let upstream = &outgoing.shared.config.upstreams[outgoing.upstream];
        let bounds = (upstream.retries.as_ref(), outgoing.request.within);
        let mut again = TryAgain::new(cluster, bounds, &is_lost);
        let kept = (outgoing.request.body, again.keeps());
        let mut body = Body::new(source, kept, &is_lost);
        let mut before = None;
        loop {
            let picked = cluster.pick(outgoing.aim, &again.before);
            let picked = picked.map_err(|_| Rejection::NoEndpoint)?;
            if let Some(over) = before.take() {
                record.begin_again(over, &picked.pool, &mut outgoing.out);
            }
            outgoing.request.within = again.within();
            let pool = &picked.pool;
            let tried = attempt(conn, pool, outgoing, &mut body, &mut again, back, record).await;
            let broken = Failure::from(Rejection::UpstreamBroken);
            let status = match &tried {
                Ok(Ended::Whole(_)) => Ok(record.status),
                Ok(Ended::Over(status, _)) => Ok(*status),
                Ok(Ended::Stale) => Err(&broken),
                Err(failure) => Err(failure),
            };
            if let Some(outcome) = outcome(status, record) {
                picked.tell(outcome);
            }
            if let Some(took) = record.waited() {
                slot.answered(took);
            }
            let (wait, over) = match tried {
                Ok(Ended::Whole(next)) => {
                    if !again.before.is_empty() {
                        cluster.shared.metrics.rescued.inc();
                    }
                    return Ok(next);
                }
                Ok(Ended::Over(status, wait)) => (wait, record.tried(pool, Some(status), None)),
                Ok(Ended::Stale) => {
                    let wait = again.wait(&outgoing.request, None, Why::Unseen);
                    let over = record.tried(pool, None, Some(broken.reason()));
                    (wait.ok_or(broken)?, over)
                }
                // Once the head of a response is on its way there is no other.
                Err(failure) if record.status != 0 => return Err(failure),
                Err(failure) => {
                    let why = Why::Failed(&failure);
                    let wait = again.wait(&outgoing.request, record.sent, why);
                    let over = record.tried(pool, None, Some(failure.reason()));
                    (wait.ok_or(failure)?, over)
                }
            };
            back.unless_gone(&outgoing.request, sleep(wait)).await?;
            again.before.push(picked.pool.clone());
            before = Some(over);
        }
    };
    let sent = sent.await;
    if let Err(failure) = &sent {
        outgoing.failed(failure, record);
    }
    sent
}

/// Sends the request to one endpoint, over a connection that is open already or a new one.
async fn attempt(
    conn: &Conn<'_>,
    pool: &Rc<Pool>,
    outgoing: &mut Outgoing<'_, '_>,
    body: &mut Body<'_, '_, '_>,
    again: &mut TryAgain<'_>,
    back: &mut Back<'_, '_>,
    record: &mut Record,
) -> Result<Ended, Failure> {
    for _ in 0..2 {
        body.begin_again();
        let can_repeat = outgoing.request.can_repeat;
        let upstream = &outgoing.shared.config.upstreams[outgoing.upstream];
        let reaching = async {
            match (&outgoing.websocket_key, upstream.protocol) {
                // What may be HTTP/2 may not take WebSockets by it.
                (Some(_), Protocol::Auto) => pool.take(can_repeat).await.map(Reached::Http1),
                (Some(_), Protocol::Http1 | Protocol::Http2) | (None, _) => {
                    pool.reach(can_repeat).await
                }
            }
        };
        let reached = back.unless_gone(&outgoing.request, reaching).await?;
        let reached = reached.map_err(unreached)?;
        record.reached = Some(pool.clone());
        let tried = match reached {
            Reached::Http1(connected) => {
                by_http1(conn, (pool, connected), outgoing, body, again, back, record).await
            }
            Reached::Http2(place) => {
                by_http2(conn, (pool, place), outgoing, body, again, back, record).await
            }
        };
        match tried? {
            Tried::Ended(ended) => return Ok(ended),
            Tried::Stale => {}
        }
    }
    Ok(Ended::Stale)
}

async fn by_http1(
    conn: &Conn<'_>,
    (pool, mut connected): (&Pool, Connected),
    outgoing: &mut Outgoing<'_, '_>,
    body: &mut Body<'_, '_, '_>,
    again: &mut TryAgain<'_>,
    back: &mut Back<'_, '_>,
    record: &mut Record,
) -> Result<Tried, Failure> {
    let mut answer = conn.lane.buffers.take();
    let mut both = BothWays::of(&mut connected.stream);
    let (reading, writing) = both.split();
    let upstream = Upstream {
        sink: Some(Sink::Http1 {
            stream: writing,
            out: outgoing.out.to_vec(),
            chunked: outgoing.request.body == BodyLength::Chunked,
        }),
        answers: Answers::Http1(reading),
        again,
    };
    let fresh = !connected.reused;
    let run = run(conn, outgoing, body, upstream, back, &mut answer, record);
    let ran = match run.await {
        Err(Failure::Reply(Rejection::UpstreamBroken, _))
            if !fresh && outgoing.request.can_repeat && record.status == 0 && answer.is_empty() =>
        {
            return Ok(Tried::Stale);
        }
        ran => ran?,
    };
    match ran {
        Ran::Ended { ended, reusable } => {
            if reusable && answer.is_empty() {
                pool.give_back(connected);
            }
            Ok(Tried::Ended(ended))
        }
        Ran::Switched(_) => {
            let mut upstream = BothWays::of(&mut connected.stream);
            let upstream = Side::of(upstream.split(), Vec::new());
            let answer = std::mem::take(&mut *answer);
            tunnel(conn, outgoing, body.source, back, upstream, answer, record).await
        }
    }
}

/// Relays what follows the heads of a WebSocket that a client has asked for by HTTP/2.
async fn tunnel(
    conn: &Conn<'_>,
    outgoing: &Outgoing<'_, '_>,
    source: &mut Source<'_, '_>,
    back: &mut Back<'_, '_>,
    upstream: Side<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
    answer: Vec<u8>,
    record: &mut Record,
) -> Result<Tried, Failure> {
    let (Source::Http2 { stream: body, .. }, Back::Http2(respond)) = (source, back) else {
        return Err(Rejection::UpstreamBroken.into());
    };
    let client = (body, &mut **respond);
    let switched = upgrade::switched_http2(conn, outgoing, client, upstream, answer, record);
    // Apart, so that others have no room for it.
    Box::pin(switched).await?;
    Ok(Tried::Ended(Ended::Whole(Next::Close)))
}

async fn by_http2(
    conn: &Conn<'_>,
    (pool, mut place): (&Pool, Place),
    outgoing: &mut Outgoing<'_, '_>,
    body: &mut Body<'_, '_, '_>,
    again: &mut TryAgain<'_>,
    back: &mut Back<'_, '_>,
    record: &mut Record,
) -> Result<Tried, Failure> {
    let bodiless = outgoing.request.body == BodyLength::None;
    let request = upgrade_request(
        &outgoing.out,
        pool.endpoint.authority(),
        pool.is_secure,
        outgoing.request.takes_trailers,
    );
    let mut request = request.map_err(|_| Rejection::BadTarget)?;
    let for_websocket = outgoing.websocket_key.is_some();
    if for_websocket {
        if !place.requests.is_extended_connect_protocol_enabled() {
            return Err(Rejection::OtherProtocol.into());
        }
        websocket_connect(&mut request);
    }
    let ended = bodiless && !for_websocket;
    let Ok((response, stream)) = place.requests.send_request(request, ended) else {
        return Ok(Tried::Stale);
    };
    let fate = Cell::new(Fate::Seen);
    let (sink, up) = match for_websocket {
        true => (None, Some(stream)),
        false => (Some(Sink::Http2(stream)), None),
    };
    let upstream = Upstream {
        sink,
        answers: Answers::Http2(response, &fate),
        again,
    };
    let mut answer = conn.lane.buffers.take();
    let run = run(conn, outgoing, body, upstream, back, &mut answer, record);
    let ran = run.await;
    if let Err(Failure::Reply(Rejection::UpstreamTimeout, _) | Failure::UpstreamGone) = ran {
        place.doubt();
    }
    if let Err(Failure::Reply(Rejection::UpstreamBroken, _)) = ran
        && record.status == 0
        && match fate.get() {
            Fate::Seen => false,
            Fate::Unseen => !body.is_lost(),
            Fate::Lost => place.reused && outgoing.request.can_repeat,
        }
    {
        return Ok(Tried::Stale);
    }
    match (ran?, up) {
        (Ran::Ended { ended, .. }, _) => Ok(Tried::Ended(ended)),
        (Ran::Switched(Some(mut down)), Some(up)) => {
            let both = (TunnelReading::of(&mut down), TunnelWriting(up));
            let upstream = Side::of(both, Vec::new());
            tunnel(
                conn,
                outgoing,
                body.source,
                back,
                upstream,
                Vec::new(),
                record,
            )
            .await
        }
        (Ran::Switched(_), _) => Err(Rejection::UpstreamBroken.into()),
    }
}

/// How an exchange went.
enum Ran {
    Ended {
        ended: Ended,
        /// Whether the upstream's connection, of HTTP/1.1, can serve another request.
        reusable: bool,
    },
    /// A WebSocket begins behind the head, with what is to come of an upstream of HTTP/2.
    Switched(Option<RecvStream>),
}

async fn run(
    conn: &Conn<'_>,
    outgoing: &mut Outgoing<'_, '_>,
    body: &mut Body<'_, '_, '_>,
    upstream: Upstream<'_, '_>,
    back: &mut Back<'_, '_>,
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<Ran, Failure> {
    let Upstream {
        sink,
        mut answers,
        again,
    } = upstream;
    record.sent = None;
    let progress = Progress::begin();
    let request = outgoing.request;
    let shared = outgoing.shared;
    let mut uploading = Uploading {
        rest: Some(pin!(upload(
            &request,
            (shared, outgoing.route),
            body,
            sink,
            &progress
        ))),
        whole: false,
        refused: None,
    };
    let how = (&request, &outgoing.route.response_headers);
    let answered = await_head(how, &mut uploading, &mut answers, back, answer, record);
    let answered = answered.await;
    record.bytes_in = progress.bytes_in.get();
    let (head, body) = answered?;
    record.answered = Some(clock::mono());
    let status = head.status;
    let answered = Answered {
        head,
        uploaded: uploading.whole,
    };
    let by_http2 = matches!(answers, Answers::Http2(..));
    // RFC 8441 section 5: any of 200 to 299 opens it there.
    let key = outgoing.websocket_key.as_ref();
    let opens = status == 101 || (key.is_some() && by_http2 && matches!(status, 200..=299));
    if !opens && let Some(wait) = again.wait(&request, record.sent, Why::Answered(status)) {
        let reusable = !by_http2 && is_over(&answered, answer);
        answer.clear();
        return Ok(Ran::Ended {
            ended: Ended::Over(status, wait),
            reusable,
        });
    }
    if let (Some(key), false) = (key, by_http2) {
        is_for_websocket(answer, &answered.head, key).inspect_err(|rejection| {
            if *rejection == Rejection::NotSwitched {
                outgoing.finish(End::Status(status), record);
            }
        })?;
    }
    // What is left of a body cut off by an early response cannot be told from a next request; streams are apart from each other.
    let may_live = answered.uploaded || !back.is_http1();
    let turned = outgoing.turn_back(conn, answer, &answered, may_live, record);
    let next = match turned.await {
        Ok(next) => next,
        Err(rejection) => {
            outgoing.finish(End::Status(status), record);
            return Err(rejection.into());
        }
    };
    let mut grpc = grpc_status(&request, answer, &answered.head);
    answer.drain(..answered.head.len);
    if opens {
        outgoing.finish(End::Status(status), record);
        return Ok(Ran::Switched(body));
    }
    let keep_alive = answered.head.keep_alive;
    let mut body = match (body, answers) {
        (Some(body), _) => Source::http2(body),
        (None, Answers::Http1(stream)) => {
            let (length, until_close) = match answered.head.body {
                ResponseBody::Length(length) => (length, false),
                ResponseBody::UntilClose => (BodyLength::Fixed(u64::MAX), true),
            };
            Source::Http1 {
                stream,
                buffer: answer,
                reader: BodyReader::new(length),
                until_close,
            }
        }
        (None, Answers::Http2(..)) => return Err(Rejection::UpstreamBroken.into()),
    };
    let mut down = Down {
        head: std::mem::take(&mut *outgoing.out),
        chunked: answered.chunked() && !request.old_client,
        sink: None,
        audited: (shared, &conn.lane.outbox),
        request: &request,
        progress: &progress,
    };
    let has_body = answered.head.body != ResponseBody::Length(BodyLength::None);
    let streamed = down
        .stream(
            has_body.then_some(&mut body),
            &mut uploading,
            back,
            &mut grpc,
            record,
        )
        .await;
    record.bytes_in = progress.bytes_in.get();
    record.grpc = record.grpc.or(grpc);
    let end = grpc.map_or(End::Status(status), End::Grpc);
    outgoing.streamed(end, &streamed, record);
    streamed?;
    Ok(Ran::Ended {
        ended: Ended::Whole(next),
        reusable: keep_alive && uploading.whole && body.is_spent(),
    })
}

/// Uploads while it waits for the response's head, which comes to stand at the front of `answer`. With its body, where that
/// comes by HTTP/2.
async fn await_head<F: Future<Output = Result<(), Failure>>>(
    (request, changes): (&Request, &HeaderChanges),
    uploading: &mut Uploading<'_, F>,
    answers: &mut Answers<'_>,
    back: &mut Back<'_, '_>,
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<(ResponseHead, Option<RecvStream>), Failure> {
    let to_http1 = back.is_http1();
    let early = {
        let mut head = pin!(answers.final_head(request, to_http1, answer));
        let mut until_deadline = pin!(request.until_deadline());
        poll_fn(|cx| {
            if let Poll::Ready(head) = head.as_mut().poll(cx) {
                return Poll::Ready(Ok(Some(head)));
            }
            if until_deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(Rejection::DeadlineExceeded.into()));
            }
            match uploading.poll(cx) {
                // An upload that waits for the upstream does not look whether the client is there.
                Poll::Pending => back.poll_reset(cx).map(|()| Err(Failure::ClientGone)),
                Poll::Ready(Ok(())) => Poll::Ready(Ok(None)),
                // The upstream may have answered before it stopped reading: its answer is worth more than a 502.
                Poll::Ready(Err(Failure::Reply(Rejection::UpstreamBroken, _))) => {
                    Poll::Ready(Ok(None))
                }
                Poll::Ready(Err(failure)) => Poll::Ready(Err(failure)),
            }
        })
        .await?
    };
    if let Some(head) = early {
        return head.map_err(Failure::from);
    }
    // Its time begins here: how long the client takes to send says nothing of the upstream.
    record.sent = uploading.whole.then(clock::mono);
    let mut deadlines = Deadlines::new();
    for passed in 0..=MAX_INTERIM {
        let (head, body) = {
            let mut head = pin!(answers.head(request, to_http1, answer));
            let waited = poll_fn(|cx| match head.as_mut().poll(cx) {
                Poll::Ready(head) => Poll::Ready(head.map_err(Failure::from)),
                Poll::Pending => back.poll_gone(cx).map(|()| Err(Failure::ClientGone)),
            });
            let within = request.left_of(request.within);
            let waited = deadlines.within(within, waited).await;
            waited.map_err(|Elapsed| match request.is_over() {
                true => Rejection::DeadlineExceeded,
                false => Rejection::UpstreamTimeout,
            })??
        };
        if !is_interim(&head) {
            return Ok((head, body));
        }
        if passed == MAX_INTERIM {
            break;
        }
        // RFC 9110 section 15.2: all but the answer to an expectation, which was weir's own, and not to HTTP/1.0.
        if head.status != 100 && !request.old_client {
            let mut interim = Vec::new();
            headers::put_interim_head(&mut interim, answer, &head, changes);
            let told = deadlines.within(request.idle, back.interim(&interim)).await;
            told.map_err(|Elapsed| Failure::ClientGone)??;
        }
        answer.drain(..head.len);
    }
    Err(Rejection::UpstreamBroken.into())
}

/// Whether a response can go to a client that has asked for a WebSocket by HTTP/2: it opens one, or refuses to.
fn is_for_websocket(answer: &[u8], head: &ResponseHead, key: &str) -> Result<(), Rejection> {
    match head.status {
        101 if websocket::is_opened(answer, head, key) => Ok(()),
        101 => Err(Rejection::UpstreamBroken),
        // The client would take it for the WebSocket.
        200..=299 => Err(Rejection::NotSwitched),
        _ => Ok(()),
    }
}
