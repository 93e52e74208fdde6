//! Metrics of tasks: those that are kept up, and those that panicked.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::add;

/// Of all tasks.
#[derive(Debug)]
pub struct TaskMetrics {
    restarts: Family<TaskLabels, Counter>,
    /// Tasks of any kind that ended by a panic.
    pub panics: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TaskLabels {
    task: &'static str,
}

impl TaskMetrics {
    pub(super) fn register(registry: &mut Registry) -> TaskMetrics {
        TaskMetrics {
            restarts: add(
                registry,
                "task_restarts",
                "Supervised tasks that failed and were begun again",
            ),
            panics: add(registry, "panics", "Tasks that ended by a panic"),
        }
    }

    /// Of a supervised task; its name is one of a closed set.
    pub fn restarts(&self, task: &'static str) -> Counter {
        self.restarts.get_or_create_owned(&TaskLabels { task })
    }
}
