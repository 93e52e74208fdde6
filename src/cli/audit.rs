//! `weir audit`: reads the audit, in Postgres or in SQLite's files, and deals with its dead letters. Must not write
//! to what is kept.

mod dead_letters;
mod format;
mod read;
mod verify;

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

use super::{control, load, of_postgres, with_mend};
use crate::config::Config;
use crate::config::audit::DATABASE;
use crate::store::audit::Filter;
use crate::store::audit::events::Events;
use crate::store::audit::words::{Statuses, When};
use crate::store::postgres::{self, PostgresError};
use format::Format;

/// Reads the audit database.
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// SQLite's database as the configuration names it, without a day, or the file of one day [default: what --config names, which
    /// is Postgres if it has `postgres`; else weir-audit.db]. Dead letters are in redis, whatever it says.
    #[arg(long, global = true, value_name = "FILE")]
    database: Option<PathBuf>,
    /// The configuration file, which names the database and the key.
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Show the newest events that pass the filter, the oldest of them first.
    #[command(after_help = "Example: weir audit query -c weir.yaml --since 1h --status 4xx")]
    Query {
        #[command(flatten)]
        filter: FilterFlags,
        /// How many to show, at most.
        #[arg(short = 'n', long, default_value_t = 100)]
        limit: u32,
        /// How to write them.
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Show the newest events, then each that arrives, until interrupted.
    #[command(after_help = "Example: weir audit tail -c weir.yaml --user ann")]
    Tail {
        #[command(flatten)]
        filter: FilterFlags,
        /// How many to begin with.
        #[arg(short = 'n', long, default_value_t = 10)]
        lines: u32,
        /// How to write them.
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Prove that no event is missing, changed or out of place; exit 1 if one is.
    #[command(
        after_help = "Example: weir audit verify -c weir.yaml --key-file audit.key --key-file audit-2025.key"
    )]
    Verify {
        /// A file with a key that events were written with; once for each key that there was [default: the configuration's].
        #[arg(long, value_name = "FILE")]
        key_file: Vec<PathBuf>,
    },
    /// Write every event that passes the filter, with every field.
    #[command(
        after_help = "Example: weir audit export -c weir.yaml --since 24h --format csv > events.csv"
    )]
    Export {
        #[command(flatten)]
        filter: FilterFlags,
        /// How to write them.
        #[arg(long, value_enum, default_value_t = Format::Jsonl)]
        format: Format,
    },
    /// List, replay or drop what workers could not store.
    #[command(after_help = dead_letters::EXAMPLES)]
    DeadLetters {
        #[command(subcommand)]
        command: Option<dead_letters::Command>,
    },
}

#[derive(Args)]
struct FilterFlags {
    /// Not before: an RFC 3339 time, or how long ago, such as 1h or 30m.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    since: Option<When>,
    /// Before: an RFC 3339 time, or how long ago.
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
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
    /// Why weir refused, such as quota_exceeded.
    #[arg(long)]
    label: Option<String>,
    /// The method, in capital letters, such as POST.
    #[arg(long)]
    method: Option<String>,
    /// What the path begins with.
    #[arg(long, value_name = "PREFIX")]
    path: Option<String>,
}

/// The configuration, and the file that it is of.
type Configured<'a> = Option<(&'a Path, &'a Config)>;

/// Does the command. Fails where the database cannot be read; a reader of our output that leaves is not a failure.
pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match control::run(command(arguments)) {
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        Err(error) if matches!(of_postgres(&error), Some(PostgresError::Lost(_))) => {
            Err(with_mend(error).context(
                "cannot read the audit in Postgres: is it running, and are postgres.write and postgres.read its addresses?",
            ))
        }
        done => done.map_err(with_mend),
    }
}

/// Standard output, whose errors say that they are its.
struct Out(io::StdoutLock<'static>);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(of_output)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(of_output)
    }
}

fn of_output(error: io::Error) -> io::Error {
    let said = format!("cannot write to standard output: {error}");
    io::Error::new(error.kind(), said)
}

async fn command(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments {
        command,
        database,
        config: file,
    } = arguments;
    let config = file.as_deref().map(load).transpose()?;
    let configured = file.as_deref().zip(config.as_ref());
    let mut out = Out(io::stdout().lock());
    match command {
        Command::Query {
            filter,
            limit,
            format,
        } => {
            let events = open(database, configured).await?;
            read::query(&events, &filter, limit, format, &mut out).await
        }
        Command::Tail {
            filter,
            lines,
            format,
        } => {
            let events = open(database, configured).await?;
            read::tail(&events, &filter, lines, format, &mut out).await
        }
        Command::Verify { key_file } => {
            let events = open(database, configured).await?;
            let key = config.and_then(|config| config.audit?.key);
            verify::run(&events, key_file, key, &mut out).await
        }
        Command::Export { filter, format } => {
            let events = open(database, configured).await?;
            read::export(&events, &filter, format, &mut out).await
        }
        Command::DeadLetters { command } => {
            dead_letters::run(command.unwrap_or_default(), configured, &mut out).await
        }
    }
}

/// Postgres where the configuration has it and no file is named; else SQLite.
async fn open(database: Option<PathBuf>, configured: Configured<'_>) -> anyhow::Result<Events> {
    let path = match (database, configured) {
        (Some(path), _) => path,
        (None, None) => PathBuf::from(DATABASE),
        (None, Some((file, config))) => match (&config.postgres, &config.audit) {
            (Some(postgres), _) => {
                let reader = postgres::Reader::open(postgres)
                    .context("cannot open the audit in Postgres")?;
                return Ok(Events::Postgres(reader));
            }
            (None, Some(audit)) => audit.sqlite.clone(),
            (None, None) => bail!(
                "{} has no \"audit\", so that weir keeps none by it; add `audit: {{}}`, or name files of SQLite by --database FILE",
                file.display()
            ),
        },
    };
    let opened = Events::sqlite(&path).await;
    opened.with_context(|| format!("cannot open {}", path.display()))
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
