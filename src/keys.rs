//! Every key and channel that weir has in Redis. Owns their names and the hash tags that put what changes together into one
//! slot. Must not do I/O.
//!
//! | key | is | lives |
//! |---|---|---|
//! | `weir:l:{KEY}:NtPERIOD` | a limit's `N`th token bucket of that period in µs, from 0; `KEY` hashes the limit's name and the key's parts | until it is full, or up to a day more where a smaller burst cut something off |
//! | `weir:l:{KEY}:NsWINDOW` | its `N`th sliding window of so many µs | two windows |
//! | `weir:l:{KEY}:NfPERIOD` | its `N`th fixed window of that period | until it ends |
//! | `weir:c:{KEY}` | a concurrency limit's slots: how many each process has, and until when | `hold_ttl` past the last call, or 2 s once none is taken |
//! | `weir:p:{live}` | the processes that are alive: a sorted set of ids by when they are given up | a minute past the last beat |
//! | `weir:o:{overrides}` | overrides of limits set at run time, by limit and key | 30 days after the last look |
//! | `weir:b:{UPSTREAM}:s` | the state of an upstream's shared breaker; `UPSTREAM` hashes its name | a day past the last report, a month where forced |
//! | `weir:b:{UPSTREAM}:w:SHAPE` | its window of one kind and size | the window, or a day where it is one of calls |
//! | `weir:b:{UPSTREAM}:m` | processes that share it, by when they were heard | 5 s past the last report |
//! | `weir:b:{UPSTREAM}:d` | those that doubt the upstream, likewise; with `?` behind one that does for a single call | 3 s past the last that does |
//! | `weir:b:{UPSTREAM}:p` | slots for probes, by when they come back | a day past the last |
//! | `weir:s:NAME:{USER}` | a user's sessions of the entry `NAME`: a hash of its name and of each session's record | as long as the last of them |
//! | `weir:s:{sweep}` | the process that sweeps the sessions | two sweeps past its last |
//! | `weir:a:{NAME.N}` | the `N`th stream of the audit, `audit.stream.name` being `NAME`: a batch of events an entry | each entry until its rows are committed |
//! | `weir:a:{NAME.N}:dead` | its entries that cannot be stored, each with the reason | until an operator has replayed or dropped them |
//! | `weir:a:{BOOT}:done` | which batches of a process are committed: a hash of first by last number | an hour past the last |
//!
//! | channel | tells |
//! |---|---|
//! | `weir:limits` | that overrides of limits have changed, or a key was reset |
//! | `weir:breakers` | transitions of shared breakers |
//! | `weir:sessions` | which sessions have ended before their time: `NAME USER SESSION…` |
//!
//! `weir` is `redis.key_prefix`. Each database of a Redis has keys of its own, and all have the same channels: `@N` follows a channel's name
//! where the database is number `N` and not 0. Names of clients and users are hashed: none can be read from a key, and no key is long.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::{Digest as _, Sha256};

use crate::config::breakers::Window;
use crate::config::redis::Redis;

/// Slots of a cluster (Redis Cluster specification, "Key distribution model").
pub const SLOTS: u16 = 16_384;

/// What a name has otherwise in keys.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// Makes the names under one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
    /// What the names of channels end with.
    breakers: Database,
    limits: Database,
    sessions: Database,
}

/// Of a Redis, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Database(u32);

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            number => write!(f, "@{number}"),
        }
    }
}

/// Of one shared breaker; all lie in one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerKeys {
    pub state: String,
    pub window: String,
    pub members: String,
    pub doubters: String,
    pub probes: String,
    /// What its messages are told apart by.
    pub tag: String,
}

/// The hash tag of a limit's counters for one key: 22 characters of base64url, the first half of a SHA-256. Keys meet by chance
/// once some 2^64 are in use, and by design only if someone does that work.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyTag([u8; 22]);

/// The hash tag of a user's sessions: 16 characters of base64url, 96 bits of a SHA-256. Each of the user's tokens carries it, so
/// that a token tells where its session is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserTag([u8; UserTag::CHARS]);

impl Keys {
    /// In database 0.
    pub fn new(prefix: &str) -> Keys {
        Keys {
            prefix: prefix.to_owned(),
            breakers: Database(0),
            limits: Database(0),
            sessions: Database(0),
        }
    }

    /// In the databases that the file says.
    pub fn of(redis: &Redis) -> Keys {
        Keys {
            breakers: Database(redis.main.database()),
            limits: Database(redis.for_rate_limits().database()),
            sessions: Database(redis.for_sessions().database()),
            ..Keys::new(&redis.key_prefix)
        }
    }

    /// The counter of a limit's rule, which has this number among those of its kind.
    pub fn counter(&self, tag: KeyTag, number: usize, kind: impl fmt::Display) -> String {
        format!("{}:l:{{{}}}:{number}{kind}", self.prefix, tag.as_str())
    }

    /// The slots of a concurrency limit, by process.
    pub fn slots(&self, tag: KeyTag) -> String {
        format!("{}:c:{{{}}}", self.prefix, tag.as_str())
    }

    /// The processes that live, and when each is given up.
    pub fn processes(&self) -> String {
        format!("{}:p:{{live}}", self.prefix)
    }

    /// The overrides of limits.
    pub fn overrides(&self) -> String {
        format!("{}:o:{{overrides}}", self.prefix)
    }

    /// Those of an upstream's shared breaker. Its state is the upstream's, whatever settings it gets by a reload; windows of
    /// different shapes do not mix.
    pub fn breaker(&self, upstream: &str, window: Window) -> BreakerKeys {
        let tag = KeyTag::new("circuit breaker", [upstream.as_bytes()]);
        let shape = match window {
            Window::Time(length) => format!("t{}", length.as_millis()),
            Window::Count(size) => format!("c{size}"),
        };
        let tag = tag.as_str();
        let key = |part: &str| format!("{}:b:{{{tag}}}:{part}", self.prefix);
        BreakerKeys {
            state: key("s"),
            window: key(&format!("w:{shape}")),
            members: key("m"),
            doubters: key("d"),
            probes: key("p"),
            tag: tag.to_owned(),
        }
    }

    /// A stream of the audit; `shard` counts from 0. Its tag spreads the streams over a cluster's nodes.
    pub fn audit_stream(&self, name: &str, shard: u16) -> String {
        format!("{}:a:{{{}.{shard}}}", self.prefix, Keys::name(name))
    }

    /// What a stream of the audit could not store; of the same slot.
    pub fn audit_dead(&self, name: &str, shard: u16) -> String {
        self.audit_stream(name, shard) + ":dead"
    }

    /// What is committed of a process's events; `boot` is the boot's UUID.
    pub fn audit_done(&self, boot: &str) -> String {
        format!("{}:a:{{{boot}}}:done", self.prefix)
    }

    /// Where transitions of shared breakers are said.
    pub fn breakers_changed(&self) -> String {
        format!("{}:breakers{}", self.prefix, self.breakers)
    }

    /// The channel on which processes are told what operators did to limits.
    pub fn limits_channel(&self) -> String {
        format!("{}:limits{}", self.prefix, self.limits)
    }

    /// All sessions of a user, of the entry of `sessions` that has this [`Keys::name`].
    pub fn sessions(&self, name: &str, user: UserTag) -> String {
        format!("{}:s:{name}:{{{}}}", self.prefix, user.as_str())
    }

    /// Which process sweeps the sessions.
    pub fn sessions_sweeper(&self) -> String {
        format!("{}:s:{{sweep}}", self.prefix)
    }

    /// The pattern of [`Keys::sessions`] for every user, as SCAN takes it.
    pub fn all_sessions(&self, name: &str) -> String {
        // What is special in a pattern stands for itself behind a backslash.
        let mut pattern = String::new();
        for character in format!("{}:s:{name}:{{", self.prefix).chars() {
            if matches!(character, '*' | '?' | '[' | ']' | '\\' | '^') {
                pattern.push('\\');
            }
            pattern.push(character);
        }
        pattern + "*}"
    }

    /// Of a key that [`Keys::sessions`] made.
    pub fn user_of(key: &str) -> Option<UserTag> {
        let (_, tag) = key.strip_suffix('}')?.rsplit_once('{')?;
        UserTag::parse(tag)
    }

    /// Where it is said that sessions have ended.
    pub fn sessions_ended(&self) -> String {
        format!("{}:sessions{}", self.prefix, self.sessions)
    }

    /// The name of a part of the configuration as keys and messages have it: without spaces, braces and colons.
    pub fn name(name: &str) -> String {
        utf8_percent_encode(name, ENCODED).to_string()
    }
}

impl UserTag {
    /// Its length as text.
    pub const CHARS: usize = 16;

    /// Of the user of this name.
    pub fn new(user: &str) -> UserTag {
        let mut tag = [0; UserTag::CHARS];
        URL_SAFE_NO_PAD
            .encode_slice(&Sha256::digest(user.as_bytes())[..12], &mut tag)
            .expect("12 bytes are 16 characters");
        UserTag(tag)
    }

    /// What [`UserTag::as_str`] gave.
    pub fn parse(text: &str) -> Option<UserTag> {
        let is_base64url = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let tag: [u8; UserTag::CHARS] = text.as_bytes().try_into().ok()?;
        tag.iter().all(is_base64url).then_some(UserTag(tag))
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("base64url is ASCII")
    }
}

impl fmt::Debug for UserTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UserTag({})", self.as_str())
    }
}

impl KeyTag {
    /// Of a limit's name and the parts of a key.
    pub fn new<'a>(limit: &'a str, parts: impl IntoIterator<Item = &'a [u8]>) -> KeyTag {
        let mut digest = Sha256::new();
        for part in [limit.as_bytes()].into_iter().chain(parts) {
            // Each with its length, so that `a`, `bc` and `ab`, `c` differ.
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        let mut tag = [0; 22];
        URL_SAFE_NO_PAD
            .encode_slice(&digest.finalize()[..16], &mut tag)
            .expect("16 bytes are 22 characters");
        KeyTag(tag)
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("base64url is ASCII")
    }
}

impl fmt::Debug for KeyTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyTag({})", self.as_str())
    }
}

/// The slot of a key: the CRC16 of what stands between its first `{` and the next `}`, or of all of it.
pub fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        let close = rest.iter().position(|byte| *byte == b'}')?;
        (close > 0).then(|| &rest[..close])
    });
    crc16(tag.unwrap_or(key)) % SLOTS
}

/// CRC-16/XMODEM, as the cluster specification asks.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| {
            let shifted = crc << 1;
            if crc & 0x8000 == 0 {
                shifted
            } else {
                shifted ^ 0x1021
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        let check = |key: &str, expected: u16| assert_eq!(slot(key.as_bytes()), expected, "{key}");
        check("123456789", 0x31c3 % SLOTS);
        check("foo", 12_182);
        check("a{foo}b", 12_182);
        check("foo{{bar}}zap", slot(b"{bar"));
        check("foo{bar}{zap}", slot(b"bar"));
        check("foo{}{bar}", crc16(b"foo{}{bar}") % SLOTS);
        check("{foo", crc16(b"{foo") % SLOTS);
        check("", 0);
    }

    #[test]
    fn all_rules_of_a_limit_lie_in_one_slot() {
        let keys = Keys::new("weir");
        let tag = KeyTag::new("login", [&b"10.0.0.1"[..]]);
        let slots = [0, 1, 7].map(|index| slot(keys.counter(tag, index, "b").as_bytes()));
        assert_eq!(slots, [slots[0]; 3]);
    }

    #[test]
    fn all_keys_of_a_breaker_lie_in_one_slot() {
        let keys = Keys::new("weir").breaker("a{b}:c", Window::Count(7));
        let all = [
            keys.state,
            keys.window,
            keys.members,
            keys.doubters,
            keys.probes,
        ];
        let slots = all.map(|key| slot(key.as_bytes()));
        assert_eq!(slots, [slot(keys.tag.as_bytes()); 5]);
    }

    #[test]
    fn sessions_of_a_user_are_told_by_any_of_their_tokens() {
        let keys = Keys::new("a*b");
        let user = UserTag::new("ann");
        assert_eq!(UserTag::parse(user.as_str()), Some(user));
        assert_eq!(UserTag::parse("{aaaaaaaaaaaaaa}"), None);
        assert_eq!(UserTag::parse("aaaa"), None);
        let key = keys.sessions(&Keys::name("we{b"), user);
        assert_eq!(key, format!("a*b:s:we%7Bb:{{{}}}", user.as_str()));
        assert_eq!(Keys::user_of(&key), Some(user));
        assert_eq!(keys.all_sessions(&Keys::name("we{b")), r"a\*b:s:we%7Bb:{*}");
    }

    #[test]
    fn keys_whose_parts_differ_are_different() {
        let tag = |limit: &str, parts: &[&[u8]]| KeyTag::new(limit, parts.iter().copied());
        assert_ne!(tag("l", &[b"a", b"bc"]), tag("l", &[b"ab", b"c"]));
        assert_ne!(tag("la", &[b"b"]), tag("l", &[b"ab"]));
        assert_eq!(tag("l", &[b"a"]), tag("l", &[b"a"]));
    }
}
