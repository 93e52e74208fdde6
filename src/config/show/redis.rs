//! Redis as the file spells it, without what a URL may say of users: that has keys of its own; and TLS to any server.

use super::shown::Keys;
use crate::config::raw::RedisMode;
use crate::config::redis::{Certificate, Client, Mode, Redis, Tls};

pub(super) fn redis(redis: &Redis) -> Keys {
    client(&redis.main)
        .key("key_prefix", &redis.key_prefix)
        .key("timeout", redis.timeout)
        .key("connect_timeout", redis.connect_timeout)
        .key("tls", tls(&redis.tls))
        .key("rate_limit", redis.rate_limit.as_ref().map(client))
        .key("sessions", redis.sessions.as_ref().map(client))
}

/// `None` where the file says nothing of it.
pub(super) fn tls(tls: &Tls) -> Option<Keys> {
    Keys::new()
        .key("ca", tls.ca.as_deref())
        .key("certificate", tls.certificate.as_ref().map(certificate))
        .any()
}

pub(super) fn certificate(files: &Certificate) -> Keys {
    Keys::new()
        .key("cert", &*files.cert)
        .key("key", &*files.key)
}

fn client(client: &Client) -> Keys {
    let scheme = if client.tls { "rediss" } else { "redis" };
    let (mode, master_name) = match &client.mode {
        Mode::Single { .. } => (RedisMode::Single, None),
        Mode::Sentinel { master_name } => (RedisMode::Sentinel, Some(master_name)),
        Mode::Cluster => (RedisMode::Cluster, None),
    };
    let database = match client.database() {
        0 => String::new(),
        database => format!("/{database}"),
    };
    let urls = client.endpoints.iter();
    let urls = urls.map(|endpoint| format!("{scheme}://{endpoint}{database}"));
    Keys::new()
        .key("urls", urls.collect::<Vec<_>>())
        .key("mode", mode)
        .key("master_name", master_name)
        .key("username", client.username.as_ref())
        .key("password", client.password.as_ref())
}
