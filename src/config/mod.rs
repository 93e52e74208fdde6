//! The configuration: from YAML ([`raw`]) to checked values ([`check::parse`]) with every mistake told at once. Past
//! [`Config`] nothing is checked again. Must not name what is made of it.

pub mod audit;
pub mod breakers;
pub mod check;
mod elsewhere;
pub mod limit_keys;
pub mod limits;
pub mod listeners;
pub mod matches;
pub mod postgres;
pub mod raw;
pub mod redis;
pub mod rewrite;
pub mod runtime;
mod schema;
pub mod sessions;
pub mod show;
pub mod telemetry;
pub mod tls;
pub mod units;
pub mod upstreams;
pub mod worker;
pub mod yaml;

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::time::Duration;

use crate::event::REDACTED;
use audit::{Audit, Level};
use limits::{Lease, Limit, OnLoss};
pub use listeners::Listener;
use matches::Match;
use postgres::Postgres;
use redis::Redis;
use rewrite::{HeaderChanges, Rewrite, To};
use runtime::Shed;
pub use schema::schema;
use sessions::{RouteSession, Sessions};
use telemetry::{AccessLog, Log, Traces};
pub use upstreams::{Protocol, Upstream};
use worker::Worker;

/// A checked configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// At least one.
    pub listeners: Vec<Listener>,
    /// Routes name them by index.
    pub upstreams: Vec<Upstream>,
    /// The first match wins.
    pub routes: Vec<Route>,
    /// Routes name them by index.
    pub limits: Vec<Limit>,
    pub limit_defaults: LimitDefaults,
    /// Routes name them by index.
    pub sessions: Vec<Sessions>,
    /// What processes share their state through; `None`: each has its own.
    pub redis: Option<Redis>,
    pub audit: Option<Audit>,
    /// Where the audit is stored, if not in SQLite; never without `redis` and `audit`.
    pub postgres: Option<Postgres>,
    pub worker: Worker,
    pub admin: Admin,
    /// Where /metrics is served beside the admin port.
    pub metrics_address: Option<SocketAddr>,
    /// About how many time series requests may make; routes over it are counted together.
    pub max_series: usize,
    pub log: Log,
    pub access_log: Option<AccessLog>,
    pub traces: Option<Traces>,
    /// Threads that serve requests; `None`: one a core.
    pub lanes: Option<NonZeroUsize>,
    /// When requests are refused for the process's own sake.
    pub shed: Shed,
    /// Between saying unready and taking no more requests.
    pub propagation_delay: Duration,
    /// For requests in flight to end once the process drains.
    pub drain: Duration,
}

impl Config {
    /// By how many bits listeners tell IPv6 clients apart.
    pub fn ipv6_prefixes(&self) -> BTreeSet<u8> {
        let listeners = self.listeners.iter();
        listeners.map(|listener| listener.ipv6_prefix).collect()
    }
}

/// Where operators ask and change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    pub address: SocketAddr,
    /// Asked of every call under /v1.
    pub token: Option<Secret>,
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

/// Which requests are answered by whom, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    pub matches: Match,
    pub to: To,
    /// For an upstream.
    pub rewrite: Rewrite,
    /// Likewise.
    pub request_headers: HeaderChanges,
    pub response_headers: HeaderChanges,
    /// The fields, in lower case, whose values it asks for or puts in are not shown: variables and files brought them in.
    pub hidden: BTreeSet<String>,
    /// Indexes into [`Config::limits`]; every one must admit. These need no session, and are asked first.
    pub limits: Vec<usize>,
    /// Likewise, of the limits whose key has a part of the session.
    pub session_limits: Vec<usize>,
    pub session: Option<RouteSession>,
    pub audit: Level,
    /// The share of its requests that the audit keeps, in place of the audit's own.
    pub audit_sample: Option<f64>,
    /// In place of the upstream's.
    pub timeout: Option<Duration>,
    /// Whether its requests may be refused for the process's own sake.
    pub shed: bool,
}

impl Route {
    /// An index into [`Config::upstreams`], where it goes to one.
    pub fn upstream(&self) -> Option<usize> {
        match self.to {
            To::Upstream(upstream) => Some(upstream),
            To::Redirect(_) | To::Reply(_) => None,
        }
    }

    /// A name for metrics and audit: its host and path as the file has them.
    pub fn label(&self) -> String {
        let host = self
            .matches
            .host
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        host + &self
            .matches
            .path
            .as_ref()
            .map_or("/*".to_owned(), ToString::to_string)
    }

    /// What `by: route` counts it by: all that it matches, wherever in the file it stands. `api.example.com/pay/*`; with methods and
    /// headers, `GET,HEAD /pay/* x-env=test`; `/pay/* ignore_case` where that is so. Of routes with the same one, only the first ever serves requests.
    pub fn key(&self) -> String {
        let methods: BTreeSet<_> = self.matches.methods.iter().map(String::as_str).collect();
        let methods = methods.into_iter().collect::<Vec<_>>().join(",");
        let headers: BTreeSet<_> = self.matches.headers.iter().collect();
        let headers = headers.into_iter().map(|(name, value)| {
            // So that one is not taken for two.
            match value.contains([' ', '"']) {
                true => format!("{name}={value:?}"),
                false => format!("{name}={value}"),
            }
        });
        let methods = [methods].into_iter().filter(|methods| !methods.is_empty());
        // No header is written so.
        let ignore_case = self.matches.ignore_case.then(|| "ignore_case".to_owned());
        let words = methods.chain([self.label()]).chain(ignore_case);
        let words = words.chain(headers);
        words.collect::<Vec<_>>().join(" ")
    }
}

/// What holds for all limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LimitDefaults {
    /// Keys held in memory; the least used goes. `None`: by the memory that the process may use.
    pub max_keys: Option<usize>,
    pub lease: Lease,
    /// Of limits that do not say.
    pub on_redis_loss: OnLoss,
    /// The most that is added to Retry-After, as a share of it.
    pub retry_jitter: f64,
    /// Whether clients are told by `RateLimit` and `RateLimit-Policy`.
    pub standard_headers: bool,
    /// Whether clients are told by `X-RateLimit-*`.
    pub legacy_headers: bool,
}
