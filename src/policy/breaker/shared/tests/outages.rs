//! Fleets around a Redis that is away, loses what it has, or whose clock leaps, by schedules that a seed draws.

use fastrand::Rng;

use super::*;

/// Of those that are to be told apart from one that is sick.
const QUORUM: usize = 2;

#[derive(Debug, Clone, Copy)]
enum Outage {
    /// It comes back with what it had.
    Away(Duration),
    /// It comes back with nothing.
    Emptied(Duration),
    /// It loses what it has, and no connection.
    Flushed,
    /// Its clock is ahead of what it was.
    Leaps(Duration),
}

struct World {
    sim: Sim,
    random: Rng,
    /// Processes that have calls, beside the sick one.
    busy: Vec<bool>,
    /// It has left for good.
    gone: Option<usize>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Rng::with_seed(seed);
        let members = random.usize(2..6);
        let mut sim = Sim::new(members, QUORUM);
        sim.script.generation = random.u64(..4);
        sim.script.forgets = true;
        (0..2).for_each(|_| all_sync(&mut sim));
        World {
            sim,
            busy: (0..members).map(|_| random.bool()).collect(),
            gone: None,
            random,
        }
    }

    /// Calls come for `time`, of which the first process sees each fail. Those report that `hear` Redis by then; what others tell is lost.
    fn live(&mut self, time: Duration, hear: &[Duration]) {
        let end = self.sim.now + time;
        while self.sim.now < end {
            self.sim.now += self.random.u32(1..40) * MS;
            for (process, hears_from) in hear.iter().enumerate() {
                if self.gone == Some(process) {
                    continue;
                }
                let is_sick = process == 0;
                let calls = match is_sick || self.busy[process] {
                    true => self.random.usize(..4),
                    false => 0,
                };
                for _ in 0..calls {
                    if self.sim.enter(process) {
                        let outcome = if is_sick { Failure } else { Success };
                        self.sim.end(self.sim.calls.len() - 1, outcome);
                    }
                }
                if self.sim.members[process].report_in(self.sim.now) > Duration::ZERO {
                    continue;
                }
                match self.sim.now >= *hears_from {
                    true => self.sim.sync(process),
                    false => {
                        self.sim.send(process);
                        self.sim.requests.clear();
                        self.sim.lose(process);
                    }
                }
                let Script { state, members, .. } = &self.sim.script;
                assert_eq!(*state, State::Closed, "{members:?} are heard");
            }
        }
    }

    /// The last one leaves, if it leaves enough of them. Others are told of it 5 s later, and believe it after as long again.
    fn one_leaves(&mut self, well: &[Duration]) {
        let last = self.busy.len() - 1;
        if self.gone.is_none() && last >= QUORUM {
            self.gone = Some(last);
            // Often just until fewer are believed.
            let time = match self.random.bool() {
                true => self.random.u32(9_500..10_300),
                false => self.random.u32(..11_000),
            };
            self.live(time * MS, well);
        }
    }

    fn empty(&mut self) {
        self.sim.script = Script {
            forgets: true,
            // What was counted so far.
            counted: std::mem::take(&mut self.sim.script.counted),
            ..Script::new(QUORUM)
        };
    }

    fn go_through(&mut self, outage: Outage) {
        let nobody = vec![Duration::MAX; self.busy.len()];
        match outage {
            Outage::Away(time) => self.live(time, &nobody),
            Outage::Emptied(time) => {
                self.empty();
                self.live(time, &nobody);
            }
            Outage::Flushed => self.empty(),
            Outage::Leaps(by) => {
                let script = &mut self.sim.script;
                let times = script.members.values_mut();
                let times = times.chain(script.doubters.values_mut().map(|(at, _)| at));
                times.for_each(|at| *at = at.saturating_sub(by));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 0, ..ProptestConfig::with_cases(300) })]

    /// Which process Redis hears first once it is back is chance.
    #[test]
    fn one_sick_process_trips_no_quorum_whatever_redis_goes_through(seed in any::<u64>()) {
        let mut world = World::new(seed);
        let well = vec![Duration::ZERO; world.busy.len()];
        world.live(2 * SECOND, &well);
        for _ in 0..3 {
            let time = world.random.u32(..9_000) * MS;
            let outage = match world.random.u8(..4) {
                0 => Outage::Away(time),
                1 => Outage::Emptied(time),
                2 => Outage::Flushed,
                _ => Outage::Leaps(time),
            };
            if world.random.bool() {
                world.one_leaves(&well);
            }
            world.go_through(outage);
            let now = world.sim.now;
            // As long as it takes to connect again.
            let most = match outage {
                Outage::Away(_) | Outage::Emptied(_) => 1_500,
                Outage::Flushed | Outage::Leaps(_) => 1,
            };
            let hear = well.iter().map(|_| now + world.random.u32(..most) * MS);
            let hear: Vec<_> = hear.collect();
            let time = world.random.u32(500..4_000) * MS;
            world.live(time, &hear);
        }
    }
}

/// Its answers may be late, and its reports be heard all the same.
#[test]
fn who_goes_on_by_itself_takes_no_slots_from_the_others() {
    let mut sim = opened();
    sim.sync(0);
    assert!(!sim.enter(0), "a request that would be a probe");
    assert_eq!(lost(&mut sim), Some(Change::Lost));
    sim.send(0);
    sim.run(0);
    assert_eq!(sim.script.state, State::HalfOpen);
    assert!(sim.script.slots.is_empty());
}
