//! How a limit is asked of Redis: keys and arguments of the scripts, and what they answer. Owns the guess at Redis's clock
//! that picks a calendar window. Must not know who waits for the answer.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use crate::clock;
use crate::config::limits::{MAX_RULES, Period, Window, Windows};
use crate::event::Micros;
use crate::keys::{KeyTag, Keys};
use crate::policy::lease::{Grant, Refusal, Request, RuleState};
use crate::policy::limit;
use crate::store::redis::{Arg, CallError, Connections, Script, Value};

/// What a script says of a rule that can never grant what is asked.
const NEVER: i64 = -1;

/// More than this a script cannot count one by one: a limit above it counts as this, and a window in microseconds as well.
const MOST: u64 = 1 << 53;

/// Asks the scripts of rate limits.
#[derive(Debug)]
pub struct Grants {
    keys: Keys,
    bucket: Script,
    sliding: Script,
    fixed: Script,
    /// How far Redis's clock is ahead of this process's, in microseconds, as it was last seen. Which window it is is decided by
    /// Redis; this only spares a second question.
    ahead: AtomicI64,
}

impl Grants {
    pub fn new(keys: Keys) -> Grants {
        Grants {
            keys,
            bucket: Script::new(include_str!("../../../lua/rate_limit_bucket.lua")),
            sliding: Script::new(include_str!("../../../lua/rate_limit_sliding.lua")),
            fixed: Script::new(include_str!("../../../lua/rate_limit_fixed.lua")),
            ahead: AtomicI64::new(0),
        }
    }

    /// Asks for tokens of all windows of a limit, for the key of `tag`; the answer is waited for until `deadline`.
    pub async fn ask(
        &self,
        redis: &Connections,
        tag: KeyTag,
        windows: &Windows,
        request: &Request,
        deadline: Instant,
    ) -> Result<Grant, CallError> {
        // A first answer may only have set the clock right.
        for _ in 0..2 {
            let answer = self
                .ask_once(redis, tag, windows, request, deadline)
                .await?;
            if let Answer::Granted(grant) = answer {
                return Ok(grant);
            }
        }
        Err(CallError::Nonsense)
    }

    /// Forgets what was counted for a key; whether there was anything.
    pub async fn forget(
        &self,
        redis: &Connections,
        tag: KeyTag,
        windows: &Windows,
    ) -> Result<bool, CallError> {
        let keys = self.counters(tag, windows);
        let keys: SmallVec<[&str; 4]> = keys.iter().map(String::as_str).collect();
        redis.delete(&keys).await.map(|deleted| deleted > 0)
    }

    async fn ask_once(
        &self,
        redis: &Connections,
        tag: KeyTag,
        windows: &Windows,
        request: &Request,
        deadline: Instant,
    ) -> Result<Answer, CallError> {
        let keys = self.counters(tag, windows);
        let keys: SmallVec<[&str; 4]> = keys.iter().map(String::as_str).collect();
        let mut args = SmallVec::<[Arg<'_>; 14]>::new();
        args.extend([
            Arg::Int(request.first),
            Arg::Int(request.need),
            Arg::Int(request.want),
            Arg::Float(request.share),
            Arg::Int(request.back.tokens),
            Arg::Int(request.back.taken_at),
        ]);
        let now = self.redis_now();
        for window in windows.iter() {
            match *window {
                // Nothing ever comes back to a bucket without a rate: it is as one without a burst.
                Window::Bucket { count: 0, .. } => args.extend([Arg::Float(1.0), Arg::Int(0)]),
                Window::Bucket { count, per, burst } => {
                    let interval = per.as_nanos() as f64 / 1000.0 / count as f64;
                    args.extend([Arg::Float(interval), Arg::Int(burst.min(MOST))]);
                }
                Window::Sliding { limit, window } => {
                    let window = Micros::from(window).0.clamp(1, MOST / 2);
                    args.extend([Arg::Int(limit.min(MOST)), Arg::Int(window)]);
                }
                Window::Fixed { limit, period } => {
                    let window = limit::window_at(period, now)
                        .map(|window| Arg::Int(Micros::from(window).0));
                    args.push(Arg::Int(limit.min(MOST)));
                    args.extend(window);
                }
            }
        }
        let script = match windows.first {
            Window::Bucket { .. } => &self.bucket,
            Window::Sliding { .. } => &self.sliding,
            Window::Fixed { .. } => &self.fixed,
        };
        let budget = deadline.saturating_duration_since(clock::now());
        let answer = redis.run_within(budget, script, &keys, &args).await?;
        let answer = read(&answer, windows).ok_or(CallError::Nonsense)?;
        let (at, answer) = answer;
        let ahead = i128::from(at) - i128::from(Micros::from(clock::wall()).0);
        self.ahead
            .store(i64::try_from(ahead).unwrap_or(0), Ordering::Relaxed);
        Ok(answer)
    }

    fn counters(&self, tag: KeyTag, windows: &Windows) -> SmallVec<[String; 1]> {
        let numbered = windows.numbered().take(MAX_RULES);
        let counter = |(number, window)| self.keys.counter(tag, number, &kind(window));
        numbered.map(counter).collect()
    }

    /// What time it is at Redis, about.
    fn redis_now(&self) -> Duration {
        let ahead = self.ahead.load(Ordering::Relaxed);
        let wall = i128::from(Micros::from(clock::wall()).0) + i128::from(ahead);
        Duration::from_micros(u64::try_from(wall).unwrap_or(0))
    }
}

enum Answer {
    Granted(Grant),
    /// Redis's clock is in none of the windows it was told of.
    WrongWindow,
}

/// Rules of other kinds, or with windows of other lengths, share no counter: what one means is nonsense to the other.
fn kind(window: &Window) -> String {
    match window {
        Window::Bucket { per, .. } => format!("b{}", Period::Fixed(*per)),
        Window::Sliding { window, .. } => format!("s{}", Micros::from(*window).0),
        Window::Fixed { period, .. } => format!("f{period}"),
    }
}

/// `[granted, now, remaining, reset, wait, void, …]`, the last four for each rule; what it says and when, in microseconds
/// since the Unix epoch.
fn read(answer: &Value, windows: &Windows) -> Option<(u64, Answer)> {
    let Value::Array(answer) = answer else {
        return None;
    };
    let [granted, now, of_rules @ ..] = answer.as_slice() else {
        return None;
    };
    let now = u64::try_from(integer(now)?).ok()?;
    let Ok(tokens) = u64::try_from(integer(granted)?) else {
        return Some((now, Answer::WrongWindow));
    };
    if of_rules.len() != 4 * windows.count() {
        return None;
    }
    let state = |(of_rule, window): (&[Value], &Window)| {
        let [remaining, reset, wait, void] = of_rule else {
            return None;
        };
        let time = |value| Some(Duration::from_micros(u64::try_from(integer(value)?).ok()?));
        let refusal = match integer(wait)? {
            NEVER => Some(Refusal::Ever),
            0 => None,
            _ => Some(Refusal::For(time(wait)?)),
        };
        let void = matches!(window, Window::Fixed { .. }).then(|| time(void));
        Some(RuleState {
            remaining: u64::try_from(integer(remaining)?).ok()?,
            reset: time(reset)?,
            refusal,
            void_after: match void {
                Some(void) => Some(void?),
                None => None,
            },
        })
    };
    let rules = of_rules.chunks(4).zip(windows.iter()).map(state);
    let grant = Grant {
        tokens,
        at: now,
        rules: rules.collect::<Option<_>>()?,
    };
    Some((now, Answer::Granted(grant)))
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        _ => None,
    }
}
