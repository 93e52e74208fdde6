//! What a lane is to hand on of its requests, in batches: the wake of another thread costs more than most requests.

use std::cell::RefCell;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

use super::draft::Spare;
use crate::audit::Recorder;
use crate::audit::receipt::{Duty, Receipt};
use crate::config::audit::Delivery;
use crate::config::telemetry::LogFormat;
use crate::event::{AuditEvent, Encoded};
use crate::plan::Plan;
use crate::telemetry::access_log::{self, Batch, Line};
use crate::telemetry::spans::Traced;
use crate::telemetry::traces::{self, Traces};

/// Events that a lane holds back, at most.
const BATCH: usize = 64;
/// How long it holds them back, at most.
const LINGER: Duration = Duration::from_millis(20);

/// One lane's events on their way to the recorder.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    events: RefCell<Encoded>,
    /// Of the access log.
    lines: RefCell<Batch>,
    /// Requests whose spans are to be sent.
    traced: RefCell<Vec<Traced>>,
    /// Of the events, where delivery is guaranteed.
    duty: RefCell<Option<Duty>>,
    /// Told when the first event comes to wait that requests wait for.
    awaited: Notify,
    pub(super) spare: Spare,
    /// Told when the first of these comes to wait.
    waiting: Notify,
}

impl Outbox {
    /// Takes an event; what is to be waited for where delivery is guaranteed.
    pub(super) fn push(&self, event: &AuditEvent<&str>, recorder: &Recorder) -> Option<Receipt> {
        let mut events = self.events.borrow_mut();
        let mut duty = self.duty.borrow_mut();
        let receipt = (recorder.delivery == Delivery::Guaranteed)
            .then(|| duty.get_or_insert_default().receipt());
        if events.is_empty() {
            match receipt {
                Some(_) => self.awaited.notify_one(),
                None => self.waiting.notify_one(),
            }
        }
        events.push(event);
        if events.len() >= BATCH {
            let next = Encoded::like(&events);
            recorder.record(std::mem::replace(&mut *events, next), duty.take());
        }
        receipt
    }

    /// Takes a line of the access log.
    pub(super) fn push_line(&self, format: LogFormat, line: &Line<'_, '_>, plan: &Plan) {
        let mut lines = self.lines.borrow_mut();
        if lines.lines == 0 {
            self.waiting.notify_one();
        }
        lines.push(format, line);
        if lines.bytes.len() >= access_log::BATCH {
            plan.access_log.hand_on(std::mem::take(&mut *lines));
        }
    }

    /// Takes a request for `traces`.
    pub(super) fn push_traced(&self, traced: Traced, traces: &Traces) {
        let mut waiting = self.traced.borrow_mut();
        if waiting.is_empty() {
            self.waiting.notify_one();
        }
        waiting.push(traced);
        if waiting.len() >= traces::BATCH {
            traces.hand_on(std::mem::take(&mut *waiting));
        }
    }

    /// Comes back when there is something to hand on: once it has waited, unless requests wait for it.
    pub(super) async fn due(&self) {
        tokio::select! {
            () = self.waiting.notified() => sleep(LINGER).await,
            // Those whose turn is now may have events, too.
            () = self.awaited.notified() => tokio::task::yield_now().await,
        }
    }

    /// Hands on what is held back.
    pub(super) fn flush(&self, plan: &Plan) {
        let events = self.events.take();
        let duty = self.duty.take();
        if let (Some(recorder), false) = (&plan.audit, events.is_empty()) {
            recorder.record(events, duty);
        }
        let lines = self.lines.take();
        if lines.lines > 0 {
            plan.access_log.hand_on(lines);
        }
        let traced = self.traced.take();
        if let (Some(traces), false) = (&plan.traces, traced.is_empty()) {
            traces.hand_on(traced);
        }
    }
}
