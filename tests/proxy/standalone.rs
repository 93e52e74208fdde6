//! All of weir in one process, with real files and commands: what an operator does, and what an auditor then finds.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use super::harness::Client;
use super::harness::process::{Echo, Running, file};
use serde_json::Value;

fn weir(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(arguments)
        .output()
        .unwrap()
}

/// What a command printed, once it exited 0.
#[track_caller]
fn said(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn config(echo: &Echo, folder: &Path) -> tempfile::NamedTempFile {
    file(&format!(
        "listeners: [{{address: '127.0.0.1:0'}}]\nadmin: {{address: 127.0.0.1:0, token: secret}}\n\
         upstreams: {{app: {{endpoints: ['http://{}'], circuit_breaker: standard, trust_session_headers: true}}}}\n\
         circuit_breakers: {{standard: {{minimum_calls: 100}}}}\nsessions: {{web: {{cookie: {{secure: false}}}}}}\n\
         rate_limits: {{per_user: {{limit: 2/h, by: session.user}}}}\n\
         routes:\n  - {{match: {{path: /me}}, upstream: app, session: {{use: web}}, rate_limits: [per_user], audit: headers}}\n\
         \x20 - {{match: {{path: /quiet}}, upstream: app, audit: none}}\n\
         \x20 - {{upstream: app, session: {{use: web, require: false}}}}\n\
         audit: {{sqlite: {{path: '{}'}}, integrity: {{key: k}}, capture: {{request_headers: [user-agent, cookie]}}}}\n",
        echo.address,
        folder.join("audit.db").display()
    ))
}

#[test]
fn sessions_are_managed_by_the_command_over_the_admin_port() {
    let echo = Echo::start();
    let folder = tempfile::tempdir().unwrap();
    let config = config(&echo, folder.path());
    let running = Running::start(config.path());
    let session = |arguments: &[&str]| {
        let address = ["session", "--address", &running.admin, "--token", "secret"];
        weir(&[&address, arguments].concat())
    };
    let created = json(&said(session(&[
        "create",
        "ann",
        "--claim",
        "role=customer",
    ])));
    let (id, token) = (
        created["id"].as_str().unwrap(),
        created["token"].as_str().unwrap(),
    );
    let cookie = format!("Cookie: sid={token}");
    let mut client = running.client();
    let me = |client: &mut Client| client.send("GET", "/me", &[&cookie], "").status;
    assert_eq!(me(&mut client), 200);
    let listed = said(session(&["list", "--user", "ann"]));
    // Who reads a list may have seen enough.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let left = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args([
            "session",
            "--address",
            &running.admin,
            "--token",
            "secret",
            "list",
        ])
        .stdout(writer)
        .status();
    assert_eq!(left.unwrap().code(), Some(0));
    assert_eq!(json(&listed)["claims"]["role"], "customer");
    assert!(!listed.contains(token), "a token is shown once");
    assert_eq!(json(&said(session(&["show", id])))["user"], "ann");
    assert_eq!(said(session(&["revoke", id])), "ended 1\n");
    assert_eq!(me(&mut client), 401);
    said(session(&["create", "bob"]));
    // As in a pod, where the file alone has the address and the token.
    let text = fs::read_to_string(config.path()).unwrap();
    let own = format!("admin: {{address: '{}'", running.admin);
    let by_file = file(&text.replace("admin: {address: 127.0.0.1:0", &own));
    let by_file = by_file.path().to_str().unwrap();
    let listed = said(weir(&["session", "list", "-c", by_file]));
    assert_eq!(json(&listed)["user"], "bob");
    let refused = weir(&["session", "-c", by_file, "--token", "wrong", "list"]);
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(told.contains("says 401"), "{told}");
    assert_eq!(said(session(&["revoke", "--user", "bob"])), "ended 1\n");
    let gone = session(&["show", id]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&gone.stderr).contains("no live session has this id"),
        "{gone:?}"
    );
}

#[test]
fn an_auditor_finds_each_request_and_proof_that_none_is_missing() {
    let echo = Echo::start();
    let folder = tempfile::tempdir().unwrap();
    let config = config(&echo, folder.path());
    let mut running = Running::start(config.path());
    let mut client = running.client();
    let login = client.send(
        "GET",
        "/login?user=ann&role=customer&token=hunter2",
        &[],
        "",
    );
    let set = login.field("set-cookie").unwrap().to_owned();
    let cookie = format!("Cookie: {}", set.split(';').next().unwrap());
    let fields = [cookie.as_str(), "User-Agent: test/1"];
    let statuses = [(); 3].map(|()| client.send("GET", "/me", &fields, "").status);
    assert_eq!(statuses, [200, 200, 429]);
    assert_eq!(client.get("/quiet").status, 200);
    assert_eq!(client.get("/status/503").status, 503);
    running.signal("TERM");
    assert!(running.child.wait().unwrap().success());

    let path = config.path().to_str().unwrap();
    let audit = |arguments: &[&str]| weir(&[&["audit", "-c", path], arguments].concat());
    let queried = said(audit(&["query", "--format", "jsonl"]));
    let events: Vec<_> = queried.lines().map(json).collect();
    let of = |field: &str| -> Vec<_> { events.iter().map(|event| event[field].clone()).collect() };
    assert_eq!(of("path"), ["/login", "/me", "/me", "/me", "/status/503"]);
    assert_eq!(of("status"), [200, 200, 200, 429, 503]);
    assert_eq!(of("seq"), [1, 2, 3, 4, 5]);
    assert_eq!(events[0]["query"], "user=ann&role=customer&token=***");
    let refused = &events[3];
    assert_eq!(refused["user"], "ann");
    assert_eq!(refused["label"], "quota_exceeded");
    assert_eq!(refused["limits"][0], "per_user: refused");
    assert_eq!(events[1]["breaker"], "admitted");
    let kept = &events[1]["headers"];
    assert_eq!(
        kept.to_string(),
        r#"[["user-agent","test/1"],["cookie","***"]]"#
    );
    assert!(!queried.contains("hunter2") && !queried.contains(&set[4..20]));
    assert!(said(audit(&["verify"])).contains("5 events"));
    let by_user = said(audit(&[
        "query", "--user", "ann", "--status", "4xx", "--format", "jsonl",
    ]));
    assert_eq!(by_user.lines().count(), 1);
}

#[test]
fn a_route_keeps_a_share_of_its_own_and_nothing_that_a_pattern_hides() {
    let (echo, folder) = (Echo::start(), tempfile::tempdir().unwrap());
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: http://{}\n\
         routes:\n  - {{match: {{path: /kept/*}}, upstream: upstream, audit: {{level: headers, sample: 100%}}}}\n\
         \x20 - {{match: {{path: /left/*}}, upstream: upstream, audit: {{sample: 0%}}}}\n  - {{upstream: upstream}}\n\
         audit: {{sample: 0%, sqlite: {{path: '{}'}}, capture: {{request_headers: [x-s-1]}},\n\
         \x20 redact: {{headers: ['x-s-*'], query: ['*_key'], paths: [/kept/*/keys/*]}}}}\n",
        echo.address,
        folder.path().join("audit.db").display()
    ));
    let mut running = Running::start(config.path());
    let mut client = running.client();
    for path in [
        "/left/a",
        "/other",
        "/kept/ann/keys/hunter2?my_key=hunter2&a=1",
    ] {
        let reply = client.send("GET", path, &["X-S-1: hunter2"], "");
        assert_eq!(reply.status, 200, "{path}");
    }
    running.signal("TERM");
    assert!(running.child.wait().unwrap().success());
    let path = config.path().to_str().unwrap();
    let queried = said(weir(&["audit", "-c", path, "query", "--format", "jsonl"]));
    let events: Vec<_> = queried.lines().map(json).collect();
    let [event] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(event["path"], "/kept/***/keys/***", "{event}");
    assert_eq!(event["query"], "my_key=***&a=1", "{event}");
    assert_eq!(event["headers"].to_string(), r#"[["x-s-1","***"]]"#);
}

#[test]
fn what_is_refused_or_goes_wrong_is_kept_however_small_the_share() {
    let (echo, folder) = (Echo::start(), tempfile::tempdir().unwrap());
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\n\
         upstreams: {{app: {{endpoints: ['http://{}']}}, gone: {{endpoints: ['http://127.0.0.1:1']}}}}\n\
         rate_limits: {{one: {{limit: 1/h, by: constant}}}}\n\
         routes:\n  - {{match: {{path: /limited}}, upstream: app, rate_limits: [one]}}\n\
         \x20 - {{match: {{path: /gone}}, upstream: gone}}\n  - {{upstream: app}}\n\
         audit: {{sample: 0%, sqlite: {{path: '{}'}}}}\n",
        echo.address,
        folder.path().join("audit.db").display()
    ));
    let mut running = Running::start(config.path());
    let mut client = running.client();
    let asked = [
        "/limited",
        "/status/404",
        "/limited",
        "/gone",
        "/status/500",
    ];
    let statuses = asked.map(|path| client.get(path).status);
    assert_eq!(statuses, [200, 404, 429, 502, 500]);
    running.signal("TERM");
    assert!(running.child.wait().unwrap().success());
    let path = config.path().to_str().unwrap();
    let queried = said(weir(&["audit", "-c", path, "query", "--format", "jsonl"]));
    let kept: Vec<_> = queried
        .lines()
        .map(json)
        .map(|event| (event["status"].clone(), event["label"].clone()))
        .collect();
    let expected = [
        (429, "quota_exceeded".into()),
        (502, "connect_failed".into()),
        (500, Value::Null),
    ];
    assert_eq!(kept, expected.map(|(status, label)| (status.into(), label)));
}

#[test]
fn a_query_that_is_not_to_be_kept_is_not() {
    let (echo, folder) = (Echo::start(), tempfile::tempdir().unwrap());
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nupstream: http://{}\n\
         telemetry: {{access_log: {{format: json}}}}\naudit: {{sqlite: {{path: '{}'}}, capture: {{query: false}}}}\n",
        echo.address,
        folder.path().join("audit.db").display()
    ));
    let mut running = Running::start(config.path());
    assert_eq!(running.client().get("/a?name=ann").status, 200);
    running.signal("TERM");
    assert!(running.child.wait().unwrap().success());
    let path = config.path().to_str().unwrap();
    let queried = said(weir(&["audit", "-c", path, "query", "--format", "jsonl"]));
    assert_eq!(json(&queried)["path"], "/a");
    assert!(!queried.contains("ann"), "{queried}");
}
