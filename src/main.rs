//! From the command line to a command; exit codes: 0 done, 1 failed, 2 a bad command line.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use weir::{cli, config, telemetry};

/// A reverse proxy that puts rate limits and circuit breakers in front of any app.
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
    Check {
        #[command(flatten)]
        file: File,
        /// Print the file in its long form, with every default; secrets are masked.
        #[arg(long)]
        print: bool,
    },
    /// Print the JSON Schema of the file, for editors.
    Schema,
    /// Ask a running weir how it is; exit 1 unless it is well.
    Healthcheck {
        /// The admin port.
        #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9901")]
        address: SocketAddr,
    },
    /// Answer every request with what it was: an upstream for demos and tests.
    Echo {
        /// Where to listen; port 0 for any that is free.
        #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:3000")]
        address: SocketAddr,
    },
    /// Read the audit database.
    Audit(cli::audit::Arguments),
}

#[derive(clap::Args)]
struct File {
    /// The configuration file.
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    // `weir run` logs as its file says, once it has read it.
    if !matches!(command, Command::Run(_)) {
        telemetry::log::init(config::Log::default());
    }
    let done = match command {
        Command::Audit(arguments) => match cli::audit::run(arguments) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Run(file) => cli::run::run(file.config),
        Command::Check { file, print } => cli::check::run(&file.config, print),
        Command::Schema => print_schema(),
        Command::Echo { address } => cli::echo::run(address),
        Command::Healthcheck { address } => cli::healthcheck::run(address),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_schema() -> anyhow::Result<()> {
    let schema = serde_json::to_string_pretty(&config::schema())?;
    writeln!(std::io::stdout(), "{schema}").context("cannot write the schema")
}
