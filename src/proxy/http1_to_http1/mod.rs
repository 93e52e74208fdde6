//! One exchange with the upstream between two sides of HTTP/1.1: the checked request goes out, the response comes back, both streamed.
//! Where HTTP/2 is spoken, or may be agreed on, it hands over to `any_version`.

mod tries;
mod upload;

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use tokio::io::AsyncWriteExt;

use super::admit::Admitted;
use super::any_version;
use super::exchange::{Answered, Conn, Ends, Failure, Next, persist};
use super::following::LaneView;
use super::framing::{Front, read_head};
use super::headers::{self, put_last_chunk};
use super::interim::Interims;
use super::outcome::end_of_response;
use super::outgoing::{Outgoing, Request, prepare};
use super::record::Record;
use super::reply::Rejection;
use super::upgrade;
use super::wire::{Buffer, Deadlines, Elapsed, Room, Share, is_end};
use crate::config::Protocol;
use crate::http1::body::Piece;
use crate::http1::head::{BodyLength, RequestHead};
use crate::http1::response::ResponseHead;
use crate::net::stream::{BothWays, Reading, Stream, Writing};
use crate::store::breakers::CallEnd;
use crate::upstream::{Bound, LaneUpstream};
use upload::{Responding, Rest, Upload};

/// A request between two sides of HTTP/1.1, from its first try to the end of its response.
struct Exchange<'x, 'p> {
    conn: &'x Conn<'x>,
    upstream: &'p LaneUpstream,
    outgoing: &'x mut Outgoing<'p>,
    /// The client's side.
    ends: Ends<'x>,
    upload: Upload<'p>,
    /// The client's own connection to the endpoint that was picked.
    bound: Option<Box<Bound>>,
    /// What the upstream has answered, as far as it was read and not used.
    answer: Buffer<'p>,
    record: &'x mut Record,
}

/// Sends the request whose head stands at the front of the client's buffer and streams the response back. On return the
/// buffer holds what the client sent behind the request.
pub(super) async fn send(
    conn: &Conn<'_>,
    view: &LaneView,
    admitted: Admitted<'_>,
    ends: &mut Ends<'_>,
    head: &RequestHead,
    record: &mut Record,
) -> Result<Next, Failure> {
    let index = admitted.upstream;
    let over_http2 = match admitted.plan.config.upstreams[index].protocol {
        Protocol::Http1 => false,
        Protocol::Http2 => true,
        // It is agreed on with each connection, unless the client asks for what HTTP/2 has not.
        Protocol::Auto => headers::upgrade(ends.buffer, head).is_none(),
    };
    let mut outgoing = prepare(conn, admitted, ends.buffer, head, over_http2, record);
    if outgoing.expects && ends.buffer.is_empty() {
        ends.write(b"HTTP/1.1 100 Continue\r\n\r\n", outgoing.request.idle)
            .await?;
    }
    if over_http2 {
        // Boxed, to keep the common future small.
        let sent = any_version::send(
            conn,
            view,
            &mut outgoing,
            any_version::Client::Http1(ends),
            record,
        );
        let sent = Box::pin(sent).await;
        reset_if_cut(&outgoing.request, ends.client, &sent);
        return sent.map_err(|failure| outgoing.in_order(conn, failure, None));
    }
    let mut exchange = Exchange {
        conn,
        upstream: &view.upstreams[index],
        upload: Upload::new(&outgoing, record.probe.clone()),
        bound: None,
        outgoing: &mut outgoing,
        ends: Ends {
            client: ends.client,
            buffer: ends.buffer,
            deadlines: ends.deadlines,
        },
        answer: conn.lane.buffers.take(),
        record,
    };
    exchange.run().await
}

/// For a client of HTTP/1.0: without chunks a plain close would say that a body which was cut short is whole; a reset does not.
fn reset_if_cut<T>(request: &Request, client: &mut Stream, sent: &Result<T, Failure>) {
    let is_cut = matches!(
        sent,
        Err(Failure::UpstreamGone | Failure::NotPersisted | Failure::CutShort(_))
    );
    if request.is_http10 && is_cut {
        client.reset_on_close();
    }
}

impl<'p> Exchange<'_, 'p> {
    async fn run(&mut self) -> Result<Next, Failure> {
        let (mut answerer, answered) = match self.ask().await {
            Ok(asked) => asked,
            Err(failure) => {
                self.outgoing.failed(&failure, self.record);
                let read = Some(self.record.bytes_in);
                return Err(self.outgoing.in_order(self.conn, failure, read));
            }
        };
        let Exchange {
            conn,
            outgoing,
            answer,
            record,
            ..
        } = self;
        let status = answered.head.status;
        // What is left of a body cut off by an early response cannot be told from a next request.
        let turned = outgoing.begin_response(conn, answer, &answered, answered.uploaded, record);
        let next = turned.await?;
        let spoken = headers::switched_to(answer, &answered.head, outgoing.switch_to.as_deref());
        answer.drain(..answered.head.len);
        let upstream = &mut answerer.connected.stream;
        if status == 101 {
            outgoing.finish(CallEnd::Status(101), record);
            let answer = std::mem::take(&mut **answer);
            // Boxed, to keep the common future small.
            let switched = upgrade::switched(
                conn,
                outgoing,
                &mut self.ends,
                upstream,
                answer,
                spoken,
                record,
            );
            Box::pin(switched).await?;
            return Ok(Next::Close);
        }
        let streamed = self.stream_back(&answered, upstream).await;
        let end = end_of_response(status, None, &streamed);
        self.outgoing.finish(end, self.record);
        reset_if_cut(&self.outgoing.request, self.ends.client, &streamed);
        let reusable = streamed?;
        if reusable {
            answerer.give_back(self.conn.peer, self.outgoing.request.is_head);
        }
        Ok(match answered.uploaded {
            true => next,
            false => Next::Linger,
        })
    }

    /// What `waited` gives, before the request has gone out; unless the client leaves.
    async fn unless_left<T>(&mut self, waited: impl Future<Output = T>) -> Result<T, Failure> {
        let Ends { client, buffer, .. } = &mut self.ends;
        let output = unless_gone(client, buffer, waited).await;
        output.ok_or_else(|| {
            let bytes_in = &mut self.record.bytes_in;
            self.upload.left_by_client(self.ends.buffer, bytes_in)
        })
    }

    /// Uploads the request while it waits for the response's head, and tells the client of interim ones. When the head comes early, what is
    /// left of the upload goes on beside the response.
    async fn both_ways(&mut self, upstream: &mut Stream) -> Result<Answered, Failure> {
        let Exchange {
            outgoing,
            ends,
            upload,
            answer,
            record,
            ..
        } = self;
        let request = &outgoing.request;
        record.sent = None;
        let mut interims = Interims::new(request, &outgoing.route.response_headers);
        let mut upstream = BothWays::of(upstream);
        let (mut reading, mut writing) = upstream.split();
        let sent = if request.body == BodyLength::None {
            put(
                request,
                ends,
                &mut writing,
                &outgoing.out,
                &upload.progress.begun,
            )
            .await
            .map_err(Failure::from)
        } else {
            let mut client = BothWays::of(ends.client);
            let (mut from_client, mut to_client) = client.split();
            let sent = tokio::select! {
                biased;
                head = early_head(request, &mut reading, answer, &mut interims, &mut to_client) => {
                    let head = head?;
                    record.note_answered(head.status);
                    if head.status != 101 {
                        return Ok(Answered { head, uploaded: false });
                    }
                    // What is spoken next begins behind the body.
                    let rest = upload.go_on(
                        request,
                        &mut from_client,
                        ends.buffer,
                        ends.deadlines,
                        &mut writing,
                        &mut record.bytes_in,
                    );
                    rest.await?;
                    return Ok(Answered { head, uploaded: true });
                }
                sent = upload.go_on(
                    request,
                    &mut from_client,
                    ends.buffer,
                    ends.deadlines,
                    &mut writing,
                    &mut record.bytes_in,
                ) => sent,
            };
            // What is begun of one is to have its end, whatever is said next.
            interims
                .tell_within(request.idle, ends.deadlines, &mut to_client)
                .await?;
            sent
        };
        let uploaded = match sent {
            Ok(()) => true,
            // The upstream may have answered before it stopped reading: its answer is worth more than a 502.
            Err(Failure::Reply(Rejection::UpstreamBroken, _)) => false,
            Err(failure) => return Err(failure),
        };
        // Its time begins here: how long the client takes to send says nothing of the upstream.
        let pace_is_ours = request.body == BodyLength::None;
        record.note_sent(uploaded || pace_is_ours);
        loop {
            let response = unless_gone(
                ends.client,
                ends.buffer,
                read_head(request, &mut reading, answer),
            );
            let head = ends.deadlines.within(request.within, response).await;
            let head = head.map_err(|Elapsed| Rejection::UpstreamTimeout)?;
            let head = head.ok_or(Failure::ClientGone)??;
            if head.status == 101 && !uploaded {
                return Err(Rejection::UpstreamBroken.into());
            }
            if !interims.take(answer, &head)? {
                record.note_answered(head.status);
                return Ok(Answered { head, uploaded });
            }
            interims
                .tell_within(request.idle, ends.deadlines, ends.client)
                .await?;
        }
    }

    /// Streams the body that begins at the front of `answer` behind the head in `out`; says whether the upstream's connection can
    /// serve another request.
    async fn stream_back(
        &mut self,
        answered: &Answered,
        upstream: &mut Stream,
    ) -> Result<bool, Failure> {
        let Exchange {
            conn,
            outgoing,
            ends:
                Ends {
                    client,
                    buffer,
                    deadlines,
                },
            upload,
            answer,
            record,
            ..
        } = self;
        let (plan, outbox) = (outgoing.plan, &conn.lane.outbox);
        let (request, out) = (&outgoing.request, &mut *outgoing.out);
        let (mut reader, until_close) = answered.reader();
        let chunked = answered.chunked() && !request.is_http10;
        let changes = &outgoing.route.response_headers;
        let (mut client, mut upstream) = (BothWays::of(client), BothWays::of(upstream));
        let (from_client, mut to_client) = client.split();
        let (mut from_upstream, to_upstream) = upstream.split();
        let mut responding = Responding {
            rest: match answered.uploaded {
                true => None,
                false => Some(Rest::of(upload, request, from_client, buffer, to_upstream)),
            },
            deadlines,
            idle: request.idle,
        };
        let (mut told, mut room, mut share) = (false, Room::new(), Share::default());
        loop {
            let mut front = Front::of(answer);
            while !front.rest().is_empty() && !reader.is_done() {
                match reader.next(front.rest()).map_err(|_| broken_off(told))? {
                    Piece::Data { data, consumed } => {
                        record.bytes_out += data.len() as u64;
                        front.move_piece(data, consumed, out, chunked);
                    }
                    Piece::NeedMore { consumed } | Piece::End { consumed } => front.take(consumed),
                }
            }
            drop(front);
            let done = reader.is_done();
            if done {
                if chunked {
                    let may = |name: &[u8]| headers::may_trail_down(name, changes);
                    let end = put_last_chunk(out, reader.trailers(), may);
                    end.map_err(|_| broken_off(told))?;
                }
                persist(plan, outbox, record, told).await?;
            }
            let bytes_in = &mut record.bytes_in;
            responding.write(bytes_in, &mut to_client, out).await?;
            told = true;
            out.clear();
            if done {
                break;
            }
            let read = async || room.read(&mut from_upstream, answer).await;
            match responding.step(bytes_in, read).await? {
                Ok(Ok(read @ 1..)) => share.take(read).await,
                Ok(read) if until_close && is_end(&read) => {
                    persist(plan, outbox, record, told).await?;
                    if chunked {
                        let bytes_in = &mut record.bytes_in;
                        let end = responding.write(bytes_in, &mut to_client, b"0\r\n\r\n");
                        end.await?;
                    }
                    return Ok(false);
                }
                // Cut short: only an abort tells the client, since the head is out.
                Ok(Ok(0) | Err(_)) => return Err(Failure::UpstreamGone),
                Err(Elapsed) => return Err(responding.stalled()),
            }
        }
        Ok(answered.head.keep_alive && answered.uploaded && answer.is_empty())
    }
}

/// What `waited` gives; `None` once the client has left. A client that sends on is there, and is not looked at again.
async fn unless_gone<F: Future>(
    client: &mut Stream,
    buffer: &mut Vec<u8>,
    waited: F,
) -> Option<F::Output> {
    let mut waited = pin!(waited);
    let mut looking = true;
    poll_fn(|cx| {
        if let Poll::Ready(output) = waited.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        match looking.then(|| client.poll_heard(cx, buffer)) {
            None | Some(Poll::Pending) => Poll::Pending,
            Some(Poll::Ready(true)) => {
                looking = false;
                Poll::Pending
            }
            Some(Poll::Ready(false)) => Poll::Ready(None),
        }
    })
    .await
}

async fn put(
    request: &Request,
    ends: &mut Ends<'_>,
    upstream: &mut Writing<'_, '_>,
    mut bytes: &[u8],
    begun: &Cell<bool>,
) -> Result<(), Rejection> {
    let write = async {
        while !bytes.is_empty() {
            match upstream.write(bytes).await {
                Ok(written @ 1..) => bytes = &bytes[written..],
                Ok(0) | Err(_) => return Err(Rejection::UpstreamBroken),
            }
            begun.set(true);
        }
        upstream
            .flush()
            .await
            .map_err(|_| Rejection::UpstreamBroken)
    };
    match ends.deadlines.within(request.within, write).await {
        Ok(written) => written,
        Err(Elapsed) => Err(Rejection::UpstreamTimeout),
    }
}

/// The final head, as far as it comes before the request is whole; interim ones before it are told.
async fn early_head(
    request: &Request,
    upstream: &mut Reading<'_, '_>,
    answer: &mut Vec<u8>,
    interims: &mut Interims<'_>,
    client: &mut Writing<'_, '_>,
) -> Result<ResponseHead, Failure> {
    loop {
        let head = read_head(request, upstream, answer).await?;
        if !interims.take(answer, &head)? {
            return Ok(head);
        }
        interims
            .tell_within(request.idle, &mut Deadlines::new(), client)
            .await?;
    }
}

/// The upstream's response is not whole; `told` once its head is out.
fn broken_off(told: bool) -> Failure {
    match told {
        true => Failure::UpstreamGone,
        false => Rejection::UpstreamBroken.into(),
    }
}
