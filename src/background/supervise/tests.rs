//! The rules of the supervisor, as tests, under paused time.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::bail;

use super::*;
use crate::clock;

/// How often something was done.
#[derive(Clone, Default)]
struct Times(Arc<AtomicU32>);

impl Times {
    /// Counts; how often before.
    fn count(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

fn supervisor() -> (Supervisor, Arc<Metrics>) {
    let metrics = Arc::<Metrics>::default();
    (Supervisor::new(Handle::current(), metrics.clone()), metrics)
}

async fn fails() -> anyhow::Result<()> {
    bail!("the store said no")
}

#[test]
fn waits_double_up_to_a_bound_and_differ_by_half() {
    let millis = |failures, chance| wait(failures, chance).as_millis();
    assert_eq!((millis(1, 0.0), millis(1, 1.0)), (100, 50));
    assert_eq!((millis(2, 0.0), millis(9, 0.0)), (200, 25_600));
    assert_eq!((millis(10, 0.0), millis(u32::MAX, 0.0)), (30_000, 30_000));
    assert_eq!(millis(11, 1.0), 15_000);
}

#[tokio::test(start_paused = true)]
async fn a_panic_ends_one_task_is_counted_and_the_task_begins_again() {
    let (mut supervisor, metrics) = supervisor();
    let (begun, beats) = (Times::default(), Times::default());
    supervisor.keep("other", WELL, AtStop::Drop, {
        let beats = beats.clone();
        move |_| {
            let beats = beats.clone();
            async move {
                loop {
                    beats.count();
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    });
    supervisor.keep("sweep", WELL, AtStop::Drop, {
        let begun = begun.clone();
        move |_| {
            let first = begun.count() < 2;
            async move {
                assert!(!first, "a panic that is meant");
                std::future::pending().await
            }
        }
    });
    sleep(Duration::from_secs(1)).await;
    assert_eq!((begun.get(), metrics.tasks.panics.get()), (3, 2));
    assert_eq!(metrics.tasks.restarts("sweep").get(), 2);
    assert_eq!(metrics.tasks.restarts("other").get(), 0);
    assert!(beats.get() >= 99, "{} beats of the other", beats.get());
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_a_task_within_the_task_is_counted_as_one() {
    let (mut supervisor, metrics) = supervisor();
    supervisor.keep("ingest", WELL, AtStop::Drop, |_| async {
        let inner = tokio::spawn(async { panic!("a panic that is meant") });
        Ok(inner.await?)
    });
    sleep(Duration::from_millis(10)).await;
    assert_eq!(metrics.tasks.panics.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_cannot_be_kept_up_is_given_up() {
    let (mut supervisor, _) = supervisor();
    let (begun, began) = (Times::default(), Instant::now());
    supervisor.keep("ingest", WELL, AtStop::Finish, {
        let begun = begun.clone();
        move |_| {
            begun.count();
            fails()
        }
    });
    let gave_up = supervisor.gave_up().await;
    assert_eq!(begun.get(), MOST);
    assert_eq!(
        gave_up.to_string(),
        "the task \"ingest\" cannot be kept up, it failed 12 times in a row: the store said no"
    );
    let took = began.elapsed();
    assert!(
        (50..112).contains(&took.as_secs()),
        "gave up after {took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_task_that_ran_well_for_a_minute_begins_a_new_row() {
    let (mut supervisor, metrics) = supervisor();
    supervisor.keep("ingest", WELL, AtStop::Drop, |_| async {
        sleep(WELL).await;
        fails().await
    });
    let given_up = timeout(Duration::from_secs(3_600), supervisor.gave_up());
    assert_eq!(given_up.await.ok(), None);
    assert!(metrics.tasks.restarts("ingest").get() >= 59);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_ends_well_is_done() {
    let (mut supervisor, metrics) = supervisor();
    let begun = Times::default();
    supervisor.keep("once", WELL, AtStop::Finish, {
        let begun = begun.clone();
        move |_| {
            begun.count();
            async { Ok(()) }
        }
    });
    sleep(Duration::from_secs(600)).await;
    assert_eq!((begun.get(), metrics.tasks.restarts("once").get()), (1, 0));
    assert!(!supervisor.watched()[0].is_stuck());
}

/// By the real clock, which the heart goes by.
#[tokio::test]
async fn a_task_that_is_silent_for_longer_than_its_bound_is_stuck() {
    let (mut supervisor, _) = supervisor();
    let bound = Duration::from_millis(50);
    supervisor.keep("beats", bound, AtStop::Drop, |heart| async move {
        loop {
            heart.beat();
            sleep(Duration::from_millis(1)).await;
        }
    });
    let silent = |_| std::future::pending::<anyhow::Result<()>>();
    supervisor.keep("silent", bound, AtStop::Drop, silent);
    supervisor.keep("fails", bound, AtStop::Drop, |_| fails());
    let watched = supervisor.watched();
    let is_stuck = |name| {
        let mut watched = watched.iter();
        watched.find(|it| it.name == name).unwrap().is_stuck()
    };
    let until = Instant::now() + Duration::from_secs(10);
    while !is_stuck("silent") {
        assert!(Instant::now() < until);
        sleep(Duration::from_millis(1)).await;
    }
    // One that waits to begin again is not stuck.
    assert!(!is_stuck("fails"));
    // A busy machine may hold a beat up for a moment.
    while is_stuck("beats") {
        assert!(Instant::now() < until);
        sleep(Duration::from_millis(1)).await;
    }
}

/// By the real clock, which hearts go by.
#[test]
fn a_task_of_parts_is_silent_once_one_of_them_is() {
    let bound = Duration::from_millis(200);
    let (whole, parts) = (Heartbeat::default(), [(); 2].map(|()| Heartbeat::default()));
    let beats_until = |until: Duration| {
        let until = clock::mono() + until;
        while clock::mono() < until {
            std::thread::yield_now();
            parts[0].beat();
            whole.beat_for(&parts, bound);
        }
    };
    parts[1].rest();
    whole.beat();
    beats_until(2 * bound);
    assert!(whole.age() <= bound);
    parts[1].beat();
    beats_until(3 * bound);
    assert!(whole.age() >= bound);
}

#[tokio::test(start_paused = true)]
async fn what_is_to_finish_is_waited_for_and_the_rest_is_dropped() {
    let (mut supervisor, _) = supervisor();
    let finished = Times::default();
    let stopping = supervisor.stopping();
    supervisor.keep("ingest", WELL, AtStop::Finish, {
        let finished = finished.clone();
        move |_| {
            let (finished, mut stopping) = (finished.clone(), stopping.clone());
            async move {
                stopping.wait_for(|stop| *stop).await?;
                sleep(Duration::from_secs(2)).await;
                finished.count();
                Ok(())
            }
        }
    });
    supervisor.keep("sweep", WELL, AtStop::Drop, |_| std::future::pending());
    supervisor.keep("waits", WELL, AtStop::Finish, |_| fails());
    sleep(Duration::from_millis(1)).await;
    let began = Instant::now();
    supervisor.stop(Duration::from_secs(25)).await;
    assert_eq!(finished.get(), 1);
    assert_eq!(began.elapsed().as_secs(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_does_not_finish_in_time_is_dropped() {
    let (mut supervisor, _) = supervisor();
    supervisor.keep("ingest", WELL, AtStop::Finish, |_| std::future::pending());
    let began = Instant::now();
    supervisor.stop(Duration::from_secs(25)).await;
    assert_eq!(began.elapsed().as_secs(), 25);
}
