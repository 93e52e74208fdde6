//! What limits look at in a request: the parts of their keys, and its cost. Charges nothing.

use std::borrow::Cow;
use std::net::IpAddr;

use percent_encoding::percent_decode;
use serde_json::Value;
use smallvec::{SmallVec, smallvec};

use super::exchange::Conn;
use super::headers::Client;
use super::reply::{Exceeded, Rejection};
use crate::config::limit_keys::{client_key, credentials_key, has_credentials};
use crate::config::limits::{Cost, KeyPart, Limit, Mode};
use crate::config::matches::PathMatch;
use crate::http1::head::RequestHead;
use crate::http1::hygiene::fold_to_one;
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

/// What is taken of several values for one part that differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OfSeveral {
    First,
    Nothing,
}

/// Why a request has no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoKey {
    /// It lacks a part.
    Missing,
    /// A part has several values that differ: which of them the application takes is not known.
    Several,
}

impl<'a> Facts<'a> {
    /// The parts of a limit's key; `None` when the request lacks one, and the limit does not mind. One that has several is refused: it
    /// could be counted under any.
    pub(super) fn key(
        &self,
        limit_index: usize,
        plan: &'a Plan,
    ) -> Result<Option<Parts<'a>>, Rejection> {
        let limit = &plan.config.limits[limit_index];
        let parts = self.parts(&limit.by, plan, OfSeveral::Nothing);
        if let Err(why) = parts {
            plan.limits[limit_index].metrics.missing.inc();
            // Without a key there is nothing that tells requests apart.
            let by_chance = || limit.enforced >= 1.0 || fastrand::f64() < limit.enforced;
            let refuses = limit.deny_missing || why == NoKey::Several;
            if refuses && limit.mode == Mode::Enforce && by_chance() {
                return Err(Rejection::QuotaExceeded(Box::new(Exceeded {
                    limits: smallvec![plan.limits[limit_index].words.json],
                    retry_after: None,
                    fields: Vec::new(),
                })));
            }
        }
        Ok(parts.ok())
    }

    /// What the request costs by this limit.
    pub(super) fn cost(&self, limit: &Limit) -> u64 {
        match &limit.cost {
            Cost::Constant(cost) => *cost,
            Cost::Header { name, default } => self
                .head
                .field(self.request.buffer, name)
                .and_then(told_cost)
                // A client's word may make a request dear, and never free.
                .map_or(*default, |cost| cost.max(1)),
        }
    }

    /// The parts of a key of these.
    pub(super) fn parts(
        &self,
        by: &[KeyPart],
        plan: &'a Plan,
        of_several: OfSeveral,
    ) -> Result<Parts<'a>, NoKey> {
        let part = |part| self.part(part, plan, of_several);
        by.iter().map(part).collect()
    }

    fn part(
        &self,
        part: &KeyPart,
        plan: &'a Plan,
        of_several: OfSeveral,
    ) -> Result<Cow<'a, [u8]>, NoKey> {
        match part {
            KeyPart::Header(name) => {
                let lines = self.head.lines(self.request.buffer);
                // Servers that speak CGI or WSGI to applications take `x_api_key` for `x-api-key`.
                let same = lines.filter(|(other, _)| fold_to_one(other, name.as_bytes()));
                let value = one_of(same.map(|(_, value)| Cow::Borrowed(value)), of_several)?;
                Ok(match (has_credentials(name), value) {
                    (true, Cow::Borrowed(value)) => credentials_key(value),
                    (_, value) => value,
                })
            }
            KeyPart::Cookie(name) => {
                let fields = self.head.values(self.request.buffer, "cookie");
                one_of(cookies(fields, name), of_several)
            }
            KeyPart::Query(name) => {
                let query = self.query.get(1..).unwrap_or_default();
                one_of(parameters(query, name), of_several)
            }
            part => self.one_part(part, plan).ok_or(NoKey::Missing),
        }
    }

    fn certificate(&self) -> Option<&'a ClientCertificate> {
        self.conn.peer.tls.as_ref()?.certificate.as_ref()
    }

    /// Of what a request has one at most.
    fn one_part(&self, part: &KeyPart, plan: &'a Plan) -> Option<Cow<'a, [u8]>> {
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
            KeyPart::Header(_) | KeyPart::Cookie(_) | KeyPart::Query(_) => None,
            KeyPart::Path => {
                let mut path = path::most_lenient(self.request.path);
                let matches = &plan.config.routes[self.route].matches;
                // As many keys as spellings would be no limit.
                if matches.ignore_case {
                    path = path.to_ascii_lowercase().into();
                }
                if let (Some(PathMatch::Tree(_)), Some(folder)) =
                    (&matches.path, path.strip_suffix('/'))
                    && !folder.is_empty()
                {
                    path = folder.to_owned().into();
                }
                Some(match path {
                    Cow::Borrowed(path) => Cow::Borrowed(path.as_bytes()),
                    Cow::Owned(path) => Cow::Owned(path.into_bytes()),
                })
            }
            KeyPart::Host => Some(Cow::Owned(
                self.request.host_name().to_ascii_lowercase().into_bytes(),
            )),
            KeyPart::Method => text(self.request.method),
            KeyPart::Route => text(&plan.routes[self.route].key),
            KeyPart::Upstream => {
                let upstream = plan.config.routes[self.route].upstream()?;
                text(&plan.config.upstreams[upstream].name)
            }
            KeyPart::SessionUser => text(&self.session?.user),
            KeyPart::SessionClaim(name) => match self.session?.claim(name)? {
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

/// The values of the cookies of this name, as sent: old applications' cookies are not all UTF-8.
fn cookies<'a>(
    fields: impl Iterator<Item = &'a [u8]>,
    name: &str,
) -> impl Iterator<Item = Cow<'a, [u8]>> {
    let pairs = fields.flat_map(|field| field.split(|byte| *byte == b';'));
    pairs.filter_map(move |pair| {
        let value = pair.trim_ascii().strip_prefix(name.as_bytes())?;
        value.strip_prefix(b"=").map(Cow::Borrowed)
    })
}

/// The values of the parameters of this name, without escapes. Some servers part a query at `;`, too, as Rack does, and some take names for
/// one that differ in case, as ASP.NET, or in what is no letter, as PHP. One that is counted so by none would be no limit to the others.
pub(super) fn parameters<'a>(query: &'a [u8], name: &str) -> impl Iterator<Item = Cow<'a, [u8]>> {
    let pairs = query.split(|byte| matches!(byte, b'&' | b';'));
    pairs.filter_map(move |pair| {
        let at = pair.iter().position(|byte| *byte == b'=');
        let at = at.unwrap_or(pair.len());
        let written: Cow<'_, [u8]> = percent_decode(&pair[..at]).into();
        let same = may_be(&written, name.as_bytes());
        same.then(|| percent_decode(pair.get(at + 1..).unwrap_or_default()).into())
    })
}

/// Whether a parameter's name, without escapes, is this one to some server. PHP skips spaces in front, each of which may be a `+`, and takes
/// a NUL for the end; to qs, which Express has, and Rack `[name]` is `name`.
fn may_be(written: &[u8], name: &[u8]) -> bool {
    let is_skipped = |byte: &u8| matches!(byte, b' ' | b'+' | b'[' | b']');
    let start = written.iter().position(|byte| !is_skipped(byte));
    let (skipped, read) = written.split_at(start.unwrap_or(written.len()));
    let in_brackets = skipped.contains(&b'[');
    let ends = |byte: &u8| *byte == 0 || in_brackets && *byte == b']';
    let end = read.iter().position(ends).unwrap_or(read.len());
    fold_to_one(written, name) || fold_to_one(&read[..end], name)
}

/// The one value that there is, however often.
fn one_of<'a>(
    mut values: impl Iterator<Item = Cow<'a, [u8]>>,
    of_several: OfSeveral,
) -> Result<Cow<'a, [u8]>, NoKey> {
    let value = values.next().ok_or(NoKey::Missing)?;
    match of_several == OfSeveral::First || values.all(|other| other == value) {
        true => Ok(value),
        false => Err(NoKey::Several),
    }
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

/// The number that a field's value says, such as `7` or `2.5`: one that is no whole one is the next, and one that is too large the
/// largest that there is.
fn told_cost(value: &[u8]) -> Option<u64> {
    let value = value.trim_ascii();
    let value = value.strip_prefix(b"+").unwrap_or(value);
    let point = value.iter().position(|byte| *byte == b'.');
    let (whole, rest) = value.split_at(point.unwrap_or(value.len()));
    let rest = rest.get(1..).unwrap_or_default();
    let mut digits = whole.iter().chain(rest);
    if whole.len() + rest.len() == 0 || !digits.all(u8::is_ascii_digit) {
        return None;
    }
    let whole = whole.iter().fold(0_u64, |number, digit| {
        let digit = u64::from(digit - b'0');
        number.saturating_mul(10).saturating_add(digit)
    });
    let more = rest.iter().any(|digit| *digit != b'0');
    Some(whole.saturating_add(u64::from(more)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// With escapes where a byte must have one, and for those chosen.
    fn escaped(text: &[u8], chosen: u64) -> String {
        let byte = |(at, byte): (usize, &u8)| match byte.is_ascii_alphanumeric()
            && chosen >> (at % 64) & 1 == 0
        {
            true => char::from(*byte).to_string(),
            false => format!("%{byte:02X}"),
        };
        text.iter().enumerate().map(byte).collect()
    }

    #[test]
    fn a_cost_that_is_no_whole_number_is_not_made_small() {
        let check = |value: &str, expected| {
            assert_eq!(told_cost(value.as_bytes()), expected, "{value:?}");
        };
        check("7", Some(7));
        check(" +7 ", Some(7));
        check("0", Some(0));
        check("2.5", Some(3));
        check("2.0", Some(2));
        check(".1", Some(1));
        check("18446744073709551615", Some(u64::MAX));
        check("18446744073709551616", Some(u64::MAX));
        check("1844674407370955161.6", Some(1_844_674_407_370_955_162));
        check(&"9".repeat(1000), Some(u64::MAX));
        for nothing in ["", ".", "+", "-1", "1e9", "1,5", "1.2.3", "seven", "0x7"] {
            check(nothing, None);
        }
    }

    #[test]
    fn a_name_is_counted_however_a_server_reads_it_and_no_other_is() {
        let check = |name: &str, query: &str, expected: &[&str]| {
            let found: Vec<_> = parameters(query.as_bytes(), name).collect();
            let expected: Vec<_> = expected.iter().map(|value| value.as_bytes()).collect();
            assert_eq!(found, expected, "{name} {query}");
        };
        // Of eight bytes each.
        let (key, price) = ("ключ", "цена");
        check(
            key,
            &format!(
                "{}=1&{}=2",
                escaped(key.as_bytes(), 0),
                escaped(price.as_bytes(), 0)
            ),
            &["1"],
        );
        check(
            price,
            "%D0%BA%D0%BB%D1%8E%D1%87=1&%d1%86%d0%b5%d0%bd%d0%b0=2",
            &["2"],
        );
        check("api_key", "API.KEY=1&apiékey=2&api%20key=3", &["1", "3"]);
        // PHP skips spaces in front, and a NUL ends a name.
        check(
            "api_key",
            "api_key=A&+api_key=B&%20+api_key=C",
            &["A", "B", "C"],
        );
        check(
            "api_key",
            "api_key%00x=A&+api.key%00=B&%00api_key=C",
            &["A", "B"],
        );
        // qs, as Express has it, and Rack.
        check(
            "api_key",
            "[api_key]=A&%5Bapi_key%5d=B&[api_key][]=C",
            &["A", "B", "C"],
        );
        check("api_key", "api_key[]=A&x[api_key]=B&[api_key2]=C", &[]);
        check("a_b", "a[b]=A&[a][b]=B", &[]);
        check("a[b]", "a[b]=A&a%5Bb%5D=B", &["A", "B"]);
        check("[a]", "[a]=A", &["A"]);
        check("a", "&=&+=1&%00=2&[]=3&a", &[""]);
    }

    proptest! {
        #[test]
        fn a_parameter_is_found_however_it_is_escaped(
            before in "([0-9]{1,3}=[a-z=%]{0,4}[&;]){0,3}",
            name in "[a-z]{1,5}",
            value: Vec<u8>,
            chosen: u64,
            after in "([&;][0-9]{1,3}=[a-z=%]{0,4}){0,3}",
        ) {
            let (escaped_name, escaped_value) = (escaped(name.as_bytes(), chosen), escaped(&value, chosen));
            let query = format!("{before}{escaped_name}={escaped_value}{after}");
            let found: Vec<_> = parameters(query.as_bytes(), &name).collect();
            prop_assert_eq!(found, [Cow::<[u8]>::Owned(value)]);
        }

        #[test]
        fn no_bytes_panic(
            random in prop::collection::vec(any::<u8>(), 0..64),
            likely in "[ab=;& %2f]{0,40}",
        ) {
            for text in [&random[..], likely.as_bytes()] {
                let pairs = text.split(|byte| matches!(byte, b'&' | b';')).count();
                prop_assert!(parameters(text, "a").count() <= pairs);
                for value in cookies([text].into_iter(), "a") {
                    prop_assert!(!value.contains(&b';'));
                }
            }
        }
    }
}
