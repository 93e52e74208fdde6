//! The policies of a request, one after the other, cheap before dear. What passes is [`Admitted`], and only that can be
//! sent on.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use percent_encoding::percent_decode;

use super::handle::Conn;
use super::headers::{self, Client};
use super::record::Record;
use super::reply::{CircuitOpen, Exceeded, Rejection};
use crate::config::limits::{Cost, KeyPart, Limit, MAX_RULES, Mode, Rule};
use crate::config::{Config, LimitDefaults, Route};
use crate::http1::head::{BodyLength, RequestHead};
use crate::http1::path;
use crate::plan::Plan;
use crate::policy::limit::{Now, Verdict};
use crate::policy::routes;
use crate::store::breakers::Entry;
use crate::store::limits::{Ask, Key, Limits, Override};

/// A request that every policy lets pass.
pub(super) struct Admitted<'p> {
    pub route: &'p Route,
    /// The normalised path and the query as sent.
    pub target: Vec<u8>,
    pub client: Client,
    /// Whether the client waits for `100 Continue`.
    pub expects: bool,
    pub quota: Quota,
    /// The right to one call of the upstream, where it has a breaker.
    pub entry: Option<Entry>,
}

/// What a request was charged: its concurrency slots come back when this is dropped, and the client is told the rest.
pub(super) struct Quota {
    limits: Arc<Limits>,
    held: Vec<(Key, u64)>,
    /// Fields for the response, ready for the wire.
    pub fields: Vec<u8>,
}

impl Drop for Quota {
    fn drop(&mut self) {
        for (key, cost) in self.held.drain(..) {
            self.limits.release(key, cost);
        }
    }
}

/// Asks every policy about the request whose head stands in `buffer`.
pub(super) fn admit<'p>(
    plan: &'p Plan,
    conn: &Conn<'_>,
    buffer: &[u8],
    head: &RequestHead,
    now: Now,
    record: &mut Record,
) -> Result<Admitted<'p>, Rejection> {
    let target = &buffer[head.target.clone()];
    let (path, query) = match target.iter().position(|byte| *byte == b'?') {
        Some(at) => target.split_at(at),
        None => (target, &[][..]),
    };
    if path.first() != Some(&b'/') {
        return Err(Rejection::BadTarget);
    }
    let path = path::normalise(path).map_err(Rejection::BadPath)?;
    if let BodyLength::Fixed(bytes) = head.body
        && bytes > conn.listener.max_body
    {
        return Err(Rejection::BodyTooLarge);
    }
    let expects = headers::expects_continue(buffer, head)?;
    // Fields that are not UTF-8 match no pattern and make no key, since both are text.
    let text =
        |place: &Range<usize>| std::str::from_utf8(&buffer[place.clone()]).unwrap_or_default();
    let fields: Vec<_> = head
        .fields
        .iter()
        .map(|(name, value)| (text(name), text(value)))
        .collect();
    let host = fields
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case("host"))
        .map_or("", |(_, value)| value);
    let path_text = std::str::from_utf8(&path).map_err(|_| Rejection::NoRoute)?;
    let request = routes::Request {
        host,
        path: path_text,
        method: text(&head.method),
        fields: &fields,
    };
    let index = plan.index.find(&request).ok_or(Rejection::NoRoute)?;
    let route = &plan.config.routes[index];
    record.route = Some(index);
    let client = headers::client(buffer, head, conn.peer, &conn.listener.trusted_proxies);
    let facts = Facts {
        request,
        query,
        client: client.ip,
        route: index,
        upstream: route.upstream,
    };
    let quota = charge(plan, route, &facts, now)?;
    // The breaker comes behind the limits of everyone, which cost nothing when they refuse, and a refusal here gives the
    // concurrency slots back.
    let entry = enter(plan, route, now)?;
    Ok(Admitted {
        route,
        target: [&path, query].concat(),
        client,
        expects,
        quota,
        entry,
    })
}

fn enter(plan: &Plan, route: &Route, now: Now) -> Result<Option<Entry>, Rejection> {
    let Some(breaker) = &plan.breakers[route.upstream] else {
        return Ok(None);
    };
    let decisions = &plan.breaker_metrics[route.upstream];
    match breaker.try_enter(now.mono, fastrand::f64()) {
        Ok((entry, None)) => {
            decisions.admitted.inc();
            Ok(Some(entry))
        }
        Ok((entry, Some(_))) => {
            decisions.shadow_refused.inc();
            Ok(Some(entry))
        }
        Err(refused) => {
            decisions.refused.inc();
            let fallback = breaker.settings.fallback.clone();
            Err(Rejection::CircuitOpen(Box::new(CircuitOpen {
                retry_after: refused.retry_after,
                fallback,
            })))
        }
    }
}

/// What limits look at in a request.
struct Facts<'a> {
    request: routes::Request<'a>,
    /// With its `?`, or empty.
    query: &'a [u8],
    client: IpAddr,
    route: usize,
    upstream: usize,
}

/// Asks all limits of the route at one moment; a refusal by one of them charges none.
fn charge(plan: &Plan, route: &Route, facts: &Facts<'_>, now: Now) -> Result<Quota, Rejection> {
    const BLANK: Verdict = Verdict {
        admitted: false,
        remaining: 0,
        reset: Duration::ZERO,
        retry_after: None,
    };
    let mut asks: [Option<(Ask<'_>, usize)>; MAX_RULES] = [None; MAX_RULES];
    let mut count = 0;
    let set = plan.limits.overrides();
    for limit_index in route.limits.iter().copied() {
        let limit = &plan.config.limits[limit_index];
        if limit.mode == Mode::Disabled {
            continue;
        }
        let Some(parts) = limit
            .by
            .iter()
            .map(|part| facts.part(part, &plan.config))
            .collect::<Option<Vec<_>>>()
        else {
            plan.limit_metrics[limit_index].missing.inc();
            if limit.deny_missing && limit.mode == Mode::Enforce {
                return Err(Rejection::QuotaExceeded(Box::new(Exceeded {
                    limits: vec![limit.name.clone()],
                    retry_after: None,
                    fields: Vec::new(),
                })));
            }
            continue;
        };
        let Some(rules) = rules_for(limit, &parts, &set) else {
            continue;
        };
        let cost = cost(limit, facts);
        for (index, rule) in rules.iter().enumerate() {
            let mut key = plan.limits.key(&limit.name, index, rule);
            parts.iter().for_each(|part| key.part(part));
            let ask = Ask {
                key: key.finish(),
                rule,
                cost,
                enforced: limit.mode == Mode::Enforce,
            };
            asks[count] = Some((ask, limit_index));
            count += 1;
        }
    }
    if count == 0 {
        return Ok(Quota {
            limits: plan.limits.clone(),
            held: Vec::new(),
            fields: Vec::new(),
        });
    }
    let mut verdicts = [BLANK; MAX_RULES];
    let verdicts = &mut verdicts[..count];
    let asked: Vec<_> = asks[..count]
        .iter()
        .flatten()
        .map(|(ask, _)| *ask)
        .collect();
    let admitted = plan.limits.ask(&asked, now, verdicts);
    let decided = || {
        asks.iter()
            .flatten()
            .zip(&*verdicts)
            .map(|((ask, limit), verdict)| (ask, *limit, verdict))
    };
    count_decisions(plan, admitted, decided());
    let told = || decided().filter(|(ask, ..)| ask.enforced);
    let named = told().map(|(ask, limit, verdict)| (&plan.config.limits[limit], ask.rule, verdict));
    let fields = told_fields(named, plan.config.limit_defaults);
    if admitted {
        let held = asked.iter().zip(&*verdicts).filter(|(ask, verdict)| {
            verdict.admitted && matches!(ask.rule, Rule::Concurrency { .. })
        });
        let held = held.map(|(ask, _)| (ask.key, ask.cost)).collect();
        return Ok(Quota {
            limits: plan.limits.clone(),
            held,
            fields,
        });
    }
    let violated = || told().filter(|(.., verdict)| !verdict.admitted);
    let mut limits: Vec<_> = violated()
        .map(|(_, limit, _)| plan.config.limits[limit].name.clone())
        .collect();
    limits.dedup();
    // Every refusing window must have time to pass; one that never admits gives no time at all.
    let waits = violated()
        .map(|(.., verdict)| verdict.retry_after)
        .collect::<Option<Vec<_>>>();
    let retry_after = waits.and_then(|waits| waits.into_iter().max());
    Err(Rejection::QuotaExceeded(Box::new(Exceeded {
        limits,
        retry_after,
        fields,
    })))
}

/// Counts a decision for each limit: several windows of one, which stand side by side, are one decision.
fn count_decisions<'d>(
    plan: &Plan,
    admitted: bool,
    decided: impl Iterator<Item = (&'d Ask<'d>, usize, &'d Verdict)>,
) {
    let mut decided = decided.peekable();
    while let Some((ask, limit, verdict)) = decided.next() {
        let mut passes = verdict.admitted;
        while let Some((.., verdict)) = decided.next_if(|(_, other, _)| *other == limit) {
            passes &= verdict.admitted;
        }
        let metrics = &plan.limit_metrics[limit];
        match (passes, ask.enforced) {
            (true, _) if admitted => metrics.admitted.inc(),
            // Another limit refuses the request, so this one is not charged and has decided nothing.
            (true, _) => continue,
            (false, true) => metrics.refused.inc(),
            (false, false) => metrics.shadow_refused.inc(),
        };
    }
}

/// The limit's rules for this key; `None` when it is not limited. What was set at run time goes before the file's.
fn rules_for<'l>(
    limit: &'l Limit,
    parts: &[Cow<'_, [u8]>],
    set: &'l BTreeMap<(String, String), Override>,
) -> Option<&'l [Rule]> {
    if !limit.overrides.is_empty() || !set.is_empty() {
        let name = String::from_utf8(parts.join(&b':')).unwrap_or_default();
        let place = (limit.name.clone(), name);
        if let Some(rules) = set.get(&place).or_else(|| limit.overrides.get(&place.1)) {
            return rules.as_deref();
        }
    }
    limit.rules.as_deref()
}

fn cost(limit: &Limit, facts: &Facts<'_>) -> u64 {
    match &limit.cost {
        Cost::Constant(cost) => *cost,
        Cost::Header { name, default } => facts
            .header(name)
            .and_then(|value| value.trim().parse().ok())
            .unwrap_or(*default),
    }
}

impl<'a> Facts<'a> {
    fn header(&self, name: &str) -> Option<&'a str> {
        self.request
            .fields
            .iter()
            .find(|(other, _)| other.eq_ignore_ascii_case(name))
            .map(|(_, value)| *value)
    }

    fn part(&self, part: &KeyPart, config: &Config) -> Option<Cow<'a, [u8]>> {
        let text = |text: &'a str| Some(Cow::Borrowed(text.as_bytes()));
        match part {
            KeyPart::ClientIp => Some(Cow::Owned(network(self.client).into_bytes())),
            KeyPart::Header(name) => self.header(name).and_then(text),
            KeyPart::Cookie(name) => {
                let cookies = self
                    .request
                    .fields
                    .iter()
                    .filter(|(field, _)| field.eq_ignore_ascii_case("cookie"));
                let mut pairs = cookies.flat_map(|(_, value)| value.split(';'));
                pairs
                    .find_map(|pair| pair.trim().strip_prefix(name.as_str())?.strip_prefix('='))
                    .and_then(text)
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
            KeyPart::Path => text(self.request.path),
            KeyPart::Host => Some(Cow::Owned(
                self.request.host_name().to_ascii_lowercase().into_bytes(),
            )),
            KeyPart::Method => text(self.request.method),
            KeyPart::Route => Some(Cow::Owned(self.route.to_string().into_bytes())),
            KeyPart::Upstream => Some(Cow::Owned(
                config.upstreams[self.upstream].name.clone().into_bytes(),
            )),
        }
    }
}

/// An IPv4 address, or the /64 of an IPv6 one.
fn network(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => std::net::Ipv6Addr::from(u128::from(ip) >> 64 << 64).to_string(),
    }
}

/// `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10), and the `X-RateLimit-*` of older clients
/// for the limit with the least left.
fn told_fields<'l>(
    told: impl Iterator<Item = (&'l Limit, &'l Rule, &'l Verdict)> + Clone,
    defaults: LimitDefaults,
) -> Vec<u8> {
    let (mut policy, mut state) = (String::new(), String::new());
    let mut tightest: Option<(u64, &Verdict)> = None;
    let mut last: Option<(&str, u32)> = None;
    for (limit, rule, verdict) in told {
        let number = last
            .filter(|(name, _)| *name == limit.name)
            .map_or(1, |(_, number)| number + 1);
        last = Some((&limit.name, number));
        let comma = if policy.is_empty() { "" } else { ", " };
        // Several windows of one limit need names of their own: "login", "login.2".
        let name = if number == 1 {
            limit.name.clone()
        } else {
            format!("{}.{number}", limit.name)
        };
        let name = name.replace(['"', '\\'], "_");
        let (quota, window) = match rule {
            Rule::TokenBucket { count, per, .. } => (*count, Some(seconds(*per))),
            Rule::SlidingWindow { limit, window } => (*limit, Some(seconds(*window))),
            Rule::FixedWindow { limit, period } => (*limit, Some(seconds(period.at_most()))),
            Rule::Concurrency { limit } => (*limit, None),
        };
        let _ = write!(policy, "{comma}\"{name}\";q={quota}");
        if let Some(window) = window {
            let _ = write!(policy, ";w={window}");
        }
        let _ = write!(
            state,
            "{comma}\"{name}\";r={};t={}",
            verdict.remaining,
            seconds(verdict.reset)
        );
        if tightest.is_none_or(|(_, other)| verdict.remaining < other.remaining) {
            tightest = Some((quota, verdict));
        }
    }
    let mut fields = Vec::new();
    let Some((quota, verdict)) = tightest else {
        return fields;
    };
    if defaults.standard_headers {
        fields.extend_from_slice(
            format!("RateLimit-Policy: {policy}\r\nRateLimit: {state}\r\n").as_bytes(),
        );
    }
    if defaults.legacy_headers {
        let (remaining, reset) = (verdict.remaining, seconds(verdict.reset));
        let legacy = format!(
            "X-RateLimit-Limit: {quota}\r\nX-RateLimit-Remaining: {remaining}\r\nX-RateLimit-Reset: {reset}\r\n"
        );
        fields.extend_from_slice(legacy.as_bytes());
    }
    fields
}

/// Whole seconds, rounded up: a client that waits so long has waited long enough.
pub(super) fn seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}
