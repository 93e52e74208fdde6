//! What a process does whose machine has no more of something for it, and that it goes on by itself once there is enough again.

use std::fs;
use std::process::Command;

use super::harness::process::{Running, file};
use super::harness::eventually;

/// Sets this bound of the process, as prlimit(1) writes it.
fn bound(running: &Running, limit: &str) {
    let pid = format!("--pid={}", running.child.id());
    let set = Command::new("prlimit").args([&pid, limit]).status();
    assert!(set.unwrap().success());
}

#[test]
fn a_file_that_may_not_grow_ends_no_process() {
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         routes: [{{reply: {{status: 200}}}}]\naudit: {{delivery: guaranteed, sqlite: {{path: {}}}}}\n",
        folder.path().join("audit.db").display()
    ));
    let mut running = Running::start(config.path());
    assert_eq!(running.client().get("/").status, 200);
    bound(&running, "--fsize=4096:unlimited");
    let mut client = running.client();
    client.begin("GET", "/waits", &[], "");
    running.log_until("audit events cannot be written");
    eventually(|| running.client().get("/").status == 503);
    bound(&running, "--fsize=unlimited:unlimited");
    // It waited for longer than an event may take.
    assert_eq!(client.finish().status, 503);
    eventually(|| running.client().get("/").status == 200);
    assert!(running.child.try_wait().unwrap().is_none());
}

#[test]
fn a_change_that_came_while_no_file_could_be_opened_is_taken_up_later() {
    let replying = |body: &str| {
        format!(
            "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
             routes: [{{reply: {{status: 200, body: {body}}}}}]\n"
        )
    };
    let config = file(&replying("old"));
    let running = Running::start(config.path());
    let mut client = running.client();
    assert_eq!(client.get("/").body, "old");
    // It has more open already, and keeps them.
    bound(&running, "--nofile=3:4096");
    fs::write(config.path(), replying("new")).unwrap();
    running.log_until("configuration not reloaded");
    bound(&running, "--nofile=4096:4096");
    running.log_until("configuration reloaded");
    assert_eq!(client.get("/").body, "new");
    // However often it was tried.
    let failed = "weir_config_reloads_total{result=\"refused\"}";
    assert_eq!(running.metric(failed), 1);
}
