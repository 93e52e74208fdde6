//! An upstream as one lane sees it: which endpoint takes a request, and the lane's connections to each. Never leaves the lane.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::task::AbortHandle;
use tracing::warn;

use super::caps::{Caps, Full, RequestPermit};
use super::endpoint::{Endpoint, EndpointOutcome};
use super::live::LiveUpstream;
use super::members::Snapshot;
use super::pool::{Bound, Pool};
use crate::clock;
use crate::config::upstreams::Balancing;
use crate::http1::response::BadResponse;
use crate::policy::balance;

/// Original destinations that a lane keeps idle connections to.
const MAX_ORIGINALS: usize = 1024;

/// One lane's view of an upstream.
#[derive(Debug)]
pub struct LaneUpstream {
    pub shared: Arc<LiveUpstream>,
    /// The lane's requests under way. Written by this lane alone, so that a plain store will do.
    under_way: Arc<AtomicU32>,
    /// Of `round_robin`.
    turn: Cell<usize>,
    view: RefCell<Rc<View>>,
    /// Connections to where those of transparent listeners were to go.
    originals: RefCell<HashMap<SocketAddr, Rc<Pool>>>,
    /// Closes idle connections that other lanes have use for; where they are capped.
    closing: Option<AbortHandle>,
}

/// The endpoints that the lane saw last, and its connections to each.
#[derive(Debug)]
struct View {
    snapshot: Arc<Snapshot>,
    /// One for each endpoint of the snapshot, in its order.
    pools: Vec<Rc<Pool>>,
}

/// Which endpoint a request wants.
#[derive(Debug, Clone, Copy, Default)]
pub struct Aim {
    /// The hash of what endpoints are told apart by, where they are by a key that the request has.
    pub key: Option<u64>,
    /// Where its connection was to go, in place of the endpoints that the file names.
    pub original: Option<SocketAddr>,
}

/// No endpoint may be used: none is known, or none is up.
#[derive(Debug)]
pub struct NoEndpoint;

/// The turn of one request, until it is dropped.
#[derive(Debug)]
pub struct Slot<'c> {
    upstream: &'c LaneUpstream,
    /// Where requests are capped.
    permit: Option<RequestPermit<'c>>,
}

/// An endpoint that takes a request, until it is dropped.
#[derive(Debug)]
pub struct Picked<'c> {
    pub pool: Rc<Pool>,
    upstream: &'c LaneUpstream,
}

impl LaneUpstream {
    /// With what is of use of `old`'s connections. To be called on the lane.
    pub fn new(shared: Arc<LiveUpstream>, old: Option<&LaneUpstream>) -> Rc<LaneUpstream> {
        let under_way = old.map(|old| old.under_way.clone()).unwrap_or_default();
        shared.count_lane(under_way.clone());
        let kept = old.filter(|old| old.shared.connects_as(&shared));
        let kept = kept.map(|old| old.view.borrow().clone());
        let snapshot = shared.snapshot().clone();
        let view = View::new(&shared, snapshot, kept.as_deref());
        if let Some(old) = old {
            old.leave_but(&view);
        }
        Rc::new_cyclic(|upstream: &Weak<LaneUpstream>| LaneUpstream {
            // Lanes that begin with different endpoints do not go round together.
            turn: Cell::new(fastrand::usize(..)),
            view: RefCell::new(Rc::new(view)),
            originals: RefCell::default(),
            closing: shared.caps.clone().map(|caps| {
                let closing = close_on_demand(upstream.clone(), caps);
                tokio::task::spawn_local(closing).abort_handle()
            }),
            under_way,
            shared,
        })
    }

    /// Gives a request its turn, once there is one.
    pub async fn enter(&self) -> Result<Slot<'_>, Full> {
        let mut slot = Slot::new(self);
        if let Some(caps) = &self.shared.caps {
            let within = self.shared.settings.connect_timeout;
            slot.permit = Some(caps.request(within).await?);
        }
        Ok(slot)
    }

    /// The endpoint for a request; one that is not of `tried`, where there is one.
    pub fn pick(&self, aim: Aim, tried: &[Rc<Pool>]) -> Result<Picked<'_>, NoEndpoint> {
        let Aim { key, original } = aim;
        if let Some(original) = original {
            // Apart, since no other request needs it.
            return Ok(self.pick_original(original));
        }
        if self.shared.is_lone {
            return Ok(self.picked(self.view.borrow().pools[0].clone()));
        }
        let view = self.view();
        let snapshot = &view.snapshot;
        let is_tried = |index: usize| {
            let endpoint = &snapshot.endpoints[index];
            tried
                .iter()
                .any(|pool| Arc::ptr_eq(&pool.endpoint, endpoint))
        };
        let mut untried = SmallVec::<[usize; 16]>::new();
        if !tried.is_empty() {
            let usable = snapshot.usable.iter().copied();
            untried.extend(usable.filter(|index| !is_tried(*index)));
        }
        let among = match untried.is_empty() {
            true => snapshot.usable.as_slice(),
            false => untried.as_slice(),
        };
        let index = self.choose(snapshot, among, key).ok_or(NoEndpoint)?;
        Ok(self.picked(view.pools[index].clone()))
    }

    fn picked(&self, pool: Rc<Pool>) -> Picked<'_> {
        if !self.shared.is_lone {
            pool.endpoint.under_way.fetch_add(1, Ordering::Relaxed);
        }
        Picked {
            pool,
            upstream: self,
        }
    }

    /// The endpoint that a bound connection is of; none where it is not to be asked any more, or is of another upstream.
    pub fn pick_bound(&self, aim: Aim, bound: &Bound) -> Option<Picked<'_>> {
        let is_it = |pool: &&Rc<Pool>| bound.is_of(pool);
        let pool = match aim.original {
            Some(original) => {
                let originals = self.originals.borrow();
                originals.get(&original).filter(is_it)?.clone()
            }
            None => {
                let view = self.view();
                let mut pools = view.pools.iter().enumerate();
                let (index, pool) = pools.find(|(_, pool)| is_it(pool))?;
                view.snapshot.usable.binary_search(&index).ok()?;
                pool.clone()
            }
        };
        Some(self.picked(pool))
    }

    /// Closes connections that have been idle for too long, or whose endpoints are gone. Requests do so in passing; without any, none
    /// would be closed.
    pub fn close_idle(&self) {
        for pool in &self.view().pools {
            pool.close_old();
        }
        let mut originals = self.originals.borrow_mut();
        originals.retain(|_, pool| pool.close_old() || Rc::strong_count(pool) > 1);
    }

    /// Closes the idle connections that no other view has taken over, and clients' own. For one whose place another has taken: clients that
    /// wait with their next request have it still.
    pub fn close_left(&self) {
        let view = self.view.borrow();
        let originals = self.originals.borrow();
        let left = view.pools.iter().chain(originals.values());
        for pool in left.filter(|pool| Rc::strong_count(pool) == 1) {
            while pool.close_one() || pool.close_bound() {}
        }
    }

    /// Leaves the connections that `taken` does not have.
    fn leave_but(&self, taken: &View) {
        let is_taken = |pool: &Rc<Pool>| taken.pools.iter().any(|it| Rc::ptr_eq(it, pool));
        let (view, originals) = (self.view.borrow(), self.originals.borrow());
        let left = view.pools.iter().chain(originals.values());
        left.filter(|pool| !is_taken(pool))
            .for_each(|pool| pool.leave());
    }

    /// Closes an idle connection, or else the one of all clients' own that was not used for longest.
    fn make_room(&self) {
        let (view, originals) = (self.view(), self.originals.borrow());
        let pools = || view.pools.iter().chain(originals.values());
        // Their clients would have to say anew who they are.
        if !pools().any(|pool| pool.close_one()) {
            let bound = pools().filter_map(|pool| Some((pool.bound_since()?, pool)));
            if let Some((_, pool)) = bound.min_by_key(|(since, _)| *since) {
                pool.close_bound();
            }
        }
    }

    #[cold]
    fn pick_original(&self, original: SocketAddr) -> Picked<'_> {
        let mut originals = self.originals.borrow_mut();
        if !originals.contains_key(&original) {
            // No one asks again for most: what they leave is not to stay open.
            let full = originals.len() >= MAX_ORIGINALS;
            originals.retain(|_, pool| {
                let is_used = || Rc::strong_count(pool) > 1 || pool.has_bound();
                is_used() || (!full && pool.close_old())
            });
        }
        let pool = originals
            .entry(original)
            .or_insert_with(|| Rc::new(self.shared.original(original)));
        self.picked(pool.clone())
    }

    fn choose(&self, snapshot: &Snapshot, among: &[usize], key: Option<u64>) -> Option<usize> {
        let endpoint = |place: usize| &snapshot.endpoints[among[place]];
        let weight = |place: usize| self.weight(endpoint(place));
        let place = match (&self.shared.settings.load_balancing, key) {
            (Balancing::LeastRequest, _) => {
                let load = |place: usize| endpoint(place).under_way.load(Ordering::Relaxed);
                balance::two_choices(among.len(), weight, load, fastrand::f64)?
            }
            (Balancing::RoundRobin, _) => {
                // Of all, so that turns are the same for a request that may not go everywhere; it passes over the others, and takes
                // no turn: that is for first tries.
                let all = &snapshot.usable;
                let is_first = among.len() == all.len();
                let weight = |place: usize| match among.binary_search(&all[place]) {
                    Ok(place) if is_first => weight(place),
                    Ok(_) => 1.0,
                    Err(_) => 0.0,
                };
                let turn = self.turn.get();
                let (place, next) = balance::round_robin(turn, all.len(), weight, fastrand::f64)?;
                if is_first {
                    self.turn.set(next);
                }
                return Some(all[place]);
            }
            (Balancing::RingHash(_), key) => {
                // A request without a key goes anywhere.
                let key = key.unwrap_or_else(|| fastrand::u64(..));
                // In their order.
                let usable = |index: usize| among.binary_search(&index).is_ok();
                return snapshot.ring.find(key, usable);
            }
        };
        Some(among[place])
    }

    fn weight(&self, endpoint: &Endpoint) -> f64 {
        let Some(slow_start) = &self.shared.settings.slow_start else {
            return 1.0;
        };
        let age = endpoint.age(clock::mono());
        age.map_or(1.0, |age| {
            balance::warmth(age, slow_start.window, slow_start.min_weight)
        })
    }

    /// The newest snapshot; connections to endpoints that stay are kept.
    fn view(&self) -> Rc<View> {
        let snapshot = self.shared.snapshot();
        if Arc::ptr_eq(&snapshot, &self.view.borrow().snapshot) {
            return self.view.borrow().clone();
        }
        let new = View::new(&self.shared, snapshot.clone(), Some(&*self.view.borrow()));
        let new = Rc::new(new);
        self.view.replace(new.clone());
        new
    }
}

impl Drop for LaneUpstream {
    fn drop(&mut self) {
        if let Some(closing) = &self.closing {
            closing.abort();
        }
    }
}

impl View {
    fn new(shared: &LiveUpstream, snapshot: Arc<Snapshot>, old: Option<&View>) -> View {
        let pools = match old {
            Some(old) if old.has_the_endpoints_of(&snapshot) => old.pools.clone(),
            Some(_) | None => {
                let mut kept: std::collections::BTreeMap<_, _> = old
                    .into_iter()
                    .flat_map(|old| &old.pools)
                    .map(|pool| (Arc::as_ptr(&pool.endpoint), pool.clone()))
                    .collect();
                let pool = |endpoint: &Arc<Endpoint>| {
                    let kept = kept.remove(&Arc::as_ptr(endpoint));
                    let new = || shared.pool(endpoint.clone());
                    kept.unwrap_or_else(|| Rc::new(new()))
                };
                let pools = snapshot.endpoints.iter().map(pool).collect();
                // Those of endpoints that are gone.
                kept.values().for_each(|pool| pool.leave());
                pools
            }
        };
        View { snapshot, pools }
    }

    fn has_the_endpoints_of(&self, snapshot: &Snapshot) -> bool {
        let both = self.snapshot.endpoints.iter().zip(&snapshot.endpoints);
        self.snapshot.endpoints.len() == snapshot.endpoints.len()
            && both.into_iter().all(|(one, other)| Arc::ptr_eq(one, other))
    }
}

impl Slot<'_> {
    /// The upstream took so long to answer; how many requests it takes at a time is learnt from that. To be called before
    /// [`Slot::answered`].
    pub fn learn(&self, took: Duration) {
        if let Some(caps) = &self.upstream.shared.caps {
            caps.learn(took);
        }
    }

    /// The head of the response that goes to the client is here. How long the rest takes is not what is learnt, so that a stream that
    /// stays open leaves its place to others.
    pub fn answered(&mut self) {
        if let Some(permit) = &mut self.permit {
            permit.answered();
        }
    }

    fn new(upstream: &LaneUpstream) -> Slot<'_> {
        let count = &upstream.under_way;
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        Slot {
            upstream,
            permit: None,
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let count = &self.upstream.under_way;
        count.store(count.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
    }
}

impl Picked<'_> {
    /// What the endpoint made of the request.
    pub fn tell(&self, outcome: EndpointOutcome) {
        self.upstream.shared.tell(&self.pool.endpoint, outcome);
    }

    /// Tells of a response that cannot be read in the log, now and then.
    pub fn note_refused(&self, why: BadResponse) {
        let upstream = &self.upstream.shared;
        if let Some(left_out) = upstream.lines.refused.lock().next(clock::mono()) {
            let (upstream, endpoint) = (&upstream.settings.name, &self.pool.endpoint.place);
            let left_out = (left_out > 0).then_some(left_out);
            warn!(upstream, endpoint, %why, left_out, "a response was refused");
        }
    }
}

impl Drop for Picked<'_> {
    fn drop(&mut self) {
        if !self.upstream.shared.is_lone {
            let under_way = &self.pool.endpoint.under_way;
            under_way.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Closes an idle connection of the lane's each time that some request waits for a new one.
async fn close_on_demand(upstream: Weak<LaneUpstream>, caps: Arc<Caps>) {
    loop {
        caps.short.notified().await;
        let Some(upstream) = upstream.upgrade() else {
            return;
        };
        upstream.make_room();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;
    use crate::telemetry::metrics::Metrics;

    /// Clients of a transparent listener may ask for any.
    #[test]
    fn destinations_that_nothing_is_open_to_are_forgotten() {
        let text = "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\n";
        let config = check::parse(text, &|_| None).unwrap();
        let metrics = Metrics::default().upstreams.of("app");
        let live = LiveUpstream::new(config.upstreams[0].clone(), None, None, metrics);
        let lane = LaneUpstream::new(live, None);
        let picked = (1..100).map(|port| {
            let aim = Aim {
                original: Some(([127, 0, 0, 1], port).into()),
                ..Aim::default()
            };
            lane.pick(aim, &[]).unwrap()
        });
        picked.for_each(drop);
        assert_eq!(lane.originals.borrow().len(), 1, "the last one");
    }

    /// Whichever endpoint it is to.
    #[tokio::test]
    async fn the_client_s_own_connection_that_was_not_used_for_longest_makes_room() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (one, other) = (listener.local_addr().unwrap(), "127.0.0.2:0");
        let second = std::net::TcpListener::bind(other).unwrap();
        let other = second.local_addr().unwrap();
        let text = format!(
            "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: ['http://{one}', 'http://{other}']}}}}\nroutes: [{{upstream: app}}]\n"
        );
        let config = check::parse(&text, &|_| None).unwrap();
        let metrics = Metrics::default().upstreams.of("app");
        let live = LiveUpstream::new(config.upstreams[0].clone(), None, None, metrics);
        let lane = LaneUpstream::new(live, None);
        for oldest in [1, 0] {
            let pools = lane.view().pools.clone();
            let mut kept = Vec::new();
            for pool in [&pools[oldest], &pools[1 - oldest]] {
                let connected = pool.connect(&mut None).await.unwrap();
                kept.push(Bound::keep(pool, connected, false));
                let then = clock::coarse();
                while clock::coarse() == then {}
            }
            lane.make_room();
            let has_bound = |index: usize| pools[index].has_bound();
            assert!(!has_bound(oldest) && has_bound(1 - oldest), "{oldest}");
        }
    }
}
