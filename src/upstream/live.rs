//! An upstream as all lanes see it: which endpoints there are, how they are, and how much goes on. Lanes read it without a lock;
//! what changes it is rare, and makes the snapshot that they read anew.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::{info, warn};

use super::caps::Caps;
use super::endpoint::{Endpoint, EndpointOutcome};
use super::members::{Counts, Member, Members, Snapshot, count, member};
use super::names::{Look, names};
use super::pool::Pool;
use super::reach::Reach;
use crate::clock;
use crate::config::Upstream;
use crate::config::upstreams::{Balancing, Budget, Source};
use crate::net::tls::client::ClientTls;
use crate::policy::balance::{self, Ring};
use crate::policy::outlier::{Checks, Ejections, may_eject};
use crate::policy::retry::within_budget;
use crate::telemetry::log::LogRateLimit;
use crate::telemetry::metrics::upstreams::UpstreamMetrics;

/// An upstream of the configuration made live. All lanes share it.
#[derive(Debug)]
pub struct LiveUpstream {
    pub settings: Upstream,
    /// Where its endpoints speak TLS.
    pub tls: Option<Arc<ClientTls>>,
    /// Whether there is one endpoint for good, and nothing asks how it is: then there is nothing to choose, nor to count.
    pub(super) is_lone: bool,
    pub(super) caps: Option<Arc<Caps>>,
    snapshot: ArcSwap<Snapshot>,
    members: Mutex<Members>,
    /// Counts changes of which endpoints there are.
    changes: watch::Sender<u64>,
    /// One for each source.
    pub(super) looks: Vec<Look>,
    /// Requests under way that are tried again.
    retrying: AtomicU32,
    /// Of all original destinations together: what is told of them must not grow with those that clients think of.
    originals: Arc<Reach>,
    /// Requests under way by lane; each is written by its lane alone, so that lanes do not wait for each other's counts.
    lanes: Mutex<Vec<Arc<AtomicU32>>>,
    pub metrics: UpstreamMetrics,
    pub lines: ResponseLines,
}

/// The lines that its responses can make the log say, each one now and then; most by their session headers.
#[derive(Debug, Default)]
pub struct ResponseLines {
    /// One cannot be read.
    pub(super) refused: Mutex<LogRateLimit>,
    pub ignored: Mutex<LogRateLimit>,
    pub several: Mutex<LogRateLimit>,
    pub unread: Mutex<LogRateLimit>,
    /// There is no room for the session.
    pub full: Mutex<LogRateLimit>,
}

/// The right to try a request again, until it is dropped.
#[derive(Debug)]
pub struct RetryPermit<'e>(&'e AtomicU32);

impl Drop for RetryPermit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An endpoint at a moment, as operators see it.
#[derive(Debug)]
pub struct EndpointState {
    pub endpoint: Arc<Endpoint>,
    /// `up`, `unhealthy` or `ejected`, as the metrics have it.
    pub name: &'static str,
    /// What told against it last, where it is not up.
    pub why: Option<String>,
    /// Until it is taken back.
    pub ejected_for: Option<Duration>,
    /// Under way.
    pub requests: u32,
}

impl LiveUpstream {
    /// With all that is known of `old`, which is to be of the same upstream: the health and the ejections of endpoints that stay, and
    /// the addresses of names.
    pub fn new(
        settings: Upstream,
        tls: Option<Arc<ClientTls>>,
        old: Option<&LiveUpstream>,
        metrics: UpstreamMetrics,
    ) -> Arc<LiveUpstream> {
        let is_lone = is_lone(&settings);
        let kept = old.and_then(|old| {
            let same = old.settings.concurrency == settings.concurrency;
            same.then(|| old.caps.clone()).flatten()
        });
        let caps = kept.or_else(|| {
            let settings = settings.concurrency?;
            Some(Arc::new(Caps::new(settings, metrics.clone())))
        });
        let list = old.map_or_else(Vec::new, |old| old.members_for(&settings));
        let kept = settings.endpoints.iter().map(|source| old?.kept(source));
        let kept = kept.map(Option::unwrap_or_default);
        let (found, looks) = kept.unzip();
        let live = LiveUpstream {
            is_lone,
            caps,
            snapshot: ArcSwap::from_pointee(Snapshot::empty()),
            changes: watch::Sender::new(0),
            looks,
            lanes: Mutex::default(),
            retrying: AtomicU32::new(0),
            originals: Arc::default(),
            members: Mutex::new(Members {
                found,
                stand_in: !list.is_empty(),
                list,
                ring: Arc::default(),
            }),
            settings,
            tls,
            metrics,
            lines: ResponseLines::default(),
        };
        let mut members = live.members.lock();
        live.gather(&mut members, old.is_some());
        drop(members);
        Arc::new(live)
    }

    /// Takes over what has become of endpoints since it was made in place of `old`.
    pub fn go_on_from(&self, old: &LiveUpstream) {
        let known = old.members_for(&self.settings).into_iter();
        let known: BTreeMap<_, _> = known.map(|it| (Arc::as_ptr(&it.endpoint), it)).collect();
        let mut members = self.members.lock();
        for member in &mut members.list {
            if let Some(known) = known.get(&Arc::as_ptr(&member.endpoint)) {
                *member = known.clone();
            }
        }
        self.publish(&members);
    }

    /// Its endpoints, and how they are to one with these settings.
    fn members_for(&self, settings: &Upstream) -> Vec<Member> {
        let mut list = self.members.lock().list.clone();
        for member in &mut list {
            // What is no longer judged says nothing, nor what was not judged before.
            if settings.health.is_none() || self.settings.health.is_none() {
                member.checks = Checks::default();
            }
            if !ejects(settings) || !self.ejects() {
                member.ejections = Ejections::default();
            }
        }
        list
    }

    /// Whether requests are to be sent as before: the rest of the settings is not this module's.
    pub fn is_same(&self, settings: &Upstream, tls: Option<&Arc<ClientTls>>) -> bool {
        of_endpoints(&self.settings) == of_endpoints(settings) && self.has_tls(tls)
    }

    /// A lane's connections to one of them.
    pub(super) fn pool(&self, endpoint: Arc<Endpoint>) -> Pool {
        Pool::new(
            endpoint,
            &self.settings,
            self.tls.clone(),
            self.caps.clone(),
        )
    }

    /// A lane's connections to where those of a transparent listener were to go.
    pub(super) fn original(&self, to: SocketAddr) -> Pool {
        let endpoint = Endpoint {
            reach: self.originals.clone(),
            ..Endpoint::new(to.to_string(), None)
        };
        let mut pool = self.pool(Arc::new(endpoint));
        pool.is_original = true;
        pool
    }

    fn has_tls(&self, tls: Option<&Arc<ClientTls>>) -> bool {
        self.tls.as_ref().map(Arc::as_ptr) == tls.map(Arc::as_ptr)
    }

    /// Whether connections made for `self` are as good for `other`.
    pub(super) fn connects_as(&self, other: &LiveUpstream) -> bool {
        let of_connections = |upstream: &Upstream| Upstream {
            endpoints: Vec::new(),
            load_balancing: Balancing::LeastRequest,
            health: None,
            outlier_detection: None,
            slow_start: None,
            panic_threshold: 0.0,
            ..of_endpoints(upstream)
        };
        of_connections(&self.settings) == of_connections(&other.settings)
            && self.has_tls(other.tls.as_ref())
    }

    /// Whether something is to be done for it beside the lanes.
    pub fn wants_care(&self) -> bool {
        let names = self.settings.endpoints.iter().any(is_name);
        names || self.settings.health.is_some() || self.ejects()
    }

    /// Whether endpoints are ejected.
    pub fn ejects(&self) -> bool {
        ejects(&self.settings)
    }

    /// Changes whenever there are other endpoints.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The endpoints there are.
    pub fn list(&self) -> Vec<Arc<Endpoint>> {
        self.snapshot.load().endpoints.clone()
    }

    /// How each endpoint is.
    pub fn endpoint_states(&self, now: Duration) -> Vec<EndpointState> {
        let base = self
            .settings
            .outlier_detection
            .map(|it| it.base_ejection_time);
        let members = self.members.lock();
        let state = |member: &Member| {
            let ejected_for = base.and_then(|base| member.ejections.remaining(now, base));
            let name = match member.ejections.is_ejected() {
                true => "ejected",
                false if member.checks.is_healthy() => "up",
                false => "unhealthy",
            };
            EndpointState {
                endpoint: member.endpoint.clone(),
                name,
                why: member.last_fault.clone().filter(|_| !member.is_up()),
                ejected_for,
                // A lone one's are not counted twice.
                requests: match self.is_lone {
                    true => self.under_way(),
                    false => member.endpoint.under_way.load(Ordering::Relaxed),
                },
            }
        };
        members.list.iter().map(state).collect()
    }

    /// How many endpoints are as they are, as of the last change.
    pub fn counts(&self) -> Counts {
        self.snapshot.load().counts
    }

    /// Requests under way, of all lanes.
    pub fn under_way(&self) -> u32 {
        let lanes = self.lanes.lock();
        lanes.iter().map(|lane| lane.load(Ordering::Relaxed)).sum()
    }

    /// How many requests may be without an answer, where that is learnt.
    pub fn bound(&self) -> Option<u32> {
        self.caps.as_ref().and_then(|caps| caps.bound())
    }

    /// The right to try a request again, as the budget allows.
    pub fn retry(&self, budget: Budget) -> Option<RetryPermit<'_>> {
        let under_way = self.under_way();
        let more = |retrying| {
            let allowed = within_budget(retrying, under_way, budget.percent, budget.min_concurrent);
            allowed.then_some(retrying + 1)
        };
        let relaxed = Ordering::Relaxed;
        let counted = self.retrying.fetch_update(relaxed, relaxed, more);
        counted.ok().map(|_| RetryPermit(&self.retrying))
    }

    /// The name that is the source of this index has these addresses; whether they are others than before.
    pub(super) fn set_addresses(&self, source: usize, mut addresses: Vec<SocketAddr>) -> bool {
        addresses.sort_unstable();
        addresses.dedup();
        let mut members = self.members.lock();
        let changed = members.found[source] != addresses;
        if changed {
            members.found[source] = addresses;
            self.gather(&mut members, true);
        }
        changed
    }

    /// Whether the name that is the source of this index has addresses of IPv4.
    pub(super) fn has_ipv4(&self, source: usize) -> bool {
        let members = self.members.lock();
        members.found[source].iter().any(SocketAddr::is_ipv4)
    }

    /// What is known of a name, whatever is said of how it is looked up; by other servers it is looked up at once.
    fn kept(&self, source: &Source) -> Option<(Vec<SocketAddr>, Look)> {
        let Source::Dns(name) = source else {
            return None;
        };
        let mut names = names(self);
        let (index, old) = names.find(|(_, it)| it.name == name.name && it.port == name.port)?;
        let found = self.members.lock().found[index].clone();
        let look = &self.looks[index];
        let look = match old.servers == name.servers {
            true => Look::like(look, name.refresh),
            false => Look::anew(look),
        };
        Some((found, look))
    }

    /// Notes the result of an active check: that it passed, or why not.
    pub fn note_check(&self, endpoint: &Arc<Endpoint>, result: Result<(), String>) {
        let Some(health) = &self.settings.health else {
            return;
        };
        match &result {
            Ok(()) => self.metrics.checks_passed.inc(),
            Err(_) => self.metrics.checks_failed.inc(),
        };
        let mut members = self.members.lock();
        let Some(member) = member(&mut members, endpoint) else {
            return;
        };
        if let Err(why) = &result {
            member.last_fault = Some(why.clone());
        }
        let (down_after, up_after) = (health.unhealthy_after, health.healthy_after);
        if member.checks.note(result.is_ok(), down_after, up_after) {
            let upstream = &self.settings.name;
            match result {
                Ok(()) => {
                    endpoint.note_coming(clock::mono());
                    info!(%upstream, endpoint = endpoint.place, "endpoint is healthy again");
                }
                Err(why) => {
                    warn!(%upstream, endpoint = endpoint.place, why, "endpoint is unhealthy, by its checks");
                }
            }
            self.publish(&members);
        }
    }

    /// Notes what an endpoint made of a request; ejects it where that is one failure too many.
    pub(super) fn tell(&self, endpoint: &Arc<Endpoint>, outcome: EndpointOutcome) {
        if !self.ejects() {
            return;
        }
        let EndpointOutcome::Failed(last) = outcome else {
            // Nearly always so already, and then no line of memory changes hands.
            if endpoint.failures.load(Ordering::Relaxed) > 0 {
                endpoint.failures.store(0, Ordering::Relaxed);
            }
            return;
        };
        let Some(settings) = &self.settings.outlier_detection else {
            return;
        };
        let failures = endpoint.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failures < settings.consecutive_5xx {
            return;
        }
        endpoint.failures.store(0, Ordering::Relaxed);
        let mut members = self.members.lock();
        let all = members.list.len();
        let ejected = count(&members, |member| member.ejections.is_ejected());
        if !may_eject(ejected, all, settings.max_ejection_percent) {
            return;
        }
        if let Some(member) = member(&mut members, endpoint)
            && !member.ejections.is_ejected()
        {
            member.ejections.eject(clock::mono());
            member.last_fault = Some(last.to_string());
            self.metrics.ejections.inc();
            let upstream = &self.settings.name;
            warn!(%upstream, endpoint = endpoint.place, failures, last = last.to_string(), "endpoint is ejected for a while");
            self.publish(&members);
        }
    }

    /// Takes back the endpoints whose ejection is over; to be called each interval.
    pub fn readmit(&self, now: Duration) {
        let Some(settings) = &self.settings.outlier_detection else {
            return;
        };
        let mut members = self.members.lock();
        let mut changed = false;
        for member in &mut members.list {
            if member.ejections.look(now, settings.base_ejection_time) {
                changed = true;
                member.endpoint.failures.store(0, Ordering::Relaxed);
                member.endpoint.note_coming(now);
                let (upstream, endpoint) = (&self.settings.name, &member.endpoint.place);
                info!(%upstream, endpoint, "endpoint is taken back");
            }
        }
        if changed {
            self.publish(&members);
        }
    }

    pub(super) fn snapshot(&self) -> arc_swap::Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// Takes in a lane's count of its requests under way.
    pub(super) fn count_lane(&self, lane: Arc<AtomicU32>) {
        let mut lanes = self.lanes.lock();
        // Those of lanes that have gone.
        lanes.retain(|lane| Arc::strong_count(lane) > 1);
        lanes.push(lane);
    }

    /// What serves while the name that is the source of this index cannot be looked up, in words.
    pub(super) fn meanwhile(&self, source: usize) -> &'static str {
        let members = self.members.lock();
        match (members.found[source].is_empty(), members.stand_in) {
            (false, _) => "its last addresses stay",
            (true, true) => "the endpoints from before the reload stay",
            (true, false) => "it has no endpoint until it is found",
        }
    }

    /// Brings the list to what the sources say; those that come `late` begin slowly.
    fn gather(&self, members: &mut Members, late: bool) {
        let mut places = Vec::new();
        for (source, found) in self.settings.endpoints.iter().zip(&members.found) {
            match source {
                Source::Fixed(place) => places.push((place.clone(), None)),
                Source::Dns(dns) => places.extend(
                    found
                        .iter()
                        .map(|address| (address.to_string(), Some(&*dns.name))),
                ),
            }
        }
        members.stand_in &= places.is_empty();
        if members.stand_in {
            let list = members.list.iter();
            places.extend(list.map(|member| (member.endpoint.place.clone(), None)));
        }
        let mut old: BTreeMap<_, _> = members
            .list
            .drain(..)
            .map(|member| (member.endpoint.place.clone(), member))
            .collect();
        let (late, now) = (late && !old.is_empty(), clock::mono());
        let mut list: Vec<Member> = Vec::with_capacity(places.len());
        let mut seen = std::collections::BTreeSet::new();
        for (place, name) in places {
            if !seen.insert(place.clone()) {
                continue;
            }
            list.push(old.remove(&place).unwrap_or_else(|| {
                let endpoint = Endpoint::new(place, name);
                if late {
                    endpoint.note_coming(now);
                }
                Member {
                    endpoint: Arc::new(endpoint),
                    checks: Checks::default(),
                    ejections: Ejections::default(),
                    last_fault: None,
                }
            }));
        }
        members.list = list;
        if let Balancing::RingHash(_) = self.settings.load_balancing {
            let names = members.list.iter().map(|member| &*member.endpoint.place);
            members.ring = Arc::new(Ring::new(names));
        }
        self.publish(members);
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn publish(&self, members: &Members) {
        let list = &members.list;
        let up = count(members, Member::is_up);
        let panic = balance::panics(up, list.len(), self.settings.panic_threshold);
        let counts = Counts {
            all: list.len(),
            up,
            unhealthy: count(members, |member| !member.checks.is_healthy()),
            ejected: count(members, |member| member.ejections.is_ejected()),
            panic,
        };
        let before = self.snapshot.load().counts.panic;
        if panic != before {
            let upstream = &self.settings.name;
            match panic {
                true => {
                    warn!(%upstream, up, all = list.len(), "so few endpoints are up that all are used")
                }
                false => info!(%upstream, up, all = list.len(), "enough endpoints are up again"),
            }
        }
        let usable = list.iter().enumerate();
        let usable = usable.filter(|(_, member)| panic || member.is_up());
        self.snapshot.store(Arc::new(Snapshot {
            usable: usable.map(|(index, _)| index).collect(),
            endpoints: list.iter().map(|member| member.endpoint.clone()).collect(),
            ring: members.ring.clone(),
            counts,
        }));
    }
}

fn is_name(source: &Source) -> bool {
    match source {
        Source::Fixed(_) => false,
        Source::Dns(_) => true,
    }
}

fn is_lone(settings: &Upstream) -> bool {
    let named = settings.endpoints.iter().any(is_name);
    settings.endpoints.len() == 1 && !named && settings.health.is_none()
}

/// A lone endpoint is not ejected: there is no other to take its requests.
fn ejects(settings: &Upstream) -> bool {
    settings.outlier_detection.is_some() && !is_lone(settings)
}

/// The settings without those that do not touch endpoints.
fn of_endpoints(upstream: &Upstream) -> Upstream {
    Upstream {
        timeout: Duration::ZERO,
        retries: None,
        circuit_breaker: None,
        trust_session_headers: false,
        ..upstream.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;
    use crate::telemetry::metrics::Metrics;
    use crate::upstream::endpoint::Fault;

    /// They are of requests that were under way then.
    #[test]
    fn what_fails_while_an_endpoint_is_ejected_is_not_held_against_it_later() {
        let text = "listen: 127.0.0.1:0\nupstreams: {app: {endpoints: ['http://127.0.0.1:1', 'http://127.0.0.1:2'], \
                    outlier_detection: {consecutive_5xx: 3, base_ejection_time: 1s}}}\nroutes: [{upstream: app}]\n";
        let config = check::parse(text, &|_| None).unwrap();
        let metrics = Metrics::default().upstreams.of("app");
        let live = LiveUpstream::new(config.upstreams[0].clone(), None, None, metrics);
        let endpoint = live.list().remove(0);
        let fail = |times| {
            for _ in 0..times {
                live.tell(&endpoint, EndpointOutcome::Failed(Fault::Status(500)));
            }
            live.counts().ejected
        };
        assert_eq!([fail(2), fail(1), fail(2)], [0, 1, 1]);
        live.readmit(clock::mono() + Duration::from_secs(2));
        assert_eq!(live.counts().ejected, 0);
        assert_eq!([fail(2), fail(1)], [0, 1]);
    }

    /// Nobody would take it back: a lone one is not judged.
    #[test]
    fn what_a_reload_leaves_alone_is_not_ejected_any_more() {
        let settings = |endpoints: &str| {
            let text = format!(
                "listen: 127.0.0.1:0\nupstreams: {{app: {{endpoints: [{endpoints}], panic_threshold: 0%, \
                 outlier_detection: {{consecutive_5xx: 1, base_ejection_time: 1s}}}}}}\nroutes: [{{upstream: app}}]\n"
            );
            check::parse(&text, &|_| None).unwrap().upstreams.remove(0)
        };
        let metrics = Metrics::default().upstreams.of("app");
        let (one, both) = (
            "'http://127.0.0.1:1'",
            "'http://127.0.0.1:1', 'http://127.0.0.1:2'",
        );
        let of_both = LiveUpstream::new(settings(both), None, None, metrics.clone());
        let alone = LiveUpstream::new(settings(one), None, Some(&of_both), metrics.clone());
        // While names were looked up.
        let endpoint = of_both.list().remove(0);
        of_both.tell(&endpoint, EndpointOutcome::Failed(Fault::Status(500)));
        assert_eq!(of_both.counts().ejected, 1);
        alone.go_on_from(&of_both);
        assert_eq!((alone.counts().up, alone.counts().ejected), (1, 0));
        let alone = LiveUpstream::new(settings(one), None, Some(&of_both), metrics.clone());
        assert_eq!((alone.counts().up, alone.counts().ejected), (1, 0));
        assert_eq!(alone.endpoint_states(clock::mono())[0].name, "up");
        // Others stay ejected.
        let again = LiveUpstream::new(settings(both), None, Some(&of_both), metrics);
        assert_eq!(again.counts().ejected, 1);
    }
}
