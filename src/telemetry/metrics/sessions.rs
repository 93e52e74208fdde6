//! Metrics of sessions, in memory and in Redis.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;

/// Of all entries of `sessions`.
#[derive(Debug)]
pub struct SessionFamilies {
    checks: Family<OutcomeLabels, Counter>,
    events: Family<EventLabels, Counter>,
    held: Family<EntryLabels, Gauge>,
    lookups: Family<OutcomeLabels, Counter>,
    /// In Redis, as the last sweep met them.
    live: Family<EntryLabels, Gauge>,
    users: Family<EntryLabels, Gauge>,
    swept: Family<EntryLabels, Counter>,
}

/// The handles of one entry of `sessions`.
#[derive(Debug, Clone)]
pub struct SessionMetrics {
    /// A live session with the claims that the route asks for.
    pub valid: Counter,
    /// No token.
    pub missing: Counter,
    /// A token of no live session.
    pub unknown: Counter,
    /// Without a claim that the route asks for.
    pub forbidden: Counter,
    pub created: Counter,
    /// Made room for a new one of the same user.
    pub evicted: Counter,
    /// By the upstream, or by an operator.
    pub ended: Counter,
    pub expired: Counter,
    /// Not started: the user's maximum, or the bound of memory.
    pub refused: Counter,
    pub held: Gauge,
    /// What became of looks at sessions in Redis: known by this process,
    pub remembered: Counter,
    /// asked of Redis,
    pub asked: Counter,
    /// answered by a call that another request made,
    pub waited: Counter,
    /// not answered, so that what was known holds for the grace,
    pub grace: Counter,
    /// not answered, and nothing was known.
    pub unanswered: Counter,
}

/// What sweeps of one entry of `sessions` in Redis met.
#[derive(Debug, Clone)]
pub struct SweepMetrics {
    pub live: Gauge,
    pub users: Gauge,
    /// Were over, and are removed.
    pub swept: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    sessions: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    sessions: String,
    event: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EntryLabels {
    sessions: String,
}

impl SessionFamilies {
    pub(super) fn register(registry: &mut Registry) -> SessionFamilies {
        SessionFamilies {
            checks: add(
                registry,
                "session_checks",
                "Requests to routes with sessions, by what was found",
            ),
            events: add(registry, "session_events", "Sessions that began or ended"),
            held: add(
                registry,
                "sessions_held",
                "Sessions in memory; with redis, those that are remembered",
            ),
            lookups: add(
                registry,
                "session_lookups",
                "Looks at sessions in redis, by where the answer came from",
            ),
            live: add(
                registry,
                "sessions_live",
                "Sessions in redis that live, as the last sweep counted them",
            ),
            users: add(
                registry,
                "session_users",
                "Users with live sessions in redis, as the last sweep counted them",
            ),
            swept: add(
                registry,
                "sessions_swept",
                "Sessions in redis that were over and that a sweep removed",
            ),
        }
    }

    /// The handles of the entry of this name.
    pub fn of(&self, entry: &str) -> SessionMetrics {
        let of = |family: &Family<OutcomeLabels, Counter>, outcome| {
            family.get_or_create_owned(&OutcomeLabels {
                sessions: entry.to_owned(),
                outcome,
            })
        };
        let check = |outcome| of(&self.checks, outcome);
        let look = |outcome| of(&self.lookups, outcome);
        let event = |event| {
            self.events.get_or_create_owned(&EventLabels {
                sessions: entry.to_owned(),
                event,
            })
        };
        SessionMetrics {
            remembered: look("remembered"),
            asked: look("asked"),
            waited: look("waited"),
            grace: look("grace"),
            unanswered: look("unanswered"),
            valid: check("valid"),
            missing: check("missing"),
            unknown: check("unknown"),
            forbidden: check("forbidden"),
            created: event("created"),
            evicted: event("evicted"),
            ended: event("ended"),
            expired: event("expired"),
            refused: event("refused"),
            held: self.held.get_or_create_owned(&labels(entry)),
        }
    }

    /// Takes out what says how an entry is now. What was counted stays.
    pub fn forget(&self, entry: &str) {
        self.held.remove(&labels(entry));
    }

    /// Likewise, of what the last sweep over it in Redis found.
    pub fn forget_swept(&self, entry: &str) {
        let labels = labels(entry);
        self.live.remove(&labels);
        self.users.remove(&labels);
    }

    /// The handles of the sweeps over an entry in Redis.
    pub fn sweep(&self, entry: &str) -> SweepMetrics {
        let labels = labels(entry);
        SweepMetrics {
            live: self.live.get_or_create_owned(&labels),
            users: self.users.get_or_create_owned(&labels),
            swept: self.swept.get_or_create_owned(&labels),
        }
    }
}

fn labels(entry: &str) -> EntryLabels {
    EntryLabels {
        sessions: entry.to_owned(),
    }
}
