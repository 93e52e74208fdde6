//! What the audit keeps of a request, and how a lane hands it on: in batches, so that most requests pay for a push alone.

use std::borrow::Cow;
use std::cell::RefCell;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;
use uuid::Uuid;

use super::handle::Conn;
use super::headers::{self, RequestId, is};
use super::record::Record;
use crate::audit::Recorder;
use crate::clock;
use crate::config::audit::Level;
use crate::event::{AuditEvent, Micros};
use crate::http1::head::RequestHead;
use crate::http1::response::ResponseHead;
use crate::plan::Plan;

/// Bytes kept of one text of a request, at most.
const LONGEST: usize = 4 * 1024;
/// Events that a lane holds back, at most.
const BATCH: usize = 64;
/// How long it holds them back, at most.
const LINGER: Duration = Duration::from_millis(20);

/// One lane's events on their way to the recorder.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    events: RefCell<Vec<AuditEvent>>,
    /// Told when the first event comes to wait.
    waiting: Notify,
}

impl Outbox {
    fn push(&self, event: AuditEvent, recorder: &Recorder) {
        let mut events = self.events.borrow_mut();
        if events.is_empty() {
            events.reserve_exact(BATCH);
            self.waiting.notify_one();
        }
        events.push(event);
        if events.len() >= BATCH {
            recorder.record_batch(events.split_off(0));
        }
    }

    /// Comes back when there is something to hand on, once it has waited.
    pub(super) async fn due(&self) {
        self.waiting.notified().await;
        sleep(LINGER).await;
    }

    /// Hands on what is held back.
    pub(super) fn flush(&self, plan: &Plan) {
        let events = self.events.take();
        if let (Some(recorder), false) = (&plan.audit, events.is_empty()) {
            recorder.record_batch(events);
        }
    }
}

/// What is known of a request once its head is read: the ends of it are filled in by [`finish`]. `path` is normalised where
/// it could be. Boxed, since most of its life is spent waiting for the upstream.
pub(super) struct Seen<'a> {
    pub path: &'a [u8],
    pub query: &'a [u8],
    pub host: &'a [u8],
    pub method: &'a [u8],
    pub client: std::net::IpAddr,
    /// Since the Unix epoch.
    pub time: Duration,
    pub id: Uuid,
    pub request_id: &'a RequestId,
}

/// Begins the event of a request.
pub(super) fn begin(
    plan: &Plan,
    level: Level,
    seen: Seen<'_>,
    buffer: &[u8],
    head: Option<&RequestHead>,
) -> Option<Box<AuditEvent>> {
    let audit = plan.config.audit.as_ref()?;
    if level == Level::None {
        return None;
    }
    let query = seen.query.strip_prefix(b"?").filter(|_| audit.query);
    let query = query.map(|query| audit.redaction.redact_query(&text(query)));
    let mut event = AuditEvent {
        time: Micros::from(seen.time),
        id: seen.id.into_bytes(),
        seq: 0,
        route: None,
        upstream: None,
        endpoint: None,
        client: seen.client,
        user: None,
        method: method(seen.method),
        host: text(seen.host),
        path: text(seen.path),
        query,
        status: 0,
        label: None,
        limits: Vec::new(),
        breaker: None,
        bytes_in: 0,
        bytes_out: 0,
        duration: Micros(0),
        upstream_duration: None,
        request_id: seen.request_id.as_str().to_owned(),
        trace_id: None,
        headers: Vec::new(),
    };
    if let Some(head) = head {
        let trace = head
            .fields
            .iter()
            .find(|(name, _)| is(buffer, name, "traceparent"));
        event.trace_id = trace.and_then(|(_, value)| trace_id(&buffer[value.clone()]));
        if level == Level::Headers {
            capture(
                &mut event,
                plan,
                &audit.request_headers,
                buffer,
                &head.fields,
            );
        }
    }
    Some(Box::new(event))
}

/// Begins the event of a request that no route took; `head` is missing when it could not be read.
pub(super) fn begin_unrouted(
    plan: &Plan,
    conn: &Conn<'_>,
    buffer: &[u8],
    head: Option<&RequestHead>,
) -> Option<Box<AuditEvent>> {
    let level = plan.config.audit.as_ref()?.level;
    let time = clock::wall();
    let id = clock::uuid(time);
    let target = head.map_or(&[][..], |head| &buffer[head.target.clone()]);
    let end = target.iter().position(|byte| *byte == b'?');
    let (path, query) = target.split_at(end.unwrap_or(target.len()));
    let host = head.and_then(|head| {
        let mut fields = head.fields.iter();
        let (_, value) = fields.find(|(name, _)| is(buffer, name, "host"))?;
        Some(&buffer[value.clone()])
    });
    let trusted = &conn.listener.trusted_proxies;
    let client = head.map(|head| headers::client(buffer, head, conn.peer.ip, trusted));
    let given = head.filter(|_| client.as_ref().is_some_and(|client| client.behind_trusted));
    let given = given.and_then(|head| {
        let mut fields = head.fields.iter();
        let (_, value) = fields.find(|(name, _)| is(buffer, name, "x-request-id"))?;
        Some(RequestId::Given(text(&buffer[value.clone()])))
    });
    let seen = Seen {
        path,
        query,
        host: host.unwrap_or_default(),
        method: head.map_or(&[][..], |head| &buffer[head.method.clone()]),
        client: client.map_or(conn.peer.ip, |client| client.ip),
        time,
        id,
        request_id: &given.unwrap_or_else(|| RequestId::new(id)),
    };
    begin(plan, level, seen, buffer, head)
}

/// Keeps the response's headers that are to be captured.
pub(super) fn responded(
    plan: &Plan,
    level: Level,
    record: &mut Record,
    answer: &[u8],
    response: &ResponseHead,
) {
    if let (Some(event), Some(audit), Level::Headers) =
        (&mut record.event, &plan.config.audit, level)
    {
        capture(
            event,
            plan,
            &audit.response_headers,
            answer,
            &response.fields,
        );
    }
}

/// Fills in the ends of the event and puts it into the lane's outbox, unless sampling leaves it out.
pub(super) fn finish(plan: &Plan, outbox: &Outbox, record: &mut Record, duration: Duration) {
    let (Some(mut event), Some(recorder), Some(audit)) =
        (record.event.take(), &plan.audit, &plan.config.audit)
    else {
        return;
    };
    // Rejections and errors are always kept.
    let went_well = record.reason.is_none() && record.status < 500;
    if went_well && audit.sample < 1.0 && fastrand::f64() >= audit.sample {
        return;
    }
    if let Some(index) = record.route {
        let route = &plan.config.routes[index];
        let names = &plan.names;
        event.route = Some(Cow::Borrowed(names.routes[index]));
        event.upstream = Some(Cow::Borrowed(names.upstreams[route.upstream]));
        let endpoint = names.endpoints[route.upstream];
        event.endpoint = record.reached.then_some(Cow::Borrowed(endpoint));
    }
    event.status = record.status;
    event.label = record.reason.map(Cow::Borrowed);
    event.bytes_in = record.bytes_in;
    event.bytes_out = record.bytes_out;
    event.duration = duration.into();
    event.upstream_duration = record.waited().map(Micros::from);
    outbox.push(*event, recorder);
}

fn capture(
    event: &mut AuditEvent,
    plan: &Plan,
    wanted: &[String],
    bytes: &[u8],
    fields: &[(std::ops::Range<usize>, std::ops::Range<usize>)],
) {
    let Some(audit) = &plan.config.audit else {
        return;
    };
    for name in wanted {
        for (_, value) in fields.iter().filter(|(field, _)| is(bytes, field, name)) {
            let value = text(&bytes[value.clone()]);
            let value = audit.redaction.redact_header(name, &value).to_owned();
            event.headers.push((Cow::Owned(name.clone()), value));
        }
    }
}

/// At most [`LONGEST`] bytes of it: what waits to be written is bounded by the number of events.
fn text(bytes: &[u8]) -> String {
    match bytes.get(..LONGEST) {
        Some(start) if bytes.len() > LONGEST => String::from_utf8_lossy(start).into_owned() + "…",
        _ => String::from_utf8_lossy(bytes).into_owned(),
    }
}

/// The common ones cost no allocation.
fn method(bytes: &[u8]) -> Cow<'static, str> {
    for known in ["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS"] {
        if bytes == known.as_bytes() {
            return Cow::Borrowed(known);
        }
    }
    Cow::Owned(text(bytes))
}

/// From `traceparent` (W3C Trace Context, section 3.2.2): `00-TRACE-PARENT-FLAGS`.
fn trace_id(value: &[u8]) -> Option<[u8; 16]> {
    let mut parts = std::str::from_utf8(value).ok()?.split('-');
    let (version, id) = (parts.next()?, parts.next()?);
    if version.len() != 2 || id.len() != 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let id = u128::from_str_radix(id, 16).ok().filter(|id| *id != 0)?;
    Some(id.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_id_is_taken_from_a_whole_traceparent_alone() {
        let id = "0af7651916cd43dd8448eb211c80319c";
        let check = |value: &str, found: bool| {
            assert_eq!(trace_id(value.as_bytes()).is_some(), found, "{value}");
        };
        check(&format!("00-{id}-b7ad6b7169203331-01"), true);
        check(&format!("0-{id}-b7ad6b7169203331-01"), false);
        check(&format!("00-{}-b7ad6b7169203331-01", &id[1..]), false);
        check(&format!("00-+{}-b7ad6b7169203331-01", &id[1..]), false);
        check(&format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)), false);
        check("", false);
    }
}
