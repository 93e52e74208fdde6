//! Metrics of what is told of requests beside the audit.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::bring;
use crate::telemetry::lines::Counts;

/// A way by which requests are told of, and what became of what was given to it.
#[derive(Debug, Clone)]
pub struct Outlet {
    /// It is out.
    pub out: Counter,
    /// It did not fit, or no one took it.
    pub dropped: Counter,
}

impl Outlet {
    /// Brings it up to what has become of lines.
    pub fn bring(&self, lines: Counts) {
        for (counter, count) in [(&self.out, lines.written), (&self.dropped, lines.lost)] {
            bring(counter, count);
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

/// Lines of the log.
pub(super) fn log(registry: &mut Registry) -> Outlet {
    outlet(
        registry,
        ["written", "dropped"],
        "log_lines",
        "Lines of the log written, and dropped since standard error did not take them in time",
    )
}

/// Lines of the access log.
pub(super) fn access_log(registry: &mut Registry) -> Outlet {
    outlet(
        registry,
        ["written", "dropped"],
        "access_log_lines",
        "Lines of the access log written, and dropped since standard output did not take them in time",
    )
}

/// Spans of traces.
pub(super) fn traces(registry: &mut Registry) -> Outlet {
    outlet(
        registry,
        ["exported", "dropped"],
        "trace_spans",
        "Spans that the collector took, and those dropped since it did not",
    )
}

fn outlet(registry: &mut Registry, results: [&'static str; 2], name: &str, help: &str) -> Outlet {
    let family = Family::<ResultLabels, Counter>::default();
    let counted = |result| family.get_or_create_owned(&ResultLabels { result });
    let [out, dropped] = results.map(counted);
    registry.register(name, help, family);
    Outlet { out, dropped }
}
