//! Sessions as the file spells them.

use super::shown::Keys;
use crate::config::sessions::{Sessions, TokenSource};

pub(super) fn sessions(sessions: &Sessions) -> Keys {
    let (settings, shared) = (&sessions.settings, &sessions.shared);
    let source = |source: &TokenSource| match source {
        TokenSource::Cookie(name) => Keys::new().key("cookie", name),
        TokenSource::Bearer => Keys::new().key("bearer", true),
        TokenSource::Header(name) => Keys::new().key("header", name),
    };
    Keys::new()
        .key("token", super::each(&settings.sources, source))
        .key("idle_timeout", settings.idle_timeout)
        .key("absolute_timeout", settings.absolute_timeout)
        .key("touch_every", shared.touch_every)
        .key("max_per_user", settings.max_per_user)
        .key("on_max", settings.on_max)
        .key("max_sessions", sessions.max_sessions)
        .key(
            "cache",
            Keys::new()
                .key("ttl", shared.cache.ttl)
                .key("negative_ttl", shared.cache.negative_ttl)
                .key("max_entries", shared.cache.max_entries),
        )
        .key(
            "forward",
            Keys::new()
                .key("user", settings.forward.user.as_ref())
                .key("session", settings.forward.session.as_ref())
                .key("claims", settings.forward.claims.as_ref()),
        )
        .key(
            "cookie",
            Keys::new()
                .key("secure", settings.cookie.secure)
                .key("http_only", settings.cookie.http_only)
                .key("same_site", settings.cookie.same_site)
                .key("path", &settings.cookie.path),
        )
        .key(
            "on_redis_loss",
            Keys::new().key("action", "deny").key("grace", shared.grace),
        )
}
