//! Rate limits, from the file as written to [`Limit`]s.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use super::Checker;
use crate::config::limits::{Cost, KeyPart, Limit, MAX_RULES, Mode, Period, Rule};
use crate::config::raw::{self, Algorithm};
use crate::config::units::Span;
use crate::config::yaml::{self, At};

/// The name of the limit that the short form makes.
const SHORT_LIMIT: &str = "rate_limit";
/// [`Limit::near_limit`], unless told.
const NEAR_LIMIT: f64 = 0.8;

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
    ) -> (Vec<Limit>, Vec<usize>) {
        let mut limits = Vec::new();
        let on_every_route = short
            .into_iter()
            .filter_map(|at| self.read(SHORT_LIMIT, at, short_form))
            .collect::<Vec<_>>();
        let count = on_every_route.len();
        limits.extend(on_every_route);
        for (name, at) in long {
            if let Some(raw) = at.value {
                let limit = self.limit(name, raw);
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

    fn limit(&mut self, name: String, raw: raw::RateLimit) -> Limit {
        let path = format!("rate_limits.{name}");
        let algorithm = raw
            .algorithm
            .and_then(|at| at.value)
            .unwrap_or(Algorithm::TokenBucket);
        let burst = raw.burst.and_then(|at| at.value);
        let rules = self.rules(&format!("{path}.limit"), raw.limit, algorithm, burst);
        let mut overrides = BTreeMap::new();
        for (key, at) in raw.overrides {
            let at = At {
                value: at.value.map(|text| {
                    vec![At {
                        value: Some(text),
                        ..at
                    }]
                }),
                line: at.line,
                column: at.column,
            };
            let rules = self.rules(&format!("{path}.overrides.{key}"), at, algorithm, None);
            overrides.insert(key, rules);
        }
        let parts = At::<Vec<At<String>>>::from(raw.by)
            .value
            .unwrap_or_default();
        let mut by = Vec::new();
        for (index, at) in parts.into_iter().enumerate() {
            by.extend(
                self.read(&format!("{path}.by[{index}]"), at, key_part)
                    .flatten(),
            );
        }
        let mode = super::mode(raw.mode);
        let cost = match raw.cost.and_then(|at| at.value) {
            None => Cost::Constant(1),
            Some(raw::Cost {
                header: None,
                default,
            }) => Cost::Constant(value_or(default, 1)),
            Some(raw::Cost {
                header: Some(header),
                default,
            }) => Cost::Header {
                name: header.value.unwrap_or_default().to_ascii_lowercase(),
                default: value_or(default, 1),
            },
        };
        let deny_missing = matches!(
            raw.if_missing.and_then(|at| at.value),
            Some(raw::IfMissing::Deny)
        );
        Limit {
            label: Limit::label(&name),
            name,
            algorithm,
            rules,
            by,
            mode,
            deny_missing,
            overrides,
            cost,
            near_limit: raw
                .near_limit
                .and_then(|at| at.value)
                .map_or(NEAR_LIMIT, |percent| percent.0),
        }
    }

    /// `None` for `unlimited`.
    fn rules(
        &mut self,
        path: &str,
        at: impl Into<At<Vec<At<String>>>>,
        algorithm: Algorithm,
        burst: Option<u64>,
    ) -> Option<Vec<Rule>> {
        let At {
            value,
            line,
            column,
        } = at.into();
        let texts = value?;
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
            self.say(
                path,
                line,
                column,
                "no window: add one, for example 100/s".to_owned(),
            );
        }
        let rule = |text: &str| rule(text, algorithm, burst);
        Some(
            texts
                .into_iter()
                .filter_map(|at| self.read(path, at, rule))
                .collect(),
        )
    }

    /// The limits that a route names, by index.
    pub(super) fn limits_named(&mut self, path: &str, names: Vec<At<String>>) -> Vec<usize> {
        let mut found = Vec::new();
        for (index, at) in names.into_iter().enumerate() {
            let path = format!("{path}[{index}]");
            let Some(name) = at.value else { continue };
            match self.limits.get(&name) {
                Some(limit) if found.contains(limit) => {
                    self.say(
                        &path,
                        at.line,
                        at.column,
                        format!("limit \"{name}\" is named twice: keep one"),
                    );
                }
                Some(limit) => found.push(*limit),
                None => {
                    let known = self.limits.keys().map(String::as_str).collect::<Vec<_>>();
                    let message = format!(
                        "unknown limit \"{name}\"; {}",
                        yaml::did_you_mean(&name, &known)
                    );
                    self.say(&path, at.line, at.column, message);
                }
            }
            let rules: usize = found.iter().map(|index| self.most_rules[*index]).sum();
            if rules > MAX_RULES {
                let message = format!(
                    "the route's limits have {rules} windows together: {MAX_RULES} at most"
                );
                self.say(&path, at.line, at.column, message);
            }
        }
        found
    }
}

/// The rules of an override that is set at run time, for example `500/s`, or `None` for `unlimited`.
pub fn override_rules(limit: &Limit, text: &str) -> Result<Option<Vec<Rule>>, String> {
    match text {
        "unlimited" => Ok(None),
        text => rule(text, limit.algorithm, None).map(|rule| Some(vec![rule])),
    }
}

/// `100/s by client.ip`.
fn short_form(text: &str) -> Result<Limit, String> {
    let (rate, parts) = text.split_once(" by ").unwrap_or((text, ""));
    let parts = parts
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    Ok(Limit {
        name: SHORT_LIMIT.to_owned(),
        label: SHORT_LIMIT.to_owned(),
        rules: Some(vec![rule(rate.trim(), Algorithm::TokenBucket, None)?]),
        by: parts
            .map(key_part)
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect(),
        algorithm: Algorithm::TokenBucket,
        mode: Mode::Enforce,
        deny_missing: false,
        overrides: BTreeMap::new(),
        cost: Cost::Constant(1),
        near_limit: NEAR_LIMIT,
    })
}

fn rule(text: &str, algorithm: Algorithm, burst: Option<u64>) -> Result<Rule, String> {
    if algorithm == Algorithm::Concurrency {
        let limit = text.parse().map_err(|_| {
            format!("\"{text}\" is not a number: concurrency counts requests, as in 10")
        });
        return limit.map(|limit| Rule::Concurrency { limit });
    }
    let Rate { count, period } = text.parse()?;
    if algorithm == Algorithm::FixedWindow {
        return Ok(Rule::FixedWindow {
            limit: count,
            period,
        });
    }
    let Period::Fixed(per) = period else {
        return Err(format!(
            "\"{text}\" is a calendar window: use algorithm fixed_window, or a duration such as 1d"
        ));
    };
    Ok(match algorithm {
        Algorithm::SlidingWindow => Rule::SlidingWindow {
            limit: count,
            window: per,
        },
        Algorithm::TokenBucket | Algorithm::FixedWindow | Algorithm::Concurrency => {
            Rule::TokenBucket {
                count,
                per,
                burst: burst.unwrap_or(count),
            }
        }
    })
}

impl FromStr for Rate {
    type Err = String;

    /// `100/s`, `10/30s`, `5/m`, `1000/day`.
    fn from_str(text: &str) -> Result<Rate, String> {
        let bad = || {
            format!(
                "\"{text}\" is not a rate: use a number, a slash and a time, for example 100/s or 10/30s"
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
                let Span(length) = format!("{one}{span}").parse().map_err(|_| bad())?;
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
        "path" => KeyPart::Path,
        "host" => KeyPart::Host,
        "method" => KeyPart::Method,
        "route" => KeyPart::Route,
        "upstream" => KeyPart::Upstream,
        "session.user" => KeyPart::SessionUser,
        "constant" => return Ok(None),
        _ => {
            let header = named("header:").map(|name| KeyPart::Header(name.to_ascii_lowercase()));
            let part = header.or_else(|| named("cookie:").map(KeyPart::Cookie));
            let part = part.or_else(|| named("query:").map(KeyPart::Query));
            part.or_else(|| named("session.claims.").map(KeyPart::SessionClaim)).ok_or_else(|| {
                let known = "client.ip header:NAME cookie:NAME query:NAME path host method route upstream session.user session.claims.NAME constant";
                format!("unknown key \"{text}\"; known here: {known}")
            })?
        }
    }))
}

fn value_or(at: Option<At<u64>>, default: u64) -> u64 {
    at.and_then(|at| at.value).unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;
    use crate::config::Config;
    use crate::config::yaml::Mistake;

    const SECOND: Duration = Duration::from_secs(1);

    fn read(limits: &str) -> Result<Config, Vec<String>> {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{limits}");
        parse(&text, &|_| None)
            .map_err(|mistakes| mistakes.iter().map(Mistake::to_string).collect())
    }

    fn rules(limit: &str) -> Option<Vec<Rule>> {
        let config = read(&format!("rate_limits: {{a: {limit}}}\n")).unwrap();
        config.limits[0].rules.clone()
    }

    #[test]
    fn the_short_form_limits_every_route() {
        let config = read("rate_limit: 100/s by client.ip, header:X-Tenant\n").unwrap();
        assert_eq!(
            config.limits[0].rules,
            Some(vec![Rule::TokenBucket {
                count: 100,
                per: SECOND,
                burst: 100
            }])
        );
        assert_eq!(
            config.limits[0].by,
            [KeyPart::ClientIp, KeyPart::Header("x-tenant".to_owned())]
        );
        assert_eq!(config.routes[0].limits, [0]);
    }

    #[test]
    fn every_algorithm_is_read() {
        let bucket = |count, per, burst| Some(vec![Rule::TokenBucket { count, per, burst }]);
        assert_eq!(
            rules("{limit: 10/30s, burst: 7, by: path}"),
            bucket(10, 30 * SECOND, 7)
        );
        assert_eq!(rules("{limit: 0/s, by: constant}"), bucket(0, SECOND, 0));
        assert_eq!(rules("{limit: unlimited, by: []}"), None);
        assert_eq!(
            rules("{limit: [5/m, 20/h], by: [client.ip], algorithm: sliding_window}"),
            Some(vec![
                Rule::SlidingWindow {
                    limit: 5,
                    window: 60 * SECOND
                },
                Rule::SlidingWindow {
                    limit: 20,
                    window: 3600 * SECOND
                }
            ])
        );
        assert_eq!(
            rules("{limit: 1000000/month, by: 'header:x', algorithm: fixed_window}"),
            Some(vec![Rule::FixedWindow {
                limit: 1_000_000,
                period: Period::Month
            }])
        );
        assert_eq!(
            rules("{limit: 10, by: path, algorithm: concurrency}"),
            Some(vec![Rule::Concurrency { limit: 10 }])
        );
    }

    #[test]
    fn a_wrong_limit_says_the_mend() {
        let says = |limits: &str, part: &str| {
            let said = read(limits).unwrap_err().join("\n");
            assert!(said.contains(part), "{said}");
        };
        says(
            "rate_limit: 100\n",
            "line 3, column 13: rate_limit: \"100\" is not a rate",
        );
        says(
            "rate_limits: {a: {limit: 5/month, by: path}}\n",
            "use algorithm fixed_window",
        );
        says(
            "rate_limits: {a: {limit: 5/0s, by: path}}\n",
            "is not a rate",
        );
        says(
            "rate_limits: {a: {limit: 5/s, by: pth}}\n",
            "unknown key \"pth\"; known here: client.ip",
        );
        says(
            "rate_limits: {a: {limit: 5/s, by: path, algorithm: concurrency}}\n",
            "is not a number",
        );
        says(
            "rate_limits: {a: {limit: 5/s, by: path}}\nroutes: [{upstream: upstream, rate_limits: [b]}]\n",
            "did you mean \"a\"?",
        );
        says(
            "rate_limits: {a: {limit: 5/s, by: path}}\nroutes: [{upstream: upstream, rate_limits: [a, a]}]\n",
            "named twice",
        );
    }
}
