//! Audit events on their way to the reader: a table, JSON lines or CSV.

use std::io::Write;

use clap::ValueEnum;
use comfy_table::{Table, presets};

use crate::store::audit::Stored;
use crate::store::audit::record::{self, Record};

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
                csv.write_record(record::columns())?;
            }
            for record in records {
                csv.write_record(record.flat().iter().map(|text| text.as_bytes()))?;
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
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}
