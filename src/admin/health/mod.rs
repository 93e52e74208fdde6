//! Whether the process lives, is ready, and how it is: docs/health.md tells what the answers mean. Owns the three answers; what is
//! looked at is a list of checks that the process is made with.

mod board;
pub mod check;
pub mod machine;
pub mod stores;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::StatusCode;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

pub use board::{Board, Served};

use super::Reply;
use crate::heartbeat::{Heartbeat, Watched};
use check::Status;

/// A lane that has not said so for this long is stuck.
const STUCK: Duration = Duration::from_secs(5);

/// What health is told by.
#[derive(Debug)]
pub struct Health {
    pub started: Instant,
    /// None in a worker.
    pub lanes: Vec<Heartbeat>,
    pub tasks: Vec<Watched>,
    pub draining: watch::Receiver<bool>,
    pub board: Arc<Board>,
}

impl Health {
    /// 200 while every lane turns and every task goes on, else 503.
    pub(super) fn live(&self) -> Reply {
        let (lanes, tasks) = (self.lanes_stuck(), self.tasks_stuck());
        let is_live = lanes == 0 && tasks.is_empty();
        status(
            is_live,
            json!({ "status": if is_live { "live" } else { "stuck" }, "lanes_stuck": lanes, "tasks_stuck": tasks }),
        )
    }

    /// 200 while the process does its work, else 503.
    pub(super) fn ready(&self) -> Reply {
        let draining = *self.draining.borrow();
        let waits_for = self.board.unready().unwrap_or_default();
        let ready = self.is_ready();
        status(
            ready,
            json!({ "status": if ready { "ready" } else { "unready" }, "draining": draining, "waits_for": waits_for }),
        )
    }

    pub(super) fn is_ready(&self) -> bool {
        !*self.draining.borrow() && self.lanes_stuck() == 0 && self.board.unready().is_none()
    }

    /// Each check with what it measured; 503 when one is critical.
    pub(super) async fn health(&self) -> Reply {
        let served = self.board.report().await;
        let mut worst = Status::Ok;
        let mut checks = Map::new();
        let stuck = self.lanes_stuck();
        let lanes = Status::Critical.when(stuck > 0);
        if !self.lanes.is_empty() {
            checks.insert(
                "lanes".to_owned(),
                json!({ "status": lanes.as_str(), "lanes": self.lanes.len(), "stuck": stuck }),
            );
        }
        let stuck = self.tasks_stuck();
        let tasks = Status::Critical.when(!stuck.is_empty());
        let each = self.tasks.iter().map(|task| {
            let (silent, bound) = (task.heartbeat.age().as_secs_f64(), task.bound.as_secs_f64());
            let said = json!({ "silent_seconds": silent, "bound_seconds": bound });
            (task.name.to_owned(), said)
        });
        checks.insert(
            "tasks".to_owned(),
            json!({ "status": tasks.as_str(), "tasks": self.tasks.len(), "stuck": stuck, "each": each.collect::<Map<_, _>>() }),
        );
        for entry in &served.report.checks {
            worst = worst.max(entry.found.status);
            let mut check = Map::new();
            check.insert("status".to_owned(), entry.found.status.as_str().into());
            check.insert(
                "latency_seconds".to_owned(),
                entry.latency.as_secs_f64().into(),
            );
            check.extend(entry.found.details.clone());
            checks.insert(entry.name.clone(), Value::Object(check));
        }
        worst = worst.max(lanes).max(tasks);
        let body = json!({
            "status": worst.as_str(),
            "stale": served.is_stale,
            "age_seconds": served.age.as_secs_f64(),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "version": env!("CARGO_PKG_VERSION"),
            "checks": checks,
        });
        status(worst < Status::Critical, body)
    }

    fn lanes_stuck(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.age() > STUCK).count()
    }

    fn tasks_stuck(&self) -> Vec<&'static str> {
        let stuck = self.tasks.iter().filter(|task| task.is_stuck());
        stuck.map(|task| task.name).collect()
    }
}

fn status(good: bool, body: Value) -> Reply {
    match good {
        true => Reply::Json(body),
        false => Reply::Status(StatusCode::SERVICE_UNAVAILABLE, body),
    }
}
