//! Transparent listeners behind iptables' REDIRECT, in network namespaces of the test's own. It needs root, iproute2 and iptables.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::process::{Child, Command, Output, Stdio};

use harness::process::{Log, file};

/// A client's namespace and one in which weir and its apps are, joined by a cable.
struct Net {
    name: String,
    children: Vec<Child>,
}

const SETUP: &str = "
    ip netns add $N-a; ip netns add $N-b
    ip link add veth0 netns $N-a type veth peer name veth0 netns $N-b
    for s in a b; do ip -n $N-$s link set lo up; ip -n $N-$s link set veth0 up; done
    ip -n $N-a addr add 10.77.0.1/24 dev veth0; ip -n $N-a addr add fd77::1/64 dev veth0 nodad
    ip -n $N-b addr add 10.77.0.2/24 dev veth0; ip -n $N-b addr add fd77::2/64 dev veth0 nodad
    for tables in iptables ip6tables; do
        ip netns exec $N-b $tables -t nat -A PREROUTING -p tcp -m multiport --dports 80,81,82 -j REDIRECT --to-ports 15006
        # What weir sends to this one comes back to it.
        ip netns exec $N-b $tables -t nat -A OUTPUT -p tcp --dport 82 -j REDIRECT --to-ports 15006
    done";

impl Net {
    fn new(name: &str) -> Net {
        let id = Command::new("id").arg("-u").output().unwrap().stdout;
        assert_eq!(
            String::from_utf8(id).unwrap().trim(),
            "0",
            "these tests make network namespaces, which only root may: run them as root"
        );
        let net = Net {
            name: format!("weir-{name}-{}", std::process::id()),
            children: Vec::new(),
        };
        net.shell(SETUP);
        net
    }

    #[track_caller]
    fn shell(&self, script: &str) {
        let output = Command::new("sh")
            .args(["-ec", script])
            .env("N", &self.name)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "ip and iptables, which these tests need and `make test` installs by apt: {output:?}"
        );
    }

    fn command(&self, side: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}-{side}", self.name), program]);
        command
    }

    /// Starts weir as `arguments` say where its clients' connections go, and waits for `part` in its log.
    fn start(&mut self, arguments: &[&str], part: &str) {
        let mut command = self.command("b", env!("CARGO_BIN_EXE_weir"));
        let mut child = command
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Log::of(&mut child);
        self.children.push(child);
        log.until(part);
    }

    /// Asks from the client's side.
    fn curl(&self, arguments: &[&str]) -> String {
        said(
            self.command("a", "curl")
                .args(["-sS", "-m", "10"])
                .args(arguments)
                .output(),
        )
    }
}

fn said(output: std::io::Result<Output>) -> String {
    let output = output.unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

impl Drop for Net {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for side in ["a", "b"] {
            let name = format!("{}-{side}", self.name);
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

#[test]
fn requests_go_where_their_connections_were_to_go_and_never_round() {
    let mut net = Net::new("way");
    let config = file(
        "listeners: [{name: in, address: '[::]:15006', transparent: true}]\n\
         upstreams: {app: {endpoints: ['http://127.0.0.1:9']}}\nroutes: [{upstream: app}]\n\
         admin: {address: '127.0.0.1:9901'}\nruntime: {lanes: 1}\n",
    );
    // Two apps at each address.
    for address in [
        "10.77.0.2:80",
        "10.77.0.2:81",
        "[fd77::2]:80",
        "[fd77::2]:81",
    ] {
        net.start(&["echo", "--address", address], "address=");
    }
    let path = config.path().to_str().unwrap();
    net.start(&["run", "-c", path], "listening");
    for host in ["10.77.0.2", "[fd77::2]"] {
        for port in [80, 81] {
            let body = net.curl(&[&format!("http://{host}:{port}/hello")]);
            assert!(body.contains("/hello"), "{host}:{port}: {body}");
            // It came through weir, which tells who asks.
            let client = if host.starts_with('[') {
                "fd77::1"
            } else {
                "10.77.0.1"
            };
            assert!(
                body.contains(&format!("\"x-forwarded-for\": \"{client}\"")),
                "{body}"
            );
            // Nothing but the destination tells the apps apart: the Host is the client's own.
            let other = net.curl(&["-H", "Host: other.test", &format!("http://{host}:{port}/")]);
            assert!(other.contains("other.test"), "{other}");
        }
        let status = |port: u16| {
            let url = format!("http://{host}:{port}/");
            net.curl(&["-o", "/dev/null", "-D", "-", &url])
        };
        // What was not redirected would go to weir itself.
        let direct = status(15006);
        assert!(
            direct.contains(" 502 ") && direct.contains("not_redirected"),
            "{direct}"
        );
        // What weir sends comes back to it.
        let round = status(82);
        assert!(
            round.contains(" 502 ") && round.contains("details=\"loop\""),
            "{round}"
        );
    }
    // It served all of these, and has no connections beyond those of its idle clients.
    let metrics = said(
        net.command("b", "curl")
            .args(["-s", "http://127.0.0.1:9901/metrics"])
            .output(),
    );
    let loops = metrics
        .lines()
        .find(|line| line.starts_with("weir_rejections_total{reason=\"loop\"}"));
    assert_eq!(loops, Some("weir_rejections_total{reason=\"loop\"} 2"));
}
