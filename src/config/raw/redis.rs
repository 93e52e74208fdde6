//! Redis as it is written.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::TimeLength;
use crate::config::yaml::{At, OneOrMany};

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Redis {
    /// `redis://HOST:PORT`, or `rediss://` for TLS; `/N` behind it is the database of mode single.
    pub urls: At<OneOrMany<String>>,
    /// [default: single for one URL, cluster for several]
    pub mode: Option<At<RedisMode>>,
    /// The master's name among sentinels [default: mymaster].
    pub master_name: Option<At<String>>,
    /// [default: that of the URLs]
    pub username: Option<At<String>>,
    /// [default: that of the URLs]
    pub password: Option<At<String>>,
    /// What all keys begin with [default: weir].
    pub key_prefix: Option<At<String>>,
    /// The most that a request waits for a command [default: 20ms].
    pub timeout: Option<At<TimeLength>>,
    /// [default: 500ms]
    pub connect_timeout: Option<At<TimeLength>>,
    /// For `rediss://` [default: the public authorities, no certificate of ours].
    pub tls: Option<At<Tls>>,
    /// Where rate limits are kept, if elsewhere.
    pub rate_limit: Option<At<RedisClient>>,
    /// Where sessions are kept, if elsewhere.
    pub sessions: Option<At<RedisClient>>,
}

/// With no URLs, the main ones; with URLs, nothing of the main mode, user or password is taken over.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RedisClient {
    pub urls: Option<At<OneOrMany<String>>>,
    /// [default: single for one URL, cluster for several]
    pub mode: Option<At<RedisMode>>,
    /// The master's name among sentinels [default: mymaster].
    pub master_name: Option<At<String>>,
    /// [default: that of the URLs]
    pub username: Option<At<String>>,
    /// [default: that of the URLs]
    pub password: Option<At<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedisMode {
    Single,
    Sentinel,
    Cluster,
}

/// Of Redis, and of Postgres.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Tls {
    /// The authorities that are believed, a PEM file, in place of the public ones.
    pub ca: Option<At<String>>,
    /// What weir shows the servers.
    pub certificate: Option<At<Certificate>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Certificate {
    /// A PEM file.
    pub cert: At<String>,
    /// A PEM file.
    pub key: At<String>,
}
