//! Names that connections are opened to, for the whole process: one look of each at a time, whose answer all who wait for it get and who
//! come while it holds. Must not know how names are looked up.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use super::any::connect_to_any;
use super::resolve::{GONE_AFTER, ResolveError, Resolved, SOONEST, Wanted, resolve};
use crate::clock;

/// The longest time that an answer holds, whatever its TTL.
const LONGEST: Duration = Duration::from_secs(10);
/// How long a look is waited for where addresses are known from before.
const PATIENCE: Duration = Duration::from_millis(250);
/// Names that no one asked for meanwhile are forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

static NAMES: Mutex<BTreeMap<String, Arc<Name>>> = Mutex::new(BTreeMap::new());

#[derive(Debug)]
struct Name {
    host: String,
    known: Mutex<Known>,
}

/// Times are by [`clock::mono`].
#[derive(Debug, Default)]
struct Known {
    /// Those found last. None where there never were, or where name servers say that there are none any more.
    addresses: Arc<[IpAddr]>,
    /// Of the last look, where that failed.
    error: Option<ResolveError>,
    asked: Duration,
    /// When the last look ended, and when the next is due.
    looked: Duration,
    due: Duration,
    under_way: Option<Look>,
    /// Looks in a row by which it has no address.
    nowhere: u32,
}

/// A look under way. Whoever does it holds the other end, and may be gone without an answer, as a lane that ends is.
#[derive(Debug, Clone)]
struct Look {
    began: Duration,
    ended: watch::Receiver<()>,
}

/// Where a name leads.
#[derive(Debug)]
pub struct Addresses {
    name: Arc<Name>,
    addresses: Arc<[IpAddr]>,
}

/// A connection to a server of this name, or with this address. Waits for ever.
pub async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    match host.parse::<IpAddr>() {
        Ok(ip) => TcpStream::connect((ip, port)).await,
        Err(_) => find(host).await?.connect(port, TcpStream::connect).await,
    }
}

/// Looks the name up where what is known of it holds no longer. While that fails, or takes its time, its last addresses stay.
pub async fn find(host: &str) -> io::Result<Addresses> {
    let name = Name::of(host);
    let addresses = name.addresses().await?;
    Ok(Addresses { name, addresses })
}

impl Addresses {
    /// Connects to one of them, by `open`; where that fails, and the name was not looked up just now, to those that it has by now.
    pub async fn connect<O: Future<Output = io::Result<TcpStream>>>(
        mut self,
        port: u16,
        open: impl Fn(SocketAddr) -> O,
    ) -> io::Result<TcpStream> {
        loop {
            let trying = Trying(&self);
            match connect_to_any(in_order(&self.addresses, port), &open).await {
                Ok(stream) => {
                    std::mem::forget(trying);
                    return Ok(stream);
                }
                Err(error) if !self.name.doubt(&self.addresses) => {
                    return Err(
                        error.unwrap_or_else(|| io::Error::other("the name has no address"))
                    );
                }
                Err(_) => {}
            }
            drop(trying);
            self.addresses = self.name.addresses().await?;
        }
    }
}

/// A connection that may never come about, and is given up then.
struct Trying<'a>(&'a Addresses);

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        self.0.name.doubt(&self.0.addresses);
    }
}

/// IPv6 first, but for unique local ones, as by the table of RFC 6724 (section 2.1): one to which no way leads fails at once. Those of one
/// kind by chance, so that each has its part of the connections.
fn in_order(addresses: &[IpAddr], port: u16) -> impl Iterator<Item = SocketAddr> {
    let mut addresses = addresses.to_vec();
    fastrand::shuffle(&mut addresses);
    addresses.sort_by_key(|address| match address {
        IpAddr::V6(address) if address.is_unique_local() => 2,
        IpAddr::V6(_) => 0,
        IpAddr::V4(_) => 1,
    });
    addresses
        .into_iter()
        .map(move |ip| SocketAddr::new(ip, port))
}

impl Name {
    fn of(host: &str) -> Arc<Name> {
        let mut names = NAMES.lock();
        if let Some(name) = names.get(host) {
            return name.clone();
        }
        let now = clock::mono();
        let stays = |name: &Name| now < name.known.lock().asked + FORGOTTEN_AFTER;
        names.retain(|_, name| stays(name));
        let known = Known {
            asked: now,
            ..Known::default()
        };
        let name = Arc::new(Name {
            host: host.to_owned(),
            known: Mutex::new(known),
        });
        names.insert(host.to_owned(), name.clone());
        name
    }

    async fn addresses(self: &Arc<Name>) -> io::Result<Arc<[IpAddr]>> {
        loop {
            let (mut look, is_known) = {
                let mut known = self.known.lock();
                known.asked = clock::mono();
                if known.asked < known.due {
                    return known.said();
                }
                (self.look(&mut known), !known.addresses.is_empty())
            };
            // An error: it has ended, with an answer or without.
            let ended = look.ended.changed();
            if !is_known {
                let _ = ended.await;
                continue;
            }
            let left = (look.began + PATIENCE).saturating_sub(clock::mono());
            if timeout(left, ended).await.is_err() {
                return self.known.lock().said();
            }
        }
    }

    /// The look that is under way, or else a new one.
    fn look(self: &Arc<Name>, known: &mut Known) -> Look {
        let lives = |look: &&Look| look.ended.has_changed().is_ok();
        if let Some(look) = known.under_way.as_ref().filter(lives) {
            return look.clone();
        }
        let (held, ended) = watch::channel(());
        let name = self.clone();
        // A task of its own: who asked may give up, and others wait for it.
        tokio::spawn(async move {
            let had_ipv4 = name.known.lock().addresses.iter().any(IpAddr::is_ipv4);
            let found = resolve(&name.host, &[], Wanted::All, had_ipv4).await;
            name.known.lock().note(&name.host, found);
            drop(held);
        });
        let look = Look {
            began: clock::mono(),
            ended,
        };
        known.under_way = Some(look.clone());
        look
    }

    /// No connection came about to these addresses. Whether there may be others by now.
    fn doubt(&self, tried: &Arc<[IpAddr]>) -> bool {
        let mut known = self.known.lock();
        if !Arc::ptr_eq(tried, &known.addresses) {
            return true;
        }
        let now = clock::mono();
        let is_old = known.under_way.is_none() && now >= known.looked + SOONEST;
        if is_old {
            known.due = now;
        }
        is_old
    }
}

impl Known {
    fn said(&self) -> io::Result<Arc<[IpAddr]>> {
        match &self.error {
            Some(error) if self.addresses.is_empty() => Err(match error {
                ResolveError::Late => io::Error::new(io::ErrorKind::TimedOut, error.to_string()),
                ResolveError::Failed(_) | ResolveError::Half | ResolveError::Nothing => {
                    io::Error::other(error.to_string())
                }
            }),
            Some(_) | None => Ok(self.addresses.clone()),
        }
    }

    fn note(&mut self, name: &str, found: Result<Resolved, ResolveError>) {
        (self.looked, self.under_way) = (clock::mono(), None);
        let holds_for = match found {
            Ok(found) => {
                if self.error.take().is_some() {
                    info!(name, "name is found again");
                }
                (self.addresses, self.nowhere) = (found.addresses.into(), 0);
                found.holds_for.clamp(SOONEST, LONGEST)
            }
            Err(error) => {
                self.nowhere = match error {
                    ResolveError::Nothing => self.nowhere.saturating_add(1),
                    ResolveError::Failed(_) | ResolveError::Half | ResolveError::Late => 0,
                };
                if self.nowhere == GONE_AFTER && !self.addresses.is_empty() {
                    warn!(name, "name has no address any more");
                    self.addresses = Arc::default();
                } else if self.error.is_none() && !self.addresses.is_empty() {
                    // The first of a row; where no address is known it is told of the endpoint.
                    warn!(name, %error, "name cannot be looked up; its last addresses stay");
                }
                self.error = Some(error);
                SOONEST
            }
        };
        self.due = self.looked + holds_for;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found() -> Result<Resolved, ResolveError> {
        Ok(Resolved {
            addresses: vec![[127, 0, 0, 1].into()],
            holds_for: Duration::ZERO,
        })
    }

    #[test]
    fn addresses_go_once_so_many_looks_in_a_row_find_none() {
        let mut known = Known::default();
        known.note("a", found());
        let note = |known: &mut Known, times, error: fn() -> ResolveError| {
            (0..times).for_each(|_| known.note("a", Err(error())));
            known.said().map(|addresses| addresses.len()).ok()
        };
        for _ in 0..3 {
            assert_eq!(
                note(&mut known, GONE_AFTER - 1, || ResolveError::Nothing),
                Some(1)
            );
            // It says nothing of the name.
            assert_eq!(note(&mut known, 1, || ResolveError::Late), Some(1));
            assert_eq!(
                note(&mut known, GONE_AFTER - 1, || ResolveError::Nothing),
                Some(1)
            );
            known.note("a", found());
        }
        assert_eq!(note(&mut known, GONE_AFTER, || ResolveError::Nothing), None);
        known.note("a", found());
        assert_eq!(known.said().unwrap().len(), 1);
        assert_eq!(
            note(&mut known, GONE_AFTER - 1, || ResolveError::Nothing),
            Some(1)
        );
    }
}
