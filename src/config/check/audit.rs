//! The audit, from the file as written to [`Audit`].

use std::path::PathBuf;
use std::time::Duration;

use super::Checker;
use super::sessions::field_name;
use crate::config::Secret;
use crate::config::audit::{Audit, Delivery, Level, Spool, Stream};
use crate::config::raw;
use crate::config::units::Span;
use crate::config::yaml::At;
use crate::event::Redaction;

const DAY: Duration = Duration::from_secs(86_400);

/// The database, unless told.
const DATABASE: &str = "weir-audit.db";

impl Checker {
    pub(super) fn audit(&mut self, raw: raw::Audit) -> Audit {
        let (request_headers, response_headers, query) = raw
            .capture
            .and_then(|at| at.value)
            .map_or((None, None, None), |raw| {
                (raw.request_headers, raw.response_headers, raw.query)
            });
        let (headers, parameters) = raw
            .redact
            .and_then(|at| at.value)
            .map_or((None, None), |raw| (raw.headers, raw.query));
        let mut redaction = Redaction::default();
        redaction.add(
            self.header_names("audit.redact.headers", headers),
            texts(parameters),
        );
        let key = raw.integrity.and_then(|at| at.value).and_then(|raw| {
            self.read("audit.integrity.key", raw.key, |text| match text {
                "" => Err("an empty key proves nothing: set one, or leave the key out".to_owned()),
                key => Ok(Secret(key.to_owned())),
            })
        });
        let (path, retention) = raw
            .sqlite
            .and_then(|at| at.value)
            .map_or((None, None), |raw| (raw.path, raw.retention));
        let path = path.and_then(|at| at.value);
        Audit {
            level: level(raw.level).unwrap_or(Level::Metadata),
            sample: raw
                .sample
                .and_then(|at| at.value)
                .map_or(1.0, |percent| percent.0),
            request_headers: self.header_names("audit.capture.request_headers", request_headers),
            response_headers: self.header_names("audit.capture.response_headers", response_headers),
            query: query.and_then(|at| at.value).unwrap_or(true),
            redaction,
            delivery: Delivery::BestEffort,
            stream: Stream::default(),
            spool: Spool::default(),
            sqlite: path.map_or_else(|| PathBuf::from(DATABASE), PathBuf::from),
            retention: self.retention(retention),
            key,
        }
    }

    fn retention(&mut self, at: Option<At<Span>>) -> Duration {
        let told = at.and_then(|at| Some((at.value?, at.line, at.column)));
        let Some((span, line, column)) = told else {
            return 400 * DAY;
        };
        let Span(retention) = span;
        if retention < DAY || !retention.as_secs().is_multiple_of(DAY.as_secs()) {
            let message = format!(
                "\"{span}\" is not a number of days: use 1d or more, for example 400d, or leave out \"audit\" to keep nothing"
            );
            self.say("audit.sqlite.retention", line, column, message);
        }
        retention
    }

    /// How much is kept of a route's requests.
    pub(super) fn route_level(&mut self, path: &str, at: Option<At<raw::AuditLevel>>) -> Level {
        let place = at.as_ref().map(|at| (at.line, at.column));
        let told = level(at);
        if let (Some(Level::Metadata | Level::Headers), None, Some((line, column))) =
            (told, self.audit_level, place)
        {
            let message = "the file has no \"audit\": add \"audit: {}\", or leave this out";
            self.say(&format!("{path}.audit"), line, column, message.to_owned());
        }
        told.or(self.audit_level).unwrap_or(Level::None)
    }

    fn header_names(&mut self, path: &str, at: Option<At<Vec<At<String>>>>) -> Vec<String> {
        let list = at.and_then(|at| at.value).unwrap_or_default();
        list.into_iter()
            .enumerate()
            .filter_map(|(index, at)| self.read(&format!("{path}[{index}]"), at, field_name))
            .map(|name| name.to_ascii_lowercase())
            .collect()
    }
}

fn level(at: Option<At<raw::AuditLevel>>) -> Option<Level> {
    Some(match at?.value? {
        raw::AuditLevel::None => Level::None,
        raw::AuditLevel::Metadata => Level::Metadata,
        raw::AuditLevel::Headers => Level::Headers,
    })
}

fn texts(at: Option<At<Vec<At<String>>>>) -> Vec<String> {
    let list = at.and_then(|at| at.value).unwrap_or_default();
    list.into_iter().filter_map(|at| at.value).collect()
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;
    use crate::config::Config;
    use crate::config::yaml::Mistake;

    fn read(audit: &str) -> Result<Config, Vec<String>> {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{audit}");
        parse(&text, &|_| None)
            .map_err(|mistakes| mistakes.iter().map(Mistake::to_string).collect())
    }

    #[test]
    fn there_is_no_audit_unless_the_file_asks_for_it() {
        let config = read("").unwrap();
        assert_eq!((config.audit, config.routes[0].audit), (None, Level::None));
        let config = read("audit: {}").unwrap();
        let audit = config.audit.unwrap();
        assert_eq!(
            (audit.level, audit.sample, audit.query),
            (Level::Metadata, 1.0, true)
        );
        assert_eq!(audit.sqlite, PathBuf::from("weir-audit.db"));
        assert_eq!(audit.retention, 400 * DAY);
        assert_eq!(config.routes[0].audit, Level::Metadata);
    }

    #[test]
    fn path_and_retention_stand_for_themselves() {
        let config = read("audit: {sqlite: {retention: 30d}}").unwrap();
        let audit = config.audit.unwrap();
        assert_eq!(audit.sqlite, PathBuf::from("weir-audit.db"));
        assert_eq!(audit.retention, 30 * DAY);
    }

    #[test]
    fn names_to_redact_are_added_to_those_that_always_are() {
        let audit = read(
            "audit: {sample: 5%, capture: {request_headers: [User-Agent], query: false}, redact: {headers: [X-Pin], query: [pin]}}",
        )
        .unwrap()
        .audit
        .unwrap();
        assert_eq!((audit.sample, audit.query), (0.05, false));
        assert_eq!(audit.request_headers, ["user-agent"]);
        assert_eq!(
            audit.redaction.redact_query("pin=1&token=2&a=3"),
            "pin=***&token=***&a=3"
        );
        assert_eq!(audit.redaction.redact_header("x-pin", "1"), "***");
        assert_eq!(audit.redaction.redact_header("Cookie", "1"), "***");
    }

    #[test]
    fn what_cannot_be_done_yet_is_refused() {
        let check = |audit: &str, part: &str| {
            let said = read(audit).unwrap_err().join("\n");
            assert!(said.contains(part), "{said}");
        };
        check("audit: {delivery: guaranteed}", "guaranteed");
        for retention in ["0s", "12h", "36h"] {
            let message = format!("\"{retention}\" is not a number of days: use 1d or more");
            check(
                &format!("audit: {{sqlite: {{retention: {retention}}}}}"),
                &message,
            );
        }
        check(
            "audit: {integrity: {key: ''}}",
            "an empty key proves nothing",
        );
        check(
            "routes: [{upstream: upstream, audit: metadata}]",
            "the file has no \"audit\"",
        );
    }
}
