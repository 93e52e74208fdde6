//! One lane's view of the plan, and how it follows a reload. `plan` is what all lanes share, a `view` is one lane's.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use tokio::sync::watch;

use crate::plan::{self, Plan, by_name};
use crate::upstream::LaneUpstream;

/// One lane's view of the plan: with its own connections.
#[derive(Debug)]
pub(super) struct LaneView {
    pub plan: Arc<Plan>,
    /// One for each upstream of the configuration, in its order.
    pub upstreams: Vec<Rc<LaneUpstream>>,
}

/// The plan that a lane follows.
#[derive(Debug)]
pub(super) struct Following {
    source: RefCell<watch::Receiver<Arc<Plan>>>,
    current: RefCell<Rc<LaneView>>,
    /// Those of plans before, which requests and idle clients still have.
    left: RefCell<Vec<Weak<LaneUpstream>>>,
}

impl Following {
    pub(super) fn new(mut source: watch::Receiver<Arc<Plan>>) -> Following {
        let plan = source.borrow_and_update().clone();
        let new = |it: &plan::Upstream| LaneUpstream::new(it.live.clone(), None);
        let upstreams = plan.upstreams.iter().map(new).collect();
        Following {
            source: RefCell::new(source),
            current: RefCell::new(Rc::new(LaneView { plan, upstreams })),
            left: RefCell::default(),
        }
    }

    /// The newest plan. The connections of an upstream whose settings allow it are carried over.
    pub(super) fn current(&self) -> Rc<LaneView> {
        if self.source.borrow().has_changed().unwrap_or(false) {
            self.catch_up();
        }
        self.current.borrow().clone()
    }

    /// Closes the connections to upstreams that no request has used for long, or will ever use.
    pub(super) fn close_idle(&self) {
        for upstream in &self.current().upstreams {
            upstream.close_idle();
        }
        self.left.borrow_mut().retain(|left| {
            let left = left.upgrade();
            left.inspect(|upstream| upstream.close_left()).is_some()
        });
    }

    fn catch_up(&self) {
        let plan = self.source.borrow_mut().borrow_and_update().clone();
        let before = self.current.borrow().clone();
        if Arc::ptr_eq(&plan, &before.plan) {
            return;
        }
        let mut old = by_name(&before.upstreams, name_of);
        let upstream = |(index, plan::Upstream { live, .. }): (usize, &plan::Upstream)| {
            let old = old(index, &live.settings.name);
            match old.filter(|old| Arc::ptr_eq(&old.shared, live)) {
                Some(old) => old.clone(),
                None => LaneUpstream::new(live.clone(), old.map(|old| &**old)),
            }
        };
        let all = plan.upstreams.iter().enumerate();
        let upstreams: Vec<_> = all.map(upstream).collect();
        let mut new = by_name(&upstreams, name_of);
        let all = before.upstreams.iter().enumerate();
        let left = all.filter(move |(index, old)| {
            let new = new(*index, name_of(old));
            new.is_none_or(|new| !Rc::ptr_eq(new, old))
        });
        let left = left.map(|(_, old)| Rc::downgrade(old));
        self.left.borrow_mut().extend(left);
        *self.current.borrow_mut() = Rc::new(LaneView { plan, upstreams });
    }
}

fn name_of(upstream: &Rc<LaneUpstream>) -> &str {
    &upstream.shared.settings.name
}
