//! One file a command; what several of them need is here.

pub mod audit;
pub mod r#await;
pub mod check;
mod client;
mod companion;
mod control;
mod dependencies;
pub mod drain;
pub mod echo;
mod files;
pub mod healthcheck;
pub mod inject;
pub mod migrate;
pub mod redirect;
mod reload;
pub mod run;
mod service_manager;
pub mod session;
mod signals;
mod take_over;
mod watched_files;
pub mod webhook;
pub mod worker;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use tracing::error;

use crate::clock;
use crate::config::Config;
use crate::config::check::{Checked, checked};
use crate::config::telemetry::Log;
use crate::config::yaml::{self, Mistake};
use crate::store::audit::StoreError;
use crate::store::postgres::PostgresError;
use crate::telemetry::access_log::is_not_shown;
use crate::telemetry::log;

/// Reads and checks a file; the error tells every mistake in it.
pub fn load(path: &Path) -> anyhow::Result<Config> {
    read(path).map(|checked| checked.config)
}

/// Likewise, with what is to be warned of.
pub fn read(path: &Path) -> anyhow::Result<Checked> {
    parsed(path, &text(path)?)
}

/// Begins to log as the file says, first of all of a clock by which nothing that is kept would be of its day.
fn begin_to_log(settings: Log) {
    log::init(settings);
    if clock::is_unset() {
        error!(
            "the clock is years behind: set it, and start weir again; Postgres refuses what is audited until then as older than worker.retention"
        );
    }
}

fn text(path: &Path) -> anyhow::Result<String> {
    let cannot = || format!("cannot read {}", path.display());
    let bytes = std::fs::read(path).with_context(cannot)?;
    // UTF-16 of ASCII is UTF-8, too.
    if bytes.contains(&0) {
        bail!(
            "{} has NUL bytes in it, as UTF-16 has: save it as UTF-8",
            path.display()
        );
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
        anyhow!(
            "{}: line {line} is not UTF-8: save the file as UTF-8",
            cannot()
        )
    })
}

/// The files that its values name (`${file:…}`), as far as it can be read; none of a pipe, which can be read once.
fn named_files(path: &Path) -> BTreeSet<PathBuf> {
    if !path.is_file() {
        return BTreeSet::new();
    }
    text(path).map_or_else(|_| BTreeSet::new(), |text| yaml::named_files(&text))
}

/// `text` is that of the file.
fn parsed(path: &Path, text: &str) -> anyhow::Result<Checked> {
    checked(text, &|name| std::env::var(name).ok()).map_err(|mistakes| told(path, &mistakes))
}

/// Every mistake in the file.
fn told(path: &Path, mistakes: &[Mistake]) -> anyhow::Error {
    let many = if mistakes.len() == 1 {
        "mistake"
    } else {
        "mistakes"
    };
    let mut said = format!("{} {many} in {}", mistakes.len(), path.display());
    for mistake in mistakes {
        let _ = write!(said, "\n  {mistake}");
    }
    anyhow!(said)
}

/// With what a human is to do, where it is of Postgres's and does not say so itself.
fn with_mend(error: anyhow::Error) -> anyhow::Error {
    match of_postgres(&error).and_then(PostgresError::mend) {
        Some(mend) => anyhow!("{error:#}; {mend}"),
        None => error,
    }
}

/// What Postgres, or the way to it, has said.
fn of_postgres(error: &anyhow::Error) -> Option<&PostgresError> {
    error.chain().find_map(|cause| {
        let by_store = match cause.downcast_ref::<StoreError>() {
            Some(StoreError::Other(error)) => error.downcast_ref(),
            Some(_) | None => None,
        };
        by_store.or_else(|| cause.downcast_ref())
    })
}

/// Says it on standard error. A reader that has left, or a full disk, changes nothing of what is done, where `eprintln!` would panic.
pub fn tell(text: &str) {
    let _ = io::stderr()
        .lock()
        .write_all(format!("{text}\n").as_bytes());
}

/// JSON with escapes for what could drive a terminal, or would show something else than it says; it means the same.
fn seen(json: &str) -> Cow<'_, str> {
    // Lines are parted by it; within a text it is an escape.
    let hides = |char: char| char != '\n' && is_not_shown(char);
    if !json.contains(hides) {
        return Cow::Borrowed(json);
    }
    let mut seen = String::with_capacity(json.len());
    for char in json.chars() {
        match hides(char) {
            true => drop(write!(seen, "\\u{:04x}", u32::from(char))),
            false => seen.push(char),
        }
    }
    Cow::Owned(seen)
}

/// Writes to standard output. A reader that has seen enough and left, as `head` does, is not a failure.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::seen;

    #[test]
    fn json_says_the_same_and_is_seen() {
        let value = json!({ "user": "a\u{9b}2J\u{7f}\u{202e}\n\u{e4}" });
        for (json, lines) in [(value.to_string(), 1), (format!("{value:#}"), 3)] {
            let seen = seen(&json);
            assert!(seen.contains("a\\u009b2J\\u007f\\u202e\\n\u{e4}"), "{seen}");
            assert_eq!(seen.lines().count(), lines);
            assert_eq!(serde_json::from_str::<Value>(&seen).unwrap(), value);
        }
        assert_eq!(seen("{\"user\":\"ann\"}"), "{\"user\":\"ann\"}");
    }
}
