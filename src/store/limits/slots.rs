//! Slots of concurrency limits that processes have in common. This process tells Redis how many it holds of a key, as a number and
//! not as steps, so that a lost call is made good by the next; a slot that comes free here is taken again here without a call.

use std::borrow::Cow;
use std::collections::HashSet;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use super::leases::Decision;
use crate::clock;
use crate::keys::KeyTag;
use crate::policy::limit::Verdict;
use crate::store::fleet::Fleet;
use crate::store::redis::{Arg, CallError, Connections, Script, Value};
use crate::store::table::{Key, SHARDS, Shard};

/// Between rounds of telling Redis what came free: so long a slot stays this process's, in case that it is wanted again.
const ROUND: Duration = Duration::from_millis(25);
/// Between rounds of giving all back.
const GIVE_BACK_AGAIN: Duration = Duration::from_millis(2);
/// Calls of a round under way at a time.
const AT_A_TIME: usize = 64;
/// Before Redis is told again what it did not answer to.
const TELL_AGAIN: Duration = Duration::from_millis(500);
/// For how long a key is refused that had no slot left, unless one comes free here.
const REFUSED: Duration = Duration::from_millis(10);
/// When a slot comes free is not known; a second is the least that Retry-After can say.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A concurrency limit asked about one request.
#[derive(Debug)]
pub struct Ask<'a> {
    pub key: Key,
    /// The limit's name, and the parts of its key.
    pub limit: &'a str,
    pub parts: &'a [Cow<'a, [u8]>],
    /// Slots in all.
    pub slots: u64,
    /// Slots that the request needs.
    pub cost: u64,
    /// How long slots of a dead process stay taken.
    pub hold_ttl: Duration,
    /// How long an answer is waited for.
    pub patience: Duration,
}

impl Ask<'_> {
    fn tag(&self) -> KeyTag {
        KeyTag::new(self.limit, self.parts.iter().map(AsRef::as_ref))
    }
}

/// Slots that were taken, until this is dropped or [kept](Taken::keep).
#[derive(Debug)]
#[must_use]
pub struct Taken<'s> {
    slots: &'s Slots,
    key: Key,
    cost: u64,
}

impl Taken<'_> {
    /// They are given back by [`Slots::release`].
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.slots.release(self.key, self.cost);
    }
}

/// The slots of this process, by key.
pub struct Slots {
    fleet: Arc<Fleet>,
    script: Script,
    parts: Vec<Part>,
    /// Keys of which this process has slots by Redis, or may have. Its lock is taken inside a part's, never around it.
    active: Mutex<HashSet<Key>>,
    turn: AtomicU64,
}

struct Part {
    slots: Mutex<Shard<Held>>,
    /// Told when Redis has answered about any key of the part.
    answered: Notify,
}

/// What this process has of one key.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    /// By requests.
    used: u64,
    /// By Redis, at least.
    granted: u64,
    /// By other processes, as Redis said last.
    others: u64,
    /// What those need who wait.
    waiting: u64,
    /// Of questions: who waits is asked for by the one that ends a round.
    round: u32,
    /// Redis is being asked: one call a key at a time, so that none overtakes another.
    asking: bool,
    /// Whether Redis may think that it is more than `granted`.
    unsure: bool,
    told_at: Duration,
    /// From then on others may be given what is `granted`, as far as Redis has heard.
    lasts_until: Duration,
    /// Redis is not told before.
    tell_after: Duration,
    refused_until: Duration,
    /// Since it is active.
    of: Option<Of>,
}

/// Whose slots they are.
#[derive(Debug, Clone, Copy)]
struct Of {
    tag: KeyTag,
    slots: u64,
    hold_ttl: Duration,
}

impl Of {
    fn new(ask: &Ask<'_>) -> Of {
        Of {
            tag: ask.tag(),
            slots: ask.slots,
            hold_ttl: ask.hold_ttl,
        }
    }
}

/// What Redis is to be told of a key, in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tells {
    Nothing,
    /// It has nothing of it, and is told no more.
    Over,
    Used(Asked),
}

enum Step {
    Taken,
    Refused,
    /// The caller asks.
    Ask,
    /// From this round on.
    Wait(u32),
}

impl Slots {
    /// For at most about `max_keys` keys, besides those in use.
    pub fn new(max_keys: usize, fleet: Arc<Fleet>) -> Slots {
        let part = |_| Part {
            slots: Mutex::new(Shard::new(max_keys.div_ceil(SHARDS))),
            answered: Notify::new(),
        };
        Slots {
            fleet,
            script: Script::new(include_str!("../../../lua/slots.lua")),
            parts: (0..SHARDS).map(part).collect(),
            active: Mutex::new(HashSet::new()),
            turn: AtomicU64::new(0),
        }
    }

    /// Takes the slots that a request needs, if there are as many; else what was decided.
    pub async fn take(&self, redis: &Connections, ask: &Ask<'_>) -> Result<Taken<'_>, Decision> {
        // Not for ever: a limit may change. And not a key to be held.
        if ask.cost > ask.slots {
            return Err(Decision::Refused { retry_after: None });
        }
        let deadline = Instant::now() + ask.patience;
        let part = self.part(ask.key);
        loop {
            // Before the look, so that no answer is missed between the two.
            let answered = part.answered.notified();
            let now = clock::mono();
            let step = part.change(ask.key, |held| held.take(ask, now));
            let goes_on = match step {
                Step::Taken => {
                    return Ok(Taken {
                        slots: self,
                        key: ask.key,
                        cost: ask.cost,
                    });
                }
                Step::Refused => {
                    let retry_after = Some(RETRY_AFTER);
                    return Err(Decision::Refused { retry_after });
                }
                Step::Ask => self.ask(redis, ask, deadline).await,
                Step::Wait(round) => {
                    let waited = timeout_at(deadline, answered).await;
                    // It looks again, or has given up. Whoever has asked since has asked for it.
                    part.change(ask.key, |held| {
                        if held.round == round {
                            held.waiting = held.waiting.saturating_sub(ask.cost);
                        }
                    });
                    waited.is_ok()
                }
            };
            if !goes_on {
                return Err(Decision::Lost);
            }
        }
    }

    /// Gives slots back.
    pub fn release(&self, key: Key, cost: u64) {
        self.part(key).change(key, |held| {
            held.used = held.used.saturating_sub(cost);
            held.refused_until = Duration::ZERO;
        });
    }

    /// Forgets what Redis has of a key; whether there was anything. Requests that hold slots tell it again.
    pub async fn reset(&self, redis: &Connections, ask: &Ask<'_>) -> Result<bool, CallError> {
        let tag = ask.tag();
        let deleted = redis.delete(&[&self.fleet.keys.slots(tag)]).await?;
        self.doubt(ask.key);
        Ok(deleted > 0)
    }

    /// What Redis has of a key may be gone: it is told anew what is held here, soon.
    pub fn doubt(&self, key: Key) {
        if let Some(held) = self.part(key).slots.lock().get_mut(key) {
            held.unsure = true;
        }
    }

    /// As [`Slots::doubt`], of every key: Redis may have lost its data.
    pub fn doubt_all(&self) {
        // Copied, since its lock is taken inside a part's.
        let active: Vec<_> = self.active.lock().iter().copied().collect();
        for key in active {
            self.doubt(key);
        }
    }

    /// Asks Redis how many slots others have, for [`Slots::verdict`].
    pub async fn peek(&self, redis: &Connections, ask: &Ask<'_>) -> Result<(), CallError> {
        let part = self.part(ask.key);
        {
            let mut slots = part.slots.lock();
            let held = slots.touch(ask.key, true);
            if held.of.replace(Of::new(ask)).is_none() {
                self.active.lock().insert(ask.key);
            }
            (held.unsure, held.tell_after) = (true, Duration::ZERO);
        }
        self.tell(redis, ask.key).await;
        let slots = part.slots.lock();
        match slots.get(ask.key).is_some_and(|held| held.unsure) {
            true => Err(CallError::Timeout),
            false => Ok(()),
        }
    }

    /// Keeps Redis up to date about the slots of this process, for ever.
    pub async fn keep(self: Arc<Self>, redis: Arc<Connections>, beat: impl Fn()) -> Infallible {
        loop {
            beat();
            sleep(ROUND).await;
            self.tell_all(&redis, &beat).await;
        }
    }

    /// Gives all slots back, of which no request holds any more: at the end of the process, which leaves no time for a round. Until Redis
    /// has them, which may be never.
    pub async fn give_back(&self, redis: &Connections) {
        while !self.active.lock().is_empty() {
            self.tell_all(redis, &|| {}).await;
            sleep(GIVE_BACK_AGAIN).await;
        }
    }

    async fn tell_all(&self, redis: &Connections, beat: &impl Fn()) {
        let active: Vec<_> = self.active.lock().iter().copied().collect();
        for keys in active.chunks(AT_A_TIME) {
            beat();
            join_all(keys.iter().map(|key| self.tell(redis, *key))).await;
        }
    }

    /// How many keys are held.
    pub fn held_keys(&self) -> usize {
        self.parts.iter().map(|part| part.slots.lock().len()).sum()
    }

    /// Keys that were let go of for others, since the process began.
    pub fn evicted(&self) -> u64 {
        self.parts
            .iter()
            .map(|part| part.slots.lock().evicted())
            .sum()
    }

    /// What the limit says, with what was decided.
    pub fn verdict(&self, ask: &Ask<'_>, decision: Decision) -> Verdict {
        let slots = self.part(ask.key).slots.lock();
        let taken = slots.get(ask.key).map_or(0, |held| held.used + held.others);
        let refused = matches!(decision, Decision::Refused { .. });
        Verdict {
            admitted: !refused,
            remaining: ask.slots.saturating_sub(taken),
            reset: Duration::ZERO,
            retry_after: (refused && ask.cost <= ask.slots).then_some(RETRY_AFTER),
        }
    }

    /// Asks Redis for what this request and those who wait need; whether it answered.
    async fn ask(&self, redis: &Connections, ask: &Ask<'_>, deadline: Instant) -> bool {
        let part = self.part(ask.key);
        let asking = Asking { part, key: ask.key };
        let of = Of::new(ask);
        let asked = part.change(ask.key, |held| {
            if held.of.replace(of).is_none() {
                self.active.lock().insert(ask.key);
            }
            held.asks(ask.cost)
        });
        let budget = deadline.saturating_duration_since(Instant::now());
        let asked_at = clock::mono();
        let answer = self.call(redis, of, asked, budget).await;
        if let Ok(answer) = answer {
            part.change(ask.key, |held| {
                held.told(answer, asked_at, of.hold_ttl);
                if answer.granted < asked.want {
                    held.refused_until = clock::mono() + REFUSED;
                }
            });
        }
        drop(asking);
        answer.is_ok()
    }

    /// Tells Redis what came free of a key, or that the rest is still held, and lets go of the key once nothing is.
    async fn tell(&self, redis: &Connections, key: Key) {
        let part = self.part(key);
        let now = clock::mono();
        let (of, asked) = {
            let mut slots = part.slots.lock();
            // One that was evicted is not in use; what Redis has of it comes back by itself.
            let held = slots.get_mut(key).and_then(|held| Some((held.of?, held)));
            let Some((of, held)) = held else {
                self.active.lock().remove(&key);
                return;
            };
            let asked = match held.tells(of.hold_ttl, now) {
                Tells::Nothing => return,
                Tells::Over => {
                    slots.remove(key);
                    // Under the part's lock: whoever takes a slot from now on finds no key, and makes it active again.
                    self.active.lock().remove(&key);
                    return;
                }
                Tells::Used(asked) => asked,
            };
            slots.touch(key, true);
            (of, asked)
        };
        let asking = Asking { part, key };
        let budget = self.fleet.rate_limit.timeout;
        let answer = self.call(redis, of, asked, budget).await;
        part.change(key, |held| match answer {
            Ok(answer) => held.told(answer, now, of.hold_ttl),
            Err(_) => held.tell_after = clock::mono() + TELL_AGAIN,
        });
        drop(asking);
    }

    async fn call(
        &self,
        redis: &Connections,
        of: Of,
        asked: Asked,
        budget: Duration,
    ) -> Result<Told, CallError> {
        let key = self.fleet.keys.slots(of.tag);
        let args = [
            Arg::Text(&self.fleet.process),
            Arg::Int(self.turn.fetch_add(1, Ordering::Relaxed) + 1),
            Arg::Int(asked.used),
            Arg::Int(asked.want),
            Arg::Int(of.slots),
            Arg::Int(clock::millis(of.hold_ttl)),
            Arg::Int(asked.needs),
        ];
        let answer = redis
            .run_within(budget, &self.script, &[&key], &args)
            .await?;
        let Value::Array(answer) = answer else {
            return Err(CallError::Nonsense);
        };
        match answer.as_slice() {
            [Value::Int(granted), Value::Int(others)] => Ok(Told {
                granted: u64::try_from(*granted).unwrap_or(0),
                others: u64::try_from(*others).unwrap_or(0),
            }),
            _ => Err(CallError::Nonsense),
        }
    }

    fn part(&self, key: Key) -> &Part {
        &self.parts[key.shard()]
    }
}

impl Part {
    /// Changes what is held of a key. While it is in use, it is not evicted.
    fn change<T>(&self, key: Key, change: impl FnOnce(&mut Held) -> T) -> T {
        let mut slots = self.slots.lock();
        let held = slots.touch(key, true);
        let changed = change(held);
        if held.used == 0 && !held.asking {
            slots.touch(key, false);
        }
        changed
    }
}

impl Held {
    fn take(&mut self, ask: &Ask<'_>, now: Duration) -> Step {
        let wanted = self.used.saturating_add(ask.cost);
        if wanted <= self.has(now).min(ask.slots) {
            self.used = wanted;
            return Step::Taken;
        }
        // One that needs less than what was refused may find enough.
        if now < self.refused_until && wanted.saturating_add(self.others) > ask.slots {
            return Step::Refused;
        }
        if self.asking {
            self.waiting = self.waiting.saturating_add(ask.cost);
            return Step::Wait(self.round);
        }
        self.asking = true;
        Step::Ask
    }

    /// What requests may take: nothing any more, where Redis has heard nothing for as long as it waits to give it to others.
    fn has(&self, now: Duration) -> u64 {
        match now < self.lasts_until {
            true => self.granted,
            false => 0,
        }
    }

    /// What a request of this cost, and those who wait, ask for.
    fn asks(&mut self, cost: u64) -> Asked {
        self.unsure = true;
        let waiting = std::mem::take(&mut self.waiting);
        self.round = self.round.wrapping_add(1);
        let needs = self.used.saturating_add(cost);
        Asked {
            used: self.used,
            want: needs.saturating_add(waiting).max(self.granted),
            needs,
        }
    }

    /// What came free, or that the rest is still held.
    fn tells(&mut self, hold_ttl: Duration, now: Duration) -> Tells {
        if self.asking || now < self.tell_after {
            return Tells::Nothing;
        }
        if self.used == 0 && self.granted == 0 && !self.unsure {
            return Tells::Over;
        }
        let fresh = now.saturating_sub(self.told_at) < hold_ttl / 3;
        if self.used == self.granted && !self.unsure && fresh {
            return Tells::Nothing;
        }
        // Given up first: no request may take what Redis is told is free.
        (self.granted, self.unsure, self.asking) = (self.used, true, true);
        Tells::Used(Asked::only(self.used))
    }

    /// The answer to what was asked at `asked_at`: Redis counts from then, or from later.
    fn told(&mut self, answer: Told, asked_at: Duration, hold_ttl: Duration) {
        (self.granted, self.others) = (answer.granted, answer.others);
        (self.unsure, self.told_at, self.tell_after) = (false, asked_at, asked_at);
        self.lasts_until = asked_at.saturating_add(hold_ttl);
    }
}

/// What Redis is told of a key, and asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked {
    used: u64,
    /// With what all need who wait.
    want: u64,
    /// With what the first of them needs: it takes that or nothing.
    needs: u64,
}

impl Asked {
    /// For no more than what is used.
    fn only(used: u64) -> Asked {
        Asked {
            used,
            want: used,
            needs: used,
        }
    }
}

/// What Redis says of a key.
#[derive(Debug, Clone, Copy)]
struct Told {
    granted: u64,
    others: u64,
}

/// A call under way.
struct Asking<'a> {
    part: &'a Part,
    key: Key,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.part.change(self.key, |held| held.asking = false);
        self.part.answered.notify_waiters();
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots")
            .field("active", &self.active.lock().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
