//! `weir audit`: reads the audit database, a file a day. Must not write to it.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::load;
use super::show::{Format, print};
use crate::clock;
use crate::config::Secret;
use crate::config::units::Span;
use crate::event::Micros;
use crate::store::audit::{Cursor, Filter, Order, Stored};
use crate::store::sqlite::Reader;

/// Rows read at a time, so that an export of any size needs little memory.
const PAGE: u32 = 1_000;
/// How often `tail` looks for what arrived.
const POLL: Duration = Duration::from_millis(250);

/// Reads the audit database.
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// The audit database as the configuration names it, without a day, or the file of one day [default: the one that
    /// --config names, or weir-audit.db].
    #[arg(long, global = true, value_name = "FILE")]
    database: Option<PathBuf>,
    /// The configuration file, which names the database and the key.
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Show the newest events that pass the filter, the oldest of them first.
    Query {
        #[command(flatten)]
        filter: FilterFlags,
        /// At most as many.
        #[arg(short = 'n', long, default_value_t = 100)]
        limit: u32,
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Show the newest events, then each that arrives, until interrupted.
    Tail {
        #[command(flatten)]
        filter: FilterFlags,
        /// How many to begin with.
        #[arg(short = 'n', long, default_value_t = 10)]
        lines: u32,
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Prove that no event is missing, changed or out of place; exit 1 if one is.
    Verify {
        /// The file with the key that the events were written with [default: the configuration's].
        #[arg(long, value_name = "FILE")]
        key_file: Option<PathBuf>,
    },
    /// Write every event that passes the filter, with every field.
    Export {
        #[command(flatten)]
        filter: FilterFlags,
        #[arg(long, value_enum, default_value_t = Format::Jsonl)]
        format: Format,
    },
}

#[derive(Args)]
struct FilterFlags {
    /// Not before: an RFC 3339 time, or how long ago, such as 1h or 30m.
    #[arg(long, value_name = "TIME")]
    since: Option<When>,
    /// Before: an RFC 3339 time, or how long ago.
    #[arg(long, value_name = "TIME")]
    until: Option<When>,
    /// Whose requests.
    #[arg(long)]
    user: Option<String>,
    /// A route's host and path as the file has them, such as /pay/*.
    #[arg(long)]
    route: Option<String>,
    /// The client's address.
    #[arg(long, value_name = "IP")]
    client: Option<std::net::IpAddr>,
    /// A status, a class or a range: 404, 4xx or 400-403.
    #[arg(long)]
    status: Option<Statuses>,
    /// Why weir refused.
    #[arg(long)]
    label: Option<String>,
    /// In capital letters, such as POST.
    #[arg(long)]
    method: Option<String>,
    /// What the path begins with.
    #[arg(long, value_name = "PREFIX")]
    path: Option<String>,
}

/// A point in time, since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct When(Micros);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Statuses(RangeInclusive<u16>);

/// Does the command. Fails where the database cannot be read; a reader of our output that leaves is not a failure.
pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let configured = match &arguments.config {
        Some(file) => load(file)?.audit,
        None => None,
    };
    let named = configured.as_ref().map(|audit| audit.sqlite.clone());
    let path = &arguments
        .database
        .or(named)
        .unwrap_or_else(|| PathBuf::from("weir-audit.db"));
    let reader = Reader::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut out = io::stdout().lock();
    let done = match arguments.command {
        Command::Query {
            filter,
            limit,
            format,
        } => query(&reader, &filter, limit, format, &mut out),
        Command::Tail {
            filter,
            lines,
            format,
        } => tail(&reader, &filter, lines, format, &mut out),
        Command::Verify { key_file } => {
            let configured = configured.and_then(|audit| audit.key);
            verify(&reader, key_file, configured, &mut out)
        }
        Command::Export { filter, format } => export(&reader, &filter, format, &mut out),
    };
    match done {
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        done => done,
    }
}

fn query(
    reader: &Reader,
    flags: &FilterFlags,
    limit: u32,
    format: Format,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    print(&newest(reader, flags, limit)?, format, true, out)?;
    Ok(ExitCode::SUCCESS)
}

fn tail(
    reader: &Reader,
    flags: &FilterFlags,
    lines: u32,
    format: Format,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    // What arrives is looked for behind the newest event of all, not only behind the newest that passes.
    let all = Filter {
        limit: Some(1),
        order: Order::NewestFirst,
        ..Filter::default()
    };
    let end = reader
        .query(&all)?
        .first()
        .map_or(Cursor::default(), |newest| newest.cursor);
    let mut shown = newest(reader, flags, lines)?;
    shown.retain(|event| event.cursor <= end);
    print(&shown, format, true, out)?;
    out.flush()?;
    let mut filter = Filter {
        after: Some(end),
        limit: Some(PAGE),
        ..flags.filter()
    };
    loop {
        let events = reader.query(&filter)?;
        match events.last() {
            Some(last) => {
                filter.after = Some(last.cursor);
                print(&events, format, false, out)?;
                out.flush()?;
            }
            None => thread::sleep(POLL),
        }
    }
}

fn export(
    reader: &Reader,
    flags: &FilterFlags,
    format: Format,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let mut out = io::BufWriter::new(out);
    let mut filter = Filter {
        limit: Some(PAGE),
        ..flags.filter()
    };
    loop {
        let events = reader.query(&filter)?;
        print(&events, format, filter.after.is_none(), &mut out)?;
        match events.last() {
            Some(last) => filter.after = Some(last.cursor),
            None => break,
        }
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

fn verify(
    reader: &Reader,
    key_file: Option<PathBuf>,
    configured: Option<Secret>,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let key = match &key_file {
        Some(file) => {
            Some(fs::read(file).with_context(|| format!("cannot read {}", file.display()))?)
        }
        None => configured.map(|key| key.0.into_bytes()),
    };
    // The key is all of the file but the line end that editors leave.
    let key = key.as_deref().map(<[u8]>::trim_ascii_end);
    ensure!(
        key.is_none_or(|key| !key.is_empty()),
        "the key file is empty"
    );
    let report = reader.verify(key)?;
    let mut said = String::new();
    for fault in &report.faults {
        said.push_str(&format!("{fault}\n"));
    }
    said.push_str(&format!(
        "{} events, {} boots, {} files: {}\n",
        report.events,
        report.instances,
        report.files,
        match report.faults.len() {
            0 => "nothing is missing or changed".to_owned(),
            1 => "1 fault".to_owned(),
            many => format!("{many} faults"),
        }
    ));
    let code = if report.faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    };
    match out.write_all(said.as_bytes()) {
        // The verdict stands, whoever still reads why.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(code),
        written => written.map(|()| code).map_err(Into::into),
    }
}

/// The newest events, the oldest of them first.
fn newest(reader: &Reader, flags: &FilterFlags, limit: u32) -> anyhow::Result<Vec<Stored>> {
    let filter = Filter {
        limit: Some(limit),
        order: Order::NewestFirst,
        ..flags.filter()
    };
    let mut events = reader.query(&filter)?;
    events.reverse();
    Ok(events)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = |error: &io::Error| error.kind() == ErrorKind::BrokenPipe;
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(kind)
            || cause.downcast_ref::<csv::Error>().is_some_and(
                |error| matches!(error.kind(), csv::ErrorKind::Io(error) if kind(error)),
            )
    })
}

impl FilterFlags {
    fn filter(&self) -> Filter {
        Filter {
            since: self.since.map(|when| when.0),
            until: self.until.map(|when| when.0),
            user: self.user.clone(),
            route: self.route.clone(),
            client: self.client.map(|client| client.to_string()),
            status: self.status.clone().map(|statuses| statuses.0),
            label: self.label.clone(),
            method: self.method.clone(),
            path_prefix: self.path.clone(),
            ..Filter::default()
        }
    }
}

impl When {
    fn parse(text: &str, now: Duration) -> Result<When, String> {
        if let Ok(ago) = text.parse::<Span>() {
            return Ok(When(now.saturating_sub(ago.0).into()));
        }
        let time = text.parse::<Timestamp>().ok();
        time.and_then(|time| u64::try_from(time.as_microsecond()).ok())
            .map(|micros| When(Micros(micros)))
            .ok_or_else(|| {
                format!("\"{text}\" is not a time: use 2026-01-31T08:00:00Z, or how long ago, such as 1h")
            })
    }
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<When, String> {
        When::parse(text, clock::wall())
    }
}

impl FromStr for Statuses {
    type Err = String;

    fn from_str(text: &str) -> Result<Statuses, String> {
        let one = |text: &str| match text.parse() {
            Ok(status @ 100..=999) if text.len() == 3 => Some(status),
            _ => None,
        };
        let range = if let Some(class) = text.strip_suffix("xx") {
            one(&format!("{class}00")).map(|first| first..=first + 99)
        } else if let Some((first, last)) = text.split_once('-') {
            one(first).zip(one(last)).map(|(first, last)| first..=last)
        } else {
            one(text).map(|status| status..=status)
        };
        range
            .filter(|range| !range.is_empty())
            .map(Statuses)
            .ok_or_else(|| format!("\"{text}\" is not a status: use 404, 4xx or 400-403"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_one_a_class_or_a_range() {
        let check = |text: &str, expected: Option<RangeInclusive<u16>>| {
            assert_eq!(text.parse().ok(), expected.map(Statuses), "{text}");
        };
        check("404", Some(404..=404));
        check("4xx", Some(400..=499));
        check("400-403", Some(400..=403));
        for bad in [
            "", "4", "xx", "44xx", "4xxx", "403-400", "-", "99", "+44", "1000", "abc",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn times_are_absolute_or_ago() {
        let now = Duration::from_secs(10_000);
        let check = |text: &str, secs: Option<u64>| {
            let expected = secs.map(|secs| When(Micros(secs * 1_000_000)));
            assert_eq!(When::parse(text, now).ok(), expected, "{text}");
        };
        check("1h", Some(6_400));
        check("400d", Some(0));
        check("1970-01-01T00:01:00Z", Some(60));
        check("1970-01-01T01:01:00+01:00", Some(60));
        for bad in ["", "yesterday", "1960-01-01T00:00:00Z", "1970-01-01"] {
            check(bad, None);
        }
    }
}
