//! The worker, from the file as written to [`Worker`].

use std::time::Duration;

use super::values::{key_prefix, time};
use super::{Checker, DAY, SECOND};
use crate::config::raw;
use crate::config::units::TimeLength;
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
        let group = raw.group.and_then(|at| self.read(at, key_prefix));
        let batch = told(raw.batch).unwrap_or_default();
        let (events, deliveries) = (default.batch_max as u64, default.max_deliveries.into());
        Worker {
            group: group.unwrap_or(default.group),
            batch_max: self.count_within(batch.max, events, 1..=MOST_EVENTS),
            batch_wait: self.time_within(batch.wait, default.batch_wait, 60 * SECOND),
            claim_after: self.time_within(raw.claim_after, default.claim_after, DAY),
            max_deliveries: self.count_within(raw.max_deliveries, deliveries, 1..=1_000),
            session_sweep: self.time_within(raw.session_sweep, default.session_sweep, DAY),
            retention: self.days(raw.retention, default.retention),
            health: self.health(told(raw.health).unwrap_or_default()),
        }
    }

    fn health(&mut self, raw: raw::WorkerHealth) -> Health {
        let default = Health::default();
        let checks = told(raw.checks).unwrap_or_default();
        let lag = told(checks.audit_lag).unwrap_or_default();
        let bound = lag.critical.as_ref().or(lag.degraded.as_ref());
        let place = bound.map(|at| at.place.named("worker.health.checks.audit_lag"));
        let health = Health {
            interval: self.time_within(raw.interval, default.interval, HOUR),
            timeout: self.time_within(raw.timeout, default.timeout, 60 * SECOND),
            // None is no mistake: each call of /health makes the checks then.
            cache: time(raw.cache, default.cache),
            lag_degraded: self.time_within(lag.degraded, default.lag_degraded, DAY),
            lag_critical: self.time_within(lag.critical, default.lag_critical, DAY),
        };
        if let Some(place) = place.filter(|_| health.lag_critical < health.lag_degraded) {
            let message = format!(
                "critical at {} and degraded at {} only: use a critical that is not below degraded",
                TimeLength(health.lag_critical),
                TimeLength(health.lag_degraded)
            );
            self.say(&place, message);
        }
        health
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;
    use super::*;

    fn read(worker: &str) -> Result<Worker, String> {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{worker}\n");
        fixture::read(&text)
            .map(|config| config.worker)
            .map_err(|said| said.join("\n"))
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
