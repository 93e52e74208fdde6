//! A line a request, to standard output. Lines come in batches to a thread that writes them.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Serialize, Serializer};
use tracing::{error, warn};

use super::lines::{Counts, Lines};
use crate::blocking;
use crate::config::telemetry::LogFormat;
use crate::event::{AuditEvent, Rfc3339};

/// Bytes that wait to be written, at most.
const ROOM: usize = 2 << 20;
/// Bytes at which a batch is full.
pub const BATCH: usize = 32 * 1024;

/// What a line tells.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a, 't> {
    pub event: &'a AuditEvent<&'t str>,
    pub user_agent: Option<&'t str>,
}

/// Lines on their way out, which have a thread once there are some.
#[derive(Debug)]
pub struct AccessLog {
    lines: Arc<Lines>,
    has_thread: AtomicBool,
    /// Whether it was told that no thread could be begun. Held by who begins one.
    lacks_thread: Mutex<bool>,
}

impl Default for AccessLog {
    fn default() -> AccessLog {
        AccessLog {
            lines: Arc::new(Lines::new(ROOM)),
            has_thread: AtomicBool::new(false),
            lacks_thread: Mutex::new(false),
        }
    }
}

impl AccessLog {
    /// Hands on whole lines, or drops them where too many wait.
    pub fn hand_on(&self, batch: &[u8]) {
        if !self.has_thread.load(Ordering::Relaxed) {
            self.begin();
        }
        self.lines.push(batch);
    }

    /// What became of the lines so far.
    pub fn counts(&self) -> Counts {
        self.lines.counts()
    }

    /// Waits until all lines are out, for at most `within`.
    pub fn stop(&self, within: Duration) {
        // Those of a lane's last requests may have waited for a thread, of which lanes have left some by now.
        if !self.has_thread.load(Ordering::Relaxed) && !self.lines.flush(Duration::ZERO) {
            self.begin();
        }
        if !self.lines.flush(within) {
            warn!("standard output takes no more: the last lines of the access log are lost");
        }
    }

    /// Begins the thread that writes them. Where there is none the next lines try again, and some wait until then.
    fn begin(&self) {
        // Another lane is at it.
        let Some(mut lacks_thread) = self.lacks_thread.try_lock() else {
            return;
        };
        if self.has_thread.load(Ordering::Relaxed) {
            return;
        }
        let lines = self.lines.clone();
        // Without the buffer of std, which would write later what is counted as dropped.
        let out = io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let thread = thread::Builder::new().name("access-log".to_owned());
        let begin = |out| {
            thread
                .spawn(move || write(&lines, out))
                .map_err(blocking::none)
        };
        match out.and_then(begin) {
            Ok(_) => self.has_thread.store(true, Ordering::Relaxed),
            Err(error) if !*lacks_thread => {
                *lacks_thread = true;
                error!(%error, "the access log cannot begin: lines wait until it can, and those that are too many are dropped");
            }
            Err(_) => {}
        }
    }
}

fn write(lines: &Lines, out: File) {
    let fails = |error: &io::Error| {
        warn!(%error, "the access log cannot be written; its lines are dropped until it can");
    };
    lines.write(out, fails, |_| {})
}

/// A line as JSON, with the names that `weir audit query --format jsonl` has; what a request lacks is left out.
#[derive(Serialize)]
struct Json<'a> {
    time: Rfc3339,
    request_id: &'a str,
    client: std::net::IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'a str>,
    method: &'a str,
    host: &'a str,
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    query: Option<&'a str>,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<&'a str>,
    #[serde(skip_serializing_if = "<[&str]>::is_empty")]
    limits: &'a [&'a str],
    #[serde(skip_serializing_if = "Option::is_none")]
    breaker: Option<&'a str>,
    bytes_in: u64,
    bytes_out: u64,
    duration_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream_duration_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<Hex>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_agent: Option<&'a str>,
}

impl Line<'_, '_> {
    /// Appends it, with the end of the line.
    pub fn put(&self, format: LogFormat, out: &mut Vec<u8>) {
        match format {
            LogFormat::Json => self.put_json(out),
            LogFormat::Pretty => self.put_pretty(out),
        }
        out.push(b'\n');
    }

    fn put_json(&self, out: &mut Vec<u8>) {
        let event = self.event;
        let line = Json {
            time: Rfc3339(event.time),
            request_id: &event.request_id(),
            client: event.client,
            user: event.user,
            method: event.method,
            host: event.host,
            path: event.path,
            query: event.query,
            status: event.status,
            label: event.label,
            route: event.route,
            upstream: event.upstream,
            endpoint: event.endpoint,
            limits: &event.limits,
            breaker: event.breaker,
            bytes_in: event.bytes_in,
            bytes_out: event.bytes_out,
            duration_us: event.duration.0,
            upstream_duration_us: event.upstream_duration.map(|duration| duration.0),
            trace_id: event.trace_id.map(Hex),
            user_agent: self.user_agent,
        };
        serde_json::to_writer(out, &line).expect("texts and numbers are JSON");
    }

    fn put_pretty(&self, out: &mut Vec<u8>) {
        let event = self.event;
        let mut text = String::with_capacity(256);
        let _ = write!(
            text,
            "{} {} {} \"{} {}{}",
            Rfc3339(event.time),
            event.client,
            Plain(event.user.unwrap_or("-")),
            Plain(event.method),
            Plain(event.host),
            Plain(event.path)
        );
        if let Some(query) = event.query {
            let _ = write!(text, "?{}", Plain(query));
        }
        let _ = write!(
            text,
            "\" {} {} {}B {:.3}ms {} {} {}",
            event.status,
            event.label.unwrap_or("-"),
            event.bytes_out,
            event.duration.0 as f64 / 1e3,
            event.upstream.unwrap_or("-"),
            event.route.unwrap_or("-"),
            Plain(&event.request_id()),
        );
        if let Some(agent) = self.user_agent {
            let _ = write!(text, " \"{}\"", Plain(agent));
        }
        out.extend_from_slice(text.as_bytes());
    }
}

/// Text that stays on its line, and between its quotes.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for char in self.0.chars() {
            match char {
                '"' | '\\' => write!(f, "\\{char}")?,
                char if is_not_shown(char) => write!(f, "{}", char.escape_default())?,
                char => f.write_char(char)?,
            }
        }
        Ok(())
    }
}

/// Whether it does something to a text in place of being seen in it: a control character, and what parts lines or turns the direction of
/// what is read, so that it shows something else than it says (CVE-2021-42574).
pub fn is_not_shown(char: char) -> bool {
    let turns = matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    char.is_control() || turns
}

struct Hex([u8; 16]);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:032x}", u128::from_be_bytes(self.0)))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::event::Micros;

    fn line(format: LogFormat, path: &str) -> String {
        let event = AuditEvent {
            seq: 0,
            time: Micros(1_700_000_000_000_001),
            client: Ipv4Addr::LOCALHOST.into(),
            user: Some("ann"),
            label: None,
            route: Some("/*"),
            method: "GET",
            path,
            status: 200,
            id: [7; 16],
            upstream: Some("app"),
            endpoint: Some("app:80"),
            host: "x.org",
            query: Some("a=1"),
            limits: ["l: admitted"].into_iter().collect(),
            breaker: None,
            bytes_in: 1,
            bytes_out: 2,
            duration: Micros(1_500),
            upstream_duration: None,
            request_id: Some("r1"),
            trace_id: Some([1; 16]),
            headers: Vec::new(),
        };
        let mut text = Vec::new();
        let line = Line {
            event: &event,
            user_agent: Some("curl \"8\""),
        };
        line.put(format, &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_line_says_what_the_audit_would() {
        assert_eq!(
            line(LogFormat::Json, "/a"),
            concat!(
                r#"{"time":"2023-11-14T22:13:20.000001Z","request_id":"r1","client":"127.0.0.1","user":"ann","method":"GET","#,
                r#""host":"x.org","path":"/a","query":"a=1","status":200,"route":"/*","upstream":"app","endpoint":"app:80","#,
                r#""limits":["l: admitted"],"bytes_in":1,"bytes_out":2,"duration_us":1500,"#,
                r#""trace_id":"01010101010101010101010101010101","user_agent":"curl \"8\""}"#,
                "\n"
            )
        );
        assert_eq!(
            line(LogFormat::Pretty, "/a"),
            "2023-11-14T22:13:20.000001Z 127.0.0.1 ann \"GET x.org/a?a=1\" 200 - 2B 1.500ms app /* r1 \"curl \\\"8\\\"\"\n"
        );
    }

    #[test]
    fn no_request_makes_two_lines() {
        for format in [LogFormat::Json, LogFormat::Pretty] {
            let text = line(format, "/a\r\n\u{85}\u{1b}[31m\" 200 -");
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            assert!(text.ends_with('\n') && !text.contains(['\r', '\u{1b}']));
        }
        // Nor one that people see otherwise.
        let text = line(LogFormat::Pretty, "/a\u{2028}\u{202e}b\u{2066}\u{200f}c");
        assert!(
            text.contains(r"/a\u{2028}\u{202e}b\u{2066}\u{200f}c"),
            "{text}"
        );
    }
}
