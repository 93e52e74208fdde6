//! Which port is the app's, and how weir takes over its name. Container ports are names for numbers, whoever listens: the name stays with the
//! app's container and points to weir's number, since Services find names in init containers from Kubernetes 1.32 alone.

use serde_json::{Map, Value, json};

use super::annotations::{AppPort, Asked, Source};
use super::{Mode, Settings, Unfit};
use crate::config::yaml::did_you_mean;

const PROBES: [&str; 3] = ["readinessProbe", "livenessProbe", "startupProbe"];

/// Of ports, each with its container's name.
const MAX_TOLD: usize = 8;

/// What ports are named for that are none of HTTP without TLS.
const OTHERS: [&str; 19] = [
    "https",
    "tls",
    "tcp",
    "udp",
    "mysql",
    "postgres",
    "postgresql",
    "redis",
    "mongo",
    "mongodb",
    "amqp",
    "kafka",
    "memcached",
    "ldap",
    "ldaps",
    "smtp",
    "ssh",
    "dns",
    "kubernetes.io/wss",
];

/// Whether a port's name, or a Service's `appProtocol`, says that it is none of HTTP without TLS.
pub(super) fn is_other(name: &str) -> bool {
    speaks(&name.to_ascii_lowercase(), &OTHERS)
}

/// By the convention of names: a protocol, or that and more behind a hyphen.
fn speaks(name: &str, protocols: &[&str]) -> bool {
    let protocol = |known: &&str| {
        let more = name.strip_prefix(*known);
        more.is_some_and(|more| more.is_empty() || more.starts_with('-'))
    };
    protocols.iter().any(protocol)
}

/// The app's port.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) number: u16,
    /// The container that declares it.
    pub(super) declared: Option<Declared>,
}

#[derive(Debug)]
pub(super) struct Declared {
    /// Indexes into `spec.containers` and its `ports`.
    container: usize,
    entry: usize,
    pub(super) name: Option<String>,
}

impl Found {
    /// Whether it speaks HTTP/2 without TLS, by the convention of names or since the kubelet asks it by gRPC.
    pub(super) fn is_http2(&self, pod: &Value) -> bool {
        let name = self
            .declared
            .as_ref()
            .and_then(|declared| declared.name.as_deref());
        let named = name.is_some_and(|name| speaks(name, &["grpc", "h2c", "http2"]));
        let containers = pod["spec"]["containers"].as_array();
        let asked = containers.into_iter().flatten().any(|container| {
            PROBES
                .iter()
                .any(|probe| container[probe]["grpc"]["port"].as_u64() == Some(self.number.into()))
        });
        named || asked
    }
}

/// A TCP port of a container of the app.
struct Entry<'a> {
    container: usize,
    entry: usize,
    container_name: &'a str,
    name: Option<&'a str>,
    number: u16,
}

fn entries(pod: &Value) -> Vec<Entry<'_>> {
    let containers = pod["spec"]["containers"].as_array();
    let containers = containers.into_iter().flatten().enumerate();
    containers
        .flat_map(|(at, container)| entries_of(at, container))
        .collect()
}

/// The native sidecars' ports, which are as taken as those of containers.
fn sidecar_entries(pod: &Value) -> Vec<Entry<'_>> {
    let steps = pod["spec"]["initContainers"].as_array();
    let steps = steps.into_iter().flatten().enumerate();
    let sidecars = steps.filter(|(_, step)| step["restartPolicy"] == "Always");
    sidecars
        .flat_map(|(at, sidecar)| entries_of(at, sidecar))
        .collect()
}

fn entries_of(at: usize, container: &Value) -> Vec<Entry<'_>> {
    let mut found = Vec::new();
    let ports = container["ports"].as_array();
    for (entry, port) in ports.into_iter().flatten().enumerate() {
        let number = port["containerPort"].as_u64().map(u16::try_from);
        if let (Some(Ok(number)), "TCP") = (number, port["protocol"].as_str().unwrap_or("TCP")) {
            found.push(Entry {
                container: at,
                entry,
                container_name: container["name"].as_str().unwrap_or_default(),
                name: port["name"].as_str(),
                number,
            });
        }
    }
    found
}

/// The app's port: the one that is asked for, or the only one; `None` where there is none, and in redirect mode, which needs to know of none, where
/// it is one of several.
pub(super) fn find(pod: &Value, asked: &Asked) -> Result<Option<Found>, Unfit> {
    const AT: &str = "metadata.annotations[\"weir.dev/app-port\"]";
    let entries = entries(pod);
    let chosen = match &asked.app_port {
        Some(AppPort::Number(number)) => {
            let declared = entries.iter().find(|entry| entry.number == *number);
            match declared {
                Some(entry) => entry,
                None => {
                    return Ok(Some(Found {
                        number: *number,
                        declared: None,
                    }));
                }
            }
        }
        Some(AppPort::Named(name)) => {
            let named = entries
                .iter()
                .find(|entry| entry.name == Some(name.as_str()));
            named.ok_or_else(|| {
                let names: Vec<_> = entries.iter().filter_map(|entry| entry.name).collect();
                let mend = match names.as_slice() {
                    [] => "no TCP port has a name: give its number".to_owned(),
                    names => did_you_mean(name, names),
                };
                Unfit::new(AT, format!("no container has a port {name:?}; {mend}"))
            })?
        }
        None => match entries.as_slice() {
            [] => return Ok(None),
            [only] => only,
            [_, _, ..] if asked.mode == Mode::Redirect => return Ok(None),
            [_, _, ..] => {
                let mut ports: Vec<_> = entries.iter().take(MAX_TOLD).map(Entry::told).collect();
                if entries.len() > MAX_TOLD {
                    ports.push(format!("and {} more", entries.len() - MAX_TOLD));
                }
                let is_http = |entry: &&Entry| !entry.name.is_some_and(is_other);
                let example = entries.iter().find(is_http).unwrap_or(&entries[0]);
                return Err(Unfit::new(
                    "spec.containers",
                    format!(
                        "which port is the app's? There are {}; annotate the pod with one, as in weir.dev/app-port: \"{}\"",
                        ports.join(", "),
                        example
                            .name
                            .map_or(example.number.to_string(), str::to_owned)
                    ),
                ));
            }
        },
    };
    Ok(Some(Found {
        number: chosen.number,
        declared: Some(Declared {
            container: chosen.container,
            entry: chosen.entry,
            name: chosen.name.map(str::to_owned),
        }),
    }))
}

/// Whether it is only taken for granted that the app's port speaks HTTP without TLS: no annotation names it, and no file of the pod's own says how it
/// is asked.
pub(super) fn is_guessed(asked: &Asked) -> bool {
    asked.mode == Mode::Port && asked.config == Source::Made && asked.app_port.is_none()
}

/// A port that is told to speak something else: all that came to it would fail, and the pod be ready.
pub(super) fn refuse_others(pod: &Value, asked: &Asked, found: &Found) -> Result<(), Unfit> {
    if !is_guessed(asked) {
        return Ok(());
    }
    let unfit = |at: String, why: String| {
        let mend = mend(found.number);
        Err(Unfit::new(
            at,
            format!("{why}, and weir speaks HTTP: {mend}"),
        ))
    };
    let name = found
        .declared
        .as_ref()
        .and_then(|port| port.name.as_deref());
    if let Some(name) = name.filter(|name| is_other(name)) {
        let why = format!(
            "port {} is none of HTTP by its name, {name:?}",
            found.number
        );
        return unfit("spec.containers".to_owned(), why);
    }
    for container in pod["spec"]["containers"].as_array().into_iter().flatten() {
        for probe in PROBES {
            let get = &container[probe]["httpGet"];
            let is_here = get["host"].as_str().unwrap_or_default().is_empty();
            if get["scheme"] == "HTTPS"
                && is_here
                && number(&get["port"], &container["ports"]) == Some(found.number.into())
            {
                let container = container["name"].as_str().unwrap_or_default();
                let at = format!("spec.containers[{container}].{probe}");
                return unfit(at, format!("asks port {} by HTTPS", found.number));
            }
        }
    }
    Ok(())
}

pub(super) fn mend(port: u16) -> String {
    format!(
        "leave the pod out by weir.dev/inject: disabled, or say by a file of its own (weir.dev/config) how it is asked; if it speaks HTTP without TLS all the same, annotate the pod with weir.dev/app-port: \"{port}\""
    )
}

/// The number of a port that a probe asks, by which of the container's it names.
pub(super) fn number(port: &Value, of_container: &Value) -> Option<u64> {
    let Some(name) = port.as_str() else {
        return port.as_u64();
    };
    let mut ports = of_container.as_array()?.iter();
    ports.find(|port| port["name"] == name)?["containerPort"].as_u64()
}

impl Entry<'_> {
    fn told(&self) -> String {
        // No longer than Kubernetes takes them.
        let container: String = self.container_name.chars().take(63).collect();
        match self.name {
            Some(name) => {
                let name: String = name.chars().take(63).collect();
                format!("{} ({name:?} of {container})", self.number)
            }
            None => format!("{} (of {container})", self.number),
        }
    }
}

/// A port of the pod's that weir wants for itself.
pub(super) fn refuse_taken(pod: &Value, asked: &Asked, settings: &Settings) -> Result<(), Unfit> {
    let own = [
        ("--port", settings.port),
        ("--admin-port", settings.admin_port),
        ("--metrics-port", settings.metrics_port),
    ];
    let asked_for = match asked.app_port {
        Some(AppPort::Number(number)) => Some(number),
        Some(AppPort::Named(_)) | None => None,
    };
    for (flag, number) in own {
        let taken = [
            ("spec.containers", entries(pod)),
            ("spec.initContainers", sidecar_entries(pod)),
        ];
        for (list, entries) in taken {
            let Some(entry) = entries.iter().find(|entry| entry.number == number) else {
                continue;
            };
            return Err(Unfit::new(
                list,
                format!(
                    "{} is weir's own port, and one of {}'s: give weir another one by {flag}",
                    number, entry.container_name
                ),
            ));
        }
        if asked_for == Some(number) {
            return Err(Unfit::new(
                "metadata.annotations[\"weir.dev/app-port\"]",
                format!("{number} is weir's own port: give weir another one by {flag}"),
            ));
        }
    }
    Ok(())
}

/// Points the port's name, and its port of the node, to weir; what of the container speaks of the port by name speaks of its number then.
pub(super) fn take_over(pod: &mut Value, found: &Found, port: u16) {
    let Some(declared) = &found.declared else {
        return;
    };
    let container = &mut pod["spec"]["containers"][declared.container];
    let Some(ports) = container["ports"].as_array_mut() else {
        return;
    };
    let entry = &mut ports[declared.entry];
    if entry.get("name").is_none() && entry.get("hostPort").is_none() {
        return;
    }
    entry["containerPort"] = json!(port);
    let mut app = Map::from_iter([("containerPort".to_owned(), json!(found.number))]);
    if let Some(protocol) = entry.get("protocol") {
        app.insert("protocol".to_owned(), protocol.clone());
    }
    ports.insert(declared.entry + 1, Value::Object(app));
    let Some(name) = &declared.name else {
        return;
    };
    for handler in handlers(container) {
        if handler["port"].as_str() == Some(name) {
            handler["port"] = json!(found.number);
        }
    }
}

/// What the kubelet asks of a container over the network.
fn handlers(container: &mut Value) -> Vec<&mut Value> {
    let Some(container) = container.as_object_mut() else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for (key, value) in container {
        match key.as_str() {
            key if PROBES.contains(&key) => found.push(value),
            "lifecycle" => {
                let hooks = value.as_object_mut().into_iter().flatten();
                found.extend(hooks.map(|(_, hook)| hook));
            }
            _ => (),
        }
    }
    found
        .into_iter()
        .filter_map(Value::as_object_mut)
        .flatten()
        .filter(|(kind, _)| matches!(kind.as_str(), "httpGet" | "tcpSocket"))
        .map(|(_, handler)| handler)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Namespace, Outcome, inject_pod};
    use super::*;

    #[test]
    fn protocols_that_are_none_of_http_are_those_of_the_page() {
        let page = include_str!("../../docs/inject.md");
        let (_, told) = page.split_once("is, up to a hyphen,\n").unwrap();
        let (told, _) = told.split_once(", or that a\n").unwrap();
        let told: Vec<_> = told.split('`').skip(1).step_by(2).collect();
        assert_eq!(told, OTHERS);
    }

    #[test]
    fn a_port_that_is_none_of_http_is_weirs_only_where_its_owner_says_so() {
        let check = |mut container: Value, annotations: Value, injected: bool| {
            container["name"] = json!("app");
            let mut pod = json!({"metadata": {"annotations": annotations}, "spec": {"containers": [container]}});
            let outcome = inject_pod(&mut pod, &Namespace::default(), &Settings::default());
            let is_injected = matches!(outcome, Ok(Outcome::Injected(_)));
            assert_eq!(is_injected, injected, "{container}: {outcome:?}");
        };
        let named = |name: &str| json!({"ports": [{"name": name, "containerPort": 8080}]});
        for name in [
            "https",
            "https-web",
            "tls",
            "tcp-app",
            "udp",
            "mysql",
            "postgres",
            "postgresql",
            "redis",
            "mongo",
            "mongodb",
            "amqp",
            "kafka-0",
            "memcached",
            "ldap",
            "smtp",
            "ssh",
            "dns-tcp",
        ] {
            check(named(name), json!({}), false);
            check(named(name), json!({"weir.dev/app-port": "8080"}), true);
            check(named(name), json!({"weir.dev/app-port": name}), true);
            check(named(name), json!({"weir.dev/config": "own"}), true);
            check(named(name), json!({"weir.dev/mode": "redirect"}), true);
        }
        for name in ["http", "web", "grpc", "tcpdump", "redistribute", "httpsx"] {
            check(named(name), json!({}), true);
        }
        let probed = |kind: &str, probe: Value| {
            let mut container = named("web");
            container[kind] = json!({"httpGet": probe});
            container
        };
        let https = |port: Value| json!({"port": port, "scheme": "HTTPS"});
        for kind in ["readinessProbe", "livenessProbe", "startupProbe"] {
            for port in [json!("web"), json!(8080)] {
                check(probed(kind, https(port.clone())), json!({}), false);
                let own = json!({"weir.dev/app-port": "web"});
                check(probed(kind, https(port)), own, true);
            }
            check(probed(kind, https(json!(8081))), json!({}), true);
            check(probed(kind, json!({"port": "web"})), json!({}), true);
            let mut elsewhere = https(json!(8080));
            elsewhere["host"] = json!("shop.example");
            check(probed(kind, elsewhere), json!({}), true);
        }
    }
}
