//! What weir tells of itself, as the file spells it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::Percent;
use crate::config::yaml::At;

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Telemetry {
    pub log: Option<At<Log>>,
    /// A line a request, to standard output; absent: none.
    pub access_log: Option<At<AccessLog>>,
    /// weir's part in traces; absent: what requests say of them goes on as it is.
    pub traces: Option<At<Traces>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Log {
    /// [default: pretty]
    pub format: Option<At<LogFormat>>,
    /// The least that is told, debug and trace of weir alone; the environment variable WEIR_LOG goes before it, and has its libraries, too
    /// [default: info].
    pub level: Option<At<LogLevel>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// A JSON object a line.
    Json,
    /// A line for people, in colours on a terminal.
    #[default]
    Pretty,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct AccessLog {
    /// [default: that of `log`]
    pub format: Option<At<LogFormat>>,
    /// The share of requests that have a line [default: 100%].
    pub sample: Option<At<Percent>>,
    /// What has one whatever the share [default: errors, rejected].
    pub always: Option<At<Vec<At<Always>>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Always {
    /// A status from 500 on, or an answer that broke off.
    Errors,
    /// Refused by weir, whatever the reason.
    Rejected,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Traces {
    /// The collector that spans go to, by OTLP over gRPC, for example `http://otel-collector:4317` [default: none].
    pub otlp: Option<At<String>>,
    /// The share of traces that are kept, of those that begin here; a trusted proxy decides for its own [default: 1%].
    pub sample: Option<At<Percent>>,
}
