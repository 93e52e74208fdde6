//! What a pod asks for by its label and annotations, and its namespace by its own; settings for the rest.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Mode, Namespace, Settings, Skipped, Unfit};
use crate::config::yaml::did_you_mean;

pub(super) const PREFIX: &str = "weir.dev/";
/// As a label, it is what `PodMonitor`s find pods by, and what the webhook is asked about.
pub(super) const INJECT: &str = "weir.dev/inject";
/// The value of the label of an injected pod, unless it says yes by another.
pub(super) const ENABLED: &str = "enabled";
pub(super) const CONFIG_INLINE: &str = "weir.dev/config-inline";
/// What was changed, to be undone by.
pub(super) const INJECTED: &str = "weir.dev/injected";
const APP_PORT: &str = "weir.dev/app-port";

/// Of what is unknown.
const MAX_TOLD: usize = 20;
const KNOWN: [&str; 12] = [
    INJECT,
    INJECTED,
    APP_PORT,
    CONFIG_INLINE,
    "weir.dev/config",
    "weir.dev/cpu-limit",
    "weir.dev/cpu-request",
    "weir.dev/memory-limit",
    "weir.dev/memory-request",
    "weir.dev/mode",
    "weir.dev/native-sidecar",
    "weir.dev/skip-inbound-ports",
];

/// What a pod gets.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) mode: Mode,
    pub(super) native_sidecar: bool,
    pub(super) config: Source,
    pub(super) app_port: Option<AppPort>,
    pub(super) skip_inbound_ports: Vec<u16>,
    pub(super) cpu: Resource,
    pub(super) memory: Resource,
    pub(super) warnings: Vec<String>,
}

/// Where the configuration comes from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    ConfigMap(String),
    /// The pod's annotation, as its owner wrote it.
    Annotation,
    /// Likewise, written here.
    Made,
}

#[derive(Debug)]
pub(super) enum AppPort {
    Number(u16),
    Named(String),
}

/// Kubernetes quantities.
#[derive(Debug)]
pub(super) struct Resource {
    pub(super) request: String,
    pub(super) limit: Option<String>,
}

/// Whether the pod or, where it says nothing, its namespace keeps weir out.
pub(super) fn disabled(pod: &Value, namespace: &Namespace) -> Result<Option<Skipped>, Unfit> {
    let places = [
        ("metadata.labels", strings(pod, "labels")),
        ("metadata.annotations", strings(pod, "annotations")),
        ("the namespace's annotations", namespace.annotations.clone()),
        ("the namespace's labels", namespace.labels.clone()),
    ];
    let said: Vec<_> = places
        .iter()
        .filter_map(|(place, entries)| Some((format!("{place}[{INJECT:?}]"), entries.get(INJECT)?)))
        .map(|(at, value)| Ok((on_or_off(&at, value)?, at)))
        .collect::<Result<_, Unfit>>()?;
    // A pod that says no by its label is one that the webhook never sees: its annotation cannot undo that.
    Ok(match said.first() {
        Some((false, at)) => Some(Skipped::Disabled(at.clone())),
        Some((true, _)) | None => None,
    })
}

pub(super) fn read(
    pod: &Value,
    namespace: &Namespace,
    settings: &Settings,
) -> Result<Asked, Unfit> {
    let own = strings(pod, "annotations");
    let found = |name: &str| -> Option<(String, String)> {
        let of_pod = own
            .get(name)
            .map(|value| (format!("metadata.annotations[{name:?}]"), value.clone()));
        of_pod.or_else(|| {
            let value = namespace.annotations.get(name)?;
            Some((
                format!("the namespace's annotations[{name:?}]"),
                value.clone(),
            ))
        })
    };
    let mode = match found("weir.dev/mode") {
        Some((at, value)) => mode(&at, &value)?,
        None => settings.mode,
    };
    let native_sidecar = match found("weir.dev/native-sidecar") {
        Some((at, value)) => on_or_off(&at, &value)?,
        None => settings.native_sidecar,
    };
    let config = match (found("weir.dev/config"), own.get(CONFIG_INLINE)) {
        (Some((at, _)), Some(_)) if at.starts_with("metadata") => {
            return Err(Unfit::new(
                at,
                format!(
                    "{CONFIG_INLINE} says where the configuration is, too: leave one of them out"
                ),
            ));
        }
        (_, Some(_)) => Source::Annotation,
        (Some((at, name)), None) => Source::ConfigMap(config_map(&at, &name)?),
        (None, None) => match &settings.config_map {
            Some(name) => Source::ConfigMap(config_map("--config-map", name)?),
            None => Source::Made,
        },
    };
    let app_port = match found(APP_PORT) {
        Some((at, value)) => Some(app_port(&at, &value)?),
        None => None,
    };
    let mut warnings = unknown(&own);
    let skip_inbound_ports = match found("weir.dev/skip-inbound-ports") {
        Some((at, value)) => {
            if mode == Mode::Port {
                warnings.push(format!(
                    "{at} is for weir.dev/mode: redirect, and changes nothing here: in port mode nothing is redirected"
                ));
            }
            ports(&at, &value)?
        }
        None => Vec::new(),
    };
    let resource = |name: &str, request: &str, limit: &Option<String>| -> Result<Resource, Unfit> {
        resource(
            found(&format!("{PREFIX}{name}-request")),
            found(&format!("{PREFIX}{name}-limit")),
            (name, request, limit.as_deref()),
        )
    };
    Ok(Asked {
        mode,
        native_sidecar,
        config,
        app_port,
        skip_inbound_ports,
        cpu: resource("cpu", &settings.cpu_request, &settings.cpu_limit)?,
        memory: resource("memory", &settings.memory_request, &settings.memory_limit)?,
        warnings,
    })
}

/// The texts of `metadata`'s labels or annotations.
pub(super) fn strings(pod: &Value, what: &str) -> BTreeMap<String, String> {
    let entries = pod["metadata"][what].as_object();
    let texts = entries
        .into_iter()
        .flatten()
        .filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
    texts.collect()
}

/// Sentences about annotations under `weir.dev/` that mean nothing.
pub(super) fn unknown(own: &BTreeMap<String, String>) -> Vec<String> {
    let unknown = own
        .keys()
        .filter(|name| name.starts_with(PREFIX) && !KNOWN.contains(&name.as_str()))
        .take(MAX_TOLD);
    unknown
        .map(|name| {
            format!(
                "metadata.annotations: unknown {name:?}; {}",
                did_you_mean(name, &KNOWN)
            )
        })
        .collect()
}

fn on_or_off(at: &str, value: &str) -> Result<bool, Unfit> {
    const WORDS: [&str; 4] = ["enabled", "disabled", "true", "false"];
    match value {
        "enabled" | "true" => Ok(true),
        "disabled" | "false" => Ok(false),
        _ => Err(Unfit::new(
            at,
            format!(
                "{value:?} is neither yes nor no; {}",
                did_you_mean(value, &WORDS)
            ),
        )),
    }
}

fn mode(at: &str, value: &str) -> Result<Mode, Unfit> {
    match value {
        "port" => Ok(Mode::Port),
        "redirect" => Ok(Mode::Redirect),
        _ => Err(Unfit::new(
            at,
            format!(
                "unknown mode {value:?}; {}",
                did_you_mean(value, &["port", "redirect"])
            ),
        )),
    }
}

fn config_map(at: &str, name: &str) -> Result<String, Unfit> {
    let is_edge = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    // A DNS subdomain of RFC 1123, as Kubernetes has it.
    let fits = |label: &str| {
        let label = label.as_bytes();
        label.first().is_some_and(is_edge)
            && label.last().is_some_and(is_edge)
            && label.iter().all(|byte| is_edge(byte) || *byte == b'-')
    };
    if name.len() > 253 || !name.split('.').all(fits) {
        return Err(Unfit::new(
            at,
            format!(
                "{name:?} is no name of a ConfigMap: letters in lower case, digits, - and ., with a letter or digit at both ends and beside each ."
            ),
        ));
    }
    Ok(name.to_owned())
}

fn app_port(at: &str, value: &str) -> Result<AppPort, Unfit> {
    if value.is_empty() || value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(AppPort::Number(port(at, value)?));
    }
    Ok(AppPort::Named(value.to_owned()))
}

fn ports(at: &str, value: &str) -> Result<Vec<u16>, Unfit> {
    value.split(',').map(|text| port(at, text.trim())).collect()
}

fn port(at: &str, text: &str) -> Result<u16, Unfit> {
    match text.parse() {
        Ok(0) | Err(_) => Err(Unfit::new(
            at,
            format!("{text:?} is no port: a number from 1 to 65535"),
        )),
        Ok(port) => Ok(port),
    }
}

type Found = Option<(String, String)>;

/// A limit that nobody asked for gives way to a request beyond it; one that was asked for does not.
fn resource(
    request: Found,
    limit: Found,
    (name, usual_request, usual_limit): (&str, &str, Option<&str>),
) -> Result<Resource, Unfit> {
    let (request_at, request) =
        request.unwrap_or_else(|| (format!("--{name}-request"), usual_request.to_owned()));
    let requested = quantity(&request_at, &request)?;
    let (limit_at, limit, asked_for) = match (limit, usual_limit) {
        (Some((at, limit)), _) => (at, limit, true),
        (None, Some(limit)) => (format!("--{name}-limit"), limit.to_owned(), false),
        (None, None) => {
            return Ok(Resource {
                request,
                limit: None,
            });
        }
    };
    let limit = match quantity(&limit_at, &limit)? {
        limited if limited >= requested => limit,
        _ if !asked_for => request.clone(),
        _ => {
            return Err(Unfit::new(
                limit_at,
                format!(
                    "{limit} is less than the request, {request}: raise it, or lower the request"
                ),
            ));
        }
    };
    Ok(Resource {
        request,
        limit: Some(limit),
    })
}

/// A Kubernetes quantity in its unit.
pub(super) fn quantity(at: &str, text: &str) -> Result<f64, Unfit> {
    const SUFFIXES: [(&str, f64); 16] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
        ("", 1.0),
    ];
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
    let named = SUFFIXES.iter().find(|(suffix, _)| *suffix == unit);
    // Or a power of ten: 1e9, or 2.68435456e+08, as Helm writes large numbers.
    let power = || Some(10_f64.powi(unit.strip_prefix(['e', 'E'])?.parse().ok()?));
    let factor = named.map(|(_, factor)| *factor).or_else(power);
    match (digits.parse::<f64>(), factor) {
        (Ok(number), Some(factor)) if (number * factor).is_finite() => Ok(number * factor),
        (Ok(_) | Err(_), _) => Err(Unfit::new(
            at,
            format!("{text:?} is no quantity: write it as 100m, 0.5, 64Mi or 1Gi"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(annotations: Value) -> Result<Asked, String> {
        let pod = json!({"metadata": {"annotations": annotations}, "spec": {}});
        read(&pod, &Namespace::default(), &Settings::default()).map_err(|unfit| unfit.to_string())
    }

    #[test]
    fn a_bad_value_is_told_with_its_place_and_the_mend() {
        let cases = [
            (
                "mode",
                "prot",
                "unknown mode \"prot\"; did you mean \"port\"?",
            ),
            (
                "native-sidecar",
                "ture",
                "\"ture\" is neither yes nor no; did you mean \"true\"?",
            ),
            (
                "app-port",
                "70000",
                "\"70000\" is no port: a number from 1 to 65535",
            ),
            ("app-port", "", "\"\" is no port: a number from 1 to 65535"),
            (
                "skip-inbound-ports",
                "80,x",
                "\"x\" is no port: a number from 1 to 65535",
            ),
            (
                "config",
                "My_Config",
                "\"My_Config\" is no name of a ConfigMap: letters in lower case, digits, - and ., with a letter or digit at both ends and beside each .",
            ),
            (
                "cpu-request",
                "50 m",
                "\"50 m\" is no quantity: write it as 100m, 0.5, 64Mi or 1Gi",
            ),
            (
                "memory-request",
                "64MB",
                "\"64MB\" is no quantity: write it as 100m, 0.5, 64Mi or 1Gi",
            ),
        ];
        for (name, value, said) in cases {
            let error = asked(json!({format!("weir.dev/{name}"): value})).unwrap_err();
            assert_eq!(
                error,
                format!("metadata.annotations[\"weir.dev/{name}\"]: {said}")
            );
        }
    }

    #[test]
    fn the_name_of_a_config_map_is_one_that_kubernetes_takes() {
        let check = |name: &str, fits: bool| {
            let error = asked(json!({"weir.dev/config": name})).err();
            assert_eq!(error.is_none(), fits, "{name:?}: {error:?}");
        };
        let longest = "a".repeat(253);
        for name in ["web", "a", "7", "web-1.eu", "a--b", longest.as_str()] {
            check(name, true);
        }
        let too_long = "a".repeat(254);
        for name in [
            "-web", "web-", ".web", "web.", ".", "-", "a..b", "a-.b", "a.-b", "a_b", "é", &too_long,
        ] {
            check(name, false);
        }
    }

    #[test]
    fn a_limit_that_nobody_asked_for_gives_way_to_the_request() {
        let memory = asked(json!({"weir.dev/memory-request": "1Gi"}))
            .unwrap()
            .memory;
        assert_eq!(memory.limit.as_deref(), Some("1Gi"));
        let error =
            asked(json!({"weir.dev/memory-request": "1Gi", "weir.dev/memory-limit": "512Mi"}));
        assert_eq!(
            error.unwrap_err(),
            "metadata.annotations[\"weir.dev/memory-limit\"]: 512Mi is less than the request, 1Gi: raise it, or lower the request"
        );
    }

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for (text, amount) in [
            ("0", 0.0),
            ("0.5", 0.5),
            (".5", 0.5),
            ("100m", 0.1),
            ("64Mi", 67_108_864.0),
            ("1e3", 1000.0),
            ("12E6", 12e6),
            ("5e-1", 0.5),
            ("2.68435456e+08", 268_435_456.0),
            ("1E", 1e18),
            ("1Ei", 1_152_921_504_606_846_976.0),
        ] {
            assert_eq!(quantity("", text), Ok(amount), "{text}");
        }
        for text in [
            "", ".", "m", "e3", "-1", "1.2.3", "1e", "1e3m", "1ee3", "1e999", "1 e3", "1e1.5",
            "NaN", "1b", "é",
        ] {
            assert!(quantity("", text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_pods_annotations_go_before_the_namespaces_and_those_before_settings() {
        let namespace = Namespace {
            annotations: [("mode", "redirect"), ("cpu-request", "1")]
                .map(|(name, value)| (format!("weir.dev/{name}"), value.to_owned()))
                .into(),
            ..Namespace::default()
        };
        let pod = json!({"metadata": {"annotations": {"weir.dev/cpu-request": "2"}}});
        let asked = read(&pod, &namespace, &Settings::default()).unwrap();
        assert_eq!(asked.mode, Mode::Redirect);
        assert_eq!(asked.cpu.request, "2");
        assert_eq!(asked.memory.request, "64Mi");
    }

    #[test]
    fn the_pod_has_the_last_word_about_injection() {
        let namespace = |value: &str| Namespace {
            annotations: [(INJECT.to_owned(), value.to_owned())].into(),
            ..Namespace::default()
        };
        let off = json!({"metadata": {"labels": {"weir.dev/inject": "false"}}});
        let on = json!({"metadata": {"annotations": {"weir.dev/inject": "true"}}});
        assert!(disabled(&off, &namespace("true")).unwrap().is_some());
        assert!(disabled(&on, &namespace("false")).unwrap().is_none());
        assert!(
            disabled(&json!({}), &namespace("disabled"))
                .unwrap()
                .is_some()
        );
        assert!(disabled(&json!({}), &namespace("flase")).is_err());
    }

    #[test]
    fn an_unknown_annotation_is_told_with_the_nearest() {
        let warnings = asked(json!({"weir.dev/appport": "80", "other/appport": "80"}))
            .unwrap()
            .warnings;
        assert_eq!(
            warnings,
            [
                "metadata.annotations: unknown \"weir.dev/appport\"; did you mean \"weir.dev/app-port\"?"
            ]
        );
    }
}
