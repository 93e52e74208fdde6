//! What a lane is to hand on of its requests, in batches: the wake of another thread costs more than most requests. Must not
//! wait.

use std::cell::{OnceCell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use super::draft::Spare;
use super::gate::{Gate, Opener};
use crate::audit::Recorder;
use crate::audit::receipt::Receipt;
use crate::audit::tray::{Laid, Tray};
use crate::clock;
use crate::config::audit::Delivery;
use crate::config::telemetry::LogFormat;
use crate::event::{AuditEvent, Encoded};
use crate::plan::Plan;
use crate::telemetry::access_log::{self, Line};
use crate::telemetry::spans::Traced;
use crate::telemetry::traces::{self, Traces};

/// Events that a lane holds back, at most.
const BATCH: usize = 64;
/// Bytes at which they are handed on.
const BATCH_BYTES: usize = 256 << 10;
/// How long it holds them back, at most.
const LINGER: Duration = Duration::from_millis(20);

/// How long a request waits for its event to be safe, at most.
const SAFE_WITHIN: Duration = Duration::from_secs(5);

/// One lane's events on their way to the recorder.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// That no request waits for.
    events: RefCell<Encoded>,
    /// Where those lie that requests wait for.
    tray: OnceCell<Tray>,
    /// The groups of these, in order.
    awaited: RefCell<VecDeque<Awaited>>,
    /// Of the access log.
    lines: RefCell<Vec<u8>>,
    /// Requests whose spans are to be sent.
    traced: RefCell<Vec<Traced>>,
    pub(super) spare: Spare,
    /// Told when the first of these comes to wait.
    waiting: Notify,
    /// Told when the first group is awaited.
    laid: Notify,
}

/// A group of events that become safe together, and the gate that their requests wait at: the lane is woken once for all.
#[derive(Debug)]
struct Awaited {
    receipt: Receipt,
    opener: Opener,
    /// When it is too late.
    until: Instant,
}

impl Outbox {
    /// Takes an event; what is to be waited for where delivery is guaranteed.
    pub(super) fn push(&self, event: &AuditEvent<&str>, recorder: &Recorder) -> Option<Gate> {
        match recorder.delivery {
            Delivery::BestEffort => {
                let mut events = self.events.borrow_mut();
                if events.is_empty() {
                    self.waiting.notify_one();
                }
                events.push(event);
                if events.len() >= BATCH || events.size() >= BATCH_BYTES {
                    let next = Encoded::like(&events);
                    recorder.record(std::mem::replace(&mut *events, next));
                }
                None
            }
            Delivery::Guaranteed => Some(self.lay(event, recorder)),
        }
    }

    fn lay(&self, event: &AuditEvent<&str>, recorder: &Recorder) -> Gate {
        let mut awaited = self.awaited.borrow_mut();
        match (
            self.tray.get_or_init(|| recorder.tray()).lay(event),
            awaited.back(),
        ) {
            (Laid::Along, Some(group)) => group.opener.gate(),
            (Laid::First(receipt), _) => {
                if awaited.is_empty() {
                    self.laid.notify_one();
                }
                let opener = Opener::default();
                let gate = opener.gate();
                let until = Instant::from_std(clock::now() + SAFE_WITHIN);
                awaited.push_back(Awaited {
                    receipt,
                    opener,
                    until,
                });
                gate
            }
            (Laid::Refused | Laid::Along, _) => Gate::given_up(),
        }
    }

    /// Takes a line of the access log.
    pub(super) fn push_line(&self, format: LogFormat, line: &Line<'_, '_>, plan: &Plan) {
        let mut lines = self.lines.borrow_mut();
        if lines.is_empty() {
            self.waiting.notify_one();
        }
        line.put(format, &mut lines);
        if lines.len() >= access_log::BATCH {
            plan.access_log.hand_on(&lines);
            lines.clear();
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

    /// Tells for ever the requests that wait for their events once these are safe.
    pub(super) async fn open_gates(&self) {
        loop {
            let group = self
                .awaited
                .borrow()
                .front()
                .map(|group| (group.receipt.clone(), group.until));
            let Some((receipt, until)) = group else {
                self.laid.notified().await;
                continue;
            };
            let is_safe = timeout_at(until, receipt.settled()).await;
            // Later groups have come behind it meanwhile.
            let group = self.awaited.borrow_mut().pop_front();
            if let (Ok(true), Some(group)) = (is_safe, group) {
                group.opener.open();
            }
        }
    }

    /// Hands on what is held back.
    pub(super) fn flush(&self, plan: &Plan) {
        let events = self.events.take();
        if let (Some(recorder), false) = (&plan.audit, events.is_empty()) {
            recorder.record(events);
        }
        let mut lines = self.lines.borrow_mut();
        if !lines.is_empty() {
            plan.access_log.hand_on(&lines);
            lines.clear();
        }
        let traced = self.traced.take();
        if let (Some(traces), false) = (&plan.traces, traced.is_empty()) {
            traces.hand_on(traced);
        }
    }
}
