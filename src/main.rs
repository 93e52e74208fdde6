//! From the command line to a command; exit codes: 0 done, 1 failed, 2 a bad command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use weir::{cli, config, telemetry};

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 a bad command line.
Begin with: weir check -c weir.yaml && weir run -c weir.yaml";

const RUN: &str = "\
Example: weir run -c /etc/weir/weir.yaml
Signals: SIGHUP reads the file again, as does a change of it; SIGTERM and SIGINT drain.
Environment: WEIR_LOG=debug goes before telemetry.log.level.";

const ECHO: &str = "\
Example: weir echo --address 127.0.0.1:3000
Paths: /status/503 answers with that status, /delay/2s after that time,
/login?user=ann&role=customer and /logout with the headers that start and end a session.";

const SESSION: &str = "\
Example: weir session create ann --claim role=customer
Example: weir session revoke --user ann
Environment: WEIR_ADMIN_TOKEN goes for --token.";

const AUDIT: &str = "\
Example: weir audit query -c weir.yaml --since 1h --status 4xx
Example: weir audit export --format csv > events.csv
Example: weir audit verify -c weir.yaml";

/// A reverse proxy that puts rate limits, circuit breakers, sessions and audit in front of any app.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Proxy as the file says, until SIGTERM.
    #[command(after_help = RUN)]
    Run(File),
    /// Say every mistake in a file with its line and column; exit 1 if there is one.
    #[command(
        after_help = "Example: weir check -c weir.yaml\nExample: weir check -c weir.yaml --print > long.yaml"
    )]
    Check {
        #[command(flatten)]
        file: File,
        /// Print the file in its long form, with every default; secrets are masked.
        #[arg(long)]
        print: bool,
    },
    /// Print the JSON Schema of the file, for editors.
    #[command(after_help = "Example: weir schema > weir.schema.json")]
    Schema,
    /// Ask a running weir how it is; exit 1 unless it is well.
    #[command(after_help = "Example: weir healthcheck --address 127.0.0.1:9901")]
    Healthcheck {
        /// The admin port.
        #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9901")]
        address: SocketAddr,
    },
    /// Start, list, show and end sessions of a running weir.
    #[command(after_help = SESSION)]
    Session(cli::session::Arguments),
    /// Answer every request with what it was: an upstream for demos and tests.
    #[command(after_help = ECHO)]
    Echo {
        /// Where to listen; port 0 for any that is free.
        #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:3000")]
        address: SocketAddr,
    },
    /// Read the audit database.
    #[command(after_help = AUDIT)]
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
        Command::Session(arguments) => cli::session::run(arguments),
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
    cli::print(&format!("{schema}\n"))
}
