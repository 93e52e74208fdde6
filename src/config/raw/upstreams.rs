//! Upstreams as they are written.

use std::fmt;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::Certificate;
use crate::config::units::{ByteSize, Percent, TimeLength};
use crate::config::yaml::{At, OneOrMany};

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Upstream {
    /// `["http://127.0.0.1:3000"]`, or `{dns: app.svc:443, refresh: 10s}`; several of both in a list.
    pub endpoints: At<OneOrMany<Endpoint>>,
    /// [default: http1]
    pub protocol: Option<At<UpstreamProtocol>>,
    /// For `https://` endpoints and names [default: the public authorities, the endpoint's own name, no certificate of ours].
    pub tls: Option<At<UpstreamTls>>,
    /// round_robin, least_request or {ring_hash: {by: client.ip}} [default: least_request].
    pub load_balancing: Option<At<LoadBalancing>>,
    /// [default: 1s]
    pub connect_timeout: Option<At<TimeLength>>,
    /// From the end of the request to the end of the response's head [default: 15s].
    pub timeout: Option<At<TimeLength>>,
    /// For a connection to it that no request uses [default: 50s].
    pub idle_timeout: Option<At<TimeLength>>,
    /// For a connection to it, less up to a tenth by chance: an older one gets no new requests [default: 1h].
    pub max_age: Option<At<TimeLength>>,
    /// What this process asks of it at a time [default: any number].
    pub concurrency: Option<At<Concurrency>>,
    /// Requests that are tried again [default: none].
    pub retries: Option<At<Retries>>,
    /// Endpoints are asked how they are [default: no].
    pub health: Option<At<HealthCheck>>,
    /// Endpoints that fail requests are left out for a while [default: no].
    pub outlier_detection: Option<At<OutlierDetection>>,
    /// New and recovered endpoints get their part of the traffic step by step [default: at once].
    pub slow_start: Option<At<SlowStart>>,
    /// Where a smaller share of the endpoints than this is up, all are used, since those left would be overrun; 0%: never
    /// [default: 50%].
    pub panic_threshold: Option<At<Percent>>,
    /// A name under `circuit_breakers`.
    pub circuit_breaker: Option<At<String>>,
    /// May its responses start and end sessions, by X-Weir-Session-Start and -End [default: false]?
    pub trust_session_headers: Option<At<bool>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct UpstreamTls {
    /// In place of the endpoint's own name, for what is asked and for what its certificate must say.
    pub sni: Option<At<String>>,
    /// The authorities that are believed, a PEM file, in place of the public ones.
    pub ca: Option<At<String>>,
    /// What weir shows the upstream.
    pub certificate: Option<At<Certificate>>,
}

/// What an upstream speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamProtocol {
    #[default]
    Http1,
    /// Known beforehand where there is no TLS, by which it could be agreed on.
    Http2,
    /// Either, as each connection agrees on it (ALPN): under TLS alone.
    Auto,
}

/// `http://HOST:PORT`, `https://HOST:PORT`, `unix:/PATH`, or a name with many addresses.
#[derive(Debug, JsonSchema)]
#[schemars(untagged)]
pub enum Endpoint {
    Url(String),
    Dns(DnsEndpoint),
}

/// Each address of the name is an endpoint.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct DnsEndpoint {
    /// `NAME:PORT`.
    pub dns: At<String>,
    /// The longest between two looks; sooner where the addresses hold for less [default: 10s].
    pub refresh: Option<At<TimeLength>>,
    /// The name servers to ask, as IP or IP:PORT [default: the system's, and its hosts file].
    pub servers: Option<At<Vec<At<String>>>>,
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Endpoint, D::Error> {
        struct UrlOrDns;

        impl<'de> Visitor<'de> for UrlOrDns {
            type Value = Endpoint;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("http://HOST:PORT, unix:/PATH or {dns: NAME:PORT}")
            }

            fn visit_str<E>(self, text: &str) -> Result<Endpoint, E> {
                Ok(Endpoint::Url(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Endpoint, A::Error> {
                DnsEndpoint::deserialize(MapAccessDeserializer::new(map)).map(Endpoint::Dns)
            }
        }

        // As a struct, so that unknown keys are told.
        deserializer.deserialize_struct("Endpoint", &["dns", "refresh", "servers"], UrlOrDns)
    }
}

/// Which endpoint takes a request.
#[derive(Debug, JsonSchema)]
#[schemars(untagged)]
pub enum LoadBalancing {
    /// `round_robin` or `least_request`.
    Named(String),
    Ring(RingHash),
}

/// Requests with the same key go to the same endpoint while it is up.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RingHash {
    pub ring_hash: At<RingKey>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RingKey {
    /// As that of rate limits: client.ip, header:NAME, cookie:NAME, session.user and more.
    pub by: At<OneOrMany<String>>,
}

impl<'de> Deserialize<'de> for LoadBalancing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LoadBalancing, D::Error> {
        struct NameOrRing;

        impl<'de> Visitor<'de> for NameOrRing {
            type Value = LoadBalancing;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("round_robin, least_request or {ring_hash: {by: KEY}}")
            }

            fn visit_str<E>(self, text: &str) -> Result<LoadBalancing, E> {
                Ok(LoadBalancing::Named(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<LoadBalancing, A::Error> {
                RingHash::deserialize(MapAccessDeserializer::new(map)).map(LoadBalancing::Ring)
            }
        }

        deserializer.deserialize_struct("LoadBalancing", &["ring_hash"], NameOrRing)
    }
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Concurrency {
    /// Requests under way, those whose response does not end too; with `adaptive` the most that are found to do well, too [default: 1024].
    pub max: Option<At<u32>>,
    /// gradient: how many may wait for the head of their response is learnt from how long it takes [default: `max`, always].
    pub adaptive: Option<At<Adaptive>>,
    /// With `adaptive`: requests that may be under way however slow they are [default: 5].
    pub min: Option<At<u32>>,
    /// Requests that wait for one of them to end, or for a connection, for at most `connect_timeout`; those beyond get 503
    /// at once [default: 128].
    pub pending: Option<At<u32>>,
    /// [default: 1024]
    pub max_connections: Option<At<u32>>,
}

/// How a bound is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Adaptive {
    Gradient,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HealthCheck {
    /// Asked by GET; 200 to 399 is well.
    pub path: Option<At<String>>,
    /// In place of `path`: the service that is asked for by gRPC's health checks; "": the server.
    pub grpc: Option<At<String>>,
    /// What checks name as their host [default: the endpoint's own name and port].
    pub host: Option<At<String>>,
    /// [default: 10s]
    pub interval: Option<At<TimeLength>>,
    /// [default: 1s]
    pub timeout: Option<At<TimeLength>>,
    /// So many failures in a row [default: 3].
    pub unhealthy_after: Option<At<u32>>,
    /// So many answers in a row [default: 2].
    pub healthy_after: Option<At<u32>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct OutlierDetection {
    /// So many 5xx, failures to connect, resets and timeouts in a row eject an endpoint [default: 5].
    pub consecutive_5xx: Option<At<u32>>,
    /// Between looks at who may come back [default: 10s].
    pub interval: Option<At<TimeLength>>,
    /// How long the first ejection lasts; each one soon after another as much longer, up to 5m [default: 30s].
    pub base_ejection_time: Option<At<TimeLength>>,
    /// Of all endpoints; one may always be ejected [default: 10].
    pub max_ejection_percent: Option<At<u32>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SlowStart {
    /// How long it takes to get a full part.
    pub window: At<TimeLength>,
    /// The part that it begins with [default: 10%].
    pub min_weight: Option<At<Percent>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Retries {
    /// Tries beside the first [default: 1].
    pub attempts: Option<At<u32>>,
    /// connect_failure, reset_before_request, reset, timeout, 5xx, or a status such as "503" [default: connect_failure,
    /// reset_before_request and "503"].
    pub retry_on: Option<At<Vec<At<String>>>>,
    /// What the upstream may have seen is tried again for these alone [default: GET, HEAD, OPTIONS].
    pub methods: Option<At<Vec<At<String>>>>,
    /// For one try, to the end of the response's head [default: all that is left of `timeout`].
    pub per_try_timeout: Option<At<TimeLength>>,
    pub backoff: Option<At<Backoff>>,
    pub budget: Option<At<Budget>>,
    /// The largest body that is kept, so that it can be sent again [default: 0B, none].
    pub buffer: Option<At<ByteSize>>,
}

/// A random wait, of at most `base`, doubled with each try.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Backoff {
    /// [default: 25ms]
    pub base: Option<At<TimeLength>>,
    /// [default: 250ms]
    pub max: Option<At<TimeLength>>,
}

/// How many retries this process has under way, so that they do not finish off an upstream in trouble.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Budget {
    /// Of the requests under way [default: 20].
    pub percent: Option<At<u32>>,
    /// However few there are [default: 3].
    pub min_concurrent: Option<At<u32>>,
}
