//! What the audit keeps of a request, and what a request waits for whose event must be safe.

use std::time::Duration;

use smallvec::SmallVec;

use super::draft::{Draft, Event};
use super::gate::Gate;
use super::outbox::Outbox;
use super::record::Record;
use crate::audit::Recorder;
use crate::config::audit::{Delivery, Level};
use crate::event::{AuditEvent, Micros};
use crate::http1::response::ResponseHead;
use crate::plan::Plan;

/// Keeps the response's headers that are to be captured.
pub(super) fn responded(
    plan: &Plan,
    level: Level,
    record: &mut Record,
    answer: &[u8],
    response: &ResponseHead,
) {
    if let (Some(draft), Some(audit), Level::Headers) =
        (&mut record.draft, &plan.config.audit, level)
    {
        draft.capture(plan, &audit.response_headers, answer, &response.fields);
    }
}

/// Whether a request is refused since its event could not be made safe.
pub(super) fn refuses(plan: &Plan, level: Level) -> bool {
    level != Level::None && plan.audit.as_ref().is_some_and(Recorder::refuses)
}

/// No event is made of the request, which is told elsewhere all the same.
pub(super) fn give_up(record: &mut Record) {
    if let Some(draft) = &mut record.draft {
        draft.event = Event::GivenUp;
    }
}

/// The event of a request could not be made safe.
#[derive(Debug)]
pub(super) struct NotPersisted;

/// Where delivery is guaranteed, makes an event of the request as it stands and waits until that is safe: what completes the
/// answer is not to go out before. Otherwise the event is left to the request's end.
pub(super) async fn persist(
    plan: &Plan,
    outbox: &Outbox,
    record: &mut Record,
) -> Result<(), NotPersisted> {
    let guaranteed = |recorder: &Recorder| recorder.delivery == Delivery::Guaranteed;
    let draft = record.draft.as_ref();
    if draft.is_none_or(|draft| draft.event != Event::Due) {
        return Ok(());
    }
    if !plan.audit.as_ref().is_some_and(guaranteed) {
        return Ok(());
    }
    if record.route.is_none() && refuses(plan, Level::Metadata) {
        // It has had no effect, and would only wait in vain.
        give_up(record);
        return Err(NotPersisted);
    }
    let duration = record.elapsed();
    let Some(gate) = finish(plan, outbox, record, duration) else {
        return Ok(());
    };
    match gate.settled().await {
        true => Ok(()),
        false => Err(NotPersisted),
    }
}

/// Makes an event of the request and puts it into the lane's outbox, unless sampling leaves it out, or there is one already. What
/// is to be waited for where delivery is guaranteed.
pub(super) fn finish(
    plan: &Plan,
    outbox: &Outbox,
    record: &mut Record,
    duration: Duration,
) -> Option<Gate> {
    let (Some(recorder), Some(audit)) = (&plan.audit, &plan.config.audit) else {
        return None;
    };
    let mut draft = record.draft.take_if(|draft| draft.event == Event::Due)?;
    let of_route = record
        .route
        .and_then(|route| plan.config.routes[route].audit_sample);
    let sample = of_route.unwrap_or(audit.sample);
    // Rejections and errors are always kept.
    let went_well = record.reason.is_none() && record.status < 500;
    let left_out = went_well && sample < 1.0 && fastrand::f64() >= sample;
    let gate = match left_out {
        true => None,
        false => {
            let mut event = facts(plan, &draft, record, duration);
            if !audit.query {
                event.query = None;
            }
            outbox.push(&event, recorder)
        }
    };
    draft.event = Event::Made;
    record.draft = Some(draft);
    gate
}

/// All that is known of a request at its end, as the audit spells it.
pub(super) fn facts<'a>(
    plan: &Plan,
    draft: &'a Draft,
    record: &'a Record,
    duration: Duration,
) -> AuditEvent<&'a str> {
    let upstream = record
        .route
        .and_then(|route| plan.config.routes[route].upstream());
    let text = |it| draft.text(it);
    AuditEvent {
        seq: 0,
        time: draft.time,
        client: draft.client,
        user: draft.user.as_ref().map(text),
        label: record.reason,
        route: record.route.map(|route| plan.routes[route].name),
        method: text(&draft.method),
        path: text(&draft.path),
        status: record.status,
        id: draft.id,
        upstream: upstream.map(|upstream| plan.upstreams[upstream].name),
        endpoint: record
            .reached
            .as_ref()
            .map(|reached| reached.endpoint.place.as_str()),
        host: text(&draft.host),
        query: draft.query.as_ref().map(text),
        limits: SmallVec::from_slice(&draft.limits),
        breaker: draft.breaker,
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
        duration: duration.into(),
        upstream_duration: record.waited().map(Micros::from),
        request_id: draft.request_id.as_ref().map(text),
        trace_id: draft.trace_id,
        headers: draft
            .headers
            .iter()
            .map(|(name, value)| (text(name), text(value)))
            .collect(),
    }
}
