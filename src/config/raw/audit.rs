//! The audit as it is written.

use std::fmt;

use schemars::JsonSchema;
use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::config::units::{ByteSize, Percent, TimeLength};
use crate::config::yaml::At;

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Audit {
    /// [default: metadata]
    pub level: Option<At<AuditLevel>>,
    /// The share of requests kept; rejections and errors always are [default: 100%].
    pub sample: Option<At<Percent>>,
    pub capture: Option<At<Capture>>,
    pub redact: Option<At<Redact>>,
    /// [default: best_effort]
    pub delivery: Option<At<Delivery>>,
    pub stream: Option<At<AuditStream>>,
    pub spool: Option<At<Spool>>,
    pub sqlite: Option<At<Sqlite>>,
    pub integrity: Option<At<Integrity>>,
}

/// How much of a request is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AuditLevel {
    None,
    #[default]
    Metadata,
    /// And the headers of `capture`.
    Headers,
}

/// How much is kept of a route's requests: a level, or also a share of its own.
#[derive(Debug, JsonSchema)]
#[schemars(untagged)]
pub enum RouteAudit {
    Level(AuditLevel),
    Sampled(SampledAudit),
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SampledAudit {
    /// [default: that of `audit`]
    pub level: Option<At<AuditLevel>>,
    /// The share of the route's requests kept; rejections and errors always are [default: that of `audit`].
    pub sample: Option<At<Percent>>,
}

impl<'de> Deserialize<'de> for RouteAudit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RouteAudit, D::Error> {
        struct LevelOrSampled;

        impl<'de> Visitor<'de> for LevelOrSampled {
            type Value = RouteAudit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("none, metadata, headers or {level: LEVEL, sample: PERCENT}")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<RouteAudit, E> {
                AuditLevel::deserialize(StrDeserializer::new(text)).map(RouteAudit::Level)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RouteAudit, A::Error> {
                SampledAudit::deserialize(MapAccessDeserializer::new(map)).map(RouteAudit::Sampled)
            }
        }

        // As a struct, so that unknown keys are told.
        deserializer.deserialize_struct("RouteAudit", &["level", "sample"], LevelOrSampled)
    }
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Capture {
    /// [default: none]
    pub request_headers: Option<At<Vec<At<String>>>>,
    /// [default: none]
    pub response_headers: Option<At<Vec<At<String>>>>,
    /// Whether the query is kept, redacted [default: true].
    pub query: Option<At<bool>>,
}

/// Names whose values are written as `***`, beside those that always are, such as Authorization, Cookie, token and password. `*` in
/// a name stands for any text.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Redact {
    pub headers: Option<At<Vec<At<String>>>>,
    /// Parameters of the query.
    pub query: Option<At<Vec<At<String>>>>,
    /// Paths, with `*` for a segment that is written as `***`, or at the end for all that follow: `/reset/*`, `/users/*/keys` [default: none].
    pub paths: Option<At<Vec<At<String>>>>,
}

/// When a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// At once; what a full queue drops is counted.
    #[default]
    BestEffort,
    /// Once its event is safe from the end of weir; where none can be, with 503.
    Guaranteed,
}

/// With `postgres`: the streams of Redis that carry events to the worker.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct AuditStream {
    /// What their keys have in common [default: audit].
    pub name: Option<At<String>>,
    /// How many, spread over the cluster; the same at all weirs of a Redis, 1 to 256 [default: 8].
    pub shards: Option<At<u16>>,
    /// Entries of each, at most; then events wait in the spool [default: 10000000].
    pub max_length: Option<At<u64>>,
    pub batch: Option<At<StreamBatch>>,
}

/// An entry of a stream.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct StreamBatch {
    /// At most, 1 to 10000 [default: 200].
    pub events: Option<At<u32>>,
    /// How long the first waits for others; not under `delivery: guaranteed` [default: 20ms].
    pub wait: Option<At<TimeLength>>,
}

/// With `postgres`: where events wait on disk while Redis does not take them, and under `delivery: guaranteed` all of them until
/// they are stored.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Spool {
    /// A folder; each weir has one of its own within [default: /var/lib/weir/spool].
    pub path: Option<At<String>>,
    /// [default: 256MiB]
    pub max: Option<At<ByteSize>>,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Sqlite {
    /// The database; a day's file has the day before the extension, such as weir-audit-2026-11-25.db [default: weir-audit.db].
    pub path: Option<At<String>>,
    /// How long a day's file is kept, in whole days [default: 400d].
    pub retention: Option<At<TimeLength>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Integrity {
    /// Makes the hash chain one that only who has the key can write.
    pub key: At<String>,
}
