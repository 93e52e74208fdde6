//! The policies of a request, one after the other, cheap before dear. What passes is [`Admitted`], and only that can be
//! sent on, or an [`Answer`], where weir itself has it.

use std::net::SocketAddr;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use smallvec::SmallVec;

use super::answer::Answer;
use super::audit;
use super::draft::{self, Seen};
use super::handle::{Conn, Redirected};
use super::headers::{self, Client, RequestId};
use super::quota::{self, Facts, Quota};
use super::record::Record;
use super::reply::{CircuitOpen, Rejection};
use super::sessions;
use super::trace;
use crate::clock;
use crate::config::listeners::Address;
use crate::config::rewrite::To;
use crate::config::upstreams::Balancing;
use crate::config::{Listener, Route};
use crate::http1::head::{BodyLength, HeadError, RequestHead};
use crate::http1::path::{self, PathError};
use crate::net::stream::canonical;
use crate::plan::Plan;
use crate::policy::balance;
use crate::policy::limit::Now;
use crate::policy::rewrite::{self, Asked};
use crate::policy::routes;
use crate::policy::session::Session;
use crate::store::breakers::Entry;
use crate::upstream::{Aim, ours};

/// A request that every policy lets pass.
pub(super) struct Admitted<'p> {
    pub plan: &'p Plan,
    pub route: &'p Route,
    /// An index into the configuration's upstreams.
    pub upstream: usize,
    /// The normalised path, or what the route makes of it, and the query as sent.
    pub target: Vec<u8>,
    pub client: Client,
    /// The client's, from a trusted proxy; or a new one.
    pub request_id: RequestId,
    /// Whether the client waits for `100 Continue`.
    pub expects: bool,
    pub session: Option<Arc<Session>>,
    pub quota: Quota<'p>,
    /// Which endpoint is wanted.
    pub aim: Aim,
    /// The right to one call of the upstream, where it has a breaker.
    pub entry: Option<Entry>,
}

/// What becomes of a request that every policy lets pass.
pub(super) enum Way<'p> {
    Upstream(Admitted<'p>),
    Answer(Answer<'p>),
}

/// Asks every policy about the request whose head stands in `buffer`.
pub(super) async fn admit<'p>(
    plan: &'p Plan,
    conn: &Conn<'_>,
    buffer: &[u8],
    head: &RequestHead,
    now: Now,
    record: &mut Record,
) -> Result<Way<'p>, Rejection> {
    let target = origin_form(buffer, head)?;
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
    let whole = std::str::from_utf8(&buffer[..head.len]).ok();
    let text = |place: &Range<usize>| match whole {
        Some(whole) => whole.get(place.clone()),
        None => std::str::from_utf8(&buffer[place.clone()]).ok(),
    };
    // Fields that are not UTF-8 are not there: they match no pattern, which is text.
    let fields: SmallVec<[_; 16]> = head
        .fields
        .iter()
        .filter_map(|(name, value)| Some((text(name)?, text(value)?)))
        .collect();
    let host = fields
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case("host"))
        .map_or("", |(_, value)| value);
    let path_text = std::str::from_utf8(&path).map_err(|_| Rejection::NoRoute)?;
    let request = routes::Request {
        host,
        path: path_text,
        method: text(&head.method).unwrap_or_default(),
        fields: &fields,
    };
    let index = plan.index.find(&request).ok_or(Rejection::NoRoute)?;
    let route = &plan.config.routes[index];
    if let Some(bare) = path::without_parameters(path_text) {
        let other = routes::Request {
            path: &bare,
            ..request
        };
        if plan.index.find(&other) != Some(index) && !asks_for_parameters(route) {
            return Err(Rejection::BadPath(PathError::Parameters));
        }
    }
    record.route = Some(index);
    if audit::refuses(plan, route.audit) {
        return Err(Rejection::AuditUnavailable);
    }
    let client = headers::client(buffer, head, conn.peer.ip, &conn.listener.trusted_proxies);
    let id = clock::uuid(now.wall);
    let given = fields
        .iter()
        .find(|(name, _)| client.behind_trusted && name.eq_ignore_ascii_case("x-request-id"));
    let request_id = given.map_or_else(
        || RequestId::new(id),
        |(_, value)| RequestId::Given((*value).to_owned()),
    );
    let traces = plan.config.traces.as_ref();
    record.trace = traces
        .map(|traces| trace::begin(traces, conn.peer, buffer, Some(head), client.behind_trusted));
    let seen = Seen {
        path: &path,
        query,
        host: host.as_bytes(),
        method: &buffer[head.method.clone()],
        client: client.ip,
        time: now.wall,
        id,
        request_id: &request_id,
        trace: record.trace.as_ref(),
    };
    let spare = &conn.lane.outbox.spare;
    record.draft = draft::begin(plan, spare, route.audit, seen, buffer, Some(head));
    // Before anything is charged or asked: what is refused for being too much must cost as little as can be.
    if route.shed
        && let Some(strain) = conn.lane.shed.refuses()
    {
        return Err(Rejection::Shed(strain));
    }
    let original = original_destination(plan, conn)?;
    let mut facts = Facts {
        request,
        head,
        buffer,
        query,
        client: client.ip,
        peer: conn.peer,
        ipv6_prefix: conn.listener.ipv6_prefix,
        route: index,
        upstream: route.upstream(),
        session: None,
    };
    let mut quota = Quota::new(plan);
    // Limits that need no session come first: a flood from one address never reaches the session store.
    if let Some(redis) = &conn.lane.redis {
        quota
            .share(redis, &route.limits, &facts, now, record)
            .await?;
    }
    quota.charge(&route.limits, &facts, now, record)?;
    let lines = head
        .fields
        .iter()
        .map(|(name, value)| (&buffer[name.clone()], &buffer[value.clone()]));
    let waited = &mut quota.waited;
    let identified = sessions::identify(plan, conn.lane, route, lines, now.mono, waited).await;
    let session = identified.inspect_err(|_| quota.give_back(now, quota::is_common))?;
    // Whatever was waited for, tokens whose time is over meanwhile must not be spent.
    let now = match quota.waited.is_zero() {
        true => now,
        false => clock::moment(),
    };
    // The breaker is asked before the session's limits: a request that it refuses spends no quota of a user's. What it
    // gave comes back when they refuse, and so do concurrency slots.
    let entry = match route.upstream() {
        Some(upstream) => {
            enter(plan, upstream, now, record).inspect_err(|_| quota.give_back(now, |_| true))?
        }
        None => None,
    };
    facts.session = session.as_deref();
    if let (Some(draft), Some(session)) = (&mut record.draft, &session) {
        draft.set_user(&session.user);
    }
    if !route.session_limits.is_empty()
        && let Err(rejection) = ask_of_session(conn, route, &facts, now, &mut quota, record).await
    {
        quota.give_back(now, |_| true);
        return Err(rejection);
    }
    let upstream = match &route.to {
        To::Upstream(upstream) => *upstream,
        To::Redirect(redirect) => {
            let asked = Asked {
                pattern: route.matches.path.as_ref(),
                host,
                path: path_text,
                query: str::from_utf8(query).map_err(|_| Rejection::BadTarget)?,
            };
            let location = rewrite::location(redirect, &asked);
            let location = location.ok_or(Rejection::BadHead(HeadError::HostMissing))?;
            return Ok(Way::Answer(Answer::redirect(
                route, redirect, location, quota,
            )));
        }
        To::Reply(reply) => return Ok(Way::Answer(Answer::reply(route, reply, quota))),
    };
    let target = match &route.rewrite.path_prefix {
        None => [&path, query].concat(),
        Some(prefix) => {
            let pattern = route.matches.path.as_ref();
            let path = rewrite::with_prefix(pattern, path_text, prefix);
            if let (Some(draft), Some(_)) = (&mut record.draft, &plan.traces) {
                draft.set_sent_path(&path);
            }
            [path.as_bytes(), query].concat()
        }
    };
    Ok(Way::Upstream(Admitted {
        plan,
        route,
        upstream,
        aim: Aim {
            key: ring_key(plan, upstream, &facts),
            original,
        },
        target,
        client,
        request_id,
        expects,
        session,
        quota,
        entry,
    }))
}

/// Asks the limits that count by the session.
async fn ask_of_session(
    conn: &Conn<'_>,
    route: &Route,
    facts: &Facts<'_>,
    now: Now,
    quota: &mut Quota<'_>,
    record: &mut Record,
) -> Result<(), Rejection> {
    if let Some(redis) = &conn.lane.redis {
        let limits = &route.session_limits;
        quota.share(redis, limits, facts, now, record).await?;
    }
    quota.charge(&route.session_limits, facts, now, record)
}

/// Where a transparent listener's request goes. One that would come back to weir is refused: it would go round without end.
fn original_destination(plan: &Plan, conn: &Conn<'_>) -> Result<Option<SocketAddr>, Rejection> {
    let Some(Redirected { to, here, from }) = conn.peer.redirected.as_deref() else {
        return Ok(None);
    };
    let to = to.ok_or(Rejection::NotRedirected)?;
    let is_here = |listener: &Listener| match listener.address {
        Address::Tcp(address) => address.port() == to.port(),
        Address::Unix(_) => false,
    };
    let is_near = to.ip().is_loopback() || here.is_none_or(|here| here.ip() == to.ip());
    if Some(canonical(to)) == *here || (is_near && plan.config.listeners.iter().any(is_here)) {
        return Err(Rejection::NotRedirected);
    }
    match from.is_some_and(ours::is_ours) {
        true => Err(Rejection::Loop),
        false => Ok(Some(to)),
    }
}

/// Whether the file names parameters in the route's path, so that with them no other route can be meant.
fn asks_for_parameters(route: &Route) -> bool {
    let pattern = route.matches.path.as_ref().map(ToString::to_string);
    pattern.is_some_and(|pattern| path::without_parameters(&pattern).is_some())
}

/// The path and the query of a target, which may be in absolute form (RFC 9112 section 3.2.2). Its authority must be the Host
/// that the head has: two that differ would be routed by one and served by the other.
fn origin_form<'b>(buffer: &'b [u8], head: &RequestHead) -> Result<&'b [u8], Rejection> {
    let target = &buffer[head.target.clone()];
    let scheme = [&b"http://"[..], b"https://"].into_iter().find(|scheme| {
        let start = target.get(..scheme.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    });
    let Some(scheme) = scheme else {
        return Ok(target);
    };
    let rest = &target[scheme.len()..];
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?'));
    let (authority, rest) = rest.split_at(end.unwrap_or(rest.len()));
    let mut fields = head.fields.iter();
    let host = fields.find(|(name, _)| headers::is(buffer, name, "host"));
    let host = host.map_or(&[][..], |(_, value)| &buffer[value.clone()]);
    match rest {
        _ if !authority.eq_ignore_ascii_case(host) => Err(Rejection::BadTarget),
        [] => Ok(b"/"),
        [b'/', ..] => Ok(rest),
        // Without a path it would need one put in, which no client of note sends.
        _ => Err(Rejection::BadTarget),
    }
}

fn ring_key(plan: &Plan, upstream: usize, facts: &Facts<'_>) -> Option<u64> {
    match &plan.config.upstreams[upstream].load_balancing {
        Balancing::RoundRobin | Balancing::LeastRequest => None,
        Balancing::RingHash(by) => {
            let parts = facts.parts(by, plan)?;
            Some(balance::hash(parts.iter().map(|part| &**part)))
        }
    }
}

fn enter(
    plan: &Plan,
    upstream: usize,
    now: Now,
    record: &mut Record,
) -> Result<Option<Entry>, Rejection> {
    let Some(breaker) = &plan.breakers[upstream] else {
        return Ok(None);
    };
    let decisions = &plan.breaker_metrics[upstream];
    let mut said = |verdict: &'static str| {
        if let Some(draft) = &mut record.draft {
            draft.set_breaker(verdict);
        }
    };
    match breaker.try_enter(now.mono, fastrand::f64()) {
        Ok((entry, None)) => {
            record.probe = entry.probe().map(Rc::new);
            decisions.admitted.inc();
            said("admitted");
            Ok(Some(entry))
        }
        Ok((entry, Some(_))) => {
            decisions.shadow_refused.inc();
            said("shadow_refused");
            Ok(Some(entry))
        }
        Err(refused) => {
            decisions.refused.inc();
            said("refused");
            let fallback = breaker.settings.fallback.clone();
            Err(Rejection::CircuitOpen(Box::new(CircuitOpen {
                retry_after: refused.retry_after,
                fallback,
            })))
        }
    }
}
