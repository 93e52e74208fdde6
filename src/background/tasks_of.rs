//! Tasks for things that come and go, as the upstreams of each plan do: begun for each that is new, ended with those that are gone.
//! Must not know what they do.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;

use tokio::task::{AbortHandle, JoinError, JoinSet};

/// The things that there are. All tasks end with it.
pub(super) struct TasksOf<T, N = ()> {
    things: Vec<Thing<T, N>>,
    tasks: JoinSet<Infallible>,
}

struct Thing<T, N> {
    itself: Arc<T>,
    note: N,
    tasks: Vec<AbortHandle>,
}

/// What the tasks of one thing are begun by.
pub(super) struct Begin<'t> {
    all: &'t mut JoinSet<Infallible>,
    begun: Vec<AbortHandle>,
}

impl Begin<'_> {
    pub(super) fn spawn(&mut self, task: impl Future<Output = Infallible> + Send + 'static) {
        self.begun.push(self.all.spawn(task));
    }
}

impl<T, N> TasksOf<T, N> {
    pub(super) fn new() -> TasksOf<T, N> {
        TasksOf {
            things: Vec::new(),
            tasks: JoinSet::new(),
        }
    }

    /// One that is of no thing.
    pub(super) fn spawn(&mut self, task: impl Future<Output = Infallible> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// From now on there are these. `begin` has the tasks of a new one begun, and gives what is to be noted of it.
    pub(super) fn follow(
        &mut self,
        wanted: &[Arc<T>],
        begin: impl Fn(&Arc<T>, &mut Begin<'_>) -> N,
    ) {
        self.things.retain(|thing| {
            let stays = wanted.iter().any(|it| Arc::ptr_eq(it, &thing.itself));
            if !stays {
                thing.tasks.iter().for_each(AbortHandle::abort);
            }
            stays
        });
        for itself in wanted {
            let is_it = |thing: &Thing<T, N>| Arc::ptr_eq(&thing.itself, itself);
            if self.things.iter().any(is_it) {
                continue;
            }
            let mut tasks = Begin {
                all: &mut self.tasks,
                begun: Vec::new(),
            };
            let note = begin(itself, &mut tasks);
            self.things.push(Thing {
                itself: itself.clone(),
                note,
                tasks: tasks.begun,
            });
        }
    }

    /// What was noted of each.
    pub(super) fn notes(&self) -> impl Iterator<Item = &N> {
        self.things.iter().map(|thing| &thing.note)
    }

    /// Waits for the panic of a task. May be given up and begun again.
    pub(super) async fn panicked(&mut self) -> JoinError {
        loop {
            match self.tasks.join_next().await {
                Some(Err(error)) if error.is_panic() => return error,
                // One that was ended with its thing.
                Some(Err(_)) => {}
                Some(Ok(never)) => match never {},
                None => pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn thing(name: &str) -> Arc<String> {
        Arc::new(name.to_owned())
    }

    /// Begins one task for each thing that is new, which ends by a panic where it says so.
    fn follow(tasks: &mut TasksOf<String, usize>, things: &[Arc<String>]) {
        tasks.follow(things, |thing, begin| {
            let panics = **thing == "panics";
            begin.spawn(async move {
                assert!(!panics, "told to");
                pending().await
            });
            thing.len()
        });
    }

    #[tokio::test]
    async fn tasks_begin_and_end_with_their_things() {
        let [first, second, third] = ["a", "bb", "ccc"].map(thing);
        let mut tasks = TasksOf::new();
        follow(&mut tasks, &[first, second.clone()]);
        follow(&mut tasks, &[third, second]);
        assert_eq!(tasks.notes().collect::<Vec<_>>(), [&2, &3]);
        assert_eq!(tasks.tasks.len(), 3);
        // The end of one is no panic.
        let waited = timeout(Duration::from_millis(20), tasks.panicked());
        assert!(waited.await.is_err());
        assert_eq!(tasks.tasks.len(), 2);
    }

    #[tokio::test]
    async fn a_panic_is_told() {
        let mut tasks = TasksOf::new();
        follow(&mut tasks, &["a", "panics"].map(thing));
        assert!(tasks.panicked().await.is_panic());
    }
}
