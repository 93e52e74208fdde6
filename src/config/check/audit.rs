//! The audit, from the file as written to [`Audit`].

use std::path::PathBuf;

use super::values::{field_name, key_prefix, not_empty, secret, share};
use super::{Checker, SECOND};
use crate::config::audit::{self, Audit, Level, Spool, Stream};
use crate::config::raw;
use crate::config::units::ByteSize;
use crate::config::yaml::{At, told};
use crate::event::Redaction;
use crate::http1::path;

/// Of a batch: beyond, an entry is megabytes.
const MOST_EVENTS: u64 = 10_000;
/// A spool is written in segments, of which it needs a few.
const LEAST_SPOOL: ByteSize = ByteSize(16 << 20);

impl Checker {
    pub(super) fn audit(&mut self, raw: raw::Audit) -> Audit {
        let captures_at = raw.capture.as_ref().map(|at| at.place.clone());
        let capture = told(raw.capture).unwrap_or_default();
        let redact = told(raw.redact).unwrap_or_default();
        let mut redaction = Redaction::default();
        redaction.add(self.header_names(redact.headers), texts(redact.query));
        let paths = told(redact.paths).unwrap_or_default();
        redaction.add_paths(self.each(paths, hidden_path));
        let key = told(raw.integrity).and_then(|raw| {
            let spelt = self.is_spelt(&raw.key);
            self.read(raw.key, |text| match text {
                "" => Err("an empty key proves nothing: set one, or leave the key out".to_owned()),
                key => secret(key, spelt),
            })
        });
        let request_headers = self.header_names(capture.request_headers);
        let response_headers = self.header_names(capture.response_headers);
        let names_headers = !request_headers.is_empty() || !response_headers.is_empty();
        self.captures_at = captures_at.filter(|_| names_headers);
        if let (Some(at), true) = (&raw.sqlite, self.has_postgres) {
            let message =
                "the audit goes to postgres, so that this does nothing: leave one of them out";
            self.warn(&at.place, message);
        }
        let sqlite = told(raw.sqlite).unwrap_or_default();
        let path = told(sqlite.path);
        Audit {
            level: told(raw.level).unwrap_or_default(),
            sample: share(raw.sample, 1.0),
            request_headers,
            response_headers,
            query: told(capture.query).unwrap_or(true),
            redaction,
            delivery: told(raw.delivery).unwrap_or_default(),
            stream: self.stream(told(raw.stream).unwrap_or_default()),
            spool: self.spool(told(raw.spool).unwrap_or_default()),
            sqlite: path.map_or_else(|| PathBuf::from(audit::DATABASE), PathBuf::from),
            retention: self.days(sqlite.retention, audit::RETENTION),
            key,
        }
    }

    fn stream(&mut self, raw: raw::AuditStream) -> Stream {
        let default = Stream::default();
        let batch = told(raw.batch).unwrap_or_default();
        let name = raw.name.and_then(|at| self.read(at, key_prefix));
        let (events, max_length) = (default.batch_events as u64, default.max_length);
        Stream {
            name: name.unwrap_or(default.name),
            shards: self.count_within(
                raw.shards,
                default.shards.into(),
                1..=audit::MOST_SHARDS.into(),
            ),
            max_length: self.count_within(raw.max_length, max_length, 1..=u64::MAX),
            batch_events: self.count_within(batch.events, events, 1..=MOST_EVENTS),
            batch_wait: self.time_within(batch.wait, default.batch_wait, 10 * SECOND),
        }
    }

    fn spool(&mut self, raw: raw::Spool) -> Spool {
        let default = Spool::default();
        let path = raw
            .path
            .and_then(|at| self.read(at, |text| not_empty(text).map(PathBuf::from)));
        let max = raw.max.and_then(|at| {
            let max = at.value?;
            if max.0 < LEAST_SPOOL.0 {
                let message = format!(
                    "{max} is too little: use {LEAST_SPOOL} or more, for example {}",
                    ByteSize(default.max)
                );
                self.say(&at.place, message);
            }
            Some(max.0)
        });
        Spool {
            path: path.unwrap_or(default.path),
            max: max.unwrap_or(default.max),
        }
    }

    /// How much is kept of a route's requests, and of which share.
    pub(super) fn route_audit(&mut self, at: Option<At<raw::RouteAudit>>) -> (Level, Option<f64>) {
        let place = at.as_ref().map(|at| at.place.clone());
        let (asked, sample) = match told(at) {
            None => (None, None),
            Some(raw::RouteAudit::Level(level)) => (Some(level), None),
            Some(raw::RouteAudit::Sampled(raw)) => {
                let sample = told(raw.sample);
                (told(raw.level), sample.map(|percent| percent.0))
            }
        };
        let asks = sample.is_some() || matches!(asked, Some(Level::Metadata | Level::Headers));
        if let (true, None, Some(place)) = (asks, self.audit_level, place) {
            let message = "the file has no \"audit\": add \"audit: {}\", or leave this out";
            self.say_of_file(&place, message);
        }
        let level = asked.or(self.audit_level).unwrap_or(Level::None);
        (level, sample)
    }

    fn header_names(&mut self, at: Option<At<Vec<At<String>>>>) -> Vec<String> {
        let name = |text: &str| field_name(text).map(|name| name.to_ascii_lowercase());
        self.each(told(at).unwrap_or_default(), name)
    }
}

/// A path of which segments are hidden.
fn hidden_path(text: &str) -> Result<String, String> {
    let mut segments = text.split('/');
    let is_marked = segments.any(|segment| segment == "*");
    let is_whole = text
        .split('/')
        .all(|segment| segment == "*" || !segment.contains('*'));
    if !text.starts_with('/') || !is_marked || !is_whole {
        return Err(format!(
            "\"{text}\" hides no segment of a path: begin with \"/\", and have \"*\" for each that is hidden, as in /reset/* or /users/*/keys"
        ));
    }
    match path::normalise(text.as_bytes()) {
        Ok(normal) if *normal == *text.as_bytes() => Ok(text.to_owned()),
        Ok(normal) => Err(format!(
            "path would never match: use its normal form, \"{}\"",
            String::from_utf8_lossy(&normal)
        )),
        Err(error) => Err(format!("{error}: such a request is refused")),
    }
}

fn texts(at: Option<At<Vec<At<String>>>>) -> Vec<String> {
    let list = told(at).unwrap_or_default();
    list.into_iter().filter_map(|at| at.value).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::DAY;
    use super::super::tests::fixture;
    use super::*;
    use crate::config::Config;
    use crate::config::audit::Delivery;

    fn read(audit: &str) -> Result<Config, Vec<String>> {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{audit}");
        fixture::read(&text)
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
        assert_eq!(audit.retention, audit::RETENTION);
        assert_eq!(config.routes[0].audit, Level::Metadata);
    }

    #[test]
    fn stream_and_spool_have_defaults_key_by_key() {
        let audit = |audit: &str| read(audit).unwrap().audit.unwrap();
        let plain = audit("audit: {}");
        assert_eq!(plain.delivery, Delivery::BestEffort);
        assert_eq!(
            (plain.stream, plain.spool),
            (Stream::default(), Spool::default())
        );
        let told = audit(
            "audit: {delivery: guaranteed, stream: {shards: 2, batch: {wait: 5ms}}, spool: {max: 48MiB}}",
        );
        assert_eq!(told.delivery, Delivery::Guaranteed);
        let stream = Stream {
            shards: 2,
            batch_wait: Duration::from_millis(5),
            ..Stream::default()
        };
        assert_eq!(told.stream, stream);
        assert_eq!(told.spool.max, 48 << 20);
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
    fn a_route_has_a_level_and_a_share_of_its_own() {
        let of_route = |audit: &str, route: &str| {
            let routes = format!("routes: [{{upstream: upstream, audit: {route}}}]");
            let config = read(&format!("audit: {audit}\n{routes}")).unwrap();
            (config.routes[0].audit, config.routes[0].audit_sample)
        };
        let few = "{sample: 5%}";
        assert_eq!(of_route(few, "headers"), (Level::Headers, None));
        assert_eq!(of_route(few, "{sample: 50%}"), (Level::Metadata, Some(0.5)));
        assert_eq!(
            of_route(few, "{level: headers, sample: 100%}"),
            (Level::Headers, Some(1.0))
        );
        assert_eq!(of_route(few, "{level: none}"), (Level::None, None));
    }

    #[test]
    fn headers_that_are_captured_at_no_level_are_warned_of() {
        let warned = |audit: &str, route: &str| {
            let text = format!(
                "listen: 127.0.0.1:1\nupstream: http://x:1\naudit: {{{audit}}}\nroutes: [{{upstream: upstream{route}}}]\n"
            );
            fixture::warned(&text).join("\n")
        };
        for captured in ["request_headers: [a]", "response_headers: [a]"] {
            let capture = format!("capture: {{{captured}}}");
            assert_eq!(
                warned(&capture, ""),
                "line 3, column 18: audit.capture: no request is kept with its headers, since no level is headers: add \"level: headers\" to the audit, or \"audit: headers\" to a route"
            );
            assert_eq!(warned(&format!("level: headers, {capture}"), ""), "");
            assert_eq!(warned(&capture, ", audit: headers"), "");
        }
        assert_eq!(warned("capture: {query: false}", ""), "");
        assert_eq!(warned("capture: {request_headers: []}", ""), "");
    }

    #[test]
    fn mistakes_name_their_mend() {
        let check = |audit: &str, part: &str| {
            let said = read(audit).unwrap_err().join("\n");
            assert!(said.contains(part), "{said}");
        };
        check("audit: {delivery: eventually}", "audit.delivery: ");
        for (stream, message) in [
            ("name: ''", "audit.stream.name: an empty"),
            ("name: 'a{b'", "audit.stream.name: a prefix has no braces"),
            (
                "shards: 0",
                "audit.stream.shards: 0 is out of bounds: use 1 to 256, for example 8",
            ),
            ("shards: 257", "use 1 to 256"),
            (
                "max_length: 0",
                "audit.stream.max_length: 0 is too little: use 1 or more",
            ),
            (
                "batch: {events: 0}",
                "audit.stream.batch.events: 0 is out of bounds: use 1 to 10000",
            ),
            (
                "batch: {wait: 0s}",
                "audit.stream.batch.wait: 0s is out of bounds",
            ),
        ] {
            check(&format!("audit: {{stream: {{{stream}}}}}"), message);
        }
        check("audit: {spool: {path: ''}}", "audit.spool.path: an empty");
        check(
            "audit: {spool: {max: 1023KiB}}",
            "audit.spool.max: 1023KiB is too little: use 16MiB or more",
        );
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
        for audit in ["metadata", "{level: headers}", "{sample: 5%}"] {
            check(
                &format!("routes: [{{upstream: upstream, audit: {audit}}}]"),
                "the file has no \"audit\"",
            );
        }
        check(
            "audit: {}\nroutes: [{upstream: upstream, audit: all}]",
            "unknown name \"all\"",
        );
        for path in ["reset/*", "/reset", "/reset*", "/re*/x"] {
            let message = format!("audit.redact.paths[0]: \"{path}\" hides no segment of a path");
            check(
                &format!("audit: {{redact: {{paths: ['{path}']}}}}"),
                &message,
            );
        }
        check(
            "audit: {redact: {paths: ['//a/*']}}",
            "use its normal form, \"/a/*\"",
        );
    }
}
