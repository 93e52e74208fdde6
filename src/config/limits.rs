//! Rate limits, checked: what is counted, by what key, and how much of it is admitted.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::raw::Algorithm;
pub use super::raw::{Accuracy, Mode, OnLoss};
use super::units::TimeLength;

/// The most rules that a route's limits can have together.
pub const MAX_RULES: usize = 16;

/// A named limit; every rule of it must admit.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    pub name: String,
    /// The name as clients are told it: printable ASCII without quotes, as a structured string wants (RFC 9651 section 3.3.3).
    pub label: String,
    pub algorithm: Algorithm,
    /// [`Accuracy::Local`] without `redis`; never [`Accuracy::Lease`] for concurrency.
    pub accuracy: Accuracy,
    /// What becomes of requests while Redis does not answer.
    pub on_redis_loss: OnLoss,
    /// For concurrency: how long a slot that a dead process holds stays taken; at least a second.
    pub hold_ttl: Duration,
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
    /// The share of the limit, 0 to 1, from which on requests are counted as near it.
    pub near_limit: f64,
    /// With [`Mode::Enforce`], the share of the keys, 0 to 1, that are refused.
    pub enforced: f64,
}

impl Limit {
    /// The label of a name.
    pub fn label(name: &str) -> String {
        let safe = |c: char| match c {
            '"' | '\\' => '_',
            ' '..='~' => c,
            _ => '_',
        };
        name.chars().map(safe).collect()
    }

    /// Whether the key has a part of the session.
    pub fn needs_session(&self) -> bool {
        let of_session =
            |part: &KeyPart| matches!(part, KeyPart::SessionUser | KeyPart::SessionClaim(_));
        self.by.iter().any(of_session)
    }

    /// The most rules that one request can meet, over all keys.
    pub fn most_rules(&self) -> usize {
        let all = self.overrides.values().chain([&self.rules]);
        all.map(|rules| rules.as_ref().map_or(0, Vec::len))
            .max()
            .unwrap_or(0)
    }
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

impl Rule {
    /// Its kind and the length of its window: what a rule of another shape has counted is nonsense to it.
    pub fn shape(&self) -> (u8, Duration) {
        match *self {
            Rule::TokenBucket { .. } => (0, Duration::ZERO),
            Rule::SlidingWindow { window, .. } => (1, window),
            Rule::FixedWindow {
                period: Period::Fixed(length),
                ..
            } => (2, length),
            Rule::Concurrency { .. } => (3, Duration::ZERO),
            Rule::FixedWindow { period, .. } => (4, period.at_most()),
        }
    }

    /// What tells the counter of the `index`th of a limit's rules from those of others of its shape: its number among them. So it
    /// stays where others come or go beside it.
    pub fn number(rules: &[Rule], index: usize) -> usize {
        let shape = rules[index].shape();
        let like = rules[..index].iter().filter(|rule| rule.shape() == shape);
        like.count()
    }
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

impl Period {
    /// The longest that the period can last.
    pub fn at_most(self) -> Duration {
        let days = |days: u64| Duration::from_secs(days * 86_400);
        match self {
            Period::Fixed(length) => length,
            Period::Day => days(1),
            Period::Week => days(7),
            Period::Month => days(31),
            Period::Year => days(366),
        }
    }
}

/// A part of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPart {
    /// IPv6 by its network, of `ipv6_prefix` bits, since one client has as many addresses as it likes.
    ClientIp,
    /// Of the certificate that the client shows.
    ClientCertSubject,
    /// Likewise: the first URI that it names, or else the first DNS name.
    ClientCertSan,
    /// By its name in lower case.
    Header(String),
    Cookie(String),
    Query(String),
    Path,
    Host,
    Method,
    Route,
    Upstream,
    SessionUser,
    SessionClaim(String),
}

/// What a process takes of a shared limit at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lease {
    /// How long it lives; 1 ms to 10 s.
    pub ttl: Duration,
    /// The most that one takes of what is left; more than 0, 1 at most.
    pub max_share: f64,
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

/// As the file spells it: `100/s`, or a number for concurrency. The burst stands under a key of its own.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rule::TokenBucket { count, per, .. } => write!(f, "{count}/{}", Period::Fixed(*per)),
            Rule::SlidingWindow { limit, window } => {
                write!(f, "{limit}/{}", Period::Fixed(*window))
            }
            Rule::FixedWindow { limit, period } => write!(f, "{limit}/{period}"),
            Rule::Concurrency { limit } => write!(f, "{limit}"),
        }
    }
}

/// As the file spells it behind the slash: `s`, `30s`, `month`.
impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Period::Fixed(length) => {
                let span = TimeLength(*length).to_string();
                let one = span
                    .strip_prefix('1')
                    .filter(|unit| !unit.starts_with(|c: char| c.is_ascii_digit()));
                f.write_str(one.unwrap_or(&span))
            }
            Period::Day => f.write_str("day"),
            Period::Week => f.write_str("week"),
            Period::Month => f.write_str("month"),
            Period::Year => f.write_str("year"),
        }
    }
}

/// As the file spells it: `client.ip`, `header:x-tenant`.
impl fmt::Display for KeyPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyPart::ClientIp => f.write_str("client.ip"),
            KeyPart::ClientCertSubject => f.write_str("client.cert.subject"),
            KeyPart::ClientCertSan => f.write_str("client.cert.san"),
            KeyPart::Header(name) => write!(f, "header:{name}"),
            KeyPart::Cookie(name) => write!(f, "cookie:{name}"),
            KeyPart::Query(name) => write!(f, "query:{name}"),
            KeyPart::Path => f.write_str("path"),
            KeyPart::Host => f.write_str("host"),
            KeyPart::Method => f.write_str("method"),
            KeyPart::Route => f.write_str("route"),
            KeyPart::Upstream => f.write_str("upstream"),
            KeyPart::SessionUser => f.write_str("session.user"),
            KeyPart::SessionClaim(name) => write!(f, "session.claims.{name}"),
        }
    }
}
