//! Metrics of requests: what routes served, and what was refused.

use std::collections::BTreeSet;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::add;
use super::durations::Durations;
use crate::http2::grpc::GrpcStatus;

/// Of all routes.
#[derive(Debug)]
pub struct RequestMetrics {
    served: Family<ServedLabels, Counter>,
    durations: Family<RouteLabels, Durations>,
    rejections: Family<RejectionLabels, Counter>,
    /// By the number of the status.
    grpc: [Counter; 17],
    /// Of all routes that there ever were, each with its upstream: their series stay.
    labelled: Mutex<BTreeSet<(String, String)>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServedLabels {
    route: String,
    upstream: String,
    class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GrpcLabels {
    status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectionLabels {
    reason: &'static str,
}

/// The handles of one route.
#[derive(Debug, Clone)]
pub struct RouteMetrics {
    /// By the first digit of the status; 499 for a client that left counts as 4xx.
    classes: [Counter; 5],
    durations: Durations,
}

impl RequestMetrics {
    pub(super) fn register(registry: &mut Registry) -> RequestMetrics {
        let calls = add::<Family<GrpcLabels, Counter>>(
            registry,
            "grpc_responses",
            "Calls of gRPC that ended with a status, weir's own included",
        );
        RequestMetrics {
            grpc: std::array::from_fn(|number| {
                let status = GrpcStatus::names()[number];
                calls.get_or_create_owned(&GrpcLabels { status })
            }),
            labelled: Mutex::default(),
            served: add(
                registry,
                "requests",
                "Requests that a route served, by class of status",
            ),
            durations: add(
                registry,
                "request_duration_seconds",
                "Time from a request's head to the end of its response",
            ),
            rejections: add(
                registry,
                "rejections",
                "Requests that weir refused or that broke off, by reason",
            ),
        }
    }

    /// The handles of a route; `upstream` is empty where weir answers itself. Once as many as `most` have some, all others are counted
    /// together, as `other`.
    pub fn route(&self, route: &str, upstream: &str, most: usize) -> RouteMetrics {
        let label = (route.to_owned(), upstream.to_owned());
        let mut labelled = self.labelled.lock();
        let has_room = labelled.len() < most || labelled.contains(&label);
        let (route, upstream) = match has_room {
            true => (route, upstream),
            false => ("other", "other"),
        };
        if has_room {
            labelled.insert(label);
        }
        drop(labelled);
        let class = |class| {
            let labels = ServedLabels {
                route: route.to_owned(),
                upstream: upstream.to_owned(),
                class,
            };
            self.served.get_or_create_owned(&labels)
        };
        RouteMetrics {
            classes: ["1xx", "2xx", "3xx", "4xx", "5xx"].map(class),
            durations: self.durations.get_or_create_owned(&RouteLabels {
                route: route.to_owned(),
            }),
        }
    }

    /// The counter of one reason to refuse; `reason` is one of a closed set.
    pub fn rejection(&self, reason: &'static str) -> Counter {
        self.rejections
            .get_or_create_owned(&RejectionLabels { reason })
    }

    /// Calls of gRPC that ended so; `None` for a status that gRPC does not know.
    pub fn grpc(&self, status: GrpcStatus) -> Option<&Counter> {
        self.grpc.get(usize::from(status.0))
    }
}

impl RouteMetrics {
    /// Counts a response of `status` that took `duration`.
    pub fn count(&self, status: u16, duration: Duration) {
        self.classes[usize::from(status / 100).clamp(1, 5) - 1].inc();
        self.durations.observe(duration);
    }
}
