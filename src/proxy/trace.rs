//! The trace that a request belongs to, where weir takes part in traces: a trusted proxy's goes on, every other begins here.

use super::draft::{Draft, Span};
use super::handle::Peer;
use super::headers::is;
use super::record::Record;
use crate::config::telemetry::Traces;
use crate::event::AuditEvent;
use crate::http1::head::RequestHead;
use crate::http1::trace_context::{TraceParent, is_tracestate};
use crate::plan::Plan;
use crate::telemetry::spans::{Call, Traced};

/// A request's place in its trace.
#[derive(Debug)]
pub(super) struct Trace {
    /// What the upstream is told: the trace, weir's own call of it, and whether spans are kept.
    pub told: TraceParent,
    /// The span of the request.
    pub span_id: [u8; 8],
    /// The caller's span, where the trace is not weir's.
    pub parent_id: Option<[u8; 8]>,
    /// Whether the client spoke TLS.
    pub secure: bool,
    /// Whether the caller's `tracestate` goes on.
    pub keeps_state: bool,
}

impl Trace {
    /// Whether its spans go to a collector.
    pub(super) fn is_kept(&self, plan: &Plan) -> bool {
        self.told.sampled && plan.traces.is_some()
    }

    /// What its spans tell.
    pub(super) fn traced(&self, record: &Record, draft: &Draft, event: AuditEvent<&str>) -> Traced {
        let text = |span: &Option<Span>| span.as_ref().map(|span| draft.text(span).to_owned());
        let answered = record.answered.is_some() && !record.rejected;
        let call = record.forwarded.map(|forwarded| Call {
            span_id: self.told.parent_id,
            after: forwarded.saturating_sub(record.began).into(),
            secure: record.reached.as_ref().is_some_and(|pool| pool.is_secure),
            path: text(&draft.sent_path),
            status: answered.then_some(record.status),
            again: record.tried_again,
        });
        Traced {
            event: event.into_owned(),
            user_agent: text(&draft.user_agent),
            trace_id: self.told.trace_id,
            span_id: self.span_id,
            parent_id: self.parent_id,
            secure: self.secure,
            grpc: record.grpc.map(|status| status.0),
            call,
        }
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
        let mut values = values(buffer, head, "traceparent");
        // Of two it cannot be told which one is meant.
        let parent = TraceParent::parse(values.next()?)?;
        values.next().is_none().then_some((head, parent))
    });
    let client_span = span_id();
    let secure = peer.tls.is_some();
    match given {
        Some((head, parent)) => Trace {
            told: TraceParent {
                parent_id: client_span,
                ..parent
            },
            span_id: span_id(),
            parent_id: Some(parent.parent_id),
            secure,
            keeps_state: is_tracestate(values(buffer, head, "tracestate")),
        },
        None => Trace {
            told: TraceParent {
                // Zero is the one that is not valid.
                trace_id: fastrand::u128(1..).to_be_bytes(),
                parent_id: client_span,
                sampled: fastrand::f64() < traces.sample,
            },
            span_id: span_id(),
            parent_id: None,
            secure,
            keeps_state: false,
        },
    }
}

fn span_id() -> [u8; 8] {
    fastrand::u64(1..).to_be_bytes()
}

fn values<'b>(
    buffer: &'b [u8],
    head: &RequestHead,
    wanted: &str,
) -> impl Iterator<Item = &'b [u8]> {
    let fields = head.fields.iter();
    fields
        .filter(move |(name, _)| is(buffer, name, wanted))
        .map(|(_, value)| &buffer[value.clone()])
}
