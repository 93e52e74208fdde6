//! A plan made of a configuration, of what its files hold, and of the plan before. Each function makes one of its parts: a new one, or
//! the old one where that still serves.

use std::sync::Arc;

use serde_json::Value;
use tokio::sync::Semaphore;

use super::{
    Greeting, Limit, Listener, Plan, Process, Route, SharedLimits, Upstream, Words, by_name,
};
use crate::audit::Recorder;
use crate::config::limits::{Accuracy, Mode};
use crate::config::sessions::TokenSource;
use crate::config::{self, Config};
use crate::event::Redaction;
use crate::intern::intern;
use crate::net::tls::{Secured, Trouble};
use crate::policy::routes::Index;
use crate::policy::session;
use crate::store::breakers::LiveBreaker;
use crate::store::fleet::Fleet;
use crate::store::limits::leases::{Leases, Sharing};
use crate::store::limits::slots::Slots;
use crate::store::limits::{Limits, room_for_keys};
use crate::store::sessions::{LiveSessions, Sessions, SharedSessions, Store};
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Traces;
use crate::upstream::LiveUpstream;

/// Series that a route makes, or some more.
const SERIES_OF_A_ROUTE: usize = 26;

/// What each plan of a process has from the one before, whatever the configuration says.
pub(super) struct Carried {
    counters: Arc<Limits>,
    shared_limits: Option<SharedLimits>,
    metrics: Arc<Metrics>,
    audit: Option<Recorder>,
    access_log: Arc<AccessLog>,
    fleet: Option<Arc<Fleet>>,
}

impl Carried {
    pub(super) fn new(config: &Config, process: Process) -> Carried {
        let Process {
            memory,
            metrics,
            audit,
            fleet,
        } = process;
        let max_keys = config.limit_defaults.max_keys;
        let max_keys = max_keys.unwrap_or_else(|| room_for_keys(memory, fleet.is_some()));
        Carried {
            counters: Arc::new(Limits::new(max_keys, secret())),
            shared_limits: fleet.as_ref().map(|fleet| SharedLimits {
                leases: Arc::new(Leases::new(max_keys, fleet.keys.clone())),
                slots: Arc::new(Slots::new(max_keys, fleet.clone())),
            }),
            access_log: Arc::new(AccessLog::default()),
            metrics,
            audit,
            fleet,
        }
    }

    pub(super) fn of(plan: &Plan) -> Carried {
        Carried {
            counters: plan.counters.clone(),
            shared_limits: plan.shared_limits.clone(),
            metrics: plan.metrics.clone(),
            audit: plan.audit.clone(),
            access_log: plan.access_log.clone(),
            fleet: plan.fleet.clone(),
        }
    }
}

/// The plan of `config` in place of `old`; `None` where it is the first.
pub(super) fn plan(
    config: Config,
    secured: Secured,
    carried: Carried,
    old: Option<&Plan>,
) -> Arc<Plan> {
    let Carried {
        counters,
        shared_limits,
        metrics,
        audit,
        access_log,
        fleet,
    } = carried;
    metrics
        .tls
        .certificates
        .note_lifetimes(secured.certificates());
    secured.take_effect();
    let identities = config.sessions.iter().map(|entry| &entry.settings);
    Arc::new(Plan {
        index: Index::new(config.routes.iter().map(|route| &route.matches)),
        listeners: listeners(&config, &secured, &metrics, old),
        routes: routes(&config, &metrics),
        limits: limits(&config, &counters, &metrics, old),
        upstreams: upstreams(&config, &secured, fleet.as_ref(), &metrics, old),
        sessions: sessions(&config, fleet.as_ref(), &metrics, old),
        identity_fields: session::identity_fields(identities),
        traces: traces(&config, &metrics, old),
        redaction: redaction(&config),
        counters,
        shared_limits,
        fleet,
        audit,
        access_log,
        secured,
        metrics,
        config,
    })
}

fn upstreams(
    config: &Config,
    secured: &Secured,
    fleet: Option<&Arc<Fleet>>,
    metrics: &Metrics,
    old: Option<&Plan>,
) -> Vec<Upstream> {
    let old = old.map_or(&[][..], |old| &old.upstreams);
    let mut old = by_name(old, |it: &Upstream| it.name);
    let upstream = |(index, upstream): (usize, &config::Upstream)| {
        let tls = secured.upstreams.get(index).cloned().flatten();
        let old = old(index, &upstream.name);
        let live = old.map(|old| &old.live);
        Upstream {
            name: intern(&upstream.name),
            live: match live.filter(|live| live.is_same(upstream, tls.as_ref())) {
                Some(live) => live.clone(),
                None => {
                    let metrics = metrics.upstreams.of(&upstream.name);
                    LiveUpstream::new(upstream.clone(), tls, live.map(|live| &**live), metrics)
                }
            },
            breaker: breaker(upstream, fleet, old.and_then(|old| old.breaker.as_ref())),
            decisions: metrics.breakers.of(&upstream.name),
        }
    };
    config.upstreams.iter().enumerate().map(upstream).collect()
}

fn breaker(
    upstream: &config::Upstream,
    fleet: Option<&Arc<Fleet>>,
    old: Option<&Arc<LiveBreaker>>,
) -> Option<Arc<LiveBreaker>> {
    let settings = upstream.circuit_breaker.clone();
    let settings = settings.filter(|breaker| breaker.mode != Mode::Disabled)?;
    Some(match old.filter(|old| old.settings == settings) {
        Some(old) => old.clone(),
        None => {
            let keys = fleet.map(|fleet| &fleet.keys);
            Arc::new(LiveBreaker::new(upstream.name.clone(), settings, keys))
        }
    })
}

fn limits(config: &Config, counters: &Limits, metrics: &Metrics, old: Option<&Plan>) -> Vec<Limit> {
    let shared = |limit: &config::limits::Limit| limit.accuracy != Accuracy::Local;
    let before = old.map_or(&[][..], |old| &old.config.limits);
    let before: Vec<_> = before
        .iter()
        .zip(old.iter().flat_map(|old| &old.limits))
        .collect();
    let mut before = by_name(&before, |(settings, _)| &*settings.name);
    let limit = |(index, limit): (usize, &config::limits::Limit)| {
        let said = |verdict: &str| intern(&[&limit.name, ": ", verdict].concat());
        let before = before(index, &limit.name).filter(|(old, _)| shared(old) && shared(limit));
        let sharing = before.map(|(_, live)| live.sharing.clone());
        Limit {
            keys: counters.keys_of(&limit.name),
            sharing: sharing.unwrap_or_else(|| Arc::new(Sharing::new(&limit.name))),
            metrics: metrics.limits.of(&limit.name),
            words: Words {
                admitted: said("admitted"),
                refused: said("refused"),
                shadow_refused: said("shadow_refused"),
                missing_key: said("missing_key"),
                redis_lost: said("redis_lost"),
                json: intern(&Value::from(limit.name.as_str()).to_string()),
            },
        }
    };
    config.limits.iter().enumerate().map(limit).collect()
}

fn sessions(
    config: &Config,
    fleet: Option<&Arc<Fleet>>,
    metrics: &Metrics,
    old: Option<&Plan>,
) -> Vec<LiveSessions> {
    let live = |entry: &config::sessions::Sessions| {
        let mut old = old.iter().flat_map(|old| &old.sessions);
        let old = old.find(|old| old.name == entry.name);
        let new = || match fleet {
            None => Store::Memory(Arc::new(Sessions::new(entry.max_sessions))),
            Some(fleet) => {
                let max = entry.shared.cache.max_entries;
                Store::Redis(Arc::new(SharedSessions::new(&entry.name, fleet, max)))
            }
        };
        let live = LiveSessions {
            name: entry.name.clone(),
            settings: entry.settings.clone(),
            shared: entry.shared,
            store: old.map_or_else(new, |old| old.store.clone()),
            watchers: old.map(|old| old.watchers.clone()).unwrap_or_default(),
            metrics: metrics.sessions.of(&entry.name),
        };
        live.take_up(entry.max_sessions);
        live
    };
    config.sessions.iter().map(live).collect()
}

/// What the audit is to hide, and the headers in which sessions' tokens are.
fn redaction(config: &Config) -> Redaction {
    let audit = config.audit.as_ref();
    let mut redaction = audit.map_or_else(Redaction::default, |audit| audit.redaction.clone());
    let entries = config.sessions.iter();
    let sources = entries.flat_map(|entry| &entry.settings.sources);
    let headers = sources.filter_map(|source| match source {
        TokenSource::Header(name) => Some(name),
        TokenSource::Cookie(_) | TokenSource::Bearer => None,
    });
    redaction.add(headers, []);
    redaction
}

/// Routes, each with its upstream, over the bound of series are counted together, as `other`; those of plans before count.
fn routes(config: &Config, metrics: &Metrics) -> Vec<Route> {
    let labelled = (config.max_series / SERIES_OF_A_ROUTE).max(1);
    let live = |route: &config::Route| {
        // A route that weir answers has none.
        let upstream = route.upstream().map(|index| &*config.upstreams[index].name);
        let name = route.label();
        let upstream = upstream.unwrap_or_default();
        Route {
            metrics: metrics.requests.route(&name, upstream, labelled),
            name: intern(&name),
            key: route.key(),
        }
    };
    config.routes.iter().map(live).collect()
}

fn listeners(
    config: &Config,
    secured: &Secured,
    metrics: &Metrics,
    old: Option<&Plan>,
) -> Vec<Listener> {
    let live = |(index, listener): (usize, &config::Listener)| {
        // A running process has the listeners that it began with.
        let old = old.map(|old| (&old.listeners[index], &old.config.listeners[index]));
        let greeting = || {
            let tls = secured.listeners.get(index)?.clone()?;
            let max = listener.max_handshakes;
            let as_before = old.filter(|(_, settings)| settings.max_handshakes == max);
            let before = as_before.and_then(|(old, _)| old.greeting.as_ref());
            let turns = before.map(|greeting| greeting.turns.clone());
            let reasons = Trouble::ALL.map(Trouble::name);
            Some(Greeting {
                tls,
                metrics: metrics.tls.listener(&listener.name, &reasons),
                turns: turns.unwrap_or_else(|| Arc::new(Semaphore::new(max))),
            })
        };
        let greeting = greeting();
        let is_as_before = old.is_none_or(|(old, settings)| {
            let whom = |it: &config::Listener| {
                let tls = it.tls.as_ref().map(|tls| tls.min_version);
                (tls, it.proxy_protocol, it.proxy_protocol_from.clone())
            };
            let tls = old.greeting.as_ref().zip(greeting.as_ref());
            whom(settings) == whom(listener)
                && tls.is_none_or(|(old, new)| new.tls.admits_as(&old.tls))
        });
        Listener {
            admission: old.map_or(0, |(old, _)| old.admission) + u64::from(!is_as_before),
            open: old.map(|(old, _)| old.open.clone()).unwrap_or_default(),
            clients: old.map(|(old, _)| old.clients.clone()).unwrap_or_default(),
            greeting,
        }
    };
    config.listeners.iter().enumerate().map(live).collect()
}

fn traces(config: &Config, metrics: &Metrics, old: Option<&Plan>) -> Option<Arc<Traces>> {
    let otlp = config.traces.as_ref()?.otlp.as_ref()?;
    let old = old.and_then(|old| old.traces.as_ref());
    Some(match old.filter(|old| old.otlp == *otlp) {
        Some(old) => old.clone(),
        None => Traces::start(otlp, metrics.traces.clone()),
    })
}

/// What keys are hashed with: no one outside can seek keys that meet.
fn secret() -> [u8; 16] {
    let mut secret = [0; 16];
    getrandom::fill(&mut secret).expect("the kernel gives random bytes");
    secret
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;

    #[test]
    fn headers_that_have_tokens_are_redacted() {
        let text = "listen: 127.0.0.1:1\nupstream: http://x:1\nsessions: {web: {token: [{bearer: true}, {header: X-Session}]}}\n";
        for audit in ["", "audit: {redact: {headers: [x-pin]}}\n"] {
            let config = check::parse(&format!("{text}{audit}"), &|_| None).unwrap();
            let redaction = redaction(&config);
            assert!(redaction.hides("X-Session") && redaction.hides("authorization"));
            assert_eq!(redaction.hides("x-pin"), !audit.is_empty());
        }
    }

    #[test]
    fn the_bound_of_series_holds_however_many_upstreams_there_are() {
        let mut text =
            "listen: 127.0.0.1:1\nmetrics: {address: 127.0.0.1:2, max_series: 60}\nupstreams:\n"
                .to_owned();
        for n in 0..50 {
            text += &format!("  u{n}: {{endpoints: ['http://x:1']}}\n");
        }
        text += "routes:\n";
        for n in 0..50 {
            text += &format!("  - {{match: {{path: /{n}}}, upstream: u{n}}}\n");
        }
        let config = check::parse(&text, &|_| None).unwrap();
        let metrics = Metrics::default();
        drop(routes(&config, &metrics));
        let text = metrics.text();
        let of_routes = || text.lines().filter(|line| line.contains("route=\""));
        // Two routes, and what all others are together.
        assert_eq!(of_routes().count(), 3 * SERIES_OF_A_ROUTE);
        let other = r#"weir_requests_total{route="other",upstream="other",class="2xx"} 0"#;
        assert!(of_routes().any(|line| line == other), "{text}");
    }

    #[test]
    fn the_bound_of_series_holds_over_reloads() {
        let metrics = Metrics::default();
        for n in 0..10 {
            let text = format!(
                "listen: 127.0.0.1:1\nmetrics: {{address: 127.0.0.1:2, max_series: 60}}\nupstream: http://x:1\n\
                 routes: [{{match: {{path: /stays}}, upstream: upstream}}, {{match: {{path: /{n}}}, upstream: upstream}}]\n"
            );
            let config = check::parse(&text, &|_| None).unwrap();
            drop(routes(&config, &metrics));
        }
        let text = metrics.text();
        let of_routes = text.lines().filter(|line| line.contains("route=\""));
        assert_eq!(of_routes.count(), 3 * SERIES_OF_A_ROUTE);
        assert!(text.contains(r#"route="/stays""#) && text.contains(r#"route="/0""#));
    }

    #[test]
    fn a_route_makes_as_many_series_as_it_is_counted_for() {
        let metrics = Metrics::default();
        drop(metrics.requests.route("/a", "app", 1));
        let text = metrics.text();
        let of_route = text.lines().filter(|line| line.contains(r#"route="/a""#));
        assert_eq!(of_route.count(), SERIES_OF_A_ROUTE);
    }
}
