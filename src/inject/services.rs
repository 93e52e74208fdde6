//! Objects beside the pods that know the app's port by its number: Services follow to weir where that is certain, else their owner is told.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::annotations::{INJECTED, strings};
use super::manifest::Workload;
use super::{Unfit, ports, refuse_unless};

/// The key of the annotation's content: by the index of a port, its `targetPort` as it was, null for none.
const TARGETS: &str = "targetPorts";

/// Points ports of a Service that go to the app's by number to weir, and says so, a line a port.
pub(super) fn follow(service: &mut Value, named: &str, workloads: &[Workload]) -> Vec<String> {
    let Some(selector) = selector(service).cloned() else {
        return Vec::new();
    };
    let selected: Vec<_> = of(service, &selector, workloads).collect();
    if selected.is_empty() {
        return Vec::new();
    }
    let headless = service["spec"]["clusterIP"] == "None";
    let mut said = Vec::new();
    let mut was = Map::new();
    let ports = service["spec"]["ports"].as_array_mut();
    for (at, port) in ports.into_iter().flatten().enumerate() {
        if port["protocol"].as_str().unwrap_or("TCP") != "TCP" {
            continue;
        }
        let target = port.get("targetPort").unwrap_or(&port["port"]);
        let Some(target) = target.as_u64() else {
            continue;
        };
        let injected: Vec<_> = selected
            .iter()
            .filter_map(|workload| workload.injected.as_ref())
            .filter(|injected| injected.app_port.map(u64::from) == Some(target))
            .collect();
        let Some(first) = injected.first() else {
            continue;
        };
        if headless {
            said.push(format!(
                "warning: {named}: headless, so clients connect to port {target} of the pods past weir: have them use {}, or use weir.dev/mode: redirect",
                first.port
            ));
            continue;
        }
        let same =
            |name: &Option<String>| injected.iter().all(|other| other.app_port_name == *name);
        if injected.len() < selected.len() {
            let others: Vec<_> = selected
                .iter()
                .filter(|workload| workload.injected.is_none())
                .map(|workload| workload.named.as_str())
                .collect();
            said.push(format!(
                "warning: {named}: its targetPort {target} goes past weir, and stays, since it is for pods without weir, too ({}): name the port in all of them, and have targetPort say the name",
                others.join(", ")
            ));
            continue;
        }
        let new = match &first.app_port_name {
            Some(name) if same(&first.app_port_name) => json!(name),
            Some(_) | None => json!(first.port),
        };
        said.push(format!(
            "{named}: targetPort of port {} is {new} in place of {target}, so that it goes to weir",
            port["port"]
        ));
        was.insert(
            at.to_string(),
            port.get("targetPort").cloned().unwrap_or(Value::Null),
        );
        port["targetPort"] = new;
    }
    if !was.is_empty() {
        let record = json!({TARGETS: was}).to_string();
        service["metadata"]["annotations"][INJECTED] = json!(record);
    }
    said
}

/// What keeps weir out: a Service that it could not note in what it has changed, or ports whose `appProtocol` says that the app's is none of HTTP,
/// where its owner has not said otherwise.
pub(super) fn refusals(service: &Value, named: &str, workloads: &[Workload]) -> Vec<String> {
    let Some(selector) = selector(service) else {
        return Vec::new();
    };
    let injected: Vec<_> = of(service, selector, workloads)
        .filter_map(|workload| Some((workload, workload.injected.as_ref()?)))
        .collect();
    let mut unfit = Vec::new();
    if !injected.is_empty()
        && let Err(malformed) =
            refuse_unless(service, "metadata.annotations", "map", Value::is_object)
    {
        unfit.push(format!("{named}: {malformed}"));
    }
    for port in service["spec"]["ports"].as_array().into_iter().flatten() {
        let protocol = port["appProtocol"].as_str().unwrap_or_default();
        if !ports::is_other(protocol) {
            continue;
        }
        let target = port.get("targetPort").unwrap_or(&port["port"]);
        for (workload, injected) in injected.iter().filter(|(_, it)| it.guessed) {
            let is_named =
                target.is_string() && target.as_str() == injected.app_port_name.as_deref();
            if let Some(app) = injected.app_port
                && (is_named || target.as_u64() == Some(app.into()))
            {
                unfit.push(format!(
                    "{}: {named} says appProtocol: {protocol} of its port {app}, and weir speaks HTTP: {}",
                    workload.named,
                    ports::mend(app)
                ));
            }
        }
    }
    unfit
}

/// Takes back what [`follow`] has changed.
pub(super) fn restore(service: &mut Value) -> Result<(), Unfit> {
    let text = service["metadata"]["annotations"][INJECTED].as_str();
    let record: BTreeMap<String, BTreeMap<usize, Value>> =
        serde_json::from_str(text.unwrap_or_default()).map_err(|error| {
            Unfit::new(
                format!("metadata.annotations[{INJECTED:?}]"),
                format!("not as weir wrote it ({error}): set targetPort by hand"),
            )
        })?;
    for (at, was) in record.get(TARGETS).into_iter().flatten() {
        let port = service.pointer_mut(&format!("/spec/ports/{at}"));
        let port = port.and_then(Value::as_object_mut);
        match (port, was) {
            (Some(port), Value::Null) => drop(port.remove("targetPort")),
            (Some(port), was) => drop(port.insert("targetPort".to_owned(), was.clone())),
            (None, _) => (),
        }
    }
    super::undo::without_key(
        &mut service["metadata"],
        "annotations",
        &[INJECTED.to_owned()],
    );
    Ok(())
}

/// Tells of a NetworkPolicy that lets in the app's port alone.
pub(super) fn shut_out(policy: &Value, named: &str, workloads: &[Workload]) -> Option<String> {
    let rules = policy["spec"]["ingress"].as_array().into_iter().flatten();
    let let_in: Vec<_> = rules
        .flat_map(|rule| rule["ports"].as_array().into_iter().flatten())
        .filter_map(|port| {
            let first = port["port"].as_u64()?;
            Some(first..=port["endPort"].as_u64().unwrap_or(first))
        })
        .collect();
    let lets_in = |port: u16| let_in.iter().any(|ports| ports.contains(&port.into()));
    let namespace = policy["metadata"]["namespace"].as_str();
    let selected = workloads.iter().filter(|workload| {
        workload.namespace.as_deref() == namespace
            && selects(&policy["spec"]["podSelector"], &workload.labels)
    });
    let injected = selected.filter_map(|workload| workload.injected.as_ref());
    let mut shut_out = injected
        .filter(|injected| injected.app_port.is_some_and(&lets_in) && !lets_in(injected.port));
    let injected = shut_out.next()?;
    Some(format!(
        "warning: {named}: lets in port {} by number, and weir takes requests on {}: let that in",
        injected.app_port.unwrap_or_default(),
        injected.port
    ))
}

/// A Service's, which selects nothing where it is empty: others say what its endpoints are.
fn selector(service: &Value) -> Option<&Map<String, Value>> {
    let selector = service["spec"]["selector"].as_object()?;
    (!selector.is_empty()).then_some(selector)
}

/// The workloads of the object's namespace that a selector selects.
fn of<'a>(
    object: &Value,
    selector: &Map<String, Value>,
    workloads: &'a [Workload],
) -> impl Iterator<Item = &'a Workload> {
    let namespace = object["metadata"]["namespace"].as_str().map(str::to_owned);
    let wanted = strings(&json!({"metadata": {"labels": selector}}), "labels");
    workloads.iter().filter(move |workload| {
        let has = |(key, value): (&String, &String)| workload.labels.get(key) == Some(value);
        workload.namespace == namespace && wanted.iter().all(has)
    })
}

/// Whether a selector of labels, as all but a Service's are, selects these. An empty one selects all.
fn selects(selector: &Value, labels: &BTreeMap<String, String>) -> bool {
    let wanted = selector["matchLabels"].as_object().into_iter().flatten();
    let mut wanted =
        wanted.map(|(key, value)| labels.get(key).map(String::as_str) == value.as_str());
    let expressions = selector["matchExpressions"]
        .as_array()
        .into_iter()
        .flatten();
    let mut holds = expressions.map(|expression| {
        let label = labels.get(expression["key"].as_str().unwrap_or_default());
        let mut values = expression["values"].as_array().into_iter().flatten();
        let is_one = label.is_some_and(|label| values.any(|value| value == label.as_str()));
        match expression["operator"].as_str() {
            Some("In") => is_one,
            Some("NotIn") => !is_one,
            Some("Exists") => label.is_some(),
            Some("DoesNotExist") => label.is_none(),
            Some(_) | None => false,
        }
    });
    wanted.all(|is_it| is_it) && holds.all(|is_it| is_it)
}
