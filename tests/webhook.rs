//! `weir webhook` as an API server asks it: HTTPS, AdmissionReviews, patches.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test measures is printed"
)]

mod harness;

use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use harness::metrics::value;
use harness::process::{Log, signal};
use harness::tls::{Authority, Tls, TlsClient};
use harness::{Client, DEADLINE, Reply, eventually};
use weir::clock;
use weir::inject::{Namespace, Settings, inject_pod};

/// The name that the API server asks for.
const NAME: &str = "weir-injector.weir.svc";

struct Webhook {
    child: Child,
    authority: Authority,
    address: String,
    admin: String,
}

impl Webhook {
    fn start(options: &[&str]) -> Webhook {
        let authority = Authority::new();
        authority.issue("tls", &format!("DNS:{NAME}"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args([
                "webhook",
                "--address",
                "127.0.0.1:0",
                "--admin",
                "127.0.0.1:0",
            ])
            .args(["--own-namespace", "weir", "--propagation-delay", "2s"])
            .arg("--tls-cert")
            .arg(authority.path("tls.crt"))
            .arg("--tls-key")
            .arg(authority.path("tls.key"))
            .args(options)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let line = Log::of(&mut child).until("reviewing pods");
        let value = |key: &str| {
            let (_, rest) = line.split_once(&format!("{key}=")).unwrap();
            rest.split_whitespace().next().unwrap().to_owned()
        };
        Webhook {
            child,
            address: value("address"),
            admin: value("admin"),
            authority,
        }
    }

    fn tls(&self) -> Tls {
        self.authority.client()
    }

    fn connect(&self) -> TlsClient {
        self.tls().connect(&self.address, NAME)
    }

    /// The response of the review of this request.
    fn review(&self, request: &Value) -> Value {
        reviewed(&mut self.connect(), request)
    }

    fn metric(&self, series: &str) -> f64 {
        let text = Client::to(&self.admin).get("/metrics").body;
        value(&text, series).unwrap_or_else(|| panic!("{series} in {text}"))
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn post(body: &str) -> String {
    format!(
        "POST /inject?timeout=10s HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn body(request: &Value) -> String {
    json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": request})
        .to_string()
}

fn reviewed(client: &mut TlsClient, request: &Value) -> Value {
    let reply = client.try_ask(&post(&body(request))).unwrap();
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.field("content-type"), Some("application/json"));
    let answer: Value = serde_json::from_str(&reply.body).unwrap();
    assert_eq!(answer["apiVersion"], "admission.k8s.io/v1");
    assert_eq!(answer["kind"], "AdmissionReview");
    assert_eq!(answer["response"]["uid"], request["uid"]);
    answer["response"].clone()
}

/// As the API server sends the pod of a Deployment: its name is made behind the webhook.
fn request() -> Value {
    json!({
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
        "requestResource": {"group": "", "version": "v1", "resource": "pods"},
        "name": null,
        "namespace": "shop",
        "operation": "CREATE",
        "userInfo": {"username": "system:serviceaccount:kube-system:replicaset-controller", "groups": ["system:serviceaccounts"]},
        "object": pod(),
        "oldObject": null,
        "dryRun": false,
        "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
    })
}

fn pod() -> Value {
    json!({
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "generateName": "web-6d8f-",
            "labels": {"app": "web", "pod-template-hash": "6d8f"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6d8f", "uid": "1", "controller": true}],
        },
        "spec": {
            "volumes": [{"name": "kube-api-access-x", "projected": {"sources": []}}],
            "initContainers": [{"name": "migrate", "image": "web:1", "args": ["migrate"]}],
            "containers": [{
                "name": "web", "image": "web:1",
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                "readinessProbe": {"httpGet": {"path": "/ready", "port": "http", "scheme": "HTTP"}, "timeoutSeconds": 1},
                "volumeMounts": [{"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true}],
            }],
            "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "serviceAccountName": "default",
        },
        "status": {},
    })
}

/// The pod with the patch of this response.
fn patched(response: &Value) -> Value {
    assert_eq!(response["patchType"], "JSONPatch");
    let patch = STANDARD
        .decode(response["patch"].as_str().unwrap())
        .unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    let mut pod = pod();
    json_patch::patch(&mut pod, &patch).unwrap();
    pod
}

#[test]
fn a_pod_that_is_made_gets_what_weir_inject_gives_it() {
    let webhook = Webhook::start(&["--image", "registry.example/weir:1", "--cpu-request", "70m"]);
    let response = webhook.review(&request());
    assert_eq!(response["allowed"], true);
    let mut injected = pod();
    let settings = Settings {
        image: "registry.example/weir:1".to_owned(),
        cpu_request: "70m".to_owned(),
        ..Settings::default()
    };
    inject_pod(&mut injected, &Namespace::default(), &settings).unwrap();
    let made = patched(&response);
    assert_eq!(made, injected);
    assert_eq!(made["spec"]["initContainers"][0]["name"], "weir");

    // The API server asks again where another webhook has changed the pod.
    let mut again = request();
    again["object"] = made;
    let response = webhook.review(&again);
    assert_eq!(response, json!({"uid": again["uid"], "allowed": true}));

    let mut out = request();
    out["object"]["metadata"]["labels"]["weir.dev/inject"] = json!("false");
    let mut own = request();
    own["namespace"] = json!("weir");
    let mut update = request();
    update["operation"] = json!("UPDATE");
    for request in [out, own, update] {
        let response = webhook.review(&request);
        assert_eq!(response, json!({"uid": request["uid"], "allowed": true}));
    }
    let counted = |outcome: &str| {
        webhook.metric(&format!(
            "weir_webhook_requests_total{{outcome=\"{outcome}\"}}"
        ))
    };
    assert_eq!((counted("injected"), counted("skipped")), (1.0, 4.0));
    assert_eq!(webhook.metric("weir_webhook_duration_seconds_count"), 5.0);
}

#[test]
fn an_unfit_pod_is_warned_of_or_refused() {
    let mut unfit = request();
    unfit["object"]["metadata"]["annotations"] = json!({"weir.dev/app-port": "eighty"});
    let admits = Webhook::start(&[]);
    let admitted = admits.review(&unfit);
    assert_eq!(
        (&admitted["allowed"], &admitted["patch"]),
        (&json!(true), &Value::Null)
    );
    let warning = admitted["warnings"][0].as_str().unwrap();
    for part in ["weir is not injected", "weir.dev/app-port", "eighty"] {
        assert!(warning.contains(part), "{warning}");
    }
    let refuses = Webhook::start(&["--on-unfit", "refuse"]);
    let refused = refuses.review(&unfit);
    assert_eq!(refused["allowed"], false);
    assert_eq!(refused["status"]["message"], warning);
    for webhook in [admits, refuses] {
        let unfit = "weir_webhook_requests_total{outcome=\"unfit\"}";
        assert_eq!(webhook.metric(unfit), 1.0);
    }
}

#[test]
fn a_pod_has_no_file_of_the_webhook_read_and_does_not_hold_it_up() {
    let webhook = Webhook::start(&["--on-unfit", "refuse"]);
    let inline = |route: &str| {
        let mut request = request();
        let text = format!("listen: 0.0.0.0:9900\nroutes: [{{upstream: {route}}}]\n");
        request["object"]["metadata"]["annotations"] = json!({"weir.dev/config-inline": text});
        webhook.review(&request)
    };
    let key = webhook.authority.path("tls.key");
    // Read here, it would be told as the name of an upstream that is not known.
    let unread = inline(&format!("\"\\x24{{file:{}}}\"", key.display()));
    assert_eq!(unread["allowed"], true, "{unread}");
    let message = inline("nowhere")["status"]["message"].to_string();
    assert!(message.contains("nowhere"), "{message}");

    let mut long = request();
    let name = "a".repeat(200_000);
    long["object"]["metadata"]["annotations"] = json!({"weir.dev/app-port": name});
    long["object"]["spec"]["containers"][0]["ports"][0]["name"] = json!(name.replace('a', "b"));
    let began = clock::now();
    assert_eq!(webhook.review(&long)["allowed"], false);
    let took = began.elapsed();
    println!("a review of names of 200 kB took {took:?}");
    assert!(took < DEADLINE / 2, "{took:?}");
}

#[test]
fn what_is_no_review_is_refused_with_the_reason() {
    let webhook = Webhook::start(&[]);
    let ask = |request: &str| -> Reply { webhook.connect().try_ask(request).unwrap() };
    for (sent, status, why) in [
        ("not JSON".to_owned(), 400, "no JSON"),
        ("{}".to_owned(), 400, "not an AdmissionReview"),
        (
            body(&request()).replace("admission.k8s.io/v1", "admission.k8s.io/v1beta1"),
            400,
            "admissionReviewVersions",
        ),
        (body(&json!({"object": {}})), 400, "request.uid"),
        (" ".repeat((3 << 20) + 1), 413, "larger than"),
    ] {
        let reply = ask(&post(&sent));
        assert_eq!(reply.status, status, "{}", reply.body);
        assert!(reply.body.contains(why), "{}", reply.body);
    }
    let get = ask("GET /inject HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!((get.status, get.field("allow")), (405, Some("POST")));
    assert_eq!(ask("GET / HTTP/1.1\r\nHost: x\r\n\r\n").status, 404);
    let errors = "weir_webhook_requests_total{outcome=\"error\"}";
    assert_eq!(webhook.metric(errors), 5.0);
    // A pod that is no pod is unfit, and no reason to fail.
    let mut no_pod = request();
    no_pod["object"] = json!("text");
    assert_eq!(webhook.review(&no_pod)["allowed"], true);
}

/// The chart gives it 128 MiB, and whoever reaches its port may ask.
#[test]
fn reviews_of_whatever_sort_fit_the_memory_that_the_chart_gives() {
    let webhook = Webhook::start(&[]);
    let ask = |request: &Value| {
        let reply = webhook.connect().try_ask(&post(&body(request))).unwrap();
        (reply.status, reply.body)
    };
    let with = |key: &str, value: Value| {
        let mut request = request();
        request["object"]["spec"][key] = value;
        request
    };
    let many = with("volumes", json!(vec![json!({"a": 0}); 370_000]));
    let (status, said) = ask(&many);
    assert!(status == 413 && said.contains("JSON values"), "{said}");

    // Each of these makes more of itself, if every value is told, moved or kept.
    let (long, short) = ("k".repeat(1 << 20), "k".repeat(500));
    let steps: Vec<_> = (0..4500)
        .map(|at| json!({"name": at.to_string(), "image": short}))
        .collect();
    let keyed = |from: u32| json!({ long.as_str(): (from..from + 4000).collect::<Vec<_>>() });
    let ports: Vec<_> = (1..4000)
        .map(|port| json!({"containerPort": port}))
        .collect();
    let annotated = |annotations: Value| {
        let mut request = request();
        request["object"]["metadata"]["annotations"] = annotations;
        request
    };
    let unknown: serde_json::Map<_, _> = (0..15_000)
        .map(|at| (format!("weir.dev/{at}"), json!("")))
        .collect();
    let names: String = (0..32)
        .map(|at| format!("{at:b>1000}: {{limit: 1/s}}, "))
        .collect();
    let used: String = (0..5_000).map(|at| format!("c{at},")).collect();
    let unknown_names = format!(
        "{{listen: '127.0.0.1:1', upstream: 'http://x', rate_limits: {{{names}}}, routes: [{{rate_limits: [{used}]}}]}}"
    );
    let lines: String = (0..30_000).map(|at| format!("a{at}: 1\n")).collect();
    let requests = [
        with("initContainers", json!(steps)),
        with("initContainers", json!([keyed(0), keyed(1)])),
        with("containers", json!([{"name": long, "ports": ports}])),
        annotated(json!(unknown)),
        annotated(json!({"weir.dev/config-inline": lines})),
        annotated(json!({"weir.dev/config-inline": unknown_names})),
        annotated(json!({"weir.dev/config-inline": "[a, ".repeat(60_000)})),
        annotated(json!({"weir.dev/config-inline": "[".repeat(2 << 20)})),
    ];
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for request in &requests {
                    let (status, said) = ask(request);
                    assert_eq!(status, 200, "{said}");
                }
            });
        }
    });
    let status = fs::read_to_string(format!("/proc/{}/status", webhook.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.unwrap().trim().strip_suffix(" kB").unwrap();
    println!("at most {peak} KiB of memory");
    assert!(peak.parse::<u64>().unwrap() < 128 << 10, "{peak}");
}

#[test]
fn who_sends_slowly_keeps_no_review_waiting() {
    let webhook = Webhook::start(&[]);
    let held: Vec<_> = (0..20)
        .map(|_| {
            let mut client = webhook.connect();
            let begun = format!(
                "POST /inject HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 3000000\r\n\r\n{{"
            );
            client.write(&begun).unwrap();
            client
        })
        .collect();
    let began = weir::clock::now();
    webhook.review(&request());
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    drop(held);
}

/// Its answers wait in the webhook's memory.
#[test]
fn who_takes_no_answer_is_dropped() {
    let webhook = Webhook::start(&[]);
    let mut client = webhook.connect();
    let asked = format!(
        "GET /{} HTTP/1.1\r\nHost: {NAME}\r\n\r\n",
        "x".repeat(1_000)
    );
    let asked = asked.repeat(100);
    let (told, ended) = mpsc::channel();
    std::thread::spawn(move || {
        // Until the answers fill all there is between them, and the webhook reads no more.
        while client.write(&asked).is_ok() {}
        told.send(())
    });
    ended.recv_timeout(Duration::from_secs(30)).unwrap();
}

#[test]
fn a_certificate_is_replaced_and_a_stop_comes_with_no_review_lost() {
    let mut webhook = Webhook::start(&[]);
    let first = webhook.connect().shown();
    let ends = || {
        let file = webhook.authority.path("tls.crt");
        let labels = format!("{{certificate=\"{}\"}}", file.display());
        webhook.metric(&format!(
            "weir_tls_certificate_not_after_timestamp_seconds{labels}"
        ))
    };
    let first_ends = ends();
    assert!(first_ends > clock::wall().as_secs_f64(), "{first_ends}");
    let (over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let began = weir::clock::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let request = request();
                // Some connections live on, as the API server's do, and some are new.
                let mut kept = webhook.connect();
                let mut lives = 0;
                while !over.load(Ordering::Relaxed) {
                    let reply = kept.try_ask(&post(&body(&request))).unwrap();
                    assert_eq!(reply.status, 200, "{}", reply.body);
                    done.fetch_add(1, Ordering::Relaxed);
                    lives += 1;
                    if lives == 8 || reply.field("connection") == Some("close") {
                        kept = webhook.connect();
                        lives = 0;
                    }
                }
            });
        }
        // As the kubelet does: one file after the other, so that they do not fit for a moment.
        let sans = format!("DNS:{NAME}");
        webhook.authority.issue_with("next", &sans, "-days 9");
        for file in ["crt", "key"] {
            let next = fs::read(webhook.authority.path(&format!("next.{file}"))).unwrap();
            fs::write(webhook.authority.path(&format!("tls.{file}")), next).unwrap();
        }
        eventually(|| webhook.connect().shown() != first);
        let before = done.load(Ordering::Relaxed);
        eventually(|| done.load(Ordering::Relaxed) > before + 20);
        let loaded = "weir_webhook_certificate_reloads_total{result=\"loaded\"}";
        assert_eq!(webhook.metric(loaded), 1.0);
        assert_eq!((ends() - first_ends).round() as u32 / 86400, 7);

        // Connections are taken for a while yet, but end with their answer.
        let mut kept = webhook.connect();
        reviewed(&mut kept, &request());
        assert_eq!(Client::to(&webhook.admin).get("/ready").status, 200);
        signal(&webhook.child, "TERM");
        eventually(|| Client::to(&webhook.admin).get("/ready").status == 503);
        let before = done.load(Ordering::Relaxed);
        eventually(|| done.load(Ordering::Relaxed) > before + 20);
        assert_eq!(webhook.review(&request())["allowed"], true);
        let last = kept.try_ask(&post(&body(&request()))).unwrap();
        over.store(true, Ordering::Relaxed);
        assert_eq!(
            (last.status, last.field("connection")),
            (200, Some("close"))
        );
    });
    let count = done.load(Ordering::Relaxed);
    println!(
        "{count} reviews, {:.2} ms each of four at a time",
        began.elapsed().as_secs_f64() * 4000.0 / count as f64
    );
    assert!(webhook.child.wait().unwrap().success());
}

#[test]
fn a_certificate_that_cannot_be_read_is_named() {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args([
            "webhook",
            "--tls-cert",
            "/none.crt",
            "--tls-key",
            "/none.key",
        ])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(said.contains("/none.crt"), "{said}");
}

#[test]
fn a_certificate_that_is_gone_is_told_of_and_stays() {
    let webhook = Webhook::start(&[]);
    let first = webhook.connect().shown();
    let (file, aside) = (
        webhook.authority.path("tls.crt"),
        webhook.authority.path("aside"),
    );
    fs::rename(&file, &aside).unwrap();
    let reloads = |result| {
        webhook.metric(&format!(
            "weir_webhook_certificate_reloads_total{{result=\"{result}\"}}"
        ))
    };
    eventually(|| reloads("refused") == 1.0);
    assert!(webhook.connect().shown() == first);
    fs::rename(&aside, &file).unwrap();
    eventually(|| reloads("loaded") == 1.0);
}
