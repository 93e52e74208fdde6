//! `weir worker`, `weir proxy` and `weir migrate` as processes: what they refuse, and how they end.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::process::{Command, Output};

use harness::process::{Running, file};

const BESIDE: &str = "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {address: 127.0.0.1:0}\nruntime: {lanes: 1}\n";

/// `weir COMMAND -c FILE` to its end.
fn weir(command: &str, more: &str) -> (Output, String) {
    let config = file(&format!("{BESIDE}{more}"));
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args([command, "-c"])
        .arg(config.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

#[test]
fn a_worker_needs_redis_and_postgres() {
    let redis = "redis: {urls: redis://127.0.0.1:1}\n";
    for (more, missing) in [("", "redis"), (redis, "postgres")] {
        let (output, said) = weir("worker", more);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let part =
            format!("has no \"{missing}\": a worker brings the audit from redis into postgres");
        assert!(said.contains(&part), "{said}");
    }
}

#[test]
fn there_is_nothing_to_migrate_without_postgres() {
    let (output, said) = weir("migrate", "");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("has no \"postgres\""), "{said}");
}

#[test]
fn an_address_of_postgres_that_cannot_be_used_is_told_without_its_words() {
    let more =
        "redis: {urls: redis://127.0.0.1:1}\naudit: {}\npostgres: {write: 'host=a hunter2=b'}\n";
    for command in ["worker", "migrate"] {
        let (output, said) = weir(command, more);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("postgres.write") && !said.contains("hunter2"),
            "{said}"
        );
    }
}

#[test]
fn a_proxy_ends_well_on_sigterm() {
    let config = file(BESIDE);
    let mut proxy = Running::start_as("proxy", config.path(), &[]);
    proxy.signal("TERM");
    assert_eq!(proxy.child.wait().unwrap().code(), Some(0));
}
