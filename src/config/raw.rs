//! The file as it is written: a serde mirror of its YAML, and the source of its JSON Schema. Owns the keys; must not
//! know what is right for them beyond their shape.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use schemars::JsonSchema;
use serde::de::Error;
use serde::{Deserialize, Deserializer};

use super::units::{ByteSize, Span};
use super::yaml::At;

/// The whole file. The short form is `listen` and `upstream`; the long form `listeners`, `upstreams` and `routes`.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct File {
    /// The version of this format: 1.
    pub version: Option<At<u32>>,
    /// Short form: the address to listen on, for example `0.0.0.0:8080`.
    pub listen: Option<At<String>>,
    /// Short form: where every request goes, for example `http://127.0.0.1:3000`.
    pub upstream: Option<At<String>>,
    /// Where clients connect.
    pub listeners: Option<At<Vec<At<Listener>>>>,
    /// Where requests go, by name.
    #[serde(default)]
    pub upstreams: BTreeMap<String, At<Upstream>>,
    /// Which upstream serves a request; the first match wins.
    pub routes: Option<Vec<At<Route>>>,
    pub runtime: Option<At<Runtime>>,
    pub shutdown: Option<At<Shutdown>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Listener {
    pub name: Option<At<String>>,
    /// For example `0.0.0.0:8080`.
    pub address: At<String>,
    pub client_ip: Option<At<ClientIp>>,
    pub limits: Option<At<Limits>>,
    pub timeouts: Option<At<Timeouts>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ClientIp {
    /// Networks whose X-Forwarded-For is believed, walked from the right [default: none].
    pub trusted_proxies: Vec<At<String>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Limits {
    /// The request line and all fields [default: 64KiB].
    pub max_header_bytes: Option<At<ByteSize>>,
    /// [default: 100]
    pub max_headers: Option<At<u16>>,
    /// [default: 10MiB]
    pub max_body: Option<At<ByteSize>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Timeouts {
    /// For a request's head to be whole once its first byte is here [default: 10s].
    pub header_read: Option<At<Span>>,
    /// For a connection without a request [default: 60s].
    pub keep_alive: Option<At<Span>>,
    /// For a switched connection (WebSocket) on which nothing moves [default: 5m].
    pub stream_idle: Option<At<Span>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Upstream {
    /// One endpoint, for example `["http://127.0.0.1:3000"]`.
    pub endpoints: At<Vec<At<String>>>,
    /// [default: 1s]
    pub connect_timeout: Option<At<Span>>,
    /// From the request to the end of the response's head, and for each stall in a body [default: 15s].
    pub timeout: Option<At<Span>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Route {
    /// Absent: every request.
    #[serde(rename = "match")]
    pub matches: Option<At<Match>>,
    /// A name under `upstreams`.
    pub upstream: At<String>,
    /// In place of the upstream's.
    pub timeout: Option<At<Span>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Match {
    /// `api.example.com`, or `*.example.com` for any name below it.
    pub host: Option<At<String>>,
    /// `/pay`, or `/pay/*` for all below it.
    pub path: Option<At<String>>,
    /// Any of these; empty: every method.
    #[serde(default)]
    pub methods: Vec<At<String>>,
    /// All of these, each with its exact value.
    #[serde(default)]
    pub headers: BTreeMap<String, At<String>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Runtime {
    /// Threads that serve requests [default: auto, one a core].
    pub lanes: Option<At<Lanes>>,
}

/// `auto`, or how many.
#[derive(Debug, JsonSchema)]
#[schemars(untagged)]
pub enum Lanes {
    Auto(Auto),
    Count(NonZeroUsize),
}

#[derive(Debug, JsonSchema)]
#[schemars(rename_all = "snake_case")]
pub enum Auto {
    Auto,
}

impl<'de> Deserialize<'de> for Lanes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Lanes, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "auto" => Ok(Lanes::Auto(Auto::Auto)),
            text => text.parse().map(Lanes::Count).map_err(|_| {
                D::Error::custom(format_args!(
                    "\"{text}\" lanes: use auto or a number from 1"
                ))
            }),
        }
    }
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Shutdown {
    /// For requests in flight to end [default: 25s].
    pub drain: Option<At<Span>>,
}
