//! `/v1/upstreams`: which endpoints there are, and how they are.

use hyper::Method;
use serde_json::{Value, json};

use super::{Answer, Problem, Reply};
use crate::clock;
use crate::plan::Plan;
use crate::upstream::{EndpointState, LiveUpstream};

/// `GET /v1/upstreams`, `GET /v1/upstreams/UPSTREAM`.
pub(super) fn answer(plan: &Plan, method: &Method, path: &[&str]) -> Answer {
    let shown = match path {
        [] => {
            let list: Vec<_> = plan.live_upstreams().map(|live| describe(live)).collect();
            json!({ "upstreams": list })
        }
        [name] => {
            let mut all = plan.live_upstreams();
            let live = all.find(|live| live.settings.name == *name);
            describe(live.ok_or_else(|| Problem::not_found(format!("no upstream \"{name}\"")))?)
        }
        _ => {
            return Err(Problem::not_found(
                "known here: /v1/upstreams and /v1/upstreams/UPSTREAM",
            ));
        }
    };
    match *method {
        Method::GET => Ok(Reply::Json(shown)),
        _ => Err(Problem::method("GET, HEAD")),
    }
}

fn describe(live: &LiveUpstream) -> Value {
    let endpoints = live.endpoint_states(clock::mono());
    let endpoints: Vec<_> = endpoints.into_iter().map(endpoint).collect();
    json!({
        "upstream": live.settings.name,
        "requests": live.under_way(),
        "bound": live.bound(),
        "panic": live.counts().panic,
        "endpoints": endpoints,
    })
}

fn endpoint(state: EndpointState) -> Value {
    json!({
        "endpoint": state.endpoint.place,
        "state": state.name,
        "why": state.why,
        "ejected_for_seconds": state.ejected_for.map(|left| left.as_secs_f64()),
        "requests": state.requests,
    })
}
