//! What weir tells of itself, as the file spells it.

use serde::Serialize;

use crate::config::raw::{Always, LogFormat, LogLevel};
use crate::config::units::Percent;
use crate::config::{Config, telemetry};

#[derive(Serialize)]
pub(super) struct Telemetry<'c> {
    log: Log,
    #[serde(skip_serializing_if = "Option::is_none")]
    access_log: Option<AccessLog>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traces: Option<Traces<'c>>,
}

#[derive(Serialize)]
struct Log {
    format: LogFormat,
    level: LogLevel,
}

#[derive(Serialize)]
struct AccessLog {
    format: LogFormat,
    sample: Percent,
    always: Vec<Always>,
}

#[derive(Serialize)]
struct Traces<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    otlp: Option<&'c str>,
    sample: Percent,
}

impl<'c> Telemetry<'c> {
    pub(super) fn new(config: &'c Config) -> Telemetry<'c> {
        Telemetry {
            log: Log {
                format: config.log.format,
                level: config.log.level,
            },
            access_log: config.access_log.as_ref().map(AccessLog::new),
            traces: config.traces.as_ref().map(|traces| Traces {
                otlp: traces.otlp.as_deref(),
                sample: Percent(traces.sample),
            }),
        }
    }
}

impl AccessLog {
    fn new(log: &telemetry::AccessLog) -> AccessLog {
        let always = [
            (Always::Errors, log.errors),
            (Always::Rejected, log.rejected),
        ];
        let always = always.into_iter().filter(|(_, always)| *always);
        AccessLog {
            format: log.format,
            sample: Percent(log.sample),
            always: always.map(|(kind, _)| kind).collect(),
        }
    }
}
