//! The limits of a route asked about a request: what keys it makes, what it is charged, and what the client is told.

use std::borrow::Cow;
use std::io::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use percent_encoding::percent_decode;
use serde_json::Value;
use smallvec::SmallVec;

use super::handle::Peer;
use super::headers;
use super::record::Record;
use super::reply::{Exceeded, Rejection};
use crate::config::LimitDefaults;
use crate::config::limits::{Cost, KeyPart, Limit, Mode, Rule};
use crate::config::override_keys::client_key;
use crate::http1::head::RequestHead;
use crate::http1::path;
use crate::net::tls::ClientCertificate;
use crate::plan::{LimitNames, Plan};
use crate::policy::balance::hash;
use crate::policy::lease::Batch;
use crate::policy::limit::{Now, Verdict};
use crate::policy::routes::Request;
use crate::policy::session::Session;
use crate::store::limits::{self, Ask, Key};

/// The parts of a key as overrides name it.
pub(super) fn joined(parts: &[Cow<'_, [u8]>]) -> String {
    String::from_utf8(parts.join(&b':')).unwrap_or_default()
}

/// The parts of a limit's key.
pub(super) type Parts<'a> = SmallVec<[Cow<'a, [u8]>; 4]>;

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

/// What limits look at in a request.
pub(super) struct Facts<'a> {
    pub request: Request<'a>,
    /// Of the request, which may not be text as a whole.
    pub head: &'a RequestHead,
    /// Where the head stands.
    pub buffer: &'a [u8],
    /// With its `?`, or empty.
    pub query: &'a [u8],
    pub client: IpAddr,
    pub peer: &'a Peer,
    /// Of IPv6 addresses, the bits that tell clients apart.
    pub ipv6_prefix: u8,
    pub route: usize,
    /// Where the route goes to one.
    pub upstream: Option<usize>,
    /// Once it is known.
    pub session: Option<&'a Session>,
}

/// What a request was charged: its concurrency slots come back when this is dropped, and the client is told the rest. On the heap, what
/// there is of it: it is moved from step to step of a request, and room for all that may be would be most of what is moved.
pub(super) struct Quota<'p> {
    pub(super) plan: &'p Plan,
    held: Vec<(Key, u64)>,
    /// Likewise, of limits that processes have in common.
    pub(super) slots: Vec<(Key, u64)>,
    /// What was taken of leases: of which limit, by its index, and of which key.
    pub(super) taken: Vec<(usize, Key, Batch)>,
    /// Shared limits that this process keeps to alone, since Redis does not answer; and this process's part of their rules, as asked for
    /// and given back.
    pub(super) alone: Vec<(usize, SmallVec<[Rule; 1]>)>,
    /// For how long the request has waited for Redis, over all its limits.
    pub(super) waited: Duration,
    /// What each rule said, in the order asked.
    told: Vec<Told<'p>>,
}

#[derive(Clone, Copy)]
struct Told<'p> {
    limit: &'p Limit,
    /// Its name as a JSON string.
    json: &'static str,
    rule: Rule,
    verdict: Verdict,
    /// Whether its refusal refuses the request; clients are told of no others.
    enforced: bool,
    charged: u64,
    /// Whose counter in memory was charged how much, until that is given back. A slot comes back with the request.
    counter: Option<(Key, u64)>,
}

/// What one rule said.
pub(super) struct Said<'a> {
    /// An index into the configuration's limits.
    pub limit: usize,
    pub rule: &'a Rule,
    /// Whether its refusal refuses the request.
    pub enforced: bool,
    pub verdict: Verdict,
    /// What it has taken, which comes back where the request is refused all the same.
    pub charged: u64,
    /// Its counter, where that is in memory.
    pub key: Option<Key>,
}

impl Drop for Quota<'_> {
    fn drop(&mut self) {
        for (key, cost) in self.held.drain(..) {
            self.plan.limits.release(key, cost);
        }
        for (key, cost) in self.slots.drain(..) {
            if let Some(shared) = &self.plan.shared_limits {
                shared.slots.release(key, cost);
            }
        }
    }
}

impl<'p> Quota<'p> {
    /// Nothing is charged yet.
    pub(super) fn new(plan: &'p Plan) -> Quota<'p> {
        Quota {
            plan,
            held: Vec::new(),
            slots: Vec::new(),
            taken: Vec::new(),
            alone: Vec::new(),
            waited: Duration::ZERO,
            told: Vec::new(),
        }
    }

    /// Asks those of these limits that this process keeps to alone, at one moment; a refusal by one of them charges none, nor
    /// any that [`Quota::share`] has just asked.
    pub(super) fn charge(
        &mut self,
        limits: &[usize],
        facts: &Facts<'_>,
        now: Now,
        record: &mut Record,
    ) -> Result<(), Rejection> {
        if limits.is_empty() {
            return Ok(());
        }
        let alone = std::mem::take(&mut self.alone);
        let charged = self.charge_beside(&alone, limits, facts, now, record);
        self.alone = alone;
        charged
    }

    fn charge_beside(
        &mut self,
        alone: &[(usize, SmallVec<[Rule; 1]>)],
        limits: &[usize],
        facts: &Facts<'_>,
        now: Now,
        record: &mut Record,
    ) -> Result<(), Rejection> {
        let plan = self.plan;
        // Held for as long as rules of it are asked.
        let overrides = plan.limits.overrides();
        let mut asks = SmallVec::<[Ask<'_>; 4]>::new();
        let mut limit_of = SmallVec::<[usize; 4]>::new();
        for limit_index in limits.iter().copied() {
            let limit = &plan.config.limits[limit_index];
            let mine = alone.iter().find(|(lost, _)| *lost == limit_index);
            if limit.mode == Mode::Disabled || (plan.shares(limit) && mine.is_none()) {
                continue;
            }
            let parts = match self.key(limit_index, facts) {
                Ok(Some(parts)) => parts,
                Ok(None) => continue,
                Err(rejection) => {
                    self.put_back(now);
                    return Err(rejection);
                }
            };
            let rules = match mine {
                Some((_, rules)) => rules,
                None => match limits::rules(limit, || joined(&parts), &overrides) {
                    Some(rules) => rules,
                    None => continue,
                },
            };
            let cost = cost(limit, facts);
            for (index, rule) in rules.iter().enumerate() {
                let mut key = plan.limit_keys[limit_index].of_rule(index, rule);
                parts.iter().for_each(|part| key.part(part));
                asks.push(Ask {
                    key: key.finish(),
                    rule,
                    cost,
                    enforced: refuses(limit, &parts),
                });
                limit_of.push(limit_index);
            }
        }
        if asks.is_empty() {
            return Ok(());
        }
        const BLANK: Verdict = Verdict {
            admitted: false,
            remaining: 0,
            reset: Duration::ZERO,
            retry_after: None,
        };
        let mut verdicts = SmallVec::<[_; 4]>::from_elem(BLANK, asks.len());
        let admitted = plan.limits.ask(&asks, now, &mut verdicts);
        let asked = asks.iter().zip(&limit_of).zip(&verdicts);
        let said = asked.clone().map(|((ask, limit), verdict)| Said {
            limit: *limit,
            rule: ask.rule,
            enforced: ask.enforced,
            verdict: *verdict,
            charged: if admitted { ask.cost } else { 0 },
            key: Some(ask.key),
        });
        self.note(admitted, said, record);
        let slots = asked.filter(|((ask, _), _)| matches!(ask.rule, Rule::Concurrency { .. }));
        for ((ask, _), _) in slots.filter(|(_, verdict)| admitted && verdict.admitted) {
            self.held.push((ask.key, ask.cost));
        }
        if admitted {
            Ok(())
        } else {
            self.put_back(now);
            Err(self.refusal())
        }
    }

    /// Gives back what the request was charged by those limits that `which` says, and that admitted it: it is refused by what came after
    /// them.
    pub(super) fn give_back(&mut self, now: Now, which: fn(&Limit) -> bool) {
        let plan = self.plan;
        if let Some(shared) = &plan.shared_limits {
            self.taken.retain(|(index, key, batch)| {
                let gives = which(&plan.config.limits[*index]);
                if gives {
                    shared.leases.put_back(*key, *batch, now.mono);
                }
                !gives
            });
        }
        for told in self.told.iter_mut().filter(|told| which(told.limit)) {
            if let Some((key, cost)) = told.counter.take() {
                plan.limits.give_back(key, &told.rule, cost, now);
            }
        }
    }

    /// The parts of a limit's key; `None` when the request lacks one, and the limit does not mind.
    pub(super) fn key<'a>(
        &self,
        limit_index: usize,
        facts: &Facts<'a>,
    ) -> Result<Option<Parts<'a>>, Rejection>
    where
        'p: 'a,
    {
        let plan: &'p Plan = self.plan;
        let limit = &plan.config.limits[limit_index];
        let parts = facts.parts(&limit.by, plan);
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

    /// Counts what rules said, and keeps it for the audit and the client.
    pub(super) fn note<'a>(
        &mut self,
        admitted: bool,
        said: impl Iterator<Item = Said<'a>> + Clone,
        record: &mut Record,
    ) {
        let plan = self.plan;
        count_decisions(plan, admitted, said.clone());
        if let Some(draft) = &mut record.draft {
            let words = |said: Said<'_>| said_by(&plan.names.limits[said.limit], &said);
            draft.add_limits(said.clone().map(words));
        }
        for said in said {
            let is_slot = matches!(said.rule, Rule::Concurrency { .. });
            let is_counted = admitted && said.verdict.admitted && !is_slot;
            self.told.push(Told {
                limit: &plan.config.limits[said.limit],
                json: plan.names.limits[said.limit].json,
                rule: *said.rule,
                verdict: said.verdict,
                enforced: said.enforced,
                charged: said.charged,
                counter: said.key.filter(|_| is_counted).zip(Some(said.charged)),
            });
        }
    }

    /// What clients are told of.
    fn enforced(&self) -> impl Iterator<Item = &Told<'p>> {
        self.told.iter().filter(|told| told.enforced)
    }

    /// Gives back what was taken of leases for a request that is refused.
    pub(super) fn put_back(&mut self, now: Now) {
        for (_, key, taken) in self.taken.drain(..) {
            if let Some(shared) = &self.plan.shared_limits {
                shared.leases.put_back(key, taken, now.mono);
            }
        }
    }

    /// What the client is told. Limits that would admit the request have back what they took, if not by now, before it is told.
    pub(super) fn refusal(&mut self) -> Rejection {
        for told in self.told.iter_mut().filter(|told| told.verdict.admitted) {
            let left = told.verdict.remaining.saturating_add(told.charged);
            (told.verdict.remaining, told.charged) = (left, 0);
        }
        let violated = || self.enforced().filter(|told| !told.verdict.admitted);
        let mut limits: Vec<_> = violated().map(|told| told.json).collect();
        limits.dedup();
        // Every refusing window must have time to pass; one that never admits gives no time at all.
        let waits = violated()
            .map(|told| told.verdict.retry_after)
            .collect::<Option<SmallVec<[Duration; 4]>>>();
        let jitter = 1.0 + fastrand::f64() * self.plan.config.limit_defaults.retry_jitter;
        let retry_after = waits.and_then(|waits| waits.into_iter().max());
        // A wait too long to be made longer stays as it is.
        let longer = |wait: Duration| Duration::try_from_secs_f64(wait.as_secs_f64() * jitter);
        let retry_after = retry_after.map(|wait| longer(wait).unwrap_or(wait));
        let mut fields = Vec::with_capacity(128);
        self.tell(&mut fields);
        Rejection::QuotaExceeded(Box::new(Exceeded {
            limits,
            retry_after,
            fields,
        }))
    }

    /// Appends `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10), and the `X-RateLimit-*` of
    /// older clients for the limit with the least left.
    pub(super) fn tell(&self, out: &mut Vec<u8>) {
        let LimitDefaults {
            standard_headers,
            legacy_headers,
            ..
        } = self.plan.config.limit_defaults;
        let Some(tightest) = self.enforced().min_by_key(|told| told.verdict.remaining) else {
            return;
        };
        if standard_headers {
            out.extend_from_slice(b"RateLimit-Policy: ");
            self.put_each(out, |out, told| {
                put_parameter(out, b"q", quota(&told.rule));
                if let Some(window) = window(&told.rule) {
                    put_parameter(out, b"w", window);
                }
            });
            out.extend_from_slice(b"RateLimit: ");
            self.put_each(out, |out, told| {
                put_parameter(out, b"r", told.verdict.remaining);
                put_parameter(out, b"t", seconds(told.verdict.reset));
            });
        }
        if legacy_headers {
            let (limit, remaining) = (capacity(&tightest.rule), tightest.verdict.remaining);
            let reset = seconds(tightest.verdict.reset);
            let _ = write!(
                out,
                "X-RateLimit-Limit: {limit}\r\nX-RateLimit-Remaining: {remaining}\r\nX-RateLimit-Reset: {reset}\r\n"
            );
        }
    }

    /// A structured list (RFC 9651): each rule's name, then what `parameters` puts.
    fn put_each(&self, out: &mut Vec<u8>, parameters: impl Fn(&mut Vec<u8>, &Told<'_>)) {
        let mut before: Option<&str> = None;
        let mut number = 1;
        for told in self.enforced() {
            let name = told.limit.name.as_str();
            if before.is_some() {
                out.extend_from_slice(b", ");
            }
            number = if before == Some(name) { number + 1 } else { 1 };
            before = Some(name);
            out.push(b'"');
            out.extend_from_slice(told.limit.label.as_bytes());
            // Several windows of one limit need names of their own: "login", "login.2".
            if number > 1 {
                let _ = write!(out, ".{number}");
            }
            out.push(b'"');
            parameters(out, told);
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// Whether a limit counts all clients together: who has no session may not use it up for those who have one. One that tells clients
/// apart is charged for such requests, too, as a bound on how often one client can try.
pub(super) fn is_common(limit: &Limit) -> bool {
    limit.by.iter().all(|part| match part {
        KeyPart::Path | KeyPart::Host | KeyPart::Method | KeyPart::Route | KeyPart::Upstream => {
            true
        }
        KeyPart::ClientIp
        | KeyPart::ClientCertSubject
        | KeyPart::ClientCertSan
        | KeyPart::Header(_)
        | KeyPart::Cookie(_)
        | KeyPart::Query(_)
        | KeyPart::SessionUser
        | KeyPart::SessionClaim(_) => false,
    })
}

/// Counts a decision for each limit: several windows of one, which stand side by side, are one decision.
fn count_decisions<'a>(plan: &Plan, admitted: bool, said: impl Iterator<Item = Said<'a>>) {
    let mut said = said.peekable();
    while let Some(first) = said.next() {
        let near_limit = plan.config.limits[first.limit].near_limit;
        let is_near = |said: &Said<'_>| {
            let capacity = capacity(said.rule);
            capacity.saturating_sub(said.verdict.remaining) as f64 >= capacity as f64 * near_limit
        };
        let mut passes = first.verdict.admitted;
        let mut near = is_near(&first);
        while let Some(said) = said.next_if(|said| said.limit == first.limit) {
            passes &= said.verdict.admitted;
            near |= is_near(&said);
        }
        let metrics = &plan.limit_metrics[first.limit];
        match (passes, first.enforced) {
            (true, _) if admitted => {
                if near {
                    metrics.near.inc();
                }
                metrics.admitted.inc()
            }
            // Another limit refuses the request, so this one is not charged and has decided nothing.
            (true, _) => continue,
            (false, true) => metrics.refused.inc(),
            (false, false) => metrics.shadow_refused.inc(),
        };
    }
}

/// What one rule says, for the audit.
fn said_by(names: &LimitNames, said: &Said<'_>) -> &'static str {
    match (said.verdict.admitted, said.enforced) {
        (true, _) => names.admitted,
        (false, true) => names.refused,
        (false, false) => names.shadow_refused,
    }
}

pub(super) fn cost(limit: &Limit, facts: &Facts<'_>) -> u64 {
    match &limit.cost {
        Cost::Constant(cost) => *cost,
        Cost::Header { name, default } => facts
            .field(name)
            .and_then(|value| std::str::from_utf8(value).ok()?.trim().parse().ok())
            // A client's word may make a request dear, and never free.
            .map_or(*default, |cost: u64| cost.max(1)),
    }
}

impl<'a> Facts<'a> {
    /// The parts of a key; `None` when the request lacks one.
    pub(super) fn parts(&self, by: &[KeyPart], plan: &'a Plan) -> Option<Parts<'a>> {
        by.iter().map(|part| self.part(part, plan)).collect()
    }

    /// The values of the fields of this name, as sent: old applications' cookies are not all UTF-8.
    fn fields(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        let (head, buffer) = (self.head, self.buffer);
        let fields = head.fields.iter();
        let named = fields.filter(move |(other, _)| headers::is(buffer, other, name));
        named.map(move |(_, value)| &buffer[value.clone()])
    }

    fn field(&self, name: &str) -> Option<&'a [u8]> {
        self.fields(name).next()
    }

    fn certificate(&self) -> Option<&'a ClientCertificate> {
        self.peer.tls.as_ref()?.certificate.as_ref()
    }

    fn part(&self, part: &KeyPart, plan: &'a Plan) -> Option<Cow<'a, [u8]>> {
        let text = |text: &'a str| Some(Cow::Borrowed(text.as_bytes()));
        match part {
            KeyPart::ClientIp => match self.client {
                ip @ IpAddr::V4(_) if ip == self.peer.ip => text(&self.peer.text),
                ip => Some(Cow::Owned(client_key(ip, self.ipv6_prefix).into_bytes())),
            },
            KeyPart::ClientCertSubject => text(self.certificate()?.subject.as_deref()?),
            KeyPart::ClientCertSan => text(self.certificate()?.san.as_deref()?),
            KeyPart::Header(name) => self.field(name).map(Cow::Borrowed),
            KeyPart::Cookie(name) => {
                let cookies = self.fields("cookie");
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
            KeyPart::Path => {
                let path = match path::without_parameters(self.request.path) {
                    Some(bare) => Cow::Owned(bare.into_bytes()),
                    None => Cow::Borrowed(self.request.path.as_bytes()),
                };
                // As many keys as spellings would be no limit.
                Some(match plan.config.routes[self.route].matches.ignore_case {
                    true => path.to_ascii_lowercase().into(),
                    false => path,
                })
            }
            KeyPart::Host => Some(Cow::Owned(
                self.request.host_name().to_ascii_lowercase().into_bytes(),
            )),
            KeyPart::Method => text(self.request.method),
            KeyPart::Route => text(&plan.route_keys[self.route]),
            KeyPart::Upstream => text(&plan.config.upstreams[self.upstream?].name),
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

fn quota(rule: &Rule) -> u64 {
    match rule {
        Rule::TokenBucket { count, .. } => *count,
        Rule::SlidingWindow { limit, .. }
        | Rule::FixedWindow { limit, .. }
        | Rule::Concurrency { limit } => *limit,
    }
}

/// What is left of a rule that nothing was taken of: of a bucket its burst, whatever the rate.
fn capacity(rule: &Rule) -> u64 {
    match rule {
        Rule::TokenBucket { burst, .. } => *burst,
        Rule::SlidingWindow { limit, .. }
        | Rule::FixedWindow { limit, .. }
        | Rule::Concurrency { limit } => *limit,
    }
}

/// In whole seconds.
fn window(rule: &Rule) -> Option<u64> {
    match rule {
        Rule::TokenBucket { per, .. } => Some(seconds(*per)),
        Rule::SlidingWindow { window, .. } => Some(seconds(*window)),
        Rule::FixedWindow { period, .. } => Some(seconds(period.at_most())),
        Rule::Concurrency { .. } => None,
    }
}

fn put_parameter(out: &mut Vec<u8>, name: &[u8], value: u64) {
    out.push(b';');
    out.extend_from_slice(name);
    out.push(b'=');
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Whole seconds, rounded up: a client that waits so long has waited long enough.
pub(super) fn seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}
