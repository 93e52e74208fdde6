//! One request by one connection: the body goes up while the response's head is waited for, and the response comes back beside the
//! rest of it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use h2::RecvStream;

use super::answers::Answers;
use super::current_try::CurrentTry;
use super::down::{Back, Down, grpc_status};
use super::kept::Body;
use super::parts::{Sink, Source};
use super::up::{Uploading, upload};
use super::{Ended, Exchange};
use crate::config::rewrite::HeaderChanges;
use crate::http1::head::BodyLength;
use crate::http1::response::{ResponseBody, ResponseHead};
use crate::http1::websocket;
use crate::proxy::exchange::{Answered, Failure, is_over};
use crate::proxy::interim::Interims;
use crate::proxy::outcome::{end_of_response, learn};
use crate::proxy::outgoing::Request;
use crate::proxy::progress::Progress;
use crate::proxy::record::Record;
use crate::proxy::reply::Rejection;
use crate::proxy::retries::Point;
use crate::proxy::wire::{Deadlines, Elapsed};
use crate::store::breakers::CallEnd;

/// The upstream's side of an exchange.
pub(super) struct Upstream<'a, 'r> {
    /// None for a tunnel, which begins behind the answer.
    pub sink: Option<Sink<'a>>,
    pub answers: Answers<'a>,
    pub current: &'a mut CurrentTry<'r>,
}

/// How an exchange went.
pub(super) enum Ran {
    Ended {
        ended: Ended,
        /// Whether the upstream's connection, of HTTP/1.1, can serve another request.
        reusable: bool,
        /// For how long, by what the upstream says.
        kept_for: Option<Duration>,
    },
    /// A WebSocket begins behind the head, with what is to come of an upstream of HTTP/2.
    Switched(Option<RecvStream>),
}

impl Exchange<'_, '_, '_> {
    /// Sends the request by one connection and streams the response back.
    pub(super) async fn run(
        &mut self,
        body: &mut Body<'_, '_, '_>,
        upstream: Upstream<'_, '_>,
        answer: &mut Vec<u8>,
    ) -> Result<Ran, Failure> {
        let Exchange {
            conn,
            outgoing,
            back,
            record,
        } = self;
        let Upstream {
            sink,
            mut answers,
            current,
        } = upstream;
        record.sent = None;
        let progress = Progress::begin(current.waited, record.probe.clone());
        progress.made();
        let bytes_in = Cell::new(0);
        let request = outgoing.request;
        let plan = outgoing.plan;
        let mut uploading = Uploading {
            rest: Some(pin!(upload(
                &request,
                plan,
                outgoing.route,
                body,
                sink,
                &progress,
                &bytes_in,
            ))),
            bytes_in: &bytes_in,
            whole: false,
            refused: None,
        };
        let answered = await_head(
            &request,
            &outgoing.route.response_headers,
            &mut uploading,
            &mut answers,
            back,
            answer,
            record,
        );
        let answered = answered.await;
        current.waited = progress.waited();
        current.point = Point::of(progress.begun.get(), answer);
        current.is_stuck = uploading.is_stuck(&request, &progress);
        let (mut head, mut body) = answered?;
        if back.is_http1() && head.body == ResponseBody::Length(BodyLength::Fixed(0)) {
            // There is no place for trailers behind it.
            head.body = ResponseBody::Length(BodyLength::None);
        }
        record.note_answered(head.status);
        progress.answer();
        let status = head.status;
        let answered = Answered {
            head,
            uploaded: uploading.whole,
        };
        let by_http2 = matches!(answers, Answers::Http2 { .. });
        let is_bound = request.binds || answered.challenges(answer);
        if let Some(wait) = current.another(&request, Ok(status)) {
            // Boxed, to keep the common future small.
            let gone_on = Box::pin(current.go_on(wait, Ok(status), outgoing, back, record));
            if gone_on.await? {
                let reusable = !by_http2 && !is_bound && is_over(&answered, answer);
                answer.clear();
                return Ok(Ran::Ended {
                    ended: Ended::Again,
                    reusable,
                    kept_for: answered.head.kept_for,
                });
            }
        }
        learn(&current.slot, Ok(status), record);
        current.answered();
        let key = outgoing.websocket_key.as_deref();
        let opens = opens(answer, &answered.head, key, by_http2).inspect_err(|rejection| {
            if *rejection == Rejection::NotSwitched {
                outgoing.finish(CallEnd::Status(status), record);
            }
        })?;
        // What is left of a body cut off by an early response cannot be told from a next request; streams are apart from each other.
        let may_live = answered.uploaded || !back.is_http1();
        let turned = outgoing.begin_response(conn, answer, &answered, may_live, record);
        let next = turned.await?;
        let grpc = grpc_status(&request, answer, &answered.head);
        answer.drain(..answered.head.len);
        if opens {
            outgoing.finish(CallEnd::Status(status), record);
            return Ok(Ran::Switched(body));
        }
        let keep_alive = answered.head.keep_alive;
        let mut body = source(body.as_mut(), answers, answer, &answered)?;
        let mut down = Down {
            head: std::mem::take(&mut *outgoing.out),
            chunked: answered.chunked() && !request.is_http10,
            left: match answered.head.body {
                // How a call of gRPC went is said behind it, to clients of HTTP/2.
                ResponseBody::Length(BodyLength::Fixed(bytes))
                    if back.is_http1() || request.grpc.is_none() =>
                {
                    Some(bytes)
                }
                ResponseBody::Length(_) | ResponseBody::UntilClose => None,
            },
            sink: None,
            plan,
            outbox: &conn.lane.outbox,
            request: &request,
            changes: &outgoing.route.response_headers,
            progress: &progress,
            grpc,
        };
        let has_body = answered.head.body != ResponseBody::Length(BodyLength::None);
        let streamed = down.stream(has_body.then_some(&mut body), &mut uploading, back, record);
        let streamed = streamed.await;
        current.is_stuck = uploading.is_stuck(&request, &progress);
        record.grpc = record.grpc.or(down.grpc);
        outgoing.finish(end_of_response(status, down.grpc, &streamed), record);
        streamed?;
        Ok(Ran::Ended {
            ended: Ended::Whole(next),
            reusable: keep_alive && !is_bound && uploading.whole && body.is_spent(),
            kept_for: answered.head.kept_for,
        })
    }
}

/// A response's head; with its body, where that comes by HTTP/2.
type Head = (ResponseHead, Option<RecvStream>);

/// Uploads while it waits for the response's head, which comes to stand at the front of `answer`, and tells the client of interim ones.
async fn await_head<F: Future<Output = Result<(), Failure>>>(
    request: &Request,
    changes: &HeaderChanges,
    uploading: &mut Uploading<'_, F>,
    answers: &mut Answers<'_>,
    back: &mut Back<'_, '_>,
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<Head, Failure> {
    let mut interims = Interims::new(request, changes);
    let mut deadlines = Deadlines::new();
    let early = early_head(
        request,
        uploading,
        answers,
        back,
        answer,
        (&mut interims, &mut deadlines),
        &mut record.bytes_in,
    );
    let early = early.await;
    // What is begun of one is to have its end, whatever is said next.
    back.tell(&mut interims, &mut deadlines, request.idle)
        .await?;
    if let Some(head) = early? {
        return Ok(head);
    }
    // Its time begins here: how long the client takes to send says nothing of the upstream.
    record.note_sent(uploading.whole);
    let to_http1 = back.is_http1();
    loop {
        let (head, body) = {
            let mut head = pin!(answers.head(request, to_http1, answer));
            let waited = poll_fn(|cx| match head.as_mut().poll(cx) {
                Poll::Ready(head) => Poll::Ready(head.map_err(Failure::from)),
                // What is left of a body that the upstream did not take may be for the next try.
                Poll::Pending if !uploading.whole => {
                    back.poll_reset(cx).map(|()| Err(Failure::ClientGone))
                }
                Poll::Pending => back.poll_gone(cx).map(|()| Err(Failure::ClientGone)),
            });
            let within = request.left_of(request.within);
            let waited = deadlines.within(within, waited).await;
            waited.map_err(|Elapsed| match request.is_over() {
                true => Rejection::DeadlineExceeded,
                false => Rejection::UpstreamTimeout,
            })??
        };
        if !interims.take(answer, &head)? {
            return Ok((head, body));
        }
        back.tell(&mut interims, &mut deadlines, request.idle)
            .await?;
    }
}

/// The final head, as far as it comes before the upload is over; interim ones before it are told.
async fn early_head<F: Future<Output = Result<(), Failure>>>(
    request: &Request,
    uploading: &mut Uploading<'_, F>,
    answers: &mut Answers<'_>,
    back: &mut Back<'_, '_>,
    answer: &mut Vec<u8>,
    (interims, deadlines): (&mut Interims<'_>, &mut Deadlines),
    bytes_in: &mut u64,
) -> Result<Option<Head>, Failure> {
    let to_http1 = back.is_http1();
    let back = RefCell::new(back);
    let mut head = pin!(async {
        loop {
            let (head, body) = answers.head(request, to_http1, answer).await?;
            if !interims.take(answer, &head)? {
                return Ok((head, body));
            }
            let told = poll_fn(|cx| back.borrow_mut().poll_tell(cx, interims));
            let told = deadlines.within(request.idle, told).await;
            told.map_err(|Elapsed| Failure::ClientGone)??;
        }
    });
    let mut until_deadline = pin!(request.until_deadline());
    poll_fn(|cx| {
        if let Poll::Ready(head) = head.as_mut().poll(cx) {
            return Poll::Ready(head.map(Some));
        }
        if until_deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(Rejection::DeadlineExceeded.into()));
        }
        match uploading.poll(cx, bytes_in) {
            // An upload that waits for the upstream does not look whether the client is there.
            Poll::Pending => {
                let left = back.borrow_mut().poll_reset(cx);
                left.map(|()| Err(Failure::ClientGone))
            }
            Poll::Ready(Ok(())) => Poll::Ready(Ok(None)),
            // The upstream may have answered before it stopped reading: its answer is worth more than a 502.
            Poll::Ready(Err(Failure::Reply(Rejection::UpstreamBroken, _))) => Poll::Ready(Ok(None)),
            Poll::Ready(Err(failure)) => Poll::Ready(Err(failure)),
        }
    })
    .await
}

/// Where the response's body comes from, which begins at the front of `answer` or is a stream's `body`.
fn source<'a, 's: 'a>(
    body: Option<&'a mut RecvStream>,
    answers: Answers<'s>,
    answer: &'a mut Vec<u8>,
    answered: &Answered,
) -> Result<Source<'a, 's>, Rejection> {
    match (body, answers) {
        (Some(body), Answers::Http2 { window, .. }) => Ok(Source::http2(body, window)),
        (None, Answers::Http1(stream)) => {
            let (reader, until_close) = answered.reader();
            Ok(Source::Http1 {
                stream,
                buffer: answer,
                reader,
                until_close,
            })
        }
        (None, Answers::Http2 { .. }) | (Some(_), Answers::Http1(_)) => {
            Err(Rejection::UpstreamBroken)
        }
    }
}

/// Whether another protocol begins behind this head, which came `by_http2` or not. With a `key` the client has asked for a WebSocket by
/// HTTP/2, and is to be told nothing but that it is open, or is refused.
fn opens(
    answer: &[u8],
    head: &ResponseHead,
    key: Option<&str>,
    by_http2: bool,
) -> Result<bool, Rejection> {
    match (head.status, key) {
        // RFC 8441 section 5: any of 200 to 299 opens it there.
        (101 | 200..=299, Some(_)) if by_http2 => Ok(true),
        (101, Some(key)) if !websocket::is_opened(answer, head, key) => {
            Err(Rejection::UpstreamBroken)
        }
        // The client would take it for the WebSocket.
        (200..=299, Some(_)) => Err(Rejection::NotSwitched),
        (status, _) => Ok(status == 101),
    }
}
