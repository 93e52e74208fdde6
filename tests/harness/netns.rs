//! Two network namespaces of a test's own: a client's (`a`), and one (`b`) in which weir and its apps are. It needs root and iproute2.

use std::process::{Child, Command, Output, Stdio};

use super::process::Log;

/// Joined by a cable: 10.77.0.1 and fd77::1 are the client's, 10.77.0.2 and fd77::2 weir's.
pub struct Net {
    name: String,
    children: Vec<Child>,
}

const SETUP: &str = "
    ip netns add $N-a; ip netns add $N-b
    ip link add veth0 netns $N-a type veth peer name veth0 netns $N-b
    for s in a b; do ip -n $N-$s link set lo up; ip -n $N-$s link set veth0 up; done
    ip -n $N-a addr add 10.77.0.1/24 dev veth0; ip -n $N-a addr add fd77::1/64 dev veth0 nodad
    ip -n $N-b addr add 10.77.0.2/24 dev veth0; ip -n $N-b addr add fd77::2/64 dev veth0 nodad";

impl Net {
    pub fn new(name: &str) -> Net {
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

    /// Runs a script to which `$N-a` and `$N-b` are the namespaces' names.
    #[track_caller]
    pub fn shell(&self, script: &str) {
        let output = Command::new("sh")
            .args(["-ec", script])
            .env("N", &self.name)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "what these tests need `make test` installs by apt: {output:?}"
        );
    }

    pub fn command(&self, side: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}-{side}", self.name), program]);
        command
    }

    /// Starts weir as `arguments` say where its clients' connections go, and waits for `part` in its log.
    pub fn start(&mut self, arguments: &[&str], part: &str) {
        let mut command = self.command("b", env!("CARGO_BIN_EXE_weir"));
        command.args(arguments);
        self.keep(command, part);
    }

    /// Starts `command`, to be ended with the test, and waits for `part` in its log.
    pub fn keep(&mut self, mut command: Command, part: &str) {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Log::of(&mut child);
        self.children.push(child);
        log.until(part);
    }

    /// Asks from this side.
    pub fn curl(&self, side: &str, arguments: &[&str]) -> String {
        said(
            self.command(side, "curl")
                .args(["-sS", "-m", "10"])
                .args(arguments)
                .output(),
        )
    }
}

/// Both outputs of a command.
pub fn said(output: std::io::Result<Output>) -> String {
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
