//! A configuration made live: what all lanes and the admin port share. A reload makes a new plan; requests in flight end
//! with the one that they began with. Must not read files.
//!
//! [`Plan::first`] makes the one that a process begins with, [`Plan::replaced_by`] each after it, and [`Plan::publish`] puts it in its place.

mod fixed;
mod make;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tracing::warn;

use crate::audit::Recorder;
use crate::config::Config;
use crate::config::limits::{self, Accuracy, Rule, Rules};
use crate::event::Redaction;
use crate::net::clients::Clients;
use crate::net::tls::Secured;
use crate::net::tls::server::ServerTls;
use crate::policy::lease::Terms;
use crate::policy::routes::Index;
use crate::store::breakers::LiveBreaker;
use crate::store::fleet::Fleet;
use crate::store::limits::leases::{self, Leases, Sharing};
use crate::store::limits::slots::{self, Slots};
use crate::store::limits::{Key, LimitKeys, Limits};
use crate::store::sessions::LiveSessions;
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::metrics::breakers::BreakerMetrics;
use crate::telemetry::metrics::limits::LimitMetrics;
use crate::telemetry::metrics::requests::RouteMetrics;
use crate::telemetry::metrics::tls::HandshakeMetrics;
use crate::telemetry::traces::Traces;
use crate::upstream::LiveUpstream;
use make::Carried;

/// How far a process has come with its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    #[default]
    Serving,
    /// Clients are told to leave. Who comes all the same is served.
    Leaving,
    /// No connection is taken any more.
    Draining,
    /// Nothing is waited for any more.
    Over,
}

/// What all lanes share.
#[derive(Debug)]
pub struct Plan {
    pub config: Config,
    /// Finds a route of the configuration.
    pub index: Index,
    /// What limits have counted. Carried over by a reload, so that what was used stays used.
    pub counters: Arc<Limits>,
    /// What is shared with other processes; `None` where each has its own state. Carried over by a reload.
    pub fleet: Option<Arc<Fleet>>,
    /// What this process holds of shared limits, where there is a fleet. Carried over by a reload.
    pub shared_limits: Option<SharedLimits>,
    /// One for each listener of the configuration, in its order.
    pub listeners: Vec<Listener>,
    /// One for each route of the configuration, in its order.
    pub routes: Vec<Route>,
    /// One for each limit of the configuration, in its order.
    pub limits: Vec<Limit>,
    /// One for each upstream of the configuration, in its order.
    pub upstreams: Vec<Upstream>,
    /// One for each entry of the configuration, in its order. Carried over by a reload, by name.
    pub sessions: Vec<LiveSessions>,
    /// Request fields that clients must not send, as [`crate::http1::hygiene::folded`]: weir alone says who asks.
    pub identity_fields: Vec<Vec<u8>>,
    pub metrics: Arc<Metrics>,
    /// Where the audit's events go; `None` without one.
    pub audit: Option<Recorder>,
    /// Carried over by a reload.
    pub access_log: Arc<AccessLog>,
    /// Where spans go; carried over by a reload that leaves the collector.
    pub traces: Option<Arc<Traces>>,
    /// What is hidden of a request, whoever tells of it.
    pub redaction: Redaction,
    /// The TLS of the configuration, from its files.
    pub secured: Secured,
}

/// A listener's live part.
#[derive(Debug)]
pub struct Listener {
    /// Connections that are open on it. Carried over by a reload.
    pub open: Arc<AtomicUsize>,
    /// Likewise, by client. Those that came while there was no such bound are not among them.
    pub clients: Arc<Clients>,
    /// `None` without TLS.
    pub greeting: Option<Greeting>,
    /// Counts the reloads that have changed who is let in: TLS, whose certificates are believed, and the PROXY header.
    pub admission: u64,
}

/// What a listener greets its clients by.
#[derive(Debug)]
pub struct Greeting {
    pub tls: Arc<ServerTls>,
    pub metrics: HandshakeMetrics,
    /// One for each handshake that may be under way, in all lanes together. Carried over by a reload that leaves their number.
    pub turns: Arc<Semaphore>,
}

/// A route's live part.
#[derive(Debug)]
pub struct Route {
    /// [`crate::config::Route::label`], as events carry it.
    pub name: &'static str,
    /// [`crate::config::Route::key`].
    pub key: String,
    pub metrics: RouteMetrics,
}

/// A limit's live part.
#[derive(Debug)]
pub struct Limit {
    /// What its keys begin with.
    pub keys: LimitKeys,
    /// Carried over by a reload, by name, where processes have the limit in common before and after it.
    pub sharing: Arc<Sharing>,
    pub metrics: LimitMetrics,
    pub words: Words,
}

/// What events and refusals say of a limit.
#[derive(Debug)]
pub struct Words {
    pub admitted: &'static str,
    pub refused: &'static str,
    pub shadow_refused: &'static str,
    /// It refuses for want of its key, unasked.
    pub missing_key: &'static str,
    /// It refuses since Redis does not answer.
    pub redis_lost: &'static str,
    /// Its name alone, as a JSON string.
    pub json: &'static str,
}

/// An upstream's live part.
#[derive(Debug)]
pub struct Upstream {
    /// As events carry it.
    pub name: &'static str,
    /// Carried over by a reload, by name.
    pub live: Arc<LiveUpstream>,
    /// Likewise; `None` where it has none, or a disabled one.
    pub breaker: Option<Arc<LiveBreaker>>,
    /// What its breaker has decided.
    pub decisions: BreakerMetrics,
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

/// What a process has besides its configuration. Its plans hand it on, one to the next.
#[derive(Debug, Default)]
pub struct Process {
    /// Bytes that it may use; `None`: any.
    pub memory: Option<u64>,
    pub metrics: Arc<Metrics>,
    /// Where the audit's events go; `None` without one.
    pub audit: Option<Recorder>,
    /// What is shared with other processes; `None` where each has its own state.
    pub fleet: Option<Arc<Fleet>>,
}

impl Plan {
    /// The first plan of a process: of `config` with what its files hold (nothing, where it has no TLS), and nothing counted yet.
    pub fn first(config: Config, secured: Secured, process: Process) -> Arc<Plan> {
        let carried = Carried::new(&config, process);
        make::plan(config, secured, carried, None)
    }

    /// The plan of `config` with what its files hold in place of `self`, or why a running process cannot take it. Secrets that it cannot
    /// take stay as they are. It is to be [published](Plan::publish).
    pub fn replaced_by(&self, mut config: Config, secured: Secured) -> Result<Arc<Plan>, String> {
        let kept = fixed::keep_secrets(&self.config, &mut config);
        fixed::is_kept(&self.config, &config)?;
        for key in kept {
            warn!(
                key,
                "a secret is another, and this process goes on with the one before: restart weir to use it"
            );
        }
        Ok(make::plan(config, secured, Carried::of(self), Some(self)))
    }

    /// Goes on with `self` in place of the plan that `plans` has, of which it was made; that one. The state of breakers and endpoints is
    /// taken over here, and overrides are read anew: much can have become of them since, as while names were looked up.
    pub fn publish(self: Arc<Plan>, plans: &watch::Sender<Arc<Plan>>) -> Arc<Plan> {
        let old = plans.borrow().clone();
        let mut before = by_name(&old.upstreams, |it| it.name);
        for (index, new) in self.upstreams.iter().enumerate() {
            let Some(old) = before(index, new.name) else {
                continue;
            };
            if !Arc::ptr_eq(&old.live, &new.live) {
                new.live.go_on_from(&old.live);
            }
            if let Some((old, new)) = old.breaker.as_ref().zip(new.breaker.as_ref())
                && !Arc::ptr_eq(old, new)
            {
                new.go_on_from(old);
            }
        }
        // Those of a fleet are then read from Redis, too, which may be away.
        if self.config.limits != old.config.limits {
            self.counters.reread_overrides(&self.config.limits);
        }
        plans.send_replace(self)
    }

    /// What is asked of a shared limit, by its index, for a key of these parts; `None` where nothing is shared.
    pub fn shared_ask<'a>(
        &'a self,
        limit_index: usize,
        parts: &'a [Cow<'a, [u8]>],
        rules: &'a Rules,
        cost: u64,
    ) -> Option<SharedAsk<'a>> {
        let fleet = self.fleet.as_ref()?;
        let limits::Limit {
            name,
            accuracy,
            hold_ttl,
            ..
        } = &self.config.limits[limit_index];
        let windows = match rules {
            Rules::Windows(windows) => windows,
            Rules::Slots(slots) => {
                return Some(SharedAsk::Slots(slots::Ask {
                    key: self.shared_key(limit_index, parts, Rule::Slots(*slots)),
                    limit: name,
                    parts,
                    slots: *slots,
                    cost,
                    hold_ttl: *hold_ttl,
                    patience: fleet.rate_limit.timeout,
                }));
            }
        };
        let lease = self.config.limit_defaults.lease;
        Some(SharedAsk::Tokens(leases::Ask {
            key: self.shared_key(limit_index, parts, Rule::Window(windows.first)),
            limit: name,
            parts,
            windows,
            cost,
            terms: Terms {
                ttl: lease.ttl,
                share: lease.max_share,
                strict: *accuracy == Accuracy::Strict,
                patience: fleet.rate_limit.timeout,
            },
        }))
    }

    /// All rules of a limit lie together, by the first of them.
    fn shared_key(&self, limit_index: usize, parts: &[Cow<'_, [u8]>], first: Rule) -> Key {
        let mut key = self.limits[limit_index].keys.of_rule((0, first));
        parts.iter().for_each(|part| key.part(part));
        key.finish()
    }

    pub fn live_upstreams(&self) -> impl Iterator<Item = &Arc<LiveUpstream>> {
        self.upstreams.iter().map(|it| &it.live)
    }

    /// The breakers of those upstreams that have one.
    pub fn breakers(&self) -> impl Iterator<Item = &Arc<LiveBreaker>> {
        self.upstreams.iter().filter_map(|it| it.breaker.as_ref())
    }

    /// Whether processes have the limit in common.
    pub fn shares(&self, limit: &limits::Limit) -> bool {
        self.fleet.is_some() && limit.accuracy != Accuracy::Local
    }

    /// Keys that limits hold in memory, in the fullest of their tables: each has room for as many.
    pub fn held_keys(&self) -> usize {
        let shared = self.shared_limits.as_ref();
        let shared = shared.map_or(0, |it| it.leases.held_keys().max(it.slots.held_keys()));
        self.counters.held_keys().max(shared)
    }

    /// Brings `weir_limit_alone` up to what is so `now`, by [`crate::clock::mono`].
    pub fn tell_sharing(&self, now: Duration) {
        let sharing = self.limits.iter().map(|limit| &limit.sharing);
        let limits = sharing.map(|it| (it.limit(), it.is_alone(now)));
        self.metrics.limits.note_alone(limits);
    }
}

/// Finds what has a name in a list, as of the plan before: most stand where they stood, and are found at that index. The list may be so long
/// that to look all of it through for each would be felt.
pub fn by_name<'l, T>(
    list: &'l [T],
    name_of: impl Fn(&'l T) -> &'l str,
) -> impl FnMut(usize, &str) -> Option<&'l T> {
    let mut names = None;
    move |index, name| {
        let there = list.get(index).filter(|it| name_of(it) == name);
        there.or_else(|| {
            let named = || list.iter().map(|it| (name_of(it), it)).collect();
            let names: &mut HashMap<_, _> = names.get_or_insert_with(named);
            names.get(name).copied()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::{self, limits::override_rules};

    #[test]
    fn keys_are_held_as_the_file_says_or_memory_has_room() {
        let check = |more: &str, memory: Option<u64>, expected: usize| {
            let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{more}\n");
            let config = check::parse(&text, &|_| None).unwrap();
            let process = Process {
                memory,
                ..Process::default()
            };
            let plan = Plan::first(config, Secured::default(), process);
            assert_eq!(plan.counters.max_keys, expected, "{more} {memory:?}");
        };
        check("", None, 1_000_000);
        check("", Some(40_000), 100);
        check("rate_limit_defaults: {max_keys: auto}", Some(40_000), 100);
        check("rate_limit_defaults: {max_keys: 7}", Some(40_000), 7);
        check("rate_limit_defaults: {max_keys: 2000000}", None, 2_000_000);
    }

    #[test]
    fn what_was_set_at_run_time_follows_its_limit_to_another_kind() {
        let config = |limit: &str| {
            let text = format!(
                "listen: 127.0.0.1:1\nupstream: http://x:1\nrate_limits: {{a: {{{limit}, by: constant}}}}\n"
            );
            check::parse(&text, &|_| None).unwrap()
        };
        let next = |plan: &Arc<Plan>, limit| {
            let new = plan.replaced_by(config(limit), Secured::default()).unwrap();
            new.clone().publish(&watch::Sender::new(plan.clone()));
            new
        };
        let set = |plan: &Plan| {
            let set = plan.counters.overrides();
            set.get(&("a".to_owned(), "k".to_owned())).cloned()
        };
        let (window, says) = ("limit: 9/m, algorithm: fixed_window", "5/m");
        let rules = |plan: &Plan| override_rules(&plan.config.limits[0], says).unwrap();
        let first = Plan::first(config(window), Secured::default(), Process::default());
        let of_window = rules(&first);
        let put = Some((says, of_window.clone()));
        assert!(!first.counters.set_override("a", "k", put));

        let bucket = next(&first, "limit: 9/m, algorithm: token_bucket");
        assert_eq!(set(&bucket), Some(rules(&bucket)));
        assert!(rules(&bucket) != of_window);
        // It says nothing to one that counts requests under way, and may yet to a later one.
        let slots = next(&bucket, "limit: 9, algorithm: concurrency");
        assert_eq!(set(&slots), None);
        let window = next(&slots, window);
        assert_eq!(set(&window), Some(of_window));
        // Taken back while it says nothing.
        let slots = next(&window, "limit: 9, algorithm: concurrency");
        assert!(slots.counters.set_override("a", "k", None));
        let again = next(&slots, "limit: 8/m, algorithm: fixed_window");
        assert_eq!(set(&again), None);
    }

    #[test]
    fn a_reload_forgets_not_that_a_limit_is_not_shared() {
        let config = |limit: &str| {
            let text = format!(
                "listen: 127.0.0.1:1\nupstream: http://x:1\nredis: {{urls: 'redis://h:1'}}\n\
                 rate_limits: {{b: {{limit: 9/m, by: constant}}, a: {{limit: 9/m, by: constant{limit}}}}}\n"
            );
            check::parse(&text, &|_| None).unwrap()
        };
        let first = config("");
        let process = Process {
            fleet: Some(Fleet::new(first.redis.as_ref().unwrap(), &Metrics::default()).unwrap()),
            ..Process::default()
        };
        let mut plan = Plan::first(first, Secured::default(), process);
        let now = Duration::from_secs(100);
        let told = |plan: &Plan| {
            plan.tell_sharing(now);
            let text = plan.metrics.text();
            ["a", "b"].map(|name| text.contains(&format!("weir_limit_alone{{limit=\"{name}\"}} 1")))
        };
        assert_eq!(told(&plan), [false, false]);
        let place = |plan: &Plan| plan.config.limits.iter().position(|it| it.name == "a");
        plan.limits[place(&plan).unwrap()].sharing.lost(now);
        // Of this process alone from now on, it has nothing to be told.
        for (limit, is_alone) in [
            (", burst: 3", true),
            (", accuracy: local", false),
            ("", false),
        ] {
            plan = plan.replaced_by(config(limit), Secured::default()).unwrap();
            assert_eq!(told(&plan), [is_alone, false], "{limit}");
        }
    }

    #[test]
    fn a_lease_takes_what_the_file_says() {
        let text = "listen: 127.0.0.1:1\nupstream: http://x:1\nredis: {urls: ['redis://h:1']}\nrate_limit_defaults: {lease: {ttl: 70ms, max_share: 30%}}\n\
                    rate_limits: {a: {limit: 9/m, by: constant}}\n";
        let config = check::parse(text, &|_| None).unwrap();
        let redis = config.redis.as_ref().unwrap();
        let process = Process {
            fleet: Some(Fleet::new(redis, &Metrics::default()).unwrap()),
            ..Process::default()
        };
        let plan = Plan::first(config, Secured::default(), process);
        let rules = override_rules(&plan.config.limits[0], "9/m");
        let rules = rules.unwrap().unwrap();
        let Some(SharedAsk::Tokens(ask)) = plan.shared_ask(0, &[], &rules, 1) else {
            panic!("it is shared")
        };
        let lease = (ask.terms.ttl, ask.terms.share, ask.terms.strict);
        assert_eq!(lease, (Duration::from_millis(70), 0.3, false));
    }
}
