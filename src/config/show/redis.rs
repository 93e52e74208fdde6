//! Redis as the file spells it, without what a URL may say of users: that has keys of its own.

use std::path::Path;

use serde::Serialize;

use crate::config::raw::RedisMode;
use crate::config::redis::{self, Mode};
use crate::config::units::Span;

#[derive(Serialize)]
pub(super) struct Redis<'c> {
    #[serde(flatten)]
    main: Client<'c>,
    key_prefix: &'c str,
    timeout: Span,
    connect_timeout: Span,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<Tls<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limit: Option<Client<'c>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sessions: Option<Client<'c>>,
}

#[derive(Serialize)]
struct Client<'c> {
    urls: Vec<String>,
    mode: RedisMode,
    #[serde(skip_serializing_if = "Option::is_none")]
    master_name: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    username: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    password: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Tls<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<&'c Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<Certificate<'c>>,
}

#[derive(Serialize)]
pub(super) struct Certificate<'c> {
    cert: &'c Path,
    key: &'c Path,
}

impl<'c> Redis<'c> {
    pub(super) fn new(redis: &'c redis::Redis) -> Redis<'c> {
        Redis {
            main: Client::new(&redis.main),
            key_prefix: &redis.key_prefix,
            timeout: Span(redis.timeout),
            connect_timeout: Span(redis.connect_timeout),
            tls: Tls::new(&redis.tls),
            rate_limit: redis.rate_limit.as_ref().map(Client::new),
            sessions: redis.sessions.as_ref().map(Client::new),
        }
    }
}

impl<'c> Tls<'c> {
    /// `None` where the file says nothing of it.
    pub(super) fn new(tls: &'c redis::Tls) -> Option<Tls<'c>> {
        (*tls != redis::Tls::default()).then(|| Tls {
            ca: tls.ca.as_deref(),
            certificate: tls.certificate.as_ref().map(Certificate::new),
        })
    }
}

impl<'c> Certificate<'c> {
    pub(super) fn new(files: &'c redis::Certificate) -> Certificate<'c> {
        Certificate {
            cert: &files.cert,
            key: &files.key,
        }
    }
}

impl<'c> Client<'c> {
    fn new(client: &'c redis::Client) -> Client<'c> {
        let scheme = if client.tls { "rediss" } else { "redis" };
        let (mode, master_name, database) = match &client.mode {
            Mode::Single { database: 0 } => (RedisMode::Single, None, String::new()),
            Mode::Single { database } => (RedisMode::Single, None, format!("/{database}")),
            Mode::Sentinel { master_name } => (
                RedisMode::Sentinel,
                Some(master_name.as_str()),
                String::new(),
            ),
            Mode::Cluster => (RedisMode::Cluster, None, String::new()),
        };
        Client {
            urls: client
                .endpoints
                .iter()
                .map(|endpoint| format!("{scheme}://{endpoint}{database}"))
                .collect(),
            mode,
            master_name,
            username: client.username.as_deref(),
            password: client
                .password
                .as_ref()
                .map(|password| format!("{password:?}")),
        }
    }
}
