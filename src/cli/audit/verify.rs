//! `weir audit verify`.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};

use super::format::printable;
use crate::config::Secret;
use crate::store::audit::Report;
use crate::store::audit::chain::Keys;
use crate::store::audit::events::Events;

/// The boots without an end mark that are named; of more than these only the number is told.
const NAMED: usize = 20;
/// What SQLite keeps days in.
const FILES: &str = "files";

/// Prints each fault, then the verdict, which the exit code tells too.
pub(super) async fn run(
    store: &Events,
    key_files: Vec<PathBuf>,
    configured: Option<Secret>,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let mut keys = Vec::new();
    for file in &key_files {
        let read = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let key = without_line_end(&read);
        ensure!(!key.is_empty(), "the key file {} is empty", file.display());
        keys.push(key.to_vec());
    }
    if key_files.is_empty() {
        keys.extend(configured.map(|key| key.0.into_bytes()));
    }
    let keys = Keys::new(&Vec::from_iter(keys.iter().map(Vec::as_slice)));
    let report = store.verify(&keys).await?;
    let kept_in = match store {
        Events::Sqlite(_) => FILES,
        Events::Postgres(_) => "days",
    };
    let code = match report.faults.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    };
    match out.write_all(said(&report, kept_in).as_bytes()) {
        // The verdict stands, whoever still reads why.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(code),
        written => written.map(|()| code).map_err(Into::into),
    }
}

/// A key is all of its file but the line end that editors leave, as `${file:…}` reads it.
fn without_line_end(key: &[u8]) -> &[u8] {
    let line = key.strip_suffix(b"\n");
    line.map_or(key, |line| line.strip_suffix(b"\r").unwrap_or(line))
}

fn said(report: &Report, kept_in: &str) -> String {
    let mut said = String::new();
    for fault in &report.faults {
        said.push_str(&printable(&fault.to_string()));
        said.push('\n');
    }
    for boot in report.open.iter().take(NAMED) {
        let boot = printable(boot);
        said.push_str(&format!(
            "{boot}: still runs, or was killed: events behind its last would not be missed\n"
        ));
    }
    let unnamed = report.open.len().saturating_sub(NAMED);
    if unnamed > 0 {
        said.push_str(&format!("and {unnamed} other boots without an end mark\n"));
    }
    if report.pending > 0 {
        said.push_str(&format!(
            "{} events are on their way: newer ones of their boots came within the last minutes\n",
            report.pending
        ));
    }
    if report.dropped > 0 {
        said.push_str(&format!(
            "{} events were dropped before they could be numbered, as their processes say\n",
            report.dropped
        ));
    }
    if kept_in == FILES {
        said.push_str(
            "files do not tell how many events were dropped before they could be numbered: weir_audit_events_total does\n",
        );
    }
    said.push_str(&format!(
        "{} events, {} boots, {} {}: {}\n",
        report.events,
        report.instances,
        report.files,
        kept_in,
        match report.faults.len() {
            0 => "nothing is missing or changed".to_owned(),
            1 => "1 fault".to_owned(),
            many => format!("{many} faults"),
        }
    ));
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::audit::days::Day;
    use crate::store::audit::{Fault, FaultKind};

    fn lines(report: &Report, kept_in: &str) -> Vec<String> {
        said(report, kept_in).lines().map(str::to_owned).collect()
    }

    #[test]
    fn what_a_whole_audit_cannot_prove_is_told_before_the_verdict() {
        let none = "0 events, 0 boots, 0 days: nothing is missing or changed";
        assert_eq!(lines(&Report::default(), "days"), [none]);
        let report = Report {
            events: 9,
            instances: 2,
            files: 3,
            open: vec!["a/1".to_owned()],
            pending: 4,
            dropped: 5,
            ..Report::default()
        };
        assert_eq!(
            lines(&report, "days"),
            [
                "a/1: still runs, or was killed: events behind its last would not be missed",
                "4 events are on their way: newer ones of their boots came within the last minutes",
                "5 events were dropped before they could be numbered, as their processes say",
                "9 events, 2 boots, 3 days: nothing is missing or changed",
            ]
        );
        let files = lines(&Report::default(), FILES);
        assert_eq!(files.len(), 2, "{files:?}");
        assert!(
            files[0].ends_with("weir_audit_events_total does"),
            "{files:?}"
        );
    }

    /// An instance's name is as the database has it, whoever wrote that.
    #[test]
    fn no_name_drives_the_terminal() {
        let name = "a\u{1b}[2K\r\u{9b}8m\n9 events: nothing is missing".to_owned();
        let report = Report {
            open: vec![name.clone()],
            faults: vec![Fault::of_instance(Day(1), name, FaultKind::Instance)],
            ..Report::default()
        };
        let said = said(&report, "days");
        let shown = "a\u{fffd}[2K\u{fffd}\u{fffd}8m\u{fffd}9 events: nothing is missing";
        assert_eq!(said.matches(shown).count(), 2, "{said}");
        assert_eq!(said.lines().count(), 3, "{said}");
    }

    #[test]
    fn of_many_boots_without_an_end_mark_some_are_named_and_all_are_counted() {
        let boots = |count: usize| Report {
            open: (0..count).map(|n| format!("a/{n}")).collect(),
            ..Report::default()
        };
        let named = |count| {
            let lines = lines(&boots(count), "days");
            let named = lines.iter().filter(|line| line.contains("still runs"));
            (named.count(), lines[lines.len() - 2].clone())
        };
        assert_eq!(named(NAMED).0, NAMED);
        assert!(!named(NAMED).1.starts_with("and "));
        let others = "and 3 other boots without an end mark".to_owned();
        assert_eq!(named(NAMED + 3), (NAMED, others));
    }
}
