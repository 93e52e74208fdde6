//! The policies of a request, one after the other, cheap before dear. What passes is [`Admitted`], and only that can be
//! sent on, or an [`Answer`], where weir itself has it. Must not word replies.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use percent_encoding::{AsciiSet, percent_encode};

use super::answer::Answer;
use super::audit;
use super::draft::{self, Seen};
use super::exchange::{Conn, Redirected};
use super::facts::{self, Facts, OfSeveral};
use super::headers::{self, Client, RequestId};
use super::quota::{self, Quota};
use super::record::Record;
use super::reply::{CircuitOpen, Rejection};
use super::sessions;
use crate::clock;
use crate::config::listeners::Address;
use crate::config::rewrite::{Redirect, To};
use crate::config::upstreams::Balancing;
use crate::config::{Listener, Route};
use crate::http1::head::{BodyLength, HeadError, RequestHead, path_and_query};
use crate::http1::hygiene;
use crate::http1::path::{self, PathError};
use crate::net::stream::canonical;
use crate::plan::{self, Plan};
use crate::policy::balance;
use crate::policy::limit::Now;
use crate::policy::rewrite::{self, Asked};
use crate::policy::routes;
use crate::policy::session::Session;
use crate::store::breakers::CallPermit;
use crate::upstream::{Aim, ours};

/// A request that every policy lets pass.
pub(super) struct Admitted<'p> {
    pub plan: &'p Plan,
    pub route: &'p Route,
    /// An index into the configuration's upstreams.
    pub upstream: usize,
    /// The path as it is sent, or what the route makes of it, and the query as it came.
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
    pub permit: Option<CallPermit>,
}

/// What becomes of a request that every policy lets pass.
pub(super) enum Way<'p> {
    Upstream(Admitted<'p>),
    Answer(Answer<'p>),
}

/// Asks every policy about the request whose head stands in `buffer`, in the order that is read here. What is told of it is begun here, too.
pub(super) async fn admit<'p>(
    plan: &'p Plan,
    conn: &Conn<'_>,
    buffer: &[u8],
    head: &RequestHead,
    now: Now,
    record: &mut Record,
) -> Result<Way<'p>, Rejection> {
    let mut unrouted = |rejection| {
        draft::begin_unrouted(plan, conn, buffer, Some(head), record);
        rejection
    };
    let Checked {
        asked,
        path,
        sent_path,
        query,
        expects,
    } = checked(conn, buffer, head).map_err(&mut unrouted)?;
    let query = &*query;
    let sent_path = str::from_utf8(&sent_path).map_err(|_| unrouted(Rejection::NoRoute))?;
    let host = head.field(buffer, "host").unwrap_or_default();
    let request = routes::Request {
        host: str::from_utf8(host).unwrap_or_default(),
        path: str::from_utf8(&path).map_err(|_| unrouted(Rejection::NoRoute))?,
        method: str::from_utf8(&buffer[head.method.clone()]).unwrap_or_default(),
        fields: &head.fields,
        buffer,
    };
    let index = find_route(plan, &request, query).map_err(unrouted)?;
    let route = &plan.config.routes[index];
    record.route = Some(index);
    let client = headers::client(buffer, head, conn.peer.ip, conn.listener);
    let mut facts = Facts {
        request,
        head,
        query,
        client: &client,
        conn,
        route: index,
        session: None,
    };
    let request_id = begin(plan, route, &facts, now, record);
    if let (Some(draft), Some(_)) = (&mut record.draft, &plan.traces)
        && asked != facts.request.path.as_bytes()
    {
        let asked = String::from_utf8_lossy(asked);
        draft.set_asked_path(plan.redaction.redact_path(&asked));
    }
    if audit::refuses(plan, route.audit) {
        audit::give_up(record);
        return Err(Rejection::AuditUnavailable);
    }
    // Before anything is charged or asked: what is refused for being too much must cost as little as can be.
    if route.shed
        && let Some(strain) = conn.lane.shed.refuses()
    {
        return Err(Rejection::Shed(strain));
    }
    let original = original_destination(plan, conn)?;
    let mut quota = Quota::new(plan);
    // Limits that need no session come first: a flood from one address never reaches the session store.
    quota.ask(&route.limits, &facts, now, record).await?;
    let lines = head.lines(buffer);
    let waited = &mut quota.waited;
    let draft = record.draft.as_deref_mut();
    let identified = sessions::identify(plan, conn.lane, route, lines, now.mono, draft, waited);
    let session = identified.await.inspect_err(|_| {
        quota.give_back(now, quota::is_common);
        quota.count_admitted();
    })?;
    // Whatever was waited for, tokens whose time is over meanwhile must not be spent.
    let now = match quota.waited.is_zero() {
        true => now,
        false => clock::moment(),
    };
    // The breaker is asked before the session's limits: a request that it refuses spends no quota of a user's. What it
    // gave comes back when they refuse, and so do concurrency slots.
    let ends_here = headers::max_forwards(buffer, head) == Some(0);
    let entered = enter(plan, route.upstream().filter(|_| !ends_here), now, record);
    let permit = entered.inspect_err(|_| quota.give_back(now, |_| true))?;
    facts.session = session.as_deref();
    let limits = &route.session_limits;
    let asked = quota.ask(limits, &facts, now, record).await;
    asked.inspect_err(|_| quota.give_back(now, |_| true))?;
    quota.count_admitted();
    Ok(match &route.to {
        To::Redirect(redirect) => {
            let location = location(redirect, route, &facts, sent_path)?;
            Way::Answer(Answer::redirect(route, redirect, location, quota))
        }
        To::Reply(reply) => Way::Answer(Answer::reply(route, reply, quota)),
        To::Upstream(_) if ends_here => Way::Answer(Answer::options(route, quota)),
        To::Upstream(upstream) => Way::Upstream(Admitted {
            plan,
            route,
            upstream: *upstream,
            aim: Aim {
                key: ring_key(plan, *upstream, &facts),
                original,
            },
            target: target(plan, route, &facts, sent_path, record),
            client,
            request_id,
            expects,
            session,
            quota,
            permit,
        }),
    })
}

/// What a request's head says that any route may serve.
struct Checked<'b> {
    /// The path as it came.
    asked: &'b [u8],
    /// In normal form.
    path: Cow<'b, [u8]>,
    /// As upstreams get it: [`path::as_sent`].
    sent_path: Cow<'b, [u8]>,
    /// With its `?`, or empty; in ASCII alone.
    query: Cow<'b, [u8]>,
    /// Whether the client waits for `100 Continue`.
    expects: bool,
}

/// Refuses what no route may serve.
fn checked<'b>(
    conn: &Conn<'_>,
    buffer: &'b [u8],
    head: &RequestHead,
) -> Result<Checked<'b>, Rejection> {
    if buffer[head.method.clone()] == *b"TRACE" {
        return Err(Rejection::Trace);
    }
    let (asked, query) = path_and_query(origin_form(buffer, head)?);
    if asked.first() != Some(&b'/') {
        return Err(Rejection::BadTarget);
    }
    let path = path::normalise(asked).map_err(Rejection::BadPath)?;
    let sent_path = match path {
        Cow::Borrowed(path) => Cow::Borrowed(path),
        Cow::Owned(_) => path::as_sent(asked).map_err(Rejection::BadPath)?,
    };
    check_length(conn.listener, head)?;
    Ok(Checked {
        expects: headers::expects_continue(buffer, head)?,
        asked,
        path,
        sent_path,
        query: escaped(query),
    })
}

/// A query in ASCII alone.
fn escaped(query: &[u8]) -> Cow<'_, [u8]> {
    if query.is_ascii() {
        return Cow::Borrowed(query);
    }
    // What is not ASCII is escaped whatever the set.
    let escaped: String = percent_encode(query, &AsciiSet::EMPTY).collect();
    Cow::Owned(escaped.into_bytes())
}

fn check_length(listener: &Listener, head: &RequestHead) -> Result<(), Rejection> {
    match head.body {
        BodyLength::Fixed(bytes) if bytes > listener.max_body => Err(Rejection::BodyTooLarge),
        BodyLength::Fixed(_) | BodyLength::Chunked | BodyLength::None => Ok(()),
    }
}

/// No client has to say more methods, each of which costs a look at all routes.
const MOST_METHODS_SAID: usize = 8;

/// The route that serves the request. Whatever else servers may read in its path, no other route may be meant, unless the file
/// names in its pattern what they differ on; nor may one by a method that is said beside the request's own.
fn find_route(
    plan: &Plan,
    request: &routes::Request<'_>,
    query: &[u8],
) -> Result<usize, Rejection> {
    let index = plan.index.find(request).ok_or(Rejection::NoRoute)?;
    let find = |path: &str, method: &str| {
        plan.index.find(&routes::Request {
            path,
            method,
            ..*request
        })
    };
    let readings = path::readings(request.path).map_err(Rejection::BadPath)?;
    for (path, error) in &readings {
        let other = find(path, request.method);
        if other != Some(index) && !names(&plan.config.routes[index], *error) {
            return Err(Rejection::BadPath(*error));
        }
    }
    if plan.index.asks_for_methods() {
        let paths = readings.iter().map(|(path, _)| path.as_str());
        let route = &plan.config.routes[index];
        let said = methods_said(route, request, query);
        let said = said.filter(|method| !asks_for(route, method));
        for (count, method) in said.enumerate() {
            let mut paths = [request.path].into_iter().chain(paths.clone());
            if count == MOST_METHODS_SAID
                || paths.any(|path| find(path, &method) != find(path, request.method))
            {
                return Err(Rejection::OtherMethod);
            }
        }
    }
    Ok(index)
}

/// The methods that fields which the route lets pass, and the query, say an application is to take the request's for. Symfony, Laravel and
/// Spring heed them of a POST alone, and WordPress of any request.
fn methods_said<'a>(
    route: &'a Route,
    request: &routes::Request<'a>,
    query: &'a [u8],
) -> impl Iterator<Item = String> + use<'a> {
    let buffer = request.buffer;
    let fields = request.fields.iter();
    let fields = fields.map(|(name, value)| (&buffer[name.clone()], &buffer[value.clone()]));
    let passes = |name: &[u8]| hygiene::names_a_method(name) && !route.request_headers.drops(name);
    let of_fields = fields.filter(move |(name, _)| passes(name));
    let of_fields = of_fields.map(|(_, value)| Cow::Borrowed(value));
    let of_query = facts::parameters(query.get(1..).unwrap_or_default(), "_method");
    let said = of_fields.chain(of_query).flat_map(|value| {
        let said = String::from_utf8_lossy(&value).to_ascii_uppercase();
        let said = said.split(',').map(|method| method.trim_ascii().to_owned());
        said.collect::<Vec<_>>()
    });
    said.filter(|method| !method.is_empty())
}

/// Whether the route is for requests of which a field says this method: the file knows of it then, and no other route is meant.
fn asks_for(route: &Route, method: &str) -> bool {
    let mut wanted = route.matches.headers.iter();
    wanted.any(|(name, value)| {
        hygiene::names_a_method(name.as_bytes()) && value.eq_ignore_ascii_case(method)
    })
}

/// Whether the file names in the route's path what servers differ on, so that with it no other route can be meant.
fn names(route: &Route, differ_on: PathError) -> bool {
    let pattern = route.matches.path.as_ref().map(ToString::to_string);
    let readings = pattern.and_then(|pattern| path::readings(&pattern).ok());
    readings.is_some_and(|readings| readings.iter().any(|(_, error)| *error == differ_on))
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
    let host = head.field(buffer, "host").unwrap_or_default();
    match rest {
        _ if !authority.eq_ignore_ascii_case(host) => Err(Rejection::BadTarget),
        [] => Ok(b"/"),
        [b'/', ..] => Ok(rest),
        // Without a path it would need one put in, which no client of note sends.
        _ => Err(Rejection::BadTarget),
    }
}

/// Begins what is told of the request; the id that it goes by.
fn begin(
    plan: &Plan,
    route: &Route,
    facts: &Facts<'_>,
    now: Now,
    record: &mut Record,
) -> RequestId {
    let id = clock::uuid(now.wall);
    let given = || {
        let mut values = facts.head.values(facts.request.buffer, "x-request-id");
        values.find_map(|value| str::from_utf8(value).ok())
    };
    let given = facts.client.behind_trusted.then(given).flatten();
    let request_id = given.map_or_else(
        || RequestId::new(id),
        |given| RequestId::Given(given.to_owned()),
    );
    let seen = Seen {
        buffer: facts.request.buffer,
        head: Some(facts.head),
        host: facts.request.host.as_bytes(),
        path: facts.request.path.as_bytes(),
        query: facts.query,
        client: facts.client,
        time: now.wall,
        id,
        request_id: &request_id,
    };
    draft::begin(plan, facts.conn, route.audit, &seen, record);
    request_id
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

/// Asks the breaker of the upstream that is to be called, where there is one.
fn enter(
    plan: &Plan,
    upstream: Option<usize>,
    now: Now,
    record: &mut Record,
) -> Result<Option<CallPermit>, Rejection> {
    let Some(upstream) = upstream else {
        return Ok(None);
    };
    let plan::Upstream {
        breaker: Some(breaker),
        decisions,
        ..
    } = &plan.upstreams[upstream]
    else {
        return Ok(None);
    };
    let mut said = |verdict: &'static str| {
        if let Some(draft) = &mut record.draft {
            draft.set_breaker(verdict);
        }
    };
    match breaker.try_enter(now.mono) {
        Ok((permit, None)) => {
            record.probe = permit.probe().map(Rc::new);
            decisions.admitted.inc();
            said("admitted");
            Ok(Some(permit))
        }
        Ok((permit, Some(_))) => {
            decisions.shadow_refused.inc();
            said("shadow_refused");
            Ok(Some(permit))
        }
        Err(refused) => {
            decisions.refused.inc();
            said("refused");
            let fallback = breaker.settings.fallback.clone();
            Err(Rejection::CircuitOpen(Box::new(CircuitOpen {
                retry_after: refused.retry_after,
                is_forced: refused.is_forced,
                fallback,
            })))
        }
    }
}

/// Where a redirect sends the client.
fn location(
    redirect: &Redirect,
    route: &Route,
    facts: &Facts<'_>,
    sent_path: &str,
) -> Result<String, Rejection> {
    let asked = Asked {
        pattern: route.matches.path.as_ref(),
        host: facts.request.host,
        path: facts.request.path,
        sent_path,
        query: str::from_utf8(facts.query).map_err(|_| Rejection::BadTarget)?,
    };
    rewrite::location(redirect, &asked).ok_or(Rejection::BadHead(HeadError::HostMissing))
}

/// What the upstream is asked for.
fn target(
    plan: &Plan,
    route: &Route,
    facts: &Facts<'_>,
    sent_path: &str,
    record: &mut Record,
) -> Vec<u8> {
    let (path, query) = (facts.request.path, facts.query);
    let told = record.draft.as_mut().filter(|_| plan.traces.is_some());
    let Some(prefix) = &route.rewrite.path_prefix else {
        if let Some(draft) = told.filter(|_| sent_path != path) {
            draft.set_sent_path(plan.redaction.redact_path(sent_path));
        }
        return [sent_path.as_bytes(), query].concat();
    };
    let behind = rewrite::behind(route.matches.path.as_ref(), path);
    let sent = rewrite::with_prefix(rewrite::as_sent(path, behind, sent_path), prefix);
    if let Some(draft) = told {
        let moved = rewrite::with_prefix(behind, prefix);
        let kept = behind.matches('/').count();
        draft.set_sent_path(match plan.redaction.redact_moved(path, &moved, kept) {
            // Nothing of it is hidden, however it is spelt.
            Cow::Borrowed(_) => Cow::Borrowed(&*sent),
            hidden @ Cow::Owned(_) => hidden,
        });
    }
    [sent.as_bytes(), query].concat()
}

fn ring_key(plan: &Plan, upstream: usize, facts: &Facts<'_>) -> Option<u64> {
    match &plan.config.upstreams[upstream].load_balancing {
        Balancing::RoundRobin | Balancing::LeastRequest => None,
        Balancing::RingHash(by) => {
            let parts = facts.parts(by, plan, OfSeveral::First).ok()?;
            Some(balance::hash(parts.iter().map(|part| &**part)))
        }
    }
}
