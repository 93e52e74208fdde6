//! How many connections each client of a listener has open, in all lanes together. Looked at when a connection comes and when it ends, by
//! no request. Must not know who is to be counted.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// Few lanes meet at one.
const SHARDS: usize = 16;

/// Those of one listener.
#[derive(Debug, Default)]
pub struct Clients {
    /// Which shard a client is in is not for clients to choose.
    keyed: RandomState,
    open: [Mutex<HashMap<IpAddr, usize>>; SHARDS],
}

/// A connection of a client's, which counts until it is dropped.
#[derive(Debug)]
pub struct Counted {
    of: Arc<Clients>,
    client: IpAddr,
}

impl Clients {
    /// One more of `client`; `None` where that has `max` already.
    pub fn count(self: &Arc<Clients>, client: IpAddr, max: usize) -> Option<Counted> {
        let mut open = self.shard(client).lock();
        let count = open.entry(client).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Counted {
            of: self.clone(),
            client,
        })
    }

    fn shard(&self, client: IpAddr) -> &Mutex<HashMap<IpAddr, usize>> {
        &self.open[self.keyed.hash_one(client) as usize % SHARDS]
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut open = self.of.shard(self.client).lock();
        if let Some(count) = open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn places_are_given_back_and_nothing_is_kept_of_who_has_none() {
        let clients = Arc::new(Clients::default());
        let client = |n| IpAddr::from([10, 0, 0, n]);
        let mut open: Vec<_> = (0..3).map(|_| clients.count(client(1), 3)).collect();
        assert!(open.iter().all(Option::is_some));
        assert!(clients.count(client(1), 3).is_none());
        // Under a bound that was lowered, and one that was raised.
        assert!(clients.count(client(1), 2).is_none());
        assert!(clients.count(client(1), 4).is_some());
        open.push(clients.count(client(2), 1));
        open.swap_remove(0);
        open.push(clients.count(client(1), 3));
        assert!(open.iter().all(Option::is_some) && clients.count(client(1), 3).is_none());
        drop(open);
        assert!(clients.open.iter().all(|shard| shard.lock().is_empty()));
    }

    #[test]
    fn lanes_together_never_have_more_than_the_bound() {
        let clients = Arc::new(Clients::default());
        let most = thread::scope(|scope| {
            let lanes = [(); 4].map(|()| {
                scope.spawn(|| {
                    let mut most = 0;
                    for n in 0..10_000 {
                        let counted = clients.count(IpAddr::from([127, 0, 0, n as u8 % 3]), 2);
                        let open = clients.open.iter().map(|it| {
                            let shard = it.lock();
                            shard.values().copied().max().unwrap_or_default()
                        });
                        most = most.max(open.max().unwrap_or_default());
                        drop(counted);
                    }
                    most
                })
            });
            lanes.map(|lane| lane.join().unwrap())
        });
        assert!(most.iter().all(|most| (1..=2).contains(most)), "{most:?}");
        assert!(clients.open.iter().all(|shard| shard.lock().is_empty()));
    }
}
