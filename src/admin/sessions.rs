//! `/v1/sessions`: start, list, show and end sessions.

use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, Problem, Reply, parameters};
use crate::clock;
use crate::config::sessions::Claims;
use crate::plan::Plan;
use crate::policy::session::{Session, SessionId};
use crate::store::sessions::{CreateError, LiveSessions};

/// Sessions on one page of a list, unless told, and at most.
const PAGE: (usize, usize) = (100, 1_000);

/// The body of a `POST`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewSession {
    /// A name under `sessions`; needed where there are several.
    sessions: Option<String>,
    user: String,
    #[serde(default)]
    claims: Claims,
}

/// - `POST /v1/sessions` `{"user": "ann", "claims": {"role": "customer"}}`: start one; the only reply with its token;
/// - `GET /v1/sessions?user=USER&limit=N&after=ID`: list, by id;
/// - `DELETE /v1/sessions?user=USER`: end all of a user;
/// - `GET` and `DELETE /v1/sessions/ID`: show and end one.
///
/// Each takes `sessions=NAME`, which is needed where the configuration has several.
pub(super) fn answer(
    plan: &Plan,
    method: &Method,
    path: &[&str],
    query: &str,
    body: &[u8],
) -> Answer {
    let parameter = |name: &str| parameters(query, name).into_iter().next();
    match (method, path) {
        (&Method::POST, []) => {
            let new: NewSession = serde_json::from_slice(body).map_err(|error| {
                Problem::bad(format!(
                    "body must be {{\"user\": \"ann\", \"claims\": {{}}}}: {error}"
                ))
            })?;
            let name = new.sessions.clone().or(parameter("sessions"));
            create(find(plan, name)?, new)
        }
        (&Method::GET, []) => list(find(plan, parameter("sessions"))?, &parameter),
        (&Method::DELETE, []) => {
            let live = find(plan, parameter("sessions"))?;
            let user = parameter("user").ok_or_else(|| {
                Problem::bad("say whose: DELETE /v1/sessions?user=USER ends all of a user")
            })?;
            let ended = live.store.revoke_user(&user);
            live.metrics.ended.inc_by(ended as u64);
            Ok(Reply::Json(json!({ "ended": ended })))
        }
        (_, []) => Err(Problem::method("GET, POST, DELETE")),
        (&Method::GET | &Method::DELETE, [id]) => {
            let live = find(plan, parameter("sessions"))?;
            let id: SessionId = id
                .parse()
                .map_err(|error| Problem::bad(format!("{error}")))?;
            let found = live
                .store
                .show(id, clock::moment().mono)
                .ok_or_else(|| Problem::not_found("no live session has this id"))?;
            if *method == Method::GET {
                return Ok(Reply::Json(describe(&found)));
            }
            if live.store.revoke(id).is_some() {
                live.metrics.ended.inc();
            }
            Ok(Reply::Nothing)
        }
        (_, [_]) => Err(Problem::method("GET, DELETE")),
        _ => Err(Problem::not_found(
            "known here: /v1/sessions and /v1/sessions/ID",
        )),
    }
}

fn find(plan: &Plan, name: Option<String>) -> Result<&LiveSessions, Problem> {
    match (name, plan.sessions.as_slice()) {
        (None, [only]) => Ok(only),
        (None, []) => Err(Problem::not_found("the configuration has no sessions")),
        (None, _) => Err(Problem::bad(
            "the configuration has several: say which by sessions=NAME",
        )),
        (Some(name), all) => all
            .iter()
            .find(|live| live.name == name)
            .ok_or_else(|| Problem::not_found(format!("no sessions \"{name}\""))),
    }
}

fn create(live: &LiveSessions, new: NewSession) -> Answer {
    if new.user.is_empty() {
        return Err(Problem::bad(
            "a session needs a user, and \"user\" is empty",
        ));
    }
    let now = clock::moment().mono;
    let created = live.store.create(&live.settings, new.user, new.claims, now);
    let created = created.map_err(|error| {
        live.metrics.refused.inc();
        let status = match error {
            CreateError::MaxReached => StatusCode::CONFLICT,
            CreateError::Full | CreateError::Random(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Problem::new(status, error.to_string())
    })?;
    live.metrics.created.inc();
    live.metrics.evicted.inc_by(created.evicted.len() as u64);
    let mut value = describe(&created.session);
    value["token"] = json!(created.token.as_str());
    let evicted = created.evicted.iter().map(ToString::to_string);
    value["evicted"] = evicted.collect();
    Ok(Reply::Status(StatusCode::CREATED, value))
}

fn list(live: &LiveSessions, parameter: &dyn Fn(&str) -> Option<String>) -> Answer {
    let limit = match parameter("limit") {
        None => PAGE.0,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=PAGE.1).contains(limit))
            .ok_or_else(|| Problem::bad(format!("limit must be 1 to {}", PAGE.1)))?,
    };
    let after = parameter("after")
        .map(|id| id.parse().map_err(|error| Problem::bad(format!("{error}"))))
        .transpose()?;
    let now = clock::moment().mono;
    let page = live
        .store
        .list(parameter("user").as_deref(), limit, after, now);
    let sessions: Vec<_> = page
        .sessions
        .iter()
        .map(|session| describe(session))
        .collect();
    let next = page.next.map(|id| id.to_string());
    Ok(Reply::Json(json!({ "sessions": sessions, "next": next })))
}

fn describe(session: &Session) -> Value {
    let now = clock::moment().mono;
    let seconds = |duration: std::time::Duration| duration.as_secs();
    let idle_end = session.last_seen() + session.idle_timeout;
    json!({
        "id": session.id.to_string(),
        "user": session.user,
        "claims": session.claims,
        "age_seconds": seconds(now.saturating_sub(session.created)),
        "idle_seconds": seconds(now.saturating_sub(session.last_seen())),
        "expires_in_seconds": seconds(idle_end.min(session.ends).saturating_sub(now)),
    })
}
