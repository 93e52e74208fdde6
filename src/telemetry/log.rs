//! The log, to standard error: how its lines look, and how often those may come that clients can cause. How they are written is `lines`'.

use std::env;
use std::io::{self, IsTerminal, Write as _};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber, error, warn};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, reload};

use super::lines::{Counts, Lines};
use super::traces::CRATES;
use crate::config::telemetry::{Log, LogFormat, LogLevel};

/// For the last lines to be out.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// Puts another filter in place of that which [`init`] began with.
static SET_FILTER: OnceLock<Box<dyn Fn(EnvFilter) + Send + Sync>> = OnceLock::new();

/// Bytes of lines that wait, at most.
const ROOM: usize = 1 << 20;

static LINES: Lines = Lines::new(ROOM);
/// Whether the lines have a thread, once they need one.
static HAS_THREAD: OnceLock<bool> = OnceLock::new();

/// Begins to log. Colours only on a terminal, and none where `NO_COLOR` is set (no-color.org); the environment variable
/// `WEIR_LOG` goes before `settings.level`.
pub fn init(settings: Log) {
    let variable = env::var("WEIR_LOG").ok();
    let (filter, misread) = filter(variable.as_deref(), settings.level);
    let log = tracing_subscriber::fmt().with_writer(|| Out);
    let plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    match settings.format {
        LogFormat::Json => {
            let log = log.json().flatten_event(true).with_env_filter(filter);
            let log = log.with_filter_reloading();
            begin(log.reload_handle(), log.finish());
        }
        LogFormat::Pretty => {
            let log = log.with_ansi(io::stderr().is_terminal() && !plain);
            let log = log.with_env_filter(filter).with_filter_reloading();
            begin(log.reload_handle(), log.finish());
        }
    }
    if misread {
        // An error, since the file may let nothing less be told.
        error!(
            variable,
            "WEIR_LOG is not understood, and telemetry.log.level is taken; write off, error, warn, info, debug or trace"
        );
    }
}

fn begin<S: 'static>(filters: reload::Handle<EnvFilter, S>, log: impl Subscriber + Send + Sync) {
    // A second call changes nothing: the first subscriber stays.
    if log.with(OfTraces::default()).try_init().is_ok() {
        // The subscriber, which lives as long as the process, is never gone.
        let _ = SET_FILTER.set(Box::new(move |filter| drop(filters.reload(filter))));
    }
}

/// Tells by another level from now on, unless `WEIR_LOG` goes before it.
pub fn set_level(level: LogLevel) {
    let (filter, _) = filter(env::var("WEIR_LOG").ok().as_deref(), level);
    if let Some(set) = SET_FILTER.get() {
        set(filter);
    }
}

/// Says lines that are no events of the log, behind those that wait; as many as there is room for.
pub fn say(lines: &str) {
    for line in lines.lines() {
        // Nothing is there to be told of a failure.
        let _ = Out.write_all(format!("{line}\n").as_bytes());
    }
}

/// What became of the lines so far.
pub fn counts() -> Counts {
    LINES.counts()
}

/// Waits for a moment, when it is dropped, until the last lines are out.
#[derive(Debug)]
pub struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        LINES.flush(FLUSH_WITHIN);
    }
}

/// Standard error, by the thread that alone waits for it.
struct Out;

impl io::Write for Out {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let begin = || thread::Builder::new().name("log".to_owned()).spawn(write);
        if !HAS_THREAD.get_or_init(|| begin().is_ok()) {
            return io::stderr().write(line);
        }
        LINES.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write() {
    let tell = |lost| {
        warn!(
            lost,
            "standard error did not take lines of the log in time: they are lost"
        );
    };
    LINES.write(io::stderr(), |_| {}, tell)
}

/// Holds back the warnings of OpenTelemetry's crates: weir says itself whether a collector takes spans, but for those that it refuses of a
/// call that went well. These are known to the crates alone, and said once a minute.
#[derive(Debug, Default)]
struct OfTraces {
    told: Mutex<Option<Instant>>,
}

impl OfTraces {
    const EVERY: Duration = Duration::from_secs(60);
}

impl<S: Subscriber> Layer<S> for OfTraces {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let of = event.metadata();
        if !of.target().starts_with(CRATES) || *of.level() > Level::WARN {
            return true;
        }
        if !of.name().ends_with(".PartialSuccess") {
            return false;
        }
        let (now, mut told) = (Instant::now(), self.told.lock());
        let is_due = told.is_none_or(|told| now - told >= OfTraces::EVERY);
        if is_due {
            *told = Some(now);
        }
        is_due
    }
}

/// Holds back the lines of one kind that can come with each request or connection: so many in ten seconds, and a count of the others.
#[derive(Debug)]
pub struct LogRateLimit {
    at_most: u32,
    since: Option<Duration>,
    told: u32,
    left_out: u64,
}

impl LogRateLimit {
    const WITHIN: Duration = Duration::from_secs(10);

    pub fn new(at_most: u32) -> LogRateLimit {
        LogRateLimit {
            at_most,
            since: None,
            told: 0,
            left_out: 0,
        }
    }

    /// `None` where the line is to be left out, else how many were since the last that was not. `now` is by the monotonic clock.
    pub fn next(&mut self, now: Duration) -> Option<u64> {
        let over = |since| now.saturating_sub(since) >= LogRateLimit::WITHIN;
        if self.since.is_none_or(over) {
            (self.since, self.told) = (Some(now), 0);
        }
        if self.told == self.at_most {
            self.left_out += 1;
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// One line.
impl Default for LogRateLimit {
    fn default() -> LogRateLimit {
        LogRateLimit::new(1)
    }
}

/// What is told, and whether the variable could not be read. That leaves the level to the file, as one that says nothing does.
fn filter(variable: Option<&str>, level: LogLevel) -> (EnvFilter, bool) {
    let level = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        // Of libraries they would be some lines a request; the variable can ask for those.
        LogLevel::Debug => "info,weir=debug",
        LogLevel::Trace => "info,weir=trace",
    };
    let Some(variable) = variable.filter(|variable| !variable.is_empty()) else {
        return (EnvFilter::new(level), false);
    };
    // A word of which EnvFilter knows no level is the name of a target to it, and silences all others.
    let is_meant = |part: &str| part.contains(['=', '[']) || part.parse::<LevelFilter>().is_ok();
    let meant = variable.split(',').all(|part| is_meant(part.trim()));
    match EnvFilter::try_new(variable) {
        Ok(filter) if meant => (filter, false),
        Ok(_) | Err(_) => (EnvFilter::new(level), true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_what_ten_seconds_take_are_counted() {
        let mut lines = LogRateLimit::new(2);
        let mut next = |seconds| lines.next(Duration::from_secs(seconds));
        assert_eq!([next(100), next(103)], [Some(0), Some(0)]);
        assert_eq!([next(103), next(109)], [None, None]);
        assert_eq!([next(110), next(111), next(112)], [Some(2), Some(0), None]);
        assert_eq!(next(200), Some(1));
    }

    #[test]
    fn the_environment_goes_before_the_file() {
        let said = |variable, level| {
            let (filter, misread) = filter(variable, level);
            (filter.to_string(), misread)
        };
        let check = |variable, level, expected: &str| {
            let said = said(variable, level);
            assert_eq!(said, (expected.to_owned(), false), "{variable:?}");
        };
        check(None, LogLevel::Info, "info");
        check(None, LogLevel::Warn, "warn");
        check(Some(""), LogLevel::Warn, "warn");
        check(None, LogLevel::Debug, "weir=debug,info");
        check(Some("debug"), LogLevel::Warn, "debug");
        check(Some("debug,"), LogLevel::Warn, "debug");
        check(
            Some("weir::proxy=trace"),
            LogLevel::Warn,
            "weir::proxy=trace",
        );
        for misread in ["warning", "verbose", "weir=dbg", "loud=1=2"] {
            let said = said(Some(misread), LogLevel::Warn);
            assert_eq!(said, ("warn".to_owned(), true), "{misread}");
        }
    }
}
