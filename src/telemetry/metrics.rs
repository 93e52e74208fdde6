//! Metrics. Label sets are bounded by the configuration, and handles are resolved when a plan is made, not per request.

pub mod audit;
pub mod breakers;
pub mod drain;
mod durations;
pub mod format;
mod http2;
pub mod process;
mod proxy_protocol;
pub mod tls;
pub mod told;
pub mod upstreams;
pub mod webhook;

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::http2::grpc::GrpcStatus;
use audit::AuditMetrics;
use breakers::Breakers;
use drain::DrainMetrics;
use durations::Durations;
use http2::Http2Errors;
use process::ProcessMetrics;
use proxy_protocol::ProxyFailures;
use tls::TlsMetrics;
use told::Told;
use upstreams::{UpstreamMetrics, Upstreams};

/// All metrics of a process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub process: ProcessMetrics,
    requests: Family<RequestLabels, Counter>,
    durations: Family<RouteLabels, Durations>,
    rejections: Family<RejectionLabels, Counter>,
    /// By the number of the status.
    grpc: [Counter; 17],
    decisions: Family<DecisionLabels, Counter>,
    limits_alone: Family<LimitLabels, Gauge>,
    pub breakers: Breakers,
    pub connections: Counter,
    /// Closed at once, since the listener had as many as it may.
    pub connections_refused: Counter,
    pub accept_failures: Counter,
    pub connections_open: Gauge,
    /// How late lanes were, where that is measured.
    pub lane_delays: Durations,
    pub limit_keys: Gauge,
    pub limit_keys_max: Gauge,
    pub limit_keys_evicted: Counter,
    session_checks: Family<SessionCheckLabels, Counter>,
    session_events: Family<SessionEventLabels, Counter>,
    sessions_held: Family<SessionsLabels, Gauge>,
    session_lookups: Family<SessionCheckLabels, Counter>,
    /// Of the audit, up to where it is kept.
    pub audit: AuditMetrics,
    redis_calls: Family<RedisCallLabels, Counter>,
    redis_durations: Family<RedisLabels, Durations>,
    redis_unheard: Family<RedisLabels, Counter>,
    reloads: Family<ReloadLabels, Counter>,
    last_reload_loaded: Gauge,
    task_restarts: Family<TaskLabels, Counter>,
    /// Sessions in Redis, as the last sweep met them.
    sessions_live: Family<SessionsLabels, Gauge>,
    session_users: Family<SessionsLabels, Gauge>,
    sessions_swept: Family<SessionsLabels, Counter>,
    pub panics: Counter,
    pub drain: DrainMetrics,
    pub tls: TlsMetrics,
    pub proxy_failures: ProxyFailures,
    pub http2_errors: Http2Errors,
    upstreams: Upstreams,
    pub access_log: Told,
    pub traces: Told,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
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

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    limit: String,
    decision: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabels {
    limit: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SessionCheckLabels {
    sessions: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SessionEventLabels {
    sessions: String,
    event: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SessionsLabels {
    sessions: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RedisCallLabels {
    client: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RedisLabels {
    client: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TaskLabels {
    task: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReloadLabels {
    result: &'static str,
}

/// The handles of one route.
#[derive(Debug, Clone)]
pub struct RouteMetrics {
    /// By the first digit of the status; 499 for a client that left counts as 4xx.
    classes: [Counter; 5],
    durations: Durations,
}

/// The handles of one entry of `sessions`.
#[derive(Debug, Clone)]
pub struct SessionMetrics {
    /// A live session with the claims that the route asks for.
    pub valid: Counter,
    /// No token.
    pub missing: Counter,
    /// A token of no live session.
    pub unknown: Counter,
    /// Without a claim that the route asks for.
    pub forbidden: Counter,
    pub created: Counter,
    /// Made room for a new one of the same user.
    pub evicted: Counter,
    /// By the upstream, or by an operator.
    pub ended: Counter,
    pub expired: Counter,
    /// Not started: the user's maximum, or the bound of memory.
    pub refused: Counter,
    pub held: Gauge,
    /// What became of looks at sessions in Redis: known by this process,
    pub remembered: Counter,
    /// asked of Redis,
    pub asked: Counter,
    /// answered by a call that another request made,
    pub waited: Counter,
    /// not answered, so that what was known holds for the grace,
    pub grace: Counter,
    /// not answered, and nothing was known.
    pub unanswered: Counter,
}

/// What sweeps of one entry of `sessions` in Redis met.
#[derive(Debug, Clone)]
pub struct SweepMetrics {
    pub live: Gauge,
    pub users: Gauge,
    /// Were over, and are removed.
    pub swept: Counter,
}

/// The handles of one client of Redis.
#[derive(Debug, Clone)]
pub struct RedisMetrics {
    pub answered: Counter,
    /// Not within the budget.
    pub timed_out: Counter,
    /// There was no connection.
    pub down: Counter,
    /// The server said why not, or nonsense.
    pub refused: Counter,
    durations: Durations,
    /// Subscriptions that failed.
    pub unheard: Counter,
}

/// The handles of one limit.
#[derive(Debug, Clone)]
pub struct LimitMetrics {
    pub admitted: Counter,
    pub refused: Counter,
    /// Would have been refused by a limit in shadow mode.
    pub shadow_refused: Counter,
    /// Admitted, with little left: among those admitted too.
    pub near: Counter,
    /// Lacked a part of the key.
    pub missing: Counter,
    /// Not decided by all processes together: Redis did not answer.
    pub lost: Counter,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::with_prefix("weir");
        let mut metrics = Metrics {
            process: ProcessMetrics::register(&mut registry),
            requests: Family::default(),
            durations: Family::default(),
            rejections: Family::default(),
            grpc: Default::default(),
            decisions: Family::default(),
            limits_alone: Family::default(),
            breakers: Breakers::register(&mut registry),
            connections: Counter::default(),
            connections_refused: Counter::default(),
            accept_failures: Counter::default(),
            connections_open: Gauge::default(),
            lane_delays: Durations::default(),
            limit_keys: Gauge::default(),
            limit_keys_max: Gauge::default(),
            limit_keys_evicted: Counter::default(),
            session_checks: Family::default(),
            session_events: Family::default(),
            sessions_held: Family::default(),
            session_lookups: Family::default(),
            audit: AuditMetrics::register(&mut registry),
            redis_calls: Family::default(),
            redis_durations: Family::default(),
            redis_unheard: Family::default(),
            reloads: Family::default(),
            last_reload_loaded: Gauge::default(),
            task_restarts: Family::default(),
            sessions_live: Family::default(),
            session_users: Family::default(),
            sessions_swept: Family::default(),
            panics: Counter::default(),
            drain: DrainMetrics::register(&mut registry),
            tls: TlsMetrics::register(&mut registry),
            proxy_failures: ProxyFailures::register(&mut registry),
            http2_errors: Http2Errors::register(&mut registry),
            upstreams: Upstreams::register(&mut registry),
            access_log: told::access_log(&mut registry),
            traces: told::traces(&mut registry),
            registry: Registry::default(),
        };
        registry.register(
            "requests",
            "Requests that a route served, by class of status",
            metrics.requests.clone(),
        );
        registry.register(
            "request_duration_seconds",
            "Time from a request's head to the end of its response",
            metrics.durations.clone(),
        );
        registry.register(
            "rejections",
            "Requests that weir itself refused, by reason",
            metrics.rejections.clone(),
        );
        let calls = Family::<GrpcLabels, Counter>::default();
        metrics.grpc = std::array::from_fn(|number| {
            let status = GrpcStatus::names()[number];
            calls.get_or_create_owned(&GrpcLabels { status })
        });
        registry.register(
            "grpc_responses",
            "Calls of gRPC that ended with a status, weir's own included",
            calls,
        );
        registry.register(
            "limit_decisions",
            "Decisions of rate limits",
            metrics.decisions.clone(),
        );
        registry.register(
            "limit_alone",
            "1 while a shared limit is kept by this process alone: Redis does not answer",
            metrics.limits_alone.clone(),
        );
        registry.register(
            "connections",
            "Connections accepted",
            metrics.connections.clone(),
        );
        registry.register(
            "connections_refused",
            "Connections closed at once, over max_connections",
            metrics.connections_refused.clone(),
        );
        registry.register(
            "accept_failures",
            "Tries to accept a connection that failed: for want of file descriptors, as a rule",
            metrics.accept_failures.clone(),
        );
        registry.register(
            "connections_open",
            "Connections open now",
            metrics.connections_open.clone(),
        );
        registry.register(
            "lane_delay_seconds",
            "How long what is ready waits for its lane: the least of each tenth of a second, where runtime.shed.loop_delay is set",
            metrics.lane_delays.clone(),
        );
        registry.register(
            "limit_keys",
            "Keys that rate limits hold in memory",
            metrics.limit_keys.clone(),
        );
        registry.register(
            "limit_keys_max",
            "The most keys that rate limits hold in memory: the least used is let go of",
            metrics.limit_keys_max.clone(),
        );
        registry.register(
            "limit_keys_evicted",
            "Keys of rate limits that were let go of for others, with what they had used",
            metrics.limit_keys_evicted.clone(),
        );
        registry.register(
            "session_checks",
            "Requests to routes with sessions, by what was found",
            metrics.session_checks.clone(),
        );
        registry.register(
            "session_events",
            "Sessions that began or ended",
            metrics.session_events.clone(),
        );
        registry.register(
            "sessions_held",
            "Sessions in memory; with redis, those that are remembered",
            metrics.sessions_held.clone(),
        );
        registry.register(
            "session_lookups",
            "Looks at sessions in redis, by where the answer came from",
            metrics.session_lookups.clone(),
        );
        registry.register(
            "redis_calls",
            "Calls of Redis, by client and result",
            metrics.redis_calls.clone(),
        );
        registry.register(
            "redis_call_duration_seconds",
            "Time that calls of Redis took, answered or not",
            metrics.redis_durations.clone(),
        );
        registry.register(
            "redis_subscribe_failures",
            "Tries to subscribe to channels of Redis that failed; messages are not heard until one succeeds",
            metrics.redis_unheard.clone(),
        );
        registry.register(
            "config_reloads",
            "Reloads of the configuration, by result",
            metrics.reloads.clone(),
        );
        metrics.last_reload_loaded.set(1);
        registry.register(
            "config_last_reload_successful",
            "1, or 0 where the last reload of the configuration was refused and the one before it stays",
            metrics.last_reload_loaded.clone(),
        );
        registry.register(
            "task_restarts",
            "Supervised tasks that failed and were begun again",
            metrics.task_restarts.clone(),
        );
        registry.register(
            "sessions_live",
            "Sessions in redis that live, as the last sweep counted them",
            metrics.sessions_live.clone(),
        );
        registry.register(
            "session_users",
            "Users with live sessions in redis, as the last sweep counted them",
            metrics.session_users.clone(),
        );
        registry.register(
            "sessions_swept",
            "Sessions in redis that were over and that a sweep removed",
            metrics.sessions_swept.clone(),
        );
        registry.register(
            "panics",
            "Tasks that ended by a panic",
            metrics.panics.clone(),
        );
        Metrics {
            registry,
            ..metrics
        }
    }
}

impl Metrics {
    /// The metrics in the OpenMetrics text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode_registry(&mut text, self.process.common())
            .and_then(|()| encode_registry(&mut text, &self.registry))
            .and_then(|()| encode_eof(&mut text))
            .expect("writing to a string does not fail");
        text
    }

    pub fn route(&self, route: &str, upstream: &str) -> RouteMetrics {
        let class = |class| {
            let labels = RequestLabels {
                route: route.to_owned(),
                upstream: upstream.to_owned(),
                class,
            };
            self.requests.get_or_create_owned(&labels)
        };
        RouteMetrics {
            classes: ["1xx", "2xx", "3xx", "4xx", "5xx"].map(class),
            durations: self.durations.get_or_create_owned(&RouteLabels {
                route: route.to_owned(),
            }),
        }
    }

    /// Of a supervised task.
    pub fn task_restarts(&self, task: &'static str) -> Counter {
        self.task_restarts.get_or_create_owned(&TaskLabels { task })
    }

    /// Of an entry of `sessions` in Redis.
    pub fn session_sweep(&self, sessions: &str) -> SweepMetrics {
        let labels = SessionsLabels {
            sessions: sessions.to_owned(),
        };
        SweepMetrics {
            live: self.sessions_live.get_or_create_owned(&labels),
            users: self.session_users.get_or_create_owned(&labels),
            swept: self.sessions_swept.get_or_create_owned(&labels),
        }
    }

    pub fn limit(&self, limit: &str) -> LimitMetrics {
        let decision = |decision| {
            self.decisions.get_or_create_owned(&DecisionLabels {
                limit: limit.to_owned(),
                decision,
            })
        };
        LimitMetrics {
            admitted: decision("admitted"),
            refused: decision("refused"),
            shadow_refused: decision("shadow_refused"),
            near: decision("near_limit"),
            missing: decision("missing_key"),
            lost: decision("redis_lost"),
        }
    }

    /// Notes of each limit whether it is not shared though it is to be, since Redis does not answer; others are forgotten.
    pub fn limits_alone<'a>(&self, limits: impl Iterator<Item = (&'a str, bool)>) {
        self.limits_alone.clear();
        for (limit, alone) in limits {
            let limit = limit.to_owned();
            let gauge = self
                .limits_alone
                .get_or_create_owned(&LimitLabels { limit });
            gauge.set(i64::from(alone));
        }
    }

    pub fn redis(&self, client: &'static str) -> RedisMetrics {
        let result = |result| {
            self.redis_calls
                .get_or_create_owned(&RedisCallLabels { client, result })
        };
        RedisMetrics {
            answered: result("answered"),
            timed_out: result("timed_out"),
            down: result("down"),
            refused: result("refused"),
            durations: self
                .redis_durations
                .get_or_create_owned(&RedisLabels { client }),
            unheard: self
                .redis_unheard
                .get_or_create_owned(&RedisLabels { client }),
        }
    }

    pub fn upstream(&self, upstream: &str) -> UpstreamMetrics {
        self.upstreams.of(upstream)
    }

    pub fn sessions(&self, sessions: &str) -> SessionMetrics {
        let check = |outcome| {
            let labels = SessionCheckLabels {
                sessions: sessions.to_owned(),
                outcome,
            };
            self.session_checks.get_or_create_owned(&labels)
        };
        let event = |event| {
            let labels = SessionEventLabels {
                sessions: sessions.to_owned(),
                event,
            };
            self.session_events.get_or_create_owned(&labels)
        };
        let look = |outcome| {
            let labels = SessionCheckLabels {
                sessions: sessions.to_owned(),
                outcome,
            };
            self.session_lookups.get_or_create_owned(&labels)
        };
        SessionMetrics {
            remembered: look("remembered"),
            asked: look("asked"),
            waited: look("waited"),
            grace: look("grace"),
            unanswered: look("unanswered"),
            valid: check("valid"),
            missing: check("missing"),
            unknown: check("unknown"),
            forbidden: check("forbidden"),
            created: event("created"),
            evicted: event("evicted"),
            ended: event("ended"),
            expired: event("expired"),
            refused: event("refused"),
            held: self.sessions_held.get_or_create_owned(&SessionsLabels {
                sessions: sessions.to_owned(),
            }),
        }
    }

    /// An upstream is there no more: nothing is said of how it is.
    pub fn forget_upstream(&self, upstream: &str) {
        self.upstreams.forget(upstream);
    }

    /// Calls of gRPC that ended so.
    pub fn grpc(&self, status: GrpcStatus) -> Option<&Counter> {
        self.grpc.get(usize::from(status.0))
    }

    /// The counter of one reason to refuse; `reason` is one of a closed set.
    pub fn rejection(&self, reason: &'static str) -> Counter {
        self.rejections
            .get_or_create_owned(&RejectionLabels { reason })
    }

    /// Notes what became of a reload.
    pub fn reloaded(&self, loaded: bool) {
        let result = match loaded {
            true => "loaded",
            false => "refused",
        };
        self.reloads
            .get_or_create_owned(&ReloadLabels { result })
            .inc();
        self.last_reload_loaded.set(i64::from(loaded));
    }
}

impl RedisMetrics {
    /// How long a call took, answered or not.
    pub fn observe(&self, took: Duration) {
        self.durations.observe(took);
    }
}

impl RouteMetrics {
    /// Counts a response of `status` that took `duration`.
    pub fn count(&self, status: u16, duration: Duration) {
        self.classes[usize::from(status / 100).clamp(1, 5) - 1].inc();
        self.durations.observe(duration);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_tells_what_was_counted() {
        let metrics = Metrics::default();
        let route = metrics.route("/a/*", "app");
        route.count(200, Duration::from_micros(300));
        route.count(503, Duration::from_secs(20));
        metrics.limit("per_client").refused.inc();
        metrics.rejection("quota_exceeded").inc();
        let text = metrics.text();
        for line in [
            r#"weir_requests_total{route="/a/*",upstream="app",class="2xx"} 1"#,
            r#"weir_requests_total{route="/a/*",upstream="app",class="5xx"} 1"#,
            r#"weir_request_duration_seconds_bucket{le="0.00025",route="/a/*"} 0"#,
            r#"weir_request_duration_seconds_bucket{le="0.0005",route="/a/*"} 1"#,
            r#"weir_request_duration_seconds_bucket{le="+Inf",route="/a/*"} 2"#,
            r#"weir_request_duration_seconds_count{route="/a/*"} 2"#,
            r#"weir_limit_decisions_total{limit="per_client",decision="refused"} 1"#,
            r#"weir_rejections_total{reason="quota_exceeded"} 1"#,
            "# EOF",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
    }
}
