//! `weir inject`: manifests in, the same with weir in their pods out.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::{print, tell};
use crate::inject::{Mode, PullPolicy, Settings, manifest};

#[derive(clap::Args)]
pub struct Arguments {
    /// The manifest; - or nothing: standard input.
    #[arg(value_name = "FILE", default_value = "-")]
    file: PathBuf,
    /// How to write it.
    #[arg(short, long, value_enum, default_value_t = Output::Yaml)]
    output: Output,
    /// Take weir out again.
    #[arg(long)]
    uninject: bool,
    #[command(flatten)]
    sidecar: Sidecar,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Output {
    Yaml,
    Json,
}

/// What pods get, unless their annotations or their namespace's say otherwise.
#[derive(Debug, Clone, clap::Args)]
pub struct Sidecar {
    /// weir's image.
    #[arg(long, default_value_t = Settings::default().image)]
    image: String,
    /// The image with nft beside weir, for the first step of redirect mode.
    #[arg(long, value_name = "IMAGE", default_value_t = Settings::default().redirect_image)]
    redirect_image: String,
    /// When the kubelet pulls it.
    #[arg(long, value_enum, default_value_t = PullPolicy::IfNotPresent)]
    image_pull_policy: PullPolicy,
    /// Whether weir is an init container that stays, as Kubernetes has from 1.29, or a container beside the app's.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    native_sidecar: bool,
    /// Whether weir takes over the name of the app's port, or has the kernel redirect what comes in.
    #[arg(long, value_enum, default_value_t = Mode::Port)]
    mode: Mode,
    /// The ConfigMap with weir.yaml; unless told, each pod gets a file of its own in an annotation.
    #[arg(long, value_name = "NAME")]
    config_map: Option<String>,
    /// The CPU that weir's container requests.
    #[arg(long, value_name = "QUANTITY", default_value_t = Settings::default().cpu_request)]
    cpu_request: String,
    /// The memory that weir's container requests.
    #[arg(long, value_name = "QUANTITY", default_value_t = Settings::default().memory_request)]
    memory_request: String,
    /// The most CPU that it may use; none unless told.
    #[arg(long, value_name = "QUANTITY")]
    cpu_limit: Option<String>,
    /// The most memory that it may use; "" for none.
    #[arg(long, value_name = "QUANTITY", default_value = "256Mi")]
    memory_limit: String,
    /// Where weir takes requests.
    #[arg(long, default_value_t = Settings::default().port, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// weir's admin port, on the loopback.
    #[arg(long, value_name = "PORT", default_value_t = Settings::default().admin_port, value_parser = clap::value_parser!(u16).range(1..))]
    admin_port: u16,
    /// Where weir serves /metrics.
    #[arg(long, value_name = "PORT", default_value_t = Settings::default().metrics_port, value_parser = clap::value_parser!(u16).range(1..))]
    metrics_port: u16,
    /// The user that weir runs as.
    #[arg(long, default_value_t = Settings::default().uid, value_parser = clap::value_parser!(u32).range(1..))]
    uid: u32,
}

impl From<Sidecar> for Settings {
    fn from(given: Sidecar) -> Settings {
        Settings {
            image: given.image,
            redirect_image: given.redirect_image,
            pull_policy: given.image_pull_policy,
            native_sidecar: given.native_sidecar,
            mode: given.mode,
            config_map: given.config_map,
            cpu_request: given.cpu_request,
            memory_request: given.memory_request,
            cpu_limit: given.cpu_limit,
            memory_limit: (!given.memory_limit.is_empty()).then_some(given.memory_limit),
            port: given.port,
            admin_port: given.admin_port,
            metrics_port: given.metrics_port,
            uid: given.uid,
            ..Settings::default()
        }
    }
}

/// Prints the manifest, and on standard error what became of each workload. An error prints nothing of it.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let text = read(&arguments.file)?;
    let done = match arguments.uninject {
        true => manifest::uninject(&text),
        false => manifest::inject(&text, &arguments.sidecar.into()),
    };
    let manifest = done?;
    let (made, lost) = match arguments.output {
        Output::Yaml => manifest.yaml(),
        Output::Json => (manifest.json(), Vec::new()),
    };
    for line in manifest.report.iter().chain(&lost) {
        tell(line);
    }
    if manifest.report.is_empty() {
        tell("nothing is changed: there is no workload in it");
    }
    print(&made)
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file != Path::new("-") {
        return std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()));
    }
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("cannot read standard input")?;
    Ok(text)
}
