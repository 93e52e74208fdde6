//! The names among an upstream's endpoints: when each is looked up next, and what is made of what is found. Must not know how:
//! `net::resolve` does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;
use tracing::{info, warn};

use super::live::LiveUpstream;
use crate::clock;
use crate::config::upstreams::{DnsName, Source};
use crate::net::resolve::{GONE_AFTER, ResolveError, SOONEST, Wanted, resolve};
use crate::policy::retry::Pauses;

/// When a name is looked up next.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// In milliseconds of [`clock::mono`]; 0 for one that was never looked up.
    due: AtomicU64,
    /// In a row.
    failures: AtomicU32,
    /// Of those, in a row: looks by which it has no address.
    nowhere: AtomicU32,
}

impl Look {
    pub(super) fn was_done(&self) -> bool {
        self.due.load(Ordering::Acquire) > 0
    }

    /// As `old`, for a name that stays; due within this time at the latest.
    pub(super) fn like(old: &Look, within: Duration) -> Look {
        let relaxed = Ordering::Relaxed;
        let latest = clock::millis(clock::mono() + within);
        Look {
            due: AtomicU64::new(old.due.load(relaxed).min(latest)),
            failures: AtomicU32::new(old.failures.load(relaxed)),
            nowhere: AtomicU32::new(old.nowhere.load(relaxed)),
        }
    }

    /// For a name that other servers are asked for: due at once, and what the old ones said counts no more.
    pub(super) fn anew(old: &Look) -> Look {
        let due = match old.was_done() {
            true => clock::millis(clock::mono()),
            false => 0,
        };
        Look {
            due: AtomicU64::new(due),
            ..Look::default()
        }
    }

    /// Whether the name has no address any more, by this look and those before it.
    fn is_nowhere(&self, error: &ResolveError) -> bool {
        let nowhere = match error {
            ResolveError::Nothing => self.nowhere.load(Ordering::Relaxed).saturating_add(1),
            ResolveError::Failed(_) | ResolveError::Half | ResolveError::Late => 0,
        };
        self.nowhere.store(nowhere, Ordering::Relaxed);
        nowhere == GONE_AFTER
    }

    fn next_in(&self, wait: Duration) {
        let due = clock::millis(clock::mono() + wait);
        self.due.store(due, Ordering::Release);
    }
}

/// The names of an upstream, each with the index of its source.
pub fn names(live: &LiveUpstream) -> impl Iterator<Item = (usize, &DnsName)> {
    let sources = live.settings.endpoints.iter().enumerate();
    sources.filter_map(|(index, source)| match source {
        Source::Fixed(_) => None,
        Source::Dns(name) => Some((index, name)),
    })
}

/// How long it is until a name is to be looked up.
pub fn due_in(live: &LiveUpstream, source: usize) -> Duration {
    let due = Duration::from_millis(live.looks[source].due.load(Ordering::Relaxed));
    due.saturating_sub(clock::mono())
}

/// Looks a name up. While that fails, its last addresses stay; they are gone once name servers say that it has none.
pub async fn look_up(live: &LiveUpstream, source: usize, name: &DnsName) {
    let (upstream, look) = (&live.settings.name, &live.looks[source]);
    // One address of a pod or server that has both is enough: two would count as two endpoints.
    let wait = match resolve(
        &name.name,
        &name.servers,
        Wanted::OneFamily,
        live.has_ipv4(source),
    )
    .await
    {
        Ok(found) => {
            live.metrics.resolved.inc();
            look.nowhere.store(0, Ordering::Relaxed);
            if look.failures.swap(0, Ordering::Relaxed) > 0 {
                info!(%upstream, name = name.name, "name is found again");
            }
            let at = |ip| SocketAddr::new(ip, name.port);
            let count = found.addresses.len();
            if live.set_addresses(source, found.addresses.into_iter().map(at).collect()) {
                info!(%upstream, name = name.name, addresses = count, "endpoints have changed");
            }
            found.holds_for.max(SOONEST)
        }
        Err(error) => {
            live.metrics.unresolved.inc();
            let before = look.failures.fetch_add(1, Ordering::Relaxed);
            // The first of a row alone: the rest is in the metric.
            if before == 0 {
                let meanwhile = live.meanwhile(source);
                warn!(%upstream, name = name.name, %error, "name cannot be looked up; {meanwhile}");
            }
            // Others may have been given the addresses meanwhile.
            if look.is_nowhere(&error) && live.set_addresses(source, Vec::new()) {
                warn!(%upstream, name = name.name, "name has no address any more: its endpoints are gone");
            }
            let pauses = Pauses {
                first: SOONEST,
                longest: name.refresh,
            };
            pauses.nth(before)
        }
    };
    look.next_in(wait.min(name.refresh));
}

/// Looks up the names that never were, so that no request meets an upstream whose endpoints are not known yet; but not for longer than
/// `within`: then requests get 503 until they are.
pub async fn first_look(upstreams: impl Iterator<Item = &Arc<LiveUpstream>>, within: Duration) {
    let all = upstreams.flat_map(|live| {
        let untried = names(live).filter(|(index, _)| !live.looks[*index].was_done());
        untried.map(|(index, name)| look_up(live, index, name))
    });
    let _ = timeout(within, join_all(all)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_nowhere_once_so_many_looks_in_a_row_say_so() {
        let look = Look::default();
        let says = |times, error: fn() -> ResolveError| {
            let said = (0..times).map(|_| look.is_nowhere(&error()));
            said.collect::<Vec<_>>()
        };
        for _ in 0..3 {
            assert_eq!(says(2, || ResolveError::Nothing), [false; 2]);
            assert_eq!(says(1, || ResolveError::Late), [false]);
        }
        assert_eq!(
            says(4, || ResolveError::Nothing),
            [false, false, true, false]
        );
    }
}
