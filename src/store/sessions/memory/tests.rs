//! The rules of `sessions`, as tests.

use std::num::NonZeroU32;
use std::sync::atomic::AtomicBool;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::config::sessions::{CookieAttributes, Forward, SameSite, TokenSource};

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn settings(max_per_user: u32, on_max: OnMax) -> Settings {
    Settings {
        sources: vec![TokenSource::Bearer],
        idle_timeout: s(10),
        absolute_timeout: s(25),
        max_per_user: NonZeroU32::new(max_per_user),
        on_max,
        forward: Forward::default(),
        cookie: CookieAttributes {
            secure: true,
            http_only: true,
            same_site: SameSite::Lax,
            path: "/".into(),
        },
    }
}

fn unlimited() -> Settings {
    settings(0, OnMax::EvictOldest)
}

impl Sessions {
    fn start(&self, settings: &Settings, user: &str, now: u64) -> Result<Created, CreateError> {
        self.create(settings, user.into(), Claims::new(), s(now))
    }

    fn live(&self, user: &str, now: u64) -> usize {
        self.list(Some(user), usize::MAX, None, s(now))
            .sessions
            .len()
    }

    fn has(&self, created: &Created, now: u64) -> bool {
        self.show(created.session.id, s(now)).is_some()
    }

    /// The indexes agree with each other and with the count.
    #[track_caller]
    fn check_consistent(&self) {
        let mut indexed = 0;
        for users in &self.users {
            for (user, sessions) in users.lock().iter() {
                let OfUser { held, due, .. } = sessions;
                assert!(!held.is_empty(), "{user} is remembered for nothing");
                indexed += held.len();
                for (sequence, Held { id, .. }) in held {
                    let shard = self.lock_shard(*id);
                    assert_eq!(shard[id].sequence, *sequence);
                    assert_eq!(shard[id].session.user, *user);
                }
                let by_age = held.iter().map(|(sequence, held)| (held.due, *sequence));
                assert_eq!(by_age.collect::<BTreeSet<_>>(), *due, "{user}");
            }
        }
        let held: usize = self.shards.iter().map(|shard| shard.lock().len()).sum();
        assert_eq!((indexed, held), (self.count(), self.count()));
    }
}

#[test]
fn token_is_random_and_only_its_hash_is_kept() {
    let sessions = Sessions::new(10);
    let one = sessions.start(&unlimited(), "ann", 0).unwrap();
    let two = sessions.start(&unlimited(), "ann", 0).unwrap();
    assert_ne!(one.token.as_str(), two.token.as_str());
    let bytes = URL_SAFE_NO_PAD.decode(one.token.as_str()).unwrap();
    assert_eq!((bytes.len(), one.token.as_str().len()), (32, TOKEN_CHARS));
    let hash = Sha256::digest(one.token.as_str());
    assert_eq!(one.session.id.hash, hash[..16]);
    assert!(!format!("{one:?}").contains(one.token.as_str()));
}

#[test]
fn only_the_exact_token_finds_a_session() {
    let sessions = Sessions::new(10);
    let created = sessions.start(&unlimited(), "ann", 0).unwrap();
    let token = created.token.as_str();
    assert!(Arc::ptr_eq(
        &sessions.find(token, s(1)).unwrap(),
        &created.session
    ));
    let mut last = token.bytes().last().unwrap();
    last = if last == b'A' { b'B' } else { b'A' };
    let near = format!("{}{}", &token[..42], char::from(last));
    let id = created.session.id.to_string();
    for wrong in ["", &near, &token[..42], &format!("{token}="), &id] {
        assert!(sessions.find(wrong, s(1)).is_none(), "{wrong}");
        assert!(sessions.end(wrong).is_none(), "{wrong}");
    }
}

#[test]
fn use_puts_off_the_idle_timeout_and_not_the_absolute_one() {
    let sessions = Sessions::new(10);
    let created = sessions.start(&unlimited(), "ann", 0).unwrap();
    for now in [9, 18, 24] {
        assert!(sessions.find(created.token.as_str(), s(now)).is_some());
    }
    assert!(sessions.find(created.token.as_str(), s(25)).is_none());
    let idle = sessions.start(&unlimited(), "ann", 0).unwrap();
    assert!(sessions.find(idle.token.as_str(), s(10)).is_none());
}

#[test]
fn looking_at_a_session_is_not_a_use() {
    let sessions = Sessions::new(10);
    let created = sessions.start(&unlimited(), "ann", 0).unwrap();
    assert!(sessions.has(&created, 9));
    assert_eq!(sessions.live("ann", 9), 1);
    assert!(!sessions.has(&created, 10));
    assert_eq!(sessions.live("ann", 10), 0);
}

#[test]
fn ended_or_revoked_session_is_gone() {
    let sessions = Sessions::new(10);
    let ended = sessions.start(&unlimited(), "ann", 0).unwrap();
    let revoked = sessions.start(&unlimited(), "ann", 0).unwrap();
    assert!(sessions.end(ended.token.as_str()).is_some());
    assert!(sessions.end(ended.token.as_str()).is_none());
    assert!(sessions.revoke(revoked.session.id).is_some());
    assert!(sessions.revoke(revoked.session.id).is_none());
    assert!(sessions.find(ended.token.as_str(), s(0)).is_none());
    assert!(sessions.find(revoked.token.as_str(), s(0)).is_none());
    assert_eq!(sessions.count(), 0);
    sessions.check_consistent();
}

#[test]
fn revoking_a_user_leaves_the_others() {
    let sessions = Sessions::new(10);
    let bob = sessions.start(&unlimited(), "bob", 0).unwrap();
    for _ in 0..3 {
        sessions.start(&unlimited(), "ann", 0).unwrap();
    }
    assert_eq!(sessions.revoke_user("ann").len(), 3);
    assert_eq!(sessions.revoke_user("ann").len(), 0);
    assert!(sessions.has(&bob, 0));
    sessions.check_consistent();
}

#[test]
fn oldest_is_evicted_at_the_maximum() {
    let sessions = Sessions::new(10);
    let settings = settings(2, OnMax::EvictOldest);
    let first = sessions.start(&settings, "ann", 0).unwrap();
    let second = sessions.start(&settings, "ann", 0).unwrap();
    // Used last, and the oldest all the same.
    sessions.find(first.token.as_str(), s(5)).unwrap();
    let third = sessions.start(&settings, "ann", 6).unwrap();
    assert_eq!(third.evicted, [first.session.id]);
    assert!(!sessions.has(&first, 6) && sessions.has(&second, 6));
    assert!(
        sessions
            .start(&settings, "bob", 6)
            .unwrap()
            .evicted
            .is_empty()
    );
    sessions.check_consistent();
}

#[test]
fn new_one_is_refused_at_the_maximum() {
    let sessions = Sessions::new(10);
    let settings = settings(1, OnMax::RejectNew);
    let first = sessions.start(&settings, "ann", 0).unwrap();
    let refused = sessions.start(&settings, "ann", 9);
    assert_eq!(refused.unwrap_err(), CreateError::MaxReached);
    assert!(sessions.has(&first, 9));
    assert!(sessions.start(&settings, "bob", 9).is_ok());
    sessions.check_consistent();
}

#[test]
fn expired_session_does_not_count_for_the_maximum() {
    for on_max in [OnMax::EvictOldest, OnMax::RejectNew] {
        let sessions = Sessions::new(10);
        let settings = settings(1, on_max);
        sessions.start(&settings, "ann", 0).unwrap();
        let next = sessions.start(&settings, "ann", 10).unwrap();
        assert!(next.evicted.is_empty());
        assert_eq!(sessions.count(), 1);
        sessions.check_consistent();
    }
}

/// A user may have very many, and a lane must not look at all of them for a log-in.
#[test]
fn a_log_in_at_the_maximum_looks_at_none_that_is_not_due() {
    const COUNT: u32 = 300;
    let sessions = Sessions::new(usize::MAX);
    let settings = settings(COUNT, OnMax::EvictOldest);
    let first = sessions.start(&settings, "ann", 0).unwrap();
    for _ in 1..COUNT {
        sessions.start(&settings, "ann", 0).unwrap();
    }
    let of_first = shard_of(first.session.id);
    let others = (0..SHARDS).filter(|shard| *shard != of_first);
    let others: Vec<_> = others.map(|shard| sessions.shards[shard].lock()).collect();
    thread::scope(|scope| {
        let created = scope.spawn(|| sessions.start(&settings, "ann", 1).unwrap());
        // It goes for the first, whatever is done with the others.
        let began = crate::clock::now();
        let is_gone = || {
            !sessions.shards[of_first]
                .lock()
                .contains_key(&first.session.id)
        };
        let mut gone = false;
        while !gone && began.elapsed() < s(10) {
            gone = is_gone();
            thread::yield_now();
        }
        drop(others);
        assert_eq!(created.join().unwrap().evicted, [first.session.id]);
        assert!(gone, "it waits for a session that it has no use for");
    });
    sessions.check_consistent();
}

/// However long before they were to be looked at.
#[test]
fn what_is_used_lives_and_what_is_shortened_is_over_at_the_maximum() {
    let sessions = Sessions::new(10);
    let settings = settings(3, OnMax::RejectNew);
    let [used, _, other] = [0, 0, 5].map(|now| sessions.start(&settings, "ann", now).unwrap());
    sessions.find(used.token.as_str(), s(9)).unwrap();
    assert!(sessions.start(&settings, "ann", 9).is_err());
    let next = sessions.start(&settings, "ann", 10).unwrap();
    assert!(sessions.has(&used, 10) && sessions.has(&other, 10) && sessions.has(&next, 10));
    assert!(sessions.start(&settings, "ann", 11).is_err());
    sessions.shorten(Timeouts {
        absolute: s(25),
        idle: s(3),
    });
    // As a lane has it that goes by the plan before.
    let last = sessions.start(&settings, "ann", 12).unwrap();
    assert!(!sessions.has(&used, 12) && !sessions.has(&other, 12) && sessions.has(&next, 12));
    assert_eq!(last.session.over_at(), s(15));
    for _ in 0..2 {
        sessions.start(&settings, "ann", 13).unwrap();
    }
    assert!(!sessions.has(&next, 13) && sessions.has(&last, 13));
    sessions.start(&settings, "ann", 13).unwrap_err();
    sessions.check_consistent();
}

#[test]
fn lowered_maximum_evicts_down_to_itself() {
    let sessions = Sessions::new(10);
    for _ in 0..5 {
        sessions.start(&unlimited(), "ann", 0).unwrap();
    }
    let settings = settings(2, OnMax::EvictOldest);
    let created = sessions.start(&settings, "ann", 0).unwrap();
    assert_eq!((created.evicted.len(), sessions.live("ann", 0)), (4, 2));
    sessions.check_consistent();
}

#[test]
fn full_store_refuses_and_evicts_nobody_for_it() {
    let sessions = Sessions::new(2);
    let settings = settings(2, OnMax::EvictOldest);
    let first = sessions.start(&settings, "ann", 0).unwrap();
    let second = sessions.start(&settings, "ann", 0).unwrap();
    let refused = sessions.start(&settings, "bob", 0);
    assert_eq!(refused.unwrap_err(), CreateError::Full);
    assert!(sessions.has(&first, 0) && sessions.has(&second, 0));
    // A user at the maximum takes the place of one's own.
    let third = sessions.start(&settings, "ann", 0).unwrap();
    assert_eq!(third.evicted, [first.session.id]);
    assert_eq!(sessions.count(), 2);
    sessions.check_consistent();
}

#[test]
fn full_store_makes_room_from_what_is_expired() {
    let sessions = Sessions::new(2);
    sessions.start(&unlimited(), "ann", 0).unwrap();
    sessions.start(&unlimited(), "bob", 0).unwrap();
    assert!(sessions.start(&unlimited(), "eve", 10).is_ok());
    assert_eq!(sessions.count(), 1);
    sessions.check_consistent();
}

#[test]
fn a_bound_that_is_changed_is_the_one_that_holds() {
    let store = Sessions::new(1);
    let start = || store.start(&unlimited(), "ann", 100).map(drop);
    assert_eq!((start(), start()), (Ok(()), Err(CreateError::Full)));
    store.set_max(2);
    assert_eq!((start(), start()), (Ok(()), Err(CreateError::Full)));
    store.set_max(1);
    assert_eq!((start(), store.count()), (Err(CreateError::Full), 2));
}

#[test]
fn shorter_timeouts_are_those_of_all_that_live_and_of_all_that_begin() {
    // More in a shard than are looked at before others have their turn.
    const MANY: usize = SHARDS * PART * 5 / 4;
    let store = Sessions::new(2 * MANY);
    let start = |user: usize, now| {
        let created = store.start(&unlimited(), &user.to_string(), now);
        created.unwrap().session
    };
    let before: Vec<_> = (0..MANY).map(|n| start(n % 100, 100)).collect();
    let timeouts = Timeouts {
        absolute: s(5),
        idle: s(2),
    };
    store.shorten(timeouts);
    let are = |session: &Arc<Session>| (session.ends(), session.idle_timeout());
    assert!(before.iter().all(|it| are(it) == (s(105), s(2))));
    // By a lane that goes by the longer ones still.
    assert_eq!(are(&start(1, 101)), (s(106), s(2)));
}

#[test]
fn sweeps_within_their_budget_get_everywhere() {
    let sessions = Sessions::new(1000);
    for user in 0..300 {
        sessions.start(&unlimited(), &user.to_string(), 0).unwrap();
    }
    let lives = sessions.start(&unlimited(), "ann", 5).unwrap();
    assert_eq!(sessions.sweep(s(9), 1000), 0);
    let mut removed = 0;
    for _ in 0..31 {
        let now = sessions.sweep(s(10), 10);
        assert!(now <= 10);
        removed += now;
    }
    assert_eq!((removed, sessions.count()), (300, 1));
    assert!(sessions.has(&lives, 10));
    assert_eq!(sessions.sweep(s(15), 0), 0);
    assert_eq!(sessions.sweep(s(15), 1), 1);
    sessions.check_consistent();
}

/// Of a user of many sessions: who waits for the lock over that user, as a log-in of another, goes on before all have ended.
#[test]
fn the_end_of_a_users_sessions_lets_others_in_meanwhile() {
    const COUNT: usize = 20_000;
    // On a busy machine all may have ended before the other waits, but hardly three times.
    let mut tries = (0..3).map(|_| left_to_who_waits(COUNT));
    let left = tries.find(|left| *left > 0);
    assert!(left.is_some_and(|left| left < COUNT), "{left:?}");
}

/// How many of so many sessions of a user, which are about to end, are there once who waits for the lock has it.
fn left_to_who_waits(count: usize) -> usize {
    let sessions = Sessions::new(usize::MAX);
    let first = sessions.start(&unlimited(), "ann", 0).unwrap();
    for _ in 1..count {
        sessions.start(&unlimited(), "ann", 0).unwrap();
    }
    let bob = sessions.start(&unlimited(), "bob", 0).unwrap();
    // In the way of the first to end.
    let shard = sessions.lock_shard(first.session.id);
    let waits = AtomicBool::new(false);
    let left = thread::scope(|scope| {
        let ended = scope.spawn(|| sessions.revoke_user("ann"));
        let of_ann = sessions.hasher.hash_one("ann") >> (u64::BITS - SHARDS.trailing_zeros());
        while !sessions.users[of_ann as usize].is_locked() {
            thread::yield_now();
        }
        let meanwhile = scope.spawn(|| {
            waits.store(true, Ordering::Relaxed);
            let left = sessions
                .lock_user("ann")
                .get("ann")
                .map_or(0, |sessions| sessions.held.len());
            let began = sessions.start(&unlimited(), "ann", 0).unwrap();
            (left, began)
        });
        while !waits.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        drop(shard);
        let (left, began) = meanwhile.join().unwrap();
        assert_eq!(ended.join().unwrap().len(), count);
        // One that began meanwhile lives on, as one that began behind all.
        assert!(sessions.has(&began, 0) && sessions.has(&bob, 0));
        left
    });
    assert_eq!(sessions.count(), 2);
    sessions.check_consistent();
    left
}

/// Of a shard of many: who waits for it goes on before all of it is looked at.
#[test]
fn a_sweep_lets_others_into_a_shard_meanwhile() {
    const COUNT: u16 = 600;
    let sessions = Sessions::new(usize::MAX);
    let add = |users: &mut Users, user: &str, (id, more): (u16, u8), began: u64| {
        let mut hash = [0; 16];
        hash[1..3].copy_from_slice(&id.to_be_bytes());
        hash[3] = more;
        let id = SessionId { hash, user: None };
        let session = Session::new(id, user.into(), Claims::new(), &unlimited(), s(began));
        let session = Arc::new(session);
        let entry = Entry {
            digest: [0; 32],
            sequence: sessions.next_sequence.fetch_add(1, Ordering::Relaxed),
            session: session.clone(),
        };
        let of_user = users.entry(user.into()).or_default();
        of_user.add(entry.sequence, id, session.over_at());
        sessions.lock_shard(id).insert(id, entry);
        sessions.held.fetch_add(1, Ordering::Relaxed);
        session
    };
    for id in 1..COUNT {
        add(&mut sessions.lock_user("live"), "live", (id, 0), 10);
    }
    let mut users = sessions.lock_user("old");
    let old = add(&mut users, "old", (0, 0), 0);
    thread::scope(|scope| {
        let swept = scope.spawn(|| sessions.sweep(s(15), COUNT.into()));
        // It is found to be over, and waits for its user.
        while Arc::strong_count(&old) < 3 {
            thread::yield_now();
        }
        add(&mut users, "old", (COUNT / 2, 1), 0);
        drop(users);
        assert_eq!(swept.join().unwrap(), 2);
    });
    sessions.check_consistent();
}

#[test]
fn pages_tell_each_session_once() {
    let sessions = Sessions::new(1000);
    for number in 0..200 {
        let user = if number % 3 == 0 { "ann" } else { "bob" };
        sessions.start(&unlimited(), user, 0).unwrap();
    }
    for (user, expected) in [(None, 200), (Some("ann"), 67), (Some("eve"), 0)] {
        for limit in [1, 7, 67, 200, usize::MAX] {
            let mut seen = Vec::new();
            let mut after = None;
            loop {
                let page = sessions.list(user, limit, after, s(0));
                assert!(page.sessions.len() <= limit);
                seen.extend(page.sessions.iter().map(|session| session.id));
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
            assert!(seen.is_sorted_by(|one, next| one < next));
            assert_eq!(seen.len(), expected);
        }
    }
    assert!(sessions.list(None, 0, None, s(0)).sessions.is_empty());
}

#[test]
fn maximum_holds_when_threads_race() {
    for on_max in [OnMax::EvictOldest, OnMax::RejectNew] {
        let sessions = Sessions::new(50);
        let settings = settings(3, on_max);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (sessions, settings) = (&sessions, &settings);
                scope.spawn(move || {
                    for round in 0..400_u64 {
                        let user = ["ann", "bob"][usize::from(round % 5 == 0)];
                        let created = sessions.start(settings, user, round / 40);
                        assert!(sessions.live(user, round / 40) <= 3);
                        match (created, (round + thread) % 4) {
                            (Ok(created), 0) => drop(sessions.end(created.token.as_str())),
                            (Ok(created), 1) => {
                                sessions.find(created.token.as_str(), s(round / 40));
                            }
                            (_, 2) if round % 50 == 0 => drop(sessions.revoke_user(user)),
                            (_, _) => drop(sessions.sweep(s(round / 40), 4)),
                        }
                    }
                });
            }
        });
        assert!(sessions.count() <= 6);
        sessions.check_consistent();
    }
}

#[test]
fn store_never_holds_more_than_its_bound_when_threads_race() {
    let sessions = Sessions::new(20);
    let created: usize = thread::scope(|scope| {
        let race = |thread: usize| {
            let sessions = &sessions;
            scope.spawn(move || {
                let start = |n: usize| sessions.start(&unlimited(), &format!("{thread}-{n}"), 0);
                (0..20).filter(|n| start(*n).is_ok()).count()
            })
        };
        let threads: Vec<_> = (0..8).map(race).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert_eq!((created, sessions.count()), (20, 20));
    sessions.check_consistent();
}

#[derive(Clone, Debug)]
enum Step {
    Create(usize),
    Find(usize),
    End(usize),
    Revoke(usize),
    RevokeUser(usize),
    Wait(u64),
    Sweep(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3_usize).prop_map(Step::Create),
        2 => any::<usize>().prop_map(Step::Find),
        1 => any::<usize>().prop_map(Step::End),
        1 => any::<usize>().prop_map(Step::Revoke),
        1 => (0..3_usize).prop_map(Step::RevokeUser),
        2 => (1..8_u64).prop_map(Step::Wait),
        1 => (0..5_usize).prop_map(Step::Sweep),
    ]
}

proptest! {
    #[test]
    fn maximum_is_never_exceeded(
        max in 1..4_u32,
        reject in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        const USERS: [&str; 3] = ["ann", "bob", "eve"];
        let on_max = if reject { OnMax::RejectNew } else { OnMax::EvictOldest };
        let settings = settings(max, on_max);
        let sessions = Sessions::new(6);
        let mut now = 0;
        let mut made: Vec<Created> = Vec::new();
        for step in steps {
            let pick = |index: usize| made.get(index % made.len().max(1));
            match step {
                Step::Create(user) => {
                    let before = sessions.live(USERS[user], now);
                    match sessions.start(&settings, USERS[user], now) {
                        Ok(created) => made.push(created),
                        Err(CreateError::MaxReached) => {
                            prop_assert!(reject);
                            prop_assert_eq!(before, usize::try_from(max).unwrap());
                        }
                        Err(CreateError::Full) => prop_assert_eq!(sessions.count(), 6),
                        Err(error @ (CreateError::Random(_) | CreateError::Store(_))) => {
                            panic!("{error}")
                        }
                    }
                }
                Step::Find(index) => {
                    if let Some(created) = pick(index) {
                        let shown = sessions.has(created, now);
                        let found = sessions.find(created.token.as_str(), s(now));
                        prop_assert_eq!(found.is_some(), shown);
                    }
                }
                Step::End(index) => {
                    if let Some(created) = pick(index) {
                        sessions.end(created.token.as_str());
                        prop_assert!(!sessions.has(created, now));
                    }
                }
                Step::Revoke(index) => {
                    if let Some(created) = pick(index) {
                        sessions.revoke(created.session.id);
                        prop_assert!(!sessions.has(created, now));
                    }
                }
                Step::RevokeUser(user) => {
                    sessions.revoke_user(USERS[user]);
                    prop_assert_eq!(sessions.live(USERS[user], now), 0);
                }
                Step::Wait(seconds) => now += seconds,
                Step::Sweep(budget) => prop_assert!(sessions.sweep(s(now), budget) <= budget),
            }
            for user in USERS {
                prop_assert!(sessions.live(user, now) <= usize::try_from(max).unwrap());
            }
            prop_assert!(sessions.count() <= 6);
            sessions.check_consistent();
        }
    }
}
