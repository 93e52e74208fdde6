//! A plan made of a configuration, of what its files hold, and of the plan before. Each function makes one of its parts: a new one, or
//! the old one where that still serves.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{Greeting, Names, Plan, Process, SharedLimits};
use crate::audit::Recorder;
use crate::config::limits::Mode;
use crate::config::sessions::TokenSource;
use crate::config::{self, Config, Listener, Route};
use crate::event::Redaction;
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
use crate::telemetry::metrics::requests::RouteMetrics;
use crate::telemetry::traces::Traces;
use crate::upstream::LiveUpstream;

/// Series that a route makes, or some more.
const SERIES_OF_A_ROUTE: usize = 26;

/// What each plan of a process has from the one before, whatever the configuration says.
pub(super) struct Carried {
    limits: Arc<Limits>,
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
            limits: Arc::new(Limits::new(max_keys, secret())),
            shared_limits: fleet.as_ref().map(|fleet| SharedLimits {
                leases: Arc::new(Leases::new(max_keys, fleet.keys.clone())),
                slots: Arc::new(Slots::new(max_keys, fleet.clone())),
            }),
            access_log: Arc::new(AccessLog::new(metrics.access_log.clone())),
            metrics,
            audit,
            fleet,
        }
    }

    pub(super) fn of(plan: &Plan) -> Carried {
        Carried {
            limits: plan.limits.clone(),
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
        limits,
        shared_limits,
        metrics,
        audit,
        access_log,
        fleet,
    } = carried;
    if config.access_log.is_some() {
        access_log.start();
    }
    metrics
        .tls
        .certificates
        .note_lifetimes(secured.certificates());
    secured.take_effect();
    // Those of a fleet are read from Redis.
    if fleet.is_none() {
        limits.reread_overrides(&config.limits);
    }
    let of_limits = || config.limits.iter();
    let of_upstreams = || config.upstreams.iter();
    let identities = config.sessions.iter().map(|entry| &entry.settings);
    Arc::new(Plan {
        index: Index::new(config.routes.iter().map(|route| &route.matches)),
        limit_keys: of_limits().map(|it| limits.keys_of(&it.name)).collect(),
        sharing: of_limits().map(|it| Sharing::new(&it.name)).collect(),
        limit_metrics: of_limits().map(|it| metrics.limits.of(&it.name)).collect(),
        sessions: sessions(&config, fleet.as_ref(), &metrics, old),
        identity_fields: session::identity_fields(identities),
        upstreams: upstreams(&config, &secured, &metrics, old),
        breakers: breakers(&config, fleet.as_ref(), old),
        breaker_metrics: of_upstreams()
            .map(|it| metrics.breakers.of(&it.name))
            .collect(),
        routes: route_metrics(&config, &metrics),
        route_keys: config.routes.iter().map(Route::key).collect(),
        names: Names::new(&config),
        traces: traces(&config, &metrics, old),
        redaction: redaction(&config),
        // A running process has the listeners that it began with.
        open: match old {
            Some(old) => old.open.clone(),
            None => config.listeners.iter().map(|_| Arc::default()).collect(),
        },
        greetings: greetings(&config, &secured, &metrics, old),
        limits,
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
    metrics: &Metrics,
    old: Option<&Plan>,
) -> Vec<Arc<LiveUpstream>> {
    let live = |(index, upstream): (usize, &config::Upstream)| {
        let tls = secured.upstreams.get(index).cloned().flatten();
        let mut old = old.iter().flat_map(|old| &old.upstreams);
        let old = old.find(|old| old.settings.name == upstream.name);
        match old.filter(|old| old.serves(upstream, tls.as_ref())) {
            Some(old) => old.clone(),
            None => {
                let metrics = metrics.upstreams.of(&upstream.name);
                LiveUpstream::new(upstream.clone(), tls, old.map(|old| &**old), metrics)
            }
        }
    };
    config.upstreams.iter().enumerate().map(live).collect()
}

fn breakers(
    config: &Config,
    fleet: Option<&Arc<Fleet>>,
    old: Option<&Plan>,
) -> Vec<Option<Arc<LiveBreaker>>> {
    let live = |upstream: &config::Upstream| {
        let settings = upstream.circuit_breaker.clone();
        let settings = settings.filter(|breaker| breaker.mode != Mode::Disabled)?;
        let mut old = old.iter().flat_map(|old| old.breakers.iter().flatten());
        let old = old.find(|old| *old.upstream == *upstream.name);
        Some(match old.filter(|old| old.settings == settings) {
            Some(old) => old.clone(),
            None => {
                let (old, keys) = (old.map(|old| &**old), fleet.map(|fleet| &fleet.keys));
                let name = upstream.name.clone();
                Arc::new(LiveBreaker::in_place_of(old, name, settings, keys))
            }
        })
    };
    config.upstreams.iter().map(live).collect()
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
        live.resize(entry.max_sessions);
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
fn route_metrics(config: &Config, metrics: &Metrics) -> Vec<RouteMetrics> {
    let labelled = (config.max_series / SERIES_OF_A_ROUTE).max(1);
    let of_route = |route: &Route| {
        // A route that weir answers has none.
        let upstream = route.upstream().map(|index| &*config.upstreams[index].name);
        let of_requests = &metrics.requests;
        of_requests.route(&route.label(), upstream.unwrap_or_default(), labelled)
    };
    config.routes.iter().map(of_route).collect()
}

fn greetings(
    config: &Config,
    secured: &Secured,
    metrics: &Metrics,
    old: Option<&Plan>,
) -> Vec<Option<Greeting>> {
    let greeting = |(index, listener): (usize, &Listener)| {
        let tls = secured.listeners.get(index)?.clone()?;
        let max = listener.max_handshakes;
        let turns = old.and_then(|old| turns(old, index, max));
        let reasons = Trouble::ALL.map(Trouble::name);
        Some(Greeting {
            tls,
            metrics: metrics.tls.listener(&listener.name, &reasons),
            turns: turns.unwrap_or_else(|| Arc::new(Semaphore::new(max))),
        })
    };
    config.listeners.iter().enumerate().map(greeting).collect()
}

/// Those of a listener's handshakes, where there are as many as before.
fn turns(old: &Plan, listener: usize, max: usize) -> Option<Arc<Semaphore>> {
    let greeting = old.greetings.get(listener)?.as_ref()?;
    let is_as_before = old.config.listeners[listener].max_handshakes == max;
    is_as_before.then(|| greeting.turns.clone())
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
        drop(route_metrics(&config, &metrics));
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
            drop(route_metrics(&config, &metrics));
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
