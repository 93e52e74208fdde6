//! Logs, to standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// Begins to log: colours only on a terminal; the level by the environment variable `WEIR_LOG`, `info` unless set.
pub fn init() {
    let level = EnvFilter::try_from_env("WEIR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(level)
        .with_writer(io::stderr);
    // A second call changes nothing: the first subscriber stays.
    let _ = log.with_ansi(io::stderr().is_terminal()).try_init();
}
