//! Metrics. Label sets are bounded by the configuration, and handles are resolved when a plan is made, not per request. Must not measure.

pub mod admin;
pub mod audit;
pub mod breakers;
pub mod connections;
mod durations;
pub mod format;
mod http2;
pub mod ingest;
pub mod limits;
pub mod outlets;
pub mod process;
mod proxy_protocol;
pub mod redis_calls;
mod reloads;
pub mod requests;
pub mod sessions;
mod tasks;
pub mod tls;
pub mod upstreams;
pub mod webhook;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::{Metric, Registry};

use admin::AdminMetrics;
use audit::AuditMetrics;
use breakers::BreakerFamilies;
use connections::ConnectionMetrics;
use http2::Http2Errors;
use ingest::IngestMetrics;
use limits::LimitFamilies;
use outlets::Outlet;
use process::ProcessMetrics;
use proxy_protocol::ProxyFailures;
use redis_calls::RedisFamilies;
use reloads::ReloadMetrics;
use requests::RequestMetrics;
use sessions::SessionFamilies;
use tasks::TaskMetrics;
use tls::TlsMetrics;
use upstreams::UpstreamFamilies;

/// All metrics of a process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub process: ProcessMetrics,
    pub admin: AdminMetrics,
    pub breakers: BreakerFamilies,
    /// Of the audit, up to where it is kept.
    pub audit: AuditMetrics,
    /// Of the audit, from there into Postgres.
    pub ingest: IngestMetrics,
    pub tls: TlsMetrics,
    pub proxy_failures: ProxyFailures,
    pub http2_errors: Http2Errors,
    pub upstreams: UpstreamFamilies,
    pub log: Outlet,
    pub access_log: Outlet,
    pub traces: Outlet,
    pub requests: RequestMetrics,
    pub connections: ConnectionMetrics,
    pub limits: LimitFamilies,
    pub sessions: SessionFamilies,
    pub redis: RedisFamilies,
    pub reloads: ReloadMetrics,
    pub tasks: TaskMetrics,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::with_prefix("weir");
        Metrics {
            process: ProcessMetrics::register(&mut registry),
            admin: AdminMetrics::register(&mut registry),
            breakers: BreakerFamilies::register(&mut registry),
            audit: AuditMetrics::register(&mut registry),
            ingest: IngestMetrics::register(&mut registry),
            tls: TlsMetrics::register(&mut registry),
            proxy_failures: ProxyFailures::register(&mut registry),
            http2_errors: Http2Errors::register(&mut registry),
            upstreams: UpstreamFamilies::register(&mut registry),
            log: outlets::log(&mut registry),
            access_log: outlets::access_log(&mut registry),
            traces: outlets::traces(&mut registry),
            requests: RequestMetrics::register(&mut registry),
            connections: ConnectionMetrics::register(&mut registry),
            limits: LimitFamilies::register(&mut registry),
            sessions: SessionFamilies::register(&mut registry),
            redis: RedisFamilies::register(&mut registry),
            reloads: ReloadMetrics::register(&mut registry),
            tasks: TaskMetrics::register(&mut registry),
            registry,
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
}

/// Brings a counter up to a total that is kept elsewhere.
pub fn bring(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// A count as a gauge has it.
pub fn whole(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

/// A metric of this name, which the registry has, too.
fn add<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_scrape_tells_what_was_counted() {
        let metrics = Metrics::default();
        let route = metrics.requests.route("/a/*", "app", 1);
        route.count(200, Duration::from_micros(300));
        route.count(503, Duration::from_secs(20));
        metrics.limits.of("per_client").refused.inc();
        metrics.requests.rejection("quota_exceeded").inc();
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
