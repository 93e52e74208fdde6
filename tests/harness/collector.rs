//! A real OTLP collector: what it gets, span by span.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use serde_json::Value;

use super::DEADLINE;

/// A collector on 127.0.0.1, ended when the test lets go of it.
pub struct Collector {
    child: Child,
    pub port: u16,
    lines: Receiver<String>,
}

impl Collector {
    /// On a port of its choice, or on this one.
    pub fn start(port: Option<u16>) -> Collector {
        static TOOLS: Once = Once::new();
        let root = env!("CARGO_MANIFEST_DIR");
        TOOLS.call_once(|| {
            let made = Command::new(format!("{root}/tests/otlp-venv.sh")).status();
            assert!(
                made.unwrap().success(),
                "python3 and its packages are needed"
            );
        });
        let mut child = Command::new(format!("{root}/target/otlp-venv/bin/python"))
            .arg(format!("{root}/tests/otlp_collector.py"))
            .arg(port.unwrap_or(0).to_string())
            // It ends with this end of the pipe, however the test ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let port = lines.recv_timeout(DEADLINE).unwrap().parse().unwrap();
        Collector { child, port, lines }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The next span.
    pub fn span(&self) -> Value {
        serde_json::from_str(&self.lines.recv_timeout(DEADLINE).unwrap()).unwrap()
    }

    /// The next `count` spans, by request: its own first, then those of its calls, each behind the one before.
    pub fn requests(&self, count: usize) -> Vec<Vec<Value>> {
        let mut requests = Vec::<Vec<Value>>::new();
        for _ in 0..count {
            let span = self.span();
            let request = requests
                .iter_mut()
                .find(|spans| spans[0]["trace_id"] == span["trace_id"]);
            match request {
                Some(spans) => spans.push(span),
                None => requests.push(vec![span]),
            }
        }
        for spans in &mut requests {
            spans.sort_by_key(|span| (span["kind"].as_u64(), span["start"].as_u64()));
            let (server, calls) = spans.split_first().unwrap();
            assert_eq!(server["kind"], 2);
            let mut time = server["start"].as_u64();
            for call in calls {
                assert_eq!(call["kind"], 3, "{call}");
                assert_eq!(call["parent_id"], server["span_id"]);
                assert!(call["start"].as_u64() >= time, "{calls:?}");
                time = call["end"].as_u64();
            }
            assert!(time <= server["end"].as_u64());
        }
        requests
    }

    /// All that came so far.
    pub fn spans(&self) -> Vec<Value> {
        self.lines
            .try_iter()
            .map(|line| serde_json::from_str(&line).unwrap())
            .collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
