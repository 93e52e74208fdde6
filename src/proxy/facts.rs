//! What limits look at in a request: the parts of their keys, and its cost. Charges nothing.

use std::borrow::Cow;
use std::net::IpAddr;

use percent_encoding::percent_decode;
use serde_json::Value;
use smallvec::SmallVec;

use super::handle::Conn;
use super::headers::Client;
use super::reply::{Exceeded, Rejection};
use crate::config::limits::{Cost, KeyPart, Limit, Mode};
use crate::config::override_keys::client_key;
use crate::http1::head::RequestHead;
use crate::http1::path;
use crate::net::tls::ClientCertificate;
use crate::plan::Plan;
use crate::policy::balance::hash;
use crate::policy::routes::Request;
use crate::policy::session::Session;

/// What limits look at in a request.
pub(super) struct Facts<'a> {
    pub request: Request<'a>,
    /// Of the request, which may not be text as a whole.
    pub head: &'a RequestHead,
    /// Where the head stands.
    pub buffer: &'a [u8],
    /// With its `?`, or empty.
    pub query: &'a [u8],
    pub client: &'a Client,
    pub conn: &'a Conn<'a>,
    pub route: usize,
    /// Once it is known.
    pub session: Option<&'a Session>,
}

/// The parts of a limit's key.
pub(super) type Parts<'a> = SmallVec<[Cow<'a, [u8]>; 4]>;

impl<'a> Facts<'a> {
    /// The parts of a limit's key; `None` when the request lacks one, and the limit does not mind.
    pub(super) fn key(
        &self,
        limit_index: usize,
        plan: &'a Plan,
    ) -> Result<Option<Parts<'a>>, Rejection> {
        let limit = &plan.config.limits[limit_index];
        let parts = self.parts(&limit.by, plan);
        if parts.is_none() {
            plan.limit_metrics[limit_index].missing.inc();
            // Without a key there is nothing that tells requests apart.
            let by_chance = || limit.enforced >= 1.0 || fastrand::f64() < limit.enforced;
            if limit.deny_missing && limit.mode == Mode::Enforce && by_chance() {
                return Err(Rejection::QuotaExceeded(Box::new(Exceeded {
                    limits: vec![plan.names.limits[limit_index].json],
                    retry_after: None,
                    fields: Vec::new(),
                })));
            }
        }
        Ok(parts)
    }

    /// What the request costs by this limit.
    pub(super) fn cost(&self, limit: &Limit) -> u64 {
        match &limit.cost {
            Cost::Constant(cost) => *cost,
            Cost::Header { name, default } => self
                .head
                .field(self.buffer, name)
                .and_then(|value| std::str::from_utf8(value).ok()?.trim().parse().ok())
                // A client's word may make a request dear, and never free.
                .map_or(*default, |cost: u64| cost.max(1)),
        }
    }

    /// The parts of a key; `None` when the request lacks one.
    pub(super) fn parts(&self, by: &[KeyPart], plan: &'a Plan) -> Option<Parts<'a>> {
        by.iter().map(|part| self.part(part, plan)).collect()
    }

    fn certificate(&self) -> Option<&'a ClientCertificate> {
        self.conn.peer.tls.as_ref()?.certificate.as_ref()
    }

    fn part(&self, part: &KeyPart, plan: &'a Plan) -> Option<Cow<'a, [u8]>> {
        let text = |text: &'a str| Some(Cow::Borrowed(text.as_bytes()));
        match part {
            KeyPart::ClientIp => match self.client.ip {
                ip @ IpAddr::V4(_) if ip == self.conn.peer.ip => text(&self.conn.peer.text),
                ip => {
                    let prefix = self.conn.listener.ipv6_prefix;
                    Some(Cow::Owned(client_key(ip, prefix).into_bytes()))
                }
            },
            KeyPart::ClientCertSubject => text(self.certificate()?.subject.as_deref()?),
            KeyPart::ClientCertSan => text(self.certificate()?.san.as_deref()?),
            KeyPart::Header(name) => self.head.field(self.buffer, name).map(Cow::Borrowed),
            KeyPart::Cookie(name) => {
                // As sent: old applications' cookies are not all UTF-8.
                let cookies = self.head.values(self.buffer, "cookie");
                let mut pairs = cookies.flat_map(|value| value.split(|byte| *byte == b';'));
                let value = |pair: &'a [u8]| {
                    let pair = pair.trim_ascii();
                    pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")
                };
                pairs.find_map(value).map(Cow::Borrowed)
            }
            KeyPart::Query(name) => {
                let mut pairs = self.query.get(1..)?.split(|byte| *byte == b'&');
                pairs.find_map(|pair| {
                    let at = pair
                        .iter()
                        .position(|byte| *byte == b'=')
                        .unwrap_or(pair.len());
                    let same = percent_decode(&pair[..at]).eq(name.bytes());
                    same.then(|| percent_decode(pair.get(at + 1..).unwrap_or_default()).into())
                })
            }
            // With parameters a client would spell as many paths as it likes.
            KeyPart::Path => match path::without_parameters(self.request.path) {
                Some(bare) => Some(Cow::Owned(bare.into_bytes())),
                None => text(self.request.path),
            },
            KeyPart::Host => Some(Cow::Owned(
                self.request.host_name().to_ascii_lowercase().into_bytes(),
            )),
            KeyPart::Method => text(self.request.method),
            KeyPart::Route => text(&plan.route_keys[self.route]),
            KeyPart::Upstream => {
                let upstream = plan.config.routes[self.route].upstream()?;
                text(&plan.config.upstreams[upstream].name)
            }
            KeyPart::SessionUser => text(&self.session?.user),
            KeyPart::SessionClaim(name) => match self.session?.claims.get(name)? {
                Value::String(value) => text(value),
                value @ (Value::Null
                | Value::Bool(_)
                | Value::Number(_)
                | Value::Array(_)
                | Value::Object(_)) => Some(Cow::Owned(value.to_string().into_bytes())),
            },
        }
    }
}

/// The parts of a key as overrides name it.
pub(super) fn joined(parts: &[Cow<'_, [u8]>]) -> String {
    String::from_utf8(parts.join(&b':')).unwrap_or_default()
}

/// Whether this limit refuses requests of this key, and does not only count them. The same keys by all processes, and others by
/// another limit.
pub(super) fn refuses(limit: &Limit, parts: &Parts<'_>) -> bool {
    match limit.mode {
        Mode::Enforce if limit.enforced >= 1.0 => true,
        Mode::Enforce => {
            let name = [limit.name.as_bytes()].into_iter();
            let hash = hash(name.chain(parts.iter().map(|part| &**part)));
            (hash as f64) < limit.enforced * 2f64.powi(64)
        }
        Mode::Shadow | Mode::Disabled => false,
    }
}
