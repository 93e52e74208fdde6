//! `/v1/breakers`: list, and force one open or closed or set it back.

use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use super::{Answer, Problem, Reply};
use crate::clock;
use crate::plan::Plan;
use crate::store::breakers::LiveBreaker;
use crate::store::breakers::shared::Forced;
use crate::store::fleet::FleetConnections;

/// `GET /v1/breakers`, `GET /v1/breakers/UPSTREAM`, `POST /v1/breakers/UPSTREAM/{force-open,force-closed,reset}`.
pub(super) async fn answer(
    plan: &Plan,
    redis: Option<&FleetConnections>,
    method: &Method,
    path: &[&str],
) -> Answer {
    match (method, path) {
        (&Method::GET, []) => {
            let list: Vec<_> = plan.breakers().map(|breaker| describe(breaker)).collect();
            Ok(Reply::Json(json!({ "breakers": list })))
        }
        (_, []) => Err(Problem::method("GET, HEAD")),
        (_, [upstream, rest @ ..]) => {
            let breaker = plan
                .breakers()
                .find(|breaker| breaker.upstream == *upstream)
                .ok_or_else(|| {
                    Problem::not_found(format!("no upstream \"{upstream}\" with a circuit breaker"))
                })?;
            match (method, rest) {
                (&Method::GET, []) => {}
                (&Method::POST, ["force-open"]) => force(breaker, redis, Forced::Open).await?,
                (&Method::POST, ["force-closed"]) => force(breaker, redis, Forced::Closed).await?,
                (&Method::POST, ["reset"]) => force(breaker, redis, Forced::Reset).await?,
                (_, []) => return Err(Problem::method("GET, HEAD")),
                (_, ["force-open" | "force-closed" | "reset"]) => {
                    return Err(Problem::method("POST"));
                }
                _ => {
                    return Err(Problem::not_found(
                        "a breaker knows force-open, force-closed and reset",
                    ));
                }
            }
            Ok(Reply::Json(describe(breaker)))
        }
    }
}

/// A shared breaker is forced for all processes or not at all: one of them forced alone would be mended by the others, or
/// forgotten, once Redis is back.
async fn force(
    breaker: &LiveBreaker,
    redis: Option<&FleetConnections>,
    forced: Forced,
) -> Result<(), Problem> {
    match (breaker.sharing(), redis) {
        (Some(sharing), Some(redis)) => breaker
            .force_all(sharing, &redis.main, forced)
            .await
            .map_err(|error| {
                let detail = format!(
                    "the breaker is shared, and it is not known to be changed: {error}; ask again once redis answers"
                );
                Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
            }),
        (None, _) | (Some(_), None) => {
            breaker.force(forced);
            Ok(())
        }
    }
}

fn describe(breaker: &LiveBreaker) -> Value {
    let now = clock::moment().mono;
    let snapshot = breaker.snapshot(now);
    let shared = breaker.with_member(|member| {
        let (processes, doubting) = member.processes();
        json!({ "by": if member.is_together() { "all" } else { "this_process" }, "processes": processes, "doubting": doubting })
    });
    json!({
        "upstream": breaker.upstream,
        "breaker": breaker.settings.name,
        "state": snapshot.state.as_str(),
        "calls": snapshot.calls,
        "failures": snapshot.failures,
        "slow": snapshot.slow,
        "open_for_seconds": snapshot.open_until.map(|until| until.saturating_sub(now).as_secs_f64()),
        "shared": shared,
    })
}
