//! What weir tells of itself.

pub mod access_log;
pub mod audit_metrics;
pub mod breaker_metrics;
pub mod drain_metrics;
pub mod durations;
pub mod http2_metrics;
pub mod log;
pub mod metrics;
pub mod process_metrics;
pub mod proxy_metrics;
pub mod spans;
pub mod tls_metrics;
pub mod told_metrics;
pub mod traces;
pub mod upstream_metrics;
pub mod webhook_metrics;
