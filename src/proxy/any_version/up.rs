//! A request's body on its way to the upstream.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use h2::Reason;

use super::kept::Body;
use super::parts::{Broken, Part, Sink, keep};
use crate::config::Route;
use crate::http1::head::BodyLength;
use crate::plan::Plan;
use crate::proxy::exchange::Failure;
use crate::proxy::headers;
use crate::proxy::outcome::leaves_response;
use crate::proxy::outgoing::Request;
use crate::proxy::progress::Progress;
use crate::proxy::reply::Rejection;
use crate::proxy::wire::{Deadlines, Elapsed};

/// For as long as nothing moves, or half of the time of a try that has less: a sender that is held up for less is none that an upstream has forgotten.
const STUCK: Duration = Duration::from_secs(1);

/// A request's body on its way, which may go on beside the response.
pub(super) struct Uploading<'a, F> {
    /// Until it is done.
    pub rest: Option<Pin<&'a mut F>>,
    /// What of it has come, in bytes.
    pub bytes_in: &'a Cell<u64>,
    /// Whether all of it is sent.
    pub whole: bool,
    /// Why it ended beside the response, and that with it.
    pub refused: Option<Rejection>,
}

impl<F: Future<Output = Result<(), Failure>>> Uploading<'_, F> {
    /// Ready once it came to its end, be it good or bad; pending for ever after. `bytes_in` becomes what has come of the body, for
    /// whoever tells of the request meanwhile.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        bytes_in: &mut u64,
    ) -> Poll<Result<(), Failure>> {
        let Some(rest) = &mut self.rest else {
            return Poll::Pending;
        };
        let polled = rest.as_mut().poll(cx);
        *bytes_in = self.bytes_in.get();
        let Poll::Ready(ended) = polled else {
            return Poll::Pending;
        };
        self.rest = None;
        self.whole = ended.is_ok();
        Poll::Ready(ended)
    }

    /// Whether the upstream has taken nothing for a while, though there is something of the body for it.
    pub(super) fn is_stuck(&self, request: &Request, progress: &Progress) -> bool {
        let long = STUCK.min(request.within / 2);
        !self.whole && !progress.waits() && progress.left_of(long).is_zero()
    }

    /// What `response` gives, with the upload going on meanwhile. Where that ends for the client's part, be it gone or at fault, so does the
    /// exchange: the upstream may wait for what does not come. Else the response stands.
    pub(super) async fn beside<T>(
        &mut self,
        bytes_in: &mut u64,
        response: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let mut response = pin!(response);
        poll_fn(|cx| {
            if let Poll::Ready(output) = response.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            match self.poll(cx, bytes_in) {
                Poll::Pending | Poll::Ready(Ok(())) => Poll::Pending,
                Poll::Ready(Err(failure)) if leaves_response(&failure) => Poll::Pending,
                Poll::Ready(Err(Failure::Reply(rejection, _))) => {
                    let failure = Failure::CutShort(rejection.reason());
                    self.refused = Some(rejection);
                    Poll::Ready(Err(failure))
                }
                Poll::Ready(Err(failure)) => Poll::Ready(Err(failure)),
            }
        })
        .await
    }
}

/// Sends the whole body, if there is where to.
pub(super) async fn upload(
    request: &Request,
    plan: &Plan,
    route: &Route,
    body: &mut Body<'_, '_, '_>,
    sink: Option<Sink<'_>>,
    progress: &Progress,
    bytes_in: &Cell<u64>,
) -> Result<(), Failure> {
    let Some(mut sink) = sink else {
        return Ok(());
    };
    let sent = send(request, plan, route, body, &mut sink, progress, bytes_in).await;
    match sent {
        Ok(()) | Err(Failure::Reply(Rejection::UpstreamBroken, _)) => {}
        // A stream whose response goes on would else never end.
        Err(_) => sink.reset(Reason::CANCEL),
    }
    sent
}

async fn send(
    request: &Request,
    plan: &Plan,
    route: &Route,
    body: &mut Body<'_, '_, '_>,
    sink: &mut Sink<'_>,
    progress: &Progress,
    bytes_in: &Cell<u64>,
) -> Result<(), Failure> {
    let mut deadlines = Deadlines::new();
    if request.body == BodyLength::None {
        let flushed = sink.flush(|| progress.sent());
        return taken(&mut deadlines, request, progress, flushed).await;
    }
    let mut first = true;
    loop {
        let part = {
            let mut next = pin!(body.next());
            match next.as_mut().now_or_never() {
                Some(part) => part,
                None => {
                    if first {
                        // The head goes ahead of a body that takes its time.
                        let flushed = sink.flush(|| progress.sent());
                        taken(&mut deadlines, request, progress, flushed).await?;
                    }
                    let waiting = progress.wait();
                    let read = unless_late(&mut deadlines, request, progress, next).await;
                    drop(waiting);
                    read.map_err(|Elapsed| Rejection::BodyTimeout)?
                }
            }
        };
        first = false;
        progress.made();
        let part = part.map_err(|broken| match broken {
            // It may still read.
            Broken::CutShort | Broken::Malformed => Rejection::BadBody.into(),
            Broken::Gone => Failure::ClientGone,
        })?;
        match part {
            Part::Data { bytes, last } => {
                let came = bytes_in.get() + bytes.len() as u64;
                bytes_in.set(came);
                if came > request.max_body {
                    return Err(Rejection::BodyTooLarge.into());
                }
                let put = sink.put(bytes, last, || progress.sent());
                let put = taken(&mut deadlines, request, progress, put);
                body.source.gathering(put).await?;
                // How long the upstream took to read it is not the client's time.
                progress.made();
                progress.works();
                if last {
                    return Ok(());
                }
            }
            Part::End(mut trailers) => {
                keep(&mut trailers, |name| {
                    headers::may_trail_up(name, plan, route)
                });
                let end = sink.end(trailers, || progress.sent());
                return taken(&mut deadlines, request, progress, end).await;
            }
        }
    }
}

/// What `next` gives, unless nothing has moved for too long, either way: one side may only listen. Until the response's head has come, the
/// client has a time of its own, too; but for a call of gRPC, which streams for as long as both like.
async fn unless_late<T>(
    deadlines: &mut Deadlines,
    request: &Request,
    progress: &Progress,
    mut next: Pin<&mut impl Future<Output = T>>,
) -> Result<T, Elapsed> {
    let left = || match request.grpc.is_some() || progress.answered.get() {
        true => Duration::MAX,
        false => request.read_within.saturating_sub(progress.waited()),
    };
    loop {
        let span = progress.left_of(request.idle).min(left());
        let read = deadlines.within(span, next.as_mut()).await;
        if read.is_ok() || progress.left_of(request.idle).min(left()).is_zero() {
            return read;
        }
    }
}

/// Waits until the upstream has taken what is `put`: for each stall it has its time for the response's head, and once that has come, as
/// long as something moves either way.
async fn taken(
    deadlines: &mut Deadlines,
    request: &Request,
    progress: &Progress,
    put: impl Future<Output = Result<(), Broken>>,
) -> Result<(), Failure> {
    let stall = || match progress.answered.get() {
        true => request.idle,
        false => request.within,
    };
    match while_moving(deadlines, progress, stall, put).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Rejection::UpstreamBroken.into()),
        Err(Elapsed) => Err(Rejection::UpstreamTimeout.into()),
    }
}

/// What `put` gives, which begins now, unless nothing moves for a `stall`.
pub(super) async fn while_moving<T>(
    deadlines: &mut Deadlines,
    progress: &Progress,
    stall: impl Fn() -> Duration,
    put: impl Future<Output = T>,
) -> Result<T, Elapsed> {
    let mut put = pin!(put);
    let mut span = stall();
    loop {
        let done = deadlines.within(span, put.as_mut()).await;
        if done.is_ok() {
            return done;
        }
        span = progress.left_of(stall());
        if span.is_zero() {
            return done;
        }
    }
}
