//! A configuration made live: what all lanes and the admin port share. A reload makes a new plan; requests in flight end
//! with the one that they began with.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::config::limits::Mode;
use crate::config::{Config, Route, Upstream};
use crate::policy::routes::Index;
use crate::store::breakers::LiveBreaker;
use crate::store::limits::Limits;
use crate::telemetry::metrics::{BreakerMetrics, LimitMetrics, Metrics, RouteMetrics};

/// What all lanes share.
#[derive(Debug)]
pub struct Plan {
    pub config: Config,
    /// Finds a route of the configuration.
    pub index: Index,
    /// Carried over by a reload, so that what was used stays used.
    pub limits: Arc<Limits>,
    /// One for each upstream that has one, in the configuration's order.
    pub breakers: Vec<Option<Arc<LiveBreaker>>>,
    /// One for each upstream of the configuration, in its order.
    pub breaker_metrics: Vec<BreakerMetrics>,
    pub metrics: Arc<Metrics>,
    /// One for each route of the configuration, in its order.
    pub routes: Vec<RouteMetrics>,
    /// One for each limit of the configuration, in its order.
    pub limit_metrics: Vec<LimitMetrics>,
}

impl Plan {
    /// The plan of `config`, with nothing counted yet.
    pub fn new(config: Config, metrics: Arc<Metrics>) -> Arc<Plan> {
        let limits = Arc::new(Limits::new(config.limit_defaults.max_keys, secret()));
        Plan::made(config, metrics, limits, &[])
    }

    fn made(
        config: Config,
        metrics: Arc<Metrics>,
        limits: Arc<Limits>,
        old: &[Arc<LiveBreaker>],
    ) -> Arc<Plan> {
        let old: BTreeMap<_, _> = old.iter().map(|old| (&*old.upstream, old)).collect();
        let breaker = |upstream: &Upstream| {
            let settings = upstream
                .circuit_breaker
                .clone()
                .filter(|breaker| breaker.mode != Mode::Disabled)?;
            let kept = old
                .get(&*upstream.name)
                .copied()
                .filter(|old| old.settings == settings);
            Some(
                kept.cloned()
                    .unwrap_or_else(|| Arc::new(LiveBreaker::new(upstream.name.clone(), settings))),
            )
        };
        let breakers = config.upstreams.iter().map(breaker).collect();
        let breaker_metrics = config
            .upstreams
            .iter()
            .map(|upstream| metrics.breaker(&upstream.name))
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
            metrics.route(&label, &config.upstreams[route.upstream].name)
        };
        let routes = config.routes.iter().map(&mut route).collect();
        let limit_metrics = config
            .limits
            .iter()
            .map(|limit| metrics.limit(&limit.name))
            .collect();
        Arc::new(Plan {
            index: Index::new(config.routes.iter().map(|route| &route.matches)),
            limits,
            breakers,
            breaker_metrics,
            routes,
            limit_metrics,
            metrics,
            config,
        })
    }

    /// The plan of `config` in place of `self`, or why a running process cannot take it.
    pub fn replaced_by(&self, config: Config) -> Result<Arc<Plan>, String> {
        let addresses = |config: &Config| {
            config
                .listeners
                .iter()
                .map(|listener| listener.address)
                .collect::<Vec<_>>()
        };
        if addresses(&config) != addresses(&self.config) {
            return Err(
                "listeners' addresses changed: restart weir to listen elsewhere".to_owned(),
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
        let old: Vec<_> = self.breakers.iter().flatten().cloned().collect();
        Ok(Plan::made(
            config,
            self.metrics.clone(),
            self.limits.clone(),
            &old,
        ))
    }
}

/// What keys are hashed with: no one outside can seek keys that meet.
fn secret() -> [u8; 16] {
    let mut secret = [0; 16];
    getrandom::fill(&mut secret).expect("the kernel gives random bytes");
    secret
}
