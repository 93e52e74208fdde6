//! A request's body on its way to the upstream, which may go on beside the response.

use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::config::Route;
use crate::http1::body::{BodyReader, Piece};
use crate::http1::head::BodyLength;
use crate::net::stream::{Reading, Writing};
use crate::plan::Plan;
use crate::proxy::exchange::Failure;
use crate::proxy::framing::Front;
use crate::proxy::headers::{may_trail_up, put_last_chunk};
use crate::proxy::outcome::{leaves_response, stalled, within_body};
use crate::proxy::outgoing::{Outgoing, Request};
use crate::proxy::progress::Progress;
use crate::proxy::reply::Rejection;
use crate::proxy::retries::may_be_kept;
use crate::proxy::trace::Renamed;
use crate::proxy::wire::{Deadlines, Elapsed, Room, Share};
use crate::store::breakers::Probe;

/// A request with a body on its way up. It may be left at any wait and gone on with: what is not sent yet is kept here.
pub(super) struct Upload<'p> {
    reader: BodyReader,
    room: Room,
    share: Share,
    chunked: bool,
    /// Bytes that the body may still have.
    left: u64,
    /// Of all tries, but for what has `begun`.
    pub progress: Progress,
    /// Whether the client was waited for when this was left.
    waits: bool,
    /// Not sent yet, but for what is `written` of it.
    out: Vec<u8>,
    written: usize,
    /// Whether it is gone from `out`.
    lost: bool,
    /// All that was taken so far, and the bytes of the body that may be kept so; `None` once they are too many.
    kept: Option<(Vec<u8>, u64)>,
    /// They say what must not come behind the body.
    plan: &'p Plan,
    route: &'p Route,
}

impl<'p> Upload<'p> {
    /// With nothing sent yet.
    pub(super) fn new(outgoing: &Outgoing<'p>, probe: Option<Rc<Probe>>) -> Upload<'p> {
        let (request, head, keep) = (&outgoing.request, &outgoing.out, outgoing.keep());
        let out = match request.body {
            BodyLength::None => Vec::new(),
            BodyLength::Fixed(_) | BodyLength::Chunked => head.to_vec(),
        };
        let fits = may_be_kept(request.body, keep);
        Upload {
            lost: false,
            kept: fits.then(|| (head.to_vec(), keep as u64)),
            reader: BodyReader::new(request.body),
            room: Room::new(),
            share: Share::default(),
            chunked: request.body == BodyLength::Chunked,
            left: request.max_body,
            progress: Progress::begin(Duration::ZERO, probe),
            waits: false,
            out,
            written: 0,
            plan: outgoing.plan,
            route: outgoing.route,
        }
    }

    /// Whether the request can be sent again from its first byte.
    pub(super) fn can_begin_again(&self) -> bool {
        !self.lost || self.kept.is_some()
    }

    /// The request is to be sent again, which must be possible.
    pub(super) fn begin_again(&mut self, renamed: Option<Renamed>) {
        if let Some(renamed) = renamed {
            renamed.put(&mut self.out);
            if let Some((kept, _)) = &mut self.kept {
                renamed.put(kept);
            }
        }
        self.progress.begun.set(false);
        self.written = 0;
        if let (true, Some((kept, _))) = (self.lost, &self.kept) {
            self.out.clear();
            self.out.extend_from_slice(kept);
        }
    }

    /// Sends on. `bytes_in` counts the body as it comes, so that it is known to whoever leaves this or tells of the request meanwhile.
    pub(super) async fn go_on(
        &mut self,
        request: &Request,
        from_client: &mut Reading<'_, '_>,
        buffer: &mut Vec<u8>,
        deadlines: &mut Deadlines,
        to_upstream: &mut Writing<'_, '_>,
        bytes_in: &mut u64,
    ) -> Result<(), Failure> {
        let span = match self.progress.answered.get() {
            true => request.idle,
            false => request.within,
        };
        self.waits = false;
        loop {
            while self.written < self.out.len() {
                let write = to_upstream.write(&self.out[self.written..]);
                match deadlines.within(span, write).await {
                    Ok(Ok(written @ 1..)) => {
                        self.written += written;
                        self.progress.sent();
                    }
                    Ok(Ok(0) | Err(_)) => return Err(Rejection::UpstreamBroken.into()),
                    Err(Elapsed) => return Err(Rejection::UpstreamTimeout.into()),
                }
            }
            self.lost |= self.written > 0;
            self.out.clear();
            self.written = 0;
            match deadlines.within(span, to_upstream.flush()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Rejection::UpstreamBroken.into()),
                Err(Elapsed) => return Err(Rejection::UpstreamTimeout.into()),
            }
            if self.reader.is_done() {
                return Ok(());
            }
            if buffer.is_empty() {
                self.read(request, from_client, buffer, deadlines).await?;
                self.share.take(buffer.len()).await;
            }
            self.gather(buffer, bytes_in)?;
        }
    }

    /// Why a client that sends no more and has `buffer` still unread ends the request: it sent too little of its body, and
    /// may read that it did, or it left.
    pub(super) fn left_by_client(&mut self, buffer: &mut Vec<u8>, bytes_in: &mut u64) -> Failure {
        match self.gather(buffer, bytes_in) {
            Ok(()) if self.reader.is_done() => Failure::ClientGone,
            Ok(()) => Rejection::BadBody.into(),
            Err(refused) => refused.into(),
        }
    }

    async fn read(
        &mut self,
        request: &Request,
        from_client: &mut Reading<'_, '_>,
        buffer: &mut Vec<u8>,
        deadlines: &mut Deadlines,
    ) -> Result<(), Failure> {
        let left = match self.progress.answered.get() {
            true => Duration::MAX,
            false => request.read_within.saturating_sub(self.progress.waited()),
        };
        let span = request.idle.min(left);
        self.waits = true;
        let waiting = self.progress.wait();
        let read = deadlines.within(span, self.room.read(from_client, buffer));
        let read = read.await;
        drop(waiting);
        self.waits = false;
        match read {
            Ok(Ok(1..)) => {}
            // It may still read.
            Ok(Ok(0)) => return Err(Rejection::BadBody.into()),
            Ok(Err(_)) => return Err(Failure::ClientGone),
            Err(Elapsed) => return Err(Rejection::BodyTimeout.into()),
        }
        self.progress.made();
        Ok(())
    }

    /// Takes all of the body that is in `buffer`, to go out at once: a write for each of many small chunks would be work for
    /// nothing.
    fn gather(&mut self, buffer: &mut Vec<u8>, bytes_in: &mut u64) -> Result<(), Rejection> {
        let before = self.out.len();
        let mut front = Front::of(buffer);
        while !front.rest().is_empty() && !self.reader.is_done() {
            let piece = self.reader.next(front.rest());
            match piece.map_err(|_| Rejection::BadBody)? {
                Piece::Data { data, consumed } => {
                    *bytes_in += data.len() as u64;
                    self.left = self
                        .left
                        .checked_sub(data.len() as u64)
                        .ok_or(Rejection::BodyTooLarge)?;
                    front.move_piece(data, consumed, &mut self.out, self.chunked);
                }
                Piece::NeedMore { consumed } | Piece::End { consumed } => front.take(consumed),
            }
        }
        drop(front);
        if self.reader.is_done() && self.chunked {
            let may = |name: &[u8]| may_trail_up(name, self.plan, self.route);
            put_last_chunk(&mut self.out, self.reader.trailers(), may)
                .map_err(|_| Rejection::BadBody)?;
        }
        if let Some((kept, most)) = &mut self.kept {
            kept.extend_from_slice(&self.out[before..]);
            if *bytes_in > *most {
                self.kept = None;
            }
        }
        Ok(())
    }
}

/// What is left of an upload when the response has begun.
pub(super) struct Rest<'a, 'p> {
    upload: &'a mut Upload<'p>,
    request: &'a Request,
    from_client: Reading<'a, 'a>,
    buffer: &'a mut Vec<u8>,
    deadlines: Deadlines,
    to_upstream: Writing<'a, 'a>,
    /// Whether it is over, for good or bad.
    ended: bool,
}

impl<'a, 'p> Rest<'a, 'p> {
    pub(super) fn of(
        upload: &'a mut Upload<'p>,
        request: &'a Request,
        from_client: Reading<'a, 'a>,
        buffer: &'a mut Vec<u8>,
        to_upstream: Writing<'a, 'a>,
    ) -> Rest<'a, 'p> {
        upload.progress.answer();
        Rest {
            upload,
            request,
            from_client,
            buffer,
            deadlines: Deadlines::new(),
            to_upstream,
            ended: false,
        }
    }
}

/// A response under way, with what is left of the upload, if anything, beside it. As long as one moves the other may wait.
pub(super) struct Responding<'d, 'a, 'p> {
    pub rest: Option<Rest<'a, 'p>>,
    /// Of the response.
    pub deadlines: &'d mut Deadlines,
    /// For each stall, either way.
    pub idle: Duration,
}

impl Responding<'_, '_, '_> {
    /// Why the response ends, of which nothing has come for too long.
    pub(super) fn stalled(&self) -> Failure {
        let rest = self.rest.as_ref().filter(|rest| !rest.ended);
        within_body(stalled(rest.is_some_and(|rest| rest.upload.waits)).as_ref())
    }

    /// What a `step` of the response gives. It is taken anew after each stall that the upload did not share.
    pub(super) async fn step<T>(
        &mut self,
        bytes_in: &mut u64,
        mut step: impl AsyncFnMut() -> T,
    ) -> Result<Result<T, Elapsed>, Failure> {
        let mut span = self.idle;
        loop {
            let taken = self.deadlines.within(span, step());
            let taken = beside(&mut self.rest, bytes_in, taken).await?;
            if taken.is_ok() {
                return Ok(taken);
            }
            span = match &self.rest {
                Some(rest) => rest.upload.progress.left_of(self.idle),
                None => Duration::ZERO,
            };
            if span.is_zero() {
                return Ok(taken);
            }
        }
    }

    /// Writes all of `bytes`, down to the kernel. A client that takes some of them in time is there, however few they are.
    pub(super) async fn write(
        &mut self,
        bytes_in: &mut u64,
        client: &mut Writing<'_, '_>,
        mut bytes: &[u8],
    ) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let written = self.step(bytes_in, async || client.write(bytes).await);
            match written.await? {
                Ok(Ok(written @ 1..)) => bytes = &bytes[written..],
                Ok(Ok(0) | Err(_)) | Err(Elapsed) => return Err(Failure::ClientGone),
            }
        }
        let flushed = self.step(bytes_in, async || client.flush().await);
        match flushed.await? {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(Elapsed) => Err(Failure::ClientGone),
        }
    }
}

/// What `response` gives, with the rest of the upload going on meanwhile. Where that ends for the client's part, be it gone or at fault, so
/// does the exchange: the upstream may wait for what does not come. Else the response stands, and neither connection is used again.
async fn beside<F: Future>(
    rest: &mut Option<Rest<'_, '_>>,
    bytes_in: &mut u64,
    response: F,
) -> Result<F::Output, Failure> {
    let Some(going) = rest.as_mut().filter(|rest| !rest.ended) else {
        return Ok(response.await);
    };
    let mut response = pin!(response);
    let ended = tokio::select! {
        biased;
        output = &mut response => return Ok(output),
        ended = going.upload.go_on(
            going.request,
            &mut going.from_client,
            going.buffer,
            &mut going.deadlines,
            &mut going.to_upstream,
            bytes_in,
        ) => ended,
    };
    going.ended = true;
    match ended {
        Ok(()) => Ok(response.await),
        Err(failure) if leaves_response(&failure) => Ok(response.await),
        Err(Failure::Reply(rejection, _)) => Err(Failure::CutShort(rejection.reason())),
        Err(failure) => Err(failure),
    }
}
