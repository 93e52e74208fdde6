//! A configuration made live: what all lanes and the admin port share. A reload makes a new plan; requests in flight end
//! with the one that they began with.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crate::audit::Recorder;
use crate::config::limits::{Accuracy, Limit, Mode, Rule};
use crate::config::{self, Config, Listener, Route};
use crate::event::Redaction;
use crate::intern::intern;
use crate::net::tls::server::ServerTls;
use crate::net::tls::{Secured, Trouble};
use crate::policy::lease::Terms;
use crate::policy::routes::Index;
use crate::policy::session;
use crate::store::breakers::LiveBreaker;
use crate::store::fleet::Fleet;
use crate::store::limits::leases::{self, Leases, Sharing};
use crate::store::limits::slots::{self, Slots};
use crate::store::limits::{Key, LimitKeys, Limits, room_for_keys};
use crate::store::sessions::{LiveSessions, Sessions, SharedSessions, Store};
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::breaker_metrics::BreakerMetrics;
use crate::telemetry::metrics::{LimitMetrics, Metrics, RouteMetrics};
use crate::telemetry::tls_metrics::HandshakeMetrics;
use crate::telemetry::traces::Traces;
use crate::upstream::Endpoints;
use tokio::sync::Semaphore;

/// What all lanes share.
#[derive(Debug)]
pub struct Plan {
    pub config: Config,
    /// Finds a route of the configuration.
    pub index: Index,
    /// Carried over by a reload, so that what was used stays used.
    pub limits: Arc<Limits>,
    /// What is shared with other processes; `None` where each has its own state. Carried over by a reload.
    pub fleet: Option<Arc<Fleet>>,
    /// What the keys of each limit of the configuration begin with, in its order.
    pub limit_keys: Vec<LimitKeys>,
    /// What this process holds of shared limits, where there is a fleet. Carried over by a reload.
    pub shared_limits: Option<SharedLimits>,
    /// One for each limit of the configuration, in its order.
    pub sharing: Vec<Sharing>,
    /// One for each entry of the configuration, in its order. Carried over by a reload, by name.
    pub sessions: Vec<LiveSessions>,
    /// Request fields that clients must not send, as [`crate::http1::hygiene::folded`]: weir alone says who asks.
    pub identity_fields: Vec<Vec<u8>>,
    /// The endpoints of each upstream of the configuration, in its order. Carried over by a reload, by name.
    pub upstreams: Vec<Arc<Endpoints>>,
    /// One for each upstream that has one, in the configuration's order.
    pub breakers: Vec<Option<Arc<LiveBreaker>>>,
    /// One for each upstream of the configuration, in its order.
    pub breaker_metrics: Vec<BreakerMetrics>,
    pub metrics: Arc<Metrics>,
    /// Where the audit's events go; `None` without one.
    pub audit: Option<Recorder>,
    /// Carried over by a reload.
    pub access_log: Arc<AccessLog>,
    /// Where spans go; carried over by a reload that leaves the collector.
    pub traces: Option<Arc<Traces>>,
    /// What is hidden of a request, whoever tells of it.
    pub redaction: Redaction,
    /// What the audit says, in the configuration's order.
    pub names: Names,
    /// Connections open on each listener, in the configuration's order. Carried over by a reload.
    pub open: Vec<Arc<AtomicUsize>>,
    /// One for each listener of the configuration, in its order; `None` without TLS.
    pub greetings: Vec<Option<Greeting>>,
    /// The TLS of the configuration, from its files.
    pub secured: Secured,
    /// One for each route of the configuration, in its order.
    pub routes: Vec<RouteMetrics>,
    /// [`Route::key`] of each route of the configuration, in its order.
    pub route_keys: Vec<String>,
    /// One for each limit of the configuration, in its order.
    pub limit_metrics: Vec<LimitMetrics>,
}

/// What a listener greets its clients by.
#[derive(Debug)]
pub struct Greeting {
    pub tls: Arc<ServerTls>,
    pub metrics: HandshakeMetrics,
    /// One for each handshake that may be under way, in all lanes together. Carried over by a reload that leaves their number.
    pub turns: Arc<Semaphore>,
}

/// What this process holds of shared limits.
#[derive(Debug, Clone)]
pub struct SharedLimits {
    pub leases: Arc<Leases>,
    /// Of concurrency limits.
    pub slots: Arc<Slots>,
}

/// What is asked of a shared limit.
pub enum SharedAsk<'a> {
    Tokens(leases::Ask<'a>),
    /// Of a concurrency limit.
    Slots(slots::Ask<'a>),
}

impl SharedAsk<'_> {
    /// For a request that has waited for Redis so long already: its patience is less by that.
    pub fn after(mut self, waited: Duration) -> Self {
        let patience = match &mut self {
            SharedAsk::Tokens(ask) => &mut ask.terms.patience,
            SharedAsk::Slots(ask) => &mut ask.patience,
        };
        *patience = patience.saturating_sub(waited);
        self
    }
}

/// The configuration's names as events carry them.
#[derive(Debug)]
pub struct Names {
    pub routes: Vec<&'static str>,
    pub upstreams: Vec<&'static str>,
    pub limits: Vec<LimitNames>,
}

/// What a limit says, with its name.
#[derive(Debug)]
pub struct LimitNames {
    pub admitted: &'static str,
    pub refused: &'static str,
    pub shadow_refused: &'static str,
    /// The name alone, as a JSON string.
    pub json: &'static str,
}

impl Names {
    fn new(config: &Config) -> Names {
        let upstreams = || config.upstreams.iter();
        let limit = |limit: &Limit| {
            let said = |verdict: &str| intern(&[&limit.name, ": ", verdict].concat());
            LimitNames {
                admitted: said("admitted"),
                refused: said("refused"),
                shadow_refused: said("shadow_refused"),
                json: intern(&serde_json::Value::from(limit.name.as_str()).to_string()),
            }
        };
        Names {
            routes: config
                .routes
                .iter()
                .map(|route| intern(&route.label()))
                .collect(),
            upstreams: upstreams().map(|upstream| intern(&upstream.name)).collect(),
            limits: config.limits.iter().map(limit).collect(),
        }
    }
}

/// What a plan has from the one before.
struct Kept<'k> {
    limits: Arc<Limits>,
    metrics: Arc<Metrics>,
    audit: Option<Recorder>,
    access_log: Arc<AccessLog>,
    traces: Option<Arc<Traces>>,
    fleet: Option<Arc<Fleet>>,
    shared_limits: Option<SharedLimits>,
    upstreams: &'k [Arc<Endpoints>],
    breakers: &'k [Option<Arc<LiveBreaker>>],
    sessions: &'k [LiveSessions],
    open: Vec<Arc<AtomicUsize>>,
    /// One for each listener, with how many there are.
    turns: Vec<(usize, Arc<Semaphore>)>,
}

impl Plan {
    /// As [`Plan::secured`], of a configuration without TLS.
    pub fn new(
        config: Config,
        metrics: Arc<Metrics>,
        audit: Option<Recorder>,
        fleet: Option<Arc<Fleet>>,
    ) -> Arc<Plan> {
        Plan::secured(config, Secured::default(), None, metrics, audit, fleet)
    }

    /// The plan of `config` with what its files hold, and nothing counted yet. `memory`: bytes that the process may use; `None`: any.
    pub fn secured(
        config: Config,
        secured: Secured,
        memory: Option<u64>,
        metrics: Arc<Metrics>,
        audit: Option<Recorder>,
        fleet: Option<Arc<Fleet>>,
    ) -> Arc<Plan> {
        let max_keys = config.limit_defaults.max_keys;
        let max_keys = max_keys.unwrap_or_else(|| room_for_keys(memory, fleet.is_some()));
        let limits = Arc::new(Limits::new(max_keys, secret()));
        let shared_limits = fleet.as_ref().map(|fleet| SharedLimits {
            leases: Arc::new(Leases::new(max_keys, fleet.keys.clone())),
            slots: Arc::new(Slots::new(max_keys, fleet.clone())),
        });
        let access_log = Arc::new(AccessLog::new(metrics.access_log.clone()));
        let kept = Kept {
            limits,
            metrics,
            audit,
            access_log,
            traces: None,
            fleet,
            shared_limits,
            upstreams: &[],
            breakers: &[],
            sessions: &[],
            open: config.listeners.iter().map(|_| Arc::default()).collect(),
            turns: Vec::new(),
        };
        Plan::made(config, secured, kept)
    }

    fn made(config: Config, secured: Secured, kept: Kept<'_>) -> Arc<Plan> {
        let Kept {
            limits,
            metrics,
            audit,
            access_log,
            traces: old_traces,
            fleet,
            shared_limits,
            upstreams: old_upstreams,
            breakers: old,
            sessions: old_sessions,
            open,
            turns,
        } = kept;
        let old = old.iter().flatten();
        let old: BTreeMap<_, _> = old.map(|old| (&*old.upstream, old)).collect();
        let endpoints = |(index, upstream): (usize, &config::Upstream)| {
            let tls = secured.upstreams.get(index).cloned().flatten();
            let old = old_upstreams
                .iter()
                .find(|old| old.settings.name == upstream.name);
            match old.filter(|old| old.serves(upstream, tls.as_ref())) {
                Some(old) => old.clone(),
                None => {
                    let metrics = metrics.upstream(&upstream.name);
                    Endpoints::new(upstream.clone(), tls, old.map(|old| &**old), metrics)
                }
            }
        };
        let upstreams = config.upstreams.iter().enumerate().map(endpoints).collect();
        let breaker = |upstream: &config::Upstream| {
            let settings = upstream
                .circuit_breaker
                .clone()
                .filter(|breaker| breaker.mode != Mode::Disabled)?;
            let kept = old
                .get(&*upstream.name)
                .copied()
                .filter(|old| old.settings == settings);
            let new = || {
                let old = old.get(&*upstream.name).map(|old| &***old);
                let keys = fleet.as_ref().map(|fleet| &fleet.keys);
                LiveBreaker::in_place_of(old, upstream.name.clone(), settings, keys)
            };
            Some(kept.cloned().unwrap_or_else(|| Arc::new(new())))
        };
        let breakers = config.upstreams.iter().map(breaker).collect();
        let sessions = |entry: &config::sessions::Sessions| {
            let kept = old_sessions.iter().find(|old| old.name == entry.name);
            let new = || match &fleet {
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
                store: kept.map_or_else(new, |old| old.store.clone()),
                watchers: kept.map(|old| old.watchers.clone()).unwrap_or_default(),
                metrics: metrics.sessions(&entry.name),
            };
            live.resize(entry.max_sessions);
            live
        };
        let sessions = config.sessions.iter().map(sessions).collect();
        let identity_fields =
            session::identity_fields(config.sessions.iter().map(|entry| &entry.settings));
        let breaker_metrics = config
            .upstreams
            .iter()
            .map(|upstream| metrics.breakers.of(&upstream.name))
            .collect();
        // A route makes some 22 series; what is over the bound is counted together.
        let labelled = (config.max_series / 22).max(1);
        let mut labels = BTreeSet::new();
        let mut route = |route: &Route| {
            let mut label = route.label();
            if !labels.contains(&label) && labels.len() >= labelled {
                label = "other".to_owned();
            }
            labels.insert(label.clone());
            // A route that weir answers has none.
            let upstream = route.upstream().map(|index| &*config.upstreams[index].name);
            metrics.route(&label, upstream.unwrap_or_default())
        };
        let routes = config.routes.iter().map(&mut route).collect();
        let limit_metrics = config
            .limits
            .iter()
            .map(|limit| metrics.limit(&limit.name))
            .collect();
        let sharing = |limit: &Limit| Sharing::new(&limit.name);
        let sharing = config.limits.iter().map(sharing).collect();
        let greeting = |(index, listener): (usize, &Listener)| {
            let tls = secured.listeners.get(index)?.clone()?;
            let (max, kept) = (listener.max_handshakes, turns.get(index));
            let turns = match kept.filter(|(old, _)| *old == max) {
                Some((_, turns)) => turns.clone(),
                None => Arc::new(Semaphore::new(max)),
            };
            let reasons = Trouble::ALL.map(Trouble::name);
            let metrics = metrics.tls.listener(&listener.name, &reasons);
            Some(Greeting {
                tls,
                metrics,
                turns,
            })
        };
        let greetings: Vec<_> = config.listeners.iter().enumerate().map(greeting).collect();
        metrics.tls.certificates.end(secured.expiries());
        secured.take_effect();
        let limit_keys = config
            .limits
            .iter()
            .map(|limit| limits.keys_of(&limit.name))
            .collect();
        if config.access_log.is_some() {
            access_log.start();
        }
        let traces = |otlp: &String| {
            let kept = old_traces.filter(|old| old.otlp == *otlp);
            kept.unwrap_or_else(|| Traces::start(otlp, metrics.traces.clone()))
        };
        let collector = config.traces.as_ref();
        let traces = collector
            .and_then(|collector| collector.otlp.as_ref())
            .map(traces);
        let audit_hides = config.audit.as_ref().map(|audit| audit.redaction.clone());
        let redaction = audit_hides.unwrap_or_default();
        Arc::new(Plan {
            limit_keys,
            index: Index::new(config.routes.iter().map(|route| &route.matches)),
            limits,
            fleet,
            shared_limits,
            sharing,
            sessions,
            identity_fields,
            upstreams,
            breakers,
            breaker_metrics,
            routes,
            route_keys: config.routes.iter().map(Route::key).collect(),
            limit_metrics,
            names: Names::new(&config),
            audit,
            access_log,
            traces,
            redaction,
            open,
            greetings,
            secured,
            metrics,
            config,
        })
    }

    /// What is asked of a shared limit, by its index, for a key of these parts; `None` where nothing is shared.
    ///
    /// # Panics
    /// Without a rule.
    pub fn shared_ask<'a>(
        &'a self,
        limit_index: usize,
        parts: &'a [Cow<'a, [u8]>],
        rules: &'a [Rule],
        cost: u64,
    ) -> Option<SharedAsk<'a>> {
        let fleet = self.fleet.as_ref()?;
        let Limit {
            name,
            accuracy,
            hold_ttl,
            ..
        } = &self.config.limits[limit_index];
        let key = self.shared_key(limit_index, parts, rules);
        if let Rule::Concurrency { limit: slots } = rules[0] {
            return Some(SharedAsk::Slots(slots::Ask {
                key,
                limit: name,
                parts,
                slots,
                cost,
                hold_ttl: *hold_ttl,
                patience: fleet.rate_limit.timeout,
            }));
        }
        let lease = self.config.limit_defaults.lease;
        Some(SharedAsk::Tokens(leases::Ask {
            key,
            limit: name,
            parts,
            rules,
            cost,
            terms: Terms {
                ttl: lease.ttl,
                share: lease.max_share,
                strict: *accuracy == Accuracy::Strict,
                patience: fleet.rate_limit.timeout,
            },
        }))
    }

    /// All rules of a limit lie together.
    fn shared_key(&self, limit_index: usize, parts: &[Cow<'_, [u8]>], rules: &[Rule]) -> Key {
        let mut key = self.limit_keys[limit_index].of_rule(0, &rules[0]);
        parts.iter().for_each(|part| key.part(part));
        key.finish()
    }

    /// Whether processes have the limit in common.
    pub fn shares(&self, limit: &Limit) -> bool {
        self.fleet.is_some() && limit.accuracy != Accuracy::Local
    }

    /// Brings `weir_limit_alone` up to what is so `now`, by [`crate::clock::mono`].
    pub fn tell_sharing(&self, now: Duration) {
        let limits = self.sharing.iter();
        let limits = limits.map(|sharing| (sharing.limit(), sharing.is_alone(now)));
        self.metrics.limits_alone(limits);
    }

    /// Those of each listener; of one without TLS, none of a number that is never asked for.
    fn turns(&self) -> Vec<(usize, Arc<Semaphore>)> {
        let listeners = self.config.listeners.iter().zip(&self.greetings);
        let turns = listeners.map(|(listener, greeting)| match greeting {
            Some(greeting) => (listener.max_handshakes, greeting.turns.clone()),
            None => (0, Arc::new(Semaphore::new(0))),
        });
        turns.collect()
    }

    /// As [`Plan::replaced_by_secured`], of a configuration without TLS.
    pub fn replaced_by(&self, config: Config) -> Result<Arc<Plan>, String> {
        self.replaced_by_secured(config, Secured::default())
    }

    /// The plan of `config` with what its files hold in place of `self`, or why a running process cannot take it.
    pub fn replaced_by_secured(
        &self,
        config: Config,
        secured: Secured,
    ) -> Result<Arc<Plan>, String> {
        let addresses = |config: &Config| {
            config
                .listeners
                .iter()
                .map(|listener| (listener.address.clone(), listener.socket_mode))
                .collect::<Vec<_>>()
        };
        if addresses(&config) != addresses(&self.config) {
            return Err(
                "listeners' addresses or socket_mode changed: restart weir to listen otherwise"
                    .to_owned(),
            );
        }
        let asked = |config: &Config| (config.admin.address, config.metrics_address);
        if asked(&config) != asked(&self.config) {
            return Err(
                "the address of admin or metrics changed: restart weir to listen elsewhere"
                    .to_owned(),
            );
        }
        if config.lanes != self.config.lanes {
            return Err("runtime.lanes changed: restart weir to run more or fewer".to_owned());
        }
        if config.log != self.config.log {
            return Err("telemetry.log changed: restart weir to log otherwise".to_owned());
        }
        if config.limit_defaults.max_keys != self.config.limit_defaults.max_keys {
            return Err(
                "rate_limit_defaults.max_keys changed: restart weir to hold more or fewer"
                    .to_owned(),
            );
        }
        if config.redis != self.config.redis {
            return Err("redis changed: restart weir to share state elsewhere".to_owned());
        }
        if config.postgres != self.config.postgres {
            return Err("postgres changed: restart weir to store elsewhere".to_owned());
        }
        if config.worker != self.config.worker {
            return Err("worker changed: restart weir to work otherwise".to_owned());
        }
        let store = |config: &Config| {
            let audit = config.audit.clone()?;
            let way = (audit.delivery, audit.stream, audit.spool);
            Some((way, audit.sqlite, audit.retention, audit.key))
        };
        if store(&config) != store(&self.config) {
            return Err(
                "audit began, ended, or changed its delivery, stream, spool, file, retention or key: restart weir"
                    .to_owned(),
            );
        }
        let kept = Kept {
            limits: self.limits.clone(),
            metrics: self.metrics.clone(),
            audit: self.audit.clone(),
            access_log: self.access_log.clone(),
            traces: self.traces.clone(),
            fleet: self.fleet.clone(),
            shared_limits: self.shared_limits.clone(),
            upstreams: &self.upstreams,
            breakers: &self.breakers,
            sessions: &self.sessions,
            open: self.open.clone(),
            turns: self.turns(),
        };
        Ok(Plan::made(config, secured, kept))
    }
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

    fn read(more: &str) -> Config {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{more}\n");
        check::parse(&text, &|_| None).unwrap()
    }

    #[test]
    fn keys_are_held_as_the_file_says_or_memory_has_room() {
        let check = |more: &str, memory: Option<u64>, expected: usize| {
            let (config, metrics) = (read(more), Arc::default());
            let plan = Plan::secured(config, Secured::default(), memory, metrics, None, None);
            assert_eq!(plan.limits.max_keys, expected, "{more} {memory:?}");
        };
        check("", None, 1_000_000);
        check("", Some(40_000), 100);
        check("rate_limit_defaults: {max_keys: auto}", Some(40_000), 100);
        check("rate_limit_defaults: {max_keys: 7}", Some(40_000), 7);
        check("rate_limit_defaults: {max_keys: 2000000}", None, 2_000_000);
    }

    /// What is said when `new` is to come in place of `old`.
    fn said(old: &str, new: &str) -> Option<String> {
        let plan = Plan::new(read(old), Arc::default(), None, None);
        plan.replaced_by(read(new)).err()
    }

    #[test]
    fn a_running_process_does_not_change_its_redis() {
        let check = |old: &str, new: &str, refused: bool| {
            let expected = "redis changed: restart weir to share state elsewhere";
            let said = said(old, new);
            assert_eq!(said.as_deref(), refused.then_some(expected), "{old} {new}");
        };
        let one = "redis: {urls: redis://a}";
        check("", one, true);
        check(one, "", true);
        check(one, "redis: {urls: redis://b}", true);
        check(one, "redis: {urls: redis://a, password: b}", true);
        check(
            one,
            "redis: {urls: ['redis://a:6379'], timeout: 20ms}",
            false,
        );
    }

    #[test]
    fn a_running_process_does_not_change_how_it_audits() {
        let beside = "redis: {urls: redis://a}\naudit: {}\n";
        let postgres = |url: &str| format!("{beside}postgres: {{write: '{url}'}}");
        for (old, new, expected) in [
            (beside, &*postgres("host=a"), "postgres changed"),
            (
                &*postgres("host=a"),
                &*postgres("host=b"),
                "postgres changed",
            ),
            ("", "worker: {group: a}", "worker changed"),
            ("audit: {}", "", "audit began, ended"),
            ("audit: {}", "audit: {delivery: guaranteed}", "its delivery"),
            ("audit: {}", "audit: {stream: {shards: 2}}", "stream"),
            ("audit: {}", "audit: {spool: {max: 1GiB}}", "spool"),
        ] {
            let said = said(old, new).unwrap();
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(said("audit: {}", "audit: {level: none}"), None);
        assert_eq!(said(&postgres("host=a"), &postgres("host=a")), None);
    }
}
