//! The sessions of one entry of `sessions:`, as lanes, the worker and the admin port share them: in this process's memory, or
//! in Redis. What a session means is `policy::session`'s. Owns who is to be told of a session's end; must not read HTTP.

mod cache;
mod memory;
mod shared;
mod sweep;
mod watch;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use memory::Sessions;
pub use shared::SharedSessions;
pub use sweep::{Sweeper, Swept};
pub use watch::{Watch, Watchers};

use super::redis::{CallError, Connections};
use crate::clock;
use crate::config::sessions::{Claims, Settings, Shared};
use crate::policy::session::{Session, SessionId, Timeouts};
use crate::telemetry::metrics::sessions::SessionMetrics;
use cache::Recalled;

/// The sessions of one entry of the configuration.
#[derive(Debug, Clone)]
pub struct LiveSessions {
    pub name: String,
    pub settings: Settings,
    pub shared: Shared,
    pub store: Store,
    /// Connections that are to end with their session.
    pub watchers: Arc<Watchers>,
    pub metrics: SessionMetrics,
}

/// Where sessions are kept.
#[derive(Debug, Clone)]
pub enum Store {
    Memory(Arc<Sessions>),
    Redis(Arc<SharedSessions>),
}

/// How the one who asks reaches Redis.
#[derive(Debug, Clone, Copy)]
pub struct Reach<'a> {
    /// Its own; `None` where the file has no `redis`.
    pub redis: Option<&'a Arc<Connections>>,
    /// For a call; `None`: as on the way of a request.
    pub within: Option<Duration>,
}

/// What is known of a token without asking anyone.
#[derive(Debug)]
pub enum Known {
    Session(Arc<Session>),
    Nobody,
    /// Redis is to be asked.
    Ask(SessionId),
}

/// A new session; the only time that its token is seen.
#[derive(Debug)]
pub struct Created {
    pub token: Token,
    pub session: Arc<Session>,
    /// The user's sessions that had to go for it, oldest first.
    pub evicted: Vec<SessionId>,
}

/// A token: characters of base64url, of which 43 stand for 256 random bits; in Redis the tag of the user goes before them.
/// Whoever has it is the user, so `Debug` hides it.
pub struct Token(String);

/// Why no session was created. Nothing was evicted, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CreateError {
    #[error("the user has as many sessions as allowed")]
    MaxReached,
    #[error("the store has as many sessions as allowed; raise max_sessions")]
    Full,
    #[error("the system gives no random bytes: {0}")]
    Random(getrandom::Error),
    #[error("sessions are in redis: {0}")]
    Store(#[from] CallError),
}

/// Why there is no list.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ListError {
    #[error("\"after\" is the \"next\" of a page before")]
    After,
    #[error("sessions are in redis: {0}")]
    Store(#[from] CallError),
}

/// A part of a list.
#[derive(Debug)]
pub struct Listed {
    pub sessions: Vec<Arc<Session>>,
    /// Where the next part begins; `None`: this was the last.
    pub next: Option<String>,
}

impl LiveSessions {
    /// What is known of a token without I/O. A session that is found was used.
    pub fn recall(&self, token: &str, now: Duration) -> Known {
        match &self.store {
            Store::Memory(store) => store.find(token, now).map_or(Known::Nobody, Known::Session),
            Store::Redis(store) => {
                // What is no token of weir's is not worth a call.
                let Some(id) = shared::id_of_token(token) else {
                    return Known::Nobody;
                };
                let known = store.cache.recall(id, &self.shared, now);
                if !matches!(known, Recalled::NotKnown) {
                    self.metrics.remembered.inc();
                }
                match known {
                    Recalled::Session(session) => Known::Session(session),
                    Recalled::Nobody => Known::Nobody,
                    Recalled::NotKnown => Known::Ask(id),
                }
            }
        }
    }

    /// What the session is called that a token is of, if it is a token at all; whether there is one is not looked at.
    pub fn id_of(&self, token: &str) -> Option<SessionId> {
        match &self.store {
            Store::Memory(_) => memory::id_of_token(token),
            Store::Redis(_) => shared::id_of_token(token),
        }
    }

    /// Asks Redis about a token of which nothing is known; calls about one token at a time are one call. Without an answer,
    /// what was known holds for the grace. A session that is found was used.
    pub async fn ask(
        &self,
        id: SessionId,
        reach: Reach<'_>,
    ) -> Result<Option<Arc<Session>>, CallError> {
        let Store::Redis(store) = &self.store else {
            return Ok(None);
        };
        let answer = store.ask(id, reach, &self.shared, &self.metrics).await;
        answer.or_else(|error| {
            let old = store.cache.recall_old(id, &self.shared, clock::mono());
            match old {
                Some(session) => {
                    self.metrics.grace.inc();
                    Ok(Some(session))
                }
                None => {
                    self.metrics.unanswered.inc();
                    Err(error)
                }
            }
        })
    }

    /// Starts a session. The user's maximum is kept whoever else starts one.
    ///
    /// The token is always a new one, never one that a client brought: that is what keeps a session from being fixed (OWASP
    /// Session Management, "Renew the Session ID After Any Privilege Level Change"). A caller ends the old session itself.
    pub async fn create(
        &self,
        user: String,
        claims: Claims,
        reach: Reach<'_>,
    ) -> Result<Created, CreateError> {
        let created = match &self.store {
            Store::Memory(store) => store.create(&self.settings, user, claims, clock::mono()),
            Store::Redis(store) => {
                let (settings, shared) = (&self.settings, &self.shared);
                store.create(settings, shared, user, claims, reach).await
            }
        };
        match &created {
            Ok(created) => {
                self.metrics.created.inc();
                self.metrics.evicted.inc_by(created.evicted.len() as u64);
                created.evicted.iter().for_each(|id| self.watchers.end(*id));
            }
            Err(CreateError::MaxReached | CreateError::Full) => drop(self.metrics.refused.inc()),
            Err(CreateError::Random(_) | CreateError::Store(_)) => {}
        }
        created
    }

    /// Ends a session; whether there was one.
    pub async fn revoke(&self, id: SessionId, reach: Reach<'_>) -> Result<bool, CallError> {
        let ended = match &self.store {
            Store::Memory(store) => store.revoke(id).is_some(),
            Store::Redis(store) => !store.end(id.user, Some(id), reach).await?.is_empty(),
        };
        self.ended([id], usize::from(ended));
        Ok(ended)
    }

    /// Ends all sessions of a user; how many there were.
    pub async fn revoke_user(&self, user: &str, reach: Reach<'_>) -> Result<usize, CallError> {
        let ended = match &self.store {
            Store::Memory(store) => store.revoke_user(user),
            Store::Redis(store) => store.end_all(user, reach).await?,
        };
        let count = ended.len();
        self.ended(ended, count);
        Ok(count)
    }

    fn ended(&self, ids: impl IntoIterator<Item = SessionId>, count: usize) {
        ids.into_iter().for_each(|id| self.watchers.end(id));
        self.metrics.ended.inc_by(count as u64);
    }

    /// A live session by its id. Not a use.
    pub async fn show(
        &self,
        id: SessionId,
        reach: Reach<'_>,
    ) -> Result<Option<Arc<Session>>, CallError> {
        match &self.store {
            Store::Memory(store) => Ok(store.show(id, clock::mono())),
            Store::Redis(store) => Ok(store.show(id, reach).await?.map(Arc::new)),
        }
    }

    /// About `limit` live sessions, of one user or of all, from where the page before said. A session that lives while all
    /// pages are read is in one of them; see [`SharedSessions::list`] for Redis. Not a use.
    pub async fn list(
        &self,
        user: Option<&str>,
        limit: usize,
        after: Option<&str>,
        reach: Reach<'_>,
    ) -> Result<Listed, ListError> {
        match &self.store {
            Store::Memory(store) => {
                let after = after.map(|id| id.parse().map_err(|_| ListError::After));
                let page = store.list(user, limit, after.transpose()?, clock::mono());
                Ok(Listed {
                    sessions: page.sessions,
                    next: page.next.map(|id| id.to_string()),
                })
            }
            Store::Redis(store) => store.list(user, limit, after, reach).await,
        }
    }

    /// A look-out for the end of a session.
    pub fn watch(&self, id: SessionId) -> Watch {
        self.watchers.watch(id)
    }

    /// How many are held in memory; with Redis, how many are remembered.
    pub fn held(&self) -> usize {
        match &self.store {
            Store::Memory(store) => store.count(),
            Store::Redis(store) => store.cache.len(),
        }
    }

    /// Goes over to what a reload has changed. Timeouts that it made shorter are those of sessions that live, too.
    pub fn take_up(&self, max_sessions: usize) {
        let timeouts = Timeouts::of(&self.settings);
        match &self.store {
            Store::Memory(store) => {
                store.set_max(max_sessions);
                store.shorten(timeouts);
            }
            Store::Redis(store) => {
                store.cache.set_max(self.shared.cache.max_entries);
                store.set_timeouts(timeouts);
            }
        }
    }
}

impl Token {
    fn new(text: String) -> Token {
        Token(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}
