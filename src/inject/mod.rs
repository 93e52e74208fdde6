//! weir into pods: a pod, or a workload's template of pods, in and the same with the sidecar out. `weir inject` and the webhook do the
//! same by it. Pure: no I/O, no clock.

mod annotations;
mod given;
pub mod manifest;
mod ports;
mod probes;
pub mod review;
mod room;
mod services;
mod sidecar;
mod text;
mod undo;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use annotations::{CONFIG_INLINE, INJECT, INJECTED, Source};
use sidecar::{CONTAINER, Made, REDIRECT, Shutdown};

/// Which container `kubectl` means where none is named.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// What the command's flags and the webhook's settings give; a pod's annotations go before them, and its namespace's in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub image: String,
    /// With nft in it: of the step that redirects.
    pub redirect_image: String,
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
            redirect_image: concat!("weir-redirect:", env!("CARGO_PKG_VERSION")).to_owned(),
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
    /// The app's, where it is known: always in port mode.
    pub app_port: Option<u16>,
    pub app_port_name: Option<String>,
    /// Where weir takes requests.
    pub port: u16,
    /// Whether no one has said that the app's port speaks HTTP, nor how it is asked.
    pub guessed: bool,
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

impl Unfit {
    fn new(at: impl Into<String>, problem: impl Into<String>) -> Unfit {
        Unfit {
            at: at.into(),
            problem: problem.into(),
        }
    }
}

/// Puts weir into `pod`, a Pod or a template of pods (`{"metadata": …, "spec": …}`). Unless that is `Injected`, nothing is changed. What is
/// injected already is left as it is.
pub fn inject_pod(
    pod: &mut Value,
    namespace: &Namespace,
    settings: &Settings,
) -> Result<Outcome, Unfit> {
    let workload = sidecar::workload(pod);
    inject_pod_of(workload.as_deref(), pod, namespace, settings)
}

/// The same for a template of pods, which does not tell whose it is.
fn inject_pod_of(
    workload: Option<&str>,
    pod: &mut Value,
    namespace: &Namespace,
    settings: &Settings,
) -> Result<Outcome, Unfit> {
    Ok(match inject(workload, pod, namespace, settings)? {
        Changed::Injected(changed, injected) => {
            *pod = changed;
            Outcome::Injected(injected)
        }
        Changed::No(reason) => Outcome::Skipped(reason),
    })
}

/// What becomes of a pod.
enum Changed {
    /// The pod with weir in it.
    Injected(Value, Injected),
    No(Skipped),
}

/// `before` is copied once, and only where it is injected: it is as large as whoever sends it likes.
fn inject(
    workload: Option<&str>,
    before: &Value,
    namespace: &Namespace,
    settings: &Settings,
) -> Result<Changed, Unfit> {
    if !before["spec"]["containers"].is_array() {
        return Err(Unfit::new("spec.containers", "missing: this is no pod"));
    }
    refuse_malformed(before)?;
    if let Some(reason) = skipped(before, namespace)? {
        return Ok(Changed::No(reason));
    }
    let asked = annotations::read(before, namespace, settings)?;
    ports::refuse_taken(before, &asked, settings)?;
    refuse_names(before)?;
    let ends = matches!(
        before["spec"]["restartPolicy"].as_str(),
        Some("Never" | "OnFailure")
    );
    if ends && !asked.native_sidecar {
        return Err(Unfit::new(
            "spec.restartPolicy",
            "a container beside the app's would keep this pod from ever ending: use native sidecars (Kubernetes 1.29 and later), or leave it out by weir.dev/inject: disabled",
        ));
    }
    let app = ports::find(before, &asked)?;
    if app.is_none() && asked.mode == Mode::Port {
        return Ok(Changed::No(Skipped::NoPort));
    }
    if let Some(app) = &app {
        ports::refuse_others(before, &asked, app)?;
    }
    let http2 = app.as_ref().is_some_and(|app| app.is_http2(before));
    let mut changed = before.clone();
    let pod = &mut changed;
    let mut probes = Map::new();
    match asked.mode {
        Mode::Port => {
            if let Some(app) = &app {
                ports::take_over(pod, app, settings.port);
            }
        }
        Mode::Redirect => {
            probes = probes::rewrite(pod, settings.metrics_port, &asked.skip_inbound_ports)?;
        }
    }
    let made = Made {
        asked: &asked,
        settings,
        workload,
        app_port: app.as_ref().map(|app| app.number),
        http2,
        probes,
        shutdown: Shutdown::within(pod, asked.native_sidecar, settings),
        token: pod["spec"]["automountServiceAccountToken"] != json!(false),
    };
    if asked.config == Source::Annotation {
        let text = pod["metadata"]["annotations"][CONFIG_INLINE].as_str();
        let environment = sidecar::variables(&made);
        let told = |name: &str| {
            let (known, stand_in) = sidecar::NAMESPACE;
            if name == known {
                return Some(stand_in.to_owned());
            }
            let (_, value) = environment.iter().find(|(known, _)| *known == name)?;
            Some(value.clone())
        };
        given::refuse_wrong(text.unwrap_or_default(), &told, (asked.mode, settings))?;
    }
    add(pod, &made);
    room::refuse_full(pod)?;
    undo::note(pod, before, asked.mode);
    let injected = Injected {
        mode: asked.mode,
        app_port: made.app_port,
        app_port_name: app.and_then(|app| app.declared?.name),
        port: settings.port,
        guessed: ports::is_guessed(&asked),
        warnings: asked.warnings,
    };
    Ok(Changed::Injected(changed, injected))
}

/// Takes weir out of a pod that [`inject_pod`] has put it into; false where there is none.
pub fn uninject_pod(pod: &mut Value) -> Result<bool, Unfit> {
    refuse_malformed(pod)?;
    undo::undo(pod)
}

fn skipped(pod: &Value, namespace: &Namespace) -> Result<Option<Skipped>, Unfit> {
    let spec = &pod["spec"];
    let has_weir = ["containers", "initContainers"].iter().any(|list| {
        let containers = spec[list].as_array().into_iter().flatten();
        containers
            .map(|container| &container["name"])
            .any(|name| name == CONTAINER || name == REDIRECT)
    });
    if has_weir || pod["metadata"]["annotations"][INJECTED].is_string() {
        return Ok(Some(Skipped::AlreadyInjected));
    }
    if let Some(disabled) = annotations::disabled(pod, namespace)? {
        return Ok(Some(disabled));
    }
    let windows = [
        &spec["os"]["name"],
        &spec["nodeSelector"]["kubernetes.io/os"],
    ];
    Ok(if spec["hostNetwork"] == json!(true) {
        Some(Skipped::HostNetwork)
    } else if windows.iter().any(|os| *os == "windows") {
        Some(Skipped::Windows)
    } else {
        None
    })
}

/// What Kubernetes would refuse, and weir could not add to.
fn refuse_malformed(pod: &Value) -> Result<(), Unfit> {
    for at in ["metadata", "metadata.labels", "metadata.annotations"] {
        refuse_unless(pod, at, "map", Value::is_object)?;
    }
    for at in ["spec.volumes", "spec.initContainers"] {
        refuse_unless(pod, at, "list", Value::is_array)?;
    }
    Ok(())
}

fn refuse_unless(
    of: &Value,
    at: &str,
    kind: &str,
    is_it: impl Fn(&Value) -> bool,
) -> Result<(), Unfit> {
    let value = at.split('.').fold(of, |value, key| &value[key]);
    match value.is_null() || is_it(value) {
        true => Ok(()),
        false => Err(Unfit::new(
            at,
            format!("no {kind}: write it as one, or leave it out"),
        )),
    }
}

fn refuse_names(pod: &Value) -> Result<(), Unfit> {
    let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    for volume in volumes {
        if let Some(name) = volume["name"].as_str()
            && sidecar::VOLUMES.contains(&name)
        {
            return Err(Unfit::new(
                "spec.volumes",
                format!("{name:?} is a name of weir's own: give the volume another one"),
            ));
        }
    }
    Ok(())
}

/// Adds weir's containers, volumes, label and annotations.
fn add(pod: &mut Value, made: &Made) {
    let spec = &mut pod["spec"];
    let mut first = Vec::new();
    if made.asked.mode == Mode::Redirect {
        first.push(sidecar::redirect(made));
    }
    if made.asked.native_sidecar {
        first.push(sidecar::container(made));
    } else {
        let app = spec["containers"][0]["name"].clone();
        insert(spec, "containers", 0, vec![sidecar::container(made)]);
        // Else `kubectl logs` and `exec` would go to weir.
        let annotations = &mut pod["metadata"]["annotations"];
        if annotations[DEFAULT_CONTAINER].is_null() {
            annotations[DEFAULT_CONTAINER] = app;
        }
    }
    let spec = &mut pod["spec"];
    insert(spec, "initContainers", 0, first);
    let last = spec["volumes"].as_array().map_or(0, Vec::len);
    insert(spec, "volumes", last, sidecar::volumes(made));
    let metadata = &mut pod["metadata"];
    // One that is there says yes, and may be in a selector.
    let label = &mut metadata["labels"][INJECT];
    if !label.is_string() {
        *label = json!(annotations::ENABLED);
    }
    if made.asked.config == Source::Made {
        metadata["annotations"][CONFIG_INLINE] = json!(sidecar::configuration(made));
    }
}

fn insert(spec: &mut Value, list: &str, at: usize, new: Vec<Value>) {
    if new.is_empty() {
        return;
    }
    match spec[list].as_array_mut() {
        Some(values) => drop(values.splice(at..at, new)),
        None => spec[list] = Value::Array(new),
    }
}

#[cfg(test)]
mod tests;
