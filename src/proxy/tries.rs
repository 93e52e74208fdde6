//! A request's way to an endpoint that answers it, by HTTP/1.1: a turn, an endpoint, a connection; and another try where the file asks for
//! one and it does no harm. Owns what may be tried again; must not know what is done with the answer.
//!
//! A request that the upstream may have seen is sent again for the methods that the file names alone, which are all idempotent. One of which
//! not a byte was sent is for any method. The upstream's breaker gets one result for all tries together: it judges whether the upstream
//! serves, and a request that another endpoint rescued was served. Each endpoint's own failures are told to the outlier detection.

use std::borrow::Cow;

use tokio::time::sleep;

use super::exchange::{Answered, Ends, Failure, is_over, learn, outcome, unreached};
use super::forward::{both_ways, unless_gone};
use super::outgoing::Request;
use super::record::Record;
use super::reply::Rejection;
use super::retries::{Over, Point, Tries};
use super::upload::Upload;
use crate::config::upstreams::Retries;
use crate::upstream::{Aim, Connected, LaneUpstream, Picked, Retrying, Slot, Unreached};

/// The endpoint that has answered, over this connection.
pub(super) struct Answerer<'c> {
    pub connected: Connected,
    picked: Picked<'c>,
    _slot: Slot<'c>,
    /// Where it was tried again.
    _retrying: Option<Retrying<'c>>,
}

/// What came of one try.
type Tried = Result<(Connected, Answered), Failure>;

impl Answerer<'_> {
    /// Keeps the connection for another request.
    pub(super) fn give_back(self) {
        self.picked.pool.give_back(self.connected);
    }
}

/// Sends the request, whose head is `head`, to an endpoint of the upstream's. The response's head comes to stand at the front
/// of `answer`.
#[expect(
    clippy::too_many_arguments,
    reason = "the request and where it goes, and both ends of each"
)]
pub(super) async fn ask<'c>(
    request: &Request,
    (upstream, retries): (&'c LaneUpstream, Option<&'c Retries>),
    aim: Aim,
    ends: &mut Ends<'_>,
    upload: &mut Upload<'_>,
    head: &[u8],
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<(Answerer<'c>, Answered), Failure> {
    record.waits();
    // Its turn may be some time off, and is another's where the client has left.
    let entered = unless_gone(ends.client, ends.buffer, upstream.enter()).await;
    let slot = entered.ok_or_else(|| upload.left_by_client(ends.buffer, &mut record.bytes_in))?;
    let mut slot = slot.map_err(|_| Rejection::Overloaded)?;
    record.works();
    let picked = upstream.pick(aim, &[]);
    let mut picked = picked.map_err(|_| Rejection::NoEndpoint)?;
    record.aims_at(&picked.pool);
    let mut retrying = None;
    let tried = match retries {
        None => {
            let tried = ask_one(request, None, &picked, ends, upload, head, answer, record).await;
            tell(&picked, &tried, request, record);
            tried
        }
        Some(retries) => {
            // Apart, so that requests that are not tried again have no room for it.
            let tries = try_and_again(
                request,
                (upstream, retries),
                aim,
                &mut picked,
                &mut retrying,
                ends,
                upload,
                head,
                answer,
                record,
            );
            Box::pin(tries).await
        }
    };
    let status = tried.as_ref().map(|(_, answered)| answered.head.status);
    learn(&slot, status, record);
    let (connected, answered) = tried?;
    slot.answered();
    let answerer = Answerer {
        connected,
        picked,
        _slot: slot,
        _retrying: retrying,
    };
    Ok((answerer, answered))
}

/// Tries an endpoint, and others, until one serves the request or there is no more to be tried.
#[expect(
    clippy::too_many_arguments,
    reason = "the request and where it goes, and both ends of each"
)]
async fn try_and_again<'c>(
    request: &Request,
    (upstream, retries): (&'c LaneUpstream, &'c Retries),
    aim: Aim,
    picked: &mut Picked<'c>,
    retrying: &mut Option<Retrying<'c>>,
    ends: &mut Ends<'_>,
    upload: &mut Upload<'_>,
    head: &[u8],
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Tried {
    let mut tries = Tries::new(upstream, retries, request.within);
    // Each try has a name of its own in a trace.
    let mut head = Cow::Borrowed(head);
    let tried = loop {
        let all = Some(&tries);
        let tried = ask_one(request, all, picked, ends, upload, &head, answer, record).await;
        tell(picked, &tried, request, record);
        let over = Over {
            came: tried.as_ref().map(|(_, answered)| answered.head.status),
            point: Point::of(upload.begun, answer),
            is_kept: upload.can_begin_again(),
            waited: upload.waited(),
        };
        let Some(wait) = tries.another(request, &over) else {
            break tried;
        };
        let reason = over.came.err().map(Failure::reason);
        let over = record.tried(&picked.pool, over.came.ok(), reason);
        let waited = unless_gone(ends.client, ends.buffer, sleep(wait)).await;
        if waited.is_none() {
            break Err(upload.left_by_client(ends.buffer, &mut record.bytes_in));
        }
        let Some(next) = tries.next(aim, &picked.pool) else {
            break tried;
        };
        if let Ok((connected, answered)) = tried
            && is_over(&answered, answer)
        {
            picked.pool.give_back(connected);
        }
        *picked = next;
        answer.clear();
        let renamed = record.begin_again(over, &picked.pool, head.to_mut());
        upload.begin_again(renamed);
    };
    *retrying = tries.budget;
    tried
}

/// Says what the endpoint made of the request, where that is known.
fn tell(picked: &Picked<'_>, tried: &Tried, request: &Request, record: &Record) {
    let status = tried.as_ref().map(|(_, answered)| answered.head.status);
    if let Some(outcome) = outcome(status, request, record) {
        picked.tell(outcome);
    }
}

/// Sends the request to one endpoint, over an idle connection or a new one. The response's head is there `until` then, but for the time
/// that the client takes to send.
#[expect(
    clippy::too_many_arguments,
    reason = "the request and where it goes, and both ends of each"
)]
async fn ask_one(
    request: &Request,
    tries: Option<&Tries<'_>>,
    picked: &Picked<'_>,
    ends: &mut Ends<'_>,
    upload: &mut Upload<'_>,
    head: &[u8],
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Tried {
    let pool = &picked.pool;
    let mut until = tries.map(|tries| tries.until(upload.waited()));
    let mut connected = match pool.idle(request.is_safe) {
        Some(connected) => connected,
        // Apart, as below, so that a request on an open connection has no room for it.
        None => Box::pin(unless_left(ends, upload, record, pool.connect(&mut until))).await?,
    };
    record.reached = Some(pool.clone());
    loop {
        let request = &Request {
            within: until.map_or(request.within, |until| until.left()),
            ..*request
        };
        let upstream = &mut connected.stream;
        match both_ways(request, ends, upload, head, upstream, answer, record).await {
            Ok(answered) => return Ok((connected, answered)),
            // The upstream may have closed the idle connection just as the request came; it is sent again only where that
            // can do no harm, since the upstream may have seen it.
            Err(Failure::Reply(Rejection::UpstreamBroken, _))
                if connected.reused
                    && (request.can_repeat || !upload.begun)
                    && answer.is_empty() =>
            {
                upload.begin_again(None);
                // Or the new one would wait for its place below the cap.
                drop(connected);
                until = tries.map(|tries| tries.until(upload.waited()));
                let connecting = unless_left(ends, upload, record, pool.connect(&mut until));
                connected = Box::pin(connecting).await?;
            }
            Err(failure) => return Err(failure),
        }
    }
}

async fn unless_left(
    ends: &mut Ends<'_>,
    upload: &mut Upload<'_>,
    record: &mut Record,
    connecting: impl Future<Output = Result<Connected, Unreached>>,
) -> Result<Connected, Failure> {
    let connected = unless_gone(ends.client, ends.buffer, connecting).await;
    let connected =
        connected.ok_or_else(|| upload.left_by_client(ends.buffer, &mut record.bytes_in))?;
    Ok(connected.map_err(unreached)?)
}
