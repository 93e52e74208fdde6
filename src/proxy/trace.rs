//! The trace that a request belongs to, where weir takes part in traces: a trusted proxy's goes on, every other begins here.

use std::net::IpAddr;
use std::time::Duration;

use super::draft::{Draft, Text};
use super::exchange::Conn;
use super::record::{Record, Try};
use crate::config::listeners::{Address, ProxyProtocol};
use crate::config::telemetry::Traces;
use crate::event::{AuditEvent, Micros};
use crate::http1::head::RequestHead;
use crate::http1::trace_context::{LENGTH, TraceParent, is_tracestate};
use crate::plan::Plan;
use crate::telemetry::spans::{Call, Traced};

/// Of a name, with its port (RFC 1035 section 2.3.4).
const LONGEST_HOST: usize = 255 + ":65535".len();

/// A request's place in its trace.
#[derive(Debug)]
pub(super) struct Trace {
    /// What the upstream is told: the trace, weir's own call of it (where none goes to a collector, the caller's span), and whether spans
    /// are kept.
    pub told: TraceParent,
    /// The span of the request.
    pub span_id: [u8; 8],
    /// The caller's span, where the trace is not weir's.
    pub parent_id: Option<[u8; 8]>,
    /// Whether the client spoke TLS, by the word of a trusted proxy where there is one.
    pub secure: bool,
    /// Whether the caller's `tracestate` goes on.
    pub keeps_state: bool,
    /// That, for its spans.
    state: Option<String>,
    /// The host that a trusted proxy says it was asked for, for its spans.
    host: Option<String>,
    /// Who is at the other end of the client's connection, where that is known.
    peer: Option<IpAddr>,
    /// The version of HTTP by which the request came, where it could be read.
    came_by: Option<&'static str>,
    /// Whether weir has spans in it, if it is kept.
    has_spans: bool,
}

impl Trace {
    /// Whether its spans go to a collector.
    pub(super) fn is_kept(&self, plan: &Plan) -> bool {
        self.told.sampled && plan.traces.is_some()
    }

    /// What its spans tell.
    pub(super) fn traced(&self, record: &Record, draft: &Draft, event: AuditEvent<&str>) -> Traced {
        let text = |it: &Option<Text>| it.as_ref().map(|it| draft.text(it).to_owned());
        let since = |then: Duration| then.saturating_sub(record.began).into();
        let call = |number, it: &Try, until| Call {
            span_id: it.span_id,
            after: since(it.began),
            until,
            secure: it.pool.as_ref().is_some_and(|pool| pool.is_secure),
            endpoint: it.pool.as_ref().map(|pool| pool.endpoint.place.clone()),
            sent_by: it.sent_by,
            status: it.status,
            reason: it.reason.map(str::to_owned),
            waited: it.waited.map(Micros::from),
            again: number,
        };
        let before = (0..).zip(&record.before);
        let before = before.map(|(number, it)| call(number, it, Some(since(it.ended))));
        let last = record.forwarded.map(|forwarded| Try {
            span_id: self.told.parent_id,
            began: forwarded,
            ended: Duration::ZERO,
            pool: record.aimed_at.clone(),
            sent_by: record.sent_by,
            status: record.answer_status,
            reason: record.reason,
            waited: record.waited(),
        });
        let last = last.map(|it| call(record.tried_again, &it, None));
        Traced {
            event: event.into_owned(),
            user_agent: text(&draft.user_agent),
            trace_id: self.told.trace_id,
            span_id: self.span_id,
            parent_id: self.parent_id,
            state: self.state.clone(),
            secure: self.secure,
            host: self.host.clone(),
            peer: self.peer,
            came_by: self.came_by,
            told: !record.untold,
            rejected: record.rejected,
            grpc: record.grpc.map(|status| status.0),
            asked_path: text(&draft.asked_path),
            sent_path: text(&draft.sent_path),
            session: draft.session,
            calls: before.chain(last).collect(),
        }
    }
}

/// Another name for weir's own call, in a head that says it; for a request that is tried again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renamed {
    before: TraceParent,
    now: TraceParent,
}

impl Renamed {
    /// Says it in `bytes`, which begin with the head.
    pub(super) fn put(&self, bytes: &mut [u8]) {
        let field = [b"\r\nTraceparent: ", &self.before.value()[..]].concat();
        let found = bytes.windows(field.len()).position(|it| it == field);
        if let Some(at) = found {
            let end = at + field.len();
            bytes[end - LENGTH..end].copy_from_slice(&self.now.value());
        }
    }
}

impl Trace {
    /// Another call of the upstream begins.
    pub(super) fn call_again(&mut self) -> Option<Renamed> {
        let before = self.told;
        self.told.parent_id = self.has_spans.then(span_id)?;
        Some(Renamed {
            before,
            now: self.told,
        })
    }
}

/// Where the request belongs; `head` is missing when it could not be read.
pub(super) fn begin(
    traces: &Traces,
    conn: &Conn<'_>,
    buffer: &[u8],
    head: Option<&RequestHead>,
    behind_trusted: bool,
) -> Trace {
    let given = head.filter(|_| behind_trusted).and_then(|head| {
        let mut values = head.values(buffer, "traceparent");
        // Of two it cannot be told which one is meant.
        let parent = TraceParent::parse(values.next()?)?;
        values.next().is_none().then_some((head, parent))
    });
    let has_spans = traces.otlp.is_some();
    let told = head.filter(|_| behind_trusted && has_spans);
    let secure = told
        .and_then(|head| is_secure(head.field(buffer, "x-forwarded-proto")?))
        .unwrap_or(conn.peer.tls.is_some());
    let host = told.and_then(|head| first_host(head.field(buffer, "x-forwarded-host")?));
    let (peer, came_by) = (peer(conn), came_by(conn, head));
    match given {
        Some((head, parent)) => {
            let states = || head.values(buffer, "tracestate");
            let keeps_state = is_tracestate(states());
            let is_told = keeps_state && has_spans && parent.sampled;
            Trace {
                told: TraceParent {
                    // Else the upstream's spans were children of one that no one has.
                    parent_id: if has_spans {
                        span_id()
                    } else {
                        parent.parent_id
                    },
                    ..parent
                },
                span_id: span_id(),
                parent_id: Some(parent.parent_id),
                secure,
                host,
                peer,
                came_by,
                keeps_state,
                state: is_told.then(|| joined(states())),
                has_spans,
            }
        }
        None => Trace {
            told: TraceParent {
                // Zero is the one that is not valid.
                trace_id: fastrand::u128(1..).to_be_bytes(),
                parent_id: span_id(),
                sampled: fastrand::f64() < traces.sample,
            },
            span_id: span_id(),
            parent_id: None,
            secure,
            host,
            peer,
            came_by,
            keeps_state: false,
            state: None,
            has_spans,
        },
    }
}

/// Whether the client spoke TLS to the first of all proxies.
fn is_secure(forwarded_proto: &[u8]) -> Option<bool> {
    let first = forwarded_proto.split(|byte| *byte == b',').next()?;
    let is = |scheme: &[u8]| first.trim_ascii().eq_ignore_ascii_case(scheme);
    (is(b"https") || is(b"http")).then(|| is(b"https"))
}

/// What the first of all proxies was asked for.
fn first_host(forwarded_host: &[u8]) -> Option<String> {
    let first = forwarded_host.split(|byte| *byte == b',').next()?;
    let first = str::from_utf8(first.trim_ascii()).ok()?;
    (!first.is_empty() && first.len() <= LONGEST_HOST).then(|| first.to_owned())
}

fn peer(conn: &Conn<'_>) -> Option<IpAddr> {
    match (&conn.listener.address, conn.listener.proxy_protocol) {
        (Address::Tcp(_), ProxyProtocol::None) => Some(conn.peer.ip),
        // It says of whom it is, and a socket says nothing.
        (Address::Tcp(_), ProxyProtocol::Accept | ProxyProtocol::Require)
        | (Address::Unix(_), _) => None,
    }
}

fn came_by(conn: &Conn<'_>, head: Option<&RequestHead>) -> Option<&'static str> {
    match (conn.is_http2, head?.minor_version) {
        (true, _) => Some("2"),
        (false, 0) => Some("1.0"),
        (false, _) => Some("1.1"),
    }
}

/// As one field.
fn joined<'a>(values: impl Iterator<Item = &'a [u8]>) -> String {
    let values: Vec<_> = values.map(String::from_utf8_lossy).collect();
    values.join(",")
}

fn span_id() -> [u8; 8] {
    fastrand::u64(1..).to_be_bytes()
}
