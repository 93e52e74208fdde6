//! The worker, checked: how it ingests the audit into Postgres, and how health is told.

use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// The consumer group that workers share the streams by.
    pub group: String,
    /// Events in one transaction, at most (a batch is never parted).
    pub batch_max: usize,
    /// How long a worker waits for a transaction to fill up, and between looks at streams that have nothing.
    pub batch_wait: Duration,
    /// An entry that another worker was given so long ago and has not stored is taken over.
    pub claim_after: Duration,
    /// An entry given so often without being stored is tried alone; twice as often, it goes to the dead letters.
    pub max_deliveries: u32,
    /// How long a day's partition is kept; whole days, one at least.
    pub retention: Duration,
    /// Between sweeps of sessions.
    pub session_sweep: Duration,
    pub health: Health,
}

/// How often each check is made, and what makes it bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Between two checks made unasked, which `/ready` goes by.
    pub interval: Duration,
    /// For one check.
    pub timeout: Duration,
    /// How long an answer of `/health` serves.
    pub cache: Duration,
    /// The age of the oldest event that is not stored, from which on the audit is degraded, and critical.
    pub lag_degraded: Duration,
    pub lag_critical: Duration,
}

impl Default for Worker {
    fn default() -> Worker {
        Worker {
            group: "weir".to_owned(),
            batch_max: 10_000,
            batch_wait: Duration::from_millis(200),
            claim_after: Duration::from_secs(60),
            max_deliveries: 5,
            retention: Duration::from_secs(400 * 86_400),
            session_sweep: Duration::from_secs(60),
            health: Health::default(),
        }
    }
}

impl Default for Health {
    fn default() -> Health {
        Health {
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            cache: Duration::from_secs(30),
            lag_degraded: Duration::from_secs(30),
            lag_critical: Duration::from_secs(300),
        }
    }
}
