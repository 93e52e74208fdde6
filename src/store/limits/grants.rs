//! How a limit is asked of Redis: keys and arguments of the scripts, and what they answer. Owns the guess at Redis's clock
//! that picks a calendar window. Must not know who waits for the answer.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use crate::clock;
use crate::config::limits::{MAX_RULES, Window, Windows};
use crate::event::Micros;
use crate::keys::{KeyTag, Keys};
use crate::policy::lease::{Grant, Refusal, Request, RuleState};
use crate::policy::limit;
use crate::store::redis::{CallError, Connections, Doubles, Script, Value};

/// The script that grants tokens of buckets.
pub const BUCKET: &str = concat!(
    include_str!("../../../lua/rate_limit_bucket.lua"),
    include_str!("../../../lua/rate_limit_each.lua")
);
/// For sliding windows.
pub const SLIDING: &str = concat!(
    include_str!("../../../lua/rate_limit_sliding.lua"),
    include_str!("../../../lua/rate_limit_each.lua")
);
/// For fixed windows.
pub const FIXED: &str = concat!(
    include_str!("../../../lua/rate_limit_fixed.lua"),
    include_str!("../../../lua/rate_limit_each.lua")
);

/// What a script says of a rule that can never grant what is asked.
const NEVER: f64 = -1.0;
/// What it grants when Redis's clock is in none of the windows it was told of.
const WRONG_WINDOW: f64 = -1.0;

/// More than this a script cannot count one by one: a limit above it counts as this, and a window in microseconds as well.
const MOST: u64 = 1 << 53;

/// Asks the scripts of rate limits.
#[derive(Debug)]
pub struct Grants {
    keys: Keys,
    bucket: Arc<Script>,
    sliding: Arc<Script>,
    fixed: Arc<Script>,
    /// How far Redis's clock is ahead of this process's, in microseconds, as it was last seen. Which window it is is decided by
    /// Redis; this only spares a second question.
    ahead: AtomicI64,
}

impl Grants {
    pub fn new(keys: Keys) -> Grants {
        let script = |code| Arc::new(Script::new(code));
        Grants {
            keys,
            bucket: script(BUCKET),
            sliding: script(SLIDING),
            fixed: script(FIXED),
            ahead: AtomicI64::new(0),
        }
    }

    /// Asks for tokens of all windows of a limit, for the key of `tag`; the answer is waited for until `deadline`.
    pub async fn ask(
        &self,
        redis: &Arc<Connections>,
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
        redis: &Arc<Connections>,
        tag: KeyTag,
        windows: &Windows,
        request: &Request,
        deadline: Instant,
    ) -> Result<Answer, CallError> {
        let mut args = Doubles::default();
        args.extend([
            request.first as f64,
            request.need as f64,
            request.want as f64,
            request.share,
            request.back.tokens as f64,
            request.back.taken_at as f64,
        ]);
        let now = self.redis_now();
        for window in windows.iter() {
            match *window {
                // Nothing ever comes back to a bucket without a rate: it is as one without a burst.
                Window::Bucket { count: 0, .. } => args.extend([1.0, 0.0]),
                Window::Bucket { count, per, burst } => {
                    let interval = per.as_nanos() as f64 / 1000.0 / count as f64;
                    args.extend([interval, burst.min(MOST) as f64]);
                }
                Window::Sliding { limit, window } => {
                    let window = Micros::from(window).0.clamp(1, MOST / 2);
                    args.extend([limit.min(MOST) as f64, window as f64]);
                }
                Window::Fixed { limit, period } => {
                    args.push(limit.min(MOST) as f64);
                    let window = limit::window_at(period, now);
                    args.extend(window.map(|time| Micros::from(time).0 as f64));
                }
            }
        }
        let script = match windows.first {
            Window::Bucket { .. } => &self.bucket,
            Window::Sliding { .. } => &self.sliding,
            Window::Fixed { .. } => &self.fixed,
        };
        let keys = self.counters(tag, windows);
        let answer = redis.run_joined(script, keys, args, deadline).await?;
        let answer = read(&answer, windows).ok_or(CallError::Nonsense)?;
        let (at, answer) = answer;
        let ahead = i128::from(at) - i128::from(Micros::from(clock::wall()).0);
        self.ahead
            .store(i64::try_from(ahead).unwrap_or(0), Ordering::Relaxed);
        Ok(answer)
    }

    fn counters(&self, tag: KeyTag, windows: &Windows) -> SmallVec<[String; 1]> {
        let numbered = windows.numbered().take(MAX_RULES);
        let counter = |(number, window)| self.keys.counter(tag, number, Kind(window));
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
struct Kind<'a>(&'a Window);

impl fmt::Display for Kind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Window::Bucket { per, .. } => write!(f, "t{}", Micros::from(*per).0),
            Window::Sliding { window, .. } => write!(f, "s{}", Micros::from(*window).0),
            Window::Fixed { period, .. } => write!(f, "f{period}"),
        }
    }
}

/// `granted, now, remaining, reset, wait, void, …`, the last four for each rule; what it says and when, in microseconds
/// since the Unix epoch.
fn read(answer: &Value, windows: &Windows) -> Option<(u64, Answer)> {
    let mut numbers = Doubles::of(answer)?;
    let granted = numbers.next()?;
    let now = whole(numbers.next()?)?;
    if granted == WRONG_WINDOW {
        return Some((now, Answer::WrongWindow));
    }
    let time = |number| whole(number).map(Duration::from_micros);
    let mut state = |window: &Window| {
        let remaining = whole(numbers.next()?)?;
        let reset = time(numbers.next()?)?;
        let refusal = match numbers.next()? {
            NEVER => Some(Refusal::Ever),
            0.0 => None,
            wait => Some(Refusal::For(time(wait)?)),
        };
        let void = time(numbers.next()?)?;
        Some(RuleState {
            remaining,
            reset,
            refusal,
            void_after: matches!(window, Window::Fixed { .. }).then_some(void),
        })
    };
    let rules = windows.iter().map(&mut state).collect::<Option<_>>()?;
    let grant = Grant {
        tokens: whole(granted)?,
        at: now,
        rules,
    };
    numbers
        .next()
        .is_none()
        .then_some((now, Answer::Granted(grant)))
}

/// Of what is beyond 64 bits, as times of limits beyond reason are, the most.
fn whole(number: f64) -> Option<u64> {
    (number >= 0.0 && number.fract() == 0.0).then_some(number as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(numbers: &[f64]) -> Value {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
        Value::BulkString(bytes.collect())
    }

    #[test]
    fn a_reply_says_what_its_script_promises_or_nothing() {
        let bucket = Window::Bucket {
            count: 1,
            per: Duration::from_secs(1),
            burst: 5,
        };
        let windows = Windows {
            first: bucket,
            more: Vec::new(),
        };
        let read = |numbers: &[f64]| read(&reply(numbers), &windows);
        let at = 1.7e15;
        let Some((_, Answer::Granted(grant))) = read(&[2.0, at, 3.0, 7.0, 0.0, 0.0]) else {
            panic!("it is whole");
        };
        assert_eq!((grant.tokens, grant.at), (2, at as u64));
        let state = RuleState {
            remaining: 3,
            reset: Duration::from_micros(7),
            refusal: None,
            void_after: None,
        };
        assert_eq!(grant.rules[..], [state]);
        let refusal = |wait| match read(&[0.0, at, 0.0, 7.0, wait, 0.0]) {
            Some((_, Answer::Granted(grant))) => grant.rules[0].refusal,
            _ => None,
        };
        assert_eq!(refusal(NEVER), Some(Refusal::Ever));
        assert_eq!(refusal(9.0), Some(Refusal::For(Duration::from_micros(9))));
        assert!(matches!(
            read(&[WRONG_WINDOW, at]),
            Some((_, Answer::WrongWindow))
        ));
        // A window of 18446744073709551615 ms.
        let most = 1.844_674_407_370_955_2e19;
        let Some((_, Answer::Granted(grant))) = read(&[2.0, at, 3.0, most, 0.0, 0.0]) else {
            panic!("it is whole");
        };
        assert_eq!(grant.rules[0].reset, Duration::from_micros(u64::MAX));
        for nonsense in [
            &[][..],
            &[2.0],
            &[2.0, at],
            &[2.0, at, 3.0, 7.0, 0.0],
            &[2.0, at, 3.0, 7.0, 0.0, 0.0, 1.0],
            &[2.5, at, 3.0, 7.0, 0.0, 0.0],
            &[2.0, -1.0, 3.0, 7.0, 0.0, 0.0],
            &[2.0, at, f64::NAN, 7.0, 0.0, 0.0],
            &[2.0, at, 3.0, f64::INFINITY, 0.0, 0.0],
            &[2.0, at, 3.0, 7.0, -2.0, 0.0],
        ] {
            assert!(read(nonsense).is_none(), "{nonsense:?}");
        }
        assert!(super::read(&Value::BulkString(vec![0; 47]), &windows).is_none());
        assert!(super::read(&Value::Int(1), &windows).is_none());
    }
}
