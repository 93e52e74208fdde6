//! What commands that read and ask say where they cannot: what, where, and the mend.

use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::thread;

use super::harness::postgres::Database;
use super::harness::process::{Echo, Running, file};
use super::harness::raw;
use super::harness::redis::Server;
use weir::clock;
use weir::store::sqlite::Writer;

const BASE: &str =
    "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {address: 127.0.0.1:0}\n";

/// Exit code, and all that is said; in a folder without files.
fn weir(arguments: &[&str]) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
    let output = weir
        .args(arguments)
        .current_dir(folder.path())
        .env_remove("WEIR_ADMIN_TOKEN")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

/// `weir COMMAND` fails so, with each of these parts in what it says.
#[track_caller]
fn check(command: &str, code: i32, parts: &[&str]) {
    let arguments: Vec<_> = command.split(' ').collect();
    let (ended, said) = weir(&arguments);
    assert_eq!(ended, Some(code), "{command}: {said}");
    for part in parts {
        assert!(said.contains(part), "{command}: no {part:?} in: {said}");
    }
    assert!(!said.contains("secret"), "{command}: {said}");
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

const READS: [&str; 4] = ["query", "tail", "verify", "export"];

#[test]
fn a_file_without_an_audit_is_told_apart_from_an_audit_that_is_not_there() {
    let without = file(BASE);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.db");
    let path = name(&path);
    let with = file(&format!("{BASE}audit: {{sqlite: {{path: '{path}'}}}}\n"));
    for read in READS {
        let config = name(without.path());
        let says = format!("error: {config} has no \"audit\"");
        check(
            &format!("audit {read} -c {config}"),
            1,
            &[&says, "add `audit: {}`", "--database FILE"],
        );
        let says = format!("error: cannot open {path}: there is no audit database");
        check(
            &format!("audit {read} -c {}", name(with.path())),
            1,
            &[&says],
        );
        check(
            &format!("audit {read}"),
            1,
            &["cannot open weir-audit.db: there is no", "-c FILE"],
        );
    }
    let config = name(without.path());
    check(&format!("audit verify --database {config}"), 1, &[config]);
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |file: &str| name(&folder.path().join(file)).to_owned();
    let config = file(&format!(
        "{BASE}audit: {{sqlite: {{path: '{}'}}}}\n",
        at("audit.db")
    ));
    Writer::open(&folder.path().join("audit.db"), "a", None, clock::wall()).unwrap();
    let config = name(config.path());
    let (empty, absent) = (at("empty"), at("absent"));
    std::fs::write(&empty, "\n").unwrap();
    let verify = |key: &str| format!("audit verify -c {config} --key-file {key}");
    check(&verify(&empty), 1, &[&empty, "is empty"]);
    check(&verify(&absent), 1, &[&absent, "cannot read"]);
    let full = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["audit", "verify", "-c", config])
        .stdout(File::options().write(true).open("/dev/full").unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8(full.stderr).unwrap();
    assert_eq!(full.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot write to standard output"), "{said}");
}

#[test]
fn a_postgres_that_cannot_be_read_is_told_with_its_address_and_the_mend() {
    let config = |url: &str| {
        file(&format!(
            "{BASE}audit: {{}}\nredis: {{urls: 'redis://127.0.0.1:1'}}\npostgres: {{write: '{url}'}}\n"
        ))
    };
    let down = config("postgres://weir:secret@127.0.0.1:1/audit?sslmode=disable");
    let empty = Database::new();
    let url = empty.url();
    let (server, _) = url.rsplit_once('/').unwrap();
    let absent = config(&format!("{server}/absent?sslmode=disable"));
    let secured = config(&url.replace("sslmode=disable", "sslmode=require"));
    let empty = config(&url);
    let reads = READS.map(|read| format!("audit {read}"));
    for command in reads.iter().map(String::as_str).chain(["migrate"]) {
        for (config, parts) in [
            (
                &absent,
                ["SQLSTATE 3D000); create the database", "postgres.write"],
            ),
            (
                &secured,
                ["does not support TLS; switch TLS on", "sslmode=disable"],
            ),
        ] {
            let command = format!("{command} -c {}", name(config.path()));
            check(&command, 1, &parts);
        }
    }
    for read in READS {
        check(
            &format!("audit {read} -c {}", name(down.path())),
            1,
            &["127.0.0.1:1/audit", "is it running", "postgres.write"],
        );
        check(
            &format!("audit {read} -c {}", name(empty.path())),
            1,
            &[
                "weir's schema in postgres is version 0",
                "run `weir migrate`",
            ],
        );
    }
}

#[test]
fn dead_letters_say_what_they_need() {
    let redis = "redis: {urls: 'redis://127.0.0.1:1', password: secret, connect_timeout: 200ms}\n";
    let files = [
        BASE.to_owned(),
        format!("{BASE}{redis}"),
        format!("{BASE}audit: {{}}\n{redis}"),
    ]
    .map(|text| file(&text));
    for command in ["list", "replay --all", "drop --all"] {
        let command = format!("audit dead-letters {command}");
        check(&command, 1, &["say which configuration: -c weir.yaml"]);
        let [no_redis, no_audit, down] = files.each_ref().map(|file| name(file.path()));
        for (config, says) in [(no_redis, "redis"), (no_audit, "audit")] {
            let says = format!("{config} has no {says}, ");
            let mend = "give the file of the workers";
            check(&format!("{command} -c {config}"), 1, &[&says, mend]);
        }
        check(
            &format!("{command} -c {down}"),
            1,
            &["redis (", "127.0.0.1:1", "is it running", "redis.urls"],
        );
    }
    check("audit dead-letters replay", 2, &["--all>"]);
    check("audit dead-letters drop 3", 2, &["3/1732541000000-0"]);
    check("audit query --since -1h", 2, &["\"-1h\" is not a time"]);
    check("audit dead-letters drop 1/2-3 --all", 2, &["--all"]);

    let redis = Server::single();
    let there = file(&format!("{BASE}audit: {{}}\n{}", redis.yaml("w")));
    let command = format!("audit dead-letters drop 0/1-1 -c {}", name(there.path()));
    check(&command, 1, &["0/1-1: not there"]);
}

/// As where `2>&1 | head -1` has seen enough.
#[test]
fn standard_error_that_takes_nothing_changes_no_exit_code() {
    let warned = file(&format!(
        "{BASE}rate_limits: {{a: {{limit: 1/s, by: client.ip}}}}\n"
    ));
    let wrong = file("listen: x\n");
    let [warned, wrong] = [&warned, &wrong].map(|file| name(file.path()));
    for (command, code) in [
        (format!("check -c {warned}"), 0),
        (format!("check -c {wrong}"), 1),
        (format!("run -c {wrong}"), 1),
        (format!("healthcheck -c {wrong}"), 1),
        ("audit query".to_owned(), 1),
        ("audit query --since x".to_owned(), 2),
        ("inject /nowhere".to_owned(), 1),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut weir = Command::new(env!("CARGO_BIN_EXE_weir"));
        let output = weir
            .args(command.split(' '))
            .current_dir(folder.path())
            .stderr(File::options().write(true).open("/dev/full").unwrap())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(code), "{command}");
    }
}

#[test]
fn a_file_that_is_no_text_and_one_that_says_nothing_are_told() {
    let utf_16: Vec<u8> = "listen: 127.0.0.1:0\n"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weir.yaml");
    for (bytes, mend) in [
        (
            &utf_16[..],
            "NUL bytes in it, as UTF-16 has: save it as UTF-8",
        ),
        (
            b"a: caf\xe9\n",
            "line 1 is not UTF-8: save the file as UTF-8",
        ),
        (
            b"",
            "the file is empty: begin with \"listen: 127.0.0.1:8080\"",
        ),
        (b"# nothing\n---\n", "the file is empty: begin with"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        check(&format!("check -c {}", name(&path)), 1, &[mend]);
    }
}

#[test]
fn a_manifest_without_workloads_is_told() {
    let config = file(BASE);
    let says = ["nothing is changed: there is no workload in it", BASE];
    check(&format!("inject {}", name(config.path())), 0, &says);
    check(
        &format!("inject --uninject {}", name(config.path())),
        0,
        &says,
    );
}

#[test]
fn a_port_that_is_taken_is_told_by_its_key() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let upstream = "upstream: http://127.0.0.1:1\n";
    for (ports, parts) in [
        (
            format!("listen: 127.0.0.1:0\nadmin: {{address: '{taken}'}}\n"),
            ["error: admin.address: cannot listen on ", "ss -lnp"],
        ),
        (
            format!(
                "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nmetrics: {{address: '{taken}'}}\n"
            ),
            ["error: metrics.address: cannot listen on ", "ss -lnp"],
        ),
        (
            format!("listen: '{taken}'\nadmin: {{address: 127.0.0.1:0}}\n"),
            ["error: cannot listen on ", "use another address"],
        ),
    ] {
        let config = file(&format!("{ports}{upstream}"));
        check(&format!("run -c {}", name(config.path())), 1, &parts);
    }
}

const SESSIONS: [&str; 5] = [
    "create ann",
    "list",
    "show 4f1d7a20c6e98b35d2407f6b91ce03a8",
    "revoke 4f1d7a20c6e98b35d2407f6b91ce03a8",
    "revoke --user ann",
];

/// Answers each connection with this, whatever it is asked.
fn other(says: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            // One that does not wait for the answer has seen enough.
            let _ = stream.unwrap().write_all(says.as_bytes());
        }
    });
    address.to_string()
}

#[test]
fn a_port_that_is_not_weir_s_admin_port_is_told() {
    let echo = Echo::start();
    let redis = other("-ERR unknown command\r\n");
    let page = other("HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\n404");
    for command in SESSIONS {
        let at = |address: &str| format!("session {command} --address {address}");
        check(
            &at("127.0.0.1:1"),
            1,
            &["admin port 127.0.0.1:1: is weir running?"],
        );
        for address in [&redis, &page, &echo.address] {
            check(&at(address), 1, &[address, "is it weir's admin port?"]);
        }
    }
}

#[test]
fn an_answer_without_an_end_is_read_in_part() {
    let endless = raw::scripted(|mut stream| {
        raw::read_head(&mut stream);
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n";
        let _ = stream.write_all(head.as_bytes());
        while stream.write_all(&[b'a'; 1 << 16]).is_ok() {}
    });
    let command = format!("session list --address {endless}");
    check(&command, 1, &["length limit exceeded"]);
}

#[test]
fn a_weir_without_such_sessions_says_which_it_has() {
    let none = file(&format!("{BASE}runtime: {{lanes: 1}}\n"));
    let none = Running::start(none.path());
    let token = "admin: {address: 127.0.0.1:0, token: secret}";
    let several = BASE.replace("admin: {address: 127.0.0.1:0}", token);
    let several = file(&format!(
        "{several}runtime: {{lanes: 1}}\nsessions: {{web: {{}}, api: {{token: [{{header: x-key}}]}}}}\n"
    ));
    let several = Running::start(several.path());
    for command in SESSIONS {
        let at = |weir: &Running| format!("session {command} --address {}", weir.admin);
        let mend = "add `sessions: {web: {}}`";
        check(&at(&none), 1, &[&none.admin, "404", mend]);
        check(&at(&several), 1, &["401", "--token", "WEIR_ADMIN_TOKEN"]);
    }
    let with_token = |command: &str| {
        let command = format!(
            "session {command} --address {} --token secret",
            several.admin
        );
        weir(&command.split(' ').collect::<Vec<_>>())
    };
    for (command, parts) in [
        ("list", ["web", "api", "here by --sessions NAME"]),
        ("list --sessions wbe", ["\"wbe\"", "web", "api"]),
        ("show 7 --sessions web", ["400", "32 hex digits", "id"]),
        (
            "show 4f1d7a20c6e98b35d2407f6b91ce03a8 --sessions web",
            ["404", "live", "id"],
        ),
    ] {
        let (code, said) = with_token(command);
        assert_eq!(code, Some(1), "{said}");
        for part in parts {
            assert!(said.contains(part), "{command}: no {part:?} in: {said}");
        }
    }
    check("session revoke", 2, &["<ID|--user <USER>>"]);
    check("session revoke 1 --user ann", 2, &["--user"]);
    check("session create ann --claim role", 2, &["NAME=VALUE"]);
}

/// More than the log keeps, and than a pipe takes at once.
#[test]
fn all_mistakes_of_a_file_are_said() {
    let routes = "  - {match: {path: a}, upstream: none}\n".repeat(8_000);
    let config = file(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: 'http://x:1'}}}}\nroutes:\n{routes}"
    ));
    let mut check = Command::new(env!("CARGO_BIN_EXE_weir"));
    let output = check.args(["check", "-c"]).arg(config.path()).output();
    let said = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(said.starts_with("error: 16000 mistakes in "), "{said:.200}");
    assert!(said.contains("routes[7999].upstream: "), "{said:.200}");
}
