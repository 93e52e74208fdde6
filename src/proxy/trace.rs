//! The trace that a request belongs to, where weir takes part in traces: a trusted proxy's goes on, every other begins here.

use super::headers::is;
use crate::config::telemetry::Traces;
use crate::http1::head::RequestHead;
use crate::http1::trace_context::{TraceParent, is_tracestate};

/// A request's place in its trace.
#[derive(Debug)]
pub(super) struct Trace {
    /// What the upstream is told: the trace, weir's own call of it, and whether spans are kept.
    pub told: TraceParent,
    /// Whether the caller's `tracestate` goes on.
    pub keeps_state: bool,
}

/// Where the request belongs; `head` is missing when it could not be read.
pub(super) fn begin(
    traces: &Traces,
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
    match given {
        Some((head, parent)) => Trace {
            told: TraceParent {
                parent_id: client_span,
                ..parent
            },
            keeps_state: is_tracestate(values(buffer, head, "tracestate")),
        },
        None => Trace {
            told: TraceParent {
                // Zero is the one that is not valid.
                trace_id: fastrand::u128(1..).to_be_bytes(),
                parent_id: client_span,
                sampled: fastrand::f64() < traces.sample,
            },
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
