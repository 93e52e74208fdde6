//! Rate limits, from the file as written to [`Limit`]s.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use super::unused::Kind;
use super::values::{field_name, share};
use super::{Checker, SECOND};
use crate::config::LimitDefaults;
use crate::config::limit_keys::override_keys;
use crate::config::limits::{
    Accuracy, Cost, KeyPart, Lease, Limit, MAX_RULES, Mode, OnLoss, Period, Rule, Rules, Window,
    Windows,
};
use crate::config::raw::{self, Algorithm};
use crate::config::units::{Percent, TimeLength};
use crate::config::yaml::{At, OneOrMany, Position, told};

/// The name of the limit that the short form makes.
const SHORT_LIMIT: &str = "rate_limit";
/// [`Limit::near_limit`], unless told.
const NEAR_LIMIT: f64 = 0.8;
/// [`Limit::hold_ttl`], unless told.
const HOLD_TTL: Duration = Duration::from_secs(60);

/// `100/s`, before the algorithm gives it its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rate {
    count: u64,
    period: Period,
}

impl Checker {
    pub(super) fn limits(
        &mut self,
        short: Option<At<String>>,
        long: BTreeMap<String, At<raw::RateLimit>>,
        on_loss: OnLoss,
    ) -> (Vec<Limit>, Vec<usize>) {
        let mut limits = Vec::new();
        let accuracy = self.shared(Accuracy::Lease);
        let on_every_route = short
            .into_iter()
            .filter_map(|at| self.read(at, short_form))
            .map(|limit| Limit {
                accuracy,
                on_redis_loss: on_loss,
                ..limit
            });
        limits.extend(on_every_route);
        let count = limits.len();
        for (name, at) in long {
            if name == SHORT_LIMIT && count > 0 {
                let message = "\"rate_limit\" is the name of the limit that the key rate_limit makes: the two would share their counters; take another name";
                self.say_of_file(&at.place, message);
            }
            if let Some(raw) = at.value {
                let limit = self.limit(name, raw, on_loss);
                limits.push(limit);
            }
        }
        let indexed = limits.iter().enumerate();
        self.of_session = indexed
            .filter(|(_, limit)| limit.needs_session())
            .map(|(index, limit)| (index, limit.name.clone()))
            .collect();
        self.most_rules = limits.iter().map(Limit::most_rules).collect();
        self.limits = limits
            .iter()
            .enumerate()
            .map(|(index, limit)| (limit.name.clone(), index))
            .collect();
        (limits, (0..count).collect())
    }

    fn limit(&mut self, name: String, raw: raw::RateLimit, on_loss: OnLoss) -> Limit {
        let algorithm = told(raw.algorithm).unwrap_or(Algorithm::TokenBucket);
        let accuracy = self.accuracy(raw.accuracy, algorithm);
        let hold_ttl = self.hold_ttl(raw.hold_ttl, algorithm);
        let (burst, burst_at) = raw.burst.and_then(At::told).unzip();
        let texts = raw.limit.value.map(OneOrMany::list);
        let rules = texts.and_then(|texts| self.rules(&raw.limit.place, texts, algorithm, burst));
        if let (Some(place), true) = (&burst_at, algorithm != Algorithm::TokenBucket) {
            let message = "only token_bucket has a burst, so that this one does nothing: leave it out, or use that algorithm";
            self.warn(place, message);
        }
        if let Some(place) = &burst_at
            && algorithm == Algorithm::TokenBucket
            && rules.as_ref().is_some_and(|rules| rules.count() > 1)
        {
            let message = "one burst for several windows would be the most that each admits at once: put them into two limits, or leave it out for the number of each";
            self.say(place, message);
        }
        let admits = |rule| matches!(rule, Rule::Window(Window::Bucket { count: 1.., .. }));
        if let (Some(0), Some(place)) = (burst, &burst_at)
            && rules.iter().flat_map(Rules::iter).any(admits)
        {
            let message = "a bucket of nothing admits nothing: use 1 or more, or leave it out for the limit's number; to refuse all, use \"limit: 0/s\"";
            self.say(place, message);
        }
        let before = self.mistakes.len();
        let by = self.key_parts(raw.by);
        // Whether a key fits `by` is known where that is right.
        let by_is_right = self.mistakes.len() == before;
        let overrides = raw.overrides;
        let overrides = match by_is_right {
            true => self.overrides(overrides, &by, algorithm, rules.as_ref()),
            false => BTreeMap::new(),
        };
        let cost = match told(raw.cost) {
            None => Cost::Constant(1),
            Some(raw::Cost {
                header: None,
                default,
            }) => Cost::Constant(self.count_within(default, 1, 1..=u64::MAX)),
            Some(raw::Cost {
                header: Some(header),
                default,
            }) => {
                let name = self.read(header, field_name);
                Cost::Header {
                    name: name.unwrap_or_default().to_ascii_lowercase(),
                    default: told(default).unwrap_or(1),
                }
            }
        };
        let deny_missing = matches!(told(raw.if_missing), Some(raw::IfMissing::Deny));
        Limit {
            label: Limit::label(&name),
            name,
            algorithm,
            accuracy,
            on_redis_loss: told(raw.on_redis_loss).unwrap_or(on_loss),
            hold_ttl,
            rules,
            by,
            mode: told(raw.mode).unwrap_or_default(),
            deny_missing,
            overrides,
            cost,
            near_limit: share(raw.near_limit, NEAR_LIMIT),
            enforced: share(raw.enforced, 1.0),
        }
    }

    fn overrides(
        &mut self,
        raw: BTreeMap<String, At<String>>,
        by: &[KeyPart],
        algorithm: Algorithm,
        of_limit: Option<&Rules>,
    ) -> BTreeMap<String, Option<Rules>> {
        let mut overrides = BTreeMap::new();
        for (written, at) in raw {
            let place = at.place.clone();
            let rules = self.rules(&place, vec![at], algorithm, None);
            let rules = rules.map(|rules| with_burst(rules, of_limit));
            let keys = match override_keys(by, &written, &self.ipv6_prefixes) {
                Ok(keys) => keys,
                Err(message) => {
                    self.say(&place, message);
                    continue;
                }
            };
            for key in keys {
                let other = overrides.insert(key.clone(), rules.clone());
                if other.is_some_and(|other| other != rules) {
                    let message =
                        format!("another override is for the same clients, {key}: keep one");
                    self.say_of_file(&place, message);
                }
            }
        }
        overrides
    }

    pub(super) fn key_parts(&mut self, by: At<OneOrMany<String>>) -> Vec<KeyPart> {
        let parts = by.value.map(OneOrMany::list).unwrap_or_default();
        self.each(parts, key_part).into_iter().flatten().collect()
    }

    fn accuracy(&mut self, at: Option<At<Accuracy>>, algorithm: Algorithm) -> Accuracy {
        let default = match algorithm {
            Algorithm::Concurrency => Accuracy::Strict,
            Algorithm::TokenBucket | Algorithm::SlidingWindow | Algorithm::FixedWindow => {
                Accuracy::Lease
            }
        };
        let Some(at) = at else {
            return self.shared(default);
        };
        if let (Some(Accuracy::Lease), Algorithm::Concurrency) = (at.value, algorithm) {
            let message = "concurrency has no lease: use strict or local";
            self.say(&at.place, message);
        }
        self.shared(at.value.unwrap_or(default))
    }

    /// What becomes of an accuracy where nothing is shared: the same file serves a laptop.
    fn shared(&self, accuracy: Accuracy) -> Accuracy {
        match self.has_redis {
            true => accuracy,
            false => Accuracy::Local,
        }
    }

    fn hold_ttl(&mut self, at: Option<At<TimeLength>>, algorithm: Algorithm) -> Duration {
        let Some((TimeLength(ttl), place)) = at.and_then(At::told) else {
            return HOLD_TTL;
        };
        if algorithm != Algorithm::Concurrency {
            let message = "hold_ttl is for algorithm concurrency: leave it out";
            self.say(&place, message);
        } else if ttl < SECOND {
            let message = format!(
                "{} is too short: use 1s or more, for example 60s",
                TimeLength(ttl)
            );
            self.say(&place, message);
        }
        ttl
    }

    /// And what limits do while Redis does not answer, unless they say.
    pub(super) fn limit_defaults(&mut self, raw: raw::RateLimitDefaults) -> LimitDefaults {
        let retry_after = told(raw.retry_after).unwrap_or_default();
        let headers =
            told(raw.headers).map(|list| list.into_iter().filter_map(|at| at.value).collect());
        let headers: Vec<_> = headers.unwrap_or_else(|| vec![raw::LimitHeaders::Standard]);
        LimitDefaults {
            max_keys: told(raw.max_keys).and_then(|keys| match keys {
                raw::MaxKeys::Count(keys) => Some(keys as usize),
                raw::MaxKeys::Auto(raw::Auto::Auto) => None,
            }),
            lease: self.lease(told(raw.lease).unwrap_or_default()),
            on_redis_loss: told(raw.on_redis_loss).unwrap_or(OnLoss::Local),
            retry_jitter: share(retry_after.jitter, 0.1),
            standard_headers: headers.contains(&raw::LimitHeaders::Standard),
            legacy_headers: headers.contains(&raw::LimitHeaders::Legacy),
        }
    }

    fn lease(&mut self, raw: raw::Lease) -> Lease {
        let max_share = raw.max_share.and_then(At::told);
        if let Some((Percent(share), place)) = &max_share
            && *share <= 0.0
        {
            let message = "a lease of nothing admits nothing: use more than 0%, for example 10%";
            self.say(place, message);
        }
        Lease {
            ttl: self.time_within(raw.ttl, Duration::from_millis(50), 10 * SECOND),
            max_share: max_share.map_or(0.1, |(Percent(share), _)| share),
        }
    }

    /// `None` for `unlimited`, and where none can be read.
    fn rules(
        &mut self,
        place: &Position,
        texts: Vec<At<String>>,
        algorithm: Algorithm,
        burst: Option<u64>,
    ) -> Option<Rules> {
        if let [
            At {
                value: Some(only), ..
            },
        ] = texts.as_slice()
            && only == "unlimited"
        {
            return None;
        }
        if texts.is_empty() {
            self.say(place, "no window: add one, for example 100/s");
        }
        if algorithm == Algorithm::Concurrency && texts.len() > 1 {
            self.say(place, "concurrency has one number: keep the smallest");
        }
        let mut windows = Vec::new();
        for at in texts {
            let Some(text) = at.value else { continue };
            match rule(&text, algorithm, burst) {
                Ok(Rule::Window(window)) => windows.push(window),
                Ok(Rule::Slots(slots)) => return Some(Rules::Slots(slots)),
                Err(message) => self.say(&at.place.named(&place.path), message),
            }
        }
        let mut windows = windows.into_iter();
        let (first, more) = (windows.next()?, windows.collect());
        Some(Rules::Windows(Windows { first, more }))
    }

    /// The limits that a route names, by index.
    pub(super) fn limits_named(&mut self, names: Vec<At<String>>) -> Vec<usize> {
        let mut found = Vec::new();
        for at in names {
            let Some(name) = at.value else { continue };
            match self.limits.get(&name) {
                Some(limit) if found.contains(limit) => {
                    let message = format!("limit \"{name}\" is named twice: keep one");
                    self.say(&at.place, message);
                }
                Some(limit) => found.push(*limit),
                None => self.say_unknown(Kind::Limit, &at.place, &name),
            }
            let rules: usize = found.iter().map(|index| self.most_rules[*index]).sum();
            if rules > MAX_RULES {
                let message = format!(
                    "the route's limits have {rules} windows together: {MAX_RULES} at most"
                );
                self.say(&at.place, message);
            }
        }
        found
    }
}

/// The rules of an override that is set at run time, for example `500/s`, or `None` for `unlimited`.
pub fn override_rules(limit: &Limit, text: &str) -> Result<Option<Rules>, String> {
    match text {
        "unlimited" => Ok(None),
        text => rule(text, limit.algorithm, None)
            .map(|rule| Some(with_burst(rule.into(), limit.rules.as_ref()))),
    }
}

/// The one rule of an override, with the limit's burst where that is more than its number: as much of it as the override has of the
/// limit's rate, so that one which slows a client down does not let it begin with the burst of others.
fn with_burst(mut rules: Rules, of_limit: Option<&Rules>) -> Rules {
    let of_limit = of_limit.and_then(Rules::only_window);
    if let Some(Window::Bucket {
        count: of_count,
        per: of_per,
        burst: of_burst,
    }) = of_limit
        && of_burst > of_count
        && let Rules::Windows(Windows {
            first: Window::Bucket { count, per, burst },
            ..
        }) = &mut rules
    {
        let rate = |count: u64, per: Duration| count as f64 / per.as_secs_f64();
        let part = (rate(*count, *per) / rate(*of_count, *of_per)).min(1.0);
        *burst = (*burst).max((*of_burst as f64 * part).round() as u64);
    }
    rules
}

/// `100/s by client.ip`, not shared yet.
fn short_form(text: &str) -> Result<Limit, String> {
    let (rate, parts) = match text.split_once(" by ") {
        // Without a key all clients would share it.
        Some((_, "")) => {
            return Err(format!(
                "\"{text}\" says no key: write one, for example client.ip"
            ));
        }
        told => told.unwrap_or((text, "")),
    };
    let parts = parts
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    Ok(Limit {
        name: SHORT_LIMIT.to_owned(),
        label: SHORT_LIMIT.to_owned(),
        rules: Some(rule(rate.trim(), Algorithm::TokenBucket, None)?.into()),
        by: parts
            .map(key_part)
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect(),
        algorithm: Algorithm::TokenBucket,
        accuracy: Accuracy::Local,
        on_redis_loss: OnLoss::Local,
        hold_ttl: HOLD_TTL,
        mode: Mode::Enforce,
        deny_missing: false,
        overrides: BTreeMap::new(),
        cost: Cost::Constant(1),
        near_limit: NEAR_LIMIT,
        enforced: 1.0,
    })
}

fn rule(text: &str, algorithm: Algorithm, burst: Option<u64>) -> Result<Rule, String> {
    let window = match algorithm {
        Algorithm::Concurrency => {
            let limit = text.parse().map_err(|_| {
                format!("\"{text}\" is not a number: concurrency counts requests, as in 10")
            });
            return limit.map(Rule::Slots);
        }
        Algorithm::FixedWindow => {
            let Rate { count, period } = text.parse()?;
            let limit = count;
            Window::Fixed { limit, period }
        }
        Algorithm::SlidingWindow => {
            let (limit, window) = of_a_length(text)?;
            Window::Sliding { limit, window }
        }
        Algorithm::TokenBucket => {
            let (count, per) = of_a_length(text)?;
            let burst = burst.unwrap_or(count);
            Window::Bucket { count, per, burst }
        }
    };
    Ok(Rule::Window(window))
}

/// A rate by a time that is always as long.
fn of_a_length(text: &str) -> Result<(u64, Duration), String> {
    let Rate { count, period } = text.parse()?;
    let Period::Fixed(per) = period else {
        return Err(format!(
            "\"{text}\" is a calendar window: use algorithm fixed_window, or a duration such as 1d"
        ));
    };
    Ok((count, per))
}

impl FromStr for Rate {
    type Err = String;

    /// `100/s`, `10/30s`, `5/m`, `1000/day`.
    fn from_str(text: &str) -> Result<Rate, String> {
        let bad = || {
            format!(
                "\"{text}\" is not a rate: use a whole number, a slash and, right behind it, a time (ms, s, m, h, d, day, week, month or year), for example 100/s or 10/30s"
            )
        };
        let (count, period) = text.split_once('/').ok_or_else(bad)?;
        let period = match period {
            "day" => Period::Day,
            "week" => Period::Week,
            "month" => Period::Month,
            "year" => Period::Year,
            span => {
                let one = if span.starts_with(|c: char| c.is_ascii_digit()) {
                    ""
                } else {
                    "1"
                };
                let TimeLength(length) = format!("{one}{span}").parse().map_err(|_| bad())?;
                if length == Duration::ZERO {
                    return Err(bad());
                }
                Period::Fixed(length)
            }
        };
        Ok(Rate {
            count: count.trim().parse().map_err(|_| bad())?,
            period,
        })
    }
}

/// `None` for `constant`, which adds nothing to a key.
fn key_part(text: &str) -> Result<Option<KeyPart>, String> {
    let named = |prefix: &str| {
        text.strip_prefix(prefix)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
    };
    Ok(Some(match text {
        "client.ip" => KeyPart::ClientIp,
        "client.cert.subject" => KeyPart::ClientCertSubject,
        "client.cert.san" => KeyPart::ClientCertSan,
        "path" => KeyPart::Path,
        "host" => KeyPart::Host,
        "method" => KeyPart::Method,
        "route" => KeyPart::Route,
        "upstream" => KeyPart::Upstream,
        "session.user" => KeyPart::SessionUser,
        "constant" => return Ok(None),
        _ => {
            let header = named("header:").map(|name| field_name(&name)).transpose()?;
            let header = header.map(|name| KeyPart::Header(name.to_ascii_lowercase()));
            let part = header.or_else(|| named("cookie:").map(KeyPart::Cookie));
            let part = part.or_else(|| named("query:").map(KeyPart::Query));
            part.or_else(|| named("session.claims.").map(KeyPart::SessionClaim)).ok_or_else(|| {
                let known = "client.ip client.cert.subject client.cert.san header:NAME cookie:NAME query:NAME path host method route upstream session.user session.claims.NAME constant";
                format!("unknown key \"{text}\"; known here: {known}")
            })?
        }
    }))
}

#[cfg(test)]
mod tests;
