//! The sessions of one entry of `sessions:` in Redis: scripts as calls, and how their answers are read. A user's sessions are
//! one key, whose tag each of the user's tokens carries. What is remembered of answers is `cache`'s.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::join_all;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use super::cache::{Answer, Cache, Flight};
use super::{CreateError, Created, ListError, Listed, Reach, Token, Watchers};
use crate::clock::{self, millis};
use crate::config::sessions::{Claims, OnMax, Settings, Shared};
use crate::keys::{Keys, UserTag};
use crate::policy::session::{Session, SessionId, Timeouts, Times};
use crate::store::fleet::Fleet;
use crate::store::redis::{Arg, CallError, Connections, ScanCursor, Script, Value, read};
use crate::telemetry::metrics::sessions::SessionMetrics;

/// The user's tag, and 32 random bytes as base64url without padding (RFC 4648 section 5).
const TOKEN_CHARS: usize = UserTag::CHARS + 43;
/// Uses that are told to Redis at a time.
const WRITES: usize = 64;
/// Before a use is told again that could not be.
const WRITE_AGAIN: Duration = Duration::from_millis(500);
/// Steps of a list over all keys, at most, so that a page ends in keys of other kinds too.
const STEPS: usize = 50;
/// Keys that such a step looks at, at least.
const STEP: usize = 100;

/// Sessions in Redis, as this process knows them.
pub struct SharedSessions {
    /// As keys and messages have it.
    name: String,
    keys: Keys,
    /// At most, of those that have begun.
    timeouts: Mutex<Timeouts>,
    pub(super) cache: Cache,
    create: Script,
    find: Script,
    end: Script,
    list: Script,
}

impl SharedSessions {
    /// Those of the entry of this name.
    pub fn new(name: &str, fleet: &Fleet, max_entries: usize) -> SharedSessions {
        SharedSessions {
            name: Keys::name(name),
            keys: fleet.keys.clone(),
            timeouts: Mutex::new(Timeouts::UNBOUNDED),
            cache: Cache::new(max_entries, fleet.hears_sessions.clone()),
            create: Script::new(include_str!("../../../lua/session_create.lua")),
            find: Script::new(include_str!("../../../lua/session_find.lua")),
            end: Script::new(include_str!("../../../lua/session_end.lua")),
            list: Script::new(include_str!("../../../lua/session_list.lua")),
        }
    }

    /// Sessions have no longer timeouts than these from their next look-up on.
    pub(super) fn set_timeouts(&self, timeouts: Timeouts) {
        *self.timeouts.lock() = timeouts;
    }

    pub(super) async fn create(
        &self,
        settings: &Settings,
        shared: &Shared,
        user: String,
        claims: Claims,
        reach: Reach<'_>,
    ) -> Result<Created, CreateError> {
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(CreateError::Random)?;
        let tag = UserTag::new(&user);
        let token = Token::new(format!(
            "{}{}",
            tag.as_str(),
            URL_SAFE_NO_PAD.encode(random)
        ));
        let id = id_of(tag, token.as_str());
        let json = match claims.is_empty() {
            true => String::new(),
            false => serde_json::to_string(&claims).map_err(|_| CallError::Nonsense)?,
        };
        let (channel, begin) = (self.keys.sessions_ended(), self.begin(tag));
        let max = settings.max_per_user.map_or(0, |max| max.get().into());
        let (now, era) = (clock::mono(), self.cache.era());
        let args = [
            Arg::Text(&id.field()),
            Arg::Text(&user),
            Arg::Int(millis(settings.idle_timeout)),
            Arg::Int(millis(settings.absolute_timeout)),
            Arg::Text(&json),
            Arg::Int(max),
            Arg::Int(u64::from(settings.on_max == OnMax::EvictOldest)),
            Arg::Text(&channel),
            Arg::Text(&begin),
        ];
        let answer = self.run(&self.create, tag, &args, reach).await?;
        let (said, evicted) = match &*answer {
            [Value::Int(said), evicted @ ..] => (*said, evicted),
            _ => return Err(CallError::Nonsense.into()),
        };
        match said {
            1 => {}
            0 => return Err(CreateError::MaxReached),
            _ => {
                let other = "two users' names have the same hash".to_owned();
                return Err(CallError::Refused(other).into());
            }
        }
        let evicted = ids(tag, evicted)?;
        self.forget(&evicted);
        let session = Session::new(id, user, claims, settings, now);
        Ok(Created {
            token,
            session: self.cache.created(session, now, era, shared),
            evicted,
        })
    }

    /// Asks about a token, or waits for whoever has.
    pub(super) async fn ask(
        self: &Arc<Self>,
        id: SessionId,
        reach: Reach<'_>,
        shared: &Shared,
        metrics: &SessionMetrics,
    ) -> Answer {
        let mut said = match self.cache.join(id) {
            Flight::Follow(said) => {
                metrics.waited.inc();
                said
            }
            Flight::Lead { said, era } => {
                metrics.asked.inc();
                let Some(redis) = reach.redis.cloned() else {
                    self.cache.gave_up(id);
                    return Err(CallError::Down);
                };
                let follow = said.subscribe();
                let (this, shared) = (self.clone(), *shared);
                // A task of its own, since others wait for the answer when this asker leaves.
                tokio::spawn(async move {
                    let reach = Reach {
                        redis: Some(&redis),
                        within: None,
                    };
                    let asked = clock::mono();
                    let found = this.look(id, this.touch_after(&shared), asked, reach).await;
                    let answer = match found {
                        Ok(found) => Ok(this.cache.learn(id, found, asked, era, &shared)),
                        Err(error) => {
                            this.cache.gave_up(id);
                            Err(error)
                        }
                    };
                    said.send_replace(Some(answer));
                });
                follow
            }
        };
        let within = reach.within.unwrap_or(Duration::MAX);
        let answer = match timeout(within, said.wait_for(Option::is_some)).await {
            Ok(Ok(answer)) => answer.clone(),
            // Its asker's thread has ended.
            Ok(Err(_)) => None,
            Err(_) => Some(Err(CallError::Timeout)),
        };
        answer.unwrap_or(Err(CallError::Down))
    }

    /// A use is written down that is this much later than the last one written.
    fn touch_after(&self, shared: &Shared) -> Option<Duration> {
        // Where no more uses can be noted, none is to be lost.
        let can_wait = self.cache.can_note(shared);
        Some(if can_wait {
            shared.touch_every
        } else {
            Duration::ZERO
        })
    }

    /// The session, last seen when Redis knows of its last use. `touch`: this is a use, and is written down by the rule of
    /// `session_find.lua`.
    async fn look(
        &self,
        id: SessionId,
        touch: Option<Duration>,
        used: Duration,
        reach: Reach<'_>,
    ) -> Result<Option<Session>, CallError> {
        let Some(tag) = id.user else { return Ok(None) };
        let (now, timeouts) = (clock::mono(), *self.timeouts.lock());
        let args = [
            Arg::Text(&id.field()),
            touch.map_or(Arg::Text("-1"), |touch| Arg::Int(millis(touch))),
            Arg::Int(millis(now.saturating_sub(used))),
            Arg::Int(millis(timeouts.absolute)),
            Arg::Int(millis(timeouts.idle)),
        ];
        let answer = self.run(&self.find, tag, &args, reach).await?;
        let [user, times @ .., claims] = &*answer else {
            return Ok(None);
        };
        session(id, read::text(user)?, times, claims, now).map(Some)
    }

    /// A live session by its id; not a use.
    pub(super) async fn show(
        &self,
        id: SessionId,
        reach: Reach<'_>,
    ) -> Result<Option<Session>, CallError> {
        self.look(id, None, clock::mono(), reach).await
    }

    /// Ends a session of a user, or all of them; which.
    pub(super) async fn end(
        &self,
        user: Option<UserTag>,
        one: Option<SessionId>,
        reach: Reach<'_>,
    ) -> Result<Vec<SessionId>, CallError> {
        // An id of a session in memory.
        let Some(tag) = user else {
            return Ok(Vec::new());
        };
        let (channel, begin) = (self.keys.sessions_ended(), self.begin(tag));
        let field = one.map(|id| id.field()).unwrap_or_default();
        let args = [Arg::Text(&channel), Arg::Text(&begin), Arg::Text(&field)];
        let ended = ids(tag, &self.run(&self.end, tag, &args, reach).await?)?;
        self.forget(&ended);
        // One that Redis has lost is over here, too.
        self.forget(one.as_slice());
        Ok(ended)
    }

    pub(super) async fn end_all(
        &self,
        user: &str,
        reach: Reach<'_>,
    ) -> Result<Vec<SessionId>, CallError> {
        self.end(Some(UserTag::new(user)), None, reach).await
    }

    /// About `limit` live sessions, of one user or of all. Those of all are found by a walk over all keys, in no order: a page
    /// may be empty though others follow, holds all sessions of each of its users, and one may be told twice. One that lives
    /// through all pages is told, unless slots or masters change meanwhile.
    pub(super) async fn list(
        &self,
        user: Option<&str>,
        limit: usize,
        after: Option<&str>,
        reach: Reach<'_>,
    ) -> Result<Listed, ListError> {
        let mut found = BTreeMap::new();
        let next = match user {
            Some(user) => {
                let cursor = after.unwrap_or("0");
                cursor.parse::<u64>().map_err(|_| ListError::After)?;
                let tag = UserTag::new(user);
                let next = self.list_part(tag, cursor, limit, reach, &mut found);
                Some(next.await?).filter(|next| next != "0")
            }
            None => {
                let place = after.map(|after| after.parse().map_err(|()| ListError::After));
                let next = self.list_all(limit, place.transpose()?, reach, &mut found);
                next.await?.map(|place| place.to_string())
            }
        };
        Ok(Listed {
            sessions: found.into_values().map(Arc::new).collect(),
            next,
        })
    }

    async fn list_all(
        &self,
        limit: usize,
        mut place: Option<ScanCursor>,
        reach: Reach<'_>,
        found: &mut BTreeMap<SessionId, Session>,
    ) -> Result<Option<ScanCursor>, CallError> {
        let redis = reach.redis.ok_or(CallError::Down)?;
        let within = reach.within.unwrap_or(redis.client().timeout);
        let pattern = self.keys.all_sessions(&self.name);
        for _ in 0..STEPS {
            let count = limit.max(STEP);
            let (keys, next) = redis.scan(place.as_ref(), &pattern, count, within).await?;
            let users = keys.iter().filter_map(|key| Keys::user_of(key));
            let parts = join_all(users.map(|tag| async move {
                let mut of_user = BTreeMap::new();
                let mut cursor = "0".to_owned();
                loop {
                    let part = self.list_part(tag, &cursor, STEP, reach, &mut of_user);
                    cursor = part.await?;
                    if cursor == "0" {
                        return Ok::<_, CallError>(of_user);
                    }
                }
            }));
            for part in parts.await {
                found.extend(part?);
            }
            place = next;
            if place.is_none() || found.len() >= limit {
                break;
            }
        }
        Ok(place)
    }

    /// Adds a part of a user's sessions; where the next one begins.
    async fn list_part(
        &self,
        tag: UserTag,
        cursor: &str,
        count: usize,
        reach: Reach<'_>,
        found: &mut BTreeMap<SessionId, Session>,
    ) -> Result<String, CallError> {
        let (now, timeouts) = (clock::mono(), *self.timeouts.lock());
        let args = [Arg::Text(cursor), Arg::Int(count as u64)];
        let answer = self.run(&self.list, tag, &args, reach).await?;
        let [next, user, sessions @ ..] = &*answer else {
            return Err(CallError::Nonsense);
        };
        let user = read::text(user)?;
        for record in sessions.chunks(6) {
            let [field, times @ .., claims] = record else {
                return Err(CallError::Nonsense);
            };
            let id =
                SessionId::of_field(tag, read::text(field)?).map_err(|_| CallError::Nonsense)?;
            let session = session(id, user, times, claims, now)?;
            session.shorten(timeouts);
            if !session.is_expired(now) {
                found.insert(id, session);
            }
        }
        read::text(next).map(str::to_owned)
    }

    /// Writes down the uses that are due by `until`, until one cannot be written.
    pub async fn write_uses(&self, shared: &Shared, redis: &Arc<Connections>, until: Duration) {
        let reach = Reach {
            redis: Some(redis),
            within: Some(WRITE_AGAIN),
        };
        loop {
            let due = self.cache.unwritten(until, WRITES);
            let all = due.len() < WRITES;
            let written = join_all(due.iter().map(|session| async move {
                let used = session.last_seen();
                let answer = self.look(session.id, Some(Duration::ZERO), used, reach);
                let answer = answer.await;
                let now = clock::mono();
                // What is over needs no more telling.
                let again = answer.is_err() && !session.is_expired(now);
                let again = again.then_some(now + WRITE_AGAIN);
                self.cache.wrote(session, used, again, shared);
                if let Ok(None) = answer {
                    self.cache
                        .forget(session.id, now + shared.cache.negative_ttl);
                }
                answer.is_ok()
            }))
            .await;
            // What could not be written is due again before `until` may be over.
            if all || written.contains(&false) {
                return;
            }
        }
    }

    /// Lets go of what a message of [`Keys::sessions_ended`] says has ended, if it is for these sessions.
    pub fn heard(&self, message: &str, watchers: &Watchers) {
        let mut words = message.split(' ');
        if words.next() != Some(&*self.name) {
            return;
        }
        let Some(tag) = words.next().and_then(UserTag::parse) else {
            return;
        };
        let ended: Vec<_> = words
            .filter_map(|field| SessionId::of_field(tag, field).ok())
            .collect();
        self.forget(&ended);
        ended.iter().for_each(|id| watchers.end(*id));
    }

    fn forget(&self, ended: &[SessionId]) {
        // No session begins under an id that was one before.
        let until = clock::mono() + Duration::from_secs(1);
        ended.iter().for_each(|id| self.cache.forget(*id, until));
    }

    /// How messages of this user's sessions begin.
    fn begin(&self, tag: UserTag) -> String {
        format!("{} {}", self.name, tag.as_str())
    }

    async fn run(
        &self,
        script: &Script,
        tag: UserTag,
        args: &[Arg<'_>],
        reach: Reach<'_>,
    ) -> Result<Vec<Value>, CallError> {
        let redis = reach.redis.ok_or(CallError::Down)?;
        let within = reach.within.unwrap_or(redis.client().timeout);
        let key = self.keys.sessions(&self.name, tag);
        read::list(redis.run_within(within, script, &[&key], args).await?)
    }
}

impl fmt::Debug for SharedSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedSessions({})", self.name)
    }
}

/// The session that a token is of, if it is a token at all.
pub(super) fn id_of_token(token: &str) -> Option<SessionId> {
    let is_base64url = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if token.len() != TOKEN_CHARS || !token.bytes().all(is_base64url) {
        return None;
    }
    Some(id_of(UserTag::parse(&token[..UserTag::CHARS])?, token))
}

/// The hash is of the characters, not of the bytes that they stand for: base64 can be written in several ways, a token in one.
fn id_of(user: UserTag, token: &str) -> SessionId {
    let mut hash = [0; 16];
    hash.copy_from_slice(&Sha256::digest(token.as_bytes())[..16]);
    SessionId {
        hash,
        user: Some(user),
    }
}

/// A session from what a script tells of it: `times` are durations from and to `now`, the moment of the call.
fn session(
    id: SessionId,
    user: &str,
    times: &[Value],
    claims: &Value,
    now: Duration,
) -> Result<Session, CallError> {
    let [age, left, idle, unseen] = times else {
        return Err(CallError::Nonsense);
    };
    let times = Times {
        created: now.saturating_sub(span(age)?),
        ends: now.saturating_add(span(left)?),
        idle_timeout: span(idle)?,
        last_seen: now.saturating_sub(span(unseen)?),
    };
    let claims = match read::text(claims)? {
        "" => Claims::new(),
        json => serde_json::from_str(json).map_err(|_| CallError::Nonsense)?,
    };
    Ok(Session::resumed(id, user.to_owned(), claims, times))
}

fn ids(user: UserTag, fields: &[Value]) -> Result<Vec<SessionId>, CallError> {
    let id = |field| SessionId::of_field(user, read::text(field)?).map_err(|_| CallError::Nonsense);
    fields.iter().map(id).collect()
}

fn span(value: &Value) -> Result<Duration, CallError> {
    read::number(value).map(Duration::from_millis)
}
