//! Sessions on the path of a request: who asks, and what a trusted upstream's response starts and ends.

use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use super::reply::{Rejection, Unauthenticated};
use crate::clock;
use crate::config::Route;
use crate::config::sessions::TokenSource;
use crate::http1::response::ResponseHead;
use crate::plan::Plan;
use crate::policy::session::{
    self, END_HEADER, START_HEADER, Session, SessionStart, Verdict, judge,
};
use crate::store::sessions::{CreateError, LiveSessions};

/// Tells the client its token where no cookie or header of the configuration can.
const TOKEN_HEADER: &str = "X-Weir-Session-Token";

/// The session of a request to `route`: `None` where the route asks for none, or takes a request without.
pub(super) fn identify<'a>(
    plan: &Plan,
    route: &Route,
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    now: Duration,
) -> Result<Option<Arc<Session>>, Rejection> {
    let Some(asks) = &route.session else {
        return Ok(None);
    };
    let live = &plan.sessions[asks.sessions];
    let token = session::token_from(&live.settings, fields);
    let found = token.and_then(|token| live.store.find(token, now));
    let Some(session) = found else {
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
        return Ok(None);
    };
    match judge(&session, &asks.claims, now) {
        Verdict::Valid => {
            live.metrics.valid.inc();
            Ok(Some(session))
        }
        // It was live a moment ago, when it was found.
        Verdict::Expired => Ok(None),
        Verdict::ClaimMissing { claim } => {
            live.metrics.forbidden.inc();
            Err(Rejection::Forbidden(claim.to_owned()))
        }
    }
}

/// Does what the response's session headers say, if the upstream may, and gives the fields that tell the client of it.
/// `current` is the request's own session.
pub(super) fn follow(
    plan: &Plan,
    route: &Route,
    current: Option<&Session>,
    answer: &[u8],
    response: &ResponseHead,
) -> Result<Vec<u8>, Rejection> {
    let mut values = response.fields.iter().filter_map(|(name, value)| {
        let name = &answer[name.clone()];
        let is = |header: &str| name.eq_ignore_ascii_case(header.as_bytes());
        (is(START_HEADER) || is(END_HEADER)).then(|| (is(START_HEADER), &answer[value.clone()]))
    });
    let Some(first) = values.next() else {
        return Ok(Vec::new());
    };
    let upstream = &plan.config.upstreams[route.upstream];
    let (Some(asks), true) = (&route.session, upstream.trust_session_headers) else {
        warn!(
            upstream = upstream.name,
            "a session header was ignored: the route needs \"session\", the upstream \"trust_session_headers: true\""
        );
        return Ok(Vec::new());
    };
    let live = &plan.sessions[asks.sessions];
    if values.next().is_some() {
        warn!(
            upstream = upstream.name,
            "several session headers in one response"
        );
        return Err(Rejection::UpstreamBroken);
    }
    // The old session ends even when a new one starts: a token from before a log-in must be worth nothing after it.
    let ended = current.and_then(|current| live.store.revoke(current.id));
    if ended.is_some() {
        live.metrics.ended.inc();
    }
    let mut told = Vec::new();
    match first {
        (true, value) => start(live, value, &upstream.name, &mut told)?,
        (false, _) => {
            for source in &live.settings.sources {
                if let TokenSource::Cookie(name) = source {
                    let cookie = session::clear_cookie(&live.settings, name);
                    put(&mut told, "Set-Cookie", &cookie);
                }
            }
        }
    }
    Ok(told)
}

fn start(
    live: &LiveSessions,
    value: &[u8],
    upstream: &str,
    told: &mut Vec<u8>,
) -> Result<(), Rejection> {
    let start = SessionStart::parse(value).map_err(|error| {
        warn!(upstream, %error, "a session was not started");
        Rejection::UpstreamBroken
    })?;
    let created = live
        .store
        .create(&live.settings, start.user, start.claims, clock::mono())
        .map_err(|error| {
            live.metrics.refused.inc();
            match error {
                CreateError::MaxReached => Rejection::TooManySessions,
                CreateError::Full | CreateError::Random(_) => {
                    warn!(upstream, %error, "a session was not started");
                    Rejection::SessionsFull
                }
            }
        })?;
    live.metrics.created.inc();
    live.metrics.evicted.inc_by(created.evicted.len() as u64);
    let token = created.token.as_str();
    let mut sources = live.settings.sources.iter();
    let place = sources.find(|source| !matches!(source, TokenSource::Bearer));
    match place {
        Some(TokenSource::Cookie(name)) => {
            let max_age = live.settings.absolute_timeout;
            let cookie = session::set_cookie(&live.settings, name, token, max_age);
            put(told, "Set-Cookie", &cookie);
        }
        Some(TokenSource::Header(name)) => put(told, name, token),
        Some(TokenSource::Bearer) | None => put(told, TOKEN_HEADER, token),
    }
    Ok(())
}

fn put(told: &mut Vec<u8>, name: &str, value: &str) {
    for part in [name, ": ", value, "\r\n"] {
        told.extend_from_slice(part.as_bytes());
    }
}
