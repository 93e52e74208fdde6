//! Names among endpoints that are one endpoint each: looked up by whoever connects.

use std::io::Write;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::harness::process::{Running, file};
use super::harness::raw::{read_head, scripted};
use super::harness::servers::{Kept, NameServer, Server, mounted};
use super::harness::{Lane, eventually, ok};

/// A process before these upstreams, after these commands in mounts of its own. Requests go to the first whose name begins their path, or else
/// to the last.
fn before(upstreams: &[(&str, &str)], script: &str) -> Running {
    let entry = |(name, url): &(&str, &str)| format!("  {name}: {{endpoints: ['{url}']}}\n");
    let route =
        |(name, _): &(&str, &str)| format!("  - {{match: {{path: /{name}}}, upstream: {name}}}\n");
    let (last, _) = upstreams.last().unwrap();
    let config = file(&format!(
        "listen: 127.0.0.1:0\nadmin: {{address: 127.0.0.1:0}}\nruntime: {{lanes: 1}}\n\
         shutdown: {{propagation_delay: 0s, drain: 1s}}\nupstreams:\n{}routes:\n{}  - {{upstream: {last}}}\n",
        upstreams.iter().map(entry).collect::<String>(),
        upstreams.iter().map(route).collect::<String>(),
    ));
    Running::start_after(script, config.path(), &[])
}

fn url(name: &str, address: SocketAddr) -> String {
    format!("http://{name}:{}", address.port())
}

/// An upstream that closes each connection behind its answer.
fn closing() -> SocketAddr {
    scripted(|mut stream| {
        if read_head(&mut stream).is_some() {
            let answer = ok("ok").replacen("\r\n", "\r\nConnection: close\r\n", 1);
            let _ = stream.write_all(answer.as_bytes());
        }
    })
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn a_process_ends_in_its_time_whatever_the_name_server_does() {
    let names = NameServer::on_port_53();
    names.hangs("app.test");
    let mut weir = before(&[("app", "http://app.test:3000")], &names.mounted());
    assert_eq!(weir.client().get("/").status, 504);
    let began = Instant::now();
    weir.signal("TERM");
    assert_eq!(weir.child.wait().unwrap().code(), Some(0));
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[test]
fn a_name_that_hangs_holds_up_no_other() {
    let names = NameServer::on_port_53();
    let upstream = closing();
    names.hangs("slow.test");
    names.says("good.test", &[upstream.ip()], 0);
    let good = url("good.test", upstream);
    let weir = before(
        &[("slow", "http://slow.test:3000"), ("good", &good)],
        &names.mounted(),
    );
    let mut client = weir.client();
    assert_eq!(client.get("/").status, 200);
    // More than the threads that a runtime has for what blocks.
    let waiting: Vec<_> = (0..600)
        .map(|_| {
            let mut client = weir.client();
            client.begin("GET", "/slow", &[], "");
            client
        })
        .collect();
    for mut client in waiting {
        assert_eq!(client.finish().status, 504);
    }
    assert_eq!(client.get("/").status, 200);
}

#[test]
fn an_answer_is_shared_and_held_for_its_time() {
    let names = NameServer::on_port_53();
    let upstream = closing();
    names.says("app.test", &[upstream.ip()], 60);
    let weir = before(&[("app", &url("app.test", upstream))], &names.mounted());
    let clients: Vec<_> = (0..20)
        .map(|_| {
            let mut client = weir.client();
            client.begin("GET", "/", &[], "");
            client
        })
        .collect();
    for mut client in clients {
        assert_eq!(client.finish().status, 200);
    }
    let mut client = weir.client();
    for _ in 0..20 {
        assert_eq!(client.get("/").status, 200);
    }
    // One for each kind of address.
    assert_eq!(names.asked.load(Ordering::Relaxed), 2);
}

#[test]
fn the_last_addresses_stay_while_a_name_server_hangs_or_fails() {
    let names = NameServer::on_port_53();
    let upstream = closing();
    names.says("app.test", &[upstream.ip()], 0);
    let weir = before(&[("app", &url("app.test", upstream))], &names.mounted());
    let mut client = weir.client();
    assert_eq!(client.get("/").status, 200);
    for trouble in [NameServer::hangs, NameServer::fails] {
        trouble(&names, "app.test");
        let before = names.asked.load(Ordering::Relaxed);
        // A look, and then some.
        for _ in 0..2 {
            eventually(|| {
                assert_eq!(client.get("/").status, 200);
                names.asked.load(Ordering::Relaxed) >= before + 2
            });
            assert_eq!(client.get("/").status, 200);
        }
    }
    weir.log_until("name cannot be looked up; its last addresses stay");
    // Of IPv4 alone, of which it has an address.
    names.fails_for_ipv4("app.test", &[Ipv6Addr::LOCALHOST.into()]);
    let before = names.asked.load(Ordering::Relaxed);
    eventually(|| {
        assert_eq!(client.get("/").status, 200);
        names.asked.load(Ordering::Relaxed) >= before + 20
    });
    // Others may have been given the addresses.
    names.forgets("app.test");
    eventually(|| client.get("/").status == 502);
    weir.log_until("name has no address any more");
    names.says("app.test", &[upstream.ip()], 0);
    eventually(|| client.get("/").status == 200);
    weir.log_until("name is found again");
}

#[test]
fn a_name_that_leads_elsewhere_is_looked_up_again_whatever_its_time() {
    let [old, new] = Server::on_one_port::<2>();
    let names = NameServer::on_port_53();
    names.says("app.test", &[old.ip()], 3600);
    let weir = before(&[("app", &url("app.test", old.address))], &names.mounted());
    let mut client = weir.client();
    assert_eq!(client.get("/").body, old.address.to_string());
    names.says("app.test", &[new.ip()], 3600);
    old.kill();
    eventually(|| client.get("/").body == new.address.to_string());
}

#[test]
fn each_address_of_a_name_is_tried() {
    let names = NameServer::on_port_53();
    let nobody = Kept::new();
    let refuses = nobody.address;
    let server = Server::start();
    let loopback = Ipv6Addr::LOCALHOST.into();
    names.says("both.test", &[loopback, server.ip()], 0);
    names.says("none.test", &[loopback, refuses.ip()], 0);
    let weir = before(
        &[
            ("both", &url("both.test", server.address)),
            ("none", &url("none.test", refuses)),
        ],
        &names.mounted(),
    );
    let mut client = weir.client();
    assert_eq!(client.get("/both").status, 200);
    assert_eq!(client.get("/none").status, 502);
}

#[test]
fn names_of_the_machine_itself_need_no_name_server() {
    let server = Server::start();
    let script = [
        mounted("/etc/hosts", &["127.0.0.1 my_app db"]),
        mounted("/etc/resolv.conf", &["# none"]),
    ];
    let weir = before(
        &[
            ("here", &url("localhost", server.address)),
            ("listed", &url("my_app", server.address)),
            ("nowhere", &url("other", server.address)),
        ],
        &script.join("; "),
    );
    let mut client = weir.client();
    assert_eq!(client.get("/here").status, 200);
    assert_eq!(client.get("/listed").status, 200);
    assert_eq!(client.get("/nowhere").status, 502);
    let line = weir.log_until("endpoint cannot be reached");
    assert!(line.contains("other"), "{line}");
}

#[test]
fn what_is_wrong_with_the_systems_files_is_told_once() {
    let names = NameServer::on_port_53();
    let upstream = closing();
    names.says("app.test", &[upstream.ip()], 0);
    let line = format!("nameserver {}", names.address.ip());
    let script = mounted("/etc/resolv.conf", &[&line, "options of-no-one"]);
    let weir = before(&[("app", &url("app.test", upstream))], &script);
    let mut client = weir.client();
    // Three looks.
    eventually(|| {
        assert_eq!(client.get("/").status, 200);
        names.asked.load(Ordering::Relaxed) >= 6
    });
    names.forgets("app.test");
    eventually(|| client.get("/").status == 502);
    let lines = weir.log_to("name has no address any more");
    let of_it = lines.iter().filter(|line| line.contains("resolv.conf"));
    assert_eq!(of_it.count(), 1, "{lines:?}");
}

/// As Docker's are.
#[test]
fn a_name_may_have_an_underscore() {
    let names = NameServer::on_port_53();
    let server = Server::start();
    names.says("my_app", &[server.ip()], 60);
    let weir = before(&[("app", &url("my_app", server.address))], &names.mounted());
    assert_eq!(weir.client().get("/").status, 200);
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: {{dns: 'my_app:{}', servers: ['{}']}}}}}}\n",
        server.address.port(),
        names.address
    ));
    assert_eq!(lane.connect().get("/").status, 200);
}
