//! Whether a request is tried again at another endpoint. Must not send it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::clock;
use crate::config::upstreams::Retries;
use crate::policy::retry;
use crate::proxy::handle::Failure;
use crate::proxy::outgoing::Request;
use crate::proxy::reply::Rejection;
use crate::upstream::{LaneUpstream, Pool, Retrying, Slot, Until};

/// Why there may be another try.
#[derive(Debug, Clone, Copy)]
pub(super) enum Why<'a> {
    Failed(&'a Failure),
    /// The connection broke, and nothing of the request was seen, or seeing it twice does no harm.
    Unseen,
    /// With this status.
    Answered(u16),
}

/// Other tries of a request whose response has not begun, as `tries` has them between two sides of HTTP/1.1.
pub(super) struct TryAgain<'r> {
    upstream: &'r LaneUpstream,
    /// For all tries together.
    pub slot: Slot<'r>,
    retries: Option<&'r Retries>,
    began: Duration,
    /// For the client to send, since then, which is its own time.
    pub waited: Duration,
    /// For all tries together.
    within: Duration,
    /// The endpoints that were tried.
    pub before: SmallVec<[Rc<Pool>; 4]>,
    budget: Option<Retrying<'r>>,
    /// Whether some of the request's body can be sent no more.
    is_lost: &'r Cell<bool>,
}

impl<'r> TryAgain<'r> {
    pub(super) fn new(
        upstream: &'r LaneUpstream,
        slot: Slot<'r>,
        (retries, within): (Option<&'r Retries>, Duration),
        is_lost: &'r Cell<bool>,
    ) -> TryAgain<'r> {
        TryAgain {
            upstream,
            slot,
            retries,
            began: clock::mono(),
            waited: Duration::ZERO,
            within,
            before: SmallVec::new(),
            budget: None,
            is_lost,
        }
    }

    fn left(&self) -> Duration {
        let spent = clock::mono().saturating_sub(self.began);
        let spent = spent.saturating_sub(self.waited);
        self.within.saturating_sub(spent)
    }

    /// For the next try.
    pub(super) fn within(&self) -> Duration {
        match self.retries {
            None => self.within,
            Some(retries) => {
                let most = retries.per_try_timeout.unwrap_or(self.within);
                // The first has all of its time: what has passed is the client's.
                if self.before.is_empty() {
                    most.min(self.within)
                } else {
                    most.min(self.left())
                }
            }
        }
    }

    /// When the next try is given up, where there may be others.
    pub(super) fn until(&self) -> Option<Until> {
        // The first begins with all of them.
        let first = self.before.is_empty();
        let began = if first { self.began } else { clock::mono() };
        self.until_of(began)
    }

    /// When this try is given up, which begins again over another connection. Over the first it had `sent` the whole request by then.
    pub(super) fn anew(&mut self, sent: Option<Duration>) -> Option<Until> {
        self.retries?;
        // How long the client takes to send is its own.
        let began = sent.unwrap_or_else(clock::mono);
        if self.before.is_empty() {
            (self.began, self.waited) = (began, Duration::ZERO);
        }
        self.until_of(began)
    }

    fn until_of(&self, began: Duration) -> Option<Until> {
        let most = self.retries?.per_try_timeout;
        let all = self.began + self.waited + self.within;
        Some(Until::new(began, most, all))
    }

    /// How much of a request's body is kept for another try, in bytes.
    pub(super) fn keeps(&self) -> usize {
        self.retries.map_or(0, |retries| retries.buffer)
    }

    /// How long to wait before another try; `None` where there is none. This one had `sent` the whole request by then.
    pub(super) fn wait(
        &mut self,
        request: &Request,
        sent: Option<Duration>,
        why: Why<'_>,
    ) -> Option<Duration> {
        let retries = self.retries?;
        if let (true, Some(sent)) = (self.before.is_empty(), sent) {
            // How long the client takes to send is its own.
            (self.began, self.waited) = (sent, Duration::ZERO);
        }
        let on = &retries.retry_on;
        let harmless = request.may_be_retried;
        let is_reason = match why {
            Why::Unseen => on.reset_before_request,
            Why::Answered(status) => on.has_status(status) && harmless,
            Why::Failed(Failure::Reply(
                Rejection::ConnectFailed(_)
                | Rejection::ConnectTimeout(_)
                | Rejection::UpstreamTls(_),
                _,
            )) => on.connect_failure,
            Why::Failed(Failure::Reply(Rejection::UpstreamBroken, _)) => on.reset && harmless,
            Why::Failed(Failure::Reply(Rejection::UpstreamTimeout, _)) => on.timeout && harmless,
            Why::Failed(
                Failure::Reply(..)
                | Failure::ClientGone
                | Failure::UpstreamGone
                | Failure::NotSafe
                | Failure::CutShort(_),
            ) => false,
        };
        if !is_reason || self.is_lost.get() {
            return None;
        }
        let metrics = &self.upstream.shared.metrics;
        let count = u32::try_from(self.before.len()).unwrap_or(u32::MAX);
        if count >= retries.attempts {
            metrics.exhausted.inc();
            return None;
        }
        let (base, max) = (retries.backoff.base, retries.backoff.max);
        let wait = retry::backoff(base, max, count, fastrand::f64());
        if wait >= self.left() {
            metrics.out_of_time.inc();
            return None;
        }
        if self.budget.is_none() {
            self.budget = self.upstream.shared.retry(retries.budget);
        }
        if self.budget.is_none() {
            metrics.over_budget.inc();
            return None;
        }
        metrics.retried.inc();
        Some(wait)
    }
}
