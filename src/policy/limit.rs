//! Rate limit arithmetic: what one window of a limit admits, and what is left. Pure: no I/O, no clock; where counters are
//! kept and which limits a request meets is others' business.

use std::time::Duration;

use crate::config::limits::{Period, Rule, Rules, Window, Windows};

const NANOS: u128 = 1_000_000_000;

/// The time of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Monotonic, since an origin that stays for the life of the process.
    pub mono: Duration,
    /// Since the Unix epoch; for windows that begin at a time of day.
    pub wall: Duration,
}

/// What one window has counted for one key. The default is a key never seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct State {
    /// Token bucket: when it was last drained (ns, monotonic). Sliding: the window's number. Fixed: the window's end (ns,
    /// wall).
    a: u64,
    /// Token bucket: tokens used, whole. Windows: the cost of this window. Concurrency: what is in flight.
    b: u64,
    /// Token bucket: the rest of the tokens used, in 1/`per` of a token, `per` in ns. Sliding: the last window's cost.
    c: u64,
}

/// What a window says to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub admitted: bool,
    /// What is left once the request, if admitted, is charged.
    pub remaining: u64,
    /// Until the quota is whole again.
    pub reset: Duration,
    /// Until the same request can be admitted; `None` when it is, or never can be.
    pub retry_after: Option<Duration>,
}

/// What `rule` says to a request of `cost`; charges nothing.
pub fn check(rule: &Rule, state: &State, cost: u64, now: Now) -> Verdict {
    match *rule {
        Rule::Window(Window::Bucket { count, per, burst }) => {
            bucket(count, per, burst, state, cost, now.mono)
        }
        Rule::Window(Window::Sliding { limit, window }) => {
            sliding(limit, window, state, cost, now.mono)
        }
        Rule::Window(Window::Fixed { limit, period }) => {
            fixed(limit, period, state, cost, now.wall)
        }
        Rule::Slots(limit) => {
            let left = limit
                .checked_sub(state.b)
                .and_then(|free| free.checked_sub(cost));
            let reset = Duration::ZERO;
            // When a slot comes free is not known; a second is the least that Retry-After can say.
            let retry_after = (left.is_none() && cost <= limit).then_some(Duration::from_secs(1));
            Verdict {
                admitted: left.is_some(),
                remaining: left.unwrap_or(limit.saturating_sub(state.b)),
                reset,
                retry_after,
            }
        }
    }
}

/// Charges an admitted request of `cost`.
pub fn take(rule: &Rule, state: &mut State, cost: u64, now: Now) {
    match *rule {
        Rule::Window(Window::Bucket { count, per, burst }) => {
            let (per, level) = (nanos(per), level(count, per, burst, state, now.mono));
            let level = level.saturating_add(u128::from(cost).saturating_mul(per));
            state.a = state.a.max(clamp(now.mono.as_nanos()));
            state.b = clamp(level / per);
            state.c = clamp(level % per);
        }
        Rule::Window(Window::Sliding { window, .. }) => {
            let (number, _, current, previous) = windows(window, state, now.mono);
            *state = State {
                a: number,
                b: current.saturating_add(cost),
                c: previous,
            };
        }
        Rule::Window(Window::Fixed { period, .. }) => {
            let (end, used) = window_of(period, state, now.wall);
            *state = State {
                a: end,
                b: used.saturating_add(cost),
                c: 0,
            };
        }
        Rule::Slots(_) => state.b = state.b.saturating_add(cost),
    }
}

/// What an admitted request was charged.
#[derive(Debug, Clone, Copy)]
pub struct Charged {
    pub cost: u64,
    pub at: Now,
    /// What was left behind it, as its verdict said.
    pub remaining: u64,
    /// Until the quota was to be whole again, as its verdict said: the end of a fixed window.
    pub reset: Duration,
}

/// Gives back what an admitted request was charged that is refused elsewhere: no more than its window still counts, and nothing of
/// what others were charged since.
pub fn give_back(rule: &Rule, state: &mut State, charged: Charged, now: Now) {
    let Charged {
        cost,
        at: then,
        remaining,
        reset,
    } = charged;
    match *rule {
        Rule::Window(Window::Bucket { count, per, burst }) => {
            let (per, level) = (nanos(per), level(count, per, burst, state, now.mono));
            let at = state.a.max(clamp(now.mono.as_nanos()));
            let elapsed = at.saturating_sub(clamp(then.mono.as_nanos()));
            // What time has made good since cannot be given back as well; it made good first what was charged before.
            let before = burst.saturating_sub(remaining).saturating_sub(cost);
            let before = u128::from(before).saturating_mul(per);
            let made_good = (u128::from(elapsed) * u128::from(count)).saturating_sub(before);
            let owed = u128::from(cost)
                .saturating_mul(per)
                .saturating_sub(made_good);
            let level = level.saturating_sub(owed);
            state.a = at;
            state.b = clamp(level / per);
            state.c = clamp(level % per);
        }
        Rule::Window(Window::Sliding { window, .. }) => {
            let (number, _, current, previous) = windows(window, state, now.mono);
            let before = number.saturating_sub(clamp(then.mono.as_nanos() / nanos(window)));
            *state = State {
                a: number,
                b: current.saturating_sub(if before == 0 { cost } else { 0 }),
                c: previous.saturating_sub(if before == 1 { cost } else { 0 }),
            };
        }
        Rule::Window(Window::Fixed { period, .. }) => {
            let (end, used) = window_of(period, state, now.wall);
            // Which by a clock that was set back is not the one that `then` is in.
            let of_charge = (then.wall + reset).as_nanos();
            let is_same = u128::from(end) == of_charge;
            *state = State {
                a: end,
                b: used.saturating_sub(if is_same { cost } else { 0 }),
                c: 0,
            };
        }
        Rule::Slots(_) => state.b = state.b.saturating_sub(cost),
    }
}

/// Gives back what a request in flight held of a `Concurrency` rule; true when nothing is held any more.
pub fn release(state: &mut State, cost: u64) -> bool {
    state.b = state.b.saturating_sub(cost);
    state.b == 0
}

/// The rules that each of `processes` keeps to alone, so that together they keep to `rules`: a share of each, and room for one request
/// of `cost` at least, which is to be the same each time: a bucket that is smaller the next time forgets what it cannot hold.
pub fn share(rules: &Rules, processes: usize, cost: u64) -> Rules {
    let processes = u64::try_from(processes).unwrap_or(u64::MAX).max(1);
    let part = |whole: u64| {
        let least = if cost <= whole { cost } else { 0 };
        (whole / processes).max(least).max(whole.min(1))
    };
    let of_window = |window: &Window| match *window {
        Window::Bucket { count, per, burst } => Window::Bucket {
            count,
            per: per.saturating_mul(u32::try_from(processes).unwrap_or(u32::MAX)),
            burst: part(burst),
        },
        Window::Sliding { limit, window } => Window::Sliding {
            limit: part(limit),
            window,
        },
        Window::Fixed { limit, period } => Window::Fixed {
            limit: part(limit),
            period,
        },
    };
    match rules {
        Rules::Windows(windows) => Rules::Windows(Windows {
            first: of_window(&windows.first),
            more: windows.more.iter().map(of_window).collect(),
        }),
        Rules::Slots(slots) => Rules::Slots(part(*slots)),
    }
}

/// The start, the end and the next end of the window of `period` that `wall`, the time since the Unix epoch, is in.
pub fn window_at(period: Period, wall: Duration) -> [Duration; 3] {
    let end_after = |time: Duration| duration(end_of(period, time));
    let end = end_after(wall);
    // Within the window before, which is as long or shorter by a day or three.
    let within_last = wall.saturating_sub(period.at_most());
    let mut start = end_after(within_last);
    while end_after(start) <= wall {
        start = end_after(start);
    }
    if start > wall {
        start = Duration::ZERO;
    }
    [start, end, end_after(end)]
}

/// The continuous-state leaky bucket of the generic cell rate algorithm (ITU-T I.371, annex A), in whole arithmetic: a
/// token is `per` units, and `count` units drain each nanosecond. In any time w it admits at most burst + rate × w.
fn bucket(
    count: u64,
    per: Duration,
    burst: u64,
    state: &State,
    cost: u64,
    mono: Duration,
) -> Verdict {
    let units = nanos(per);
    let level = level(count, per, burst, state, mono);
    let [capacity, asked] = [burst, cost].map(|tokens| u128::from(tokens).saturating_mul(units));
    let drain = |units: u128| duration((units).div_ceil(u128::from(count.max(1))));
    let wanted = level.saturating_add(asked);
    let admitted = wanted <= capacity && (count > 0 || cost == 0);
    let after = if admitted { wanted } else { level };
    Verdict {
        admitted,
        remaining: match count {
            0 => 0,
            _ => clamp(capacity.saturating_sub(after) / units),
        },
        reset: drain(after),
        retry_after: (!admitted && count > 0 && asked <= capacity)
            .then(|| drain(wanted - capacity)),
    }
}

/// The units in the bucket at `mono`; time that went back drains nothing. What a larger bucket held, before a reload or an
/// override made it this one, fills this one and no more: a client would else wait for what this one can never hold.
fn level(count: u64, per: Duration, burst: u64, state: &State, mono: Duration) -> u128 {
    let elapsed = clamp(mono.as_nanos()).saturating_sub(state.a);
    let level = u128::from(state.b).saturating_mul(nanos(per));
    // Less than a token, whatever a token was to the rule that wrote it down.
    let level = level.saturating_add(u128::from(state.c).min(nanos(per) - 1));
    let level = level.min(u128::from(burst).saturating_mul(nanos(per)));
    level.saturating_sub(u128::from(elapsed) * u128::from(count))
}

/// The last window's cost counts by the share of it that the sliding window still covers, as if it had been even.
fn sliding(limit: u64, window: Duration, state: &State, cost: u64, mono: Duration) -> Verdict {
    let (_, into, current, previous) = windows(window, state, mono);
    let length = nanos(window);
    let [limit_w, current_w, cost_w] =
        [limit, current, cost].map(|count| u128::from(count).saturating_mul(length));
    let before = u128::from(previous).saturating_mul(length - into);
    let estimate = before.saturating_add(current_w);
    let wanted = estimate.saturating_add(cost_w);
    let admitted = wanted <= limit_w;
    let after = if admitted { wanted } else { estimate };
    let retry_after = if admitted || cost > limit {
        None
    } else if current_w.saturating_add(cost_w) <= limit_w {
        // Within this window, once enough of the last one is out of sight.
        Some((length - into) - (limit_w - current_w - cost_w) / u128::from(previous.max(1)))
    } else {
        // In the next, where this window is the last one.
        Some((length - into) + (length - (limit_w - cost_w) / u128::from(current.max(1))))
    };
    let busy = if current > 0 || (admitted && cost > 0) {
        2 * length - into
    } else {
        length - into
    };
    Verdict {
        admitted,
        remaining: clamp(limit_w.saturating_sub(after) / length),
        reset: if after == 0 {
            Duration::ZERO
        } else {
            duration(busy)
        },
        retry_after: retry_after.map(duration),
    }
}

/// The window's number, how far into it `mono` is (ns), its cost, and the cost of the one before.
fn windows(window: Duration, state: &State, mono: Duration) -> (u64, u128, u64, u64) {
    let (length, mono) = (nanos(window), mono.as_nanos());
    let number = clamp(mono / length);
    match number.checked_sub(state.a) {
        Some(0) => (number, mono % length, state.b, state.c),
        Some(1) => (number, mono % length, 0, state.b),
        Some(_) => (number, mono % length, 0, 0),
        // Time went back: the window goes on from its start.
        None => (state.a, 0, state.b, state.c),
    }
}

fn fixed(limit: u64, period: Period, state: &State, cost: u64, wall: Duration) -> Verdict {
    let (end, used) = window_of(period, state, wall);
    let left = limit
        .checked_sub(used)
        .and_then(|left| left.checked_sub(cost));
    let reset = duration(u128::from(end).saturating_sub(wall.as_nanos()));
    Verdict {
        admitted: left.is_some(),
        remaining: left.unwrap_or(limit.saturating_sub(used)),
        reset,
        retry_after: (left.is_none() && cost <= limit).then_some(reset),
    }
}

/// The end of the window at `wall` (ns) and its cost. A clock that is set back stays in the window it was in, so that it
/// never opens a window twice.
fn window_of(period: Period, state: &State, wall: Duration) -> (u64, u64) {
    if wall.as_nanos() < u128::from(state.a) {
        return (state.a, state.b);
    }
    (clamp(end_of(period, wall)), 0)
}

/// The end (ns) of the window that `wall` is in, which but for `Fixed` is one of the calendar in UTC. Weeks begin on Monday (ISO 8601).
fn end_of(period: Period, wall: Duration) -> u128 {
    const DAY: u64 = 86_400;
    let day = wall.as_secs() / DAY;
    let end = match period {
        Period::Fixed(length) => return (wall.as_nanos() / nanos(length) + 1) * nanos(length),
        Period::Day => day + 1,
        // 1970-01-01 was a Thursday.
        Period::Week => day + 7 - (day + 3) % 7,
        Period::Month => match year_and_month(day) {
            (year, 12) => first_of(year + 1, 1),
            (year, month) => first_of(year, month + 1),
        },
        Period::Year => first_of(year_and_month(day).0 + 1, 1),
    };
    u128::from(end) * u128::from(DAY) * NANOS
}

/// The civil year and month of a day since the epoch (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn year_and_month(day: u64) -> (u64, u64) {
    let shifted = day + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month)
}

/// The day since the epoch on which a month begins (the same source).
fn first_of(year: u64, month: u64) -> u64 {
    let year = year - u64::from(month <= 2);
    let (era, year_of_era) = (year / 400, year % 400);
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year - 719_468
}

fn nanos(duration: Duration) -> u128 {
    duration.as_nanos().max(1)
}

fn duration(nanos: u128) -> Duration {
    Duration::from_nanos(clamp(nanos))
}

fn clamp(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
