//! What is known of a request from its head to its end; then counted and audited, whatever ends it.

use std::rc::Rc;
use std::time::Duration;

use super::audit;
use super::draft::Draft;
use super::outbox::Outbox;
use super::reply::Rejection;
use super::trace::{Renamed, Trace};
use crate::clock;
use crate::config::telemetry::AccessLog;
use crate::http2::grpc::GrpcStatus;
use crate::plan::Plan;
use crate::store::breakers::Probe;
use crate::telemetry::access_log::Line;
use crate::upstream::Pool;

/// Recorded for a client that left before its answer; nginx's number, sent to no one.
const CLIENT_LEFT: u16 = 499;

/// Recorded for a request without an answer that a panic or the end of a drain cut off.
const CUT_OFF: u16 = 503;

/// Why an exchange broke off.
pub(super) const CLIENT_GONE: &str = "client_left";
pub(super) const UPSTREAM_LEFT: &str = "upstream_aborted";
const CUT_SHORT: &str = "cut_off";

/// One request.
#[derive(Debug)]
pub(super) struct Record {
    /// By [`clock::mono`].
    pub began: Duration,
    /// An index into the configuration's routes, once one is found.
    pub route: Option<usize>,
    /// What the client was told; 0 before that.
    pub status: u16,
    /// Why the exchange is not a whole response of the upstream's.
    pub reason: Option<&'static str>,
    /// How a call of gRPC ended, where it came to a status.
    pub grpc: Option<GrpcStatus>,
    /// Whether the client was told so by weir.
    pub rejected: bool,
    /// Whether the client was told no status at all: what is recorded is weir's own number.
    pub untold: bool,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the response's body.
    pub bytes_out: u64,
    /// When the call of the upstream began, where spans tell of it; by [`clock::mono`].
    pub forwarded: Option<Duration>,
    /// When the upstream had the whole request, by [`clock::mono`].
    pub sent: Option<Duration>,
    /// When its response's head was here.
    pub answered: Option<Duration>,
    /// The status of that, whatever the client is told.
    pub answer_status: Option<u16>,
    /// When it was known that the exchange had failed.
    failed: Option<Duration>,
    /// Where it is a probe of a half-open breaker.
    pub probe: Option<Rc<Probe>>,
    /// How often it was tried again at the upstream.
    pub tried_again: u32,
    /// The tries before the last, where spans tell of them.
    pub before: Vec<Try>,
    /// Whom the last try goes to, where spans tell of it.
    pub aimed_at: Option<Rc<Pool>>,
    /// Of the endpoint that was reached, the last one of several.
    pub reached: Option<Rc<Pool>>,
    /// The version of HTTP by which the last try was sent.
    pub sent_by: Option<&'static str>,
    /// Where weir takes part in traces.
    pub trace: Option<Trace>,
    /// Its texts, where something tells of it.
    pub draft: Option<Box<Draft>>,
}

/// A call of the upstream, where spans tell of it.
#[derive(Debug)]
pub(super) struct Try {
    pub span_id: [u8; 8],
    /// By [`clock::mono`], as its end.
    pub began: Duration,
    pub ended: Duration,
    pub pool: Option<Rc<Pool>>,
    pub sent_by: Option<&'static str>,
    pub status: Option<u16>,
    pub reason: Option<&'static str>,
    pub waited: Option<Duration>,
}

impl Record {
    fn begin(began: Duration) -> Record {
        Record {
            began,
            route: None,
            status: 0,
            reason: None,
            grpc: None,
            rejected: false,
            untold: false,
            bytes_in: 0,
            bytes_out: 0,
            forwarded: None,
            sent: None,
            answered: None,
            answer_status: None,
            failed: None,
            probe: None,
            tried_again: 0,
            before: Vec::new(),
            aimed_at: None,
            reached: None,
            sent_by: None,
            trace: None,
            draft: None,
        }
    }

    /// Since its head was read.
    pub(super) fn elapsed(&self) -> Duration {
        clock::mono().saturating_sub(self.began)
    }

    /// It waits for its turn.
    pub(super) fn note_waiting(&self) {
        if let Some(probe) = &self.probe {
            probe.waits(clock::mono());
        }
    }

    /// It is the upstream's turn.
    pub(super) fn note_working(&self) {
        if let Some(probe) = &self.probe {
            probe.works(clock::mono());
        }
    }

    /// The upstream had the whole request when `sent`.
    pub(super) fn note_sent(&mut self, sent: bool) {
        self.sent = sent.then(clock::mono);
        self.note_working();
    }

    /// The head of the response is here.
    pub(super) fn note_answered(&mut self, status: u16) {
        let now = clock::mono();
        (self.answered, self.answer_status) = (Some(now), Some(status));
        if let Some(probe) = &self.probe {
            probe.answered(status, self.waited().unwrap_or_default(), now);
        }
    }

    /// The upstream's part of the time: from the end of the request to the head of the response, to the failure in place of one, or to now. How
    /// fast the client sends and reads has no part in it, nor what it takes to put the failure on record.
    pub(super) fn waited(&self) -> Option<Duration> {
        let until = self.answered.or(self.failed);
        let until = until.unwrap_or_else(clock::mono);
        self.sent.map(|sent| until.saturating_sub(sent))
    }

    /// It is to go to this endpoint.
    pub(super) fn note_target(&mut self, pool: &Rc<Pool>) {
        if self.forwarded.is_some() {
            self.aimed_at = Some(pool.clone());
        }
    }

    /// A try at this endpoint is over; another may follow. `None` where nothing tells of it.
    pub(super) fn tried(
        &self,
        pool: &Rc<Pool>,
        status: Option<u16>,
        reason: Option<&'static str>,
    ) -> Option<Try> {
        let (trace, began) = self.trace.as_ref().zip(self.forwarded)?;
        Some(Try {
            span_id: trace.told.parent_id,
            began,
            ended: clock::mono(),
            pool: Some(pool.clone()),
            sent_by: self.sent_by,
            status,
            reason,
            waited: self.waited(),
        })
    }

    /// Behind this try another begins at `next`, which `head` tells so of the trace.
    pub(super) fn begin_again(
        &mut self,
        tried: Option<Try>,
        next: &Rc<Pool>,
        head: &mut [u8],
    ) -> Option<Renamed> {
        (self.sent, self.sent_by) = (None, None);
        (self.answered, self.answer_status) = (None, None);
        self.tried_again += 1;
        if let Some(tried) = tried {
            self.before.push(tried);
            self.forwarded = Some(clock::mono());
        }
        self.note_target(next);
        let renamed = self.trace.as_mut().and_then(Trace::call_again)?;
        renamed.put(head);
        Some(renamed)
    }

    /// The client was told so by weir, in a `body` too.
    pub(super) fn note_refused(&mut self, rejection: &Rejection, body: bool) {
        self.failed.get_or_insert_with(clock::mono);
        self.status = rejection.status();
        self.bytes_out = if body { rejection.body_len() } else { 0 };
        self.reason = Some(rejection.reason());
        self.rejected = true;
    }

    /// The exchange broke off, for the client's part or the upstream's.
    pub(super) fn note_aborted(&mut self, reason: &'static str) {
        self.failed.get_or_insert_with(clock::mono);
        if self.status == 0 {
            (self.status, self.untold) = (CLIENT_LEFT, true);
        }
        self.reason = Some(reason);
    }

    /// The client's body was malformed, for which its stream is reset: by HTTP/2, which tells no status.
    pub(super) fn note_malformed(&mut self) {
        match self.status {
            0 => {
                self.note_refused(&Rejection::BadBody, false);
                self.untold = true;
            }
            _ => self.note_aborted(Rejection::BadBody.reason()),
        }
    }

    fn is_logged(&self, log: &AccessLog) -> bool {
        // A client that leaves breaks nothing off but its own part.
        let broke_off = !self.rejected && self.reason.is_some_and(|reason| reason != CLIENT_GONE);
        let is_error = self.status >= 500 || broke_off;
        (log.errors && is_error)
            || (log.rejected && self.rejected)
            || log.sample >= 1.0
            || fastrand::f64() < log.sample
    }

    /// Counts the request, and hands it to the audit.
    fn finish(&mut self, plan: &Plan, outbox: &Outbox) {
        let duration = self.elapsed();
        if let Some(route) = self.route {
            plan.routes[route].metrics.count(self.status, duration);
        }
        if let Some(reason) = self.reason {
            plan.metrics.requests.rejection(reason).inc();
        }
        if let Some(calls) = self
            .grpc
            .and_then(|status| plan.metrics.requests.grpc(status))
        {
            calls.inc();
        }
        audit::finish(plan, outbox, self, duration);
        if let Some(draft) = self.draft.take() {
            let log = plan.config.access_log.as_ref();
            let log = log.filter(|log| self.is_logged(log));
            let traces = plan.traces.as_ref().zip(self.trace.as_ref());
            let traces = traces.filter(|(_, trace)| trace.is_kept(plan));
            if log.is_some() || traces.is_some() {
                let event = audit::facts(plan, &draft, self, duration);
                if let Some(log) = log {
                    let line = Line {
                        event: &event,
                        user_agent: draft.user_agent.as_ref().map(|it| draft.text(it)),
                    };
                    outbox.push_line(log.format, &line, plan);
                }
                if let Some((traces, trace)) = traces {
                    outbox.push_traced(trace.traced(self, &draft, event), traces);
                }
            }
            outbox.spare.keep(draft);
        }
    }
}

/// A request that is being served. It is counted and audited when this is dropped, so also when a panic or the end of a
/// drain cuts it off.
pub(super) struct Ongoing<'a> {
    pub record: Record,
    pub plan: &'a Plan,
    pub outbox: &'a Outbox,
    /// Whether it came to its end, be it good or bad.
    pub ended: bool,
}

impl<'a> Ongoing<'a> {
    /// Of a request that began at this time, by [`clock::mono`].
    pub(super) fn begin(plan: &'a Plan, outbox: &'a Outbox, began: Duration) -> Ongoing<'a> {
        Ongoing {
            record: Record::begin(began),
            plan,
            outbox,
            ended: false,
        }
    }
}

impl Drop for Ongoing<'_> {
    fn drop(&mut self) {
        if !self.ended {
            if self.record.status == 0 {
                (self.record.status, self.record.untold) = (CUT_OFF, true);
            }
            self.record.note_aborted(CUT_SHORT);
        }
        self.record.finish(self.plan, self.outbox);
    }
}
