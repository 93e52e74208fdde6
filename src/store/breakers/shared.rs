//! A shared breaker's calls of Redis: arguments of the scripts, what they answer and what the channel says. The states are
//! `policy::breaker::shared`'s. Must not be on a request's way.

use std::sync::LazyLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{LiveBreaker, Sharing};
use crate::clock;
use crate::config::breakers::{Settings, Window};
use crate::policy::breaker::State;
use crate::policy::breaker::shared::{Change, HOLD, Reply, Report, SLOT_GRACE, Word};
use crate::store::redis::{Arg, CallError, Connections, Script, Value, read};

/// No request waits for it.
const BUDGET: Duration = Duration::from_millis(300);

static SYNC: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../../../lua/breaker_sync.lua")));
static FORCE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("../../../lua/breaker_force.lua")));

/// What an operator makes of a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forced {
    Open,
    Closed,
    /// Closed, with nothing seen yet, and free to open.
    Reset,
}

impl Forced {
    fn state(self) -> State {
        match self {
            Forced::Open => State::ForcedOpen,
            Forced::Closed => State::ForcedClosed,
            Forced::Reset => State::Closed,
        }
    }
}

impl LiveBreaker {
    /// Reports and learns, and says if that changed by what this process goes.
    pub async fn sync(
        &self,
        sharing: &Sharing,
        redis: &Connections,
        process: &str,
    ) -> Option<Change> {
        let report = self.with_member(|member| member.report(clock::mono()))?;
        let answer = self.tell(sharing, redis, process, &report).await;
        let now = clock::mono();
        let change = self.with_member(|member| match &answer {
            Ok(reply) => member.answered(reply, now),
            // What the server refused it has not done; all else it may have.
            Err(error) => member.unanswered(!matches!(error, CallError::Refused(_)), now),
        });
        sharing.tried.store(true, Ordering::Release);
        self.say_shared(now);
        change.flatten()
    }

    async fn tell(
        &self,
        sharing: &Sharing,
        redis: &Connections,
        process: &str,
        report: &Report,
    ) -> Result<Reply, CallError> {
        let keys = &sharing.keys;
        let all = [
            &*keys.state,
            &*keys.window,
            &*keys.members,
            &*keys.doubters,
            &*keys.probes,
        ];
        let settings = &self.settings.settings;
        let (kind, size) = match settings.window {
            Window::Time(length) => ("t", millis(length).max(1)),
            Window::Count(size) => ("c", u64::from(size.max(1))),
        };
        let held: Vec<_> = report.held.iter().map(ToString::to_string).collect();
        let mark = |well: &bool| if *well { '+' } else { '-' };
        let results = report.results.iter();
        let results: Vec<_> = results
            .map(|(id, well)| format!("{id}{}", mark(well)))
            .collect();
        let (held, results) = (held.join(","), results.join(","));
        let flag = |flag: bool| Arg::Int(u64::from(flag));
        let Settings {
            minimum_calls,
            failure_rate,
            consecutive_failures,
            half_open,
            ..
        } = settings;
        let minimum_calls = match settings.window {
            Window::Time(_) => (*minimum_calls).max(1),
            Window::Count(size) => (*minimum_calls).clamp(1, size.max(1)),
        };
        let slot = HOLD + half_open.probe_timeout + SLOT_GRACE;
        let args = [
            Arg::Text(process),
            Arg::Int(report.known.generation),
            Arg::Text(report.known.state.as_str()),
            Arg::Int(millis(report.known.left)),
            Arg::Int(report.delta.calls),
            Arg::Int(report.delta.failures),
            Arg::Int(report.delta.slow),
            flag(report.delta.succeeded),
            Arg::Int(report.delta.trailing),
            Arg::Int(report.doubts),
            Arg::Int(u64::from(report.want)),
            flag(report.demanded),
            Arg::Text(&held),
            Arg::Text(&results),
            Arg::Text(kind),
            Arg::Int(size),
            Arg::Int(u64::from(minimum_calls)),
            Arg::Float(*failure_rate),
            Arg::Int(u64::from(*consecutive_failures)),
            Arg::Float(settings.slow_call.map_or(-1.0, |slow| slow.rate)),
            Arg::Int(u64::from(self.settings.quorum.get())),
            Arg::Int(millis(settings.open_for)),
            Arg::Int(millis(settings.max_open_for.max(settings.open_for))),
            Arg::Float(settings.jitter * fastrand::f64()),
            Arg::Int(u64::from(half_open.probes.max(1))),
            Arg::Float(half_open.success_rate),
            Arg::Int(millis(slot)),
            Arg::Int(millis(settings.recover_over)),
            Arg::Int(report.last_slot),
            Arg::Text(&sharing.channel),
            Arg::Text(&keys.tag),
            Arg::Float(settings.jitter),
            Arg::Int(report.peers),
        ];
        let answer = redis.run_within(BUDGET, &SYNC, &all, &args).await?;
        reply(answer)
    }

    /// Makes it so for all processes that share the breaker.
    pub async fn force_all(
        &self,
        sharing: &Sharing,
        redis: &Connections,
        forced: Forced,
    ) -> Result<(), CallError> {
        let keys = &sharing.keys;
        let all = [&*keys.state, &*keys.doubters, &*keys.probes];
        let known = self.with_member(|member| member.generation());
        let args = [
            Arg::Text(forced.state().as_str()),
            Arg::Int(known.unwrap_or_default()),
            Arg::Text(&sharing.channel),
            Arg::Text(&keys.tag),
        ];
        let answer = redis.run_within(BUDGET, &FORCE, &all, &args).await?;
        let generation = read::number(&answer)?;
        self.heard(Word {
            generation,
            state: forced.state(),
            left: Duration::ZERO,
        });
        Ok(())
    }

    /// A message told of a transition.
    pub fn heard(&self, word: Word) {
        let now = clock::mono();
        let wake = self.with_member(|member| member.heard(word, now));
        // Of an opening by the next answer, which has the calls that led to it.
        if word.state != State::Open {
            self.say_shared(now);
        }
        if let Some(sharing) = self.sharing() {
            sharing.wake_if(wake == Some(true));
        }
    }
}

/// A message of the channel: the tag of a breaker, and what it says.
pub fn message(payload: &[u8]) -> Option<(&str, Word)> {
    let mut parts = std::str::from_utf8(payload).ok()?.split(' ');
    let tag = parts.next()?;
    let word = Word {
        generation: parts.next()?.parse().ok()?,
        state: State::named(parts.next()?)?,
        left: Duration::from_millis(parts.next()?.parse().ok()?),
    };
    Some((tag, word))
}

fn reply(answer: Value) -> Result<Reply, CallError> {
    let answer = read::list(answer)?;
    let [
        generation,
        state,
        left,
        calls,
        failures,
        slow,
        processes,
        doubters,
        recall,
        starved,
        last_slot,
        probes @ ..,
    ] = answer.as_slice()
    else {
        return Err(CallError::Nonsense);
    };
    Ok(Reply {
        word: Word {
            generation: read::number(generation)?,
            state: State::named(read::text(state)?).ok_or(CallError::Nonsense)?,
            left: Duration::from_millis(read::number(left)?),
        },
        calls: read::number(calls)?,
        failures: read::number(failures)?,
        slow: read::number(slow)?,
        processes: read::number(processes)?,
        doubters: read::number(doubters)?,
        recall: read::is_one(recall)?,
        starved: read::is_one(starved)?,
        last_slot: read::number(last_slot)?,
        probes: probes.iter().map(read::number).collect::<Result<_, _>>()?,
    })
}

/// Up, so that what is not nothing does not become so. At most what a number of Lua holds exactly, with a time added.
fn millis(duration: Duration) -> u64 {
    const MOST: u128 = 1 << 50;
    let millis = duration.as_nanos().div_ceil(1_000_000).min(MOST);
    u64::try_from(millis).unwrap_or(u64::MAX)
}
