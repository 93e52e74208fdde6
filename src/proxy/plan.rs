//! A configuration made live. A reload makes a new plan; requests in flight end with the one that they began with.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::watch;

use crate::config::limits::Mode;
use crate::config::{Config, Route, Upstream};
use crate::store::breakers::LiveBreaker;
use crate::store::limits::Limits;
use crate::telemetry::metrics::{BreakerMetrics, LimitMetrics, Metrics, RouteMetrics};
use crate::upstream::Pool;

/// Connections to one upstream that a lane keeps between requests.
const MAX_IDLE: usize = 1024;

/// What all lanes share.
#[derive(Debug)]
pub struct Plan {
    pub config: Config,
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
        let breaker = |upstream: &Upstream| {
            let settings = upstream
                .circuit_breaker
                .clone()
                .filter(|breaker| breaker.mode != Mode::Disabled)?;
            let kept = old
                .iter()
                .find(|old| old.upstream == upstream.name && old.settings == settings);
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
        let route =
            |route: &Route| metrics.route(&route.label(), &config.upstreams[route.upstream].name);
        let routes = config.routes.iter().map(route).collect();
        let limit_metrics = config
            .limits
            .iter()
            .map(|limit| metrics.limit(&limit.name))
            .collect();
        Arc::new(Plan {
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

/// One lane's view of the plan: with its own connections.
#[derive(Debug)]
pub(super) struct LanePlan {
    pub shared: Arc<Plan>,
    /// One for each upstream of the configuration, in its order.
    pub pools: Vec<Rc<Pool>>,
}

/// The plan that a lane follows.
#[derive(Debug)]
pub(super) struct Following {
    source: watch::Receiver<Arc<Plan>>,
    current: RefCell<Rc<LanePlan>>,
}

impl Following {
    pub(super) fn new(mut source: watch::Receiver<Arc<Plan>>) -> Following {
        let shared = source.borrow_and_update().clone();
        let pools = shared.config.upstreams.iter().map(pool).collect();
        Following {
            source,
            current: RefCell::new(Rc::new(LanePlan { shared, pools })),
        }
    }

    /// The newest plan. The pool of an upstream that did not change is carried over.
    pub(super) fn current(&self) -> Rc<LanePlan> {
        if self.source.has_changed().unwrap_or(false) {
            self.follow();
        }
        self.current.borrow().clone()
    }

    fn follow(&self) {
        let mut source = self.source.clone();
        let shared = source.borrow_and_update().clone();
        let before = self.current.borrow().clone();
        if Arc::ptr_eq(&shared, &before.shared) {
            return;
        }
        let kept = |upstream: &Upstream| {
            let same = |old: &&Upstream| {
                old.endpoint == upstream.endpoint && old.connect_timeout == upstream.connect_timeout
            };
            let index = before
                .shared
                .config
                .upstreams
                .iter()
                .position(|old| same(&old))?;
            Some(before.pools[index].clone())
        };
        let pools = shared
            .config
            .upstreams
            .iter()
            .map(|up| kept(up).unwrap_or_else(|| pool(up)))
            .collect();
        *self.current.borrow_mut() = Rc::new(LanePlan { shared, pools });
    }
}

fn pool(upstream: &Upstream) -> Rc<Pool> {
    Rc::new(Pool::new(
        upstream.endpoint.clone(),
        upstream.connect_timeout,
        MAX_IDLE,
    ))
}
