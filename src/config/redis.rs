//! Redis, checked: which servers share state among processes, and how they are asked.

use std::fmt;
use std::time::Duration;

use super::Secret;
pub use super::tls::{Certificate, Tls};

/// Where shared state is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redis {
    pub main: Client,
    /// In place of `main`, for rate limits.
    pub rate_limit: Option<Client>,
    /// In place of `main`, for sessions.
    pub sessions: Option<Client>,
    /// What all keys begin with; not empty, without braces, white space or control characters.
    pub key_prefix: String,
    /// The most that a request waits for a command; 1 ms to 10 s.
    pub timeout: Duration,
    /// Not zero.
    pub connect_timeout: Duration,
    /// For the clients whose URLs are `rediss://`.
    pub tls: Tls,
}

impl Redis {
    /// Where rate limits are kept.
    pub fn for_rate_limits(&self) -> &Client {
        self.rate_limit.as_ref().unwrap_or(&self.main)
    }

    /// Where sessions are kept.
    pub fn for_sessions(&self) -> &Client {
        self.sessions.as_ref().unwrap_or(&self.main)
    }
}

/// Servers that hold the same state, and how weir is known to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// At least one, no two alike; exactly one in [`Mode::Single`].
    pub endpoints: Vec<Endpoint>,
    pub tls: bool,
    pub mode: Mode,
    /// Never without a password.
    pub username: Option<String>,
    /// Not empty.
    pub password: Option<Secret>,
}

impl Client {
    /// The number of the one that is used; others than 0 are there only on a single server.
    pub fn database(&self) -> u32 {
        match self.mode {
            Mode::Single { database } => database,
            Mode::Sentinel { .. } | Mode::Cluster => 0,
        }
    }
}

/// What stands behind the endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// One server.
    Single { database: u32 },
    /// Sentinels, which know who the master of this name is.
    Sentinel { master_name: String },
    /// Some nodes of a cluster, which know the others.
    Cluster,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// A name or an address; an IPv6 one without brackets.
    pub host: String,
    pub port: u16,
}

/// As a URL has it, `HOST:PORT`.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}
