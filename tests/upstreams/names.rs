//! Names among endpoints that are one endpoint each: looked up by whoever connects.

use std::time::{Duration, Instant};

use super::harness::process::{Running, file};
use super::harness::servers::NameServer;

/// A process by which `endpoint` is asked, after these commands in mounts of its own.
fn before(endpoint: &str, script: &str) -> Running {
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nshutdown: {{propagation_delay: 0s, drain: 1s}}\n\
         upstreams: {{app: {{endpoints: ['{endpoint}']}}}}\n"
    ));
    Running::start_after(script, config.path(), &[])
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn a_process_ends_in_its_time_whatever_the_name_server_does() {
    let names = NameServer::on_port_53();
    names.hangs("app.test");
    let mut weir = before("http://app.test:3000", &names.mounted());
    assert_eq!(weir.client().get("/").status, 504);
    let began = Instant::now();
    weir.signal("TERM");
    assert_eq!(weir.child.wait().unwrap().code(), Some(0));
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
}
