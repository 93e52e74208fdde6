//! What the checks of a process have found: looked at together, each within a bound of time, kept for a while. One look is under
//! way at a time; who asks meanwhile gets the last answer, marked as stale. Must not know what is looked at.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::check::{Check, Finding, Status};
use crate::heartbeat::Heartbeat;

/// The checks, and the last answer.
#[derive(Debug)]
pub struct Board {
    checks: Vec<Check>,
    /// For one check.
    within: Duration,
    /// How long an answer serves.
    serves: Duration,
    /// Where the checks run.
    runtime: Handle,
    now: Mutex<Now>,
    /// What is not ready; `None` before the first look at what gates.
    unready: watch::Sender<Option<Vec<String>>>,
    looks: AtomicU64,
}

/// What was last found, and the look that is under way.
#[derive(Debug, Default)]
struct Now {
    last: Option<Arc<Report>>,
    under_way: Option<watch::Receiver<Option<Arc<Report>>>>,
}

/// What one look at everything has found.
#[derive(Debug)]
pub struct Report {
    pub checks: Vec<Entry>,
    at: Instant,
}

/// One finding of a report.
#[derive(Debug)]
pub struct Entry {
    pub name: String,
    pub found: Finding,
    /// How long the look took.
    pub latency: Duration,
}

/// A report as it is served.
#[derive(Debug)]
pub struct Served {
    pub report: Arc<Report>,
    /// Since it was made.
    pub age: Duration,
    /// Whether it is past its time, and a newer one is being made.
    pub is_stale: bool,
}

impl Board {
    /// The checks run on `runtime`, each for `within` at most; what they found serves for `serves`.
    pub fn new(
        checks: Vec<Check>,
        within: Duration,
        serves: Duration,
        runtime: Handle,
    ) -> Arc<Board> {
        let has_gates = checks.iter().any(|check| check.gates);
        Arc::new(Board {
            checks,
            within,
            serves,
            runtime,
            now: Mutex::default(),
            unready: watch::Sender::new((!has_gates).then(Vec::new)),
            looks: AtomicU64::new(0),
        })
    }

    /// The last answer if it still serves, or is all there is until the look under way ends; else a new one.
    pub async fn report(self: &Arc<Self>) -> Served {
        let mut coming = {
            let mut now = self.now.lock();
            let last = now.last.clone();
            match (last, &now.under_way) {
                (Some(last), _) if last.at.elapsed() < self.serves => return served(last, false),
                (Some(last), Some(_)) => return served(last, true),
                (None, Some(under_way)) => under_way.clone(),
                (_, None) => {
                    let (done, coming) = watch::channel(None);
                    now.under_way = Some(coming.clone());
                    let board = self.clone();
                    // A task of its own: the one who asked first may leave.
                    self.runtime.spawn(async move {
                        let report = Arc::new(board.look().await);
                        {
                            let mut now = board.now.lock();
                            now.last = Some(report.clone());
                            now.under_way = None;
                        }
                        done.send_replace(Some(report));
                    });
                    coming
                }
            }
        };
        let report = coming.wait_for(Option::is_some).await;
        match report.ok().and_then(|report| report.clone()) {
            Some(report) => served(report, false),
            // The runtime of the checks has ended, so the process does.
            None => served(Arc::new(self.ended()), true),
        }
    }

    /// What keeps the process from being ready; `None` where it is.
    pub fn unready(&self) -> Option<Vec<String>> {
        match &*self.unready.borrow() {
            Some(unready) => (!unready.is_empty()).then(|| unready.clone()),
            None => Some(self.gates().flat_map(|check| check.names.clone()).collect()),
        }
    }

    /// Looks every `interval` at what gates, for ever.
    pub async fn keep_ready(
        self: Arc<Self>,
        interval: Duration,
        heartbeat: Heartbeat,
    ) -> Infallible {
        loop {
            heartbeat.beat();
            let looks = join_all(self.gates().map(|check| self.look_at(check))).await;
            let critical = looks
                .into_iter()
                .flatten()
                .filter(|entry| entry.found.status == Status::Critical);
            let unready = critical.map(|entry| entry.name).collect();
            self.unready.send_replace(Some(unready));
            heartbeat.beat();
            sleep(interval).await;
        }
    }

    /// How often everything was looked at.
    pub fn looks(&self) -> u64 {
        self.looks.load(Ordering::Relaxed)
    }

    fn gates(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.gates)
    }

    async fn look(&self) -> Report {
        self.looks.fetch_add(1, Ordering::Relaxed);
        let looks = join_all(self.checks.iter().map(|check| self.look_at(check))).await;
        Report {
            checks: looks.into_iter().flatten().collect(),
            at: Instant::now(),
        }
    }

    async fn look_at(&self, check: &Check) -> Vec<Entry> {
        let began = Instant::now();
        // A task of its own, which a panic ends alone.
        let begin = check.look.clone();
        let look = self.runtime.spawn(async move { begin().await });
        let abort = look.abort_handle();
        let late = || {
            abort.abort();
            format!("no answer within {:?}", self.within)
        };
        let found = match timeout(self.within, look).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(late()),
        };
        let latency = began.elapsed();
        let all = |error: &String| {
            let found = Finding::error(check.unanswered, error);
            vec![found; check.names.len()]
        };
        let found = found.unwrap_or_else(|error| all(&error));
        let named = check.names.iter().zip(found);
        named
            .map(|(name, found)| Entry {
                name: name.clone(),
                found,
                latency,
            })
            .collect()
    }

    fn ended(&self) -> Report {
        let names = self.checks.iter().flat_map(|check| &check.names);
        let entry = |name: &String| Entry {
            name: name.clone(),
            found: Finding::error(Status::Critical, "weir ends"),
            latency: Duration::ZERO,
        };
        Report {
            checks: names.map(entry).collect(),
            at: Instant::now(),
        }
    }
}

fn served(report: Arc<Report>, is_stale: bool) -> Served {
    Served {
        age: report.at.elapsed(),
        report,
        is_stale,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn board(checks: Vec<Check>, serves: Duration) -> Arc<Board> {
        Board::new(checks, SECOND, serves, Handle::current())
    }

    fn takes(name: &str, time: Duration) -> Check {
        Check::new(name, Status::Degraded, move || async move {
            sleep(time).await;
            Finding::new(Status::Ok, json!({}))
        })
    }

    fn statuses(served: &Served) -> Vec<(&str, Status)> {
        let checks = served.report.checks.iter();
        checks
            .map(|entry| (&*entry.name, entry.found.status))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn checks_run_together_and_each_has_its_time() {
        let panics = Check::new("panics", Status::Degraded, || async {
            panic!("a panic that is meant")
        });
        let late = Check::several(
            vec!["a".to_owned(), "b".to_owned()],
            Status::Critical,
            std::future::pending,
        );
        let board = board(vec![takes("quick", SECOND / 2), panics, late], SECOND);
        let began = Instant::now();
        let served = board.report().await;
        assert_eq!(began.elapsed(), SECOND);
        assert_eq!(
            statuses(&served),
            [
                ("quick", Status::Ok),
                ("panics", Status::Degraded),
                ("a", Status::Critical),
                ("b", Status::Critical)
            ]
        );
        let checks = &served.report.checks;
        assert_eq!(checks[0].latency, SECOND / 2);
        assert_eq!(checks[2].found.details["error"], "no answer within 1s");
    }

    /// Some look before they give a future.
    #[tokio::test(start_paused = true)]
    async fn a_look_that_panics_at_once_is_a_finding_too() {
        let check = Check::new("panics", Status::Degraded, || {
            if true {
                panic!("a panic that is meant");
            }
            std::future::pending()
        });
        let board = board(vec![check], Duration::ZERO);
        for looks in 1..=2 {
            let served = board.report().await;
            assert_eq!(statuses(&served), [("panics", Status::Degraded)]);
            assert_eq!(board.looks(), looks);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_serves_for_its_time() {
        let board = board(vec![takes("quick", Duration::ZERO)], 30 * SECOND);
        board.report().await;
        sleep(29 * SECOND).await;
        let served = board.report().await;
        assert_eq!((board.looks(), served.is_stale), (1, false));
        assert_eq!(served.age.as_secs(), 29);
        sleep(2 * SECOND).await;
        assert_eq!(board.report().await.age, Duration::ZERO);
        assert_eq!(board.looks(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn one_look_is_under_way_at_a_time_and_others_get_the_stale_answer() {
        let board = board(vec![takes("slow", SECOND / 2)], SECOND);
        let first = join_all((0..10).map(|_| board.report())).await;
        // There was nothing stale to serve.
        assert!(first.iter().all(|served| !served.is_stale));
        assert_eq!(board.looks(), 1);
        sleep(2 * SECOND).await;
        let again = join_all((0..10).map(|_| board.report())).await;
        let stale = again.iter().filter(|served| served.is_stale);
        assert!(stale.clone().all(|served| served.age >= SECOND));
        assert_eq!((board.looks(), stale.count()), (2, 9));
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_goes_on_when_the_one_who_asked_leaves() {
        let board = board(vec![takes("slow", SECOND / 2)], SECOND);
        let left = timeout(SECOND / 10, board.report()).await;
        assert!(left.is_err());
        sleep(SECOND).await;
        let served = board.report().await;
        assert_eq!((board.looks(), served.is_stale), (1, false));
    }

    /// Else each look at what hangs would leave another behind.
    #[tokio::test(start_paused = true)]
    async fn a_look_that_is_late_is_given_up() {
        let held = Arc::new(());
        let of_check = held.clone();
        let late = Check::new("late", Status::Degraded, move || {
            let of_look = of_check.clone();
            async move {
                std::future::pending::<()>().await;
                drop(of_look);
                Finding::new(Status::Ok, json!({}))
            }
        });
        let board = board(vec![late], SECOND);
        for _ in 0..3 {
            board.report().await;
            sleep(2 * SECOND).await;
        }
        assert_eq!((board.looks(), Arc::strong_count(&held)), (3, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn the_process_is_ready_while_what_gates_is_not_critical() {
        assert_eq!(board(vec![takes("quick", SECOND)], SECOND).unready(), None);
        let (turn, turned) = watch::channel(Status::Critical);
        let gate = Check::new("postgres_write", Status::Critical, move || {
            let status = *turned.borrow();
            async move { Finding::new(status, json!({})) }
        });
        let board = board(vec![gate.gating()], SECOND);
        let unready = Some(vec!["postgres_write".to_owned()]);
        assert_eq!(board.unready(), unready);
        let keep = board.clone().keep_ready(SECOND, Heartbeat::default());
        let keep = tokio::spawn(keep);
        for (status, expected) in [
            (Status::Degraded, None),
            (Status::Critical, unready),
            (Status::Ok, None),
        ] {
            turn.send_replace(status);
            sleep(SECOND + SECOND / 2).await;
            assert_eq!(board.unready(), expected);
        }
        keep.abort();
    }
}
