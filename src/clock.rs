//! The one place that reads the clocks. Owns when a connection is too old, too.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use uuid::{Builder, Uuid};

use crate::policy::limit::Now;

/// What monotonic times of policy are counted from, by the kernel.
static ORIGIN: LazyLock<Duration> = LazyLock::new(|| read(ClockId::Monotonic));

/// The monotonic clock, for differences and deadlines alone.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the module that reads the clocks"
)]
pub fn now() -> Instant {
    Instant::now()
}

/// Time since the Unix epoch; zero for a clock set before it.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the module that reads the clocks"
)]
pub fn wall() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// A day before any weir was built.
const BUILT: Duration = Duration::from_secs(1_735_689_600);

/// Whether the clock was never set, as that of a machine without a battery until it is told the time.
pub fn is_unset() -> bool {
    wall() < BUILT
}

/// CPU time that this thread has used.
pub fn thread_cpu() -> Duration {
    read(ClockId::ThreadCPUTime)
}

/// CPU time that all threads of the process have used.
pub fn process_cpu() -> Duration {
    read(ClockId::ProcessCPUTime)
}

fn read(clock: ClockId) -> Duration {
    Duration::try_from(clock_gettime(clock)).unwrap_or_default()
}

/// A UUIDv7 (RFC 9562) of this time since the Unix epoch: unique, and in the order of time. Its random part is not a secret.
pub fn uuid(wall: Duration) -> Uuid {
    let mut random = [0; 10];
    fastrand::fill(&mut random);
    Builder::from_unix_timestamp_millis(millis(wall), &random).into_uuid()
}

/// Whole milliseconds, as stores and atomics have times.
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What [`mono`] says when it is first asked: it also tells when a session began that is older than this process.
const BEFORE: Duration = Duration::from_secs(366 * 24 * 3600);

/// The monotonic clock, as policy wants it.
pub fn mono() -> Duration {
    read(ClockId::Monotonic).saturating_sub(*ORIGIN) + BEFORE
}

/// [`mono`] as of the kernel's last tick: up to 10 ms behind it, for a fraction of its price. For ages that are told in seconds.
pub fn coarse() -> Duration {
    read(ClockId::MonotonicCoarse).saturating_sub(*ORIGIN) + BEFORE
}

/// How much sooner than its greatest age a connection may be old, as a share.
const JITTER: f64 = 0.1;

/// When a connection that begins now is `max_age` old, by [`mono`], or up to a tenth sooner by chance: those that were opened together are not
/// to end together.
pub fn old_at(max_age: Duration) -> Duration {
    mono().saturating_add(max_age.mul_f64(1.0 - JITTER * fastrand::f64()))
}

/// Both clocks, as policy wants them.
pub fn moment() -> Now {
    Now {
        mono: mono(),
        wall: wall(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_of_one_moment_are_old_at_different_ones() {
        let ages = |max_age: Duration| {
            (0..100).map(move |_| {
                let before = mono();
                let age = old_at(max_age).saturating_sub(before);
                age.as_secs_f64() / max_age.as_secs_f64()
            })
        };
        let hour = Duration::from_secs(3600);
        assert!(ages(hour).all(|share| (0.9..1.001).contains(&share)));
        assert!(ages(hour).any(|share| share < 0.95) && ages(hour).any(|share| share > 0.95));
        assert!(old_at(Duration::MAX) > mono() + hour);
    }
}
