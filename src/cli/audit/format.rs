//! Audit events on their way to the reader: a table, JSON lines or CSV.

use std::io::Write;

use clap::ValueEnum;
use comfy_table::{Table, presets};

use crate::cli::seen;
use crate::store::audit::Stored;
use crate::store::audit::record::{self, Record};
use crate::telemetry::access_log::is_not_shown;

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
                writeln!(out, "{}", seen(&serde_json::to_string(&record)?))?;
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

/// Without what could drive the terminal of who reads, or show something else than it says.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if is_not_shown(c) { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn what_is_printed_is_what_is_seen() {
        let shown = printable("a\u{1b}[1m\u{9b}\u{2028}\u{202e}\u{2069}\u{e4}");
        assert_eq!(shown, "a\u{fffd}[1m\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{e4}");
    }
}
