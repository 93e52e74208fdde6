//! Upstreams, checked: where their endpoints are, which of them takes a request, and what is done about trouble.

use std::net::SocketAddr;
use std::time::Duration;

use super::breakers::CircuitBreaker;
use super::limits::KeyPart;
pub use super::raw::UpstreamProtocol as Protocol;
use super::tls::UpstreamTls;

/// Where requests go.
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    pub name: String,
    /// At least one.
    pub endpoints: Vec<Source>,
    pub protocol: Protocol,
    /// `None`: connections are plain.
    pub tls: Option<UpstreamTls>,
    pub load_balancing: Balancing,
    pub connect_timeout: Duration,
    /// From the end of the request to the end of the response's head.
    pub timeout: Duration,
    /// For a connection that no request uses.
    pub idle_timeout: Duration,
    /// Of a connection that takes new requests.
    pub max_age: Duration,
    pub concurrency: Option<Concurrency>,
    pub retries: Option<Retries>,
    pub health: Option<HealthCheck>,
    pub outlier_detection: Option<OutlierDetection>,
    pub slow_start: Option<SlowStart>,
    /// A share: where less of the endpoints is up, all are used.
    pub panic_threshold: f64,
    pub circuit_breaker: Option<CircuitBreaker>,
    /// Whether its responses may start and end sessions.
    pub trust_session_headers: bool,
}

/// Where endpoints come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// One endpoint, `HOST:PORT` or `unix:PATH`; a name may have several addresses.
    Fixed(String),
    /// One for each address of the name.
    Dns(DnsName),
}

/// A name that is resolved again and again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsName {
    pub name: String,
    pub port: u16,
    /// The longest between two looks.
    pub refresh: Duration,
    /// The name servers to ask; empty: the system's.
    pub servers: Vec<SocketAddr>,
}

/// Which endpoint takes a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Balancing {
    RoundRobin,
    /// The one with fewer requests under way, of two picked by chance.
    LeastRequest,
    /// The one that the request's key, of these parts, falls to.
    RingHash(Vec<KeyPart>),
}

/// What a process asks of an upstream at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Concurrency {
    /// Requests under way; 1 at least.
    pub max: u32,
    /// Where how many may be is learnt: the least, which is at most `max`.
    pub adaptive_min: Option<u32>,
    /// Requests that wait.
    pub pending: u32,
    /// 1 at least.
    pub max_connections: u32,
}

/// How endpoints are asked how they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    pub asks: Asks,
    /// In place of the endpoint's own name and port.
    pub host: Option<String>,
    pub interval: Duration,
    pub timeout: Duration,
    /// Failures in a row; 1 at least.
    pub unhealthy_after: u32,
    /// Answers in a row; 1 at least.
    pub healthy_after: u32,
}

/// What endpoints are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asks {
    /// A path, by GET.
    Get(String),
    /// A service, or the server where it is empty, by gRPC's health checks.
    Grpc(String),
}

/// When endpoints that fail requests are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutlierDetection {
    /// Failures in a row; 1 at least.
    pub consecutive_5xx: u32,
    /// Between looks at who may come back.
    pub interval: Duration,
    pub base_ejection_time: Duration,
    /// Of all endpoints, 0 to 100; one may always be ejected.
    pub max_ejection_percent: u32,
}

/// The ramp of endpoints that are new or back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    pub window: Duration,
    /// The share that it begins with, more than 0.
    pub min_weight: f64,
}

/// When requests are tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retries {
    /// Beside the first try.
    pub attempts: u32,
    pub retry_on: RetryOn,
    /// For which a request is sent again that the upstream may have seen; all are idempotent.
    pub methods: Vec<String>,
    pub per_try_timeout: Option<Duration>,
    pub backoff: Backoff,
    pub budget: Budget,
    /// The bytes of the largest body that is kept to be sent again.
    pub buffer: usize,
}

/// What is a reason to try again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RetryOn {
    pub connect_failure: bool,
    /// The connection broke before a byte of the request was sent.
    pub reset_before_request: bool,
    /// It broke before a byte of the response came.
    pub reset: bool,
    /// The head did not come in its time.
    pub timeout: bool,
    /// Every status from 500 to 599.
    pub server_error: bool,
    pub statuses: Vec<u16>,
}

/// How long a retry waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    pub base: Duration,
    pub max: Duration,
}

/// How many retries a process has under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Of the requests under way.
    pub percent: u32,
    pub min_concurrent: u32,
}

impl RetryOn {
    /// Whether a response of this status is a reason.
    pub fn has_status(&self, status: u16) -> bool {
        (self.server_error && (500..600).contains(&status)) || self.statuses.contains(&status)
    }
}
