//! Whether a request is tried again and when, whatever is spoken at either side. Owns for which bodies, and the count, the time and the budget
//! of all of a request's tries; which failures are a reason is `outcome`'s. Must not send it, nor wait.

use std::rc::Rc;
use std::time::Duration;

use smallvec::SmallVec;

use super::exchange::Failure;
use super::outcome;
use super::outgoing::Request;
use crate::clock;
use crate::config::upstreams::{Retries, RetryOn};
use crate::http1::head::BodyLength;
use crate::policy::retry::{Pauses, full_jitter};
use crate::upstream::{Aim, LaneUpstream, Picked, Pool, RetryPermit, Until};

/// How far a try had come when its connection broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    /// The upstream has seen nothing of the request.
    Unseen,
    /// It may have.
    Seen,
    /// Some of its response came, if only nonsense.
    Answered,
}

impl Point {
    /// Of a try by HTTP/1.1, which had `begun` to send the request and has read the `answer` so far.
    pub(super) fn of(begun: bool, answer: &[u8]) -> Point {
        match (begun, answer) {
            (false, _) => Point::Unseen,
            (true, []) => Point::Seen,
            (true, _) => Point::Answered,
        }
    }
}

/// Whether a body of this `length` may fit into the `most` bytes that are kept of one, to be sent again.
pub(super) fn may_be_kept(length: BodyLength, most: usize) -> bool {
    match length {
        BodyLength::None => false,
        BodyLength::Fixed(bytes) => bytes <= most as u64,
        BodyLength::Chunked => most > 0,
    }
}

/// A try that is over.
#[derive(Debug, Clone, Copy)]
pub(super) struct EndedTry<'t> {
    /// The status of its response, or why there is none.
    pub came: Result<u16, &'t Failure>,
    pub point: Point,
    /// Whether the request can be sent again from its first byte.
    pub is_kept: bool,
    /// For the client to send, in all tries: that is its own time.
    pub waited: Duration,
}

impl EndedTry<'_> {
    /// Whether it may be followed by another try. Where the upstream may have seen the request, that is for those alone to which it is
    /// `harmless`.
    fn is_reason(&self, on: &RetryOn, harmless: bool) -> bool {
        match self.came {
            Ok(status) => on.has_status(status) && harmless,
            Err(failure) => outcome::is_reason(failure, self.point, on, harmless),
        }
    }
}

/// All tries of a request whose upstream has retries. Together, with the waits between them, they take no longer than one would have been
/// given.
pub(super) struct Tries<'r> {
    upstream: &'r LaneUpstream,
    retries: &'r Retries,
    began: Duration,
    within: Duration,
    /// The endpoints that were tried.
    before: SmallVec<[Rc<Pool>; 4]>,
    /// Where it is tried again.
    budget: Option<RetryPermit<'r>>,
}

impl<'r> Tries<'r> {
    /// The first begins.
    pub(super) fn new(
        upstream: &'r LaneUpstream,
        retries: &'r Retries,
        within: Duration,
    ) -> Tries<'r> {
        Tries {
            upstream,
            retries,
            began: clock::mono(),
            within,
            before: SmallVec::new(),
            budget: None,
        }
    }

    /// When all are over, where the client has been `waited` for so long.
    fn deadline(&self, waited: Duration) -> Duration {
        self.began + waited + self.within
    }

    /// When a try is given up that begins now, or begins again over another connection.
    pub(super) fn until(&self, waited: Duration) -> Until {
        let most = self.retries.per_try_timeout;
        Until::new(clock::mono(), most, self.deadline(waited))
    }

    /// How long to wait before another try; `None` where what came of this one stands.
    pub(super) fn another(&mut self, request: &Request, ended: &EndedTry<'_>) -> Option<Duration> {
        let metrics = &self.upstream.shared.metrics;
        let on = &self.retries.retry_on;
        if let Ok(status) = ended.came
            && !on.has_status(status)
            && !self.before.is_empty()
        {
            metrics.rescued.inc();
        }
        if !ended.is_reason(on, request.may_be_retried) || !ended.is_kept {
            return None;
        }
        let count = u32::try_from(self.before.len()).unwrap_or(u32::MAX);
        if count >= self.retries.attempts {
            metrics.exhausted.inc();
            return None;
        }
        let pauses = Pauses {
            first: self.retries.backoff.base,
            longest: self.retries.backoff.max,
        };
        let wait = full_jitter(pauses.nth(count), fastrand::f64());
        if clock::mono() + wait >= self.deadline(ended.waited) {
            metrics.out_of_time.inc();
            return None;
        }
        if self.budget.is_none() {
            self.budget = self.upstream.shared.retry(self.retries.budget);
        }
        if self.budget.is_none() {
            metrics.over_budget.inc();
            return None;
        }
        Some(wait)
    }

    /// What came of the last one stands. A stream that stays open leaves its part of the budget to others.
    pub(super) fn end(&mut self) {
        self.budget = None;
    }

    /// Whom the next try goes to, behind one at `last`, whose outcome stands where there is no one.
    pub(super) fn next(&mut self, aim: Aim, last: &Rc<Pool>) -> Option<Picked<'r>> {
        self.before.push(last.clone());
        let next = self.upstream.pick(aim, &self.before).ok()?;
        self.upstream.shared.metrics.retried.inc();
        Some(next)
    }
}
