//! weir as a process: `weir run` on ports of its choice, and the files that it reads.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use serde_json::Value;

use super::{Client, PATIENCE, metrics};

/// The lines of a stream, which is read on when no one looks, so that who writes never waits.
fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let lines = BufReader::new(stream).lines();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}

/// A child's standard error, line by line.
pub struct Log(Receiver<String>);

impl Log {
    pub fn of(child: &mut Child) -> Log {
        Log(lines(child.stderr.take().unwrap()))
    }

    /// The next line with `part` in it.
    pub fn until(&self, part: &str) -> String {
        loop {
            let line = self.0.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|error| panic!("no {part:?} in the log: {error}"));
            if line.contains(part) {
                return line;
            }
        }
    }
}

/// A child that is ended when the test lets go of it.
pub struct Ended(pub Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `weir echo` on a port of its choice, ended when the test lets go of it.
pub struct Echo {
    pub child: Child,
    pub address: String,
}

impl Echo {
    pub fn start() -> Echo {
        let mut child = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["echo", "--address", "127.0.0.1:0"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let line = Log::of(&mut child).until("address=");
        let address = line.rsplit("address=").next().unwrap().trim().to_owned();
        Echo { child, address }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `weir run`, ended when the test lets go of it.
pub struct Running {
    pub child: Child,
    log: Log,
    pub address: String,
    pub admin: String,
    /// Where /metrics is served alone, if the file says so.
    pub metrics: Option<String>,
}

impl Running {
    pub fn start(config: &Path) -> Running {
        Running::start_in(config, &[])
    }

    /// With these variables in its environment.
    pub fn start_in(config: &Path, environment: &[(&str, &str)]) -> Running {
        Running::start_as("run", config, environment)
    }

    /// By this command: `run`, `proxy` or `worker`, which has no listener.
    pub fn start_as(command: &str, config: &Path, environment: &[(&str, &str)]) -> Running {
        Running::begin(&[command], config, environment, None)
    }

    /// After these shell commands, in a mount namespace of its own.
    pub fn start_after(script: &str, config: &Path, environment: &[(&str, &str)]) -> Running {
        Running::begin(&["run"], config, environment, Some(script))
    }

    /// In the place of the one that runs at the same ports, if there is one.
    pub fn taking_over(config: &Path) -> Running {
        Running::begin(&["run", "--take-over"], config, &[], None)
    }

    fn begin(
        command: &[&str],
        config: &Path,
        environment: &[(&str, &str)],
        script: Option<&str>,
    ) -> Running {
        let program = env!("CARGO_BIN_EXE_weir");
        let mut weir = Command::new(program);
        if let Some(script) = script {
            weir = Command::new("unshare");
            let script = format!("set -e; {script}; exec \"$@\"");
            weir.args(["-m", "sh", "-c", &script, "sh", program]);
        }
        let mut child = weir
            .args(command)
            .arg("-c")
            .arg(config)
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Log::of(&mut child);
        let mut running = Running {
            child,
            log,
            address: String::new(),
            admin: String::new(),
            metrics: None,
        };
        let is_worker = command == ["worker"];
        let line = running.log_until(if is_worker { "working" } else { "listening" });
        let field = |name: &str| {
            let value = line.split(name).nth(1)?.split_whitespace().next()?;
            Some(value.to_owned())
        };
        if !is_worker {
            running.address = field("addresses=").unwrap();
        }
        running.admin = field("admin=").unwrap();
        running.metrics = field("metrics=");
        running
    }

    /// The next line of the log with `part` in it.
    pub fn log_until(&self, part: &str) -> String {
        self.log.until(part)
    }

    /// The next lines of the log, to one with `part` in it.
    pub fn log_to(&self, part: &str) -> Vec<String> {
        let mut lines = vec![self.log.until("")];
        while !lines[lines.len() - 1].contains(part) {
            lines.push(self.log.until(""));
        }
        lines
    }

    /// What comes on standard output from now on, line by line.
    pub fn output(&mut self) -> Receiver<String> {
        lines(self.child.stdout.take().unwrap())
    }

    pub fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.address).unwrap()
    }

    pub fn client(&self) -> Client {
        Client::to(&self.address)
    }

    pub fn admin(&self) -> Client {
        Client::to(&self.admin)
    }

    pub fn signal(&self, name: &str) {
        signal(&self.child, name);
    }

    /// What it tells of this series.
    pub fn told(&self, series: &str) -> Option<f64> {
        metrics::value(&self.admin().get("/metrics").body, series)
    }

    /// 0 where it is not told.
    pub fn metric(&self, series: &str) -> u64 {
        self.told(series).map_or(0, |value| value as u64)
    }

    /// This field of its status, such as `VmRSS`, in KiB.
    pub fn memory(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib = value.unwrap().trim().strip_suffix(" kB");
        kib.unwrap().parse().unwrap()
    }

    /// A file in its own mounts.
    pub fn sees(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(path.strip_prefix("/").unwrap())
    }
}

/// Sends the signal of this name, such as `TERM`.
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .args(["-s", name, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs weir with these arguments, and behind them a file's path, until it ends: with which code, and what it says, its errors last.
pub fn weir(arguments: &[&str], path: &Path) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(arguments)
        .arg(path)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

/// The events on record, the latest first, as `weir audit query` shows them with these arguments.
pub fn audited(config: &Path, arguments: &[&str]) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["audit", "query", "--format", "jsonl", "-c"])
        .arg(config)
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let events = text.lines().map(serde_json::from_str);
    events.map(Result::unwrap).collect()
}

/// Where Debian has the library that tells a process another time.
pub fn faketime() -> String {
    let machines = ["x86_64", "aarch64"];
    let mut paths = machines
        .map(|machine| format!("/usr/lib/{machine}-linux-gnu/faketime/libfaketime.so.1"))
        .into_iter();
    let found = paths.find(|path| Path::new(path).exists());
    found.expect("libfaketime is not there, which this test needs; `make test` installs it by apt")
}

pub fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}
