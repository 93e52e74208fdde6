//! Metrics of upstreams: their endpoints, and what is refused or tried again on the way to them. Endpoints have no series of their
//! own, since DNS may name any number.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::add;

/// Of endpoints.
const STATES: [&str; 3] = ["up", "unhealthy", "ejected"];

/// Of all upstreams.
#[derive(Debug, Clone)]
pub struct UpstreamFamilies {
    endpoints: Family<StateLabels, Gauge>,
    panic: Family<UpstreamLabels, Gauge>,
    under_way: Family<UpstreamLabels, Gauge>,
    ejections: Family<UpstreamLabels, Counter>,
    over: Family<CapLabels, Counter>,
    bound: Family<UpstreamLabels, Gauge>,
    dns: Family<ResultLabels, Counter>,
    checks: Family<ResultLabels, Counter>,
    retries: Family<ResultLabels, Counter>,
}

/// The handles of one upstream. Clones count together.
#[derive(Debug, Clone)]
pub struct UpstreamMetrics {
    /// Endpoints that are neither ejected nor unhealthy,
    pub up: Gauge,
    /// that active checks found so,
    pub unhealthy: Gauge,
    /// that were taken out for what they made of requests.
    pub ejected: Gauge,
    /// 1 while so few are up that all are used.
    pub panic: Gauge,
    pub under_way: Gauge,
    pub ejections: Counter,
    /// Requests that may wait for the head of their response, where that is learnt.
    pub bound: Gauge,
    /// Refused since as many requests were under way as may be,
    pub over_requests: Counter,
    /// as many waited,
    pub over_pending: Counter,
    /// or as many connections were open.
    pub over_connections: Counter,
    /// Looks at names that gave addresses,
    pub resolved: Counter,
    /// and that gave none.
    pub unresolved: Counter,
    pub checks_passed: Counter,
    pub checks_failed: Counter,
    /// Tries beside the first of a request,
    pub retried: Counter,
    /// requests that were served by one,
    pub rescued: Counter,
    /// and that were not tried again: they had all their tries,
    pub exhausted: Counter,
    /// as many as may be were tried again at that time,
    pub over_budget: Counter,
    /// or the wait would have been longer than their time.
    pub out_of_time: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    upstream: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    upstream: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CapLabels {
    upstream: String,
    cap: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    upstream: String,
    result: &'static str,
}

impl UpstreamFamilies {
    /// Takes out what says how an upstream is now. What was counted stays.
    pub fn forget(&self, upstream: &str) {
        let upstream = upstream.to_owned();
        for state in STATES {
            let labels = StateLabels {
                upstream: upstream.clone(),
                state,
            };
            self.endpoints.remove(&labels);
        }
        let labels = UpstreamLabels { upstream };
        for family in [&self.panic, &self.under_way, &self.bound] {
            family.remove(&labels);
        }
    }

    pub(super) fn register(registry: &mut Registry) -> UpstreamFamilies {
        UpstreamFamilies {
            endpoints: add(
                registry,
                "upstream_endpoints",
                "Endpoints, by whether they are up",
            ),
            panic: add(
                registry,
                "upstream_panic",
                "1 while so few endpoints are up that all are used",
            ),
            under_way: add(
                registry,
                "upstream_requests_in_flight",
                "Requests under way to an upstream, those that wait for their turn too",
            ),
            ejections: add(
                registry,
                "upstream_ejections",
                "Endpoints taken out for what they made of requests",
            ),
            over: add(
                registry,
                "upstream_overloads",
                "Requests refused since an upstream was asked for as much as it may be, by cap",
            ),
            bound: add(
                registry,
                "upstream_concurrency_limit",
                "Requests to an upstream that may wait for the head of their response, where that is learnt",
            ),
            dns: add(
                registry,
                "upstream_dns_lookups",
                "Looks at the names of endpoints, by result",
            ),
            checks: add(
                registry,
                "upstream_health_checks",
                "Checks of endpoints, by result",
            ),
            retries: add(
                registry,
                "upstream_retries",
                "Tries beside the first, and what became of requests that were to be tried again",
            ),
        }
    }

    /// The handles of an upstream.
    pub fn of(&self, upstream: &str) -> UpstreamMetrics {
        let upstream = || upstream.to_owned();
        let labels = UpstreamLabels {
            upstream: upstream(),
        };
        let state = |state| {
            self.endpoints.get_or_create_owned(&StateLabels {
                upstream: upstream(),
                state,
            })
        };
        let over = |cap| {
            self.over.get_or_create_owned(&CapLabels {
                upstream: upstream(),
                cap,
            })
        };
        let of = |family: &Family<ResultLabels, Counter>, result| {
            family.get_or_create_owned(&ResultLabels {
                upstream: upstream(),
                result,
            })
        };
        let [up, unhealthy, ejected] = STATES.map(state);
        UpstreamMetrics {
            up,
            unhealthy,
            ejected,
            panic: self.panic.get_or_create_owned(&labels),
            under_way: self.under_way.get_or_create_owned(&labels),
            ejections: self.ejections.get_or_create_owned(&labels),
            bound: self.bound.get_or_create_owned(&labels),
            over_requests: over("requests"),
            over_pending: over("pending"),
            over_connections: over("connections"),
            resolved: of(&self.dns, "found"),
            unresolved: of(&self.dns, "failed"),
            checks_passed: of(&self.checks, "passed"),
            checks_failed: of(&self.checks, "failed"),
            retried: of(&self.retries, "sent"),
            rescued: of(&self.retries, "rescued"),
            exhausted: of(&self.retries, "exhausted"),
            over_budget: of(&self.retries, "over_budget"),
            out_of_time: of(&self.retries, "out_of_time"),
        }
    }
}
