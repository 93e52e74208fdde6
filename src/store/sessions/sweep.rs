//! Sweeps over sessions in Redis: a step looks at some users, removes what is over and counts what lives. Owns what a step asks;
//! must not know when one is due.

use std::time::Duration;

use futures_util::future::try_join_all;

use crate::clock;
use crate::keys::{Keys, UserTag};
use crate::store::fleet::Fleet;
use crate::store::redis::{Arg, CallError, Connections, ScanCursor, Script, Value};

/// Keys that a step looks at, about.
const STEP: usize = 100;
/// Users whose sessions are looked at at a time.
const AT_ONCE: usize = 8;
/// Sessions of one user that are looked at in one call.
const PART: u64 = 200;
/// For a call; no request waits for it.
const WITHIN: Duration = Duration::from_millis(500);

/// Of the entries of `sessions` of one Redis.
#[derive(Debug)]
pub struct Sweeper {
    keys: Keys,
    process: String,
    part: Script,
    lease: Script,
}

/// What was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    pub live: u64,
    /// With live sessions.
    pub users: u64,
    /// Were over, and are removed.
    pub removed: u64,
}

impl Sweeper {
    pub fn new(fleet: &Fleet) -> Sweeper {
        Sweeper {
            keys: fleet.keys.clone(),
            process: fleet.process.clone(),
            part: Script::new(include_str!("../../../lua/session_sweep.lua")),
            lease: Script::new(include_str!("../../../lua/session_lease.lua")),
        }
    }

    /// Asks to be the one of all processes that sweeps, for the next `holds`; whether this one is.
    pub async fn claim(&self, redis: &Connections, holds: Duration) -> Result<bool, CallError> {
        let key = self.keys.sessions_sweeper();
        let args = [Arg::Text(&self.process), Arg::Int(clock::millis(holds))];
        let keys = [&*key];
        let answer = redis.run_within(WITHIN, &self.lease, &keys, &args);
        match answer.await? {
            Value::Int(mine) => Ok(mine == 1),
            _ => Err(CallError::Nonsense),
        }
    }

    /// One step over the sessions of the entry of this name; where to go on, `None` behind the last. A user may be met twice.
    pub async fn step(
        &self,
        redis: &Connections,
        name: &str,
        from: Option<&ScanCursor>,
    ) -> Result<(Swept, Option<ScanCursor>), CallError> {
        let name = Keys::name(name);
        let pattern = self.keys.all_sessions(&name);
        let (keys, next) = redis.scan(from, &pattern, STEP, WITHIN).await?;
        let users: Vec<_> = keys.iter().filter_map(|key| Keys::user_of(key)).collect();
        let mut all = Swept::default();
        for users in users.chunks(AT_ONCE) {
            let swept = users.iter().map(|user| self.user(redis, &name, *user));
            for swept in try_join_all(swept).await? {
                all.live += swept.live;
                all.users += swept.users;
                all.removed += swept.removed;
            }
        }
        Ok((all, next))
    }

    async fn user(
        &self,
        redis: &Connections,
        name: &str,
        user: UserTag,
    ) -> Result<Swept, CallError> {
        let key = self.keys.sessions(name, user);
        let keys = [&*key];
        let (mut live, mut removed) = (0, 0);
        let mut cursor = "0".to_owned();
        loop {
            let args = [Arg::Text(&cursor), Arg::Int(PART)];
            let answer = redis.run_within(WITHIN, &self.part, &keys, &args);
            let (next, counts) = part(&answer.await?).ok_or(CallError::Nonsense)?;
            live += counts.0;
            removed += counts.1;
            cursor = next;
            if cursor == "0" {
                return Ok(Swept {
                    live,
                    users: u64::from(live > 0),
                    removed,
                });
            }
        }
    }
}

/// Where the next part begins, how many live, how many were removed.
fn part(answer: &Value) -> Option<(String, (u64, u64))> {
    let Value::Array(values) = answer else {
        return None;
    };
    let [next, Value::Int(live), Value::Int(removed)] = &**values else {
        return None;
    };
    let next = match next {
        Value::BulkString(text) => String::from_utf8(text.clone()).ok()?,
        Value::SimpleString(text) => text.clone(),
        _ => return None,
    };
    Some((
        next,
        (u64::try_from(*live).ok()?, u64::try_from(*removed).ok()?),
    ))
}
