//! `/v1/limits`: list, show and reset one key, and set overrides.

use std::borrow::Cow;
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use super::{Answer, Problem, Reply, parameters};
use crate::clock;
use crate::config::check::limits::override_rules;
use crate::config::limit_keys::{as_counted, client_key, override_keys};
use crate::config::limits::{KeyPart, Limit, Rule, Rules, Window};
use crate::plan::{Plan, SharedAsk, SharedLimits};
use crate::policy::lease::Batch;
use crate::store::fleet::FleetConnections;
use crate::store::limits::leases::Decision;
use crate::store::limits::overrides::{self, Reset};
use crate::store::limits::{self, Key, Override};

/// - `GET /v1/limits`: all;
/// - `GET` and `DELETE /v1/limits/NAME?key=PART&key=PART`: what one key has left; forget what it used;
/// - `PUT` and `DELETE /v1/limits/NAME/overrides/KEY`: the parts of a key joined by `:`.
pub(super) async fn answer(
    plan: &Plan,
    redis: Option<&FleetConnections>,
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
    let known: &[&str] = match path {
        [_] => &["key"],
        _ => &[],
    };
    let parameters = parameters(query, known)?;
    match (method, path) {
        (&Method::GET, []) => {
            let list: Vec<_> = plan
                .config
                .limits
                .iter()
                .map(|limit| describe(plan, limit))
                .collect();
            Ok(Reply::Json(
                json!({ "limits": list, "keys": plan.held_keys() }),
            ))
        }
        (_, []) => Err(Problem::method("GET, HEAD")),
        (&Method::GET | &Method::DELETE, [name]) => {
            let key = parameters.into_iter().map(|(_, part)| part).collect();
            one_key(plan, redis, find(name)?, method, key).await
        }
        (_, [_]) => Err(Problem::method("GET, HEAD, DELETE")),
        (&Method::PUT, [name, "overrides", key]) => {
            let limit = find(name)?;
            let new = new_override(body).map_err(Problem::bad)?;
            let rules = override_rules(limit, &new).map_err(Problem::bad)?;
            let keys = override_keys(&limit.by, key, &plan.config.ipv6_prefixes());
            let mut set = serde_json::Map::new();
            for key in keys.map_err(Problem::bad)? {
                put(plan, redis, (name, &key), Some(&new)).await?;
                let new = Some((&*new, rules.clone()));
                plan.counters.set_override(name, &key, new);
                set.insert(key, texts(&rules));
            }
            Ok(Reply::Json(json!({ "name": name, "overrides": set })))
        }
        (&Method::DELETE, [name, "overrides", key]) => {
            let limit = find(name)?;
            let keys = override_keys(&limit.by, key, &plan.config.ipv6_prefixes());
            let mut keys = keys.unwrap_or_default();
            // Redis may hold one that another version of weir took, or spelled as it came.
            if keys.iter().all(|written| written != key) {
                keys.push((*key).to_owned());
            }
            let mut known = false;
            for key in keys {
                known |= put(plan, redis, (name, &key), None).await?;
                known |= plan.counters.set_override(name, &key, None);
            }
            match known {
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

/// The limit of a `PUT`'s body: `{"limit": "500/s"}`; a number is taken for its text, as in the file.
fn new_override(body: &[u8]) -> Result<String, String> {
    let bad = |why: String| {
        format!("body must be {{\"limit\": \"500/s\"}} or {{\"limit\": \"unlimited\"}}: {why}")
    };
    let body: Value =
        serde_json::from_slice(body).map_err(|error| bad(format!("it is not JSON, {error}")))?;
    let Value::Object(mut keys) = body else {
        return Err(bad("it is not an object".to_owned()));
    };
    let limit = keys.remove("limit");
    if let Some(unknown) = keys.keys().next() {
        return Err(bad(format!("unknown field `{unknown}`")));
    }
    match limit {
        Some(Value::String(limit)) => Ok(limit),
        Some(Value::Number(limit)) => Ok(limit.to_string()),
        Some(Value::Array(_)) => Err(bad(
            "a list is for a limit; an override is one, as in the file".to_owned(),
        )),
        Some(Value::Null | Value::Bool(_) | Value::Object(_)) => {
            Err(bad("\"limit\" is not a text".to_owned()))
        }
        None => Err(bad("\"limit\" is missing".to_owned())),
    }
}

/// Sets an override at all processes, where there are others; whether there was one before.
async fn put(
    plan: &Plan,
    redis: Option<&FleetConnections>,
    place: (&str, &str),
    says: Option<&str>,
) -> Result<bool, Problem> {
    let (Some(fleet), Some(redis)) = (&plan.fleet, redis) else {
        return Ok(false);
    };
    let put = overrides::put(&redis.rate_limit, fleet, place, says);
    put.await.map_err(|error| Problem::redis(&error))
}

async fn one_key(
    plan: &Plan,
    redis: Option<&FleetConnections>,
    limit: &Limit,
    method: &Method,
    parts: Vec<String>,
) -> Answer {
    if parts.len() != limit.by.len() {
        let detail = format!(
            "the key has {} parts: give each as key=PART, in their order",
            limit.by.len()
        );
        return Err(Problem::bad(detail));
    }
    let parts = counted_parts(plan, limit, parts)?;
    let rules = {
        let set = plan.counters.overrides();
        let rules = limits::rules(limit, &parts, &set);
        rules.cloned()
    };
    let uncounted = || Problem::not_found("nothing is counted for this key");
    let Some(rules) = rules else {
        if *method == Method::DELETE {
            return Err(uncounted());
        }
        return Ok(Reply::Json(
            json!({ "limit": limit.name, "key": parts, "unlimited": true }),
        ));
    };
    if *method == Method::DELETE {
        let here = reset_here(plan, limit, &rules, &parts);
        let known = match redis.filter(|_| plan.shares(limit)) {
            Some(redis) => reset_everywhere(plan, redis, limit, &rules, &parts).await?,
            None => false,
        };
        return match here || known {
            true => Ok(Reply::Nothing),
            false => Err(uncounted()),
        };
    }
    let verdicts = match redis.filter(|_| plan.shares(limit)) {
        Some(redis) => ask_everywhere(plan, redis, limit, &rules, &parts).await?,
        None => ask_here(plan, limit, &rules, &parts),
    };
    let window = |(rule, (remaining, reset)): (Rule, &(u64, Duration))| json!({ "rule": text(rule), "remaining": remaining, "reset_seconds": reset.as_secs_f64() });
    let windows: Vec<_> = rules.iter().zip(&verdicts).map(window).collect();
    Ok(Reply::Json(
        json!({ "limit": limit.name, "key": parts, "windows": windows }),
    ))
}

/// The parts as requests have them, where an IPv6 client is known by its network. Where listeners differ in its bits, it is to be given itself.
fn counted_parts(plan: &Plan, limit: &Limit, parts: Vec<String>) -> Result<Vec<String>, Problem> {
    let prefixes = plan.config.ipv6_prefixes();
    let only = match prefixes.first() {
        Some(only) if prefixes.len() == 1 => Some(*only),
        Some(_) | None => None,
    };
    let part = |(by, part): (&KeyPart, String)| {
        if !matches!(by, KeyPart::ClientIp) {
            return Ok(as_counted(by, part));
        }
        let client = part.parse().map_err(|_| {
            Problem::bad(format!(
                "\"{part}\" is not an address, as client.ip is: give, for example, key=192.0.2.7"
            ))
        })?;
        Ok(only.map_or(part, |prefix| client_key(client, prefix)))
    };
    limit.by.iter().zip(parts).map(part).collect()
}

/// The keys of each rule in this process's memory.
fn keys(plan: &Plan, limit: &Limit, rules: &Rules, parts: &[String]) -> Vec<(Key, Rule)> {
    let begin = plan.counters.keys_of(&limit.name);
    let key = |(number, rule)| {
        let mut key = begin.of_rule((number, rule));
        parts.iter().for_each(|part| key.part(part.as_bytes()));
        (key.finish(), rule)
    };
    rules.numbered().map(key).collect()
}

fn reset_here(plan: &Plan, limit: &Limit, rules: &Rules, parts: &[String]) -> bool {
    let keys = keys(plan, limit, rules, parts).into_iter();
    keys.fold(false, |known, (key, rule)| {
        plan.counters.reset(key, &rule) | known
    })
}

/// What each rule has left, and until it is whole.
fn ask_here(plan: &Plan, limit: &Limit, rules: &Rules, parts: &[String]) -> Vec<(u64, Duration)> {
    let (now, keys) = (clock::moment(), keys(plan, limit, rules, parts));
    let verdicts = keys.into_iter().map(|(key, rule)| {
        let verdict = plan.counters.peek(key, &rule, now);
        (verdict.remaining, verdict.reset)
    });
    verdicts.collect()
}

fn shared<'a>(
    plan: &'a Plan,
    limit: &Limit,
    rules: &'a Rules,
    parts: &'a [Cow<'a, [u8]>],
) -> Option<(&'a SharedLimits, SharedAsk<'a>)> {
    let mut limits = plan.config.limits.iter();
    let index = limits.position(|known| known.name == limit.name)?;
    let ask = plan.shared_ask(index, parts, rules, 0)?;
    Some((plan.shared_limits.as_ref()?, ask))
}

async fn ask_everywhere(
    plan: &Plan,
    redis: &FleetConnections,
    limit: &Limit,
    rules: &Rules,
    parts: &[String],
) -> Result<Vec<(u64, Duration)>, Problem> {
    let parts = bytes(parts);
    match shared(plan, limit, rules, &parts) {
        Some((shared, SharedAsk::Tokens(ask))) => {
            let peeked = shared.leases.peek(&redis.rate_limit, &ask).await;
            let rules = peeked.map_err(|error| Problem::redis(&error))?;
            Ok(rules
                .iter()
                .map(|rule| (rule.remaining, rule.reset))
                .collect())
        }
        Some((shared, SharedAsk::Slots(ask))) => {
            let peeked = shared.slots.peek(&redis.rate_limit, &ask).await;
            peeked.map_err(|error| Problem::redis(&error))?;
            let verdict = shared
                .slots
                .verdict(&ask, Decision::Admitted(Batch::default()));
            Ok(vec![(verdict.remaining, verdict.reset)])
        }
        None => Ok(Vec::new()),
    }
}

async fn reset_everywhere(
    plan: &Plan,
    redis: &FleetConnections,
    limit: &Limit,
    rules: &Rules,
    parts: &[String],
) -> Result<bool, Problem> {
    let redis = &redis.rate_limit;
    let of_parts = bytes(parts);
    let known = match shared(plan, limit, rules, &of_parts) {
        Some((shared, SharedAsk::Tokens(ask))) => shared.leases.reset(redis, &ask).await,
        Some((shared, SharedAsk::Slots(ask))) => shared.slots.reset(redis, &ask).await,
        None => return Ok(false),
    };
    let known = known.map_err(|error| Problem::redis(&error))?;
    if let Some(fleet) = &plan.fleet {
        let reset = Reset {
            limit: limit.name.clone(),
            parts: parts.to_vec(),
        };
        let (channel, reset) = (fleet.keys.limits_channel(), json!(reset).to_string());
        let told = redis.publish(&channel, &reset).await;
        told.map_err(|error| Problem::redis(&error))?;
    }
    Ok(known)
}

fn bytes(parts: &[String]) -> Vec<Cow<'_, [u8]>> {
    let parts = parts.iter().map(|part| Cow::Borrowed(part.as_bytes()));
    parts.collect()
}

fn describe(plan: &Plan, limit: &Limit) -> Value {
    let by: Vec<_> = limit.by.iter().map(ToString::to_string).collect();
    let set = plan.counters.overrides();
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
        "enforced": limit.enforced,
        "overrides": overrides.collect::<serde_json::Map<_, _>>(),
    })
}

fn texts(rules: &Override) -> Value {
    match rules {
        None => json!("unlimited"),
        Some(rules) => rules.iter().map(text).collect(),
    }
}

fn text(rule: Rule) -> Value {
    let spelled = rule.to_string();
    match rule {
        Rule::Window(Window::Bucket { burst, .. }) => {
            json!({ "algorithm": "token_bucket", "limit": spelled, "burst": burst })
        }
        Rule::Window(Window::Sliding { .. }) => {
            json!({ "algorithm": "sliding_window", "limit": spelled })
        }
        Rule::Window(Window::Fixed { .. }) => {
            json!({ "algorithm": "fixed_window", "limit": spelled })
        }
        Rule::Slots(slots) => json!({ "algorithm": "concurrency", "limit": slots }),
    }
}
