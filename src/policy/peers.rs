//! How many processes are taken for alive. Redis counts those that it has heard lately: after an outage, or a loss of its data,
//! that is whoever asks first. So fewer than before are believed once Redis has told so for a while, and then the most that it
//! told meanwhile. Pure: `now` is an argument.

use std::time::Duration;

/// For how long fewer are told before they are believed: as long as Redis takes to give a process up.
const FEWER_FOR: Duration = Duration::from_secs(5);

/// As many as are known.
#[derive(Debug, Clone, Copy, Default)]
pub struct Peers {
    count: u64,
    /// Since when fewer are told, by each answer, and the most of them.
    fewer: Option<(Duration, u64)>,
}

impl Peers {
    /// Redis has heard so many lately.
    pub fn told(&mut self, count: u64, now: Duration) {
        if count >= self.count {
            (self.count, self.fewer) = (count, None);
            return;
        }
        let (since, most) = match self.fewer {
            Some((since, most)) => (since, most.max(count)),
            None => (now, count),
        };
        self.fewer = Some((since, most));
        if now >= since + FEWER_FOR {
            self.count = most;
            // Those that are fewer still are told from now on.
            self.fewer = (count < most).then_some((now, count));
        }
    }

    /// Redis has not answered: others may not reach it either, so the time begins anew with the next answer.
    pub fn untold(&mut self) {
        self.fewer = None;
    }

    /// How many are taken for alive; 0 before any were told.
    pub fn count(&self) -> u64 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_are_believed_at_once_and_fewer_once_they_are_told_for_a_while() {
        let mut peers = Peers::default();
        let mut told = |count: Option<u64>, seconds| {
            match count {
                Some(count) => peers.told(count, Duration::from_secs(seconds)),
                None => peers.untold(),
            }
            peers.count()
        };
        assert_eq!([told(Some(1), 1), told(Some(4), 1)], [1, 4]);
        assert_eq!([2, 3, 6, 7].map(|at| told(Some(3), at)), [4, 4, 4, 3]);
        // As many again in between, or no answer.
        let again = [(Some(1), 8), (Some(3), 12), (Some(1), 13), (None, 14)];
        assert_eq!(again.map(|(count, at)| told(count, at)), [3; 4]);
        assert_eq!([19, 20, 23, 24].map(|at| told(Some(2), at)), [3, 3, 3, 2]);
    }

    /// One has left, and then Redis loses what it has: whoever asks first is told of itself alone.
    #[test]
    fn the_most_that_was_told_meanwhile_is_believed() {
        let mut peers = Peers::default();
        let mut told = |count, seconds| {
            peers.told(count, Duration::from_secs(seconds));
            peers.count()
        };
        assert_eq!(told(4, 0), 4);
        assert_eq!([0, 1, 2, 3, 4].map(|at| told(3, at)), [4; 5]);
        assert_eq!([5, 6, 9].map(|at| told(1, at)), [3; 3]);
        // Told for as long by itself, it is believed too.
        assert_eq!(told(1, 10), 1);
    }
}
