//! Circuit breakers, checked: what trips one, what is a failure, and what clients get meanwhile.

use std::num::NonZeroU32;
use std::time::Duration;

use super::limits::Mode;
pub use super::raw::{BreakerOnLoss as OnLoss, Scope};
use crate::http2::grpc::GrpcStatus;

/// A named breaker; each upstream that names it has one of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct CircuitBreaker {
    pub name: String,
    /// [`Scope::Local`] without `redis`.
    pub scope: Scope,
    /// Processes that must see failures before a shared breaker trips; where fewer live, all of them.
    pub quorum: NonZeroU32,
    /// What a shared breaker does while Redis does not answer.
    pub on_redis_loss: OnLoss,
    pub settings: Settings,
    pub failure_on: FailureOn,
    /// In place of weir's own 503.
    pub fallback: Option<Fallback>,
    pub mode: Mode,
}

/// What counts as a failure of the upstream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FailureOn {
    pub connect_failure: bool,
    pub timeout: bool,
    /// The connection broke, or what came was not HTTP.
    pub reset: bool,
    /// Every status from 500 to 599.
    pub server_error: bool,
    pub statuses: Vec<u16>,
    /// In gRPC responses.
    pub grpc: Vec<GrpcStatus>,
}

/// A reply of the operator's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    pub status: u16,
    pub body: String,
    pub content_type: String,
}

/// When a breaker trips, how long it stays open and how it closes again.
///
/// Values that make no sense are read as the nearest that do: a rate outside 0 to 1 is clamped, and one that is not a
/// number is 1; `probes` and window sizes of 0 are 1; `minimum_calls` is held between 1 and the size of a count window,
/// which otherwise could never trip; `max_open_for` is at least `open_for`.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub window: Window,
    /// Rates say nothing before the window holds this many calls.
    pub minimum_calls: u32,
    /// The share of failures, from 0 to 1, that trips; reached is enough. A window without failures never trips by it.
    pub failure_rate: f64,
    /// Failures in a row that trip, whatever `minimum_calls` says; 0: unused.
    pub consecutive_failures: u32,
    pub slow_call: Option<SlowCall>,
    /// How long the first opening lasts. Each re-opening before the breaker has closed lasts twice the one before.
    pub open_for: Duration,
    /// Where the doubling of `open_for` stops. Jitter comes on top.
    pub max_open_for: Duration,
    /// The most that is added to an opening, and to a `retry_after`, as a share of it.
    pub jitter: f64,
    pub half_open: HalfOpen,
    /// How long the ramp to full traffic takes after the probes passed; zero: no ramp.
    pub recover_over: Duration,
}

/// The calls that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Those of the last such time, in steps of a tenth of it.
    Time(Duration),
    /// The last so many.
    Count(u32),
}

/// A call that took longer than `duration` is slow, whatever its outcome; a share of `rate` of them trips.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowCall {
    pub duration: Duration,
    /// From 0 to 1; reached is enough. A window without slow calls never trips by it.
    pub rate: f64,
}

/// How an upstream is tried before traffic returns to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HalfOpen {
    /// Results that decide, and the most that are outstanding at a time.
    pub probes: u32,
    /// The share of `probes` that must succeed, from 0 to 1; at least one must. A slow probe did not succeed.
    pub success_rate: f64,
    /// A probe without a result for this long frees its slot, and its result then counts for nothing.
    pub probe_timeout: Duration,
}
