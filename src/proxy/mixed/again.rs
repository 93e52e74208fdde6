//! Whether a request is tried again at another endpoint. Must not send it.

use std::rc::Rc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::clock;
use crate::config::upstreams::Retries;
use crate::http1::head::BodyLength;
use crate::policy::retry;
use crate::proxy::handle::Failure;
use crate::proxy::outgoing::{Outgoing, Request};
use crate::proxy::reply::Rejection;
use crate::upstream::{Cluster, Pool, Retrying};

/// Other tries of a request whose response has not begun, as `tries` has them between two sides of HTTP/1.1, but for two things: a
/// response is never thrown away for its status, and a body is never kept.
pub(super) struct TryAgain<'p, 'c> {
    retries: Option<&'p Retries>,
    began: Duration,
    /// For all tries together.
    within: Duration,
    /// The endpoints that were tried.
    pub before: SmallVec<[Rc<Pool>; 4]>,
    budget: Option<Retrying<'c>>,
}

impl<'p, 'c> TryAgain<'p, 'c> {
    pub(super) fn new(outgoing: &Outgoing<'p, '_>) -> TryAgain<'p, 'c> {
        let plan = outgoing.shared;
        TryAgain {
            retries: plan.config.upstreams[outgoing.upstream].retries.as_ref(),
            began: clock::mono(),
            within: outgoing.request.within,
            before: SmallVec::new(),
            budget: None,
        }
    }

    fn left(&self) -> Duration {
        let spent = clock::mono().saturating_sub(self.began);
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

    /// How long to wait before another try; `None` where there is none.
    pub(super) fn wait(
        &mut self,
        cluster: &'c Cluster,
        request: &Request,
        failure: &Failure,
    ) -> Option<Duration> {
        let retries = self.retries?;
        let on = &retries.retry_on;
        let unseen_or_harmless = request.may_be_retried && request.body == BodyLength::None;
        let is_reason = match failure {
            Failure::Reply(
                Rejection::ConnectFailed | Rejection::ConnectTimeout | Rejection::UpstreamTls(_),
                _,
            ) => on.connect_failure,
            Failure::Reply(Rejection::UpstreamBroken, _) => on.reset && unseen_or_harmless,
            Failure::Reply(Rejection::UpstreamTimeout, _) => on.timeout && unseen_or_harmless,
            Failure::Reply(..)
            | Failure::ClientGone
            | Failure::UpstreamGone
            | Failure::NotSafe
            | Failure::CutShort(_) => false,
        };
        if !is_reason {
            return None;
        }
        let metrics = &cluster.shared.metrics;
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
            self.budget = cluster.shared.retry(retries.budget);
        }
        if self.budget.is_none() {
            metrics.over_budget.inc();
            return None;
        }
        metrics.retried.inc();
        Some(wait)
    }
}
