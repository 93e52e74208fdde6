//! Metrics of tasks: those that are kept up, and those that panicked.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Of all tasks.
#[derive(Debug)]
pub struct Tasks {
    restarts: Family<TaskLabels, Counter>,
    /// Tasks of any kind that ended by a panic.
    pub panics: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TaskLabels {
    task: &'static str,
}

impl Tasks {
    pub(super) fn register(registry: &mut Registry) -> Tasks {
        let all = Tasks {
            restarts: Family::default(),
            panics: Counter::default(),
        };
        registry.register(
            "task_restarts",
            "Supervised tasks that failed and were begun again",
            all.restarts.clone(),
        );
        registry.register("panics", "Tasks that ended by a panic", all.panics.clone());
        all
    }

    /// Of a supervised task; its name is one of a closed set.
    pub fn restarts(&self, task: &'static str) -> Counter {
        self.restarts.get_or_create_owned(&TaskLabels { task })
    }
}
