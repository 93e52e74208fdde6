//! One exchange with the upstream, whichever version of HTTP each side speaks: the checked request goes out, the response comes back,
//! both streamed, trailers included. Where both are known to speak HTTP/1.1 it is `forward`, which does the same in six tenths
//! of the instructions.

mod answers;
mod down;
mod kept;
mod parts;
mod run;
mod trying;
mod up;

use std::cell::Cell;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};

use super::exchange::{Conn, Ends, Failure, Next, learn, unreached};
use super::following::LaneView;
use super::outgoing::Outgoing;
use super::record::Record;
use super::reply::Rejection;
use super::retries::Point;
use super::upgrade::{self, Side};
use crate::config::Protocol;
use crate::http1::body::BodyReader;
use crate::http1::head::BodyLength;
use crate::http2::head::{upgrade_request, websocket_connect};
use crate::net::stream::BothWays;
use crate::net::tunnel::{TunnelReading, TunnelWriting};
use crate::upstream::http2::Place;
use crate::upstream::{Connected, Pool, Reached};
use answers::{Answers, Fate};
use down::Back;
use kept::Body;
use parts::{Sink, Source};
use run::{Ran, Upstream, run};
use trying::Trying;

/// Whoever asks.
pub(super) enum Client<'a, 'b> {
    Http1(&'a mut Ends<'b>),
    Http2 {
        body: &'a mut RecvStream,
        respond: &'a mut SendResponse<Bytes>,
    },
}

/// Sends the request and streams the response back.
pub(super) async fn send(
    conn: &Conn<'_>,
    view: &LaneView,
    outgoing: &mut Outgoing<'_, '_>,
    client: Client<'_, '_>,
    record: &mut Record,
) -> Result<Next, Failure> {
    match client {
        Client::Http2 { body, respond } => {
            if outgoing.expects {
                let mut go_on = Response::new(());
                *go_on.status_mut() = StatusCode::CONTINUE;
                let _ = respond.send_informational(go_on);
            }
            let mut source = Source::http2(body);
            let mut back = Back::Http2(respond);
            exchange(conn, view, outgoing, &mut source, &mut back, record).await
        }
        Client::Http1(ends) => {
            // gRPC is of HTTP/2 alone: how its calls end cannot be said in HTTP/1.1.
            outgoing.request.grpc = None;
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
            let sent = exchange(conn, view, outgoing, &mut source, &mut back, record).await;
            let whole = source.is_over();
            ends.buffer.extend_from_slice(&ahead);
            let next = sent?;
            Ok(match whole {
                true => next,
                false => Next::Linger,
            })
        }
    }
}

/// What one try came to.
enum Ended {
    /// The response went to the client.
    Whole(Next),
    /// The response had a status for which the next try is due.
    Again,
}

/// What the use of one connection came to.
enum Used {
    Ended(Ended),
    /// The request is to be sent again: its connection had been idle and was closed as it came, or the upstream says that it did
    /// not look at it. Nothing of it can have been seen, or seeing it twice does no harm.
    Stale,
}

async fn exchange(
    conn: &Conn<'_>,
    view: &LaneView,
    outgoing: &mut Outgoing<'_, '_>,
    source: &mut Source<'_, '_>,
    back: &mut Back<'_, '_>,
    record: &mut Record,
) -> Result<Next, Failure> {
    let upstream = &view.upstreams[outgoing.upstream];
    let sent = async {
        record.waits();
        let entered = back
            .unless_gone(&outgoing.request, upstream.enter())
            .await?;
        let slot = entered.map_err(|_| Rejection::Overloaded)?;
        record.works();
        let is_lost = Cell::new(false);
        let settings = &outgoing.plan.config.upstreams[outgoing.upstream];
        let (retries, within) = (settings.retries.as_ref(), outgoing.request.within);
        let picked = upstream.pick(outgoing.aim, &[]);
        let picked = picked.map_err(|_| Rejection::NoEndpoint)?;
        record.aims_at(&picked.pool);
        let to = (slot, picked);
        let mut trying = Trying::new(upstream, to, (retries, within), &is_lost);
        let keep = retries.map_or(0, |retries| retries.buffer);
        let mut body = Body::new(source, (outgoing.request.body, keep), &is_lost);
        loop {
            let failure = match attempt(conn, outgoing, &mut body, &mut trying, back, record).await
            {
                Ok(Ended::Whole(next)) => {
                    trying.tell(Ok(record.status), &outgoing.request, record);
                    return Ok(next);
                }
                Ok(Ended::Again) => continue,
                Err(failure) => failure,
            };
            trying.tell(Err(&failure), &outgoing.request, record);
            // An answer has told it already.
            if record.answered.is_none() {
                learn(&trying.slot, Err(&failure), record);
            }
            // Once the head of a response is on its way there is no other.
            if record.status != 0 {
                return Err(failure);
            }
            let Some(wait) = trying.another(&outgoing.request, Err(&failure)) else {
                return Err(failure);
            };
            let gone_on = trying.go_on(wait, Err(&failure), outgoing, back, record);
            if !gone_on.await? {
                return Err(failure);
            }
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
    outgoing: &mut Outgoing<'_, '_>,
    body: &mut Body<'_, '_, '_>,
    trying: &mut Trying<'_>,
    back: &mut Back<'_, '_>,
    record: &mut Record,
) -> Result<Ended, Failure> {
    let pool = &trying.picked.pool.clone();
    for is_first in [true, false] {
        body.begin_again();
        trying.point = Point::Unseen;
        let mut until = trying.until();
        if let Some(until) = until {
            outgoing.request.within = until.left();
        }
        let is_safe = outgoing.request.is_safe;
        let upstream = &outgoing.plan.config.upstreams[outgoing.upstream];
        // What may be HTTP/2 may not take WebSockets by it.
        let http1_alone = outgoing.websocket_key.is_some() && upstream.protocol == Protocol::Auto;
        let at_hand = match (is_first, http1_alone) {
            (true, true) => pool.idle(is_safe).map(Reached::Http1),
            (true, false) => pool.at_hand(is_safe),
            // Where one was closed, other idle ones may be.
            (false, _) => None,
        };
        let reached = match at_hand {
            Some(reached) => reached,
            None => {
                let reaching = async {
                    match http1_alone {
                        true => pool.connect(&mut until).await.map(Reached::Http1),
                        false => pool.reach(&mut until).await,
                    }
                };
                let reached = back.unless_gone(&outgoing.request, reaching).await?;
                let reached = reached.map_err(unreached)?;
                if let Some(until) = until {
                    outgoing.request.within = until.left();
                }
                reached
            }
        };
        record.reached = Some(pool.clone());
        let used = match reached {
            Reached::Http1(connected) => {
                by_http1(
                    conn,
                    (pool, connected),
                    outgoing,
                    body,
                    trying,
                    back,
                    record,
                )
                .await
            }
            Reached::Http2(place) => {
                by_http2(conn, (pool, place), outgoing, body, trying, back, record).await
            }
        };
        match used? {
            Used::Ended(ended) => return Ok(ended),
            Used::Stale => {}
        }
    }
    Err(Rejection::UpstreamBroken.into())
}

async fn by_http1(
    conn: &Conn<'_>,
    (pool, mut connected): (&Pool, Connected),
    outgoing: &mut Outgoing<'_, '_>,
    body: &mut Body<'_, '_, '_>,
    trying: &mut Trying<'_>,
    back: &mut Back<'_, '_>,
    record: &mut Record,
) -> Result<Used, Failure> {
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
        trying,
    };
    let fresh = !connected.reused;
    let run = run(conn, outgoing, body, upstream, back, &mut answer, record);
    let ran = match run.await {
        Err(Failure::Reply(Rejection::UpstreamBroken, _))
            if !fresh
                && record.status == 0
                && match trying.point {
                    Point::Unseen => !body.is_lost(),
                    Point::Seen => outgoing.request.can_repeat,
                    Point::Answered => false,
                } =>
        {
            return Ok(Used::Stale);
        }
        ran => ran?,
    };
    match ran {
        Ran::Ended { ended, reusable } => {
            if reusable && answer.is_empty() {
                pool.give_back(connected);
            }
            Ok(Used::Ended(ended))
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
) -> Result<Used, Failure> {
    let (Source::Http2 { stream: body, .. }, Back::Http2(respond)) = (source, back) else {
        return Err(Rejection::UpstreamBroken.into());
    };
    let client = (&mut **body, &mut **respond);
    let switched = upgrade::switched_http2(conn, outgoing, client, upstream, answer, record);
    // Apart, so that others have no room for it.
    Box::pin(switched).await?;
    Ok(Used::Ended(Ended::Whole(Next::Close)))
}

/// Whether a request that failed so may have waited for a connection that is gone without a word.
fn waited_in_vain(failure: &Failure, record: &Record) -> bool {
    match failure {
        Failure::Reply(rejection, _) => matches!(
            rejection,
            Rejection::UpstreamTimeout | Rejection::DeadlineExceeded
        ),
        Failure::UpstreamGone | Failure::CutShort(_) => true,
        // That may have been its reason, unless it was answered.
        Failure::ClientGone => record.status == 0,
        Failure::NotSafe => false,
    }
}

async fn by_http2(
    conn: &Conn<'_>,
    (pool, mut place): (&Pool, Place),
    outgoing: &mut Outgoing<'_, '_>,
    body: &mut Body<'_, '_, '_>,
    trying: &mut Trying<'_>,
    back: &mut Back<'_, '_>,
    record: &mut Record,
) -> Result<Used, Failure> {
    let bodiless = outgoing.request.body == BodyLength::None;
    let request = upgrade_request(
        &outgoing.out,
        &pool.endpoint.authority,
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
        return Ok(Used::Stale);
    };
    let fate = Cell::new(Fate::Seen);
    let (sink, up) = match for_websocket {
        true => (None, Some(stream)),
        false => (Some(Sink::Http2(stream)), None),
    };
    let upstream = Upstream {
        sink,
        answers: Answers::Http2(response, &fate),
        trying,
    };
    let mut answer = conn.lane.buffers.take();
    let run = run(conn, outgoing, body, upstream, back, &mut answer, record);
    let ran = run.await;
    match &ran {
        Ok(_) => place.answered(),
        Err(failure) if waited_in_vain(failure, record) => place.doubt(),
        Err(_) => {}
    }
    trying.point = match fate.get() {
        Fate::Unseen => Point::Unseen,
        Fate::Answered => Point::Answered,
        // Whatever of it is no good.
        Fate::Seen | Fate::Lost => Point::of(true, &answer),
    };
    if let Err(Failure::Reply(Rejection::UpstreamBroken, _)) = ran
        && record.status == 0
        && match fate.get() {
            Fate::Seen | Fate::Answered => false,
            Fate::Unseen => !body.is_lost(),
            Fate::Lost => place.reused && outgoing.request.can_repeat,
        }
    {
        return Ok(Used::Stale);
    }
    match (ran?, up) {
        (Ran::Ended { ended, .. }, _) => Ok(Used::Ended(ended)),
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
