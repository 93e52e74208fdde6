//! In redirect mode what the kubelet asks of the app would reach weir: a connection is always taken, and a request is held against limits and
//! sessions. Probes go to weir by paths of their own instead, and weir asks the app as they would have.

use serde_json::{Map, Value, json};

use super::{Unfit, ports};

const KINDS: [(&str, &str); 3] = [
    ("readinessProbe", "readyz"),
    ("livenessProbe", "livez"),
    ("startupProbe", "startupz"),
];

/// Rewrites the probes of all containers that are redirected, and says what they were by the path that each has now. Those that run a command,
/// ask elsewhere or by a skipped port stay.
pub(super) fn rewrite(
    pod: &mut Value,
    port: u16,
    skipped: &[u16],
) -> Result<Map<String, Value>, Unfit> {
    let mut moved = Map::new();
    for list in ["containers", "initContainers"] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else {
            continue;
        };
        for container in containers {
            let name = container["name"].as_str().unwrap_or_default().to_owned();
            let ports = container["ports"].clone();
            for (kind, path) in KINDS {
                let Some(probe) = container.get_mut(kind).and_then(Value::as_object_mut) else {
                    continue;
                };
                let path = format!("/app-health/{name}/{path}");
                if let Some(asks) = redirected(probe, &ports, skipped) {
                    if asks
                        .get("httpGet")
                        .is_some_and(|get| get["scheme"] == "HTTPS")
                    {
                        return Err(Unfit::new(
                            format!("spec.{list}[{name}].{kind}"),
                            format!(
                                "asks by HTTPS, and what is redirected to weir is read as HTTP: put port {} into weir.dev/skip-inbound-ports",
                                asks["httpGet"]["port"]
                            ),
                        ));
                    }
                    probe.retain(|key, _| !asks.contains_key(key));
                    probe.insert("httpGet".to_owned(), json!({"path": path, "port": port}));
                    let timeout = probe.get("timeoutSeconds").cloned().unwrap_or(json!(1));
                    let mut asks = asks;
                    asks.insert("timeoutSeconds".to_owned(), timeout);
                    moved.insert(path, Value::Object(asks));
                }
            }
        }
    }
    Ok(moved)
}

/// What a probe asks, its port as a number, if that would be redirected.
fn redirected(
    probe: &Map<String, Value>,
    ports: &Value,
    skipped: &[u16],
) -> Option<Map<String, Value>> {
    let kind = ["httpGet", "tcpSocket", "grpc"]
        .into_iter()
        .find(|kind| probe.contains_key(*kind))?;
    let mut asks = probe[kind].clone();
    let number = ports::number(&asks["port"], ports)?;
    let elsewhere = asks.get("host").is_some_and(|host| host != "");
    if elsewhere || skipped.iter().any(|skip| u64::from(*skip) == number) {
        return None;
    }
    asks["port"] = json!(number);
    Some(Map::from_iter([(kind.to_owned(), asks)]))
}
