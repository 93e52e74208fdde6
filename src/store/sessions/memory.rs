//! The sessions of one entry of `sessions:`, in memory, shared by all lanes.
//!
//! Owns tokens, the maximum of a user, eviction and sweeping. What a session means is `policy::session`'s. Must not
//! read a clock.
//!
//! Why locks, where the rest of weir keeps state by lane: a session that one lane revokes must be gone in all of them at
//! once, and a maximum holds only if it is counted in one place. A lock is held for a few map operations, never over an
//! `await`, and there are enough of them that lanes seldom meet.
//!
//! Order: a user's lock before a shard's, and never two of a kind. Whoever adds or takes away a session of a user holds that
//! user's lock, so the index of a user and the sessions agree whenever it is free.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::{Mutex, MutexGuard};
use sha2::{Digest as _, Sha256};

use super::{CreateError, Created, Token};
use crate::config::sessions::{Claims, OnMax, Settings};
use crate::policy::session::{Session, SessionId, Timeouts};

/// Shards are chosen by the first byte of an id, so that a walk over the shards in order meets the ids in order.
const SHARDS: usize = 64;
/// 32 bytes as base64url without padding (RFC 4648 section 5).
const TOKEN_CHARS: usize = 43;
/// How many sessions a create looks at for a free place when the store is full.
const FULL_SWEEP: usize = 256;
/// How many are looked at, or ended, before others have their turn at a lock.
const PART: usize = 256;

/// Sessions in memory.
pub struct Sessions {
    shards: Vec<Mutex<Shard>>,
    users: Vec<Mutex<Users>>,
    /// Keyed at random, so that nobody can choose users who share a lock.
    hasher: RandomState,
    /// How many sessions are held or about to be; reserved before one is added, so that it is never above `max_sessions`.
    held: AtomicUsize,
    max_sessions: AtomicUsize,
    /// At most, of those that are held.
    timeouts: Mutex<Timeouts>,
    /// How often those of sessions that were held have been shortened.
    shortened: AtomicU64,
    /// The order of creation, which `now` cannot tell: two lanes may read the same.
    next_sequence: AtomicU64,
    swept: Mutex<Swept>,
}

type Shard = BTreeMap<SessionId, Entry>;
type Users = HashMap<String, OfUser>;

/// The sessions of one user.
#[derive(Default)]
struct OfUser {
    /// Oldest first.
    held: BTreeMap<u64, Held>,
    /// By when each is to be looked at, which is no later than it is over: a use puts that off, and this at the next look alone. So those that
    /// are over are found without a look at all others.
    due: BTreeSet<(Duration, u64)>,
    /// [`Sessions::shortened`], when that held of all.
    shortened: u64,
}

struct Held {
    id: SessionId,
    due: Duration,
}

/// Where the next sweep goes on: in this shard, after this session.
#[derive(Clone, Copy, Default)]
struct Swept {
    shard: usize,
    after: Option<SessionId>,
}

struct Entry {
    digest: [u8; 32],
    sequence: u64,
    session: Arc<Session>,
}

/// A part of a list, ordered by id.
#[derive(Debug)]
pub struct Page {
    pub sessions: Vec<Arc<Session>>,
    /// Where the next page begins; `None`: this was the last.
    pub next: Option<SessionId>,
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sessions({})", self.count())
    }
}

impl Sessions {
    /// An empty store that never holds more than `max_sessions`, expired ones that are not yet swept among them.
    pub fn new(max_sessions: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            users: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            held: AtomicUsize::new(0),
            max_sessions: AtomicUsize::new(max_sessions),
            timeouts: Mutex::new(Timeouts::UNBOUNDED),
            shortened: AtomicU64::new(0),
            next_sequence: AtomicU64::new(0),
            swept: Mutex::default(),
        }
    }

    /// Changes how many are held at most; sessions above it live on.
    pub fn set_max(&self, max_sessions: usize) {
        self.max_sessions.store(max_sessions, Ordering::Relaxed);
    }

    /// Sessions have no longer timeouts than these from now on.
    pub fn shorten(&self, timeouts: Timeouts) {
        if std::mem::replace(&mut *self.timeouts.lock(), timeouts) == timeouts {
            return;
        }
        for shard in &self.shards {
            let mut after = None;
            loop {
                let (shard, mut looked_at) = (shard.lock(), 0);
                for (id, entry) in shard.range(after_or_all(after)).take(PART) {
                    entry.session.shorten(timeouts);
                    (after, looked_at) = (Some(*id), looked_at + 1);
                }
                // To a lane that waits, which would miss its turn otherwise.
                MutexGuard::unlock_fair(shard);
                if looked_at < PART {
                    break;
                }
            }
        }
        // Behind all of it: who sees this looks at sessions that are as short as they become.
        self.shortened.fetch_add(1, Ordering::Release);
    }

    /// Starts a session. The user's maximum is kept whatever other lanes do at the same time: expired sessions do not count
    /// for it, and one that was lowered since evicts down to itself.
    pub fn create(
        &self,
        settings: &Settings,
        user: String,
        claims: Claims,
        now: Duration,
    ) -> Result<Created, CreateError> {
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(CreateError::Random)?;
        let token = Token::new(URL_SAFE_NO_PAD.encode(random));
        let digest = digest(token.as_str());
        let id = id_of(&digest);
        if self.count() >= self.max_sessions.load(Ordering::Relaxed) {
            self.sweep(now, FULL_SWEEP);
        }

        let mut users = self.lock_user(&user);
        let evicted = match settings.max_per_user {
            Some(max) => self.make_room(&mut users, &user, max.get(), settings.on_max, now)?,
            None => Vec::new(),
        };
        if evicted.is_empty() {
            self.reserve()?;
        } else {
            // The new one takes the place of one that went: were it given back first, another user could take it.
            self.release(evicted.len() - 1);
        }
        let sequence = self.next_sequence.fetch_add(1, Ordering::Relaxed);
        let session = Arc::new(Session::new(id, user.clone(), claims, settings, now));
        let entry = Entry {
            digest,
            sequence,
            session: Arc::clone(&session),
        };
        // Two tokens with one id would need 2^64 sessions to be likely (the birthday bound of 128 bits).
        self.lock_shard(id).insert(id, entry);
        let shortened = self.shortened.load(Ordering::Acquire);
        // A lane may still go by the plan before, whose timeouts may be longer. Behind the insertion, which a walk may have missed.
        session.shorten(*self.timeouts.lock());
        let first = || OfUser {
            shortened,
            ..OfUser::default()
        };
        let of_user = users.entry(user).or_insert_with(first);
        of_user.add(sequence, id, session.over_at());
        Ok(Created {
            token,
            session,
            evicted,
        })
    }

    /// The live session of a token, which counts as a use of it: the idle timeout starts anew.
    ///
    /// The comparison need not take constant time. What is looked up is the token's SHA-256, so how long it takes tells at
    /// most how much of a hash is right; to use that, one would have to make tokens with a chosen hash, and 256 random
    /// bits leave nothing to search (OWASP Session Management, "Session ID Entropy", asks for 64).
    pub fn find(&self, token: &str, now: Duration) -> Option<Arc<Session>> {
        let digest = token_digest(token)?;
        let shard = self.lock_shard(id_of(&digest));
        let entry = shard.get(&id_of(&digest))?;
        if entry.digest != digest || entry.session.is_expired(now) {
            return None;
        }
        // Under the lock, so that a sweep either sees the use or has already taken the session.
        entry.session.touch(now);
        Some(Arc::clone(&entry.session))
    }

    /// Ends the session of a token; what it was, if there was one.
    pub fn end(&self, token: &str) -> Option<Arc<Session>> {
        let digest = token_digest(token)?;
        let id = id_of(&digest);
        let session = {
            let shard = self.lock_shard(id);
            let entry = shard.get(&id)?;
            (entry.digest == digest).then(|| Arc::clone(&entry.session))?
        };
        self.remove_if(&session, |_| true).then_some(session)
    }

    /// Ends a session by its id; what it was, if there was one.
    pub fn revoke(&self, id: SessionId) -> Option<Arc<Session>> {
        let session = self.get(id)?;
        self.remove_if(&session, |_| true).then_some(session)
    }

    /// Ends all sessions of a user; which they were. One that is created at the same time is wholly before or after.
    pub fn revoke_user(&self, user: &str) -> Vec<SessionId> {
        let end = self.next_sequence.load(Ordering::Relaxed);
        let mut ended = Vec::new();
        loop {
            let mut users = self.lock_user(user);
            let before = ended.len();
            if let Some(sessions) = users.get_mut(user) {
                while ended.len() < before + PART
                    && let Some(oldest) = sessions.oldest()
                    && oldest < end
                    && let Some(id) = sessions.remove(oldest)
                {
                    self.lock_shard(id).remove(&id);
                    ended.push(id);
                }
                if sessions.held.is_empty() {
                    users.remove(user);
                }
            }
            // As in a sweep.
            MutexGuard::unlock_fair(users);
            let taken = ended.len() - before;
            self.release(taken);
            if taken < PART {
                return ended;
            }
        }
    }

    /// At most `limit` live sessions after the cursor `after`, of one user or of all, ordered by id. A session that lives
    /// while all pages are read is in one of them, whatever comes and goes meanwhile. Does not count as a use.
    pub fn list(
        &self,
        user: Option<&str>,
        limit: usize,
        after: Option<SessionId>,
        now: Duration,
    ) -> Page {
        // One more than asked tells whether there is a next page.
        let wanted = limit.saturating_add(1);
        let mut sessions = match user {
            Some(user) => self.of_user(user, wanted, after, now),
            None => self.of_all(wanted, after, now),
        };
        let more = sessions.len() > limit;
        sessions.truncate(limit);
        let next = match sessions.last() {
            Some(last) if more => Some(last.id),
            // A page of none gets nowhere: its next one begins where it did.
            None if more => after,
            Some(_) | None => None,
        };
        Page { sessions, next }
    }

    /// A live session by its id. Does not count as a use.
    pub fn show(&self, id: SessionId, now: Duration) -> Option<Arc<Session>> {
        self.get(id).filter(|session| !session.is_expired(now))
    }

    /// How many sessions are held, expired ones that are not yet swept among them.
    pub fn count(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Looks at up to `budget` sessions, going on where the last sweep stopped, and lets go of the expired ones; how many.
    pub fn sweep(&self, now: Duration, budget: usize) -> usize {
        let mut left = budget;
        let mut removed = 0;
        // Two sweeps at once look at the same ones, which is a waste and no harm.
        let mut at = *self.swept.lock();
        // The shard that it starts in is met again at the end, for what is before the start.
        let mut shards = SHARDS + 1;
        while left > 0 && shards > 0 {
            let part = left.min(PART);
            let before = left;
            let mut expired = Vec::new();
            let shard = self.shards[at.shard].lock();
            for (id, entry) in shard.range(after_or_all(at.after)).take(part) {
                left -= 1;
                at.after = Some(*id);
                if entry.session.is_expired(now) {
                    expired.push(Arc::clone(&entry.session));
                }
            }
            // To a lane that waits, which would miss its turn otherwise.
            MutexGuard::unlock_fair(shard);
            // Out of the shard's lock, because a user's comes first; asked again, because it may have been used meanwhile.
            for session in expired {
                removed += usize::from(self.remove_if(&session, |session| session.is_expired(now)));
            }
            if before - left < part {
                at = Swept {
                    shard: (at.shard + 1) % SHARDS,
                    after: None,
                };
                shards -= 1;
            }
        }
        *self.swept.lock() = at;
        removed
    }

    /// Makes a user have less than `max` live sessions. The places of those that are returned stay reserved.
    fn make_room(
        &self,
        users: &mut Users,
        user: &str,
        max: u32,
        on_max: OnMax,
        now: Duration,
    ) -> Result<Vec<SessionId>, CreateError> {
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        let Some(sessions) = users.get_mut(user) else {
            return Ok(Vec::new());
        };
        if sessions.held.len() < max {
            return Ok(Vec::new());
        }
        sessions.note_shortened(self.shortened.load(Ordering::Acquire));
        let before = sessions.held.len();
        while sessions.held.len() >= max
            && let Some((sequence, id)) = sessions.first_due(now)
        {
            let mut shard = self.lock_shard(id);
            match shard.get(&id).map(|entry| entry.session.over_at()) {
                Some(over_at) if over_at > now => sessions.put_off(sequence, over_at),
                Some(_) | None => {
                    shard.remove(&id);
                    sessions.remove(sequence);
                }
            }
        }
        self.release(before - sessions.held.len());
        let mut evicted = Vec::new();
        match on_max {
            OnMax::RejectNew if sessions.held.len() >= max => return Err(CreateError::MaxReached),
            OnMax::RejectNew => {}
            OnMax::EvictOldest => {
                while sessions.held.len() >= max
                    && let Some(id) = sessions.oldest().and_then(|it| sessions.remove(it))
                {
                    self.lock_shard(id).remove(&id);
                    evicted.push(id);
                }
            }
        }
        // A user without sessions is not remembered, whether or not the create goes on to succeed.
        if sessions.held.is_empty() {
            users.remove(user);
        }
        Ok(evicted)
    }

    /// Lets go of a session, if it is still there and `condition` still holds.
    fn remove_if(&self, session: &Session, condition: impl Fn(&Session) -> bool) -> bool {
        let mut users = self.lock_user(&session.user);
        let sequence = {
            let mut shard = self.lock_shard(session.id);
            let Some(entry) = shard.get(&session.id) else {
                return false;
            };
            if !condition(&entry.session) {
                return false;
            }
            let sequence = entry.sequence;
            shard.remove(&session.id);
            sequence
        };
        if let Some(sessions) = users.get_mut(&session.user) {
            sessions.remove(sequence);
            if sessions.held.is_empty() {
                users.remove(&session.user);
            }
        }
        self.release(1);
        true
    }

    fn of_user(
        &self,
        user: &str,
        wanted: usize,
        after: Option<SessionId>,
        now: Duration,
    ) -> Vec<Arc<Session>> {
        let users = self.lock_user(user);
        let held = users.get(user).into_iter().flat_map(|it| it.held.values());
        let ids = held.map(|held| held.id);
        let mut ids: Vec<_> = ids.filter(|id| Some(*id) > after).collect();
        drop(users);
        ids.sort_unstable();
        let live = ids.into_iter().filter_map(|id| self.show(id, now));
        live.take(wanted).collect()
    }

    fn of_all(&self, wanted: usize, after: Option<SessionId>, now: Duration) -> Vec<Arc<Session>> {
        let mut found = Vec::new();
        for shard in &self.shards[after.map_or(0, shard_of)..] {
            let shard = shard.lock();
            let live = shard
                .range(after_or_all(after))
                .map(|(_, entry)| &entry.session)
                .filter(|session| !session.is_expired(now));
            found.extend(live.take(wanted - found.len()).cloned());
            if found.len() == wanted {
                break;
            }
        }
        found
    }

    fn get(&self, id: SessionId) -> Option<Arc<Session>> {
        let shard = self.lock_shard(id);
        shard.get(&id).map(|entry| Arc::clone(&entry.session))
    }

    fn reserve(&self) -> Result<(), CreateError> {
        let max = self.max_sessions.load(Ordering::Relaxed);
        let one_more = |held| (held < max).then_some(held + 1);
        // Relaxed: the number is all there is; the sessions are published by their locks.
        let reserved = self
            .held
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        reserved.map(drop).map_err(|_| CreateError::Full)
    }

    fn release(&self, places: usize) {
        self.held.fetch_sub(places, Ordering::Relaxed);
    }

    fn lock_shard(&self, id: SessionId) -> MutexGuard<'_, Shard> {
        self.shards[shard_of(id)].lock()
    }

    fn lock_user(&self, user: &str) -> MutexGuard<'_, Users> {
        let hash = self.hasher.hash_one(user);
        let bits = SHARDS.trailing_zeros();
        self.users[usize::try_from(hash >> (u64::BITS - bits)).unwrap_or(0)].lock()
    }
}

impl OfUser {
    fn add(&mut self, sequence: u64, id: SessionId, due: Duration) {
        self.held.insert(sequence, Held { id, due });
        self.due.insert((due, sequence));
    }

    fn remove(&mut self, sequence: u64) -> Option<SessionId> {
        let held = self.held.remove(&sequence)?;
        self.due.remove(&(held.due, sequence));
        Some(held.id)
    }

    fn oldest(&self) -> Option<u64> {
        self.held.keys().next().copied()
    }

    /// One that may be over.
    fn first_due(&self, now: Duration) -> Option<(u64, SessionId)> {
        let (_, sequence) = self.due.first().filter(|(due, _)| *due <= now)?;
        let held = self.held.get(sequence)?;
        Some((*sequence, held.id))
    }

    fn put_off(&mut self, sequence: u64, due: Duration) {
        if let Some(held) = self.held.get_mut(&sequence) {
            self.due.remove(&(held.due, sequence));
            self.due.insert((due, sequence));
            held.due = due;
        }
    }

    /// Any may be over sooner than was known, where sessions have been shortened so often.
    fn note_shortened(&mut self, times: u64) {
        if std::mem::replace(&mut self.shortened, times) == times {
            return;
        }
        let held = self.held.iter_mut();
        self.due = held
            .map(|(sequence, held)| {
                held.due = Duration::ZERO;
                (held.due, *sequence)
            })
            .collect();
    }
}

/// The session that a token is of, if it is a token at all.
pub(super) fn id_of_token(token: &str) -> Option<SessionId> {
    token_digest(token).map(|digest| id_of(&digest))
}

/// The hash of what can be a token: anything else is not worth hashing.
fn token_digest(token: &str) -> Option<[u8; 32]> {
    (token.len() == TOKEN_CHARS).then(|| digest(token))
}

/// Of the characters, not of the bytes that they stand for: base64 can be written in several ways, a token in one.
fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

fn id_of(digest: &[u8; 32]) -> SessionId {
    let mut hash = [0; 16];
    hash.copy_from_slice(&digest[..16]);
    SessionId { hash, user: None }
}

fn shard_of(id: SessionId) -> usize {
    usize::from(id.hash[0]) * SHARDS / 256
}

fn after_or_all(after: Option<SessionId>) -> (Bound<SessionId>, Bound<SessionId>) {
    let start = after.map_or(Bound::Unbounded, Bound::Excluded);
    (start, Bound::Unbounded)
}

#[cfg(test)]
mod tests;
