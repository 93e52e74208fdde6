//! The audit as the file spells it.

use std::path::Path;

use serde::Serialize;

use crate::config::Route;
use crate::config::audit::{self, Delivery, Level};
use crate::config::units::{ByteSize, Percent, Span};

#[derive(Serialize)]
pub(super) struct Audit<'c> {
    level: Level,
    sample: Percent,
    capture: Capture<'c>,
    redact: Redact<'c>,
    delivery: Delivery,
    stream: Stream<'c>,
    spool: Spool<'c>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sqlite: Option<Sqlite<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    integrity: Option<Integrity>,
}

#[derive(Serialize)]
struct Capture<'c> {
    request_headers: &'c [String],
    response_headers: &'c [String],
    query: bool,
}

#[derive(Serialize)]
struct Redact<'c> {
    headers: Vec<&'c str>,
    query: Vec<&'c str>,
    paths: Vec<&'c str>,
}

#[derive(Serialize)]
struct Stream<'c> {
    name: &'c str,
    shards: u16,
    max_length: u64,
    batch: StreamBatch,
}

#[derive(Serialize)]
struct StreamBatch {
    events: usize,
    wait: Span,
}

#[derive(Serialize)]
struct Spool<'c> {
    path: &'c Path,
    max: ByteSize,
}

#[derive(Serialize)]
struct Sqlite<'c> {
    path: &'c Path,
    retention: Span,
}

#[derive(Serialize)]
struct Integrity {
    key: String,
}

impl<'c> Audit<'c> {
    /// `is_shipped`: whether it goes to Postgres, so that `sqlite` does nothing, and is not shown where no one has set it.
    pub(super) fn new(audit: &'c audit::Audit, is_shipped: bool) -> Audit<'c> {
        let stream = &audit.stream;
        let is_set =
            audit.sqlite != Path::new(audit::DATABASE) || audit.retention != audit::RETENTION;
        Audit {
            level: audit.level,
            sample: Percent(audit.sample),
            capture: Capture {
                request_headers: &audit.request_headers,
                response_headers: &audit.response_headers,
                query: audit.query,
            },
            redact: Redact {
                headers: audit.redaction.headers().collect(),
                query: audit.redaction.query().collect(),
                paths: audit.redaction.paths().collect(),
            },
            delivery: audit.delivery,
            stream: Stream {
                name: &stream.name,
                shards: stream.shards,
                max_length: stream.max_length,
                batch: StreamBatch {
                    events: stream.batch_events,
                    wait: Span(stream.batch_wait),
                },
            },
            spool: Spool {
                path: &audit.spool.path,
                max: ByteSize(audit.spool.max),
            },
            sqlite: (is_set || !is_shipped).then_some(Sqlite {
                path: &audit.sqlite,
                retention: Span(audit.retention),
            }),
            integrity: audit.key.as_ref().map(|key| Integrity {
                key: format!("{key:?}"),
            }),
        }
    }
}

/// As short as it can be told.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum RouteAudit {
    Level(Level),
    Sampled { level: Level, sample: Percent },
}

impl RouteAudit {
    pub(super) fn new(route: &Route) -> RouteAudit {
        let level = route.audit;
        match route.audit_sample {
            None => RouteAudit::Level(level),
            Some(sample) => RouteAudit::Sampled {
                level,
                sample: Percent(sample),
            },
        }
    }
}
