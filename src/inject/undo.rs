//! What an injection changed, kept in the pod's annotations, and how it is taken back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::annotations::{INJECT, INJECTED};
use super::sidecar::{CONTAINER, REDIRECT, VOLUMES};
use super::{Mode, Unfit};

/// The annotation's content.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The weir that injected.
    version: String,
    mode: Mode,
    /// By container, what it had under the keys that were changed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    was: BTreeMap<String, Map<String, Value>>,
    /// What the label said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    /// Annotations beside this one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    annotations: Vec<String>,
}

/// Notes in `pod` how it differs from `before`.
pub(super) fn note(pod: &mut Value, before: &Value, mode: Mode) {
    let had = before["metadata"]["annotations"].as_object();
    let annotations = pod["metadata"]["annotations"].as_object();
    let added = annotations
        .into_iter()
        .flat_map(Map::keys)
        .filter(|name| !had.is_some_and(|had| had.contains_key(*name)))
        .cloned()
        .collect();
    let mut was = BTreeMap::new();
    for list in ["containers", "initContainers"] {
        let now = pod["spec"][list].as_array().into_iter().flatten();
        let now: BTreeMap<_, _> = now
            .rev()
            .filter_map(|container| Some((container["name"].as_str()?, container)))
            .collect();
        for old in before["spec"][list].as_array().into_iter().flatten() {
            let name = old["name"].as_str().unwrap_or_default();
            if let Some(new) = now.get(name) {
                let old = old.as_object().into_iter().flatten();
                let changed: Map<_, _> = old
                    .filter(|(key, value)| new.get(key) != Some(value))
                    .map(|(key, value)| (key.clone(), value.clone()))
                    .collect();
                if !changed.is_empty() {
                    was.insert(name.to_owned(), changed);
                }
            }
        }
    }
    let record = Record {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        mode,
        was,
        label: before["metadata"]["labels"][INJECT]
            .as_str()
            .map(str::to_owned),
        annotations: added,
    };
    pod["metadata"]["annotations"][INJECTED] = json!(json!(record).to_string());
}

/// Takes out of `pod` what was put in; false where there is nothing of it.
pub(super) fn undo(pod: &mut Value) -> Result<bool, Unfit> {
    let Some(text) = pod["metadata"]["annotations"][INJECTED].as_str() else {
        return Ok(false);
    };
    let record: Record = serde_json::from_str(text).map_err(|error| {
        Unfit::new(
            format!("metadata.annotations[{INJECTED:?}]"),
            format!("not as weir wrote it ({error}): take weir out by hand"),
        )
    })?;
    let spec = &mut pod["spec"];
    let own = |value: &Value, names: &[&str]| {
        value["name"]
            .as_str()
            .is_some_and(|name| names.contains(&name))
    };
    without(spec, "initContainers", |value| {
        own(value, &[CONTAINER, REDIRECT])
    });
    without(spec, "containers", |value| own(value, &[CONTAINER]));
    without(spec, "volumes", |value| own(value, &VOLUMES));
    for list in ["containers", "initContainers"] {
        let containers = spec.get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            let name = container["name"].as_str().unwrap_or_default();
            for (key, value) in record.was.get(name).into_iter().flatten() {
                container[key] = value.clone();
            }
        }
    }
    let metadata = &mut pod["metadata"];
    match record.label {
        Some(label) => metadata["labels"][INJECT] = json!(label),
        None => without_key(metadata, "labels", &[INJECT.to_owned()]),
    }
    let mut annotations = record.annotations;
    annotations.push(INJECTED.to_owned());
    without_key(metadata, "annotations", &annotations);
    if metadata.as_object().is_some_and(Map::is_empty) {
        remove(pod, "metadata");
    }
    Ok(true)
}

fn without(of: &mut Value, list: &str, own: impl Fn(&Value) -> bool) {
    if let Some(values) = of.get_mut(list).and_then(Value::as_array_mut) {
        let before = values.len();
        values.retain(|value| !own(value));
        if values.is_empty() && before > 0 {
            remove(of, list);
        }
    }
}

pub(super) fn without_key(of: &mut Value, map: &str, keys: &[String]) {
    if let Some(entries) = of.get_mut(map).and_then(Value::as_object_mut) {
        let before = entries.len();
        entries.retain(|key, _| !keys.contains(key));
        if entries.is_empty() && before > 0 {
            remove(of, map);
        }
    }
}

fn remove(of: &mut Value, key: &str) {
    if let Some(of) = of.as_object_mut() {
        of.remove(key);
    }
}
