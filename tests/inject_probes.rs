//! What `weir inject` makes, with a weir that runs by it, in front of an app that runs: the file of a pod that has none, and an app's probes in redirect
//! mode.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::TcpListener;
use std::time::Duration;

use harness::peers::Peer;
use harness::process::{Running, file};
use harness::raw;
use harness::servers::Kept;
use harness::{Client, Upstream};
use serde_json::{Value, json};
use weir::inject::{Mode, Namespace, Outcome, Settings, inject_pod};

/// A pod's probes as they were, and a weir that has them.
struct Pod {
    weir: Running,
    /// Where each rewritten probe goes, by container and kind.
    paths: BTreeMap<(String, String), String>,
}

impl Pod {
    fn new(containers: Value) -> Pod {
        Pod::at("127.0.0.1", containers)
    }

    /// As it gets that address.
    fn at(address: &str, containers: Value) -> Pod {
        let mut pod = json!({"metadata": {}, "spec": {"containers": containers}});
        let settings = Settings {
            mode: Mode::Redirect,
            ..Settings::default()
        };
        let outcome = inject_pod(&mut pod, &Namespace::default(), &settings).unwrap();
        assert!(matches!(outcome, Outcome::Injected(_)), "{outcome:?}");
        let mut paths = BTreeMap::new();
        for container in pod["spec"]["containers"].as_array().unwrap() {
            for (kind, probe) in container.as_object().unwrap() {
                if let Some(get) = probe.get("httpGet") {
                    assert_eq!(get["port"], settings.metrics_port);
                    let name = container["name"].as_str().unwrap().to_owned();
                    let path = get["path"].as_str().unwrap().to_owned();
                    paths.insert((name, kind.clone()), path);
                }
            }
        }
        let sidecar = &pod["spec"]["initContainers"][1];
        let env = sidecar["env"].as_array().unwrap();
        let probes = env
            .iter()
            .find(|entry| entry["name"] == "WEIR_APP_PROBES")
            .unwrap();
        let config = file(
            "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:9\n\
             admin: {address: 127.0.0.1:0}\nmetrics: {address: 127.0.0.1:0}\n",
        );
        let by_fields = env.iter().find(|entry| entry["name"] == "WEIR_POD_IP");
        let field = &by_fields.unwrap()["valueFrom"]["fieldRef"]["fieldPath"];
        assert_eq!(field, "status.podIP");
        let variables = [
            ("WEIR_APP_PROBES", probes["value"].as_str().unwrap()),
            ("WEIR_POD_IP", address),
        ];
        let weir = Running::start_as("proxy", config.path(), &variables);
        Pod { weir, paths }
    }

    /// As the kubelet asks.
    fn probe(&self, container: &str, kind: &str) -> (u16, String) {
        let path = &self.paths[&(container.to_owned(), kind.to_owned())];
        let reply = Client::to(self.weir.metrics.as_ref().unwrap()).get(path);
        let body: Value = serde_json::from_str(&reply.body).unwrap();
        let detail = body["detail"].as_str().unwrap_or_default();
        (reply.status, detail.to_owned())
    }
}

fn port(upstream: &Upstream) -> u16 {
    let url = upstream.url();
    url.rsplit_once(':').unwrap().1.parse().unwrap()
}

/// An app that forces HTTPS would send each request round for ever, if the word of the ingress that ends TLS did not reach it.
#[test]
fn what_an_ingress_says_reaches_the_app_by_the_file_that_is_made() {
    let app = Upstream::answering("");
    let ports = json!([{"name": "http", "containerPort": port(&app)}]);
    let mut pod =
        json!({"metadata": {}, "spec": {"containers": [{"name": "web", "ports": ports}]}});
    let settings = Settings::default();
    inject_pod(&mut pod, &Namespace::default(), &settings).unwrap();
    let made = &pod["metadata"]["annotations"]["weir.dev/config-inline"];
    let mut text = made.as_str().unwrap().replace("[::]", "127.0.0.1");
    for port in [settings.port, settings.admin_port, settings.metrics_port] {
        text = text.replace(&format!("127.0.0.1:{port}\""), "127.0.0.1:0\"");
    }
    let config = file(&text);
    let weir = Running::start_as("proxy", config.path(), &[]);
    let said = [
        "X-Forwarded-For: 203.0.113.7, 127.0.0.1",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Host: shop.example",
        "X-Forwarded-Port: 443",
        "X-Real-IP: 203.0.113.7",
        "X-Request-Id: 4711",
    ];
    let sent = said.map(|field| field.trim_end_matches(", 127.0.0.1"));
    assert_eq!(weir.client().send("GET", "/", &sent, "").status, 200);
    let head = app.wait_for_request().to_lowercase();
    for field in said {
        let line = format!("\r\n{}\r\n", field.to_lowercase());
        assert!(head.contains(&line), "{field}: {head}");
    }
}

#[test]
fn a_probe_by_http_asks_the_app_what_the_kubelet_would_have() {
    let app = Upstream::replying(|head| {
        let status = if head.starts_with("GET /ready?full=1 ") {
            "204 No Content"
        } else {
            "500 Oh"
        };
        format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").replace(
            "Content-Length: 0\r\n",
            match status {
                "204 No Content" => "",
                _ => "Content-Length: 0\r\n",
            },
        )
    });
    let nobody = Kept::new();
    let pod = Pod::new(json!([{"name": "web",
        "ports": [{"name": "http", "containerPort": port(&app)}],
        "readinessProbe": {"httpGet": {"path": "/ready?full=1", "port": "http", "httpHeaders": [{"name": "X-Probe", "value": "kubelet"}]}},
        "livenessProbe": {"httpGet": {"path": "/live", "port": port(&app)}},
        "startupProbe": {"httpGet": {"path": "/", "port": nobody.address.port()}},
    }]));
    assert_eq!(pod.probe("web", "readinessProbe"), (200, String::new()));
    let head = app.wait_for_request().to_lowercase();
    assert!(head.contains("\r\nx-probe: kubelet\r\n"), "{head}");
    assert!(
        head.contains(&format!("\r\nhost: 127.0.0.1:{}\r\n", port(&app))),
        "{head}"
    );
    assert_eq!(
        pod.probe("web", "livenessProbe"),
        (503, "status 500".to_owned())
    );
    let (status, detail) = pod.probe("web", "startupProbe");
    assert!(status == 503 && detail.contains("refused"), "{detail}");
}

#[test]
fn a_probe_by_tcp_fails_where_nobody_listens() {
    let app = Upstream::answering("");
    let nobody = Kept::new();
    let pod = Pod::new(json!([{"name": "web",
        "readinessProbe": {"tcpSocket": {"port": port(&app)}},
        "livenessProbe": {"tcpSocket": {"port": nobody.address.port()}},
    }]));
    assert_eq!(pod.probe("web", "readinessProbe").0, 200);
    assert_eq!(pod.probe("web", "livenessProbe").0, 503);
}

#[test]
fn a_probe_by_grpc_passes_while_the_service_serves() {
    let mut app = Peer::start("grpc_health_server.py", &[]);
    let port: u16 = app.line().parse().unwrap();
    let probe = |service: &str| json!({"grpc": {"port": port, "service": service}});
    let pod = Pod::new(json!([
        {"name": "all", "readinessProbe": {"grpc": {"port": port}}, "startupProbe": probe("shop.v1.Nobody")},
        {"name": "one", "readinessProbe": probe("shop.v1.Cart"), "livenessProbe": probe("shop.v1.Orders")},
    ]));
    assert_eq!(pod.probe("all", "readinessProbe"), (200, String::new()));
    assert_eq!(pod.probe("one", "readinessProbe"), (200, String::new()));
    assert_eq!(
        pod.probe("one", "livenessProbe"),
        (503, "NOT_SERVING".to_owned())
    );
    // NOT_FOUND.
    assert_eq!(
        pod.probe("all", "startupProbe"),
        (503, "grpc-status 5".to_owned())
    );
}

#[test]
fn an_app_that_does_not_answer_fails_its_probe_in_its_time() {
    let app = Upstream::held();
    let pod = Pod::new(json!([{"name": "web",
        "readinessProbe": {"httpGet": {"port": port(&app)}, "timeoutSeconds": 1},
    }]));
    let began = weir::clock::now();
    let answered = pod.probe("web", "readinessProbe");
    assert_eq!(answered, (503, "no answer within 1 s".to_owned()));
    assert!(began.elapsed() < Duration::from_secs(5));
}

/// As the kubelet does: by the last answer, unless it leads to another host.
#[test]
fn redirects_are_followed_while_they_stay_with_the_app() {
    let app = raw::scripted(|mut stream| {
        let Some(head) = raw::read_head(&mut stream) else {
            return;
        };
        let location = match head.split(' ').nth(1).unwrap() {
            "/moved" => "/gone",
            "/away" => "http://elsewhere.test/",
            "/round" => "round",
            "/two" if head.contains("\r\nx-a: 1\r\nx-a: 2\r\n") => "/well",
            "/well" => "",
            _ => return drop(stream.write_all(b"HTTP/1.1 503 Gone\r\nContent-Length: 0\r\n\r\n")),
        };
        let status = if location.is_empty() {
            "200 OK"
        } else {
            "302 Found"
        };
        let answer =
            format!("HTTP/1.1 {status}\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n");
        let _ = stream.write_all(answer.as_bytes());
    });
    let asked = |path: &str| {
        let fields = json!([{"name": "X-A", "value": "1"}, {"name": "X-A", "value": "2"}]);
        let probe = json!({"httpGet": {"port": app.port(), "path": path, "httpHeaders": fields}});
        Pod::new(json!([{"name": "web", "readinessProbe": probe}])).probe("web", "readinessProbe")
    };
    assert_eq!(asked("/moved"), (503, "status 503".to_owned()));
    assert_eq!(asked("/round"), (503, "more than 10 redirects".to_owned()));
    for well in ["/away", "/two"] {
        assert_eq!(asked(well).0, 200, "{well}");
    }
}

#[test]
fn only_the_pods_own_probes_are_asked() {
    let app = Upstream::answering("");
    let pod =
        Pod::new(json!([{"name": "web", "readinessProbe": {"httpGet": {"port": port(&app)}}}]));
    let mut client = Client::to(pod.weir.metrics.as_ref().unwrap());
    for path in [
        "/app-health/web/livez",
        "/app-health/",
        "/app-health/web/readyz/",
        "/live",
        "/v1/limits",
    ] {
        assert_eq!(client.get(path).status, 404, "{path}");
    }
    assert_eq!(
        client
            .send("POST", "/app-health/web/readyz", &[], "")
            .status,
        405
    );
    assert_eq!(pod.weir.admin().get("/app-health/web/readyz").status, 200);
}

#[test]
fn an_app_that_listens_on_the_pods_address_alone_is_asked_there() {
    let app = TcpListener::bind("127.0.0.2:0").unwrap();
    let port = app.local_addr().unwrap().port();
    let containers = json!([{"name": "web", "readinessProbe": {"tcpSocket": {"port": port}}}]);
    let asked = |address| Pod::at(address, containers.clone()).probe("web", "readinessProbe");
    assert_eq!(asked("127.0.0.2").0, 200);
    assert_eq!(asked("127.0.0.1").0, 503);
}

#[test]
fn probes_that_are_none_keep_weir_from_starting() {
    let config =
        file("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:9\nadmin: {address: 127.0.0.1:0}\n");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["proxy", "-c"])
        .arg(config.path())
        .env("WEIR_APP_PROBES", "{\"/a\": 1}")
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("WEIR_APP_PROBES: "), "{said}");
}
