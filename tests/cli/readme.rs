//! What README.md and docs/ promise: their commands are typed, and what they say comes out does.

use super::harness;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command};

use super::harness::eventually;
use super::harness::process::{Echo, Running, file, signal};
use super::harness::tls::Authority;
use super::harness::{Reply, Upstream};
use weir::config;

const README: &str = include_str!("../../README.md");
const CONFIGURATION: &str = include_str!("../../docs/configuration.md");
const COMING_FROM: &str = include_str!("../../docs/coming-from.md");
const LIMITS: &str = include_str!("../../docs/limits.md");
const MACHINE: &str = include_str!("../../docs/machine.md");
const ROLLOUT: &str = include_str!("../../docs/rollout.md");
const SESSIONS: &str = include_str!("../../docs/sessions.md");
const TLS: &str = include_str!("../../docs/tls.md");
const MAKEFILE: &str = include_str!("../../Makefile");

/// The fenced blocks of `text` in `language`, each with what stands from its end to the next such block.
pub(super) fn blocks<'a>(text: &'a str, language: &str) -> Vec<(&'a str, &'a str)> {
    let fence = format!("```{language}\n");
    let parts = text.split(fence.as_str()).skip(1);
    parts
        .map(|part| part.split_once("```\n").unwrap())
        .collect()
}

/// The part of the README under this heading.
fn section(heading: &str) -> &'static str {
    let heading = format!("## {heading}\n");
    let (_, rest) = README.split_once(heading.as_str()).unwrap();
    rest.split("\n## ").next().unwrap()
}

/// Whether `text` is what `shown` shows, where `…` stands for anything, and any white space for any other.
fn reads_as(shown: &str, text: &str) -> bool {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (shown, text) = (words(shown), words(text));
    let parts: Vec<_> = shown.split('…').map(str::trim).collect();
    let (Some(mut rest), Some(last)) = (text.strip_prefix(parts[0]), parts.last()) else {
        return false;
    };
    for part in &parts[1..] {
        match rest.split_once(part) {
            Some((_, behind)) => rest = behind,
            None => return false,
        }
    }
    rest.is_empty() || last.is_empty()
}

/// The demo in a folder of its own, on ports of its own; ended when the test lets go of it.
struct Demo {
    child: Child,
    folder: tempfile::TempDir,
    /// Each port that the README names, and the one in its place.
    ports: [(&'static str, &'static str, u16); 3],
}

impl Demo {
    fn start() -> Demo {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
        symlink(ours, path("config")).unwrap();
        fs::create_dir_all(path("target/debug")).unwrap();
        symlink(env!("CARGO_BIN_EXE_weir"), path("target/debug/weir")).unwrap();
        // Held together for a moment, so that they are three.
        let free = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [port, echo, admin] = free.map(|free| free.local_addr().unwrap().port());
        let ports = [
            ("8080", "WEIR_PORT", port),
            ("3000", "WEIR_ECHO_PORT", echo),
            ("9901", "WEIR_ADMIN_PORT", admin),
        ];
        let child = command(&folder, &ports)
            .arg("config/demo.sh")
            .stdout(File::create(path("said")).unwrap())
            .stderr(File::create(path("log")).unwrap())
            .spawn()
            .unwrap();
        Demo {
            child,
            folder,
            ports,
        }
    }

    /// What the demo told its user so far.
    fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("said")).unwrap()
    }

    /// The README's lines, to this demo's ports.
    fn here(&self, text: &str) -> String {
        self.ports.iter().fold(text.to_owned(), |text, port| {
            text.replace(&format!(":{}", port.0), &format!(":{}", port.2))
        })
    }

    /// What comes out when `lines` are typed.
    fn typed(&self, lines: &str) -> String {
        let mut bash = command(&self.folder, &self.ports);
        let output = bash.args(["-c", &self.here(lines)]).output().unwrap();
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    }

    fn listens(&self) -> bool {
        let ports = self.ports.iter();
        ports
            .map(|port| port.2)
            .any(|port| TcpStream::connect(("127.0.0.1", port)).is_ok())
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Asked, not killed, so that it ends what it started.
        if self.child.try_wait().unwrap().is_none() {
            signal(&self.child, "TERM");
            let _ = self.child.wait();
        }
    }
}

fn command(folder: &tempfile::TempDir, ports: &[(&str, &str, u16)]) -> Command {
    let mut bash = Command::new("bash");
    bash.current_dir(folder)
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("WEIR_LOG")
        .envs(ports.iter().map(|port| (port.1, port.2.to_string())));
    bash
}

#[test]
fn the_quick_start_does_what_it_says() {
    let quick_start = blocks(section("Quick start"), "sh");
    let ((run, _), tries) = quick_start.split_first().unwrap();
    assert_eq!(*run, "make run\n");
    assert!(MAKEFILE.contains("\n\tcargo build\n\t@config/demo.sh\n"));
    let mut demo = Demo::start();
    eventually(|| {
        let log = || fs::read_to_string(demo.folder.path().join("log")).unwrap();
        assert!(demo.child.try_wait().unwrap().is_none(), "{}", log());
        demo.said().contains("metrics")
    });
    let said = demo.said();
    assert_eq!(tries.len(), 5, "each policy, and the metrics");
    for (lines, behind) in tries {
        for line in lines.lines() {
            assert!(said.contains(&demo.here(line)), "{line}\n{said}");
        }
        let [(shown, _)] = blocks(behind, "text")[..] else {
            panic!("what comes out of {lines}?")
        };
        if lines.contains("weir audit") {
            // Written within moments, not at once.
            eventually(|| reads_as(shown, &demo.typed(lines)));
            continue;
        }
        let typed = demo.typed(lines);
        assert!(reads_as(shown, &typed), "{lines}\n{typed}");
    }
    signal(&demo.child, "TERM");
    assert_eq!(demo.child.wait().unwrap().code(), Some(0));
    assert!(!demo.listens(), "nothing is left behind");
}

#[test]
fn a_demo_whose_port_is_taken_says_which_and_how_to_choose_another() {
    let mut first = Demo::start();
    eventually(|| first.said().contains("metrics"));
    let said = first.typed("config/demo.sh");
    let taken = format!("port {} is taken", first.ports[0].2);
    assert!(
        said.contains(&taken) && said.contains("make run WEIR_PORT="),
        "{said}"
    );
    assert!(
        first.child.try_wait().unwrap().is_none(),
        "the first one stays"
    );
}

/// Accepts `yaml`, with secrets for those that it takes from files.
pub(super) fn check(yaml: &str) {
    let secret = file("secret");
    let mut text = String::new();
    for (index, part) in yaml.split("${file:").enumerate() {
        match part.split_once('}') {
            Some((_, behind)) if index > 0 => {
                text.push_str(&format!("${{file:{}}}{behind}", secret.path().display()));
            }
            Some(_) | None => text.push_str(part),
        }
    }
    let authority = Authority::new();
    for name in ["tls", "other", "c"] {
        authority.issue(name, "DNS:app.svc");
    }
    let folder = authority.folder.path().display();
    let text = text.replace("/tls/", &format!("{folder}/"));
    let config = file(&text);
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["check", "-c"])
        .arg(config.path())
        .envs([
            ("REDIS_PASSWORD", "secret"),
            ("DATABASE_URL", "postgres://weir:secret@primary/weir"),
            ("DATABASE_READ_URL", "postgres://weir:secret@replica/weir"),
            ("AUDIT_KEY", "a secret of more than sixteen bytes"),
            ("ADMIN_TOKEN", "secret"),
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}\n{text}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !said.contains("which many apps take for the same"),
        "{said}"
    );
}

#[test]
fn every_file_that_is_shown_is_accepted() {
    check(&long_form());
    let (short, behind) = CONFIGURATION.split_once("\n## The long form\n").unwrap();
    let (_, behind) = behind.split_once("\n## ").unwrap();
    let pages = [README, short, behind, LIMITS, MACHINE].map(|page| blocks(page, "yaml"));
    let shown = pages.concat();
    assert_eq!(shown.len(), 6);
    for (yaml, _) in shown {
        check(yaml);
    }
    // Within a list, by two spaces.
    let (_, shown) = COMING_FROM.split_once("  ```yaml\n  ").unwrap();
    let (yaml, _) = shown.split_once("  ```\n").unwrap();
    check(&yaml.replace("\n  ", "\n"));
}

/// The blocks of a section each, as the one file that they are.
fn long_form() -> String {
    let (_, behind) = CONFIGURATION.split_once("\n## The long form\n").unwrap();
    let blocks = blocks(behind.split("\n## ").next().unwrap(), "yaml");
    assert!(blocks.len() > 5);
    blocks.into_iter().map(|(yaml, _)| yaml).collect()
}

#[test]
fn values_of_the_long_form_are_defaults_unless_marked() {
    let shown = long_form().replace("${file:", "${IN:-");
    let parse = |text: &str| config::check::parse(text, &|_| None);
    let whole = parse(&shown).unwrap();
    let lines: Vec<_> = shown.lines().collect();
    let (mut defaults, mut wrong) = (0, Vec::new());
    for (at, line) in lines.iter().enumerate() {
        let (key, comment) = line.split_once(" #").unwrap_or((line, ""));
        let has_value = key
            .split_once(": ")
            .is_some_and(|it| !it.1.trim().is_empty());
        if !has_value || key.trim_start().starts_with('#') {
            continue;
        }
        let mut less = lines.clone();
        less[at] = "";
        let less = parse(&less.join("\n"));
        let is_example = comment.contains("example");
        if less.is_ok_and(|less| less == whole) == is_example {
            wrong.push(line);
        }
        defaults += usize::from(!is_example);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(defaults > 80, "{defaults}");
}

#[test]
fn the_second_weir_sends_clients_to_https() {
    let shown = blocks(TLS, "yaml");
    let yaml = shown.iter().find(|(yaml, _)| yaml.contains("redirect:"));
    let yaml = yaml.unwrap().0;
    let yaml = yaml
        .replace("[::]:80", "127.0.0.1:0")
        .replace(":9911", ":0");
    let weir = Running::start(file(&yaml).path());
    let fields = ["Host: shop.example:80"];
    let reply = weir.client().send("GET", "/a?b=c", &fields, "");
    assert_eq!(
        (reply.status, reply.field("location")),
        (308, Some("https://shop.example/a?b=c"))
    );
}

#[test]
fn a_client_over_its_limit_is_told_what_the_limits_page_shows() {
    let echo = Echo::start();
    let (yaml, _) = blocks(LIMITS, "yaml")[0];
    let yaml = yaml
        .replace("127.0.0.1:3000", &echo.address.to_string())
        .replace("127.0.0.1:8080", "127.0.0.1:0");
    let weir = Running::start(file(&format!("{yaml}admin: {{address: 127.0.0.1:0}}\n")).path());
    let mut client = weir.client();
    assert!((0..5).all(|_| client.get("/").status == 200));
    let reply = client.get("/");
    let [(shown, _)] = blocks(LIMITS, "http")[..] else {
        panic!("an answer")
    };
    let (head, body) = shown.split_once("\n\n").unwrap();
    assert_eq!((reply.status, reply.body.trim()), (429, body.trim()));
    for line in head.lines().skip(1) {
        let (name, value) = line.split_once(": ").unwrap();
        let told = reply.field(&name.to_ascii_lowercase()).unwrap();
        match name {
            // Of twelve seconds, with up to a tenth more.
            "Retry-After" => assert!((11..=14).contains(&told.parse::<u64>().unwrap()), "{told}"),
            _ => assert_eq!(told, value, "{name}"),
        }
    }
}

#[test]
fn a_line_of_the_access_log_has_the_fields_that_the_page_shows() {
    let echo = Echo::start();
    let mut weir = Running::start(
        file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: '127.0.0.1:0'}}\ntelemetry: {{access_log: {{format: json}}, traces: {{}}}}\n\
             upstreams: {{app: {{endpoints: 'http://{}', circuit_breaker: one}}}}\ncircuit_breakers: {{one: {{}}}}\n\
             rate_limits: {{few: {{limit: 0/s, by: client.ip}}}}\nsessions: {{web: {{token: [{{bearer: true}}]}}}}\n\
             routes: [{{match: {{path: /few}}, upstream: app, rate_limits: [few]}}, {{upstream: app, session: {{use: web}}}}]\n",
            echo.address
        ))
        .path(),
    );
    let lines = weir.output();
    let json = ["Host: localhost", "Content-Type: application/json"];
    let session = weir
        .admin()
        .send("POST", "/v1/sessions", &json, r#"{"user": "ann"}"#);
    let session: serde_json::Value = serde_json::from_str(&session.body).unwrap();
    let bearer = format!(
        "Authorization: Bearer {}",
        session["token"].as_str().unwrap()
    );
    let fields = [bearer.as_str(), "User-Agent: test/1"];
    let mut client = weir.client();
    assert_eq!(client.send("GET", "/?a=b", &fields, "").status, 200);
    assert_eq!(client.get("/few").status, 429);
    let mut names = std::collections::BTreeSet::new();
    for _ in 0..2 {
        let line = lines.recv_timeout(harness::DEADLINE).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        names.extend(line.as_object().unwrap().keys().cloned());
    }
    let (_, page) = CONFIGURATION.split_once("\n## The access log\n").unwrap();
    let page = page.split("\n## ").next().unwrap();
    let [(shown, behind)] = blocks(page, "json")[..] else {
        panic!("a line")
    };
    let shown: serde_json::Value = serde_json::from_str(shown).unwrap();
    let shown = shown.as_object().unwrap().keys().cloned();
    let shown = shown.chain(["label", "trace_id"].map(str::to_owned));
    assert_eq!(names, shown.collect());
    let explained = |name: &String| behind.contains(&format!("`{name}`"));
    let unexplained: Vec<_> = names.iter().filter(|name| !explained(name)).collect();
    assert!(unexplained.is_empty(), "{unexplained:?}");
}

#[test]
fn a_preflight_reaches_the_app_as_the_configuration_s_page_shows() {
    let app = Upstream::replying(|head| {
        let allow = "Access-Control-Allow-Origin: https://shop.example";
        let method = head.split(' ').next().unwrap();
        format!("HTTP/1.1 200 OK\r\n{allow}\r\nX-Method: {method}\r\nContent-Length: 0\r\n\r\n")
    });
    let shown = blocks(CONFIGURATION, "yaml");
    let yaml = shown.iter().find(|(yaml, _)| yaml.contains("[OPTIONS]}"));
    let yaml = yaml.unwrap().0.replace("http://127.0.0.1:3000", &app.url());
    let yaml = yaml.replace("0.0.0.0:8080", "127.0.0.1:0");
    let weir = Running::start(file(&format!("{yaml}admin: {{address: 127.0.0.1:0}}\n")).path());
    let fields = [
        "Origin: https://shop.example",
        "Access-Control-Request-Method: GET",
    ];
    let mut client = weir.client();
    let reply = client.send("OPTIONS", "/api/cart", &fields, "");
    assert_eq!(
        (reply.status, reply.field("x-method")),
        (200, Some("OPTIONS"))
    );
    assert!(
        reply.field("access-control-allow-origin").is_some(),
        "{reply:?}"
    );
    assert_eq!(client.get("/api/cart").status, 401);
}

/// Each is a part of a file with an app, its sessions and routes.
#[test]
fn every_step_of_a_rollout_is_accepted() {
    let shown = blocks(ROLLOUT, "yaml");
    assert_eq!(shown.len(), 3);
    for (yaml, _) in shown {
        let routes = "routes: [{upstream: app, session: {use: web}, rate_limits: [per_user]}]\n";
        let routes = if yaml.contains("routes:") { "" } else { routes };
        let breaker = if yaml.contains("circuit_breakers:") {
            ", circuit_breaker: standard"
        } else {
            ""
        };
        check(&format!(
            "listen: 127.0.0.1:8080\nupstreams: {{app: {{endpoints: \"http://127.0.0.1:3000\"{breaker}}}}}\n\
             sessions: {{web: {{token: [{{cookie: sid}}]}}}}\n{yaml}{routes}"
        ));
    }
}

#[test]
fn what_the_readme_says_is_not_there_is_not() {
    let with = |route: &str| {
        let text = format!(
            "listeners: [{{name: in, address: '127.0.0.1:0'}}]\nupstreams: {{app: {{endpoints: 'http://127.0.0.1:1'}}, b: {{endpoints: 'http://127.0.0.1:1'}}}}\n\
             rate_limits: {{few: {{limit: 5/m, by: client.ip, overrides: {{'127.0.0.1': 0/s}}}}}}\nadmin: {{address: '127.0.0.1:0'}}\nroutes: [{{{route}}}]\n"
        );
        file(&text)
    };
    for route in [
        "match: {listener: in}, upstream: app",
        "match: {query: {a: b}}, upstream: app",
        "match: {cookies: {a: b}}, upstream: app",
        "match: {client.ip: 10.0.0.0/8}, upstream: app",
        "match: {path: '~ ^/a'}, upstream: app",
        "match: {path: '/a/*/b'}, upstream: app",
        "upstream: {app: 90, b: 10}",
        "upstream: app, mirror: b",
        "upstream: app, max_body: 1GiB",
        "upstream: app, fault: {delay: 1s}",
        "upstream: app, delay: 1s",
        "upstream: app, limit_rate: 1MiB",
        "upstream: app, basic_auth: {ann: secret}",
        "upstream: app, auth_request: b",
        "upstream: app, buffer: 1MiB",
        "root: /srv",
        "upstream: app, error_page: {status: 429, body: slow down}",
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["check", "-c"])
            .arg(with(route).path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{route}: {output:?}");
    }
    let weir = Running::start(with("upstream: app, rate_limits: [few]").path());
    assert_eq!(weir.client().get("/").status, 429);
}

#[test]
fn the_forwarding_fields_that_an_app_gets_are_those_of_the_readme() {
    let echo = Echo::start();
    let weir = Running::start(
        file(&format!(
            "listen: 127.0.0.1:0\nadmin: {{address: '127.0.0.1:0'}}\nupstreams: {{app: {{endpoints: 'http://{}'}}}}\n\
             routes: [{{match: {{path: /shop}}, upstream: app, rewrite: {{host: shop.example}}}}, {{upstream: app}}]\n",
            echo.address
        ))
        .path(),
    );
    let forwarded = |path: &str| {
        let reply = weir.client().get(path);
        let seen: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
        let names = seen["headers"].as_object().unwrap().keys();
        let mut names: Vec<_> = names
            .filter(|name| name.starts_with("x-forwarded-"))
            .cloned()
            .collect();
        names.sort();
        names
    };
    assert_eq!(forwarded("/"), ["x-forwarded-for", "x-forwarded-proto"]);
    assert_eq!(
        forwarded("/shop"),
        ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"]
    );
}

#[test]
fn make_image_builds_both_images_that_are_injected() {
    let version = env!("CARGO_PKG_VERSION");
    let labelled = format!(" --build-arg VERSION={version} ");
    let made = |image: &str| {
        let asked = ["-n", "image", "ENGINE=engine"].into_iter();
        let image = format!("IMAGE={image}");
        let image = Some(image.as_str()).filter(|image| !image.ends_with('='));
        let output = Command::new("make")
            .args(asked.chain(image))
            .env_remove("MAKEFLAGS")
            .env_remove("IMAGE")
            .env_remove("REDIRECT_IMAGE")
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let images = said.lines().filter_map(|line| {
            let (options, image) = line.split_once(" -t ")?;
            assert!(line.contains(&labelled), "{line}");
            let target = options.contains(" --target redirect");
            Some((target, image.split(' ').next()?.to_owned()))
        });
        images.collect::<Vec<_>>()
    };
    let both = |weir: String, redirect: String| [(false, weir), (true, redirect)];
    let unless_told = both(
        format!("weir:{version}"),
        format!("weir-redirect:{version}"),
    );
    assert_eq!(made(""), unless_told);
    let named = both(
        "r.org:5000/a/weir".into(),
        "r.org:5000/a/weir-redirect".into(),
    );
    assert_eq!(made("r.org:5000/a/weir"), named);
}

#[test]
fn the_image_that_is_named_has_this_version() {
    for text in [
        include_str!("../../deploy/docker-compose.production.yml"),
        include_str!("../../docs/docker.md"),
        include_str!("../../docs/inject.md"),
        include_str!("../../docs/kubernetes.md"),
    ] {
        let named = text.split("weir:").skip(1).map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
            &rest[..end.unwrap_or(rest.len())]
        });
        // Others are ports.
        let tags: Vec<_> = named.filter(|named| named.contains('.')).collect();
        assert!(!tags.is_empty());
        for tag in tags {
            assert_eq!(tag, env!("CARGO_PKG_VERSION"));
        }
    }
}

#[test]
fn the_notices_of_all_crates_are_gathered() {
    let output = Command::new("deploy/third-party.sh")
        .arg("--offline")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let notices = String::from_utf8_lossy(&output.stdout);
    let (_, dependencies) = include_str!("../../Cargo.toml")
        .split_once("\n[dependencies]\n")
        .unwrap();
    let dependencies = dependencies.lines().take_while(|line| !line.is_empty());
    for crate_name in dependencies.map(|line| line.split(' ').next().unwrap()) {
        assert!(
            notices.contains(&format!("\n{crate_name} ")),
            "{crate_name}"
        );
    }
    for text in [
        "Copyright (c) Tokio Contributors",
        "Redistribution and use in source",
    ] {
        assert!(notices.contains(text), "{text}");
    }
}

#[test]
fn the_files_that_come_with_weir_are_accepted_and_not_gone_round() {
    check(include_str!("../../config/production.yaml"));
    check(include_str!("../../config/weir.yaml"));
    let of_database = |text: &str| {
        let text = text.replace("${file:/etc/weir/secrets/database-url}", "${DATABASE_URL}");
        let text = text.replace("${file:/run/secrets/database-url}", "${DATABASE_URL}");
        check(&text.replace(
            "${file:/run/secrets/database-read-url}",
            "${DATABASE_READ_URL}",
        ));
    };
    of_database(include_str!("../../deploy/compose/weir/weir.yaml"));
    let (_, map) = include_str!("../../deploy/k8s/03-configmap.yaml")
        .split_once("  weir.yaml: |\n")
        .unwrap();
    of_database(&format!("\n{map}").replace("\n    ", "\n"));
    for (yaml, _) in blocks(SESSIONS, "yaml") {
        check(yaml);
    }
}

#[test]
fn a_log_in_and_a_log_out_go_as_the_sessions_page_shows() {
    let [(login, _), (logged_in, _), (logout, _), (logged_out, _)] = blocks(SESSIONS, "http")[..]
    else {
        panic!("an answer of the app and what becomes of it, twice")
    };
    let app = Upstream::replying(move |head| {
        let answer = match head.split(' ').nth(1).unwrap() {
            "/login" => login,
            "/logout" => logout,
            _ => "HTTP/1.1 200 OK\n",
        };
        format!("{answer}Content-Length: 0\n\n").replace('\n', "\r\n")
    });
    let [(yaml, _)] = blocks(SESSIONS, "yaml")[..] else {
        panic!("a file")
    };
    let yaml = yaml.replace("http://127.0.0.1:3000", &app.url());
    let own = "admin: {address: 127.0.0.1:0}\n";
    let run = |yaml: &str| {
        let yaml = yaml.replace("127.0.0.1:8080", "127.0.0.1:0");
        Running::start(file(&format!("{yaml}{own}")).path())
    };
    let told = |reply: &Reply, shown: &str| {
        assert_eq!(reply.status, 200);
        let mut fields = shown.lines().skip(1);
        let has = |shown: &str| {
            let (name, value) = shown.split_once(": ").unwrap();
            let told = reply.field(&name.to_ascii_lowercase());
            told.is_some_and(|told| reads_as(value, told))
        };
        assert!(fields.all(has), "{shown}\n{reply:?}");
        let named = |(name, _): &(String, String)| name.starts_with("x-weir-session-");
        assert!(!reply.fields.iter().any(named), "{reply:?}");
    };
    let weir = run(&yaml);
    let mut client = weir.client();
    let reply = client.get("/login");
    told(&reply, logged_in);
    let cookie = reply.field("set-cookie").unwrap().split(';').next();
    let cookie = format!("Cookie: {}", cookie.unwrap());
    let account = |client: &mut harness::Client| {
        let reply = client.send("GET", "/account/", &[&cookie], "");
        reply.status
    };
    assert_eq!(account(&mut client), 200);
    told(&client.send("GET", "/logout", &[&cookie], ""), logged_out);
    assert_eq!(account(&mut client), 401);

    let weir = run(&yaml.replace("{cookie: sid}", "{bearer: true}"));
    let reply = weir.client().get("/login");
    assert!(reply.field("x-weir-session-token").is_some(), "{reply:?}");
}

#[test]
fn the_configuration_s_page_has_every_key() {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .arg("schema")
        .output()
        .unwrap();
    let schema = serde_json::from_slice(&output.stdout).unwrap();
    let mut keys = Vec::new();
    collect(&schema, &mut keys);
    assert!(keys.len() > 100, "{keys:?}");
    let shown = blocks(CONFIGURATION, "yaml");
    let has = |key: &str| {
        let key = format!("{key}:");
        shown.iter().any(|(yaml, _)| {
            yaml.match_indices(&key)
                .any(|(at, _)| !yaml[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        })
    };
    let missing: Vec<_> = keys.iter().filter(|key| !has(key)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// The names of all properties of a JSON Schema.
fn collect(schema: &serde_json::Value, keys: &mut Vec<String>) {
    if let Some(properties) = schema["properties"].as_object() {
        keys.extend(properties.keys().cloned());
    }
    let parts = schema
        .as_object()
        .into_iter()
        .flatten()
        .map(|(_, part)| part);
    for part in parts.chain(schema.as_array().into_iter().flatten()) {
        collect(part, keys);
    }
}
