//! An event as it is shown to others: by `weir audit` and by the admin port alike.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::Stored;
use crate::event::Micros;

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

/// The names of what [`Record::flat`] gives.
pub const COLUMNS: [&str; 25] = [
    "time",
    "id",
    "instance",
    "boot",
    "seq",
    "route",
    "upstream",
    "endpoint",
    "client",
    "user",
    "method",
    "host",
    "path",
    "query",
    "status",
    "label",
    "limits",
    "breaker",
    "bytes_in",
    "bytes_out",
    "duration_us",
    "upstream_duration_us",
    "request_id",
    "trace_id",
    "headers",
];

impl<'a> Record<'a> {
    pub fn new(stored: &'a Stored) -> Record<'a> {
        let event = &stored.event;
        Record {
            time: show_time(event.time),
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

    /// The values of [`COLUMNS`]; lists are one field each, their items parted by `; `.
    pub fn flat(&self) -> Vec<String> {
        let text = |value: Option<&str>| value.unwrap_or_default().to_owned();
        let headers = self
            .headers
            .iter()
            .map(|(name, value)| format!("{name}: {value}"));
        vec![
            self.time.clone(),
            self.id.clone(),
            self.instance.to_owned(),
            self.boot.clone(),
            self.seq.to_string(),
            text(self.route),
            text(self.upstream),
            text(self.endpoint),
            self.client.clone(),
            text(self.user),
            self.method.to_owned(),
            self.host.to_owned(),
            self.path.to_owned(),
            text(self.query),
            self.status.to_string(),
            text(self.label),
            self.limits.join("; "),
            text(self.breaker),
            self.bytes_in.to_string(),
            self.bytes_out.to_string(),
            self.duration_us.to_string(),
            self.upstream_duration_us
                .map(|us| us.to_string())
                .unwrap_or_default(),
            self.request_id.clone().into_owned(),
            text(self.trace_id.as_deref()),
            headers.collect::<Vec<_>>().join("; "),
        ]
    }
}

fn show_time(time: Micros) -> String {
    let micros = i64::try_from(time.0).unwrap_or(i64::MAX);
    match Timestamp::from_microsecond(micros) {
        Ok(time) => format!("{time:.6}"),
        Err(_) => format!("{micros}us"),
    }
}
