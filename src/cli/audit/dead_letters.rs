//! `weir audit dead-letters`: looks at what workers could not store, and has it tried anew or dropped.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use uuid::Uuid;

use super::Configured;
use super::format::printable;
use crate::clock;
use crate::config::audit::MOST_SHARDS;
use crate::store::audit::batch;
use crate::store::fleet::Fleet;
use crate::store::streams::consume::Streams;
use crate::store::streams::dead::DeadLetter;
use crate::telemetry::metrics::Metrics;

pub(super) const EXAMPLES: &str = "\
Example: weir audit dead-letters list -c weir.yaml
Example: weir audit dead-letters replay -c weir.yaml 3/1732541000000-0
Example: weir audit dead-letters drop -c weir.yaml --all
Exit codes: 0 done, 1 failed or one of the IDs is not there, 2 a bad command line.";

/// Read at once; each may be some 100 KB.
const PAGE: usize = 100;

#[derive(Subcommand, Default)]
pub(super) enum Command {
    /// Show each with its ID, why it was given up, and which events it holds.
    #[command(after_help = "Example: weir audit dead-letters list -c weir.yaml")]
    #[default]
    List,
    /// Have workers try them anew, once what was wrong is mended.
    #[command(
        after_help = "Example: weir audit dead-letters replay -c weir.yaml 3/1732541000000-0"
    )]
    Replay(Which),
    /// Remove them for good: their events are lost, and `weir audit verify` will report them missing.
    #[command(after_help = "Example: weir audit dead-letters drop -c weir.yaml --all")]
    Drop(Which),
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(super) struct Which {
    /// As `list` shows them.
    #[arg(value_name = "ID", value_parser = Id::parse)]
    ids: Vec<Id>,
    /// All there are.
    #[arg(long)]
    all: bool,
}

/// `SHARD/ID`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Id {
    shard: u16,
    id: String,
}

pub(super) async fn run(
    command: Command,
    configured: Configured<'_>,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let streams = connect(configured).await?;
    match command {
        Command::List => {
            list(&streams, out).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Replay(which) => {
            let done = each(&streams, which, async |id: &Id| {
                streams.replay(id.shard, &id.id).await
            });
            let (done, absent) = done.await?;
            told("replayed", done, &absent, out)
        }
        Command::Drop(which) => {
            let done = each(&streams, which, async |id: &Id| {
                streams.drop_dead_letter(id.shard, &id.id).await
            });
            let (done, absent) = done.await?;
            told("dropped", done, &absent, out)
        }
    }
}

async fn connect(configured: Configured<'_>) -> anyhow::Result<Streams> {
    let (file, config) = configured.context("say which configuration: -c weir.yaml")?;
    let (redis, audit) = match (&config.redis, &config.audit) {
        (Some(redis), Some(audit)) => (redis, audit),
        (redis, _) => bail!(
            "{} has no {}, and dead letters are of an audit that goes through Redis into Postgres; give the file of the workers",
            file.display(),
            if redis.is_none() { "redis" } else { "audit" }
        ),
    };
    let fleet = Fleet::new(redis, &Metrics::default())?;
    tokio::spawn(fleet.main.clone().keep_topology());
    let connections = fleet.connect().main;
    let within = redis.connect_timeout;
    let servers = redis.main.endpoints.iter().map(ToString::to_string);
    let servers: Vec<_> = servers.collect();
    ensure!(
        connections.ready(within).await,
        "redis ({}) did not answer within {within:?}: is it running, and are its address and password right (redis.urls, redis.password)?",
        servers.join(", ")
    );
    let group = &config.worker.group;
    Ok(Streams::new(connections, &fleet.keys, &audit.stream, group))
}

/// Of all streams that there can be: other weirs may have more than this file.
async fn list(streams: &Streams, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["ID", "AGE", "INSTANCE", "BOOT", "EVENTS", "REASON"]);
    let now = clock::wall();
    for shard in 0..MOST_SHARDS {
        let mut after = None;
        loop {
            let page = streams
                .dead_letters(shard, after.as_deref(), None, PAGE)
                .await?;
            let Some(last) = page.last() else {
                break;
            };
            after = Some(last.id.clone());
            for letter in &page {
                table.add_row(row(letter, now).map(|cell| printable(&cell)));
            }
        }
    }
    if table.row_count() > 0 {
        writeln!(out, "{}", table.trim_fmt())?;
    }
    Ok(())
}

fn row(letter: &DeadLetter, now: Duration) -> [String; 6] {
    let age = now.saturating_sub(letter.at.into());
    let unknown = || "?".to_owned();
    let (instance, boot, events) = match batch::peek(&letter.bytes) {
        Ok(header) => (
            header.instance.clone(),
            Uuid::from_bytes(header.boot).to_string(),
            match header.is_end {
                true => "end".to_owned(),
                false => format!("{}-{}", header.first, header.last()),
            },
        ),
        Err(_) => (unknown(), unknown(), unknown()),
    };
    let id = format!("{}/{}", letter.shard, letter.id);
    let age = format!("{}s", age.as_secs());
    [id, age, instance, boot, events, letter.reason.clone()]
}

/// Does it to each of those named, or to all that are there now; how many there were, and which of those named were not.
async fn each<E>(
    streams: &Streams,
    which: Which,
    act: impl AsyncFn(&Id) -> Result<bool, E>,
) -> anyhow::Result<(u64, Vec<Id>)>
where
    anyhow::Error: From<E>,
{
    let mut done = 0;
    let mut absent = Vec::new();
    for id in which.ids.into_iter().collect::<BTreeSet<_>>() {
        let is_there = id.shard < MOST_SHARDS && act(&id).await?;
        match is_there {
            true => done += 1,
            false => absent.push(id),
        }
    }
    // One that is given up again meanwhile comes behind the newest of its stream, and is not done to again.
    let mut newest = Vec::new();
    for shard in (0..MOST_SHARDS).filter(|_| which.all) {
        let id = streams.newest_dead_letter(shard).await?;
        newest.extend(id.map(|id| (shard, id)));
    }
    for (shard, newest) in newest {
        let mut after = None;
        loop {
            let page = streams
                .dead_letters(shard, after.as_deref(), Some(&newest), PAGE)
                .await?;
            let Some(last) = page.last() else {
                break;
            };
            after = Some(last.id.clone());
            for letter in page {
                let id = Id {
                    shard,
                    id: letter.id,
                };
                // Another hand may have been first.
                done += u64::from(act(&id).await?);
            }
        }
    }
    Ok((done, absent))
}

fn told(what: &str, done: u64, absent: &[Id], out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    for Id { shard, id } in absent {
        writeln!(out, "{shard}/{id}: not there")?;
    }
    writeln!(out, "{what} {done}")?;
    Ok(match absent.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

impl Id {
    fn parse(text: &str) -> Result<Id, String> {
        let number = |text: &str| text.parse::<u64>().is_ok();
        text.split_once('/')
            .and_then(|(shard, id)| {
                let (millis, place) = id.split_once('-')?;
                let shard = shard.parse().ok()?;
                let id = id.to_owned();
                (number(millis) && number(place)).then_some(Id { shard, id })
            })
            .ok_or_else(|| {
                format!("\"{text}\" is no ID: use one that `list` shows, as 3/1732541000000-0")
            })
    }
}
