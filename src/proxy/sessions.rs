//! Sessions on the path of a request: who asks, and what a trusted upstream's response starts and ends. Keeps none: `store::sessions` does.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::sleep;
use tracing::warn;

use super::draft::Draft;
use super::headers::put;
use super::lane::Lane;
use super::reply::{Rejection, Unauthenticated};
use crate::clock;
use crate::config::Route;
use crate::config::sessions::TokenSource;
use crate::http1::head::HeadError;
use crate::http1::response::ResponseHead;
use crate::plan::Plan;
use crate::policy::session::{
    self, END_HEADER, START_HEADER, Session, SessionId, SessionStart, Verdict, judge,
};
use crate::store::sessions::{CreateError, Known, LiveSessions, Reach};
use crate::telemetry::log::LogRateLimit;
use crate::upstream::LiveUpstream;

/// Tells the client its token where no cookie or header of the configuration can.
const TOKEN_HEADER: &str = "X-Weir-Session-Token";

/// Between looks at the session of a switched connection while Redis does not answer, at most.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Tokens of one request beside the one that is believed: each can be a call of Redis.
const TOKENS: usize = 16;

/// The session of a request to `route`: `None` where the route asks for none, or takes a request without. Waits for Redis
/// alone, only where this process does not know, and for what is left of the request's time once it has `waited` so long. `draft` is
/// told whose it is, though the route may want another.
pub(super) async fn identify<'a>(
    plan: &Plan,
    lane: &Lane,
    route: &Route,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    now: Duration,
    draft: Option<&mut Draft>,
    waited: &mut Duration,
) -> Result<Option<Arc<Session>>, Rejection> {
    let Some(asks) = &route.session else {
        return Ok(None);
    };
    let live = &plan.sessions[asks.sessions];
    let token = session::token_from(&live.settings, fields);
    let known = token.map_or(Known::Nobody, |token| live.recall(token, now));
    let found = match known {
        Known::Session(session) => Some(session),
        Known::Nobody => None,
        // Boxed, to keep the common future small.
        Known::Ask(id) => {
            let asked = async |reach: Reach<'_>| Box::pin(live.ask(id, reach)).await;
            let answer = in_time(lane, waited, asked).await;
            answer.map_err(|_| Rejection::SessionStoreDown)?
        }
    };
    let nobody = || {
        let outcome = match token {
            Some(_) => &live.metrics.unknown,
            None => &live.metrics.missing,
        };
        outcome.inc();
        if asks.require {
            return Err(Rejection::Unauthenticated(Unauthenticated {
                bearer: live.settings.sources.contains(&TokenSource::Bearer),
                realm: live.name.clone(),
                unknown_token: token.is_some(),
            }));
        }
        Ok(None)
    };
    let Some(session) = found else {
        return nobody();
    };
    let verdict = judge(&session, &asks.claims, now);
    if let (Some(draft), Verdict::Valid | Verdict::ClaimMissing { .. }) = (draft, &verdict) {
        draft.set_session(&session.user);
    }
    match verdict {
        Verdict::Valid => {
            live.metrics.valid.inc();
            Ok(Some(session))
        }
        // By this process's clock it is over, though Redis's may have it live yet.
        Verdict::Expired => nobody(),
        Verdict::ClaimMissing { claim } => {
            live.metrics.forbidden.inc();
            Err(Rejection::Forbidden(claim.to_owned()))
        }
    }
}

/// Waits until the session of a switched connection is over; for ever, where it has none. The session is looked at again as
/// often as the route says, and at once when it is told to have ended. While Redis does not answer it is looked at at least each second,
/// and holds for as long as one that is remembered would.
pub(super) async fn over(plan: &Plan, lane: &Lane, route: &Route, session: Option<&Session>) {
    let (Some(session), Some(asks)) = (session, &route.session) else {
        return pending().await;
    };
    let live = &plan.sessions[asks.sessions];
    let holds = live.shared.cache.ttl + live.shared.grace;
    let mut watch = live.watch(session.id);
    let mut unanswered_since = None;
    // At the start too: it may have ended before there was a watch.
    loop {
        // Boxed, to keep the common future small.
        let wait = match Box::pin(live.show(session.id, reach(lane))).await {
            Ok(Some(_)) => {
                unanswered_since = None;
                asks.revalidate_every
            }
            Ok(None) => return,
            Err(_) => {
                let now = clock::mono();
                // Not since the last answer, which may be older than that in the best of times.
                if now >= *unanswered_since.get_or_insert(now) + holds {
                    return;
                }
                asks.revalidate_every.min(LOOK_AGAIN)
            }
        };
        tokio::select! {
            () = watch.ended() => return,
            () = sleep(wait) => {}
        }
    }
}

/// Asks for what is left of the time that a request may wait for Redis, of which it has `waited` so long.
async fn in_time<T>(
    lane: &Lane,
    waited: &mut Duration,
    ask: impl AsyncFnOnce(Reach<'_>) -> T,
) -> T {
    let mut reach = reach(lane);
    reach.within = reach
        .redis
        .map(|redis| redis.client().timeout.saturating_sub(*waited));
    if reach.redis.is_none() {
        return ask(reach).await;
    }
    let began = clock::mono();
    let answer = ask(reach).await;
    *waited += clock::mono().saturating_sub(began);
    answer
}

fn reach(lane: &Lane) -> Reach<'_> {
    Reach {
        redis: lane.redis.as_ref().map(|redis| &redis.sessions),
        within: None,
    }
}

/// The sessions beside its own that a log-in or log-out ends where a request says several tokens; `None` where those are more than [`TOKENS`]
/// and one. Who plants a second cookie, as a sibling domain can, takes a request its session, and must not keep that alive.
pub(super) fn others<'a>(
    plan: &Plan,
    route: &Route,
    own: Option<&Session>,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
) -> Option<Vec<SessionId>> {
    let mut ids = Vec::new();
    let trusted = route
        .upstream()
        .is_some_and(|index| plan.config.upstreams[index].trust_session_headers);
    let (Some(asks), true) = (&route.session, trusted) else {
        return Some(ids);
    };
    let live = &plan.sessions[asks.sessions];
    let tokens = session::tokens_in(&live.settings, fields);
    // What one token alone is of is known.
    if tokens.len() < 2 {
        return Some(ids);
    }
    let mut seen = Vec::new();
    for token in tokens {
        if seen.contains(&token) {
            continue;
        }
        // Each is hashed, whoever sends them.
        if seen.len() > TOKENS {
            return None;
        }
        seen.push(token);
        if let Some(id) = live.id_of(token)
            && own.is_none_or(|own| own.id != id)
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    }
    Some(ids)
}

/// Starts or ends a session, where the response's session headers say so and the upstream may, and gives the fields that tell the client of
/// it; `None` where nothing was done. `current` is the request's own session, `others` are those of [`others`]. A log-in or log-out that Redis does not answer is refused, and
/// leaves the client with what it has: it must not believe that a session has ended which has not. It waits for what is left of the
/// request's time to wait for Redis. `draft` is told who logs in.
pub(super) async fn start_or_end(
    plan: &Plan,
    lane: &Lane,
    route: &Route,
    (current, others): (Option<&Session>, Option<&[SessionId]>),
    (answer, response): (&[u8], &ResponseHead),
    draft: Option<&mut Draft>,
    waited: &mut Duration,
) -> Result<Option<Vec<u8>>, Rejection> {
    let mut values = response.fields.iter().filter_map(|(name, value)| {
        let name = &answer[name.clone()];
        let is = |header: &str| name.eq_ignore_ascii_case(header.as_bytes());
        (is(START_HEADER) || is(END_HEADER)).then(|| (is(START_HEADER), &answer[value.clone()]))
    });
    let Some(first) = values.next() else {
        return Ok(None);
    };
    let Some(index) = route.upstream() else {
        return Ok(None);
    };
    let (settings, upstream) = (&plan.config.upstreams[index], &*plan.upstreams[index].live);
    let (Some(asks), true) = (&route.session, settings.trust_session_headers) else {
        say(upstream, &upstream.lines.ignored, |upstream, left_out| {
            warn!(
                upstream,
                left_out,
                "a session header was ignored: the route needs \"session\", the upstream \"trust_session_headers: true\""
            );
        });
        return Ok(None);
    };
    let live = &plan.sessions[asks.sessions];
    if values.next().is_some() {
        say(upstream, &upstream.lines.several, |upstream, left_out| {
            warn!(
                upstream,
                left_out, "several session headers in one response"
            );
        });
        return Err(Rejection::UpstreamBroken);
    }
    // The old session ends even when a new one starts: a token from before a log-in must be worth nothing after it.
    let others = others.ok_or(Rejection::BadHead(HeadError::TooLarge))?;
    // Its own last: if one cannot be ended, it can still ask again.
    for id in others.iter().chain(current.map(|own| &own.id)) {
        let revoke = async |reach: Reach<'_>| Box::pin(live.revoke(*id, reach)).await;
        let revoked = in_time(lane, waited, revoke).await;
        revoked.map_err(|_| Rejection::SessionStoreDown)?;
    }
    let mut told = Vec::new();
    match first {
        (true, value) => {
            let start = async |reach: Reach<'_>| {
                Box::pin(start(live, reach, value, upstream, draft, &mut told)).await
            };
            in_time(lane, waited, start).await?;
        }
        (false, _) => {
            for source in &live.settings.sources {
                if let TokenSource::Cookie(name) = source {
                    let cookie = session::clear_cookie(&live.settings, name);
                    put(&mut told, b"Set-Cookie", cookie.as_bytes());
                }
            }
        }
    }
    Ok(Some(told))
}

async fn start(
    live: &LiveSessions,
    reach: Reach<'_>,
    value: &[u8],
    upstream: &LiveUpstream,
    draft: Option<&mut Draft>,
    told: &mut Vec<u8>,
) -> Result<(), Rejection> {
    let start = SessionStart::parse(value).map_err(|error| {
        say(upstream, &upstream.lines.unread, |upstream, left_out| {
            warn!(upstream, %error, left_out, "a session was not started");
        });
        Rejection::UpstreamBroken
    })?;
    if let Some(draft) = draft {
        draft.set_user(&start.user);
    }
    let created = live.create(start.user, start.claims, reach).await;
    let created = created.map_err(|error| match error {
        CreateError::MaxReached => Rejection::TooManySessions,
        CreateError::Full | CreateError::Random(_) => {
            say(upstream, &upstream.lines.full, |upstream, left_out| {
                warn!(upstream, %error, left_out, "a session was not started");
            });
            Rejection::SessionsFull
        }
        // Told by the client of Redis, once.
        CreateError::Store(_) => Rejection::SessionStoreDown,
    })?;
    let token = created.token.as_str();
    let mut sources = live.settings.sources.iter();
    let place = sources.find(|source| !matches!(source, TokenSource::Bearer));
    match place {
        Some(TokenSource::Cookie(name)) => {
            let max_age = live.settings.absolute_timeout;
            let cookie = session::set_cookie(&live.settings, name, token, max_age);
            put(told, b"Set-Cookie", cookie.as_bytes());
        }
        Some(TokenSource::Header(name)) => put(told, name.as_bytes(), token.as_bytes()),
        Some(TokenSource::Bearer) | None => put(told, TOKEN_HEADER.as_bytes(), token.as_bytes()),
    }
    Ok(())
}

/// Writes a line of the upstream's name, and of how many such were left out, if there is any; or leaves it out as well.
fn say(upstream: &LiveUpstream, line: &Mutex<LogRateLimit>, write: impl FnOnce(&str, Option<u64>)) {
    let left_out = line.lock().next(clock::mono());
    if let Some(left_out) = left_out {
        write(&upstream.settings.name, (left_out > 0).then_some(left_out));
    }
}
