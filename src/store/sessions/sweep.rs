//! Sweeps over sessions in Redis: a step looks at some users, removes what is over and counts what lives. Owns what a step asks;
//! must not know when one is due.

use std::time::Duration;

use futures_util::future::try_join_all;

use crate::clock;
use crate::keys::{Keys, UserTag};
use crate::store::fleet::Fleet;
use crate::store::redis::{Arg, CallError, Connections, ScanCursor, Script, Value, read};

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
        let mine = redis.run_within(WITHIN, &self.lease, &keys, &args);
        read::is_one(&mine.await?)
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
            let part = Part::of(answer.await?)?;
            live += part.live;
            removed += part.removed;
            cursor = part.next;
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

/// What was met of one user's sessions in one call.
struct Part {
    /// Where the next one begins; "0" behind the last.
    next: String,
    live: u64,
    removed: u64,
}

impl Part {
    fn of(answer: Value) -> Result<Part, CallError> {
        match &*read::list(answer)? {
            [next, live, removed] => Ok(Part {
                next: read::text(next)?.to_owned(),
                live: read::number(live)?,
                removed: read::number(removed)?,
            }),
            _ => Err(CallError::Nonsense),
        }
    }
}
