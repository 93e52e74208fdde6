//! An event as it is shown to others: by `weir audit` and by the admin port alike.

use std::borrow::Cow;

use serde::Serialize;
use uuid::Uuid;

use super::Stored;
use crate::event::Rfc3339;

/// An event as it is shown: every field, in the units that its name says.
#[derive(Serialize)]
pub struct Record<'a> {
    pub time: String,
    pub id: String,
    pub instance: &'a str,
    pub boot: String,
    pub seq: u64,
    pub route: Option<&'a str>,
    pub upstream: Option<&'a str>,
    pub endpoint: Option<&'a str>,
    pub client: String,
    pub user: Option<&'a str>,
    pub method: &'a str,
    pub host: &'a str,
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub status: u16,
    pub label: Option<&'a str>,
    pub limits: Vec<&'a str>,
    pub breaker: Option<&'a str>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub duration_us: u64,
    pub upstream_duration_us: Option<u64>,
    pub request_id: Cow<'a, str>,
    pub trace_id: Option<String>,
    pub headers: Vec<(&'a str, &'a str)>,
}

/// A field's name, and what it is as a text.
type Column = (&'static str, for<'r> fn(&'r Record<'r>) -> Cow<'r, str>);

/// A record's fields as texts; lists are one each, their items parted by `; `.
const FLAT: [Column; 25] = [
    ("time", |it| (&*it.time).into()),
    ("id", |it| (&*it.id).into()),
    ("instance", |it| it.instance.into()),
    ("boot", |it| (&*it.boot).into()),
    ("seq", |it| it.seq.to_string().into()),
    ("route", |it| text(it.route)),
    ("upstream", |it| text(it.upstream)),
    ("endpoint", |it| text(it.endpoint)),
    ("client", |it| (&*it.client).into()),
    ("user", |it| text(it.user)),
    ("method", |it| it.method.into()),
    ("host", |it| it.host.into()),
    ("path", |it| it.path.into()),
    ("query", |it| text(it.query)),
    ("status", |it| it.status.to_string().into()),
    ("label", |it| text(it.label)),
    ("limits", |it| it.limits.join("; ").into()),
    ("breaker", |it| text(it.breaker)),
    ("bytes_in", |it| it.bytes_in.to_string().into()),
    ("bytes_out", |it| it.bytes_out.to_string().into()),
    ("duration_us", |it| it.duration_us.to_string().into()),
    ("upstream_duration_us", |it| {
        it.upstream_duration_us
            .map_or(String::new(), |us| us.to_string())
            .into()
    }),
    ("request_id", |it| (&*it.request_id).into()),
    ("trace_id", |it| text(it.trace_id.as_deref())),
    ("headers", |it| headers(it)),
];

impl<'a> Record<'a> {
    pub fn new(stored: &'a Stored) -> Record<'a> {
        let event = &stored.event;
        Record {
            time: Rfc3339(event.time).to_string(),
            id: Uuid::from_bytes(event.id).to_string(),
            instance: &stored.instance,
            boot: Uuid::from_bytes(stored.boot).to_string(),
            seq: event.seq,
            route: event.route.as_deref(),
            upstream: event.upstream.as_deref(),
            endpoint: event.endpoint.as_deref(),
            client: event.client.to_string(),
            user: event.user.as_deref(),
            method: &event.method,
            host: &event.host,
            path: &event.path,
            query: event.query.as_deref(),
            status: event.status,
            label: event.label.as_deref(),
            limits: event.limits.iter().map(AsRef::as_ref).collect(),
            breaker: event.breaker.as_deref(),
            bytes_in: event.bytes_in,
            bytes_out: event.bytes_out,
            duration_us: event.duration.0,
            upstream_duration_us: event.upstream_duration.map(|duration| duration.0),
            request_id: event.request_id(),
            trace_id: event
                .trace_id
                .map(|id| Uuid::from_bytes(id).simple().to_string()),
            headers: event
                .headers
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_str()))
                .collect(),
        }
    }

    /// The values of [`columns`].
    pub fn flat(&self) -> [Cow<'_, str>; FLAT.len()] {
        FLAT.map(|(_, text)| text(self))
    }
}

/// The names of what [`Record::flat`] gives.
pub fn columns() -> [&'static str; FLAT.len()] {
    FLAT.map(|(name, _)| name)
}

fn text(value: Option<&str>) -> Cow<'_, str> {
    value.unwrap_or_default().into()
}

fn headers<'r>(record: &'r Record<'_>) -> Cow<'r, str> {
    let headers = record.headers.iter();
    let lines: Vec<_> = headers
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    lines.join("; ").into()
}
