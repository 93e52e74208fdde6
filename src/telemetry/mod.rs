//! What weir tells of itself, and of requests beside the audit: log, access log, metrics, traces.

pub mod access_log;
mod lines;
pub mod log;
pub mod metrics;
pub mod panics;
pub mod spans;
pub mod traces;

use std::thread;
use std::time::Duration;

/// Tries every 10 ms whether a queue takes what `sent` has for it, for at most `within`; what of that is left, `None` where it did not.
fn until_sent(within: Duration, mut sent: impl FnMut() -> bool) -> Option<Duration> {
    const EVERY: Duration = Duration::from_millis(10);
    let mut left = within;
    while !sent() {
        left = left.checked_sub(EVERY)?;
        thread::sleep(EVERY);
    }
    Some(left)
}
