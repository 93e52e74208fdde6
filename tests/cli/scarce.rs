//! What a process does whose machine has no more of something for it, and that it goes on by itself once there is enough again.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::harness::collector::Collector;
use super::harness::process::{Running, file};
use super::harness::{Upstream, eventually};

/// Sets this bound of the process, as prlimit(1) writes it.
fn bound(running: &Running, limit: &str) {
    let pid = format!("--pid={}", running.child.id());
    let set = Command::new("prlimit").args([&pid, limit]).status();
    assert!(set.unwrap().success());
}

/// One whose threads each want a large stack, so that there can be room for all but that.
fn with_large_stacks(config: &Path) -> Running {
    Running::start_in(config, &[("RUST_MIN_STACK", "67108864")])
}

/// No stack for one more thread. Who may have no more threads meets the same error.
fn no_thread(running: &Running) {
    let most = (running.memory("VmSize") + 32 * 1_024) * 1_024;
    bound(running, &format!("--as={most}:unlimited"));
}

fn threads_again(running: &Running) {
    bound(running, "--as=unlimited:unlimited");
}

#[test]
fn an_end_without_a_thread_to_spare_answers_what_was_begun() {
    let upstream = Upstream::held();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\nupstream: {}\n",
        upstream.url()
    ));
    let mut running = with_large_stacks(config.path());
    let mut client = running.client();
    client.begin("GET", "/", &[], "");
    upstream.wait_for_request();
    no_thread(&running);
    running.signal("TERM");
    running.log_until("draining");
    upstream.answer("whole");
    assert_eq!(client.finish().body, "whole");
    assert!(running.child.wait().unwrap().success());
}

#[test]
fn the_admin_port_answers_without_a_thread_to_spare() {
    let folder = tempfile::tempdir().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0, token: secret}}\nruntime: {{lanes: 1}}\n\
         routes: [{{reply: {{status: 200}}}}]\nworker: {{health: {{cache: 1ms}}}}\naudit: {{sqlite: {{path: {}}}}}\n",
        folder.path().join("audit.db").display()
    ));
    let running = with_large_stacks(config.path());
    let disk = |body: &str| {
        let health: serde_json::Value = serde_json::from_str(body).unwrap();
        health["checks"]["disk"].clone()
    };
    eventually(|| {
        // One that was under way then may have ended.
        no_thread(&running);
        assert_eq!(running.admin().get("/metrics").status, 200);
        disk(&running.admin().get("/health").body)["error"]
            .as_str()
            .is_some_and(|error| error.starts_with("no thread can be begun"))
    });
    let query = || {
        let token = ["Authorization: Bearer secret"];
        running.admin().send("GET", "/v1/audit", &token, "")
    };
    let refused = query();
    assert_eq!(refused.status, 503);
    assert!(refused.body.contains("no thread can be begun"));
    assert_eq!(running.metric("weir_panics_total"), 0);
    threads_again(&running);
    eventually(|| disk(&running.admin().get("/health").body)["disks"][0]["free_bytes"].is_u64());
    assert_eq!(query().status, 200);
}

#[test]
fn the_access_log_begins_once_there_is_a_thread_for_it() {
    let config = file(
        "listen: 127.0.0.1:0\nadmin: {address: 127.0.0.1:0}\nruntime: {lanes: 1}\n\
         routes: [{reply: {status: 200}}]\ntelemetry: {access_log: {format: json}}\n",
    );
    let mut running = with_large_stacks(config.path());
    let lines = running.output();
    no_thread(&running);
    assert_eq!(running.client().get("/early").status, 200);
    running.log_until("the access log cannot begin");
    threads_again(&running);
    eventually(|| {
        assert_eq!(running.client().get("/late").status, 200);
        lines.try_recv().is_ok_and(|line| line.contains("/early"))
    });
    let lost = running.metric("weir_access_log_lines_total{result=\"dropped\"}");
    assert_eq!(lost, 0);
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
    bound(&running, "--nofile=3:");
    fs::write(config.path(), replying("new")).unwrap();
    running.log_until("configuration not reloaded");
    bound(&running, "--nofile=1024:");
    running.log_until("configuration reloaded");
    assert_eq!(client.get("/").body, "new");
    // However often it was tried.
    let failed = "weir_config_reloads_total{result=\"refused\"}";
    assert_eq!(running.metric(failed), 1);
}

#[test]
fn a_process_with_too_few_files_for_its_lanes_ends_and_says_why() {
    let config = file(
        "listen: 127.0.0.1:0\nadmin: {address: 127.0.0.1:0}\nruntime: {lanes: 64}\n\
         routes: [{reply: {status: 200}}]\n",
    );
    // Enough for all sockets, and not for what each lane waits by.
    let mut running = Running::start_after("ulimit -n 120", config.path(), &[]);
    running.log_until("a lane cannot begin");
    running.log_until("a lane cannot serve: Too many open files");
    assert_eq!(running.child.wait().unwrap().code(), Some(1));
}

#[test]
fn spans_go_out_once_there_is_a_thread_to_look_the_collector_up() {
    let collector = Collector::start(None);
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\nroutes: [{{reply: {{status: 200}}}}]\n\
         telemetry: {{traces: {{otlp: 'http://localhost:{}', sample: 100%}}}}\n",
        collector.port
    ));
    let running = with_large_stacks(config.path());
    no_thread(&running);
    assert_eq!(running.client().get("/").status, 200);
    running.log_until("the collector takes no spans");
    threads_again(&running);
    eventually(|| {
        running.client().get("/");
        running.metric("weir_trace_spans_total{result=\"exported\"}") > 0
    });
}
