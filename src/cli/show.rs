//! Audit events on their way to the reader: a table, JSON lines or CSV.

use std::borrow::Cow;
use std::io::Write;

use clap::ValueEnum;
use comfy_table::{Table, presets};
use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::event::Micros;
use crate::store::audit::Stored;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people: some of the fields, in columns.
    Table,
    /// A JSON object a line.
    Jsonl,
    /// As RFC 4180, with a head line.
    Csv,
}

/// Writes the events; with `head`, the line that names the columns comes first where the format has one.
pub(super) fn print(
    events: &[Stored],
    format: Format,
    head: bool,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let records = events.iter().map(Record::new);
    match format {
        Format::Table if events.is_empty() => {}
        Format::Table => {
            let mut table = Table::new();
            table.load_style(presets::NOTHING);
            if head {
                table.set_header([
                    "TIME", "CLIENT", "USER", "ROUTE", "METHOD", "PATH", "STATUS", "LABEL", "MS",
                ]);
            }
            for record in records {
                let millis = record.duration_us as f64 / 1_000.0;
                table.add_row(
                    [
                        &record.time,
                        &record.client,
                        or_dash(record.user),
                        or_dash(record.route),
                        record.method,
                        record.path,
                        &record.status.to_string(),
                        or_dash(record.label),
                        &format!("{millis:.1}"),
                    ]
                    .map(printable),
                );
            }
            writeln!(out, "{}", table.trim_fmt())?;
        }
        Format::Jsonl => {
            for record in records {
                writeln!(out, "{}", serde_json::to_string(&record)?)?;
            }
        }
        Format::Csv => {
            let mut csv = csv::WriterBuilder::new()
                .has_headers(false)
                .from_writer(out);
            if head {
                csv.write_record(COLUMNS)?;
            }
            for record in records {
                csv.serialize(record.flat())?;
            }
            csv.flush()?;
        }
    }
    Ok(())
}

fn or_dash(text: Option<&str>) -> &str {
    text.unwrap_or("-")
}

/// Without control characters, which could drive the terminal of who reads.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// An event as it is shown: every field, in the units that its name says.
#[derive(Serialize)]
struct Record<'a> {
    time: String,
    id: String,
    instance: &'a str,
    boot: String,
    seq: u64,
    route: Option<&'a str>,
    upstream: Option<&'a str>,
    endpoint: Option<&'a str>,
    client: String,
    user: Option<&'a str>,
    method: &'a str,
    host: &'a str,
    path: &'a str,
    query: Option<&'a str>,
    status: u16,
    label: Option<&'a str>,
    limits: Vec<&'a str>,
    breaker: Option<&'a str>,
    bytes_in: u64,
    bytes_out: u64,
    duration_us: u64,
    upstream_duration_us: Option<u64>,
    request_id: Cow<'a, str>,
    trace_id: Option<String>,
    headers: Vec<(&'a str, &'a str)>,
}

const COLUMNS: [&str; 25] = [
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
    fn new(stored: &'a Stored) -> Record<'a> {
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
    fn flat(&self) -> Vec<String> {
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
