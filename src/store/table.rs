//! A bounded table of what is counted by key: parts behind locks of their own, and in each the key used least goes first.
//! Must not know what is kept.

use hashbrown::HashTable;

/// A power of two; lanes rarely meet in one of so many.
pub(super) const SHARDS: usize = 64;
const NONE: u32 = u32::MAX;
/// In place of a link: the slot is held by requests in flight, and is not to be evicted.
const HELD: u32 = NONE - 1;

/// A limit's key, hashed with this process's secret: 128 bits, so that two keys never meet by chance or by design.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub(super) u128);

impl Key {
    /// Which part of a table the key is in.
    pub(super) fn shard(self) -> usize {
        // The low half finds the slot in the shard's table; the high half the shard.
        (self.0 >> 64) as usize % SHARDS
    }
}

struct Slot<S> {
    key: Key,
    state: S,
    /// Towards the one used last.
    newer: u32,
    /// Towards the one to go first.
    older: u32,
}

/// One part of a table, behind a lock of its own.
pub(super) struct Shard<S> {
    index: HashTable<u32>,
    slots: Vec<Slot<S>>,
    free: Vec<u32>,
    newest: u32,
    oldest: u32,
    capacity: usize,
    /// Keys that went since there was no room.
    evicted: u64,
}

impl<S: Default> Shard<S> {
    /// For about `capacity` keys, at least one.
    pub(super) fn new(capacity: usize) -> Shard<S> {
        Shard {
            index: HashTable::new(),
            slots: Vec::new(),
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            capacity: capacity.clamp(1, NONE as usize - 2),
            evicted: 0,
        }
    }

    /// Changes for how many keys it is; the least used that are too many go.
    pub(super) fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity.clamp(1, NONE as usize - 2);
        self.evict(self.capacity);
    }

    /// Has the least used keys go until no more than `keep` are left, or the rest is held.
    fn evict(&mut self, keep: usize) {
        while self.index.len() > keep && self.oldest != NONE {
            let oldest = self.slots[self.oldest as usize].key;
            self.remove(oldest);
            self.evicted += 1;
        }
    }

    /// Keys that went since there was no room for them.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// What is held for the key; not a use of it.
    pub(super) fn get(&self, key: Key) -> Option<&S> {
        Some(&self.slots[self.find(key)? as usize].state)
    }

    /// As [`Shard::get`], to change it.
    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut S> {
        let slot = self.find(key)?;
        Some(&mut self.slots[slot as usize].state)
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    fn find(&self, key: Key) -> Option<u32> {
        self.index
            .find(key.0 as u64, |slot| self.slots[*slot as usize].key == key)
            .copied()
    }

    /// The key's counter, made if need be: now the one used last, or one that is held.
    pub(super) fn touch(&mut self, key: Key, held: bool) -> &mut S {
        let slot = match self.find(key) {
            // Whoever asks much is mostly there.
            Some(slot) if slot == self.newest && !held => {
                return &mut self.slots[slot as usize].state;
            }
            Some(slot) => {
                self.unlink(slot);
                slot
            }
            None => self.insert(key),
        };
        if !held {
            self.link_newest(slot);
        }
        &mut self.slots[slot as usize].state
    }

    /// Where there is such a key and it is not held, it is now the one used last.
    pub(super) fn renew(&mut self, key: Key) {
        if let Some(slot) = self.find(key)
            && slot != self.newest
            && self.slots[slot as usize].newer != HELD
        {
            self.unlink(slot);
            self.link_newest(slot);
        }
    }

    fn insert(&mut self, key: Key) -> u32 {
        // More than one, where many were held a moment ago.
        self.evict(self.capacity - 1);
        let fresh = Slot {
            key,
            state: S::default(),
            newer: HELD,
            older: HELD,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = fresh;
                slot
            }
            None => {
                self.slots.push(fresh);
                self.slots.len() as u32 - 1
            }
        };
        let slots = &self.slots;
        self.index.insert_unique(key.0 as u64, slot, |slot| {
            slots[*slot as usize].key.0 as u64
        });
        slot
    }

    /// Whether there was such a key.
    pub(super) fn remove(&mut self, key: Key) -> bool {
        let found = self
            .index
            .find_entry(key.0 as u64, |slot| self.slots[*slot as usize].key == key);
        let Ok(entry) = found else { return false };
        let (slot, _) = entry.remove();
        self.unlink(slot);
        // What it held goes now, not when the slot is used again.
        self.slots[slot as usize].state = S::default();
        self.free.push(slot);
        true
    }

    fn unlink(&mut self, slot: u32) {
        let Slot { newer, older, .. } = self.slots[slot as usize];
        if newer == HELD {
            return;
        }
        self.slots[slot as usize].newer = HELD;
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older as usize].newer = newer,
        }
    }

    fn link_newest(&mut self, slot: u32) {
        self.slots[slot as usize].newer = NONE;
        self.slots[slot as usize].older = self.newest;
        match self.newest {
            NONE => self.oldest = slot,
            newest => self.slots[newest as usize].newer = slot,
        }
        self.newest = slot;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_is_bounded_and_the_least_used_key_goes() {
        let mut shard = Shard::<()>::new(3);
        let keys: Vec<_> = (0..5).map(|n| Key(n << 64 | n)).collect();
        for key in &keys[..3] {
            shard.touch(*key, false);
        }
        shard.touch(keys[0], false);
        shard.touch(keys[3], false);
        assert!(shard.get(keys[0]).is_some() && shard.get(keys[1]).is_none());
        shard.touch(keys[4], false);
        assert!(shard.get(keys[2]).is_none() && shard.index.len() == 3 && shard.slots.len() == 3);
        assert_eq!(shard.evicted(), 2);
        shard.set_capacity(1);
        assert!(shard.get(keys[4]).is_some() && shard.len() == 1);
        shard.remove(keys[4]);
        assert_eq!(shard.evicted(), 4);
    }

    #[test]
    fn what_requests_in_flight_hold_is_not_evicted() {
        let mut shard = Shard::<()>::new(2);
        let keys: Vec<_> = (0..5).map(|n| Key(n << 64 | n)).collect();
        shard.touch(keys[0], true);
        for key in &keys[1..] {
            shard.touch(*key, false);
        }
        assert!(shard.get(keys[0]).is_some());
        assert_eq!(shard.len(), 2);
        assert!(
            shard.remove(keys[0])
                && shard.remove(keys[4])
                && shard.newest == NONE
                && shard.oldest == NONE
        );
    }

    proptest! {
        #[test]
        fn the_links_of_a_shard_hold_every_key_once(ops in prop::collection::vec((0u128..12, 0..3), 0..200)) {
            let mut shard = Shard::<()>::new(6);
            for (name, op) in ops {
                let key = Key(name);
                match op {
                    0 => { shard.touch(key, false); }
                    1 => { shard.remove(key); }
                    _ => {
                        shard.renew(key);
                        prop_assert!(shard.find(key).is_none_or(|slot| slot == shard.newest));
                    }
                }
                let (mut seen, mut at) = (Vec::new(), shard.newest);
                while at != NONE {
                    seen.push(at);
                    at = shard.slots[at as usize].older;
                }
                prop_assert_eq!(seen.len(), shard.index.len());
                prop_assert!(seen.iter().all(|slot| shard.find(shard.slots[*slot as usize].key) == Some(*slot)));
                prop_assert!(shard.index.len() <= 6);
            }
        }
    }
}
