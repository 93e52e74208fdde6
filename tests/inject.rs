//! `weir inject` on manifests as people have them. Each `tests/inject/NAME.yaml` has what comes out beside it, in `NAME.injected.yaml`, and what is
//! said, in `NAME.said`. `WEIR_GOLDEN=write cargo test --test inject` writes them anew. Options stand in a first line that begins with
//! `# weir inject`.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value};
use weir::config;

/// What a run of `weir inject` gave.
struct Done {
    ok: bool,
    out: String,
    said: String,
}

fn weir(arguments: &[&str], text: &str) -> Done {
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .arg("inject")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let text = text.to_owned();
    // Of its own: a pipe holds 64 KiB.
    let writer = std::thread::spawn(move || drop(input.write_all(text.as_bytes())));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Done {
        ok: output.status.success(),
        out: String::from_utf8(output.stdout).unwrap(),
        said: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A manifest of `tests/inject`.
struct Case {
    path: PathBuf,
    text: String,
}

impl Case {
    fn name(&self) -> String {
        self.path.file_stem().unwrap().to_str().unwrap().to_owned()
    }

    fn options(&self) -> Vec<&str> {
        let first = self.text.lines().next().unwrap_or_default();
        let options = first.strip_prefix("# weir inject").unwrap_or_default();
        options.split_whitespace().collect()
    }

    fn inject(&self) -> Done {
        weir(&self.options(), &self.text)
    }
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/inject");
    let mut paths: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.to_str().unwrap();
            name.ends_with(".yaml") && !name.ends_with(".injected.yaml")
        })
        .collect();
    paths.sort();
    let read = |path: PathBuf| Case {
        text: fs::read_to_string(&path).unwrap(),
        path,
    };
    paths.into_iter().map(read).collect()
}

/// Those that come out.
fn fit() -> impl Iterator<Item = (Case, Done)> {
    let done = cases().into_iter().map(|case| {
        let done = case.inject();
        (case, done)
    });
    done.filter(|(_, done)| done.ok)
}

/// The objects of a text, as another YAML reader has them.
fn objects(text: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
    documents
        .into_iter()
        .filter(|value| !value.is_null())
        .flat_map(|value| match value["items"].as_array() {
            Some(items) => items.clone(),
            None => vec![value],
        })
        .collect()
}

/// The pods and templates of pods of a text.
fn pods(text: &str) -> Vec<Value> {
    let of = |object: Value| {
        let places = [
            "/spec/jobTemplate/spec/template",
            "/spec/template",
            "/template",
            "",
        ];
        let mut found = places.iter().filter_map(|place| object.pointer(place));
        found
            .find(|pod| pod["spec"]["containers"].is_array())
            .cloned()
    };
    objects(text).into_iter().filter_map(of).collect()
}

fn containers(pod: &Value, list: &str) -> Vec<Value> {
    pod["spec"][list].as_array().cloned().unwrap_or_default()
}

fn weir_in(pod: &Value) -> Option<Value> {
    let all = [
        containers(pod, "initContainers"),
        containers(pod, "containers"),
    ];
    let mut all = all.into_iter().flatten();
    all.find(|container| container["name"] == "weir")
}

#[test]
fn golden_files_hold() {
    let write = std::env::var("WEIR_GOLDEN").is_ok_and(|value| value == "write");
    let mut wrong = Vec::new();
    for case in cases() {
        let done = case.inject();
        let injected = case.path.with_extension("injected.yaml");
        let said = case.path.with_extension("said");
        if write {
            fs::write(&said, &done.said).unwrap();
            match done.ok && done.out != case.text {
                true => fs::write(&injected, &done.out).unwrap(),
                false => drop(fs::remove_file(&injected)),
            }
            continue;
        }
        // Where nothing changes, there is none.
        let wanted = match (fs::read_to_string(&injected), done.ok) {
            (Ok(wanted), _) => wanted,
            (Err(_), true) => case.text.clone(),
            (Err(_), false) => String::new(),
        };
        if done.out != wanted || fs::read_to_string(&said).unwrap_or_default() != done.said {
            wrong.push(case.name());
        }
    }
    assert!(
        wrong.is_empty(),
        "see `WEIR_GOLDEN=write cargo test --test inject && git diff` for {wrong:?}"
    );
}

#[test]
fn injected_twice_is_injected_once() {
    for (case, once) in fit() {
        let twice = weir(&case.options(), &once.out);
        assert!(twice.ok, "{}: {}", case.name(), twice.said);
        assert_eq!(twice.out, once.out, "{}", case.name());
    }
}

#[test]
fn what_is_injected_can_be_taken_out() {
    for (case, done) in fit() {
        let out = weir(&["--uninject"], &done.out);
        assert!(out.ok, "{}: {}", case.name(), out.said);
        assert_eq!(objects(&out.out), objects(&case.text), "{}", case.name());
        if !done.said.contains("is lost") {
            assert_eq!(comments(&out.out), comments(&case.text), "{}", case.name());
        }
    }
}

fn comments(text: &str) -> Vec<&str> {
    let comment = |line| Some(str::split_once(line, "# ")?.1);
    text.lines().filter_map(comment).collect()
}

#[test]
fn comments_stay_or_are_told_to_be_lost() {
    for (case, done) in fit() {
        let is_meant = case.name() == "anchor-of-what-changes";
        assert_eq!(done.said.contains("is lost"), is_meant, "{}", case.name());
        if !done.said.contains("is lost") {
            assert_eq!(comments(&done.out), comments(&case.text), "{}", case.name());
        }
    }
}

#[test]
fn nothing_comes_out_where_one_is_unfit() {
    for case in cases() {
        let done = case.inject();
        if !done.ok {
            assert_eq!(done.out, "", "{}", case.name());
            assert!(done.said.starts_with("error: "), "{}", done.said);
        }
    }
}

#[test]
fn json_says_the_same_as_yaml() {
    for (case, done) in fit() {
        let options = [case.options(), vec!["-o", "json"]].concat();
        let json = weir(&options, &case.text).out;
        assert!(serde_json::from_str::<Value>(&json).is_ok(), "{json}");
        assert_eq!(objects(&json), objects(&done.out), "{}", case.name());
        // What comes in as JSON goes out as JSON.
        let was_json = serde_json::from_str::<Value>(&case.text).is_ok();
        assert!(!was_json || serde_json::from_str::<Value>(&done.out).is_ok());
    }
}

#[test]
fn a_list_among_documents_is_its_objects_in_json() {
    let list = "kind: List\napiVersion: v1\nitems: [{kind: A}, {kind: B}]\n---\nkind: C\n";
    let done = weir(&["-o", "json"], list);
    let made: Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(
        made["items"],
        serde_json::json!([{"kind": "A"}, {"kind": "B"}, {"kind": "C"}])
    );
}

/// The configuration of a pod's weir, where the text has it.
fn configuration(pod: &Value, beside: &[Value]) -> Option<String> {
    let volumes = pod["spec"]["volumes"].as_array()?;
    let volume = volumes
        .iter()
        .find(|volume| volume["name"] == "weir-config")?;
    let text = match volume["configMap"]["name"].as_str() {
        Some(name) => {
            let is_it = |object: &&Value| {
                object["kind"] == "ConfigMap" && object["metadata"]["name"] == name
            };
            &beside.iter().find(is_it)?["data"]["weir.yaml"]
        }
        None => &pod["metadata"]["annotations"]["weir.dev/config-inline"],
    };
    text.as_str().map(str::to_owned)
}

#[test]
fn what_weir_is_configured_by_is_right_and_agrees_with_the_pod() {
    let (mut seen, mut shared) = (0, 0);
    for (case, done) in fit() {
        for pod in pods(&done.out) {
            let Some(container) = weir_in(&pod).filter(|it| it["env"].is_array()) else {
                continue;
            };
            let Some(text) = configuration(&pod, &objects(&done.out)) else {
                continue;
            };
            let env: Map<String, Value> = container["env"]
                .as_array()
                .unwrap()
                .iter()
                .map(|entry| {
                    let name = entry["name"].as_str().unwrap().to_owned();
                    let field = &entry["valueFrom"]["fieldRef"]["fieldPath"];
                    let value = match field.as_str() {
                        Some("metadata.namespace") => "default".into(),
                        Some(_) | None => entry["value"].clone(),
                    };
                    (name, value)
                })
                .collect();
            let told = |name: &str| env.get(name)?.as_str().map(str::to_owned);
            let config = config::check::parse(&text, &told);
            let config = config.unwrap_or_else(|wrong| panic!("{}: {wrong:?}", case.name()));
            let declared: Vec<_> = container["ports"]
                .as_array()
                .unwrap()
                .iter()
                .map(|port| port["containerPort"].as_u64().unwrap())
                .collect();
            let metrics = config.metrics_address.unwrap();
            assert_eq!(declared[1], u64::from(metrics.port()));
            assert_eq!(
                told("WEIR_ADMIN_PORT").unwrap(),
                config.admin.address.port().to_string()
            );
            assert!(config.admin.address.ip().is_loopback());
            // What one file keeps in Redis for several workloads is each one's own.
            if let Some(redis) = &config.redis {
                assert_eq!(redis.key_prefix, "weir/default/shop");
                shared += 1;
            }
            let grace = pod["spec"]["terminationGracePeriodSeconds"]
                .as_u64()
                .unwrap_or(30);
            let ends = (config.propagation_delay + config.drain).as_secs();
            assert!(ends <= grace, "{}", case.name());
            seen += 1;
        }
    }
    assert!(seen >= 20 && shared == 1, "{seen} {shared}");
}

#[test]
fn an_injected_pod_meets_the_restricted_standard_but_for_the_redirect_step() {
    for (case, done) in fit() {
        for pod in pods(&done.out) {
            let redirect = containers(&pod, "initContainers")
                .into_iter()
                .find(|container| container["name"] == "weir-redirect");
            for container in weir_in(&pod).into_iter().chain(redirect) {
                if container["env"].is_null() && container["name"] == "weir" {
                    continue; // Put in by hand.
                }
                let context = &container["securityContext"];
                let step = container["name"] == "weir-redirect";
                assert_eq!(
                    context["allowPrivilegeEscalation"],
                    false,
                    "{}",
                    case.name()
                );
                assert_eq!(context["readOnlyRootFilesystem"], true);
                assert_eq!(context["runAsNonRoot"], !step);
                assert_eq!(context["capabilities"]["drop"][0], "ALL");
                assert_eq!(context["capabilities"]["add"].is_null(), !step);
                assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault");
                for request in ["cpu", "memory"] {
                    assert!(container["resources"]["requests"][request].is_string());
                }
            }
        }
    }
}

/// Kubernetes tells it to end by SIGTERM once the app has ended: by then, whoever kept a connection must have left.
#[test]
fn a_native_sidecar_has_its_clients_leave_as_the_pod_begins_to_end() {
    let mut seen = 0;
    for (case, done) in fit() {
        for container in pods(&done.out).iter().filter_map(weir_in) {
            if container["env"].is_null() {
                continue; // Put in by hand.
            }
            let told = &container["lifecycle"]["preStop"]["exec"]["command"];
            let wanted = match container["restartPolicy"] == "Always" {
                true => serde_json::json!(["weir", "drain", "-c", "/etc/weir/config/weir.yaml"]),
                false => Value::Null,
            };
            assert_eq!(*told, wanted, "{}", case.name());
            seen += 1;
        }
    }
    assert!(seen >= 20, "{seen}");
}

/// Kubernetes finds the port that a name stands for in the containers first, and in init containers from 1.32 alone.
#[test]
fn names_of_ports_lead_to_weir_and_probes_to_the_app() {
    let mut seen = 0;
    for (case, done) in fit() {
        for (before, after) in pods(&case.text).iter().zip(pods(&done.out)) {
            let Some(container) = weir_in(&after).filter(|it| it["env"].is_array()) else {
                continue;
            };
            let redirected = after["metadata"]["annotations"]["weir.dev/mode"] == "redirect";
            let told = |name: &str| {
                let env = container["env"].as_array().unwrap();
                let entry = env.iter().find(|entry| entry["name"] == name)?;
                entry["value"].as_str()?.parse::<u64>().ok()
            };
            if redirected {
                continue;
            }
            let (app, weir) = (told("WEIR_APP_PORT").unwrap(), told("WEIR_PORT").unwrap());
            for old in containers(before, "containers") {
                let now = containers(&after, "containers")
                    .into_iter()
                    .find(|now| now["name"] == old["name"])
                    .unwrap();
                for port in old["ports"].as_array().into_iter().flatten() {
                    let Some(name) = port["name"].as_str() else {
                        continue;
                    };
                    let was = port["containerPort"].as_u64().unwrap();
                    let leads = if was == app { weir } else { was };
                    assert_eq!(
                        resolve(&now, &port["name"]),
                        Some(leads),
                        "{} {name}",
                        case.name()
                    );
                    seen += 1;
                }
                for probe in ["readinessProbe", "livenessProbe", "startupProbe"] {
                    for kind in ["httpGet", "tcpSocket", "grpc"] {
                        assert_eq!(
                            resolve(&now, &now[probe][kind]["port"]),
                            resolve(&old, &old[probe][kind]["port"]),
                            "{} {probe}",
                            case.name()
                        );
                    }
                }
            }
        }
    }
    assert!(seen >= 10, "{seen}");
}

/// The number of a port of a container, by number or name.
fn resolve(container: &Value, port: &Value) -> Option<u64> {
    let name = match port {
        Value::String(name) => name,
        number => return number.as_u64(),
    };
    let ports = container["ports"].as_array()?;
    let port = ports.iter().find(|port| port["name"] == name.as_str())?;
    port["containerPort"].as_u64()
}

/// A selector may name it, and then a ReplicaSet lets go of each pod that has another value, and makes the next.
#[test]
fn a_label_that_says_yes_already_stays_as_it_is() {
    for said in ["true", "enabled"] {
        let pod = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a, labels: {{weir.dev/inject: '{said}'}}}}, \
             spec: {{containers: [{{name: a, ports: [{{containerPort: 80}}]}}]}}}}"
        );
        let done = weir(&[], &pod);
        assert!(done.said.contains("injected"), "{}", done.said);
        let label = &pods(&done.out)[0]["metadata"]["labels"]["weir.dev/inject"];
        assert_eq!(label, said);
    }
}

#[test]
fn lists_that_are_none_and_maps_that_are_none_are_told() {
    let selected = "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {a: b}}, spec: {containers: [{name: a, ports: [{containerPort: 80}]}]}}";
    for (key, metadata, spec) in [
        ("metadata.annotations", "annotations: [x]", ""),
        ("metadata.annotations", "annotations: x", ""),
        ("metadata.labels", "labels: [x]", ""),
        ("spec.volumes", "", "volumes: {}, "),
        ("spec.initContainers", "", "initContainers: {a: b}, "),
        ("spec.initContainers", "", "initContainers: x, "),
    ] {
        let pod = format!(
            "{{metadata: {{{metadata}}}, spec: {{{spec}containers: [{{name: a, ports: [{{containerPort: 80}}]}}]}}}}"
        );
        let text = format!(
            "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: a}}, spec: {{template: {pod}}}}}"
        );
        let wanted = format!("error: Deployment a: spec.template.{key}: no ");
        let done = weir(&[], &text);
        assert!(done.said.starts_with(&wanted), "{text}: {}", done.said);
    }
    for (text, wanted) in [
        ("{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}, spec: [x]}".to_owned(), "error: Deployment a: spec.template.spec.containers: missing"),
        ("{apiVersion: v1, kind: Pod, metadata: [x], spec: {containers: [{ports: [{containerPort: 80}]}]}}".to_owned(), "error: Pod without a name: metadata: no map"),
        (
            format!("{selected}\n---\n{{apiVersion: v1, kind: Service, metadata: {{name: a, annotations: [x]}}, spec: {{selector: {{a: b}}, ports: [{{port: 80}}]}}}}"),
            "error: Service a: metadata.annotations: no map",
        ),
    ] {
        let done = weir(&[], &text);
        assert!(done.said.starts_with(wanted), "{text}: {}", done.said);
    }
    for malformed in ["spec: [x]", "spec: {template: [x]}", "metadata: [x]"] {
        let text = format!("{{apiVersion: apps/v1, kind: Deployment, {malformed}}}");
        assert!(weir(&["--uninject"], &text).ok, "{text}");
    }
}

#[test]
fn a_broken_text_is_told_with_its_place() {
    let done = weir(&[], "kind: Pod\nspec: [\n");
    assert!(!done.ok && done.out.is_empty());
    assert!(
        done.said.starts_with("error: no YAML: line 2, column 7: "),
        "{}",
        done.said
    );
    let template = weir(&[], "{{ if .Values.on }}\nkind: Pod\n{{ end }}\n");
    assert!(
        template.said.contains("a template must be rendered first"),
        "{}",
        template.said
    );
}

#[test]
fn a_file_is_read_by_its_name() {
    let case = cases()
        .into_iter()
        .find(|case| case.name() == "helm-web")
        .unwrap();
    let named = weir(&[case.path.to_str().unwrap()], "");
    assert_eq!(named.out, case.inject().out);
    let missing = weir(&["/nowhere.yaml"], "");
    assert!(
        missing.said.contains("cannot read /nowhere.yaml"),
        "{}",
        missing.said
    );
}

#[test]
fn the_page_tells_of_every_annotation() {
    let page = include_str!("../docs/inject.md");
    let mut told: Vec<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `weir.dev/")?.split_once('`'))
        .map(|(name, _)| format!("weir.dev/{name}"))
        .collect();
    told.sort();
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: a, annotations: {weir.dev/zzzzzzzzzzzzzzzz: ''}}, \
               spec: {containers: [{name: a, ports: [{containerPort: 80}]}]}}";
    let said = weir(&[], pod).said;
    let (_, known) = said.split_once("known here: ").unwrap();
    let mut known: Vec<_> = known.trim_end().split(", ").map(str::to_owned).collect();
    known.sort();
    assert_eq!(told, known);
}

#[test]
fn the_page_tells_the_defaults_of_the_command() {
    let page = include_str!("../docs/inject.md");
    let help = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["inject", "--help"])
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let default = |option: &str| {
        let (_, of) = help.split_once(&format!("  {option} <")).unwrap();
        let of = of.split("\n      --").next().unwrap();
        let default = of.split_once("[default: ").map(|it| it.1);
        default.map(|it| it.split(']').next().unwrap().to_owned())
    };
    let mut seen = 0;
    for row in page.lines().filter(|line| line.starts_with("| `weir.dev/")) {
        let Some((_, told)) = row.split_once("| `--") else {
            continue;
        };
        let (option, told) = told.split_once("`: ").unwrap();
        let told = told.split([',', '|']).next().unwrap().trim();
        let told = Some(told.trim_matches('`').to_owned()).filter(|told| told != "none");
        assert_eq!(default(&format!("--{option}")), told, "{option}");
        seen += 1;
    }
    assert_eq!(seen, 7);
    for (option, told) in [
        ("--port", "its ports `weir` (9900)"),
        ("--metrics-port", "`weir-metrics` (9902)"),
        ("--admin-port", "The admin port (9901)"),
        ("--uid", "65532 unless `--uid` says otherwise"),
    ] {
        let default = default(option).unwrap();
        assert!(
            told.contains(&default) && page.contains(told),
            "{option}: {default}"
        );
    }
}

#[test]
fn the_configuration_that_the_page_shows_is_the_one_of_a_golden_file() {
    let page = include_str!("../docs/inject.md");
    let (_, shown) = page.split_once("  ```yaml\n").unwrap();
    let (shown, _) = shown.split_once("  ```").unwrap();
    let golden = include_str!("inject/config-map.yaml");
    for line in shown.lines() {
        assert!(golden.contains(line.trim()), "{line}");
    }
}

#[test]
fn breakers_of_weirs_that_each_have_an_app_of_their_own_are_not_shared() {
    let page = include_str!("../docs/inject.md");
    let (_, shown) = page.split_once("  ```yaml\n").unwrap();
    let (shown, _) = shown.split_once("  ```").unwrap();
    let stack = include_str!("../deploy/compose/weir/weir.yaml");
    for text in [shown, &stack.replace("${file:", "${IN:-")] {
        let told = |name: &str| match name {
            "IN" => Some("postgres://weir@db/weir".to_owned()),
            "WEIR_PORT" | "WEIR_APP_PORT" => Some("9900".to_owned()),
            "WEIR_ADMIN_PORT" => Some("9901".to_owned()),
            "WEIR_METRICS_PORT" => Some("9902".to_owned()),
            "WEIR_PROPAGATION_DELAY" | "WEIR_DRAIN" => Some("5s".to_owned()),
            "WEIR_NAMESPACE" | "WEIR_WORKLOAD" => Some("shop".to_owned()),
            _ => None,
        };
        let config = config::check::parse(text, &told).unwrap();
        let scopes: Vec<_> = config
            .upstreams
            .iter()
            .map(|it| it.circuit_breaker.as_ref().unwrap().scope)
            .collect();
        assert_eq!(scopes, [config::breakers::Scope::Local]);
    }
}
