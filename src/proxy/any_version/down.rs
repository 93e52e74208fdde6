//! A response on its way to the client, with the rest of the upload beside it.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use h2::Reason;
use h2::server::SendResponse;

use super::parts::{Broken, Part, Sink, Source, keep};
use super::up::{Uploading, while_moving};
use crate::config::rewrite::HeaderChanges;
use crate::http1::head::BodyLength;
use crate::http1::response::ResponseHead;
use crate::http2::grpc::GrpcStatus;
use crate::http2::head::upgrade_response;
use crate::net::stream::{Reading, Writing};
use crate::plan::Plan;
use crate::proxy::exchange::{Failure, persist};
use crate::proxy::headers;
use crate::proxy::interim::Interims;
use crate::proxy::outbox::Outbox;
use crate::proxy::outcome::{stalled, within_body};
use crate::proxy::outgoing::Request;
use crate::proxy::progress::Progress;
use crate::proxy::record::Record;
use crate::proxy::reply::Rejection;
use crate::proxy::wire::{Deadlines, Elapsed};

/// The field that says how a call of gRPC went.
const GRPC_STATUS: &str = "grpc-status";

/// The way back to the client.
pub(super) enum Back<'a, 'b> {
    Http1 {
        reading: Reading<'b, 'b>,
        /// Until the response begins.
        writing: Option<Writing<'b, 'b>>,
        /// What was read in looking whether the client is there.
        ahead: &'a mut Vec<u8>,
    },
    Http2(&'a mut SendResponse<Bytes>),
}

impl Back<'_, '_> {
    /// Ready once the client has left. One of HTTP/1.1 that sends on is there, and is not looked at again.
    pub(super) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Back::Http1 { reading, ahead, .. } if ahead.is_empty() => {
                match reading.poll_heard(cx, ahead) {
                    Poll::Ready(false) => Poll::Ready(()),
                    Poll::Ready(true) | Poll::Pending => Poll::Pending,
                }
            }
            Back::Http1 { .. } | Back::Http2(_) => self.poll_reset(cx),
        }
    }

    /// As [`Back::poll_gone`], where that is heard beside the request's body.
    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Back::Http1 { .. } => Poll::Pending,
            Back::Http2(respond) => respond.poll_reset(cx).map(drop),
        }
    }

    /// What `waited` gives, unless the client leaves or gives up; before the request has gone out.
    pub(super) async fn unless_gone<T>(
        &mut self,
        request: &Request,
        waited: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let mut waited = pin!(waited);
        let mut until_deadline = pin!(request.until_deadline());
        poll_fn(|cx| {
            if let Poll::Ready(output) = waited.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            if until_deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(Rejection::DeadlineExceeded.into()));
            }
            let gone = match request.body {
                BodyLength::None => self.poll_gone(cx),
                // What is heard of a client of HTTP/1.1 may be its body.
                BodyLength::Fixed(_) | BodyLength::Chunked => self.poll_reset(cx),
            };
            gone.map(|()| Err(Failure::ClientGone))
        })
        .await
    }

    pub(super) fn is_http1(&self) -> bool {
        matches!(self, Back::Http1 { .. })
    }

    /// Tells of the interim responses that wait for it, which is done once this is ready.
    pub(super) fn poll_tell(
        &mut self,
        cx: &mut Context<'_>,
        interims: &mut Interims<'_>,
    ) -> Poll<Result<(), Failure>> {
        match self {
            Back::Http1 {
                writing: Some(writing),
                ..
            } => {
                let told = pin!(interims.tell(writing)).poll(cx);
                told.map_err(|_| Failure::ClientGone)
            }
            Back::Http1 { .. } => Poll::Ready(Ok(())),
            Back::Http2(respond) => Poll::Ready(tell_http2(respond, interims)),
        }
    }

    /// As [`Back::poll_tell`], to a client that takes it within `idle` or is given up.
    pub(super) async fn tell(
        &mut self,
        interims: &mut Interims<'_>,
        deadlines: &mut Deadlines,
        idle: Duration,
    ) -> Result<(), Failure> {
        let told = poll_fn(|cx| self.poll_tell(cx, interims));
        let told = deadlines.within(idle, told).await;
        told.map_err(|Elapsed| Failure::ClientGone)?
    }
}

fn tell_http2(
    respond: &mut SendResponse<Bytes>,
    interims: &mut Interims<'_>,
) -> Result<(), Failure> {
    while !interims.untold().is_empty() {
        let head = upgrade_response(interims.untold());
        let (head, bytes) = head.map_err(|_| Rejection::UpstreamBroken)?;
        interims.told(bytes);
        respond
            .send_informational(head)
            .map_err(|_| Failure::ClientGone)?;
    }
    Ok(())
}

/// A response on its way to the client: its head, which goes out with what follows first, and its body.
pub(super) struct Down<'r, 'c> {
    pub head: Vec<u8>,
    pub chunked: bool,
    /// What is left of a length that the client is told: to one of HTTP/1.1, and to some of HTTP/2, the last byte of that is the end.
    pub left: Option<u64>,
    /// Once the head is on its way.
    pub sink: Option<Sink<'c>>,
    pub plan: &'r Plan,
    pub outbox: &'r Outbox,
    pub request: &'r Request,
    /// Of the route, to what is told.
    pub changes: &'r HeaderChanges,
    pub progress: &'r Progress,
    /// How a call of gRPC ended, once that is known.
    pub grpc: Option<GrpcStatus>,
}

impl<'c> Down<'_, 'c> {
    /// Where the body goes. The head goes ahead of it; with `ended` nothing follows that.
    fn begin(&mut self, back: &mut Back<'_, 'c>, ended: bool) -> Result<&mut Sink<'c>, Failure> {
        if self.sink.is_none() {
            let head = std::mem::take(&mut self.head);
            self.sink = Some(match back {
                Back::Http1 { writing, .. } => Sink::Http1 {
                    stream: writing.take().ok_or(Failure::ClientGone)?,
                    out: head,
                    chunked: self.chunked,
                },
                Back::Http2(respond) => {
                    let head = upgrade_response(&head).map_err(|_| Rejection::UpstreamBroken)?;
                    let sent = respond.send_response(head.0, ended);
                    Sink::Http2(sent.map_err(|_| Failure::ClientGone)?)
                }
            });
        }
        self.sink.as_mut().ok_or(Failure::ClientGone)
    }

    /// Streams `body`, which is missing where there is none. Ends it where the upload comes to a bad end.
    pub(super) async fn stream<F: Future<Output = Result<(), Failure>>>(
        &mut self,
        body: Option<&mut Source<'_, '_>>,
        uploading: &mut Uploading<'_, F>,
        back: &mut Back<'_, 'c>,
        record: &mut Record,
    ) -> Result<(), Failure> {
        let streamed = self.pass(body, uploading, back, record).await;
        match uploading.refused.take() {
            Some(rejection) => Err(self.cut_short(Some(rejection), record).await),
            None => streamed,
        }
    }

    async fn pass<F: Future<Output = Result<(), Failure>>>(
        &mut self,
        body: Option<&mut Source<'_, '_>>,
        uploading: &mut Uploading<'_, F>,
        back: &mut Back<'_, 'c>,
        record: &mut Record,
    ) -> Result<(), Failure> {
        let (request, progress) = (self.request, self.progress);
        let mut deadlines = Deadlines::new();
        let (moved, stall) = (|| progress.made(), || request.idle);
        let Some(body) = body else {
            self.safe(record).await?;
            let flushed = self.begin(back, true)?.flush(moved);
            return to_client(while_moving(&mut deadlines, progress, stall, flushed).await);
        };
        loop {
            let part = {
                let mut next = pin!(body.next());
                match next.as_mut().now_or_never() {
                    Some(part) => part.map_err(|_| None),
                    None => {
                        if self.left == Some(0) {
                            self.safe(record).await?;
                        }
                        let bytes_in = &mut record.bytes_in;
                        let waited = self.wait(next, uploading, back, &mut deadlines, bytes_in);
                        waited.await?
                    }
                }
            };
            progress.made();
            let told = self.sink.is_some();
            match part {
                Ok(Part::Data { bytes, last }) => {
                    let count = bytes.len() as u64;
                    record.bytes_out += count;
                    self.left = self.left.map(|left| left.saturating_sub(count));
                    if last || self.left == Some(0) {
                        self.safe(record).await?;
                    }
                    let sink = self.begin(back, false)?;
                    let put = sink.put(bytes, last, moved);
                    let put = while_moving(&mut deadlines, progress, stall, put);
                    let put = body.gathering(put);
                    to_client(uploading.beside(&mut record.bytes_in, put).await?)?;
                    // How long the client took to read it is not the upstream's time.
                    progress.made();
                    if last {
                        return Ok(());
                    }
                }
                Ok(Part::End(mut trailers)) => {
                    if let (Some(_), Some(status)) = (request.grpc, trailers.get(GRPC_STATUS)) {
                        self.grpc = Some(GrpcStatus::parse(status.as_bytes()));
                    }
                    keep(&mut trailers, |name| match request.grpc {
                        Some(_) => headers::may_end_a_call(name, self.changes),
                        None => headers::may_trail_down(name, self.changes),
                    });
                    self.safe(record).await?;
                    let ended = !told && trailers.is_empty();
                    let sink = self.begin(back, ended)?;
                    if ended && matches!(sink, Sink::Http2(_)) {
                        return Ok(());
                    }
                    let end = sink.end(trailers, moved);
                    let end = while_moving(&mut deadlines, progress, stall, end);
                    return to_client(uploading.beside(&mut record.bytes_in, end).await?);
                }
                Err(_) if !told => return Err(Rejection::UpstreamBroken.into()),
                Err(ours) => {
                    if ours == Some(Rejection::DeadlineExceeded) {
                        self.grpc = Some(GrpcStatus::DEADLINE_EXCEEDED);
                    }
                    return Err(self.cut_short(ours, record).await);
                }
            }
        }
    }

    /// Lets what there is go ahead of the `next` part, and waits for that. Where none comes: why, if it is not the upstream that broke off.
    async fn wait<F: Future<Output = Result<(), Failure>>>(
        &mut self,
        mut next: Pin<&mut impl Future<Output = Result<Part, Broken>>>,
        uploading: &mut Uploading<'_, F>,
        back: &mut Back<'_, 'c>,
        deadlines: &mut Deadlines,
        bytes_in: &mut u64,
    ) -> Result<Result<Part, Option<Rejection>>, Failure> {
        let (request, progress) = (self.request, self.progress);
        // An upstream of HTTP/2 may say the end in a frame of its own, and who has all may leave before.
        let has_all = self.left == Some(0) && back.is_http1();
        let sink = self.begin(back, false)?;
        let flushed = sink.flush(|| progress.made());
        let flushed = while_moving(deadlines, progress, || request.idle, flushed);
        to_client(uploading.beside(bytes_in, flushed).await?)?;
        loop {
            let is_sending = uploading.rest.is_some();
            let unless_gone = poll_fn(|cx| {
                if let Poll::Ready(part) = next.as_mut().poll(cx) {
                    return Poll::Ready(Ok(part));
                }
                if has_all {
                    return Poll::Pending;
                }
                let gone = poll_gone(sink, back, is_sending, cx);
                gone.map(|()| Err(Failure::ClientGone))
            });
            // As long as one side speaks the other may only listen.
            let idle = progress.left_of(request.idle);
            let waited = deadlines.within(request.left_of(idle), unless_gone);
            match uploading.beside(bytes_in, waited).await? {
                Ok(part) => return Ok(part?.map_err(|_| None)),
                Err(Elapsed) if request.is_over() => {
                    return Ok(Err(Some(Rejection::DeadlineExceeded)));
                }
                Err(Elapsed) if !progress.left_of(request.idle).is_zero() => {}
                Err(Elapsed) => return Ok(Err(stalled(progress.waits()))),
            }
        }
    }

    /// Before the end of the response goes out.
    async fn safe(&mut self, record: &mut Record) -> Result<(), Failure> {
        let safe = persist(self.plan, self.outbox, record, self.sink.is_some()).await;
        if safe.is_err() {
            self.abort();
        }
        safe
    }

    /// The response is not whole and its head is out: trailers tell a gRPC client why, and others only an abort. `ours`: where
    /// it is not the upstream that broke off.
    async fn cut_short(&mut self, ours: Option<Rejection>, record: &mut Record) -> Failure {
        let failure = within_body(ours.as_ref());
        if self.request.grpc.is_none() {
            self.abort();
            return failure;
        }
        let why = ours.unwrap_or(Rejection::UpstreamBroken);
        let status = why.grpc();
        // This, too, is an answer: its event comes first, and says so.
        record.note_aborted(failure.reason());
        record.grpc = Some(status);
        if let Err(not_safe) = self.safe(record).await {
            return not_safe;
        }
        if let Some(sink) = &mut self.sink {
            let _ = sink.end(status.trailers(&why.detail()), || ()).await;
        }
        failure
    }

    fn abort(&mut self) {
        if let Some(sink) = &mut self.sink {
            sink.reset(Reason::INTERNAL_ERROR);
        }
    }
}

/// Ready once the client of a response under way has left. One of HTTP/1.1 is heard once no more of its body is due.
fn poll_gone(
    sink: &mut Sink<'_>,
    back: &mut Back<'_, '_>,
    is_sending: bool,
    cx: &mut Context<'_>,
) -> Poll<()> {
    match sink {
        Sink::Http1 { .. } if is_sending => Poll::Pending,
        Sink::Http1 { .. } => back.poll_gone(cx),
        Sink::Http2(stream) => stream.poll_reset(cx).map(drop),
    }
}

fn to_client(put: Result<Result<(), Broken>, Elapsed>) -> Result<(), Failure> {
    match put {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(Elapsed) => Err(Failure::ClientGone),
    }
}

/// The status of a gRPC response that ends with its head.
pub(super) fn grpc_status(
    request: &Request,
    answer: &[u8],
    head: &ResponseHead,
) -> Option<GrpcStatus> {
    request.grpc?;
    let mut fields = head.fields.iter();
    let (_, value) = fields.find(|(name, _)| headers::is(answer, name, GRPC_STATUS))?;
    Some(GrpcStatus::parse(&answer[value.clone()]))
}
