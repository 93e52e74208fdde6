//! What holds of any pod that is injected, and taken back.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

/// A part of a pod that may be there or not.
fn maybe(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Option<Value>> {
    proptest::option::of(value)
}

fn of<const N: usize>(entries: [(&str, Option<Value>); N]) -> Value {
    let entries = entries
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)));
    Value::Object(entries.collect())
}

fn one_of(values: &'static [&str]) -> impl Strategy<Value = Value> {
    proptest::sample::select(values).prop_map(|text| serde_json::from_str(text).unwrap())
}

fn port() -> impl Strategy<Value = Value> {
    let name = maybe(one_of(&[r#""http""#, r#""grpc""#, r#""metrics""#]));
    let protocol = maybe(one_of(&[r#""TCP""#, r#""UDP""#]));
    (name, 8080..8083_u16, protocol, any::<bool>()).prop_map(|(name, number, protocol, on_node)| {
        of([
            ("name", name),
            ("containerPort", Some(json!(number))),
            ("protocol", protocol),
            ("hostPort", on_node.then_some(Value::from(80))),
        ])
    })
}

fn probe() -> impl Strategy<Value = Value> {
    one_of(&[
        r#"{"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 3}"#,
        r#"{"httpGet": {"port": 8081, "host": "example.com"}}"#,
        r#"{"httpGet": {"port": 8080, "scheme": "HTTPS"}}"#,
        r#"{"tcpSocket": {"port": "grpc"}}"#,
        r#"{"grpc": {"port": 8082, "service": null}, "timeoutSeconds": 2}"#,
        r#"{"exec": {"command": ["true"]}}"#,
    ])
}

fn container(name: &'static str) -> impl Strategy<Value = Value> {
    let ports = proptest::collection::vec(port(), 0..3).prop_map(Value::from);
    let hooks = one_of(&[
        r#"{"preStop": {"httpGet": {"port": "http"}}}"#,
        "{}",
        "null",
    ]);
    (maybe(ports), maybe(probe()), maybe(probe()), maybe(hooks)).prop_map(
        move |(ports, readiness, liveness, hooks)| {
            of([
                ("name", Some(json!(name))),
                ("ports", ports),
                ("readinessProbe", readiness),
                ("livenessProbe", liveness),
                ("lifecycle", hooks),
            ])
        },
    )
}

fn annotations() -> impl Strategy<Value = Value> {
    one_of(&[
        r#"{"weir.dev/app-port": "8080"}"#,
        r#"{"weir.dev/app-port": "http", "other": "x"}"#,
        r#"{"weir.dev/mode": "redirect", "weir.dev/app-port": "8081"}"#,
        r#"{"weir.dev/mode": "redirect", "weir.dev/skip-inbound-ports": "8080"}"#,
        r#"{"weir.dev/native-sidecar": "false", "weir.dev/app-port": "8082"}"#,
        r#"{"weir.dev/config": "shop", "kubectl.kubernetes.io/default-container": "b"}"#,
        r#"{"weir.dev/mode": "no"}"#,
        "{}",
        "null",
    ])
}

fn pod() -> impl Strategy<Value = Value> {
    let labels = one_of(&[r#"{"app": "a"}"#, r#"{"weir.dev/inject": "true"}"#, "null"]);
    let metadata = maybe(
        (maybe(labels), maybe(annotations())).prop_map(|(labels, annotations)| {
            of([("labels", labels), ("annotations", annotations)])
        }),
    );
    let volumes = one_of(&[r#"[{"name": "data", "emptyDir": {}}]"#, "[]"]);
    let policy = one_of(&[r#""Always""#, r#""Never""#]);
    let spec = (
        container("a"),
        maybe(container("b")),
        maybe(container("first")),
        maybe(volumes),
        maybe(policy),
        any::<bool>(),
    );
    (metadata, spec).prop_map(|(metadata, (a, b, first, volumes, policy, token))| {
        let containers: Vec<_> = [Some(a), b].into_iter().flatten().collect();
        let spec = of([
            ("containers", Some(json!(containers))),
            ("initContainers", first.map(|first| json!([first]))),
            ("volumes", volumes),
            ("restartPolicy", policy),
            (
                "automountServiceAccountToken",
                token.then_some(Value::Bool(false)),
            ),
        ]);
        of([("metadata", metadata), ("spec", Some(spec))])
    })
}

/// The pod without what means nothing.
fn meaning(value: &Value) -> Value {
    let means = |value: &Value| !value.is_null() && *value != json!({}) && *value != json!([]);
    match value {
        Value::Object(entries) => {
            let entries = entries
                .iter()
                .map(|(key, value)| (key.clone(), meaning(value)));
            Value::Object(
                entries
                    .filter(|(_, value)| means(value))
                    .collect::<Map<_, _>>(),
            )
        }
        Value::Array(items) => items.iter().map(meaning).collect(),
        scalar => scalar.clone(),
    }
}

proptest! {
    #[test]
    fn what_is_injected_is_taken_out_and_what_is_not_stays(before in pod()) {
        let (namespace, settings) = (Namespace::default(), Settings::default());
        let mut after = before.clone();
        match inject_pod(&mut after, &namespace, &settings) {
            Ok(Outcome::Injected(_)) => {
                let once = after.clone();
                let again = inject_pod(&mut after, &namespace, &settings);
                prop_assert_eq!(again, Ok(Outcome::Skipped(Skipped::AlreadyInjected)));
                prop_assert_eq!(&after, &once);
                prop_assert_eq!(uninject_pod(&mut after), Ok(true));
                prop_assert_eq!(meaning(&after), meaning(&before));
                prop_assert_eq!(uninject_pod(&mut after), Ok(false));
            }
            Ok(Outcome::Skipped(_)) | Err(_) => prop_assert_eq!(after, before),
        }
    }
}

fn injected(mut pod: Value) -> Value {
    let outcome = inject_pod(&mut pod, &Namespace::default(), &Settings::default());
    assert!(matches!(outcome, Ok(Outcome::Injected(_))), "{outcome:?}");
    pod
}

#[test]
fn what_a_probe_asks_is_not_taken_for_a_reference_to_the_environment() {
    let probe = json!({"httpGet": {"path": "/$(HOME)", "port": 80, "httpHeaders": [{"name": "X", "value": "pa$$word"}]}});
    let pod = injected(json!({
        "metadata": {"annotations": {"weir.dev/mode": "redirect"}},
        "spec": {"containers": [{"name": "app", "readinessProbe": probe}]},
    }));
    let told = pod["spec"]["initContainers"][1]["env"].as_array().unwrap();
    let probes = told.iter().find(|told| told["name"] == "WEIR_APP_PROBES");
    let text = probes.unwrap()["value"].as_str().unwrap();
    // The kubelet makes one `$` of two, and replaces what stands in `$(…)`.
    assert!(text.contains(r#""/$$(HOME)""#), "{text}");
    assert!(text.contains(r#""pa$$$$word""#), "{text}");
}

#[test]
fn the_longest_grace_period_makes_a_file_that_weir_takes() {
    let pod = injected(json!({"spec": {
        "containers": [{"name": "app", "ports": [{"containerPort": 80}]}],
        "terminationGracePeriodSeconds": i64::MAX,
    }}));
    let text = &pod["metadata"]["annotations"][CONFIG_INLINE];
    let checked = crate::config::check::parse(text.as_str().unwrap(), &|_| None);
    assert!(checked.is_ok(), "{checked:?}");
}
