//! The containers and volumes that a pod gets, and the configuration that is made for it.

use serde_json::{Map, Value, json};

use super::annotations::{Asked, CONFIG_INLINE, Source};
use super::{Mode, Settings};

/// weir's own names in a pod.
pub(super) const CONTAINER: &str = "weir";
pub(super) const REDIRECT: &str = "weir-redirect";
const CONFIG_VOLUME: &str = "weir-config";
const DATA_VOLUME: &str = "weir-data";
const NO_TOKEN_VOLUME: &str = "weir-no-token";
pub(super) const VOLUMES: [&str; 3] = [CONFIG_VOLUME, DATA_VOLUME, NO_TOKEN_VOLUME];

/// The name of the container port with `/metrics`, by which the chart's PodMonitor finds it.
const METRICS_PORT_NAME: &str = "weir-metrics";
const CONFIG_FILE: &str = "/etc/weir/config/weir.yaml";
/// Where the kubelet mounts a token for the API, unless something else is mounted there.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// How long a pod may take to end, unless it says: Kubernetes' own.
const GRACE_SECONDS: u64 = 30;

/// What of a pod weir's containers are made of.
pub(super) struct Made<'a> {
    pub(super) asked: &'a Asked,
    pub(super) settings: &'a Settings,
    /// Its name, where it is known.
    pub(super) workload: Option<&'a str>,
    /// The app's, where it is known.
    pub(super) app_port: Option<u16>,
    pub(super) http2: bool,
    /// The app's probes by path, which weir asks.
    pub(super) probes: Map<String, Value>,
    pub(super) shutdown: Shutdown,
    /// Whether a token for the API would be mounted.
    pub(super) token: bool,
}

/// A pod's grace period, divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shutdown {
    propagation_delay: u64,
    drain: u64,
}

impl Shutdown {
    /// A native sidecar is told to end once the app has ended: no one waits for endpoints to forget it then. 10 s are for the last audit events, and
    /// to spare, as the chart has it; of a short period a third.
    pub(super) fn within(pod: &Value, native_sidecar: bool, settings: &Settings) -> Shutdown {
        // Kubernetes takes more than a duration of weir's holds.
        let grace = pod["spec"]["terminationGracePeriodSeconds"]
            .as_u64()
            .unwrap_or(GRACE_SECONDS)
            .min(u64::from(u32::MAX));
        let propagation_delay = match native_sidecar {
            true => 0,
            false => u64::from(settings.propagation_delay_seconds).min(grace / 3),
        };
        let spare = (grace / 3).min(10);
        Shutdown {
            propagation_delay,
            drain: (grace - spare - propagation_delay).max(1),
        }
    }
}

/// weir's environment: what a pod's own file may want to be told, and does not need to.
pub(super) fn variables(made: &Made) -> Vec<(&'static str, String)> {
    let settings = made.settings;
    let mut told = vec![
        ("WEIR_PORT", settings.port.to_string()),
        ("WEIR_ADMIN_PORT", settings.admin_port.to_string()),
        ("WEIR_METRICS_PORT", settings.metrics_port.to_string()),
    ];
    if let Some(port) = made.app_port {
        told.push(("WEIR_APP_PORT", port.to_string()));
    }
    let Shutdown {
        propagation_delay,
        drain,
    } = made.shutdown;
    told.push(("WEIR_PROPAGATION_DELAY", format!("{propagation_delay}s")));
    told.push(("WEIR_DRAIN", format!("{drain}s")));
    if !made.probes.is_empty() {
        let probes = Value::Object(made.probes.clone());
        told.push(("WEIR_APP_PROBES", probes.to_string()));
    }
    if let Some(workload) = made.workload {
        told.push(("WEIR_WORKLOAD", workload.to_owned()));
    }
    told
}

/// The name of what a pod is made by, which its pods have in common; of a pod that is made by nothing, its own.
pub(super) fn workload(pod: &Value) -> Option<String> {
    let metadata = &pod["metadata"];
    let owners = metadata["ownerReferences"].as_array();
    let owner = owners.and_then(|all| all.iter().find(|owner| owner["controller"] == json!(true)));
    let Some(owner) = owner else {
        let prefix = || Some(metadata["generateName"].as_str()?.trim_end_matches('-'));
        let name = metadata["name"].as_str().or_else(prefix);
        return name.filter(|name| !name.is_empty()).map(str::to_owned);
    };
    let name = owner["name"].as_str()?;
    // A Deployment's ReplicaSets end with the hash that their pods have as a label, Argo's likewise; a CronJob's Jobs with the minute.
    let labels = ["pod-template-hash", "rollouts-pod-template-hash"];
    let hashes = labels
        .iter()
        .filter_map(|label| metadata["labels"][label].as_str());
    let shared = name.rsplit_once('-').filter(|(_, last)| {
        let is_minute = || matches!(last.len(), 8..=10) && last.bytes().all(|b| b.is_ascii_digit());
        match owner["kind"].as_str() {
            Some("ReplicaSet") => hashes.clone().any(|hash| hash == *last),
            Some("Job") => is_minute(),
            Some(_) | None => false,
        }
    });
    Some(shared.map_or(name, |(shared, _)| shared).to_owned())
}

/// What stands for the namespace of a pod while its configuration is checked.
pub(super) const NAMESPACE: (&str, &str) = ("WEIR_NAMESPACE", "namespace");

/// The same as a container has it, where `$$` stands for `$`, and what only the cluster knows.
fn environment(made: &Made) -> Value {
    let told = variables(made);
    let told = told
        .iter()
        .map(|(name, value)| json!({"name": name, "value": value.replace('$', "$$")}));
    let address =
        json!({"name": "WEIR_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}});
    let asks = !made.probes.is_empty();
    let namespace = json!({"name": NAMESPACE.0, "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}});
    told.chain(asks.then_some(address))
        .chain([namespace])
        .collect()
}

/// The configuration of a pod that names none: everything goes to the app, and what whoever calls says of its clients, too, as it did without weir.
/// There is nothing here that goes by it: no limit, and no audit.
pub(super) fn configuration(made: &Made) -> String {
    let settings = made.settings;
    let transparent = match made.asked.mode {
        Mode::Port => "",
        Mode::Redirect => ", transparent: true",
    };
    let protocol = if made.http2 { ", protocol: http2" } else { "" };
    // Of a transparent listener none is ever asked for.
    let app_port = made.app_port.unwrap_or(9);
    let Shutdown {
        propagation_delay,
        drain,
    } = made.shutdown;
    format!(
        "version: 1\n\
         listeners: [{{name: inbound, address: \"[::]:{}\"{transparent}, client_ip: {{trusted_proxies: [\"0.0.0.0/0\", \"::/0\"]}}}}]\n\
         upstreams: {{app: {{endpoints: [\"http://127.0.0.1:{app_port}\"]{protocol}}}}}\n\
         admin: {{address: \"127.0.0.1:{}\"}}\n\
         metrics: {{address: \"[::]:{}\"}}\n\
         runtime: {{lanes: 1}}\n\
         shutdown: {{propagation_delay: {propagation_delay}s, drain: {drain}s}}\n",
        settings.port, settings.admin_port, settings.metrics_port
    )
}

pub(super) fn volumes(made: &Made) -> Vec<Value> {
    let annotation = format!("metadata.annotations['{CONFIG_INLINE}']");
    let config = match &made.asked.config {
        Source::ConfigMap(name) => json!({"name": CONFIG_VOLUME, "configMap": {"name": name}}),
        Source::Annotation | Source::Made => json!({"name": CONFIG_VOLUME, "downwardAPI": {
            "items": [{"path": "weir.yaml", "fieldRef": {"fieldPath": annotation}}],
        }}),
    };
    let mut volumes = vec![config];
    if writes(made) {
        volumes.push(json!({"name": DATA_VOLUME, "emptyDir": {}}));
    }
    if made.token {
        volumes.push(json!({"name": NO_TOKEN_VOLUME, "emptyDir": {}}));
    }
    volumes
}

/// Whether there may be an audit to keep or a spool.
fn writes(made: &Made) -> bool {
    match made.asked.config {
        Source::ConfigMap(_) | Source::Annotation => true,
        Source::Made => false,
    }
}

pub(super) fn container(made: &Made) -> Value {
    let Made {
        asked, settings, ..
    } = made;
    let mut mounts =
        vec![json!({"name": CONFIG_VOLUME, "mountPath": "/etc/weir/config", "readOnly": true})];
    if writes(made) {
        mounts.push(json!({"name": DATA_VOLUME, "mountPath": "/var/lib/weir"}));
    }
    mounts.extend(no_token(made));
    // Not by the file: a weir that runs is well, though the file may have a mistake by now.
    let admin = format!("127.0.0.1:{}", settings.admin_port);
    let probe = |path: &str, period: u32, failures: u32| {
        json!({
            "exec": {"command": ["weir", "healthcheck", "--address", admin, format!("--{path}")]},
            "periodSeconds": period,
            "failureThreshold": failures,
            "timeoutSeconds": 6,
        })
    };
    let mut container = json!({
        "name": CONTAINER,
        "image": settings.image,
        "imagePullPolicy": pull_policy(settings),
        "args": ["proxy", "-c", CONFIG_FILE],
        "env": environment(made),
        "ports": [
            {"name": CONTAINER, "containerPort": settings.port, "protocol": "TCP"},
            {"name": METRICS_PORT_NAME, "containerPort": settings.metrics_port, "protocol": "TCP"},
        ],
        // The app begins once weir is ready, and not at all unless that is so within two minutes.
        "startupProbe": probe("ready", 1, 120),
        "readinessProbe": probe("ready", 5, 2),
        "livenessProbe": probe("live", 10, 3),
        "resources": resources(&[("cpu", &asked.cpu), ("memory", &asked.memory)]),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "runAsUser": settings.uid,
            "runAsGroup": settings.uid,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": mounts,
    });
    if asked.native_sidecar {
        container["restartPolicy"] = json!("Always");
        // Run as the pod begins to end; SIGTERM comes once the app has ended, and nothing can be asked of it any more. By the file, for its token.
        container["lifecycle"] =
            json!({"preStop": {"exec": {"command": ["weir", "drain", "-c", CONFIG_FILE]}}});
    } else {
        // The kubelet starts the next container once this has ended.
        container["lifecycle"] = json!({"postStart": {"exec": {"command": ["weir", "await", "--address", admin, "--timeout", "2m"]}}});
    }
    container
}

/// The step that has the kernel redirect what comes in.
pub(super) fn redirect(made: &Made) -> Value {
    let Made {
        asked, settings, ..
    } = made;
    let mut skip = vec![settings.metrics_port];
    skip.extend(
        asked
            .skip_inbound_ports
            .iter()
            .filter(|port| **port != settings.metrics_port),
    );
    let skip: Vec<_> = skip.iter().map(u16::to_string).collect();
    let mut step = json!({
        "name": REDIRECT,
        "image": settings.redirect_image,
        "imagePullPolicy": pull_policy(settings),
        "args": [
            "redirect", "--apply",
            "--to", settings.port.to_string(),
            "--uid", settings.uid.to_string(),
            "--skip-inbound-ports", skip.join(","),
        ],
        "resources": {
            "requests": {"cpu": "10m", "memory": "16Mi"},
            "limits": {"memory": "64Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": false,
            "runAsUser": 0,
            "runAsGroup": 0,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    });
    let mounts: Vec<_> = no_token(made).collect();
    if !mounts.is_empty() {
        step["volumeMounts"] = Value::Array(mounts);
    }
    step
}

/// weir asks nothing of the API. A mount in the token's place is all that keeps one container of a pod without it.
fn no_token(made: &Made) -> impl Iterator<Item = Value> {
    made.token
        .then(|| json!({"name": NO_TOKEN_VOLUME, "mountPath": TOKEN, "readOnly": true}))
        .into_iter()
}

fn resources(of: &[(&str, &super::annotations::Resource)]) -> Value {
    let mut resources = json!({"requests": {}});
    for (name, resource) in of {
        resources["requests"][name] = json!(resource.request);
        if let Some(limit) = &resource.limit {
            resources["limits"][name] = json!(limit);
        }
    }
    resources
}

fn pull_policy(settings: &Settings) -> &'static str {
    match settings.pull_policy {
        super::PullPolicy::Always => "Always",
        super::PullPolicy::IfNotPresent => "IfNotPresent",
        super::PullPolicy::Never => "Never",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grace_period_holds_the_delay_the_drain_and_the_last_events() {
        let settings = Settings::default();
        let check = |grace: Value, native, propagation_delay, drain| {
            let pod = json!({"spec": {"terminationGracePeriodSeconds": grace}});
            let wanted = Shutdown {
                propagation_delay,
                drain,
            };
            assert_eq!(Shutdown::within(&pod, native, &settings), wanted, "{grace}");
        };
        check(Value::Null, true, 0, 20);
        check(Value::Null, false, 5, 15);
        check(json!(120), false, 5, 105);
        check(json!(9), false, 3, 3);
        check(json!(0), true, 0, 1);
    }

    #[test]
    fn the_pods_of_a_workload_have_its_name_in_common() {
        let check = |metadata: Value, wanted: Option<&str>| {
            let pod = json!({ "metadata": metadata });
            assert_eq!(workload(&pod).as_deref(), wanted, "{pod}");
        };
        let by = |kind: &str, name: &str| {
            let owner = json!({"kind": kind, "name": name, "controller": true});
            json!({"generateName": format!("{name}-"), "labels": {"pod-template-hash": "5d9f8"}, "ownerReferences": [owner]})
        };
        check(by("ReplicaSet", "web-api-5d9f8"), Some("web-api"));
        check(by("ReplicaSet", "web-v2"), Some("web-v2"));
        check(by("StatefulSet", "db-0"), Some("db-0"));
        check(by("Job", "nightly-29401440"), Some("nightly"));
        check(by("Job", "import-2"), Some("import-2"));
        check(json!({"name": "once"}), Some("once"));
        check(json!({"generateName": "web-"}), Some("web"));
        check(json!({}), None);
    }
}
