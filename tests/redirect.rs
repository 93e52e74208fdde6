//! The rules of `weir redirect` in network namespaces of the test's own, with weir behind them. It needs root, iproute2 and nftables.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};

use harness::process::{Log, file};

/// Whom weir runs as, and whom the app.
const WEIR: &str = "65532";
const APP: u32 = 1000;

/// A client's namespace and a pod's, joined by a cable.
struct Pod {
    name: String,
    children: Vec<Child>,
}

const SETUP: &str = "
    ip netns add $N-a; ip netns add $N-b
    ip link add veth0 netns $N-a type veth peer name veth0 netns $N-b
    for s in a b; do ip -n $N-$s link set lo up; ip -n $N-$s link set veth0 up; done
    ip -n $N-a addr add 10.78.0.1/24 dev veth0; ip -n $N-a addr add fd78::1/64 dev veth0 nodad
    ip -n $N-b addr add 10.78.0.2/24 dev veth0; ip -n $N-b addr add fd78::2/64 dev veth0 nodad";

impl Pod {
    fn new(name: &str) -> Pod {
        let pod = Pod {
            name: format!("weir-{name}-{}", std::process::id()),
            children: Vec::new(),
        };
        let made = Command::new("sh")
            .args(["-ec", SETUP])
            .env("N", &pod.name)
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "this test makes network namespaces, as root and by `ip`, which `make test` installs: {made:?}"
        );
        pod
    }

    fn command(&self, side: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}-{side}", self.name), program]);
        command
    }

    /// `weir redirect`, as the pod's first step runs it.
    fn redirect(&self, arguments: &[&str]) -> Output {
        let mut command = self.command("b", env!("CARGO_BIN_EXE_weir"));
        command.arg("redirect").args(arguments).output().unwrap()
    }

    fn rules(&self) -> String {
        said(self.command("b", "nft").args(["list", "ruleset"]))
    }

    /// Starts weir in the pod, by this user, as `arguments` say, and waits for `part` in its log.
    fn start(&mut self, user: &str, arguments: &[&str], part: &str) {
        let mut command = self.command("b", "setpriv");
        let mut child = command
            .args(["--reuid", user, "--regid", user, "--clear-groups"])
            .arg(env!("CARGO_BIN_EXE_weir"))
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Log::of(&mut child);
        self.children.push(child);
        log.until(part);
    }

    /// What is at this URL, asked from one side.
    fn ask(&self, side: &str, url: &str) -> String {
        said(self.command(side, "curl").args(["-sS", "-m", "10", url]))
    }

    /// What is at this URL, asked by the app itself.
    fn app_asks(&self, url: &str) -> String {
        let mut command = self.command("b", "setpriv");
        let user = APP.to_string();
        command.args(["--reuid", &user, "--clear-groups", "curl"]);
        said(command.args(["-sS", "-m", "10", url]))
    }
}

fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

impl Drop for Pod {
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

/// weir tells the app whom it asks for; what came past it does not say.
fn came_through_weir(body: &str) -> bool {
    assert!(body.contains("\"path\""), "no answer of the app: {body}");
    body.contains("\"x-forwarded-for\"")
}

#[test]
fn what_comes_in_goes_through_weir_and_what_weir_sends_does_not() {
    let mut pod = Pod::new("redirect");
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("weir.yaml");
    let text = "listeners: [{name: in, address: '[::]:9900', transparent: true}]\n\
         upstreams: {app: {endpoints: ['http://127.0.0.1:9']}}\nroutes: [{upstream: app}]\n\
         admin: {address: '127.0.0.1:9901'}\nmetrics: {address: '[::]:9902'}\nruntime: {lanes: 1}\n";
    std::fs::write(&config, text).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).unwrap();
    let app = APP.to_string();
    for address in ["[::]:8080", "[::]:9090"] {
        pod.start(&app, &["echo", "--address", address], "address=");
    }
    let arguments = [
        "--to",
        "9900",
        "--uid",
        WEIR,
        "--skip-inbound-ports",
        "9902,9090",
    ];
    let apply = [&["--apply"][..], &arguments].concat();
    let applied = pod.redirect(&apply);
    assert!(applied.status.success(), "{applied:?}");
    pod.start(
        WEIR,
        &["proxy", "-c", config.to_str().unwrap()],
        "listening",
    );
    let rules = pod.rules();

    for twice in [false, true] {
        if twice {
            assert!(pod.redirect(&apply).status.success());
            assert_eq!(pod.rules(), rules, "applied twice it is there once");
        }
        for host in ["10.78.0.2", "[fd78::2]"] {
            let url = |port: u16| format!("http://{host}:{port}/");
            // From outside, and by the app itself over its own address.
            assert!(came_through_weir(&pod.ask("a", &url(8080))), "{host}");
            assert!(came_through_weir(&pod.app_asks(&url(8080))), "{host}");
            // Ports that are left out, and weir's own metrics.
            assert!(!came_through_weir(&pod.ask("a", &url(9090))), "{host}");
            assert!(!came_through_weir(&pod.app_asks(&url(9090))), "{host}");
            let metrics = pod.ask("a", &format!("{}metrics", url(9902)));
            assert!(metrics.contains("weir_connections"), "{metrics}");
        }
        for host in ["127.0.0.1", "[::1]"] {
            // Within the pod its loopback is the app's own affair.
            let body = pod.app_asks(&format!("http://{host}:8080/"));
            assert!(!came_through_weir(&body), "{host}");
        }
    }
    // What is no one's is weir's to refuse: it asked where the client wanted to go, once, and not itself.
    let body = pod.ask("a", "http://10.78.0.2:7777/");
    assert!(body.contains("\"status\":502"), "{body}");

    assert!(pod.redirect(&["--remove"]).status.success());
    assert_eq!(pod.rules(), "");
    assert!(!came_through_weir(&pod.ask("a", "http://10.78.0.2:8080/")));
    assert!(pod.redirect(&["--remove"]).status.success(), "twice");
}

#[test]
fn rules_of_others_stay() {
    let pod = Pod::new("others");
    let other = "table inet other {\n\tchain c {\n\t}\n}\n";
    let config = file(other);
    let path = config.path().to_str().unwrap();
    assert_eq!(said(pod.command("b", "nft").args(["-f", path])), "");
    assert!(pod.redirect(&["--apply"]).status.success());
    assert!(pod.rules().contains("table inet other"));
    assert!(pod.redirect(&["--remove"]).status.success());
    assert_eq!(pod.rules(), other);
}

#[test]
fn what_is_printed_is_what_is_applied() {
    let pod = Pod::new("print");
    let printed = pod.redirect(&["--print", "--skip-inbound-ports", "25"]);
    assert_eq!(pod.rules(), "");
    let config = file(std::str::from_utf8(&printed.stdout).unwrap());
    let path = config.path().to_str().unwrap();
    assert_eq!(said(pod.command("b", "nft").args(["-f", path])), "");
    let by_hand = pod.rules();
    assert!(
        pod.redirect(&["--apply", "--skip-inbound-ports", "25"])
            .status
            .success()
    );
    assert_eq!(pod.rules(), by_hand);
}

#[test]
fn mistakes_tell_the_mend() {
    let weir = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.arg("redirect").args(arguments);
        command
    };
    let refused = |command: &mut Command, mend: &str| {
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(mend), "{said}");
    };
    refused(&mut weir(&[]), "--apply");
    refused(&mut weir(&["--apply", "--print"]), "cannot be used with");
    refused(&mut weir(&["--print", "--to", "0"]), "--to");
    refused(
        &mut weir(&["--print", "--skip-inbound-ports", "80,0"]),
        "0 is not in 1..=65535",
    );
    refused(&mut weir(&["--print", "--uid", "0"]), "--uid");
    refused(
        weir(&["--apply"]).env("PATH", "/nowhere"),
        "there is no nft here: install nftables",
    );
    // No one but root may.
    refused(weir(&["--apply"]).uid(APP), "NET_ADMIN");
}
