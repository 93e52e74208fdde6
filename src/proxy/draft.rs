//! What is known of a request until it is told: its texts, kept by the lane in memory that the next request has again, so that
//! a request allocates nothing for them.

use std::borrow::Cow;
use std::cell::RefCell;
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use smallvec::SmallVec;
use uuid::Uuid;

use super::handle::Conn;
use super::headers::{self, RequestId, is};
use super::record::Record;
use super::trace::{self, Trace};
use crate::clock;
use crate::config::audit::Level;
use crate::event::Micros;
use crate::http1::head::RequestHead;
use crate::http1::trace_context::TraceParent;
use crate::plan::Plan;

/// Bytes kept of one text of a request, at most.
const LONGEST: usize = 4 * 1024;
/// Drafts that a lane keeps for their memory, and the bytes of texts that one of them may have room for.
const SPARE: (usize, usize) = (64, 4 * 1024);

/// Drafts whose memory the next requests have.
#[derive(Debug, Default)]
pub(super) struct Spare(
    #[expect(
        clippy::vec_box,
        reason = "the boxes are what is kept for the next requests"
    )]
    RefCell<Vec<Box<Draft>>>,
);

impl Spare {
    /// Keeps the draft's memory.
    pub(super) fn keep(&self, draft: Box<Draft>) {
        let (most, longest) = SPARE;
        let mut spare = self.0.borrow_mut();
        if spare.len() < most && draft.texts.capacity() <= longest {
            spare.push(draft);
        }
    }
}

/// What is known of a request whose event is not whole yet. Boxed, since most of its life is spent waiting for the upstream.
#[derive(Debug)]
pub(super) struct Draft {
    /// What the audit keeps of it; none once its event is made.
    pub level: Level,
    pub time: Micros,
    pub id: [u8; 16],
    pub client: IpAddr,
    pub trace_id: Option<[u8; 16]>,
    /// The texts that the request brought, one behind the other.
    texts: String,
    pub method: Span,
    pub host: Span,
    pub path: Span,
    pub query: Option<Span>,
    pub request_id: Option<Span>,
    /// For those that tell of requests beside the audit.
    pub user_agent: Option<Span>,
    /// The path that the upstream is asked for, where it is another and spans tell of it.
    pub sent_path: Option<Span>,
    pub user: Option<Span>,
    pub headers: Vec<(Span, Span)>,
    pub limits: SmallVec<[&'static str; 4]>,
    pub breaker: Option<&'static str>,
}

/// A place in a draft's texts.
pub(super) type Span = Range<usize>;

impl Draft {
    pub(super) fn text(&self, span: &Span) -> &str {
        &self.texts[span.clone()]
    }

    /// The request belongs to the session of this user, or was to begin one.
    pub(super) fn set_user(&mut self, user: &str) {
        self.user = Some(put(&mut self.texts, user));
    }

    pub(super) fn set_sent_path(&mut self, path: &str) {
        self.sent_path = Some(put(&mut self.texts, path));
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
    pub(super) fn capture(
        &mut self,
        plan: &Plan,
        wanted: &[String],
        bytes: &[u8],
        fields: &[(Range<usize>, Range<usize>)],
    ) {
        for name in wanted {
            for (_, value) in fields.iter().filter(|(field, _)| is(bytes, field, name)) {
                let value = text(&bytes[value.clone()]);
                let value = plan.redaction.redact_header(name, &value);
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
    pub trace: Option<&'a Trace>,
}

/// Begins the event of a request.
pub(super) fn begin(
    plan: &Plan,
    spare: &Spare,
    level: Level,
    seen: Seen<'_>,
    buffer: &[u8],
    head: Option<&RequestHead>,
) -> Option<Box<Draft>> {
    let level = match plan.config.audit {
        Some(_) => level,
        None => Level::None,
    };
    let traced = seen.trace.is_some_and(|trace| trace.is_kept(plan));
    let told = plan.config.access_log.is_some() || traced;
    if level == Level::None && !told {
        return None;
    }
    let mut spare = spare.0.borrow_mut().pop();
    let texts = spare.as_mut().map(|spare| std::mem::take(&mut spare.texts));
    let mut texts = texts.unwrap_or_default();
    texts.clear();
    let kept = told || plan.config.audit.as_ref().is_some_and(|audit| audit.query);
    let query = seen.query.strip_prefix(b"?").filter(|_| kept);
    let mut draft = Draft {
        level,
        time: Micros::from(seen.time),
        id: seen.id.into_bytes(),
        client: seen.client,
        trace_id: seen.trace.map(|trace| trace.told.trace_id),
        method: put(&mut texts, &text(seen.method)),
        host: put(&mut texts, &text(seen.host)),
        path: put(&mut texts, &text(seen.path)),
        query: query.map(|query| put(&mut texts, &plan.redaction.redact_query(&text(query)))),
        request_id: match seen.request_id {
            RequestId::Given(given) => Some(put(&mut texts, given)),
            RequestId::New(_) => None,
        },
        texts,
        user_agent: None,
        sent_path: None,
        user: None,
        headers: Vec::new(),
        limits: SmallVec::new(),
        breaker: None,
    };
    if let Some(head) = head {
        if seen.trace.is_none() {
            // Whoever sent it: weir passes it on as it is.
            let mut fields = head.fields.iter();
            let parent = fields.find(|(name, _)| is(buffer, name, "traceparent"));
            let parent = parent.and_then(|(_, value)| TraceParent::parse(&buffer[value.clone()]));
            draft.trace_id = parent.map(|parent| parent.trace_id);
        }
        let agent = head.fields.iter();
        let mut agent = agent.filter(|(name, _)| told && is(buffer, name, "user-agent"));
        if let Some((_, agent)) = agent.next() {
            let agent = text(&buffer[agent.clone()]);
            draft.user_agent = Some(put(&mut draft.texts, &agent));
        }
        if let (Level::Headers, Some(audit)) = (level, &plan.config.audit) {
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

/// Begins what is told of a request that no route took; `head` is missing when it could not be read.
pub(super) fn begin_unrouted(
    plan: &Plan,
    conn: &Conn<'_>,
    buffer: &[u8],
    head: Option<&RequestHead>,
    record: &mut Record,
) {
    let level = match &plan.config.audit {
        Some(audit) => audit.level,
        None => Level::None,
    };
    let traces = plan.config.traces.as_ref();
    if level == Level::None && plan.config.access_log.is_none() && traces.is_none() {
        return;
    }
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
    let trusted = client.as_ref().is_some_and(|client| client.behind_trusted);
    record.trace = traces.map(|traces| trace::begin(traces, conn.peer, buffer, head, trusted));
    let given = head.filter(|_| trusted);
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
        trace: record.trace.as_ref(),
    };
    let draft = begin(plan, &conn.lane.outbox.spare, level, seen, buffer, head);
    record.draft = draft;
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
