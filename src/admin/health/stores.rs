//! How the stores are, judged by the numbers that they give. Owns what is degraded and what is critical; must not count, which their
//! owners do.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::check::{Check, Finding, Status};
use crate::audit::{self, Counts, SpoolCounts, Troubles};
use crate::config::worker;
use crate::store::fleet::FleetConnections;
use crate::store::postgres::{Postgres, TargetHealth};
use crate::store::redis::Connections;
use crate::store::streams::consume::{Lag, Streams};

/// One check for each client, by name: a client is well while every node that has slots answers its pings, which go out each second
/// without being asked. `main_down`: what the process is without the main one; it is ready only with it where that is critical.
pub fn redis(redis: &FleetConnections, main_down: Status) -> Vec<Check> {
    let check = |connections: &Arc<Connections>| {
        let name = connections.client().name;
        let down = match name {
            "main" => main_down,
            // Without it limits, breakers and sessions do what the file says: that is worse, and no reason to be restarted.
            _ => Status::Degraded,
        };
        let connections = connections.clone();
        let check = Check::new(&format!("redis_{name}"), down, move || {
            let found = nodes(&connections, down);
            async move { found }
        });
        match down {
            Status::Critical => check.gating(),
            Status::Ok | Status::Degraded => check,
        }
    };
    redis.each().map(check).collect()
}

/// `postgres_write` and `postgres_read`, asked by a connection of their own, within the time of a check. `write_down`: what the
/// process is without the primary.
pub fn postgres(postgres: Arc<Postgres>, within: Duration, write_down: Status) -> Check {
    // Each server answers for itself before the look as a whole is given up.
    let within = within.mul_f64(0.9);
    let names = ["postgres_write", "postgres_read"].map(str::to_owned);
    Check::several(names.to_vec(), write_down, move || {
        let postgres = postgres.clone();
        async move {
            let health = postgres.health(within).await;
            let (write_ok, write) = target(&health.write);
            let (well, servers): (Vec<_>, Vec<_>) = health.read.iter().map(target).unzip();
            let all_well = well.iter().all(|well| *well);
            vec![
                Finding::new(write_down.when(!write_ok), write),
                Finding::new(
                    Status::Degraded.when(!all_well),
                    json!({ "servers": servers }),
                ),
            ]
        }
    })
}

/// Degraded once events wait that could be lost: the store is slow, or cannot be written; and while its files need a human. Critical where
/// nothing keeps them any more. `capacity` is of events; few large ones fill the queue by their bytes.
pub fn queue(counts: Counts, capacity: u64, troubles: Troubles) -> Finding {
    let is_filling = counts.queued > capacity / 2 || counts.queued_bytes > audit::BYTES / 2;
    let has_trouble = troubles != Troubles::default();
    let mut found = Finding::new(
        Status::Critical
            .when(troubles.ended.is_some())
            .max(Status::Degraded.when(is_filling || has_trouble)),
        json!({
            "written": counts.written,
            "queued": counts.queued,
            "max_queued": capacity,
            "queued_bytes": counts.queued_bytes,
            "max_queued_bytes": audit::BYTES,
            "underway": counts.underway,
            "resent": counts.resent,
            "dropped": counts.dropped,
            "failed_writes": counts.errors,
        }),
    );
    let told = [
        ("ahead", troubles.ahead),
        ("upkeep", troubles.upkeep),
        ("unwritten", troubles.unwritten),
        ("ended", troubles.ended),
    ];
    for (name, said) in told {
        found
            .details
            .extend(said.map(|it| (name.to_owned(), it.into())));
    }
    found
}

/// Critical where `refuses`: that requests are, under `guaranteed`. A spool that takes no more is not enough: what it has no place for is
/// Redis's to take, or dropped and counted.
pub fn spool(counts: SpoolCounts, refuses: bool) -> Finding {
    let is_filling = counts.bytes > counts.max / 2 || counts.corrupt > 0 || !counts.takes;
    Finding::new(
        Status::Critical
            .when(refuses)
            .max(Status::Degraded.when(is_filling)),
        json!({
            "bytes": counts.bytes,
            "max_bytes": counts.max,
            "batches": counts.batches,
            "oldest_seconds": counts.age.as_secs_f64(),
            "takes_events": counts.takes,
            "refuses": refuses,
            "corrupt": counts.corrupt,
        }),
    )
}

/// How far storing is behind what is in the streams.
pub fn audit_lag(streams: Arc<Streams>, bounds: worker::Health) -> Check {
    Check::new("audit_lag", Status::Degraded, move || {
        let streams = streams.clone();
        async move {
            match streams.lag().await {
                Ok(measured) => lag(&measured, &bounds),
                Err(error) => Finding::error(Status::Degraded, error),
            }
        }
    })
}

/// Dead letters wait for an operator.
fn lag(lag: &Lag, bounds: &worker::Health) -> Finding {
    let status = if lag.oldest >= bounds.lag_critical {
        Status::Critical
    } else {
        Status::Degraded.when(lag.oldest >= bounds.lag_degraded || lag.dead_letters > 0)
    };
    Finding::new(
        status,
        json!({
            "oldest_seconds": lag.oldest.as_secs_f64(),
            "waiting": lag.waiting,
            "pending": lag.pending,
            "dead_letters": lag.dead_letters,
        }),
    )
}

fn nodes(connections: &Connections, down: Status) -> Finding {
    let nodes = connections.health();
    let up = nodes.iter().filter(|node| node.up).count();
    let refusal = connections.client().refuses();
    let is_well = up == nodes.len() && connections.knows_all_slots() && refusal.is_none();
    // A part of the slots is served all the same.
    let status = match up {
        0 => down,
        _ => Status::Degraded.when(!is_well),
    };
    let nodes = nodes.iter().map(|node| {
        json!({ "address": node.address, "up": node.up, "latency_seconds": node.latency.as_secs_f64() })
    });
    let mut found = Finding::new(status, json!({ "nodes": nodes.collect::<Vec<_>>() }));
    let error = refusal.map(|said| ("error".to_owned(), said.into()));
    found.details.extend(error);
    found
}

/// Whether it answered, and what is told of it.
fn target(target: &TargetHealth) -> (bool, Value) {
    match &target.answered {
        Ok(took) => (
            true,
            json!({ "server": target.name, "answered_seconds": took.as_secs_f64() }),
        ),
        Err(error) => (
            false,
            json!({ "server": target.name, "error": error.to_string() }),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::audit::sqlite;
    use crate::store::sqlite::Files;

    #[test]
    fn a_queue_is_as_full_as_its_events_or_its_bytes_make_it() {
        for (queued, queued_bytes, expected) in [
            (50, audit::BYTES / 2, Status::Ok),
            (51, 0, Status::Degraded),
            (1, audit::BYTES / 2 + 1, Status::Degraded),
        ] {
            let counts = Counts {
                queued,
                queued_bytes,
                ..Counts::default()
            };
            let found = queue(counts, 100, Troubles::default());
            assert_eq!(found.status, expected, "{queued}, {queued_bytes}");
            assert_eq!(found.details["max_queued"], 100);
            assert_eq!(found.details["queued_bytes"], queued_bytes);
            assert_eq!(found.details["max_queued_bytes"], audit::BYTES);
            assert!(!found.details.contains_key("upkeep"));
        }
    }

    #[test]
    fn an_audit_whose_thread_has_panicked_keeps_nothing_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(&folder.path().join("audit.db"), None);
        let (begins, begun) = mpsc::channel::<()>();
        let open = move || {
            let _ = begun.recv();
            panic!("a panic that is meant");
        };
        let year = Duration::from_secs(365 * 86_400);
        let (recorder, writers) = sqlite::start_once_mended(files, open, 100, year).unwrap();
        let panics = Counter::default();
        recorder.count_panics(&panics);
        drop(begins);
        writers.stop(Duration::ZERO);
        let found = queue(recorder.counts(), recorder.capacity(), recorder.troubles());
        assert_eq!(found.status, Status::Critical);
        assert!(found.details.contains_key("ended"));
        assert_eq!(panics.get(), 1);
    }

    #[test]
    fn files_that_need_a_human_are_told_with_the_mend() {
        for name in ["ahead", "upkeep", "unwritten"] {
            let mut troubles = Troubles::default();
            let trouble = match name {
                "ahead" => &mut troubles.ahead,
                "upkeep" => &mut troubles.upkeep,
                _ => &mut troubles.unwritten,
            };
            *trouble = Some("make room".to_owned());
            let found = queue(Counts::default(), 100, troubles);
            assert_eq!(found.status, Status::Degraded);
            assert_eq!(found.details[name], "make room");
        }
    }

    #[test]
    fn a_full_spool_is_critical_where_requests_are_refused_for_it() {
        let counts = |bytes, takes| SpoolCounts {
            bytes,
            max: 100,
            takes,
            ..SpoolCounts::default()
        };
        for (bytes, takes, refuses, expected) in [
            (0, true, false, Status::Ok),
            (51, true, false, Status::Degraded),
            // Its disk is full, and Redis takes events.
            (1, false, false, Status::Degraded),
            (1, false, true, Status::Critical),
            (99, false, false, Status::Degraded),
            (99, false, true, Status::Critical),
        ] {
            let found = spool(counts(bytes, takes), refuses);
            assert_eq!(found.status, expected, "{bytes}, {takes}, {refuses}");
            assert_eq!(found.details["takes_events"], takes);
            assert_eq!(found.details["refuses"], refuses);
        }
        let torn = SpoolCounts {
            corrupt: 1,
            ..counts(0, true)
        };
        assert_eq!(spool(torn, false).status, Status::Degraded);
    }

    #[test]
    fn lag_is_judged_by_the_age_of_what_waits() {
        let of = |seconds, dead_letters| {
            let measured = Lag {
                oldest: Duration::from_secs(seconds),
                dead_letters,
                ..Lag::default()
            };
            lag(&measured, &worker::Health::default()).status
        };
        assert_eq!(of(29, 0), Status::Ok);
        assert_eq!(of(30, 0), Status::Degraded);
        assert_eq!(of(0, 1), Status::Degraded);
        assert_eq!(of(300, 0), Status::Critical);
    }
}
