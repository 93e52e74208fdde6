//! The worker as it is written.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::TimeLength;
use crate::config::yaml::At;

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Worker {
    /// The consumer group that workers share the streams by [default: weir].
    pub group: Option<At<String>>,
    pub batch: Option<At<WorkerBatch>>,
    /// What another worker was given so long ago, and has not stored, is taken over [default: 60s].
    pub claim_after: Option<At<TimeLength>>,
    /// An entry given so often is tried alone, and after as many more tries goes to the dead letters [default: 5].
    pub max_deliveries: Option<At<u32>>,
    /// [default: day, the only one]
    pub partition: Option<At<Partition>>,
    /// How long a day's partition is kept, in whole days [default: 400d].
    pub retention: Option<At<TimeLength>>,
    /// Between sweeps of sessions that are over [default: 60s].
    pub session_sweep: Option<At<TimeLength>>,
    pub health: Option<At<WorkerHealth>>,
}

/// A transaction.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct WorkerBatch {
    /// Events, at most [default: 10000].
    pub max: Option<At<u32>>,
    /// How long it waits to fill up [default: 200ms].
    pub wait: Option<At<TimeLength>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Partition {
    Day,
}

/// Of the proxy too.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct WorkerHealth {
    /// Between checks made unasked, which /ready goes by [default: 10s].
    pub interval: Option<At<TimeLength>>,
    /// For each check [default: 1s].
    pub timeout: Option<At<TimeLength>>,
    /// How long an answer of /health serves [default: 30s].
    pub cache: Option<At<TimeLength>>,
    pub checks: Option<At<HealthChecks>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HealthChecks {
    pub audit_lag: Option<At<AuditLag>>,
}

/// The age of the oldest event that is not stored.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct AuditLag {
    /// [default: 30s]
    pub degraded: Option<At<TimeLength>>,
    /// [default: 5m]
    pub critical: Option<At<TimeLength>>,
}
