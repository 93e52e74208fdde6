//! A request's way to an endpoint that answers it: a turn, an endpoint, a connection.

use super::forward::{Answered, Request, both_ways, end_of};
use super::handle::{Ends, Failure};
use super::record::Record;
use super::reply::Rejection;
use super::upload::Upload;
use crate::store::breakers::End;
use crate::upstream::{Cluster, Connected, Outcome, Picked, Slot, Unreached};

/// The endpoint that has answered, over this connection.
pub(super) struct Reached<'c> {
    pub connected: Connected,
    picked: Picked<'c>,
    _slot: Slot<'c>,
}

impl Reached<'_> {
    /// Keeps the connection for another request.
    pub(super) fn give_back(self) {
        self.picked.pool.give_back(self.connected);
    }
}

/// Sends the request, whose head is `head`, to an endpoint of the cluster's. The response's head comes to stand at the front
/// of `answer`.
#[expect(
    clippy::too_many_arguments,
    reason = "the request and where it goes, and both ends of each"
)]
pub(super) async fn exchange<'c>(
    request: &Request,
    cluster: &'c Cluster,
    ring_key: Option<u64>,
    ends: &mut Ends<'_>,
    upload: &mut Upload<'_>,
    head: &[u8],
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<(Reached<'c>, Answered), Failure> {
    let slot = cluster.enter().await.map_err(|_| Rejection::Overloaded)?;
    let picked = cluster
        .pick(ring_key, &[])
        .map_err(|_| Rejection::NoEndpoint)?;
    let tried = attempt(request, &picked, ends, upload, head, answer, record).await;
    let status = tried.as_ref().map(|(_, answered)| answered.head.status);
    if let Some(outcome) = outcome(status, record) {
        picked.tell(outcome);
    }
    if let Some(took) = record.waited() {
        slot.answered(took);
    }
    let (connected, answered) = tried?;
    let reached = Reached {
        connected,
        picked,
        _slot: slot,
    };
    Ok((reached, answered))
}

/// What the endpoint made of the request; `None` where that is not known.
pub(super) fn outcome(tried: Result<u16, &Failure>, record: &Record) -> Option<Outcome> {
    let end = match tried {
        Ok(status) => End::Status(status),
        Err(failure) => end_of(failure, record)?,
    };
    Some(match end {
        End::Status(500..=599) | End::ConnectFailed | End::TimedOut | End::Reset => Outcome::Failed,
        End::Status(_) | End::Grpc(_) => Outcome::Served,
    })
}

/// Sends the request to one endpoint, over an idle connection or a new one.
async fn attempt(
    request: &Request,
    picked: &Picked<'_>,
    ends: &mut Ends<'_>,
    upload: &mut Upload<'_>,
    head: &[u8],
    answer: &mut Vec<u8>,
    record: &mut Record,
) -> Result<(Connected, Answered), Failure> {
    let pool = &picked.pool;
    let mut connected = pool.take(request.can_repeat).await.map_err(unreached)?;
    record.reached = Some(pool.clone());
    loop {
        let upstream = &mut connected.stream;
        match both_ways(request, ends, upload, head, upstream, answer, record).await {
            Ok(answered) => return Ok((connected, answered)),
            // The upstream may have closed the idle connection just as the request came; it is sent again only where that
            // can do no harm, since the upstream may have seen it.
            Err(Failure::Reply(Rejection::UpstreamBroken, _))
                if connected.reused && request.can_repeat && answer.is_empty() =>
            {
                connected = pool.connect().await.map_err(unreached)?;
            }
            Err(failure) => return Err(failure),
        }
    }
}

pub(super) fn unreached(unreached: Unreached) -> Rejection {
    match unreached {
        Unreached::Failed => Rejection::ConnectFailed,
        Unreached::TimedOut => Rejection::ConnectTimeout,
        Unreached::Full => Rejection::Overloaded,
    }
}
