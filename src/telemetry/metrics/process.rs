//! Metrics of the process as a whole: those that Prometheus' client libraries give each program, by the names that they agreed on,
//! and weir's own.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry, Unit};

use super::{add, whole};

/// Seconds, counted in parts of one.
type Seconds = Counter<f64, AtomicU64>;

/// The handles of what is known only when asked.
#[derive(Debug)]
pub struct ProcessMetrics {
    /// Without weir's prefix.
    registry: Registry,
    cpu: Seconds,
    resident: Gauge,
    memory_limit: Gauge,
    open_files: Gauge,
    max_files: Gauge,
    started: Gauge<f64, AtomicU64>,
    /// 1 while `/ready` says so.
    pub ready: Gauge,
    lane_cpu: Family<LaneLabels, Seconds>,
    connections: Family<PoolStateLabels, Gauge>,
    connections_max: Family<PoolLabels, Gauge>,
    waiting: Family<PoolLabels, Gauge>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LaneLabels {
    lane: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolLabels {
    pool: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolStateLabels {
    pool: &'static str,
    state: &'static str,
}

/// What the kernel tells of the process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Used {
    pub cpu: Duration,
    pub resident_bytes: u64,
    /// What its control groups allow.
    pub memory_limit_bytes: Option<u64>,
    pub open_files: u64,
    pub max_files: u64,
    /// When it began, since the Unix epoch.
    pub started: Duration,
}

/// How full a pool of connections is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolUse {
    pub idle: usize,
    pub in_use: usize,
    pub max: usize,
    /// Callers that wait for a connection.
    pub waiting: usize,
}

impl ProcessMetrics {
    pub(super) fn register(weirs: &mut Registry) -> ProcessMetrics {
        let mut common = Registry::default();
        weirs.register(
            "build",
            "The version of weir",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        ProcessMetrics {
            cpu: add_in(
                &mut common,
                "process_cpu",
                "User and system CPU time spent",
                Unit::Seconds,
            ),
            resident: add_in(
                &mut common,
                "process_resident_memory",
                "Resident memory size",
                Unit::Bytes,
            ),
            memory_limit: add_in(
                weirs,
                "memory_limit",
                "What the control group of the process allows; 0 without a bound",
                Unit::Bytes,
            ),
            open_files: add(&mut common, "process_open_fds", "Open file descriptors"),
            max_files: add(
                &mut common,
                "process_max_fds",
                "Most file descriptors that may be open",
            ),
            started: add_in(
                &mut common,
                "process_start_time",
                "When the process began, since the Unix epoch",
                Unit::Seconds,
            ),
            ready: add(weirs, "ready", "1 while /ready says so"),
            lane_cpu: add_in(
                weirs,
                "lane_cpu",
                "CPU time of a lane's thread, which has one core at most",
                Unit::Seconds,
            ),
            connections: add(
                weirs,
                "postgres_connections",
                "Connections to Postgres, by pool: to write, and to read on a replica or on the primary",
            ),
            connections_max: add(
                weirs,
                "postgres_connections_max",
                "The most connections that a pool may have",
            ),
            waiting: add(
                weirs,
                "postgres_waiting",
                "Callers that wait for a connection to Postgres",
            ),
            registry: common,
        }
    }

    /// Those without weir's prefix.
    pub(super) fn common(&self) -> &Registry {
        &self.registry
    }

    /// The CPU time of this lane.
    pub fn lane_cpu(&self, lane: usize) -> Seconds {
        let lane = lane as u64;
        self.lane_cpu.get_or_create_owned(&LaneLabels { lane })
    }

    /// Notes what the process uses now.
    pub fn note_use(&self, used: Used) {
        // It never goes back.
        let more = used.cpu.as_secs_f64() - self.cpu.get();
        self.cpu.inc_by(more.max(0.0));
        self.resident.set(whole(used.resident_bytes));
        self.memory_limit
            .set(whole(used.memory_limit_bytes.unwrap_or_default()));
        self.open_files.set(whole(used.open_files));
        self.max_files.set(whole(used.max_files));
        // A clock that is set later does not begin the process anew.
        if self.started.get() == 0.0 {
            self.started.set(used.started.as_secs_f64());
        }
    }

    /// Notes how a pool of connections is used now; `pool` is one of a closed set.
    pub fn note_pool(&self, pool: &'static str, now: PoolUse) {
        for (state, count) in [("idle", now.idle), ("in_use", now.in_use)] {
            let gauge = self
                .connections
                .get_or_create_owned(&PoolStateLabels { pool, state });
            gauge.set(whole(count));
        }
        let labels = PoolLabels { pool };
        self.connections_max
            .get_or_create_owned(&labels)
            .set(whole(now.max));
        self.waiting
            .get_or_create_owned(&labels)
            .set(whole(now.waiting));
    }
}

/// As [`add`], of this unit.
fn add_in<M: Metric + Clone + Default>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    unit: Unit,
) -> M {
    let metric = M::default();
    registry.register_with_unit(name, help, unit, metric.clone());
    metric
}
