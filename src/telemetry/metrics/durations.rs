//! A histogram of durations, for the path of requests.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

use crate::event::Micros;

/// Upper bounds of the buckets of request durations, in microseconds.
const BUCKETS: [u64; 18] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000, 15_000_000, 60_000_000,
];

/// A histogram of durations whose observation is two atomic additions; prometheus-client's takes a lock.
#[derive(Debug, Clone, Default)]
pub struct Durations(Arc<DurationCells>);

#[derive(Debug, Default)]
struct DurationCells {
    /// The last counts what is above every bound.
    counts: [AtomicU64; BUCKETS.len() + 1],
    sum_micros: AtomicU64,
}

impl Durations {
    /// Counts one; it never waits.
    pub fn observe(&self, duration: Duration) {
        let micros = Micros::from(duration).0;
        let bucket = BUCKETS.partition_point(|bound| *bound < micros);
        self.0.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.0.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }
}

impl EncodeMetric for Durations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let seconds = |micros: u64| micros as f64 / 1e6;
        let bounds = BUCKETS
            .iter()
            .map(|bound| seconds(*bound))
            .chain([f64::INFINITY]);
        let counts = self
            .0
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<_> = bounds.zip(counts).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = seconds(self.0.sum_micros.load(Ordering::Relaxed));
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

impl TypedMetric for Durations {
    const TYPE: MetricType = MetricType::Histogram;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A quantile is guessed between a bucket's bounds; a minute is four times the timeout of upstreams.
    #[test]
    fn no_bucket_spans_more_than_a_factor_of_four_nor_ends_with_a_usual_timeout() {
        let are_near = |bounds: &[u64]| bounds[1] <= 4 * bounds[0];
        assert!(BUCKETS.windows(2).all(are_near), "{BUCKETS:?}");
        let of_second = BUCKETS
            .iter()
            .filter(|bound| (250_000..=1_000_000).contains(*bound));
        assert_eq!(
            of_second.collect::<Vec<_>>(),
            [&250_000, &500_000, &1_000_000]
        );
        assert!(BUCKETS.last() > Some(&15_000_000));
    }
}
