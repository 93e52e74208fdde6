//! The trace that a request belongs to, where weir takes part in traces: a trusted proxy's goes on, every other begins here.

use std::time::Duration;

use super::draft::{Draft, Text};
use super::exchange::Peer;
use super::record::{Record, Try};
use crate::config::telemetry::Traces;
use crate::event::{AuditEvent, Micros};
use crate::http1::head::RequestHead;
use crate::http1::trace_context::{LENGTH, TraceParent, is_tracestate};
use crate::plan::Plan;
use crate::telemetry::spans::{Call, Traced};

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
        let answered = record.answered.is_some() && !record.rejected;
        let call = |number, it: &Try, until| Call {
            span_id: it.span_id,
            after: since(it.began),
            until,
            secure: it.pool.as_ref().is_some_and(|pool| pool.is_secure),
            endpoint: it.pool.as_ref().map(|pool| pool.endpoint.place.clone()),
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
            status: answered.then_some(record.status),
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
            grpc: record.grpc.map(|status| status.0),
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
    peer: &Peer,
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
    let secure = head
        .filter(|_| behind_trusted && has_spans)
        .and_then(|head| is_secure(head.field(buffer, "x-forwarded-proto")?))
        .unwrap_or(peer.tls.is_some());
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

/// As one field.
fn joined<'a>(values: impl Iterator<Item = &'a [u8]>) -> String {
    let values: Vec<_> = values.map(String::from_utf8_lossy).collect();
    values.join(",")
}

fn span_id() -> [u8; 8] {
    fastrand::u64(1..).to_be_bytes()
}
