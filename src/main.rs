//! From the command line to a command; exit codes: 0 done, 1 failed, 2 a bad command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use weir::cli::run::{Role, TakesOver};
use weir::config::units::TimeLength;
use weir::{cli, config, telemetry};

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 a bad command line.
Begin with: weir check -c weir.yaml && weir run -c weir.yaml";

const RUN: &str = "\
Example: weir run -c /etc/weir/weir.yaml
Signals: SIGHUP reads the file again, as does a change of it; SIGTERM, SIGQUIT and SIGINT drain; SIGUSR1 and SIGUSR2 do nothing.
With --take-over a new process replaces the one that runs, and no connection is refused.
Environment: WEIR_LOG=debug goes before telemetry.log.level; NOTIFY_SOCKET is told when weir serves and ends (systemd's Type=notify).";

const PROXY: &str = "\
Example: weir proxy -c /etc/weir/weir.yaml
Signals: as of weir run.";

const WORKER: &str = "\
Example: weir worker -c /etc/weir/weir.yaml --wait-for-deps --migrate
Signals: SIGTERM, SIGQUIT and SIGINT end it once the transaction under way is done.
With --wait-for-deps it says once what it waits for, and exits 1 if that is not there in time; without, it begins and joins them later.
Several workers of one file share the work.";

const HEALTHCHECK: &str = "\
Example: weir healthcheck -c /etc/weir/weir.yaml --ready
Asks /health, or /ready or /live, and is done within 5 s. Exits 0 where the answer is 200: of /health, what is degraded too.";

const DRAIN: &str = "\
Example: weir drain -c /etc/weir/weir.yaml
For the preStop hook of a native sidecar in Kubernetes: a weir that is to be ended later begins to tell its clients, and is unready.
With -c address and token are those of the file. Environment: WEIR_ADMIN_TOKEN goes for --token.";

const AWAIT: &str = "\
Example: weir await -c /etc/weir/weir.yaml --timeout 30s
Asks /ready each 100 ms: for scripts, and for a postStart hook that holds the app back until weir is there.";

const ECHO: &str = "\
Example: weir echo --address 127.0.0.1:3000
Paths: /status/503 answers with that status, /delay/2s after that time,
/login?user=ann&role=customer and /logout with the headers that start and end a session.";

const SESSION: &str = "\
Example: weir session create ann --claim role=customer
Example: weir session list -c /etc/weir/weir.yaml
Example: weir session revoke --user ann
With -c address and token are those of the file. Environment: WEIR_ADMIN_TOKEN goes for --token.";

const AUDIT: &str = "\
Example: weir audit query -c weir.yaml --since 1h --status 4xx
Example: weir audit export --format csv > events.csv
Example: weir audit verify -c weir.yaml";

const INJECT: &str = "\
Example: weir inject deployment.yaml | kubectl apply -f -
Example: helm template shop charts/shop | weir inject --image registry.example/weir:0.1.0 -
Example: weir inject --uninject deployment.yaml
Annotations of the pod, and of its namespace, go before the options; see docs/inject.md.
What became of each workload is said on standard error.";

const WEBHOOK: &str = "\
Example: weir webhook --tls-cert /tls/tls.crt --tls-key /tls/tls.key --own-namespace weir
The chart installs it (injector.enabled); see docs/kubernetes.md. Annotations of a pod go before the options, as with weir inject.";

const REDIRECT: &str = "\
Example: weir redirect --apply --to 9900 --uid 65532 --skip-inbound-ports 9902,9000-9010
Example: weir redirect --remove
Needs nft, root and the capability NET_ADMIN, but for --print; see docs/ways-in.md.
Then: nft list table inet weir";

/// A reverse proxy that puts rate limits, circuit breakers, sessions and audit in front of any app.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Proxy as the file says, until SIGTERM; with redis and postgres in the file, do a worker's work too.
    #[command(after_help = RUN)]
    Run(Serve),
    /// Proxy alone, as the file says, until SIGTERM: a worker elsewhere does the rest.
    #[command(after_help = PROXY)]
    Proxy(Serve),
    /// Bring the audit of all proxies from redis into postgres, and keep it and sessions tidy, until SIGTERM.
    #[command(after_help = WORKER)]
    Worker {
        #[command(flatten)]
        file: File,
        /// Bring the schema up to date first, whatever postgres.migrate says.
        #[arg(long)]
        migrate: bool,
        /// Begin once redis and postgres can be used; 2m unless told.
        #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "2m")]
        wait_for_deps: Option<TimeLength>,
    },
    /// Bring the schema of postgres up to date.
    #[command(after_help = "Example: weir migrate -c weir.yaml")]
    Migrate(File),
    /// Say every mistake in a file with its line and column, and exit 1 if there is one; warn of what is probably not meant.
    #[command(
        after_help = "Example: weir check -c weir.yaml\nExample: weir check -c weir.yaml --print > long.yaml\nSecrets are printed as ***, which weir refuses: put the real ones back in long.yaml, or ${VARIABLES}."
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
    /// Ask a running weir how it is; exit 1 where a check is critical, or it does not answer.
    #[command(after_help = HEALTHCHECK)]
    Healthcheck(cli::healthcheck::Arguments),
    /// Wait until a running weir is ready; exit 1 if that takes too long.
    #[command(after_help = AWAIT)]
    Await(cli::r#await::Arguments),
    /// Have a running weir tell its clients to leave, while it serves on; SIGTERM ends it, as ever.
    #[command(after_help = DRAIN)]
    Drain(cli::drain::Arguments),
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
    /// Put weir into the pods of a Kubernetes manifest, or take it out.
    #[command(after_help = INJECT)]
    Inject(Box<cli::inject::Arguments>),
    /// Put weir into the pods that a Kubernetes cluster makes, as its API server asks, until SIGTERM.
    #[command(after_help = WEBHOOK)]
    Webhook(Box<cli::webhook::Arguments>),
    /// Have the kernel redirect incoming connections to weir, or stop it: the first step of redirect mode in Kubernetes.
    #[command(after_help = REDIRECT)]
    Redirect(cli::redirect::Arguments),
    /// Read the audit, and deal with what workers could not store.
    #[command(after_help = AUDIT)]
    Audit(cli::audit::Arguments),
}

#[derive(clap::Args)]
struct File {
    /// The configuration file.
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(clap::Args)]
struct Serve {
    #[command(flatten)]
    file: File,
    /// Take over the ports of the weir that runs at the same admin.address, which then drains; and let the next one do so. Both must be
    /// started with this; where none runs, it changes nothing.
    #[arg(long)]
    take_over: bool,
}

impl Serve {
    fn run(self, role: Role) -> anyhow::Result<()> {
        let takes_over = match self.take_over {
            true => TakesOver::Yes,
            false => TakesOver::No,
        };
        cli::run::run(self.file.config, role, takes_over)
    }
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    let last = telemetry::log::Flush;
    let serves = matches!(
        command,
        Command::Run(_) | Command::Proxy(_) | Command::Worker { .. }
    );
    // Those that serve log as their file says, once they have read it.
    if !serves {
        telemetry::log::init(config::telemetry::Log::default());
    }
    let done = match command {
        Command::Audit(arguments) => match cli::audit::run(arguments) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Run(serve) => serve.run(Role::All),
        Command::Proxy(serve) => serve.run(Role::Proxy),
        Command::Worker {
            file,
            migrate,
            wait_for_deps,
        } => cli::worker::run(
            file.config,
            migrate,
            wait_for_deps.map(|TimeLength(within)| within),
        ),
        Command::Migrate(file) => cli::migrate::run(&file.config),
        Command::Check { file, print } => cli::check::run(&file.config, print),
        Command::Schema => print_schema(),
        Command::Session(arguments) => cli::session::run(arguments),
        Command::Inject(arguments) => cli::inject::run(*arguments),
        Command::Webhook(arguments) => cli::webhook::run(*arguments),
        Command::Redirect(arguments) => cli::redirect::run(arguments),
        Command::Echo { address } => cli::echo::run(address),
        Command::Await(arguments) => cli::r#await::run(arguments),
        Command::Drain(arguments) => cli::drain::run(arguments),
        Command::Healthcheck(arguments) => cli::healthcheck::run(arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let said = format!("error: {error:#}");
            match serves {
                true => telemetry::log::say(&said),
                // Whoever has called waits for all of it, and is waited for.
                false => {
                    drop(last);
                    cli::tell(&said);
                }
            }
            ExitCode::FAILURE
        }
    }
}

fn print_schema() -> anyhow::Result<()> {
    let schema = serde_json::to_string_pretty(&config::schema())?;
    cli::print(&format!("{schema}\n"))
}
