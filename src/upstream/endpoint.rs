//! One endpoint as all lanes see it: where it is, what goes on there, and what an endpoint can make of a request. Must not know of others:
//! which there are and how they are is `live`'s.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::connect::Target;
use super::reach::Reach;
use crate::clock;
use crate::config::upstreams::{DnsName, Source};
use crate::http2::grpc::GrpcStatus;

/// Where requests can go.
#[derive(Debug)]
pub struct Endpoint {
    /// `HOST:PORT` or `unix:PATH`.
    pub place: String,
    /// What its certificate is to be for, unless the upstream says otherwise.
    pub(super) name: String,
    /// As requests name it that name no host, and checks: of the name, where it is an address of one.
    pub authority: String,
    pub(super) target: Target,
    /// Requests under way, of all lanes.
    pub(super) under_way: AtomicU32,
    /// In a row.
    pub(super) failures: AtomicU32,
    /// When it came or came back, in milliseconds of [`clock::mono`]; 0 for one that was there from the start.
    pub(super) came: AtomicU64,
    pub(super) reach: Arc<Reach>,
}

/// What an endpoint made of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointOutcome {
    Served,
    Failed(Fault),
}

/// What tells against an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A 5xx.
    Status(u16),
    /// One of gRPC that [tells against the server](GrpcStatus::is_servers_fault).
    Grpc(GrpcStatus),
    Unreached,
    TimedOut,
    /// It broke off, or sent nonsense.
    Reset,
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Status(status) => write!(f, "status {status}"),
            Fault::Grpc(status) => f.write_str(status.name().unwrap_or("UNKNOWN")),
            Fault::Unreached => f.write_str("no connection"),
            Fault::TimedOut => f.write_str("no answer in time"),
            Fault::Reset => f.write_str("it broke off"),
        }
    }
}

impl Endpoint {
    /// `name`: of which it is an address, where it is one of many.
    pub(super) fn new(place: String, name: Option<&str>) -> Endpoint {
        Endpoint {
            target: Target::new(&place),
            name: name.unwrap_or_else(|| host(&place)).to_owned(),
            authority: authority(&place, name),
            place,
            under_way: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            came: AtomicU64::new(0),
            reach: Arc::default(),
        }
    }

    /// Since it came or came back; `None` for one that was there from the start.
    pub(super) fn age(&self, now: Duration) -> Option<Duration> {
        let came = self.came.load(Ordering::Relaxed);
        (came > 0).then(|| now.saturating_sub(Duration::from_millis(came)))
    }

    pub(super) fn note_coming(&self, now: Duration) {
        self.came.store(clock::millis(now), Ordering::Relaxed);
    }
}

/// As requests name it that name no host.
pub fn authority_of(source: &Source) -> String {
    match source {
        Source::Fixed(place) => authority(place, None),
        Source::Dns(DnsName { name, port, .. }) => format!("{name}:{port}"),
    }
}

/// Of `HOST:PORT`; a socket has none, and is of this machine.
fn host(place: &str) -> &str {
    if place.starts_with("unix:") {
        return "localhost";
    }
    let host = place.rsplit_once(':').map_or(place, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

fn authority(place: &str, name: Option<&str>) -> String {
    match (name, place.rsplit_once(':')) {
        (Some(name), Some((_, port))) => format!("{name}:{port}"),
        _ if place.starts_with("unix:") => host(place).to_owned(),
        _ => place.to_owned(),
    }
}
