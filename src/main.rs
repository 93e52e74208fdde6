//! From the command line to a command; exit codes: 0 done, 1 failed, 2 a bad command line.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use weir::config::file::{self, Config};
use weir::http1::head::HeadLimits;
use weir::proxy::lane::{self, Settings};

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
    Run {
        /// The configuration file.
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// Threads that serve requests [default: one a core].
        #[arg(long)]
        lanes: Option<NonZeroUsize>,
    },
    /// Say what is wrong with a file; exit 1 if anything is.
    Check {
        /// The configuration file.
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Run { config, lanes } => run(&load(&config)?, lanes),
        Command::Check { config } => load(&config).map(drop),
    }
}

fn load(path: &PathBuf) -> anyhow::Result<Config> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    file::parse(&text).with_context(|| path.display().to_string())
}

fn run(config: &Config, lanes: Option<NonZeroUsize>) -> anyhow::Result<()> {
    let lanes = lanes
        .or(std::thread::available_parallelism().ok())
        .map_or(1, NonZeroUsize::get);
    let settings = Settings {
        upstream: config.upstream,
        limits: HeadLimits::default(),
        header_read: Duration::from_secs(10),
        keep_alive: Duration::from_secs(60),
        connect_timeout: Duration::from_secs(1),
        timeout: Duration::from_secs(15),
        max_idle: 1024,
        drain: Duration::from_secs(25),
    };
    let (drain, draining) = watch::channel(false);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Listening to the signal begins before the line that says weir is up, so that none is missed.
    let terminate = runtime.block_on(async { signal(SignalKind::terminate()) })?;
    // All lanes share the port that the first one was given, which matters when the file asks for port 0.
    let first = lane::listen(config.listen)
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = first.local_addr()?;
    let mut threads = vec![lane::spawn(first, settings.clone(), draining.clone())?];
    for _ in 1..lanes {
        threads.push(lane::spawn(
            lane::listen(address)?,
            settings.clone(),
            draining.clone(),
        )?);
    }
    eprintln!(
        "weir listens on {address} with {lanes} lanes, upstream {}",
        config.upstream
    );
    runtime.block_on(stopped(terminate))?;
    drain.send_replace(true);
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a lane panicked"))??;
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
