//! Kubernetes' objects, as files have them: finds pods and templates of pods in the documents of a text, puts weir into them or takes it out, and
//! has Services in the same text follow. Must not know what a sidecar is.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use super::annotations::{INJECTED, PREFIX, strings};
use super::services;
pub use super::text::Malformed;
use super::text::{self, Node};
use super::{
    Injected, Mode, Namespace, Outcome, Settings, Unfit, inject_pod_of, sidecar, uninject_pod,
};

/// A text with weir in it, or out of it.
#[derive(Debug)]
pub struct Manifest {
    text: String,
    documents: Vec<Node>,
    values: Vec<Value>,
    /// What became of each workload, a line each.
    pub report: Vec<String>,
}

/// Why a text cannot be taken; nothing of it is injected then.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("no YAML: {0}")]
    Malformed(Malformed),
    /// Of each workload.
    #[error("{}", .0.join("\n"))]
    Unfit(Vec<String>),
}

/// An object by its place: the document, and the item of a list in it.
#[derive(Debug, Clone, Copy)]
struct Place {
    document: usize,
    item: Option<usize>,
}

/// A workload as Services see it.
pub(super) struct Workload {
    pub(super) named: String,
    pub(super) namespace: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    /// Only what has been injected just now, in port mode.
    pub(super) injected: Option<Injected>,
}

/// Puts weir into all workloads of a text.
pub fn inject(text: &str, settings: &Settings) -> Result<Manifest, Fault> {
    let (documents, mut values) = read(text)?;
    let places = places(&values);
    let namespaces = namespaces(&values, &places);
    let (mut report, mut unfit, mut workloads) = (Vec::new(), Vec::new(), Vec::new());
    for place in &places {
        let object = at_mut(&mut values, *place);
        let named = named(object);
        let path = match pods_path(object) {
            Template::At(path) => path,
            Template::Unsupported => {
                report.push(format!(
                    "{named}: skipped: unsupported kind; known are {}",
                    KINDS.map(|(kind, _)| kind).join(", ")
                ));
                continue;
            }
            Template::None => continue,
        };
        if !path.is_empty() {
            report.extend(misplaced(object, &named, path));
        }
        let namespace = object["metadata"]["namespace"].as_str().map(str::to_owned);
        let defaults = namespaces.get(&namespace).cloned().unwrap_or_default();
        let workload = sidecar::workload(object);
        let Some(pod) = follow(object, path) else {
            let at = path.join(".");
            unfit.push(format!(
                "{named}: {at}.spec.containers: missing: this is no pod"
            ));
            continue;
        };
        match inject_pod_of(workload.as_deref(), pod, &defaults, settings) {
            Ok(Outcome::Injected(injected)) => {
                report.push(format!("{named}: injected, {}", told(&injected)));
                report.extend(
                    injected
                        .warnings
                        .iter()
                        .map(|said| format!("warning: {named}: {said}")),
                );
                workloads.push(Workload {
                    named,
                    namespace,
                    labels: strings(pod, "labels"),
                    injected: (injected.mode == Mode::Port).then_some(injected),
                });
            }
            Ok(Outcome::Skipped(reason)) => {
                report.push(format!("{named}: skipped: {reason}"));
                workloads.push(Workload {
                    named,
                    namespace,
                    labels: strings(pod, "labels"),
                    injected: None,
                });
            }
            Err(Unfit { at, problem }) => {
                let inside = at.starts_with("spec") || at.starts_with("metadata");
                let dot = if inside && !path.is_empty() { "." } else { "" };
                let path = if inside {
                    path.join(".")
                } else {
                    String::new()
                };
                unfit.push(format!("{named}: {path}{dot}{at}: {problem}"));
            }
        }
    }
    for place in places {
        let object = at_mut(&mut values, place);
        let named = named(object);
        match (object["apiVersion"].as_str(), object["kind"].as_str()) {
            (Some("v1"), Some("Service")) => {
                let refusals = services::refusals(object, &named, &workloads);
                if refusals.is_empty() {
                    report.extend(services::follow(object, &named, &workloads));
                }
                unfit.extend(refusals);
            }
            (_, Some("NetworkPolicy")) => {
                report.extend(services::shut_out(object, &named, &workloads));
            }
            _ => (),
        }
    }
    if !unfit.is_empty() {
        return Err(Fault::Unfit(unfit));
    }
    Ok(Manifest {
        text: text.to_owned(),
        documents,
        values,
        report,
    })
}

/// Takes weir out of all workloads of a text that it was put into.
pub fn uninject(text: &str) -> Result<Manifest, Fault> {
    let (documents, mut values) = read(text)?;
    let (mut report, mut unfit) = (Vec::new(), Vec::new());
    for place in places(&values) {
        let object = at_mut(&mut values, place);
        let named = named(object);
        let done = match pods_path(object) {
            Template::At(path) => match follow(object, path) {
                Some(pod) if pod["metadata"]["annotations"][INJECTED].is_string() => {
                    uninject_pod(pod)
                }
                Some(_) | None => Ok(false),
            },
            Template::Unsupported => continue,
            Template::None if object["metadata"]["annotations"][INJECTED].is_string() => {
                services::restore(object).map(|()| true)
            }
            Template::None => continue,
        };
        match done {
            Ok(true) => report.push(format!("{named}: weir is taken out")),
            Ok(false) => report.push(format!("{named}: skipped: not injected by weir inject")),
            Err(error) => unfit.push(format!("{named}: {error}")),
        }
    }
    if !unfit.is_empty() {
        return Err(Fault::Unfit(unfit));
    }
    Ok(Manifest {
        text: text.to_owned(),
        documents,
        values,
        report,
    })
}

impl Manifest {
    /// The text with its changes, all else as it was written; and a line for each document that could not be changed in place, and each comment lost.
    pub fn yaml(&self) -> (String, Vec<String>) {
        let changed = text::change(&self.text, &self.documents, &self.values);
        let rewritten = changed.rewritten.iter().map(|at| {
            format!(
                "warning: {}: written anew, without comments and anchors: it cannot be changed in place",
                named(&self.values[*at])
            )
        });
        let comments = changed.lost.iter().map(|comment| {
            format!("warning: the comment {comment:?} stood in what has changed, and is lost")
        });
        let lost = rewritten.chain(comments).collect();
        (changed.text, lost)
    }

    /// One object, or a List of several.
    pub fn json(&self) -> String {
        let objects: Vec<_> = (self.documents.iter().zip(&self.values))
            .filter(|(_, value)| !value.is_null())
            .collect();
        // A List of Lists is none that everyone takes.
        let objects = match objects.as_slice() {
            [_] => objects,
            objects => objects
                .iter()
                .flat_map(|(node, value)| match items(value) {
                    Some(items) => node.items("items").into_iter().zip(items).collect(),
                    None => vec![(*node, *value)],
                })
                .collect(),
        };
        match objects.as_slice() {
            [(node, value)] => text::json(node, value),
            objects => {
                let items: Vec<_> = objects
                    .iter()
                    .map(|(node, value)| text::json(node, value))
                    .map(|item| item.trim_end().replace('\n', "\n        "))
                    .collect();
                let between = ",\n        ";
                format!(
                    "{{\n    \"apiVersion\": \"v1\",\n    \"kind\": \"List\",\n    \"items\": [\n        {}\n    ]\n}}\n",
                    items.join(between)
                )
            }
        }
    }
}

fn read(text: &str) -> Result<(Vec<Node>, Vec<Value>), Fault> {
    let documents = text::parse(text).map_err(|mut malformed| {
        let line = text.lines().nth(malformed.line.saturating_sub(1));
        if line.is_some_and(|line| line.contains("{{")) {
            malformed.problem += "; a template must be rendered first, as by helm template";
        }
        Fault::Malformed(malformed)
    })?;
    let values = documents.iter().map(Node::value).collect();
    Ok((documents, values))
}

fn places(values: &[Value]) -> Vec<Place> {
    let mut places = Vec::new();
    for (document, value) in values.iter().enumerate() {
        match items(value) {
            Some(items) => places.extend((0..items.len()).map(|item| Place {
                document,
                item: Some(item),
            })),
            None => places.push(Place {
                document,
                item: None,
            }),
        }
    }
    places
}

/// The objects of a List.
fn items(value: &Value) -> Option<&Vec<Value>> {
    let kind = value["kind"].as_str()?;
    value["items"].as_array().filter(|_| kind.ends_with("List"))
}

fn at(values: &[Value], place: Place) -> &Value {
    let document = &values[place.document];
    place.item.map_or(document, |item| &document["items"][item])
}

fn at_mut(values: &mut [Value], place: Place) -> &mut Value {
    let document = &mut values[place.document];
    match place.item {
        Some(item) => &mut document["items"][item],
        None => document,
    }
}

/// Namespaces that stand in the text, by name.
fn namespaces(values: &[Value], places: &[Place]) -> BTreeMap<Option<String>, Namespace> {
    let objects = places.iter().map(|place| at(values, *place));
    objects
        .filter(|object| object["kind"] == "Namespace" && object["apiVersion"] == "v1")
        .map(|object| {
            let name = object["metadata"]["name"].as_str().map(str::to_owned);
            let namespace = Namespace {
                labels: strings(object, "labels"),
                annotations: strings(object, "annotations"),
            };
            (name, namespace)
        })
        .collect()
}

/// For example `Deployment shop/web`.
fn named(object: &Value) -> String {
    let metadata = &object["metadata"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let name = text(&metadata["name"])
        .or_else(|| text(&metadata["generateName"]).map(|name| name + "…"))
        .unwrap_or_else(|| "without a name".to_owned());
    let kind = object["kind"].as_str().unwrap_or("object");
    match metadata["namespace"].as_str() {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}

enum Template {
    At(&'static [&'static str]),
    /// There is one, but of a kind that is not known.
    Unsupported,
    None,
}

const KINDS: [(&str, &[&str]); 9] = [
    ("Deployment", &["spec", "template"]),
    ("StatefulSet", &["spec", "template"]),
    ("DaemonSet", &["spec", "template"]),
    ("ReplicaSet", &["spec", "template"]),
    ("ReplicationController", &["spec", "template"]),
    ("Job", &["spec", "template"]),
    ("CronJob", &["spec", "jobTemplate", "spec", "template"]),
    ("PodTemplate", &["template"]),
    ("Pod", &[]),
];

fn pods_path(object: &Value) -> Template {
    let version = object["apiVersion"].as_str().unwrap_or_default();
    let group = version.split_once('/').map_or("", |(group, _)| group);
    let known = KINDS.iter().find(|(kind, _)| object["kind"] == **kind);
    match known {
        Some((_, path)) if ["", "apps", "batch", "extensions"].contains(&group) => {
            Template::At(path)
        }
        Some(_) | None if object["spec"]["template"]["spec"]["containers"].is_array() => {
            Template::Unsupported
        }
        Some(_) | None => Template::None,
    }
}

fn follow<'a>(object: &'a mut Value, path: &[&str]) -> Option<&'a mut Value> {
    path.iter()
        .try_fold(object, |value, key| value.get_mut(*key))
}

/// Annotations that would be the pod's, on the workload itself.
fn misplaced(object: &Value, named: &str, path: &[&str]) -> Option<String> {
    let own = strings(object, "annotations");
    let found: Vec<_> = own
        .into_keys()
        .filter(|key| key.starts_with(PREFIX))
        .collect();
    (!found.is_empty()).then(|| {
        format!(
            "warning: {named}: {} means nothing on the workload itself: put it into {}.metadata.annotations",
            found.join(", "),
            path.join(".")
        )
    })
}

fn told(injected: &Injected) -> impl fmt::Display {
    let Injected {
        mode,
        app_port,
        app_port_name,
        port,
        ..
    } = injected;
    match (mode, app_port, app_port_name) {
        (Mode::Port, Some(app), Some(name)) => {
            format!("port mode: {name:?} is weir's port {port} now, and weir asks the app on {app}")
        }
        (Mode::Port, Some(app), None) => {
            format!(
                "port mode: Services reach weir by the number {port}, since the app's {app} has no name"
            )
        }
        (Mode::Port, None, _) => format!("port mode: weir's port is {port}"),
        (Mode::Redirect, ..) => "redirect mode".to_owned(),
    }
}
