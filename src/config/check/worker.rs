//! The worker, from the file as written to [`Worker`].

use std::time::Duration;

use super::redis::key_prefix;
use super::{Checker, DAY, SECOND};
use crate::config::raw;
use crate::config::units::Span;
use crate::config::worker::{Health, Worker};
use crate::config::yaml::told;

/// Of a transaction; it is in memory as a whole.
const MOST_EVENTS: u64 = 1_000_000;
const HOUR: Duration = Duration::from_secs(3_600);

impl Checker {
    pub(super) fn worker(&mut self, raw: raw::Worker) -> Worker {
        let default = Worker::default();
        match told(raw.partition) {
            None | Some(raw::Partition::Day) => {}
        }
        let group = raw
            .group
            .and_then(|at| self.read("worker.group", at, key_prefix));
        let batch = told(raw.batch).unwrap_or_default();
        let batch_max = self.count_within(
            "worker.batch.max",
            batch.max,
            default.batch_max as u64,
            1..=MOST_EVENTS,
        );
        let max_deliveries = self.count_within(
            "worker.max_deliveries",
            raw.max_deliveries,
            default.max_deliveries.into(),
            1..=1_000,
        );
        let mut span = |key: &str, at, default, most| {
            self.span_within(&format!("worker.{key}"), at, Span(default), most)
        };
        Worker {
            group: group.unwrap_or(default.group),
            batch_max,
            batch_wait: span("batch.wait", batch.wait, default.batch_wait, 60 * SECOND),
            claim_after: span("claim_after", raw.claim_after, default.claim_after, DAY),
            max_deliveries,
            session_sweep: span(
                "session_sweep",
                raw.session_sweep,
                default.session_sweep,
                DAY,
            ),
            retention: self.days("worker.retention", raw.retention, default.retention),
            health: self.health(told(raw.health).unwrap_or_default()),
        }
    }

    fn health(&mut self, raw: raw::WorkerHealth) -> Health {
        let default = Health::default();
        let checks = told(raw.checks).unwrap_or_default();
        let told_lag = told(checks.audit_lag).unwrap_or_default();
        let place = told_lag
            .critical
            .as_ref()
            .or(told_lag.degraded.as_ref())
            .map_or((0, 0), |at| (at.line, at.column));
        let mut span = |key: &str, at, default, most| {
            self.span_within(&format!("worker.health.{key}"), at, Span(default), most)
        };
        let lag = "checks.audit_lag";
        let health = Health {
            interval: span("interval", raw.interval, default.interval, HOUR),
            timeout: span("timeout", raw.timeout, default.timeout, 60 * SECOND),
            // None is no mistake: each call of /health makes the checks then.
            cache: super::span(raw.cache, default.cache),
            lag_degraded: span(
                &format!("{lag}.degraded"),
                told_lag.degraded,
                default.lag_degraded,
                DAY,
            ),
            lag_critical: span(
                &format!("{lag}.critical"),
                told_lag.critical,
                default.lag_critical,
                DAY,
            ),
        };
        if health.lag_critical < health.lag_degraded {
            let message = format!(
                "critical at {} and degraded at {} only: use a critical that is not below degraded",
                Span(health.lag_critical),
                Span(health.lag_degraded)
            );
            self.say("worker.health.checks.audit_lag", place.0, place.1, message);
        }
        health
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;
    use crate::config::yaml::Mistake;

    fn read(worker: &str) -> Result<Worker, String> {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{worker}\n");
        let said = |mistakes: Vec<Mistake>| {
            let said: Vec<_> = mistakes.iter().map(Mistake::to_string).collect();
            said.join("\n")
        };
        parse(&text, &|_| None)
            .map(|config| config.worker)
            .map_err(said)
    }

    #[test]
    fn every_key_has_a_default() {
        for worker in [
            "",
            "worker: {}",
            "worker: {batch: {}, health: {checks: {}}}",
        ] {
            assert_eq!(read(worker).unwrap(), Worker::default());
        }
        let told = read(
            "worker: {group: g, batch: {max: 7}, partition: day, retention: 2d, health: {cache: 0s, checks: {audit_lag: {critical: 1m}}}}",
        );
        let expected = Worker {
            group: "g".to_owned(),
            batch_max: 7,
            retention: 2 * DAY,
            health: Health {
                cache: Duration::ZERO,
                lag_critical: 60 * SECOND,
                ..Health::default()
            },
            ..Worker::default()
        };
        assert_eq!(told.unwrap(), expected);
    }

    #[test]
    fn mistakes_name_their_mend() {
        let check = |worker: &str, part: &str| {
            let said = read(&format!("worker: {{{worker}}}")).unwrap_err();
            assert!(said.contains(part), "{said}");
        };
        check("group: ''", "worker.group: an empty");
        check(
            "batch: {max: 0}",
            "worker.batch.max: 0 is out of bounds: use 1 to 1000000, for example 10000",
        );
        check(
            "batch: {wait: 2m}",
            "worker.batch.wait: 2m is out of bounds",
        );
        check("claim_after: 0s", "worker.claim_after: 0s is out of bounds");
        check("max_deliveries: 0", "use 1 to 1000, for example 5");
        check("partition: hour", "worker.partition: ");
        check(
            "retention: 36h",
            "worker.retention: \"36h\" is not a number of days: use 1d or more, for example 400d",
        );
        check("session_sweep: 2d", "use 1ms to 1d, for example 1m");
        check("health: {timeout: 0s}", "worker.health.timeout: 0s is out");
        check(
            "health: {interval: 0s}",
            "worker.health.interval: 0s is out",
        );
        check(
            "health: {checks: {audit_lag: {critical: 10s}}}",
            "worker.health.checks.audit_lag: critical at 10s and degraded at 30s only",
        );
    }
}
