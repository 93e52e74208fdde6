//! The audit as the file spells it.

use std::path::Path;

use super::shown::Keys;
use crate::config::audit::{self, Audit};
use crate::config::units::{ByteSize, Percent};

/// `is_shipped`: whether it goes to Postgres, so that `sqlite` does nothing, and is not shown where no one has set it.
pub(super) fn audit(audit: &Audit, is_shipped: bool) -> Keys {
    let stream = &audit.stream;
    let is_set = audit.sqlite != Path::new(audit::DATABASE) || audit.retention != audit::RETENTION;
    let sqlite = Keys::new()
        .key("path", &*audit.sqlite)
        .key("retention", audit.retention);
    let key = audit.key.as_ref();
    Keys::new()
        .key("level", audit.level)
        .key("sample", Percent(audit.sample))
        .key(
            "capture",
            Keys::new()
                .key("request_headers", audit.request_headers.clone())
                .key("response_headers", audit.response_headers.clone())
                .key("query", audit.query),
        )
        .key(
            "redact",
            Keys::new()
                .key("headers", audit.redaction.headers().collect::<Vec<_>>())
                .key("query", audit.redaction.query().collect::<Vec<_>>())
                .key("paths", audit.redaction.paths().collect::<Vec<_>>()),
        )
        .key("delivery", audit.delivery)
        .key(
            "stream",
            Keys::new()
                .key("name", &stream.name)
                .key("shards", stream.shards)
                .key("max_length", stream.max_length)
                .key(
                    "batch",
                    Keys::new()
                        .key("events", stream.batch_events)
                        .key("wait", stream.batch_wait),
                ),
        )
        .key(
            "spool",
            Keys::new()
                .key("path", &*audit.spool.path)
                .key("max", ByteSize(audit.spool.max)),
        )
        .key("sqlite", (is_set || !is_shipped).then_some(sqlite))
        .key("integrity", key.map(|key| Keys::new().key("key", key)))
}
