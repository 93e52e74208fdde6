//! A process among those that share limits, as far as its decisions go: a plan and connections on one thread, without a
//! listener.

use std::borrow::Cow;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use weir::background;
use weir::background::supervise::Supervisor;
use weir::net::tls::Secured;
use weir::plan::{Plan, Process, SharedAsk};
use weir::policy::lease::Batch;
use weir::store::fleet::{Fleet, FleetConnections};
use weir::store::limits::leases::Decision;
use weir::store::limits::slots::Taken;

use super::{DEADLINE, metrics, parse};

/// What a node has of a process: a plan, and connections.
pub struct Node {
    pub plan: Arc<Plan>,
    pub redis: FleetConnections,
    /// Its tasks end with it.
    _supervisor: Supervisor,
}

impl Node {
    /// On the runtime of this thread, with every Redis server connected.
    pub async fn start(file: &str) -> Node {
        let config = parse(file);
        let metrics = Arc::default();
        let fleet = Fleet::new(config.redis.as_ref().unwrap(), &metrics).unwrap();
        let process = Process {
            metrics,
            fleet: Some(fleet.clone()),
            ..Process::default()
        };
        let plan = Plan::first(config, Secured::default(), process);
        let redis = fleet.join();
        let mut supervisor = Supervisor::new(Handle::current(), plan.metrics.clone());
        let following = watch::Sender::new(plan.clone()).subscribe();
        background::tend_shared_state(&mut supervisor, &following, &redis);
        assert!(redis.ready(DEADLINE).await);
        Node {
            plan,
            redis,
            _supervisor: supervisor,
        }
    }

    /// One request of cost 1 to the first limit, for a key of these parts, and what its client is told; `now` is when it came.
    pub async fn ask(&self, parts: &[Cow<'_, [u8]>], now: Duration) -> Decision {
        let rules = self.plan.config.limits[0].rules.as_ref().unwrap();
        let ask = self.plan.shared_ask(0, parts, rules, 1).unwrap();
        let shared = self.plan.shared_limits.as_ref().unwrap();
        let redis = &self.redis.rate_limit;
        match ask {
            SharedAsk::Tokens(ask) => {
                let decided = match shared.leases.decide(redis, &ask, now) {
                    Some(decided) => decided,
                    None => shared.leases.ask(redis, &ask).await,
                };
                black_box(decided).decision
            }
            SharedAsk::Slots(ask) => decided(shared.slots.take(redis, &ask).await),
        }
    }

    /// Calls of Redis so far, signs of life among them.
    pub fn calls(&self) -> u64 {
        metrics::sum(&self.plan.metrics.text(), "weir_redis_calls_total") as u64
    }

    /// Takes slots of the first limit, which is of concurrency.
    pub async fn take_slot(&self, key: &str, cost: u64) -> Decision {
        let parts = [Cow::Borrowed(key.as_bytes())];
        let rules = self.plan.config.limits[0].rules.as_ref().unwrap();
        let Some(SharedAsk::Slots(ask)) = self.plan.shared_ask(0, &parts, rules, cost) else {
            panic!("no concurrency limit")
        };
        let slots = &self.plan.shared_limits.as_ref().unwrap().slots;
        decided(slots.take(&self.redis.rate_limit, &ask).await)
    }

    pub fn release_slot(&self, key: &str) {
        let parts = [Cow::Borrowed(key.as_bytes())];
        let rules = self.plan.config.limits[0].rules.as_ref().unwrap();
        let Some(SharedAsk::Slots(ask)) = self.plan.shared_ask(0, &parts, rules, 1) else {
            panic!("no concurrency limit")
        };
        let slots = &self.plan.shared_limits.as_ref().unwrap().slots;
        slots.release(ask.key, 1);
    }

    /// Keys of which slots are held in this process.
    pub fn keys_of_slots(&self) -> usize {
        let shared = self.plan.shared_limits.as_ref().unwrap();
        shared.slots.held_keys()
    }
}

fn decided(taken: Result<Taken<'_>, Decision>) -> Decision {
    match taken {
        Ok(taken) => {
            taken.keep();
            Decision::Admitted(Batch::default())
        }
        Err(decision) => decision,
    }
}
