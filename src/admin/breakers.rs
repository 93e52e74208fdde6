//! `/v1/breakers`: list, and force one open or closed or set it back.

use hyper::Method;
use serde_json::{Value, json};

use super::{Answer, Problem, Reply};
use crate::clock;
use crate::plan::Plan;
use crate::store::breakers::LiveBreaker;

/// `GET /v1/breakers`, `GET /v1/breakers/UPSTREAM`, `POST /v1/breakers/UPSTREAM/{force-open,force-closed,reset}`.
pub(super) fn answer(plan: &Plan, method: &Method, path: &[&str]) -> Answer {
    let breakers = || plan.breakers.iter().flatten();
    match (method, path) {
        (&Method::GET, []) => {
            let list: Vec<_> = breakers().map(|breaker| describe(breaker)).collect();
            Ok(Reply::Json(json!({ "breakers": list })))
        }
        (_, []) => Err(Problem::method("GET")),
        (_, [upstream, rest @ ..]) => {
            let breaker = breakers()
                .find(|breaker| breaker.upstream == *upstream)
                .ok_or_else(|| {
                    Problem::not_found(format!("no upstream \"{upstream}\" with a circuit breaker"))
                })?;
            match (method, rest) {
                (&Method::GET, []) => {}
                (&Method::POST, ["force-open"]) => breaker.force_open(),
                (&Method::POST, ["force-closed"]) => breaker.force_closed(),
                (&Method::POST, ["reset"]) => breaker.reset(),
                (_, []) => return Err(Problem::method("GET")),
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

fn describe(breaker: &LiveBreaker) -> Value {
    let now = clock::moment().mono;
    let snapshot = breaker.snapshot(now);
    json!({
        "upstream": breaker.upstream,
        "breaker": breaker.settings.name,
        "state": snapshot.state.as_str(),
        "calls": snapshot.calls,
        "failures": snapshot.failures,
        "slow": snapshot.slow,
        "open_for_seconds": snapshot.open_until.map(|until| until.saturating_sub(now).as_secs_f64()),
    })
}
