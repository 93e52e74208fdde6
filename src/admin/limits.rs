//! `/v1/limits`: list, show and reset one key, and set overrides.

use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, Problem, Reply, parameters};
use crate::clock;
use crate::config::check::limits::override_rules;
use crate::config::limits::{Limit, Rule};
use crate::plan::Plan;
use crate::store::limits::Override;

/// The body of a `PUT`: `{"limit": "500/s"}`, or `unlimited`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewOverride {
    limit: String,
}

/// - `GET /v1/limits`: all;
/// - `GET` and `DELETE /v1/limits/NAME?key=PART&key=PART`: what one key has left; forget what it used;
/// - `PUT` and `DELETE /v1/limits/NAME/overrides/KEY`: the parts of a key joined by `:`.
pub(super) fn answer(
    plan: &Plan,
    method: &Method,
    path: &[&str],
    query: &str,
    body: &[u8],
) -> Answer {
    let find = |name: &str| {
        let found = plan.config.limits.iter().find(|limit| limit.name == name);
        found.ok_or_else(|| {
            Problem::not_found(format!("no limit \"{name}\": GET /v1/limits lists them"))
        })
    };
    match (method, path) {
        (&Method::GET, []) => {
            let list: Vec<_> = plan
                .config
                .limits
                .iter()
                .map(|limit| describe(plan, limit))
                .collect();
            Ok(Reply::Json(
                json!({ "limits": list, "keys": plan.limits.len() }),
            ))
        }
        (_, []) => Err(Problem::method("GET")),
        (&Method::GET | &Method::DELETE, [name]) => {
            one_key(plan, find(name)?, method, parameters(query, "key"))
        }
        (_, [_]) => Err(Problem::method("GET, DELETE")),
        (&Method::PUT, [name, "overrides", key]) => {
            let limit = find(name)?;
            let new: NewOverride = serde_json::from_slice(body).map_err(|error| {
                Problem::bad(format!("body must be {{\"limit\": \"500/s\"}}: {error}"))
            })?;
            let rules = override_rules(limit, &new.limit).map_err(Problem::bad)?;
            plan.limits.set_override(name, key, Some(rules));
            Ok(Reply::Json(describe(plan, limit)))
        }
        (&Method::DELETE, [name, "overrides", key]) => {
            find(name)?;
            match plan.limits.set_override(name, key, None) {
                true => Ok(Reply::Nothing),
                false => Err(Problem::not_found(format!(
                    "no override of \"{key}\" was set at run time"
                ))),
            }
        }
        (_, [_, "overrides", _]) => Err(Problem::method("PUT, DELETE")),
        _ => Err(Problem::not_found(
            "known here: /v1/limits, /v1/limits/NAME and /v1/limits/NAME/overrides/KEY",
        )),
    }
}

fn one_key(plan: &Plan, limit: &Limit, method: &Method, parts: Vec<String>) -> Answer {
    if parts.len() != limit.by.len() {
        let detail = format!(
            "the key has {} parts: give each as key=PART, in their order",
            limit.by.len()
        );
        return Err(Problem::bad(detail));
    }
    let set = plan.limits.overrides();
    let name = parts.join(":");
    let place = (limit.name.clone(), name);
    let rules = set
        .get(&place)
        .or_else(|| limit.overrides.get(&place.1))
        .unwrap_or(&limit.rules);
    let Some(rules) = rules else {
        return Ok(Reply::Json(
            json!({ "limit": limit.name, "key": parts, "unlimited": true }),
        ));
    };
    let (now, mut windows, mut known) = (clock::moment(), Vec::new(), false);
    let keys = plan.limits.keys_of(&limit.name);
    for (index, rule) in rules.iter().enumerate() {
        let mut key = keys.of_rule(index, rule);
        parts.iter().for_each(|part| key.part(part.as_bytes()));
        let key = key.finish();
        if *method == Method::DELETE {
            known |= plan.limits.reset(key);
        } else {
            let verdict = plan.limits.peek(key, rule, now);
            let reset = verdict.reset.as_secs_f64();
            windows.push(json!({ "rule": text(rule), "remaining": verdict.remaining, "reset_seconds": reset }));
        }
    }
    match (method, known) {
        (&Method::DELETE, true) => Ok(Reply::Nothing),
        (&Method::DELETE, false) => Err(Problem::not_found("nothing is counted for this key")),
        _ => Ok(Reply::Json(
            json!({ "limit": limit.name, "key": parts, "windows": windows }),
        )),
    }
}

fn describe(plan: &Plan, limit: &Limit) -> Value {
    let by: Vec<_> = limit.by.iter().map(ToString::to_string).collect();
    let set = plan.limits.overrides();
    let set = set
        .iter()
        .filter(|((name, _), _)| *name == limit.name)
        .map(|((_, key), rules)| (key, rules));
    let overrides = limit
        .overrides
        .iter()
        .chain(set)
        .map(|(key, rules)| (key.clone(), texts(rules)));
    json!({
        "name": limit.name,
        "windows": texts(&limit.rules),
        "by": by,
        "mode": limit.mode,
        "overrides": overrides.collect::<serde_json::Map<_, _>>(),
    })
}

fn texts(rules: &Override) -> Value {
    match rules {
        None => json!("unlimited"),
        Some(rules) => rules.iter().map(text).collect(),
    }
}

fn text(rule: &Rule) -> Value {
    let spelled = rule.to_string();
    match rule {
        Rule::TokenBucket { burst, .. } => {
            json!({ "algorithm": "token_bucket", "limit": spelled, "burst": burst })
        }
        Rule::SlidingWindow { .. } => json!({ "algorithm": "sliding_window", "limit": spelled }),
        Rule::FixedWindow { .. } => json!({ "algorithm": "fixed_window", "limit": spelled }),
        Rule::Concurrency { limit } => json!({ "algorithm": "concurrency", "limit": limit }),
    }
}
