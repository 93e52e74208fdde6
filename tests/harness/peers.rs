//! Programs of other authors at either end of weir: Python's, from the environment that `make peers` builds.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

/// A script of `tests/peers` that runs until the test lets go of it.
pub struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Peer {
    pub fn start(script: &str, arguments: &[&str]) -> Peer {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let python = root.join("target/peers-venv/bin/python");
        assert!(python.exists(), "run `make peers` first");
        let mut child = Command::new(python)
            .arg(root.join("tests/peers").join(script))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        Peer {
            child,
            input,
            output,
        }
    }

    /// The next line that it says.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "it said no more than {line:?}");
        line.trim_end().to_owned()
    }

    /// Tells it a line without waiting for an answer.
    pub fn tell(&mut self, line: &Value) {
        let input = self.input.as_mut().expect("it is open until the end");
        writeln!(input, "{line}").unwrap();
    }

    /// Its answer to a line, both as JSON.
    pub fn ask(&mut self, line: &Value) -> Value {
        self.tell(line);
        self.answer()
    }

    pub fn answer(&mut self) -> Value {
        serde_json::from_str(&self.line()).unwrap()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}
