//! Routes as the file spells them: what they match, what they change on the way, and what they answer by themselves.

use std::collections::BTreeMap;

use super::shown::{Keys, texts};
use crate::config::rewrite::{HeaderChanges, NewPath, Redirect, Reply, To};
use crate::config::sessions::RouteSession;
use crate::config::units::Percent;
use crate::config::{Config, Route};
use crate::event::{REDACTED, Redaction};

pub(super) fn route(route: &Route, config: &Config) -> Keys {
    let matches = &route.matches;
    let usual = Redaction::default();
    let audit = config.audit.as_ref();
    let redaction = audit.map_or(&usual, |audit| &audit.redaction);
    // What the audit would redact may hold a secret, too.
    let hides =
        |name: &str| redaction.hides(name) || route.hidden.contains(&name.to_ascii_lowercase());
    let keys = Keys::new().key(
        "match",
        Keys::new()
            .key("host", matches.host.as_ref().map(ToString::to_string))
            .key("path", matches.path.as_ref().map(ToString::to_string))
            .key(
                "ignore_case",
                matches.path.as_ref().map(|_| matches.ignore_case),
            )
            .key("methods", some(texts(&matches.methods)))
            .key("headers", fields(&matches.headers, hides))
            .any(),
    );
    let keys = match &route.to {
        To::Upstream(index) => keys.key("upstream", &config.upstreams[*index].name),
        To::Redirect(it) => keys.key("redirect", redirect(it)),
        To::Reply(it) => keys.key("reply", reply(it, hides)),
    };
    let limits = route.limits.iter().chain(&route.session_limits);
    let limits = limits.map(|index| config.limits[*index].name.as_str());
    let session = |session: &RouteSession| {
        let claims = &session.claims;
        let claims = claims.iter().map(|(name, claim)| (&**name, claim.clone()));
        Keys::new()
            .key("use", &config.sessions[session.sessions].name)
            .key("require", session.require)
            .key("claims", named(claims))
    };
    let revalidate_every = route.session.as_ref().map(|it| it.revalidate_every);
    let keys = keys
        .key("rate_limits", limits.collect::<Vec<_>>())
        .key("session", route.session.as_ref().map(session))
        .key("revalidate_every", revalidate_every);
    // Where the file has no audit, a route cannot ask for one.
    let keys = match (audit, route.audit_sample) {
        (None, _) => keys,
        (Some(_), None) => keys.key("audit", route.audit),
        (Some(_), Some(sample)) => keys.key(
            "audit",
            Keys::new()
                .key("level", route.audit)
                .key("sample", Percent(sample)),
        ),
    };
    keys.key("timeout", route.timeout)
        .key("shed", route.shed)
        .key(
            "rewrite",
            Keys::new()
                .key("path_prefix", route.rewrite.path_prefix.as_ref())
                .key("host", route.rewrite.host.as_ref())
                .any(),
        )
        .key("request_headers", changes(&route.request_headers, hides))
        .key("response_headers", changes(&route.response_headers, hides))
}

fn redirect(redirect: &Redirect) -> Keys {
    let keys = Keys::new()
        .key("status", redirect.status)
        .key("scheme", redirect.scheme)
        .key("host", redirect.host.as_deref())
        .key("port", redirect.port);
    let keys = match &redirect.path {
        None => keys,
        Some(NewPath::Whole(path)) => keys.key("path", &**path),
        Some(NewPath::Prefix(prefix)) => keys.key("path_prefix", &**prefix),
    };
    keys.key("strip_query", redirect.strip_query)
}

fn reply(reply: &Reply, hides: impl Fn(&str) -> bool) -> Keys {
    Keys::new()
        .key("status", reply.status)
        .key("body", &*reply.body)
        .key("content_type", &*reply.content_type)
        .key("headers", fields(&reply.headers, hides))
}

fn changes(changes: &HeaderChanges, hides: impl Fn(&str) -> bool) -> Option<Keys> {
    Keys::new()
        .key("set", fields(changes.set(), &hides))
        .key("add", fields(changes.added(), &hides))
        .key("remove", some(texts(changes.removed())))
        .any()
}

/// Names and values; those that are hidden may hold a secret.
fn fields(
    fields: &[(String, String)],
    hides: impl Fn(&str) -> bool,
) -> Option<BTreeMap<&str, &str>> {
    named(fields.iter().map(|(name, value)| match hides(name) {
        true => (&**name, REDACTED),
        false => (&**name, &**value),
    }))
}

fn named<'c, T>(entries: impl Iterator<Item = (&'c str, T)>) -> Option<BTreeMap<&'c str, T>> {
    let entries: BTreeMap<_, _> = entries.collect();
    (!entries.is_empty()).then_some(entries)
}

fn some(list: Vec<String>) -> Option<Vec<String>> {
    (!list.is_empty()).then_some(list)
}
