//! Logs, to standard error.

use std::env;
use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::config::telemetry::{Log, LogFormat, LogLevel};

/// Begins to log. Colours only on a terminal, and none where `NO_COLOR` is set (no-color.org); the environment variable
/// `WEIR_LOG` goes before `settings.level`.
pub fn init(settings: Log) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(env::var("WEIR_LOG").ok().as_deref(), settings.level))
        .with_writer(io::stderr);
    let plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    // A second call changes nothing: the first subscriber stays.
    let _ = match settings.format {
        LogFormat::Json => log.json().flatten_event(true).try_init(),
        LogFormat::Pretty => log
            .with_ansi(io::stderr().is_terminal() && !plain)
            .try_init(),
    };
}

/// A variable that says nothing, or nothing that can be read, leaves the level to the file.
fn filter(variable: Option<&str>, level: LogLevel) -> EnvFilter {
    let level = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    };
    variable
        .filter(|variable| !variable.is_empty())
        .and_then(|variable| EnvFilter::try_new(variable).ok())
        .unwrap_or_else(|| EnvFilter::new(level))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_goes_before_the_file() {
        let check = |variable, level, expected| {
            assert_eq!(
                filter(variable, level).to_string(),
                expected,
                "{variable:?}"
            );
        };
        check(None, LogLevel::Info, "info");
        check(None, LogLevel::Warn, "warn");
        check(Some(""), LogLevel::Warn, "warn");
        check(Some("loud=1=2"), LogLevel::Warn, "warn");
        check(Some("debug"), LogLevel::Warn, "debug");
        check(
            Some("weir::proxy=trace"),
            LogLevel::Warn,
            "weir::proxy=trace",
        );
    }
}
