//! The whole way of batches, by schedules that a seed draws: what this module keeps, a spool on the disk, and models of Redis and of workers. Calls
//! are carried out late or answered by nobody, Redis goes back to what it was a while ago, workers die between any two steps, and the disk fails or is
//! away.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use fastrand::Rng;
use futures_util::FutureExt as _;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::audit::receipt::Receipt;
use crate::store::spool::Spool;

/// A batch as a stream has it, by its first and last number.
type Numbers = (u64, u64);

/// What a replica may lack.
#[derive(Debug, Clone, Default)]
struct Redis {
    entries: BTreeMap<u64, Numbers>,
    done: BTreeMap<u64, u64>,
    next_id: u64,
}

/// What a worker does of an entry, in order.
#[derive(Debug, Clone, Copy)]
enum Step {
    Store,
    Say,
    LetGo,
}

struct Work {
    id: u64,
    numbers: Numbers,
    next: Step,
}

/// A look at what is committed, as `send` takes it.
enum Look {
    Rests,
    Missing(Vec<(u64, String)>),
}

struct Sim {
    random: Rng,
    uncommitted: Uncommitted,
    spool: Spool,
    /// The spool's folder, and where it is while it is away.
    folders: [PathBuf; 2],
    is_away: bool,
    disk_fails: bool,
    next: u64,
    made: BTreeMap<u64, Numbers>,
    receipts: BTreeMap<u64, Receipt>,
    /// Calls that add a batch, and whether their answers are waited for.
    adds: Vec<(u64, bool)>,
    answers: Vec<(u64, u64)>,
    redis: Redis,
    replica: Redis,
    works: Vec<Work>,
    postgres: BTreeSet<Numbers>,
    look: Look,
    known: Vec<u64>,
}

impl Sim {
    fn new(seed: u64, folder: &std::path::Path) -> Sim {
        let boot = Uuid::from_bytes([7; 16]);
        let (spool, _) = Spool::open(folder, 8 << 20, boot).unwrap();
        Sim {
            random: Rng::with_seed(seed),
            uncommitted: Uncommitted {
                spool_first: true,
                ..Uncommitted::default()
            },
            spool,
            folders: [boot.to_string(), "away".to_owned()].map(|name| folder.join(name)),
            is_away: false,
            disk_fails: false,
            next: 1,
            made: BTreeMap::new(),
            receipts: BTreeMap::new(),
            adds: Vec::new(),
            answers: Vec::new(),
            redis: Redis::default(),
            replica: Redis::default(),
            works: Vec::new(),
            postgres: BTreeSet::new(),
            look: Look::Rests,
            known: Vec::new(),
        }
    }

    fn make(&mut self) {
        let numbers = (self.next, self.next + self.random.u64(0..3));
        self.next = numbers.1 + 1;
        let duty = Duty::default();
        self.receipts.insert(numbers.0, duty.receipt());
        self.made.insert(numbers.0, numbers);
        let bytes = vec![7; self.random.usize(1..4_000)];
        self.uncommitted
            .push(numbers, bytes.into(), None, vec![duty], clock::now());
    }

    fn move_spool(&mut self) {
        let [from, to] = &mut self.folders;
        std::fs::rename(&*from, &*to).unwrap();
        std::mem::swap(from, to);
        self.is_away ^= true;
    }

    /// As `ship` does once the disk has synced, or has not.
    fn persist(&mut self) {
        let fails = self.disk_fails || self.is_away;
        if !fails {
            for (first, bytes) in self.uncommitted.at_risk() {
                let place = self.spool.append(&bytes).unwrap();
                match self.uncommitted.spooled(first, place, 20_000) {
                    Some(place) => self.spool.release(place).unwrap(),
                    None => self.uncommitted.settle(first),
                }
            }
        }
        self.uncommitted.spool_first = !fails;
    }

    fn send(&mut self) {
        let Some((first, source)) = self.uncommitted.next() else {
            return;
        };
        if matches!(source, Source::Spool) {
            let place = self.uncommitted.place(first).unwrap();
            let read = self.spool.read(place);
            assert_eq!(read.is_err(), self.is_away);
            if let Err(error) = read {
                assert!(!error.is_lost(), "{error}");
                self.uncommitted.again(first, clock::now());
                self.uncommitted.set_aside();
                return;
            }
        }
        self.adds.push((first, true));
    }

    /// Redis carries a call out, whoever waits for it.
    fn add(&mut self, index: usize) {
        let (first, is_awaited) = self.adds.swap_remove(index);
        self.redis.next_id += 1;
        let id = self.redis.next_id;
        self.redis.entries.insert(id, self.made[&first]);
        if is_awaited {
            self.answers.push((first, id));
        }
    }

    /// The time for an answer is over.
    fn give_up(&mut self, index: usize) {
        let waits = self.adds.iter_mut().filter(|(_, is_awaited)| *is_awaited);
        let waits: Vec<_> = waits.collect();
        let count = waits.len();
        if let Some((first, is_awaited)) = waits.into_iter().nth(index % count.max(1)) {
            *is_awaited = false;
            let first = *first;
            self.uncommitted.again(first, clock::now());
        }
    }

    fn answer(&mut self, index: usize, is_lost: bool) {
        let (first, id) = self.answers.swap_remove(index);
        match is_lost {
            true => self.uncommitted.again(first, clock::now()),
            false => self.uncommitted.added(
                first,
                Entry {
                    shard: 0,
                    id: id.to_string(),
                    added: clock::now(),
                },
            ),
        }
    }

    /// A worker is given an entry, be it that another had it.
    fn read(&mut self) {
        let count = self.redis.entries.len();
        if count > 0 {
            let entry = self.redis.entries.iter().nth(self.random.usize(..count));
            let (id, numbers) = entry.map(|(id, numbers)| (*id, *numbers)).unwrap();
            let next = Step::Store;
            self.works.push(Work { id, numbers, next });
        }
    }

    fn work(&mut self, index: usize, is_heard: bool) {
        let Work { id, numbers, next } = &mut self.works[index];
        match next {
            Step::Store => {
                // Once, whoever else does.
                self.postgres.insert(*numbers);
                *next = Step::Say;
            }
            Step::Say => {
                if is_heard {
                    self.redis.done.insert(numbers.0, numbers.1);
                }
                *next = Step::LetGo;
            }
            Step::LetGo => {
                if is_heard {
                    // By its id: after a failover another may have that.
                    self.redis.entries.remove(id);
                }
                self.works.swap_remove(index);
            }
        }
    }

    /// A step of `learn`.
    fn learn(&mut self) {
        self.uncommitted.bring_back();
        match std::mem::replace(&mut self.look, Look::Rests) {
            Look::Rests => {
                let (waiting, _) = self
                    .uncommitted
                    .waiting(clock::now(), Duration::ZERO, 0, 50);
                let gone = waiting.into_values().flatten();
                let gone = gone.filter(|(_, id)| {
                    let id = id.parse().unwrap();
                    !self.redis.entries.contains_key(&id)
                });
                self.look = Look::Missing(gone.collect());
            }
            Look::Missing(missing) => {
                for first in &self.known {
                    self.redis.done.remove(first);
                }
                let done: Vec<_> = self
                    .redis
                    .done
                    .iter()
                    .map(|(first, last)| (*first, *last))
                    .collect();
                let released = self.uncommitted.committed(&done);
                let said = done.iter().map(|(first, _)| *first);
                self.known = said
                    .filter(|first| *first <= self.uncommitted.newest)
                    .collect();
                for place in released.places {
                    self.spool.release(place).unwrap();
                }
                let lost = missing
                    .iter()
                    .filter(|(first, id)| self.uncommitted.is_in(*first, id));
                let lost: Vec<_> = lost.map(|(first, _)| *first).collect();
                lost.iter()
                    .for_each(|first| self.uncommitted.again(*first, clock::now()));
            }
        }
    }

    fn step(&mut self) {
        match self.random.u8(..100) {
            0..14 => self.make(),
            14..24 => self.persist(),
            24..40 => self.send(),
            40..54 if !self.adds.is_empty() => {
                let index = self.random.usize(..self.adds.len());
                self.add(index);
            }
            54..57 => {
                let index = self.random.usize(..);
                self.give_up(index);
            }
            57..68 if !self.answers.is_empty() => {
                let index = self.random.usize(..self.answers.len());
                let is_lost = self.random.u8(..8) == 0;
                self.answer(index, is_lost);
            }
            68..74 => self.read(),
            74..88 if !self.works.is_empty() => {
                let index = self.random.usize(..self.works.len());
                match self.random.u8(..10) {
                    // It dies.
                    0 => drop(self.works.swap_remove(index)),
                    heard => self.work(index, heard > 1),
                }
            }
            88..94 => self.learn(),
            94 => self.move_spool(),
            95 => self.disk_fails ^= true,
            96 | 97 => self.replica = self.redis.clone(),
            98 => self.redis = self.replica.clone(),
            99 if self.random.u8(..4) == 0 => self.redis = Redis::default(),
            _ => {}
        }
        self.check();
    }

    fn check(&self) {
        for (first, numbers) in &self.made {
            let is_kept = self.uncommitted.batches.contains_key(first);
            assert!(
                is_kept || self.postgres.contains(numbers),
                "{numbers:?} is lost"
            );
        }
    }

    /// Nothing fails any more.
    fn settle(&mut self) {
        self.disk_fails = false;
        if self.is_away {
            self.move_spool();
        }
        self.uncommitted.bring_back();
        self.works.clear();
        while !self.adds.is_empty() {
            self.add(0);
        }
        while !self.answers.is_empty() {
            self.answer(0, false);
        }
        for _ in 0..4 {
            self.persist();
            loop {
                self.send();
                if self.adds.is_empty() {
                    break;
                }
                self.add(0);
                self.answer(0, false);
            }
            while !self.redis.entries.is_empty() {
                self.read();
                (0..3).for_each(|_| self.work(0, true));
            }
            (0..2).for_each(|_| self.learn());
        }
        self.check();
        assert!(self.uncommitted.is_empty(), "{:?}", self.uncommitted);
        assert_eq!(
            (self.uncommitted.memory(), self.uncommitted.events()),
            (0, 0)
        );
        assert_eq!(self.spool.records(), 0, "each place is let go of");
        let all: BTreeSet<_> = self.made.values().copied().collect();
        assert_eq!(self.postgres, all);
        for (first, receipt) in &self.receipts {
            let settled = receipt.settled().now_or_never();
            assert_eq!(settled, Some(true), "who waits for {first}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 0, ..ProptestConfig::with_cases(150) })]

    #[test]
    fn no_batch_is_lost_or_kept_for_ever_whatever_fails(seed in any::<u64>()) {
        let folder = tempfile::tempdir().unwrap();
        let mut sim = Sim::new(seed, folder.path());
        for _ in 0..600 {
            sim.step();
        }
        sim.settle();
    }
}
