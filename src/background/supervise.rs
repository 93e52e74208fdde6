//! Keeps named tasks up: one that ends with an error or a panic is begun again after a wait that grows, and one that cannot be
//! kept up is given up loudly, for the process to end by. Owns when a task is begun again; must not know what tasks do.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, warn};

use crate::heartbeat::{Heartbeat, Watched};
use crate::policy::retry::{Pauses, equal_jitter};
use crate::telemetry::metrics::Metrics;

/// After failures in a row.
const PAUSES: Pauses = Pauses {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(30),
};
/// A task that ran for so long ran well: a failure then is the first of a row.
const WELL: Duration = Duration::from_secs(60);
/// So many failures in a row, which take one to two minutes, and a task is given up.
const MOST: u32 = 12;

/// The tasks of one runtime.
pub struct Supervisor {
    runtime: Handle,
    metrics: Arc<Metrics>,
    keepers: JoinSet<Result<(), GaveUp>>,
    watched: Vec<Watched>,
    stop: watch::Sender<bool>,
}

/// What becomes of a task when the process stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtStop {
    /// It is dropped where it stands.
    Drop,
    /// It is waited for: it looks at [`Supervisor::stopping`].
    Finish,
}

/// Why the process is to end.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the task \"{task}\" cannot be kept up, it failed {failures} times in a row: {last}")]
pub struct GaveUp {
    pub task: &'static str,
    pub failures: u32,
    /// What became of it the last time.
    pub last: String,
}

impl Supervisor {
    /// Its tasks are to run on `runtime`.
    pub fn new(runtime: Handle, metrics: Arc<Metrics>) -> Supervisor {
        Supervisor {
            runtime,
            metrics,
            keepers: JoinSet::new(),
            watched: Vec::new(),
            stop: watch::Sender::new(false),
        }
    }

    /// True once the process stops.
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    /// Keeps up the task that `begin` makes, until it ends without an error. It beats the heart that it is given more often than each
    /// `silence`, or counts as stuck.
    pub fn keep<T>(
        &mut self,
        name: &'static str,
        silence: Duration,
        at_stop: AtStop,
        begin: impl FnMut(Heartbeat) -> T + Send + 'static,
    ) where
        T: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let heartbeat = Heartbeat::default();
        heartbeat.rest();
        self.watched.push(Watched {
            name,
            heartbeat: heartbeat.clone(),
            bound: silence,
        });
        let keeper = Keeper {
            task: name,
            heartbeat,
            restarts: self.metrics.tasks.restarts(name),
            panics: self.metrics.tasks.panics.clone(),
        };
        let keep = keeper.keep(begin, self.stop.subscribe(), at_stop);
        self.keepers.spawn_on(keep, &self.runtime);
    }

    /// As [`Supervisor::keep`], for a task that does not end by itself: it is dropped when the process stops.
    pub fn keep_forever<T>(
        &mut self,
        name: &'static str,
        silence: Duration,
        mut begin: impl FnMut(Heartbeat) -> T + Send + 'static,
    ) where
        T: Future<Output = Infallible> + Send + 'static,
    {
        self.keep(name, silence, AtStop::Drop, move |heartbeat| {
            let task = begin(heartbeat);
            async move { match task.await {} }
        });
    }

    /// The tasks, for `/live`.
    pub fn watched(&self) -> Vec<Watched> {
        self.watched.clone()
    }

    /// Waits until a task is given up; for ever while all are kept up.
    pub async fn gave_up(&mut self) -> GaveUp {
        loop {
            match self.keepers.join_next().await {
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(gave_up))) => return gave_up,
                Some(Err(error)) => return broken(&error),
                None => std::future::pending().await,
            }
        }
    }

    /// Stops all tasks; those that are to finish have so long.
    pub async fn stop(mut self, within: Duration) {
        self.stop.send_replace(true);
        let finished = timeout(within, async {
            while self.keepers.join_next().await.is_some() {}
        });
        if finished.await.is_err() {
            warn!(
                tasks = self.keepers.len(),
                "tasks did not finish in time; they are dropped"
            );
        }
        self.keepers.shutdown().await;
    }
}

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervisor")
            .field("watched", &self.watched)
            .finish_non_exhaustive()
    }
}

struct Keeper {
    task: &'static str,
    heartbeat: Heartbeat,
    restarts: Counter,
    panics: Counter,
}

impl Keeper {
    async fn keep<T>(
        self,
        mut begin: impl FnMut(Heartbeat) -> T,
        mut stop: watch::Receiver<bool>,
        at_stop: AtStop,
    ) -> Result<(), GaveUp>
    where
        T: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let mut failures = 0;
        loop {
            self.heartbeat.beat();
            let began = Instant::now();
            // A task of its own, which a panic ends alone; it goes with the set.
            let mut running = JoinSet::new();
            running.spawn(begin(self.heartbeat.clone()));
            let ended = match at_stop {
                AtStop::Finish => running.join_next().await,
                AtStop::Drop => tokio::select! {
                    ended = running.join_next() => ended,
                    _ = stop.wait_for(|stop| *stop) => None,
                },
            };
            self.heartbeat.rest();
            let last = match ended {
                None | Some(Ok(Ok(()))) => return Ok(()),
                Some(Ok(Err(error))) => {
                    // Of a task within the task.
                    let inner = error.downcast_ref::<JoinError>();
                    if inner.is_some_and(JoinError::is_panic) {
                        self.panics.inc();
                    }
                    format!("{error:#}")
                }
                Some(Err(error)) => {
                    self.panics.inc();
                    error.to_string()
                }
            };
            if began.elapsed() >= WELL {
                failures = 0;
            }
            failures += 1;
            let task = self.task;
            if *stop.borrow() {
                warn!(task, error = last, "task failed while weir stops");
                return Ok(());
            }
            if failures >= MOST {
                let gave_up = GaveUp {
                    task,
                    failures,
                    last,
                };
                error!(task, error = %gave_up, "weir ends");
                return Err(gave_up);
            }
            let wait = wait(failures, fastrand::f64());
            warn!(task, error = last, ?wait, "task failed, it is begun again");
            tokio::select! {
                () = sleep(wait) => self.restarts.inc(),
                _ = stop.wait_for(|stop| *stop) => return Ok(()),
            };
        }
    }
}

/// A keeper does not panic, nor is it dropped while it is waited for; if it were, its task would be gone.
fn broken(error: &JoinError) -> GaveUp {
    error!(%error, "a task's keeper is gone, weir ends");
    GaveUp {
        task: "keeper",
        failures: 1,
        last: error.to_string(),
    }
}

/// `chance` is from 0 to 1.
fn wait(failures: u32, chance: f64) -> Duration {
    equal_jitter(PAUSES.nth(failures - 1), chance)
}

#[cfg(test)]
mod tests;
