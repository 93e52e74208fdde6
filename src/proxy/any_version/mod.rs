//! One exchange with the upstream, whichever version of HTTP each side speaks: the checked request goes out, the response comes back,
//! both streamed, trailers included. Where both are known to speak HTTP/1.1 it is `http1_to_http1`, which does the same in six tenths
//! of the instructions. Must not decide policy.

mod answers;
mod current_try;
mod down;
mod kept;
mod parts;
mod run;
mod up;

use std::cell::Cell;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};

use super::exchange::{Conn, Ends, Failure, Next};
use super::following::LaneView;
use super::outcome::{is_stale, learn, unreached, waited_in_vain};
use super::outgoing::Outgoing;
use super::record::Record;
use super::reply::Rejection;
use super::retries::{Point, Tries};
use super::upgrade::{self, Side};
use crate::config::Protocol;
use crate::http1::body::BodyReader;
use crate::http1::head::BodyLength;
use crate::http2::head::{upgrade_request, websocket_connect};
use crate::net::stream::BothWays;
use crate::net::tunnel::{TunnelReading, TunnelWriting};
use crate::net::window::Window;
use crate::upstream::http2::StreamPermit;
use crate::upstream::{Connected, Pool, Reached};
use answers::{Answers, Fate};
use current_try::CurrentTry;
use down::Back;
use kept::Body;
use parts::{Sink, Source};
use run::{Ran, Upstream};

/// Whoever asks.
pub(super) enum Client<'a, 'b> {
    Http1(&'a mut Ends<'b>),
    Http2(Http2Client<'a>),
}

/// A stream of a client's.
pub(super) struct Http2Client<'a> {
    pub body: &'a mut RecvStream,
    pub respond: &'a mut SendResponse<Bytes>,
    /// Of its connection.
    pub window: &'a Window,
}

/// A request on its way, from its first try to the end of its response.
struct Exchange<'x, 'c, 'p> {
    conn: &'x Conn<'x>,
    outgoing: &'x mut Outgoing<'p>,
    /// The way back to the client.
    back: Back<'x, 'c>,
    record: &'x mut Record,
}

/// Sends the request and streams the response back.
pub(super) async fn send(
    conn: &Conn<'_>,
    view: &LaneView,
    outgoing: &mut Outgoing<'_>,
    client: Client<'_, '_>,
    record: &mut Record,
) -> Result<Next, Failure> {
    match client {
        Client::Http2(Http2Client {
            body,
            respond,
            window,
        }) => {
            if outgoing.expects {
                let mut go_on = Response::new(());
                *go_on.status_mut() = StatusCode::CONTINUE;
                let _ = respond.send_informational(go_on);
            }
            let mut source = Source::http2(body, window);
            let mut exchange = Exchange {
                conn,
                outgoing,
                back: Back::Http2(respond),
                record,
            };
            exchange.through(view, &mut source).await
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
            let mut exchange = Exchange {
                conn,
                outgoing,
                back: Back::Http1 {
                    reading,
                    writing: Some(writing),
                    ahead: &mut ahead,
                },
                record,
            };
            let sent = exchange.through(view, &mut source).await;
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

impl Exchange<'_, '_, '_> {
    async fn through(
        &mut self,
        view: &LaneView,
        source: &mut Source<'_, '_>,
    ) -> Result<Next, Failure> {
        let upstream = &view.upstreams[self.outgoing.upstream];
        let sent = async {
            let Exchange {
                outgoing,
                back,
                record,
                ..
            } = &mut *self;
            record.note_waiting();
            let entered = back
                .unless_gone(&outgoing.request, upstream.enter())
                .await?;
            let slot = entered.map_err(|_| Rejection::Overloaded)?;
            record.note_working();
            let is_lost = Cell::new(false);
            let retries = outgoing.settings().retries.as_ref();
            let within = outgoing.request.within;
            let picked = upstream.pick(outgoing.aim, &[]);
            let picked = picked.map_err(|_| Rejection::NoEndpoint)?;
            record.note_target(&picked.pool);
            let tries = retries.map(|retries| Tries::new(upstream, retries, within));
            let mut current = CurrentTry::new(slot, picked, tries, &is_lost);
            let length = outgoing.request.body;
            let for_http2 = outgoing.settings().protocol != Protocol::Http1;
            let mut body = Body::new(source, length, outgoing.keep(), for_http2, &is_lost);
            loop {
                let attempt = self.attempt(&mut body, &mut current).await;
                let Exchange {
                    outgoing,
                    back,
                    record,
                    ..
                } = &mut *self;
                let failure = match attempt {
                    Ok(Ended::Whole(next)) => {
                        current.tell(Ok(record.status), &outgoing.request, record);
                        return Ok(next);
                    }
                    Ok(Ended::Again) => continue,
                    Err(failure) => failure,
                };
                current.tell(Err(&failure), &outgoing.request, record);
                // An answer has told it already.
                if record.answered.is_none() {
                    learn(&current.slot, Err(&failure), record);
                }
                // Once the head of a response is on its way there is no other.
                if record.status != 0 {
                    return Err(failure);
                }
                let Some(wait) = current.another(&outgoing.request, Err(&failure)) else {
                    return Err(failure);
                };
                let gone_on = current.go_on(wait, Err(&failure), outgoing, back, record);
                if !gone_on.await? {
                    return Err(failure);
                }
            }
        };
        let sent = sent.await;
        if let Err(failure) = &sent {
            self.outgoing.failed(failure, self.record);
        }
        sent
    }

    /// Sends the request to one endpoint, over a connection that is open already or a new one.
    async fn attempt(
        &mut self,
        body: &mut Body<'_, '_, '_>,
        current: &mut CurrentTry<'_>,
    ) -> Result<Ended, Failure> {
        let pool = &current.picked.pool.clone();
        for is_first in [true, false] {
            let Exchange {
                outgoing,
                back,
                record,
                ..
            } = &mut *self;
            body.begin_again();
            current.point = Point::Unseen;
            let mut until = current.until();
            if let Some(until) = until {
                outgoing.request.within = until.left();
            }
            let is_safe = outgoing.request.is_safe;
            // What may be HTTP/2 may not take WebSockets by it.
            let may_be_http2 = outgoing.settings().protocol == Protocol::Auto;
            let http1_alone = outgoing.websocket_key.is_some() && may_be_http2;
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
            record.sent_by = Some(match &reached {
                Reached::Http1(_) => "1.1",
                Reached::Http2(_) => "2",
            });
            let used = match reached {
                Reached::Http1(connected) => self.by_http1(pool, connected, body, current).await,
                Reached::Http2(place) => self.by_http2(pool, place, body, current).await,
            };
            match used? {
                Used::Ended(ended) => return Ok(ended),
                Used::Stale => {}
            }
        }
        Err(Rejection::UpstreamBroken.into())
    }

    fn is_stale(&self, failure: &Failure, point: Point, body: &Body<'_, '_, '_>) -> bool {
        let can_repeat = self.outgoing.request.can_repeat;
        // Once the head of a response is on its way there is no other.
        self.record.status == 0 && is_stale(failure, point, !body.is_gone(), can_repeat)
    }

    async fn by_http1(
        &mut self,
        pool: &Pool,
        mut connected: Connected,
        body: &mut Body<'_, '_, '_>,
        current: &mut CurrentTry<'_>,
    ) -> Result<Used, Failure> {
        let mut answer = self.conn.lane.buffers.take();
        let mut both = BothWays::of(&mut connected.stream);
        let (reading, writing) = both.split();
        let upstream = Upstream {
            sink: Some(Sink::Http1 {
                stream: writing,
                out: self.outgoing.out.to_vec(),
                chunked: self.outgoing.request.body == BodyLength::Chunked,
            }),
            answers: Answers::Http1(reading),
            current,
        };
        let reused = connected.reused;
        let ran = match self.run(body, upstream, &mut answer).await {
            Err(failure) if reused && self.is_stale(&failure, current.point, body) => {
                return Ok(Used::Stale);
            }
            ran => ran?,
        };
        match ran {
            Ran::Ended {
                ended,
                reusable,
                kept_for,
            } => {
                if reusable && answer.is_empty() {
                    connected.note_kept_for(kept_for);
                    pool.give_back(connected, self.outgoing.request.is_head);
                }
                Ok(Used::Ended(ended))
            }
            Ran::Switched(_) => {
                let mut upstream = BothWays::of(&mut connected.stream);
                let upstream = Side::of(upstream.split(), Vec::new());
                let answer = std::mem::take(&mut *answer);
                self.tunnel(body.source, upstream, answer).await
            }
        }
    }

    /// Relays what follows the heads of a WebSocket that a client has asked for by HTTP/2.
    async fn tunnel(
        &mut self,
        source: &mut Source<'_, '_>,
        upstream: Side<impl AsyncRead + Unpin, impl AsyncWrite + Unpin>,
        answer: Vec<u8>,
    ) -> Result<Used, Failure> {
        let Exchange {
            conn,
            outgoing,
            back,
            record,
        } = self;
        let (Source::Http2 { stream: body, .. }, Back::Http2(respond)) = (source, back) else {
            return Err(Rejection::UpstreamBroken.into());
        };
        let switched =
            upgrade::switched_http2(conn, outgoing, body, respond, upstream, answer, record);
        // Boxed, to keep the common future small.
        Box::pin(switched).await?;
        Ok(Used::Ended(Ended::Whole(Next::Close)))
    }

    async fn by_http2(
        &mut self,
        pool: &Pool,
        mut place: StreamPermit,
        body: &mut Body<'_, '_, '_>,
        current: &mut CurrentTry<'_>,
    ) -> Result<Used, Failure> {
        let bodiless = self.outgoing.request.body == BodyLength::None;
        let request = upgrade_request(
            &self.outgoing.out,
            pool.is_secure,
            self.outgoing.request.takes_trailers,
        );
        let mut request = request.map_err(|_| Rejection::BadTarget)?;
        let for_websocket = self.outgoing.websocket_key.is_some();
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
        let (fate, window) = (Cell::new(Fate::Seen), place.window());
        let (sink, up) = match for_websocket {
            true => (None, Some(stream)),
            false => (Some(Sink::Http2(stream)), None),
        };
        let upstream = Upstream {
            sink,
            answers: Answers::Http2 {
                response,
                fate: &fate,
                window: &window,
            },
            current,
        };
        let mut answer = self.conn.lane.buffers.take();
        let ran = self.run(body, upstream, &mut answer).await;
        match &ran {
            Ok(_) => place.answered(),
            Err(failure) if waited_in_vain(failure, self.record.status != 0) => {
                if current.is_stuck {
                    place.leave();
                }
                place.doubt();
            }
            Err(_) => {}
        }
        current.point = match fate.get() {
            Fate::Unseen => Point::Unseen,
            Fate::Answered => Point::Answered,
            // Whatever of it is no good.
            Fate::Seen | Fate::Lost => Point::of(true, &answer),
        };
        let was_closed = match fate.get() {
            Fate::Seen | Fate::Answered => false,
            Fate::Unseen => true,
            Fate::Lost => place.reused,
        };
        if let Err(failure) = &ran
            && was_closed
            && self.is_stale(failure, current.point, body)
        {
            return Ok(Used::Stale);
        }
        match (ran?, up) {
            (Ran::Ended { ended, .. }, _) => Ok(Used::Ended(ended)),
            (Ran::Switched(Some(mut down)), Some(up)) => {
                let both = (TunnelReading::of(&mut down), TunnelWriting(up));
                let upstream = Side::of_tunnel(both, Vec::new());
                self.tunnel(body.source, upstream, Vec::new()).await
            }
            (Ran::Switched(_), _) => Err(Rejection::UpstreamBroken.into()),
        }
    }
}
