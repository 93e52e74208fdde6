//! What this process remembers of Redis's answers about sessions, and the uses that it has still to write down. Shared by all
//! lanes, in parts behind small locks; bounded, the least used goes first. Asks nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use crate::config::sessions::Shared;
use crate::policy::session::{Session, SessionId};
use crate::store::fleet::Hearing;
use crate::store::redis::CallError;
use crate::store::table::{Key, SHARDS, Shard};

/// What Redis says of a token: its live session, if it has one.
pub(super) type Answer = Result<Option<Arc<Session>>, CallError>;

pub(super) struct Cache {
    parts: Vec<Mutex<Part>>,
    /// Of sessions that end elsewhere. While there is none, and of what was learnt before, all is to be asked anew.
    hearing: Arc<Hearing>,
    /// Sessions with a use that Redis does not know, by when it is to be told.
    unwritten: Mutex<BTreeMap<(Duration, SessionId), Arc<Session>>>,
}

struct Part {
    known: Shard<Option<Known>>,
    /// Until when tokens are believed to have no session. A table of its own: a flood of such tokens pushes out no session.
    unknown: Shard<Duration>,
    flights: HashMap<u128, InFlight>,
}

struct Known {
    session: Arc<Session>,
    asked: Duration,
    era: u64,
    /// The last use that Redis knows of.
    written: Duration,
    /// Whether it is among the unwritten.
    is_unwritten: bool,
}

/// A look-up on its way.
struct InFlight {
    said: watch::Receiver<Option<Answer>>,
    /// Whether the session was said to have ended meanwhile, so that the answer may be older than that.
    ended: bool,
}

/// What is known without asking.
pub(super) enum Recalled {
    Session(Arc<Session>),
    Nobody,
    NotKnown,
}

/// A part in a look-up.
pub(super) enum Flight {
    /// To be asked, and then told by [`Cache::learn`] and the sender.
    Lead {
        said: watch::Sender<Option<Answer>>,
        era: u64,
    },
    /// Somebody has asked.
    Follow(watch::Receiver<Option<Answer>>),
}

impl Cache {
    pub(super) fn new(max_entries: usize, hearing: Arc<Hearing>) -> Cache {
        let capacity = max_entries.div_ceil(SHARDS);
        let part = || Part {
            known: Shard::new(capacity),
            unknown: Shard::new(capacity),
            flights: HashMap::new(),
        };
        Cache {
            parts: (0..SHARDS).map(|_| Mutex::new(part())).collect(),
            hearing,
            unwritten: Mutex::default(),
        }
    }

    /// Changes how much is remembered at most.
    pub(super) fn set_max(&self, max_entries: usize) {
        let capacity = max_entries.div_ceil(SHARDS);
        for part in &self.parts {
            let mut part = part.lock();
            part.known.set_capacity(capacity);
            part.unknown.set_capacity(capacity);
        }
    }

    /// How many sessions are remembered.
    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.lock().known.len()).sum()
    }

    /// What is known of a token by now. A session that is found was used.
    pub(super) fn recall(&self, id: SessionId, shared: &Shared, now: Duration) -> Recalled {
        let mut part = self.part(id);
        if part.known.get(key(id)).is_some() {
            if let Some(known) = part.known.touch(key(id), false)
                && self.hearing.hears_since(known.era)
                && now < known.asked + shared.cache.ttl
                // Another process may have seen a use that this one has not, so Redis is asked.
                && !known.session.is_expired(now)
            {
                return Recalled::Session(self.use_of(known, shared, now));
            }
            return Recalled::NotKnown;
        }
        match part.unknown.get(key(id)) {
            Some(until) if now < *until => Recalled::Nobody,
            Some(_) | None => Recalled::NotKnown,
        }
    }

    /// What was known, if Redis was asked within the grace: for when it does not answer.
    pub(super) fn recall_old(
        &self,
        id: SessionId,
        shared: &Shared,
        now: Duration,
    ) -> Option<Arc<Session>> {
        let mut part = self.part(id);
        let known = part.known.get_mut(key(id))?.as_mut()?;
        let until = known.asked + shared.cache.ttl + shared.grace;
        let holds = now < until && !known.session.is_expired(now);
        holds.then(|| self.use_of(known, shared, now))
    }

    fn use_of(&self, known: &mut Known, shared: &Shared, now: Duration) -> Arc<Session> {
        known.session.touch(now);
        if !known.is_unwritten && known.written < now {
            known.is_unwritten = self.note(&known.session, known.written, shared);
        }
        known.session.clone()
    }

    /// Notes that Redis is to be told of a use; not so where as many are noted as are remembered.
    fn note(&self, session: &Arc<Session>, written: Duration, shared: &Shared) -> bool {
        // Before the session is over by what Redis knows.
        let wait = shared.touch_every.min(session.idle_timeout() / 2);
        let mut unwritten = self.unwritten.lock();
        let has_room = unwritten.len() < shared.cache.max_entries;
        if has_room {
            unwritten.insert((written + wait, session.id), session.clone());
        }
        has_room
    }

    /// Whether uses can wait to be written down.
    pub(super) fn can_note(&self, shared: &Shared) -> bool {
        self.unwritten.lock().len() < shared.cache.max_entries
    }

    /// Takes at most `most` sessions with a use that Redis is to be told of now; [`Cache::wrote`] follows for each.
    pub(super) fn unwritten(&self, now: Duration, most: usize) -> Vec<Arc<Session>> {
        let mut unwritten = self.unwritten.lock();
        let mut due = Vec::new();
        while due.len() < most
            && unwritten.first_key_value().is_some_and(|(k, _)| k.0 <= now)
            && let Some((_, session)) = unwritten.pop_first()
        {
            due.push(session);
        }
        due
    }

    /// The use of `session` at `used` was told; or not, `again` then says when to try once more.
    pub(super) fn wrote(
        &self,
        session: &Arc<Session>,
        used: Duration,
        again: Option<Duration>,
        shared: &Shared,
    ) {
        let mut part = self.part(session.id);
        if let Some(again) = again {
            self.unwritten
                .lock()
                .insert((again, session.id), session.clone());
            return;
        }
        if let Some(Some(known)) = part.known.get_mut(key(session.id)) {
            known.written = known.written.max(used);
            // Used again while it was told.
            let more = known.session.last_seen() > used;
            known.is_unwritten = more && self.note(&known.session, known.written, shared);
        }
    }

    /// Takes part in the look-up of a token.
    pub(super) fn join(&self, id: SessionId) -> Flight {
        let mut part = self.part(id);
        // One whose asker is gone without an answer is not waited for.
        let under_way = |flight: &&InFlight| flight.said.has_changed().is_ok();
        if let Some(flight) = part.flights.get(&key(id).0).filter(under_way) {
            return Flight::Follow(flight.said.clone());
        }
        let (said, follow) = watch::channel(None);
        let flight = InFlight {
            said: follow,
            ended: false,
        };
        part.flights.insert(key(id).0, flight);
        Flight::Lead {
            said,
            era: self.hearing.era(),
        }
    }

    /// The look-up that was asked at `asked` found this session, last seen when Redis knows of its last use, or none. What
    /// holds of it now.
    pub(super) fn learn(
        &self,
        id: SessionId,
        found: Option<Session>,
        asked: Duration,
        era: u64,
        shared: &Shared,
    ) -> Option<Arc<Session>> {
        let mut part = self.part(id);
        let flight = part.flights.remove(&key(id).0);
        let ended = flight.is_some_and(|flight| flight.ended);
        let Some(session) = found.filter(|_| !ended) else {
            self.forget_in(&mut part, id, asked + shared.cache.negative_ttl);
            return None;
        };
        Some(self.keep(&mut part, session, asked, era, shared))
    }

    /// A look-up ended without an answer.
    pub(super) fn gave_up(&self, id: SessionId) {
        self.part(id).flights.remove(&key(id).0);
    }

    /// Of what ends elsewhere, as it is heard now.
    pub(super) fn era(&self) -> u64 {
        self.hearing.era()
    }

    /// Remembers a session that has just been created, as was asked for at `asked`, in that era.
    pub(super) fn created(
        &self,
        session: Session,
        asked: Duration,
        era: u64,
        shared: &Shared,
    ) -> Arc<Session> {
        let mut part = self.part(session.id);
        let ended = part.unknown.get(key(session.id));
        if ended.is_some_and(|until| asked < *until) {
            // Another process has ended it already.
            return Arc::new(session);
        }
        self.keep(&mut part, session, asked, era, shared)
    }

    /// Of the session as Redis has it.
    fn keep(
        &self,
        part: &mut Part,
        session: Session,
        asked: Duration,
        era: u64,
        shared: &Shared,
    ) -> Arc<Session> {
        let written = session.last_seen();
        let entry = part.known.touch(key(session.id), false);
        let known = entry.get_or_insert_with(|| Known {
            session: Arc::new(session),
            asked,
            era,
            written,
            is_unwritten: false,
        });
        // The session itself stays the one that it was: of all that is in it only the last use changes.
        known.session.touch(written);
        (known.asked, known.era) = (asked, era);
        known.written = known.written.max(written);
        self.use_of(known, shared, asked)
    }

    /// The session has ended, or never was: it is believed so until then.
    pub(super) fn forget(&self, id: SessionId, until: Duration) {
        self.forget_in(&mut self.part(id), id, until);
    }

    fn forget_in(&self, part: &mut Part, id: SessionId, until: Duration) {
        part.known.remove(key(id));
        if let Some(flight) = part.flights.get_mut(&key(id).0) {
            flight.ended = true;
        }
        let unknown = part.unknown.touch(key(id), false);
        *unknown = until.max(*unknown);
    }

    fn part(&self, id: SessionId) -> MutexGuard<'_, Part> {
        self.parts[key(id).shard()].lock()
    }
}

/// A hash that nobody can choose, as it is of a token.
fn key(id: SessionId) -> Key {
    Key(u128::from_be_bytes(id.hash))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::sessions;
    use crate::keys::UserTag;
    use crate::policy::session::Times;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const SHARED: Shared = Shared {
        touch_every: s(10),
        cache: sessions::Cache {
            ttl: s(2),
            negative_ttl: s(1),
            max_entries: 1_000,
        },
        grace: s(30),
    };

    fn id(n: u8) -> SessionId {
        SessionId {
            hash: [n; 16],
            user: Some(UserTag::new("ann")),
        }
    }

    /// Begun and last seen at `seen`.
    fn session(n: u8, seen: u64) -> Session {
        let times = Times {
            created: s(seen),
            ends: s(1_000),
            idle_timeout: s(60),
            last_seen: s(seen),
        };
        Session::resumed(id(n), "ann".into(), Default::default(), times)
    }

    /// Of a process that hears.
    fn cache() -> Cache {
        let hearing = Arc::<Hearing>::default();
        hearing.begin();
        Cache::new(1_000, hearing)
    }

    impl Cache {
        /// A look-up at `now` that finds a session last used at `written`, as Redis knows, or none.
        fn look_up(&self, n: u8, written: Option<u64>, now: u64) -> Option<Arc<Session>> {
            let Flight::Lead { era, .. } = self.join(id(n)) else {
                panic!("somebody else asks");
            };
            let found = written.map(|written| session(n, written));
            self.learn(id(n), found, s(now), era, &SHARED)
        }

        fn knows(&self, n: u8, now: u64) -> Option<bool> {
            match self.recall(id(n), &SHARED, s(now)) {
                Recalled::Session(_) => Some(true),
                Recalled::Nobody => Some(false),
                Recalled::NotKnown => None,
            }
        }

        fn due(&self, now: u64) -> usize {
            self.unwritten(s(now), 10).len()
        }
    }

    #[test]
    fn answers_are_believed_for_their_time() {
        let cache = cache();
        assert_eq!(cache.knows(1, 0), None);
        cache.look_up(1, Some(100), 100);
        cache.look_up(2, None, 100);
        assert_eq!(
            (cache.knows(1, 101), cache.knows(2, 100)),
            (Some(true), Some(false))
        );
        assert_eq!((cache.knows(1, 102), cache.knows(2, 101)), (None, None));
    }

    #[test]
    fn nothing_is_taken_for_known_while_it_is_not_heard_what_ends() {
        let cache = cache();
        cache.look_up(1, Some(100), 100);
        cache.hearing.end();
        assert_eq!(cache.knows(1, 100), None);
        cache.look_up(2, Some(100), 100);
        assert_eq!(cache.knows(2, 100), None);
        assert!(cache.recall_old(id(2), &SHARED, s(131)).is_some());
        cache.hearing.begin();
        assert_eq!((cache.knows(1, 100), cache.knows(2, 100)), (None, None));
        cache.look_up(2, Some(100), 100);
        assert_eq!(cache.knows(2, 100), Some(true));
    }

    #[test]
    fn what_was_known_holds_for_the_grace() {
        let cache = cache();
        cache.look_up(1, Some(100), 100);
        cache.hearing.begin();
        assert_eq!(cache.knows(1, 100), None);
        assert!(cache.recall_old(id(1), &SHARED, s(131)).is_some());
        assert!(cache.recall_old(id(1), &SHARED, s(132)).is_none());
        assert!(cache.recall_old(id(2), &SHARED, s(100)).is_none());
    }

    #[test]
    fn an_answer_from_before_the_end_of_a_session_is_not_believed() {
        let cache = cache();
        let Flight::Lead { era, .. } = cache.join(id(1)) else {
            panic!("nobody else asks");
        };
        assert!(
            matches!(cache.join(id(1)), Flight::Lead { .. }),
            "the first is gone"
        );
        cache.forget(id(1), s(101));
        let found = Some(session(1, 100));
        assert!(cache.learn(id(1), found, s(100), era, &SHARED).is_none());
        assert_eq!(cache.knows(1, 100), Some(false));
        cache.created(session(1, 100), s(100), era, &SHARED);
        assert_eq!(cache.knows(1, 100), Some(false));
    }

    #[test]
    fn a_session_that_began_while_it_was_not_heard_what_ends_is_asked_about() {
        let cache = cache();
        let era = cache.era();
        cache.created(session(1, 100), s(100), era, &SHARED);
        assert_eq!(cache.knows(1, 100), Some(true));
        // Before Redis's answer was here, it could have ended again.
        cache.hearing.end();
        cache.hearing.begin();
        cache.created(session(2, 100), s(100), era, &SHARED);
        assert_eq!(cache.knows(2, 100), None);
    }

    #[test]
    fn a_use_that_redis_does_not_know_is_told_in_time() {
        let cache = cache();
        let held = cache.look_up(1, Some(100), 100).unwrap();
        assert_eq!(cache.due(1_000), 0, "it knows of this one");
        assert_eq!(cache.knows(1, 101), Some(true));
        assert_eq!((cache.due(109), cache.due(110)), (0, 1));
        // Used again while it is told.
        assert_eq!(cache.knows(1, 101), Some(true));
        held.touch(s(102));
        cache.wrote(&held, s(101), None, &SHARED);
        assert_eq!((cache.due(110), cache.due(111)), (0, 1));
        cache.wrote(&held, s(102), Some(s(120)), &SHARED);
        assert_eq!((cache.due(119), cache.due(120)), (0, 1));
        cache.wrote(&held, s(102), None, &SHARED);
        assert_eq!(cache.due(1_000), 0);
    }

    #[test]
    fn no_more_is_remembered_than_is_allowed() {
        let cache = Cache::new(1, Arc::default());
        for n in 0..=255 {
            cache.look_up(n, Some(100), 100);
        }
        assert!(cache.len() <= SHARDS);
        cache.set_max(10_000);
        for n in 0..=255 {
            cache.look_up(n, Some(100), 100);
        }
        assert_eq!(cache.len(), 256);
        cache.set_max(64);
        assert_eq!(cache.len(), SHARDS);
    }

    #[test]
    fn of_tokens_without_a_session_no_more_are_remembered_either() {
        let cache = cache();
        let believed = |cache: &Cache| {
            (0..=255)
                .filter(|n| cache.knows(*n, 100) == Some(false))
                .count()
        };
        for n in 0..=255 {
            cache.look_up(n, None, 100);
        }
        assert_eq!(believed(&cache), 256);
        cache.set_max(64);
        assert_eq!(believed(&cache), SHARDS);
    }

    /// Of which nothing is used since it began.
    fn idle_for(n: u8, idle_timeout: u64) -> Session {
        let times = Times {
            created: s(100),
            ends: s(1_000),
            idle_timeout: s(idle_timeout),
            last_seen: s(100),
        };
        Session::resumed(id(n), "ann".into(), Default::default(), times)
    }

    #[test]
    fn a_use_is_told_before_the_session_would_be_over_without() {
        let cache = cache();
        cache.created(idle_for(1, 6), s(100), cache.era(), &SHARED);
        assert_eq!(cache.knows(1, 101), Some(true));
        assert_eq!((cache.due(102), cache.due(103)), (0, 1));
    }

    #[test]
    fn no_more_uses_wait_to_be_told_than_sessions_are_remembered() {
        const FEW: Shared = Shared {
            cache: sessions::Cache {
                max_entries: 2,
                ..SHARED.cache
            },
            ..SHARED
        };
        let cache = cache();
        let waits = [1, 2, 3].map(|n| {
            cache.look_up(n, Some(100), 100);
            let can_wait = cache.can_note(&FEW);
            cache.recall(id(n), &FEW, s(101));
            can_wait
        });
        assert_eq!((waits, cache.due(1_000)), ([true, true, false], 2));
    }

    /// Another process may have seen a use of it.
    #[test]
    fn a_session_that_is_over_by_what_is_known_is_asked_about_and_has_no_grace() {
        let cache = cache();
        cache.created(idle_for(1, 1), s(100), cache.era(), &SHARED);
        assert_eq!(
            (cache.knows(1, 100), cache.knows(1, 101)),
            (Some(true), None)
        );
        assert!(cache.recall_old(id(1), &SHARED, s(101)).is_none());
    }

    #[test]
    fn what_has_ended_stays_so_for_the_longest_time_that_was_said() {
        let cache = cache();
        cache.forget(id(1), s(110));
        cache.forget(id(1), s(101));
        assert_eq!(
            (cache.knows(1, 109), cache.knows(1, 110)),
            (Some(false), None)
        );
    }
}
