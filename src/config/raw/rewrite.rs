//! What a route changes on the way, and what it answers by itself, as the file spells it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::yaml::At;

/// What of a request goes to the upstream in another form. Limits, audit and metrics see it as it was sent.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Rewrite {
    /// In place of what `match.path` names: `/v2` makes `/v2/x` of `/pay/x` for `/pay/*`, and `/v2` of `/pay` for `/pay`.
    pub path_prefix: Option<At<String>>,
    /// In place of Host, which goes on as X-Forwarded-Host.
    pub host: Option<At<String>>,
}

/// Fields of a message that change on the way.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HeaderChanges {
    /// In place of any that are there.
    #[serde(default)]
    pub set: BTreeMap<String, At<String>>,
    /// Beside any that are there.
    #[serde(default)]
    pub add: BTreeMap<String, At<String>>,
    #[serde(default)]
    pub remove: Vec<At<String>>,
}

/// Sends clients elsewhere; what is left out is as in the request.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308 [default: 302].
    pub status: Option<At<u16>>,
    /// http or https.
    pub scheme: Option<At<Scheme>>,
    /// Without a port.
    pub host: Option<At<String>>,
    /// [default: that of the scheme, where the scheme or the host is told]
    pub port: Option<At<u16>>,
    /// In place of the whole path.
    pub path: Option<At<String>>,
    /// In place of what `match.path` names.
    pub path_prefix: Option<At<String>>,
    /// Whether the query is left out [default: false].
    pub strip_query: Option<At<bool>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    Http,
    Https,
}

/// What clients get.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Reply {
    /// [default: 200]
    pub status: Option<At<u16>>,
    /// [default: none]
    pub body: Option<At<String>>,
    /// Of the body [default: text/plain; charset=utf-8].
    pub content_type: Option<At<String>>,
    #[serde(default)]
    pub headers: BTreeMap<String, At<String>>,
}
