//! What weir tells of itself, from the file as written to [`Log`], [`AccessLog`] and [`Traces`].

use super::Checker;
use super::values::share;
use crate::config::raw::{self, Always};
use crate::config::telemetry::{AccessLog, Log, Traces};
use crate::config::yaml::told;
use crate::http1::head::is_host;

pub(super) struct Telemetry {
    pub log: Log,
    pub access_log: Option<AccessLog>,
    pub traces: Option<Traces>,
}

impl Checker {
    pub(super) fn telemetry(&mut self, raw: raw::Telemetry) -> Telemetry {
        let log = told(raw.log).unwrap_or_default();
        let log = Log {
            format: told(log.format).unwrap_or_default(),
            level: told(log.level).unwrap_or_default(),
        };
        Telemetry {
            access_log: told(raw.access_log).map(|raw| access_log_of(raw, log)),
            log,
            traces: told(raw.traces).map(|raw| self.traces(raw)),
        }
    }

    fn traces(&mut self, raw: raw::Traces) -> Traces {
        Traces {
            otlp: raw.otlp.and_then(|at| self.read(at, collector)),
            sample: share(raw.sample, 0.01),
        }
    }
}

/// `http://HOST:PORT` or `https://HOST:PORT`, as it is.
fn collector(text: &str) -> Result<String, String> {
    // It may be a password.
    if text.contains('@') {
        return Err(
            "a collector's address has no user and no password: use http://HOST:PORT or https://HOST:PORT; what it asks for by header can be in OTEL_EXPORTER_OTLP_HEADERS of the environment"
                .to_owned(),
        );
    }
    let schemes = ["http://", "https://"].iter();
    let authority = schemes
        .filter_map(|scheme| text.strip_prefix(scheme))
        .map(|rest| rest.strip_suffix('/').unwrap_or(rest))
        .find(|authority| !authority.is_empty() && is_host(authority.as_bytes()));
    match authority {
        Some(authority) if !authority.starts_with(':') => Ok(text.to_owned()),
        Some(_) | None => Err(format!(
            "\"{text}\" is not a collector: use http://HOST:PORT or https://HOST:PORT, for example http://otel-collector:4317"
        )),
    }
}

fn access_log_of(raw: raw::AccessLog, log: Log) -> AccessLog {
    let always = match told(raw.always) {
        Some(list) => list.into_iter().filter_map(|at| at.value).collect(),
        None => vec![Always::Errors, Always::Rejected],
    };
    AccessLog {
        format: told(raw.format).unwrap_or(log.format),
        sample: share(raw.sample, 1.0),
        errors: always.contains(&Always::Errors),
        rejected: always.contains(&Always::Rejected),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{parse, tests::fixture};
    use super::*;
    use crate::config::telemetry::LogFormat;

    #[test]
    fn a_collector_s_password_is_not_shown() {
        let text = "listen: 127.0.0.1:1\nupstream: http://x\ntelemetry: {traces: {otlp: 'https://ann:s3cret@otel:4317'}}\n";
        let said = fixture::read(text).unwrap_err().join("\n");
        assert!(
            said.contains("a collector's address has no user and no password")
                && !said.contains("s3cret"),
            "{said}"
        );
    }

    #[test]
    fn a_level_of_other_programs_is_told_with_ours() {
        let text = "listen: 127.0.0.1:1\nupstream: http://x\ntelemetry: {log: {level: warning}}\n";
        assert_eq!(
            fixture::read(text).unwrap_err(),
            [
                "line 3, column 26: telemetry.log.level: unknown name \"warning\"; did you mean \"warn\"?"
            ]
        );
    }

    #[test]
    fn a_collector_is_a_url_of_a_host() {
        let check = |otlp: &str, right: bool| {
            let text = format!(
                "listen: 127.0.0.1:1\nupstream: http://x\ntelemetry: {{traces: {{otlp: '{otlp}'}}}}\n"
            );
            let traces = parse(&text, &|_| None).map(|config| config.traces);
            assert_eq!(traces.is_ok(), right, "{otlp}");
            if let Ok(Some(traces)) = traces {
                assert_eq!((traces.otlp.as_deref(), traces.sample), (Some(otlp), 0.01));
            }
        };
        check("http://otel-collector:4317", true);
        check("https://[::1]:4317/", true);
        check("http://collector", true);
        for wrong in [
            "",
            "otel-collector:4317",
            "http://",
            "http://:4317",
            "grpc://x:4317",
            "http://x:4317/v1/traces",
            "http://user@x:4317",
            "http://x:99999",
        ] {
            check(wrong, false);
        }
    }

    #[test]
    fn an_access_log_is_of_all_requests_in_the_log_s_format_unless_told() {
        let check = |telemetry: &str, expected: Option<AccessLog>| {
            let text =
                format!("listen: 127.0.0.1:1\nupstream: http://x\ntelemetry: {{{telemetry}}}\n");
            assert_eq!(
                parse(&text, &|_| None).unwrap().access_log,
                expected,
                "{text}"
            );
        };
        let all = AccessLog {
            format: LogFormat::Pretty,
            sample: 1.0,
            errors: true,
            rejected: true,
        };
        check("", None);
        check("access_log: {}", Some(all));
        let json = AccessLog {
            format: LogFormat::Json,
            ..all
        };
        check("log: {format: json}, access_log: {}", Some(json));
        let few = AccessLog {
            sample: 0.01,
            rejected: false,
            ..json
        };
        check(
            "access_log: {format: json, sample: 1%, always: [errors]}",
            Some(few),
        );
    }
}
