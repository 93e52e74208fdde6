//! What a route changes on the way and what it answers by itself, as the file spells it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::config::rewrite::{self, HeaderChanges, NewPath, Scheme};
use crate::event::REDACTED;

#[derive(Serialize)]
pub(super) struct Rewrite<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    path_prefix: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'c str>,
}

impl<'c> Rewrite<'c> {
    pub(super) fn new(rewrite: &'c rewrite::Rewrite) -> Option<Rewrite<'c>> {
        (*rewrite != rewrite::Rewrite::default()).then_some(Rewrite {
            path_prefix: rewrite.path_prefix.as_deref(),
            host: rewrite.host.as_deref(),
        })
    }
}

#[derive(Serialize)]
pub(super) struct Changes<'c> {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    set: BTreeMap<&'c str, &'c str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    add: BTreeMap<&'c str, &'c str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    remove: &'c [String],
}

impl<'c> Changes<'c> {
    pub(super) fn new(
        changes: &'c HeaderChanges,
        hides: impl Fn(&str) -> bool,
    ) -> Option<Changes<'c>> {
        (!changes.is_empty()).then(|| Changes {
            set: fields(changes.set(), &hides),
            add: fields(changes.added(), &hides),
            remove: changes.removed(),
        })
    }
}

#[derive(Serialize)]
pub(super) struct Redirect<'c> {
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    scheme: Option<Scheme>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_prefix: Option<&'c str>,
    strip_query: bool,
}

impl<'c> Redirect<'c> {
    pub(super) fn new(redirect: &'c rewrite::Redirect) -> Redirect<'c> {
        let (path, path_prefix) = match &redirect.path {
            None => (None, None),
            Some(NewPath::Whole(path)) => (Some(&**path), None),
            Some(NewPath::Prefix(prefix)) => (None, Some(&**prefix)),
        };
        Redirect {
            status: redirect.status,
            scheme: redirect.scheme,
            host: redirect.host.as_deref(),
            port: redirect.port,
            path,
            path_prefix,
            strip_query: redirect.strip_query,
        }
    }
}

#[derive(Serialize)]
pub(super) struct Reply<'c> {
    status: u16,
    body: &'c str,
    content_type: &'c str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    headers: BTreeMap<&'c str, &'c str>,
}

impl<'c> Reply<'c> {
    pub(super) fn new(reply: &'c rewrite::Reply, hides: impl Fn(&str) -> bool) -> Reply<'c> {
        Reply {
            status: reply.status,
            body: &reply.body,
            content_type: &reply.content_type,
            headers: fields(&reply.headers, hides),
        }
    }
}

/// Names and values; those that are hidden may hold a secret.
pub(super) fn fields(
    fields: &[(String, String)],
    hides: impl Fn(&str) -> bool,
) -> BTreeMap<&str, &str> {
    let shown = fields.iter();
    shown
        .map(|(name, value)| match hides(name) {
            true => (&**name, REDACTED),
            false => (&**name, &**value),
        })
        .collect()
}
