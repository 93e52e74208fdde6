//! One lane's view of the plan, and how it follows a reload.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::watch;

use crate::config::Upstream;
use crate::plan::Plan;
use crate::upstream::Pool;

/// Connections to one upstream that a lane keeps between requests.
const MAX_IDLE: usize = 1024;

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
                old.endpoint == upstream.endpoint
                    && old.connect_timeout == upstream.connect_timeout
                    && old.idle_timeout == upstream.idle_timeout
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
        upstream.idle_timeout,
        MAX_IDLE,
    ))
}
