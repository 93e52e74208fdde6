//! Rate limits, checked: what is counted, by what key, and how much of it is admitted.

use std::collections::BTreeMap;
use std::time::Duration;

/// A named limit; every rule of it must admit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    pub name: String,
    /// At least one; or `None`: unlimited.
    pub rules: Option<Vec<Rule>>,
    /// What a key is made of; empty: one key for all.
    pub by: Vec<KeyPart>,
    pub mode: Mode,
    /// Whether a request without one of the key's parts is refused; otherwise the limit does not see it.
    pub deny_missing: bool,
    /// For the keys named, in place of `rules`.
    pub overrides: BTreeMap<String, Option<Vec<Rule>>>,
    pub cost: Cost,
}

/// One window of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// `count` tokens come back each `per`, up to `burst`.
    TokenBucket {
        count: u64,
        per: Duration,
        burst: u64,
    },
    /// At most `limit` in any `window`, taking the last window's requests for even.
    SlidingWindow { limit: u64, window: Duration },
    /// At most `limit` in each period.
    FixedWindow { limit: u64, period: Period },
    /// At most `limit` at a time.
    Concurrency { limit: u64 },
}

/// How long a window is, and when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Period {
    /// Beginning at multiples of it since the Unix epoch.
    Fixed(Duration),
    /// By the calendar in UTC.
    Day,
    /// From Monday.
    Week,
    Month,
    Year,
}

/// A part of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPart {
    /// IPv6 by its /64, since one client has as many addresses as it likes.
    ClientIp,
    /// By its name in lower case.
    Header(String),
    Cookie(String),
    Query(String),
    Path,
    Host,
    Method,
    Route,
    Upstream,
}

/// What becomes of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Enforce,
    /// Decides and counts, and admits all the same.
    Shadow,
    Disabled,
}

/// What a request costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cost {
    Constant(u64),
    /// A number in a request header; `default` where there is none.
    Header {
        name: String,
        default: u64,
    },
}
