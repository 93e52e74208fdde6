//! What is known of a request until it is told: its texts, kept by the lane in memory that the next request has again, so that
//! a request allocates nothing for them. Must not decide what is told.

use std::borrow::Cow;
use std::cell::RefCell;
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use smallvec::SmallVec;
use uuid::Uuid;

use super::exchange::Conn;
use super::headers::{self, Client, RequestId};
use super::record::Record;
use super::trace::{self, Trace};
use crate::clock;
use crate::config::audit::Level;
use crate::event::{self, LONGEST, Micros, start_of};
use crate::http1::head::{Fields, RequestHead, path_and_query, values};
use crate::http1::trace_context::TraceParent;
use crate::plan::Plan;

/// Drafts that a lane keeps for their memory.
const SPARE: usize = 64;
/// Bytes of texts that one of them may have room for.
const SPARE_TEXTS: usize = 4 * 1024;

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
        let mut spare = self.0.borrow_mut();
        if spare.len() < SPARE && draft.texts.capacity() <= SPARE_TEXTS {
            spare.push(draft);
        }
    }
}

/// What is known of a request whose event is not whole yet. Boxed, since most of its life is spent waiting for the upstream.
#[derive(Debug)]
pub(super) struct Draft {
    pub event: Event,
    pub time: Micros,
    pub id: [u8; 16],
    pub client: IpAddr,
    pub trace_id: Option<[u8; 16]>,
    /// The texts that the request brought, one behind the other.
    texts: String,
    pub method: Text,
    pub host: Text,
    pub path: Text,
    pub query: Option<Text>,
    pub request_id: Option<Text>,
    /// For those that tell of requests beside the audit.
    pub user_agent: Option<Text>,
    /// The path as the client spells it, where that is another and spans tell of it.
    pub asked_path: Option<Text>,
    /// The path that the upstream is asked for, likewise.
    pub sent_path: Option<Text>,
    /// Of the session, or who logs in.
    pub user: Option<Text>,
    /// Whether the request came with a session.
    pub session: bool,
    pub headers: Vec<(Text, Text)>,
    pub limits: SmallVec<[&'static str; 4]>,
    pub breaker: Option<&'static str>,
}

/// Where the audit's event of a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The audit keeps none; others tell of the request.
    NotKept,
    /// Still to be made.
    Due,
    /// Made, or left out by sampling.
    Made,
    /// It could not be made safe, and its request is refused.
    GivenUp,
}

/// Where one of the texts of a draft stands.
pub(super) type Text = Range<usize>;

impl Draft {
    pub(super) fn text(&self, text: &Text) -> &str {
        &self.texts[text.clone()]
    }

    /// The request belongs to the session of this user.
    pub(super) fn set_session(&mut self, user: &str) {
        self.session = true;
        self.set_user(user);
    }

    /// The request is to begin a session of this user.
    pub(super) fn set_user(&mut self, user: &str) {
        self.user = Some(put(&mut self.texts, user));
    }

    pub(super) fn set_asked_path(&mut self, path: Cow<'_, str>) {
        self.asked_path = Some(put(&mut self.texts, &cut(path)));
    }

    pub(super) fn set_sent_path(&mut self, path: Cow<'_, str>) {
        self.sent_path = Some(put(&mut self.texts, &cut(path)));
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
        fields: &Fields,
    ) {
        for name in wanted {
            for value in values(bytes, fields, name) {
                let value = lossy(value);
                let value = cut(plan.redaction.redact_header(name, &value));
                let name = put(&mut self.texts, name);
                self.headers.push((name, put(&mut self.texts, &value)));
            }
        }
    }
}

/// What a request shows of itself before any policy is asked.
pub(super) struct Seen<'a> {
    /// Where its head stands.
    pub buffer: &'a [u8],
    /// Missing where it could not be read.
    pub head: Option<&'a RequestHead>,
    pub host: &'a [u8],
    /// Normalised where it could be.
    pub path: &'a [u8],
    /// With its `?`, or empty.
    pub query: &'a [u8],
    pub client: &'a Client,
    /// Since the Unix epoch.
    pub time: Duration,
    pub id: Uuid,
    pub request_id: &'a RequestId,
}

/// Begins what is told of a request: its trace, and its draft where something tells of it.
pub(super) fn begin(
    plan: &Plan,
    conn: &Conn<'_>,
    level: Level,
    seen: &Seen<'_>,
    record: &mut Record,
) {
    let traces = plan.config.traces.as_ref();
    let trusted = seen.client.behind_trusted;
    record.trace = traces.map(|traces| trace::begin(traces, conn, seen.buffer, seen.head, trusted));
    let spare = &conn.lane.outbox.spare;
    record.draft = draft(plan, spare, level, seen, record.trace.as_ref());
}

fn draft(
    plan: &Plan,
    spare: &Spare,
    level: Level,
    seen: &Seen<'_>,
    trace: Option<&Trace>,
) -> Option<Box<Draft>> {
    let traced = trace.is_some_and(|trace| trace.is_kept(plan));
    let told = plan.config.access_log.is_some() || traced;
    if level == Level::None && !told {
        return None;
    }
    let mut spare = spare.0.borrow_mut().pop();
    let texts = spare.as_mut().map(|spare| std::mem::take(&mut spare.texts));
    let mut texts = texts.unwrap_or_default();
    texts.clear();
    let method = seen.head.map(|head| &seen.buffer[head.method.clone()]);
    let kept = told || plan.config.audit.as_ref().is_some_and(|audit| audit.query);
    let query = seen.query.strip_prefix(b"?").filter(|_| kept);
    let mut draft = Draft {
        event: match level {
            Level::None => Event::NotKept,
            Level::Metadata | Level::Headers => Event::Due,
        },
        time: Micros::from(seen.time),
        id: seen.id.into_bytes(),
        client: seen.client.ip,
        trace_id: trace.map(|trace| trace.told.trace_id),
        method: put(&mut texts, &text(method.unwrap_or_default())),
        host: put(&mut texts, &text(seen.host)),
        // Cut short it might match no pattern.
        path: put(
            &mut texts,
            &cut(plan.redaction.redact_path(&lossy(seen.path))),
        ),
        query: query.map(|query| put(&mut texts, &plan.redaction.redact_query(&text(query)))),
        request_id: match seen.request_id {
            RequestId::Given(given) => Some(put(&mut texts, given)),
            RequestId::New(_) => None,
        },
        texts,
        user_agent: None,
        asked_path: None,
        sent_path: None,
        user: None,
        session: false,
        headers: Vec::new(),
        limits: SmallVec::new(),
        breaker: None,
    };
    if let Some(head) = seen.head {
        if trace.is_none() {
            // Whoever sent it: weir passes it on as it is.
            let parent = head.field(seen.buffer, "traceparent");
            let parent = parent.and_then(TraceParent::parse);
            draft.trace_id = parent.map(|parent| parent.trace_id);
        }
        if told && let Some(agent) = head.field(seen.buffer, "user-agent") {
            draft.user_agent = Some(put(&mut draft.texts, &text(agent)));
        }
        if let (Level::Headers, Some(audit)) = (level, &plan.config.audit) {
            draft.capture(plan, &audit.request_headers, seen.buffer, &head.fields);
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
    let config = &plan.config;
    let level = config.audit.as_ref().map_or(Level::None, |it| it.level);
    if level == Level::None && config.access_log.is_none() && config.traces.is_none() {
        return;
    }
    let time = clock::wall();
    let id = clock::uuid(time);
    let target = head.map_or(&[][..], |head| &buffer[head.target.clone()]);
    let told = told_target(target);
    let (path, query) = path_and_query(told.as_bytes());
    let field = |name| head.and_then(|head| head.field(buffer, name));
    let client = match head {
        Some(head) => headers::client(buffer, head, conn.peer.ip, conn.listener),
        None => Client {
            ip: conn.peer.ip,
            behind_trusted: false,
            certificate_trusted: false,
        },
    };
    // Unlike that of a request that goes on it need not be text, and is told in part where it is long.
    let given = client.behind_trusted.then(|| field("x-request-id"));
    let given = given.flatten().map(|given| text(given).into_owned());
    let seen = Seen {
        buffer,
        head,
        host: field("host").unwrap_or_default(),
        path,
        query,
        client: &client,
        time,
        id,
        request_id: &given.map_or_else(|| RequestId::new(id), RequestId::Given),
    };
    begin(plan, conn, level, &seen, record);
}

/// A target as it is told, whatever its form: without a user and a password.
fn told_target(target: &[u8]) -> Cow<'_, str> {
    let target = String::from_utf8_lossy(target);
    if target.starts_with('/') {
        return target;
    }
    let authority = target.find("://").map_or(0, |at| at + "://".len());
    Cow::Owned(event::without_userinfo(&target, authority).into_owned())
}

/// Appends a text; where it stands.
fn put(texts: &mut String, text: &str) -> Text {
    let start = texts.len();
    texts.push_str(text);
    start..texts.len()
}

/// At most [`LONGEST`] bytes of it.
fn text(bytes: &[u8]) -> Cow<'_, str> {
    cut(lossy(bytes))
}

/// As [`String::from_utf8_lossy`], which looks at each byte of what is text, where this looks at many at a time.
fn lossy(bytes: &[u8]) -> Cow<'_, str> {
    str::from_utf8(bytes).map_or_else(|_| String::from_utf8_lossy(bytes), Cow::Borrowed)
}

/// Its first [`LONGEST`] bytes, where it has more.
fn cut(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.len() <= LONGEST {
        return text;
    }
    Cow::Owned(start_of(&text, LONGEST).to_owned() + "…")
}
