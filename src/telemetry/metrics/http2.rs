//! Metrics of clients' connections by HTTP/2.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::add;

/// Connections that weir ended for what their client sent, or began and did not go on with.
#[derive(Debug)]
pub struct Http2Errors(Family<Labels, Counter>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    listener: String,
    code: &'static str,
}

impl Http2Errors {
    pub(super) fn register(registry: &mut Registry) -> Http2Errors {
        Http2Errors(add(
            registry,
            "http2_connection_errors",
            "Connections by HTTP/2 that weir ended for what their client did, by the error code",
        ))
    }

    /// `code` is one of a closed set. For a connection that ends, so rarely that it is looked up each time.
    pub fn count(&self, listener: &str, code: &'static str) {
        let listener = listener.to_owned();
        self.0.get_or_create(&Labels { listener, code }).inc();
    }
}
