//! What the audit keeps of a request, and how a lane hands it on: encoded, and in batches, so that a request allocates nothing
//! for it and most pay for an encoding alone.

use std::borrow::Cow;
use std::cell::RefCell;
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::handle::Conn;
use super::headers::{self, RequestId, is};
use super::record::Record;
use crate::audit::Recorder;
use crate::audit::receipt::{Duty, Receipt};
use crate::clock;
use crate::config::audit::{Delivery, Level};
use crate::event::{AuditEvent, Encoded, Micros};
use crate::http1::head::RequestHead;
use crate::http1::response::ResponseHead;
use crate::plan::Plan;

/// Bytes kept of one text of a request, at most.
const LONGEST: usize = 4 * 1024;
/// Events that a lane holds back, at most.
const BATCH: usize = 64;
/// How long it holds them back, at most.
const LINGER: Duration = Duration::from_millis(20);
/// How long a request waits for its event to be safe, at most.
const SAFE_WITHIN: Duration = Duration::from_secs(5);
/// Drafts that a lane keeps for their memory, and the bytes of texts that one of them may have room for.
const SPARE: (usize, usize) = (64, 4 * 1024);

/// One lane's events on their way to the recorder.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    events: RefCell<Encoded>,
    /// Of the events, where delivery is guaranteed.
    duty: RefCell<Option<Duty>>,
    /// Told when the first event comes to wait that requests wait for.
    awaited: Notify,
    #[expect(
        clippy::vec_box,
        reason = "the boxes are what is kept for the next requests"
    )]
    spare: RefCell<Vec<Box<Draft>>>,
    /// Told when the first event comes to wait.
    waiting: Notify,
}

/// What is known of a request whose event is not whole yet. Boxed, since most of its life is spent waiting for the upstream.
#[derive(Debug)]
pub(super) struct Draft {
    time: Micros,
    id: [u8; 16],
    client: IpAddr,
    trace_id: Option<[u8; 16]>,
    /// The texts that the request brought, one behind the other.
    texts: String,
    method: Span,
    host: Span,
    path: Span,
    query: Option<Span>,
    request_id: Option<Span>,
    user: Option<Span>,
    headers: Vec<(Span, Span)>,
    limits: SmallVec<[&'static str; 4]>,
    breaker: Option<&'static str>,
}

/// A place in a draft's texts.
type Span = Range<usize>;

impl Outbox {
    /// Takes an event; what is to be waited for where delivery is guaranteed.
    fn push(&self, event: &AuditEvent<&str>, recorder: &Recorder) -> Option<Receipt> {
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
    }

    /// Keeps the draft's memory.
    fn keep(&self, draft: Box<Draft>) {
        let (most, longest) = SPARE;
        let mut spare = self.spare.borrow_mut();
        if spare.len() < most && draft.texts.capacity() <= longest {
            spare.push(draft);
        }
    }
}

impl Draft {
    /// The request belongs to the session of this user.
    pub(super) fn set_user(&mut self, user: &str) {
        self.user = Some(put(&mut self.texts, user));
    }

    /// The verdict of the upstream's breaker.
    pub(super) fn set_breaker(&mut self, verdict: &'static str) {
        self.breaker = Some(verdict);
    }

    /// The verdicts of limits, in the order asked.
    pub(super) fn add_limits(&mut self, verdicts: impl Iterator<Item = &'static str>) {
        self.limits.extend(verdicts);
    }

    /// Keeps the headers that are `wanted`.
    fn capture(
        &mut self,
        plan: &Plan,
        wanted: &[String],
        bytes: &[u8],
        fields: &[(Range<usize>, Range<usize>)],
    ) {
        let Some(audit) = &plan.config.audit else {
            return;
        };
        for name in wanted {
            for (_, value) in fields.iter().filter(|(field, _)| is(bytes, field, name)) {
                let value = text(&bytes[value.clone()]);
                let value = audit.redaction.redact_header(name, &value);
                let name = put(&mut self.texts, name);
                self.headers.push((name, put(&mut self.texts, value)));
            }
        }
    }
}

/// What is known of a request once its head is read: the ends of it are filled in by [`finish`]. `path` is normalised where
/// it could be.
pub(super) struct Seen<'a> {
    pub path: &'a [u8],
    pub query: &'a [u8],
    pub host: &'a [u8],
    pub method: &'a [u8],
    pub client: IpAddr,
    /// Since the Unix epoch.
    pub time: Duration,
    pub id: Uuid,
    pub request_id: &'a RequestId,
}

/// Begins the event of a request.
pub(super) fn begin(
    plan: &Plan,
    outbox: &Outbox,
    level: Level,
    seen: Seen<'_>,
    buffer: &[u8],
    head: Option<&RequestHead>,
) -> Option<Box<Draft>> {
    let audit = plan.config.audit.as_ref()?;
    if level == Level::None {
        return None;
    }
    let mut spare = outbox.spare.borrow_mut().pop();
    let texts = spare.as_mut().map(|spare| std::mem::take(&mut spare.texts));
    let mut texts = texts.unwrap_or_default();
    texts.clear();
    let query = seen.query.strip_prefix(b"?").filter(|_| audit.query);
    let mut draft = Draft {
        time: Micros::from(seen.time),
        id: seen.id.into_bytes(),
        client: seen.client,
        trace_id: None,
        method: put(&mut texts, &text(seen.method)),
        host: put(&mut texts, &text(seen.host)),
        path: put(&mut texts, &text(seen.path)),
        query: query.map(|query| put(&mut texts, &audit.redaction.redact_query(&text(query)))),
        request_id: match seen.request_id {
            RequestId::Given(given) => Some(put(&mut texts, given)),
            RequestId::New(_) => None,
        },
        texts,
        user: None,
        headers: Vec::new(),
        limits: SmallVec::new(),
        breaker: None,
    };
    if let Some(head) = head {
        let trace = head
            .fields
            .iter()
            .find(|(name, _)| is(buffer, name, "traceparent"));
        draft.trace_id = trace.and_then(|(_, value)| trace_id(&buffer[value.clone()]));
        if level == Level::Headers {
            draft.capture(plan, &audit.request_headers, buffer, &head.fields);
        }
    }
    match spare {
        Some(mut spare) => {
            *spare = draft;
            Some(spare)
        }
        None => Some(Box::new(draft)),
    }
}

/// Begins the event of a request that no route took; `head` is missing when it could not be read.
pub(super) fn begin_unrouted(
    plan: &Plan,
    conn: &Conn<'_>,
    buffer: &[u8],
    head: Option<&RequestHead>,
) -> Option<Box<Draft>> {
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
        Some(RequestId::Given(text(&buffer[value.clone()]).into_owned()))
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
    begin(plan, &conn.lane.outbox, level, seen, buffer, head)
}

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

/// The event of a request could not be made safe.
#[derive(Debug)]
pub(super) struct NotSafe;

/// Where delivery is guaranteed, makes an event of the request as it stands and waits until that is safe: what completes the
/// answer is not to go out before. Otherwise the event is left to the request's end.
pub(super) async fn secure(
    plan: &Plan,
    outbox: &Outbox,
    record: &mut Record,
) -> Result<(), NotSafe> {
    let guaranteed = |recorder: &Recorder| recorder.delivery == Delivery::Guaranteed;
    if record.draft.is_none() || !plan.audit.as_ref().is_some_and(guaranteed) {
        return Ok(());
    }
    if record.route.is_none() && refuses(plan, Level::Metadata) {
        // It has had no effect, and would only wait in vain.
        record.draft = None;
        return Err(NotSafe);
    }
    let duration = record.elapsed();
    let Some(receipt) = finish(plan, outbox, record, duration) else {
        return Ok(());
    };
    match timeout(SAFE_WITHIN, receipt.is_safe()).await {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(NotSafe),
    }
}

/// Makes an event of the request and puts it into the lane's outbox, unless sampling leaves it out, or there is one already. What
/// is to be waited for where delivery is guaranteed.
pub(super) fn finish(
    plan: &Plan,
    outbox: &Outbox,
    record: &mut Record,
    duration: Duration,
) -> Option<Receipt> {
    let (Some(draft), Some(recorder), Some(audit)) =
        (record.draft.take(), &plan.audit, &plan.config.audit)
    else {
        return None;
    };
    // Rejections and errors are always kept.
    let went_well = record.reason.is_none() && record.status < 500;
    let left_out = went_well && audit.sample < 1.0 && fastrand::f64() >= audit.sample;
    let receipt = match left_out {
        true => None,
        false => outbox.push(&whole(plan, &draft, record, duration), recorder),
    };
    outbox.keep(draft);
    receipt
}

fn whole<'a>(
    plan: &Plan,
    draft: &'a Draft,
    record: &Record,
    duration: Duration,
) -> AuditEvent<&'a str> {
    let names = &plan.names;
    let upstream = record
        .route
        .and_then(|route| plan.config.routes[route].upstream());
    let text = |span: &Span| &draft.texts[span.clone()];
    AuditEvent {
        seq: 0,
        time: draft.time,
        client: draft.client,
        user: draft.user.as_ref().map(text),
        label: record.reason,
        route: record.route.map(|route| names.routes[route]),
        method: text(&draft.method),
        path: text(&draft.path),
        status: record.status,
        id: draft.id,
        upstream: upstream.map(|upstream| names.upstreams[upstream]),
        endpoint: upstream
            .filter(|_| record.reached)
            .map(|upstream| names.endpoints[upstream]),
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

/// Appends a text; where it stands.
fn put(texts: &mut String, text: &str) -> Span {
    let start = texts.len();
    texts.push_str(text);
    start..texts.len()
}

/// At most [`LONGEST`] bytes of it: what waits to be written is bounded by the number of events.
fn text(bytes: &[u8]) -> Cow<'_, str> {
    match bytes.get(..LONGEST) {
        Some(start) if bytes.len() > LONGEST => {
            Cow::Owned(String::from_utf8_lossy(start).into_owned() + "…")
        }
        _ => str::from_utf8(bytes).map_or_else(|_| String::from_utf8_lossy(bytes), Cow::Borrowed),
    }
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
