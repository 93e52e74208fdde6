//! Which port is the app's, and how weir takes over its name. Container ports are names for numbers, whoever listens: the name stays with the
//! app's container and points to weir's number, since Services find names in init containers from Kubernetes 1.32 alone.

use serde_json::{Map, Value, json};

use super::annotations::{AppPort, Asked};
use super::{Mode, Settings, Unfit};
use crate::config::yaml::did_you_mean;

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
        let named = name.is_some_and(|name| {
            ["grpc", "h2c", "http2"]
                .iter()
                .any(|prefix| name == *prefix || name.starts_with(&format!("{prefix}-")))
        });
        let containers = pod["spec"]["containers"].as_array();
        let asked = containers.into_iter().flatten().any(|container| {
            ["readinessProbe", "livenessProbe", "startupProbe"]
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
                let ports: Vec<_> = entries.iter().map(Entry::told).collect();
                return Err(Unfit::new(
                    "spec.containers",
                    format!(
                        "which port is the app's? There are {}; annotate the pod with one, as in weir.dev/app-port: \"{}\"",
                        ports.join(", "),
                        entries[0]
                            .name
                            .map_or(entries[0].number.to_string(), str::to_owned)
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

impl Entry<'_> {
    fn told(&self) -> String {
        match self.name {
            Some(name) => format!("{} ({name:?} of {})", self.number, self.container_name),
            None => format!("{} (of {})", self.number, self.container_name),
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
            "readinessProbe" | "livenessProbe" | "startupProbe" => found.push(value),
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
