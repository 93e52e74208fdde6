//! What weir tells of requests beside the audit.

pub use super::raw::{LogFormat, LogLevel};

/// What is logged, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Log {
    pub format: LogFormat,
    /// The least that is told.
    pub level: LogLevel,
}

/// Which requests have a line on standard output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AccessLog {
    pub format: LogFormat,
    /// From 0 to 1.
    pub sample: f64,
    /// A status from 500 on, or an answer that broke off, always has one.
    pub errors: bool,
    /// So has what weir refuses.
    pub rejected: bool,
}

/// weir's part in traces.
#[derive(Debug, Clone, PartialEq)]
pub struct Traces {
    /// The URL of the collector that spans go to by OTLP over gRPC.
    pub otlp: Option<String>,
    /// Of traces that begin here, from 0 to 1.
    pub sample: f64,
}
