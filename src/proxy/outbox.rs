//! What a lane is to hand on of its requests, in batches: the wake of another thread costs more than most requests.

use std::cell::RefCell;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use super::draft::Spare;
use crate::audit::Recorder;
use crate::audit::receipt::{Duty, Receipt};
use crate::clock;
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

/// How long a request waits for its event to be safe, at most.
const SAFE_WITHIN: Duration = Duration::from_secs(5);

/// One lane's events on their way to the recorder.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// That no request waits for.
    events: RefCell<Encoded>,
    /// That requests wait for.
    awaited: RefCell<Vec<Awaited>>,
    /// Of the access log.
    lines: RefCell<Batch>,
    /// Requests whose spans are to be sent.
    traced: RefCell<Vec<Traced>>,
    pub(super) spare: Spare,
    /// Told when the first of these comes to wait.
    waiting: Notify,
    /// The same of what is awaited.
    urgent: Notify,
}

/// Events that are handed on together, and the duty towards the requests that wait for them.
#[derive(Debug)]
struct Awaited {
    events: Encoded,
    duty: Duty,
    /// When it is too late.
    until: Instant,
}

impl Outbox {
    /// Takes an event; what is to be waited for where delivery is guaranteed.
    pub(super) fn push(&self, event: &AuditEvent<&str>, recorder: &Recorder) -> Option<Receipt> {
        match recorder.delivery {
            Delivery::BestEffort => {
                let mut events = self.events.borrow_mut();
                if events.is_empty() {
                    self.waiting.notify_one();
                }
                events.push(event);
                if events.len() >= BATCH {
                    let next = Encoded::like(&events);
                    recorder.record(std::mem::replace(&mut *events, next), None);
                }
                None
            }
            Delivery::Guaranteed => Some(self.push_awaited(event)),
        }
    }

    fn push_awaited(&self, event: &AuditEvent<&str>) -> Receipt {
        let mut awaited = self.awaited.borrow_mut();
        if awaited.is_empty() {
            self.urgent.notify_one();
        }
        let open = awaited.pop_if(|last| last.events.len() < BATCH);
        let mut open = open.unwrap_or_else(|| Awaited {
            events: Encoded::default(),
            duty: Duty::default(),
            until: Instant::from_std(clock::now() + SAFE_WITHIN),
        });
        open.events.push(event);
        let receipt = open.duty.receipt();
        awaited.push(open);
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

    /// Comes back once there is something that has waited to be handed on.
    pub(super) async fn due(&self) {
        self.waiting.notified().await;
        sleep(LINGER).await;
    }

    /// Comes back once there are events that requests wait for.
    pub(super) async fn urgent(&self) {
        self.urgent.notified().await;
        // Those whose turn is now may have events, too.
        tokio::task::yield_now().await;
    }

    /// Hands on the events that requests wait for, and tells these requests once they are safe. Meanwhile the next events gather: the
    /// writing thread takes no others while it syncs, and is woken once for all of them, as is the lane.
    pub(super) async fn secure(&self, plan: &Plan) {
        let awaited = self.awaited.take();
        let Some(recorder) = &plan.audit else {
            return;
        };
        let handed_on: Vec<_> = awaited
            .into_iter()
            .map(|awaited| {
                let duty = Duty::default();
                let receipt = duty.receipt();
                recorder.record(awaited.events, Some(duty));
                (awaited.duty, awaited.until, receipt)
            })
            .collect();
        for (duty, until, receipt) in handed_on {
            if let Ok(true) = timeout_at(until, receipt.is_safe()).await {
                duty.safe();
            }
        }
    }

    /// Hands on what is held back.
    pub(super) fn flush(&self, plan: &Plan) {
        let events = self.events.take();
        if let (Some(recorder), false) = (&plan.audit, events.is_empty()) {
            recorder.record(events, None);
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

    /// Hands on everything, at the lane's end.
    pub(super) fn close(&self, plan: &Plan) {
        self.flush(plan);
        for awaited in self.awaited.take() {
            if let Some(recorder) = &plan.audit {
                recorder.record(awaited.events, Some(awaited.duty));
            }
        }
    }
}
