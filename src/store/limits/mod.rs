//! The counters of rate limits in this process's memory: bounded, the least used key goes first. Owns where a counter is
//! and that a request is charged all or nothing; the arithmetic is `policy::limit`'s.

pub mod grants;
pub mod leases;
pub mod overrides;
pub mod slots;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::Hasher;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use siphasher::sip128::{Hasher128, SipHasher13};
use smallvec::SmallVec;
use tracing::warn;

use crate::config::check::limits::override_rules;
use crate::config::limit_keys::joined;
use crate::config::limits::{Limit, Rule, Rules};
use crate::policy::limit::{self, Charged, Now, State, Verdict};
use crate::store::table::{SHARDS, Shard};

pub use crate::store::table::Key;

/// Rules of one request, mostly no more.
const USUAL: usize = 4;
/// Keys that are held, where there is room.
const KEYS: u64 = 1_000_000;
/// What of the memory that the process may use is for keys; the rest is for connections, bodies, sessions and the audit.
const PART: u64 = 4;
/// What a counter takes: 48 bytes, of a table that is never more than half empty.
const COUNTER_BYTES: u64 = 100;
/// What a shared limit's key takes besides: 318 to 364 bytes by benches/SCALE.md.
const SHARED_BYTES: u64 = 400;

/// How many keys are held where the file says no number: what keys have room for within `memory`, in bytes, that the process may use.
pub fn room_for_keys(memory: Option<u64>, is_shared: bool) -> usize {
    // While Redis does not answer, limits that are shared are counted here as well.
    let bytes = match is_shared {
        true => COUNTER_BYTES + SHARED_BYTES,
        false => COUNTER_BYTES,
    };
    let room = memory.map_or(KEYS, |memory| memory / PART / bytes);
    room.min(KEYS) as usize
}

/// One rule asked about one key.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    pub key: Key,
    pub rule: Rule,
    pub cost: u64,
    /// Whether its refusal refuses the request.
    pub enforced: bool,
}

/// All counters.
pub struct Limits {
    shards: Vec<Mutex<Shard<State>>>,
    /// As it was asked for.
    pub max_keys: usize,
    secret: [u8; 16],
    /// By limit and key; set at run time, in place of the file's.
    overrides: ArcSwap<BTreeMap<(String, String), Override>>,
    /// What they say: a limit that changes reads it anew.
    words: Mutex<BTreeMap<(String, String), String>>,
}

/// Rules for one key; `None`: unlimited.
pub type Override = Option<Rules>;

/// The limit's rules for a key of these parts; `None` when it is not limited. What was set at run time goes before the file's.
pub fn rules<'l, P: AsRef<[u8]>>(
    limit: &'l Limit,
    parts: &[P],
    overrides: &'l BTreeMap<(String, String), Override>,
) -> Option<&'l Rules> {
    if limit.overrides.is_empty() && overrides.is_empty() {
        return limit.rules.as_ref();
    }
    let parts = parts.iter().map(|part| str::from_utf8(part.as_ref()));
    let Ok(parts) = parts.collect::<Result<SmallVec<[&str; 4]>, _>>() else {
        return limit.rules.as_ref();
    };
    let place = (limit.name.clone(), joined(&limit.by, &parts));
    let set = overrides
        .get(&place)
        .or_else(|| limit.overrides.get(&place.1));
    set.unwrap_or(&limit.rules).as_ref()
}

impl Limits {
    /// Counters for at most about `max_keys` keys; 48 bytes each, and the table's share.
    pub fn new(max_keys: usize, secret: [u8; 16]) -> Limits {
        let capacity = max_keys.div_ceil(SHARDS);
        Limits {
            overrides: ArcSwap::default(),
            words: Mutex::default(),
            shards: (0..SHARDS)
                .map(|_| Mutex::new(Shard::new(capacity)))
                .collect(),
            max_keys,
            secret,
        }
    }

    /// Begins the keys of a limit's rules.
    pub fn keys_of(&self, limit: &str) -> LimitKeys {
        let mut builder = KeyBuilder(SipHasher13::new_with_key(&self.secret));
        builder.part(limit.as_bytes());
        LimitKeys(builder)
    }

    /// Asks every rule at one moment and, if none that is enforced refuses, charges those that admit: a refused request
    /// is charged nothing, and what its verdicts say is left is so. `verdicts` holds one verdict for each of `asks`.
    ///
    /// # Panics
    /// When it holds another number of them.
    pub fn ask(&self, asks: &[Ask], now: Now, verdicts: &mut [Verdict]) -> bool {
        assert_eq!(verdicts.len(), asks.len(), "a verdict for each of asks");
        if let ([ask], [verdict]) = (asks, &mut *verdicts) {
            let mut shard = self.shards[ask.key.shard()].lock();
            *verdict = check(&shard, ask, now);
            match verdict.admitted {
                true => take(&mut shard, ask, now),
                false => shard.renew(ask.key),
            }
            return verdict.admitted || !ask.enforced;
        }
        // Locks, since several counters must change together, or none. They are taken in the order of the shards, so that
        // two lanes never wait for each other; held for some tens of nanoseconds.
        let mut shards: SmallVec<[_; USUAL]> = asks.iter().map(|ask| ask.key.shard()).collect();
        shards.sort_unstable();
        shards.dedup();
        let lock = |shard: &usize| self.shards[*shard].lock();
        let mut guards: SmallVec<[_; USUAL]> = shards.iter().map(lock).collect();
        let guard_of = |ask: &Ask| {
            let shard = ask.key.shard();
            let place = shards.iter().position(|other| *other == shard);
            place.expect("each ask's shard was locked above")
        };
        let mut admitted = true;
        for (ask, verdict) in asks.iter().zip(&mut *verdicts) {
            *verdict = check(&guards[guard_of(ask)], ask, now);
            admitted &= verdict.admitted || !ask.enforced;
        }
        for (ask, verdict) in asks.iter().zip(verdicts) {
            let shard = &mut guards[guard_of(ask)];
            match (verdict.admitted, admitted) {
                (true, true) => {
                    take(shard, ask, now);
                    continue;
                }
                // It would admit, and takes nothing.
                (true, false) => *verdict = check(shard, &Ask { cost: 0, ..*ask }, now),
                (false, _) => {}
            }
            shard.renew(ask.key);
        }
        admitted
    }

    /// Gives back what an admitted request was charged that is refused elsewhere.
    pub fn give_back(&self, key: Key, rule: &Rule, charged: Charged, now: Now) {
        let mut shard = self.shards[key.shard()].lock();
        if let Some(state) = shard.get_mut(key) {
            limit::give_back(rule, state, charged, now);
        }
    }

    /// Gives back what a request held of a concurrency rule.
    pub fn release(&self, key: Key, cost: u64) {
        let mut shard = self.shards[key.shard()].lock();
        if let Some(state) = shard.get_mut(key)
            && limit::release(state, cost)
        {
            shard.remove(key);
        }
    }

    /// What a request of no cost would be told; changes nothing, not even which key was used last.
    pub fn peek(&self, key: Key, rule: &Rule, now: Now) -> Verdict {
        let shard = self.shards[key.shard()].lock();
        limit::check(rule, &state(&shard, key), 0, now)
    }

    /// Forgets what was counted for a key; whether there was anything. Slots in use stay taken: the requests that have them give them
    /// back, and would else give back those of others.
    pub fn reset(&self, key: Key, rule: &Rule) -> bool {
        let mut shard = self.shards[key.shard()].lock();
        match rule {
            Rule::Slots(_) => shard.get(key).is_some(),
            Rule::Window(_) => shard.remove(key),
        }
    }

    /// All overrides set at run time.
    pub fn overrides(&self) -> Guard<Arc<BTreeMap<(String, String), Override>>> {
        self.overrides.load()
    }

    /// Sets the rules of one key by what they say, or with `None` takes them back; whether there were any before.
    pub fn set_override(&self, limit: &str, key: &str, set: Option<(&str, Override)>) -> bool {
        let place = (limit.to_owned(), key.to_owned());
        let mut words = self.words.lock();
        // Also where they did not fit the limit as it is now.
        let was_set = match &set {
            Some((says, _)) => words.insert(place.clone(), (*says).to_owned()),
            None => words.remove(&place),
        };
        let before = self.overrides.rcu(|overrides| {
            let mut overrides = BTreeMap::clone(overrides);
            match &set {
                Some((_, rules)) => overrides.insert(place.clone(), rules.clone()),
                None => overrides.remove(&place),
            };
            overrides
        });
        was_set.is_some() || before.contains_key(&place)
    }

    /// Puts what these words say, each behind its limit and its key, in place of all overrides.
    pub fn replace_overrides<'w>(
        &self,
        limits: &[Limit],
        words: impl Iterator<Item = (&'w str, &'w str, &'w str)>,
    ) {
        let words =
            words.map(|(limit, key, says)| ((limit.to_owned(), key.to_owned()), says.to_owned()));
        *self.words.lock() = words.collect();
        self.reread_overrides(limits);
    }

    /// Has them go by these limits, which may be of another kind than before. Those of limits that are not there are left alone: they may
    /// come.
    pub fn reread_overrides(&self, limits: &[Limit]) {
        let mut overrides = BTreeMap::new();
        // Until they are in place: another that is set meanwhile would be lost.
        let words = self.words.lock();
        for (place, says) in &*words {
            let (limit, key) = place;
            let Some(known) = limits.iter().find(|known| known.name == *limit) else {
                continue;
            };
            match override_rules(known, says) {
                Ok(rules) => drop(overrides.insert(place.clone(), rules)),
                Err(error) => warn!(
                    limit,
                    key, error, "an override set at run time cannot be used"
                ),
            }
        }
        self.overrides.store(Arc::new(overrides));
    }

    /// How many keys are held.
    pub fn held_keys(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Keys that were let go of for others, since the process began.
    pub fn evicted(&self) -> u64 {
        self.shards.iter().map(|shard| shard.lock().evicted()).sum()
    }
}

impl fmt::Debug for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limits")
            .field("keys", &self.held_keys())
            .finish_non_exhaustive()
    }
}

/// What the keys of all rules of a limit begin with.
#[derive(Debug, Clone)]
pub struct LimitKeys(KeyBuilder);

impl LimitKeys {
    /// Begins the key of a rule of the limit, by its number among those of its shape. Rules of other kinds, or with windows of other
    /// lengths, never share a counter, not even when a reload changes them: otherwise a per-second limit that replaced a monthly
    /// one would keep the month's window.
    pub fn of_rule(&self, (number, rule): (usize, Rule)) -> KeyBuilder {
        let mut builder = self.0.clone();
        let (kind, window) = rule.shape();
        builder.part(&[kind, number as u8]);
        builder.number(window.as_nanos() as u64);
        builder
    }
}

/// A key in the making, part by part.
#[derive(Clone)]
pub struct KeyBuilder(SipHasher13);

impl fmt::Debug for KeyBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyBuilder(…)")
    }
}

impl KeyBuilder {
    /// Adds a part. Its length is hashed too, so that `a`, `bc` and `ab`, `c` differ.
    pub fn part(&mut self, bytes: &[u8]) {
        self.0.write_usize(bytes.len());
        self.0.write(bytes);
    }

    fn number(&mut self, number: u64) {
        self.0.write_u64(number);
    }

    /// The key of the parts so far.
    pub fn finish(self) -> Key {
        Key(self.0.finish128().as_u128())
    }
}

fn check(shard: &Shard<State>, ask: &Ask, now: Now) -> Verdict {
    limit::check(&ask.rule, &state(shard, ask.key), ask.cost, now)
}

fn take(shard: &mut Shard<State>, ask: &Ask, now: Now) {
    let held = matches!(ask.rule, Rule::Slots(_));
    limit::take(&ask.rule, shard.touch(ask.key, held), ask.cost, now);
}

fn state(shard: &Shard<State>, key: Key) -> State {
    shard.get(key).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::config::limits::{Period, Window};

    const NOW: Now = Now {
        mono: Duration::from_secs(5),
        wall: Duration::from_secs(5),
    };
    const TWO: Rule = Rule::Window(Window::Fixed {
        limit: 2,
        period: Period::Fixed(Duration::from_secs(10)),
    });
    const BLANK: Verdict = Verdict {
        admitted: false,
        remaining: 0,
        reset: Duration::ZERO,
        retry_after: None,
    };

    fn key(limits: &Limits, name: &str) -> Key {
        let mut builder = limits.keys_of("limit").of_rule((0, TWO));
        builder.part(name.as_bytes());
        builder.finish()
    }

    fn ask(limits: &Limits, names: &[&str]) -> bool {
        let asks: Vec<_> = names
            .iter()
            .map(|name| Ask {
                key: key(limits, name),
                rule: TWO,
                cost: 1,
                enforced: !name.starts_with("shadow"),
            })
            .collect();
        limits.ask(&asks, NOW, &mut vec![BLANK; asks.len()])
    }

    #[test]
    fn keys_take_a_part_of_a_small_memory() {
        let check = |mib: Option<u64>, is_shared, expected| {
            let room = room_for_keys(mib.map(|mib| mib << 20), is_shared);
            assert_eq!(room, expected, "{mib:?}, {is_shared}");
        };
        check(None, true, 1_000_000);
        check(Some(8192), true, 1_000_000);
        check(Some(256), true, 134_217);
        check(Some(256), false, 671_088);
        check(Some(64), true, 33_554);
    }

    #[test]
    fn a_refused_request_is_charged_nothing() {
        let limits = Limits::new(1000, [1; 16]);
        assert!(ask(&limits, &["a"]) && ask(&limits, &["a"]));
        assert!(!ask(&limits, &["a", "b"]));
        assert_eq!(limits.peek(key(&limits, "b"), &TWO, NOW).remaining, 2);
        assert!(ask(&limits, &["b"]) && ask(&limits, &["b"]));
    }

    /// Else a flood of other keys would give whoever is refused a quota anew.
    #[test]
    fn who_asks_and_is_refused_is_not_the_first_to_be_forgotten() {
        for names in [vec!["a"], vec!["a", "b"]] {
            // Two keys a shard.
            let limits = Limits::new(2 * SHARDS, [1; 16]);
            assert!(ask(&limits, &["a"]) && ask(&limits, &["a"]));
            for other in 0..10_000 {
                assert!(!ask(&limits, &names), "after {other} others");
                assert!(ask(&limits, &[&other.to_string()]));
            }
            assert!(limits.peek(key(&limits, "b"), &TWO, NOW).remaining == 2);
        }
    }

    #[test]
    fn a_shadow_limit_counts_and_refuses_no_one() {
        let limits = Limits::new(1000, [1; 16]);
        for _ in 0..5 {
            assert!(ask(&limits, &["shadow"]));
        }
        assert_eq!(limits.peek(key(&limits, "shadow"), &TWO, NOW).remaining, 0);
        // Nor beside others, which are charged.
        assert!(ask(&limits, &["shadow", "a"]) && ask(&limits, &["a", "shadow"]));
        assert!(!ask(&limits, &["shadow", "a"]));
    }

    #[test]
    fn a_window_of_another_length_begins_anew() {
        let limits = Limits::new(1000, [1; 16]);
        let window = |limit, period| Rule::Window(Window::Fixed { limit, period });
        let admits = |rule: &Rule| {
            let ask = Ask {
                key: limits.keys_of("limit").of_rule((0, *rule)).finish(),
                rule: *rule,
                cost: 1,
                enforced: true,
            };
            limits.ask(&[ask], NOW, &mut [BLANK])
        };
        assert!(admits(&window(1, Period::Month)) && !admits(&window(1, Period::Month)));
        assert!(!admits(&window(1, Period::Month)) && admits(&window(2, Period::Month)));
        assert!(admits(&window(1, Period::Fixed(Duration::from_secs(1)))));
    }

    #[test]
    fn many_lanes_admit_exactly_the_limit() {
        let limits = Arc::new(Limits::new(1000, [1; 16]));
        let rule = Rule::Window(Window::Fixed {
            limit: 1_000,
            period: Period::Day,
        });
        let lanes: Vec<_> = (0..4)
            .map(|lane| {
                let limits = limits.clone();
                thread::spawn(move || {
                    let (one, two) = (key(&limits, "one"), key(&limits, "two"));
                    let order = if lane % 2 == 0 {
                        [one, two]
                    } else {
                        [two, one]
                    };
                    let asks = order.map(|key| Ask {
                        key,
                        rule,
                        cost: 1,
                        enforced: true,
                    });
                    (0..1_000)
                        .filter(|_| limits.ask(&asks, NOW, &mut [BLANK; 2]))
                        .count()
                })
            })
            .collect();
        assert_eq!(
            lanes
                .into_iter()
                .map(|lane| lane.join().unwrap())
                .sum::<usize>(),
            1_000
        );
    }

    #[test]
    fn a_released_slot_leaves_no_key_behind() {
        let limits = Limits::new(1000, [1; 16]);
        let (key, rule) = (key(&limits, "a"), Rule::Slots(1));
        let ask = Ask {
            key,
            rule,
            cost: 1,
            enforced: true,
        };
        assert!(limits.ask(&[ask], NOW, &mut [BLANK]) && !limits.ask(&[ask], NOW, &mut [BLANK]));
        limits.release(key, 1);
        assert_eq!(limits.held_keys(), 0);
        assert!(limits.ask(&[ask], NOW, &mut [BLANK]));
        limits.release(key, 1);
        assert!(!limits.reset(key, &rule));
    }

    #[test]
    fn a_reset_key_is_as_new_but_for_slots_in_use() {
        let limits = Limits::new(1000, [1; 16]);
        let rule = Rule::Slots(1);
        let ask = Ask {
            key: key(&limits, "a"),
            rule,
            cost: 1,
            enforced: true,
        };
        let admits = || limits.ask(&[ask], NOW, &mut [BLANK]);
        assert!(admits() && limits.reset(ask.key, &rule) && !admits());
        limits.release(ask.key, 1);
        assert!(admits() && !admits());
        assert!(self::ask(&limits, &["b"]) && self::ask(&limits, &["b"]));
        assert!(limits.reset(key(&limits, "b"), &TWO) && !limits.reset(key(&limits, "b"), &TWO));
        assert!(self::ask(&limits, &["b"]));
    }
}
