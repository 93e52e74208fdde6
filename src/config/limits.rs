//! Rate limits, checked: what is counted, by what key, and how much of it is admitted.

use std::collections::BTreeMap;
use std::fmt;
use std::iter;
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
    /// `None`: unlimited.
    pub rules: Option<Rules>,
    /// What a key is made of; empty: one key for all.
    pub by: Vec<KeyPart>,
    pub mode: Mode,
    /// Whether a request without one of the key's parts is refused; otherwise the limit does not see it.
    pub deny_missing: bool,
    /// For the keys named, in place of `rules`.
    pub overrides: BTreeMap<String, Option<Rules>>,
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
        all.map(|rules| rules.as_ref().map_or(0, Rules::count))
            .max()
            .unwrap_or(0)
    }
}

/// What a limit admits of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rules {
    Windows(Windows),
    /// At most so many at a time.
    Slots(u64),
}

/// The windows of a limit, which are of one kind: each of them must admit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    pub first: Window,
    pub more: Vec<Window>,
}

/// One window of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// A token bucket: `count` tokens come back each `per`, up to `burst`.
    Bucket {
        count: u64,
        per: Duration,
        burst: u64,
    },
    /// At most `limit` in any `window`, taking the last window's requests for even.
    Sliding { limit: u64, window: Duration },
    /// At most `limit` in each period.
    Fixed { limit: u64, period: Period },
}

/// One rule of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    Window(Window),
    /// At most so many at a time.
    Slots(u64),
}

impl Rules {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Rules::Windows(windows) => windows.count(),
            Rules::Slots(_) => 1,
        }
    }

    /// The window that alone is a limit's.
    pub fn only_window(&self) -> Option<&Window> {
        match self {
            Rules::Windows(windows) => windows.more.is_empty().then_some(&windows.first),
            Rules::Slots(_) => None,
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Rule> {
        self.numbered().map(|(_, rule)| rule)
    }

    /// As [`Windows::numbered`].
    pub fn numbered(&self) -> impl Iterator<Item = (usize, Rule)> {
        let (windows, slots) = match self {
            Rules::Windows(windows) => (Some(windows), None),
            Rules::Slots(slots) => (None, Some((0, Rule::Slots(*slots)))),
        };
        let windows = windows.into_iter().flat_map(Windows::numbered);
        let windows = windows.map(|(number, window)| (number, Rule::Window(*window)));
        windows.chain(slots)
    }
}

impl Windows {
    /// How many there are.
    pub fn count(&self) -> usize {
        1 + self.more.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Window> {
        iter::once(&self.first).chain(&self.more)
    }

    /// Each with what tells its counter from those of others of its shape: its number among them. So it stays where others come or go
    /// beside it.
    pub fn numbered(&self) -> impl Iterator<Item = (usize, &Window)> {
        self.iter().enumerate().map(|(index, window)| {
            let before = self.iter().take(index);
            let like = before.filter(|other| other.shape() == window.shape());
            (like.count(), window)
        })
    }
}

impl From<Rule> for Rules {
    fn from(rule: Rule) -> Rules {
        match rule {
            Rule::Window(first) => Rules::Windows(Windows {
                first,
                more: Vec::new(),
            }),
            Rule::Slots(slots) => Rules::Slots(slots),
        }
    }
}

impl Window {
    /// Its kind and its length, of a bucket its period: what a window of another shape has counted is nonsense to it.
    pub fn shape(&self) -> (u8, Duration) {
        match *self {
            Window::Bucket { per, .. } => (0, per),
            Window::Sliding { window, .. } => (1, window),
            Window::Fixed {
                period: Period::Fixed(length),
                ..
            } => (2, length),
            Window::Fixed { period, .. } => (4, period.at_most()),
        }
    }

    /// What is left of it while nothing is taken, which is the most that it ever grants: of a bucket its burst, whatever the rate.
    pub fn capacity(&self) -> u64 {
        match *self {
            Window::Bucket { burst, .. } => burst,
            Window::Sliding { limit, .. } | Window::Fixed { limit, .. } => limit,
        }
    }
}

impl Rule {
    /// As [`Window::shape`].
    pub fn shape(&self) -> (u8, Duration) {
        match self {
            Rule::Window(window) => window.shape(),
            Rule::Slots(_) => (3, Duration::ZERO),
        }
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

/// As the file spells it: `100/s`. The burst stands under a key of its own.
impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Window::Bucket { count, per, .. } => write!(f, "{count}/{}", Period::Fixed(*per)),
            Window::Sliding { limit, window } => write!(f, "{limit}/{}", Period::Fixed(*window)),
            Window::Fixed { limit, period } => write!(f, "{limit}/{period}"),
        }
    }
}

/// As the file spells it: `100/s`, or a number for concurrency.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rule::Window(window) => window.fmt(f),
            Rule::Slots(slots) => write!(f, "{slots}"),
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
