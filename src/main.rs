//! From the command line to a command; exit codes: 0 done, 1 failed, 2 a bad command line.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, anyhow, bail};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::info;
use weir::config::{self, Config, check};
use weir::proxy::plan::Plan;
use weir::proxy::{lane, reload};
use weir::telemetry;

/// A reverse proxy in front of one upstream.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Proxy as the file says.
    Run(File),
    /// Say every mistake in a file with its line and column; exit 1 if there is one.
    Check(File),
    /// Print the JSON Schema of the file, for editors.
    Schema,
}

#[derive(clap::Args)]
struct File {
    /// The configuration file.
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    telemetry::log::init();
    let done = match Arguments::parse().command {
        Command::Run(file) => load(&file.config).and_then(|config| run(config, file.config)),
        Command::Check(file) => load(&file.config).map(drop),
        Command::Schema => print_schema(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(path: &Path) -> anyhow::Result<Config> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    check::parse(&text, &|name| std::env::var(name).ok()).map_err(|mistakes| {
        let many = if mistakes.len() == 1 {
            "mistake"
        } else {
            "mistakes"
        };
        let mut said = format!("{} {many} in {}", mistakes.len(), path.display());
        for mistake in &mistakes {
            let _ = write!(said, "\n  {mistake}");
        }
        anyhow!(said)
    })
}

fn print_schema() -> anyhow::Result<()> {
    let schema = serde_json::to_string_pretty(&config::schema())?;
    writeln!(std::io::stdout(), "{schema}").context("cannot write the schema")
}

fn run(config: Config, file: PathBuf) -> anyhow::Result<()> {
    let lanes = config
        .lanes
        .or(thread::available_parallelism().ok())
        .map_or(1, usize::from);
    let listeners = config.listeners.iter().map(|listener| listener.address);
    let mut addresses = listeners.collect::<Vec<_>>();
    let (plan, following) = watch::channel(Plan::new(config, Arc::default()));
    let (drain, draining) = watch::channel(false);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Listening to the signal begins before the line that says weir is up, so that none is missed.
    let terminate = runtime.block_on(async { signal(SignalKind::terminate()) })?;
    let mut threads = Vec::new();
    for _ in 0..lanes {
        let mut sockets = Vec::new();
        for address in &mut addresses {
            let socket =
                lane::listen(*address).with_context(|| format!("cannot listen on {address}"))?;
            // All lanes share the port that the first one was given, which matters when the file asks for port 0.
            *address = socket.local_addr()?;
            sockets.push(socket);
        }
        threads.push(lane::spawn(sockets, following.clone(), draining.clone())?);
    }
    let addresses = addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    info!(%addresses, lanes, "listening");
    runtime.block_on(async {
        tokio::select! {
            stopped = stopped(terminate) => stopped,
            broken = reload::follow(file, load, plan) => broken,
        }
    })?;
    info!("draining");
    drain.send_replace(true);
    for thread in threads {
        match thread.join() {
            Ok(ended) => ended?,
            Err(_) => bail!("a lane panicked"),
        }
    }
    Ok(())
}

/// Waits for SIGTERM or SIGINT.
async fn stopped(mut terminate: Signal) -> std::io::Result<()> {
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        interrupted = tokio::signal::ctrl_c() => interrupted,
    }
}
