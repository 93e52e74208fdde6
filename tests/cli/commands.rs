//! The binary, as a user runs it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{self as unix, UnixDatagram};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use super::harness::process::{Echo, Log, Running, file, signal};
use super::harness::servers::Kept;
use super::harness::tls::Authority;
use super::harness::{Client, PATIENCE, Reply, eventually};

/// An upstream that answers every request on every connection with `body`.
fn answering(body: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut piece = [0; 4096];
                while stream.read(&mut piece).is_ok_and(|n| n > 0) {
                    let reply = format!(
                        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    stream.write_all(reply.as_bytes()).unwrap();
                }
            });
        }
    });
    address
}

/// The body of a reply that comes in one piece.
fn get(client: &mut TcpStream) -> String {
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut reply = [0; 4096];
    let n = client.read(&mut reply).unwrap();
    String::from_utf8_lossy(&reply[..n])
        .rsplit("\r\n")
        .next()
        .unwrap()
        .to_owned()
}

fn short_form(upstream: SocketAddr) -> String {
    format!(
        "listen: 127.0.0.1:0\nupstream: http://{upstream}\nadmin: {{address: 127.0.0.1:0, token: secret}}\n"
    )
}

#[test]
fn run_proxies_to_the_upstream_of_the_file() {
    let config = file(&short_form(answering("hi")));
    let running = Running::start(config.path());
    assert_eq!(get(&mut running.connect()), "hi");
}

#[test]
fn check_exits_1_and_tells_every_mistake_with_its_place() {
    let good = file("listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n");
    let bad = file("listeners: [{adress: x}]\nupstrem: http://127.0.0.1:1\n");
    let check = |path| {
        Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["check", "-c"])
            .arg(path)
            .output()
            .unwrap()
    };
    let output = check(good.path());
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, format!("{}: no mistakes\n", good.path().display()));
    let output = check(bad.path());
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    for part in [
        bad.path().to_str().unwrap(),
        "line 1, column 14: listeners[0].adress: unknown key \"adress\"; did you mean \"address\"?",
        "line 2, column 1: upstrem: unknown key \"upstrem\"; did you mean \"upstream\"?",
    ] {
        assert!(said.contains(part), "{said}");
    }
}

/// A file that is right, and limits nothing.
fn with_an_unused_limit() -> String {
    let short = short_form("127.0.0.1:1".parse().unwrap());
    format!("{short}rate_limits: {{a: {{limit: 1/s, by: client.ip}}}}\n")
}

#[test]
fn check_warns_beside_what_it_prints_and_exits_0() {
    let config = file(&with_an_unused_limit());
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["check", "--print", "-c"])
        .arg(config.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    let expected = "warning: line 4, column 18: rate_limits.a: no route names it";
    assert!(said.starts_with(expected), "{said}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(!printed.contains("warning"), "{printed}");
}

#[test]
fn run_warns_in_its_log_as_it_starts_and_as_it_reads_the_file_again() {
    let config = file(&with_an_unused_limit());
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(config.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = Log::of(&mut child);
    let line = log.until("rate_limits.a: no route names it");
    assert!(line.contains("WARN"), "{line}");
    log.until("listening");
    signal(&child, "HUP");
    log.until("rate_limits.a: no route names it");
    signal(&child, "TERM");
    assert!(child.wait().unwrap().success());
}

#[test]
fn check_reads_the_files_of_tls_as_run_does() {
    let authority = Authority::new();
    authority.issue("a", "DNS:a.test");
    authority.issue("b", "DNS:b.test");
    let pem = |name: &str| authority.path(name).display().to_string();
    std::fs::write(authority.path("empty"), "").unwrap();
    let check_with = |(cert, key, ca): (&str, &str, &str), more: &str| {
        let config = file(&format!(
            "listeners:\n  - address: 127.0.0.1:0\n    tls:\n      certificates: [{{cert: {}, key: {}}}]\n\
             upstreams: {{app: {{endpoints: 'https://x:1', tls: {{ca: {}}}}}}}\n{more}",
            pem(cert),
            pem(key),
            pem(ca)
        ));
        let mut check = Command::new(env!("CARGO_BIN_EXE_weir"));
        let output = check.args(["check", "-c"]).arg(config.path()).output();
        let output = output.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.success(), said.is_empty(), "{said}");
        said
    };
    let check = |cert: &str, key: &str, ca: &str| check_with((cert, key, ca), "");
    assert_eq!(check("a.crt", "a.key", "ca.crt"), "");
    let says = |said: String, parts: &[&str]| {
        for part in parts {
            assert!(said.contains(part), "{part}: {said}");
        }
    };
    says(
        check("no.crt", "no.key", "no.ca"),
        &[
            "3 mistakes in ",
            "line 4, column 29: listeners[0].tls.certificates[0].cert: cannot read ",
            ": listeners[0].tls.certificates[0].key: cannot read ",
            "line 5, column 55: upstreams.app.tls.ca: cannot read ",
        ],
    );
    let more = "admin: {adress: '127.0.0.1:0'}\nroutes: [{upstream: app, rate_limits: [none]}]\n";
    says(
        check_with(("no.crt", "a.key", "ca.crt"), more),
        &[
            "3 mistakes in ",
            "line 4, column 29: listeners[0].tls.certificates[0].cert: cannot read ",
            "admin.adress: ",
            "unknown limit \"none\"",
        ],
    );
    says(
        check("a.crt", "b.key", "ca.crt"),
        &[
            "1 mistake in ",
            "tls.certificates[0].key: its certificates cannot be used: ",
            "b.key: the key is not that of ",
            "a.crt, of whose certificates the server's own stands first",
        ],
    );
    authority.run("head -c 300 a.crt >cut; printf '\\357\\273\\277' >bom; cat a.crt >>bom");
    says(
        check("cut", "a.key", "bom"),
        &[
            "2 mistakes in ",
            "cut: it is cut off: a BEGIN has no END line behind it",
            "bom: it holds no certificate: it begins with a byte order mark",
        ],
    );
    says(
        check("empty", "a.key", "a.key"),
        &[
            "2 mistakes in ",
            "tls.certificates[0].cert: its certificates cannot be used: ",
            "empty: it holds no certificate",
            "upstreams.app.tls.ca: its certificates cannot be used: ",
        ],
    );
    authority.run(
        "openssl x509 -in a.crt -outform DER -out der
         openssl pkcs8 -topk8 -in a.key -passout pass:x -out pkcs8
         openssl ec -in a.key -aes128 -passout pass:x -out traditional
         openssl req -new -key a.key -subj /CN=one | openssl x509 -req -signkey a.key -days 2 -out one",
    );
    for key in ["pkcs8", "traditional"] {
        let encrypted = "the key is encrypted, and weir asks for no passphrase: write it in clear";
        says(
            check("a.crt", key, "ca.crt"),
            &["1 mistake in ", "certificates[0].key: ", encrypted],
        );
    }
    says(
        check("der", "der", "ca.crt"),
        &[
            "der: it holds no certificate: it looks like DER, where PEM is needed",
            "der: it holds no private key: it looks like DER, where PEM is needed",
        ],
    );
    says(
        check("a.crt", "a.crt", "ca.crt"),
        &["a.crt: it holds no private key"],
    );
    says(
        check("one", "a.key", "ca.crt"),
        &[
            "1 mistake in ",
            "one: a certificate of X.509 version 1 cannot be used: ",
        ],
    );
}

#[test]
fn a_certificate_that_has_ended_is_warned_of() {
    let authority = Authority::new();
    authority.issue_for("old", "DNS:a.test", 0);
    authority.issue("new", "DNS:b.test");
    let (old, new) = (authority.pair("old"), authority.pair("new"));
    let config = file(&format!(
        "upstream: http://127.0.0.1:1\nadmin: {{address: 127.0.0.1:0}}\n\
         listeners: [{{address: 127.0.0.1:0, tls: {{certificates: [{new}, {old}]}}}}]\n"
    ));
    eventually(|| {
        let mut check = Command::new(env!("CARGO_BIN_EXE_weir"));
        let output = check.args(["check", "-c"]).arg(config.path()).output();
        let output = output.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        let place = "listeners[0].tls.certificates[1].cert: the certificate ended at ";
        said.lines().count() == 1 && said.starts_with("warning: line 3, ") && said.contains(place)
    });
    let running = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(config.path())
        .stderr(Stdio::piped())
        .spawn();
    let mut running = running.unwrap();
    let log = Log::of(&mut running);
    let line = log.until("the certificate ended at ");
    assert!(line.contains("WARN") && line.contains("old.crt"), "{line}");
    log.until("listening");
    authority.issue("old", "DNS:a.test");
    log.until("certificates reloaded");
    authority.issue_for("new", "DNS:b.test", 0);
    let line = log.until("the certificate ended at ");
    assert!(line.contains("new.crt"), "{line}");
    signal(&running, "TERM");
    assert!(running.wait().unwrap().success());
}

/// What is said by a command that fails for the file.
fn refused(command: &str, path: &Path) -> String {
    let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
    let output = weir.args([command, "-c"]).arg(path).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn check_prints_a_file_that_it_accepts_once_its_secrets_are_put_back_and_prints_alike() {
    let print = |path: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["check", "--print", "-c"])
            .arg(path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let short = file(&short_form("127.0.0.1:1".parse().unwrap()));
    let long = print(short.path());
    for part in ["max_header_bytes: 64KiB", "drain: 25s", "***"] {
        assert!(long.contains(part), "{long}");
    }
    assert!(!long.contains("secret"), "{long}");
    let filled_in = long.replace("***", "hunter2");
    assert_eq!(print(file(&filled_in).path()), long);
    for command in ["check", "run"] {
        let said = refused(command, file(&long).path());
        assert!(said.contains("admin.token: a masked secret"), "{said}");
    }
}

#[test]
fn schema_knows_every_key_and_refuses_others() {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .arg("schema")
        .output()
        .unwrap();
    let schema: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        schema["additionalProperties"],
        serde_json::Value::Bool(false)
    );
    assert!(schema["properties"]["routes"].is_object(), "{schema}");
}

#[test]
fn sigterm_lets_a_request_in_flight_end_and_exits_0() {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = file(&short_form(upstream.local_addr().unwrap()));
    let mut running = Running::start(config.path());
    let (mut client, mut idle) = (running.connect(), running.connect());
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let (mut stream, _) = upstream.accept().unwrap();
    let _ = stream.read(&mut [0; 1024]).unwrap();
    running.signal("TERM");
    assert_eq!(
        idle.read(&mut [0; 1]).unwrap(),
        0,
        "an idle connection is closed while the request is in flight"
    );
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        .unwrap();
    let mut reply = String::new();
    client.read_to_string(&mut reply).unwrap();
    assert!(reply.ends_with("hi"), "{reply}");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
}

/// By a socket that is a file, and by one in the abstract namespace, as systemd may give either.
#[test]
fn a_service_manager_is_told_when_weir_serves_and_when_it_ends() {
    let config = file(&short_form("127.0.0.1:1".parse().unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify").display().to_string();
    let name = format!("weir-test-{}", std::process::id());
    let here = unix::SocketAddr::from_abstract_name(&name).unwrap();
    for (notify, manager) in [
        (path.clone(), UnixDatagram::bind(&path).unwrap()),
        (format!("@{name}"), UnixDatagram::bind_addr(&here).unwrap()),
    ] {
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        let heard = || {
            let mut text = [0; 64];
            let n = manager.recv(&mut text).unwrap();
            String::from_utf8_lossy(&text[..n]).into_owned()
        };
        let mut running = Running::start_in(config.path(), &[("NOTIFY_SOCKET", &notify)]);
        assert_eq!(heard(), "READY=1");
        running.connect();
        running.signal("TERM");
        assert_eq!(heard(), "STOPPING=1");
        assert!(running.child.wait().unwrap().success());
    }
    // One that is gone keeps nobody from serving.
    let gone = [("NOTIFY_SOCKET", "/nowhere/notify")];
    let running = Running::start_in(config.path(), &gone);
    running.log_until("the service manager cannot be told READY=1");
    running.connect();
}

#[test]
fn a_reload_keeps_connections_and_a_bad_file_changes_nothing() {
    let (one, two, three) = (answering("one"), answering("two"), answering("three"));
    // The layout of a mounted ConfigMap: the file is behind a symbolic link to a folder, and the link is swapped.
    let folder = tempfile::tempdir().unwrap();
    let place = |version: &str, text: &str| {
        std::fs::create_dir(folder.path().join(version)).unwrap();
        std::fs::write(folder.path().join(version).join("weir.yaml"), text).unwrap();
        let fresh = folder.path().join("fresh");
        std::os::unix::fs::symlink(version, &fresh).unwrap();
        std::fs::rename(fresh, folder.path().join("data")).unwrap();
    };
    place("v1", &short_form(one));
    let config = folder.path().join("weir.yaml");
    std::os::unix::fs::symlink("data/weir.yaml", &config).unwrap();

    let running = Running::start(&config);
    let mut client = running.connect();
    assert_eq!(get(&mut client), "one");
    place("v2", &short_form(two));
    running.log_until("configuration reloaded");
    assert_eq!(
        get(&mut client),
        "two",
        "the same connection follows the new file"
    );
    place("v3", "listen: 127.0.0.1:0\nupstrem: x\n");
    assert!(running.log_until("not reloaded").contains("1 mistake"));
    assert_eq!(get(&mut client), "two");
    std::fs::write(folder.path().join("v3/weir.yaml"), short_form(three)).unwrap();
    running.signal("HUP");
    running.log_until("configuration reloaded");
    assert_eq!(get(&mut client), "three");
}

#[test]
fn healthcheck_says_how_a_running_weir_is() {
    let config = file(&short_form(answering("hi")));
    let running = Running::start(config.path());
    let check = |address: &str| {
        Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["healthcheck", "--address", address])
            .output()
            .unwrap()
    };
    let well = check(&running.admin);
    let said = String::from_utf8_lossy(&well.stdout);
    assert!(
        well.status.success() && said.starts_with("ok, up ") && said.contains(" MiB of memory\n"),
        "{well:?}"
    );
    // As a probe has it, by the file alone.
    let told = format!("admin: {{address: {}", running.admin);
    let by_file = short_form(answering("hi")).replace("admin: {address: 127.0.0.1:0", &told);
    let by_file = file(&by_file);
    for (flag, status) in [("--ready", "ready"), ("--live", "live")] {
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["healthcheck", flag, "-c"])
            .arg(by_file.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.starts_with(status),
            "{output:?}"
        );
    }
    let closed = Kept::new();
    assert_eq!(check(&closed.address.to_string()).status.code(), Some(1));
}

#[test]
fn drain_has_clients_leave_a_weir_that_serves_until_it_is_ended() {
    let upstream = answering("hi");
    let config = file(&short_form(upstream));
    let mut running = Running::start(config.path());
    let told = format!("admin: {{address: {}", running.admin);
    let as_it_runs = short_form(upstream).replace("admin: {address: 127.0.0.1:0", &told);
    let drain = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_weir"))
            .arg("drain")
            .args(arguments)
            .output()
            .unwrap()
    };
    let refused = drain(&["--address", &running.admin]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("says 401") && said.contains("WEIR_ADMIN_TOKEN"),
        "{said}"
    );
    assert_eq!(running.client().get("/").field("connection"), None);
    // Twice, which is once; and by a file that has got mistakes.
    for text in [&*as_it_runs, &format!("{as_it_runs}upstreem: x\n")] {
        let done = drain(&["-c", file(text).path().to_str().unwrap()]);
        assert!(done.status.success(), "{done:?}");
    }
    eventually(|| running.client().get("/").field("connection") == Some("close"));
    let unready = running.admin().get("/ready");
    assert_eq!(unready.status, 503);
    assert_eq!(json(&unready)["draining"], true);
    running.signal("TERM");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    let nobody = drain(&["--address", &running.admin]);
    let said = String::from_utf8_lossy(&nobody.stderr);
    assert_eq!(nobody.status.code(), Some(1), "{said}");
    assert!(said.contains("is weir running?"), "{said}");
}

/// A weir that runs goes on by what it read before.
#[test]
fn healthcheck_asks_by_a_file_that_has_got_mistakes() {
    let good = file(&short_form(answering("hi")));
    let running = Running::start(good.path());
    let admin = format!("admin: {{address: {}}}\n", running.admin);
    for mistake in [
        "upstreem: x\n",
        "routes: [{match: {path: a b}}]\n",
        "routes: [\n",
    ] {
        let config = file(&format!("{admin}{mistake}"));
        let weir = |command: &[&str]| {
            Command::new(env!("CARGO_BIN_EXE_weir"))
                .args(command)
                .arg("-c")
                .arg(config.path())
                .output()
                .unwrap()
        };
        let output = weir(&["healthcheck", "--ready"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        for part in ["warning: ", "line ", &running.admin] {
            assert!(said.contains(part), "{part}: {said}");
        }
        // Who waits for one to start is told at once that it will not.
        assert_eq!(weir(&["await", "--timeout", "1m"]).status.code(), Some(1));
    }
}

fn json(reply: &Reply) -> serde_json::Value {
    serde_json::from_str(&reply.body).unwrap_or_else(|error| panic!("{error}: {reply:?}"))
}

#[test]
fn echo_answers_with_what_weir_sent_it() {
    let echo = Echo::start();
    let config = file(&short_form(echo.address.parse().unwrap()));
    let running = Running::start(config.path());
    let mut client = running.client();
    let reply = client.send("POST", "/a/b?c=d", &["X-Two: 1", "X-Two: 2"], "12345");
    assert_eq!(reply.status, 200);
    let seen = json(&reply);
    assert_eq!(
        (
            &seen["method"],
            &seen["path"],
            &seen["query"],
            &seen["body_bytes"]
        ),
        (&"POST".into(), &"/a/b".into(), &"c=d".into(), &5.into())
    );
    assert_eq!(seen["headers"]["x-two"], "1, 2");
    assert_eq!(seen["headers"]["x-forwarded-for"], "127.0.0.1");
    assert!(seen["headers"]["x-request-id"].is_string(), "{seen}");
}

#[test]
fn echo_answers_with_a_status_a_delay_or_a_session() {
    let mut echo = Echo::start();
    let mut client = Client::to(&echo.address);
    assert_eq!(client.get("/status/503").status, 503);
    client.begin("GET", "/delay/400ms", &[], "");
    assert_eq!(client.status_within(100), None);
    let mut client = Client::to(&echo.address);
    assert_eq!(client.get("/delay/1ms").status, 200);

    let login = client.get("/login?user=ann&role=customer&name=J%C3%BCrgen%0A");
    let start = login.field("x-weir-session-start").unwrap();
    let start = weir::policy::session::SessionStart::parse(start.as_bytes()).unwrap();
    assert_eq!(start.user, "ann");
    assert_eq!(start.claims["role"], "customer");
    assert_eq!(start.claims["name"], "J\u{fc}rgen\n");
    assert_eq!(
        client.get("/logout").field("x-weir-session-end"),
        Some("true")
    );
    assert_eq!(client.get("/other").field("x-weir-session-end"), None);

    for (path, mend) in [
        ("/status/99", "/status/503"),
        ("/status/ok", "/status/503"),
        ("/delay/2", "for example 250ms"),
        ("/login", "/login?user=ann"),
        ("/login?user=", "/login?user=ann"),
    ] {
        let reply = client.get(path);
        assert_eq!(reply.status, 400, "{path}");
        assert!(
            json(&reply)["error"].as_str().unwrap().contains(mend),
            "{reply:?}"
        );
    }
    signal(&echo.child, "TERM");
    assert_eq!(echo.child.wait().unwrap().code(), Some(0));
}

#[test]
fn logs_are_as_the_file_says_and_the_environment_before_it() {
    let config = file(&format!(
        "{}telemetry: {{log: {{format: json, level: error}}}}\n",
        short_form("127.0.0.1:1".parse().unwrap())
    ));
    let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["run", "-c"])
        .arg(config.path())
        .env("WEIR_LOG", "info")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    signal(&child, "TERM");
    child.wait().unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&line["level"], &line["message"]),
        (&"INFO".into(), &"listening".into())
    );
}

#[test]
fn every_command_has_an_example_and_mends_a_misspelt_flag() {
    let weir = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(arguments)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).unwrap())
    };
    let (code, help) = weir(&["--help"]);
    assert_eq!(code, Some(0));
    assert!(help.contains("Exit codes: 0 done, 1 failed, 2"), "{help}");
    // Each that help tells of, and those below it.
    let below = |help: &str| {
        let (_, list) = help.split_once("Commands:\n")?;
        let lines = list.lines().take_while(|line| line.starts_with("  "));
        let named = lines.filter(|line| !line.starts_with("   "));
        let names = named.filter_map(|line| line.split_whitespace().next());
        let names = names.filter(|name| *name != "help");
        Some(names.map(str::to_owned).collect::<Vec<_>>())
    };
    let of_one = |name: String| vec![name];
    let mut left: Vec<_> = below(&help).unwrap().into_iter().map(of_one).collect();
    let mut seen = 0;
    while let Some(words) = left.pop() {
        let mut arguments: Vec<_> = words.iter().map(String::as_str).collect();
        let example = format!("Example: weir {}", arguments.join(" "));
        arguments.push("--help");
        let (code, help) = weir(&arguments);
        assert_eq!(code, Some(0), "{words:?}");
        assert!(help.contains(&example), "{help}");
        assert!(
            !help.contains('\u{1b}'),
            "colours are for terminals: {help:?}"
        );
        let further = below(&help).unwrap_or_default();
        left.extend(
            further
                .into_iter()
                .map(|name| [words.clone(), vec![name]].concat()),
        );
        seen += 1;
    }
    assert_eq!(seen, 27);
    for (arguments, mend) in [
        (["run", "--confg"], "'--config'"),
        (["check", "--prnt"], "'--print'"),
        (["echo", "--adress"], "'--address'"),
        (["healthcheck", "--addres"], "'--address'"),
        (["redirect", "--aply"], "'--apply'"),
        (["audit", "qury"], "'query'"),
    ] {
        let (code, said) = weir(&arguments);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(mend), "{said}");
    }
    assert_eq!(weir(&["chek"]).0, Some(2));
    assert_eq!(weir(&["check", "-c", "/nowhere.yaml"]).0, Some(1));
}
