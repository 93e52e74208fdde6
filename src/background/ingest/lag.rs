//! Keeps the numbers of how far the streams are behind. One that cannot be asked is as it was said to be last, and gets older: else an
//! alert would go by what was true when it was last asked, or the streams that do answer would not be heard.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::beyond::Beyond;
use crate::store::redis::CallError;
use crate::store::streams::consume::{Lag, Streams};
use crate::telemetry::metrics::ingest::IngestMetrics;
use crate::telemetry::metrics::whole;

/// Between looks.
const EVERY: Duration = Duration::from_secs(5);

/// What each stream said last, and when; nothing of one that has never answered.
struct Known(Vec<Option<(Lag, Instant)>>);

pub(super) async fn watch(streams: Arc<Streams>, beyond: Arc<Beyond>, metrics: IngestMetrics) {
    let mut known = Known(vec![None; usize::from(streams.count())]);
    loop {
        let said = streams.lags().await;
        if let Some(lag) = known.with(said, Instant::now()) {
            let lag: Lag = [lag, beyond.lag(Instant::now())].into_iter().sum();
            metrics.lag_seconds.set(lag.oldest.as_secs_f64());
            metrics.waiting.set(whole(lag.waiting));
            metrics.dead_letters.set(whole(lag.dead_letters));
        }
        sleep(EVERY).await;
    }
}

impl Known {
    /// How far all streams are behind, by this and by what was said before; `None` where no stream has ever answered.
    fn with(&mut self, said: Vec<Result<Lag, CallError>>, now: Instant) -> Option<Lag> {
        for (known, said) in self.0.iter_mut().zip(said) {
            *known = said.ok().map(|lag| (lag, now)).or(*known);
        }
        let each: Vec<_> = self.0.iter().flatten().collect();
        // What has come to a stream since it answered, empty or not, waits for no longer than that.
        let aged = each
            .iter()
            .map(|(lag, at)| lag.aged(now.saturating_duration_since(*at)));
        (!each.is_empty()).then(|| aged.sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_does_not_answer_is_as_it_was_and_gets_older() {
        let lag = |seconds, waiting| Lag {
            oldest: Duration::from_secs(seconds),
            waiting,
            ..Lag::default()
        };
        let down = || Err(CallError::Nonsense);
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut known = Known(vec![None; 2]);
        assert_eq!(known.with(vec![down(), down()], at(0)), None);
        assert_eq!(
            known.with(vec![Ok(lag(3, 5)), down()], at(5)),
            Some(lag(3, 5))
        );
        assert_eq!(
            known.with(vec![Ok(lag(1, 2)), Ok(lag(2, 7))], at(10)),
            Some(lag(2, 9))
        );
        assert_eq!(
            known.with(vec![Ok(lag(1, 1)), down()], at(25)),
            Some(lag(17, 8))
        );
        assert_eq!(known.with(vec![down(), down()], at(35)), Some(lag(27, 8)));
        assert_eq!(
            known.with(vec![down(), Ok(lag(0, 0))], at(40)),
            Some(lag(16, 1))
        );
    }
}
