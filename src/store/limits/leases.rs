//! The leases of this process by key, in bounded memory, shared by its lanes: what is decided here, who asks Redis, and who
//! waits for the answer. The arithmetic is `policy::lease`'s.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time::timeout_at;
use tracing::{info, warn};

use super::grants::Grants;
use crate::clock;
use crate::config::limits::{Window, Windows};
use crate::keys::{KeyTag, Keys};
use crate::policy::lease::{Answer, Batch, Lease, Request, Round, RuleView, Terms};
use crate::store::redis::{CallError, Connections};
use crate::store::table::{Key, SHARDS, Shard};
use crate::telemetry::log::LogRateLimit;

/// A limit counts as shared again once no answer was missing for this long.
const SHARED_AFTER: Duration = Duration::from_secs(1);
/// For how long a missing answer is told of a limit that is not asked again: that says nothing of Redis by then.
const TOLD_FOR: Duration = Duration::from_secs(60);

/// A limit asked about one request.
#[derive(Debug)]
pub struct Ask<'a> {
    pub key: Key,
    /// The limit's name, and the parts of its key.
    pub limit: &'a str,
    pub parts: &'a [Cow<'a, [u8]>],
    pub windows: &'a Windows,
    pub cost: u64,
    pub terms: Terms,
}

impl Ask<'_> {
    fn tag(&self) -> KeyTag {
        KeyTag::new(self.limit, self.parts.iter().map(AsRef::as_ref))
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// With what it spends of a lease; a concurrency limit has none.
    Admitted(Batch),
    /// `None`: it would be for ever.
    Refused { retry_after: Option<Duration> },
    /// Redis has not answered.
    Lost,
}

/// What becomes of a request, and what is known of the limit's rules then, in their order: nothing before Redis has answered
/// once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    pub decision: Decision,
    pub rules: Views,
}

/// Of a limit's rules, in their order.
pub type Views = SmallVec<[RuleView; 1]>;

impl Decided {
    fn of(decision: Decision, lease: &Lease, now: Duration) -> Decided {
        let rules = lease.rules(now).collect();
        Decided { decision, rules }
    }

    /// Redis has not answered.
    fn lost() -> Decided {
        let (decision, rules) = (Decision::Lost, Views::new());
        Decided { decision, rules }
    }
}

/// All leases.
pub struct Leases {
    parts: Vec<Part>,
    grants: Grants,
}

struct Part {
    leases: Mutex<Shard<Lease>>,
    /// Told when Redis has answered about any key of the part.
    answered: Notify,
}

impl Leases {
    /// For at most about `max_keys` keys; some 300 bytes each.
    pub fn new(max_keys: usize, keys: Keys) -> Leases {
        let part = |_| Part {
            leases: Mutex::new(Shard::new(max_keys.div_ceil(SHARDS))),
            answered: Notify::new(),
        };
        Leases {
            parts: (0..SHARDS).map(part).collect(),
            grants: Grants::new(keys),
        }
    }

    /// What can be said without asking Redis. Where a lease runs low, more is asked for meanwhile.
    pub fn decide(
        self: &Arc<Self>,
        redis: &Arc<Connections>,
        ask: &Ask<'_>,
        now: Duration,
    ) -> Option<Decided> {
        // Under one lock: what is decided, and what the client is told.
        let (decided, renewal) = {
            let mut leases = self.part(ask.key).leases.lock();
            let lease = leases.touch(ask.key, false);
            match lease.take(ask.cost, now) {
                Answer::Admitted(taken) => {
                    let decided = Decided::of(Decision::Admitted(taken), lease, now);
                    let low = lease.runs_low(&ask.terms, now);
                    (decided, low.then(|| lease.ask(0, &ask.terms, now)))
                }
                Answer::Refused { retry_after } => {
                    let refused = Decision::Refused { retry_after };
                    return Some(Decided::of(refused, lease, now));
                }
                Answer::Ask => return None,
                Answer::Wait(round) => {
                    // Asked again at once, by `ask`.
                    lease.leave(ask.cost, round);
                    return None;
                }
            }
        };
        if let Some(renewal) = renewal {
            self.renew(redis, ask, renewal);
        }
        Some(decided)
    }

    /// Decides, by asking Redis or by waiting for what others ask, for at most the patience of the terms.
    pub async fn ask(&self, redis: &Arc<Connections>, ask: &Ask<'_>) -> Decided {
        let deadline = clock::now() + ask.terms.patience;
        let part = self.part(ask.key);
        let mut waiting = Waiting {
            part,
            key: ask.key,
            since: None,
        };
        loop {
            // Before the look, so that no answer is missed between the two.
            let answered = part.answered.notified();
            let now = clock::mono();
            let request = {
                let mut leases = part.leases.lock();
                let lease = leases.touch(ask.key, false);
                if let Some((cost, round)) = waiting.since.take() {
                    lease.leave(cost, round);
                }
                let decision = match lease.take(ask.cost, now) {
                    Answer::Admitted(taken) => Ok(Decision::Admitted(taken)),
                    Answer::Refused { retry_after } => Ok(Decision::Refused { retry_after }),
                    Answer::Ask => Err(Some(lease.ask(ask.cost, &ask.terms, now))),
                    Answer::Wait(round) => {
                        // What can never be granted is not to be taken for it, either.
                        match ask.cost <= most(ask.windows) {
                            true => waiting.since = Some((ask.cost, round)),
                            false => lease.leave(ask.cost, round),
                        }
                        Err(None)
                    }
                };
                match decision {
                    Ok(decision) => return Decided::of(decision, lease, now),
                    Err(request) => request,
                }
            };
            let Some(request) = request else {
                if timeout_at(deadline.into(), answered).await.is_err() {
                    return Decided::lost();
                }
                continue;
            };
            let asking = Asking::new(part, ask.key);
            let tag = ask.tag();
            let granted = self.grants.ask(redis, tag, ask.windows, &request, deadline);
            return match granted.await {
                Ok(grant) => asking.end(|lease| {
                    let now = clock::mono();
                    let decision = match lease.granted(&request, &grant, &ask.terms, now) {
                        Some(taken) => Decision::Admitted(taken),
                        None => Decision::Refused {
                            retry_after: lease.retry_after(now),
                        },
                    };
                    Decided::of(decision, lease, now)
                }),
                Err(_) => Decided::lost(),
            };
        }
    }

    fn renew(self: &Arc<Self>, redis: &Arc<Connections>, ask: &Ask<'_>, request: Request) {
        let (leases, redis) = (self.clone(), redis.clone());
        let tag = ask.tag();
        let windows = ask.windows.clone();
        let (key, terms) = (ask.key, ask.terms);
        tokio::spawn(async move {
            let asking = Asking::new(leases.part(key), key);
            let deadline = clock::now() + terms.patience;
            let granted = leases.grants.ask(&redis, tag, &windows, &request, deadline);
            if let Ok(grant) = granted.await {
                asking.end(|lease| lease.granted(&request, &grant, &terms, clock::mono()));
            }
        });
    }

    /// Gives back what a request took that another limit refuses.
    pub fn put_back(&self, key: Key, taken: Batch, now: Duration) {
        if let Some(lease) = self.part(key).leases.lock().get_mut(key) {
            lease.put_back(taken, now);
        }
    }

    /// Forgets what this process holds of a key.
    pub fn forget(&self, key: Key) {
        self.part(key).leases.lock().remove(key);
    }

    /// Asks Redis what a request of no cost would be told. Changes nothing.
    pub async fn peek(&self, redis: &Arc<Connections>, ask: &Ask<'_>) -> Result<Views, CallError> {
        let now = clock::mono();
        let mut lease = Lease::default();
        let request = lease.ask(0, &ask.terms, now);
        let tag = ask.tag();
        let deadline: Instant = clock::now() + ask.terms.patience;
        let grant = self.grants.ask(redis, tag, ask.windows, &request, deadline);
        lease.granted(&request, &grant.await?, &ask.terms, now);
        Ok(lease.rules(clock::mono()).collect())
    }

    /// Forgets what all processes have counted for a key; whether there was anything. Others spend what they hold of it.
    pub async fn reset(&self, redis: &Connections, ask: &Ask<'_>) -> Result<bool, CallError> {
        let tag = ask.tag();
        let known = self.grants.forget(redis, tag, ask.windows).await;
        self.forget(ask.key);
        known
    }

    /// How many keys are held.
    pub fn held_keys(&self) -> usize {
        self.parts.iter().map(|part| part.leases.lock().len()).sum()
    }

    /// Keys that were let go of for others, since the process began.
    pub fn evicted(&self) -> u64 {
        self.parts
            .iter()
            .map(|part| part.leases.lock().evicted())
            .sum()
    }

    fn part(&self, key: Key) -> &Part {
        &self.parts[key.shard()]
    }
}

impl fmt::Debug for Leases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leases")
            .field("keys", &self.held_keys())
            .finish_non_exhaustive()
    }
}

/// The largest cost that they can ever grant.
fn most(windows: &Windows) -> u64 {
    windows.iter().map(Window::capacity).min().unwrap_or(0)
}

/// A question under way; dropped without an end, nobody waits for it any more.
struct Asking<'a> {
    part: &'a Part,
    key: Key,
    ended: bool,
}

impl<'a> Asking<'a> {
    fn new(part: &'a Part, key: Key) -> Asking<'a> {
        let ended = false;
        Asking { part, key, ended }
    }

    fn end<T>(mut self, take_in: impl FnOnce(&mut Lease) -> T) -> T {
        self.ended = true;
        take_in(self.part.leases.lock().touch(self.key, false))
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if !self.ended
            && let Some(lease) = self.part.leases.lock().get_mut(self.key)
        {
            lease.unanswered();
        }
        self.part.answered.notify_waiters();
    }
}

/// A request that waits for the answer to another's question, which is told how much those need who wait. Dropped, it does so
/// no more, whether it looks again, has waited too long, or has lost its client.
struct Waiting<'a> {
    part: &'a Part,
    key: Key,
    /// What it needs, and since which round it waits; `None` while it does not.
    since: Option<(u64, Round)>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some((cost, round)) = self.since
            && let Some(lease) = self.part.leases.lock().get_mut(self.key)
        {
            lease.leave(cost, round);
        }
    }
}

/// Whether one limit is shared at present, told to operators when it changes. Forgotten by a reload.
#[derive(Debug)]
pub struct Sharing {
    limit: String,
    /// When an answer was missing last, by [`clock::mono`] in milliseconds.
    lost_at: AtomicU64,
    /// Until an answer is there for [`SHARED_AFTER`].
    alone: AtomicBool,
    /// Whether the log was told that it is.
    told: AtomicBool,
    /// A slow Redis answers some calls, and others not.
    lines: Mutex<LogRateLimit>,
}

impl Sharing {
    pub fn new(limit: &str) -> Sharing {
        Sharing {
            limit: limit.to_owned(),
            lost_at: AtomicU64::new(0),
            alone: AtomicBool::new(false),
            told: AtomicBool::new(false),
            lines: Mutex::default(),
        }
    }

    pub fn limit(&self) -> &str {
        &self.limit
    }

    /// Whether Redis did not answer when the limit was asked last, within the last minute.
    pub fn is_alone(&self, now: Duration) -> bool {
        self.alone.load(Ordering::Relaxed) && self.since_lost(now) < TOLD_FOR
    }

    fn since_lost(&self, now: Duration) -> Duration {
        let lost_at = Duration::from_millis(self.lost_at.load(Ordering::Relaxed));
        now.saturating_sub(lost_at)
    }

    /// Redis has answered; whether the log is to be told that it does again.
    fn note_answered(&self, now: Duration) -> bool {
        if !self.alone.load(Ordering::Relaxed) {
            return false;
        }
        let for_long = self.since_lost(now) >= SHARED_AFTER;
        for_long
            && self.alone.swap(false, Ordering::Relaxed)
            && self.told.swap(false, Ordering::Relaxed)
    }

    /// Redis has not answered; whether the log is to be told, which it is of one change in ten seconds.
    fn note_lost(&self, now: Duration) -> bool {
        self.lost_at.store(clock::millis(now), Ordering::Relaxed);
        self.alone.store(true, Ordering::Relaxed);
        !self.told.load(Ordering::Relaxed)
            && self.lines.lock().next(now).is_some()
            && !self.told.swap(true, Ordering::Relaxed)
    }

    /// Redis has answered.
    pub fn answered(&self, now: Duration) {
        if self.note_answered(now) {
            info!(limit = self.limit, "limit is shared again");
        }
    }

    /// Redis has not answered, or has refused the call.
    pub fn lost(&self, now: Duration) {
        if self.note_lost(now) {
            warn!(
                limit = self.limit,
                "limit is not shared: redis does not answer, or refuses; on_redis_loss says what becomes of requests"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_comes_and_goes_is_told_of_once_in_ten_seconds() {
        let (sharing, at) = (Sharing::new("a"), Duration::from_millis);
        assert!(sharing.note_lost(at(100_000)) && !sharing.note_lost(at(100_500)));
        assert!(!sharing.note_answered(at(100_600)) && sharing.is_alone(at(100_600)));
        assert!(sharing.note_answered(at(101_600)) && !sharing.is_alone(at(101_600)));
        // Not told, and known all the same.
        assert!(!sharing.note_lost(at(102_000)) && sharing.is_alone(at(102_000)));
        assert!(!sharing.note_answered(at(103_000)) && !sharing.is_alone(at(103_000)));
        // One that stays is told of once it may be.
        assert!(!sharing.note_lost(at(104_000)));
        assert!(sharing.note_lost(at(110_000)) && !sharing.note_lost(at(120_000)));
        assert!(sharing.note_answered(at(121_000)));
    }
}
