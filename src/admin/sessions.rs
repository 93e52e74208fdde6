//! `/v1/sessions`: start, list, show and end sessions.

use std::time::Duration;

use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, Problem, Reply, parameters};
use crate::clock;
use crate::config::sessions::Claims;
use crate::plan::Plan;
use crate::policy::session::{Session, SessionId};
use crate::store::fleet::FleetConnections;
use crate::store::redis::CallError;
use crate::store::sessions::{CreateError, ListError, LiveSessions, Reach};

/// Sessions on one page of a list, unless told.
const PAGE: usize = 100;
const LARGEST_PAGE: usize = 1_000;

/// For each call of Redis: an operator would rather wait than be refused.
const WITHIN: Duration = Duration::from_secs(1);

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
/// - `GET /v1/sessions?user=USER&limit=N&after=NEXT`: list, about `limit` a page, from where the page before said;
/// - `DELETE /v1/sessions?user=USER`: end all of a user;
/// - `GET` and `DELETE /v1/sessions/ID`: show and end one.
///
/// Each takes `sessions=NAME`, which is needed where the configuration has several.
pub(super) async fn answer(
    plan: &Plan,
    redis: Option<&FleetConnections>,
    method: &Method,
    path: &[&str],
    query: &str,
    body: &[u8],
) -> Answer {
    let reach = Reach {
        redis: redis.map(|redis| &redis.sessions),
        within: Some(WITHIN),
    };
    let known: &[&str] = match (method, path) {
        (&Method::GET, []) => &["user", "limit", "after", "sessions"],
        (&Method::DELETE, []) => &["user", "sessions"],
        _ => &["sessions"],
    };
    let parameters = parameters(query, known)?;
    let parameter = |name: &str| {
        let found = parameters.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.clone())
    };
    match (method, path) {
        (&Method::POST, []) => {
            let new: NewSession = serde_json::from_slice(body).map_err(|error| {
                Problem::bad(format!(
                    "body must be {{\"user\": \"ann\", \"claims\": {{}}}}: {error}"
                ))
            })?;
            let name = new.sessions.clone().or(parameter("sessions"));
            create(find(plan, name)?, new, reach).await
        }
        (&Method::GET, []) => {
            let live = find(plan, parameter("sessions"))?;
            list(live, &parameter, reach).await
        }
        (&Method::DELETE, []) => {
            let live = find(plan, parameter("sessions"))?;
            let user = parameter("user").ok_or_else(|| {
                Problem::bad("say whose: DELETE /v1/sessions?user=USER ends all of a user")
            })?;
            let ended = live.revoke_user(&user, reach).await;
            let ended = ended.map_err(unanswered)?;
            Ok(Reply::Json(json!({ "ended": ended })))
        }
        (_, []) => Err(Problem::method("GET, HEAD, POST, DELETE")),
        (&Method::GET | &Method::DELETE, [id]) => {
            let live = find(plan, parameter("sessions"))?;
            let id: SessionId = id
                .parse()
                .map_err(|error| Problem::bad(format!("{error}")))?;
            let found = live.show(id, reach).await.map_err(unanswered)?;
            let found = found.ok_or_else(|| Problem::not_found("no live session has this id"))?;
            if *method == Method::GET {
                return Ok(Reply::Json(describe(&found)));
            }
            live.revoke(id, reach).await.map_err(unanswered)?;
            Ok(Reply::Nothing)
        }
        (_, [_]) => Err(Problem::method("GET, HEAD, DELETE")),
        _ => Err(Problem::not_found(
            "known here: /v1/sessions and /v1/sessions/ID",
        )),
    }
}

fn find(plan: &Plan, name: Option<String>) -> Result<&LiveSessions, Problem> {
    match (name, plan.sessions.as_slice()) {
        (None, [only]) => Ok(only),
        (None, []) => Err(Problem::not_found(
            "the configuration has no sessions; add `sessions: {web: {}}`",
        )),
        (None, all) => Err(Problem::bad(format!(
            "the configuration has several ({}): say which by sessions=NAME",
            names(all)
        ))),
        (Some(name), all) => all.iter().find(|live| live.name == name).ok_or_else(|| {
            let known = names(all);
            Problem::not_found(format!("no sessions \"{name}\"; known are: {known}"))
        }),
    }
}

fn names(all: &[LiveSessions]) -> String {
    let names: Vec<_> = all.iter().map(|live| live.name.as_str()).collect();
    names.join(", ")
}

async fn create(live: &LiveSessions, new: NewSession, reach: Reach<'_>) -> Answer {
    if new.user.is_empty() {
        return Err(Problem::bad(
            "a session needs a user, and \"user\" is empty",
        ));
    }
    let created = live.create(new.user, new.claims, reach).await;
    let created = created.map_err(|error| {
        let status = match error {
            CreateError::MaxReached => StatusCode::CONFLICT,
            CreateError::Full | CreateError::Random(_) | CreateError::Store(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        };
        Problem::new(status, error.to_string())
    })?;
    let mut value = describe(&created.session);
    value["token"] = json!(created.token.as_str());
    let evicted = created.evicted.iter().map(ToString::to_string);
    value["evicted"] = evicted.collect();
    Ok(Reply::Status(StatusCode::CREATED, value))
}

async fn list(
    live: &LiveSessions,
    parameter: &(dyn Fn(&str) -> Option<String> + Sync),
    reach: Reach<'_>,
) -> Answer {
    let limit = match parameter("limit") {
        None => PAGE,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=LARGEST_PAGE).contains(limit))
            .ok_or_else(|| Problem::bad(format!("limit must be 1 to {LARGEST_PAGE}")))?,
    };
    let (user, after) = (parameter("user"), parameter("after"));
    let page = live.list(user.as_deref(), limit, after.as_deref(), reach);
    let page = page.await.map_err(|error| match error {
        ListError::After => Problem::bad(error.to_string()),
        ListError::Store(error) => unanswered(error),
    })?;
    let sessions = page.sessions.iter();
    let sessions: Vec<_> = sessions.map(|session| describe(session)).collect();
    Ok(Reply::Json(
        json!({ "sessions": sessions, "next": page.next }),
    ))
}

fn unanswered(error: CallError) -> Problem {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    Problem::new(status, format!("sessions are in redis: {error}"))
}

fn describe(session: &Session) -> Value {
    let now = clock::moment().mono;
    let seconds = |duration: Duration| duration.as_secs();
    let idle_end = session.last_seen() + session.idle_timeout();
    json!({
        "id": session.id.to_string(),
        "user": session.user,
        "claims": session.claims(),
        "age_seconds": seconds(now.saturating_sub(session.created)),
        "idle_seconds": seconds(now.saturating_sub(session.last_seen())),
        "expires_in_seconds": seconds(idle_end.min(session.ends()).saturating_sub(now)),
    })
}
